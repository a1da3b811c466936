"""What the state machine of the write path would meet too rarely."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from datacache.clock import VirtualClock
from datacache.sources.memory import MemorySource
from tests.support import power
from tests.support.overlays import Mounted, Place


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    """A bucket with `a` and `b`, mounted."""
    place = Place.new()
    for key in "ab":
        place.bucket.put(key, key.encode())
    one = Mounted(place)
    yield one
    one.close()
    place.remove()


def rename(mounted: Mounted, old: str, new: str) -> None:
    mounted.overlay.rename(*mounted.at(old), *mounted.at(new), replace=True)


@pytest.mark.parametrize("paid", [False, True])
def test_clean_files_can_be_swapped(mounted: Mounted, paid: bool) -> None:
    """Clean files that are swapped by renames keep their bytes, here and in the bucket. The second rename
    would take away what the third has to be made of."""
    for old, new in (("/a", "/t"), ("/b", "/a"), ("/t", "/b")):
        rename(mounted, old, new)
        if paid:
            mounted.drain()
    assert mounted.tree() == {"/a": b"b", "/b": b"a"}
    mounted.drain()
    assert mounted.tree() == {"/a": b"b", "/b": b"a"}
    assert not mounted.overlay.ops()


@pytest.mark.skipif(bool(power.missing()), reason=power.missing())
def test_a_full_landing_zone_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """Writers fill the disk, unseen by us; closes, uploads and removals are noted all the same."""
    with power.disk(tmp_path, size=64 << 20) as disk:
        mounted = Mounted(Place(disk.root, MemorySource(), VirtualClock()))
        overlay = mounted.overlay
        ino = overlay.create(*mounted.at("/huge"), mode=0o644, uid=0, gid=0).ino
        file = overlay.open(ino, writing=True)
        with pytest.raises(OSError, match="No space"):
            for at in range(0, 128 << 20, 1 << 20):
                os.pwrite(file.descriptor, bytes(1 << 20), at)
        overlay.closed(ino, file)
        assert mounted.pay(), "the close made it due"
        overlay.unlink(*mounted.at("/huge"))
        mounted.drain()
        mounted.write("/new", b"x")
        mounted.drain()
        assert mounted.tree() == {"/new": b"x"}
        mounted.close()
