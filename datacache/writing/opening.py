"""
A writable data set put together: landing zone, journal, overlay, uploader.
"""

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

from datacache.cache.disk import Handle
from datacache.cache.owner import Owner
from datacache.cache.tier import Lent, Tier
from datacache.cache.tiered import TieredCache
from datacache.clock import Clock
from datacache.config.settings import Settings
from datacache.errors import CacheError, LandingBroken, Locked, SettingError
from datacache.index.live import LiveIndex
from datacache.model import Buffer, CacheKey, Dataset, Entry, Kind, MiB, MountPoint
from datacache.sources.sink import Sink
from datacache.writing.ballast import Ballast
from datacache.writing.journal import Journal
from datacache.writing.keeper import Keeper, Watermarks
from datacache.writing.landing import MANAGED, Landing, Quiet
from datacache.writing.overlay import Overlay
from datacache.writing.settling import Settling
from datacache.writing.uploader import Uploader

_log = logging.getLogger(__name__)

_PIECE = 8 * MiB
"""Bytes copied at once between cache and landing zone; Python holds one piece."""


class OpenObject(Protocol):
    """One open object."""

    def read(self, offset: int, length: int) -> Buffer: ...
    def close(self) -> None: ...


class Reader(Protocol):
    """What is asked of the read path (`datacache.reading.reader.Reader`)."""

    def open(self, entry: Entry) -> OpenObject: ...
    def lend(self, entry: Entry) -> Lent | None: ...
    def cache_key(self, entry: Entry) -> CacheKey: ...


class Writing:
    """The write path of one data set, at work."""

    def __init__(
        self, landing: Landing, journal: Journal, overlay: Overlay, settling: Settling, uploader: Uploader,
        keeper: Keeper,
    ) -> None:  # fmt: skip
        self.landing, self.journal, self.overlay = landing, journal, overlay
        self.settling, self.uploader, self.keeper = settling, uploader, keeper

    def __repr__(self) -> str:
        return f"<Writing {self.landing.directory}>"

    def flush(self, top: Entry | None, *, timeout: float) -> dict[str, Any]:
        """Wait until all that is due below `top` (None: all of it) is in the bucket, for `timeout` seconds at
        most; whether it is, and what is left."""
        self.overlay.closes.wait()
        unnoted = self.overlay.note_closes()
        self.overlay.sync_names()
        prefix = None if top is None else (top.mount, self.overlay.key_of(top))
        flushed = self.uploader.flush(prefix, timeout=timeout)
        dirty = self.settling.dirty()
        return {
            "clean": flushed.complete and not unnoted,
            "pending": dirty.due, "open": dirty.open, "bytes": dirty.bytes,
            "errors": [*self._unnoted(unnoted), *self.uploader.reasons(flushed.left)][:20],
        }  # fmt: skip

    def _unnoted(self, count: int) -> list[str]:
        if not count:
            return []
        closed = "1 file was" if count == 1 else f"{count} files were"
        return [f"{closed} closed, which cannot be noted: the landing zone has no room for its journal"]

    def status(self) -> dict[str, Any]:
        """For `datacache status`; docs/operations.md describes the keys."""
        room = self.landing.room()
        return {
            "landing": self.landing.directory,
            "landing_total_bytes": room.total,
            "landing_free_bytes": room.free,
            **{
                f"dirty_{name}": value
                for name, value in asdict(self.settling.dirty()).items()
                if name != "oldest"
            },
            "dirty_unnoted": len(self.overlay.ledger.unnoted),
            "short_of_room": self.keeper.hurrying,
            "parked": list(self.settling.parked().values())[:20],
            "uploads": self.uploader.status(),
        }


def landing_directory(settings: Settings) -> str:
    """Where what is written lands."""
    return settings.writing.landing or os.path.join(settings.state, "landing")


def make_way(directory: str) -> None:
    """Where the disk of a landing zone is full, give up what was kept for that: to open it, and the catalogue
    of names that mostly lies beside it, takes space."""
    Ballast(os.path.join(directory, MANAGED)).lighten()


@contextmanager
def open_writing(
    settings: Settings,
    *,
    index: LiveIndex,
    reader: Reader,
    cache: TieredCache,
    sinks: Sequence[Sink],
    owner: Owner,
    clock: Clock,
    resumed: bool,
    leases_tell: bool,
) -> Iterator[Writing]:
    """The write path of `settings`, until the block is left. Raises Locked, LandingError, SettingError."""
    directory = landing_directory(settings)
    _check_place(directory, [sink.uri for sink in sinks])
    with ExitStack() as built:
        try:
            landing = Landing(directory, owner, reserve=settings.writing.reserve)
        except Locked as taken:
            where = f", mounted at {taken.mount}" if taken.mount else ""
            expected = f"one that nobody uses; process {taken.pid} does{where}"
            raise SettingError("--landing", directory, expected) from taken
        except LandingBroken as broken:
            raise SettingError(
                "--landing", directory, f"a directory, or one that can be made ({broken})"
            ) from broken
        built.callback(landing.close)
        journal = Journal(landing.journal)
        built.callback(journal.close)
        _check_owed(journal, directory, settings.dataset, [sink.uri for sink in sinks])
        copies = _Copies(reader, cache)
        overlay = Overlay(
            index, journal, landing, clock=clock, bring=copies.bring,
            roots=[index.resolve(point.path).ino for point in settings.dataset.mounts],
            accepts=lambda mount, key: sinks[mount].accepts(key),
            resumed=resumed, leases_tell=leases_tell,
        )  # fmt: skip
        built.callback(overlay.close)
        host = socket.gethostname().partition(".")[0]
        settling = Settling(overlay, keep=copies.keep, conflict=settings.writing.conflict, host=host)
        uploader = Uploader(settling, sinks, settings.upload, clock=clock)
        built.callback(uploader.close)
        overlay.owing.attach(uploader)
        marks = Watermarks(settings.writing.high, settings.writing.low)
        keeper = Keeper(landing, journal, overlay, copies=cache, uploads=uploader, marks=marks)
        built.callback(keeper.close)
        keeper.start()
        yield Writing(landing, journal, overlay, settling, uploader, keeper)


def _check_place(directory: str, uris: Sequence[str]) -> None:
    """What lands must not lie in what is shown, nor the other way round."""
    own = os.path.realpath(directory)
    for uri in uris:
        if uri.startswith("file://"):
            store = os.path.realpath(uri.removeprefix("file://").partition("?")[0])
            if os.path.commonpath((own, store)) in (own, store):
                raise SettingError("--landing", directory, f"a directory neither in nor above {uri}")


def _check_owed(journal: Journal, directory: str, dataset: Dataset, uris: list[str]) -> None:
    """A landing zone is of one data set as long as it owes its buckets something."""
    known = journal.meta().get("stores")
    if known is not None and json.loads(known) != uris and (journal.ops() or journal.nodes()):
        raise SettingError(
            "--landing",
            directory,
            f"one with nothing for another data set in it; it holds what was written to "
            f"{', '.join(json.loads(known))}: `datacache recover {directory}` uploads that",
        )
    points = [{"uri": one.uri, "path": one.path, "options": dict(one.options)} for one in dataset.mounts]
    with journal.change("mounts") as change:
        change.set_meta("stores", json.dumps(uris))
        change.set_meta("dataset", json.dumps({"name": dataset.name, "mounts": points}))


def owed(directory: str) -> Dataset:
    """The data set that a landing zone belongs to. Raises SettingError where there is none."""
    path = os.path.join(directory, MANAGED, "journal.db")
    if not os.path.exists(path):
        raise SettingError("DIR", directory, f"a landing zone: a directory with {MANAGED}/journal.db in it")
    journal = Journal(path)
    try:
        known = json.loads(journal.meta().get("dataset", "{}"))
    finally:
        journal.close()
    if not known:
        raise SettingError("DIR", directory, "a landing zone that was used by a mount")
    return Dataset(known["name"], tuple(MountPoint(**point) for point in known["mounts"]))


class _Copies:
    """Bytes between the cache and the landing zone."""

    def __init__(self, reader: Reader, cache: Tier) -> None:
        self._reader, self._cache = reader, cache

    def bring(self, entry: Entry, descriptor: int) -> None:
        """The bytes of a clean file, from the cache or the store, into a landing file. Where a tier has all
        of it the kernel copies, on some file systems by reference."""
        lent = self._reader.lend(entry)
        if lent is not None:
            try:
                _copy(lent.descriptor, descriptor, entry.size)
            finally:
                lent.close()
            return
        opened = self._reader.open(entry)
        try:
            for at in range(0, entry.size, _PIECE):
                _write(descriptor, memoryview(opened.read(at, min(_PIECE, entry.size - at))), at)
        finally:
            opened.close()

    def keep(self, entry: Entry, content: Quiet) -> Callable[[], None] | None:
        """What the store has now, in the cache, as far as there is room: the landing file itself, when it is
        nobody's any more, where the two lie on one file system (to make a file and write it takes 50 times as
        long as to give it another name); else a copy."""
        assert entry.kind is Kind.FILE
        key: CacheKey = self._reader.cache_key(entry)
        if content.leased:
            file = Handle(content.duplicate())
            taken = self._cache.take(key, file)
            if taken is not None:
                return partial(self._take, key, file, taken)
        self._copy_in(key, content.read)
        return None

    def _take(self, key: CacheKey, file: Handle, taken: Callable[[], bool]) -> None:
        if not taken():
            self._copy_in(key, lambda at, length: os.pread(file.fd, length, at))

    def _copy_in(self, key: CacheKey, read: Callable[[int, int], Buffer]) -> None:
        file = self._cache.open(key)
        try:
            for at in range(0, key.size, _PIECE):
                file.fill(at, read(at, min(_PIECE, key.size - at)))
        except (CacheError, OSError) as error:
            _log.debug("%s is not kept in the cache: %s", key.key, error)
        finally:
            file.close()


def _copy(source: int, target: int, size: int) -> None:
    at = 0
    with suppress(OSError):  # across file systems, or where it is not offered: by hand
        while at < size:
            done = os.copy_file_range(source, target, size - at, at, at)
            if not done:
                break
            at += done
    while at < size:
        data = os.pread(source, min(_PIECE, size - at), at)
        if not data:
            raise LandingBroken("a cached file is shorter than its object")
        _write(target, memoryview(data), at)
        at += len(data)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done
