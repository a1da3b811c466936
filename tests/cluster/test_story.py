"""
The whole story, on a real node and with the image of this checkout: what an operator, a user and a training
job do, from an empty cluster to an empty cluster.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fuse import mountpoint
from tests.cluster import image
from tests.cluster.binaries import NotBuilt
from tests.cluster.debian import NoPackages
from tests.cluster.node import ADDRESS, IMAGE, Node, node
from tests.cluster.plane import PATIENCE, ControlPlane, control_plane, wait_until
from tests.cluster.relay import relay
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server

pytestmark = [
    pytest.mark.skipif(bool(mountpoint.obstacle()), reason=mountpoint.obstacle() or "-"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a node"),
    pytest.mark.timeout(1500),  # the image may have to be built
]

CHART = Path(__file__).parents[2] / "charts/datacache"
SPACE, TEAM = "datacache", "team-a"
BUCKET, STORE_PORT = "story", 9000
WORKER, DRIVER = "app.kubernetes.io/name=datacache-worker", "app.kubernetes.io/component=csi"
FILES, SIZE = 48, 192 << 10
UNINSTALL = ("uninstall", "datacache", "-n", SPACE, "--wait", "--timeout=100s")


class Cluster:
    """The control plane with its node and the store, and what is done with kubectl and helm."""

    def __init__(self, plane: ControlPlane, on: Node, directory: Path, store: S3Server) -> None:
        self.plane, self.on, self.store = plane, on, store
        self.disk = directory / "disk"
        self.kubectl, self.get = plane.kubectl, plane.get
        self.values = [
            f"--set=image.repository={image.REPOSITORY}", f"--set-string=image.tag={image.TAG}",
            "--set=image.pullPolicy=Never", f"--set=kubeletDir={on.kubelet}",
            "--set=nodes.stateDir=/var/lib/datacache", "--set=nodes.memoryDir=/run/memory/datacache",
            f"--set=nodes.diskDir={self.disk}/datacache", f"--set=tiers.roots={{{self.disk},/run/memory}}",
        ]  # fmt: skip

    def apply(self, *objects: dict[str, Any]) -> None:
        everything = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", given=json.dumps(everything))

    def until(self, true: Any, what: str, *, patience: float = PATIENCE) -> None:
        """Wait; when it does not come, say how all is."""
        try:
            wait_until(true, what, patience=patience)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def told(self) -> str:
        """All that helps to see what went wrong."""
        words = ["get", "datasets,dataloads,pods,daemonsets,jobs,pvc", "-A", "-o", "wide"]
        found = [self.kubectl(*words, check=False).said]
        found.append(self.kubectl("get", "events", "-A", check=False).said[-6000:])
        for pod in self.get("pods", "-n", SPACE)["items"]:
            name = pod["metadata"]["name"]
            for more in ([], ["--previous"]):
                said = self.kubectl("logs", name, "-n", SPACE, "--tail=40", *more, check=False).said
                found.append(f"--- {name} {' '.join(more)}\n{said[-5000:]}")
        return "\n".join(found)

    def helm(self, *words: str, check: bool = True) -> str:
        done = self.plane.helm(*words, check=False)
        assert not check or done.code == 0, f"helm {words[0]}: {done.said}\n{self.told()}"
        return done.said

    def pods(self, *labels: str, namespace: str = SPACE) -> list[dict[str, Any]]:
        return self.get("pods", "-n", namespace, "-l", ",".join(labels))["items"]

    def inside(self, *words: str) -> str:
        """What a command says in the node's mount name space."""
        return subprocess.run(self.on.inside(*words), capture_output=True, text=True, check=False).stdout


@pytest.fixture
def cluster(tmp_path: Path, versitygw: S3Server) -> Iterator[Cluster]:
    with contextlib.ExitStack() as running:
        try:
            archive = image.archive()
            plane = running.enter_context(control_plane(tmp_path / "plane"))
            on = running.enter_context(node(plane, tmp_path / "node", images=[archive]))
        except (NotBuilt, NoPackages) as error:
            pytest.skip(str(error))
        host, port = versitygw.endpoint.removeprefix("http://").split(":")
        running.enter_context(relay((ADDRESS, STORE_PORT), (host, int(port))))
        yield Cluster(plane, on, tmp_path, versitygw)


def bucket(store: S3Server) -> dict[str, bytes]:
    """A bucket of files that no two of are alike."""
    store.make_bucket(BUCKET)
    noise = random.Random(7)
    content = {f"train/{number:03}": noise.randbytes(SIZE) for number in range(FILES)}
    for key, data in content.items():
        store.put(BUCKET, key, data)
    return content


def dataset(**spec: Any) -> list[dict[str, Any]]:
    keys = [
        {"name": option, "valueFrom": {"secretKeyRef": {"name": "s3", "key": key}}}
        for option, key in (("aws_access_key_id", "id"), ("aws_secret_access_key", "secret"))
    ]
    mount = {
        "mountPoint": f"s3://{BUCKET}", "encryptOptions": keys,
        "options": {"endpoint": f"http://{ADDRESS}:{STORE_PORT}", "region": "us-east-1"},
    }  # fmt: skip
    return [
        _object("v1", "Namespace", TEAM, ""),
        _object("v1", "Secret", "s3", stringData={"id": ACCESS_KEY, "secret": SECRET_KEY}),
        _object("datacache.io/v1alpha1", "Dataset", "data", spec={
            "mounts": [mount], "accessModes": ["ReadWriteMany"], "owner": {"uid": 1000, "gid": 1000},
            "write": {"upload": {"mode": "async"}, "acceptNodeLoss": True},
            "tieredstore": {"levels": [{"mediumtype": "SSD", "quota": "1Gi"}]}, **spec,
        }),
    ]  # fmt: skip


def _object(version: str, kind: str, name: str, namespace: str = TEAM, **more: Any) -> dict[str, Any]:
    where = {"namespace": namespace} if namespace else {}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, **where}, **more}


def test_the_whole_story(cluster: Cluster) -> None:
    """An operator installs the chart, a user applies a Dataset and prewarms it; all of it goes again."""
    content = bucket(cluster.store)

    # The operator.
    cluster.kubectl("create", "namespace", SPACE)
    cluster.helm("install", "datacache", str(CHART), "-n", SPACE, "--wait", "--timeout=100s", *cluster.values)
    cluster.until(lambda: all(map(is_ready, cluster.pods(DRIVER))) and cluster.pods(DRIVER), "the driver")
    cluster.until(
        lambda: "csi.datacache.io" in str(cluster.get("csinode", cluster.on.name)), "its registration"
    )

    # The user.
    cluster.apply(*dataset())
    cluster.until(lambda: status(cluster).get("phase") == "Bound", "the claim to be bound")
    cluster.apply(_object("datacache.io/v1alpha1", "DataLoad", "warm", spec={
        "dataset": {"name": "data"}, "nodes": [cluster.on.name],
    }))  # fmt: skip
    cluster.until(lambda: status(cluster, "dataload", "warm").get("phase") == "Complete", "the load")
    progress = status(cluster, "dataload", "warm")["progress"]
    assert (progress["files"], progress["bytes"]) == (FILES, FILES * SIZE), progress
    cluster.until(lambda: status(cluster).get("cachedPercentage") == 100, "the status to say so")

    # The training job, under which everything of ours is killed, and exchanged.
    training = Training(cluster, content)
    training.goes_on("its start")
    kill(cluster, "worker", WORKER)
    training.goes_on("the kill of the worker")
    kill(cluster, f"--kubelet-dir={cluster.on.kubelet}", DRIVER)
    training.goes_on("the kill of the driver")
    upgrade(cluster)
    training.goes_on("the upgrade")
    said = cluster.helm(*UNINSTALL, check=False)
    assert "datacache-uninstall-check" in said, said
    assert f"Dataset {TEAM}/data: used by pod {TEAM}/trainer" in check_says(cluster)
    training.ends()
    cluster.kubectl("delete", "pod", "trainer", "-n", TEAM)

    # The end.
    uid = cluster.get("dataset", "data", "-n", TEAM)["metadata"]["uid"]
    cluster.kubectl("delete", "dataload,dataset", "--all", "-n", TEAM, "--timeout=100s")
    cluster.helm(*UNINSTALL)
    nothing_is_left(cluster, uid)
    found = cluster.store.client.list_objects_v2(Bucket=BUCKET)["Contents"]
    there = {each["Key"] for each in found if not each["Key"].endswith("/")}
    assert there == {*content, "checkpoints/last", "checkpoints/final"}
    with cluster.store.client.get_object(Bucket=BUCKET, Key="checkpoints/final")["Body"] as body:
        assert body.read().decode() == training.sums


# An open for writing in the middle of which the worker goes may fail with ESTALE (docs/limits.md): once more.
TRAINS = """
mkdir -p /data/checkpoints || exit 1
cd /data/train && md5sum * > /tmp/first && cat /tmp/first && echo started || exit 1
epoch=1
while [ ! -e /tmp/stop ]; do
  md5sum * > /tmp/again && cmp /tmp/first /tmp/again || { echo FAILED in epoch $epoch; exit 1; }
  echo $epoch > /data/checkpoints/last || echo $epoch > /data/checkpoints/last \\
    || { echo FAILED to write; exit 1; }
  epoch=$((epoch + 1)); echo epoch $epoch
done
cp /tmp/first /data/checkpoints/final && echo finished
"""


class Training:
    """A pod that reads all of it again and again, and writes: one error is the end of it."""

    def __init__(self, cluster: Cluster, content: dict[str, bytes]) -> None:
        self.cluster = cluster
        claim = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
        container = {
            "name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", TRAINS],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "tmp", "mountPath": "/tmp"}],
        }  # fmt: skip
        cluster.apply(_object("v1", "Pod", "trainer", spec={
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container],
            "securityContext": {"runAsUser": 1000, "runAsGroup": 1000},
            "volumes": [claim, {"name": "tmp", "emptyDir": {}}],
        }))  # fmt: skip
        cluster.until(lambda: "started" in self.logs(), "the training")
        names = {key.removeprefix("train/"): data for key, data in content.items()}
        self.sums = "".join(f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in names.items())
        assert self.sums in self.logs(), "what was read is not what lies in the bucket"

    def logs(self) -> str:
        said = self.cluster.kubectl("logs", "trainer", "-n", TEAM, check=False).said
        assert "FAILED" not in said, said + self.cluster.told()
        return said

    def epoch(self) -> int:
        found = re.findall(r"^epoch (\d+)$", self.logs(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def goes_on(self, after: str) -> None:
        reached = self.epoch()
        self.cluster.until(lambda: self.epoch() > reached + 1, f"the training to go on after {after}")

    def ends(self) -> None:
        self.cluster.kubectl("exec", "trainer", "-n", TEAM, "--", "touch", "/tmp/stop")
        self.cluster.until(lambda: "finished" in self.logs(), "the end of the training")


def kill(cluster: Cluster, word: str, label: str) -> None:
    """Kill the container with that word in its command line; back when its pod is ready again."""
    before = restarts(cluster, label)
    for pid in processes(cluster, word):
        os.kill(pid, signal.SIGKILL)
    cluster.until(lambda: restarts(cluster, label) > before, f"{word} to be started again")
    cluster.until(lambda: all(map(is_ready, cluster.pods(label))), f"{word} to be ready")


def processes(cluster: Cluster, word: str) -> list[int]:
    """The first processes of the node's containers that have the word in their command line."""
    found = []
    for line in cluster.on.ctr("tasks", "ls").splitlines()[1:]:
        pid = int(line.split()[1])
        with contextlib.suppress(OSError):
            if word in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                found.append(pid)
    assert found, f"no container runs {word}"
    return found


def restarts(cluster: Cluster, label: str) -> int:
    """Of the containers of the pods with that label, all together."""
    each = [pod["status"].get("containerStatuses", ()) for pod in cluster.pods(label)]
    return sum(one["restartCount"] for some in each for one in some)


def upgrade(cluster: Cluster) -> None:
    """To a chart whose image has another name; back when everything runs that."""
    cluster.on.ctr("images", "tag", image.REFERENCE, f"{image.REPOSITORY}:2")
    newer = ["--set-string=image.tag=2" if "image.tag" in each else each for each in cluster.values]
    cluster.helm("upgrade", "datacache", str(CHART), "-n", SPACE, *newer)

    def upgraded() -> bool:
        pods = [*cluster.pods(WORKER), *cluster.pods("app.kubernetes.io/name=datacache")]
        images = {each["spec"]["containers"][0]["image"] for each in pods}
        return images == {f"{image.REPOSITORY}:2"} and all(map(is_ready, pods))

    cluster.until(upgraded, "all pods to be those of the newer chart", patience=300)


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions", ())}
    return conditions.get("Ready") == "True"


def check_says(cluster: Cluster) -> str:
    """The log of the job that looks before an uninstall."""
    return cluster.kubectl("logs", "job/datacache-uninstall-check", "-n", SPACE).out


def status(cluster: Cluster, kind: str = "dataset", name: str = "data") -> dict[str, Any]:
    return cluster.get(kind, name, "-n", TEAM).get("status") or {}


def nothing_is_left(cluster: Cluster, uid: str) -> None:
    """Of the release and the Dataset of that uid nothing in the API but the kinds and the namespaces, nothing
    mounted on the node, and no process of ours on it."""
    kinds = (
        "deployments,daemonsets,jobs,pods,services,secrets,configmaps,pvc,pv,csidrivers,networkpolicies,roles"
    )
    cluster.until(
        lambda: (
            not [
                each["metadata"]["name"]
                for each in cluster.get(kinds, "-A")["items"]
                if ("datacache" in each["metadata"]["name"] or uid in json.dumps(each))
                and each["metadata"]["name"]
                != "datacache-ca"  # what workers were known by; it has no more use
            ]
        ),
        "the API to be empty",
    )
    labels = cluster.get("node", cluster.on.name)["metadata"]["labels"]
    assert not [name for name in labels if name.startswith("datacache.io/")]
    cluster.until(lambda: "datacache" not in cluster.on.mounts(), "the node's mounts to go")
