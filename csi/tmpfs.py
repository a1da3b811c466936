"""
The tmpfs of a MEM tier: exactly its quota, there before the tier is used, and gone when nobody needs it.

Its pages are charged to whoever writes them, a worker, whose memory request and limit have room for them. It
stays while workers come and go, so that what is cached outlives a restart. When no worker has been there for
long it goes, with all that is in it: memory is worth more than a copy.

Pure but for `LinuxMemory`, which is the kernel; `FakeMemory` is for tests.
"""

import ctypes
import enum
import os
from typing import Protocol

from datacache.cache import limits
from datacache.errors import MountError

PAGE = 4096
SPARE = 1024
"""Inodes beside those of copies: directories, the catalogue."""

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 2, 4, 8, 32
_UMOUNT_NOFOLLOW = 8
_libc = ctypes.CDLL(None, use_errno=True)


class Memory(Protocol):
    """File systems in memory, by the directory that they are mounted on. Each call raises MountError."""

    def size(self, directory: str) -> int | None:
        """Bytes of the one that is mounted just there; None: none is."""

    def mount(self, directory: str, size: int) -> None:
        """Mount one. The directory is made where it is not there."""

    def resize(self, directory: str, size: int) -> None:
        """Change how much it may have. Refused while more than that is in it."""

    def unmount(self, directory: str) -> None:
        """Take it off, with what is in it. Refused while somebody has something in it open."""


class Act(enum.Enum):
    """What there is to do about one."""

    NOTHING = "nothing"
    MOUNT = "mount"
    RESIZE = "resize"
    UNMOUNT = "unmount"


def act(there: int | None, quota: int, *, needed: bool) -> Act:
    """What to do where a tmpfs of `there` bytes is mounted, for a tier of `quota` bytes."""
    if not needed:
        return Act.NOTHING if there is None else Act.UNMOUNT
    if there is None:
        return Act.MOUNT
    return Act.NOTHING if there == whole_pages(quota) else Act.RESIZE


def whole_pages(size: int) -> int:
    """Bytes that the kernel makes of `size`."""
    return -(-size // PAGE) * PAGE


def inodes(size: int) -> int:
    """Of a tmpfs of `size` bytes: as many as there can be files with something in them."""
    return whole_pages(size) // PAGE + SPARE


def options(size: int) -> str:
    """What a tmpfs is mounted with. Without a number of inodes a worker could fill the kernel's memory with
    empty files; 0700: its worker is root, and nobody else has business there."""
    return f"size={whole_pages(size)},nr_inodes={inodes(size)},mode=0700"


class LinuxMemory:
    """Those of this machine, in the mount name space of this process."""

    def __repr__(self) -> str:
        return "<LinuxMemory>"

    def size(self, directory: str) -> int | None:
        try:
            return limits.own_tmpfs(directory)
        except OSError as error:
            raise MountError(f"{directory} cannot be looked at ({error.strerror})") from error

    def mount(self, directory: str, size: int) -> None:
        try:
            os.makedirs(directory, mode=0o755, exist_ok=True)
        except OSError as error:
            raise MountError(f"{directory} cannot be made ({error.strerror})") from error
        self._mount(directory, size, 0)

    def resize(self, directory: str, size: int) -> None:
        self._mount(directory, size, _MS_REMOUNT)

    def unmount(self, directory: str) -> None:
        if _libc.umount2(os.fsencode(directory), _UMOUNT_NOFOLLOW):
            code = ctypes.get_errno()
            raise MountError(f"the tmpfs on {directory} cannot be taken off ({os.strerror(code)})")

    def _mount(self, directory: str, size: int, more: int) -> None:
        # Through a descriptor: where its name leads a moment later is nobody's to choose.
        try:
            at = os.open(directory, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise MountError(f"{directory} is not a directory ({error.strerror})") from error
        try:
            through = f"/proc/self/fd/{at}"
            if os.readlink(through) != directory:
                raise MountError(f"{directory} leads elsewhere, to {os.readlink(through)}")
            flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | more
            text = options(size).encode()
            if _libc.mount(b"datacache", through.encode(), b"tmpfs", ctypes.c_ulong(flags), text):
                code = ctypes.get_errno()
                what = "resized" if more else "mounted"
                raise MountError(f"a tmpfs cannot be {what} on {directory} ({os.strerror(code)})")
        finally:
            os.close(at)


class FakeMemory:
    """One that only says so. `busy`: directories in which somebody has something open."""

    def __init__(self) -> None:
        self.mounted: dict[str, int] = {}
        self.held: dict[str, int] = {}
        """Bytes in use, by directory."""
        self.busy: set[str] = set()

    def size(self, directory: str) -> int | None:
        return self.mounted.get(directory)

    def mount(self, directory: str, size: int) -> None:
        self.mounted[directory] = whole_pages(size)

    def resize(self, directory: str, size: int) -> None:
        if self.held.get(directory, 0) > size:
            raise MountError(f"a tmpfs cannot be resized on {directory} (Invalid argument)")
        self.mounted[directory] = whole_pages(size)

    def unmount(self, directory: str) -> None:
        if directory in self.busy:
            raise MountError(f"the tmpfs on {directory} cannot be taken off (Device or resource busy)")
        del self.mounted[directory]
