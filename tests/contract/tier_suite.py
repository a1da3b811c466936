"""
What every tier promises (`datacache.cache.tier`). Subclasses say how one is made.
"""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from datacache.cache.tier import Tier
from datacache.errors import CacheError, TierFull
from datacache.model import ByteRange, CacheKey, KiB, MiB

PAGE = 4096
Make = Callable[[int], Tier]


def key(name: str, size: int = 100 * KiB, version: str = "1") -> CacheKey:
    return CacheKey("memory://bucket", name, f'etag:"{version}"', size)


def content(of: CacheKey) -> bytes:
    """Bytes that differ between keys and between offsets."""
    seed = bytes.fromhex(of.digest)
    return b"".join(seed + i.to_bytes(8, "little") for i in range(of.size // 24 + 1))[: of.size]


def put(tier: Tier, of: CacheKey) -> None:
    file = tier.open(of)
    try:
        file.fill(0, content(of))
    finally:
        file.close()


def whole(of: CacheKey) -> ByteRange:
    return ByteRange(0, of.size)


def used(tier: Tier) -> int:
    return sum(stats.used for stats in tier.stats())


class TierContract:
    """Run against every tier and every fake."""

    @pytest.fixture
    def make(self) -> Iterator[Make]:
        """Makes tiers with a quota; they are closed after the test."""
        raise NotImplementedError

    @pytest.fixture
    def tier(self, make: Make) -> Tier:
        return make(64 * MiB)

    def test_what_was_never_filled_leaves_no_trace(self, tier: Tier) -> None:
        """An entry that was opened, asked and closed does not exist."""
        a = key("a")
        file = tier.open(a)
        assert file.gaps(ByteRange(10, 20)) == [ByteRange(10, 20)]
        assert file.read_nowait(ByteRange(10, 20)) is None
        tier.pin(a, True)
        tier.supersede(a)
        assert tier.evict(a) == 0
        file.close()
        assert list(tier.entries()) == [] and tier.present(a) == 0 and used(tier) == 0

    def test_bytes_come_back_as_they_were_filled(self, tier: Tier) -> None:
        """A fill is readable at once, at every offset, in every piece."""
        a = key("a")
        data = content(a)
        file = tier.open(a)
        file.fill(0, data)
        assert file.gaps(whole(a)) == []
        for span in (whole(a), ByteRange(0, 1), ByteRange(4095, 4097), ByteRange(a.size - 1, a.size)):
            assert bytes(file.read(span)) == data[span.start : span.stop]
            fast = file.read_nowait(span)
            assert fast is None or bytes(fast) == data[span.start : span.stop]
        assert bytes(file.read(ByteRange(7, 7))) == b""
        file.close()
        assert tier.present(a) == a.size

    def test_pieces_in_any_order_become_one(self, tier: Tier) -> None:
        """Gaps shrink as pieces arrive, and what is present stays as it is."""
        a = key("a")
        data = content(a)
        file = tier.open(a)
        file.fill(8192, memoryview(data)[8192:12288])
        file.fill(3, bytearray(data[3:5000]))
        assert file.gaps(whole(a)) == [ByteRange(0, 3), ByteRange(5000, 8192), ByteRange(12288, a.size)]
        assert file.gaps(ByteRange(9000, 9001)) == []
        file.fill(8000, b"\xff" * 1000)  # 8192..9000 is present and keeps its bytes
        assert bytes(file.read(ByteRange(8000, 9000))) == b"\xff" * 192 + data[8192:9000]
        assert tier.present(a) == 12288 - 8000 + 4997
        file.fill(0, data)
        assert file.gaps(whole(a)) == []
        assert bytes(file.read(ByteRange(5000, 8000))) == data[5000:8000]
        file.close()

    def test_an_empty_object_is_whole(self, tier: Tier) -> None:
        """Nothing is missing of nothing."""
        nothing = key("nothing", 0)
        file = tier.open(nothing)
        file.fill(0, b"")
        assert file.gaps(whole(nothing)) == [] and bytes(file.read(whole(nothing))) == b""
        file.close()

    def test_bytes_outside_of_the_object_are_refused(self, tier: Tier) -> None:
        """A fill beyond the object is a mistake of the caller, and changes nothing."""
        file = tier.open(key("a", 100))
        for start, data in ((90, b"x" * 11), (-1, b"xx")):
            with pytest.raises(ValueError):
                file.fill(start, data)
        assert file.gaps(ByteRange(0, 100)) == [ByteRange(0, 100)]
        file.close()

    def test_what_is_beyond_the_end_is_never_present(self, tier: Tier) -> None:
        """Asking past the object's end finds a gap there, whole or not."""
        a = key("a", 100)
        put(tier, a)
        file = tier.open(a)
        assert file.gaps(ByteRange(50, 120)) == [ByteRange(100, 120)]
        file.close()

    def test_versions_are_different_entries(self, tier: Tier) -> None:
        """Another version is another key and sees nothing of the first."""
        old, new = key("a", version="1"), key("a", version="2")
        put(tier, old)
        assert tier.present(new) == 0
        put(tier, new)
        for each in (old, new):
            file = tier.open(each)
            assert bytes(file.read(whole(each))) == content(each)
            file.close()

    def test_reading_what_is_not_there_is_an_error(self, tier: Tier) -> None:
        """Holes are never bytes."""
        a = key("a")
        file = tier.open(a)
        file.fill(0, content(a)[:4096])
        with pytest.raises(CacheError):
            file.read(ByteRange(0, 8192))
        assert file.read_nowait(ByteRange(0, 8192)) is None
        file.close()

    def test_two_opens_share_one_entry(self, tier: Tier) -> None:
        """What one fills the other reads; closing one, twice, does not disturb the other."""
        a = key("a")
        one, two = tier.open(a), tier.open(a)
        one.fill(0, content(a))
        one.close()
        one.close()
        assert bytes(two.read(whole(a))) == content(a)
        two.close()
        assert tier.present(a) == a.size

    def test_an_evicted_entry_stays_readable_while_it_is_open(self, tier: Tier) -> None:
        """Evict takes it from the tier; who has it open reads on, and until then its space counts."""
        a = key("a")
        put(tier, a)
        file = tier.open(a)
        before = used(tier)
        assert not file.evicted
        assert tier.evict(a) == a.size
        assert tier.present(a) == 0 and list(tier.entries()) == []
        assert file.evicted
        assert bytes(file.read(whole(a))) == content(a)
        assert used(tier) == before
        put(tier, a)  # a new entry of the same key is another one
        other = tier.open(a)
        assert file.evicted and not other.evicted
        other.close()
        file.close()
        assert used(tier) == before and tier.present(a) == a.size
        assert tier.evict(a) == a.size and tier.evict(a) == 0
        assert used(tier) == 0

    def test_a_whole_entry_is_lent(self, tier: Tier) -> None:
        """The kernel gets the object as a file, open for reading only and not inherited; all loans of a
        file have one identity. A loan is an open, and outlives its entry."""
        a = key("a")
        put(tier, a)
        one, two = tier.lend(a), tier.lend(a)
        assert one is not None and two is not None
        for lent in (one, two):
            assert os.pread(lent.descriptor, a.size + 1, 0) == content(a)
            found = os.fstat(lent.descriptor)
            assert lent.identity == (found.st_dev, found.st_ino) == one.identity
            assert fcntl.fcntl(lent.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            assert not os.get_inheritable(lent.descriptor)
        assert tier.evict(a) == a.size and used(tier) > 0
        one.close()
        one.close()
        assert used(tier) > 0 and tier.lend(a) is None
        assert os.pread(two.descriptor, a.size, 0) == content(a)
        put(tier, a)
        other = tier.lend(a)
        assert other is not None and other.identity != two.identity
        two.close()
        other.close()
        tier.evict(a)
        assert used(tier) == 0

    def test_a_whole_entry_can_be_read_in_one_go(self, tier: Tier) -> None:
        """The bytes of the object, or None: not there, not whole, empty. The asking leaves no trace, and
        nothing in use."""
        a, nothing = key("a"), key("nothing", 0)
        assert tier.read_whole(a) is None and tier.read_whole(nothing) is None
        assert list(tier.entries()) == []
        file = tier.open(a)
        file.fill(0, content(a)[:-1])
        file.close()
        assert tier.read_whole(a) is None
        put(tier, a)
        data = tier.read_whole(a)
        assert data is not None and bytes(data) == content(a)
        assert tier.evict(a) == a.size and used(tier) == 0
        assert tier.read_whole(a) is None

    def test_only_a_whole_entry_is_lent(self, tier: Tier) -> None:
        """What is not there, not whole, or empty is not lent, and the asking leaves no trace."""
        a, nothing = key("a"), key("nothing", 0)
        assert tier.lend(a) is None and tier.lend(nothing) is None
        assert list(tier.entries()) == []
        file = tier.open(a)
        file.fill(0, content(a)[:-1])
        assert tier.lend(a) is None
        file.fill(a.size - 1, content(a)[-1:])
        lent = tier.lend(a)
        assert lent is not None
        file.close()
        lent.close()

    def test_what_is_lent_does_not_make_room(self, make: Make) -> None:
        """Eviction by policy passes over what the kernel may be reading."""
        tier = make(8 * 16 * KiB)
        keys = [key(f"k{i}", 16 * KiB) for i in range(8)]
        for each in keys:
            put(tier, each)
        loans = [tier.lend(each) for each in keys]
        for each, lent in zip(keys, loans, strict=True):
            assert lent is not None
            tier.supersede(each)
        with pytest.raises(TierFull):
            put(tier, key("new", 16 * KiB))
        for lent in loans:
            assert lent is not None
            lent.close()
        put(tier, key("new", 16 * KiB))

    def test_a_full_tier_keeps_a_part_at_the_front_or_nothing(self, make: Make) -> None:
        """TierFull; the quota is never exceeded; what was kept is a prefix and right."""
        tier = make(64 * KiB)
        a = key("a", 256 * KiB)
        file = tier.open(a)
        with pytest.raises(TierFull):
            file.fill(0, content(a))
        assert used(tier) <= 64 * KiB
        assert any(stats.state == "full" and stats.reason for stats in tier.stats())
        gaps = file.gaps(whole(a))
        assert len(gaps) == 1 and gaps[0].stop == a.size
        kept = ByteRange(0, gaps[0].start)
        assert bytes(file.read(kept)) == content(a)[: kept.stop]
        file.close()

    def test_by_default_full_means_full(self, make: Make) -> None:
        """A tier that is full stops admitting (`--policy keep`) and goes on serving what it has: a scan must
        not thrash."""
        tier = make(8 * 16 * KiB)
        keys = [key(f"k{i}", 16 * KiB) for i in range(20)]
        for each in keys:
            file = tier.open(each)
            with suppress(TierFull):
                file.fill(0, content(each))
            file.close()
        assert [each.key for each in keys if tier.present(each)] == [f"k{i}" for i in range(8)]
        for each in keys[:8]:
            file = tier.open(each)
            assert bytes(file.read(whole(each))) == content(each)
            file.close()

    def test_superseded_entries_make_room(self, make: Make) -> None:
        """The store has another version: the old one goes when room is needed, unless it is pinned."""
        tier = make(8 * 16 * KiB)
        keys = [key(f"k{i}", 16 * KiB) for i in range(8)]
        for each in keys:
            put(tier, each)
        tier.supersede(keys[3])
        tier.supersede(keys[5])
        tier.pin(keys[5], True)
        put(tier, key("new", 16 * KiB))
        assert tier.present(keys[3]) == 0 and tier.present(keys[5]) == 16 * KiB
        with pytest.raises(TierFull):
            put(tier, key("newer", 16 * KiB))
        tier.pin(keys[5], False)
        put(tier, key("newer", 16 * KiB))
        assert tier.present(keys[5]) == 0
        assert sum(stats.evicted for stats in tier.stats()) >= 2  # moving down counts, above

    def test_entries_and_stats_tell_what_is_there(self, tier: Tier) -> None:
        """`ls` and `status` are fed from these."""
        a, b = key("dir/a", 8 * KiB), key("odd\udcff\n", 12 * KiB)
        put(tier, a)
        file = tier.open(b)
        file.fill(0, content(b)[: 4 * KiB])
        tier.pin(b, True)
        found = {entry.key: entry for entry in tier.entries()}
        assert set(found) == {a, b}
        assert found[a].whole and found[a].present == 8 * KiB and not found[a].pinned
        assert not found[b].whole and found[b].present == 4 * KiB and found[b].pinned
        assert found[a].tier in {stats.name for stats in tier.stats()}
        assert sum(stats.entries for stats in tier.stats()) == 2
        assert used(tier) >= 12 * KiB
        assert {stats.state for stats in tier.stats()} == {"ok"}
        file.close()

    def test_concurrent_fills_of_one_object_agree(self, tier: Tier) -> None:
        """Many threads fill and read overlapping pieces; every byte read is right, and each byte of
        the object is counted once."""
        a = key("a", 1 * MiB)
        data = content(a)
        step = 48 * KiB
        start = threading.Barrier(8)

        def work(number: int) -> None:
            file = tier.open(a)
            start.wait()
            for at in range(0, a.size, step):
                at = (at + number * 5 * step) % a.size // step * step
                stop = min(a.size, at + step + 1000)
                file.fill(at, memoryview(data)[at:stop])
                assert bytes(file.read(ByteRange(at, stop))) == data[at:stop]
            file.close()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert tier.present(a) == a.size
        file = tier.open(a)
        assert bytes(file.read(whole(a))) == data
        file.close()
        tier.evict(a)
        assert used(tier) == 0

    def test_quotas_hold_under_concurrent_fills(self, make: Make) -> None:
        """However many threads fill, the tier never holds more than its quota."""
        tier = make(1 * MiB)
        start = threading.Barrier(8)
        seen: list[int] = []

        def work(number: int) -> None:
            start.wait()
            for i in range(10):
                each = key(f"{number}/{i}", 40 * KiB)
                file = tier.open(each)
                with suppress(TierFull):
                    file.fill(0, content(each))
                seen.append(used(tier))
                file.close()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert 0.8 * MiB < max(seen) <= 1 * MiB

    def test_files_that_are_unlinked_while_in_use_count(self, make: Make) -> None:
        """A tier never exceeds its quota, files that are unlinked while in use included: their space is
        free when nobody can read them any more, and not before."""
        tier = make(8 * 16 * KiB)
        keys = [key(f"k{i}", 16 * KiB) for i in range(8)]
        for each in keys:
            put(tier, each)
        in_use = [tier.open(each) for each in keys]
        for each in keys:
            tier.evict(each)
        new = key("new", 16 * KiB)
        with pytest.raises(TierFull):
            put(tier, new)
        assert used(tier) == 8 * 16 * KiB
        for each, file in zip(keys, in_use, strict=True):
            assert bytes(file.read(whole(each))) == content(each)
            file.close()
        put(tier, new)
        assert used(tier) == tier.present(new) == 16 * KiB

    def test_evicting_while_others_fill_and_read_is_safe(self, tier: Tier) -> None:
        """Readers see right bytes or a CacheError, never wrong bytes; nothing is left counted."""
        keys = [key(f"k{i}", 64 * KiB) for i in range(4)]
        start = threading.Barrier(6)

        def work(number: int) -> None:
            start.wait()
            for i in range(60):
                each = keys[(i + number) % 4]
                if number < 2:
                    tier.evict(each)
                    continue
                file = tier.open(each)
                with suppress(CacheError):
                    file.fill(0, content(each))
                    assert bytes(file.read(whole(each))) == content(each)
                file.close()

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        for each in keys:
            tier.evict(each)
        assert used(tier) == 0 and list(tier.entries()) == []
