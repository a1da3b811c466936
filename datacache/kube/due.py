"""
Keys that somebody should look at: each once, when it is due, and never by two at a time.

What is added again while it waits is looked at once, at the earlier of the two times; what is added while
somebody looks at it is looked at again afterwards. So a burst of events is one look, and the last event is
never missed.
"""

import threading
from typing import Generic, TypeVar

from datacache.clock import Clock

Key = TypeVar("Key")


class Due(Generic[Key]):
    """Thread-safe. State, guarded by the condition: `_due` says when each waiting key is, `_held` are being
    looked at; a key may be in both. A take goes through all of `_due`: some hundred Datasets at most."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._due: dict[Key, float] = {}
        self._held: set[Key] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Due {len(self._due)} due, {len(self._held)} held>"

    def add(self, key: Key, *, after: float = 0.0) -> None:
        """Have `key` looked at in `after` seconds, or when it was due before, whichever is earlier."""
        with self._changed:
            due = self._clock.monotonic() + after
            if due < self._due.get(key, float("inf")):
                self._due[key] = due
                self._changed.notify()

    def take(self, *, block: bool = True) -> Key | None:
        """The key that is due; `done` gives it back. None: closed, or (without `block`) nothing is due."""
        with self._changed:
            while not self._closed:
                free = [(due, key) for key, due in self._due.items() if key not in self._held]
                due, key = min(free, key=lambda pair: pair[0], default=(float("inf"), None))
                wait = due - self._clock.monotonic()
                if key is not None and wait <= 0:
                    del self._due[key]
                    self._held.add(key)
                    return key
                if not block:
                    return None
                self._changed.wait(None if key is None else wait)
            return None

    def done(self, key: Key) -> None:
        """It has been looked at."""
        with self._changed:
            self._held.discard(key)
            self._changed.notify()

    def close(self) -> None:
        """Whoever takes gets None, now and from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
