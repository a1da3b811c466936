"""
A data set as a file system: lookup, getattr, readdir, open, read as plain functions on plain values.

It knows no driver: it takes node numbers, names and offsets, and returns `Attributes`, handles and
bytes, or raises. A driver decodes a request, makes one call, encodes the answer, and turns whatever
was raised into an errno by `failed`, which holds the one table of that border.

Nothing named `*_nowait` waits for a store or a disk: it answers from what is known and in memory, or
returns None, and then the driver makes the call without `_nowait` in a thread.

What an open may see. The kernel is told to believe a name for what is left of the TTL of its
directory, so lookups recur in time; and `open` holds the node's version against the index once
more. When the index knows another version, or the rest of the TTL has passed and the store has one,
the answer is ESTALE, on which the kernel looks the name up again and opens the node of the new
version: nobody sees the error. An open file keeps its version until the last close.
"""

import errno
import itertools
import logging
import os
import stat
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from datacache.clock import Clock, SystemClock
from datacache.config.settings import MountSettings
from datacache.errors import (
    Archived,
    CredentialsExpired,
    DatacacheError,
    Denied,
    IsADirectory,
    NoSuchPath,
    NotADirectory,
    NotFound,
    VersionChanged,
)
from datacache.index.index import ROOT, Index
from datacache.model import Buffer, ByteRange, CacheKey, Coverage, Entry, Kind
from fuse.nodes import Nodes, Stale

log = logging.getLogger(__name__)

FOREVER = 10 * 365 * 86400.0
"""Seconds that stand for "never ends": the kernel counts in jiffies and libfuse casts to long."""

PAGE = 1000
"""Entries taken from the index at once: a READDIR of the kernel takes 25 to 200 of them, so most cost
no query; 1,000 are about 0.5 MiB while a directory is open."""

LOG_EVERY = 30.0
"""Seconds between two log lines of one kind of error: an outage fails thousands of reads a second."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND | os.O_CREAT


class Refused(Exception):
    """A request that is answered with `errno` and is nobody's fault but the caller's."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


_ERRNO: tuple[tuple[type[Exception], int], ...] = (
    # The first that fits; anything else is EIO.
    (Stale, errno.ESTALE),
    (NoSuchPath, errno.ENOENT),
    (NotADirectory, errno.ENOTDIR),
    (IsADirectory, errno.EISDIR),
    (NotFound, errno.ENOENT),
    (CredentialsExpired, errno.EIO),  # they are renewed; that it did not work yet is not a "no"
    (Denied, errno.EACCES),
    # EACCES is left to mean the credentials alone, so that nobody looks for a wrong key; the log has
    # the sentence that says what to restore.
    (Archived, errno.EIO),
    (VersionChanged, errno.ESTALE),
)
_EXPECTED = (Refused, Stale, NoSuchPath, NotADirectory, IsADirectory, NotFound)
"""Answers, not failures: neither logged nor counted."""


class OpenFile(Protocol):
    """One open object. `datacache.reading.reader.OpenObject` is one."""

    def read(self, offset: int, length: int) -> Buffer: ...
    def read_nowait(self, offset: int, length: int) -> Buffer | None: ...
    def close(self) -> None: ...


class Opener(Protocol):
    """What is asked of `datacache.reading.reader.Reader`."""

    def open(self, entry: Entry) -> OpenFile: ...
    def cache_key(self, entry: Entry) -> CacheKey: ...


class Copies(Protocol):
    """What is asked of a tier."""

    def ranges(self, key: CacheKey) -> list[ByteRange]: ...


class Attributes(NamedTuple):
    """A node as `stat` shows it, and for how many seconds the kernel may believe that.

    `node` 0: there is no such name, to be believed for `entry_timeout`.
    """

    node: int
    mode: int = 0
    nlink: int = 1
    size: int = 0
    mtime_ns: int = 0
    entry_timeout: float = 0.0
    attr_timeout: float = 0.0

    @property
    def blocks(self) -> int:
        """Blocks of 512 bytes, as if the file were whole: what is cached of it shows no holes."""
        return -(-self.size // 512)


class Listed(NamedTuple):
    """One name of a directory. `offset` is where a reader goes on after it."""

    name: bytes
    attributes: Attributes
    offset: int


class Space(NamedTuple):
    """What statfs says, in bytes and files: all of it is used, nothing is free."""

    total: int
    files: int


@dataclass(slots=True)
class _Directory:
    """An open directory and the page of entries that the kernel is being served from."""

    ino: int
    after: int = -1
    entries: list[Entry] = field(default_factory=list)
    expires: float = 0.0
    """Monotonic time until which `entries` may be believed."""

    def holds(self, after: int) -> bool:
        """Whether what comes after offset `after` can be told from this page. Offset 0 is the start of
        a new reading, which sees the directory as it is now."""
        if after == 0 or not self.after <= after:
            return False
        return self.ends or after < self.entries[-1].ino

    @property
    def ends(self) -> bool:
        return self.after >= 0 and len(self.entries) < PAGE


@dataclass(slots=True)
class _File:
    """An open file. Its object is opened with the first read: where the kernel has the pages of an
    earlier open, there is none, and an open costs no look into the tiers."""

    node: int
    entry: Entry
    opened: OpenFile | None = None
    opening: threading.Lock = field(default_factory=threading.Lock)
    """Held while `opened` is set; once set it stays."""

    def ready(self, reader: Opener) -> OpenFile:
        with self.opening:
            if self.opened is None:
                self.opened = reader.open(self.entry)
            return self.opened


class FileSystem:
    """The read-only file system of one data set. Thread-safe."""

    def __init__(
        self,
        index: Index,
        reader: Opener,
        settings: MountSettings,
        *,
        tiers: Mapping[str, Copies] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`tiers` by name, for the extended attributes."""
        self._index, self._reader, self._settings = index, reader, settings
        self._tiers = dict(tiers or {})
        self._clock = clock or SystemClock()
        self.uid = os.getuid() if settings.uid is None else settings.uid
        self.gid = os.getgid() if settings.gid is None else settings.gid
        self._modes = {
            Kind.FILE: stat.S_IFREG | settings.file_mode,
            Kind.DIRECTORY: stat.S_IFDIR | settings.dir_mode,
        }
        self._nodes = Nodes()
        self._handles = itertools.count(1)
        # Keyed by handle; each key is put in once and taken out once, by the kernel's open and release.
        self._files: dict[int, _File] = {}
        self._directories: dict[int, _Directory] = {}
        self._complaints = _Complaints(self._clock)

    def __repr__(self) -> str:
        return f"<FileSystem {len(self._files)} files open, {self._nodes!r}>"

    # ---- names -----------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """The node of `name`, which the kernel will remember until it is forgotten; node 0 where
        there is no such name."""
        directory = self._nodes.path(parent)
        try:
            return self._told(self._index.lookup(directory, name))
        except NoSuchPath:
            return self._missing(directory)

    def lookup_nowait(self, parent: int, name: bytes) -> Attributes | None:
        directory = self._nodes.path(parent)
        try:
            entry = self._index.lookup_nowait(directory, name)
        except NoSuchPath:
            return self._missing(directory)
        return None if entry is None else self._told(entry)

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """The kernel lets go of (node, count) pairs."""
        self._nodes.forget(forgotten)

    def getattr(self, node: int) -> Attributes:
        """The attributes of `node`. Does not wait for the store."""
        entry = self._entry(node)
        fresh = FOREVER if entry.ino == ROOT else self._index.fresh_for(entry.parent)
        return self._attributes(entry, node, fresh)

    def opendir(self, node: int) -> int:
        """A handle for `readdir`."""
        handle = next(self._handles)
        self._directories[handle] = _Directory(self._nodes.path(node))
        return handle

    def readdir(self, handle: int, offset: int) -> Iterator[Listed]:
        """Entries after `offset`, at least one unless the directory ends there.

        Each one that is taken from the iterator counts as told to the kernel; what did not fit is
        to be `forget`-ed once.
        """
        directory = self._directories[handle]
        entries = self._index.children(directory.ino, after=offset, limit=PAGE)
        fresh = self._index.fresh_for(directory.ino)
        directory.after, directory.entries = offset, entries
        directory.expires = self._clock.monotonic() + fresh
        return self._listed(entries, fresh)

    def readdir_nowait(self, handle: int, offset: int) -> Iterator[Listed] | None:
        directory = self._directories[handle]
        if not directory.holds(offset):
            return None
        start = bisect_right(directory.entries, offset, key=_ino)
        fresh = max(0.0, directory.expires - self._clock.monotonic())
        return self._listed(itertools.islice(directory.entries, start, None), fresh)

    def releasedir(self, handle: int) -> None:
        del self._directories[handle]

    # ---- bytes -----------------------------------------------------------------------------------

    def open(self, node: int, flags: int) -> int:
        """A handle for `read`, of the version that `node` names. Raises Stale when that is not the
        current one: look the name up again."""
        handle = self.open_nowait(node, flags)
        if handle is None:
            handle = self._opened(node, self._index.current(self._nodes.path(node)))
        return handle

    def open_nowait(self, node: int, flags: int) -> int | None:
        if flags & _WRITING:
            raise Refused(errno.EROFS)
        entry = self._index.entry(self._nodes.path(node))
        return None if self._index.fresh_for(entry.parent) <= 0 else self._opened(node, entry)

    def read(self, handle: int, offset: int, size: int) -> Buffer:
        """`size` bytes from `offset` on, fewer only at the end of the file."""
        try:
            return self._files[handle].ready(self._reader).read(offset, size)
        except NotFound as gone:
            # The name was there when it was opened: what the reader has lost is this version.
            raise VersionChanged(f"the object is no longer in the store: {gone}") from gone

    def read_nowait(self, handle: int, offset: int, size: int) -> Buffer | None:
        opened = self._files[handle].opened
        return None if opened is None else opened.read_nowait(offset, size)

    def release(self, handle: int) -> None:
        """The last close of `handle`. A file that was never read counts as opened now: what the kernel
        has pages of is in use, and is not what a tier should evict first."""
        file = self._files.pop(handle)
        self._nodes.close(file.node)
        file.ready(self._reader).close()

    def release_nowait(self, handle: int) -> bool:
        """Whether it could be done without waiting."""
        file = self._files[handle]
        if file.opened is None:
            return False
        self.release(handle)
        return True

    # ---- the rest --------------------------------------------------------------------------------

    def statfs(self) -> Space:
        stats = self._index.stats()
        return Space(total=stats.bytes, files=stats.files + stats.directories)

    def listxattr(self, node: int) -> list[bytes]:
        """Names of extended attributes; files have them where `settings.xattr` is on."""
        self._check_xattr()
        return list(_XATTRS) if self._entry(node).kind is Kind.FILE else []

    def getxattr(self, node: int, name: bytes) -> bytes:
        self._check_xattr()
        if name not in _XATTRS or (entry := self._entry(node)).kind is not Kind.FILE:
            raise Refused(errno.ENODATA)
        key = self._reader.cache_key(entry)
        held = {tier: ranges for tier, copies in self._tiers.items() if (ranges := copies.ranges(key))}
        value = {
            b"user.datacache.uri": f"{key.source.partition('?')[0].rstrip('/')}/{key.key}",
            b"user.datacache.version": key.token,
            b"user.datacache.tier": ",".join(held),
            b"user.datacache.cached": str(
                Coverage(span for ranges in held.values() for span in ranges).length
            ),
        }[name]
        return value.encode("utf-8", "surrogateescape")

    def failed(self, operation: str, error: Exception) -> int:
        """The errno of whatever an operation raised; logged and counted where it is a failure."""
        if not isinstance(error, _EXPECTED):
            self._complaints.add(operation, error)
        if isinstance(error, Refused):
            return error.errno
        return next((number for kind, number in _ERRNO if isinstance(error, kind)), errno.EIO)

    def stats(self) -> dict[str, Any]:
        """For `datacache status`."""
        nodes = self._nodes.stats()
        return {
            "nodes": nodes.known,
            "later_versions": nodes.later,
            "open_files": len(self._files),
            "open_directories": len(self._directories),
            "errors": self._complaints.counts(),
        }

    def close(self) -> None:
        """Close what the kernel left open. No request may be under way."""
        while self._files:
            _, file = self._files.popitem()
            self._nodes.close(file.node)
            if file.opened is not None:
                file.opened.close()
        self._directories.clear()

    # ---- in common -------------------------------------------------------------------------------

    def _opened(self, node: int, entry: Entry) -> int:
        self._nodes.check(node, entry)
        if entry.kind is Kind.DIRECTORY:
            raise IsADirectory(self._index.path(entry.ino))
        self._nodes.open(node, entry)
        handle = next(self._handles)
        self._files[handle] = _File(node, entry)
        return handle

    def _entry(self, node: int) -> Entry:
        """What `node` names. Raises Stale when that can no longer be told."""
        if (entry := self._nodes.opened(node)) is not None:
            return entry
        entry = self._index.entry(self._nodes.path(node))
        self._nodes.check(node, entry)
        return entry

    def _told(self, entry: Entry) -> Attributes:
        fresh = self._index.fresh_for(entry.parent)
        return self._attributes(entry, self._nodes.remember(entry), fresh)

    def _missing(self, directory: int) -> Attributes:
        fresh = self._index.fresh_for(directory)
        return Attributes(0, entry_timeout=_timeout(self._negative_timeout, fresh))

    @property
    def _negative_timeout(self) -> float | None:
        chosen = self._settings.negative_timeout
        return self._settings.entry_timeout if chosen is None else chosen

    def _listed(self, entries: Iterable[Entry], fresh: float) -> Iterator[Listed]:
        remember = self._nodes.remember
        for entry in entries:
            yield Listed(entry.name, self._attributes(entry, remember(entry), fresh), entry.ino)

    def _attributes(self, entry: Entry, node: int, fresh: float) -> Attributes:
        settings = self._settings
        valid = _timeout(settings.entry_timeout, fresh)
        return Attributes(
            node,
            self._modes[entry.kind],
            1,  # of directories too, where it means "not counted": nobody may infer sub-directories
            entry.size,
            entry.mtime_ns,
            valid,
            valid if settings.attr_timeout is None else min(settings.attr_timeout, FOREVER),
        )

    def _check_xattr(self) -> None:
        if not self._settings.xattr:
            raise Refused(errno.ENOSYS)  # the kernel does not ask again


_XATTRS = (
    b"user.datacache.uri",
    b"user.datacache.version",
    b"user.datacache.tier",
    b"user.datacache.cached",
)


def _ino(entry: Entry) -> int:
    return entry.ino


def _timeout(chosen: float | None, fresh: float) -> float:
    """Seconds for the kernel: as chosen, or what is left of the TTL."""
    return min(FOREVER, max(0.0, fresh if chosen is None else chosen))


class _Complaints:
    """Counts failures by kind, and logs each kind once in a while. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._next: dict[str, float] = {}
        self._silent: Counter[str] = Counter()

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def add(self, operation: str, error: Exception) -> None:
        kind, now = type(error).__name__, self._clock.monotonic()
        with self._lock:
            self._counts[kind] += 1
            if now < self._next.get(kind, now):
                self._silent[kind] += 1
                return
            self._next[kind] = now + LOG_EVERY
            more = self._silent.pop(kind, 0)
        also = f" (and {more} more {kind} before)" if more else ""
        if isinstance(error, DatacacheError):
            log.warning("%s failed: %s%s", operation, error, also)
        else:
            log.error("%s failed unexpectedly%s", operation, also, exc_info=error)
