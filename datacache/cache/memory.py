"""
A tier in memory: the public fake, and the one that the contract suite measures others by.

Same promises as `directory`, minus surviving the process. `broken` and `spoil` let a test play a
failing medium.
"""

import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence

from datacache.cache.disk import Handle
from datacache.cache.tier import Block, CachedFile, EntryStats, Lent, Standing, Taking, TierStats
from datacache.errors import Damaged, TierBroken, TierFull
from datacache.model import Buffer, ByteRange, CacheKey, Coverage


class _Copy:
    """What is kept of one object. Guarded by the tier's lock."""

    def __init__(self, key: CacheKey) -> None:
        self.key = key
        self.covered = Coverage()
        self.starts: list[int] = []
        self.pieces: list[bytes] = []
        self.spoiled = Coverage()
        self.opens = 0
        self.last_open = 0.0
        self.pinned = False
        self.superseded = False
        self.gone = False
        self.loans = 0
        self.file: Handle | None = None  # the bytes as a file, while they are lent

    @property
    def length(self) -> int:
        return self.covered.length

    def add(self, start: int, data: bytes) -> None:
        at = bisect_left(self.starts, start)
        self.starts.insert(at, start)
        self.pieces.insert(at, data)
        self.covered.add(ByteRange(start, start + len(data)))

    def read(self, span: ByteRange) -> Buffer:
        found: list[Buffer] = []
        for i in range(max(0, bisect_right(self.starts, span.start) - 1), len(self.starts)):
            if self.starts[i] >= span.stop:
                break
            found.append(self.pieces[i][max(0, span.start - self.starts[i]) : span.stop - self.starts[i]])
        return found[0] if len(found) == 1 else b"".join(found)

    def lend(self) -> Handle:
        """The bytes, which are whole, as a file that is open for reading only."""
        if self.file is None:
            self.file = Handle(os.memfd_create("datacache-copy"))
            for start, data in zip(self.starts, self.pieces, strict=True):
                os.pwrite(self.file.fd, data, start)
        return Handle(os.open(f"/proc/self/fd/{self.file.fd}", os.O_RDONLY | os.O_CLOEXEC))

    def remove(self, span: ByteRange) -> None:
        self.file = None  # who has it keeps it as it was
        pieces = list(zip(self.starts, self.pieces, strict=True))
        self.starts, self.pieces = [], []
        self.covered = Coverage()
        for start, data in pieces:
            for kept in Coverage([span]).gaps(ByteRange(start, start + len(data))):
                self.add(kept.start, data[kept.start - start : kept.stop - start])
        self.spoiled.remove(span)


class MemoryTier:
    """Copies in a dict. Full, it evicts what is superseded and nothing else.

    While `broken` is a sentence, the medium fails with it: entries open empty and fills raise
    TierBroken; what was there is there again once it is empty.
    """

    def __init__(
        self, *, quota: int = 1 << 60, name: str = "memory", wall: Callable[[], float] = time.time
    ) -> None:
        self.name = name
        self.quota = quota
        self.broken = ""
        self._wall = wall
        # Guards all below. Invariant: `_used` is the sum of the lengths of all copies that are in
        # `_copies`, or gone but open; it never exceeds `quota` because of a fill.
        self._lock = threading.Lock()
        self._copies: dict[CacheKey, _Copy] = {}
        self._used = 0
        self._evicted = 0
        self._damaged = 0
        self._full = ""

    def __repr__(self) -> str:
        return f"<MemoryTier {self.name} {len(self._copies)} entries, {self._used} of {self.quota} bytes>"

    def open(self, key: CacheKey) -> CachedFile:
        with self._lock:
            copy = self._copies.setdefault(key, _Copy(key))
            copy.opens += 1
            copy.last_open = self._wall()
        return _MemoryFile(self, copy)

    def lend(self, key: CacheKey) -> Lent | None:
        with self._lock:
            copy = self._copies.get(key)
            if copy is None or self.broken or copy.spoiled.length or not 0 < key.size == copy.length:
                return None
            handle = copy.lend()
            copy.loans += 1
            copy.opens += 1
            copy.last_open = self._wall()
        return _MemoryLent(self, copy, handle)

    def read_whole(self, key: CacheKey) -> Buffer | None:
        with self._lock:
            copy = self._copies.get(key)
            if copy is None or self.broken or copy.spoiled.length or not 0 < key.size == copy.length:
                return None
            copy.last_open = self._wall()
            return copy.read(ByteRange(0, key.size))

    def admit(self, key: CacheKey, descriptor: int) -> Taking | None:
        return None  # no file lies here

    def surrender(self, key: CacheKey, at: int, name: str) -> Sequence[Block] | None:
        return None

    def disown(self, files: Collection[tuple[int, int]]) -> None: ...

    def present(self, key: CacheKey) -> int:
        return sum(span.length for span in self.ranges(key))

    def ranges(self, key: CacheKey) -> list[ByteRange]:
        """Which bytes of `key` are present, without opening it."""
        with self._lock:
            copy = self._copies.get(key)
            return copy.covered.ranges() if copy is not None and not self.broken else []

    def evict(self, key: CacheKey) -> int:
        with self._lock:
            copy = self._copies.get(key)
            return self._drop(copy) if copy is not None and copy.length else 0

    def _drop(self, copy: _Copy) -> int:
        del self._copies[copy.key]
        copy.gone = True
        self._evicted += 1
        if not copy.opens:
            self._used -= copy.length
        return copy.length

    def pin(self, key: CacheKey, pinned: bool) -> None:
        with self._lock:
            if key in self._copies:
                self._copies[key].pinned = pinned

    def supersede(self, key: CacheKey) -> None:
        with self._lock:
            if key in self._copies:
                self._copies[key].superseded = True

    def recheck(self, key: CacheKey) -> int:
        """Hold what is present of `key` against its checksums; how many pieces were bad and are dropped."""
        with self._lock:
            if self.broken:
                raise TierBroken(f"cache tier {self.name}: {self.broken}")
            copy = self._copies.get(key)
            bad = copy.spoiled.ranges() if copy is not None else []
            for span in bad:
                self._remove(copy, span)  # type: ignore[arg-type]
            return len(bad)

    def coldest(self, over_by: int) -> list[CacheKey]:
        """Entries, by last open, that free `over_by` bytes: unpinned, and not open now."""
        with self._lock:
            cold = [c for c in self._copies.values() if not (c.opens or c.pinned) and c.length]
            cold.sort(key=lambda c: c.last_open)
            found, freed = [], 0
            for copy in cold:
                if freed >= over_by:
                    break
                found.append(copy.key)
                freed += copy.length
            return found

    def retire(self, key: CacheKey) -> int:
        """Drop the entry unless it is open; the bytes that it held."""
        with self._lock:
            copy = self._copies.get(key)
            return self._drop(copy) if copy is not None and copy.length and not copy.opens else 0

    def make_room(self, device: int, over_by: int) -> int:
        """It lies on no file system."""
        return 0

    def standing(self, key: CacheKey) -> Standing | None:
        """What decides when the entry goes; None where there is none."""
        with self._lock:
            copy = self._copies.get(key)
            return Standing(copy.last_open, copy.pinned, copy.superseded) if copy is not None else None

    def adopt(self, key: CacheKey, standing: Standing) -> None:
        """Let the entry stand as it stood elsewhere."""
        with self._lock:
            copy = self._copies.get(key)
            if copy is not None:
                copy.last_open = standing.last_open
                copy.pinned |= standing.pinned
                copy.superseded |= standing.superseded

    def spoil(self, key: CacheKey, span: ByteRange) -> None:
        """Damage bytes, as a failing medium would: the next read of them raises Damaged."""
        with self._lock:
            self._copies[key].spoiled.add(span)

    def entries(self) -> Iterator[EntryStats]:
        with self._lock:
            found = [
                EntryStats(c.key, self.name, c.length, c.pinned, c.last_open)
                for c in self._copies.values()
                if c.length
            ]
        yield from found

    def stats(self) -> tuple[TierStats, ...]:
        with self._lock:
            state = "broken" if self.broken else "full" if self._full else "ok"
            count = sum(1 for c in self._copies.values() if c.length)
            reason = self.broken or self._full
            return (
                TierStats(
                    self.name, self.quota, self._used, count, state, reason, self._evicted, self._damaged
                ),
            )

    def close(self) -> None:
        """Nothing to let go of."""

    # ---- for _MemoryFile ------------------------------------------------------------------------

    def _gaps(self, copy: _Copy, span: ByteRange) -> list[ByteRange]:
        with self._lock:
            return [span] if self.broken and span.length > 0 else copy.covered.gaps(span)

    def _read(self, copy: _Copy, span: ByteRange) -> Buffer:
        with self._lock:
            if self.broken:
                raise TierBroken(f"cache tier {self.name}: {self.broken}")
            if copy.spoiled.gaps(span) != [span] and span.length:
                self._remove(copy, span)
                raise Damaged(f"cache tier {self.name}: bytes {span} of {copy.key.key!r} are damaged")
            if not copy.covered.covers(span):
                raise Damaged(f"cache tier {self.name}: bytes {span} of {copy.key.key!r} are not there")
            return copy.read(span)

    def _remove(self, copy: _Copy, span: ByteRange) -> None:
        before = copy.length
        copy.remove(span)
        self._used -= before - copy.length
        self._damaged += 1

    def _fill(self, copy: _Copy, start: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        span = ByteRange(start, start + len(view))
        if start < 0 or span.stop > copy.key.size:
            raise ValueError(f"bytes {span} do not lie within an object of {copy.key.size} bytes")
        with self._lock:
            if self.broken:
                raise TierBroken(f"cache tier {self.name}: {self.broken}")
            if copy.gone:
                raise TierFull(f"cache tier {self.name}: {copy.key.key!r} was evicted while it was open")
            for gap in copy.covered.gaps(span):
                room = self._room(gap.length)
                if room > 0:
                    kept = ByteRange(gap.start, gap.start + min(room, gap.length))
                    copy.add(kept.start, bytes(view[kept.start - start : kept.stop - start]))
                    self._used += kept.length
                if room < gap.length:
                    self._full = f"{self._used} of {self.quota} bytes are in use"
                    raise TierFull(f"cache tier {self.name} is full: {self._full}")
            self._full = ""

    def _room(self, wanted: int) -> int:
        for copy in list(self._copies.values()):
            if self.quota - self._used >= wanted:
                break
            if copy.superseded and not (copy.opens or copy.pinned):
                self._drop(copy)
        return self.quota - self._used

    def _release(self, copy: _Copy, *, loan: bool = False) -> None:
        with self._lock:
            copy.loans -= loan
            if not copy.loans:
                copy.file = None
            copy.opens -= 1
            if copy.opens:
                return
            if copy.gone:
                self._used -= copy.length
            elif not copy.length:
                del self._copies[copy.key]


class _MemoryFile:
    """One open of a copy."""

    def __init__(self, tier: MemoryTier, copy: _Copy) -> None:
        self._tier, self._copy, self._open = tier, copy, True

    def __repr__(self) -> str:
        return f"<_MemoryFile {self._copy.key.key!r} {self._copy.covered!r}>"

    @property
    def evicted(self) -> bool:
        return self._copy.gone

    def gaps(self, span: ByteRange) -> list[ByteRange]:
        return self._tier._gaps(self._copy, span)

    def read(self, span: ByteRange) -> Buffer:
        return self._tier._read(self._copy, span)

    def read_nowait(self, span: ByteRange) -> Buffer | None:
        try:
            return self._tier._read(self._copy, span)
        except (Damaged, TierBroken):
            return None

    def fill(self, start: int, data: Buffer) -> None:
        self._tier._fill(self._copy, start, data)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._tier._release(self._copy)


class _MemoryLent:
    """One loan of a copy."""

    def __init__(self, tier: MemoryTier, copy: _Copy, handle: Handle) -> None:
        self._tier, self._copy = tier, copy
        self._handle: Handle | None = handle
        self._lock = threading.Lock()  # guards _handle, which is None once this is closed
        self.descriptor = handle.fd
        found = os.fstat(handle.fd)
        self.identity = (found.st_dev, found.st_ino)

    def __repr__(self) -> str:
        return f"<_MemoryLent {self._copy.key.key!r} {self.descriptor}>"

    def close(self) -> None:
        with self._lock:
            if self._handle is None:
                return
            self._handle = None
        self._tier._release(self._copy, loan=True)
