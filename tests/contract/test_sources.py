"""Every source that needs no real store, held against the contract; the wrappers around a fake, too."""

import os
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from datacache.clock import VirtualClock
from datacache.config.settings import SourceSettings
from datacache.sources.checked import CheckedSource
from datacache.sources.faulty import FaultySource
from datacache.sources.filesystem import FsspecSource
from datacache.sources.local import LocalSource
from datacache.sources.memory import MemorySource
from datacache.sources.steady import SteadySource
from tests.contract.source_suite import Made, SourceSuite
from tests.support.oss_stub import OssStub


class Tree:
    """Objects as files of a directory. Each put is a new file of its own second, as uploads are."""

    def __init__(self, root: Path) -> None:
        self.root, self.puts = os.fsencode(root), 0

    def put(self, key: str, data: bytes) -> None:
        path = self.path(key)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + b".new", "wb") as file:
            file.write(data)
        self.puts += 1
        os.utime(path + b".new", (1_700_000_000 + self.puts,) * 2)
        os.rename(path + b".new", path)

    def delete(self, key: str) -> None:
        os.unlink(self.path(key))

    def path(self, key: str) -> bytes:
        return os.path.join(self.root, key.encode("utf-8", "surrogateescape"))


class TestMemory(SourceSuite):
    """The public fake."""

    @pytest.fixture
    def made(self) -> Made:
        source = MemorySource()
        return Made(source, source.put, source.delete)


class TestMemoryWithVersions(SourceSuite):
    """The public fake as a versioned bucket."""

    @pytest.fixture
    def made(self) -> Made:
        source = MemorySource(versioned=True, page_size=7)
        return Made(source, source.put, source.delete)


class TestMemoryWithoutConditions(SourceSuite):
    """The public fake as a store that knows only sizes and times."""

    @pytest.fixture
    def made(self) -> Made:
        source = MemorySource(conditional=False)
        return Made(source, source.put, source.delete, refuses=False)


class TestLocal(SourceSuite):
    """A directory."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> Made:
        tree = Tree(tmp_path)
        return Made(LocalSource(str(tmp_path)), tree.put, tree.delete, odd_keys=False)


class TestFsspecMemory(SourceSuite):
    """fsspec's own fake, which is not asynchronous."""

    @pytest.fixture
    def made(self) -> Iterator[Made]:
        root, files = f"/{uuid.uuid4()}", MemoryFileSystem()
        files.mkdir(root)
        with closing(FsspecSource(f"memory:/{root}", settings=SourceSettings())) as source:
            yield Made(
                source, lambda key, data: files.pipe_file(f"{root}/{key}", data),
                lambda key: files.rm_file(f"{root}/{key}"), odd_keys=False, refuses=False,
            )  # fmt: skip
        files.rm(root, recursive=True)


class TestFsspecFile(SourceSuite):
    """A directory through fsspec."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> Iterator[Made]:
        tree = Tree(tmp_path)
        with closing(FsspecSource(f"local://{tmp_path}", settings=SourceSettings())) as source:
            yield Made(source, tree.put, tree.delete, odd_keys=False, refuses=False)


class TestOssfs(SourceSuite):
    """OSS through ossfs, below a prefix of the bucket."""

    @pytest.fixture
    def made(self) -> Iterator[Made]:
        options = {"key": "k", "secret": "s"}
        with OssStub({"elsewhere": b"x", "rootless/x": b"x"}) as oss:
            options |= {"endpoint": oss.endpoint}
            with closing(
                FsspecSource("oss://bucket/root", settings=SourceSettings(), options=options)
            ) as source:
                yield Made(
                    source, lambda key, data: oss.put(f"root/{key}", data),
                    lambda key: oss.delete(f"root/{key}"), byte_keys=False,
                )  # fmt: skip


class TestChecked(SourceSuite):
    """`checked` around a store without conditions, which is where it has most to do."""

    @pytest.fixture
    def made(self) -> Made:
        source = MemorySource(conditional=False)
        return Made(CheckedSource(source), source.put, source.delete)


class TestCheckedDigests(SourceSuite):
    """`checked` around a store whose tags are digests."""

    @pytest.fixture
    def made(self) -> Made:
        source = MemorySource(versioned=True)
        return Made(CheckedSource(source), source.put, source.delete)


class TestSteady(SourceSuite):
    """`steady` when nothing goes wrong."""

    @pytest.fixture
    def made(self, clock: VirtualClock) -> Made:
        source = MemorySource()
        return Made(SteadySource(source, SourceSettings(), clock), source.put, source.delete)


class TestFaulty(SourceSuite):
    """`faulty` without a script."""

    @pytest.fixture
    def made(self) -> Made:
        source = MemorySource()
        return Made(FaultySource(source), source.put, source.delete)


class TestStack(SourceSuite):
    """What `open_source` makes of an fsspec scheme: a steady, checked one."""

    @pytest.fixture
    def made(self, tmp_path: Path, clock: VirtualClock) -> Iterator[Made]:
        tree, settings = Tree(tmp_path), SourceSettings()
        raw = FsspecSource(f"local://{tmp_path}", settings=settings)
        with closing(SteadySource(CheckedSource(raw), settings, clock)) as source:
            yield Made(source, tree.put, tree.delete, odd_keys=False)
