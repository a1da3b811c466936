"""A Dataset on a real API server, controller manager and scheduler: what becomes of it, and what is left."""

import base64
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from datacache.clock import VirtualClock
from datacache.errors import ClusterError
from datacache.kube.api import OURS, configuration
from datacache.kube.asking import Asking
from datacache.kube.authority import Authorities
from datacache.kube.beside import Beside, Token, Twin
from datacache.kube.controller import Controller
from datacache.kube.loading import Loader
from datacache.kube.manifests import CONFIG_ANNOTATION, node_label, objects
from datacache.kube.marks import MARKS
from datacache.kube.phase import ACCEPT_LOSS
from datacache.kube.reconciling import FINALIZER, GOING, IDLE, LATE, Reconciler
from datacache.kube.release import Key, Name
from datacache.kube.spec import read_dataset
from tests.cluster.datasets import RELEASE, SECRET, CountingApi, Killed, Team, job_says, worker_says
from tests.cluster.plane import PATIENCE, ControlPlane, wait_until
from tests.conftest import AnnouncedLogs

CHART = Path(__file__).parents[2] / "charts/datacache"
CRDS = CHART / "files/crds"
GiB = 1 << 30


@pytest.fixture(scope="module")
def installed(plane: ControlPlane) -> ControlPlane:
    """With the CRDs, and the namespace of the release."""
    plane.kubectl("apply", "-f", str(CRDS))
    wait_until(lambda: plane.ask("/apis/datacache.io/v1alpha1/datasets")[0] == 200, "the CRDs to be served")
    plane.kubectl("create", "namespace", RELEASE.namespace)
    plane.kubectl("create", "-n", RELEASE.namespace, "serviceaccount", RELEASE.service_account)
    return plane


@pytest.fixture
def team(installed: ControlPlane) -> Iterator[Team]:
    found = Team(installed)
    yield found
    found.close()


class Looker:
    """A controller that looks when it is told to."""

    def __init__(self, plane: ControlPlane, team: Team) -> None:
        # It begins now: what the API gives ends some time after that.
        self.team, self.clock = team, VirtualClock(float(int(time.time())))
        self.nodes: set[str] = set()
        self.pods: set[str] = set()
        self.release = RELEASE
        self.workers_may = True
        self.api = CountingApi(configuration(str(plane.kubeconfig)))
        self.pool = ThreadPoolExecutor(4, "ask")
        self._begin()

    def _begin(self) -> None:
        authorities = Authorities(self.api, self.release, clock=self.clock)
        asking = Asking(
            self.api, self.release, connect=self.team.connect, pool=self.pool, authorities=authorities
        )
        self.reconciler = Reconciler(
            self.api, self.release, asking, clock=self.clock, nodes_of=lambda key: self.nodes,
            pods_of=lambda key: self.pods, authorities=authorities,
            workers=lambda: nullcontext(self.workers_may),
        )  # fmt: skip
        self.loader = Loader(self.api, RELEASE, asking, clock=self.clock, dataset_changed=lambda key: None)

    def begin_again(self) -> None:
        """As after a restart: nothing is remembered."""
        self.api.writes.clear()
        self.api.dies_at = -1
        self._begin()

    def look(self, name: str = "data") -> float | None:
        return self.reconciler.look(Key(self.team.namespace, name))

    def until(self, true: object, what: str, name: str = "data") -> None:
        def seen() -> object:
            self.look(name)
            return true()  # type: ignore[operator]

        wait_until(seen, what)

    def close(self) -> None:
        self.pool.shutdown()
        self.api.close()


@pytest.fixture
def looker(installed: ControlPlane, team: Team) -> Iterator[Looker]:
    found = Looker(installed, team)
    yield found
    found.close()


def left_of(team: Team, uid: str) -> list[str]:
    """What stands in the API and belongs to the Dataset of that uid."""
    kinds = [("v1", "ConfigMap"), ("v1", "Secret"), ("v1", "Service"), ("v1", "PersistentVolume"),
             ("v1", "PersistentVolumeClaim"), ("apps/v1", "DaemonSet"), ("v1", "Pod")]  # fmt: skip
    labels = f"datacache.io/dataset-uid={uid}"
    found = [
        f"{kind} {each['metadata']['name']}"
        for api, kind in kinds
        for each in team.api.list(api, kind, labels=labels)
    ]
    return found + [each["metadata"]["name"] for each in team.api.list("v1", "Node", labels=node_label(uid))]


def test_a_dataset_becomes_a_bound_volume(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    assert team.see()["metadata"]["finalizers"] == [FINALIZER]
    assert team.conditions() == {
        "Accepted": ("True", "Accepted"), "VolumeBound": ("True", "Bound"),
        "WorkersReady": ("True", "NoneWanted"), "Ready": ("True", "Ready"),
    }  # fmt: skip
    assert left_of(team, obj["metadata"]["uid"])


def test_nothing_is_written_while_nothing_changes(team: Team, looker: Looker) -> None:
    team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    looker.look()
    for begin in (lambda: None, looker.begin_again):
        begin()
        looker.api.writes.clear()
        for _ in range(3):
            looker.clock.advance(60)
            looker.look()
        assert looker.api.writes == []


def test_objects_are_taken_by_the_api_as_they_are(team: Team, looker: Looker) -> None:
    """Each passes a strict dry run: no field that the API does not know, none that it refuses."""
    team.dataset(
        accessModes=["ReadWriteMany"],
        write={"upload": {"mode": "async"}, "acceptNodeLoss": True},
        tieredstore={"levels": [{"mediumtype": name, "quota": "1Gi"} for name in ("MEM", "SSD")]},
        nodeSelector={"pool": "gpu"},
        nodeAffinity={"required": {"nodeSelectorTerms": [{"matchFields": [
            {"key": "metadata.name", "operator": "In", "values": [team.node]}]}]}},
        tolerations=[{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}],
        worker={"resources": {"requests": {"cpu": 2}}, "podMetadata": {"labels": {"team": "a"}}},
    )  # fmt: skip
    spec = read_dataset(team.see(), RELEASE)
    twin = Twin("nas", "datacache-twin", {"nfs": {"server": "n", "path": "/"}}, ("ReadOnlyMany",), ("hard",))
    token = Token("sts.amazonaws.com", "a.b.c", renew="2026-11-26T21:48:00Z", of="me")
    beside = Beside({"a.b": "eA=="}, (twin,), b'"s3://bucket/a"', (token,))
    for obj in objects(spec, RELEASE, beside=beside, token="eA=="):
        looker.api.apply(obj, dry_run=True)
    with pytest.raises(ClusterError, match="field not declared in schema"):
        looker.api.apply(obj | {"spec": obj["spec"] | {"nonsense": 1}}, dry_run=True)


def test_a_change_rolls_the_workers_and_what_was_taken_out_is_gone(team: Team, looker: Looker) -> None:
    obj = team.dataset(worker={"podMetadata": {"annotations": {"example.com/a": "b"}}})
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    name = Name("apps/v1", "DaemonSet", RELEASE.namespace, f"datacache-{obj['metadata']['uid']}")

    def annotations() -> dict[str, str]:
        return team.api.get(name)["spec"]["template"]["metadata"]["annotations"]

    before = annotations()
    assert before["example.com/a"] == "b"
    dataset = Name(OURS, "Dataset", team.namespace, "data")
    team.api.merge(dataset, {"spec": {"worker": None, "consistency": {"ttl": "5s"}}})
    looker.until(lambda: "example.com/a" not in annotations(), "the annotation to go")
    assert annotations()[CONFIG_ANNOTATION] != before[CONFIG_ANNOTATION]


def test_workers_are_not_changed_while_the_driver_of_a_node_is_away(team: Team, looker: Looker) -> None:
    """They are the only holders of its mounts then."""
    obj = team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    name = Name("apps/v1", "DaemonSet", RELEASE.namespace, f"datacache-{obj['metadata']['uid']}")

    def generation() -> int:
        return int(team.api.get(name)["metadata"]["generation"])

    before, looker.workers_may = generation(), False
    team.api.merge(Name(OURS, "Dataset", team.namespace, "data"), {"spec": {"consistency": {"ttl": "5s"}}})
    assert looker.look() == GOING
    assert generation() == before
    looker.workers_may = True
    looker.look()
    assert generation() == before + 1


def test_what_somebody_else_changes_is_put_right(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    name = Name("v1", "ConfigMap", RELEASE.namespace, f"datacache-{obj['metadata']['uid']}")
    right = team.api.get(name)["data"]
    team.api.merge(name, {"data": {"datacache.yaml": "{}"}})
    looker.look()
    assert team.api.get(name)["data"] == right
    service = Name("v1", "Service", RELEASE.namespace, f"datacache-{obj['metadata']['uid']}")
    team.api.delete(service, uid=team.api.get(service)["metadata"]["uid"])
    looker.look()
    assert team.api.get(service)


def test_a_claim_that_was_deleted_is_made_anew_and_bound_again(team: Team, looker: Looker) -> None:
    team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    claim = Name("v1", "PersistentVolumeClaim", team.namespace, "data")
    first = team.api.get(claim)["metadata"]["uid"]
    team.api.delete(claim, uid=first)
    wait_until(lambda: team.api.get(claim) is None, "the claim to go")

    def again() -> bool:
        found = team.api.get(claim)
        return bool(found and found["metadata"]["uid"] != first and found["status"].get("phase") == "Bound")

    looker.until(again, "another claim, bound")


def test_a_claim_of_somebody_else_is_neither_taken_nor_deleted(team: Team, looker: Looker) -> None:
    claim = Name("v1", "PersistentVolumeClaim", team.namespace, "data")
    team.api.create(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim",
         "metadata": {"namespace": team.namespace, "name": "data"},
         "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeName": "other",
                  "resources": {"requests": {"storage": "1Gi"}}}}
    )  # fmt: skip
    team.dataset()
    looker.look()
    assert team.status()["phase"] == "Failed"
    assert team.conditions()["Ready"] == ("False", "Refused")
    assert any(
        "a PersistentVolumeClaim data is there already, of somebody else" in said for _, said in team.events()
    )
    team.delete()
    looker.until(lambda: team.see() is None, "the Dataset to go")
    assert team.api.get(claim)["spec"]["volumeName"] == "other"


def test_a_secret_that_is_missing_is_said_on_the_dataset_and_noticed_when_it_comes(
    team: Team, looker: Looker
) -> None:
    secret = Name("v1", "Secret", team.namespace, "s3")
    data = team.api.get(secret)["data"]
    team.api.delete(secret, uid=team.api.get(secret)["metadata"]["uid"])
    team.dataset()
    looker.look()
    assert team.status()["phase"] == "Failed"
    assert team.conditions()["Accepted"] == ("False", "SecretMissing")
    assert any(reason == "SecretMissing" and "'s3'" in said for reason, said in team.events())
    team.api.create(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"namespace": team.namespace, "name": "s3"},
            "data": data,
        }
    )
    looker.until(lambda: team.status()["phase"] == "Bound", "the Dataset to be well")


def test_keys_that_are_rotated_reach_the_workers_and_roll_nothing(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    ours = f"datacache-{obj['metadata']['uid']}"
    generation = team.api.get(Name("apps/v1", "DaemonSet", RELEASE.namespace, ours))["metadata"]["generation"]
    team.api.merge(Name("v1", "Secret", team.namespace, "s3"), {"data": {"secret": "bmV3"}})
    looker.look()
    assert "bmV3" in team.api.get(Name("v1", "Secret", RELEASE.namespace, f"{ours}-keys"))["data"].values()
    after = team.api.get(Name("apps/v1", "DaemonSet", RELEASE.namespace, ours))["metadata"]["generation"]
    assert after == generation


def test_a_spec_that_cannot_be_done_leaves_what_works_at_work(team: Team, looker: Looker) -> None:
    team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    level = {"mediumtype": "SSD", "quota": "1Gi", "path": "/etc"}
    team.api.merge(
        Name(OURS, "Dataset", team.namespace, "data"), {"spec": {"tieredstore": {"levels": [level]}}}
    )
    looker.look()
    assert team.status()["phase"] == "Degraded"
    assert team.conditions()["Accepted"] == ("False", "Invalid")
    said = next(each["message"] for each in team.status()["conditions"] if each["type"] == "Accepted")
    assert said.startswith("spec.tieredstore.levels[0].path: '/etc' will not do; expected a path below ")
    assert team.api.get(Name("v1", "PersistentVolumeClaim", team.namespace, "data"))


# ---- workers -------------------------------------------------------------------------------------


def test_a_worker_comes_to_the_node_of_a_pod_and_goes_when_it_is_idle(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    assert team.workers(obj) == [], "nobody needs one"
    looker.nodes = {team.node}
    looker.look()
    team.ready(obj, worker_says(cached=GiB // 2))
    looker.until(lambda: team.status().get("cached") == GiB // 2, "the figures of the worker")
    status = team.status()
    assert (status["ufsTotal"], status["fileNum"], status["cachedPercentage"]) == (GiB, 10, 50)
    assert status["hitRatio"] == "0.750"
    assert status["nodes"] == [{"name": team.node, "cached": GiB // 2}]
    assert status["shown"] == {"ufsTotal": "1.0 GiB", "cached": "512.0 MiB", "cachedPercentage": "50%"}
    looker.until(lambda: team.conditions()["WorkersReady"] == ("True", "AllReady"), "the DaemonSet to say so")

    looker.nodes = set()
    looker.look()
    looker.clock.advance(IDLE - 1)
    looker.look()
    assert len(team.workers(obj)) == 1
    looker.clock.advance(1)
    looker.look()
    wait_until(lambda: not _running(team, obj), "the worker to go")


def test_a_node_that_may_hold_what_is_not_uploaded_keeps_its_worker(team: Team, looker: Looker) -> None:
    """However long nobody uses it: its worker is silent, and nobody knows."""
    obj = team.dataset(accessModes=["ReadWriteMany"])
    looker.nodes = {team.node}
    looker.look()
    team.ready(obj, worker_says())
    looker.until(lambda: team.conditions().get("Uploaded") == ("True", "Clean"), "the worker to be heard")
    answers = dict(team.answers)
    team.answers.clear()
    looker.nodes = set()
    for _ in range(3):
        looker.clock.advance(IDLE)
        looker.look()
    assert len(_running(team, obj)) == 1
    team.answers.update(answers)
    looker.look()
    wait_until(lambda: not _running(team, obj), "the worker to go")


def _running(team: Team, obj: dict) -> list:
    return [each for each in team.workers(obj) if not each["metadata"].get("deletionTimestamp")]


def test_nodes_of_the_selector_have_a_worker_at_once(team: Team, looker: Looker) -> None:
    team.add_node(f"{team.node}-gpu", pool=team.namespace)
    obj = team.dataset(nodeSelector={"pool": team.namespace})
    looker.look()
    wait_until(lambda: any(w["spec"].get("nodeName") for w in team.workers(obj)), "a worker on a node")
    assert [w["spec"]["nodeName"] for w in team.workers(obj)] == [f"{team.node}-gpu"]


def test_a_token_is_made_once_and_shown_to_workers_only(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    looker.nodes = {team.node}
    looker.look()
    team.ready(obj, worker_says(cached=1))
    looker.until(lambda: team.status().get("cached") == 1, "the figures")
    looker.begin_again()
    looker.look()
    assert len(team.tokens) == 1, "a restart makes no other"
    (token,) = team.tokens
    assert len(token) == 64
    shown = str(team.see()) + str(team.api.list("v1", "Event")) + str(team.api.list("apps/v1", "DaemonSet"))
    assert token not in shown and SECRET.decode() not in shown


def test_a_worker_that_does_not_come_up_is_seen_and_so_is_its_return(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    looker.nodes = {team.node}
    looker.until(lambda: team.conditions().get("WorkersReady") == ("False", "Starting"), "0 of 1 workers")
    looker.until(lambda: team.status()["phase"] == "Degraded", "a word for it")
    team.ready(obj, worker_says())
    looker.until(lambda: team.status()["phase"] == "Bound", "all to be well")


def test_a_pod_that_waits_for_a_worker_is_told_why_once(team: Team, looker: Looker) -> None:
    obj = team.dataset(worker={"resources": {"requests": {"cpu": "1000"}}})
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    team.pod()
    looker.nodes = {team.node}
    looker.until(lambda: _unplaced(team, obj), "the scheduler to find no room for the worker")

    def told() -> list[str]:
        found = team.api.list("v1", "Event", namespace=team.namespace)
        return [each["message"] for each in found if each["reason"] == "WorkerNotReady"]

    looker.clock.advance(LATE - 1)
    looker.look()
    assert told() == []
    looker.clock.advance(1)
    looker.look()
    (said,) = told()
    assert said.startswith(f"the worker of Dataset data on node {team.node} is not there: 0/")
    assert "Insufficient cpu" in said
    looker.clock.advance(LATE)
    looker.look()
    assert len(told()) == 1


def _unplaced(team: Team, obj: dict) -> bool:
    conditions = [c for each in team.workers(obj) for c in each["status"].get("conditions", ())]
    return any(each["type"] == "PodScheduled" and each["status"] == "False" for each in conditions)


# ---- what lies beside it -------------------------------------------------------------------------


def _said(team: Team, type: str = "Accepted") -> str:
    return next(each["message"] for each in team.status()["conditions"] if each["type"] == type)


def _pod_template(team: Team, obj: dict) -> dict:
    name = Name("apps/v1", "DaemonSet", RELEASE.namespace, f"datacache-{obj['metadata']['uid']}")
    return team.api.get(name)["spec"]["template"]


def _twins(team: Team, obj: dict) -> list[str]:
    """Of claims, in the namespace of the release: their names."""
    labels = f"datacache.io/dataset-uid={obj['metadata']['uid']}"
    found = team.api.list("v1", "PersistentVolumeClaim", namespace=RELEASE.namespace, labels=labels)
    return [each["metadata"]["name"] for each in found]


def test_a_claim_has_a_twin_where_the_workers_are(team: Team, looker: Looker) -> None:
    obj = team.dataset(mounts=[{"mountPoint": "pvc://nas/raw"}])
    looker.look()
    assert team.conditions()["Accepted"] == ("False", "ClaimUnusable")
    assert f"a PersistentVolumeClaim that there is in namespace {team.namespace}" in _said(team)
    source = team.claim()
    looker.until(lambda: team.status().get("phase") == "Bound", "the Dataset to be well")
    (name,) = _twins(team, obj)
    twin = Name("v1", "PersistentVolumeClaim", RELEASE.namespace, name)
    wait_until(lambda: team.api.get(twin)["status"].get("phase") == "Bound", "the twin to be bound")
    volume = team.api.get(Name("v1", "PersistentVolume", "", name))
    assert volume["spec"]["nfs"] == source["spec"]["nfs"]
    assert volume["spec"]["mountOptions"] == ["nfsvers=4.1"]
    looker.look()
    looker.api.writes.clear()
    for begin in (lambda: None, looker.begin_again):
        begin()
        looker.look()
        assert looker.api.writes == []
    claim = team.api.get(Name("v1", "PersistentVolumeClaim", team.namespace, "nas"))
    marks = [claim["metadata"].get(of) for of in ("labels", "annotations", "finalizers")]
    assert "datacache" not in str(marks), "the user's own is left as it is"
    team.delete()
    looker.until(lambda: _ended(team, obj) and team.see() is None, "the Dataset to go")
    assert left_of(team, obj["metadata"]["uid"]) == []
    assert team.api.get(Name("v1", "PersistentVolume", "", source["metadata"]["name"]))


def test_a_twin_goes_with_its_mount_when_no_worker_has_it(team: Team, looker: Looker) -> None:
    team.claim()
    mounts = [{"mountPoint": "pvc://nas", "name": "nas"}, {"mountPoint": "https://host/x", "name": "web"}]
    obj = team.dataset(mounts=mounts)
    looker.nodes = {team.node}
    looker.until(lambda: team.workers(obj), "a worker")
    (name,) = _twins(team, obj)
    twin = Name("v1", "PersistentVolumeClaim", RELEASE.namespace, name)
    wait_until(
        lambda: team.api.get(twin)["status"].get("phase")
        == "Bound", "the twin to be bound",
    )  # fmt: skip
    wait_until(lambda: any(w["spec"].get("nodeName") for w in team.workers(obj)), "a worker on a node")
    team.api.merge(Name(OURS, "Dataset", team.namespace, "data"), {"spec": {"mounts": mounts[1:]}})
    looker.look()
    looker.look()
    assert _twins(team, obj) == [name], "a worker of before has it mounted"

    def gone() -> bool:
        for each in team.workers(obj):
            if each["metadata"].get("deletionTimestamp"):
                team.end(Name("v1", "Pod", RELEASE.namespace, each["metadata"]["name"]))
        return not _twins(team, obj)

    looker.until(gone, "the twin to go, after its worker")


def test_what_was_to_be_taken_away_is_found_after_a_kill(team: Team, looker: Looker) -> None:
    """Workers have no twin any more, and the spec asks for none: nothing tells of it but its label."""
    team.claim()
    mounts = [{"mountPoint": "pvc://nas", "name": "nas"}, {"mountPoint": "https://host/x", "name": "web"}]
    obj = team.dataset(mounts=mounts)
    looker.until(lambda: team.status().get("phase") == "Bound", "the Dataset to be well")
    assert len(_twins(team, obj)) == 1
    team.api.merge(Name(OURS, "Dataset", team.namespace, "data"), {"spec": {"mounts": mounts[1:]}})
    looker.begin_again()
    looker.api.dies_at = 2  # settings and DaemonSet are written, and nothing is deleted yet
    with pytest.raises(Killed):
        looker.look()
    assert len(_twins(team, obj)) == 1
    looker.begin_again()
    looker.look()
    looker.until(lambda: not _twins(team, obj), "the twin to go")


def test_a_claim_of_one_node_only_is_refused(team: Team, looker: Looker) -> None:
    team.claim(modes="ReadWriteOnce")
    team.dataset(mounts=[{"mountPoint": "pvc://nas"}])
    looker.look()
    assert team.conditions()["Accepted"] == ("False", "ClaimUnusable")
    assert "expected a volume that many nodes may mount (ReadOnlyMany or ReadWriteMany)" in _said(team)


def test_a_claim_that_names_the_volume_of_another_gets_nothing(team: Team, looker: Looker) -> None:
    """Everybody may write the name of any volume into a claim of his own."""
    volume = team.claim("theirs")["metadata"]["name"]
    team.api.create(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim",
         "metadata": {"namespace": team.namespace, "name": "mine"},
         "spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": volume,
                  "resources": {"requests": {"storage": "1Gi"}}}}
    )  # fmt: skip
    obj = team.dataset(mounts=[{"mountPoint": "pvc://mine"}])
    looker.look()
    assert "expected a claim that is bound" in _said(team) and _twins(team, obj) == []


LISTED = {"configMapKeyRef": {"name": "lists", "key": "epoch"}}


def test_a_list_in_a_config_map_is_a_dataset_and_another_list_rolls_the_workers(
    team: Team, looker: Looker
) -> None:
    obj = team.dataset(mounts=None, manifest=LISTED)
    looker.look()
    assert team.conditions()["Accepted"] == ("False", "ManifestUnusable")
    team.config_map("lists", epoch='"https://host/a"', secret="not to be copied")
    looker.until(lambda: team.status().get("phase") == "Bound", "the Dataset to be well")
    copy = Name("v1", "ConfigMap", RELEASE.namespace, f"datacache-{obj['metadata']['uid']}-manifest")
    assert team.api.get(copy)["data"] == {"manifest.jsonl": '"https://host/a"'}
    before = _pod_template(team, obj)["metadata"]["annotations"][CONFIG_ANNOTATION]
    looker.look()
    assert _pod_template(team, obj)["metadata"]["annotations"][CONFIG_ANNOTATION] == before
    team.config_map("lists", epoch='"https://host/b"')
    looker.look()
    assert team.api.get(copy)["data"] == {"manifest.jsonl": '"https://host/b"'}
    assert _pod_template(team, obj)["metadata"]["annotations"][CONFIG_ANNOTATION] != before
    team.config_map("lists", epoch='"file:///etc/shadow"')
    looker.look()
    assert team.conditions()["Accepted"] == ("False", "ManifestUnusable")
    assert "line 1" not in _said(team) and "'file:///' will not do; expected URLs of s3://" in _said(team)
    assert team.api.get(copy)["data"] == {"manifest.jsonl": '"https://host/b"'}, "what works goes on"


def test_a_list_as_long_as_a_config_map_may_be_is_taken(team: Team, looker: Looker) -> None:
    line = '{"url": "https://host/%07d", "size": 1, "version_id": "x"}'
    text = "\n".join(line % number for number in range(16_000))
    text += "\n# " + "x" * ((1 << 20) - len(text) - 3)
    team.config_map("lists", epoch=text)
    team.dataset(mounts=None, manifest=LISTED)
    looker.until(lambda: team.status().get("phase") == "Bound", "the Dataset to be well")
    looker.look()
    looker.begin_again()
    looker.look()
    assert looker.api.writes == []


ROLE = {"mountPoint": "s3://bucket", "options": {"role_arn": "arn:aws:iam::123456789012:role/reader"}}


def _claims(token: str) -> dict:
    payload = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


def test_a_web_identity_is_renewed_before_it_ends_and_no_earlier(team: Team, looker: Looker) -> None:
    looker.release = replace(RELEASE, audiences=("sts.amazonaws.com",))
    looker.begin_again()
    obj = team.dataset(mounts=[ROLE], serviceAccountName="reader")
    looker.look()
    assert team.conditions()["Accepted"] == ("False", "NoIdentity")
    assert f"expected a ServiceAccount that there is in namespace {team.namespace}" in _said(team)
    account = {"namespace": team.namespace, "name": "reader"}
    team.api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
    looker.until(lambda: team.status().get("phase") == "Bound", "the Dataset to be well")
    secret = Name("v1", "Secret", RELEASE.namespace, f"datacache-{obj['metadata']['uid']}-identity")

    def token() -> str:
        (value,) = team.api.get(secret)["data"].values()
        return base64.b64decode(value).decode()

    first = token()
    said = _claims(first)
    assert said["sub"] == f"system:serviceaccount:{team.namespace}:reader"
    assert said["aud"] == ["sts.amazonaws.com"], "the API server itself does not believe it"
    looker.look()
    looker.begin_again()
    looker.api.writes.clear()
    looker.clock.advance(0.7 * 3600)
    looker.look()
    assert token() == first and looker.api.writes == [], "a restart asks for no other"
    looker.clock.advance(0.11 * 3600)
    template = _pod_template(team, obj)
    looker.look()
    assert token() != first
    assert _pod_template(team, obj) == template, "no worker is exchanged for it"
    shown = str(team.see()) + str(team.api.list("v1", "Event")) + str(team.api.list("apps/v1", "DaemonSet"))
    assert token() not in shown
    second = token()
    levels = {"levels": [{"mediumtype": "SSD", "quota": "1Gi", "path": "/etc"}]}
    team.api.merge(Name(OURS, "Dataset", team.namespace, "data"), {"spec": {"tieredstore": levels}})
    looker.clock.advance(3600)
    looker.look()
    assert team.conditions()["Accepted"] == ("False", "Invalid")
    assert token() != second, "workers that are at work go on, whatever is wrong with the spec by now"


def test_an_identity_that_the_operator_does_not_allow_is_refused(team: Team, looker: Looker) -> None:
    team.dataset(mounts=[ROLE], serviceAccountName="reader")
    looker.look()
    assert team.conditions()["Accepted"] == ("False", "Invalid")
    assert "the operator has web identity turned off" in _said(team)


def test_a_worker_that_ends_says_why_on_the_dataset(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    looker.nodes = {team.node}
    looker.look()
    wait_until(lambda: any(w["spec"].get("nodeName") for w in team.workers(obj)), "a worker on a node")
    (worker,) = team.workers(obj)
    ended = {"exitCode": 2, "message": "{}\ndatacache: no such bucket\n"}
    container = {"name": "worker", "ready": False, "restartCount": 3, "image": "x", "imageID": "x",
                 "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                 "lastState": {"terminated": ended}}  # fmt: skip
    team.api.merge(
        Name("v1", "Pod", RELEASE.namespace, worker["metadata"]["name"]),
        {"status": {"containerStatuses": [container]}}, part="status",
    )  # fmt: skip
    looker.until(lambda: team.conditions().get("WorkersReady") == ("False", "WorkersEnd"), "the reason")
    assert _said(team, "WorkersReady") == (
        f"0 of 1 workers are ready; node {team.node}: datacache: no such bucket"
    )


def test_certificates_are_made_once_and_renewed_long_before_their_end(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    ours = Name("v1", "Secret", RELEASE.namespace, f"datacache-{obj['metadata']['uid']}-tls")
    release = Name("v1", "Secret", RELEASE.namespace, "datacache-ca")
    first, authority = team.api.get(ours)["data"], team.api.get(release)["data"]
    looker.look()
    looker.begin_again()
    looker.look()
    assert looker.api.writes == []
    looker.clock.advance(61 * 86400)
    looker.look()
    second = team.api.get(ours)["data"]
    assert second != first and team.api.get(release)["data"] == authority
    looker.clock.advance(190 * 86400)
    looker.look()
    after = team.api.get(release)["data"]
    assert after["ca.crt"] != authority["ca.crt"] and after["before.crt"] == authority["ca.crt"]
    assert team.api.get(ours)["data"] != second, "the new authority signs at once"
    shown = str(team.see()) + str(team.api.list("apps/v1", "DaemonSet")) + str(team.api.list("v1", "Event"))
    assert first["tls.key"] not in shown
    team.api.delete(release, uid=team.api.get(release)["metadata"]["uid"])
    looker.begin_again()
    looker.look()
    assert team.api.get(release)["data"]["ca.crt"] != after["ca.crt"], "the next test has a good one"


# ---- where pods may be ---------------------------------------------------------------------------


def _affinity(*nodes: str) -> dict:
    expression = {"key": "metadata.name", "operator": "In", "values": list(nodes)}
    return {"required": {"nodeSelectorTerms": [{"matchFields": [expression]}]}}


def test_another_node_affinity_takes_no_worker_away_and_is_said(team: Team, looker: Looker) -> None:
    obj = team.dataset(nodeAffinity=_affinity(team.node))
    looker.nodes = {team.node}
    looker.look()
    team.ready(obj, worker_says())
    looker.until(lambda: team.status().get("phase") == "Bound", "the Dataset to be well")
    volume = Name("v1", "PersistentVolume", "", f"datacache-{obj['metadata']['uid']}")
    assert team.api.get(volume)["spec"]["nodeAffinity"] == _affinity(team.node)

    dataset = Name(OURS, "Dataset", team.namespace, "data")
    team.api.merge(dataset, {"spec": {"nodeAffinity": _affinity("elsewhere")}})
    looker.until(lambda: team.conditions()["VolumeBound"] == ("True", "PlacedAsBefore"), "somebody to say so")
    assert team.api.get(volume)["spec"]["nodeAffinity"] == _affinity(team.node)
    assert len(_running(team, obj)) == 1, "pods read through it"
    looker.look()
    looker.api.writes.clear()
    looker.look()
    assert looker.api.writes == []

    claim = Name("v1", "PersistentVolumeClaim", team.namespace, "data")
    team.api.delete(claim, uid=team.api.get(claim)["metadata"]["uid"])
    wait_until(lambda: team.api.get(claim) is None, "the claim to go")
    looker.until(lambda: team.conditions()["VolumeBound"] == ("True", "Bound"), "both to be made anew")
    assert team.api.get(volume)["spec"]["nodeAffinity"] == _affinity("elsewhere")


def test_a_pod_on_a_node_where_no_worker_may_be_is_told(team: Team, looker: Looker) -> None:
    obj = team.dataset(nodeAffinity=_affinity("elsewhere"))
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    team.pod()
    looker.nodes = {team.node}
    looker.look()
    assert team.workers(obj) == []
    looker.clock.advance(LATE)
    looker.look()
    found = [each for each in team.api.list("v1", "Event", namespace=team.namespace)
             if each["reason"] == "WorkerNotReady"]  # fmt: skip
    assert [each["message"] for each in found] == [
        f"the worker of Dataset data on node {team.node} is not there: the nodeAffinity of the Dataset keeps "
        "workers from it"
    ]


def test_a_pod_that_cannot_write_is_told_once(team: Team, looker: Looker) -> None:
    team.dataset(accessModes=["ReadWriteMany"], owner={"uid": 1000, "gid": 1000})
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    mounts = [{"name": "v", "mountPath": "/data"}]
    for name, uid in (("right", 1000), ("wrong", 1234)):
        own = {"runAsUser": uid, "runAsGroup": uid}
        pod = team.pod(name, volumeMounts=mounts, securityContext=own)
        looker.pods.add(team.api.get(pod)["metadata"]["uid"])
    looker.look()
    looker.look()
    looker.begin_again()
    looker.look()
    found = [each for each in team.api.list("v1", "Event", namespace=team.namespace)
             if each["reason"] == "CannotWrite"]  # fmt: skip
    assert [each["involvedObject"]["name"] for each in found] == ["wrong"], "nor after a restart"
    assert "runs as user 1234 (groups 1234) and cannot write to Dataset data" in found[0]["message"]


# ---- deletion ------------------------------------------------------------------------------------


def test_nothing_is_left_behind(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    looker.nodes = {team.node}
    looker.look()
    team.ready(obj, worker_says())
    team.delete()
    looker.until(lambda: _ended(team, obj) and team.see() is None, "the Dataset to go")
    assert left_of(team, obj["metadata"]["uid"]) == []


def _ended(team: Team, obj: dict) -> bool:
    """There is no kubelet: workers that were told to end have ended."""
    for each in team.workers(obj):
        if each["metadata"].get("deletionTimestamp"):
            team.end(Name("v1", "Pod", RELEASE.namespace, each["metadata"]["name"]))
    return True


def test_a_pod_that_uses_it_holds_a_deletion_and_it_says_so(team: Team, looker: Looker) -> None:
    team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    pod = team.pod()
    team.delete()
    looker.look()
    assert team.status()["phase"] == "Deleting"
    assert team.conditions()["DeletionBlocked"] == ("True", "InUse")
    assert ("InUse", f"used by pod {team.namespace}/reader") in team.events()
    assert team.api.get(Name("v1", "PersistentVolumeClaim", team.namespace, "data")), "it goes on reading"
    team.end(pod)
    looker.until(lambda: team.see() is None, "the Dataset to go")


def test_a_node_with_dirty_data_is_kept(team: Team, looker: Looker) -> None:
    """Autoscalers leave it alone until its worker is clean; a mark that somebody else has set stays as it is;
    a restart in between changes nothing, and nothing is written twice."""
    obj = team.dataset(accessModes=["ReadWriteMany"])
    node = Name("v1", "Node", "", team.node)

    def notes() -> dict[str, str]:
        found = team.api.get(node)["metadata"].get("annotations") or {}
        return {key: value for key, value in found.items() if "autoscaler" in key or "karpenter" in key}

    looker.nodes.add(team.node)
    looker.look()
    team.ready(obj, worker_says(dirty=GiB, due=1))
    team.api.merge(node, {"metadata": {"annotations": {MARKS[1]: "theirs"}}})
    looker.until(lambda: MARKS[0] in notes(), "the node to be marked")
    assert notes() == {MARKS[0]: "true", MARKS[1]: "theirs"}
    looker.begin_again()
    looker.look()
    assert not [each for each in looker.api.writes if "/nodes/" in each]
    team.answers.clear()
    looker.look()
    assert notes() == {MARKS[0]: "true", MARKS[1]: "theirs"}, "who does not answer is dirty still"
    team.ready(obj, worker_says())
    looker.until(lambda: MARKS[0] not in notes(), "the mark to go")
    assert notes() == {MARKS[1]: "theirs"}
    found = team.api.get(node)["metadata"]["annotations"]
    assert not [key for key in found if key.startswith("datacache.io/")]


def test_dirty_data_holds_a_deletion_whatever_is_killed(team: Team, looker: Looker) -> None:
    obj = team.dataset(accessModes=["ReadWriteMany"])
    looker.nodes = {team.node}
    looker.look()
    team.ready(obj, worker_says(dirty=GiB, due=1))
    looker.until(lambda: team.status().get("dirty", {}).get("nodes") == [team.node], "the worker to be heard")
    team.delete()
    looker.until(lambda: team.conditions().get("DeletionBlocked") == ("True", "NotUploaded"), "the reason")

    answers = dict(team.answers)
    team.answers.clear()  # its worker is killed; and so is the controller
    looker.begin_again()
    for _ in range(3):
        looker.look()
    assert team.conditions()["DeletionBlocked"] == ("True", "NotUploaded")
    assert len(_running(team, obj)) == 1, "who is to upload it stays"

    team.answers.update({url: worker_says() for url in answers})
    looker.until(lambda: _ended(team, obj) and team.see() is None, "the Dataset to go")
    assert left_of(team, obj["metadata"]["uid"]) == []


def test_what_is_not_uploaded_is_given_up_when_its_owner_says_so(team: Team, looker: Looker) -> None:
    obj = team.dataset(accessModes=["ReadWriteMany"])
    looker.nodes = {team.node}
    looker.look()
    team.ready(obj, worker_says(dirty=GiB))
    team.delete()
    looker.look()
    team.api.merge(
        Name(OURS, "Dataset", team.namespace, "data"), {"metadata": {"annotations": {ACCEPT_LOSS: "true"}}}
    )
    looker.until(lambda: _ended(team, obj) and team.see() is None, "the Dataset to go")


def test_it_may_be_killed_at_any_write(team: Team, looker: Looker) -> None:
    """Before each of the writes of a life it dies and begins again from nothing; it comes to the same end."""
    looker.nodes = {team.node}
    for at in range(40):
        name = f"data-{at}"
        obj = team.dataset(name, accessModes=["ReadWriteMany"])
        looker.begin_again()
        looker.api.dies_at = at
        died = False
        try:
            _life(team, looker, obj, name)
        except Killed:
            died = True
            looker.begin_again()
            _life(team, looker, obj, name)
        assert left_of(team, obj["metadata"]["uid"]) == []
        if not died:
            assert at > 15, "each of its writes was one that it died before"
            return
    raise AssertionError("a life has more writes than that?")


def _life(team: Team, looker: Looker, obj: dict, name: str) -> None:
    """From creation to the end, however far it had come before."""
    found = team.see(name)
    if found and not found["metadata"].get("deletionTimestamp"):
        looker.until(
            lambda: team.status(name).get("dirty") is not None and team.workers(obj), "a worker", name
        )
        team.ready(obj, worker_says())
        looker.until(lambda: team.status(name).get("phase") == "Bound", "the Dataset to be well", name)
        team.delete(name)
    looker.until(lambda: _ended(team, obj) and team.see(name) is None, "the Dataset to go", name)


def test_a_pod_that_runs_holds_it_though_somebody_took_the_claim_away(team: Team, looker: Looker) -> None:
    team.dataset()
    looker.until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    pod = team.pod()
    team.api.merge(pod, {"status": {"phase": "Running"}}, part="status")
    claim = Name("v1", "PersistentVolumeClaim", team.namespace, "data")
    team.delete()
    looker.look()
    team.api.merge(claim, {"metadata": {"finalizers": None}})
    wait_until(lambda: team.api.get(claim) is None, "the claim to go, by force")
    looker.look()
    assert team.conditions()["DeletionBlocked"] == ("True", "InUse")
    team.end(pod)
    looker.until(lambda: team.see() is None, "the Dataset to go")


# ---- loads ---------------------------------------------------------------------------------------


def _load_said(team: Team) -> tuple[str, str]:
    status = (team.loading() or {}).get("status") or {}
    (condition,) = status.get("conditions") or [{"reason": ""}]
    return status.get("phase", ""), condition["reason"]


def _look_at_load(looker: Looker) -> float | None:
    return looker.loader.look(Key(looker.team.namespace, "load"))


def _at_work(team: Team, looker: Looker, **spec: Any) -> dict:
    """A Dataset and a DataLoad of it, whose one job has begun."""
    obj = team.dataset()
    team.load(nodes=[team.node], **spec)
    _look_at_load(looker)
    looker.look()
    team.ready(obj, worker_says())
    _look_at_load(looker)
    assert len(team.asked) == 1
    return obj


def test_a_load_brings_a_worker_to_its_nodes_and_all_targets_are_done_in_order(
    team: Team, looker: Looker
) -> None:
    _at_work(
        team, looker, target=[{"path": "/a", "globs": ["*.jpg"]}, {"path": "/b"}], bandwidth="1M", verify=True
    )
    assert _load_said(team) == ("Executing", "Loading")
    assert team.asked == [("/a", ("*.jpg",), 1_000_000, True)]
    team.jobs["job0"] = job_says(done=1)
    _look_at_load(looker)
    assert len(team.asked) == 1, "one after the other"
    assert team.loading()["status"]["progress"]["files"] == 1
    team.jobs["job0"] = job_says("done", done=4)
    _look_at_load(looker)
    assert team.asked[1:] == [("/b", (), 1_000_000, True)]
    team.jobs["job1"] = job_says("done", done=2, of=2)
    _look_at_load(looker)
    assert _load_said(team) == ("Complete", "Loaded")
    assert team.loading()["status"]["progress"]["files"] == 6
    assert looker.loader.look(Key(team.namespace, "load")) is None
    events = team.api.list("v1", "Event", namespace=team.namespace)
    assert any(each["reason"] == "Loaded" and each["involvedObject"]["kind"] == "DataLoad" for each in events)


def test_a_load_goes_on_after_controller_and_worker_were_started_again(team: Team, looker: Looker) -> None:
    _at_work(team, looker)
    looker.begin_again()
    _look_at_load(looker)
    assert len(team.asked) == 1, "the job stands in the status"
    team.worker_restarts()
    _look_at_load(looker)
    assert len(team.asked) == 2, "it does not know the job any more, and is asked again"
    answers = dict(team.answers)
    team.answers.clear()
    _look_at_load(looker)
    assert _load_said(team) == ("Executing", "WaitingForWorkers")
    team.answers.update(answers)
    team.jobs["job1"] = job_says("done", done=4)
    _look_at_load(looker)
    assert _load_said(team) == ("Complete", "Loaded") and len(team.asked) == 2


def test_a_load_of_a_dataset_that_comes_later_waits_for_it(team: Team, looker: Looker) -> None:
    team.load()
    _look_at_load(looker)
    assert _load_said(team) == ("Pending", "NoDataset")
    team.dataset()
    _look_at_load(looker)
    assert len(team.loading()["status"]["nodes"]) == 1, "one node, as none has a worker"


def test_a_load_that_cannot_be_says_why(team: Team, looker: Looker) -> None:
    team.dataset()
    team.load(nodes=["nowhere"])
    _look_at_load(looker)
    assert _load_said(team) == ("Pending", "NoNodes")
    assert "spec.nodes[0]: 'nowhere'" in team.loading()["status"]["conditions"][0]["message"]


def test_an_order_is_announced_to_the_nodes_of_a_load(team: Team, looker: Looker) -> None:
    obj = team.dataset()
    team.load(nodes=[team.node], order={"configMapKeyRef": {"name": "epochs", "key": "1"}})
    _look_at_load(looker)
    looker.look()
    team.ready(obj, worker_says())
    _look_at_load(looker)
    assert _load_said(team) == ("Pending", "NoOrder") and team.asked == []
    epochs = team.config_map("epochs", **{"1": "train/b.jpg\ntrain/a.jpg\n"})
    _look_at_load(looker)
    assert team.asked == [("/train/b.jpg", "/train/a.jpg")]
    team.jobs["job0"] = job_says("done", done=2, of=2)
    team.api.delete(epochs, uid=team.api.get(epochs)["metadata"]["uid"])
    team.config_map("epochs", **{"1": "train/b.jpg"})
    _look_at_load(looker)
    assert _load_said(team) == ("Complete", "Announced") and len(team.asked) == 1


def test_replicas_are_the_nodes_that_have_most_and_each_loads_all(team: Team, looker: Looker) -> None:
    others = [f"{team.node}-{letter}" for letter in "bc"]
    for name in others:
        team.add_node(name, pool=team.namespace)
    only = {"key": "kubernetes.io/hostname", "operator": "In", "values": [team.node, *others]}
    obj = team.dataset(nodeAffinity={"required": {"nodeSelectorTerms": [{"matchExpressions": [only]}]}})
    looker.nodes = {team.node}
    looker.look()
    team.ready(obj, worker_says(cached=GiB))
    looker.until(lambda: team.status().get("cached") == GiB, "the figures of the worker")
    team.load(replicas=2)
    _look_at_load(looker)
    chosen = [each["name"] for each in team.loading()["status"]["nodes"]]
    assert len(chosen) == 2 and team.node in chosen, "who has most is one of them"
    team.load("all", replicas=4)
    looker.loader.look(Key(team.namespace, "all"))
    (condition,) = team.loading("all")["status"]["conditions"]
    assert (
        condition["reason"] == "NoNodes" and "at most the nodes that can load it, 3" in condition["message"]
    )


def test_deleting_a_load_cancels_it(team: Team, looker: Looker) -> None:
    _at_work(team, looker)
    load = Name(OURS, "DataLoad", team.namespace, "load")
    team.api.delete(load, uid=team.loading()["metadata"]["uid"])
    _look_at_load(looker)
    assert team.cancelled == ["job0"] and team.loading() is None


def test_a_load_goes_when_its_time_has_come(team: Team, looker: Looker) -> None:
    _at_work(team, looker, ttlSecondsAfterFinished=60)
    team.jobs["job0"] = job_says("failed", done=3, failures=[("/x", "denied")])
    left = _look_at_load(looker)
    assert _load_said(team) == ("Failed", "FilesFailed")
    assert team.loading()["status"]["failures"] == [{"path": "/x", "node": team.node, "reason": "denied"}]
    assert left is not None and 59 <= left <= 60
    looker.clock.advance(left)
    _look_at_load(looker)  # deletes it
    _look_at_load(looker)  # takes its finalizer off
    assert team.loading() is None


def test_a_load_writes_nothing_while_nothing_changes(team: Team, looker: Looker) -> None:
    _at_work(team, looker)
    _look_at_load(looker)
    looker.api.writes.clear()
    for _ in range(3):
        _look_at_load(looker)
    assert looker.api.writes == []


def test_a_load_may_be_killed_at_any_write(team: Team, looker: Looker) -> None:
    """It comes to the same end; a job that was begun and not written down is begun again."""
    obj = team.dataset()
    looker.nodes = {team.node}
    looker.look()
    team.ready(obj, worker_says())
    for at in range(20):
        name = f"load-{at}"
        team.load(name, nodes=[team.node], target=[{"path": "/a"}, {"path": "/b"}], ttlSecondsAfterFinished=0)
        team.asked.clear()
        looker.begin_again()
        looker.api.dies_at = at
        died = False
        try:
            _load_life(team, looker, name)
        except Killed:
            died = True
            looker.begin_again()
            _load_life(team, looker, name)
        assert {path for path, *_ in team.asked} == {"/a", "/b"}
        if not died:
            assert at >= 5, "each of its writes was one that it died before"
            return
    raise AssertionError("a life has more writes than that?")


def _load_life(team: Team, looker: Looker, name: str) -> None:
    """Until it has gone: it is done, and its time is over at once."""

    def over() -> bool:
        looker.loader.look(Key(team.namespace, name))
        for job in team.jobs:
            team.jobs[job] = job_says("done", done=4)
        return team.loading(name) is None

    wait_until(over, "the load to end, and to go")


# ---- the process ---------------------------------------------------------------------------------


class Running:
    """A controller that runs, in threads of its own."""

    def __init__(self, configured: client.Configuration, team: Team, me: str) -> None:
        self.stop, self.raised = threading.Event(), []
        self.controller = Controller(configured, RELEASE, me=me, connect=team.connect)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.controller.run(self.stop)
        except ClusterError as error:
            self.raised.append(error)

    def end(self) -> None:
        self.stop.set()
        self.thread.join()


@pytest.fixture
def confined(installed: ControlPlane) -> client.Configuration:
    """Somebody who has the rights that the chart gives, and no others."""
    account, space = "datacache-controller", RELEASE.namespace
    rights = [
        "template",
        "datacache",
        str(CHART),
        "-n",
        space,
        "-s",
        "templates/rights.yaml",
        "--set=image.repository=x",
    ]
    installed.kubectl("apply", "-f", "-", given=installed.helm(*rights).out)
    found = configuration(str(installed.kubeconfig))
    token = installed.kubectl("create", "-n", space, "token", account).out.strip()
    found.api_key["BearerToken"] = f"Bearer {token}"
    return found


LEASE = Name("coordination.k8s.io/v1", "Lease", RELEASE.namespace, "datacache-controller")


def test_a_life_under_the_controller_itself(confined: client.Configuration, team: Team) -> None:
    """Nobody tells it when to look: it hears of the Dataset, pod, worker and load, and of the end."""
    running = Running(confined, team, "one")
    try:
        obj = team.dataset()
        wait_until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
        pod = team.pod()
        team.ready(obj, worker_says(cached=GiB))
        wait_until(lambda: team.status().get("cached") == GiB, "the figures")
        team.load(nodes=[team.node], ttlSecondsAfterFinished=0)
        wait_until(lambda: team.asked, "the worker to be asked to load")
        team.jobs["job0"] = job_says("done", done=4)
        wait_until(lambda: team.loading() is None, "the load to end, and to go")
        team.delete()
        wait_until(lambda: team.conditions().get("DeletionBlocked") == ("True", "InUse"), "the reason")
        team.end(pod)
        wait_until(lambda: _ended(team, obj) and team.see() is None, "the Dataset to go")
        assert left_of(team, obj["metadata"]["uid"]) == []
        pods = team.api.list("v1", "Pod")
        assert not any("kopf" in str(each["metadata"]) for each in [obj, *pods]), (
            "it stores nothing on objects"
        )
    finally:
        running.end()
    assert running.raised == []
    assert team.api.get(LEASE)["spec"]["holderIdentity"] == "", "the next one need not wait"


def test_only_the_holder_of_the_lease_acts(installed: ControlPlane, team: Team, logs: AnnouncedLogs) -> None:
    configured = configuration(str(installed.kubeconfig))
    first = Running(configured, team, "first")
    wait_until(
        lambda: (team.api.get(LEASE) or {"spec": {}})["spec"].get("holderIdentity") == "first", "the Lease"
    )
    second = Running(configured, team, "second")
    try:
        team.dataset()
        wait_until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
        assert "0 due, 0 held" in repr(second.controller), "it has not begun to watch"
        # Somebody takes it away from the first, which notices, stops and says so.
        team.api.merge(LEASE, {"spec": {"holderIdentity": "third"}})
        first.thread.join(30)
        assert [str(error) for error in first.raised] == [
            "the Lease datacache/datacache-controller was lost: another acts now"
        ]
        assert team.api.get(LEASE)["spec"]["holderIdentity"] in ("third", "second"), "nothing is taken back"
    finally:
        first.end()
        second.end()
        team.api.merge(LEASE, {"spec": {"holderIdentity": ""}})


def test_the_command_acts_and_ends_when_it_is_told_to(
    installed: ControlPlane, team: Team, tmp_path: Path
) -> None:
    words = [
        "--namespace",
        RELEASE.namespace,
        "--image",
        RELEASE.image,
        "--kubeconfig",
        str(installed.kubeconfig),
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(["datacache", "controller", *words], stdout=log, stderr=log)
    try:
        team.dataset()
        wait_until(
            lambda: team.status().get("phase") == "Bound" or process.poll() is not None,
            "the claim to be bound",
        )
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
    said = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    loud = [each["message"] for each in said if each["level"] in ("warning", "error")]
    # The API server sends who asks for a kind that is brand-new away for a second.
    assert [message for message in loud if not message.startswith("Request attempt #1/")] == []
    assert team.status()["phase"] == "Bound"
    assert team.api.get(LEASE)["spec"]["holderIdentity"] == ""
