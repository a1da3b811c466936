"""
The journal as it is held in memory: what is dirty and what is owed, found by name, by key, by number.

It changes by transactions only. A `Batch` writes to the journal at once, and says what memory makes of
it; that follows when the journal has committed. So what is found here is always what the next process
would find, and a transaction that fails changes nothing.

It becomes durable in rounds: one sync of the disk for all who ask before it begins.

Locks: `lock` is held by whoever changes anything. Who only looks names up takes none: nodes are frozen
values, and in one batch what adds a name is done before what takes one away.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from cachetools import LRUCache

from datacache.cache.tier import Block
from datacache.errors import IndexBroken, IndexFull
from datacache.index import names
from datacache.index.database import Changing
from datacache.index.live import LiveIndex
from datacache.model import Entry, Kind, Version
from datacache.sources.sink import Stored
from datacache.writing.journal import Attributes, Change, Hidden, Journal, Node, Op, OpKind
from datacache.writing.landing import Landing, Quiet
from datacache.writing.rounds import Rounds

_log = logging.getLogger(__name__)

DISPENSABLE = 256
"""Landing files that wait at most for the journal to be synced, before they are removed."""
_ATTRIBUTES = 50_000  # clean paths of which it is remembered what they have beside their bytes

Kept = tuple[str, Kind, Attributes]
"""What is kept of a clean path beside its bytes: of which version (`Version.token`), as what, and that."""


class Unchanged(NamedTuple):
    """A clean file that was landed to be written, as it was before anybody had."""

    entry: Entry
    look: tuple[int, int, int]
    """`landing.look_of` the landing file."""
    blocks: Sequence[Block]
    """What is in it, where it was the cached file; else nothing."""


@dataclass
class Copied:
    """What was copied of a file that was open for writing."""

    seq: int
    """Of the PUT of the copy."""
    landing: int
    """The file that it is a copy of."""
    look: tuple[int, int, int]
    """`landing.look_of` that."""
    stored: Stored | None = None
    """What the bucket has of it, when it has."""
    refused: bool = False
    """Somebody else had changed the object."""


class Ledger:
    """What a journal says; see the module. Its dictionaries are for reading: a `Batch` changes them."""

    def __init__(self, journal: Journal, landing: Landing, index: LiveIndex) -> None:
        """Empty: `resuming` fills it with what the journal has. `index` is told what is hidden."""
        self.journal, self.landing, self._index = journal, landing, index
        self._syncs = Rounds(self._sync_disk)
        self.lock = threading.RLock()
        self.nodes: dict[int, Node] = {}
        self.names: dict[int, dict[bytes, int]] = {}
        """By directory."""
        self.hidden: dict[tuple[int, str], set[str]] = {}
        """Keys, by mount and key of the directory: it may be removed, and made anew under another number."""
        self.hidden_at: dict[tuple[int, str], tuple[int, bytes]] = {}
        """Directory and name, by mount and key."""
        self.ops: dict[int, Op] = {}
        """In the order of `seq`."""
        self.changed: set[int] = set()
        """The `seq` of those that the uploader has not seen as they are now, or gone."""
        self.by_key: dict[tuple[int, str], list[int]] = {}
        """The `seq` of all that reads or changes a key, in order."""
        self.puts: dict[int, int] = {}
        """`seq` of the PUT of a node: the last, where there is one of a copy."""
        self.deletes: dict[int, set[int]] = {}
        """`seq` of the DELETEs of what a node was called before."""

        # What only this process knows; it goes with what it is about.
        self.running: dict[int, Quiet | None] = {}
        """Operations under way, and the bytes that they read."""
        self.tried: set[int] = set()
        """Operations that may have taken effect, though nobody was told."""
        self.parked: dict[int, str] = {}
        """Operations that wait for a person, and why."""
        self.granted: set[int] = set()
        """Nodes that were created, and count as open for writing; the open follows."""
        self.awaited: Counter[int] = Counter()
        """Writers of a node that were told to come again. They count here, and not in the journal: who is
        killed while nobody answers never comes, and nothing would ever tell the next process."""
        self.unnoted: dict[int, int] = {}
        """How often a node was closed by writers without that the journal could take it (a full disk), until
        it does. Zero: nobody has it open any more, and that is to be noted."""
        self.unchanged: dict[int, Unchanged] = {}
        """What was landed to be written, as it was then, by node."""
        self.due: dict[int, float] = {}
        """When files were closed that are open again, and were not uploaded in between, by node."""
        self.left: list[Op] = []
        """What an earlier process has begun, and nobody goes on with; until the uploader hears of it."""
        self.copies: dict[int, Copied] = {}
        """What was last copied of files that are open for writing (`early`), by node."""
        self.rowless: set[int] = set()
        """Directories made here that the catalogue knows nothing of below."""

        self._named: Counter[int] = Counter()  # nodes and operations of each landing file
        self._dispensable: set[int] = set()  # landing files that may have lost the last of them
        self._any_kept = journal.has_attributes()
        self._kept: LRUCache[tuple[int, str], Kept | None] = LRUCache(_ATTRIBUTES)
        self._kept_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Ledger {len(self.nodes)} nodes, {len(self.ops)} operations>"

    @contextmanager
    def changing(self, what: str) -> Iterator["Batch"]:
        """One transaction of the journal; memory follows when it is committed. Raises LandingError."""
        with self.journal.change(what) as change:
            batch = Batch(self, change)
            yield batch
        batch.take_effect()
        if len(self._dispensable) >= DISPENSABLE:
            self.sync()

    @contextmanager
    def catalogue(self, *ours: tuple[int, bytes], needed: bool = False) -> Iterator[Changing]:
        """Let the catalogue of names follow what was decided. Where it cannot, it does at the next start.
        `needed`: not so, for the journal is about to forget it; raises IndexBroken."""
        try:
            with self._index.changing(*ours) as changing:
                yield changing
        except IndexBroken as error:
            if isinstance(error, IndexFull):
                self.journal.ballast.give_up()  # whoever tries again may have room
            if needed:
                raise
            _log.warning("%s: names that were changed follow when the mount is started again", error)

    def replaced(self, entry: Entry) -> None:
        """A name is another file's from now on: the kernel, which may believe it, is told."""
        self._index.replaced([entry])

    @property
    def keeps_unnamed(self) -> bool:
        """Whether landing files wait for a sync to be removed."""
        return bool(self._dispensable)

    def sync(self) -> None:
        """Return when all that was committed before is durable, and the names of landing files are. Raises
        LandingBroken."""
        some: set[int] = set()
        if self._dispensable:
            with self.lock:
                some, self._dispensable = self._dispensable, set()
        try:
            self._syncs.do()
        except BaseException:
            with self.lock:
                self._dispensable |= some
            raise
        # Only now: a power cut must not bring back a name whose bytes are gone.
        if some:
            with self.lock:
                for landing in some:
                    if not self._named[landing]:
                        del self._named[landing]
                        self.landing.discard(landing)

    def _sync_disk(self) -> None:
        self.landing.sync_names()
        self.journal.sync()

    def discard(self, landing: int) -> None:
        """Remove a landing file, unless something has it by now: what fails may have been noted before."""
        with self.lock:
            if not self._named[landing]:
                self.landing.discard(landing)

    def tidy(self) -> None:
        """Remove landing files that nobody names any more. Raises LandingBroken."""
        if self._dispensable:
            self.sync()

    def clean_up(self) -> set[int]:
        """Remove landing files that nobody names: what was begun, and never acknowledged, and what an earlier
        process was done with. Those that there are. Raises LandingBroken."""
        named = {node.landing for node in self.nodes.values()} | {op.landing for op in self.ops.values()}
        self.landing.reserve_numbers(iter(named))
        there = set(self.landing.files())
        if there - named:
            self.journal.sync()  # that earlier process may not have
        for number in there - named:
            self.landing.discard(number)
        return there & named

    def kept(self, mount: int, key: str) -> Kept | None:
        """What is kept of a clean path beside its bytes."""
        if not self._any_kept:
            return None
        with self._kept_lock:
            if (mount, key) in self._kept:
                return self._kept[mount, key]
        found = self.journal.attributes(mount, key)
        with self._kept_lock:
            return self._kept.setdefault((mount, key), found)

    # ---- what a batch does to memory --------------------------------------------------------------

    def set_node(self, node: Node) -> None:
        before = self.nodes.get(node.ino)
        self.nodes[node.ino] = node
        self._named[node.landing] += 1
        if before is not None:
            self._named[before.landing] -= 1
        if not node.orphan:
            self.names.setdefault(node.parent, {})[node.name] = node.ino
        if before is not None and (before.orphan, before.parent, before.name) != (
            node.orphan, node.parent, node.name,
        ):  # fmt: skip
            self._unname(before)

    def _unname(self, node: Node) -> None:
        called = self.names.get(node.parent)
        if called is not None and called.get(node.name) == node.ino:
            del called[node.name]
            if not called:
                del self.names[node.parent]

    def unset_node(self, ino: int) -> None:
        before = self.nodes.pop(ino, None)
        if before is not None:
            self._unname(before)
            self._named[before.landing] -= 1
        self.granted.discard(ino)
        self.rowless.discard(ino)
        self.unchanged.pop(ino, None)
        self.due.pop(ino, None)
        self.copies.pop(ino, None)

    def set_op(self, op: Op) -> None:
        before = self.ops.get(op.seq)
        if before is not None:
            self._unlist(before)
        self.ops[op.seq] = op  # in its place, where it had one
        self.changed.add(op.seq)
        self._named[op.landing] += 1
        for key in dict.fromkeys(op.keys):
            there = self.by_key.setdefault(key, [])
            there.append(op.seq)
            there.sort()
        if op.kind is OpKind.PUT and op.ino:
            self.puts[op.ino] = max(op.seq, self.puts.get(op.ino, 0))  # a copy of it goes before it (`early`)
        elif op.ino:
            self.deletes.setdefault(op.ino, set()).add(op.seq)

    def unset_op(self, seq: int) -> None:
        before = self.ops.pop(seq, None)
        self.changed.add(seq)
        self.tried.discard(seq)
        if before is not None:
            self._unlist(before)
            self.parked.pop(seq, None)

    def _unlist(self, op: Op) -> None:
        self._named[op.landing] -= 1
        for key in dict.fromkeys(op.keys):
            there = self.by_key[key]
            there.remove(op.seq)
            if not there:
                del self.by_key[key]
        if op.kind is OpKind.PUT:
            if self.puts.get(op.ino) == op.seq:
                del self.puts[op.ino]
        elif op.ino:
            self.deletes[op.ino].discard(op.seq)
            if not self.deletes[op.ino]:
                del self.deletes[op.ino]

    def set_hidden(self, hidden: Hidden) -> None:
        self._index.hold(hidden.mount, hidden.key)
        self.hidden.setdefault((hidden.mount, names.directory(hidden.key)), set()).add(hidden.key)
        self.hidden_at[hidden.mount, hidden.key] = (hidden.parent, hidden.name)

    def unset_hidden(self, mount: int, key: str) -> None:
        if self.hidden_at.pop((mount, key), None) is not None:
            self._index.let_go(mount, key)
            at = mount, names.directory(key)
            self.hidden[at].discard(key)
            if not self.hidden[at]:
                del self.hidden[at]

    def set_kept(self, mount: int, key: str, kept: Kept | None) -> None:
        self._any_kept = self._any_kept or kept is not None
        with self._kept_lock:
            self._kept[mount, key] = kept

    def dispense_with(self, landing: int) -> None:
        """Remove a landing file, if nobody names it any more when the journal is synced."""
        if landing:
            self._dispensable.add(landing)


def is_hollow(node: Node) -> bool:
    """Whether it was landed without its bytes, which the bucket has, to be emptied; and was not yet."""
    return bool(node.landing) and node.origin is not None


def take_off(batch: "Batch", node: Node, op: Op, kept: Attributes) -> None:
    """A file that was landed and not written is the clean file that it was; `kept` is kept of it."""
    batch.drop_op(op)
    batch.drop_node(node)
    if kept != Attributes() and isinstance(op.expected, Version):
        batch.keep_attributes(node.mount, node.key, op.expected.token, node.kind, kept)


class Batch:
    """A transaction of the journal, and what memory makes of it when it is committed."""

    def __init__(self, ledger: Ledger, change: Change) -> None:
        self._ledger, self._change = ledger, change
        self._effects: list[Callable[[], object]] = []
        self._last: list[Callable[[], object]] = []  # what takes names away

    def then(self, effect: Callable[[], object]) -> None:
        """Do it when this is committed."""
        self._effects.append(effect)

    def take_effect(self) -> None:
        """It is committed. Who looks names up meanwhile sees both, the new and the old, never neither."""
        for effect in (*self._effects, *self._last):
            effect()

    def put_node(self, node: Node) -> None:
        self._change.put_node(node._replace(writers=node.writers - self._ledger.awaited[node.ino]))
        self.then(lambda: self._ledger.set_node(node))

    def set_writers(self, node: Node, writers: int) -> Node:
        """The node as it is with so many who have it open for writing."""
        self._change.set_writers(node.ino, writers - self._ledger.awaited[node.ino])
        new = node._replace(writers=writers)
        self.then(lambda: self._ledger.set_node(new))
        return new

    def set_synced(self, node: Node) -> None:
        """Its bytes are on the disk."""
        self._change.set_synced(node.ino)
        new = node._replace(synced=True)
        self.then(lambda: self._ledger.set_node(new))

    def drop_node(self, node: Node) -> None:
        self._change.drop_node(node.ino)
        self._last.append(lambda: self._ledger.unset_node(node.ino))
        self._ledger.dispense_with(node.landing)

    def add_op(self, op: Op) -> Op:
        added = self._change.add_op(op)
        self.then(lambda: self._ledger.set_op(added))
        return added

    def update_op(self, op: Op) -> None:
        self._change.update_op(op)
        self.then(lambda: self._ledger.set_op(op))

    def drop_op(self, op: Op) -> None:
        self._change.drop_op(op.seq)
        self.then(lambda: self._ledger.unset_op(op.seq))
        self._ledger.dispense_with(op.landing)

    def hide(self, hidden: Hidden) -> None:
        self._change.hide(hidden)
        self.then(lambda: self._ledger.set_hidden(hidden))

    def show(self, mount: int, key: str) -> None:
        self._change.show(mount, key)
        self._last.append(lambda: self._ledger.unset_hidden(mount, key))

    def keep_attributes(self, mount: int, key: str, token: str, kind: Kind, kept: Attributes) -> None:
        self._change.keep_attributes(mount, key, token, kind, kept)
        self.then(lambda: self._ledger.set_kept(mount, key, (token, kind, kept)))

    def drop_attributes(self, mount: int, key: str) -> None:
        self._change.drop_attributes(mount, key)
        self.then(lambda: self._ledger.set_kept(mount, key, None))
