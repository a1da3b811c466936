"""
What may be asked of a running worker: `Control` by the commands of its user, `RemoteControl`, a part of
it, by a controller elsewhere.

`worker.Worker` implements it; `server` offers it over HTTP and `client` is it again on the other
side of the socket, so that a command neither knows nor cares whether it works on a mount's worker
or on one of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from datacache.model import format_size
from datacache.reading.job import LoadRequest, LoadStatus


@dataclass(frozen=True)
class CachedPath:
    """A path and what of it is cached where; for `ls` and `stat`."""

    path: str
    kind: str
    """`file` or `directory`."""
    size: int
    mtime_ns: int = 0
    version: str = ""
    uri: str = ""
    cached: dict[str, int] = field(default_factory=dict)
    """Bytes present by tier name."""
    pinned: bool = False
    dirty: bool = False
    """Written, or renamed, and not in the bucket like that yet."""


class RemoteControl(Protocol):
    """A worker, near or far. Raises DatacacheErrors; blocking."""

    def ready(self) -> str:
        """Why it is of no use to ask for anything that takes time; empty: it is."""

    def status(self) -> dict[str, Any]:
        """Everything that `datacache status --json` prints; keys are described in docs/operations.md."""

    def load(self, request: LoadRequest) -> str:
        """Start a load job; its id."""

    def load_status(self, job: str) -> LoadStatus:
        """How a job is doing; jobs that ended are remembered (the last 100)."""

    def load_cancel(self, job: str) -> None:
        """Ask a job to stop; what it has fetched stays."""

    def drain(self, *, timeout: float) -> dict[str, Any]:
        """Begin nothing any more, and wait for `timeout` seconds at most until nothing is under way: no load
        job runs, no file is open for writing, and all that was written is in the bucket. `drained` says
        whether that is so, the other keys what is left. Reads go on. It cannot be taken back."""


class Control(RemoteControl, Protocol):
    """A worker on this machine, and ours."""

    def list(self, path: str, *, after: int = 0, limit: int = 1000) -> tuple[list[CachedPath], int]:
        """Entries of a directory (or the one file), and the `after` of the next call; 0 at the end."""

    def stat(self, path: str) -> CachedPath:
        """One path."""

    def evict(self, path: str, *, dry_run: bool = False) -> tuple[int, int]:
        """Drop the copies of all files below `path`; files and bytes."""

    def pin(self, path: str, pinned: bool) -> int:
        """Keep the copies of all files below `path` from eviction, or no longer; files."""

    def flush(self, path: str, *, timeout: float) -> dict[str, Any]:
        """Wait until all that was closed below `path` is in the bucket, for `timeout` seconds at most;
        `clean` says whether it is."""

    def lease(self, tier: str, room: int, *, entries: int = 0, ttl: float) -> tuple[int, int]:
        """Let a tier take `room` bytes at most, and `entries` files (0: any number), for `ttl` seconds; after
        that it goes by its quota again. Bytes and files that it may take now: never more than its quota."""

    def verify(self) -> dict[str, int]:
        """Hold every block of the cache against its checksum; the counts of `VerifyReport`."""


def owed(writing: Mapping[str, Any] | None) -> str:
    """What `status()["writing"]` says that the bucket does not have yet, as words; empty: nothing."""
    if not writing or not (writing["dirty_due"] or writing["dirty_files"]):
        return ""
    files, size = writing["dirty_files"], format_size(writing["dirty_bytes"])
    return f"{files} files ({size}), {writing['dirty_due']} changes in all"
