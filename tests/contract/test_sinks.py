"""Every sink held against the contract; and what only S3 has, against a real server and a scripted one."""

import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datacache.clock import SystemClock
from datacache.config.settings import SourceSettings
from datacache.sources.aws import Bucket, find_bucket
from datacache.sources.local import LocalSink, LocalSource
from datacache.sources.memory import MemorySink, MemorySource
from datacache.sources.s3 import S3Source
from datacache.sources.s3upload import S3Sink
from tests.contract.sink_suite import PART, Made, SinkSuite
from tests.support.s3 import S3Server, find_tool, moto_server, reset_moto, versitygw_server

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


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


@pytest.fixture(scope="module")
def versitygw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if find_tool("versitygw") is None:
        pytest.skip("versitygw is not installed")
    with versitygw_server(tmp_path_factory.mktemp("versitygw")) as server:
        yield server


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
