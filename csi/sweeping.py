"""
Directories of Datasets that are no more.

Nothing goes because something was not heard: a Dataset is gone when the API has said twice, `APART` seconds
apart, that just this object is not there (`Verdict`). And nothing goes that anybody may still want: not while
a worker answers or owns a directory, not while something else is mounted below one, and no landing zone that
holds what its bucket does not have, whatever its Dataset's owner gave up: a person may still `datacache
recover` it. The note that says whose directories these are goes last, so that a kill at any line is gone on
from.

`obstacle` and `sweep` act on the node; when they are called is for `housekeeping`.
"""

import logging
import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from csi.residents import UID, Resident
from csi.tmpfs import Memory
from datacache.cache import owner as owning
from datacache.cache.limits import mount_points
from datacache.cache.owner import MANAGED as CACHE
from datacache.cache.owner import Owner
from datacache.cluster import premises
from datacache.errors import Locked
from datacache.writing.landing import MANAGED as LANDING
from datacache.writing.opening import what_is_owed

log = logging.getLogger(__name__)

APART = 30.0
"""Seconds between two answers that a Dataset is gone, at least."""


@dataclass
class Verdict:
    """Whether a Dataset is gone, from what was heard of it so far."""

    since: float | None = None
    """When it was first said to be gone, with nothing else said since."""

    def hear(self, gone: bool | None, now: float) -> bool:
        """Whether it is gone for good. `gone`: what was heard at `now`; None: there was no answer, which says
        nothing, and does not make the next one the second."""
        if gone is False:
            self.since = None
        elif gone and self.since is None:
            self.since = now
        return gone is True and self.since is not None and now - self.since >= APART


def obstacle(resident: Resident, memory: Memory) -> str:
    """Why the directories of a Dataset that is gone have to stay, in words; empty: they may go."""
    own = {home for home in resident.homes if memory.size(home) is not None}
    for point in mount_points():
        for directory in (*resident.homes, resident.state, resident.run):
            if (point == directory and point not in own) or point.startswith(f"{directory}/"):
                return f"something is mounted on {point}"
    if resident.landing and (owed := what_is_owed(resident.landing)):
        hint = "`datacache recover` uploads them, or remove it by hand"
        return f"{resident.landing} holds {owed} that are not in the bucket: {hint}"
    return ""


def sweep(resident: Resident, memory: Memory) -> str:
    """Remove all directories of a Dataset that is gone, if nothing is in the way; why they stay, or empty.

    It holds the locks of a worker meanwhile, so that none begins in what is being removed. Raises OSError and
    MountError: then what is left goes the next time.
    """
    with ExitStack() as locks, ExitStack() as in_memory:
        try:
            for place in resident.places:
                _own(in_memory if place.mounted else locks, place.path, CACHE)
            if resident.landing:
                _own(locks, resident.landing, LANDING)
        except Locked as taken:
            return f"{taken.directory} is in use"
        if why := obstacle(resident, memory):
            return why
        in_memory.close()  # those locks lie on what is taken off, and it is not while one is open
        for home in resident.homes:
            if memory.size(home) is not None:
                memory.unmount(home)
        for home in resident.homes:
            _remove_home(home, resident.uid)
        _remove_home(resident.run, resident.uid)
        with suppress(FileNotFoundError):
            for name in os.listdir(resident.state):
                if name != premises.NAME:
                    _remove(os.path.join(resident.state, name))
        _remove_home(resident.state, resident.uid)
    log.info("Dataset %s/%s (%s) is no more: its directories were removed", *resident.key, resident.uid)
    return ""


def _own(locks: ExitStack, directory: str, managed: str) -> None:
    """Own a directory as a worker would, if it is there. Raises Locked."""
    try:
        at = os.open(
            os.path.join(directory, managed), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        locks.callback(owning.take_lock(directory, at, Owner(os.getpid(), "", "")).close)
    finally:
        os.close(at)


def _remove_home(path: str, uid: str) -> None:
    if os.path.basename(path) != uid or not UID.fullmatch(uid):
        raise OSError(f"{path} is not a directory of Dataset {uid}")
    _remove(path)


def _remove(path: str) -> None:
    """Remove a directory with all that is in it, or a file; following no symbolic link. Idempotent."""
    try:
        parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    name = os.path.basename(path)
    try:
        with suppress(FileNotFoundError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(name, dir_fd=parent)
            else:
                os.unlink(name, dir_fd=parent)
    finally:
        os.close(parent)
