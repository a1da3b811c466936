"""
What is staged where: one small file a volume, beside the mount table.

The table says what is mounted; a file says which volume that is and with which attributes, so that a call for
another volume, or with other attributes, is told from a call that is made again. It is written before the
mount and removed after it, each whole or not at all: a file without a mount means nothing, and a mount
without a file only that its attributes cannot be compared. No secret is in it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

_SUFFIX = ".json"
_MAX = 1 << 16


@dataclass(frozen=True)
class Record:
    """One staged volume."""

    volume: str
    staging: str
    """Where its data set is mounted on this node."""
    attributes: str
    """A digest of the settings that it is mounted with."""
    dataset: str = ""
    """The uid of the Dataset whose worker serves it; empty: it is served by itself."""


def digest(tree: Mapping[str, object]) -> str:
    """What `Record.attributes` is of the settings `tree`."""
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


class Records:
    """The files of one node, in a directory of their own (0700). Calls for one volume come one by one."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def __repr__(self) -> str:
        return f"<Records {self._directory}>"

    def open(self) -> None:
        """Make the directory, and remove what a write left that was killed."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        for name in os.listdir(self._directory):
            if not name.endswith(_SUFFIX):
                os.unlink(os.path.join(self._directory, name))

    def get(self, volume: str) -> Record | None:
        """The record of `volume`; None where there is none that can be read."""
        record = _read(self._file(volume))
        return record if record is not None and record.volume == volume else None

    def all(self) -> list[Record]:
        """The records of all volumes; what cannot be read is none."""
        names = [name for name in sorted(os.listdir(self._directory)) if name.endswith(_SUFFIX)]
        found = [_read(os.path.join(self._directory, name)) for name in names]
        return [record for record in found if record is not None]

    def put(self, record: Record) -> None:
        """Write `record`, in the place of what there was of its volume."""
        path = self._file(record.volume)
        new = f"{path}.new"
        with open(new, "w", encoding="utf-8", opener=_private) as file:
            file.write(json.dumps(asdict(record)))
        os.replace(new, path)

    def drop(self, volume: str) -> None:
        """Remove the record of `volume`. Idempotent."""
        with suppress(FileNotFoundError):
            os.unlink(self._file(volume))

    def _file(self, volume: str) -> str:
        name = hashlib.blake2b(volume.encode(), digest_size=16).hexdigest()
        return os.path.join(self._directory, name + _SUFFIX)


def _read(path: str) -> Record | None:
    try:
        with open(path, encoding="utf-8") as file:
            return Record(**json.loads(file.read(_MAX)))
    except (OSError, ValueError, TypeError):
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
