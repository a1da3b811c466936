"""
A disk whose power can be cut: an ext4 file system on a loop device, whose image lies on a file system
that can clone a file in one moment (XFS). What such a clone holds is what had reached the disk.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_FICLONE = 0x40049409


def missing() -> str:
    """Why there can be none here; empty where there can."""
    if os.geteuid() != 0:
        return "loop devices need root"
    absent = [tool for tool in ("mkfs.xfs", "mkfs.ext4", "losetup") if shutil.which(tool) is None]
    return f"{', '.join(absent)} is not installed" if absent else ""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout.strip()


@contextlib.contextmanager
def _mounted(image: Path, at: Path) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    device = _run("losetup", "--find", "--show", str(image))
    try:
        _run("mount", device, str(at))
        try:
            yield at
        finally:
            # Lazily where a test that failed has left files open: nothing of it stays behind.
            if subprocess.run(["umount", str(at)], capture_output=True, timeout=60).returncode:
                _run("umount", "--lazy", str(at))
    finally:
        _run("losetup", "--detach", device)


class Disk:
    """See the module."""

    def __init__(self, root: Path, image: Path) -> None:
        self.root = root
        """Where it is mounted."""
        self._image = image
        self._cuts = 0

    @contextlib.contextmanager
    def cut(self) -> Iterator[Path]:
        """Where the disk is mounted as it was in this moment, after its file system was repaired."""
        self._cuts += 1
        clone = self._image.with_name(f"cut-{self._cuts}")
        with open(self._image, "rb") as source, open(clone, "wb") as target:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        try:
            with _mounted(clone, clone.with_suffix(".mnt")) as at:
                yield at
        finally:
            clone.unlink()


@contextlib.contextmanager
def disk(tmp_path: Path, *, size: int = 192 << 20, block: int = 1024) -> Iterator[Disk]:
    """A disk of `size` bytes, until the block is left. With blocks of a page (4096), as large file systems
    have them, ext4 may know the size of a file before its bytes: what was not synced is zeros after a cut."""
    outer = tmp_path / "outer"
    with open(outer, "wb") as file:
        file.truncate(1 << 30)
    _run("mkfs.xfs", "-q", "-m", "reflink=1", str(outer))
    with _mounted(outer, tmp_path / "clones") as clones:
        image = clones / "disk"
        with open(image, "wb") as file:
            file.truncate(size)
        _run("mkfs.ext4", "-q", "-F", "-b", str(block), str(image))
        with _mounted(image, tmp_path / "disk") as root:
            yield Disk(root, image)
