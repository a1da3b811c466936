"""A writable data set without a mount: an overlay over a bucket in memory, and who pays the bucket."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datacache.cache.owner import Owner
from datacache.clock import VirtualClock
from datacache.config.settings import Conflict, IndexSettings
from datacache.errors import NoSuchPath, NotFound, Stopped
from datacache.index.index import ROOT
from datacache.index.live import LiveIndex
from datacache.index.opening import open_index
from datacache.model import ByteRange, Dataset, Entry, Kind, MountPoint, ObjectInfo
from datacache.sources.memory import MemorySource
from datacache.sources.sink import Stored
from datacache.writing.journal import ANYTHING, NOTHING, Journal, Op, OpKind
from datacache.writing.landing import Landing, Quiet
from datacache.writing.opening import make_way
from datacache.writing.overlay import Overlay
from datacache.writing.schedule import runnable
from datacache.writing.settling import Settling

DATASET = Dataset("model", (MountPoint("memory://test", "/"),))


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

    @staticmethod
    def new() -> "Place":
        return Place(Path(tempfile.mkdtemp(prefix="datacache-model-")), MemorySource(), VirtualClock())

    def remove(self) -> None:
        shutil.rmtree(self.root)


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
        self.landing = Landing(str(place.root), Owner(os.getpid(), "", ""), reserve=0.0)
        self.journal = Journal(self.landing.journal)
        self.kept: dict[str, bytes] = {}
        self.before_kept: Callable[[], object] = lambda: None
        """Called before bytes that the store has now are put into the cache."""
        self.overlay = Overlay(
            index, self.journal, self.landing, clock=place.clock, bring=self._bring,
            roots=[ROOT], resumed=resumed, accepts=lambda mount, key: markers or not key.endswith("/"),
        )  # fmt: skip
        self.settling = Settling(self.overlay, keep=self._keep, conflict=conflict, host="")

    def _bring(self, entry: Entry, descriptor: int) -> None:
        info = ObjectInfo(entry.key, entry.size, entry.version, entry.mtime_ns)
        os.pwrite(descriptor, self.place.bucket.read(info, ByteRange(0, entry.size)), 0)

    def _keep(self, entry: Entry, content: Quiet) -> None:
        self.before_kept()
        self.kept[entry.key] = bytes(content.read(0, content.size))

    def close(self) -> None:
        """As it ends, and as if it were killed: nothing is put in order."""
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
        else:
            self.overlay.land(ino, truncate=offset is None)
        file = self.overlay.open(ino, writing=True)
        try:
            os.pwrite(file.descriptor, data, offset or 0)
            self.overlay.sync(ino)
        except Killed:
            file.close()  # as the kernel does
            raise
        self.overlay.closed(ino, file)

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
        info = ObjectInfo(entry.key, entry.size, entry.version, entry.mtime_ns)
        return bytes(self.place.bucket.read(info, ByteRange(0, entry.size)))

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
