"""What every mounter of Datasets' volumes promises (`csi.mounter.mounter.DatasetMounter`): the fake, and the
one of the kernel with a worker as a process."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from csi.mounter import DatasetMounter, Mounted, fake
from csi.mounter.datasets import LinuxDatasetMounter
from csi.mounter.fake import FakeDatasetMounter, FakeMounter
from csi.mounter.holders import Holders
from csi.mounter.linux import LinuxMounter
from datacache.errors import MountError, TookTooLong
from datacache.kube.release import VOLUME_SOCKET
from fuse import mountpoint
from tests.conftest import AnnouncedLogs

UID = "0f2a7c1e"
WITHIN = 60.0


class Made(Protocol):
    """A mounter, and the node that it is on."""

    mounter: DatasetMounter
    directory: str

    def at(self) -> Mounted | None:
        """What is mounted on `directory`."""

    def worker_begins(self) -> None:
        """A worker of the Dataset is there from now on."""

    def worker_ends(self) -> None:
        """It is killed."""

    def all_end(self) -> None:
        """Worker and mounter are killed at the same time, and another mounter comes."""


class DatasetMounterContract:
    """Run against every mounter."""

    @pytest.fixture
    def made(self) -> Made:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def expected(self, logs: AnnouncedLogs) -> None:
        """Ends of workers are said."""
        logs.expect("has ended; its volume waits")

    def show(self, made: Made, *, writable: bool = False, used: bool = False, within: float = WITHIN) -> None:
        made.mounter.show(UID, made.directory, name="team/pets", writable=writable, used=used, within=within)

    @pytest.mark.parametrize("writable", [False, True])
    def test_a_dataset_is_mounted_once(self, made: Made, writable: bool) -> None:
        """However often it is asked for; and taken off, however often."""
        made.worker_begins()
        self.show(made, writable=writable)
        shown = made.at()
        assert shown is not None
        assert (shown.ours, shown.read_only) == (True, not writable)
        self.show(made, writable=writable, used=True)
        assert made.at() == shown
        for _ in range(2):
            made.mounter.take_off(UID, made.directory)
            assert made.at() is None

    def test_without_a_worker_nothing_is_left(self, made: Made) -> None:
        """But what was there before."""
        made.mounter.expect(UID)
        assert made.mounter.owed(UID) == ""
        with pytest.raises(TookTooLong, match="no worker of Dataset team/pets"):
            self.show(made, within=2.5)
        assert made.at() is None
        made.worker_begins()
        self.show(made)
        shown = made.at()
        made.worker_ends()
        with pytest.raises(TookTooLong):
            self.show(made, used=True, within=2.5)
        assert made.at() == shown
        assert "no worker of the Dataset" in made.mounter.trouble(UID, made.directory)
        made.worker_begins()
        self.show(made, used=True)
        assert made.at() == shown

    def test_a_mount_that_is_dead_is_mounted_anew_when_nobody_uses_it(self, made: Made) -> None:
        """Before, it is said."""
        made.worker_begins()
        self.show(made)
        made.all_end()
        made.worker_begins()
        with pytest.raises(MountError, match="have ended at the same time"):
            self.show(made, used=True)
        assert made.at() is not None
        self.show(made)
        assert made.at() is not None
        self.show(made, used=True)


class TestFake(DatasetMounterContract):
    """A table."""

    @pytest.fixture
    def made(self) -> Made:
        return _Fake()


class _Fake:
    def __init__(self) -> None:
        self.node, self.directory = fake.Node(), "/staging"
        self.mounter: DatasetMounter = FakeDatasetMounter(self.node)

    def at(self) -> Mounted | None:
        return FakeMounter(self.node).at(self.directory)

    def worker_begins(self) -> None:
        self.node.workers[UID] = ""

    def worker_ends(self) -> None:
        del self.node.workers[UID]

    def all_end(self) -> None:
        self.worker_ends()
        shown = self.node.mounts[self.directory].shown
        assert shown is not None
        shown.alive = False


@pytest.mark.mounted
@pytest.mark.skipif(bool(mountpoint.obstacle()), reason=mountpoint.obstacle() or "-")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount for others")
@pytest.mark.skipif(not mountpoint.is_native("auto"), reason="this kernel is older than Linux 6.9")
class TestLinux(DatasetMounterContract):
    """The kernel, and workers as processes."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> Iterator[Made]:
        with ExitStack() as stack:
            made = _Linux(tmp_path)
            stack.callback(made.close)
            yield made


class _Linux:
    def __init__(self, root: Path) -> None:
        self._root, self._worker = root, None
        (root / "bucket").mkdir()
        (root / "staging").mkdir()
        self.directory = str(root / "staging")
        self._begin()

    def _begin(self) -> None:
        self._holders = Holders(str(self._root / "run"), patience=1000.0)
        self._holders.__enter__()
        self.mounter: DatasetMounter = LinuxDatasetMounter(self._holders)

    def at(self) -> Mounted | None:
        return LinuxMounter().at(self.directory)

    def worker_begins(self) -> None:
        root = self._root
        with (root / "worker.log").open("ab") as log:
            self._worker: subprocess.Popen[bytes] | None = subprocess.Popen(
                [
                    sys.executable, "-P", "-m", "datacache.cli.main", "worker", f"file://{root}/bucket",
                    "--name", "pets", "--cache", f"ssd:{root}/cache=100MiB", "--state", f"{root}/state",
                    "--volume-socket", f"{root}/run/{UID}/{VOLUME_SOCKET}",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
                env={**os.environ, "DATACACHE_RUNTIME": f"{root}/run/{UID}"},
            )  # fmt: skip

    def worker_ends(self) -> None:
        assert self._worker is not None
        self._worker.kill()
        self._worker.wait()

    def all_end(self) -> None:
        self.worker_ends()
        self._holders.__exit__(None, None, None)
        self._begin()

    def close(self) -> None:
        with contextlib.suppress(MountError):
            self.mounter.take_off(UID, self.directory)
        self._holders.__exit__(None, None, None)
        if self._worker is not None:
            self.worker_ends()
