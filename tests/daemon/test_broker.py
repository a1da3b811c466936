"""What a broker decides without a mount: which upgrades can be, what a daemon is handed, what is answered."""

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from datacache.config.settings import IO, Consistency, IndexSettings, MountSettings, Settings, WritingSettings
from datacache.errors import MountError, SettingError
from datacache.model import Dataset, MountPoint
from fuse import broker, mountpoint
from fuse.broker import Broker, Handover
from fuse.connection import Agreement
from tests.conftest import AnnouncedLogs

AGREED = Agreement(minor=40, capabilities=1 << 40, passthrough=True, stateless=False, cached_directories=True)
PATIENCE = 30.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        dataset=Dataset("test", (MountPoint("file:///data"),)),
        state=str(tmp_path / "state"),
        runtime=str(tmp_path),
        mount=MountSettings(directory="/mnt/test", driver="native", io=IO.SERVED),
    )


@pytest.fixture
def device() -> Iterator[int]:
    """In the place of the kernel: a descriptor that says nothing."""
    ours, theirs = os.pipe()
    yield ours
    for end in (ours, theirs):
        os.close(end)


def test_what_a_daemon_is_handed_arrives() -> None:
    """In an argument, as one line."""
    handed = Handover(7, AGREED, 3, 4711, "0", "abc")
    assert Handover.load(handed.dump()) == handed
    assert "\n" not in handed.dump()


def test_what_does_not_change_the_mount_may_be_upgraded(settings: Settings) -> None:
    """Everything but what FIXED, and the names of what is shown, say."""
    other = replace(
        settings,
        mount=replace(settings.mount, max_threads=3, xattr=True, entry_timeout=1.0),
        log_level="debug",
        dataset=replace(settings.dataset, mounts=(MountPoint("file:///data", options={"region": "x"}),)),
    )
    broker._check_upgrade(settings, other)
    broker._check_upgrade(settings, settings)
    for now, then, name in (
        (WritingSettings(), WritingSettings(enabled=True), "rw"),
        (WritingSettings(landing="/one"), WritingSettings(landing="/two"), "landing"),
    ):
        with pytest.raises(MountError, match=f"cannot change {name}; unmount"):
            broker._check_upgrade(replace(settings, writing=now), replace(settings, writing=then))
    for name in broker.FIXED:
        changed = replace(settings.mount, **{name: not getattr(settings.mount, name)})
        with pytest.raises(MountError, match=f"cannot change {name}; unmount"):
            broker._check_upgrade(settings, replace(settings, mount=changed))


def test_what_the_kernel_was_told_for_ever_cannot_be_taken_back(settings: Settings) -> None:
    """A mount without handles that believes for ever asks nothing any more: it would never see a change. Nor
    may several processes answer where only one can, which `mount` refuses, too."""
    for then in (IndexSettings(), IndexSettings(ttl=5.0)):
        for now in (IndexSettings(consistency=Consistency.IMMUTABLE), IndexSettings(ttl=float("inf"))):
            was, wanted = replace(settings, index=now), replace(settings, index=then)
            with pytest.raises(MountError, match="cannot change consistency; unmount"):
                broker._check_upgrade(was, wanted, stateless=True)
            broker._check_upgrade(was, wanted)
            broker._check_upgrade(wanted, was, stateless=True)
    several = replace(settings, mount=replace(settings.mount, processes=2))
    for stateless in (False, True):
        with pytest.raises(SettingError, match="processes: 2 will not do"):
            broker._check_upgrade(settings, several, stateless=stateless)
    pinned = replace(several, index=IndexSettings(snapshot="v1"))
    broker._check_upgrade(pinned, pinned, stateless=True)


def test_a_first_daemon_that_fails_says_it_through_the_broker() -> None:
    """Whoever asked for the mount sees the daemon's own words and exit code."""
    assert isinstance(wrong := broker._failure({"error": "--metrics: taken", "exit": 2}, 2), SettingError)
    assert str(wrong) == "--metrics: taken"
    assert str(broker._failure({"error": "in use", "exit": 1}, 1)) == "in use"
    assert "SIGKILL" in str(broker._failure({}, -9))
    assert "exit code 3" in str(broker._failure({}, 3))


def test_a_program_that_cannot_be_started_is_a_failure_and_not_the_end_of_the_broker(
    settings: Settings, device: int, logs: AnnouncedLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter may be replaced under a mount, or the machine be out of processes: counted as a
    daemon that died young, and given up after as many."""
    logs.expect("it cannot be started")
    control = str(Path(settings.runtime) / "1-2-3.sock")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    first = Handover(device, AGREED, 0, os.getpid(), "")
    try_it = Broker(settings, first, control=control, take_off=None, mounted=lambda: None)
    try_it._start("")
    assert isinstance(try_it._failure, MountError)
    assert try_it._over
    begun = Broker(settings, first, control=control, take_off=None, mounted=lambda: None)
    begun._served = True
    for count in range(1, broker.TRIES):
        begun._start("")
        assert begun._deaths == count
        assert begun._daemon is None
        assert not begun._given_up
    assert begun._handover.life == broker.TRIES - 1
    for one in (try_it, begun):
        one._events.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b'{"error": "another upgrade is under way"}\n', "another upgrade is under way"),
        (b'{"ok": tr', "does not answer|did not arrive whole"),
        (b"", "did not arrive whole"),
        (b"no JSON\n", "does not answer"),
    ],
)
def test_an_upgrade_that_is_not_answered_is_an_error(tmp_path: Path, answer: bytes, says: str) -> None:
    """In one line, whatever the other side says or leaves unsaid."""
    control = str(tmp_path / "1-2-3.sock")
    with pytest.raises(MountError, match=r"no broker.*: unmount, and mount anew$"):
        broker.ask_for_upgrade(control, None, timeout=1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "1-2-3.broker"))
        listener.listen()

        def reply() -> None:
            peer, _ = listener.accept()
            with peer:
                assert json.loads(peer.recv(1 << 16))["settings"] is None
                peer.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(MountError, match=says):
            broker.ask_for_upgrade(control, None, timeout=PATIENCE)
        thread.join()


def test_a_landing_zone_is_not_mounted_over(settings: Settings) -> None:
    """It is one of the directories that are in use, where it is chosen and something is written."""
    before = mountpoint.places(settings)
    assert settings.state in before
    writing = WritingSettings(enabled=True, landing="/landing")
    assert mountpoint.places(replace(settings, writing=writing)) == {**before, "/landing": "--landing"}
    assert mountpoint.places(replace(settings, writing=replace(writing, enabled=False))) == before
