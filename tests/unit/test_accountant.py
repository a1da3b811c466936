"""The accountant of a node: who is asked, what is lent, and what happens with those who do not answer."""

import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from csi import accountant
from csi.accountant import FORGOTTEN, STARTING, TTL, Accountant, Holding, read_heard
from csi.accounting import IDLE, Disk
from csi.residents import Register, Roots
from csi.tmpfs import FakeMemory
from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.clock import VirtualClock
from datacache.cluster import premises
from datacache.cluster.premises import Place, Premises
from datacache.errors import ControlError
from datacache.model import GiB, MiB
from tests.conftest import AnnouncedLogs
from tests.contract.tier_suite import key, put

A, B, C = (f"0b9f4a4e-7c1e-4d39-9a55-0a2f4b1c9d1{i}" for i in "abc")
SIZE = 1000 * MiB


class Worker:
    """One that says what it is told to say, and notes what it is lent. `gate`: it waits for that first."""

    def __init__(self, uid: str, used: int = 0) -> None:
        self.uid, self.used, self.opens, self.full = uid, used, 0, False
        self.open_objects = self.asked = 0
        self.lent: list[tuple[str, int, int, float]] = []
        self.gate: threading.Event | None = None
        self.fails: Exception | None = None

    def status(self) -> Mapping[str, Any]:
        self.asked += 1
        if self.gate is not None:
            self.gate.wait()
        if self.fails is not None:
            raise self.fails
        return {
            "tiers": [{
                "name": "ssd:x", "used": self.used, "entries": 1, "pinned": 0,
                "state": "full" if self.full else "ok",
            }],
            "reads": {"opens": self.opens, "open_objects": self.open_objects},
            "loads": [], "index": {"bytes": 4 * self.used},
        }  # fmt: skip

    def lease(self, tier: str, room: int, *, entries: int = 0, ttl: float) -> tuple[int, int]:
        self.lent.append((tier, room, entries, ttl))
        self.used = min(self.used, room)
        return room, entries


class Node:
    """A node in a directory, with workers that are there as long as their sockets are."""

    def __init__(self, tmp_path: Path, clock: VirtualClock) -> None:
        self.at, self.clock = tmp_path, clock
        self.workers: dict[str, Worker] = {}
        self.memory, self.staged = FakeMemory(), set[str]()
        self.sockets: list[socket.socket] = []
        roots = Roots(
            str(tmp_path / "state"), str(tmp_path / "run"), (str(tmp_path / "ssd"), str(tmp_path / "mem"))
        )
        self.register = Register(roots)
        self.accountant = Accountant(
            self.register, self.memory, clock=clock, staged=self.staged.__contains__, disk=self.disk,
            connect=lambda path: self.workers[os.path.basename(os.path.dirname(path))],
        )  # fmt: skip
        self.pool = ThreadPoolExecutor(16)

    def disk(self, directory: str) -> tuple[int, Disk] | None:
        return 1, Disk(SIZE, SIZE - sum(each.used for each in self.workers.values()))

    def live(self, uid: str, *, used: int = 0, places: tuple[Place, ...] = (), priority: int = 0) -> Worker:
        """A Dataset that lives here, with a worker."""
        ssd = Place("ssd:x", "ssd", f"{self.at}/ssd/{uid}/cache", 500 * MiB)
        said = Premises(f"team/{uid[-1]}", places or (ssd,), priority=priority)
        (self.at / "state" / uid).mkdir(parents=True)
        path = self.at / "state" / uid / premises.NAME
        path.write_text(json.dumps(asdict(said)))
        os.utime(path, (self.clock.wall(), self.clock.wall()))
        run = self.at / "run" / uid
        run.mkdir(parents=True)
        listening = socket.socket(socket.AF_UNIX)
        at = os.open(run, os.O_PATH)
        listening.bind(f"/proc/self/fd/{at}/7-77-0123abcd.sock")
        os.close(at)
        self.sockets.append(listening)
        worker = self.workers[uid] = Worker(uid, used)
        return worker

    def end(self, uid: str) -> None:
        """Its worker ends."""
        (self.at / "run" / uid / "7-77-0123abcd.sock").unlink()

    def round(self, seconds: float = 10.0) -> None:
        residents = self.register.residents()
        self.accountant.tend(residents)
        self.accountant.round(residents, self.pool)
        self.clock.advance(seconds)

    def holding(self, uid: str) -> Holding:
        found = self.accountant.holdings()
        assert found is not None
        return {each.uid: each for each in found}[uid]


@pytest.fixture
def node(tmp_path: Path, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    node = Node(tmp_path, clock)
    yield node
    for worker in node.workers.values():
        if worker.gate is not None:
            worker.gate.set()
    node.pool.shutdown()
    for listening in node.sockets:
        listening.close()


def test_leases_are_lent_each_round(node: Node) -> None:
    """Each worker is told what it may have, and for how long that holds."""
    a, b = node.live(A, used=100 * MiB), node.live(B)
    node.round()
    node.round()
    assert a.lent == b.lent == [("ssd:x", 450 * MiB, 0, TTL)] * 2
    assert node.holding(A) == Holding(A, "team", "a", 100 * MiB, 0, 400 * MiB, alive=True)


def test_who_was_not_used_gives_way(node: Node) -> None:
    """A data set is in use when it is opened, when a file of it is open, and when its volume is mounted:
    opens of the kernel's own are not heard of."""
    a, b, c = node.live(A, used=300 * MiB), node.live(B, used=300 * MiB), node.live(C, used=300 * MiB)
    for _ in range(int(IDLE // 10) + 1):
        b.opens += 1
        node.staged.add(C)
        node.round()
    b.full = True
    node.round()
    assert a.used < 300 * MiB and b.lent[-1][1] > 300 * MiB and c.used == 300 * MiB
    a.open_objects = 1
    left = a.used
    node.round()
    node.staged.clear()
    node.round()
    assert a.used == left and a.lent[-1][1] >= left


def test_a_plugin_that_has_just_begun_takes_nobody_for_idle(node: Node) -> None:
    """It does not know since when nobody reads."""
    a, b = node.live(A, used=450 * MiB), node.live(B, used=450 * MiB)
    b.full = True
    node.round()
    assert a.lent[-1][1] == b.lent[-1][1] == 450 * MiB


def test_one_that_hangs_stops_nobody(
    node: Node, logs: AnnouncedLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for once, for a bounded time; the others get their leases; what it had stays in the sums;
    and it is asked again when it has answered."""
    monkeypatch.setattr(accountant, "PATIENCE", 0.2)
    logs.expect("has not answered")
    a, b = node.live(A, used=300 * MiB), node.live(B, used=100 * MiB)
    node.round()
    a.gate = threading.Event()
    a.used = 310 * MiB
    for _ in range(3):
        node.round()
    assert len(a.lent) == 1 and len(b.lent) == 4 and a.asked == 2
    assert node.holding(A).cached == 300 * MiB and node.holding(A).alive
    gate, a.gate = a.gate, None
    gate.set()
    node.accountant._asked[A].result()
    node.round()
    assert len(a.lent) == 2 and node.holding(A).cached == 310 * MiB
    assert len(logs.messages()) == 1


def test_one_that_fails_stops_nobody(node: Node) -> None:
    """Nor does one that says nonsense."""
    a, b = node.live(A), node.live(B)
    a.fails = ControlError("no")
    node.round()
    assert not a.lent and len(b.lent) == 1
    for nonsense in ({}, {"tiers": 1}, {"tiers": [{}], "reads": {}, "loads": [], "index": {}}):
        with pytest.raises(ControlError):
            read_heard(nonsense)


def test_a_socket_that_is_none_of_a_worker(node: Node) -> None:
    """Files, links, and what others listen at beside it, are not asked."""
    node.live(A)
    run = node.at / "run" / A
    (run / "8-88-0123abcd.sock").write_text("")
    (run / "9-99-0123abcd.sock").symlink_to(run / "7-77-0123abcd.sock")
    (run / "plugin.sock").symlink_to(run / "7-77-0123abcd.sock")
    assert accountant.sockets(str(run)) == [str(run / "7-77-0123abcd.sock")]
    assert accountant.sockets(str(run / "nothing")) == []


def filled(node: Node, uid: str, count: int) -> Path:
    """Copies of a Dataset whose worker has ended: `count` MiB."""
    place = node.at / "ssd" / uid / "cache"
    place.mkdir(parents=True)
    tier = DirectoryTier(
        str(place), Rules("ssd:x", GiB, MiB, reserve=0, dataset="d"), owner=Owner(1, "", ""),
        clock=node.clock, keeper=False,
    )  # fmt: skip
    for i in range(count):
        node.clock.advance(1)
        put(tier, key(f"k{i}", MiB))
    tier.close()
    return place


def test_copies_of_one_without_a_worker_give_way(node: Node) -> None:
    """They are counted, and made fewer when others need the room: what was opened longest ago first."""
    place = filled(node, A, 20)
    node.live(A)
    node.end(A)
    b = node.live(B, used=500 * MiB)
    node.workers[A].used = 20 * MiB  # for the disk
    node.clock.advance(STARTING)
    node.round()
    assert node.holding(A) == Holding(A, "team", "a", 20 * MiB, 0, 0, alive=False)
    node.clock.advance(IDLE)
    b.opens, b.full, b.used = 1, True, 871 * MiB
    premises_of_b = node.at / "state" / B / premises.NAME
    text = premises_of_b.read_text().replace(str(500 * MiB), str(GiB))
    premises_of_b.write_text(text)
    node.round()
    assert node.holding(A).cached < 20 * MiB
    left = DirectoryTier(
        str(place), Rules("ssd:x", GiB, MiB, reserve=0), owner=Owner(1, "", ""), clock=node.clock,
        keeper=False,
    )  # fmt: skip
    assert sum(1 for _ in left.entries()) == node.holding(A).cached // MiB
    assert not left.present(key("k0", MiB))
    left.close()


def test_a_directory_that_somebody_owns_is_left_alone(node: Node) -> None:
    """A worker that does not listen yet, or no longer."""
    place = filled(node, A, 3)
    node.live(A)
    node.end(A)
    owner = DirectoryTier(
        str(place), Rules("ssd:x", GiB, MiB, reserve=0), owner=Owner(1, "", ""), clock=node.clock,
        keeper=False,
    )  # fmt: skip
    node.clock.advance(STARTING)
    node.round()
    assert node.holding(A).cached == 0 and node.holding(A).alive
    owner.close()
    node.round()
    assert node.holding(A).cached == 3 * MiB and not node.holding(A).alive


def test_a_worker_that_has_just_begun_finds_its_directories_free(node: Node) -> None:
    """It says that it comes before it opens them: from then on nobody else does, though it does not listen
    yet."""
    filled(node, A, 3)
    node.live(A)
    node.end(A)
    node.round(STARTING)
    assert node.holding(A).alive and node.holding(A).cached == 0
    node.round()
    assert not node.holding(A).alive and node.holding(A).cached == 3 * MiB


def mem(node: Node, uid: str, quota: int = MiB) -> tuple[str, tuple[Place, ...]]:
    home = f"{node.at}/mem/{uid}"
    return home, (Place("mem:x", "mem", f"{home}/cache", quota, True),)


def test_a_tmpfs_is_there_before_its_worker_and_goes_long_after(node: Node) -> None:
    """It is mounted as soon as a worker says that it waits for one, stays while workers come and go, and is
    taken off when none has been there for long; the next one has it again."""
    home, places = mem(node, A)
    node.live(A, places=places)
    node.accountant.tend(node.register.residents())
    assert node.memory.mounted == {home: MiB}
    node.round()
    node.end(A)
    for _ in range(int(FORGOTTEN // 10)):
        assert home in node.memory.mounted
        node.round()
    node.round()
    assert node.memory.mounted == {}
    path = node.at / "state" / A / premises.NAME
    os.utime(path, (node.clock.wall(), node.clock.wall()))
    node.accountant.tend(node.register.residents())
    assert home in node.memory.mounted


def test_a_tmpfs_that_is_in_use_stays(node: Node, logs: AnnouncedLogs) -> None:
    """That is said once, and tried again."""
    logs.expect("cannot be taken off")
    home, places = mem(node, A)
    node.live(A, places=places)
    node.round()
    node.end(A)
    node.memory.busy.add(home)
    for _ in range(int(FORGOTTEN // 10) + 5):
        node.round()
    assert home in node.memory.mounted
    node.memory.busy.clear()
    node.round()
    assert home not in node.memory.mounted
    assert len(logs.messages()) == 1


def test_a_tmpfs_follows_the_quota(node: Node, logs: AnnouncedLogs) -> None:
    """Made smaller it waits until what is in it fits."""
    logs.expect("cannot be resized")
    home, places = mem(node, A, 8 * MiB)
    node.live(A, places=places)
    node.round()
    path = node.at / "state" / A / premises.NAME
    path.write_text(path.read_text().replace(str(8 * MiB), str(2 * MiB)))
    node.memory.held[home] = 3 * MiB
    node.round()
    assert node.memory.mounted == {home: 8 * MiB}
    node.memory.held[home] = 1 * MiB
    node.round()
    assert node.memory.mounted == {home: 2 * MiB}


def test_a_tier_in_memory_of_its_own_is_not_leased(node: Node) -> None:
    """There is nobody to share it with."""
    _, places = mem(node, A)
    worker = node.live(A, places=places)
    node.round()
    assert worker.lent == []


def test_it_runs_until_it_is_told_to_end(node: Node, logs: AnnouncedLogs) -> None:
    """A round of which one part fails is followed by the next."""
    logs.expect("a round of the node's accounts failed")
    a = node.live(A)
    stop, failing = threading.Event(), [True]

    def disk(directory: str) -> tuple[int, Disk] | None:
        if failing:
            failing.pop()
            raise RuntimeError("a fault of ours")
        stop.set()
        return 1, Disk(SIZE, SIZE)

    node.accountant._disk = disk
    node.accountant.run(stop)
    assert len(a.lent) == 1
