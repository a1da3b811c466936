"""
What a DataLoad object says, which nodes do it, and what its status should say. Pure.

A node does the targets one after the other, each as one load job of its worker. The ids of its jobs stand in
the status, so that whoever goes on after a restart finds them; a job that a worker does not know any more (it
was started again) is asked for again, and finds what is there already.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datacache.config.keys import PATH
from datacache.errors import SettingError
from datacache.kube.fields import Field
from datacache.kube.spec import DNS, NOT_YET, read_labels, read_reference
from datacache.model import TiB, format_size

MAX_ORDER = 1_000_000
"""Bytes of an order as it is sent: a worker takes a request of 1 MiB."""
SHOWN_FAILURES = 20
"""Files that could not be loaded which the status names."""
PENDING, EXECUTING, COMPLETE, FAILED = "Pending", "Executing", "Complete", "Failed"
ENDED = (COMPLETE, FAILED)
ENDS = ("done", "failed", "cancelled")
"""States in which a node has nothing more to do."""


@dataclass(frozen=True)
class Target:
    """Files of a Dataset."""

    path: str
    globs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """Where it stands in which order files will be read."""

    config_map: str
    key: str
    field: str = "spec.order.configMapKeyRef"


@dataclass(frozen=True)
class LoadSpec:
    """A DataLoad that can be done."""

    dataset: str
    targets: tuple[Target, ...]
    nodes: tuple[str, ...] = ()
    node_selector: Mapping[str, str] | None = None
    replicas: int = 0
    """0: every node that has a worker, or one."""
    bandwidth: int = 0
    """Bytes a second and node; 0: no limit."""
    verify: bool = False
    ttl: int | None = None
    """Seconds after its end at which it goes; None: never."""
    order: Order | None = None
    """With it nothing is loaded: workers are told in which order files will be read."""

    @property
    def jobs(self) -> int:
        """Those of one node: one after the other."""
        return 1 if self.order else len(self.targets)


def read_load(obj: Mapping[str, Any]) -> LoadSpec:
    """What `obj` says. Raises SettingError for what is wrong or not built yet, and nothing else."""
    spec = Field("", obj)["spec"].only(
        "dataset", "target", "nodes", "nodeSelector", "replicas", "bandwidth", "verify", "policy",
        "ttlSecondsAfterFinished", "order",
    )  # fmt: skip
    policy = spec["policy"]
    if policy.one_of(("Once", "Cron", "OnEvent"), default="Once") != "Once":
        raise policy.refuse(f"Once: loads that repeat {NOT_YET}")
    ways = [spec[way] for way in ("nodes", "nodeSelector", "replicas") if spec[way].given]
    if len(ways) > 1:
        raise ways[1].refuse("nodes, nodeSelector or replicas: one way to say which nodes load")
    ttl = spec["ttlSecondsAfterFinished"]
    return LoadSpec(
        dataset=spec["dataset"].only("name")["name"].matching(DNS, "the name of a Dataset of this namespace"),
        targets=tuple(map(_target, spec["target"].items())) or (Target("/"),),
        nodes=tuple(item.matching(DNS, "the name of a node") for item in spec["nodes"].items()),
        node_selector=read_labels(spec["nodeSelector"]) if spec["nodeSelector"].given else None,
        replicas=spec["replicas"].whole(1, 1024) if spec["replicas"].given else 0,
        bandwidth=spec["bandwidth"].size(1, TiB) if spec["bandwidth"].given else 0,
        verify=spec["verify"].flag(default=False),
        ttl=ttl.whole(0, 2**31 - 1) if ttl.given else None,
        order=_order(spec) if spec["order"].given else None,
    )


def _order(spec: Field) -> Order:
    for field, plain in (
        ("target", ([{"path": "/"}], None)),
        ("bandwidth", (None,)),
        ("verify", (False, None)),
    ):
        if spec[field].value not in plain:
            raise spec[field].refuse("none, with order, which loads nothing by itself")
    reference = spec["order"].only("configMapKeyRef")["configMapKeyRef"]
    return Order(*read_reference(reference))


def read_order(data: bytes, order: Order) -> tuple[str, ...]:
    """The paths in `data`, one a line or, where it has any, ended by NUL. Any byte is allowed in a path.
    Raises SettingError."""
    what = f"{order.field}.key"
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    found = tuple("/" + name.decode("utf-8", "surrogateescape").strip("/") for name in names if name)
    if not found:
        raise SettingError(what, order.key, "one with paths, one a line")
    if (size := len(json.dumps(found))) > MAX_ORDER:
        raise SettingError(what, order.key, f"at most {MAX_ORDER} bytes of paths, of which it has {size}")
    return found


def _target(item: Field) -> Target:
    item.only("path", "globs")
    path = item["path"].read(PATH)
    if ".." in str(item["path"].value).split("/"):
        raise item["path"].refuse("a path without ..")
    globs = []
    for glob in item["globs"].items():
        text = glob.text("a glob such as **/*.jpg")
        if text.startswith("/") or not text.isprintable():
            raise glob.refuse("a glob that is relative to path, such as **/*.jpg")
        globs.append(text)
    return Target(path, tuple(globs))


# ---- nodes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A node, as far as a choice depends on it."""

    name: str
    labels: Mapping[str, str]
    working: bool = False
    """Whether it has a worker of the Dataset, or is to have one."""
    cached: int = 0
    """Bytes of the Dataset there."""
    usable: bool = True
    """Whether new pods may come to it."""


def choose(spec: LoadSpec, nodes: Sequence[Node], affinity: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Which nodes load. Raises SettingError when there are none that could, or fewer than asked for.

    It is decided once: a node that comes later is another DataLoad's. `affinity` is the Dataset's: on others
    no worker would run.
    """
    able = {node.name: node for node in nodes if affinity is None or fits(node, affinity)}
    if spec.nodes:
        for i, name in enumerate(spec.nodes):
            if name not in able:
                raise SettingError(
                    f"spec.nodes[{i}]", name, "a node that there is, and that the Dataset may use"
                )
        return tuple(sorted(spec.nodes))
    if spec.node_selector is not None:
        chosen = sorted(
            node.name for node in able.values() if spec.node_selector.items() <= node.labels.items()
        )
        if not chosen:
            raise SettingError(
                "spec.nodeSelector", "", "labels of at least one node that the Dataset may use"
            )
        return tuple(chosen)
    # Those that have most, those that have a worker, those that take pods.
    ordered = sorted(
        (node for node in able.values() if node.usable or node.working),
        key=lambda node: (-node.cached, not node.working, node.name),
    )
    count = spec.replicas or sum(node.working for node in ordered) or 1
    if spec.replicas == 0:
        ordered.sort(key=lambda node: not node.working)
    if len(ordered) < count:
        raise SettingError("spec.replicas", count, f"at most the nodes that can load it, {len(ordered)}")
    return tuple(sorted(node.name for node in ordered[:count]))


def fits(node: Node, affinity: Mapping[str, Any]) -> bool:
    """Whether the node fits one of the terms of a node affinity, by the rules of the scheduler."""
    return any(
        bool(term)
        and all(_holds(each, node.labels) for each in term.get("matchExpressions", ()))
        and all(_holds(each, {"metadata.name": node.name}) for each in term.get("matchFields", ()))
        for term in affinity["nodeSelectorTerms"]
    )


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values", [])
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case operator:
            if value is None or not re.fullmatch(r"-?[0-9]{1,18}", value, re.ASCII):
                return False
            return int(value) > int(values[0]) if operator == "Gt" else int(value) < int(values[0])


# ---- the status ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A load job, as its worker tells it."""

    id: str
    state: str
    """`running`, `done`, `failed` or `cancelled`."""
    files: int = 0
    files_done: int = 0
    files_failed: int = 0
    bytes: int = 0
    bytes_done: int = 0
    bytes_fetched: int = 0
    listed: bool = False
    seconds: float = 0.0
    failures: tuple[tuple[str, str], ...] = ()
    waiting: str = ""


@dataclass(frozen=True)
class Loading:
    """One node at it. `jobs` are those of its targets so far, in their order."""

    node: str
    jobs: tuple[Job, ...] = ()
    targets: int = 1
    """How many it has to do."""
    answers: bool = True

    @property
    def state(self) -> str:
        """`waiting` for its worker, `running`, `done`, `failed` or `cancelled`."""
        states = {job.state for job in self.jobs}
        if len(self.jobs) < self.targets or "running" in states:
            return "running" if self.answers else "waiting"
        return next((state for state in ("cancelled", "failed") if state in states), "done")

    @property
    def ended(self) -> bool:
        return self.state in ENDS


def remembered(before: Mapping[str, Any], node: str, *, targets: int) -> Loading:
    """The node as the status has it: it has ended, or its worker does not answer now."""
    entry = next((each for each in before.get("nodes") or () if each["name"] == node), {"name": node})
    ids, state = jobs_of(before).get(node, ()), str(entry.get("state") or "waiting")
    over = state in ENDS
    failures = tuple(
        (str(each.get("path")), str(each.get("reason")))
        for each in before.get("failures") or () if each.get("node") == node
    )  # fmt: skip
    jobs = [Job(id, state if over else "running", listed=over) for id in ids]
    if jobs:  # what all of them came to
        done, files = int(entry.get("bytes") or 0), int(entry.get("files") or 0)
        failed = int(entry.get("filesFailed") or 0)
        jobs[0] = replace(
            jobs[0], bytes=done, bytes_done=done, files=files + failed, files_done=files, files_failed=failed,
            failures=failures,
        )  # fmt: skip
    return Loading(node, tuple(jobs), targets=len(jobs) if over else targets, answers=False)


def jobs_of(before: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The ids of the jobs of each node, from a status."""
    return {
        each["name"]: tuple(filter(None, each.get("job", "").split(",")))
        for each in before.get("nodes") or ()
    }


def status(
    before: Mapping[str, Any],
    *,
    generation: int,
    loading: Sequence[Loading],
    reason: str,
    message: str,
    now: str,
    order: bool = False,
) -> dict[str, Any]:
    """The status that should stand there. `reason` and `message`: what it waits for, if anything. `order`: it
    announces one, and loads nothing."""
    phase = _phase(loading, waits=bool(reason), before=before)
    found: dict[str, Any] = {"phase": phase, "observedGeneration": generation}
    if before.get("started") or phase != PENDING:
        found["started"] = before.get("started") or now
    if phase in ENDED:
        found["finished"] = before.get("finished") or now
    if loading:
        found |= _progress(loading, order=order)
    said = (reason, message) if reason and phase == PENDING else _said(phase, loading, order=order)
    found["conditions"] = [_condition(phase == COMPLETE, *said, generation, before, now)]
    return found


def _phase(loading: Sequence[Loading], *, waits: bool, before: Mapping[str, Any]) -> str:
    if before.get("phase") in ENDED:
        return str(before["phase"])
    if loading and all(each.ended for each in loading):
        return COMPLETE if all(each.state == "done" for each in loading) else FAILED
    started = bool(before.get("started")) or any(each.jobs for each in loading)
    return EXECUTING if started and not waits else PENDING


def _said(phase: str, loading: Sequence[Loading], *, order: bool) -> tuple[str, str]:
    nodes = f"{len(loading)} {'node' if len(loading) == 1 else 'nodes'}"
    if phase == COMPLETE:
        if order:
            count = max(job.files for each in loading for job in each.jobs)
            return "Announced", f"it is known on {nodes} in which order {count} files will be read"
        return "Loaded", f"all of it is there, on {nodes}"
    if phase == FAILED:
        failed = sum(job.files_failed for each in loading for job in each.jobs)
        cancelled = [each.node for each in loading if each.state == "cancelled"]
        if cancelled and not failed:
            return "Cancelled", f"its job was cancelled on node {cancelled[0]}"
        what = "named in the order cannot be read" if order else "could not be loaded"
        return "FilesFailed", f"{failed} {'file' if failed == 1 else 'files'} {what}"
    for each in loading:
        for job in each.jobs:
            if job.waiting:
                return "StoreAway", f"node {each.node} waits: {job.waiting}"
    silent = sorted(each.node for each in loading if each.state == "waiting")
    if silent:
        return "WaitingForWorkers", f"no worker answers on {', '.join(silent[:5])}"
    return "Loading", f"{sum(each.ended for each in loading)} of {len(loading)} nodes are done"


def _condition(
    complete: bool, reason: str, message: str, generation: int, before: Mapping[str, Any], now: str
) -> dict[str, Any]:
    is_so = "True" if complete else "False"
    since = now
    for old in before.get("conditions") or ():
        if old.get("type") == "Complete" and old.get("status") == is_so:
            since = old.get("lastTransitionTime") or now
    return {
        "type": "Complete", "status": is_so, "reason": reason, "message": message[:1024],
        "observedGeneration": generation, "lastTransitionTime": since,
    }  # fmt: skip


def _progress(loading: Sequence[Loading], *, order: bool) -> dict[str, Any]:
    jobs = [job for each in loading for job in each.jobs]
    running = [job for job in jobs if job.state == "running"]
    done, total = sum(job.bytes_done for job in jobs), sum(job.bytes for job in jobs)
    # Known when each node has begun with its last target, and that is listed.
    listed = all(len(each.jobs) == each.targets and all(job.listed for job in each.jobs) for each in loading)
    rate = int(sum(job.bytes_fetched / job.seconds for job in running if job.seconds > 0))
    progress: dict[str, Any] = {
        "bytes": done, "bytesTotal": total, "bytesFetched": sum(job.bytes_fetched for job in jobs),
        "files": sum(job.files_done for job in jobs), "filesTotal": sum(job.files for job in jobs),
        "filesFailed": sum(job.files_failed for job in jobs), "listed": listed,
        "nodes": len(loading), "nodesDone": sum(each.ended for each in loading),
    }  # fmt: skip
    shown = {"loaded": f"{format_size(done)} of {format_size(total)}{'' if listed else ' or more'}"}
    if order:
        shown = {"loaded": "order only"}
    if running and rate:
        progress["throughput"] = rate
        shown["throughput"] = f"{format_size(rate)}/s"
        if listed:
            progress["etaSeconds"] = max(0, total - done) // rate
            shown["eta"] = _spelled(progress["etaSeconds"])
    failures = [
        {"path": path, "node": each.node, "reason": reason[:500]}
        for each in loading for job in each.jobs for path, reason in job.failures
    ]  # fmt: skip
    return {
        "progress": progress,
        "shown": shown,
        **({"failures": failures[:SHOWN_FAILURES]} if failures else {}),
        "nodes": [
            {
                "name": each.node, "job": ",".join(job.id for job in each.jobs), "state": each.state,
                "bytes": sum(job.bytes_done for job in each.jobs),
                "files": sum(job.files_done for job in each.jobs),
                "filesFailed": sum(job.files_failed for job in each.jobs),
            }
            for each in loading
        ],
    }  # fmt: skip


def _spelled(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds}s"
    return f"{seconds // 60}m" if seconds < 7200 else f"{seconds // 3600}h{seconds % 3600 // 60}m"
