"""
`datacache snapshot`: pin the names and versions of a data set, list, compare and remove what is pinned.

A snapshot belongs to a data set and lies in its state directory. Making one lists the whole store;
nothing of the objects is fetched.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from datacache.cli import flags, targets
from datacache.cli.main import UsageError
from datacache.cli.tables import as_json, columns, count, printable, when
from datacache.clock import Clock, SystemClock
from datacache.errors import DatacacheError, MountError, SettingError
from datacache.model import format_size

if TYPE_CHECKING:
    from datacache.config.settings import Settings

ACTIONS = {"create": 1, "list": 0, "diff": 2, "rm": 1}
"""How many snapshot names follow the target."""

EXAMPLES = """\
examples:
  datacache snapshot create s3://bucket/train 2024-06-01
  datacache snapshot list s3://bucket/train
  datacache snapshot diff s3://bucket/train 2024-06-01 2024-07-01
  datacache snapshot rm s3://bucket/train 2024-06-01
  datacache mount s3://bucket/train /mnt/train --snapshot 2024-07-01

Instead of the URI: a mount directory or the name of a mounted data set; nothing with --config.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "datacache snapshot {create,list,diff,rm} [URI] [NAME ...] [FLAGS]"
    parser.description = "Pin the names and versions of a data set; a mount of a snapshot never changes."
    parser.epilog = EXAMPLES
    parser.add_argument(
        "action", metavar="ACTION", help="create URI NAME, list URI, diff URI OLD NEW, rm URI NAME"
    )
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="the data set (URI, mount or name), then names of snapshots"
    )
    flags.add_json_flag(parser)
    flags.add_dataset_flags(parser, reading=False)


def run(args: argparse.Namespace) -> int:
    """Do the one thing that was asked."""
    if args.action not in ACTIONS:
        raise UsageError(
            f"{args.action}: unknown action of `datacache snapshot`; one of {', '.join(ACTIONS)}"
        )
    uris = [word for word in args.words if "://" in word]
    names = [word for word in args.words if "://" not in word]
    mounted = names.pop(0) if not uris and len(names) == ACTIONS[args.action] + 1 else ""
    if len(names) != ACTIONS[args.action]:
        wanted = ("no snapshot name", "the name of a snapshot", "the names of two snapshots")
        given = uris or names or getattr(args, "config", None)
        of = "" if given else "the data set (URI, mount or name) and "
        raise UsageError(
            f"snapshot {args.action}: {of}{wanted[ACTIONS[args.action]]} expected, "
            f"not {' '.join(names) or 'nothing'}"
        )
    settings = _of_mounted(args, mounted) if mounted else flags.read(args, uris)
    actions: dict[str, Callable[..., int]] = {"create": _create, "list": _list, "diff": _diff, "rm": _remove}
    return actions[args.action](settings, *names, json=args.json)


def _of_mounted(args: argparse.Namespace, target: str) -> "Settings":
    """The settings of a mounted data set, as far as they matter to its snapshots."""
    from datacache.config.parsing import read_settings

    if given := flags.setting_flags(args):
        raise SettingError(f"--{next(iter(given))}", target, "a URI beside this flag")
    status = targets.place(target).control().status()
    if status["manifest"]:
        raise SettingError("TARGET", target, "no manifest: what it lists is pinned already")
    shown = {"name": status["dataset"], "state": status["state"], "mounts": status["mounts"]}
    return read_settings(shown, config_file=None, environment=os.environ)


def _create(settings: "Settings", name: str, *, json: bool) -> int:
    from datacache.index.snapshot import create_snapshot
    from datacache.worker import opened_sources

    clock = SystemClock()
    with opened_sources(settings, clock=clock) as (dataset, sources, manifest):
        info = create_snapshot(
            dataset, sources, state=settings.state, name=name, clock=clock, manifest=manifest,
            progress=None if json else counting(clock),
        )  # fmt: skip
    if json:
        print(as_json(dataclasses.asdict(info)))
    else:
        print(f"{dataset.name}: snapshot {name} of {count(info.files, 'file')}, {format_size(info.bytes)}")
    return 0


def counting(clock: Clock) -> Callable[[int], None]:
    """A progress line: in place on a terminal twice a second, else every five seconds."""
    live = sys.stderr.isatty()
    every = 0.5 if live else 5.0
    last = clock.monotonic()

    def show(listed: int) -> None:
        nonlocal last
        if clock.monotonic() - last >= every:
            last = clock.monotonic()
            print(f"{count(listed, 'file')} listed", end="\r" if live else "\n", file=sys.stderr, flush=True)

    return show


def _list(settings: "Settings", *, json: bool) -> int:
    from datacache.index.snapshot import list_snapshots

    found = list_snapshots(settings.state)
    if json:
        print(as_json([dataclasses.asdict(info) for info in found]))
    elif not found:
        print(f"{settings.dataset.name}: no snapshots")
    else:
        rows = [["NAME", "FILES", "SIZE", "CREATED"]]
        rows += [
            [printable(i.name), str(i.files), format_size(i.bytes), when(int(i.created * 1e9))] for i in found
        ]
        print("\n".join(columns(rows, right=(1, 2))))
    return 0


def _diff(settings: "Settings", old: str, new: str, *, json: bool) -> int:
    from datacache.index.snapshot import diff_snapshots

    signs = {"added": "+", "removed": "-", "changed": "~"}
    for change in diff_snapshots(settings.state, old, new):
        if json:
            print(as_json(dataclasses.asdict(change)))
        else:
            print(f"{signs[change.kind]} {printable(change.path)}")
    return 0


def _mounted(settings: "Settings", name: str) -> str:
    """Where the snapshot is mounted; empty where no mount that answers shows it."""
    for worker in targets.live():
        if not worker.mount or worker.dataset != settings.dataset.name:
            continue
        with contextlib.suppress(DatacacheError):
            status = targets.Place(worker, "/").control().status()
            if (status.get("state"), status.get("snapshot")) == (settings.state, name):
                return worker.mount
    return ""


def _remove(settings: "Settings", name: str, *, json: bool) -> int:
    from datacache.index.snapshot import remove_snapshot

    if mount := _mounted(settings, name):
        # A daemon that dies, or is upgraded, opens it again.
        raise MountError(f"snapshot {name} is mounted at {mount}; `datacache umount {mount}` first")
    remove_snapshot(settings.state, name)
    if json:
        print(as_json({"removed": name}))
    else:
        print(f"{settings.dataset.name}: snapshot {name} removed; what is cached of it stays")
    return 0
