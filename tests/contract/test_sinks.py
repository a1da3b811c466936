"""Every sink held against the contract; and what only S3 has, against a real server and a scripted one."""

import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from datacache.clock import SystemClock
from datacache.config.settings import SourceSettings
from datacache.errors import Denied, SettingError, Unavailable, Unsupported
from datacache.model import MountPoint, TiB
from datacache.sources.aws import Bucket, find_bucket
from datacache.sources.faulty import Fail, FaultySink, Lost
from datacache.sources.local import LocalSink, LocalSource
from datacache.sources.memory import MemorySink, MemorySource
from datacache.sources.objectstore import ObjectStoreSink, ObjectStoreSource
from datacache.sources.opening import open_raw, open_sink
from datacache.sources.s3 import S3Source
from datacache.sources.s3upload import S3Sink, plan
from datacache.sources.sink import NOTHING
from tests.contract.sink_suite import PART, Made, SinkSuite, put
from tests.support.s3 import S3Server, reset_moto

SETTINGS = SourceSettings(timeout=20, stall_timeout=10)
_numbers = itertools.count(1)


class TestMemory(SinkSuite):
    """The public fake."""

    @pytest.fixture
    def made(self) -> Made:
        source = MemorySource()

        def sink() -> MemorySink:
            return MemorySink(source, part_size=PART)

        return Made(sink(), source, sink, lambda: len(source.uploads))


def keeps_attributes(directory: Path) -> bool:
    probe = directory / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.datacache.probe", b"")
    except OSError:
        return False
    finally:
        probe.unlink()
    return True


class TestLocal(SinkSuite):
    """A directory, which is made with the first object."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> Made:
        root = tmp_path / "root"
        root.mkdir()

        def unfinished() -> int:
            return sum(name.name.startswith(".datacache-put-") for name in root.rglob("*"))

        return Made(
            LocalSink(str(root)), LocalSource(str(root)), lambda: LocalSink(str(root)), unfinished,
            odd_keys=False, tree=True, metadata=keeps_attributes(tmp_path),
        )  # fmt: skip


class TestFaulty(SinkSuite):
    """`faulty` without a script."""

    @pytest.fixture
    def made(self) -> Made:
        source = MemorySource()

        def sink() -> FaultySink:
            return FaultySink(MemorySink(source, part_size=PART))

        return Made(sink(), source, sink, lambda: len(source.uploads))


class TestObjectStore(SinkSuite):
    """What writes to Google and Azure, on the store in memory of their client."""

    @pytest.fixture
    def made(self) -> Iterator[Made]:
        store: Any = MemoryStore()

        def sink() -> ObjectStoreSink:
            return ObjectStoreSink(store, uri="gs://b/p", prefix="p/")

        with closing(ObjectStoreSource(store, uri="gs://b/p", prefix="p/")) as source:
            yield Made(sink(), source, sink, lambda: 0, odd_keys=False)

    def test_a_directory_marker(self, made: Made) -> None:
        """There are none."""
        with pytest.raises(Unsupported):
            put(made, "dir/", b"")


def test_a_directory_that_is_for_reading_only(tmp_path: Path) -> None:
    """Said before anything is put; also of one that would have to be made in it."""
    (tmp_path / "root").mkdir()
    for path in (tmp_path / "root", tmp_path / "new" / "deep"):
        LocalSink(str(path)).check_writable()
    assert not (tmp_path / "new").exists()
    (tmp_path / "root").chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # whom no mode holds off
    try:
        for path in (tmp_path / "root", tmp_path / "root" / "deep"):
            with pytest.raises(Denied, match="cannot be written to"):
                LocalSink(str(path)).check_writable()
    finally:
        if root:
            os.seteuid(0)


def test_a_lost_answer_is_found_by_its_mark() -> None:
    """The put took effect though it failed: `find` shows the mark that it was given."""
    sink = FaultySink(
        MemorySink(MemorySource()), {"put": [Lost(Unavailable("lost")), Fail(Unavailable("no"))]}
    )
    with pytest.raises(Unavailable, match="lost"):
        put(sink, "a", b"x", expected=NOTHING, metadata={"id": "7"})
    with pytest.raises(Unavailable, match="no"):
        put(sink, "b", b"x", metadata={"id": "8"})
    found = sink.find("a")
    assert found is not None
    assert found.metadata == {"id": "7"}
    assert sink.find("b") is None


@pytest.mark.parametrize("uri", ["http://host/data", "https://host/data", "memory://x"])
def test_what_can_only_be_read_is_refused_early(uri: str) -> None:
    """Without network, with a sentence."""
    with pytest.raises(SettingError, match="can only be read"):
        open_sink(MountPoint(uri), SETTINGS, environment={}, clock=SystemClock())


def test_who_cannot_be_asked_about_conditions_is_named_and_not_the_probe() -> None:
    """The object that S3 is asked with is ours; who reads of it looks for it in vain."""
    point = MountPoint("s3://bucket/x", options={"endpoint": "http://127.0.0.1:1", "anonymous": "true"})
    sink = open_sink(point, SETTINGS, environment={}, clock=SystemClock())
    try:
        with pytest.raises(Unavailable, match="s3://bucket/x") as caught:
            _ = sink.traits
    finally:
        sink.close()
    assert "datacache-condition" not in str(caught.value)


def test_each_scheme_opens_its_sink(tmp_path: Path) -> None:
    """The sink of a mount point has the URI of its source."""
    environment = {"AWS_EC2_METADATA_DISABLED": "true"}
    for point in (
        MountPoint("s3://bucket/x", options={"endpoint": "http://h:1"}),
        MountPoint("oss://bucket/x", options={"endpoint": "https://oss-cn-hangzhou.aliyuncs.com"}),
        MountPoint(f"file://{tmp_path}"),
        MountPoint("gs://bucket/x", options={"anonymous": "true"}),
        MountPoint("az://bucket/x", options={"account": "me", "anonymous": "true"}),
    ):
        with closing(open_sink(point, SETTINGS, environment=environment, clock=SystemClock())) as sink:
            raw = open_raw(point, settings=SETTINGS, environment=environment, clock=SystemClock())
            with closing(raw):
                assert sink.uri == raw.uri


def test_parts_are_planned() -> None:
    """Whole parts and a rest; larger ones where there would be too many."""
    assert [span.length for span in plan(10, 4)] == [4, 4, 2]
    assert [span.length for span in plan(8, 4)] == [4, 4]
    huge = plan(5 * TiB)
    assert len(huge) <= 10_000
    assert (huge[0].start, huge[-1].stop) == (0, 5 * TiB)
    assert all(a.stop == b.start for a, b in pairwise(huge))


def made_of(server: S3Server, *, tree: bool = False) -> Iterator[Made]:
    name = f"sink-{next(_numbers)}"
    server.make_bucket(name)
    bucket = find_bucket(
        Bucket("s3", name, prefix="a root/", endpoint=server.endpoint, style="path",
               environment=server.environment)
    )  # fmt: skip

    def sink() -> S3Sink:
        return S3Sink(bucket, settings=SETTINGS, clock=SystemClock(), part=PART)

    def unfinished() -> int:
        return len(server.client.list_multipart_uploads(Bucket=name).get("Uploads", ()))

    source = S3Source(bucket, settings=SETTINGS, clock=SystemClock())
    with closing(sink()) as first, closing(source):
        yield Made(first, source, sink, unfinished, odd_keys=not tree, tree=tree)


class TestMoto(SinkSuite):
    """A store that passes over digests, and over the conditions of completions."""

    @pytest.fixture
    def made(self, moto: S3Server) -> Iterator[Made]:
        yield from made_of(moto)
        reset_moto(moto)  # its objects are open files


@pytest.mark.server
class TestVersitygw(SinkSuite):
    """A real server, which keeps objects as files."""

    @pytest.fixture
    def made(self, versitygw: S3Server) -> Iterator[Made]:
        yield from made_of(versitygw, tree=True)

    def test_keys_that_no_file_tree_can_hold(self, made: Made) -> None:
        """This server takes `x//y` and `x/../z` for other names, by itself: nothing to hold it to."""
