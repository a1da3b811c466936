"""A mount whose landing zone is filled to its last block by those who write to it."""

import errno
import os
from pathlib import Path

import pytest

from datacache.config.settings import MountSettings, WritingSettings
from datacache.model import MiB
from fuse import mountpoint
from tests.daemon.mounted.conftest import Start
from tests.support import power
from tests.support.reading import until


@pytest.mark.skipif(bool(power.missing()), reason=power.missing())
def test_writers_meet_the_end_of_the_disk_and_nothing_is_lost(
    daemon: Start, bucket: Path, tmp_path: Path
) -> None:
    """ENOSPC to who writes, nothing is dropped; what was written before, and what fitted of it, is uploaded,
    and then there is room."""
    with power.disk(tmp_path, size=96 * MiB, block=4096) as disk:
        writing = WritingSettings(enabled=True, landing=str(disk.root / "landing"))
        one = daemon(mount=MountSettings(), writing=writing)
        mnt = one.directory
        for number in range(50):
            (mnt / f"f{number}").write_bytes(b"%d" % number)
        size = 0
        with open(mnt / "huge", "wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space") as caught:
                while True:
                    size += file.write(b"x" * MiB)
            assert caught.value.errno == errno.ENOSPC
            (mnt / "f0").unlink()
            (mnt / "f1").rename(mnt / "f1b")
        size = os.stat(mnt / "huge").st_size
        until(
            lambda: (bucket / "huge").exists() and (bucket / "f1b").exists() and not (bucket / "f0").exists()
        )
        assert (bucket / "huge").stat().st_size == size > 40 * MiB
        until(lambda: os.statvfs(mnt).f_bavail * 4096 > 40 * MiB)
        (mnt / "more").write_bytes(b"more")
        until(lambda: (bucket / "more").exists())
        names = {"f1b", "huge", "more", *(f"f{number}" for number in range(2, 50))}
        assert set(os.listdir(mnt)) == names == set(os.listdir(bucket))
        mountpoint.unmount(str(mnt))
        assert one.wait() == 0
