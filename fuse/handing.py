"""
What the two holders of a mount say to each other, and how.

A mount of a Dataset's volume ends when the last process closes its descriptor. So two processes of a node
have it, the *node* plugin and the *worker* of the Dataset, and whichever starts gets it from the other, over
a Unix socket of that Dataset alone: one packet a message, JSON, the descriptor beside it (SCM_RIGHTS). What
is said when is in `holding`.

Whatever comes from the other side is looked at before it is believed; what will not do raises Misspoken, and
the connection ends, which is no harm to the mount.
"""

import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from datacache.errors import DatacacheError, MountError
from fuse.connection import Agreement

VERSION = 1
"""Of this protocol, to which `Held` and the `Agreement` in it belong. Who says another one is not talked to,
and cannot be handed a mount: so another one is for a change that no other way is found for."""

MAX = 8192
"""Bytes of a message."""
_TEXT = 1024
"""Characters of a string in it."""


class Misspoken(DatacacheError):
    """The other side says what cannot be."""


@dataclass(frozen=True)
class Held:
    """A mount, as its holders know it beside its descriptor."""

    connection: str
    """Which mount of all that there were: a random word of whoever has mounted it."""
    agreement: Agreement
    life: int = 0
    """Workers that have begun to serve it."""
    index: str = ""
    """The identity of the index of the first of them: node numbers mean nothing to another. Empty: there was
    none yet."""


@dataclass(frozen=True)
class Message:
    """One packet. What a `say` has none of is empty."""

    say: str
    connection: str = ""
    """The mount that it is about."""
    held: Held | None = None
    """... with its descriptor beside it."""
    serving: bool = False
    index: str = ""
    why: str = ""
    """For people."""
    owed: str = ""
    """What was written and is not in the bucket yet, for people; empty: nothing."""


SAYINGS = frozenset((
    # The worker: `hello` when it has connected, with what it holds. `ready`: may I begin to read? `serving`,
    # `unable`, and `gone`: so it is with this mount. `owes`: the answer to `owing`.
    "hello", "ready", "serving", "unable", "gone", "owes",
    # The node plugin: `take` this mount. `keep` what you have said that you hold; `other`: you hold one that
    # is none of mine. `nothing`: there is no mount. `go`: nobody else reads it. `owing`: nobody uses it any
    # more, what do you owe the bucket?
    "take", "keep", "other", "nothing", "go", "owing",
))  # fmt: skip


def dump(message: Message) -> bytes:
    """`message` as a packet, without descriptors."""
    said = {name: value for name, value in asdict(message).items() if value}
    return json.dumps({"version": VERSION, **said}).encode()


def load(packet: bytes) -> Message:
    """What `dump` made. Raises Misspoken for anything else."""
    try:
        fields = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise Misspoken("it says what is no JSON") from error
    if not isinstance(fields, dict):
        raise Misspoken("it says what is no message")
    if fields.pop("version", None) != VERSION:
        raise Misspoken(f"it speaks another version than {VERSION}: upgrade the older of the two")
    held = fields.pop("held", None)
    try:
        message = Message(**fields, held=_held(held) if held is not None else None)
    except (TypeError, KeyError) as error:
        raise Misspoken("it says what is no message") from error
    _check(message, ("say", "connection", "index", "why", "owed"), ("serving",))
    if message.say not in SAYINGS:
        raise Misspoken(f"it says {message.say!r}, which means nothing")
    return message


def _held(fields: Any) -> Held:
    held = Held(**{**fields, "agreement": Agreement(**fields["agreement"])})
    _check(held, ("connection", "index"))
    _check(held.agreement, (), ("passthrough", "stateless", "cached_directories"))
    numbers = (held.life, held.agreement.minor, held.agreement.capabilities, held.agreement.room)
    if not held.connection or any(type(n) is not int or not 0 <= n < 1 << 64 for n in numbers):
        raise Misspoken("it holds what is no mount")
    if held.agreement.room > _ROOM:
        raise Misspoken("it holds a mount with larger requests than there are")
    return held


_ROOM = 32 << 20
"""Bytes of the largest request that any kernel sends."""


def _check(value: object, texts: tuple[str, ...], flags: tuple[str, ...] = ()) -> None:
    for name in texts:
        text = getattr(value, name)
        if not isinstance(text, str) or len(text) > _TEXT:
            raise Misspoken(f"its {name} is no short text")
    for name in flags:
        if type(getattr(value, name)) is not bool:
            raise Misspoken(f"its {name} is neither true nor false")


# ---- the socket ------------------------------------------------------------------------------------


def send(to: socket.socket, message: Message, descriptor: int | None = None) -> None:
    """Send `message`, with `descriptor` where it has a mount. Never waits. Raises OSError."""
    beside = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(descriptor))]
    to.sendmsg([dump(message)], beside, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive(from_: socket.socket) -> tuple[Message, int] | None:
    """The next message, which has to be there, and the descriptor beside it (-1: none), which is the caller's
    then; None at the end. Raises Misspoken, OSError."""
    # Not `recv_fds`, which loses the flags on its way (CPython 3.11).
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    packet, beside, said, _ = from_.recvmsg(MAX, socket.CMSG_LEN(_INT.size), flags)
    with contextlib.ExitStack() as refused:
        descriptors = []
        for level, kind, data in beside:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(data) - len(data) % _INT.size
                descriptors += [number for (number,) in _INT.iter_unpack(data[:whole])]
        for descriptor in descriptors:
            refused.callback(os.close, descriptor)
        if not packet:
            return None
        if said & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise Misspoken(f"it says more than {MAX} bytes, or gives more than one descriptor")
        message = load(packet)
        if bool(descriptors) != (message.held is not None):
            raise Misspoken("it says that it gives a descriptor, and gives none, or the other way round")
        refused.pop_all()
        return message, descriptors[0] if descriptors else -1


_INT = struct.Struct("i")


def listen(path: str) -> socket.socket:
    """A socket at `path` for its owner alone, in the place of what a process before has left there. Raises
    MountError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        # Not by the umask, which is of all threads: nobody else gets into the directory meanwhile.
        with _address(path) as address:
            listener.bind(address)
        os.chmod(path, 0o600)
        listener.listen(4)
    except OSError as error:
        listener.close()
        raise MountError(f"{path} cannot be listened on ({error.strerror})") from error
    listener.setblocking(False)
    return listener


def connect(path: str) -> socket.socket:
    """A connection to the listener at `path`. Raises OSError: FileNotFoundError and ConnectionRefusedError
    mean that there is none."""
    to = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        to.setblocking(False)
        with _address(path) as address:
            to.connect(address)
        if not is_ours(to):
            raise PermissionError(f"{path} is of another user")
    except BaseException:
        to.close()
        raise
    return to


def is_ours(peer: socket.socket) -> bool:
    """Whether the other side is a process of the same user as we: root."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.geteuid())


@contextlib.contextmanager
def _address(path: str) -> Iterator[str]:
    """The address of a socket at `path`. Through its directory: there is room for 107 bytes only."""
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def is_mount(descriptor: int) -> bool:
    """Whether it is /dev/fuse that is open: no other file has anything to do here."""
    found = os.fstat(descriptor)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == _FUSE


_FUSE = os.makedev(10, 229)
