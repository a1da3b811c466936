"""
One DataLoad brought on: nodes are chosen once, workers are given jobs, and the status says how far it is.

As with Datasets, a look begins from nothing but the objects: which nodes, and which jobs, stand in the
status. A job that was started and not written down is started again, and fetches nothing twice. How to load
is the workers' business; this only asks and tells. Deleting a DataLoad cancels its jobs; what they have
fetched stays.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from datacache.clock import Clock
from datacache.errors import ClusterError, ControlError, DatacacheError, SettingError
from datacache.kube import dataload
from datacache.kube.api import OURS, Api
from datacache.kube.asking import Asking, Worker
from datacache.kube.beside import read_key
from datacache.kube.dataload import Job, Loading, LoadSpec, Node
from datacache.kube.manifests import node_label
from datacache.kube.phase import rfc3339, seconds_since
from datacache.kube.release import GROUP, Key, Name, Release
from datacache.kube.spec import read_dataset

_log = logging.getLogger(__name__)

FINALIZER = f"{GROUP}/dataload"
AGAIN = 5.0
"""Seconds between two looks at one that is at work."""
WAITS = 15.0
"""Seconds between two looks at one that waits for something."""

_NUMBERS = ("files", "files_done", "files_failed", "bytes", "bytes_done", "bytes_fetched")

Object = dict[str, Any]


class Loader:
    """Looks at DataLoads. Threads may look at different ones at once. `dataset_changed` is told of Datasets
    whose nodes another load needs now, or no longer."""

    def __init__(
        self,
        api: Api,
        release: Release,
        asking: Asking,
        *,
        clock: Clock,
        dataset_changed: Callable[[Key], None],
    ) -> None:
        self._api, self._release, self._asking = api, release, asking
        self._clock, self._dataset_changed = clock, dataset_changed

    def look(self, key: Key) -> float | None:
        """Look at the DataLoad; seconds until the next look, None for none. Raises ClusterError."""
        obj = self._api.get(_name(key))
        if obj is None:
            return None
        finalizers = obj["metadata"].get("finalizers") or []
        before = obj.get("status") or {}
        if obj["metadata"].get("deletionTimestamp"):
            if FINALIZER in finalizers:
                self._cancel(key, obj, before)
                self._api.finalizers(obj, [each for each in finalizers if each != FINALIZER])
            return None
        if before.get("phase") in dataload.ENDED:
            return self._expire(obj, before)
        if FINALIZER not in finalizers:
            obj = self._api.finalizers(obj, [*finalizers, FINALIZER])
        reason, message, loading = self._bring_on(key, obj, before)
        after = dataload.status(
            before, generation=obj["metadata"]["generation"], loading=loading, reason=reason, message=message,
            now=rfc3339(self._clock.wall()), order=bool(obj["spec"].get("order")),
        )  # fmt: skip
        if after != before:
            gone: Object = dict.fromkeys(before.keys() - after.keys())
            self._api.merge(_name(key), {"status": gone | after}, part="status")
        if (after.get("nodes") and not before.get("nodes")) or after["phase"] in dataload.ENDED:
            self._dataset_changed(Key(key.namespace, str(obj["spec"]["dataset"]["name"])))
        if after["phase"] in dataload.ENDED:
            self._post(obj, after)
            return self._expire(obj, after)
        return WAITS if reason else AGAIN

    def _bring_on(self, key: Key, obj: Object, before: Mapping[str, Any]) -> tuple[str, str, list[Loading]]:
        """What it waits for, as reason and message, and its nodes as they are now."""
        known = dataload.jobs_of(before)
        try:
            spec = dataload.read_load(obj)
        except SettingError as error:
            return "Invalid", str(error), []
        dataset = self._api.get(Name(OURS, "Dataset", key.namespace, spec.dataset))
        count = spec.jobs
        as_before = {node: dataload.remembered(before, node, targets=count) for node in sorted(known)}
        waiting = list(as_before.values())
        if dataset is None:
            return "NoDataset", f"there is no Dataset {spec.dataset} in this namespace", waiting
        if dataset["metadata"].get("deletionTimestamp"):
            return "DatasetGoes", f"the Dataset {spec.dataset} is being deleted", waiting
        if not known:
            try:
                chosen = dataload.choose(spec, self._nodes(dataset), self._affinity(dataset))
            except SettingError as error:
                return "NoNodes", str(error), []
            # Written down before any job is started: it is decided once.
            return "", "", [Loading(node, targets=count, answers=False) for node in chosen]
        try:
            files = self._order(key, spec)
        except SettingError as error:
            return "NoOrder", str(error), waiting
        workers = self._asking.reach(dataset["metadata"]["uid"])
        asked = {node: worker for node, worker in workers.items()
                 if node in known and not as_before[node].ended}  # fmt: skip
        now = self._asking.ask(asked, lambda node, worker: bring_on(worker, spec, known[node], files))
        return "", "", [
            Loading(node, now[node], targets=count) if node in now else as_before[node]
            for node in sorted(known)
        ]  # fmt: skip

    def _order(self, key: Key, spec: LoadSpec) -> tuple[str, ...]:
        if (order := spec.order) is None:
            return ()
        config_map = self._api.get(Name("v1", "ConfigMap", key.namespace, order.config_map))
        data = read_key(
            config_map, name=order.config_map, key=order.key, field=order.field, namespace=key.namespace
        )
        return dataload.read_order(data, order)

    def _nodes(self, dataset: Object) -> list[Node]:
        label = node_label(dataset["metadata"]["uid"])
        holding = {
            each["name"]: each.get("cached", 0) for each in (dataset.get("status") or {}).get("nodes") or ()
        }
        found = []
        for node in self._api.list("v1", "Node"):
            metadata, labels = node["metadata"], node["metadata"].get("labels") or {}
            conditions = (node.get("status") or {}).get("conditions") or ()
            ready = all(each["status"] == "True" for each in conditions if each["type"] == "Ready")
            found.append(
                Node(
                    metadata["name"], labels, working=labels.get(label) == "true",
                    cached=holding.get(metadata["name"], 0),
                    usable=ready and not (node.get("spec") or {}).get("unschedulable"),
                )
            )  # fmt: skip
        return found

    def _affinity(self, dataset: Object) -> Mapping[str, Any] | None:
        try:
            return read_dataset(dataset, self._release).node_affinity
        except SettingError:
            return None  # its own status says what is wrong

    def _cancel(self, key: Key, obj: Object, before: Mapping[str, Any]) -> None:
        """Have its jobs stop, where a worker answers: a job ends with its worker, too."""
        known = dataload.jobs_of(before)
        if not known or before.get("phase") in dataload.ENDED:
            return
        name = Name(
            OURS, "Dataset", key.namespace, str(((obj.get("spec") or {}).get("dataset") or {}).get("name"))
        )
        dataset = self._api.get(name)
        if dataset is None:
            return
        workers = self._asking.reach(dataset["metadata"]["uid"])
        asked = {node: worker for node, worker in workers.items() if known.get(node)}
        self._asking.ask(asked, lambda node, worker: _stop(worker, known[node]))
        self._dataset_changed(Key(key.namespace, name.name))

    def _expire(self, obj: Object, status: Mapping[str, Any]) -> float | None:
        """Delete it when its time has come; seconds until then, None for never."""
        try:
            ttl = dataload.read_load(obj).ttl
        except SettingError:
            return None
        if ttl is None:
            return None
        left = ttl - seconds_since(str(status.get("finished")), self._clock.wall())
        if left > 0:
            return left
        self._api.delete(_name(Key(obj["metadata"]["namespace"], obj["metadata"]["name"])),
                         uid=obj["metadata"]["uid"])  # fmt: skip
        return None

    def _post(self, obj: Object, after: Mapping[str, Any]) -> None:
        (condition,) = after["conditions"]
        kind = "Normal" if after["phase"] == dataload.COMPLETE else "Warning"
        try:
            self._api.post(
                obj, kind, condition["reason"], condition["message"], now=rfc3339(self._clock.wall())
            )
        except ClusterError as error:
            _log.warning("%s: no event was posted (%s)", obj["metadata"]["name"], error)


def _name(key: Key) -> Name:
    return Name(OURS, "DataLoad", key.namespace, key.name)


def _stop(worker: Worker, jobs: tuple[str, ...]) -> None:
    for job in jobs:
        worker.load_cancel(job)


def bring_on(
    worker: Worker, spec: LoadSpec, known: tuple[str, ...], files: tuple[str, ...] = ()
) -> tuple[Job, ...]:
    """The jobs of one node, the next one started when it is its turn. `files`: the order, where that is what
    is asked for. Raises DatacacheError when the worker does not answer."""
    worker.status()  # it answers: what it says of a job from here on is about the job
    jobs: list[Job] = []
    for i in range(spec.jobs):
        job = _asked(worker, known[i]) if i < len(known) else None
        if job is None:
            job = _asked(worker, worker.announce(files) if spec.order else _started(worker, spec, i))
        if job is None:
            break
        jobs.append(job)
        if job.state == "running":
            break
    return tuple(jobs)


def _started(worker: Worker, spec: LoadSpec, i: int) -> str:
    target = spec.targets[i]
    return worker.load(target.path, globs=target.globs, bandwidth=spec.bandwidth, verify=spec.verify)


def _asked(worker: Worker, id: str) -> Job | None:
    """The job, None when the worker does not know it: it was started again."""
    try:
        said = worker.load_status(id)
    except ControlError:
        return None
    try:
        numbers = {name: int(said[name]) for name in _NUMBERS}
        failures = said["failures"][: dataload.SHOWN_FAILURES]
        return Job(
            id,
            str(said["state"]),
            listed=bool(said["listed"]),
            seconds=float(said["seconds"]),
            failures=tuple((str(path), str(why)) for path, why in failures),
            waiting=str(said.get("waiting") or "")[:500],
            **numbers,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DatacacheError(f"a worker does not tell of job {id} as one would ({error!r})") from error
