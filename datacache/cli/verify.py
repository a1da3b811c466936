"""
`datacache verify`: the oracle. Every block of a cache is held against its checksum.

A cache that a live worker owns is verified by that worker, while it serves; one that nobody owns is
verified here, under the lock of its directory.
"""

import argparse
import dataclasses
import os
import sys

from datacache.cli import flags, targets
from datacache.cli.tables import as_json, count, printable, share
from datacache.errors import SettingError

WRONG = ("damaged", "missing", "orphans", "overlong", "miscounted")
"""What a report counts as wrong."""
SHOWN_PROBLEMS = 20
"""Problems that are printed one by one. (A running worker writes its own into its log.)"""
EXAMPLES = """\
examples:
  datacache verify /mnt/train                   the cache of a running mount, while it serves
  datacache verify /var/cache/x --repair        a cache directory that nobody uses now

exit codes: 0 every block is what it was, or was repaired; 1 something wrong is left.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prove, or repair, a cache: read every block and hold it against its checksum."
    parser.epilog = EXAMPLES
    parser.add_argument("target", metavar="TARGET", help="mount directory, data set, or cache directory")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="drop what is damaged and what belongs to nothing (a running worker always does)",
    )
    flags.add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Verify. 1 when something wrong is left."""
    place = targets.find(args.target)
    found = place.control().verify() if place is not None else _offline(args.target, repair=args.repair)
    wrong = sum(found.get(name, 0) for name in WRONG)
    left = wrong - found.get("repaired", 0)
    if args.json:
        print(as_json({"target": args.target, **found}))
        return 1 if left > 0 else 0
    entries = count(found.get("entries", 0), "entry", "entries")
    held = f"{count(found.get('blocks', 0), 'block')} of {entries}"
    if wrong:
        kinds = ", ".join(f"{found[name]} {name}" for name in WRONG if found.get(name))
        print(f"{args.target}: {held}: {kinds}; {found.get('repaired', 0)} repaired")
    else:
        print(f"{args.target}: {held}: all as they should be")
    if left > 0:
        print("datacache: damaged blocks are never served; --repair drops them", file=sys.stderr)
    return 1 if left > 0 else 0


def _offline(directory: str, *, repair: bool) -> dict[str, int]:
    from datacache.cache.verify import verify
    from fuse import mountpoint

    if mountpoint.above(directory) is not None or not os.path.isdir(directory):
        raise SettingError("TARGET", directory, "a mount directory, a mounted data set or a cache directory")
    show = _percent if sys.stderr.isatty() else None
    report = verify(os.path.abspath(directory), repair=repair, progress=show)
    for problem in report.problems[:SHOWN_PROBLEMS]:
        print(f"  {printable(problem)}", file=sys.stderr)
    return dataclasses.asdict(report) | {"problems": len(report.problems)}  # as a running worker answers


def _percent(done: int, total: int) -> None:
    print(f"{share(done, total)} verified", end="\r", file=sys.stderr, flush=True)
