"""What is the same for all Datasets: names that others know us by, and what the chart says. Plain values."""

from dataclasses import dataclass
from typing import NamedTuple

from datacache.model import MiB

GROUP = "datacache.io"
VERSION = "v1alpha1"
DRIVER = "csi.datacache.io"
"""The CSI driver that mounts Datasets."""
API_PORT = 7400
"""On which a worker answers the controller."""

VOLUME_SOCKET = "volume.sock"
"""In a Dataset's runtime directory on a node: where the node plugin hands its mount to the worker."""

TIER_ROOTS = ("/var/cache/datacache", "/dev/shm", "/mnt")  # noqa: S108  directories of a node


def volume_name(uid: str) -> str:
    """Of a Dataset's PersistentVolume, its handle, and all its objects in the release's namespace."""
    return f"datacache-{uid}"


class Name(NamedTuple):
    """What an object is found by. `namespace` is empty for one that has none."""

    api: str
    kind: str
    namespace: str
    name: str


class Key(NamedTuple):
    """An object of ours, of a kind that is known from elsewhere."""

    namespace: str
    name: str


@dataclass(frozen=True)
class Release:
    """One installation."""

    namespace: str
    """Where workers run: the only privileged namespace."""
    image: str
    """Of the workers."""
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    """Names of Secrets of the release namespace."""
    plugin: str = ""
    """The DaemonSet of the CSI driver, in the release namespace, whose pods we exchange; empty: none."""
    metrics_port: int = 0
    """On which workers serve metrics to anybody; 0: none does."""
    priority_class: str = ""
    """Of workers whose Dataset names none; the chart makes one that preempts nobody. Empty: none."""
    service_account: str = "datacache-worker"
    """Of the workers: it may do nothing, and gets no token."""
    state_dir: str = "/var/lib/datacache"
    """On each node: index, journal, snapshots and landing zone of each Dataset lie below, by its uid."""
    run_dir: str = "/run/datacache"
    """On each node: below, by uid, the sockets that the node plugin finds a worker by."""
    memory_dir: str = "/dev/shm/datacache"  # noqa: S108  a tmpfs, and there is a directory of ours in it
    """On each node: of a MEM tier whose Dataset names no path."""
    disk_dir: str = "/var/cache/datacache"
    """On each node: of an SSD tier whose Dataset names no path."""
    tier_roots: tuple[str, ...] = TIER_ROOTS
    """Below which a Dataset may have tiers: who may create one decides where a worker, as root, writes."""
    tier_quota: int = 100 * 1024 * MiB
    """Bytes of the SSD tier of a Dataset that says nothing of tiers."""
    audiences: tuple[str, ...] = ()
    """For whom tokens of users' ServiceAccounts may be asked, as web identities; empty: for nobody."""
    budget: int = 512 * MiB
    """Bytes of memory that a worker needs beside its MEM tiers."""
