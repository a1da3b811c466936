"""
Which listing of a directory the kernel has, as far as it has one.

The kernel can keep what it is told of a directory (FOPEN_CACHE_DIR), and then lists it without asking. It
asks at each opendir whether that still holds (FOPEN_KEEP_CACHE), and drops it otherwise. What it has, it has
got page by page, from readings that may overlap: so it holds only if all pages since it was last dropped
were of one edition (`Index.edition`), and that is the edition of now.
"""

import threading

from cachetools import LRUCache

REMEMBERED = 100_000
"""Directories at most; of others the kernel is told to drop what it has."""

_MIXED = -1


class Listings:
    """Thread-safe."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._lock = threading.Lock()
        self._given: LRUCache[int, int] = LRUCache(remembered)  # editions by `ino`, since it was dropped

    def __repr__(self) -> str:
        return f"<Listings of {len(self._given)} directories>"

    def opened(self, ino: int, edition: int | None) -> bool:
        """Somebody opens a directory that has this edition now (None: that is not known): whether what the
        kernel has of it holds. Where it does not, the kernel must be told to drop it."""
        with self._lock:
            if edition is not None and self._given.get(ino) == edition:
                return True
            self._given.pop(ino, None)
            return False

    def given(self, ino: int, edition: int | None, *, first: bool) -> None:
        """The kernel is given a page of a directory, which is of this edition. `first`: its beginning."""
        with self._lock:
            before = self._given.get(ino)
            if before is None and first and edition is not None:
                self._given[ino] = edition
            elif before is not None and before != edition:
                self._given[ino] = _MIXED
