"""A mount whose file system has bugs: a program for `test_life`. Arguments: the mount point, and how.

Serves until it is unmounted. `how` is `handlers`, where whatever needs a name to be looked up raises,
but for the name `well`; or `start`, where the mount fails right after it has begun to answer.
"""

import os
import sys
from types import SimpleNamespace
from typing import Any, cast

from datacache.config.settings import MountSettings
from datacache.index.index import ROOT, Index
from datacache.model import Entry, Kind, Version
from fuse import mountpoint
from fuse.filesystem import FileSystem, Opener
from fuse.pyfuse import Mount

ENTRIES = {
    b"": Entry(ROOT, 0, b"", Kind.DIRECTORY, 0, 0, -1, "", Version()),
    b"well": Entry(2, ROOT, b"well", Kind.FILE, 5, 0, 0, "well", Version(etag='"x"')),
}


def main(directory: str, how: str) -> None:
    def lookup(parent: int, name: bytes) -> Entry:
        return ENTRIES[name]

    def entry(ino: int, generation: int | None = None) -> Entry:
        return next(found for found in ENTRIES.values() if found.ino == ino)

    index: Any = SimpleNamespace(lookup_nowait=lookup, entry=entry, fresh_for=lambda parent: 0.0)
    settings = MountSettings(directory=directory)
    # No reader: every open raises too.
    files = FileSystem(cast(Index, index), cast(Opener, None), settings)

    def started() -> None:
        os.write(1, b"mounted\n")
        if how == "start":
            raise KeyError("a bug")

    def detach() -> None:
        mountpoint.unmount(directory, lazy=True)

    with Mount(files, settings, source="test:bugs") as mount:
        try:
            mount.serve(started=started, detach=detach)
        finally:
            if mountpoint.is_mounted(directory):
                detach()


if __name__ == "__main__":
    main(*sys.argv[1:])
