"""
A mount outlives its daemon: killed, upgraded, given up; and what is left when it ends.

All on the native driver, which has a broker.
"""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from datacache.config.settings import (
    IO,
    Consistency,
    Fill,
    IndexSettings,
    ReadingSettings,
)
from datacache.model import MiB
from fuse import mountpoint
from fuse.broker import TRIES, YOUNG
from tests.daemon.mounted import reading_on
from tests.daemon.mounted.conftest import STOP, Daemon, Start

PATIENCE = 60.0
"""Seconds for whatever must come, on a machine that is busy with other things."""

IMMUTABLE = IndexSettings(consistency=Consistency.IMMUTABLE)
EAGER = IndexSettings(ttl=0)
SHORT = IndexSettings(ttl=0.5)
RANGES = ReadingSettings(fill=Fill.RANGE, readahead=0)
"""What is read at random of a large file is not whole for long."""


@pytest.fixture
def driver() -> str:
    """Only the native one has a broker."""
    if not mountpoint.is_native("auto"):
        pytest.skip("this kernel is older than Linux 6.9, where the native driver begins")
    return "native"


@pytest.fixture
def filled(bucket: Path) -> Path:
    """A bucket of small files, a large one, one too large to become whole, and a directory of many."""
    rng = random.Random(5)
    for number in range(8):
        (bucket / f"small{number}").write_bytes(rng.randbytes(200_000 + number))
    (bucket / "large").write_bytes(rng.randbytes(9 * MiB + 17))
    piece = rng.randbytes(1 * MiB)
    with open(bucket / "huge", "wb") as file:
        for number in range(96):
            file.write(piece[number * 999 :] + piece[: number * 999])
    (bucket / "many").mkdir()
    for number in range(3000):
        (bucket / "many" / f"{number:05}").write_bytes(b"%d" % number)
    return bucket


def put(path: Path, data: bytes) -> None:
    """Replace an object as stores do: whole, and never changed in place."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.rename(new, path)


def daemons(one: Daemon) -> list[int]:
    """The processes behind the broker of `one`."""
    assert one.process is not None
    pid = one.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def ends(pid: int) -> Iterator[None]:
    """The process has ended when this block has."""
    descriptor = os.pidfd_open(pid)
    try:
        yield
        assert select.select([descriptor], [], [], PATIENCE)[0], f"process {pid} does not end"
    finally:
        os.close(descriptor)


def served_by(one: Daemon) -> int:
    """The daemon that serves, once one does."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(Exception):  # none yet, or one that is dying
            return int(one.status()["pid"])
        assert time.monotonic() < deadline, f"no daemon serves:\n{one.log.read_text()}"
        time.sleep(0.01)


def kill(one: Daemon) -> int:
    """kill -9 of the daemon; the pid of its successor, which serves."""
    (old,) = daemons(one)
    with ends(old):
        os.kill(old, signal.SIGKILL)
    while (new := served_by(one)) == old:
        pass
    return new


# ---- readers ------------------------------------------------------------------------------------


class Load:
    """Reader processes, each verifying what it reads."""

    def __init__(self, one: Daemon, *, readers: int = 3) -> None:
        self._readers = [
            subprocess.Popen(
                [sys.executable, "-m", reading_on.__name__, str(one.directory), str(one.bucket), str(seed)],
                cwd=Path(__file__).parents[3], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for seed in range(readers)
        ]  # fmt: skip

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *exc: object) -> None:
        for reader in self._readers:
            if any(exc):
                reader.kill()
            reader.communicate(timeout=PATIENCE)

    def tell(self, command: str, readers: Sequence[int] = ()) -> list[dict[str, Any]]:
        """What readers answer to a command: all of them, where none are named."""
        chosen = [self._readers[which] for which in readers] or self._readers
        for reader in chosen:
            assert reader.stdin is not None
            reader.stdin.write(f"{command}\n")
            reader.stdin.flush()
        answers = []
        for reader in chosen:
            assert reader.stdout is not None
            assert select.select([reader.stdout], [], [], PATIENCE)[0], "a reader hangs"
            answers.append(json.loads(reader.stdout.readline()))
        return answers

    def worst(self) -> float:
        """Seconds of the longest operation since this was asked last. Nothing may have been wrong."""
        answers = self.tell("worst")
        assert [answer["errors"] for answer in answers] == [[]] * len(answers)
        return max(answer["worst"] for answer in answers)

    def go_on(self, operations: int) -> None:
        """Return when each reader has done so many more."""
        deadline = time.monotonic() + PATIENCE
        before = [answer["operations"] for answer in self.tell("report")]
        while any(
            answer["operations"] < done + operations
            for answer, done in zip(self.tell("report"), before, strict=True)
        ):
            assert time.monotonic() < deadline, "readers do not get on"


@dataclass
class Ranged:
    """Makes mounts on which a large file does not become whole by being read here and there."""

    start: Start

    def __call__(self, **options: Any) -> Daemon:
        one = self.start(start=False, **options)
        one.settings = replace(one.settings, reading=RANGES)
        one.start()
        assert one.answer.get("ok"), one.log.read_text()
        return one


@pytest.fixture
def ranged(daemon: Start) -> Ranged:
    return Ranged(daemon)


WAYS = [
    pytest.param(io, index, id=f"{io}-{index.consistency}")
    for io in (IO.PASSTHROUGH, IO.PAGECACHE, IO.SERVED)
    for index in (IMMUTABLE, SHORT)
]


@pytest.mark.parametrize(("io", "index"), WAYS)
def test_readers_do_not_notice_that_the_daemon_is_killed(
    ranged: Ranged, filled: Path, io: IO, index: IndexSettings
) -> None:
    """No ENOTCONN, no EIO, no wrong byte: not for what is held open in passthrough, mapped or served, not
    for what is opened again, not for a directory that is being read."""
    one = ranged(io=io, index=index)
    with Load(one) as load:
        load.tell("hold")
        for held_anew in ((0,), (1,)):
            load.go_on(30)
            kill(one)
            assert load.worst() < STOP
            load.tell("hold", held_anew)  # what the others hold is opened by another process
            load.go_on(30)
        load.worst()
    assert one.log.read_text().count("has taken over") == 2


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("io", [IO.PASSTHROUGH, IO.PAGECACHE])
def test_a_hundred_kills(ranged: Ranged, filled: Path, io: IO, capfd: pytest.CaptureFixture[str]) -> None:
    """The same at random moments, with what one reader has held open since before the first of them. Not
    more than four in a row that young, or the mount would be given up."""
    one = ranged(io=io, index=SHORT)
    rng, stalls, old = random.Random(6), [], 0.0
    with Load(one) as load:
        load.tell("hold")
        for number in range(100):
            until = old + YOUNG if number % (TRIES - 1) == 0 else time.monotonic() + rng.uniform(0, 1)
            while time.monotonic() < until:
                load.go_on(1)
            load.worst()
            kill(one)
            load.go_on(5)
            stalls.append(load.worst())
            load.tell("hold", (number % 2,))
            old = time.monotonic()
        load.go_on(50)
        load.worst()
    stalls.sort()
    with capfd.disabled():
        sys.stdout.write(
            f"\n{io}: readers wait {stalls[50]:.2f} s after a kill in the median, {stalls[95]:.2f} s after "
            f"95 of 100, {stalls[-1]:.2f} s at most\n"
        )
