"""
`datacache status`: how mounts and their caches are doing.

The figures are the worker's own (`Control.status`); this prints them. A mount that does not answer
is a line, not the end: the others are shown.
"""

import argparse
import shlex
import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from datacache.cli import flags, targets
from datacache.cli.tables import as_json, columns, count, printable, share, span, when
from datacache.clock import Clock, SystemClock
from datacache.errors import DatacacheError, SettingError
from datacache.model import format_size, parse_duration

if TYPE_CHECKING:
    from datacache.cluster.registry import Registration
    from fuse.mountpoint import MountInfo

ANSWER_TIMEOUT = 10.0
"""Seconds for a worker to say how it is. It asks no store for that."""
_SCRIPTS_ONLY = ("mounts", "settings")
"""What --json has and nobody reads twice: `sources` names the stores; or is there to be looked up."""
_TOLD = ("dataset", "mount", "pid", "tiers", "writing")
"""What has lines of its own."""
_SHOWN = 5
"""Uploads under way that are named."""
_EMPTY: tuple[object, ...] = ({}, [], "", None)

EXAMPLES = """\
examples:
  datacache status                 every mount of this machine, a block each
  datacache status /mnt/train --watch
  datacache status --json | jq '.mounts[].dataset'

exit codes: 0 they answer; 1 one does not, is stale, or is not there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Bytes, files, hit ratios and errors of running mounts and their tiers."
    parser.epilog = EXAMPLES
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help="mount directory, data set or URI; default: all"
    )
    parser.add_argument("--watch", action="store_true", help="show it again and again, until Ctrl-C")
    parser.add_argument(
        "--interval", metavar="DURATION", default="2s", help="how often with --watch; default 2s"
    )
    flags.add_json_flag(parser)


def run(args: argparse.Namespace, *, clock: Clock | None = None) -> int:
    """Print how it is. 1 when a mount does not answer."""
    clock = clock or SystemClock()
    interval = parse_duration(args.interval, name="--interval")
    if not 0.1 <= interval < float("inf"):
        raise SettingError("--interval", args.interval, "0.1s or more")
    while True:
        code = _once(args.target, json=args.json, clear=args.watch and not args.json and sys.stdout.isatty())
        if not args.watch:
            return code
        sys.stdout.flush()
        clock.sleep(interval)


def _once(target: str | None, *, json: bool, clear: bool) -> int:
    if target is None:
        workers = targets.live()
        found = [_ask(worker) for worker in workers] + _left_behind({worker.mount for worker in workers})
    elif (place := targets.find(target)) is None and (stale := _left_at(target)) is not None:
        found = [stale]
    else:
        found = [_ask((place or targets.place(target)).worker)]
    if json:
        print(as_json(found[0] if target else {"mounts": found}))
    else:
        text = "\n\n".join("\n".join(describe(status)) for status in found) or "nothing is mounted"
        # Home and clear to the end, not clear and home: the screen does not flicker.
        print(f"\x1b[H\x1b[J{text}" if clear else text)
    return 1 if any("error" in status for status in found) else 0


def _ask(worker: "Registration") -> dict[str, Any]:
    known = {"dataset": worker.dataset, "mount": worker.mount, "pid": worker.pid}
    try:
        return known | targets.Place(worker, "/").control(timeout=ANSWER_TIMEOUT).status()
    except DatacacheError as error:
        return known | {"error": str(error)}


def _left_behind(served: Collection[str]) -> list[dict[str, Any]]:
    """Mounts whose daemon is gone, so that no worker speaks for them."""
    from fuse import mountpoint

    return [_stale(mount) for mount in mountpoint.left_behind(served)]


def _left_at(target: str) -> dict[str, Any] | None:
    from fuse import mountpoint

    mount = mountpoint.is_mounted(target)
    return _stale(mount) if mount is not None and mountpoint.is_stale(target) else None


def _stale(mount: "MountInfo") -> dict[str, Any]:
    error = (
        f"stale: the process that served it is gone; `datacache umount {shlex.quote(mount.directory)}` "
        "takes it off, and so does the next `datacache mount` there"
    )
    return {"dataset": mount.source, "mount": mount.directory, "pid": None, "stale": True, "error": error}


def describe(status: Mapping[str, Any]) -> list[str]:
    """One mount's status as lines: what it is, its tiers, then every other group of figures."""
    if status.get("stale"):
        return [f"{status['dataset']} at {status['mount']}", f"  {status['error']}"]
    lines = [f"{status['dataset']} at {status['mount'] or '(no mount)'}, process {status['pid']}"]
    if "error" in status:
        return [*lines, f"  does not answer: {status['error']}"]
    rows = [["TIER", "STATE", "USED", "QUOTA", "FULL", "FILES", "EVICTED", "DAMAGED"]]
    reasons = []
    for tier in status.get("tiers", []):
        used, quota = tier["used"], tier["quota"]
        rows.append(
            [
                tier["name"], tier["state"], format_size(used), format_size(quota), share(used, quota),
                str(tier["entries"]), str(tier["evicted"]), str(tier["damaged"]),
            ]
        )  # fmt: skip
        if tier.get("reason"):
            reasons.append(f"{tier['name']}: {tier['reason']}")
        if tier.get("lease") is not None:
            reasons.append(f"{tier['name']}: the node lends it {format_size(tier['lease'])} of its quota")
    lines += [f"  {line}" for line in [*columns(rows, right=range(2, 8)), *reasons]]
    lines += [f"  {line}" for line in _written(status.get("writing", {}))]
    for name, value in status.items():
        if name not in (*_TOLD, *_SCRIPTS_ONLY) and value not in _EMPTY:
            lines.append(f"  {name}: {_short(name, value)}")
    return lines


def _written(writing: Mapping[str, Any]) -> list[str]:
    """What was written and is not in the bucket yet, and why; nothing of a mount that is only read."""
    if not writing:
        return []
    from datacache.writing.reasons import Reason, grouped, noun

    uploads = writing["uploads"]
    lines = [f"written: {_dirty(writing, uploads)}"]
    for one in uploads["running"][:_SHOWN]:
        so_far = f"{format_size(one['sent'])} of {format_size(one['size'])}, {span(one['seconds'])}"
        lines.append(f"  under way: {noun(one['what'])} of {printable(one['key'])} ({so_far})")
    if len(uploads["running"]) > _SHOWN:
        lines.append(f"  under way: {len(uploads['running']) - _SHOWN} more")
    reasons = [Reason(one["what"], one["key"], one["why"]) for one in uploads["failing"]]
    failing = grouped(reasons, known=uploads["away"])
    lines += [f"  does not get through: {printable(one)}" for one in uploads["away"]]
    lines += [f"  failing: {printable(one)}" for one in failing]
    lines += [f"  waits for a person: {printable(one)}" for one in writing["parked"]]
    free, total = format_size(writing["landing_free_bytes"]), format_size(writing["landing_total_bytes"])
    short = "; short of room, so uploads wait for no delay" if writing["short_of_room"] else ""
    lines.append(f"  landing zone: {writing['landing']}, room for {free} of {total}{short}")
    done = [
        f"{count(uploads['uploads'], 'upload')} ({format_size(uploads['bytes'])})",
        count(uploads["copies"], "copy", "copies"),
        count(uploads["deletes"], "delete"),
        count(uploads["failures"], "failed attempt"),
        count(writing["dirty_conflicts"], "conflict"),
    ]
    if uploads["unverified"]:
        done.append(f"{uploads['unverified']} of which only the size was compared")
    lines.append(f"  since it started: {', '.join(done)}")
    return lines


def _dirty(writing: Mapping[str, Any], uploads: Mapping[str, Any]) -> str:
    if not (writing["dirty_files"] or writing["dirty_due"]):
        return "all of it is in the bucket"
    files, size = count(writing["dirty_files"], "file"), format_size(writing["dirty_bytes"])
    parts = [f"{files} ({size}) not in the bucket yet"]
    if writing["dirty_open"]:
        parts.append(f"{writing['dirty_open']} open for writing")
    if uploads["refused"]:
        parts.append(f"{uploads['refused']} closed, but somebody can write to them still")
    if writing["dirty_unnoted"]:
        parts.append(f"{writing['dirty_unnoted']} closed, which cannot be noted on a full disk")
    due = f"{count(uploads['pending'], 'operation')} due"
    parts.append(f"{due}, the oldest for {span(uploads['oldest'])}" if uploads["pending"] else due)
    return ", ".join(parts)


def _short(name: str, value: Any) -> str:
    """A figure, or a group of them on one line, as people write it; its name says of what kind it is."""
    if isinstance(value, Mapping):
        parts = {key: part for key, part in value.items() if part not in _EMPTY and key not in _SCRIPTS_ONLY}
        return ", ".join(f"{key} {_short(key, part)}" for key, part in parts.items())
    if isinstance(value, list):
        return "; ".join(_short(name, part) for part in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and name == "started":
        return when(int(value * 1e9))
    if number and "ratio" in name:
        return f"{value:.1%}"
    if number and ("bytes" in name or name.startswith("memory")):
        return format_size(value)
    if number and name.endswith(("uptime", "seconds", "oldest")):
        return span(value)
    return printable(f"{value:g}" if isinstance(value, float) else str(value))
