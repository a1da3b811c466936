"""A cache made of tiers: where data goes, what happens when one fails, and how it is opened."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datacache.cache import limits
from datacache.cache.directory import DirectoryTier, Owner, Rules, read_owner
from datacache.cache.memory import MemoryTier
from datacache.cache.tiered import TieredCache, open_cache
from datacache.clock import VirtualClock
from datacache.config.settings import CacheSettings, Placement, Policy, TierSettings
from datacache.errors import Damaged, Locked, SettingError, TierBroken, TierFull
from datacache.model import ByteRange, CacheKey, KiB, Medium, MiB
from tests.conftest import AnnouncedLogs
from tests.contract.tier_suite import content, key, put, whole
from tests.support.mapper import Mapper

BLOCK = 16 * KiB
OWNER = Owner(os.getpid(), "/mnt/x", "")


def two(upper: int, lower: int, clock: VirtualClock, placement: Placement = Placement.SPILL) -> TieredCache:
    top = MemoryTier(quota=upper, name="mem:top", wall=clock.wall)
    return TieredCache(
        [top, MemoryTier(quota=lower, name="ssd:bottom", wall=clock.wall)], placement=placement
    )


# ---- placement ----------------------------------------------------------------------------------


def test_spill_what_has_no_room_goes_down(clock: VirtualClock) -> None:
    """What is above stays there; an object may straddle, and reads as one."""
    cache = two(5 * BLOCK // 2, 64 * BLOCK, clock)
    a, b = key("a", 2 * BLOCK), key("b", 2 * BLOCK)
    put(cache, a)
    put(cache, b)
    top, bottom = cache.tiers
    assert top.present(a) == 2 * BLOCK and top.present(b) == BLOCK // 2
    assert bottom.ranges(b) == [ByteRange(BLOCK // 2, 2 * BLOCK)]
    file = cache.open(b)
    assert file.gaps(whole(b)) == [] and bytes(file.read(whole(b))) == content(b)
    assert file.read_nowait(ByteRange(0, 100)) == content(b)[:100]
    assert file.read_nowait(ByteRange(BLOCK, BLOCK + 9)) == content(b)[BLOCK : BLOCK + 9]
    file.close()
    assert cache.present(b) == 2 * BLOCK
    assert cache.evict(b) == 2 * BLOCK and cache.present(b) == 0


def test_sink_the_coldest_goes_down(clock: VirtualClock) -> None:
    """New data is on top; what was opened longest ago is below, whole; pinned and open entries stay."""
    cache = two(3 * BLOCK, 64 * BLOCK, clock, Placement.SINK)
    keys = [key(f"k{i}", BLOCK) for i in range(6)]
    top, bottom = cache.tiers
    for each in keys[:3]:
        clock.advance(1)
        put(cache, each)
    clock.advance(1)
    cache.open(keys[0]).close()
    clock.advance(1)
    put(cache, keys[3])
    assert top.present(keys[3]) and bottom.present(keys[1]) == BLOCK and not top.present(keys[1])
    cache.pin(keys[2], True)
    file = cache.open(keys[0])
    clock.advance(1)
    put(cache, keys[4])  # only k3 may go
    assert bottom.present(keys[3]) == BLOCK and top.present(keys[0]) and top.present(keys[2])
    put(cache, keys[5])
    file.close()
    for each in keys:
        file = cache.open(each)
        assert bytes(file.read(whole(each))) == content(each)
        file.close()


def test_what_sinks_keeps_its_standing(tmp_path: Path, clock: VirtualClock) -> None:
    """To be moved is not to be opened: below, what was opened longest ago still goes first; and what
    found no room below is still the coldest above."""

    def tier(name: str, quota: int, policy: Policy) -> DirectoryTier:
        rules = Rules(name, quota, BLOCK, high=1.0, reserve=0.0, dataset="mine", policy=policy)
        return DirectoryTier(str(tmp_path / name), rules, owner=OWNER, clock=clock, keeper=False)

    top, bottom = tier("mem", 2 * BLOCK, Policy.KEEP), tier("ssd", 2 * BLOCK, Policy.LRU)
    cache = TieredCache([top, bottom], placement=Placement.SINK)
    early, later, *more = [key(f"k{i}", BLOCK) for i in range(5)]
    put(cache, early)
    clock.advance(1)
    put(bottom, later)
    for each in more[:2]:  # the second sends `early` down
        clock.advance(1)
        put(cache, each)
    assert bottom.present(early) and bottom.present(later)
    clock.advance(1)
    bottom.pin(later, True)
    bottom.pin(early, True)
    with pytest.raises(TierFull):
        put(cache, more[2])
    bottom.pin(later, False)
    bottom.pin(early, False)
    put(cache, more[2])
    assert [k.key for k in (early, later, *more) if bottom.present(k)] == ["k1", "k2"]
    cache.close()


def test_what_is_pinned_on_its_way_down_is_pinned_below(clock: VirtualClock) -> None:
    """A pin, or another version in the store, that comes while an entry is moved is not lost."""
    cache = two(BLOCK, 64 * BLOCK, clock, Placement.SINK)
    top, bottom = cache.tiers
    a = key("a", BLOCK)
    put(cache, a)
    recheck = top.recheck

    def meanwhile(of: CacheKey) -> int:
        cache.pin(a, True)
        cache.supersede(a)
        return recheck(of)

    top.recheck = meanwhile  # type: ignore[method-assign]
    put(cache, key("b", BLOCK))
    assert not top.present(a) and bottom.present(a)
    standing = bottom.standing(a)
    assert standing is not None and standing.pinned and standing.superseded


def test_sink_with_a_full_bottom_admits_no_more(clock: VirtualClock) -> None:
    """Nothing is lost on the way down for want of room."""
    cache = two(2 * BLOCK, 1 * BLOCK, clock, Placement.SINK)
    keys = [key(f"k{i}", BLOCK) for i in range(5)]
    for each in keys[:3]:
        clock.advance(1)
        put(cache, each)
    with pytest.raises(TierFull):
        put(cache, keys[3])
    assert [cache.present(k) for k in keys] == [BLOCK, BLOCK, BLOCK, 0, 0]


def test_sink_never_gives_damage_a_new_checksum(clock: VirtualClock) -> None:
    """A block that went bad above is dropped on the way, not carried down as good."""
    cache = two(2 * BLOCK, 64 * BLOCK, clock, Placement.SINK)
    a = key("a", 2 * BLOCK)
    put(cache, a)
    top = cache.tiers[0]
    assert isinstance(top, MemoryTier)
    top.spoil(a, ByteRange(BLOCK, BLOCK + 1))
    put(cache, key("b", 2 * BLOCK))
    file = cache.open(a)
    gaps = file.gaps(whole(a))
    assert gaps and gaps[0].start == BLOCK
    assert bytes(file.read(ByteRange(0, BLOCK))) == content(a)[:BLOCK]
    file.close()


def test_sink_leaves_what_somebody_maps_where_it_is(tmp_path: Path, clock: VirtualClock) -> None:
    """To move it would free nothing: the next coldest goes, and when all are mapped new data goes down."""
    top, bottom = (
        DirectoryTier(
            str(tmp_path / name),
            Rules(f"ssd:{name}", 2 * BLOCK if name == "top" else 64 * BLOCK, BLOCK, reserve=0.0, dataset="d"),
            owner=OWNER,
            clock=clock,
            keeper=False,
        )
        for name in ("top", "bottom")
    )
    cache = TieredCache([top, bottom], placement=Placement.SINK)
    keys = [key(f"k{i}", BLOCK) for i in range(4)]
    maps = []
    try:
        for each in keys[:2]:
            put(cache, each)
            clock.advance(1)
        for each, cold in zip(keys[2:], (keys[0], keys[2]), strict=True):
            lent = cache.lend(cold)
            assert lent is not None
            maps.append(Mapper(lent.descriptor, cold.size))
            lent.close()
            clock.advance(1)
            put(cache, each)
        assert [top.present(each) for each in keys] == [BLOCK, 0, BLOCK, 0]
        assert [bottom.present(each) for each in keys] == [0, BLOCK, 0, BLOCK]
        assert top.retire(keys[0]) == 0 and top.retire(key("none")) == 0
    finally:
        for mapping in maps:
            mapping.unmap()
        cache.close()


def test_a_fill_that_is_too_large_to_sink_for_goes_down_itself(clock: VirtualClock) -> None:
    """What one fill moves is bounded."""
    cache = two(1 * MiB, 256 * MiB, clock, Placement.SINK)
    put(cache, key("cold", 1 * MiB))
    big = key("big", 65 * MiB)
    file = cache.open(big)
    file.fill(0, bytes(big.size))
    file.close()
    assert cache.tiers[0].present(key("cold", 1 * MiB)) and cache.tiers[1].present(big) == big.size


def test_concurrent_fills_that_sink_lose_nothing(clock: VirtualClock) -> None:
    """Eight threads through a top of four entries: every entry is there, right, and once."""
    cache = two(4 * BLOCK, 256 * BLOCK, clock, Placement.SINK)
    begin = threading.Barrier(8)

    def work(number: int) -> None:
        begin.wait()
        for i in range(10):
            put(cache, key(f"{number}/{i}", BLOCK))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        for i in range(10):
            each = key(f"{number}/{i}", BLOCK)
            file = cache.open(each)
            assert bytes(file.read(whole(each))) == content(each)
            file.close()
    assert sum(stats.used for stats in cache.stats()) == 80 * BLOCK


# ---- failing tiers ------------------------------------------------------------------------------


def test_a_broken_tier_is_passed_over(clock: VirtualClock) -> None:
    """Reads come from the others, fills go to the others; with all broken a fill says so."""
    cache = two(64 * BLOCK, 64 * BLOCK, clock)
    a, b = key("a", BLOCK), key("b", BLOCK)
    put(cache, a)
    top, bottom = cache.tiers
    assert isinstance(top, MemoryTier) and isinstance(bottom, MemoryTier)
    top.broken = "for the test"
    put(cache, b)
    put(cache, a)
    assert bottom.present(a) == BLOCK and bottom.present(b) == BLOCK
    bottom.broken = "too"
    with pytest.raises(TierBroken):
        put(cache, key("c", BLOCK))
    top.broken = bottom.broken = ""
    file = cache.open(a)  # is in both now: damage in one is no loss
    top.spoil(a, ByteRange(0, 1))
    assert bytes(file.read(whole(a))) == content(a)
    assert cache.present(a) == BLOCK
    bottom.spoil(a, ByteRange(0, 1))
    with pytest.raises(Damaged):
        file.read(whole(a))
    with pytest.raises(Damaged):
        file.read(whole(a))
    file.close()


def test_full_above_and_broken_below_is_full(clock: VirtualClock) -> None:
    """The caller learns that there is no room, which is no illness."""
    cache = two(BLOCK, BLOCK, clock)
    put(cache, key("a", BLOCK))
    bottom = cache.tiers[1]
    assert isinstance(bottom, MemoryTier)
    bottom.broken = "for the test"
    with pytest.raises(TierFull):
        put(cache, key("b", BLOCK))


def test_tiers_have_names(clock: VirtualClock) -> None:
    """By name or by medium, for `load --tier`; a wrong one is answered with the right ones."""
    cache = two(BLOCK, BLOCK, clock)
    assert cache.tier("mem") is cache.tiers[0] and cache.tier("ssd:bottom") is cache.tiers[1]
    with pytest.raises(SettingError, match="mem:top, ssd:bottom"):
        cache.tier("ceph")
    assert "mem:top" in repr(cache) and "a" in repr(cache.open(key("a")))


# ---- opening ------------------------------------------------------------------------------------


@pytest.fixture
def shm() -> Iterator[str]:
    path = f"/dev/shm/datacache-test-{os.getpid()}"
    if not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is not a tmpfs here")
    yield path
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def opened(settings: CacheSettings, clock: VirtualClock) -> TieredCache:
    return open_cache(settings, dataset="mine", block_size=BLOCK, owner=OWNER, clock=clock)


def test_a_cache_from_settings(tmp_path: Path, shm: str, clock: VirtualClock) -> None:
    """Tiers in their order, with their names; locked for one owner; refilled after a restart; verified
    online."""
    ssd = str(tmp_path / "deep" / "ssd")
    settings = CacheSettings(
        tiers=(TierSettings(Medium.MEM, shm, 4 * BLOCK), TierSettings(Medium.SSD, ssd, 64 * BLOCK)),
        policy=Policy.LRU,
        reserve=0.01,
    )
    cache = opened(settings, clock)
    keys = [key(f"k{i}", BLOCK) for i in range(8)]
    for each in keys:
        put(cache, each)
    assert [stats.name for stats in cache.stats()] == [f"mem:{shm}", f"ssd:{ssd}"]
    assert [stats.entries for stats in cache.stats()] == [4, 4]
    with pytest.raises(Locked):
        opened(settings, clock)
    assert read_owner(ssd) == OWNER
    seen: list[tuple[int, int]] = []
    report = cache.verify(lambda done, total: seen.append((done, total)))
    assert report.ok and report.entries == report.blocks == 8 and report.bytes == 8 * BLOCK
    assert seen[-1] == (4 * BLOCK, 4 * BLOCK)
    assert cache.recheck(keys[0]) == 0
    cache.close()
    assert read_owner(ssd) is None
    cache = opened(settings, clock)
    assert all(cache.present(k) == BLOCK for k in keys)
    cache.close()


def test_verify_names_a_tier_that_is_set_aside(
    tmp_path: Path, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """What could not be looked at is a problem in the report, not silence."""
    logs.expect("set aside")
    rules = Rules("ssd:x", 64 * BLOCK, BLOCK, reserve=0.0)
    tier = DirectoryTier(str(tmp_path), rules, owner=OWNER, clock=clock, keeper=False)
    cache = TieredCache([tier])
    tier.trouble(tier.store, OSError(5, "Input/output error"))
    report = cache.verify()
    assert len(report.problems) == 1 and "set aside" in report.problems[0] and not report.ok
    cache.close()


Wrong = Callable[[str, str], TierSettings]


@pytest.mark.parametrize(
    ("tier", "expected"),
    [
        (lambda ssd, shm: TierSettings(Medium.SSD, "relative", 1), "an absolute path"),
        (lambda ssd, shm: TierSettings(Medium.SSD, ssd, 0), "a quota above 0"),
        (lambda ssd, shm: TierSettings(Medium.SSD, ssd, 1, high=0.5, low=0.6), "watermarks"),
        (lambda ssd, shm: TierSettings(Medium.MEM, ssd, 1), "a path in a tmpfs"),
        (lambda ssd, shm: TierSettings(Medium.MEM, shm, 1 << 50), "a quota of at most"),
        (lambda ssd, shm: TierSettings(Medium.SSD, ssd + "/file/x", 1), "can be made and written"),
    ],
)
def test_what_can_never_work_is_refused(
    tmp_path: Path, shm: str, clock: VirtualClock, tier: Wrong, expected: str
) -> None:
    """One line with name, value and what would be right; what was opened before is closed again."""
    good = TierSettings(Medium.SSD, str(tmp_path / "good"), BLOCK)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=expected) as caught:
        opened(CacheSettings(tiers=(good, tier(str(tmp_path), shm))), clock)
    assert caught.value.name == "cache"
    assert read_owner(good.path) is None


def test_two_tiers_need_two_directories(tmp_path: Path, clock: VirtualClock) -> None:
    """The same directory twice, also under another name, is a mistake."""
    (tmp_path / "link").symlink_to(tmp_path)
    tiers = tuple(TierSettings(Medium.SSD, str(path), BLOCK) for path in (tmp_path, tmp_path / "link"))
    with pytest.raises(SettingError, match="another directory"):
        opened(CacheSettings(tiers=tiers), clock)


# ---- limits -------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "1000\n"}, 1000),
        ("0::/a/b\n", {"a/b/memory.max": "500\n", "a/memory.max": "1000\n"}, 500),
        ("0::/not/seen/from/here\n", {"memory.max": "700\n"}, 700),
        ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "800\n"}, 800),
        ("4:cpu,memory:/x\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("1:cpu:/x\n", {"memory.max": "5\n"}, None),
    ],
)
def test_the_memory_limit_of_our_group(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int | None
) -> None:
    """cgroup v2 and v1, from inside and outside of a container; the tightest of all above us binds."""
    tree(tmp_path, {"proc/self/cgroup": cgroup, **{f"sys/{k}": v for k, v in files.items()}})
    found = limits.memory_limit(proc=str(tmp_path / "proc"), groups=str(tmp_path / "sys"))
    assert found == expected


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    """A kernel without them is no error."""
    assert limits.memory_limit(proc=str(tmp_path), groups=str(tmp_path)) is None


def test_what_lies_in_memory(tmp_path: Path, shm: str) -> None:
    """Judged by the nearest directory that exists."""
    assert limits.is_tmpfs(shm + "/a/b")
    assert limits.existing(str(tmp_path / "no" / "such")) == str(tmp_path)
    device = os.stat(tmp_path).st_dev
    line = f"1 2 {os.major(device)}:{os.minor(device)} / / rw - ext4 /dev/x rw\n"
    tree(tmp_path, {"proc/self/mountinfo": line})
    assert not limits.is_tmpfs(str(tmp_path / "x"), proc=str(tmp_path / "proc"))
    (tmp_path / "proc/self/mountinfo").write_text("")
    assert not limits.is_tmpfs(str(tmp_path), proc=str(tmp_path / "proc"))
