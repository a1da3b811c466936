"""The driver on a real kubelet: pods of a bucket, from the claim to the end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from datacache.kube.release import DRIVER
from fuse import mountpoint
from tests.cluster.node import IMAGE, Node
from tests.cluster.plane import ControlPlane, wait_until
from tests.support.s3 import S3Server

pytestmark = [
    pytest.mark.skipif(bool(mountpoint.obstacle()), reason=mountpoint.obstacle() or "-"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a node"),
]

BUCKET = "csi-node"

READS = (
    "cat /data/file && echo by-a > /data/a && while cat /data/file > /tmp/x; do sleep 0.05; done; echo FAILED"
)


class Driver:
    """`datacache-csi` as a process of the node."""

    def __init__(self, on: Node, directory: Path) -> None:
        self._on, self._directory = on, directory
        self.log = directory / "csi.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            **os.environ,
            "DATACACHE_RUNTIME": str(self._directory / "run"),
            "XDG_STATE_HOME": str(self._directory / "state"),
            "XDG_CACHE_HOME": str(self._directory / "cache"),
        }
        words = ["--node-id", self._on.name, "--kubelet-dir", str(self._on.kubelet)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._on.inside(sys.executable, "-P", "-m", "csi", *words),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=environment,
            )  # fmt: skip

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Tell it to end; its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(60)


@pytest.fixture
def store(versitygw: S3Server) -> S3Server:
    """One with a bucket that has something in it."""
    versitygw.make_bucket(BUCKET)
    versitygw.put(BUCKET, "train/file", b"hello from the bucket\n")
    versitygw.put(BUCKET, "train/sub/file", b"hello from below\n")
    return versitygw


def volume(server: S3Server) -> list[dict[str, Any]]:
    """What an administrator writes: a claim of a bucket that pods of user 1000 may write to."""
    attributes = {
        "uri": f"s3://{BUCKET}/train",
        "endpoint": server.endpoint,
        "rw": "true",
        "uid": "1000",
        "gid": "1000",
    }
    source = {
        "driver": DRIVER, "volumeHandle": "train", "volumeAttributes": attributes,
        "nodeStageSecretRef": {"namespace": "default", "name": "s3"},
    }  # fmt: skip
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    claimed = {"claimRef": {"namespace": "default", "name": "train"}, "csi": source}
    wanted = {"volumeName": "train", "resources": {"requests": {"storage": "1Mi"}}}
    driver = {
        "attachRequired": False, "podInfoOnMount": True, "fsGroupPolicy": "None",
        "volumeLifecycleModes": ["Persistent"],
    }  # fmt: skip
    return [
        _object("storage.k8s.io/v1", "CSIDriver", DRIVER, spec=driver),
        _object("v1", "Secret", "s3", stringData=dict(server.environment)),
        _object("v1", "PersistentVolume", "train", spec={**spec, "capacity": {"storage": "1Mi"}, **claimed}),
        _object("v1", "PersistentVolumeClaim", "train", spec={**spec, **wanted}),
    ]


def _object(version: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **more}


def pod(name: str, script: str, *, read_only: bool = False, sub_path: str = "") -> dict[str, Any]:
    """A pod of user 1000 that runs `script` with the volume at /data."""
    claim = {"claimName": "train", "readOnly": read_only}
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


def test_pods_of_a_bucket(plane: ControlPlane, real: Node, store: S3Server, tmp_path: Path) -> None:
    """The driver registers itself; a pod of user 1000 reads and writes; one that may not write cannot; one
    sees a subPath; the driver is killed and nobody notices; nothing is left on the node."""
    driver = Driver(real, tmp_path)

    def apply(*objects: dict[str, Any]) -> None:
        everything = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        plane.kubectl("apply", "-f", "-", given=json.dumps(everything))

    def logs(name: str) -> str:
        return plane.kubectl("logs", name, check=False).said

    def phase(name: str) -> str:
        return str(plane.get("pod", name)["status"].get("phase"))

    def told() -> str:
        return plane.kubectl("describe", "pods", check=False).said[-3000:] + driver.log.read_text()[-3000:]

    def in_time(true: Any, what: str) -> None:
        try:
            wait_until(true, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{told()}") from None

    driver.start()
    try:
        in_time(lambda: DRIVER in plane.kubectl("get", "csinode", real.name, "-o", "json").out, "csinode")
        assert plane.get("node", real.name)["metadata"]["labels"][f"{DRIVER}/hostname"] == real.name
        apply(*volume(store))
        apply(pod("a", READS))
        in_time(lambda: "hello from the bucket" in logs("a"), "pod a")

        apply(pod("b", "cat /data/file; echo x > /data/b", read_only=True))
        in_time(lambda: phase("b") == "Failed", "pod b")
        assert "hello from the bucket" in logs("b")
        assert "Read-only file system" in logs("b")

        driver.kill()
        driver.start()
        apply(pod("c", "cat /data/file", sub_path="sub"))
        in_time(lambda: phase("c") == "Succeeded", "pod c")
        assert "hello from below" in logs("c")

        assert phase("a") == "Running", logs("a")
        plane.kubectl("delete", "pod", "a", "b", "c")
        place = f"{real.kubelet}/plugins/kubernetes.io/csi/{DRIVER}"
        in_time(lambda: place not in real.mounts(), "the end of the mount")
        in_time(lambda: not os.listdir(place), "the kubelet to tidy up")
        assert not os.listdir(real.kubelet / "plugins" / DRIVER / "volumes")
        body = store.client.get_object(Bucket=BUCKET, Key="train/a")["Body"]
        with body:
            assert body.read() == b"by-a\n"
        assert driver.stop() == 0
        kept = driver.log.read_text()
        assert store.environment["AWS_SECRET_ACCESS_KEY"] not in kept
        assert "Traceback" not in kept
    finally:
        driver.kill()
        for kind in ("pod/a", "pod/b", "pod/c", "pvc/train", "pv/train", "secret/s3", f"csidriver/{DRIVER}"):
            plane.kubectl("delete", kind, "--ignore-not-found", "--wait=false", check=False)
