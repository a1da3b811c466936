"""
The overlay and the uploader together, against a dict: names and contents change while uploads fail,
answers get lost, and the uploader is stopped and started. Whenever all is paid, the bucket holds what the
files do, nothing was a conflict, and no content was put twice.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from datacache.config.settings import UploadSettings
from datacache.errors import DatacacheError, Unavailable, VersionChanged
from datacache.model import ByteRange
from datacache.writing.journal import OpKind
from datacache.writing.uploader import JOURNAL_ID, Uploader
from tests.conftest import AnnouncedLogs
from tests.model.test_writing_model import PATHS, Refused, Tree, made, parent_of, removed, renamed, written
from tests.support.overlays import Mounted, Place
from tests.support.reading import until
from tests.support.uploading import Afterwards, Fails, FaultySink, Lost, Meanwhile, SteppedClock, objects


class PayingMachine(RuleBasedStateMachine):
    """See the top of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Place.new()
        for key in ("a/a", "a/b/c", "b"):
            self.place.bucket.put(key, key.encode())
        self.tree: Tree = {"/a": None, "/a/a": b"a/a", "/a/b": None, "/a/b/c": b"a/b/c", "/b": b"b"}
        self.mounted = Mounted(self.place)
        self.sink = FaultySink(self.place.bucket)
        self.count = 0

    @initialize(concurrency=st.integers(1, 3), delay=st.sampled_from([0.0, 0.0, 30.0]))
    def begin(self, concurrency: int, delay: float) -> None:
        self.settings = UploadSettings(concurrency=concurrency, delay=delay)
        self.start()

    def start(self) -> None:
        self.uploader = Uploader(
            self.mounted.settling, [self.sink], self.settings, self.place.clock, jitter=lambda: 0.5
        )
        self.mounted.overlay.owing.attach(self.uploader)

    def do(self, change: Callable[[], Tree], work: Callable[[], object]) -> None:
        try:
            wanted: Tree | None = change()
        except Refused:
            wanted = None
        try:
            work()
        except DatacacheError:
            assert wanted is None, "a local file system would have done it"
        else:
            assert wanted is not None, "a local file system would have refused it"
            self.tree = wanted

    @rule(path=PATHS)
    def write(self, path: str) -> None:
        self.count += 1
        data = f"{self.count}".encode()

        def work() -> None:
            while True:
                try:
                    return self.mounted.write(path, data)
                except VersionChanged:
                    continue  # it was uploaded in this moment: a daemon looks it up again, too

        self.do(lambda: written(self.tree, path, data, None), work)

    @rule(path=PATHS)
    def mkdir(self, path: str) -> None:
        def work() -> None:
            self.mounted.overlay.mkdir(*self.mounted.at(path), mode=0o755, uid=0, gid=0)

        self.do(lambda: made(self.tree, path), work)

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        self.do(
            lambda: removed(self.tree, path, directory=False),
            lambda: self.mounted.overlay.unlink(*self.mounted.at(path)),
        )

    @rule(path=PATHS, new=PATHS)
    def rename(self, path: str, new: str) -> None:
        def work() -> None:
            mounted = self.mounted
            mounted.overlay.rename(*mounted.at(path), *mounted.at(new), replace=True)

        self.do(lambda: renamed(self.tree, path, new), work)

    @rule(
        operation=st.sampled_from(["put", "put", "copy", "delete", "find"]),
        lost=st.booleans(),
        after=st.integers(0, 2),
    )
    def fault(self, operation: str, lost: bool, after: int) -> None:
        error = Unavailable("no route")
        fault = Lost(error) if lost and operation != "find" else Fails(error)
        self.sink.add(operation, *[None] * after, fault)

    @rule()
    def restart(self) -> None:
        self.uploader.close()
        self.start()

    @rule()
    def flush(self) -> None:
        report = self.uploader.flush()
        assert report
        bucket = self.place.bucket
        found = {}
        for page in bucket.list("", recursive=True):
            for info in page.objects:
                found[info.key] = bytes(bucket.read(info, ByteRange(0, info.size))) if info.size else b""
        files = {"/" + key: data for key, data in found.items() if not key.endswith("/")}
        assert files == {path: data for path, data in self.tree.items() if data is not None}
        shown = {"/" + key.rstrip("/") for key in found if key.endswith("/")}
        for path in [*files, *shown]:
            while path := parent_of(path):
                shown.add(path)
        assert shown == {path for path, data in self.tree.items() if data is None}
        assert self.mounted.tree() == self.tree
        assert not self.uploader.stats().conflicts
        twice = {mark: count for mark, count in self.sink.put_so_far().items() if count > 1}
        assert not twice, twice

    def teardown(self) -> None:
        try:
            self.flush()
        finally:
            self.uploader.close()
            self.mounted.close()
            self.place.remove()


TestPaying = PayingMachine.TestCase
TestPaying.settings = settings(
    derandomize="EXAMPLES" not in os.environ,  # the same in each CI; EXAMPLES=1000 looks further
    max_examples=int(os.environ.get("EXAMPLES", "60")), stateful_step_count=25, deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place.new()
    yield place
    place.remove()


def test_a_name_that_comes_back_is_not_deleted(place: Place) -> None:
    """`mv a b; mv b a`, the first of which is in the bucket already."""
    place.bucket.put("a", b"x")
    mounted = Mounted(place)
    mounted.overlay.rename(*mounted.at("/a"), *mounted.at("/b"), replace=True)
    assert mounted.pay()
    mounted.overlay.rename(*mounted.at("/b"), *mounted.at("/a"), replace=True)
    mounted.drain()
    assert objects(place.bucket) == {"a": b"x"}
    mounted.close()


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
@pytest.mark.parametrize("again", ["later", "after a restart"])
def test_an_upload_that_nobody_heard_of_leaves_nothing_behind(place: Place, how: str, again: str) -> None:
    """Its answer was lost, and then the file was renamed, removed, or replaced."""
    place.clock = SteppedClock()  # type: ignore[assignment]
    mounted, sink = Mounted(place), FaultySink(place.bucket)
    sink.add("put", Lost(Unavailable("no route")))
    mounted.write("/a", b"one")
    mounted.write("/c", b"other")
    uploader = Uploader(
        mounted.settling, [sink], UploadSettings(concurrency=1), place.clock, jitter=lambda: 1.0
    )
    mounted.overlay.owing.attach(uploader)
    until(lambda: place.clock.waiting == [1])  # type: ignore[attr-defined]
    if again == "after a restart":
        uploader.close()
        mounted.close()
        mounted = Mounted(place)
    if how == "renamed":
        mounted.overlay.rename(*mounted.at("/a"), *mounted.at("/b"), replace=True)
    elif how == "removed":
        mounted.overlay.unlink(*mounted.at("/a"))
    else:
        mounted.overlay.rename(*mounted.at("/c"), *mounted.at("/a"), replace=True)
    if again == "after a restart":
        uploader = Uploader(mounted.settling, [sink], UploadSettings(concurrency=1), place.clock)
        mounted.overlay.owing.attach(uploader)
    place.clock.advance(1)
    assert uploader.flush()
    assert not uploader.stats().conflicts
    uploader.close()
    mounted.close()
    expected = {
        "renamed": {"b": b"one", "c": b"other"}, "removed": {"c": b"other"}, "replaced": {"a": b"other"},
    }  # fmt: skip
    assert objects(place.bucket) == expected[how]


class Saving:
    """A program that saves by writing a file of another name, and renaming that over the old one."""

    def __init__(self, place: Place) -> None:
        self.place, self.mounted, self.sink = place, Mounted(place), FaultySink(place.bucket)
        self.count = 0

    def save(self) -> None:
        self.count += 1
        self.mounted.write("/tmp", b"%d" % self.count)
        self.mounted.overlay.rename(*self.mounted.at("/tmp"), *self.mounted.at("/doc"), replace=True)

    def remove(self) -> None:
        self.mounted.overlay.unlink(*self.mounted.at("/doc"))

    def theirs(self) -> None:
        self.place.bucket.put("doc", b"theirs")

    def flush(self) -> None:
        uploader = Uploader(
            self.mounted.settling, [self.sink], UploadSettings(concurrency=1), self.place.clock
        )
        self.mounted.overlay.owing.attach(uploader)
        try:
            while self.mounted.settling.ops():  # what is saved meanwhile is owed, too
                assert uploader.flush()
        finally:
            uploader.close()
        self.conflicts = uploader.stats().conflicts

    def close(self) -> None:
        self.mounted.close()


@pytest.fixture
def saving(place: Place) -> Iterator[Saving]:
    saving = Saving(place)
    yield saving
    saving.close()


@pytest.mark.parametrize("before", [False, True], ids=["new", "there before"])
@pytest.mark.parametrize("error", [None, Unavailable("no route")], ids=["answered", "lost"])
def test_saves_by_rename_while_uploads_run_are_no_conflicts(
    saving: Saving, error: Exception | None, before: bool
) -> None:
    """Each upload arrives, and is replaced before it has answered: what follows it knows it for ours."""
    if before:
        saving.place.bucket.put("doc", b"0")
    saving.sink.add("put", *[Afterwards(saving.save, error)] * 5)
    saving.save()
    saving.flush()
    assert saving.count > 3 and not saving.conflicts
    assert objects(saving.place.bucket) == {"doc": b"%d" % saving.count}
    assert saving.mounted.tree() == {"/doc": b"%d" % saving.count}


def test_saves_that_were_never_tried_do_not_forget_what_came_before(saving: Saving) -> None:
    """An upload arrives, its answer is lost, and more is saved before anything is tried again."""
    saving.save()
    op = next(op for op in saving.mounted.settling.ops() if op.kind is OpKind.PUT and op.key == "doc")
    begun = saving.mounted.settling.begin(op)
    assert begun is not None
    saving.place.bucket.put("doc", b"1", metadata={JOURNAL_ID: begun.id})
    saving.save()
    saving.mounted.settling.stopped(begun)
    saving.save()
    saving.save()
    saving.flush()
    assert not saving.conflicts
    assert objects(saving.place.bucket) == {"doc": b"4"}


def test_an_upload_that_nobody_wants_any_more_meets_somebody_else_s(
    saving: Saving, logs: AnnouncedLogs
) -> None:
    """It is given up without a trace; what was saved meanwhile is put beside theirs."""
    logs.expect("was changed in the bucket meanwhile")
    saving.place.bucket.put("doc", b"0")
    saving.sink.add("put", Meanwhile(saving.theirs))
    saving.sink.add("find", Meanwhile(saving.save))
    saving.save()
    saving.flush()
    found = objects(saving.place.bucket)
    assert found.pop("doc") == b"theirs"
    ((name, ours),) = found.items()
    assert name.startswith("doc.conflict.") and ours == b"2"
    assert saving.mounted.tree() == {"/doc": b"theirs", f"/{name}": b"2"}


def test_an_upload_of_what_was_removed_meets_somebody_else_s(saving: Saving, logs: AnnouncedLogs) -> None:
    """Theirs is not removed with it, and is shown again."""
    logs.expect("so it is not deleted")
    saving.place.bucket.put("doc", b"0")
    saving.sink.add("put", Meanwhile(saving.theirs))
    saving.sink.add("find", Meanwhile(saving.remove))
    saving.save()
    saving.flush()
    assert objects(saving.place.bucket) == {"doc": b"theirs"}
    assert saving.mounted.tree() == {"/doc": b"theirs"}


@pytest.fixture(autouse=True)
def faults_are_announced(logs: AnnouncedLogs) -> Any:
    for part in ("do not get through", "is tried again"):
        logs.expect(part)
