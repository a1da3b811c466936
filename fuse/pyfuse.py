"""
The portable driver: the file system on pyfuse3. The only door to pyfuse3 and trio.

One thread runs an event loop that reads requests; a handler decodes, makes one call on
`FileSystem`, encodes. What can be answered from memory is answered on the loop; whatever may wait for a
store or a disk runs in a thread, at most `max_tasks` at once. Every exception becomes an errno here:
a handler that fails answers EIO and the next request is served.

`Mount` is the life of one mount: mounted by `with`, served by `serve`, which ends when somebody
unmounts it or a signal arrives.
"""

import contextlib
import errno
import functools
import logging
import os
import signal
import sys
import tempfile
import urllib.parse
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pyfuse3
import trio

from datacache.config.settings import MountSettings
from datacache.errors import MountError
from datacache.model import Buffer
from fuse.filesystem import Attributes, FileSystem, Opened, Refused

if TYPE_CHECKING:
    from fuse.writable import WritableFileSystem

log = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds for which files that are open go on being served after a signal. The mount point is free at
once; then what is still open gets ENOTCONN."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_WRITES = (
    "setattr", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "write", "create",
    "setxattr", "removexattr",
)  # fmt: skip

R = TypeVar("R")
Handler = TypeVar("Handler", bound=Callable[..., Coroutine[Any, Any, Any]])


def _answered(handler: Handler) -> Handler:
    """Count the request and turn every exception of its handler into an errno.

    Anything else that left a handler would end the event loop, and the mount with it.
    """
    name = handler.__name__

    @functools.wraps(handler)
    async def answer(self: "_Operations", *args: Any, **kwargs: Any) -> Any:
        self.requests[name] += 1
        try:
            return await handler(self, *args, **kwargs)
        except Exception as error:
            raise pyfuse3.FUSEError(self.files.failed(name, error)) from error

    return cast(Handler, answer)


class _Operations(pyfuse3.Operations):
    """One method a request. What is not here is ENOSYS, which the kernel remembers and does not
    send again: FLUSH (every close would cost a request), ACCESS (default_permissions), POLL."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, files: FileSystem, *, threads: int) -> None:
        super().__init__()
        self.files = files
        self.requests: Counter[str] = Counter()
        self.started = trio.Event()
        self._threads = trio.CapacityLimiter(threads)

    def init(self) -> None:
        # Called while INIT is being answered; whoever waits wakes up after that.
        self.started.set()

    async def _in_thread(self, call: Callable[..., R], *args: Any) -> R:
        # Abandoned when the loop ends: a store that hangs must not hold up the unmount. The reader
        # ends such a call by itself, by its timeouts or its close.
        return await trio.to_thread.run_sync(call, *args, limiter=self._threads, abandon_on_cancel=True)

    @_answered
    async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        found = self.files.lookup_nowait(parent, name)
        if found is None:
            found = await self._in_thread(self.files.lookup, parent, name)
        return self._encode(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        # A node is arithmetic: there is nothing to be forgotten.
        self.requests["forget"] += 1

    @_answered
    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        return self._encode(self.files.getattr(inode))

    @_answered
    async def opendir(self, inode: int, ctx: object) -> int:
        return self.files.opendir(inode)

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listed = self.files.readdir_nowait(fh, start_id)
        if listed is None:
            listed = await self._in_thread(self.files.readdir, fh, start_id)
        encoded, reply = self._blank(), pyfuse3.readdir_reply
        for name, attributes, offset in listed:
            # `reply` copies, so one object serves all entries.
            if not reply(token, name, self._fill(encoded, attributes), offset):
                break

    @_answered
    async def releasedir(self, fh: int) -> None:
        self.files.releasedir(fh)

    @_answered
    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        opened = self.files.open_nowait(inode, flags)
        if opened is None:
            opened = await self._in_thread(self.files.open, inode, flags)
        # A node is one version, so its pages stay true from one open to the next.
        return pyfuse3.FileInfo(fh=opened.handle, keep_cache=True)

    @_answered
    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]  # it takes any
        data = self.files.read_nowait(fh, off, size)
        if data is None:
            data = await self._in_thread(self.files.read, fh, off, size)
        return data

    @_answered
    async def release(self, fh: int) -> None:
        if not self.files.release_nowait(fh):
            await self._in_thread(self.files.release, fh)  # nobody waits for the answer

    @_answered
    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        space = await self._in_thread(self.files.statfs)
        encoded = pyfuse3.StatvfsData()
        encoded.f_bsize = encoded.f_frsize = 4096
        encoded.f_blocks = -(-space.total // 4096)
        encoded.f_bfree = encoded.f_bavail = space.free // 4096
        encoded.f_files = space.files
        encoded.f_ffree = encoded.f_favail = space.free_files
        encoded.f_namemax = 255
        return encoded

    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        return await self._in_thread(self.files.getxattr, inode, name)  # it looks into the tiers

    @_answered
    async def listxattr(self, inode: int, ctx: object) -> Sequence[bytes]:
        return self.files.listxattr(inode)

    def _blank(self) -> pyfuse3.EntryAttributes:
        encoded = pyfuse3.EntryAttributes()
        # Not the size of our blocks: Python's open() reads in pieces of this size, so a large one would
        # turn each small random read into a large one.
        encoded.st_blksize = 4096
        return encoded

    def _fill(self, encoded: pyfuse3.EntryAttributes, found: Attributes) -> pyfuse3.EntryAttributes:
        encoded.st_ino = found.node
        encoded.st_mode = found.mode
        encoded.st_nlink = found.nlink
        encoded.st_uid = found.uid
        encoded.st_gid = found.gid
        encoded.st_size = found.size
        encoded.st_blocks = found.blocks
        encoded.st_mtime_ns = encoded.st_ctime_ns = encoded.st_atime_ns = found.mtime_ns
        encoded.entry_timeout = found.entry_timeout
        encoded.attr_timeout = found.attr_timeout
        return encoded

    def _encode(self, found: Attributes) -> pyfuse3.EntryAttributes:
        return self._fill(self._blank(), found)


def _refusal(name: str) -> Callable[..., Coroutine[Any, Any, None]]:
    async def refuse(self: _Operations, *args: object) -> None:
        self.requests[name] += 1
        raise pyfuse3.FUSEError(errno.EROFS)

    return refuse


for _name in _WRITES:
    # The kernel answers these by itself on a mount that is `ro`; somebody may have remounted it `rw`.
    setattr(_Operations, _name, _refusal(_name))


class _WritableOperations(_Operations):
    """... of a data set that can be written to."""

    def __init__(self, files: "WritableFileSystem", *, threads: int) -> None:
        super().__init__(files, threads=threads)
        self._writable = files

    @_answered
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        found = await self._in_thread(
            functools.partial(
                self._writable.setattr, inode,
                handle=fh,
                size=attr.st_size if fields.update_size else None,
                mode=attr.st_mode if fields.update_mode else None,
                uid=attr.st_uid if fields.update_uid else None,
                gid=attr.st_gid if fields.update_gid else None,
                mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
                who=ctx.pid,
            )
        )  # fmt: skip
        return self._encode(found)

    @_answered
    async def readlink(self, inode: int, ctx: object) -> bytes:
        return self._writable.readlink(inode)

    @_answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        made = self._writable.mknod
        return self._encode(await self._in_thread(made, parent_inode, name, mode, ctx.uid, ctx.gid))

    @_answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        made = self._writable.mkdir
        return self._encode(await self._in_thread(made, parent_inode, name, mode, ctx.uid, ctx.gid))

    @_answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        made = self._writable.symlink
        return self._encode(await self._in_thread(made, parent_inode, name, target, ctx.uid, ctx.gid))

    @_answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: object) -> None:
        await self._in_thread(self._writable.unlink, parent_inode, name)

    @_answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: object) -> None:
        await self._in_thread(self._writable.rmdir, parent_inode, name)

    @_answered
    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int,
        ctx: object,
    ) -> None:  # fmt: skip
        await self._in_thread(
            self._writable.rename, parent_inode_old, name_old, parent_inode_new, name_new, flags
        )

    @_answered
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: object) -> Any:
        raise Refused(errno.EPERM)  # a bucket has one name for an object

    @_answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:  # type: ignore[override]
        opened = functools.partial(self._writable.open, inode, flags, who=ctx.pid)
        return _file_info(await self._in_thread(opened))

    @_answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        found, opened = await self._in_thread(
            functools.partial(
                self._writable.create, parent_inode, name, flags, mode, ctx.uid, ctx.gid, who=ctx.pid
            )
        )
        return _file_info(opened), self._encode(found)

    @_answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._in_thread(self._writable.write, fh, off, buf)

    @_answered
    async def flush(self, fh: int) -> None:
        if self._writable.writes(fh):
            await self._in_thread(self._writable.flush, fh, self._writable.node_of(fh))

    @_answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._in_thread(self._writable.fsync, self._writable.node_of(fh))

    @_answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._in_thread(self._writable.fsyncdir)

    @_answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: object) -> None:
        await self._in_thread(self._writable.setxattr, inode, name, value, 0)

    @_answered
    async def removexattr(self, inode: int, name: bytes, ctx: object) -> None:
        await self._in_thread(self._writable.removexattr, inode, name)


def _file_info(opened: Opened) -> pyfuse3.FileInfo:
    return pyfuse3.FileInfo(fh=opened.handle, keep_cache=opened.keep)


class Mount:
    """One mount of a file system by pyfuse3. There can be one in a process: pyfuse3 holds it globally."""

    def __init__(self, files: FileSystem, settings: MountSettings, *, source: str) -> None:
        """`source` is what `mount` and `df` show."""
        self._operations = (
            _WritableOperations(cast("WritableFileSystem", files), threads=settings.max_tasks)
            if files.writable
            else _Operations(files, threads=settings.max_tasks)
        )
        self._settings, self._source = settings, source

    def __repr__(self) -> str:
        return f"<Mount {self._source} on {self._settings.directory}>"

    def __enter__(self) -> "Mount":
        options = {
            f"fsname={_fsname(self._source)}",
            "subtype=datacache",
            "rw" if self._operations.files.writable else "ro",
            "nosuid",
            "nodev",
            "default_permissions",
        }
        if self._settings.allow_other:
            options.add("allow_other")
        with _said_by_libfuse() as said:
            try:
                pyfuse3.init(self._operations, self._settings.directory, options)
            except RuntimeError as refused:
                raise MountError(
                    f"cannot mount on {self._settings.directory}: {said() or refused}"
                ) from refused
        return self

    def __exit__(self, *error: object) -> None:
        # Whoever owns the mount has unmounted it by now (libfuse would unmount whatever is at that path).
        # This closes the descriptor, which ends what is still open with ENOTCONN.
        pyfuse3.close(unmount=False)

    def requests(self) -> dict[str, int]:
        """Requests answered so far, by kind."""
        return dict(self._operations.requests)

    def serve(self, *, started: Callable[[], None], detach: Callable[[], None]) -> None:
        """Answer requests until the mount is gone.

        `started` is called once the mount answers. On SIGTERM, SIGINT or SIGHUP `detach` is called,
        which takes the mount out of the name space; files that are open are served for GRACE seconds
        more, or until the next signal. What `started` raises ends the serving and is raised.
        """
        # What came before trio listens, and after it has. Trio gives a late one back to the handler from
        # before, in the middle of its own work, where nothing may be raised.
        early: list[int] = []
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: early.append(number))
        trio.run(self._serve, started, detach, early, restrict_keyboard_interrupt_to_checkpoints=True)

    async def _serve(self, started: Callable[[], None], detach: Callable[[], None], early: list[int]) -> None:
        failure: list[Exception] = []

        async def announce(nursery: trio.Nursery) -> None:
            await self._operations.started.wait()
            try:
                await trio.to_thread.run_sync(started)
            except Exception as error:  # noqa: BLE001  raised again below, out of the loop
                failure.append(error)
                nursery.cancel_scope.cancel()

        async def obey(nursery: trio.Nursery) -> None:
            with trio.open_signal_receiver(*_SIGNALS) as signals:
                number = early[0] if early else await signals.__anext__()
                log.info("%s: unmounting", signal.Signals(number).name)
                await trio.to_thread.run_sync(detach)
                with trio.move_on_after(GRACE):
                    await signals.__anext__()
                log.info("ending what is still open")
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(announce, nursery)
            nursery.start_soon(obey, nursery)
            await pyfuse3.main(self._settings.min_tasks, self._settings.max_tasks)
            nursery.cancel_scope.cancel()
        if failure:
            raise failure[0]


def _fsname(source: str) -> str:
    """`source` as an option value: ASCII, and without what separates options and mount table fields."""
    return urllib.parse.quote(source, safe=":/@+=~!$&()*;")


@contextlib.contextmanager
def _said_by_libfuse() -> Iterator[Callable[[], str]]:
    """What libfuse and fusermount3 print on standard error in this block: their only way to say why."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)

        def said() -> str:
            printed.seek(0)
            lines = printed.read().decode("utf-8", "replace").split("\n")
            return "; ".join(line.strip() for line in lines if line.strip())

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
