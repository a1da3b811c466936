"""
Entries in memory, in front of the database.

An LRU by name, with the same entries by inode beside it. A value is what was read and the edition of
its directory at that time; whether that still counts is the caller's to say. Names that do not exist
are values too. About 1 KiB an entry (measured; two thirds are the entry itself).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

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
        self._limit = max(1, limit)
        # Invariant, under the lock: `_inos` holds exactly the values of `_names` that have an entry; least
        # recently used ones come first. (cachetools' LRU would do, in Python: 5 us where this takes 0.5.)
        self._lock = threading.Lock()
        self._inos: dict[int, Known] = {}
        self._names: OrderedDict[tuple[int, bytes], Known] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Remembered {len(self._names)} of {self._limit} names>"

    def name(self, parent: int, name: bytes) -> Known | None:
        """What is remembered of a name."""
        with self._lock:
            known = self._names.get((parent, name))
            if known is not None:
                self._names.move_to_end((parent, name))
            return known

    def ino(self, ino: int) -> Known | None:
        """What is remembered of the path `ino`; it has an entry."""
        with self._lock:
            known = self._inos.get(ino)
            if known is not None and known.entry is not None:
                self._names.move_to_end((known.entry.parent, known.entry.name))
            return known

    def keep(self, parent: int, name: bytes, known: Known) -> None:
        """Remember `known` in place of what was remembered of that name."""
        with self._lock:
            self._keep(parent, name, known)

    def keep_listed(self, edition: int, entries: Iterable[Entry]) -> None:
        """Remember what was listed: what a program lists it opens next, and to remember an entry now takes a
        microsecond, where to ask the database for it then takes 40."""
        with self._lock:
            for entry in entries:
                self._keep(entry.parent, entry.name, Known(edition, entry))

    def _keep(self, parent: int, name: bytes, known: Known) -> None:
        self._drop(self._names.pop((parent, name), None))
        self._names[parent, name] = known
        if known.entry is not None:
            self._inos[known.entry.ino] = known
        if len(self._names) > self._limit:
            self._drop(self._names.popitem(last=False)[1])

    def _drop(self, known: Known | None) -> None:
        """Forget what is no longer under its name under its inode too."""
        if known is not None and known.entry is not None:
            self._inos.pop(known.entry.ino, None)
