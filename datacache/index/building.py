"""
Making a pinned catalogue out of a stream of objects.

A store that lists in order needs no lookup: keys with a common prefix stand together, so directories
come and go like a stack, rows are appended in the order of their `ino`, and the indexes are made
afterwards by sorting. The first key that is out of order says that this store does not; from then on
directories are looked up in the catalogue itself, and objects may repeat. Memory is bounded both ways:
a batch of rows, a page cache, and (out of order) an LRU of directories.

The file is built under a temporary name without a journal, brought to disk and renamed: it is there
whole or not at all.
"""

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

from cachetools import LRUCache

from datacache.errors import IndexBroken
from datacache.index import database as db
from datacache.index import names
from datacache.index.database import DIRECTORY, FILE, Skeleton
from datacache.index.index import ROOT
from datacache.model import ObjectInfo

_log = logging.getLogger(__name__)

_BATCH = 10_000
"""Rows between two writes: some 5 MB, and by then the cost of the call has vanished."""

_DIRECTORIES = 50_000
"""Directories remembered while a store lists out of order."""

_UPSERT = (
    f"{db.INSERT} ON CONFLICT (parent, name, kind) DO UPDATE SET size=excluded.size, "
    "mtime_ns=excluded.mtime_ns, etag=excluded.etag, version_id=excluded.version_id, "
    "stamp=excluded.stamp, archived=excluded.archived"
)


class Builder:
    """A catalogue that is being written. `mount` is called once for each mount point."""

    def __init__(self, connection: sqlite3.Connection, skeleton: Sequence[Skeleton]) -> None:
        self._connection = connection
        self._next_ino = max(s.ino for s in skeleton) + 1
        self._rows: list[db.NewRow] = []
        self._in_order = True
        self._known: LRUCache[tuple[int, str], int] = LRUCache(_DIRECTORIES)
        self.files = 0

    def mount(
        self,
        root: Skeleton,
        pages: Iterable[Sequence[ObjectInfo]],
        *,
        uri: str,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Add all objects of a mount point, under the names that their keys are shown as."""
        # `stack` holds the directories above the last key as (prefix, ino); `prefix, parent` are its top.
        stack = [("", root.ino)]
        prefix, parent, last = "", root.ino, ""
        mount, shown, to_bytes, add = root.mount, names.shown, names.to_bytes, self._rows.append
        for page in pages:
            for key, size, (etag, version_id, stamp), mtime_ns, archived in page:
                if key <= last and self._in_order and last:
                    if key == last:
                        continue
                    self._expect_disorder()
                last = key
                cut = key.rfind("/") + 1
                try:
                    if key[:cut] != prefix:
                        parent = self._descend(stack, key, cut, mount)
                        prefix = key[:cut]
                    if cut == len(key) and size == 0:
                        continue  # the marker of a directory
                    row = (
                        self._next_ino, parent, shown(key[cut:]), FILE, size, mtime_ns, mount, to_bytes(key),
                        etag, version_id, stamp, 1 if archived else 0,
                    )  # fmt: skip
                except UnicodeEncodeError:
                    _log.warning("%s: the key %r is no text and is left out", uri, key)
                    continue
                add(row)
                self._next_ino += 1
                self.files += 1
            if len(self._rows) >= _BATCH:
                self._flush()
            if progress is not None:
                progress(self.files)
        self._flush()

    def add(self, path: str, mount: int, info: ObjectInfo) -> None:
        """Add one object at a path of the data set, which is taken as it stands."""
        if self._in_order:
            self._expect_disorder()
        cut = path.rfind("/") + 1
        parent = self._directory(path[:cut], ROOT, db.NO_MOUNT, literal=True)
        row = (
            self._next_ino, parent, names.to_bytes(path[cut:]), FILE, info.size, info.mtime_ns, mount,
            names.to_bytes(info.key), *info.version, 1 if info.archived else 0,
        )  # fmt: skip
        self._rows.append(row)
        self._next_ino += 1
        self.files += 1
        if len(self._rows) >= _BATCH:
            self._flush()

    def finish(self, meta: dict[str, Any], *, give_way: bool = True) -> None:
        """Write what is left, index, settle names, count."""
        self._flush()
        db.create_indexes(self._connection)
        if give_way:
            db.give_way(self._connection)
        db.count(self._connection)
        self._connection.executemany("INSERT INTO meta VALUES (?,?)", meta.items())

    def _descend(self, stack: list[tuple[str, int]], key: str, cut: int, mount: int) -> int:
        """The directory `key[:cut]`; `stack` is made the way to it."""
        if not self._in_order:
            return self._directory(key[:cut], stack[0][1], mount)
        while not key.startswith(stack[-1][0]) or len(stack[-1][0]) > cut:
            stack.pop()
        prefix, ino = stack[-1]
        start = len(prefix)
        while start < cut:
            stop = key.index("/", start) + 1
            ino = self._new_directory(ino, names.shown(key[start : stop - 1]), mount, key[:stop])
            stack.append((key[:stop], ino))
            start = stop
        return ino

    def _new_directory(self, parent: int, name: bytes, mount: int, key: str) -> int:
        ino = self._next_ino
        self._next_ino += 1
        self._rows.append((ino, parent, name, DIRECTORY, 0, 0, mount, names.to_bytes(key), "", "", "", 0))
        return ino

    def _expect_disorder(self) -> None:
        self._flush()
        db.create_indexes(self._connection)
        self._in_order = False

    def _directory(self, prefix: str, root: int, mount: int, *, literal: bool = False) -> int:
        """The directory of `prefix` below `root`, looked up and made where there is none yet."""
        if not prefix:
            return root
        ino = self._known.get((root, prefix))
        if ino is None:
            cut = prefix.rfind("/", 0, -1) + 1
            parent = self._directory(prefix[:cut], root, mount, literal=literal)
            segment = prefix[cut:-1]
            name = names.to_bytes(segment) if literal else names.shown(segment)
            self._flush()
            found = self._connection.execute(
                f"SELECT ino FROM paths WHERE parent=? AND name=? AND kind={DIRECTORY}", (parent, name)
            ).fetchone()
            ino = found[0] if found else self._new_directory(parent, name, mount, "" if literal else prefix)
            self._known[root, prefix] = ino
        return ino

    def _flush(self) -> None:
        self._connection.executemany(db.INSERT if self._in_order else _UPSERT, self._rows)
        self._rows.clear()


@contextmanager
def new_catalogue(path: str, skeleton: Sequence[Skeleton]) -> Iterator[Builder]:
    """Build the catalogue `path`, which appears when this block is left without an error.

    The caller sees to it that nobody else builds it at the same time.
    """
    temporary = path + ".tmp"
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        connection = sqlite3.connect(f"file:{quote(temporary)}?mode=rwc", uri=True, isolation_level=None)
        try:
            # Nothing of this need survive a crash, so there is neither journal nor fsync until the end.
            for pragma in (
                "journal_mode=OFF",
                "synchronous=OFF",
                "locking_mode=EXCLUSIVE",
                "cache_size=-32768",
            ):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("BEGIN")
            db.create_schema(connection, skeleton, {})
            yield Builder(connection, skeleton)
            connection.execute("COMMIT")
        finally:
            connection.close()
        _publish(temporary, path)
    except sqlite3.Error as error:
        raise IndexBroken(f"{path} cannot be written: {error}; check the disk") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _publish(temporary: str, path: str) -> None:
    try:
        _sync(temporary)
        os.rename(temporary, path)
        _sync(os.path.dirname(path))
    except OSError as error:
        raise IndexBroken(f"{path} cannot be written ({error.strerror}); check the disk") from error


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
