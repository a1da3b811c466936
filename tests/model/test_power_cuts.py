"""
Power cuts: a landing zone on a disk whose state is taken at random moments, while files are written.

Whatever `sync` had acknowledged before the moment must be there, with its bytes, after the file system
was mounted again and the journal read by the next process. Nothing half-written may show as whole.

The cache lies on the same disk, and the bucket is paid meanwhile: files go to the cache as they are, and
come back to be written in place. Whatever is in the cache after the cut is what it says.
"""

import ctypes
import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from datacache.cache.directory import DirectoryTier
from datacache.clock import VirtualClock
from datacache.sources.memory import MemorySource
from tests.conftest import AnnouncedLogs
from tests.support import power
from tests.support.overlays import Mounted, Place

SIZES = (0, 1, 4096, 70_000, 300_000)
FILES, SIZE = 6, 200_000
"""Files that are written again and again in place, and their bytes."""
CHANGED = "/w2"
UNSYNCED = ".unsynced."
"""In the names of what was never acknowledged: the file system may know the size of it, and not the bytes."""
PAGE = 4096
LATER = 1000.0
"""Seconds until the machine is up again: no listing of before is believed."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


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


class Changer(Writer):
    """Writes a few files in place. What it is at may be there in part."""

    def work(self) -> None:
        rng = random.Random(self.number)
        for number in range(FILES):
            self.change(f"/w{self.number}/{number}", rng.randbytes(SIZE), 0)
        self.begun.set()
        while not self.stop.is_set():
            path, offset = f"/w{self.number}/{rng.randrange(FILES)}", rng.randrange(SIZE - 1)
            self.change(path, rng.randbytes(rng.randrange(1, SIZE - offset)), offset)

    def change(self, path: str, data: bytes, offset: int) -> None:
        with self.lock:
            self.may_be_gone.add(path)
        self.mounted.write(path, data, offset)
        with self.lock:
            before = self.acknowledged.get(path, b"")
            self.acknowledged[path] = before[:offset] + data + before[offset + len(data) :]
            self.may_be_gone.discard(path)


class Payer(Writer):
    """Pays the bucket, and does what the keeper of the cache does."""

    def work(self) -> None:
        while not self.stop.is_set():
            self.mounted.pay_if_it_can_be()
            tier = self.mounted.cache
            assert isinstance(tier, DirectoryTier) and tier.store is not None
            tier.store.sync()
            tier.upkeep()
            for one in list(tier.entries()):
                if not f"/{one.key.key}".startswith(CHANGED):
                    tier.evict(one.key)  # so that there is not ever more to be looked at


def cut_the_power(tmp_path: Path, cuts: int) -> None:
    with power.disk(tmp_path, block=PAGE) as disk:
        place = Place(disk.root, MemorySource(), VirtualClock(), cached=True)
        mounted = Mounted(place)
        stop = threading.Event()
        writers: list[Writer] = []
        for number, kind in enumerate((Writer, Writer, Changer)):
            mounted.overlay.mkdir(*mounted.at(f"/w{number}"), mode=0o755, uid=0, gid=0)
            writers.append(kind(mounted, number, stop))
        mounted.overlay.sync_names()
        payer = Payer(mounted, 9, stop)
        for writer in (*writers, payer):
            writer.start()
        try:
            for writer in writers:
                assert writer.begun.wait(30)
            for _ in range(cuts):
                check_one(disk, place, writers)
        finally:
            stop.set()
            for writer in (*writers, payer):
                writer.join()
            taken = mounted.overlay.copies.stats()
            mounted.close()
        assert taken.kept_files and taken.landed_files, "nothing went to the cache or back"
        for writer in (*writers, payer):
            if writer.failed is not None:
                raise writer.failed


@contextmanager
def cut_of(disk: power.Disk, bucket: MemorySource) -> Iterator[tuple[Path, MemorySource]]:
    """The disk and the bucket of one moment."""
    with ExitStack() as cut:
        with bucket._lock:
            root, found = cut.enter_context(disk.cut()), dict(bucket._objects)
        yield root, MemorySource(objects={key.decode(): stored.data for key, stored in found.items()})


def check_one(disk: power.Disk, place: Place, writers: list[Writer]) -> None:
    known = {path: data for writer in writers for path, data in writer.known().items()}
    with cut_of(disk, place.bucket) as (root, bucket):
        unchanged = {path: data for writer in writers for path, data in writer.known().items()}
        still = {path for writer in writers for path in writer.known()} | {
            path for writer in writers for path in writer.acknowledged
        }
        later = VirtualClock(place.clock.wall() + LATER)
        after = Mounted(replace(place, root=root, bucket=bucket, boot="two", clock=later))
        try:
            assert after.wrong_in_cache() == []
            tree = after.tree()
        finally:
            after.close()
    assert known, "nothing was acknowledged yet: this cut shows nothing"
    for path, data in known.items():
        if path.startswith(CHANGED) and unchanged.get(path) != data:
            continue  # it was written since, perhaps before the cut
        if path.endswith("/last") or path not in still:
            continue  # it may have been renamed over, or removed, in the moment before the cut
        assert tree.get(path) == data, f"{path} was acknowledged and is not there as it was"
    for path, found in tree.items():
        if found is None or path.endswith("/last") or path.startswith(CHANGED) or UNSYNCED in path:
            continue
        assert len(found) in SIZES, f"{path} is there in part"
        assert found == content(path, len(found)), f"{path} holds what nobody wrote"


@pytest.mark.skipif(bool(power.missing()), reason=power.missing())
def test_the_cache_does_not_vouch_for_what_is_written_in_place(tmp_path: Path) -> None:
    """A cached file that was landed has been forgotten for good before its bytes change, though they reach
    the disk before the names do."""
    with power.disk(tmp_path) as disk:
        place = Place(disk.root, MemorySource(), VirtualClock(), cached=True)
        mounted = Mounted(place)
        try:
            write_in_place_and_cut(disk, mounted)
        finally:
            mounted.close()


def write_in_place_and_cut(disk: power.Disk, mounted: Mounted) -> None:
    mounted.write("/a", content("/a", SIZE))
    mounted.drain()
    assert isinstance(mounted.cache, DirectoryTier) and mounted.cache.store is not None
    mounted.cache.store.sync()
    os.sync()
    ino = mounted.overlay.resolve("/a").ino
    mounted.overlay.land(ino)
    assert mounted.overlay.copies.stats().landed_files == 1
    file = mounted.overlay.open(ino, writing=True)
    try:
        os.pwrite(file.descriptor, b"!" * SIZE, 0)
        assert not _libc.sync_file_range(file.descriptor, 0, 0, 7)  # its bytes, and nothing else
        with disk.cut() as root:
            after = Mounted(replace(mounted.place, root=root, boot="two"))
            try:
                assert after.wrong_in_cache() == []
            finally:
                after.close()
    finally:
        mounted.overlay.closed(ino, file)


@pytest.mark.skipif(bool(power.missing()), reason=power.missing())
def test_what_was_acknowledged_survives_power_cuts(tmp_path: Path, logs: AnnouncedLogs) -> None:
    """When `fsync` has returned 0, the bytes survive a power cut of the node."""
    logs.expect("never synced")
    logs.expect("none of it is there")
    cut_the_power(tmp_path, 20)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(bool(power.missing()), reason=power.missing())
def test_what_was_acknowledged_survives_many_power_cuts(tmp_path: Path, logs: AnnouncedLogs) -> None:
    """The same, 200 times."""
    logs.expect("never synced")
    logs.expect("none of it is there")
    for part in range(10):
        (tmp_path / str(part)).mkdir()
        cut_the_power(tmp_path / str(part), 20)
