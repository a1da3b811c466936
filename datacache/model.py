"""
The values that all layers speak. Frozen, without I/O.

Object   what a store holds under a key: size, version, time.
Version  which bytes an object has. It is part of every cache key, so another version is another
         cache entry and there is nothing to invalidate.
Block    a contiguous piece of an object that was filled and checksummed in one go.
"""

import enum
import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

from datacache.errors import SettingError

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

Buffer = bytes | bytearray | memoryview
"""Bytes that can be read without a copy."""


class ByteRange(NamedTuple):
    """Bytes `start` up to, but not including, `stop`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def clip(self, size: int) -> "ByteRange":
        """The part of this range that lies in an object of `size` bytes; may be empty."""
        return ByteRange(min(self.start, size), min(self.stop, size))

    def __str__(self) -> str:
        return f"{self.start}-{self.stop}"


class Version(NamedTuple):
    """Which bytes an object has, as its store names it.

    `etag` is the entity tag exactly as sent, quotes and `W/` included. `version_id` is the id in a
    versioned bucket, known only where it was asked for (snapshots). `stamp` stands in where a
    store gives neither: size and modification time, as "SIZE-NANOSECONDS".
    """

    etag: str = ""
    version_id: str = ""
    stamp: str = ""

    @property
    def token(self) -> str:
        """The one string that stands for this version in cache keys and on disk.

        The entity tag is preferred to the version id: the same bytes listed with and without
        their version id are then the same cache entry.
        """
        if self.etag:
            return f"etag:{self.etag}"
        if self.version_id:
            return f"id:{self.version_id}"
        return f"stamp:{self.stamp}"

    @property
    def condition(self) -> str:
        """What may be sent as If-Match: the strong entity tag, or nothing.

        A weak tag never matches in If-Match (RFC 9110, 13.1.1): sending one would fail each read.
        """
        return "" if self.etag.startswith("W/") else self.etag


class ObjectInfo(NamedTuple):
    """One object of a store. `key` is relative to the source's root and may hold any character;
    bytes that are not UTF-8 are carried as surrogate escapes."""

    key: str
    size: int
    version: Version
    mtime_ns: int = 0
    archived: bool = False


_LENGTHS = Struct("<4Q")


class CacheKey(NamedTuple):
    """What a cache entry is a copy of: source URI, key, version token. `size` is the object's."""

    source: str
    key: str
    token: str
    size: int

    @property
    def digest(self) -> str:
        """32 hex digits that name the entry on disk. Collisions would be wrong bytes, so this is a
        cryptographic hash, over length-prefixed fields so that no two keys spell the same."""
        return _digest(self)


@lru_cache(maxsize=1024)  # a fill comes here several times; what is under way at once fits
def _digest(what: CacheKey) -> str:
    source, key, token, size = (
        part.encode("utf-8", "surrogateescape")
        for part in (what.source, what.key, what.token, str(what.size))
    )
    # In one piece: every open of a file comes here, and each call of `update` takes a microsecond.
    lengths = _LENGTHS.pack(len(source), len(key), len(token), len(size))
    return hashlib.blake2b(
        b"".join((lengths[:8], source, lengths[8:16], key, lengths[16:24], token, lengths[24:], size)),
        digest_size=16,
    ).hexdigest()


class Kind(enum.IntEnum):
    """What a path names."""

    DIRECTORY = 1
    FILE = 2
    SYMLINK = 3
    """Of writable data sets only: a store holds it as an object, whose content is where it leads."""


class Entry(NamedTuple):
    """One path of a data set, as the index knows it.

    `ino` names the path for ever, in this index. `mount` is the number of the mount point that it
    lies under (-1 for the directories above mount points). `key` is the object's key there.
    `generation` is how many other versions of this path the index has had before this one: with `ino`
    it names a version by numbers alone. 0 in what never changes (snapshots, manifests) and for directories.
    A NamedTuple, not a dataclass: listings make millions of them, and it is three times cheaper.
    """

    ino: int
    parent: int
    name: bytes
    kind: Kind
    size: int
    mtime_ns: int
    mount: int
    key: str
    version: Version
    archived: bool = False
    generation: int = 0


@dataclass(frozen=True)
class MountPoint:
    """One store shown at one path of a data set."""

    uri: str
    """Where the objects are, e.g. s3://bucket/prefix. Holds no secret."""
    path: str = "/"
    """Where they appear in the data set; absolute, normalised."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the source (endpoint, region, ...); names as in docs/sources.md."""


@dataclass(frozen=True)
class Dataset:
    """A named namespace of one or more mount points, or of a manifest of object URLs."""

    name: str
    mounts: tuple[MountPoint, ...]
    manifest: str = ""
    """URI of a JSON-lines file of objects, instead of `mounts`: until it has been read, the one mount
    point is the directory that it lies in."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options for the mount points of a manifest, whose lines have none; each takes those of its scheme."""


class Medium(enum.StrEnum):
    """What a tier is made of, fastest first."""

    MEM = "mem"
    SSD = "ssd"


_UNITS = {
    "": 1, "B": 1,
    "K": KiB, "KI": KiB, "KIB": KiB, "KB": 1000,
    "M": MiB, "MI": MiB, "MIB": MiB, "MB": 1000**2,
    "G": GiB, "GI": GiB, "GIB": GiB, "GB": 1000**3,
    "T": TiB, "TI": TiB, "TIB": TiB, "TB": 1000**4,
    "P": 1024 * TiB, "PI": 1024 * TiB, "PIB": 1024 * TiB, "PB": 1000**5,
}  # fmt: skip
_SIZE = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)$", re.ASCII)
_DURATION = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)?$", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str, *, name: str) -> int:
    """Bytes of "4GiB", "512M", "1.5T" or "4096" (K, Ki and KiB are 1024; KB is 1000).

    Raises SettingError, naming `name`.
    """
    match = _SIZE.match(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise SettingError(name, text, "a size such as 512MiB, 4GiB or 1.5TiB")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def parse_duration(text: str, *, name: str) -> float:
    """Seconds of "60s", "250ms", "5m", "12h", "7d", "inf" or "2.5" (seconds).

    Raises SettingError, naming `name`.
    """
    if text.strip() in ("inf", "infinite", "forever"):
        return float("inf")
    match = _DURATION.match(text.strip())
    if match is None:
        raise SettingError(name, text, "a duration such as 250ms, 60s, 5m, 12h, 7d or inf")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def format_size(count: float) -> str:
    """ "4.0 GiB": for people. One decimal above bytes."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} PiB"


class Coverage:
    """A set of bytes of one object, as sorted ranges that neither overlap nor touch.

    Not thread-safe: the owner locks.
    """

    __slots__ = ("_starts", "_stops")

    def __init__(self, ranges: Iterable[ByteRange] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for span in ranges:
            self.add(span)

    def __repr__(self) -> str:
        return "<Coverage " + " ".join(map(str, self.ranges())) + ">"

    def ranges(self) -> list[ByteRange]:
        return [ByteRange(a, b) for a, b in zip(self._starts, self._stops, strict=True)]

    @property
    def length(self) -> int:
        """Bytes in the set."""
        return sum(self._stops) - sum(self._starts)

    def covers(self, span: ByteRange) -> bool:
        """Whether every byte of `span` is in the set. An empty span always is."""
        if span.start >= span.stop:
            return True
        i = bisect_right(self._starts, span.start) - 1
        return i >= 0 and span.stop <= self._stops[i]

    def gaps(self, span: ByteRange) -> list[ByteRange]:
        """The parts of `span` that are not in the set, in order."""
        if not self._starts:
            return [span] if span.start < span.stop else []
        found: list[ByteRange] = []
        at = span.start
        i = max(0, bisect_right(self._starts, at) - 1)
        while at < span.stop and i < len(self._starts):
            start, stop = self._starts[i], self._stops[i]
            if start >= span.stop:
                break
            if start > at:
                found.append(ByteRange(at, start))
            at = max(at, stop)
            i += 1
        if at < span.stop:
            found.append(ByteRange(at, span.stop))
        return found

    def add(self, span: ByteRange) -> None:
        """Put `span` into the set."""
        if span.start >= span.stop:
            return
        if not self._starts:  # of a small file this is the only one
            self._starts.append(span.start)
            self._stops.append(span.stop)
            return
        lo = bisect_left(self._stops, span.start)
        hi = bisect_right(self._starts, span.stop)
        start = min([span.start, *self._starts[lo:hi][:1]])
        stop = max([span.stop, *self._stops[lo:hi][-1:]])
        self._starts[lo:hi] = [start]
        self._stops[lo:hi] = [stop]

    def remove(self, span: ByteRange) -> None:
        """Take `span` out of the set."""
        if span.start >= span.stop:
            return  # or a range around it would be cut in two
        if self._starts == [span.start] and self._stops == [span.stop]:
            self._starts, self._stops = [], []
            return
        kept = [r for r in self.ranges() if r.stop <= span.start or r.start >= span.stop]
        for r in self.ranges():
            if r.stop > span.start and r.start < span.stop:
                kept += [ByteRange(r.start, span.start)] if r.start < span.start else []
                kept += [ByteRange(span.stop, r.stop)] if r.stop > span.stop else []
        kept.sort()
        self._starts = [r.start for r in kept]
        self._stops = [r.stop for r in kept]
