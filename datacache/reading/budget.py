"""
How much memory fetches may take, and how many there may be.

A fetch asks for its share before it begins. Readers who wait for bytes are urgent: they are
admitted first come, first served. Fetches ahead of readers and load jobs wait behind them, and
leave one request and an eighth of the memory free, so that a reader who comes later need not wait
for one of theirs to end. A fetch larger than the whole budget is admitted when it is alone.

Bytes that no tier had room for stay accounted while they are kept for the next read. They are not
in anybody's way: when a fetch waits for memory, `reclaim` is asked to give them up.
"""

import threading
from collections import deque
from collections.abc import Callable

from datacache.errors import Unavailable

TRANSIENT = 2
"""What a request takes while it runs, in multiples of its length: obstore collects the chunks of an
answer and then joins them, so both are there for a moment."""


class Grant:
    """Leave to make one request. Whoever has it lets go of it exactly once: `release`, or `keep`."""

    __slots__ = ("_budget", "_slot", "amount")

    def __init__(self, budget: "Budget", amount: int) -> None:
        self._budget, self.amount, self._slot = budget, amount, True

    def arrived(self, length: int) -> None:
        """The request is over: only its `length` bytes are still held."""
        self._budget._give(self.amount - length, slot=True)
        self.amount, self._slot = length, False

    def release(self) -> None:
        """Nothing is held any more."""
        self._budget._give(self.amount, slot=self._slot)


class _Waiter:
    __slots__ = ("admitted", "amount", "ready", "refused")

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.admitted = self.refused = False
        self.ready = threading.Event()


class Budget:
    """`memory` bytes and `slots` requests.

    `reclaim(shortfall, force)` gives up kept bytes, about `shortfall` of them, and returns how many
    it gave up. Without `force` it gives up only what has been read to its end.
    """

    def __init__(self, memory: int, slots: int, reclaim: Callable[[int, bool], int]) -> None:
        self._memory, self._slots, self._reclaim = memory, slots, reclaim
        # Everything below is guarded by _lock. Invariant: after each change that frees something or
        # makes it reclaimable, `settle` runs, so nobody waits for what is there.
        self._lock = threading.Lock()
        self._used = 0
        self._peak = 0
        self._running = 0
        self._urgent: deque[_Waiter] = deque()
        self._patient: deque[_Waiter] = deque()
        self._closed = False

    def __repr__(self) -> str:
        waiting = len(self._urgent) + len(self._patient)
        return (
            f"<Budget {self._used} of {self._memory} bytes, {self._running} of {self._slots} requests,"
            f" {waiting} waiting>"
        )

    @property
    def used(self) -> int:
        return self._used

    @property
    def peak(self) -> int:
        """The most that was ever in use at once."""
        return self._peak

    @property
    def running(self) -> int:
        """Requests under way."""
        return self._running

    @property
    def waiting(self) -> bool:
        """Whether anyone waits; a hint, read without the lock."""
        return bool(self._urgent or self._patient)

    def acquire(self, length: int, *, urgent: bool) -> Grant:
        """Wait for leave to request `length` bytes. Raises Unavailable when the budget is closed."""
        amount = TRANSIENT * length
        with self._lock:
            if self._closed:
                raise Unavailable("the reader is closing")
            queue = self._urgent if urgent else self._patient
            if not self._urgent and not (queue or self._lacks(amount, urgent=urgent)):
                self._take(amount)
                return Grant(self, amount)
            waiter = _Waiter(amount)
            queue.append(waiter)
        try:
            self.settle()
            waiter.ready.wait()
        except BaseException:  # an interrupt: what was given meanwhile goes back
            with self._lock:
                if waiter in queue:
                    queue.remove(waiter)
                elif waiter.admitted:
                    self._used -= amount
                    self._running -= 1
            self.settle()
            raise
        if waiter.refused:
            raise Unavailable("the reader is closing")
        return Grant(self, amount)

    def forget(self, length: int) -> None:
        """Kept bytes were given up without being asked for."""
        self._give(length, slot=False)

    def settle(self) -> None:
        """Admit whoever can be; called after bytes became free, or reclaimable."""
        while True:
            with self._lock:
                self._admit()
                shortfall, force = self._shortfall()
            if shortfall <= 0:
                return
            freed = self._reclaim(shortfall, force)
            if freed <= 0:
                return
            with self._lock:
                self._used -= freed

    def close(self) -> None:
        """Refuse who waits and who comes. What was granted stays so until it is released."""
        with self._lock:
            self._closed = True
            for queue in (self._urgent, self._patient):
                while queue:
                    waiter = queue.popleft()
                    waiter.refused = True
                    waiter.ready.set()

    def _give(self, amount: int, *, slot: bool) -> None:
        with self._lock:
            self._used -= amount
            self._running -= slot
            idle = not (self._urgent or self._patient)
        if not idle:
            self.settle()

    def _take(self, amount: int) -> None:
        self._used += amount
        self._running += 1
        self._peak = max(self._peak, self._used)

    def _room(self, *, urgent: bool) -> tuple[int, int]:
        """Bytes and requests that may be in use."""
        if urgent:
            return self._memory, self._slots
        return self._memory - self._memory // 8, max(1, self._slots - 1)

    def _lacks(self, amount: int, *, urgent: bool) -> bool:
        memory, slots = self._room(urgent=urgent)
        return self._running >= slots or (self._used > 0 and self._used + amount > memory)

    def _admit(self) -> None:
        for queue, urgent in ((self._urgent, True), (self._patient, False)):
            while queue and not self._lacks(queue[0].amount, urgent=urgent):
                waiter = queue.popleft()
                self._take(waiter.amount)
                waiter.admitted = True
                waiter.ready.set()
            if queue:  # nobody overtakes, and nobody passes the urgent
                return

    def _shortfall(self) -> tuple[int, bool]:
        """Bytes that the next to be admitted lacks, and whether unread bytes are to go for it: for a
        reader who waits, and where nothing under way will make room."""
        urgent = bool(self._urgent)
        queue = self._urgent or self._patient
        if not queue:
            return 0, False
        memory, slots = self._room(urgent=urgent)
        if self._running >= slots:
            return 0, False
        return min(self._used, self._used + queue[0].amount - memory), urgent or self._running == 0
