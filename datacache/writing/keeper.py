"""
Who looks after a landing zone, each second: what its disk has left, what could not be noted before, and
who never came for what was landed for it.

Above the high watermark uploads wait for no delay, and clean copies on the same file system leave, as far
as their pins and the policy of their tier allow; until it is below the low one. `pressure` decides, the
`Keeper` acts. Writers that the kernel serves are not seen here: they may be faster than any second.
"""

import logging
import os
import threading
from dataclasses import dataclass
from typing import Protocol

from datacache.errors import LandingError
from datacache.writing.journal import Journal
from datacache.writing.landing import Landing, Room
from datacache.writing.overlay import Overlay

logger = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two looks."""
SYNCED = 30
"""Looks after which files that were closed without a sync (`--durability fsync`) are synced: no sooner than
a disk would do it by itself."""
BARREN = 30
"""Looks for which no copies are asked to leave after none could."""


@dataclass(frozen=True)
class Watermarks:
    """Fractions of the landing zone's file system that are in use."""

    high: float
    """... at which it is said to be under pressure,"""
    low: float
    """... until so much is."""


@dataclass(frozen=True)
class Pressure:
    """What is to be done about a disk."""

    hurry: bool
    """Uploads go at once."""
    over_by: int
    """Bytes that should leave."""


def pressure(room: Room, marks: Watermarks, *, before: bool) -> Pressure:
    """What a disk that has `room` is under; `before`: it was under pressure at the last look."""
    used = room.total - room.available
    if used <= room.total * (marks.low if before else marks.high):
        return Pressure(False, 0)
    return Pressure(True, used - int(room.total * marks.low))


class Copies(Protocol):
    """The cache."""

    def make_room(self, device: int, over_by: int) -> int:
        """Give up copies on the file system `device`; the bytes that this freed."""


class Uploads(Protocol):
    """The uploader."""

    def hurry(self, on: bool) -> None:
        """Whether uploads wait for no delay."""


class Keeper:
    """Looks at a landing zone; `start` and `close` are for its thread."""

    def __init__(
        self, landing: Landing, journal: Journal, overlay: Overlay, *, copies: Copies, uploads: Uploads,
        marks: Watermarks,
    ) -> None:  # fmt: skip
        self._landing, self._journal, self._overlay = landing, journal, overlay
        self._copies, self._uploads, self._marks = copies, uploads, marks
        self._device = os.stat(landing.directory).st_dev
        self.hurrying = False
        """Whether the disk was under pressure at the last look."""
        self._barren = self._looks = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<Keeper of {self._landing.directory}{' under pressure' if self.hurrying else ''}>"

    def look(self) -> None:
        """One look. Raises LandingError."""
        if self._overlay.ledger.unnoted:
            self._overlay.note_closes()
        self._overlay.awaited.look()
        self._looks += 1
        if not self._looks % SYNCED:
            self._overlay.sync_closed()
        now = pressure(self._landing.room(), self._marks, before=self.hurrying)
        if now.hurry != self.hurrying:
            self.hurrying = now.hurry
            self._uploads.hurry(now.hurry)
        if not now.over_by:
            self._journal.top_up()
            return
        if self._overlay.ledger.keeps_unnamed:
            self._overlay.sync_names()  # what nobody names any more goes
        if self._barren:
            self._barren -= 1
        elif not self._copies.make_room(self._device, now.over_by):
            self._barren = BARREN  # nothing may leave now: the disk is full of what others have

    def start(self) -> None:
        """Look each second until `close`."""
        self._thread = threading.Thread(target=self._run, name="landing-keeper")
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        said = False
        while not self._stop.wait(EVERY):
            try:
                self.look()
                said = False
            except LandingError as error:
                if not said:
                    logger.warning("%s", error)
                said = True
            except Exception:
                logger.exception("the landing zone cannot be looked after")
