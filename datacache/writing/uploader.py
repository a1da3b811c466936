"""
The threads that pay the bucket what it is owed.

`schedule` says what may go, `sending` makes one attempt at it, and this decides who makes it, and when
again: what failed, after a growing pause; what somebody has open for writing, a little later; and of a
store that does not answer, one operation at a time, until one comes through.

There is a thread for each attempt under way, and one (the watch) for as long as something has a time at
which it is to be looked at. None while nothing is owed. A thread picks its own work, and starts another
where there is more; `poke` starts the first.

Locks, in this order: `_planning` (who changes the plan, and asks the overlay for that), the overlay's
own, `_lock` (all that is below it; held for moments, never while the overlay or a store is called). So the
overlay may call `poke`, `stop_op` and `forget` with its lock held, and nobody calls `flush` with it.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Any

from datacache.clock import Clock, Pace
from datacache.config.settings import UploadOrder, UploadSettings
from datacache.errors import (
    DatacacheError,
    Denied,
    NotFound,
    SourceError,
    Unavailable,
    Unsupported,
    WrongBytes,
)
from datacache.sources.sink import SIZE, Sink
from datacache.telemetry import redact
from datacache.writing.journal import Op, OpKind
from datacache.writing.reasons import Reason, grouped
from datacache.writing.schedule import Plan, needed
from datacache.writing.sending import (
    JOURNAL_ID,
    Attempt,
    Conflicting,
    GivenUp,
    Outcome,
    Refused,
    Settled,
    Work,
)
from datacache.writing.steps import step

logger = logging.getLogger(__name__)

BACKOFF, BACKOFF_MAX = 1.0, 60.0
"""Seconds between two tries of an operation at most: after the first failure, and after many."""
REFUSED, REFUSED_MAX = 1.0, 5.0
"""Seconds after which a file that could be written to is looked at again: an open, and a lease."""
DENIALS = 8
"""Refusals in a row, of any operation, after which a store is taken to refuse all, as if it were away. One
object may be forbidden; to ask for a hundred thousand with credentials that were taken back helps nobody."""
ABANDONS = 3
"""Tries to let go of parts that nobody goes on with. The store's own list of them is there for the rest."""
LOOK_EVERY = 0.1
"""Seconds between two looks at what is new, where an upload delay keeps it from being due at once: else the
watch would be woken for each of thousands of files that are written (27 futex calls each)."""
PATIENCE = 2.0
"""Real seconds that requests under way are given when all ends: a small put is done by then, and a store that
hangs is not waited for."""
LISTED = 20
"""Operations that `stats` names one by one."""
REASONED = 1000
"""... and those of which `flush` says why they are not done."""
_CHUNK = 1000  # changes of the plan, or so, under one hold of the lock: some ms


@dataclass(frozen=True)
class Underway:
    """An attempt under way."""

    mount: int
    key: str
    what: str
    """put, copy or delete."""
    sent: int
    size: int
    seconds: float


@dataclass(frozen=True)
class Waiting:
    """An operation that waits, and for what."""

    mount: int
    key: str
    what: str
    why: str


@dataclass(frozen=True)
class UploadStats:
    """How paying goes; `status` and the metrics read this. Holds no secrets."""

    pending: int = 0
    """Operations that are due."""
    oldest: float = 0.0
    """Seconds since the close, rename or unlink that has waited longest."""
    running: tuple[Underway, ...] = ()
    failing: tuple[Waiting, ...] = ()
    """The first few that have failed, and will be tried again."""
    failing_count: int = 0
    refused: int = 0
    """Operations whose file somebody can write to."""
    away: tuple[str, ...] = ()
    """Of each store that does not answer: its URI and what it said."""
    conflicts: int = 0
    unverified: int = 0
    """Uploads of which only the size could be compared with what the store has."""
    uploads: int = 0
    copies: int = 0
    deletes: int = 0
    bytes: int = 0
    """Of `uploads`."""
    failures: int = 0
    """Attempts that have failed."""


@dataclass(frozen=True)
class Flushed:
    """What a flush has come to."""

    complete: bool
    """All that it was about is in the bucket."""
    left: tuple[Waiting, ...] = ()
    """The first few that are not."""
    count: int = 0
    """How many are not."""
    stuck: bool = False
    """None of these goes on before a person has decided something."""

    def __bool__(self) -> bool:
        return self.complete

    @property
    def reasons(self) -> str:
        """Why, in words."""
        return "; ".join(dict.fromkeys(waiting.why for waiting in self.left)) or "the uploads have ended"


@dataclass
class _Trouble:
    """What is known of an operation that could not be done so far."""

    at: float = 0.0
    """When it is to be looked at again."""
    tries: int = 0
    refusals: int = 0
    why: str = ""
    unavailable: bool = False
    doubt: bool = False
    """An attempt may have taken effect."""
    distrust: bool = False
    """What is there may be wrong, and yet carry our id."""
    logged: bool = False


@dataclass
class _Store:
    """What is known of the store of one mount point."""

    uri: str
    answers: int = 0
    denials: int = 0
    """In a row."""
    away: str = ""
    """What it failed with; while this is set, there is one probe at a time."""
    tries: int = 0
    probe_at: float = 0.0
    probing: int | None = None

    @property
    def said(self) -> str:
        """What it failed with, and which it is."""
        uri = self.uri.partition("?")[0]
        return self.away if self.away.startswith(uri) else f"{self.uri}: {self.away}"


@dataclass
class _Abandon:
    """Parts at a store that nobody goes on with."""

    seq: int
    mount: int
    key: str
    resume: str
    at: float = 0.0
    tries: int = 0


@dataclass(eq=False)
class _Flush:
    """Somebody who waits."""

    left: set[int] = field(default_factory=set)
    urgent: set[int] = field(default_factory=set)
    event: threading.Event = field(default_factory=threading.Event)


URGENT, PLAIN = -2.0, -1.0
"""What comes before `seq` in the order of a line."""
_Placed = tuple[float, int]
"""(when, `seq`) of one that waits for its time, or (URGENT or PLAIN, `seq`) of one in a line."""
_Job = Callable[[], None]


class Uploader:
    """Pays what `work` owes to `sinks`, one for each mount point. `jitter` gives random numbers of [0, 1)."""

    def __init__(
        self,
        work: Work,
        sinks: Sequence[Sink],
        settings: UploadSettings,
        clock: Clock,
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._work, self._sinks, self._settings, self._clock = work, sinks, settings, clock
        self._jitter = jitter
        self._closes = settings.order is UploadOrder.CLOSES
        self._pace = Pace(settings.bandwidth, clock) if settings.bandwidth else None
        self._delay = settings.delay  # 0 while the landing zone is short of room
        # Guards what is read from `work` to be put into the plan, so that it gets there in that order; and
        # which operations have changed since they were put there.
        self._planning = threading.Lock()
        self._unseen: set[int] = set()
        # Guards all below. Invariant: whatever the plan says may begin and is not running is in `_placed`,
        # and as that very tuple in `_later` or in a line; other tuples there are forgotten ones.
        self._lock = threading.Lock()
        self._plan = Plan(closes=self._closes)
        self._changing = False  # the plan is half-way from one state to the next: nobody picks
        self._dirty = False  # something has changed that the plan does not know
        self._next_look = 0.0
        self._inherited: int | None = None  # up to here, operations are from an earlier process
        self._running: dict[int, Attempt] = {}
        self._begun: dict[int, tuple[float, int]] = {}  # of those: when, and the store's answers until then
        self._placed: dict[int, _Placed] = {}
        self._later: list[_Placed] = []
        self._lines: list[list[_Placed]] = [[] for _ in sinks]
        self._stores = [_Store(sink.uri) for sink in sinks]
        self._troubles: dict[int, _Trouble] = {}
        self._refused: set[int] = set()
        self._abandons: list[_Abandon] = []
        self._flushes: set[_Flush] = set()
        self._closed = False
        # Threads: those that are not over; how many of them look for work; whether one is the watch, which
        # waits for the alarm.
        self._threads: list[threading.Thread] = []
        self._active = self._started = 0
        self._watched: float | None = None  # until when the watch waits; None: there is none
        self._alarm = threading.Event()
        # Figures.
        self._uploads = self._copies = self._deletes = self._bytes = 0
        self._failures = self._conflicts = self._unverified = 0

    def __repr__(self) -> str:
        return (
            f"<Uploader {len(self._plan)} pending, {len(self._running)} running,"
            f" {len(self._troubles)} troubled, {self._active} threads>"
        )

    # ---- what the overlay says -------------------------------------------------------------------

    def poke(self) -> None:
        """Operations have changed."""
        with self._lock:
            self._dirty = True
            if self._watched is not None and self._watched <= self._next_look:
                return  # the watch looks then, and that is soon enough
            if threading.current_thread() not in self._threads:  # one of ours looks anyhow, when it is done
                self._wake()

    def stop_op(self, seq: int) -> None:
        """Give up an attempt that is under way: its file is written again, or is gone. Returns at once."""
        with self._lock:
            attempt = self._running.get(seq)
        if attempt is not None:
            attempt.give_up()

    def forget(self, op: Op) -> None:
        """Nobody goes on with what the store keeps for it: let go of that, some time."""
        if op.resume:
            with self._lock:
                self._abandon(op, op.resume)
                self._wake()

    # ---- what people ask -------------------------------------------------------------------------

    def flush(
        self,
        below: tuple[int, str] | None = None,
        *,
        up_to: int | None = None,
        matches: Callable[[Op], bool] | None = None,
        timeout: float | None = None,
    ) -> Flushed:
        """Wait until all that is due now is in the bucket, for `timeout` seconds at most: all below the mount
        and key `below` (of a directory with a "/" at the end), of no higher `seq` than `up_to`, and that
        `matches`. It goes before all else, and needs no delay. Ends early where only a person can help."""
        deadline = None if timeout is None else self._clock.monotonic() + timeout
        flush = _Flush()
        try:
            while True:
                seen = self._conflicts
                ops = self._work.ops()
                self._bring_up_to_date()  # now it has all of them that are still pending
                wanted = {
                    op.seq
                    for op in ops
                    if op.since
                    and (up_to is None or op.seq <= up_to)
                    and (below is None or _is_below(op, *below))
                    and (matches is None or matches(op))
                }
                self._hurry(flush, wanted, needed(ops, wanted, closes=self._closes) if wanted else set())
                if deadline is None:
                    flush.event.wait()
                else:
                    self._clock.wait(flush.event, max(0.0, deadline - self._clock.monotonic()))
                with self._lock:
                    left = sorted(flush.left)
                    # A conflict may have put our version under a name of its own: that is to get there, too.
                    again = not left and self._conflicts != seen and up_to is None and not self._closed
                    stuck = bool(left) and self._is_stuck(flush)
                if not again:
                    return Flushed(not left, self._reasons(left[:REASONED]), len(left), stuck)
        finally:
            with self._lock:
                self._flushes.discard(flush)

    def hurry(self, on: bool) -> None:
        """Wait for no delay (the landing zone is short of room), or again for the one of the settings."""
        delay = 0.0 if on else self._settings.delay
        with self._lock:
            if delay == self._delay:
                return
            self._delay = delay
            waiting = list(self._placed)
        for start in range(0, len(waiting), _CHUNK):
            with self._lock:
                now = self._clock.monotonic()
                for seq in waiting[start : start + _CHUNK]:
                    if seq in self._placed:
                        self._place(seq, now)
        with self._lock:
            self._wake()

    def stats(self) -> UploadStats:
        """How it goes, and why what has not gone has not."""
        due = [op.since for op in self._work.ops() if op.since]
        now = self._clock.monotonic()
        with self._lock:
            failing = sorted(seq for seq, trouble in self._troubles.items() if trouble.tries)
            running = [
                Underway(a.op.mount, a.op.key, _what(a.op), a.bytes, a.size, now - self._begun[seq][0])
                for seq, a in sorted(self._running.items())
            ]
            return UploadStats(
                pending=len(due),
                oldest=max(0.0, self._clock.wall() - min(due)) if due else 0.0,
                running=tuple(running),
                failing_count=len(failing),
                refused=len(self._refused),
                away=tuple(store.said for store in self._stores if store.away),
                conflicts=self._conflicts,
                unverified=self._unverified,
                uploads=self._uploads,
                copies=self._copies,
                deletes=self._deletes,
                bytes=self._bytes,
                failures=self._failures,
                failing=tuple(
                    Waiting(op.mount, op.key, _what(op), self._last(op, self._troubles[seq]))
                    for seq in failing[:LISTED]
                    if (op := self._plan.get(seq)) is not None
                ),
            )

    def status(self) -> dict[str, Any]:
        """`stats` as JSON has it; docs/operations.md describes the keys."""
        return asdict(self.stats())

    def reasons(self, left: Sequence[Waiting]) -> list[str]:
        """Why `left` is not done, for people: each reason once, those of whole stores first."""
        with self._lock:
            away = [store.said for store in self._stores if store.away]
        return [*away, *grouped((Reason(one.what, one.key, one.why) for one in left), known=away)]

    def waiting(self, limit: int = LISTED) -> tuple[Waiting, ...]:
        """The first of what is pending, and why it is."""
        return self._reasons([op.seq for op in self._work.ops()[:limit]])

    def close(self) -> None:
        """Stop what is under way and join all threads. Requests that do not end within `PATIENCE` are cut off
        by closing the sinks. What is unfinished is in the journal. Idempotent."""
        with self._lock:
            self._closed = True
            attempts = list(self._running.values())
            self._alarm.set()
            for flush in self._flushes:
                flush.event.set()
        for attempt in attempts:
            attempt.give_up()
        end = time.monotonic() + PATIENCE
        while True:
            with self._lock:
                threads = list(self._threads)
                self._threads.clear()
            if not threads:
                return
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
            if any(thread.is_alive() for thread in threads):
                for sink in self._sinks:
                    sink.close()
            for thread in threads:
                thread.join()

    # ---- threads (with the lock held) ------------------------------------------------------------

    def _wake(self) -> None:
        """Have somebody look for work."""
        if self._watched is not None:
            self._alarm.set()
        elif not self._closed and self._active < max(1, self._settings.concurrency):
            self._start()

    def _start(self) -> None:
        for thread in [thread for thread in self._threads if not thread.is_alive()]:
            thread.join()
            self._threads.remove(thread)
        self._started += 1
        thread = threading.Thread(target=self._run, name=f"upload-{self._started}")
        try:
            thread.start()
        except RuntimeError:  # no more threads for now; whoever runs goes on, and the next poke tries again
            logger.warning("no thread could be started for an upload")
            return
        self._threads.append(thread)
        self._active += 1

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:
                logger.exception("an upload failed in a way that nobody foresaw")
            del job  # it holds an attempt

    def _next(self) -> _Job | None:
        """What this thread does next; None: it is not needed any more."""
        while True:
            self._look_at_changes()
            with self._lock:
                now = self._clock.monotonic()
                job = None if self._closed else self._pick(now)
                wake_at = None if self._closed else self._wake_at(now)
                if job is not None:
                    if wake_at is not None:
                        self._wake()  # there is more to do, or something to wait for
                    return job
                if wake_at is not None and wake_at <= now:
                    continue
                if wake_at is None or self._watched is not None:
                    if wake_at is not None and self._watched is not None and wake_at < self._watched:
                        self._alarm.set()
                    self._active -= 1
                    return None
                self._watched = wake_at
                self._alarm.clear()
            self._clock.wait(self._alarm, wake_at - now)
            with self._lock:
                self._watched = None

    def _wake_at(self, now: float) -> float | None:
        """When there is something to do; None: not before somebody says so."""
        if self._changing:
            return None  # whoever changes it looks for work afterwards
        times = [self._later[0][0]] if self._later else []
        if self._dirty:
            times.append(self._next_look)
        for mount, store in enumerate(self._stores):
            if store.probing is None and self._top(mount) is not None:
                times.append(store.probe_at if store.away else now)
        for one in self._abandons:
            store = self._stores[one.mount]
            if one.seq not in self._running and not (store.away and store.probing is not None):
                times.append(max(one.at, store.probe_at if store.away else now))
        return min(times, default=None)

    # ---- what is next (with the lock held) --------------------------------------------------------

    def _pick(self, now: float) -> _Job | None:
        if self._changing:
            return None
        while self._later and self._later[0][0] <= now:
            entry = heappop(self._later)
            if self._placed.get(entry[1]) is entry:
                del self._placed[entry[1]]
                self._place(entry[1], now)
        for one in self._abandons:
            if one.at <= now and self._is_open(self._stores[one.mount], now) and one.seq not in self._running:
                self._abandons.remove(one)
                return partial(self._let_go, one)
        best: tuple[_Placed, int] | None = None
        for mount, store in enumerate(self._stores):
            top = self._top(mount) if self._is_open(store, now) else None
            if top is not None and (best is None or top < best[0]):
                best = top, mount
        if best is None:
            return None
        (_, seq), mount = best
        heappop(self._lines[mount])
        del self._placed[seq]
        op = self._plan.get(seq)
        assert op is not None, "the plan says that it may begin"
        trouble = self._troubles.get(seq)
        attempt = Attempt(
            op,
            self._sinks[mount],
            self._work,
            pace=self._pace,
            asked=trouble is not None and trouble.doubt,
            inherited=(trouble is None or not trouble.tries) and seq <= (self._inherited or 0),
            distrust=trouble is not None and trouble.distrust,
        )
        self._running[seq] = attempt
        self._begun[seq] = now, self._stores[mount].answers
        if self._stores[mount].away:
            self._stores[mount].probing = seq
        return partial(self._pay, attempt)

    def _is_open(self, store: _Store, now: float) -> bool:
        """Whether it may be asked for anything: while it is away, by one probe at a time."""
        return not store.away or (store.probing is None and now >= store.probe_at)

    def _top(self, mount: int) -> _Placed | None:
        """The next of a line that may begin."""
        line = self._lines[mount]
        while line:
            entry = line[0]
            seq = entry[1]
            if self._placed.get(seq) is entry:
                if self._plan.may(seq) and seq not in self._running:
                    return entry
                del self._placed[seq]  # something came in its way; the plan tells when it has gone
            heappop(line)
        return None

    def _place(self, seq: int, now: float) -> None:
        """Put it where it waits, if it may begin."""
        op = self._plan.get(seq)
        if op is None or seq in self._running or not self._plan.may(seq):
            self._placed.pop(seq, None)
            return
        urgent = any(seq in flush.urgent for flush in self._flushes)
        trouble = self._troubles.get(seq)
        at = trouble.at if trouble is not None else now
        if self._delay and not urgent:
            # Of a wall clock that was set back, no more than the delay is believed.
            due = op.since + self._delay - self._clock.wall()
            at = max(at, now + min(due, self._delay))
        entry = (at, seq) if at > now else (URGENT if urgent else PLAIN, seq)
        if self._placed.get(seq) != entry:
            self._placed[seq] = entry
            heappush(self._later if at > now else self._lines[op.mount], entry)

    def _place_news(self, now: float) -> None:
        for seq in self._plan.news():
            self._place(seq, now)

    # ---- the plan --------------------------------------------------------------------------------

    def _look_at_changes(self) -> None:
        with self._lock:
            if not self._dirty or self._closed or self._clock.monotonic() < self._next_look:
                return
        try:
            self._bring_up_to_date(only_if_dirty=True)
        except Exception:
            logger.exception("what the bucket is owed cannot be told; it is looked at again")
            with self._lock:
                self._dirty, self._next_look = True, self._clock.monotonic() + BACKOFF

    def _bring_up_to_date(self, *, only_if_dirty: bool = False) -> None:
        """Have the plan be as the overlay says."""
        with self._planning:
            with self._lock:
                if only_if_dirty and not self._dirty:
                    return
                self._dirty = False
            self._unseen.update(self._work.changed())
            if self._inherited is None:
                self._unseen.update(op.seq for op in self._work.ops())
            parked, unseen = self._work.parked(), sorted(self._unseen)
            try:
                for start in range(0, len(unseen), _CHUNK):
                    ops = [(seq, self._work.op(seq)) for seq in unseen[start : start + _CHUNK]]
                    with self._lock:
                        self._changing = True
                        for seq, op in ops:
                            if op is not None:
                                self._have(op)
                            elif seq not in self._running:  # else it is dropped, and counted, when it ends
                                self._drop(seq)
            finally:
                with self._lock:
                    self._park(parked)
                    self._changing = False
                    now = self._clock.monotonic()
                    self._place_news(now)
                    self._next_look = now + min(LOOK_EVERY, self._delay)
            self._unseen.clear()
            if self._inherited is None:
                self._inherited = max(unseen, default=0)

    def _have(self, op: Op) -> None:
        self._plan.put(op)
        trouble = self._troubles.get(op.seq)
        if trouble is not None and trouble.refusals and not trouble.tries:
            trouble.at = 0.0  # it has changed: that may be what it waited for
            self._place(op.seq, self._clock.monotonic())

    def _drop(self, seq: int) -> None:
        """It is not pending any more."""
        self._plan.remove(seq)
        self._placed.pop(seq, None)
        self._troubles.pop(seq, None)
        self._refused.discard(seq)
        for flush in self._flushes:
            flush.left.discard(seq)
            self._tell(flush)

    def _park(self, parked: Iterable[int]) -> None:
        self._plan.park(parked)
        for flush in self._flushes:
            self._tell(flush)

    def _tell(self, flush: _Flush) -> None:
        if flush.left <= self._plan.parked:
            flush.event.set()

    def _is_stuck(self, flush: _Flush) -> bool:
        """Whether only a person can help: what is left waits for one, or for what does."""
        if not self._plan.parked or self._closed or self._dirty or self._changing:
            return False  # or what was just done may have set others free
        last = max(flush.urgent)
        if any(seq <= last for seq in self._running):
            return False  # it may be in the way of others, and done, and nobody has noted that yet
        return not any(self._plan.may(seq) for seq in flush.urgent)

    def _hurry(self, flush: _Flush, wanted: set[int], urgent: set[int]) -> None:
        """Have somebody wait for `wanted`, and `urgent` go first."""
        with self._lock:
            flush.left = {seq for seq in wanted if seq in self._plan}
            flush.urgent = urgent
            flush.event.clear()
            self._flushes.add(flush)
            self._tell(flush)
            if self._closed:
                flush.event.set()
        hurried = sorted(urgent)
        for start in range(0, len(hurried), _CHUNK):
            with self._lock:
                now = self._clock.monotonic()
                for seq in hurried[start : start + _CHUNK]:
                    trouble = self._troubles.get(seq)
                    if trouble is not None and seq in self._refused:
                        trouble.at = now
                    self._place(seq, now)
        with self._lock:
            self._wake()

    # ---- one attempt -----------------------------------------------------------------------------

    def _pay(self, attempt: Attempt) -> None:
        seq = attempt.op.seq
        outcome: Outcome | None = None
        failure: Exception | None = None
        begun = False
        try:
            now = self._work.begin(attempt.op)
            if now is not None:
                begun = True
                outcome = attempt.run(now)
        except Exception as error:  # noqa: BLE001  it is told, and logged, in `_note_trouble`
            failure = error
        if begun:
            try:
                self._report(attempt, outcome)
            except Exception as error:  # noqa: BLE001  as above
                outcome, failure = None, error
                try:
                    self._work.stopped(attempt.op)  # or it would be under way for ever
                except Exception:
                    logger.exception("nor can it be said that %r was given up", attempt.op.key)
        attempt.close()
        self._ended(seq, attempt, outcome, failure, begun=begun)

    def _report(self, attempt: Attempt, outcome: Outcome | None) -> None:
        match outcome:
            case Settled(stored):
                step("upload.before.settled")
                self._work.settled(attempt.op, stored, attempt.content)
                step("upload.after.settled")
            case Conflicting(found):
                step("upload.before.conflict")
                self._work.conflict(attempt.op, found)
                step("upload.after.conflict")
            case _:
                self._work.stopped(attempt.op)

    def _ended(
        self, seq: int, attempt: Attempt, outcome: Outcome | None, failure: Exception | None, *, begun: bool
    ) -> None:
        """Note what it has come to, and what may go now."""
        with self._planning:
            try:
                op, parked = self._work.op(seq), self._work.parked()
            except Exception as error:
                logger.exception("what has become of %r cannot be told; it is tried again", attempt.op.key)
                op, parked = attempt.op, {}
                failure = failure or error
            with self._lock:
                now = self._clock.monotonic()
                del self._running[seq]
                _, answers = self._begun.pop(seq)
                self._note_store(self._stores[attempt.op.mount], seq, outcome, failure, answers, now)
                self._count(attempt, outcome)
                done = isinstance(outcome, Settled)
                if attempt.resume and not done and (op is None or op.id != attempt.op.id):
                    self._abandon(attempt.op, attempt.resume)  # nobody will go on with it
                if op is None:
                    self._drop(seq)
                elif not begun and failure is None and (not op.since or seq in parked):
                    self._plan.put(op)  # not due, or not for us
                else:
                    self._plan.put(op)
                    self._note_trouble(seq, attempt, outcome, failure, now, begun=begun)
                self._park(parked)
                self._place(seq, now)
                self._place_news(now)

    def _count(self, attempt: Attempt, outcome: Outcome | None) -> None:
        match outcome:
            case Settled() if attempt.sent_before:
                pass
            case Settled(stored) if stored is not None:
                if _what(attempt.op) == "copy" and not attempt.fetched:
                    self._copies += 1
                else:
                    self._uploads += 1
                    self._bytes += stored.info.size
                self._unverified += stored.verified == SIZE
            case Settled():
                self._deletes += 1
            case Conflicting():
                self._conflicts += 1

    def _note_trouble(
        self, seq: int, attempt: Attempt, outcome: Outcome | None, failure: Exception | None, now: float,
        *, begun: bool,
    ) -> None:  # fmt: skip
        """Why it is still there, and when to look at it again."""
        trouble = self._troubles.setdefault(seq, _Trouble())
        self._refused.discard(seq)
        if failure is None and begun and not isinstance(outcome, Refused):
            # Given up, or done and owed anew. What it did is known only where it got to an end.
            doubt = isinstance(outcome, GivenUp) and (trouble.doubt or attempt.reached)
            distrust = trouble.distrust and doubt
            del self._troubles[seq]
            if doubt:
                self._troubles[seq] = _Trouble(at=now, doubt=True, distrust=distrust)
            return
        if failure is None:
            trouble.refusals += 1
            trouble.at = now + min(REFUSED_MAX, REFUSED * 2.0 ** min(trouble.refusals - 1, 8))
            trouble.why = "open for writing, or mapped" if begun else "not to be done now"
            self._refused.add(seq)
            return
        self._failures += 1
        trouble.tries += 1
        trouble.refusals = 0
        trouble.unavailable = isinstance(failure, Unavailable)
        trouble.doubt = trouble.doubt or (
            attempt.reached and not isinstance(failure, Denied | NotFound | Unsupported)
        )
        trouble.distrust = trouble.distrust or isinstance(failure, WrongBytes)
        trouble.why = _said(failure)
        trouble.at = now + self._pause(trouble.tries, getattr(failure, "retry_after", None))
        if not isinstance(failure, DatacacheError):
            if not trouble.logged:
                logger.error(
                    "%s of %r failed in a way that nobody foresaw; it is tried again",
                    _what(attempt.op), attempt.op.key, exc_info=failure,
                )  # fmt: skip
            trouble.logged = True
        elif not trouble.logged and not trouble.unavailable and not self._stores[attempt.op.mount].away:
            trouble.logged = True
            logger.warning(
                "%s of %r failed, and is tried again: %s", _what(attempt.op), attempt.op.key, trouble.why
            )

    def _note_store(
        self, store: _Store, seq: int, outcome: Outcome | None, failure: Exception | None, answers: int,
        now: float,
    ) -> None:  # fmt: skip
        """What an attempt says of its store: whether it answers."""
        probe = store.probing == seq
        if probe:
            store.probing = None
        if isinstance(outcome, Settled | Conflicting):
            store.answers += 1
            store.denials = 0
            self._answers_again(store, now)
            return
        bad = False
        if isinstance(failure, Unavailable):
            # Where others had an answer meanwhile, the store is there, and only this has failed.
            bad = probe or store.answers == answers
        elif isinstance(failure, Denied | NotFound):  # NotFound: the bucket
            store.denials += 1
            bad = store.denials >= DENIALS
        elif isinstance(failure, SourceError) and not isinstance(failure, Unsupported):
            store.answers += 1
            store.denials = 0
            self._answers_again(store, now)
        if bad and (probe or not store.away):
            store.tries = store.tries + 1 if store.away else 1
            if not store.away:
                logger.warning(
                    "uploads to %s do not get through; one at a time is tried until they do (%s)",
                    store.uri, _said(failure),
                )  # fmt: skip
            store.away = _said(failure)
            store.probe_at = now + self._pause(store.tries, getattr(failure, "retry_after", None))

    def _answers_again(self, store: _Store, now: float) -> None:
        if not store.away:
            return
        store.away, store.tries, store.denials = "", 0, 0
        logger.info("uploads to %s get through again", store.uri)
        mount = self._stores.index(store)
        for seq, trouble in self._troubles.items():
            op = self._plan.get(seq)
            if trouble.unavailable and op is not None and op.mount == mount:
                trouble.at, trouble.unavailable = now, False
                self._place(seq, now)

    def _pause(self, tries: int, retry_after: float | None) -> float:
        """Full jitter; its lowest twentieth is cut off, so that unlucky numbers do not make a busy loop."""
        ceiling = min(BACKOFF_MAX, BACKOFF * 2.0 ** min(tries - 1, 16))
        return max(ceiling * max(self._jitter(), 0.05), retry_after or 0.0)

    # ---- parts that nobody goes on with ----------------------------------------------------------

    def _abandon(self, op: Op, resume: str) -> None:
        if all((one.mount, one.key, one.resume) != (op.mount, op.key, resume) for one in self._abandons):
            self._abandons.append(_Abandon(op.seq, op.mount, op.key, resume))

    def _let_go(self, one: _Abandon) -> None:
        try:
            step("upload.before.abandon")
            self._sinks[one.mount].abandon(one.key, one.resume)
            step("upload.after.abandon")
            with self._lock:
                store = self._stores[one.mount]
                store.answers += 1
                self._answers_again(store, self._clock.monotonic())
        except Exception as error:
            if not isinstance(error, DatacacheError):
                logger.exception("parts of %r were not let go of, in a way that nobody foresaw", one.key)
            one.tries += 1
            if one.tries >= ABANDONS:
                logger.info("parts of %r stay at the store for now: %s", one.key, _said(error))
                return
            with self._lock:
                one.at = self._clock.monotonic() + self._pause(one.tries, None)
                self._abandons.append(one)

    # ---- why ------------------------------------------------------------------------------------

    def _reasons(self, seqs: Sequence[int]) -> tuple[Waiting, ...]:
        parked = self._work.parked()
        found = []
        with self._lock:
            for seq in seqs:
                op = self._plan.get(seq)
                if op is not None:
                    found.append(Waiting(op.mount, op.key, _what(op), parked.get(seq) or self._why(op)))
        return tuple(found)

    def _last(self, op: Op, trouble: _Trouble) -> str:
        """What it has failed with, or what all say of a store that does not answer."""
        store = self._stores[op.mount]
        return store.away if store.away and trouble.unavailable else trouble.why

    def _why(self, op: Op) -> str:
        trouble = self._troubles.get(op.seq)
        if op.seq in self._running:
            return "under way"
        if not op.since:
            return "not closed yet"
        store = self._stores[op.mount]
        if trouble is not None and trouble.why:
            return self._last(op, trouble)
        if store.away:
            return store.away
        if not self._plan.may(op.seq):
            return "waits for what was closed before"
        placed = self._placed.get(op.seq)
        if placed is not None and self._delay and placed[0] > PLAIN:
            return "waits for the upload delay"
        return "waits for its turn"


def _what(op: Op) -> str:
    if op.kind is OpKind.DELETE:
        return "delete"
    return "copy" if op.origin is not None and not op.landing else "put"


def _is_below(op: Op, mount: int, top: str) -> bool:
    return any(
        at == mount and (key == top or (top.endswith("/") and key.startswith(top))) for at, key in op.keys
    )


def _said(error: Exception | None) -> str:
    """One line, without secrets."""
    return redact(" ".join(str(error).split()))[:300] or type(error).__name__


__all__ = [
    "JOURNAL_ID", "Flushed", "Underway", "UploadStats", "Uploader", "Waiting", "Work",
]  # fmt: skip
