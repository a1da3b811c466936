"""
A data set as a file system: lookup, getattr, readdir, open, read as plain functions on plain values.

It knows no driver: it takes node numbers, names and offsets, and returns `Attributes`, `Opened` and
bytes, or raises. A driver decodes a request, makes one call, encodes the answer, and turns whatever
was raised into an errno by `failed`, which holds the one table of that border.

Nothing named `*_nowait` waits for a store or a disk: it answers from what is known and in memory, or
returns None, and then the driver makes the call without `_nowait` in a thread.

What an open may see. The kernel is told to believe a name for what is left of the TTL of its
directory, so lookups recur in time; and `open` holds the node's version against the index once
more. When the index knows another version, or the rest of the TTL has passed and the store has one,
the answer is ESTALE, on which the kernel looks the name up again and opens the node of the new
version: nobody sees the error. An open file keeps its version until the last close.

What an open gives. Where the driver can let the kernel read a cached file itself (`Backings`), a file
that is whole in a tier is opened on that, and its reads never come here. A small file that is not
whole is made so first; any other is served until its last close.

Reads of handles that are not known here are reads all the same: a driver may let the kernel open
files without asking, or have taken a mount over from a daemon that gave the handle out. The node says
which version of which path it is.
"""

import errno
import itertools
import logging
import os
import stat
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from cachetools import LRUCache

from datacache.cache.tier import Lent
from datacache.clock import Clock, SystemClock
from datacache.config.settings import MountSettings
from datacache.errors import (
    Archived,
    CredentialsExpired,
    DatacacheError,
    Denied,
    IndexFull,
    IsADirectory,
    LandingFull,
    NoSuchPath,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotHere,
    OtherStore,
    PathExists,
    TooManyAttributes,
    VersionChanged,
)
from datacache.index.index import ROOT, Index
from datacache.model import Buffer, ByteRange, CacheKey, Coverage, Entry, Kind, MiB
from fuse import nodes
from fuse.listings import Listings
from fuse.nodes import Nodes, Stale

log = logging.getLogger(__name__)

FOREVER = 10 * 365 * 86400.0
"""Seconds that stand for "never ends": the kernel counts in jiffies and libfuse casts to long."""

PAGE = 1000
"""Entries taken from the index at once: a READDIR of the kernel takes 25 to 200 of them, so most cost
no query; 1,000 are about 0.5 MiB while a directory is open."""

LOG_EVERY = 30.0
"""Seconds between two log lines of one kind of error: an outage fails thousands of reads a second."""

FETCHED_AT_OPEN = 4 * MiB
"""Bytes of the largest file that an open waits for, so that it can be passed through: one request to the
store, which the first read would wait for too."""

NAME_MAX = 255
"""Bytes of the longest name that a directory shows (docs/names.md), as statfs says."""

RECOVERED = 64
"""Objects kept open for reads without an open of ours. Each is a descriptor, and not evicted meanwhile."""

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
    (PathExists, errno.EEXIST),
    (NotEmpty, errno.ENOTEMPTY),
    (NotHere, errno.EPERM),
    (OtherStore, errno.EXDEV),
    (TooManyAttributes, errno.ENOSPC),  # as local file systems say it; E2BIG is of a single one
    (LandingFull, errno.ENOSPC),
    (IndexFull, errno.ENOSPC),
    (NotFound, errno.ENOENT),
    (CredentialsExpired, errno.EIO),  # they are renewed; that it did not work yet is not a "no"
    (Denied, errno.EACCES),
    # EACCES is left to mean the credentials alone, so that nobody looks for a wrong key; the log has
    # the sentence that says what to restore.
    (Archived, errno.EIO),
    (VersionChanged, errno.ESTALE),
)
_EXPECTED = (
    Refused, Stale, NoSuchPath, NotADirectory, IsADirectory, PathExists, NotEmpty, NotHere, OtherStore,
    TooManyAttributes,
    NotFound,
)  # fmt: skip
"""Answers, not failures: neither logged nor counted."""


class OpenFile(Protocol):
    """One open object. `datacache.reading.reader.OpenObject` is one."""

    def read(self, offset: int, length: int) -> Buffer: ...
    def read_nowait(self, offset: int, length: int) -> Buffer | None: ...
    def close(self) -> None: ...


class Opener(Protocol):
    """What is asked of `datacache.reading.reader.Reader`."""

    def open(self, entry: Entry) -> OpenFile: ...
    def lend(self, entry: Entry) -> Lent | None: ...
    def read_whole(self, entry: Entry) -> Buffer | None: ...
    def fetch(self, entry: Entry) -> int: ...
    def cache_key(self, entry: Entry) -> CacheKey: ...


class Copies(Protocol):
    """What is asked of a tier."""

    def ranges(self, key: CacheKey) -> list[ByteRange]: ...


class Backings(Protocol):
    """Files that the kernel was told of, to read them itself. `fuse.connection.Backings` is one."""

    def acquire(self, lent: Lent) -> int | None:
        """The number under which the kernel knows the file, until as many `release`s; None where it
        will not have it."""

    def again(self, identity: tuple[int, int]) -> int | None:
        """Another `acquire` of a file that somebody has open; None where nobody has any more."""

    def release(self, identity: tuple[int, int]) -> None:
        """Undo one `acquire` or `again` of the file with this identity."""


class Attributes(NamedTuple):
    """A node as `stat` shows it, and for how many seconds the kernel may believe that.

    `node` 0: there is no such name, to be believed for `entry_timeout`. `ino` is the path's, whatever
    becomes of it.
    """

    node: int
    ino: int = 0
    mode: int = 0
    nlink: int = 1
    size: int = 0
    mtime_ns: int = 0
    entry_timeout: float = 0.0
    attr_timeout: float = 0.0
    uid: int = 0
    gid: int = 0

    @property
    def blocks(self) -> int:
        """Blocks of 512 bytes, as if the file were whole: what is cached of it shows no holes."""
        return -(-self.size // 512)


class Listed(NamedTuple):
    """One name of a directory. `offset` is where a reader goes on after it."""

    name: bytes
    attributes: Attributes
    offset: int


class Opened(NamedTuple):
    """An open file: its handle, and the number of the file that the kernel is to read itself (0: none)."""

    handle: int
    backing: int = 0
    flush: bool = False
    """Each close is to be told: it was opened for writing."""
    keep: bool = True
    """Pages of earlier opens may stay."""


class Space(NamedTuple):
    """What statfs says, in bytes and files: where nothing can be written, all of it is used."""

    total: int
    files: int
    free: int = 0
    free_files: int = 0


@dataclass(frozen=True, slots=True)
class _Page:
    """Entries of a directory, from which the kernel is being served."""

    after: int
    entries: list[Entry]
    expires: float
    """Monotonic time until which `entries` may be believed."""
    edition: int | None
    """Of the listing that they are from; None: not known."""

    def holds(self, after: int) -> bool:
        """Whether what comes after offset `after` can be told from this page. Offset 0 is the start of
        a new reading, which sees the directory as it is now."""
        if after == 0 or after < self.after:
            return False
        return len(self.entries) < PAGE or after < self.entries[-1].ino


@dataclass(slots=True)
class _Directory:
    """An open directory. Its page is replaced whole: several may read it at once."""

    ino: int
    page: _Page | None = None


@dataclass(slots=True)
class _File:
    """An open file. Its object is opened with the first read: where the kernel has the pages of an
    earlier open, or reads the cached file itself, there is none."""

    node: int
    entry: Entry
    opened: OpenFile | None = None
    lent: Lent | None = None
    passed: tuple[int, int] | None = None
    """The cached file that the kernel reads by itself. It was lent to whoever opened the node first."""
    opening: threading.Lock = field(default_factory=threading.Lock)
    """Held while `opened` is set; once set it stays."""

    def ready(self, reader: Opener) -> OpenFile:
        if self.opened is None:
            with self.opening:
                if self.opened is None:
                    self.opened = reader.open(self.entry)
        return self.opened

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()
        if self.lent is not None:
            self.lent.close()


class _Recovered:
    """Files that are read though nobody opened them here, the latest ones. Thread-safe."""

    def __init__(self) -> None:
        # Under the lock: the files by node, and how many calls use each. One that is used is not closed.
        self._lock = threading.Lock()
        self._files: OrderedDict[int, list[Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def has(self, node: int) -> bool:
        """Whether `use` would find it open."""
        return node in self._files

    @contextmanager
    def use(self, node: int, entry: Callable[[int], Entry]) -> Iterator[_File]:
        with self._lock:
            held = self._files.get(node)
            if held is None:
                held = self._files[node] = [_File(node, entry(node)), 0]
            else:
                self._files.move_to_end(node)
            held[1] += 1
            idle = self._excess()
        for file in idle:
            file.close()
        try:
            yield held[0]
        finally:
            with self._lock:
                held[1] -= 1

    def drop(self, node: int) -> None:
        """Close what `use` has open of a node, unless it is being used."""
        with self._lock:
            held = self._files.get(node)
            if held is None or held[1]:
                return
            del self._files[node]
        held[0].close()

    def _excess(self) -> list[_File]:
        found: list[_File] = []
        for node, (file, users) in list(self._files.items())[: max(0, len(self._files) - RECOVERED)]:
            if not users:
                del self._files[node]
                found.append(file)
        return found

    def close(self) -> None:
        with self._lock:
            files = [file for file, _ in self._files.values()]
            self._files.clear()
        for file in files:
            file.close()


class FileSystem:
    """The read-only file system of one data set. Thread-safe."""

    writable = False
    """Whether it is a `fuse.writable.WritableFileSystem`, which is not imported where nothing is written."""

    def __init__(
        self,
        index: Index,
        reader: Opener,
        settings: MountSettings,
        *,
        tiers: Mapping[str, Copies] | None = None,
        backings: Backings | None = None,
        life: int = 0,
        clock: Clock | None = None,
    ) -> None:
        """`tiers` by name, for the extended attributes. `backings`: where the kernel can be told of cached
        files. `life` counts the daemons that served this mount before."""
        self._index, self._reader, self._settings = index, reader, settings
        self._tiers = dict(tiers or {})
        self._clock = clock or SystemClock()
        self.uid = os.getuid() if settings.uid is None else settings.uid
        self.gid = os.getgid() if settings.gid is None else settings.gid
        self._modes = {
            Kind.FILE: stat.S_IFREG | settings.file_mode,
            Kind.DIRECTORY: stat.S_IFDIR | settings.dir_mode,
        }
        self._backings = backings
        self._nodes = Nodes(life=life, passthrough=backings is not None)
        # Never one that an earlier daemon gave out: the kernel still asks with those.
        self._handles = itertools.count(1 | life << 48)
        # Keyed by handle; each key is put in once and taken out once, by the kernel's open and release.
        self._files: dict[int, _File] = {}
        self._directories: dict[int, _Directory] = {}
        # Directories that are read though nobody opened them here, the latest ones.
        self._unopened: LRUCache[int, _Directory] = LRUCache(RECOVERED)
        self._unopened_lock = threading.Lock()
        self._listings = Listings()
        self._recovered = _Recovered()
        self._complaints = _Complaints(self._clock)

    def __repr__(self) -> str:
        return f"<FileSystem {len(self._files)} files open, {self._nodes!r}>"

    # ---- names -----------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """The node of `name`, which the kernel will remember until it is forgotten; node 0 where
        there is no such name."""
        _check_name(name)
        directory = nodes.path(parent)
        try:
            return self._told(self._index.lookup(directory, name))
        except NoSuchPath:
            return self._missing(directory)

    def lookup_nowait(self, parent: int, name: bytes) -> Attributes | None:
        _check_name(name)
        directory = nodes.path(parent)
        try:
            entry = self._index.lookup_nowait(directory, name)
        except NoSuchPath:
            return self._missing(directory)
        return None if entry is None else self._told(entry)

    def getattr(self, node: int) -> Attributes:
        """The attributes of `node`. Does not wait for the store."""
        entry = self._entry(node)
        fresh = FOREVER if entry.ino == ROOT else self._index.fresh_for(entry.parent)
        return self._attributes(entry, fresh, node)

    def opendir(self, node: int) -> int:
        """A handle for `readdir`."""
        handle = next(self._handles)
        self._directories[handle] = _Directory(nodes.path(node))
        return handle

    @property
    def pinned(self) -> bool:
        """Whether all listings last. Of a live data set only those above its mount points do."""
        return self._index.pinned

    def holds(self, node: int) -> bool:
        """Whether what the kernel keeps of a directory's listing, if anything, is how it is now. Asked at
        each opendir: where it does not hold, the kernel is told to drop it."""
        ino = nodes.path(node)
        if self._index.fresh_for(ino) >= FOREVER:
            return True
        return self._listings.opened(ino, self._index.edition(ino))

    def readdir(self, handle: int, offset: int, node: int = 0) -> Iterator[Listed]:
        """Entries after `offset`, at least one unless the directory ends there."""
        directory = self._directory(handle, node)
        if nodes.path(offset) != offset:
            return iter(())  # lseek went beyond what could be the `ino` of anything
        edition = self._index.edition(directory.ino)
        if edition is None and not offset:
            self._index.children(directory.ino, limit=1)  # lists it, so that it has an edition
            edition = self._index.edition(directory.ino)
        entries = self._index.children(directory.ino, after=offset, limit=PAGE)
        if self._index.edition(directory.ino) != edition:
            edition = None  # it has changed meanwhile, and this is from before or after
        fresh = self._index.fresh_for(directory.ino)
        page = directory.page = _Page(offset, entries, self._clock.monotonic() + fresh, edition)
        self._listings.given(directory.ino, page.edition, first=not offset)
        return self._listed(entries, fresh)

    def readdir_nowait(self, handle: int, offset: int, node: int = 0) -> Iterator[Listed] | None:
        directory = self._directory(handle, node)
        page = directory.page
        if page is None or not page.holds(offset):
            return None
        self._listings.given(directory.ino, page.edition, first=False)
        start = bisect_right(page.entries, offset, key=_ino)
        fresh = max(0.0, page.expires - self._clock.monotonic())
        return self._listed(itertools.islice(page.entries, start, None), fresh)

    def releasedir(self, handle: int) -> None:
        self._directories.pop(handle, None)

    def _directory(self, handle: int, node: int) -> _Directory:
        if (directory := self._directories.get(handle)) is not None:
            return directory
        if not node:
            raise Refused(errno.EBADF)
        with self._unopened_lock:
            return self._unopened.setdefault(node, _Directory(nodes.path(node)))

    def directory_node(self, entry: Entry) -> int:
        """The node of the directory that `entry` lies in."""
        return self._nodes.node(self._index.entry(entry.parent))

    # ---- bytes -----------------------------------------------------------------------------------

    def open(self, node: int, flags: int) -> Opened:
        """Open the version that `node` names. Raises Stale when that is not the current one, or is open
        in another way than it would be now: look the name up again."""
        _check_flags(flags)
        with _looked_up_again():
            entry = self._index.current(nodes.path(node))
        self._check(node, entry)
        while True:
            file = _File(node, entry)
            try:
                backing = self._passed_through(file)
                bound = self._nodes.open(node, entry, file.passed)
            except BaseException:
                self._let_go(file)
                raise
            if bound == file.passed:
                return Opened(self._keep(file), backing)
            self._let_go(file)
            joined = self._join(node, entry, bound)
            if joined is not None:
                return joined
            self._nodes.close(node)  # the last of those who had it open has closed it: as if it never was

    def _join(self, node: int, entry: Entry, bound: tuple[int, int] | None) -> Opened | None:
        """Open `node` as others have it open, be it on a cached file that has been evicted since."""
        file = _File(node, entry, passed=bound)
        if bound is None or self._backings is None:
            return Opened(self._keep(file))
        backing = self._backings.again(bound)
        return None if backing is None else Opened(self._keep(file), backing)

    def open_nowait(self, node: int, flags: int) -> Opened | None:
        _check_flags(flags)
        with _looked_up_again():
            entry = self._index.entry(nodes.path(node))
        if self._index.fresh_for(entry.parent) <= 0 or self._backings is not None:
            return None
        self._check(node, entry)
        self._nodes.open(node, entry)
        return Opened(self._keep(_File(node, entry)))

    def _passed_through(self, file: _File) -> int:
        """Let the kernel read the cached file of `file` itself: the number by which it knows that, or 0
        where `file` must be served."""
        if self._backings is None:
            return 0
        lent = self._reader.lend(file.entry) or self._fetched(file)
        backing = self._backings.acquire(lent) if lent is not None else None
        if lent is None or backing is None:
            if lent is not None:
                lent.close()
            return 0
        file.lent, file.passed = lent, lent.identity
        return backing

    def _fetched(self, file: _File) -> Lent | None:
        """Make a small file whole in the cache. Where it cannot be kept, what was fetched serves the reads
        of this open, so it is held open meanwhile. Raises Stale where the store has another version now."""
        if not 0 < file.entry.size <= FETCHED_AT_OPEN:
            return None
        opened = file.ready(self._reader)
        try:
            self._reader.fetch(file.entry)
        except (NotFound, VersionChanged) as gone:
            if self._index.outdated(file.entry):
                raise Stale(str(gone)) from gone
        except DatacacheError:
            return None  # a read will meet it again, and say so
        if (lent := self._reader.lend(file.entry)) is not None:
            file.opened = None
            opened.close()
        return lent

    def _let_go(self, file: _File) -> None:
        if file.passed is not None and self._backings is not None:
            # Before the cached file is given back: as long as the kernel knows of it, it is in use.
            self._backings.release(file.passed)
        file.close()

    def read(self, handle: int, offset: int, size: int, node: int = 0) -> Buffer:
        """`size` bytes from `offset` on, fewer only at the end of the file.

        `node`, where the driver knows it, tells what to read for a handle that is not ours.
        """
        known = self._files.get(handle)
        try:
            if known is not None:
                return known.ready(self._reader).read(offset, size)
            if not node:
                raise Refused(errno.EBADF)
            if not offset and not self._recovered.has(node):
                # A small file, of which this is the only READ of an epoch: opening it and keeping it open
                # would cost more than all the rest.
                entry = self._entry(node)
                if size >= entry.size and (data := self._reader.read_whole(entry)) is not None:
                    return data
            with self._recovered.use(node, self._entry) as file:
                return file.ready(self._reader).read(offset, size)
        except (NotFound, VersionChanged) as gone:
            self._index.outdated(known.entry if known is not None else self._entry(node))  # for the next open
            if isinstance(gone, VersionChanged):
                raise
            # The name was there when it was opened: what the reader has lost is this version.
            raise VersionChanged(f"the object is no longer in the store: {gone}") from gone

    def read_nowait(self, handle: int, offset: int, size: int) -> Buffer | None:
        file = self._files.get(handle)
        opened = file.opened if file is not None else None
        return None if opened is None else opened.read_nowait(offset, size)

    def release(self, handle: int) -> None:
        """The last close of `handle`. A file that was never read counts as opened now: what the kernel
        has pages of is in use, and is not what a tier should evict first."""
        file = self._files.pop(handle, None)
        if file is None:
            return  # opened by a daemon before us
        self._nodes.close(file.node)
        if file.passed is None:
            file.ready(self._reader)
        self._let_go(file)

    def release_nowait(self, handle: int) -> bool:
        """Whether it could be done without waiting."""
        file = self._files.get(handle)
        if file is not None and file.opened is None:
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
        return list(VIRTUAL_XATTRS) if self._entry(node).kind is Kind.FILE else []

    def getxattr(self, node: int, name: bytes) -> bytes:
        self._check_xattr()
        if name not in VIRTUAL_XATTRS or (entry := self._entry(node)).kind is not Kind.FILE:
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
        return {
            "open_files": len(self._files),
            "open_passthrough": self._nodes.stats().passthrough,
            "open_directories": len(self._directories),
            "errors": self._complaints.counts(),
        }

    def leave(self) -> None:
        """The kernel goes on with what is open, and a successor of this daemon serves it."""

    def close(self) -> None:
        """Close what the kernel left open. No request may be under way."""
        while self._files:
            _, file = self._files.popitem()
            self._nodes.close(file.node)
            self._let_go(file)
        self._recovered.close()
        self._directories.clear()

    # ---- in common -------------------------------------------------------------------------------

    def _check(self, node: int, entry: Entry) -> None:
        self._nodes.check(node, entry)
        if entry.kind is Kind.DIRECTORY:
            raise IsADirectory(self._index.path(entry.ino))

    def _keep(self, file: _File) -> int:
        handle = next(self._handles)
        self._files[handle] = file
        return handle

    def _entry(self, node: int) -> Entry:
        """What `node` names, if that is no longer what its path names. Raises Stale when it can no longer
        be told."""
        if (entry := self._nodes.opened(node)) is not None:
            return entry
        name = nodes.read(node)
        generation = name.generation
        with suppress(NoSuchPath):
            entry = self._index.entry(name.ino)
            generation = name.generation_near(entry.generation)
            if entry.generation == generation:
                return entry
        try:
            return self._index.entry(name.ino, generation)
        except NoSuchPath as unknown:
            raise Stale(f"node {node} names a version that is no longer known") from unknown

    def _told(self, entry: Entry) -> Attributes:
        fresh = self._index.fresh_for(entry.parent)
        return self._attributes(entry, fresh)

    def _missing(self, directory: int) -> Attributes:
        fresh = self._index.fresh_for(directory)
        return Attributes(0, entry_timeout=_timeout(self._negative_timeout, fresh))

    @property
    def _negative_timeout(self) -> float | None:
        chosen = self._settings.negative_timeout
        return self._settings.entry_timeout if chosen is None else chosen

    def _listed(self, entries: Iterable[Entry], fresh: float) -> Iterator[Listed]:
        for entry in entries:
            yield Listed(entry.name, self._attributes(entry, fresh), entry.ino)

    def _attributes(self, entry: Entry, fresh: float, node: int = 0) -> Attributes:
        settings = self._settings
        valid = _timeout(settings.entry_timeout, fresh)
        return Attributes(
            node or self._nodes.node(entry),
            entry.ino,
            self._modes[entry.kind],
            1,  # of directories too, where it means "not counted": nobody may infer sub-directories
            entry.size,
            entry.mtime_ns,
            valid,
            valid if settings.attr_timeout is None else min(settings.attr_timeout, FOREVER),
            self.uid,
            self.gid,
        )

    def _check_xattr(self) -> None:
        if not self._settings.xattr:
            raise Refused(errno.ENOSYS)  # the kernel does not ask again


VIRTUAL_XATTRS = (
    b"user.datacache.uri",
    b"user.datacache.version",
    b"user.datacache.tier",
    b"user.datacache.cached",
)


@contextmanager
def _looked_up_again() -> Iterator[None]:
    """A node that has no path any more is stale: something else may have its name by now, and then that is
    what is meant. Where nothing has, the kernel finds out when it looks the name up again."""
    try:
        yield
    except NoSuchPath as gone:
        raise Stale(str(gone)) from gone


def _check_name(name: bytes) -> None:
    if len(name) > NAME_MAX:
        raise Refused(errno.ENAMETOOLONG)


def _check_flags(flags: int) -> None:
    if flags & _WRITING:
        raise Refused(errno.EROFS)


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
