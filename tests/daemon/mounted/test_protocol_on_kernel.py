"""
The wire protocol against the kernel itself: a server that answers every operation which can be provoked.

Whatever the kernel sends is decoded with all sizes checked, and encoding it again gives the same bytes;
whatever we encode is taken by the kernel, and comes out at the caller as it was meant.
"""

import contextlib
import ctypes
import errno
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fuse import mountpoint, protocol
from fuse.protocol import Buffer, Capability, EmptyIn, Header, InitOut, Opcode, OpenFlag, StatfsOut

FILE, LINK, DIRECTORY = 50, 77, 1000
TAKEN = (
    Capability.ASYNC_READ | Capability.POSIX_LOCKS | Capability.FLOCK_LOCKS | Capability.BIG_WRITES
    | Capability.MAX_PAGES | Capability.INIT_EXT | Capability.PASSTHROUGH | Capability.HAS_RESEND
    | Capability.CREATE_SUPP_GROUP | Capability.SECURITY_CTX | Capability.HANDLE_KILLPRIV_V2
    | Capability.HAS_IOCTL_DIR | Capability.HAS_EXPIRE_ONLY
)  # fmt: skip
NOT_SENT_AS_ENCODED = (Opcode.INIT, Opcode.FLUSH, Opcode.STATX)
"""Longer in the kernel than what we know of it, or with leftovers in its padding."""

CLIENT = """
import ctypes, fcntl, json, os, select, stat, sys
at = sys.argv[1].encode()
failed = {}
def do(name, call, *arguments):
    try:
        return call(*arguments)
    except OSError as error:
        failed[name] = error.errno
libc = ctypes.CDLL(None, use_errno=True)
def rename_unless_there(a, b):
    if libc.renameat2(-100, a, -100, b, 1):
        raise OSError(ctypes.get_errno(), "renameat2")
file = at + b"/file"
found = os.stat(file)
assert (found.st_size, found.st_nlink, stat.S_IFMT(found.st_mode)) == (4096, 2, stat.S_IFREG)
do("missing", os.stat, at + b"/nothing")
do("negative", os.stat, at + b"/negative")
assert sorted(os.listdir(at)) == [b"dir1", b"file"]
with os.scandir(at) as listed:
    assert {one.name: one.is_dir() for one in listed} == {b"dir1": True, b"file": False}
f = os.open(file, os.O_RDWR)
assert os.pread(f, 100, 0) == b"x" * 100
assert os.pwrite(f, b"data" * 3000, 0) == 12000
for name, call, *rest in (
    ("fsync", os.fsync, f), ("fdatasync", os.fdatasync, f), ("truncate", os.ftruncate, f, 10),
    ("utime", lambda: os.utime(file, ns=(-5 * 10**9 + 3, 7))), ("chmod", os.chmod, file, 0o600),
    ("chown", os.chown, file, 1, 2), ("fallocate", os.posix_fallocate, f, 0, 100),
    ("data", os.lseek, f, 0, os.SEEK_DATA), ("hole", os.lseek, f, 0, os.SEEK_HOLE),
    ("lock", fcntl.lockf, f, fcntl.LOCK_EX | fcntl.LOCK_NB), ("flock", fcntl.flock, f, fcntl.LOCK_EX),
    ("getlk", fcntl.fcntl, f, fcntl.F_GETLK, bytes(32)),
    ("setxattr", os.setxattr, file, "user.a", b"value"), ("removexattr", os.removexattr, file, "user.a"),
    ("mkdir", os.mkdir, at + b"/nodir"), ("mknod", os.mkfifo, at + b"/nonode"),
    ("symlink", os.symlink, b"a/b/c", at + b"/nosym"), ("link", os.link, file, at + b"/nolink"),
    ("unless", rename_unless_there, file, at + b"/nofile3"), ("rename", os.rename, file, at + b"/nofile2"),
    ("unlink", os.unlink, file), ("rmdir", os.rmdir, at + b"/dir1"),
    ("access", os.access, file, os.R_OK), ("ioctl", fcntl.ioctl, f, 0xC0087801, bytearray(8)),
):
    do(name, call, *rest)
assert os.getxattr(file, "user.a") == b"user.a\\0" and os.listxattr(file) == ["user.a"]
poll = select.poll(); poll.register(f); poll.poll(100)
created = os.open(at + b"/nofile", os.O_CREAT | os.O_RDWR, 0o644)
do("copy", os.copy_file_range, f, created, 100, 0, 0)
os.close(created)
unnamed = do("tmpfile", os.open, at, os.O_TMPFILE | os.O_RDWR, 0o600)
if unnamed is not None: os.close(unnamed)
os.close(f)
assert os.readlink(at + b"/sym") == b"target"
space = os.statvfs(at)
assert (space.f_blocks, space.f_bavail, space.f_namemax) == (1000, 9, 255)
d = os.open(at, os.O_RDONLY)
do("fsyncdir", os.fsync, d)
libc.syncfs(d)
os.close(d)
print(json.dumps(failed))
"""


class Server:
    """Answers everything, and keeps what was wrong with what it was sent."""

    def __init__(self, descriptor: int, taken: Capability) -> None:
        self._descriptor, self._taken = descriptor, taken
        self._decoders: Mapping[int, protocol.Decoder] = protocol.DECODERS
        self._negotiated = 0
        self._next = 100
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        while True:
            try:
                raw = os.read(self._descriptor, 1 << 21)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return
            try:
                self.take(raw)
            except Exception as error:
                self.wrong.append(f"{protocol.opcode_name(protocol.opcode_of(raw))}: {error!r}")
                os.writev(self._descriptor, protocol.error(protocol.decode_header(raw).unique, errno.EIO))

    def take(self, raw: bytes) -> None:
        header, body = protocol.decode(raw, self._decoders)
        opcode = Opcode(header.opcode)
        self.seen[opcode.name] += 1
        if opcode not in NOT_SENT_AS_ENCODED:
            again = protocol.encode_request(opcode, body, negotiated=self._negotiated)
            sent = raw[protocol.HEADER_SIZE : len(raw) - header.extensions]
            assert again[protocol.HEADER_SIZE :] == sent, "encoded again it is something else"
        answer = self.answer(opcode, header, body)
        if answer is not None:
            os.writev(self._descriptor, answer)

    def node(self, mode: int, node: int = 0) -> bytes:
        if not node:
            self._next += 1
            node = self._next
        return protocol.encode_entry(node, protocol.attr(node, mode, size=4096, nlink=2), 0.5, 0.5)

    def answer(self, opcode: Opcode, header: Header, body: protocol.Request) -> list[Buffer] | None:
        unique = header.unique
        file, directory = 0o100644, 0o040755
        match body:
            case protocol.InitIn():
                caps = int(self._taken) & body.capabilities
                self._decoders, self._negotiated = protocol.decoders(caps), caps
                given = protocol.encode_init_out(
                    InitOut(
                        min(body.minor, protocol.MINOR),
                        1 << 20,
                        caps,
                        1 << 20,
                        max_pages=256,
                        max_stack_depth=1,
                    )
                )
            case protocol.LookupIn(name) if name.startswith(b"no"):
                return protocol.error(unique, errno.ENOENT)
            case protocol.LookupIn(name) if name.startswith(b"neg"):
                given = protocol.encode_negative(1.5)
            case protocol.LookupIn(name):
                given = (
                    self.node(directory, DIRECTORY) if name.startswith(b"dir")
                    else self.node(0o120777, LINK) if name == b"sym"
                    else self.node(file, FILE)
                )  # fmt: skip
            case protocol.GetattrIn() | protocol.SetattrIn():
                mode = directory if header.node in (1, DIRECTORY) else file
                given = protocol.encode_attr_out(protocol.attr(header.node, mode, size=4096, nlink=2))
            case protocol.OpenIn():
                given = protocol.encode_open_out(5, 0 if header.node == FILE else OpenFlag.DIRECT_IO)
                if opcode is Opcode.OPENDIR:
                    given = protocol.encode_open_out(5)
            case protocol.ReadIn() if opcode is Opcode.READ:
                given = b"x" * max(0, min(body.size, 4096 - body.offset))
            case protocol.ReadIn():
                given = self.listing(opcode, body) if body.offset == 0 else b""
            case protocol.WriteIn():
                given = protocol.encode_write_out(len(body.data))
            case protocol.CreateIn():
                given = protocol.encode_create_out(self.node(file), 7)
            case protocol.SymlinkIn():
                given = self.node(0o120777, LINK)
            case protocol.MkdirIn():
                given = self.node(directory)
            case protocol.MknodIn(mode):
                given = self.node(mode)
            case protocol.LinkIn(node):
                given = self.node(file, node)
            case EmptyIn() if opcode is Opcode.STATFS:
                given = protocol.encode_statfs_out(StatfsOut(1000, 10, 9, 100, 50, 4096, 255, 4096))
            case EmptyIn() if opcode is Opcode.READLINK:
                given = b"target"
            case protocol.GetxattrIn(size) | protocol.ListxattrIn(size):
                given = b"user.a\0" if size else protocol.encode_getxattr_out(7)
            case protocol.LkIn() if opcode is Opcode.GETLK:
                given = protocol.encode_lk_out(protocol.LkOut(0, 0, 2, 0))
            case protocol.LseekIn():
                given = protocol.encode_lseek_out(4096)
            case protocol.StatxIn():
                return protocol.error(unique, errno.ENOSYS)
            case protocol.IoctlIn():
                given = protocol.encode_ioctl_out(protocol.IoctlOut(0, 0, 0, 0)) + bytes(body.out_size)
            case protocol.PollIn():
                given = protocol.encode_poll_out(1)
            case protocol.CopyFileRangeIn() if opcode is Opcode.COPY_FILE_RANGE:
                given = protocol.encode_write_out(body.length)
            case protocol.CopyFileRangeIn():
                given = protocol.encode_copy_file_range_out(body.length)
            case (
                protocol.ForgetIn() | protocol.BatchForgetIn() | protocol.InterruptIn()
                | protocol.NotifyReplyIn()
            ):  # fmt: skip
                return None
            case _:
                given = b""
        return protocol.reply(unique, given)

    def listing(self, opcode: Opcode, body: protocol.ReadIn) -> bytes:
        into = bytearray()
        for number, name in enumerate((b".", b"..", b"file", b"dir1"), 1):
            kind = 8 if name == b"file" else 4
            if opcode is Opcode.READDIR:
                assert protocol.add_dirent(into, body.size, number, number, kind, name)
            else:
                entry = self.node(0o100644, FILE) if name == b"file" else self.node(0o040755, DIRECTORY)
                if name.startswith(b"."):
                    entry = protocol.encode_negative(0)
                assert protocol.add_direntplus(into, body.size, entry, number, number, kind, name)
        return bytes(into)


@pytest.fixture
def raw_mount(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A descriptor of `/dev/fuse`, and where it is mounted, with nobody behind it yet."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount without a daemon of ours")
    if not mountpoint.is_native("auto"):
        pytest.skip("this kernel is older than Linux 6.9, whose protocol this is")
    directory = tmp_path / "mnt"
    directory.mkdir()
    descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    done = libc.mount(b"protocol", os.fsencode(directory), b"fuse.protocol", 0, options)
    assert done == 0, os.strerror(ctypes.get_errno())
    try:
        yield descriptor, directory
    finally:
        libc.umount2(os.fsencode(directory), 2)  # MNT_DETACH
        os.close(descriptor)


@pytest.mark.parametrize("extended", [False, True])
def test_every_operation_that_can_be_provoked(raw_mount: tuple[int, Path], extended: bool) -> None:
    """With and without the capabilities that change layouts: SETXATTR_EXT, READDIRPLUS."""
    descriptor, directory = raw_mount
    more = Capability.SETXATTR_EXT | Capability.DO_READDIRPLUS
    server = Server(descriptor, TAKEN | more if extended else TAKEN)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", CLIENT, directory],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        for notification in (
            protocol.notify_inval_inode(FILE), protocol.notify_inval_entry(1, b"file"),
            protocol.notify_inval_entry(1, b"dir1", protocol.InvalEntryFlag.EXPIRE_ONLY),
            protocol.notify_resend(), protocol.notify_store(FILE, 0, b"abc"),
            protocol.notify_delete(1, FILE, b"file"),
        ):  # fmt: skip
            with contextlib.suppress(FileNotFoundError):  # understood, and known no more
                assert os.write(descriptor, notification) == len(notification)
    finally:
        ctypes.CDLL(None).umount2(os.fsencode(directory), 2)
        thread.join(20)
    assert done.returncode == 0, done.stderr
    assert server.wrong == []
    assert json.loads(done.stdout.splitlines()[-1]) == {"missing": errno.ENOENT, "negative": errno.ENOENT}
    assert {
        "ACCESS", "CREATE", "FALLOCATE", "FLUSH", "FSYNC", "FSYNCDIR", "GETATTR", "GETLK", "GETXATTR", "INIT",
        "IOCTL", "LINK", "LISTXATTR", "LOOKUP", "LSEEK", "MKDIR", "MKNOD", "OPEN", "OPENDIR", "POLL", "READ",
        "READLINK", "RELEASE", "RELEASEDIR", "REMOVEXATTR", "RENAME", "RENAME2", "RMDIR", "SETATTR", "SETLK",
        "SETXATTR", "STATFS", "SYMLINK", "TMPFILE", "UNLINK", "WRITE",
        "READDIRPLUS" if extended else "READDIR",
    } <= set(server.seen)  # fmt: skip
    assert {"COPY_FILE_RANGE", "COPY_FILE_RANGE_64"} & set(server.seen)
