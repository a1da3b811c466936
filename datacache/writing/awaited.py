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

PATIENCE = 2.0
"""Seconds after which a file that nobody came for is called closed: the kernel comes again at once."""


class Awaited:
    """Those of one mount. Thread-safe."""

    def __init__(self, clock: Clock, closed: Callable[[int, LandedFile], object]) -> None:
        """`closed(ino, file)` is called for what nobody came for."""
        self._clock, self._closed = clock, closed
        self._lock = threading.Lock()  # guards: files, and since when, by path and who
        self._files: dict[tuple[int, int], list[tuple[LandedFile, float]]] = {}

    def __repr__(self) -> str:
        return f"<Awaited {len(self._files)} paths>"

    def __bool__(self) -> bool:
        return bool(self._files)

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

    def count(self, ino: int) -> int:
        """How many files are kept open of a path."""
        if not self._files:
            return 0
        with self._lock:
            return sum(len(files) for (of, _), files in self._files.items() if of == ino)

    def look(self) -> None:
        """Close what nobody came for in PATIENCE."""
        self._close(lambda of, since: since <= self._clock.monotonic() - PATIENCE)

    def give_up(self, ino: int | None = None, who: int = 0) -> None:
        """Close all that is kept, or what is kept of a path for somebody."""
        self._close(lambda of, since: ino is None or of == (ino, who))

    def _close(self, is_late: Callable[[tuple[int, int], float], bool]) -> None:
        if not self._files:
            return
        late: list[tuple[int, LandedFile]] = []
        with self._lock:
            for of, files in list(self._files.items()):
                late += [(of[0], file) for file, since in files if is_late(of, since)]
                files[:] = [one for one in files if not is_late(of, one[1])]
                if not files:
                    del self._files[of]
        for ino, file in late:
            self._closed(ino, file)
