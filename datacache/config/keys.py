"""
What may be set: one table, `KEYS`, of names, fields and the values that will do.

Flags, environment variables and datacache.yaml share these names; docs/configuration.md is this
table for people (a test holds them together). Pure but for names of users and groups. A kind of
value reads a text and raises ValueError (or SettingError) when it is none of its kind; who reads it
in `parsing` knows what the user called it and makes the one line of that.
"""

import grp
import os
import pwd
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from datacache.config.schemes import SCHEMES
from datacache.config.settings import (
    IO,
    Conflict,
    Consistency,
    Durability,
    Fill,
    Placement,
    Policy,
    UploadMode,
    UploadOrder,
)  # fmt: skip
from datacache.model import GiB, KiB, Medium, MiB, TiB, parse_duration, parse_size

PREFIX = "DATACACHE_"
"""What the names of our variables begin with."""
INF = float("inf")

_CREDENTIAL = re.compile(
    r"(AWS|OSS|ALIBABA_CLOUD|GOOGLE|GCS|CLOUDSDK|AZURE|ARM|FSSPEC|HF|S3)_[A-Za-z0-9_]+", re.ASCII
)


def is_credential(variable: str) -> bool:
    """Whether the environment variable `variable` is one of a store's client: who we are to it, and how."""
    return _CREDENTIAL.fullmatch(variable) is not None


@dataclass(frozen=True)
class Kind:
    """The values that a key may have."""

    expected: str
    """What would be right, for the error and for docs/configuration.md."""
    read: Callable[[str], Any]
    """The value of a text. Raises ValueError or SettingError when it is none."""
    show: Callable[[Any], str] = str
    """The text of a value, as a user would write it."""


def spell_size(count: int) -> str:
    """The shortest text that `parse_size` reads as exactly `count`."""
    for unit, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if count and count % unit == 0:
            return f"{count // unit}{name}"
    return str(count)


def spell_duration(seconds: float) -> str:
    """The text that `parse_duration` reads as `seconds`."""
    if seconds == INF:
        return "inf"
    return f"{seconds * 1000:g}ms" if 0 < seconds < 1 else f"{seconds:g}s"


def _size(low: int, high: int, *, power: bool = False) -> Kind:
    def read(text: str) -> int:
        count = parse_size(text, name="")
        if not low <= count <= high or (power and count & (count - 1)):
            raise ValueError
        return count

    what = "a size that is a power of two" if power else "a size"
    return Kind(f"{what}, {spell_size(low)} to {spell_size(high)}", read, spell_size)


def _duration(low: float, high: float) -> Kind:
    def read(text: str) -> float:
        seconds = parse_duration(text, name="")
        if not low <= seconds <= high:
            raise ValueError
        return seconds

    expected = f"a duration, {spell_duration(low)} to {spell_duration(high)}, such as 500ms, 60s, 5m"
    return Kind(expected, read, spell_duration)


def _integer(low: int, high: int) -> Kind:
    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,12}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return Kind(f"a whole number, {low} to {high}", read)


def _fraction(low: float, high: float) -> Kind:
    def read(text: str) -> float:
        if not re.fullmatch(r"[0-9]{0,3}(\.[0-9]{1,9})?", text, re.ASCII) or not low <= float(text) <= high:
            raise ValueError
        return float(text)

    return Kind(f"a fraction, {low:g} to {high:g}", read, "{:g}".format)


def _choice(values: Iterable[str], make: Callable[[str], Any] = str) -> Kind:
    known = [str(value) for value in values]

    def read(text: str) -> Any:
        if text not in known:
            raise ValueError
        return make(text)

    return Kind(" or ".join(known) if len(known) == 2 else ", ".join(known[:-1]) + " or " + known[-1], read)


def _mode(text: str) -> int:
    if not re.fullmatch(r"(0o)?0?[0-7]{3}", text, re.ASCII):
        raise ValueError
    return int(text.removeprefix("0o"), 8)


def _user(text: str) -> int:
    return _number(text) if text.isdigit() else int(pwd.getpwnam(text).pw_uid)


def _group(text: str) -> int:
    return _number(text) if text.isdigit() else int(grp.getgrnam(text).gr_gid)


def _number(text: str) -> int:
    # 2^32 - 1 means "no change" to chown(2) and would be nobody's.
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or int(text) >= 2**32 - 1:
        raise ValueError
    return int(text)


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+", host, re.ASCII):
        raise ValueError
    if not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or not 1 <= int(port) <= 65535:
        raise ValueError
    return text


def _path(text: str) -> str:
    if not text.startswith("/") or "\0" in text:
        raise ValueError
    return os.path.normpath("/" + text.lstrip("/"))


def _text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError
    return text


def _region(text: str) -> str:
    # It becomes a part of host names.
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", text, re.ASCII) or text.isdigit():
        raise ValueError
    return text


def _audience(text: str) -> str:
    if not re.fullmatch(r"[!-~]{1,512}", text, re.ASCII):
        raise ValueError
    return text


def _name(text: str) -> str:
    # It becomes the name of directories.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text, re.ASCII):
        raise ValueError
    return text


def _schemes(text: str) -> tuple[str, ...]:
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*(,[a-z][a-z0-9+.-]*)*", text, re.ASCII):
        raise ValueError
    return tuple(text.split(","))


def _snapshot(text: str) -> str:
    # As `datacache.index.snapshot` takes it.
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text, re.ASCII):
        raise ValueError
    return text


def _object(text: str) -> str:
    # Each a DNS name, as the API takes them.
    if not re.fullmatch(
        r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?/[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", text, re.ASCII
    ):
        raise ValueError
    return text


# A bucket or host, which only file:/// does without. `::` chains fsspec's schemes (simplecache::s3://...).
_URI = re.compile(r"(?P<scheme>([A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.+)", re.ASCII)


def _uri(text: str) -> str:
    match = _URI.fullmatch(text)
    if not match or not text.isprintable() or text.startswith(("s3:///", "gs:///", "az:///", "oss:///")):
        raise ValueError
    return text


TEXT = Kind("a text", _text)
AUDIENCE = Kind("for whom a token is, such as sts.amazonaws.com", _audience)
REGION = Kind("the name of a region, such as eu-west-1", _region)
BOOLEAN = Kind("true or false", {"true": True, "false": False}.__getitem__, lambda value: str(value).lower())
PATH = Kind("an absolute path", _path)
SNAPSHOT = Kind("1 to 64 letters, digits, dots, dashes and underscores", _snapshot)
NAME = Kind("letters, digits, dots, dashes and underscores, up to 100, the first a letter or digit", _name)
URI = Kind("a URI such as s3://bucket/prefix, oss://bucket, https://host/data or file:///data", _uri)
_MODE = Kind("permission bits in octal, such as 0444", _mode, "{:04o}".format)
TIER = Kind("MEDIUM:/PATH=SIZE[,high=FRACTION][,low=FRACTION], such as mem:/dev/shm/x=4GiB or "
             "ssd:/var/cache/x=200GiB; without =SIZE at most half of the free space", _text)  # fmt: skip
_SCHEMES = Kind(
    "schemes of URLs with commas between them, such as s3,https", _schemes, lambda schemes: ",".join(schemes)
)
MOUNT = Kind("a URI, or URI=/PATH to say where in the data set it appears", _text)
OPTION = Kind("KEY=VALUE, an option of the source (docs/sources.md)", _text)
MEDIUM = _choice(Medium, Medium)
OBJECT = Kind("NAMESPACE/NAME of a Dataset", _object)
QUOTA = _size(1, 1024 * TiB)
WATERMARK = _fraction(0.01, 1)


class Key(NamedTuple):
    """One thing that may be set."""

    name: str
    """As flag (with --), as YAML key, and as variable (in capitals, `_` for `-`, after DATACACHE_)."""
    field: str
    """`section.field` of Settings; `dataset` and `options` are put together from several keys."""
    kind: Kind
    many: bool = False
    """It is a list: a flag that is repeated, a list in YAML, separated by `;` in a variable."""

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper().replace("-", "_")


KEYS: Mapping[str, Key] = {
    key.name: key
    for key in (
        Key("uri", "dataset", MOUNT, many=True),
        Key("mounts", "dataset", MOUNT, many=True),
        Key("manifest", "dataset", URI),
        Key("manifest-schemes", "index.manifest_schemes", _SCHEMES),
        Key("name", "dataset", NAME),
        Key("endpoint", "options", Kind("the URL of a store, such as http://127.0.0.1:9000", _uri)),
        Key("region", "options", REGION),
        Key("profile", "options", TEXT),
        Key("anonymous", "options", BOOLEAN),
        Key("path-style", "options", BOOLEAN),
        Key("option", "options", OPTION, many=True),
        Key("timeout", "sources.timeout", _duration(0.1, 3600)),
        Key("stall-timeout", "sources.stall_timeout", _duration(0.1, 3600)),
        Key("connect-timeout", "sources.connect_timeout", _duration(0.1, 3600)),
        Key("backoff", "sources.backoff", _duration(0.001, 60)),
        Key("backoff-max", "sources.backoff_max", _duration(0.001, 600)),
        Key("breaker-probe", "sources.breaker_probe", _duration(0.1, 3600)),
        Key("cache", "cache.tiers", TIER, many=True),
        Key("policy", "cache.policy", _choice(Policy, Policy)),
        Key("placement", "cache.placement", _choice(Placement, Placement)),
        Key("reserve", "cache.reserve", _fraction(0, 0.9)),
        Key("expire", "cache.expire", _duration(1, INF)),
        Key("priority", "cache.priority", _integer(-1000, 1000)),
        Key("block-size", "reading.block_size", _size(64 * KiB, 64 * MiB, power=True)),
        Key("fill", "reading.fill", _choice(Fill, Fill)),
        Key("concurrency", "reading.concurrency", _integer(1, 1024)),
        Key("readahead", "reading.readahead", _size(0, 16 * GiB)),
        Key("memory", "reading.memory", _size(1 * MiB, 1 * TiB)),
        Key("order-ahead", "reading.order_ahead", _integer(0, 100_000)),
        Key("consistency", "index.consistency", _choice(Consistency, Consistency)),
        Key("ttl", "index.ttl", _duration(0, INF)),
        Key("strict", "index.strict", BOOLEAN),
        Key("snapshot", "index.snapshot", SNAPSHOT),
        Key("rw", "writing.enabled", BOOLEAN),
        Key("landing", "writing.landing", PATH),
        Key("durability", "writing.durability", _choice(Durability, Durability)),
        Key("conflict", "writing.conflict", _choice(Conflict, Conflict)),
        Key("landing-reserve", "writing.reserve", _fraction(0, 0.9)),
        Key("landing-high", "writing.high", _fraction(0.01, 1)),
        Key("landing-low", "writing.low", _fraction(0, 1)),
        Key("upload-mode", "upload.mode", _choice(UploadMode, UploadMode)),
        Key("upload-timeout", "upload.timeout", _duration(0.1, 7 * 86400)),
        Key("upload-open-after", "upload.open_after", _duration(0, INF)),
        Key("upload-order", "upload.order", _choice(UploadOrder, UploadOrder)),
        Key("upload-delay", "upload.delay", _duration(0, 7 * 86400)),
        Key("upload-bandwidth", "upload.bandwidth", _size(0, 1 * TiB)),
        Key("upload-concurrency", "upload.concurrency", _integer(1, 256)),
        Key("directory", "mount.directory", PATH),
        Key("driver", "mount.driver", _choice(("auto", "native", "pyfuse3"))),
        Key("io", "mount.io", _choice(IO, IO)),
        Key("uid", "mount.uid", Kind("a user, by number or name", _user)),
        Key("gid", "mount.gid", Kind("a group, by number or name", _group)),
        Key("file-mode", "mount.file_mode", _MODE),
        Key("dir-mode", "mount.dir_mode", _MODE),
        Key("allow-other", "mount.allow_other", BOOLEAN),
        Key("entry-timeout", "mount.entry_timeout", _duration(0, INF)),
        Key("attr-timeout", "mount.attr_timeout", _duration(0, INF)),
        Key("negative-timeout", "mount.negative_timeout", _duration(0, INF)),
        Key("read-ahead", "mount.read_ahead", _size(0, 1 * GiB)),
        Key("max-threads", "mount.max_threads", _integer(1, 4096)),
        Key("max-idle-threads", "mount.max_idle_threads", _integer(1, 4096)),
        Key("processes", "mount.processes", _integer(0, 256)),
        Key("max-tasks", "mount.max_tasks", _integer(1, 4096)),
        Key("min-tasks", "mount.min_tasks", _integer(1, 4096)),
        Key("metadata-entries", "mount.metadata_entries", _integer(1, 100_000_000)),
        Key("xattr", "mount.xattr", BOOLEAN),
        Key("state", "state", PATH),
        Key("metrics", "metrics", Kind("HOST:PORT, such as 127.0.0.1:9300", _address)),
        Key("object", "object", OBJECT),
        Key("listen", "api.listen", Kind("HOST:PORT, such as 127.0.0.1:9301", _address)),
        Key("token-file", "api.token_file", PATH),
        Key("tls-cert", "api.tls_cert", PATH),
        Key("tls-key", "api.tls_key", PATH),
        Key("log-level", "log_level", _choice(("debug", "info", "warning", "error"))),
        Key("log-format", "log_format", _choice(("text", "json"))),
        Key("log-file", "log_file", PATH),
    )
}

SCHEMES_OF: Mapping[str, tuple[str, ...]] = {
    "endpoint": ("s3", "oss", "gs", "az"),
    "anonymous": ("s3", "oss", "gs", "az"),
    "region": ("s3", "oss"),
    "style": ("s3", "oss"),
    "profile": ("s3",),
}
"""Whom the options that have flags of their own mean something to."""


def applicable(uri: str, options: Mapping[str, str]) -> dict[str, str]:
    """Of `options` that were given for many mount points, those that the one at `uri` can have."""
    scheme = uri.partition("://")[0].lower()
    if known := SCHEMES.get(scheme):
        # What no scheme has is a slip, and stays, so that somebody says so.
        others = {option for each in SCHEMES.values() for option in each.options} - set(known.options)
        return {k: v for k, v in options.items() if k not in others}
    return {k: v for k, v in options.items() if k not in SCHEMES_OF}
