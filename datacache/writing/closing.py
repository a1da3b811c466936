"""
Closes that were announced and have not come yet.

The kernel tells of close(2) twice: that a descriptor is closed, and waits for the answer; and that nobody
has the file open any more, which it does not wait for. So who has closed a file, and asks for it to be in
the bucket, may be faster than the second. Who has duplicated a descriptor closes it, too, and goes on:
nobody waits long for an end that may never come.
"""

import threading

from datacache.clock import Clock
from datacache.writing.landing import LandedFile

SOON = 1.0
"""Seconds within which the end follows the announcement, unless the descriptor was a duplicate."""


class Closes:
    """Those of one mount. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards: what was announced, when, and who waits for it
        self._announced: dict[LandedFile, tuple[float, threading.Event]] = {}

    def __repr__(self) -> str:
        return f"<Closes {len(self._announced)} announced>"

    def announce(self, file: LandedFile) -> None:
        """A descriptor of a file that is open for writing was closed, perhaps the last."""
        with self._lock:
            self._announced[file] = (self._clock.monotonic(), threading.Event())

    def came(self, file: LandedFile) -> None:
        """Nobody has it open any more."""
        with self._lock:
            announced = self._announced.pop(file, None)
        if announced is not None:
            announced[1].set()

    def wait(self) -> None:
        """Return when all that were announced lately have come, or will not."""
        with self._lock:
            announced = list(self._announced.values())
        for since, event in announced:
            left = since + SOON - self._clock.monotonic()
            if left > 0:
                self._clock.wait(event, left)
