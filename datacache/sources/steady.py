"""
A source around a source: tries again what may pass by itself, for a bounded time.

Unavailable: again, after an exponentially growing wait with full jitter, or as long as the store
asked for, until `settings.timeout` is over. CredentialsExpired: once more (the client renews them).
WrongBytes of a read: once more. Nothing else is tried again: asking twice does not change it.

When an operation has used up its bound and nobody had an answer meanwhile, the *breaker* opens:
everybody, those who wait for their next try included, is answered BreakerOpen at once, and every
`breaker_probe` seconds one caller's operation goes through as a probe. An answer closes it, be it
"not found". There is no thread: a probe is somebody's own request.

The bound is checked between tries. One try is bounded by the source inside, which abandons a
request that stalls (`settings.stall_timeout`).
"""

import logging
import random
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from datacache.clock import Clock
from datacache.config.settings import SourceSettings
from datacache.errors import (
    BreakerOpen,
    CredentialsExpired,
    SourceError,
    Unavailable,
    Unsupported,
    WrongBytes,
)
from datacache.model import Buffer, ByteRange, ObjectInfo
from datacache.sources.source import Page, Source, Traits

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class SteadyStats:
    """How a source has been."""

    requests: int = 0
    """Tries, the repeated ones included. A listing counts once however many pages it has."""
    retries: int = 0
    """Tries that repeated another."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Tries that failed, by the name of their error. NotFound is among them, though it is an answer."""
    refused: int = 0
    """Operations that the breaker answered."""
    breaker: str = "closed"
    """closed or open."""
    opened: int = 0
    """How often the breaker has opened."""


def pause(tries: int, settings: SourceSettings, jitter: float, retry_after: float | None) -> float:
    """Seconds to wait after `tries` tries, `jitter` being a random number of [0, 1).

    Full jitter spreads the callers of a store that comes back over the whole interval; its lowest
    twentieth is cut off, so that unlucky numbers do not make a busy loop.
    """
    ceiling = min(settings.backoff_max, settings.backoff * 2.0 ** min(tries - 1, 32))
    return max(ceiling * max(jitter, 0.05), retry_after or 0.0, 0.001)


class SteadySource:
    """`inner`, asked again as often as makes sense. `jitter` gives random numbers of [0, 1)."""

    def __init__(
        self,
        inner: Source,
        settings: SourceSettings,
        clock: Clock,
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._inner = inner
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        # Guards all below. `_interrupt` is set, and replaced, when the breaker opens: whoever waits
        # for a next try holds the one that was there when the wait began, and goes to be refused.
        # While `_broken` is set, at most one caller is `_probing`, and nobody else asks the store.
        self._lock = threading.Lock()
        self._interrupt = threading.Event()
        self._closed = False
        self._broken: Unavailable | None = None
        self._broken_since = 0.0
        self._next_probe = 0.0
        self._probing = False
        self._answers = 0
        self._requests = self._retries = self._refused = self._opened = 0
        self._failures: Counter[str] = Counter()

    def __repr__(self) -> str:
        stats = self.stats()
        tries = f"{stats.requests} requests, {stats.retries} retries"
        return f"<SteadySource {self.uri} breaker {stats.breaker}, {tries}>"

    @property
    def uri(self) -> str:
        return self._inner.uri

    @property
    def traits(self) -> Traits:
        return _SteadyTraits(self._inner.traits, self._steadily)

    def stats(self) -> SteadyStats:
        """Counts since the start, and how the breaker stands."""
        with self._lock:
            return SteadyStats(
                requests=self._requests,
                retries=self._retries,
                failures=dict(self._failures),
                refused=self._refused,
                breaker="open" if self._broken else "closed",
                opened=self._opened,
            )

    def stat(self, key: str) -> ObjectInfo:
        return self._steadily(lambda: self._inner.stat(key))

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        return self._steadily(lambda: self._inner.read(info, span))

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        effort, listed = _Effort(self._clock.monotonic()), _Listed()
        while True:
            probe = self._enter(effort)
            listed.begin()
            try:
                for page in self._inner.list(prefix, recursive=recursive, versions=versions):
                    probe = self._answered(probe)
                    rest = listed.beyond(page)
                    if rest.objects or rest.prefixes:
                        yield rest
                        effort.renew(self._clock.monotonic())
                self._answered(probe)
                return
            except SourceError as error:
                self._count_and_leave(error, probe)
                if listed.begun and not listed.ordered:
                    raise  # where to go on is known only by the order; the caller begins anew
                self._go_on_after(error, effort, probe)
            except BaseException:
                self._leave(probe)
                raise

    def close(self) -> None:
        """Stop waiting, then close the source inside. Those who wait get Unavailable."""
        with self._lock:
            self._closed = True
            self._interrupt.set()
        self._inner.close()

    def _steadily(self, call: Callable[[], T]) -> T:
        effort = _Effort(self._clock.monotonic())
        while True:
            probe = self._enter(effort)
            try:
                answer = call()
            except SourceError as error:
                self._count_and_leave(error, probe)
                self._go_on_after(error, effort, probe)
            except BaseException:
                self._leave(probe)
                raise
            else:
                self._answered(probe)
                return answer

    def _enter(self, effort: "_Effort") -> bool:
        """Be let through to the store; whether as the probe.

        Raises BreakerOpen, or Unavailable after `close`.
        """
        now = self._clock.monotonic()
        with self._lock:
            if self._closed:
                raise Unavailable(f"{self.uri} is closed")
            if self._broken is not None:
                if self._probing or now < self._next_probe:
                    self._refused += 1
                    raise self._refusal(self._broken, now) from self._broken
                self._probing = True
            self._requests += 1
            self._retries += effort.tries > 0
            effort.tries += 1
            return self._broken is not None

    def _refusal(self, error: Unavailable, now: float) -> BreakerOpen:
        wait = max(0.0, self._next_probe - now)
        return BreakerOpen(
            f"{self.uri} has not answered for {now - self._broken_since:.0f} s and is not asked again for "
            f"{wait:.0f} s; last: {error}",
            retry_after=wait,
        )

    def _answered(self, probe: bool) -> bool:
        """The store has answered. Returns False: from now on this caller is no probe."""
        with self._lock:
            self._answers += 1
            self._probing = self._probing and not probe
            recovered, self._broken = self._broken is not None, None
        if recovered:
            _log.info("%s answers again", self.uri)
        return False

    def _leave(self, probe: bool) -> None:
        """A try is over that was no answer."""
        if probe:
            with self._lock:
                self._probing = False
                self._next_probe = self._clock.monotonic() + self._settings.breaker_probe

    def _count_and_leave(self, error: SourceError, probe: bool) -> None:
        with self._lock:
            self._failures[type(error).__name__] += 1
        # Unsupported may come from the client alone; all else but Unavailable is the store speaking.
        if isinstance(error, Unavailable | Unsupported):
            self._leave(probe)
        else:
            self._answered(probe)

    def _go_on_after(self, error: SourceError, effort: "_Effort", probe: bool) -> None:
        """Wait until it is time for the next try, or raise what the operation comes to."""
        if not isinstance(error, Unavailable):
            if effort.once_more(error):
                return
            raise error
        now = self._clock.monotonic()
        with self._lock:
            if probe:
                raise self._refusal(error, now) from error
            if self._closed or self._broken is not None:
                return  # `_enter` has the answer
            if effort.answers is None:
                effort.answers = self._answers
            left = effort.started + self._settings.timeout - now
            opens = left <= 0 and self._answers == effort.answers
            if opens:
                self._open(error, now, since=effort.started)
            # The last try is made when the bound is reached, whatever wait was due by then.
            wait = min(left, pause(effort.tries, self._settings, self._jitter(), error.retry_after))
            interrupt = self._interrupt
        if opens:
            _log.warning(
                "%s does not answer; it is tried again every %.0f s (%s)",
                self.uri, self._settings.breaker_probe, error,
            )  # fmt: skip
        if left <= 0:
            raise Unavailable(
                f"{error} (given up after {effort.tries} tries in {now - effort.started:.0f} s)",
                retry_after=error.retry_after,
            ) from error
        self._clock.wait(interrupt, wait)

    def _open(self, error: Unavailable, now: float, *, since: float) -> None:
        self._broken, self._broken_since = error, since
        self._next_probe = now + self._settings.breaker_probe
        self._opened += 1
        self._interrupt.set()
        self._interrupt = threading.Event()


class _SteadyTraits(Traits):
    """`inner`, where it may have to ask the store whether it keeps versions: a busy store must not
    fail a snapshot by that one question."""

    def __init__(self, inner: Traits, steadily: Callable[[Callable[[], bool]], bool]) -> None:
        values = {"conditional": inner.conditional, "md5_etag": inner.md5_etag}
        for name, value in {**values, "_inner": inner, "_steadily": steadily}.items():
            object.__setattr__(self, name, value)

    @property
    def versioned(self) -> bool:
        inner: Traits = self._inner  # type: ignore[attr-defined]
        answer: bool = self._steadily(lambda: inner.versioned)  # type: ignore[attr-defined]
        return answer


class _Effort:
    """The tries of one operation, or of one page of a listing."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.tries = 0
        self.answers: int | None = None
        """The store's answers to anybody when this first failed. If there are more at the end, the
        store is there and only this object is not: that must not take the rest of it away."""
        self._repeated: set[type[SourceError]] = set()

    def renew(self, now: float) -> None:
        """There was progress: the bound begins anew."""
        self.started, self.tries, self.answers = now, 1, None
        self._repeated.clear()

    def once_more(self, error: SourceError) -> bool:
        """Whether `error` is of a kind that is tried once more, and has not been."""
        for kind in (CredentialsExpired, WrongBytes):
            if isinstance(error, kind) and kind not in self._repeated:
                self._repeated.add(kind)
                return True
        return False


class _Trail:
    """How far names have come, in passes that begin anew."""

    def __init__(self) -> None:
        self.farthest = b""
        self.here = b""
        self.ordered = True

    def seen(self, names: list[bytes]) -> int:
        """How many of the next `names` an earlier pass has had."""
        self.ordered = self.ordered and all(a < b for a, b in pairwise([self.here, *names]))
        self.here = names[-1] if names else self.here
        if not self.ordered:
            return 0
        count = bisect_right(names, self.farthest)
        self.farthest = max(self.farthest, self.here)
        return count


class _Listed:
    """How far a listing has come, so that one that begins anew goes on from there.

    A store that does not keep to the order of keys is found out; its listings cannot be taken up.
    """

    def __init__(self) -> None:
        self._objects, self._prefixes = _Trail(), _Trail()
        self.begun = False

    @property
    def ordered(self) -> bool:
        return self._objects.ordered and self._prefixes.ordered

    def begin(self) -> None:
        """The next page is the first of a listing."""
        self._objects.here = self._prefixes.here = b""

    def beyond(self, page: Page) -> Page:
        """What of `page` has not been seen before."""
        self.begun = True
        return Page(
            page.objects[self._objects.seen([_raw(o.key) for o in page.objects]) :],
            page.prefixes[self._prefixes.seen([_raw(name) for name in page.prefixes]) :],
        )


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
