"""
The mounter of a real node.

A data set is mounted and unmounted by `datacache mount` and `datacache umount`, as processes: they lock the
directory, are bounded, clean up after themselves, and go on when we are killed. Settings go to them on
standard input, secrets in their environment. Who serves the mount then is the broker and its daemon
(`fuse.broker`), no child of ours.

A bind mount is made beside the tree and moved to its place when it is as it should be (open_tree,
mount_setattr, move_mount; Linux 5.12): nobody sees it writable first, and a kill leaves nothing half done.
"""

import ctypes
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from csi.mounter.mounter import Mounted, Usage
from datacache.cluster import registry
from datacache.cluster.client import ControlClient
from datacache.cluster.control import owed
from datacache.config.keys import PREFIX, is_credential
from datacache.config.parsing import runtime_directory
from datacache.errors import ControlError, DatacacheError, MountError, SettingError, TookTooLong, VolumeInUse
from datacache.telemetry import hide, redact
from fuse import mountpoint

log = logging.getLogger(__name__)

_GIVING_UP = 10.0
"""Seconds for `datacache mount` to take down what it has begun, when its time is over."""
_ASK = 5.0
"""Seconds for a worker to say what is not in the bucket yet."""
_FORCE = 45.0
"""Seconds for a mount that hangs to be taken off, whatever time is left: it is not begun in vain."""

_RUNTIME = f"{PREFIX}RUNTIME"


class LinuxMounter:
    """Mounts of this node, in the mount name space of this process."""

    def __repr__(self) -> str:
        return "<LinuxMounter>"

    def at(self, directory: str) -> Mounted | None:
        info = mountpoint.find(directory)
        if info is None:
            return None
        return Mounted(info.fstype == mountpoint.FSTYPE, info.device, info.read_only)

    # ---- data sets -------------------------------------------------------------------------------

    def show(
        self, directory: str, tree: Mapping[str, object], secrets: Mapping[str, str], *, within: float
    ) -> None:
        text = json.dumps(dict(tree)).encode()
        words = ["mount", directory, "--config", "/dev/stdin"]
        code, said = _datacache(words, text=text, secrets=secrets, within=within)
        if code == 2:
            raise _Refused(said)
        if code:
            raise MountError(said)

    def owed(self, directory: str) -> str:
        # By name: `registry.find` looks where a path leads, and this one may hang.
        workers = registry.live(runtime_directory(os.environ))
        worker = next((known for known in workers if known.mount == directory), None)
        if worker is None:
            return ""
        try:
            return owed(ControlClient(worker.socket, timeout=_ASK).status().get("writing"))
        except ControlError:
            return ""

    def take_off(self, directory: str, *, within: float) -> None:
        if mountpoint.is_mounted(directory) is None:
            return
        if isinstance(mountpoint.statvfs(directory), os.statvfs_result):
            code, said = _datacache(["umount", directory], within=within)
            if code:
                raise VolumeInUse(said)
            return
        # It does not answer, or nobody is there who could.
        log.warning("%s does not answer: its connection is aborted", directory)
        code, said = _datacache(["umount", directory, "--force"], within=_FORCE)
        if code and mountpoint.is_mounted(directory) is not None:
            _datacache(["umount", directory, "--lazy"], within=_FORCE)
            code, said = _datacache(["umount", directory, "--force"], within=_FORCE)  # for its processes
        if code or mountpoint.is_mounted(directory) is not None:
            raise MountError(said)

    def binds(self, directory: str) -> list[str]:
        info = mountpoint.is_mounted(directory)
        if info is None:
            return []
        return [
            other.directory
            for other in mountpoint.mounts().values()
            if other.device == info.device and other.directory != info.directory
        ]

    def usage(self, directory: str) -> Usage:
        found = mountpoint.statvfs(directory)
        if found is None:
            raise MountError(f"{directory} does not answer")
        if isinstance(found, int):
            raise MountError(f"{directory} answers {os.strerror(found)}")
        unit = found.f_frsize
        return Usage(
            total=found.f_blocks * unit, free=found.f_bfree * unit, available=found.f_bavail * unit,
            files=found.f_files, files_free=found.f_ffree,
        )  # fmt: skip

    # ---- bind mounts -----------------------------------------------------------------------------

    def bind(self, source: str, target: str, *, read_only: bool) -> None:
        if mountpoint.is_mounted(source) is None:
            raise MountError(f"cannot bind {source} to {target}: no data set is mounted there")
        with suppress(FileExistsError):
            os.mkdir(target, 0o750)
        try:
            tree = _copy_of(source)
            try:
                if read_only:
                    _make_read_only(tree)
                _move(tree, target)
            finally:
                os.close(tree)
        except OSError as error:
            hint = " (bind mounts need Linux 5.12 or newer)" if error.errno == errno.ENOSYS else ""
            raise MountError(f"cannot bind {source} to {target}: {error.strerror}{hint}") from error

    def unbind(self, target: str) -> None:
        while mountpoint.is_mounted(target) is not None:
            # Lazily: what a container that is on its way out has open must not hold up the pod's end.
            mountpoint.unmount(target, lazy=True)
        try:
            os.rmdir(target)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise MountError(f"cannot remove {target}: {error.strerror}") from error


class _Refused(SettingError):
    """What `datacache mount` would not start with; its words are the message already."""

    def __init__(self, message: str) -> None:
        DatacacheError.__init__(self, message)


# ---- the datacache command -----------------------------------------------------------------------


def surroundings(secrets: Mapping[str, str]) -> dict[str, str]:
    """The environment of a mount: ours, without what says who *we* are and without settings of our own."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not is_credential(name) and (not name.startswith(PREFIX) or name == _RUNTIME)
    }
    return {**ours, **secrets}


def _datacache(
    words: Sequence[str], *, within: float, text: bytes = b"", secrets: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run `datacache WORDS`; its exit code, and its one line of what went wrong. Raises TookTooLong.

    What it says goes to a file in memory, which is still there when we are not.
    """
    end = time.monotonic() + within
    heard = os.memfd_create("datacache", os.MFD_CLOEXEC)
    given = os.memfd_create("settings", os.MFD_CLOEXEC)
    try:
        os.write(given, text)
        os.lseek(given, 0, os.SEEK_SET)
        # -P and "/": it is our datacache, and keeps no directory busy. A session of its own: what ends us
        # is no reason to leave a mount half done.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "datacache.cli.main", *words],
            stdin=given, stdout=subprocess.DEVNULL, stderr=heard, cwd="/", start_new_session=True,
            env=surroundings(secrets or {}),
        )  # fmt: skip
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process)
            raise TookTooLong(f"`datacache {words[0]}` of {words[1]} took more than {within:.0f} s") from None
        finally:
            if process.poll() is None:
                _end(process)
        return code, _told(os.pread(heard, 1 << 16, 0), code, secrets or {})
    finally:
        os.close(heard)
        os.close(given)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_GIVING_UP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _told(said: bytes, code: int, secrets: Mapping[str, str]) -> str:
    """The line of an error in what the command said; the rest goes to our log."""
    failed = f"`datacache` ended with exit code {code}"
    for line in said.decode("utf-8", "replace").splitlines():
        line = hide(redact(line.strip()), secrets.values())
        if line.startswith("datacache: error: "):
            failed = line.removeprefix("datacache: error: ")
        elif line:
            log.info("%s", line)
    return failed


# ---- system calls --------------------------------------------------------------------------------

# The same numbers on every architecture: they came after the tables had been united.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_EMPTY_PATH = 0x100, 0x800, 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 1

_libc = ctypes.CDLL(None, use_errno=True)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("user_name_space", ctypes.c_uint64),
    )


def _copy_of(source: str) -> int:
    """A descriptor of a copy of the mount on `source` that is nowhere in the tree."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT
    return _call(_OPEN_TREE, ctypes.c_int(_AT_FDCWD), os.fsencode(source), ctypes.c_uint(flags))


def _make_read_only(tree: int) -> None:
    wanted = _Attributes(set=_MOUNT_ATTR_RDONLY)
    _call(
        _MOUNT_SETATTR, ctypes.c_int(tree), b"", ctypes.c_uint(_AT_EMPTY_PATH), ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )  # fmt: skip


def _move(tree: int, target: str) -> None:
    _call(
        _MOVE_MOUNT, ctypes.c_int(tree), b"", ctypes.c_int(_AT_FDCWD), os.fsencode(target),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
    )  # fmt: skip


def _call(number: int, *arguments: object) -> int:
    done = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done
