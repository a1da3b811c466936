"""Mount points from outside: the mount table, what may be mounted where, who keeps a mount busy.

What needs a mount of ours is in `mounted/`.
"""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from datacache.errors import MountError, SettingError
from fuse import mountpoint
from fuse.mountpoint import MountInfo, parse_mountinfo
from tests.conftest import AnnouncedLogs

TABLE = rb"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 0 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard
42 27 0:39 / /mnt/a\040b\134c ro,nosuid - fuse.datacache s3://bucket/a\040b ro,user_id=0
43 27 0:40 / /mnt/gr\303\274n ro - fuse.datacache file:///src ro
"""


def test_the_mount_table_is_read_with_its_escapes() -> None:
    """Blanks, backslashes and bytes of any encoding; optional fields or none."""
    mounts = parse_mountinfo(TABLE)
    assert mounts[1] == MountInfo("/", "254:0", "ext4", "/dev/vda", read_only=False)
    assert mounts[2] == MountInfo("/mnt/a b\\c", "0:39", "fuse.datacache", "s3://bucket/a b", read_only=True)
    assert os.fsencode(mounts[3].directory) == "/mnt/grün".encode()


def test_the_real_mount_table_can_be_read() -> None:
    """Every line of this machine's."""
    text = Path("/proc/self/mountinfo").read_bytes()
    assert len(parse_mountinfo(text)) == len(text.splitlines())


def test_only_mounts_of_ours_count(tmp_path: Path) -> None:
    """Another file system's mount point, and a plain directory, are not ours to unmount."""
    for directory in ("/proc", str(tmp_path)):
        assert mountpoint.is_mounted(directory) is None
        assert not mountpoint.is_stale(directory)
        assert not mountpoint.clean_stale(directory)
        with pytest.raises(MountError, match="is not mounted by datacache"):
            mountpoint.unmount(directory)
        with pytest.raises(MountError, match="is not mounted by datacache"):
            mountpoint.set_read_ahead(directory, 1 << 20)


def test_a_mount_is_found_through_links_without_touching_it(tmp_path: Path) -> None:
    """... relative ones, chains of them, and links in the way; a loop ends."""
    (tmp_path / "real").symlink_to("/proc")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "up").symlink_to("/")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("link", "up/proc", "up/proc/.", "nothing/../link"):
        found = mountpoint.find(str(tmp_path / path))
        assert found is not None, path
        assert found.fstype == "proc"
    assert mountpoint.find(str(tmp_path / "loop")) is None
    assert mountpoint.find(str(tmp_path / "nothing")) is None


def test_where_links_lead_is_told_as_the_system_does(tmp_path: Path) -> None:
    """realpath(3) of what there is, of what there is not, and of a link that another leads to."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "to-b").symlink_to("a/b")
    (tmp_path / "a" / "up").symlink_to("../to-b/..")
    (tmp_path / "root").symlink_to("/")
    (tmp_path / "nowhere").symlink_to("gone/away")
    for path in ("", "to-b", "to-b/..", "a/up/b/x", "a/../to-b/./x//", "root/usr", "nowhere", "a/b/none/.."):
        assert mountpoint.real(f"{tmp_path}/{path}") == os.path.realpath(f"{tmp_path}/{path}"), path
    assert mountpoint.real("x") == os.path.realpath("x")
    assert mountpoint.real("/") == "/"


def test_the_state_of_a_file_system_is_asked_by_another_process(tmp_path: Path) -> None:
    """So that one that hangs hangs nobody else; errors come back as their errno."""
    assert isinstance(mountpoint.statvfs(str(tmp_path)), os.statvfs_result)
    assert mountpoint.statvfs(str(tmp_path / "nothing")) == 2


def test_who_keeps_a_mount_busy_is_named(tmp_path: Path) -> None:
    """By working directory, open file or mapping."""
    (tmp_path / "file").write_bytes(b"x")
    program = "import sys; f = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert [h for h in mountpoint._holders(str(tmp_path)) if f"(process {holder.pid})" in h]
        assert not mountpoint._holders(str(tmp_path / "fil"))
        holder.communicate()
    assert not mountpoint._holders(str(tmp_path))


def test_a_mapping_keeps_a_mount_busy_too(tmp_path: Path) -> None:
    """Also when its file is closed."""
    (tmp_path / "file").write_bytes(b"x" * 4096)
    program = (
        "import sys, mmap\n"
        "with open(sys.argv[1]) as f: m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert mountpoint._holders(str(tmp_path))
        holder.communicate()


@pytest.mark.parametrize(
    ("status", "fusermount", "why"),
    [
        ("CapEff:\t000001ffffffffff\nCapBnd:\t000001ffffffffff\n", None, ""),
        ("CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n", "/bin/fusermount3", "--cap-add SYS_ADMIN"),
        ("CapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\nNoNewPrivs:\t0\n", "/bin/fusermount3", ""),
        ("CapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\n", None, "apt-get install fuse3"),
        (
            "CapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\nNoNewPrivs:\t1\n",
            "/bin/fusermount3",
            "no_new_privs",
        ),
        ("Name:\tinit\n", None, ""),
    ],
)
def test_who_may_not_mount_is_told_what_is_needed(status: str, fusermount: str | None, why: str) -> None:
    """root, a container's root, a user, one without fusermount3 or privileges, a kernel that says nothing."""
    said = mountpoint.refused_by(status, fusermount=fusermount)
    assert why in said
    assert bool(said) == bool(why)
    assert (": " in said) == bool(why), "what it is, and after a colon what to do: doctor shows them apart"


@pytest.mark.parametrize(
    ("mode", "group", "root", "what"),
    [
        (0o600, 0, False, "its mode is 0600; root lets everybody in by `chmod 666 /dev/fuse`"),
        (0o660, 0, False, "its mode is 0660; root lets everybody in by `chmod 666 /dev/fuse`"),
        (0o660, 4294967, False, "its mode is 0660; root lets you in by `usermod -aG 4294967 YOU`"),
        (0o666, 0, False, "in a container"),
        (0o600, 0, True, "in a container"),
    ],
)
def test_whom_the_device_is_closed_to_is_told_who_opens_it(
    mode: int, group: int, root: bool, what: str
) -> None:
    """A user is not sent to look for a container."""
    device = os.stat_result((stat.S_IFCHR | mode, 0, 0, 1, 0, group, 0, 0, 0, 0))
    said = mountpoint.closed_to_us(PermissionError(errno.EACCES, "Permission denied"), device, root=root)
    assert said.startswith(f"/dev/fuse cannot be opened (Permission denied): {what}")


@pytest.mark.parametrize(
    ("cache", "fits"),
    [("cache", True), ("mnt/cache", False), ("mnt", False), (".", False), ("mnt-cache", True), ("l", False)],
)
def test_a_cache_under_its_own_mount_point_is_refused(tmp_path: Path, cache: str, fits: bool) -> None:
    """... and one over it; also through links, and before it exists."""
    if problem := mountpoint.obstacle():
        pytest.skip(problem)
    target = tmp_path / "mnt"
    target.mkdir()
    (tmp_path / "l").symlink_to(target)
    place = str(tmp_path / cache)
    if fits:
        mountpoint.check_target(str(target), {place: "--landing"})
    else:
        with pytest.raises(SettingError, match=r"^--landing: .* neither under nor over"):
            mountpoint.check_target(str(target), {place: "--landing"})


def test_a_mount_point_must_be_a_directory_that_exists(tmp_path: Path) -> None:
    """One line that names it and says what would be right."""
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"file.*expected a directory, not a file"):
        mountpoint.check_target(str(tmp_path / "file"), {})
    with pytest.raises(SettingError, match="mkdir"):
        mountpoint.check_target(str(tmp_path / "nothing"), {})


def test_a_mount_point_that_is_not_empty_is_announced(tmp_path: Path, logs: AnnouncedLogs) -> None:
    """It can be mounted over, as with mount(8), but nobody should wonder where files went."""
    if problem := mountpoint.obstacle():
        pytest.skip(problem)
    logs.expect("is not empty")
    (tmp_path / "file").touch()
    mountpoint.check_target(str(tmp_path), {})
    assert logs.messages()


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="nobody else tests beside us")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have mounts of its own")
def test_who_tests_beside_others_has_mounts_of_its_own() -> None:
    """What one test mounts another does not see, and the other way round (tests/conftest.py)."""
    beside = os.readlink(f"/proc/{os.getppid()}/ns/mnt")
    assert os.readlink("/proc/self/ns/mnt") != beside
