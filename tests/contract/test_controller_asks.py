"""What the controller asks workers, asked of a real one over TCP: the words are the same on both sides."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from datacache.cluster.server import ControlServer
from datacache.config.settings import ApiSettings
from datacache.errors import ControlError
from datacache.kube.controller import RemoteWorker
from datacache.kube.figures import read_figures
from datacache.kube.loading import bring_on
from datacache.kube.loads import read_load
from datacache.worker import Worker
from tests.contract.test_control import TOKEN, fill, settings_of, token_file


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    fill(tmp_path / "bucket")
    with Worker(settings_of(tmp_path)) as worker:
        yield worker


@pytest.fixture
def url(worker: Worker, tmp_path: Path) -> Iterator[str]:
    remote = ApiSettings("127.0.0.1:0", token_file(tmp_path))
    with ControlServer(worker, worker.socket, remote=remote) as serving:
        yield f"http://127.0.0.1:{serving.port}"


def test_its_figures_are_what_it_holds(worker: Worker, url: str) -> None:
    asked = RemoteWorker(url, TOKEN)
    before = read_figures("n", asked.status())
    assert before.cached == 0 and before.clean
    job = asked.load("/", globs=(), bandwidth=0, verify=False)
    worker.loads.wait(job, 30)
    after = read_figures("n", asked.status())
    status = worker.status()
    assert after.cached == sum(tier["used"] for tier in status["tiers"]) > 0
    assert (after.files, after.bytes) == (status["index"]["files"], status["index"]["bytes"])


def test_targets_are_loaded_one_after_the_other(worker: Worker, url: str) -> None:
    asked = RemoteWorker(url, TOKEN)
    spec = read_load({"spec": {"dataset": {"name": "d"}, "target": [
        {"path": "/", "globs": ["*.bin"]}, {"path": "/"}]}})  # fmt: skip
    known: tuple[str, ...] = ()
    for _ in range(10):
        jobs = bring_on(asked, spec, known)
        known = tuple(job.id for job in jobs)
        worker.loads.wait(known[-1], 30)
        if len(known) == 2:
            break
    jobs = bring_on(asked, spec, known)
    assert [job.state for job in jobs] == ["done", "done"]
    assert 0 < jobs[0].files_done < jobs[1].files_done
    assert all(job.listed and job.bytes_done == job.bytes > 0 for job in jobs)


def test_a_job_that_it_does_not_know_is_asked_for_again(worker: Worker, url: str) -> None:
    spec = read_load({"spec": {"dataset": {"name": "d"}}})
    (job,) = bring_on(RemoteWorker(url, TOKEN), spec, ("of-a-worker-before",))
    assert job.id != "of-a-worker-before"
    worker.loads.wait(job.id, 30)


def test_a_wrong_token_and_a_worker_that_is_not_there_are_no_answer(url: str) -> None:
    for asked in (RemoteWorker(url, "f" * 64), RemoteWorker("http://127.0.0.1:1", TOKEN)):
        with pytest.raises(ControlError):
            asked.status()
