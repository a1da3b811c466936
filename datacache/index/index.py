"""
What the layers above may ask of the names of a data set.

Two implementations: `live.LiveIndex` (lists lazily, believes listings for a TTL) and
`snapshot.SnapshotIndex` (pinned, never asks the store for names). Thread-safe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from datacache.model import Entry

ROOT = 1
"""`ino` of the root directory; FUSE's FUSE_ROOT_ID is the same number."""


@dataclass(frozen=True)
class IndexStats:
    """For `datacache status` and statfs."""

    files: int
    """Objects indexed so far (live) or in all (snapshot)."""
    bytes: int
    """Their sizes added up."""
    directories: int
    stale: int = 0
    """Answers given from a listing past its TTL because the store was away."""
    listings: int = 0
    """Directory listings fetched since start."""


class Index(Protocol):
    """The names of one data set."""

    @property
    def identity(self) -> str:
        """Which catalogue this is: the numbers of another one (`ino`) mean other paths."""

    def lookup(self, parent: int, name: bytes) -> Entry:
        """The entry of `name` in directory `parent`, listing or revalidating as needed. May block.

        Raises NoSuchPath, NotADirectory, SourceError.
        """

    def lookup_nowait(self, parent: int, name: bytes) -> Entry | None:
        """The same from what is known and fresh; None where that would block on the store.
        Raises NoSuchPath where that is known and fresh."""

    def entry(self, ino: int, generation: int | None = None) -> Entry:
        """The entry of a path as last known, without revalidation; or, of a `generation`, exactly that
        version, even if the path has another one now or is gone. Raises NoSuchPath: for a version that
        nobody has heard of, or that was forgotten (`FORMER_MAX` of them are kept)."""

    def current(self, ino: int) -> Entry:
        """The same, revalidated when its TTL has passed. May block on the store."""

    def children(self, parent: int, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        """Up to `limit` entries of directory `parent` with `ino` > `after`, by `ino`: a directory
        offset is the `ino` of the last entry seen, so iterations continue after a restart.

        Lists the directory first if it is not known or past its TTL (only when `after` is 0).
        """

    def fresh_for(self, parent: int) -> float:
        """Seconds for which what is known of directory `parent` may still be believed; inf for snapshots,
        0 when it is past its TTL."""

    def edition(self, parent: int) -> int | None:
        """A number that is another one when the entries of directory `parent`, as they are known, are others;
        None where they may not be believed."""

    def outdated(self, entry: Entry) -> bool:
        """The store says that it has not this version any more: find out what it has, before the TTL is over.
        Whether that is something else. May block; raises nothing."""

    @property
    def pinned(self) -> bool:
        """Whether nothing ever changes: a directory, once it is listed, stays as it is, all of them do."""

    def resolve(self, path: str) -> Entry:
        """The entry of a "/"-separated path of the data set. May block. Raises NoSuchPath, NotADirectory."""

    def walk(self, path: str = "/") -> Iterator[tuple[str, Entry]]:
        """All files below `path` (or `path` itself) with their paths, in listing order. May block."""

    def path(self, ino: int) -> str:
        """The path that `ino` names."""

    def stats(self) -> IndexStats:
        """How it is now."""

    def close(self) -> None:
        """Let go of the database."""
