"""
What the node service needs of the node: mounts of data sets, and bind mounts of them.

Nothing here waits for a data set that hangs: what needs its answer has a time, in seconds, and raises
TookTooLong or MountError after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Mounted:
    """What is mounted on a directory."""

    ours: bool
    """Whether it is a data set, by us. All else is only known not to be."""
    device: str
    """The same for a data set's mount and all bind mounts of it, and for no other mount that is there."""
    read_only: bool


@dataclass(frozen=True)
class Usage:
    """What statvfs(3) says, in bytes and files."""

    total: int
    free: int
    available: int
    files: int
    files_free: int


class Mounter(Protocol):
    """The node's mounts. Safe for calls from several threads for different directories."""

    def at(self, directory: str) -> Mounted | None:
        """The topmost mount on `directory`."""

    def show(
        self, directory: str, tree: Mapping[str, object], secrets: Mapping[str, str], *, within: float
    ) -> None:
        """Mount the data set of the settings `tree`, keys of a datacache.yaml, on `directory`; return when it
        answers. One that is mounted there already is left as it is; one whose daemon is gone is mounted anew.

        `secrets` are variables for the store's client. Raises SettingError, MountError, TookTooLong; then
        nothing is mounted that was not.
        """

    def owed(self, directory: str) -> str:
        """What was written to the data set on `directory` and is not in its bucket yet, as words; empty when
        that is nothing, or when it does not answer: then what was written lies in its landing zone."""

    def take_off(self, directory: str, *, within: float) -> None:
        """Unmount the data set on `directory`, and end its daemon. If it hangs, its connection is aborted:
        whoever waits for it gets an error. Raises VolumeInUse while somebody else has it open. Idempotent."""

    def binds(self, directory: str) -> list[str]:
        """Other places at which the data set on `directory` is mounted."""

    def bind(self, source: str, target: str, *, read_only: bool) -> None:
        """Make the directory `target` if need be, and show there what is mounted on `source`. It is never
        there otherwise than `read_only` says."""

    def unbind(self, target: str) -> None:
        """Take off what is ours on `target`, whoever has it open, and remove the directory. Idempotent."""

    def usage(self, directory: str) -> Usage:
        """How full the data set on `directory` is. Raises MountError when it does not say."""


class DatasetMounter(Protocol):
    """The node's mounts of Datasets' volumes. Safe for calls from several threads for different Datasets."""

    def expect(self, uid: str) -> None:
        """A volume of the Dataset was staged by a process before us: let its worker come. Raises
        MountError."""

    def show(self, uid: str, directory: str, *, name: str, writable: bool, used: bool, within: float) -> None:
        """Have the Dataset, which people know by `name`, mounted on `directory` and served; what is there
        already stays, but one that is dead and not `used` by pods. Raises MountError, TookTooLong; then
        nothing is mounted that was not."""

    def owed(self, uid: str) -> str:
        """What was written and is not in the bucket yet, as words; empty when that is nothing, or when no
        worker is there: then what was written lies in its landing zone."""

    def take_off(self, uid: str, directory: str) -> None:
        """Abort the connection, so that nobody can hang in it, and unmount it. Idempotent. Raises
        MountError."""

    def trouble(self, uid: str, directory: str) -> str:
        """Why the mount does not answer, for people."""
