"""The tmpfs of a MEM tier: what there is to do about one, and one that is really mounted."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi import tmpfs
from csi.tmpfs import Act, FakeMemory, LinuxMemory, Memory, act
from datacache.cache import limits
from datacache.errors import MountError
from datacache.model import GiB, KiB, MiB


@pytest.mark.parametrize(
    ("there", "needed", "expected"),
    [
        (None, True, Act.MOUNT),
        (None, False, Act.NOTHING),
        (8192, True, Act.NOTHING),
        (4096, True, Act.RESIZE),
        (8192, False, Act.UNMOUNT),
    ],
)
def test_what_there_is_to_do(there: int | None, needed: bool, expected: Act) -> None:
    """It is there while it is needed, and just as large as the quota, in whole pages."""
    assert act(there, 8000, needed=needed) is expected


def test_it_is_bounded_in_bytes_and_in_files() -> None:
    """A file takes a page at least; without a number of inodes empty files would fill the kernel's memory."""
    assert tmpfs.options(8000) == "size=8192,nr_inodes=1026,mode=0700"
    assert tmpfs.inodes(40 * GiB) == 40 * GiB // 4096 + 1024


@pytest.fixture(params=["linux", "fake"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Memory]:
    if request.param == "fake":
        yield FakeMemory()
        return
    if os.geteuid() != 0:
        pytest.skip("only root mounts a tmpfs")
    try:
        LinuxMemory().mount(str(tmp_path / "probe"), 4096)
    except MountError as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    LinuxMemory().unmount(str(tmp_path / "probe"))
    yield LinuxMemory()
    for point in reversed(limits.mount_points()):
        if point.startswith(f"{tmp_path}/"):
            LinuxMemory().unmount(point)


def test_a_tmpfs_comes_and_goes(memory: Memory, tmp_path: Path) -> None:
    """It is mounted in a directory that need not be there, resized, and taken off."""
    place = str(tmp_path / "of" / "a-dataset")
    assert memory.size(place) is None
    memory.mount(place, 1 * MiB + 1)
    assert memory.size(place) == 1 * MiB + 4 * KiB
    memory.resize(place, 2 * MiB)
    assert memory.size(place) == 2 * MiB
    memory.unmount(place)
    assert memory.size(place) is None


def real(memory: Memory) -> LinuxMemory:
    if not isinstance(memory, LinuxMemory):
        pytest.skip("only of the real one")
    return memory


def test_what_the_real_one_is_like(memory: Memory, tmp_path: Path) -> None:
    """Nobody but root gets in, nothing in it is run or is a device, and it holds no more than it should."""
    place = tmp_path / "mem"
    real(memory).mount(str(place), 1 * MiB)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    flags = os.statvfs(place).f_flag
    assert flags & os.ST_NOSUID and flags & os.ST_NODEV and flags & os.ST_NOEXEC
    assert os.statvfs(place).f_files == 1 * MiB // 4096 + 1024
    with open(place / "large", "wb") as file, pytest.raises(OSError, match="No space left"):
        for _ in range(3):
            file.write(bytes(MiB))
            file.flush()


def test_what_is_in_use_stays(memory: Memory, tmp_path: Path) -> None:
    """It is not taken off while something in it is open, and not made smaller than what is in it."""
    place = tmp_path / "mem"
    real(memory).mount(str(place), 2 * MiB)
    with open(place / "file", "wb") as file:
        file.write(bytes(MiB + 4096))
        file.flush()
        with pytest.raises(MountError, match="busy"):
            memory.unmount(str(place))
        with pytest.raises(MountError, match="resized"):
            memory.resize(str(place), MiB)
    assert memory.size(str(place)) == 2 * MiB


def test_a_link_is_not_followed(memory: Memory, tmp_path: Path) -> None:
    """A directory that leads elsewhere is not mounted on, at its end or on the way."""
    (tmp_path / "elsewhere" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MountError, match="not a directory"):
        real(memory).mount(str(tmp_path / "link"), MiB)
    with pytest.raises(MountError, match="leads elsewhere"):
        memory.mount(str(tmp_path / "link" / "sub"), MiB)
    assert not [point for point in limits.mount_points() if str(tmp_path) in point]


def test_a_part_of_a_tmpfs_is_none_of_its_own(memory: Memory, tmp_path: Path) -> None:
    """What a container is given of /dev/shm is a mount point in memory, and not a tmpfs of its own."""
    if not isinstance(memory, LinuxMemory):
        pytest.skip("only of the real one")
    outer = tmp_path / "outer"
    memory.mount(str(outer), MiB)
    (outer / "part").mkdir()
    assert limits.own_tmpfs(str(outer / "part")) is None
    assert limits.own_tmpfs(str(outer)) == MiB


LOOKS = """
import sys
from datacache.cache.limits import is_tmpfs, own_tmpfs
for _ in sys.stdin:
    print(is_tmpfs(sys.argv[1]), own_tmpfs(sys.argv[1]), flush=True)
"""


def test_a_container_that_is_older_than_the_tmpfs_sees_it(memory: Memory, tmp_path: Path) -> None:
    """A worker that was given the directory, in a name space of its own with mounts of its host coming in,
    takes the bare directory for none, though it lies in memory, and sees the tmpfs when it comes, and when it
    goes."""
    if not isinstance(memory, LinuxMemory):
        pytest.skip("only of the real one")
    outer, inner = tmp_path / "shm", tmp_path / "inside"
    inner.mkdir()
    memory.mount(str(outer), MiB)
    subprocess.run(["mount", "--make-shared", str(outer)], check=True)
    (outer / "uid").mkdir()
    script = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$2"'
    container = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh", str(outer / "uid"),
         str(inner), sys.executable, LOOKS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with container:
        assert container.stdin is not None and container.stdout is not None

        def look() -> str:
            container.stdin.write("\n")
            container.stdin.flush()
            return container.stdout.readline().strip()

        assert look() == "True None"
        memory.mount(str(outer / "uid"), 64 * KiB)
        assert look() == f"True {64 * KiB}"
        memory.unmount(str(outer / "uid"))
        assert look() == "True None"
        container.stdin.close()
        assert container.wait(30) == 0


TABLE = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:25 / /dev/shm rw,nosuid - tmpfs tmpfs rw
41 22 0:25 /datacache/u /cache\\040a rw - tmpfs tmpfs rw
42 22 0:51 / /run/x rw - tmpfs datacache rw
43 42 8:1 /etc /run/x rw - ext4 /dev/sda1 rw
"""


@pytest.mark.parametrize(
    ("path", "own"), [("/dev/shm", True), ("/cache a", False), ("/run/x", False), ("/", False), ("/y", False)]
)
def test_the_table_of_mounts(path: str, own: bool, tmp_path: Path) -> None:
    """The topmost mount on just that directory counts, and only the root of a tmpfs."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(TABLE)
    assert (limits.own_tmpfs(path, proc=str(tmp_path)) is not None) is own
