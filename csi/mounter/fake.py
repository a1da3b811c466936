"""
A mounter without a kernel, for tests: a node's mounts as a table.

`Node` is what outlives the driver (kernel, brokers, directories); a `FakeMounter` is one driver's hand on it.
It keeps to the contract of `mounter.Mounter`, and fails, hangs and dies where it is told to.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from csi.mounter.mounter import Mounted, Usage
from datacache.errors import MountError, SettingError, TookTooLong, VolumeInUse

_SCHEMES = ("s3", "file")


@dataclass(eq=False)
class DataSet:
    """A data set that is mounted, once, and bound to other places."""

    device: str
    tree: dict[str, object]
    secrets: dict[str, str]
    alive: bool = True
    """Whether a daemon answers for it."""
    open: bool = False
    """Whether somebody has something of it open, where it is mounted first."""
    owed: str = ""


@dataclass
class Place:
    """What is mounted on a directory; `shown` is None for what is not ours."""

    shown: DataSet | None
    read_only: bool
    bound: bool = False


@dataclass
class Node:
    """What a node has beside the driver."""

    mounts: dict[str, Place] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)
    aborted: list[str] = field(default_factory=list)
    """Directories whose connection has been aborted."""
    workers: dict[str, str] = field(default_factory=dict)
    """Workers of Datasets that run, by uid, and what each says that it owes."""
    devices: "itertools.count[int]" = field(default_factory=lambda: itertools.count(40))


class FakeMounter:
    """A driver's hand on `node`. `step` is called between any two things that it does: it may raise."""

    def __init__(self, node: Node, *, step: Callable[[], None] = lambda: None) -> None:
        self.node, self._step = node, step
        self.refuses: Exception | None = None
        """What the next `show` raises."""

    def __repr__(self) -> str:
        return f"<FakeMounter of {sorted(self.node.mounts)}>"

    def at(self, directory: str) -> Mounted | None:
        place = self.node.mounts.get(directory)
        if place is None:
            return None
        if place.shown is None:
            return Mounted(False, "8:1", place.read_only)
        return Mounted(True, place.shown.device, place.read_only)

    def show(
        self, directory: str, tree: Mapping[str, object], secrets: Mapping[str, str], *, within: float
    ) -> None:
        self._step()
        if self.refuses is not None:
            refused, self.refuses = self.refuses, None
            raise refused
        scheme, _, _ = str(tree["uri"][0] if isinstance(tree["uri"], list) else tree["uri"]).partition("://")
        if scheme not in _SCHEMES:
            raise SettingError("uri", scheme, f"one of {', '.join(_SCHEMES)}")
        there = self.node.mounts.get(directory)
        if there is not None and there.shown is not None and there.shown.alive:
            return
        shown = DataSet(f"0:{next(self.node.devices)}", dict(tree), dict(secrets))
        self.node.mounts[directory] = Place(shown, read_only=tree.get("rw") != "true")
        self._step()

    def owed(self, directory: str) -> str:
        shown = self._shown(directory)
        return shown.owed if shown is not None and shown.alive else ""

    def take_off(self, directory: str, *, within: float) -> None:
        self._step()
        shown = self._shown(directory)
        if shown is None:
            return
        if not shown.alive:
            self.node.aborted.append(directory)
        elif shown.open:
            raise VolumeInUse(f"{directory} is in use")
        del self.node.mounts[directory]
        self._step()

    def binds(self, directory: str) -> list[str]:
        shown = self._shown(directory)
        return [
            other for other, place in self.node.mounts.items()
            if other != directory and shown is not None and place.shown is shown
        ]  # fmt: skip

    def bind(self, source: str, target: str, *, read_only: bool) -> None:
        self._step()
        self.node.directories.add(target)
        self._step()
        place = self.node.mounts.get(source)
        if place is None:
            raise MountError(f"cannot bind {source} to {target}: no data set is mounted there")
        self.node.mounts[target] = Place(place.shown, read_only or place.read_only, bound=True)
        self._step()

    def unbind(self, target: str) -> None:
        self._step()
        if self._shown(target) is not None:
            del self.node.mounts[target]
        self._step()
        if target in self.node.mounts:
            raise MountError(f"cannot remove {target}: busy")
        self.node.directories.discard(target)
        self._step()

    def usage(self, directory: str) -> Usage:
        shown = self._shown(directory)
        if shown is None or not shown.alive:
            raise MountError(f"{directory} does not answer")
        return Usage(total=1000, free=400, available=300, files=10, files_free=4)

    def _shown(self, directory: str) -> DataSet | None:
        place = self.node.mounts.get(directory)
        return place.shown if place is not None else None


class FakeDatasetMounter:
    """A driver's hand on the volumes of Datasets on `node`, which has workers or not."""

    def __init__(self, node: Node, *, step: Callable[[], None] = lambda: None) -> None:
        self.node, self._step = node, step
        self.expected: list[str] = []
        self.refuses = ""
        """The uid of a Dataset whose worker cannot be let come."""

    def __repr__(self) -> str:
        return f"<FakeDatasetMounter of {sorted(self.node.workers)}>"

    def expect(self, uid: str) -> None:
        if uid == self.refuses:
            raise MountError("no room")
        self.expected.append(uid)

    def show(self, uid: str, directory: str, *, name: str, writable: bool, used: bool, within: float) -> None:
        self._step()
        there = self.node.mounts.get(directory)
        if there is not None and there.shown is not None and not there.shown.alive:
            if used:
                raise MountError(self.trouble(uid, directory))
            self.take_off(uid, directory)
            there = None
        if there is None:
            shown = DataSet(f"0:{next(self.node.devices)}", {"dataset": name}, {})
            self.node.mounts[directory] = Place(shown, read_only=not writable)
        self._step()
        if uid not in self.node.workers:
            if there is None:
                self.take_off(uid, directory)
            raise TookTooLong(f"no worker of Dataset {name} has come")

    def owed(self, uid: str) -> str:
        return self.node.workers.get(uid, "")

    def take_off(self, uid: str, directory: str) -> None:
        self._step()
        if self.node.mounts.pop(directory, None) is not None:
            self.node.aborted.append(directory)
        self._step()

    def trouble(self, uid: str, directory: str) -> str:
        return "have ended at the same time" if uid in self.node.workers else "no worker of the Dataset"
