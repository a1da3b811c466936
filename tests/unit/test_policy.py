"""Whom to admit and whom to give up: tables, and laws that hold for all inputs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.cache.policy import (
    PAGE,
    Candidate,
    Limit,
    Rank,
    Space,
    Stance,
    excess,
    pages,
    rank,
    shortage,
    victims,
)
from datacache.config.settings import Policy
from datacache.model import GiB, KiB, MiB

NOW = 1000.0
MOUNTED = frozenset({"mine"})


def stance(policy: Policy = Policy.KEEP, *, expire: float = float("inf"), priority: int = 0) -> Stance:
    return Stance(NOW, expire, MOUNTED, priority, policy)


def entry(number: int, **changes: object) -> Candidate:
    plain = Candidate(number, bytes([number]), "mine", 0, 500.0 + number, 4096)
    return plain._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "under", "expected"),
    [
        ({}, stance(), None),
        ({}, stance(Policy.LRU), Rank.OWN),
        ({"superseded": True}, stance(), Rank.SUPERSEDED),
        ({"last_open": 899.0}, stance(expire=100), Rank.EXPIRED),
        ({"last_open": 901.0}, stance(expire=100), None),
        ({"dataset": "other"}, stance(), Rank.IDLE),
        ({"dataset": "other", "priority": 9}, stance(), Rank.IDLE),
        ({"priority": -1}, stance(), Rank.LOWER),
        ({"priority": 1}, stance(Policy.LRU), None),
        ({"superseded": True, "pinned": True}, stance(Policy.LRU), None),
        ({"superseded": True, "in_use": True}, stance(Policy.LRU), None),
        ({"superseded": True, "dataset": "other", "last_open": 0.0}, stance(expire=1), Rank.SUPERSEDED),
    ],
)
def test_the_class_of_an_entry(changes: dict[str, object], under: Stance, expected: Rank | None) -> None:
    """Superseded, expired, idle, lower, own; pinned and open entries never."""
    assert rank(entry(1, **changes), under) is expected


def test_as_many_as_are_wanted_go() -> None:
    """By number, too: bytes that are free already do not end it."""
    offered = [entry(i) for i in range(9)]
    under = stance(Policy.LRU)
    assert [e.id for e in victims(offered, under, over_by=1, count=3)] == [0, 1, 2]
    assert [e.id for e in victims(offered, under, over_by=4 * 4096, count=3)] == [0, 1, 2, 3]


def test_classes_go_in_order_and_within_a_class_the_oldest_first() -> None:
    """One of each class, offered in the wrong order."""
    offered = [
        entry(9, last_open=700.0),
        entry(8, last_open=600.0),
        entry(7, priority=-1, last_open=1.0),
        entry(6, dataset="other", last_open=2.0),
        entry(5, dataset="other", last_open=1.0),
        entry(4, dataset="cheap", priority=-5, last_open=3.0),
        entry(3, last_open=0.0),
        entry(2, superseded=True, last_open=999.0),
        entry(1, pinned=True, superseded=True),
    ]
    order = victims(offered, stance(Policy.LRU, expire=999.5), over_by=1 << 40)
    assert [e.id for e in order] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert [e.id for e in victims(offered, stance(expire=999.5), over_by=2 * 4096)] == [2, 3]


entries = st.lists(
    st.builds(
        Candidate,
        id=st.integers(0, 10**6),
        digest=st.binary(min_size=1, max_size=4),
        dataset=st.sampled_from(["mine", "other", "third"]),
        priority=st.integers(-2, 2),
        last_open=st.floats(0, NOW),
        used=st.integers(1, 10**6),
        superseded=st.booleans(),
        pinned=st.booleans(),
        in_use=st.booleans(),
    ),
    unique_by=lambda e: e.id,
    max_size=30,
)


@given(entries, st.integers(0, 10**7), st.sampled_from(Policy), st.floats(0, 2 * NOW), st.integers(-2, 2))
def test_laws_of_choosing(
    offered: list[Candidate], over_by: int, policy: Policy, expire: float, priority: int
) -> None:
    """Never a protected entry; never more than needed; enough whenever that is possible; and nothing
    that stays is of an earlier class than something that goes."""
    under = Stance(NOW, expire, MOUNTED, priority, policy)
    chosen = victims(offered, under, over_by=over_by)
    ranks = [rank(e, under) for e in chosen]
    assert all(r is not None for r in ranks) and ranks == sorted(ranks)
    freed = sum(e.used for e in chosen)
    assert not chosen or freed - chosen[-1].used < over_by
    rest = [r for e in offered if e not in chosen and (r := rank(e, under)) is not None]
    assert freed >= over_by or not rest
    assert not chosen or all(r >= ranks[-1] for r in rest)
    assert not any(e.pinned or e.in_use for e in chosen)


ROOMY = Space(100 * GiB, 90 * GiB, 1000, 900)


@pytest.mark.parametrize(
    ("wanted", "inodes", "used", "space", "over_by", "reason"),
    [
        (4096, 1, 0, ROOMY, 0, ""),
        (4096, 1, MiB - 4096, ROOMY, 0, ""),
        (4096, 1, MiB, ROOMY, 4096, "1.0 MiB of its quota of 1.0 MiB are in use"),
        (8192, 1, MiB - 4096, ROOMY, 4096, "quota"),
        (4096, 1, 0, Space(100 * GiB, 10 * GiB, 0, 0), 4096, "10.0 GiB of 100.0 GiB left, and 10% stay free"),
        (4096, 1, 0, Space(100 * GiB, 10 * GiB + 4096, 0, 0), 0, ""),
        (4096, 1, 0, Space(100 * GiB, 90 * GiB, 0, 0), 0, ""),
        (4096, 1, 0, Space(100 * GiB, 90 * GiB, 1000, 100), PAGE, "100 of 1000 inodes left"),
        (4096, 0, 0, Space(100 * GiB, 90 * GiB, 1000, 100), 0, ""),
    ],
)
def test_what_stands_in_the_way_of_an_admission(
    wanted: int, inodes: int, used: int, space: Space, over_by: int, reason: str
) -> None:
    """The quota, and a tenth of the file system's bytes and of its inodes."""
    limit = Limit(MiB)
    short = shortage(
        wanted, inodes=inodes, used=used, entries=5, limit=limit, space=space, reserve=0.1
    )  # fmt: skip
    assert short.over_by == over_by and reason in short.reason


@pytest.mark.parametrize(
    ("limit", "inodes", "over_by", "reason"),
    [
        (Limit(MiB, 6, leased=True), 1, 0, ""),
        (Limit(MiB, 5, leased=True), 1, PAGE, "5 of its lease of 5 files"),
        (Limit(MiB, 4, leased=True), 0, 0, ""),
        (Limit(8 * KiB, 9, leased=True), 1, 8 * KiB, "8.0 KiB of its lease of 8.0 KiB"),
    ],
)
def test_a_lease_stands_in_the_way(limit: Limit, inodes: int, over_by: int, reason: str) -> None:
    """Bytes and files that the node lends; a file that is there already may still grow."""
    short = shortage(
        8 * KiB, inodes=inodes, used=8 * KiB, entries=5, limit=limit, space=ROOMY, reserve=0.1
    )  # fmt: skip
    assert short.over_by == over_by and reason in short.reason


@pytest.mark.parametrize(
    ("used", "policy", "expected"),
    [(95, Policy.LRU, 0), (96, Policy.LRU, 11), (96, Policy.KEEP, 0), (130, Policy.KEEP, 30)],
)
def test_evicting_ahead_of_need(used: int, policy: Policy, expected: int) -> None:
    """LRU from the high to the low watermark; a smaller quota holds whatever the policy."""
    assert excess(used=used, quota=100, high=0.95, low=0.85, policy=policy) == expected


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(0, 0, 0), (0, 1, PAGE), (4095, 4097, 2 * PAGE), (4096, 8192, PAGE), (0, 100 * KiB, 100 * KiB)],
)
def test_space_is_counted_in_pages(start: int, stop: int, expected: int) -> None:
    """What a file system allocates for a piece."""
    assert pages(start, stop) == expected
