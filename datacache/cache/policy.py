"""
Whom to admit to a tier, and whom to give up when it is full.

Pure: takes what the tier knows, returns what should be done. The tier does the deleting, so every
rule can be tested as a table and none can lose data by crashing halfway.
"""

import enum
from collections.abc import Iterable
from typing import NamedTuple

from datacache.config.settings import Policy
from datacache.model import format_size

PAGE = 4096
"""What a file system allocates at once; quotas count in it."""


class Space(NamedTuple):
    """What a file system has, and has left for us. Without a limit on inodes, `inodes` is 0."""

    total: int
    free: int
    inodes: int
    inodes_free: int


class Limit(NamedTuple):
    """What a tier may take now."""

    bytes: int
    entries: int = 0
    """0: as many as there is room for."""
    leased: bool = False
    """Whether the node's plugin says so, and not the tier's own quota."""


class Candidate(NamedTuple):
    """A cache entry, as far as its fate is concerned."""

    id: int
    digest: bytes
    dataset: str
    priority: int
    """Of its data set."""
    last_open: float
    used: int
    superseded: bool = False
    pinned: bool = False
    in_use: bool = False
    """Open now: unlinking it would free nothing yet."""


class Rank(enum.IntEnum):
    """Classes of entries, in the order in which they go."""

    SUPERSEDED = 0
    """The store has another version."""
    EXPIRED = 1
    """Not opened for longer than `expire`."""
    IDLE = 2
    """Of a data set that is not mounted now."""
    LOWER = 3
    """Of a mounted data set with a lower priority."""
    OWN = 4
    """What this data set will read again; goes only where the policy evicts."""


class Shortage(NamedTuple):
    """What stands in the way of an admission."""

    over_by: int
    """Bytes that would have to go; 0: nothing stands in the way."""
    reason: str


def pages(start: int, stop: int) -> int:
    """Bytes that a file system allocates for the bytes `start` to `stop` of a file."""
    return -(-stop // PAGE) * PAGE - start // PAGE * PAGE if stop > start else 0


def shortage(
    wanted: int, *, inodes: int, used: int, entries: int, limit: Limit, space: Space, reserve: float
) -> Shortage:  # fmt: skip
    """What is missing to admit `wanted` bytes and `inodes` new files.

    A tier stays within its quota, or its lease, and leaves `reserve` of its file system's bytes and
    inodes free; both are a tier that is full, not one that is broken.
    """
    over = used + wanted - limit.bytes
    if over > 0:
        what = "its lease" if limit.leased else "its quota"
        return Shortage(over, f"{format_size(used)} of {what} of {format_size(limit.bytes)} are in use")
    if limit.entries and inodes and entries + inodes > limit.entries:
        return Shortage(PAGE, f"{entries} of its lease of {limit.entries} files are there")
    over = int(space.total * reserve) + wanted - space.free
    if over > 0 and wanted:
        left = f"{format_size(max(0, space.free))} of {format_size(space.total)}"
        return Shortage(over, f"its file system has {left} left, and {reserve:.0%} stay free")
    if space.inodes and inodes and space.inodes_free - inodes < space.inodes * reserve:
        left = f"{space.inodes_free} of {space.inodes} inodes"
        return Shortage(PAGE, f"its file system has {left} left, and {reserve:.0%} stay free")
    return Shortage(0, "")


def excess(*, used: int, quota: int, high: float, low: float, policy: Policy) -> int:
    """Bytes to evict ahead of need: from above the high watermark down to the low one where the
    policy evicts, and down to a quota that was made smaller whatever the policy."""
    if policy is Policy.LRU and used > quota * high:
        return used - int(quota * low)
    return max(0, used - quota)


class Stance(NamedTuple):
    """Who asks for room, when, and under which rules."""

    now: float
    expire: float
    """Seconds since the last open after which an entry has expired."""
    active: frozenset[str]
    """The data sets that are mounted now."""
    priority: int
    """Of the data set that needs the room."""
    policy: Policy


def rank(entry: Candidate, stance: Stance) -> Rank | None:
    """The class of `entry`; None: it stays."""
    if entry.pinned or entry.in_use:
        return None
    if entry.superseded:
        return Rank.SUPERSEDED
    if stance.now - entry.last_open > stance.expire:
        return Rank.EXPIRED
    if entry.dataset not in stance.active:
        return Rank.IDLE
    if entry.priority < stance.priority:
        return Rank.LOWER
    return Rank.OWN if stance.policy is Policy.LRU and entry.priority == stance.priority else None


def victims(
    entries: Iterable[Candidate], stance: Stance, *, over_by: int, count: int = 0
) -> list[Candidate]:  # fmt: skip
    """The entries to give up to free at least `over_by` bytes, and at least `count` of them: by class,
    within a class the data set of the lowest priority first, and in it what was opened longest ago.

    Frees less than asked when nothing else may go; the caller then refuses to admit.
    """
    ranked = []
    for entry in entries:
        place = rank(entry, stance)
        if place is not None:
            ranked.append((place, entry.priority, entry.last_open, entry.id, entry))
    ranked.sort()
    found: list[Candidate] = []
    for *_, entry in ranked:
        if over_by <= 0 and len(found) >= count:
            break
        found.append(entry)
        over_by -= entry.used
    return found
