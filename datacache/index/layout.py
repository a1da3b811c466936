"""
How the mount points of a data set lie in its namespace. Pure.
"""

import json
from collections.abc import Sequence
from itertools import count, pairwise

from datacache.errors import SettingError
from datacache.index import names
from datacache.index.database import NO_MOUNT, Skeleton
from datacache.index.index import ROOT
from datacache.model import Dataset
from datacache.sources.source import Source


def check_mounts(dataset: Dataset) -> None:
    """Raise SettingError for mount points that cannot be shown together.

    Equal or nested paths would have to merge two stores in one directory, and then a listing of one
    would hide what the other holds.
    """
    if not dataset.mounts:
        raise SettingError("mounts", [], "at least one mount point")
    if dataset.manifest:
        return  # its paths are those of its lines
    for mount in dataset.mounts:
        _check_path(mount.path)
    ordered = sorted(_segments(mount.path) for mount in dataset.mounts)
    for above, below in pairwise(ordered):
        if below[: len(above)] == above:
            raise SettingError(
                "mounts",
                "/" + "/".join(below),
                f"a path that is neither equal to nor below /{'/'.join(above)}, where another one is mounted",
            )


def skeleton(dataset: Dataset) -> list[Skeleton]:
    """The root, the directories above mount points and the mount points, parents first."""
    paths = [()] if dataset.manifest else [_segments(mount.path) for mount in dataset.mounts]
    found: dict[tuple[str, ...], Skeleton] = {}
    inos = count(ROOT)
    for number, path in enumerate(paths):
        for depth in range(len(path) + 1):
            at = path[:depth]
            if at not in found:
                mount = number if at == path and not dataset.manifest else NO_MOUNT
                parent = found[at[:-1]].ino if at else 0
                found[at] = Skeleton(next(inos), parent, names.to_bytes(at[-1]) if at else b"", mount)
    return list(found.values())


def made_for(dataset: Dataset, sources: Sequence[Source]) -> str:
    """What a catalogue is of, for comparison and for people. The source's URI, not the mount's, for
    that names the same objects in every process."""
    pairs = [[source.uri, mount.path] for source, mount in zip(sources, dataset.mounts, strict=True)]
    return json.dumps({"mounts": pairs} | ({"manifest": dataset.manifest} if dataset.manifest else {}))


def _segments(path: str) -> tuple[str, ...]:
    return tuple(path.strip("/").split("/")) if path != "/" else ()


def _check_path(path: str) -> None:
    segments = _segments(path)
    good = path.startswith("/") and "\0" not in path and path == "/" + "/".join(segments)
    good = good and not any(s in ("", ".", "..") for s in segments)
    if not good:
        raise SettingError(
            "mount path", path, "an absolute path without empty, '.' or '..' parts, such as /train"
        )
    if any(len(names.to_bytes(s)) > names.NAME_MAX for s in segments):
        raise SettingError("mount path", path, f"parts of at most {names.NAME_MAX} bytes each")
