"""
A Dataset as a volume on a real kubelet: controller and driver as processes, pods of user 1000 that read and
write.

There is no image of ours in this test: the DaemonSet's pod cannot be pulled, and the test runs its command
line instead, as a process of the node, with the files that its pod would have."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datacache.kube.release import DRIVER, GROUP
from fuse import mountpoint
from tests.cluster.datasets import RELEASE
from tests.cluster.debian import NoPackages
from tests.cluster.node import IMAGE, Node, node
from tests.cluster.plane import ControlPlane, wait_until
from tests.support.s3 import S3Server

CHART = Path(__file__).parents[2] / "charts/datacache"
BUCKET = "dataset-volume"
SPACE = "team-volume"

pytestmark = [
    pytest.mark.skipif(bool(mountpoint.obstacle()), reason=mountpoint.obstacle() or "-"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a node"),
    pytest.mark.skipif(not mountpoint.is_native("auto"), reason="this kernel is older than Linux 6.9"),
]

READS = (
    "cat /data/file && echo by-a > /data/a && while cat /data/file > /tmp/x; do sleep 0.05; done; echo FAILED"
)


def _object(version: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": SPACE}, **more}


class Cluster:
    """The node's processes of ours: controller, driver, worker."""

    def __init__(self, plane: ControlPlane, on: Node, root: Path) -> None:
        self.plane, self.on, self.root = plane, on, root
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str, **variables: str) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                self.on.inside(sys.executable, "-P", "-m", *words), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, cwd="/", env={**os.environ, "HOME": str(self.root), **variables},
            )  # fmt: skip

    def start_controller(self) -> None:
        self.start(
            "controller", "datacache.cli.main", "controller", "--namespace", RELEASE.namespace, "--image",
            RELEASE.image, "--kubeconfig", str(self.plane.kubeconfig), "--state-dir", f"{self.root}/state",
            "--run-dir", f"{self.root}/run", "--tier-root", f"{self.root}/tiers",
        )  # fmt: skip

    def start_driver(self) -> None:
        self.start(
            "driver", "csi", "--node-id", self.on.name, "--kubelet-dir", str(self.on.kubelet), "--run-dir",
            f"{self.root}/run", "--takeover-timeout", "10s",
        )  # fmt: skip

    def start_worker(self, uid: str) -> None:
        """As the DaemonSet says, with what its pod would have mounted."""
        (found,) = self.plane.get("daemonset", "-n", RELEASE.namespace, "-l", f"{GROUP}/dataset-uid={uid}")[
            "items"
        ]
        spec = found["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        files = self.root / "worker"
        for volume in spec["volumes"]:
            place = files / volume["name"]
            if "configMap" in volume:
                data = self.plane.get("configmap", volume["configMap"]["name"], "-n", RELEASE.namespace)[
                    "data"
                ]
                _write(place, {name: text.encode() for name, text in data.items()})
            elif "secret" in volume:
                kept = self.plane.get("secret", volume["secret"]["secretName"], "-n", RELEASE.namespace)[
                    "data"
                ]
                items = volume["secret"].get("items") or [{"key": key, "path": key} for key in kept]
                _write(place, {item["path"]: base64.b64decode(kept[item["key"]]) for item in items})
        words = [_moved(word, container, files) for word in container["command"]]
        config = files / "config" / "datacache.yaml"
        config.write_text(_moved(config.read_text(), container, files))
        variables = {each["name"]: each["value"] for each in container["env"]}
        self.start("worker", "datacache.cli.main", *words[1:], **variables)

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        for name in list(self.running):
            self.kill(name)

    def told(self) -> str:
        """For whoever has to find out why."""
        logs = [f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.root.glob("*.log"))]
        return self.plane.kubectl("describe", "pods", "-n", SPACE, check=False).said[-3000:] + "\n".join(logs)

    def in_time(self, true: Any, what: str) -> None:
        try:
            wait_until(true, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None


def _write(place: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o400)
    for path in place.rglob("datacache.yaml"):
        path.chmod(0o600)


def _moved(text: str, container: dict[str, Any], files: Path) -> str:
    """`text` with the places of the pod's files as they are here."""
    for mount in container["volumeMounts"]:
        if (files / mount["name"]).exists():
            text = text.replace(mount["mountPath"], str(files / mount["name"]))
    return text


@pytest.fixture
def cluster(plane: ControlPlane, tmp_path: Path) -> Iterator[Cluster]:
    kinds = plane.helm(
        "template", "datacache", str(CHART), "-n", RELEASE.namespace, "-s", "templates/crds.yaml",
        "--set=image.repository=x",
    ).out  # fmt: skip
    plane.kubectl("apply", "--server-side", "-f", "-", given=kinds)
    for space in (RELEASE.namespace, SPACE):
        plane.kubectl("create", "namespace", space, check=False)
    account = _object("v1", "ServiceAccount", RELEASE.service_account)
    account["metadata"]["namespace"] = RELEASE.namespace
    plane.kubectl("apply", "-f", "-", given=json.dumps(account))
    with contextlib.ExitStack() as running:
        try:
            made = running.enter_context(node(plane, tmp_path / "node"))
        except NoPackages as error:
            pytest.skip(str(error))
        cluster = Cluster(plane, made, tmp_path)
        running.callback(cluster.close)
        yield cluster
        plane.kubectl("delete", "node", made.name)


@pytest.fixture
def store(versitygw: S3Server) -> S3Server:
    versitygw.make_bucket(BUCKET)
    versitygw.put(BUCKET, "train/file", b"hello from the bucket\n")
    versitygw.put(BUCKET, "train/sub/file", b"hello from below\n")
    return versitygw


def dataset(server: S3Server, root: Path) -> list[dict[str, Any]]:
    """What a user writes: a Dataset of a bucket that pods of user 1000 may write to, and its keys."""
    options = {"endpoint": server.endpoint, "region": server.environment.get("AWS_REGION", "us-east-1")}
    keys = [
        {"name": option, "valueFrom": {"secretKeyRef": {"name": "s3", "key": variable}}}
        for option, variable in (
            ("aws_access_key_id", "AWS_ACCESS_KEY_ID"), ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY")
        )
    ]  # fmt: skip
    spec = {
        "mounts": [
            {"mountPoint": f"s3://{BUCKET}/train", "path": "/", "options": options, "encryptOptions": keys}
        ],
        "accessModes": ["ReadWriteMany"], "owner": {"uid": 1000, "gid": 1000},
        "consistency": {"mode": "revalidate", "ttl": "5s"},
        "tieredstore": {"levels": [{"mediumtype": "SSD", "quota": "1Gi", "path": f"{root}/tiers/ssd"}]},
        "write": {"upload": {"mode": "async", "delay": "0s"}, "acceptNodeLoss": True},
    }  # fmt: skip
    driver = {
        "attachRequired": False, "podInfoOnMount": True, "fsGroupPolicy": "None",
        "volumeLifecycleModes": ["Persistent"],
    }  # fmt: skip
    return [
        _object("storage.k8s.io/v1", "CSIDriver", DRIVER, spec=driver),
        _object("v1", "Secret", "s3", stringData=dict(server.environment)),
        _object("datacache.io/v1alpha1", "Dataset", "pets", spec=spec),
    ]


def pod(name: str, script: str, *, read_only: bool = False, sub_path: str = "") -> dict[str, Any]:
    """A pod of user 1000 that runs `script` with the Dataset at /data."""
    claim = {"claimName": "pets", "readOnly": read_only}
    mount = {"name": "data", "mountPath": "/data", **({"subPath": sub_path} if sub_path else {})}
    container = {
        "name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", script],
        "volumeMounts": [mount, {"name": "tmp", "mountPath": "/tmp"}],
    }  # fmt: skip
    spec = {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "hostNetwork": True,
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
        "containers": [container],
        "volumes": [{"name": "data", "persistentVolumeClaim": claim}, {"name": "tmp", "emptyDir": {}}],
    }  # fmt: skip
    return _object("v1", "Pod", name, spec=spec)


def test_pods_of_a_dataset(cluster: Cluster, store: S3Server, tmp_path: Path) -> None:
    """A pod of user 1000 reads and writes; one that may not write cannot; one sees a subPath. Worker and
    driver are killed under the first, which notices nothing. With no worker at all it can be deleted, and
    nothing is left."""
    plane, inside = cluster.plane, cluster.in_time

    def apply(*objects: dict[str, Any]) -> None:
        plane.kubectl(
            "apply", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        )

    def logs(name: str) -> str:
        return plane.kubectl("logs", name, "-n", SPACE, check=False).said

    def phase(name: str) -> str:
        return str(plane.get("pod", name, "-n", SPACE)["status"].get("phase"))

    cluster.start_controller()
    cluster.start_driver()
    try:
        inside(
            lambda: DRIVER in plane.kubectl("get", "csinode", cluster.on.name, "-o", "json").out, "the driver"
        )
        apply(*dataset(store, tmp_path))
        uid = plane.get("dataset", "pets", "-n", SPACE)["metadata"]["uid"]
        inside(
            lambda: plane.get("dataset", "pets", "-n", SPACE).get("status", {}).get("phase") == "Bound",
            "Bound",
        )
        apply(pod("a", READS))
        label = f"{GROUP}/dataset-{uid}"
        inside(lambda: label in plane.get("node", cluster.on.name)["metadata"]["labels"], "the node's label")
        cluster.start_worker(uid)
        inside(lambda: "hello from the bucket" in logs("a"), "pod a")

        apply(pod("b", "cat /data/file; echo x > /data/b", read_only=True))
        inside(lambda: phase("b") == "Failed", "pod b")
        assert "hello from the bucket" in logs("b")
        assert "Read-only file system" in logs("b")

        cluster.kill("worker")
        cluster.start_worker(uid)
        apply(pod("c", "cat /data/file && echo by-c > /data/c", sub_path="sub"))
        inside(lambda: phase("c") == "Succeeded", "pod c")
        assert "hello from below" in logs("c")
        cluster.kill("driver")
        cluster.start_driver()
        apply(pod("d", "cat /data/a /data/sub/c"))
        inside(lambda: phase("d") == "Succeeded", "pod d")
        assert "by-a\nby-c" in logs("d")
        assert phase("a") == "Running", logs("a")
        for key, content in (("train/a", b"by-a\n"), ("train/sub/c", b"by-c\n")):
            body = store.client.get_object(Bucket=BUCKET, Key=key)["Body"]
            with body:
                assert body.read() == content

        cluster.kill("worker")  # and no other comes, as with an image that cannot be pulled
        begun = time.monotonic()
        plane.kubectl("delete", "pod", "a", "-n", SPACE)
        assert time.monotonic() - begun < 30, "a pod that cannot die"
        plane.kubectl("delete", "pod", "b", "c", "d", "-n", SPACE)
        place = f"{cluster.on.kubelet}/plugins/kubernetes.io/csi/{DRIVER}"
        inside(lambda: place not in cluster.on.mounts(), "the end of the mount")
        assert not os.listdir(cluster.on.kubelet / "plugins" / DRIVER / "volumes")
        for name in ("driver", "worker"):
            kept = (tmp_path / f"{name}.log").read_text()
            assert store.environment["AWS_SECRET_ACCESS_KEY"] not in kept
            assert "Traceback" not in kept, kept
    finally:
        for kind in ("pod/a", "pod/b", "pod/c", "pod/d", "dataset/pets"):
            plane.kubectl("delete", kind, "-n", SPACE, "--ignore-not-found", "--wait=false", check=False)
        accept = f"{GROUP}/accept-loss=true"
        plane.kubectl("annotate", "dataset", "pets", "-n", SPACE, accept, check=False)
        with contextlib.suppress(AssertionError):
            wait_until(
                lambda: plane.kubectl("get", "dataset", "pets", "-n", SPACE, check=False).code != 0, "its end"
            )
        plane.kubectl("delete", f"csidriver/{DRIVER}", "--ignore-not-found", check=False)
