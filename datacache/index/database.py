"""
The catalogue of names on disk: its schema, its connections and every SQL statement.

One SQLite file per catalogue, described in docs/on-disk-format.md. A live catalogue (`open_live`) is
written directory by directory: a listing is gathered in a temporary table of its own connection,
which locks nothing, and enters the catalogue in one transaction when it is complete (`Listing`). So
half a listing is never seen, whenever the process dies, and readers never wait (WAL). With
synchronous=NORMAL a power cut may take the last transactions, but whole: what is lost is listed
again. A pinned catalogue (`open_pinned`) is never written; `snapshot` makes it.

Rows are never deleted: what disappears is marked gone, so that a path that comes back has the `ino`
it had, and AUTOINCREMENT never gives one out twice. A path that turns from a file into a directory
is another row: the kernel does not forgive an inode that changes its kind.

A row counts the versions that its path has had (`generation`). When one replaces another, a trigger
moves the old one into `former`, whatever statement did it: who still has it open can be told what it
was. The last version of a path that disappeared stays in its row.
"""

import fcntl
import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote
from uuid import uuid4

from datacache.errors import IndexBroken, IndexFull, SettingError
from datacache.index import names
from datacache.index.index import ROOT
from datacache.model import Entry, Kind, ObjectInfo, Version

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
"""`PRAGMA user_version` of the files we write. Another version is another format."""

NO_MOUNT = -1
"""`mount` of the directories above mount points."""

DIRECTORY, FILE = int(Kind.DIRECTORY), int(Kind.FILE)
"""Plain numbers: sqlite3 binds a subclass of int five times slower."""

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE paths (
    ino INTEGER PRIMARY KEY AUTOINCREMENT,
    parent INTEGER NOT NULL,
    name BLOB NOT NULL,
    kind INTEGER NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    mount INTEGER NOT NULL,
    key BLOB NOT NULL,
    etag TEXT NOT NULL,
    version_id TEXT NOT NULL,
    stamp TEXT NOT NULL,
    archived INTEGER NOT NULL,
    gone INTEGER NOT NULL DEFAULT 0,
    generation INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE listings (
    ino INTEGER PRIMARY KEY,
    began REAL NOT NULL,
    entries INTEGER NOT NULL,
    edition INTEGER NOT NULL
);
"""
BY_NAME = "CREATE UNIQUE INDEX paths_by_name ON paths (parent, name, kind)"
BY_PARENT = "CREATE INDEX paths_by_parent ON paths (parent)"
"""The rowid is the last column of every index, so this one pages through a directory by `ino`."""

FORMER_MAX = 100_000
"""Former versions that are kept, the newest; some 15 MiB of them. Far more than a node's programs have open,
and it is those that ask for them."""
# Of a live catalogue only. What is not here (parent, name, mount, key) is the path's own, whatever its
# version. `turn` has no gaps, for a version is replaced once; so its highest one tells how many there are.
_FORMER = """
CREATE TABLE former (
    turn INTEGER PRIMARY KEY,
    ino INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    etag TEXT NOT NULL,
    version_id TEXT NOT NULL,
    stamp TEXT NOT NULL,
    archived INTEGER NOT NULL,
    UNIQUE (ino, generation)
)"""
_KEEP_FORMER = f"""
CREATE TRIGGER paths_replaced AFTER UPDATE OF generation ON paths WHEN new.generation <> old.generation
BEGIN
    INSERT INTO former (ino, generation, size, mtime_ns, etag, version_id, stamp, archived) VALUES
        (old.ino, old.generation, old.size, old.mtime_ns, old.etag, old.version_id, old.stamp, old.archived);
    DELETE FROM former WHERE turn <= (SELECT max(turn) FROM former) - {FORMER_MAX};
END"""

_GIVEN = "ino, parent, name, kind, size, mtime_ns, mount, key, etag, version_id, stamp, archived"
COLUMNS = _GIVEN + ", generation"
INSERT = f"INSERT INTO paths ({_GIVEN}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"

_CHILD = f"SELECT {COLUMNS} FROM paths WHERE parent=? AND name=? AND NOT gone"
_ENTRY = f"SELECT {COLUMNS} FROM paths WHERE ino=? AND NOT gone"
_VERSION = f"""
SELECT {COLUMNS} FROM paths WHERE ino = :ino AND generation = :generation
UNION ALL SELECT p.ino, p.parent, p.name, p.kind, f.size, f.mtime_ns, p.mount, p.key,
    f.etag, f.version_id, f.stamp, f.archived, f.generation
FROM former AS f JOIN paths AS p ON p.ino = f.ino WHERE f.ino = :ino AND f.generation = :generation
"""
_CHILDREN = (
    f"SELECT {COLUMNS} FROM paths INDEXED BY paths_by_parent"
    " WHERE parent=? AND ino>? AND NOT gone ORDER BY ino LIMIT ?"
)

_STAGE = """
CREATE TEMP TABLE listed (
    name BLOB, kind INTEGER, size INTEGER, mtime_ns INTEGER, key BLOB,
    etag TEXT, version_id TEXT, stamp TEXT, archived INTEGER,
    PRIMARY KEY (name, kind)
) WITHOUT ROWID;
CREATE TEMP TABLE lost (ino INTEGER PRIMARY KEY);
"""
# An object beside a directory of its name gives way to it. Only the whole listing shows that.
_GIVE_WAY = f"""
UPDATE temp.listed SET name = beside(key) WHERE kind = {FILE}
    AND name IN (SELECT name FROM temp.listed WHERE kind = {DIRECTORY})
"""
# What is in the catalogue and not in the listing, with all that is below it.
_FIND_LOST = """
INSERT INTO temp.lost
WITH RECURSIVE below (ino) AS (
    SELECT ino FROM paths AS p WHERE parent = :parent AND NOT gone
        AND NOT EXISTS (SELECT 1 FROM temp.listed AS l WHERE l.name = p.name AND l.kind = p.kind)
    UNION ALL
    SELECT p.ino FROM paths AS p JOIN below ON p.parent = below.ino WHERE NOT p.gone
) SELECT ino FROM below
"""
VERSION_IN_SQL = (
    "CASE WHEN {0}etag <> '' THEN 'etag:' || {0}etag WHEN {0}version_id <> '' THEN 'id:' || {0}version_id"
    " ELSE 'stamp:' || {0}stamp END"
)
"""`Version.token` in SQL; `{0}` is the row that it is of."""
_MERGE = f"""
INSERT INTO paths (parent, name, kind, size, mtime_ns, mount, key, etag, version_id, stamp, archived)
SELECT :parent, name, kind, size, mtime_ns, :mount, key, etag, version_id, stamp, archived
FROM temp.listed WHERE true
ON CONFLICT (parent, name, kind) DO UPDATE SET
    size = excluded.size, mtime_ns = excluded.mtime_ns, mount = excluded.mount, key = excluded.key,
    etag = excluded.etag, version_id = excluded.version_id, stamp = excluded.stamp,
    archived = excluded.archived, gone = 0, generation = generation
        + ((size, {VERSION_IN_SQL.format("")}) IS NOT (excluded.size, {VERSION_IN_SQL.format("excluded.")}))
WHERE gone OR kind = 2 AND (size, mtime_ns, etag, version_id, stamp, archived) IS NOT
    (excluded.size, excluded.mtime_ns, excluded.etag, excluded.version_id, excluded.stamp, excluded.archived)
"""
REPLACED_MAX = 100_000
"""Versions that one listing reports as replaced at most; some 50 MiB of them."""
_OLD = ", ".join(f"p.{column}" for column in COLUMNS.split(", "))
# Looked for before the merge: afterwards nothing is left of what a path was. What the listing says
# comes with it, for another row need not be another version (`Version.token`).
_REPLACED = f"""
SELECT l.size, l.etag, l.version_id, l.stamp, {_OLD} FROM paths AS p
JOIN temp.listed AS l ON l.name = p.name AND l.kind = p.kind
WHERE p.parent = :parent AND p.kind = 2 AND NOT p.gone
    AND (p.size, p.etag, p.version_id, p.stamp) IS NOT (l.size, l.etag, l.version_id, l.stamp)
UNION ALL SELECT -1, '', '', '', {_OLD} FROM paths AS p WHERE kind = 2 AND ino IN (SELECT ino FROM temp.lost)
LIMIT {REPLACED_MAX}
"""
_TOTALS = (
    "SELECT count(*) FILTER (WHERE kind=2), coalesce(sum(size), 0), count(*) FILTER (WHERE kind=1) FROM paths"
)

_NEXT_EDITION = "UPDATE meta SET value=value+1 WHERE name='edition' RETURNING value"

Row = tuple[int, int, bytes, int, int, int, int, bytes, str, str, str, int, int]
"""`COLUMNS`."""
NewRow = tuple[int, int, bytes, int, int, int, int, bytes, str, str, str, int]
"""What `INSERT` takes."""
ListedRow = tuple[bytes, int, int, int, bytes, str, str, str, int]


def to_entry(row: Row) -> Entry:
    """An Entry of a row of `COLUMNS`."""
    ino, parent, name, kind, size, mtime_ns, mount, key, etag, version_id, stamp, archived, generation = row
    return Entry(
        ino,
        parent or ROOT,
        name,
        _KINDS[kind],
        size,
        mtime_ns,
        mount,
        key.decode("utf-8", "surrogateescape"),
        Version(etag, version_id, stamp),
        archived != 0,
        generation,
    )


_KINDS = (Kind.DIRECTORY, Kind.DIRECTORY, Kind.FILE)  # calling Kind() takes as long as all the rest


class Totals(NamedTuple):
    """What a catalogue holds."""

    files: int
    bytes: int
    directories: int


@dataclass(frozen=True)
class Listed:
    """What is known of the listing of a directory."""

    began: float
    """Wall time at which it began."""
    entries: int
    edition: int
    """Changes whenever the entries of the directory do."""


class Merged(NamedTuple):
    """What a listing brought."""

    entries: int
    edition: int
    lost_directories: bool
    """Whether it removed directories, and so the listings of all that was below them."""
    replaced: list[Entry]
    """Where it was asked for: the files that have another version now, or are gone, as they were."""


class Skeleton(NamedTuple):
    """A directory that exists whatever the stores hold: the root, a mount point, what is above one."""

    ino: int
    parent: int
    name: bytes
    mount: int


class Database:
    """One catalogue and its connections. Thread-safe.

    Connections are lent out and returned; at most `readers` read at a time, for the GIL lets one
    run anyway. Each holds a page cache of 1 MiB: the kernel caches the file for all of them, and
    mapping it instead would turn an I/O error of the disk into a SIGBUS of the daemon.
    """

    def __init__(self, path: str, *, pinned: bool, readers: int = 8) -> None:
        self.path = path
        self._uri = f"file:{quote(path)}?" + ("mode=ro&immutable=1" if pinned else "mode=rw")
        self._slots = threading.BoundedSemaphore(readers)
        self._writing = threading.Lock()  # fair to our own threads, where SQLite's lock polls
        self._idle: deque[sqlite3.Connection] = deque()
        self._idle_listings: deque[sqlite3.Connection] = deque()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Database {self.path}{' closed' if self._closed else ''}>"

    def connect(self) -> sqlite3.Connection:
        """A new connection, the caller's own."""
        return _connect(self._uri)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for a moment. What SQLite raises inside is IndexBroken."""
        with self._slots, self._lent(self._idle, keep=8) as connection:
            yield connection

    def _ask(self, query: str, values: tuple[object, ...]) -> list[Any]:
        """The rows of one query. For what every open asks: as `reading`, but the two generators of that take
        as long as a query does."""
        with self._slots:
            if self._closed:
                raise IndexBroken(f"the index {self.path} is closed")
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            try:
                return connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self._broken(error) from error
            finally:
                if self._closed:
                    connection.close()
                else:
                    self._idle.append(connection)

    @contextmanager
    def _lent(self, idle: deque[sqlite3.Connection], *, keep: int) -> Iterator[sqlite3.Connection]:
        if self._closed:
            raise IndexBroken(f"the index {self.path} is closed")
        try:
            connection = idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            yield connection
        except sqlite3.Error as error:
            raise self._broken(error) from error
        finally:
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.rollback()
            if self._closed or len(idle) >= keep:
                connection.close()
            else:
                idle.append(connection)

    def _connect(self) -> sqlite3.Connection:
        try:
            return self.connect()
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _broken(self, error: sqlite3.Error) -> IndexBroken:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            return IndexFull(f"the index {self.path} has no room: {error}; make room on its disk")
        return IndexBroken(
            f"the index {self.path} fails ({error}); check the disk, or delete it: it is rebuilt"
        )

    def close(self) -> None:
        """Close all connections; those that are lent out, when they come back."""
        self._closed = True
        for idle in (self._idle, self._idle_listings):
            while idle:
                idle.pop().close()

    # Reading

    def entry(self, ino: int) -> Entry | None:
        """The path `ino`, unless it is gone."""
        rows = self._ask(_ENTRY, (ino,))
        return to_entry(rows[0]) if rows else None

    def version(self, ino: int, generation: int) -> Entry | None:
        """That version of the path `ino` of a live catalogue, if it is kept; the path may be gone."""
        with self.reading() as connection:
            row = connection.execute(_VERSION, {"ino": ino, "generation": generation}).fetchone()
        return to_entry(row) if row else None

    def root(self) -> Entry:
        """The root directory, which is always there."""
        found = self.entry(ROOT)
        if found is None:
            raise IndexBroken(f"the index {self.path} has no root; delete it: it is rebuilt")
        return found

    def child(self, parent: int, name: bytes) -> Entry | None:
        """`name` in directory `parent`, unless it is gone."""
        rows = self._ask(_CHILD, (parent, name))
        return to_entry(rows[0]) if rows else None

    def children(self, parent: int, after: int, limit: int) -> list[Entry]:
        """Up to `limit` entries of `parent` behind `after`, by `ino`."""
        return list(map(to_entry, self._ask(_CHILDREN, (parent, after, limit))))

    def listed(self, ino: int) -> Listed | None:
        """The last complete listing of a directory; None when there never was one."""
        with self.reading() as connection:
            row = connection.execute(
                "SELECT began, entries, edition FROM listings WHERE ino=?", (ino,)
            ).fetchone()
        return Listed(*row) if row else None

    def totals(self) -> Totals:
        """What the catalogue holds, as counted while it was written."""
        found = self.meta()
        return Totals(int(found["files"]), int(found["bytes"]), int(found["directories"]))

    def meta(self) -> dict[str, Any]:
        """All that the catalogue says of itself."""
        with self.reading() as connection:
            return dict(connection.execute("SELECT name, value FROM meta").fetchall())

    # Writing

    @contextmanager
    def listing(self, directory: Entry) -> Iterator["Listing"]:
        """Gather a listing of `directory`; it counts for nothing unless `commit` is reached."""
        with self._lent(self._idle_listings, keep=2) as connection:
            if not connection.execute("SELECT 1 FROM temp.sqlite_schema LIMIT 1").fetchone():
                connection.executescript(_STAGE)
                connection.create_function("beside", 1, _beside, deterministic=True)
            # Before, not after: a listing that failed may have failed to clean up as well.
            connection.execute("DELETE FROM temp.listed")
            connection.execute("DELETE FROM temp.lost")
            try:
                yield Listing(connection, directory, self._writing)
            finally:
                with suppress(sqlite3.Error):
                    connection.execute("DELETE FROM temp.listed")

    def renew(self, entry: Entry, info: ObjectInfo) -> int | None:
        """The store says that the object of `entry` is `info` now. The new edition of its directory, where
        that is news."""
        with self._writing, self.reading() as connection:
            run = connection.execute
            run("BEGIN IMMEDIATE")
            row = run(_ENTRY, (entry.ino,)).fetchone()
            if row is None:
                return None
            old = to_entry(row)
            if (old.size, old.version.token) == (info.size, info.version.token):
                return None  # a stat may know more of the same version than a listing; that is no news
            run(
                "UPDATE paths SET size=?, mtime_ns=?, etag=?, version_id=?, stamp=?, archived=?,"
                " generation=generation+1 WHERE ino=?",
                (info.size, info.mtime_ns, *info.version, int(info.archived), entry.ino),
            )
            run("UPDATE meta SET value=value+? WHERE name='bytes'", (info.size - old.size,))
            edition: int = run(_NEXT_EDITION).fetchall()[0][0]
            run("UPDATE listings SET edition=? WHERE ino=?", (edition, entry.parent))
            run("COMMIT")
        return edition

    @contextmanager
    def changing(self) -> Iterator["Changing"]:
        """Change names and versions that we know better than any listing, in one transaction."""
        try:
            with self._writing, self.reading() as connection:
                connection.execute("BEGIN IMMEDIATE")
                changing = Changing(connection)
                yield changing
                changing.finish()
                connection.execute("COMMIT")
        except IndexFull:
            with suppress(IndexBroken), self.reading() as connection:
                connection.execute("PRAGMA wal_checkpoint(RESTART)")  # what the log has is room, too
            raise


BURIED = -2
"""`parent` of paths that were unlinked here: their rows name what is still open, under a name of nobody."""


class Changing:
    """What a writable data set does to the catalogue. A row that is `gone` is one that listings do not show;
    those of what was written and is not in the store yet are."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._run = connection.execute
        self.edition = 0
        """Of all directories in `touched`, when this has finished."""
        self.touched: set[int] = set()
        self._counted = [0, 0, 0]

    def claim(self, parent: int, name: bytes, kind: int, mount: int, key: bytes) -> tuple[int, int]:
        """`ino` and generation of a name that is ours from now on: as a version that it never had."""
        row = self._run(
            "SELECT ino FROM paths WHERE parent=? AND name=? AND kind=?", (parent, name, kind)
        ).fetchone()
        if row is not None:
            ino: int = row[0]
            return ino, self.renew(ino)
        added = self._run(
            "INSERT INTO paths (parent, name, kind, size, mtime_ns, mount, key, etag, version_id, stamp,"
            " archived, gone) VALUES (?,?,?,0,0,?,?,'','','',0,1)", (parent, name, kind, mount, key),
        ).lastrowid  # fmt: skip
        assert added is not None
        return added, 0

    def adopt(self, parent: int, name: bytes, mount: int, key: bytes) -> int:
        """`ino` of a directory that the store has, known or not."""
        row = self._run(
            "SELECT ino FROM paths WHERE parent=? AND name=? AND kind=1", (parent, name)
        ).fetchone()
        if row is not None:
            return int(row[0])
        ino, _ = self.claim(parent, name, DIRECTORY, mount, key)
        self._count(ino, -1)
        self._run("UPDATE paths SET gone=0 WHERE ino=?", (ino,))
        self._count(ino, 1)
        self.touched.add(parent)
        return ino

    def renew(self, ino: int) -> int:
        """The path has another version than before; its generation."""
        self._touch(ino)
        row = self._run("UPDATE paths SET generation=generation+1 WHERE ino=? RETURNING generation", (ino,))
        return int(row.fetchall()[0][0])

    def place(self, ino: int, parent: int, name: bytes, mount: int, key: bytes) -> None:
        """The path is called so from now on, and listings do not show it. What had the name is buried."""
        found = self._run(
            "SELECT p.ino FROM paths p JOIN paths o ON o.ino=? WHERE p.parent=? AND p.name=?"
            " AND p.kind=o.kind AND p.ino<>o.ino", (ino, parent, name),
        ).fetchall()  # fmt: skip
        for (other,) in found:
            self.bury(other)
        self._hide(ino)
        self._run(
            "UPDATE paths SET parent=?, name=?, mount=?, key=? WHERE ino=?", (parent, name, mount, key, ino)
        )
        self.touched.add(parent)

    def bury(self, ino: int) -> None:
        """The path has no name any more."""
        self._hide(ino)
        self._run("UPDATE paths SET parent=?, name=? WHERE ino=?", (BURIED, b"%d" % ino, ino))

    def reserve(self, count: int) -> range:
        """Numbers that no path has, nor ever will but by `settle`."""
        row = self._run("UPDATE sqlite_sequence SET seq=seq+? WHERE name='paths' RETURNING seq", (count,))
        last = int(row.fetchall()[0][0])
        return range(last - count + 1, last + 1)

    def settle(
        self, ino: int, parent: int, name: bytes, kind: int, mount: int, key: bytes, info: ObjectInfo | None
    ) -> None:
        """The store has it: the object `info`, or a directory. A number that was reserved for it becomes a
        row; what has its name otherwise is buried."""
        if self._run("SELECT 1 FROM paths WHERE ino=?", (ino,)).fetchone() is None:
            for (other,) in self._run(
                "SELECT ino FROM paths WHERE parent=? AND name=? AND kind=?", (parent, name, kind)
            ).fetchall():
                self.bury(other)
            self._run(
                "INSERT INTO paths (ino, parent, name, kind, size, mtime_ns, mount, key, etag, version_id,"
                " stamp, archived, gone) VALUES (?,?,?,?,0,0,?,?,'','','',0,1)",
                (ino, parent, name, kind, mount, key),
            )
        self._touch(ino)
        self._count(ino, -1)
        if info is None:
            self._run("UPDATE paths SET gone=0, key=? WHERE ino=?", (key, ino))
        else:
            self._run(
                "UPDATE paths SET gone=0, key=?, size=?, mtime_ns=?, etag=?, version_id=?, stamp=?,"
                " archived=? WHERE ino=?",
                (key, info.size, info.mtime_ns, *info.version, int(info.archived), ino),
            )
        self._count(ino, 1)

    def vanish(self, parent: int, key: bytes) -> None:
        """The store has nothing under this key any more."""
        for (ino,) in self._run(
            "SELECT ino FROM paths WHERE parent=? AND key=? AND NOT gone", (parent, key)
        ).fetchall():
            self._hide(ino)
        self.touched.add(parent)

    def known_empty(self, ino: int, began: float) -> None:
        """A directory that was made here: there is nothing in it that would have to be listed."""
        self._run("INSERT OR REPLACE INTO listings VALUES (?,?,0,0)", (ino, began))
        self.touched.add(ino)

    def _hide(self, ino: int) -> None:
        self._touch(ino)
        self._count(ino, -1)
        self._run("UPDATE paths SET gone=1 WHERE ino=?", (ino,))

    def _touch(self, ino: int) -> None:
        self.touched.update(
            parent for (parent,) in self._run("SELECT parent FROM paths WHERE ino=?", (ino,)).fetchall()
        )

    def _count(self, ino: int, sign: int) -> None:
        row = self._run("SELECT kind, size FROM paths WHERE ino=? AND NOT gone", (ino,)).fetchone()
        if row is not None:
            kind, size = row
            for i, change in enumerate((kind == FILE, size, kind == DIRECTORY)):
                self._counted[i] += sign * change

    def finish(self) -> None:
        """The last part of the transaction."""
        for name, change in zip(Totals._fields, self._counted, strict=True):
            if change:
                self._run("UPDATE meta SET value=value+? WHERE name=?", (change, name))
        if self.touched:
            self.edition = self._run(_NEXT_EDITION).fetchall()[0][0]
            for parent in self.touched:
                self._run("UPDATE listings SET edition=? WHERE ino=?", (self.edition, parent))


class Listing:
    """A directory listing on its way into the catalogue."""

    def __init__(self, connection: sqlite3.Connection, directory: Entry, writing: threading.Lock) -> None:
        self._connection, self._directory, self._writing = connection, directory, writing

    def add(self, rows: Iterable[ListedRow]) -> None:
        """Keep a page. The same name again replaces what was there."""
        self._connection.executemany("INSERT OR REPLACE INTO temp.listed VALUES (?,?,?,?,?,?,?,?,?)", rows)

    def commit(
        self, began: float, *, replaced: bool = False, ours: Iterable[bytes] = (), held: Iterable[bytes] = ()
    ) -> Merged | None:
        """Make the directory what was listed, as of wall time `began`; None if it is gone by now.

        One transaction: entries that are new or changed, those that are gone with all below them,
        the totals, and that this directory is known. Names of `ours` stay as they are: what was listed
        is older than what is known of them. Keys of `held` are left out.
        """
        run, at = self._connection.execute, {"parent": self._directory.ino, "mount": self._directory.mount}
        for key in held:
            run("DELETE FROM temp.listed WHERE key=?", (key,))
        run(_GIVE_WAY)
        entries: int = run("SELECT count(*) FROM temp.listed").fetchone()[0]
        with self._writing:
            run("BEGIN IMMEDIATE")
            if run("SELECT gone FROM paths WHERE ino=:parent", at).fetchone()[0]:
                run("ROLLBACK")
                return None
            for known in ours:
                self._keep(known)
            before, lost_directories = self._totals(), 0
            lost = run(_FIND_LOST, at).rowcount
            gone = self._replaced() if replaced else []
            if lost:
                below = self._totals_lost_below()
                lost_directories = self._lost_directories()
                before = Totals(*map(sum, zip(before, below, strict=True)))
                run("UPDATE paths SET gone=1 WHERE ino IN (SELECT ino FROM temp.lost)")
                run("DELETE FROM listings WHERE ino IN (SELECT ino FROM temp.lost)")
            merged = run(_MERGE, at).rowcount
            if lost or merged > 0:
                for name, old, new in zip(Totals._fields, before, self._totals(), strict=True):
                    run("UPDATE meta SET value=value+? WHERE name=?", (new - old, name))
                edition = run(_NEXT_EDITION).fetchall()[0][0]
            else:
                known = run("SELECT edition FROM listings WHERE ino=:parent", at).fetchone()
                edition = known[0] if known else 0
            run("INSERT OR REPLACE INTO listings VALUES (?,?,?,?)", (at["parent"], began, entries, edition))
            run("COMMIT")
        return Merged(entries, edition, lost_directories > 0, gone)

    def _keep(self, name: bytes) -> None:
        run, which = self._connection.execute, (self._directory.ino, name)
        run("DELETE FROM temp.listed WHERE name=?", (name,))
        run(
            "INSERT INTO temp.listed SELECT name, kind, size, mtime_ns, key, etag, version_id, stamp,"
            " archived FROM paths WHERE parent=? AND name=? AND NOT gone",
            which,
        )

    def _totals(self) -> Totals:
        run = self._connection.execute
        return Totals(*run(_TOTALS + " WHERE parent=? AND NOT gone", (self._directory.ino,)).fetchone())

    def _replaced(self) -> list[Entry]:
        rows = self._connection.execute(_REPLACED, {"parent": self._directory.ino})
        pairs = ((to_entry(row[4:]), row[0], Version(*row[1:4])) for row in rows)
        return [old for old, size, new in pairs if (old.size, old.version.token) != (size, new.token)]

    def _totals_lost_below(self) -> Totals:
        """Of what is lost, all but the entries of the directory itself."""
        below = _TOTALS + " WHERE ino IN (SELECT ino FROM temp.lost) AND parent<>?"
        return Totals(*self._connection.execute(below, (self._directory.ino,)).fetchone())

    def _lost_directories(self) -> int:
        below = _TOTALS + " WHERE ino IN (SELECT ino FROM temp.lost)"
        return Totals(*self._connection.execute(below).fetchone()).directories


def create_schema(connection: sqlite3.Connection, skeleton: Iterable[Skeleton], meta: dict[str, Any]) -> None:
    """Make an empty catalogue with its fixed directories, inside the caller's transaction."""
    for statement in _SCHEMA.split(";\n"):
        connection.execute(statement)
    rows = [(s.ino, s.parent, s.name, DIRECTORY, 0, 0, s.mount, b"", "", "", "", 0) for s in skeleton]
    connection.executemany(INSERT, rows)
    found = {"files": 0, "bytes": 0, "directories": len(rows), "edition": 0, "id": uuid4().hex} | meta
    connection.executemany("INSERT INTO meta VALUES (?,?)", found.items())
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def create_indexes(connection: sqlite3.Connection) -> None:
    """Make both indexes, or the one that is missing."""
    made = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type='index'")}
    for name, statement in (("paths_by_name", BY_NAME), ("paths_by_parent", BY_PARENT)):
        if name not in made:
            connection.execute(statement)


def give_way(connection: sqlite3.Connection) -> None:
    """Rename each object that has a directory of the same name beside it. Needs the indexes."""
    connection.create_function("beside", 1, _beside, deterministic=True)
    twins = connection.execute(
        "SELECT parent, name FROM paths INDEXED BY paths_by_name GROUP BY parent, name HAVING count(*) > 1"
    )
    while some := twins.fetchmany(10_000):
        rename = f"UPDATE paths SET name=beside(key) WHERE parent=? AND name=? AND kind={FILE}"
        connection.executemany(rename, some)


def count(connection: sqlite3.Connection) -> None:
    """Write the totals, counted anew."""
    totals = Totals(*connection.execute(_TOTALS + " WHERE NOT gone").fetchone())
    connection.executemany("UPDATE meta SET value=? WHERE name=?", zip(totals, Totals._fields, strict=True))


def _beside(key: bytes) -> bytes:
    return names.beside(names.to_text(key.rpartition(b"/")[2]))


def _connect(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30.0)
    connection.execute("PRAGMA cache_size=-1024")
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def _says(path: str) -> tuple[int, dict[str, Any]]:
    """Schema version and meta table of a catalogue file. Raises sqlite3.Error for what is none."""
    connection = _connect(f"file:{quote(path)}?mode=ro")
    try:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            return version, {}
        return version, dict(connection.execute("SELECT name, value FROM meta").fetchall())
    finally:
        connection.close()


def pinned_meta(path: str, *, name: str) -> dict[str, Any]:
    """What the pinned catalogue at `path` says of itself. Raises SettingError, naming snapshot `name`, for
    another format, and IndexBroken for a file that is no catalogue."""
    try:
        version, meta = _says(path)
    except sqlite3.Error as error:
        raise IndexBroken(
            f"snapshot {name} ({path}) cannot be read: {error}; remove and create it again"
        ) from error
    if version != SCHEMA_VERSION:
        raise SettingError(
            "snapshot",
            name,
            f"a snapshot in format {SCHEMA_VERSION}; this one is in {version}: create it again",
        )
    return meta


def open_pinned(path: str, *, made_for: str, name: str) -> Database:
    """A catalogue that is read only and never changes. Raises as `pinned_meta`, and SettingError for one
    of other mounts."""
    meta = pinned_meta(path, name=name)
    if meta["made_for"] != made_for:
        raise SettingError("snapshot", name, f"a snapshot of {made_for}; this one is of {meta['made_for']}")
    return Database(path, pinned=True)


def open_live(
    path: str, *, made_for: str, skeleton: Sequence[Skeleton], resumed: bool, anew: bool = True
) -> Database:
    """The live catalogue at `path`; a new one where there is none, or where it is of other mounts, in
    another format or damaged: it holds nothing that cannot be listed again, and entries of another
    bucket must never be shown. (A process that has the old file open keeps it, without its name.) Unless
    `resumed`, former versions are forgotten: there is no mount that could still name one. Not `anew`: a
    mount uses the numbers of what should be there, so what is not fit is left alone, and refused."""
    with locked(path + ".lock", wait=True):
        reason = _unfit(path, made_for)
        if reason and not anew:
            raise IndexBroken(f"the index {path} is not what this mount was made with: {reason}")
        if reason:
            _log.info("the index %s is made anew: %s", path, reason)
            # In this order: SQLite drops the log of a database that is not there, but it would replay
            # the log of an old one into a new one.
            for suffix in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.unlink(path + suffix)
        try:
            if reason:
                _create(path, made_for, skeleton, life=_next_life(path + ".lock"))
            elif not resumed:
                _forget_former(path)
        except sqlite3.Error as error:
            full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
            kind = IndexFull if full else IndexBroken
            raise kind(f"the index {path} cannot be written: {error}; check the disk") from error
    return Database(path, pinned=False)


INO_BITS = 40
"""Bits of every `ino`: a FUSE node's number has 64, and has to say the version, too."""
_LIFE = 33
"""Bits of the `ino`s of one catalogue: 8 billion paths, in 128 catalogues before a number comes again."""


def _next_life(lock: str) -> int:
    """How many catalogues there have been before; one more from now on. That lies in the lock file, which
    is there for ever, for a damaged catalogue cannot be asked which `ino`s it has given out."""
    try:
        with open(lock, "r+b") as file:
            life = int(file.read() or b"0")
            file.seek(0)
            file.write(b"%d" % (life + 1))
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        raise IndexBroken(f"{lock} does not take or hold a number ({error}); check the disk") from error
    return life


def _first(life: int) -> int:
    return (life << _LIFE) % (1 << INO_BITS)


def _beyond(skeleton: Sequence[Skeleton], life: int) -> list[Skeleton]:
    """`skeleton` with `ino`s that no earlier catalogue had; the root's is always the same."""

    def moved(ino: int) -> int:
        return ino if ino <= ROOT else ino + _first(life)

    return [s._replace(ino=moved(s.ino), parent=moved(s.parent)) for s in skeleton]


def fits(path: str, made_for: str) -> bool:
    """Whether there is a catalogue at `path` that can be read and is `made_for`."""
    return not _unfit(path, made_for)


def _unfit(path: str, made_for: str) -> str:
    if not os.path.exists(path):
        return "there is none yet"
    try:
        version, meta = _says(path)
    except sqlite3.Error as error:
        return f"it cannot be read ({error})"
    if version != SCHEMA_VERSION:
        return f"it is in format {version}, not {SCHEMA_VERSION}"
    return "" if meta["made_for"] == made_for else f"it is of other mounts ({meta['made_for']})"


def _create(path: str, made_for: str, skeleton: Sequence[Skeleton], *, life: int) -> None:
    connection = _connect(f"file:{quote(path)}?mode=rwc")
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("BEGIN IMMEDIATE")
        create_schema(connection, _beyond(skeleton, life), {"made_for": made_for})
        connection.execute("UPDATE sqlite_sequence SET seq=max(seq, ?)", (_first(life),))
        create_indexes(connection)
        connection.execute(_FORMER)
        connection.execute(_KEEP_FORMER)
        connection.execute("COMMIT")
    finally:
        connection.close()


def _forget_former(path: str) -> None:
    connection = _connect(f"file:{quote(path)}?mode=rw")
    try:
        connection.execute("DELETE FROM former")
    finally:
        connection.close()


@contextmanager
def locked(path: str, *, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path`; whether it was to be had. A dead holder holds nothing."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise IndexBroken(
            f"{path} cannot be written ({error.strerror}); check the state directory"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
