"""A mount that can be written to, made by an ordinary user through fusermount3."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from datacache.model import MountPoint
from tests.daemon.mounted.conftest import UNCOVERED, check_way, flushed, start_writable, writable

USER = 65534


OPEN_DOOR = """
mknod -m 666 "$0" c 10 229
mount --bind "$0" /dev/fuse
exec "$@"
"""
"""/dev/fuse is for all on most machines. Here it is, whatever this one says, in a name space of its own."""


def as_user() -> list[str]:
    """What makes a program the user's. Our interpreter may lie where only root looks: to look is all that the
    capability lets it do more."""
    kept = "-all,+dac_read_search"
    return [
        "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", f"--inh-caps={kept}",
        f"--ambient-caps={kept}", *UNCOVERED,
    ]  # fmt: skip


PROGRAM = """
import os, sys, mmap
os.chdir(sys.argv[1])
assert open("old", "rb").read() == b"old"
with open("old", "ab") as file:
    file.write(b" and new")
os.mkdir("d")
with open("d/file", "w+b") as file:
    file.truncate(8192)
    with mmap.mmap(file.fileno(), 8192) as mapped:
        mapped[4096:4100] = b"four"
    os.fsync(file.fileno())
os.rename("d/file", "moved")
os.symlink("moved", "link")
os.chmod("moved", 0o600)
os.setxattr("moved", "user.one", b"1")
found = os.stat("moved")
assert (found.st_uid, found.st_mode & 0o777) == (os.getuid(), 0o600), found
with open("gone", "w+b") as file:
    os.unlink("gone")
    file.write(b"x")
assert open("link", "rb").read(4100)[-4:] == b"four"
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of the user's: pytest's are closed to all others."""
    with tempfile.TemporaryDirectory(prefix="datacache-user-") as directory:
        home = Path(directory)
        for name in (".", "bucket", "mnt", "state", "runtime", "cache", "landing"):
            (home / name).mkdir(exist_ok=True)
            os.chown(home / name, USER, USER)
        (home / "bucket" / "old").write_bytes(b"old")
        os.chown(home / "bucket" / "old", USER, USER)
        yield home


@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare", "nsenter"))),
    reason="becomes another user, as root",
)
@pytest.mark.parametrize("way", ["native", "pyfuse3"])
def test_an_ordinary_user_writes(home: Path, way: str) -> None:
    """All is done, and in the bucket, as root would have it; the daemon serves the bytes."""
    check_way(way)
    bucket = home / "bucket"
    store = MountPoint(bucket.as_uri())
    with writable(home, way, store, bucket=bucket, allow_other=False, start=False) as one:
        one.via = ["unshare", "-m", "sh", "-ec", OPEN_DOOR, str(home / "fuse"), *as_user()]
        start_writable(one, way)
        assert one.process is not None
        there = ["nsenter", f"--mount=/proc/{one.process.pid}/ns/mnt", *as_user()]
        done = subprocess.run(
            [*there, sys.executable, "-c", PROGRAM, str(one.directory)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        flushed(one)
        assert (bucket / "old").read_bytes() == b"old and new"
        assert (bucket / "moved").read_bytes()[4096:4100] == b"four"
        assert sorted(path.name for path in bucket.iterdir()) == ["d", "link", "moved", "old"]
