"""
The system calls that touch copies, in one place.

A tier does its data I/O through a `Disk`, so that a test can hand it one that is full, slow or
failing. Nothing here decides anything.
"""

import ctypes
import errno
import os

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

    def unlink(self, name: str, *, at: int) -> None:
        os.unlink(name, dir_fd=at)

    def space(self, fd: int) -> Space:
        """What is left on the file system of `fd`."""
        st = os.fstatvfs(fd)
        return Space(st.f_blocks * st.f_frsize, st.f_bavail * st.f_frsize, st.f_files, st.f_favail)
