"""
The index of a bucket that changes: listed directory by directory as paths are touched, and believed
for a TTL.

A lookup in a directory whose listing is fresh costs no request, whether the name is there or not.
Where it is past its TTL, `how_to_check` decides between listing it again, which refreshes all of it,
and asking for the one object. Concurrent lookups share one listing. When the store is away, the last
known listing is served and counted as stale, or with `strict` the lookup fails.

What is known lives in the `database`, and what was used lately in memory too (`remembered`). Each
directory has an edition, a number that changes in the database with the directory's entries, and what
is remembered counts only while its directory has the edition that it was read under. So nothing is
ever purged, and another process that lists into the same database is noticed.

Freshness: a listing is as old as its beginning. Within the process that is told by the monotonic
clock *and* by the wall clock, whichever says older (the first stands still while a laptop sleeps, the
second may be set back); after a restart by the wall clock alone, and a listing from the future counts
as expired.
"""

import enum
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import NamedTuple

from cachetools import LRUCache

from datacache.clock import Clock
from datacache.config.settings import Consistency, IndexSettings
from datacache.errors import (
    DatacacheError,
    IndexFull,
    NoSuchPath,
    NotADirectory,
    NotFound,
    Unavailable,
    WrongBytes,
)
from datacache.index import names, walking
from datacache.index.database import DIRECTORY, FILE, NO_MOUNT, Changing, Database, ListedRow, Merged
from datacache.index.index import ROOT, IndexStats
from datacache.index.remembered import Known, Remembered
from datacache.model import Entry, Kind
from datacache.sources.source import Page, Source

_log = logging.getLogger(__name__)

LISTING_PAGE = 1000
"""Objects that one listing request returns: S3, GCS and OSS all stop there."""

_DIRECTORIES = 50_000
"""Directories whose freshness is held in memory, about 400 bytes each; others are read from the database."""


class Check(enum.Enum):
    """How to find out whether an entry past its TTL is still what it was."""

    LIST = "list its directory"
    ASK = "ask for it alone"


def how_to_check(*, entries: int, asked: int) -> Check:
    """Which is cheaper, for a directory of `entries` in which `asked` were asked for one by one since
    its last listing.

    Up to a page, a listing is one request as well, and refreshes everything. Beyond, objects are
    asked for singly until that has cost as much as the listing would have: whatever comes next, the
    total is then at most twice the best that could have been done.
    """
    pages = -(-entries // LISTING_PAGE)
    return Check.ASK if pages > 1 and asked < pages else Check.LIST


class _Moment(NamedTuple):
    """When something began."""

    turn: int
    """Its place among all that this index did; 0 for what an earlier process did. Clocks have a resolution,
    so they do not tell what came first."""
    monotonic: float
    wall: float


_ALWAYS = _Moment(0, float("inf"), float("inf"))


class _Directory:
    """What is known of one directory's listing."""

    __slots__ = ("asked", "began", "edition", "entries")

    def __init__(self, began: _Moment | None, entries: int, edition: int) -> None:
        self.began = began
        """When the listing that is believed began; None: never listed."""
        self.entries = entries
        self.edition = edition
        """Changes whenever the entries of the directory do; 0 before the first listing."""
        self.asked: dict[int, _Moment] = {}
        """Entries asked for one by one since; at most as many as the listing has pages."""


class LiveIndex:
    """Implements `index.Index` over sources that change. `close` closes the database, not the sources."""

    def __init__(
        self,
        database: Database,
        sources: Sequence[Source],
        settings: IndexSettings,
        *,
        clock: Clock,
        cache_entries: int = 100_000,
        on_replaced: Callable[[Sequence[Entry]], None] | None = None,
    ) -> None:
        """`on_replaced` is told which files have another version now or are gone, as they were: a hint for
        whoever keeps copies of them, given once and at most (a listing has limits, a process may end)."""
        self._database, self._sources, self._clock = database, sources, clock
        self._on_replaced = on_replaced
        self._ttl = float("inf") if settings.consistency is Consistency.IMMUTABLE else settings.ttl
        self._strict = settings.strict
        self._root = database.root()
        self._turns = itertools.count(1)
        self._remembered = Remembered(cache_entries)
        # Held from a transaction to its place in `_directories`, so that both have one order.
        self._landing = threading.Lock()
        # Guards all below, and is never held over SQL or a request. Invariant: what is remembered under the
        # edition that its directory has in `_directories` is at least as new as that directory's listing, for
        # whoever remembers a row took the edition before reading it, and sets one after the transaction.
        self._lock = threading.Lock()
        self._directories: LRUCache[int, _Directory] = LRUCache(_DIRECTORIES)
        self._flights: dict[tuple[str, int], Future[None]] = {}
        self._stale = self._listings = 0
        self._said_full = False
        # Names whose state we know better than a listing that began before the turn.
        self._ours: dict[int, dict[bytes, int]] = {}
        # Keys that are not shown, whatever the store says, by mount and key of the directory: it may be
        # removed, and made anew under another number.
        self._held: dict[tuple[int, str], set[str]] = {}

    def __repr__(self) -> str:
        return f"<LiveIndex {self._database.path} {self._listings} listings, {len(self._flights)} under way>"

    # What an index offers

    def lookup(self, parent: int, name: bytes) -> Entry:
        found = self.lookup_nowait(parent, name)
        if found is None:
            self._renew(self.entry(parent), self._child(parent, name))
            found = self._child(parent, name)
            if found is None:
                raise self._no_such(parent, name)
        return found

    def lookup_nowait(self, parent: int, name: bytes) -> Entry | None:
        known = self._remembered.name(parent, name)
        with self._lock:
            directory = self._directories.get(parent)
        if directory is None or known is None or known.edition != directory.edition:
            if self.entry(parent).kind is not Kind.DIRECTORY:
                raise NotADirectory(f"{self.path(parent)} is a file")
            directory = self._directory(parent)
            if directory.began is None:
                return None
            entry = self._child(parent, name)
        else:
            entry = known.entry
        if not self._fresh(directory, entry):
            return None
        if entry is None:
            raise self._no_such(parent, name)
        return entry

    def entry(self, ino: int, generation: int | None = None) -> Entry:
        entry = self._latest(ino)
        if entry is not None and (generation is None or generation == entry.generation):
            return entry
        if generation is None:
            raise NoSuchPath(f"no path has the inode {ino} any more")
        # The newest among them as well: it may have come since.
        entry = self._database.version(ino, generation)
        if entry is None:
            raise NoSuchPath(f"version {generation} of the inode {ino} is not known")
        return entry

    def current(self, ino: int) -> Entry:
        entry = self.entry(ino)
        if ino == ROOT or self._fresh(self._directory(entry.parent), entry):
            return entry
        self._renew(self.entry(entry.parent), entry)
        return self.entry(ino)

    def children(self, parent: int, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        if after == 0:
            directory = self.entry(parent)
            if directory.kind is not Kind.DIRECTORY:
                raise NotADirectory(f"{self.path(parent)} is a file")
            self._renew(directory, None)
        edition = self._directory(parent).edition
        found = self._database.children(parent, after, limit)
        self._remembered.keep_listed(edition, found)
        return found

    def fresh_for(self, parent: int) -> float:
        began = self._directory(parent).began
        if began is None:
            return 0.0
        return max(0.0, self._ttl - self._age(began))

    def edition(self, parent: int) -> int | None:
        directory = self._directory(parent)
        edition = directory.edition
        return edition if self._fresh(directory) else None

    def outdated(self, entry: Entry) -> bool:
        with suppress(DatacacheError):
            now = self._latest(entry.ino)
            if now is None or now.version != entry.version:
                return True
            if self._ttl != float("inf") and entry.mount >= 0:
                parent, known = self.entry(entry.parent), now
                self._once("ask", entry.ino, lambda: self._ask(parent, known))
                now = self._latest(entry.ino)
                return now is None or now.version != entry.version
        return False

    @property
    def pinned(self) -> bool:
        return self._ttl == float("inf")

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
        totals = self._database.totals()
        with self._lock:
            return IndexStats(*totals, stale=self._stale, listings=self._listings)

    def close(self) -> None:
        self._database.close()

    # What a writable data set does to it (`datacache.writing.overlay`)

    def known_child(self, parent: int, name: bytes) -> Entry | None:
        """`name` in directory `parent` as far as it is known; no store is asked, whatever its age."""
        return self._database.child(parent, name)

    def known_children(self, parent: int, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        """`children` of the same kind."""
        return self._database.children(parent, after, limit)

    def version(self, ino: int, generation: int) -> Entry | None:
        """That version of a path, named or not, if it is known."""
        return self._database.version(ino, generation)

    @contextmanager
    def changing(self, *ours: tuple[int, bytes]) -> Iterator[Changing]:
        """Change names and versions, in one transaction. A listing that has begun before this ends leaves
        the names `ours`, by parent, as they are now."""
        with self._landing:
            with self._database.changing() as changing:
                yield changing
            turn = next(self._turns)
            with self._lock:
                for parent in changing.touched:
                    directory = self._directories.get(parent)
                    if directory is not None:
                        directory.edition = changing.edition
                for parent, name in ours:
                    self._ours.setdefault(parent, {})[name] = turn

    def replaced(self, entries: Sequence[Entry]) -> None:
        """Names that we have given to something else, as they were: whoever keeps copies of them is told."""
        if self._on_replaced is not None:
            self._on_replaced(entries)

    def hold(self, mount: int, key: str) -> None:
        """Show an object no more, whatever listings say, until `let_go`."""
        with self._lock:
            self._held.setdefault((mount, names.directory(key)), set()).add(key)

    def let_go(self, mount: int, key: str) -> None:
        """Undo `hold`."""
        at = mount, names.directory(key)
        with self._lock:
            held = self._held.get(at)
            if held is not None:
                held.discard(key)
                if not held:
                    del self._held[at]

    def _better_known(self, parent: int, began: _Moment) -> list[bytes]:
        """Names of `ours` that are newer than a listing that began then; the others are forgotten."""
        with self._lock:
            ours = self._ours.get(parent)
            if ours is None:
                return []
            newer = {name: turn for name, turn in ours.items() if turn > began.turn}
            if newer:
                self._ours[parent] = newer
            else:
                del self._ours[parent]
            return list(newer)

    # What is known

    def _latest(self, ino: int) -> Entry | None:
        """The path `ino` as last known; None when it is gone."""
        if ino == ROOT:
            return self._root
        known = self._remembered.ino(ino)
        if known is not None and known.entry is not None:
            with self._lock:
                directory = self._directories.get(known.entry.parent)
            if directory is not None and directory.edition == known.edition:
                return known.entry
        entry = self._database.entry(ino)
        if entry is not None:  # again, by name: it may have changed before the edition was taken
            entry = self._child(entry.parent, entry.name)
        return entry if entry is not None and entry.ino == ino else None

    def _child(self, parent: int, name: bytes) -> Entry | None:
        """`name` in `parent` as last known."""
        edition = self._directory(parent).edition
        entry = self._database.child(parent, name)
        self._remembered.keep(parent, name, Known(edition, entry))
        return entry

    def _directory(self, ino: int) -> _Directory:
        with self._lock:
            directory = self._directories.get(ino)
        if directory is None:
            listed = self._database.listed(ino)
            began, entries, edition = None, 0, 0
            if listed is not None:
                began, entries, edition = self._moment_of(listed.began), listed.entries, listed.edition
            elif self._synthetic(ino):
                began = _ALWAYS
            with self._lock:
                directory = self._directories.get(ino)  # another thread may have been faster
                if directory is None:
                    directory = _Directory(began, entries, edition)
                    self._directories[ino] = directory
        return directory

    def _synthetic(self, ino: int) -> bool:
        """Whether `ino` is a directory above mount points: fixed, so always fresh."""
        entry = self._root if ino == ROOT else self._database.entry(ino)
        return entry is not None and entry.mount == NO_MOUNT

    def _no_such(self, parent: int, name: bytes) -> NoSuchPath:
        return NoSuchPath(f"no such path: {self.path(parent).rstrip('/')}/{names.to_text(name)}")

    # How old it is

    def _now(self) -> _Moment:
        return _Moment(next(self._turns), self._clock.monotonic(), self._clock.wall())

    def _moment_of(self, wall: float) -> _Moment:
        """When an earlier process did something, on our clocks."""
        return _Moment(0, self._clock.monotonic() - (self._clock.wall() - wall), wall)

    def _age(self, began: _Moment) -> float:
        if began is _ALWAYS:
            return float("-inf")
        wall = self._clock.wall() - began.wall
        return max(wall, self._clock.monotonic() - began.monotonic) if wall >= 0 else float("inf")

    def _fresh(self, directory: _Directory, entry: Entry | None = None) -> bool:
        """Whether what is known of `entry`, or of all of `directory`, may be believed."""
        began = directory.began
        if began is None:
            return False
        if self._ttl == float("inf") or self._age(began) < self._ttl:
            return True
        asked = directory.asked.get(entry.ino) if entry is not None and directory.asked else None
        return asked is not None and self._age(asked) < self._ttl

    # Asking the store

    def _renew(self, parent: Entry, child: Entry | None) -> None:
        """Make what is known of `child`, or of all of directory `parent`, at most TTL old.

        A listing that another thread began before we came may be too old by then: that is why this
        is a loop. The second time around the listing is ours, and began after we came.
        """
        came = self._now()
        directory = self._directory(parent.ino)
        while not self._believable(directory, child, came):
            check = how_to_check(entries=directory.entries, asked=len(directory.asked))
            try:
                if child is not None and check is Check.ASK:
                    self._once("ask", child.ino, lambda: self._ask(parent, child))
                else:
                    self._once("list", parent.ino, lambda: self._list(parent))
            except (Unavailable, IndexFull) as error:
                if directory.began is None or self._strict:
                    raise
                with self._lock:
                    self._stale += 1
                    said, self._said_full = self._said_full, self._said_full or isinstance(error, IndexFull)
                if self._said_full and not said:
                    _log.warning("%s; what was known before is served meanwhile", error)
                return
            directory = self._directory(parent.ino)

    def _believable(self, directory: _Directory, child: Entry | None, came: _Moment) -> bool:
        if self._fresh(directory, child):
            return True
        # With a TTL shorter than the listing took, what began after we came is as good as it gets.
        moments = [directory.began, directory.asked.get(child.ino) if child is not None else None]
        return any(m is not None and m.turn > came.turn for m in moments)

    def _once(self, what: str, ino: int, work: Callable[[], None]) -> None:
        """Do `work`, or wait for the thread that is doing it and share its fate."""
        with self._lock:
            flight = self._flights.get((what, ino))
            mine = flight is None
            if flight is None:
                flight = self._flights[what, ino] = Future()
        if not mine:
            flight.result()
            return
        try:
            work()
        except Exception as error:
            flight.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._flights[what, ino]
            if not flight.done():
                flight.set_result(None)

    def _list(self, parent: Entry) -> None:
        began = self._now()
        source = self._sources[parent.mount]
        with self._database.listing(parent) as listing:
            for page in source.list(parent.key, recursive=False):
                listing.add(listed_rows(page, parent.key, source.uri))
            with self._landing:
                merged = listing.commit(
                    began.wall,
                    replaced=self._on_replaced is not None,
                    ours=self._better_known(parent.ino, began),
                    held=[names.to_bytes(key) for key in self._held_in(parent)],
                )
                if merged is not None:
                    self._listed(parent, began, merged)
        if merged is None:
            raise NoSuchPath(f"directory {parent.key!r} of {source.uri} was removed while it was listed")
        if self._on_replaced is not None and merged.replaced:
            self._on_replaced(merged.replaced)

    def _held_in(self, parent: Entry) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._held.get((parent.mount, parent.key), ()))

    def _listed(self, parent: Entry, began: _Moment, merged: Merged) -> None:
        with self._lock:
            self._listings += 1
            if merged.lost_directories:
                # They, and what is below them, are not known any more, and there may be many.
                self._directories.clear()
            self._directories[parent.ino] = _Directory(began, merged.entries, merged.edition)

    def _ask(self, parent: Entry, child: Entry) -> None:
        """Hold `child` alone against the store. Where it is not there any more, list its directory:
        the name may be a directory now, or an object a directory."""
        began = self._now()
        source = self._sources[parent.mount]
        if child.kind is Kind.DIRECTORY:
            page = next(iter(source.list(child.key, recursive=False)), None)
            if page is None or not (page.objects or page.prefixes):
                self._once("list", parent.ino, lambda: self._list(parent))
                return
            info = None
        else:
            try:
                info = source.stat(child.key)
            except NotFound:
                self._once("list", parent.ino, lambda: self._list(parent))
                return
        with self._landing:
            directory = self._directory(parent.ino)
            if directory.began is None or directory.began.turn > began.turn:
                return  # a listing that began later was faster, and knows better
            with self._lock:
                if self._ours.get(parent.ino, {}).get(child.name, 0) > began.turn:
                    return  # and so do we
            edition = self._database.renew(child, info) if info is not None else None
            with self._lock:
                directory.asked[child.ino] = began
                if edition is not None:
                    directory.edition = edition
        if self._on_replaced is not None and edition is not None:
            self._on_replaced([child])


def listed_rows(page: Page, prefix: str, uri: str) -> Iterator[ListedRow]:
    """A page of the listing of directory `prefix` as rows of the catalogue.

    An empty object named as the directory itself is a marker: it says that the directory exists,
    and is not shown. A marker with content is a file (docs/names.md).
    """
    start = len(prefix)
    for info in page.objects:
        segment = info.key[start:]
        if not segment and info.size == 0:
            continue
        try:
            name = names.shown(segment)
        except UnicodeEncodeError:
            _log.warning("%s: the key %r is no text and is left out", uri, info.key)
            continue
        except ValueError as error:
            raise WrongBytes(f"{uri}: the listing of {prefix!r} holds {info.key!r}") from error
        etag, version_id, stamp = info.version
        yield (
            name, FILE, info.size, info.mtime_ns, names.to_bytes(info.key),
            etag, version_id, stamp, 1 if info.archived else 0,
        )  # fmt: skip
    for key in page.prefixes:
        try:
            name = names.shown(key[start:-1])
        except UnicodeEncodeError:
            _log.warning("%s: the key %r is no text and is left out", uri, key)
            continue
        except ValueError as error:
            raise WrongBytes(f"{uri}: the listing of {prefix!r} holds {key!r}") from error
        yield (name, DIRECTORY, 0, 0, names.to_bytes(key), "", "", "", 0)
