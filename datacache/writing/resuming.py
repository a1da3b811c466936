"""
What a process makes of the journal that an earlier one has left.

The journal says mount and key of everything, so it holds without the numbers that it was written with.
A daemon that takes a mount over keeps them, since the kernel uses them; a fresh mount gives out new ones.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress

from datacache.clock import Clock
from datacache.errors import NoSuchPath
from datacache.index import names
from datacache.index.live import LiveIndex
from datacache.model import Kind
from datacache.writing.journal import NOTHING, Hidden, Node, OpKind
from datacache.writing.ledger import Ledger, is_hollow, take_off
from datacache.writing.owing import beside, new_id

_log = logging.getLogger(__name__)


def go_on(ledger: Ledger, index: LiveIndex, clock: Clock, *, leases_tell: bool) -> None:
    """An earlier daemon of this mount died: numbers are good, and the kernel uses them. `leases_tell`: all
    writers are the kernel's own (passthrough), so leases tell of those that the earlier daemon had."""
    for hidden in ledger.journal.hidden():
        ledger.set_hidden(hidden)
    for op in ledger.journal.ops():
        ledger.set_op(op)
    nodes = ledger.journal.nodes()
    untouched = [node for node in nodes if _is_untouched(ledger, node)]
    nodes = [node for node in nodes if node not in untouched]
    with index.changing() as changing:
        for (_, key), (parent, _) in ledger.hidden_at.items():
            changing.vanish(parent, names.to_bytes(key))
        for node in nodes:
            ledger.set_node(node)
            if node.orphan:
                changing.bury(node.ino)
            else:
                own = names.to_bytes(node.key)
                changing.place(node.ino, node.parent, node.name, node.mount, own)
    open_now = {node.ino for node in nodes if node.writers and not leases_tell}
    with ledger.changing("resume") as batch:
        for node in nodes:
            if node.writers and leases_tell:
                batch.set_writers(node, 0)
        clean = {ledger.puts[node.ino] for node in untouched if node.ino in ledger.puts}
        for node in untouched:
            kept = node.attributes
            with suppress(NoSuchPath):
                if node.origin is not None and index.entry(node.ino).mtime_ns != node.origin.mtime_ns:
                    kept = kept._replace(mtime_ns=node.origin.mtime_ns)
            take_off(batch, node, ledger.ops[ledger.puts[node.ino]], kept)
        for op in ledger.ops.values():
            if op.seq in clean:
                continue
            # What nobody has open was landed for an open that may never come: no close makes it due.
            if not op.since and op.ino not in open_now:
                batch.update_op(op._replace(since=clock.wall()))


def begin_anew(ledger: Ledger, index: LiveIndex, clock: Clock, roots: Sequence[int], *, boot: str) -> None:
    """A fresh mount: nobody has anything open, and numbers mean nothing. What was not closed is due as
    it is: all of it that was synced is there. Of what never was, another `boot` may have left anything: that
    goes under a name of its own."""
    hidden, ops = ledger.journal.hidden(), ledger.journal.ops()
    nodes = sorted(
        ledger.journal.nodes(), key=lambda node: node.key.count("/") - (node.kind is Kind.DIRECTORY)
    )
    there = set(ledger.landing.files())
    wanted, aside = {node.ino for node in nodes if not node.orphan}, dict[int, Node]()
    if ledger.journal.meta().get("boot", boot) != boot:
        nodes, aside = _after_a_power_cut(ledger, nodes, there)
    known: dict[tuple[int, str], int] = {}
    numbers: dict[int, int] = {}
    with index.changing() as changing:

        def place(mount: int, key: str) -> tuple[int, bytes]:
            """Directory and name of a key."""
            *above, last = key.removesuffix("/").split("/")
            at, path = roots[mount], ""
            for segment in above:
                path += segment + "/"
                ino = known.get((mount, path))
                if ino is None:
                    ino = changing.adopt(at, names.shown(segment), mount, names.to_bytes(path))
                    known[mount, path] = ino
                at = ino
            return at, names.shown(last)

        for node in nodes:
            if node.orphan or _is_untouched(ledger, node):
                continue
            if node.landing and node.landing not in there:
                _log.info("%r was never synced before the power went: it is as it was before", node.key)
                continue
            at, name = place(node.mount, node.key)
            row = int(Kind.DIRECTORY if node.kind is Kind.DIRECTORY else Kind.FILE)
            ino, generation = changing.claim(at, name, row, node.mount, names.to_bytes(node.key))
            known[node.mount, node.key] = numbers[node.ino] = ino
            ledger.set_node(node._replace(ino=ino, parent=at, name=name, generation=generation, writers=0))
        # What had another name before, and did not get to its new one: the bucket has it under the old one.
        lost = aside.keys() | (wanted - numbers.keys())
        renamed = {op.seq: op for op in ops if op.kind is OpKind.DELETE and op.ino in lost}
        still = {(op.mount, op.key) for op in renamed.values()}
        back = {op.ino for op in renamed.values()}
        for node in ledger.journal.nodes():
            if node.ino in back:
                at, _ = place(node.mount, node.key)
                changing.vanish(at, names.to_bytes(node.key))
        for one in hidden:
            if (one.mount, one.key) in still:
                continue
            at, name = place(one.mount, one.key)
            ledger.set_hidden(one._replace(parent=at, name=name))
            changing.vanish(at, names.to_bytes(one.key))
    with ledger.journal.change("anew") as change:
        change.clear_nodes()
        change.clear_hidden()
        for node in ledger.nodes.values():
            change.put_node(node)
        for (mount, key), (at, name) in ledger.hidden_at.items():
            change.hide(Hidden(at, name, mount, key))
        for op in ops:
            if op.seq in renamed:
                change.drop_op(op.seq)
                continue
            ino = numbers.get(op.ino, 0)
            if op.kind is OpKind.PUT and ((not ino and op.ino) or (op.landing and op.landing not in there)):
                change.drop_op(op.seq)  # of what was unlinked, or is not there
                ledger.left.append(op)
                continue
            new = op._replace(ino=ino, since=op.since or clock.wall())
            other = aside.get(op.ino)
            if op.kind is OpKind.PUT and other is not None and other.landing == op.landing:
                new = new._replace(id=new_id(), key=other.key, expected=NOTHING, resume="")
            change.update_op(new)
            ledger.set_op(new)
        change.set_meta("index", index.identity)
        change.set_meta("boot", boot)


def _after_a_power_cut(
    ledger: Ledger, nodes: Sequence[Node], there: set[int]
) -> tuple[list[Node], dict[int, Node]]:
    """What is left of nodes; and of them, by number, those that are set aside.

    A file system may have the size of a file and not its bytes. Whoever wrote it was never told that they are
    safe, so the name belongs to what was there before; but the bytes may be all that there is of it.
    """
    left: list[Node] = []
    aside: dict[int, Node] = {}
    for node in nodes:
        if _is_untouched(ledger, node):
            continue
        if node.landing in there and node.kind is Kind.SYMLINK:
            ledger.landing.write(node.landing, node.attributes.target or b"")
        elif node.landing in there and not node.synced and not node.orphan:
            if not ledger.landing.stat(node.landing).st_size:
                _log.warning("%r was being written when the power went, and none of it is there", node.key)
                continue
            above, slash, last = node.key.rpartition("/")
            name = beside(names.to_bytes(last), "unsynced", new_id()[:8])
            key = above + slash + names.to_text(name)
            _log.warning(
                "%r was being written when the power went, and was never synced: what there is of it is %r",
                node.key, key,
            )  # fmt: skip
            node = aside[node.ino] = node._replace(key=key, synced=True)
        left.append(node)
    return left, aside


def _is_untouched(ledger: Ledger, node: Node) -> bool:
    """Whether a file that was landed to be emptied never was: who should have is told of an error, or was
    killed with the daemon that asked for it to come again."""
    if not is_hollow(node) or node.origin is None or node.orphan:
        return False
    if node.landing not in ledger.landing.files():
        return True
    st = ledger.landing.stat(node.landing)
    return (st.st_size, st.st_mtime_ns) == (0, node.origin.mtime_ns)
