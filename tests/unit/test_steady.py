"""What is tried again, for how long, and when nobody is let through any more."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.clock import VirtualClock
from datacache.config.settings import SourceSettings
from datacache.errors import (
    Archived,
    BreakerOpen,
    CredentialsExpired,
    Denied,
    NotFound,
    SourceError,
    Unavailable,
    Unsupported,
    VersionChanged,
    WrongBytes,
)
from datacache.model import ByteRange
from datacache.sources.faulty import Before, Fail, FaultySource, Script
from datacache.sources.memory import MemorySource
from datacache.sources.source import Page
from datacache.sources.steady import SteadySource, pause
from tests.conftest import AnnouncedLogs

DOWN = Fail(Unavailable("the store is down"))


def made(clock: VirtualClock, script: Script | None = None) -> SteadySource:
    """A steady source over objects k0 to k9, three to a page, with a script and no jitter."""
    inner = MemorySource(objects={f"k{i}": b"%d" % i for i in range(10)}, page_size=3)
    return SteadySource(FaultySource(inner, script), SourceSettings(), clock, jitter=lambda: 1.0)


def down_until(clock: VirtualClock, moment: float) -> Iterator[Fail | None]:
    """Failures for as long as the clock shows less than `moment` more than now."""
    end = clock.monotonic() + moment
    return (DOWN if clock.monotonic() < end else None for _ in count())


@pytest.fixture
def any_warning(logs: AnnouncedLogs) -> None:
    """The breaker's opening is announced."""
    logs.expect("does not answer")


class Waits(VirtualClock):
    """A clock that remembers how long was waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        return super().wait(event, seconds)


@pytest.mark.parametrize("operation", ["stat", "read", "list"])
def test_what_passes_by_itself_is_waited_for(operation: str, clock: VirtualClock) -> None:
    """A store that is away for a moment is nobody's error."""
    source = made(clock, {operation: [DOWN, DOWN, DOWN]})
    info = source.stat("k3")
    assert bytes(source.read(info, ByteRange(0, 1))) == b"3"
    assert [o.key for page in source.list("", recursive=True) for o in page.objects][:2] == ["k0", "k1"]
    stats = source.stats()
    assert (stats.retries, dict(stats.failures), stats.breaker) == (3, {"Unavailable": 3}, "closed")
    assert stats.requests == 6


def test_the_waits_grow_and_end_with_the_bound(logs: AnnouncedLogs) -> None:
    """Waits double from `backoff` to `backoff_max`; the last try is made when the bound is reached."""
    logs.expect("does not answer")
    clock = Waits()
    source = made(clock, {"stat": repeat(DOWN)})
    with pytest.raises(Unavailable, match=r"the store is down \(given up after 12 tries in 30 s\)") as caught:
        source.stat("k1")
    assert not isinstance(caught.value, BreakerOpen)
    assert caught.value.__cause__ is DOWN.error
    assert clock.waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5, 3.7], abs=1e-6)


def test_the_store_says_when(logs: AnnouncedLogs) -> None:
    """Retry-After is kept to, and when it asks for more than the bound, the last try is at the bound."""
    logs.expect("does not answer")
    clock = Waits()
    wish = Fail(Unavailable("slow down", retry_after=2.5))
    source = made(clock, {"stat": [wish, wish]})
    source.stat("k1")
    assert clock.waits == [2.5, 2.5]
    clock.waits.clear()
    patience = Fail(Unavailable("come back tomorrow", retry_after=86_400.0))
    source = made(clock, {"stat": repeat(patience)})
    with pytest.raises(Unavailable, match="2 tries in 30 s") as caught:
        source.stat("k1")
    assert clock.waits == [30.0]
    assert caught.value.retry_after == 86_400.0


@given(st.integers(1, 100), st.floats(0, 0.9999), st.none() | st.floats(0, 100))
def test_a_wait_is_within_its_limits(tries: int, jitter: float, retry_after: float | None) -> None:
    """Full jitter: between almost nothing and the ceiling, never less than the store asked for."""
    settings = SourceSettings()
    wait = pause(tries, settings, jitter, retry_after)
    ceiling = min(settings.backoff_max, settings.backoff * 2 ** (tries - 1))
    assert 0 < wait <= max(ceiling, retry_after or 0)
    assert wait >= (retry_after or 0)


@pytest.mark.usefixtures("any_warning")
@given(
    jitters=st.lists(st.floats(0, 0.9999), min_size=1),
    wishes=st.lists(st.none() | st.floats(0, 200), min_size=1),
    each=st.floats(0, 10),
    timeout=st.floats(0, 60),
)
def test_no_operation_outlasts_its_bound(
    jitters: list[float], wishes: list[float | None], each: float, timeout: float
) -> None:
    """However a store fails, an operation ends at its bound, but for the try that is under way then."""
    clock, turn = VirtualClock(), count()

    def fail() -> None:
        clock.advance(each)
        raise Unavailable("no", retry_after=wishes[next(turn) % len(wishes)])

    source = SteadySource(
        FaultySource(MemorySource(), {"stat": repeat(Before(fail))}), SourceSettings(timeout=timeout), clock,
        jitter=lambda: jitters[next(turn) % len(jitters)],
    )  # fmt: skip
    began = clock.monotonic()
    with pytest.raises(Unavailable):
        source.stat("k")
    assert timeout - 1e-6 <= clock.monotonic() - began <= timeout + each + 1e-6
    assert source.stats().requests <= 8 + timeout / (0.05 * SourceSettings().backoff) + 1
    assert source.stats().breaker == "open"


@pytest.mark.parametrize("kind", [NotFound, Denied, Archived, VersionChanged, Unsupported, SourceError])
def test_what_will_be_the_same_is_not_asked_twice(kind: type[SourceError], clock: VirtualClock) -> None:
    """Answers are answers, also those that nobody likes."""
    source = made(clock, {"stat": [Fail(kind("so it is"))]})
    with pytest.raises(kind, match="so it is"):
        source.stat("k1")
    assert source.stats().requests == 1


@pytest.mark.parametrize("kind", [CredentialsExpired, WrongBytes])
def test_some_errors_deserve_one_more_try(kind: type[SourceError], clock: VirtualClock) -> None:
    """Credentials have been renewed meanwhile, or the wrong bytes were an accident: once."""
    fault = Fail(kind("once"))
    info = MemorySource(objects={"k1": b"1"}).stat("k1")
    assert bytes(made(clock, {"read": [fault, DOWN]}).read(info, ByteRange(0, 1))) == b"1"
    source = made(clock, {"read": [fault, fault]})
    with pytest.raises(kind):
        source.read(info, ByteRange(0, 1))
    assert source.stats().requests == 2


def test_the_breaker_answers_at_once_until_a_probe_succeeds(clock: VirtualClock, logs: AnnouncedLogs) -> None:
    """After one bounded failure a breaker answers at once until a probe succeeds."""
    logs.expect("memory://test does not answer; it is tried again every 5 s (the store is down)")
    source = made(clock, {"stat": down_until(clock, 47), "list": repeat(DOWN), "read": repeat(DOWN)})
    with pytest.raises(Unavailable):
        source.stat("k1")
    began, requests = clock.monotonic(), source.stats().requests
    for ask in (lambda: source.stat("k1"), lambda: next(source.list("", recursive=False))):
        with pytest.raises(
            BreakerOpen, match="not answered for 30 s and is not asked again for 5 s; last: the"
        ):
            ask()
    assert clock.monotonic() == began
    assert source.stats().requests == requests
    assert (source.stats().breaker, source.stats().opened, source.stats().refused) == ("open", 1, 2)
    assert "breaker open" in repr(source)
    for _ in range(17):
        clock.advance(1)
        with pytest.raises(BreakerOpen):
            source.stat("k1")
    assert source.stats().requests == requests + 3  # after 5, 10 and 15 seconds
    clock.advance(5)
    assert source.stat("k1").size == 1
    assert source.stats().breaker == "closed"


def test_a_probe_is_one_try(clock: VirtualClock, any_warning: None) -> None:
    """A probe that fails is answered at once, and the next one is due `breaker_probe` later."""
    source = made(clock, {"stat": repeat(DOWN)})
    with pytest.raises(Unavailable):
        source.stat("k1")
    for _ in range(3):
        clock.advance(5)
        began, requests = clock.monotonic(), source.stats().requests
        with pytest.raises(BreakerOpen):
            source.stat("k1")
        with pytest.raises(BreakerOpen):
            source.stat("k1")
        assert (clock.monotonic(), source.stats().requests) == (began, requests + 1)


def test_only_one_probe_at_a_time(clock: VirtualClock, any_warning: None) -> None:
    """While a probe is under way nobody else is let through, however long it takes."""
    inner = MemorySource(objects={"k": b"data"})
    info = inner.stat("k")
    source = SteadySource(FaultySource(inner, {"stat": repeat(DOWN)}), SourceSettings(), clock)
    with pytest.raises(Unavailable):
        source.stat("k")
    clock.advance(5)
    with inner.hold() as held, ThreadPoolExecutor(1) as pool:
        probe = pool.submit(source.read, info, ByteRange(0, 4))
        assert held.wait_for(1)
        clock.advance(60)
        with pytest.raises(BreakerOpen):
            source.read(info, ByteRange(0, 4))
        held.release()
        assert bytes(probe.result(10)) == b"data"
    assert bytes(source.read(info, ByteRange(0, 4))) == b"data"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Unsupported("no"), AssertionError("a bug")])
def test_a_probe_that_says_nothing_leaves_the_breaker_open(
    error: BaseException, clock: VirtualClock, any_warning: None
) -> None:
    """What does not come from the store neither closes the breaker nor blocks the next probe."""
    inner = MemorySource(objects={"k": b"data"})
    info = inner.stat("k")
    source = SteadySource(FaultySource(inner, {"stat": repeat(DOWN)}), SourceSettings(), clock)
    with pytest.raises(Unavailable):
        source.stat("k")

    def fail(*_: object) -> None:
        inner.on_read = None
        raise error

    inner.on_read = fail
    clock.advance(5)
    with pytest.raises(type(error)):
        source.read(info, ByteRange(0, 4))
    assert source.stats().breaker == "open"
    clock.advance(5)
    assert bytes(source.read(info, ByteRange(0, 4))) == b"data"


@pytest.mark.parametrize("kind", [NotFound, Denied, VersionChanged])
def test_an_answer_closes_the_breaker_whatever_it_says(
    kind: type[SourceError], clock: VirtualClock, any_warning: None
) -> None:
    """A store that says no is a store that is there."""
    source = made(clock, {"stat": repeat(DOWN), "list": [Fail(kind("no"))]})
    with pytest.raises(Unavailable):
        source.stat("k1")
    clock.advance(5)
    with pytest.raises(kind):
        next(source.list("", recursive=True))
    assert source.stats().breaker == "closed"


class Patient(VirtualClock):
    """A clock whose first wait is a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Event()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if self.waiting.is_set():
            return super().wait(event, seconds)
        self.waiting.set()
        return event.wait(60)  # longer than any of these tests waits for its outcome


def test_those_who_wait_are_told_when_the_breaker_opens(any_warning: None) -> None:
    """A caller between two tries learns at once what another has found out."""
    clock = Patient()
    source = made(clock, {"stat": repeat(DOWN)})
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(source.stat, "k1")
        assert clock.waiting.wait(10)
        with pytest.raises(Unavailable):
            source.stat("k2")
        with pytest.raises(BreakerOpen):
            waiter.result(10)


def test_a_try_that_fails_while_the_breaker_opens_is_its_last(clock: VirtualClock, any_warning: None) -> None:
    """A caller whose request was under way does not wait for another try either."""
    inner = MemorySource(objects={"k": b"data"})
    info = inner.stat("k")
    source = SteadySource(FaultySource(inner, {"stat": repeat(DOWN)}), SourceSettings(), clock)
    with inner.hold() as held, ThreadPoolExecutor(1) as pool:

        def fail(*_: object) -> None:
            raise Unavailable("late")

        inner.on_read = fail
        slow = pool.submit(source.read, info, ByteRange(0, 4))
        assert held.wait_for(1)
        with pytest.raises(Unavailable):
            source.stat("k")
        held.release()
        with pytest.raises(BreakerOpen):
            slow.result(10)


def test_closing_ends_all_waits() -> None:
    """Nobody waits for a source that is closed, and nobody begins."""
    clock = Patient()
    source = made(clock, {"stat": repeat(DOWN)})
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(source.stat, "k1")
        assert clock.waiting.wait(10)
        source.close()
        with pytest.raises(Unavailable, match="memory://test is closed"):
            waiter.result(10)
    with pytest.raises(Unavailable, match="closed"):
        source.stat("k1")


def test_one_object_that_fails_does_not_take_the_others_away() -> None:
    """While the store answers others, an object that fails for ever is that object's trouble."""

    class Busy(VirtualClock):
        meanwhile: Callable[[], object] = staticmethod(lambda: None)

        def wait(self, event: threading.Event, seconds: float) -> bool:
            self.meanwhile()
            return super().wait(event, seconds)

    clock = Busy()
    source = made(clock, {"read": repeat(DOWN)})
    info = source.stat("k1")
    clock.meanwhile = lambda: source.stat("k2")
    with pytest.raises(Unavailable) as caught:
        source.read(info, ByteRange(0, 1))
    assert not isinstance(caught.value, BreakerOpen)
    assert source.stats().breaker == "closed"


@pytest.mark.parametrize("recursive", [True, False])
@given(data=st.data())
def test_a_listing_goes_on_where_it_broke(recursive: bool, data: st.DataObject) -> None:
    """A page that fails is asked for again; nothing is listed twice or left out."""
    keys = data.draw(st.sets(st.text("ab/\u00e4\udcff", min_size=1, max_size=6), max_size=30))
    breaks = data.draw(st.lists(st.integers(0, 10), max_size=8))
    inner = MemorySource(objects=dict.fromkeys(keys, b""), page_size=data.draw(st.integers(1, 5)))
    faults = [Fail(Unavailable("no"), pages=pages) for pages in breaks]
    source = SteadySource(FaultySource(inner, {"list": faults}), SourceSettings(), VirtualClock())
    listed = list(source.list("", recursive=recursive))
    plain = list(inner.list("", recursive=recursive))
    assert [o for page in listed for o in page.objects] == [o for page in plain for o in page.objects]
    assert [p for page in listed for p in page.prefixes] == [p for page in plain for p in page.prefixes]


def test_a_listing_has_its_time_for_each_page(clock: VirtualClock, any_warning: None) -> None:
    """Progress begins the bound anew; a page that never comes ends the listing."""
    script = [Fail(DOWN.error, pages=1), *repeat(DOWN, 8), Fail(DOWN.error, pages=2), *repeat(DOWN, 8)]
    source = made(clock, {"list": script})
    began = clock.monotonic()
    assert sum(len(page.objects) for page in source.list("", recursive=True)) == 10
    assert clock.monotonic() - began > 30
    source = made(clock, {"list": repeat(Fail(DOWN.error, pages=2))})
    pages = source.list("", recursive=True)
    assert [len(next(pages).objects), len(next(pages).objects)] == [3, 3]
    with pytest.raises(Unavailable, match="given up after"):
        next(pages)


class Unordered(MemorySource):
    """A store that lists as it likes."""

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        for page in super().list(prefix, recursive=recursive, versions=versions):
            yield page._replace(objects=page.objects[::-1])


def test_a_listing_without_order_is_not_taken_up_in_the_middle(clock: VirtualClock) -> None:
    """Where it broke cannot be told in a listing without order: the caller must begin anew."""
    inner = Unordered(objects={f"k{i}": b"" for i in range(9)}, page_size=3)
    script = {"list": [DOWN, None, Fail(DOWN.error, pages=1)]}
    source = SteadySource(FaultySource(inner, script), SourceSettings(), clock)
    assert sum(len(page.objects) for page in source.list("", recursive=True)) == 9
    pages = source.list("", recursive=True)
    next(pages)
    with pytest.raises(Unavailable, match="the store is down"):
        next(pages)
    assert source.stats().breaker == "closed"


def test_a_listing_may_be_left(clock: VirtualClock, any_warning: None) -> None:
    """Whoever leaves a listing after its first page leaves nothing behind, as a probe too."""
    source = made(clock, {"stat": repeat(DOWN)})
    with pytest.raises(Unavailable):
        source.stat("k1")
    clock.advance(5)
    pages = source.list("", recursive=True)
    next(pages)
    del pages
    assert source.stats().breaker == "closed"
    assert next(source.list("zz", recursive=True), None) is None
