"""
Files that are kept open for who was refused an open, and comes again.

The kernel, told that it has the wrong node, looks the name up once more. The file must be there then, as it
was landed for it: else it would be refused again where another has written, and the bucket got, the file
meanwhile; and of a second refusal its caller hears. Whoever was killed before it came again never comes.
"""

import threading
from collections.abc import Callable

from datacache.clock import Clock
from datacache.writing.landing import LandedFile

PATIENCE = 30.0
"""Seconds after which a file that nobody came for is called closed."""


class Awaited:
    """Those of one mount. Thread-safe."""

    def __init__(self, clock: Clock, closed: Callable[[int, LandedFile], object]) -> None:
        """`closed(ino, file)` is called for what nobody came for."""
        self._clock, self._closed = clock, closed
        self._lock = threading.Lock()  # guards: files, and since when, by path and who
        self._files: dict[tuple[int, int], list[tuple[LandedFile, float]]] = {}

    def __repr__(self) -> str:
        return f"<Awaited {len(self._files)} paths>"

    def keep(self, ino: int, who: int, file: LandedFile) -> None:
        """`who` was refused, and gets it when it comes again."""
        with self._lock:
            self._files.setdefault((ino, who), []).append((file, self._clock.monotonic()))

    def take(self, ino: int, who: int) -> LandedFile | None:
        """What was kept for `who`, which is its own from now on."""
        if not self._files:
            return None
        with self._lock:
            files = self._files.get((ino, who))
            if files is None:
                return None
            file, _ = files.pop()
            if not files:
                del self._files[ino, who]
            return file

    def give_up(self, *, all: bool = False) -> None:
        """Close what nobody came for in PATIENCE; or all of it."""
        if not self._files:
            return
        until = self._clock.monotonic() - PATIENCE
        late: list[tuple[int, LandedFile]] = []
        with self._lock:
            for (ino, who), files in list(self._files.items()):
                late += [(ino, file) for file, since in files if all or since <= until]
                files[:] = [] if all else [one for one in files if one[1] > until]
                if not files:
                    del self._files[ino, who]
        for ino, file in late:
            self._closed(ino, file)
