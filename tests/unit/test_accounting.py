"""How a node's disks are divided: tables of who gives way, and laws that hold for all inputs."""

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from csi import accountant, cachenode, sweeping
from csi.accounting import (
    GROWTH,
    IDLE,
    RESERVE,
    SETTLED,
    Claim,
    Disk,
    Lease,
    bytes_for_copies,
    divide,
    inodes_for_copies,
)
from datacache.model import GiB, MiB

SIZE = 1000 * MiB


def claim(name: str, used: int = 0, **more: object) -> Claim:
    """A tier of half of the disk; in use, with no files."""
    plain = {"quota": SIZE // 2, "entries": 0, **more}
    return Claim(name, "ssd:/x", 1, used=used, **plain)  # type: ignore[arg-type]


def disk(claims: Sequence[Claim], others: int = 0) -> Disk:
    """The disk that has them on it, and what `others` have."""
    return Disk(SIZE, SIZE - others - sum(each.used for each in claims))


def rooms(
    claims: Sequence[Claim], *, others: int = 0, before: dict[str, int] | None = None
) -> dict[str, int]:
    lent = {(name, "ssd:/x"): Lease(room, 0) for name, room in (before or {}).items()}
    found = divide({1: disk(claims, others)}, claims, lent)
    return {uid: lease.room for (uid, _), lease in found.items()}


def test_one_that_is_alone_has_its_quota() -> None:
    """A disk that is not short lends each what its quota allows."""
    assert rooms([claim("a")]) == {"a": 500 * MiB}
    assert rooms([claim("a", 100 * MiB, quota=300 * MiB), claim("b", quota=400 * MiB)]) == {
        "a": 300 * MiB, "b": 400 * MiB,
    }  # fmt: skip


def test_three_of_half_the_disk_each_end_with_a_third_each() -> None:
    """Quotas of half a disk, all in use, and all with more to read than there is room: a third each, after
    some rounds, and from then on nobody evicts."""
    used = {"a": 0, "b": 0, "c": 0}
    lent: dict[str, int] = {}
    evicted = 0
    for round_ in range(40):
        present = "ab" if round_ < 5 else "abc"
        claims = [claim(name, used[name], full=used[name] >= lent.get(name, 0)) for name in present]
        lent = rooms(claims, before=lent)
        assert sum(lent.values()) <= 900 * MiB
        if round_ >= 30:
            evicted += sum(max(0, used[name] - lent[name]) for name in present)
        used |= lent  # each fills what it may, and gives up what is beyond
    assert evicted == 0
    assert all(abs(used[name] - 300 * MiB) <= SETTLED * 900 * MiB for name in "abc"), used


def test_an_idle_one_gives_way_first() -> None:
    """Nobody in use loses anything while there are copies that nobody uses; the one that was idle longest
    goes first."""
    claims = [
        claim("old", 300 * MiB, idle=IDLE * 9, priority=5),
        claim("idle", 300 * MiB, idle=IDLE),
        claim("busy", 300 * MiB, full=True),
    ]
    step = int(900 * MiB * GROWTH)
    assert rooms(claims) == {"busy": 300 * MiB + step, "idle": 300 * MiB, "old": 300 * MiB - step}
    claims[0] = claim("old", 10 * MiB, idle=IDLE * 9)
    claims[1] = claim("idle", 590 * MiB, idle=IDLE, quota=SIZE)
    assert rooms(claims) == {"busy": 300 * MiB + step, "idle": 600 * MiB - step, "old": 0}


def test_a_lower_priority_gives_way_next() -> None:
    """Among those in use; until nothing is left of it but what is pinned."""
    claims = [
        claim("low", 400 * MiB, priority=-1, full=True, pinned=30 * MiB),
        claim("high", 500 * MiB, priority=3, full=True, quota=SIZE),
    ]
    step = int(900 * MiB * GROWTH)
    assert rooms(claims) == {"low": 400 * MiB - step, "high": 500 * MiB + step}
    claims = [
        claim("low", 40 * MiB, priority=-1, pinned=30 * MiB),
        claim("high", 860 * MiB, priority=3, quota=SIZE, full=True),
    ]
    assert rooms(claims) == {"low": 30 * MiB, "high": 870 * MiB}


def test_one_that_lacks_nothing_takes_nothing() -> None:
    """Room to grow is taken from others only by who had none."""
    claims = [claim("idle", 500 * MiB, idle=IDLE), claim("busy", 400 * MiB)]
    assert rooms(claims) == {"idle": 500 * MiB, "busy": 400 * MiB}


def test_what_others_have_on_the_disk_is_lent_to_nobody() -> None:
    """A landing zone that fills, or a stranger's files: leases shrink."""
    claims = [claim("a", 400 * MiB), claim("b", 200 * MiB)]
    assert sum(rooms(claims, others=200 * MiB).values()) == 700 * MiB
    assert rooms(claims, others=400 * MiB) == {"a": 300 * MiB, "b": 200 * MiB}


def test_a_small_change_is_none() -> None:
    """A lease stays where another would differ by less than a fiftieth of it, as long as all fit."""
    near = int(300 * MiB * SETTLED / (1 + SETTLED))
    claims = [claim("a", 300 * MiB), claim("b", 300 * MiB), claim("c", 300 * MiB)]
    lent = {"a": 300 * MiB - near, "b": 300 * MiB - near, "c": 300 * MiB}
    assert rooms(claims, before=lent) == lent
    assert rooms(claims, before=lent | {"a": 300 * MiB + near}) == {
        "a": 300 * MiB + near, "b": 300 * MiB - near, "c": 300 * MiB,
    }  # fmt: skip
    assert rooms(claims, before=lent | {"a": 300 * MiB + near, "b": 300 * MiB}) == {
        "a": 300 * MiB, "b": 300 * MiB, "c": 300 * MiB,
    }  # fmt: skip


def test_a_small_data_set_is_not_forgotten() -> None:
    """Whose quota is less than what others do not notice: a change is small, or not, by its own lease."""
    claims = [claim("large", 800 * MiB, quota=SIZE, idle=IDLE), claim("small", quota=MiB, full=True)]
    assert rooms(claims, before={"large": 900 * MiB, "small": 0})["small"] == MiB


def test_files_are_lent_where_the_disk_has_a_limit() -> None:
    """By the same rules; a disk without one lends any number."""
    claims = [claim("idle", entries=600, idle=IDLE), claim("busy", entries=300, full=True)]
    found = divide({1: Disk(GiB, GiB, 1000, 100)}, claims, {})
    assert {uid: lease.entries for (uid, _), lease in found.items()} == {"idle": 544, "busy": 356}
    assert {lease.entries for lease in divide({1: Disk(GiB, GiB)}, claims, {}).values()} == {0}


def test_a_tier_on_a_disk_that_nobody_knows_has_no_lease() -> None:
    """It goes by its quota."""
    assert divide({}, [claim("a")], {}) == {}


claims_ = st.lists(
    st.builds(
        Claim,
        dataset=st.text("abcdef", min_size=1, max_size=6),
        tier=st.just("ssd:/x"),
        disk=st.integers(0, 1),
        quota=st.integers(1, 10**6),
        used=st.integers(0, 10**6),
        entries=st.integers(0, 10**4),
        pinned=st.integers(0, 10**6),
        full=st.booleans(),
        priority=st.integers(-2, 2),
        idle=st.sampled_from([0.0, IDLE - 1, IDLE, IDLE * 2, IDLE * 3]),
    ),
    max_size=8,
    unique_by=lambda each: each.key,
)
disks = st.builds(
    Disk, total=st.integers(0, 10**7), free=st.integers(0, 10**7), inodes=st.integers(0, 10**5),
    inodes_free=st.integers(0, 10**5),
)  # fmt: skip
lent_ = st.dictionaries(
    st.tuples(st.text("abcdef", min_size=1, max_size=2), st.just("ssd:/x")),
    st.builds(Lease, st.integers(0, 10**6), st.integers(0, 10**4)),
)


@given(claims_, st.tuples(disks, disks), lent_)
def test_laws(claims: list[Claim], two: tuple[Disk, Disk], before: dict[tuple[str, str], Lease]) -> None:
    """Leases of a disk fit above its reserve; none exceeds its quota; what is pinned is below each, if all of
    that fits; each tier has one; and who is in use gets what it has before who is idle keeps anything."""
    there = dict(enumerate(two))
    leases = divide(there, claims, before)
    assert leases.keys() == {each.key for each in claims}
    for number, each in there.items():
        here = [one for one in claims if one.disk == number]
        room = bytes_for_copies(each, sum(one.used for one in here))
        files = inodes_for_copies(each, sum(one.entries for one in here))
        assert sum(leases[one.key].room for one in here) <= room
        if each.inodes:
            assert sum(leases[one.key].entries for one in here) <= max(files, len(here))
            assert all(leases[one.key].entries > 0 for one in here)
        assert all(0 <= leases[one.key].room <= one.quota for one in here)
        if sum(min(one.pinned, one.quota) for one in here) <= room:
            assert all(leases[one.key].room >= min(one.pinned, one.quota) for one in here)
        bare = [one for one in here if one.idle >= IDLE and leases[one.key].room > min(one.pinned, one.quota)]
        if bare and not before:
            for one in here:
                if one.idle < IDLE:
                    assert leases[one.key].room >= min(one.used, one.quota), "an idle one kept more than pins"


@given(claims_, disks, lent_)
def test_a_second_look_changes_nothing(
    claims: list[Claim], one: Disk, before: dict[tuple[str, str], Lease]
) -> None:
    """Where nothing has changed, leases do not."""
    there = {0: one, 1: one}
    leases = divide(there, claims, before)
    assert divide(there, claims, leases) == leases


def test_the_page_has_the_figures_of_the_code() -> None:
    """docs/kubernetes.md says how disks are divided, and how often."""
    text = " ".join((Path(__file__).parents[2] / "docs/kubernetes.md").read_text().split())
    for promise, holds in (
        ("divides what each disk has every ten seconds", accountant.EVERY == 10),
        ("above a reserve of 10 %, of bytes and of inodes", RESERVE == 0.1),
        ("and for ten minutes after that", IDLE == 600),
        ("up to a sixteenth of the disk a round", GROWTH == 1 / 16),
        ("by less than a fiftieth stays", SETTLED == 1 / 50),
        ("A lease holds for two minutes", accountant.TTL == 120),
        ("is waited for for 5 s", accountant.PATIENCE == 5),
        ("and goes ten minutes after the last one", accountant.FORGOTTEN == 600),
        (
            "an amount has changed by 5 %, at most every 30 s",
            (cachenode.CHANGE, cachenode.AT_MOST) == (0.05, 30),
        ),
        ("has said twice, 30 s apart", sweeping.APART == 30),
    ):
        assert promise in text and holds, promise
