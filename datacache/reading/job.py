"""What a load job is asked to do, and how it is doing. Plain values, for the wire and for people."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadRequest:
    """What to prewarm. Empty selections mean everything."""

    path: str = "/"
    """Directory or file of the data set."""
    globs: tuple[str, ...] = ()
    """Shell patterns on paths relative to `path`; a file is loaded when one matches. `**` crosses "/"."""
    files: tuple[str, ...] | None = None
    """Exactly these paths instead, in this order."""
    order: bool = False
    """Announce `files` as the order in which they will be read, and fetch ahead of the reader only."""
    tier: str = ""
    """Name or medium of the tier to fill; empty: as placement decides."""
    bandwidth: int = 0
    """Bytes per second at most; 0: no limit."""
    concurrency: int = 0
    """Objects under way at most; 0: the worker's own setting."""
    verify: bool = False
    """Hold what is present already against its checksums, and fetch again what does not match."""
    outage_timeout: int = 1800
    """Seconds to wait for a store that does not answer, before what is left fails. Half an hour: longer than
    most outages, and a script still learns of it the same day. 0: not at all."""


@dataclass(frozen=True)
class LoadStatus:
    """How a load job is doing."""

    id: str
    state: str
    """`running`, `done`, `failed` (some files) or `cancelled`."""
    files: int = 0
    """Files selected so far; final once `listed`."""
    bytes: int = 0
    listed: bool = False
    files_done: int = 0
    bytes_done: int = 0
    """Present now, by this job or before."""
    files_skipped: int = 0
    """Of `files_done`: were present before."""
    bytes_fetched: int = 0
    """By requests of this job: what another job, or a reader, was fetching already counts there."""
    failures: tuple[tuple[str, str], ...] = ()
    """Path and reason, the first 1,000 of them."""
    files_failed: int = 0
    seconds: float = 0.0
    verified_bad: int = 0
    """Blocks that `verify` found damaged and fetched again."""
    waiting: str = ""
    """Why nothing comes now: what the store failed with that the job waits for. Empty: it does not wait."""
