"""
The index of a writable data set: what was written here, on top of what the bucket holds.

It knows *nodes*, paths that are not (yet) as the bucket is known to hold them, and *hidden* names,
which the bucket still shows (`ledger`). Whatever it neither knows nor hides is the live index's. Each
change adds to what the bucket is owed (`owing`); `settling` hears when that was paid.

A change is made in this order: a number is claimed in the catalogue of names, where one is needed;
the journal is committed, and from then on it is so; what is in memory follows, and the catalogue.
Killed in between, `resuming` lets the catalogue follow what the journal says.

Locks: the ledger's, for changes; it is held over transactions, never over a request to a store.
"""

import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from datacache.cache.tier import Block
from datacache.clock import Clock
from datacache.errors import (
    IsADirectory,
    LandingBroken,
    LandingError,
    LandingFull,
    NoSuchPath,
    NotADirectory,
    NotEmpty,
    NotHere,
    OtherStore,
    PathExists,
    TooManyAttributes,
    VersionChanged,
)
from datacache.index import names, walking
from datacache.index.database import NO_MOUNT
from datacache.index.index import ROOT, IndexStats
from datacache.index.live import LiveIndex
from datacache.model import Entry, Kind, ObjectInfo, Version
from datacache.writing import resuming
from datacache.writing.awaited import Awaited
from datacache.writing.closing import Closes
from datacache.writing.copies import Copies
from datacache.writing.journal import (
    ANYTHING,
    NOTHING,
    Attributes,
    Hidden,
    Journal,
    Node,
    Op,
    OpKind,
)
from datacache.writing.landing import LandedFile, Landing, Room, allocate, look_of
from datacache.writing.ledger import Batch, Ledger, Unchanged, is_hollow, take_off
from datacache.writing.owing import Expected, Owing, next_id

_log = logging.getLogger(__name__)

LANDED_FIRST = 3
"""Times that files are landed before a rename, where others give their objects away meanwhile."""
OURS_FRESH = 10.0
"""Seconds for which names in a directory that the bucket does not have yet may be believed: it soon has."""
RESERVED = 1000
"""Numbers of paths that are taken from the catalogue at once: each time is a transaction of it."""
RENAMED_MAX = 100_000
"""Files below a directory that is renamed at most; beyond, it is EXDEV, on which `mv` copies and deletes."""
XATTRS_MAX = 64 * 1024
"""Bytes of the extended attributes of one path."""
_PAGE = 1000
_DEFAULT = Attributes()


class Overlay:
    """Implements `index.Index`; see the module. Thread-safe."""

    def __init__(
        self,
        index: LiveIndex,
        journal: Journal,
        landing: Landing,
        *,
        clock: Clock,
        copies: Copies,
        roots: Sequence[int],
        accepts: Callable[[int, str], bool],
        resumed: bool = False,
        leases_tell: bool = False,
        boot: str = "",
    ) -> None:
        """`accepts`: whether the store of a mount point can have such a key.

        `roots`: the `ino` of each mount point, in order.
        `resumed`: an earlier daemon served this mount, so numbers in the journal are in use. `leases_tell`:
        all writers are the kernel's own (passthrough), so leases tell of those that an earlier daemon had.
        `boot`: which boot of the machine it is."""
        self._index, self._landing, self._clock = index, landing, clock
        self.copies, self._roots, self._accepts = copies, tuple(roots), accepts
        self.ledger = Ledger(journal, landing, index)
        self.owing = Owing(self.ledger, clock, accepts=accepts)
        self._lock = self.ledger.lock
        # Changed under the lock.
        self._numbers: Iterator[int] = iter(())  # reserved in the catalogue
        self.closes = Closes(clock)
        self.awaited = Awaited(clock, self._not_come)
        self._leases_tell = leases_tell
        self._users: Counter[int] = Counter()  # opens of landed files
        self._writing: Counter[int] = Counter()  # ... of them, those for writing
        # By file: a lock for who brings its bytes, and how many want it.
        self._landers: dict[int, list[Any]] = {}
        if resumed and journal.meta().get("index") == index.identity:
            resuming.go_on(self.ledger, index, clock, leases_tell=leases_tell)
        else:
            resuming.begin_anew(self.ledger, index, clock, self._roots, boot=boot)
        self.ledger.tried.update(self.ledger.ops)  # an earlier process may have
        copies.make_own(landing, self.ledger.clean_up())

    def __repr__(self) -> str:
        return f"<Overlay {len(self.ledger.nodes)} nodes, {len(self.ledger.ops)} operations>"

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
        node = self.ledger.nodes.get(ino)
        if node is None:
            return self._dressed(self._index.entry(ino, generation))
        if generation is None or generation == node.generation:
            return self._entry_of(node)
        former = self._index.version(ino, generation)
        if former is None:
            raise NoSuchPath(f"version {generation} of the inode {ino} is not known")
        return former

    def current(self, ino: int) -> Entry:
        node = self.ledger.nodes.get(ino)
        return self._dressed(self._index.current(ino)) if node is None else self._entry_of(node)

    def children(self, parent: int, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        node = self.ledger.nodes.get(parent)
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
        inos = list(self.ledger.names.get(parent, {}).values())
        nodes = {ino: node for ino in inos if (node := self.ledger.nodes.get(ino)) is not None}
        return nodes, set(self._hidden_in(parent))

    def fresh_for(self, parent: int) -> float:
        # What is in a directory that the bucket does not have yet changes by us only.
        return OURS_FRESH if parent in self.ledger.nodes else self._index.fresh_for(parent)

    def edition(self, parent: int) -> int | None:
        return None  # what is written here has none

    def outdated(self, entry: Entry) -> bool:
        return entry.ino not in self.ledger.nodes and self._index.outdated(entry)

    def resolve(self, path: str) -> Entry:
        return walking.resolve(self, path)

    def walk(self, path: str = "/") -> Iterator[tuple[str, Entry]]:
        return walking.walk(self, path)

    def path(self, ino: int) -> str:
        return walking.path_of(self, ino)

    def stats(self) -> IndexStats:
        return self._index.stats()

    def close(self) -> None:
        with suppress(LandingError):
            self.sync_closed(most=len(self.ledger.nodes))
        with suppress(LandingBroken):
            self.ledger.sync()
        self._index.close()

    # ---- what else is known of a path -------------------------------------------------------------

    def landed(self, ino: int) -> bool:
        """Whether its bytes are in a landing file."""
        node = self.ledger.nodes.get(ino)
        return node is not None and node.landing > 0

    def dirty(self, ino: int) -> bool:
        """Whether the bucket does not have a path as it is here."""
        return ino in self.ledger.nodes

    def attributes(self, entry: Entry) -> Attributes:
        """What a path has beside its bytes."""
        node = self.ledger.nodes.get(entry.ino)
        if node is not None and node.generation == entry.generation:
            return node.attributes
        found = self.ledger.kept(entry.mount, entry.key)
        if found is not None and found[0] == _token(entry):
            return found[2]
        # It may have been settled since: another version and key, but the same generation.
        with suppress(NoSuchPath):
            now = self._index.entry(entry.ino)
            if now.generation == entry.generation and (now.version, now.key) != (entry.version, entry.key):
                found = self.ledger.kept(now.mount, now.key)
                if found is not None and found[0] == _token(now):
                    return found[2]
        return _DEFAULT

    def former(self, node: Node) -> list[Entry]:
        """What a path was while it was clean the last time, here or under the name that it had then."""
        found = []
        if node.generation and (before := self._index.version(node.ino, node.generation - 1)) is not None:
            found.append(before)
        if node.origin is not None and not node.landing:
            key, size, version, mtime_ns = node.origin[:4]
            found.append(
                Entry(node.ino, node.parent, node.name, node.kind, size, mtime_ns, node.mount, key, version)
            )
        return found

    def key_of(self, entry: Entry) -> str:
        """The key under which a path is in the bucket, or will be."""
        return self._own_key(entry)

    def room(self) -> Room:
        """How full the landing zone is."""
        return self._landing.room()

    def check_room(self) -> None:
        """Raise LandingFull where nobody may begin to write."""
        self._landing.check_room()

    # ---- names ------------------------------------------------------------------------------------

    def create(self, parent: int, name: bytes, *, mode: int, uid: int, gid: int) -> Entry:
        """A new, empty file, which counts as open for writing until it was opened so and closed.

        Raises PathExists, NotADirectory, NoSuchPath, NotHere, LandingFull, LandingBroken.
        """
        self._look(parent, name)
        with self._lock:
            mount, key = self._free(parent, name, Kind.FILE)
            node = Node(self._number(), parent, name, Kind.FILE, mount, key, 0)
            with self._made() as landing:
                node = node._replace(landing=landing, attributes=Attributes(mode, uid, gid), writers=1)
                with self.ledger.changing("create") as batch:
                    batch.put_node(node)
                    self.owing.owe_put(batch, node, NOTHING, due=False)
            self.ledger.granted.add(node.ino)
            return self._entry_of(node)

    def mkdir(self, parent: int, name: bytes, *, mode: int, uid: int, gid: int) -> Entry:
        """A new directory. Raises as `create`."""
        self._look(parent, name)
        with self._lock:
            mount, key = self._free(parent, name, Kind.DIRECTORY)
            node = Node(self._number(), parent, name, Kind.DIRECTORY, mount, key, 0)
            self.ledger.rowless.add(node.ino)
            node = node._replace(attributes=Attributes(mode, uid, gid, self._now_ns()))
            with self.ledger.changing("mkdir") as batch:
                batch.put_node(node)
                self.owing.owe_put(batch, node, NOTHING, due=True)
        self.owing.poke()
        return self._entry_of(node)

    def symlink(self, parent: int, name: bytes, target: bytes, *, uid: int, gid: int) -> Entry:
        """A new symbolic link. Raises as `create`."""
        self._look(parent, name)
        with self._lock:
            mount, key = self._free(parent, name, Kind.SYMLINK)
            node = Node(self._number(), parent, name, Kind.SYMLINK, mount, key, 0)
            kept = Attributes(0o777, uid, gid, self._now_ns(), target)
            with self._made() as landing:
                self._landing.write(landing, target)
                node = node._replace(landing=landing, attributes=kept)
                with self.ledger.changing("symlink") as batch:
                    batch.put_node(node)
                    self.owing.owe_put(batch, node, NOTHING, due=True)
        self.owing.poke()
        return self._entry_of(node)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a file. Who has it open goes on. Raises NoSuchPath, IsADirectory, NotHere."""
        self._look(parent, name)
        with self._lock:
            entry = self._there(parent, name)
            if entry.kind is Kind.DIRECTORY:
                raise IsADirectory(self.path(entry.ino))
            self._writable(parent)
            with self.ledger.changing("unlink") as batch:
                self._take_away(batch, entry, hide=True)
                self._keep_directory(batch, parent, without=entry.ino)
            with self.ledger.catalogue() as changing:
                changing.bury(entry.ino)
        self.owing.poke()

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
            if self._has_children(entry.ino):
                raise NotEmpty(self.path(entry.ino))
            with self.ledger.changing("rmdir") as batch:
                self._take_away(batch, entry, hide=True)
                self._keep_directory(batch, parent, without=entry.ino)
            with self.ledger.catalogue() as changing:
                changing.bury(entry.ino)
        self.owing.poke()

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
        self._sync_successor(self._known(parent, name), self._known(new_parent, new_name))
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
            mount, key = self.key_for(new_parent, new_name, entry.kind)
            if mount != entry.mount:
                raise OtherStore("the two names lie in different stores")
            if target is not None:
                self._check_replaced(entry, target, replace)
            at = new_parent
            while at != ROOT:
                if at == entry.ino:
                    raise NotHere("a directory cannot become a part of itself")
                at = self.entry(at).parent
            moved = list(self._moved(self._node_of(entry), new_parent, new_name, key))
            for _, new in moved:
                self._check_key(mount, new.key.removesuffix("/"))
            self._rename(entry, target, moved)
        self.owing.poke()

    def _sync_successor(self, entry: Entry | None, target: Entry | None) -> None:
        """What takes the place of bytes that are only here, and were promised to survive a power cut, has to
        survive it, too: ext4 does the same for who writes beside and renames without a sync."""
        if entry is not None and target is not None:
            new, old = self.ledger.nodes.get(entry.ino), self.ledger.nodes.get(target.ino)
            # Its bytes are here, or under a name that is to be deleted in the bucket.
            only = old is not None and (old.synced or old.origin or old.ino in self.ledger.deletes)
            if only and new is not None and new.landing and not new.synced:
                self._sync_bytes(new)
                self._note_synced([new])

    def _threatened(self, top: Entry) -> list[int]:
        """Of what is renamed, the files whose bytes are an object that the bucket is to overwrite already:
        what is owed after that would find it gone (`mv a t; mv b a; mv t b`)."""
        found = []
        below = [top]
        while below:
            entry = below.pop()
            node = self.ledger.nodes.get(entry.ino)
            if entry.kind is Kind.DIRECTORY:
                below += self._known_children(entry.ino)
            elif node is not None and node.origin is not None and not node.landing:
                own = self.ledger.puts.get(node.ino)
                at = (node.mount, node.origin.key)
                ops = [self.ledger.ops[seq] for seq in self.ledger.by_key.get(at, ()) if seq != own]
                if any(op.kind is OpKind.PUT and op.key == node.origin.key for op in ops):
                    found.append(entry.ino)
        return found

    def _check_replaced(self, entry: Entry, target: Entry, may_be: bool) -> None:
        if not may_be:
            raise PathExists(self.path(target.ino))
        if entry.kind is Kind.DIRECTORY:
            if target.kind is not Kind.DIRECTORY:
                raise NotADirectory(self.path(target.ino))
            if self._has_children(target.ino):
                raise NotEmpty(self.path(target.ino))
        elif target.kind is Kind.DIRECTORY:
            raise IsADirectory(self.path(target.ino))

    def _rename(self, entry: Entry, target: Entry | None, moved: Sequence[tuple[Node, Node]]) -> None:
        with self.ledger.changing("rename") as batch:
            there: Expected = NOTHING
            if target is not None:
                there = self._take_away(batch, target, hide=False)
            left: list[Op] = []
            for node, new in moved:
                left += self._move(batch, node, new, there)
                there = NOTHING  # of all but the first, nothing was there
            # After all the PUTs, and a directory after what is in it.
            for op in reversed(left):
                batch.add_op(op)
            if any(op.key == self._own_key(entry) for op in left):
                batch.hide(Hidden(entry.parent, entry.name, entry.mount, self._own_key(entry)))
            top = moved[0][1]
            if top.parent != entry.parent:
                self._keep_directory(batch, entry.parent, without=entry.ino)
        with self.ledger.catalogue((entry.parent, entry.name), (top.parent, top.name)) as changing:
            if target is not None:
                changing.bury(target.ino)
            changing.place(entry.ino, top.parent, top.name, entry.mount, names.to_bytes(top.key))

    def _moved(self, node: Node, parent: int, name: bytes, key: str) -> Iterator[tuple[Node, Node]]:
        """What a rename moves, as it was and as it will be, parents first."""
        yield node, node._replace(parent=parent, name=name, key=key)
        if node.kind is Kind.DIRECTORY:
            for child in self._known_children(node.ino):
                below = self._node_of(child)
                yield from self._moved(below, node.ino, child.name, key + below.key[len(node.key) :])

    def _move(self, batch: Batch, node: Node, new: Node, there: Expected) -> list[Op]:
        """Owe the bucket a node under another key, where it holds `there`; what is left to do under the old
        one."""
        op = self.ledger.ops.get(self.ledger.puts.get(node.ino, 0))
        closed = op is None or op.since > 0
        before, tried, mark = self.owing.supersede(batch, node.mount, node.key)
        if before is None:
            before = node.origin.version if node.origin is not None else ANYTHING
        batch.put_node(new._replace(origin=None) if is_hollow(new) else new)
        batch.then(lambda: self.ledger.unchanged.pop(node.ino, None))  # it is another path now
        self.owing.owe_put(batch, new, there, due=closed, barrier=closed)
        left = []
        for seq in self.ledger.deletes.get(
            node.ino, ()
        ):  # of an earlier rename: they wait for the new name now
            # That of the new name itself, where it has come back, was superseded by the PUT.
            if seq not in self.ledger.running and self.ledger.ops[seq].key != new.key:
                batch.drop_op(self.ledger.ops[seq])
                left.append(self.ledger.ops[seq]._replace(seq=0))
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

    def _take_away(self, batch: Batch, entry: Entry, *, hide: bool) -> Expected:
        """A path is no more, or (not `hide`) something else comes in its place; what the bucket holds."""
        ino, node = entry.ino, self.ledger.nodes.get(entry.ino)
        key = entry.key if node is None else node.key
        directory = entry.kind is Kind.DIRECTORY
        before, tried, mark = self.owing.supersede(batch, entry.mount, key)
        if before is None:
            before = ANYTHING if directory else entry.version
        for seq in self.ledger.deletes.get(ino, ()):  # what it was renamed from need not wait for it any more
            batch.update_op(self.ledger.ops[seq]._replace(ino=0))
        if node is not None:
            if node.writers or self._users[ino]:
                batch.put_node(node._replace(orphan=True))
            else:
                batch.drop_node(node)
        else:
            batch.drop_attributes(entry.mount, key)
            batch.then(lambda: self.copies.outdate(entry))
        if hide and (tried or before != NOTHING):
            batch.hide(Hidden(entry.parent, entry.name, entry.mount, key))
            batch.add_op(
                Op(
                    0, mark, OpKind.DELETE, 0, entry.mount, key, barrier=directory,
                    expected=ANYTHING if directory else before, since=self._clock.wall(),
                )
            )  # fmt: skip
        return before

    def _keep_directory(self, batch: Batch, ino: int, *, without: int) -> None:
        """A directory whose last entry, `without`, goes away is still there: the bucket needs an object that
        says so."""
        if ino in self._roots or ino in self.ledger.nodes or self._has_children(ino, but=without):
            return
        with suppress(NoSuchPath):
            node = self._node_of(self.entry(ino))._replace(origin=None)
            batch.put_node(node)
            self.owing.owe_put(batch, node, ANYTHING, due=True)

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
            node = self.ledger.nodes.get(ino)
            if mtime_ns is not None:
                self.ledger.unchanged.pop(ino, None)  # it may hide a write before it
            if mtime_ns is not None and node is not None and node.landing and node.kind is Kind.FILE:
                self._landing.set_mtime(node.landing, mtime_ns)

    def set_xattr(self, ino: int, name: bytes, value: bytes, *, create: bool, replace: bool) -> None:
        """Raises PathExists (`create`, and there is one), NoSuchPath (`replace`, and there is none), and
        TooManyAttributes beyond XATTRS_MAX."""
        with self._lock:
            before = self.attributes(self.entry(ino)).xattrs
            if create and name in before:
                raise PathExists(f"extended attribute {names.to_text(name)}")
            if replace and name not in before:
                raise NoSuchPath(f"extended attribute {names.to_text(name)}")
            xattrs = {**before, name: value}
            if sum(len(k) + len(v) for k, v in xattrs.items()) > XATTRS_MAX:
                raise TooManyAttributes(f"a path has {XATTRS_MAX} bytes of extended attributes at most")
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
        node = self.ledger.nodes.get(ino)
        if node is not None:
            with self.ledger.changing("attributes") as batch:
                batch.put_node(node._replace(attributes=change_of(node.attributes)))
            return
        entry = self.entry(ino)
        if entry.mount < 0:
            raise NotHere(f"{self.path(ino)} lies above the mount points")
        kept = change_of(self.attributes(entry))
        with self.ledger.changing("attributes") as batch:
            batch.keep_attributes(entry.mount, entry.key, _token(entry), entry.kind, kept)

    # ---- bytes ------------------------------------------------------------------------------------

    def land(self, ino: int, *, truncate: bool = False) -> Entry:
        """Have the bytes of a file in the landing zone, to be written; the file as it is then. One that was
        clean has another generation afterwards, and with `truncate` none of its bytes, so it is `hollow`.
        Whoever opens it then says that it is `emptied`; where nobody does, it is clean again when it was
        closed.

        Raises NoSuchPath, IsADirectory, LandingFull, LandingBroken, SourceError.
        """
        with self.one_lander(ino):
            while True:
                entry = self.entry(ino)
                if entry.kind is Kind.DIRECTORY:
                    raise IsADirectory(self.path(ino))
                node = self.ledger.nodes.get(ino)
                if node is None:
                    self._writable(entry.parent)
                elif node.landing:
                    return self.entry(ino)
                # What is renamed is not clean, so it could not be that again: its bytes are brought, too.
                number, blocks = (self._create(), ()) if truncate and node is None else self._bring(entry)
                try:
                    if self._landed(entry, number, blocks, truncate=truncate):
                        return self.entry(ino)
                except Exception:
                    self.ledger.discard(number)
                    raise
                self.ledger.discard(number)  # it became another meanwhile

    def _create(self) -> int:
        """A new landing file. What is to be removed is removed first, where there is no room."""
        try:
            return self._landing.create()
        except LandingFull:
            self.ledger.sync()
            return self._landing.create()

    @contextmanager
    def _made(self) -> Iterator[int]:
        """A new landing file, which the block gives to somebody; where it cannot, there is none."""
        landing = self._create()
        try:
            yield landing
        except Exception:
            self.ledger.discard(landing)
            raise

    def _bring(self, entry: Entry) -> tuple[int, Sequence[Block]]:
        """A landing file with the bytes of `entry`, and what is known of them."""
        given = None
        # Of what is renamed, and not yet where it belongs, the cache may have the last copy: it stays.
        if self.copies.worth_giving(entry) and entry.ino not in self.ledger.nodes:
            self.ledger.tidy()  # or what came to the cache from here is called something here still
            given = self.copies.give(entry, self._landing)
        number, blocks = given or (self._create(), ())
        try:
            if given is not None:
                self._landing.set_mtime(number, entry.mtime_ns)
            else:
                self.fill(number, entry)
        except Exception:
            self._landing.discard(number)
            raise
        return number, blocks

    def fill(self, number: int, entry: Entry) -> None:
        """Copy the bytes of `entry` into a landing file. Raises LandingError, SourceError."""
        file = self._landing.open(number, writing=True)
        try:
            if entry.size:
                self.copies.bring(entry, file.descriptor)
            os.utime(file.descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LandingFull(f"the landing zone is full: {error.strerror}") from error
            raise LandingBroken(f"the landing zone fails: {error.strerror}") from error
        finally:
            file.close()

    def _landed(self, entry: Entry, number: int, blocks: Sequence[Block], *, truncate: bool) -> bool:
        """Make landing file `number` the content of what was `entry`; whether it still was that."""
        with self._lock:
            ino = entry.ino
            with suppress(NoSuchPath):
                now = self.entry(ino)
                if (now.version, now.size, now.key) != (entry.version, entry.size, entry.key):
                    return False
                node = self.ledger.nodes.get(ino)
                if node is not None:  # it was renamed: its object stands under another key
                    self._land_renamed(node, number)
                else:
                    self._land_clean(now, number, blocks, truncate=truncate)
                return True
            return False

    def _land_renamed(self, node: Node, number: int) -> None:
        op = self.ledger.ops[self.ledger.puts[node.ino]]
        with self._index.changing() as changing:  # where it is counted on when this is clean again
            generation = changing.renew(node.ino)
        with self.ledger.changing("land") as batch:
            batch.put_node(node._replace(landing=number, origin=None, generation=generation))
            batch.update_op(op._replace(landing=number, origin=None, id=next_id(op.id)))
            batch.then(lambda: self.owing.edit(op))

    def _land_clean(self, entry: Entry, number: int, blocks: Sequence[Block], *, truncate: bool) -> None:
        ino = entry.ino
        with self._index.changing() as changing:
            generation = changing.renew(ino)
        kept = self.attributes(entry)._replace(mtime_ns=None)
        with self.ledger.changing("land") as batch:
            node = Node(
                ino, entry.parent, entry.name, entry.kind, entry.mount, entry.key, generation, number,
                origin=self._stored(ino)._replace(mtime_ns=entry.mtime_ns) if truncate else None,
                attributes=kept,
            )  # fmt: skip
            batch.put_node(node)
            self.owing.owe_put(batch, node, entry.version, due=False)
        if truncate:
            self._landing.set_mtime(number, entry.mtime_ns)  # so that it shows that somebody empties it
        look = look_of(self._landing.stat(number))
        self.ledger.unchanged[ino] = Unchanged(entry, look, blocks)

    def hollow(self, ino: int) -> bool:
        """Whether a file was landed to be emptied, and nobody has emptied it yet."""
        node = self.ledger.nodes.get(ino)
        return node is not None and is_hollow(node)

    def emptied(self, ino: int) -> None:
        """Whoever empties a file is about to, and will not be refused any more."""
        with self._lock:
            node = self.ledger.nodes.get(ino)
            if node is not None and is_hollow(node):
                with self.ledger.changing("emptied") as batch:
                    batch.put_node(node._replace(origin=None))

    def open(self, ino: int, *, writing: bool) -> LandedFile:
        """Open the landing file of a landed path, until `closed`. Raises VersionChanged where it has none
        (any more): look it up again."""
        with self._lock:
            node = self.ledger.nodes.get(ino)
            if node is None or not node.landing:
                raise VersionChanged("it was uploaded in this moment")
            if writing and ino in self.ledger.granted:
                file = self._landing.open(node.landing, writing=True)
                self.ledger.granted.discard(ino)
            else:
                file, begun = self._landing.open(node.landing, writing=False), False
                try:
                    if writing:
                        self._begin_writing(node)  # before it is opened so: an upload holds a lease
                        begun = True
                        readable, file = file, self._landing.open(node.landing, writing=True)
                        readable.close()
                except BaseException:
                    file.close()
                    if begun:
                        self._leave(ino, closes=1)
                    raise
            self._users[ino] += 1
            if writing:
                self._writing[ino] += 1
            return file

    def closed(self, ino: int, file: LandedFile) -> None:
        """It is not used any more. The last writer's close makes the file due for upload: at once, or as soon
        as the journal takes it."""
        file.close()
        with self._lock:
            self._users[ino] -= 1
            if not self._users[ino]:
                del self._users[ino]
            if file.writing:
                self._writing[ino] -= 1
                if not self._writing[ino]:
                    del self._writing[ino]
            self._leave(ino, closes=int(file.writing))
        if file.writing:
            self.closes.came(file)
            self.owing.poke()

    def keep_for(self, ino: int, who: int, file: LandedFile) -> None:
        """`who` was refused what it has now open for writing as `file`, and comes again for it."""
        with self._lock:
            node = self.ledger.nodes.get(ino)
            if node is not None and not self._leases_tell:
                self.ledger.awaited[ino] += 1
                with suppress(LandingError):  # where that cannot be noted, the next process waits for it
                    self._note_writers(node)
            self.awaited.keep(ino, who, file)

    def kept_for(self, ino: int, who: int) -> LandedFile | None:
        """What was kept for `who`, which is its own from now on; None: nothing. Raises LandingError."""
        file = self.awaited.take(ino, who)
        if file is not None and not self._leases_tell:
            try:
                with self._lock:
                    self._is_awaited_no_more(ino)
                    node = self.ledger.nodes.get(ino)
                    if node is not None:
                        self._note_writers(node)
            except BaseException:
                self.closed(ino, file)
                raise
        return file

    def _not_come(self, ino: int, file: LandedFile) -> None:
        with self._lock:
            self._is_awaited_no_more(ino)
            self.closed(ino, file)

    def _is_awaited_no_more(self, ino: int) -> None:
        self.ledger.awaited -= Counter((ino,))  # what is none is not kept

    def _note_writers(self, node: Node) -> None:
        with self.ledger.changing("await") as batch:
            batch.set_writers(node, node.writers)

    def released(self, ino: int) -> None:
        """A writer that an earlier daemon counted has closed the file."""
        with self._lock:
            node = self.ledger.nodes.get(ino)
            ours = self._writing[ino] + (ino in self.ledger.granted) + self.ledger.unnoted.get(ino, 0)
            if node is not None and node.writers > ours:
                self._leave(ino, closes=1)
        self.owing.poke()

    def forsaken(self) -> None:
        """The mount is gone, and what this process had open is closed: nobody whom an earlier daemon counted
        has anything open any more."""
        with self._lock:
            for node in list(self.ledger.nodes.values()):
                ours = self._writing[node.ino] + (node.ino in self.ledger.granted)
                ours += self.ledger.unnoted.get(node.ino, 0)
                if node.orphan or node.writers > ours:
                    self._leave(node.ino, closes=max(0, node.writers - ours))
        self.owing.poke()

    def note_closes(self) -> int:
        """Note the closes that the journal could not take before; of how many files it still cannot."""
        with self._lock:
            for ino in list(self.ledger.unnoted):
                self._leave(ino, closes=0)
            left = len(self.ledger.unnoted)
        self.owing.poke()
        return left

    def _leave(self, ino: int, *, closes: int) -> None:
        """So many writers have closed a file, and perhaps nobody uses it any more. Where that cannot be noted
        it is remembered: a file is not open for ever because its close met a full disk."""
        before = self.ledger.unnoted.pop(ino, None)
        closes += before or 0
        try:
            while closes:
                self._end_writing(ino)
                closes -= 1
            self._sweep(ino)
        except LandingError as error:
            self.ledger.unnoted[ino] = closes
            if before is None:
                _log.warning("a close cannot be noted, and is tried again: %s", error)

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
        node = self.ledger.nodes.get(ino)
        if node is not None and node.landing:
            self._sync_bytes(node)
            self._note_synced([node])
        self.ledger.sync()  # after the bytes: what the journal names then is there

    def _note_synced(self, nodes: Iterable[Node]) -> None:
        """The bytes of these are on the disk, and were not known to be."""
        new = [node for node in nodes if not node.synced]
        if not new:
            return
        with self._lock, self.ledger.changing("synced") as batch:
            for node in new:
                now = self.ledger.nodes.get(node.ino)
                if now is not None and now.landing == node.landing:  # another landing file is another matter
                    batch.set_synced(now)

    def sync_closed(self, *, most: int = 1000) -> None:
        """Bring the bytes of up to `most` files that were closed without that to the disk. Raises
        LandingError."""
        open_or_known = (n for n in list(self.ledger.nodes.values()) if n.landing and not n.synced)
        nodes = [node for node in open_or_known if not node.writers][:most]
        for node in nodes:
            self._sync_bytes(node)
        self._note_synced(nodes)

    def _sync_bytes(self, node: Node) -> None:
        try:
            self._landing.sync(node.landing)
        except LandingBroken:
            if self.ledger.nodes.get(node.ino) is node:
                raise
            # It was uploaded in this moment: the bucket has it.

    def sync_names(self) -> None:
        """Return when all changes of names so far are on the disk."""
        self.ledger.sync()

    @contextmanager
    def _written(self, ino: int) -> Iterator[Node]:
        """Write to a file without having it open."""
        with self._lock:
            node = self.ledger.nodes.get(ino)
            if node is None or not node.landing:
                raise VersionChanged("it was uploaded in this moment")
            self._begin_writing(node)
        try:
            yield node
        finally:
            with self._lock:
                self._leave(ino, closes=1)
            self.owing.poke()

    def _begin_writing(self, node: Node) -> None:
        """Somebody will write: no upload may read it, and what was sent is another content."""
        op = self.ledger.ops.get(self.ledger.puts.get(node.ino, 0))
        with self.ledger.changing("open") as batch:
            batch.set_writers(node, node.writers + 1)
            if op is not None and op.since and not node.writers:
                # Nobody waits for it until it is closed again: that may be in hours.
                batch.update_op(op._replace(id=next_id(op.id), resume="", since=0.0))
                batch.then(lambda: self.ledger.due.setdefault(node.ino, op.since))
                batch.then(lambda: self.owing.edit(op))

    def _end_writing(self, ino: int) -> None:
        node = self.ledger.nodes.get(ino)
        if node is None or not node.writers:
            return
        op = self.ledger.ops.get(self.ledger.puts.get(ino, 0))
        last = node.writers == 1 and not node.orphan
        if last and op is not None and not op.since:
            before = self.ledger.unchanged.pop(ino, None)
            if before is not None and self._is_unchanged(node, before):
                self._take_off(node, op, before)
                return
        with self.ledger.changing("close") as batch:
            batch.set_writers(node, node.writers - 1)
            if last and op is not None and not op.since:
                # Who opens it again and again does not put it off again and again.
                since = self.ledger.due.get(ino, self._clock.wall())
                if op.seq in self.ledger.running:  # stopped, and not over yet: its end tells what it has done
                    batch.update_op(op._replace(since=since))
                else:
                    self.owing.owe_last(batch, op, since=since)
                batch.then(lambda: self.ledger.due.pop(ino, None))

    def _is_unchanged(self, node: Node, before: Unchanged) -> bool:
        return not self._users[node.ino] and before.look == look_of(self._landing.stat(node.landing))

    def _take_off(self, node: Node, op: Op, before: Unchanged) -> None:
        """Nothing was written: it is the clean file that it was before it was opened, in the cache, too."""
        mtime_ns: int | None = self._landing.stat(node.landing).st_mtime_ns  # as it was landed
        with suppress(NoSuchPath):
            if self._index.entry(node.ino).mtime_ns == mtime_ns:
                mtime_ns = None
        kept = node.attributes._replace(mtime_ns=mtime_ns)
        hollow = self._entry_of(node) if is_hollow(node) else None
        with self._given_back(node, before), self.ledger.changing("unchanged") as batch:
            take_off(batch, node, op, kept)
        if hollow is not None:
            self.ledger.replaced(hollow)  # the kernel may have been told of a size of 0

    @contextmanager
    def _given_back(self, node: Node, before: Unchanged) -> Iterator[None]:
        """What was the cached file is that again; the block makes it nobody's landing file."""
        with ExitStack() as stack:
            content = self._landing.quiet(node.landing) if before.blocks else None
            if content is not None:
                stack.callback(content.close)
                ready = self.copies.offer(before.entry, content, before.blocks)
                if ready is not None:
                    stack.callback(ready.close)
                    stack.enter_context(ready.taken())
            yield

    def _sweep(self, ino: int) -> None:
        """Remove what was unlinked while it was open, when nobody has it open any more."""
        node = self.ledger.nodes.get(ino)
        if node is not None and node.orphan and not self._users[ino] and not node.writers:
            with self.ledger.changing("sweep") as batch:
                batch.drop_node(node)

    # ---- names, inside ----------------------------------------------------------------------------

    def _ours(self, parent: int, name: bytes) -> Entry | None:
        """A name as the overlay knows it; None where the index is to be asked. Raises NoSuchPath."""
        ino = self.ledger.names.get(parent, {}).get(name)
        node = self.ledger.nodes.get(ino) if ino is not None else None
        if node is not None:
            return self._entry_of(node)
        above = self.ledger.nodes.get(parent)
        if above is None:
            return None
        if above.kind is not Kind.DIRECTORY:
            raise NotADirectory(f"{self.path(parent)} is a file")
        found = None if parent in self.ledger.rowless else self._index.known_child(parent, name)
        if found is None:
            raise NoSuchPath(f"no such path: {names.to_text(name)}")
        return self._shown(found)

    def _shown(self, entry: Entry) -> Entry:
        """What the index says of a name. Raises NoSuchPath where we know better."""
        if (entry.mount, entry.key) in self.ledger.hidden_at:
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

    def _hidden_in(self, parent: int) -> Collection[str]:
        """Keys that are hidden in a directory."""
        if not self.ledger.hidden:
            return ()
        directory = self.entry(parent)
        return self.ledger.hidden.get((directory.mount, self._own_key(directory)), ())

    def _there(self, parent: int, name: bytes) -> Entry:
        found = self._known(parent, name)
        if found is None:
            raise NoSuchPath(f"no such path: {names.to_text(name)}")
        return found

    def _has_children(self, parent: int, *, but: int = 0) -> bool:
        """Whether anything but `but` is known to be in a directory. Looks no further than at one."""
        ours, hidden = self.ledger.names.get(parent, {}), self._hidden_in(parent)
        if any(ino != but for ino in ours.values()):
            return True
        after, few = 0, 4
        while page := self._index.known_children(parent, after=after, limit=few):
            if any(e.ino != but and e.name not in ours and e.key not in hidden for e in page):
                return True
            after, few = page[-1].ino, _PAGE  # it may be many that are hidden
        return False

    def _known_children(self, parent: int) -> list[Entry]:
        ours, hidden = self.ledger.names.get(parent, {}), self._hidden_in(parent)
        found = [self._entry_of(self.ledger.nodes[ino]) for ino in ours.values()]
        after = 0
        while page := self._index.known_children(parent, after=after, limit=_PAGE):
            found += [self._dressed(e) for e in page if e.name not in ours and e.key not in hidden]
            after = page[-1].ino
        return found

    def _look(self, parent: int, name: bytes) -> None:
        """Have what the store says of a name known, where that is to be asked."""
        if parent in self.ledger.rowless:
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

    def key_for(self, parent: int, name: bytes, kind: Kind) -> tuple[int, str]:
        """Mount point and key of a name. Raises NotHere, NotADirectory."""
        directory = self._writable(parent)
        segment = names.original(name)
        if segment is None or names.shown(segment) != name:
            raise NotHere(f"no object can be shown as {names.to_text(name)!r} (docs/names.md)")
        key = self._own_key(directory) + segment
        self._check_key(directory.mount, key)
        return directory.mount, key + "/" * (kind is Kind.DIRECTORY)

    def _check_key(self, mount: int, key: str) -> None:
        if not self._accepts(mount, key):
            raise NotHere(f"the store can have no key such as {key!r}: no text, or too long")

    def _free(self, parent: int, name: bytes, kind: Kind) -> tuple[int, str]:
        found = self.key_for(parent, name, kind)
        there = self._known(parent, name)
        if there is not None:
            raise PathExists(self.path(there.ino))
        return found

    def _own_key(self, entry: Entry) -> str:
        """The key under which a path is owed, or is; that of its bytes may be another."""
        node = self.ledger.nodes.get(entry.ino)
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
        node = self.ledger.nodes.get(entry.ino)
        if node is not None:
            return node
        origin = None
        if entry.kind is not Kind.DIRECTORY:
            origin = self._stored(entry.ino)
        return Node(
            entry.ino, entry.parent, entry.name, entry.kind, entry.mount, entry.key, entry.generation,
            origin=origin, attributes=self.attributes(entry),
        )  # fmt: skip

    def _stored(self, ino: int) -> ObjectInfo:
        """A clean path as the store has it, without what is kept of it here."""
        stored = self._index.entry(ino)
        return ObjectInfo(stored.key, stored.size, stored.version, stored.mtime_ns)

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
                if self.ledger.nodes.get(node.ino) is node:
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
        if entry.mount < 0:
            return entry
        found = self.ledger.kept(entry.mount, entry.key)
        if found is None or found[0] != _token(entry):
            return entry
        _, kind, kept = found
        if kind is Kind.SYMLINK and kept.target is not None:
            entry = entry._replace(kind=Kind.SYMLINK, size=len(kept.target))
        return entry if kept.mtime_ns is None else entry._replace(mtime_ns=kept.mtime_ns)

    def _now_ns(self) -> int:
        return int(self._clock.wall() * 1e9)

    @contextmanager
    def one_lander(self, ino: int) -> Iterator[None]:
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


def _token(entry: Entry) -> str:
    """Which version of a path its kept attributes are of: of a directory, there is but one."""
    return "" if entry.kind is Kind.DIRECTORY else entry.version.token


def _with_xattrs(kept: Attributes, xattrs: Mapping[bytes, bytes]) -> Attributes:
    return kept._replace(xattrs=xattrs)
