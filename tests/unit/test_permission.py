"""Whether stores let us write: what they say, and what they do not."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from datacache.cli.permission import ADVICE, Permission, sinks_of
from datacache.config.settings import Settings, WritingSettings
from datacache.errors import Denied, MountError, SettingError, SourceError, Unavailable
from datacache.model import Dataset, MountPoint
from datacache.sources.faulty import Before, Fail, FaultySink
from datacache.sources.memory import MemorySink, MemorySource


def faulty(*faults: Fail | Before) -> FaultySink:
    return FaultySink(MemorySink(MemorySource()), {"check_writable": list(faults)})


def test_a_store_that_lets_us_write_says_nothing() -> None:
    """It is asked once, and keeps nothing."""
    sinks = [faulty(), faulty()]
    with Permission(sinks, patience=30) as asked:
        assert asked.check() == []
    assert [dict(sink.calls) for sink in sinks] == [{"check_writable": 1}] * 2


def test_one_store_of_several_that_says_no_is_named() -> None:
    """With what to do about it."""
    sinks = [faulty(Fail(Unavailable("no answer"))), faulty(Fail(Denied("memory://x: 403 AccessDenied")))]
    with (
        Permission(sinks, patience=30) as asked,
        pytest.raises(MountError, match="403 AccessDenied") as caught,
    ):
        asked.check()
    assert str(caught.value).endswith(f": {ADVICE}")
    assert "nothing can be written to memory://" in str(caught.value)


@pytest.mark.parametrize("error", [Unavailable("no connection"), SourceError("hm")])
def test_a_store_that_does_not_know_is_no_obstacle(error: SourceError) -> None:
    """It is said, and the mount goes on."""
    with Permission([faulty(Fail(error))], patience=30) as asked:
        (doubt,) = asked.check()
    assert f"can be written to is not known ({error})" in doubt
    assert "`datacache doctor --rw`" in doubt


class Hanging(FaultySink):
    """Answers when its connections are cut."""

    def __init__(self) -> None:
        super().__init__(MemorySink(MemorySource()))
        self.cut = threading.Event()

    def check_writable(self) -> None:
        assert self.cut.wait(30)
        raise Unavailable("the connection was cut")

    def close(self) -> None:
        self.cut.set()


@contextmanager
def asked(sink: Hanging) -> Iterator[Permission]:
    with Permission([sink], patience=0.05) as permission:
        yield permission


def test_a_store_that_hangs_does_not_hold_up_a_mount() -> None:
    """It is given its time, and then cut off; no thread stays behind."""
    with asked(Hanging()) as permission:
        (doubt,) = permission.check()
        assert "1 stores, 0 have answered" in repr(permission)
    assert "nothing within 0 s" in doubt


def test_nobody_waits_for_it_where_a_mount_fails_for_another_reason() -> None:
    """The daemon says what is wrong; the stores are let go."""
    sink = Hanging()
    with pytest.raises(MountError, match="else"), asked(sink):
        raise MountError("something else")
    assert sink.cut.is_set()


def test_only_who_writes_asks() -> None:
    """A mount that is read makes no client for that; what can only be read is refused at once."""
    point = MountPoint("https://host/data")
    settings = Settings(Dataset("x", (point,)), "/state", "/run")
    assert sinks_of(settings, patience=1) == []
    with pytest.raises(SettingError, match="can only be read"):
        sinks_of(
            Settings(Dataset("x", (point,)), "/state", "/run", writing=WritingSettings(enabled=True)),
            patience=1,
        )
