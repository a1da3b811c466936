"""What the bucket gets of files that are still open for writing."""

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from datacache.config.settings import UploadSettings
from datacache.errors import Denied, Unavailable
from datacache.sources.memory import MemorySink
from datacache.writing import early as module
from datacache.writing.early import Early, copy_landed
from datacache.writing.landing import LandedFile
from datacache.writing.uploader import Uploader
from tests.conftest import AnnouncedLogs
from tests.support.overlays import Mounted, Place
from tests.support.reading import until
from tests.support.uploading import Fails, FaultySink, Meanwhile, SteppedClock, objects

AFTER = 300.0


class Log:
    """A mounted data set, its uploader, and a log that is written to."""

    def __init__(self, place: Place, *, upload: bool = True) -> None:
        self.place, self.mounted, self.sink = place, Mounted(place), FaultySink(place.bucket)
        self.uploader = Uploader(
            self.mounted.settling, [self.sink], UploadSettings(concurrency=2), place.clock, jitter=lambda: 0.5
        )
        if upload:
            self.mounted.overlay.owing.attach(self.uploader)
        self.early = Early(self.mounted.overlay, self.uploader.flush, place.clock, after=AFTER, timeout=60.0)

    def open(self, path: str) -> tuple[int, LandedFile]:
        parent, name = self.mounted.at(path)
        ino = self.mounted.overlay.create(parent, name, mode=0o644, uid=1, gid=2).ino
        file = self.mounted.overlay.open(ino, writing=True)
        self.early.opened(ino)
        return ino, file

    def append(self, file: LandedFile, data: bytes) -> None:
        os.pwrite(file.descriptor, data, os.fstat(file.descriptor).st_size)

    def sync(self, ino: int) -> None:
        self.mounted.overlay.sync(ino)
        self.early.synced(ino)

    def close(self, ino: int, file: LandedFile) -> None:
        self.mounted.overlay.closed(ino, file)
        self.early.closed(ino)

    @property
    def bucket(self) -> dict[str, bytes]:
        return objects(self.place.bucket)

    def landing_files(self) -> int:
        self.mounted.overlay.sync_names()  # what nobody names any more goes with it
        return len(self.mounted.landing.files())

    def end(self) -> None:
        self.uploader.close()
        self.mounted.close()


def while_time_passes(it: Log, call: Callable[[], object]) -> None:
    """Call it, and let time pass whenever it and the uploader both wait."""
    clock: Any = it.place.clock

    def done() -> bool:
        waiting = clock.waiting
        if not future.done() and len(waiting) > 1:
            clock.advance(waiting[0])
        return future.done()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        until(done)
    future.result()


@pytest.fixture
def place() -> Iterator[Place]:
    """Time passes only by hand."""
    place = Place.new()
    place.clock = SteppedClock()  # type: ignore[assignment]
    yield place
    place.remove()


@pytest.fixture
def it(place: Place) -> Iterator[Log]:
    it = Log(place)
    yield it
    it.end()


# ---- a log ------------------------------------------------------------------------------------------


def test_a_log_reaches_the_bucket_by_its_fsyncs(it: Log) -> None:
    """When it is open for five minutes, and each five minutes from then on; it is dirty until its close."""
    ino, file = it.open("/log")
    it.append(file, b"one\n")
    it.sync(ino)
    assert it.uploader.flush() and not it.bucket
    it.place.clock.advance(AFTER)
    it.sync(ino)
    assert it.uploader.flush() and it.bucket == {"log": b"one\n"}
    it.append(file, b"two\n")
    it.sync(ino)
    assert it.uploader.flush() and it.bucket == {"log": b"one\n"}, "the last copy is not five minutes old"
    it.place.clock.advance(AFTER)
    it.sync(ino)
    assert it.uploader.flush() and it.bucket == {"log": b"one\ntwo\n"}
    assert it.mounted.settling.dirty().open == 1 and it.mounted.overlay.landed(ino)
    it.append(file, b"three\n")
    it.close(ino, file)
    assert it.uploader.flush() and it.bucket == {"log": b"one\ntwo\nthree\n"}
    assert not it.mounted.settling.dirty().files and not it.landing_files()
    assert not it.uploader.stats().conflicts


def test_what_was_not_written_since_is_not_sent_again(it: Log) -> None:
    """Neither at the next fsync nor at the close, which makes it a clean file all the same."""
    ino, file = it.open("/log")
    it.append(file, b"all\n")
    it.place.clock.advance(AFTER)
    it.sync(ino)
    assert it.uploader.flush()
    it.place.clock.advance(AFTER)
    it.sync(ino)
    it.close(ino, file)
    assert it.uploader.flush()
    assert it.sink.asked("put") == 1 and it.uploader.stats().uploads == 1
    assert not it.mounted.settling.dirty().files
    assert it.mounted.tree() == {"/log": b"all\n"}


def test_a_change_in_the_same_moment_is_not_overlooked(it: Log) -> None:
    """The clock that changes are stamped with goes on before a copy begins: what is written right after it,
    with as many bytes, is sent."""
    ino, file = it.open("/log")
    for n in range(20):
        os.pwrite(file.descriptor, b"%02d" % n, 0)
        it.early.store(ino)
        os.pwrite(file.descriptor, b"%02d" % (n + 50), 0)
        assert it.mounted.settling.ops()
    it.close(ino, file)
    assert it.uploader.flush() and it.bucket == {"log": b"69"}


def test_what_changes_while_it_is_copied_is_copied_at_the_next_fsync(
    it: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a write, or through a mapping: nothing torn is sent, and no file is left behind."""
    ino, file = it.open("/log")
    os.pwrite(file.descriptor, bytes(8192), 0)
    mapping = mmap.mmap(file.descriptor, 8192)
    changes: list[Callable[[], object]] = [
        lambda: mapping.__setitem__(5000, 1),
        lambda: os.pwrite(file.descriptor, b"x", 0),
        lambda: os.ftruncate(file.descriptor, 4096),
    ]
    copy = module.copy

    def copied(source: int, target: int, size: int) -> None:
        copy(source, target, size)
        if changes:
            changes.pop(0)()

    monkeypatch.setattr(module, "copy", copied)
    it.place.clock.advance(AFTER)
    for _ in range(3):
        it.sync(ino)
        assert it.uploader.flush() and not it.bucket
    assert it.landing_files() == 1
    it.sync(ino)
    assert it.uploader.flush() and it.bucket == {"log": b"x" + bytes(4095)}
    mapping.close()
    it.close(ino, file)
    assert it.uploader.flush() and not it.landing_files()


def test_a_page_that_was_written_through_a_mapping_before_is_noticed_again(
    it: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write to a page need not ask for it a second time, unless it was synced."""
    ino, file = it.open("/log")
    os.pwrite(file.descriptor, bytes(8192), 0)
    mapping = mmap.mmap(file.descriptor, 8192)
    mapping[5000] = 1
    copy = module.copy

    def copied(source: int, target: int, size: int) -> None:
        copy(source, target, size)
        mapping[5000] = 2

    monkeypatch.setattr(module, "copy", copied)
    with pytest.raises(module._Busy):
        copy_landed(it.mounted.landing, file.landing)
    mapping.close()
    it.close(ino, file)


def test_a_copy_that_waits_is_replaced_by_the_next(it: Log, logs: AnnouncedLogs) -> None:
    """While the store is away there is one, of what the file held last; it is not made before the last one is
    gone, but by who waits for the bucket."""
    logs.expect("do not get through")
    it.sink.away = Unavailable("no route")
    ino, file = it.open("/log")
    it.append(file, b"1")
    it.place.clock.advance(AFTER)
    it.sync(ino)
    it.append(file, b"2")
    it.place.clock.advance(AFTER)
    it.sync(ino)
    assert it.landing_files() == 2
    with pytest.raises(Unavailable, match="no route"):
        while_time_passes(it, lambda: it.early.store(ino))
    assert it.landing_files() == 2
    it.sink.away = None
    while_time_passes(it, lambda: it.early.store(ino))
    assert it.bucket == {"log": b"12"}
    it.close(ino, file)
    assert it.uploader.flush() and not it.landing_files()


def test_a_copy_in_parts_is_no_close(it: Log) -> None:
    """What a sink remembers of it makes it nobody else's."""
    it.sink.inner = MemorySink(it.place.bucket, part_size=4)
    ino, file = it.open("/log")
    it.append(file, b"0123456789")
    it.early.store(ino)
    assert it.mounted.overlay.landed(ino) and it.bucket == {"log": b"0123456789"}
    it.append(file, b"more")
    it.early.store(ino)
    assert it.bucket == {"log": b"0123456789more"}
    it.close(ino, file)
    assert it.uploader.flush() and not it.mounted.settling.dirty().files


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
def test_a_log_whose_name_changes(it: Log, how: str) -> None:
    """A copy goes where the file would."""
    ino, file = it.open("/log")
    it.append(file, b"one")
    it.early.store(ino)
    it.append(file, b"two")
    at = it.mounted.at
    if how == "renamed":
        it.mounted.overlay.rename(*at("/log"), *at("/log.1"), replace=True)
    elif how == "removed":
        it.mounted.overlay.unlink(*at("/log"))
    else:
        it.mounted.write("/other", b"other")
        it.mounted.overlay.rename(*at("/other"), *at("/log"), replace=True)
    it.early.store(ino)
    if how == "renamed":
        assert it.bucket == {"log": b"one", "log.1": b"onetwo"}, "the old name goes at the close"
    it.close(ino, file)
    assert it.uploader.flush()
    assert it.bucket == {"renamed": {"log.1": b"onetwo"}, "removed": {}, "replaced": {"log": b"other"}}[how]
    assert not it.landing_files() and not it.uploader.stats().conflicts


@pytest.mark.parametrize("resumed", [False, True])
def test_a_copy_outlives_the_process(place: Place, resumed: bool) -> None:
    """What was owed before is owed after; nothing is left in the landing zone when it is paid."""
    one = Log(place, upload=False)
    ino, file = one.open("/log")
    one.append(file, b"one")
    place.clock.advance(AFTER)
    one.sync(ino)
    one.append(file, b"two")
    one.mounted.overlay.sync(ino)
    assert len(one.mounted.settling.ops()) == 2
    file.close()
    one.end()
    mounted = Mounted(place, resumed=resumed)
    if resumed:
        mounted.overlay.released(ino)
    mounted.drain()
    assert objects(place.bucket) == {"log": b"onetwo"}
    mounted.overlay.sync_names()
    assert not mounted.landing.files()
    mounted.close()


def test_a_copy_is_the_file(it: Log) -> None:
    """Byte for byte, with its time."""
    ino, file = it.open("/log")
    data = os.urandom(100_000)
    it.append(file, data)
    landing = it.mounted.landing
    number, look = copy_landed(landing, file.landing)
    found = landing.stat(number)
    assert (found.st_size, found.st_mtime_ns) == (len(data), look[2])
    copy = landing.open(number, writing=False)
    assert os.pread(copy.descriptor, len(data) + 1, 0) == data
    copy.close()
    landing.discard(number)
    it.close(ino, file)


@pytest.mark.parametrize("removed", [False, True])
def test_what_was_renamed_and_is_gone_holds_up_nobody(it: Log, logs: AnnouncedLogs, removed: bool) -> None:
    """Somebody else has changed the object before the store had copied it: only a person can help."""
    logs.expect("somebody else has changed or removed meanwhile; it is not uploaded")
    logs.expect("so it is not deleted")
    it.place.bucket.put("a", b"ours, and cached nowhere")
    overlay = it.mounted.overlay
    it.mounted.tree()
    overlay.rename(*it.mounted.at("/a"), *it.mounted.at("/b"), replace=True)
    if removed:
        it.place.bucket.delete("a")
    else:
        it.place.bucket.put("a", b"theirs")
    ino, file = it.open("/c")
    it.close(ino, file)
    overlay.rename(*it.mounted.at("/c"), *it.mounted.at("/d"), replace=True)
    until(lambda: it.uploader.flush(timeout=0.0).stuck)
    assert it.bucket == ({"d": b""} if removed else {"a": b"theirs", "d": b""})
    (why,) = it.mounted.settling.parked().values()
    assert "'b': it was renamed from 'a'" in why
    overlay.unlink(*it.mounted.at("/b"))
    until(lambda: bool(it.uploader.flush(timeout=0.0)))


# ---- who waits for the bucket -----------------------------------------------------------------------


def test_a_close_waits_until_the_bucket_has_it(it: Log) -> None:
    """Also where there is nothing to write; what is clean then costs nothing."""
    ino, file = it.open("/a")
    it.early.store(ino, closing=True)
    assert it.bucket == {"a": b""}
    it.append(file, b"one")
    it.early.store(ino, closing=True)
    assert it.bucket == {"a": b"one"}
    it.early.store(ino, closing=True)
    it.close(ino, file)
    it.early.store(ino)
    assert it.uploader.flush() and it.sink.asked("put") == 2
    assert not it.mounted.settling.dirty().files


def test_the_last_who_writes_waits(it: Log) -> None:
    """Who closes before the last leaves it to that one; who syncs waits, whoever else has it open."""
    ino, file = it.open("/a")
    other = it.mounted.overlay.open(ino, writing=True)
    it.append(file, b"one")
    it.early.store(ino, closing=True)
    assert not it.bucket
    it.early.store(ino)
    assert it.bucket == {"a": b"one"}
    it.close(ino, other)
    it.append(file, b"two")
    it.early.store(ino, closing=True)
    assert it.bucket == {"a": b"onetwo"}
    it.close(ino, file)


def test_of_two_who_close_at_once_both_wait(it: Log) -> None:
    """The kernel tells that nobody has the file open any more later than it lets close(2) return."""
    ino, file = it.open("/a")
    other = it.mounted.overlay.open(ino, writing=True)
    it.append(file, b"one")
    for one in (file, other):
        it.mounted.overlay.closes.announce(ino, one)
    it.early.store(ino, closing=True)
    assert it.bucket == {"a": b"one"}
    it.append(other, b"two")
    it.early.store(ino, closing=True)
    assert it.bucket == {"a": b"onetwo"}
    it.close(ino, file)
    it.close(ino, other)


def test_who_never_comes_closes_for_nobody(it: Log) -> None:
    """A file that is kept open for who was refused is not one who closes it later, and waits then."""
    ino, file = it.open("/a")
    it.mounted.overlay.keep_for(ino, 1, it.mounted.overlay.open(ino, writing=True))
    it.append(file, b"one")
    it.mounted.overlay.closes.announce(ino, file)
    it.early.store(ino, closing=True)
    assert it.bucket == {"a": b"one"}
    it.close(ino, file)
    it.mounted.overlay.awaited.give_up()


def test_a_close_does_not_wait_for_an_upload_that_its_own_open_has_stopped(it: Log) -> None:
    """It is sent what there is now, after that is over."""
    ino, file = it.open("/a")
    it.append(file, b"one")
    it.close(ino, file)
    waiting: list[Future[None]] = []

    def open_again() -> None:
        again = it.mounted.overlay.open(ino, writing=True)
        it.append(again, b"two")
        waiting.append(pool.submit(lambda: it.early.store(ino, closing=True)))
        until(lambda: any(op.landing != again.landing for op in it.mounted.settling.ops()))
        files.append(again)

    files: list[LandedFile] = []
    with ThreadPoolExecutor(1) as pool:
        it.sink.add("put", Meanwhile(open_again))
        assert it.uploader.flush()
        waiting[0].result(60.0)
    assert it.bucket == {"a": b"onetwo"}
    it.close(ino, files[0])
    assert it.uploader.flush()
    assert not it.mounted.settling.dirty().files and not it.landing_files()
    assert not it.uploader.stats().conflicts


def test_a_store_that_refuses_is_an_error_of_the_close(it: Log, logs: AnnouncedLogs) -> None:
    """After the time that may pass; the file stays dirty, and is uploaded when the store lets it be."""
    logs.expect("is tried again")
    logs.expect("do not get through")
    it.sink.away = Denied("refused to these credentials")
    ino, file = it.open("/a")
    it.append(file, b"one")
    began = it.place.clock.monotonic()
    with pytest.raises(Unavailable, match="refused to these credentials"):
        while_time_passes(it, lambda: it.early.store(ino, closing=True))
    assert it.place.clock.monotonic() - began >= 60.0
    it.close(ino, file)
    it.sink.away = None
    while_time_passes(it, lambda: it.uploader.flush(timeout=1000.0))
    assert it.bucket == {"a": b"one"}
    assert not it.landing_files()


def test_somebody_else_s_version_is_an_error_of_the_close(it: Log, logs: AnnouncedLogs) -> None:
    """Theirs keeps the name, and ours goes beside it at the close, once."""
    logs.expect("was changed in the bucket meanwhile")
    ino, file = it.open("/a")
    it.append(file, b"ours")
    it.sink.add("put", Meanwhile(lambda: it.place.bucket.put("a", b"theirs")))
    with pytest.raises(Unavailable, match="changed in the bucket by somebody else"):
        it.early.store(ino, closing=True)
    assert it.bucket == {"a": b"theirs"}
    it.close(ino, file)
    assert it.uploader.flush()
    found = it.bucket
    assert found.pop("a") == b"theirs"
    ((name, data),) = found.items()
    assert name.startswith("a.conflict.") and data == b"ours"
    assert it.mounted.settling.dirty().conflicts == 1


def test_a_store_that_fails_for_a_while_is_waited_for(it: Log, logs: AnnouncedLogs) -> None:
    """Uploads are tried again within the time that may pass."""
    logs.expect("do not get through")
    it.sink.add("put", Fails(Unavailable("no route")), Fails(Unavailable("no route")))
    ino, file = it.open("/a")
    it.append(file, b"one")
    while_time_passes(it, lambda: it.early.store(ino, closing=True))
    assert it.bucket == {"a": b"one"}
    it.close(ino, file)
