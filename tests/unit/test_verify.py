"""`verify` is the oracle, so it must find everything that can be wrong, and repair it."""

import os
import sqlite3
from pathlib import Path

import pytest

from datacache.cache.directory import MANAGED, DirectoryTier, Owner, Rules
from datacache.cache.verify import VerifyReport, verify
from datacache.clock import VirtualClock
from datacache.errors import Locked, SettingError, TierBroken
from datacache.model import ByteRange, KiB, MiB
from tests.conftest import AnnouncedLogs
from tests.contract.tier_suite import content, key, put, whole

BLOCK = 16 * KiB
OWNER = Owner(os.getpid(), "", "")


def tier_in(place: Path, clock: VirtualClock) -> DirectoryTier:
    rules = Rules("ssd:x", 64 * MiB, BLOCK, reserve=0.0, dataset="mine")
    return DirectoryTier(str(place), rules, owner=OWNER, clock=clock, keeper=False, boot="one")


@pytest.fixture
def place(tmp_path: Path, clock: VirtualClock) -> Path:
    """A cache directory with two whole entries of four blocks and a part of one."""
    tier = tier_in(tmp_path, clock)
    put(tier, key("a", 64 * KiB))
    put(tier, key("b", 64 * KiB))
    file = tier.open(key("c", 64 * KiB))
    file.fill(BLOCK, content(file.key)[BLOCK : 2 * BLOCK])  # type: ignore[attr-defined]
    file.close()
    tier.close()
    return tmp_path


def path_of(place: Path, name: str) -> Path:
    return next((place / MANAGED / "objects").rglob(key(name, 64 * KiB).digest + "*"))


def change(place: Path, query: str) -> None:
    with sqlite3.connect(place / MANAGED / "catalogue.db") as db:
        db.execute(query)
    db.close()


def numbers(report: VerifyReport) -> dict[str, int]:
    names = ("damaged", "missing", "orphans", "overlong", "miscounted", "repaired")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def test_a_good_cache_is_good(place: Path) -> None:
    """Counts, no problems, progress up to the end."""
    seen: list[tuple[int, int]] = []
    report = verify(str(place), repair=False, progress=lambda done, total: seen.append((done, total)))
    assert report == VerifyReport(entries=3, blocks=9, bytes=9 * BLOCK) and report.ok
    assert len(seen) == 9 and seen[-1] == (9 * BLOCK, 9 * BLOCK)


def flip(place: Path) -> None:
    with path_of(place, "a").open("r+b") as file:
        file.seek(BLOCK + 5)
        file.write(b"\xff\x00\xff")


def remove(place: Path) -> None:
    path_of(place, "a").unlink()


def stray(place: Path) -> None:
    folder = path_of(place, "a").parent
    (folder / "stray").write_text("x")
    (folder / f"{'0' * 32}-1").write_text("x")


def lengthen(place: Path) -> None:
    os.truncate(path_of(place, "a"), 65 * KiB)


def shorten(place: Path) -> None:
    os.truncate(path_of(place, "a"), 40 * KiB)


def miscount(place: Path) -> None:
    change(place, "UPDATE entries SET used = used + 4096, present = present - 1 WHERE present = 65536")


def overlap(place: Path) -> None:
    change(place, f"UPDATE blocks SET stop = stop + 1 WHERE start = 0 AND stop = {BLOCK}")


def outside(place: Path) -> None:
    change(place, f"UPDATE blocks SET stop = stop + 1000000 WHERE start = {3 * BLOCK}")


@pytest.mark.parametrize(
    ("spoil", "found", "left"),
    [
        (flip, {"damaged": 1}, (3, 8)),
        (remove, {"missing": 1}, (2, 5)),
        (stray, {"orphans": 2}, (3, 9)),
        (lengthen, {"overlong": 1}, (3, 9)),
        (shorten, {"damaged": 2}, (3, 7)),
        (miscount, {"miscounted": 2}, (3, 9)),
        (overlap, {"damaged": 8}, (1, 1)),
        (outside, {"damaged": 8}, (1, 1)),
    ],
)
def test_everything_that_can_be_wrong_is_found_and_repaired(
    place: Path, spoil: object, found: dict[str, int], left: tuple[int, int]
) -> None:
    """Looking changes nothing; repairing drops what is bad and nothing else; then all is well."""
    spoil(place)  # type: ignore[operator]
    for _ in range(2):
        report = verify(str(place), repair=False)
        assert numbers(report) == found and not report.ok and report.problems
    report = verify(str(place), repair=True)
    assert report.repaired and report.problems
    report = verify(str(place), repair=False)
    assert report.ok and (report.entries, report.blocks) == left


def test_repair_leaves_the_rest_readable(place: Path, clock: VirtualClock) -> None:
    """Only the damaged block is a gap afterwards, and its space is given back."""
    flip(place)
    path = path_of(place, "a")
    before = path.stat().st_blocks
    verify(str(place), repair=True)
    assert path.stat().st_blocks == before - BLOCK // 512
    tier = tier_in(place, clock)
    a = key("a", 64 * KiB)
    file = tier.open(a)
    assert file.gaps(whole(a)) == [ByteRange(BLOCK, 2 * BLOCK)]
    assert bytes(file.read(ByteRange(0, BLOCK))) == content(a)[:BLOCK]
    file.close()
    assert sum(s.used for s in tier.stats()) == 8 * BLOCK
    tier.close()


def test_no_more_problems_are_described_than_people_read() -> None:
    """The counts go on, the sentences stop at a thousand."""
    many = VerifyReport(damaged=900, problems=("x",) * 900)
    assert not many.ok
    both = many + many
    assert both.damaged == 1800 and len(both.problems) == 1000


def test_a_cache_in_use_is_refused(place: Path, clock: VirtualClock) -> None:
    """Offline means that nobody else is there."""
    tier = tier_in(place, clock)
    with pytest.raises(Locked):
        verify(str(place), repair=False)
    tier.close()


def test_what_is_no_cache_is_said_so(tmp_path: Path) -> None:
    """A wrong directory, and one that cannot be read."""
    with pytest.raises(SettingError, match="datacache-cache"):
        verify(str(tmp_path), repair=False)
    (tmp_path / MANAGED / "catalogue.db").mkdir(parents=True)
    with pytest.raises(TierBroken, match="cannot be read"):
        verify(str(tmp_path), repair=False)


def test_a_disk_that_fails_while_it_is_verified(
    place: Path, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """TierBroken, and the tier is set aside."""
    from datacache.cache.verify import verify_tier
    from tests.support.faulty_disk import FaultyDisk

    logs.expect("set aside")
    disk = FaultyDisk()
    rules = Rules("ssd:x", 64 * MiB, BLOCK, reserve=0.0)
    tier = DirectoryTier(str(place), rules, owner=OWNER, clock=clock, disk=disk, keeper=False)
    disk.fail = {"read": 30}
    for _ in range(2):
        with pytest.raises(TierBroken):
            verify_tier(tier, repair=True)
    tier.close()
