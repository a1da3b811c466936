"""
The index of a writable data set: what was written here, on top of what the bucket holds.

It knows *nodes*, paths that are not (yet) as the bucket is known to hold them, and *hidden* names,
which the bucket still shows. Whatever it neither knows nor hides is the live index's. It decides what
the bucket is owed (`journal.Op`), and hears from the uploader when that was paid.

A change is made in this order: a number is claimed in the catalogue of names, where one is needed;
the journal is committed, and from then on it is so; what is in memory follows, and the catalogue.
Killed in between, `_resume` lets the catalogue follow what the journal says.

Locks: `_lock` for changes; it is held over transactions, never over a request to a store. Who looks
names up takes none: nodes are frozen values, a name is added before another is taken away, and what
was settled is in the live index before it is forgotten here.
"""

import errno
import logging
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from cachetools import LRUCache

from datacache.clock import Clock
from datacache.config.settings import Conflict
from datacache.errors import (
    IndexBroken,
    IsADirectory,
    LandingBroken,
    LandingFull,
    NoSuchPath,
    NotADirectory,
    NotEmpty,
    NotHere,
    OtherStore,
    PathExists,
    VersionChanged,
)
from datacache.index import names, walking
from datacache.index.database import NO_MOUNT, Changing
from datacache.index.index import ROOT, IndexStats
from datacache.index.live import LiveIndex
from datacache.model import Entry, Kind, ObjectInfo, Version
from datacache.sources.sink import Stored
from datacache.writing.journal import (
    ANYTHING,
    NOTHING,
    Attributes,
    Change,
    Hidden,
    Journal,
    Node,
    Op,
    OpKind,
)
from datacache.writing.landing import LandedFile, Landing, Quiet, Room, allocate
from datacache.writing.steps import step

_log = logging.getLogger(__name__)

DISPENSABLE = 256
"""Landing files that wait at most for the journal to be synced, before they are removed."""
LANDED_FIRST = 3
"""Times that files are landed before a rename, where others give their objects away meanwhile."""
OURS_FRESH = 10.0
"""Seconds for which names in a directory that the bucket does not have yet may be believed: it soon has."""
RESERVED = 1000
"""Numbers of paths that are taken from the catalogue at once: each time is a transaction of it."""
RENAMED_MAX = 100_000
"""Files below a directory that is renamed at most; beyond, it is EXDEV, on which `mv` copies and deletes."""
KEY_MAX = 1024
"""Bytes of a key, as S3, GCS, Azure and OSS have it."""
XATTRS_MAX = 64 * 1024
"""Bytes of the extended attributes of one path."""
SENT_XATTRS = 1024
"""... up to which they are sent with the object: a store takes 2 KiB of metadata (S3)."""
_PAGE = 1000
_DEFAULT = Attributes()
_S_IF = {Kind.DIRECTORY: 0o040000, Kind.FILE: 0o100000, Kind.SYMLINK: 0o120000}


Expected = str | Version
"""What the bucket holds under a key: a version, `NOTHING`, or `ANYTHING` where that is not known."""
Kept = tuple[str, Kind, Attributes]
"""What is kept of a clean path beside its bytes: of which version (`Version.token`), as what, and that."""


class Bring(Protocol):
    """Writes the bytes of a clean file to a descriptor. Raises SourceError, OSError."""

    def __call__(self, entry: Entry, descriptor: int) -> None: ...


class Keep(Protocol):
    """Puts bytes that the store has now, as `entry`, into the cache, as far as there is room."""

    def __call__(self, entry: Entry, content: Quiet) -> None: ...


class Uploads(Protocol):
    """What is asked of the uploader."""

    def poke(self) -> None:
        """There is something new to do."""

    def stop_op(self, seq: int) -> None:
        """Give up an upload: its file is written again, or is gone."""

    def forget(self, op: Op) -> None:
        """Nobody goes on with it: what the store keeps for it (parts) can go."""


class _NoUploads:
    def poke(self) -> None: ...
    def stop_op(self, seq: int) -> None: ...
    def forget(self, op: Op) -> None: ...


@dataclass(frozen=True)
class Dirty:
    """What is not in the bucket yet, for `status`."""

    files: int
    bytes: int
    open: int
    """Of `files`: open for writing."""
    due: int
    """Operations that the bucket is owed: puts and deletes."""
    oldest: float
    """Wall time of the close that has waited longest; 0 where nothing is due."""
    conflicts: int
    """Files that somebody else had changed meanwhile, since start."""


class Overlay:
    """Implements `index.Index`; see the module. Thread-safe."""

    def __init__(
        self,
        index: LiveIndex,
        journal: Journal,
        landing: Landing,
        *,
        clock: Clock,
        bring: Bring,
        keep: Keep,
        roots: Sequence[int],
        any_bytes: bool = True,
        conflict: Conflict = Conflict.KEEP_BOTH,
        host: str = "",
        resumed: bool = False,
        leases_tell: bool = False,
    ) -> None:
        """`any_bytes`: the stores have keys that are no UTF-8, too.

        `roots`: the `ino` of each mount point, in order. `host` is in the names of conflict files.
        `resumed`: an earlier daemon served this mount, so numbers in the journal are in use. `leases_tell`:
        all writers are the kernel's own (passthrough), so leases tell of those that an earlier daemon had."""
        self._index, self._journal, self._landing, self._clock = index, journal, landing, clock
        self._bring, self._keep, self._roots = bring, keep, tuple(roots)
        self._policy, self._host, self._any_bytes = conflict, host, any_bytes
        self._uploads: Uploads = _NoUploads()
        self._lock = threading.RLock()
        # Changed under the lock.
        self._nodes: dict[int, Node] = {}
        self._names: dict[int, dict[bytes, int]] = {}
        self._hidden: dict[int, set[str]] = {}  # keys, by directory
        self._ops: dict[int, Op] = {}  # in the order of `seq`
        self._puts: dict[int, int] = {}  # `seq` of the PUT of a node
        self._by_key: dict[tuple[int, str], list[int]] = {}
        self._deletes: dict[int, set[int]] = {}  # `seq` of DELETEs of what a node was called before
        self._hidden_at: dict[tuple[int, str], tuple[int, bytes]] = {}
        self._running: dict[int, Quiet | None] = {}
        self._numbers: Iterator[int] = iter(())  # reserved in the catalogue
        self._rowless: set[int] = set()  # directories made here that the catalogue knows nothing of below
        self._tried: set[int] = set()  # operations that may have taken effect, though nobody was told
        self._named: Counter[int] = Counter()  # nodes and operations of each landing file
        self._dispensable: set[int] = set()  # landing files that may have lost the last of them
        self._parked: dict[int, str] = {}
        self._users: Counter[int] = Counter()  # opens of landed files
        self._writing: Counter[int] = Counter()  # ... of them, those for writing
        self._granted: set[int] = set()  # created, and counted as open for writing; the open follows
        self._unchanged: dict[int, tuple[int, int]] = {}  # size and ctime of what was landed to be written
        self._landers: dict[
            int, list[Any]
        ] = {}  # by file: a lock for who brings its bytes, and how many want it
        self._conflicts = 0
        self._kept_attributes = journal.has_attributes()
        self._attributes: LRUCache[tuple[int, str], tuple[str, Kind, Attributes] | None] = LRUCache(50_000)
        self._attributes_lock = threading.Lock()
        if resumed and journal.meta().get("index") == index.identity:
            self._go_on(leases_tell)
        else:
            self._begin_anew()
        self._tried.update(self._ops)  # an earlier process may have
        self._clean_up()

    def __repr__(self) -> str:
        return f"<Overlay {len(self._nodes)} nodes, {len(self._ops)} operations>"

    def attach(self, uploads: Uploads) -> None:
        """Tell `uploads` of what is to be done."""
        self._uploads = uploads
        uploads.poke()

    # ---- Index -----------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        return self._index.identity

    @property
    def pinned(self) -> bool:
        return False

    def lookup(self, parent: int, name: bytes) -> Entry:
        found = self._ours(parent, name)
        return self._shown(self._index.lookup(parent, name)) if found is None else found

    def lookup_nowait(self, parent: int, name: bytes) -> Entry | None:
        found = self._ours(parent, name)
        if found is None:
            found = self._index.lookup_nowait(parent, name)
            return None if found is None else self._shown(found)
        return found

    def entry(self, ino: int, generation: int | None = None) -> Entry:
        node = self._nodes.get(ino)
        if node is None:
            return self._dressed(self._index.entry(ino, generation))
        if generation is None or generation == node.generation:
            return self._entry_of(node)
        former = self._index.version(ino, generation)
        if former is None:
            raise NoSuchPath(f"version {generation} of the inode {ino} is not known")
        return former

    def current(self, ino: int) -> Entry:
        node = self._nodes.get(ino)
        return self._dressed(self._index.current(ino)) if node is None else self._entry_of(node)

    def children(self, parent: int, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        node = self._nodes.get(parent)
        if node is not None and node.kind is not Kind.DIRECTORY:
            raise NotADirectory(f"{self.path(parent)} is a file")
        below = self._index.children if node is None else self._index.known_children
        found: list[Entry] = []
        while not found:
            # Looked at before and after: what is settled, or deleted, meanwhile is as it was before, and what
            # is renamed as it is after; so nothing is left out, and nothing that is gone comes back.
            ours, hidden = self._known_below(parent)
            page = below(parent, after=after, limit=limit)
            last = page[-1].ino if len(page) == limit else None
            now, hidden_now = self._known_below(parent)
            ours.update(now)
            hidden |= hidden_now
            names_of_ours = {node.name for node in ours.values()}
            found = [
                self._dressed(e)
                for e in page
                if e.ino not in ours and e.name not in names_of_ours and e.key not in hidden
            ]
            for one in ours.values():
                if one.ino > after and (last is None or one.ino <= last):
                    with suppress(NoSuchPath):
                        found.append(self._entry_of(one))
            if last is None:
                break
            after = last
        found.sort(key=lambda entry: entry.ino)
        return found[:limit]

    def _known_below(self, parent: int) -> tuple[dict[int, Node], set[str]]:
        """Nodes of a directory by number, and keys that are hidden in it."""
        inos = list(self._names.get(parent, {}).values())
        nodes = {ino: node for ino in inos if (node := self._nodes.get(ino)) is not None}
        return nodes, set(self._hidden.get(parent, ()))

    def fresh_for(self, parent: int) -> float:
        # What is in a directory that the bucket does not have yet changes by us only.
        return OURS_FRESH if parent in self._nodes else self._index.fresh_for(parent)

    def resolve(self, path: str) -> Entry:
        return walking.resolve(self, path)

    def walk(self, path: str = "/") -> Iterator[tuple[str, Entry]]:
        return walking.walk(self, path)

    def path(self, ino: int) -> str:
        return walking.path_of(self, ino)

    def stats(self) -> IndexStats:
        return self._index.stats()

    def close(self) -> None:
        with suppress(LandingBroken):
            self._sync_journal()
        self._index.close()

    # ---- what else is known of a path -------------------------------------------------------------

    def landed(self, ino: int) -> bool:
        """Whether its bytes are in a landing file."""
        node = self._nodes.get(ino)
        return node is not None and node.landing > 0

    def attributes(self, entry: Entry) -> Attributes:
        """What a path has beside its bytes."""
        node = self._nodes.get(entry.ino)
        if node is not None and node.generation == entry.generation:
            return node.attributes
        if not self._kept_attributes:
            return _DEFAULT
        found = self._clean_attributes(entry.mount, entry.key)
        if found is not None and found[0] == _token(entry):
            return found[2]
        # It may have been settled since: another version and key, but the same generation.
        with suppress(NoSuchPath):
            now = self._index.entry(entry.ino)
            if now.generation == entry.generation and (now.version, now.key) != (entry.version, entry.key):
                found = self._clean_attributes(now.mount, now.key)
                if found is not None and found[0] == _token(now):
                    return found[2]
        return _DEFAULT

    def key_of(self, entry: Entry) -> str:
        """The key under which a path is in the bucket, or will be."""
        return self._own_key(entry)

    def room(self) -> Room:
        """How full the landing zone is."""
        return self._landing.room()

    # ---- names ------------------------------------------------------------------------------------

    def create(self, parent: int, name: bytes, *, mode: int, uid: int, gid: int) -> Entry:
        """A new, empty file, which counts as open for writing until it was opened so and closed.

        Raises PathExists, NotADirectory, NoSuchPath, NotHere, LandingFull, LandingBroken.
        """
        self._look(parent, name)
        with self._lock:
            mount, key = self._free(parent, name, Kind.FILE)
            landing = self._create()
            node = Node(self._number(), parent, name, Kind.FILE, mount, key, 0)
            node = node._replace(landing=landing, attributes=Attributes(mode, uid, gid), writers=1)
            with self._changing("create") as batch:
                batch.put_node(node)
                self._owe_put(batch, node, NOTHING, due=False)
            self._granted.add(node.ino)
            return self._entry_of(node)

    def mkdir(self, parent: int, name: bytes, *, mode: int, uid: int, gid: int) -> Entry:
        """A new directory. Raises as `create`."""
        self._look(parent, name)
        with self._lock:
            mount, key = self._free(parent, name, Kind.DIRECTORY)
            node = Node(self._number(), parent, name, Kind.DIRECTORY, mount, key, 0)
            self._rowless.add(node.ino)
            node = node._replace(attributes=Attributes(mode, uid, gid, self._now_ns()))
            with self._changing("mkdir") as batch:
                batch.put_node(node)
                self._owe_put(batch, node, NOTHING, due=True)
        self._uploads.poke()
        return self._entry_of(node)

    def symlink(self, parent: int, name: bytes, target: bytes, *, uid: int, gid: int) -> Entry:
        """A new symbolic link. Raises as `create`."""
        self._look(parent, name)
        with self._lock:
            mount, key = self._free(parent, name, Kind.SYMLINK)
            landing = self._create()
            self._write(landing, target)
            node = Node(self._number(), parent, name, Kind.SYMLINK, mount, key, 0)
            kept = Attributes(0o777, uid, gid, self._now_ns(), target)
            node = node._replace(landing=landing, attributes=kept)
            with self._changing("symlink") as batch:
                batch.put_node(node)
                self._owe_put(batch, node, NOTHING, due=True)
        self._uploads.poke()
        return self._entry_of(node)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a file. Who has it open goes on. Raises NoSuchPath, IsADirectory, NotHere."""
        self._look(parent, name)
        with self._lock:
            entry = self._there(parent, name)
            if entry.kind is Kind.DIRECTORY:
                raise IsADirectory(self.path(entry.ino))
            self._writable(parent)
            with self._changing("unlink") as batch:
                self._take_away(batch, entry, hide=True)
            with self._catalogue() as changing:
                changing.bury(entry.ino)
            self._keep_directory(parent)
        self._uploads.poke()

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory. Raises NoSuchPath, NotADirectory, NotEmpty, NotHere."""
        self._look(parent, name)
        top = self._known(parent, name)
        if top is not None and top.kind is Kind.DIRECTORY:
            self.children(top.ino, limit=1)  # lists it, where that has to be done
        with self._lock:
            entry = self._there(parent, name)
            if entry.kind is not Kind.DIRECTORY:
                raise NotADirectory(self.path(entry.ino))
            self._writable(parent)
            if entry.ino in self._roots:
                raise NotHere(f"{self.path(entry.ino)} is a mount point of the data set")
            if self._known_children(entry.ino):
                raise NotEmpty(self.path(entry.ino))
            with self._changing("rmdir") as batch:
                self._take_away(batch, entry, hide=True)
            with self._catalogue() as changing:
                changing.bury(entry.ino)
            self._keep_directory(parent)
        self._uploads.poke()

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, replace: bool) -> None:
        """Give a file or a directory another name. What had that name is replaced, if it may be.

        Raises PathExists (not `replace`), NotEmpty, IsADirectory, NotADirectory, OtherStore, NotHere,
        NoSuchPath.
        """
        for place in ((parent, name), (new_parent, new_name)):
            self._look(*place)
            top = self._known(*place)
            if top is not None and top.kind is Kind.DIRECTORY:
                self._list_below(top)
        for _ in range(LANDED_FIRST):
            found = self._known(parent, name)
            threatened = [] if found is None else self._threatened(found)
            if not threatened:
                break
            for ino in threatened:
                self.land(ino)
        with self._lock:
            entry = self._there(parent, name)
            self._writable(parent)
            target = self._known(new_parent, new_name)
            if target is not None and target.ino == entry.ino:
                return
            if self._threatened(entry):
                raise VersionChanged("others rename the same files all the time")
            if entry.ino in self._roots or (target is not None and target.ino in self._roots):
                raise NotHere("a mount point of the data set cannot be renamed")
            mount, key = self._key(new_parent, new_name, entry.kind)
            if mount != entry.mount:
                raise OtherStore("the two names lie in different stores")
            if target is not None:
                self._check_replaced(entry, target, replace)
            at = new_parent
            while at != ROOT:
                if at == entry.ino:
                    raise NotHere("a directory cannot become a part of itself")
                at = self.entry(at).parent
            self._rename(entry, target, new_parent, new_name, key)
            self._keep_directory(parent)
        self._uploads.poke()

    def _threatened(self, top: Entry) -> list[int]:
        """Of what is renamed, the files whose bytes are an object that the bucket is to overwrite already:
        what is owed after that would find it gone (`mv a t; mv b a; mv t b`)."""
        found = []
        below = [top]
        while below:
            entry = below.pop()
            node = self._nodes.get(entry.ino)
            if entry.kind is Kind.DIRECTORY:
                below += self._known_children(entry.ino)
            elif node is not None and node.origin is not None and not node.landing:
                own = self._puts.get(node.ino)
                at = (node.mount, node.origin.key)
                ops = [self._ops[seq] for seq in self._by_key.get(at, ()) if seq != own]
                if any(op.kind is OpKind.PUT and op.key == node.origin.key for op in ops):
                    found.append(entry.ino)
        return found

    def _check_replaced(self, entry: Entry, target: Entry, may_be: bool) -> None:
        if not may_be:
            raise PathExists(self.path(target.ino))
        if entry.kind is Kind.DIRECTORY:
            if target.kind is not Kind.DIRECTORY:
                raise NotADirectory(self.path(target.ino))
            if self._known_children(target.ino):
                raise NotEmpty(self.path(target.ino))
        elif target.kind is Kind.DIRECTORY:
            raise IsADirectory(self.path(target.ino))

    def _rename(self, entry: Entry, target: Entry | None, parent: int, name: bytes, key: str) -> None:
        with self._changing("rename") as batch:
            there: Expected = NOTHING
            if target is not None:
                there = self._take_away(batch, target, hide=False)
            left: list[Op] = []
            for node, new in self._moved(self._node_of(entry), parent, name, key):
                left += self._move(batch, node, new, there)
                there = NOTHING  # of all but the first, nothing was there
            # After all the PUTs, and a directory after what is in it.
            for op in reversed(left):
                batch.add_op(op)
            if any(op.key == self._own_key(entry) for op in left):
                batch.hide(Hidden(entry.parent, entry.name, entry.mount, self._own_key(entry)))
        with self._catalogue((entry.parent, entry.name), (parent, name)) as changing:
            if target is not None:
                changing.bury(target.ino)
            changing.place(entry.ino, parent, name, entry.mount, names.to_bytes(key))

    def _moved(self, node: Node, parent: int, name: bytes, key: str) -> Iterator[tuple[Node, Node]]:
        """What a rename moves, as it was and as it will be, parents first."""
        yield node, node._replace(parent=parent, name=name, key=key)
        if node.kind is Kind.DIRECTORY:
            for child in self._known_children(node.ino):
                below = self._node_of(child)
                yield from self._moved(below, node.ino, child.name, key + below.key[len(node.key) :])

    def _move(self, batch: "_Batch", node: Node, new: Node, there: Expected) -> list[Op]:
        """Owe the bucket a node under another key, where it holds `there`; what is left to do under the old
        one."""
        op = self._ops.get(self._puts.get(node.ino, 0))
        closed = op is None or op.since > 0
        before, tried, mark = self._supersede(batch, node.mount, node.key)
        if before is None:
            before = node.origin.version if node.origin is not None else ANYTHING
        batch.put_node(new)
        batch.then(lambda: self._unchanged.pop(node.ino, None))  # it is another path now
        self._owe_put(batch, new, there, due=closed, barrier=closed)
        left = []
        for seq in self._deletes.get(node.ino, ()):  # of an earlier rename: they wait for the new name now
            # That of the new name itself, where it has come back, was superseded by the PUT.
            if seq not in self._running and self._ops[seq].key != new.key:
                batch.drop_op(self._ops[seq])
                left.append(self._ops[seq]._replace(seq=0))
        if before == NOTHING and not tried:
            return left
        directory = node.kind is Kind.DIRECTORY
        return [
            *left,
            Op(
                0, mark, OpKind.DELETE, node.ino, node.mount, node.key,
                expected=ANYTHING if directory else before, barrier=directory, since=self._clock.wall(),
            )
        ]  # fmt: skip

    def _take_away(self, batch: "_Batch", entry: Entry, *, hide: bool) -> Expected:
        """A path is no more, or (not `hide`) something else comes in its place; what the bucket holds."""
        ino, node = entry.ino, self._nodes.get(entry.ino)
        key = entry.key if node is None else node.key
        directory = entry.kind is Kind.DIRECTORY
        before, tried, mark = self._supersede(batch, entry.mount, key)
        if before is None:
            before = ANYTHING if directory else entry.version
        for seq in self._deletes.get(ino, ()):  # what it was renamed from need not wait for it any more
            batch.update_op(self._ops[seq]._replace(ino=0))
        if node is not None:
            if node.writers or self._users[ino]:
                batch.put_node(node._replace(orphan=True))
            else:
                batch.drop_node(node)
        else:
            batch.drop_attributes(entry.mount, key)
        if hide and (tried or before != NOTHING):
            batch.hide(Hidden(entry.parent, entry.name, entry.mount, key))
            batch.add_op(
                Op(
                    0, mark, OpKind.DELETE, 0, entry.mount, key, barrier=directory,
                    expected=ANYTHING if directory else before, since=self._clock.wall(),
                )
            )  # fmt: skip
        return before

    def _supersede(self, batch: "_Batch", mount: int, key: str) -> tuple[Expected | None, bool, str]:
        """Nothing that the bucket was owed under a key is wanted any more: what it holds there, or will when
        what is under way is done; None where nothing was owed. And whether some of that is under way, or may
        have taken effect unheard; the id for what comes in its place is then of its lineage, by which the
        uploader knows that effect for ours."""
        expected: Expected | None = None
        tried, mark = False, _new_id()
        for seq in self._by_key.get((mount, key), ()):
            op = self._ops[seq]
            if (op.mount, op.key) != (mount, key):
                continue  # it only reads what is there
            if expected is None:
                expected = op.expected
            # A later content of a lineage: what an earlier one of it has put may stand there.
            if seq in self._tried or not op.id.endswith(".0"):
                tried, mark = True, _next_id(op.id)
            if seq in self._running:
                batch.update_op(op._replace(ino=0))
                batch.then(lambda op=op: self._edit(op))  # type: ignore[misc]
            else:
                batch.drop_op(op)
        return expected, tried, mark

    def _owe_put(
        self, batch: "_Batch", node: Node, there: Expected, *, due: bool, barrier: bool = False
    ) -> None:
        """Owe the bucket a node, in place of what it was owed under the key, where it holds `there`, as far
        as nothing else is known."""
        before, _, mark = self._supersede(batch, node.mount, node.key)
        expected = there if before is None else before
        if node.kind is Kind.DIRECTORY:
            expected = ANYTHING
        if (node.mount, node.key) in self._hidden_at:
            batch.show(node.mount, node.key)
        batch.add_op(
            Op(
                0, mark, OpKind.PUT, node.ino, node.mount, node.key, barrier, expected, node.landing,
                None if node.landing else node.origin, self._clock.wall() if due else 0.0,
            )
        )  # fmt: skip

    def _keep_directory(self, ino: int) -> None:
        """A directory whose last entry went away is still there: the bucket needs an object that says so."""
        if ino in self._roots or ino in self._nodes or self._known_children(ino):
            return
        with suppress(NoSuchPath):
            node = self._node_of(self.entry(ino))._replace(origin=None)
            with self._changing("keep") as batch:
                batch.put_node(node)
                self._owe_put(batch, node, ANYTHING, due=True)

    # ---- attributes -------------------------------------------------------------------------------

    def set_attributes(
        self, ino: int, *, mode: int | None = None, uid: int | None = None, gid: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:  # fmt: skip
        """Change what is given. Of a clean file this is kept here, and sent with its next upload."""
        changes: dict[str, Any] = {"mode": mode, "uid": uid, "gid": gid, "mtime_ns": mtime_ns}
        changes = {name: value for name, value in changes.items() if value is not None}
        with self._lock:
            self._change_attributes(ino, lambda kept: kept._replace(**changes))
            node = self._nodes.get(ino)
            if mtime_ns is not None and node is not None and node.landing and node.kind is Kind.FILE:
                self._landing.set_mtime(node.landing, mtime_ns)

    def set_xattr(self, ino: int, name: bytes, value: bytes, *, create: bool, replace: bool) -> None:
        """Raises PathExists (`create`, and there is one), NoSuchPath (`replace`, and there is none), and
        LandingFull beyond XATTRS_MAX."""
        with self._lock:
            before = self.attributes(self.entry(ino)).xattrs
            if create and name in before:
                raise PathExists(f"extended attribute {names.to_text(name)}")
            if replace and name not in before:
                raise NoSuchPath(f"extended attribute {names.to_text(name)}")
            xattrs = {**before, name: value}
            if sum(len(k) + len(v) for k, v in xattrs.items()) > XATTRS_MAX:
                raise LandingFull(f"a path has {XATTRS_MAX} bytes of extended attributes at most")
            self._change_attributes(ino, lambda kept: _with_xattrs(kept, xattrs))

    def remove_xattr(self, ino: int, name: bytes) -> None:
        """Raises NoSuchPath where there is none."""
        with self._lock:
            before = self.attributes(self.entry(ino)).xattrs
            if name not in before:
                raise NoSuchPath(f"extended attribute {names.to_text(name)}")
            xattrs = {key: value for key, value in before.items() if key != name}
            self._change_attributes(ino, lambda kept: _with_xattrs(kept, xattrs))

    def _change_attributes(self, ino: int, change_of: Callable[[Attributes], Attributes]) -> None:
        node = self._nodes.get(ino)
        if node is not None:
            with self._changing("attributes") as batch:
                batch.put_node(node._replace(attributes=change_of(node.attributes)))
            return
        entry = self.entry(ino)
        if entry.mount < 0:
            raise NotHere(f"{self.path(ino)} lies above the mount points")
        kept = change_of(self.attributes(entry))
        with self._changing("attributes") as batch:
            batch.keep_attributes(entry.mount, entry.key, _token(entry), entry.kind, kept)

    # ---- bytes ------------------------------------------------------------------------------------

    def land(self, ino: int, *, truncate: bool = False) -> Entry:
        """Have the bytes of a file in the landing zone, or none of them, to be written; the file as it is
        then. A file that was clean has another generation afterwards.

        Raises NoSuchPath, IsADirectory, LandingFull, LandingBroken, SourceError.
        """
        with self._one_lander(ino):
            while True:
                entry = self.entry(ino)
                if entry.kind is Kind.DIRECTORY:
                    raise IsADirectory(self.path(ino))
                node = self._nodes.get(ino)
                if node is None:
                    self._writable(entry.parent)
                elif node.landing:
                    if truncate:
                        self.truncate(ino, 0)
                    return self.entry(ino)
                number = self._create()
                try:
                    if not truncate and entry.size:
                        self._fill(number, entry)
                    if self._landed(entry, number, truncate=truncate):
                        return self.entry(ino)
                except BaseException:
                    self._landing.discard(number)
                    raise
                self._landing.discard(number)  # it became another meanwhile

    def _create(self) -> int:
        """A new landing file. What is to be removed is removed first, where there is no room."""
        try:
            return self._landing.create()
        except LandingFull:
            self._sync_journal()
            return self._landing.create()

    def _fill(self, number: int, entry: Entry) -> None:
        file = self._landing.open(number, writing=True)
        try:
            self._bring(entry, file.descriptor)
            os.utime(file.descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LandingFull(f"the landing zone is full: {error.strerror}") from error
            raise LandingBroken(f"the landing zone fails: {error.strerror}") from error
        finally:
            file.close()

    def _write(self, number: int, data: bytes) -> None:
        file = self._landing.open(number, writing=True)
        try:
            os.pwrite(file.descriptor, data, 0)
        except OSError as error:
            raise LandingBroken(f"the landing zone fails: {error.strerror}") from error
        finally:
            file.close()

    def _landed(self, entry: Entry, number: int, *, truncate: bool) -> bool:
        """Make landing file `number` the content of what was `entry`; whether it still was that."""
        with self._lock:
            ino = entry.ino
            with suppress(NoSuchPath):
                now = self.entry(ino)
                if (now.version, now.size, now.key) != (entry.version, entry.size, entry.key):
                    return False
                node = self._nodes.get(ino)
                if node is not None:  # it was renamed: its object stands under another key
                    self._land_renamed(node, number)
                else:
                    self._land_clean(now, number, truncate=truncate)
                return True
            return False

    def _land_renamed(self, node: Node, number: int) -> None:
        op = self._ops[self._puts[node.ino]]
        with self._changing("land") as batch:
            batch.put_node(node._replace(landing=number, origin=None, generation=node.generation + 1))
            batch.update_op(op._replace(landing=number, origin=None, id=_next_id(op.id)))
            batch.then(lambda: self._edit(op))

    def _land_clean(self, entry: Entry, number: int, *, truncate: bool) -> None:
        ino = entry.ino
        with self._index.changing() as changing:
            generation = changing.renew(ino)
        kept = self.attributes(entry)._replace(mtime_ns=None)
        with self._changing("land") as batch:
            node = Node(
                ino, entry.parent, entry.name, entry.kind, entry.mount, entry.key, generation, number,
                attributes=kept,
            )  # fmt: skip
            batch.put_node(node)
            self._owe_put(batch, node, entry.version, due=False)
        if not truncate:
            st = self._landing.stat(number)
            self._unchanged[ino] = (st.st_size, st.st_ctime_ns)

    def open(self, ino: int, *, writing: bool) -> LandedFile:
        """Open the landing file of a landed path, until `closed`. Raises VersionChanged where it has none
        (any more): look it up again."""
        with self._lock:
            node = self._nodes.get(ino)
            if node is None or not node.landing:
                raise VersionChanged("it was uploaded in this moment")
            file = self._landing.open(node.landing, writing=False)
            try:
                if writing:
                    if ino in self._granted:
                        self._granted.discard(ino)
                    else:
                        self._begin_writing(node)  # before it is opened so: an upload holds a lease
                    readable, file = file, self._landing.open(node.landing, writing=True)
                    readable.close()
            except BaseException:
                file.close()
                raise
            self._users[ino] += 1
            if writing:
                self._writing[ino] += 1
            return file

    def closed(self, ino: int, file: LandedFile) -> None:
        """It is not used any more. The last writer's close makes the file due for upload."""
        file.close()
        with self._lock:
            self._users[ino] -= 1
            if not self._users[ino]:
                del self._users[ino]
            if file.writing:
                self._writing[ino] -= 1
                if not self._writing[ino]:
                    del self._writing[ino]
                self._end_writing(ino)
            self._sweep(ino)
        if file.writing:
            self._uploads.poke()

    def released(self, ino: int) -> None:
        """A writer that an earlier daemon counted has closed the file."""
        with self._lock:
            node = self._nodes.get(ino)
            ours = self._writing[ino] + (ino in self._granted)
            if node is not None and node.writers > ours:
                self._end_writing(ino)
                self._sweep(ino)
        self._uploads.poke()

    def truncate(self, ino: int, size: int) -> None:
        """Cut, or extend by a hole, a landed file. Raises LandingFull, LandingBroken, VersionChanged."""
        with self._written(ino) as node:
            self._landing.truncate(node.landing, size)

    def allocate(self, ino: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2) of a landed file. Raises OSError of what the file system refuses."""
        with self._written(ino) as node:
            file = self._landing.open(node.landing, writing=True)
            try:
                allocate(file.descriptor, mode, offset, length)
            finally:
                file.close()

    def sync(self, ino: int) -> None:
        """Return when its bytes and its name are on the disk."""
        node = self._nodes.get(ino)
        if node is not None and node.landing:
            try:
                self._landing.sync(node.landing)
            except LandingBroken:
                if self._nodes.get(ino) is node:
                    raise
                # It was uploaded in this moment: the bucket has it.
        self._sync_journal()

    def sync_names(self) -> None:
        """Return when all changes of names so far are on the disk."""
        self._sync_journal()

    def _sync_journal(self) -> None:
        """Make the journal durable, and then remove the files that it does not name any more: a power cut
        must not bring back a name whose bytes are gone."""
        with self._lock:
            some, self._dispensable = self._dispensable, set()
        try:
            self._journal.sync()
        except BaseException:
            with self._lock:
                self._dispensable |= some
            raise
        with self._lock:
            for landing in some:
                if not self._named[landing]:
                    del self._named[landing]
                    self._landing.discard(landing)

    @contextmanager
    def _written(self, ino: int) -> Iterator[Node]:
        """Write to a file without having it open."""
        with self._lock:
            node = self._nodes.get(ino)
            if node is None or not node.landing:
                raise VersionChanged("it was uploaded in this moment")
            self._begin_writing(node)
        try:
            yield node
        finally:
            with self._lock:
                self._end_writing(ino)
            self._uploads.poke()

    def _begin_writing(self, node: Node) -> None:
        """Somebody will write: no upload may read it, and what was sent is another content."""
        op = self._ops.get(self._puts.get(node.ino, 0))
        with self._changing("open") as batch:
            batch.put_node(node._replace(writers=node.writers + 1))
            if op is not None and op.since and not node.writers:
                batch.update_op(op._replace(id=_next_id(op.id), resume=""))
                batch.then(lambda: self._edit(op))

    def _edit(self, op: Op) -> None:
        """Who reads the bytes of an operation stops, and what it brings about is not the end of it."""
        if op.seq in self._running:
            content = self._running[op.seq]
            if content is not None:
                content.stop()
            self._uploads.stop_op(op.seq)
        if op.resume:
            self._uploads.forget(op)

    def _end_writing(self, ino: int) -> None:
        node = self._nodes.get(ino)
        if node is None or not node.writers:
            return
        new = node._replace(writers=node.writers - 1)
        op = self._ops.get(self._puts.get(ino, 0))
        last = not new.writers and not new.orphan
        if last and op is not None and not op.since and self._is_unchanged(new):
            self._take_off(new, op)
            return
        with self._changing("close") as batch:
            batch.put_node(new)
            if last and op is not None and not op.since:
                batch.drop_op(op)
                batch.add_op(op._replace(seq=0, since=self._clock.wall()))

    def _is_unchanged(self, node: Node) -> bool:
        before = self._unchanged.pop(node.ino, None)
        if before is None or self._users[node.ino]:
            return False
        st = self._landing.stat(node.landing)
        return before == (st.st_size, st.st_ctime_ns)

    def _take_off(self, node: Node, op: Op) -> None:
        """Nothing was written: it is the clean file that it was before it was opened."""
        with self._changing("unchanged") as batch:
            batch.drop_op(op)
            batch.drop_node(node)
            if node.attributes != _DEFAULT and isinstance(op.expected, Version):
                token = op.expected.token
                batch.keep_attributes(node.mount, node.key, token, node.kind, node.attributes)

    def _sweep(self, ino: int) -> None:
        """Remove what was unlinked while it was open, when nobody has it open any more."""
        node = self._nodes.get(ino)
        if node is not None and node.orphan and not self._users[ino] and not node.writers:
            with self._changing("sweep") as batch:
                batch.drop_node(node)

    # ---- what the uploader asks ----------------------------------------------------------------------

    def ops(self) -> Sequence[Op]:
        """All that is pending, in order."""
        with self._lock:
            return list(self._ops.values())

    def op(self, seq: int) -> Op | None:
        """One of them, as it is now."""
        return self._ops.get(seq)

    def begin(self, op: Op) -> Op | None:
        """An operation is about to be done: as it is now; None where that is not to be."""
        with self._lock:
            now = self._ops.get(op.seq)
            if now is None or not now.since or now.seq in self._running or now.seq in self._parked:
                return None
            self._running[now.seq] = None
            self._tried.add(now.seq)
            return now

    def content(self, op: Op) -> Quiet | None:
        """The bytes of a PUT, which nobody can write to; None where somebody can, now."""
        with self._lock:
            node = self._nodes.get(op.ino)
            if node is not None and node.writers and node.landing == op.landing:
                return None
            quiet = self._landing.quiet(op.landing)
            if quiet is not None and op.seq in self._running:
                self._running[op.seq] = quiet
            return quiet

    def fetch(self, op: Op) -> Quiet:
        """The bytes of a PUT whose object stands under another key, in a landing file of its own."""
        assert op.origin is not None
        number = self._landing.create()
        try:
            info = op.origin
            entry = Entry(0, 0, b"", Kind.FILE, info.size, info.mtime_ns, op.mount, info.key, info.version)
            if entry.size:
                self._fill(number, entry)
            quiet = self._landing.quiet(number)
            assert quiet is not None, "nobody else knows it"
            return quiet
        finally:
            self._landing.discard(number)

    def metadata(self, op: Op) -> Mapping[str, str]:
        """What is sent beside the bytes; named as rclone and s3fs name it."""
        node = self._nodes.get(op.ino)
        if node is None:
            return {}
        with suppress(NoSuchPath, LandingBroken):
            return _sent(self._entry_of(node), node.attributes)
        return {}

    def remember(self, op: Op, resume: str) -> Op:
        """Keep what a sink needs to go on after a restart; durable."""
        with self._lock:
            now = self._ops.get(op.seq)
            if now is None or now.id != op.id:
                return op  # written again: nobody will go on with it
            changed = now._replace(resume=resume)
            with self._changing("remember") as batch:
                batch.update_op(changed)
        self._journal.sync()
        return changed

    def settled(self, op: Op, stored: Stored | None, content: Quiet | None) -> None:
        """The bucket holds it, or has it no more (`stored` is None)."""
        if stored is not None and content is not None and content.size and not content.stopped:
            self._adopt(op, stored, content)
        with self._lock:
            now = self._ended(op)
            if now is None:
                return
            there: Expected = NOTHING if stored is None else stored.info.version
            if now.kind is OpKind.DELETE:
                self._deleted(now, there)
            elif now.id != op.id and now.ino:
                with self._changing("again") as batch:  # it was written again meanwhile, and is still owed
                    batch.update_op(now._replace(expected=there, resume=""))
            elif self._puts.get(now.ino) == now.seq:
                assert stored is not None
                self._put(now, stored)
            else:
                with self._changing("detached") as batch:
                    self._done(batch, now, there)
        self._uploads.poke()

    def stopped(self, op: Op) -> None:
        """It was given up, or failed; it stays pending, unless nobody needs it any more."""
        with self._lock:
            now = self._ended(op)
            if now is not None and now.kind is OpKind.PUT and not now.ino:
                with self._changing("stopped") as batch:
                    self._done(batch, now, now.expected)
                self._uploads.forget(op)
        self._uploads.poke()

    def conflict(self, op: Op, found: Stored | None) -> None:
        """The bucket holds what neither we nor it should have put there."""
        with self._lock:
            now = self._ended(op)
            if now is None:
                return
            self._conflicts += 1
            there: Expected = NOTHING if found is None else found.info.version
            where = f"{now.key!r}: somebody else has {'removed' if found is None else 'changed'} the object"
            if now.kind is OpKind.DELETE:
                _log.warning("%s, so it is not deleted", where)
                self._undelete(now, found)
            elif not now.ino:
                # Nobody wants it any more, so theirs is not touched; what follows it meets theirs, too.
                with self._changing("unwanted") as batch:
                    self._done(batch, now, now.expected)
                self._uploads.forget(now)
            elif found is None or self._policy is Conflict.OVERWRITE:
                _log.warning("%s meanwhile; ours takes its place", where)
                with self._changing("overwrite") as batch:
                    batch.update_op(now._replace(expected=there, id=_next_id(now.id), resume=""))
            elif self._policy is Conflict.FAIL:
                self._parked[now.seq] = f"{where} meanwhile (conflict: fail); it is not uploaded"
                _log.warning("%s meanwhile; ours is not uploaded (conflict: fail)", where)
            else:
                self._set_beside(now, found)
        self._uploads.poke()

    def parked(self) -> Mapping[int, str]:
        """Operations that wait for a person, and why."""
        return dict(self._parked)

    def dirty(self) -> Dirty:
        """What is not in the bucket yet."""
        with self._lock:
            nodes = [n for n in self._nodes.values() if n.kind is not Kind.DIRECTORY and not n.orphan]
            due = [op.since for op in self._ops.values() if op.since]
            size = 0
            for node in nodes:
                with suppress(LandingBroken):
                    size += self._landing.stat(node.landing).st_size if node.landing else 0
            writing = sum(node.writers > 0 for node in nodes)
            return Dirty(len(nodes), size, writing, len(due), min(due, default=0.0), self._conflicts)

    def _ended(self, op: Op) -> Op | None:
        """An operation is not under way any more; as it is now."""
        self._running.pop(op.seq, None)
        return self._ops.get(op.seq)

    def _adopt(self, op: Op, stored: Stored, content: Quiet) -> None:
        node, info = self._nodes.get(op.ino), stored.info
        if node is not None and node.kind is Kind.FILE:
            entry = Entry(
                op.ino, node.parent, node.name, Kind.FILE, info.size, info.mtime_ns, op.mount, op.key,
                info.version,
            )  # fmt: skip
            self._keep(entry, content)

    def _put(self, op: Op, stored: Stored) -> None:
        """The bucket holds what a node is: it is clean from now on."""
        node = self._nodes[op.ino]
        kept, token = node.attributes, stored.info.version.token
        directory = node.kind is Kind.DIRECTORY
        if directory:
            token = ""
        elif node.landing and node.kind is Kind.FILE:
            kept = kept._replace(mtime_ns=self._landing.stat(node.landing).st_mtime_ns)
        with self._catalogue((node.parent, node.name)) as changing:
            self._rowless.discard(node.parent)
            row = Kind.DIRECTORY if directory else Kind.FILE
            changing.settle(
                node.ino, node.parent, node.name, int(row), op.mount, names.to_bytes(op.key),
                None if directory else stored.info,
            )  # fmt: skip
        step("overlay.settled")
        with self._changing("settle") as batch:
            self._done(batch, op, stored.info.version)
            batch.drop_node(node)
            if kept != _DEFAULT:
                batch.keep_attributes(op.mount, op.key, token, node.kind, kept)
            else:
                batch.drop_attributes(op.mount, op.key)

    def _deleted(self, op: Op, there: Expected) -> None:
        at = self._hidden_as(op.mount, op.key)
        if at is not None:
            with self._catalogue(at) as changing:
                changing.vanish(at[0], names.to_bytes(op.key))
        with self._changing("deleted") as batch:
            self._done(batch, op, there)
            if at is not None and not self._later_delete(op):
                batch.show(op.mount, op.key)
            batch.drop_attributes(op.mount, op.key)

    def _undelete(self, op: Op, found: Stored | None) -> None:
        """The object that was to be deleted is another one by now: it stays, and is shown again."""
        at = self._hidden_as(op.mount, op.key)
        if at is not None and found is not None and at[1] not in self._names.get(at[0], {}):
            self._show_theirs(at, op, found)
        with self._changing("undelete") as batch:
            self._done(batch, op, NOTHING if found is None else found.info.version)
            batch.show(op.mount, op.key)

    def _show_theirs(self, at: tuple[int, bytes], op: Op, found: Stored) -> None:
        key = names.to_bytes(op.key)
        with self._catalogue(at) as changing:
            ino, _ = changing.claim(*at, int(Kind.FILE), op.mount, key)
            changing.settle(ino, *at, int(Kind.FILE), op.mount, key, found.info)

    def _later_delete(self, op: Op) -> bool:
        later = (self._ops[seq] for seq in self._by_key.get((op.mount, op.key), ()) if seq > op.seq)
        return any(one.kind is OpKind.DELETE for one in later)

    def _done(self, batch: "_Batch", op: Op, there: Expected) -> None:
        """Drop an operation, and tell the next one on its key what it left there."""
        batch.drop_op(op)
        for seq in self._by_key.get((op.mount, op.key), ()):
            later = self._ops[seq]
            if seq > op.seq and (later.mount, later.key) == (op.mount, op.key):
                if later.expected != ANYTHING:
                    batch.update_op(later._replace(expected=there))
                break

    def _set_beside(self, op: Op, found: Stored) -> None:
        """Our version goes under a name of its own, beside the one that somebody else wrote."""
        node = self._nodes[op.ino]
        parts = (names.to_text(node.name), "conflict", self._host, op.lineage[:8])
        name = names.to_bytes(".".join(part for part in parts if part))
        mount, key = self._key(node.parent, name, node.kind)
        new = node._replace(name=name, key=key)
        with self._changing("conflict") as batch:
            batch.drop_op(op)
            batch.put_node(new)
            self._owe_put(batch, new, NOTHING, due=op.since > 0)
        with self._catalogue((node.parent, node.name), (new.parent, new.name)) as changing:
            changing.place(new.ino, new.parent, new.name, mount, names.to_bytes(key))
        self._show_theirs((node.parent, node.name), op, found)
        _log.warning(
            "%r was changed in the bucket meanwhile: that version keeps the name, ours is %r", op.key, key
        )

    # ---- names, inside ----------------------------------------------------------------------------

    def _ours(self, parent: int, name: bytes) -> Entry | None:
        """A name as the overlay knows it; None where the index is to be asked. Raises NoSuchPath."""
        ino = self._names.get(parent, {}).get(name)
        node = self._nodes.get(ino) if ino is not None else None
        if node is not None:
            return self._entry_of(node)
        above = self._nodes.get(parent)
        if above is None:
            return None
        if above.kind is not Kind.DIRECTORY:
            raise NotADirectory(f"{self.path(parent)} is a file")
        found = None if parent in self._rowless else self._index.known_child(parent, name)
        if found is None:
            raise NoSuchPath(f"no such path: {names.to_text(name)}")
        return self._shown(found)

    def _shown(self, entry: Entry) -> Entry:
        """What the index says of a name. Raises NoSuchPath where we know better."""
        if entry.key in self._hidden.get(entry.parent, ()):
            raise NoSuchPath(f"no such path: {names.to_text(entry.name)}")
        return self._dressed(entry)

    def _known(self, parent: int, name: bytes) -> Entry | None:
        """A name, as far as it is known: no store is asked."""
        try:
            found = self._ours(parent, name)
            if found is None:
                known = self._index.known_child(parent, name)
                return None if known is None else self._shown(known)
        except NoSuchPath:
            return None
        return found

    def _there(self, parent: int, name: bytes) -> Entry:
        found = self._known(parent, name)
        if found is None:
            raise NoSuchPath(f"no such path: {names.to_text(name)}")
        return found

    def _known_children(self, parent: int) -> list[Entry]:
        ours, hidden = self._names.get(parent, {}), self._hidden.get(parent, ())
        found = [self._entry_of(self._nodes[ino]) for ino in ours.values()]
        after = 0
        while page := self._index.known_children(parent, after=after, limit=_PAGE):
            found += [self._dressed(e) for e in page if e.name not in ours and e.key not in hidden]
            after = page[-1].ino
        return found

    def _look(self, parent: int, name: bytes) -> None:
        """Have what the store says of a name known, where that is to be asked."""
        if parent in self._rowless:
            return
        with suppress(NoSuchPath):
            self.lookup(parent, name)

    def _list_below(self, top: Entry) -> None:
        where = self.path(top.ino)
        for count, _ in enumerate(self.walk(where), 1):
            if count > RENAMED_MAX:
                raise OtherStore(f"{where} holds more than {RENAMED_MAX} files: copy it, and delete it then")

    def _writable(self, parent: int) -> Entry:
        directory = self.entry(parent)
        if directory.kind is not Kind.DIRECTORY:
            raise NotADirectory(f"{self.path(parent)} is a file")
        if directory.mount == NO_MOUNT:
            raise NotHere(f"{self.path(parent)} lies above the mount points of the data set")
        return directory

    def _key(self, parent: int, name: bytes, kind: Kind) -> tuple[int, str]:
        """Mount point and key of a name. Raises NotHere, NotADirectory."""
        directory = self._writable(parent)
        segment = names.original(name)
        if segment is None or names.shown(segment) != name or not (self._any_bytes or _is_text(segment)):
            raise NotHere(f"no object can be shown as {names.to_text(name)!r} (docs/names.md)")
        key = self._own_key(directory) + segment + "/" * (kind is Kind.DIRECTORY)
        if len(names.to_bytes(key)) > KEY_MAX:
            raise NotHere(f"the key of {names.to_text(name)!r} would be longer than {KEY_MAX} bytes")
        return directory.mount, key

    def _free(self, parent: int, name: bytes, kind: Kind) -> tuple[int, str]:
        found = self._key(parent, name, kind)
        there = self._known(parent, name)
        if there is not None:
            raise PathExists(self.path(there.ino))
        return found

    def _own_key(self, entry: Entry) -> str:
        """The key under which a path is owed, or is; that of its bytes may be another."""
        node = self._nodes.get(entry.ino)
        return entry.key if node is None else node.key

    def _number(self) -> int:
        """An `ino` for what is new. The catalogue has a row for it when the bucket has it."""
        number = next(self._numbers, None)
        if number is None:
            with self._index.changing() as changing:
                self._numbers = iter(changing.reserve(RESERVED))
            number = next(self._numbers)
        return number

    def _node_of(self, entry: Entry) -> Node:
        """The node of a path; of a clean one, as it is when it is renamed."""
        node = self._nodes.get(entry.ino)
        if node is not None:
            return node
        origin = None
        if entry.kind is not Kind.DIRECTORY:
            stored = self._index.entry(entry.ino)  # undressed: what the store has
            origin = ObjectInfo(stored.key, stored.size, stored.version, stored.mtime_ns)
        return Node(
            entry.ino, entry.parent, entry.name, entry.kind, entry.mount, entry.key, entry.generation,
            origin=origin, attributes=self.attributes(entry),
        )  # fmt: skip

    def _entry_of(self, node: Node) -> Entry:
        """A node as an index shows it. Raises NoSuchPath, LandingBroken."""
        kept, size, mtime_ns, key, version = node.attributes, 0, 0, node.key, Version()
        if node.kind is Kind.SYMLINK and kept.target is not None:
            size = len(kept.target)
        elif node.landing:
            try:
                st = self._landing.stat(node.landing)
            except LandingBroken:
                # Either it was uploaded in this moment, or the zone fails.
                if self._nodes.get(node.ino) is node:
                    raise
                return self.entry(node.ino)
            size, mtime_ns, version = st.st_size, st.st_mtime_ns, Version(stamp=f"landing-{node.landing}")
        if node.origin is not None and not node.landing:
            key, origin_size, version, mtime_ns = node.origin[:4]
            size = size or origin_size
        if kept.mtime_ns is not None and not (node.landing and node.kind is Kind.FILE):
            mtime_ns = kept.mtime_ns
        return Entry(
            node.ino, node.parent, node.name, node.kind, size, mtime_ns, node.mount, key, version,
            generation=node.generation,
        )  # fmt: skip

    def _dressed(self, entry: Entry) -> Entry:
        """A clean path as it is shown here: with what is kept of it beside its bytes."""
        if not self._kept_attributes or entry.mount < 0:
            return entry
        found = self._clean_attributes(entry.mount, entry.key)
        if found is None or found[0] != _token(entry):
            return entry
        _, kind, kept = found
        if kind is Kind.SYMLINK and kept.target is not None:
            entry = entry._replace(kind=Kind.SYMLINK, size=len(kept.target))
        return entry if kept.mtime_ns is None else entry._replace(mtime_ns=kept.mtime_ns)

    def _clean_attributes(self, mount: int, key: str) -> "Kept | None":
        if not self._kept_attributes:
            return None
        with self._attributes_lock:
            if (mount, key) in self._attributes:
                return self._attributes[mount, key]
        found = self._journal.attributes(mount, key)
        with self._attributes_lock:
            return self._attributes.setdefault((mount, key), found)

    def _keep_in_mind(self, mount: int, key: str, kept: "Kept | None") -> None:
        self._kept_attributes = self._kept_attributes or kept is not None
        with self._attributes_lock:
            self._attributes[mount, key] = kept

    def _hidden_as(self, mount: int, key: str) -> tuple[int, bytes] | None:
        """Where a key is hidden."""
        return self._hidden_at.get((mount, key))

    def _now_ns(self) -> int:
        return int(self._clock.wall() * 1e9)

    @contextmanager
    def _one_lander(self, ino: int) -> Iterator[None]:
        """One at a time brings the bytes of a file; the others find them."""
        with self._lock:
            held = self._landers.setdefault(ino, [threading.Lock(), 0])
            held[1] += 1
        try:
            with held[0]:
                yield
        finally:
            with self._lock:
                held[1] -= 1
                if not held[1]:
                    del self._landers[ino]

    # ---- transactions -----------------------------------------------------------------------------

    @contextmanager
    def _changing(self, what: str) -> Iterator["_Batch"]:
        """One transaction of the journal; memory follows when it is committed."""
        with self._journal.change(what) as change:
            batch = _Batch(self, change)
            yield batch
        for effect in (*batch.effects, *batch.last):
            effect()
        if len(self._dispensable) >= DISPENSABLE:
            self._sync_journal()

    @contextmanager
    def _catalogue(self, *ours: tuple[int, bytes]) -> Iterator[Changing]:
        """Let the catalogue follow what was decided. Where it cannot, it does at the next start."""
        try:
            with self._index.changing(*ours) as changing:
                yield changing
        except IndexBroken as error:
            _log.warning("%s: names that were changed follow when the mount is started again", error)

    # ---- start ------------------------------------------------------------------------------------

    def _go_on(self, leases_tell: bool) -> None:
        """An earlier daemon of this mount died: numbers are good, and the kernel uses them."""
        for hidden in self._journal.hidden():
            self._set_hidden(hidden)
        for op in self._journal.ops():
            self._set_op(op)
        nodes = self._journal.nodes()
        with self._index.changing() as changing:
            for (_, key), (parent, _) in self._hidden_at.items():
                changing.vanish(parent, names.to_bytes(key))
            for node in nodes:
                self._set_node(node)
                if node.orphan:
                    changing.bury(node.ino)
                else:
                    own = names.to_bytes(node.key)
                    changing.place(node.ino, node.parent, node.name, node.mount, own)
        if leases_tell:
            with self._changing("resume") as batch:
                for node in nodes:
                    if node.writers:
                        batch.put_node(node._replace(writers=0))
                for op in self._ops.values():
                    if not op.since:
                        batch.update_op(op._replace(since=self._clock.wall()))

    def _begin_anew(self) -> None:
        """A fresh mount: nobody has anything open, and numbers mean nothing. What was not closed is due as
        it is: all of it that was synced is there."""
        hidden, ops = self._journal.hidden(), self._journal.ops()
        nodes = sorted(
            self._journal.nodes(), key=lambda node: node.key.count("/") - (node.kind is Kind.DIRECTORY)
        )
        known: dict[tuple[int, str], int] = {}
        numbers: dict[int, int] = {}
        with self._index.changing() as changing:

            def place(mount: int, key: str) -> tuple[int, bytes]:
                """Directory and name of a key."""
                *above, last = key.removesuffix("/").split("/")
                at, path = self._roots[mount], ""
                for segment in above:
                    path += segment + "/"
                    ino = known.get((mount, path))
                    if ino is None:
                        ino = changing.adopt(at, names.shown(segment), mount, names.to_bytes(path))
                        known[mount, path] = ino
                    at = ino
                return at, names.shown(last)

            there = set(self._landing.files())
            for node in nodes:
                if node.orphan:
                    continue
                if node.landing and node.landing not in there:
                    _log.info("%r was never synced before the power went: it is as it was before", node.key)
                    continue
                at, name = place(node.mount, node.key)
                row = int(Kind.DIRECTORY if node.kind is Kind.DIRECTORY else Kind.FILE)
                ino, generation = changing.claim(at, name, row, node.mount, names.to_bytes(node.key))
                known[node.mount, node.key] = numbers[node.ino] = ino
                self._set_node(node._replace(ino=ino, parent=at, name=name, generation=generation, writers=0))
            for one in hidden:
                at, name = place(one.mount, one.key)
                self._set_hidden(one._replace(parent=at, name=name))
                changing.vanish(at, names.to_bytes(one.key))
        with self._journal.change("anew") as change:
            change.clear_nodes()
            change.clear_hidden()
            for node in self._nodes.values():
                change.put_node(node)
            for (mount, key), (at, name) in self._hidden_at.items():
                change.hide(Hidden(at, name, mount, key))
            for op in ops:
                ino = numbers.get(op.ino, 0)
                if op.kind is OpKind.PUT and (
                    (not ino and op.ino) or (op.landing and op.landing not in there)
                ):
                    change.drop_op(op.seq)  # of what was unlinked, or is not there
                    continue
                new = op._replace(ino=ino, since=op.since or self._clock.wall())
                change.update_op(new)
                self._set_op(new)
            change.set_meta("index", self._index.identity)

    def _clean_up(self) -> None:
        """Remove landing files that nobody names: what was begun, and never acknowledged."""
        named = {node.landing for node in self._nodes.values()} | {op.landing for op in self._ops.values()}
        self._landing.reserve_numbers(iter(named))
        for number in self._landing.files():
            if number not in named:
                self._landing.discard(number)

    # ---- memory -----------------------------------------------------------------------------------

    def _set_node(self, node: Node) -> None:
        before = self._nodes.get(node.ino)
        self._nodes[node.ino] = node
        self._named[node.landing] += 1
        if before is not None:
            self._named[before.landing] -= 1
        if not node.orphan:
            self._names.setdefault(node.parent, {})[node.name] = node.ino
        if before is not None and (before.orphan, before.parent, before.name) != (
            node.orphan, node.parent, node.name,
        ):  # fmt: skip
            self._unname(before)

    def _unname(self, node: Node) -> None:
        called = self._names.get(node.parent)
        if called is not None and called.get(node.name) == node.ino:
            del called[node.name]
            if not called:
                del self._names[node.parent]

    def _unset_node(self, node: Node) -> None:
        before = self._nodes.pop(node.ino, None)
        if before is not None:
            self._unname(before)
            self._named[before.landing] -= 1
        self._granted.discard(node.ino)
        self._rowless.discard(node.ino)
        self._unchanged.pop(node.ino, None)

    def _set_op(self, op: Op) -> None:
        before = self._ops.get(op.seq)
        if before is not None:
            self._unlist(before)
        self._ops[op.seq] = op  # in its place, where it had one
        self._named[op.landing] += 1
        for key in dict.fromkeys(op.keys):
            there = self._by_key.setdefault(key, [])
            there.append(op.seq)
            there.sort()
        if op.kind is OpKind.PUT and op.ino:
            self._puts[op.ino] = op.seq
        elif op.ino:
            self._deletes.setdefault(op.ino, set()).add(op.seq)

    def _unset_op(self, op: Op) -> None:
        before = self._ops.pop(op.seq, None)
        self._tried.discard(op.seq)
        if before is not None:
            self._unlist(before)
            self._parked.pop(op.seq, None)

    def _unlist(self, op: Op) -> None:
        self._named[op.landing] -= 1
        for key in dict.fromkeys(op.keys):
            there = self._by_key[key]
            there.remove(op.seq)
            if not there:
                del self._by_key[key]
        if op.kind is OpKind.PUT:
            if self._puts.get(op.ino) == op.seq:
                del self._puts[op.ino]
        elif op.ino:
            self._deletes[op.ino].discard(op.seq)
            if not self._deletes[op.ino]:
                del self._deletes[op.ino]

    def _set_hidden(self, hidden: Hidden) -> None:
        self._index.hold(hidden.parent, names.to_bytes(hidden.key))
        self._hidden.setdefault(hidden.parent, set()).add(hidden.key)
        self._hidden_at[hidden.mount, hidden.key] = (hidden.parent, hidden.name)

    def _unset_hidden(self, mount: int, key: str) -> None:
        at = self._hidden_at.pop((mount, key), None)
        if at is not None:
            self._index.let_go(at[0], names.to_bytes(key))
            self._hidden[at[0]].discard(key)
            if not self._hidden[at[0]]:
                del self._hidden[at[0]]


class _Batch:
    """A transaction of the journal, and what memory makes of it when it is committed."""

    def __init__(self, overlay: Overlay, change: Change) -> None:
        self._overlay, self._change = overlay, change
        self.effects: list[Callable[[], object]] = []
        self.last: list[Callable[[], object]] = []
        """What takes names away: who looks them up meanwhile sees both, never neither."""

    def then(self, effect: Callable[[], object]) -> None:
        """Do it when this is committed."""
        self.effects.append(effect)

    def put_node(self, node: Node) -> None:
        self._change.put_node(node)
        self.then(lambda: self._overlay._set_node(node))

    def drop_node(self, node: Node) -> None:
        self._change.drop_node(node.ino)
        self.last.append(lambda: self._overlay._unset_node(node))
        self._discard(node.landing)

    def add_op(self, op: Op) -> None:
        added = self._change.add_op(op)
        self.then(lambda: self._overlay._set_op(added))

    def update_op(self, op: Op) -> None:
        self._change.update_op(op)
        self.then(lambda: self._overlay._set_op(op))

    def drop_op(self, op: Op) -> None:
        self._change.drop_op(op.seq)
        self.then(lambda: self._overlay._unset_op(op))
        self._discard(op.landing)

    def hide(self, hidden: Hidden) -> None:
        self._change.hide(hidden)
        self.then(lambda: self._overlay._set_hidden(hidden))

    def show(self, mount: int, key: str) -> None:
        self._change.show(mount, key)
        self.last.append(lambda: self._overlay._unset_hidden(mount, key))

    def keep_attributes(self, mount: int, key: str, token: str, kind: Kind, kept: Attributes) -> None:
        self._change.keep_attributes(mount, key, token, kind, kept)
        self.then(lambda: self._overlay._keep_in_mind(mount, key, (token, kind, kept)))

    def drop_attributes(self, mount: int, key: str) -> None:
        self._change.drop_attributes(mount, key)
        self.then(lambda: self._overlay._keep_in_mind(mount, key, None))

    def _discard(self, landing: int) -> None:
        """Remove a landing file that nobody names any more, in the end."""
        if landing:
            self._overlay._dispensable.add(landing)


def _is_text(segment: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in segment)


def _token(entry: Entry) -> str:
    """Which version of a path its kept attributes are of: of a directory, there is but one."""
    return "" if entry.kind is Kind.DIRECTORY else entry.version.token


def _with_xattrs(kept: Attributes, xattrs: Mapping[bytes, bytes]) -> Attributes:
    return kept._replace(xattrs=xattrs)


def _sent(entry: Entry, kept: Attributes) -> dict[str, str]:
    sent = {"mtime": f"{entry.mtime_ns // 10**9}.{entry.mtime_ns % 10**9:09}"}
    if kept.mode is not None:
        sent["mode"] = str(_S_IF[entry.kind] | kept.mode)
    if kept.uid is not None:
        sent["uid"] = str(kept.uid)
    if kept.gid is not None:
        sent["gid"] = str(kept.gid)
    if kept.xattrs and sum(len(k) + len(v) for k, v in kept.xattrs.items()) <= SENT_XATTRS // 2:
        sent["xattrs"] = ",".join(f"{k.hex()}:{v.hex()}" for k, v in sorted(kept.xattrs.items()))
    return sent


def _new_id() -> str:
    return f"{uuid.uuid4().hex}.0"


def _next_id(id: str) -> str:
    """Of another content of the same operation."""
    lineage, _, count = id.partition(".")
    return f"{lineage}.{int(count) + 1}"
