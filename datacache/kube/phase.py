"""
What the status of a Dataset should say, from what was seen of it.

Pure: `status` takes what `controller` observed and the status that stands there, and returns the one that
should. The same observation twice is the same status, byte for byte, so nothing is written while nothing
changes; a condition's time is that of its last change. Everything is said in both directions: a worker that
comes back makes the Dataset whole again.

`blockers` says why a Dataset that is being deleted cannot go yet: in words, for its status and for events.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from datacache.model import format_size

SHOWN_NODES = 20
"""Nodes that the status shows: those that hold most. All of them stand in the CacheNode objects."""
SHOWN = 5
"""Pods, nodes or reasons that one message names."""
MAX_MESSAGE = 1024
"""Characters of a condition's message; the API takes 32,768, and people fewer."""
ACCEPT_LOSS = "datacache.io/accept-loss"
"""Annotation on a Dataset that is being deleted: `true` lets it go with what was not uploaded."""

TRUE, FALSE, UNKNOWN = "True", "False", "Unknown"


def rfc3339(seconds: float) -> str:
    """A time since the epoch, as the API writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_since(written: str, now: float) -> float:
    """Seconds from a time as the API writes it to `now`; infinity where it is none."""
    try:
        return now - datetime.fromisoformat(written).timestamp()
    except ValueError:
        return float("inf")


@dataclass(frozen=True)
class Figures:
    """What the worker on one node says of itself."""

    node: str
    cached: int
    """Bytes of copies, in all its tiers."""
    files: int
    """Objects that its index knows."""
    bytes: int
    """Their sizes."""
    opens: int = 0
    opens_whole: int = 0
    """Of `opens`: of files that were wholly cached."""
    dirty: int = 0
    """Bytes written that are not in the bucket."""
    dirty_files: int = 0
    owed: int = 0
    """Puts and deletes that the bucket is owed."""
    troubles: tuple[str, ...] = ()
    """Tiers that are broken, stores that are away, uploads that wait for a person: a line each."""

    @property
    def clean(self) -> bool:
        return not (self.dirty or self.dirty_files or self.owed)


@dataclass(frozen=True)
class Workers:
    """What the DaemonSet says."""

    wanted: int
    """Nodes that should have a worker."""
    ready: int
    updated: int
    """Workers with the settings of now."""
    current: bool
    """Whether the numbers are of the DaemonSet as it is now (its observedGeneration)."""


@dataclass(frozen=True)
class Observed:
    """All that was seen of one Dataset."""

    generation: int
    writable: bool = False
    refused: str = ""
    """Why its spec cannot be done, in a sentence; empty: it can."""
    missing: str = ""
    """What of that which it names beside itself is not there, or will not do, in a sentence."""
    lacks: str = "SecretMissing"
    """The reason of a condition that says so."""
    failed: str = ""
    """What the API said when the objects were to be made; empty: they are there."""
    claim: str = ""
    """Phase of the PersistentVolumeClaim: Pending, Bound, Lost; empty: there is none."""
    placed_otherwise: bool = False
    """The volume sends pods by the nodeAffinity that it was made with, and the spec has another by now."""
    workers: Workers | None = None
    """None: there is no DaemonSet."""
    figures: tuple[Figures, ...] = ()
    ended: tuple[str, ...] = ()
    """Workers that ended and have not come up since: a line each, with the node and what it said last."""
    silent: tuple[str, ...] = ()
    """Nodes that should have a worker, or had one with dirty data, and none there answers."""
    deleting: bool = False
    users: tuple[str, ...] = ()
    """NAMESPACE/NAME of pods that use its claim and have not ended; known while it is being deleted."""
    accept_loss: bool = False
    released: bool = False
    """It was found that nothing holds it, and its workers may be gone: see `release`."""


class News(NamedTuple):
    """An event to post on the object."""

    kind: str
    """Normal or Warning."""
    reason: str
    message: str


@dataclass(frozen=True)
class _Condition:
    type: str
    status: str
    reason: str
    message: str = ""
    bad: str = field(default=FALSE, compare=False)
    """Which status people should hear of as a warning."""


def blockers(seen: Observed, before: Mapping[str, Any]) -> tuple[str, ...]:
    """Why a Dataset that is being deleted cannot go yet; nothing when it can. `before` is its status.

    Pods come first: what they still write may be dirty a moment later. Dirty data is never given up unless
    its owner says so, and what is not known to be clean counts as dirty.
    """
    if seen.released:
        return ()
    found = []
    if seen.users:
        found.append(f"used by {_few(seen.users, 'pod', 'pods')}")
    if seen.accept_loss:
        return tuple(found)
    dirty = [figures for figures in seen.figures if not figures.clean]
    if dirty:
        size = format_size(sum(figures.dirty for figures in dirty))
        where = _few([figures.node for figures in dirty], "node", "nodes")
        found.append(f"{size} and {_owed(dirty)} are not in the bucket yet, on {where}")
    if unknown := _unknown(seen, before):
        where = _few(unknown, "node", "nodes")
        found.append(f"no worker answers on {where}, which may hold what is not in the bucket")
    return tuple(found)


def release(seen: Observed) -> Observed:
    """What is seen once it was decided that nothing holds it. It stands in the status before anything goes
    that could be asked again, so that who goes on after a restart need not ask."""
    return replace(seen, released=True)


def was_released(before: Mapping[str, Any]) -> bool:
    """Whether the status says so."""
    return any(
        isinstance(each, Mapping)
        and (each.get("type"), each.get("reason")) == ("DeletionBlocked", "Released")
        for each in before.get("conditions") or ()
    )


def _owed(dirty: Sequence[Figures]) -> str:
    count = sum(figures.owed for figures in dirty)
    return "1 operation" if count == 1 else f"{count} operations"


def dirty_nodes(seen: Observed, before: Mapping[str, Any]) -> list[str]:
    """Nodes that hold, or held when last heard of, what is not in the bucket. One leaves the list when its
    worker says that it is clean, and in no other way."""
    known = set(_mapping(before.get("dirty")).get("nodes") or ())
    for figures in seen.figures:
        (known.discard if figures.clean else known.add)(figures.node)
    return sorted(known) if seen.writable else []


def _unknown(seen: Observed, before: Mapping[str, Any]) -> list[str]:
    """Nodes that may be dirty, as far as anybody knows."""
    if not seen.writable:
        return []
    heard = {figures.node for figures in seen.figures}
    return sorted((set(seen.silent) | set(dirty_nodes(seen, before))) - heard)


def status(seen: Observed, before: Mapping[str, Any], *, now: str) -> dict[str, Any]:
    """The status that should stand there instead of `before`. `now` (RFC 3339): the time of what changed."""
    conditions = _conditions(seen, before)
    return {
        "phase": _phase(seen),
        "observedGeneration": seen.generation,
        "conditions": [_dated(condition, seen, before, now) for condition in conditions],
        **_amounts(seen, before),
    }


def news(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[News]:
    """The events that a change of status is worth: one for each condition of another status or reason."""
    found = []
    old = {each["type"]: each for each in before.get("conditions") or () if isinstance(each, Mapping)}
    for each in after["conditions"]:
        was = old.get(each["type"], {})
        if (was.get("status"), was.get("reason")) == (each["status"], each["reason"]):
            continue
        bad = TRUE if each["type"] == "DeletionBlocked" else FALSE
        if not was and each["status"] != bad:
            continue  # that all is well is no news of what has just begun
        kind = "Warning" if each["status"] == bad and each["reason"] not in _CALM else "Normal"
        found.append(News(kind, each["reason"], each["message"] or each["type"]))
    return found


_CALM = {"Starting", "Rolling", "Binding", "Uploading", "Waiting"}
"""Reasons of what will pass by itself."""


# ---- conditions ----------------------------------------------------------------------------------


def _conditions(seen: Observed, before: Mapping[str, Any]) -> list[_Condition]:
    accepted, bound, workers = _accepted(seen), _bound(seen), _workers(seen)
    found = [accepted, bound, workers]
    if seen.writable:
        found.append(_uploaded(seen, before))
    found.append(_ready(seen, accepted, bound, workers))
    if seen.deleting:
        found.append(_deletion(seen, before))
    return found


def _accepted(seen: Observed) -> _Condition:
    if seen.refused:
        return _Condition("Accepted", FALSE, "Invalid", seen.refused)
    if seen.missing:
        return _Condition("Accepted", FALSE, seen.lacks, seen.missing)
    if seen.failed:
        return _Condition("Accepted", FALSE, "Refused", f"the API refuses its objects: {seen.failed}")
    return _Condition("Accepted", TRUE, "Accepted", "the spec can be done")


def _bound(seen: Observed) -> _Condition:
    if seen.claim == "Bound" and seen.placed_otherwise:
        said = (
            "the claim is bound; its volume keeps the nodeAffinity that it was made with, by which pods are "
            "placed, while workers go by the new one: delete the claim when no pod uses it, and both are "
            "made anew"
        )
        return _Condition("VolumeBound", TRUE, "PlacedAsBefore", said)
    if seen.claim == "Bound":
        return _Condition(
            "VolumeBound", TRUE, "Bound", "the claim of the Dataset's name is bound to its volume"
        )
    if seen.claim == "Lost":
        return _Condition("VolumeBound", FALSE, "Lost", "the claim has lost its volume")
    if seen.claim:
        return _Condition("VolumeBound", FALSE, "Binding", "the claim waits for its volume")
    return _Condition("VolumeBound", FALSE, "NoClaim", "there is no claim yet")


def _workers(seen: Observed) -> _Condition:
    of = seen.workers
    if of is None:
        return _Condition("WorkersReady", FALSE, "NoWorkers", "there is no DaemonSet yet")
    if not of.current:
        return _Condition("WorkersReady", UNKNOWN, "Rolling", "the DaemonSet has just changed")
    if troubles := _troubles(seen):
        return _Condition("WorkersReady", FALSE, "Troubled", _few(troubles, "", "", mark="; "))
    if not of.wanted:
        said = "no node needs a worker: they come with the first pod that mounts it, or a DataLoad"
        return _Condition("WorkersReady", TRUE, "NoneWanted", said)
    if of.ready < of.wanted:
        said = f"{of.ready} of {of.wanted} workers are ready"
        if seen.ended:
            said += f"; {_few(seen.ended, '', '', mark='; ')}"
            return _Condition("WorkersReady", FALSE, "WorkersEnd", said)
        return _Condition("WorkersReady", FALSE, "Starting", said)
    if of.updated < of.wanted:
        said = f"{of.updated} of {of.wanted} workers have the settings of now"
        return _Condition("WorkersReady", TRUE, "Rolling", said)
    return _Condition("WorkersReady", TRUE, "AllReady", f"{of.ready} of {of.wanted} workers are ready")


def _troubles(seen: Observed) -> list[str]:
    return [f"node {each.node}: {trouble}" for each in _by_node(seen.figures) for trouble in each.troubles]


def _uploaded(seen: Observed, before: Mapping[str, Any]) -> _Condition:
    dirty = [figures for figures in seen.figures if not figures.clean]
    if dirty:
        size = format_size(sum(figures.dirty for figures in dirty))
        nodes = _few([figures.node for figures in _by_node(dirty)], "node", "nodes")
        return _Condition("Uploaded", FALSE, "Uploading", f"{size} are not in the bucket yet, on {nodes}")
    if unknown := _unknown(seen, before):
        return _Condition(
            "Uploaded", UNKNOWN, "Silent", f"no worker answers on {_few(unknown, 'node', 'nodes')}"
        )
    return _Condition("Uploaded", TRUE, "Clean", "all that was written is in the bucket")


def _ready(seen: Observed, *needed: _Condition) -> _Condition:
    if seen.deleting:
        return _Condition("Ready", FALSE, "Deleting", "the Dataset is being deleted")
    for condition in needed:
        if condition.status != TRUE:
            return _Condition("Ready", condition.status, condition.reason, condition.message)
    return _Condition("Ready", TRUE, "Ready", "pods can mount it")


def _deletion(seen: Observed, before: Mapping[str, Any]) -> _Condition:
    if seen.released:
        return _Condition(
            "DeletionBlocked", FALSE, "Released", "its workers and its volume are being removed"
        )
    if found := blockers(seen, before):
        reason = "InUse" if seen.users else "NotUploaded"
        hint = "" if seen.users else f"; annotation {ACCEPT_LOSS}=true gives it up"
        return _Condition("DeletionBlocked", TRUE, reason, "; ".join(found) + hint)
    return _Condition("DeletionBlocked", FALSE, "Free", "nothing holds it")


def _phase(seen: Observed) -> str:
    """One word for people: the conditions say why."""
    if seen.deleting:
        return "Deleting"
    if seen.claim != "Bound":
        return "Failed" if seen.refused or seen.missing or seen.failed or seen.claim == "Lost" else "Pending"
    if seen.refused or seen.missing or seen.failed:
        return "Degraded"  # it works as it was before the change that cannot be done
    of = seen.workers
    if of is None or not of.current or (of.updated < of.wanted and of.ready >= of.wanted - 1):
        return "Updating"
    return "Degraded" if of.ready < of.wanted or _troubles(seen) else "Bound"


def _dated(condition: _Condition, seen: Observed, before: Mapping[str, Any], now: str) -> dict[str, Any]:
    since = now
    for old in before.get("conditions") or ():
        if isinstance(old, Mapping) and (old.get("type"), old.get("status")) == (
            condition.type,
            condition.status,
        ):
            since = old.get("lastTransitionTime") or now
    message = condition.message
    return {
        "type": condition.type,
        "status": condition.status,
        "reason": condition.reason,
        "message": message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…",
        "observedGeneration": seen.generation,
        "lastTransitionTime": since,
    }


# ---- amounts -------------------------------------------------------------------------------------


def _amounts(seen: Observed, before: Mapping[str, Any]) -> dict[str, Any]:
    figures = seen.figures
    found: dict[str, Any] = {}
    if figures:
        # Each worker lists what its readers ask for: who has listed most knows most.
        total, files = max((each.bytes, each.files) for each in figures)
        fullest = max(each.cached for each in figures)
        opens = sum(each.opens for each in figures)
        found = {
            "ufsTotal": total,
            "fileNum": files,
            "cached": sum(each.cached for each in figures),
            # What the best placed pod would find: copies on several nodes are not added up.
            **({"cachedPercentage": min(100, fullest * 100 // total)} if total else {}),
            **({"hitRatio": f"{sum(each.opens_whole for each in figures) / opens:.3f}"} if opens else {}),
            "nodes": [
                {"name": each.node, "cached": each.cached}
                for each in sorted(figures, key=lambda each: (-each.cached, each.node))[:SHOWN_NODES]
            ],
        }
        found["shown"] = {
            "ufsTotal": format_size(total),
            "cached": format_size(found["cached"]),
            **({"cachedPercentage": f"{found['cachedPercentage']}%"} if total else {}),
        }
    if seen.writable:
        found["dirty"] = {
            "bytes": sum(each.dirty for each in figures),
            "files": sum(each.dirty_files for each in figures),
            "operations": sum(each.owed for each in figures),
            "nodes": dirty_nodes(seen, before),
        }
        # `kubectl get` shows a number as it stands; people want another unit.
        found["shown"] = found.get("shown", {}) | {"dirty": format_size(found["dirty"]["bytes"])}
    return found


def _by_node(figures: Sequence[Figures]) -> list[Figures]:
    return sorted(figures, key=lambda each: each.node)


def _few(names: Sequence[str], one: str, many: str, *, mark: str = ", ") -> str:
    """`2 nodes (a, b)`; of many, the first few."""
    shown = mark.join(sorted(names)[:SHOWN]) + (f"{mark}..." if len(names) > SHOWN else "")
    if not one:
        return shown
    return f"{one} {shown}" if len(names) == 1 else f"{len(names)} {many} ({shown})"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
