"""
Who of a node may have how much of its disks: the decisions, which are pure.

A quota is a ceiling, not a reservation: three data sets of half a disk each may lie on one disk. What a disk
has for copies is divided anew every few seconds (`divide`), from what each has and whether it is in use:

- what is pinned, and cannot go, comes first;
- then what each would like: what it has, and room to grow where it had none. Where that is too much for the
  disk, data sets that nobody uses give way first, the one that was idle longest before all others; then those
  of lower priority; data sets of one priority share alike;
- what is left then is lent on top, so that nobody who fills quickly waits for the next round.

All leases of a disk together never exceed what it has above its reserve, and none exceeds its quota. A lease
that would change little stays as it is (`SETTLED`): else two data sets that share alike would evict and fetch
a little for ever.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

RESERVE = 0.10
"""Fraction of a disk's bytes and inodes that is lent to nobody: what a tier leaves free by itself
(`CacheSettings.reserve`)."""
IDLE = 600.0
"""Seconds after its last use from which a data set gives way to those that are in use."""
GROWTH = 1 / 16
"""Of what a disk has for copies: what a data set that had no room would like beyond what it has. So much it
can get of one that gives way, in one round; what nobody has it gets at once."""
SETTLED = 1 / 50
"""Of a lease: one that would change by less stays, if all fit."""


@dataclass(frozen=True)
class Disk:
    """A file system of tiers."""

    total: int
    """Bytes."""
    free: int
    """Bytes that may still be written."""
    inodes: int = 0
    """0: there is no limit."""
    inodes_free: int = 0


@dataclass(frozen=True)
class Claim:
    """One tier of one data set."""

    dataset: str
    """Its uid."""
    tier: str
    """Its name, as in its worker's status."""
    disk: int
    """On which disk it lies."""
    quota: int
    used: int
    """Bytes of copies."""
    entries: int
    """Files."""
    pinned: int = 0
    """Of `used`: bytes that cannot go."""
    full: bool = False
    """Whether it had no room for something."""
    priority: int = 0
    idle: float = 0.0
    """Seconds since its data set was used last; 0: it is now."""

    @property
    def key(self) -> tuple[str, str]:
        return self.dataset, self.tier


class Lease(NamedTuple):
    """What a tier may have."""

    room: int
    """Bytes."""
    entries: int
    """Files; 0: any number."""


Leases = Mapping[tuple[str, str], Lease]
"""By data set and tier."""


def divide(
    disks: Mapping[int, Disk], claims: Iterable[Claim], before: Leases
) -> dict[tuple[str, str], Lease]:
    """A lease for each claim whose disk is known. `before`: those that were given last."""
    found: dict[tuple[str, str], Lease] = {}
    by_disk: dict[int, list[Claim]] = {}
    for claim in claims:
        by_disk.setdefault(claim.disk, []).append(claim)
    for number, there in by_disk.items():
        if number in disks:
            found |= _divided(disks[number], there, before)
    return found


def _divided(disk: Disk, claims: Sequence[Claim], before: Leases) -> dict[tuple[str, str], Lease]:
    capacity = bytes_for_copies(disk, sum(claim.used for claim in claims))
    room = _shares(
        [
            _Wish(
                claim, most=claim.quota, has=claim.used, least=claim.pinned,
                growth=int(capacity * GROWTH), lent=_lent(before, claim, 0),
            )
            for claim in claims
        ],
        capacity,
    )  # fmt: skip
    files = [0] * len(claims)
    if disk.inodes:
        capacity = inodes_for_copies(disk, sum(claim.entries for claim in claims))
        files = _shares(
            [
                # One at least: none would read as any number.
                _Wish(
                    claim, most=capacity, has=claim.entries, least=1,
                    growth=int(capacity * GROWTH), lent=_lent(before, claim, 1),
                )
                for claim in claims
            ],
            capacity,
        )  # fmt: skip
        files = [max(1, count) for count in files]
    return {
        claim.key: Lease(*pair) for claim, pair in zip(claims, zip(room, files, strict=True), strict=True)
    }


def bytes_for_copies(disk: Disk, used: int) -> int:
    """Bytes that all tiers of a disk together may have: what they have (`used`), and what is free above the
    reserve. What others have on that disk, landing zones among them, is nobody's to lend."""
    return max(0, used + disk.free - int(disk.total * RESERVE))


def inodes_for_copies(disk: Disk, used: int) -> int:
    """The same of inodes."""
    return max(0, used + disk.inodes_free - int(disk.inodes * RESERVE))


# ---- one amount of one disk ----------------------------------------------------------------------


@dataclass
class _Wish:
    claim: Claim
    most: int
    has: int
    least: int
    growth: int
    lent: int | None

    @property
    def used(self) -> bool:
        return self.claim.idle < IDLE

    @property
    def likes(self) -> int:
        """What nobody uses does not grow."""
        growth = self.growth if self.used and self.claim.full else 0
        return min(self.most, self.has + growth)

    @property
    def rank(self) -> tuple[float, ...]:
        """The smaller, the sooner it is served."""
        return (0, -self.claim.priority) if self.used else (1, self.claim.idle, -self.claim.priority)


def _shares(wishes: Sequence[_Wish], capacity: int) -> list[int]:
    """What each gets, `capacity` together at most."""
    ranks = sorted({wish.rank for wish in wishes})
    given = [0] * len(wishes)

    def serve(wanted: Callable[[_Wish], int], group: Iterable[int]) -> None:
        each = list(group)
        _fill(given, {i: min(wishes[i].most, wanted(wishes[i])) for i in each}, capacity - sum(given))

    for rank in ranks:
        serve(lambda wish: wish.least, [i for i, wish in enumerate(wishes) if wish.rank == rank])
    for rank in ranks:
        serve(lambda wish: wish.likes, [i for i, wish in enumerate(wishes) if wish.rank == rank])
    serve(lambda wish: wish.most, [i for i, wish in enumerate(wishes) if wish.used])
    serve(lambda wish: wish.most, range(len(wishes)))
    return _settled(wishes, given, capacity)


def _fill(given: list[int], wanted: Mapping[int, int], room: int) -> None:
    """Raise what is `given` towards what is `wanted` by `room` in all at most, to one level: as water
    does."""
    most = room + sum(given[i] for i in wanted)

    def at(level: int) -> dict[int, int]:
        return {i: max(given[i], min(level, wish)) for i, wish in wanted.items()}

    low, high = 0, max(wanted.values(), default=0)
    while low < high:
        level = (low + high + 1) // 2
        if sum(at(level).values()) <= most:
            low = level
        else:
            high = level - 1
    for i, share in at(low).items():
        given[i] = share
    left = most - sum(given[i] for i in wanted)  # less than one for each that still wants
    for i, wish in wanted.items():
        if left > 0 and given[i] < wish:
            given[i], left = given[i] + 1, left - 1


def _settled(wishes: Sequence[_Wish], given: list[int], capacity: int) -> list[int]:
    """`given`, but what was lent before where that is nearly the same, if all of it fits."""
    kept = [
        wish.lent if wish.lent is not None and _settles(wish, wish.lent, share) else share
        for wish, share in zip(wishes, given, strict=True)
    ]
    return kept if sum(kept) <= capacity else given


def _settles(wish: _Wish, lent: int, share: int) -> bool:
    near = abs(lent - share) < SETTLED * min(lent, share)
    return near and wish.least <= lent <= wish.most


def _lent(before: Leases, claim: Claim, amount: int) -> int | None:
    lease = before.get(claim.key)
    return None if lease is None else lease[amount]
