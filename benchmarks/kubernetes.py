"""
The controller beside a real control plane: how long it takes after a restart, what it writes, its memory.

    make bench-kubernetes                          200 Datasets, 50 nodes
    make bench-kubernetes ARGS='--datasets 20'     fewer, to see whether it works

etcd, API server, controller manager and scheduler run as processes, the controller as another. Nodes are made
by hand: each Dataset wants a worker on one of them, and gets a pod that nobody starts, so no worker is asked.

Bars: after a restart all Datasets are looked at within 60 s, measured by a change of each that was made while
it was away; 300 MB; and nothing written, by anybody, to what belongs to Datasets in a minute in which nothing
happens.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # not where this lies: it has the name of the client that we import

from datacache.kube.api import OURS, Api, configuration  # noqa: E402
from datacache.kube.release import Name  # noqa: E402
from tests.cluster.plane import ControlPlane, control_plane, wait_until  # noqa: E402

NAMESPACE = "datacache"
_KINDS = (
    "datasets daemonsets configmaps secrets services persistentvolumes persistentvolumeclaims "
    "nodes pods events"
)
_WRITE = re.compile(
    rf'apiserver_request_total{{[^}}]*resource="({_KINDS.replace(" ", "|")})"[^}}]*'
    rf'verb="(POST|PUT|PATCH|APPLY|DELETE)"[^}}]*}} (\S+)'
)
MINUTE = 60.0


@contextmanager
def controller(plane: ControlPlane, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A controller at work, in a process of its own."""
    with log.open("ab") as sink:
        process = subprocess.Popen(
            ["datacache", "controller", "--namespace", NAMESPACE, "--image", "local.test/datacache:1",
             "--kubeconfig", str(plane.kubeconfig), "--log-format", "text", "--log-level", "warning"],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def resident(process: subprocess.Popen[bytes], key: str = "VmHWM") -> int:
    """MB of its memory: the most that it ever had, or (VmRSS) has now."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", text)[1]) // 1024


def writes(plane: ControlPlane) -> int:
    """What was written to the API so far, by anybody, of the kinds that a Dataset is made of."""
    found = [int(float(number)) for _, _, number in _WRITE.findall(plane.ask("/metrics")[1])]
    assert found, "the API server counts its requests"
    return sum(found)


def make(api: Api, *, datasets: int, nodes: int) -> None:
    room = {"cpu": "64", "memory": "512Gi", "pods": "250", "ephemeral-storage": "100Gi"}
    for i in range(nodes):
        name = f"node-{i}"
        labels = {"kubernetes.io/hostname": name, "bench": name}
        api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
        api.merge(
            Name("v1", "Node", "", name), {"status": {"capacity": room, "allocatable": room}}, part="status"
        )
    for i in range(datasets):
        mount = {"mountPoint": f"s3://bucket-{i}", "options": {"anonymous": "true"}}
        api.create(
            {"apiVersion": OURS, "kind": "Dataset", "metadata": {"namespace": "default", "name": f"data-{i}"},
             "spec": {"mounts": [mount], "nodeSelector": {"bench": f"node-{i % nodes}"}}}
        )  # fmt: skip


def all_done(api: Api) -> bool:
    """Whether each Dataset is bound, and its status is of its spec as it is now."""
    return all(
        each.get("status", {}).get("observedGeneration") == each["metadata"]["generation"]
        and any(c["type"] == "VolumeBound" and c["status"] == "True" for c in each["status"]["conditions"])
        for each in api.list(OURS, "Dataset")
    )


def timed(true: object, what: str) -> float:
    began = time.monotonic()
    wait_until(true, what, patience=600)  # type: ignore[arg-type]
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="datacache-bench-") as scratch:
        return run(Path(scratch), datasets=args.datasets, nodes=args.nodes)


def run(scratch: Path, *, datasets: int, nodes: int) -> int:
    with control_plane(scratch / "plane") as plane:
        plane.kubectl("apply", "--server-side", "-f", str(ROOT / "charts/datacache/files/crds"))
        wait_until(lambda: plane.ask(f"/apis/{OURS}/datasets")[0] == 200, "the CRDs to be served")
        plane.kubectl("create", "namespace", NAMESPACE)
        plane.kubectl("create", "-n", NAMESPACE, "serviceaccount", "datacache-worker")
        api = Api(configuration(str(plane.kubeconfig)))
        make(api, datasets=datasets, nodes=nodes)
        with controller(plane, scratch / "log"):
            made = timed(lambda: all_done(api), "all Datasets to be bound")
        for i in range(datasets):
            patch = {"spec": {"consistency": {"ttl": "5s"}}}
            api.merge(Name(OURS, "Dataset", "default", f"data-{i}"), patch)
        with controller(plane, scratch / "log") as process:
            again = timed(lambda: all_done(api), "all Datasets to be looked at after the restart")
            least, before, quiet = 0, writes(plane), time.monotonic()
            while time.monotonic() - quiet < 2 * MINUTE:  # until a minute has nothing, or it will not be
                time.sleep(MINUTE)
                before, least = writes(plane), writes(plane) - before
                if least == 0:
                    break
            peak = resident(process)
        api.close()
        said = (scratch / "log").read_text()
    bars = {
        f"{datasets} Datasets made and bound on {nodes} nodes, from nothing": (f"{made:.0f} s", True),
        "all of them looked at, and changed, after a restart": (f"{again:.0f} s (bar 60)", again <= MINUTE),
        "memory of the controller at its most": (f"{peak} MB (bar 300)", peak <= 300),
        "writes in a minute in which nothing happens": (f"{least} (bar 0)", least == 0),
        "lines that it had to warn of": (f"{len(said.splitlines())}", True),
    }
    for what, (figure, held) in bars.items():
        print(f"{what:<62} {figure:>16}  {'' if held else 'MISSED'}")
    print("".join(f"  {line}\n" for line in said.splitlines()[:5]), end="")
    print(f"on {os.cpu_count()} cores, shared by all of it")
    return 0 if all(held for _, held in bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
