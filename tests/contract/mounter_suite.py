"""
What every mounter promises (`csi.mounter.mounter`). Subclasses say how one is made, and do to a node what is
done to it from outside.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import pytest

from csi.mounter import Mounter
from datacache.errors import MountError, SettingError, VolumeInUse
from tests.conftest import AnnouncedLogs

WITHIN = 60.0


class Made(Protocol):
    """A mounter, and the node that it is on."""

    mounter: Mounter
    root: Path
    """Where all happens."""

    def tree(self, *, rw: bool = False) -> dict[str, object]:
        """The settings of a data set that can be mounted."""

    def exists(self, directory: Path) -> bool:
        """Whether there is such a directory on the node."""

    def foreign(self, directory: Path) -> AbstractContextManager[None]:
        """Something else, mounted on `directory`."""

    def opened(self, directory: Path) -> AbstractContextManager[None]:
        """Something of the data set on `directory` is open."""

    def kill(self, directory: Path) -> None:
        """End all that is behind the mount on `directory`, which stays."""


class MounterContract:
    """Run against every mounter."""

    @pytest.fixture
    def made(self) -> Made:
        raise NotImplementedError

    @pytest.fixture
    def staging(self, made: Made) -> Path:
        """A directory on which a data set is mounted."""
        directory = made.root / "staging"
        made.mounter.show(str(directory), made.tree(), {}, within=WITHIN)
        return directory

    def test_what_is_mounted_is_seen(self, made: Made, staging: Path) -> None:
        """Ours, and not ours, and nothing."""
        shown = made.mounter.at(str(staging))
        assert shown is not None
        assert shown.ours
        assert shown.read_only
        assert made.mounter.at(str(made.root / "nothing")) is None
        with made.foreign(made.root / "foreign"):
            there = made.mounter.at(str(made.root / "foreign"))
            assert there is not None
            assert not there.ours
        assert made.mounter.at(str(made.root / "foreign")) is None

    def test_a_data_set_is_mounted_once(self, made: Made, staging: Path) -> None:
        """However often it is asked for."""
        before = made.mounter.at(str(staging))
        made.mounter.show(str(staging), made.tree(), {}, within=WITHIN)
        assert made.mounter.at(str(staging)) == before
        made.mounter.take_off(str(staging), within=WITHIN)
        assert made.mounter.at(str(staging)) is None

    def test_one_that_cannot_be_mounted_leaves_nothing(self, made: Made) -> None:
        """And says what is wrong."""
        directory = str(made.root / "staging")
        with pytest.raises(SettingError, match="nosuchscheme"):
            made.mounter.show(directory, {**made.tree(), "uri": "nosuchscheme://x"}, {}, within=WITHIN)
        assert made.mounter.at(directory) is None

    def test_a_bind_mount_shows_the_same(self, made: Made, staging: Path) -> None:
        """At a directory that is made for it, and is removed with it."""
        source, target = made.mounter.at(str(staging)), made.root / "target"
        assert not made.exists(target)
        assert made.mounter.binds(str(staging)) == []
        made.mounter.bind(str(staging), str(target), read_only=False)
        assert made.mounter.at(str(target)) == source
        assert made.mounter.binds(str(staging)) == [str(target)]
        made.mounter.unbind(str(target))
        assert made.mounter.at(str(target)) is None
        assert made.mounter.at(str(staging)) == source
        assert not made.exists(target)
        made.mounter.unbind(str(target))

    def test_a_bind_mount_is_read_only_where_it_is_asked_for(self, made: Made) -> None:
        """Each for itself; and always over what is read-only."""
        directory = str(made.root / "staging")
        made.mounter.show(directory, made.tree(rw=True), {}, within=WITHIN)
        for name, read_only in (("a", True), ("b", False)):
            target = str(made.root / name)
            made.mounter.bind(directory, target, read_only=read_only)
            there = made.mounter.at(target)
            assert there is not None
            assert there.read_only is read_only
            made.mounter.unbind(target)

    def test_only_a_data_set_is_bound(self, made: Made) -> None:
        """Never a plain directory of the node."""
        target = made.root / "target"
        with pytest.raises(MountError, match="no data set is mounted there"):
            made.mounter.bind(str(made.root / "staging"), str(target), read_only=True)
        assert made.mounter.at(str(target)) is None

    def test_a_bind_mount_goes_although_it_is_in_use(self, made: Made, staging: Path) -> None:
        """A pod's end waits for nobody."""
        target = made.root / "target"
        made.mounter.bind(str(staging), str(target), read_only=True)
        with made.opened(target):
            made.mounter.unbind(str(target))
            assert not made.exists(target)

    def test_a_mount_that_is_in_use_stays(self, made: Made, staging: Path) -> None:
        """While it answers, it is somebody's."""
        with made.opened(staging), pytest.raises(VolumeInUse, match="in use"):
            made.mounter.take_off(str(staging), within=WITHIN)
        assert made.mounter.at(str(staging)) is not None
        made.mounter.take_off(str(staging), within=WITHIN)

    def test_a_foreign_mount_is_not_taken_off(self, made: Made) -> None:
        """Nor is the directory under it removed."""
        target = made.root / "foreign"
        with made.foreign(target):
            with pytest.raises(MountError):
                made.mounter.unbind(str(target))
            assert made.mounter.at(str(target)) is not None

    def test_a_dead_mount_goes(self, made: Made, staging: Path, logs: AnnouncedLogs) -> None:
        """With all that was bound of it; it says nothing of how full it is, and nothing that it owes."""
        logs.expect("its connection is aborted")
        target = made.root / "target"
        made.mounter.bind(str(staging), str(target), read_only=True)
        assert made.mounter.usage(str(target)).total >= 0
        made.kill(staging)
        with pytest.raises(MountError, match="answer"):
            made.mounter.usage(str(target))
        assert made.mounter.owed(str(staging)) == ""
        made.mounter.unbind(str(target))
        made.mounter.take_off(str(staging), within=WITHIN)
        assert made.mounter.at(str(staging)) is None

    def test_a_dead_mount_is_mounted_anew(self, made: Made, staging: Path) -> None:
        """By the same call that mounted it."""
        before = made.mounter.at(str(staging))
        made.kill(staging)
        made.mounter.show(str(staging), made.tree(), {}, within=WITHIN)
        assert made.mounter.at(str(staging)) is not None
        assert made.mounter.usage(str(staging)).files >= 0
        assert before is not None
        made.mounter.take_off(str(staging), within=WITHIN)
