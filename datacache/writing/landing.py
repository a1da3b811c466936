"""
The landing zone: a directory in which what is written lies until the bucket has it.

One plain file per content, byte for byte, under a number that is never used twice. Who may write to
a file is the kernel's business: it may have it open by itself (passthrough) and mapped, long after we
closed it. So `quiet` asks the kernel: a read lease is granted only when nobody can write.

A file can become a cached file without a copy, and a cached file one of ours: then it has a second name,
in the other directory, for as long as that takes (`cache.store`). Nobody may write to such a file. After a
crash some may still have two names: `shared` tells which, and `make_own` is what ends that.

A zone has one owner at a time (the lock file), as a cache directory has.
"""

import ctypes
import errno
import fcntl
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from datacache.cache.catalogue import checksum
from datacache.cache.owner import Owner, OwnerLock, take_lock
from datacache.cache.tier import Block
from datacache.errors import LandingBroken, LandingError, LandingFull, Stopped
from datacache.model import Buffer, MiB, format_size
from datacache.writing.steps import step

MANAGED = "datacache-landing"
"""The sub-directory of the chosen directory that is ours."""
FILES = "files"
_NAME = re.compile(r"^[0-9]{1,19}$")
_PIECE = 8 * MiB
"""Bytes copied at once; Python holds one piece."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LEASES = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


T = TypeVar("T")


@dataclass(frozen=True)
class Room:
    """How full the zone's file system is."""

    total: int
    free: int
    """Bytes that may still be written."""
    available: int
    """... and those of the reserve."""

    @property
    def used(self) -> float:
        """Fraction."""
        return 1 - self.free / self.total if self.total else 1.0


def look_of(found: os.stat_result) -> tuple[int, int, int]:
    """What any write would change: size, ctime and mtime. Of the two times, that of the change may be one
    for all that happens within some milliseconds; that of the bytes is the object's until somebody writes."""
    return found.st_size, found.st_ctime_ns, found.st_mtime_ns


class LandedFile:
    """A landing file, open. Its descriptor is valid until `close`; the kernel may be lent it."""

    __slots__ = ("_lock", "descriptor", "identity", "landing", "writing")

    def __init__(self, landing: int, descriptor: int, *, writing: bool) -> None:
        self.landing, self.descriptor, self.writing = landing, descriptor, writing
        found = os.fstat(descriptor)
        self.identity = (found.st_dev, found.st_ino)
        """Device and inode number: equal in all that are open on the same file."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<LandedFile {self.landing} {'rw' if self.writing else 'r'} {self.descriptor}>"

    def close(self) -> None:
        """Let go. Idempotent."""
        with self._lock:
            descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Quiet:
    """A landing file that nobody can write to, as long as this is open: the bytes of an upload.

    Thread-safe. Whoever wants to write calls `stop` first; from then on nothing can be read.
    """

    def __init__(self, descriptor: int, *, leased: bool, block: int) -> None:
        """`block`: bytes of the pieces that `blocks` tells the checksums of."""
        self._descriptor, self.leased, self._block = descriptor, leased, block
        found = os.fstat(descriptor)
        self.size, self.mtime_ns, self.look = found.st_size, found.st_mtime_ns, look_of(found)
        self._lock = threading.Lock()  # held while bytes are read: after `stop` none are any more
        self._blocks: dict[
            int, Block
        ] = {}  # of what was read, by offset; whoever reads it again finds the same
        self.stopped = False

    def read(self, offset: int, length: int) -> Buffer:
        """Up to `length` bytes; fewer only at the end. Raises Stopped, LandingBroken."""
        with self._lock:
            if self._descriptor < 0:
                raise Stopped("somebody writes to the file again")
            try:
                data = os.pread(self._descriptor, length, offset)
            except OSError as error:
                raise LandingBroken(f"a landing file cannot be read: {error.strerror}") from error
        self._note(offset, memoryview(data))
        return data

    def _note(self, offset: int, data: memoryview) -> None:
        """Remember the checksums of the blocks that `data` has all of: an upload reads everything anyway."""
        end = offset + len(data)
        for start in range(-(-offset // self._block) * self._block, end, self._block):
            stop = min(start + self._block, self.size)
            if stop <= end and start not in self._blocks:
                self._blocks[start] = Block(start, stop, checksum(data[start - offset : stop - offset]))

    def blocks(self) -> list[Block]:
        """The checksums of all bytes, in order. What nobody has read so far is read. Raises as `read`."""
        for start in range(0, self.size, self._block):
            if start not in self._blocks:
                self.read(start, min(self._block, self.size - start))
        return [self._blocks[start] for start in range(0, self.size, self._block)]

    @contextmanager
    def held(self) -> Iterator[int]:
        """The descriptor. Until the block is left nobody can write, for `stop` waits. Raises Stopped."""
        with self._lock:
            if self._descriptor < 0:
                raise Stopped("somebody writes to the file again")
            yield self._descriptor

    def stop(self) -> None:
        """Let others write; what is read after this is Stopped. Idempotent."""
        self.stopped = True
        self.close()

    def close(self) -> None:
        """Let others write again. Idempotent."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            os.close(descriptor)


class Landing:
    """One landing zone. Thread-safe."""

    def __init__(self, directory: str, owner: Owner, *, reserve: float = 0.05, block: int = 4 * MiB) -> None:
        """Own `directory`, making it where needed. `reserve`: fraction of its file system left free. `block`:
        bytes of a block of the cache. Raises Locked, LandingBroken."""
        self.directory = os.path.join(directory, MANAGED)
        self._reserve, self._block = reserve, block
        try:
            os.makedirs(os.path.join(self.directory, FILES), mode=0o700, exist_ok=True)
            at = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._owned: OwnerLock = take_lock(directory, at, owner)
                os.fsync(at)  # the directory of the files is there after a power cut, too
            finally:
                os.close(at)
            self._at = os.open(
                os.path.join(self.directory, FILES), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            )
        except OSError as error:
            raise _broken(self.directory, error) from error
        self._lock = threading.Lock()  # guards the next two
        self._next = max(self.files(), default=0) + 1
        self._unsynced = False  # there are names that a power cut may take
        self.leases = True
        """Whether the file system can tell who writes; found out by the first that asks."""

    def __repr__(self) -> str:
        return f"<Landing {self.directory}>"

    @property
    def journal(self) -> str:
        """Where the journal of this zone lies."""
        return os.path.join(self.directory, "journal.db")

    def close(self) -> None:
        """Let go of the zone. Idempotent."""
        at, self._at = self._at, -1
        if at >= 0:
            os.close(at)
            self._owned.close()

    def files(self) -> list[int]:
        """The numbers of all files that there are."""
        return [int(name) for name in os.listdir(self._at) if _NAME.match(name)]

    def reserve_numbers(self, known: Iterator[int]) -> None:
        """Give out none of `known` again."""
        with self._lock:
            self._next = max(self._next, *known, 0) + 1

    def create(self) -> int:
        """A new, empty file. Raises LandingFull, LandingBroken."""
        self.check_room()
        number = self._new()
        step("landing.before.create")
        try:
            os.close(
                os.open(
                    str(number), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._at
                )
            )
        except OSError as error:
            raise _broken(self.directory, error) from error
        self._named()
        step("landing.after.create")
        return number

    def _new(self) -> int:
        with self._lock:
            number, self._next = self._next, self._next + 1
            return number

    def _named(self) -> None:
        """A file has got its name."""
        with self._lock:
            self._unsynced = True

    def receive(self, give: Callable[[int, str], T | None]) -> tuple[int, T] | None:
        """A new file that is there already: `give` gives it the name that it is told in the directory that it
        is told. The file, and what `give` returned; None where that was None."""
        number = self._new()
        step("landing.before.receive")
        given = give(self._at, str(number))
        self._named()
        step("landing.after.receive")
        if given is None:
            self.discard(number)
            return None
        return number, given

    def shared(self, numbers: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Those of some files that have another name elsewhere, with their device and inode number."""
        found = {number: self.stat(number) for number in numbers}
        return {number: (st.st_dev, st.st_ino) for number, st in found.items() if st.st_nlink > 1}

    def make_own(self, number: int) -> None:
        """Make a file another one than what has its other names, by a copy. Nobody may have it open. Raises
        LandingFull, LandingBroken."""
        new = self.create()
        try:
            source, target = self.open(number, writing=False), self.open(new, writing=True)
            try:
                found = os.fstat(source.descriptor)
                copy(source.descriptor, target.descriptor, found.st_size)
                os.utime(target.descriptor, ns=(found.st_atime_ns, found.st_mtime_ns))
                os.fsync(target.descriptor)  # before it takes the place of what was acknowledged
            finally:
                source.close()
                target.close()
            step("landing.before.own")
            os.rename(str(new), str(number), src_dir_fd=self._at, dst_dir_fd=self._at)
            self._named()
            step("landing.after.own")
        except OSError as error:
            self.discard(new)
            raise _broken(self.directory, error) from error

    def open(self, number: int, *, writing: bool) -> LandedFile:
        """Open a file. Raises LandingBroken, also when it is not there."""
        try:
            flags = (os.O_RDWR if writing else os.O_RDONLY) | os.O_CLOEXEC
            return LandedFile(number, os.open(str(number), flags, dir_fd=self._at), writing=writing)
        except OSError as error:
            raise _broken(f"{self.directory}/{FILES}/{number}", error) from error

    def stat(self, number: int) -> os.stat_result:
        """Size and times as they are now. Raises LandingBroken."""
        try:
            return os.stat(str(number), dir_fd=self._at)
        except OSError as error:
            raise _broken(f"{self.directory}/{FILES}/{number}", error) from error

    def truncate(self, number: int, size: int) -> None:
        """Make it `size` bytes long. Raises LandingFull, LandingBroken."""
        file = self.open(number, writing=True)
        try:
            os.ftruncate(file.descriptor, size)
        except OSError as error:
            raise _broken(self.directory, error) from error
        finally:
            file.close()

    def write(self, number: int, data: bytes) -> None:
        """Make `data` all that a file holds. Raises LandingFull, LandingBroken."""
        file = self.open(number, writing=True)
        try:
            os.ftruncate(file.descriptor, 0)
            os.pwrite(file.descriptor, data, 0)
        except OSError as error:
            raise _broken(self.directory, error) from error
        finally:
            file.close()

    def set_mtime(self, number: int, mtime_ns: int) -> None:
        """As utimens(2)."""
        try:
            os.utime(str(number), ns=(mtime_ns, mtime_ns), dir_fd=self._at)
        except OSError as error:
            raise _broken(self.directory, error) from error

    def sync(self, number: int) -> None:
        """Return when the file's bytes are on the disk. Raises LandingBroken."""
        step("landing.before.sync")
        file = self.open(number, writing=False)
        try:
            os.fsync(file.descriptor)
        except OSError as error:
            raise _broken(self.directory, error) from error
        finally:
            file.close()
        step("landing.after.sync")

    def sync_names(self) -> None:
        """Return when the names of all files made so far are on the disk. Raises LandingBroken."""
        with self._lock:
            new, self._unsynced = self._unsynced, False
        if new:
            try:
                os.fsync(self._at)
            except OSError as error:
                with self._lock:
                    self._unsynced = True
                raise _broken(self.directory, error) from error

    def quiet(self, number: int) -> Quiet | None:
        """The bytes of a file that nobody can write to until this is closed; None where somebody can.

        Where the file system knows no leases, nobody is asked: then it is for the caller to know.
        """
        try:
            descriptor = os.open(str(number), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._at)
        except OSError as error:
            raise _broken(f"{self.directory}/{FILES}/{number}", error) from error
        try:
            # An open that breaks the lease is announced by a signal: one that is ignored by default.
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            return Quiet(descriptor, leased=True, block=self._block)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno in _NO_LEASES:
                self.leases = False
                return Quiet(descriptor, leased=False, block=self._block)
            os.close(descriptor)
            raise _broken(self.directory, error) from error

    def discard(self, number: int) -> None:
        """Remove a file; who has it open keeps it. Idempotent."""
        step("landing.before.discard")
        with suppress(FileNotFoundError):
            os.unlink(str(number), dir_fd=self._at)
        step("landing.after.discard")

    def failed(self, error: OSError) -> LandingError:
        """What an error of one of its files means."""
        return _broken(self.directory, error)

    def room(self) -> Room:
        """How full the file system is, the reserve counted as full."""
        try:
            st = os.fstatvfs(self._at)
        except OSError as error:
            raise _broken(self.directory, error) from error
        total, available = st.f_blocks * st.f_frsize, st.f_bavail * st.f_frsize
        return Room(total, max(0, available - int(total * self._reserve)), available)

    def check_room(self) -> None:
        """Raise LandingFull where nothing more may be written."""
        room = self.room()
        if not room.free:
            raise LandingFull(
                f"the landing zone {self.directory} is full ({format_size(room.total)}, of which "
                f"{self._reserve:.0%} is left free): wait for uploads (`datacache status`) or make room"
            )


def allocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError."""
    if _libc.fallocate(descriptor, mode, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def copy(source: int, target: int, size: int) -> None:
    """Copy the first `size` bytes of a file into an empty one; on some file systems by reference. Raises
    OSError, LandingBroken: there are fewer."""
    at = 0
    with suppress(OSError):  # across file systems, or where it is not offered: by hand
        while at < size:
            done = os.copy_file_range(source, target, size - at, at, at)
            if not done:
                break
            at += done
    while at < size:
        data = os.pread(source, min(_PIECE, size - at), at)
        if not data:
            raise LandingBroken("a file is shorter than what it should hold")
        write_all(target, memoryview(data), at)
        at += len(data)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """pwrite(2), all of it. Raises OSError."""
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def _broken(where: str, error: OSError) -> LandingError:
    if error.errno in _FULL:
        return LandingFull(f"the landing zone {where} is full: {error.strerror}")
    return LandingBroken(f"the landing zone {where} fails: {error.strerror}")
