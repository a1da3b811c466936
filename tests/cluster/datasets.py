"""What the tests of the controller share: a namespace for each, nodes made by hand, and an API that counts.

Nodes have no kubelet: the scheduler puts pods on them, and a test says what became of these. What a worker
answers, a test says, too.
"""

import base64
import itertools
from collections.abc import Mapping
from typing import Any

from kubernetes import client

from datacache.errors import ControlError
from datacache.kube.api import OURS, Api, configuration
from datacache.kube.asking import Trust
from datacache.kube.release import Name, Release
from tests.cluster.plane import ControlPlane, wait_until

Object = dict[str, Any]

RELEASE = Release(namespace="datacache", image="local.test/datacache:1")
SECRET = b"hunter2-hunter2-hunter2"
_numbers = itertools.count(1)


class CountingApi(Api):
    """Notes what it sends that changes something; dies before the write of number `dies_at`."""

    def __init__(self, configured: client.Configuration) -> None:
        super().__init__(configured)
        self.writes: list[str] = []
        self.dies_at = -1

    def _ask(self, method: str, path: str, *rest: Any, **more: Any) -> Object:
        if method != "GET":
            if len(self.writes) == self.dies_at:
                raise Killed
            self.writes.append(f"{method} {path}")
        return super()._ask(method, path, *rest, **more)


class Killed(BaseException):
    """The controller ended in this moment."""


class Team:
    """A namespace, a Secret in it, a node, and a way to say what is so."""

    def __init__(self, plane: ControlPlane) -> None:
        self.api = CountingApi(configuration(str(plane.kubeconfig)))
        number = next(_numbers)
        self.namespace, self.node = f"team-{number}", f"node-{number}"
        self.answers: dict[str, Mapping[str, Any]] = {}
        self.nodes: list[str] = []
        self.volumes: list[Name] = []
        self.tokens: set[str] = set()
        self.jobs: dict[str, Mapping[str, Any]] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.cancelled: list[str] = []
        self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
        self.api.create(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": self.namespace, "name": "s3"},
             "data": {"id": base64.b64encode(b"AKIA").decode(), "secret": base64.b64encode(SECRET).decode()}}
        )  # fmt: skip
        self.add_node(self.node)
        account = Name("v1", "ServiceAccount", self.namespace, "default")
        wait_until(lambda: self.api.get(account), "the account that pods need")

    def close(self) -> None:
        """Leave no node behind, on which pods of other tests could come to lie, and no volume."""
        for name in self.volumes:
            if volume := self.api.get(name):
                self.api.delete(name, uid=volume["metadata"]["uid"])
        for name in self.nodes:
            if node := self.api.get(Name("v1", "Node", "", name)):
                self.api.delete(Name("v1", "Node", "", name), uid=node["metadata"]["uid"])
        self.api.close()

    def add_node(self, name: str, **labels: str) -> None:
        """A node that a scheduler takes for one."""
        labels = {"kubernetes.io/hostname": name} | labels
        self.nodes.append(name)
        self.api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
        room = {"cpu": "8", "memory": "64Gi", "pods": "100", "ephemeral-storage": "100Gi"}
        self.api.merge(
            Name("v1", "Node", "", name), {"status": {"capacity": room, "allocatable": room}}, part="status"
        )

    def dataset(self, name: str = "data", **spec: Any) -> Object:
        keys = [
            {"name": option, "valueFrom": {"secretKeyRef": {"name": "s3", "key": key}}}
            for option, key in (("aws_access_key_id", "id"), ("aws_secret_access_key", "secret"))
        ]
        mount = {"mountPoint": "s3://bucket/prefix", "encryptOptions": keys}
        given = {key: value for key, value in ({"mounts": [mount]} | spec).items() if value is not None}
        return self.api.create(
            {"apiVersion": OURS, "kind": "Dataset", "metadata": {"namespace": self.namespace, "name": name},
             "spec": given}
        )  # fmt: skip

    def see(self, name: str = "data") -> Object | None:
        return self.api.get(Name(OURS, "Dataset", self.namespace, name))

    def status(self, name: str = "data") -> Object:
        return (self.see(name) or {}).get("status") or {}

    def conditions(self, name: str = "data") -> dict[str, tuple[str, str]]:
        found = self.status(name).get("conditions", ())
        return {each["type"]: (each["status"], each["reason"]) for each in found}

    def delete(self, name: str = "data") -> None:
        self.api.delete(Name(OURS, "Dataset", self.namespace, name), uid=self.see(name)["metadata"]["uid"])

    def events(self) -> set[tuple[str, str]]:
        found = self.api.list("v1", "Event", namespace=self.namespace)
        return {
            (each["reason"], each["message"]) for each in found if each["involvedObject"]["kind"] == "Dataset"
        }

    def load(self, name: str = "load", **spec: Any) -> Object:
        """A DataLoad of `data`."""
        return self.api.create(
            {"apiVersion": OURS, "kind": "DataLoad", "metadata": {"namespace": self.namespace, "name": name},
             "spec": {"dataset": {"name": "data"}} | spec}
        )  # fmt: skip

    def loading(self, name: str = "load") -> Object | None:
        """The DataLoad, its status in it."""
        return self.api.get(Name(OURS, "DataLoad", self.namespace, name))

    # What lies beside a Dataset

    def claim(self, name: str = "nas", *, volume: str = "", modes: str = "ReadWriteMany") -> Object:
        """A claim of a NAS that is bound; its volume."""
        volume = volume or f"{self.namespace}-{name}"
        self.volumes.append(Name("v1", "PersistentVolume", "", volume))
        spec = {"accessModes": [modes], "storageClassName": ""}
        self.api.create(
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
             "spec": spec | {
                 "capacity": {"storage": "1Ti"}, "persistentVolumeReclaimPolicy": "Retain",
                 "mountOptions": ["nfsvers=4.1"],
                 "nfs": {"server": "10.0.0.1", "path": f"/{volume}"},
                 "claimRef": {"namespace": self.namespace, "name": name}}}
        )  # fmt: skip
        self.api.create(
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim",
             "metadata": {"namespace": self.namespace, "name": name},
             "spec": spec | {"volumeName": volume, "resources": {"requests": {"storage": "1Ti"}}}}
        )  # fmt: skip
        where = Name("v1", "PersistentVolumeClaim", self.namespace, name)
        wait_until(lambda: (self.api.get(where) or {})["status"].get("phase") == "Bound", "a bound claim")
        return self.api.get(self.volumes[-1]) or {}

    def config_map(self, name: str, **data: str) -> Name:
        """A ConfigMap, made or changed."""
        metadata = {"namespace": self.namespace, "name": name}
        self.api.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
        return Name("v1", "ConfigMap", self.namespace, name)

    # Pods

    def pod(self, name: str = "reader", claim: str = "data", **container: Any) -> Name:
        """A pod that uses a claim, on the node of this team."""
        self.api.create(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": self.namespace, "name": name},
             "spec": {"nodeName": self.node, "terminationGracePeriodSeconds": 0,
                      "containers": [{"name": "c", "image": "local.test/none:1"} | container],
                      "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": claim}}]}}
        )  # fmt: skip
        return Name("v1", "Pod", self.namespace, name)

    def end(self, pod: Name) -> None:
        """It has gone, as its kubelet would see to."""
        if found := self.api.get(pod):
            self.api.delete(pod, uid=found["metadata"]["uid"], grace=0)

    def workers(self, obj: Object) -> list[Object]:
        labels = f"datacache.io/dataset-uid={obj['metadata']['uid']}"
        return self.api.list("v1", "Pod", namespace=RELEASE.namespace, labels=labels)

    def ready(self, obj: Object, answer: Mapping[str, Any]) -> None:
        """The worker of `obj` runs, and answers with this."""
        wait_until(lambda: any(w["spec"].get("nodeName") for w in self.workers(obj)), "a worker on a node")
        (worker,) = self.workers(obj)
        address = f"10.1.{hash(self.namespace) % 250}.{hash(obj['metadata']['uid']) % 250}"
        condition = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-26T21:00:00Z"}
        self.api.merge(
            Name("v1", "Pod", RELEASE.namespace, worker["metadata"]["name"]),
            {"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
                        "conditions": [condition]}},
            part="status",
        )  # fmt: skip
        self.answers[f"https://{address}:7400"] = answer

    def connect(self, url: str, token: str, trust: Trust | None) -> "ScriptedWorker":
        """The API of the worker at `url`."""
        assert trust is not None and "BEGIN CERTIFICATE" in trust.authorities
        assert trust.name.startswith("datacache-") and trust.name.endswith(f".{RELEASE.namespace}.svc")
        self.tokens.add(token)
        return ScriptedWorker(self, url)

    def worker_restarts(self) -> None:
        """It knows no jobs any more."""
        self.jobs.clear()


class ScriptedWorker:
    """Answers what the test says, and notes the loads that it is asked for."""

    def __init__(self, team: Team, url: str) -> None:
        self._team, self._url = team, url

    def status(self) -> Mapping[str, Any]:
        if self._url not in self._team.answers:
            raise ControlError(f"the worker at {self._url} does not answer")
        return self._team.answers[self._url]

    def load(self, path: str, *, globs: tuple[str, ...], bandwidth: int, verify: bool) -> str:
        self.status()
        job = f"job{len(self._team.asked)}"
        self._team.asked.append((path, globs, bandwidth, verify))
        self._team.jobs[job] = job_says()
        return job

    def announce(self, files: tuple[str, ...]) -> str:
        self.status()
        job = f"job{len(self._team.asked)}"
        self._team.asked.append(files)
        self._team.jobs[job] = job_says()
        return job

    def load_status(self, job: str) -> Mapping[str, Any]:
        self.status()
        if job not in self._team.jobs:
            raise ControlError(f"no load job {job!r}")
        return self._team.jobs[job]

    def load_cancel(self, job: str) -> None:
        self.status()
        self._team.cancelled.append(job)


def job_says(state: str = "running", *, done: int = 0, of: int = 4, failures: Any = ()) -> Object:
    """The status of a load job: `done` files of 1 MiB each, of `of`."""
    return {
        "state": state, "files": of, "files_done": done, "files_failed": len(failures), "bytes": of << 20,
        "bytes_done": done << 20, "bytes_fetched": done << 20, "listed": True, "seconds": 1.0,
        "failures": list(failures), "waiting": "",
    }  # fmt: skip


def worker_says(*, cached: int = 0, dirty: int = 0, due: int = 0) -> Object:
    """The status of a worker, as far as a controller looks."""
    return {
        "tiers": [{"name": "ssd:/x", "used": cached, "state": "ok", "reason": ""}],
        "index": {"files": 10, "bytes": 1 << 30},
        "reads": {"opens": 4, "opens_whole": 3},
        "writing": {"dirty_bytes": dirty, "dirty_files": bool(dirty), "dirty_due": due, "dirty_unnoted": 0},
    }
