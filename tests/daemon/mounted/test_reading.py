"""What programs see on a mount: the store's bytes and names, read-only, whatever way they look."""

import errno
import mmap
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datacache.config.settings import IO, Consistency, IndexSettings, MountSettings
from datacache.model import KiB, MiB
from fuse import mountpoint
from tests.daemon.mounted.conftest import Start

EAGER = IndexSettings(ttl=0)
"""Every open asks the store: what a test changes is seen at once, without waiting."""


def put(path: Path, data: bytes) -> None:
    """Replace an object as stores do: whole, and never changed in place."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.rename(new, path)


def test_random_ranges_are_the_stores_bytes(daemon: Start, bucket: Path) -> None:
    """Any range, with any reader: the store's bytes, cold, warm and after a restart."""
    rng = random.Random(1)
    contents = {f"f{size}": rng.randbytes(size) for size in (0, 1, 4095, 4096, 4097, 3 * MiB + 17, 9 * MiB)}
    for name, data in contents.items():
        (bucket / name).write_bytes(data)
    for _ in range(2):
        mounted = daemon()
        for name, data in contents.items():
            with open(mounted.directory / name, "rb", buffering=0) as file:
                assert os.fstat(file.fileno()).st_size == len(data)
                for _ in range(60):
                    at, length = rng.randrange(len(data) + 10), rng.choice((1, 100, 5000, 300 * KiB))
                    assert os.pread(file.fileno(), length, at) == data[at : at + length]
            assert (mounted.directory / name).read_bytes() == data
        mounted.stop()


def test_mappings_are_the_stores_bytes(daemon: Start, bucket: Path) -> None:
    """mmap goes through the page cache like read, also when its file is closed."""
    rng = random.Random(2)
    data = rng.randbytes(5 * MiB + 3)
    (bucket / "f").write_bytes(data)
    with open(daemon().directory / "f", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with mapped:
        for _ in range(50):
            at = rng.randrange(len(data))
            assert mapped[at : at + 3000] == data[at : at + 3000]
        assert mapped[:] == data


def test_concurrent_readers_see_the_stores_bytes(daemon: Start, bucket: Path) -> None:
    """Eight readers on shared and separate files, and one fetch of each."""
    rng = random.Random(3)
    contents = {f"{i}": rng.randbytes(rng.choice((10 * KiB, 100 * KiB, 2 * MiB))) for i in range(24)}
    for name, data in contents.items():
        (bucket / name).write_bytes(data)
    mounted = daemon()

    def read(seed: int) -> None:
        order = sorted(contents)
        random.Random(seed).shuffle(order)
        for name in order:
            assert (mounted.directory / name).read_bytes() == contents[name]

    with ThreadPoolExecutor(8) as readers:
        list(readers.map(read, range(8)))
    assert mounted.status()["reads"]["bytes_fetched"] == sum(map(len, contents.values()))


def test_two_versions_of_one_path_are_open_at_once(daemon: Start, bucket: Path, driver: str) -> None:
    """Two versions of one path can be open at once, and each reads its own bytes.
    An open file keeps its version, whatever happens in the bucket; an open sees the current one."""
    put(bucket / "f", b"the first version" * 1000)
    path = daemon(index=EAGER).directory / "f"
    with open(path, "rb") as before:
        assert before.read(17) == b"the first version"
        os.pread(before.fileno(), 1 << 20, 0)  # all of it is cached
        put(bucket / "f", b"second")
        with open(path, "rb") as after:
            os.posix_fadvise(before.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert after.read() == b"second"
            assert os.pread(before.fileno(), 1 << 20, 0) == b"the first version" * 1000
            sizes = [os.fstat(file.fileno()).st_size for file in (before, after)]
            assert sizes == [17000, 6]
            inos = {os.fstat(file.fileno()).st_ino for file in (before, after)}
            # pyfuse3 knows one number for the node, which names a version, and for st_ino.
            assert len(inos) == (1 if driver == "native" else 2)
    assert path.read_bytes() == b"second"


def test_a_mapping_sees_the_version_that_was_opened(daemon: Start, bucket: Path) -> None:
    """mmap works, and sees the version that was opened: not another one once the object is replaced, and
    not when its pages must be fetched again."""
    first, second = random.Random(4).randbytes(MiB), random.Random(5).randbytes(MiB)
    put(bucket / "f", first)
    mounted = daemon(index=EAGER)
    path = mounted.directory / "f"
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as before:
        assert before[:] == first
        mounted.wait_until_cached("f", MiB)
        put(bucket / "f", second)
        with open(path, "rb") as file2, mmap.mmap(file2.fileno(), 0, prot=mmap.PROT_READ) as after:
            assert after[:] == second
            before.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert before[:] == first


def test_a_lookup_that_the_kernel_still_believes_does_not_hide_a_new_version(
    daemon: Start, bucket: Path
) -> None:
    """OPEN of the old node is answered ESTALE; the kernel looks the name up again and nobody sees it."""
    put(bucket / "f", b"first")
    mounted = daemon(index=EAGER, mount=MountSettings(entry_timeout=1e6))
    path = mounted.directory / "f"
    assert path.read_bytes() == b"first"
    lookups = mounted.requests()["lookup"]
    assert path.read_bytes() == b"first"
    assert mounted.requests()["lookup"] == lookups
    put(bucket / "f", b"second")
    assert path.read_bytes() == b"second"
    assert mounted.requests()["lookup"] > lookups


def test_a_version_that_is_neither_cached_nor_in_the_store_is_estale(daemon: Start, bucket: Path) -> None:
    """A read returns the bytes of exactly one version of the object, or an error: not other bytes, not
    a short read. The bucket no longer has the version, and it is not cached: ESTALE."""
    put(bucket / "f", b"first" * 1000)
    mounted = daemon(index=EAGER, io=IO.SERVED)
    with open(mounted.directory / "f", "rb") as file:
        put(bucket / "f", b"other" * 1000)
        with pytest.raises(OSError) as gone:
            file.read()
    assert gone.value.errno == errno.ESTALE
    assert mounted.status()["mount_files"]["errors"]["VersionChanged"] >= 1, "the kernel may try twice"
    assert (mounted.directory / "f").read_bytes() == b"other" * 1000


@pytest.mark.parametrize("io", [IO.SERVED, IO.PASSTHROUGH])
def test_who_opens_it_next_need_not_wait_for_the_ttl(
    daemon: Start, bucket: Path, driver: str, io: IO
) -> None:
    """The store has said that the version is gone. A small file is fetched at its open where the kernel reads
    it then, so nobody sees an error."""
    if driver == "pyfuse3" and io is IO.PASSTHROUGH:
        pytest.skip("pyfuse3 passes nothing through")
    put(bucket / "f", b"first" * 1000)
    put(bucket / "gone", b"first" * 1000)
    mounted = daemon(io=io)
    assert sorted(os.listdir(mounted.directory)) == ["f", "gone"]
    put(bucket / "f", b"other" * 1000)
    os.unlink(bucket / "gone")
    if io is IO.SERVED:
        for name in ("f", "gone"):
            with pytest.raises(OSError, match="Stale"):
                (mounted.directory / name).read_bytes()
    assert (mounted.directory / "f").read_bytes() == b"other" * 1000
    with pytest.raises(FileNotFoundError):
        (mounted.directory / "gone").read_bytes()


def test_names_come_and_go_with_the_store(daemon: Start, bucket: Path) -> None:
    """No such object: ENOENT, before it is there and when it is gone."""
    mounted = daemon(index=EAGER)
    path = mounted.directory / "f"
    assert not path.exists()
    put(bucket / "f", b"x")
    assert path.exists()
    assert os.listdir(mounted.directory) == ["f"]
    os.unlink(bucket / "f")
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    assert os.listdir(mounted.directory) == []


@pytest.mark.parametrize("io", [IO.PASSTHROUGH, IO.PAGECACHE])
def test_a_listing_is_at_most_ttl_old(daemon: Start, bucket: Path, io: IO) -> None:
    """Also one that the kernel has read to its end: only what never changes is kept there."""
    mounted = daemon(index=EAGER, io=io)
    seen = []
    for name in ("a", "b", "c"):
        put(bucket / name, b"x")
        seen.append(sorted(os.listdir(mounted.directory)))
    assert seen == [["a"], ["a", "b"], ["a", "b", "c"]]


NAMES = [
    b"with blank", b"new\nline", b"quote'\"", b"back\\slash", b"-dash", b"*?[]", b"\xff\xfe not utf-8",
    "grün".encode(), "gru\u0308n".encode(), b"n" * 255, b"%2F", b"~", b".hidden",
]  # fmt: skip


def test_odd_names_are_shown_as_they_are(daemon: Start, bucket: Path) -> None:
    """Whatever a file may be called, it is called on the mount."""
    raw = os.fsencode(bucket)
    for name in NAMES:
        with open(raw + b"/" + name, "wb") as file:
            file.write(name)
    directory = os.fsencode(daemon().directory)
    assert sorted(os.listdir(directory)) == sorted(NAMES)
    for name in NAMES:
        with open(directory + b"/" + name, "rb") as file:
            assert file.read() == name


def test_a_directory_of_20000_entries_is_listed_whole(daemon: Start, bucket: Path, driver: str) -> None:
    """Each name once, with its attributes, in few requests; also after a seek back."""
    for i in range(20_000):
        os.close(os.open(bucket / f"{i:06}", os.O_CREAT | os.O_WRONLY))
    mounted = daemon()
    with os.scandir(mounted.directory) as entries:
        found = [(entry.name, entry.is_file()) for entry in entries]
    assert sorted(found) == [(f"{i:06}", True) for i in range(20_000)]
    assert len(set(os.listdir(mounted.directory))) == 20_000
    asked = mounted.requests()
    assert asked["readdirplus" if driver == "native" else "readdir"] < 2 * 20_000 / 20
    assert all((mounted.directory / name).stat().st_size == 0 for name, _ in found[:500])
    assert mounted.requests().get("lookup", 0) == asked.get("lookup", 0), "readdir has told of them already"


def test_statfs_and_attributes(daemon: Start, bucket: Path) -> None:
    """The modification time is the object's, `st_nlink` is 1, and `df` shows what is indexed, with nothing
    free; owner and modes are as chosen, and there are no holes."""
    (bucket / "d").mkdir()
    (bucket / "d" / "f").write_bytes(b"x" * 10_000)
    os.utime(bucket / "d" / "f", ns=(10**18, 10**18 + 123_000_000))
    settings = MountSettings(uid=1234, gid=2345, file_mode=0o640, dir_mode=0o750)
    directory = daemon(mount=settings).directory
    found = (directory / "d" / "f").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 2345, 0o640)
    assert (found.st_size, found.st_blocks * 512) == (10_000, 10_240)
    assert (found.st_mtime_ns // 10**9, found.st_nlink) == (10**9, 1)
    assert (directory / "d").stat().st_mode & 0o7777 == 0o750
    space = os.statvfs(directory)
    assert space.f_blocks * space.f_frsize >= 10_000
    assert (space.f_bfree, space.f_bavail, space.f_namemax) == (0, 0, 255)
    with open(directory / "d" / "f", "rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 10_000


def test_a_clean_object_shows_no_holes(daemon: Start, bucket: Path) -> None:
    """A clean object shows no holes, whatever is cached of it: nothing, its middle, all of it."""
    size = 24 * MiB
    with open(bucket / "f", "wb") as file:
        file.truncate(size)  # the store's own file has nothing but holes
    mounted = daemon()
    with open(mounted.directory / "f", "rb", buffering=0) as file:

        def looks_whole() -> bool:
            number = file.fileno()
            return (
                os.fstat(number).st_blocks * 512 >= size
                and os.lseek(number, 0, os.SEEK_DATA) == 0
                and os.lseek(number, 0, os.SEEK_HOLE) == size
            )

        assert looks_whole()
        os.pread(file.fileno(), 1, 12 * MiB)
        mounted.wait_until_cached("f", 1)
        assert sum(mounted.control().stat("/f").cached.values()) < size
        assert looks_whole()
        assert os.pread(file.fileno(), size, 0) == bytes(size)
        mounted.wait_until_cached("f", size)
        assert looks_whole()


def test_extended_attributes(daemon: Start, bucket: Path) -> None:
    """user.datacache.* where they are chosen; elsewhere there are none, and each costs no request."""
    (bucket / "f").write_bytes(b"12345")
    mounted = daemon(mount=MountSettings(xattr=True))
    path = mounted.directory / "f"
    path.read_bytes()
    shown = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    assert shown["user.datacache.uri"] == f"{bucket.as_uri()}/f".encode()
    assert shown["user.datacache.cached"] == b"5"
    assert shown["user.datacache.tier"].startswith(b"ssd:")
    assert shown["user.datacache.version"]
    with pytest.raises(OSError) as missing:
        os.getxattr(path, "user.other")
    assert missing.value.errno == errno.ENODATA
    mounted.stop()
    mounted = daemon()
    for _ in range(3):
        with pytest.raises(OSError) as none:
            os.getxattr(path, "user.datacache.uri")
        assert none.value.errno == errno.EOPNOTSUPP
    assert mounted.requests()["getxattr"] == 1


WRITES: dict[str, Callable[[Path], object]] = {
    "open": lambda d: open(d / "f", "r+b").close(),
    "append": lambda d: open(d / "f", "ab").close(),
    "create": lambda d: open(d / "new", "wb").close(),
    "truncate": lambda d: os.truncate(d / "f", 0),
    "mkdir": lambda d: os.mkdir(d / "new"),
    "rmdir": lambda d: os.rmdir(d / "d"),
    "unlink": lambda d: os.unlink(d / "f"),
    "rename": lambda d: os.rename(d / "f", d / "g"),
    "link": lambda d: os.link(d / "f", d / "g"),
    "symlink": lambda d: os.symlink("f", d / "g"),
    "mknod": lambda d: os.mkfifo(d / "g"),
    "chmod": lambda d: os.chmod(d / "f", 0o777),
    "chown": lambda d: os.chown(d / "f", 1, 1),
    "utime": lambda d: os.utime(d / "f"),
    "setxattr": lambda d: os.setxattr(d / "f", "user.x", b"x"),
    "removexattr": lambda d: os.removexattr(d / "f", "user.x"),
}


@pytest.mark.parametrize("remounted", [False, True])
def test_everything_that_writes_is_erofs(daemon: Start, bucket: Path, remounted: bool) -> None:
    """Any attempt to change something: EROFS; also when root has remounted it `rw`, when it is us who
    are asked."""
    (bucket / "f").write_bytes(b"x")
    (bucket / "d").mkdir()
    (bucket / "d" / "f").write_bytes(b"x")
    directory = daemon(mount=MountSettings(file_mode=0o666, dir_mode=0o777)).directory
    if remounted:
        if os.geteuid() != 0:
            pytest.skip("only root can remount")
        subprocess.run(["mount", "-i", "-o", "remount,rw", str(directory)], check=True)
    for name, write in WRITES.items():
        with pytest.raises(OSError) as refused:
            write(directory)
        assert refused.value.errno == errno.EROFS, name
    assert sorted(os.listdir(directory)) == ["d", "f"]
    assert (directory / "f").read_bytes() == b"x"


AS_NOBODY = "import os,sys; os.setgid(65534); os.setuid(65534); print(len(open(sys.argv[1],'rb').read()))"


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        (MountSettings(), False),
        (MountSettings(allow_other=True), True),
        (MountSettings(allow_other=True, file_mode=0o400), False),
        (MountSettings(allow_other=True, dir_mode=0o700), False),
        (MountSettings(allow_other=True, uid=65534, gid=65534, file_mode=0o400, dir_mode=0o500), True),
    ],
)
def test_other_users_are_held_to_the_modes(
    daemon: Start, bucket: Path, tmp_path: Path, settings: MountSettings, allowed: bool
) -> None:
    """Owner, group and modes are those of the mount (`--uid --gid --file-mode --dir-mode`), checked by the
    kernel; other users are let in with allow_other only."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    (bucket / "f").write_bytes(b"12345")
    for part in (tmp_path, *tmp_path.parents):
        if part.is_relative_to("/tmp") and part != Path("/tmp"):
            part.chmod(part.stat().st_mode | 0o055)
    path = daemon(mount=settings).directory / "f"
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-c", AS_NOBODY, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == ("5" if allowed else ""), done.stderr
    if not allowed:
        assert "PermissionError" in done.stderr


def test_fio_verifies_what_it_wrote_to_the_store(daemon: Start, bucket: Path) -> None:
    """Another program's idea of correct bytes: random reads, each block checked."""
    if not shutil.which("fio"):
        pytest.skip("fio is not installed")
    job = ["fio", "--name=f", "--filename=f", "--size=16m", "--bs=16k", "--verify=crc32c", "--randseed=7"]
    job += ["--minimal", "--thread", "--verify_fatal=1"]
    where = {"cwd": bucket, "check": True, "capture_output": True}
    subprocess.run([*job, "--rw=write", "--do_verify=0"], **where)  # type: ignore[call-overload]
    mounted = daemon()
    for how in (["--rw=randread"], ["--rw=read"], ["--rw=randread", "--ioengine=mmap"]):
        subprocess.run([*job, *how], **(where | {"cwd": mounted.directory}))  # type: ignore[call-overload]


def test_requests_per_file(daemon: Start, bucket: Path) -> None:
    """Names come with the listing; a file is open, read, release; the second time its pages are there."""
    for i in range(50):
        (bucket / f"{i:03}").write_bytes(b"x" * 5000)
    mounted = daemon(index=IndexSettings(consistency=Consistency.IMMUTABLE), io=IO.SERVED)
    names = os.listdir(mounted.directory)
    asked = []
    for _ in range(2):
        before = mounted.requests()
        for name in names:
            fd = os.open(mounted.directory / name, os.O_RDONLY)
            assert len(os.read(fd, 10_000)) == 5000
            os.close(fd)
        after = mounted.requests()
        asked.append({kind: after[kind] - before.get(kind, 0) for kind in after})
    for counts, reads in zip(asked, (50, 0), strict=True):
        assert counts["open"] == 50
        assert counts["read"] == reads
        assert not counts.get("flush"), "nothing is written, so there is nothing to flush"
        assert sum(counts.values()) <= 100 + reads + 10, counts
    for _ in range(3):
        assert not (mounted.directory / "nothing").exists()
    assert mounted.requests()["lookup"] == after.get("lookup", 0) + 1, (
        "a name that is not there is remembered"
    )


def test_the_kernel_reads_ahead_as_chosen(daemon: Start, bucket: Path) -> None:
    """128 KiB, which the kernel takes by itself, halves the speed of a sequential reader."""
    if not os.access("/sys/class/bdi", os.W_OK):
        pytest.skip("read-ahead is root's to set")
    mount = mountpoint.is_mounted(str(daemon(mount=MountSettings(read_ahead=2 * MiB)).directory))
    assert mount is not None
    assert Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text().strip() == "2048"
    assert mount.source.startswith("file:")
    assert sys.platform == "linux"
