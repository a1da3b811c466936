"""`datacache worker` as a pod runs it: a process that serves a data set until it is told to end."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datacache.cli.main import main
from datacache.cluster import registry
from datacache.cluster.client import ControlClient, RemoteClient
from datacache.config.parsing import read_settings
from datacache.reading.job import LoadRequest
from datacache.worker import Worker
from tests.contract.control_suite import FILES
from tests.contract.test_control import TOKEN, fill, token_file
from tests.support.asking import Asker
from tests.support.reading import until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Process:
    """A worker process, from the moment at which it says that it serves."""

    def __init__(self, tmp_path: Path, *flags: str) -> None:
        self.runtime = f"{tmp_path}/run/datacache"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "datacache.cli.main", "worker", f"file://{tmp_path}/bucket",
             "--name", "pets", "--cache", f"ssd:{tmp_path}/cache=100MiB", *flags],
            env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        self._errors = self._process.stderr
        self.said: list[str] = []
        self.says("is served at")

    def says(self, part: str) -> None:
        """Return when it has logged `part`; fails when it ends before."""
        for line in self._errors:
            self.said.append(line)
            if part in line:
                return
        raise AssertionError(f"it ended: {self.said}")

    def tell(self, number: int = signal.SIGTERM) -> None:
        self._process.send_signal(number)

    def ended(self) -> int:
        """Its exit code, when it has ended."""
        self.said += self._errors.readlines()
        self._errors.close()
        return self._process.wait(30)

    @property
    def arguments(self) -> bytes:
        return Path(f"/proc/{self._process.pid}/cmdline").read_bytes()

    @property
    def client(self) -> ControlClient:
        found = registry.find(self.runtime, "pets")
        assert found is not None
        assert (found.pid, found.mount) == (self._process.pid, "")
        return ControlClient(found.socket)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("COVERAGE", "PATH"))}
    return kept | {
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": f"{tmp_path}/state",
        "XDG_RUNTIME_DIR": f"{tmp_path}/run",
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    fill(tmp_path / "bucket")
    return tmp_path


@pytest.fixture
def started(place: Path) -> Iterator[list[Process]]:
    """Processes that end with the test at the latest."""
    running: list[Process] = []
    yield running
    for process in running:
        process.kill()


def test_a_worker_serves_until_it_is_told_to_end(
    place: Path, started: list[Process], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands find it by name, a controller by its address; SIGTERM ends it with 0 and nothing of it is
    left but the cache, which the next one has."""
    address = f"127.0.0.1:{free_port()}"
    worker = Process(place, "--listen", address, "--token-file", token_file(place))
    started.append(worker)
    for name, value in environment(place).items():
        monkeypatch.setenv(name, value)
    assert main(["load", "pets"]) == 0
    assert main(["ls", "pets:/sub"]) == 0
    assert main(["status", "pets"]) == 0
    said = capsys.readouterr().out
    assert f"{len(FILES)} of {len(FILES)} files cached" in said
    assert "pets at (no mount)" in said
    remote = RemoteClient(f"http://{address}", token=TOKEN)
    assert (remote.ready(), remote.status()["index"]["files"]) == ("", len(FILES))
    assert TOKEN.encode() not in worker.arguments
    worker.tell()
    assert worker.ended() == 0
    assert "drained" in worker.said[-1]
    assert TOKEN not in "".join(worker.said)
    assert os.listdir(worker.runtime) == []
    again = Process(place)
    started.append(again)
    assert again.client.stat("/sub/b.bin").cached == {f"ssd:{place}/cache": 70_000}
    again.tell(signal.SIGINT)
    assert again.ended() == 0


def test_a_load_under_way_does_not_hold_up_the_end(place: Path, started: list[Process]) -> None:
    """It is cancelled, and what it has fetched stays."""
    worker = Process(place)
    started.append(worker)
    worker.client.load(LoadRequest(bandwidth=1))
    worker.tell()
    assert worker.ended() == 0
    assert "drained" in worker.said[-1]


def test_what_was_written_is_uploaded_before_the_end(
    place: Path, started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with a landing zone that the last one left: it is ready, and drains when it is told to."""
    owe(place, b"owed")
    # Nothing is due for an hour, but to who drains.
    worker = Process(place, "--rw", "--upload-delay", "1h")
    started.append(worker)
    assert worker.client.status()["writing"]["dirty_files"] == 1
    assert not (place / "bucket/new.bin").exists()
    worker.tell()
    assert worker.ended() == 0
    assert (place / "bucket/new.bin").read_bytes() == b"owed"


def test_what_cannot_be_uploaded_is_left_to_the_next_one(place: Path, started: list[Process]) -> None:
    """The drain is given up after --drain-timeout, or when a second signal comes: it is said how much is
    left, the exit code is 0, and it is still there."""
    owe(place, b"owed")
    bucket = place / "bucket"
    for flags, signals in ((("--drain-timeout", "0s"), 1), (("--drain-timeout", "10m"), 2)):
        bucket.rename(place / "away")
        bucket.write_bytes(b"not a directory")
        worker = Process(place, "--rw", "--upload-delay", "1h", *flags)
        started.append(worker)
        for number in range(signals):
            worker.tell()
            if number < signals - 1:
                worker.says("draining")
        assert worker.ended() == 0
        assert any("not drained: 0 load jobs run, 1 operations (4 bytes)" in line for line in worker.said)
        bucket.unlink()
        (place / "away").rename(bucket)
    worker = Process(place, "--rw")
    started.append(worker)
    until(lambda: (bucket / "new.bin").exists())
    worker.tell()
    assert worker.ended() == 0


def owe(place: Path, content: bytes) -> None:
    """Leave a landing zone that owes the bucket a file."""
    settings = read_settings(
        {"uri": [f"file://{place}/bucket"], "name": "pets", "rw": True, "upload-delay": "1h",
         "cache": [f"ssd:{place}/cache=100MiB"]},
        config_file=None, environment=environment(place),
    )  # fmt: skip
    with Worker(settings) as worker:
        assert worker.writing is not None
        overlay = worker.writing.overlay
        entry = overlay.create(1, b"new.bin", mode=0o644, uid=0, gid=0)
        landed = overlay.open(entry.ino, writing=True)
        os.pwrite(landed.descriptor, content, 0)
        overlay.sync(entry.ino)
        overlay.closed(entry.ino, landed)


REFUSED = [
    (["--listen", "0.0.0.0:9301"], "--listen: '0.0.0.0:9301' will not do; expected an address of loopback"),
    (["--listen", "[::]:9301"], "--listen: '[::]:9301' will not do"),
    (["--listen", "worker.example:9301"], "--listen: 'worker.example:9301' will not do"),
    (["--listen", "9301"], "--listen: '9301' will not do; expected HOST:PORT"),
    (["--token-file", "TOKEN"], "will not do; expected --listen beside it"),
    (["--listen", "127.0.0.1:1", "--tls-cert", "/x"], "expected --tls-key beside it"),
    (["--listen", "127.0.0.1:1", "--tls-key", "/x"], "expected --tls-cert beside it"),
    (["--listen", "0.0.0.0:1", "--token-file", "/nowhere"], "a file that can be read (No such file"),
    (["--listen", "0.0.0.0:1", "--token-file", "SHORT"], "tokens of 32 to 1024 printable ASCII"),
    (["--listen", "127.0.0.1:1", "--tls-cert", "SHORT", "--tls-key", "SHORT"], "a certificate in PEM"),
    (["--drain-timeout", "inf"], "--drain-timeout: 'inf' will not do"),
    (["--log-file", "/nowhere/x.log"], "--log-file: '/nowhere/x.log' will not do"),
]


@pytest.mark.parametrize(("flags", "expected"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_what_cannot_be_is_one_line(
    flags: list[str], expected: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit code 2, and nothing was begun."""
    short = place / "short"
    short.write_text("hunter2")
    short.chmod(0o600)
    names = {"TOKEN": token_file(place), "SHORT": str(short)}
    monkeypatch.setenv("XDG_STATE_HOME", f"{place}/state")
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"{place}/run")
    words = ["worker", f"file://{place}/bucket", "--cache", f"ssd:{place}/cache=100MiB"]
    assert main([*words, *(names.get(flag, flag) for flag in flags)]) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert len(said.err.splitlines()) == 1
    assert "hunter2" not in said.err
    assert not (place / "cache").exists()
    assert not (place / "state").exists()
    assert not (place / "run").exists()


def test_a_config_file_has_it_all(
    place: Path, started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of the API stand in a datacache.yaml like all others: where a token lies is no secret."""
    port = free_port()
    config = place / "datacache.yaml"
    config.write_text(f"listen: 127.0.0.1:{port}\ntoken-file: {token_file(place)}\nlog-format: json\n")
    worker = Process(place, "--config", str(config))
    started.append(worker)
    assert json.loads(worker.said[-1])["message"].endswith(f" and 127.0.0.1:{port}")
    ask = Asker(("127.0.0.1", port))
    assert [ask("GET", path).status for path in ("/readyz", "/v1/status")] == [200, 401]
    worker.tell()
    assert worker.ended() == 0
