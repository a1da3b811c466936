"""
What keeps a release from being uninstalled: Datasets that pods use, or that hold what is not in their bucket.

Nothing is changed. What counts is what counts before a Dataset is deleted (`phase.blockers`): a node whose
worker does not answer may hold something.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datacache.clock import Clock
from datacache.errors import ClusterError
from datacache.kube import phase
from datacache.kube.api import OURS, Api
from datacache.kube.asking import Asking, Connect
from datacache.kube.authority import Authorities
from datacache.kube.figures import read_figures
from datacache.kube.manifests import node_label
from datacache.kube.phase import Observed
from datacache.kube.reconciling import claims_of
from datacache.kube.release import Release
from datacache.kube.spec import WRITE

_ASKERS = 16

Object = dict[str, Any]


def held(api: Api, release: Release, *, connect: Connect, clock: Clock) -> list[str]:
    """A line for each Dataset that holds the release. Raises ClusterError."""
    try:
        datasets = api.list(OURS, "Dataset")
    except ClusterError as error:
        if error.status == 404:
            return []  # there is no such kind
        raise
    pods = api.list("v1", "Pod") if datasets else []
    found = []
    with ThreadPoolExecutor(_ASKERS, "ask") as pool:
        authorities = Authorities(api, release, clock=clock)
        asking = Asking(api, release, connect=connect, pool=pool, authorities=authorities)
        for obj in sorted(
            datasets, key=lambda each: (each["metadata"]["namespace"], each["metadata"]["name"])
        ):
            seen = _seen(obj, api, asking, pods)
            if reasons := phase.blockers(seen, obj.get("status") or {}):
                of = obj["metadata"]
                found.append(f"Dataset {of['namespace']}/{of['name']}: {'; '.join(reasons)}")
    return found


def _seen(obj: Object, api: Api, asking: Asking, pods: list[Object]) -> Observed:
    of, status = obj["metadata"], obj.get("status") or {}
    users = [
        f"{of['namespace']}/{pod['metadata']['name']}"
        for pod in pods
        if pod["metadata"]["namespace"] == of["namespace"] and of["name"] in claims_of(pod)
    ]
    writable = WRITE in ((obj.get("spec") or {}).get("accessModes") or ())
    figures, silent = [], set[str]()
    if writable:
        said = asking.ask(asking.reach(of["uid"]), lambda node, worker: read_figures(node, worker.status()))
        figures = list(said.values())
        labelled = api.list("v1", "Node", labels=f"{node_label(of['uid'])}=true")
        silent = {each["metadata"]["name"] for each in labelled} - said.keys()
    return Observed(
        generation=of.get("generation", 0),
        writable=writable,
        figures=tuple(figures),
        silent=tuple(sorted(silent)),
        users=tuple(users),
        accept_loss=(of.get("annotations") or {}).get(phase.ACCEPT_LOSS) == "true",
        released=phase.was_released(status),
    )
