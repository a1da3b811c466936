"""
Imported by every Python process that has this directory in PYTHONPATH: lets a daemon die at a named step of
the write path.

$DATACACHE_DIE names a file that says which: "NAME NTH HOW". Who comes to it takes the file away, so that only
one dies of it; HOW is `alone`, or `all` where the broker dies, too.
"""

import os
import signal

from datacache.writing import steps

_counted: dict[str, int] = {}


def _die(where: str, name: str) -> None:
    try:
        with open(where, encoding="ascii") as file:
            wanted, nth, how = file.read().split()
    except (FileNotFoundError, ValueError):
        return
    if name != wanted:
        return
    _counted[name] = _counted.get(name, 0) + 1
    if _counted[name] < int(nth):
        return
    try:
        os.unlink(where)
    except FileNotFoundError:
        return  # another thread is faster
    if how == "all":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if "DATACACHE_DIE" in os.environ:
    _where = os.environ["DATACACHE_DIE"]
    steps.arm(lambda name: _die(_where, name))
