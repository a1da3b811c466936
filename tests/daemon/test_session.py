"""The native driver over a kernel that is us: a socket pair in the place of `/dev/fuse`, requests made by the
kernel's side of `protocol`, a real file system behind."""

import errno
import itertools
import os
import shutil
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.cache.memory import MemoryTier
from datacache.cache.tier import Tier
from datacache.cache.tiered import TieredCache
from datacache.clock import VirtualClock
from datacache.config.settings import (
    Consistency,
    IndexSettings,
    MountSettings,
    Placement,
    ReadingSettings,
)
from datacache.errors import NotFound
from datacache.index.opening import open_index
from datacache.model import ByteRange, Dataset, MountPoint
from datacache.reading.reader import Reader
from datacache.sources.memory import MemorySource
from fuse import protocol
from fuse.connection import Agreement, Backings
from fuse.filesystem import FOREVER, FileSystem, Space
from fuse.protocol import (
    ROOT,
    BatchForgetIn,
    EmptyIn,
    FlushIn,
    ForgetIn,
    Forgotten,
    GetattrIn,
    GetxattrIn,
    InterruptIn,
    ListxattrIn,
    LookupIn,
    MkdirIn,
    Opcode,
    OpenFlag,
    OpenIn,
    ReadIn,
    ReleaseIn,
    Reply,
    Request,
    UnknownIn,
)
from fuse.session import KINDS, Session
from tests.conftest import AnnouncedLogs
from tests.support.reading import until

PATIENCE = 20.0
"""Seconds for what happens at once on an idle machine."""
OBJECTS = {"a": b"first", "d/b": bytes(range(256)) * 40, "d/empty": b"", "z": b"last" * 20_000}
AGREED = Agreement(
    minor=protocol.MINOR, capabilities=0, passthrough=False, stateless=False, cached_directories=True
)

PASSED = replace(AGREED, passthrough=True)


class Gated(FileSystem):
    """STATFS goes through a gate, and fails where it is told to."""

    gate: threading.Event
    inside: threading.Semaphore
    failures: list[Exception]

    def statfs(self) -> Space:
        if hasattr(self, "gate"):
            self.inside.release()
            assert self.gate.wait(PATIENCE)
        if getattr(self, "failures", None):
            raise self.failures.pop(0)
        return super().statfs()

    def close_gate(self) -> None:
        self.inside, self.gate = threading.Semaphore(0), threading.Event()


class Registrar:
    """Numbers for backing files, without a kernel that reads them."""

    def __init__(self) -> None:
        self.known: set[int] = set()
        self._numbers = itertools.count(1)

    def open(self, descriptor: int) -> int:
        assert os.fstat(descriptor).st_size
        self.known.add(number := next(self._numbers))
        return number

    def close(self, number: int) -> None:
        self.known.remove(number)


@dataclass
class Kernel:
    """The other end of the descriptor."""

    session: Session
    files: Gated
    source: MemorySource
    clock: VirtualClock
    registrar: Registrar
    tier: Tier
    end: socket.socket
    uniques: Iterator[int] = field(default_factory=lambda: itertools.count(2, 2))
    early: dict[int, Reply] = field(default_factory=dict)

    def send(self, opcode: int, body: Request, *, node: int = ROOT) -> int:
        """Send a request; what names it."""
        unique = next(self.uniques)
        self.end.send(protocol.encode_request(opcode, body, unique=unique, node=node))
        return unique

    def receive(self) -> Reply:
        """What the session wrote next."""
        return protocol.decode_reply(self.end.recv(1 << 20))

    def answer(self, unique: int) -> Reply:
        """The answer to that one, in whatever order they come."""
        while unique not in self.early:
            got = self.receive()
            assert got.unique not in self.early, "answered twice"
            self.early[got.unique] = got
        return self.early.pop(unique)

    def ask(self, opcode: int, body: Request, *, node: int = ROOT) -> Reply:
        return self.answer(self.send(opcode, body, node=node))

    def data(self, opcode: int, body: Request, *, node: int = ROOT) -> bytes:
        """The answer of a request that must succeed."""
        got = self.ask(opcode, body, node=node)
        assert got.error == 0, os.strerror(got.error)
        return got.data

    def lookup(self, path: str) -> protocol.EntryOut:
        node, found = ROOT, None
        for name in path.split("/"):
            found = protocol.decode_entry(self.data(Opcode.LOOKUP, LookupIn(name.encode()), node=node))
            node = found.node
        assert found is not None
        return found

    def open(self, node: int, flags: int = os.O_RDONLY) -> protocol.OpenOut:
        return protocol.decode_open_out(self.data(Opcode.OPEN, OpenIn(flags, 0), node=node))

    def evict(self, name: str) -> None:
        """Drop what is cached of an object."""
        key = self.files._reader.cache_key(self.files._index.lookup(ROOT, name.encode()))
        assert self.tier.evict(key)

    def quiet(self) -> bool:
        """Whether nothing has been written that was not asked for by `answer`; all threads are idle then."""
        self.end.setblocking(False)
        try:
            self.early[-1] = self.receive()
        except BlockingIOError:
            pass
        finally:
            self.end.settimeout(PATIENCE)
        return not self.early

    def close(self) -> None:
        self.end.close()
        assert self.session.wait(PATIENCE)
        until(lambda: not self.session.threads())


Maker = Callable[..., Kernel]


@pytest.fixture
def make(tmp_path: Path, clock: VirtualClock) -> Iterator[Maker]:
    """Makes sessions over `OBJECTS`, and ends them."""
    made: list[Callable[[], None]] = []

    def make(
        *,
        mount: MountSettings | None = None,
        index: IndexSettings | None = None,
        objects: dict[str, bytes] = OBJECTS,
        agreement: Agreement = AGREED,
        cache: Tier | None = None,
        max_threads: int = 4,
        max_idle_threads: int = 2,
        start: bool = True,
        **more: Any,
    ) -> Kernel:
        source = MemorySource("memory://bucket", objects)
        catalogue = open_index(
            Dataset("test", (MountPoint("memory://bucket"),)),
            [source],
            index or IndexSettings(ttl=60),
            state=str(tmp_path / f"state-{len(made)}"),
            clock=clock,
        )
        tier, registrar = cache or MemoryTier(name="mem:/x"), Registrar()
        reader = Reader([source], tier, ReadingSettings(), clock=clock)
        files = Gated(
            catalogue, reader, mount or MountSettings(uid=12, gid=34), tiers={"mem:/x": tier}, clock=clock,
            backings=Backings(registrar) if agreement.passthrough else None,
        )  # fmt: skip
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.settimeout(PATIENCE)
        session = Session(
            files,
            ours.fileno(),
            agreement,
            max_threads=max_threads,
            max_idle_threads=max_idle_threads,
            **more,
        )
        kernel = Kernel(session, files, source, clock, registrar, tier, theirs)
        made.extend([catalogue.close, reader.close, files.close, ours.close, kernel.close])
        if start:
            session.start()
        return kernel

    yield make
    for close in reversed(made):
        close()


# ---- each request --------------------------------------------------------------------------------


def test_lookup_and_getattr_say_the_same(make: Maker) -> None:
    """An object is a read-only file of the mount's owner, with the object's size and time, and no holes."""
    it = make()
    found = it.lookup("d/b")
    assert stat.S_ISREG(found.attr.mode)
    assert (found.attr.size, found.attr.blocks, found.attr.blksize) == (10_240, 20, 4096)
    assert (found.attr.uid, found.attr.gid, found.attr.nlink) == (12, 34, 1)
    mtime_ns = it.source.stat("d/b").mtime_ns
    assert (found.attr.mtime, found.attr.mtime_nsec) == divmod(mtime_ns, 10**9)
    told = protocol.decode_attr_out(it.data(Opcode.GETATTR, GetattrIn(0, 0), node=found.node))
    assert told.attr == found.attr
    assert stat.S_ISDIR(protocol.decode_attr_out(it.data(Opcode.GETATTR, GetattrIn(0, 0))).attr.mode)


def test_names_are_believed_for_what_is_left_of_the_ttl(make: Maker) -> None:
    """Names that are there, and names that are not."""
    it = make()
    assert it.lookup("a").entry_timeout == 60
    it.clock.advance(45)
    found, missing = it.lookup("a"), it.lookup("nothing")
    assert (found.entry_timeout, found.attr_timeout) == (15, 15)
    assert (missing.node, missing.entry_timeout) == (0, 15)


def test_timeouts_are_for_ever_where_nothing_changes(make: Maker) -> None:
    """Snapshots: 0 requests from the second epoch on need that the kernel never asks again."""
    it = make(index=IndexSettings(consistency=Consistency.IMMUTABLE))
    for name in ("a", "nothing"):
        assert it.lookup(name).entry_timeout == FOREVER
    assert it.lookup("a").attr_timeout == FOREVER


def test_chosen_timeouts_are_told(make: Maker) -> None:
    """--entry-timeout, --attr-timeout, --negative-timeout; parts of a second too."""
    it = make(mount=MountSettings(entry_timeout=5, attr_timeout=0.25, negative_timeout=0))
    found = it.lookup("a")
    assert (found.entry_timeout, found.attr_timeout) == (5, 0.25)
    assert it.lookup("nothing").entry_timeout == 0


def test_open_read_release(make: Maker) -> None:
    """Bytes from anywhere, fewer only at the end; pages stay from one open to the next."""
    it = make()
    node = it.lookup("d/b").node
    opened = it.open(node)
    assert opened.flags == OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH
    for offset, size in ((0, 100), (10_000, 1000), (10_240, 10), (1 << 40, 10)):
        got = it.data(Opcode.READ, ReadIn(opened.fh, offset, size, 0, 0, 0), node=node)
        assert got == OBJECTS["d/b"][offset : offset + size]
    assert it.files.stats()["open_files"] == 1
    assert it.data(Opcode.RELEASE, ReleaseIn(opened.fh, 0, 0, 0), node=node) == b""
    assert it.files.stats()["open_files"] == 0


def test_a_handle_that_an_earlier_daemon_gave_out_is_read_by_its_node(make: Maker) -> None:
    """Whoever has it open reads on; its release is answered, too."""
    it = make()
    node = it.lookup("a").node
    assert it.data(Opcode.READ, ReadIn(77, 1, 3, 0, 0, 0), node=node) == b"irs"
    assert it.data(Opcode.RELEASE, ReleaseIn(77, 0, 0, 0), node=node) == b""
    listed = it.data(Opcode.READDIR, ReadIn(78, 0, 4096, 0, 0, 0))
    assert {entry.name for entry in protocol.decode_dirents(listed)} == {b"a", b"d", b"z"}
    assert it.data(Opcode.RELEASEDIR, ReleaseIn(78, 0, 0, 0)) == b""


def test_a_whole_file_is_opened_on_its_cached_copy(make: Maker) -> None:
    """A small file is fetched by its open; both opens of it have one number, taken back with the last
    close. An empty file has no copy, and is served."""
    it = make(agreement=PASSED)
    node = it.lookup("z").node
    first, second = it.open(node), it.open(node)
    assert first.flags == second.flags == OpenFlag.PASSTHROUGH | OpenFlag.NOFLUSH
    assert first.backing_id == second.backing_id
    assert it.registrar.known == {first.backing_id}
    for opened in (first, second):
        it.data(Opcode.RELEASE, ReleaseIn(opened.fh, 0, 0, 0), node=node)
    assert not it.registrar.known
    empty = it.open(it.lookup("d/empty").node)
    assert (empty.flags, empty.backing_id) == (OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH, 0)


def test_a_file_that_is_read_by_the_kernel_is_opened_on_the_same_copy_by_all(make: Maker) -> None:
    """Though that copy was evicted since, and another one is there: the kernel knows one for each node."""
    it = make(agreement=PASSED)
    node = it.lookup("z").node
    first = it.open(node)
    it.evict("z")
    second = it.open(node)
    assert second.backing_id == first.backing_id
    assert it.registrar.known == {first.backing_id}
    for opened in (first, second):
        assert it.registrar.known == {first.backing_id}
        it.data(Opcode.RELEASE, ReleaseIn(opened.fh, 0, 0, 0), node=node)
    assert not it.registrar.known
    third = it.open(node)
    assert third.backing_id != first.backing_id
    assert third.flags & OpenFlag.PASSTHROUGH


def test_an_object_that_straddles_two_tiers_is_served(make: Maker) -> None:
    """No one file has all of it, and nothing of it is missing: it is read through us."""
    tiers = [MemoryTier(name="mem:/x"), MemoryTier(name="ssd:/y")]
    it = make(agreement=PASSED, cache=TieredCache(tiers, placement=Placement.SPILL))
    entry = it.files._index.lookup(ROOT, b"z")
    key, data = it.files._reader.cache_key(entry), OBJECTS["z"]
    for tier, span in zip(tiers, (ByteRange(0, 40_000), ByteRange(40_000, len(data))), strict=True):
        with closing(tier.open(key)) as cached:
            cached.fill(span.start, data[span.start : span.stop])
    opened = it.open(it.lookup("z").node)
    assert opened.backing_id == 0
    read = it.data(Opcode.READ, ReadIn(opened.fh, 0, 1 << 17, 0, 0, 0), node=entry.ino)
    assert read == data
    assert it.files._reader.stats().bytes_fetched == 0


def test_after_a_power_cut_a_file_is_served_until_it_is_proven(make: Maker, tmp_path: Path) -> None:
    """What was not marked as synced is held against its checksums as it is read, and then passed through."""

    def tier(directory: str, boot: str) -> DirectoryTier:
        rules = Rules("ssd:/x", 1 << 30, 4 << 20, reserve=0.0, dataset="test")
        owner = Owner(os.getpid(), "", "")
        return DirectoryTier(
            str(tmp_path / directory), rules, owner=owner, clock=VirtualClock(), boot=boot, keeper=False
        )

    before = tier("before", "one")
    it = make(agreement=PASSED, cache=before)
    assert it.open(it.lookup("z").node).backing_id
    assert len(list(before.entries())) == 1  # written, though not synced
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    it.files.close()
    before.close()
    after = tier("after", "two")
    try:
        it = make(agreement=PASSED, cache=after)
        node = it.lookup("z").node
        served = it.open(node)
        assert served.backing_id == 0
        assert it.data(Opcode.READ, ReadIn(served.fh, 0, 1 << 17, 0, 0, 0), node=node) == OBJECTS["z"]
        it.data(Opcode.RELEASE, ReleaseIn(served.fh, 0, 0, 0), node=node)
        assert len(list(after.entries())) == 1  # what was found is written down, as it is in a while
        assert it.open(node).backing_id
        it.files.close()
        assert it.files._reader.stats().bytes_fetched == 0
    finally:
        after.close()


def test_errors_are_answered_as_errnos(make: Maker) -> None:
    """Nothing of them is logged: they are answers."""
    it = make()
    node = it.lookup("a").node
    assert it.ask(Opcode.OPEN, OpenIn(os.O_RDWR, 0), node=node).error == errno.EROFS
    assert it.ask(Opcode.OPEN, OpenIn(0, 0)).error == errno.EISDIR
    assert it.ask(Opcode.LOOKUP, LookupIn(b"x"), node=node).error == errno.ENOTDIR
    assert it.ask(Opcode.GETXATTR, GetxattrIn(0, b"user.x"), node=node).error == errno.ENOSYS
    assert it.ask(Opcode.FLUSH, FlushIn(0, 0), node=node).error == errno.ENOSYS
    assert it.ask(Opcode.MKDIR, MkdirIn(0o755, 0, b"new")).error == errno.EROFS
    assert it.ask(4000, UnknownIn(b"whatever")).error == errno.ENOSYS
    it.source.put("a", b"second")
    it.clock.advance(61)
    assert it.ask(Opcode.OPEN, OpenIn(0, 0), node=node).error == errno.ESTALE


def test_statfs_and_destroy(make: Maker) -> None:
    """`df` shows what is indexed, all of it used."""
    it = make()
    it.lookup("d/b")
    space = protocol.decode_statfs_out(it.data(Opcode.STATFS, EmptyIn()))
    assert space.blocks * space.frsize >= len(OBJECTS["z"]) + len(OBJECTS["d/b"])
    assert (space.bfree, space.bavail, space.ffree, space.namelen) == (0, 0, 0, 255)
    assert it.data(Opcode.DESTROY, EmptyIn()) == b""


def test_extended_attributes_are_given_in_the_room_that_there_is(make: Maker) -> None:
    """No room: how much is needed. Enough: the value. Not enough: ERANGE."""
    it = make(mount=MountSettings(xattr=True))
    node = it.lookup("a").node
    asks: list[Callable[[int], Reply]] = [
        lambda room: it.ask(Opcode.LISTXATTR, ListxattrIn(room), node=node),
        lambda room: it.ask(Opcode.GETXATTR, GetxattrIn(room, b"user.datacache.uri"), node=node),
    ]
    for ask in asks:
        size = protocol.decode_getxattr_out(ask(0).data)
        assert len(ask(size).data) == len(ask(size + 100).data) == size
        assert ask(size - 1).error == errno.ERANGE
    assert it.ask(Opcode.GETXATTR, GetxattrIn(100, b"user.datacache.uri"), node=node).data == (
        b"memory://bucket/a"
    )
    assert asks[0](1000).data.split(b"\0")[:-1] == [
        f"user.datacache.{name}".encode() for name in ("uri", "version", "tier", "cached")
    ]
    assert it.ask(Opcode.GETXATTR, GetxattrIn(0, b"user.other"), node=node).error == errno.ENODATA


MANY = {f"{i:03}-" + "n" * (i * 7 % 200): bytes(i) for i in range(60)}


@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
@pytest.mark.parametrize("size", [400, 1000, 4096, 65536])
def test_a_directory_in_pages_of_any_size_gives_every_name_once(
    make: Maker, opcode: Opcode, size: int
) -> None:
    """... with what a lookup says of it, and `offset` is where to go on, whenever and from whomever."""
    it = make(objects=MANY)
    opened = protocol.decode_open_out(it.data(Opcode.OPENDIR, OpenIn(0, 0)))
    assert opened.flags == OpenFlag.CACHE_DIR, "what the kernel may have of it is dropped"
    names, offset = [], 0
    while page := it.data(opcode, ReadIn(opened.fh, offset, size, 0, 0, 0)):
        assert len(page) <= size
        if opcode is Opcode.READDIRPLUS:
            plus = protocol.decode_direntplus(page)
            for listed in plus:
                assert listed.entry == it.lookup(listed.dirent.name.decode())
                assert listed.dirent.ino == listed.entry.attr.ino
            entries = [listed.dirent for listed in plus]
        else:
            entries = protocol.decode_dirents(page)
        assert {entry.type for entry in entries} == {stat.S_IFREG >> 12}
        names += [entry.name.decode() for entry in entries]
        offset = entries[-1].offset
    assert sorted(names) == sorted(MANY)
    it.data(Opcode.RELEASEDIR, ReleaseIn(opened.fh, 0, 0, 0))
    assert it.files.stats()["open_directories"] == 0


def test_a_listing_that_never_changes_is_kept(make: Maker) -> None:
    """Once it was made: before that nothing is known."""
    it = make(index=IndexSettings(consistency=Consistency.IMMUTABLE))
    assert protocol.decode_open_out(it.data(Opcode.OPENDIR, OpenIn(0, 0))).flags == OpenFlag.CACHE_DIR
    it.lookup("a")
    kept = protocol.decode_open_out(it.data(Opcode.OPENDIR, OpenIn(0, 0))).flags
    assert kept == OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR


def test_a_listing_is_not_kept_where_the_kernel_would_lose_entries_of_it(make: Maker) -> None:
    """Linux 6.9 to 6.12."""
    immutable = IndexSettings(consistency=Consistency.IMMUTABLE)
    it = make(agreement=Agreement(protocol.MINOR, 0, False, False, False), index=immutable)
    it.lookup("a")
    assert protocol.decode_open_out(it.data(Opcode.OPENDIR, OpenIn(0, 0))).flags == 0


def test_stateless_opens_are_answered_enosys_and_reads_go_by_the_node(make: Maker) -> None:
    """Then the kernel opens files without asking. Directories too, unless their listing may not be kept."""
    immutable = IndexSettings(consistency=Consistency.IMMUTABLE)
    it = make(agreement=Agreement(protocol.MINOR, 0, False, True, True), index=immutable)
    node = it.lookup("d/b").node
    assert it.ask(Opcode.OPEN, OpenIn(0, 0), node=node).error == errno.ENOSYS
    assert it.ask(Opcode.OPENDIR, OpenIn(0, 0)).error == errno.ENOSYS
    assert it.data(Opcode.READ, ReadIn(0, 5, 10, 0, 0, 0), node=node) == OBJECTS["d/b"][5:15]
    listed = protocol.decode_direntplus(it.data(Opcode.READDIRPLUS, ReadIn(0, 0, 4096, 0, 0, 0)))
    assert [entry.dirent.name for entry in listed] == [b"a", b"d", b"z"]
    old = make(agreement=Agreement(protocol.MINOR, 0, False, True, False), index=immutable)
    old.lookup("a")
    assert protocol.decode_open_out(old.data(Opcode.OPENDIR, OpenIn(0, 0))).fh


def test_what_takes_no_answer_gets_none(make: Maker) -> None:
    """FORGET, BATCH_FORGET and INTERRUPT."""
    it = make(max_threads=1)
    node = it.lookup("a").node
    it.send(Opcode.FORGET, ForgetIn(1), node=node)
    it.send(Opcode.BATCH_FORGET, BatchForgetIn((Forgotten(node, 1), Forgotten(99, 2))))
    it.send(Opcode.INTERRUPT, InterruptIn(2))
    it.data(Opcode.STATFS, EmptyIn())
    assert it.quiet()
    assert it.session.requests() == {
        "lookup": 1, "forget": 1, "batch_forget": 1, "interrupt": 1, "statfs": 1,
    }  # fmt: skip


def test_a_new_version_is_told_to_the_kernel(make: Maker) -> None:
    """However long the kernel was told to believe the name: it forgets it."""
    it = make()
    entry = it.files._index.lookup(ROOT, b"a")
    it.session.superseded([entry])
    told = protocol.decode_notification(it.receive())
    assert told == protocol.InvalEntry(ROOT, b"a", 0)


def test_a_successor_has_all_that_is_unanswered_sent_again(make: Maker) -> None:
    """Before it reads anything; and it answers by the number that the request has then."""
    it = make(start=False)
    it.session.start(resend=True)
    assert protocol.decode_notification(it.receive()) == protocol.Resend()
    again = protocol.encode_request(Opcode.STATFS, EmptyIn(), unique=6 | protocol.RESENT)
    it.end.send(again)
    assert it.receive().unique == 6 | protocol.RESENT


def test_what_cannot_be_answered_here_is_handed_on_and_answered_by_another(make: Maker) -> None:
    """An answerer beside the daemon that owns the data set: what raises goes there, request and all, and is
    counted once; where the owner has died, whoever comes next is sent it again."""
    handed: list[bytes] = []

    def hand_on(request: memoryview) -> None:
        handed.append(bytes(request))
        if len(handed) == 2:
            raise BrokenPipeError("the owner is gone")

    counts = [0] * KINDS
    it = make(max_threads=1, elsewhere=hand_on, counts=counts)
    for _ in range(2):
        it.files.failures = [NotFound("here")]
        unique = it.send(Opcode.STATFS, EmptyIn())
        it.lookup("a")
    assert it.quiet()
    assert [protocol.decode(request)[0].unique for request in handed] == [unique - 4, unique]
    owner = make()
    owner.session.answer(memoryview(handed[0]))
    assert owner.receive().unique == unique - 4
    assert counts[Opcode.STATFS] == 2
    assert it.session.requests() == {"statfs": 2, "lookup": 2}
    assert owner.session.requests() == {}


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_handler_that_raises_answers_eio_and_the_session_goes_on(make: Maker, logs: AnnouncedLogs) -> None:
    """Logged once, with its traceback."""
    logs.expect("statfs failed unexpectedly")
    it = make()
    it.files.failures = [ZeroDivisionError("a bug"), ZeroDivisionError("a bug")]
    for _ in range(2):
        assert it.ask(Opcode.STATFS, EmptyIn()).error == errno.EIO
    assert it.ask(Opcode.STATFS, EmptyIn()).error == 0
    [record] = logs.seen
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
    assert it.files.stats()["errors"] == {"ZeroDivisionError": 2}


def test_an_answer_that_the_kernel_refuses_is_followed_by_eio(make: Maker, logs: AnnouncedLogs) -> None:
    """Whoever waits for it must not wait for ever. Here it is larger than the socket takes."""
    logs.expect("answering READ failed")
    it = make(objects={"big": bytes(4 << 20)})
    node = it.lookup("big").node
    fh = it.open(node).fh
    assert it.ask(Opcode.READ, ReadIn(fh, 0, 4 << 20, 0, 0, 0), node=node).error == errno.EIO
    assert it.data(Opcode.READ, ReadIn(fh, 0, 10, 0, 0, 0), node=node) == bytes(10)


def test_what_cannot_be_understood_is_answered_eio(make: Maker, logs: AnnouncedLogs) -> None:
    """Where it can be told who asked; a piece of a header asks for nothing."""
    logs.expect("malformed")
    it = make(max_threads=1)
    request = protocol.encode_request(Opcode.LOOKUP, LookupIn(b"name"), unique=42)
    it.end.send(request[:-1])
    assert it.receive() == Reply(42, errno.EIO, b"")
    it.end.send(request[:20])
    it.data(Opcode.STATFS, EmptyIn())
    assert it.quiet()
    assert len(logs.seen) == 2


def test_threads_come_when_calls_block_and_go_when_they_have_nothing_to_do(make: Maker) -> None:
    """Up to `max_threads`, down to `max_idle_threads`; a request that finds no thread waits for one."""
    it = make(max_threads=5, max_idle_threads=2)
    assert it.session.threads() == 1
    it.files.close_gate()
    asked = [it.send(Opcode.STATFS, EmptyIn()) for _ in range(7)]
    for _ in range(5):
        assert it.files.inside.acquire(timeout=PATIENCE)
    assert it.session.threads() == 5
    assert not it.files.inside.acquire(blocking=False), "no more than there are threads"
    it.files.gate.set()
    for unique in asked:
        assert it.answer(unique).error == 0
    until(lambda: it.session.threads() == 2)
    assert repr(it.session).startswith("<Session 2 threads")
    it.data(Opcode.STATFS, EmptyIn())


def test_a_thread_that_cannot_be_had_costs_no_answer(make: Maker, logs: AnnouncedLogs) -> None:
    """At a cgroup's pids.max, say: those that there are answer everything, and it is said once."""
    logs.expect("threads can be had")
    it = make(max_threads=5)
    before = threading.stack_size(1 << 47)  # more than the address space has, whatever is overcommitted
    try:
        for _ in range(5):
            it.data(Opcode.STATFS, EmptyIn())
    finally:
        threading.stack_size(before)
    assert it.session.threads() == 1
    assert len(logs.seen) == 1
    it.data(Opcode.STATFS, EmptyIn())
    assert it.session.threads() == 2


def test_what_fails_after_the_end_is_left_to_the_successor(make: Maker) -> None:
    """Neither what fails, as what it stood on is taken down, nor what was done meanwhile, nor what came later
    is answered: all of it is sent again to whoever comes next."""
    it = make()
    it.files.close_gate()
    it.files.failures = [OSError("closed")]
    asked = [it.send(Opcode.STATFS, EmptyIn()) for _ in range(2)]
    for _ in asked:
        assert it.files.inside.acquire(timeout=PATIENCE)
    assert not it.session.wait(0)
    it.session.end()
    assert it.session.wait(0)
    assert it.session.ending
    it.files.gate.set()
    for _ in range(it.session.threads()):
        with suppress(OSError):
            it.send(Opcode.STATFS, EmptyIn())
    until(lambda: not it.session.threads())
    assert it.quiet()


# ---- a peer that says anything -------------------------------------------------------------------

_ANSWERLESS = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT)
_numbers = st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1), st.sampled_from([2**63, 2**40 + 2]))


@st.composite
def _requests(draw: st.DrawFn) -> bytes:
    """Anything that begins like a request, from what the kernel could send to noise."""
    opcode = draw(st.one_of(st.sampled_from(sorted(Opcode)), st.integers(0, 2**32 - 1)))
    body = draw(st.binary(max_size=120))
    if opcode in (Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS):
        fh, offset, size = draw(_numbers), draw(_numbers), draw(st.integers(0, 1 << 17))
        body = protocol.encode_request(opcode, ReadIn(fh, offset, size, 0, 0, 0))[protocol.HEADER_SIZE :]
    elif opcode == Opcode.LOOKUP:
        body = draw(st.sampled_from([b"a", b"d", b"nothing", b"\xff", b".", b".."])) + b"\0"
    elif opcode in (Opcode.RELEASE, Opcode.RELEASEDIR):
        body = protocol.encode_request(opcode, ReleaseIn(draw(_numbers), 0, 0, 0))[protocol.HEADER_SIZE :]
    elif opcode in (Opcode.OPEN, Opcode.OPENDIR):
        body = draw(st.sampled_from([bytes(8), body]))
    request = bytearray(protocol.encode_request(opcode, UnknownIn(body), unique=7, node=draw(_numbers)))
    for at, value in draw(st.lists(st.tuples(st.integers(16, 200), st.integers(0, 255)), max_size=3)):
        if at < len(request):
            request[at] = value
    return bytes(request[: draw(st.one_of(st.just(len(request)), st.integers(16, len(request))))])


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the session is to live through all of them
@given(request=_requests())
def _anything_is_answered_once(it: Kernel, request: bytes) -> None:
    it.end.send(request)
    it.data(Opcode.STATFS, EmptyIn())  # one thread: what came before is answered before
    answers, it.early = it.early, {}
    assert set(answers) <= {7}
    header_is_whole = len(request) >= protocol.HEADER_SIZE
    if header_is_whole and protocol.opcode_of(request) not in _ANSWERLESS:
        assert 7 in answers


@pytest.mark.parametrize("stateless", [False, True])
@pytest.mark.parametrize("passthrough", [False, True])
def test_a_fuzzed_peer_neither_crashes_nor_blocks_the_session(
    make: Maker, logs: AnnouncedLogs, stateless: bool, passthrough: bool
) -> None:
    """Malformed requests never crash the session, and each request that is owed an answer gets one."""
    logs.expect("malformed")
    logs.expect("failed")
    it = make(
        max_threads=1,
        mount=MountSettings(xattr=True),
        agreement=Agreement(protocol.MINOR, 0, passthrough and not stateless, stateless, True),
    )
    _anything_is_answered_once(it)
    unexpected = {m for m in logs.messages() if "unexpectedly" in m}
    assert not unexpected, [record.exc_info for record in logs.seen if record.exc_info]
    assert it.lookup("d/b").attr.size == len(OBJECTS["d/b"])


def test_a_signal_ends_the_wait_whenever_it_comes(make: Maker) -> None:
    """A handler runs between any two steps of who waits, in the same thread: it must not wait for itself."""
    for moment in range(30):
        session = make(start=False).session
        steps = 0

        def trace(*_: object, at: int = moment, session: Session = session) -> Any:
            nonlocal steps
            steps += 1
            if steps == at + 1:
                session.end()
            return trace

        def wait(trace: Any = trace, session: Session = session) -> None:
            sys.settrace(trace)
            try:
                session.wait()
            finally:
                sys.settrace(None)

        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        waiter.join(0.05)
        if steps <= moment:
            session.end()  # while it waits
        waiter.join(PATIENCE)
        assert not waiter.is_alive(), f"a signal after {moment} steps"
