"""
A landing zone on a disk that is filled to its last block: what was acknowledged is kept, what is owed is
paid, and all goes on when there is room again.

The catalogue of names lies on the same disk, as it does where nothing else is said.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from datacache.clock import VirtualClock
from datacache.config.parsing import read_settings
from datacache.errors import DatacacheError, IndexFull, LandingFull
from datacache.sources.memory import MemorySource
from datacache.worker import Worker
from datacache.writing.ballast import Ballast
from datacache.writing.landing import LandedFile
from tests.conftest import AnnouncedLogs
from tests.support import power
from tests.support.overlays import Mounted, Place

pytestmark = pytest.mark.skipif(bool(power.missing()), reason=power.missing())

SMALL = 100


@pytest.fixture
def place(tmp_path: Path, logs: AnnouncedLogs) -> Iterator[Place]:
    logs.expect("its disk is full")
    with power.disk(tmp_path, size=96 << 20, block=4096) as disk:
        yield Place(disk.root, MemorySource(), VirtualClock())


def fill(descriptor: int) -> None:
    """Write to the last block; what is written is on the disk, so that its file system owes nobody any."""
    at = 0
    for size in (1 << 20, 4096):
        with pytest.raises(OSError, match="No space"):
            while True:
                at += os.pwrite(descriptor, bytes(size), at)
                os.fdatasync(descriptor)


def written(mounted: Mounted) -> None:
    for number in range(SMALL):
        mounted.write(f"/{number:03}", b"%d" % number)


def begun(mounted: Mounted) -> tuple[int, LandedFile]:
    """A file that somebody writes to."""
    ino = mounted.overlay.create(*mounted.at("/huge"), mode=0o644, uid=0, gid=0).ino
    return ino, mounted.overlay.open(ino, writing=True)


def patiently(mounted: Mounted) -> None:
    """Pay all that is due, as the uploader does: what meets a full disk is tried again."""
    for _ in range(3 * SMALL):
        try:
            if not mounted.pay():
                return
        except (IndexFull, LandingFull):
            for seq in list(mounted.overlay.ledger.running):
                mounted.settling.stopped(mounted.overlay.ledger.ops[seq])
    raise AssertionError(f"it does not end: {mounted.settling.ops()[:3]}")


def expected() -> dict[str, bytes]:
    return {f"/{number:03}": b"%d" % number for number in range(SMALL)}


def test_all_goes_on_while_the_disk_is_full(place: Place) -> None:
    """Closes, uploads and removals are noted on a disk that writers have filled, unseen by us; and what was
    uploaded then is there for everybody at once."""
    mounted = Mounted(place)
    written(mounted)
    ino, file = begun(mounted)
    fill(file.descriptor)
    mounted.overlay.closed(ino, file)
    patiently(mounted)
    assert not mounted.settling.ops(), "huge is in the bucket, too"
    assert {path: data for path, data in mounted.tree().items() if path != "/huge"} == expected()
    mounted.overlay.unlink(*mounted.at("/huge"))
    patiently(mounted)
    mounted.overlay.sync_names()
    mounted.write("/new", b"x")
    patiently(mounted)
    assert mounted.tree() == {**expected(), "/new": b"x"}
    mounted.close()


@pytest.mark.parametrize("killed", [True, False])
def test_a_zone_is_opened_on_a_full_disk(place: Place, killed: bool) -> None:
    """Whether its process was killed, or ended and gave back what the journal had of the disk."""
    if killed:
        pid = os.fork()
        if not pid:
            try:
                mounted = Mounted(place)
                written(mounted)
                fill(begun(mounted)[1].descriptor)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    else:
        mounted = Mounted(place)
        written(mounted)
        mounted.close()
        with open(place.root / "filler", "wb") as other:
            fill(other.fileno())
    after = Mounted(place)
    assert len(after.settling.ops()) == SMALL + killed
    patiently(after)
    tree = after.tree()
    assert {path: data for path, data in tree.items() if path != "/huge"} == expected()
    assert ("/huge" in tree) == killed
    after.close()


def test_a_data_set_starts_on_a_full_disk(tmp_path: Path, place: Place) -> None:
    """Mounts and `recover`: the catalogue of names is opened first, and needs room as the journal does."""
    (tmp_path / "bucket").mkdir()
    given = {
        "uri": [f"file://{tmp_path}/bucket"], "rw": True, "state": f"{place.root}/data",
        "cache": [f"ssd:{tmp_path}/cache=1MiB"], "upload-delay": "1h",
    }  # fmt: skip
    settings = read_settings(given, config_file=None, environment={})
    with Worker(settings) as worker:
        assert worker.writing is not None
        overlay = worker.writing.overlay
        for number in range(SMALL):
            ino = overlay.create(worker.index.resolve("/").ino, b"%d" % number, mode=0o644, uid=0, gid=0).ino
            overlay.closed(ino, overlay.open(ino, writing=True))
    with open(place.root / "filler", "wb") as other:
        fill(other.fileno())
    with Worker(settings) as worker:
        assert worker.flush("/", timeout=60)["clean"]
    assert len(os.listdir(tmp_path / "bucket")) == SMALL


def test_ballast_is_made_again_when_there_is_room(place: Place) -> None:
    mounted = Mounted(place)
    ballast, other = mounted.journal.ballast, place.root / "filler"
    assert os.path.exists(mounted.landing.directory + "/ballast")
    with open(other, "wb") as file:
        fill(file.fileno())
    before = free(place)
    while ballast.give_up():
        pass
    assert free(place) > before
    mounted.journal.top_up()
    assert not os.path.exists(mounted.landing.directory + "/ballast"), "there is no room"
    other.unlink()
    mounted.journal.top_up()
    assert os.path.exists(mounted.landing.directory + "/ballast")
    mounted.close()


def free(place: Place) -> int:
    st = os.statvfs(place.root)
    return st.f_bfree * st.f_frsize


def test_a_journal_that_outgrows_what_it_has_goes_on_when_there_is_room(place: Place) -> None:
    """On a full disk it holds what it has space for and refuses more, with all that it holds; it never grows
    into what it cannot have, for then nothing could be noted any more."""
    mounted = Mounted(place)
    with open(place.root / "filler", "wb") as other:
        fill(other.fileno())
    text = "n" * 1000
    number = refused = 0
    while refused < 5:  # it has given up its ballast by then
        try:
            with mounted.journal.change("filler") as change:
                change.set_meta(f"{number}", text)
            number += 1
        except LandingFull:
            refused += 1
    for _ in range(2000):  # some 2,000 pages in the log: twice what it has
        with mounted.journal.change("filler") as change:
            change.set_meta("0", text.upper())
    (place.root / "filler").unlink()
    with mounted.journal.change("filler") as change:
        change.set_meta("last", text)
    known = mounted.journal.meta()
    assert (known["0"], known["1"], known["last"]) == (text.upper(), text, text)
    mounted.close()


def test_where_there_is_no_disk_there_is_no_ballast(tmp_path: Path) -> None:
    ballast = Ballast(str(tmp_path / "nowhere"))
    assert not ballast.make()
    assert not ballast.lighten()


def test_a_close_that_meets_a_full_disk_is_noted_later(place: Place, logs: AnnouncedLogs) -> None:
    """A file does not stay open for writing because its close could not be noted, nor one that was unlinked
    on the disk."""
    from datacache.writing import steps

    logs.expect("a close cannot be noted")
    mounted = Mounted(place)
    overlay = mounted.overlay
    ino, file = begun(mounted)
    os.pwrite(file.descriptor, b"data", 0)
    gone = overlay.create(*mounted.at("/gone"), mode=0o644, uid=0, gid=0).ino
    unlinked = overlay.open(gone, writing=True)
    overlay.unlink(*mounted.at("/gone"))

    def full(name: str) -> None:
        if name.startswith("journal.before."):
            raise LandingFull("no room")

    steps.arm(full)
    try:
        overlay.closed(ino, file)
        overlay.closed(gone, unlinked)
        assert overlay.note_closes() == 2
        assert not mounted.pay()
    finally:
        steps.arm(None)
    dirty = mounted.settling.dirty()
    assert (dirty.files, dirty.open) == (1, 0), "nobody has it open"
    assert overlay.note_closes() == 0
    mounted.drain()
    overlay.sync_names()
    assert mounted.tree() == {"/huge": b"data"}
    assert not mounted.settling.ops()
    assert not mounted.landing.files()
    mounted.close()


def test_what_cannot_be_opened_is_not_open(place: Place) -> None:
    """An open that fails halfway leaves no writer behind."""
    mounted = Mounted(place)
    mounted.write("/a", b"x")
    ino = mounted.overlay.resolve("/a").ino
    calls = 0
    plain = mounted.landing.open

    def once(number: int, *, writing: bool) -> LandedFile:
        nonlocal calls
        calls += 1
        if writing:
            raise LandingFull("no more files")
        return plain(number, writing=writing)

    mounted.landing.open = once  # type: ignore[method-assign]
    with pytest.raises(DatacacheError):
        mounted.overlay.open(ino, writing=True)
    assert calls == 2
    mounted.landing.open = plain  # type: ignore[method-assign]
    assert mounted.settling.dirty().open == 0
    mounted.drain()
    assert mounted.tree() == {"/a": b"x"}
    mounted.close()
