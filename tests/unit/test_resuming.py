"""What the next process makes of a landing zone after the power went, or only the process."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from datacache.writing.owing import beside
from tests.conftest import AnnouncedLogs
from tests.support.overlays import Forgotten, Mounted, Place, rename


@pytest.fixture
def place() -> Iterator[Place]:
    found = Place.new()
    found.bucket.put("old", b"as it was")
    yield found
    found.remove()


def begin(mounted: Mounted, path: str, data: bytes) -> None:
    """Write to a file, and go on having it open."""
    parent, name = mounted.at(path)
    known = mounted.tree()
    if path in known:
        ino = mounted.overlay.resolve(path).ino
        mounted.overlay.land(ino)
    else:
        ino = mounted.overlay.create(parent, name, mode=0o644, uid=1, gid=2).ino
    file = mounted.overlay.open(ino, writing=True)
    os.pwrite(file.descriptor, data, 0)
    file.close()


def after_a_power_cut(place: Place) -> Mounted:
    return Mounted(replace(place, boot="the next"))


def test_what_was_never_synced_goes_under_a_name_of_its_own(place: Place, logs: AnnouncedLogs) -> None:
    """What was never synced when the power went is kept as `NAME.unsynced.ID`, and the name is what it was
    before. Both are sent."""
    first = Mounted(place)
    begin(first, "/old", b"AS")
    begin(first, "/new", b"in part")
    begin(first, "/empty", b"")
    first.write("/whole", b"synced, then closed")
    first.overlay.symlink(*first.at("/link"), b"whole", uid=0, gid=0)
    first.close()
    logs.expect("never synced")
    logs.expect("none of it is there")
    second = after_a_power_cut(place)
    try:
        tree = second.tree()
        aside = {path.partition(".unsynced.")[0]: data for path, data in tree.items() if ".unsynced." in path}
        assert aside == {"/old": b"AS it was", "/new": b"in part"}
        plain = {path: data for path, data in tree.items() if ".unsynced." not in path}
        assert plain == {"/old": b"as it was", "/whole": b"synced, then closed", "/link": plain["/link"]}
        second.drain()
        assert second.tree() == tree
        keys = {info.key for page in place.bucket.list("", recursive=True) for info in page.objects}
        assert keys == {path[1:] for path in tree}
    finally:
        second.close()


@pytest.mark.parametrize("left", ["nothing", "a size of 0", "zeros"])
def test_a_file_that_did_not_get_to_its_new_name_is_under_the_old_one(
    place: Place, logs: AnnouncedLogs, left: str
) -> None:
    """It was changed, renamed, and never synced; somebody else's fsync made the rename durable. What the
    bucket has under the old name is all that there is."""
    first = Mounted(place)
    begin(first, "/old", b"AS")
    first.overlay.rename(*first.at("/old"), *first.at("/new"), replace=True)
    first.overlay.sync_names()
    node = first.overlay.ledger.nodes[first.overlay.resolve("/new").ino]
    path = os.path.join(first.landing.directory, "files", str(node.landing))
    first.close()
    if left == "nothing":
        os.unlink(path)
    else:
        size = os.path.getsize(path) if left == "zeros" else 0
        os.truncate(path, 0)
        os.truncate(path, size)
    logs.expect("never synced")
    logs.expect("none of it is there")
    second = after_a_power_cut(place)
    try:
        place.clock.advance(60)  # what was listed before is not believed any more
        plain = {path: data for path, data in second.tree().items() if ".unsynced." not in path}
        assert plain == {"/old": b"as it was"}
        second.drain()
        plain = {path: data for path, data in second.tree().items() if ".unsynced." not in path}
        assert plain == {"/old": b"as it was"}
    finally:
        second.close()


def test_what_was_synced_once_keeps_its_name(place: Place) -> None:
    """Whoever appends to a log was told that its beginning is safe."""
    first = Mounted(place)
    begin(first, "/log", b"begin")
    ino = first.overlay.resolve("/log").ino
    first.overlay.sync(ino)
    file = first.overlay.open(ino, writing=True)
    os.pwrite(file.descriptor, b"begin, and more", 0)
    file.close()
    first.close()
    second = after_a_power_cut(place)
    try:
        assert second.tree()["/log"] == b"begin, and more"
    finally:
        second.close()


def test_a_process_that_dies_takes_no_bytes_with_it(place: Place) -> None:
    """The pages of a file are the kernel's: after a mere kill all that was written is there."""
    first = Mounted(place)
    begin(first, "/old", b"AS")
    begin(first, "/new", b"in part")
    first.close()
    second = Mounted(place)
    try:
        assert second.tree() == {"/old": b"AS it was", "/new": b"in part"}
    finally:
        second.close()


def test_an_end_in_order_syncs_what_was_closed_without_that(place: Place) -> None:
    """`--durability fsync`: as the keeper of the zone does it now and then."""
    first = Mounted(place)
    ino = first.overlay.create(*first.at("/new"), mode=0o644, uid=1, gid=2).ino
    file = first.overlay.open(ino, writing=True)
    os.pwrite(file.descriptor, b"whole", 0)
    first.overlay.closed(ino, file)
    first.overlay.sync_closed()
    first.close()
    second = after_a_power_cut(place)
    try:
        assert second.tree()["/new"] == b"whole"
    finally:
        second.close()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (b"a.bin", b"a.bin.unsynced.12345678"),
        (b"x" * 255, b"x" * 237 + b".unsynced.12345678"),
        ("é".encode() * 127, "é".encode() * 118 + b".unsynced.12345678"),
    ],
)
def test_a_name_beside_is_a_name(name: bytes, wanted: bytes) -> None:
    """It is cut, and no character in half."""
    assert beside(name, "unsynced", "", "12345678") == wanted
    assert len(wanted) <= 255


def test_what_takes_the_place_of_synced_bytes_is_synced(place: Place) -> None:
    """Written beside and renamed without a sync, as many programs do: what was promised to survive is there,
    or what came in its place is."""
    first = Mounted(place)
    first.write("/a", b"synced, and not in the bucket")
    synced: set[int] = set()
    sync = first.landing.sync

    def noted(number: int) -> None:
        sync(number)
        synced.add(number)

    first.landing.sync = noted  # type: ignore[method-assign]
    begin(first, "/beside", b"never synced by who wrote it")
    rename(first, "/beside", "/a")
    first.overlay.sync_names()
    for number in set(first.landing.files()) - synced:
        os.truncate(os.path.join(first.landing.directory, "files", str(number)), 0)
    first.close()
    second = after_a_power_cut(place)
    try:
        assert second.tree() == {"/a": b"never synced by who wrote it", "/old": b"as it was"}
    finally:
        second.close()


@pytest.mark.parametrize("landed", [False, True])
def test_nor_does_what_was_only_renamed_go(place: Place, landed: bool, logs: AnnouncedLogs) -> None:
    """Its bytes are an object under the name that it had, which the bucket is owed to delete."""
    first = Mounted(place)
    assert first.tree() == {"/old": b"as it was"}
    if landed:
        begin(first, "/old", b"AS")
    rename(first, "/old", "/new")
    begin(first, "/beside", b"never synced by who wrote it")
    rename(first, "/beside", "/new")
    assert first.overlay.ledger.nodes[first.overlay.resolve("/new").ino].synced
    first.overlay.sync_names()
    first.close()
    second = after_a_power_cut(place)
    try:
        second.drain()
        assert second.tree() == {"/new": b"never synced by who wrote it"}
    finally:
        second.close()


def test_parts_of_what_the_power_cut_took_are_let_go(place: Place) -> None:
    first = Mounted(place)
    first.write("/large", b"data")
    (op,) = first.settling.ops()
    first.settling.remember(op, "some parts")
    os.unlink(os.path.join(first.landing.directory, "files", str(op.landing)))
    first.close()
    second = after_a_power_cut(place)
    try:
        uploads = Forgotten()
        second.overlay.owing.attach(uploads)
        assert uploads.forgotten == ["some parts"]
        assert not second.settling.ops()
    finally:
        second.close()


def test_when_the_mount_is_gone_nobody_has_anything_open(place: Place) -> None:
    """What writers of an earlier daemon had open is due, once each; what was unlinked is swept; what this one
    has open goes on."""
    first = Mounted(place)
    begin(first, "/theirs", b"written")
    begin(first, "/old", b"AS")
    begin(first, "/both", b"both")
    begin(first, "/unlinked", b"x")
    first.overlay.unlink(*first.at("/unlinked"))
    first.close()
    second = Mounted(place, resumed=True)
    try:
        inos = {name: second.overlay.resolve(f"/{name}").ino for name in ("theirs", "old", "both")}
        ours = second.overlay.open(inos["both"], writing=True)
        nodes = second.overlay.ledger.nodes
        assert sorted(node.writers for node in nodes.values()) == [1, 1, 1, 2]
        for _ in range(2):
            second.overlay.forsaken()
            assert {ino: node.writers for ino, node in nodes.items()} == {
                inos["theirs"]: 0, inos["old"]: 0, inos["both"]: 1,
            }  # fmt: skip
        second.overlay.closed(inos["both"], ours)
        second.drain()
        assert not nodes
        assert second.read("/theirs") == b"written"
    finally:
        second.close()
