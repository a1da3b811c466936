"""`datacache flush`: return when what was written is in the bucket."""

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datacache.cli import flags, targets
from datacache.cli.progress import told
from datacache.cli.tables import as_json, count, printable
from datacache.clock import Clock, SystemClock
from datacache.errors import SettingError
from datacache.model import format_size, parse_duration

if TYPE_CHECKING:
    from datacache.cluster.control import Control

ONE_WAIT = 1.0
"""Seconds that the worker waits for one answer: how often progress is shown."""

DECIDE = "`mv` the file to another name, remove it, or mount with another --conflict (docs/writing.md)"
SAID = 3
"""Reasons that are said at most."""
_WAITS = ("under way", "waits for its turn", "waits for what was closed before")

EXAMPLES = """\
examples:
  datacache flush /mnt/results             all that was closed there
  datacache flush /mnt/results/epoch-7 --timeout 10m

exit codes: 0 it is in the bucket; 1 it is not (yet), or waits for a person; what is left is said.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Wait until all that was closed in a mount, or below a path of it, is in the bucket."
    parser.epilog = EXAMPLES
    parser.add_argument("path", metavar="PATH", help="a path in a mount, or NAME:/path of a mounted data set")
    parser.add_argument("--timeout", metavar="DURATION", default="inf", help="give up then; default inf")
    flags.add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Flush, and say what is left."""
    timeout = parse_duration(args.timeout, name="--timeout")
    if timeout < 0:
        raise SettingError("--timeout", args.timeout, "a duration")
    place = targets.place(args.path)
    answer = wait(place.control(), place.path, timeout=timeout, quiet=args.json)
    if args.json:
        print(as_json({"path": args.path, **answer}))
    else:
        print(f"{args.path}: {said(answer)}")
    return 0 if answer["clean"] else 1


def wait(
    control: "Control", path: str, *, timeout: float, quiet: bool = False, clock: Clock | None = None
) -> Mapping[str, Any]:
    """Ask a worker again and again until it is clean, or waits for a person, for `timeout` seconds at most;
    its last answer. Who interrupts it is told what is left."""
    clock = clock or SystemClock()
    deadline = clock.monotonic() + timeout
    answer: Mapping[str, Any] = {}
    try:
        with told(quiet=quiet, clock=clock) as show:
            while True:
                left = max(0.0, deadline - clock.monotonic())
                answer = control.flush(path, timeout=min(ONE_WAIT, left))
                if answer["clean"] or answer["stuck"] or left <= 0:
                    return answer
                show(going(answer))
    except KeyboardInterrupt:
        if answer:
            print(f"interrupted: {said(answer)}", file=sys.stderr)
        raise


def going(answer: Mapping[str, Any]) -> str:
    """How it goes, and what keeps it, in one line."""
    return f"{_left(answer)} ({format_size(answer['bytes'])}) to go{_why(answer)}"


def said(answer: Mapping[str, Any]) -> str:
    """What came of it, in one line."""
    if answer["clean"]:
        return "all that was closed is in the bucket" + _open(answer)
    one = answer["pending"] == 1
    if answer["stuck"]:
        waits = f"{_left(answer)} {'waits' if one else 'wait'} for a person"
        return f"{waits}{_open(answer)}{_why(answer)}; {DECIDE}"
    return f"{_left(answer)} {'is' if one else 'are'} not done yet{_open(answer)}{_why(answer)}"


def _left(answer: Mapping[str, Any]) -> str:
    return count(answer["pending"], "operation")


def _open(answer: Mapping[str, Any]) -> str:
    verb = "is" if answer["open"] == 1 else "are"
    return f"; {count(answer['open'], 'file')} {verb} open for writing" if answer["open"] else ""


def _why(answer: Mapping[str, Any]) -> str:
    """The first few reasons; of a mere wait there is nothing to say."""
    why = [printable(reason) for reason in answer.get("errors", []) if not reason.endswith(_WAITS)]
    return f": {'; '.join(why[:SAID])}" if why else ""
