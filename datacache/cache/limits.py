"""
What a RAM tier may take: the size of its tmpfs, and the memory that our control group may use.

Files of the kernel are read below roots that tests can replace.
"""

import os
import re

_UNLIMITED = 1 << 60
"""cgroup v1 says "no limit" as a number near 2**63."""


def is_tmpfs(path: str, *, proc: str = "/proc") -> bool:
    """Whether `path`, or the nearest directory above it that exists, lies in memory."""
    device = os.stat(existing(path)).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open(f"{proc}/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == number:
                return rest.split()[0] in ("tmpfs", "ramfs")
    return False


def own_tmpfs(path: str, *, proc: str = "/proc") -> int | None:
    """Bytes of the tmpfs that is mounted on `path`; None where none is, or a part of one that lies elsewhere.

    A directory of /dev/shm that a container was given is a mount point, too, and in memory: but what is
    mounted there is not a tmpfs's root.
    """
    found, place = "", os.path.realpath(path)
    with open(f"{proc}/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, rest = line.partition(" - ")
            _, _, _, root, point = fields.split()[:5]
            if _unescaped(point) == place:  # the last one is on top
                found = root if rest.split()[0] == "tmpfs" else ""
    return file_system_size(path) if found == "/" else None


def mount_points(*, proc: str = "/proc") -> list[str]:
    """All directories on which something is mounted, in this process's name space."""
    with open(f"{proc}/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [_unescaped(line.split()[4]) for line in file]


def _unescaped(text: str) -> str:
    """A path as the kernel's table of mounts writes it: blanks and backslashes in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def existing(path: str) -> str:
    """`path`, or the nearest directory above it that exists."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def file_system_size(path: str) -> int:
    """Bytes of the file system that `path` lies on, or will."""
    st = os.statvfs(existing(path))
    return st.f_blocks * st.f_frsize


def memory_limit(*, proc: str = "/proc", groups: str = "/sys/fs/cgroup") -> int | None:
    """Bytes that this process and its control group may use; None: no limit.

    Pages of a tmpfs count as memory of the group that wrote them. A limit of any group above ours
    binds us too. Inside a container the path may not exist as seen from here: then the root of
    `groups` is our own group.
    """
    limits = []
    try:
        with open(f"{proc}/self/cgroup", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = f"{groups}/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            limit = _number("/".join([root, *parts[:depth], name]))
            if limit is not None and limit < _UNLIMITED:
                limits.append(limit)
    return min(limits, default=None)


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="utf-8") as file:
            return int(file.read())
    except (OSError, ValueError):  # no such group here; or "max"
        return None
