"""The contract of `Control`, held by a worker and by a client of one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from datacache.cluster import registry
from datacache.cluster.client import ControlClient
from datacache.cluster.control import Control
from datacache.cluster.server import ControlServer
from datacache.config.parsing import read_settings
from datacache.config.settings import Settings
from datacache.reading.job import LoadStatus
from datacache.worker import Worker
from tests.contract.control_suite import FILES, ControlSuite


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
    environment = {"XDG_STATE_HOME": f"{tmp_path}/state", "XDG_RUNTIME_DIR": f"{tmp_path}/run"}
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
