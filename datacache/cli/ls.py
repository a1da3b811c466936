"""`datacache ls` and `datacache stat`: paths of a mounted data set, and what of them is cached where."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from datacache.cli import flags, targets
from datacache.cli.tables import as_json, columns, printable, share, when
from datacache.model import format_size

if TYPE_CHECKING:
    from datacache.cluster.control import CachedPath, Control

EXAMPLES = {
    "ls": """\
examples:
  datacache ls /mnt/train/img
  datacache ls -l imagenet:/train
  datacache ls --json /mnt/train | jq -r 'select(.cached == {}) | .path'
""",
    "stat": """\
examples:
  datacache stat /mnt/train/img/0001.jpg
  datacache stat --json imagenet:/train/0001.jpg
""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    name = parser.prog.split()[-1]
    parser.epilog = EXAMPLES[name]
    parser.add_argument("path", metavar="PATH", help="a path in a mount, or NAME:/path of a mounted data set")
    if name == "ls":
        parser.description = "List a directory: size, how much of each file is cached, in which tier."
        parser.add_argument("-l", "--long", action="store_true", help="time and version too")
    else:
        parser.description = "All about one path. Fetches nothing of it."
    flags.add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Print the one or the other."""
    place = targets.place(args.path)
    control = place.control()
    if args.command == "stat":
        _stat(control.stat(place.path), json=args.json)
        return 0
    for page in _pages(control, place.path):
        if args.json:
            for item in page:
                print(as_json(dataclasses.asdict(item)))
        else:
            print("\n".join(columns([_row(item, long=args.long) for item in page], right=(0, 1))))
    return 0


def _pages(control: "Control", path: str) -> Iterator[list["CachedPath"]]:
    after = 0
    while True:
        page, after = control.list(path, after=after)
        if page:
            yield page
        if not after:
            return


def _row(item: "CachedPath", *, long: bool) -> list[str]:
    name = printable(item.path.rpartition("/")[2])
    directory = item.kind == "directory"
    row = [
        "-" if directory else format_size(item.size),
        "-" if directory or item.dirty else share(_most(item), item.size) if item.size else "100 %",
        "dirty"
        if item.dirty
        else (",".join(tier for tier, count in item.cached.items() if count) or "-")
        + (" pinned" if item.pinned else ""),
    ]
    if long:
        row += [when(item.mtime_ns), item.version or "-"]
    return [*row, f"{name}/" if directory else name]


def _most(item: "CachedPath") -> int:
    """Bytes cached: tiers may hold the same blocks, so not their sum but at most the size."""
    return min(item.size, sum(item.cached.values()))


def _stat(item: "CachedPath", *, json: bool) -> None:
    if json:
        print(as_json(dataclasses.asdict(item)))
        return
    lines = [("path", printable(item.path)), ("kind", item.kind)]
    if item.kind != "directory":
        lines += [
            ("size", f"{item.size} ({format_size(item.size)})"),
            ("modified", when(item.mtime_ns)),
            ("version", printable(item.version) or "-"),
            ("uri", printable(item.uri) or "-"),
        ]
        lines += [
            (f"in {tier}", f"{count} ({share(count, item.size)})") for tier, count in item.cached.items()
        ]
        lines += [("cached", "no")] if not (any(item.cached.values()) or item.dirty) and item.size else []
        lines += [("pinned", "yes" if item.pinned else "no")]
        lines += [("dirty", "yes: not in the bucket yet")] if item.dirty else []
    width = max(len(name) for name, _ in lines) + 1
    for name, value in lines:
        print(f"{name + ':':<{width}} {value}")
