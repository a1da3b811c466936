"""
What the bucket is owed when something has changed here: which operations are added, and which are not wanted
any more.

Of a key, there is one PUT at most that is not under way, and it carries the newest content: what was
owed before it is superseded. One that is under way is not called back, since it may have taken effect; it
is told that nobody waits for it, and what follows it is of its lineage.
"""

import os
from collections.abc import Callable
from typing import Protocol

from datacache.clock import Clock
from datacache.index import names
from datacache.model import Kind, Version
from datacache.writing.journal import ANYTHING, Node, Op, OpKind
from datacache.writing.ledger import Batch, Ledger

Expected = str | Version
"""What the bucket holds under a key: a version, `NOTHING`, or `ANYTHING` where that is not known."""


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


class Owing:
    """Adds to what the bucket is owed. Called with the ledger's lock held, `poke` and `attach` without it."""

    def __init__(self, ledger: Ledger, clock: Clock, *, accepts: Callable[[int, str], bool]) -> None:
        """`accepts`: whether the store of a mount point can have such a key."""
        self._ledger, self._clock, self._accepts = ledger, clock, accepts
        self._uploads: Uploads = _NoUploads()

    def __repr__(self) -> str:
        return f"<Owing {len(self._ledger.ops)} operations>"

    def attach(self, uploads: Uploads) -> None:
        """Tell `uploads` of what is to be done, and of what an earlier process has left."""
        self._uploads = uploads
        for op in self._ledger.left:
            uploads.forget(op)
        self._ledger.left.clear()
        uploads.poke()

    def poke(self) -> None:
        """There is something new to do."""
        self._uploads.poke()

    def forget(self, op: Op) -> None:
        """Nobody goes on with it: what the store keeps for it (parts) can go."""
        self._uploads.forget(op)

    def supersede(self, batch: Batch, mount: int, key: str) -> tuple[Expected | None, bool, str]:
        """Nothing that the bucket was owed under a key is wanted any more: what it holds there, or will when
        what is under way is done; None where nothing was owed. And whether some of that is under way, or may
        have taken effect unheard; the id for what comes in its place is then of its lineage, by which the
        uploader knows that effect for ours."""
        expected: Expected | None = None
        tried, mark = False, new_id()
        for seq in self._ledger.by_key.get((mount, key), ()):
            op = self._ledger.ops[seq]
            if (op.mount, op.key) != (mount, key):
                continue  # it only reads what is there
            if expected is None:
                expected = op.expected
            # A later content of a lineage: what an earlier one of it has put may stand there.
            if seq in self._ledger.tried or not op.id.endswith(".0"):
                tried, mark = True, next_id(op.id)
            if seq in self._ledger.running:
                batch.update_op(op._replace(ino=0))
                batch.then(lambda op=op: self.edit(op))  # type: ignore[misc]
            else:
                self.drop(batch, op)
        return expected, tried, mark

    def drop(self, batch: Batch, op: Op) -> None:
        """It is not owed any more, and nobody goes on with its parts."""
        batch.drop_op(op)
        if op.resume:
            batch.then(lambda: self.forget(op))

    def owe_last(self, batch: Batch, op: Op, *, since: float) -> None:
        """Owe what is owed for a node after all that is owed by now. One that is under way was told to stop;
        until it has, it is in the way of what follows, which is of its lineage."""
        self.drop(batch, op)
        batch.add_op(op._replace(seq=0, since=since, resume=""))

    def owe_put(self, batch: Batch, node: Node, there: Expected, *, due: bool, barrier: bool = False) -> None:
        """Owe the bucket a node, in place of what it was owed under the key, where it holds `there`, as far
        as nothing else is known."""
        before, _, mark = self.supersede(batch, node.mount, node.key)
        expected = there if before is None else before
        if node.kind is Kind.DIRECTORY:
            expected = ANYTHING
        if (node.mount, node.key) in self._ledger.hidden_at:
            batch.show(node.mount, node.key)
        if node.kind is Kind.DIRECTORY and not self._accepts(node.mount, node.key):
            return  # a directory is there when something is in it; until then, it is here only
        batch.add_op(
            Op(
                0, mark, OpKind.PUT, node.ino, node.mount, node.key, barrier, expected, node.landing,
                None if node.landing else node.origin, self._clock.wall() if due else 0.0,
            )
        )  # fmt: skip

    def done(self, batch: Batch, op: Op, there: Expected) -> None:
        """Drop an operation, and tell the next one on its key what it left there."""
        batch.drop_op(op)
        for seq in self._ledger.by_key.get((op.mount, op.key), ()):
            later = self._ledger.ops[seq]
            if seq > op.seq and (later.mount, later.key) == (op.mount, op.key):
                if later.expected != ANYTHING:
                    batch.update_op(later._replace(expected=there))
                break

    def edit(self, op: Op) -> None:
        """Who reads the bytes of an operation stops, and what it brings about is not the end of it."""
        if op.seq in self._ledger.running:
            content = self._ledger.running[op.seq]
            if content is not None:
                content.stop()
            self._uploads.stop_op(op.seq)
        if op.resume:
            self._uploads.forget(op)


def beside(name: bytes, *words: str) -> bytes:
    """A name for what cannot have its own: cut, where it would be too long for a name."""
    tail = "".join(f".{word}" for word in words if word).encode()
    if len(name) + len(tail) > names.NAME_MAX:
        name = name[: names.NAME_MAX - len(tail)].decode(errors="ignore").encode()
    return name + tail


def new_id() -> str:
    return f"{os.urandom(16).hex()}.0"


def next_id(id: str) -> str:
    """Of another content of the same operation."""
    lineage, _, count = id.partition(".")
    return f"{lineage}.{int(count) + 1}"
