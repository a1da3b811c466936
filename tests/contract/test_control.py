"""The contract of `Control`, held by a worker and by clients of one: over its socket, TCP, and TLS."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from datacache.cluster import registry
from datacache.cluster.client import ControlClient, RemoteClient
from datacache.cluster.control import RemoteControl
from datacache.cluster.server import ControlServer
from datacache.config.parsing import read_settings
from datacache.config.settings import ApiSettings, Settings
from datacache.errors import Unavailable
from datacache.model import MiB
from datacache.reading.job import LoadRequest, LoadStatus
from datacache.worker import Worker
from tests.contract.control_suite import FILES, ControlSuite, RemoteSuite
from tests.support.faulty_s3 import Fault, FaultyS3, Stall, Trickle
from tests.support.reading import until


@dataclass
class Staged:
    """Implements `control_suite.Stage`."""

    control: Any
    cached: Callable[[str], dict[str, int]]
    bucket: Path
    tier: str
    ended: Callable[[str], LoadStatus]


def fill(bucket: Path) -> None:
    for name, content in FILES.items():
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_bytes(content)


def settings_of(tmp_path: Path, **flags: object) -> Settings:
    given = {"uri": f"file://{tmp_path}/bucket", "cache": [f"ssd:{tmp_path}/cache=100MiB"], **flags}
    environment = {
        "XDG_STATE_HOME": f"{tmp_path}/state", "XDG_RUNTIME_DIR": f"{tmp_path}/run",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "example",
    }  # fmt: skip
    return read_settings(given, config_file=None, environment=environment)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """A worker of a directory as a bucket."""
    fill(tmp_path / "bucket")
    with Worker(settings_of(tmp_path)) as worker:
        yield worker


def staged(worker: Worker, control: RemoteControl, tmp_path: Path) -> Staged:
    def ended(job: str) -> LoadStatus:
        status = worker.loads.wait(job, 30)
        assert status.state != "running"
        return status

    def cached(path: str) -> dict[str, int]:
        return worker.stat(path).cached

    return Staged(control, cached, tmp_path / "bucket", f"ssd:{tmp_path}/cache", ended)


class TestWorker(ControlSuite):
    """A worker, asked directly."""

    @pytest.fixture
    def stage(self, worker: Worker, tmp_path: Path) -> Staged:
        return staged(worker, worker, tmp_path)


class TestClient(ControlSuite):
    """The same over its socket, found in the registry."""

    @pytest.fixture
    def stage(self, worker: Worker, tmp_path: Path) -> Iterator[Staged]:
        runtime = worker.settings.runtime
        with ControlServer(worker, worker.socket):
            registry.register(runtime, worker.registration())
            found = registry.find(runtime, worker.settings.dataset.name)
            assert found is not None
            yield staged(worker, ControlClient(found.socket), tmp_path)
            registry.unregister(runtime, worker.registration())


TOKEN = "0123456789abcdef" * 4
"""Of the controller in these tests."""


def token_file(tmp_path: Path, *tokens: str) -> str:
    path = tmp_path / "token"
    path.write_text("\n".join(tokens or (TOKEN,)) + "\n")
    path.chmod(0o600)
    return str(path)


class TestOverTcp(RemoteSuite):
    """What a controller may ask, with a token."""

    @pytest.fixture
    def stage(self, worker: Worker, tmp_path: Path) -> Iterator[Staged]:
        chosen = ApiSettings("127.0.0.1:0", token_file(tmp_path))
        with ControlServer(worker, worker.socket, remote=chosen) as server:
            client = RemoteClient(f"http://127.0.0.1:{server.port}", token=TOKEN)
            yield staged(worker, client, tmp_path)


class TestOverTls(RemoteSuite):
    """The same over TLS: of a worker that is asked by its address and has a certificate of its name."""

    @pytest.fixture
    def stage(self, worker: Worker, tmp_path: Path) -> Iterator[Staged]:
        authority = certificates(tmp_path, "worker.example")
        chosen = ApiSettings(
            "127.0.0.1:0", token_file(tmp_path), str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")
        )
        with ControlServer(worker, worker.socket, remote=chosen) as server:
            client = RemoteClient(
                f"https://127.0.0.1:{server.port}", token=TOKEN, ca=authority, server_name="worker.example"
            )
            yield staged(worker, client, tmp_path)


def certificates(directory: Path, name: str) -> str:
    """A fresh certificate of `name` in `directory`, with its key; the file of who signed it."""
    authority = trustme.CA()
    issued = authority.issue_cert(name)
    (directory / "ca.crt").write_bytes(authority.cert_pem.bytes())
    for file, content in (
        ("tls.crt", b"".join(part.bytes() for part in issued.cert_chain_pems)),
        ("tls.key", issued.private_key_pem.bytes()),
    ):
        # Renamed into place, as the kubelet changes a Secret.
        new = directory / f"{file}.new"
        new.write_bytes(content)
        new.chmod(0o600)
        new.replace(directory / file)
    return str(directory / "ca.crt")


@pytest.mark.parametrize("fault", [Stall(), Stall(after=10), Trickle(0.01)], ids=repr)
def test_a_worker_closes_while_its_store_stalls(tmp_path: Path, fault: Fault) -> None:
    """Loads, reads, listings and calls over the socket are given up: a close takes no longer than a moment,
    whatever the store does. Retries could go on for minutes."""
    objects = {f"{n:02}": bytes(2 * MiB) for n in range(40)} | {"d/x": b"x"}
    with FaultyS3(objects) as s3, ThreadPoolExecutor(4) as others, ExitStack() as built:
        flags = {"uri": "s3://bucket", "endpoint": s3.endpoint, "timeout": "600s", "stall-timeout": "300s"}
        worker = Worker(settings_of(tmp_path, **flags))
        control = ControlServer(worker, worker.socket)
        control.start()
        built.callback(control.close)
        built.callback(worker.close)
        held = worker.reader.open(worker.index.resolve("/00"))
        s3.add("get", *[fault] * 100)
        s3.add("list", fault, fault)
        job = worker.load(LoadRequest(files=tuple(f"/{n:02}" for n in range(40))))
        reading = others.submit(held.read, 0, 9_000)
        listing = others.submit(ControlClient(worker.socket).list, "/d")
        until(lambda: s3.count("get") >= 10 and s3.count("list") >= 2)
        begun = time.monotonic()
        built.close()
        assert time.monotonic() - begun < 5.0
        assert worker.load_status(job).state == "cancelled"
        assert worker.load_status(job).files_failed == 0
        assert isinstance(reading.exception(5.0), Unavailable)
        assert listing.exception(5.0) is not None
        held.close()
