"""
A writable data set as a file system: `FileSystem`, and what changes names, attributes and bytes.

All decisions are the overlay's (`datacache.writing.overlay`); this decodes nodes and handles, and sees to
it that the kernel never has a written file in two ways at once.

A *landed* file, one whose bytes are in a landing file now, is opened on that by readers and writers
alike: where the kernel can be given files (`Backings`), it reads and writes the landing file itself, and
we see neither; else requests become pread and pwrite on it. It has one node (`nodes`, `sole`), so that
all who have it open share its pages and locks. Its size and time are read from the landing file
whenever they are asked for, and the kernel is told to believe them for no time at all.

A clean file is landed by whoever opens it for writing, or truncates it. That makes it another version,
thus another node: the caller is told ESTALE, the kernel looks the name up again (open(2) and truncate(2)
both do) and comes back with the new node. Who had the file open goes on reading the version that it opened.

Handles that are not known here (an earlier daemon gave them out) work by their node.

The kernel may be sending something again that the daemon before this one has done (`again`): making
what is there, or removing what is not, is then no error.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from datacache.config.settings import Durability, MountSettings
from datacache.errors import (
    DatacacheError,
    IsADirectory,
    LandingBroken,
    LandingFull,
    NamespaceError,
    NoSuchPath,
    PathExists,
    VersionChanged,
)
from datacache.index.index import ROOT
from datacache.model import Buffer, Entry, Kind
from datacache.writing.early import Early
from datacache.writing.landing import LandedFile, allocate
from datacache.writing.overlay import Overlay
from fuse import nodes
from fuse.filesystem import (
    FOREVER,
    VIRTUAL_XATTRS,
    Attributes,
    FileSystem,
    Listed,
    Opened,
    OpenFile,
    Refused,
    Space,
    _check_name,
    _File,
    _looked_up_again,
    _Recovered,
)
from fuse.nodes import Stale

BORN = 0.1
"""Seconds for which the kernel may believe what it is told of a file that it has had made. It forgets that by
itself when the file is written to; without it, it would ask again before the open that made it is done."""

FREE_FILES = 1 << 20
"""How many files more statfs says there is room for; a bucket knows no limit."""

_NOREPLACE = 1  # of renameat2(2)
_CREATE, _REPLACE = 1, 2  # of setxattr(2)
_RACES = 8
"""How often a file can be uploaded, or removed, in the very moment of an open before that is given up."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CALLERS = (
    errno.EINVAL,
    errno.EFBIG,
    errno.EOPNOTSUPP,
    errno.ENODEV,
    errno.ENXIO,
    errno.ESPIPE,
    errno.ENOSYS,
)
"""What a disk says of a request, not of itself."""
_SUID, _SGID = stat.S_ISUID, stat.S_ISGID


class _Bytes:
    """The bytes of an open landing file; an `OpenFile`."""

    __slots__ = ("_close", "file", "ino")

    def __init__(self, ino: int, file: LandedFile, close: Callable[[int, LandedFile], None]) -> None:
        self.ino, self.file, self._close = ino, file, close

    def read(self, offset: int, length: int) -> Buffer:
        try:
            return os.pread(self.file.descriptor, length, offset)
        except OSError as error:
            raise _said(error) from error

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return None  # a disk may make us wait

    def write(self, offset: int, data: Buffer) -> int:
        """How many bytes were written: fewer only where there is no room for the rest."""
        left, done = memoryview(data), 0
        try:
            while left:
                count = os.pwrite(self.file.descriptor, left, offset + done)
                done, left = done + count, left[count:]
        except OSError as error:
            if not done:
                raise _said(error) from error
        return done

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self.file.descriptor, size)
        except OSError as error:
            raise _said(error) from error

    def allocate(self, mode: int, offset: int, length: int) -> None:
        try:
            allocate(self.file.descriptor, mode, offset, length)
        except OSError as error:
            raise _said(error) from error

    def close(self) -> None:
        self._close(self.ino, self.file)


class _Readable:
    """A landing file as it is registered with the kernel: read-only, whoever opens it, for what is
    registered stays open, and an upload waits until nobody has the file open for writing. The kernel opens
    it anew by its path, and asks nobody, for each of its own."""

    def __init__(self, file: LandedFile) -> None:
        self._file, self.identity = file, file.identity
        self._own = -1

    @property
    def descriptor(self) -> int:
        if not self._file.writing:
            return self._file.descriptor
        if self._own < 0:
            self._own = os.open(f"/proc/self/fd/{self._file.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        return self._own

    def close(self) -> None:
        if self._own >= 0:
            os.close(self._own)
            self._own = -1


class WritableFileSystem(FileSystem):
    """The file system of a data set that can be written to. Thread-safe."""

    writable = True

    def __init__(
        self, overlay: Overlay, reader: Any, settings: MountSettings, *,
        durability: Durability = Durability.CLOSE, counted: bool | None = None, early: Early | None = None,
        stores: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        """`more`: as of `FileSystem`. `counted`: writers of earlier daemons are counted in the journal; None:
        where nothing can be passed through. Where landing files can be, the kernel is asked who writes.
        `early` uploads what is still open; `stores`: `flush` and `fsync` wait for the bucket to have it."""
        super().__init__(overlay, reader, settings, **more)
        self._overlay, self._durability, self._early = overlay, durability, early
        self.stores = stores
        """Whether `flush` and `fsync` may take as long as an upload."""
        # Where nobody chose, the owner can write: who mounts read-write wants to.
        if settings.file_mode == MountSettings.file_mode:
            self._modes[Kind.FILE] |= stat.S_IWUSR
        if settings.dir_mode == MountSettings.dir_mode:
            self._modes[Kind.DIRECTORY] |= stat.S_IWUSR
        self._modes[Kind.SYMLINK] = stat.S_IFLNK | 0o777
        # Files that are written though nobody opened them here, the latest ones.
        self._written = _Recovered()
        self._gone: set[int] = set()  # what was unlinked and is still open
        self._left = False
        self._counted = self._backings is None if counted is None else counted

    def __repr__(self) -> str:
        return f"<WritableFileSystem {len(self._files)} files open, {self._nodes!r}>"

    # ---- names and attributes ----------------------------------------------------------------------

    def getattr(self, node: int) -> Attributes:
        entry = self._entry(node)
        try:
            fresh = FOREVER if entry.ino == ROOT else self._index.fresh_for(entry.parent)
        except NamespaceError:
            fresh = 0.0  # its directory is gone, too
        found = self._attributes(entry, fresh, node)
        return found._replace(nlink=0) if entry.ino in self._gone else found

    def readlink(self, node: int) -> bytes:
        """Where a symbolic link leads."""
        target = self._overlay.attributes(self._entry(node)).target
        if target is None:
            raise Refused(errno.EINVAL)
        return target

    def mknod(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, again: bool = False
    ) -> Attributes:
        """A new, empty file; nothing else can be made so."""
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise Refused(errno.EPERM)
        directory = self._directory_of(parent, name)
        with self._made_before(again):
            uid, gid, mode = self._owner(directory, uid, gid, mode)
            try:
                entry = self._overlay.create(directory, name, mode=stat.S_IMODE(mode), uid=uid, gid=gid)
            except PathExists:
                self._uncount_maker(directory, name, again)
                raise
            self._write_nothing(entry.ino)
        return self._named(directory, name)

    def mkdir(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, again: bool = False
    ) -> Attributes:
        directory = self._directory_of(parent, name)
        with self._made_before(again):
            uid, gid, mode = self._owner(directory, uid, gid, mode | stat.S_IFDIR)
            self._overlay.mkdir(directory, name, mode=stat.S_IMODE(mode), uid=uid, gid=gid)
        return self._named(directory, name)

    def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int, *, again: bool = False
    ) -> Attributes:
        directory = self._directory_of(parent, name)
        with self._made_before(again):
            uid, gid, _ = self._owner(directory, uid, gid, stat.S_IFLNK)
            self._overlay.symlink(directory, name, target, uid=uid, gid=gid)
        return self._named(directory, name)

    def unlink(self, parent: int, name: bytes, *, again: bool = False) -> None:
        directory = self._directory_of(parent, name)
        victim = self._known(directory, name)
        try:
            self._overlay.unlink(directory, name)
        except NoSuchPath:
            if not again:
                raise
        self._changed(directory)
        self._went(victim)

    def rmdir(self, parent: int, name: bytes, *, again: bool = False) -> None:
        directory = self._directory_of(parent, name)
        try:
            self._overlay.rmdir(directory, name)
        except NoSuchPath:
            if not again:
                raise
        self._changed(directory)

    def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int = 0,
        *,
        again: bool = False,
    ) -> None:
        """`flags` are those of renameat2(2); names cannot be exchanged."""
        if flags & ~_NOREPLACE:
            raise Refused(errno.EINVAL)
        directory, to = self._directory_of(parent, name), self._directory_of(new_parent, new_name)
        victim = self._known(to, new_name)
        moved = self._known(directory, name)
        try:
            self._overlay.rename(directory, name, to, new_name, replace=not flags & _NOREPLACE)
        except NoSuchPath:
            if not again:
                raise
            self._overlay.lookup(to, new_name)  # it was done; the bucket may have it already
            return
        finally:
            self._changed(directory)
            self._changed(to)
        if victim is not None and (moved is None or moved.ino != victim.ino):
            self._went(victim)

    def setattr(
        self, node: int, *, handle: int | None = None, size: int | None = None, mode: int | None = None,
        uid: int | None = None, gid: int | None = None, mtime_ns: int | None = None, kill: bool = False,
        who: int = 0,
    ) -> Attributes:  # fmt: skip
        """Change what is given. `kill`: drop suid and sgid, as whoever truncates may not keep them; `who`: as
        of `open`. Raises Stale where it makes another version: look the name up again."""
        ino = nodes.path(node)
        if size is not None:
            with _looked_up_again():
                self._resize(node, handle, size, who)
        if mode is None and (kill or uid is not None or gid is not None):
            mode = self._without_privileges(self._entry(node))
        if mode is not None:
            mode = stat.S_IMODE(mode)
        if any(value is not None for value in (mode, uid, gid, mtime_ns)):
            with _looked_up_again():
                self._overlay.set_attributes(ino, mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns)
            with suppress(NoSuchPath):
                self._changed(self._overlay.entry(ino).parent)
        return self.getattr(node)

    # ---- extended attributes -----------------------------------------------------------------------

    def listxattr(self, node: int) -> list[bytes]:
        shown = super().listxattr(node) if self._settings.xattr else []
        return [*shown, *sorted(self._overlay.attributes(self._entry(node)).xattrs)]

    def getxattr(self, node: int, name: bytes) -> bytes:
        if name in VIRTUAL_XATTRS and self._settings.xattr:
            return super().getxattr(node, name)
        if not name.startswith(b"user."):
            # security.capability is asked for before writes: a quick "none", for there never is any. ENOSYS
            # would stop all questions, those for user.* too.
            raise Refused(errno.ENODATA if name.startswith(b"security.") else errno.EOPNOTSUPP)
        value = self._overlay.attributes(self._entry(node)).xattrs.get(name)
        if value is None:
            raise Refused(errno.ENODATA)
        return value

    def setxattr(self, node: int, name: bytes, value: bytes, flags: int) -> None:
        self._check_settable(name)
        create, replace = bool(flags & _CREATE), bool(flags & _REPLACE)
        try:
            self._overlay.set_xattr(nodes.path(node), name, value, create=create, replace=replace)
        except NoSuchPath as missing:
            raise Refused(errno.ENODATA if replace else errno.ENOENT) from missing

    def removexattr(self, node: int, name: bytes) -> None:
        self._check_settable(name)
        try:
            self._overlay.remove_xattr(nodes.path(node), name)
        except NoSuchPath as missing:
            raise Refused(errno.ENODATA) from missing

    def _check_settable(self, name: bytes) -> None:
        if not name.startswith(b"user."):
            raise Refused(errno.EOPNOTSUPP)
        if name in VIRTUAL_XATTRS:
            raise Refused(errno.EPERM)

    # ---- opening -----------------------------------------------------------------------------------

    def create(
        self, parent: int, name: bytes, flags: int, mode: int, uid: int, gid: int, *,
        kill: bool = False, who: int = 0, again: bool = False,
    ) -> tuple[Attributes, Opened]:  # fmt: skip
        """Open a file that is made first where there is none. `flags` are those of open(2), `who` as of
        `open`."""
        directory = self._directory_of(parent, name)
        owner, group, mode = self._owner(directory, uid, gid, mode)
        for _ in range(_RACES):
            try:
                entry = self._overlay.create(directory, name, mode=stat.S_IMODE(mode), uid=owner, gid=group)
                self._changed(directory)
            except PathExists:
                if flags & os.O_EXCL and not again:
                    raise
                self._uncount_maker(directory, name, again)
                with suppress(NoSuchPath, Stale):
                    return self._open_existing(directory, name, flags, kill, who)
                continue
            opened = self._open_new(entry, flags)
            if opened is not None:
                return self._told(entry)._replace(attr_timeout=BORN), opened
        raise Stale(f"{name!r} comes and goes")

    def _open_existing(
        self, directory: int, name: bytes, flags: int, kill: bool, who: int
    ) -> tuple[Attributes, Opened]:
        entry = self._overlay.lookup(directory, name)
        if entry.kind is not Kind.FILE:
            raise Refused(errno.EISDIR if entry.kind is Kind.DIRECTORY else errno.ELOOP)
        node = self._told(entry).node
        try:
            opened = self.open(node, flags, kill=kill, who=who)
        except Stale:  # it is another version now; the kernel need not hear of the one before
            node = self._told(self._overlay.lookup(directory, name)).node
            opened = self.open(node, flags, kill=kill, who=who)
        return self.getattr(node), opened

    def _open_new(self, entry: Entry, flags: int) -> Opened | None:
        """Open what was made just now; None where it is gone already."""
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        try:
            if not writing:
                self._write_nothing(entry.ino)
            return self.open(self._nodes.node(entry, sole=True), flags & ~os.O_TRUNC)
        except (NoSuchPath, Stale, VersionChanged):
            return None
        except BaseException:
            with suppress(DatacacheError):
                self._write_nothing(entry.ino)  # it counts as open for writing until somebody was
            raise

    def _write_nothing(self, ino: int) -> None:
        self._overlay.closed(ino, self._overlay.open(ino, writing=True))

    def open(self, node: int, flags: int, *, kill: bool = False, who: int = 0, again: bool = False) -> Opened:
        """As `FileSystem.open`, for writing too. `kill`: drop suid and sgid. `who`: the thread that opens it,
        0 where that is not known. Who is told ESTALE, and comes again, finds the file landed.
        `again`: the daemon before may have counted this writer already."""
        writing, empties = flags & os.O_ACCMODE != os.O_RDONLY, bool(flags & os.O_TRUNC)
        ino = nodes.path(node)
        if writing and not empties:  # who empties a file makes room
            self._overlay.check_room()
        for _ in range(_RACES):
            if not (writing or empties or self._overlay.landed(ino)):
                return super().open(node, os.O_RDONLY)
            try:
                with _looked_up_again():
                    file = self._landing_file(ino, who, writing=writing or empties, truncate=empties)
            except VersionChanged:
                continue  # it was uploaded in this moment
            if again and self._counted and file.writing:
                self._overlay.released(ino)
            held = _File(node, self._overlay.entry(ino), opened=_Bytes(ino, file, self._closed))
            try:
                self._nodes.check(node, held.entry, sole=True)
                self._nodes.check_life(node)
                if empties:
                    self._empty(held, writing)
                if kill:
                    self._drop_privileges(held.entry)
                return self._bound(held, writing)
            except Stale:
                if file.writing:
                    held.opened = None
                    self._overlay.keep_for(ino, who, file)
                self._let_go(held)
                raise
            except BaseException:
                self._let_go(held)
                raise
        raise Stale(f"node {node} is written and uploaded all the time")

    def _landing_file(self, ino: int, who: int, *, writing: bool, truncate: bool) -> LandedFile:
        """The landing file of a path, which is landed where it is clean and `writing`. Raises VersionChanged
        where it is uploaded meanwhile."""
        if writing:
            if not truncate and self._overlay.hollow(ino):
                self._overlay.awaited.give_up(ino, who)  # it does not want it emptied any more
            kept = self._overlay.kept_for(ino, who)
            if kept is not None:
                return kept
            if not self._overlay.landed(ino):
                entry = self._index.current(ino)
                if entry.kind is not Kind.FILE:
                    raise IsADirectory(self._overlay.path(ino))
                self._overlay.land(ino, truncate=truncate)
                self._changed(entry.parent)
        return self._overlay.open(ino, writing=writing)

    def _empty(self, held: _File, writing: bool) -> None:
        """Cut off all bytes, for whoever may do no more than that, too."""
        opened = held.opened
        assert isinstance(opened, _Bytes)
        self._overlay.emptied(opened.ino)
        opened.truncate(0)
        if not writing:
            held.opened = _Bytes(opened.ino, self._overlay.open(opened.ino, writing=False), self._closed)
            opened.close()

    def _bound(self, held: _File, writing: bool) -> Opened:
        """Open the node of a landed file, as others have it open where they do."""
        assert isinstance(held.opened, _Bytes)
        file = held.opened.file
        while True:
            number = self._lent(held, file)
            bound = self._nodes.open(held.node, held.entry, held.passed, sole=True)
            if bound != held.passed:
                if held.passed is not None and self._backings is not None:
                    self._backings.release(held.passed)
                held.passed, number = None, 0
                if bound is not None:
                    again = self._backings.again(bound) if self._backings is not None else None
                    if again is None:
                        self._nodes.close(held.node)  # its last other opener has closed it meanwhile
                        continue
                    held.passed, number = bound, again
            # Pages stay true where all that is written goes through them: not where the node may be another
            # one after a take-over.
            if writing and self._early is not None:
                self._early.opened(held.opened.ino)
            return Opened(self._keep(held), number, flush=writing, keep=self._backings is None)

    def _lent(self, held: _File, file: LandedFile) -> int:
        """Let the kernel have the landing file: the number by which it knows that; 0 where it will not."""
        if self._backings is None:
            return 0
        readable = _Readable(file)
        try:
            number = self._backings.acquire(readable)
        except OSError as error:
            raise _said(error) from error
        finally:
            readable.close()
        if number is None:
            return 0
        held.passed = file.identity
        return number

    def open_nowait(self, node: int, flags: int) -> Opened | None:
        return None

    def _closed(self, ino: int, file: LandedFile) -> None:
        if self._left:
            file.close()
        else:
            self._overlay.closed(ino, file)
            if self._early is not None and file.writing:
                self._early.closed(ino)

    # ---- bytes -------------------------------------------------------------------------------------

    def read(self, handle: int, offset: int, size: int, node: int = 0) -> Buffer:
        if handle not in self._files and node and self._is_landed(node):
            with suppress(VersionChanged), self._recovered.use(node, self._entry) as file:
                return self._by_node(file, writing=False).read(offset, size)
        try:
            return super().read(handle, offset, size, node)
        except VersionChanged:
            moved = self._moved(handle)
            if moved is None:
                raise
        opened = self._reader.open(moved)
        try:
            return opened.read(offset, size)
        finally:
            opened.close()

    def _moved(self, handle: int) -> Entry | None:
        """The object that has the bytes of an open file by now, where another had them at its open: it was
        renamed, and the bucket has done that since."""
        file = self._files.get(handle)
        if file is None:
            return None
        before = file.entry
        with suppress(NoSuchPath):
            now = self._overlay.entry(before.ino, before.generation)
            if now.size == before.size and now.key != before.key:
                return now
        return None

    def write(self, handle: int, offset: int, data: Buffer, *, node: int = 0, kill: bool = False) -> int:
        """Write at `offset`, also for who appends: the kernel knows the end, for nobody else writes, and what
        it sends again must not come twice. How many bytes were written."""
        file = self._files.get(handle)
        if file is not None:
            opened = _to_write(file)
            if kill:
                self._drop_privileges(file.entry)
            return opened.write(offset, data)
        with self._by_node_written(node) as opened:
            if kill:
                self._drop_privileges(self._entry(node))
            return opened.write(offset, data)

    def flush(self, handle: int, node: int) -> None:
        """Somebody closes the file, and may go on in another way."""
        file, ino = self._files.get(handle), nodes.path(node)
        if file is None:  # an earlier daemon's
            self._overlay.closes.announce(ino, handle)
        elif isinstance(file.opened, _Bytes) and file.opened.file.writing:
            self._overlay.closes.announce(ino, file.opened.file)
        if self._durability is Durability.CLOSE:
            self._overlay.sync(ino)
        if self.stores and self._early is not None:
            self._early.store(ino, closing=True)

    def fsync(self, node: int) -> None:
        ino = nodes.path(node)
        self._overlay.sync(ino)
        if self._early is not None:
            if self.stores:
                self._early.store(ino)
            else:
                self._early.synced(ino)

    def fsyncdir(self) -> None:
        self._overlay.sync_names()

    def allocate(self, handle: int, node: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        file = self._files.get(handle)
        if file is not None:
            _to_write(file).allocate(mode, offset, length)
            return
        with self._by_node_written(node) as opened:
            opened.allocate(mode, offset, length)

    def _resize(self, node: int, handle: int | None, size: int, who: int) -> None:
        file = self._files.get(handle) if handle is not None else None
        if file is not None:
            _to_write(file).truncate(size)
            return
        ino = nodes.path(node)
        for _ in range(_RACES):
            if self._overlay.entry(ino).kind is Kind.DIRECTORY:
                raise IsADirectory(self._overlay.path(ino))
            with suppress(VersionChanged):
                found = self._landing_file(ino, who, writing=True, truncate=not size)
                try:
                    self._nodes.check(node, self._overlay.entry(ino), sole=True)
                except Stale:
                    self._overlay.keep_for(ino, who, found)
                    raise
                opened = _Bytes(ino, found, self._closed)
                try:
                    if not size:
                        self._overlay.emptied(ino)
                    opened.truncate(size)
                finally:
                    opened.close()
                return
        raise Stale(f"node {node} is written and uploaded all the time")

    def release(self, handle: int) -> None:
        file = self._files.get(handle)
        super().release(handle)
        if file is not None and file.entry.ino in self._gone and self._nodes.opened(file.node) is None:
            self._gone.discard(file.entry.ino)

    def release_nowait(self, handle: int) -> bool:
        file = self._files.get(handle)
        return not (file is not None and isinstance(file.opened, _Bytes)) and super().release_nowait(handle)

    def node_of(self, handle: int) -> int:
        """The node that a handle of ours is open on."""
        file = self._files.get(handle)
        if file is None:
            raise Refused(errno.EBADF)
        return file.node

    def writes(self, handle: int) -> bool:
        """Whether a handle of ours was opened for writing."""
        file = self._files.get(handle)
        return file is not None and isinstance(file.opened, _Bytes) and file.opened.file.writing

    def knows(self, handle: int) -> bool:
        """Whether a handle is of this daemon."""
        return handle in self._files

    def released(self, handle: int, node: int, flags: int) -> None:
        """A handle that an earlier daemon gave out is closed; it had been opened with `flags`."""
        self._overlay.closes.came(handle)
        self._written.drop(node)
        self._recovered.drop(node)
        if self._counted and flags & os.O_ACCMODE != os.O_RDONLY:
            self._overlay.released(nodes.path(node))

    # ---- the rest ----------------------------------------------------------------------------------

    def statfs(self) -> Space:
        used, room = super().statfs(), self._overlay.room()
        return Space(used.total + room.free, used.files + FREE_FILES, room.free, FREE_FILES)

    def stats(self) -> dict[str, Any]:
        writing = sum(
            isinstance(file.opened, _Bytes) and file.opened.file.writing
            for file in list(self._files.values())
        )
        return {**super().stats(), "open_for_writing": writing}

    def leave(self) -> None:
        # What is being written is not closed, so it is not called so.
        self._overlay.awaited.give_up()
        self._left = True

    def close(self) -> None:
        super().close()
        self._written.close()
        if not self._left:
            self._overlay.awaited.give_up()

    # ---- in common ---------------------------------------------------------------------------------

    def _directory_of(self, parent: int, name: bytes) -> int:
        _check_name(name)
        return nodes.path(parent)

    @contextmanager
    def _made_before(self, again: bool) -> Iterator[None]:
        try:
            yield
        except PathExists:
            if not again:
                raise

    def _uncount_maker(self, directory: int, name: bytes, again: bool) -> None:
        """The daemon before may have made the file, which counts as open for writing from then on, and died
        before it said so: nothing closes that one."""
        if again and self._counted and (made := self._known(directory, name)) is not None:
            self._overlay.released(made.ino)

    def _named(self, directory: int, name: bytes) -> Attributes:
        self._changed(directory)
        return self._told(self._overlay.lookup(directory, name))

    def _known(self, directory: int, name: bytes) -> Entry | None:
        with suppress(DatacacheError):
            return self._overlay.lookup_nowait(directory, name)
        return None

    def _owner(self, directory: int, uid: int, gid: int, mode: int) -> tuple[int, int, int]:
        """Owner, group and mode of what is made in a directory: one with sgid gives its group on."""
        above = self._overlay.attributes(self._overlay.entry(directory))
        if above.mode is not None and above.mode & _SGID:
            gid = self.gid if above.gid is None else above.gid
            if stat.S_ISDIR(mode):
                mode |= _SGID
        return uid, gid, mode

    def _without_privileges(self, entry: Entry) -> int | None:
        """The mode of a file without suid and sgid; None where it has none."""
        mode = self._overlay.attributes(entry).mode
        if mode is None or entry.kind is not Kind.FILE:
            return None
        killed = mode & ~_SUID
        if mode & stat.S_IXGRP:
            killed &= ~_SGID
        return killed if killed != mode else None

    def _drop_privileges(self, entry: Entry) -> None:
        mode = self._without_privileges(entry)
        if mode is not None:
            self._overlay.set_attributes(entry.ino, mode=mode)

    def _went(self, entry: Entry | None) -> None:
        """A name was taken from a file, which may be open."""
        if entry is None or entry.kind is Kind.DIRECTORY:
            return
        landed = self._overlay.landed(entry.ino)
        if landed or self._nodes.opened(self._nodes.node(entry)) is not None:
            self._gone.add(entry.ino)

    def _changed(self, directory: int) -> None:
        """Whoever reads the directory must not be told of names that are gone: the kernel would believe
        it."""
        with self._unopened_lock:
            reading = [*self._directories.values(), *self._unopened.values()]
        for one in reading:
            if one.ino == directory:
                one.page = None

    def _is_landed(self, node: int) -> bool:
        name = nodes.read(node)
        if not self._overlay.landed(name.ino):
            return False
        with suppress(NoSuchPath):
            newest = self._overlay.entry(name.ino).generation
            return name.generation_near(newest) == newest
        return False

    def _by_node(self, file: _File, *, writing: bool) -> OpenFile:
        """What is open for a node whose handle is not known here; the landing file where it is the first."""
        with file.opening:
            if file.opened is None:
                ino = nodes.path(file.node)
                # Whose handle it is was counted by the daemon that gave it out, and is released once.
                landed = self._overlay.open(ino, writing=writing and not self._counted)
                file.opened = _Bytes(ino, landed, self._closed)
                if writing and self._counted:
                    _make_writable(landed)
            return file.opened

    @contextmanager
    def _by_node_written(self, node: int) -> Iterator[_Bytes]:
        if not node or not self._is_landed(node):
            raise Refused(errno.EBADF)
        with self._written.use(node, self._entry) as file:
            opened = self._by_node(file, writing=True)
            assert isinstance(opened, _Bytes)
            yield opened

    def _entry(self, node: int) -> Entry:
        # Not as it was opened: what is written changes.
        name = nodes.read(node)
        with suppress(NoSuchPath):
            entry = self._overlay.entry(name.ino)
            if entry.generation == name.generation_near(entry.generation):
                return entry
        return super()._entry(node)

    def _listed(self, entries: Iterable[Entry], fresh: float) -> Iterator[Listed]:
        for entry in entries:
            now = entry
            if self._overlay.landed(entry.ino):
                # Not as it was when the page was taken: pages beyond a size that is told are thrown away.
                with suppress(NoSuchPath):
                    now = self._overlay.entry(entry.ino)
            yield Listed(entry.name, self._attributes(now, fresh), entry.ino)

    def _attributes(self, entry: Entry, fresh: float, node: int = 0) -> Attributes:
        landed, kept = self._overlay.landed(entry.ino), self._overlay.attributes(entry)
        found = super()._attributes(entry, fresh, node or self._nodes.node(entry, sole=landed))
        if landed:
            found = found._replace(attr_timeout=0.0)
        if kept.mode is not None:
            found = found._replace(mode=stat.S_IFMT(found.mode) | kept.mode)
        if kept.uid is not None or kept.gid is not None:
            uid = found.uid if kept.uid is None else kept.uid
            gid = found.gid if kept.gid is None else kept.gid
            found = found._replace(uid=uid, gid=gid)
        return found


def _make_writable(file: LandedFile) -> None:
    """Let a landing file be written without being counted as open for that."""
    path, before = f"/proc/self/fd/{file.descriptor}", file.descriptor
    file.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    os.close(before)


def _to_write(file: _File) -> _Bytes:
    opened = file.opened
    if not isinstance(opened, _Bytes) or not opened.file.writing:
        raise Refused(errno.EBADF)
    return opened


def _said(error: OSError) -> Exception:
    """What a landing file's disk says, as one of our errors."""
    if error.errno in _FULL:
        return LandingFull(f"the landing zone is full: {error.strerror}")
    if error.errno in _CALLERS:
        return Refused(error.errno or errno.EINVAL)
    return LandingBroken(f"the landing zone fails: {error.strerror}")
