"""
Space that is given up when a disk is full, so that what makes room can still be noted.

Writers who were given a landing file go on to the last block of its disk, and we see none of it. What
then frees space (an upload that is done, a file that is unlinked) is a change of the journal, and of the
catalogue of names, which need a little themselves. So a file of nothing lies in the landing zone while
there is room; without room it is removed, and made again when there is.
"""

import logging
import os
from contextlib import suppress

_log = logging.getLogger(__name__)

SIZE = 16 << 20
"""Bytes at most: a journal that is opened anew takes 8 MiB ahead (`journal.RESERVED`), a catalogue some."""
_SHARE = 16
"""... and one of so many parts of the disk, where that is small."""
_AMPLE = 2
"""It is made where it leaves at least so many times its size free."""
_PARTS = 2
"""In how many parts it is given up."""


class Ballast:
    """One such file. Thread-safe: it is there or it is not, and the disk knows."""

    def __init__(self, directory: str) -> None:
        """In `directory`, which need not be there yet."""
        self._directory, self._path = directory, os.path.join(directory, "ballast")

    def __repr__(self) -> str:
        return f"<Ballast {self._path}>"

    def make(self) -> bool:
        """Have it, where there is ample room; whether it is there."""
        size, free = self._measured()
        with suppress(OSError):
            if os.stat(self._path).st_size >= size:
                return True
        if not size or free < (_AMPLE + 1) * size:
            return False
        new = f"{self._path}.new"
        try:
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)
            os.rename(new, self._path)
        except OSError as error:
            _log.debug("no ballast: %s", error)
            with suppress(OSError):
                os.unlink(new)
            return False
        return True

    def lighten(self) -> bool:
        """Give some of it up where less than its size is free; whether that was done."""
        size, free = self._measured()
        return free < size and self.give_up()

    def give_up(self) -> bool:
        """Free a part of it, for somebody else may be faster than us to take that; whether there was any."""
        step, _ = self._measured()
        try:
            left = os.stat(self._path).st_size - max(1, step // _PARTS)
            if left > 0:
                os.truncate(self._path, left)
            else:
                os.unlink(self._path)
        except OSError:
            return False
        _log.warning("%s: its disk is full; some of the space that is kept for that is used", self._directory)
        return True

    def _measured(self) -> tuple[int, int]:
        """How large it is to be, and how many bytes are free; zeros where that cannot be told."""
        try:
            st = os.statvfs(self._directory)
        except OSError:
            return 0, 0
        return min(SIZE, st.f_blocks * st.f_frsize // _SHARE), st.f_bavail * st.f_frsize
