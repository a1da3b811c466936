"""
The pods of the CSI driver, exchanged one after the other when their DaemonSet has changed.

`Exchanger.look` reads what there is, has `turns` say whose turn it is, and deletes that pod. It knows nothing
that is not in the API but whose follower is waited for: until that is well, `workers` keeps others from
changing workers, who are the only holders of the mounts of that node meanwhile.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from datacache.clock import Clock
from datacache.kube import phase
from datacache.kube.api import Api
from datacache.kube.manifests import UID_LABEL, WORKER_LABELS
from datacache.kube.release import Key, Name, Release
from datacache.kube.turns import Driver, Seen, Turn, Worker, settled, turn

_log = logging.getLogger(__name__)

QUIET = 60.0
"""Seconds between two looks when all are of now."""
AGAIN = 3.0
"""Seconds between two looks while some are to be exchanged."""
LONGEST = 300.0
"""Seconds that workers cannot be changed for, at most, because a driver does not come back."""
_REVISION = "controller-revision-hash"

Object = dict[str, Any]


class Exchanger:
    """Of the DaemonSet `release.plugin`. Threads may ask `workers`; one at a time calls `look`.

    State, guarded by the lock: the node whose driver was deleted, and when, until its follower is well. The
    lock is held while a decision is made and carried out, so that no worker is changed in the middle."""

    def __init__(self, api: Api, release: Release, *, clock: Clock) -> None:
        self._api, self._release, self._clock = api, release, clock
        self._lock = threading.Lock()
        self._node, self._since = "", 0.0
        self._said = ""

    def __repr__(self) -> str:
        return f"<Exchanger {self._release.plugin}: {self._node or 'nobody'}>"

    @contextmanager
    def workers(self) -> Iterator[bool]:
        """Whether workers may be changed now; no driver goes as long as the block lasts."""
        with self._lock:
            yield not self._node or self._clock.monotonic() - self._since >= LONGEST

    def look(self, key: Key) -> float:
        """Exchange the next one, if it is somebody's turn; seconds until the next look. Raises
        ClusterError."""
        daemon_set = self._api.get(Name("apps/v1", "DaemonSet", key.namespace, key.name))
        with self._lock:
            if daemon_set is None:
                self._node = ""
                return QUIET
            seen = self._seen(daemon_set)
            if self._node and settled(seen, self._node):
                self._node = ""
            if self._node and self._clock.monotonic() - self._since < LONGEST:
                return AGAIN
            found = turn(seen)
            self._tell(found)
            if found.driver is not None:
                self._node, self._since = found.driver.node, self._clock.monotonic()
                name = Name("v1", "Pod", key.namespace, found.driver.name)
                self._api.delete(name, uid=found.driver.uid)
            return AGAIN if found.why else QUIET

    def _tell(self, found: Turn) -> None:
        if found.driver is not None:
            _log.info("%s on node %s goes: %s", found.driver.name, found.driver.node, found.why)
        elif found.why and found.why != self._said:
            _log.info("the driver is not exchanged yet: %s", found.why)
        self._said = found.why

    # ---- what there is ----------------------------------------------------------------------------

    def _seen(self, daemon_set: Object) -> Seen:
        said, metadata = daemon_set.get("status") or {}, daemon_set["metadata"]
        if said.get("observedGeneration") != metadata["generation"]:
            return Seen("", 0, ())
        now = self._clock.wall()
        labels = ",".join(f"{k}={v}" for k, v in daemon_set["spec"]["selector"]["matchLabels"].items())
        at = metadata["namespace"]
        revisions = [
            each
            for each in self._api.list("apps/v1", "ControllerRevision", namespace=at, labels=labels)
            if _owner(each) == metadata["uid"]
        ]
        newest = max(revisions, key=lambda each: int(each["revision"]), default=None)
        drivers = tuple(
            Driver(
                each["metadata"]["name"],
                each["metadata"]["uid"],
                each["spec"].get("nodeName") or "",
                (each["metadata"].get("labels") or {}).get(_REVISION, ""),
                ready_for(each, now),
                ending="deletionTimestamp" in each["metadata"],
            )
            for each in self._api.list("v1", "Pod", namespace=at, labels=labels)
            if _owner(each) == metadata["uid"]
        )
        seen = Seen(
            newest["metadata"]["labels"][_REVISION] if newest else "",
            int(said.get("desiredNumberScheduled") or 0),
            drivers,
        )
        if all(each.revision == seen.revision for each in drivers):
            return seen  # nobody will go: the rest need not be asked for
        return Seen(seen.revision, seen.wanted, drivers, self._workers(at, now), self._lost())

    def _workers(self, namespace: str, now: float) -> tuple[Worker, ...]:
        rolling = {
            each["metadata"]["uid"]
            for each in self._api.list("apps/v1", "DaemonSet", namespace=namespace, labels=UID_LABEL)
            if _is_rolling(each)
        }
        labels = ",".join(f"{k}={v}" for k, v in WORKER_LABELS.items())
        return tuple(
            Worker(
                each["metadata"]["name"],
                each["spec"].get("nodeName") or "",
                ready_for(each, now),
                ending="deletionTimestamp" in each["metadata"],
                rolling=_owner(each) in rolling,
            )
            for each in self._api.list("v1", "Pod", namespace=namespace, labels=labels)
        )

    def _lost(self) -> frozenset[str]:
        return frozenset(
            each["metadata"]["name"] for each in self._api.list("v1", "Node") if not _answers(each)
        )


def ready_for(pod: Mapping[str, Any], now: float) -> float:
    """Seconds that it has been ready; -1: it is not."""
    for each in (pod.get("status") or {}).get("conditions") or ():
        if each["type"] == "Ready" and each["status"] == "True":
            return max(0.0, phase.seconds_since(str(each.get("lastTransitionTime")), now))
    return -1.0


def _is_rolling(daemon_set: Mapping[str, Any]) -> bool:
    said = daemon_set.get("status") or {}
    return bool(
        said.get("observedGeneration") != daemon_set["metadata"]["generation"]
        or said.get("updatedNumberScheduled", 0) < said.get("desiredNumberScheduled", 0)
    )


def _answers(node: Mapping[str, Any]) -> bool:
    for each in (node.get("status") or {}).get("conditions") or ():
        if each["type"] == "Ready":
            return bool(each["status"] == "True")
    return True  # nobody has said otherwise


def _owner(obj: Mapping[str, Any]) -> str:
    for each in obj["metadata"].get("ownerReferences") or ():
        if each.get("controller"):
            return str(each["uid"])
    return ""
