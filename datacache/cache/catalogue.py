"""
What is present in a cache directory, and its checksums: an SQLite database beside the copies.

Two tables. `entries`: one row a copy. `blocks`: one row a contiguous piece that was filled and
checksummed in one go; the pieces of an entry never overlap, and what no block covers is not there,
whatever lies in the file.

Order is everything. A block's row is committed after its bytes were written: after `kill -9` a
recorded block is there, for the page cache outlives a process. A power cut is worse: bytes and rows
reach the medium in any order. The journal (WAL, synchronous=NORMAL) then comes back as a prefix of
what was committed, never corrupt; and each block carries an *epoch*, the time of its filling as a
number that grows with every sync round and every start. Epoch 0 means: has been on the medium
before this row said so. Any other epoch of an earlier boot is *doubt*: the block is held against
its checksum before it is served. See docs/on-disk-format.md.
"""

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import xxhash

from datacache.cache.policy import Candidate
from datacache.cache.tier import Block, Standing
from datacache.model import Buffer, CacheKey

FORMAT = 1
NAME = "catalogue.db"

_ROUNDS = 24
"""Bits of an epoch that count sync rounds within one start: at one each 10 s they last five years."""

# `age` is what eviction walks, and it holds all that the sum of used bytes needs: reading it takes
# 50 ms for a million entries, so no running total has to be stored and kept right.
_SCHEMA = f"""
PRAGMA user_version = {FORMAT};
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE datasets (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, priority INTEGER NOT NULL);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    source BLOB NOT NULL, key BLOB NOT NULL, token BLOB NOT NULL, size INTEGER NOT NULL,
    dataset INTEGER NOT NULL REFERENCES datasets,
    last_open REAL NOT NULL,
    pinned INTEGER NOT NULL,
    superseded INTEGER NOT NULL,
    used INTEGER NOT NULL,
    present INTEGER NOT NULL
);
CREATE INDEX age ON entries (dataset, last_open, pinned, used);
CREATE INDEX superseded ON entries (id) WHERE superseded;
CREATE TABLE blocks (
    entry INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    checksum INTEGER NOT NULL, epoch INTEGER NOT NULL,
    PRIMARY KEY (entry, start)
) WITHOUT ROWID;
"""
# The queries below are put together from constants of this module only.
_ROWS = (
    "SELECT id, digest, source, key, token, size, last_open, pinned, superseded, used, present FROM entries"
)
_HELD = (
    "SELECT id, used, pinned, superseded, start, stop, checksum, epoch"
    " FROM entries LEFT JOIN blocks ON entry = id WHERE digest = ? ORDER BY start"
)
_CANDIDATES = (
    "SELECT e.id, digest, d.name, d.priority, last_open, used, superseded, pinned"
    " FROM entries e JOIN datasets d ON d.id = e.dataset"
)


class Row(NamedTuple):
    """One entry, as recorded."""

    id: int
    digest: bytes
    key: CacheKey
    last_open: float
    pinned: bool
    superseded: bool
    used: int
    present: int

    @property
    def name(self) -> str:
        return file_name(self.digest, self.id)


class Held(NamedTuple):
    """What an open needs of an entry, whose key it has."""

    id: int
    used: int
    pinned: bool
    superseded: bool
    blocks: list[Block]
    """In order."""


def checksum(data: Buffer) -> int:
    """XXH3 of `data`, as the signed 64-bit number that SQLite holds."""
    value: int = xxhash.xxh3_64_intdigest(data)
    return value - (1 << 64) if value >> 63 else value


def file_name(digest: bytes, entry: int) -> str:
    """Where the copy lies, below the managed directory.

    The entry's id is part of it, so an entry that was dropped and filled anew is another file: a
    catalogue that a power cut took back in time can never vouch for bytes it has not seen.
    """
    name = digest.hex()
    return f"objects/{name[:2]}/{name}-{entry:x}"


class Catalogue:
    """The database of one cache directory. Thread-safe; one writer, readers that never wait for it.

    Raises sqlite3.Error; the tier decides what that means.
    """

    def __init__(self, path: str, *, boot: str) -> None:
        """Open or make the database. `boot` names this boot of the machine."""
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # Each connection is guarded by the lock beside it.
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._writer = _connect(path)
        self._reader = self._checkpointer = self._writer
        self._path = path
        try:
            self._begin(boot)
            self._reader, self._checkpointer = _connect(path), _connect(path)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Catalogue {self._path} epoch {self.epoch:#x}>"

    def _begin(self, boot: str) -> None:
        db = self._writer
        db.execute("PRAGMA journal_mode = WAL")
        # Checkpoints wait for the medium: they are the keeper's work (`checkpoint`), never a filler's.
        db.execute("PRAGMA wal_autocheckpoint = 0")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        elif version != FORMAT:
            raise sqlite3.DatabaseError(f"it has format {version}, not {FORMAT}")
        with self._change(durable=True):
            meta: dict[str, Any] = dict(db.execute("SELECT name, value FROM meta"))
            session = int(meta.get("session", 0)) + 1
            same = meta.get("boot") == boot
            self.same_boot = same
            """Whether the last user of this directory lived in this boot of the machine."""
            self.clean = bool(meta.get("clean", 0))
            """Whether the last user said good-bye, with everything on the medium."""
            self.epoch = session << _ROUNDS
            """What blocks are recorded with now."""
            self.boot_epoch = int(meta["boot_epoch"]) if same else self.epoch
            """The first epoch of this boot: what is older, and not 0, is in doubt."""
            new = {"session": session, "boot": boot, "boot_epoch": self.boot_epoch, "clean": 0}
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", new.items())

    @contextmanager
    def _change(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction of the writer; `durable`: on the medium when it returns."""
        with self._writing:
            db = self._writer
            if durable:
                db.execute("PRAGMA synchronous = FULL")
            try:
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
            finally:
                if durable:
                    db.execute("PRAGMA synchronous = NORMAL")

    def _ask(self, query: str, *values: Any) -> list[Any]:
        with self._reading:
            return self._reader.execute(query, values).fetchall()

    # ---- reading --------------------------------------------------------------------------------

    def find(self, digest: bytes) -> Row | None:
        """The entry of a key's digest."""
        found = self._ask(f"{_ROWS} WHERE digest = ?", digest)
        return _row(found[0]) if found else None

    def held(self, digest: bytes) -> Held | None:
        """The same with its blocks, for an open: one query, where `find` and `blocks` are two (10 us)."""
        rows = self._ask(_HELD, digest)
        if not rows:
            return None
        entry, used, pinned, superseded, first, *_ = rows[0]
        blocks = [Block._make(values[4:]) for values in rows] if first is not None else []
        return Held(entry, used, bool(pinned), bool(superseded), blocks)

    def get(self, entry: int) -> Row | None:
        """The entry of an id."""
        found = self._ask(f"{_ROWS} WHERE id = ?", entry)
        return _row(found[0]) if found else None

    def blocks(self, entry: int) -> list[Block]:
        """The blocks of an entry, in order."""
        found = self._ask(
            "SELECT start, stop, checksum, epoch FROM blocks WHERE entry = ? ORDER BY start", entry
        )
        return [Block._make(values) for values in found]

    def rows(self) -> Iterator[Row]:
        """All entries, by id; what changes meanwhile may be seen or not."""
        last = -1
        while True:
            page = self._ask(f"{_ROWS} WHERE id > ? ORDER BY id LIMIT 1000", last)
            for values in page:
                yield _row(values)
            if not page:
                return
            last = page[-1][0]

    def rows_from(self, low: bytes, high: bytes | None) -> list[Row]:
        """The entries with digests from `low` up to but not including `high` (None: to the end)."""
        upper, values = ("AND digest < ?", (high,)) if high is not None else ("", ())
        found = self._ask(f"{_ROWS} WHERE digest >= ? {upper}", low, *values)
        return [_row(values) for values in found]

    def totals(self) -> tuple[int, int, int]:
        """Number of entries, the bytes that they use, and of these those of pinned ones."""
        (found,) = self._ask(
            "SELECT count(*), coalesce(sum(used), 0), coalesce(sum(used * pinned), 0)"
            " FROM entries INDEXED BY age"
        )
        return found[0], found[1], found[2]

    def candidates(self, limit: int) -> list[list[Candidate]]:
        """For eviction, in groups of at most `limit`: superseded entries, and of each data set what was
        opened longest ago."""
        groups = [self._ask(f"{_CANDIDATES} WHERE superseded LIMIT ?", limit)]
        for (dataset,) in self._ask("SELECT id FROM datasets"):
            oldest = (
                f"{_CANDIDATES} WHERE e.dataset = ? AND NOT pinned AND NOT superseded"
                " ORDER BY last_open LIMIT ?"
            )
            groups.append(self._ask(oldest, dataset, limit))
        return [[Candidate(*values) for values in group] for group in groups]

    def has_unsynced(self, entry: int) -> bool:
        """Whether a block of this boot waits for its way to the medium to be confirmed."""
        query = "SELECT 1 FROM blocks WHERE entry = ? AND epoch >= ? LIMIT 1"
        return bool(self._ask(query, entry, self.boot_epoch))

    # ---- writing --------------------------------------------------------------------------------

    def dataset(self, name: str, priority: int) -> int:
        """The id of a data set, with its priority from now on."""
        with self._change() as db:
            db.execute(
                "INSERT INTO datasets (name, priority) VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET priority = excluded.priority",
                (name, priority),
            )
            (found,) = db.execute("SELECT id FROM datasets WHERE name = ?", (name,)).fetchone()
        return int(found)

    def add(self, row: Row, dataset: int, blocks: Iterable[Block]) -> None:
        """A new entry, and its first blocks."""
        key = row.key
        with self._change() as db:
            db.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (row.id, row.digest, _raw(key.source), _raw(key.key), _raw(key.token), key.size,
                 dataset, row.last_open, row.pinned, row.superseded, row.used, row.present),
            )  # fmt: skip
            self._add_blocks(db, row.id, blocks)

    def grow(self, entry: int, blocks: Iterable[Block], *, used: int, present: int) -> None:
        """More blocks of an entry, `used` and `present` bytes of them."""
        with self._change() as db:
            self._resize(db, entry, used, present)
            self._add_blocks(db, entry, blocks)

    def _add_blocks(self, db: sqlite3.Connection, entry: int, blocks: Iterable[Block]) -> None:
        # The epoch is read inside the transaction: see `next_epoch`.
        db.executemany(
            "INSERT INTO blocks VALUES (?, ?, ?, ?, ?)",
            [(entry, b.start, b.stop, b.checksum, self.epoch) for b in blocks],
        )

    @staticmethod
    def _resize(db: sqlite3.Connection, entry: int, used: int, present: int) -> None:
        db.execute(
            "UPDATE entries SET used = used + ?, present = present + ? WHERE id = ?", (used, present, entry)
        )

    def remove(self, entry: int, *, durable: bool = False) -> bool:
        """Forget an entry; whether it was there. `durable`: its file may be written to afterwards, and a
        power cut must not bring back rows that vouch for it."""
        with self._change(durable=durable) as db:
            db.execute("DELETE FROM blocks WHERE entry = ?", (entry,))
            return db.execute("DELETE FROM entries WHERE id = ?", (entry,)).rowcount > 0

    def remove_blocks(self, entry: int, blocks: Iterable[Block], *, used: int, present: int) -> None:
        """Forget blocks, `used` and `present` bytes of them.

        Durable: their place in the file may be written anew afterwards, and a power cut must not
        bring back rows that vouch for it.
        """
        with self._change(durable=True) as db:
            db.executemany(
                "DELETE FROM blocks WHERE entry = ? AND start = ?", [(entry, b.start) for b in blocks]
            )
            self._resize(db, entry, -used, -present)

    def recount(self, entry: int, *, used: int, present: int) -> None:
        """Set what an entry's blocks add up to."""
        with self._change() as db:
            db.execute("UPDATE entries SET used = ?, present = ? WHERE id = ?", (used, present, entry))

    def touch(self, opened: dict[int, float], dataset: int, verified: Iterable[tuple[int, int]]) -> None:
        """Remember last opens (which make an entry one of `dataset`), and blocks that were found good."""
        with self._change() as db:
            db.executemany(
                "UPDATE entries SET last_open = ?, dataset = ? WHERE id = ?",
                [(when, dataset, entry) for entry, when in opened.items()],
            )
            db.executemany(
                "UPDATE blocks SET epoch = ? WHERE entry = ? AND start = ? AND epoch",
                [(self.epoch, entry, start) for entry, start in verified],
            )

    def mark(self, entry: int, *, pinned: bool | None = None, superseded: bool | None = None) -> None:
        """Set what is not None."""
        with self._change() as db:
            db.execute(
                "UPDATE entries SET pinned = coalesce(?, pinned), superseded = coalesce(?, superseded)"
                " WHERE id = ?",
                (pinned, superseded, entry),
            )

    def adopt(self, entry: int, standing: Standing) -> None:
        """Let an entry stand as it stood in another tier."""
        with self._change() as db:
            db.execute(
                "UPDATE entries SET last_open = ?, pinned = pinned OR ?, superseded = superseded OR ?"
                " WHERE id = ?",
                (standing.last_open, standing.pinned, standing.superseded, entry),
            )

    def next_epoch(self) -> int:
        """Begin a new epoch; the one that ended.

        Every block that is recorded with the ended epoch or before has been written to its file
        before this returns, so a sync that begins now covers it.
        """
        with self._writing:
            ended, self.epoch = self.epoch, self.epoch + 1
            return ended

    def mark_synced(self, entries: list[int], epoch: int) -> None:
        """The blocks of these entries up to `epoch`, of this boot, are on the medium.

        Must be called after a sync that began after `next_epoch` gave `epoch`.
        """
        for i in range(0, len(entries), 500):  # so that fillers never wait long
            with self._change() as db:
                db.executemany(
                    "UPDATE blocks SET epoch = 0 WHERE entry = ? AND epoch BETWEEN ? AND ?",
                    [(entry, self.boot_epoch, epoch) for entry in entries[i : i + 500]],
                )

    def checkpoint(self) -> None:
        """Move what was committed from the journal into the database, and let the journal begin anew.

        Waits for the medium, but holds up neither readers nor the writer: on its own connection.
        """
        self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def journal_size(self) -> int:
        """Bytes of the journal."""
        try:
            return os.stat(self._path + "-wal").st_size
        except FileNotFoundError:
            return 0

    def say_goodbye(self) -> None:
        """The directory is left in order: nobody needs to look for what a crash left behind."""
        with self._change(durable=True) as db:
            db.execute("UPDATE meta SET value = 1 WHERE name = 'clean'")

    def close(self) -> None:
        """Close; idempotent. Calls that come later raise sqlite3.ProgrammingError."""
        with self._reading:
            self._reader.close()
        self._checkpointer.close()
        with self._writing:
            self._writer.close()


def new_ids() -> int:
    """Where the ids of the entries of one start begin: at random, so that no two starts, also of a
    catalogue that a power cut took back in time, give the same id to different files."""
    return secrets.randbits(42) << 20


def _connect(path: str) -> sqlite3.Connection:
    # isolation_level=None: we say BEGIN and COMMIT ourselves.
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA cache_size = -8192")
    return db


def _row(values: tuple[Any, ...]) -> Row:
    entry, digest, source, key, token, size, last_open, pinned, superseded, used, present = values
    cache_key = CacheKey(_text(source), _text(key), _text(token), size)
    return Row(entry, digest, cache_key, last_open, bool(pinned), bool(superseded), used, present)


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
