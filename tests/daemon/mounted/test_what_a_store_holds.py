"""What an object store cannot hold, and what becomes of it: each row of the table in docs/semantics.md, on a
mount, and in the bucket of a real S3 server."""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from datacache.config.settings import UploadSettings
from datacache.model import Dataset, MountPoint
from tests.daemon.mounted.conftest import WAYS, Daemon, flushed, start_writable, writable
from tests.support.s3 import S3Server
from tests.support.stores import Bucket

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(versitygw: S3Server) -> S3Server:
    versitygw.make_bucket("holds")
    return versitygw


@dataclass
class It:
    """A mount, the bucket behind it, and a directory in both for one test."""

    one: Daemon
    bucket: Bucket
    name: str

    @property
    def top(self) -> Path:
        return self.one.directory / self.name

    def flushed(self) -> "It":
        flushed(self.one)
        return self

    def keys(self) -> list[str]:
        """All below the directory; its own object is left out."""
        found = [key.removeprefix(self.name + "/") for key in self.bucket.keys(self.name + "/")]
        return sorted(filter(None, found))

    def read(self, name: str) -> bytes:
        return self.bucket.read(f"{self.name}/{name}")

    def head(self, name: str) -> dict[str, Any]:
        key = f"{self.bucket.prefix}{self.name}/{name}"
        return dict(self.bucket.server.client.head_object(Bucket=self.bucket.name, Key=key))

    def clean(self, name: str, data: bytes) -> Path:
        """A file that the bucket has, and nothing else is known of."""
        (self.top / name).write_bytes(data)
        self.flushed()
        return self.top / name


@pytest.fixture(scope="module")
def mount(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Bucket]]:
    bucket = Bucket(server, "holds", "one/")
    base = tmp_path_factory.mktemp("holds")
    with writable(base, WAYS[0], bucket.mount_point(), environment=bucket.environment) as one:
        yield one, bucket


@pytest.fixture
def it(mount: tuple[Daemon, Bucket], request: pytest.FixtureRequest) -> It:
    found = It(*mount, request.function.__name__)
    found.top.mkdir()
    (found.top / "kept").touch()
    return found.flushed()


@pytest.fixture
def of_two(server: S3Server, tmp_path: Path) -> Iterator[Path]:
    """Where a data set of two mount points is mounted, at `a` and `b`."""
    buckets = [Bucket(server, "holds", f"{name}/") for name in ("two-a", "two-b")]
    for bucket in buckets:
        server.put(bucket.name, bucket.prefix + "there", b"x")
    points = tuple(
        MountPoint(bucket.mount_point().uri, f"/{name}", options=bucket.mount_point().options)
        for name, bucket in zip("ab", buckets, strict=True)
    )
    later = UploadSettings(delay=600)
    environment = buckets[0].environment
    with writable(tmp_path, WAYS[0], points[0], environment=environment, upload=later, start=False) as one:
        one.settings = one.settings.__class__(**{**vars(one.settings), "dataset": Dataset("two", points)})
        start_writable(one, WAYS[0])
        yield one.directory


def failing(act: Callable[..., object], *args: Any) -> int:
    with pytest.raises(OSError) as caught:
        act(*args)
    return caught.value.errno or 0


def test_bytes(it: It) -> None:
    """create, write anywhere, append, truncate, holes, fallocate (but for collapse and insert) | as on a
    local disk (`du` shows the full size); the object is the file as it was at its last close"""
    path = it.top / "f"
    with open(path, "wb") as file:
        file.write(b"begin")
        file.seek(10_000)
        file.write(b"end")
    with open(path, "ab") as file:
        file.write(b" and more")
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 20_000)
        file.truncate(15_000)
    wanted = (b"begin" + bytes(9_995) + b"end and more").ljust(15_000, b"\0")
    assert path.read_bytes() == wanted
    assert path.stat().st_blocks * 512 >= 15_000
    assert it.flushed().read("f") == wanted
    with open(path, "r+b") as file:
        file.write(b"BEGIN")
        file.flush()
        assert path.read_bytes()[:5] == b"BEGIN"
        assert it.read("f")[:5] == b"begin", "it is not closed"
    assert it.flushed().read("f") == b"BEGIN" + wanted[5:]


def test_change(it: It) -> None:
    """change an existing object | it is fetched whole first, and uploaded whole"""
    path = it.clean("f", b"0123456789" * 1000)
    with open(path, "r+b") as file:
        file.seek(5)
        file.write(b"X")
    assert it.flushed().read("f") == b"01234X6789" + b"0123456789" * 999


def test_rename_of_a_file(it: It) -> None:
    """rename of a file | the store copies, then the old name is deleted; of what was not uploaded yet, the
    new name is uploaded"""
    it.clean("f", b"first")
    sent = it.one.status()["writing"]["uploads"]
    (it.top / "f").rename(it.top / "g")
    assert it.flushed().keys() == ["g", "kept"]
    now = it.one.status()["writing"]["uploads"]
    assert (now["copies"] - sent["copies"], now["uploads"] - sent["uploads"]) == (1, 0)
    with open(it.top / "new", "wb") as file:
        file.write(b"second")
        (it.top / "new").rename(it.top / "newer")
    assert it.flushed().keys() == ["g", "kept", "newer"]
    assert (it.read("g"), it.read("newer")) == (b"first", b"second")
    assert it.one.status()["writing"]["uploads"]["copies"] == now["copies"]


def test_between_mount_points(of_two: Path) -> None:
    """rename between mount points | EXDEV"""
    assert failing(os.rename, of_two / "a" / "there", of_two / "b" / "here") == errno.EXDEV
    assert (of_two / "a" / "there").read_bytes() == b"x"


def test_attributes(it: It) -> None:
    """mode, owner, group, modification time | kept on this node; sent with the next upload as metadata
    (`mode`, `uid`, `gid`, `mtime`, as rclone and s3fs name them); never an upload of their own. Not read back
    from the bucket"""
    path = it.clean("f", b"first")
    before = it.head("f")
    path.chmod(0o640)
    os.chown(path, 12, 34)
    os.utime(path, ns=(0, 1_500_000_000_123_456_789))
    st = path.stat()
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid) == (0o640, 12, 34)
    assert st.st_mtime_ns == 1_500_000_000_123_456_789
    assert it.flushed().head("f")["LastModified"] == before["LastModified"], "never an upload of their own"
    with open(path, "ab") as file:
        file.write(b" and more")
    os.utime(path, ns=(0, 1_600_000_000_000_000_000))
    found = it.flushed().head("f")["Metadata"]
    assert (int(found["mode"]) & 0o7777, found["uid"], found["gid"]) == (0o640, "12", "34")
    assert float(found["mtime"]) > 1_500_000_001


def test_access_time(it: It) -> None:
    """access time | not kept; shown as the modification time"""
    path = it.clean("f", b"first")
    os.utime(path, ns=(1, 1_500_000_000_000_000_000))
    path.read_bytes()
    assert path.stat().st_atime_ns == path.stat().st_mtime_ns == 1_500_000_000_000_000_000


def test_xattrs(it: It) -> None:
    """extended attributes `user.*` | kept on this node, 64 KiB a file (beyond, ENOSPC); sent with the next
    upload where they are small"""
    path = it.top / "f"
    with open(path, "wb") as file:
        os.setxattr(path, "user.colour", b"green")
        file.write(b"first")
    os.setxattr(path, "user.large", bytes(40_000))
    assert failing(os.setxattr, path, "user.larger", bytes(40_000)) == errno.ENOSPC
    os.removexattr(path, "user.large")
    it.flushed()
    assert os.getxattr(path, "user.colour") == b"green"
    with open(path, "ab") as file:
        file.write(b".")
    assert (
        bytes(it.flushed().head("f")["Metadata"]["xattrs"], "ascii").split(b":")[1] == b"green".hex().encode()
    )


def test_other_xattrs(it: It) -> None:
    """to set `security.*`, `system.*`, `trusted.*`, POSIX ACLs | EOPNOTSUPP"""
    acl = b"\x02\0\0\0" + b"\x01\0\x06\0\xff\xff\xff\xff" + b"\x04\0\x04\0\xff\xff\xff\xff" + (
        b"\x20\0\x04\0\xff\xff\xff\xff"
    )  # fmt: skip
    for name, value in (
        ("security.x", b"1"),
        ("trusted.x", b"1"),
        ("system.x", b"1"),
        ("system.posix_acl_access", acl),
    ):
        assert failing(os.setxattr, it.top / "kept", name, value) == errno.EOPNOTSUPP, name


def test_empty_directory(it: It) -> None:
    """an empty directory | an empty object `DIR/`"""
    (it.top / "empty").mkdir()
    assert it.flushed().keys() == ["empty/", "kept"]
    assert it.read("empty/") == b""
    (it.top / "empty").rmdir()
    assert it.flushed().keys() == ["kept"]


def test_symbolic_link(it: It) -> None:
    """a symbolic link | an object with its target as content; a link on this node only, elsewhere a file"""
    os.symlink("to/where", it.top / "link")
    assert it.flushed().read("link") == b"to/where"
    assert os.readlink(it.top / "link") == "to/where"


def test_what_cannot_be(it: It) -> None:
    """a hard link, a device, a FIFO, a socket | EPERM"""
    assert failing(os.link, it.top / "kept", it.top / "hard") == errno.EPERM
    assert failing(os.mkfifo, it.top / "fifo") == errno.EPERM
    assert failing(os.mknod, it.top / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3)) == errno.EPERM
    listener = socket.socket(socket.AF_UNIX)
    directory = os.open(it.top, os.O_PATH)
    try:
        assert failing(listener.bind, f"/proc/self/fd/{directory}/socket") == errno.EPERM
    finally:
        os.close(directory)
        listener.close()
    assert os.listdir(it.top) == ["kept"]


def test_locks(it: It) -> None:
    """flock and POSIX locks | held on this node by the kernel; other nodes do not see them"""
    path = it.top / "kept"
    with open(path, "r+b") as one, open(path, "r+b") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        assert failing(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB) == errno.EWOULDBLOCK
        fcntl.lockf(one, fcntl.LOCK_EX)
    requests = it.one.requests()
    assert not {kind for kind in requests if "lk" in kind}, "the kernel keeps them"


def test_names(it: It) -> None:
    """a name that no key is shown as ([names.md](names.md)), a key over 1,024 bytes, a name that is not UTF-8
    (but in a directory as the store) | EPERM"""
    deep = it.top
    while len(it.bucket.prefix + str(deep.relative_to(it.one.directory))) + 102 <= 1024:
        deep = deep / ("d" * 100)
        deep.mkdir()
    for act in (Path.mkdir, Path.touch):
        assert failing(act, deep / ("x" * 110)) == errno.EPERM
    assert failing(os.mkdir, os.fsencode(it.top) + b"/\xff") == errno.EPERM
    assert failing(os.mkdir, it.top / "x%file") == errno.EPERM


def test_above_the_mount_points(of_two: Path) -> None:
    """anything above the mount points of a data set of several | EPERM"""
    assert failing(os.mkdir, of_two / "c") == errno.EPERM
    assert failing(Path.touch, of_two / "file") == errno.EPERM
    assert failing(os.rename, of_two / "a", of_two / "c") == errno.EPERM
    assert failing(os.rmdir, of_two / "a") == errno.EPERM
