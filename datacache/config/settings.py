"""Everything that can be chosen, with its default and the reason for it."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from datacache.model import Dataset, Medium, MiB


class Consistency(enum.StrEnum):
    """What an open may see."""

    REVALIDATE = "revalidate"
    """A version that was current at most TTL ago."""
    IMMUTABLE = "immutable"
    """The version that was listed first, for ever. What snapshots are."""


class Policy(enum.StrEnum):
    """What a full tier does with new data of the data set that filled it."""

    KEEP = "keep"
    """Stop admitting: on shuffled epochs the hit ratio is then the cached fraction, the best there is."""
    LRU = "lru"
    """Evict what was opened longest ago."""


class Placement(enum.StrEnum):
    """Where data goes when a tier above the last is full."""

    SPILL = "spill"
    """New data goes to the next tier down."""
    SINK = "sink"
    """The coldest data moves down and new data takes its place."""


class Fill(enum.StrEnum):
    """How much is fetched for a read that misses."""

    BLOCK = "block"
    """The whole aligned blocks that the read touches."""
    RANGE = "range"
    """The pages that the read touches and no more, unless the reads turn out to be sequential."""


class IO(enum.StrEnum):
    """How files of a mount are read."""

    AUTO = "auto"
    """`pagecache` for snapshots and manifests of small files, `passthrough` otherwise."""
    PASSTHROUGH = "passthrough"
    """The kernel reads cached files itself, once they are whole: as fast as the disk or RAM they lie in."""
    PAGECACHE = "pagecache"
    """The kernel opens files without asking and keeps what it has read: no requests from the second epoch
    on, while it fits in memory."""
    SERVED = "served"
    """The kernel asks for every open, and for every read that it has no pages of."""


@dataclass(frozen=True)
class SourceSettings:
    """How a store is talked to."""

    timeout: float = 30.0
    """Seconds that one operation may take with all its retries before it fails (EIO)."""
    stall_timeout: float = 5.0
    """Seconds without a byte after which a request is abandoned and tried again."""
    connect_timeout: float = 5.0
    """Seconds to establish a connection."""
    backoff: float = 0.1
    """Seconds before the first retry; doubled each time, with full jitter, up to `backoff_max`."""
    backoff_max: float = 5.0
    """Seconds between two tries at most."""
    breaker_probe: float = 5.0
    """Seconds between probes while the breaker is open."""


@dataclass(frozen=True)
class TierSettings:
    """One place of copies."""

    medium: Medium
    """`mem` for tmpfs, `ssd` for a directory on a disk."""
    path: str
    """The directory; what we put there lies in a sub-directory of our own."""
    quota: int
    """Bytes that the copies may take, unlinked but still open ones included."""
    high: float = 0.95
    """Fraction of the quota at which eviction begins, where the policy evicts."""
    low: float = 0.85
    """Fraction of the quota at which it ends."""
    mounted: bool = False
    """Whether a tmpfs of its own is mounted on the directory above `path`, by somebody else: until it is,
    nothing is written there, and the tier waits."""


@dataclass(frozen=True)
class CacheSettings:
    """The tiers and their rules."""

    tiers: tuple[TierSettings, ...] = ()
    """Fastest first. Empty: a directory of its own with at most half of the free space."""
    policy: Policy = Policy.KEEP
    """What a full tier does."""
    placement: Placement = Placement.SPILL
    """Where data goes when a tier above the last is full."""
    reserve: float = 0.10
    """Fraction of bytes and inodes of a tier's file system that is left free."""
    expire: float = float("inf")
    """Seconds since the last open after which an entry may go before all others."""
    priority: int = 0
    """Entries of data sets with a lower priority go first when tiers are shared."""


@dataclass(frozen=True)
class ReadingSettings:
    """How reads become fetches."""

    block_size: int = 4 * MiB
    """Bytes of an aligned block; also the largest piece that carries one checksum."""
    fill: Fill = Fill.BLOCK
    """What a miss fetches."""
    concurrency: int = 16
    """Fetches under way at most, for all readers together."""
    readahead: int = 64 * MiB
    """Bytes fetched ahead of one sequential reader at most."""
    memory: int = 192 * MiB
    """Bytes held in fetches and in blocks that no tier had room for."""
    order_ahead: int = 64
    """Files fetched ahead of a reader whose order is known."""


@dataclass(frozen=True)
class IndexSettings:
    """How names are known."""

    consistency: Consistency = Consistency.REVALIDATE
    """What an open may see."""
    ttl: float = 60.0
    """Seconds for which a listing is believed, in `revalidate`."""
    strict: bool = False
    """When the store is away and a listing is past its TTL: fail (EIO) instead of serving it as stale."""
    snapshot: str = ""
    """Name of the snapshot to use; empty for the live bucket."""
    manifest_schemes: tuple[str, ...] = ()
    """Of the URLs that a manifest may have; empty: all. Who writes the manifest is not always who runs the
    worker, and `file` is what lies on its machine."""


class Durability(enum.StrEnum):
    """When what was written survives a power cut of the node."""

    CLOSE = "close"
    """When close(2) has returned, and fsync(2)."""
    FSYNC = "fsync"
    """When fsync(2) has."""


class UploadOrder(enum.StrEnum):
    """In which order files reach the bucket."""

    FREE = "free"
    """Any; but a rename comes after all that was closed before."""
    CLOSES = "closes"
    """That of their closes."""


class UploadMode(enum.StrEnum):
    """What a close waits for."""

    ASYNC = "async"
    """The landing zone; the bucket has it later."""
    SYNC = "sync"
    """The bucket."""


class Conflict(enum.StrEnum):
    """What happens to our version of an object that somebody else has changed meanwhile."""

    KEEP_BOTH = "keep-both"
    """Theirs keeps the name, ours is put beside it, and said so."""
    OVERWRITE = "overwrite"
    """Ours takes its place."""
    FAIL = "fail"
    """Ours is not uploaded: a person decides."""


@dataclass(frozen=True)
class UploadSettings:
    """How what was written reaches the bucket."""

    mode: UploadMode = UploadMode.ASYNC
    """Whether close and fsync wait until the bucket has what was written."""
    timeout: float = 600.0
    """Seconds for which they do at most, for a large file may take long; then they fail with EIO, and uploads
    go on."""
    open_after: float = 300.0
    """Seconds for which a file is open for writing before fsync has it copied and uploaded; inf: never."""
    order: UploadOrder = UploadOrder.FREE
    """In which order files reach the bucket."""
    delay: float = 0.0
    """Seconds after its close before a file is uploaded: what is written again meanwhile is sent once."""
    bandwidth: int = 0
    """Bytes a second for all uploads together; 0: as many as there are."""
    concurrency: int = 8
    """Uploads under way at most."""


@dataclass(frozen=True)
class WritingSettings:
    """The write path."""

    enabled: bool = False
    """Whether the data set can be written to (`--rw`)."""
    landing: str = ""
    """Directory in which what is written lies until the bucket has it; empty: one in `state`."""
    durability: Durability = Durability.CLOSE
    """When what was written survives a power cut."""
    conflict: Conflict = Conflict.KEEP_BOTH
    """Whose version stands when somebody else has changed the object."""
    reserve: float = 0.05
    """Fraction of the landing zone's file system that is left free."""
    high: float = 0.92
    """Fraction of it in use at which uploads wait for no delay and clean copies leave: above what a cache
    beside it fills (`CacheSettings.reserve`)."""
    low: float = 0.9
    """Fraction at which that ends."""


@dataclass(frozen=True)
class MountSettings:
    """The FUSE mount."""

    directory: str = ""
    """Where; absolute."""
    driver: str = "auto"
    """`native`, `pyfuse3`, or `auto`: native where the kernel is new enough (Linux 6.9)."""
    io: IO = IO.AUTO
    """How the native driver has files read; the kernel is told once, so it stays until the unmount."""
    uid: int | None = None
    """Owner of all files; None: who mounts."""
    gid: int | None = None
    """Group of all files; None: who mounts."""
    file_mode: int = 0o444
    """Permission bits of files."""
    dir_mode: int = 0o555
    """Permission bits of directories."""
    allow_other: bool = False
    """Let other users in (they are held to the modes by the kernel)."""
    entry_timeout: float | None = None
    """Seconds for which the kernel believes a name; None: what is left of the TTL, ∞ for snapshots."""
    attr_timeout: float | None = None
    """Seconds for which the kernel believes attributes; None: as `entry_timeout`."""
    negative_timeout: float | None = None
    """Seconds for which the kernel believes that a name does not exist; None: as `entry_timeout`."""
    read_ahead: int = 1 * MiB
    """Bytes that the kernel reads ahead; set through the mount's bdi (128 KiB without: 2x slower)."""
    max_threads: int = 64
    """Requests handled at once at most by the native driver; each thread is about 100 KiB."""
    max_idle_threads: int = 16
    """Threads of the native driver that wait for requests at most; about as many as there are readers."""
    processes: int = 1
    """Processes of the native driver that answer, for snapshots with `--io pagecache`; 0: as many as there
    are processors. Each takes about 50 MiB."""
    max_tasks: int = 64
    """Requests handled at once at most by the portable driver."""
    min_tasks: int = 8
    """Idle request tasks that are kept; fewer are started anew for each burst."""
    metadata_entries: int = 200_000
    """Entries held in the metadata cache in front of the index; about 0.5 KiB each."""
    xattr: bool = False
    """Show user.datacache.{uri,version,tier,cached}."""


@dataclass(frozen=True)
class ApiSettings:
    """The part of the control API that is offered over TCP, to a controller."""

    listen: str = ""
    """HOST:PORT; empty: not at all. Anything but loopback needs a `token_file`."""
    token_file: str = ""
    """File of the tokens that callers may show, one a line; read again when it changes."""
    tls_cert: str = ""
    """File of the certificate, in PEM with what it is signed by; empty: no TLS. Read again as well."""
    tls_key: str = ""
    """File of its key."""


@dataclass(frozen=True)
class Settings:
    """All of it."""

    dataset: Dataset
    """What is shown."""
    state: str
    """Directory of the index and the snapshots of this data set."""
    runtime: str
    """Directory of control sockets of running mounts."""
    sources: SourceSettings = field(default_factory=SourceSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    index: IndexSettings = field(default_factory=IndexSettings)
    mount: MountSettings = field(default_factory=MountSettings)
    writing: WritingSettings = field(default_factory=WritingSettings)
    upload: UploadSettings = field(default_factory=UploadSettings)
    api: ApiSettings = field(default_factory=ApiSettings)
    metrics: str = ""
    """HOST:PORT of the Prometheus page; empty: none."""
    object: str = ""
    """NAMESPACE/NAME of the Dataset object that this is a worker of; empty: of none."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: str = "text"
    """text or json."""
    log_file: str = ""
    """Where a mount in the background logs; empty: standard error, or in the background a file in `state`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The variables (AWS_*, OSS_*, ...) that sources may use, read once at the edge."""


__all__ = [
    "IO", "ApiSettings", "CacheSettings", "Conflict", "Consistency", "Durability", "Fill", "IndexSettings",
    "MountSettings", "Placement", "Policy", "ReadingSettings", "Settings", "SourceSettings", "TierSettings",
    "UploadOrder", "UploadSettings", "WritingSettings",
]  # fmt: skip
