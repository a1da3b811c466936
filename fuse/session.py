"""
The native driver: threads that read requests from `/dev/fuse` and answer them.

A thread takes one request, decodes it, makes one call on `FileSystem`, writes the answer. A call may
wait for a store or a disk: then other threads go on. There is always one that reads, up to
`max_threads`; those that have nothing to do beyond `max_idle_threads` end.

Every exception becomes an errno: a handler that fails answers EIO, and the next request is served.
What cannot be understood is answered EIO, too.

State that has to outlive this process there is none: node and handle numbers say what they name
(`nodes`), so a successor only has to have the kernel send again what was unanswered (`resend`).
"""

import contextlib
import errno
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from typing import TYPE_CHECKING, Any

from datacache.model import Entry
from fuse import protocol
from fuse.connection import AGAIN, Agreement, resend, writer
from fuse.filesystem import Attributes, FileSystem
from fuse.protocol import Buffer, Header, Opcode, OpenFlag, OpenInFlag, SetattrValid, WriteFlag

if TYPE_CHECKING:
    from fuse.filesystem import Opened
    from fuse.writable import WritableFileSystem

log = logging.getLogger(__name__)

_OPENS = frozenset((Opcode.OPEN, Opcode.CREATE, Opcode.OPENDIR))
_GONE = frozenset((errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN))
"""What reading or writing the device says when the mount is gone."""

_BLOCK = 4096
"""`st_blksize`. Not the size of our blocks: Python's open() reads in pieces of this, so a large one would
turn each small random read into a large one."""

LATE = 256
"""Closes that wait for a store at once at most, in threads of their own, before they take those of others."""

KINDS = 64
"""Opcodes that are counted; there are fewer."""

Answer = Sequence[Buffer] | None
Handler = Callable[[Header, Any], Answer]


class Session:
    """Serves one connection. Started by `start`; `wait` returns when the mount is gone."""

    def __init__(
        self,
        files: FileSystem,
        descriptor: int,
        agreement: Agreement,
        *,
        max_threads: int,
        max_idle_threads: int,
        elsewhere: Callable[[memoryview], object] | None = None,
        counts: "MutableSequence[int] | memoryview[int] | None" = None,
    ) -> None:
        """`elsewhere` takes a request that cannot be answered here, and sees to it that it is. `counts`:
        where requests are counted by opcode; at least KINDS numbers."""
        self.files = files
        self._descriptor, self._agreement = descriptor, agreement
        self._most, self._most_idle = max_threads, max_idle_threads
        self._elsewhere = elsewhere
        self._decoders = protocol.decoders(agreement.capabilities)
        # Under the lock: what is counted, threads that there are, and those of them that read.
        self._lock = threading.Lock()
        self._requests = counts if counts is not None else [0] * KINDS
        self._threads = self._idle = 0
        self._one_ended = threading.Condition(self._lock)
        self._under_way: dict[int, int] = {}  # who waits for which request; single looks need no lock
        self._late: dict[int, int] = {}  # ... for one that is answered later, by another thread
        self._crowded = False  # said already that threads cannot be had
        # Not an event: who is told to end is told by a signal handler, perhaps in the middle of its wait, and
        # an event would have it wait for itself.
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ending = False  # told to end: what fails from now on is for a successor to answer
        # Nothing is written, so there is nothing to FLUSH: not even once, to be told ENOSYS.
        self._open_flags = int(OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH)
        self._passed_flags = int(OpenFlag.PASSTHROUGH | OpenFlag.NOFLUSH)
        self._notices: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._handlers: Mapping[int, Handler] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.DESTROY: self._destroy,
            # No answer is owed. A node is arithmetic, so there is nothing to be forgotten.
            Opcode.FORGET: self._ignore,
            Opcode.BATCH_FORGET: self._ignore,
            Opcode.INTERRUPT: self._interrupt,
            **dict.fromkeys(_WRITES, self._refuse),
        }

    def __repr__(self) -> str:
        return f"<Session {self._threads} threads, {self._idle} idle>"

    def start(self, *, resend: bool = False) -> None:
        """Begin to answer. `resend`: first have the kernel send again what an earlier daemon read and did
        not answer."""
        if resend:
            self.resend()
        threading.Thread(target=self._notify, name="fuse-notify", daemon=True).start()
        with self._lock:
            self._spawn()

    def resend(self) -> None:
        """Have the kernel send again what was read and not answered, by whomever."""
        resend(self._descriptor)

    def answer(self, request: memoryview) -> None:
        """Answer a request that somebody else has read, and counted."""
        self._write(protocol.opcode_of(request), self._answer(request))

    def wait(self, timeout: float | None = None) -> bool:
        """Return when the mount is gone, or `end` was called; False when neither within `timeout` seconds."""
        try:
            self._ended.get(timeout=timeout)
        except queue.Empty:
            return False
        self._ended.put(None)  # for who waits next
        return True

    def end(self) -> None:
        """Answer nothing more: what is unanswered is for a successor. Called by a signal handler."""
        self._ending = True
        self._over()

    def _over(self) -> None:
        self._ended.put(None)
        self._notices.put(None)

    @property
    def ending(self) -> bool:
        """Whether `end` was called."""
        return self._ending

    def join(self, timeout: float) -> bool:
        """Return when all that was asked of a mount that is gone has been worked off; False when it was not
        within `timeout` seconds."""
        with self._one_ended:
            return self._one_ended.wait_for(lambda: not self._threads, timeout)

    def requests(self) -> dict[str, int]:
        """Requests answered so far, by kind."""
        with self._lock:
            counts = dict(enumerate(self._requests))
        return {protocol.opcode_name(code).lower(): count for code, count in counts.items() if count}

    def threads(self) -> int:
        """Threads that there are now."""
        return self._threads

    def superseded(self, entries: Sequence[Entry]) -> None:
        """The bucket has other versions of these: let the kernel look their names up again, however long
        it was told to believe them."""
        for entry in entries:
            self._notices.put(protocol.notify_inval_entry(self.files.directory_node(entry), entry.name))

    # ---- threads ---------------------------------------------------------------------------------

    def _spawn(self) -> None:
        """One more thread, which counts as idle until it has a request; under the lock."""
        self._threads += 1
        self._idle += 1
        # Not joined: one that reads cannot be woken but by the kernel. Ending the process is what ends it,
        # and a request that it had just read is sent again to whoever comes next.
        try:
            threading.Thread(target=self._run, name="fuse", daemon=True).start()
        except RuntimeError as error:
            # No room for another (a cgroup's pids.max): the request that we have must be answered all the
            # same, and after it the next.
            self._threads -= 1
            self._idle -= 1
            if not self._threads:
                raise
            if not self._crowded:
                self._crowded = True
                log.warning("no more than %d threads can be had: %s", self._threads, error)

    def _run(self) -> None:
        try:
            self._take_requests()
        finally:
            with self._one_ended:
                self._threads -= 1
                self._one_ended.notify_all()

    def _take_requests(self) -> None:
        buffer = bytearray(self._agreement.room)
        view, room = memoryview(buffer), [buffer]
        descriptor, readv, lock = self._descriptor, os.readv, self._lock
        while True:
            try:
                length = readv(descriptor, room)
            except OSError as error:
                if error.errno in AGAIN:
                    continue
                if error.errno not in _GONE:
                    log.error("reading requests failed: %s", error)
                self._over()
                return
            if not length:
                self._over()  # not from the kernel, but from a socket in its place that is closed
                return
            if self._ending:
                return  # unanswered: it is sent again to whoever comes next
            opcode = protocol.opcode_of(buffer)
            with lock:
                self._requests[opcode if opcode < KINDS else 0] += 1
                self._idle -= 1
                if not self._idle and self._threads < self._most:
                    self._spawn()
            request = view[:length]
            self._write(opcode, self._answer(request))
            with lock:
                if self._idle >= self._most_idle:
                    return
                self._idle += 1

    def _write(self, opcode: int, answer: Answer) -> None:
        # What was done after `end` may stand on what was being taken down meanwhile.
        if answer is None or self._ending:
            return
        try:
            os.writev(self._descriptor, answer)
        except OSError as error:
            # Whoever asked was killed, or it was sent again and answered by another.
            if error.errno == errno.ENOENT:
                self._unheard(opcode, answer)
            elif error.errno not in _GONE:
                log.error("answering %s failed: %s", protocol.opcode_name(opcode), error)
                self._owe(answer)

    def _unheard(self, opcode: int, answer: Sequence[Buffer]) -> None:
        """Nobody knows what was opened for this answer, so nobody closes it."""
        if opcode in _OPENS and len(answer) > 1:
            handle = protocol.handle_of(answer[-1])
            try:
                (self.files.releasedir if opcode == Opcode.OPENDIR else self.files.release)(handle)
            except Exception:
                log.exception("what nobody waits for could not be closed")

    def _answer(self, request: memoryview) -> Answer:
        """What to write for a request. Never raises."""
        try:
            header, body = protocol.decode(request, self._decoders)
        except protocol.Malformed as malformed:
            log.error("%s", malformed)
            return protocol.error(malformed.unique, errno.EIO) if malformed.unique else None
        handler = self._handlers.get(header.opcode)
        if handler is None:
            return protocol.error(header.unique, errno.ENOSYS)
        self._under_way[header.unique] = header.pid
        try:
            return handler(header, body)
        except Exception as error:  # noqa: BLE001  whoever asked must be answered; it is logged below
            if self._ending:
                return None  # what it stood on is being taken down
            if self._elsewhere is not None:
                with contextlib.suppress(OSError):  # nobody is there: whoever comes next has it sent again
                    self._elsewhere(request)
                return None
            number = self.files.failed(protocol.opcode_name(header.opcode).lower(), error)
            return protocol.error(header.unique, number)
        finally:
            self._under_way.pop(header.unique, None)

    def _owe(self, answer: Sequence[Buffer]) -> None:
        """The kernel would not take an answer: whoever waits must not wait for ever."""
        unique = protocol.decode_reply(b"".join(answer)).unique
        try:
            os.writev(self._descriptor, protocol.error(unique, errno.EIO))
        except OSError as error:
            log.error("not even EIO could be answered: %s", error)

    def _notify(self) -> None:
        """Send notifications, from a thread of their own: the kernel may take locks for one that are held by
        a request which waits for another thread of ours."""
        write = writer(self._descriptor)
        while (notice := self._notices.get()) is not None:
            try:
                write(notice)
            except OSError as error:
                log.error("notifying the kernel failed: %s", error)

    # ---- requests --------------------------------------------------------------------------------

    def _lookup(self, header: Header, body: protocol.LookupIn) -> Answer:
        found = self.files.lookup(header.node, body.name)
        return protocol.reply(header.unique, self._entry(found))

    def _getattr(self, header: Header, body: protocol.GetattrIn) -> Answer:
        found = self.files.getattr(header.node)
        return protocol.reply(header.unique, protocol.encode_attr_out(self._attr(found), found.attr_timeout))

    def _open(self, header: Header, body: protocol.OpenIn) -> Answer:
        if self._agreement.stateless:
            return protocol.error(header.unique, errno.ENOSYS)
        handle, backing, *_ = self.files.open(header.node, body.flags)
        # A node is one version, so its pages stay true from one open to the next.
        flags = self._passed_flags if backing else self._open_flags
        return protocol.reply(header.unique, protocol.encode_open_out(handle, flags, backing))

    def _read(self, header: Header, body: protocol.ReadIn) -> Answer:
        data = self.files.read_nowait(body.fh, body.offset, body.size)
        if data is None:
            data = self.files.read(body.fh, body.offset, body.size, header.node)
        return protocol.reply(header.unique, data)

    def _release(self, header: Header, body: protocol.ReleaseIn) -> Answer:
        self.files.release(body.fh)
        return protocol.reply(header.unique)

    def _opendir(self, header: Header, body: protocol.OpenIn) -> Answer:
        # ENOSYS holds for all directories: the kernel asks for none any more, and keeps what it lists.
        if self.files.pinned and self._agreement.stateless and self._agreement.cached_directories:
            return protocol.error(header.unique, errno.ENOSYS)
        flags = 0
        if self._agreement.cached_directories:
            # Before a page of it is read: what the kernel has may not hold by then.
            keep = OpenFlag.KEEP_CACHE if self.files.holds(header.node) else 0
            flags = OpenFlag.CACHE_DIR | keep
        handle = self.files.opendir(header.node)
        return protocol.reply(header.unique, protocol.encode_open_out(handle, flags))

    def _readdir(self, header: Header, body: protocol.ReadIn) -> Answer:
        into = bytearray()
        for name, found, offset in self._listed(header, body):
            if not protocol.add_dirent(into, body.size, found.ino, offset, found.mode >> 12, name):
                break
        return protocol.reply(header.unique, into)

    def _readdirplus(self, header: Header, body: protocol.ReadIn) -> Answer:
        into, room = bytearray(), body.size
        for name, found, offset in self._listed(header, body):
            entry = self._entry(found)
            if not protocol.add_direntplus(into, room, entry, found.ino, offset, found.mode >> 12, name):
                break
        return protocol.reply(header.unique, into)

    def _listed(self, header: Header, body: protocol.ReadIn) -> Any:
        listed = self.files.readdir_nowait(body.fh, body.offset, header.node)
        return self.files.readdir(body.fh, body.offset, header.node) if listed is None else listed

    def _releasedir(self, header: Header, body: protocol.ReleaseIn) -> Answer:
        self.files.releasedir(body.fh)
        return protocol.reply(header.unique)

    def _statfs(self, header: Header, body: object) -> Answer:
        space = self.files.statfs()
        blocks, free = -(-space.total // 4096), space.free // 4096
        statfs = protocol.StatfsOut(blocks, free, free, space.files, space.free_files, 4096, 255, 4096)
        return protocol.reply(header.unique, protocol.encode_statfs_out(statfs))

    def _getxattr(self, header: Header, body: protocol.GetxattrIn) -> Answer:
        return _sized(header, body.size, self.files.getxattr(header.node, body.name))

    def _listxattr(self, header: Header, body: protocol.ListxattrIn) -> Answer:
        names = self.files.listxattr(header.node)
        return _sized(header, body.size, b"".join(name + b"\0" for name in names))

    def _destroy(self, header: Header, body: object) -> Answer:
        return protocol.reply(header.unique)

    def _interrupt(self, header: Header, body: protocol.InterruptIn) -> Answer:
        """Let go of who is killed while it waits for us: the kernel lets it die with an answer only. Any
        other signal can wait: programs do not expect EINTR of files, and every request is bounded."""
        asker = self._under_way.get(body.unique, 0) or self._late.get(body.unique, 0)
        return protocol.error(body.unique, errno.EINTR) if asker and _is_killed(asker) else None

    def _ignore(self, header: Header, body: object) -> Answer:
        return None

    def _refuse(self, header: Header, body: object) -> Answer:
        return protocol.error(header.unique, errno.EROFS)

    # ---- encoding --------------------------------------------------------------------------------

    def _attr(self, found: Attributes) -> protocol.Attr:
        seconds, nanoseconds = divmod(found.mtime_ns, 1_000_000_000)
        return protocol.Attr(
            found.ino, found.size, found.blocks, seconds, seconds, seconds,
            nanoseconds, nanoseconds, nanoseconds, found.mode, found.nlink,
            found.uid, found.gid, 0, _BLOCK, 0,
        )  # fmt: skip

    def _entry(self, found: Attributes) -> bytes:
        if not found.node:
            return protocol.encode_negative(found.entry_timeout)
        return protocol.encode_entry(found.node, self._attr(found), found.entry_timeout, found.attr_timeout)


class WritableSession(Session):
    """Serves a connection whose files can be written."""

    def __init__(self, files: "WritableFileSystem", *args: Any, **more: Any) -> None:
        """As `Session`."""
        super().__init__(files, *args, **more)
        self._writable = files
        self._may_be_late = threading.BoundedSemaphore(LATE)
        handlers = {code: handler for code, handler in self._handlers.items() if code not in _WRITES}
        # What is not here, but was refused, is ENOSYS: the kernel copies ranges, and makes files without a
        # name, in its own way or not at all.
        self._handlers = {
            **handlers,
            Opcode.SETATTR: self._setattr,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename,
            Opcode.LINK: self._link,
            Opcode.CREATE: self._create,
            Opcode.WRITE: self._write_bytes,
            Opcode.FLUSH: self._flush,
            Opcode.FSYNC: self._fsync,
            Opcode.FSYNCDIR: self._fsyncdir,
            Opcode.SETXATTR: self._setxattr,
            Opcode.REMOVEXATTR: self._removexattr,
            Opcode.FALLOCATE: self._fallocate,
        }

    # ---- names and attributes ----------------------------------------------------------------------

    def _setattr(self, header: Header, body: protocol.SetattrIn) -> Answer:
        valid = body.valid
        mtime_ns = None
        if valid & _MTIME:
            now = valid & _MTIME_NOW
            mtime_ns = time.time_ns() if now else body.mtime * 1_000_000_000 + body.mtime_nsec
        found = self._writable.setattr(
            header.node,
            handle=body.fh if valid & _FH else None,
            size=body.size if valid & _SIZE else None,
            mode=body.mode if valid & _MODE else None,
            uid=body.uid if valid & _UID else None,
            gid=body.gid if valid & _GID else None,
            mtime_ns=mtime_ns,
            kill=bool(valid & _KILL),
            who=header.pid,
        )
        return protocol.reply(header.unique, protocol.encode_attr_out(self._attr(found), found.attr_timeout))

    def _readlink(self, header: Header, body: object) -> Answer:
        return protocol.reply(header.unique, self._writable.readlink(header.node))

    def _symlink(self, header: Header, body: protocol.SymlinkIn) -> Answer:
        found = self._writable.symlink(
            header.node, body.name, body.target, header.uid, header.gid, again=_again(header)
        )
        return protocol.reply(header.unique, self._entry(found))

    def _mknod(self, header: Header, body: protocol.MknodIn) -> Answer:
        found = self._writable.mknod(
            header.node, body.name, body.mode, header.uid, header.gid, again=_again(header)
        )
        return protocol.reply(header.unique, self._entry(found))

    def _mkdir(self, header: Header, body: protocol.MkdirIn) -> Answer:
        found = self._writable.mkdir(
            header.node, body.name, body.mode, header.uid, header.gid, again=_again(header)
        )
        return protocol.reply(header.unique, self._entry(found))

    def _unlink(self, header: Header, body: protocol.UnlinkIn) -> Answer:
        self._writable.unlink(header.node, body.name, again=_again(header))
        return protocol.reply(header.unique)

    def _rmdir(self, header: Header, body: protocol.RmdirIn) -> Answer:
        self._writable.rmdir(header.node, body.name, again=_again(header))
        return protocol.reply(header.unique)

    def _rename(self, header: Header, body: protocol.RenameIn | protocol.Rename2In) -> Answer:
        flags = body.flags if isinstance(body, protocol.Rename2In) else 0
        self._writable.rename(
            header.node, body.name, body.new_parent, body.new_name, flags, again=_again(header)
        )
        return protocol.reply(header.unique)

    def _link(self, header: Header, body: object) -> Answer:
        return protocol.error(header.unique, errno.EPERM)  # a bucket has one name for an object

    def _setxattr(self, header: Header, body: protocol.SetxattrIn) -> Answer:
        self._writable.setxattr(header.node, body.name, body.value, body.flags)
        return protocol.reply(header.unique)

    def _removexattr(self, header: Header, body: protocol.RemovexattrIn) -> Answer:
        self._writable.removexattr(header.node, body.name)
        return protocol.reply(header.unique)

    # ---- bytes -------------------------------------------------------------------------------------

    def _flags_of(self, opened: "Opened") -> int:
        flags = OpenFlag.PASSTHROUGH if opened.backing else OpenFlag.KEEP_CACHE if opened.keep else 0
        return int(flags) | (0 if opened.flush else int(OpenFlag.NOFLUSH))

    def _open(self, header: Header, body: protocol.OpenIn) -> Answer:
        kill = bool(body.open_flags & _OPEN_KILL)
        opened = self._writable.open(header.node, body.flags, kill=kill, who=header.pid, again=_again(header))
        encoded = protocol.encode_open_out(opened.handle, self._flags_of(opened), opened.backing)
        return protocol.reply(header.unique, encoded)

    def _create(self, header: Header, body: protocol.CreateIn) -> Answer:
        found, opened = self._writable.create(
            header.node, body.name, body.flags, body.mode, header.uid, header.gid,
            kill=bool(body.open_flags & _OPEN_KILL), who=header.pid, again=_again(header),
        )  # fmt: skip
        encoded = protocol.encode_create_out(
            self._entry(found), opened.handle, self._flags_of(opened), opened.backing
        )
        return protocol.reply(header.unique, encoded)

    def _write_bytes(self, header: Header, body: protocol.WriteIn) -> Answer:
        kill = bool(body.write_flags & _WRITE_KILL)
        count = self._writable.write(body.fh, body.offset, body.data, node=header.node, kill=kill)
        return protocol.reply(header.unique, protocol.encode_write_out(count))

    def _flush(self, header: Header, body: protocol.FlushIn) -> Answer:
        return self._stored(header, lambda: self._writable.flush(body.fh, header.node))

    def _fsync(self, header: Header, body: object) -> Answer:
        return self._stored(header, lambda: self._writable.fsync(header.node))

    def _stored(self, header: Header, act: Callable[[], None]) -> Answer:
        """Answer when `act` is done. That may take as long as an upload: then another thread waits, of which
        there are more than of those that read requests. Who reads them goes on."""
        if not self._writable.stores or not self._may_be_late.acquire(blocking=False):
            act()
            return protocol.reply(header.unique)
        self._late[header.unique] = header.pid
        try:
            threading.Thread(
                target=self._answer_late, args=(header, act), name="fuse-late", daemon=True
            ).start()
        except RuntimeError:  # no room for another
            self._late.pop(header.unique, None)
            self._may_be_late.release()
            act()
            return protocol.reply(header.unique)
        return None

    def _answer_late(self, header: Header, act: Callable[[], None]) -> None:
        try:
            answer: Answer
            try:
                act()
                answer = protocol.reply(header.unique)
            except Exception as error:  # noqa: BLE001  whoever asked must be answered; `failed` logs it
                if self._ending:
                    return  # what it stood on is being taken down
                number = self.files.failed(protocol.opcode_name(header.opcode).lower(), error)
                answer = protocol.error(header.unique, number)
            self._write(header.opcode, answer)
        finally:
            self._late.pop(header.unique, None)
            self._may_be_late.release()

    def _fsyncdir(self, header: Header, body: object) -> Answer:
        self._writable.fsyncdir()
        return protocol.reply(header.unique)

    def _fallocate(self, header: Header, body: protocol.FallocateIn) -> Answer:
        self._writable.allocate(body.fh, header.node, body.mode, body.offset, body.length)
        return protocol.reply(header.unique)

    def _release(self, header: Header, body: protocol.ReleaseIn) -> Answer:
        if self._writable.knows(body.fh):
            return super()._release(header, body)
        self._writable.released(body.fh, header.node, body.flags)
        return protocol.reply(header.unique)


# As numbers: making an IntFlag costs more than decoding a request.
_MODE, _UID, _GID, _SIZE, _MTIME, _MTIME_NOW, _FH, _KILL = map(
    int,
    (
        SetattrValid.MODE, SetattrValid.UID, SetattrValid.GID, SetattrValid.SIZE, SetattrValid.MTIME,
        SetattrValid.MTIME_NOW, SetattrValid.FH, SetattrValid.KILL_SUIDGID,
    ),
)  # fmt: skip
_OPEN_KILL, _WRITE_KILL = int(OpenInFlag.KILL_SUIDGID), int(WriteFlag.KILL_SUIDGID)


def _again(header: Header) -> bool:
    """Whether the kernel has sent this before: to a daemon that died, and may have done it."""
    return bool(header.unique & protocol.RESENT)


def _is_killed(thread: int) -> bool:
    """Whether SIGKILL is pending for a thread, as every signal is that ends its process."""
    try:
        with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as status:
            pending = next(line for line in status if line.startswith("SigPnd:"))
    except (OSError, StopIteration):
        return False  # gone, or in another pid name space
    return bool(int(pending.split()[1], 16) >> (signal.SIGKILL - 1) & 1)


def _sized(header: Header, room: int, value: bytes) -> Answer:
    """The answer to a question that is put first with no room, for the size of the answer."""
    if not room:
        return protocol.reply(header.unique, protocol.encode_getxattr_out(len(value)))
    if len(value) > room:
        return protocol.error(header.unique, errno.ERANGE)
    return protocol.reply(header.unique, value)


_WRITES = (
    Opcode.SETATTR, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME,
    Opcode.RENAME2, Opcode.LINK, Opcode.WRITE, Opcode.CREATE, Opcode.SETXATTR, Opcode.REMOVEXATTR,
    Opcode.TMPFILE, Opcode.FALLOCATE, Opcode.COPY_FILE_RANGE,
)  # fmt: skip
"""The kernel refuses these by itself on a mount that is `ro`; somebody may have remounted it `rw`."""
