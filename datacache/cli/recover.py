"""
`datacache recover`: upload what a landing zone still holds, without a mount.

For the landing zone of a node that is gone: whose disk was put into another one, or whose mount is
not to be started again. A mount that is started again with the same landing zone does it by itself.
"""

import argparse
import os
import tempfile
from dataclasses import replace

from datacache.cli import flags
from datacache.cli.flush import said, wait
from datacache.cli.tables import as_json, count
from datacache.config.settings import Conflict
from datacache.errors import SettingError
from datacache.model import parse_duration

EXAMPLES = """\
examples:
  datacache recover /mnt/old-disk/landing
  datacache recover /mnt/old-disk/landing --timeout 1h --json

exit codes: 0 all of it is in the bucket; 1 it is not (yet); nothing is removed that is not there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Upload what a landing zone still holds. No mount may use it."
    parser.epilog = EXAMPLES
    parser.add_argument("directory", metavar="DIR", help="the landing zone (--landing of the mount)")
    parser.add_argument("--timeout", metavar="DURATION", default="inf", help="give up then; default inf")
    parser.add_argument(
        "--conflict", metavar="HOW", default=Conflict.KEEP_BOTH,
        help="somebody else has changed an object: keep-both (ours beside it, the default), overwrite, fail",
    )  # fmt: skip
    flags.add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Recover, and say what is left."""
    from datacache.config.parsing import read_settings
    from datacache.worker import Worker
    from datacache.writing.landing import MANAGED
    from datacache.writing.opening import owed

    timeout = parse_duration(args.timeout, name="--timeout")
    directory = os.path.abspath(args.directory)
    if os.path.basename(directory) == MANAGED:
        directory = os.path.dirname(directory)
    if not os.path.isdir(directory):
        raise SettingError("DIR", args.directory, "a directory")
    dataset = owed(directory)
    with tempfile.TemporaryDirectory(prefix="datacache-recover-") as place:
        given = {
            "uri": [f"{point.uri}={point.path}" for point in dataset.mounts], "rw": True,
            "landing": directory, "state": f"{place}/state", "cache": [f"ssd:{place}/cache=1MiB"],
            "conflict": args.conflict,
        }  # fmt: skip
        settings = read_settings(given, config_file=None, environment=os.environ)
        with Worker(replace(settings, dataset=dataset)) as worker:
            answer = wait(worker, "/", timeout=timeout, quiet=args.json)
            conflicts = worker.status()["writing"]["dirty_conflicts"]
    if args.json:
        found = {"directory": directory, "dataset": dataset.name, "conflicts": conflicts}
        print(as_json({**found, **answer}))
    else:
        met = f"; {count(conflicts, 'conflict')} ({args.conflict})" if conflicts else ""
        print(f"{directory}: {said(answer)}{met}")
    return 0 if answer["clean"] else 1
