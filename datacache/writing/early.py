"""
What the bucket gets of a file that is still open for writing: a copy of what it holds now.

Nobody may read a file for upload while it can be written to, and a close is answered before the kernel
lets go of the file. So with `--upload-mode sync` each close and fsync(2), and otherwise an fsync of a file
that is open for long (a log), has a copy made of the landing file, and that is uploaded, under the file's
own key, as any other. The file stays dirty until its last close. Is it then what was copied, it is known
to be in the bucket, and not sent again.

A copy is a state that the file had. It begins when the writes that were under way have ended (the inode is
locked for a moment), its bytes are on the disk, and the clock that the kernel stamps changes with has gone
on since the last change; so whatever comes later, through a mapping too, shows in the time of change, and
then the copy is thrown away.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from datacache.clock import Clock
from datacache.errors import DatacacheError, LandingBroken, Unavailable
from datacache.model import Kind
from datacache.writing.journal import Node, Op
from datacache.writing.landing import Landing, copy, look_of
from datacache.writing.ledger import Copied
from datacache.writing.overlay import Overlay
from datacache.writing.owing import next_id
from datacache.writing.steps import step

_log = logging.getLogger(__name__)

TRIES = 5
"""Copies of a file that is written meanwhile, before a close gives up."""
_COARSE = 5  # CLOCK_REALTIME_COARSE: what changes are stamped with
_TICK = 0.001
_TICKS = 100  # of a clock that ticks each 1 to 10 ms, and may be set back


class Report(Protocol):
    """What a flush has come to (`uploader.Flushed`)."""

    def __bool__(self) -> bool: ...

    @property
    def reasons(self) -> str: ...


class Flush(Protocol):
    """Waits for operations (`Uploader.flush`)."""

    def __call__(self, *, matches: Callable[[Op], bool], timeout: float) -> Report: ...


@dataclass(frozen=True)
class _Owed:
    """The operation by which the bucket gets what the file held."""

    seq: int


class Early:
    """Uploads of open files of one overlay. Thread-safe."""

    def __init__(self, overlay: Overlay, flush: Flush, clock: Clock, *, after: float, timeout: float) -> None:
        """`after`: seconds for which a file is open for writing before an fsync has it copied. `timeout`:
        seconds for which `store` waits at most."""
        self._overlay, self._ledger, self._flush, self._clock = overlay, overlay.ledger, flush, clock
        self._after, self._timeout = after, timeout
        self._since: dict[int, float] = {}  # when a file was opened, or copied last; under the ledger's lock

    def __repr__(self) -> str:
        return f"<Early {len(self._ledger.copies)} copies>"

    def opened(self, ino: int) -> None:
        """A file was opened for writing."""
        with self._ledger.lock:
            self._since.setdefault(ino, self._clock.monotonic())

    def closed(self, ino: int) -> None:
        """Somebody who could write to a file has closed it."""
        with self._ledger.lock:
            node = self._ledger.nodes.get(ino)
            if node is None or not node.writers:
                self._since.pop(ino, None)

    def synced(self, ino: int) -> None:
        """A file was synced: have it copied, if it is open for long. Never raises: it is tried again at the
        next sync."""
        with self._ledger.lock:
            node = self._ledger.nodes.get(ino)
            if node is None:
                return
            now = self._clock.monotonic()
            if now - self._since.setdefault(ino, now) < self._after:
                return
            copied = self._ledger.copies.get(ino)
            if copied is not None and copied.seq in self._ledger.ops:
                return  # the last one is not there yet
        try:
            if self._copy(ino) is not None:
                with self._ledger.lock:
                    self._since[ino] = now
        except _Busy:
            _log.debug("%r is written while it is copied", node.key)
        except DatacacheError as error:
            _log.warning("%r is open for long, and cannot be copied to be uploaded: %s", node.key, error)

    def store(self, ino: int, *, closing: bool = False) -> None:
        """Return when the bucket has what a file holds now. `closing`: one who has it open for writing closes
        it; where there are others who have not, the last of them waits.

        Raises Unavailable where it has not in `timeout` seconds, or where somebody else has changed the
        object: what was written is in the landing zone, and uploads go on. LandingFull: there is no room for
        a copy.
        """
        deadline, tries = self._clock.monotonic() + self._timeout, 0
        while True:
            node = self._ledger.nodes.get(ino)
            if node is None or (closing and self._others(node)):
                return
            try:
                seq = self._copy(ino)
            except _Busy:
                tries += 1
                if tries == TRIES:
                    raise Unavailable(
                        f"{node.key!r} is written all the time, so it cannot be uploaded"
                    ) from None
                continue
            if seq is None:
                return
            left = max(0.0, deadline - self._clock.monotonic())
            report = self._flush(matches=lambda op, seq=seq: op.seq == seq, timeout=left)  # type: ignore[misc]
            copied = self._ledger.copies.get(ino)
            if copied is not None and copied.seq == seq:
                if copied.stored is not None:
                    return
                if copied.refused:
                    raise Unavailable(f"{node.key!r} was changed in the bucket by somebody else meanwhile")
            if not report:
                raise Unavailable(f"{node.key!r} is not in the bucket: {report.reasons}")
            # It was renamed, or written again: what it holds now is another operation's.

    def _others(self, node: Node) -> bool:
        """Whether somebody beside who closes has it open for writing, and has not closed it as well."""
        ours = max(1, self._overlay.closes.announced(node.ino))
        return node.writers - self._overlay.awaited.count(node.ino) > ours

    def _copy(self, ino: int) -> int | None:
        """`seq` of what the bucket is owed for what a file holds now; None: it has that, or need not. Raises
        _Busy, LandingError."""
        with self._overlay.one_lander(ino):
            with self._ledger.lock:
                op = self._to_copy(ino)
                if not isinstance(op, Op):
                    return op.seq if op is not None else None
            step("early.before.copy")
            number, state = copy_landed(self._ledger.landing, op.landing)
            step("early.after.copy")
            with self._ledger.lock:
                now = self._to_copy(ino)
                if now != op:  # it was closed, renamed or removed meanwhile
                    self._ledger.landing.discard(number)
                    raise _Busy
                seq = self._owe(op, number)
                self._ledger.copies[ino] = Copied(seq, op.landing, state)
        self._overlay.owing.poke()
        return seq

    def _to_copy(self, ino: int) -> "Op | _Owed | None":
        """What the bucket is owed at the close of a file, if that is to be copied; or what it is owed now."""
        node = self._ledger.nodes.get(ino)
        op = self._ledger.ops.get(self._ledger.puts.get(ino, 0))
        if node is None or op is None or node.orphan or not node.landing or node.kind is not Kind.FILE:
            return None
        if op.since and (op.seq in self._ledger.running or self._is_quiet(op)):
            return _Owed(op.seq)  # else an earlier daemon's writer has it open
        st = self._ledger.landing.stat(node.landing)
        before = self._ledger.unchanged.get(ino)
        if before is not None and before.look == look_of(st):
            return None
        copied = self._ledger.copies.get(ino)
        if copied is not None and (copied.landing, copied.look) == (node.landing, look_of(st)):
            if copied.seq in self._ledger.ops:
                return _Owed(copied.seq)
            if copied.stored is not None:
                return None
        return op

    def _is_quiet(self, op: Op) -> bool:
        quiet = self._ledger.landing.quiet(op.landing)
        if quiet is not None:
            quiet.close()
        return quiet is not None

    def _owe(self, op: Op, number: int) -> int:
        """Owe the bucket landing file `number` before what it is owed at the close. A copy that was not begun
        yet is not sent any more."""
        owing, before = self._overlay.owing, self._ledger.copies.get(op.ino)
        with self._ledger.changing("copy") as batch:
            waiting = self._ledger.ops.get(before.seq) if before is not None else None
            if waiting is not None and waiting.seq not in self._ledger.running:
                owing.drop(batch, waiting)
            now = op.since or self._clock.wall()
            seq = batch.add_op(op._replace(seq=0, landing=number, since=now, resume="")).seq
            owing.owe_last(batch, op._replace(id=next_id(op.id)), since=op.since)
        return seq


class _Busy(Exception):
    """It was changed while it was copied."""


def copy_landed(landing: Landing, number: int) -> tuple[int, tuple[int, int, int]]:
    """A new landing file, synced, with what another holds while it may be written to; and `look_of` that.
    Raises _Busy where it was changed meanwhile, LandingFull, LandingBroken."""
    source = landing.open(number, writing=False)
    made: int | None = None
    try:
        os.fchmod(source.descriptor, 0o600)  # waits for the writes that are under way, and stamps the file
        os.fsync(source.descriptor)  # who writes through a mapping has to ask for each page again
        before = look_of(os.fstat(source.descriptor))
        _let_clock_go_on(before[1])
        made = landing.create()
        _fill(landing, made, source.descriptor, before)
        if look_of(os.fstat(source.descriptor)) != before:
            raise _Busy
        landing.sync(made)
        number, made = made, None
        return number, before
    except LandingBroken:
        if look_of(os.fstat(source.descriptor)) != before:
            raise _Busy from None  # it was cut
        raise
    except OSError as error:
        raise landing.failed(error) from error
    finally:
        source.close()
        if made is not None:
            landing.discard(made)


def _fill(landing: Landing, number: int, source: int, look: tuple[int, int, int]) -> None:
    target = landing.open(number, writing=True)
    try:
        copy(source, target.descriptor, look[0])
        os.utime(target.descriptor, ns=(look[2], look[2]))
    finally:
        target.close()


def _let_clock_go_on(since: int) -> None:
    """Return when changes get another stamp than `since`."""
    for _ in range(_TICKS):
        if time.clock_gettime_ns(_COARSE) > since:
            return
        time.sleep(_TICK)
    raise _Busy
