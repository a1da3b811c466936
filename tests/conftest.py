"""
Silence is asserted: a warning, an unannounced WARNING log, a thread, descriptor, mount or child
process left behind fails the test that left it.
"""

import ctypes
import gc
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from datacache.clock import VirtualClock

if TYPE_CHECKING:
    from tests.support.s3 import S3Server

# How long an example takes says how busy the machine is, not whether it is right.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

_CLONE_NEWNS = 0x20000
_MS_PRIVATE_ALL = 1 << 18 | 0x4000
_MNT_DETACH = 2


def pytest_configure(config: pytest.Config) -> None:
    """A process that runs tests beside others (pytest-xdist) has a mount table of its own, where it may:
    what looks at all mounts there are, `datacache status` among them, finds its own only."""
    if not hasattr(config, "workerinput"):
        if hasattr(config.option, "numprocesses"):
            from xdist.workermanage import NodeManager

            NodeManager.EXIT_TIMEOUT = 60  # after a Ctrl-C: what tests have running and mounted ends first
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(None, b"/", None, ctypes.c_ulong(_MS_PRIVATE_ALL), None):
        return  # not root: then others' mounts are no business of ours either
    # What others are testing now: a second reference to it would keep it mounted while we run.
    for line in reversed(Path("/proc/self/mountinfo").read_bytes().splitlines()):
        where = line.split()[4].replace(b"\\040", b" ")
        is_a_disk_of_theirs = b" /dev/loop" in line and where.startswith(os.fsencode(tempfile.gettempdir()))
        if b" - fuse.datacache " in line or is_a_disk_of_theirs:
            libc.umount2(where, _MNT_DETACH)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Beside others, those first that take long, by files: the last that are handed out are short."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: "mounted" not in item.path.parts)


# Threads of libraries that live as long as the process, by name prefix.
_IMMORTAL_THREADS = ("pytest_timeout", "fsspecIO", "ThreadPoolExecutor-moto", "asyncio_", "Trio thread")


class AnnouncedLogs:
    """What a test expects to be logged at WARNING or above: substrings of messages."""

    def __init__(self) -> None:
        self.expected: list[str] = []
        self.seen: list[logging.LogRecord] = []

    def expect(self, part: str) -> None:
        """Let records whose message contains `part` pass."""
        self.expected.append(part)

    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.seen]


class _Recorder(logging.Handler):
    def __init__(self, logs: AnnouncedLogs) -> None:
        super().__init__(logging.WARNING)
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        self._logs.seen.append(record)


@pytest.fixture(autouse=True)
def logs() -> Iterator[AnnouncedLogs]:
    """Fails the test on any log of WARNING or above of our own that it did not announce."""
    announced = AnnouncedLogs()
    recorder = _Recorder(announced)
    watched = [logging.getLogger(name) for name in ("datacache", "fuse", "csi")]
    for logger in watched:
        logger.addHandler(recorder)
    yield announced
    for logger in watched:
        logger.removeHandler(recorder)
    surprises = [m for m in announced.messages() if not any(part in m for part in announced.expected)]
    assert not surprises, f"unannounced warnings were logged: {surprises}"


def _descriptors() -> dict[int, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
    return found


def _threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if not t.name.startswith(_IMMORTAL_THREADS)}


def _mounts() -> set[str]:
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def _leaked_files(before: dict[int, str]) -> list[str]:
    # Sockets of pooled connections and epoll instances belong to clients that outlive a test.
    return sorted(
        name
        for fd, name in _descriptors().items()
        if before.get(fd) != name and name.startswith("/") and not name.startswith(("/dev/", "/proc/"))
    )


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the test that leaves a thread, an open file or a mount."""
    threads, files, mounts = _threads(), _descriptors(), _mounts()
    yield
    deadline = time.monotonic() + 5  # threads that were told to end are given a moment to do so
    while (_threads() - threads or _leaked_files(files)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not (left := _threads() - threads), f"threads left behind: {left}"
    assert not (left_files := _leaked_files(files)), f"files left open: {left_files}"
    # All that a test mounts lies there; elsewhere others mount while we run.
    base = tmp_path_factory.getbasetemp()
    left_mounts = {mount for mount in _mounts() - mounts if Path(mount).is_relative_to(base)}
    assert not left_mounts, f"left mounted: {left_mounts}"


@pytest.fixture
def clock() -> VirtualClock:
    """Time that passes only when it is told to."""
    return VirtualClock()


@pytest.fixture(scope="module")
def moto() -> Iterator["S3Server"]:
    """A server that knows all of S3's semantics, for the tests of one module."""
    from tests.support.s3 import moto_server  # most tests need no client of a store

    with moto_server() as server:
        yield server


@pytest.fixture(scope="module")
def versitygw(tmp_path_factory: pytest.TempPathFactory) -> Iterator["S3Server"]:
    """A real S3 server, for the tests of one module."""
    from tests.support.s3 import find_tool, versitygw_server

    if find_tool("versitygw") is None:
        pytest.skip("versitygw is not installed")
    with versitygw_server(tmp_path_factory.mktemp("versitygw")) as server:
        yield server
