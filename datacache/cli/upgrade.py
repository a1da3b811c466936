"""
`datacache upgrade`: another daemon behind a mount, with new code or other settings; the mount stays.

The broker of the mount does it (`fuse.broker`): the daemon that serves is told to end, the next one takes
over, and when it cannot start the settings from before go on. Whoever reads waits a moment.
"""

import argparse
from typing import TYPE_CHECKING

from datacache.cli import flags
from datacache.errors import MountError, SettingError

if TYPE_CHECKING:
    from datacache.config.settings import Settings

TIMEOUT = 120.0
"""Seconds until the new daemon must serve: the old one has 10 s to end, a manifest may have to be read."""

EXAMPLES = """\
examples:
  datacache upgrade /mnt/train                                     new code, same settings
  datacache upgrade s3://bucket/train /mnt/train --memory 512MiB   the whole of the settings, as for mount

The data set, the mount point, --driver, --io and --allow-other stay; to change those, unmount first.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "datacache upgrade [URI ...] DIR [FLAGS]"
    parser.description = (
        "Put another daemon behind a mount: open files stay open, nobody sees an error. With only DIR it "
        "gets the settings that the mount has; otherwise all are given anew, as for `datacache mount`."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("words", nargs="*", metavar="[URI...] DIR", help="the mount, and what it shows")
    flags.add_dataset_flags(parser)
    flags.add_mount_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Upgrade. 0 when the new daemon serves."""
    from datacache.cli import targets
    from datacache.cli.mount import real, split
    from fuse import broker

    uris, directory = split(args.words)
    directory = real(directory)
    settings: Settings | None = None
    if uris or flags.setting_flags(args):
        try:
            settings = flags.read(args, uris, directory=directory)
        except SettingError as error:
            if error.name == "URI" and not error.value:
                raise SettingError(
                    "URI", "", "what the mount shows, beside flags: all settings are given anew, as for mount"
                ) from error
            raise
        directory = settings.mount.directory
    if not directory:
        raise SettingError("DIR", "", "the directory of the mount, as the last argument")
    worker = next((known for known in targets.live() if known.mount == directory), None)
    if worker is None:
        raise MountError(f"{directory}: nothing of datacache is mounted there by this user")
    pid = broker.ask_for_upgrade(worker.socket, settings, timeout=TIMEOUT)
    print(f"{directory}: upgraded; process {pid} serves")
    return 0
