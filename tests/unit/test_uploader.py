"""Paying the bucket: at least once with one effect, in order, for as long as it takes."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from datacache.clock import VirtualClock
from datacache.config.settings import UploadOrder, UploadSettings
from datacache.errors import (
    CredentialsExpired,
    Denied,
    LandingBroken,
    NotFound,
    Unavailable,
    Unsupported,
    VersionChanged,
    WrongBytes,
)
from datacache.model import ObjectInfo
from datacache.sources.memory import MemorySource
from datacache.writing import steps
from datacache.writing import uploader as uploading
from datacache.writing.journal import ANYTHING, NOTHING, Op, OpKind
from datacache.writing.uploader import JOURNAL_ID, LOOK_EVERY, Uploader
from tests.conftest import AnnouncedLogs
from tests.support.reading import until
from tests.support.uploading import (
    UNREACHABLE,
    Damages,
    Fails,
    FakeWork,
    FaultySink,
    Held,
    Lost,
    Meanwhile,
    SteppedClock,
    gone,
    objects,
)


@dataclass
class Bench:
    """An uploader between what is owed and a bucket."""

    clock: Any
    bucket: MemorySource = field(default_factory=MemorySource)

    def __post_init__(self) -> None:
        self.work = FakeWork(self.clock, self.bucket)
        self.sink = FaultySink(self.bucket)
        self.uploaders: list[Uploader] = []

    def start(
        self, *, sinks: list[FaultySink] | None = None, jitter: float = 1.0, **settings: Any
    ) -> Uploader:
        settings.setdefault("concurrency", 1)
        uploader = Uploader(
            self.work, sinks or [self.sink], UploadSettings(**settings), self.clock, jitter=lambda: jitter
        )
        self.uploaders.append(uploader)
        self.work.uploader = uploader
        uploader.poke()
        return uploader

    def stored(self, key: str) -> bytes:
        return objects(self.bucket)[key]

    def write_as_somebody_else(self, key: str, data: bytes = b"theirs") -> ObjectInfo:
        return self.bucket.put(key, data)

    def holding(self, key: str, data: bytes = b"before") -> ObjectInfo:
        """The bucket holds this, and it is known."""
        info = self.bucket.put(key, data)
        self.work.known[key] = info.version
        return info


@pytest.fixture
def bench(clock: VirtualClock) -> Iterator[Bench]:
    """Time passes by itself whenever somebody waits."""
    bench = Bench(clock)
    yield bench
    for uploader in bench.uploaders:
        uploader.close()


@pytest.fixture
def stepped() -> Iterator[Bench]:
    """Time passes only by hand."""
    bench = Bench(SteppedClock())
    yield bench
    for uploader in bench.uploaders:
        uploader.close()


def idle(uploader: Uploader) -> Callable[[], bool]:
    return lambda: "0 running" in repr(uploader) and "0 threads" in repr(uploader)


# ---- what is paid --------------------------------------------------------------------------------


def test_what_is_owed_gets_there_with_its_journal_id(bench: Bench) -> None:
    bench.work.write("a", b"one")
    op = bench.work.ops()[0]
    uploader = bench.start()
    assert uploader.flush()
    found = bench.sink.find("a")
    assert found is not None and found.metadata == {"mtime": "1.5", JOURNAL_ID: op.id}
    assert bench.stored("a") == b"one"
    bench.work.remove("a")
    assert uploader.flush()
    assert gone(bench.bucket, "a")
    stats = uploader.stats()
    assert (stats.uploads, stats.deletes, stats.bytes, stats.pending) == (1, 1, 3, 0)


def test_there_are_no_threads_while_nothing_is_owed_and_no_more_than_asked_for(bench: Bench) -> None:
    uploader = bench.start(concurrency=3)
    until(idle(uploader))
    held = [Held() for _ in range(3)]
    bench.sink.add("put", *held)
    for n in range(8):
        bench.work.write(f"f{n}", b"x")
    for one in held:
        assert one.there.wait(10)
    assert "3 running" in repr(uploader) and "3 threads" in repr(uploader)
    for one in held:
        one.go_on.set()
    assert uploader.flush()
    until(idle(uploader))
    assert bench.sink.most_at_once == 3
    assert len(objects(bench.bucket)) == 8


def test_a_directory_is_an_empty_object(bench: Bench) -> None:
    bench.work.add(Op(0, "d.0", OpKind.PUT, 5, 0, "dir/", expected=ANYTHING))
    assert bench.start().flush()
    assert bench.stored("dir/") == b""


def test_a_rename_is_copied_by_the_store_and_the_old_name_goes_afterwards(bench: Bench) -> None:
    info = bench.holding("old")
    bench.work.add(Op(0, "p.0", OpKind.PUT, 5, 0, "new", True, origin=info))
    bench.work.add(Op(0, "d.0", OpKind.DELETE, 5, 0, "old", expected=info.version))
    uploader = bench.start(concurrency=4)
    assert uploader.flush()
    assert objects(bench.bucket) == {"new": b"before"}
    assert [name for name, _ in bench.sink.calls] == ["copy", "delete"]
    assert uploader.stats().copies == 1


@pytest.mark.parametrize("how", ["it never copies", "not this", "the origin has gone", "the origin changed"])
def test_where_the_store_does_not_copy_the_bytes_go_through_here(bench: Bench, how: str) -> None:
    info = bench.holding("old")
    if how == "it never copies":
        bench.sink = FaultySink(bench.bucket, copies=False)
    elif how == "not this":
        bench.sink.add("copy", Fails(Unsupported("larger than 5 GiB")))
    elif how == "the origin has gone":
        bench.sink.add("copy", Fails(NotFound("no such origin")))
    else:
        bench.sink.add("copy", Fails(VersionChanged("the origin is another")))
    bench.work.add(Op(0, "p.0", OpKind.PUT, 5, 0, "new", True, origin=info))
    uploader = bench.start()
    assert uploader.flush()
    assert bench.stored("new") == b"before"
    assert bench.sink.asked("put") == 1
    assert (uploader.stats().copies, uploader.stats().uploads) == (0, 1)


def test_what_was_only_measured_is_counted(bench: Bench) -> None:
    bench.sink = FaultySink(bench.bucket, verified="size")
    bench.work.write("a", b"one")
    uploader = bench.start()
    assert uploader.flush()
    assert uploader.stats().unverified == 1


# ---- answers that get lost -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [UNREACHABLE, WrongBytes("cut off"), VersionChanged("by ourselves")])
def test_a_lost_answer_is_settled_by_asking(bench: Bench, logs: AnnouncedLogs, error: Exception) -> None:
    """A put whose answer was lost is settled by asking the store, and has one effect.

    A put that took effect is not made again, whatever was said of it; but after wrong bytes what is there
    is not believed."""
    logs.expect("uploads to memory://test do not get through")
    logs.expect("is tried again")
    bench.sink.add("put", Lost(error))
    bench.work.write("a", b"one")
    mark = bench.work.ops()[0].id
    assert bench.start().flush()
    assert bench.stored("a") == b"one"
    assert bench.sink.effects[mark] == 1
    assert bench.sink.asked("put") == (2 if isinstance(error, WrongBytes) else 1)
    assert bench.sink.asked("find") == 1
    assert not bench.work.conflicts


def test_an_effect_before_a_death_is_found_afterwards(bench: Bench) -> None:
    """The process died after the put and before its settlement: the condition of the next put says so."""
    bench.work.write("a", b"one")
    op = bench.work.ops()[0]
    bench.bucket.put("a", b"one", metadata={JOURNAL_ID: op.id})
    assert bench.start().flush()
    assert (bench.sink.asked("put"), bench.sink.asked("find")) == (1, 1)
    assert [done.id for done, _ in bench.work.done] == [op.id]


def test_an_effect_that_changed_nothing_may_come_twice(bench: Bench) -> None:
    """A file that was renamed away and back is put where the same bytes are: the condition holds before and
    after, so after a death it is done again. The same bytes, under the same id."""
    bench.work.write("a", b"one")
    assert bench.start().flush()
    bench.uploaders[-1].close()
    bench.work.rename("a", "b")
    bench.work.rename("b", "a")
    (op,) = (op for op in bench.work.ops() if op.kind is OpKind.PUT)
    bench.bucket.put("a", b"one", metadata={JOURNAL_ID: op.id})  # ... and nobody lived to hear of it
    assert bench.start().flush()
    found = bench.sink.find("a")
    assert found is not None and found.metadata[JOURNAL_ID] == op.id and bench.stored("a") == b"one"
    assert (bench.sink.asked("put"), bench.sink.effects[op.id]) == (2, 0)
    assert not bench.work.conflicts


@pytest.mark.parametrize("why", ["unconditional", "resumed"])
def test_what_is_not_held_back_or_costs_much_is_asked_for_first_after_a_restart(
    bench: Bench, why: str
) -> None:
    op = Op(
        0, "p.0", OpKind.PUT, 5, 0, "a", expected=ANYTHING if why == "unconditional" else NOTHING, landing=9,
        resume="" if why == "unconditional" else "upload-1",
    )  # fmt: skip
    bench.work.add(op)
    bench.work.landed[9] = b"one"
    bench.bucket.put("a", b"one", metadata={JOURNAL_ID: "p.0"})
    assert bench.start().flush()
    assert (bench.sink.asked("put"), bench.sink.asked("find")) == (0, 1)


def test_what_arrived_damaged_is_replaced(bench: Bench, logs: AnnouncedLogs) -> None:
    logs.expect("what arrived is not what was sent")
    bench.sink.add("put", Damages())
    bench.work.write("a", b"one")
    assert bench.start().flush()
    assert bench.stored("a") == b"one"


def test_ours_but_cut_short_is_replaced(bench: Bench) -> None:
    bench.work.write("a", b"all of it")
    bench.bucket.put("a", b"all", metadata={JOURNAL_ID: bench.work.ops()[0].id})
    assert bench.start().flush()
    assert bench.stored("a") == b"all of it"
    assert not bench.work.conflicts


def test_an_earlier_content_of_ours_is_no_conflict(bench: Bench) -> None:
    """Its answer was lost, and then the file was written again."""
    bench.work.write("a", b"one")
    bench.bucket.put("a", b"one", metadata={JOURNAL_ID: bench.work.ops()[0].id})
    bench.work.write("a", b"two!")
    assert bench.start().flush()
    assert bench.stored("a") == b"two!"
    assert not bench.work.conflicts


def test_an_earlier_content_of_ours_can_be_deleted(bench: Bench) -> None:
    bench.work.add(Op(0, "x.1", OpKind.DELETE, 0, 0, "a", expected=NOTHING))
    bench.bucket.put("a", b"one", metadata={JOURNAL_ID: "x.0"})
    assert bench.start().flush()
    assert gone(bench.bucket, "a")
    assert not bench.work.conflicts


# ---- others --------------------------------------------------------------------------------------


def test_somebody_else_was_there_first(bench: Bench) -> None:
    bench.work.overwrite = False
    theirs = bench.write_as_somebody_else("a")
    seq = bench.work.write("a", b"ours")
    uploader = bench.start()
    report = uploader.flush()
    assert not report and report.count == 1, "a flush does not wait for a person"
    assert report.left[0].why == "somebody else has changed the object"
    [(op, found)] = bench.work.conflicts
    assert op.seq == seq and found is not None and found.info == theirs
    assert bench.stored("a") == b"theirs"
    assert uploader.stats().conflicts == 1
    bench.work.write("b", b"x")
    assert uploader.flush(matches=lambda op: op.key == "b"), "others go on"


def test_whoever_overwrites_does_so_knowingly(bench: Bench) -> None:
    bench.work.write("a", b"ours")
    bench.sink.add("put", Meanwhile(lambda: bench.write_as_somebody_else("a")))
    assert bench.start().flush()
    assert len(bench.work.conflicts) == 1
    assert bench.stored("a") == b"ours"


def test_somebody_else_has_removed_it(bench: Bench) -> None:
    bench.holding("a")
    bench.bucket.delete("a")
    bench.work.write("a", b"ours")
    assert bench.start().flush()
    assert [found for _, found in bench.work.conflicts] == [None]
    assert bench.stored("a") == b"ours"


def test_what_somebody_else_has_put_there_is_not_deleted(bench: Bench) -> None:
    info = bench.holding("a")
    bench.write_as_somebody_else("a")
    bench.work.add(Op(0, "d.0", OpKind.DELETE, 0, 0, "a", expected=info.version))
    assert bench.start().flush()
    assert bench.stored("a") == b"theirs"
    assert len(bench.work.conflicts) == 1


@pytest.mark.parametrize("how", ["gone", "bucket says so", "lost answer"])
def test_what_is_gone_is_deleted(bench: Bench, logs: AnnouncedLogs, how: str) -> None:
    logs.expect("do not get through")
    info = bench.holding("a")
    if how == "lost answer":
        bench.sink.add("delete", Lost(UNREACHABLE))
    else:
        bench.bucket.delete("a")
        bench.sink.add("delete", *([Fails(NotFound("no such object"))] if how == "bucket says so" else []))
    bench.work.add(Op(0, "d.0", OpKind.DELETE, 0, 0, "a", expected=info.version))
    assert bench.start().flush()
    assert not bench.work.conflicts and not bench.work.ops()


# ---- writers -------------------------------------------------------------------------------------


def test_what_somebody_writes_to_is_looked_at_again_in_a_while(stepped: Bench) -> None:
    seq = stepped.work.write("a", b"one")
    ino = stepped.work.ops()[0].ino
    stepped.work.writing.add(ino)
    uploader = stepped.start()
    for pause in (1, 2, 4, 5, 5):
        until(lambda pause=pause: stepped.clock.waiting == [pause])
        stepped.clock.advance(pause)
    until(lambda: stepped.clock.waiting == [5])
    stats = uploader.stats()
    assert (stats.refused, stats.failing_count, stats.failures) == (1, 0, 0), "it is no error"
    assert uploader.waiting()[0].why == "open for writing, or mapped"
    stepped.work.writing.clear()
    assert uploader.flush(up_to=seq), "a flush looks at once"
    assert stepped.stored("a") == b"one"


def test_a_writer_stops_the_upload_at_once(bench: Bench) -> None:
    held = Held()
    bench.sink.add("put", held)
    bench.work.write("a", b"one")
    first = bench.work.ops()[0].id
    uploader = bench.start()
    assert held.there.wait(10)
    bench.work.write("a", b"two!")
    assert uploader.flush()
    assert bench.stored("a") == b"two!"
    assert bench.sink.effects[first] == 0
    assert [op.id for op in bench.work.given_up] == [first]


def test_what_was_in_flight_may_still_get_there_whole(bench: Bench) -> None:
    arrived = threading.Event()
    bench.sink.add("put", Lost(Unavailable("the connection was closed")))
    bench.work.write("a", b"one")

    def write_again() -> None:
        bench.work.write("a", b"two!")
        arrived.set()

    bench.sink.add("find", Meanwhile(write_again))
    uploader = bench.start()
    assert arrived.wait(10)
    assert uploader.flush()
    assert bench.stored("a") == b"two!"
    assert not bench.work.conflicts


def test_close_stops_what_is_under_way_and_keeps_it_for_the_next(bench: Bench) -> None:
    held = Held()
    bench.sink = FaultySink(bench.bucket, part_size=4)
    bench.work.write("a", b"0123456789")
    op = bench.work.ops()[0]
    bench.work.pending[op.seq] = bench.work.remember(op, "upload-1")
    bench.sink.add("put", held)
    uploader = bench.start()
    assert held.there.wait(10)
    uploader.close()
    assert [op.resume for op in bench.work.ops()] == ["upload-1"]
    assert not objects(bench.bucket)
    assert bench.sink.asked("abandon") == 0
    assert bench.start().flush()
    assert bench.stored("a") == b"0123456789"


def test_parts_that_nobody_goes_on_with_are_let_go_of(bench: Bench) -> None:
    bench.sink = FaultySink(bench.bucket, part_size=4)
    upload = bench.bucket._begin("a")
    bench.sink.add("abandon", Fails(UNREACHABLE))
    uploader = bench.start()
    uploader.forget(Op(3, "p.0", OpKind.PUT, 5, 0, "a", resume=upload))
    until(lambda: not bench.bucket.uploads)
    assert bench.sink.asked("abandon") == 2
    until(idle(uploader))


def test_parts_of_a_content_that_is_no_more_are_let_go_of(bench: Bench) -> None:
    bench.sink = FaultySink(bench.bucket, part_size=4)
    bench.work.write("a", b"0123456789")
    again = threading.Event()

    def write_again(name: str) -> None:
        if name == "upload.after.remember" and not again.is_set():
            again.set()
            bench.work.write("a", b"x")

    steps.arm(write_again)
    try:
        uploader = bench.start()
        assert again.wait(10) and uploader.flush()
        until(lambda: not bench.bucket.uploads)
    finally:
        steps.arm(None)
    assert bench.stored("a") == b"x"


# ---- failures and time ---------------------------------------------------------------------------


def test_it_is_tried_for_ever_with_growing_pauses(stepped: Bench, logs: AnnouncedLogs) -> None:
    logs.expect("put of 'a' failed, and is tried again: a landing file cannot be read")
    stepped.work.write("a", b"one")
    data = dict(stepped.work.landed)
    stepped.work.landed.clear()
    uploader = stepped.start(jitter=1.0)
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        until(lambda pause=pause: stepped.clock.waiting == [pause])
        stepped.clock.advance(pause)
    until(lambda: stepped.clock.waiting == [60])
    stats = uploader.stats()
    assert stats.failing[0].why == "a landing file cannot be read" and stats.failing_count == 1
    assert uploader.reasons(uploader.stats().failing) == ["upload of 'a': a landing file cannot be read"]
    assert len(logs.messages()) == 1, "told once"
    assert stats.oldest == 183
    stepped.work.landed.update(data)
    stepped.clock.advance(60)
    until(idle(uploader))
    assert stepped.stored("a") == b"one"
    assert uploader.stats().failing_count == 0


def test_a_store_that_is_away_is_asked_by_one_at_a_time(stepped: Bench, logs: AnnouncedLogs) -> None:
    logs.expect("uploads to memory://test do not get through; one at a time is tried until they do")
    stepped.sink.away = UNREACHABLE
    for n in range(50):
        stepped.work.write(f"f{n}", b"x")
    uploader = stepped.start(concurrency=8)
    until(lambda: len(stepped.clock.waiting) == 1 and "0 running" in repr(uploader))
    first = len(stepped.sink.calls)
    assert first <= 8, "those that were under way when it was found out"
    stepped.sink.most_at_once = 0
    for pause in (1, 2, 4, 8, 16, 32, 60):
        before = len(stepped.sink.calls)
        stepped.clock.advance(pause)
        until(lambda before=before: len(stepped.sink.calls) > before and len(stepped.clock.waiting) == 1)
    assert len(stepped.sink.calls) <= first + 8 and stepped.sink.most_at_once == 1
    assert uploader.stats().away == ("memory://test: the network is unreachable",)
    assert "unreachable" in uploader.waiting()[-1].why
    stepped.sink.away = None
    stepped.clock.advance(60)
    assert uploader.flush()
    assert len(objects(stepped.bucket)) == 50
    assert uploader.stats().away == ()


def test_one_object_that_fails_does_not_make_a_store_away(stepped: Bench) -> None:
    slow = Held()
    stepped.sink.add("put", slow)
    stepped.work.write("a", b"x")
    uploader = stepped.start(concurrency=2)
    assert slow.there.wait(10)
    stepped.work.write("b", b"x")
    until(lambda: not gone(stepped.bucket, "b"))
    stepped.sink.script["put"].clear()
    slow.go_on.set()
    until(lambda: not gone(stepped.bucket, "a"))
    assert uploader.stats().away == ()


def test_other_mounts_go_on(stepped: Bench, logs: AnnouncedLogs) -> None:
    logs.expect("do not get through")
    stepped.sink.away = UNREACHABLE
    other = FaultySink(MemorySource("memory://other"))
    stepped.work.write("a", b"x")
    stepped.work.add(Op(0, "p.0", OpKind.PUT, 7, 1, "b"))
    uploader = stepped.start(sinks=[stepped.sink, other])
    until(lambda: not gone(other.bucket, "b"))
    assert uploader.stats().away == ("memory://test: the network is unreachable",)


def test_the_store_s_own_wish_is_kept(stepped: Bench, logs: AnnouncedLogs) -> None:
    logs.expect("do not get through")
    stepped.sink.add("put", Fails(Unavailable("slow down", retry_after=17)))
    stepped.work.write("a", b"x")
    stepped.start()
    until(lambda: stepped.clock.waiting == [17])


@pytest.mark.parametrize("error", [Denied("no"), CredentialsExpired("not any more"), NotFound("no bucket")])
def test_a_store_that_refuses_everything_is_left_alone(
    stepped: Bench, logs: AnnouncedLogs, error: Exception
) -> None:
    logs.expect("failed, and is tried again")
    logs.expect("do not get through")
    stepped.sink.away = error
    for n in range(100):
        stepped.work.write(f"f{n}", b"x")
    uploader = stepped.start()
    until(lambda: bool(uploader.stats().away))
    until(lambda: len(stepped.clock.waiting) == 1)
    assert len(stepped.sink.calls) == 8
    stepped.sink.away = None
    stepped.clock.advance(1)
    until(lambda: not uploader.stats().away)


def test_secrets_are_not_told(stepped: Bench, logs: AnnouncedLogs) -> None:
    logs.expect("is tried again")
    stepped.sink.add("put", Fails(Denied("refused: token=abcdef signature=123456")))
    stepped.work.write("a", b"x")
    uploader = stepped.start()
    until(lambda: uploader.stats().failing_count == 1)
    assert "abcdef" not in repr(uploader.stats()) and "123456" not in str(uploader.status())
    assert all("abcdef" not in message for message in logs.messages())


def test_what_nobody_foresaw_is_logged_once_and_tried_again(bench: Bench, logs: AnnouncedLogs) -> None:
    logs.expect("put of 'a' failed in a way that nobody foresaw")
    bench.sink.add("put", Fails(ZeroDivisionError("bug")), Fails(ZeroDivisionError("bug")))
    bench.work.write("a", b"x")
    assert bench.start().flush()
    assert len(logs.messages()) == 1 and logs.seen[0].exc_info is not None
    assert bench.stored("a") == b"x"


def test_what_is_owed_cannot_be_told_for_a_moment(bench: Bench, logs: AnnouncedLogs) -> None:
    logs.expect("what the bucket is owed cannot be told")
    bench.work.broken = LandingBroken("the journal fails")
    uploader = bench.start()
    until(lambda: bool(logs.seen))
    bench.work.broken = None
    bench.work.write("a", b"x")
    assert uploader.flush()


def test_a_settlement_that_fails_is_made_again(bench: Bench, logs: AnnouncedLogs) -> None:
    logs.expect("the journal fails")
    real, failed = bench.work.settled, []

    def settled(*given: Any) -> None:
        if not failed:
            failed.append(given)
            raise LandingBroken("the journal fails")
        real(*given)

    bench.work.settled = settled  # type: ignore[method-assign]
    bench.work.write("a", b"x")
    mark = bench.work.ops()[0].id
    assert bench.start().flush()
    assert bench.sink.effects[mark] == 1


# ---- delay, bandwidth, order, flush --------------------------------------------------------------


def test_the_delay_counts_from_the_close(stepped: Bench) -> None:
    stepped.work.write("a", b"x")
    stepped.clock.advance(4)
    uploader = stepped.start(delay=10.0)
    until(lambda: stepped.clock.waiting == [6])
    assert uploader.waiting()[0].why == "waits for the upload delay"
    assert not stepped.sink.calls
    stepped.clock.advance(6)
    until(lambda: not gone(stepped.bucket, "a"))


def test_a_landing_zone_that_is_short_of_room_waits_for_no_delay(stepped: Bench) -> None:
    """Above high, uploads go first; below, the delay is kept again."""
    stepped.work.write("a", b"x")
    uploader = stepped.start(delay=1000.0)
    until(lambda: stepped.clock.waiting == [1000])
    uploader.hurry(True)
    until(lambda: not gone(stepped.bucket, "a"))
    uploader.hurry(False)
    stepped.work.write("b", b"x")
    stepped.clock.advance(LOOK_EVERY)
    until(lambda: "1 pending" in repr(uploader) and bool(stepped.clock.waiting))
    assert gone(stepped.bucket, "b")


def test_new_files_behind_a_delay_are_looked_at_together(stepped: Bench) -> None:
    """Nothing is due at once there, so nobody is woken for each of thousands; a flush looks at once."""
    looks = 0
    real = stepped.work.changed

    def changed() -> set[int]:
        nonlocal looks
        looks += 1
        return real()

    stepped.work.changed = changed  # type: ignore[method-assign]
    uploader = stepped.start(delay=600.0)
    stepped.work.write("f", b"x")
    until(lambda: "1 pending" in repr(uploader) and bool(stepped.clock.waiting))
    before = looks
    for n in range(100):
        stepped.work.write(f"f{n}", b"x")
    until(lambda: bool(stepped.clock.waiting) and stepped.clock.waiting[0] <= LOOK_EVERY)
    assert looks == before
    stepped.clock.advance(LOOK_EVERY)
    until(lambda: "101 pending" in repr(uploader))
    assert looks == before + 1
    stepped.work.write("g", b"x")
    assert uploader.flush()
    assert len(objects(stepped.bucket)) == 102


def test_a_flush_does_not_wait_for_the_delay_nor_for_what_it_is_not_about(stepped: Bench) -> None:
    for key in ("dir/a", "dir/b", "other"):
        stepped.work.write(key, b"x")
    uploader = stepped.start(delay=1000.0)
    assert uploader.flush((0, "dir/"))
    assert sorted(objects(stepped.bucket)) == ["dir/a", "dir/b"]
    assert uploader.flush((0, "other"), timeout=1)
    assert uploader.flush(), "of nothing"


def test_a_flush_takes_along_what_has_to_go_before(stepped: Bench) -> None:
    stepped.work.write("first", b"x")
    stepped.work.write("old", b"y")
    stepped.work.rename("old", "new")
    stepped.work.write("last", b"z")
    uploader = stepped.start(delay=1000.0)
    assert uploader.flush((0, "new"))
    assert sorted(objects(stepped.bucket)) == ["first", "new"]


def test_a_flush_ends_in_time_and_says_what_is_left(bench: Bench) -> None:
    held = Held()
    bench.sink.add("put", held)
    bench.work.write("a", b"x")
    bench.work.add(Op(0, "m.0", OpKind.PUT, 8, 0, "m/", True))
    uploader = bench.start()
    assert held.there.wait(10)
    report = uploader.flush(timeout=5)
    assert not report and report.count == 2
    assert [(one.key, one.why) for one in report.left] == [
        ("a", "under way"),
        ("m/", "waits for what was closed before"),
    ]
    assert uploader.stats().running[0].key == "a"
    held.go_on.set()
    assert uploader.flush()


def test_a_flush_ends_when_the_uploader_does(stepped: Bench) -> None:
    stepped.work.write("a", b"x")
    stepped.work.writing.add(stepped.work.ops()[0].ino)
    uploader = stepped.start()
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(bool(uploader.flush())))
    thread.start()
    until(lambda: bool(uploader._flushes))
    uploader.close()
    thread.join()
    assert answers == [False]


def test_a_store_that_is_away_is_one_reason(stepped: Bench, logs: AnnouncedLogs) -> None:
    """However many wait for it, and whatever each was told."""
    logs.expect("do not get through")
    for key in "abc":
        stepped.work.write(key, b"x")
    stepped.sink.add("put", Fails(Unavailable("'a' cannot be had")), Fails(Unavailable("'b' cannot be had")))
    uploader = stepped.start(jitter=1.0)
    until(lambda: bool(uploader.stats().away))
    uri = stepped.sink.uri
    assert uploader.reasons(uploader.waiting()) == [f"{uri}: 'a' cannot be had"]


class Stuck(FaultySink):
    """A store that does not answer until its connections are cut."""

    def __init__(self, bucket: MemorySource) -> None:
        super().__init__(bucket)
        self.asked_for, self.cut = threading.Event(), threading.Event()

    def put(self, key: str, *args: Any, **more: Any) -> Any:
        self.asked_for.set()
        assert self.cut.wait(30)
        raise Unavailable("the connection was cut")

    def close(self) -> None:
        self.cut.set()


def test_a_store_that_hangs_does_not_hold_up_the_end(
    stepped: Bench, monkeypatch: pytest.MonkeyPatch, logs: AnnouncedLogs
) -> None:
    """Its requests are cut off; what was not sent is still owed."""
    logs.expect("do not get through")
    monkeypatch.setattr(uploading, "PATIENCE", 0.05)
    stepped.work.write("a", b"x")
    sink = Stuck(stepped.bucket)
    uploader = stepped.start(sinks=[sink])
    assert sink.asked_for.wait(10)
    uploader.close()
    assert sink.cut.is_set()
    assert [op.key for op in stepped.work.ops()] == ["a"]


def test_bandwidth_is_bounded_over_all_threads(bench: Bench) -> None:
    began = bench.clock.monotonic()
    for n in range(10):
        bench.work.write(f"f{n}", bytes(1000))
    assert bench.start(concurrency=4, bandwidth=1000).flush()
    assert bench.clock.monotonic() - began >= 9 - 1e-6, "the first second's worth goes at once"


def test_who_flushes_finds_all_of_it_counted(bench: Bench) -> None:
    """What is settled stays pending until it was counted, though another thread sees it settled before."""
    settled = bench.work.settled
    seen = []

    def settle(*args: Any) -> None:
        settled(*args)
        uploader._bring_up_to_date()
        seen.append(repr(uploader))

    bench.work.settled = settle  # type: ignore[method-assign]
    bench.work.write("a", b"one")
    uploader = bench.start()
    assert uploader.flush()
    assert "1 pending, 1 running" in seen[0]
    assert uploader.stats().uploads == 1


def test_in_the_order_of_closes(bench: Bench) -> None:
    for n in range(20):
        bench.work.write(f"f{n:02}", b"x")
    assert bench.start(concurrency=8, order=UploadOrder.CLOSES).flush()
    assert [key for name, key in bench.sink.calls if name == "put"] == [f"f{n:02}" for n in range(20)]
    assert bench.sink.most_at_once == 1


def test_a_backlog_is_paid_at_a_steady_cost(bench: Bench) -> None:
    """Two thousand files, and renames behind them: each is looked at a few times, not each time."""
    looks = 0
    every, one = bench.work.ops, bench.work.op

    def ops() -> list[Op]:
        nonlocal looks
        looks += len(found := every())
        return found

    def op(seq: int) -> Op | None:
        nonlocal looks
        looks += 1
        return one(seq)

    bench.work.ops, bench.work.op = ops, op  # type: ignore[method-assign]
    for n in range(2000):
        bench.work.add(Op(0, f"p{n}.0", OpKind.PUT, n + 1, 0, f"d{n}/", n % 2 == 1))
    uploader = bench.start(concurrency=2)
    assert uploader.flush()
    assert len(objects(bench.bucket)) == 2000
    assert looks < 10 * 2000


# ---- everything at once --------------------------------------------------------------------------

ERRORS = [
    lambda: Unavailable("no route"),
    lambda: VersionChanged("says who?"),
    lambda: ConnectionResetError("reset"),
]


class Paying(RuleBasedStateMachine):
    """Files are written, removed and renamed while uploads fail, answers get lost, and the uploader dies: in
    the end the bucket holds what the files do, and no content was put twice."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.bucket = MemorySource()
        self.work = FakeWork(self.clock, self.bucket)
        self.sink = FaultySink(self.bucket, part_size=8)
        self.files: dict[str, bytes] = {}
        self.count = 0
        self.uploader: Uploader | None = None

    @initialize(
        concurrency=st.integers(1, 3), delay=st.sampled_from([0.0, 30.0]), order=st.sampled_from(UploadOrder)
    )
    def start(self, concurrency: int, delay: float, order: UploadOrder) -> None:
        self.settings = UploadSettings(concurrency=concurrency, delay=delay, order=order)
        self.run()

    def run(self) -> None:
        self.work.uploader = self.uploader = Uploader(
            self.work, [self.sink], self.settings, self.clock, jitter=lambda: 0.5
        )
        self.uploader.poke()

    def end(self) -> None:
        assert self.uploader is not None
        self.uploader.close()
        steps.arm(None)
        self.work.running.clear()

    @rule(key=st.sampled_from("abcd"), size=st.integers(0, 30))
    def write(self, key: str, size: int) -> None:
        self.count += 1
        data = f"{self.count}".encode().ljust(size, b".")
        self.files[key] = data
        self.work.write(key, data)

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.files)))
        del self.files[key]
        self.work.remove(key)

    @precondition(lambda self: self.files)
    @rule(data=st.data(), new=st.sampled_from("abcde"))
    def rename(self, data: st.DataObject, new: str) -> None:
        old = data.draw(st.sampled_from(sorted(self.files)))
        if old != new:
            self.files[new] = self.files.pop(old)
            self.work.rename(old, new)

    @rule(
        operation=st.sampled_from(["put", "put", "delete", "find"]),
        error=st.sampled_from(ERRORS),
        lost=st.booleans(),
        after=st.integers(0, 2),
    )
    def fault(self, operation: str, error: Exception, lost: bool, after: int) -> None:
        self.sink.add(
            operation, *[None] * after, Lost(error) if lost and operation != "find" else Fails(error)
        )

    @rule(after=st.integers(0, 6))
    def die(self, after: int) -> None:
        """At a step that is to come; the next one starts where it left off."""
        left = after

        def at(name: str) -> None:
            nonlocal left
            if name.startswith("upload."):
                left -= 1
                if left < 0:
                    raise SystemExit

        steps.arm(at)
        self.clock.advance(100)
        assert self.uploader is not None
        self.uploader.poke()
        threading.Event().wait(0.002)
        self.end()
        self.run()

    @rule()
    def restart(self) -> None:
        self.end()
        self.run()

    @rule()
    def flush(self) -> None:
        assert self.uploader is not None
        assert self.uploader.flush()
        assert objects(self.bucket) == self.files

    @invariant()
    def nothing_is_put_twice(self) -> None:
        assert all(count == 1 for count in self.sink.put_so_far().values()), self.sink.effects

    def teardown(self) -> None:
        if self.uploader is None:
            return
        try:
            report = self.uploader.flush(timeout=None)
            assert report
        finally:
            self.end()
        assert objects(self.bucket) == self.files
        assert not self.work.conflicts and not self.work.ops()
        self.nothing_is_put_twice()


# A death is a thread that ends at once.
TestPaying = pytest.mark.filterwarnings(
    "ignore:(?s)Exception in thread upload.*SystemExit:pytest.PytestUnhandledThreadExceptionWarning"
)(Paying.TestCase)
TestPaying.settings = hypothesis_settings(
    derandomize="EXAMPLES" not in os.environ,  # the same in each CI; EXAMPLES=1000 looks further
    max_examples=int(os.environ.get("EXAMPLES", "40")), stateful_step_count=30, deadline=None,
    print_blob=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def faults_are_announced(request: pytest.FixtureRequest, logs: AnnouncedLogs) -> None:
    if "Paying" in request.node.nodeid or "in_flight" in request.node.name:
        for part in ("do not get through", "is tried again"):
            logs.expect(part)
