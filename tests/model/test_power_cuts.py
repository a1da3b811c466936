"""
Power cuts: a landing zone on a disk whose state is taken at random moments, while files are written.

Whatever `sync` had acknowledged before the moment must be there, with its bytes, after the file system
was mounted again and the journal read by the next process. Nothing half-written may show as whole.
"""

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from datacache.clock import VirtualClock
from datacache.sources.memory import MemorySource
from tests.support import power
from tests.support.overlays import Mounted, Place

SIZES = (0, 1, 4096, 70_000, 300_000)


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


class Writer(threading.Thread):
    """Writes files, renames some of them, and knows what was acknowledged."""

    def __init__(self, mounted: Mounted, number: int, stop: threading.Event) -> None:
        super().__init__(name=f"writer-{number}")
        self.mounted, self.number, self.stop = mounted, number, stop
        self.lock = threading.Lock()
        self.acknowledged: dict[str, bytes] = {}
        self.may_be_gone: set[str] = set()
        """Names that are just being renamed."""
        self.begun = threading.Event()
        """Something was acknowledged."""
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.failed = error

    def work(self) -> None:
        rng = random.Random(self.number)
        count = 0
        while not self.stop.is_set():
            count += 1
            if count > 40:
                self.remove(f"/w{self.number}/{count - 40:05}")
            name = f"/w{self.number}/{count:05}"
            data = content(name, rng.choice(SIZES))
            self.mounted.write(name, data)  # create, write, sync, close
            with self.lock:
                self.acknowledged[name] = data
            if count % 3 == 0:
                self.rename(name, f"/w{self.number}/last")
            self.begun.set()

    def remove(self, name: str) -> None:
        with self.lock:
            there = self.acknowledged.pop(name, None)
        if there is not None:
            self.mounted.overlay.unlink(*self.mounted.at(name))

    def rename(self, name: str, new: str) -> None:
        with self.lock:
            self.may_be_gone |= {name, new}
        self.mounted.overlay.rename(*self.mounted.at(name), *self.mounted.at(new), replace=True)
        self.mounted.overlay.sync_names()
        with self.lock:
            self.acknowledged[new] = self.acknowledged.pop(name)
            self.may_be_gone -= {name, new}

    def known(self) -> dict[str, bytes]:
        with self.lock:
            return {p: d for p, d in self.acknowledged.items() if p not in self.may_be_gone}


def cut_the_power(tmp_path: Path, cuts: int) -> None:
    with power.disk(tmp_path) as disk:
        place = Place(disk.root, MemorySource(), VirtualClock())
        mounted = Mounted(place)
        stop = threading.Event()
        writers = []
        for number in range(3):
            mounted.overlay.mkdir(*mounted.at(f"/w{number}"), mode=0o755, uid=0, gid=0)
            writers.append(Writer(mounted, number, stop))
        mounted.overlay.sync_names()
        for writer in writers:
            writer.start()
        try:
            for writer in writers:
                assert writer.begun.wait(30)
            for _ in range(cuts):
                check_one(disk, place, writers)
        finally:
            stop.set()
            for writer in writers:
                writer.join()
            mounted.close()
        for writer in writers:
            if writer.failed is not None:
                raise writer.failed


def check_one(disk: power.Disk, place: Place, writers: list[Writer]) -> None:
    known = {path: data for writer in writers for path, data in writer.known().items()}
    with disk.cut() as root:
        still = {path for writer in writers for path in writer.known()} | {
            path for writer in writers for path in writer.acknowledged
        }
        after = Mounted(replace(place, root=root))
        try:
            tree = after.tree()
        finally:
            after.close()
    assert known, "nothing was acknowledged yet: this cut shows nothing"
    for path, data in known.items():
        if path.endswith("/last") or path not in still:
            continue  # it may have been renamed over, or removed, in the moment before the cut
        assert tree.get(path) == data, f"{path} was acknowledged and is not there as it was"
    for path, found in tree.items():
        if found is not None and not path.endswith("/last"):
            assert len(found) in SIZES, f"{path} is there in part"
            assert found == content(path, len(found)), f"{path} holds what nobody wrote"


@pytest.mark.skipif(bool(power.missing()), reason=power.missing())
def test_what_was_acknowledged_survives_power_cuts(tmp_path: Path) -> None:
    """When `fsync` has returned 0, the bytes survive a power cut of the node."""
    cut_the_power(tmp_path, 20)


@pytest.mark.long
@pytest.mark.skipif(bool(power.missing()), reason=power.missing())
def test_what_was_acknowledged_survives_many_power_cuts(tmp_path: Path) -> None:
    """The same, 200 times."""
    for part in range(10):
        (tmp_path / str(part)).mkdir()
        cut_the_power(tmp_path / str(part), 20)
