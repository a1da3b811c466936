"""Who looks after the landing zone: the decision as a table, the acts on a zone in a directory."""

import os
from collections.abc import Iterator

import pytest

from datacache.config.parsing import read_settings
from datacache.config.settings import Settings
from datacache.errors import LandingFull, SettingError
from datacache.writing import steps
from datacache.writing.awaited import PATIENCE
from datacache.writing.keeper import BARREN, Keeper, Pressure, Watermarks, pressure
from datacache.writing.landing import Room
from tests.conftest import AnnouncedLogs
from tests.support.overlays import Mounted, Place

MARKS = Watermarks(high=0.9, low=0.8)


@pytest.mark.parametrize(
    ("used", "before", "expected"),
    [
        (80, False, Pressure(False, 0)),
        (90, False, Pressure(False, 0)),
        (91, False, Pressure(True, 11)),
        (85, False, Pressure(False, 0)),
        (85, True, Pressure(True, 5)),
        (80, True, Pressure(False, 0)),
        (100, True, Pressure(True, 20)),
    ],
)
def test_pressure_begins_above_high_and_ends_at_low(used: int, before: bool, expected: Pressure) -> None:
    room = Room(100, max(0, 95 - used), 100 - used)
    assert pressure(room, MARKS, before=before) == expected


def test_what_is_no_disk_is_under_no_pressure() -> None:
    assert pressure(Room(0, 0, 0), MARKS, before=True) == Pressure(False, 0)


class Others:
    """The cache and the uploader."""

    def __init__(self) -> None:
        self.hurried: list[bool] = []
        self.asked: list[tuple[int, int]] = []
        self.freed = 1

    def hurry(self, on: bool) -> None:
        self.hurried.append(on)

    def make_room(self, device: int, over_by: int) -> int:
        self.asked.append((device, over_by))
        return self.freed


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    place = Place.new()
    one = Mounted(place)
    yield one
    one.close()
    place.remove()


def keeper(mounted: Mounted, others: Others) -> Keeper:
    return Keeper(
        mounted.landing, mounted.journal, mounted.overlay, copies=others, uploads=others, marks=MARKS
    )


def test_above_high_uploads_go_first_and_clean_copies_leave(mounted: Mounted) -> None:
    """Above high, uploads go first and clean files leave."""
    others, used = Others(), 50
    one = keeper(mounted, others)
    mounted.landing.room = lambda: Room(100, 95 - used, 100 - used)  # type: ignore[method-assign]
    device = os.stat(mounted.landing.directory).st_dev
    one.look()
    assert (others.hurried, others.asked) == ([], [])
    used = 95
    one.look()
    assert (others.hurried, others.asked) == ([True], [(device, 15)])
    used = 85
    one.look()
    assert (others.hurried, others.asked) == ([True], [(device, 15), (device, 5)])
    used = 80
    one.look()
    one.look()
    assert (others.hurried, len(others.asked)) == ([True, False], 2)


def test_copies_that_may_not_leave_are_not_asked_each_second(mounted: Mounted) -> None:
    """Nor is a disk synced each second that others keep full."""
    others, syncs = Others(), []
    others.freed = 0
    mounted.landing.room = lambda: Room(100, 0, 0)  # type: ignore[method-assign]
    mounted.overlay.sync_names = lambda: syncs.append(1)  # type: ignore[method-assign]
    one = keeper(mounted, others)
    for _ in range(BARREN + 2):
        one.look()
    assert len(others.asked) == 2
    assert not syncs


def test_what_nobody_names_any_more_goes_under_pressure(mounted: Mounted) -> None:
    """Landing files that wait for the next sync would else wait for it on a full disk."""
    mounted.write("/a", b"x")
    mounted.drain()
    assert mounted.landing.files()
    mounted.landing.room = lambda: Room(100, 0, 0)  # type: ignore[method-assign]
    keeper(mounted, Others()).look()
    assert not mounted.landing.files()


def test_a_close_is_noted_at_the_next_look(mounted: Mounted, logs: AnnouncedLogs) -> None:
    logs.expect("a close cannot be noted")
    ino = mounted.overlay.create(*mounted.at("/a"), mode=0o644, uid=0, gid=0).ino
    file = mounted.overlay.open(ino, writing=True)

    def full(name: str) -> None:
        if name == "journal.before.close":
            raise LandingFull("no room")

    steps.arm(full)
    try:
        mounted.overlay.closed(ino, file)
    finally:
        steps.arm(None)
    assert not mounted.pay()
    keeper(mounted, Others()).look()
    assert mounted.pay()


def test_what_nobody_came_for_is_closed_at_the_next_look(mounted: Mounted) -> None:
    mounted.place.bucket.put("a", b"as it is")
    ino = mounted.overlay.resolve("/a").ino
    mounted.overlay.awaited.keep(ino, 1, mounted.landed(ino, truncate=False))
    one = keeper(mounted, Others())
    one.look()
    assert mounted.overlay.landed(ino)
    mounted.place.clock.advance(PATIENCE)
    one.look()
    assert not mounted.overlay.landed(ino)
    assert not mounted.settling.ops()


def read(**given: object) -> Settings:
    return read_settings({"uri": ["memory://x"], "rw": True, **given}, config_file=None, environment={})


def test_how_it_is_written_says_nothing_without_rw() -> None:
    """But by a variable, which may be there for all mounts of a machine."""
    with pytest.raises(SettingError, match=r"--upload-delay.*--rw with it: nothing is written without"):
        read_settings({"uri": ["memory://x"], "upload-delay": "1s"}, config_file=None, environment={})
    environment = {"DATACACHE_UPLOAD_DELAY": "1s"}
    read_settings({"uri": ["memory://x"]}, config_file=None, environment=environment)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.05, 0.92, 0.9)),
        ({"landing-reserve": "0"}, (0.0, 0.92, 0.9)),
        ({"landing-reserve": "0.2"}, (0.2, 0.77, 0.75)),
        ({"landing-high": "0.5"}, (0.05, 0.5, 0.48)),
        ({"landing-high": "0.5", "landing-low": "0.1"}, (0.05, 0.5, 0.1)),
    ],
)
def test_watermarks_that_nobody_gave_follow_the_others(
    given: dict[str, str], expected: tuple[float, float, float]
) -> None:
    writing = read(**given).writing
    assert (writing.reserve, writing.high, writing.low) == expected


@pytest.mark.parametrize(
    ("given", "blamed"),
    [
        ({"landing-high": "0.97"}, "landing-high"),
        ({"landing-high": "0.5", "landing-low": "0.5"}, "landing-low"),
        ({"landing-low": "0.95"}, "landing-low"),
        ({"landing-high": "2"}, "landing-high"),
        ({"landing-reserve": "0.2", "landing-high": "0.9"}, "landing-high"),
    ],
)
def test_watermarks_that_cannot_be(given: dict[str, str], blamed: str) -> None:
    with pytest.raises(SettingError, match=blamed):
        read(**given)
