"""
A writable data set without a mount: an overlay over a bucket in memory, and who pays the bucket; with a
cache on the disk of the landing zone, where that is asked for.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from datacache.cache.directory import DirectoryTier, Rules
from datacache.cache.disk import Disk
from datacache.cache.memory import MemoryTier
from datacache.cache.owner import Owner
from datacache.cache.tier import Lent, Tier
from datacache.clock import VirtualClock
from datacache.config.settings import Conflict, IndexSettings
from datacache.errors import CacheError, NoSuchPath, NotFound, Stopped, VersionChanged
from datacache.index.index import ROOT
from datacache.index.live import LiveIndex
from datacache.index.opening import open_index
from datacache.model import (
    Buffer,
    ByteRange,
    CacheKey,
    Dataset,
    Entry,
    KiB,
    Kind,
    MiB,
    MountPoint,
    ObjectInfo,
)
from datacache.sources.memory import MemorySource
from datacache.sources.sink import Stored
from datacache.writing.copies import Copies, Ready
from datacache.writing.journal import ANYTHING, NOTHING, Journal, Op, OpKind
from datacache.writing.landing import LandedFile, Landing, Quiet
from datacache.writing.opening import make_way
from datacache.writing.overlay import Overlay
from datacache.writing.schedule import runnable
from datacache.writing.settling import Settling
from datacache.writing.steps import step

DATASET = Dataset("model", (MountPoint("memory://test", "/"),))


BLOCK = 64 * KiB
"""Bytes of a block of the cache."""


class Killed(BaseException):
    """The process dies here."""


@dataclass
class Place:
    """What outlives a process: the disk, the bucket and the time."""

    root: Path
    bucket: MemorySource
    clock: VirtualClock
    marks: dict[str, str] = field(default_factory=dict)
    """By key: of which operation its object is; what is metadata in a real store."""
    boot: str = "one"
    cached: bool = False
    """Whether the disk has a cache, too."""

    @staticmethod
    def new(*, cached: bool = False) -> "Place":
        root = Path(tempfile.mkdtemp(prefix="datacache-model-"))
        return Place(root, MemorySource(), VirtualClock(), cached=cached)

    def remove(self) -> None:
        shutil.rmtree(self.root)


class SteppedDisk(Disk):
    """A cache's disk on which a process may die between names."""

    def link(self, fd: int, name: str, *, at: int) -> None:
        step("cache.before.link")
        super().link(fd, name, at=at)
        step("cache.after.link")

    def unlink(self, name: str, *, at: int) -> None:
        step("cache.before.unlink")
        super().unlink(name, at=at)
        step("cache.after.unlink")


class _Object:
    """One open object of the bucket."""

    def __init__(self, bucket: MemorySource, entry: Entry) -> None:
        self._bucket = bucket
        self._info = ObjectInfo(entry.key, entry.size, entry.version, entry.mtime_ns)

    def read(self, offset: int, length: int) -> Buffer:
        return self._bucket.read(self._info, ByteRange(offset, offset + length)) if length else b""

    def close(self) -> None: ...


class _Reader:
    """What a read path is to the write path: it fetches, and keeps nothing by itself."""

    def __init__(self, bucket: MemorySource, cache: Tier) -> None:
        self._bucket, self._cache = bucket, cache

    def cache_key(self, entry: Entry) -> CacheKey:
        return CacheKey("memory://test", entry.key, entry.version.token, entry.size)

    def lend(self, entry: Entry) -> Lent | None:
        return self._cache.lend(self.cache_key(entry))

    def open(self, entry: Entry) -> _Object:
        return _Object(self._bucket, entry)


class _Copies(Copies):
    """A place where a test can do something."""

    before_kept: Callable[[], object] = staticmethod(lambda: None)

    def keep(self, entry: Entry, content: Quiet) -> Ready | None:
        self.before_kept()
        return super().keep(entry, content)


class Mounted:
    """One life of a writable data set."""

    def __init__(
        self,
        place: Place,
        *,
        resumed: bool = False,
        conflict: Conflict = Conflict.KEEP_BOTH,
        ttl: float = 10.0,
        markers: bool = True,
    ) -> None:
        """`markers`: the store can have keys that end in "/"."""
        self.place = place
        make_way(str(place.root))
        index = open_index(
            DATASET, [place.bucket], IndexSettings(ttl=ttl), state=str(place.root / "state"),
            clock=place.clock, resumed=resumed,
        )  # fmt: skip
        assert isinstance(index, LiveIndex)
        self.index = index
        owner = Owner(os.getpid(), "", "")
        self.landing = Landing(str(place.root), owner, reserve=0.0, block=BLOCK)
        self.journal = Journal(self.landing.journal)
        self.cache: Tier = MemoryTier()
        if place.cached:
            rules = Rules("ssd:x", 64 * MiB, BLOCK, reserve=0.0, dataset="model")
            self.cache = DirectoryTier(
                str(place.root), rules, owner=owner, clock=place.clock, disk=SteppedDisk(), boot=place.boot,
                keeper=False,
            )  # fmt: skip
        self.reader = _Reader(place.bucket, self.cache)
        self.copies = _Copies(self.reader, self.cache, worth_giving=1)
        self.overlay = Overlay(
            index, self.journal, self.landing, clock=place.clock, copies=self.copies,
            roots=[ROOT], resumed=resumed, boot=place.boot,
            accepts=lambda mount, key: markers or not key.endswith("/"),
        )  # fmt: skip
        self.settling = Settling(self.overlay, conflict=conflict, host="")

    def close(self) -> None:
        """As it ends, and as if it were killed: nothing is put in order."""
        if isinstance(self.cache, DirectoryTier):
            self.cache.abandon()
        self.index.close()
        self.journal.close()
        self.landing.close()

    # What programs do

    def at(self, path: str) -> tuple[int, bytes]:
        above, _, name = path.rpartition("/")
        return self.overlay.resolve(above or "/").ino, name.encode()

    def write(self, path: str, data: bytes, offset: int | None = None) -> None:
        """Open, creating it, write, close; without `offset` in place of what was there."""
        parent, name = self.at(path)
        try:
            ino = self.overlay.lookup(parent, name).ino
        except NoSuchPath:
            ino = self.overlay.create(parent, name, mode=0o644, uid=1, gid=2).ino
            file = self.overlay.open(ino, writing=True)
        else:
            file = self.landed(ino, truncate=offset is None)
        try:
            os.pwrite(file.descriptor, data, offset or 0)
            self.overlay.sync(ino)
        except Killed:
            file.close()  # as the kernel does
            raise
        self.overlay.closed(ino, file)

    def landed(self, ino: int, *, truncate: bool) -> LandedFile:
        """Open a file for writing that was there."""
        while True:
            self.overlay.land(ino, truncate=truncate)
            with suppress(VersionChanged):  # it was uploaded in this moment
                file = self.overlay.open(ino, writing=True)
                if truncate:
                    os.ftruncate(file.descriptor, 0)
                return file

    def read(self, path: str) -> bytes:
        entry = self.overlay.resolve(path)
        return self.read_entry(entry)

    def read_entry(self, entry: Entry) -> bytes:
        if self.overlay.landed(entry.ino):
            file = self.overlay.open(entry.ino, writing=False)
            try:
                return os.pread(file.descriptor, 1 << 20, 0)
            finally:
                self.overlay.closed(entry.ino, file)
        if not entry.size:
            return b""
        cached = self.cache.read_whole(self.reader.cache_key(entry))
        return bytes(self.reader.open(entry).read(0, entry.size) if cached is None else cached)

    def put_in_cache(self, path: str) -> None:
        """Have the bytes of a clean file in the cache, as if it had been read."""
        entry = self.overlay.resolve(path)
        if not self.overlay.landed(entry.ino) and entry.kind is Kind.FILE and entry.size:
            file = self.cache.open(self.reader.cache_key(entry))
            try:
                file.fill(0, self.reader.open(entry).read(0, entry.size))
            finally:
                file.close()

    def in_cache(self, key: CacheKey) -> Buffer | None:
        """The bytes that the cache serves for a key; None where it has not all of them."""
        file = self.cache.open(key)
        try:
            whole = ByteRange(0, key.size)
            return None if file.gaps(whole) else file.read(whole)
        except CacheError:
            return None
        finally:
            file.close()

    def wrong_in_cache(self) -> list[str]:
        """What the cache says of objects that is not true: their versions are digests of their bytes. And
        landing files that are cached files, too."""
        wrong = []
        for one in list(self.cache.entries()):
            data = self.in_cache(one.key)
            if data is not None and hashlib.md5(data).hexdigest() not in one.key.token:
                wrong.append(f"{one.key} is {bytes(data)[:20]!r}")
        named = {node.landing for node in self.overlay.ledger.nodes.values() if node.landing}
        for number in self.landing.shared(named):
            wrong.append(f"the landing file {number} is a cached file")
        return wrong

    def tree(self) -> dict[str, bytes | None]:
        """All paths: the bytes of files, None for directories."""
        found: dict[str, bytes | None] = {}
        below = [("", ROOT)]
        while below:
            prefix, ino = below.pop()
            after = 0
            while page := self.overlay.children(ino, after=after, limit=3):
                for entry in page:
                    path = f"{prefix}/{entry.name.decode()}"
                    assert path not in found, f"{path} is listed twice"
                    if entry.kind is Kind.DIRECTORY:
                        found[path] = None
                        below.append((path, entry.ino))
                    else:
                        found[path] = self.read_entry(entry)
                after = page[-1].ino
        return found

    # Who pays

    def pay(self, choose: int = 0, *, stop: bool = False) -> bool:
        """Do one operation that may be done; whether there was one. `stop`: it is given up halfway."""
        ops = self.settling.ops()
        ready = runnable(ops, ())
        if not ready:
            return False
        op = self.settling.begin(ready[choose % len(ready)])
        assert op is not None
        self.do(op, stop=stop)
        return True

    def pay_if_it_can_be(self) -> None:
        """The same while others change what there is to do."""
        for op in runnable(self.settling.ops(), ())[:1]:
            now = self.settling.begin(op)
            if now is not None:
                self.do(now)

    def in_bucket(self, key: str) -> ObjectInfo | None:
        try:
            return self.place.bucket.stat(key)
        except NotFound:
            return None

    def is_ours(self, op: Op) -> bool:
        """Whether what the bucket holds is from an earlier attempt, whose answer was lost with a process."""
        return self.place.marks.get(op.key, "").partition(".")[0] == op.lineage

    def do(self, op: Op, *, stop: bool = False) -> None:
        bucket = self.place.bucket
        there = self.in_bucket(op.key)
        if op.kind is OpKind.DELETE:
            if there is not None and op.expected not in (ANYTHING, there.version) and not self.is_ours(op):
                self.settling.conflict(op, Stored(there, {}, "digest"))
                return
            if there is not None:
                bucket.delete(op.key)
            self.settling.settled(op, None, None)
            return
        content = self.settling.content(op) if op.landing else None
        try:
            self.put(op, there, content, stop=stop)
        finally:
            if content is not None:
                content.close()

    def put(self, op: Op, there: ObjectInfo | None, content: Quiet | None, *, stop: bool) -> None:
        bucket = self.place.bucket
        if op.landing and (content is None or stop):
            self.settling.stopped(op)
            return
        wanted = op.expected in (ANYTHING, NOTHING if there is None else there.version)
        if not wanted and not self.is_ours(op):
            self.settling.conflict(op, None if there is None else Stored(there, {}, "digest"))
            return
        try:
            if content is not None:
                data = bytes(content.read(0, content.size)) if content.size else b""
            elif op.origin is not None:
                data = bytes(bucket.read(op.origin, ByteRange(0, op.origin.size))) if op.origin.size else b""
            else:
                data = b""
        except Stopped:
            self.settling.stopped(op)
            return
        bucket.put(op.key, data)
        self.place.marks[op.key] = op.id
        found = self.in_bucket(op.key)
        assert found is not None
        self.settling.settled(op, Stored(found, self.settling.metadata(op), "digest"), content)

    def drain(self) -> None:
        """All that is due."""
        for _ in range(1000):
            if not self.pay():
                return
        raise AssertionError(f"it does not end: {self.settling.ops()}")


def rename(mounted: Mounted, old: str, new: str) -> None:
    mounted.overlay.rename(*mounted.at(old), *mounted.at(new), replace=True)


class Forgotten:
    """In place of an uploader: what the store keeps for what, that is not wanted any more."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def poke(self) -> None: ...
    def stop_op(self, seq: int) -> None: ...
    def forget(self, op: Op) -> None:
        self.forgotten.append(op.resume)
