"""
The seam between this project and every store that is written to.

A sink is the root that a source reads, seen from the other side: whole objects are put, copied and
deleted under keys that are relative to it. Each call may depend on what stands there (`Expected`), so
that whoever writes never overwrites what it has not seen. Nothing partial is ever visible, and success
means that the store has exactly these bytes.

What goes wrong when only the answer is lost: the call raises Unavailable though it took effect.
`find` shows what stands there now, with the metadata it was put with, so a caller that gives each put a
mark of its own can tell.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol
from urllib.parse import quote, unquote

from datacache.errors import Unsupported, VersionChanged
from datacache.model import Buffer, ObjectInfo, Version


@dataclass(frozen=True)
class SinkTraits:
    """What a sink can do."""

    conditional: bool
    """The store itself makes calls depend on what stands there. Otherwise it is asked first, and what
    another writer does between that and the call is overwritten."""
    copies: bool
    """The store copies objects by itself."""
    resumable: bool
    """Large objects go in parts that outlive this process: `Put.resume` is of use."""
    largest: int
    """Bytes of the largest object that can be put."""


class Special(enum.Enum):
    """What may be expected under a key besides a version."""

    NOTHING = "nothing"
    ANYTHING = "anything"


NOTHING: Final = Special.NOTHING
"""There must be no such object."""
ANYTHING: Final = Special.ANYTHING
"""Unconditional."""
Expected = Version | Special
"""What must stand under a key for a call to take effect; a Version: exactly that one."""

KEY_MAX = 1024
"""Bytes of a key, as S3, Google, Azure and OSS have it."""

DIGEST: Final = "digest"
SIZE: Final = "size"


class Stored(NamedTuple):
    """What stands under a key."""

    info: ObjectInfo
    metadata: Mapping[str, str]
    verified: str
    """DIGEST: the store's answer proved the bytes. SIZE: only their number could be compared.
    Of what `find` found nothing but the size is known: SIZE."""


class Content(Protocol):
    """Bytes to be put. They do not change meanwhile. Read from several threads."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes from `offset`, which lie within `size`."""


class Put(Protocol):
    """How a put under way is steered and remembered. Called in the thread that called `Sink.put`."""

    @property
    def resume(self) -> str:
        """What `remember` was last given for this put in an earlier life; else empty."""

    def stopped(self) -> bool:
        """Asked before each piece. True: the put is given up with Stopped."""

    def sent(self, count: int) -> None:
        """The next `count` bytes are about to go; may sleep, to bound the bandwidth."""

    def remember(self, state: str) -> None:
        """Keep `state`, an opaque text, durably before this returns."""


class Sink(Protocol):
    """Where objects are put. Thread-safe, blocking; nothing here tries again.

    Raises only `SourceError`s: VersionChanged where the expectation is not met, Unavailable for what may
    pass by itself, WrongBytes where what arrived is not what was sent, Stopped, Unsupported, Denied,
    NotFound (the bucket).
    """

    @property
    def uri(self) -> str:
        """The same as that of the source with this root."""

    @property
    def traits(self) -> SinkTraits:
        """What this sink can do. May ask the store, the first time."""

    def accepts(self, key: str) -> bool:
        """Whether there can be such a key: what it is made of, and how long it is. Asks nobody."""

    def check_writable(self) -> None:
        """Raise what a put would be refused with, as far as the store tells that of a request by which it
        keeps nothing; where there is no such request, nothing is raised."""

    def put(
        self, key: str, content: Content, *, expected: Expected, metadata: Mapping[str, str], put: Put
    ) -> Stored:
        """Store `content` under `key`, whole or not at all. A key that ends in "/" is a directory's
        marker; its content is empty. After an error `put.resume` may still stand for parts at the store: put
        again with it, or `abandon` it."""

    def copy(
        self, origin: ObjectInfo, key: str, *, expected: Expected, metadata: Mapping[str, str]
    ) -> Stored:
        """Store the bytes of exactly `origin` under `key`, without moving them through here. VersionChanged
        where either the origin has gone or changed, or the target is not as expected."""

    def delete(self, key: str, *, expected: Expected) -> None:
        """Remove the object. What is not there is deleted; NOTHING expected is a mistake."""

    def find(self, key: str) -> Stored | None:
        """What stands under `key` now; None: nothing."""

    def abandon(self, key: str, resume: str) -> None:
        """Let go of what a put that will not go on has left at the store. Idempotent."""

    def close(self) -> None:
        """Let go of connections. Calls under way may fail with Unavailable. Idempotent."""


def fits(key: str) -> bool:
    """Whether a whole key is text of up to KEY_MAX bytes."""
    try:
        return len(key.encode()) <= KEY_MAX
    except UnicodeEncodeError:
        return False


def require(found: ObjectInfo | None, expected: Expected, thing: str) -> None:
    """Raise VersionChanged unless `found` is what was expected under `thing`."""
    if expected is ANYTHING:
        return
    if expected is NOTHING:
        if found is not None:
            raise VersionChanged(f"{thing} exists, as {found.version.token}, though it must not")
        return
    assert isinstance(expected, Version)
    if found is None:
        raise VersionChanged(f"{thing} has gone; it was expected as {expected.token}")
    if not same(found.version, expected):
        raise VersionChanged(f"{thing} is {found.version.token} now, not {expected.token}")


def same(one: Version, other: Version) -> bool:
    """Whether two looks at an object saw the same version. They need not know the same things of it."""
    pairs = ((one.etag, other.etag), (one.version_id, other.version_id), (one.stamp, other.stamp))
    known = [(a.removeprefix("W/"), b.removeprefix("W/")) for a, b in pairs if a and b]
    return all(a == b for a, b in known) if known else one == other


_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*", re.ASCII)
_PLAIN = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) != "%")


def as_headers(metadata: Mapping[str, str]) -> dict[str, str]:
    """User metadata as it can stand in headers: names in small letters, values in ASCII, with whatever
    else they hold percent-encoded. Raises Unsupported for a name that no header can have."""
    found = {}
    for name, value in metadata.items():
        if not _NAME.fullmatch(name.lower()):
            raise Unsupported(f"metadata cannot be called {name!r}: letters, digits, -, _ and . only")
        found[name.lower()] = quote(value, safe=_PLAIN, errors="surrogateescape")
    return found


def from_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """What `as_headers` was made of."""
    return {name.lower(): unquote(value, errors="surrogateescape") for name, value in headers.items()}


def check_content(key: str, content: Content, largest: int, thing: str) -> None:
    """Raise Unsupported for what cannot be put under `key`."""
    if content.size > largest:
        raise Unsupported(f"{thing} cannot have {content.size} bytes; at most {largest} can be put")
    if key.endswith("/") and content.size:
        raise Unsupported(f"{thing} is the name of a directory, and a directory has no bytes")
