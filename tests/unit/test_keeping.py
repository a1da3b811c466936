"""What was uploaded is in the cache: the landing file itself, where that can be, and never while it may be
written to."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.cache.memory import MemoryTier
from datacache.cache.tier import Tier
from datacache.cache.tiered import TieredCache
from datacache.clock import VirtualClock
from datacache.model import ByteRange, CacheKey, Entry, KiB, MiB
from datacache.sources.sink import Stored
from datacache.writing.landing import Quiet
from datacache.writing.opening import _Copies
from tests.support.overlays import Mounted, Place


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place.new()
    yield place
    place.remove()


class Keeping:
    """A mounted data set whose uploads are kept in `cache`."""

    def __init__(self, place: Place, cache: Tier) -> None:
        self.cache, self.place = cache, place
        self.mounted = Mounted(place)
        copies = _Copies(self, cache)  # type: ignore[arg-type]
        self.mounted.settling._keep = copies.keep
        self.wrap: Callable[[Callable[[], None] | None], Callable[[], None] | None] = lambda kept: kept

    def cache_key(self, entry: Entry) -> CacheKey:
        return CacheKey("memory://test", entry.key, entry.version.token, entry.size)

    def key(self, path: str) -> CacheKey:
        return self.cache_key(self.mounted.overlay.resolve(path))

    def landed(self, path: str) -> Path:
        node = self.mounted.overlay.ledger.nodes[self.mounted.overlay.resolve(path).ino]
        return Path(self.mounted.landing.directory, "files", str(node.landing))

    def read(self, path: str) -> bytes:
        key = self.key(path)
        file = self.cache.open(key)
        try:
            return bytes(file.read(ByteRange(0, key.size)))
        finally:
            file.close()


@pytest.fixture
def keeping(place: Place, clock: VirtualClock) -> Iterator[Keeping]:
    rules = Rules("ssd:x", 64 * MiB, 16 * KiB, reserve=0.0, dataset="mine")
    tier = DirectoryTier(
        str(place.root / "cache"), rules, owner=Owner(os.getpid(), "", ""), clock=clock, keeper=False
    )
    keeping = Keeping(place, TieredCache([tier]))
    yield keeping
    keeping.mounted.close()
    tier.close()


def test_the_landing_file_becomes_the_cached_file(keeping: Keeping) -> None:
    """No byte is copied, and it lives on when the landing zone has let go of it."""
    data = os.urandom(40 * KiB)
    keeping.mounted.write("/a", data)
    path = keeping.landed("/a")
    inode = path.stat().st_ino
    keeping.mounted.drain()
    assert (path.stat().st_ino, path.stat().st_nlink) == (inode, 2)
    keeping.mounted.overlay.sync_names()  # ... which it does when the journal is synced
    assert not path.exists()
    assert keeping.read("/a") == data
    lent = keeping.cache.lend(keeping.key("/a"))
    assert lent is not None and lent.identity[1] == inode
    lent.close()


def test_a_file_is_the_cache_s_only_when_nobody_can_write_to_it(keeping: Keeping) -> None:
    """What is written again while it is sent is not taken: the landing file is still being written."""
    mounted = keeping.mounted
    mounted.write("/a", b"one" * 5000)
    (op,) = mounted.settling.ops()
    begun = mounted.settling.begin(op)
    assert begun is not None
    content = mounted.settling.content(begun)
    assert content is not None
    info = keeping.place.bucket.put("a", b"one" * 5000)
    put = mounted.settling._keep

    def keep(entry: Entry, content: Quiet) -> Callable[[], None] | None:
        kept = put(entry, content)
        content.stop()  # as the overlay does for who opens it
        mounted.write("/a", b"two" * 5000)
        return kept

    mounted.settling._keep = keep
    mounted.settling.settled(begun, Stored(info, {}, "digest"), content)
    assert keeping.landed("/a").stat().st_nlink == 1
    assert not list(keeping.cache.entries())
    mounted.settling._keep = put
    mounted.drain()
    assert keeping.read("/a") == b"two" * 5000


def test_a_copy_is_made_where_a_file_cannot_be_had(place: Place, clock: VirtualClock) -> None:
    """A cache on another file system, or in memory: the bytes are there before the file is called clean."""
    tier = MemoryTier()
    keeping = Keeping(place, tier)
    keeping.mounted.write("/a", b"x" * 5000)
    keeping.mounted.drain()
    assert keeping.read("/a") == b"x" * 5000
    keeping.mounted.close()
    tier.close()


def test_a_landing_file_that_went_in_between_is_copied(keeping: Keeping) -> None:
    """The journal may be synced, and the file removed, in the moment in which it is called clean."""
    mounted = keeping.mounted
    real = mounted.settling._put

    def put(*args: Any) -> None:
        real(*args)
        mounted.overlay.sync_names()

    mounted.settling._put = put  # type: ignore[method-assign]
    mounted.write("/a", b"x" * 5000)
    path = keeping.landed("/a")
    mounted.drain()
    assert not path.exists()
    assert keeping.read("/a") == b"x" * 5000


def test_a_node_that_a_power_cut_brings_back_has_a_file_of_its_own(keeping: Keeping) -> None:
    """The cache had its landing file already: who writes to the one does not write to the other."""
    mounted = keeping.mounted
    mounted.write("/a", b"uploaded" * 1000)
    path = keeping.landed("/a")
    before = path.stat().st_mtime_ns
    cached = keeping.place.root / "as the cache has it"
    os.link(path, cached)
    mounted.close()
    keeping.mounted = again = Mounted(keeping.place)
    assert (path.stat().st_nlink, path.stat().st_mtime_ns) == (1, before)
    assert again.read("/a") == b"uploaded" * 1000
    again.write("/a", b"more", offset=3)
    assert cached.read_bytes() == b"uploaded" * 1000
    assert len(again.landing.files()) == 1
