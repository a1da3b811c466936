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
to what it is opened on; what does not fit goes to another turn of the same path, by `Stale`, on which
the kernel looks the name up again and is told of that turn. A node that nobody has open is bound to
nothing: the kernel lets go of the mode before it sends RELEASE.

A daemon that took over cannot know what its predecessors left open. So on a mount with passthrough
the life is part of a file's number, and a node of an earlier life is never opened again.

Pure but for a lock; `filesystem` asks.
"""

import threading
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


@dataclass(slots=True)
class _Turns:
    """A version of a path that is open, and has or had to be opened in more than one way meanwhile."""

    told: int
    """The turn that lookups are told of."""
    nodes: int
    """Turns that are open."""


class Nodes:
    """The nodes of one mount. Thread-safe."""

    def __init__(self, *, life: int = 0, passthrough: bool = False) -> None:
        """`life` counts the daemons that this mount has had before."""
        self._life = life & _LIFE if passthrough else 0
        self._passthrough = passthrough
        # Changed under the lock only; single looks need none. Invariants: `_open` holds a node between its
        # first open and its last close; `_turns` has a version exactly while one of its nodes is open
        # and one of them was refused.
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._turns: dict[int, _Turns] = {}  # by the number of turn 0

    def __repr__(self) -> str:
        return f"<Nodes {self.stats()}>"

    def node(self, entry: Entry) -> int:
        """The number of this version of this path, as the kernel is told of it now."""
        if not self._passthrough or entry.kind is Kind.DIRECTORY:
            return entry.ino | (entry.generation & _GENERATION) << _GENERATION_AT
        first = self._first(entry)
        turns = self._turns.get(first)
        return first if turns is None else first | turns.told << _TURN_AT

    def opened(self, node: int) -> Entry | None:
        """The entry that `node` was opened as; None when nobody has it open."""
        held = self._open.get(node)
        return held.entry if held else None

    def check(self, node: int, entry: Entry) -> None:
        """Raise Stale unless `entry` is the version that `node` names."""
        if read(node).generation != entry.generation & _GENERATION:
            raise Stale(f"{entry.name!r} has another version now than node {node}")

    def open(self, node: int, entry: Entry, backing: Backing | None = None) -> None:
        """Bind `node` to `backing`, or to being served, until as many `close`s. Raises Stale when it is
        open in another way, or may be."""
        with self._lock:
            if not self._passthrough:
                assert backing is None, "nothing is passed through on this mount"
            elif read(node).life != self._life:
                raise Stale(f"node {node} was told of by an earlier daemon: how it is open is not known")
            held = self._open.get(node)
            if held is None:
                self._open[node] = _Open(entry, backing, 1)
            elif held.backing == backing:
                held.opens += 1
            else:
                self._turn(entry, backing)
                raise Stale(f"node {node} is open in another way")
            turns = self._turns.get(self._first(entry))
            if turns is not None and held is None:
                turns.nodes += 1

    def close(self, node: int) -> None:
        """Undo one `open`."""
        with self._lock:
            held = self._open[node]
            held.opens -= 1
            if held.opens:
                return
            del self._open[node]
            first = self._first(held.entry)
            turns = self._turns.get(first)
            if turns is not None:
                turns.nodes -= 1
                if not turns.nodes:
                    del self._turns[first]

    def stats(self) -> NodeStats:
        with self._lock:
            passed = sum(held.backing is not None for held in self._open.values())
            return NodeStats(open=len(self._open), passthrough=passed)

    def _first(self, entry: Entry) -> int:
        """Turn 0 of this version in this life."""
        generation = entry.generation & _GENERATION
        return entry.ino | generation << _GENERATION_AT | self._life << _LIFE_AT

    def _turn(self, entry: Entry, backing: Backing | None) -> None:
        """Let lookups be told of a turn that can be opened on `backing`; under the lock."""
        first = self._first(entry)
        nodes = [(turn, self._open.get(first | turn << _TURN_AT)) for turn in range(_TURNS)]
        alike = [turn for turn, held in nodes if held is not None and held.backing == backing]
        free = [turn for turn, held in nodes if held is None]
        turns = self._turns.get(first)
        if turns is None:
            turns = self._turns[first] = _Turns(0, sum(held is not None for _, held in nodes))
        turns.told = (alike or free or [0])[0]
