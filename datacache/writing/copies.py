"""
Bytes on their way between the cache and the landing zone: by a change of names, where that can be.

Where a tier of the cache and the landing zone share a file system, what was uploaded becomes a cached file,
and a cached file is landed to be written, without a byte being read: the file gets a second name in the
other directory, and loses its first (`cache.store`, `landing`). Otherwise, and where somebody reads the
file, bytes are copied.

The cache vouches for the bytes of its files. So one is taken only while nobody can write to it (`Quiet`,
by a lease) and in the moment in which it is nobody's landing file any more; and one is given away only when
nobody has it open, and the cache has forgotten it for good. What a crash leaves with two names is landed,
and in the cache: the cache forgets it (`make_own`) before anybody opens it.
"""

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from datacache.cache.tier import Block, Lent, Taking, Tier
from datacache.errors import CacheError, Stopped
from datacache.model import Buffer, CacheKey, Entry, Kind, MiB
from datacache.writing.landing import Landing, Quiet, copy, write_all
from datacache.writing.steps import step

_log = logging.getLogger(__name__)

_PIECE = 8 * MiB
"""Bytes copied at once; Python holds one piece."""
WORTH_GIVING = 1 * MiB
"""Bytes from which a cached file is given away instead of copied: that waits for the disk once, which takes
about as long as to copy these."""


class OpenObject(Protocol):
    """One open object."""

    def read(self, offset: int, length: int) -> Buffer: ...
    def close(self) -> None: ...


class Reader(Protocol):
    """What is asked of the read path (`datacache.reading.reader.Reader`)."""

    def open(self, entry: Entry) -> OpenObject: ...
    def lend(self, entry: Entry) -> Lent | None: ...
    def cache_key(self, entry: Entry) -> CacheKey: ...


@dataclass(frozen=True)
class CopiesStats:
    """What came to the other side, since start."""

    kept_files: int = 0
    """Landing files that became cached files as they were."""
    landed_files: int = 0
    """Cached files that became landing files as they were."""
    copied_bytes: int = 0
    """Both ways, of all others."""


class Ready:
    """A landing file for which the cache has room, as it is."""

    def __init__(self, copies: "Copies", taking: Taking, content: Quiet, blocks: Sequence[Block]) -> None:
        self._copies, self._taking, self._content, self._blocks = copies, taking, content, blocks

    def __repr__(self) -> str:
        return f"<Ready {self._taking!r}>"

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The cache has the file from now on. The block makes it nobody's landing file; where that fails, the
        cache forgets it again."""
        step("takeover.before.take")
        taken = False
        with suppress(Stopped), self._content.held() as descriptor:
            taken = self._taking.take(descriptor, self._blocks)
        step("takeover.after.take")
        try:
            yield
        except Exception:
            if taken:
                self._taking.withdraw()
            raise
        if taken:
            self._copies.count(kept_files=1)

    def close(self) -> None:
        """Give the room back, where it was not used. Idempotent."""
        self._taking.close()


class Copies:
    """Thread-safe."""

    def __init__(self, reader: Reader, cache: Tier, *, worth_giving: int = WORTH_GIVING) -> None:
        """`worth_giving`: bytes of the smallest cached file that is not copied to be written."""
        self._reader, self._cache, self._worth_giving = reader, cache, worth_giving
        self._lock = threading.Lock()  # guards `_stats`
        self._stats = CopiesStats()

    def __repr__(self) -> str:
        return f"<Copies {self.stats()}>"

    def stats(self) -> CopiesStats:
        return self._stats

    def count(self, **more: int) -> None:
        """Add to the figures."""
        with self._lock:
            self._stats = replace(
                self._stats, **{name: getattr(self._stats, name) + value for name, value in more.items()}
            )

    def outdate(self, entry: Entry) -> None:
        """Nobody will open this version any more: its copy may leave the cache before all others."""
        if entry.kind is Kind.FILE:
            with suppress(CacheError):
                self._cache.supersede(self._reader.cache_key(entry))

    # ---- from the cache ----------------------------------------------------------------------------

    def worth_giving(self, entry: Entry) -> bool:
        """Whether a clean file is large enough for `give`."""
        return entry.size >= self._worth_giving

    def give(self, entry: Entry, landing: Landing) -> tuple[int, Sequence[Block]] | None:
        """Make the cached file of a clean file a landing file; its number, and what is in it. None: bring a
        copy. Should the process die now, the file is clean still, and has to be fetched again."""
        key = self._reader.cache_key(entry)
        given = landing.receive(lambda at, name: self._cache.surrender(key, at, name))
        if given is not None:
            self.count(landed_files=1)
        return given

    def bring(self, entry: Entry, descriptor: int) -> None:
        """Copy the bytes of a clean file, from the cache or the store, into an empty file. Where a tier has
        all of it the kernel copies, on some file systems by reference. Raises SourceError, OSError."""
        self.count(copied_bytes=entry.size)
        lent = self._reader.lend(entry)
        if lent is not None:
            try:
                copy(lent.descriptor, descriptor, entry.size)
            finally:
                lent.close()
            return
        opened = self._reader.open(entry)
        try:
            for at in range(0, entry.size, _PIECE):
                write_all(descriptor, memoryview(opened.read(at, min(_PIECE, entry.size - at))), at)
        finally:
            opened.close()

    # ---- to the cache ------------------------------------------------------------------------------

    def keep(self, entry: Entry, content: Quiet) -> Ready | None:
        """Have what the store has now, as `entry`, in the cache, as far as there is room: as it is, when it
        is taken, or (None) as a copy that was made. Raises LandingBroken, Stopped."""
        ready = self.offer(entry, content)
        if ready is None:
            self._copy(entry, content)
        return ready

    def offer(self, entry: Entry, content: Quiet, blocks: Sequence[Block] | None = None) -> Ready | None:
        """The same without a copy. `blocks`: what is in it, where that is known."""
        if not content.leased or content.size != entry.size:
            return None  # somebody may have it mapped, and write
        with content.held() as descriptor:
            taking = self._cache.admit(self._reader.cache_key(entry), descriptor)
        if taking is None:
            return None
        try:
            return Ready(self, taking, content, content.blocks() if blocks is None else blocks)
        except BaseException:
            taking.close()
            raise

    def _copy(self, entry: Entry, content: Quiet) -> None:
        file = self._cache.open(self._reader.cache_key(entry))
        try:
            for at in range(0, entry.size, _PIECE):
                data = content.read(at, min(_PIECE, entry.size - at))
                file.fill(at, data)
                self.count(copied_bytes=len(data))
        except CacheError as error:
            _log.debug("%s is not kept in the cache: %s", entry.key, error)
        finally:
            file.close()

    # ---- after a crash -----------------------------------------------------------------------------

    def make_own(self, landing: Landing, numbers: Collection[int]) -> None:
        """Of some landing files, which nobody has open, make those that are cached files, too, landing files
        only. Raises LandingFull, LandingBroken."""
        shared = landing.shared(numbers)
        if not shared:
            return
        with suppress(CacheError):
            self._cache.disown(shared.values())
        for number in landing.shared(shared):  # of a cache that is not ours, or is set aside
            landing.make_own(number)
