"""
One Dataset brought to what it should be, as far as that goes now.

`Reconciler.look` reads what there is, has `manifests` and `phase` say what should be, and makes the
difference. It begins from nothing each time, so it may be killed at any line and called again; what is there
already is not written again. The order of a deletion is what keeps data:

1. the claim goes: no new pod can use it, and Kubernetes keeps it until the last one that does has ended;
2. workers stay until all that was written is in the bucket, or the owner gives it up (`phase.blockers`);
3. that nothing holds it is written into the status, since nobody can ask workers that are gone;
4. everything else goes, and the finalizer last.

Threads may look at different Datasets at once; `waiting` keeps them from one.
"""

import base64
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from datacache.clock import Clock
from datacache.errors import ClusterError, Conflicting, SettingError
from datacache.kube import marks, phase
from datacache.kube.api import OURS, Api
from datacache.kube.asking import Asking
from datacache.kube.figures import read_figures
from datacache.kube.loads import ENDED, jobs_of
from datacache.kube.manifests import UID_LABEL, copied_keys, name_of, names, node_label, objects
from datacache.kube.phase import Figures, Observed, Workers
from datacache.kube.release import GROUP, Key, Name, Release
from datacache.kube.spec import WRITE, DatasetSpec, read_dataset

_log = logging.getLogger(__name__)

FINALIZER = f"{GROUP}/dataset"
AGAIN = 30.0
"""Seconds until workers are asked again: as old the figures in a status are."""
QUIET = 300.0
"""Seconds until a Dataset without workers is looked at again, should an event have been missed."""
GOING = 2.0
"""Seconds until a deletion is looked at again."""
LATE = 60.0
"""Seconds that a pod may wait for the worker of its node before it is told why."""
IDLE = 600.0
"""Seconds after which a node that nobody uses the Dataset on loses its worker (and keeps the copies)."""

Object = dict[str, Any]


class Reconciler:
    """Looks at Datasets. `nodes_of` says on which nodes pods use a claim.

    State, of each Dataset by one thread at a time: `_applied` is what was applied last to which version of an
    object, `_idle` since when a node is not wanted, `_late` since when pods wait for
    a worker (None: they were told), `_marked` which nodes are marked for it, that are known of."""

    def __init__(
        self, api: Api, release: Release, asking: Asking, *, clock: Clock,
        nodes_of: Callable[[Key], Iterable[str]],
    ) -> None:  # fmt: skip
        self._api, self._release, self._asking = api, release, asking
        self._clock, self._nodes_of = clock, nodes_of
        self._applied: dict[Name, tuple[str, Object]] = {}
        self._idle: dict[tuple[str, str], float] = {}
        self._late: dict[Key, dict[str, float | None]] = {}
        self._marked: dict[str, set[str]] = {}

    def look(self, key: Key) -> float | None:
        """Look at the Dataset; seconds until the next look, None when there is none any more. Raises
        ClusterError: then it is to be tried again."""
        obj = self._api.get(Name(OURS, "Dataset", key.namespace, key.name))
        if obj is None:
            again = None
        elif obj["metadata"].get("deletionTimestamp"):
            again = self._take_away(key, obj)
        else:
            if FINALIZER not in (obj["metadata"].get("finalizers") or ()):
                obj = self._api.finalizers(obj, [*(obj["metadata"].get("finalizers") or ()), FINALIZER])
            again = self._provide(key, obj)
        return again

    # ---- what should be ---------------------------------------------------------------------------

    def _provide(self, key: Key, obj: Object) -> float:
        there = self._there(key, obj)
        spec, refused, missing, failed = None, "", "", ""
        try:
            spec = read_dataset(obj, self._release)
        except SettingError as error:
            refused = str(error)
        if spec is not None:
            try:
                self._make(spec, there)
            except SettingError as error:
                missing = str(error)
            except ClusterError as error:
                if not _final(error):
                    raise
                failed = str(error)
        pods = self._asking.pods(obj["metadata"]["uid"])
        figures = self._figures(obj, pods)
        labelled = self._labels(key, obj, spec, clean={each.node for each in figures if each.clean})
        seen = Observed(
            generation=obj["metadata"]["generation"],
            writable=_writable(obj),
            refused=refused,
            missing=missing,
            failed=failed,
            claim=self._claim_phase(key, obj),
            workers=self._workers(obj),
            figures=tuple(figures),
            silent=tuple(sorted(labelled - {each.node for each in figures})),
        )
        self._mark(obj, seen)
        self._tell(obj, seen)
        self._warn_users(key, pods, set(seen.silent))
        return AGAIN if pods or labelled else QUIET

    def _make(self, spec: DatasetSpec, there: dict[Name, Object]) -> None:
        claim = Name("v1", "PersistentVolumeClaim", spec.namespace, spec.name)
        if claim in there and not _ours(there[claim], spec.uid):
            raise ClusterError(
                f"a PersistentVolumeClaim {spec.name} is there already, of somebody else", status=409
            )
        found = {name: self._api.get(Name("v1", "Secret", spec.namespace, name)) for name in spec.secrets}
        keys = copied_keys(spec, {name: each.get("data") or {} for name, each in found.items() if each})
        wanted = objects(spec, self._release, keys=keys, token=self._token(spec, there))
        for obj in wanted:
            self._apply(obj, there.get(name_of(obj)))
        for name in there.keys() - {name_of(obj) for obj in wanted}:
            self._api.delete(name, uid=there[name]["metadata"]["uid"])
        self._reclaim(there)

    def _token(self, spec: DatasetSpec, there: Mapping[Name, Object]) -> str:
        name = next(each for each in self._names(Key(spec.namespace, spec.name), spec.uid)
                    if each.kind == "Secret" and each.name.endswith("-token"))  # fmt: skip
        known = (there.get(name, {}).get("data") or {}).get("token")
        return known or base64.b64encode(secrets.token_hex(32).encode()).decode()

    def _apply(self, obj: Object, there: Object | None) -> None:
        """Have `obj` be there. Nothing is sent when it is, or when just this was the last that was sent to
        just that: the API writes some values in its own way."""
        name = name_of(obj)
        if there is not None:
            if there["metadata"].get("deletionTimestamp"):
                return  # it is made anew when it has gone
            if _within(obj, there) or self._applied.get(name) == (_version(there), obj):
                return
        after = self._api.apply(obj)
        self._applied[name] = (_version(after), obj)

    def _reclaim(self, there: Mapping[Name, Object]) -> None:
        """A claim that somebody deleted is made again, and the volume still waits for the one before."""
        for name, volume in there.items():
            if name.kind == "PersistentVolume" and (volume.get("status") or {}).get("phase") == "Released":
                self._api.merge(name, {"spec": {"claimRef": {"uid": None, "resourceVersion": None}}})

    # ---- nodes ------------------------------------------------------------------------------------

    def _labels(self, key: Key, obj: Object, spec: DatasetSpec | None, *, clean: set[str]) -> set[str]:
        """Label the nodes that should have a worker, and after a while no others; those that are labelled.

        Of a Dataset that is written a node keeps its label until its worker says that it is `clean`: the
        label is what tells that something may lie there, and the worker who sends it.
        """
        uid = obj["metadata"]["uid"]
        label = node_label(uid)
        nodes = self._api.list("v1", "Node", labels=f"{label}=true")
        labelled = {each["metadata"]["name"] for each in nodes}
        self._marked.setdefault(uid, set()).update(
            each["metadata"]["name"]
            for each in nodes
            if marks.is_marked(each["metadata"].get("annotations") or {}, uid)
        )
        wanted = set(self._nodes_of(key))
        if spec is not None and spec.node_selector:
            chosen = ",".join(f"{name}={value}" for name, value in sorted(spec.node_selector.items()))
            wanted |= {each["metadata"]["name"] for each in self._api.list("v1", "Node", labels=chosen)}
        wanted |= self._loading(key)
        wanted |= set(((obj.get("status") or {}).get("dirty") or {}).get("nodes") or ())
        now = self._clock.monotonic()
        for node in wanted - labelled:
            if self._label(node, label, "true"):
                labelled.add(node)
        for node in wanted:
            self._idle.pop((uid, node), None)
        for node in labelled - wanted:
            idle = now - self._idle.setdefault((uid, node), now) >= IDLE and node not in self._marked[uid]
            if idle and spec is not None and (node in clean or not _writable(obj)):
                self._label(node, label, None)
                del self._idle[uid, node]
                labelled.discard(node)
        return labelled

    def _mark(self, obj: Object, seen: Observed) -> None:
        """Keep autoscalers from nodes that hold what is not in the bucket, and from no others. Of a node that
        has changed since it was read (another Dataset's mark, perhaps) the API refuses it: look again."""
        if not seen.writable:
            return
        uid = obj["metadata"]["uid"]
        dirty = set(phase.dirty_nodes(seen, obj.get("status") or {}))
        for node in dirty | self._marked.get(uid, set()):
            found = self._api.get(Name("v1", "Node", "", node))
            if found is not None:
                self._mark_node(found, uid, dirty=node in dirty)
        self._marked[uid] = dirty

    def _mark_node(self, node: Object, uid: str, *, dirty: bool) -> None:
        metadata = node["metadata"]
        changed = marks.change(metadata.get("annotations") or {}, uid, dirty=dirty)
        if changed:
            patch = {"metadata": {"annotations": changed, "resourceVersion": metadata["resourceVersion"]}}
            self._api.merge(Name("v1", "Node", "", metadata["name"]), patch)

    def _loading(self, key: Key) -> set[str]:
        """Nodes on which a DataLoad is at work, or is to be."""
        found = set()
        for load in self._api.list(OURS, "DataLoad", namespace=key.namespace):
            status = load.get("status") or {}
            ended = load["metadata"].get("deletionTimestamp") or status.get("phase") in ENDED
            if load["spec"]["dataset"]["name"] == key.name and not ended:
                found |= set(jobs_of(status))
        return found

    def _label(self, node: str, label: str, value: str | None) -> bool:
        """Whether there is such a node, which has (or no longer has) the label now."""
        name = Name("v1", "Node", "", node)
        if self._api.get(name) is None:
            return False
        try:
            self._api.merge(name, {"metadata": {"labels": {label: value}}})
        except ClusterError as error:
            if error.status == 404:
                return False
            raise
        return True

    # ---- what there is ----------------------------------------------------------------------------

    def _names(self, key: Key, uid: str) -> tuple[Name, ...]:
        return names(uid=uid, namespace=key.namespace, name=key.name, release=self._release)

    def _there(self, key: Key, obj: Object) -> dict[Name, Object]:
        found = {name: self._api.get(name) for name in self._names(key, obj["metadata"]["uid"])}
        return {name: each for name, each in found.items() if each is not None}

    def _claim_phase(self, key: Key, obj: Object) -> str:
        claim = self._api.get(Name("v1", "PersistentVolumeClaim", key.namespace, key.name))
        if claim is None or not _ours(claim, obj["metadata"]["uid"]):
            return ""
        return str((claim.get("status") or {}).get("phase") or "Pending")

    def _workers(self, obj: Object) -> Workers | None:
        key = Key(obj["metadata"]["namespace"], obj["metadata"]["name"])
        name = next(each for each in self._names(key, obj["metadata"]["uid"]) if each.kind == "DaemonSet")
        daemon_set = self._api.get(name)
        if daemon_set is None:
            return None
        said = daemon_set.get("status") or {}
        return Workers(
            wanted=said.get("desiredNumberScheduled", 0),
            ready=said.get("numberReady", 0),
            updated=said.get("updatedNumberScheduled", 0),
            current=said.get("observedGeneration") == daemon_set["metadata"]["generation"],
        )

    def _figures(self, obj: Object, pods: list[Object]) -> list[Figures]:
        """What the workers in `pods` say. Who does not answer says nothing."""
        workers = self._asking.reach(obj["metadata"]["uid"], pods) if pods else {}
        said = self._asking.ask(workers, lambda node, worker: read_figures(node, worker.status()))
        return list(said.values())

    # ---- telling ----------------------------------------------------------------------------------

    def _tell(self, obj: Object, seen: Observed) -> Object:
        """The status that `seen` makes, written where it is another; and the events of the difference."""
        before, now = obj.get("status") or {}, phase.rfc3339(self._clock.wall())
        after = phase.status(seen, before, now=now)
        if after != before:
            name = Name(OURS, "Dataset", obj["metadata"]["namespace"], obj["metadata"]["name"])
            gone: Object = dict.fromkeys(before.keys() - after.keys())
            self._api.merge(name, {"status": gone | after}, part="status")
            for each in phase.news(before, after):
                self._post(obj, each)
        return after

    def _post(self, obj: Object, news: phase.News) -> None:
        try:
            self._api.post(obj, *news, now=phase.rfc3339(self._clock.wall()))
        except ClusterError as error:  # nobody depends on it
            _log.warning("%s: no event was posted (%s)", obj["metadata"]["name"], error)

    def _warn_users(self, key: Key, workers: list[Object], silent: set[str]) -> None:
        """Tell the pods that have waited for a worker for too long, once each, why it does not come."""
        late: dict[str, float | None] = {}
        if silent:
            known, now = self._late.get(key, {}), self._clock.monotonic()
            for pod in self._api.list("v1", "Pod", namespace=key.namespace):
                uid, node = pod["metadata"]["uid"], pod["spec"].get("nodeName")
                if node not in silent or key.name not in claims_of(pod):
                    continue
                since = known.get(uid, now)
                if since is not None and now - since >= LATE:
                    why = (
                        f"the worker of Dataset {key.name} on node {node} is not there: {_why(workers, node)}"
                    )
                    news = phase.News("Warning", "WorkerNotReady", why)
                    self._post(pod | {"apiVersion": "v1", "kind": "Pod"}, news)
                    since = None
                late[uid] = since
        self._late[key] = late

    # ---- deletion ---------------------------------------------------------------------------------

    def _take_away(self, key: Key, obj: Object) -> float | None:
        metadata = obj["metadata"]
        if FINALIZER not in (metadata.get("finalizers") or ()):
            return None  # ours is off; others hold it
        there = self._there(key, obj)
        claim = Name("v1", "PersistentVolumeClaim", key.namespace, key.name)
        mine = claim in there and _ours(there[claim], metadata["uid"])
        if not mine:
            there.pop(claim, None)
        elif not there[claim]["metadata"].get("deletionTimestamp"):
            self._api.delete(claim, uid=there[claim]["metadata"]["uid"])
        seen = self._seen_going(key, obj, there, claimed=mine)
        after = self._tell(obj, seen)
        if phase.blockers(seen, obj.get("status") or {}) or mine:
            return GOING
        if not seen.released:
            # From here on workers may be gone, and cannot be asked: what was found is written down first.
            self._tell(obj | {"status": after}, phase.release(seen))
        for name in self._names(key, metadata["uid"])[1:]:
            if name in there:
                self._api.delete(name, uid=there[name]["metadata"]["uid"])
        label = node_label(metadata["uid"])
        for node in self._api.list("v1", "Node", labels=label):
            self._mark_node(node, metadata["uid"], dirty=False)
            self._label(node["metadata"]["name"], label, None)
        pods = self._api.list(
            "v1", "Pod", namespace=self._release.namespace, labels=f"{UID_LABEL}={metadata['uid']}"
        )
        if there or pods:
            return GOING
        fresh = self._api.get(Name(OURS, "Dataset", key.namespace, key.name))
        if fresh is not None and fresh["metadata"]["uid"] == metadata["uid"]:
            left = [each for each in fresh["metadata"].get("finalizers") or () if each != FINALIZER]
            self._api.finalizers(fresh, left)
        for name in self._names(key, metadata["uid"]):
            self._applied.pop(name, None)
        self._late.pop(key, None)
        self._marked.pop(metadata["uid"], None)
        return None

    def _seen_going(self, key: Key, obj: Object, there: Mapping[Name, Object], *, claimed: bool) -> Observed:
        label = node_label(obj["metadata"]["uid"])
        labelled = {each["metadata"]["name"] for each in self._api.list("v1", "Node", labels=f"{label}=true")}
        figures = self._figures(obj, self._asking.pods(obj["metadata"]["uid"]))
        # Without the claim none can begin; but who took its protection away did not end those that run.
        users = [
            f"{key.namespace}/{pod['metadata']['name']}"
            for pod in self._api.list("v1", "Pod", namespace=key.namespace)
            if key.name in claims_of(pod) and (claimed or pod["status"].get("phase") == "Running")
        ]
        return Observed(
            generation=obj["metadata"]["generation"],
            writable=_writable(obj),
            claim="Bound" if claimed else "",
            workers=self._workers(obj),
            figures=tuple(figures),
            silent=tuple(sorted(labelled - {each.node for each in figures})),
            deleting=True,
            users=tuple(users),
            accept_loss=(obj["metadata"].get("annotations") or {}).get(phase.ACCEPT_LOSS) == "true",
            released=phase.was_released(obj.get("status") or {}),
        )


def _why(workers: list[Object], node: str) -> str:
    """Why the worker of `node` does not answer, as its pod tells."""
    for pod in workers:
        if _node_of(pod) != node:
            continue
        status = pod.get("status") or {}
        for condition in status.get("conditions") or ():
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return str(condition.get("message") or condition.get("reason"))
        for container in status.get("containerStatuses") or ():
            waits = (container.get("state") or {}).get("waiting") or {}
            if waits:
                return " ".join(filter(None, (waits.get("reason"), waits.get("message"))))
        return "its pod runs, and does not answer" if status.get("podIP") else "its pod starts"
    return "it has no pod"


def _node_of(pod: Mapping[str, Any]) -> str:
    """The node that a pod of a DaemonSet is for, whether or not it was placed there."""
    if node := pod["spec"].get("nodeName"):
        return str(node)
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms") or ():
        for field in term.get("matchFields") or ():
            return str(field["values"][0])
    return ""


def claims_of(pod: Mapping[str, Any]) -> set[str]:
    """The claims that `pod` uses, unless it has ended."""
    if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return set()
    volumes = (pod.get("spec") or {}).get("volumes") or ()
    return {each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each}


def _ours(obj: Mapping[str, Any], uid: str) -> bool:
    return (obj["metadata"].get("labels") or {}).get(UID_LABEL) == uid


def _writable(obj: Mapping[str, Any]) -> bool:
    """By the object itself: what it holds is to be kept, whether or not the rest of its spec can be done."""
    modes = (obj.get("spec") or {}).get("accessModes")
    return isinstance(modes, list) and WRITE in modes


def _final(error: ClusterError) -> bool:
    """Whether trying again would be told the same."""
    return error.status in (400, 403, 409, 413, 422) and not isinstance(error, Conflicting)


def _version(obj: Mapping[str, Any]) -> str:
    return str(obj["metadata"].get("resourceVersion"))


def _within(wanted: Any, there: Any) -> bool:
    """Whether all that `wanted` says stands in `there`, which may say more (what the API fills in), and
    leaves out texts that are empty."""
    if isinstance(wanted, Mapping):
        return isinstance(there, Mapping) and all(
            _within(value, there.get(key, "" if value == "" else None)) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(there, list) and len(wanted) == len(there) and all(map(_within, wanted, there))
    return bool(wanted == there) and type(wanted) is type(there)
