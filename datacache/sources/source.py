"""
The seam between this project and every store.

A source is a root (a bucket and prefix, a directory, a site) with objects under keys. Keys are
relative to the root and are what the store says they are: `a//b`, `..` and `dir/` are legal here;
`datacache.index.names` decides how they are shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from datacache.model import Buffer, ByteRange, ObjectInfo


@dataclass(frozen=True)
class Traits:
    """What a source can do; `doctor` prints it and `checked` acts on it."""

    conditional: bool
    """Reads with Version.condition fail with VersionChanged when the object has another version."""
    versioned: bool = False
    """Objects can be read by Version.version_id; `list(versions=True)` fills it in."""
    md5_etag: bool = False
    """A strong entity tag of 32 hex digits may be the MD5 of the object (S3). May: KMS-encrypted
    objects have such tags that are not; `checked` learns that from the first one."""


class Page(NamedTuple):
    """Part of a listing, in the store's order."""

    objects: list[ObjectInfo]
    prefixes: list[str]
    """Directories, as key prefixes that end in "/"; empty in recursive listings."""


class Source(Protocol):
    """Original bytes. Thread-safe, blocking.

    Raises only `SourceError`s. What may pass by itself is `Unavailable`; nothing here retries
    (`steady` does).
    """

    @property
    def uri(self) -> str:
        """Identity of the root: the same for the same objects, in this process and the next.
        Holds no secret."""

    @property
    def traits(self) -> Traits:
        """What this source can do."""

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        """Objects whose key begins with `prefix`, page by page, ordered by key within and across pages
        where the store orders.

        Not recursive: keys with a further "/" after `prefix` are folded into `prefixes`. `prefix` is
        empty or ends in "/". An object named exactly `prefix` (a directory marker) is listed too.
        A prefix without objects is an empty listing, not an error; a bucket that does not exist is
        NotFound. `versions` asks for Version.version_id (needs traits.versioned).
        """

    def stat(self, key: str) -> ObjectInfo:
        """The current version of one object. Raises NotFound."""

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        """Bytes `span` of exactly the version `info.version`.

        `span` is not empty and lies within `info.size`. Raises VersionChanged when the store has
        another version, NotFound when it has none, Archived, Denied, WrongBytes, Unavailable.
        """

    def close(self) -> None:
        """Let go of connections and threads; calls under way are given up, where that can be done, and raise
        Unavailable. The source is not used afterwards. Idempotent."""
