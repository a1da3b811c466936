"""
Work that all who wait for it share.
"""

import threading
from collections.abc import Callable


class _Round:
    """One time that the work is done."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done, self.error = False, None  # type: bool, BaseException | None


class Rounds:
    """Does `work` for whoever asks, once for all who ask before it begins. Thread-safe.

    The first to ask does it, in its own thread. Who asks while it is under way may have come too late for
    that: one of those does it once more, for all of them.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._changed = threading.Condition()  # guards the next two, and what a round holds
        self._next = _Round()
        self._under_way = False

    def do(self) -> None:
        """Return when the work was done, and begun after this call. Raises what it raised."""
        with self._changed:
            mine = self._next
            while self._under_way and not mine.done:
                self._changed.wait()
            ours = not mine.done  # nobody is at it, so it is the next one still
            if ours:
                self._under_way, self._next = True, _Round()
        if ours:
            try:
                self._work()
            except BaseException as error:  # noqa: BLE001  all who wait raise it
                mine.error = error
            with self._changed:
                mine.done, self._under_way = True, False
                self._changed.notify_all()
        if mine.error is not None:
            raise mine.error
