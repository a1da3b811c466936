"""
Which of the things that the bucket is owed may be done now. Pure: no locks, no time.

1. Nothing earlier touches one of its keys, as target or as origin.
2. Before a *barrier*, all that is earlier and due is done.
3. What a rename leaves behind is deleted when the new name is there: a DELETE for a node waits for the
   PUTs of that node under other keys, later ones included. No barrier waits for such a DELETE, and a PUT
   does not wait for it on account of its origin: it would wait for itself.

An operation without `since` is not due (its file was never closed), and one that is parked waits for a
person. Both keep their keys to themselves; no barrier waits for them.

`runnable` says so in one look at everything. `Plan` says the same of what changes a little at a time, at
a cost that does not grow with all that waits: a hundred thousand operations are an evening's `cp -r`.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Sequence
from heapq import heappop, heappush

from datacache.writing.journal import Op, OpKind

Key = tuple[int, str]
"""Mount and key."""


def runnable(
    ops: Sequence[Op],
    running: Collection[int],
    *,
    parked: Collection[int] = (),
    closes: bool = False,
) -> list[Op]:
    """Those of `ops`, in order of `seq`, that may begin while `running` are under way. `closes`: every PUT
    is a barrier."""
    targets: dict[int, set[Key]] = {}
    for op in ops:
        if op.kind is OpKind.PUT and op.ino:
            targets.setdefault(op.ino, set()).add(_target(op))
    found: list[Op] = []
    ahead: dict[Key, list[Op]] = {}
    counted = 0
    for op in ops:
        free = not any(_blocks(other, op, key) for key in op.keys for other in ahead.get(key, ()))
        for key in op.keys:
            ahead.setdefault(key, []).append(op)
        if not op.since or op.seq in parked:
            continue
        if _waits_for_name(op, targets.get(op.ino, ())):
            continue
        if free and op.seq not in running and not (counted and _is_barrier(op, closes)):
            found.append(op)
        counted += 1
    return found


def needed(ops: Sequence[Op], wanted: Collection[int], *, closes: bool = False) -> set[int]:
    """`wanted`, and all that has to be done before these are."""
    puts: dict[int, list[int]] = {}
    for op in ops:
        if op.kind is OpKind.PUT and op.ino:
            puts.setdefault(op.ino, []).append(op.seq)
    found = set(wanted)
    while True:
        before = len(found)
        keys: set[Key] = set()
        everything = False
        for op in reversed(ops):
            if op.seq in found or everything or not keys.isdisjoint(op.keys):
                found.add(op.seq)
                keys.update(op.keys)
                everything = everything or _is_barrier(op, closes)
                if op.kind is OpKind.DELETE and op.ino:
                    found.update(puts.get(op.ino, ()))
        if len(found) == before:
            return found


class Plan:
    """What is owed, held so that what may begin next is found without looking at all of it.

    Told of every change, it names (`news`) those operations that the change may have set free; `may` says
    whether one really is. What is under way stays in the plan, in everybody's way, until it is removed.
    """

    def __init__(self, *, closes: bool = False) -> None:
        self._closes = closes
        self._ops: dict[int, Op] = {}
        self._parked: frozenset[int] = frozenset()
        self._lines: dict[Key, list[int]] = {}  # who touches a key, in order
        self._puts: dict[int, set[int]] = {}  # of each node
        self._deletes: dict[int, set[int]] = {}
        # Holds all that a barrier waits for, and some that it did once: the first of those is at the top
        # after `_first` has thrown away what lies above it.
        self._counted: list[int] = []
        self._news: set[int] = set()

    def __repr__(self) -> str:
        return f"<Plan of {len(self._ops)} operations>"

    def __len__(self) -> int:
        return len(self._ops)

    def __contains__(self, seq: int) -> bool:
        return seq in self._ops

    def get(self, seq: int) -> Op | None:
        return self._ops.get(seq)

    def put(self, op: Op) -> None:
        """Have `op`, in place of what has its `seq`."""
        old = self._ops.get(op.seq)
        if old is not None:
            if old == op:
                self._ops[op.seq] = op
                return
            self._unlink(old)
        self._ops[op.seq] = op
        for key in dict.fromkeys(op.keys):
            insort(self._lines.setdefault(key, []), op.seq)
            self._look_at_line(key)
        if op.ino:
            same = self._puts if op.kind is OpKind.PUT else self._deletes
            same.setdefault(op.ino, set()).add(op.seq)
        heappush(self._counted, op.seq)
        self._look_at_deletes(op.ino)
        self._look_at_first()

    def remove(self, seq: int) -> Op | None:
        """It is not owed any more; what was."""
        op = self._ops.pop(seq, None)
        if op is not None:
            self._unlink(op)
            self._look_at_first()
        return op

    def park(self, parked: Iterable[int]) -> None:
        """These, and no others, wait for a person."""
        new = frozenset(parked)
        if new != self._parked:
            changed, self._parked = new ^ self._parked, new
            for seq in changed & self._ops.keys():
                heappush(self._counted, seq)
                self._news.add(seq)
            self._look_at_first()

    @property
    def parked(self) -> frozenset[int]:
        return self._parked

    def news(self) -> Iterable[int]:
        """Those that may have become free since this was called last."""
        news, self._news = self._news, set()
        return news

    def may(self, seq: int) -> bool:
        """Whether it may begin, unless it is under way."""
        op = self._ops.get(seq)
        if op is None or not self._counts(op):
            return False
        if _is_barrier(op, self._closes) and self._first() != seq:
            return False
        return not any(self._is_blocked(op, key) for key in op.keys)

    def _is_blocked(self, op: Op, key: Key) -> bool:
        for seq in self._lines[key]:
            if seq >= op.seq:
                return False
            if _blocks(self._ops[seq], op, key):
                return True
        return False

    def _counts(self, op: Op) -> bool:
        """Whether a barrier waits for it."""
        if not op.since or op.seq in self._parked:
            return False
        if op.kind is OpKind.PUT or not op.ino:
            return True
        return not _waits_for_name(op, {_target(self._ops[seq]) for seq in self._puts.get(op.ino, ())})

    def _first(self) -> int | None:
        """The first that a barrier waits for."""
        while self._counted:
            op = self._ops.get(self._counted[0])
            if op is not None and self._counts(op):
                return op.seq
            heappop(self._counted)
        return None

    def _unlink(self, op: Op) -> None:
        for key in dict.fromkeys(op.keys):
            line = self._lines[key]
            del line[bisect_left(line, op.seq)]
            if line:
                self._look_at_line(key)
            else:
                del self._lines[key]
        if op.ino:
            same = self._puts if op.kind is OpKind.PUT else self._deletes
            same[op.ino].discard(op.seq)
            if not same[op.ino]:
                del same[op.ino]
            self._look_at_deletes(op.ino)

    def _look_at_line(self, key: Key) -> None:
        for seq in self._lines[key]:
            self._news.add(seq)
            op = self._ops.get(seq)
            if op is not None and (op.kind is OpKind.PUT or not op.ino):
                return  # whoever is behind this one waits

    def _look_at_deletes(self, ino: int) -> None:
        for seq in self._deletes.get(ino, ()):
            heappush(self._counted, seq)
            self._news.add(seq)

    def _look_at_first(self) -> None:
        first = self._first()
        if first is not None:
            self._news.add(first)


def _target(op: Op) -> Key:
    return op.mount, op.key


def _is_barrier(op: Op, closes: bool) -> bool:
    return op.barrier or (closes and op.kind is OpKind.PUT)


def _blocks(earlier: Op, op: Op, key: Key) -> bool:
    """Whether `earlier` keeps `op` from `key`."""
    return not (
        op.kind is OpKind.PUT
        and earlier.kind is OpKind.DELETE
        and op.ino == earlier.ino != 0
        and key == _target(earlier) != _target(op)
    )


def _waits_for_name(op: Op, targets: Collection[Key]) -> bool:
    """Whether `op` is what a rename leaves behind, and the new name is not there yet."""
    return op.kind is OpKind.DELETE and op.ino != 0 and any(target != _target(op) for target in targets)
