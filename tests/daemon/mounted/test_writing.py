"""A mount that can be written to, as programs see it: where the kernel writes the files itself, where it may
not, and on the portable driver."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

import pytest

from datacache.config.settings import TierSettings, UploadMode, UploadSettings
from datacache.model import KiB, Medium, MiB, MountPoint
from fuse import mountpoint
from tests.daemon.mounted.conftest import (
    WAYS,
    Daemon,
    check_way,
    flushed,
    kill_daemon,
    start_writable,
    writable,
)
from tests.support.reading import until

OLD = bytes(range(256)) * 300
"""What `old` and `d/inner` hold in the bucket."""


DIRECTORIES = 100
"""For tests that share a mount: one for each of them, and more."""


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each test runs in all ways."""
    check_way(request.param)
    return str(request.param)


def fill(directory: Path) -> None:
    """What a test finds at first."""
    put(directory / "old", OLD)
    (directory / "d").mkdir()
    put(directory / "d" / "inner", OLD)


@pytest.fixture(scope="module", autouse=True)
def shared(way: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """Directories of one mount, each for a test that needs no mount of its own."""
    base = tmp_path_factory.mktemp(way)
    bucket = base / "bucket"
    for number in range(DIRECTORIES):
        (bucket / str(number)).mkdir(parents=True)
        fill(bucket / str(number))
    with writable(base, way, MountPoint(bucket.as_uri()), bucket=bucket) as one:
        yield (one.directory / str(number) for number in range(DIRECTORIES))


@pytest.fixture
def one(way: str, bucket: Path, tmp_path: Path) -> Iterator[Daemon]:
    """A mount of the test's own: it may be killed."""
    fill(bucket)
    with writable(tmp_path, way, MountPoint(bucket.as_uri()), bucket=bucket) as one:
        yield one


@pytest.fixture
def mnt(request: pytest.FixtureRequest, shared: Iterator[Path]) -> Path:
    """Where the test works: its own mount, where it has one."""
    if "one" in request.fixturenames:
        directory: Path = request.getfixturevalue("one").directory
        return directory
    return next(shared)


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def error_of(call: Callable[..., object], *args: object) -> int:
    """The errno with which a call fails; 0 where it works."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or 0
    return 0


# ---- new files -----------------------------------------------------------------------------------


def test_what_is_written_is_read_at_once(mnt: Path) -> None:
    """What is written is read at once, by whoever has the file open. By `stat`, too, and after the close."""
    path = mnt / "new"
    with open(path, "wb", buffering=0) as file:
        for i in range(1, 20):
            file.write(b"x" * 1000)
            assert path.stat().st_size == os.fstat(file.fileno()).st_size == 1000 * i
            assert len(path.read_bytes()) == 1000 * i
            assert subprocess.check_output(["wc", "-c", path]).split()[0] == b"%d" % (1000 * i)
    assert path.read_bytes() == b"x" * 19_000
    assert "new" in os.listdir(mnt)


def test_large_writes_arrive_whole(mnt: Path) -> None:
    """Larger than any one request, at odd offsets."""
    data = os.urandom(3 * MiB + 17)
    with open(mnt / "big", "wb", buffering=0) as file:
        assert file.write(data) == len(data)
        os.pwrite(file.fileno(), b"odd", 12345)
    expected = bytearray(data)
    expected[12345:12348] = b"odd"
    assert (mnt / "big").read_bytes() == expected


def test_exclusive_creation(mnt: Path) -> None:
    """O_EXCL: one of many makes it."""
    fd = os.open(mnt / "one", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(fd)
    for name in ("one", "old", "d"):
        assert error_of(os.open, mnt / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY) == errno.EEXIST
    made = []

    def make() -> None:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(mnt / "raced", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            made.append(1)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_modes_and_owners(mnt: Path) -> None:
    """The umask is applied; chmod, chown and utimes are shown; a directory with setgid hands its group on."""
    fd = os.open(mnt / "script", os.O_CREAT | os.O_WRONLY, 0o750)
    os.close(fd)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((mnt / "script").stat().st_mode) == 0o750 & ~mask
    for name in ("script", "old"):
        path = mnt / name
        path.chmod(0o640)
        os.chown(path, 12, 34)
        os.utime(path, ns=(1, 1_600_000_000_123_456_789))
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 12, 34)
        assert found.st_mtime_ns == 1_600_000_000_123_456_789
    (mnt / "shared").mkdir()
    os.chown(mnt / "shared", 0, 77)
    (mnt / "shared").chmod(0o2775)
    put(mnt / "shared" / "file", b"")
    (mnt / "shared" / "below").mkdir()
    assert (mnt / "shared" / "file").stat().st_gid == 77
    below = (mnt / "shared" / "below").stat()
    assert below.st_gid == 77
    assert below.st_mode & stat.S_ISGID
    put(mnt / "timed", b"now")
    assert abs((mnt / "timed").stat().st_mtime - time.time()) < 60
    os.utime(mnt / "timed")
    assert abs((mnt / "timed").stat().st_mtime - time.time()) < 60


def test_suid_is_dropped_by_who_may_not_keep_it(mnt: Path) -> None:
    """By chown, and when somebody without privileges truncates or (served) writes."""
    path = mnt / "suid"
    put(path, b"data")
    path.chmod(0o4777)
    assert path.stat().st_mode & stat.S_ISUID
    os.chown(path, 99, 99)
    assert not path.stat().st_mode & stat.S_ISUID
    path.chmod(0o6777)
    program = "import os,sys; os.setgid(5); os.setuid(5); os.truncate(sys.argv[1], 2)"
    mnt.chmod(0o777)
    # From within: the directories above are not for everybody.
    subprocess.run([sys.executable, "-c", program, "suid"], cwd=mnt, check=True)
    assert path.read_bytes() == b"da"
    assert not path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)


# ---- files that are there ------------------------------------------------------------------------


def test_a_clean_file_is_appended_to(mnt: Path) -> None:
    """By two at once, each byte once."""
    with open(mnt / "old", "ab", buffering=0) as one, open(mnt / "old", "ab", buffering=0) as two:
        for _ in range(10):
            one.write(b"1")
            two.write(b"2")
    assert (mnt / "old").read_bytes() == OLD + b"12" * 10


def test_a_clean_file_is_changed_in_the_middle(mnt: Path) -> None:
    """All else of it stays."""
    with open(mnt / "old", "r+b", buffering=0) as file:
        file.seek(1000)
        file.write(b"middle")
        file.seek(0)
        assert file.read(10) == OLD[:10]
    assert (mnt / "old").read_bytes() == OLD[:1000] + b"middle" + OLD[1006:]


def test_a_clean_file_is_truncated(mnt: Path) -> None:
    """By O_TRUNC, by truncate(2), by ftruncate(2); to less and to more."""
    put(mnt / "old", b"other")
    assert (mnt / "old").read_bytes() == b"other"
    os.truncate(mnt / "d" / "inner", 10)
    assert (mnt / "d" / "inner").read_bytes() == OLD[:10]
    os.truncate(mnt / "d" / "inner", 20)
    assert (mnt / "d" / "inner").read_bytes() == OLD[:10] + bytes(10)
    with open(mnt / "d" / "inner", "r+b") as file:
        file.truncate(5)
        assert os.fstat(file.fileno()).st_size == 5
    os.close(os.open(mnt / "d" / "inner", os.O_RDONLY | os.O_TRUNC))
    assert (mnt / "d" / "inner").stat().st_size == 0


def test_a_reader_keeps_the_version_that_it_opened(mnt: Path) -> None:
    """Whoever opens it after the writer sees the new one."""
    with open(mnt / "old", "rb", buffering=0) as before, open(mnt / "old", "r+b", buffering=0) as writer:
        writer.write(b"NEW")
        with open(mnt / "old", "rb", buffering=0) as after:
            assert after.read(3) == b"NEW"
        assert before.read() == OLD


def test_a_file_with_holes(mnt: Path) -> None:
    """They read as zeros."""
    with open(mnt / "sparse", "wb") as file:
        file.seek(10 * MiB)
        file.write(b"end")
    assert (mnt / "sparse").stat().st_size == 10 * MiB + 3
    data = (mnt / "sparse").read_bytes()
    assert data[-3:] == b"end"
    assert not any(data[: 10 * MiB])


def test_fallocate(mnt: Path) -> None:
    """It makes room, and holes."""
    with open(mnt / "room", "w+b", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, 100 * KiB)
        assert os.fstat(file.fileno()).st_size == 100 * KiB
        file.write(b"x" * 8192)
        libc = ctypes.CDLL(None, use_errno=True)
        punch = 0x01 | 0x02
        done = libc.fallocate(file.fileno(), punch, ctypes.c_int64(4096), ctypes.c_int64(4096))
        assert done == 0 or ctypes.get_errno() == errno.EOPNOTSUPP
        if done == 0:
            assert os.pread(file.fileno(), 8192, 0) == b"x" * 4096 + bytes(4096)


def test_mapped_files_are_written(mnt: Path) -> None:
    """Shared mappings, also after the descriptor is closed."""
    with open(mnt / "mapped", "w+b", buffering=0) as file:
        file.truncate(3 * 4096)
        mapping = mmap.mmap(file.fileno(), 3 * 4096)
    mapping[0:5] = b"first"
    mapping[8192:8196] = b"last"
    mapping.flush()
    mapping.close()
    data = (mnt / "mapped").read_bytes()
    assert (data[:5], data[8192:8196], len(data)) == (b"first", b"last", 3 * 4096)


def test_direct_io(mnt: Path) -> None:
    """O_DIRECT writes what it says, and is read back by others."""
    buffer = mmap.mmap(-1, 64 * KiB)
    buffer[:] = os.urandom(64 * KiB)
    fd = os.open(mnt / "direct", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    assert os.pwrite(fd, buffer, 0) == 64 * KiB
    os.close(fd)
    assert (mnt / "direct").read_bytes() == buffer[:]


def test_locks(mnt: Path) -> None:
    """flock and fcntl, between descriptors of the same file."""
    put(mnt / "lock", b"")
    for name in ("lock", "old"):
        with open(mnt / name, "r+b") as one, open(mnt / name, "r+b") as two:
            fcntl.flock(one, fcntl.LOCK_EX)
            assert error_of(fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB) == errno.EAGAIN
            fcntl.flock(one, fcntl.LOCK_UN)
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- names ---------------------------------------------------------------------------------------


def test_directories(mnt: Path) -> None:
    """They are made, listed, and removed when they are empty."""
    os.makedirs(mnt / "a" / "b")
    put(mnt / "a" / "b" / "file", b"x")
    assert os.listdir(mnt / "a") == ["b"]
    assert error_of(os.rmdir, mnt / "a") == errno.ENOTEMPTY
    assert error_of(os.rmdir, mnt / "a" / "b" / "file") == errno.ENOTDIR
    assert error_of(os.mkdir, mnt / "a") == errno.EEXIST
    assert error_of(os.unlink, mnt / "a") in (errno.EISDIR, errno.EPERM)
    (mnt / "a" / "b" / "file").unlink()
    (mnt / "a" / "b").rmdir()
    (mnt / "a").rmdir()
    assert sorted(os.listdir(mnt)) == ["d", "old"]


def test_many_names_are_removed_while_they_are_listed(mnt: Path) -> None:
    """`rm -r`; none of them comes back."""
    (mnt / "many").mkdir()
    for i in range(300):
        put(mnt / "many" / f"{i}", b"")
    assert len(os.listdir(mnt / "many")) == 300
    with os.scandir(mnt / "many") as listing:
        first = next(listing)
        for i in range(300):
            if f"{i}" != first.name:
                (mnt / "many" / f"{i}").unlink()
        list(listing)
    assert os.listdir(mnt / "many") == [first.name]
    subprocess.run(["rm", "-r", mnt / "many"], check=True)
    assert not (mnt / "many").exists()


def test_renames(mnt: Path) -> None:
    """Of clean files, of written ones, of directories; over others, or not."""
    os.rename(mnt / "old", mnt / "moved")
    assert not (mnt / "old").exists()
    assert (mnt / "moved").read_bytes() == OLD
    put(mnt / "new", b"new")
    os.rename(mnt / "new", mnt / "moved")
    assert (mnt / "moved").read_bytes() == b"new"
    os.rename(mnt / "d", mnt / "e")
    assert (mnt / "e" / "inner").read_bytes() == OLD
    (mnt / "empty").mkdir()
    assert error_of(os.rename, mnt / "moved", mnt / "empty") == errno.EISDIR
    assert error_of(os.rename, mnt / "empty", mnt / "moved") == errno.ENOTDIR
    assert error_of(os.rename, mnt / "empty", mnt / "e") == errno.ENOTEMPTY
    os.rename(mnt / "e", mnt / "empty")
    assert sorted(os.listdir(mnt)) == ["empty", "moved"]
    libc = ctypes.CDLL(None, use_errno=True)

    def renameat2(flags: int) -> int:
        here = os.fsencode(mnt)
        done = libc.renameat2(-100, here + b"/moved", -100, here + b"/empty/inner", flags)
        return 0 if done == 0 else ctypes.get_errno()

    assert renameat2(1) == errno.EEXIST
    assert renameat2(2) == errno.EINVAL
    assert renameat2(0) == 0
    assert (mnt / "empty" / "inner").read_bytes() == b"new"


def test_a_file_is_renamed_while_it_is_written(mnt: Path) -> None:
    """As programs do that write beside, and then put in place."""
    with open(mnt / "tmp", "wb", buffering=0) as file:
        file.write(b"one ")
        os.rename(mnt / "tmp", mnt / "old")
        file.write(b"two")
        assert (mnt / "old").read_bytes() == b"one two"
        assert os.fstat(file.fileno()).st_size == 7
    assert (mnt / "old").read_bytes() == b"one two"


def test_an_unlinked_file_goes_on(mnt: Path) -> None:
    """As long as it is open: it is read, written and measured; its name is free at once."""
    put(mnt / "new", b"")
    for name in ("new", "old"):
        with open(mnt / name, "r+b", buffering=0) as file:
            (mnt / name).unlink()
            assert not (mnt / name).exists()
            file.seek(0)
            file.write(b"still here")
            file.truncate(10)
            put(mnt / name, b"another")
            assert os.pread(file.fileno(), 100, 0) == b"still here"
            assert (os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_nlink) == (10, 0)
        assert (mnt / name).read_bytes() == b"another"
    with open(mnt / "d" / "inner", "rb", buffering=0) as reader:
        assert reader.read(1) == OLD[:1]  # what is not cached when the bucket has it no more is lost
        (mnt / "d" / "inner").unlink()
        assert reader.read() == OLD[1:]


def test_symbolic_links(mnt: Path) -> None:
    """They lead where they say; a link to nowhere is one, too."""
    os.symlink("d/inner", mnt / "link")
    assert os.readlink(mnt / "link") == "d/inner"
    assert (mnt / "link").read_bytes() == OLD
    assert (mnt / "link").is_symlink()
    os.symlink("/nowhere", mnt / "broken")
    assert error_of(os.stat, mnt / "broken") == errno.ENOENT
    assert {e.name for e in os.scandir(mnt) if e.is_symlink()} == {"link", "broken"}
    (mnt / "link").unlink()
    assert (mnt / "d" / "inner").exists()


def test_what_a_bucket_cannot_hold_is_refused(mnt: Path) -> None:
    """Hard links, devices, pipes, files without a name."""
    assert error_of(os.link, mnt / "old", mnt / "other") == errno.EPERM
    assert error_of(os.mkfifo, mnt / "pipe") == errno.EPERM
    assert error_of(os.open, mnt, os.O_TMPFILE | os.O_RDWR) == errno.EOPNOTSUPP


# ---- the rest ------------------------------------------------------------------------------------


def test_extended_attributes(mnt: Path) -> None:
    """`user.*` of files and directories, new and old."""
    put(mnt / "new", b"")
    for name in ("new", "old", "d"):
        path = mnt / name
        os.setxattr(path, "user.one", b"1")
        os.setxattr(path, "user.two", b"2" * 1000, os.XATTR_CREATE)
        assert os.getxattr(path, "user.one") == b"1"
        assert sorted(os.listxattr(path)) == ["user.one", "user.two"]
        assert error_of(os.setxattr, path, "user.one", b"", os.XATTR_CREATE) == errno.EEXIST
        assert error_of(os.setxattr, path, "user.no", b"", os.XATTR_REPLACE) == errno.ENODATA
        os.removexattr(path, "user.two")
        assert error_of(os.getxattr, path, "user.two") == errno.ENODATA
        assert error_of(os.removexattr, path, "user.two") == errno.ENODATA
        assert error_of(os.setxattr, path, "security.x", b"") == errno.EOPNOTSUPP


def test_statfs_tells_of_the_landing_zone(mnt: Path) -> None:
    """`df` shows what can still be written."""
    found = os.statvfs(mnt)
    assert found.f_bavail > 0
    assert found.f_blocks >= found.f_bavail
    assert not found.f_flag & os.ST_RDONLY


def test_fsync(mnt: Path) -> None:
    """Of files and directories."""
    with open(mnt / "new", "wb", buffering=0) as file:
        file.write(b"durable")
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    directory = os.open(mnt, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)


def test_ranges_are_copied(mnt: Path) -> None:
    """copy_file_range and `cp`: the kernel does what no request is for."""
    with open(mnt / "old", "rb") as source, open(mnt / "copy", "wb") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 5000) > 0
    assert OLD.startswith((mnt / "copy").read_bytes())
    subprocess.run(["cp", "-a", mnt / "d", mnt / "e"], check=True)
    assert (mnt / "e" / "inner").read_bytes() == OLD
    assert (mnt / "e" / "inner").stat().st_mtime_ns == (mnt / "d" / "inner").stat().st_mtime_ns


def test_programs(mnt: Path) -> None:
    """Those that write as programs do: sqlite, tar, git's way of replacing files."""
    import sqlite3

    db = sqlite3.connect(mnt / "db")
    db.execute("CREATE TABLE t (x)")
    with db:
        db.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(1000)])
    assert db.execute("SELECT count(*) FROM t").fetchone() == (1000,)
    db.close()
    assert sqlite3.connect(mnt / "db").execute("PRAGMA integrity_check").fetchone() == ("ok",)
    subprocess.run(["tar", "cf", mnt / "all.tar", "-C", mnt, "d", "old"], check=True)
    (mnt / "out").mkdir()
    subprocess.run(["tar", "xf", mnt / "all.tar", "-C", mnt / "out"], check=True)
    assert (mnt / "out" / "d" / "inner").read_bytes() == OLD


# ---- daemons that die ----------------------------------------------------------------------------


def in_bucket(one: Daemon, name: str, data: bytes) -> bool:
    """Whether the bucket has it. Not through the mount."""
    path = one.bucket / name
    return path.exists() and path.read_bytes() == data


def test_what_is_closed_reaches_the_bucket(one: Daemon, mnt: Path) -> None:
    """Files, removals and renames. What is still open for writing does not reach the bucket."""
    put(mnt / "new", b"new")
    with open(mnt / "open", "wb", buffering=0) as file:
        file.write(b"half")
        (mnt / "old").unlink()
        os.rename(mnt / "d", mnt / "e")
        until(lambda: in_bucket(one, "new", b"new"))
        until(lambda: in_bucket(one, "e/inner", OLD))
        until(lambda: not (one.bucket / "old").exists())
        until(lambda: not (one.bucket / "d").exists() or not list((one.bucket / "d").iterdir()))
        assert not (one.bucket / "open").exists()
        assert one.status()["writing"]["dirty_open"] == 1
        file.write(b" and half")
    until(lambda: in_bucket(one, "open", b"half and half"))
    assert (mnt / "open").read_bytes() == b"half and half"
    assert (mnt / "new").read_bytes() == b"new"


def test_a_close_waits_for_the_bucket_where_that_is_asked_for(tmp_path: Path, bucket: Path, way: str) -> None:
    """--upload-mode sync: when close, or fsync, has returned, the bucket has it; one that fails is an
    error of the close, and has it later."""
    upload = UploadSettings(mode=UploadMode.SYNC, timeout=1.0)
    store = MountPoint(bucket.as_uri())
    with writable(tmp_path, way, store, bucket=bucket, upload=upload) as one:
        mnt = one.directory
        for n in range(5):
            put(mnt / f"f{n}", b"%d" % n)
            assert in_bucket(one, f"f{n}", b"%d" % n)
        with open(mnt / "log", "ab", buffering=0) as file:
            for n in range(3):
                file.write(b"line\n")
                os.fsync(file.fileno())
                assert in_bucket(one, "log", b"line\n" * (n + 1))
        for n in range(3):
            put(mnt / "tmp", b"save %d" % n)
            os.rename(mnt / "tmp", mnt / "doc")
        assert one.control().flush("/", timeout=10)["clean"]
        assert in_bucket(one, "doc", b"save 2")
        status = one.status()["writing"]
        assert (status["dirty_files"], status["uploads"]["conflicts"]) == (0, 0)
        bucket.rename(tmp_path / "away")
        bucket.write_bytes(b"no directory")
        file = open(mnt / "late", "wb", buffering=0)  # noqa: SIM115  its close is to fail
        file.write(b"late")
        with pytest.raises(OSError, match="Input/output error"):
            file.close()
        bucket.unlink()
        (tmp_path / "away").rename(bucket)
        until(lambda: one.control().flush("/", timeout=10)["clean"], 90)
        assert in_bucket(one, "late", b"late")


def test_who_flushes_after_a_close_means_that_file(one: Daemon, mnt: Path) -> None:
    """At once, again and again: the kernel tells of the end of a file when close(2) has returned."""
    for i in range(40):
        put(mnt / "new", b"%d" % i)
        said = one.control().flush("/", timeout=10)
        assert (said["clean"], said["open"]) == (True, 0)
        assert in_bucket(one, "new", b"%d" % i)


def test_writers_do_not_see_that_the_daemon_was_killed(one: Daemon, mnt: Path, way: str) -> None:
    """kill -9 while files are open for writing: they are written, read, measured, truncated and closed as if
    nothing had been, and then reach the bucket."""
    if way == "pyfuse3":
        pytest.skip("the portable driver has no successor")
    with (
        open(mnt / "new", "w+b", buffering=0) as new,
        open(mnt / "old", "r+b", buffering=0) as old,
        open(mnt / "gone", "w+b", buffering=0) as gone,
        open(mnt / "d" / "inner", "rb", buffering=0) as reader,
    ):
        new.write(b"before ")
        old.write(b"BEFORE")
        gone.write(b"gone")
        (mnt / "gone").unlink()
        assert reader.read(5) == OLD[:5]
        kill_daemon(one)
        new.write(b"after")
        assert os.pread(new.fileno(), 100, 0) == b"before after"
        assert os.fstat(new.fileno()).st_size == 12
        os.fsync(new.fileno())
        assert (mnt / "new").read_bytes() == b"before after"
        with open(mnt / "new", "ab", buffering=0) as another:
            another.write(b"!")
        assert (mnt / "new").read_bytes() == b"before after!"
        old.truncate(10)
        assert (mnt / "old").read_bytes() == b"BEFORE" + OLD[6:10]
        assert os.pread(gone.fileno(), 10, 0) == b"gone"
        assert not (mnt / "gone").exists()
        assert reader.read(5) == OLD[5:10]
        kill_daemon(one)
        new.write(b"?")
        assert not (one.bucket / "new").exists(), "it is still open"
    until(lambda: in_bucket(one, "old", b"BEFORE" + OLD[6:10]))
    until(lambda: (one.bucket / "new").exists())
    assert (one.bucket / "new").read_bytes() == (mnt / "new").read_bytes()
    assert not (one.bucket / "gone").exists()


def test_names_that_are_changed_while_daemons_die(one: Daemon, mnt: Path, way: str) -> None:
    """Each request is answered, and as if it had been done once."""
    if way == "pyfuse3":
        pytest.skip("the portable driver has no successor")
    deaths = threading.Thread(target=lambda: [kill_daemon(one) for _ in range(3)])
    deaths.start()
    rounds = 0
    while deaths.is_alive() or not rounds:
        path = mnt / f"{rounds}"
        path.mkdir()
        fd = os.open(path / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(fd, b"%d" % rounds)
        os.close(fd)
        os.rename(path / "file", path / "renamed")
        assert (path / "renamed").read_bytes() == b"%d" % rounds
        os.symlink("renamed", path / "link")
        assert sorted(os.listdir(path)) == ["link", "renamed"]
        (path / "link").unlink()
        if rounds % 2:
            (path / "renamed").unlink()
            path.rmdir()
        rounds += 1
    deaths.join()
    assert sorted(map(int, set(os.listdir(mnt)) - {"old", "d"})) == list(range(0, rounds, 2))


def test_what_was_written_outlives_the_mount(one: Daemon, mnt: Path, way: str) -> None:
    """What was closed before all processes were killed is shown, and uploaded, by the next mount."""
    put(mnt / "new", b"closed")
    one.kill()
    mountpoint.unmount(str(mnt), lazy=True)
    start_writable(one, way)
    assert (mnt / "new").read_bytes() == b"closed"
    until(lambda: in_bucket(one, "new", b"closed"))


# ---- the cache -----------------------------------------------------------------------------------


def files_below(directory: Path) -> dict[int, Path]:
    """By inode number."""
    return {path.stat().st_ino: path for path in directory.rglob("*") if path.is_file()}


def test_large_files_go_to_the_cache_and_back_without_a_copy(one: Daemon, mnt: Path, tmp_path: Path) -> None:
    """What was uploaded is a cached file without a download, and without a copy: the same file. So is what is
    landed to be changed. The store is asked for nothing."""
    data = os.urandom(64 * MiB)
    put(mnt / "big", data)
    (landing_file,) = [
        inode
        for inode, path in files_below(tmp_path / "landing").items()
        if path.parent.name == "files" and path.stat().st_size == len(data)
    ]
    flushed(one)
    assert landing_file in files_below(tmp_path / "cache")
    read = one.status()["sources"]
    assert (mnt / "big").read_bytes() == data
    assert one.status()["sources"] == read, "the store was asked"
    until(lambda: one.status()["mount_files"]["open_files"] == 0)
    with open(mnt / "big", "r+b") as file:
        file.write(b"!")
    assert landing_file in files_below(tmp_path / "landing")
    flushed(one)
    assert (mnt / "big").read_bytes() == b"!" + data[1:]
    assert (one.bucket / "big").read_bytes() == b"!" + data[1:]
    writing = one.status()["writing"]
    assert (writing["kept_files"], writing["landed_files"], writing["copied_bytes"]) == (2, 1, 0)


def test_what_is_passed_through_from_memory_is_one_version(bucket: Path, tmp_path: Path, way: str) -> None:
    """A file that is cached in memory, and read there by the kernel itself, is written, sent, and written
    again, while everybody who ever opened it has it open: each reads what he opened, and a writer's bytes are
    the ones that are sent. Memory has no landing files, so these are copied."""
    if way != "passthrough":
        pytest.skip("only there the kernel is given cached files")
    if not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is not a tmpfs here")
    put(bucket / "big", first := os.urandom(3 * MiB))
    with contextlib.ExitStack() as mounted, contextlib.ExitStack() as opened:
        memory = mounted.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        tier, store = TierSettings(Medium.MEM, memory, 256 * MiB), MountPoint(bucket.as_uri())
        one = mounted.enter_context(writable(tmp_path, way, store, bucket=bucket, tier=tier))
        path = one.directory / "big"

        def read() -> BufferedReader:
            file = opened.enter_context(open(path, "rb"))
            assert file.read(1)
            return file

        def change(data: bytes) -> None:
            with open(path, "r+b") as file:
                file.write(data)

        path.read_bytes()
        one.wait_until_cached("big", len(first))
        of_first = read()
        assert one.status()["mount_files"]["open_passthrough"] == 1
        change(b"SECOND")
        of_second = read()
        flushed(one)
        again = read()
        change(b"THIRD!")
        of_third = read()
        for file, data in (
            (of_first, first), (of_second, b"SECOND" + first[6:]), (again, b"SECOND" + first[6:]),
            (of_third, b"THIRD!" + first[6:]),
        ):  # fmt: skip
            file.seek(0)
            assert file.read() == data
        flushed(one)
        assert (bucket / "big").read_bytes() == b"THIRD!" + first[6:]
        figures = one.status()["writing"]
        assert (figures["landing_tier"], figures["kept_files"], figures["landed_files"]) == ("", 0, 0)
