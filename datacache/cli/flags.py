"""
The flags that mean the same in every command, and the settings that come of them.

A flag that was not given is absent from the namespace (no defaults here): what was given goes to
`config.parsing` as it was typed, which knows the defaults, checks every value and names the flag
in its complaint. The names are those of `config.keys`; here are only the words for people.
"""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from datacache.config.keys import KEYS

if TYPE_CHECKING:
    from datacache.config.settings import Settings


class Flag(NamedTuple):
    """A flag: the key that it sets, what its value is called (empty: it takes none), what it does."""

    name: str
    value: str
    explained: str


DATASET = (
    Flag("config", "FILE", "a datacache.yaml with the same names as the flags; flags win over it"),
    Flag("name", "NAME", "name of the data set; default: made from its URIs"),
    Flag("manifest", "URI", "a JSON-lines file of object URLs that is the data set, instead of URIs"),
    Flag("manifest-schemes", "SCHEMES", "of the URLs that it may have, such as s3,https; default: all"),
    Flag("snapshot", "NAME", "use this snapshot (`datacache snapshot create`), not the live bucket"),
    Flag("consistency", "MODE", "what an open may see: revalidate (a version that was current at most --ttl "
         "ago) or immutable (the one listed first, for ever); default revalidate"),
    Flag("ttl", "DURATION", "how long a listing is believed, such as 500ms, 60s, 5m, inf; default 60s"),
    Flag("strict", "", "store away and listing past its TTL: fail (EIO) instead of serving it as stale"),
    Flag("state", "DIR", "where index and snapshots lie; default: by name, below /var/lib/datacache or "
         "~/.local/state/datacache"),
)  # fmt: skip
CACHE = (
    Flag("cache", "TIER", "MEDIUM:/PATH=SIZE, fastest first, such as mem:/dev/shm/x=4GiB or "
         "ssd:/var/cache/x=200GiB; repeatable; default: a directory of its own with at most half of the "
         "free space"),
    Flag("policy", "POLICY", "what a full tier does: keep (stop admitting, best for shuffled epochs) or lru "
         "(evict what was opened longest ago); default keep"),
    Flag("placement", "HOW", "when an upper tier is full: spill (new data goes a tier down) or sink (the "
         "coldest data does); default spill"),
    Flag("reserve", "FRACTION", "bytes and inodes of a tier's file system that are left free; default 0.1"),
    Flag("expire", "DURATION", "what was not opened for so long may go before all others; default inf"),
    Flag("priority", "N", "data sets with a lower one are evicted first from shared tiers; default 0"),
)  # fmt: skip
READING = (
    Flag("block-size", "SIZE", "unit of fetching and of checksums, a power of two; default 4MiB"),
    Flag("fill", "HOW", "what a miss fetches: block (whole blocks) or range (no more than is read); "
         "default block"),
    Flag("readahead", "SIZE", "fetched ahead of one sequential reader at most; default 64MiB"),
    Flag("order-ahead", "N", "files fetched ahead of a reader whose order is known; default 64"),
    Flag("memory", "SIZE", "held at most in fetches and in blocks no tier had room for; default 192MiB"),
    Flag("concurrency", "N", "fetches under way at most; default 16"),
)  # fmt: skip
STORE = (
    Flag("endpoint", "URL", "store to talk to instead of the provider's own, such as http://127.0.0.1:9000"),
    Flag("region", "NAME", "region of the bucket; default: from the environment or the profile"),
    Flag("profile", "NAME", "profile of the shared AWS config and credentials files"),
    Flag("anonymous", "", "send no credentials, for public buckets"),
    Flag("path-style", "", "bucket in the path of a URL; default with --endpoint"),
    Flag("virtual-host", "", "bucket in the host name of a URL; default without --endpoint"),
    Flag("option", "KEY=VALUE", "any other option of the source (docs/sources.md); repeatable"),
    Flag("timeout", "DURATION", "what one operation may take with all its retries; default 30s"),
    Flag("stall-timeout", "DURATION", "without a byte for so long, a request is tried again; default 5s"),
    Flag("connect-timeout", "DURATION", "to establish a connection; default 5s"),
    Flag("backoff", "DURATION", "before the first retry, doubled for each further one; default 100ms"),
    Flag("backoff-max", "DURATION", "between two tries at most; default 5s"),
    Flag("breaker-probe", "DURATION", "how often a store that failed is tried again; default 5s"),
)
MOUNT = (
    Flag("uid", "USER", "owner of all files, by number or name; default: who mounts"),
    Flag("gid", "GROUP", "group of all files, by number or name; default: that of who mounts"),
    Flag("file-mode", "MODE", "permission bits of files, in octal; default 0444, with --rw 0644"),
    Flag("dir-mode", "MODE", "permission bits of directories, in octal; default 0555, with --rw 0755"),
    Flag("allow-other", "", "let other users in; who is not root needs user_allow_other in /etc/fuse.conf"),
    Flag("entry-timeout", "DURATION", "how long the kernel believes a name; default: the rest of the TTL, "
         "for ever with --snapshot"),
    Flag("attr-timeout", "DURATION", "how long it believes sizes and times; default: as --entry-timeout"),
    Flag("negative-timeout", "DURATION", "how long it believes that a name does not exist; default: as "
         "--entry-timeout"),
    Flag("read-ahead", "SIZE", "what the kernel reads ahead on this mount; default 1MiB"),
    Flag("max-threads", "N", "native driver: requests handled at once at most; default 64"),
    Flag("max-idle-threads", "N", "native driver: threads that wait for requests at most; about as many as "
         "there are readers; default 16"),
    Flag("processes", "N", "native driver: processes that answer, for snapshots with --io pagecache; 0: as "
         "many as processors; default 1"),
    Flag("max-tasks", "N", "pyfuse3 driver: requests handled at once at most; default 64"),
    Flag("min-tasks", "N", "pyfuse3 driver: idle request tasks that are kept; default 8"),
    Flag("metadata-entries", "N", "names held in memory in front of the index, 0.5 KiB each; default 200000"),
    Flag("xattr", "", "show user.datacache.{uri,version,tier,cached}"),
    Flag("driver", "NAME", "native, pyfuse3, or auto: native on Linux 6.9 and newer; default auto"),
    Flag("io", "HOW", "native driver: passthrough (the kernel reads whole cached files itself), pagecache "
         "(no requests for what it has read), served, or auto: pagecache for snapshots of small files, "
         "else passthrough; default auto"),
)  # fmt: skip
WRITING = (
    Flag("rw", "", "let files be written, too: durable when they are closed, and in the bucket later"),
    Flag("landing", "DIR", "where what is written lies until the bucket has it: on a disk that survives a "
         "power cut; default: a directory in --state"),
    Flag("durability", "WHEN", "what was written survives a power cut when close(2) has returned (close), or "
         "only when fsync(2) has (fsync); default close"),
    Flag("conflict", "HOW", "somebody else has changed the object meanwhile: keep-both (ours beside it), "
         "overwrite, or fail; default keep-both"),
    Flag("landing-reserve", "FRACTION", "of the landing zone's file system that is left free; default 0.05"),
    Flag("landing-high", "FRACTION", "of that file system in use at which uploads wait for no delay, and "
         "clean copies on it leave; default 0.92"),
    Flag("landing-low", "FRACTION", "... until so much is in use; default 0.9"),
    Flag("upload-mode", "MODE", "close(2) and fsync(2) return when the landing zone has what was written "
         "(async), or when the bucket has (sync); default async"),
    Flag("upload-timeout", "DURATION", "... fail with EIO after so long; uploads go on; default 10m"),
    Flag("upload-open-after", "DURATION", "a file that is open for writing for so long (a log) is copied at "
         "fsync, and the copy uploaded; inf: not before its close; default 5m"),
    Flag("upload-order", "ORDER", "free, or closes: files reach the bucket in the order of their closes; "
         "default free"),
    Flag("upload-delay", "DURATION", "after a close before the upload begins; default 0s"),
    Flag("upload-bandwidth", "SIZE", "bytes a second for all uploads together; default 0, no limit"),
    Flag("upload-concurrency", "N", "uploads under way at most; default 8"),
)  # fmt: skip
DAEMON = (
    Flag("metrics", "HOST:PORT", "serve Prometheus metrics there; default: not at all"),
    Flag("object", "NAMESPACE/NAME", "the Dataset object that a worker serves: it says so, and where its "
         "directories are, to the node's plugin, in a file in --state; default: none"),
    Flag("listen", "HOST:PORT", "answer a controller there: health, metrics, status, load jobs, drain "
         "(docs/api.md); default: not at all"),
    Flag("token-file", "FILE", "... if it shows one of the tokens in FILE, one a line; needed unless HOST is "
         "loopback"),
    Flag("tls-cert", "FILE", "... over TLS, with this certificate in PEM"),
    Flag("tls-key", "FILE", "... and its key"),
    Flag("log-level", "LEVEL", "debug, info, warning or error; default info"),
    Flag("log-format", "FORMAT", "text or json; default text"),
    Flag("log-file", "FILE", "default: mount.log in the state directory; in the foreground standard error"),
)  # fmt: skip
_NAMES = {flag.name for flag in (*DATASET, *CACHE, *READING, *STORE, *MOUNT, *WRITING, *DAEMON)}


def add_dataset_flags(parser: argparse.ArgumentParser, *, reading: bool = True) -> None:
    """Flags that say what a data set is, how its store is reached, where copies lie, how (`reading`) it is
    read."""
    _add(parser, "the data set", DATASET)
    _add(parser, "the cache", CACHE)
    if reading:
        _add(parser, "reading", READING)
    _add(parser, "the store (credentials come from the environment and profiles)", STORE)


def add_mount_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the FUSE mount and its daemon."""
    _add(parser, "the mount", MOUNT)
    add_writing_flags(parser)
    add_daemon_flags(parser)


def add_daemon_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of what serves until it is told to end."""
    _add(parser, "the daemon", DAEMON)


def add_writing_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a mount that can be written to."""
    _add(parser, "writing", WRITING)


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """--json, for commands that scripts read."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def setting_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings among the given flags, by key, as they were typed."""
    given = {name.replace("_", "-"): value for name, value in vars(args).items()}
    return {name: value for name, value in given.items() if name in _NAMES}


def read(args: argparse.Namespace, uris: Sequence[str], *, directory: str = "") -> "Settings":
    """The settings of the data set `uris` (each URI or URI=/PATH), shown at `directory`.

    Raises SettingError.
    """
    from datacache.config.parsing import read_settings

    flags = setting_flags(args)
    config = flags.pop("config", None)
    if flags.pop("virtual-host", False):
        flags["path-style"] = False
    if uris:
        flags["uri"] = list(uris)
    if directory:
        flags["directory"] = directory
    return read_settings(flags, config_file=config, environment=os.environ)


def _add(parser: argparse.ArgumentParser, title: str, flags: Sequence[Flag]) -> None:
    group = parser.add_argument_group(title)
    style = group.add_mutually_exclusive_group()
    for name, value, explained in flags:
        key = KEYS.get(name)
        kind: dict[str, Any] = {"action": "append" if key is not None and key.many else "store"}
        to = style if name in ("path-style", "virtual-host") else group
        to.add_argument(
            f"--{name}", default=argparse.SUPPRESS, help=explained.replace("%", "%%"),
            **(kind | {"metavar": value} if value else {"action": "store_true"}),
        )  # fmt: skip
