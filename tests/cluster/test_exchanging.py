"""The driver's pods on a real API server and controller manager: exchanged one by one, at no bad time."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from datacache.clock import VirtualClock
from datacache.kube.api import configuration
from datacache.kube.exchanging import AGAIN, LONGEST, QUIET, Exchanger
from datacache.kube.manifests import UID_LABEL, WORKER_LABELS
from datacache.kube.release import Key, Name, Release
from datacache.kube.turns import SETTLED
from tests.cluster.datasets import CountingApi
from tests.cluster.plane import ControlPlane, wait_until

SPACE = "exchanging"
NODES = ("exchange-1", "exchange-2")
PLUGIN = Key(SPACE, "plugin")
NOW = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
"""Far behind all that the API notes by itself."""

Object = dict[str, Any]


class Cluster:
    """Two nodes made by hand, with a DaemonSet of drivers and one of workers; no kubelet."""

    def __init__(self, plane: ControlPlane) -> None:
        self.api = CountingApi(configuration(str(plane.kubeconfig)))
        self.clock = VirtualClock(NOW)
        release = Release(namespace=SPACE, image="local.test/datacache:1", plugin=PLUGIN.name)
        self.exchanger = Exchanger(self.api, release, clock=self.clock)
        self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}})
        account = Name("v1", "ServiceAccount", SPACE, "default")
        wait_until(lambda: self.api.get(account), "the account that pods need")
        for name in NODES:
            labels = {"kubernetes.io/hostname": name, "exchanging": "true"}
            self.api.create(
                {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
            )
            room = {"cpu": "8", "memory": "64Gi", "pods": "100"}
            status = {"capacity": room, "allocatable": room}
            self.api.merge(Name("v1", "Node", "", name), {"status": status}, part="status")
        self._daemon_set(PLUGIN.name, {"app": "plugin"}, "OnDelete")
        self._daemon_set("worker", {UID_LABEL: "u", **WORKER_LABELS}, "RollingUpdate")

    def _daemon_set(self, name: str, labels: dict[str, str], how: str) -> None:
        pod = {
            "nodeSelector": {"exchanging": "true"}, "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "c", "image": "local.test/none:1"}],
        }  # fmt: skip
        self.api.create({
            "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"namespace": SPACE, "name": name, "labels": labels},
            "spec": {
                "selector": {"matchLabels": labels}, "updateStrategy": {"type": how},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        })  # fmt: skip

    def pods(self, name: str) -> dict[str, Object]:
        """Those of a DaemonSet, by node; without those that end."""
        return {
            each["spec"]["nodeName"]: each
            for each in self.api.list("v1", "Pod", namespace=SPACE)
            if each["metadata"]["generateName"] == f"{name}-" and each["spec"].get("nodeName")
            and "deletionTimestamp" not in each["metadata"]
        }  # fmt: skip

    def ready(self, pod: Object, *, ago: float, status: str = "True") -> None:
        """Its kubelet says so, since so many seconds by the clock of the test."""
        since = datetime.fromtimestamp(self.clock.wall() - ago, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {"type": "Ready", "status": status, "lastTransitionTime": since}
        name = Name("v1", "Pod", SPACE, pod["metadata"]["name"])
        self.api.merge(name, {"status": {"phase": "Running", "conditions": [condition]}}, part="status")

    def all_ready(self) -> None:
        for name in (PLUGIN.name, "worker"):
            wait_until(lambda name=name: len(self.pods(name)) == 2, f"pods of {name}")
            for pod in self.pods(name).values():
                self.ready(pod, ago=1000)

    def change(self, name: str, image: str) -> None:
        """As an upgrade of the chart does; back when the controller manager has seen it."""
        of = Name("apps/v1", "DaemonSet", SPACE, name)
        template = {"spec": {"containers": [{"name": "c", "image": image}]}}
        self.api.merge(of, {"spec": {"template": template}})

        def seen() -> bool:
            found = self.api.get(of)
            return bool(found["status"].get("observedGeneration") == found["metadata"]["generation"])

        wait_until(seen, f"the new revision of {name}")

    def look(self) -> float:
        return self.exchanger.look(PLUGIN)

    def names(self, pods: str = PLUGIN.name) -> set[str]:
        return {each["metadata"]["name"] for each in self.pods(pods).values()}


@pytest.fixture
def cluster(plane: ControlPlane) -> Iterator[Cluster]:
    made = Cluster(plane)
    made.all_ready()
    yield made
    made.api.close()
    plane.kubectl("delete", "namespace", SPACE)
    plane.kubectl("delete", "node", *NODES)


def test_the_drivers_are_exchanged_one_by_one(cluster: Cluster) -> None:
    """The plugin is `OnDelete`, rolled by the controller, never together with that node's workers."""
    cluster.api.writes.clear()
    assert cluster.look() == QUIET
    assert cluster.api.writes == [], "nothing is written while nothing changes"
    old = cluster.names()

    cluster.change(PLUGIN.name, "local.test/none:2")
    cluster.ready(cluster.pods("worker")["exchange-1"], ago=0, status="False")
    assert cluster.look() == AGAIN
    wait_until(lambda: len(old - cluster.names()) == 1, "the first to go")
    with cluster.exchanger.workers() as may:
        assert not may, "workers are the only holders now"
    wait_until(lambda: len(cluster.pods(PLUGIN.name)) == 2, "the follower")
    follower = cluster.pods(PLUGIN.name)["exchange-2"]
    assert follower["metadata"]["name"] not in old, "the node whose worker is well came first"

    cluster.ready(cluster.pods("worker")["exchange-1"], ago=1000)
    assert cluster.look() == AGAIN
    cluster.ready(follower, ago=SETTLED - 1)
    assert cluster.look() == AGAIN
    assert len(cluster.names() & old) == 1, "nobody goes before the first is well"
    cluster.clock.advance(2)
    assert cluster.look() == AGAIN
    wait_until(lambda: len(cluster.pods(PLUGIN.name)) == 2, "the other follower")
    assert not cluster.names() & old

    cluster.ready(cluster.pods(PLUGIN.name)["exchange-1"], ago=SETTLED)
    assert cluster.look() == QUIET
    with cluster.exchanger.workers() as may:
        assert may


def test_nobody_goes_while_workers_are_being_exchanged(cluster: Cluster) -> None:
    old = cluster.names()
    cluster.change("worker", "local.test/none:2")
    cluster.change(PLUGIN.name, "local.test/none:2")
    assert cluster.look() == AGAIN
    assert cluster.names() == old


def test_a_driver_that_does_not_come_back_holds_up_workers_for_so_long(cluster: Cluster) -> None:
    cluster.change(PLUGIN.name, "local.test/none:2")
    cluster.look()
    cluster.clock.advance(LONGEST - 1)
    with cluster.exchanger.workers() as may:
        assert not may
    cluster.clock.advance(1)
    with cluster.exchanger.workers() as may:
        assert may
    wait_until(lambda: len(cluster.pods(PLUGIN.name)) == 2, "the follower")
    left = cluster.names()
    assert cluster.look() == AGAIN
    assert cluster.names() == left, "what is no good stays on one node"
