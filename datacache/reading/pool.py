"""
The threads that fetch while nobody waits.

Started when there is work, joined at close. Readahead goes before the rest of large objects that
are being loaded. What a reader waits for is never left to this queue: the reader takes an unstarted
fetch out of it and runs it itself (see docs/concurrency.md).
"""

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

Job = Callable[[], None]

QUEUE = 4096
"""Jobs that may wait; at 8 MiB each more than any window. Beyond it work is refused, not piled up."""


class Pool:
    """Up to `size` threads that run jobs."""

    def __init__(self, size: int, *, name: str) -> None:
        self._size, self._name = size, name
        # Guards all below.
        self._changed = threading.Condition()
        self._soon: deque[Job] = deque()
        self._later: deque[Job] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def __repr__(self) -> str:
        waiting = len(self._soon) + len(self._later)
        return f"<Pool {self._name}: {len(self._threads)} threads, {self._idle} idle, {waiting} jobs waiting>"

    def offer(self, job: Job, *, later: bool = False) -> bool:
        """Run `job` when a thread is free; never blocks. False: refused, too much waits already."""
        with self._changed:
            queue = self._later if later else self._soon
            if self._closed or len(queue) >= QUEUE:
                return False
            queue.append(job)
            if self._idle >= len(self._soon) + len(self._later) or len(self._threads) >= self._size:
                self._changed.notify()
                return True
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}")
            self._threads.append(thread)
            thread.start()  # under the lock, so that `close` finds no thread that it cannot join
        return True

    def close(self) -> None:
        """Forget what waits, let what runs end, join all threads. Idempotent."""
        with self._changed:
            self._closed = True
            self._soon.clear()
            self._later.clear()
            self._changed.notify_all()
            threads = self._threads
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not (self._closed or self._soon or self._later):
                    self._changed.wait()
                self._idle -= 1
                if self._closed:
                    return
                job = (self._soon or self._later).popleft()
            try:
                job()
            except Exception:
                logger.exception("a fetch ahead of readers failed in a way that nobody foresaw")
            del job  # it holds buffers
