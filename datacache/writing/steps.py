"""
Names for the places where a process may die.

Every durable step of the write path calls `step` before and after it. That does nothing, unless a
test has armed it: then the process dies there, or looks as if it did, and the test sees what the
next one makes of what is left.
"""

import os
import signal
from collections.abc import Callable

_armed: Callable[[str], None] | None = None


def step(name: str) -> None:
    """Here a process may die."""
    if _armed is not None:
        _armed(name)


def arm(at: Callable[[str], None] | None) -> None:
    """Call `at` at each step from now on; None: no more. For tests."""
    global _armed
    _armed = at


def die_at(wanted: str, *, nth: int = 1) -> None:
    """Kill this process at the `nth` step named `wanted`. For tests."""
    left = nth

    def at(name: str) -> None:
        nonlocal left
        if name == wanted:
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    arm(at)
