"""
Deaths of the process and of the machine, the real ones: `kill -9` of a process that fills from
several threads, and a file system that stops at once, as in a power cut, under the same load.

The power cut: EXT4_IOC_SHUTDOWN without a flush of the journal. From then on nothing reaches the
disk; what is mounted afterwards is what ext4 makes of what did.
"""

import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from datacache.cache.directory import MANAGED, DirectoryTier, Owner
from datacache.cache.verify import verify
from datacache.clock import VirtualClock
from datacache.errors import Damaged
from datacache.model import ByteRange, CacheKey, Coverage
from tests.contract.tier_suite import content, whole
from tests.support.faulty_disk import FaultyDisk
from tests.support.filler import QUOTA, object_of, rules

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_AT_ONCE = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH
ROOT = Path(__file__).parents[2]

Said = dict[CacheKey, Coverage]


class Filler:
    """The process, and what it has said so far."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.filler", str(directory), str(seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it complains when its disk is gone
            text=True,
        )
        self.filled: Said = defaultdict(Coverage)
        self.synced: Said = defaultdict(Coverage)
        self.evicted: set[CacheKey] = set()

    def listen(self, lines: int) -> None:
        """Take in what it says, `lines` of it (-1: until it is dead)."""
        assert self.process.stdout is not None
        while lines:
            line = self.process.stdout.readline()
            if not line.endswith("\n"):
                assert lines < 0, "the filler has ended by itself"
                return
            lines -= 1
            what, *words = line.split()
            if what == "evicted":
                self.evicted.add(object_of(words[0]))
            elif what in ("filled", "synced"):
                said = self.filled if what == "filled" else self.synced
                said[object_of(words[0])].add(ByteRange(int(words[1]), int(words[2])))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.listen(-1)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def open_tier(directory: Path, boot: str, disk: FaultyDisk | None = None) -> DirectoryTier:
    owner = Owner(os.getpid(), "", "")
    return DirectoryTier(
        str(directory), rules(), owner=owner, clock=VirtualClock(), disk=disk, boot=boot, keeper=False
    )


def tidy(tier: DirectoryTier) -> None:
    tier.upkeep()
    while tier.store is not None and not tier.store.surveyed:
        tier.upkeep()


def space_taken(directory: Path) -> int:
    objects = directory / MANAGED / "objects"
    return sum(path.stat().st_blocks * 512 for path in objects.rglob("*") if path.is_file())


def kill_once(directory: Path, seed: int) -> None:
    filler = Filler(directory, seed)
    try:
        filler.listen(20 + random.Random(seed).randrange(600))
    finally:
        filler.kill()
    disk = FaultyDisk()
    tier = open_tier(directory, "one", disk)
    for each, said in filler.filled.items():
        if each in filler.evicted:
            continue
        file = tier.open(each)
        for span in said.ranges():
            assert file.gaps(span) == [], "a fill that had returned is not there"
            disk.reads = 0
            assert bytes(file.read(span)) == content(each)[span.start : span.stop]
            assert disk.reads == 1, "after a mere kill nothing is read again"
        file.close()
    for each in filler.evicted:  # whatever it was doing with them
        file = tier.open(each)
        for span in Coverage(tier.ranges(each)).ranges():
            assert bytes(file.read(span)) == content(each)[span.start : span.stop]
        file.close()
    tidy(tier)
    used = tier.stats()[0].used
    assert space_taken(directory) <= used <= QUOTA
    tier.close()
    assert verify(str(directory), repair=False).problems == ()


def test_kill_9_under_load(tmp_path: Path) -> None:
    """After `kill -9` what was cached is cached, and nothing is read again to prove it: three deaths of
    one cache directory, after which what was acknowledged is there, and nothing is left over."""
    for seed in range(3):
        kill_once(tmp_path, seed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_kill_9_under_load_many_times(tmp_path: Path) -> None:
    """Fifty more."""
    for seed in range(100, 150):
        kill_once(tmp_path, seed)


class Ext4:
    """An ext4 file system in a file, mounted."""

    def __init__(self, folder: Path, options: str) -> None:
        self.image, self.at, self.options = folder / "image", folder / "mnt", options
        self.device = ""
        self.at.mkdir()
        with self.image.open("wb") as file:
            file.truncate(192 << 20)
        self._run("mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(self.image))
        self.mount()

    @staticmethod
    def _run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()}")
        return done.stdout.strip()

    def mount(self) -> None:
        # On a device that nobody has had before. `mount -o loop` takes the one that the image has, and where
        # something still holds that (another name space does that has a copy of the mount) its file system
        # with it: the one that was shut down, and answers EIO.
        self.device = self._run("losetup", "--find", "--show", str(self.image))
        try:
            self._run("mount", "-o", self.options, self.device, str(self.at))
        except BaseException:
            self._run("losetup", "--detach", self.device)
            raise

    def cut(self) -> None:
        """From now on nothing reaches the disk."""
        fd = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _AT_ONCE))
        except OSError as error:
            pytest.skip(f"this kernel cannot shut a file system down: {error}")
        finally:
            os.close(fd)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.at)], check=True, timeout=60)
        subprocess.run(["losetup", "--detach", self.device], check=True, timeout=60)


def cut_once(disk: Ext4, seed: int) -> tuple[int, int]:
    """One cut, and the morning after: blocks that were read and right, and blocks found damaged."""
    directory = disk.at / "cache"
    filler = Filler(directory, seed)
    try:
        filler.listen(100 + random.Random(seed).randrange(900))
        disk.cut()
    finally:
        filler.kill()
    disk.unmount()
    disk.mount()
    tier = open_tier(directory, f"after {seed}")
    right = damaged = 0
    names = {f"{n}/{k}" for n in range(3) for k in range(60)}
    for each in sorted(object_of(name) for name in names):
        file = tier.open(each)
        dropped = -1
        while dropped:  # a read that runs into what was just dropped says nothing of the blocks behind it
            dropped = 0
            for span in tier.ranges(each):
                for start in range(span.start, span.stop, 16384):
                    piece = ByteRange(start, min(start + 16384, span.stop))
                    try:
                        assert bytes(file.read(piece)) == content(each)[piece.start : piece.stop], (
                            "a wrong byte"
                        )
                        right += 1
                    except Damaged:
                        dropped += 1
            damaged += dropped
        for span in filler.synced[each].ranges():
            assert file.gaps(span) == [], "what was synced is not there"
        assert bytes(file.read(ByteRange(0, 0))) == b"" and whole(each)
        file.close()
    tidy(tier)
    used = tier.stats()[0].used
    tier.close()
    assert space_taken(directory) <= used <= QUOTA
    assert verify(str(directory), repair=False).problems == ()
    return right, damaged


def cut_often(folder: Path, options: str, seeds: range) -> None:
    disk = Ext4(folder, options)
    try:
        seen = [cut_once(disk, seed) for seed in seeds]
    finally:
        disk.unmount()
    assert sum(right for right, _ in seen) > 0, "no cut left anything to look at"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


@needs_root
def test_a_disk_whose_power_was_cut_comes_back_whoever_else_has_it(tmp_path: Path) -> None:
    """A process with a mount table of its own keeps what was mounted when it began: the morning after is a
    fresh mount all the same."""
    disk = Ext4(tmp_path, "data=ordered")
    (disk.at / "file").write_bytes(b"x")
    os.sync()
    program = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; cat"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        disk.cut()
        disk.unmount()
        disk.mount()
        (disk.at / "lock").write_bytes(b"y")
        assert (disk.at / "file").read_bytes() == b"x"
        disk.unmount()
        holder.communicate()


@needs_root
@pytest.mark.parametrize("options", ["data=ordered", "data=writeback,commit=1"])
def test_power_cuts_under_load(tmp_path: Path, options: str) -> None:
    """Never a wrong byte; what was synced is there; the space is counted; `verify` agrees."""
    cut_often(tmp_path, options, range(2))


@needs_root
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("options", ["data=ordered", "data=writeback,commit=1"])
def test_power_cuts_under_load_many_times(tmp_path: Path, options: str) -> None:
    """Fifty more of both."""
    cut_often(tmp_path, options, range(100, 150))
