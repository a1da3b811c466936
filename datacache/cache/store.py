"""
One life of a cache directory: from taking its lock to letting go of it, or to its failure.

`Store` puts copies into files, records them in the catalogue, counts what they take and gives up
what the policy chooses. It knows nothing of health: it raises OSError and sqlite3.Error as they
come, and `directory` decides what they mean, drops a store that fails and makes a new one.

A fill: claim the gaps (nobody else fills them), reserve the space (evicting if need be), write the
bytes, record the blocks in one transaction, publish them to readers. Killed at any point, what is
recorded is there; what was written and not recorded is found by the survey of the next start.

A file that is whole may be lent to the kernel, which reads it without us, and goes on reading it when
the loan is closed and when this process is dead. So nothing changes the bytes of a whole file, and
none is given up, or its space counted as free, before the kernel says that nobody has it open
(`Disk.alone`). A file that leaves the tier while somebody has moves to `gone/` until then, where the
next store finds it, too.

A whole file need not be copied to be in the cache: `take` gives one that lies on the same file system a
second name here, as its first is about to go. And `surrender` gives a file away, to be written to. No row
may ever vouch for bytes that somebody can write: a row comes when nobody can any more, and has gone for
good, power cut or not, before somebody can again. Until its other name is gone a file is in use elsewhere.

A read takes no lock while it reads. It asks whether the bytes are there, reads them, and asks
whether anything was removed from the entry meanwhile (`Entry.removals`); if so, it starts again.
"""

import errno
import json
import logging
import os
import re
import shutil
import sqlite3
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from uuid import uuid4

from datacache.cache import catalogue as db
from datacache.cache.catalogue import Catalogue, Held, Row, checksum
from datacache.cache.disk import Disk, Handle
from datacache.cache.owner import MANAGED, Owner, take_lock
from datacache.cache.policy import Limit, Shortage, Stance, excess, pages, rank, shortage, victims
from datacache.cache.tier import Block, Standing
from datacache.clock import Clock
from datacache.config.settings import Policy
from datacache.errors import Damaged, TierFull
from datacache.model import Buffer, ByteRange, CacheKey, Coverage

log = logging.getLogger(__name__)

SYNC_EVERY = 10.0
"""Seconds between sync rounds: what a power cut puts in doubt at most. Each costs one syncfs."""
_FLUSH_AT = 1000
"""Last opens and verified blocks held back at most; 1,000 are written in 5 ms."""
_JOURNAL = 16 << 20
"""Bytes of the catalogue's journal that start a checkpoint; about 1,000 small fills."""
_BARREN = 1.0
"""Seconds for which a search for victims that found none is not repeated."""
_STRIKES, _STRIKE_TIME = 3, 10.0
"""A tier that fails so many reads in so many seconds is set aside; fewer are bad spots."""
_SURVEY = 5000
"""Files looked at in one round of the survey, so that it never takes the processor for long."""
_CHOICE = 4096
"""Entries looked at a data set in one choice of victims; bounds its memory and time (about 20 ms)."""
_REFUSALS = 8
"""Times that victims are chosen anew because somebody reads those that were chosen."""
_LINGERING = 1000
"""Files in `gone/` that one round of upkeep asks about; 15 us each."""
_PINS = 30.0
"""Seconds for which the sum of what is pinned is believed, while there is any: to add up a million takes 50
ms."""
_NO_LEASES = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM)
"""What file systems (NFS, CephFS) say that cannot tell who reads a file."""
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOENT)
"""What is said of a file that cannot have another name, or has none any more."""
_GONE = "gone"
_STRIPES = 64
_FILE = re.compile(r"^([0-9a-f]{32})-([0-9a-f]{1,16})$")


@dataclass(frozen=True)
class Rules:
    """What a directory tier may do; see `config.settings` for the words."""

    name: str
    quota: int
    block_size: int
    high: float = 0.95
    low: float = 0.85
    reserve: float = 0.10
    policy: Policy = Policy.KEEP
    expire: float = float("inf")
    dataset: str = ""
    """The data set that is mounted now; empty: none (`verify`)."""
    priority: int = 0
    volatile: bool = False
    """The medium does not survive a boot, so nothing needs to be synced."""


@dataclass
class Finding:
    """What `Store.inspect` saw of one entry."""

    blocks: int = 0
    bytes: int = 0
    damaged: int = 0
    missing: int = 0
    overlong: int = 0
    miscounted: int = 0
    repaired: int = 0
    problems: list[str] = field(default_factory=list)


class Entry:
    """An entry that is open, or being filled. At most one a key.

    Guarded by the store's lock, except that readers look at `whole`, `handle`, `doubt` and
    `removals` without it. Invariants: `covered` and `filling` never overlap; `removals` grows
    after `covered` has lost bytes, and before their doubt is forgotten or their place in the file
    changes; `whole` implies that `covered` is all of the object;
    `recorded` entries have a row in the catalogue, unless they are `gone`.
    """

    __slots__ = (
        "covered", "digest", "doubt", "doubt_starts", "filling", "gone", "handle", "id", "key",
        "pinned", "recorded", "removals", "superseded", "used", "users", "whole",
    )  # fmt: skip

    def __init__(self, key: CacheKey, digest: bytes) -> None:
        self.key, self.digest = key, digest
        self.id = 0
        self.handle: Handle | None = None
        self.covered, self.filling = Coverage(), Coverage()
        self.doubt: dict[int, Block] = {}
        self.doubt_starts: list[int] = []
        self.removals = self.users = self.used = 0
        self.whole = key.size == 0
        self.recorded = self.gone = self.pinned = self.superseded = False

    def __repr__(self) -> str:
        return f"<Entry {self.key.key!r} {self.covered!r} users={self.users}{' gone' * self.gone}>"

    def doubtful(self, span: ByteRange) -> list[Block]:
        """The blocks in doubt that `span` touches."""
        found = []
        i = bisect_left(self.doubt_starts, span.start)
        for start in self.doubt_starts[max(0, i - 1) :]:
            if start >= span.stop:
                break
            block = self.doubt.get(start)
            if block is not None and block.stop > span.start:
                found.append(block)
        return found


class Store:
    """The copies in one directory. Thread-safe.

    Order of locks: `_evicting`, then a stripe, then the catalogue's own, then `_lock`. No lock is
    held while bytes of copies are read or written.
    """

    def __init__(
        self,
        path: str,
        rules: Rules,
        *,
        owner: Owner,
        clock: Clock,
        disk: Disk,
        boot: str,
        fresh: bool = False,
        limit: Limit | None = None,
    ) -> None:
        """Own the directory and open what is in it; `fresh`: begin with nothing. `limit`: what it may take,
        where that is not its quota. Raises Locked, OSError, sqlite3.Error."""
        self.rules, self.path = rules, path
        self.dead = False
        """Set, once, by the tier when this store has failed: its entries have nothing any more."""
        self._clock, self._disk = clock, disk
        managed = os.path.join(path, MANAGED)
        os.makedirs(path, 0o700, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(managed, 0o700)
        self._at = Handle(os.open(managed, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self._owned = take_lock(path, self._at.fd, owner)
        try:
            self.catalogue = self._open_catalogue(managed, boot, fresh=fresh)
            self._dataset = self.catalogue.dataset(rules.dataset, rules.priority) if rules.dataset else 0
            entries, used, pinned = self.catalogue.totals()
        except BaseException:
            self._owned.close()
            raise
        # One opener, filler of the first block or evictor of a key at a time: by digest.
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        # One search for victims at a time.
        self._evicting = threading.Lock()
        # Guards all below and the entries. `_changed` says that a claim has ended.
        # Invariants: `_used` = used bytes of all rows + reservations of fills under way + used bytes
        # of entries that are gone but open + `_lingering`; it never exceeds the limit because of a fill.
        # `_entries` holds exactly the entries with users that are not gone.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._entries: dict[bytes, Entry] = {}
        self._count, self._used = entries, used
        self._limit = limit or Limit(rules.quota)
        # What is pinned, and when that is to be added up anew: after a pin, and now and then while there are
        # any.
        self._pinned, self._pins_until = pinned, float("-inf") if pinned else float("inf")
        self._first_id = self._next_id = db.new_ids()
        self._space, self._measured, self._taken, self._taken_inodes = disk.space(self._at.fd), -1e18, 0, 0
        # Promised to fills under way: their file system may not know of it yet.
        self._writing = self._making = 0
        self._full = ""
        self._barren_until = -1e18
        # Names and used bytes of files that left the tier while somebody read them; digests of entries
        # that somebody was seen reading since the last round of upkeep.
        self._lingering = self._find_lingering()
        self._used += sum(self._lingering.values())
        self._read_elsewhere: set[bytes] = set()
        self._leases = True
        self._near: dict[int, bool] = {}  # by device: whether its files can have names here
        self._opened: dict[int, float] = {}
        self._verified: list[tuple[int, int]] = []
        self._unsynced: set[int] = set()
        self._evicted = self._damaged = 0
        self._strikes: deque[float] = deque(maxlen=_STRIKES)
        # These belong to the keeper (`upkeep`).
        self._synced_at = clock.monotonic()
        self._survey: Iterator[int] | None = None if self.catalogue.clean else self._look_around()

    def __repr__(self) -> str:
        return f"<Store {self.path} {self._count} entries, {self._used} of {self._limit.bytes} bytes>"

    # ---- opening and closing --------------------------------------------------------------------

    def _open_catalogue(self, managed: str, boot: str, *, fresh: bool) -> Catalogue:
        path, at = os.path.join(managed, db.NAME), self._at.fd
        layout = os.path.join(managed, "layout.json")
        why = "its catalogue is damaged" if fresh else ""
        try:
            with open(layout, encoding="utf-8") as file:
                found = json.load(file).get("format")
            if found != db.FORMAT:
                why = f"it has format {found!r}, this program writes {db.FORMAT}"
        except FileNotFoundError:
            pass
        except (ValueError, AttributeError):
            why = "its layout.json is damaged"
        if not why:
            try:
                opened = Catalogue(path, boot=boot)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # the medium, not the contents
                    raise
                why = f"its catalogue is damaged ({error})"
        if why:
            log.warning("the cache in %s is emptied: %s", self.path, why)
            self._empty(managed)
            opened = Catalogue(path, boot=boot)
        try:
            os.mkdir("objects", 0o700, dir_fd=at)
            opened.clean = not why  # nothing can be left behind where nothing was
        except FileExistsError:
            pass
        if why or not os.path.exists(layout):
            text = json.dumps({"format": db.FORMAT, "uuid": str(uuid4())})
            with open(layout + ".new", "w", encoding="utf-8", opener=_private) as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(layout + ".new", layout)
            os.fsync(at)
        return opened

    def _empty(self, managed: str) -> None:
        # The catalogue goes first, and for good, so that it can never come back to vouch for new files.
        for name in (db.NAME, db.NAME + "-wal", db.NAME + "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(managed, name))
        with suppress(FileNotFoundError):
            os.rename(os.path.join(managed, "objects"), os.path.join(managed, f"trash-{uuid4().hex}"))
        os.fsync(self._at.fd)

    def probe(self) -> None:
        """Raise OSError unless the medium takes bytes and gives them back."""
        text = os.urandom(4096)
        handle = self._disk.open("probe", os.O_RDWR | os.O_CREAT | os.O_TRUNC, at=self._at.fd)
        self._disk.write(handle.fd, memoryview(text), 0)
        self._disk.sync(handle.fd)
        if self._disk.read(handle.fd, len(text), 0) != text:
            raise OSError(errno.EIO, "what was written reads back as something else")
        self._disk.unlink("probe", at=self._at.fd)

    def close(self) -> None:
        """Put everything that can be put in order quickly in order, and let go."""
        self.flush()
        self.sync(limit=2.0)
        with self._lock:
            tidy = not self._unsynced and self._survey is None
        if tidy:
            self.catalogue.say_goodbye()
        self.drop()

    def drop(self) -> None:
        """Let go at once, as death would."""
        self.dead = True
        self._survey = None
        with self._lock:
            for entry in self._entries.values():
                entry.handle = None
            self._lingering.clear()
        with suppress(sqlite3.Error):
            self.catalogue.close()
        self._owned.close()

    # ---- entries --------------------------------------------------------------------------------

    def _stripe(self, digest: bytes) -> threading.Lock:
        return self._stripes[digest[0] % _STRIPES]

    def open(self, key: CacheKey, *, touch: bool = True) -> Entry:
        """The entry of `key`, for one more user; `release` it."""
        digest = bytes.fromhex(key.digest)
        with self._stripe(digest):
            with self._lock:
                entry = self._entries.get(digest)
                if entry is not None:
                    entry.users += 1
            if entry is None:
                entry = Entry(key, digest)
                entry.users = 1
                held = self.catalogue.held(digest)
                if held is not None:
                    self._load(entry, held)
                with self._lock:
                    self._entries[digest] = entry
            if touch and entry.recorded:
                with self._lock:
                    self._opened[entry.id] = self._clock.wall()
        if len(self._opened) > _FLUSH_AT:
            self.flush()
        return entry

    def lend(self, key: CacheKey) -> tuple[Entry, Handle] | None:
        """The entry of `key`, for one more user, and its file, open for reading only; None unless the
        file is the object, byte for byte and beyond doubt."""
        entry = self.open(key, touch=False)
        handle = None
        try:
            # Under the stripe nobody takes bytes out of the file or the file out of the tier.
            with self._stripe(entry.digest):
                if entry.whole and entry.handle is not None and not entry.doubt and not entry.gone:
                    handle = self._borrow(entry, entry.handle)
                if handle is not None:
                    with self._lock:
                        self._opened[entry.id] = self._clock.wall()
        finally:
            if handle is None:
                self.release(entry)
        return (entry, handle) if handle is not None else None

    def _borrow(self, entry: Entry, ours: Handle) -> Handle | None:
        try:
            handle = self._disk.open(db.file_name(entry.digest, entry.id), os.O_RDONLY, at=self._at.fd)
        except FileNotFoundError:
            self.check_place()
            return None
        # Somebody may have been at the file behind our back. The kernel would read past the object's
        # end, or kill who maps what is missing, where `read` notices.
        found = os.fstat(handle.fd)
        same = os.path.samestat(found, os.fstat(ours.fd)) and found.st_size == entry.key.size
        return handle if same else None

    def _load(self, entry: Entry, held: Held) -> None:
        try:
            handle = self._disk.open(db.file_name(entry.digest, held.id), os.O_RDWR, at=self._at.fd)
        except FileNotFoundError:
            self.check_place()
            self._forget(held)
            return
        entry.covered = Coverage(b.span for b in held.blocks)
        boot = self.catalogue.boot_epoch
        entry.doubt = {b.start: b for b in held.blocks if 0 < b.epoch < boot}
        entry.doubt_starts = list(entry.doubt)
        entry.id, entry.handle, entry.used = held.id, handle, held.used
        entry.pinned, entry.superseded, entry.recorded = held.pinned, held.superseded, True
        entry.whole = entry.covered.covers(ByteRange(0, entry.key.size))

    def _forget(self, row: Row | Held) -> None:
        """A recorded entry whose file is not there; under its stripe."""
        if self.catalogue.remove(row.id):
            with self._lock:
                self._count -= 1
                self._used -= row.used

    def release(self, entry: Entry) -> None:
        """One user less; the last one closes the file."""
        with self._lock:
            entry.users -= 1
            if entry.users:
                return
            if entry.superseded or self.rules.policy is Policy.LRU:
                self._barren_until = -1e18  # it may be evicted again
            handle = entry.handle if entry.gone else None
            entry.handle = None  # closed before others can find the entry not in use, and ask who has it open
            if not entry.gone and self._entries.get(entry.digest) is entry:
                del self._entries[entry.digest]
            emptied = entry.recorded and not entry.covered.length and not entry.gone
        if self.dead:
            return
        if entry.gone:
            self._part(entry, handle)
        elif emptied:  # all of its blocks were damaged: it leaves no trace
            self.evict(entry.digest, idle=True)

    def _part(self, entry: Entry, handle: Handle | None) -> None:
        """The last user of an entry that is gone has left."""
        name = _aside(db.file_name(entry.digest, entry.id))
        free = handle is None or self._unread(handle)
        with self._lock:
            if free:
                self._used -= entry.used
            else:
                self._lingering[name] = entry.used
        if free:
            with suppress(FileNotFoundError):
                self._disk.unlink(name, at=self._at.fd)

    # ---- who else reads a file ------------------------------------------------------------------

    def _unread(self, handle: Handle, *, unknown: bool = True) -> bool:
        """Whether nobody else has the file open; `unknown`, where the file system cannot tell."""
        if self._leases:
            try:
                return self._disk.alone(handle.fd)
            except OSError as error:
                if error.errno not in _NO_LEASES:
                    raise
                self._leases = False
                log.warning(
                    "cache tier %s: its file system cannot tell who reads a file (%s): one that is dropped"
                    " while it is mapped takes space that the quota does not count",
                    self.rules.name,
                    error.strerror,
                )
        return unknown

    def _elsewhere(self, row: Row) -> bool:
        """Whether somebody reads the file of an entry that is not open here."""
        if row.present < row.key.size:
            return False  # it was never lent
        try:
            handle = self._disk.open(row.name, os.O_RDONLY, at=self._at.fd)
        except FileNotFoundError:
            return False
        if self._unread(handle):
            return False
        with self._lock:
            self._read_elsewhere.add(row.digest)
        return True

    def _set_aside(self, name: str) -> None:
        """Move a file that somebody reads to where it waits until nobody does."""
        try:
            self._disk.rename(name, _aside(name), at=self._at.fd)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(_GONE, 0o700, dir_fd=self._at.fd)
            with suppress(FileNotFoundError):
                self._disk.rename(name, _aside(name), at=self._at.fd)

    def _clear_away(self, name: str) -> None:
        """Remove a file that no entry has; its space counts as long as somebody reads it."""
        try:
            handle = self._disk.open(name, os.O_RDONLY, at=self._at.fd)
        except FileNotFoundError:
            return
        if self._unread(handle):
            with suppress(FileNotFoundError):
                self._disk.unlink(name, at=self._at.fd)
            return
        taken = os.fstat(handle.fd).st_blocks * 512
        self._set_aside(name)
        with self._lock:
            self._lingering[_aside(name)] = taken
            self._used += taken

    def _find_lingering(self) -> dict[str, int]:
        """What an earlier store left in `gone/`."""
        try:
            handle = Handle(os.open(_GONE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._at.fd))
        except FileNotFoundError:
            return {}
        found = {}
        with os.scandir(handle.fd) as entries:
            for entry in entries:
                found[f"{_GONE}/{entry.name}"] = entry.stat().st_blocks * 512
        return found

    def _look_after(self) -> None:
        """Give back the space of files that nobody reads any more."""
        with self._lock:
            names = list(islice(self._lingering, _LINGERING))
        for name in names:
            self._look_at(name)

    def _look_at(self, name: str) -> None:
        try:
            handle = self._disk.open(name, os.O_RDONLY, at=self._at.fd)
        except FileNotFoundError:
            free = True
        else:
            free = self._unread(handle)
        if free:
            with suppress(FileNotFoundError):
                self._disk.unlink(name, at=self._at.fd)
        with self._lock:
            used = self._lingering.pop(name, None)
            if used is None:
                return  # somebody else was faster
            if free:
                self._used -= used
                self._full, self._barren_until = "", -1e18
            else:
                self._lingering[name] = used  # at the end: its next turn comes after the others'

    def check_place(self) -> None:
        """Raise FileNotFoundError when the directory was deleted underneath us."""
        if not self._owned.in_place(self._at.fd):
            raise FileNotFoundError(errno.ENOENT, "the directory was deleted while it was in use", self.path)

    def ranges(self, digest: bytes) -> list[ByteRange]:
        """What is present of an entry, without opening it."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                return entry.covered.ranges()
        held = self.catalogue.held(digest)
        return Coverage(b.span for b in held.blocks).ranges() if held is not None else []

    def mark(self, digest: bytes, *, pinned: bool | None = None, superseded: bool | None = None) -> None:
        with self._stripe(digest):
            with self._lock:
                entry = self._entries.get(digest)
                if entry is not None:
                    entry.pinned = entry.pinned if pinned is None else pinned
                    entry.superseded = entry.superseded if superseded is None else superseded
                self._barren_until = -1e18
                if pinned is not None:
                    self._pins_until = float("-inf")
            row = self.catalogue.find(digest)
            if row is not None:
                self.catalogue.mark(row.id, pinned=pinned, superseded=superseded)

    def standing(self, digest: bytes) -> Standing | None:
        """What decides when an entry goes; None where there is none."""
        self.flush()
        row = self.catalogue.find(digest)
        return Standing(row.last_open, row.pinned, row.superseded) if row is not None else None

    def adopt(self, digest: bytes, standing: Standing) -> None:
        """Let an entry stand as it stood in another tier, whatever opens it took to bring it here."""
        with self._stripe(digest):
            row = self.catalogue.find(digest)
            if row is None:
                return
            with self._lock:
                self._opened.pop(row.id, None)
                if standing.pinned:
                    self._pins_until = float("-inf")
                entry = self._entries.get(digest)
                if entry is not None:
                    entry.pinned |= standing.pinned
                    entry.superseded |= standing.superseded
            self.catalogue.adopt(row.id, standing)

    def figures(self) -> tuple[int, int, str, int, int, int]:
        """Bytes used, entries, why it is full, entries evicted, blocks found damaged and bytes pinned."""
        with self._lock:
            return self._used, self._count, self._full, self._evicted, self._damaged, self._pinned

    def limit(self, limit: Limit) -> None:
        """Take that much from now on. What there is beyond goes in the next round of upkeep."""
        with self._lock:
            if limit != self._limit:
                self._limit, self._full, self._barren_until = limit, "", -1e18

    # ---- reading --------------------------------------------------------------------------------

    def gaps(self, entry: Entry, span: ByteRange) -> list[ByteRange]:
        if entry.whole and span.stop <= entry.key.size:
            return []
        with self._lock:
            return entry.covered.gaps(span)

    def _covers(self, entry: Entry, span: ByteRange) -> bool:
        if entry.whole and span.stop <= entry.key.size:
            return True
        with self._lock:
            return entry.covered.covers(span)

    def read(self, entry: Entry, span: ByteRange) -> Buffer:
        if span.start >= span.stop:
            return b""
        for _ in range(_STRIKES + 1):
            seen, handle = entry.removals, entry.handle
            if handle is None or not self._covers(entry, span):
                break
            if entry.doubt and (doubtful := entry.doubtful(span)):
                self._settle(entry, handle, doubtful, seen)
            try:
                data = self._disk.read(handle.fd, span.stop - span.start, span.start)
            except OSError as error:
                if error.errno != errno.EIO or self._struck_out():
                    raise
                data = b""
            if entry.removals == seen:
                if len(data) == span.stop - span.start:
                    return data
                # Cut short, or a bad spot: find out which of the blocks are bad.
                self._settle(entry, handle, self._blocks(entry, span), seen)
        raise Damaged(f"bytes {span} of {entry.key.key!r} are not in {self.rules.name} any more")

    def read_nowait(self, entry: Entry, span: ByteRange) -> Buffer | None:
        seen, handle = entry.removals, entry.handle
        if handle is None or not self._covers(entry, span):
            return None
        if entry.doubt and entry.doubtful(span):
            return None
        data = self._disk.read_nowait(handle.fd, span.stop - span.start, span.start)
        return data if entry.removals == seen else None

    def read_whole(self, key: CacheKey) -> Buffer | None:
        """The bytes of a file that is whole and beyond doubt; None of any other, and of one that is open here
        (ask that). No entry is made of it.

        Once we have the file open, nobody changes it: who wants to asks who has it open (`Disk.alone`), under
        the stripe, as we have looked at it.
        """
        digest = bytes.fromhex(key.digest)
        with self._stripe(digest):
            with self._lock:
                if digest in self._entries:
                    return None
            held = self.catalogue.held(digest)
            if held is None or not 0 < key.size == sum(b.stop - b.start for b in held.blocks):
                return None
            if any(0 < b.epoch < self.catalogue.boot_epoch for b in held.blocks):
                return None
            try:
                handle = self._disk.open(db.file_name(digest, held.id), os.O_RDONLY, at=self._at.fd)
            except FileNotFoundError:
                return None
            with self._lock:
                self._opened[held.id] = self._clock.wall()
        if len(self._opened) > _FLUSH_AT:
            self.flush()
        data = self._disk.read(handle.fd, key.size, 0)
        return data if len(data) == key.size else None

    def _blocks(self, entry: Entry, span: ByteRange) -> list[Block]:
        found = self.catalogue.blocks(entry.id)
        return [b for b in found if b.start < span.stop and b.stop > span.start]

    def _struck_out(self) -> bool:
        now = self._clock.monotonic()
        with self._lock:
            self._strikes.append(now)
            return len(self._strikes) == _STRIKES and now - self._strikes[0] < _STRIKE_TIME

    def _settle(self, entry: Entry, handle: Handle, blocks: list[Block], seen: int) -> None:
        """Hold blocks against their checksums; raise Damaged, and drop them, if some do not match."""
        bad = [block for block in blocks if not self._good(handle, block)]
        if bad:
            self._discard(entry, handle, bad, seen)
            spans = ", ".join(str(b.span) for b in bad[:3])
            raise Damaged(
                f"bytes {spans} of {entry.key.key!r} in {self.rules.name} do not match their checksum"
            )
        self._believe(entry, blocks)

    def _good(self, handle: Handle, block: Block) -> bool:
        try:
            data = self._disk.read(handle.fd, block.stop - block.start, block.start)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        return len(data) == block.stop - block.start and checksum(data) == block.checksum

    def _believe(self, entry: Entry, blocks: list[Block]) -> None:
        with self._lock:
            for block in blocks:
                if entry.doubt.pop(block.start, None) is not None and entry.recorded and not entry.gone:
                    self._verified.append((entry.id, block.start))
                    self._unsynced.add(entry.id)

    def _discard(self, entry: Entry, handle: Handle, bad: list[Block], seen: int) -> int:
        """Make gaps of blocks that are bad, unless something was removed since `seen`; how many.

        A file that somebody may read without us keeps its bytes, for he would see zeros: the entry is
        dropped. Only a file that is whole was ever lent; under the stripe none is lent anew.
        """
        with self._stripe(entry.digest):
            in_place = not entry.whole or self._unread(handle, unknown=False)
            with self._lock:
                if entry.removals != seen:
                    return 0
                entry.whole = False
                for block in bad:
                    entry.covered.remove(block.span)
                    entry.filling.add(block.span)  # nobody fills it until its old bytes are away
                entry.removals += 1
                for block in bad:
                    entry.doubt.pop(block.start, None)
                self._damaged += len(bad)
            used = sum(pages(b.start, b.stop) for b in bad)
            try:
                if not in_place:
                    self._drop_damaged(entry)
                elif not entry.gone:
                    self.catalogue.remove_blocks(
                        entry.id, bad, used=used, present=sum(b.span.length for b in bad)
                    )
                for block in bad if in_place else ():
                    self._disk.punch(handle.fd, block.span)
            finally:
                with self._lock:
                    if in_place:
                        entry.used -= used
                        self._used -= used
                    for block in bad:
                        entry.filling.remove(block.span)
                    self._changed.notify_all()
        return len(bad)

    def _drop_damaged(self, entry: Entry) -> None:
        row = self.catalogue.get(entry.id)
        if row is not None and not entry.gone and self.catalogue.remove(row.id):
            log.warning(
                "%r in %s is damaged, and its file may be open elsewhere: it is dropped and fetched anew, but"
                " who has it open reads damaged bytes",
                entry.key.key,
                self.rules.name,
            )
            self._take_out(row, read=True)

    # ---- filling --------------------------------------------------------------------------------

    def fill(self, entry: Entry, start: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        span = ByteRange(start, start + len(view))
        if start < 0 or span.stop > entry.key.size:
            raise ValueError(f"bytes {span} do not lie within an object of {entry.key.size} bytes")
        pieces = self._claim(entry, span)
        if not pieces:
            return
        kept, reserved, promised, made, full = 0, 0, 0, 0, None
        try:
            for piece in pieces:
                inode = int(entry.handle is None and not kept)
                try:
                    self._reserve(pages(*piece), inodes=inode)
                except TierFull as error:
                    full = error
                    break
                reserved += pages(*piece)
                promised += pages(*piece)
                made += inode
                kept += 1
            if kept:
                self._write(entry, pieces[:kept], view, start)
                reserved = 0
        finally:
            with self._lock:
                self._used -= reserved
                self._writing -= promised
                self._making -= made
                for piece in pieces:
                    entry.filling.remove(piece)
                self._changed.notify_all()
            self.release(entry)
        if full is not None:
            raise full

    def _claim(self, entry: Entry, span: ByteRange) -> list[ByteRange]:
        """The gaps in `span`, cut at block boundaries, for us alone to fill; and one more user."""
        with self._lock:
            while True:
                if entry.gone:
                    raise TierFull(f"{entry.key.key!r} was evicted from {self.rules.name} while it was open")
                gaps = entry.covered.gaps(span)
                if all(entry.filling.gaps(gap) == [gap] for gap in gaps):
                    break
                self._changed.wait()
            size = self.rules.block_size
            pieces = []
            for gap in gaps:
                at = gap.start
                while at < gap.stop:
                    stop = min(gap.stop, (at // size + 1) * size)
                    pieces.append(ByteRange(at, stop))
                    at = stop
                entry.filling.add(gap)
            entry.users += bool(pieces)
            return pieces

    def _write(self, entry: Entry, pieces: list[ByteRange], view: memoryview, start: int) -> None:
        handle = entry.handle or self._create(entry)
        try:
            for run in Coverage(pieces).ranges() if len(pieces) > 1 else pieces:
                self._disk.write(handle.fd, view[run.start - start : run.stop - start], run.start)
            blocks = [
                Block(p.start, p.stop, checksum(view[p.start - start : p.stop - start])) for p in pieces
            ]
            used, present = sum(pages(*p) for p in pieces), sum(p.length for p in pieces)
            with self._stripe(entry.digest):
                self._record(entry, blocks, used, present)
        except BaseException:
            self._undo(entry, handle, pieces)
            raise

    def _record(self, entry: Entry, blocks: list[Block], used: int, present: int) -> None:
        """Make blocks that were written part of the entry; under its stripe."""
        if entry.gone:
            raise TierFull(f"{entry.key.key!r} was evicted from {self.rules.name} while it was filled")
        new = not entry.recorded
        if new:
            row = Row(
                entry.id, entry.digest, entry.key, self._clock.wall(),
                entry.pinned, entry.superseded, used, present,
            )  # fmt: skip
            self.catalogue.add(row, self._dataset, blocks)
        else:
            self.catalogue.grow(entry.id, blocks, used=used, present=present)
        with self._lock:
            entry.recorded = True
            entry.used += used
            self._count += new
            self._unsynced.add(entry.id)
            for block in blocks:
                entry.covered.add(block.span)
            entry.whole = entry.covered.covers(ByteRange(0, entry.key.size))

    def _create(self, entry: Entry) -> Handle:
        with self._stripe(entry.digest):
            if entry.handle is None:
                with self._lock:
                    entry.id = self._next_id
                    self._next_id += 1
                name = db.file_name(entry.digest, entry.id)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
                try:
                    handle = self._disk.open(name, flags, at=self._at.fd)
                except FileNotFoundError:
                    with suppress(FileExistsError):
                        os.mkdir(os.path.dirname(name), 0o700, dir_fd=self._at.fd)
                    handle = self._disk.open(name, flags, at=self._at.fd)
                entry.handle = handle
            return entry.handle

    def _undo(self, entry: Entry, handle: Handle, pieces: list[ByteRange]) -> None:
        """Take back what was written and not recorded. What cannot be is found by the next survey."""
        with self._stripe(entry.digest), suppress(OSError):
            with self._lock:
                others = entry.filling.length > sum(p.length for p in pieces)
            if entry.recorded or others:
                for piece in pieces:
                    self._disk.punch(handle.fd, piece)
            elif entry.handle is handle:
                entry.handle = None
                self._disk.unlink(db.file_name(entry.digest, entry.id), at=self._at.fd)

    # ---- whole files, from elsewhere and to elsewhere --------------------------------------------

    def admit(self, key: CacheKey, descriptor: int) -> bool:
        """Make room for a whole file that is to be taken: `take` it, or give back the room (`refuse`). False
        where it lies on another file system, has no name any more, or `key` is open here. Raises TierFull."""
        found = os.fstat(descriptor)
        if not found.st_nlink or found.st_size != key.size or not key.size:
            return False
        if found.st_dev not in self._near:  # one mount of it is all that files come from
            self._near[found.st_dev] = self._disk.together(descriptor, at=self._at.fd)
        with self._lock:
            if bytes.fromhex(key.digest) in self._entries or not self._near[found.st_dev]:
                return False
        self._reserve(pages(0, key.size), inodes=0, there=True)
        return True

    def refuse(self, key: CacheKey) -> None:
        """Give back the room of what was admitted, and not taken."""
        with self._lock:
            self._used -= pages(0, key.size)

    def take(self, key: CacheKey, descriptor: int, blocks: Sequence[Block]) -> bool:
        """Make a file that was admitted, and that nobody can write to, the cached file of `key`; False where
        something of `key` is here by now, or it cannot have another name."""
        digest, used = bytes.fromhex(key.digest), pages(0, key.size)
        with self._stripe(digest):
            with self._lock:
                there = digest in self._entries
            if there or self.catalogue.find(digest) is not None:
                return False
            with self._lock:
                entry, self._next_id = self._next_id, self._next_id + 1
            row = Row(entry, digest, key, self._clock.wall(), False, False, used, key.size)
            try:
                self._link(descriptor, row.name)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                log.debug("%r is not taken: %s", key.key, error)
                return False
            try:
                self.catalogue.add(row, self._dataset, blocks)
            except BaseException:
                self._disk.unlink(row.name, at=self._at.fd)
                raise
            with self._lock:
                self._count += 1
                self._unsynced.add(entry)
        return True

    def _link(self, descriptor: int, name: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(os.path.dirname(name), 0o700, dir_fd=self._at.fd)
        self._disk.link(descriptor, name, at=self._at.fd)

    def withdraw(self, digest: bytes) -> None:
        """Drop an entry whose file is to be written under another name."""
        with self._stripe(digest):
            row = self.catalogue.find(digest)
            if row is None:
                return
            try:
                self.catalogue.remove(row.id, durable=True)
            except BaseException:
                self._disk.unlink(
                    row.name, at=self._at.fd
                )  # a row without a file vouches for nothing, either
                raise
            self._take_out(row, read=False)

    def surrender(self, digest: bytes, at: int, name: str) -> list[Block] | None:
        """Give a whole file away, as `name` in the directory `at`; what is in it. None where it is not whole
        or not beyond doubt, is pinned or in use, or cannot be there."""
        with self._stripe(digest):
            with self._lock:
                if digest in self._entries:
                    return None
            row = self.catalogue.find(digest)
            if row is None or row.pinned or row.present != row.key.size:
                return None
            blocks = self.catalogue.blocks(row.id)
            if any(0 < b.epoch < self.catalogue.boot_epoch for b in blocks):
                return None
            try:
                handle = self._disk.open(row.name, os.O_RDONLY, at=self._at.fd)
            except FileNotFoundError:
                return None
            # Nobody opens it after this: who does is of this process, and looks at the row under the stripe.
            if os.fstat(handle.fd).st_size != row.key.size or not self._unread(handle, unknown=False):
                return None
            try:
                self._disk.link(handle.fd, name, at=at)
            except OSError as error:
                log.debug("%s is not given away: %s", row.name, error)
                return None
            self.catalogue.remove(row.id, durable=True)
            self._disk.unlink(row.name, at=self._at.fd)
            with self._lock:
                self._count -= 1
                self._used -= row.used
                self._full = ""
                self._opened.pop(row.id, None)
                self._unsynced.discard(row.id)
            return blocks

    def disown(self, files: Collection[tuple[int, int]]) -> None:
        """Drop whatever is a name of one of `files`: they are to be written to."""
        device = os.fstat(self._at.fd).st_dev
        inodes = {inode for where, inode in files if where == device}
        for folder in (*(f"objects/{low:02x}" for low in range(256)), _GONE) if inodes else ():
            for name in self._names_of(folder, inodes):
                match = _FILE.match(os.path.basename(name))
                row = self.catalogue.get(int(match[2], 16)) if match else None
                if row is not None and row.name == name:
                    self.withdraw(row.digest)
                    continue
                with suppress(FileNotFoundError):
                    self._disk.unlink(name, at=self._at.fd)
                with self._lock:
                    self._used -= self._lingering.pop(name, 0)

    def _names_of(self, folder: str, inodes: Collection[int]) -> list[str]:
        try:
            handle = Handle(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._at.fd))
        except FileNotFoundError:
            return []
        with os.scandir(handle.fd) as found:
            return [f"{folder}/{one.name}" for one in found if one.inode() in inodes]

    # ---- space ----------------------------------------------------------------------------------

    def _reserve(self, wanted: int, *, inodes: int, there: bool = False) -> None:
        """Count `wanted` bytes as used, evicting if need be; `there`: the file system has them already, so
        they take nothing of what it has left. Raises TierFull."""
        new = 0 if there else wanted
        while True:
            with self._lock:
                short = self._shortage(wanted, inodes, new)
                if not short.over_by:
                    self._used += wanted
                    self._taken += new
                    self._taken_inodes += inodes
                    self._writing += new
                    self._making += inodes
                    self._full = ""
                    return
                barren = self._clock.monotonic() < self._barren_until
            if barren or not self._make_room(wanted, inodes, new):
                with self._lock:
                    self._full = short.reason
                raise TierFull(f"cache tier {self.rules.name} is full: {short.reason}")

    def _shortage(self, wanted: int, inodes: int, new: int) -> Shortage:
        """What is missing to admit `wanted` bytes, `new` of which the file system does not have yet; under
        `_lock`. The file system is asked (0.7 us) once a second, when we have taken an eighth of what it had
        left for us, and before we say no: our catalogue and directories take space, too."""
        for fresh in (False, True):
            if fresh or self._outdated():
                self._space, self._measured = self._disk.space(self._at.fd), self._clock.monotonic()
                self._taken, self._taken_inodes = self._writing, self._making
            space = self._space._replace(
                free=self._space.free - self._taken + wanted - new,
                inodes_free=self._space.inodes_free - self._taken_inodes,
            )
            short = shortage(
                wanted, inodes=inodes, used=self._used, entries=self._count + self._making,
                limit=self._limit, space=space, reserve=self.rules.reserve,
            )  # fmt: skip
            if not short.over_by or self._used + wanted > self._limit.bytes:
                break
        return short

    def _outdated(self) -> bool:
        """Whether what the file system said last is not worth much any more."""
        space, reserve = self._space, self.rules.reserve
        return (
            self._clock.monotonic() - self._measured >= 1.0
            or self._taken > (space.free - space.total * reserve) / 8
            or self._taken_inodes > (space.inodes_free - space.inodes * reserve) / 8 > 0
        )

    def _make_room(self, wanted: int, inodes: int, new: int) -> bool:
        with self._evicting:
            with self._lock:
                short = self._shortage(wanted, inodes, new)
            if not short.over_by:  # somebody else has made room
                return True
            freed = self._evict(short.over_by, self.rules.policy)[0]
            with self._lock:
                self._measured = -1e18
                if not freed:
                    self._barren_until = self._clock.monotonic() + _BARREN
            return bool(freed)

    def _evict(self, over_by: int, policy: Policy, count: int = 0) -> tuple[int, int]:
        """Give up entries by policy, `over_by` bytes and `count` of them; the bytes that this freed, and how
        many went. Under `_evicting`."""
        freed = gone = 0
        for _ in range(_REFUSALS):
            with self._lock:
                refused = len(self._read_elsewhere)
            for digest in self.choose(over_by - freed, policy, count - gone):
                used = self.evict(digest, idle=True)[1]
                freed, gone = freed + used, gone + bool(used)
            with self._lock:
                if (freed >= over_by and gone >= count) or len(self._read_elsewhere) <= refused:
                    break
        return freed, gone

    def make_room(self, over_by: int) -> int:
        """Give up entries by policy, for somebody else who needs the disk; the bytes that this freed."""
        with self._evicting:
            return self._evict(over_by, self.rules.policy)[0]

    def choose(self, over_by: int, policy: Policy, count: int = 0) -> list[bytes]:
        """Digests of entries that should go to free `over_by` bytes, `count` of them at least; not all of
        them where it takes very many."""
        self.flush()
        rules, limit = self.rules, 64
        active = frozenset({rules.dataset})
        stance = Stance(self._clock.wall(), rules.expire, active, rules.priority, policy)
        while True:
            groups = self.catalogue.candidates(limit)
            with self._lock:
                in_use = self._read_elsewhere.union(self._entries)
            groups = [[c._replace(in_use=c.digest in in_use) for c in g] for g in groups]
            chosen = victims((c for group in groups for c in group), stance, over_by=over_by, count=count)
            # In a group what comes later is no more eligible than what came before.
            more = any(
                len(group) == limit and rank(group[-1]._replace(in_use=False), stance) is not None
                for group in groups
            )
            enough = sum(c.used for c in chosen) >= over_by and len(chosen) >= count
            if not more or limit >= _CHOICE or enough:
                return [c.digest for c in chosen]
            limit *= 8

    def coldest(self, over_by: int) -> list[CacheKey]:
        """Keys of the entries that would go if this tier evicted by last open."""
        for _ in range(_REFUSALS):
            found = [self.catalogue.find(digest) for digest in self.choose(over_by, Policy.LRU)]
            rows = [row for row in found if row is not None]
            idle = [row for row in rows if not self._elsewhere(row)]
            if len(idle) == len(rows):
                break
        return [row.key for row in idle]

    def evict(self, digest: bytes, *, idle: bool = False) -> tuple[int, int]:
        """Drop an entry (`idle`: unless it is in use, here or elsewhere); the bytes that it held, and those
        that it used."""
        with self._stripe(digest):
            with self._lock:
                entry = self._entries.get(digest)
                if entry is not None and (idle or not entry.recorded):
                    return 0, 0
            row = self.catalogue.find(digest)
            if row is None:
                return 0, 0
            read = entry is not None or self._elsewhere(row)
            if (read and idle) or not self.catalogue.remove(row.id):
                return 0, 0
            self._take_out(row, read=read)
            return row.present, row.used

    def _take_out(self, row: Row, *, read: bool) -> None:
        """The file and the space of an entry that has no row any more; under its stripe. `read`: somebody
        has the file open."""
        if read:
            self._set_aside(row.name)  # first: what is in `_lingering` is looked for in its place
        with self._lock:
            self._count -= 1
            self._evicted += 1
            self._full = ""
            self._opened.pop(row.id, None)
            self._unsynced.discard(row.id)
            entry = self._entries.pop(row.digest, None)
            if entry is not None:
                entry.gone = True  # the last user gives its space back
            elif read:
                self._lingering[_aside(row.name)] = row.used
            else:
                self._used -= row.used
        if not read:
            with suppress(FileNotFoundError):
                self._disk.unlink(row.name, at=self._at.fd)
        elif entry is None:
            self._look_at(_aside(row.name))  # perhaps it was one of our own users, who has left since

    # ---- upkeep ---------------------------------------------------------------------------------

    def flush(self) -> None:
        """Record last opens and what was verified."""
        with self._lock:
            opened, self._opened = self._opened, {}
            verified, self._verified = self._verified, []
        if opened or verified:
            self.catalogue.touch(opened, self._dataset, verified)

    def sync(self, *, limit: float = float("inf")) -> None:
        """Wait until what was filled is on the medium, and record that; not much longer than `limit`
        seconds where the files are synced one by one."""
        if self.rules.volatile:
            with self._lock:
                self._unsynced.clear()
            return
        epoch = self.catalogue.next_epoch()
        with self._lock:
            batch, self._unsynced = sorted(self._unsynced), set()
        done = []
        try:
            if len(batch) > 16 and limit == float("inf"):
                # One call for the whole file system is cheaper than a journal commit for each file.
                self._disk.sync_all(self._at.fd)
                done = batch
            else:
                end = self._clock.monotonic() + limit
                for entry in batch:
                    if self._clock.monotonic() > end:
                        break
                    self._sync_one(entry)
                    done.append(entry)
            self.catalogue.mark_synced(done, epoch)
        finally:
            with self._lock:
                self._unsynced.update(batch[len(done) :])

    def _sync_one(self, entry: int) -> None:
        row = self.catalogue.get(entry)
        if row is not None:
            with suppress(FileNotFoundError):  # evicted meanwhile
                handle = self._disk.open(row.name, os.O_RDONLY, at=self._at.fd)
                self._disk.sync(handle.fd)

    def upkeep(self) -> None:
        """What needs doing now and then; one caller at a time."""
        self.check_place()
        self.flush()
        with self._evicting, self._lock:
            if self._read_elsewhere:  # perhaps no longer
                self._read_elsewhere.clear()
                self._barren_until = -1e18
        self._look_after()
        self._keep_to_limit()
        self._sum_pins()
        if self._survey is not None:
            seen = 0
            for count in self._survey:
                seen += count
                if seen >= _SURVEY:
                    break
            else:
                self._survey = None
        now = self._clock.monotonic()
        if now - self._synced_at >= SYNC_EVERY:
            self._synced_at = now
            if self._unsynced:
                self.sync()
            self.catalogue.checkpoint()
        elif self.catalogue.journal_size() > _JOURNAL:
            self.catalogue.checkpoint()

    def _keep_to_limit(self) -> None:
        with self._lock:
            used, limit, rules = self._used, self._limit, self.rules
            many = max(0, self._count - limit.entries) if limit.entries else 0
        over = excess(used=used, quota=limit.bytes, high=rules.high, low=rules.low, policy=rules.policy)
        if over or many:
            # A limit that was made smaller holds for what the policy would keep, too.
            policy = Policy.LRU if many or used > limit.bytes else rules.policy
            with self._evicting:
                while over > 0 or many > 0:
                    freed, gone = self._evict(max(0, over), policy, max(0, many))
                    over, many = over - freed, many - gone
                    if not gone:
                        break

    def _sum_pins(self) -> None:
        now = self._clock.monotonic()
        with self._lock:
            if now < self._pins_until:
                return
            self._pins_until = now + _PINS
        pinned = self.catalogue.totals()[2]
        with self._lock:
            self._pinned = pinned
            if not pinned and self._pins_until > float("-inf"):
                self._pins_until = float("inf")

    @property
    def surveyed(self) -> bool:
        """Whether nothing that a crash left behind is still to be looked for."""
        return self._survey is None

    def _look_around(self) -> Iterator[int]:
        """After a crash: drop files without a row and rows without a file, give back what was written
        and not recorded, and remember what is to be synced. Yields the number of files seen."""
        for name in os.listdir(self._at.fd):
            if name.startswith("trash-"):
                for folder, _, files, _ in os.fwalk(name, dir_fd=self._at.fd):
                    for file in files:
                        self._clear_away(f"{folder}/{file}")
                        yield 1
                shutil.rmtree(name, dir_fd=self._at.fd, ignore_errors=True)
                yield 1
        for low in range(256):
            yield self.survey(low, repair=True)[0]

    def survey(self, low: int, *, repair: bool) -> tuple[int, list[str], list[Row]]:
        """Compare the files whose digest begins with byte `low` with the catalogue; how many there
        are, which have no row, and which rows have no file."""
        folder = f"objects/{low:02x}"
        try:
            handle = Handle(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._at.fd))
            names = os.listdir(handle.fd)
        except FileNotFoundError:
            names = []
        # Rows after files: a file that was made and recorded since is in `rows` and not in `names`.
        high = bytes([low + 1]) if low < 255 else None
        rows = {row.name: row for row in self.catalogue.rows_from(bytes([low]), high)}
        orphans = []
        for name in names:
            path = f"{folder}/{name}"
            row = rows.pop(path, None)
            if row is None:
                match = _FILE.match(name)
                if match and self._first_id <= int(match[2], 16) < self._next_id:
                    continue  # ours, on its way into the catalogue or out of it
                orphans.append(path)
                if repair:
                    self._clear_away(path)
            elif repair:
                self._tidy(row)
        lost = [row for row in rows.values() if self._confirm_lost(row, repair=repair)]
        return len(names), orphans, lost

    def _confirm_lost(self, row: Row, *, repair: bool) -> bool:
        with self._stripe(row.digest):
            if self.catalogue.get(row.id) is None or row.digest in self._entries:
                return False
            try:
                os.stat(row.name, dir_fd=self._at.fd)
            except FileNotFoundError:
                if repair:
                    self._forget(row)
                return True
            return False

    def _tidy(self, row: Row) -> None:
        if self.catalogue.has_unsynced(row.id):
            with self._lock:
                self._unsynced.add(row.id)
        if row.present == row.key.size:
            return
        # A fill that was under way may have left bytes where nothing is recorded: they take space
        # that nobody counts.
        entry = self.open(row.key, touch=False)
        gaps = []
        try:
            with self._lock:
                for gap in entry.covered.gaps(ByteRange(0, row.key.size)):
                    gaps += entry.filling.gaps(gap)
                for gap in gaps:
                    entry.filling.add(gap)
            if entry.handle is not None:
                for gap in gaps:
                    self._disk.punch(entry.handle.fd, gap)
        finally:
            with self._lock:
                for gap in gaps:
                    entry.filling.remove(gap)
                self._changed.notify_all()
            self.release(entry)

    # ---- the oracle -----------------------------------------------------------------------------

    def inspect(self, row: Row, *, repair: bool, progress: Callable[[int], None] | None = None) -> Finding:
        """Hold one entry against all that is promised of it."""
        found = Finding()
        entry = self.open(row.key, touch=False)
        try:
            handle, seen = entry.handle, entry.removals
            if handle is None or entry.id != row.id:  # evicted since, or its file is missing
                return found
            self._inspect_blocks(entry, handle, seen, found, repair=repair, progress=progress)
            size = os.fstat(handle.fd).st_size
            if size > row.key.size:
                found.overlong += 1
                found.problems.append(f"{row.name} has {size} bytes, its object has {row.key.size}")
                if repair and os.fstat(handle.fd).st_nlink == 1:
                    os.ftruncate(handle.fd, row.key.size)
                elif repair:  # it is somebody else's, too
                    self.evict(entry.digest)
                found.repaired += repair
        finally:
            self.release(entry)
        return found

    def _inspect_blocks(
        self,
        entry: Entry,
        handle: Handle,
        seen: int,
        found: Finding,
        *,
        repair: bool,
        progress: Callable[[int], None] | None,
    ) -> None:
        with self._stripe(entry.digest):  # no fill is being recorded while we read both
            row, blocks = self.catalogue.get(entry.id), self.catalogue.blocks(entry.id)
        if row is None:
            return
        last, broken = 0, False
        good: list[Block] = []
        bad: list[Block] = []
        for block in blocks:
            found.blocks += 1
            found.bytes += block.span.length
            broken = broken or not last <= block.start < block.stop <= entry.key.size
            last = block.stop
            (good if self._good(handle, block) else bad).append(block)
            if progress is not None:
                progress(block.span.length)
        if entry.removals != seen or entry.gone:
            return  # somebody else has dropped what is bad
        self._believe(entry, good)
        if broken:
            found.damaged += len(blocks)
            found.problems.append(f"{row.name}: its blocks overlap or lie outside of the object")
            if repair:
                self.evict(entry.digest)
                found.repaired += 1
            return
        for block in bad:
            found.damaged += 1
            found.problems.append(f"{row.name}: bytes {block.span} do not match their checksum")
        if bad and repair:
            found.repaired += self._discard(entry, handle, bad, seen)
            return
        used, present = sum(pages(b.start, b.stop) for b in blocks), sum(b.span.length for b in blocks)
        if (row.used, row.present) != (used, present):
            found.miscounted += 1
            found.problems.append(
                f"{row.name}: {row.present} bytes are recorded as present, blocks hold {present}"
            )
            if repair:
                with self._stripe(entry.digest):
                    if self.catalogue.blocks(entry.id) == blocks:
                        self.catalogue.recount(entry.id, used=used, present=present)
                        with self._lock:
                            self._used += used - row.used
                            entry.used += used - row.used
                        found.repaired += 1


def _aside(name: str) -> str:
    return f"{_GONE}/{os.path.basename(name)}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
