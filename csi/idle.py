"""
Copies of a Dataset that has no worker here now: what they take, and how they are made fewer.

A cache directory has one owner at a time. As long as a worker has it, all of this is a question to that
worker (`accountant`); when nobody has, it is opened here for a moment. A worker that comes in just then is
told that it is taken, ends, and is started again: so it is never held for long.
"""

import logging
import os
import sqlite3
from dataclasses import dataclass

from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.cache.owner import MANAGED
from datacache.clock import Clock
from datacache.cluster.premises import Place
from datacache.errors import Locked
from datacache.model import GiB, MiB

log = logging.getLogger(__name__)

STEP = 1 * GiB
"""Bytes given up at most before it is looked at how long that took."""
LONG = 1.0
"""Seconds after which the rest waits for the next time, that is for what was begun."""


@dataclass(frozen=True)
class Kept:
    """What lies in the directory of a tier."""

    used: int
    entries: int
    pinned: int


def kept(place: Place, *, clock: Clock) -> Kept | None:
    """What lies there; None where somebody owns it, or it cannot be looked at."""
    return shrink(place, None, clock=clock)


def shrink(place: Place, room: int | None, *, clock: Clock) -> Kept | None:
    """Give up copies until they take `room` bytes at most (None: all may stay), or as many as can be in a
    moment: what was opened longest ago first, and nothing that is pinned or read. What is left."""
    if not os.path.isdir(os.path.join(place.path, MANAGED)):
        return Kept(0, 0, 0)
    # No data set is at work here: all that lies there is idle.
    rules = Rules(place.name, max(place.quota, 1), 4 * MiB)
    try:
        tier = DirectoryTier(
            place.path, rules, owner=Owner(os.getpid(), "", ""), clock=clock, keeper=False
        )  # fmt: skip
    except Locked:
        return None
    except (OSError, sqlite3.Error) as error:
        log.warning("the copies in %s cannot be looked at: %s", place.path, error)
        return None
    try:
        begun = clock.monotonic()
        found = tier.stats()[0]
        while room is not None and found.used > room and clock.monotonic() - begun < LONG:
            before = found.used
            tier.lease(max(room, before - STEP), 0, float("inf"))
            tier.upkeep()
            found = tier.stats()[0]
            if found.used >= before:
                break
        return None if found.state == "broken" else Kept(found.used, found.entries, found.pinned)
    finally:
        tier.close()
