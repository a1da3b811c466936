"""The contract of `Control`, held by a worker and by a client of one."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from datacache.cluster import registry
from datacache.cluster.client import ControlClient
from datacache.cluster.control import Control
from datacache.cluster.server import ControlServer
from datacache.config.parsing import read_settings
from datacache.config.settings import Settings
from datacache.errors import Unavailable
from datacache.model import MiB
from datacache.reading.job import LoadRequest, LoadStatus
from datacache.worker import Worker
from tests.contract.control_suite import FILES, ControlSuite
from tests.support.faulty_s3 import Fault, FaultyS3, Stall, Trickle
from tests.support.reading import until


@dataclass
class Staged:
    """Implements `control_suite.Stage`."""

    control: Control
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


def staged(worker: Worker, control: Control, tmp_path: Path) -> Staged:
    def ended(job: str) -> LoadStatus:
        status = worker.loads.wait(job, 30)
        assert status.state != "running"
        return status

    return Staged(control, tmp_path / "bucket", f"ssd:{tmp_path}/cache", ended)


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
