"""
Which workers run on this machine, for this user.

One small JSON file a worker in the runtime directory (0700, so only its owner can add, read or
connect), written whole and renamed, beside the worker's control socket. Nothing needs to be tidied
by a worker that was killed: whoever looks drops the files of processes that are no more. A process
is named by pid *and* start time, in the file's name too, so that a pid that was used again neither
looks alive nor loses its own file.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from datacache.clock import boot_id
from datacache.errors import ControlError

SUFFIX = ".json"


@dataclass(frozen=True)
class Registration:
    """A running worker, and how it is found."""

    pid: int
    """The process to wait for, or to end: the worker itself, or the broker that keeps its mount."""
    mount: str
    """Where it is mounted; empty for a worker without a mount (`load` on a cache)."""
    dataset: str
    socket: str
    """Its control socket."""
    caches: list[str] = field(default_factory=list)
    """Directories of its tiers."""
    started: float = 0.0
    """Wall time."""
    uris: list[str] = field(default_factory=list)
    """What it shows."""
    born: str = ""
    """Boot and start time of the process; `register` fills it in."""


def socket_path(runtime: str, *, dataset: str, mount: str, pid: int | None = None) -> str:
    """Where the worker of `dataset` at `mount` listens that others know as process `pid`: this one, where
    none is given."""
    pid = pid or os.getpid()
    which = hashlib.blake2b(json.dumps([dataset, mount]).encode(), digest_size=4).hexdigest()
    start = _born(pid).rpartition(":")[2]
    return os.path.join(runtime, f"{pid}-{start}-{which}.sock")


def make_private(directory: str) -> None:
    """Make `directory`, or see that it is ours alone. Raises ControlError.

    It may lie in /tmp, where others could have made it first and would be handed our sockets.
    """
    try:
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise ControlError(f"{directory} is not a directory of this user; set DATACACHE_RUNTIME to one")
        if found.st_mode & 0o077:
            os.chmod(directory, 0o700)
    except OSError as error:
        raise ControlError(f"{directory} cannot be used for control sockets ({error.strerror})") from error


def register(runtime: str, registration: Registration) -> str:
    """Let other processes find `registration`; the path of its file. Raises ControlError."""
    make_private(runtime)
    path = _file(registration)
    text = json.dumps(asdict(replace(registration, born=_born(registration.pid))))
    new = f"{path}.new"
    try:
        with open(new, "w", encoding="ascii", opener=_private) as file:
            file.write(text)
        os.replace(new, path)
    except OSError as error:
        raise ControlError(f"{path} cannot be written ({error.strerror})") from error
    return path


def unregister(runtime: str, registration: Registration) -> None:
    """Take it back. Idempotent."""
    with suppress(FileNotFoundError):
        os.unlink(_file(registration))


def broker_socket(socket: str) -> str:
    """Where the broker listens that keeps the mount of the worker whose control socket is `socket`."""
    return socket.removesuffix(".sock") + ".broker"


def clear(socket: str) -> None:
    """Remove what is left of a worker that is gone, and of its broker: files and sockets. Idempotent."""
    for left in (socket.removesuffix(".sock") + SUFFIX, socket, broker_socket(socket)):
        with suppress(OSError):
            os.unlink(left)


def live(runtime: str) -> list[Registration]:
    """All workers that run, the oldest first. What dead ones left is removed."""
    found = []
    try:
        names = os.listdir(runtime)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    for name in names:
        path = os.path.join(runtime, name)
        if name.endswith(SUFFIX) and (registration := _read(path)):
            if registration.born == _born(registration.pid):
                found.append(registration)
            else:
                clear(registration.socket)
    return sorted(found, key=lambda r: (r.started, r.pid))


def find(runtime: str, target: str, *, real: Callable[[str], str] = os.path.abspath) -> Registration | None:
    """The worker with this mount directory, data set, URI or cache directory; the oldest of several, but of
    several mounts on one directory the last, which hides the others. `real` follows links, where that is
    wanted: on the way there may be a mount that hangs."""
    uri, directory = target.rstrip("/"), real(target)
    absolute = os.path.abspath(target)
    workers = live(runtime)
    for known in reversed(workers):
        if known.mount and known.mount in (absolute, directory):
            return known
    for known in workers:
        if known.dataset == target:
            return known
        if uri in (other.rstrip("/") for other in known.uris):
            return known
        if directory in map(real, known.caches):
            return known
    return None


def at_socket(socket: str) -> Registration | None:
    """The registration beside `socket`, whether its process lives or not."""
    return _read(socket.removesuffix(".sock") + SUFFIX)


def _file(registration: Registration) -> str:
    return registration.socket.removesuffix(".sock") + SUFFIX


def _read(path: str) -> Registration | None:
    """What is registered in `path`; None when it is gone, or nothing that we wrote."""
    try:
        with open(path, encoding="ascii") as file:
            return Registration(**json.loads(file.read(1 << 20)))
    except (OSError, ValueError, TypeError):
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _born(pid: int) -> str:
    """Boot and start time of a process; empty when it is dead, or only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything; what follows its last ")" is numbers.
            words = file.read().rpartition(b")")[2].split()
        boot = boot_id()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if words[0] in (b"Z", b"X") else f"{boot}:{words[19].decode()}"
