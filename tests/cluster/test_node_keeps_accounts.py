"""
The accounts of a real node: a Dataset with a tier in memory and one on a disk, a pod that reads it through a
real kubelet, and the driver of the node, which mounts, lends, tells the API, and clears up.
"""

import json
from pathlib import Path
from typing import Any

from csi.accountant import sockets
from datacache.cluster.client import ControlClient
from datacache.errors import ControlError
from datacache.kube.release import DRIVER, GROUP
from datacache.model import MiB
from tests.cluster.plane import ControlPlane
from tests.cluster.test_dataset_volume import SPACE, Cluster, dataset, pod, pytestmark
from tests.cluster.test_dataset_volume import cluster as cluster
from tests.cluster.test_dataset_volume import store as store
from tests.support.s3 import S3Server

__all__ = ["pytestmark"]

READS = "while ! cat /data/file /data/sub/file; do sleep 1; done; sleep 600"


def start_driver(cluster: Cluster) -> None:
    root = cluster.root
    cluster.start(
        "driver", "csi", "--node-id", cluster.on.name, "--kubelet-dir", str(cluster.on.kubelet),
        "--run-dir", f"{root}/run", "--state-dir", f"{root}/state", "--tier-root", f"{root}/tiers",
        "--kubeconfig", str(cluster.plane.kubeconfig),
    )  # fmt: skip


def tiers_of(run: Path) -> dict[str, Any]:
    """What the worker says of its tiers, by medium; nothing while it does not answer."""
    for socket in sockets(str(run)):
        try:
            return {tier["name"][:3]: tier for tier in ControlClient(socket).status()["tiers"]}
        except ControlError:
            continue
    return {}


def cache_node(plane: ControlPlane, name: str) -> dict[str, Any]:
    done = plane.kubectl("get", "cachenode", name, "-o", "json", check=False)
    return dict(json.loads(done.out).get("status") or {}) if done.code == 0 else {}


def test_a_node_keeps_its_accounts(cluster: Cluster, store: S3Server, tmp_path: Path) -> None:
    """The worker gets its tmpfs and its lease; the CacheNode says what lies there; when the Dataset has gone,
    so has all of it on the node."""
    plane, inside, node = cluster.plane, cluster.in_time, cluster.on.name
    objects = dataset(store, tmp_path)
    levels = objects[-1]["spec"]["tieredstore"]["levels"]
    levels.append({"mediumtype": "MEM", "quota": "8Mi", "path": f"{tmp_path}/tiers/mem"})
    cluster.start_controller()
    start_driver(cluster)
    try:
        inside(lambda: DRIVER in plane.kubectl("get", "csinode", node, "-o", "json").out, "the driver")
        plane.kubectl(
            "apply", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        )
        uid = plane.get("dataset", "pets", "-n", SPACE)["metadata"]["uid"]
        inside(
            lambda: plane.get("dataset", "pets", "-n", SPACE).get("status", {}).get("phase") == "Bound",
            "Bound",
        )
        plane.kubectl("apply", "-f", "-", given=json.dumps(pod("a", READS)))
        label = f"{GROUP}/dataset-{uid}"
        inside(lambda: label in plane.get("node", node)["metadata"]["labels"], "the node's label")
        cluster.start_worker(uid)

        def logs() -> str:
            return str(plane.kubectl("logs", "a", "-n", SPACE, check=False).said)

        inside(lambda: "hello from below" in logs(), "pod a")
        home, run = f"{tmp_path}/tiers/mem/{uid}", tmp_path / "run" / uid
        inside(lambda: home in cluster.on.mounts(), "the tmpfs")
        inside(lambda: tiers_of(run).get("mem", {}).get("state") == "ok", "the tier in memory")
        inside(lambda: tiers_of(run).get("ssd", {}).get("lease"), "the lease")
        tiers = tiers_of(run)
        assert tiers["mem"]["quota"] == 8 * MiB and tiers["mem"]["lease"] is None
        assert 0 < tiers["ssd"]["lease"] <= tiers["ssd"]["quota"]

        def held() -> list[dict[str, Any]]:
            return [each for each in cache_node(plane, node).get("datasets", ()) if each["cached"] > 0]

        inside(held, "the CacheNode")
        assert [(each["uid"], each["namespace"], each["name"]) for each in held()] == [(uid, SPACE, "pets")]

        plane.kubectl("delete", "pod", "a", "-n", SPACE)
        plane.kubectl("delete", "dataset", "pets", "-n", SPACE, "--wait=false")
        # The controller asks workers at the address of a pod, which this one is not: nobody says that it is
        # clean.
        plane.kubectl("annotate", "dataset", "pets", "-n", SPACE, f"{GROUP}/accept-loss=true")
        there = ["get", "dataset", "pets", "-n", SPACE]
        inside(lambda: plane.kubectl(*there, check=False).code != 0, "the Dataset to go")
        cluster.kill("worker")  # its DaemonSet has gone, and so would its pod have
        left = [tmp_path / "state" / uid, run, tmp_path / "tiers/ssd" / uid, tmp_path / "tiers/mem" / uid]
        inside(lambda: not [path for path in left if path.exists()], "its directories to go")
        assert home not in cluster.on.mounts()
        inside(lambda: cache_node(plane, node)["count"] == 0, "the CacheNode to say so")
        assert "Traceback" not in (tmp_path / "driver.log").read_text()
    finally:
        for kind in ("pod/a", "dataset/pets"):
            plane.kubectl("delete", kind, "-n", SPACE, "--ignore-not-found", "--wait=false", check=False)
        accept = f"{GROUP}/accept-loss=true"
        plane.kubectl("annotate", "dataset", "pets", "-n", SPACE, accept, check=False)
        plane.kubectl("delete", f"csidriver/{DRIVER}", "--ignore-not-found", check=False)
