"""
The oracle: proves that a cache directory holds what it says, or repairs it.

Every block is held against its checksum, every row against its file, every file against its row and
its object's size, every sum against what it sums up. Works offline (`verify`, which owns the
directory meanwhile) and on a tier in use (`verify_tier`).
"""

import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.cache.owner import MANAGED
from datacache.clock import SystemClock
from datacache.errors import SettingError, TierBroken

Progress = Callable[[int, int], None]
"""Called with the bytes verified so far, and those to verify in all."""
_PROBLEMS = 1000
"""Problems described at most; the counts go on."""


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, what was wrong with it, and how much of that was repaired."""

    entries: int = 0
    blocks: int = 0
    bytes: int = 0
    damaged: int = 0
    """Blocks that do not match their checksum, or that overlap."""
    missing: int = 0
    """Entries without a file."""
    orphans: int = 0
    """Files without an entry."""
    overlong: int = 0
    """Files longer than their object."""
    miscounted: int = 0
    """Entries whose recorded size is not what their blocks add up to."""
    repaired: int = 0
    """Of all these. Repairing a copy is dropping it: the store has the bytes."""
    problems: tuple[str, ...] = field(default=())
    """The first 1,000, one sentence each; a tier that could not be looked at is one, too."""

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems

    def __add__(self, other: "VerifyReport") -> "VerifyReport":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        sums["problems"] = sums["problems"][:_PROBLEMS]
        return VerifyReport(**sums)


def verify(directory: str, *, repair: bool, progress: Progress | None = None) -> VerifyReport:
    """Verify the cache in `directory` while nobody uses it. Raises Locked, SettingError, TierBroken.

    `directory` is what was given to --cache; what is ours in it is `datacache-cache`.
    """
    if not os.path.isdir(os.path.join(directory, MANAGED)):
        raise SettingError("directory", directory, f"a cache directory (one with {MANAGED} in it)")
    # No rule of these evicts anything, and without a keeper nothing happens but what we do.
    rules = Rules(directory, quota=1 << 62, block_size=1 << 62, reserve=0.0)
    owner = Owner(os.getpid(), "", "")
    try:
        tier = DirectoryTier(directory, rules, owner=owner, clock=SystemClock(), keeper=False)
    except (OSError, sqlite3.Error) as error:
        raise TierBroken(f"cache directory {directory} cannot be read: {error}") from error
    try:
        return verify_tier(tier, repair=repair, progress=progress)
    finally:
        tier.close()


def verify_tier(tier: DirectoryTier, *, repair: bool, progress: Progress | None = None) -> VerifyReport:
    """Verify a tier that may be in use. Raises TierBroken."""
    store = tier.store
    if store is None:
        raise tier.trouble(None, None)
    done, total = 0, store.figures()[0]

    def count(length: int) -> None:
        nonlocal done
        done += length
        if progress is not None:
            progress(done, max(done, total))

    report, missing = VerifyReport(), set[int]()
    try:
        for low in range(256):
            _, orphans, lost = store.survey(low, repair=repair)
            missing.update(row.id for row in lost)
            wrong = [f"{name} has no entry" for name in orphans]
            wrong += [f"{row.name} is missing" for row in lost]
            report += VerifyReport(
                orphans=len(orphans),
                missing=len(lost),
                repaired=len(wrong) if repair else 0,
                problems=tuple(wrong),
            )
        for row in store.catalogue.rows():
            if row.id in missing:
                continue  # to open it would be to drop it
            found = store.inspect(row, repair=repair, progress=count)
            report += VerifyReport(
                entries=1,
                blocks=found.blocks,
                bytes=found.bytes,
                damaged=found.damaged,
                overlong=found.overlong,
                miscounted=found.miscounted,
                repaired=found.repaired,
                problems=tuple(found.problems),
            )
    except (OSError, sqlite3.Error) as error:
        raise tier.trouble(store, error) from error
    return report
