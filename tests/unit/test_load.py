"""Load jobs: what they select, skip, count, limit, survive and report."""

import dataclasses
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.cache.memory import MemoryTier
from datacache.cache.tier import Tier, TierStats
from datacache.cache.tiered import TieredCache
from datacache.clock import Clock, Pace, SystemClock, VirtualClock
from datacache.config.settings import Policy, ReadingSettings, SourceSettings
from datacache.errors import BreakerOpen, ControlError, Denied, SettingError, Unavailable
from datacache.model import ByteRange, CacheKey, Entry, KiB, MiB
from datacache.reading import load
from datacache.reading.job import LoadRequest, LoadStatus
from datacache.reading.load import Loads, matcher
from datacache.reading.reader import Reader
from datacache.sources.faulty import Fail, FaultySource
from datacache.sources.memory import MemorySource
from datacache.sources.source import Source
from datacache.sources.steady import SteadySource
from tests.conftest import AnnouncedLogs
from tests.support.reading import ListedIndex, until

SETTINGS = ReadingSettings(block_size=64 * KiB, concurrency=4, memory=64 * MiB, order_ahead=4)


class Cache(MemoryTier):
    """A cache of one tier, called `leaf`."""

    def __init__(self, **more: int) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self.leaf = MemoryTier(name="leaf")

    def tier(self, name: str) -> Tier:
        if name != "leaf":
            raise SettingError("--tier", name, "leaf")
        return self.leaf


@dataclasses.dataclass
class Site:
    source: MemorySource
    index: ListedIndex
    cache: Cache | TieredCache
    reader: Reader
    loads: Loads
    clock: Clock

    def run(self, **request: object) -> LoadStatus:
        """Run a job to its end."""
        status = self.loads.wait(self.loads.start(LoadRequest(**request)), None)  # type: ignore[arg-type]
        assert status.state != "running"
        return status

    @property
    def whole(self) -> set[str]:
        """Paths of what is whole in the cache."""
        return {
            path
            for path, entry in self.index.files.items()
            if self.cache.present(self.reader.cache_key(entry)) == entry.size
        }


@contextmanager
def site(
    objects: dict[str, bytes],
    cache: Cache | TieredCache | None = None,
    *,
    clock: Clock | None = None,
    around: Callable[[Source, Clock], Source] = lambda source, clock: source,
) -> Iterator[Site]:
    """`around` makes the source that is read from out of the one that has the objects."""
    source, clock = MemorySource(objects=objects), clock or VirtualClock()
    index, cache = ListedIndex(source), cache or Cache()
    reader = Reader([around(source, clock)], cache, SETTINGS, clock=clock)
    loads = Loads(index, reader, cache, SETTINGS, clock=clock)
    try:
        yield Site(source, index, cache, reader, loads, clock)
    finally:
        loads.close()
        reader.close()


def tree() -> dict[str, bytes]:
    names = ["a.jpg", "b.txt", "img/1.jpg", "img/2.png", "img/deep/3.jpg", "img/deep/er/4.jpg", "empty"]
    return {name: random.Random(name).randbytes(100 * n) for n, name in enumerate(reversed(names))}


def test_everything_is_loaded_and_counted() -> None:
    """Without a selection all files are made whole, with one request each, and the figures say so."""
    objects = tree()
    total = sum(map(len, objects.values()))
    with site(objects) as at:
        status = at.run()
        assert at.whole == set(objects)
    assert status == LoadStatus(
        id="load-1", state="done", files=7, bytes=total, listed=True, files_done=7, bytes_done=total,
        files_skipped=1, bytes_fetched=total, seconds=status.seconds,
    )  # fmt: skip
    assert at.source.requests["read"] == 6, "an empty file needs none"


def test_what_is_present_is_skipped() -> None:
    """A second job fetches nothing; after an eviction it fetches what is missing: that is resuming."""
    objects = tree()
    with site(objects) as at:
        at.run()
        second = at.run()
        assert (second.files_skipped, second.bytes_fetched, second.files_done) == (7, 0, 7)
        at.cache.evict(at.reader.cache_key(at.index.resolve("img/1.jpg")))
        third = at.run()
        assert (third.files_skipped, third.bytes_fetched) == (6, len(objects["img/1.jpg"]))
        assert third.bytes_done == third.bytes


@pytest.mark.parametrize(
    ("request_", "selected"),
    [
        ({"path": "/img"}, {"img/1.jpg", "img/2.png", "img/deep/3.jpg", "img/deep/er/4.jpg"}),
        ({"path": "/img/1.jpg"}, {"img/1.jpg"}),
        ({"path": "/img/1.jpg", "globs": ("*.jpg",)}, {"img/1.jpg"}),
        ({"globs": ("*.jpg",)}, {"a.jpg"}),
        ({"globs": ("**/*.jpg",)}, {"a.jpg", "img/1.jpg", "img/deep/3.jpg", "img/deep/er/4.jpg"}),
        ({"path": "/img", "globs": ("deep/**",)}, {"img/deep/3.jpg", "img/deep/er/4.jpg"}),
        ({"globs": ("b.*", "img/[0-1].*")}, {"b.txt", "img/1.jpg"}),
        ({"files": ("/b.txt", "img/2.png")}, {"b.txt", "img/2.png"}),
        ({"files": ()}, set()),
    ],
)
def test_files_are_selected_by_path_pattern_or_name(request_: dict[str, object], selected: set[str]) -> None:
    """A job loads what its request selects and nothing else."""
    with site({**tree(), "empty": b"not"}) as at:
        status = at.run(**request_)
        assert at.whole == selected
        assert (status.state, status.files, status.files_done) == ("done", len(selected), len(selected))


@pytest.mark.parametrize(
    ("glob", "matching", "others"),
    [
        ("*", ["a", "a.b"], ["a/b"]),
        ("a?c", ["abc"], ["a/c", "ac"]),
        ("**", ["a", "a/b/c"], []),
        ("**/x", ["x", "a/x", "a/b/x"], ["ax", "a/bx"]),
        ("a/**/x", ["a/x", "a/b/c/x"], ["b/x", "ax"]),
        ("a**x", ["ax", "a/b/x"], ["b/x"]),
        ("[!a]*", ["bc"], ["ab", "/b"]),
        ("[a-c]1", ["b1"], ["d1", "-1"]),
        ("[]x]1", ["]1", "x1"], ["[1"]),
        ("[x", ["[x"], ["x"]),
        ("[\\d[&&--~]1", ["\\1", "[1", "&1", "-1", "~1", "d1"], ["11"]),
        ("/top", ["top"], ["a/top"]),
        ("a+(b).$", ["a+(b).$"], ["aab"]),
    ],
)
def test_patterns_are_those_of_the_shell(glob: str, matching: list[str], others: list[str]) -> None:
    """`*` stays within a name, `**` crosses directories, classes are classes, the rest is itself."""
    match = matcher([glob])
    assert [path for path in matching if not match(path)] == []
    assert [path for path in others if match(path)] == []


def test_failures_are_reported_one_line_each_and_the_rest_is_loaded() -> None:
    """A file that cannot be fetched, found or is a directory is a line; the job goes on and says failed."""
    objects = tree()
    with site(objects) as at:

        def deny(key: str, span: ByteRange) -> None:
            if key == "b.txt":
                raise Denied("the store refuses\n  b.txt")

        at.source.on_read = deny
        status = at.run(files=("b.txt", "nowhere", "img", "a.jpg"))
        assert at.whole == {"a.jpg", "empty"}
    assert (status.state, status.files, status.files_done, status.files_failed) == ("failed", 4, 1, 3)
    assert dict(status.failures) == {
        "/b.txt": "the store refuses b.txt",
        "nowhere": "no such path: nowhere",
        "img": "img is a directory; only files can be named one by one",
    }


def test_a_directory_that_cannot_be_listed_fails_the_job() -> None:
    """When the listing fails, the job is failed, with the reason."""
    with site(tree()) as at:
        status = at.run(path="/nowhere")
    assert (status.state, status.failures) == ("failed", (("/nowhere", "no such path: /nowhere"),))


def test_archived_objects_are_failures_without_requests() -> None:
    """An object that must be restored first is a line in the summary."""
    source_objects = tree()
    with site(source_objects) as at:
        at.source.put("frozen", b"x" * 10, archived=True)
        at.index = ListedIndex(at.source)
        loads = Loads(at.index, at.reader, at.cache, SETTINGS, clock=at.clock)
        status = loads.wait(loads.start(LoadRequest()))
        loads.close()
    assert status.files_failed == 1
    assert "restore" in status.failures[0][1]


def test_only_so_many_failures_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """All failures are counted, the first of them kept with their reasons."""
    monkeypatch.setattr(load, "FAILURES", 3)
    with site(tree()) as at:
        status = at.run(files=tuple(f"no/{n}" for n in range(10)))
    assert (status.files_failed, len(status.failures)) == (10, 3)


def test_a_tier_can_be_named() -> None:
    """`tier` is filled, the others are not; what it has is skipped."""
    with site({"a": b"12345"}) as at:
        status = at.run(tier="leaf")
        assert status.bytes_fetched == 5
        assert at.cache.leaf.present(at.reader.cache_key(at.index.resolve("a"))) == 5
        assert at.whole == set()
        assert at.run(tier="leaf").files_skipped == 1
        with pytest.raises(SettingError, match="--tier"):
            at.loads.start(LoadRequest(tier="tape"))


def test_damage_is_found_and_repaired_on_request() -> None:
    """With `verify` what is present is held against its checksums and fetched again where it is bad."""
    with site({"a": b"x" * 1000, "b": b"y" * 1000}) as at:
        at.run()
        at.cache.spoil(at.reader.cache_key(at.index.resolve("a")), ByteRange(0, 10))
        assert at.run().verified_bad == 0
        status = at.run(verify=True)
        assert (status.verified_bad, status.state, status.files_skipped) == (1, "done", 1)
        assert status.bytes_fetched > 0
        assert at.whole == {"a", "b"}
        assert at.run(verify=True).verified_bad == 0


def test_a_full_cache_is_not_hammered() -> None:
    """Once no tier has room, files that are missing fail without a request each."""
    objects = {f"{n:03}": bytes(100) for n in range(100)}
    with site(objects, Cache(quota=1000)) as at:
        status = at.run(concurrency=1)
        assert at.source.requests["read"] == 11
    assert (status.state, status.files_done, status.files_failed) == ("failed", 10, 90)
    assert "no tier has room" in status.failures[-1][1]


def test_room_that_comes_back_is_used() -> None:
    """A tier that was full and says that it has room again takes what comes next."""

    class Emptied(Cache):
        asked = 0

        def stats(self) -> tuple[TierStats, ...]:
            self.asked += 1
            if self.asked == 3:  # the first time was when the job began
                self.quota, self._full = 10_000, ""
            return super().stats()

    with site({f"{n:03}": bytes(100) for n in range(6)}, Emptied(quota=100)) as at:
        status = at.run(concurrency=1)
        assert at.source.requests["read"] == 5, "one found no room, one was not tried"
    assert (status.files_done, status.files_failed) == (4, 2)


def test_a_file_that_is_larger_than_the_cache_costs_no_other_its_place(tmp_path: Path) -> None:
    """It is not asked for, and nothing is evicted for it."""
    clock = VirtualClock()
    rules = Rules("ssd:x", 40_960, 4096, reserve=0.0, dataset="mine", policy=Policy.LRU)
    owner = Owner(os.getpid(), "", "")
    cache = TieredCache([DirectoryTier(str(tmp_path), rules, owner=owner, clock=clock, keeper=False)])
    with site({**{f"{n:02}": bytes(4096) for n in range(8)}, "04-large": bytes(40_961)}, cache) as at:
        status = at.run(concurrency=1)
        assert (status.files_done, status.files_failed, len(at.whole)) == (8, 1, 8)
        assert status.bytes_fetched == 8 * 4096
    assert status.failures == (
        ("/04-large", "the cache may hold 40.0 KiB, and this file alone has 40.0 KiB"),
    )
    cache.close()


def test_what_was_evicted_again_is_not_called_cached(tmp_path: Path) -> None:
    """A tier that evicts by last open takes the last files in place of the first: the job says so."""
    clock = VirtualClock()
    rules = Rules("ssd:x", 40_960, 4096, reserve=0.0, dataset="mine", policy=Policy.LRU)
    owner = Owner(os.getpid(), "", "")
    cache = TieredCache([DirectoryTier(str(tmp_path), rules, owner=owner, clock=clock, keeper=False)])
    with site({f"{n:02}": bytes(4096) for n in range(14)}, cache) as at:
        status = at.run()
        assert len(at.whole) == 10
        assert (status.state, status.files_done, status.files_failed) == ("failed", 10, 4)
        assert (status.bytes_done, status.bytes_fetched) == (10 * 4096, 14 * 4096)
        assert {path.strip("/") for path, _ in status.failures} == set(at.index.files) - at.whole
        assert "no room for all of it" in status.failures[0][1]
        at.cache.evict(at.reader.cache_key(at.index.resolve(min(at.whole))))
        again = at.run(files=tuple(at.whole))
        assert again.state == "done", "what others evicted before it began is no business of a job"
    cache.close()


def test_an_object_that_changes_while_it_is_loaded_is_loaded_as_it_is_now() -> None:
    """The listing of a long job is old: one more look tells what there is now. Where it tells nothing
    new, the file has failed."""
    with site({"a": b"old" * 3_000_000, "b": b"b", "c": b"c"}) as at:
        current = at.index.current

        def renew(ino: int) -> Entry:
            if at.index.path(ino) == "/a":
                at.index.put(at.source.stat("a"))
            return current(ino)

        def change(key: str, span: ByteRange) -> None:
            if key == "c" or (key == "a" and span.start):
                at.source.on_read = None
                at.source.put(key, b"newer" * 10)

        at.index.current = renew  # type: ignore[method-assign]
        at.source.on_read = change
        status = at.run(files=("a", "b"))
        assert at.whole == {"a", "b"}
        assert (status.state, status.bytes, status.bytes_done, status.files) == ("done", 51, 51, 2)
        at.source.on_read = change
        status = at.run(files=("c",))
        assert (status.state, status.files_failed, status.bytes_done) == ("failed", 1, 0)


def test_the_bandwidth_holds() -> None:
    """At 1,000 bytes a second, 10,000 bytes take nine seconds beyond the first second's worth."""
    with site({f"{n}": bytes(500) for n in range(20)}) as at:
        begun = at.clock.monotonic()
        status = at.run(bandwidth=1000, concurrency=1)
        assert at.clock.monotonic() - begun == pytest.approx(9.0, abs=0.01)
        assert status.seconds == pytest.approx(9.0, abs=0.01)


def test_a_pace_lends_what_is_larger_than_its_bucket() -> None:
    """A request larger than a second's worth waits its time, and those after it wait on."""
    clock, stop = VirtualClock(), threading.Event()
    pace, begun = Pace(100, clock), clock.monotonic()
    assert pace.take(100, stop)
    assert clock.monotonic() == begun
    assert pace.take(500, stop)
    assert clock.monotonic() - begun == pytest.approx(5)
    clock.advance(60)
    assert pace.take(100, stop)
    assert pace.take(100, stop)
    assert clock.monotonic() - begun == pytest.approx(66), "a long pause saves one second's worth, not more"
    stop.set()
    assert not pace.take(1, stop)
    assert not pace.take(1000, stop)


@pytest.mark.parametrize("files", [None, tuple(f"{n:03}" for n in range(50))])
def test_a_job_can_be_cancelled(files: tuple[str, ...] | None) -> None:
    """A cancelled job ends with the requests under way, keeps what it has and says cancelled."""
    with site({f"{n:03}": bytes(10) for n in range(50)}) as at:
        with at.source.hold() as held:
            job = at.loads.start(LoadRequest(files=files))
            assert held.wait_for(3)
            assert at.loads.wait(job, 0.0).state == "running"
            at.loads.cancel(job)
            held.release()
        status = at.loads.wait(job)
        assert status.state == "cancelled"
        assert 0 < status.files_done == len(at.whole) <= 4
        assert at.run().state == "done", "a new job does the rest"
        assert at.source.requests["read"] == 50


def test_a_job_that_waits_for_its_bandwidth_can_be_cancelled() -> None:
    """Cancelling does not wait for the pace."""
    with site({"a": bytes(10)}) as at:

        class Stuck(VirtualClock):
            waiting = threading.Event()

            def wait(self, event: threading.Event, seconds: float) -> bool:
                self.waiting.set()
                return event.wait(10)

        clock = Stuck()
        loads = Loads(at.index, at.reader, at.cache, SETTINGS, clock=clock)
        job = loads.start(LoadRequest(bandwidth=1))
        assert clock.waiting.wait(10)
        loads.cancel(job)
        loads.close()
        assert loads.status(job).state == "cancelled"
    assert at.source.requests["read"] == 0


def test_closing_cancels_and_waits() -> None:
    """When the worker stops, its jobs end, their threads are joined, and no new one starts."""
    with site({f"{n:03}": bytes(10) for n in range(50)}) as at:
        with at.source.hold() as held:
            job = at.loads.start(LoadRequest())
            assert held.wait_for(1)
            closing = threading.Thread(target=at.loads.close)
            closing.start()
            until(lambda: at.loads._closed)
            held.release()
            closing.join(10)
        assert at.loads.status(job).state == "cancelled"
        with pytest.raises(ControlError):
            at.loads.start(LoadRequest())


def test_the_lister_runs_ahead_with_numbers() -> None:
    """Totals are known long before the end; files far ahead are held as numbers and looked up when due."""
    with site({f"{n:05}": bytes(2) for n in range(load._NEAR + 500)}) as at:
        looked_up: list[int] = []
        at.index.before_entry = looked_up.append
        with at.source.hold() as held:
            job = at.loads.start(LoadRequest())
            assert held.wait_for(3)
            until(lambda: at.loads.status(job).listed)
            status = at.loads.status(job)
            assert (status.files, status.files_done) == (load._NEAR + 500, 0)
            at.index.forget(f"{load._NEAR + 499:05}")
            held.release()
        status = at.loads.wait(job)
    assert 480 <= len(looked_up) <= 500
    assert (status.files_done, status.files_failed) == (load._NEAR + 499, 1)


def test_the_lister_waits_when_it_is_too_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the lister is ahead by is bounded."""
    monkeypatch.setattr(load, "_FAR", 10)
    with site({f"{n:05}": bytes(2) for n in range(100)}) as at:
        with at.source.hold() as held:
            job = at.loads.start(LoadRequest(concurrency=2))
            assert held.wait_for(2)
            until(lambda: at.loads.status(job).files == 13)
            assert not at.loads.status(job).listed
            held.release()
        assert at.loads.wait(job).files_done == 100


class Thronged(Cache):
    """Whoever asks what is present stays until `go_on`; `most` were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self._lock = threading.Lock()
        self.inside = self.most = 0

    def present(self, key: CacheKey) -> int:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        assert self.go_on.wait(10)
        with self._lock:
            self.inside -= 1
        return super().present(key)


@pytest.mark.parametrize(("size", "at_once"), [(10, load.AT_WORK), (MiB + 1, 6)])
def test_small_files_take_turns_where_nothing_is_waited_for(size: int, at_once: int) -> None:
    """Small files are begun a few at a time while nobody waits for the store; large ones all at once."""
    cache = Thronged()
    with site({f"{n:02}": bytes(size) for n in range(20)}, cache) as at:
        job = at.loads.start(LoadRequest(concurrency=6))
        until(lambda: cache.inside == at_once)
        until(lambda: at.loads.status(job).listed)
        assert at.source.requests["read"] == 0
        cache.go_on.set()
        assert at.loads.wait(job).state == "done"
        assert cache.most == at_once
        assert at.source.requests["read"] == 20


def test_all_files_wait_for_a_slow_store_at_once() -> None:
    """Who waits for the store lets another file begin: as many requests are under way as may be."""
    files = {f"{n:02}": bytes(10) for n in range(40)}
    with site(files) as at:
        reader = Reader([at.source], at.cache, dataclasses.replace(SETTINGS, concurrency=32), clock=at.clock)
        loads = Loads(at.index, reader, at.cache, SETTINGS, clock=at.clock)
        with at.source.hold() as held:
            job = loads.start(LoadRequest(concurrency=24))
            assert held.wait_for(24)
            held.release()
        assert loads.wait(job).state == "done"
        loads.close()
        reader.close()
        assert at.whole == set(files)


def test_files_of_one_directory_are_looked_up_by_its_number() -> None:
    """Files by name: the way to a directory is walked once; what is wrong is said as the index says it."""
    with site(tree()) as at:
        looked_up: list[bytes] = []
        lookup = at.index.lookup

        def counted(parent: int, name: bytes) -> Entry:
            looked_up.append(name)
            return lookup(parent, name)

        at.index.lookup = counted  # type: ignore[method-assign]
        files = ("img/1.jpg", "img/2.png", "img/gone", "img/deep/3.jpg", "img/deep", "img/../a.jpg", "a.jpg")
        status = at.run(files=files)
        assert looked_up == [b"2.png", b"gone", b"deep"], "the first of each directory is resolved"
        assert [path for path, _ in status.failures] == ["img/gone", "img/deep", "img/../a.jpg"]
        assert at.whole == {"img/1.jpg", "img/2.png", "img/deep/3.jpg", "a.jpg", "empty"}


def test_an_announced_order_is_not_loaded_but_followed() -> None:
    """With `order` the files are announced: the first are fetched, the rest as they are opened."""
    objects = {f"{n:03}": bytes(10) for n in range(20)}
    order = [f"{n:03}" for n in range(20)]
    random.Random(3).shuffle(order)
    with site(objects) as at:
        status = at.run(files=(*order, "gone"), order=True)
        assert (status.state, status.files, status.files_done, status.files_failed) == ("failed", 21, 20, 1)
        until(lambda: at.whole == set(order[:4]))
        at.reader.open(at.index.resolve(order[0])).close()
        at.reader.open(at.index.resolve(order[1])).close()
        until(lambda: at.whole == set(order[:6]))


def test_an_order_that_cannot_be_listed_is_a_failure() -> None:
    """Announcing the order of a directory that is not there fails with the reason."""
    with site(tree()) as at:
        assert at.run(path="/nowhere", order=True).state == "failed"


def test_large_objects_are_counted_as_they_come() -> None:
    """Bytes are counted span by span, so that a progress bar moves within one large object."""
    with site({"big": bytes(20 * MiB)}) as at:
        passed = threading.Semaphore(0)
        go_on = threading.Event()

        def last_one_waits(key: str, span: ByteRange) -> None:
            passed.release()
            if span.start >= 16 * MiB:
                assert go_on.wait(10)

        at.source.on_read = last_one_waits
        job = at.loads.start(LoadRequest())
        until(lambda: at.loads.status(job).bytes_done == 16 * MiB)
        status = at.loads.status(job)
        assert (status.state, status.files_done, status.bytes_fetched) == ("running", 0, 16 * MiB)
        go_on.set()
        assert at.loads.wait(job).bytes_done == 20 * MiB


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        ({"concurrency": -1}, "--concurrency"),
        ({"bandwidth": -1}, "--bandwidth"),
        ({"globs": ("[z-a]",)}, "--path"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_name(request_: dict[str, object], name: str) -> None:
    """A wrong request is refused at once and nothing starts."""
    with site({}) as at, pytest.raises(SettingError, match=name):
        at.loads.start(LoadRequest(**request_))  # type: ignore[arg-type]


def test_the_last_jobs_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that ended can be asked about until many others have been started; unknown ones are refused."""
    monkeypatch.setattr(load, "REMEMBERED", 3)
    with site({"a": b"1"}) as at:
        for _ in range(5):
            at.run()
        assert at.loads.status("load-5").state == "done"
        with pytest.raises(ControlError, match="load-1"):
            at.loads.status("load-1")
        assert repr(at.loads) == "<Loads 3 jobs>"


def test_only_so_many_jobs_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job too many is refused, not queued."""
    monkeypatch.setattr(load, "RUNNING", 2)
    with site({"a": b"1"}) as at:
        with at.source.hold() as held:
            jobs = [at.loads.start(LoadRequest()) for _ in range(2)]
            assert held.wait_for(1)
            with pytest.raises(ControlError, match="2 load jobs"):
                at.loads.start(LoadRequest())
            held.release()
        ended = [at.loads.wait(job) for job in jobs]
        assert [job.state for job in ended] == ["done", "done"]
        assert at.source.requests["read"] == 1, "two jobs, one fetch"
        assert [job.bytes_done for job in ended] == [1, 1]
        assert sum(job.bytes_fetched for job in ended) == 1, "counted once"


def test_a_reader_that_closes_is_not_a_failure_of_each_file() -> None:
    """When the worker stops underneath, files under way are not reported as failed."""
    with site({f"{n}": bytes(10) for n in range(20)}) as at:

        def away(key: str, span: ByteRange) -> None:
            at.loads.cancel("load-1")
            raise Unavailable("closing")

        at.source.on_read = away
        status = at.run(concurrency=1)
    assert (status.state, status.files_failed) == ("cancelled", 0)


def test_a_thread_that_dies_ends_the_job(logs: AnnouncedLogs) -> None:
    """A bug in one thread ends the job with its reason; nobody waits for ever."""
    logs.expect("nobody foresaw")
    with site({f"{n:05}": bytes(2) for n in range(load._NEAR + 500)}) as at:

        def bug(ino: int) -> None:
            raise RuntimeError("a bug")

        at.index.before_entry = bug
        with at.source.hold() as held:
            job = at.loads.start(LoadRequest(concurrency=2))
            until(lambda: at.loads.status(job).listed)
            held.release()
        status = at.loads.wait(job)
    assert status.state == "cancelled"
    assert ("", "a bug") in status.failures
    assert "load-1" in repr(at.loads._job("load-1"))
    assert "100 bytes/s" in repr(Pace(100, at.clock))


class Away:
    """A store that fails each read for `seconds`, from the `after`th on, behind what tries again."""

    def __init__(self, seconds: float, *, after: int = 3) -> None:
        self.seconds, self.after = seconds, after

    def __call__(self, source: Source, clock: Clock) -> Source:
        def script() -> Iterator[Fail | None]:
            yield from itertools.repeat(None, self.after)
            back = clock.monotonic() + self.seconds
            while clock.monotonic() < back:
                yield Fail(Unavailable("no connection"))

        self.faulty = FaultySource(source, {"read": script()})
        return SteadySource(self.faulty, SourceSettings(timeout=30.0, breaker_probe=5.0), clock)


def test_a_load_waits_out_an_outage(logs: AnnouncedLogs) -> None:
    """When the store comes back before `outage_timeout` is over, no file has failed for it."""
    logs.expect("does not answer")
    away = Away(600.0)
    with site({f"{n:03}": bytes(100_000) for n in range(40)}, around=away) as at:
        begun = at.clock.monotonic()
        status = at.run()
        assert at.clock.monotonic() - begun >= 600
        assert at.whole == set(at.index.files)
    assert (status.state, status.files_done, status.files_failed) == ("done", 40, 0)
    assert (status.bytes_done, status.bytes_fetched, status.waiting) == (4_000_000, 4_000_000, "")


def test_the_parts_of_a_file_that_came_before_an_outage_are_counted_once(logs: AnnouncedLogs) -> None:
    """A large object that an outage cuts in two is done when its bytes are there, and not more than that."""
    logs.expect("does not answer")
    with site({"big": bytes(40 * MiB)}, around=Away(60.0, after=2)) as at:
        status = at.run()
    assert (status.state, status.bytes_done, status.bytes_fetched) == ("done", 40 * MiB, 40 * MiB)


@pytest.mark.parametrize("patience", [0, 100])
def test_an_outage_that_outlasts_its_timeout_fails_what_is_left(patience: int, logs: AnnouncedLogs) -> None:
    """The wait is bounded; after it the files that are left fail at once, with the reason."""
    logs.expect("does not answer")
    with site({f"{n:03}": bytes(100) for n in range(40)}, around=Away(1e9)) as at:
        begun = at.clock.monotonic()
        status = at.run(outage_timeout=patience)
        assert at.clock.monotonic() - begun < 4 * (30 + patience) + 200
    assert (status.state, status.files_done, status.files_failed) == ("failed", 3, 37)
    assert "no connection" in status.failures[-1][1]
    assert status.waiting == ""


def test_a_load_that_waits_says_so_and_can_be_cancelled() -> None:
    """While the store is away the status says what it fails with, and a cancel ends the job at once."""

    def away(key: str, span: ByteRange) -> None:
        raise BreakerOpen("memory: has not answered\n for 60 s", retry_after=3600.0)

    with site({"a": b"1", "b": b"2"}, clock=SystemClock()) as at:
        at.source.on_read = away
        job = at.loads.start(LoadRequest())
        until(lambda: at.loads.status(job).waiting)
        status = at.loads.status(job)
        assert (status.state, status.waiting) == ("running", "memory: has not answered for 60 s")
        at.loads.cancel(job)
        status = at.loads.wait(job, 10.0)
    assert (status.state, status.waiting, status.files_failed) == ("cancelled", "", 0)


def test_an_object_that_alone_cannot_be_had_is_tried_twice() -> None:
    """Where the store is there for the others, one file's trouble is no outage."""
    with site({"a": b"1", "b": b"2"}) as at:

        def busy(key: str, span: ByteRange) -> None:
            if key == "a":
                raise Unavailable("slow down")

        at.source.on_read = busy
        status = at.run()
        assert at.source.requests["read"] == 3
    assert (status.files_done, status.failures) == (1, (("/a", "slow down"),))


@pytest.mark.parametrize(("listed", "state"), [(1, "done"), (0, "failed")])
def test_a_listing_waits_for_the_store_once_it_has_answered(listed: int, state: str) -> None:
    """An outage in the middle of a listing is waited for; at its very beginning the store may be the wrong
    one."""
    with site(tree()) as at:
        children, calls = at.index.children, itertools.count()

        def now_and_then(parent: int, *, after: int = 0, limit: int = 1000) -> Sequence[Entry]:
            if listed <= next(calls) < listed + 3:
                raise BreakerOpen("away", retry_after=5.0)
            return children(parent, after=after, limit=limit)

        at.index.children = now_and_then  # type: ignore[method-assign,assignment]
        status = at.run()
    assert status.state == state
