"""
A source around a source that goes wrong on purpose: the public fake for whatever must survive that.

A script says, per operation ("list", "stat", "read"), what happens to each call in turn; where it
ends, or says None, the call goes through. Faults are values, so a test reads as a table.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from datacache.errors import SourceError
from datacache.model import Buffer, ByteRange, ObjectInfo
from datacache.sources.sink import Content, Expected, Put, Sink, SinkTraits, Stored
from datacache.sources.source import Page, Source, Traits


@dataclass(frozen=True)
class Fail:
    """Raise `error`; a listing does so after `pages` pages."""

    error: SourceError
    pages: int = 0


@dataclass(frozen=True)
class Truncate:
    """Answer a read without its last `by` bytes."""

    by: int = 1


@dataclass(frozen=True)
class Extend:
    """Answer a read with `by` bytes more: those that follow in the object, as ossfs does, or zeros."""

    by: int = 1


@dataclass(frozen=True)
class Shift:
    """Answer a read with as many bytes, from `by` further on (or, at the end, further back)."""

    by: int = 1


@dataclass(frozen=True)
class Flip:
    """Answer a read with the lowest bit of byte `at` inverted."""

    at: int = 0


@dataclass(frozen=True)
class Before:
    """Call `action`, then answer: an object that changes between two requests."""

    action: Callable[[], object]


@dataclass(frozen=True)
class Midway:
    """Read half, call `action`, read the rest: an object that changes under a read."""

    action: Callable[[], object]


@dataclass(frozen=True)
class Hold:
    """Wait for `event`, at most `timeout` seconds, then answer: a stall that a test ends."""

    event: threading.Event
    timeout: float = 30.0


@dataclass(frozen=True)
class Lost:
    """Do what a sink was asked for, then raise `error`: the answer was lost."""

    error: SourceError


@dataclass(frozen=True)
class StopAfter:
    """Let a put believe that it was stopped once `count` bytes were sent."""

    count: int = 0


Fault = Fail | Truncate | Extend | Shift | Flip | Before | Midway | Hold | Lost | StopAfter
Script = Mapping[str, Iterable[Fault | None]]


class FaultySource:
    """`inner` with scripted faults. `calls` counts by operation, those that failed included."""

    def __init__(self, inner: Source, script: Script | None = None) -> None:
        self.inner = inner
        # Guards what follows; an iterator of a script may be drawn from by many threads.
        self._lock = threading.Lock()
        self._script = {operation: iter(faults) for operation, faults in (script or {}).items()}
        self._added: dict[str, deque[Fault | None]] = {"list": deque(), "stat": deque(), "read": deque()}
        self.calls: Counter[str] = Counter()
        if unknown := self._script.keys() - self._added.keys():
            raise ValueError(f"no such operations: {sorted(unknown)}")

    def __repr__(self) -> str:
        return f"<FaultySource {self.inner!r}>"

    @property
    def uri(self) -> str:
        return self.inner.uri

    @property
    def traits(self) -> Traits:
        return self.inner.traits

    def add(self, operation: str, *faults: Fault | None) -> None:
        """Let these befall the next calls of `operation`, after what the script still holds."""
        with self._lock:
            self._added[operation].extend(faults)

    def _next(self, operation: str) -> Fault | None:
        with self._lock:
            self.calls[operation] += 1
            for fault in self._script.get(operation, ()):
                return fault
            return self._added[operation].popleft() if self._added[operation] else None

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        fault = self._next("list")
        _act(fault, at_once=isinstance(fault, Fail) and fault.pages == 0)
        for number, page in enumerate(self.inner.list(prefix, recursive=recursive, versions=versions)):
            if isinstance(fault, Fail) and number >= fault.pages:
                raise fault.error
            yield page
        if isinstance(fault, Fail):
            raise fault.error

    def stat(self, key: str) -> ObjectInfo:
        _act(self._next("stat"))
        return self.inner.stat(key)

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        fault = self._next("read")
        _act(fault)

        def ask(start: int, stop: int) -> bytes:
            wanted = ByteRange(start, stop).clip(info.size)
            return bytes(self.inner.read(info, wanted)) if wanted.length > 0 else b""

        match fault:
            case Truncate(by):
                return ask(span.start, span.stop - by)
            case Extend(by):
                return ask(span.start, span.stop + by).ljust(span.length + by, b"\0")
            case Shift(by):
                by = by if span.stop + by <= info.size else -min(by, span.start)
                return ask(span.start + by, span.stop + by)
            case Flip(at):
                data = bytearray(ask(*span))
                data[at] ^= 1
                return data
            case Midway(action):
                middle = span.start + span.length // 2
                first = ask(span.start, middle)
                action()
                return first + ask(middle, span.stop)
        return self.inner.read(info, span)

    def close(self) -> None:
        self.inner.close()


def _act(fault: Fault | None, *, at_once: bool = True) -> None:
    """The part of a fault that comes before the answer."""
    match fault:
        case Fail(error) if at_once:
            raise error
        case Before(action):
            action()
        case Hold(event, timeout):
            event.wait(timeout)


class FaultySink:
    """`inner` with scripted faults, per operation ("check_writable", "put", "copy", "delete", "find",
    "abandon"): Fail, Before and Hold come before the effect, Lost after it, StopAfter in a put."""

    def __init__(self, inner: Sink, script: Script | None = None) -> None:
        self.inner = inner
        self._lock = threading.Lock()  # guards what follows
        operations = ("check_writable", "put", "copy", "delete", "find", "abandon")
        self._faults = {operation: deque((script or {}).get(operation, ())) for operation in operations}
        self.calls: Counter[str] = Counter()
        if unknown := (script or {}).keys() - self._faults.keys():
            raise ValueError(f"no such operations: {sorted(unknown)}")

    def __repr__(self) -> str:
        return f"<FaultySink {self.inner!r}>"

    @property
    def uri(self) -> str:
        return self.inner.uri

    @property
    def traits(self) -> SinkTraits:
        return self.inner.traits

    def accepts(self, key: str) -> bool:
        return self.inner.accepts(key)

    def add(self, operation: str, *faults: Fault | None) -> None:
        """Let these befall the next calls of `operation`, after what the script still holds."""
        with self._lock:
            self._faults[operation].extend(faults)

    def check_writable(self) -> None:
        with self._befalling("check_writable"):
            self.inner.check_writable()

    def put(
        self, key: str, content: Content, *, expected: Expected, metadata: Mapping[str, str], put: Put
    ) -> Stored:
        with self._befalling("put") as fault:
            if isinstance(fault, StopAfter):
                put = _Stopping(put, fault.count)
            return self.inner.put(key, content, expected=expected, metadata=metadata, put=put)

    def copy(
        self, origin: ObjectInfo, key: str, *, expected: Expected, metadata: Mapping[str, str]
    ) -> Stored:
        with self._befalling("copy"):
            return self.inner.copy(origin, key, expected=expected, metadata=metadata)

    def delete(self, key: str, *, expected: Expected) -> None:
        with self._befalling("delete"):
            self.inner.delete(key, expected=expected)

    def find(self, key: str) -> Stored | None:
        with self._befalling("find"):
            return self.inner.find(key)

    def abandon(self, key: str, resume: str) -> None:
        with self._befalling("abandon"):
            self.inner.abandon(key, resume)

    def close(self) -> None:
        self.inner.close()

    @contextmanager
    def _befalling(self, operation: str) -> Iterator[Fault | None]:
        with self._lock:
            self.calls[operation] += 1
            fault = self._faults[operation].popleft() if self._faults[operation] else None
        _act(fault)
        yield fault
        if isinstance(fault, Lost):
            raise fault.error


class _Stopping:
    """A put that is stopped after so many bytes."""

    def __init__(self, inner: Put, count: int) -> None:
        self._inner, self._left = inner, count

    @property
    def resume(self) -> str:
        return self._inner.resume

    def stopped(self) -> bool:
        return self._left <= 0 or self._inner.stopped()

    def sent(self, count: int) -> None:
        self._left -= count
        self._inner.sent(count)

    def remember(self, state: str) -> None:
        self._inner.remember(state)
