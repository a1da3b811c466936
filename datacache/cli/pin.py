"""`datacache pin` and `unpin`: keep the cached copies of a path from eviction by policy, or no longer."""

import argparse

from datacache.cli import flags, targets
from datacache.cli.tables import as_json, count

EXAMPLES = """\
examples:
  datacache pin /mnt/train/val       what is cached of it stays; `datacache load` caches the rest
  datacache unpin imagenet:/val
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pinned = parser.prog.endswith(" pin")
    parser.description = (
        "Keep the cached copies of a path from eviction by policy. What is not cached is not fetched."
        if pinned
        else "Let the cached copies of a path be evicted again."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("path", metavar="PATH", help="a path in a mount, or NAME:/path of a mounted data set")
    flags.add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Pin or unpin, and say how many files."""
    place = targets.place(args.path)
    pinned = args.command == "pin"
    files = place.control().pin(place.path, pinned)
    if args.json:
        print(as_json({"path": args.path, "files": files, "pinned": pinned}))
    else:
        print(f"{args.path}: {count(files, 'file')} {'pinned' if pinned else 'unpinned'}")
    return 0
