"""
The XML of S3's listings, as values.

Pure: bytes of one answer in, one `Listing` out. botocore's own parser takes 60 µs an object and
would make a listing of a million objects a minute of our processor's time; this one takes a tenth
(the C parser of the standard library, then one dictionary for each object).
`datacache.sources.aws` puts it in botocore's place.
"""

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple
from urllib.parse import unquote_plus

from datacache.errors import Unavailable, WrongBytes
from datacache.model import ObjectInfo, Version
from datacache.sources.answers import failure

ARCHIVED = frozenset({"GLACIER", "DEEP_ARCHIVE", "Archive", "ColdArchive", "DeepColdArchive"})
"""Storage classes whose objects must be restored before they can be read: S3's (its GLACIER_IR is
read at once), then OSS's."""


class Listing(NamedTuple):
    """One page: what it lists, and what to send for the next one (nothing at the end)."""

    objects: list[ObjectInfo]
    prefixes: list[str]
    next: Mapping[str, str]


def entity_tag(raw: str | None) -> str:
    """An entity tag as HTTP writes it. Some stores list theirs without the quotes."""
    if not raw or raw.startswith(('"', "W/")):
        return raw or ""
    return f'"{raw}"'


def timestamp_ns(text: str | None) -> int:
    """Nanoseconds since the epoch of an ISO date; 0 where there is none that can be read."""
    try:
        return round(datetime.fromisoformat(text or "").timestamp() * 1000) * 1_000_000
    except ValueError:
        return 0


def version_of(tag: str, version_id: str, *, size: int, mtime_ns: int) -> Version:
    """What tells an object's bytes from others. Some stores have objects without an entity tag: versitygw
    those that were put into its directory behind its back. Size and time do then, in the whole seconds
    that a HEAD knows of it."""
    if tag or version_id:
        return Version(tag, version_id)
    return Version(stamp=f"{size}-{mtime_ns // 1_000_000_000 * 1_000_000_000}")


def parse_listing(body: bytes, *, root: str, thing: str) -> Listing:
    """The page of ListObjectsV2 or ListObjectVersions that `body` holds.

    Keys lose the prefix `root`. Of versions only the current one of each key counts, and a key whose
    current version is a delete marker is not there. Raises WrongBytes for what is no
    listing, Unavailable for half of one, and what the store says where it sends an error as a success.
    """
    try:
        tree = ET.fromstring(body)  # noqa: S314 - expat bounds entity expansion since 2.4.1
    except ET.ParseError as error:
        # Most likely it broke off: the HTTP client does not tell.
        raise Unavailable(f"{thing} cannot be listed: the answer is not XML ({error})") from error
    space, _, kind = tree.tag.rpartition("}")
    space = space and space + "}"
    if kind == "Error":  # sent with status 200
        code, message = tree.findtext(space + "Code", ""), tree.findtext(space + "Message", "")
        raise failure(thing, status=500, code=code, message=message)
    if kind not in ("ListBucketResult", "ListVersionsResult"):
        raise WrongBytes(f"{thing} cannot be listed: the answer is a {kind}, not a listing")
    encoded = tree.findtext(space + "EncodingType") == "url"
    try:
        objects = _objects(tree, space, encoded=encoded, root=root, versions=kind == "ListVersionsResult")
    except (TypeError, ValueError) as error:
        raise WrongBytes(f"{thing} cannot be listed: an object has no key or size ({error})") from error
    prefixes = []
    for node in tree.iterfind(f"{space}CommonPrefixes/{space}Prefix"):
        name = unquote_plus(node.text or "") if encoded else node.text or ""
        if name.startswith(root):
            prefixes.append(name[len(root) :])
    return Listing(objects, prefixes, _next(tree, space, encoded=encoded, thing=thing))


def _objects(tree: ET.Element, space: str, *, encoded: bool, root: str, versions: bool) -> list[ObjectInfo]:
    key_, size_, tag_ = space + "Key", space + "Size", space + "ETag"
    time_, class_ = space + "LastModified", space + "StorageClass"
    id_, latest_ = space + "VersionId", space + "IsLatest"
    skip = len(root)
    found = []
    for node in tree.findall(space + ("Version" if versions else "Contents")):
        fields = {child.tag: child.text for child in node}
        if versions and fields.get(latest_) != "true":
            continue
        key = fields.get(key_)
        if key is None:
            raise ValueError("no Key")
        if encoded and ("%" in key or "+" in key):
            key = unquote_plus(key)
        if len(key) <= skip or not key.startswith(root):
            continue  # the marker of the root itself, or a store that ignores Prefix
        tag = fields.get(tag_) or ""
        if tag and tag[0] not in '"W':
            tag = entity_tag(tag)
        size, mtime_ns = int(fields.get(size_) or ""), timestamp_ns(fields.get(time_))
        version_id = fields.get(id_) or "" if versions else ""
        version = version_of(tag, version_id, size=size, mtime_ns=mtime_ns)
        found.append(ObjectInfo(key[skip:], size, version, mtime_ns, fields.get(class_) in ARCHIVED))
    return found


def _next(tree: ET.Element, space: str, *, encoded: bool, thing: str) -> dict[str, str]:
    """The parameters of the request for the page after this one."""
    if tree.findtext(space + "IsTruncated") != "true":
        return {}
    if token := tree.findtext(space + "NextContinuationToken"):
        return {"ContinuationToken": token}
    if marker := tree.findtext(space + "NextKeyMarker"):
        following = {"KeyMarker": unquote_plus(marker) if encoded else marker}
        if version := tree.findtext(space + "NextVersionIdMarker"):
            following["VersionIdMarker"] = version
        return following
    raise WrongBytes(f"{thing} cannot be listed: the store says that there is more, but not where")
