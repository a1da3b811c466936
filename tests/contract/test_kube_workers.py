"""What the controller writes for a worker, read by one: claims and manifests, as a pod would have them."""

import os
from pathlib import Path
from typing import Any

import pytest

from datacache.clock import SystemClock
from datacache.config.parsing import read_settings
from datacache.errors import DatacacheError, SettingError
from datacache.kube.beside import Beside, Twin
from datacache.kube.manifests import objects, settings_text
from datacache.kube.release import Release
from datacache.kube.spec import DatasetSpec, read_dataset
from datacache.model import ByteRange, Kind
from datacache.worker import Worker, opened_sources
from tests.support.stub import Answer, Request, StubServer

UID = "0b6e4c1a-3a57-4b8f-9f53-111111111111"
TWIN = Twin("nas", "datacache-twin", {"nfs": {"server": "n", "path": "/"}}, ("ReadOnlyMany",))


def release(root: Path) -> Release:
    return Release(
        namespace="datacache", image="x", state_dir=f"{root}/state", disk_dir=f"{root}/disk",
        run_dir=f"{root}/run", tier_quota=64 << 20,
    )  # fmt: skip


def dataset(root: Path, **spec: Any) -> DatasetSpec:
    metadata = {"name": "d", "namespace": "team-a", "uid": UID, "generation": 1}
    return read_dataset({"metadata": metadata, "spec": spec}, release(root))


def place(root: Path, path: str) -> Path:
    """Where it is here what a pod has mounted there."""
    return root / path.removeprefix("/")


def settings(root: Path, of: DatasetSpec, beside: Beside) -> Any:
    """As the worker of a pod reads them, whose root is `root`."""
    text = settings_text(of, release(root), beside).replace("/etc/datacache", f"{root}/etc/datacache")
    (file := root / "datacache.yaml").write_text(text)
    variables = {"HOME": str(root), "DATACACHE_RUNTIME": f"{root}/run"}
    return read_settings({}, config_file=str(file), environment=variables)


def mounts(root: Path, of: DatasetSpec, beside: Beside) -> list[dict[str, Any]]:
    made = objects(of, release(root), beside=beside, token="x")
    (daemon_set,) = [each for each in made if each["kind"] == "DaemonSet"]
    return list(daemon_set["spec"]["template"]["spec"]["containers"][0]["volumeMounts"])


def files(worker: Worker) -> list[str]:
    return [path for path, entry in worker.index.walk("/") if entry.kind is Kind.FILE]


def test_a_claim_is_read_at_its_directory_and_nothing_beside_it(tmp_path: Path) -> None:
    of = dataset(tmp_path, mounts=[{"mountPoint": "pvc://nas/raw/2024", "name": "nas"}])
    beside = Beside(twins=(TWIN,))
    (at,) = [each["mountPath"] for each in mounts(tmp_path, of, beside) if each["name"] == "claim-0"]
    claim = place(tmp_path, at)
    (claim / "raw/2024/in").mkdir(parents=True)
    (claim / "raw/2024/in/a").write_text("data")
    (claim / "raw/other").write_text("not of this mount")
    (claim / "raw/2024/out").symlink_to(tmp_path)
    with Worker(settings(tmp_path, of, beside)) as worker:
        assert files(worker) == ["/nas/in/a"]
        (source,) = worker.sources
        assert bytes(source.read(source.stat("in/a"), ByteRange(0, 4))) == b"data"


def test_a_claim_whose_directory_became_a_link_shows_nothing_of_where_it_leads(tmp_path: Path) -> None:
    of = dataset(tmp_path, mounts=[{"mountPoint": "pvc://nas/raw"}])
    beside = Beside(twins=(TWIN,))
    (at,) = [each["mountPath"] for each in mounts(tmp_path, of, beside) if each["name"] == "claim-0"]
    claim = place(tmp_path, at)
    claim.mkdir(parents=True)
    (claim / "raw").symlink_to("/etc")
    with Worker(settings(tmp_path, of, beside)) as worker, pytest.raises(DatacacheError, match="raw"):
        files(worker)


def test_a_manifest_of_a_config_map_is_read_where_it_is_mounted(tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        return Answer(200, b"data", {"ETag": '"tag"', "Content-Type": "text/plain"})

    of = dataset(tmp_path, manifest={"configMapKeyRef": {"name": "lists", "key": "k"},
                                     "options": {"region": "eu-west-1"}})  # fmt: skip
    with StubServer(answer) as server:
        data = f'{{"url": "{server.url}/train/a", "size": 4}}\n"{server.url}/b"\n'.encode()
        beside = Beside(manifest=data)
        _mounted(tmp_path, of, beside)
        with Worker(settings(tmp_path, of, beside)) as worker:
            assert sorted(files(worker)) == ["/b", "/train/a"]
            assert worker.status()["consistency"] == "immutable"


def test_a_manifest_of_an_object_that_changes_its_mind_shows_no_file_of_the_worker(tmp_path: Path) -> None:
    """What the controller looked at is another time's: the worker refuses it itself."""
    of = dataset(tmp_path, manifest={"configMapKeyRef": {"name": "lists", "key": "k"}})
    beside = Beside(manifest=b'"file:///etc/hostname"')
    _mounted(tmp_path, of, beside)
    with (
        pytest.raises(SettingError, match="expected URLs of s3, oss, gs, az, http, https only"),
        opened_sources(settings(tmp_path, of, beside), clock=SystemClock()),
    ):
        pass


def _mounted(root: Path, of: DatasetSpec, beside: Beside) -> None:
    """The file of a ConfigMap, by subPath: itself, and no link to it."""
    (at,) = [each for each in mounts(root, of, beside) if each["name"] == "manifest"]
    assert os.path.basename(at["mountPath"]) == at["subPath"]
    path = place(root, at["mountPath"])
    path.parent.mkdir(parents=True)
    path.write_bytes(beside.manifest)
