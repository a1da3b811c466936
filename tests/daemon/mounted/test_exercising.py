"""One file of a mount under random operations; and fio, which verifies what it wrote."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from datacache.model import MountPoint
from tests.daemon.mounted.conftest import WAYS, Daemon, check_way, flushed, writable
from tests.support.exerciser import Exerciser

SEED = int(os.environ.get("SEED", "1"))
"""Operations follow from it alone."""
COUNT = int(os.environ.get("COUNT", "1000000"))
"""Operations of the long run."""
AT_ONCE = 2000


@pytest.fixture(scope="module", params=WAYS)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A mount for all tests of one way."""
    check_way(request.param)
    base = tmp_path_factory.mktemp(request.param)
    bucket = base / "bucket"
    bucket.mkdir()
    with writable(base, request.param, MountPoint(bucket.as_uri()), bucket=bucket) as one:
        yield one


def exercise(one: Daemon, seed: int, count: int) -> None:
    """`count` operations on a file that is uploaded whenever it is closed; then the bucket has it, too."""
    name = f"file{seed % 3}"
    chance = random.Random(seed)

    def between() -> None:
        if chance.random() < 0.2:
            flushed(one)

    done = Exerciser(str(one.directory / name), seed, between=between).run(count)
    flushed(one)
    assert (one.bucket / name).read_bytes() == done.model
    assert one.status()["mount_files"]["errors"] == {}


def test_a_file_is_what_was_done_to_it(one: Daemon) -> None:
    """2,000 operations: reads, writes, cuts, holes, mappings, renames, opens and closes."""
    exercise(one, SEED, AT_ONCE)


@pytest.mark.long
@pytest.mark.timeout(6000)
def test_a_file_is_what_was_done_to_it_for_long(one: Daemon) -> None:
    """A million of them."""
    for part in range(COUNT // AT_ONCE):
        exercise(one, SEED * 1_000_000 + part, AT_ONCE)


def fio(directory: Path, *, size: str, seconds: int, jobs: int) -> None:
    """Random and sequential writes by several processes, each block with its checksum; read and verified."""
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    for name, more in (
        ("random", ["--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned", "--ioengine=psync"]),
        ("sequential", ["--rw=write", "--bs=128k", "--ioengine=psync", "--end_fsync=1"]),
        ("mapped", ["--rw=randwrite", "--bs=4k", "--ioengine=mmap"]),
    ):
        done = subprocess.run(
            [
                "fio", f"--name={name}", f"--directory={directory}", f"--size={size}", f"--numjobs={jobs}",
                "--verify=crc32c", "--verify_state_save=0", "--do_verify=1", "--verify_fatal=1",
                "--fallocate=none", "--group_reporting", f"--randseed={SEED}", *more, f"--runtime={seconds}",
            ],
            capture_output=True, text=True, timeout=seconds * 10 + 60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_fio_finds_what_it_wrote(one: Daemon) -> None:
    """Each block with its checksum, from two processes."""
    fio(one.directory, size="2m", seconds=5, jobs=2)
    flushed(one)
    for path in one.directory.glob("random.*"):
        assert (one.bucket / path.name).read_bytes() == path.read_bytes()


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_fio_finds_what_it_wrote_for_long(one: Daemon) -> None:
    """More, and longer."""
    fio(one.directory, size="64m", seconds=120, jobs=4)
    flushed(one, seconds=300)
