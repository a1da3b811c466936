"""The native driver on a real kernel: what makes no request, what passes through, what is refused, and
what programs may do with its files."""

import ctypes
import errno
import fcntl
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from datacache.cache.disk import Disk
from datacache.clock import SystemClock
from datacache.config.settings import IO, Consistency, IndexSettings, MountSettings, TierSettings
from datacache.index.snapshot import create_snapshot
from datacache.model import Dataset, KiB, Medium, MiB, MountPoint
from datacache.worker import opened_sources
from fuse import mountpoint
from fuse.filesystem import FETCHED_AT_OPEN
from tests.daemon.mounted.conftest import Daemon, Start
from tests.daemon.mounted.test_reading import EAGER, put
from tests.support.faulty_s3 import FaultyS3, Stall
from tests.support.reading import until

IMMUTABLE = IndexSettings(consistency=Consistency.IMMUTABLE)
LARGE = FETCHED_AT_OPEN + 2 * MiB + 17
"""Bytes of a file that no open waits for."""


@pytest.fixture
def driver() -> str:
    if not mountpoint.is_native("auto"):
        pytest.skip("this kernel is older than Linux 6.9, where the native driver begins")
    return "native"


@pytest.fixture(params=["ssd", "mem"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TierSettings]:
    """A directory on a disk, and one on a tmpfs."""
    if request.param == "ssd":
        yield TierSettings(Medium.SSD, str(tmp_path / "cache"), 256 * MiB)
        return
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="native-") as directory:
        yield TierSettings(Medium.MEM, directory, 256 * MiB)


@pytest.fixture
def contents(bucket: Path) -> dict[str, bytes]:
    """Small files in two directories, and what is in them."""
    rng = random.Random(1)
    found = {f"{d}/{i:03}": rng.randbytes(rng.randrange(1, 200_000)) for d in ("a", "b/c") for i in range(40)}
    for name, data in found.items():
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_bytes(data)
    return found


def on(tier: TierSettings, one: Daemon) -> Daemon:
    """Start `one` with this tier alone."""
    one.settings = replace(one.settings, cache=replace(one.settings.cache, tiers=(tier,)))
    one.start()
    assert one.answer.get("ok"), one.answer
    return one


def asked(one: Daemon, work: Callable[[], object]) -> dict[str, int]:
    """The requests that `work` makes, FORGET aside."""
    before = one.requests()
    work()
    after = one.requests()
    made = {kind: after[kind] - before.get(kind, 0) for kind in after}
    return {kind: count for kind, count in made.items() if count and "forget" not in kind}


def epoch(one: Daemon, contents: dict[str, bytes], seed: int) -> Callable[[], None]:
    """Every file is statted, opened, read and closed, in a new order."""

    def read() -> None:
        names = sorted(contents)
        random.Random(seed).shuffle(names)
        for name in names:
            path = one.directory / name
            assert path.stat().st_size == len(contents[name])
            fd = os.open(path, os.O_RDONLY)
            assert os.read(fd, 1 << 20) == contents[name]
            os.close(fd)

    return read


def walk(one: Daemon) -> None:
    """What `ls -lR` and `find` ask."""
    for command in (["ls", "-lR"], ["find", ".", "-type", "f", "-size", "+1"]):
        subprocess.run(command, cwd=one.directory, check=True, capture_output=True)


# ---- requests ------------------------------------------------------------------------------------


def test_a_snapshot_of_small_files_costs_no_request_from_the_second_epoch_on(
    daemon: Start, contents: dict[str, bytes]
) -> None:
    """`--io auto` takes the page cache for it. First epoch after a listing: at most 1.1 requests a file;
    then listing, stat, open, read and close of every file make none. `find` and `ls -lR`: none the second
    time."""
    one = daemon(start=False)
    with opened_sources(one.settings, clock=SystemClock()) as (dataset, sources, _):
        create_snapshot(dataset, sources, state=one.settings.state, name="one", clock=SystemClock())
    one.settings = replace(one.settings, index=IndexSettings(snapshot="one"))
    one.start()
    assert one.answer.get("ok"), one.answer
    walk(one)
    assert asked(one, lambda: walk(one)) == {}
    first = asked(one, epoch(one, contents, 1))
    assert sum(first.values()) <= 1.1 * len(contents), first
    for seed in (2, 3):
        assert asked(one, epoch(one, contents, seed)) == {}
    assert asked(one, lambda: walk(one)) == {}


def test_passthrough_costs_open_and_release(
    daemon: Start, contents: dict[str, bytes], tier: TierSettings
) -> None:
    """Over a warm cache after a listing: at most 2 requests a file, and no byte goes through us, by read
    or mmap."""
    on(tier, daemon(index=IMMUTABLE, start=False)).stop()
    one = on(tier, daemon(index=IMMUTABLE, start=False))
    walk(one)
    epoch(one, contents, 0)()
    one.stop()
    one = on(tier, daemon(index=IMMUTABLE, start=False))
    walk(one)
    served = one.status()["reads"]["bytes_served"]
    for seed in (1, 2):
        made = asked(one, epoch(one, contents, seed))
        assert made == {"open": len(contents), "release": len(contents)}

    def map_all() -> None:
        for name, data in contents.items():
            with open(one.directory / name, "rb", buffering=0) as file:
                assert file.readall() == data
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                    assert mapped[:] == data

    assert asked(one, map_all) == {"open": len(contents), "release": len(contents)}
    assert one.status()["reads"]["bytes_served"] == served


def test_a_large_file_is_served_until_it_is_whole_and_passed_through_beside_it(
    daemon: Start, bucket: Path, tier: TierSettings
) -> None:
    """Both opens are of one `st_ino`, and see the right bytes; the second makes no read request."""
    data = random.Random(2).randbytes(LARGE)
    (bucket / "f").write_bytes(data)
    one = on(tier, daemon(start=False))
    path = one.directory / "f"
    with open(path, "rb", buffering=0) as first:
        assert first.readall() == data
        assert one.status()["mount_files"]["open_passthrough"] == 0
        one.wait_until_cached("f", LARGE)
        with open(path, "rb", buffering=0) as second:
            assert one.status()["mount_files"]["open_passthrough"] == 1
            reads = one.status()["mount_requests"]["read"]
            assert second.readall() == data
            with mmap.mmap(second.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == data
            assert one.status()["mount_requests"]["read"] == reads
            os.posix_fadvise(first.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(first.fileno(), LARGE, 0) == data
            assert one.status()["mount_requests"]["read"] > reads
            assert os.fstat(first.fileno()).st_ino == os.fstat(second.fileno()).st_ino
    assert asked(one, lambda: path.read_bytes()).get("read", 0) == 0


def test_a_listing_again_costs_nothing_on_a_live_bucket_that_is_immutable(
    daemon: Start, contents: dict[str, bytes]
) -> None:
    """Not only snapshots: where nothing changes, the kernel keeps names for ever, with passthrough too."""
    one = daemon(index=IMMUTABLE, io=IO.PASSTHROUGH)
    walk(one)
    again = asked(one, lambda: walk(one))
    assert again.keys() <= {"opendir", "releasedir"}, again


@pytest.mark.parametrize("io", [IO.PASSTHROUGH, IO.PAGECACHE])
def test_a_listing_again_costs_nothing_on_a_live_bucket_within_the_ttl(
    daemon: Start, contents: dict[str, bytes], bucket: Path, io: IO
) -> None:
    """The kernel keeps names, and lists directories by itself, as long as we say that nothing has changed."""
    one = daemon(index=IndexSettings(ttl=3600), io=io)
    walk(one)
    again = asked(one, lambda: walk(one))
    assert again.keys() <= {"opendir", "releasedir"}, again
    assert sorted(os.listdir(one.directory / "a")) == sorted(name[2:] for name in contents if name[0] == "a")


@pytest.mark.parametrize("io", [IO.PASSTHROUGH, IO.PAGECACHE])
def test_what_the_kernel_asks_all_the_same(daemon: Start, bucket: Path, io: IO) -> None:
    """isatty, which Python before 3.14 asks of whatever it opens without a `buffering`: one request. Reading
    ahead by posix_fadvise fills the page cache of the mount, which passthrough does not look into."""
    (bucket / "f").write_bytes(b"x" * 100_000)
    one = daemon(index=IMMUTABLE, io=io)
    (one.directory / "f").read_bytes()
    fd = os.open(one.directory / "f", os.O_RDONLY)
    try:
        before = one.status()["mount_requests"]
        assert not os.isatty(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        after = one.status()["mount_requests"]
        made = {kind: after[kind] - before.get(kind, 0) for kind in after}
        assert made["ioctl"] == 1
        assert made["read"] == (1 if io is IO.PASSTHROUGH else 0)
        assert os.read(fd, 1 << 20) == b"x" * 100_000
    finally:
        os.close(fd)


# ---- in use --------------------------------------------------------------------------------------


def cached_file(tier: TierSettings, data: bytes) -> str:
    """The cached file that holds `data`."""
    for directory, _, names in os.walk(tier.path):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.getsize(path) == len(data) and Path(path).read_bytes() == data:
                return path
    raise AssertionError("it is not cached")


def test_a_cached_file_is_in_use_while_it_is_open_or_mapped(
    daemon: Start, bucket: Path, tier: TierSettings
) -> None:
    """RELEASE does not prove that a file is out of use: a mapping outlives it. What a tier asks before
    it counts space as free says so; and what is evicted meanwhile counts until then."""
    data = random.Random(3).randbytes(MiB)
    (bucket / "f").write_bytes(data)
    one = on(tier, daemon(start=False))
    path = one.directory / "f"
    path.read_bytes()
    one.requests()
    backing = os.open(cached_file(tier, data), os.O_RDONLY)
    disk = Disk()
    mapper = None
    try:
        until(lambda: disk.alone(backing))
        fd = os.open(path, os.O_RDONLY)
        assert not disk.alone(backing)
        mapper = Mapping(fd, len(data))
        os.close(fd)
        one.requests()  # RELEASE has been answered
        assert one.status()["mount_files"]["open_passthrough"] == 0
        assert not disk.alone(backing)
        assert one.control().evict("/f")[0] == 1
        assert one.status()["tiers"][0]["used"] >= len(data)
        assert mapper.content() == data
        assert path.read_bytes() == data, "fetched again, into another file, beside the mapping"
        assert mapper.content() == data
        assert one.status()["tiers"][0]["used"] >= 2 * len(data)
        mapper.close()
        mapper = None
        until(lambda: disk.alone(backing))
    finally:
        if mapper is not None:
            mapper.close()
        os.close(backing)


class Mapping:
    """A mapping that holds no descriptor, as another program's would not."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
        )  # fmt: skip
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._size = size
        at = self._libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        assert at not in (None, 2**64 - 1), os.strerror(ctypes.get_errno())
        self._at = at

    def content(self) -> bytes:
        return ctypes.string_at(self._at, self._size)

    def close(self) -> None:
        assert self._libc.munmap(self._at, self._size) == 0


# ---- refusals ------------------------------------------------------------------------------------


def lines(one: Daemon, part: str) -> list[str]:
    return [line for line in one.log.read_text().splitlines() if part in line]


def test_a_cache_on_overlayfs_is_served_and_one_line_says_why(
    daemon: Start, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """A container's root, say: the kernel does not stack passthrough on it."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount an overlayfs")
    parts = {name: tmp_path / "overlay" / name for name in ("lower", "upper", "work", "merged")}
    for part in parts.values():
        part.mkdir(parents=True)
    options = ",".join(f"{name}dir={parts[name]}" for name in ("lower", "upper", "work"))
    mounting = ["mount", "-t", "overlay", "overlay", "-o", options, str(parts["merged"])]
    if (done := subprocess.run(mounting, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"no overlayfs can be mounted here: {done.stderr.strip()}")
    one = None
    try:
        one = on(TierSettings(Medium.SSD, str(parts["merged"]), 256 * MiB), daemon(start=False))
        for seed in range(2):
            epoch(one, contents, seed)()
        assert one.requests()["read"] >= len(contents)
        [line] = lines(one, "no passthrough")
        assert "overlayfs" in line
    finally:
        if one is not None:
            one.stop()
        subprocess.run(["umount", str(parts["merged"])], check=True)


WITHOUT_ADMIN = """\
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(24, 21, 0, 0, 0) == 0  # PR_CAPBSET_DROP, CAP_SYS_ADMIN: it is gone with the next exec
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_daemon_without_the_privilege_serves_and_one_line_says_why(
    daemon: Start, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """No CAP_SYS_ADMIN: the kernel takes no backing files from it."""
    if os.geteuid() != 0:
        pytest.skip("needs root, which has the privilege to give up")
    program, drop = tmp_path / "python", tmp_path / "drop.py"
    drop.write_text(WITHOUT_ADMIN)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{drop}" "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    one = daemon()
    done = subprocess.run(
        [
            sys.executable, "-c",
            "import sys; from fuse import broker; control, sys.executable = sys.argv[1:]\n"
            "print(broker.ask_for_upgrade(control, None, timeout=30))",
            registered(one), str(program),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for seed in range(2):
        epoch(one, contents, seed)()
    assert one.requests()["read"] >= len(contents)
    [line] = lines(one, "no passthrough")
    assert "CAP_SYS_ADMIN" in line


def registered(one: Daemon) -> str:
    found = one.registered()
    assert found is not None
    return found.socket


# ---- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", [IO.PASSTHROUGH, IO.SERVED])
def test_a_changed_object_is_seen_though_the_kernel_believes_names_for_an_hour(
    daemon: Start, bucket: Path, io: IO
) -> None:
    """With --entry-timeout 1h the kernel is told as soon as the index learns of a change: of an object
    that is replaced, one that is gone, and a whole directory that is."""
    (bucket / "d").mkdir()
    for name in ("f", "g", "d/h"):
        put(bucket / name, b"first")
    one = daemon(index=EAGER, io=io, mount=MountSettings(entry_timeout=3600))
    path = one.directory
    for name in ("f", "g", "d/h"):
        assert (path / name).stat().st_size == 5
    put(bucket / "f", b"the second one")
    os.unlink(bucket / "g")
    os.unlink(bucket / "d" / "h")
    os.rmdir(bucket / "d")
    assert (path / "f").stat().st_size == 5, "nobody has asked"
    assert not (path / "other").exists()  # asks; so the index learns of all of it
    until(lambda: (path / "f").stat().st_size == 14)
    until(lambda: not (path / "g").exists())
    assert (path / "f").read_bytes() == b"the second one"
    assert sorted(os.listdir(path)) == ["f"]


@pytest.mark.parametrize("io", [IO.PAGECACHE, IO.PASSTHROUGH])
def test_a_new_object_is_listed_below_directories_that_never_change(
    daemon: Start, bucket: Path, io: IO
) -> None:
    """The directories above the mount points of a data set last for ever; what is in a bucket does not."""
    (bucket / "val").mkdir()
    put(bucket / "val" / "f", b"first")
    one = daemon(index=EAGER, io=io, start=False)
    points = tuple(MountPoint((bucket / "val").as_uri(), path) for path in ("/all/train", "/all/val"))
    one.settings = replace(one.settings, dataset=Dataset("test", points))
    one.start()
    assert one.answer.get("ok"), one.answer
    for listed in ("", "all"):
        os.listdir(one.directory / listed)
    assert os.listdir(one.directory / "all" / "val") == ["f"]
    put(bucket / "val" / "g", b"second")
    assert sorted(os.listdir(one.directory / "all" / "val")) == ["f", "g"]
    assert sorted(os.listdir(one.directory / "all")) == ["train", "val"]


# ---- what programs do ----------------------------------------------------------------------------


@pytest.fixture(params=[IO.PASSTHROUGH, IO.PAGECACHE, IO.SERVED])
def any_way(request: pytest.FixtureRequest, daemon: Start) -> Daemon:
    """A mount for each way in which files are read."""
    return daemon(index=IMMUTABLE, io=request.param, mount=MountSettings(file_mode=0o555))


@pytest.fixture
def random_file(bucket: Path) -> bytes:
    """`f`, of 300 KiB and a bit."""
    data = random.Random(4).randbytes(300 * KiB + 123)
    (bucket / "f").write_bytes(data)
    return data


def test_direct_reads(random_file: bytes, any_way: Daemon) -> None:
    """O_DIRECT: benchmarks and databases; aligned, past the end too."""
    fd = os.open(any_way.directory / "f", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 64 * KiB) as buffer:  # aligned to a page
            for at in (0, 64 * KiB, 256 * KiB):
                expected = random_file[at : at + 64 * KiB]
                assert os.preadv(fd, [buffer], at) == len(expected)
                assert buffer[: len(expected)] == expected
    finally:
        os.close(fd)


def test_sendfile_splice_and_copy(random_file: bytes, any_way: Daemon, tmp_path: Path) -> None:
    """What web servers, cp and tee do, without looking at the bytes."""
    with open(any_way.directory / "f", "rb", buffering=0) as file:
        sent = 0
        with open(tmp_path / "sent", "w+b", buffering=0) as to:
            while count := os.sendfile(to.fileno(), file.fileno(), sent, 1 << 20):
                sent += count
        assert (tmp_path / "sent").read_bytes() == random_file
        read, write = os.pipe()
        with open(read, "rb", buffering=0) as source, open(write, "wb", buffering=0) as sink:
            spliced = b""
            while count := os.splice(file.fileno(), sink.fileno(), 32 * KiB, offset_src=len(spliced)):
                piece = b""
                while len(piece) < count:
                    piece += source.read(count - len(piece))
                spliced += piece
        assert spliced == random_file
    subprocess.run(["cp", any_way.directory / "f", tmp_path / "copied"], check=True)
    assert (tmp_path / "copied").read_bytes() == random_file


def test_programs_run_from_the_mount(any_way: Daemon, bucket: Path) -> None:
    """execve maps the file: a native program and a script."""
    program = Path("/bin/true").resolve().read_bytes()
    (bucket / "program").write_bytes(program)
    (bucket / "script").write_text("#!/bin/sh\necho here\n")
    subprocess.run([any_way.directory / "program"], check=True)
    done = subprocess.run([any_way.directory / "script"], check=True, capture_output=True)
    assert done.stdout == b"here\n"
    subprocess.run([any_way.directory / "program"], check=True)


HOLDS = """\
import fcntl, sys
file = open(sys.argv[1], "rb")
fcntl.flock(file, fcntl.LOCK_EX) if sys.argv[2] == "flock" else fcntl.lockf(file, fcntl.LOCK_SH, 10, 5)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["flock", "fcntl"])
def test_locks_hold_between_processes_and_over_a_kill(random_file: bytes, any_way: Daemon, kind: str) -> None:
    """POSIX and flock locks are left to the kernel, so they hold over kills of the daemon."""
    path = any_way.directory / "f"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, path, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder, open(path, "rb") as file:
        assert holder.stdout.readline() == b"held\n"

        def is_held() -> bool:
            if kind == "flock":
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                fcntl.flock(file, fcntl.LOCK_UN)
                return False
            # l_type, l_whence, l_start, l_len, l_pid: who would keep us from writing there
            layout = "hhqqi4x"
            asks = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind_held, _, start, length, pid = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, asks))
            if kind_held == fcntl.F_UNLCK:
                return False
            assert (start, length, pid) == (5, 10, holder.pid)
            return True

        assert is_held()
        before = any_way.status()["pid"]
        os.kill(before, signal.SIGKILL)
        assert os.pread(file.fileno(), 100, 0) == random_file[:100]
        assert path.stat().st_size == len(random_file)
        assert is_held()
        holder.stdin.close()
        assert holder.wait() == 0
        assert not is_held()


def test_no_errors_but_those_that_are_meant(any_way: Daemon, random_file: bytes) -> None:
    """Names that are too long, files used as directories, writing: the errno of any file system."""
    for name, number in (("n" * 256, errno.ENAMETOOLONG), ("f/x", errno.ENOTDIR), ("none", errno.ENOENT)):
        with pytest.raises(OSError) as wrong:
            os.stat(any_way.directory / name)
        assert wrong.value.errno == number
    with pytest.raises(OSError) as refused:
        os.open(any_way.directory / "f", os.O_RDWR)
    assert refused.value.errno == errno.EROFS


def test_a_reader_that_is_killed_dies_though_the_store_is_silent(daemon: Start) -> None:
    """The kernel keeps it until it is answered: that is at once; and no other signal ends an open or read."""
    with FaultyS3({"small": b"x" * 1000}) as store:
        store.add("get", *[Stall()] * 50)
        one = daemon(start=False)
        point = MountPoint("s3://bucket", options={"endpoint": store.endpoint, "anonymous": "true"})
        one.settings = replace(one.settings, dataset=Dataset("test", (point,)))
        one.start()
        assert one.answer.get("ok"), one.answer
        reader = subprocess.Popen(["cat", one.directory / "small"], stdout=subprocess.DEVNULL)
        until(lambda: store.count("get") > 0)
        reader.send_signal(signal.SIGWINCH)  # which cat does not care for
        with pytest.raises(subprocess.TimeoutExpired):
            reader.wait(0.5)
        reader.kill()
        assert reader.wait(4) == -signal.SIGKILL, "less than --stall-timeout, let alone --timeout"
