"""
A machine-generated walk over the kernel's rules of open modes, on the kernel itself.

Opens, closes, mappings that outlive their descriptor, fills, evictions, renewals in the bucket, storms of
concurrent openers, and kills of the daemon, in any order, on a cache that is too small for all of it. No
reader ever sees EIO, nor ESTALE for a version that the bucket has; bytes are always those of the version
that was opened; and space is counted until nobody can read it.
"""

import errno
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from datacache.config.settings import IO, CacheSettings, MountSettings, Policy, Settings, TierSettings
from datacache.errors import ControlError
from datacache.model import Dataset, Medium, MiB, MountPoint
from fuse import broker, mountpoint
from tests.daemon.mounted.conftest import Daemon
from tests.daemon.mounted.test_native import LARGE, Mapping
from tests.daemon.mounted.test_reading import EAGER, put
from tests.support.reading import until

SIZES = {"empty": 0, "small": 100_000, "middle": 3 * MiB, "large": LARGE}
QUOTA = 16 * MiB
"""Room for all of it once, and not for a second version of the large one."""
KILLS = broker.TRIES - 2
"""More deaths of young daemons, one after the other, end the mount."""

names = st.sampled_from(sorted(SIZES))
which = st.integers(0, 100)


@dataclass
class Held:
    """An open file or a mapping, and what it must show."""

    name: str
    expected: bytes
    of: Any


class Walk(RuleBasedStateMachine):
    """One mount, and what is open on it."""

    root: ClassVar[Path]
    medium: ClassVar[Medium]

    @initialize(policy=st.sampled_from(Policy), io=st.sampled_from([IO.PASSTHROUGH, IO.PAGECACHE, IO.SERVED]))
    def begin(self, policy: Policy, io: IO) -> None:
        base = "/dev/shm" if self.medium is Medium.MEM else None
        self.cache = tempfile.mkdtemp(dir=base, prefix="walk-")
        self.place = Path(tempfile.mkdtemp(dir=self.root))
        for name in ("bucket", "mnt"):
            (self.place / name).mkdir()
        self.random = random.Random(7)
        self.contents: dict[str, bytes] = {}
        for name in SIZES:
            self.put(name)
        tier = TierSettings(self.medium, self.cache, QUOTA)
        bucket = self.place / "bucket"
        self.daemon = Daemon(
            bucket,
            Settings(
                dataset=Dataset("walk", (MountPoint(bucket.as_uri()),)),
                state=str(self.place / "state"),
                runtime=str(self.place / "runtime"),
                cache=CacheSettings(tiers=(tier,), policy=policy),
                index=EAGER,
                mount=MountSettings(directory=str(self.place / "mnt"), driver="native", io=io),
            ),
            log=self.place / "log",
        ).start()
        assert self.daemon.answer.get("ok"), self.daemon.answer
        self.files: list[Held] = []
        self.mappings: list[Held] = []
        self.kills = 0

    def put(self, name: str) -> None:
        """Another version, of another size."""
        self.contents[name] = self.random.randbytes(SIZES[name] and SIZES[name] + self.random.randrange(100))
        put(self.place / "bucket" / name, self.contents[name])

    def path(self, name: str) -> Path:
        return self.place / "mnt" / name

    def check(self, held: Held, read: bytes, at: int) -> None:
        assert read == held.expected[at : at + len(read)], f"wrong bytes of {held.name}"

    def pread(self, held: Held, length: int, at: int) -> None:
        try:
            read = os.pread(held.of, length, at)
        except OSError as error:
            assert error.errno == errno.ESTALE, error
            assert held.expected != self.contents[held.name], "the bucket has this version"
        else:
            assert read == held.expected[at : at + length], f"wrong bytes of {held.name}"

    # ---- steps -----------------------------------------------------------------------------------

    @rule(name=names)
    def open(self, name: str) -> None:
        fd = os.open(self.path(name), os.O_RDONLY)
        self.files.append(Held(name, self.contents[name], fd))
        assert os.fstat(fd).st_size == len(self.contents[name])

    @precondition(lambda self: self.files)
    @rule(i=which, at=st.floats(0, 1), length=st.sampled_from([1, 5000, MiB, 8 * MiB]), dropped=st.booleans())
    def read(self, i: int, at: float, length: int, dropped: bool) -> None:
        held = self.files[i % len(self.files)]
        if dropped:
            os.posix_fadvise(held.of, 0, 0, os.POSIX_FADV_DONTNEED)
        self.pread(held, length, int(at * len(held.expected)))

    @precondition(lambda self: self.files)
    @rule(i=which)
    def close(self, i: int) -> None:
        os.close(self.files.pop(i % len(self.files)).of)

    @precondition(lambda self: any(held.expected for held in self.files))
    @rule(i=which)
    def map(self, i: int) -> None:
        """Map it, and close the descriptor: RELEASE comes while the mapping lives on."""
        able = [held for held in self.files if held.expected == self.contents[held.name] and held.expected]
        if not able:
            return
        held = able[i % len(able)]
        mapping = Mapping(held.of, len(held.expected))
        self.files.remove(held)
        os.close(held.of)
        assert mapping.content() == held.expected
        self.mappings.append(Held(held.name, held.expected, mapping))

    @precondition(lambda self: self.mappings)
    @rule(i=which)
    def unmap(self, i: int) -> None:
        held = self.mappings.pop(i % len(self.mappings))
        assert held.of.content() == held.expected
        held.of.close()

    @rule(name=names)
    def fill(self, name: str) -> None:
        assert self.path(name).read_bytes() == self.contents[name]

    @rule(name=names)
    def evict(self, name: str) -> None:
        with suppress(ControlError):  # between two daemons
            self.daemon.control().evict(f"/{name}")

    @rule(name=names)
    def renew(self, name: str) -> None:
        self.put(name)

    @rule()
    def list(self) -> None:
        with os.scandir(self.place / "mnt") as listed:
            assert {one.name: one.stat().st_size for one in listed} == {
                name: len(data) for name, data in self.contents.items()
            }

    @rule(seed=which)
    def storm(self, seed: int) -> None:
        """Four readers open, read and close, and the cache changes under them."""

        def reader(number: int) -> None:
            rng = random.Random(seed * 10 + number)
            for _ in range(12):
                name = rng.choice(("small", "middle", "large"))
                with open(self.path(name), "rb", buffering=0) as file:
                    at = rng.randrange(SIZES[name])
                    read = os.pread(file.fileno(), 300_000, at)
                    assert read == self.contents[name][at : at + 300_000]

        def evictor() -> None:
            rng = random.Random(seed)
            for _ in range(6):
                self.evict(rng.choice(("small", "middle", "large")))

        with ThreadPoolExecutor(5) as pool:
            work = [pool.submit(reader, number) for number in range(4)] + [pool.submit(evictor)]
            for one in work:
                one.result()

    @precondition(lambda self: self.kills < KILLS)
    @rule()
    def kill(self) -> None:
        """kill -9 of the daemon; whoever comes to a request first waits for the next one."""
        with suppress(ControlError, ProcessLookupError):
            os.kill(self.daemon.status()["pid"], signal.SIGKILL)
            self.kills += 1

    @rule()
    def look(self) -> None:
        """Every mapping shows what it showed; no tier is over its quota."""
        for held in self.mappings:
            assert held.of.content() == held.expected
        with suppress(ControlError):
            for tier in self.daemon.status()["tiers"]:
                assert tier["used"] <= tier["quota"]

    # ---- the end ---------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "daemon"):
            return
        try:
            for held in self.files:
                self.pread(held, 8 * MiB, 0)
                os.close(held.of)
            for held in self.mappings:
                assert held.of.content() == held.expected
                held.of.close()
            until(self.answers, 30)
            self.daemon.requests()
            assert self.daemon.control().verify()["problems"] == 0
            [tier] = self.daemon.status()["tiers"]
            assert tier["used"] <= tier["quota"]
            assert tier["state"] != "broken"
            mountpoint.unmount(str(self.daemon.directory))
            assert self.daemon.wait() == 0
            log = self.daemon.log.read_text()
            assert "Traceback" not in log, log
            assert "no passthrough" not in log, log
        finally:
            self.daemon.stop()
            shutil.rmtree(self.cache)
            shutil.rmtree(self.place)

    def answers(self) -> bool:
        with suppress(ControlError):
            return bool(self.daemon.status())
        return False


@pytest.fixture(params=[Medium.SSD, Medium.MEM], ids=["ssd", "mem"])
def medium(request: pytest.FixtureRequest) -> Iterator[Medium]:
    """A cache on a disk, and one on a tmpfs."""
    if not mountpoint.is_native("auto"):
        pytest.skip("this kernel is older than Linux 6.9, where the native driver begins")
    if request.param is Medium.MEM and not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    yield request.param


def walk(root: Path, medium: Medium, examples: int, steps: int) -> None:
    machine = type("TheWalk", (Walk,), {"root": root, "medium": medium})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_readers_see_one_version_and_no_error_in_any_order_of_things(tmp_path: Path, medium: Medium) -> None:
    """The kernel's rules are kept: no EIO, no ESTALE to a reader, right bytes, quotas."""
    walk(tmp_path, medium, 4, 40)


@pytest.mark.long
def test_the_same_for_long(tmp_path: Path, medium: Medium) -> None:
    """Minutes of it."""
    walk(tmp_path, medium, 60, 60)
