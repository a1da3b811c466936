"""The reader: one fetch for any number of readers, and what happens when something fails."""

import dataclasses
import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from datacache.cache.memory import MemoryTier
from datacache.cache.tier import Tier
from datacache.clock import VirtualClock
from datacache.config.settings import Fill, ReadingSettings
from datacache.errors import (
    Archived,
    Damaged,
    Denied,
    NoSuchPath,
    TierBroken,
    TierFull,
    Unavailable,
    VersionChanged,
    WrongBytes,
)
from datacache.model import Buffer, ByteRange, CacheKey, Entry, KiB, MiB, ObjectInfo
from datacache.reading.reader import OpenObject, Reader
from datacache.sources.faulty import Fail, FaultySource, Truncate
from datacache.sources.memory import MemorySource
from datacache.sources.source import Source
from tests.support.reading import ListedIndex, entry_of, until

BLOCK = 64 * KiB
SETTINGS = ReadingSettings(
    block_size=BLOCK, concurrency=8, readahead=8 * BLOCK, memory=64 * MiB, order_ahead=8
)
NO_READAHEAD = dataclasses.replace(SETTINGS, readahead=0)
DATA = random.Random(1).randbytes(10 * BLOCK + 1234)


@contextmanager
def reader(
    source: Source, tier: Tier | None = None, settings: ReadingSettings = SETTINGS, **more: object
) -> Iterator[Reader]:
    made = Reader([source], tier or MemoryTier(), settings, clock=VirtualClock(), **more)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()
        assert made.stats().memory_used == 0, "all memory is given back"
        assert made.stats().open_objects == 0, "nothing is left open"


@contextmanager
def opened(made: Reader, entry: Entry) -> Iterator[OpenObject]:
    it = made.open(entry)
    try:
        yield it
    finally:
        it.close()


def source_of(data: bytes = DATA, key: str = "a", **more: bool) -> tuple[MemorySource, Entry]:
    source = MemorySource(objects={key: data}, **more)  # type: ignore[arg-type]
    return source, entry_of(source.stat(key))


def spans(source: MemorySource) -> list[ByteRange]:
    return [span for _, span in source.reads]


def together(count: int, call: Callable[[int], object]) -> list[object]:
    """What `count` threads got; exceptions as values."""

    def one(number: int) -> object:
        try:
            return call(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


# Bytes.


@pytest.mark.parametrize("fill", list(Fill))
@pytest.mark.parametrize("quota", [1 << 40, 3 * BLOCK, 0])
def test_reads_return_the_objects_bytes(fill: Fill, quota: int) -> None:
    """Random reads return the bytes that are there, however little the cache has room for."""
    source, entry = source_of()
    order = random.Random(2)
    settings = dataclasses.replace(SETTINGS, fill=fill)
    with reader(source, MemoryTier(quota=quota), settings) as made, opened(made, entry) as it:
        for _ in range(200):
            offset, length = order.randrange(len(DATA) + 10), order.randrange(3 * BLOCK)
            expected = DATA[offset : offset + length]
            got = it.read_nowait(offset, length) if order.random() < 0.5 else None
            assert bytes(it.read(offset, length) if got is None else got) == expected


def test_a_read_is_short_only_at_the_end() -> None:
    """Past the end there is nothing, across it what is left, and a wrong range is the caller's error."""
    source, entry = source_of(b"0123456789")
    with reader(source) as made, opened(made, entry) as it:
        assert it.read(8, 100) == b"89"
        assert it.read(10, 1) == it.read(99, 1) == it.read(3, 0) == b""
        assert it.read_nowait(50, 1) == b""
        for offset, length in ((-1, 2), (0, -1)):
            with pytest.raises(ValueError, match="no such range"):
                it.read(offset, length)


def test_an_empty_object_costs_no_request() -> None:
    """An object of no bytes is known to be empty: nobody is asked."""
    source, entry = source_of(b"")
    with reader(source) as made, opened(made, entry) as it:
        assert it.read(0, 10) == it.read_nowait(0, 10) == b""
        assert made.fetch(entry) == 0
        assert made.stats().opens_whole == 1
    assert source.requests["read"] == 0


def test_what_is_whole_is_lent_and_counts_as_an_open() -> None:
    """The cached file goes to the kernel without a request, as an open that was whole; what is not whole
    is not lent, and not counted."""
    source, entry = source_of()
    with reader(source) as made:
        assert made.lend(entry) is None
        made.fetch(entry)
        asked = source.requests["read"]
        lent = made.lend(entry)
        assert lent is not None
        assert os.pread(lent.descriptor, len(DATA), 0) == DATA
        lent.close()
        assert source.requests["read"] == asked
        assert (made.stats().opens, made.stats().opens_whole) == (1, 1)


def test_what_is_whole_is_read_in_one_go_and_counts_as_an_open() -> None:
    """All of it, or nothing: what is not whole, or is open, is for `open`."""
    source, entry = source_of()
    with reader(source) as made:
        assert made.read_whole(entry) is None
        made.fetch(entry)
        before = made.stats()
        assert bytes(made.read_whole(entry) or b"") == DATA
        stats = made.stats()
        assert (stats.opens, stats.opens_whole) == (before.opens + 1, before.opens_whole + 1)
        assert stats.bytes_from_cache == before.bytes_from_cache + len(DATA)
        with opened(made, entry):
            assert made.read_whole(entry) is None


def test_a_loan_moves_an_announced_order_on() -> None:
    """Files that the kernel reads by itself are part of the order as others are."""
    source, index, _ = small_files(30)
    entries = [entry for _, entry in index.walk()]
    with reader(source) as made:
        made.announce(entries)
        until(lambda: {key for key, _ in source.reads} == {entry.key for entry in entries[:8]})
        for entry in entries[:5]:
            made.fetch(entry)
            lent = made.lend(entry)
            assert lent is not None
            lent.close()
        until(lambda: {entry.key for entry in entries[:12]} <= {key for key, _ in source.reads})


def test_a_long_read_is_done_in_stretches() -> None:
    """A read of many megabytes is whole, in requests of bounded size."""
    data = random.Random(3).randbytes(40 * MiB + 5)
    source, entry = source_of(data)
    with reader(source, settings=ReadingSettings(memory=128 * MiB)) as made, opened(made, entry) as it:
        assert it.read(0, len(data)) == data
    assert max(span.length for span in spans(source)) == 8 * MiB


def test_a_closed_object_is_not_read() -> None:
    """Reading after close is the caller's error; closing twice is none."""
    source, entry = source_of()
    with reader(source) as made:
        it = made.open(entry)
        it.close()
        it.close()
        with pytest.raises(ValueError, match="closed"):
            it.read(0, 1)
        assert "closed" in repr(it)


# One fetch.


def test_concurrent_readers_of_one_block_cause_one_fetch() -> None:
    """Sixteen readers of one block, through opens of their own, cause one request."""
    source, entry = source_of()
    with reader(source) as made, source.hold() as held:
        opens = [made.open(entry) for _ in range(16)]
        with ThreadPoolExecutor(16) as threads:
            reads = [threads.submit(it.read, 100, 50) for it in opens]
            assert held.wait_for(1)
            until(lambda: sum(f.waiters for o in made._objects.values() for f in o.flights) == 16)
            held.release()
            assert {bytes(read.result()) for read in reads} == {DATA[100:150]}
        for it in opens:
            it.close()
    assert spans(source) == [ByteRange(0, BLOCK)]


def test_a_block_is_fetched_once_and_then_served_from_the_cache() -> None:
    """The second read of a block makes no request, and needs no waiting."""
    source, entry = source_of()
    with reader(source, settings=NO_READAHEAD) as made, opened(made, entry) as it:
        assert it.read_nowait(0, 10) is None
        it.read(0, 10)
        assert it.read_nowait(BLOCK - 10, 10) == DATA[BLOCK - 10 : BLOCK]
        stats = made.stats()
    assert spans(source) == [ByteRange(0, BLOCK)]
    assert (stats.bytes_served, stats.bytes_from_cache) == (20, 10)
    assert (stats.fetches, stats.bytes_fetched, stats.bytes_prefetched) == (1, BLOCK, 0)


def test_a_read_fetches_only_what_is_missing() -> None:
    """Of a long read, blocks that are present are not asked for again, neighbours become one request."""
    source, entry = source_of()
    with reader(source, settings=NO_READAHEAD) as made, opened(made, entry) as it:
        it.read(2 * BLOCK, 1)
        it.read(5 * BLOCK, 1)
        source.reads.clear()
        assert it.read(0, len(DATA)) == DATA
    assert sorted(spans(source)) == [
        ByteRange(0, 2 * BLOCK),
        ByteRange(3 * BLOCK, 5 * BLOCK),
        ByteRange(6 * BLOCK, len(DATA)),
    ]


def test_range_fill_fetches_pages() -> None:
    """With range fill a read of a large object fetches the pages that it touches."""
    source, entry = source_of(bytes(4 * MiB))
    settings = dataclasses.replace(SETTINGS, fill=Fill.RANGE)
    with reader(source, settings=settings) as made, opened(made, entry) as it:
        it.read(MiB + 100, 64 * KiB)
    assert spans(source) == [ByteRange(MiB, MiB + 68 * KiB)]


class Endless(MemorySource):
    """One object of a size that nobody would keep in memory: zeros, made as they are asked for."""

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        self.reads.append((info.key, span))
        return bytes(span.length)


@pytest.mark.parametrize(("fill", "most"), [(Fill.RANGE, 1.2), (Fill.BLOCK, 65.0)], ids=["range", "block"])
@pytest.mark.parametrize("readahead", [0, 64 * MiB], ids=["none", "default"])
def test_random_reads_of_a_large_object_do_not_over_read(fill: Fill, most: float, readahead: int) -> None:
    """64 KiB at random places of 1 GiB: with range fill the store sends at most 1.2 times what was read,
    with block fill a block a read, as documented; readahead adds nothing to either."""
    source = Endless()
    entry = source_of(b"", "large")[1]._replace(size=1 << 30)
    settings = dataclasses.replace(SETTINGS, fill=fill, block_size=4 * MiB, readahead=readahead)
    order, count = random.Random(3), 20 if fill is Fill.BLOCK else 400
    with reader(source, MemoryTier(), settings) as made, opened(made, entry) as it:
        for _ in range(count):
            it.read(order.randrange((1 << 30) - 64 * KiB), 64 * KiB)
        until(lambda: made.stats().in_flight == 0)
        stats = made.stats()
    assert stats.bytes_served == count * 64 * KiB
    assert stats.bytes_fetched <= most * stats.bytes_served


def test_bytes_are_served_before_they_are_in_the_cache() -> None:
    """Who waits for a block is served when it arrives, not when the cache has taken it."""
    source, entry = source_of()
    tier = SlowTier()
    with (
        reader(source, tier, NO_READAHEAD) as made,
        opened(made, entry) as it,
        ThreadPoolExecutor(1) as other,
    ):
        first = other.submit(it.read, 0, 10)
        assert tier.filling.wait(10)
        assert it.read(5, 10) == DATA[5:15]
        assert it.read_nowait(20, 10) == DATA[20:30]
        assert it.read_nowait(2 * BLOCK, 10) is None
        assert not first.done()
        tier.go_on.set()
        assert first.result(10) == DATA[:10]
    assert spans(source) == [ByteRange(0, BLOCK)]


class SlowTier(MemoryTier):
    """Fills wait for `go_on`."""

    def __init__(self) -> None:
        super().__init__()
        self.filling, self.go_on = threading.Event(), threading.Event()

    def _fill(self, copy: object, start: int, data: Buffer) -> None:
        self.filling.set()
        assert self.go_on.wait(10)
        super()._fill(copy, start, data)  # type: ignore[arg-type]


# Ahead of readers.


def test_a_sequential_reader_finds_the_next_blocks_already_there() -> None:
    """Readahead fetches what comes next, and each byte once."""
    source, entry = source_of()
    with reader(source) as made, opened(made, entry) as it:
        it.read(0, 1000)
        it.read(1000, 1000)
        until(lambda: len(source.reads) > 1 and made.stats().in_flight == 0)
        until(lambda: it.read_nowait(BLOCK, 1000) is not None)
        at = 2000
        while at < len(DATA):
            at += len(it.read(at, 4096))
        until(lambda: sum(span.length for span in spans(source)) == len(DATA))
        assert made.stats().bytes_prefetched > 0
    assert len(set(spans(source))) == len(spans(source))


def test_readers_that_never_wait_keep_the_readahead_moving() -> None:
    """Reads that are answered at once still say where the reader is."""
    source, entry = source_of()
    tier = MemoryTier()
    with reader(source, tier) as made:
        warm = tier.open(made.cache_key(entry))
        warm.fill(0, DATA[: 4 * BLOCK])
        with opened(made, entry) as it:
            for at in range(0, 3 * BLOCK, 4096):
                assert it.read_nowait(at, 4096) is not None
            until(lambda: any(span.start == 4 * BLOCK for span in spans(source)))
        warm.close()


def test_readahead_does_not_delay_a_reader() -> None:
    """While everything that is fetched ahead hangs, a reader of other bytes is served."""
    source, entry = source_of(bytes(64 * BLOCK))
    other = entry_of(source.put("b", b"urgent"), ino=3)
    stuck, go_on = threading.Semaphore(0), threading.Event()

    def hang(key: str, span: ByteRange) -> None:
        if key == "a" and span.start > 0:
            stuck.release()
            assert go_on.wait(10)

    source.on_read = hang
    settings = dataclasses.replace(SETTINGS, concurrency=4, readahead=32 * BLOCK, memory=64 * BLOCK)
    with reader(source, settings=settings) as made, opened(made, entry) as it:
        for at in range(0, BLOCK, 1024):
            it.read(at, 1024)
        assert stuck.acquire(timeout=10)
        with opened(made, other) as it2:
            assert it2.read(0, 100) == b"urgent"
        go_on.set()


def test_a_reader_takes_over_what_was_only_queued() -> None:
    """A fetch that is queued ahead and has not begun is run by the reader who needs it now."""
    source, entry = source_of(DATA)
    settings = dataclasses.replace(SETTINGS, concurrency=2, readahead=8 * BLOCK)
    with reader(source, settings=settings) as made, opened(made, entry) as it:
        it.read(0, 100)
        with source.hold() as held:
            it.read(100, 100)  # starts the window; with 2 requests at most, one is for readahead
            assert held.wait_for(1)
            queued = made._objects[made.cache_key(entry)]
            made._fetch_ahead(queued, ByteRange(8 * BLOCK, 9 * BLOCK))
            with ThreadPoolExecutor(1) as threads:
                read = threads.submit(it.read, 8 * BLOCK, 100)
                assert held.wait_for(2), "the reader's own request is under way beside the stuck one"
                held.release()
                assert read.result(10) == DATA[8 * BLOCK : 8 * BLOCK + 100]
        until(lambda: made.stats().in_flight == 0)
    assert spans(source).count(ByteRange(8 * BLOCK, 9 * BLOCK)) == 1


def test_what_is_queued_ahead_is_dropped_at_close() -> None:
    """Closing the last open drops what was to be fetched ahead and has not begun."""
    source, entry = source_of(bytes(400 * BLOCK))
    settings = dataclasses.replace(SETTINGS, concurrency=2, readahead=256 * BLOCK)
    with reader(source, settings=settings) as made:
        it = made.open(entry)
        it.read(0, 100)
        with source.hold() as held:
            made._fetch_ahead(made._objects[made.cache_key(entry)], ByteRange(BLOCK, 400 * BLOCK))
            assert held.wait_for(1)
            it.close()
        until(lambda: made.stats().open_objects == 0)
    assert len(source.reads) == 2, "the first block, and what had begun"


def test_a_failure_ahead_is_nobodys_error() -> None:
    """What fails ahead of the reader is counted; the reader who gets there tries for itself."""
    inner, entry = source_of()
    source = FaultySource(inner, {"read": [None, Fail(Unavailable("a hiccup"))]})
    with (
        reader(source, settings=dataclasses.replace(SETTINGS, readahead=BLOCK)) as made,
        opened(made, entry) as it,
    ):
        it.read(0, 100)
        it.read(100, 100)
        until(lambda: made.stats().errors == {"Unavailable": 1})
        until(lambda: made.stats().in_flight == 0)
        assert it.read(0, len(DATA)) == DATA


def small_files(count: int) -> tuple[MemorySource, ListedIndex, dict[str, bytes]]:
    data = {f"d/{n:04}": random.Random(n).randbytes(500 + n) for n in range(count)}
    source = MemorySource(objects=data)
    return source, ListedIndex(source), data


def test_listing_order_is_run_ahead_of() -> None:
    """Who opens files in the order of the listing finds the next ones fetched."""
    source, index, data = small_files(40)
    with reader(source, siblings=index.children) as made:
        for n, (path, entry) in enumerate(index.walk("d")):
            with opened(made, entry) as it:
                assert it.read(0, 10_000) == data[path[1:]]
            if n == 10:  # on a busy machine the reader is ahead of those who fetch ahead of it
                until(lambda: made.stats().bytes_prefetched > 0 and made.stats().in_flight == 0)
        until(lambda: made.stats().in_flight == 0)
        assert made.stats().opens_whole > 0
    assert len(source.reads) == 40, "one request for each file"


def test_a_shuffled_order_fetches_nothing_ahead() -> None:
    """In a shuffled epoch only what is opened is fetched."""
    source, index, _ = small_files(300)
    entries = [entry for _, entry in index.walk()]
    random.Random(4).shuffle(entries)
    with reader(source, siblings=index.children) as made:
        for entry in entries[:30]:
            with opened(made, entry) as it:
                it.read(0, 10)
        until(lambda: made.stats().in_flight == 0)
    assert len(source.reads) == 30


@pytest.mark.parametrize("with_lookup", [True, False])
def test_an_announced_order_is_run_ahead_of(with_lookup: bool) -> None:
    """After an announcement the first files are fetched, and later ones as the reader proceeds."""
    source, index, _ = small_files(60)
    entries = [entry for _, entry in index.walk()]
    random.Random(5).shuffle(entries)
    with reader(source) as made:
        made.announce(iter(entries), lookup=index.entry if with_lookup else None)
        until(lambda: {key for key, _ in source.reads} == {entry.key for entry in entries[:8]})
        for entry in entries[:5]:
            with opened(made, entry) as it:
                it.read(0, 10)
        until(lambda: {entry.key for entry in entries[:12]} <= {key for key, _ in source.reads})
    assert len(source.reads) == len({key for key, _ in source.reads}) <= 5 + 8


def test_files_ahead_that_are_gone_archived_or_cached_are_passed_over() -> None:
    """What cannot or need not be fetched ahead does not stop what comes after it."""
    source, index, data = small_files(6)
    source.put("d/0002", b"x", archived=True)
    index2 = ListedIndex(source)
    entries = [entry for _, entry in index2.walk()]
    index2.forget("d/0001")
    with reader(source, settings=dataclasses.replace(SETTINGS, order_ahead=64)) as made:
        made.fetch(entries[3])
        source.reads.clear()
        made.announce(entries, lookup=index2.entry)
        until(lambda: {key for key, _ in source.reads} == {"d/0000", "d/0004", "d/0005"})
    assert data
    assert index


def test_an_index_that_fails_stops_only_the_prefetch() -> None:
    """When the names cannot be looked up, opens and reads go on."""
    source, index, data = small_files(20)

    def broken(parent: int, *, after: int, limit: int) -> list[Entry]:
        raise NoSuchPath("the directory is gone")

    with reader(source, siblings=broken) as made:
        for path, entry in index.walk():
            with opened(made, entry) as it:
                assert it.read(0, 10_000) == data[path[1:]]
        until(lambda: made.stats().errors.get("NoSuchPath", 0) > 0)


def test_files_fetched_ahead_without_a_tier_are_served_from_memory() -> None:
    """With every tier full, an announced file is still fetched once, before it is opened."""
    source, index, data = small_files(10)
    entries = [entry for _, entry in index.walk()]
    with reader(source, MemoryTier(quota=0)) as made:
        made.announce(entries, lookup=index.entry)
        until(lambda: made.stats().bytes_uncached == sum(e.size for e in entries[:8]))
        with opened(made, entries[0]) as it:
            assert it.read_nowait(0, 10_000) == data["d/0000"]
        assert made.stats().bytes_uncached == sum(e.size for e in entries[1:8])
    assert [key for key, _ in source.reads].count("d/0000") == 1


# Failures of the cache.


def test_a_full_tier_costs_one_fetch_a_block() -> None:
    """Without room in any tier, the many reads of one block still cause one request."""
    source, entry = source_of()
    with reader(source, MemoryTier(quota=0), NO_READAHEAD) as made, opened(made, entry) as it:
        for at in range(0, len(DATA), 4096):
            assert it.read(at, 4096) == DATA[at : at + 4096]
        assert made.stats().bytes_uncached > 0
        assert made.stats().errors["TierFull"] == 11
    assert len(source.reads) == 11


def test_a_broken_tier_is_read_around() -> None:
    """An error of the cache is never an error of a read: a tier that breaks while an object is open
    costs requests."""
    source, entry = source_of()
    tier = MemoryTier()
    with reader(source, tier, NO_READAHEAD) as made, opened(made, entry) as it:
        it.read(0, 100)
        tier.broken = "the disk is gone"
        for at in range(0, len(DATA), 4096):
            assert it.read(at, 4096) == DATA[at : at + 4096]
        tier.broken = ""
        assert it.read(0, 100) == DATA[:100]
    assert len(source.reads) == 12, "one for each block, and one for the one that the tier lost"


class Liar(MemoryTier):
    """Says that it has everything, and fails each read with `error`."""

    error: type[Exception] = TierBroken

    def _gaps(self, copy: object, span: ByteRange) -> list[ByteRange]:
        return []

    def _read(self, copy: object, span: ByteRange) -> Buffer:
        raise self.error("no")


@pytest.mark.parametrize("error", [TierBroken, Damaged])
def test_a_tier_that_cannot_read_what_it_has_is_read_around(error: type[Exception]) -> None:
    """An error of the cache is never an error of a read: bytes that a tier has and cannot give are
    fetched, in a bounded number of requests."""
    source, entry = source_of()
    tier = Liar()
    tier.error = error
    with reader(source, tier) as made, opened(made, entry) as it:
        assert it.read_nowait(0, 10) is None
        assert it.read(0, len(DATA)) == DATA
        assert made.stats().errors[error.__name__] >= 1
    assert sum(span.length for span in spans(source)) == len(DATA)


def test_damaged_blocks_are_fetched_again() -> None:
    """A block that does not match its checksum is a miss, never an answer: right bytes, and then present
    again."""
    source, entry = source_of()
    tier = MemoryTier()
    with reader(source, tier) as made:
        made.fetch(entry)
        tier.spoil(made.cache_key(entry), ByteRange(BLOCK, BLOCK + 1))
        source.reads.clear()
        with opened(made, entry) as it:
            assert it.read(BLOCK - 10, 20) == DATA[BLOCK - 10 : BLOCK + 10]
            assert it.read_nowait(BLOCK, 10) == DATA[BLOCK : BLOCK + 10]
        assert made.stats().errors == {"Damaged": 1}
    assert 1 <= len(source.reads) <= 2


def test_a_tier_with_a_bug_does_not_hang_readers(logs: "object") -> None:
    """An error that no tier should raise is logged, and the readers get their bytes."""
    logs.expect("filling the cache failed")  # type: ignore[attr-defined]

    class Buggy(MemoryTier):
        def _fill(self, copy: object, start: int, data: Buffer) -> None:
            raise RuntimeError("a bug")

    source, entry = source_of()
    with reader(source, Buggy()) as made, opened(made, entry) as it:
        assert it.read(0, 100) == DATA[:100]
        assert it.read(100, 100) == DATA[100:200]


def test_an_object_evicted_while_open_is_read_to_its_end() -> None:
    """Eviction under an open object changes nothing for its readers."""
    source, entry = source_of()
    tier = MemoryTier()
    with reader(source, tier) as made, opened(made, entry) as it:
        it.read(0, 100)
        tier.evict(made.cache_key(entry))
        for at in range(0, len(DATA), 4096):
            assert it.read(at, 4096) == DATA[at : at + 4096]


# Failures of the source.


def test_errors_go_to_those_who_need_the_bytes() -> None:
    """A failed fetch fails its readers, all of them, and no others; and it is not remembered."""
    source, entry = source_of()

    def fail(key: str, span: ByteRange) -> None:
        if span.start == BLOCK:
            raise Denied("not yours")

    source.on_read = fail
    with reader(source, settings=NO_READAHEAD) as made, opened(made, entry) as it:
        with source.hold() as held, ThreadPoolExecutor(9) as threads:
            reads = [threads.submit(it.read, BLOCK, 10) for _ in range(8)]
            fine = threads.submit(it.read, 0, 10)
            assert held.wait_for(2)
            until(lambda: sum(f.waiters for f in made._objects[made.cache_key(entry)].flights) == 9)
            held.release()
            errors = [read.exception(10) for read in reads]
            assert {str(error) for error in errors} == {"not yours"}
            assert len({id(error) for error in errors}) == 8, "each has an exception of its own"
            assert all(isinstance(error, Denied) for error in errors)
            assert fine.result(10) == DATA[:10]
        assert len(source.reads) == 2
        source.on_read = None
        assert it.read(BLOCK, 10) == DATA[BLOCK : BLOCK + 10], "the next read tries again"
        assert made.stats().errors == {"Denied": 1}


def test_a_read_that_fails_leaves_nothing_queued() -> None:
    """When one of several requests of a read fails, those that have not begun are dropped."""
    source, entry = source_of()

    def fail(key: str, span: ByteRange) -> None:
        if span.start == 0:
            raise Unavailable("away")

    settings = dataclasses.replace(NO_READAHEAD, concurrency=1)
    with reader(source, settings=settings) as made, opened(made, entry) as it:
        it.read(2 * BLOCK, 1)
        source.on_read = fail
        made._pool.close()  # nobody but the reader runs anything
        with pytest.raises(Unavailable):
            it.read(0, len(DATA))
        assert made._objects[made.cache_key(entry)].flights == []
    assert spans(source) == [ByteRange(2 * BLOCK, 3 * BLOCK), ByteRange(0, 2 * BLOCK)]


def test_wrong_lengths_are_refused() -> None:
    """An answer of another length is an error, never data, and never cached."""
    inner, entry = source_of()
    source = FaultySource(inner, {"read": [Truncate(3)]})
    with reader(source, settings=NO_READAHEAD) as made, opened(made, entry) as it:
        with pytest.raises(WrongBytes):
            it.read(0, 10)
        assert it.read(0, 10) == DATA[:10]


def test_an_open_object_keeps_its_version() -> None:
    """A read returns the bytes of exactly one version of the object, or an error: when the bucket has
    another version, cached bytes of the old one, or VersionChanged."""
    source, old = source_of()
    with reader(source, settings=NO_READAHEAD) as made, opened(made, old) as it:
        it.read(0, 100)
        new = entry_of(source.put("a", b"new bytes"))
        assert it.read(50, 10) == DATA[50:60]
        with pytest.raises(VersionChanged):
            it.read(BLOCK, 10)
        with opened(made, new) as it2:
            assert it2.read(0, 100) == b"new bytes"
        assert it.read(60, 10) == DATA[60:70]


def test_archived_objects_fail_before_any_request() -> None:
    """What must be restored first is not asked for; what is cached of it is served."""
    source = MemorySource()
    entry = entry_of(source.put("a", DATA, archived=True))
    tier = MemoryTier()
    with reader(source, tier) as made, opened(made, entry) as it:
        with pytest.raises(Archived, match="restore"):
            it.read(0, 10)
        with pytest.raises(Archived):
            made.fetch(entry)
        copy = tier.open(made.cache_key(entry))
        copy.fill(0, DATA[:100])
        copy.close()
        assert it.read(0, 10) == DATA[:10]
    assert source.requests["read"] == 0


class Interrupted(MemorySource):
    """The first read is interrupted, as by Ctrl-C."""

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        data = super().read(info, span)
        if len(self.reads) == 1:
            raise KeyboardInterrupt
        return data


def test_an_interrupt_is_for_who_was_interrupted() -> None:
    """Ctrl-C in one reader's thread is its own; who waited for the same bytes is told to try again."""
    source = Interrupted(objects={"a": DATA})
    entry = entry_of(source.stat("a"))
    with reader(source, settings=NO_READAHEAD) as made, opened(made, entry) as it, source.hold() as held:
        outcome: list[BaseException] = []

        def interrupted() -> None:
            try:
                it.read(0, 10)
            except KeyboardInterrupt as error:
                outcome.append(error)

        first = threading.Thread(target=interrupted)
        first.start()
        assert held.wait_for(1)
        with ThreadPoolExecutor(1) as threads:
            second = threads.submit(it.read, 0, 10)
            until(lambda: sum(f.waiters for f in made._objects[made.cache_key(entry)].flights) == 2)
            held.release()
            assert isinstance(second.exception(10), Unavailable)
        first.join(10)
        assert len(outcome) == 1
        assert it.read(0, 10) == DATA[:10]


# Memory.


class Metered(MemorySource):
    """Measures the bytes of requests under way, and how many there are."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects=objects)
        self._meter = threading.Lock()
        self.now = self.most = self.count = self.most_count = 0

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        with self._meter:
            self.now += span.length
            self.count += 1
            self.most = max(self.most, self.now)
            self.most_count = max(self.most_count, self.count)
        try:
            return bytes(super().read(info, span))
        finally:
            with self._meter:
                self.now -= span.length
                self.count -= 1


@pytest.mark.parametrize("quota", [1 << 40, 0], ids=["roomy", "full"])
def test_sixty_four_streams_stay_within_the_budget(quota: int) -> None:
    """Fetches, and bytes that no tier has room for, stay within `--memory`, whatever is read: 64 sequential
    readers never hold more than the budget, with no tier to put the bytes either, and
    share it: blocks are then smaller, not fetched over and over."""
    size, streams = 40 * BLOCK, 64
    data = {f"{n}": bytes([n]) * size for n in range(streams)}
    source = Metered(data)
    settings = ReadingSettings(
        block_size=8 * BLOCK, concurrency=6, readahead=32 * BLOCK, memory=128 * BLOCK, order_ahead=0
    )
    with reader(source, MemoryTier(quota=quota), settings) as made:
        opens = [made.open(entry_of(source.stat(f"{n}"), ino=n)) for n in range(streams)]

        def stream(number: int) -> bool:
            it, at = opens[number], 0
            while at < size:
                got = it.read_nowait(at, 2 * BLOCK)
                got = it.read(at, 2 * BLOCK) if got is None else got
                assert got == data[f"{number}"][at : at + 2 * BLOCK]
                at += len(got)
            return True

        assert together(streams, stream) == [True] * streams
        for it in opens:
            it.close()
        peak = made.stats().memory_peak
    assert peak <= settings.memory
    assert 2 * source.most <= settings.memory, "what runs holds its answer twice"
    assert source.most_count <= settings.concurrency
    fetched = sum(span.length for span in spans(source))
    assert fetched <= (1.0 if quota else 1.6) * size * streams


def test_kept_bytes_are_given_up_for_other_readers() -> None:
    """Bytes without a tier make room when another reader needs the memory."""
    source, entry = source_of()
    settings = dataclasses.replace(NO_READAHEAD, memory=4 * BLOCK)
    with reader(source, MemoryTier(quota=0), settings) as made, opened(made, entry) as it:
        for block in range(10):
            it.read(block * BLOCK, 10)
            assert made.stats().memory_used <= settings.memory
        assert 0 < made.stats().bytes_uncached <= settings.memory


def test_what_was_read_to_its_end_goes_first() -> None:
    """Of the bytes without a tier, those that were read to their end are given up first."""
    source, entry = source_of()
    settings = dataclasses.replace(NO_READAHEAD, memory=16 * BLOCK)
    with reader(source, MemoryTier(quota=0), settings) as made, opened(made, entry) as it:
        for block in range(4):
            it.read(block * BLOCK, 10)
        assert it.read(2 * BLOCK + 10, BLOCK - 10) == DATA[2 * BLOCK + 10 : 3 * BLOCK]
        made._budget.forget(made._reclaim(1, False))
        source.reads.clear()
        for block in (0, 1, 3):
            it.read(block * BLOCK, 10)
        assert source.reads == []
        assert made._reclaim(1, False) == 0, "nothing else was read to its end"
        it.read(2 * BLOCK, 10)
    assert len(source.reads) == 1


def test_one_read_of_more_than_the_budget_stays_within_it() -> None:
    """No request is larger than the memory that it may take, however long the read."""
    source, entry = source_of()
    settings = dataclasses.replace(SETTINGS, memory=4 * BLOCK)
    with reader(source, MemoryTier(quota=0), settings) as made, opened(made, entry) as it:
        assert it.read(0, len(DATA)) == DATA
        stats = made.stats()
        assert max(stats.memory_peak, stats.memory_used) <= settings.memory
    assert max(span.length for span in spans(source)) == 2 * BLOCK


# Whole objects.


@pytest.mark.parametrize("size", [1, BLOCK, len(DATA)])
def test_fetch_makes_an_object_whole(size: int) -> None:
    """After `fetch` every byte is in the cache; a second one has nothing to do."""
    source, entry = source_of(DATA[:size])
    tier = MemoryTier()
    seen: list[int] = []
    paced: list[int] = []
    with reader(source, tier) as made:
        assert made.fetch(entry, on_bytes=lambda count, ours: seen.append(count), pace=paced.append) == size
        assert made.fetch(entry, on_bytes=lambda count, ours: seen.append(count)) == 0
        assert tier.present(made.cache_key(entry)) == size
        with opened(made, entry) as it:
            assert it.read_nowait(0, size) == DATA[:size]
        assert made.stats().opens_whole == 1
    assert sum(seen) == sum(paced) == size
    assert len(source.reads) == 1


def test_fetch_fetches_large_objects_in_parallel() -> None:
    """The spans of a large object are under way together."""
    data = bytes(33 * MiB)
    source, entry = source_of(data)
    settings = ReadingSettings(memory=256 * MiB)
    with reader(source, settings=settings) as made, source.hold() as held, ThreadPoolExecutor(1) as threads:
        fetched = threads.submit(made.fetch, entry)
        assert held.wait_for(5)
        held.release()
        assert fetched.result(10) == len(data)
    assert len(source.reads) == 5


def test_fetch_fetches_only_what_is_missing() -> None:
    """What a reader already brought is not fetched again; what it is bringing is waited for."""
    source, entry = source_of()
    tier = MemoryTier()
    with reader(source, tier, NO_READAHEAD) as made, opened(made, entry) as it:
        it.read(2 * BLOCK, 10)
        with source.hold() as held, ThreadPoolExecutor(2) as threads:
            read = threads.submit(it.read, 0, 10)
            assert held.wait_for(1)
            fetched = threads.submit(made.fetch, entry)
            until(lambda: sum(f.waiters for f in made._objects[made.cache_key(entry)].flights) >= 2)
            held.release()
            assert read.result(10) == DATA[:10]
            assert fetched.result(10) == len(DATA) - BLOCK
        assert tier.present(made.cache_key(entry)) == len(DATA)
    assert sum(span.length for span in spans(source)) == len(DATA)


def test_fetch_fills_the_tier_that_it_is_given() -> None:
    """A tier can be named: it becomes whole, from other tiers where they have bytes."""
    source, entry = source_of()
    shared, leaf = MemoryTier(name="all"), MemoryTier(name="leaf")
    with reader(source, shared, NO_READAHEAD) as made:
        with opened(made, entry) as it:
            it.read(3 * BLOCK, 10)
        assert made.fetch(entry, tier=leaf) == len(DATA) - BLOCK
        key = made.cache_key(entry)
        assert leaf.present(key) == len(DATA)
        copy = leaf.open(key)
        assert bytes(copy.read(ByteRange(0, len(DATA)))) == DATA
        copy.close()
    assert sum(span.length for span in spans(source)) == len(DATA), "block 3 was copied"


def test_fetch_into_a_tier_survives_damage_elsewhere() -> None:
    """What is damaged in another tier is fetched, not copied."""
    source, entry = source_of()
    shared, leaf = MemoryTier(name="all"), MemoryTier(name="leaf")
    with reader(source, shared) as made:
        made.fetch(entry)
        key = made.cache_key(entry)
        shared.spoil(key, ByteRange(0, 1))
        made.fetch(entry, tier=leaf)
        assert leaf.present(key) >= len(DATA) - BLOCK
        with opened(made, entry) as it:
            assert it.read(0, len(DATA)) == DATA


@pytest.mark.parametrize("error", [TierBroken, Damaged])
def test_fetch_into_a_tier_does_not_need_the_other_tiers(error: type[Exception]) -> None:
    """What another tier has and cannot give is fetched for the named one."""
    source, entry = source_of()
    shared, leaf = Liar(), MemoryTier(name="leaf")
    shared.error = error
    with reader(source, shared) as made:
        assert made.fetch(entry, tier=leaf) == len(DATA)
        assert leaf.present(made.cache_key(entry)) == len(DATA)


def test_fetch_joins_a_reader_and_still_fills_its_tier() -> None:
    """Bytes that a reader is bringing into the cache are put into the named tier, too."""
    source, entry = source_of(DATA[:BLOCK])
    shared, leaf = MemoryTier(name="all"), MemoryTier(name="leaf")
    with reader(source, shared) as made, opened(made, entry) as it, source.hold() as held:
        with ThreadPoolExecutor(2) as threads:
            read = threads.submit(it.read, 0, 10)
            assert held.wait_for(1)
            fetched = threads.submit(made.fetch, entry, tier=leaf)
            until(lambda: sum(f.waiters for f in made._objects[made.cache_key(entry)].flights) == 2)
            held.release()
            read.result(10)
            assert fetched.result(10) == BLOCK
        assert leaf.present(made.cache_key(entry)) == BLOCK
    assert len(source.reads) == 1


@pytest.mark.parametrize("read", [10, len(DATA)])
def test_fetch_of_what_was_evicted_while_it_is_open(read: int) -> None:
    """Who has it open keeps what was dropped; a load puts it into the cache anew, from there where it can."""
    source, entry = source_of()
    tier = MemoryTier()
    with reader(source, tier, NO_READAHEAD) as made, opened(made, entry) as it:
        it.read(0, read)
        tier.evict(made.cache_key(entry))
        source.reads.clear()
        made.fetch(entry)
        assert tier.present(made.cache_key(entry)) == len(DATA)
        assert sum(span.length for span in spans(source)) == (0 if read > BLOCK else len(DATA) - BLOCK)
        assert it.read(0, len(DATA)) == DATA


@pytest.mark.parametrize("broken", [False, True])
def test_fetch_keeps_what_had_no_room_when_it_was_read(broken: bool) -> None:
    """Bytes that are held in memory, because the tier was full or broken, go into it once it is not."""
    source, entry = source_of()
    tier = MemoryTier(quota=1 << 40 if broken else 0)
    tier.broken = "for a while" * broken
    with reader(source, tier, NO_READAHEAD) as made, opened(made, entry) as it:
        it.read(0, 10)
        tier.quota, tier.broken = 1 << 40, ""
        made.fetch(entry)
        assert tier.present(made.cache_key(entry)) == len(DATA)
    assert sum(span.length for span in spans(source)) == len(DATA), "nothing was fetched twice"


@pytest.mark.parametrize(("quota", "broken", "error"), [(0, "", TierFull), (1 << 40, "gone", TierBroken)])
def test_fetch_says_that_there_is_no_room(quota: int, broken: str, error: type[Exception]) -> None:
    """A load that finds no place for the bytes is told so, and keeps nothing in memory."""
    source, entry = source_of()
    tier = MemoryTier(quota=quota)
    tier.broken = broken
    with reader(source, tier) as made:
        with pytest.raises(error):
            made.fetch(entry)
        assert made.stats().memory_used == 0


def test_fetch_ends_with_the_error_of_the_source() -> None:
    """A failed span ends the fetch; the spans that have not begun are dropped."""
    source, entry = source_of(bytes(64 * MiB))

    def fail(key: str, span: ByteRange) -> None:
        raise Unavailable("away")

    source.on_read = fail
    with reader(source) as made:
        with pytest.raises(Unavailable, match="away"):
            made.fetch(entry)
        until(lambda: made.stats().open_objects == 0)


def test_fetch_counts_what_has_ended_while_it_waits_for_its_pace() -> None:
    """A progress bar moves with every request, also where many more could be under way."""
    source, entry = source_of(bytes(32 * MiB))
    tier = MemoryTier()
    counted: list[int] = []
    seen: list[int] = []

    def pace(length: int) -> None:
        seen.append(sum(counted))
        arrived = 8 * MiB * (len(seen) - 1)
        until(lambda: tier.present(made.cache_key(entry)) == arrived and made.stats().memory_used == 0)

    with reader(source, tier) as made:
        assert made.fetch(entry, pace=pace, on_bytes=lambda count, ours: counted.append(count)) == 32 * MiB
    assert seen == [0, 0, 8 * MiB, 16 * MiB]


def test_fetch_can_be_stopped_between_requests() -> None:
    """What `pace` raises ends the fetch."""
    source, entry = source_of(bytes(64 * MiB))

    class Stop(Exception):
        pass

    def stop(length: int) -> None:
        if len(source.reads):
            raise Stop

    settings = dataclasses.replace(SETTINGS, concurrency=1)
    with reader(source, settings=settings) as made:
        with pytest.raises(Stop):
            made.fetch(entry, pace=stop)
        until(lambda: made.stats().open_objects == 0)
    assert len(source.reads) <= 2


# Closing.


def test_closing_ends_reads_that_wait() -> None:
    """A reader that waits for memory when all is closed is told so; later ones are, too."""
    source, entry = source_of()
    settings = dataclasses.replace(NO_READAHEAD, concurrency=1)
    with reader(source, settings=settings) as made:
        with opened(made, entry) as it, source.hold() as held, ThreadPoolExecutor(3) as threads:
            first = threads.submit(it.read, 0, 10)
            assert held.wait_for(1)
            second = threads.submit(it.read, BLOCK, 10)
            until(lambda: made._budget.waiting)
            closing = threads.submit(made.close)
            assert isinstance(second.exception(10), Unavailable)
            held.release()
            assert first.result(10) == DATA[:10]
            closing.result(10)
            assert it.read(0, 10) == DATA[:10], "what is cached is still served"
            with pytest.raises(Unavailable):
                it.read(2 * BLOCK, 10)
        with pytest.raises(Unavailable, match="closed"):
            made.open(entry)


def test_closing_forgets_what_is_queued_and_kept() -> None:
    """What nobody waits for is dropped at close, kept bytes of files that were never opened, too."""
    source, index, _ = small_files(10)
    with reader(source, MemoryTier(quota=0)) as made:
        made.announce(index.files.values())
        until(lambda: made.stats().bytes_uncached > 0)
        made._fetch_ahead(made._hold(index.resolve("d/0009")), ByteRange(0, 100))
        made._drop(made._objects[made.cache_key(index.resolve("d/0009"))])
        made.close()
        assert made.announce([]) == 0
    gc.collect()


def test_it_can_be_asked_how_it_is() -> None:
    """The parts of a stuck reader can be looked at."""
    source, entry = source_of()
    with reader(source) as made, opened(made, entry) as it, source.hold() as held:
        with ThreadPoolExecutor(1) as threads:
            read = threads.submit(it.read, 0, 1)
            assert held.wait_for(1)
            assert made.stats().in_flight == 1
            assert made.stats().memory_used == 2 * BLOCK
            (flight,) = made._objects[made.cache_key(entry)].flights
            assert "RUNNING" in repr(flight)
            assert "1 objects" in repr(made)
            held.release()
            read.result(10)
        assert repr(it) == "<OpenObject 'a'>"
        assert made.cache_key(entry) == CacheKey(source.uri, "a", entry.version.token, len(DATA))
