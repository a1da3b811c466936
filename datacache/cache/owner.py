"""
One owner per cache directory.

The owner holds an open-file-description lock on the file `lock` for as long as it lives; the file
says who it is. The kernel lets go of the lock when the process ends, however it ends, so a lock
file that a dead process left behind means nothing. (Not flock(2): whether an OFD lock is held can
be asked without taking it, so looking who owns a directory never gets in the way of owning it.)
"""

import fcntl
import json
import os
import struct
from dataclasses import asdict, dataclass

from datacache.errors import Locked

MANAGED = "datacache-cache"
"""The sub-directory of a tier's directory that is ours; nothing outside it is ever touched."""
_LOCK = "lock"
_LAYOUT = "hhqqi4x"  # struct flock: type, whence, start, len, pid


@dataclass(frozen=True)
class Owner:
    """The process that owns a cache directory. Of an owner that has only just begun to exist, only
    that it exists is known: `pid` is 0 then."""

    pid: int
    mount: str
    """Where it is mounted; empty for a load without a mount."""
    socket: str
    """Its control socket; empty: none."""


class OwnerLock:
    """The lock, held until `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __repr__(self) -> str:
        return f"<OwnerLock {'let go' if self._fd < 0 else self._fd}>"

    def in_place(self, at: int) -> bool:
        """Whether the lock still lies in the directory `at`: nobody deleted it underneath us."""
        return _same_file(self._fd, at)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def take_lock(directory: str, at: int, owner: Owner) -> OwnerLock:
    """Own the managed directory open as `at`; `directory` is for the error. Raises Locked."""
    while True:
        fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=at)
        try:
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
            except (BlockingIOError, PermissionError):
                other = _read(fd)
                raise Locked(directory, pid=other.pid, mount=other.mount) from None
            # Between open and lock the file may have been deleted and made anew by another owner.
            if _same_file(fd, at):
                text = json.dumps(asdict(owner)).encode() + b"\n"
                os.pwrite(fd, text, 0)
                os.ftruncate(fd, len(text))
                lock, fd = OwnerLock(fd), -1
                return lock
        finally:
            if fd >= 0:
                os.close(fd)


def read_owner(directory: str) -> Owner | None:
    """The live owner of the cache in `directory`; None where there is none."""
    try:
        fd = os.open(os.path.join(directory, MANAGED, _LOCK), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
        return None if struct.unpack(_LAYOUT, found)[0] == fcntl.F_UNLCK else _read(fd)
    finally:
        os.close(fd)


def _whole_file(kind: int) -> bytes:
    return struct.pack(_LAYOUT, kind, os.SEEK_SET, 0, 0, 0)


def _same_file(fd: int, at: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(_LOCK, dir_fd=at))
    except FileNotFoundError:
        return False


def _read(fd: int) -> Owner:
    try:
        found = json.loads(os.pread(fd, 65536, 0).split(b"\n", 1)[0])
        return Owner(int(found["pid"]), str(found["mount"]), str(found["socket"]))
    except (ValueError, KeyError, TypeError):
        return Owner(0, "", "")
