"""Real mounts: a daemon in a process of its own, started as `datacache mount` starts it, over a
directory as the store."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from datacache.cluster import registry
from datacache.cluster.client import ControlClient
from datacache.config.parsing import dump_settings
from datacache.config.settings import (
    IO,
    CacheSettings,
    IndexSettings,
    MountSettings,
    Settings,
    TierSettings,
    UploadSettings,
    WritingSettings,
)
from datacache.errors import ControlError
from datacache.model import Dataset, Medium, MiB, MountPoint
from fuse import mountpoint
from tests.support.reading import until

START = 30.0
"""Seconds for a daemon to say that it has mounted, on a machine that is busy with other things."""
STOP = 20.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here need a kernel that lets us mount."""
    problem = mountpoint.obstacle()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.mounted)
            if problem:
                item.add_marker(pytest.mark.skip(reason=problem))


@dataclass
class Daemon:
    """A mount and the process behind it: the daemon, or with the native driver its broker."""

    bucket: Path
    """The directory that is the store."""
    settings: Settings
    log: Path
    via: Sequence[str] = ()
    """What starts it, where that is not we: `setpriv` and its arguments."""
    python: str = sys.executable
    process: subprocess.Popen[bytes] | None = None
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return Path(self.settings.mount.directory)

    def start(self, *, descriptor: int | None = None) -> "Daemon":
        """Start the daemon; returns with its one line in `answer` ({} where it ended without one).
        `descriptor`: of a connection that is there already."""
        inherited = [] if descriptor is None else [descriptor]
        words = [word for each in inherited for word in ("--fd", str(each))]
        read, write = os.pipe()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*self.via, self.python, "-P", "-m", "fuse", "--ready-fd", str(write), *words],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write, *inherited), cwd="/",
            )  # fmt: skip
        os.close(write)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as settings:
            settings.write(dump_settings(self.settings).encode())
        with open(read, "rb") as ready:
            assert select.select([ready], [], [], START)[0], f"no answer:\n{self.log.read_text()}"
            line = ready.readline()
        self.answer = json.loads(line) if line else {}
        return self

    def wait(self) -> int:
        """The exit code of the daemon, which is to end by itself."""
        assert self.process is not None
        return self.process.wait(STOP)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9 of all that is behind the mount."""
        assert self.process is not None
        daemon = self.status()["pid"]
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            if daemon != self.process.pid:
                ended = os.pidfd_open(daemon)
                os.kill(daemon, signal.SIGKILL)
                select.select([ended], [], [], STOP)
                os.close(ended)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(STOP)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if mountpoint.is_mounted(str(self.directory)):
            mountpoint.unmount(str(self.directory), lazy=True)

    def registered(self) -> registry.Registration | None:
        return registry.find(self.settings.runtime, str(self.directory))

    def status(self) -> dict[str, Any]:
        """What `datacache status` would show."""
        return self.control().status()

    def status_if_any(self) -> dict[str, Any] | None:
        """The same; None while a daemon has ended and the next does not answer yet."""
        with contextlib.suppress(ControlError):
            return self.status()
        return None

    def control(self) -> ControlClient:
        found = self.registered()
        assert found is not None
        return ControlClient(found.socket)

    def wait_until_cached(self, name: str, size: int) -> None:
        """Readers are served before the cache is filled; return when it is, too."""
        deadline = time.monotonic() + STOP
        while sum(self.control().stat(f"/{name}").cached.values()) < size:
            assert time.monotonic() < deadline, f"{name} is not cached"
            time.sleep(0.01)

    def requests(self) -> dict[str, int]:
        """FUSE requests answered so far, by kind. No file may be open: RELEASE is sent after close has
        returned, so this waits for it."""
        deadline = time.monotonic() + STOP
        while (status := self.status())["mount_files"]["open_files"]:
            assert time.monotonic() < deadline, "files are still open"
        counts: dict[str, int] = status["mount_requests"]
        return counts


Start = Callable[..., Daemon]


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """The directory that is the store."""
    directory = tmp_path / "bucket"
    directory.mkdir()
    return directory


@pytest.fixture(params=["native", "pyfuse3"])
def driver(request: pytest.FixtureRequest) -> str:
    """Each test of `daemon` runs on both drivers."""
    chosen = str(request.param)
    if chosen == "native" and not mountpoint.is_native("auto"):
        pytest.skip("this kernel is older than Linux 6.9, where the native driver begins")
    return chosen


@pytest.fixture
def daemon(tmp_path: Path, bucket: Path, driver: str) -> Iterator[Start]:
    """Makes daemons over `bucket`, all with one state, cache and mount point unless told otherwise;
    starts them; ends them."""
    made: list[Daemon] = []

    def make(
        *,
        mount: MountSettings | None = None,
        index: IndexSettings | None = None,
        io: IO = IO.AUTO,
        directory: Path = tmp_path / "mnt",
        cache: Path = tmp_path / "cache",
        writing: WritingSettings | None = None,
        start: bool = True,
    ) -> Daemon:
        directory.mkdir(exist_ok=True)
        settings = Settings(
            dataset=Dataset("test", (MountPoint(bucket.as_uri()),)),
            state=str(tmp_path / "state"),
            runtime=str(tmp_path / "runtime"),
            cache=CacheSettings(tiers=(TierSettings(Medium.SSD, str(cache), 256 * MiB),)),
            index=index or IndexSettings(),
            writing=writing or WritingSettings(),
            mount=replace(mount or MountSettings(), directory=str(directory), driver=driver, io=io),
        )
        one = Daemon(bucket, settings, log=tmp_path / "daemon.log")
        made.append(one)
        if start:
            one.start()
            assert one.answer.get("ok"), f"{one.answer}\n{one.log.read_text()}"
        return one

    yield make
    for one in reversed(made):
        one.stop()
    log = (tmp_path / "daemon.log").read_text() if made and made[0].log.exists() else ""
    assert "Traceback" not in log, log


# ---- mounts that can be written to ---------------------------------------------------------------

UNCOVERED = ["env", "-u", "COVERAGE_PROCESS_START", "-u", "COVERAGE_PROCESS_CONFIG"]
"""For another user's programs: what they cover could not be written into the checkout."""

WAYS = ("passthrough", "served", "pyfuse3")
"""Where the kernel writes the files itself, where it may not, and on the portable driver."""


def check_way(way: str) -> None:
    """Skip the test where this kernel does not have it."""
    if way != "pyfuse3" and not mountpoint.is_native("auto"):
        pytest.skip("this kernel is older than Linux 6.9, where the native driver begins")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each test of what is written runs in all ways."""
    check_way(request.param)
    return str(request.param)


@contextlib.contextmanager
def writable(
    base: Path, way: str, store: MountPoint, *, environment: Mapping[str, str] | None = None,
    bucket: Path | None = None, name: str = "mnt", writing: WritingSettings | None = None,
    upload: UploadSettings | None = None, index: IndexSettings | None = None, allow_other: bool = True,
    start: bool = True, tier: TierSettings | None = None,
) -> Iterator[Daemon]:  # fmt: skip
    """`store` mounted read-write at `base/name`, with all that the mount keeps below `base`, in one `way`.
    `bucket` is where its objects lie as files, if they do."""
    check_way(way)
    directory = base / name
    directory.mkdir(exist_ok=True)
    settings = Settings(
        dataset=Dataset("test", (store,)),
        state=str(base / "state"),
        runtime=str(base / "runtime"),
        environment=environment or {},
        cache=CacheSettings(tiers=(tier or TierSettings(Medium.SSD, str(base / "cache"), 1024 * MiB),)),
        index=index or IndexSettings(),
        writing=replace(writing or WritingSettings(), enabled=True, landing=str(base / "landing")),
        upload=upload or UploadSettings(),
        mount=MountSettings(
            directory=str(directory),
            driver="pyfuse3" if way == "pyfuse3" else "native",
            allow_other=allow_other,
        ),
    )
    one = Daemon(bucket or base, settings, log=base / "daemon.log")
    try:
        if start:
            start_writable(one, way)
        yield one
    finally:
        one.stop()
    assert "Traceback" not in (log := one.log.read_text() if one.log.exists() else ""), log


def start_writable(one: Daemon, way: str) -> None:
    """Mount it, or mount it again."""
    if way == "served":
        # Who may not register files with the kernel has to serve them: the mount is made by us.
        one.via = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
        descriptor = mountpoint.mount(str(one.directory), source="test", allow_other=True, writable=True)
        one.start(descriptor=descriptor)
        os.close(descriptor)
    else:
        one.start()
    assert one.answer.get("ok"), f"{one.answer}\n{one.log.read_text()}"


def flushed(one: Daemon, *, seconds: float = 60.0) -> None:
    """Return when all that is due is in the bucket."""
    deadline = time.monotonic() + seconds
    while not (said := one.control().flush("/", timeout=5))["clean"]:
        assert time.monotonic() < deadline, f"it does not get there: {said}\n{one.log.read_text()}"
    assert not said["open"], f"something is still open for writing: {said}"


def kill_daemon(one: Daemon) -> None:
    """kill -9 of the daemon; its successor serves when this returns."""
    before = one.status()["pid"]
    os.kill(before, signal.SIGKILL)
    until(lambda: (one.status_if_any() or {"pid": before})["pid"] != before)
