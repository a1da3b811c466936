"""
Which of the things that the bucket is owed may be done now. Pure.
"""

from collections.abc import Collection, Sequence

from datacache.writing.journal import Op, OpKind


def runnable(ops: Sequence[Op], running: Collection[int]) -> list[Op]:
    """Those of `ops`, in order of `seq`, that may begin while `running` are under way.

    1. Nothing earlier touches one of its keys.
    2. Before a barrier all that is earlier, and due, is done.
    3. What a rename leaves behind is deleted when the new name is there: a DELETE for a node waits for
       all PUTs of that node.

    An operation without `since` is not due: its file was never closed.
    """
    found: list[Op] = []
    busy: set[tuple[int, str]] = set()
    putting = {op.ino for op in ops if op.kind is OpKind.PUT and op.ino}
    due = 0
    for op in ops:
        keys = op.keys
        free = not busy.intersection(keys)
        busy.update(keys)
        if not op.since:
            continue
        due += 1
        if op.seq in running or not free or (op.barrier and due > 1):
            continue
        if op.kind is OpKind.DELETE and op.ino in putting:
            continue
        found.append(op)
    return found
