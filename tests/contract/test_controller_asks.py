"""What the controller asks workers, asked of a real one over TCP: the words are the same on both sides."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datacache.cluster.server import ControlServer
from datacache.config.settings import ApiSettings
from datacache.errors import ControlError
from datacache.kube.asking import Trust
from datacache.kube.certificates import Authority, issue, make_authority
from datacache.kube.controller import RemoteWorker
from datacache.kube.dataload import read_load
from datacache.kube.figures import read_figures
from datacache.kube.loading import bring_on
from datacache.model import Kind
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


def test_an_order_is_announced_and_nothing_is_loaded(worker: Worker, url: str) -> None:
    spec = read_load({"spec": {"dataset": {"name": "d"}, "order": {
        "configMapKeyRef": {"name": "c", "key": "k"}}}})  # fmt: skip
    files = [path for path, entry in worker.index.walk("/") if entry.kind is Kind.FILE][:3]
    (job,) = bring_on(RemoteWorker(url, TOKEN), spec, (), (*files, "/nowhere"))
    worker.loads.wait(job.id, 30)
    (job,) = bring_on(RemoteWorker(url, TOKEN), spec, (job.id,), ())
    assert (job.state, job.files_done, job.files_failed, job.bytes_fetched) == ("failed", len(files), 1, 0)
    assert [path for path, _ in job.failures] == ["/nowhere"]


def test_a_job_that_it_does_not_know_is_asked_for_again(worker: Worker, url: str) -> None:
    spec = read_load({"spec": {"dataset": {"name": "d"}}})
    (job,) = bring_on(RemoteWorker(url, TOKEN), spec, ("of-a-worker-before",))
    assert job.id != "of-a-worker-before"
    worker.loads.wait(job.id, 30)


def test_a_wrong_token_and_a_worker_that_is_not_there_are_no_answer(url: str) -> None:
    for asked in (RemoteWorker(url, "f" * 64), RemoteWorker("http://127.0.0.1:1", TOKEN)):
        with pytest.raises(ControlError):
            asked.status()


# ---- over TLS ------------------------------------------------------------------------------------

NAME = "datacache-1.datacache.svc"


class Served:
    """The worker over TLS, with the certificate that lies in the directory."""

    def __init__(self, worker: Worker, directory: Path) -> None:
        self._directory = directory
        self.authority = make_authority(time.time())
        self.give(self.authority)
        remote = ApiSettings(
            "127.0.0.1:0", token_file(directory), tls_cert=str(directory / "tls.crt"),
            tls_key=str(directory / "tls.key"),
        )  # fmt: skip
        self.server = ControlServer(worker, worker.socket, remote=remote)

    def give(self, authority: Authority) -> None:
        """Another certificate, as a Secret that changes brings it."""
        pair = issue(authority, [NAME], time.time())
        for name, text in (("tls.key", pair.key), ("tls.crt", pair.certificate)):
            (new := self._directory / f"{name}.new").write_text(text)
            new.chmod(0o600)
            new.rename(self._directory / name)

    def asked(self, authority: Authority, name: str = NAME) -> RemoteWorker:
        url = f"https://127.0.0.1:{self.server.port}"
        return RemoteWorker(url, TOKEN, Trust(authority.trusted(time.time()), name))


@pytest.fixture
def served(worker: Worker, tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "tls").mkdir()
    found = Served(worker, tmp_path / "tls")
    with found.server:
        yield found


def test_a_worker_is_known_by_its_name_and_not_by_its_address(served: Served) -> None:
    assert served.asked(served.authority).status()
    with pytest.raises(ControlError, match="its certificate is not accepted: Hostname mismatch"):
        served.asked(served.authority, "datacache-2.datacache.svc").status()
    with pytest.raises(ControlError, match="its certificate is not accepted"):
        served.asked(make_authority(time.time())).status()


def test_no_worker_is_a_stranger_while_the_authority_changes(served: Served) -> None:
    """The controller knows the next one first; the worker gets its certificate a minute later."""
    after = make_authority(time.time(), served.authority)
    assert served.asked(after).status(), "it has the one of before"
    served.give(after)
    assert served.asked(after).status()
