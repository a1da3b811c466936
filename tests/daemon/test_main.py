"""What `python -m fuse` decides before it mounts."""

import os
import resource
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from datacache import worker
from datacache.clock import SystemClock
from datacache.config.settings import IO, CacheSettings, IndexSettings, MountSettings, Settings, TierSettings
from datacache.errors import NoSuchSnapshot, SettingError
from datacache.index.snapshot import create_snapshot
from datacache.model import Dataset, Medium, MiB, MountPoint
from datacache.worker import opened_sources
from fuse import __main__ as daemon
from fuse import mountpoint
from tests.conftest import AnnouncedLogs

SSD, MEM = (TierSettings(medium, "/x", 1 * MiB) for medium in (Medium.SSD, Medium.MEM))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A data set with snapshots `small` and `large`."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    made = Settings(
        dataset=Dataset("test", (MountPoint(bucket.as_uri()),)),
        state=str(tmp_path / "state"), runtime=str(tmp_path / "runtime"),
        cache=CacheSettings(tiers=(SSD,)),
    )  # fmt: skip
    for name, size in (("small", 100), ("large", 5 * MiB)):
        (bucket / "file").write_bytes(b"x" * size)
        with opened_sources(made, clock=SystemClock()) as (dataset, sources, _):
            create_snapshot(dataset, sources, state=made.state, name=name, clock=SystemClock())
    return made


@pytest.mark.parametrize(
    ("snapshot", "tier", "expected"),
    [
        ("small", SSD, IO.PAGECACHE),
        ("small", MEM, IO.PASSTHROUGH),  # its bytes are in memory already
        ("large", SSD, IO.PASSTHROUGH),
        ("", SSD, IO.PASSTHROUGH),
    ],
)
def test_auto_takes_the_page_cache_for_snapshots_of_small_files(
    settings: Settings, snapshot: str, tier: TierSettings, expected: IO
) -> None:
    """Where opens cost more than reads, nothing can change, and no byte stands in memory twice."""
    chosen = replace(settings, index=IndexSettings(snapshot=snapshot), cache=CacheSettings(tiers=(tier,)))
    assert daemon.chosen_io(chosen) is expected


def test_what_is_asked_for_is_taken(settings: Settings, logs: AnnouncedLogs) -> None:
    """... with a warning where it wastes memory."""
    logs.expect("stands in memory twice")
    for io in (IO.PASSTHROUGH, IO.PAGECACHE, IO.SERVED):
        chosen = replace(settings, mount=MountSettings(io=io), cache=CacheSettings(tiers=(MEM,)))
        assert daemon.chosen_io(chosen) is io


def test_a_snapshot_that_is_not_there_is_named(settings: Settings) -> None:
    """Before anything is mounted."""
    with pytest.raises(NoSuchSnapshot, match="nothing"):
        daemon.chosen_io(replace(settings, index=IndexSettings(snapshot="nothing")))


@pytest.mark.parametrize(
    ("driver", "release", "native"),
    [
        ("auto", "6.9.0", True),
        ("auto", "6.18.44-fc", True),
        ("auto", "7.0", True),
        ("auto", "6.8.12-amd64", False),
        ("auto", "5.15.0-1-generic", False),
        ("native", "5.4", True),
        ("pyfuse3", "6.18", False),
    ],
)
def test_the_driver_goes_by_the_kernel(driver: str, release: str, native: bool) -> None:
    """`auto` is native from Linux 6.9 on; what is named is taken."""
    assert mountpoint.is_native(driver, release) is native


def test_the_portable_driver_has_one_process(settings: Settings) -> None:
    """What it cannot do is said before anything is mounted, not passed over."""
    several = replace(settings, mount=MountSettings(driver="pyfuse3", processes=2))
    with pytest.raises(SettingError, match="processes"):
        daemon.serve_portably(several, mounted=lambda: None)


def test_a_worker_may_open_what_the_hard_limit_allows() -> None:
    """The soft limit is for programs that use select(2)."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        worker._take_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_settings_that_never_end_are_given_up_at_a_signal() -> None:
    """Whoever sends them may be gone for good. (That no signal is lost between two reads cannot be timed.)"""
    read, write = os.pipe()
    main = threading.main_thread().ident
    assert main is not None

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    os.write(write, b"{")
    sender = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1))
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            daemon._all_of(read)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
        os.close(read)
        os.close(write)
