"""
A FUSE connection: its descriptor, what is agreed on at INIT, and what is asked of the device itself.

The broker greets the kernel and keeps the descriptor; the daemons that serve the mount, one after the
other, get the descriptor and the agreement and ask for nothing anew. So this module is small, and
imports nothing of the data set.
"""

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from datacache.errors import MountError
from fuse import protocol
from fuse.protocol import Capability, InitIn, InitOut

log = logging.getLogger(__name__)

MAX_WRITE = 64 * 1024
"""Bytes of the largest request that we read: a WRITE, which a read-only mount has none of, or a
BATCH_FORGET, of which a larger one saves wake-ups (4,000 nodes in one)."""

REQUEST = MAX_WRITE + 4096
"""Bytes of room for one request."""

MAX_WRITE_RW = 1024 * 1024
"""... of a mount that can be written to: the largest WRITE by the kernel's own limit (PAGES)."""

PAGES = 256
"""Pages of the largest READ by the kernel's own limit, fs.fuse.max_pages_limit; root may set another."""
MAX_PAGES = 4096
"""... and as many as we take of a higher one: 16 MiB, which is what a thread then holds for one answer."""

MAX_BACKGROUND = 64
"""Readahead requests under way at once; the kernel's own 12 starve many readers. As other FUSE daemons do."""

_WANTED = (
    Capability.ASYNC_READ
    | Capability.ATOMIC_O_TRUNC
    | Capability.BIG_WRITES
    | Capability.DO_READDIRPLUS
    | Capability.ASYNC_DIO
    | Capability.PARALLEL_DIROPS
    | Capability.ABORT_ERROR
    | Capability.MAX_PAGES
    | Capability.HANDLE_KILLPRIV_V2
    | Capability.INIT_EXT
    | Capability.HAS_RESEND
)

DIRECTORY_CACHE_BROKEN = ((6, 9), (6, 13))
"""From which Linux to which, that not included, a cached directory loses entries (gcsfuse#2792)."""


@dataclass(frozen=True)
class Agreement:
    """What both sides of a connection hold to until it ends: no daemon that comes later can change it."""

    minor: int
    capabilities: int
    passthrough: bool
    """The kernel may be told to read cached files itself."""
    stateless: bool
    """OPEN and OPENDIR are answered ENOSYS: the kernel opens files without asking."""
    cached_directories: bool
    """Listings stay in the page cache."""
    room: int = REQUEST
    """Bytes of room for one request."""


def agree(
    offer: InitIn,
    *,
    stateless: bool,
    passthrough: bool,
    release: str,
    pages: int = PAGES,
    writable: bool = False,
) -> tuple[Agreement, InitOut]:
    """What to take of what the kernel offers. `release` is the kernel's, as uname(2) says; `pages` its limit.

    Raises MountError where it speaks too old a protocol; it has no passthrough where `stateless` is on,
    since that needs the answer to OPEN.
    """
    if offer.major != protocol.MAJOR or offer.minor < protocol.OLDEST_MINOR:
        raise MountError(
            f"this kernel speaks FUSE {offer.major}.{offer.minor}, the native driver needs "
            f"{protocol.MAJOR}.{protocol.OLDEST_MINOR} or newer; use --driver pyfuse3"
        )
    wanted = _WANTED
    if stateless:
        wanted |= Capability.NO_OPEN_SUPPORT | Capability.NO_OPENDIR_SUPPORT
    elif passthrough:
        wanted |= Capability.PASSTHROUGH
    taken = wanted & offer.capabilities
    passes = bool(taken & Capability.PASSTHROUGH)
    max_write = MAX_WRITE_RW if writable else MAX_WRITE
    agreement = Agreement(
        minor=min(offer.minor, protocol.MINOR),
        capabilities=int(taken),
        passthrough=passes,
        stateless=stateless and bool(taken & Capability.NO_OPEN_SUPPORT),
        # Never where names change under it: the kernel would go on showing what it has listed.
        cached_directories=not writable and not _broken(release),
        room=max_write + 4096,
    )
    answer = InitOut(
        minor=agreement.minor,
        max_readahead=offer.max_readahead,
        capabilities=agreement.capabilities,
        max_write=max_write,
        max_background=MAX_BACKGROUND,
        congestion_threshold=MAX_BACKGROUND * 3 // 4,
        max_pages=min(pages, MAX_PAGES),
        # 1: cached files lie on plain file systems. More would forbid others to stack on this mount.
        max_stack_depth=1 if passes else 0,
    )
    return agreement, answer


def _broken(release: str) -> bool:
    numbers = release.split("-")[0].split(".")
    try:
        version = int(numbers[0]), int(numbers[1])
    except (ValueError, IndexError):
        return False
    first, fixed = DIRECTORY_CACHE_BROKEN
    return first <= version < fixed


def greet(descriptor: int, *, stateless: bool, passthrough: bool, writable: bool = False) -> Agreement:
    """Answer INIT, the first request of a fresh mount. Raises MountError."""
    buffer = bytearray(REQUEST)
    while True:
        length = _read(descriptor, buffer)
        header, body = protocol.decode(memoryview(buffer)[:length])
        if not isinstance(body, InitIn):
            raise MountError(f"the kernel began with {protocol.opcode_name(header.opcode)} instead of INIT")
        if body.major > protocol.MAJOR:  # it will ask again, with our major
            os.write(descriptor, b"".join(protocol.reply(header.unique, protocol.encode_init_out(_OURS))))
            continue
        try:
            agreement, answer = agree(
                body,
                stateless=stateless,
                passthrough=passthrough,
                release=os.uname().release,
                pages=_most_pages(),
                writable=writable,
            )
        except MountError:
            os.writev(descriptor, protocol.error(header.unique, errno.EPROTO))
            raise
        os.writev(descriptor, protocol.reply(header.unique, protocol.encode_init_out(answer)))
        return agreement


def _most_pages() -> int:
    try:
        with open("/proc/sys/fs/fuse/max_pages_limit", encoding="ascii") as knob:
            return int(knob.read())
    except (OSError, ValueError):
        return PAGES  # Linux before 6.13 has no such knob


_OURS = InitOut(minor=protocol.MINOR, max_readahead=0, capabilities=0, max_write=MAX_WRITE)


def _read(descriptor: int, buffer: bytearray) -> int:
    while True:
        try:
            return os.readv(descriptor, [buffer])
        except OSError as error:
            if error.errno in AGAIN:
                continue
            raise MountError(f"the mount ended before it was served ({error.strerror})") from error


AGAIN = frozenset((errno.EINTR, errno.EAGAIN, errno.ENOENT))
"""What reading the device may say that means: read again. ENOENT: the request was interrupted meanwhile."""


def resend(descriptor: int) -> None:
    """Have the kernel send again what was read and not answered, by whomever. Raises OSError."""
    os.write(descriptor, protocol.notify_resend())


# ---- while nobody serves ---------------------------------------------------------------------------


class Refusal:
    """Answers EIO to whatever is asked of a connection, so that nobody waits for a daemon that does not come.

    Between `begin` and `end` nobody else may read the connection. It does not wait: `answer` is to be called
    when there is something to read.
    """

    def __init__(self, descriptor: int, agreement: Agreement) -> None:
        self._descriptor, self._room = descriptor, agreement.room
        self._buffer = bytearray()  # none, as long as nothing is refused

    def begin(self) -> None:
        """... also to what an earlier daemon has read and not answered."""
        self._buffer = bytearray(self._room)
        with contextlib.suppress(OSError):
            resend(self._descriptor)
        os.set_blocking(self._descriptor, False)

    def answer(self) -> bool:
        """One request, if there is one; False when the mount is gone."""
        try:
            length = os.readv(self._descriptor, [self._buffer])
        except OSError as error:
            return error.errno in AGAIN
        if not length:
            return False  # not from the kernel, but from a socket in its place that is closed
        try:
            header = protocol.decode_header(memoryview(self._buffer)[:length])
            unique = 0 if header.opcode in _UNANSWERED else header.unique
        except protocol.Malformed as malformed:
            log.error("%s", malformed)
            unique = malformed.unique
        if unique:
            with contextlib.suppress(OSError):
                os.writev(self._descriptor, protocol.error(unique, errno.EIO))
        return True

    def end(self) -> None:
        """Somebody else reads from now on. Whether a read waits is said of the connection, not of a
        descriptor: all who have it share that."""
        self._buffer = bytearray()
        os.set_blocking(self._descriptor, True)


_UNANSWERED = frozenset((protocol.Opcode.FORGET, protocol.Opcode.BATCH_FORGET, protocol.Opcode.INTERRUPT))


# ---- backing files -------------------------------------------------------------------------------


class Lendable(Protocol):
    """A cached file that may be read by the kernel. `datacache.cache.tier.Lent` is one."""

    @property
    def descriptor(self) -> int: ...
    @property
    def identity(self) -> tuple[int, int]: ...


class Registrar(Protocol):
    """Who tells the kernel of backing files."""

    def open(self, descriptor: int) -> int:
        """The number of a file for the kernel. Raises OSError."""

    def close(self, number: int) -> None:
        """Take it back; what is open on it goes on. Raises OSError."""


class Device:
    """The device itself as the registrar: needs CAP_SYS_ADMIN."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def open(self, descriptor: int) -> int:
        argument = protocol.encode_backing_map(descriptor)
        return int(fcntl.ioctl(self._descriptor, protocol.DEV_IOC_BACKING_OPEN, argument))

    def close(self, number: int) -> None:
        fcntl.ioctl(self._descriptor, protocol.DEV_IOC_BACKING_CLOSE, protocol.encode_backing_id(number))


class Backings:
    """Cached files that the kernel knows, each under one number as long as anybody has it open.

    One file, one number: the kernel refuses a node that is open on one number an open on another, be it
    of the same file. Thread-safe.
    """

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar
        # Under the lock: number and opens by identity; and devices that the kernel will not read from.
        self._lock = threading.Lock()
        self._known: dict[tuple[int, int], list[int]] = {}
        self._refused: dict[int, str] = {}
        self._left = False

    def __repr__(self) -> str:
        return f"<Backings {len(self._known)} files>"

    @property
    def refusal(self) -> str:
        """Why some files are served though they are whole; empty when there is no reason."""
        return "; ".join(sorted(set(self._refused.values())))

    def acquire(self, lent: Lendable) -> int | None:
        """The number of a cached file, until as many `release`s. None where the kernel will not have it:
        said once, and then not tried again."""
        device = lent.identity[0]
        with self._lock:
            held = self._known.get(lent.identity)
            if held is not None:
                held[1] += 1
                return held[0]
            if device in self._refused:
                return None
            try:
                number = self._registrar.open(lent.descriptor)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR):
                    return None  # of this moment
                self._refused[device] = _reason(error)
                log.warning(
                    "no passthrough for files on device %d:%d, reads of them are served: %s",
                    os.major(device), os.minor(device), _reason(error),
                )  # fmt: skip
                return None
            self._known[lent.identity] = [number, 1]
            return number

    def again(self, identity: tuple[int, int]) -> int | None:
        """Another `acquire` of a file that somebody has open; None where nobody has any more."""
        with self._lock:
            held = self._known.get(identity)
            if held is None:
                return None
            held[1] += 1
            return held[0]

    def release(self, identity: tuple[int, int]) -> None:
        """Undo one `acquire` or `again`."""
        with self._lock:
            held = self._known[identity]
            held[1] -= 1
            if held[1]:
                return
            del self._known[identity]
            if self._left:
                return
            with contextlib.suppress(OSError):  # the mount is gone, and the number with it
                self._registrar.close(held[0])

    def leave(self) -> None:
        """From now on take no number back, but leave them all to `forget_backings` of a successor: an answer
        that is on its way may name one, and an open on a number that is gone is EIO."""
        with self._lock:
            self._left = True


def forget_backings(registrar: Registrar, known: int) -> int:
    """Take back all numbers that daemons before this one have left, so that their files' space can be
    freed; how many there were. `known` is the number that the kernel has just given out: it counts
    upwards. What is open on them goes on."""
    count = 0
    for number in range(1, known):
        with contextlib.suppress(OSError):
            registrar.close(number)
            count += 1
    return count


def _reason(error: OSError) -> str:
    return {
        errno.EPERM: "it needs CAP_SYS_ADMIN",
        errno.ELOOP: "the cache lies on a stacked file system such as overlayfs",
        errno.EOPNOTSUPP: "that file system cannot be read by the kernel for us",
    }.get(error.errno or 0, str(error.strerror))


def writer(descriptor: int) -> Callable[[bytes], bool]:
    """What sends a notification: whether the kernel knew what it was about."""

    def write(notification: bytes) -> bool:
        try:
            os.write(descriptor, notification)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED):
                return False
            raise
        return True

    return write
