"""
`datacache umount`: unmount, and return when the daemon has ended and let go of its cache.

Done already is done: a directory where nothing is mounted is no error, so that scripts and service
managers may ask twice.
"""

import argparse
import os
import select
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from datacache.errors import ControlError, MountError, SettingError
from datacache.model import format_size

if TYPE_CHECKING:
    from datacache.cluster.registry import Registration

END_TIMEOUT = 30.0
"""Seconds in which a daemon without a mount must have ended: it abandons its fetches and closes its cache."""
FORCE_TIMEOUT = 3.0
"""The same with --force, before it is killed. Its cache survives that."""

SAID_AFTER = 2.0
"""Seconds after which it is said what is waited for."""

ASK_TIMEOUT = 10.0
"""Seconds for a worker to say what is not in the bucket yet."""

EXAMPLES = """\
examples:
  datacache umount /mnt/train
  datacache umount /mnt/results --drain   first upload what was written
  datacache umount /mnt/train --lazy      detach now; the daemon ends with the last open file
  datacache umount /mnt/train --force     abort what is being read, end a daemon that hangs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Unmount, and wait for the daemon to end. Nothing mounted there is no error."
    parser.epilog = EXAMPLES
    parser.add_argument("target", metavar="DIR", help="where it is mounted, or the name of the data set")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--lazy", action="store_true", help="detach now and return; who has files open may go on reading them"
    )
    how.add_argument(
        "--drain", action="store_true", help="first wait until what was written is in the bucket"
    )
    how.add_argument(
        "--leave", action="store_true",
        help="leave what is not in the bucket yet in the landing zone: the next mount uploads it",
    )  # fmt: skip
    how.add_argument(
        "--force", action="store_true", help="abort the reads under way, and kill a daemon that does not end"
    )


def run(args: argparse.Namespace) -> int:
    """Unmount. 0 when nothing of it is left (with --lazy: when it is detached)."""
    from fuse import mountpoint

    info = mountpoint.is_mounted(args.target)
    worker = _worker(args.target, info.directory if info is not None else "")
    directory = worker.mount if worker is not None else os.path.abspath(args.target)
    if worker is None and info is None:
        # What lies in a mount may hang, and nothing is mounted in there.
        if mountpoint.above(args.target) is None and not os.path.isdir(directory):
            raise SettingError("DIR", args.target, "a directory, or the name of a mounted data set")
        print(f"{directory}: nothing of datacache is mounted there")
        return 0
    if mountpoint.clean_stale(directory):
        return 0
    left = ""
    if worker is not None and not (args.leave or args.lazy or args.force):
        _settle(worker, directory, drain=args.drain)
    elif worker is not None:
        left = _left(worker, patience=FORCE_TIMEOUT if args.force else ASK_TIMEOUT)
    # Opened before the unmount: afterwards the number may belong to another process.
    daemon = _process(worker.pid) if worker is not None else -1
    try:
        if mountpoint.is_mounted(directory) is not None:  # else it is on its way out already
            mountpoint.unmount(directory, lazy=args.lazy, force=args.force)
        if args.lazy:
            print(f"{directory}: detached; its daemon ends when the last open file is closed{left}")
            return 0
        if worker is not None:
            _wait_for(daemon, worker, directory, info.device if info is not None else "", force=args.force)
    finally:
        if daemon >= 0:
            os.close(daemon)
    print(f"{directory}: unmounted{left}")
    return 0


def _settle(worker: "Registration", directory: str, *, drain: bool) -> None:
    """See to it that nothing is written there that the bucket does not have. Raises MountError."""
    from datacache.cli import flush, targets
    from datacache.cli.tables import count

    writing = _written(worker)
    if not writing:
        return
    if drain:
        control = targets.Place(worker, "/").control(timeout=ASK_TIMEOUT)
        answer = flush.wait(control, "/", timeout=float("inf"))
        if answer["stuck"]:
            raise MountError(
                f"{directory}: {flush.said(answer)}; --leave unmounts, and leaves it in the landing zone"
            )
        if answer["open"]:
            raise MountError(
                f"{directory}: {count(answer['open'], 'file')} open for writing, so not in the bucket; close "
                "what writes there (`lsof`), or --leave: the next mount with this landing zone uploads it"
            )
    elif writing["dirty_due"] or writing["dirty_files"]:
        raise MountError(
            f"{directory}: {_amount(writing)}; --drain waits for that, "
            "--leave unmounts now, and the next mount with this landing zone uploads it"
        )


def _written(worker: "Registration", *, patience: float = ASK_TIMEOUT) -> Mapping[str, Any] | None:
    """What `status` says of writes; None where nothing can be written, or it does not answer: what it wrote
    is durable, and nothing is won by waiting."""
    from datacache.cli import targets

    try:
        return targets.Place(worker, "/").control(timeout=patience).status().get("writing")
    except ControlError:
        return None


def _amount(writing: Mapping[str, Any]) -> str:
    from datacache.cli.tables import count

    files, size = count(writing["dirty_files"], "file"), format_size(writing["dirty_bytes"])
    parts = [f"{files} ({size}) not in the bucket yet"]
    if writing["dirty_open"]:
        parts.append(f"{writing['dirty_open']} open for writing")
    if writing["dirty_due"]:
        parts.append(f"{count(writing['dirty_due'], 'operation')} due")
    return ", ".join(parts)


def _left(worker: "Registration", *, patience: float = ASK_TIMEOUT) -> str:
    """What stays in the landing zone of a mount that goes without a look at that."""
    writing = _written(worker, patience=patience)
    if not writing or not (writing["dirty_due"] or writing["dirty_files"]):
        return ""
    landing = writing["landing"]
    return (
        f"; {_amount(writing)}: it stays in {landing}, and the next mount with that, "
        f"or `datacache recover {landing}`, uploads it"
    )


def _worker(target: str, mounted: str) -> "Registration | None":
    """The live worker whose mount, or data set, `target` names."""
    from datacache.cli import targets

    for worker in reversed(targets.live()):  # what was mounted last hides what is below it
        if worker.mount and (
            worker.mount in (mounted, os.path.abspath(target)) or (not mounted and worker.dataset == target)
        ):
            return worker
    return None


def _process(pid: int) -> int:
    """A descriptor of the process, or -1 when it is gone."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _wait_for(process: int, worker: "Registration", directory: str, device: str, *, force: bool) -> None:
    """Return when the process has ended. Raises MountError when it does not in time."""
    from fuse import mountpoint

    pid = worker.pid
    if process < 0 or _ended(process, min(SAID_AFTER, FORCE_TIMEOUT if force else END_TIMEOUT)):
        return
    holder = mountpoint.elsewhere(device) if device else ""
    has = f"{holder} still has it in another mount name space"
    if not force:
        why = f": {has}" if holder else ""
        print(f"{directory}: unmounted; waiting for its daemon (process {pid}) to end{why}", file=sys.stderr)
    if _ended(process, max(0.0, (FORCE_TIMEOUT if force else END_TIMEOUT) - SAID_AFTER)):
        return
    if not force and holder and (holder := mountpoint.elsewhere(device)):
        raise MountError(
            f"unmounted here, but {has}: the daemon (process {pid}) serves it until that ends; "
            "--force takes it away"
        )
    if force:
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == pid:  # a broker and its daemon, which may be what hangs
                os.killpg(pid, signal.SIGKILL)
            signal.pidfd_send_signal(process, signal.SIGKILL)
        if _ended(process, END_TIMEOUT):
            return
    raise MountError(f"unmounted, but the daemon (process {pid}) has not ended; `kill -9 {pid}` ends it")


def _ended(process: int, seconds: float) -> bool:
    return bool(select.select([process], [], [], seconds)[0])
