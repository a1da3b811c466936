"""
What a TARGET or a PATH on the command line means: which running worker, and which path of its data set.

A path is compared with the mounts by name, without touching them: a mount whose daemon hangs would
hang whoever looks at it.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datacache.errors import ControlError

if TYPE_CHECKING:
    from datacache.cluster.control import Control
    from datacache.cluster.registry import Registration


@dataclass(frozen=True)
class Place:
    """A path of a data set, and the worker that serves it."""

    worker: "Registration"
    path: str
    """Absolute, within the data set."""

    def control(self, *, timeout: float | None = None) -> "Control":
        """The worker, to be asked; `timeout` for questions that it answers at once."""
        from datacache.cluster import client

        return client.ControlClient(self.worker.socket, timeout=timeout or client.TIMEOUT)


def runtime() -> str:
    """Where running workers register."""
    from datacache.config.parsing import runtime_directory

    return runtime_directory(os.environ)


def state() -> str:
    """Where what is to survive a restart lies, of all data sets."""
    from datacache.config.parsing import state_directory

    return state_directory(os.environ)


def live() -> list["Registration"]:
    """All workers that run."""
    from datacache.cluster import registry

    return registry.live(runtime())


def find(target: str) -> Place | None:
    """The place that `target` names: a path in a mount, NAME:/path, the name of a data set, a URI or a
    cache directory. None when no live worker has it."""
    from datacache.cluster import registry
    from fuse import mountpoint

    directory = runtime()
    name, colon, path = target.partition(":/")
    if colon and "/" not in name and not path.startswith("/"):  # NAME:/path; a URI has "://"
        worker = registry.find(directory, name)
        return Place(worker, normal(path)) if worker else None
    if "://" not in target and (inside := _inside(target, registry.live(directory))):
        return inside
    worker = registry.find(directory, target, real=mountpoint.real)
    return Place(worker, "/") if worker else None


def place(target: str) -> Place:
    """The place that `target` names. Raises ControlError when no live worker has it."""
    found = find(target)
    if found is None:
        raise ControlError(
            f"{target}: no running mount has it; `datacache status` lists the mounts there are"
        )
    return found


def normal(path: str) -> str:
    """`path` of a data set as absolute and without empty or `.` parts; `..` stays within."""
    return os.path.normpath("/" + path.lstrip("/"))


def relative_to(mount: str, path: str) -> str | None:
    """The path within the data set of `path` under the mount point `mount`; None when it is elsewhere."""
    if path == mount:
        return "/"
    return path[len(mount) :] if mount and path.startswith(mount.rstrip("/") + "/") else None


def _inside(target: str, workers: list["Registration"]) -> Place | None:
    """The deepest mount that `target` lies in, as it is spelled or else where its links lead; of several on
    one directory the one that was mounted last: who looks there sees that one."""
    from fuse import mountpoint

    for resolve in (os.path.abspath, mountpoint.real):
        path = resolve(target)
        found = [
            Place(worker, inside)
            for worker in workers
            if (inside := relative_to(worker.mount, path)) is not None
        ]
        if found:
            return max(found, key=lambda place: (len(place.worker.mount), place.worker.started))
    return None
