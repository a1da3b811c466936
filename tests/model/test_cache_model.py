"""
A tiered cache against a dict of bytes.

Random fills, reads, loans, mappings that outlive them, evictions, pins, quota changes, restarts, kills,
power cuts that leave zeros or nothing where data was not synced, bit rot, broken disks and deleted
directories. At no time is a wrong byte read or a quota exceeded; nothing changes under a mapping; a
mere kill loses nothing; and at the end `verify` finds a directory in which everything is as it should be.
"""

import logging
import mmap
import os
import shutil
import tempfile
from contextlib import suppress
from functools import lru_cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from datacache.cache.directory import MANAGED, DirectoryTier, Owner, Rules
from datacache.cache.tier import CachedFile, Lent
from datacache.cache.tiered import TieredCache
from datacache.cache.verify import verify
from datacache.clock import VirtualClock
from datacache.config.settings import Placement, Policy
from datacache.errors import CacheError
from datacache.model import ByteRange, CacheKey, KiB
from tests.contract.tier_suite import content, key
from tests.support.faulty_disk import FaultyDisk

BLOCK = 8 * KiB
KEYS = [key(f"k{i}", size) for i, size in enumerate((0, 1, 5000, BLOCK, 3 * BLOCK + 17, 10 * BLOCK))]
QUOTAS = [6 * BLOCK, 12 * BLOCK, 40 * BLOCK]
bytes_of = lru_cache(None)(content)

keys = st.sampled_from(KEYS)
which = st.integers(0, 1)
fractions = st.floats(0, 1)


class Mapped:
    """A mapping of a cached file, and the bytes that it must show."""

    def __init__(self, lent: Lent, expected: bytes) -> None:
        # mmap keeps a descriptor of its own: to the file, a mapping like that of another process.
        self.pages = mmap.mmap(lent.descriptor, len(expected), prot=mmap.PROT_READ)
        self.identity, self.expected = lent.identity, expected


class Cache(RuleBasedStateMachine):
    """Two directory tiers under one cache; a dict of bytes is what every read is held against."""

    @initialize(
        placement=st.sampled_from(Placement),
        policy=st.sampled_from(Policy),
        quotas=st.tuples(st.sampled_from(QUOTAS), st.sampled_from(QUOTAS)),
    )
    def begin(self, placement: Placement, policy: Policy, quotas: tuple[int, int]) -> None:
        self.log = logging.getLogger("datacache.cache")
        self.level = self.log.level
        self.log.setLevel(logging.CRITICAL)  # tiers are broken on purpose
        base = "/dev/shm" if os.path.ismount("/dev/shm") else None
        self.root = tempfile.mkdtemp(dir=base)
        self.clock = VirtualClock()
        self.placement, self.policy = placement, policy
        self.quotas = list(quotas)
        self.disks = [FaultyDisk(), FaultyDisk()]
        self.boot = 0
        self.files: list[CachedFile] = []
        self.loans: list[tuple[CacheKey, Lent]] = []
        self.mappings: list[Mapped] = []
        self.open_cache()

    def open_cache(self) -> None:
        self.tiers = [
            DirectoryTier(
                self.place(i),
                Rules(
                    f"{'mem' if i == 0 else 'ssd'}:{i}",
                    self.quotas[i],
                    BLOCK,
                    reserve=0.0,
                    policy=self.policy if i else Policy.KEEP,
                    expire=500.0,
                    dataset="mine",
                ),
                owner=Owner(os.getpid(), "", ""),
                clock=self.clock,
                disk=self.disks[i],
                boot=str(self.boot),
                keeper=False,
            )
            for i in range(2)
        ]
        self.cache = TieredCache(self.tiers, placement=self.placement)

    def place(self, i: int) -> str:
        return os.path.join(self.root, str(i))

    def let_go(self) -> None:
        """Processes that end close what they had open."""
        for file in self.files:
            file.close()
        for _, lent in self.loans:
            lent.close()
        self.files, self.loans = [], []

    def unmap_all(self) -> None:
        """The readers end, too."""
        for mapping in self.mappings:
            mapping.pages.close()
        self.mappings = []

    def heal(self) -> None:
        for disk in self.disks:
            disk.heal()

    def there(self) -> list[dict[CacheKey, list[ByteRange]]]:
        return [{k: tier.ranges(k) for k in KEYS} for tier in self.tiers]

    # ---- reading and filling --------------------------------------------------------------------

    @precondition(lambda self: len(self.files) < 6)
    @rule(k=keys)
    def open(self, k: CacheKey) -> None:
        self.files.append(self.cache.open(k))

    @precondition(lambda self: self.files)
    @rule(n=st.integers(0, 5))
    def close(self, n: int) -> None:
        self.files.pop(n % len(self.files)).close()

    @precondition(lambda self: self.files)
    @rule(n=st.integers(0, 5), start=fractions, length=fractions)
    def fill(self, n: int, start: float, length: float) -> None:
        file = self.files[n % len(self.files)]
        k: CacheKey = file._key  # type: ignore[attr-defined]
        at = int(start * k.size)
        stop = at + int(length * (k.size - at)) if length < 0.7 else k.size
        with suppress(CacheError):
            file.fill(at, bytes_of(k)[at:stop])
            # Unless it was told otherwise, the filler finds its bytes there.
            assert file.gaps(ByteRange(at, stop)) == []

    @precondition(lambda self: self.files)
    @rule(n=st.integers(0, 5), start=fractions, length=fractions)
    def read(self, n: int, start: float, length: float) -> None:
        file = self.files[n % len(self.files)]
        k: CacheKey = file._key  # type: ignore[attr-defined]
        at = int(start * k.size)
        span = ByteRange(at, at + int(length * (k.size - at)))
        expected = bytes_of(k)[span.start : span.stop]
        for left in file.gaps(span):
            span = ByteRange(span.start, min(span.stop, left.start))
        fast = file.read_nowait(span)
        assert fast is None or bytes(fast) == expected[: span.length]
        with suppress(CacheError):
            assert bytes(file.read(span)) == expected[: span.length]

    # ---- what the kernel reads by itself --------------------------------------------------------

    @precondition(lambda self: len(self.loans) < 4)
    @rule(k=keys)
    def lend(self, k: CacheKey) -> None:
        lent = self.cache.lend(k)
        if lent is not None:
            self.loans.append((k, lent))
            assert k.size and os.pread(lent.descriptor, k.size + 1, 0) == bytes_of(k)

    @precondition(lambda self: self.loans)
    @rule(n=st.integers(0, 3))
    def give_back(self, n: int) -> None:
        self.loans.pop(n % len(self.loans))[1].close()

    @precondition(lambda self: self.loans and len(self.mappings) < 4)
    @rule(n=st.integers(0, 3), close=st.booleans())
    def map(self, n: int, close: bool) -> None:
        k, lent = self.loans[n % len(self.loans)]
        # A loan that rot has reached since it was made is a file like any that rots.
        self.mappings.append(Mapped(lent, os.pread(lent.descriptor, k.size, 0)))
        if close:
            self.give_back(n)

    @precondition(lambda self: self.mappings)
    @rule(n=st.integers(0, 3))
    def unmap(self, n: int) -> None:
        self.mappings.pop(n % len(self.mappings)).pages.close()

    # ---- what users and time do -----------------------------------------------------------------

    @rule(k=keys)
    def evict(self, k: CacheKey) -> None:
        broken = any(s.state == "broken" for s in self.cache.stats())
        self.cache.evict(k)
        assert broken or self.cache.present(k) == 0

    @rule(k=keys, pinned=st.booleans())
    def pin(self, k: CacheKey, pinned: bool) -> None:
        self.cache.pin(k, pinned)

    @rule(k=keys)
    def supersede(self, k: CacheKey) -> None:
        self.cache.supersede(k)

    @rule(seconds=st.sampled_from([1.0, 11.0, 600.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for tier in self.tiers:
            tier.upkeep()

    # ---- what processes and machines do ---------------------------------------------------------

    @rule()
    def restart(self) -> None:
        self.let_go()
        self.heal()
        lost = any(s.state == "broken" for s in self.cache.stats())
        before = self.there()
        self.cache.close()
        self.open_cache()
        assert lost or self.there() == before

    @rule()
    def kill(self) -> None:
        """A mere kill loses nothing, and puts nothing in doubt that was not before."""
        self.let_go()
        self.heal()
        lost = any(s.state == "broken" for s in self.cache.stats())
        before = self.there()
        for tier in self.tiers:
            tier.abandon()
        self.open_cache()
        assert lost or self.there() == before

    @rule(i=which, zeros=st.booleans(), seed=st.integers(0, 2**16))
    def power_cut(self, i: int, zeros: bool, seed: int) -> None:
        """What was not synced may be gone: zeros in its place, or a shorter file, or no file."""
        self.let_go()
        self.unmap_all()
        self.heal()
        for j, tier in enumerate(self.tiers):
            if j == i and tier.store is not None:
                for row in list(tier.store.catalogue.rows()):
                    for block in tier.store.catalogue.blocks(row.id):
                        seed = (seed * 1103515245 + 12345) % 2**31
                        if block.epoch and seed % 3 == 0:
                            self.lose(os.path.join(self.place(i), MANAGED, row.name), block.span, zeros)
            tier.abandon()
        self.boot += 1
        self.open_cache()

    @staticmethod
    def lose(path: str, span: ByteRange, zeros: bool) -> None:
        with suppress(FileNotFoundError), open(path, "r+b") as file:
            if zeros:
                file.seek(span.start)
                file.write(bytes(span.length))
            else:
                # Only the end can be missing, or what lies behind would be lost though synced.
                end = os.fstat(file.fileno()).st_size
                if span.stop >= end:
                    file.truncate((span.start + min(span.stop, end)) // 2)

    @rule(i=which, quota=st.sampled_from(QUOTAS))
    def quota_changes(self, i: int, quota: int) -> None:
        self.let_go()
        self.unmap_all()
        self.heal()
        self.cache.close()
        self.quotas[i] = quota
        self.open_cache()
        for k in KEYS:
            self.cache.pin(k, False)
        self.cache.tiers[i].upkeep()  # type: ignore[attr-defined]

    @rule(
        i=which,
        calls=st.sets(st.sampled_from(["create", "open", "read", "write", "sync", "punch"]), min_size=1),
    )
    def disk_breaks(self, i: int, calls: set[str]) -> None:
        self.disks[i].break_down(frozenset(calls))

    @rule()
    def disks_heal(self) -> None:
        self.heal()
        for _ in range(2):
            self.clock.advance(10)
            for tier in self.tiers:
                tier.upkeep()
        assert all(s.state != "broken" for s in self.cache.stats())

    @rule(i=which)
    def directory_is_deleted(self, i: int) -> None:
        shutil.rmtree(self.place(i), ignore_errors=True)
        self.tiers[i].upkeep()

    @rule(i=which, at=fractions)
    def bits_rot(self, i: int, at: float) -> None:
        """Nobody promises to notice at once; `verify` does, and repairs."""
        self.heal()
        paths = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(os.path.join(self.place(i), MANAGED, "objects"))
            for name in names
        ]
        for path in sorted(paths)[:2]:
            with open(path, "r+b") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(int(at * size))
                byte = file.read(1)
                file.seek(int(at * size))
                file.write(bytes(b ^ 0xFF for b in byte))
                file.flush()
                found = os.fstat(file.fileno())
            for mapping in self.mappings:
                if mapping.identity == (found.st_dev, found.st_ino):
                    mapping.expected = mapping.pages[:]
        self.cache.verify()
        report = self.cache.verify()
        assert all("set aside" in problem for problem in report.problems), report.problems

    # ---- always ---------------------------------------------------------------------------------

    @invariant()
    def quotas_hold(self) -> None:
        for stats, quota in zip(self.cache.stats(), self.quotas, strict=True):
            assert stats.used <= quota or stats.state == "broken"

    @invariant()
    def nothing_changes_under_a_mapping(self) -> None:
        for mapping in self.mappings:
            assert mapping.pages[:] == mapping.expected

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        try:
            self.let_go()
            self.unmap_all()
            self.disks_heal()
            for tier in self.tiers:
                tier.upkeep()
                while tier.store is not None and not tier.store.surveyed:
                    tier.upkeep()
                self.space_is_counted(tier)
            self.cache.close()
            for i in range(2):
                # A power cut may have left damage that nobody has read yet: repaired once, all is well.
                verify(self.place(i), repair=True)
                assert verify(self.place(i), repair=False).problems == ()
        finally:
            for tier in self.tiers:
                tier.abandon()
            shutil.rmtree(self.root)
            self.log.setLevel(self.level)

    def space_is_counted(self, tier: DirectoryTier) -> None:
        """No file holds space that the quota does not see; what nobody reads any more is not kept."""
        gone = os.path.join(tier.path, MANAGED, "gone")
        assert not os.path.exists(gone) or os.listdir(gone) == []
        for folder, _, names in os.walk(os.path.join(tier.path, MANAGED, "objects")):
            for name in names:
                digest = bytes.fromhex(name.partition("-")[0])
                assert tier.store is not None
                row = tier.store.catalogue.find(digest)
                taken = os.stat(os.path.join(folder, name)).st_blocks * 512
                assert row is not None and taken <= row.used, (name, taken, row)


TestCache = Cache.TestCase
TestCache.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
