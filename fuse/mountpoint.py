"""
Mounts of ours, seen from outside: which there are, which are stale, how they are taken down.

All from /proc/self/mountinfo. A mount is never statted by the process that asks: one whose daemon
hangs would hang it too, beyond the reach of any signal. The one question that needs the mount
itself (is its daemon gone?) is put by a process of its own that is given a bounded time.
"""

import contextlib
import ctypes
import errno
import grp
import logging
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from datacache.config.settings import Settings
from datacache.errors import MountError, SettingError

log = logging.getLogger(__name__)

FSTYPE = "fuse.datacache"
"""What our mounts are in the mount table."""

_PROBE_TIMEOUT = 2.0
"""Seconds within which a mount whose daemon is gone says so (it does at once: ENOTCONN)."""
_HOLDERS_TIMEOUT = 2.0
"""Seconds spent on finding out who keeps a mount busy."""
_HOLDERS_NAMED = 5
_LET_GO = 2.0
"""Seconds in which those who waited for a mount that was aborted leave it."""
_SYMLINKS = 40  # as the kernel

_CAP_SYS_ADMIN = 21
_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8


@dataclass(frozen=True)
class MountInfo:
    """One line of the mount table."""

    directory: str
    device: str
    """"MAJOR:MINOR": the name of the mount's bdi, and of this mount among all that ever were here."""
    fstype: str
    source: str
    """What is mounted, as `df` shows it."""
    read_only: bool
    """Whether nothing can be written through this mount; others of the same device may differ."""


# ---- the mount table -----------------------------------------------------------------------------

_OCTAL = re.compile(rb"\\([0-7]{3})")


def mountinfo() -> bytes:
    """What is mounted here, as `parse_mountinfo` takes it."""
    with open("/proc/self/mountinfo", "rb") as table:
        return table.read()


def parse_mountinfo(text: bytes) -> list[MountInfo]:
    """The lines of a mountinfo file, oldest first. See proc_pid_mountinfo(5)."""
    mounts = []
    for line in text.splitlines():
        fields = line.split(b" ")
        # Optional fields end with "-"; behind it: type, source, options of the super block.
        dash = fields.index(b"-", 6)
        fstype, source = fields[dash + 1 : dash + 3]
        mounts.append(
            MountInfo(
                _unescape(fields[4]), fields[2].decode(), _unescape(fstype), _unescape(source),
                read_only=b"ro" in fields[5].split(b","),
            )
        )  # fmt: skip
    return mounts


def _unescape(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda m: bytes([int(m[1], 8)]), field))


def mounts() -> dict[str, MountInfo]:
    """The topmost mount of each directory, whosever it is."""
    return {mount.directory: mount for mount in parse_mountinfo(mountinfo())}


def find(directory: str) -> MountInfo | None:
    """The mount at `directory`, whosever it is, found without touching it."""
    table = mounts()
    return table.get(_led_to(directory, table))


def real(path: str) -> str:
    """Where the links in `path` lead, as realpath(3) tells it. Nothing in a mount of ours is looked at: from
    there on it is told as it is spelled."""
    return _led_to(path, mounts())


def above(path: str) -> MountInfo | None:
    """The mount of ours that `path` lies in, or is; found without touching it."""
    table = mounts()
    place = _led_to(path, table)
    around = [m for m in table.values() if m.fstype == FSTYPE and _within(place, m.directory)]
    return max(around, key=lambda mount: len(mount.directory), default=None)


def _led_to(path: str, table: Mapping[str, MountInfo]) -> str:
    done, left, links = "/", _names(os.path.join(os.getcwd(), path)), 0
    while left:
        name = left.pop()
        if name == "..":
            done = os.path.dirname(done)
            continue
        here = os.path.join(done, name)
        mount = table.get(here)
        if mount is not None and mount.fstype == FSTYPE:
            return os.path.normpath("/".join((here, *reversed(left))))
        target = ""
        if mount is None:  # what is mounted on is no link, and need not be asked
            with contextlib.suppress(OSError):
                target = os.readlink(here)
        links += bool(target)
        if not target or links > _SYMLINKS:
            done = here
            continue
        left += _names(target)
        done = "/" if target.startswith("/") else done
    return done


def _names(path: str) -> list[str]:
    """Its parts, the last first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def is_mounted(directory: str) -> MountInfo | None:
    """The mount of ours at `directory`, if there is one. Never touches the mount."""
    mount = find(directory)
    return mount if mount is not None and mount.fstype == FSTYPE else None


# ---- stale mounts --------------------------------------------------------------------------------


def is_stale(directory: str) -> bool:
    """Whether `directory` is a mount of ours whose daemon is gone. Takes at most `_PROBE_TIMEOUT`.

    A daemon that is there and does not answer is not stale: its files may come back.
    """
    mount = is_mounted(directory)
    return mount is not None and statvfs(mount.directory) in (errno.ENOTCONN, errno.ECONNABORTED)


def left_behind(served: Collection[str]) -> list[MountInfo]:
    """Stale mounts of ours; those at the directories `served` are known not to be, and are not asked."""
    ours = [mount for mount in mounts().values() if mount.fstype == FSTYPE]
    return [mount for mount in ours if mount.directory not in served and is_stale(mount.directory)]


def statvfs(directory: str) -> os.statvfs_result | int | None:
    """statvfs(3) of `directory`, asked by another process: what it says, the errno when it fails, None when
    there is no answer within `_PROBE_TIMEOUT`.

    Not `subprocess`: that waits for a child that it killed, and one that hangs in a mount cannot die.
    """
    program = (
        "import os,sys\n"
        "try: print(*os.statvfs(sys.argv[1]))\n"
        "except OSError as e: sys.exit(e.errno)"
    )  # fmt: skip
    read, write = os.pipe()
    with open(read, "rb") as said:
        try:
            child = os.posix_spawn(
                sys.executable, [sys.executable, "-ISc", program, directory], os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)],
            )  # fmt: skip
        finally:
            os.close(write)
        with _pidfd(child) as ended:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            if not poll.poll(_PROBE_TIMEOUT * 1000):
                os.kill(child, signal.SIGKILL)
                # Reaped if it can die; else it stays behind, until the mount answers or is taken down.
                if not poll.poll(100):
                    return None
                os.waitpid(child, 0)
                return None
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code or os.statvfs_result([int(word) for word in said.read().split()])


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def clean_stale(directory: str) -> bool:
    """Take a stale mount of ours off `directory`; whether there was one."""
    if not is_stale(directory):
        return False
    unmount(directory, lazy=True)
    log.warning("%s was still mounted by a process that is gone; taken off", directory)
    return True


# ---- unmounting ----------------------------------------------------------------------------------


def unmount(directory: str, *, lazy: bool = False, force: bool = False) -> None:
    """Take the mount of ours off `directory`.

    `lazy`: at once, also when it is in use; what is open stays readable until it is closed.
    `force`: what is open and under way fails; for a daemon that hangs. Needs root.
    """
    mount = is_mounted(directory)
    if mount is None:
        raise MountError(f"{directory} is not mounted by datacache")
    if os.geteuid() == 0:
        problem = _umount2(mount.directory, lazy=lazy, force=force)
        let_go = time.monotonic() + _LET_GO
        while force and "busy" in problem and time.monotonic() < let_go:
            time.sleep(0.02)  # what has failed by force, our own probe too, has yet to let go
            problem = _umount2(mount.directory, lazy=lazy, force=force)
    elif force:
        raise MountError("only root can unmount by force; try --lazy")
    else:
        problem = _fusermount(mount.directory, lazy=lazy)
    if "busy" in problem:
        holders = _holders(mount.directory)
        by = f" by {', '.join(holders)}" if holders else ""
        raise MountError(f"{directory} is in use{by}; end that first, or unmount with --lazy")
    now = is_mounted(directory)
    if problem and now is not None and now.device == mount.device:  # else its daemon was faster
        raise MountError(f"cannot unmount {directory}: {problem}")


def elsewhere(device: str) -> str:
    """A process that still has this mount of ours in another mount name space, as `NAME (process N)`; empty
    where none is found."""
    deadline = time.monotonic() + _HOLDERS_TIMEOUT
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if time.monotonic() > deadline:
            break
        with contextlib.suppress(OSError):  # it ended, or is not ours to look into
            with open(f"/proc/{pid}/mountinfo", "rb") as table:
                there = any(line.split()[2] == device.encode() for line in table)
            if there:
                with open(f"/proc/{pid}/comm", "rb") as name:
                    return f"{os.fsdecode(name.read()).strip()} (process {pid})"
    return ""


def take_off(directory: str, device: str) -> None:
    """Unmount `directory` if it is still this mount that is there: it may be somebody's successor."""
    mount = is_mounted(directory)
    if mount is None or mount.device != device:
        return
    try:
        unmount(directory, lazy=True)
    except MountError as error:
        log.error("%s; it will be stale", error)


def _umount2(directory: str, *, lazy: bool, force: bool) -> str:
    """umount2(2); why it failed, or empty."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0) | (_MNT_FORCE if force else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    return "" if libc.umount2(os.fsencode(directory), flags) == 0 else os.strerror(ctypes.get_errno())


def _fusermount(directory: str, *, lazy: bool) -> str:
    """What fusermount3 says when it refuses; empty when it has unmounted."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", directory]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return "fusermount3 is missing (Debian: apt install fuse3)"
    except subprocess.TimeoutExpired:
        return "fusermount3 did not end within 30 s"
    return "" if done.returncode == 0 else (done.stderr.strip() or f"fusermount3 exited {done.returncode}")


def _holders(directory: str) -> list[str]:
    """Processes that have something of `directory` open, mapped or as working directory; the first few.

    Links in /proc are read, never followed, so nothing here touches the mount.
    """
    deadline = time.monotonic() + _HOLDERS_TIMEOUT
    found: list[str] = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if time.monotonic() > deadline or len(found) == _HOLDERS_NAMED:
            break
        with contextlib.suppress(OSError):  # it ended, or is not ours to look into
            if _holds(f"/proc/{pid}", directory):
                with open(f"/proc/{pid}/comm", "rb") as name:
                    found.append(f"{os.fsdecode(name.read()).strip()} (process {pid})")
    return found


def _holds(process: str, directory: str) -> bool:
    links = [f"{process}/cwd", f"{process}/root", f"{process}/exe"]
    links += [f"{process}/fd/{fd}" for fd in os.listdir(f"{process}/fd")]
    for link in links:
        with contextlib.suppress(OSError):
            if _within(os.readlink(link), directory):
                return True
    with open(f"{process}/maps", "rb") as maps:
        paths = (line.split(None, 5)[5:] for line in maps)
        return any(_within(os.fsdecode(path[0]).strip(), directory) for path in paths if path)


def _within(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or below it. Both absolute and normalised."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


# ---- mounting ------------------------------------------------------------------------------------


def obstacle() -> str:
    """Why this machine cannot mount FUSE at all, and what to do; empty when it can."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return "/dev/fuse is missing: `modprobe fuse`, or start the container with --device /dev/fuse"
    except OSError as error:
        return closed_to_us(error, os.stat("/dev/fuse"), root=os.geteuid() == 0)
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return refused_by(status.read(), fusermount=shutil.which("fusermount3"))


def closed_to_us(error: OSError, device: os.stat_result, *, root: bool) -> str:
    """Why `device`, /dev/fuse, may not be opened by a process (`root`, or a user's), and what to do."""
    why = f"/dev/fuse cannot be opened ({error.strerror}): "
    if root or stat.S_IMODE(device.st_mode) & 0o006 == 0o006:
        return f"{why}in a container, start it with --device /dev/fuse --cap-add SYS_ADMIN"
    may = f"its mode is {stat.S_IMODE(device.st_mode):04o}"
    if device.st_gid and device.st_mode & 0o060 == 0o060:
        return f"{why}{may}; root lets you in by `usermod -aG {group(device.st_gid)} YOU`, and a new login"
    return f"{why}{may}; root lets everybody in by `chmod 666 /dev/fuse`"


def group(number: int) -> str:
    """Its name, or the number where it has none."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def refused_by(status: str, *, fusermount: str | None) -> str:
    """Why a process with this /proc/PID/status may not mount, and what to do; empty when it may."""
    fields = dict(re.findall(r"^(\w+):\s*([0-9a-f]+)$", status, re.MULTILINE))

    def has(field: str) -> bool:
        return field not in fields or bool(int(fields[field], 16) >> _CAP_SYS_ADMIN & 1)

    if not has("CapBnd"):
        return (
            "nobody may mount here (no CAP_SYS_ADMIN): "
            "start the container with --cap-add SYS_ADMIN --device /dev/fuse"
        )
    if has("CapEff"):
        return ""
    if fusermount is None:
        return "fusermount3 is missing, which mounts for who is not root: apt-get install fuse3"
    if fields.get("NoNewPrivs") == "1":
        return "fusermount3 may not become root here (no_new_privs): mount as root, or allow escalation"
    return ""


NATIVE_FROM = (6, 9)
"""The first Linux that speaks ABI 7.40."""


def is_native(driver: str, release: str = "") -> bool:
    """Whether `driver` means the native one on the kernel of this `release` (this machine's, where none is
    given). Whether one that is asked for by name can be, is found at INIT."""
    if driver != "auto":
        return driver == "native"
    numbers = re.findall(r"[0-9]+", release or os.uname().release)
    return tuple(map(int, numbers[:2])) >= NATIVE_FROM


def places(settings: Settings) -> dict[str, str]:
    """Directories that are in use beside the mount point, and the setting that names each."""
    found = {tier.path: "--cache" for tier in settings.cache.tiers}
    if settings.writing.enabled and settings.writing.landing:
        found[settings.writing.landing] = "--landing"
    return {**found, settings.state: "--state"}


def check_target(directory: str, places: Mapping[str, str]) -> None:
    """Raise unless a data set can be mounted on `directory` that uses the directories `places`: the setting
    that names each, by path.

    SettingError for what the user named wrongly, MountError for what stands in the way. A directory
    that is not empty is no obstacle, as for mount(8), but it is said.
    """
    if (mount := is_mounted(directory)) is not None:
        raise MountError(
            f"{directory} already shows {mount.source}; unmount it first: datacache umount {directory}"
        )
    if not os.path.isdir(directory):
        found = "not a file" if os.path.exists(directory) else "one that exists (mkdir it first)"
        raise SettingError("mount point", directory, f"a directory, {found}")
    target = os.path.realpath(directory)
    for used, setting in places.items():
        place = os.path.realpath(used)
        # Under the mount point it would vanish behind the mount, and then be read through itself; above
        # it, whoever cleans or walks it would walk into the mount.
        if _within(place, target) or _within(target, place):
            raise SettingError(setting, used, f"a directory that is neither under nor over {directory}")
    if why := obstacle():
        raise MountError(why)
    with contextlib.suppress(OSError):  # who mounts need not be able to read it
        if os.listdir(target):
            log.warning("%s is not empty; what lies in it is hidden while it is mounted on", directory)


def set_read_ahead(directory: str, size: int) -> bool:
    """Let the kernel read `size` bytes ahead on the mount at `directory`; False where we may not (not root).

    The kernel takes it from the mount's bdi; what a FUSE server asks for at INIT is cut to 128 KiB.
    """
    mount = is_mounted(directory)
    if mount is None:
        raise MountError(f"{directory} is not mounted by datacache")
    try:
        with open(f"/sys/class/bdi/{mount.device}/read_ahead_kb", "w") as knob:
            knob.write(str(max(1, size // 1024)))
    except OSError as error:
        log.info("read-ahead of %s stays as it is: %s", directory, error.strerror)
        return False
    return True


_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_COMM_FD_TIMEOUT = 30.0


def mount(directory: str, *, source: str, allow_other: bool, writable: bool = False) -> int:
    """Mount on `directory`; the descriptor of the connection, on which INIT is waiting.

    `source` is what `mount` and `df` show. By mount(2) as root, by fusermount3 otherwise. Raises MountError.
    """
    if os.geteuid() == 0:
        return _mount2(directory, source=source, allow_other=allow_other, writable=writable)
    return _fusermount_mount(directory, source=source, allow_other=allow_other, writable=writable)


def _mount2(directory: str, *, source: str, allow_other: bool, writable: bool) -> int:
    descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = [f"fd={descriptor}", "rootmode=40000", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    options += ["default_permissions", *(["allow_other"] if allow_other else [])]
    flags = _MS_NOSUID | _MS_NODEV | (0 if writable else _MS_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mount(
        source.encode("utf-8", "surrogateescape"), os.fsencode(directory), FSTYPE.encode(),
        ctypes.c_ulong(flags), ",".join(options).encode(),
    )  # fmt: skip
    if done != 0:
        number = ctypes.get_errno()
        os.close(descriptor)
        hint = " (in a container, it needs --cap-add SYS_ADMIN)" if number == errno.EPERM else ""
        raise MountError(f"cannot mount on {directory}: {os.strerror(number)}{hint}")
    return descriptor


def _fusermount_mount(directory: str, *, source: str, allow_other: bool, writable: bool) -> int:
    """The descriptor comes back on a socket, as fusermount3 hands it to libfuse."""
    access = "rw" if writable else "ro"
    options = [access, "nosuid", "nodev", "default_permissions", f"subtype={FSTYPE.partition('.')[2]}"]
    # What divides options is escaped by a backslash, as libfuse does it.
    options += ["fsname=" + re.sub(r"([\\,])", r"\\\1", source), *(["allow_other"] if allow_other else [])]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            with subprocess.Popen(
                ["fusermount3", "-o", ",".join(options), "--", directory],
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=(theirs.fileno(),),
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            ) as helper:  # fmt: skip
                theirs.close()
                ours.settimeout(_COMM_FD_TIMEOUT)
                _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
                assert helper.stderr is not None
                said = helper.stderr.read().decode("utf-8", "replace").strip()
        except FileNotFoundError:
            raise MountError("fusermount3 is missing (Debian: apt install fuse3)") from None
        except TimeoutError:
            raise MountError(f"fusermount3 did not mount on {directory} in time") from None
    if not descriptors:
        raise MountError(
            f"cannot mount on {directory}: {said.replace(chr(10), '; ') or 'fusermount3 failed'}"
        )
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
