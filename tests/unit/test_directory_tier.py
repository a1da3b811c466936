"""What a directory tier does when things go wrong: restarts, kills, boots, damage, full and broken disks."""

import errno
import json
import mmap
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from datacache.cache import directory
from datacache.cache.catalogue import checksum
from datacache.cache.directory import MANAGED, DirectoryTier, LentFile, Owner, Rules, read_owner
from datacache.cache.policy import Space
from datacache.cache.store import Store
from datacache.cache.tier import Block
from datacache.cache.verify import verify
from datacache.clock import VirtualClock
from datacache.config.settings import Policy
from datacache.errors import CacheError, Damaged, Locked, TierBroken, TierFull
from datacache.model import ByteRange, CacheKey, GiB, KiB, MiB
from tests.conftest import AnnouncedLogs
from tests.contract.tier_suite import content, key, put, used, whole
from tests.support.faulty_disk import WRITES, FaultyDisk
from tests.support.mapper import Mapper

BLOCK = 16 * KiB
OWNER = Owner(os.getpid(), "/mnt/data", "/run/x.sock")
Open = Callable[..., DirectoryTier]


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """On the disk that tests have; on a tmpfs where a test asks for it (`everywhere`)."""
    if getattr(request, "param", "disk") == "disk":
        yield tmp_path / "cache"
    elif os.path.ismount("/dev/shm"):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
            yield Path(shm) / "cache"
    else:
        pytest.skip("/dev/shm is not a tmpfs here")


everywhere = pytest.mark.parametrize("place", ["disk", "tmpfs"], indirect=True)


@pytest.fixture
def start(place: Path, clock: VirtualClock, disk: FaultyDisk) -> Iterator[Open]:
    """Opens the tier, in boot "one" unless told otherwise; without a keeper: tests call `upkeep`."""
    opened = []

    def start(*, boot: str = "one", quota: int = 64 * MiB, **rules: object) -> DirectoryTier:
        settings = {"reserve": 0.0, "dataset": "mine", **rules}
        tier = DirectoryTier(
            str(place),
            Rules("ssd:x", quota, BLOCK, **settings),  # type: ignore[arg-type]
            owner=OWNER,
            clock=clock,
            disk=disk,
            boot=boot,
            keeper=False,
        )
        opened.append(tier)
        return tier

    yield start
    for tier in opened:
        tier.close()


def files(place: Path) -> list[Path]:
    return sorted(p for p in (place / MANAGED / "objects").rglob("*") if p.is_file())


def read(tier: DirectoryTier, of: CacheKey, span: ByteRange | None = None) -> bytes:
    file = tier.open(of)
    try:
        return bytes(file.read(span or whole(of)))
    finally:
        file.close()


def settle(tier: DirectoryTier) -> None:
    """Let upkeep do all that it has to do."""
    tier.upkeep()
    while tier.store is not None and not tier.store.surveyed:
        tier.upkeep()


# ---- on disk ------------------------------------------------------------------------------------


def test_the_cached_file_is_the_object(start: Open, place: Path) -> None:
    """One plain sparse file an object, byte for byte at the object's own offsets; private to us; what
    lies beside our sub-directory is not ours."""
    place.mkdir()
    (place / "precious").write_text("mine")
    tier = start()
    a = key("a", 1 * MiB)
    file = tier.open(a)
    file.fill(512 * KiB, content(a)[512 * KiB : 528 * KiB])
    (path,) = files(place)
    assert path.stat().st_blocks * 512 <= 32 * KiB
    file.fill(0, content(a))
    file.close()
    assert path.read_bytes() == content(a)
    assert path.name.startswith(a.digest) and path.parent.name == a.digest[:2]
    layout = json.loads((place / MANAGED / "layout.json").read_text())
    assert layout["format"] == 1 and layout["uuid"]
    for found in (place / MANAGED).rglob("*"):
        assert found.stat().st_mode & 0o777 == (0o700 if found.is_dir() else 0o600), found
    assert (place / MANAGED).stat().st_mode & 0o777 == 0o700
    assert (place / "precious").read_text() == "mine"


def test_a_block_never_exceeds_the_block_size(start: Open) -> None:
    """Large fills are cut at aligned boundaries, so that a doubtful read verifies little."""
    tier = start()
    a = key("a", 100 * KiB)
    file = tier.open(a)
    file.fill(1000, content(a)[1000:])
    file.close()
    assert tier.store is not None
    row = tier.store.catalogue.find(bytes.fromhex(a.digest))
    assert row is not None
    spans = [block.span for block in tier.store.catalogue.blocks(row.id)]
    assert spans[0] == ByteRange(1000, BLOCK) and spans[1] == ByteRange(BLOCK, 2 * BLOCK)
    assert spans[-1] == ByteRange(96 * KiB, 100 * KiB) and len(spans) == 7


# ---- restarts, kills, boots ---------------------------------------------------------------------


def test_a_restart_finds_everything(start: Open, clock: VirtualClock) -> None:
    """Bytes, pins, supersession and last opens survive a clean end."""
    tier = start()
    keys = [key(f"k{i}") for i in range(3)]
    for each in keys:
        put(tier, each)
    tier.pin(keys[0], True)
    tier.supersede(keys[1])
    clock.advance(60)
    tier.open(keys[2]).close()
    opened = clock.wall()
    tier.close()
    tier = start()
    assert tier.store is not None and tier.store.surveyed  # nothing to look for after a clean end
    found = {entry.key: entry for entry in tier.entries()}
    assert found[keys[0]].pinned and found[keys[2]].last_open == opened
    assert tier.store.choose(1, Policy.KEEP) == [bytes.fromhex(keys[1].digest)]
    assert all(read(tier, each) == content(each) for each in keys)


def test_after_a_mere_kill_nothing_is_read_again(start: Open, disk: FaultyDisk) -> None:
    """After `kill -9` what was cached is cached, and nothing is read again to prove it: every fill that
    returned is there, and no open waits for a checksum."""
    tier = start()
    keys = [key(f"k{i}", 100 * KiB) for i in range(5)]
    for each in keys:
        put(tier, each)
    tier.abandon()
    tier = start()
    disk.reads = 0
    opened = [tier.open(each) for each in keys]
    assert all(file.gaps(whole(file.key)) == [] for file in opened)
    assert disk.reads == 0
    for file in opened:
        assert bytes(file.read(whole(file.key))) == content(file.key)
        file.close()
    assert disk.reads == 5
    settle(tier)
    assert verify_clean(tier)


def verify_clean(tier: DirectoryTier) -> bool:
    tier.close()
    return verify(tier.path, repair=False).problems == ()


def test_after_another_boot_blocks_are_verified_as_they_are_served(
    start: Open, place: Path, disk: FaultyDisk
) -> None:
    """After a power cut, what was not known to be on the disk is checked, block by block, as it is served.
    A block that does not match its checksum is a miss, never an answer; one that is good is remembered."""
    tier = start(boot="one")
    a = key("a", 64 * KiB)
    put(tier, a)
    tier.abandon()
    (path,) = files(place)
    with path.open("r+b") as damaged:  # what ext4 may leave: the size, and zeros
        damaged.seek(BLOCK)
        damaged.write(bytes(BLOCK))
    tier = start(boot="two")
    disk.reads = 0
    file = tier.open(a)
    assert file.gaps(whole(a)) == [] and disk.reads == 0  # no open waits
    assert file.read_nowait(ByteRange(0, 10)) is None  # in doubt
    assert bytes(file.read(ByteRange(0, 10))) == content(a)[:10]
    assert disk.reads == 2  # one block, then the bytes
    assert file.read_nowait(ByteRange(0, 10)) == content(a)[:10]
    with pytest.raises(Damaged):
        file.read(whole(a))
    assert file.gaps(whole(a)) == [ByteRange(BLOCK, 2 * BLOCK)]
    assert tier.stats()[0].damaged == 1
    assert path.stat().st_blocks * 512 == 48 * KiB  # its space is given back, and counted so
    assert used(tier) == 48 * KiB
    file.fill(BLOCK, content(a)[BLOCK : 2 * BLOCK])
    assert bytes(file.read(whole(a))) == content(a)
    file.close()
    tier.upkeep()  # lazily remembered
    tier.abandon()
    tier = start(boot="two")
    disk.reads = 0
    assert read(tier, a) == content(a) and disk.reads == 1


def test_what_was_synced_is_trusted_after_a_boot(start: Open, clock: VirtualClock, disk: FaultyDisk) -> None:
    """The keeper makes data durable and then says so; only what it had not reached is in doubt."""
    tier = start(boot="one")
    early, late = key("early"), key("late")
    put(tier, early)
    clock.advance(10)
    tier.upkeep()
    assert disk.synced == 1
    put(tier, late)
    tier.abandon()
    tier = start(boot="two")
    for each, reads in ((early, 1), (late, 1 + 7)):
        disk.reads = 0
        assert read(tier, each) == content(each)
        assert disk.reads == reads
    clock.advance(10)
    settle(tier)  # what was verified is synced, too
    tier.abandon()
    tier = start(boot="three")
    disk.reads = 0
    assert read(tier, late) == content(late) and disk.reads == 1


def test_nothing_is_called_synced_before_it_is(
    start: Open, clock: VirtualClock, disk: FaultyDisk, logs: AnnouncedLogs
) -> None:
    """A failing sync leaves the blocks in doubt and sets the tier aside."""
    logs.expect("set aside")
    tier = start(boot="one")
    a = key("a")
    put(tier, a)
    disk.break_down(frozenset({"sync"}))
    clock.advance(10)
    tier.upkeep()
    assert tier.stats()[0].state == "broken"
    tier.abandon()
    disk.heal()
    tier = start(boot="two")
    disk.reads = 0
    assert read(tier, a) == content(a) and disk.reads == 8


def test_many_entries_are_synced_at_once(start: Open, clock: VirtualClock, disk: FaultyDisk) -> None:
    """One sync of the file system instead of a journal commit a file; nothing new, no sync."""
    tier = start()
    for i in range(20):
        put(tier, key(f"k{i}", 4 * KiB))
    clock.advance(10)
    tier.upkeep()
    clock.advance(10)
    tier.upkeep()
    assert disk.rounds == 1 and disk.synced == 0


def test_a_fill_during_a_sync_stays_in_doubt(start: Open, disk: FaultyDisk, clock: VirtualClock) -> None:
    """Blocks recorded after a sync began are not covered by it."""
    tier = start()
    a = key("a", 2 * BLOCK)

    def fill_more() -> None:
        disk.before_sync = None
        file = tier.open(a)
        file.fill(BLOCK, content(a)[BLOCK : 2 * BLOCK])
        file.close()

    disk.before_sync = fill_more
    file = tier.open(a)
    file.fill(0, content(a)[:BLOCK])
    file.close()
    clock.advance(10)
    tier.upkeep()
    tier.abandon()
    tier = start(boot="two")
    disk.reads = 0
    assert read(tier, a, ByteRange(0, BLOCK)) == content(a)[:BLOCK] and disk.reads == 1
    assert read(tier, a, ByteRange(BLOCK, 2 * BLOCK)) == content(a)[BLOCK:] and disk.reads == 3


def test_a_row_that_a_power_cut_brings_back_never_vouches_for_a_newer_file(start: Open, place: Path) -> None:
    """An entry was synced, evicted, and filled anew; the cut takes the catalogue back to before."""
    tier = start(boot="one")
    a = key("a", 8 * KiB)
    put(tier, a)
    assert tier.store is not None
    tier.store.sync()
    tier.abandon()
    shutil.copy(place / MANAGED / "catalogue.db", place / "old")
    tier = start(boot="one")
    tier.evict(a)
    file = tier.open(a)
    file.fill(0, content(a)[: 4 * KiB])  # the rest of the new file is a hole
    file.close()
    tier.abandon()
    for name in ("catalogue.db-wal", "catalogue.db-shm"):
        (place / MANAGED / name).unlink(missing_ok=True)
    shutil.copy(place / "old", place / MANAGED / "catalogue.db")
    tier = start(boot="two")
    file = tier.open(a)
    assert file.gaps(whole(a)) == [whole(a)]
    file.close()
    settle(tier)
    assert files(place) == [] and used(tier) == 0


def test_what_a_crash_left_behind_is_found(start: Open, place: Path) -> None:
    """Files without a row go; bytes without a block give their space back; rows without a file go."""
    tier = start()
    a, lost = key("a", 64 * KiB), key("lost")
    put(tier, lost)
    (path,) = files(place)
    path.unlink()
    file = tier.open(a)
    file.fill(0, content(a)[:BLOCK])
    file.close()
    tier.abandon()
    (path,) = files(place)
    with path.open("r+b") as half:  # a fill that was not recorded
        half.seek(2 * BLOCK)
        half.write(b"x" * BLOCK)
    (path.parent / f"{a.digest}-123").write_bytes(b"x" * 1000)  # a first fill that was not
    (path.parent / "what is this").write_bytes(b"x")
    tier = start()
    assert tier.stats()[0].entries == 2
    settle(tier)
    assert files(place) == [path]
    assert path.stat().st_blocks * 512 == BLOCK == used(tier)
    assert tier.stats()[0].entries == 1
    assert read(tier, a, ByteRange(0, BLOCK)) == content(a)[:BLOCK]


def test_an_entry_whose_file_is_missing_is_dropped_when_it_is_opened(start: Open, place: Path) -> None:
    """No survey has to come first."""
    tier = start()
    a = key("a")
    put(tier, a)
    files(place)[0].unlink()
    file = tier.open(a)
    assert file.gaps(whole(a)) == [whole(a)] and used(tier) == 0
    file.fill(0, content(a))
    assert bytes(file.read(whole(a))) == content(a)
    file.close()


def test_a_file_that_was_cut_short_is_a_miss(start: Open, place: Path) -> None:
    """Also without any doubt: a short read is never an answer."""
    tier = start()
    a = key("a", 64 * KiB)
    put(tier, a)
    os.truncate(files(place)[0], 40 * KiB)
    file = tier.open(a)
    assert bytes(file.read(ByteRange(0, 40 * KiB))) == content(a)[: 40 * KiB]
    assert file.read_nowait(ByteRange(0, 41 * KiB)) is None
    with pytest.raises(Damaged):
        file.read(whole(a))
    assert file.gaps(whole(a)) == [ByteRange(32 * KiB, 64 * KiB)]
    file.close()


def test_an_evicted_open_file_that_was_cut_short_is_an_error(start: Open, place: Path) -> None:
    """No catalogue row is left to judge by; the read still ends, and not with bytes."""
    tier = start()
    a = key("a")
    put(tier, a)
    file = tier.open(a)
    (path,) = files(place)
    tier.evict(a)
    assert not path.exists() and file.held is not None and file.held[1].handle is not None
    os.truncate(file.held[1].handle.fd, 10)
    with pytest.raises(Damaged):
        file.read(whole(a))
    file.close()


def test_an_entry_that_lost_all_of_its_blocks_leaves_no_trace(start: Open, place: Path) -> None:
    """All damaged: once it is closed, file and row are gone."""
    tier = start()
    a = key("a", BLOCK)
    put(tier, a)
    files(place)[0].write_bytes(b"\0" * BLOCK)
    assert tier.recheck(a) == 1
    assert files(place) == [] and list(tier.entries()) == [] and used(tier) == 0
    assert tier.recheck(a) == 0


# ---- full ---------------------------------------------------------------------------------------


def test_a_full_disk_is_full_and_not_broken(start: Open, place: Path, disk: FaultyDisk) -> None:
    """ENOSPC in the middle of a write: nothing is kept, nothing stays behind, nothing is set aside."""
    tier = start()
    a, b = key("a", 64 * KiB), key("b", 64 * KiB)
    file = tier.open(a)
    file.fill(0, content(a)[:BLOCK])
    disk.fail = {"write": errno.ENOSPC}
    for each in (file, tier.open(b)):
        with pytest.raises(TierFull):
            each.fill(BLOCK, content(each.key)[BLOCK:])
        each.close()
    assert used(tier) == BLOCK and len(files(place)) == 1
    assert files(place)[0].stat().st_blocks * 512 == BLOCK
    disk.heal()
    put(tier, b)
    assert tier.stats()[0].state == "ok"
    assert verify_clean(tier)


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (Space(GiB, GiB // 10 + 8 * KiB, 0, 0), "of 1.0 GiB left, and 10% stay free"),
        (Space(GiB, GiB, 1000, 100), "100 of 1000 inodes left"),
    ],
)
def test_a_tenth_of_the_file_system_stays_free(
    start: Open, disk: FaultyDisk, left: Space, reason: str, clock: VirtualClock
) -> None:
    """A tier leaves a tenth of its file system's bytes and inodes free (`--reserve`), and is *full* there,
    not broken; when somebody makes room it is no longer full."""
    disk.left = left
    tier = start(reserve=0.1)
    with pytest.raises(TierFull, match=reason):
        put(tier, key("a", 64 * KiB))
    stats = tier.stats()[0]
    assert stats.state == "full" and reason in stats.reason
    disk.left = None
    clock.advance(1)
    put(tier, key("a", 64 * KiB))
    assert tier.stats()[0].state == "ok"


def test_our_own_fills_count_between_two_looks_at_the_file_system(start: Open, disk: FaultyDisk) -> None:
    """The figure is up to a second old: what was admitted since is subtracted."""
    disk.left = Space(GiB, 40 * KiB, 0, 0)
    tier = start(reserve=0.0)
    put(tier, key("a", 32 * KiB))
    disk.left = Space(GiB, 8 * KiB, 0, 0)
    with pytest.raises(TierFull):
        put(tier, key("b", 32 * KiB))
    assert tier.stats()[0].state == "full"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Space(GiB, 160 * KiB, 0, 0), Space(GiB, 20 * KiB, 0, 0)),
        (Space(GiB, GiB, 1000, 16), Space(GiB, GiB, 1000, 0)),
    ],
    ids=["bytes", "inodes"],
)
def test_what_we_take_beside_our_copies_is_noticed_in_time(
    start: Open, disk: FaultyDisk, before: Space, after: Space
) -> None:
    """Catalogue and directories take space and inodes, too: near its end the file system is asked more
    often than once a second."""
    disk.left = before
    tier = start(reserve=0.0)
    for name in "abc":
        put(tier, key(name, 8 * KiB))
    disk.left = after
    with pytest.raises(TierFull):
        put(tier, key("d", 24 * KiB))


def test_fills_under_way_count_when_the_file_system_is_asked_anew(
    start: Open, disk: FaultyDisk, clock: VirtualClock
) -> None:
    """What was promised to a fill is not on the disk yet when another asks: it is not promised twice."""
    disk.left = Space(GiB, 40 * KiB, 100, 2)
    tier = start(reserve=0.0)
    refused: list[TierFull] = []

    def meanwhile() -> None:
        disk.before_write = None
        clock.advance(2)
        for size in (32 * KiB, 4 * KiB):  # no bytes for the first; bytes and an inode for the second
            try:
                put(tier, key(f"other{size}", size))
            except TierFull as error:
                refused.append(error)

    disk.before_write = meanwhile
    put(tier, key("a", 32 * KiB))
    assert len(refused) == 1 and tier.present(key("other4096", 4 * KiB))
    disk.left = Space(GiB, 40 * KiB, 100, 2)
    clock.advance(2)
    put(tier, key("b", 32 * KiB))  # what has ended is in the file system's own figures


def test_lru_evicts_what_was_opened_longest_ago(start: Open, clock: VirtualClock) -> None:
    """Policy lru: needed room is made; open and pinned entries stay; the keeper goes on to the low
    watermark."""
    tier = start(quota=10 * BLOCK, policy=Policy.LRU, high=0.95, low=0.5)
    keys = [key(f"k{i}", BLOCK) for i in range(10)]
    for each in keys:
        clock.advance(1)
        put(tier, each)
    clock.advance(1)
    tier.open(keys[0]).close()  # the youngest now
    tier.pin(keys[1], True)
    file = tier.open(keys[2])
    put(tier, key("new", BLOCK))
    assert [k for k in keys if not tier.present(k)] == [keys[3]]
    tier.upkeep()
    assert [k.key for k in keys if tier.present(k)] == ["k0", "k1", "k2"] or used(tier) == 5 * BLOCK
    assert used(tier) == 5 * BLOCK and tier.present(keys[0]) and tier.present(keys[1])
    file.close()


def test_idle_and_expired_data_goes_for_what_is_mounted(start: Open, clock: VirtualClock) -> None:
    """Policy keep: another data set's entries go, those of the lowest priority first; so do our own
    that nobody opened for too long; what we opened of others is ours."""
    for name, priority in (("other", 0), ("cheap", -1)):
        tier = start(quota=6 * BLOCK, dataset=name, priority=priority)
        for i in range(2):
            put(tier, key(f"{name}{i}", BLOCK))
        tier.close()
    tier = start(quota=6 * BLOCK, dataset="mine", expire=3600.0)
    put(tier, key("mine0", BLOCK))
    clock.advance(1)
    tier.open(key("other1", BLOCK)).close()
    put(tier, key("mine1", BLOCK))
    gone = []
    for i in range(2, 5):
        put(tier, key(f"mine{i}", BLOCK))
        names = {e.key.key for e in tier.entries()}
        gone.append({"cheap0", "cheap1", "other0", "other1"} - names)
    assert [len(g) for g in gone] == [1, 2, 3] and gone[1] == {"cheap0", "cheap1"}
    assert "other1" not in gone[2]
    with pytest.raises(TierFull):
        put(tier, key("mine5", BLOCK))
    clock.advance(3601)
    put(tier, key("mine6", BLOCK))


def test_a_choice_of_victims_goes_as_far_as_it_must(start: Open, clock: VirtualClock) -> None:
    """More victims than one look at the catalogue finds."""
    tier = start(quota=400 * 4 * KiB, policy=Policy.LRU)
    for i in range(300):
        put(tier, key(f"k{i}", 4 * KiB))
    put(tier, key("big", 399 * 4 * KiB))
    assert tier.present(key("big", 399 * 4 * KiB)) == 399 * 4 * KiB
    assert tier.stats()[0].entries <= 2


def test_a_quota_that_was_made_smaller_holds(start: Open, clock: VirtualClock) -> None:
    """Whatever the policy, after the first round of upkeep; pins are pins."""
    tier = start(quota=10 * BLOCK)
    keys = [key(f"k{i}", BLOCK) for i in range(10)]
    for each in keys:
        clock.advance(1)
        put(tier, each)
    tier.pin(keys[0], True)
    tier.close()
    tier = start(quota=4 * BLOCK)
    with pytest.raises(TierFull):
        put(tier, key("new", BLOCK))
    tier.upkeep()
    assert used(tier) == 4 * BLOCK and tier.present(keys[0])
    assert {k.key for k in keys if tier.present(k)} == {"k0", "k7", "k8", "k9"}


def test_a_lease_holds_as_long_as_it_is_renewed(start: Open, clock: VirtualClock) -> None:
    """A tier that keeps what it has gives it up for a lease, what was opened longest ago first, but nothing
    that is pinned or open; it takes no more than the lease until that ends, and then its quota again."""
    tier = start(quota=10 * BLOCK)
    keys = [key(f"k{i}", BLOCK) for i in range(10)]
    for each in keys:
        clock.advance(1)
        put(tier, each)
    tier.pin(keys[0], True)
    file = tier.open(keys[1])
    assert (tier.stats()[0].lease, tier.stats()[0].lease_entries) == (None, None)
    assert tier.lease(4 * BLOCK, 0, 30.0).bytes == 4 * BLOCK
    with pytest.raises(TierFull, match=r"of its lease of 64\.0 KiB"):
        put(tier, key("new", BLOCK))
    assert used(tier) == 10 * BLOCK, "that is for upkeep to do"
    tier.upkeep()
    assert {k.key for k in keys if tier.present(k)} == {"k0", "k1", "k8", "k9"}
    stats = tier.stats()[0]
    assert (stats.quota, stats.lease, stats.lease_entries, stats.pinned) == (10 * BLOCK, 4 * BLOCK, 0, BLOCK)
    file.close()
    clock.advance(29)
    tier.lease(5 * BLOCK, 0, 30.0)
    put(tier, key("new", BLOCK))
    clock.advance(29.9)
    with pytest.raises(TierFull):
        put(tier, key("another", BLOCK))
    clock.advance(1)
    tier.upkeep()
    assert tier.stats()[0].lease is None
    put(tier, key("another", BLOCK))


def test_a_lease_is_never_above_the_quota(start: Open) -> None:
    """Whatever the node has to lend."""
    tier = start(quota=2 * BLOCK)
    assert tier.lease(9 * BLOCK, 0, 30.0).bytes == 2 * BLOCK
    put(tier, key("a", 2 * BLOCK))
    with pytest.raises(TierFull, match="lease"):
        put(tier, key("b", BLOCK))


def test_a_lease_of_files(start: Open, clock: VirtualClock) -> None:
    """A disk may have bytes left and no inodes: entries are leased, too, and given up by the same rules."""
    tier = start(quota=64 * MiB)
    for i in range(300):
        clock.advance(1)
        put(tier, key(f"k{i}", 4 * KiB))
    tier.lease(64 * MiB, 20, 30.0)
    tier.upkeep()
    assert tier.stats()[0].entries == 20
    assert tier.present(key("k299", 4 * KiB)) and not tier.present(key("k279", 4 * KiB))
    with pytest.raises(TierFull, match="20 of its lease of 20 files"):
        put(tier, key("new", 4 * KiB))
    tier.evict(key("k299", 4 * KiB))
    put(tier, key("new", 4 * KiB))
    tier.lease(64 * MiB, 0, 30.0)
    put(tier, key("more", 4 * KiB))


def test_a_lease_of_nothing(start: Open) -> None:
    """All goes but what is pinned."""
    tier = start()
    for name in "abc":
        put(tier, key(name))
    tier.pin(key("b"), True)
    tier.lease(0, 0, 30.0)
    tier.upkeep()
    assert [entry.key.key for entry in tier.entries()] == ["b"]


def test_a_lease_outlives_the_store(
    start: Open, disk: FaultyDisk, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """A tier that was set aside comes back with the lease that holds now."""
    logs.expect("cache tier ssd:x is set aside: Input/output error")
    tier = start(quota=10 * BLOCK)
    put(tier, key("a", BLOCK))
    disk.break_down()
    with pytest.raises(TierBroken):
        put(tier, key("b", BLOCK))
    tier.lease(2 * BLOCK, 0, 600.0)
    disk.heal()
    clock.advance(20)
    tier.upkeep()
    put(tier, key("b", BLOCK))
    with pytest.raises(TierFull, match="lease"):
        put(tier, key("c", BLOCK))


def test_what_is_pinned_is_known_soon(start: Open, clock: VirtualClock) -> None:
    """The sum of pinned bytes follows pins at the next round of upkeep, and evictions half a minute later."""
    tier = start()
    for name in "abc":
        put(tier, key(name, BLOCK))
    tier.upkeep()
    assert tier.stats()[0].pinned == 0
    tier.pin(key("a", BLOCK), True)
    tier.pin(key("b", BLOCK), True)
    tier.upkeep()
    assert tier.stats()[0].pinned == 2 * BLOCK
    tier.evict(key("a", BLOCK))
    clock.advance(30)
    tier.upkeep()
    assert tier.stats()[0].pinned == BLOCK
    tier.close()
    assert start().stats()[0].pinned == BLOCK


def test_too_many_open_files_is_not_an_illness(start: Open, disk: FaultyDisk) -> None:
    """Entries open empty, fills say what to do, and nothing is set aside."""
    tier = start()
    a = key("a")
    put(tier, a)
    disk.fail = {"open": errno.EMFILE, "create": errno.EMFILE}
    file = tier.open(a)
    assert file.gaps(whole(a)) == [whole(a)]
    b = tier.open(key("b"))
    with pytest.raises(TierFull, match="ulimit"):
        b.fill(0, b"x")
    b.close()
    disk.heal()
    assert bytes(file.read(whole(a))) == content(a)  # by itself
    file.close()


# ---- broken -------------------------------------------------------------------------------------


def test_a_broken_disk_is_set_aside_and_comes_back(
    start: Open, disk: FaultyDisk, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """A broken tier is set aside with one warning and comes back by itself. Until then open entries are
    empty, fills fail, nothing hangs; after ten seconds, when the disk works again, everything that was
    there is there, also for files that stayed open."""
    logs.expect("cache tier ssd:x is set aside: Input/output error")
    tier = start()
    a, b = key("a"), key("b")
    put(tier, a)
    file = tier.open(a)
    disk.break_down()
    with pytest.raises(TierBroken):
        put(tier, b)
    assert tier.stats()[0].state == "broken" and "Input/output" in tier.stats()[0].reason
    assert file.gaps(whole(a)) == [whole(a)]
    for attempt in (
        lambda: file.read(whole(a)),
        lambda: tier.recheck(a),
        lambda: file.fill(0, b"x"),
        lambda: put(tier, b),
    ):
        with pytest.raises(TierBroken):
            attempt()
    assert file.read_nowait(whole(a)) is None
    assert tier.present(a) == 0 and tier.evict(a) == 0 and list(tier.entries()) == []
    assert tier.coldest(1) == []
    tier.pin(a, True)
    clock.advance(10)
    tier.upkeep()  # still broken
    assert tier.stats()[0].state == "broken"
    disk.heal()
    tier.upkeep()  # not yet time to try again
    assert tier.stats()[0].state == "broken"
    clock.advance(10)
    tier.upkeep()
    assert tier.stats()[0].state == "ok"
    assert bytes(file.read(whole(a))) == content(a)
    file.close()
    put(tier, b)
    assert len(logs.messages()) == 1


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.ESTALE])
def test_reads_go_on_from_a_disk_that_cannot_be_written(
    start: Open, disk: FaultyDisk, code: int, logs: AnnouncedLogs
) -> None:
    """Read-only: the tier is set aside at the first write, with the cause."""
    logs.expect(os.strerror(code))
    tier = start()
    put(tier, key("a"))
    disk.break_down(WRITES, code)
    with pytest.raises(TierBroken):
        put(tier, key("b"))
    assert os.strerror(code) in tier.stats()[0].reason


def test_a_bad_spot_is_a_miss_but_a_dying_disk_is_set_aside(
    start: Open, disk: FaultyDisk, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """A read that fails now and then drops its block; three within ten seconds are too many."""
    logs.expect("set aside")
    tier = start()
    keys = [key(f"k{i}", BLOCK) for i in range(4)]
    for each in keys:
        put(tier, each)
    for each in keys[:2]:
        disk.fail = {"read": errno.EIO}
        with pytest.raises(Damaged):
            read(tier, each)
        disk.heal()
        clock.advance(6)
        assert tier.present(each) == 0
    assert tier.stats()[0].state == "ok"
    disk.fail = {"read": errno.EIO}
    with pytest.raises(Damaged):
        read(tier, keys[2])
    with pytest.raises(TierBroken):
        read(tier, keys[3])


def test_a_directory_deleted_underneath_is_made_anew(
    start: Open, place: Path, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """rm -rf of a cache in use: set aside within a round of upkeep, back and empty ten seconds later."""
    logs.expect("the directory was deleted while it was in use")
    tier = start()
    a = key("a")
    put(tier, a)
    file = tier.open(a)
    shutil.rmtree(place)
    tier.upkeep()
    assert tier.stats()[0].state == "broken"
    clock.advance(10)
    tier.upkeep()
    assert tier.stats()[0].state == "ok" and tier.stats()[0].entries == 0
    assert file.gaps(whole(a)) == [whole(a)]
    file.fill(0, content(a))
    assert bytes(file.read(whole(a))) == content(a)
    file.close()


def test_a_fill_notices_a_deleted_directory(start: Open, place: Path, logs: AnnouncedLogs) -> None:
    """Before upkeep does."""
    logs.expect("set aside")
    tier = start()
    shutil.rmtree(place)
    with pytest.raises(TierBroken):
        put(tier, key("a"))


def test_never_two_owners_of_a_directory_made_anew(
    start: Open, place: Path, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """Somebody else took the directory over while ours was gone: we stay away until it is free."""
    logs.expect("set aside")
    tier = start()
    put(tier, key("a"))
    shutil.rmtree(place)
    other = start()
    put(other, key("b"))
    tier.upkeep()
    clock.advance(10)
    tier.upkeep()
    assert "in use by process" in tier.stats()[0].reason
    assert files(place)[0].name.startswith(key("b").digest)
    other.close()
    clock.advance(10)
    tier.upkeep()
    assert tier.present(key("b")) == key("b").size


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_mount_point_without_its_disk_is_not_a_cache(
    start: Open, place: Path, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """The disk was unmounted underneath: what lies below is not ours to fill."""
    logs.expect("set aside")
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        tier = start()
        put(tier, key("a"))
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    tier.upkeep()
    with suppress(CacheError):
        put(tier, key("c"))
    shutil.rmtree(place / MANAGED, ignore_errors=True)
    assert tier.store is None or tier.store.figures()[1] >= 1
    for _ in range(2):
        clock.advance(10)
        tier.upkeep()
    assert not (place / MANAGED).exists()


def test_a_catalogue_that_breaks_in_use_is_begun_anew(
    start: Open, place: Path, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """SQLite says that its file is malformed: the tier comes back empty, and works."""
    logs.expect("set aside")
    logs.expect("is emptied")
    tier = start()
    for i in range(50):
        put(tier, key(f"k{i}", 4 * KiB))
    tier.close()
    tier = start()
    path = place / MANAGED / "catalogue.db"
    raw = path.read_bytes()
    path.write_bytes(raw[:4096] + b"\xa5" * (len(raw) - 4096))
    for i in range(50):
        tier.present(key(f"k{i}", 4 * KiB))
    assert tier.stats()[0].state == "broken"
    clock.advance(10)
    tier.upkeep()
    assert tier.stats()[0].state == "ok" and tier.stats()[0].entries == 0
    put(tier, key("a"))
    settle(tier)
    assert len(files(place)) == 1
    assert verify_clean(tier)


# ---- what an older or broken directory holds ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("layout.json", b'{"format": 0}', "it has format 0"),
        ("layout.json", b"{", "its layout.json is damaged"),
        ("layout.json", b"[1]", "its layout.json is damaged"),
        ("catalogue.db", b"this is not a database" * 1000, "its catalogue is damaged"),
    ],
)
def test_a_cache_that_cannot_be_read_is_emptied(
    start: Open, place: Path, name: str, text: bytes, why: str, logs: AnnouncedLogs
) -> None:
    """A cache may always begin anew; it says so."""
    logs.expect(why)
    tier = start()
    a = key("a")
    put(tier, a)
    tier.close()
    (place / MANAGED / name).write_bytes(text)
    tier = start()
    assert tier.present(a) == 0 and used(tier) == 0
    put(tier, a)
    settle(tier)
    assert len(files(place)) == 1
    assert not [p for p in (place / MANAGED).iterdir() if p.name.startswith("trash")]
    assert len(logs.messages()) == 1


# ---- one owner ----------------------------------------------------------------------------------


def test_one_live_owner(start: Open, place: Path) -> None:
    """A second owner is refused with the first one's pid and mount; the live owner can be asked for."""
    assert read_owner(str(place)) is None
    tier = start()
    with pytest.raises(Locked, match=f"in use by process {os.getpid()}, mounted at /mnt/data") as caught:
        start()
    assert caught.value.pid == os.getpid() and caught.value.mount == "/mnt/data"
    assert read_owner(str(place)) == OWNER
    tier.close()
    assert read_owner(str(place)) is None
    start()


def test_the_lock_of_a_dead_process_is_taken(start: Open, place: Path) -> None:
    """However it died."""
    program = (
        "import sys, os\n"
        "from datacache.cache.directory import *\n"
        "from datacache.clock import SystemClock\n"
        "tier = DirectoryTier(sys.argv[1], Rules('x', 1 << 30, 1 << 20), owner=Owner(os.getpid(), '/m', ''),"
        " clock=SystemClock())\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        with pytest.raises(Locked, match=f"process {child.pid}, mounted at /m"):
            start()
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert read_owner(str(place)) is None
    start()


def test_a_lock_file_without_a_name_in_it_still_locks(start: Open, place: Path) -> None:
    """An owner that has only just taken the lock."""
    start()
    os.truncate(place / MANAGED / "lock", 0)
    with pytest.raises(Locked):
        start()
    assert read_owner(str(place)) == Owner(0, "", "")


# ---- concurrency --------------------------------------------------------------------------------


def test_a_second_fill_of_the_same_bytes_waits_for_the_first(start: Open, disk: FaultyDisk) -> None:
    """When it returns the bytes are readable; they were written once."""
    tier = start()
    a = key("a", BLOCK)
    written, at_the_disk, go_on = [], threading.Event(), threading.Event()

    def before_write() -> None:
        written.append(1)
        at_the_disk.set()
        assert go_on.wait(10)

    disk.before_write = before_write
    one = threading.Thread(target=put, args=(tier, a))
    one.start()
    assert at_the_disk.wait(10)
    file = tier.open(a)
    assert file.gaps(whole(a)) == [whole(a)]
    two = threading.Thread(target=file.fill, args=(0, content(a)))
    two.start()
    go_on.set()
    one.join()
    two.join()
    assert bytes(file.read(whole(a))) == content(a) and len(written) == 1
    file.close()


@pytest.mark.parametrize("policy", list(Policy))
def test_room_is_made_for_others_of_the_same_file_system(start: Open, place: Path, policy: Policy) -> None:
    """Pins and the policy hold: what this data set reads again stays, but where the policy is lru."""
    tier = start(policy=policy)
    keys = [key(f"k{i}", BLOCK) for i in range(4)]
    for each in keys:
        put(tier, each)
    tier.pin(keys[0], True)
    tier.supersede(keys[3])
    device = os.stat(place).st_dev
    assert tier.make_room(device + 1, 4 * BLOCK) == 0
    freed = tier.make_room(device, 4 * BLOCK)
    left = [each.key for each in keys if tier.present(each)]
    assert left == (["k0"] if policy is Policy.LRU else ["k0", "k1", "k2"])
    assert freed == (4 - len(left)) * BLOCK


def test_an_entry_that_is_evicted_while_it_is_filled_is_not_recorded(
    start: Open, disk: FaultyDisk, place: Path
) -> None:
    """The filler is told; neither row nor file nor count stays behind."""
    tier = start()
    a = key("a", 2 * BLOCK)
    file = tier.open(a)
    file.fill(0, content(a)[:BLOCK])
    disk.before_write = lambda: tier.evict(a) and None
    with pytest.raises(TierFull, match="evicted"):
        file.fill(BLOCK, content(a)[BLOCK:])
    with pytest.raises(TierFull, match="evicted"):
        file.fill(BLOCK, content(a)[BLOCK:])
    assert bytes(file.read(ByteRange(0, BLOCK))) == content(a)[:BLOCK]
    file.close()
    assert used(tier) == 0 and files(place) == [] and list(tier.entries()) == []


def test_the_keeper_works_by_itself(place: Path, clock: VirtualClock, disk: FaultyDisk) -> None:
    """The thread of a tier does upkeep without being asked, and ends with the tier."""
    rules = Rules("ssd:x", 64 * MiB, BLOCK, reserve=0.0, dataset="mine")
    tier = DirectoryTier(str(place), rules, owner=OWNER, clock=clock, disk=disk)
    looked = threading.Event()

    put(tier, key("a"))
    clock.advance(10)
    disk.before_sync = looked.set
    assert looked.wait(10)
    assert "ssd:x" in repr(tier) and "1 entries" in repr(tier)
    tier.close()
    assert "closed" in repr(tier)
    assert tier.open(key("a")).gaps(ByteRange(0, 1)) == [ByteRange(0, 1)]


# ---- lent to the kernel -------------------------------------------------------------------------


def lend(tier: DirectoryTier, of: CacheKey) -> LentFile:
    lent = tier.lend(of)
    assert lent is not None
    return lent


def mapped(tier: DirectoryTier, of: CacheKey) -> Mapper:
    """A mapping of a cached file that outlives its loan, in another process."""
    lent = lend(tier, of)
    try:
        return Mapper(lent.descriptor, of.size)
    finally:
        lent.close()


def gone(place: Path) -> list[Path]:
    return sorted((place / MANAGED / "gone").glob("*"))


@everywhere
def test_a_mapping_keeps_its_file_from_eviction_by_policy(start: Open, place: Path) -> None:
    """A loan that was closed proves nothing: while somebody maps the file another victim is chosen, and
    when there is none the tier is full."""
    tier = start(quota=4 * BLOCK)
    keys = [key(f"k{i}", BLOCK) for i in range(4)]
    for each in keys:
        put(tier, each)
        tier.supersede(each)
    with mapped(tier, keys[0]) as one, mapped(tier, keys[1]) as two:
        put(tier, key("new", 2 * BLOCK))
        assert [tier.present(each) for each in keys] == [BLOCK, BLOCK, 0, 0]
        with pytest.raises(TierFull):
            put(tier, key("newer", BLOCK))
        assert one.sees(content(keys[0])) and two.sees(content(keys[1]))
    tier.upkeep()
    put(tier, key("newer", BLOCK))
    assert [tier.present(each) for each in keys[:2]].count(BLOCK) == 1
    assert gone(place) == []


@everywhere
def test_a_mapped_file_that_is_evicted_counts_until_it_is_unmapped(start: Open, place: Path) -> None:
    """Evict takes it from the tier at once; the space comes back with the mapping's end."""
    tier = start(quota=4 * BLOCK)
    a = key("a", 3 * BLOCK)
    put(tier, a)
    with mapped(tier, a) as mapping:
        assert tier.evict(a) == a.size
        assert tier.present(a) == 0 and tier.lend(a) is None and files(place) == []
        for _ in range(2):
            tier.upkeep()
            assert used(tier) == a.size and len(gone(place)) == 1
        with pytest.raises(TierFull):
            put(tier, key("b", 2 * BLOCK))
        assert used(tier) == 4 * BLOCK and mapping.sees(content(a))
    tier.upkeep()
    assert used(tier) == BLOCK and gone(place) == []
    put(tier, key("c", 3 * BLOCK))


@everywhere
def test_an_open_file_that_is_evicted_and_mapped_counts_after_its_close(start: Open, place: Path) -> None:
    """Whoever lets go last gives the space back: open file, loan, or mapping."""
    tier = start()
    a = key("a", BLOCK)
    put(tier, a)
    file, lent = tier.open(a), lend(tier, a)
    with Mapper(lent.descriptor, a.size) as mapping:
        tier.evict(a)
        file.close()
        lent.close()
        assert used(tier) == BLOCK and mapping.sees(content(a))
    tier.upkeep()
    assert used(tier) == 0 and gone(place) == []


@everywhere
def test_a_successor_honours_mappings_that_it_knows_nothing_of(start: Open, place: Path) -> None:
    """After `kill -9` files that the kernel still reads are neither evicted by policy nor forgotten by
    the quota, also those that had left the tier before."""
    tier = start(quota=4 * BLOCK)
    a, b = key("a", BLOCK), key("b", BLOCK)
    for each in (a, b):
        put(tier, each)
    with mapped(tier, a) as one, mapped(tier, b) as two:
        tier.evict(a)
        tier.abandon()
        tier = start(quota=4 * BLOCK)
        assert used(tier) == 2 * BLOCK
        tier.supersede(b)
        settle(tier)
        with pytest.raises(TierFull):
            put(tier, key("c", 3 * BLOCK))
        assert tier.present(b) == BLOCK
        tier.evict(b)
        tier.close()
        tier = start(quota=4 * BLOCK)
        tier.evict(key("c", 3 * BLOCK))
        settle(tier)
        assert used(tier) == 2 * BLOCK
        assert one.sees(content(a)) and two.sees(content(b))
    tier.upkeep()
    assert used(tier) == 0 and gone(place) == []


@everywhere
@pytest.mark.parametrize("closed", [True, False])
def test_damage_in_a_file_that_is_read_elsewhere_drops_the_entry(
    start: Open, place: Path, closed: bool, logs: AnnouncedLogs
) -> None:
    """Whoever maps it would see zeros where a bad block is taken out: the file stays as it is, and the
    object is fetched anew into another one."""
    logs.expect("is damaged, and its file may be open elsewhere")
    tier = start()
    a = key("a", 4 * BLOCK)
    put(tier, a)
    lent = lend(tier, a)
    mapping = Mapper(lent.descriptor, a.size)
    if closed:
        lent.close()
    (path,) = files(place)
    with path.open("r+b") as damaged:
        damaged.seek(BLOCK)
        damaged.write(b"\xff" * 10)
    as_it_lies = path.read_bytes()
    assert tier.recheck(a) == 1
    assert mapping.sees(as_it_lies)
    assert tier.present(a) == 0 and tier.stats()[0].damaged == 1
    put(tier, a)
    assert read(tier, a) == content(a) and used(tier) == 8 * BLOCK
    anew = lend(tier, a)
    assert anew.identity != lent.identity
    anew.close()
    lent.close()
    tier.upkeep()
    assert used(tier) == 8 * BLOCK and mapping.sees(as_it_lies)
    mapping.unmap()
    tier.upkeep()
    assert used(tier) == 4 * BLOCK and gone(place) == []
    assert verify_clean(tier)


def test_a_reader_of_a_damaged_entry_that_is_lent_gets_no_damaged_bytes(
    start: Open, place: Path, logs: AnnouncedLogs
) -> None:
    """For whom we read, the bad block is a gap, as ever; what is good he reads on."""
    logs.expect("is damaged, and its file may be open elsewhere")
    tier = start(boot="one")
    a = key("a", 4 * BLOCK)
    put(tier, a)
    file, lent = tier.open(a), lend(tier, a)
    with files(place)[0].open("r+b") as damaged:
        damaged.write(b"\xff")
    assert tier.recheck(a) == 1
    assert file.gaps(whole(a)) == [ByteRange(0, BLOCK)]
    with pytest.raises(Damaged):
        file.read(whole(a))
    assert bytes(file.read(ByteRange(BLOCK, a.size))) == content(a)[BLOCK:]
    with pytest.raises(TierFull):
        file.fill(0, content(a))
    file.close()
    lent.close()
    assert used(tier) == 0 and gone(place) == []


def test_what_is_in_doubt_is_not_lent(start: Open) -> None:
    """After a power cut a file is lent again when its last block was found good, and not before."""
    tier = start(boot="one")
    a = key("a", 2 * BLOCK)
    put(tier, a)
    tier.abandon()
    tier = start(boot="two")
    assert tier.lend(a) is None
    file = tier.open(a)
    file.read(ByteRange(0, 1))
    assert tier.lend(a) is None
    file.read(whole(a))
    lend(tier, a).close()
    file.close()


def test_what_is_in_doubt_is_not_read_in_one_go(start: Open) -> None:
    """Nothing would hold it against its checksum; afterwards it is, as what was filled since the boot."""
    tier = start(boot="one")
    a = key("a", 2 * BLOCK)
    put(tier, a)
    assert tier.read_whole(a) == content(a)
    tier.abandon()
    tier = start(boot="two")
    assert tier.read_whole(a) is None
    file = tier.open(a)
    file.read(whole(a))
    assert tier.read_whole(a) is None  # it is open: that open knows better
    file.close()
    store = tier.store
    assert store is not None
    store.flush()
    assert tier.read_whole(a) == content(a)


def test_what_was_cut_short_is_not_read_in_one_go(start: Open, place: Path) -> None:
    """A short read is never an answer; what is missing is found missing by the read that follows."""
    tier = start()
    a = key("a", BLOCK)
    put(tier, a)
    os.truncate(files(place)[0], BLOCK - 1)
    assert tier.read_whole(a) is None
    os.unlink(files(place)[0])
    assert tier.read_whole(a) is None


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK + 1])
def test_a_file_of_another_size_than_its_object_is_not_lent(start: Open, place: Path, size: int) -> None:
    """Somebody was at it: a mapping would be killed past its end, or the kernel read too much."""
    tier = start()
    a = key("a", BLOCK)
    put(tier, a)
    os.truncate(files(place)[0], size)
    assert tier.lend(a) is None
    tier.evict(a)
    put(tier, a)
    files(place)[0].unlink()
    assert tier.lend(a) is None


def test_a_loan_counts_as_a_last_open(start: Open, clock: VirtualClock) -> None:
    """What the kernel was given is what this data set reads; what was refused is not."""
    tier = start()
    a, b = key("a", BLOCK), key("b", BLOCK)
    put(tier, a)
    file = tier.open(b)
    file.fill(0, content(b)[:10])
    file.close()
    clock.advance(100)
    lend(tier, a).close()
    assert tier.lend(b) is None
    opened = {entry.key: entry.last_open for entry in tier.entries()}
    assert opened[a] == clock.wall() and opened[b] == clock.wall() - 100


def test_a_file_system_without_leases_counts_by_our_own_opens(
    start: Open, disk: FaultyDisk, logs: AnnouncedLogs
) -> None:
    """NFS and CephFS cannot tell who reads a file: it is in use until its loan is closed; one line says
    so; and damage never turns what may be mapped into zeros."""
    logs.expect("cannot tell who reads a file")
    logs.expect("is damaged, and its file may be open elsewhere")
    disk.fail = {"lease": errno.EINVAL}
    tier = start(quota=4 * BLOCK)
    a, b, c = key("a", 2 * BLOCK), key("b", 2 * BLOCK), key("c", 2 * BLOCK)
    for each in (a, b):
        put(tier, each)
        tier.supersede(each)
    lent = lend(tier, a)
    put(tier, c)
    assert tier.present(a) and not tier.present(b)
    tier.evict(a)
    assert used(tier) == 4 * BLOCK
    lent.close()
    assert used(tier) == 2 * BLOCK
    with files(Path(tier.path))[0].open("r+b") as damaged:
        damaged.write(b"\xff")
    assert tier.recheck(c) == 1
    assert used(tier) == 0 and files(Path(tier.path)) == []
    assert sum("cannot tell" in message for message in logs.messages()) == 1


@everywhere
def test_what_a_crash_left_behind_counts_while_it_is_mapped(start: Open, place: Path) -> None:
    """A file without a row goes, but its space is not free before its readers have gone."""
    tier = start()
    a = key("a", 2 * BLOCK)
    put(tier, a)
    with mapped(tier, a) as mapping:
        assert tier.store is not None
        row = tier.store.catalogue.find(bytes.fromhex(a.digest))
        assert row is not None
        tier.store.catalogue.remove(row.id)  # an eviction that was killed halfway
        tier.abandon()
        tier = start()
        settle(tier)
        assert files(place) == [] and used(tier) == a.size and mapping.sees(content(a))
    tier.upkeep()
    assert used(tier) == 0 and gone(place) == []


@everywhere
def test_a_cache_that_is_emptied_counts_what_is_mapped(start: Open, place: Path, logs: AnnouncedLogs) -> None:
    """The catalogue is lost, and with it what the file was; not that it takes space."""
    logs.expect("is emptied")
    tier = start()
    a = key("a", 2 * BLOCK)
    put(tier, a)
    with mapped(tier, a) as mapping:
        tier.close()
        for lost in (place / MANAGED).glob("catalogue.db*"):
            lost.write_bytes(b"no database" * 1000)
        tier = start()
        settle(tier)
        assert list(tier.entries()) == [] and used(tier) == a.size and mapping.sees(content(a))
        assert list((place / MANAGED).glob("trash-*")) == []
    tier.upkeep()
    assert used(tier) == 0 and gone(place) == []


def test_a_loan_outlives_its_tier(start: Open, disk: FaultyDisk, logs: AnnouncedLogs) -> None:
    """Set aside, back, or closed: who was lent a file keeps it."""
    logs.expect("is set aside")
    tier = start()
    a = key("a", BLOCK)
    put(tier, a)
    lent = lend(tier, a)
    assert str(lent.descriptor) in repr(lent)
    disk.break_down()
    with suppress(CacheError):
        tier.recheck(key("other"))
        put(tier, key("b", BLOCK))
    assert tier.stats()[0].state == "broken" and tier.lend(a) is None
    assert os.pread(lent.descriptor, a.size, 0) == content(a)
    disk.heal()
    lent.close()
    assert repr(lent).endswith("closed>")


@everywhere
def test_quotas_hold_while_lent_files_are_unlinked(start: Open, place: Path) -> None:
    """Fills, loans, mappings that outlive them, evictions by hand and by policy, all at once: what lies
    on the disk is never more than the quota, mapped bytes never change, and in the end all of it is given
    back."""
    quota = 24 * BLOCK
    tier = start(quota=quota, policy=Policy.LRU, high=1.0, low=1.0)
    keys = [key(f"k{i}", (1 + i % 4) * BLOCK - i) for i in range(16)]
    begin, ended = threading.Barrier(6), threading.Event()

    def fill(seed: int) -> int:
        order, kept = random.Random(seed), 0
        begin.wait()
        for _ in range(150):
            with suppress(TierFull):
                put(tier, order.choice(keys))
                kept += 1
        return kept

    def map_and_read(seed: int) -> int:
        order, maps = random.Random(seed), list[tuple[CacheKey, mmap.mmap]]()
        begin.wait()
        seen = 0
        while not ended.is_set():
            each = order.choice(keys)
            lent = tier.lend(each)
            if lent is not None:
                maps.append((each, mmap.mmap(lent.descriptor, each.size, prot=mmap.PROT_READ)))
                lent.close()
                seen += 1
            while len(maps) > order.randrange(1, 4):
                of, pages = maps.pop(order.randrange(len(maps)))
                assert pages[:] == content(of)
                pages.close()
        for of, pages in maps:
            assert pages[:] == content(of)
            pages.close()
        return seen

    def watch() -> int:
        most = 0
        begin.wait()
        while not ended.is_set():
            tier.upkeep()
            assert used(tier) <= quota
            most = max(most, len(gone(place)))
        return most

    def drop(seed: int) -> None:
        order = random.Random(seed)
        begin.wait()
        while not ended.is_set():
            tier.evict(order.choice(keys))

    with ThreadPoolExecutor(6) as pool:
        fillers = [pool.submit(fill, seed) for seed in range(2)]
        readers = [pool.submit(map_and_read, seed) for seed in range(2)]
        others = [pool.submit(watch), pool.submit(drop, 9)]
        try:
            kept = [filler.result() for filler in fillers]
        finally:
            ended.set()
        assert min(kept) > 0 and all(reader.result() > 0 for reader in readers)
        assert others[0].result(), "files were unlinked while they were mapped"
        others[1].result()
    for each in keys:
        tier.evict(each)
    tier.upkeep()
    assert used(tier) == 0 and files(place) == [] and gone(place) == []


def test_an_open_that_comes_while_we_ask_waits_and_no_signal_ends_us(tmp_path: Path) -> None:
    """The lease that tells who reads a file is broken by an open: the open succeeds, and the signal that
    announces it, which would end a process as SIGIO, does nothing."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    program = """if True:
        import os, signal, sys, threading
        from datacache.cache.disk import Disk
        disk, ended, opens, broken = Disk(), threading.Event(), [], []
        fd = os.open(sys.argv[1], os.O_RDONLY)
        def others():
            while not ended.is_set():
                os.close(os.open(sys.argv[1], os.O_RDWR))
                opens.append(1)
        signal.signal(signal.SIGURG, lambda *_: broken.append(1))
        thread = threading.Thread(target=others)
        thread.start()
        try:
            for _ in range(200000):
                disk.alone(fd)
                if len(broken) >= 3:
                    break
            signal.signal(signal.SIGURG, signal.SIG_DFL)
            for _ in range(20000):
                disk.alone(fd)
        finally:
            ended.set()
            thread.join()
        assert disk.alone(fd)
        print(len(broken), bool(opens))
    """
    ended = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert ended.returncode == 0, (ended.returncode, ended.stderr)
    broken, opened = ended.stdout.split()
    assert opened == "True"
    assert int(broken) >= 3, "opens came in between"


def test_things_tell_what_they_are(start: Open) -> None:
    """repr of files, entries and the catalogue."""
    tier = start()
    file = tier.open(key("a"))
    assert "'a'" in repr(file) and file.held is not None
    assert "users=1" in repr(file.held[1]) and "Handle" not in repr(file)
    assert tier.store is not None and "epoch" in repr(tier.store.catalogue)
    file.close()
    assert "closed" in repr(file)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR])
def test_a_disk_that_is_full_when_it_is_opened_is_set_aside_and_comes_back(
    start: Open, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, logs: AnnouncedLogs, code: int
) -> None:
    """Else a daemon that is started again on a full disk could not start at all, and its mount were lost."""
    logs.expect("is set aside")
    tier = start()
    put(tier, key("a"))
    tier.close()

    def no_room(*_: object, **__: object) -> Store:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = code
        raise error

    with monkeypatch.context() as full:
        full.setattr(directory, "Store", no_room)
        tier = start()
        assert tier.stats()[0].state == "broken"
        assert tier.present(key("a")) == 0
        with pytest.raises(TierBroken):
            put(tier, key("b"))
    clock.advance(directory.RETRY_EVERY + 1)
    tier.upkeep()
    assert tier.stats()[0].state == "ok"
    assert tier.present(key("a")) == key("a").size


# ---- whole files, from elsewhere and to elsewhere -------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Another directory on the same file system."""
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def blocks_of(of: CacheKey) -> list[Block]:
    data = content(of)
    spans = [(at, min(at + BLOCK, of.size)) for at in range(0, of.size, BLOCK)]
    return [Block(start, stop, checksum(data[start:stop])) for start, stop in spans]


def take(tier: DirectoryTier, of: CacheKey, file: Path) -> bool:
    """Have a file that holds what it should taken."""
    file.write_bytes(content(of))
    descriptor = os.open(file, os.O_RDONLY)
    try:
        taking = tier.admit(of, descriptor)
        if taking is None:
            return False
        taken = taking.take(descriptor, blocks_of(of))
        taking.close()
        return taken
    finally:
        os.close(descriptor)


def give(tier: DirectoryTier, of: CacheKey, file: Path) -> bool:
    at = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return tier.surrender(of, at, file.name) is not None
    finally:
        os.close(at)


def test_a_whole_file_is_taken_as_it_is(start: Open, place: Path, elsewhere: Path) -> None:
    """It is the cached file, under a name of the cache's own, and lives when its first name is gone."""
    tier, a = start(), key("a")
    assert take(tier, a, elsewhere / "1")
    assert [path.stat().st_ino for path in files(place)] == [(elsewhere / "1").stat().st_ino]
    (elsewhere / "1").unlink()
    assert (
        read(tier, a) == content(a) and lend(tier, a) and used(tier) == files(place)[0].stat().st_blocks * 512
    )
    tier.close()
    assert read(start(boot="two"), a) == content(a)
    assert not take(tier, a, elsewhere / "2")


def test_what_is_here_already_is_not_taken_again(start: Open, elsewhere: Path) -> None:
    """In part, whole, or open and about to be filled."""
    tier, a, b = start(), key("a"), key("b")
    file = tier.open(a)
    assert not take(tier, a, elsewhere / "1")
    file.fill(0, content(a)[:BLOCK])
    file.close()
    before = used(tier)
    assert not take(tier, a, elsewhere / "1")
    (elsewhere / "2").write_bytes(content(b))
    descriptor = os.open(elsewhere / "2", os.O_RDONLY)
    taking = tier.admit(b, descriptor)
    assert taking is not None and used(tier) > before
    put(tier, b)
    assert not taking.take(descriptor, blocks_of(b))
    taking.close()
    taking.close()
    os.close(descriptor)
    assert used(tier) == before + -(-b.size // 4096) * 4096
    assert verify_clean(tier)


def test_what_cannot_have_another_name_is_not_taken(
    start: Open, place: Path, elsewhere: Path, disk: FaultyDisk
) -> None:
    """A file that has none any more, of another size, or of a file system that is mounted twice: nothing is
    left behind, and the tier is well."""
    tier, a = start(), key("a")
    for code in (errno.EXDEV, errno.EPERM, errno.ENOENT):
        disk.fail = {"link": code}
        assert not take(tier, a, elsewhere / "1")
    disk.fail = {}
    (elsewhere / "1").write_bytes(content(a))
    descriptor = os.open(elsewhere / "1", os.O_RDONLY)
    assert tier.admit(key("a", a.size - 1), descriptor) is None
    (elsewhere / "1").unlink()
    assert tier.admit(a, descriptor) is None
    os.close(descriptor)
    assert used(tier) == 0 and files(place) == [] and tier.stats()[0].state == "ok"


def test_what_was_taken_is_in_use_as_long_as_it_has_its_first_name(
    start: Open, place: Path, elsewhere: Path
) -> None:
    """To evict it would give nothing back."""
    tier, a = start(quota=200 * KiB, policy=Policy.LRU), key("a")
    assert take(tier, a, elsewhere / "1")
    with pytest.raises(TierFull):
        put(tier, key("b", 150 * KiB))
    assert tier.evict(a) == a.size and len(gone(place)) == 1 and used(tier) > 0
    settle(tier)
    assert used(tier) > 0
    (elsewhere / "1").unlink()
    settle(tier)
    assert used(tier) == 0 and gone(place) == []


def test_damage_is_not_cut_out_of_a_file_that_has_another_name(
    start: Open, place: Path, elsewhere: Path, logs: AnnouncedLogs
) -> None:
    """Whoever knows it by that may want its bytes as they are."""
    logs.expect("is damaged, and its file may be open elsewhere")
    tier, a = start(), key("a")
    assert take(tier, a, elsewhere / "1")
    damaged = b"\xff" * 100 + content(a)[100:] + b"more"
    (elsewhere / "1").write_bytes(damaged)
    tier.recheck(a)
    assert (elsewhere / "1").read_bytes() == damaged
    assert tier.present(a) == 0


def test_what_is_too_long_is_not_cut_off_a_file_that_has_another_name(start: Open, elsewhere: Path) -> None:
    """The same of its end."""
    tier, a = start(), key("a")
    assert take(tier, a, elsewhere / "1")
    with (elsewhere / "1").open("ab") as file:
        file.write(b"more")
    tier.recheck(a)
    assert (elsewhere / "1").read_bytes() == content(a) + b"more"
    assert tier.present(a) == 0


def test_a_file_is_given_away(start: Open, place: Path, elsewhere: Path) -> None:
    """It is somebody else's then, and what is written to it is nothing to the cache."""
    tier, a = start(), key("a")
    put(tier, a)
    assert give(tier, a, elsewhere / "1")
    assert files(place) == [] and used(tier) == 0 and list(tier.entries()) == []
    assert (elsewhere / "1").read_bytes() == content(a)
    assert not give(tier, a, elsewhere / "2")


@pytest.mark.parametrize(
    "why", ["open", "lent", "mapped", "pinned", "in part", "in doubt", "elsewhere", "cut"]
)
def test_what_cannot_be_given_away_stays(start: Open, place: Path, elsewhere: Path, why: str) -> None:
    """In use, wanted here, not whole, not certain, or where the other directory is on another file system."""
    tier, a, to = start(), key("a"), elsewhere / "1"
    with ExitStack() as stack:
        if why != "in part":
            put(tier, a)
        else:
            file = tier.open(a)
            file.fill(0, content(a)[:BLOCK])
            file.close()
        if why == "open":
            stack.callback(tier.open(a).close)
        elif why == "lent":
            stack.callback(lend(tier, a).close)
        elif why == "mapped":
            stack.enter_context(mapped(tier, a))
        elif why == "pinned":
            tier.pin(a, True)
        elif why == "in doubt":
            tier.abandon()
            tier = start(boot="two")
        elif why == "elsewhere":
            if not os.path.ismount("/dev/shm"):
                pytest.skip("/dev/shm is not a tmpfs here")
            to = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))) / "1"
        elif why == "cut":
            os.truncate(files(place)[0], 10)
        present = tier.present(a)
        assert not give(tier, a, to)
        assert not to.exists() and tier.present(a) == present


def test_a_row_never_vouches_for_what_was_given_away(start: Open, place: Path, elsewhere: Path) -> None:
    """It has gone for good, power cut or not, before the file has lost the cache's name: until then nobody is
    told that it may be written."""
    tier, a = start(), key("a")
    put(tier, a)
    assert tier.store is not None
    disk, catalogue = tier.store._disk, tier.store.catalogue
    remove, unlink, order = catalogue.remove, disk.unlink, []

    def removed(entry: int, *, durable: bool = False) -> bool:
        order.append(f"forgotten, {durable=}")
        return remove(entry, durable=durable)

    def unlinked(name: str, *, at: int) -> None:
        order.append("unlinked")
        unlink(name, at=at)

    catalogue.remove, disk.unlink = removed, unlinked  # type: ignore[method-assign]
    assert give(tier, a, elsewhere / "1")
    assert order == ["forgotten, durable=True", "unlinked"]


def test_files_that_are_to_be_written_are_disowned(start: Open, place: Path, elsewhere: Path) -> None:
    """With an entry, without one yet, and evicted: no name of them is left; others stay."""
    tier = start()
    a, b, c = key("a"), key("b"), key("c")
    assert take(tier, a, elsewhere / "a") and take(tier, b, elsewhere / "b")
    put(tier, c)
    tier.evict(b)
    (elsewhere / "o").write_bytes(b"on its way")
    os.link(elsewhere / "o", files(place)[0].with_name("0" * 32 + "-1"))
    tier.disown([(path.stat().st_dev, path.stat().st_ino) for path in elsewhere.iterdir()])
    assert {path.stat().st_nlink for path in elsewhere.iterdir()} == {1}
    assert gone(place) == [] and tier.present(a) == 0 and tier.present(c) == c.size
    assert used(tier) == -(-c.size // 4096) * 4096
    tier.disown([(1 << 60, files(place)[0].stat().st_ino)])
    assert tier.present(c) == c.size
