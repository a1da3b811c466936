"""The native driver of a mount that can be written to, over a kernel that is us: each request that changes
something, as it is on the wire."""

import errno
import itertools
import os
import socket
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from datacache.cache.memory import MemoryTier
from datacache.config.settings import MountSettings, ReadingSettings
from datacache.errors import Unavailable
from datacache.model import MiB
from datacache.reading.reader import Reader
from fuse import protocol
from fuse.connection import Agreement, Backings, agree
from fuse.protocol import (
    RESENT,
    ROOT,
    CopyFileRangeIn,
    CreateIn,
    EmptyIn,
    FallocateIn,
    FlushIn,
    FsyncIn,
    GetattrIn,
    GetxattrIn,
    InitIn,
    LinkIn,
    ListxattrIn,
    LookupIn,
    LseekIn,
    MkdirIn,
    MknodIn,
    Opcode,
    OpenFlag,
    OpenIn,
    ReadIn,
    ReleaseIn,
    RemovexattrIn,
    Rename2In,
    RenameIn,
    Reply,
    Request,
    RmdirIn,
    SetattrIn,
    SetattrValid,
    SetxattrIn,
    SymlinkIn,
    UnlinkIn,
    WriteIn,
)
from fuse.session import WritableSession
from fuse.writable import WritableFileSystem
from tests.conftest import AnnouncedLogs
from tests.daemon.test_writable import OLD, Registrar
from tests.support.overlays import Mounted, Place
from tests.support.reading import until

PATIENCE = 20.0
UNSET = SetattrIn(*(0,) * 13)


@dataclass
class Kernel:
    """The other end of the descriptor."""

    end: socket.socket
    files: WritableFileSystem
    mounted: Mounted
    registrar: Registrar
    uniques: Iterator[int] = field(default_factory=lambda: itertools.count(2, 2))

    def ask(self, opcode: int, body: Request, *, node: int = ROOT, again: bool = False) -> Reply:
        unique = next(self.uniques) | (RESENT if again else 0)
        self.end.send(protocol.encode_request(opcode, body, unique=unique, node=node, uid=5, gid=6))
        got = protocol.decode_reply(self.end.recv(2 * MiB))
        assert got.unique == unique
        return got

    def data(self, opcode: int, body: Request, *, node: int = ROOT, again: bool = False) -> bytes:
        got = self.ask(opcode, body, node=node, again=again)
        assert got.error == 0, os.strerror(got.error)
        return got.data

    def lookup(self, name: bytes) -> protocol.EntryOut:
        return protocol.decode_entry(self.data(Opcode.LOOKUP, LookupIn(name)))

    def create(self, name: bytes, flags: int = os.O_RDWR, *, again: bool = False) -> protocol.CreateOut:
        body = CreateIn(flags | os.O_CREAT, 0o100640, 0o22, 0, name)
        return protocol.decode_create_out(self.data(Opcode.CREATE, body, again=again))

    def write(self, made: protocol.CreateOut, data: bytes, offset: int = 0) -> int:
        body = WriteIn(made.open.fh, offset, 0, 0, 0, data)
        return protocol.decode_write_out(self.data(Opcode.WRITE, body, node=made.entry.node))

    def setattr(self, node: int, valid: SetattrValid, **fields: int) -> protocol.Attr:
        body = UNSET._replace(valid=int(valid), **fields)
        return protocol.decode_attr_out(self.data(Opcode.SETATTR, body, node=node)).attr


@pytest.fixture(params=[False, True], ids=["served", "passthrough"])
def it(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    place = Place.new()
    place.bucket.put("old", OLD)
    mounted = Mounted(place, ttl=60)
    reader = Reader([place.bucket], MemoryTier(name="mem:/x"), ReadingSettings(), clock=place.clock)
    registrar = Registrar()
    agreement, _ = agreed(passthrough=request.param)
    files = WritableFileSystem(
        mounted.overlay, reader, MountSettings(uid=12, gid=34), clock=place.clock,
        backings=Backings(registrar) if request.param else None,
    )  # fmt: skip
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MiB)
    theirs.settimeout(PATIENCE)
    session = WritableSession(files, ours.fileno(), agreement, max_threads=2, max_idle_threads=2)
    session.start()
    yield Kernel(theirs, files, mounted, registrar)
    theirs.close()
    assert session.wait(PATIENCE)
    until(lambda: not session.threads())
    ours.close()
    files.close()
    reader.close()
    mounted.close()
    place.remove()


def agreed(*, passthrough: bool) -> tuple[Agreement, protocol.InitOut]:
    offer = InitIn(7, 45, 128 * 1024, (1 << 43) - 1)
    return agree(offer, stateless=False, passthrough=passthrough, release="6.18.1", writable=True)


def test_what_is_agreed_on() -> None:
    """Writes of 1 MiB, and room for them; no directory stays in the page cache, and pages are written at
    once."""
    agreement, answer = agreed(passthrough=True)
    assert (answer.max_write, agreement.room) == (MiB, MiB + 4096)
    assert not agreement.cached_directories
    assert agreement.passthrough
    taken = protocol.Capability(answer.capabilities)
    assert protocol.Capability.ATOMIC_O_TRUNC | protocol.Capability.HANDLE_KILLPRIV_V2 in taken
    assert protocol.Capability.WRITEBACK_CACHE not in taken
    assert protocol.Capability.DONT_MASK not in taken
    assert replace(agreement, room=0) != agreement


def test_create_write_flush_release(it: Kernel) -> None:
    """A file of whoever asked for it; its closes are told; when all are there it is due."""
    made = it.create(b"new")
    attr = made.entry.attr
    assert (attr.uid, attr.gid, stat.S_IMODE(attr.mode), attr.size) == (5, 6, 0o640, 0)
    flags = OpenFlag(made.open.flags)
    assert OpenFlag.NOFLUSH not in flags
    assert (OpenFlag.PASSTHROUGH in flags) == bool(made.open.backing_id) == bool(it.registrar.modes)
    assert it.write(made, b"data") == 4
    assert it.write(made, b" more", 4) == 5
    node = made.entry.node
    told = protocol.decode_attr_out(it.data(Opcode.GETATTR, GetattrIn(0, 0), node=node))
    assert (told.attr.size, told.timeout) == (9, 0)
    assert it.data(Opcode.READ, ReadIn(made.open.fh, 5, 100, 0, 0, 0), node=node) == b"more"
    assert it.data(Opcode.FLUSH, FlushIn(made.open.fh, 0), node=node) == b""
    assert it.data(Opcode.FSYNC, FsyncIn(made.open.fh, 1), node=node) == b""
    assert it.data(Opcode.FSYNCDIR, FsyncIn(0, 0)) == b""
    assert not [op for op in it.mounted.settling.ops() if op.since]
    assert it.data(Opcode.RELEASE, ReleaseIn(made.open.fh, os.O_RDWR, 0, 0), node=node) == b""
    assert [op.key for op in it.mounted.settling.ops() if op.since] == ["new"]


def test_a_write_of_the_largest_size(it: Kernel) -> None:
    """One request."""
    made = it.create(b"big")
    data = os.urandom(MiB)
    assert it.write(made, data, 5) == MiB
    assert it.data(Opcode.READ, ReadIn(made.open.fh, 5, MiB, 0, 0, 0), node=made.entry.node) == data
    it.data(Opcode.RELEASE, ReleaseIn(made.open.fh, os.O_RDWR, 0, 0), node=made.entry.node)


def test_open_for_writing(it: Kernel) -> None:
    """ESTALE once; readers need not tell of their closes."""
    node = it.lookup(b"old").node
    assert it.ask(Opcode.OPEN, OpenIn(os.O_WRONLY, 0), node=node).error == errno.ESTALE
    node = it.lookup(b"old").node
    opened = protocol.decode_open_out(it.data(Opcode.OPEN, OpenIn(os.O_WRONLY, 0), node=node))
    assert not opened.flags & OpenFlag.NOFLUSH
    reader = protocol.decode_open_out(it.data(Opcode.OPEN, OpenIn(os.O_RDONLY, 0), node=node))
    assert reader.flags & OpenFlag.NOFLUSH
    assert reader.backing_id == opened.backing_id
    for fh in (opened.fh, reader.fh):
        it.data(Opcode.RELEASE, ReleaseIn(fh, 0, 0, 0), node=node)


@pytest.mark.parametrize("opcode", [Opcode.OPEN, Opcode.CREATE, Opcode.OPENDIR])
def test_what_was_opened_for_who_was_killed_is_closed(
    it: Kernel, opcode: Opcode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes no answer for it, and knows of no handle that it could close."""
    send, refused = os.writev, []

    def writev(descriptor: int, parts: Sequence[protocol.Buffer]) -> int:
        if refused:
            return send(descriptor, parts)
        refused.append(parts)
        raise FileNotFoundError(errno.ENOENT, "the request was aborted")

    node = it.lookup(b"old").node
    monkeypatch.setattr(os, "writev", writev)
    body, at = {
        Opcode.OPEN: (OpenIn(os.O_RDONLY, 0), node),
        Opcode.CREATE: (CreateIn(os.O_RDWR | os.O_CREAT, 0o100640, 0o22, 0, b"new"), ROOT),
        Opcode.OPENDIR: (OpenIn(0, 0), ROOT),
    }[opcode]
    it.end.send(protocol.encode_request(opcode, body, unique=next(it.uniques), node=at, uid=5, gid=6))
    until(lambda: bool(refused))
    until(lambda: not it.files.stats()["open_files"] and not it.files.stats()["open_directories"])
    assert not it.mounted.settling.dirty().open


def test_setattr(it: Kernel) -> None:
    """What is valid counts, and nothing else; times can be now."""
    made = it.create(b"new")
    node = made.entry.node
    assert stat.S_IMODE(it.setattr(node, SetattrValid.MODE, mode=0o100600, size=99).mode) == 0o600
    attr = it.setattr(node, SetattrValid.UID | SetattrValid.GID, uid=7, gid=8)
    assert (attr.uid, attr.gid, attr.size) == (7, 8, 0)
    assert it.setattr(node, SetattrValid.SIZE | SetattrValid.FH, size=10, fh=made.open.fh).size == 10
    assert it.setattr(node, SetattrValid.SIZE, size=5).size == 5
    attr = it.setattr(node, SetattrValid.MTIME | SetattrValid.ATIME, mtime=-5, mtime_nsec=7, atime=1)
    assert (attr.mtime, attr.mtime_nsec) == (-5, 7)
    assert it.setattr(node, SetattrValid.MTIME | SetattrValid.MTIME_NOW).mtime > 1_600_000_000
    it.setattr(node, SetattrValid.MODE, mode=0o104755)
    assert not it.setattr(node, SetattrValid.SIZE | SetattrValid.KILL_SUIDGID).mode & stat.S_ISUID
    it.data(Opcode.RELEASE, ReleaseIn(made.open.fh, os.O_RDWR, 0, 0), node=node)


def test_names(it: Kernel) -> None:
    """MKDIR, MKNOD, SYMLINK, READLINK, RENAME, RENAME2, UNLINK, RMDIR."""
    made = protocol.decode_entry(it.data(Opcode.MKDIR, MkdirIn(0o750, 0o22, b"dir")))
    assert (made.attr.mode, made.attr.uid) == (stat.S_IFDIR | 0o750, 5)
    file = protocol.decode_entry(it.data(Opcode.MKNOD, MknodIn(0o100600, 0, 0, b"file")))
    assert file.attr.mode == 0o100600
    link = protocol.decode_entry(it.data(Opcode.SYMLINK, SymlinkIn(b"link", b"dir/x")))
    assert stat.S_ISLNK(link.attr.mode)
    assert it.data(Opcode.READLINK, EmptyIn(), node=link.node) == b"dir/x"
    assert it.data(Opcode.RENAME, RenameIn(made.node, b"file", b"x")) == b""
    exists = Rename2In(ROOT, 1, b"link", b"old")
    assert it.ask(Opcode.RENAME2, exists).error == errno.EEXIST
    assert it.ask(Opcode.RENAME2, exists._replace(flags=2)).error == errno.EINVAL
    assert it.ask(Opcode.RMDIR, RmdirIn(b"dir")).error == errno.ENOTEMPTY
    assert it.data(Opcode.UNLINK, UnlinkIn(b"x"), node=made.node) == b""
    assert it.data(Opcode.RMDIR, RmdirIn(b"dir")) == b""
    listed = it.data(Opcode.READDIR, ReadIn(9, 0, 4096, 0, 0, 0))
    types = {entry.name: entry.type for entry in protocol.decode_dirents(listed)}
    assert types == {b"old": stat.S_IFREG >> 12, b"link": stat.S_IFLNK >> 12}


def test_requests_that_come_again(it: Kernel) -> None:
    """After RESEND: what the daemon before has done is answered as if it were done now."""
    it.data(Opcode.MKDIR, MkdirIn(0o755, 0, b"dir"))
    assert it.ask(Opcode.MKDIR, MkdirIn(0o755, 0, b"dir")).error == errno.EEXIST
    assert protocol.decode_entry(it.data(Opcode.MKDIR, MkdirIn(0o755, 0, b"dir"), again=True)).node
    it.data(Opcode.RMDIR, RmdirIn(b"dir"))
    it.data(Opcode.RMDIR, RmdirIn(b"dir"), again=True)
    made = it.create(b"new", os.O_RDWR | os.O_EXCL)
    again = it.create(b"new", os.O_RDWR | os.O_EXCL, again=True)
    assert again.entry.node == made.entry.node
    it.data(Opcode.UNLINK, UnlinkIn(b"new"))
    it.data(Opcode.UNLINK, UnlinkIn(b"new"), again=True)
    for one in (made, again):
        it.data(Opcode.RELEASE, ReleaseIn(one.open.fh, os.O_RDWR, 0, 0), node=one.entry.node)


def test_extended_attributes(it: Kernel) -> None:
    """SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR."""
    node = it.lookup(b"old").node
    assert it.data(Opcode.SETXATTR, SetxattrIn(0, 0, b"user.x", b"value"), node=node) == b""
    assert it.ask(Opcode.SETXATTR, SetxattrIn(1, 0, b"user.x", b""), node=node).error == errno.EEXIST
    assert it.data(Opcode.GETXATTR, GetxattrIn(100, b"user.x"), node=node) == b"value"
    assert it.data(Opcode.LISTXATTR, ListxattrIn(100), node=node) == b"user.x\0"
    assert it.data(Opcode.REMOVEXATTR, RemovexattrIn(b"user.x"), node=node) == b""
    assert it.ask(Opcode.GETXATTR, GetxattrIn(100, b"user.x"), node=node).error == errno.ENODATA
    # Never ENOSYS, which would stop all questions.
    assert it.ask(Opcode.GETXATTR, GetxattrIn(0, b"security.capability"), node=node).error == errno.ENODATA


def test_fallocate(it: Kernel) -> None:
    """The size follows."""
    made = it.create(b"new")
    node = made.entry.node
    assert it.data(Opcode.FALLOCATE, FallocateIn(made.open.fh, 0, 5000, 0), node=node) == b""
    told = protocol.decode_attr_out(it.data(Opcode.GETATTR, GetattrIn(0, 0), node=node))
    assert told.attr.size == 5000
    it.data(Opcode.RELEASE, ReleaseIn(made.open.fh, os.O_RDWR, 0, 0), node=node)


def test_statfs_has_free_space(it: Kernel) -> None:
    """That of the landing zone."""
    found = protocol.decode_statfs_out(it.data(Opcode.STATFS, EmptyIn()))
    assert 0 < found.bavail == found.bfree <= found.blocks
    assert 0 < found.ffree <= found.files


def test_handles_of_an_earlier_daemon(it: Kernel) -> None:
    """WRITE, FSYNC and RELEASE of a handle that is not known, and READ."""
    made = it.create(b"new")
    strange = made._replace(open=made.open._replace(fh=77 << 48))
    assert it.write(strange, b"by node") == 7
    node = made.entry.node
    assert it.data(Opcode.READ, ReadIn(strange.open.fh, 3, 100, 0, 0, 0), node=node) == b"node"
    it.data(Opcode.FSYNC, FsyncIn(strange.open.fh, 0), node=node)
    it.data(Opcode.FLUSH, FlushIn(strange.open.fh, 0), node=node)
    it.data(Opcode.RELEASE, ReleaseIn(strange.open.fh, os.O_RDWR, 0, 0), node=node)
    assert [node.writers for node in it.mounted.journal.nodes()] == [1], "ours is still open"
    it.data(Opcode.RELEASE, ReleaseIn(made.open.fh, os.O_RDWR, 0, 0), node=node)
    assert [node.writers for node in it.mounted.journal.nodes()] == [0]


UNKNOWN: list[tuple[Opcode, Request, int]] = [
    (Opcode.LINK, LinkIn(2, b"hard"), errno.EPERM),
    (Opcode.TMPFILE, CreateIn(os.O_RDWR, 0o600, 0, 0, b"/"), errno.ENOSYS),
    (Opcode.COPY_FILE_RANGE, CopyFileRangeIn(1, 0, 2, 3, 0, 10, 0), errno.ENOSYS),
    (Opcode.LSEEK, LseekIn(1, 0, os.SEEK_DATA), errno.ENOSYS),
]


@pytest.mark.parametrize(("opcode", "body", "number"), UNKNOWN, ids=lambda value: getattr(value, "name", ""))
def test_what_the_kernel_does_by_itself_or_nobody_does(
    it: Kernel, opcode: Opcode, body: Request, number: int
) -> None:
    """ENOSYS has it fall back, and not ask again."""
    assert it.ask(opcode, body).error == number


class Waiting:
    """Stands for `early.Early`: what it is asked for waits until the test lets it go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.asked: list[tuple[int, bool]] = []
        self.error: Exception | None = None

    def opened(self, ino: int) -> None: ...
    def closed(self, ino: int) -> None: ...
    def synced(self, ino: int) -> None: ...

    def store(self, ino: int, *, closing: bool = False) -> None:
        self.asked.append((ino, closing))
        assert self.go_on.wait(PATIENCE)
        if self.error is not None:
            raise self.error


def test_closes_that_wait_for_the_store_are_in_nobody_s_way(it: Kernel, logs: AnnouncedLogs) -> None:
    """More of them than there are threads for requests; each is answered when it is done, with what came of
    it."""
    waiting = Waiting()
    it.files._early = waiting  # type: ignore[assignment]
    it.files.stores = True
    made = it.create(b"a")
    assert it.write(made, b"x") == 1
    uniques = [next(it.uniques) for _ in range(8)]
    for n, unique in enumerate(uniques):
        body, code = (
            (FlushIn(made.open.fh, 0), Opcode.FLUSH) if n % 2 else (FsyncIn(made.open.fh, 0), Opcode.FSYNC)
        )
        it.end.send(protocol.encode_request(code, body, unique=unique, node=made.entry.node, uid=5, gid=6))
    until(lambda: len(waiting.asked) == 8)
    assert sorted(closing for _, closing in waiting.asked) == [False] * 4 + [True] * 4
    it.data(Opcode.GETATTR, GetattrIn(0, 0), node=made.entry.node)
    waiting.go_on.set()
    found = [protocol.decode_reply(it.end.recv(2 * MiB)) for _ in uniques]
    assert {one.unique: one.error for one in found} == dict.fromkeys(uniques, 0)
    logs.expect("no route")
    waiting.error = Unavailable("no route")
    assert it.ask(Opcode.FLUSH, FlushIn(made.open.fh, 0), node=made.entry.node).error == errno.EIO
    it.data(Opcode.RELEASE, ReleaseIn(made.open.fh, 0, 0, 0), node=made.entry.node)
