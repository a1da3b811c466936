"""`datacache evict`, also as `rm --cache-only`: drop cached copies. The bucket is not touched; open files
stay readable, and what is not in the bucket yet is no copy."""

import argparse

from datacache.cli import flags, targets
from datacache.cli.tables import as_json, count
from datacache.errors import SettingError
from datacache.model import format_size

EXAMPLES = """\
examples:
  datacache evict /mnt/train/old --dry-run
  datacache evict imagenet:/train/old
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Drop the cached copies of a file, or of all files below a directory, pinned or not."
    parser.epilog = EXAMPLES
    if parser.prog.endswith(" rm"):
        parser.description += " Files themselves are removed by rm(1), on a mount with --rw."
        parser.epilog = EXAMPLES.replace("datacache evict", "datacache rm --cache-only")
        parser.add_argument("--cache-only", action="store_true", help="as `datacache evict`; must be given")
    parser.add_argument("path", metavar="PATH", help="a path in a mount, or NAME:/path of a mounted data set")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and leave it")
    flags.add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Evict, and say how much."""
    if not getattr(args, "cache_only", True):
        raise SettingError(
            "--cache-only", "", "it: files themselves are removed by rm(1), on a mount with --rw"
        )
    place = targets.place(args.path)
    files, size = place.control().evict(place.path, dry_run=args.dry_run)
    if args.json:
        print(as_json({"path": args.path, "files": files, "bytes": size, "dry_run": args.dry_run}))
    else:
        what = "would be evicted" if args.dry_run else "evicted"
        print(f"{args.path}: {count(files, 'file')}, {format_size(size)} {what}")
    return 0
