"""
The journal: what is dirty, and what the bucket is still owed. SQLite, in the landing zone.

A `Node` is a path that differs from what the bucket is known to hold; an `Op` is one thing that the
bucket is owed; a hidden name is one that the bucket still shows and we do not. All of them say mount
and key, so a journal can be read without the catalogue of names that its numbers belong to.

Transactions are committed without waiting for the disk: they survive the death of the process, not a
power cut. `sync` makes all that were committed before durable, by one fdatasync of the WAL. A checkpoint
syncs by itself what it needs (SQLite, synchronous=NORMAL).
"""

import enum
import errno
import itertools
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

from datacache.errors import LandingBroken, LandingError, LandingFull
from datacache.model import Kind, ObjectInfo, Version
from datacache.writing.ballast import Ballast
from datacache.writing.landing import allocate
from datacache.writing.steps import step

FORMAT = 2
"""`PRAGMA user_version`; another one is another format (docs/on-disk-format.md)."""

RESERVED = 4 << 20
"""Bytes of the disk that are taken ahead, twice: for the WAL, and for the database."""
_PAGE = 4096
_CHECKPOINT = RESERVED // _PAGE // 2
"""Pages in the WAL after which it is begun anew: the other half is for one large transaction."""
_UNBOUNDED = 1 << 30
"""Pages that a database may have, as far as SQLite is concerned."""
_ROOMS = (0, RESERVED, 4 * RESERVED, 16 * RESERVED, 64 * RESERVED)
"""Bytes that are made free before a transaction is tried again, which had no room; at first, those of the
WAL. A rename of 100,000 files takes some 60 MiB."""
_KEEP_SIZE = 1  # of fallocate(2)
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE nodes (
    ino INTEGER PRIMARY KEY, parent INTEGER NOT NULL, name BLOB NOT NULL, kind INTEGER NOT NULL,
    mount INTEGER NOT NULL, key BLOB NOT NULL, generation INTEGER NOT NULL,
    landing INTEGER NOT NULL, origin TEXT, mode INTEGER, uid INTEGER, gid INTEGER, mtime_ns INTEGER,
    target BLOB, xattrs TEXT NOT NULL, writers INTEGER NOT NULL, orphan INTEGER NOT NULL,
    synced INTEGER NOT NULL
);
CREATE TABLE hidden (
    parent INTEGER NOT NULL, name BLOB NOT NULL, mount INTEGER NOT NULL, key BLOB NOT NULL,
    PRIMARY KEY (mount, key)
) WITHOUT ROWID;
CREATE TABLE ops (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, kind INTEGER NOT NULL, ino INTEGER NOT NULL,
    mount INTEGER NOT NULL, key BLOB NOT NULL, barrier INTEGER NOT NULL, expected TEXT NOT NULL,
    landing INTEGER NOT NULL, origin TEXT, since REAL NOT NULL, resume TEXT NOT NULL
);
CREATE TABLE attributes (
    mount INTEGER NOT NULL, key BLOB NOT NULL, token TEXT NOT NULL, kind INTEGER NOT NULL,
    mode INTEGER, uid INTEGER, gid INTEGER, mtime_ns INTEGER, target BLOB, xattrs TEXT NOT NULL,
    PRIMARY KEY (mount, key)
) WITHOUT ROWID;
"""


_NO_XATTRS: Mapping[bytes, bytes] = MappingProxyType({})


class Attributes(NamedTuple):
    """What a path has beside its bytes. None: as the mount's settings, or the store, say."""

    mode: int | None = None
    """Permission bits."""
    uid: int | None = None
    gid: int | None = None
    mtime_ns: int | None = None
    target: bytes | None = None
    """Where a symbolic link leads; None: it is none."""
    xattrs: Mapping[bytes, bytes] = _NO_XATTRS
    """`user.*`, by whole name."""


class Node(NamedTuple):
    """A path that is not what the bucket is known to hold."""

    ino: int
    parent: int
    name: bytes
    kind: Kind
    mount: int
    key: str
    """Where it is, or will be, in the bucket; of a directory with a "/" at the end."""
    generation: int
    landing: int = 0
    """The landing file that has its bytes; 0: none."""
    origin: ObjectInfo | None = None
    """The object of the bucket that has its bytes, under the key that it has there."""
    attributes: Attributes = Attributes()
    writers: int = 0
    """Opens for writing that were not closed yet."""
    orphan: bool = False
    """Unlinked, and perhaps still open."""
    synced: bool = False
    """The bytes of its landing file were on the disk once, and somebody may have been told so."""


class OpKind(enum.IntEnum):
    """What an operation does to a key of the bucket."""

    PUT = 1
    """Make it hold the node's content; an empty object for a directory."""
    DELETE = 2
    """Remove it."""


NOTHING = "nothing"
ANYTHING = "anything"


class Op(NamedTuple):
    """One thing that the bucket is owed."""

    seq: int
    """Its place in the order; 0 until it is added."""
    id: str
    """Of this operation and this content only; put into the object's metadata, so that a lost answer can be
    told. "LINEAGE.COUNT": what is written again before it was sent keeps the lineage."""
    kind: OpKind
    ino: int
    """The node that it is for, or that was renamed away (`DELETE`); 0: none any more."""
    mount: int
    key: str
    barrier: bool = False
    """Not before all that is earlier is done."""
    expected: str | Version = NOTHING
    """What the bucket holds under the key before: a version, `NOTHING`, or `ANYTHING`: that is not known."""
    landing: int = 0
    origin: ObjectInfo | None = None
    since: float = 0.0
    """Wall time of the close, rename or unlink that it is from; 0: not due, for its file was never closed."""
    resume: str = ""
    """What the sink wants to know when it goes on after a restart."""

    @property
    def lineage(self) -> str:
        """What the ids of all contents of this operation begin with."""
        return self.id.partition(".")[0]

    @property
    def keys(self) -> tuple[tuple[int, str], ...]:
        """All keys that it reads or changes."""
        own = (self.mount, self.key)
        return (own,) if self.origin is None else (own, (self.mount, self.origin.key))


class Hidden(NamedTuple):
    """An object that the bucket still has, and that is not shown, until an operation is done."""

    parent: int
    name: bytes
    mount: int
    key: str


class Journal:
    """Thread-safe."""

    def __init__(self, path: str) -> None:
        """Open, or make. Raises LandingBroken where there is something else, LandingFull."""
        self.path = path
        self.ballast = Ballast(os.path.dirname(path))
        self._lock = threading.RLock()  # one connection, one transaction at a time
        self._wal = self._file = -1
        self.ballast.lighten()
        try:
            # As long as the connection: a close of any descriptor of a file lets go of SQLite's locks on it.
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._db = sqlite3.connect(
                f"file:{quote(path)}?mode=rwc", uri=True, isolation_level=None, check_same_thread=False,
                cached_statements=256,
            )  # fmt: skip
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA secure_delete=OFF")
            self._db.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT}")
            self._open()
            self._wal = os.open(path + "-wal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not self._take(RESERVED):
                self._bound()
            last = "SELECT max(seq) FROM (SELECT seq FROM sqlite_sequence UNION SELECT seq FROM ops)"
            self._numbers = itertools.count((self._db.execute(last).fetchone()[0] or 0) + 1)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise self._broken(error) from error
        except BaseException:
            self.close()
            raise
        self.ballast.make()
        self._failed: OSError | None = None  # of a sync

    def _open(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            with self._transaction():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={FORMAT}")
        elif version != FORMAT:
            raise LandingBroken(
                f"{self.path} is in format {version}, not {FORMAT}: another version of datacache wrote it; "
                "use that one to flush it"
            )

    # ---- space -------------------------------------------------------------------------------------

    def top_up(self) -> None:
        """Take space again, and have ballast, where there is room for it."""
        with self._lock, suppress(sqlite3.Error):
            if self._free() < RESERVED // 2:
                self._take(RESERVED)
        self.ballast.make()

    def _take(self, room: int) -> bool:
        """Have `room` bytes of free pages in the database, and a WAL that is at its start; whether there are.

        Those who write to landing files meet the end of the disk first, and their closes, and uploads, must
        be noted all the same. A WAL is used again from its start, and free pages before the database grows.
        Neither may ever grow into a disk that is full: what cannot be copied from the WAL stays there, and
        then the WAL grows, too. So SQLite is held to what the disk has given already.
        """
        self._rewind()
        if self._free() >= room and os.fstat(self._wal).st_size >= RESERVED:
            return True
        try:
            _have({self._file: self._pages() * _PAGE + room - self._free(), self._wal: room + room // 32})
            self._db.execute(f"PRAGMA max_page_count={_UNBOUNDED}")
            with self._transaction():
                self._db.execute("DROP TABLE IF EXISTS room")  # of a process that was killed here
                self._db.execute("CREATE TABLE room (filler BLOB)")
                self._db.execute("INSERT INTO room VALUES (zeroblob(?))", (room,))
            self._db.execute("PRAGMA wal_checkpoint(RESTART)")
            return True
        except (OSError, sqlite3.OperationalError) as error:
            if not _is_full(error):
                raise
            return False
        finally:
            with suppress(sqlite3.OperationalError):
                self._db.execute("DROP TABLE IF EXISTS room")
            self._bound()

    def _rewind(self) -> bool:
        """Have the WAL begin anew, as far as can be. Always true: who had no room may try again."""
        with suppress(sqlite3.OperationalError):
            self._db.execute("PRAGMA wal_checkpoint(RESTART)")
        return True

    def _bound(self) -> None:
        self._db.execute(f"PRAGMA max_page_count={self._pages()}")

    def _pages(self) -> int:
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        return int(pages)

    def _free(self) -> int:
        """Bytes of the database that may be written again."""
        (pages,) = self._db.execute("PRAGMA freelist_count").fetchone()
        return int(pages) * _PAGE

    def __repr__(self) -> str:
        return f"<Journal {self.path}>"

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._wal >= 0:
                os.close(self._wal)
            if self._file >= 0:
                with suppress(sqlite3.Error, AttributeError):  # there may be no connection yet
                    self._db.close()
                os.close(self._file)
            self._wal = self._file = -1

    # ---- durability ------------------------------------------------------------------------------

    def sync(self) -> None:
        """Return when all that was committed before the call is on the disk. Raises LandingBroken, and from
        then on: a sync that failed may have dropped what it was about."""
        if self._failed is None:
            try:
                os.fdatasync(self._wal)
                return
            except OSError as error:
                self._failed = error
        raise LandingBroken(f"{self.path} cannot be synced: {self._failed.strerror}") from self._failed

    # ---- changes ---------------------------------------------------------------------------------

    @contextmanager
    def change(self, what: str) -> Iterator["Change"]:
        """One transaction, all or nothing, when the block is left. `what` names the step for the tests.
        Raises LandingFull, LandingBroken."""
        with self._lock:
            step(f"journal.before.{what}")
            change = Change(self._numbers)
            yield change
            try:
                self._commit(what, change)
            except (OSError, sqlite3.Error) as error:
                raise self._broken(error) from error
            step(f"journal.after.{what}")

    def _commit(self, what: str, change: "Change") -> None:
        rooms = iter(_ROOMS)
        while True:
            try:
                with self._transaction():
                    for statement, values in change.statements:
                        self._db.execute(statement, values)
                    step(f"journal.within.{what}")
                return
            except sqlite3.OperationalError as error:
                room = next(rooms, -1) if _is_full(error) else -1
                if room < 0 or not (self._rewind() if room == 0 else self._find(room)):
                    raise

    def _find(self, room: int) -> bool:
        """Have `room` bytes, and be it from the ballast; whether there are."""
        return self._take(room) or (self.ballast.give_up() and self._take(min(room, RESERVED)))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            raise

    def _broken(self, error: Exception) -> LandingError:
        if _is_full(error):
            return LandingFull(f"the landing zone has no room for its journal {self.path}")
        return LandingBroken(f"the journal {self.path} fails ({error}); check the disk of the landing zone")

    # ---- what is there ---------------------------------------------------------------------------

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self._broken(error) from error

    def meta(self) -> dict[str, str]:
        """What it says of itself."""
        return dict(self._rows("SELECT name, value FROM meta"))

    def nodes(self) -> list[Node]:
        """All of them."""
        return [_to_node(row) for row in self._rows(f"SELECT {_NODE} FROM nodes")]

    def hidden(self) -> list[Hidden]:
        """All of them."""
        rows = self._rows("SELECT parent, name, mount, key FROM hidden")
        return [Hidden(parent, name, mount, _text(key)) for parent, name, mount, key in rows]

    def ops(self) -> list[Op]:
        """All of them, in order."""
        return [_to_op(row) for row in self._rows(f"SELECT {_OP} FROM ops ORDER BY seq")]

    def attributes(self, mount: int, key: str) -> tuple[str, Kind, Attributes] | None:
        """What a clean path has beside its bytes, and of which version, as what."""
        rows = self._rows(
            "SELECT token, kind, mode, uid, gid, mtime_ns, target, xattrs FROM attributes"
            " WHERE mount=? AND key=?", (mount, _blob(key)),
        )  # fmt: skip
        if not rows:
            return None
        token, kind, mode, uid, gid, mtime_ns, target, xattrs = rows[0]
        return token, Kind(kind), Attributes(mode, uid, gid, mtime_ns, target, _load_xattrs(xattrs))

    def has_attributes(self) -> bool:
        """Whether any clean path has some."""
        return bool(self._rows("SELECT 1 FROM attributes LIMIT 1"))


class Change:
    """What one transaction of the journal is to do: noted here, and done at its end, so that it can be done
    again where there was no room."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers
        self.statements: list[tuple[str, tuple[Any, ...]]] = []

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> None:
        self.statements.append((statement, values))

    def set_meta(self, name: str, value: str) -> None:
        self._run("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def put_node(self, node: Node) -> None:
        """Keep it, in place of what has its `ino`."""
        self._run(_PUT_NODE, _of_node(node))

    def set_writers(self, ino: int, writers: int) -> None:
        """Keep how many have a node open for writing."""
        self._run("UPDATE nodes SET writers=? WHERE ino=?", (writers, ino))

    def set_synced(self, ino: int) -> None:
        """Keep that the bytes of a node were on the disk."""
        self._run("UPDATE nodes SET synced=1 WHERE ino=?", (ino,))

    def drop_node(self, ino: int) -> None:
        self._run("DELETE FROM nodes WHERE ino=?", (ino,))

    def add_op(self, op: Op) -> Op:
        """Add it at the end of the order, or where its `seq` says; as it is then."""
        added = op if op.seq else op._replace(seq=next(self._numbers))
        self._run(_ADD_OP, _of_op(added))
        return added

    def update_op(self, op: Op) -> None:
        """Keep it in place of what has its `seq`."""
        self._run(_PUT_OP, _of_op(op))

    def drop_op(self, seq: int) -> None:
        self._run("DELETE FROM ops WHERE seq=?", (seq,))

    def hide(self, hidden: Hidden) -> None:
        self._run(
            "INSERT OR REPLACE INTO hidden VALUES (?, ?, ?, ?)",
            (hidden.parent, hidden.name, hidden.mount, _blob(hidden.key)),
        )

    def show(self, mount: int, key: str) -> None:
        """Hide it no longer."""
        self._run("DELETE FROM hidden WHERE mount=? AND key=?", (mount, _blob(key)))

    def clear_hidden(self) -> None:
        self._run("DELETE FROM hidden")

    def clear_nodes(self) -> None:
        self._run("DELETE FROM nodes")

    def keep_attributes(self, mount: int, key: str, token: str, kind: Kind, kept: Attributes) -> None:
        """What the clean path `key` has beside its bytes, while it is the version `token`."""
        self._run(
            "INSERT OR REPLACE INTO attributes VALUES (?,?,?,?,?,?,?,?,?,?)",
            (
                mount, _blob(key), token, int(kind), kept.mode, kept.uid, kept.gid, kept.mtime_ns,
                kept.target, _dump_xattrs(kept.xattrs),
            ),
        )  # fmt: skip

    def drop_attributes(self, mount: int, key: str) -> None:
        self._run("DELETE FROM attributes WHERE mount=? AND key=?", (mount, _blob(key)))


def _have(sizes: Mapping[int, int]) -> None:
    """Have the disk give open files so many bytes. Raises OSError where it has not all of that: then none is
    taken, for somebody else may need what there is."""
    lacking = {fd: size - os.fstat(fd).st_blocks * 512 for fd, size in sizes.items()}
    for descriptor, size in sizes.items():
        st = os.fstatvfs(descriptor)
        if sum(size for size in lacking.values() if size > 0) > st.f_bavail * st.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            allocate(descriptor, _KEEP_SIZE, 0, size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
        lacking[descriptor] = 0


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


# ---- rows ----------------------------------------------------------------------------------------

_NODE = (
    "ino, parent, name, kind, mount, key, generation, landing, origin, mode, uid, gid, mtime_ns, target,"
    " xattrs, writers, orphan, synced"
)
_OP = "seq, id, kind, ino, mount, key, barrier, expected, landing, origin, since, resume"


def _marks(columns: str) -> str:
    return ",".join("?" * (columns.count(",") + 1))


_PUT_NODE = f"INSERT OR REPLACE INTO nodes ({_NODE}) VALUES ({_marks(_NODE)})"
_ADD_OP = f"INSERT INTO ops ({_OP}) VALUES ({_marks(_OP)})"
_PUT_OP = f"INSERT OR REPLACE INTO ops ({_OP}) VALUES ({_marks(_OP)})"


def _of_node(node: Node) -> tuple[Any, ...]:
    kept = node.attributes
    return (
        node.ino, node.parent, node.name, int(node.kind), node.mount, _blob(node.key), node.generation,
        node.landing, _dump_object(node.origin), kept.mode, kept.uid, kept.gid, kept.mtime_ns, kept.target,
        _dump_xattrs(kept.xattrs), node.writers, int(node.orphan), int(node.synced),
    )  # fmt: skip


def _to_node(row: tuple[Any, ...]) -> Node:
    (ino, parent, name, kind, mount, key, generation, landing, origin, mode, uid, gid, mtime_ns, target,
     xattrs, writers, orphan, synced) = row  # fmt: skip
    return Node(
        ino, parent, name, Kind(kind), mount, _text(key), generation, landing, _load_object(origin),
        Attributes(mode, uid, gid, mtime_ns, target, _load_xattrs(xattrs)), writers, bool(orphan),
        bool(synced),
    )  # fmt: skip


def _of_op(op: Op) -> tuple[Any, ...]:
    return (
        op.seq, op.id, int(op.kind), op.ino, op.mount, _blob(op.key), int(op.barrier),
        _dump_expected(op.expected), op.landing, _dump_object(op.origin), op.since, op.resume,
    )  # fmt: skip


def _to_op(row: tuple[Any, ...]) -> Op:
    seq, name, kind, ino, mount, key, barrier, expected, landing, origin, since, resume = row
    return Op(
        seq, name, OpKind(kind), ino, mount, _text(key), bool(barrier), _load_expected(expected), landing,
        _load_object(origin), since, resume,
    )  # fmt: skip


def _blob(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _dump_expected(expected: str | Version) -> str:
    return expected if isinstance(expected, str) else json.dumps(list(expected))


def _load_expected(text: str) -> str | Version:
    return text if text in (NOTHING, ANYTHING) else Version(*json.loads(text))


def _dump_object(info: ObjectInfo | None) -> str | None:
    return None if info is None else json.dumps([info.key, info.size, list(info.version), info.mtime_ns])


def _load_object(text: str | None) -> ObjectInfo | None:
    if text is None:
        return None
    key, size, version, mtime_ns = json.loads(text)
    return ObjectInfo(key, size, Version(*version), mtime_ns)


def _dump_xattrs(xattrs: Mapping[bytes, bytes]) -> str:
    return json.dumps({name.hex(): value.hex() for name, value in xattrs.items()}) if xattrs else "{}"


def _load_xattrs(text: str) -> dict[bytes, bytes]:
    if text == "{}":
        return {}
    return {bytes.fromhex(name): bytes.fromhex(value) for name, value in json.loads(text).items()}
