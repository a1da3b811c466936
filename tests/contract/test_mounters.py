"""The contract of mounters, on the real one and the fake."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi.mounter import fake, linux
from csi.mounter.fake import FakeMounter
from csi.mounter.linux import LinuxMounter, surroundings
from datacache.cluster import registry
from datacache.cluster.client import ControlClient
from datacache.errors import SettingError, TookTooLong
from fuse import mountpoint
from tests.conftest import AnnouncedLogs
from tests.contract.mounter_suite import Made, MounterContract
from tests.support.reading import until


class _Fake:
    """A table for a node."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.node = fake.Node()
        self.mounter = FakeMounter(self.node)

    def tree(self, *, rw: bool = False) -> dict[str, object]:
        return {"uri": "s3://bucket", **({"rw": "true"} if rw else {})}

    def exists(self, directory: Path) -> bool:
        return str(directory) in self.node.directories

    @contextmanager
    def foreign(self, directory: Path) -> Iterator[None]:
        self.node.mounts[str(directory)] = fake.Place(None, read_only=False)
        yield
        del self.node.mounts[str(directory)]

    @contextmanager
    def opened(self, directory: Path) -> Iterator[None]:
        self._shown(directory).open = True
        shown = self._shown(directory)
        yield
        shown.open = False

    def kill(self, directory: Path) -> None:
        self._shown(directory).alive = False

    def _shown(self, directory: Path) -> fake.DataSet:
        shown = self.node.mounts[str(directory)].shown
        assert shown is not None
        return shown


class TestFakeMounter(MounterContract):
    """The fake keeps what the real one promises."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> Made:
        return _Fake(tmp_path)


class _Linux:
    """This machine, and a directory as the store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mounter = LinuxMounter()
        (root / "bucket").mkdir()
        (root / "bucket" / "file").write_bytes(b"content")
        for name in ("staging", "foreign"):
            (root / name).mkdir()

    def tree(self, *, rw: bool = False) -> dict[str, object]:
        given = {
            "uri": [(self.root / "bucket").as_uri()], "name": "test", "state": str(self.root / "state"),
            "cache": [f"ssd:{self.root / 'cache'}=64MiB"], "allow-other": "true",
        }  # fmt: skip
        return {**given, "rw": "true", "landing": str(self.root / "landing")} if rw else given

    def exists(self, directory: Path) -> bool:
        return directory.is_dir()

    @contextmanager
    def foreign(self, directory: Path) -> Iterator[None]:
        subprocess.run(["mount", "-t", "tmpfs", "test", str(directory)], check=True)
        yield
        subprocess.run(["umount", str(directory)], check=True)

    @contextmanager
    def opened(self, directory: Path) -> Iterator[None]:
        with open(directory / "file", "rb"):
            yield

    def kill(self, directory: Path) -> None:
        broker = registry.find(str(self.root / "run"), str(directory))
        assert broker is not None
        daemon = ControlClient(broker.socket).status()["pid"]
        ends = [os.pidfd_open(pid) for pid in (broker.pid, daemon)]
        for end in ends:
            signal.pidfd_send_signal(end, signal.SIGKILL)
        while mountpoint.statvfs(str(directory)).__class__ is os.statvfs_result:
            pass  # each is a process that is waited for
        for end in ends:
            os.close(end)

    def clean(self) -> None:
        for name in ("target", "a", "b"):
            while mountpoint.is_mounted(str(self.root / name)):
                mountpoint.unmount(str(self.root / name), lazy=True)
        self.mounter.take_off(str(self.root / "staging"), within=30)


@pytest.mark.mounted
@pytest.mark.skipif(bool(mountpoint.obstacle()), reason=mountpoint.obstacle() or "-")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make bind mounts")
class TestLinuxMounter(MounterContract):
    """Real mounts, in directories of our own."""

    @pytest.fixture
    def made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
        monkeypatch.setenv("DATACACHE_RUNTIME", str(tmp_path / "run"))
        made = _Linux(tmp_path)
        yield made
        made.clean()

    def test_what_lies_in_a_target_is_not_removed(self, made: Made, tmp_path: Path) -> None:
        """A directory that is no mount any more may hold what somebody wrote there."""
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "precious").write_text("x")
        with pytest.raises(Exception, match="not empty"):
            made.mounter.unbind(str(tmp_path / "target"))
        assert (tmp_path / "target" / "precious").read_text() == "x"

    def test_a_mount_that_hangs_goes_and_who_waits_for_it_gets_an_error(
        self, made: Made, staging: Path, tmp_path: Path, logs: AnnouncedLogs
    ) -> None:
        """Its connection is aborted: a reader that nobody could kill ends."""
        logs.expect("its connection is aborted")
        made.mounter.bind(str(staging), str(tmp_path / "target"), read_only=True)
        broker = registry.find(str(tmp_path / "run"), str(staging))
        assert broker is not None
        daemon = ControlClient(broker.socket).status()["pid"]
        for pid in (broker.pid, daemon):
            os.kill(pid, signal.SIGSTOP)
        reader = subprocess.Popen(
            ["cat", str(tmp_path / "target" / "file")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            made.mounter.unbind(str(tmp_path / "target"))
            made.mounter.take_off(str(staging), within=30)
            _, said = reader.communicate(timeout=30)
            assert reader.returncode == 1, said
        finally:
            reader.kill()
            reader.wait()
        assert made.mounter.at(str(staging)) is None
        assert not os.path.exists(f"/proc/{daemon}") or _is_zombie(daemon)

    @pytest.mark.long
    def test_a_mount_that_hangs_and_is_in_use_goes_too(
        self, made: Made, staging: Path, tmp_path: Path, logs: AnnouncedLogs
    ) -> None:
        """Whoever has something of it open is not waited for; its processes end."""
        logs.expect("its connection is aborted")
        broker = registry.find(str(tmp_path / "run"), str(staging))
        assert broker is not None
        daemon = ControlClient(broker.socket).status()["pid"]
        with made.opened(staging):
            for pid in (broker.pid, daemon):
                os.kill(pid, signal.SIGSTOP)
            made.mounter.take_off(str(staging), within=30)
            assert made.mounter.at(str(staging)) is None
        until(lambda: not os.path.exists(f"/proc/{daemon}") or _is_zombie(daemon))
        assert not registry.live(str(tmp_path / "run"))

    def test_what_a_mount_owes_is_asked_without_touching_it(
        self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that hangs would keep whoever looks at it: nothing is owed, as far as anybody knows."""
        monkeypatch.setattr(linux, "_ASK", 0.5)
        staging = tmp_path / "staging"
        made.mounter.show(str(staging), {**made.tree(), "attr-timeout": "0s"}, {}, within=60)
        broker = registry.find(str(tmp_path / "run"), str(staging))
        assert broker is not None
        stopped = (broker.pid, ControlClient(broker.socket).status()["pid"])
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        asked: list[str] = []
        asking = threading.Thread(target=lambda: asked.append(made.mounter.owed(str(staging))), daemon=True)
        asking.start()
        asking.join(20)
        in_time = list(asked)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        asking.join(30)
        assert in_time == [""]

    def test_a_mount_takes_only_the_time_that_it_is_given(self, made: Made, tmp_path: Path) -> None:
        """It is given up, and leaves nothing."""
        with pytest.raises(TookTooLong, match="took more than 0 s"):
            made.mounter.show(str(tmp_path / "staging"), made.tree(), {}, within=0.01)
        assert made.mounter.at(str(tmp_path / "staging")) is None
        made.mounter.show(str(tmp_path / "staging"), made.tree(), {}, within=60)

    def test_a_setting_that_the_mount_refuses_is_said_without_the_secret(
        self, made: Made, tmp_path: Path
    ) -> None:
        """Its words come back; and no value of a secret that got into them."""
        wrong = {**made.tree(), "uri": "nosuchscheme-hush://x"}
        with pytest.raises(SettingError) as caught:
            made.mounter.show(str(tmp_path / "staging"), wrong, {"AWS_SECRET_ACCESS_KEY": "hush"}, within=60)
        assert "nosuchscheme-***" in str(caught.value)


def _is_zombie(pid: int) -> bool:
    return b") Z " in Path(f"/proc/{pid}/stat").read_bytes()


def test_a_mount_has_the_volumes_secrets_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who the driver is to a store, and how it is set up, is no volume's business."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the driver")
    monkeypatch.setenv("AWS_PROFILE", "of the driver")
    monkeypatch.setenv("DATACACHE_TTL", "5s")
    monkeypatch.setenv("DATACACHE_RUNTIME", "/run/x")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    given = surroundings({"AWS_SECRET_ACCESS_KEY": "of the volume"})
    assert given["AWS_SECRET_ACCESS_KEY"] == "of the volume"
    assert given["DATACACHE_RUNTIME"] == "/run/x"
    assert given["HTTPS_PROXY"] == "http://proxy:3128"
    assert "AWS_PROFILE" not in given
    assert "DATACACHE_TTL" not in given
