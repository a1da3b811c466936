"""What the state machine of the write path would meet too rarely."""

import os
from collections.abc import Iterator
from typing import NoReturn

import pytest

from datacache.errors import LandingFull, OtherStore
from datacache.writing import overlay, steps
from datacache.writing.journal import OpKind
from datacache.writing.schedule import runnable
from tests.conftest import AnnouncedLogs
from tests.support.overlays import Forgotten, Mounted, Place, rename


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
    assert not mounted.settling.ops()


def test_a_directory_is_renamed_file_by_file(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """rename of a directory | of every file below, as above; beyond 100,000 files EXDEV, on which `mv`
    copies"""
    assert overlay.RENAMED_MAX == 100_000
    for key in ("d/e/1", "d/2"):
        mounted.place.bucket.put(key, key.encode())
    mounted.write("/d/3", b"d/3")
    rename(mounted, "/d", "/to")
    wanted = {"to/e/1": b"d/e/1", "to/2": b"d/2", "to/3": b"d/3"}
    shown = {path[1:]: data for path, data in mounted.tree().items() if data is not None}
    assert shown == {**wanted, "a": b"a", "b": b"b"}
    mounted.drain()
    keys = {key for page in mounted.place.bucket.list("", recursive=True) for key in page.objects}
    assert {one.key for one in keys if not one.key.endswith("/")} == {*wanted, "a", "b"}
    monkeypatch.setattr(overlay, "RENAMED_MAX", 2)
    with pytest.raises(OtherStore, match="more than 2 files"):
        rename(mounted, "/to", "/back")
    assert mounted.tree()["/to/2"] == b"d/2"


def test_a_file_is_written_while_its_copy_is_made(mounted: Mounted) -> None:
    """What the bucket has got is known, though nothing of it can be kept: the next content replaces it, and
    is sent once."""
    mounted.write("/new", b"first")
    mounted.copies.before_kept = lambda: mounted.write("/new", b"second")
    assert mounted.pay()
    assert not list(mounted.cache.entries())
    mounted.copies.before_kept = lambda: None
    assert mounted.place.marks["new"].endswith(".0")
    stored = mounted.in_bucket("new")
    (op,) = mounted.settling.ops()
    assert stored is not None
    assert op.expected == stored.version
    mounted.drain()
    assert mounted.in_cache(mounted.reader.cache_key(mounted.overlay.resolve("/new"))) == b"second"


@pytest.mark.parametrize("data", [b"data", b""])
@pytest.mark.parametrize("ours", [True, False])
def test_a_file_that_was_opened_and_not_written_keeps_its_time(
    mounted: Mounted, data: bytes, ours: bool
) -> None:
    """Its time here, which the bucket does not have, as well as the bucket's; while it is open, too."""
    overlay = mounted.overlay
    if ours:
        mounted.write("/file", data)
        overlay.set_attributes(overlay.resolve("/file").ino, mtime_ns=1_234_567_890_123_456_789)
        mounted.drain()
    else:
        mounted.place.bucket.put("file", data)
        mounted.place.clock.advance(20)
    before = overlay.resolve("/file").mtime_ns
    assert (before == 1_234_567_890_123_456_789) == ours
    for _ in range(2):
        ino = overlay.land(overlay.resolve("/file").ino).ino
        file = overlay.open(ino, writing=True)
        assert overlay.landed(ino)
        assert overlay.resolve("/file").mtime_ns == before
        overlay.closed(ino, file)
        assert not overlay.landed(ino)
        assert overlay.resolve("/file").mtime_ns == before
        mounted.place.clock.advance(20)
        assert mounted.tree()["/file"] == data
    assert bool(mounted.journal.has_attributes()) == ours


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_file_that_was_landed_to_be_emptied_is_that_only_when_it_was(
    mounted: Mounted, emptied: bool, resumed: bool
) -> None:
    """Who opened it may have died with the daemon: no close tells of it. Who was told of an error is not owed
    an empty file."""
    before = mounted.read("/a")
    ino = mounted.overlay.resolve("/a").ino
    mounted.overlay.set_attributes(ino, mode=0o600, mtime_ns=12345)
    mounted.overlay.land(ino, truncate=True)
    if emptied:
        mounted.overlay.emptied(ino)
    mounted.close()
    after = Mounted(mounted.place, resumed=resumed)
    try:
        after.drain()
        assert after.read("/a") == (b"" if emptied else before)
        assert not after.settling.ops() and not after.overlay.ledger.nodes
        assert after.place.bucket.stat("a").size == len(after.read("/a"))
        entry = after.overlay.resolve("/a")
        if resumed:
            assert after.overlay.attributes(entry).mode == 0o600
            assert entry.mtime_ns == 12345
    finally:
        after.close()


def test_a_generation_never_goes_down(mounted: Mounted) -> None:
    """Not of a file that is renamed and written before the bucket has its new name: the kernel would take the
    next content for one that it knows."""
    ino = mounted.overlay.resolve("/a").ino
    seen = []
    for data in (b"first", b"second"):
        rename(mounted, "/a", "/c")
        mounted.write("/c", data)
        seen.append(mounted.overlay.entry(ino).generation)
        mounted.drain()
        seen.append(mounted.overlay.entry(ino).generation)
        rename(mounted, "/c", "/a")
        mounted.drain()
    assert seen == sorted(seen)
    assert seen[0] < seen[2], "another content is another version"


def test_to_land_a_file_that_shall_be_emptied_empties_nothing_that_was_changed(mounted: Mounted) -> None:
    """Its bytes are the only ones, and who asked may be refused yet."""
    mounted.write("/a", b"changed")
    mounted.overlay.land(mounted.overlay.resolve("/a").ino, truncate=True)
    assert mounted.read("/a") == b"changed"


def test_a_file_that_was_landed_empty_has_the_time_it_had(mounted: Mounted) -> None:
    """Whoever empties it gives it another one, even in the same tick of the kernel's clock."""
    before = mounted.overlay.resolve("/a")
    after = mounted.overlay.land(before.ino, truncate=True)
    assert (after.size, after.mtime_ns) == (0, before.mtime_ns)


def test_the_name_of_a_conflict_is_told(mounted: Mounted, logs: AnnouncedLogs) -> None:
    """The kernel believes that it is our file's, and would write to that."""
    logs.expect("that version keeps the name")
    told: list[tuple[bytes, int]] = []
    mounted.index._on_replaced = lambda entries: told.extend((e.name, e.parent) for e in entries)
    parent = mounted.overlay.resolve("/a").parent
    mounted.write("/a", b"ours")
    mounted.place.bucket.put("a", b"theirs")
    mounted.drain()
    assert told == [(b"a", parent)]
    assert mounted.tree()["/a"] == b"theirs"


def test_parts_of_what_is_not_wanted_any_more_are_let_go(mounted: Mounted) -> None:
    """A large file is removed, or replaced, while its upload waits to go on."""
    uploads = Forgotten()
    mounted.overlay.owing.attach(uploads)
    for name in ("/removed", "/replaced"):
        mounted.write(name, b"large")
        op = next(op for op in mounted.settling.ops() if f"/{op.key}" == name)
        mounted.settling.remember(op, f"parts of {name}")
    mounted.overlay.unlink(*mounted.at("/removed"))
    rename(mounted, "/a", "/replaced")
    assert set(uploads.forgotten) == {"parts of /removed", "parts of /replaced"}


def test_a_file_that_is_open_again_is_not_waited_for(mounted: Mounted) -> None:
    """Neither by a rename that comes later, nor by who asks whether all that is due is done; it is due again
    when it is closed, and had been since its first close."""
    mounted.write("/log", b"one\n")
    first = next(op.since for op in mounted.settling.ops())
    ino = mounted.overlay.resolve("/log").ino
    for _ in range(2):
        mounted.place.clock.advance(5.0)
        file = mounted.landed(ino, truncate=False)
        mounted.write("/b", b"beside")
        rename(mounted, "/b", "/c")
        mounted.drain()
        assert mounted.in_bucket("c") is not None
        assert mounted.in_bucket("log") is None
        os.pwrite(file.descriptor, b"two\n", 4)
        mounted.overlay.closed(ino, file)
        assert [op.since for op in mounted.settling.ops()] == [first], "it was not put off"
    mounted.drain()
    stored = mounted.in_bucket("log")
    assert stored is not None and stored.size == 8


def test_what_cannot_be_noted_leaves_nothing_behind(mounted: Mounted) -> None:
    """Nor does a symbolic link whose target cannot be written."""

    def full(name: str) -> None:
        if name in ("journal.before.create", "journal.before.symlink"):
            raise LandingFull("no room")

    parent, _ = mounted.at("/x")
    steps.arm(full)
    try:
        with pytest.raises(LandingFull):
            mounted.overlay.create(parent, b"x", mode=0o644, uid=0, gid=0)
        with pytest.raises(LandingFull):
            mounted.overlay.symlink(parent, b"x", b"target", uid=0, gid=0)
    finally:
        steps.arm(None)
    assert not mounted.landing.files()


@pytest.mark.parametrize("advance", [0, 1000], ids=["listed", "past the TTL"])
def test_what_was_removed_does_not_come_back_with_a_directory_that_is_made_anew(
    mounted: Mounted, advance: float
) -> None:
    """The bucket has the new directory, and the deletes of what was in the old one have yet to come: so pip
    replaces a package."""

    def make(path: str) -> None:
        mounted.overlay.mkdir(*mounted.at(path), mode=0o755, uid=0, gid=0)

    make("/p")
    make("/p/data")
    for path in ("/p/data/blob", "/p/old"):
        mounted.write(path, b"old")
    mounted.drain()
    for path in ("/p/data/blob", "/p/old"):
        mounted.overlay.unlink(*mounted.at(path))
    for path in ("/p/data", "/p"):
        mounted.overlay.rmdir(*mounted.at(path))
    make("/p")
    mounted.write("/p/new", b"new")
    while puts := [op for op in runnable(mounted.settling.ops(), ()) if op.kind is OpKind.PUT]:
        op = mounted.settling.begin(puts[0])
        assert op is not None
        mounted.do(op)
    assert all(op.kind is OpKind.DELETE for op in mounted.settling.ops())
    mounted.place.clock.advance(advance)
    wanted: dict[str, bytes | None] = {"/a": b"a", "/b": b"b", "/p": None, "/p/new": b"new"}
    assert mounted.tree() == wanted
    make("/p/data")
    wanted["/p/data"] = None
    assert mounted.tree() == wanted
    while mounted.pay():
        assert mounted.tree() == wanted
    mounted.place.clock.advance(1000)
    assert mounted.tree() == wanted


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("what", ["unlink", "rename"])
def test_a_directory_outlives_the_last_file_in_it_and_a_death(
    mounted: Mounted, what: str, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there with its file only: with the file goes what says so, unless it is owed at once."""
    mounted.place.bucket.put("d/e/last", b"last")
    assert "/d/e/last" in mounted.tree()

    def dies(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mounted.overlay.ledger, "catalogue", dies)
        if what == "unlink":
            mounted.overlay.unlink(*mounted.at("/d/e/last"))
        else:
            rename(mounted, "/d/e/last", "/last")
    mounted.close()
    after = Mounted(mounted.place, resumed=resumed)
    try:
        after.drain()
        after.place.clock.advance(1000)
        tree = after.tree()
        assert tree["/d/e"] is None
        assert "/d/e/last" not in tree
        assert ("/last" in tree) == (what == "rename")
    finally:
        after.close()
