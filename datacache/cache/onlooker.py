"""
Whole copies in a cache directory that another process owns: to be read, and no more.

For processes that answer readers beside the owner. Nothing is locked, changed or counted here. What makes
that safe is what makes passthrough safe: the bytes of a whole file never change, whatever becomes of its
entry, as long as somebody has it open (`store`).
"""

import os
import sqlite3
import threading
from contextlib import suppress
from urllib.parse import quote

from datacache.cache.catalogue import NAME, file_name
from datacache.cache.disk import Handle
from datacache.cache.owner import MANAGED
from datacache.model import CacheKey

_WHOLE = """
SELECT id FROM entries WHERE digest = ? AND present = size
AND NOT EXISTS (SELECT 1 FROM blocks WHERE entry = entries.id AND epoch > 0 AND epoch <
    (SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'boot_epoch'))
"""


class Onlooker:
    """The whole copies in the directory `path`. Thread-safe."""

    def __init__(self, path: str) -> None:
        self._managed = os.path.join(path, MANAGED)
        self._lock = threading.Lock()  # guards the connection, and that it is made
        self._connection: sqlite3.Connection | None = None

    def __repr__(self) -> str:
        return f"<Onlooker of {self._managed}>"

    def open(self, key: CacheKey) -> Handle | None:
        """The cached file of `key`, open for reading, if it is whole and beyond doubt; None otherwise, and
        where anything at all is wrong: whoever owns the directory knows better."""
        digest = bytes.fromhex(key.digest)
        try:
            with self._lock:
                row = self._connected().execute(_WHOLE, (digest,)).fetchone()
            if row is None:
                return None
            path = os.path.join(self._managed, file_name(digest, row[0]))
            handle = Handle(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            # The same look as the owner takes before it lends a file.
            return handle if os.fstat(handle.fd).st_size == key.size else None
        except (OSError, sqlite3.Error):
            self.close()  # made anew by the next: the owner may have begun a new catalogue
            return None

    def close(self) -> None:
        """Let go. Idempotent."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                with suppress(sqlite3.Error):
                    connection.close()

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            uri = f"file:{quote(os.path.join(self._managed, NAME))}?mode=rw"  # the WAL index is written to
            self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA query_only = ON")
        return self._connection
