"""
The Datasets that live on this node: those whose workers have left `premises.json` in their state directories.

A worker's word is believed as far as it can do no harm: a directory counts only where the controller puts it,
`<tier root>/…/UID/cache` and `…/UID/landing`, below a root that the operator allows, with no symbolic link on
the way. What else it says is left out, and said once.
"""

import logging
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datacache.cluster import premises
from datacache.cluster.premises import Place, Premises
from datacache.config.keys import OBJECT
from datacache.kube.release import TIER_ROOTS, Key, Release

log = logging.getLogger(__name__)

MOST = 256
"""Datasets of a node that are looked at: four times as many as may be mounted, since their copies stay."""
UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
"""What the API names an object by: nothing else is a directory of a Dataset."""


@dataclass(frozen=True)
class Roots:
    """Where on a node data of Datasets may lie: what the controller was told, too."""

    state: str = Release.state_dir
    run: str = Release.run_dir
    tiers: Sequence[str] = TIER_ROOTS


@dataclass(frozen=True)
class Resident:
    """One Dataset on this node."""

    uid: str
    key: Key
    """Its namespace and name."""
    state: str
    run: str
    places: tuple[Place, ...]
    """Its tiers, as far as they lie where they may."""
    landing: str
    priority: int

    @property
    def homes(self) -> tuple[str, ...]:
        """The directories in which its tiers lie, each named after its uid, and nobody else's."""
        below = [os.path.dirname(place.path) for place in self.places]
        beside = [os.path.dirname(self.landing)] if self.landing and not self._in_state else []
        return tuple(dict.fromkeys(below + beside))

    @property
    def _in_state(self) -> bool:
        return os.path.dirname(self.landing) == self.state


class Register:
    """Reads them. Not thread-safe: one for each thread that wants to know."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._told: set[tuple[str, str]] = set()

    def __repr__(self) -> str:
        return f"<Register {self._roots.state}>"

    def residents(self) -> list[Resident]:
        """All that there are, by uid."""
        try:
            names = sorted(name for name in os.listdir(self._roots.state) if UID.fullmatch(name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = (self._resident(name) for name in names)
        return [resident for resident in found if resident is not None][:MOST]

    def _resident(self, uid: str) -> Resident | None:
        state = os.path.join(self._roots.state, uid)
        try:
            os.stat(os.path.join(state, premises.NAME), follow_symlinks=False)
            if not stat.S_ISDIR(os.lstat(state).st_mode):
                return None
        except OSError:
            return None
        said = premises.read(state)
        if said is None or not _is_object(said.object):
            self._tell(uid, premises.NAME, "it is not one")
            return None
        namespace, _, name = said.object.partition("/")
        return Resident(
            uid=uid, key=Key(namespace, name), state=state, run=os.path.join(self._roots.run, uid),
            places=self._places(uid, said), landing=self._landing(uid, said.landing, state),
            priority=max(-1000, min(1000, said.priority)),
        )  # fmt: skip

    def _places(self, uid: str, said: Premises) -> tuple[Place, ...]:
        found = []
        for place in said.places[:8]:
            home = os.path.dirname(place.path)
            if place.quota > 0 and self._may(uid, home) and os.path.basename(place.path) == "cache":
                found.append(replace(place, mounted=place.mounted and place.medium == "mem"))
            else:
                self._tell(uid, place.path, "no tier of it may lie there")
        return tuple(found)

    def _landing(self, uid: str, path: str, state: str) -> str:
        if not path:
            return ""
        home = os.path.dirname(path)
        if os.path.basename(path) == "landing" and (home == state or self._may(uid, home)):
            return path
        self._tell(uid, path, "its landing zone may not lie there")
        return ""

    def _may(self, uid: str, home: str) -> bool:
        """Whether `home` is a directory of this Dataset: named after it, below a root, and nowhere else."""
        if home != os.path.normpath(home) or os.path.basename(home) != uid:
            return False
        roots = [os.path.normpath(root) for root in self._roots.tiers]
        below = any(home.startswith(root.rstrip("/") + "/") for root in roots)
        return below and os.path.realpath(home) == home

    def _tell(self, uid: str, what: str, why: str) -> None:
        if (uid, what) not in self._told:
            if len(self._told) < MOST:
                self._told.add((uid, what))
            log.warning("Dataset %s: %s is left out: %s", uid, what, why)


def _is_object(text: str) -> bool:
    try:
        OBJECT.read(text)
    except ValueError:
        return False
    return True
