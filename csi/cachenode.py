"""
The CacheNode of this node: what should stand in it, and when it is worth a write.

Pure. A scheduler goes by these figures, and they may be a little old: a write is worth it when a Dataset
comes or goes, when an amount has changed by a twentieth, from or to nothing included; and one comes at
most every `AT_MOST` seconds. While nothing changes nothing is written.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from csi.accountant import Holding
from datacache.kube.release import GROUP, VERSION
from datacache.model import format_size

OURS = f"{GROUP}/{VERSION}"

CHANGE = 0.05
"""Fraction by which an amount has to change."""
AT_MOST = 30.0
"""Seconds between two writes at least."""
MOST = 256
"""Datasets that one object lists; those that hold most. As its schema has it."""
WHY = 256
"""Characters of a reason."""

Object = dict[str, Any]


class Held(NamedTuple):
    """Directories of a Dataset that is no more, which are kept."""

    uid: str
    namespace: str
    name: str
    why: str


def status(holdings: Sequence[Holding], held: Sequence[Held], *, now: str) -> Object:
    """What the status should say. `now` (RFC 3339): when it was found."""
    shown = sorted(holdings, key=lambda each: (-each.cached, each.uid))[:MOST]
    total = sum(each.cached for each in holdings)
    return {
        "observedAt": now,
        "count": len(holdings),
        "datasets": sorted((_dataset(each) for each in shown), key=lambda each: str(each["uid"])),
        "held": [
            {"uid": each.uid, "namespace": each.namespace, "name": each.name, "reason": each.why[:WHY]}
            for each in sorted(held)[:MOST]
        ],
        "shown": {"cached": format_size(total)},
    }


def _dataset(holding: Holding) -> Object:
    found: Object = {
        "uid": holding.uid,
        "namespace": holding.namespace,
        "name": holding.name,
        "cached": holding.cached,
        "dirty": max(0, holding.dirty),
    }
    if holding.total:
        found["cachedPercentage"] = min(100, holding.cached * 100 // holding.total)
    return found


def is_worth_it(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether `after` is worth a write where `before` stands."""
    old, new = _by_uid(before), _by_uid(after)
    if old.keys() != new.keys() or (before.get("held") or []) != (after.get("held") or []):
        return True
    return any(_differ(old[uid], new[uid]) for uid in new)


def _by_uid(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {str(each.get("uid")): each for each in status.get("datasets") or () if isinstance(each, Mapping)}


def _differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if any(old.get(key) != new.get(key) for key in ("namespace", "name")):
        return True
    for key in ("cached", "dirty"):
        was, is_ = int(old.get(key) or 0), int(new.get(key) or 0)
        if was != is_ and abs(is_ - was) >= CHANGE * was:
            return True
    return False


def cache_node(node: str, node_uid: str) -> Object:
    """The object without its status. It goes with its Node."""
    owner = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid}
    return {"apiVersion": OURS, "kind": "CacheNode", "metadata": {"name": node, "ownerReferences": [owner]}}
