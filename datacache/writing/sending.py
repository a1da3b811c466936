"""
One attempt to pay one thing that the bucket is owed.

An answer may get lost, and a process may die before it has noted one. So each put carries its journal
id as metadata, and where it is not certain what an earlier attempt came to, the store is asked what
stands there now (`Attempt._look`): our own id means that it is done, an older one of the same lineage
that the bucket has an earlier content of ours, which this one may replace; what was expected, that
nothing has happened; and anything else is somebody else's.

What an attempt comes to is a value (`Outcome`), or an error. Who tries again, and when, is `uploader`'s.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from datacache.clock import Pace
from datacache.errors import NotFound, Stopped, Unsupported, VersionChanged
from datacache.model import Buffer, MiB
from datacache.sources import sink as door
from datacache.sources.sink import Sink, Stored
from datacache.writing import journal
from datacache.writing.journal import Op, OpKind
from datacache.writing.landing import Quiet
from datacache.writing.steps import step

JOURNAL_ID = "datacache-journal"
"""The metadata that says which operation an object is from."""
WORTH_ASKING = 8 * MiB
"""Bytes of what an earlier process may have sent already, from which on the store is asked before it is sent
again: a question costs a round trip, and these some hundred milliseconds more."""
AT_ONCE = 3
"""Times that what stands there may turn out to be ours, and is replaced, within one attempt: each is one more
answer that was lost, so this is plenty."""


class Work(Protocol):
    """What is owed, and who wants to know that it was paid (`settling.Settling`). Thread-safe.

    What was begun ends with exactly one of `settled`, `stopped` and `conflict`.
    """

    def ops(self) -> Sequence[Op]:
        """All that is pending, in order."""

    def changed(self) -> Collection[int]:
        """`seq` of what is new, or another, or not pending any more, since this was asked before."""

    def op(self, seq: int) -> Op | None:
        """One of them, as it is now."""

    def parked(self) -> Mapping[int, str]:
        """Those that wait for a person, and why."""

    def begin(self, op: Op) -> Op | None:
        """It is about to be done: as it is now; None where that is not to be."""

    def content(self, op: Op) -> Quiet | None:
        """The bytes of a PUT with `landing`, which nobody can write to; None where somebody can, now."""

    def held(self, op: Op, content: Quiet) -> Stored | None:
        """What the bucket has, where it is known to have `content` already."""

    def fetch(self, op: Op) -> Quiet:
        """The bytes of the `origin` of a PUT. Raises SourceError, LandingError, Stopped where there are none
        any more."""

    def metadata(self, op: Op) -> Mapping[str, str]:
        """What is sent beside the bytes of a PUT."""

    def remember(self, op: Op, resume: str) -> Op:
        """Keep what a sink needs to go on after a restart; durable."""

    def settled(self, op: Op, stored: Stored | None, content: Quiet | None) -> None:
        """The bucket holds it, or (None) has it no more. `content` is open until this returns."""

    def stopped(self, op: Op) -> None:
        """It was given up, or failed, and stays pending, unless nobody needs it any more."""

    def conflict(self, op: Op, found: Stored | None) -> None:
        """The bucket holds what neither we nor it should have put there."""


@dataclass(frozen=True)
class Settled:
    """It is done."""

    stored: Stored | None
    """What the bucket holds; None: nothing any more."""


@dataclass(frozen=True)
class Conflicting:
    """The bucket holds something else than was expected, and not ours."""

    found: Stored | None


@dataclass(frozen=True)
class Refused:
    """Somebody can write to the file now."""


@dataclass(frozen=True)
class GivenUp:
    """It was stopped."""


Outcome = Settled | Conflicting | Refused | GivenUp


class Attempt:
    """One attempt at `op`; it is the sink's `Put`, too. `give_up` may be called from any thread."""

    def __init__(
        self,
        op: Op,
        sink: Sink,
        work: Work,
        *,
        pace: Pace | None,
        asked: bool = False,
        inherited: bool = False,
        distrust: bool = False,
    ) -> None:
        """`asked`: an earlier attempt may have had an effect, so the store is asked first. `inherited`: it is
        from an earlier process, of whose attempts nothing is known. `distrust`: what is there may carry our
        id and yet be wrong."""
        self.op, self._sink, self._work, self._pace = op, sink, work, pace
        self._asked, self._inherited, self._distrust = asked, inherited, distrust
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards `content`: who gives it up finds it, or it finds `_stop`
        self.content: Quiet | None = None
        self.size = op.origin.size if op.origin is not None else 0
        self.bytes = 0
        """How many were sent so far."""
        self.resume = ""
        """What the sink needs to go on."""
        self.fetched = False
        """Whether bytes of an `origin` came through here."""
        self.sent_before = False
        """Whether the bucket had it."""
        self.reached = False
        """Whether the store was asked to change anything."""

    def __repr__(self) -> str:
        return f"<Attempt at {self.op.kind.name} {self.op.key!r}, {self.bytes} of {self.size} bytes>"

    def run(self, op: Op) -> Outcome:
        """Do `op`, as it is now. Raises SourceError, LandingError: it failed."""
        self.op, self.resume = op, op.resume
        try:
            return self._delete() if op.kind is OpKind.DELETE else self._put()
        except Stopped:
            return GivenUp()

    def give_up(self) -> None:
        """Stop as soon as can be, reading nothing more. What is in flight may still take effect."""
        self._stop.set()
        with self._lock:
            content = self.content
        if content is not None:
            content.stop()

    def close(self) -> None:
        """Let others write. Idempotent."""
        with self._lock:
            content, self.content = self.content, None
        if content is not None:
            content.close()

    # ---- the sink's Put --------------------------------------------------------------------------

    def stopped(self) -> bool:
        return self._stop.is_set()

    def sent(self, count: int) -> None:
        if self._pace is not None:
            self._pace.take(count, self._stop)
        self.bytes += count

    def remember(self, state: str) -> None:
        step("upload.before.remember")
        self.resume = state
        self.op = self._work.remember(self.op, state)
        step("upload.after.remember")

    # ---- what stands there -----------------------------------------------------------------------

    def _look(self, expected: door.Expected) -> Outcome | door.Expected:
        """What it has come to, or what is to be expected when it is tried again."""
        found = self._sink.find(self.op.key)
        if found is None:
            if self.op.kind is OpKind.DELETE:
                return Settled(None)
            if expected in (door.NOTHING, door.ANYTHING):
                return expected
            # What this came in place of may have been a DELETE of ours, whose answer was lost.
            return Conflicting(None) if self.op.id.endswith(".0") else door.NOTHING
        mark = found.metadata.get(JOURNAL_ID, "")
        if mark == self.op.id and self.op.kind is OpKind.PUT:
            whole = found.info.size == self.size and not self._distrust
            return Settled(found) if whole else found.info.version
        if mark and _lineage(mark) == _lineage(self.op.id):
            return found.info.version
        if expected is door.ANYTHING or (
            expected is not door.NOTHING and door.same(found.info.version, expected)
        ):
            return expected
        return Conflicting(found)

    # ---- DELETE ----------------------------------------------------------------------------------

    def _delete(self) -> Outcome:
        expected = wanted(self.op)
        for _ in range(AT_ONCE):
            answer: Exception | None = None
            if expected is not door.NOTHING:
                try:
                    return self._remove(expected)
                except (VersionChanged, NotFound) as error:  # NotFound may be the bucket: then so says `find`
                    answer = error
            verdict = self._look(expected)
            if isinstance(verdict, Outcome):
                return verdict
            if verdict == expected and answer is not None:
                raise answer  # it should have worked
            expected = verdict
        raise VersionChanged(f"{self.op.key!r} changes each time that it is to be deleted")

    def _remove(self, expected: door.Expected) -> Outcome:
        self._check()
        step("upload.before.delete")
        self.reached = True
        self._sink.delete(self.op.key, expected=expected)
        step("upload.after.delete")
        return Settled(None)

    # ---- PUT -------------------------------------------------------------------------------------

    def _put(self) -> Outcome:
        op = self.op
        if op.landing:
            content = self._work.content(op)
            if content is None:
                return Refused()
            self._hold(content)
            held = self._work.held(op, content)
            if held is not None:
                self.sent_before = True
                return Settled(held)
        metadata = {**self._work.metadata(op), JOURNAL_ID: op.id}
        expected = wanted(op)
        if self._asked or (self._inherited and self._is_worth_asking(expected)):
            verdict = self._look(expected)
            if isinstance(verdict, Outcome):
                return verdict
            expected = verdict
        for _ in range(AT_ONCE):
            self._check()
            try:
                return Settled(self._send(expected, metadata))
            except VersionChanged as error:
                verdict = self._look(expected)
                if isinstance(verdict, Outcome):
                    return verdict
                if verdict == expected and not self._do_without_origin():
                    raise error  # it should have worked
                expected = verdict
        raise VersionChanged(f"{op.key!r} changes each time that it is to be put")

    def _is_worth_asking(self, expected: door.Expected) -> bool:
        """Where an earlier process may have done it: whether to do it again costs more than to ask. Where a
        condition holds it back, it may come to that."""
        return bool(self.op.resume) or expected is door.ANYTHING or self.size >= WORTH_ASKING

    def _send(self, expected: door.Expected, metadata: Mapping[str, str]) -> Stored:
        op = self.op
        if op.origin is not None and not op.landing and self.content is None:
            if self._sink.traits.copies:
                try:
                    step("upload.before.copy")
                    self.reached = True
                    stored = self._sink.copy(op.origin, op.key, expected=expected, metadata=metadata)
                    step("upload.after.copy")
                    return stored
                except (Unsupported, NotFound):
                    pass  # NotFound: the origin is gone, and perhaps in the cache
            self._fetch()
        with self._lock:
            content: door.Content = self.content if self.content is not None else _NoBytes()
        step("upload.before.put")
        self.reached = True
        self.bytes = 0
        stored = self._sink.put(op.key, content, expected=expected, metadata=metadata, put=self)
        step("upload.after.put")
        return stored

    def _do_without_origin(self) -> bool:
        """A copy was refused though its target is as expected: it is the origin that has changed. Its bytes
        may be in the cache. False: that was not it."""
        if self.op.origin is None or self.op.landing or self.content is not None:
            return False
        self._fetch()
        return True

    def _fetch(self) -> None:
        self._hold(self._work.fetch(self.op))
        self.fetched = True

    def _hold(self, content: Quiet) -> None:
        with self._lock:
            self.content, self.size = content, content.size
        if self._stop.is_set():
            content.stop()

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped("it was given up before it began")


class _NoBytes:
    """The content of a directory's marker."""

    size = 0

    def read(self, offset: int, length: int) -> Buffer:
        return b""


def wanted(op: Op) -> door.Expected:
    """What has to stand there, as the sink is told."""
    if isinstance(op.expected, str):
        return door.NOTHING if op.expected == journal.NOTHING else door.ANYTHING
    return op.expected


def _lineage(mark: str) -> str:
    return mark.partition(".")[0]
