"""
The system calls that touch copies, in one place.

A tier does its data I/O through a `Disk`, so that a test can hand it one that is full, slow or
failing. Nothing here decides anything.
"""

import ctypes
import errno
import fcntl
import os
import signal
from contextlib import suppress

from datacache.cache.policy import Space
from datacache.model import Buffer, ByteRange

_RWF_NOWAIT = os.RWF_NOWAIT
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

# Two calls that Python does not offer. `None` resolves in what is loaded already: the C library.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.syncfs.argtypes = (ctypes.c_int,)


class Handle:
    """An open descriptor that is closed when nobody refers to it any more.

    Whoever reads takes a reference first, so a close in another thread can never make it read from
    another file that was given the same number.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __repr__(self) -> str:
        return f"<Handle {self.fd}>"

    def __del__(self) -> None:
        os.close(self.fd)


class Disk:
    """A file system as it is. All names are relative to the directory `at`."""

    def open(self, name: str, flags: int, *, at: int) -> Handle:
        return Handle(os.open(name, flags | os.O_CLOEXEC, 0o600, dir_fd=at))

    def read(self, fd: int, length: int, offset: int) -> Buffer:
        """Up to `length` bytes; fewer only at the end of the file."""
        data = os.pread(fd, length, offset)
        if len(data) == length or not data:
            return data
        rest = self.read(fd, length - len(data), offset + len(data))
        return b"".join((data, rest)) if rest else data

    def read_nowait(self, fd: int, length: int, offset: int) -> Buffer | None:
        """`length` bytes if they are in memory, else None."""
        data = bytearray(length)
        try:
            return data if os.preadv(fd, (data,), offset, _RWF_NOWAIT) == length else None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # EAGAIN: not in memory
                return None
        # tmpfs knows no RWF_NOWAIT, and needs none: it is memory.
        return data if os.preadv(fd, (data,), offset) == length else None

    def write(self, fd: int, data: memoryview, offset: int) -> None:
        """All of `data`."""
        while data:
            done = os.pwrite(fd, data, offset)
            data, offset = data[done:], offset + done

    def punch(self, fd: int, span: ByteRange) -> None:
        """Give back the space of `span`, which reads as zeros afterwards."""
        mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
        if _libc.fallocate(fd, mode, span.start, span.length):
            code = ctypes.get_errno()
            if code != errno.EOPNOTSUPP:  # then the space stays taken until the entry goes
                raise OSError(code, os.strerror(code))

    def sync(self, fd: int) -> None:
        """Wait until one file is on the medium."""
        os.fsync(fd)

    def sync_all(self, fd: int) -> None:
        """Wait until the whole file system that `fd` lies on is on the medium."""
        if _libc.syncfs(fd):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def alone(self, fd: int) -> bool:
        """Whether nobody else has the file open or mapped: no descriptor but this one, in no process, and
        no passthrough open of the kernel, not even one whose server is dead. And whether it has no other
        name: what was taken from another directory may still be called something there.

        Raises OSError where the file system cannot tell. Asks for a write lease, which is granted only
        then, and gives it back at once; an open that comes in between waits for that instant.
        """
        if os.fstat(fd).st_nlink > 1:
            return False
        # Such an open is announced to us by a signal. SIGIO, which would be it, ends a process that
        # does not handle it; SIGURG is ignored by whoever has not asked for it.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            return False
        finally:
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True

    def together(self, fd: int, *, at: int) -> bool:
        """Whether a file can have a name in `at`, too: it lies on the same file system, in the same mount of
        it (between two of them the kernel links nothing)."""
        return os.fstat(fd).st_dev == os.fstat(at).st_dev and _mount(fd) == _mount(at)

    def link(self, fd: int, name: str, *, at: int) -> None:
        """Give an open file one more name, `name` in `at`. FileNotFoundError where it has none any more."""
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=at, follow_symlinks=True)

    def rename(self, name: str, new: str, *, at: int) -> None:
        os.rename(name, new, src_dir_fd=at, dst_dir_fd=at)

    def unlink(self, name: str, *, at: int) -> None:
        os.unlink(name, dir_fd=at)

    def space(self, fd: int) -> Space:
        """What is left on the file system of `fd`."""
        st = os.fstatvfs(fd)
        return Space(st.f_blocks * st.f_frsize, st.f_bavail * st.f_frsize, st.f_files, st.f_favail)


def _mount(fd: int) -> bytes:
    """Which mount a descriptor was opened in."""
    info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(info, 1024).partition(b"mnt_id:")[2].partition(b"\n")[0]
    finally:
        os.close(info)
