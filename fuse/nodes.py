"""
What a FUSE node names: one version of one path.

The kernel keeps attributes, pages and open files by node, so bytes can only stay one version if a
node does. The first version of a path that the kernel hears of has the path's `ino` as its node;
each other version gets a number from `LATER` upwards, never used twice in the life of the mount.
pyfuse3 has one number for the node and for `st_ino`, so a path whose object changed shows a new
`st_ino` while the old version is remembered by the kernel, and its own again after that.

Kept small on purpose: `find` over a million files makes a million nodes. A node is two integers, its
count and a mark of its version; size, key and name are the index's, and are kept here only while
the node is open. A node whose path has moved on and that nobody has open cannot be described any
more: `Stale`, on which the kernel looks the name up again.

Pure but for a lock; `filesystem` asks, the kernel's LOOKUP and FORGET count.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from datacache.model import Entry

LATER = 1 << 48
"""Where the numbers of later versions begin; paths' own numbers (row ids) stay far below."""


class Stale(Exception):
    """The path of this node has another version now, and nobody has this one open."""


@dataclass(frozen=True)
class NodeStats:
    """How many nodes there are."""

    known: int
    """Nodes that the kernel remembers."""
    later: int
    """Of these: later versions of a path."""
    open: int
    """Nodes that are open."""


@dataclass(slots=True)
class _Open:
    entry: Entry
    opens: int


def _mark(entry: Entry) -> int:
    """64 bits that differ when the version does (or the kind: `a` may become a directory `a/`)."""
    return hash((entry.kind, entry.version))


class Nodes:
    """The nodes that the kernel knows of. Thread-safe."""

    def __init__(self) -> None:
        # All state below is changed under this lock only (single looks need none). Invariant: a node is
        # in `_counts` exactly when it is in `_marks`, and in `_paths` exactly when it is also LATER or
        # above; `_newest` maps a path to one of its nodes in `_paths`; `_open` holds nodes between their
        # first open and their last close.
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}
        self._marks: dict[int, int] = {}
        self._paths: dict[int, int] = {}
        self._newest: dict[int, int] = {}
        self._open: dict[int, _Open] = {}
        self._next = LATER

    def __repr__(self) -> str:
        return f"<Nodes {self.stats()}>"

    def remember(self, entry: Entry) -> int:
        """The node of this version of this path, counted once more: the kernel is about to be told."""
        mark, ino = _mark(entry), entry.ino
        with self._lock:
            node = self._newest.get(ino, ino)
            if self._marks.get(node) != mark:
                node = ino
                if self._marks.get(ino, mark) != mark:
                    node = self._newest[ino] = self._next
                    self._next += 1
                    self._paths[node] = ino
            self._marks[node] = mark
            self._counts[node] = self._counts.get(node, 0) + 1
        return node

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """Take (node, count) pairs back: the kernel has let go of them."""
        with self._lock:
            for node, count in forgotten:
                left = self._counts.get(node, 0) - count
                if left > 0:
                    self._counts[node] = left
                    continue
                self._counts.pop(node, None)
                self._marks.pop(node, None)
                ino = self._paths.pop(node, None)
                if ino is not None and self._newest.get(ino) == node:
                    del self._newest[ino]

    def path(self, node: int) -> int:
        """The `ino` of the path that `node` is a version of. Raises Stale for a node never told of."""
        if node < LATER:
            return node
        with self._lock:
            if (ino := self._paths.get(node)) is None:
                raise Stale(f"node {node} was never given out")
            return ino

    def opened(self, node: int) -> Entry | None:
        """The entry that `node` was opened as; None when nobody has it open."""
        held = self._open.get(node)
        return held.entry if held else None

    def check(self, node: int, entry: Entry) -> None:
        """Raise Stale unless `entry` is the version that `node` names."""
        # A node that is not remembered is named by no kernel object with state: any version will do.
        mark = self._marks.get(node)
        if mark is not None and mark != _mark(entry):
            raise Stale(f"{entry.name!r} has another version now than node {node}")

    def open(self, node: int, entry: Entry) -> None:
        """Keep `entry` as what `node` is, until as many `close`s."""
        with self._lock:
            held = self._open.get(node)
            if held is None:
                self._open[node] = _Open(entry, 1)
            else:
                held.opens += 1

    def close(self, node: int) -> None:
        """Undo one `open`."""
        with self._lock:
            held = self._open[node]
            held.opens -= 1
            if not held.opens:
                del self._open[node]

    def stats(self) -> NodeStats:
        with self._lock:
            return NodeStats(known=len(self._counts), later=len(self._paths), open=len(self._open))
