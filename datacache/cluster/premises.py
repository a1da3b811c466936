"""
What a worker leaves behind for its node's plugin: of which Dataset it is, and where on the node its data
lies.

One file, `premises.json` in the state directory of a worker with an `object` (docs/configuration.md), written
whole before anything else is opened, and again at each start. It outlives the worker, and a boot: by it the
plugin mounts what a tier is to lie on, shares disks, and knows whose directories these are when the Dataset
is no more. It is a worker's word: who reads it believes no path that is not where it must be.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datacache.config.settings import Settings
from datacache.errors import SettingError

NAME = "premises.json"
MOST = 1 << 16
"""Bytes of a file that are read; more is not one."""


@dataclass(frozen=True)
class Place:
    """Where one tier lies."""

    name: str
    """As in the worker's status: `ssd:/var/cache/x`."""
    medium: str
    path: str
    """Absolute."""
    quota: int
    """Bytes."""
    mounted: bool = False
    """Whether a tmpfs of that size is to be mounted on the directory above `path`."""


@dataclass(frozen=True)
class Premises:
    """All of one worker."""

    object: str
    """NAMESPACE/NAME of the Dataset."""
    places: tuple[Place, ...]
    landing: str = ""
    """Its landing zone; empty: it writes nothing."""
    priority: int = 0


def of(settings: Settings) -> Premises:
    """Those of a worker with these settings."""
    places = tuple(
        Place(f"{tier.medium}:{tier.path}", str(tier.medium), tier.path, tier.quota, tier.mounted)
        for tier in settings.cache.tiers
    )
    landing = settings.writing.landing or os.path.join(settings.state, "landing")
    return Premises(
        settings.object, places, landing if settings.writing.enabled else "", settings.cache.priority
    )


def write(settings: Settings) -> None:
    """Leave it behind, if the worker is one of an object. Raises SettingError."""
    if not settings.object:
        return
    path = os.path.join(settings.state, NAME)
    try:
        os.makedirs(settings.state, mode=0o700, exist_ok=True)
        with open(f"{path}.new", "w", encoding="ascii", opener=_private) as file:
            file.write(json.dumps(asdict(of(settings))))
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)
    except OSError as error:
        expected = f"a directory that can be written ({error.strerror})"
        raise SettingError("state", settings.state, expected) from error


def read(directory: str) -> Premises | None:
    """What lies in the state directory `directory`; None where nothing of ours does."""
    try:
        descriptor = os.open(
            os.path.join(directory, NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )
        with open(descriptor, encoding="ascii") as file:
            return _read(json.loads(file.read(MOST)))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _read(found: Mapping[str, Any]) -> Premises:
    places = tuple(
        Place(
            str(each["name"]), str(each["medium"]), str(each["path"]), int(each["quota"]),
            bool(each["mounted"]),
        )
        for each in found["places"]
    )  # fmt: skip
    return Premises(str(found["object"]), places, str(found["landing"]), int(found["priority"]))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
