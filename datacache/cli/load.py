"""
`datacache load`: bring a data set into the cache before it is read.

On a mounted data set the mount's worker does it. On a URI this process is the worker for as long as
it takes; when another process owns the cache directory, that one is asked instead, if it serves the
same data set. What was asked is remembered until it is done, for --resume.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datacache.cli import flags, targets
from datacache.cli.progress import follow, line
from datacache.cli.tables import as_json, count, printable
from datacache.errors import Locked, SettingError
from datacache.model import format_size, parse_duration, parse_size
from datacache.reading.job import LoadRequest, LoadStatus

if TYPE_CHECKING:
    from datacache.cluster.control import Control

SHOWN_FAILURES = 20
"""Failures that are printed one by one; --json has them all (the first 1,000)."""

_LAST_FETCHES = 3.0
"""Seconds that an interrupted load waits for fetches under way. A store that stalls can take --timeout for
them: a mount then ends them by itself, and where there is none they are given up."""
_FOREVER = 10 * 365 * 86400
"""Seconds that stand for `inf`, which JSON has no word for."""

EXAMPLES = """\
examples:
  datacache load /mnt/train                         all of it, into the cache of the mount
  datacache load /mnt/train --path 'img/**/*.jpg' --bandwidth 200MiB
  datacache load s3://bucket/train --cache ssd:/var/cache/x=200GiB
  datacache load /mnt/train --order epoch1.txt      fetch ahead of who reads in this order
  datacache load /mnt/train --resume                go on where Ctrl-C or a failure ended it

exit codes: 0 all of it is cached; 1 some files failed, or no file matches --path; 2 wrong input;
130 interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "datacache load TARGET [FLAGS]"
    parser.description = "Bring a data set into the cache. What is cached already is skipped."
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("target", nargs="?", default="", metavar="TARGET",
        help="a mount directory or a path in it, a mounted data set, or a URI")  # fmt: skip
    add("--path", metavar="GLOB", action="append", default=[],
        help="only files whose path below TARGET matches; ** crosses directories; repeatable")  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--files-from", metavar="FILE",
        help="exactly the paths in FILE, one a line (or ended by NUL), below TARGET; - is standard input",
    )  # fmt: skip
    which.add_argument(
        "--order", metavar="FILE",
        help="the paths in FILE will be read in this order: the mount fetches ahead of who reads",
    )  # fmt: skip
    add("--tier", metavar="TIER", default="",
        help="fill this tier: mem, ssd or its name; default: as placement decides")  # fmt: skip
    add("--bandwidth", metavar="SIZE", help="bytes per second at most, e.g. 100MiB; default: no limit")
    add(
        "--concurrency",
        metavar="N",
        dest="objects",
        help="objects under way at most; default: as the worker reads",
    )
    add("--outage-timeout", metavar="DURATION",
        help="how long to wait for a store that stops answering; 0: not at all; default: 30m")  # fmt: skip
    add("--resume", action="store_true", help="do what the last unfinished load of TARGET was to do")
    add(
        "--verify",
        action="store_true",
        help="hold what is cached against its checksums, fetch again what is bad",
    )
    flags.add_json_flag(parser)
    flags.add_dataset_flags(parser, reading=False)


def run(args: argparse.Namespace) -> int:
    """Load. 0 when all is cached, 1 when some files failed or there were none to match."""
    name = args.target or vars(args).get("config", "")
    if not name:
        raise SettingError("TARGET", "", "a mount directory, a mounted data set or a URI")
    memory = Memory(name)
    request = _request(args)
    if args.resume:
        before = memory.recall()
        if request not in (LoadRequest(), before):
            raise SettingError("--resume", "a selection", "--resume alone: it repeats what was asked before")
        request = before
    with _worker(args) as (control, below):
        job = control.load(_below(request, below, args.target))
        memory.keep(request)
        try:
            status = follow(control, job, quiet=args.json)
        except KeyboardInterrupt:
            control.load_cancel(job)
            status = follow(control, job, quiet=True, patience=_LAST_FETCHES)
            print(
                f"datacache: interrupted after {line(status)}; what is cached stays; "
                f"`{_again(args)}` goes on",
                file=sys.stderr,
            )
            raise
    if status.state == "done":
        memory.forget()
    if args.json:
        _report_json(name, status)
    else:
        _report(name, request, status, again=_again(args))
    if request.globs and status.state == "done" and not status.files:
        print(f"datacache: no file matches --path {' '.join(map(printable, request.globs))}", file=sys.stderr)
        return 1
    return 0 if status.state == "done" else 1


def _again(args: argparse.Namespace) -> str:
    """What to type to go on: the same cache and store, and --resume for the rest."""
    words = ["datacache", "load", *filter(None, [args.target])]
    for name, value in flags.setting_flags(args).items():
        for each in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if each is True else [f"--{name}", str(each)]
    return shlex.join([*words, "--resume"])


class Memory:
    """The request of a load that is not done yet, by target, in the state directory."""

    def __init__(self, target: str) -> None:
        self._target = target if "://" in target else os.path.abspath(target)
        name = hashlib.sha256(os.fsencode(self._target)).hexdigest()[:16]
        self._path = Path(targets.state()) / "loads" / f"{name}.json"

    def keep(self, request: LoadRequest) -> None:
        """Remember `request`. A full disk is no reason not to load."""
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = self._path.with_suffix(f".{os.getpid()}")
            new.write_text(as_json(dataclasses.asdict(request)), encoding="ascii")
            new.replace(self._path)

    def recall(self) -> LoadRequest:
        """What was to be done. Raises SettingError when nothing is remembered."""
        try:
            known = json.loads(self._path.read_text(encoding="ascii"))
            files = known.pop("files")
            return LoadRequest(
                **{**known, "globs": tuple(known["globs"])}, files=None if files is None else tuple(files)
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError(
                "--resume", self._target, "a target whose last load was interrupted"
            ) from error

    def forget(self) -> None:
        """It is done."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _request(args: argparse.Namespace) -> LoadRequest:
    concurrency = 0
    if args.objects is not None:
        if not args.objects.isascii() or not args.objects.isdigit() or int(args.objects) < 1:
            raise SettingError("--concurrency", args.objects, "a number of objects, at least 1")
        concurrency = int(args.objects)
    bandwidth = 0
    if args.bandwidth is not None:
        bandwidth = parse_size(args.bandwidth, name="--bandwidth")
        if not bandwidth:
            raise SettingError("--bandwidth", args.bandwidth, "more than nothing; leave it out for no limit")
    patience = LoadRequest.outage_timeout
    if args.outage_timeout is not None:
        patience = math.ceil(min(parse_duration(args.outage_timeout, name="--outage-timeout"), _FOREVER))
    files = None
    for flag, file in (("--files-from", args.files_from), ("--order", args.order)):
        if file is not None:
            if args.path:
                raise SettingError("--path", args.path[0], f"either --path or {flag}")
            files = _read_list(flag, file)
    if args.order is not None:
        for flag in ("tier", "bandwidth", "objects", "verify", "outage_timeout"):
            if getattr(args, flag):
                named = "--concurrency" if flag == "objects" else f"--{flag.replace('_', '-')}"
                raise SettingError(
                    named, getattr(args, flag), "either it or --order, which loads nothing itself"
                )
    return LoadRequest(
        globs=tuple(args.path),
        files=files,
        order=args.order is not None,
        tier=args.tier,
        bandwidth=bandwidth,
        concurrency=concurrency,
        verify=args.verify,
        outage_timeout=patience,
    )


def _read_list(flag: str, file: str) -> tuple[str, ...]:
    """The paths in `file`, one a line or, where it has any, ended by NUL. Any byte is allowed in a path."""
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise SettingError(flag, file, f"a file of paths ({error.strerror})") from error
    names = raw.split(b"\0") if b"\0" in raw else raw.splitlines()
    return tuple(name.decode("utf-8", "surrogateescape") for name in names if name)


def _below(request: LoadRequest, path: str, target: str) -> LoadRequest:
    """`request`, made for TARGET, as one of the data set, where TARGET is `path`.

    Files may be listed relative to TARGET or as they are called under the mount.
    """
    if request.files is None:
        return dataclasses.replace(request, path=path)
    above = os.path.abspath(target)
    files = [targets.relative_to(above, name) or name for name in request.files]
    return dataclasses.replace(request, files=tuple(targets.normal(f"{path}/{name}") for name in files))


@contextmanager
def _worker(args: argparse.Namespace) -> Iterator[tuple["Control", str]]:
    """Who does it, and the path of the data set that TARGET stands for."""
    given = flags.setting_flags(args)
    place = targets.find(args.target) if args.target and not given else None
    if place is not None:
        yield place.control(), place.path
        return
    if args.target and "://" not in args.target:
        if given:
            raise SettingError(f"--{next(iter(given))}", args.target, "a URI as TARGET beside this flag")
        raise SettingError("TARGET", args.target, "a mount directory, a mounted data set or a URI")
    if args.order is not None:
        raise SettingError("--order", args.target, "a mount: there is no reader to fetch ahead of")
    settings = flags.read(args, [args.target] if args.target else [])
    from datacache.worker import Worker

    try:
        # A mount of the same data set may have named versions to its kernel that this must not forget.
        worker = Worker(settings, resumed=True)
    except Locked as locked:
        owner = targets.find(locked.directory)
        if owner is None or owner.worker.dataset != settings.dataset.name:
            raise
        yield owner.control(), "/"
        return
    with worker:
        yield worker, "/"


def _report_json(name: str, status: LoadStatus) -> None:
    result: dict[str, Any] = {"target": name, **dataclasses.asdict(status)}
    result["failures"] = [{"path": path, "reason": reason} for path, reason in status.failures]
    print(as_json(result))


def _report(name: str, request: LoadRequest, status: LoadStatus, *, again: str) -> None:
    if request.order and status.state == "done":
        print(f"{name}: order of {count(status.files, 'file')} announced")
        return
    skipped = f" ({status.files_skipped} were before)" if status.files_skipped else ""
    bad = f", {status.verified_bad} damaged blocks fetched again" if request.verify else ""
    print(
        f"{name}: {status.files_done} of {count(status.files, 'file')} cached{skipped}, "
        f"{format_size(status.bytes_fetched)} fetched in {status.seconds:.1f} s{bad}"
    )
    for path, reason in status.failures[:SHOWN_FAILURES]:
        print(f"  {printable(path)}: {printable(reason)}", file=sys.stderr)
    if status.files_failed > SHOWN_FAILURES:
        print(f"  and {status.files_failed - SHOWN_FAILURES} more; --json names them", file=sys.stderr)
    if status.files_failed:
        print(
            f"datacache: {count(status.files_failed, 'file')} failed; `{again}` tries them again",
            file=sys.stderr,
        )
