"""
Closes that were announced and have not come yet.

The kernel tells of close(2) twice: that a descriptor is closed, and waits for the answer; and that nobody
has the file open any more, which it does not wait for. So who has closed a file, and asks for it to be in
the bucket, may be faster than the second. Who has duplicated a descriptor closes it, too, and goes on:
nobody waits long for an end that may never come.
"""

import threading
from collections.abc import Hashable

from datacache.clock import Clock

SOON = 1.0
"""Seconds within which the end follows the announcement, unless the descriptor was a duplicate."""


class Closes:
    """Those of one mount. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards: of which path, when it was announced, and who waits for it
        self._announced: dict[Hashable, tuple[int, float, threading.Event]] = {}

    def __repr__(self) -> str:
        return f"<Closes {len(self._announced)} announced>"

    def announce(self, ino: int, file: Hashable) -> None:
        """A descriptor of a file that is open for writing was closed, perhaps the last."""
        with self._lock:
            self._announced[file] = (ino, self._clock.monotonic(), threading.Event())

    def announced(self, ino: int) -> int:
        """How many of those who have a path open for writing have closed a descriptor of it."""
        with self._lock:
            return sum(of == ino for of, _, _ in self._announced.values())

    def came(self, file: Hashable) -> None:
        """Nobody has it open any more."""
        with self._lock:
            announced = self._announced.pop(file, None)
        if announced is not None:
            announced[2].set()

    def wait(self) -> None:
        """Return when all that were announced lately have come, or will not."""
        with self._lock:
            announced = list(self._announced.values())
        for _, since, event in announced:
            left = since + SOON - self._clock.monotonic()
            if left > 0:
                self._clock.wait(event, left)
