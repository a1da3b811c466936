"""
Files that go from the landing zone to the cache, and back, by a change of names; and deaths on the way.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datacache.cache.directory import DirectoryTier
from datacache.cache.memory import MemoryTier
from datacache.cache.tier import Lent
from datacache.errors import LandingBroken
from datacache.model import CacheKey, Entry, MiB
from datacache.sources.sink import Stored
from datacache.writing import steps
from datacache.writing.copies import CopiesStats
from datacache.writing.journal import OpKind
from tests.conftest import AnnouncedLogs
from tests.support.mapper import Mapper
from tests.support.overlays import Killed, Mounted, Place

BIG = os.urandom(64 * MiB)
SMALL = b"a few bytes"


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place.new(cached=True)
    yield place
    steps.arm(None)
    place.remove()


class Lives:
    """The lives of one place, one at a time."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.now = Mounted(place)

    def again(self, *, resumed: bool = False) -> Mounted:
        """After the death of what was before."""
        self.now.close()
        self.now = Mounted(self.place, resumed=resumed)
        return self.now


@pytest.fixture
def lives(place: Place) -> Iterator[Lives]:
    lives = Lives(place)
    yield lives
    lives.now.close()


@pytest.fixture
def one(lives: Lives) -> Mounted:
    return lives.now


def key_of(one: Mounted, path: str) -> CacheKey:
    return one.reader.cache_key(one.overlay.resolve(path))


def lent(one: Mounted, entry: Entry) -> Lent:
    found = one.reader.lend(entry)
    assert found is not None, "it is not in the cache, whole"
    return found


def cached_inode(one: Mounted, path: str) -> tuple[int, int]:
    found = lent(one, one.overlay.resolve(path))
    found.close()
    return found.identity


def landing_inode(one: Mounted, path: str) -> tuple[int, int]:
    node = one.overlay.ledger.nodes[one.overlay.resolve(path).ino]
    st = one.landing.stat(node.landing)
    return st.st_dev, st.st_ino


def landed_to_write(one: Mounted, path: str) -> tuple[int, int]:
    """Open a clean file for writing, and close it as if something had been written."""
    ino = one.overlay.resolve(path).ino
    one.overlay.land(ino)
    found = landing_inode(one, path)
    file = one.overlay.open(ino, writing=True)
    os.pwrite(file.descriptor, b"!", 0)
    one.overlay.closed(ino, file)
    return found


def tier(one: Mounted) -> DirectoryTier:
    assert isinstance(one.cache, DirectoryTier)
    return one.cache


def stats(one: Mounted) -> CopiesStats:
    return one.overlay.copies.stats()


def used(one: Mounted) -> int:
    return tier(one).stats()[0].used


# ---- both ways, without a copy --------------------------------------------------------------------


def test_what_was_uploaded_is_the_cached_file_without_a_copy(one: Mounted) -> None:
    """What was uploaded is a cached file without a download, and without a copy: the same file, in the
    cache's books, with its checksums, and its space counted. Reading it asks the store for nothing."""
    one.write("/big", BIG)
    before = landing_inode(one, "/big")
    one.drain()
    assert cached_inode(one, "/big") == before
    assert stats(one) == CopiesStats(kept_files=1)
    one.overlay.sync_names()
    assert one.landing.files() == []
    assert used(one) == len(BIG)
    one.place.bucket.delete("big")
    assert one.read("/big") == BIG, "nothing was asked of the store"
    assert tier(one).recheck(key_of(one, "/big")) == 0


def test_checksums_are_those_of_the_bytes(lives: Lives) -> None:
    """After another boot the blocks are held against them: damage that came in between is found."""
    lives.now.write("/big", BIG)
    lives.now.drain()
    where = cached_inode(lives.now, "/big")
    (file,) = [
        path for path in lives.place.root.rglob("*") if path.is_file() and path.stat().st_ino == where[1]
        and "objects" in path.parts
    ]  # fmt: skip
    with file.open("r+b") as broken:
        broken.seek(40 * MiB)
        broken.write(b"\0" * 100)
    lives.place.boot = "two"
    after = lives.again()
    assert after.in_cache(key_of(after, "/big")) is None
    assert after.wrong_in_cache() == []


def test_a_cached_file_is_landed_without_a_copy(one: Mounted) -> None:
    """The first open for writing takes the cached file itself out of the cache, which forgets it."""
    one.place.bucket.put("big", BIG)
    one.put_in_cache("/big")
    before, key = cached_inode(one, "/big"), key_of(one, "/big")
    assert landed_to_write(one, "/big") == before
    assert stats(one) == CopiesStats(landed_files=1)
    assert tier(one).present(key) == 0 and used(one) == 0
    one.drain()
    assert cached_inode(one, "/big") == before, "and back"
    assert bytes(one.in_cache(key_of(one, "/big")) or b"") == b"!" + BIG[1:]


def test_what_was_opened_and_not_written_goes_back(one: Mounted) -> None:
    """A clean file that was opened for writing only is as it was, in the cache, too."""
    one.place.bucket.put("big", BIG)
    one.put_in_cache("/big")
    before, key = cached_inode(one, "/big"), key_of(one, "/big")
    one.write("/big", b"", 0)
    assert not one.settling.ops()
    assert key_of(one, "/big") == key and cached_inode(one, "/big") == before
    assert stats(one) == CopiesStats(landed_files=1, kept_files=1)
    assert used(one) == len(BIG) and tier(one).recheck(key) == 0


def test_a_write_in_the_tick_of_the_landing_is_a_write(one: Mounted) -> None:
    """Times of changes are told by a clock that stands still for milliseconds: a write of as many bytes in
    the same of its ticks must not look like none."""
    one.place.bucket.put("a", SMALL)
    ino = one.overlay.resolve("/a").ino
    one.overlay.land(ino)
    file = one.overlay.open(ino, writing=True)
    os.pwrite(file.descriptor, b"A", 0)
    unchanged = one.overlay.ledger.unchanged
    st = os.fstat(file.descriptor)
    unchanged[ino] = unchanged[ino]._replace(look=(st.st_size, st.st_ctime_ns, unchanged[ino].look[2]))
    one.overlay.closed(ino, file)
    assert [op.kind for op in one.settling.ops()] == [OpKind.PUT]
    assert one.read("/a") == b"A" + SMALL[1:]


def test_a_time_that_is_set_back_hides_no_write(one: Mounted) -> None:
    """As `rsync` and `cp -p` do."""
    one.place.bucket.put("a", SMALL)
    ino = one.overlay.resolve("/a").ino
    mtime_ns = one.overlay.land(ino).mtime_ns
    file = one.overlay.open(ino, writing=True)
    os.pwrite(file.descriptor, b"A", 0)
    one.overlay.set_attributes(ino, mtime_ns=mtime_ns)
    unchanged, st = one.overlay.ledger.unchanged, os.fstat(file.descriptor)
    if ino in unchanged:  # as if it had been in the same tick
        unchanged[ino] = unchanged[ino]._replace(look=unchanged[ino].look_of(st))
    one.overlay.closed(ino, file)
    assert len(one.settling.ops()) == 1


# ---- where it cannot be ---------------------------------------------------------------------------


def test_a_file_that_somebody_reads_is_copied_to_be_written(one: Mounted) -> None:
    """Who has it open, or mapped, goes on reading what he opened."""
    one.place.bucket.put("big", BIG)
    one.put_in_cache("/big")
    before = cached_inode(one, "/big")
    found = lent(one, one.overlay.resolve("/big"))
    with Mapper(found.descriptor, len(BIG)) as mapper:
        found.close()
        assert landed_to_write(one, "/big") != before
        assert mapper.sees(BIG)
    assert stats(one) == CopiesStats(copied_bytes=len(BIG))
    assert one.wrong_in_cache() == []


def test_a_pinned_copy_stays(one: Mounted) -> None:
    """Somebody wants it kept."""
    one.place.bucket.put("big", BIG)
    one.put_in_cache("/big")
    tier(one).pin(key_of(one, "/big"), True)
    before = cached_inode(one, "/big")
    assert landed_to_write(one, "/big") != before


def test_another_file_system_gets_a_copy(tmp_path: Path) -> None:
    """Both ways, as long as both have room."""
    place = Place.new()
    try:
        one = Mounted(place)
        assert isinstance(one.cache, MemoryTier)
        one.write("/big", BIG)
        one.drain()
        assert stats(one) == CopiesStats(copied_bytes=len(BIG))
        landed_to_write(one, "/big")
        assert stats(one) == CopiesStats(copied_bytes=2 * len(BIG))
        one.close()
    finally:
        place.remove()


def test_a_tier_that_is_full_takes_nothing(one: Mounted) -> None:
    """Its quota holds for what need not be copied, too."""
    for name in ("/one", "/two"):
        one.write(name, BIG)
        one.drain()
    assert used(one) == len(BIG)
    assert stats(one).kept_files == 1
    one.overlay.sync_names()
    assert one.landing.files() == []


def test_a_full_disk_is_no_reason_against_what_is_on_it_already(one: Mounted) -> None:
    """What is taken needs nothing of what the file system has left."""
    store = tier(one).store
    assert store is not None
    one.write("/big", BIG)
    space = store._disk.space(store._at.fd)
    store._disk.space = lambda fd: space._replace(free=MiB)  # type: ignore[method-assign]
    store._measured = -1e18
    one.drain()
    assert stats(one) == CopiesStats(kept_files=1)


def test_what_was_fetched_to_be_sent_is_copied(one: Mounted) -> None:
    """Its landing file has no name, and the tier is none the worse."""
    content = one.settling.fetch
    one.write("/a", SMALL)
    one.drain()
    here = one.at("/")[0]
    one.overlay.rename(here, b"a", here, b"b", replace=True)
    (put, *_) = one.settling.ops()
    begun = one.settling.begin(put)
    assert begun is not None
    fetched = content(begun)
    info = one.place.bucket.put("b", SMALL)
    one.settling.settled(begun, Stored(info, {}, "digest"), fetched)
    fetched.close()
    assert one.in_cache(key_of(one, "/b")) == SMALL
    assert tier(one).stats()[0].state == "ok"


def test_the_next_start_ends_what_a_power_cut_left(lives: Lives, tmp_path: Path) -> None:
    """A landing file that is a cached file, too: of our own cache, which forgets it, and no byte is copied;
    of another, which has its own from then on."""
    lives.now.write("/big", BIG)
    before = landing_inode(lives.now, "/big")
    number = lives.now.landing.files()[0]
    ours = lives.place.root / "datacache-cache" / "objects" / "00" / f"{'0' * 32}-1"
    ours.parent.mkdir(exist_ok=True)
    os.link(f"{lives.now.landing.directory}/files/{number}", ours)
    after = lives.again()
    assert not ours.exists() and landing_inode(after, "/big") == before
    theirs = lives.place.root / "another"
    os.link(f"{after.landing.directory}/files/{number}", theirs)
    mtime = theirs.stat().st_mtime_ns
    after = lives.again()
    assert landing_inode(after, "/big") != before
    assert after.overlay.resolve("/big").mtime_ns == mtime
    after.write("/big", b"!", 0)
    assert theirs.read_bytes() == BIG and after.read("/big")[:2] == b"!" + BIG[1:2]
    assert after.landing.files() == [number]


# ---- who writes meanwhile -------------------------------------------------------------------------


def between_put_and_settled(one: Mounted, work: Callable[[], None]) -> None:
    """Do something in the moment in which the bucket has a file and nobody here has noted that."""
    put = one.settling._settle

    def settle(*args: object) -> None:
        work()
        put(*args)  # type: ignore[arg-type]

    one.settling._settle = settle  # type: ignore[method-assign]
    one.pay()
    one.settling._settle = put  # type: ignore[method-assign]


def test_a_write_that_comes_before_it_is_taken_stops_it(one: Mounted) -> None:
    """The file is still the landing file then, and the cache has nothing to do with it."""
    one.write("/big", BIG)
    before = landing_inode(one, "/big")
    between_put_and_settled(one, lambda: one.write("/big", b"!", 0))
    assert landing_inode(one, "/big") == before
    assert os.stat(f"{one.landing.directory}/files/{one.landing.files()[0]}").st_nlink == 1
    assert list(tier(one).entries()) == [] and used(one) == 0
    one.drain()
    assert bytes(one.in_cache(key_of(one, "/big")) or b"") == b"!" + BIG[1:]


def test_a_truncation_that_comes_before_it_is_taken_stops_it(one: Mounted) -> None:
    """Without an open."""
    one.write("/big", BIG)
    ino = one.overlay.resolve("/big").ino
    between_put_and_settled(one, lambda: one.overlay.truncate(ino, 3))
    assert one.read("/big") == BIG[:3] and used(one) == 0
    one.drain()
    assert one.in_cache(key_of(one, "/big")) == BIG[:3]


def test_a_rename_that_comes_before_it_is_taken_stops_it(one: Mounted) -> None:
    """It is the file of another name then, which can be written."""
    one.write("/big", BIG)
    here = one.at("/")[0]
    between_put_and_settled(one, lambda: one.overlay.rename(here, b"big", here, b"new", replace=True))
    assert used(one) == 0 and one.wrong_in_cache() == []
    one.drain()
    assert cached_inode(one, "/new")


def test_where_it_cannot_be_noted_the_cache_forgets_it(one: Mounted, logs: AnnouncedLogs) -> None:
    """It is the landing file still, to be written and sent."""
    one.write("/big", BIG)

    def fail(name: str) -> None:
        if name == "journal.before.settle":
            steps.arm(None)
            raise LandingBroken("the disk is broken")

    steps.arm(fail)
    with pytest.raises(LandingBroken):
        one.pay()
    assert one.landing.shared(one.landing.files()) == {}
    assert list(tier(one).entries()) == [] and used(one) == 0


# ---- deaths ---------------------------------------------------------------------------------------


def prepared_upload(one: Mounted) -> Callable[[], None]:
    one.write("/f", b"new")
    return one.drain


def prepared_change(one: Mounted) -> Callable[[], None]:
    one.place.bucket.put("f", b"old")
    one.put_in_cache("/f")
    return lambda: one.write("/f", b"new", 0)


def prepared_open(one: Mounted) -> Callable[[], None]:
    one.place.bucket.put("f", b"old")
    one.put_in_cache("/f")
    return lambda: one.write("/f", b"", 0)


def steps_of(work: Callable[[], None]) -> list[str]:
    passed: list[str] = []
    steps.arm(passed.append)
    work()
    steps.arm(None)
    return passed


SCENARIOS = {
    "upload": (prepared_upload, {b"new"}),
    "change": (prepared_change, {b"old", b"new"}),
    "open": (prepared_open, {b"old"}),
}
"""What is done, and what may be there when it was not done to its end."""


@pytest.mark.parametrize("boot", ["one", "two"])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_death_at_any_step_leaves_the_dirty_file_or_the_clean_one(
    scenario: str, resumed: bool, boot: str, logs: AnnouncedLogs
) -> None:
    """... never neither, and never a cached file with wrong bytes, whatever is written then."""
    logs.expect("never synced")
    prepare, allowed = SCENARIOS[scenario]
    place = Place.new(cached=True)
    mounted = Mounted(place)
    passed = steps_of(prepare(mounted))
    mounted.close()
    place.remove()
    assert any(name.startswith("cache") for name in passed)
    for count in range(len(passed)):
        die_at(count, passed[count], prepare, allowed, resumed=resumed, boot=boot)


def die_at(
    count: int, name: str, prepare: Callable[[Mounted], Callable[[], None]], allowed: set[bytes], *,
    resumed: bool, boot: str,
) -> None:  # fmt: skip
    place = Place.new(cached=True)
    one = Mounted(place)
    work = prepare(one)
    left = count

    def at(_: str) -> None:
        nonlocal left
        if not left:
            raise Killed
        left -= 1

    steps.arm(at)
    with pytest.raises(Killed):
        work()
    steps.arm(None)
    one.close()
    place.boot = boot
    after = Mounted(place, resumed=resumed)
    try:
        if resumed:
            for node in list(after.overlay.ledger.nodes.values()):
                for _ in range(node.writers):
                    after.overlay.released(node.ino)
        where = f"after a death at {name}, step {count}"
        assert after.read("/f") in allowed, where
        assert after.wrong_in_cache() == [], where
        data = after.read("/f")
        after.write("/f", b"!!!!", 0)  # in place
        assert after.wrong_in_cache() == [], where
        assert after.read("/f") == b"!!!!" + data[4:], where
        after.drain()
        assert after.in_cache(key_of(after, "/f")) == b"!!!!", where
        tier(after).upkeep()
        after.overlay.sync_names()
        assert after.landing.files() == [], where
    finally:
        after.close()
        place.remove()


def test_a_copy_of_what_is_no_more_leaves_first(one: Mounted) -> None:
    """Of a file that was removed, overwritten, or has another name: else a job that keeps its last checkpoint
    only has a cache that is full of the others."""
    for name in ("/gone", "/changed", "/renamed", "/kept"):
        one.write(name, name.encode() * 1000)
    one.drain()
    one.overlay.unlink(*one.at("/gone"))
    one.write("/changed", b"another content")
    one.overlay.rename(*one.at("/renamed"), *one.at("/to"), replace=True)
    one.drain()
    assert isinstance(one.cache, DirectoryTier) and one.cache.store is not None
    outdated = set()
    for entry in one.cache.entries():
        held = one.cache.store.catalogue.held(bytes.fromhex(entry.key.digest))
        if held is not None and held.superseded:
            outdated.add((entry.key.key, entry.key.size))
    assert outdated == {("gone", 5000), ("changed", 8000), ("renamed", 8000)}
