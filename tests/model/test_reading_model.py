"""
The reader against a dict of bytes.

Random reads through several opens, renewals and removals of objects in the bucket, faults of the
store, evictions, damage, tiers that are full, change their quota or break, loads, announced orders
and restarts that keep the cache. Every read returns the bytes of exactly the version that was
opened, or an error that has a cause; and at the end nothing is held and the cache is sound.
"""

import dataclasses
import itertools
import os
import random
import shutil
import tempfile
from contextlib import ExitStack

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.cache.memory import MemoryTier
from datacache.cache.tiered import TieredCache
from datacache.cache.verify import verify
from datacache.clock import VirtualClock
from datacache.config.settings import Fill, ReadingSettings
from datacache.errors import (
    CacheError,
    Denied,
    NotFound,
    SourceError,
    Unavailable,
    VersionChanged,
    WrongBytes,
)
from datacache.model import ByteRange, CacheKey, Entry, KiB
from datacache.reading.reader import OpenObject, Reader
from datacache.sources.faulty import Extend, Fail, Fault, FaultySource, Truncate
from datacache.sources.memory import MemorySource
from tests.support.reading import entry_of, until

BLOCK = 4 * KiB
SIZES = [0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 17, 40 * BLOCK]
NAMES = ["a", "b", "dir/c"]
QUOTAS = [0, 3 * BLOCK, 30 * BLOCK, 1 << 30]
FAULTS: list[Fault] = [
    Fail(Unavailable("the store is away")),
    Fail(Denied("the store refuses")),
    Truncate(1),
    Extend(1),
]
READING = ReadingSettings(
    block_size=BLOCK, concurrency=3, readahead=8 * BLOCK, memory=16 * BLOCK, order_ahead=2
)

fractions = st.floats(0, 1)
which = st.integers(0, 7)


class Reading(RuleBasedStateMachine):
    """One store, one cache, one reader at a time; `versions` is what the bytes should be."""

    @initialize(
        kind=st.sampled_from(["memory", "directory"]),
        fill=st.sampled_from(Fill),
        quota=st.sampled_from(QUOTAS),
        seed=st.integers(0, 2**32),
    )
    def begin(self, kind: str, fill: Fill, quota: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = VirtualClock()
        self.settings = dataclasses.replace(READING, fill=fill)
        self.store = MemorySource()
        self.source = FaultySource(self.store)
        self.versions: dict[tuple[str, str], bytes] = {}
        self.current: dict[str, Entry] = {}
        self.inos = itertools.count(2)
        self.ino_of = {name: next(self.inos) for name in NAMES}
        self.opens: list[OpenObject] = []
        self.spoiled = False
        self.root = ""
        self.memory: MemoryTier | None = None
        if kind == "memory":
            self.memory = MemoryTier(quota=quota)
        else:
            self.root = tempfile.mkdtemp(dir="/dev/shm" if os.path.ismount("/dev/shm") else None)
        self.quota = quota
        for name in NAMES:
            self.put(name, SIZES[-1])
        self.start()

    def start(self) -> None:
        if self.memory is not None:
            self.cache: MemoryTier | TieredCache = self.memory
        else:
            rules = Rules("ssd:0", self.quota, BLOCK, reserve=0.0, dataset="mine")
            owner = Owner(os.getpid(), "", "")
            tier = DirectoryTier(self.root, rules, owner=owner, clock=self.clock, keeper=False)
            self.cache = TieredCache([tier])
        self.reader = Reader([self.source], self.cache, self.settings, clock=self.clock)

    def stop(self) -> None:
        for it in self.opens:
            it.close()
        self.opens = []
        self.reader.close()
        stats = self.reader.stats()
        assert (stats.memory_used, stats.open_objects, stats.bytes_uncached) == (0, 0, 0)
        self.cache.close()

    def idle(self) -> None:
        """Nothing is under way: what is fetched ahead has taken the faults that it met."""
        until(
            lambda: (
                self.reader.stats().in_flight == 0
                and all(f.kept for o in list(self.reader._objects.values()) for f in list(o.flights))
            )
        )

    def faults_left(self) -> bool:
        return bool(self.source._added["read"])

    def bytes_of(self, entry: Entry) -> bytes:
        return self.versions[entry.key, entry.version.token]

    def why(self, entry: Entry, error: SourceError, *, faulty: bool) -> None:
        """Hold an error against what may have caused it."""
        current = self.current.get(entry.key)
        if isinstance(error, VersionChanged):
            assert current is not None
            assert current.version != entry.version
        elif isinstance(error, NotFound):
            assert current is None
        else:
            assert isinstance(error, Unavailable | Denied | WrongBytes)
            assert faulty, "an error needs a cause"

    # ---- the bucket ------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), size=st.sampled_from(SIZES))
    def put(self, name: str, size: int) -> None:
        data = self.random.randbytes(size)
        entry = entry_of(self.store.put(name, data), ino=self.ino_of[name])
        self.versions[entry.key, entry.version.token] = data
        self.current[name] = entry

    @precondition(lambda self: len(self.current) > 1)
    @rule(n=which)
    def delete(self, n: int) -> None:
        name = sorted(self.current)[n % len(self.current)]
        self.store.delete(name)
        del self.current[name]

    @rule(faults=st.lists(st.sampled_from([*FAULTS, None]), min_size=1, max_size=4))
    def go_wrong(self, faults: list[Fault | None]) -> None:
        self.source.add("read", *faults)

    # ---- reading ---------------------------------------------------------------------------------

    @precondition(lambda self: len(self.opens) < 6)
    @rule(n=which)
    def open(self, n: int) -> None:
        name = sorted(self.current)[n % len(self.current)]
        self.opens.append(self.reader.open(self.current[name]))

    @precondition(lambda self: self.opens)
    @rule(n=which)
    def close(self, n: int) -> None:
        self.opens.pop(n % len(self.opens)).close()

    @precondition(lambda self: self.opens)
    @rule(n=which, start=fractions, length=fractions)
    def read(self, n: int, start: float, length: float) -> None:
        it = self.opens[n % len(self.opens)]
        at = int(start * it.entry.size)
        self._read(it, at, int(length * length * (it.entry.size - at)) + 1)

    @precondition(lambda self: self.opens)
    @rule(n=which, start=fractions, step=st.sampled_from([700, BLOCK, 3 * BLOCK]), count=st.integers(2, 20))
    def stream(self, n: int, start: float, step: int, count: int) -> None:
        it = self.opens[n % len(self.opens)]
        at = int(start * it.entry.size)
        for i in range(count):
            self._read(it, at + i * step, step, settle=False)

    def _read(self, it: OpenObject, at: int, length: int, *, settle: bool = True) -> None:
        if settle:
            self.idle()
        faulty = not settle or self.faults_left()
        expected = self.bytes_of(it.entry)[at : at + length]
        fast = it.read_nowait(at, length)
        assert fast is None or bytes(fast) == expected
        try:
            assert bytes(it.read(at, length)) == expected
        except SourceError as error:
            self.why(it.entry, error, faulty=faulty)

    @rule(n=which)
    def load(self, n: int) -> None:
        entry = self.current[sorted(self.current)[n % len(self.current)]]
        self.idle()
        faulty = self.faults_left()
        try:
            self.reader.fetch(entry)
        except SourceError as error:
            self.why(entry, error, faulty=faulty)
        except CacheError:
            assert self.quota < 1 << 30 or (self.memory is not None and self.memory.broken)
        else:
            assert self.cache.present(self.reader.cache_key(entry)) == entry.size

    @rule(order=st.permutations(NAMES))
    def announce(self, order: list[str]) -> None:
        self.reader.announce([self.current[name] for name in order if name in self.current])

    # ---- the cache -------------------------------------------------------------------------------

    @precondition(lambda self: self.versions)
    @rule(n=st.integers(0, 50))
    def evict(self, n: int) -> None:
        name, token = sorted(self.versions)[n % len(self.versions)]
        self.cache.evict(CacheKey(self.source.uri, name, token, len(self.versions[name, token])))

    @precondition(lambda self: self.memory is not None)
    @rule(quota=st.sampled_from(QUOTAS))
    def resize(self, quota: int) -> None:
        assert self.memory is not None
        self.memory.quota = self.quota = quota

    @precondition(lambda self: self.memory is not None)
    @rule(broken=st.booleans())
    def break_or_mend(self, broken: bool) -> None:
        assert self.memory is not None
        self.idle()
        self.memory.broken = "on purpose" if broken else ""

    @precondition(lambda self: self.memory is not None)
    @rule(n=which, start=fractions)
    def damage(self, n: int, start: float) -> None:
        assert self.memory is not None
        entry = self.current[sorted(self.current)[n % len(self.current)]]
        key, at = self.reader.cache_key(entry), int(start * entry.size)
        if self.memory.present(key):
            self.memory.spoil(key, ByteRange(at, min(entry.size, at + 10)))

    @rule()
    def restart(self) -> None:
        self.stop()
        self.start()

    # ---- always ----------------------------------------------------------------------------------

    @invariant()
    def memory_is_bounded(self) -> None:
        if hasattr(self, "reader"):
            stats = self.reader.stats()
            assert stats.memory_used <= READING.memory
            assert stats.in_flight <= READING.concurrency

    def teardown(self) -> None:
        with ExitStack() as stack:
            if self.root:
                stack.callback(shutil.rmtree, self.root)
            if not hasattr(self, "reader"):
                return
            self.source._added["read"].clear()
            if self.memory is not None:
                self.memory.broken = ""
            # With a store that works again every current object is read whole, by a new open.
            for entry in self.current.values():
                it = self.reader.open(entry)
                self._read(it, 0, entry.size + 1)
                it.close()
            self.stop()
            if self.root:
                assert verify(self.root, repair=False).problems == ()


Reading.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestReading = Reading.TestCase
