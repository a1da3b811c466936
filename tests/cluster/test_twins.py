"""
Twins of claims on a real kubelet: two volumes of one CSI handle on one node, in two namespaces at once.

The driver is our own, with a bucket as any administrator may make a volume of it; what is tested is what the
kubelet makes of two volumes that it takes for one.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from datacache.kube.beside import Beside, twin_of
from datacache.kube.manifests import objects
from datacache.kube.release import DRIVER
from datacache.kube.spec import read_dataset
from fuse import mountpoint
from tests.cluster.datasets import RELEASE
from tests.cluster.node import Node
from tests.cluster.plane import ControlPlane, wait_until
from tests.cluster.test_csi_node import BUCKET, READS, Driver, pod, volume
from tests.support.s3 import S3Server

pytestmark = [
    pytest.mark.skipif(bool(mountpoint.obstacle()), reason=mountpoint.obstacle() or "-"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a node"),
]

SPACE = RELEASE.namespace


def twin_objects(plane: ControlPlane) -> list[dict[str, Any]]:
    """Volume and claim that a Dataset in `default` with the mount pvc://train would have."""
    metadata = {"name": "d", "namespace": "default", "uid": "0b6e4c1a-0000", "generation": 1}
    spec = read_dataset({"metadata": metadata, "spec": {"mounts": [{"mountPoint": "pvc://train"}]}}, RELEASE)
    claim, of = plane.get("pvc", "train"), plane.get("pv", "train")
    # Ours are refused, as most of them are Datasets': this one stands for another driver's.
    source = of["spec"]["csi"] | {"driver": "nfs.csi.k8s.io"}
    twin = twin_of(spec.mounts[0], claim, of | {"spec": of["spec"] | {"csi": source}}, spec)
    made = objects(spec, RELEASE, beside=Beside(twins=(twin,)), token="eA==")
    found = [each for each in made if each["metadata"]["name"] == twin.name]
    found[0]["spec"]["csi"]["driver"] = DRIVER
    return found


def test_a_twin_is_read_while_the_first_volume_is_written_and_outlives_its_pods(
    plane: ControlPlane, real: Node, versitygw: S3Server, tmp_path: Path
) -> None:
    """A pod of the user's writes through the claim, one in the release's namespace reads through the twin, on
    one node; neither end takes the other's mount away, and the last one does."""
    versitygw.make_bucket(BUCKET)
    versitygw.put(BUCKET, "train/file", b"hello from the bucket\n")
    driver = Driver(real, tmp_path)

    def apply(*objects: dict[str, Any]) -> None:
        everything = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        plane.kubectl("apply", "-f", "-", given=json.dumps(everything))

    def logs(name: str, space: str) -> str:
        return plane.kubectl("logs", name, "-n", space, check=False).said

    def in_time(true: Any, what: str) -> None:
        try:
            wait_until(true, what)
        except AssertionError as error:
            described = plane.kubectl("describe", "pods", "-A", check=False).said[-4000:]
            raise AssertionError(f"{error}\n{described}{driver.log.read_text()[-3000:]}") from None

    if plane.kubectl("get", "namespace", SPACE, check=False).code:
        plane.kubectl("create", "namespace", SPACE)
    driver.start()
    try:
        in_time(lambda: DRIVER in plane.kubectl("get", "csinode", real.name, "-o", "json").out, "csinode")
        apply(*volume(versitygw))
        in_time(lambda: plane.get("pvc", "train")["status"].get("phase") == "Bound", "the claim to be bound")
        volume_of, claim_of = twin_objects(plane)
        apply(volume_of, claim_of)
        name = claim_of["metadata"]["name"]
        apply(pod("writer", READS))
        in_time(lambda: "hello from the bucket" in logs("writer", "default"), "the user's pod")
        reads = "cat /data/a; echo x > /data/b; while cat /data/file > /tmp/x; do sleep 0.05; done"
        reader = pod("reader", reads, read_only=True)
        reader["metadata"]["namespace"] = SPACE
        reader["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = name
        apply(reader)
        in_time(lambda: "by-a" in logs("reader", SPACE), "the pod of the twin")
        assert "Read-only file system" in logs("reader", SPACE)

        plane.kubectl("delete", "pod", "writer")
        in_time(lambda: "/writer/" not in real.mounts(), "the first pod to go")
        assert plane.get("pod", "reader", "-n", SPACE)["status"]["phase"] == "Running"
        plane.kubectl("delete", "pvc", name, "-n", SPACE, "--wait=false")
        assert plane.get("pvc", name, "-n", SPACE)["metadata"]["deletionTimestamp"], "its pod holds it"
        assert plane.get("pod", "reader", "-n", SPACE)["status"]["phase"] == "Running"
        plane.kubectl("delete", "pod", "reader", "-n", SPACE)
        place = f"{real.kubelet}/plugins/kubernetes.io/csi/{DRIVER}"
        in_time(lambda: place not in real.mounts(), "the end of the mount")
        in_time(
            lambda: plane.kubectl("get", "pvc", name, "-n", SPACE, check=False).code != 0, "the twin to go"
        )
        assert plane.get("pvc", "train")["status"]["phase"] == "Bound", "the user's claim is as it was"
    finally:
        driver.kill()
        for kind in ("pod/writer", "pvc/train", "pv/train", "secret/s3", f"csidriver/{DRIVER}"):
            plane.kubectl("delete", kind, "--ignore-not-found", "--wait=false", check=False)
        plane.kubectl("delete", "pod/reader", "-n", SPACE, "--ignore-not-found", "--wait=false", check=False)
        plane.kubectl(
            "delete", "pv", "-l", "datacache.io/dataset-uid=0b6e4c1a-0000", "--wait=false", check=False
        )
