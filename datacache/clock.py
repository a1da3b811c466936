"""
Time as an input.

Whatever waits or compares times is handed a `Clock`, so that tests decide what time it is and
nothing in them sleeps.
"""

import threading
import time
from typing import Protocol


def boot_id() -> str:
    """Which boot of this machine it is."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


class Clock(Protocol):
    """Monotonic and wall time in seconds, and waiting."""

    def monotonic(self) -> float:
        """Seconds that never run backwards; the origin means nothing."""

    def wall(self) -> float:
        """Seconds since the epoch."""

    def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait for `event` for at most `seconds`; whether it was set."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(seconds)


class VirtualClock:
    """A clock for tests: time passes only when somebody sleeps on it or calls `advance`."""

    def __init__(self, start: float = 1_000_000.0) -> None:
        self._now = start
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<VirtualClock {self._now:.3f}>"

    def monotonic(self) -> float:
        with self._lock:
            return self._now

    def wall(self) -> float:
        return self.monotonic()

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if not event.is_set():
            self.advance(seconds)
        return event.is_set()

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        with self._lock:
            self._now += max(0.0, seconds)


class Pace:
    """Bytes per second at most: a bucket that fills at this rate, and holds one second's worth."""

    def __init__(self, rate: int, clock: Clock) -> None:
        self._rate, self._clock = rate, clock
        self._lock = threading.Lock()  # guards all below
        self._tokens = float(rate)
        self._at = clock.monotonic()

    def __repr__(self) -> str:
        return f"<Pace {self._rate} bytes/s>"

    def take(self, count: int, stop: threading.Event) -> bool:
        """Wait until `count` bytes are due. False: `stop` was set first.

        More than the bucket holds is lent, and those who come next wait for it.
        """
        with self._lock:
            now = self._clock.monotonic()
            self._tokens = min(self._rate, self._tokens + (now - self._at) * self._rate) - count
            self._at = now
            debt = -self._tokens / self._rate
        return not (self._clock.wait(stop, debt) if debt > 0 else stop.is_set())
