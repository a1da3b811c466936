"""What is agreed on at INIT with kernels of all ages, and how cached files are made known to them."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from datacache.errors import MountError
from fuse import connection, protocol
from fuse.connection import Agreement, Backings, Refusal, agree, forget_backings, greet, writer
from fuse.protocol import Capability, InitIn, Opcode, UnknownIn
from tests.conftest import AnnouncedLogs

EVERYTHING = (1 << 43) - 1
NEW = "6.18.1-generic"


def offer(*, major: int = 7, minor: int = 45, capabilities: int = EVERYTHING) -> InitIn:
    return InitIn(major, minor, 128 * 1024, capabilities)


# ---- agreements ----------------------------------------------------------------------------------


def test_a_new_kernel_gives_all_that_is_wanted() -> None:
    """Large requests, readdirplus, parallel directory operations, resending; locks are left to the kernel,
    and pages to us."""
    agreement, answer = agree(offer(), stateless=False, passthrough=True, release=NEW)
    assert agreement.passthrough
    assert agreement.cached_directories
    assert not agreement.stateless
    taken = Capability(answer.capabilities)
    assert Capability.DO_READDIRPLUS | Capability.PARALLEL_DIROPS | Capability.HAS_RESEND in taken
    assert Capability.HANDLE_KILLPRIV_V2 | Capability.MAX_PAGES | Capability.PASSTHROUGH in taken
    for refused in ("POSIX_LOCKS", "FLOCK_LOCKS", "WRITEBACK_CACHE", "AUTO_INVAL_DATA", "SPLICE_READ"):
        assert Capability[refused] not in taken
    assert (answer.max_stack_depth, answer.max_pages) == (1, 256)
    assert 0 < answer.congestion_threshold < answer.max_background
    assert protocol.decode_init_out(protocol.encode_init_out(answer)) == answer


@pytest.mark.parametrize(("major", "minor"), [(7, 39), (7, 8), (6, 50)])
def test_a_kernel_before_6_9_is_refused_with_the_way_out(major: int, minor: int) -> None:
    """`--driver native` on it fails before anything is served."""
    with pytest.raises(MountError, match=rf"FUSE {major}\.{minor}.*7\.40.*--driver pyfuse3"):
        agree(offer(major=major, minor=minor), stateless=False, passthrough=True, release="6.8.0")


@pytest.mark.parametrize("minor", [40, 45, 99])
def test_both_speak_the_older_minor(minor: int) -> None:
    """... of the kernel's and ours."""
    agreement, answer = agree(offer(minor=minor), stateless=False, passthrough=False, release=NEW)
    assert agreement.minor == answer.minor == min(minor, protocol.MINOR)


@pytest.mark.parametrize("missing", list(Capability))
def test_nothing_is_taken_that_is_not_offered(missing: Capability) -> None:
    """A kernel that is built without something gets along without it."""
    for stateless, passthrough in ((True, False), (False, True)):
        agreement, answer = agree(
            offer(capabilities=EVERYTHING & ~missing),
            stateless=stateless,
            passthrough=passthrough,
            release=NEW,
        )
        assert not answer.capabilities & missing
        assert agreement.passthrough == (passthrough and missing is not Capability.PASSTHROUGH)
        assert agreement.stateless == (stateless and missing is not Capability.NO_OPEN_SUPPORT)
        assert answer.max_stack_depth == int(agreement.passthrough)


def test_stateless_and_passthrough_exclude_each_other() -> None:
    """Passthrough needs the answer to OPEN, which a stateless mount does not give."""
    agreement, answer = agree(offer(), stateless=True, passthrough=True, release=NEW)
    assert agreement.stateless
    assert not agreement.passthrough
    assert not answer.capabilities & Capability.PASSTHROUGH


def test_requests_are_as_large_as_the_kernel_lets_them_be() -> None:
    """Up to 16 MiB, of which a thread holds one."""

    def pages(limit: int) -> int:
        return agree(offer(), stateless=False, passthrough=True, release=NEW, pages=limit)[1].max_pages

    assert [pages(limit) for limit in (32, 256, 1024, 65535)] == [32, 256, 1024, 4096]


@pytest.mark.parametrize(
    ("release", "cached"),
    [
        ("6.9.0", False), ("6.12.48-lts", False), ("6.10.0-rc1+", False), ("6.8.12", True), ("6.13.0", True),
        ("6.18.1", True), ("7.0.0-rc2", True), ("5.15", True), ("strange", True), ("6.x", True),
    ],
)  # fmt: skip
def test_directories_are_not_cached_where_the_kernel_loses_entries(release: str, cached: bool) -> None:
    """Cached directories: not on kernels 6.9-6.12, where they are broken."""
    agreement, _ = agree(offer(), stateless=True, passthrough=False, release=release)
    assert agreement.cached_directories is cached


# ---- the greeting --------------------------------------------------------------------------------


Ends = tuple[socket.socket, int]
"""The kernel's end, and the descriptor that is ours."""


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(10)
    with ours, theirs:
        yield theirs, ours.fileno()


def init(body: InitIn, unique: int = 2) -> bytes:
    return protocol.encode_request(Opcode.INIT, body, unique=unique)


def test_the_kernel_is_greeted_once(ends: Ends) -> None:
    """It asks INIT, and is answered what was agreed."""
    kernel, descriptor = ends
    kernel.send(init(offer()))
    agreement = greet(descriptor, stateless=False, passthrough=True)
    answer = protocol.decode_reply(kernel.recv(4096))
    assert (answer.unique, answer.error) == (2, 0)
    told = protocol.decode_init_out(answer.data)
    assert told.capabilities == agreement.capabilities
    assert told.max_readahead == 128 * 1024


def test_a_kernel_of_a_later_major_is_told_ours_and_asks_again(ends: Ends) -> None:
    """As the protocol has it for a peer of another major."""
    kernel, descriptor = ends
    kernel.send(init(offer(major=8, minor=0)))
    kernel.send(init(offer(), unique=4))
    assert greet(descriptor, stateless=True, passthrough=False).stateless
    first, second = (protocol.decode_reply(kernel.recv(4096)) for _ in range(2))
    assert protocol.decode_init_out(first.data).major == protocol.MAJOR
    assert (first.unique, second.unique) == (2, 4)


def test_a_kernel_that_is_too_old_is_told_so(ends: Ends) -> None:
    """Its INIT is answered: whoever looks at the mount meanwhile must not hang."""
    kernel, descriptor = ends
    kernel.send(init(offer(minor=36)))
    with pytest.raises(MountError, match=r"FUSE 7\.36"):
        greet(descriptor, stateless=False, passthrough=False)
    assert protocol.decode_reply(kernel.recv(4096)).error == errno.EPROTO


def test_whoever_does_not_begin_with_init_is_no_fresh_mount(ends: Ends) -> None:
    """A descriptor of a mount that is served already, say."""
    kernel, descriptor = ends
    kernel.send(protocol.encode_request(Opcode.STATFS, protocol.EmptyIn()))
    with pytest.raises(MountError, match="STATFS instead of INIT"):
        greet(descriptor, stateless=False, passthrough=False)
    kernel.send(protocol.encode_request(4711, UnknownIn(b"")))
    with pytest.raises(MountError, match="opcode 4711 instead of INIT"):
        greet(descriptor, stateless=False, passthrough=False)


def test_a_mount_that_is_gone_before_it_is_greeted() -> None:
    """The device says ENODEV; here, what a descriptor that cannot be read says."""
    read, write = os.pipe()
    os.close(read)
    try:
        with pytest.raises(MountError, match="ended before it was served"):
            greet(write, stateless=False, passthrough=False)
    finally:
        os.close(write)


# ---- backing files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A cached file, by name only."""

    device: int
    inode: int
    descriptor: int = 99

    @property
    def identity(self) -> tuple[int, int]:
        return self.device, self.inode


@dataclass
class Registrar:
    """Gives numbers out as the kernel does, upwards; fails where it is told to."""

    failures: list[int] = field(default_factory=list)
    open_now: set[int] = field(default_factory=set)
    asked: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, descriptor: int) -> int:
        with self.lock:
            self.asked += 1
            if self.failures:
                number = self.failures.pop(0)
                raise OSError(number, os.strerror(number))
            self.open_now.add(self.asked)
            return self.asked

    def close(self, number: int) -> None:
        with self.lock:
            if number not in self.open_now:
                raise OSError(errno.ENOENT, "no such number")
            self.open_now.remove(number)


def test_one_file_has_one_number_as_long_as_anybody_has_it_open() -> None:
    """The kernel refuses a node that is open on one number an open on another, be it of the same file."""
    registrar = Registrar()
    backings = Backings(registrar)
    first = backings.acquire(File(1, 10))
    assert backings.acquire(File(1, 10, descriptor=100)) == first
    other = backings.acquire(File(2, 10))
    assert other != first
    assert repr(backings) == "<Backings 2 files>"
    backings.release((1, 10))
    assert backings.acquire(File(1, 10)) == first
    backings.release((1, 10))
    backings.release((1, 10))
    assert registrar.open_now == {other}
    assert backings.acquire(File(1, 10)) not in (first, other), "known anew"
    assert backings.refusal == ""


def test_what_is_left_to_a_successor_is_not_taken_back() -> None:
    """An answer to an open may be on its way while a daemon is told to end: its number must be there still,
    or the kernel says EIO to the reader."""
    registrar = Registrar()
    backings = Backings(registrar)
    first = backings.acquire(File(1, 10))
    backings.leave()
    backings.release((1, 10))
    assert registrar.open_now == {first}
    assert first is not None
    assert forget_backings(registrar, first + 1) == 1
    assert not registrar.open_now


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.EPERM, "CAP_SYS_ADMIN"),
        (errno.ELOOP, "overlayfs"),
        (errno.EOPNOTSUPP, "cannot be read by the kernel"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_a_refusal_holds_for_the_device_and_is_said_once(logs: AnnouncedLogs, number: int, why: str) -> None:
    """One log line says why, and reads are served; files on other devices are tried."""
    logs.expect("no passthrough")
    registrar = Registrar(failures=[number])
    backings = Backings(registrar)
    for inode in range(3):
        assert backings.acquire(File(os.makedev(8, 1), inode)) is None
    assert registrar.asked == 1
    [line] = logs.messages()
    assert "8:1" in line
    assert why in line
    assert why in backings.refusal
    assert backings.acquire(File(os.makedev(8, 2), 1)) is not None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR])
def test_what_is_short_for_a_moment_is_tried_again(number: int) -> None:
    """No log line: the open is served, the next one passes through."""
    backings = Backings(Registrar(failures=[number]))
    assert backings.acquire(File(1, 10)) is None
    assert backings.acquire(File(1, 10)) is not None
    assert backings.refusal == ""


def test_a_number_that_cannot_be_taken_back_is_gone_with_its_mount() -> None:
    """Unmounted meanwhile: the kernel has let go by itself."""
    registrar = Registrar()
    backings = Backings(registrar)
    backings.acquire(File(1, 10))
    registrar.open_now.clear()
    backings.release((1, 10))
    assert repr(backings) == "<Backings 0 files>"


def test_backings_are_shared_by_threads() -> None:
    """Whatever the order of opens and closes: in the end nothing is left."""
    registrar = Registrar()
    backings = Backings(registrar)

    def work(seed: int) -> None:
        for i in range(500):
            file = File(1, (seed + i) % 3)
            number = backings.acquire(file)
            assert number in registrar.open_now
            backings.release(file.identity)

    with ThreadPoolExecutor(4) as workers:
        list(workers.map(work, range(4)))
    assert not registrar.open_now


def test_all_numbers_of_earlier_daemons_are_taken_back() -> None:
    """... so that the space of their files can be freed; not those that were given out since."""
    registrar = Registrar()
    before = [registrar.open(0) for _ in range(5)]
    registrar.close(before[2])
    newest = registrar.open(0)
    assert forget_backings(registrar, newest) == 4
    assert registrar.open_now == {newest}


# ---- notifications -------------------------------------------------------------------------------


def test_a_notification_is_one_write(ends: Ends) -> None:
    """What else fails is told to whoever notifies."""
    kernel, descriptor = ends
    write = writer(descriptor)
    assert write(protocol.notify_resend())
    assert protocol.decode_notification(protocol.decode_reply(kernel.recv(100))) == protocol.Resend()
    kernel.close()
    with pytest.raises(BrokenPipeError):
        write(protocol.notify_resend())


def test_what_nobody_serves_is_answered_eio(ends: Ends, logs: AnnouncedLogs) -> None:
    """Everything that waits for an answer; what an earlier daemon has read is sent again first. It never
    waits, and leaves the connection as it was."""
    logs.expect("bytes are no header")
    kernel, descriptor = ends
    agreement, _ = agree(offer(), stateless=False, passthrough=True, release=NEW)
    refusal = Refusal(descriptor, agreement)
    refusal.begin()
    assert protocol.decode_notification(protocol.decode_reply(kernel.recv(100))) == protocol.Resend()
    assert refusal.answer()  # there is nothing yet
    for unique, opcode in ((2, Opcode.STATFS), (3, 4711), (5, Opcode.DESTROY)):
        kernel.send(protocol.encode_request(opcode, UnknownIn(b""), unique=unique))
        assert refusal.answer()
        answer = protocol.decode_reply(kernel.recv(100))
        assert (answer.unique, answer.error) == (unique, errno.EIO)
    kernel.send(b"x")
    assert refusal.answer()
    kernel.send(protocol.encode_request(Opcode.FORGET, protocol.ForgetIn(1), unique=7))
    assert refusal.answer()
    refusal.end()
    assert os.get_blocking(descriptor)
    kernel.setblocking(False)
    with pytest.raises(BlockingIOError):
        kernel.recv(100)
    refusal.begin()
    kernel.close()
    assert not refusal.answer()


def test_an_agreement_is_a_value() -> None:
    """It is handed from one daemon to the next, as JSON."""
    agreement, _ = agree(offer(), stateless=False, passthrough=True, release=NEW)
    assert Agreement(**vars(agreement)) == agreement
    assert connection.REQUEST >= protocol.MIN_READ_BUFFER
