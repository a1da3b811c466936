"""
Which pod of the CSI driver is to be exchanged now, if any.

Pure. The driver's DaemonSet is `OnDelete`: Kubernetes makes a pod anew only when its old one has gone, and
who takes it away is the controller. Each mount has two holders, the driver of its node and a worker, so a
driver goes only while all workers of its node are well and nobody is about to exchange them; one goes at a
time; and when what has come is not well, no more go.
"""

from collections.abc import Iterable
from dataclasses import dataclass

SETTLED = 10.0
"""Seconds that a holder has been ready before the other may go: it fetches the mounts in the first."""


@dataclass(frozen=True)
class Driver:
    """A pod of the driver."""

    name: str
    uid: str
    node: str
    revision: str
    """Of the DaemonSet when the pod was made."""
    ready_for: float
    """Seconds; negative: it is not ready."""
    ending: bool = False


@dataclass(frozen=True)
class Worker:
    """A worker's pod."""

    name: str
    node: str
    ready_for: float
    ending: bool = False
    rolling: bool = False
    """Whether its DaemonSet exchanges pods, or is about to."""


@dataclass(frozen=True)
class Seen:
    """All that a decision is made of."""

    revision: str
    """Of the DaemonSet as it is now; empty: not known yet."""
    wanted: int
    """Nodes that should have a driver."""
    drivers: tuple[Driver, ...]
    workers: tuple[Worker, ...] = ()
    lost: frozenset[str] = frozenset()
    """Nodes that do not answer: what is there can neither go nor come."""


@dataclass(frozen=True)
class Turn:
    """Whose turn it is (None: nobody's), and why, in words for the log; no words when all are of now."""

    driver: Driver | None
    why: str


def outdated(seen: Seen) -> tuple[Driver, ...]:
    """Those that are to be exchanged some time, by node."""
    found = [
        each
        for each in seen.drivers
        if seen.revision and each.revision != seen.revision and not each.ending and each.node not in seen.lost
    ]
    return tuple(sorted(found, key=lambda each: each.node))


def turn(seen: Seen) -> Turn:
    """The one that is to go now."""
    old = outdated(seen)
    if not old:
        return Turn(None, "")
    for each in old:
        if each.ready_for < 0:
            # It holds nothing, and may be what the upgrade is to mend.
            return Turn(each, "it is not ready")
    for each in seen.drivers:
        if each.node not in seen.lost and (each.ending or each.ready_for < SETTLED):
            return Turn(None, f"{each.name} on node {each.node} is not ready yet")
    if len(seen.drivers) < seen.wanted:
        return Turn(None, f"{len(seen.drivers)} of {seen.wanted} nodes have the driver")
    reasons = []
    for each in old:
        reason = _holds_up(seen.workers, each.node)
        if not reason:
            return Turn(each, "another revision is wanted")
        reasons.append(reason)
    return Turn(None, reasons[0])


def settled(seen: Seen, node: str) -> bool:
    """Whether the driver that came to `node` is there and well."""
    return any(
        each.node == node and each.revision == seen.revision and not each.ending and each.ready_for >= SETTLED
        for each in seen.drivers
    )


def _holds_up(workers: Iterable[Worker], node: str) -> str:
    """Which worker of `node` is not to be counted on, and why; empty: all are."""
    for each in workers:
        if each.node != node:
            continue
        if each.rolling:
            return f"the workers of {each.name} on node {node} are being exchanged"
        if each.ending or each.ready_for < SETTLED:
            return f"worker {each.name} on node {node} is not ready yet"
    return ""
