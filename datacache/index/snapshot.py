"""
Pinned catalogues: the versions of a data set to train on.

`create_snapshot` lists everything once into a new file (`building`), `SnapshotIndex` serves one and
never asks the store for names, `list_snapshots`, `diff_snapshots` and `remove_snapshot` are what
their names say. A snapshot is `<state>/snapshots/NAME.db`, in the schema of `database`. One is built
at a time; a build that was killed leaves a temporary, which the next create or list removes.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from datacache.clock import Clock
from datacache.errors import (
    DatacacheError,
    IndexBroken,
    NoSuchPath,
    NoSuchSnapshot,
    NotADirectory,
    SettingError,
    SnapshotExists,
)
from datacache.index import database as db
from datacache.index import layout, names, walking
from datacache.index.building import new_catalogue
from datacache.index.database import Database
from datacache.index.index import ROOT, IndexStats
from datacache.index.remembered import Known, Remembered
from datacache.model import Dataset, Entry, Kind, Version
from datacache.sources.source import Source

if TYPE_CHECKING:
    from datacache.index.manifest import Manifest

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_SUFFIX = ".db"


@dataclass(frozen=True)
class SnapshotInfo:
    """What a snapshot is of, and how large."""

    name: str
    created: float
    """Wall time at which its listing began."""
    files: int
    bytes: int
    directories: int
    mounts: tuple[tuple[str, str], ...]
    """URI and path of each mount point."""


@dataclass(frozen=True)
class Change:
    """A file that two snapshots do not have in common."""

    kind: str
    """`added`, `removed` or `changed`."""
    path: str
    old_size: int | None
    """Before; None: it was not there."""
    new_size: int | None
    """After; None: it is not there any more."""
    old_version: str = ""
    new_version: str = ""


class SnapshotIndex:
    """Implements `index.Index` over a catalogue that never changes: what it says it says for ever."""

    def __init__(self, database: Database, *, cache_entries: int = 100_000) -> None:
        self._database = database
        self._totals = database.totals()
        self._root = database.root()
        self._remembered = Remembered(cache_entries)  # of one edition: it is true for ever

    def __repr__(self) -> str:
        return f"<SnapshotIndex {self._database.path} {self._totals.files} files>"

    def lookup(self, parent: int, name: bytes) -> Entry:
        known = self._remembered.name(parent, name)
        if known is None:
            known = Known(0, self._database.child(parent, name))
            if known.entry is None and self.entry(parent).kind is not Kind.DIRECTORY:
                raise NotADirectory(f"{self.path(parent)} is a file")
            self._remembered.keep(parent, name, known)
        if known.entry is None:
            raise NoSuchPath(f"no such path: {self.path(parent).rstrip('/')}/{names.to_text(name)}")
        return known.entry

    def lookup_nowait(self, parent: int, name: bytes) -> Entry | None:
        return self.lookup(parent, name)

    def entry(self, ino: int, generation: int | None = None) -> Entry:
        if generation:
            raise NoSuchPath(f"inode {ino} has no version {generation}: here a path has one, number 0")
        if ino == ROOT:
            return self._root
        known = self._remembered.ino(ino)
        found = known.entry if known is not None else self._database.entry(ino)
        if found is None:
            raise NoSuchPath(f"no path has the inode {ino}")
        if known is None:
            self._remembered.keep(found.parent, found.name, Known(0, found))
        return found

    def current(self, ino: int) -> Entry:
        return self.entry(ino)

    def children(self, parent: int, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        found = self._database.children(parent, after, limit)
        if not found and self.entry(parent).kind is not Kind.DIRECTORY:
            raise NotADirectory(f"{self.path(parent)} is a file")
        self._remembered.keep_listed(0, found)
        return found

    def fresh_for(self, parent: int) -> float:
        return float("inf")

    def edition(self, parent: int) -> int | None:
        return 0

    def outdated(self, entry: Entry) -> bool:
        return False

    @property
    def pinned(self) -> bool:
        return True

    def resolve(self, path: str) -> Entry:
        return walking.resolve(self, path)

    def walk(self, path: str = "/") -> Iterator[tuple[str, Entry]]:
        return walking.walk(self, path)

    @property
    def identity(self) -> str:
        return str(self._database.meta()["id"])

    def path(self, ino: int) -> str:
        return walking.path_of(self, ino)

    def stats(self) -> IndexStats:
        return IndexStats(*self._totals)

    def close(self) -> None:
        self._database.close()


def open_snapshot(dataset: Dataset, sources: Sequence[Source], *, state: str, name: str) -> Database:
    """The catalogue of snapshot `name`. Raises NoSuchSnapshot, and SettingError for one of other mounts."""
    path = _path(state, name)
    if not os.path.exists(path):
        raise NoSuchSnapshot(
            f"data set {dataset.name} has no snapshot {name}; `datacache snapshot list` shows them"
        )
    return db.open_pinned(path, made_for=layout.made_for(dataset, sources), name=name)


def create_snapshot(
    dataset: Dataset,
    sources: Sequence[Source],
    *,
    state: str,
    name: str,
    clock: Clock,
    progress: Callable[[int], None] | None = None,
    manifest: "Manifest | None" = None,
) -> SnapshotInfo:
    """Pin the names and versions of all objects as they are listed now. `progress` is told how many files.

    Raises SnapshotExists, SettingError, SourceError. On an error nothing is left.
    """
    path = _path(state, name)
    layout.check_mounts(dataset)
    skeleton = layout.skeleton(dataset)
    created = clock.wall()
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with db.locked(_lock(state), wait=False) as ours:
        if not ours:
            raise DatacacheError(
                f"another process is creating a snapshot in {state}; try again when it has ended"
            )
        _tidy(state)
        if os.path.exists(path):
            raise SnapshotExists(
                f"data set {dataset.name} has a snapshot {name} already, and snapshots never change"
            )
        with new_catalogue(path, skeleton) as builder:
            if manifest is not None:
                manifest.build(builder, sources, progress=progress)
            else:
                roots = {s.mount: s for s in skeleton if s.mount != db.NO_MOUNT}
                for number, source in enumerate(sources):
                    pages = source.list("", recursive=True, versions=source.traits.versioned)
                    builder.mount(
                        roots[number], (page.objects for page in pages), uri=source.uri, progress=progress
                    )
            builder.finish(
                {
                    "made_for": layout.made_for(dataset, sources),
                    "created": created,
                    "mounts": json.dumps([[mount.uri, mount.path] for mount in dataset.mounts]),
                }
            )
    return _info(state, name)


def list_snapshots(state: str) -> list[SnapshotInfo]:
    """All snapshots in `state`, oldest first."""
    directory = os.path.dirname(_lock(state))
    if not os.path.isdir(directory):
        return []
    with suppress(IndexBroken, OSError), db.locked(_lock(state), wait=False) as ours:
        if ours:
            _tidy(state)
    found = [name.removesuffix(_SUFFIX) for name in os.listdir(directory) if name.endswith(_SUFFIX)]
    infos = (_info(state, name) for name in found if _NAME.fullmatch(name))
    return sorted(infos, key=lambda info: (info.created, info.name))


def remove_snapshot(state: str, name: str) -> None:
    """Remove a snapshot. Who has it open keeps it until the end."""
    try:
        os.unlink(_path(state, name))
    except FileNotFoundError:
        raise NoSuchSnapshot(f"there is no snapshot {name} in {state}") from None


def diff_snapshots(state: str, a: str, b: str) -> Iterator[Change]:
    """How snapshot `b` differs from `a`, file by file. Holds no more in memory than one open query for
    each directory on the way down."""
    for name in (a, b):
        _info(state, name)
    with closing(Database(_path(state, a), pinned=True).connect()) as connection:
        connection.execute("ATTACH ? AS other", (f"file:{quote(_path(state, b))}?mode=ro&immutable=1",))
        descent = [("/", connection.execute(_DIFF, {"old": ROOT, "new": ROOT}))]
        while descent:
            prefix, rows = descent[-1]
            for name, kind, old, new, *about in rows:
                path = prefix + names.to_text(name)
                if kind == db.DIRECTORY:
                    # 0 is the parent of the root alone, and -1 of nothing: a directory that is not there.
                    below = {"old": old or -1, "new": new or -1}
                    descent.append((path + "/", connection.execute(_DIFF, below)))
                    break
                if change := _change(path, *about):
                    yield change
            else:
                descent.pop()


_DIFF = """
SELECT a.name, a.kind, a.ino, b.ino, a.size, b.size,
    a.etag, a.version_id, a.stamp, b.etag, b.version_id, b.stamp
FROM main.paths AS a LEFT JOIN other.paths AS b ON b.parent = :new AND b.name = a.name AND b.kind = a.kind
WHERE a.parent = :old AND (b.ino IS NULL OR a.kind = 1
    OR (a.size, a.etag, a.version_id, a.stamp) IS NOT (b.size, b.etag, b.version_id, b.stamp))
UNION ALL
SELECT b.name, b.kind, NULL, b.ino, NULL, b.size, '', '', '', b.etag, b.version_id, b.stamp
FROM other.paths AS b WHERE b.parent = :new AND NOT EXISTS
    (SELECT 1 FROM main.paths AS a WHERE a.parent = :old AND a.name = b.name AND a.kind = b.kind)
"""


def _change(path: str, old_size: int | None, new_size: int | None, *versions: str | None) -> Change | None:
    old, new = (Version(*(part or "" for part in some)) for some in (versions[:3], versions[3:]))
    if old_size is None:
        return Change("added", path, None, new_size, "", new.token)
    if new_size is None:
        return Change("removed", path, old_size, None, old.token, "")
    if (old_size, old.token) == (new_size, new.token):
        return None  # the same bytes, put again: another version id, but the same entity tag
    return Change("changed", path, old_size, new_size, old.token, new.token)


def _info(state: str, name: str) -> SnapshotInfo:
    path = _path(state, name)
    if not os.path.exists(path):
        raise NoSuchSnapshot(f"there is no snapshot {name} in {state}; `datacache snapshot list` shows them")
    meta = db.pinned_meta(path, name=name)
    return SnapshotInfo(
        name=name,
        created=float(meta["created"]),
        files=int(meta["files"]),
        bytes=int(meta["bytes"]),
        directories=int(meta["directories"]),
        mounts=tuple((uri, at) for uri, at in json.loads(meta["mounts"])),
    )


def _path(state: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise SettingError("snapshot", name, "a name of 1 to 64 letters, digits, '.', '_' and '-'")
    return os.path.join(state, "snapshots", name + _SUFFIX)


def _lock(state: str) -> str:
    return os.path.join(state, "snapshots", ".lock")


def _tidy(state: str) -> None:
    """Remove what a killed build left. The caller holds the lock, so no build is under way."""
    directory = os.path.dirname(_lock(state))
    for name in os.listdir(directory):
        if name.endswith(".tmp"):
            with suppress(OSError):
                os.unlink(os.path.join(directory, name))
