"""
What tests of uploading need: something that owes a bucket its content, a sink that goes wrong on
purpose, and a clock whose time passes only by hand.
"""

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from datacache.errors import DatacacheError, LandingBroken, NotFound, Stopped, Unavailable, WrongBytes
from datacache.model import ByteRange, ObjectInfo, Version
from datacache.sources.memory import MemorySink, MemorySource
from datacache.sources.sink import Content, Expected, Put, SinkTraits, Stored, same
from datacache.writing.journal import ANYTHING, NOTHING, Op, OpKind
from datacache.writing.uploader import JOURNAL_ID, Uploader


class SteppedClock:
    """Who waits on it waits, until the test lets that time pass."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._now = 1_000_000.0
        self._waiting: list[float] = []

    def monotonic(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self.wait(threading.Event(), seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        until = self._now + seconds
        with self._changed:
            self._waiting.append(until)
            try:
                while not event.is_set() and self._now < until:
                    self._changed.wait(0.001)  # an event does not tell when it is set
            finally:
                self._waiting.remove(until)
        return event.is_set()

    @property
    def waiting(self) -> list[float]:
        """In how many seconds those who wait would go on by themselves."""
        with self._changed:
            return sorted(until - self._now for until in self._waiting)

    def advance(self, seconds: float) -> None:
        with self._changed:
            self._now += seconds
            self._changed.notify_all()


class Landed:
    """Stands for `landing.Quiet`."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)
        self.stopped = self.closed = False

    def read(self, offset: int, length: int) -> bytes:
        if self.stopped:
            raise Stopped("somebody writes to the file again")
        assert not self.closed
        return self.data[offset : offset + length]

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.closed = True


@dataclass
class File:
    ino: int
    landing: int = 0
    origin: ObjectInfo | None = None


class Noted(dict[int, Op]):
    """Operations by `seq`, and which of them have changed."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: set[int] = set()

    def __setitem__(self, seq: int, op: Op) -> None:
        super().__setitem__(seq, op)
        self.changed.add(seq)

    def __delitem__(self, seq: int) -> None:
        super().__delitem__(seq)
        self.changed.add(seq)


class FakeWork:
    """Files under keys of one mount, and what the bucket is owed for them: the overlay, without names."""

    def __init__(self, clock: object, bucket: MemorySource) -> None:
        self.clock, self.bucket = clock, bucket
        self.uploader: Uploader | None = None
        self.lock = threading.RLock()
        self.pending = Noted()
        self.running: dict[int, Landed | None] = {}
        self.files: dict[str, File] = {}
        self.landed: dict[int, bytes] = {}
        self.known: dict[str, str | Version] = {}
        self.writing: set[int] = set()
        self.parking: dict[int, str] = {}
        self.conflicts: list[tuple[Op, Stored | None]] = []
        self.done: list[tuple[Op, Stored | None]] = []
        self.given_up: list[Op] = []
        self.overwrite = True
        self.broken: DatacacheError | Exception | None = None
        self._numbers = itertools.count(1)

    # What programs do

    def poke(self) -> None:
        if self.uploader is not None:
            self.uploader.poke()

    def add(self, op: Op) -> Op:
        op = op._replace(seq=next(self._numbers), since=op.since or self.clock.wall())
        self.pending[op.seq] = op
        return op

    def _new_id(self) -> str:
        return f"id{next(self._numbers)}.0"

    def _edit(self, op: Op) -> None:
        if op.seq in self.running:
            content = self.running[op.seq]
            if content is not None:
                content.stop()
            assert self.uploader is not None
            self.uploader.stop_op(op.seq)
        if op.resume and self.uploader is not None:
            self.uploader.forget(op)

    def _supersede(self, key: str) -> tuple[str | Version, str, bool]:
        """What the bucket holds under `key`; the id that goes on with that of what it was owed; whether
        something is under way."""
        expected: str | Version | None = None
        mark, under_way = "", False
        for op in [op for op in self.pending.values() if op.key == key]:
            expected = op.expected if expected is None else expected
            lineage, _, count = op.id.partition(".")
            mark = f"{lineage}.{int(count) + 1}"
            if op.seq in self.running:
                under_way = True
                self.pending[op.seq] = op._replace(ino=0)
                self._edit(op)
            else:
                del self.pending[op.seq]
        return (
            self.known.get(key, NOTHING) if expected is None else expected,
            mark or self._new_id(),
            under_way,
        )

    def write(self, key: str, data: bytes) -> int:
        """Create, or rewrite, a file, and close it; `seq` of its PUT."""
        with self.lock:
            file = self.files.get(key)
            if file is not None and file.landing:
                for op in self.pending.values():
                    if op.kind is OpKind.PUT and op.ino == file.ino and op.key == key:
                        lineage, _, count = op.id.partition(".")
                        self.landed[file.landing] = data
                        self.pending[op.seq] = op._replace(id=f"{lineage}.{int(count) + 1}", resume="")
                        self._edit(op)
                        break
                else:
                    file = None
            else:
                file = None
            if file is None:
                expected, mark, _ = self._supersede(key)
                known = self.files.get(key)
                ino, landing = next(self._numbers) if known is None else known.ino, next(self._numbers)
                self.files[key], self.landed[landing] = File(ino, landing), data
                op = self.add(Op(0, mark, OpKind.PUT, ino, 0, key, expected=expected, landing=landing))
        self.poke()
        return op.seq

    def remove(self, key: str) -> None:
        with self.lock:
            file = self.files.pop(key)
            self._orphan(file)
            expected, mark, under_way = self._supersede(key)
            if expected != NOTHING or under_way or not mark.endswith(".0"):
                self.add(Op(0, mark, OpKind.DELETE, 0, 0, key, expected=expected))
        self.poke()

    def _orphan(self, file: File) -> None:
        for op in list(self.pending.values()):
            if op.kind is OpKind.DELETE and op.ino == file.ino:
                self.pending[op.seq] = op._replace(ino=0)

    def rename(self, old: str, new: str) -> None:
        with self.lock:
            there = self.files.get(new)
            if there is not None:
                self._orphan(there)
            file = self.files.pop(old)
            expected, mark, under_way = self._supersede(old)
            if not file.landing:  # nobody waits for an origin here: its bytes are brought first
                file.landing = next(self._numbers)
                assert file.origin is not None
                self.landed[file.landing] = self.read(file.origin)
            before, mark_there, _ = self._supersede(new)
            self.files[new] = replace(file, origin=None)
            self.add(
                Op(0, mark_there, OpKind.PUT, file.ino, 0, new, True, expected=before, landing=file.landing)
            )
            for op in list(self.pending.values()):
                if op.kind is OpKind.DELETE and op.ino == file.ino and op.seq not in self.running:
                    del self.pending[op.seq]
                    self.add(op)
            if expected != NOTHING or under_way or not mark.endswith(".0"):
                self.add(Op(0, mark, OpKind.DELETE, file.ino, 0, old, expected=expected))
        self.poke()

    def read(self, info: ObjectInfo) -> bytes:
        return bytes(self.bucket.read(info, ByteRange(0, info.size))) if info.size else b""

    # Work

    def ops(self) -> list[Op]:
        with self.lock:
            if self.broken is not None:
                raise self.broken
            return list(self.pending.values())

    def changed(self) -> set[int]:
        with self.lock:
            if self.broken is not None:
                raise self.broken
            changed, self.pending.changed = self.pending.changed, set()
            return changed

    def op(self, seq: int) -> Op | None:
        return self.pending.get(seq)

    def parked(self) -> Mapping[int, str]:
        return dict(self.parking)

    def begin(self, op: Op) -> Op | None:
        with self.lock:
            now = self.pending.get(op.seq)
            if now is None or not now.since or op.seq in self.running or op.seq in self.parking:
                return None
            self.running[op.seq] = None
            return now

    def content(self, op: Op) -> Landed | None:
        with self.lock:
            if op.ino in self.writing:
                return None
            if op.landing not in self.landed:
                raise LandingBroken("a landing file cannot be read")
            self.running[op.seq] = content = Landed(self.landed[op.landing])
            return content

    def held(self, op: Op, content: Landed) -> Stored | None:
        return None

    def fetch(self, op: Op) -> Landed:
        assert op.origin is not None
        return Landed(self.read(op.origin))

    def metadata(self, op: Op) -> Mapping[str, str]:
        return {"mtime": "1.5"}

    def remember(self, op: Op, resume: str) -> Op:
        with self.lock:
            now = self.pending.get(op.seq)
            if now is None or now.id != op.id:
                return op
            self.pending[op.seq] = changed = now._replace(resume=resume)
            return changed

    def _done(self, op: Op, there: str | Version) -> None:
        del self.pending[op.seq]
        self.known[op.key] = there
        for seq, later in self.pending.items():
            if seq > op.seq and later.key == op.key:
                self.pending[seq] = later._replace(expected=there)
                break

    def settled(self, op: Op, stored: Stored | None, content: Landed | None) -> None:
        with self.lock:
            assert op.seq in self.running
            assert content is None or not content.closed
            del self.running[op.seq]
            now = self.pending.get(op.seq)
            self.done.append((op, stored))
            there = NOTHING if stored is None else stored.info.version
            if now is not None and now.kind is OpKind.PUT and now.id != op.id and now.ino:
                self.pending[op.seq] = now._replace(expected=there, resume="")
            elif now is not None:
                self._done(now, there)
                file = self.files.get(now.key)
                if stored is not None and file is not None and file.landing == now.landing:
                    self.files[now.key] = File(file.ino, origin=stored.info)
        self.poke()

    def stopped(self, op: Op) -> None:
        with self.lock:
            del self.running[op.seq]
            self.given_up.append(op)
            now = self.pending.get(op.seq)
            if now is not None and now.kind is OpKind.PUT and not now.ino:
                self._done(now, now.expected)
        self.poke()

    def conflict(self, op: Op, found: Stored | None) -> None:
        with self.lock:
            del self.running[op.seq]
            now = self.pending[op.seq]
            self.conflicts.append((op, found))
            there = NOTHING if found is None else found.info.version
            if now.kind is OpKind.DELETE:
                self._done(now, there)
            elif self.overwrite:
                lineage, _, count = now.id.partition(".")
                self.pending[op.seq] = now._replace(expected=there, id=f"{lineage}.{int(count) + 1}")
            else:
                self.parking[op.seq] = "somebody else has changed the object"
        self.poke()


@dataclass(frozen=True)
class Lost:
    """The call takes effect, and then fails with `error`."""

    error: Exception


@dataclass(frozen=True)
class Fails:
    """The call fails with `error`, without effect."""

    error: Exception


@dataclass(frozen=True)
class Meanwhile:
    """`action` happens, and then the call."""

    action: Callable[[], object]


@dataclass(frozen=True)
class Afterwards:
    """The call takes effect, then `action` happens, and then it answers, or fails with `error`."""

    action: Callable[[], object]
    error: Exception | None = None


@dataclass(frozen=True)
class Damages:
    """A put that stores other bytes, and says so."""


class Held:
    """A call that waits until the test lets it go on, or until the put is stopped."""

    def __init__(self) -> None:
        self.there, self.go_on = threading.Event(), threading.Event()


Fault = Lost | Fails | Meanwhile | Afterwards | Damages | Held | None


class FaultySink:
    """A sink in memory with scripted faults for "put", "copy", "delete", "find" and "abandon"."""

    def __init__(
        self, bucket: MemorySource, *, part_size: int = 1 << 20, copies: bool = True, verified: str = ""
    ) -> None:
        self.inner = MemorySink(bucket, part_size=part_size)
        self.bucket = bucket
        self.traits = SinkTraits(conditional=True, copies=copies, resumable=True, largest=1 << 30)
        self.verified = verified
        self.script: dict[str, deque[Fault]] = {
            name: deque() for name in ("put", "copy", "delete", "find", "abandon")
        }
        self.away: Exception | None = None
        self.calls: list[tuple[str, str]] = []
        self.effects: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return self.inner.uri

    def add(self, operation: str, *faults: Fault) -> None:
        with self._lock:
            self.script[operation].extend(faults)

    def put_so_far(self) -> dict[str, int]:
        """How often each journal id changed the bucket."""
        with self._lock:
            return dict(self.effects)

    def asked(self, operation: str) -> int:
        return sum(name == operation for name, _ in self.calls)

    def _call(self, operation: str, key: str, act: Callable[[], object], *, put: Put | None = None) -> object:
        with self._lock:
            self.calls.append((operation, key))
            fault = self.script[operation].popleft() if self.script[operation] else None
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.away is not None:
                raise self.away
            if isinstance(fault, Fails):
                raise fault.error
            if isinstance(fault, Meanwhile):
                fault.action()
            if isinstance(fault, Held):
                fault.there.set()
                while not fault.go_on.wait(0.001):
                    if put is not None and put.stopped():
                        raise Stopped("given up")
            result = act()
            if isinstance(fault, Afterwards):
                fault.action()
            if isinstance(fault, Lost | Afterwards) and fault.error is not None:
                raise fault.error
            return result
        finally:
            with self._lock:
                self.at_once -= 1

    def put(
        self, key: str, content: Content, *, expected: Expected, metadata: Mapping[str, str], put: Put
    ) -> Stored:
        def act() -> Stored:
            stored = self.inner.put(key, content, expected=expected, metadata=metadata, put=put)
            self._took_effect(metadata[JOURNAL_ID], stored, expected)
            return stored._replace(verified=self.verified or stored.verified)

        def damage() -> Stored:
            self.bucket.put(key, bytes(content.size), expected=expected, metadata=metadata)
            raise WrongBytes("what arrived is not what was sent")

        with self._lock:
            damaged = bool(self.script["put"]) and isinstance(self.script["put"][0], Damages)
        found = self._call("put", key, damage if damaged else act, put=put)
        assert isinstance(found, Stored)
        return found

    def copy(
        self, origin: ObjectInfo, key: str, *, expected: Expected, metadata: Mapping[str, str]
    ) -> Stored:
        def act() -> Stored:
            stored = self.inner.copy(origin, key, expected=expected, metadata=metadata)
            self._took_effect(metadata[JOURNAL_ID], stored, expected)
            return stored

        found = self._call("copy", key, act)
        assert isinstance(found, Stored)
        return found

    def _took_effect(self, mark: str, stored: Stored, expected: Expected) -> None:
        # The same bytes in place of the same bytes are none: no condition can tell, so it may come twice.
        if not isinstance(expected, Version) or not same(stored.info.version, expected):
            with self._lock:
                self.effects[mark] += 1

    def delete(self, key: str, *, expected: Expected) -> None:
        self._call("delete", key, lambda: self.inner.delete(key, expected=expected))

    def find(self, key: str) -> Stored | None:
        found = self._call("find", key, lambda: self.inner.find(key))
        assert found is None or isinstance(found, Stored)
        return found

    def abandon(self, key: str, resume: str) -> None:
        self._call("abandon", key, lambda: self.inner.abandon(key, resume))

    def close(self) -> None:
        """Nothing to let go of."""


def objects(bucket: MemorySource) -> dict[str, bytes]:
    """All that a bucket holds."""
    found = {}
    for page in bucket.list("", recursive=True):
        for info in page.objects:
            found[info.key] = bytes(bucket.read(info, ByteRange(0, info.size))) if info.size else b""
    return found


def gone(bucket: MemorySource, key: str) -> bool:
    try:
        bucket.stat(key)
    except NotFound:
        return True
    return False


UNREACHABLE = Unavailable("the network is unreachable")
__all__ = [
    "ANYTHING", "UNREACHABLE", "Afterwards", "Damages", "FakeWork", "Fails", "FaultySink", "Held", "Landed",
    "Lost", "Meanwhile", "SteppedClock", "gone", "objects",
]  # fmt: skip
