"""A disk that fails when told to."""

import errno
import os
from collections.abc import Callable

from datacache.cache.disk import Disk, Handle
from datacache.cache.policy import Space
from datacache.model import Buffer, ByteRange

WRITES = frozenset({"create", "write", "sync", "unlink", "punch"})
ALL = WRITES | {"open", "read", "link"}


class FaultyDisk(Disk):
    """`fail` says which calls fail with which errno; `left` is what the file system says it has.

    `before_write` and `before_sync` are called at the start of each. `reads`, `synced` and `rounds`
    count reads, files synced, and syncs of everything.
    """

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        self.left: Space | None = None
        self.synced = 0
        self.rounds = 0
        self.reads = 0
        self.before_write: Callable[[], None] | None = None
        self.before_sync: Callable[[], None] | None = None

    def break_down(self, calls: frozenset[str] = ALL, code: int = errno.EIO) -> None:
        self.fail = dict.fromkeys(calls, code)

    def heal(self) -> None:
        self.fail = {}

    def _check(self, call: str) -> None:
        code = self.fail.get(call)
        if code is not None:
            raise OSError(code, os.strerror(code))

    def open(self, name: str, flags: int, *, at: int) -> Handle:
        self._check("create" if flags & os.O_CREAT else "open")
        return super().open(name, flags, at=at)

    def read(self, fd: int, length: int, offset: int) -> Buffer:
        self._check("read")
        self.reads += 1
        return super().read(fd, length, offset)

    def write(self, fd: int, data: memoryview, offset: int) -> None:
        if self.before_write is not None:
            self.before_write()
        if self.fail.get("write") == errno.ENOSPC:  # a full disk takes a part first
            super().write(fd, data[: len(data) // 2], offset)
        self._check("write")
        super().write(fd, data, offset)

    def punch(self, fd: int, span: ByteRange) -> None:
        self._check("punch")
        super().punch(fd, span)

    def sync(self, fd: int) -> None:
        self._check("sync")
        if self.before_sync is not None:
            self.before_sync()
        self.synced += 1

    def sync_all(self, fd: int) -> None:
        self._check("sync")
        self.rounds += 1

    def alone(self, fd: int) -> bool:
        self._check("lease")
        return super().alone(fd)

    def rename(self, name: str, new: str, *, at: int) -> None:
        self._check("unlink")
        super().rename(name, new, at=at)

    def link(self, fd: int, name: str, *, at: int) -> None:
        self._check("link")
        super().link(fd, name, at=at)

    def unlink(self, name: str, *, at: int) -> None:
        self._check("unlink")
        super().unlink(name, at=at)

    def space(self, fd: int) -> Space:
        return self.left or super().space(fd)
