"""
What a FUSE node names: one version of one path, and where it matters in one open mode.

The kernel keeps attributes, pages and open files by node, so bytes can only stay one version if a
node does. A node's number is arithmetic: the path's `ino` (which is never used twice), the
*generation* of its version (which the index counts and never takes back), the *life* of the daemon
that told of it, and a *turn* that changes when the open mode must. So a number needs no table to be
read, a million files cost no memory, and a daemon that takes a mount over from a dead one knows what
every number names: there is nothing to be handed down.

Open modes. The kernel lets a node be open in one mode at a time: *served* (reads are requests, and
fill the page cache) or *passthrough* onto one cached file. Another mode or another file, while it is
open, is an error that a reader would see (EIO or EBUSY). Both rules live here: `open` binds a node
to what it is opened on, and whoever opens it meanwhile is told to open it on the same. Only where a
node is served and its file could be passed through by now, the opener is refused by `Stale`, on which the
kernel looks the name up again and is told of another turn of the same path. A node that nobody has
open is bound to nothing: the kernel lets go of the mode before it sends RELEASE.

The kernel looks up again once: a second refusal of one open(2) is an error that its caller sees. So
whoever was refused, for whatever reason, is told of a turn other than 0, and no such turn is ever refused
for its mode.

A version that is being written is open in one node only (`sole`): whoever has it open must see what the
others write, and lock against them. It is never refused for its mode: where it is served, it stays so.

A daemon that took over cannot know what its predecessors left open. So on a mount with passthrough
the life is part of a file's number, and a node of an earlier life is never opened again.

Pure but for a lock; `filesystem` asks.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from datacache.index.database import INO_BITS
from datacache.model import Entry, Kind

GENERATION_BITS, LIFE_BITS, TURN_BITS = 12, 8, 4
"""How often each can change before a number comes again: versions of a path, restarts of a daemon, modes in
which one version is open at once. A file that is held open over 256 restarts can meet its own number again,
and opening it anew is EIO. With INO_BITS 64, all that a node has; where there is but one number for a node
and `st_ino` (pyfuse3), life and turn are 0: some programs take `st_ino` for signed."""

_INO, _GENERATION, _LIFE = (1 << INO_BITS) - 1, (1 << GENERATION_BITS) - 1, (1 << LIFE_BITS) - 1
_TURNS = 1 << TURN_BITS
_GENERATION_AT = INO_BITS
_LIFE_AT = _GENERATION_AT + GENERATION_BITS
_TURN_AT = _LIFE_AT + LIFE_BITS

REMEMBERED = 4096
"""Versions of which we still know, after a refusal, which turn lookups are told of: more than there are
opens under way."""

Backing = tuple[int, int]
"""Device and inode of a cached file that the kernel reads itself."""


class Stale(Exception):
    """This node is not what its path is, or can be opened as, now: look the name up again."""


class Name(NamedTuple):
    """What a node's number says."""

    ino: int
    generation: int
    """The version's generation, modulo 2**GENERATION_BITS."""
    life: int = 0
    turn: int = 0

    @property
    def number(self) -> int:
        return self.ino | self.generation << _GENERATION_AT | self.life << _LIFE_AT | self.turn << _TURN_AT

    def generation_near(self, newest: int) -> int:
        """The whole generation, of a path whose newest is `newest`."""
        return newest - ((newest - self.generation) & _GENERATION)


def read(node: int) -> Name:
    """What the number `node` says."""
    return Name(
        node & _INO,
        node >> _GENERATION_AT & _GENERATION,
        node >> _LIFE_AT & _LIFE,
        node >> _TURN_AT,
    )


def path(node: int) -> int:
    """The `ino` of the path that `node` is a version of."""
    return node & _INO


@dataclass(frozen=True)
class NodeStats:
    """What is open."""

    open: int
    """Nodes that are open."""
    passthrough: int
    """Of these: read by the kernel itself."""


@dataclass(slots=True)
class _Open:
    entry: Entry
    backing: Backing | None
    """None: served."""
    opens: int


class Nodes:
    """The nodes of one mount. Thread-safe."""

    def __init__(self, *, life: int = 0, passthrough: bool = False) -> None:
        """`life` counts the daemons that this mount has had before."""
        self._life = life & _LIFE if passthrough else 0
        self._passthrough = passthrough
        # Changed under the lock only; single looks need none. Invariant: `_open` holds a node between its
        # first open and its last close.
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._told: OrderedDict[int, int] = OrderedDict()  # turns, by the number of turn 0; latest last

    def __repr__(self) -> str:
        return f"<Nodes {self.stats()}>"

    def node(self, entry: Entry, *, sole: bool = False) -> int:
        """The number of this version of this path, as the kernel is told of it now."""
        if not self._passthrough or entry.kind is Kind.DIRECTORY:
            return entry.ino | (entry.generation & _GENERATION) << _GENERATION_AT
        first = self._first(entry)
        return first if sole else first | self._told.get(first, 0) << _TURN_AT

    def opened(self, node: int) -> Entry | None:
        """The entry that `node` was opened as; None when nobody has it open."""
        held = self._open.get(node)
        return held.entry if held else None

    def check(self, node: int, entry: Entry, *, sole: bool = False) -> None:
        """Raise Stale unless `entry` is the version that `node` names."""
        if read(node).generation != entry.generation & _GENERATION:
            if not sole:
                with self._lock:
                    self._tell_another(entry)
            raise Stale(f"{entry.name!r} has another version now than node {node}")

    def check_life(self, node: int) -> None:
        """Raise Stale for a node that cannot be opened any more, since an earlier daemon told of it."""
        if self._passthrough and read(node).life != self._life:
            raise Stale(f"node {node} was told of by an earlier daemon: how it is open is not known")

    def open(
        self, node: int, entry: Entry, backing: Backing | None = None, *, sole: bool = False
    ) -> Backing | None:
        """Bind `node` to `backing`, or to being served, until as many `close`s; or where it is open, count
        one more. What it is bound to: that is how it must be opened. Raises Stale when it must not be."""
        with self._lock:
            if not self._passthrough:
                assert backing is None, "nothing is passed through on this mount"
            elif read(node).life != self._life and not sole:
                self._tell_another(entry, backing)
            self.check_life(node)
            held = self._open.get(node)
            if held is None:
                self._open[node] = _Open(entry, backing, 1)
                return backing
            if held.backing is None and backing is not None and not sole:
                self._tell_another(entry, backing)
                if not read(node).turn:
                    raise Stale(f"node {node} is served, and could be passed through by now")
            held.opens += 1
            return held.backing

    def close(self, node: int) -> None:
        """Undo one `open`."""
        with self._lock:
            held = self._open[node]
            held.opens -= 1
            if not held.opens:
                del self._open[node]

    def stats(self) -> NodeStats:
        with self._lock:
            passed = sum(held.backing is not None for held in self._open.values())
            return NodeStats(open=len(self._open), passthrough=passed)

    def _first(self, entry: Entry) -> int:
        """Turn 0 of this version in this life."""
        generation = entry.generation & _GENERATION
        return entry.ino | generation << _GENERATION_AT | self._life << _LIFE_AT

    def _tell_another(self, entry: Entry, backing: Backing | None = None) -> None:
        """Let lookups be told of a turn that is never refused, and can be opened on `backing` if any can;
        under the lock."""
        if not self._passthrough:
            return
        first = self._first(entry)
        nodes = [(turn, self._open.get(first | turn << _TURN_AT)) for turn in range(1, _TURNS)]
        alike = [turn for turn, held in nodes if held is not None and held.backing == backing]
        free = [turn for turn, held in nodes if held is None]
        self._told[first] = (alike or free or [1])[0]
        self._told.move_to_end(first)
        if len(self._told) > REMEMBERED:
            self._told.popitem(last=False)
