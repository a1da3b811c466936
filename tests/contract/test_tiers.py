"""The contract of tiers, on every tier."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.cache.memory import MemoryTier
from datacache.cache.tiered import TieredCache
from datacache.cache.verify import verify
from datacache.clock import VirtualClock
from datacache.config.settings import Placement
from datacache.model import KiB
from tests.contract.tier_suite import Make, TierContract, key, put

OWNER = Owner(os.getpid(), "", "")


class TestMemoryTier(TierContract):
    """The fake keeps what the real ones promise."""

    @pytest.fixture
    def make(self) -> Iterator[Make]:
        yield lambda quota: MemoryTier(quota=quota)


class _Directories(TierContract):
    @pytest.fixture
    def place(self) -> Iterator[str]:
        raise NotImplementedError

    @pytest.fixture
    def make(self, place: str, clock: VirtualClock) -> Iterator[Make]:
        with ExitStack() as stack:

            def make(quota: int) -> DirectoryTier:
                rules = Rules("dir:" + place, quota, 16 * KiB, reserve=0.01, dataset="d")
                tier = DirectoryTier(place, rules, owner=OWNER, clock=clock)
                stack.callback(tier.close)
                return tier

            yield make
        assert verify(place, repair=False).problems == ()


class TestDirectoryTierOnDisk(_Directories):
    """A directory on whatever disk tests have."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Iterator[str]:
        yield str(tmp_path / "cache")


class TestDirectoryTierInMemory(_Directories):
    """A directory on tmpfs."""

    @pytest.fixture
    def place(self) -> Iterator[str]:
        if not os.path.ismount("/dev/shm"):
            pytest.skip("/dev/shm is not a tmpfs here")
        with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
            yield place


class TestTieredCache(TierContract):
    """A cache made of tiers is a tier."""

    @pytest.fixture(params=list(Placement))
    def make(self, request: pytest.FixtureRequest, tmp_path: Path, clock: VirtualClock) -> Iterator[Make]:
        with ExitStack() as stack:

            def make(quota: int) -> TieredCache:
                rules = Rules("dir:lower", quota // 2, 16 * KiB, reserve=0.01, dataset="d")
                lower = DirectoryTier(str(tmp_path), rules, owner=OWNER, clock=clock)
                upper = MemoryTier(quota=quota - quota // 2, wall=clock.wall)
                cache = TieredCache([upper, lower], placement=request.param)
                stack.callback(cache.close)
                return cache

            yield make


def test_the_fake_can_play_a_failing_medium() -> None:
    """MemoryTier's own controls: broken, it is empty and refuses; spoiled bytes are Damaged once."""
    from datacache.errors import Damaged, TierBroken
    from datacache.model import ByteRange

    tier = MemoryTier()
    a = key("a")
    put(tier, a)
    file = tier.open(a)
    tier.broken = "the test says so"
    assert file.gaps(ByteRange(0, 9)) == [ByteRange(0, 9)] and tier.present(a) == 0
    with pytest.raises(TierBroken):
        file.read(ByteRange(0, 9))
    with pytest.raises(TierBroken):
        file.fill(0, b"x")
    assert tier.stats()[0].state == "broken"
    tier.broken = ""
    tier.spoil(a, ByteRange(100, 101))
    assert file.read_nowait(ByteRange(200, 300)) is not None
    with pytest.raises(Damaged):
        file.read(ByteRange(90, 110))
    assert file.gaps(ByteRange(0, 200)) == [ByteRange(90, 110)]
    tier.spoil(a, ByteRange(0, 5))
    assert tier.recheck(a) == 1 and tier.recheck(key("b")) == 0
    file.close()
    assert tier.coldest(1) == [a] and "1 entries" in repr(tier)
