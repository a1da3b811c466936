"""The index suite on both implementations; and what only one of them promises."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from datacache.clock import VirtualClock
from datacache.config.settings import Consistency, IndexSettings
from datacache.errors import (
    DatacacheError,
    Denied,
    IndexBroken,
    NoSuchPath,
    NoSuchSnapshot,
    NotFound,
    SettingError,
    SnapshotExists,
    Unavailable,
    WrongBytes,
)
from datacache.index import database, live
from datacache.index.database import FORMER_MAX, VERSION_IN_SQL, locked
from datacache.index.index import ROOT, Index
from datacache.index.live import Check, LiveIndex, how_to_check
from datacache.index.opening import open_index
from datacache.index.snapshot import (
    Change,
    create_snapshot,
    diff_snapshots,
    list_snapshots,
    remove_snapshot,
)
from datacache.model import Dataset, Entry, Kind, MountPoint, ObjectInfo, Version
from datacache.sources.faulty import Before, Fail, FaultySource, Hold
from datacache.sources.memory import MemorySource
from datacache.sources.source import Page, Source
from tests.conftest import AnnouncedLogs
from tests.contract.index_suite import IndexSuite, Opener, paths


def dataset(sources: Sequence[Source], at: Sequence[str] = ("/",)) -> Dataset:
    return Dataset("test", tuple(MountPoint(s.uri, path) for s, path in zip(sources, at, strict=True)))


class Opened:
    """Opens indexes in one state directory and closes them all."""

    def __init__(self, state: str, clock: VirtualClock) -> None:
        self.state, self.clock = state, clock
        self._indexes: list[Index] = []

    def live(
        self,
        sources: Sequence[Source],
        paths: Sequence[str] = ("/",),
        *,
        resumed: bool = False,
        identity: str = "",
        **settings: object,
    ) -> LiveIndex:
        index = open_index(
            dataset(sources, paths),
            sources,
            IndexSettings(**settings),  # type: ignore[arg-type]
            state=self.state,
            clock=self.clock,
            resumed=resumed,
            identity=identity,
        )
        assert isinstance(index, LiveIndex)
        self._indexes.append(index)
        return index

    def create(self, sources: Sequence[Source], name: str, paths: Sequence[str] = ("/",)) -> None:
        create_snapshot(dataset(sources, paths), sources, state=self.state, name=name, clock=self.clock)

    def snapshot(self, sources: Sequence[Source], name: str, paths: Sequence[str] = ("/",)) -> Index:
        index = open_index(
            dataset(sources, paths), sources, IndexSettings(snapshot=name), state=self.state, clock=self.clock
        )
        self._indexes.append(index)
        return index

    def close(self) -> None:
        while self._indexes:
            self._indexes.pop().close()


@pytest.fixture
def opened(tmp_path: Path, clock: VirtualClock) -> Iterator[Opened]:
    opened = Opened(str(tmp_path / "state"), clock)
    yield opened
    opened.close()


class TestLive(IndexSuite):
    """The live index."""

    @pytest.fixture
    def opener(self, opened: Opened) -> Opener:
        return opened.live


class TestSnapshot(IndexSuite):
    """A snapshot of a store that lists in order."""

    @pytest.fixture
    def opener(self, opened: Opened) -> Opener:
        def opener(sources: Sequence[Source], paths: Sequence[str] = ("/",)) -> Index:
            opened.create(sources, "s", paths)
            return opened.snapshot(sources, "s", paths)

        return opener


class Shuffled:
    """A store that lists in no order, and some objects twice."""

    def __init__(self, inner: MemorySource) -> None:
        self.uri, self.traits, self.stat, self.read = inner.uri, inner.traits, inner.stat, inner.read
        self.inner = inner

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        pages = self.inner.list(prefix, recursive=recursive, versions=versions)
        objects = sorted((o for page in pages for o in page.objects), key=lambda o: o.key[::-1])
        half = len(objects) // 2
        yield Page(objects[:half], [])
        yield Page(objects[half:] + objects[:3], [])

    def close(self) -> None:
        pass


class TestSnapshotOutOfOrder(IndexSuite):
    """A snapshot of a store that does not list in order."""

    @pytest.fixture
    def opener(self, opened: Opened) -> Opener:
        def opener(sources: Sequence[MemorySource], paths: Sequence[str] = ("/",)) -> Index:
            opened.create([Shuffled(source) for source in sources], "s", paths)
            return opened.snapshot(sources, "s", paths)

        return opener


# The live index


@pytest.mark.parametrize(
    ("entries", "asked", "check"),
    [
        (0, 0, Check.LIST),
        (1000, 0, Check.LIST),  # one request refreshes everything
        (1001, 0, Check.ASK),
        (1001, 1, Check.ASK),
        (1001, 2, Check.LIST),  # asking has cost what listing costs
        (200_000, 199, Check.ASK),
        (200_000, 200, Check.LIST),
    ],
)
def test_how_to_check(entries: int, asked: int, check: Check) -> None:
    """Small directories are listed; in large ones objects are asked for until that costs a listing."""
    assert how_to_check(entries=entries, asked=asked) is check


def test_a_lookup_in_a_fresh_directory_costs_no_request(opened: Opened) -> None:
    """Exactly one listing per directory within the TTL, no stat ever, whatever is looked up."""
    source = MemorySource(objects={f"d/{i}": b"x" for i in range(50)})
    index = opened.live([source])
    for _ in range(2):
        for i in range(50):
            index.current(index.resolve(f"/d/{i}").ino)
        with pytest.raises(NoSuchPath):
            index.resolve("/d/none")
    assert source.requests == {"list": 2}
    assert index.stats().listings == 2


def test_a_change_is_seen_when_the_ttl_has_passed_and_not_before(opened: Opened) -> None:
    """While the store answers, an open sees a version that was current at most TTL ago."""
    source = MemorySource(objects={"a": b"1", "b": b"1"})
    index = opened.live([source], ttl=60.0)
    before = index.resolve("/a")
    source.put("a", b"22")
    source.delete("b")
    source.put("c", b"3")
    opened.clock.advance(59)
    assert index.fresh_for(ROOT) == pytest.approx(1.0)
    assert index.current(before.ino) == before == index.resolve("/a")
    assert index.resolve("/b").size == 1
    with pytest.raises(NoSuchPath):
        index.resolve("/c")
    opened.clock.advance(1)
    assert index.fresh_for(ROOT) == 0.0
    assert index.lookup_nowait(ROOT, b"a") is None
    assert index.lookup_nowait(ROOT, b"c") is None
    after = index.current(before.ino)
    assert (after.ino, after.size) == (before.ino, 2)
    assert after.version == source.stat("a").version
    assert index.entry(before.ino) == after
    assert index.resolve("/c").size == 1
    with pytest.raises(NoSuchPath):
        index.resolve("/b")
    assert (index.stats().files, index.stats().bytes) == (2, 3)


def test_immutable_believes_the_first_listing_for_ever(opened: Opened) -> None:
    """What was listed first, or pinned by the snapshot, is what is read, for ever: a live index."""
    source = MemorySource(objects={"a": b"1"})
    index = opened.live([source], consistency=Consistency.IMMUTABLE, ttl=1.0)
    before = index.resolve("/a")
    source.put("a", b"22")
    opened.clock.advance(1e9)
    assert index.current(before.ino) == before
    assert index.fresh_for(ROOT) == float("inf")
    assert source.requests == {"list": 1}


def test_a_ttl_of_zero_asks_each_time(opened: Opened) -> None:
    """Without a TTL every lookup sees the store as it is."""
    source = MemorySource(objects={"a": b"1"})
    index = opened.live([source], ttl=0.0)
    for size in range(1, 5):
        source.put("a", b"x" * size)
        assert index.resolve("/a").size == size
    assert source.requests == {"list": 4}


def test_an_inode_names_one_path_for_ever(opened: Opened) -> None:
    """`st_ino` names a path and is never used twice: over removal, return, change of kind and restart."""
    source = MemorySource(objects={"a": b"1", "b": b"1"})
    index = opened.live([source])
    a, b = index.resolve("/a").ino, index.resolve("/b").ino
    source.delete("a")
    source.put("c", b"1")
    opened.clock.advance(60)
    c = index.resolve("/c").ino
    with pytest.raises(NoSuchPath):
        index.entry(a)
    assert len({a, b, c}) == 3
    source.put("a", b"back")
    source.delete("b")
    source.put("b/x", b"1")
    opened.clock.advance(60)
    assert index.resolve("/a").ino == a
    assert index.entry(a).size == 4
    directory = index.resolve("/b")
    assert directory.kind is Kind.DIRECTORY
    assert directory.ino not in (a, b, c)
    opened.close()
    index = opened.live([source])
    assert [index.resolve(p).ino for p in ("/a", "/b", "/c")] == [a, directory.ino, c]
    source.delete("b/x")
    source.put("b", b"file again")
    opened.clock.advance(60)
    assert index.resolve("/b").ino == b


def test_a_directory_that_disappears_takes_all_below_with_it(opened: Opened) -> None:
    """What was below a lost directory is not there, does not count, and has its inodes when it is back."""
    keys = ["d/e/f/x", "d/e/y", "d/z", "k"]
    source = MemorySource(objects=dict.fromkeys(keys, b"xx"))
    index = opened.live([source])
    before = {path: entry.ino for path, entry in index.walk()}
    for key in keys[:3]:
        source.delete(key)
    opened.clock.advance(60)
    assert paths(index) == ["/k"]
    stats = index.stats()
    assert (stats.files, stats.bytes, stats.directories) == (1, 2, 1)
    for path, ino in before.items():
        if path != "/k":
            with pytest.raises(NoSuchPath):
                index.entry(ino)
    for key in keys[:3]:
        source.put(key, b"xx")
    opened.clock.advance(60)
    assert {path: entry.ino for path, entry in index.walk()} == before
    assert (index.stats().files, index.stats().directories) == (4, 4)


def test_a_restart_goes_on_where_the_index_was(opened: Opened) -> None:
    """A listing outlives the process for what is left of its TTL, by wall time."""
    source = MemorySource(objects={"a": b"1"})
    index = opened.live([source])
    entry = index.resolve("/a")
    opened.close()
    opened.clock.advance(40)
    index = opened.live([source])
    assert index.fresh_for(ROOT) == pytest.approx(20.0)
    assert index.lookup_nowait(ROOT, b"a") == entry
    opened.clock.advance(20)
    assert index.lookup_nowait(ROOT, b"a") is None
    assert source.requests == {"list": 1}


class TwoClocks(VirtualClock):
    """Wall time that can be set, beside monotonic time that cannot."""

    set_by = 0.0

    def wall(self) -> float:
        return super().wall() + self.set_by


def test_a_clock_that_was_set_back_makes_nothing_younger(tmp_path: Path) -> None:
    """Set back, the wall clock would make a listing young again: the monotonic clock knows better, and
    after a restart a listing from the future has expired."""
    clock, source = TwoClocks(), MemorySource(objects={"a": b"1"})
    opened = Opened(str(tmp_path), clock)
    try:
        index = opened.live([source])
        index.resolve("/a")
        clock.set_by = -30.0
        assert index.fresh_for(ROOT) == 0.0
        clock.advance(50)
        assert index.fresh_for(ROOT) == pytest.approx(10.0)
        clock.advance(10)
        assert index.fresh_for(ROOT) == 0.0
        index.resolve("/a")
        clock.set_by += 3600.0  # asleep: the wall clock went on alone
        assert index.fresh_for(ROOT) == 0.0
        index.resolve("/a")
        opened.close()
        clock.set_by -= 1000.0
        index = opened.live([source])
        assert index.fresh_for(ROOT) == 0.0
        asked = source.requests["list"]
        index.resolve("/a")
        assert source.requests["list"] == asked + 1
        assert index.fresh_for(ROOT) == pytest.approx(60.0)
    finally:
        opened.close()


def test_large_directories_are_asked_object_by_object(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past its TTL, an object of a large directory costs one stat, until listing is the better deal."""
    monkeypatch.setattr(live, "LISTING_PAGE", 10)
    source = MemorySource(objects={f"{i:02d}": b"x" for i in range(30)} | {"sub/x": b"y"}, page_size=10)
    index = opened.live([source])
    zero, sub = index.resolve("/00"), index.resolve("/sub")
    source.requests.clear()
    opened.clock.advance(60)
    source.put("00", b"changed")
    assert index.resolve("/00").size == 7
    assert index.entry(zero.ino).version == source.stat("00").version
    assert index.lookup_nowait(ROOT, b"00") is not None
    assert index.lookup_nowait(ROOT, b"01") is None
    assert index.fresh_for(ROOT) == 0.0
    assert index.resolve("/00").size == 7
    assert index.resolve("/sub") == sub
    assert source.requests == {"stat": 2, "list": 1}  # one stat is this test's own
    assert index.current(index.resolve("/01").ino).size == 1
    assert index.resolve("/02").size == 1
    assert source.requests == {"stat": 4, "list": 1}
    assert index.resolve("/03").size == 1  # four asked: as much as four pages
    assert source.requests == {"stat": 4, "list": 5}
    assert index.fresh_for(ROOT) == 60.0
    assert index.stats().bytes == 7 + 29


def test_an_open_asks_for_its_own_object(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """`current` past the TTL tells the version of now, also where only that object was asked for."""
    monkeypatch.setattr(live, "LISTING_PAGE", 10)
    source = MemorySource(objects={f"{i:02d}": b"x" for i in range(30)})
    index = opened.live([source])
    entry = index.resolve("/00")
    opened.clock.advance(60)
    source.put("00", b"changed")
    assert index.current(entry.ino).size == 7
    assert source.requests == {"list": 1, "stat": 1}


def test_an_answer_that_a_listing_overtook(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a listing found that began later is not undone by a slow answer about one object."""
    monkeypatch.setattr(live, "LISTING_PAGE", 10)

    class Slow(MemorySource):
        def stat(self, key: str) -> ObjectInfo:
            info = super().stat(key)
            self.put(key, b"newer")
            index.children(ROOT)
            return info

    source = Slow(objects={f"{i:02d}": b"x" for i in range(30)})
    index = opened.live([source])
    index.resolve("/00")
    source.put("00", b"new")
    opened.clock.advance(60)
    assert index.resolve("/00").size == 5
    assert source.requests["stat"] == 1


def test_a_lone_question_without_an_answer_lists_the_directory(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object that is gone may be a directory now: only its directory's listing can tell."""
    monkeypatch.setattr(live, "LISTING_PAGE", 10)
    source = MemorySource(objects={f"{i:02d}": b"x" for i in range(30)} | {"sub/x": b"y"})
    index = opened.live([source])
    list(index.walk())
    opened.clock.advance(60)
    source.delete("00")
    source.put("00/inside", b"x")
    assert index.resolve("/00").kind is Kind.DIRECTORY
    opened.clock.advance(60)
    source.delete("sub/x")
    with pytest.raises(NoSuchPath):
        index.resolve("/sub")


def test_store_away_the_last_known_listing_is_served_and_counted(opened: Opened) -> None:
    """When the store is away, the last known version is served and counted as `stale`; what was never
    listed fails."""
    source = FaultySource(MemorySource(objects={"a": b"1", "d/x": b"1"}))
    index = opened.live([source])
    a, d = index.resolve("/a"), index.resolve("/d")
    opened.clock.advance(60)
    source.add("list", *[Fail(Unavailable("down"))] * 6)
    assert index.resolve("/a") == a
    assert index.current(a.ino) == a
    assert [e.ino for e in index.children(ROOT)] == [a.ino, d.ino]
    with pytest.raises(NoSuchPath):
        index.resolve("/b")
    assert index.stats().stale == 4
    assert index.fresh_for(ROOT) == 0.0
    with pytest.raises(Unavailable):
        index.children(d.ino)
    with pytest.raises(Unavailable):
        index.lookup(d.ino, b"x")
    assert index.stats().stale == 4
    assert index.resolve("/d/x").size == 1
    assert index.stats().stale == 4


def test_strict_fails_instead(opened: Opened) -> None:
    """`strict`: a listing past its TTL is not served when the store is away."""
    source = FaultySource(MemorySource(objects={"a": b"1"}))
    index = opened.live([source], strict=True)
    index.resolve("/a")
    opened.clock.advance(60)
    source.add("list", Fail(Unavailable("down")))
    with pytest.raises(Unavailable):
        index.resolve("/a")
    assert index.stats().stale == 0


@pytest.mark.parametrize("error", [NotFound("no such bucket"), Denied("no")])
def test_a_store_that_says_no_is_believed(opened: Opened, error: Exception) -> None:
    """A missing bucket and refused credentials are errors, also where something was known before."""
    source = FaultySource(MemorySource(objects={"a": b"1"}))
    index = opened.live([source])
    index.resolve("/a")
    opened.clock.advance(60)
    source.add("list", Fail(error))  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        index.resolve("/a")


def test_half_a_listing_counts_for_nothing(opened: Opened) -> None:
    """A listing that breaks off leaves the directory as it was: unknown, or as listed before."""
    inner = MemorySource(objects={f"{i:02d}": b"x" for i in range(30)}, page_size=10)
    source = FaultySource(inner)
    index = opened.live([source])
    source.add("list", Fail(Unavailable("broke off"), pages=2))
    with pytest.raises(Unavailable):
        index.children(ROOT)
    assert index.fresh_for(ROOT) == 0.0
    assert index.stats().files == 0
    assert len(index.children(ROOT)) == 30
    opened.clock.advance(60)
    for i in range(30):
        inner.delete(f"{i:02d}")
    inner.put("new", b"x")
    source.add("list", Fail(Unavailable("broke off"), pages=0))
    assert len(index.children(ROOT)) == 30
    assert [e.name for e in index.children(ROOT)] == [b"new"]


def test_concurrent_lookups_share_one_listing(opened: Opened) -> None:
    """Single-flight: many threads at one unlisted directory make one request, and another directory is
    answered meanwhile."""
    inner = MemorySource(objects={"d/x": b"1", "e/y": b"1"})
    source = FaultySource(inner)
    index = opened.live([source])
    d, e = index.resolve("/d"), index.resolve("/e")
    go = threading.Event()
    source.add("list", Hold(go))
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(index.lookup(d.ino, b"x").size)) for _ in range(8)
    ]
    threads[0].start()
    while ("list", d.ino) not in index._flights:
        pass
    for thread in threads[1:]:
        thread.start()
    assert index.lookup(e.ino, b"y").size == 1
    assert index.lookup_nowait(d.ino, b"x") is None
    assert not found
    go.set()
    for thread in threads:
        thread.join()
    assert found == [1] * 8
    assert source.calls["list"] == 3


def test_a_listing_that_began_too_early_is_not_enough(opened: Opened) -> None:
    """Who joins a listing that is older than the TTL by the time it ends lists again."""
    inner = MemorySource(objects={"a": b"1"})
    source = FaultySource(inner)
    index = opened.live([source], ttl=10.0)
    # While the first listing is under way the object changes and more than the TTL passes.
    source.add("list", None)
    index.resolve("/a")
    opened.clock.advance(10)
    go = threading.Event()
    source.add("list", Hold(go))
    first = threading.Thread(target=lambda: index.resolve("/a"))
    first.start()
    while ("list", ROOT) not in index._flights:
        pass
    opened.clock.advance(11)
    sizes: list[int] = []
    second = threading.Thread(target=lambda: sizes.append(index.resolve("/a").size))
    second.start()
    go.set()
    first.join()
    second.join()
    assert sizes == [1]
    assert source.calls["list"] >= 3


def test_a_directory_removed_while_it_is_listed(opened: Opened) -> None:
    """A listing of a directory that its parent lost meanwhile is not kept."""
    inner = MemorySource(objects={"d/x": b"1", "k": b"1"})
    source = FaultySource(inner)
    index = opened.live([source])
    d = index.resolve("/d")
    opened.clock.advance(60)

    def removed() -> None:
        inner.delete("d/x")
        index.children(ROOT)

    source.add("list", Before(removed))
    with pytest.raises(NoSuchPath):
        index.children(d.ino)
    assert index.stats().files == 1


def test_a_directory_lost_by_a_listing_from_before_it_was_back(opened: Opened) -> None:
    """A listing that began before a directory came back, and ended after that was listed, removes it; the
    next one brings it back with all that is in it."""

    class Slow(MemorySource):
        meanwhile: Callable[[], object] | None = None

        def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
            pages = list(super().list(prefix, recursive=recursive, versions=versions))
            if self.meanwhile and not prefix:
                action, self.meanwhile = self.meanwhile, None
                action()
            yield from pages

    source = Slow(objects={"d/x": b"1", "k": b"1"})
    index = opened.live([source], ttl=10.0)
    d = index.resolve("/d").ino
    opened.clock.advance(10)
    source.delete("d/x")

    def back() -> None:
        opened.clock.advance(5)
        source.put("d/x", b"22")
        assert [e.size for e in index.children(d)] == [2]

    source.meanwhile = back
    with pytest.raises(NoSuchPath):
        index.resolve("/d")
    opened.clock.advance(5)
    assert index.resolve("/d/x").size == 2


def test_a_directory_lost_and_found_by_another_process(opened: Opened) -> None:
    """What another process removed and listed again is not believed to be empty."""
    source = MemorySource(objects={"d/x": b"1", "k": b"1"})
    patient = opened.live([source], ttl=1000.0)
    assert patient.resolve("/d/x").size == 1
    hasty = opened.live([source], ttl=1.0)
    opened.clock.advance(1)
    source.delete("d/x")
    with pytest.raises(NoSuchPath):
        hasty.resolve("/d")
    opened.clock.advance(1)
    source.put("d/x", b"22")
    assert hasty.resolve("/d").kind is Kind.DIRECTORY
    opened.close()
    assert opened.live([source], ttl=1000.0).resolve("/d/x").size == 2


def test_who_keeps_copies_is_told_what_was_replaced(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that changed or went, as they were, once: by listing, with a lost directory, and asked for alone;
    not what is new, and not the same bytes put again."""
    monkeypatch.setattr(live, "LISTING_PAGE", 10)
    source = MemorySource(objects={f"{i:02d}": b"x" for i in range(30)} | {"d/e/f": b"1", "same": b"1"})
    told: list[Entry] = []
    index = open_index(
        dataset([source]), [source], IndexSettings(), state=opened.state, clock=opened.clock,
        on_replaced=told.extend,
    )  # fmt: skip
    with closing(index):
        before = dict(index.walk())
        opened.clock.advance(60)
        source.put("00", b"changed")
        index.resolve("/00")
        assert told == [before["/00"]]
        source.put("01", b"changed")
        source.put("same", b"1")
        source.put("new", b"1")
        source.delete("02")
        source.delete("d/e/f")
        index.children(ROOT)
        assert sorted(e.key for e in told) == ["00", "01", "02", "d/e/f"]
        assert set(told) <= set(before.values())
        opened.clock.advance(60)
        index.children(ROOT)
        assert len(told) == 4


def test_each_version_of_a_path_has_a_generation_and_stays_known(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced by a listing, by an object asked for alone, twice, or lost with a directory: the version that
    was is still told by its number, with all that is needed to read it, and the current one by its own."""
    monkeypatch.setattr(live, "LISTING_PAGE", 10)
    source = MemorySource(objects={f"{i:02d}": b"x" for i in range(30)} | {"d/e/f": b"1", "same": b"1"})
    index = opened.live([source])
    first = dict(index.walk())
    opened.clock.advance(60)
    source.put("00", b"asked for alone")
    alone = index.resolve("/00")
    for key in ("00", "01"):
        source.put(key, b"listed")
    source.put("same", b"1")
    source.delete("02")
    source.delete("d/e/f")
    index.children(ROOT)
    listed = {path: index.resolve(path) for path in ("/00", "/01", "/03", "/same")}
    assert [entry.generation for entry in listed.values()] == [2, 1, 0, 0]
    assert alone.generation == 1
    for entry in [*first.values(), alone, *listed.values()]:
        if entry.key != "same":  # the same version, of another time
            assert index.entry(entry.ino, entry.generation) == entry
    for gone in ("/02", "/d/e/f"):
        with pytest.raises(NoSuchPath):
            index.entry(first[gone].ino)
    with pytest.raises(NoSuchPath, match="version 3"):
        index.entry(alone.ino, 3)


def test_a_path_that_comes_back_goes_on_counting(opened: Opened) -> None:
    """Back as it was, it is the version that it was; back with other bytes, it is another one."""
    source = MemorySource(objects={"a": b"1", "keep": b""})
    index = opened.live([source], ttl=0.0)
    first = index.resolve("/a")
    for data, generation in ((b"1", 0), (b"22", 1), (b"1", 2)):
        source.delete("a")
        with pytest.raises(NoSuchPath):
            index.resolve("/a")
        source.put("a", data)
        back = index.resolve("/a")
        assert (back.ino, back.generation, back.size) == (first.ino, generation, len(data))
    assert [index.entry(first.ino, n).size for n in range(3)] == [1, 2, 1]


@pytest.mark.parametrize("resumed", [True, False])
def test_former_versions_last_as_long_as_the_mount(opened: Opened, resumed: bool) -> None:
    """Who goes on with a mount finds them; a fresh mount has nobody to ask. Numbers go on either way."""
    source = MemorySource(objects={"a": b"1"})
    index = opened.live([source], ttl=0.0)
    first = index.resolve("/a")
    source.put("a", b"22")
    index.resolve("/a")
    opened.close()
    index = opened.live([source], ttl=0.0, resumed=resumed)
    if resumed:
        assert index.entry(first.ino, 0) == first
    else:
        with pytest.raises(NoSuchPath):
            index.entry(first.ino, 0)
    assert index.entry(first.ino, 1) == index.resolve("/a")
    source.put("a", b"333")
    assert index.resolve("/a").generation == 2
    assert index.entry(first.ino, 1).size == 2


def test_the_newest_former_versions_are_kept(opened: Opened) -> None:
    """However long a mount lives and however much changes, what it remembers is bounded."""
    source = MemorySource(objects={"a": b"1"})
    index = opened.live([source], ttl=0.0)
    a = index.resolve("/a").ino
    for data in (b"22", b"333"):
        source.put("a", data)
        index.resolve("/a")
    with closing(sqlite3.connect(os.path.join(opened.state, "index.db"))) as connection, connection:
        connection.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < ?) INSERT INTO former"
            " (ino, generation, size, mtime_ns, etag, version_id, stamp, archived)"
            " SELECT 1000000 + i, 0, 0, 0, '', '', '', 0 FROM n",
            (FORMER_MAX - 2,),
        )
    assert index.entry(a, 0).size == 1
    source.put("a", b"4444")
    assert index.resolve("/a").generation == 3
    assert [index.entry(a, n).size for n in (1, 2, 3)] == [2, 3, 4]
    with pytest.raises(NoSuchPath):
        index.entry(a, 0)
    with closing(sqlite3.connect(os.path.join(opened.state, "index.db"))) as connection:
        assert connection.execute("SELECT count(*) FROM former").fetchone() == (FORMER_MAX,)


@pytest.mark.parametrize("etag", ["", '"e"'])
@pytest.mark.parametrize("version_id", ["", "v"])
@pytest.mark.parametrize("stamp", ["", "1-2"])
def test_the_catalogue_tells_versions_apart_as_everybody_does(etag: str, version_id: str, stamp: str) -> None:
    """What SQL takes for the token of a version is the version's token."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE v (etag, version_id, stamp)")
        connection.execute("INSERT INTO v VALUES (?,?,?)", (etag, version_id, stamp))
        token = connection.execute(f"SELECT {VERSION_IN_SQL.format('v.')} FROM v").fetchone()[0]
    assert token == Version(etag, version_id, stamp).token


def test_two_processes_on_one_index(opened: Opened) -> None:
    """What another process lists into the same database is noticed with the next listing."""
    source = MemorySource(objects={"a": b"1"})
    one, two = opened.live([source]), opened.live([source])
    a = one.resolve("/a")
    source.put("a", b"22")
    opened.clock.advance(60)
    assert two.resolve("/a").size == 2
    assert one.resolve("/a").size == 2
    assert one.entry(a.ino).size == 2


def test_a_bucket_is_never_shown_under_another_name(opened: Opened) -> None:
    """An index of other mounts is made anew: changing the mounts never shows entries of another bucket."""
    a, b = MemorySource("memory://a", {"x": b"1"}), MemorySource("memory://b", {"y": b"1"})
    opened.live([a]).resolve("/x")
    opened.close()
    assert paths(opened.live([b])) == ["/y"]
    opened.close()
    assert paths(opened.live([b], paths=["/at"])) == ["/at/y"]


def test_the_index_of_a_mount_that_goes_on_is_not_replaced_underneath_it(opened: Opened) -> None:
    """Its numbers are in use: of another store, damaged or gone, it is refused, and stays as it is. An
    upgrade to another endpoint would otherwise destroy the index of the mount that it leaves as it was."""
    a, b = MemorySource("memory://a", {"x": b"1"}), MemorySource("memory://b", {"y": b"1"})
    identity = opened.live([a]).identity
    opened.close()
    with pytest.raises(IndexBroken, match="not what this mount was made with: it is of other mounts"):
        opened.live([b], resumed=True, identity=identity)
    with pytest.raises(IndexBroken, match="another one than this mount was made with"):
        opened.live([a], resumed=True, identity="another")
    assert opened.live([a], resumed=True, identity=identity).identity == identity
    opened.close()
    os.unlink(os.path.join(opened.state, "index.db"))
    with pytest.raises(IndexBroken, match="there is none yet"):
        opened.live([a], resumed=True, identity=identity)
    assert not os.path.exists(os.path.join(opened.state, "index.db"))


@pytest.mark.parametrize("harm", ["garbage", "format", "cut"])
def test_a_damaged_live_index_is_made_anew(opened: Opened, harm: str) -> None:
    """It holds nothing that cannot be listed again."""
    source = MemorySource(objects={"x": b"1"})
    opened.live([source]).resolve("/x")
    opened.close()
    path = os.path.join(opened.state, "index.db")
    if harm == "garbage":
        Path(path).write_bytes(b"no database " * 1000)
    elif harm == "cut":
        os.truncate(path, 100)
    else:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version=99")
        connection.close()
    assert paths(opened.live([source])) == ["/x"]


@pytest.mark.parametrize("harm", ["damaged", "removed", "other mounts"])
def test_an_inode_is_not_given_out_again_by_a_new_index(opened: Opened, harm: str) -> None:
    """ "`st_ino` names a path and is never used twice": what was lost with an index is not reused by the
    next one either, and who compares inodes is not deceived."""
    a, b = MemorySource("memory://a", {"d/x": b"1"}), MemorySource("memory://b", {"d/x": b"1"})
    seen: set[int] = set()
    for source in (a, b, a) if harm == "other mounts" else (a, a, a):
        index = opened.live([source], paths=["/at"])
        found = {index.resolve(path).ino for path in ("/at", "/at/d", "/at/d/x")}
        assert seen.isdisjoint(found)
        seen |= found
        assert index.resolve("/").ino == ROOT
        opened.close()
        if harm == "damaged":
            Path(opened.state, "index.db").write_bytes(b"no database " * 1000)
        elif harm == "removed":
            Path(opened.state, "index.db").unlink()


_DIES = """
import os, signal, sys
from datacache.clock import SystemClock
from datacache.config.settings import IndexSettings
from datacache.index.opening import open_index
from datacache.index.snapshot import create_snapshot
from datacache.model import Dataset, MountPoint
from datacache.sources.memory import MemorySource
from datacache.sources.source import Page

class Dies(MemorySource):
    def list(self, prefix, *, recursive, versions=False):
        for number, page in enumerate(super().list(prefix, recursive=recursive)):
            if prefix == "d/" or recursive:
                if number == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield page

source = Dies(objects={f"d/{i:02d}": b"x" for i in range(30)} | {"k": b"1"}, page_size=10)
dataset = Dataset("test", (MountPoint(source.uri),))
if sys.argv[2] == "snapshot":
    create_snapshot(dataset, [source], state=sys.argv[1], name="s", clock=SystemClock())
index = open_index(dataset, [source], IndexSettings(), state=sys.argv[1], clock=SystemClock())
print(index.resolve("/k").ino, index.resolve("/d").ino, flush=True)
index.resolve("/d/00")
"""


def test_kill_9_while_listing(opened: Opened) -> None:
    """A process that is killed in the middle of a listing leaves what was complete, and nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", _DIES, opened.state, "live"], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    index = opened.live([MemorySource(objects={f"d/{i:02d}": b"x" for i in range(30)} | {"k": b"1"})])
    assert index.stats().files == 1
    k, d = map(int, done.stdout.split())
    assert (index.resolve("/k").ino, index.resolve("/d").ino) == (k, d)
    assert len(index.children(d)) == 30


def test_kill_9_while_a_snapshot_is_made(opened: Opened) -> None:
    """It leaves only the temporary, which the next look removes, and no lock."""
    done = subprocess.run(
        [sys.executable, "-c", _DIES, opened.state, "snapshot"], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    directory = os.path.join(opened.state, "snapshots")
    assert sorted(os.listdir(directory)) == [".lock", "s.db.tmp"]
    assert list_snapshots(opened.state) == []
    assert os.listdir(directory) == [".lock"]
    opened.create([MemorySource(objects={"k": b"1"})], "s")


def test_a_database_that_fails_is_an_error_that_says_so(opened: Opened) -> None:
    """Trouble with the index's own disk is not blamed on the store."""
    index = opened.live([MemorySource(objects={"x": b"1"})])
    index.resolve("/x")
    connection = sqlite3.connect(os.path.join(opened.state, "index.db"))
    connection.execute("DROP TABLE paths")
    connection.close()
    with pytest.raises(IndexBroken, match=r"index\.db fails"):
        index.children(ROOT)
    index.close()
    with pytest.raises(IndexBroken, match="closed"):
        index.children(ROOT)


def test_a_store_that_lists_nonsense(opened: Opened, logs: object) -> None:
    """A key of more segments than asked for is an error; one that is no text is left out, with a warning."""

    class Nonsense(MemorySource):
        page = Page([], [])

        def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
            yield self.page

    source = Nonsense()
    index = opened.live([source], ttl=0.0)
    for page in (Page([ObjectInfo("a/b", 1, Version('"1"'))], []), Page([], ["a/b/"])):
        source.page = page
        with pytest.raises(WrongBytes, match="a/b"):
            index.children(ROOT)
    logs.expect("is no text")  # type: ignore[attr-defined]
    source.page = Page(
        [ObjectInfo("a\ud800", 1, Version('"1"')), ObjectInfo("b", 1, Version('"1"'))], ["c\ud800/"]
    )
    assert paths(index) == ["/b"]
    opened.create([source], "s")
    assert paths(opened.snapshot([source], "s")) == ["/b"]


def test_a_directory_of_200_000(opened: Opened) -> None:
    """Directories of 200,000 entries work: listed once, paged through, looked up."""

    class Many(MemorySource):
        def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
            for start in range(0, 200_000, 1000):
                yield Page(
                    [ObjectInfo(f"{i:06d}", i, Version(f'"{i}"')) for i in range(start, start + 1000)], []
                )

    index = opened.live([Many()])
    assert index.resolve("/123456").size == 123456
    seen, after = 0, 0
    while some := index.children(ROOT, after=after, limit=5000):
        seen, after = seen + len(some), some[-1].ino
    assert seen == index.stats().files == 200_000


# Snapshots


def test_a_snapshot_does_not_change_and_asks_nothing(opened: Opened) -> None:
    """What was listed first, or pinned by the snapshot, is what is read, for ever: a snapshot, without
    a request, restarts included."""
    source = MemorySource(objects={"a": b"1", "d/b": b"1"}, versioned=True)
    opened.create([source], "s")
    before = source.stat("a").version.etag
    source.put("a", b"22")
    source.delete("d/b")
    source.requests.clear()
    for _ in range(2):
        index = opened.snapshot([source], "s")
        assert paths(index) == ["/a", "/d/b"]
        entry = index.resolve("/a")
        assert (entry.size, entry.version) == (1, Version(before, version_id="v1"))
        assert index.fresh_for(ROOT) == float("inf")
        opened.close()
        opened.clock.advance(1e6)
    assert not source.requests


def test_snapshots_are_listed_and_removed(opened: Opened) -> None:
    """What there is: name, time, files, bytes and mounts, oldest first."""
    source = MemorySource(objects={"a": b"1", "d/b": b"22"})
    assert list_snapshots(opened.state) == []
    start = opened.clock.wall()
    opened.create([source], "second-is-later")
    opened.clock.advance(10)
    opened.create([source], "a.b_C-1", ["/x"])
    infos = list_snapshots(opened.state)
    assert [i.name for i in infos] == ["second-is-later", "a.b_C-1"]
    assert (infos[0].created, infos[0].files, infos[0].bytes, infos[0].directories) == (start, 2, 3, 2)
    assert infos[1].mounts == (("memory://test", "/x"),)
    open_one = opened.snapshot([source], "second-is-later")
    remove_snapshot(opened.state, "second-is-later")
    assert [i.name for i in list_snapshots(opened.state)] == ["a.b_C-1"]
    assert paths(open_one) == ["/a", "/d/b"]  # who has it open keeps it
    with pytest.raises(NoSuchSnapshot):
        remove_snapshot(opened.state, "second-is-later")
    with pytest.raises(NoSuchSnapshot):
        opened.snapshot([source], "second-is-later")


def test_a_snapshot_is_never_made_twice(opened: Opened) -> None:
    """Snapshots never change: the name is taken."""
    source = MemorySource(objects={"a": b"1"})
    opened.create([source], "s")
    with pytest.raises(SnapshotExists, match="already"):
        opened.create([source], "s")


@pytest.mark.parametrize("name", ["", "a/b", "..\n", "ä", "x" * 65, "a b"])
def test_bad_names_of_snapshots(opened: Opened, name: str) -> None:
    """A name is 1 to 64 letters, digits, dots, dashes and underscores."""
    for action in (
        lambda: opened.create([MemorySource()], name),
        lambda: remove_snapshot(opened.state, name),
    ):
        with pytest.raises(SettingError, match="64 letters"):
            action()


def test_a_snapshot_that_fails_leaves_nothing(opened: Opened) -> None:
    """A store that fails midway, and a build that was killed, leave no snapshot; the temporary goes."""
    source = FaultySource(MemorySource(objects={f"{i:02d}": b"x" for i in range(30)}, page_size=10))
    source.add("list", Fail(Unavailable("broke off"), pages=2))
    with pytest.raises(Unavailable):
        opened.create([source], "s")
    directory = os.path.join(opened.state, "snapshots")
    assert os.listdir(directory) == [".lock"]
    Path(directory, "killed.db.tmp").write_bytes(b"half")
    assert list_snapshots(opened.state) == []
    assert os.listdir(directory) == [".lock"]
    Path(directory, "s.db.tmp").write_bytes(b"half")
    opened.create([source], "s")
    assert sorted(os.listdir(directory)) == [".lock", "s.db"]


def test_one_snapshot_is_made_at_a_time(opened: Opened) -> None:
    """A build under way in another process is left alone, by create and by list."""
    source = MemorySource(objects={"a": b"1"})
    opened.create([source], "s")
    directory = os.path.join(opened.state, "snapshots")
    with locked(os.path.join(directory, ".lock"), wait=False):
        Path(directory, "other.db.tmp").write_bytes(b"half")
        with pytest.raises(DatacacheError, match="another process"):
            opened.create([source], "t")
        assert [i.name for i in list_snapshots(opened.state)] == ["s"]
        assert os.path.exists(os.path.join(directory, "other.db.tmp"))


def test_progress_is_told(opened: Opened) -> None:
    """Who waits for a million objects hears how many there are so far."""
    source, told = MemorySource(objects={f"{i:02d}": b"x" for i in range(25)}, page_size=10), list[int]()
    info = create_snapshot(
        dataset([source]), [source], state=opened.state, name="s", clock=opened.clock, progress=told.append
    )
    assert told == [10, 20, 25]
    assert info.files == 25


def test_a_snapshot_of_other_mounts_is_refused(opened: Opened) -> None:
    """A snapshot shows the stores it was made of, or nothing."""
    opened.create([MemorySource("memory://a", {"x": b"1"})], "s")
    with pytest.raises(SettingError, match="memory://a"):
        opened.snapshot([MemorySource("memory://b")], "s")


def test_a_snapshot_in_another_format_is_refused(opened: Opened) -> None:
    """Another schema, or no database: an error that says what to do, and nothing is rebuilt."""
    source = MemorySource(objects={"x": b"1"})
    opened.create([source], "s")
    path = os.path.join(opened.state, "snapshots", "s.db")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(SettingError, match="create it again"):
        opened.snapshot([source], "s")
    Path(path).write_bytes(b"no database " * 1000)
    with pytest.raises(IndexBroken, match="create it again"):
        opened.snapshot([source], "s")


def test_diff_says_what_was_added_removed_and_changed(opened: Opened) -> None:
    """File by file, at any depth; the same bytes put again are no change, and a file that became a
    directory is one removed and others added."""
    source = MemorySource(
        objects={"same/a": b"1", "d/changed": b"1", "d/gone": b"1", "whole/x/y": b"1", "turns": b"1"},
        versioned=True,
    )
    opened.create([source], "a")
    source.put("same/a", b"1")
    source.put("d/changed", b"22")
    source.put("new/deep/er", b"333")
    for key in ("d/gone", "whole/x/y", "turns"):
        source.delete(key)
    source.put("turns/in", b"1")
    opened.create([source], "b")
    changes = sorted(diff_snapshots(opened.state, "a", "b"), key=lambda c: c.path)
    assert [(c.kind, c.path, c.old_size, c.new_size) for c in changes] == [
        ("changed", "/d/changed", 1, 2),
        ("removed", "/d/gone", 1, None),
        ("added", "/new/deep/er", None, 3),
        ("removed", "/turns", 1, None),
        ("added", "/turns/in", None, 1),
        ("removed", "/whole/x/y", 1, None),
    ]
    assert changes[0].new_version == "etag:" + source.stat("d/changed").version.etag
    assert changes[0].old_version.startswith("etag:") and changes[1].new_version == ""
    back = sorted(diff_snapshots(opened.state, "b", "a"), key=lambda c: c.path)
    assert [c.kind for c in back] == ["changed", "added", "removed", "added", "removed", "added"]
    assert list(diff_snapshots(opened.state, "a", "a")) == []
    with pytest.raises(NoSuchSnapshot):
        list(diff_snapshots(opened.state, "a", "c"))
    assert isinstance(changes[0], Change)


def test_a_state_directory_that_cannot_be_written(opened: Opened) -> None:
    """A lock that cannot be taken is an error for who makes something, and no matter for who only looks."""
    source = MemorySource(objects={"a": b"1"})
    opened.create([source], "s")
    for directory in (opened.state + "/index.db.lock", opened.state + "/snapshots/.lock"):
        Path(directory).unlink(missing_ok=True)
        os.mkdir(directory)
    with pytest.raises(IndexBroken, match="check the state directory"):
        opened.live([source])
    with pytest.raises(IndexBroken, match="check the state directory"):
        opened.create([source], "t")
    assert [i.name for i in list_snapshots(opened.state)] == ["s"]
    os.mkdir(opened.state + "/snapshots/t.db")
    os.rmdir(opened.state + "/snapshots/.lock")
    with pytest.raises(SnapshotExists):
        opened.create([source], "t")


# What may be opened at all


@pytest.mark.parametrize(
    "at",
    [["/", "/a"], ["/a", "/a"], ["/a", "/a/b"], ["/b/c/d", "/a", "/b/c"], ["a"], ["/a/"], ["/a//b"],
     ["/a/../b"], ["/./a"], ["/" + "x" * 256], [""], ["//"]],
)  # fmt: skip
def test_mount_paths_that_cannot_be(opened: Opened, at: list[str]) -> None:
    """Equal and nested mount paths are refused, and so is what is no path."""
    sources = [MemorySource(f"memory://{i}") for i in range(len(at))]
    with pytest.raises(SettingError, match="path"):
        opened.live(sources, at)
    assert not os.path.exists(opened.state)


def test_siblings_may_begin_alike(opened: Opened) -> None:
    """/a and /ab are two directories, not one in the other."""
    opened.live([MemorySource("memory://a"), MemorySource("memory://b")], ["/a", "/ab"])


def test_no_mount_at_all(opened: Opened) -> None:
    """A data set without a store is refused."""
    with pytest.raises(SettingError, match="at least one"):
        opened.live([], [])


def test_a_state_directory_that_cannot_be(tmp_path: Path, clock: VirtualClock) -> None:
    """A file where the state directory should be is one clear line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="state"):
        Opened(str(tmp_path / "file"), clock).live([MemorySource()])


def test_a_full_disk_serves_what_was_known(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, logs: AnnouncedLogs
) -> None:
    """What is new cannot be remembered; what was listed before is served and counted as stale, and said."""
    logs.expect("has no room")
    source = MemorySource(objects={"x": b"1"})
    index = opened.live([source])
    before = index.resolve("/x")
    opened.close()

    def full(uri: str) -> sqlite3.Connection:
        connection = connect(uri)
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes what there is now
        return connection

    connect = database._connect
    monkeypatch.setattr(database, "_connect", full)
    index = opened.live([source])
    for i in range(2000):
        source.put(f"a-new-object-with-a-long-name-{i:05}", b"")
    opened.clock.advance(61)
    assert index.resolve("/x") == before
    assert index.stats().stale > 0
    monkeypatch.setattr(database, "_connect", connect)
    opened.close()
    assert len(paths(opened.live([source]))) == 2001, "with room it goes on"
