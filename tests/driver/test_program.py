"""`datacache-csi` as a process: what it says of bad input, how it is found, how it ends."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi.v1 import csi_pb2 as v1
from csi.v1 import registration_pb2
from datacache.kube.release import DRIVER
from tests.driver.client import connected
from tests.driver.requests import Kubelet

STOP = 40.0


class Program:
    """The driver of one node, in a process of its own."""

    def __init__(
        self, kubelet: Kubelet, *, environment: dict[str, str] | None = None, flags: tuple[str, ...] = ()
    ) -> None:
        self.kubelet, self._flags = kubelet, flags
        self.socket = kubelet.root / "plugins" / DRIVER / "csi.sock"
        self.announced = kubelet.root / "plugins_registry" / f"{DRIVER}-reg.sock"
        self.log = kubelet.root.parent / "csi.log"
        self._environment = environment or {}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Program":
        """Start it; return when it answers."""
        words = ["--node-id", "node1", "--kubelet-dir", str(self.kubelet.root)]
        words += ["--run-dir", str(self.kubelet.root.parent / "datasets"), *self._flags]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "csi", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self._environment},
            )  # fmt: skip
        with connected(self.socket) as client:
            client.call(v1.ProbeRequest())
        return self

    def end(self, number: signal.Signals) -> int:
        """Send the signal; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(STOP)


@contextmanager
def running(
    kubelet: Kubelet, *, environment: dict[str, str] | None = None, flags: tuple[str, ...] = ()
) -> Iterator[Program]:
    """A driver that is ended, whatever happens."""
    program = Program(kubelet, environment=environment, flags=flags)
    try:
        yield program.start()
    finally:
        if program.process is not None and program.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.end(signal.SIGTERM)
            program.process.kill()
            program.process.wait()
    text = program.log.read_text()
    assert "Traceback" not in text, text


def probed(kubelet: Kubelet) -> subprocess.CompletedProcess[str]:
    """What `datacache-csi --probe` says."""
    words = ["--probe", "--kubelet-dir", str(kubelet.root)]
    return subprocess.run(
        [sys.executable, "-m", "csi", *words], capture_output=True, text=True, check=False, timeout=STOP
    )


@pytest.fixture
def kubelet(tmp_path: Path) -> Kubelet:
    return Kubelet(tmp_path / "kubelet").make()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--node-id: '' will not do"),
        (["--node-id", "a/b"], "--node-id: 'a/b' will not do"),
        (["--node-id", "x" * 64], "up to 63 letters"),
        (["--node-id", "n", "--kubelet-dir", "var"], "--kubelet-dir: 'var' will not do"),
        (["--node-id", "n", "--kubelet-dir", "{empty}"], "with plugins_registry in it"),
        (
            ["--node-id", "n", "--kubelet-dir", "{kubelet}", "--endpoint", "tcp://:1"],
            "unix:// and an absolute",
        ),
        (["--node-id", "n", "--kubelet-dir", "{kubelet}", "--endpoint", "unix:/" + "x" * 120], "107 bytes"),
        (["--node-id", "n", "--run-dir", "run"], "--run-dir: 'run' will not do; expected an absolute path"),
        (["--node-id", "n", "--takeover-timeout", "0s"], "expected a duration of 1s or more"),
        (["--node-id", "n", "--takeover-timeout", "soon"], "--takeover-timeout: 'soon' will not do"),
        (["--node", "n"], "--node: unknown flag; did you mean --node-id?"),
        (["--log-level", "loud"], "--log-level: invalid choice: 'loud'"),
    ],
)
def test_bad_input_is_one_line(kubelet: Kubelet, words: list[str], says: str) -> None:
    """Exit code 2, and nothing is listened on."""
    empty = kubelet.root.parent / "empty"
    empty.mkdir()
    filled = [word.format(empty=empty, kubelet=kubelet.root) for word in words]
    environment = {name: value for name, value in os.environ.items() if name != "NODE_NAME"}
    done = subprocess.run(
        [sys.executable, "-m", "csi", *filled], env=environment, capture_output=True, text=True, timeout=STOP
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("datacache-csi: error: ")
    assert not list(kubelet.root.rglob("*.sock"))


def test_help_costs_nothing() -> None:
    """Nor does it need gRPC."""
    code = "import sys; sys.modules['grpc'] = None; from csi.__main__ import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=STOP)
    assert done.returncode == 0, done.stderr
    assert "--kubelet-dir" in done.stdout


def test_without_the_extra_it_says_what_to_install(kubelet: Kubelet) -> None:
    """One line."""
    words = ["--node-id", "n", "--kubelet-dir", str(kubelet.root)]
    code = f"import sys; sys.modules['grpc'] = None; from csi.__main__ import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=STOP)
    assert done.returncode == 1
    assert "pip install 'dataset-cache[kubernetes]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_kubelet_finds_it(kubelet: Kubelet) -> None:
    """By the socket in plugins_registry; and hears where calls are answered."""
    with running(kubelet) as program:
        with connected(program.announced) as client:
            info = client.call(registration_pb2.InfoRequest())
            client.call(registration_pb2.RegistrationStatus(plugin_registered=True))
            client.call(registration_pb2.RegistrationStatus(plugin_registered=False, error="a reason"))
        assert (info.type, info.name, list(info.supported_versions)) == ("CSIPlugin", DRIVER, ["1.0.0"])
        with connected(info.endpoint) as client:
            assert client.call(v1.NodeGetInfoRequest()).node_id == "node1"
        assert program.end(signal.SIGTERM) == 0
        assert "the kubelet has registered us" in program.log.read_text()
        assert "has not registered us: a reason" in program.log.read_text()


def test_it_ends_clean_and_starts_after_a_kill(kubelet: Kubelet) -> None:
    """Sockets that a killed one has left are no obstacle; one that runs is."""
    with running(kubelet) as program:
        program.end(signal.SIGKILL)
        assert program.socket.exists()
    with running(kubelet) as program:
        second = subprocess.run(
            [sys.executable, "-m", "csi", "--node-id", "n", "--kubelet-dir", str(kubelet.root)],
            capture_output=True, text=True, timeout=STOP,
        )  # fmt: skip
        assert second.returncode == 2
        assert "one that no other process listens on" in second.stderr
        assert program.end(signal.SIGTERM) == 0
        assert not program.socket.exists()
        assert not program.announced.exists()


def test_a_probe_tells_whether_the_driver_answers(kubelet: Kubelet) -> None:
    """A process that is stopped listens, and answers nothing."""
    assert probed(kubelet).returncode == 1
    with running(kubelet) as program:
        assert probed(kubelet).returncode == 0
        assert program.process is not None
        program.process.send_signal(signal.SIGSTOP)
        try:
            said = probed(kubelet)
        finally:
            program.process.send_signal(signal.SIGCONT)
        assert said.returncode == 1
        assert "error: no driver answers at" in said.stderr and "(DEADLINE_EXCEEDED)" in said.stderr
