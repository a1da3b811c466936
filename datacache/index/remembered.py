"""
Entries in memory, in front of the database.

An LRU by name, with the same entries by inode beside it. A value is what was read and the edition of
its directory at that time; whether that still counts is the caller's to say. Names that do not exist
are values too. About 1 KiB an entry (measured; two thirds are the entry itself).
"""

import threading
from typing import NamedTuple

from cachetools import LRUCache

from datacache.model import Entry


class Known(NamedTuple):
    """What was read of one name."""

    edition: int
    """That of the directory when it was read (`database`)."""
    entry: Entry | None
    """None: there was no such name."""


class Remembered:
    """Up to `limit` names. Thread-safe; the lock is held for microseconds."""

    def __init__(self, limit: int) -> None:
        # Invariant, under the lock: `_inos` holds exactly the values of `_names` that have an entry.
        self._lock = threading.Lock()
        self._inos: dict[int, Known] = {}
        self._names = _Names(max(1, limit), self._inos)

    def __repr__(self) -> str:
        return f"<Remembered {len(self._names)} of {self._names.maxsize:.0f} names>"

    def name(self, parent: int, name: bytes) -> Known | None:
        """What is remembered of a name."""
        with self._lock:
            return self._names.get((parent, name))

    def ino(self, ino: int) -> Known | None:
        """What is remembered of the path `ino`; it has an entry."""
        with self._lock:
            known = self._inos.get(ino)
            if known is not None and known.entry is not None:
                self._names.get((known.entry.parent, known.entry.name))  # it was used just now
            return known

    def keep(self, parent: int, name: bytes, known: Known) -> None:
        """Remember `known` in place of what was remembered of that name."""
        with self._lock:
            old = self._names.pop((parent, name), None)
            if old is not None and old.entry is not None:
                self._inos.pop(old.entry.ino, None)
            self._names[parent, name] = known
            if known.entry is not None:
                self._inos[known.entry.ino] = known


class _Names(LRUCache[tuple[int, bytes], Known]):
    def __init__(self, limit: int, inos: dict[int, Known]) -> None:
        super().__init__(limit)
        self._by_ino = inos

    def popitem(self) -> tuple[tuple[int, bytes], Known]:
        """Give up what was used least recently, under its inode too."""
        key, known = super().popitem()
        if known.entry is not None:
            self._by_ino.pop(known.entry.ino, None)
        return key, known
