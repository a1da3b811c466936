"""
One disk for three Datasets of half of it each: real workers, as processes, on a file system of their own, and
the accountant of their node.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from csi.accountant import Accountant, disk_of, sockets
from csi.accounting import IDLE, RESERVE, bytes_for_copies
from csi.residents import Register, Roots
from csi.tmpfs import LinuxMemory
from datacache.clock import VirtualClock
from datacache.cluster.client import ControlClient
from datacache.errors import ControlError
from datacache.model import KiB, MiB
from datacache.reading.job import LoadRequest
from tests.support.reading import until
from tests.support.short import tmp_path as tmp_path

A, B, C = (f"0b9f4a4e-7c1e-4d39-9a55-0a2f4b1c9d1{i}" for i in "abc")
DISK = 128 * MiB
HALF = DISK // 2
FILE = 512 * KiB

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system"),
    pytest.mark.timeout(300),
]


class Worker:
    """`datacache worker` of one Dataset on the node, as its pod runs it."""

    def __init__(self, node: Path, uid: str, **settings: Any) -> None:
        self.uid, self._run = uid, node / "run" / uid
        config = node / f"{uid}.yaml"
        config.write_text(json.dumps({
            "name": f"d{uid[-1]}", "object": f"team/d{uid[-1]}",
            "mounts": [{"uri": f"file://{node}/bucket", "path": "/"}],
            "cache": [{"medium": "ssd", "path": f"{node}/disk/{uid}/cache", "quota": str(HALF)}],
            "state": f"{node}/state/{uid}", **settings,
        }))  # fmt: skip
        (node / "run").mkdir(exist_ok=True)
        self._log = (node / f"{uid}.log").open("ab")
        environment = {k: v for k, v in os.environ.items() if k.startswith(("COVERAGE", "PATH", "PYTHON"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "datacache.cli.main", "worker", "--config", str(config)],
            env=environment | {"HOME": str(node), "DATACACHE_RUNTIME": str(self._run)},
            stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def client(self) -> ControlClient:
        return ControlClient(sockets(str(self._run))[0])  # the newest: one that was killed leaves its own

    def wait(self) -> "Worker":
        until(lambda: sockets(str(self._run)) and self._answers(), 60)
        return self

    def _answers(self) -> bool:
        try:
            return bool(self.client().status())
        except ControlError:
            return False

    def tier(self) -> dict[str, Any]:
        (found,) = self.client().status()["tiers"]
        return dict(found)

    def load(self) -> None:
        """Copy as much of the bucket as there is room for."""
        client = self.client()
        job = client.load(LoadRequest())
        until(lambda: client.load_status(job).state != "running", 60)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(30)
        self._log.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """A directory with a bucket in it, larger than half of the disk beside it."""
    (tmp_path / "bucket").mkdir()
    for i in range(HALF // FILE + 20):
        (tmp_path / "bucket" / f"{i:03}").write_bytes(os.urandom(FILE))
    image, at = tmp_path / "image", tmp_path / "disk"
    at.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK)
    for command in (
        [
            "mkfs.ext4",
            "-q",
            "-m",
            "0",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1",
            "-J",
            "size=4",
            str(image),
        ],
        ["mount", "-o", "loop", str(image), str(at)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            pytest.skip(f"there is no {command[0]} here")
        if done.returncode:
            pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(at)], check=True, timeout=60)


Start = Callable[..., Worker]


@pytest.fixture
def start(node: Path) -> Iterator[Start]:
    running: list[Worker] = []

    def start(uid: str, **settings: Any) -> Worker:
        running.append(Worker(node, uid, **settings))
        return running[-1].wait()

    yield start
    for worker in running:
        worker.kill()


class Plugin:
    """The accountant of the node, whose rounds come when the test says so."""

    def __init__(self, node: Path) -> None:
        self._disk = str(node / "disk")
        self.register = Register(
            Roots(str(node / "state"), str(node / "run"), (self._disk, str(node / "mem")))
        )
        self.clock, self.staged = VirtualClock(), set[str]()
        self.accountant = Accountant(
            self.register, LinuxMemory(), clock=self.clock, staged=self.staged.__contains__
        )  # fmt: skip
        self.pool = ThreadPoolExecutor(8)

    def round(self) -> None:
        residents = self.register.residents()
        self.accountant.tend(residents)
        self.accountant.round(residents, self.pool)
        self.clock.advance(10)
        found = disk_of(self._disk)
        assert found is not None
        # A tenth stays free; what the catalogues take between two looks at the disk is little.
        assert found[1].free >= found[1].total * RESERVE - 2 * MiB

    def capacity(self, used: int) -> int:
        found = disk_of(self._disk)
        assert found is not None
        return bytes_for_copies(found[1], used)


@pytest.fixture
def plugin(node: Path) -> Iterator[Plugin]:
    found = Plugin(node)
    yield found
    found.pool.shutdown()


def settle(plugin: Plugin, workers: list[Worker], loading: list[Worker], rounds: int) -> dict[str, int]:
    """Rounds in which `loading` fill what they may; what each has then."""
    for _ in range(rounds):
        plugin.round()
        for worker in workers:
            until(lambda w=worker: w.tier()["used"] <= w.tier()["lease"], 30)
        for worker in loading:
            worker.load()
    return {worker.uid: worker.tier()["used"] for worker in workers}


def test_three_datasets_of_half_the_disk_each(start: Start, plugin: Plugin) -> None:
    """Two fill the disk; the third gets its third when it comes; who is not used gives way to who is; and so
    do the copies of one whose worker was killed. The disk never fills, no copy is damaged, no lease is above
    its quota."""
    a, b = start(A), start(B)
    plugin.staged |= {A, B}
    used = settle(plugin, [a, b], [a, b], 3)
    capacity = plugin.capacity(sum(used.values()))
    assert capacity < 3 * HALF, "there is room for all: nothing was shown"
    assert all(share >= 0.4 * capacity for share in used.values()), used

    c = start(C)
    plugin.staged.add(C)
    used = settle(plugin, [a, b, c], [a, b, c], 9)
    capacity = plugin.capacity(sum(used.values()))
    assert all(0.25 * capacity <= share <= 0.4 * capacity for share in used.values()), (used, capacity)
    assert all(worker.tier()["lease"] <= HALF for worker in (a, b, c))
    # Catalogues take room, too, and give some of it back now and then; but that comes to an end.
    evicted, quiet = [], 0
    for _ in range(20):
        used = settle(plugin, [a, b, c], [a, b, c], 1)
        before, evicted = evicted, [worker.tier()["evicted"] for worker in (a, b, c)]
        quiet = quiet + 1 if before == evicted else 0
        if quiet == 3:
            break
    assert quiet == 3, "leases flap"

    plugin.staged -= {B, C}
    plugin.clock.advance(IDLE)
    shares, used = used, settle(plugin, [a, b, c], [a], 6)
    assert used[A] >= 0.9 * min(HALF, shares[A] + shares[B] + shares[C])
    assert used[B] + used[C] < shares[B] + shares[C]

    b.kill()
    plugin.staged.add(C)
    shares, used = used, settle(plugin, [a, c], [a, c], 6)
    held = {each.uid: each for each in plugin.accountant.holdings() or ()}
    assert not held[B].alive and held[B].cached < shares[B]
    assert used[C] > shares[C]
    for worker in (a, c):
        found = worker.client().verify()
        assert found["blocks"] and not found["damaged"] and not found["problems"]
    b = start(B)
    assert not b.client().verify()["problems"]


def test_a_worker_goes_by_its_quota_when_nobody_lends(start: Start, plugin: Plugin) -> None:
    """Before the plugin comes, and when its last lease has ended."""
    a = start(A)
    assert a.tier()["lease"] is None
    plugin.round()
    assert a.tier()["lease"] == HALF
    a.client().lease(a.tier()["name"], MiB, ttl=1)
    until(lambda: a.tier()["lease"] is None, 10)


def test_a_worker_waits_for_its_tmpfs(start: Start, plugin: Plugin, node: Path) -> None:
    """It serves without its tier in memory and writes nothing into the bare directory; when the plugin has
    mounted the tmpfs, of just the quota, the tier is there, and what is cached in it outlives the worker."""
    home = node / "mem" / A
    home.mkdir(parents=True)
    tier = {"medium": "mem", "path": f"{home}/cache", "quota": str(8 * MiB), "mounted": "true"}
    a = start(A, cache=[tier])
    assert a.tier()["state"] == "broken" and "no tmpfs of its own" in a.tier()["reason"]
    a.load()
    assert list(home.iterdir()) == []
    try:
        plugin.round()
        assert LinuxMemory().size(str(home)) == 8 * MiB
        until(lambda: a.tier()["state"] != "broken", 30)
        a.load()
        used = a.tier()["used"]
        assert 6 * MiB < used <= 8 * MiB
        assert a.tier()["lease"] is None, "there is nobody to share it with"
        a.kill()
        a = start(A, cache=[tier])
        assert a.tier()["used"] == used
        a.kill()
        plugin.round()
        plugin.clock.advance(3600)
        os.utime(node / "state" / A / "premises.json", (0, 0))
        plugin.round()
        assert LinuxMemory().size(str(home)) is None
    finally:
        a.kill()
        if LinuxMemory().size(str(home)) is not None:
            LinuxMemory().unmount(str(home))
