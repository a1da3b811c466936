"""
What becomes of what the bucket is owed: the side of the overlay that the uploader talks to.

What was begun ends in one of three ways. Settled: the bucket holds it, so the path is clean and is the
live index's again, in that order, so that nobody finds neither. Stopped: it stays owed. Conflict:
somebody else has changed the object, and nobody's data is lost (`Conflict`).
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

from datacache.config.settings import Conflict
from datacache.errors import LandingBroken, NoSuchPath, NotFound, NotHere, Stopped, VersionChanged
from datacache.index import names
from datacache.model import Entry, Kind
from datacache.sources.sink import Stored
from datacache.writing.copies import Ready
from datacache.writing.journal import NOTHING, Attributes, Node, Op, OpKind
from datacache.writing.landing import Quiet
from datacache.writing.overlay import Overlay
from datacache.writing.owing import Expected, beside, next_id
from datacache.writing.steps import step

_log = logging.getLogger(__name__)

SENT_XATTRS = 1024
"""Bytes of extended attributes that are sent with an object: a store takes 2 KiB of metadata (S3)."""
_S_IF = {Kind.DIRECTORY: 0o040000, Kind.FILE: 0o100000, Kind.SYMLINK: 0o120000}


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


class Settling:
    """Implements `sending.Work` for an overlay; see the module. Thread-safe."""

    def __init__(self, overlay: Overlay, *, conflict: Conflict, host: str) -> None:
        """`host` is in the names of conflict files."""
        self._overlay, self._ledger, self._owing = overlay, overlay.ledger, overlay.owing
        self._lock = self._ledger.lock
        self._policy, self._host = conflict, host
        self._conflicts = 0

    def __repr__(self) -> str:
        return f"<Settling {len(self._ledger.ops)} operations, {len(self._ledger.running)} under way>"

    def ops(self) -> Sequence[Op]:
        """All that is pending, in order."""
        with self._lock:
            return list(self._ledger.ops.values())

    def changed(self) -> Collection[int]:
        """`seq` of what is new, or another, or not pending any more, since this was asked before."""
        with self._lock:
            changed, self._ledger.changed = self._ledger.changed, set()
            return changed

    def op(self, seq: int) -> Op | None:
        """One of them, as it is now."""
        return self._ledger.ops.get(seq)

    def begin(self, op: Op) -> Op | None:
        """It is about to be done: as it is now; None where that is not to be. Raises LandingBroken."""
        if op.kind is OpKind.DELETE:
            # After a power cut the journal must not say that a file is the object which is deleted now.
            self._ledger.sync()
        with self._lock:
            now = self._ledger.ops.get(op.seq)
            if now is None or not now.since or now.seq in self._ledger.running:
                return None
            if now.seq in self._ledger.parked:
                return None
            self._ledger.running[now.seq] = None
            self._ledger.tried.add(now.seq)
            return now

    def content(self, op: Op) -> Quiet | None:
        """The bytes of a PUT, which nobody can write to; None where somebody can, now."""
        with self._lock:
            node = self._ledger.nodes.get(op.ino)
            if node is not None and node.writers and node.landing == op.landing:
                return None
            quiet = self._ledger.landing.quiet(op.landing)
            if quiet is not None and op.seq in self._ledger.running:
                self._ledger.running[op.seq] = quiet
            return quiet

    def held(self, op: Op, content: Quiet) -> Stored | None:
        """What the bucket has, where it is known to have `content` already: it was copied while it was
        open, and has not been written since."""
        copied = self._ledger.copies.get(op.ino)
        if copied is None or copied.stored is None or not content.leased:
            return None
        same = (copied.landing, copied.look) == (op.landing, content.look)
        return copied.stored if same and op.expected == copied.stored.info.version else None

    def fetch(self, op: Op) -> Quiet:
        """The bytes of a PUT whose object stands under another key, in a landing file of its own."""
        assert op.origin is not None
        number = self._ledger.landing.create()
        try:
            info = op.origin
            entry = Entry(0, 0, b"", Kind.FILE, info.size, info.mtime_ns, op.mount, info.key, info.version)
            try:
                if entry.size:
                    self._overlay.fill(number, entry)
            except (NotFound, VersionChanged) as gone:
                # Nobody has its bytes any more; what comes later need not wait for that.
                where = f"{op.key!r}: it was renamed from {info.key!r}, which somebody else has changed"
                self._ledger.parked[op.seq] = f"{where} or removed before the store had copied it"
                _log.warning("%s or removed meanwhile; it is not uploaded", where)
                raise Stopped(where) from gone
            quiet = self._ledger.landing.quiet(number)
            assert quiet is not None, "nobody else knows it"
            return quiet
        finally:
            self._ledger.landing.discard(number)

    def metadata(self, op: Op) -> Mapping[str, str]:
        """What is sent beside the bytes; named as rclone and s3fs name it."""
        node = self._ledger.nodes.get(op.ino)
        if node is None:
            return {}
        with suppress(NoSuchPath, LandingBroken):
            return _sent(self._overlay.entry(node.ino), node.attributes)
        return {}

    def remember(self, op: Op, resume: str) -> Op:
        """Keep what a sink needs to go on after a restart; durable."""
        with self._lock:
            now = self._ledger.ops.get(op.seq)
            if now is None or now.id != op.id:
                return op  # written again: nobody will go on with it
            changed = now._replace(resume=resume)
            with self._ledger.changing("remember") as batch:
                batch.update_op(changed)
        self._ledger.sync()
        return changed

    def settled(self, op: Op, stored: Stored | None, content: Quiet | None) -> None:
        """The bucket holds it, or has it no more (`stored` is None)."""
        ready: Ready | None = None
        if stored is not None and content is not None and content.size:
            ready = self._keep(op, stored, content)
        try:
            self._settle(op, stored, ready)
        finally:
            if ready is not None:
                ready.close()
        self._owing.poke()

    def _settle(self, op: Op, stored: Stored | None, ready: Ready | None) -> None:
        with self._lock:
            now = self._ended(op)
            if now is None:
                return
            there: Expected = NOTHING if stored is None else stored.info.version
            if now.kind is OpKind.DELETE:
                self._deleted(now, there)
            elif now.id != op.id and now.ino:
                with self._ledger.changing(
                    "again"
                ) as batch:  # it was written again meanwhile, and is still owed
                    batch.update_op(now._replace(expected=there, resume=""))
            elif self._ledger.puts.get(now.ino) == now.seq:
                assert stored is not None
                # Nobody has written since, and from here on nobody can: for that, it has to be asked of us.
                with nullcontext() if ready is None else ready.taken():
                    self._put(now, stored)
            else:
                with self._ledger.changing("detached") as batch:
                    self._owing.done(batch, now, there)
                copied = self._ledger.copies.get(now.ino)
                if copied is not None and copied.seq == now.seq:
                    copied.stored = stored

    def stopped(self, op: Op) -> None:
        """It was given up, or failed; it stays pending, unless nobody needs it any more."""
        with self._lock:
            now = self._ended(op)
            if now is not None and now.kind is OpKind.PUT and not now.ino:
                with self._ledger.changing("stopped") as batch:
                    self._owing.done(batch, now, now.expected)
                self._owing.forget(op)
        self._owing.poke()

    def conflict(self, op: Op, found: Stored | None) -> None:
        """The bucket holds what neither we nor it should have put there."""
        with self._lock:
            now = self._ended(op)
            if now is None:
                return
            copied = self._ledger.copies.get(now.ino)
            if copied is not None and copied.seq == now.seq:
                # Of a file that is open: what becomes of it is decided at its close, which meets theirs, too.
                copied.refused = True
                with self._ledger.changing("refused") as batch:
                    self._owing.done(batch, now, now.expected)
                self._owing.forget(now)
                return
            self._conflicts += 1
            there: Expected = NOTHING if found is None else found.info.version
            where = f"{now.key!r}: somebody else has {'removed' if found is None else 'changed'} the object"
            if now.kind is OpKind.DELETE:
                _log.warning("%s, so it is not deleted", where)
                self._undelete(now, found)
            elif not now.ino:
                # Nobody wants it any more, so theirs is not touched; what follows it meets theirs, too.
                with self._ledger.changing("unwanted") as batch:
                    self._owing.done(batch, now, now.expected)
                self._owing.forget(now)
            elif found is None or self._policy is Conflict.OVERWRITE:
                _log.warning("%s meanwhile; ours takes its place", where)
                with self._ledger.changing("overwrite") as batch:
                    batch.update_op(now._replace(expected=there, id=next_id(now.id), resume=""))
            elif self._policy is Conflict.FAIL:
                self._ledger.parked[now.seq] = f"{where} meanwhile (conflict: fail); it is not uploaded"
                _log.warning("%s meanwhile; ours is not uploaded (conflict: fail)", where)
            else:
                self._set_beside(now, found)
        self._owing.poke()

    def parked(self) -> Mapping[int, str]:
        """Operations that wait for a person, and why."""
        return dict(self._ledger.parked)

    def dirty(self) -> Dirty:
        """What is not in the bucket yet."""
        with self._lock:
            nodes = [n for n in self._ledger.nodes.values() if n.kind is not Kind.DIRECTORY and not n.orphan]
            due = [op.since for op in self._ledger.ops.values() if op.since]
            size = 0
            for node in nodes:
                with suppress(LandingBroken):
                    size += self._ledger.landing.stat(node.landing).st_size if node.landing else 0
            writing = sum(node.writers > self._ledger.unnoted.get(node.ino, 0) for node in nodes)
            return Dirty(len(nodes), size, writing, len(due), min(due, default=0.0), self._conflicts)

    def _ended(self, op: Op) -> Op | None:
        """An operation is not under way any more; as it is now."""
        self._ledger.running.pop(op.seq, None)
        return self._ledger.ops.get(op.seq)

    def _keep(self, op: Op, stored: Stored, content: Quiet) -> Ready | None:
        """Have in the cache what the bucket has now."""
        node, info = self._ledger.nodes.get(op.ino), stored.info
        if node is None or node.kind is not Kind.FILE or node.landing != op.landing:
            return None
        entry = Entry(
            op.ino, node.parent, node.name, Kind.FILE, info.size, info.mtime_ns, op.mount, op.key,
            info.version,
        )  # fmt: skip
        with suppress(Stopped):  # somebody writes to it again: the cache has a part of it, if anything
            return self._overlay.copies.keep(entry, content)
        return None

    def _put(self, op: Op, stored: Stored) -> None:
        """The bucket holds what a node is: it is clean from now on."""
        node = self._ledger.nodes[op.ino]
        kept, token = node.attributes, stored.info.version.token
        directory = node.kind is Kind.DIRECTORY
        if directory:
            token = ""
        elif node.landing and node.kind is Kind.FILE:
            kept = kept._replace(mtime_ns=self._ledger.landing.stat(node.landing).st_mtime_ns)
        # The same bytes are the same version, with some stores.
        now = (op.key, stored.info.version)
        former = [entry for entry in self._overlay.former(node) if (entry.key, entry.version) != now]
        with self._ledger.catalogue((node.parent, node.name), needed=True) as changing:
            self._ledger.rowless.discard(node.parent)
            row = Kind.DIRECTORY if directory else Kind.FILE
            for above in self._implied(node):
                self._ledger.rowless.discard(above.parent)
                changing.settle(
                    above.ino, above.parent, above.name, int(Kind.DIRECTORY), above.mount,
                    names.to_bytes(above.key), None,
                )  # fmt: skip
            changing.settle(
                node.ino, node.parent, node.name, int(row), op.mount, names.to_bytes(op.key),
                None if directory else stored.info,
            )  # fmt: skip
        step("overlay.settled")
        with self._ledger.changing("settle") as batch:
            self._owing.done(batch, op, stored.info.version)
            for above in self._implied(node):
                batch.drop_node(above)
                if above.attributes != Attributes():
                    batch.keep_attributes(above.mount, above.key, "", above.kind, above.attributes)
            batch.drop_node(node)
            if kept != Attributes():
                batch.keep_attributes(op.mount, op.key, token, node.kind, kept)
            else:
                batch.drop_attributes(op.mount, op.key)
            for entry in former:
                batch.then(lambda entry=entry: self._overlay.copies.outdate(entry))  # type: ignore[misc]

    def _implied(self, node: Node) -> list[Node]:
        """Directories above that the bucket is not owed, topmost first: it has them with what is in them."""
        found: list[Node] = []
        at = self._ledger.nodes.get(node.parent)
        while at is not None and at.ino not in self._ledger.puts:
            found.insert(0, at)
            at = self._ledger.nodes.get(at.parent)
        return found

    def _deleted(self, op: Op, there: Expected) -> None:
        at = self._ledger.hidden_at.get((op.mount, op.key))
        if at is not None:
            with self._ledger.catalogue(at, needed=True) as changing:
                changing.vanish(at[0], names.to_bytes(op.key))
        with self._ledger.changing("deleted") as batch:
            self._owing.done(batch, op, there)
            if at is not None and not self._later_delete(op):
                batch.show(op.mount, op.key)
            batch.drop_attributes(op.mount, op.key)

    def _undelete(self, op: Op, found: Stored | None) -> None:
        """The object that was to be deleted is another one by now: it stays, and is shown again."""
        at = self._ledger.hidden_at.get((op.mount, op.key))
        if at is not None and found is not None and at[1] not in self._ledger.names.get(at[0], {}):
            self._show_theirs(at, op, found)
        with self._ledger.changing("undelete") as batch:
            self._owing.done(batch, op, NOTHING if found is None else found.info.version)
            batch.show(op.mount, op.key)

    def _show_theirs(self, at: tuple[int, bytes], op: Op, found: Stored) -> None:
        key = names.to_bytes(op.key)
        with self._ledger.catalogue(at) as changing:
            ino, _ = changing.claim(*at, int(Kind.FILE), op.mount, key)
            changing.settle(ino, *at, int(Kind.FILE), op.mount, key, found.info)

    def _later_delete(self, op: Op) -> bool:
        later = (
            self._ledger.ops[seq] for seq in self._ledger.by_key.get((op.mount, op.key), ()) if seq > op.seq
        )
        return any(one.kind is OpKind.DELETE for one in later)

    def _set_beside(self, op: Op, found: Stored) -> None:
        """Our version goes under a name of its own, beside the one that somebody else wrote."""
        node = self._ledger.nodes[op.ino]
        name = beside(node.name, "conflict", self._host, op.lineage[:8])
        try:
            mount, key = self._overlay.key_for(node.parent, name, node.kind)
        except NotHere as error:
            self._ledger.parked[op.seq] = f"{op.key!r}: somebody else has changed the object, and {error}"
            return
        new, before = node._replace(name=name, key=key), self._overlay.entry(node.ino)
        with self._ledger.changing("conflict") as batch:
            batch.drop_op(op)
            batch.put_node(new)
            self._owing.owe_put(batch, new, NOTHING, due=op.since > 0)
        with self._ledger.catalogue((node.parent, node.name), (new.parent, new.name)) as changing:
            changing.place(new.ino, new.parent, new.name, mount, names.to_bytes(key))
        self._show_theirs((node.parent, node.name), op, found)
        self._ledger.replaced(before)
        _log.warning(
            "%r was changed in the bucket meanwhile: that version keeps the name, ours is %r", op.key, key
        )


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
