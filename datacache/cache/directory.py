"""
A tier in a directory: tmpfs or a disk.

`DirectoryTier` is the health of a tier; the copies are kept by a `Store`. A store that fails (EIO,
read-only, deleted underneath) is set aside with one warning: from then on its entries are empty and
fills raise TierBroken, so reads go on from other tiers and the source. Every ten seconds the keeper,
the one thread of the tier, tries to open the directory anew; when that works the tier is back by
itself, with what is still there.
"""

import errno
import logging
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence

from datacache.cache import limits
from datacache.cache.disk import Disk, Handle
from datacache.cache.owner import MANAGED, Owner, read_owner
from datacache.cache.policy import Limit
from datacache.cache.store import Entry, Rules, Store
from datacache.cache.tier import Block, EntryStats, Standing, TierStats
from datacache.clock import Clock, boot_id
from datacache.errors import CacheError, Damaged, TierBroken, TierFull
from datacache.model import Buffer, ByteRange, CacheKey, format_size

log = logging.getLogger(__name__)

RETRY_EVERY = 10.0
"""Seconds between two tries of a tier that was set aside."""
_PACE = 1.0
"""Real seconds between two rounds of the keeper. What a round does is decided by the tier's clock."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class DirectoryTier:
    """Copies in the sub-directory `datacache-cache` of a directory. Thread-safe."""

    def __init__(
        self,
        path: str,
        rules: Rules,
        *,
        owner: Owner,
        clock: Clock,
        disk: Disk | None = None,
        boot: str | None = None,
        keeper: bool = True,
        mount_point: str = "",
    ) -> None:
        """Own the directory. Raises Locked, and OSError where it cannot be made or written. A medium that is
        full or fails at this moment is set aside, as it would be later: reads go on without it.

        `boot` names this boot of the machine; without `keeper` nobody but the caller calls `upkeep`. Where
        there is a `mount_point`, a tmpfs is to be mounted on it, large enough for the quota: while none is,
        the tier is set aside.
        """
        self.name, self.path, self.rules = rules.name, path, rules
        self._owner, self._clock, self._disk = owner, clock, disk or Disk()
        self._boot, self._mount_point = boot or boot_id(), mount_point
        # Guards the next three. Invariant: `_store` is None exactly while the tier is set aside or
        # closed, and no other store of ours is alive then, but for one that is waiting to be dropped
        # by the next `upkeep` (in `_failed`).
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._failed: Store | None = None
        self._reason = ""
        # What the node's plugin lends us, and until when by the clock; guarded by the lock, too.
        self._lease: tuple[Limit, float] | None = None
        # These belong to whoever holds `_keeping`: the keeper, mostly.
        self._keeping = threading.Lock()
        self._retry_at = 0.0
        self._start_over = False
        self._last = (0, 0, "", 0, 0, 0)
        try:
            self._store = self._open_store()
        except (OSError, sqlite3.Error) as error:
            if not _passes(error):
                raise
            self._reason, self._retry_at = _cause(error), clock.monotonic() + self._retry_every
            if not isinstance(error, _NotMounted):
                log.warning("cache tier %s is set aside: %s. It is tried again", self.name, self._reason)
            else:
                log.info("cache tier %s waits: %s", self.name, self._reason)
        self._device = os.stat(limits.existing(path)).st_dev
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None
        if keeper:
            self._keeper = threading.Thread(target=self._keep, name=f"datacache-keeper-{self.name}")
            self._keeper.start()

    def __repr__(self) -> str:
        return f"<DirectoryTier {self.name} {self._reason or self._store}>"

    # ---- Tier -----------------------------------------------------------------------------------

    def open(self, key: CacheKey) -> "DirectoryFile":
        file = DirectoryFile(self, key)
        self.attach(file)
        return file

    def lend(self, key: CacheKey) -> "LentFile | None":
        store = self._store
        if store is not None:
            try:
                lent = store.lend(key)
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)
            else:
                return LentFile(self, store, *lent) if lent is not None else None
        return None

    def read_whole(self, key: CacheKey) -> Buffer | None:
        store = self._store
        if store is not None:
            try:
                return store.read_whole(key)
            except OSError as error:
                if error.errno != errno.EIO:  # a bad spot: `read` finds out which, and how many there are
                    self.trouble(store, error)
            except sqlite3.Error as error:
                self.trouble(store, error)
        return None

    def admit(self, key: CacheKey, descriptor: int) -> "TakenFile | None":
        store = self._store
        if store is not None:
            try:
                return TakenFile(self, store, key) if store.admit(key, descriptor) else None
            except TierFull as full:
                log.debug("%s is not kept: %s", key.key, full)
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)
        return None

    def surrender(self, key: CacheKey, at: int, name: str) -> Sequence[Block] | None:
        store = self._store
        if store is not None:
            try:
                return store.surrender(bytes.fromhex(key.digest), at, name)
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)
        return None

    def disown(self, files: Collection[tuple[int, int]]) -> None:
        store = self._store
        if store is None:
            raise self.trouble(None, None)
        try:
            store.disown(files)
        except (OSError, sqlite3.Error) as error:
            raise self.trouble(store, error) from error

    def present(self, key: CacheKey) -> int:
        return sum(span.length for span in self.ranges(key))

    def ranges(self, key: CacheKey) -> list[ByteRange]:
        """Which bytes of `key` are present, without opening it."""
        store = self._store
        if store is not None:
            try:
                return store.ranges(bytes.fromhex(key.digest))
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)
        return []

    def evict(self, key: CacheKey) -> int:
        store = self._store
        if store is not None:
            try:
                return store.evict(bytes.fromhex(key.digest))[0]
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)
        return 0

    def pin(self, key: CacheKey, pinned: bool) -> None:
        self._mark(key, pinned=pinned)

    def supersede(self, key: CacheKey) -> None:
        self._mark(key, superseded=True)

    def _mark(self, key: CacheKey, *, pinned: bool | None = None, superseded: bool | None = None) -> None:
        store = self._store
        if store is not None:
            try:
                store.mark(bytes.fromhex(key.digest), pinned=pinned, superseded=superseded)
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)

    def entries(self) -> Iterator[EntryStats]:
        store = self._store
        if store is not None:
            try:
                store.flush()
                for row in store.catalogue.rows():
                    yield EntryStats(row.key, self.name, row.present, row.pinned, row.last_open)
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)

    def stats(self) -> tuple[TierStats, ...]:
        with self._lock:
            store, reason, limit = self._store, self._reason, self._limit()
        used, count, full, evicted, damaged, pinned = store.figures() if store is not None else self._last
        state = "broken" if store is None else "full" if full else "ok"
        figures = (state, reason if store is None else full, evicted, damaged, pinned)
        lease, entries = (limit.bytes, limit.entries) if limit.leased else (None, None)
        return (TierStats(self.name, self.rules.quota, used, count, *figures, lease, entries),)

    def close(self) -> None:
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
        with self._keeping:
            with self._lock:
                store, self._store, self._reason = self._store, None, "it is closed"
                failed, self._failed = self._failed, None
            if failed is not None:
                failed.drop()
            if store is not None:
                try:
                    store.close()
                except (OSError, sqlite3.Error) as error:
                    log.warning("cache tier %s was not left in order: %s", self.name, error)
                    store.drop()

    # ---- more than a Tier must ------------------------------------------------------------------

    def recheck(self, key: CacheKey) -> int:
        """Hold what is present of `key` against its checksums; how many blocks were bad and are dropped.
        Raises TierBroken."""
        store = self._store
        if store is None:
            raise self.trouble(None, None)
        try:
            row = store.catalogue.find(bytes.fromhex(key.digest))
            return store.inspect(row, repair=True).damaged if row is not None else 0
        except (OSError, sqlite3.Error) as error:
            raise self.trouble(store, error) from error

    def coldest(self, over_by: int) -> list[CacheKey]:
        """Entries that free `over_by` bytes if they go, in the order in which a tier that evicts by
        last open would have them go."""
        store = self._store
        if store is None:
            return []
        try:
            return store.coldest(over_by)
        except (OSError, sqlite3.Error) as error:
            self.trouble(store, error)
            return []

    def retire(self, key: CacheKey) -> int:
        """Drop the entry unless it is in use; the bytes that it held."""
        store = self._store
        if store is not None:
            try:
                return store.evict(bytes.fromhex(key.digest), idle=True)[0]
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)
        return 0

    def make_room(self, device: int, over_by: int) -> int:
        """Give up entries by policy where they lie on the file system `device`; the bytes that this freed."""
        store = self._store
        if store is not None:
            try:
                return store.make_room(over_by) if os.stat(self.path).st_dev == device else 0
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)
        return 0

    def lease(self, room: int, entries: int, ttl: float) -> Limit:
        """Take `room` bytes at most, and `entries` entries (0: any number), for `ttl` seconds from now: after
        that it is the quota again, which a lease never exceeds. What there is beyond goes soon, by policy,
        and whatever the policy what was opened longest ago; what is pinned or in use stays. What holds
        now."""
        with self._lock:
            limit = Limit(min(room, self.rules.quota), entries, leased=True)
            self._lease = (limit, self._clock.monotonic() + ttl)
            store = self._store
        if store is not None:
            store.limit(limit)
        return limit

    def _limit(self) -> Limit:
        """What it may take now."""
        if self._lease is not None and self._clock.monotonic() < self._lease[1]:
            return self._lease[0]
        return Limit(self.rules.quota)

    def standing(self, key: CacheKey) -> Standing | None:
        """What decides when the entry goes; None where there is none."""
        store = self._store
        if store is not None:
            try:
                return store.standing(bytes.fromhex(key.digest))
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)
        return None

    def adopt(self, key: CacheKey, standing: Standing) -> None:
        """Let the entry stand as it stood in another tier."""
        store = self._store
        if store is not None:
            try:
                store.adopt(bytes.fromhex(key.digest), standing)
            except (OSError, sqlite3.Error) as error:
                self.trouble(store, error)

    @property
    def store(self) -> Store | None:
        """What is in the directory; None while the tier is set aside. For `verify`."""
        return self._store

    def abandon(self) -> None:
        """Let go at once and leave everything as it lies, as `kill -9` would. For tests."""
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
        with self._lock:
            stores = (self._store, self._failed)
            self._store, self._failed, self._reason = None, None, "it is closed"
        for store in stores:
            if store is not None:
                store.drop()

    # ---- health ---------------------------------------------------------------------------------

    @property
    def _retry_every(self) -> float:
        """To look into the table of mounts costs nothing."""
        return 1.0 if self._mount_point else RETRY_EVERY

    def _open_store(self) -> Store:
        if self._mount_point:
            self._check_mount()
        return Store(
            self.path,
            self.rules,
            owner=self._owner,
            clock=self._clock,
            disk=self._disk,
            boot=self._boot,
            fresh=self._start_over,
            limit=self._limit(),
        )

    def trouble(self, store: Store | None, error: Exception | None) -> CacheError:
        """What an error of `store` means to a caller. Sets the tier aside, unless it is just full."""
        if isinstance(error, OSError) and error.errno in _NO_DESCRIPTORS:
            return TierFull(f"cache tier {self.name}: {error.strerror}; raise the limit (ulimit -n)")
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            return TierFull(f"cache tier {self.name} is full: {error}")
        with self._lock:
            if store is not None and store is self._store:
                store.dead = True
                self._last = store.figures()
                self._store, self._failed, self._reason = None, store, _cause(error)
                self._retry_at = self._clock.monotonic() + RETRY_EVERY
                # NOTADB and CORRUPT: the medium works, but what the catalogue says is lost.
                code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                self._start_over = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
                log.warning(
                    "cache tier %s is set aside: %s. Reads go on without it; it is tried again every %.0f s",
                    self.name,
                    self._reason,
                    RETRY_EVERY,
                )
            return TierBroken(f"cache tier {self.name} is set aside: {self._reason or _cause(error)}")

    def upkeep(self) -> None:
        """One round of what the keeper does: sync, evict ahead, look for what a crash left behind, and
        try a tier that was set aside."""
        with self._keeping:
            store = self._store
            if store is not None:
                with self._lock:
                    limit = self._limit()  # a lease may have ended, or come while the store was opened
                store.limit(limit)
                try:
                    store.upkeep()
                except (OSError, sqlite3.Error) as error:
                    self.trouble(store, error)
            elif not self._stop.is_set() and self._clock.monotonic() >= self._retry_at:
                self._retry_at = self._clock.monotonic() + self._retry_every
                self._revive()

    def _revive(self) -> None:
        with self._lock:
            failed, self._failed = self._failed, None
        if failed is not None:
            failed.drop()
        try:
            self._check_device()
            store = self._open_store()
            try:
                store.probe()
            except BaseException:
                store.drop()
                raise
        except (OSError, sqlite3.Error, CacheError) as error:
            with self._lock:
                self._reason = _cause(error)
            return
        with self._lock:
            self._store, self._reason, self._start_over = store, "", False
        used, count = store.figures()[:2]
        log.info("cache tier %s is back, with %d entries, %s", self.name, count, format_size(used))

    def _check_device(self) -> None:
        """Raise OSError when the directory's file system is not mounted any more: what is there now
        is the mount point, on a file system that nobody gave us."""
        if self._mount_point:
            return  # another tmpfs will do as well: see `_check_mount`
        path = self.path
        while not os.path.lexists(path):
            path = os.path.dirname(path)
        if os.stat(path).st_dev != self._device:
            raise OSError(errno.ENODEV, "another file system is there now", self.path)

    def _check_mount(self) -> None:
        """Raise OSError unless a tmpfs is there, and no smaller than the quota: what the directory lies on
        without it is not ours to fill."""
        size = limits.own_tmpfs(self._mount_point)
        if size is None:
            why = "no tmpfs of its own is mounted there yet, which is for the node's plugin to do"
        elif size < self.rules.quota:
            why = f"the tmpfs there has {format_size(size)}, and the quota is {format_size(self.rules.quota)}"
        else:
            return
        raise _NotMounted(errno.ENODEV, why, self._mount_point)

    def _keep(self) -> None:
        while not self._stop.wait(_PACE):
            self.upkeep()

    # ---- for DirectoryFile ----------------------------------------------------------------------

    def attach(self, file: "DirectoryFile") -> "tuple[Store, Entry] | None":
        """Give a file an entry of the living store, if there is one."""
        with file.lock:
            store = self._store
            if store is None or file.closed:
                return None
            if file.held is None or file.held[0] is not store:
                try:
                    file.held = (store, store.open(file.key))
                except (OSError, sqlite3.Error) as error:
                    self.trouble(store, error)
                    return None
            return file.held


class _NotMounted(OSError):
    """What the tier is to lie on is not there."""


class DirectoryFile:
    """One open of an entry. After its tier was set aside it is empty, until the tier is back."""

    __slots__ = ("_tier", "closed", "held", "key", "lock")

    def __init__(self, tier: DirectoryTier, key: CacheKey) -> None:
        self._tier, self.key = tier, key
        # Guards changes of the next two. `held` changes when a tier comes back; an entry of a dead
        # store needs no release.
        self.lock = threading.Lock()
        self.closed = False
        self.held: tuple[Store, Entry] | None = None

    def __repr__(self) -> str:
        return f"<DirectoryFile {self._tier.name} {self.key.key!r}{' closed' * self.closed}>"

    def _alive(self) -> tuple[Store, Entry] | None:
        held = self.held
        return self._tier.attach(self) if held is None or held[0].dead else held

    @property
    def evicted(self) -> bool:
        held = self.held
        return held is not None and not held[0].dead and held[1].gone

    def gaps(self, span: ByteRange) -> list[ByteRange]:
        held = self._alive()
        if held is None:
            return [span] if span.start < span.stop else []
        return held[0].gaps(held[1], span)

    def read(self, span: ByteRange) -> Buffer:
        held = self._alive()
        if held is None:
            raise self._tier.trouble(None, None)
        try:
            return held[0].read(held[1], span)
        except (OSError, sqlite3.Error) as error:
            raise self._tier.trouble(held[0], error) from error

    def read_nowait(self, span: ByteRange) -> Buffer | None:
        held = self.held
        if held is None or held[0].dead:
            return None
        try:
            return held[0].read_nowait(held[1], span)
        except OSError:
            return None  # `read` finds out

    def fill(self, start: int, data: Buffer) -> None:
        held = self._alive()
        if held is None:
            raise self._tier.trouble(None, None)
        try:
            held[0].fill(held[1], start, data)
        except (OSError, sqlite3.Error) as error:
            raise self._tier.trouble(held[0], error) from error

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
            held, self.held = self.held, None
        if held is not None:
            store, entry = held
            try:
                store.release(entry)
            except (OSError, sqlite3.Error) as error:
                self._tier.trouble(store, error)


class LentFile:
    """A cached file that the kernel may read by itself. Lives on when its tier is set aside."""

    __slots__ = ("_entry", "_handle", "_lock", "_store", "_tier", "descriptor", "identity")

    def __init__(self, tier: DirectoryTier, store: Store, entry: Entry, handle: Handle) -> None:
        self._tier, self._store, self._entry = tier, store, entry
        self._lock = threading.Lock()  # guards _handle, which is None once this is closed
        self._handle: Handle | None = handle
        self.descriptor = handle.fd
        found = os.fstat(handle.fd)
        self.identity = (found.st_dev, found.st_ino)

    def __repr__(self) -> str:
        closed = " closed" * (self._handle is None)
        return f"<LentFile {self._tier.name} {self._entry.key.key!r} {self.descriptor}{closed}>"

    def close(self) -> None:
        with self._lock:
            if self._handle is None:
                return
            self._handle = None  # before the release, which may ask who else has the file open
        try:
            self._store.release(self._entry)
        except (OSError, sqlite3.Error) as error:
            self._tier.trouble(self._store, error)


class TakenFile:
    """Room for a whole file, and then that file."""

    __slots__ = ("_key", "_open", "_store", "_tier")

    def __init__(self, tier: DirectoryTier, store: Store, key: CacheKey) -> None:
        self._tier, self._store, self._key = tier, store, key
        self._open = True  # the room is neither used nor given back

    def __repr__(self) -> str:
        return f"<TakenFile {self._tier.name} {self._key.key!r}{' admitted' * self._open}>"

    def take(self, descriptor: int, blocks: Sequence[Block]) -> bool:
        try:
            self._open = not self._store.take(self._key, descriptor, blocks)
        except (OSError, sqlite3.Error) as error:
            self._tier.trouble(self._store, error)
        return not self._open

    def withdraw(self) -> None:
        try:
            self._store.withdraw(bytes.fromhex(self._key.digest))
        except (OSError, sqlite3.Error) as error:
            raise self._tier.trouble(self._store, error) from error

    def close(self) -> None:
        if self._open:
            self._open = False
            self._store.refuse(self._key)


def _passes(error: OSError | sqlite3.Error) -> bool:
    """Whether what was in the way may be gone the next time: no room, or an error of the medium."""
    if isinstance(error, OSError):
        return isinstance(error, _NotMounted) or error.errno in (*_FULL, errno.EIO)
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _cause(error: Exception | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)


__all__ = ["MANAGED", "Damaged", "DirectoryFile", "DirectoryTier", "Owner", "Rules", "read_owner"]
