"""
A cache made of tiers, fastest first; itself a tier.

An object may straddle tiers: what is present is what any of them has. New data goes to the first
tier that has room (`spill`); with `sink`, a full tier moves its coldest entries down first. A tier
that is full or broken is passed over; only when none took the data does a fill fail.

`open_cache` makes one from settings.
"""

import logging
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from datacache.cache import limits
from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.cache.policy import Limit, pages
from datacache.cache.tier import Block, CachedFile, EntryStats, Lent, Standing, Taking, Tier, TierStats
from datacache.cache.verify import Progress, VerifyReport, verify_tier
from datacache.clock import Clock
from datacache.config.settings import CacheSettings, Placement, Policy, TierSettings
from datacache.errors import CacheError, Damaged, SettingError, TierBroken, TierFull
from datacache.model import Buffer, ByteRange, CacheKey, Coverage, Medium, MiB, format_size

log = logging.getLogger(__name__)

_MOST_MOVED = 64 * MiB
"""Bytes moved down at most for one fill; beyond, the fill goes down itself."""
_OWN_RESERVE = 0.02
"""Fraction of a tmpfs of its own that a tier leaves free: there is nobody else to leave room for, but the
catalogue (200 bytes an entry, and its journal) lies there, too."""


class Leaf(Tier, Protocol):
    """A tier that can be part of a `TieredCache`."""

    @property
    def name(self) -> str:
        """`mem:/dev/shm/x`."""

    def ranges(self, key: CacheKey) -> list[ByteRange]:
        """Which bytes of `key` are present, without opening it."""

    def coldest(self, over_by: int) -> list[CacheKey]:
        """Entries, coldest first, that free `over_by` bytes when they go; none that is in use."""

    def retire(self, key: CacheKey) -> int:
        """Drop the entry unless it is in use; the bytes that it held."""

    def make_room(self, device: int, over_by: int) -> int:
        """Give up entries by policy where they lie on the file system `device`; the bytes that this freed."""

    def lease(self, room: int, entries: int, ttl: float) -> Limit:
        """Take that many bytes and entries (0: any number) at most, and never more than its quota, for `ttl`
        seconds; what holds now."""

    def standing(self, key: CacheKey) -> Standing | None:
        """What decides when the entry goes; None where there is none."""

    def adopt(self, key: CacheKey, standing: Standing) -> None:
        """Let the entry stand as it stood in another tier, whatever opens it took to bring it here."""


class TieredCache:
    """Tiers as one. Thread-safe."""

    def __init__(self, tiers: Sequence[Leaf], *, placement: Placement = Placement.SPILL) -> None:
        self.tiers = tuple(tiers)
        self._placement = placement
        # Guards `_moving`: keys that are on their way down, so that two fills never move the same.
        self._lock = threading.Lock()
        self._moving: set[CacheKey] = set()

    def __repr__(self) -> str:
        return f"<TieredCache {' '.join(tier.name for tier in self.tiers)}>"

    def tier(self, name: str) -> Leaf:
        """The one tier with this name ("mem:/dev/shm/x"), or the first of this medium ("mem")."""
        for tier in self.tiers:
            if name in (tier.name, tier.name.partition(":")[0]):
                return tier
        raise SettingError("--tier", name, "one of " + ", ".join(tier.name for tier in self.tiers))

    # ---- Tier -----------------------------------------------------------------------------------

    def open(self, key: CacheKey) -> CachedFile:
        return _TieredFile(self, key, [tier.open(key) for tier in self.tiers])

    def lend(self, key: CacheKey) -> Lent | None:
        for tier in self.tiers:
            lent = tier.lend(key)
            if lent is not None:
                return lent
        return None

    def read_whole(self, key: CacheKey) -> Buffer | None:
        for tier in self.tiers:
            data = tier.read_whole(key)
            if data is not None:
                return data
        return None

    def admit(self, key: CacheKey, descriptor: int) -> Taking | None:
        for tier in self.tiers:
            taking = tier.admit(key, descriptor)
            if taking is not None:
                return taking
        return None

    def surrender(self, key: CacheKey, at: int, name: str) -> Sequence[Block] | None:
        for tier in self.tiers:
            blocks = tier.surrender(key, at, name)
            if blocks is not None:
                return blocks
        return None

    def disown(self, files: Collection[tuple[int, int]]) -> None:
        failed: CacheError | None = None
        for tier in self.tiers:
            try:
                tier.disown(files)
            except CacheError as error:
                failed = error
        if failed is not None:
            raise failed

    def present(self, key: CacheKey) -> int:
        spans = [span for tier in self.tiers for span in tier.ranges(key)]
        return Coverage(spans).length if len(spans) > 1 else sum(span.length for span in spans)

    def evict(self, key: CacheKey) -> int:
        held = self.present(key)
        for tier in self.tiers:
            tier.evict(key)
        return held

    def pin(self, key: CacheKey, pinned: bool) -> None:
        for tier in self.tiers:
            tier.pin(key, pinned)

    def supersede(self, key: CacheKey) -> None:
        for tier in self.tiers:
            tier.supersede(key)

    def entries(self) -> Iterator[EntryStats]:
        """All entries of all tiers; an object that straddles two is there twice."""
        for tier in self.tiers:
            yield from tier.entries()

    def stats(self) -> tuple[TierStats, ...]:
        return tuple(stats for tier in self.tiers for stats in tier.stats())

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()

    # ---- more than a Tier must ------------------------------------------------------------------

    def make_room(self, device: int, over_by: int) -> int:
        """Give up entries by policy, lowest tier first, where they lie on the file system `device`; the bytes
        that this freed."""
        freed = 0
        for tier in reversed(self.tiers):
            if freed < over_by:
                freed += tier.make_room(device, over_by - freed)
        return freed

    def recheck(self, key: CacheKey) -> int:
        """Hold what is present of `key` against its checksums; how many blocks were bad and are dropped.
        A tier that is set aside is passed over: it serves nothing."""
        bad = 0
        for tier in self.tiers:
            with suppress(TierBroken):
                bad += tier.recheck(key)
        return bad

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Verify all tiers while they are in use, and drop what is bad. A tier that is set aside is a
        problem in the report."""
        report = VerifyReport()
        for tier in self.tiers:
            if isinstance(tier, DirectoryTier):
                try:
                    report += verify_tier(tier, repair=True, progress=progress)
                except CacheError as error:
                    report += VerifyReport(problems=(str(error),))
        return report

    def sink(self, upper: int, wanted: int) -> bool:
        """Move the coldest entries of tier `upper` down to make room for `wanted` bytes; whether
        any moved. No lock is held while bytes are copied."""
        if wanted > _MOST_MOVED:
            return False
        moved = 0
        for key in self.tiers[upper].coldest(wanted):
            with self._lock:
                if key in self._moving:
                    continue
                self._moving.add(key)
            try:
                moved += self._move(key, upper)
            finally:
                with self._lock:
                    self._moving.discard(key)
        return moved > 0

    def _move(self, key: CacheKey, upper: int) -> int:
        """Copy one entry to the tiers below `upper`, then drop it there; the bytes that moved. When
        the tiers below have no room it stays."""
        tier = self.tiers[upper]
        before = tier.standing(key)
        source, below = tier.open(key), self.open_below(key, upper + 1)
        try:
            tier.recheck(key)  # what is damaged must not be given a new checksum
            for span in tier.ranges(key):
                at = span.start
                while at < span.stop:
                    piece = ByteRange(at, min(at + 4 * MiB, span.stop))
                    below.fill(piece.start, source.read(piece))
                    at = piece.stop
        except CacheError as error:
            log.debug("%s stays in %s: %s", key.key, tier.name, error)
            return 0
        finally:
            source.close()
            below.close()
            self._settle(key, upper, before)
        return tier.retire(key)

    def _settle(self, key: CacheKey, upper: int, before: Standing | None) -> None:
        """To move an entry is not to open it. What was said of it meanwhile holds below, too."""
        now = self.tiers[upper].standing(key)
        if before is not None and now is not None:
            for tier in self.tiers[upper:]:
                tier.adopt(key, replace(now, last_open=before.last_open))

    def open_below(self, key: CacheKey, first: int) -> CachedFile:
        """The entry in the tiers from `first` down."""
        return _TieredFile(self, key, [tier.open(key) for tier in self.tiers[first:]], first)

    def fill(self, parts: Sequence[CachedFile], first: int, start: int, data: memoryview) -> None:
        """Put bytes that no tier has into the first of the tiers from `first` that takes them. Raises
        TierFull (what was kept is a part at the front) and TierBroken."""
        refused: CacheError | None = None
        for i, part in enumerate(parts, first):
            last = i == len(self.tiers) - 1
            span = ByteRange(start, start + len(data))
            try:
                part.fill(start, data)
                return
            except TierFull as error:
                refused = error
                if self._placement is Placement.SINK and not last:
                    wanted = sum(pages(*gap) for gap in part.gaps(span))
                    try:
                        if self.sink(i, wanted):
                            part.fill(start, data)
                            return
                    except CacheError as again:
                        refused = again
            except CacheError as error:
                refused = refused if isinstance(refused, TierFull) else error
            # What was kept is at the front: the next tier takes the rest.
            rest = part.gaps(span)
            if not rest:
                return
            data, start = data[rest[0].start - start :], rest[0].start
        if refused is not None:
            raise refused


class _TieredFile:
    """One open of an entry in all tiers (from `first` down). Thread-safe because its parts are."""

    __slots__ = ("_cache", "_first", "_key", "_parts")

    def __init__(
        self, cache: TieredCache, key: CacheKey, parts: Sequence[CachedFile], first: int = 0
    ) -> None:
        self._cache, self._key, self._parts, self._first = cache, key, parts, first

    def __repr__(self) -> str:
        return f"<_TieredFile {self._key.key!r} {list(self._parts)!r}>"

    @property
    def evicted(self) -> bool:
        return any(part.evicted for part in self._parts)

    def gaps(self, span: ByteRange) -> list[ByteRange]:
        gaps = [span] if span.start < span.stop else []
        for part in self._parts:
            if not gaps:
                break
            gaps = [left for gap in gaps for left in part.gaps(gap)]
        return gaps

    def read(self, span: ByteRange) -> Buffer:
        failed: CacheError | None = None
        for part in self._parts:
            if not part.gaps(span):
                try:
                    return part.read(span)
                except CacheError as error:  # another tier may have it too
                    failed = error
        if failed is not None:
            raise failed
        return self._stitch(span)

    def _stitch(self, span: ByteRange) -> Buffer:
        """Bytes that no tier has alone."""
        found = bytearray(span.length)
        left = [span]
        for part in self._parts:
            rest: list[ByteRange] = []
            for gap in left:
                missing = part.gaps(gap)
                rest += missing
                for piece in Coverage(missing).gaps(gap):
                    found[piece.start - span.start : piece.stop - span.start] = part.read(piece)
            left = rest
        if left:
            raise Damaged(f"bytes {left[0]} of {self._key.key!r} are not in the cache any more")
        return found

    def read_nowait(self, span: ByteRange) -> Buffer | None:
        for part in self._parts:
            data = part.read_nowait(span)
            if data is not None:
                return data
        return None

    def fill(self, start: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        span = ByteRange(start, start + len(view))
        if start < 0 or span.stop > self._key.size:
            raise ValueError(f"bytes {span} do not lie within an object of {self._key.size} bytes")
        for gap in self.gaps(span):
            piece = view[gap.start - start : gap.stop - start]
            self._cache.fill(self._parts, self._first, gap.start, piece)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def open_cache(
    settings: CacheSettings, *, dataset: str, block_size: int, owner: Owner, clock: Clock
) -> TieredCache:
    """Own and open the tiers of `settings`, of which there is at least one.

    Raises SettingError for what can never work, and Locked when another live process owns one.
    """
    paths = [os.path.realpath(tier.path) for tier in settings.tiers]
    tiers: list[DirectoryTier] = []
    try:
        for i, tier in enumerate(settings.tiers):
            if paths[i] in paths[:i]:
                raise _wrong(tier, "another directory for each tier")
            last = i == len(settings.tiers) - 1
            tiers.append(_open_tier(tier, settings, dataset, block_size, owner, clock, last=last))
    except BaseException:
        for opened in tiers:
            opened.close()
        raise
    return TieredCache(tiers, placement=settings.placement)


def _open_tier(
    tier: TierSettings,
    settings: CacheSettings,
    dataset: str,
    block_size: int,
    owner: Owner,
    clock: Clock,
    *,
    last: bool,
) -> DirectoryTier:
    _check(tier)
    own = os.path.dirname(tier.path) if tier.mounted else ""
    rules = Rules(
        name=f"{tier.medium}:{tier.path}",
        quota=tier.quota,
        block_size=block_size,
        high=tier.high,
        low=tier.low,
        reserve=min(settings.reserve, _OWN_RESERVE) if own else settings.reserve,
        # Above the last tier, full means that data goes down, not away.
        policy=settings.policy if last else Policy.KEEP,
        expire=settings.expire,
        dataset=dataset,
        priority=settings.priority,
        volatile=tier.medium is Medium.MEM,
    )
    try:
        return DirectoryTier(tier.path, rules, owner=owner, clock=clock, mount_point=own)
    except OSError as error:
        raise _wrong(tier, f"a directory that can be made and written ({error.strerror})") from error


def _check(tier: TierSettings) -> None:
    if not os.path.isabs(tier.path):
        raise _wrong(tier, "an absolute path")
    if tier.quota <= 0:
        raise _wrong(tier, "a quota above 0")
    if not 0 < tier.low <= tier.high <= 1:
        raise _wrong(tier, f"watermarks with 0 < low <= high <= 1 (low={tier.low}, high={tier.high})")
    if tier.medium is not Medium.MEM:
        return
    memory = limits.memory_limit()
    if not tier.mounted:  # else that is seen when it is
        where = limits.existing(tier.path)
        if not limits.is_tmpfs(tier.path):
            raise _wrong(tier, f"a path in a tmpfs, such as /dev/shm ({where} is none); or ssd: for a disk")
        size = limits.file_system_size(tier.path)
        if tier.quota > size:
            raise _wrong(tier, f"a quota of at most {format_size(size)}, the size of the tmpfs at {where}")
    if memory is not None and tier.quota > memory:
        raise _wrong(tier, f"a quota below {format_size(memory)}, the memory limit of this control group")


def _wrong(tier: TierSettings, expected: str) -> SettingError:
    return SettingError("cache", f"{tier.medium}:{tier.path}={format_size(tier.quota)}", expected)
