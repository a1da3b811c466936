"""
A data set that is a list: JSON lines of object URLs, turned into a pinned catalogue.

Each line is a URL in quotes, or an object with `url` and, optionally, `path` (where the object
appears), `size`, and its version as `etag`, as `version_id`, or as `version` (an entity tag if it
looks like one). Blank lines and lines that begin with `#` are skipped. Every URL's bucket or host is
one mount point; the paths are those of the lines, so two of them may lie in one directory.

An object whose size or version the manifest does not say is asked for once, when the catalogue is
made; the catalogue is kept under the digest of the manifest, so that the next start asks nothing.
`read_manifest` holds every line against the rules, and `Manifest.items` reads them again one by one:
a list of millions is never in memory as objects.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

from datacache.errors import NotFound, SettingError
from datacache.index import database as db
from datacache.index import layout, names
from datacache.index.building import Builder, new_catalogue
from datacache.index.database import Database
from datacache.model import Dataset, MountPoint, ObjectInfo, Version
from datacache.sources.source import Source

_AT_ONCE = 32
"""Objects asked for at once: enough to hide 30 ms of latency behind 1,000 answers a second."""

_FIELDS = {"url", "path", "size", "version", "etag", "version_id"}


class Item(NamedTuple):
    """One line of a manifest."""

    line: int
    mount: int
    key: str
    path: str
    """Relative to the root of the data set."""
    size: int | None
    version: Version


@dataclass(frozen=True)
class Manifest:
    """A manifest that keeps the rules."""

    uri: str
    digest: str
    """Of the file's bytes: another list is another catalogue."""
    mounts: tuple[MountPoint, ...]
    """One for each bucket or host, in order of appearance."""
    data: bytes

    def __repr__(self) -> str:
        return f"<Manifest {self.uri} {len(self.data)} bytes, {len(self.mounts)} mounts>"

    @property
    def items(self) -> Iterator[Item]:
        """The lines, read anew."""
        numbers = {mount.uri: number for number, mount in enumerate(self.mounts)}
        for line, raw in _lines(self.data):
            found = _parse(raw, self.uri, line)
            yield Item(line, numbers[found.root], found.key, found.path, found.size, found.version)

    def build(
        self, builder: Builder, sources: Sequence[Source], *, progress: Callable[[int], None] | None = None
    ) -> None:
        """Put every object into a catalogue, asking the stores for what the lines do not say."""
        waiting: deque[tuple[Item, Future[ObjectInfo] | None]] = deque()

        def add(item: Item, future: "Future[ObjectInfo] | None") -> None:
            builder.add(item.path, item.mount, self._info(item, future))
            if progress is not None and builder.files % 1000 == 0:
                progress(builder.files)

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="manifest") as pool:
            try:
                for item in self.items:
                    known = item.size is not None and item.version != Version()
                    future = None if known else pool.submit(sources[item.mount].stat, item.key)
                    waiting.append((item, future))
                    if len(waiting) > 2 * _AT_ONCE:
                        add(*waiting.popleft())
                while waiting:
                    add(*waiting.popleft())
                if progress is not None:
                    progress(builder.files)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _info(self, item: Item, future: "Future[ObjectInfo] | None") -> ObjectInfo:
        if future is None:
            return ObjectInfo(item.key, item.size or 0, item.version)
        where = f"{self.uri}, line {item.line}"
        try:
            found = future.result()
        except NotFound as error:
            raise NotFound(f"{where}: {error}") from error
        if item.size not in (None, found.size):
            raise SettingError(where, item.size, f"the size of the object, which has {found.size} bytes")
        if item.version.etag not in ("", found.version.etag):
            raise SettingError(
                where,
                item.version.etag,
                f"the object's entity tag, which is {found.version.etag or 'none'} now",
            )
        return found


def read_manifest(data: bytes, *, uri: str) -> Manifest:
    """Check a manifest. Raises SettingError with the number of the line and what would be right."""
    mounts: dict[str, MountPoint] = {}
    # Hashes, not paths: 64 bytes an item. Where two meet, `_first_clash` looks whether it was chance.
    files: set[int] = set()
    directories: set[int] = set()
    for line, raw in _lines(data):
        root, _, path, _, _ = _parse(raw, uri, line)
        mounts.setdefault(root, MountPoint(root))
        if hash(path) in files:
            _first_clash(data, uri)
        files.add(hash(path))
        cut = path.rfind("/")
        while cut > 0 and hash(path[:cut]) not in directories:
            directories.add(hash(path[:cut]))
            cut = path.rfind("/", 0, cut)
    if not files.isdisjoint(directories):
        _first_clash(data, uri)
    if not mounts:
        raise SettingError("manifest", uri, "at least one line with the URL of an object")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return Manifest(uri, digest, tuple(mounts.values()), data)


def open_manifest(dataset: Dataset, manifest: Manifest, sources: Sequence[Source], *, state: str) -> Database:
    """The catalogue of a manifest, made where there is none of these very bytes yet."""
    directory = os.path.join(state, "manifests")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    made_for = layout.made_for(dataset, sources)
    digest = hashlib.blake2b(made_for.encode() + manifest.digest.encode(), digest_size=16).hexdigest()
    path = os.path.join(directory, digest + ".db")
    with db.locked(os.path.join(directory, ".lock"), wait=True):
        if not db.fits(path, made_for):
            with new_catalogue(path, layout.skeleton(dataset)) as builder:
                manifest.build(builder, sources)
                builder.finish({"made_for": made_for})
        for name in os.listdir(directory):  # of lists that are no more; who has one open keeps it
            if name not in (".lock", digest + ".db"):
                os.unlink(os.path.join(directory, name))
        return db.open_pinned(path, made_for=made_for, name=manifest.uri)


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of the lines that hold an item."""
    start, number = 0, 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        number += 1
        raw = data[start:stop].strip()
        start = stop + 1
        if raw and not raw.startswith(b"#"):
            yield number, raw


class _Parsed(NamedTuple):
    root: str
    """scheme://bucket"""
    key: str
    path: str
    size: int | None
    version: Version


def _parse(raw: bytes, uri: str, line: int) -> _Parsed:

    def wrong(value: object, expected: str) -> SettingError:
        return SettingError(f"{uri}, line {line}", value, expected)

    try:
        found: Any = json.loads(raw)
    except (ValueError, RecursionError):
        text = raw[:80].decode("utf-8", "replace")
        raise wrong(
            text, 'JSON: "s3://bucket/key" in quotes, or {"url": "s3://bucket/key", "size": 123}'
        ) from None
    if isinstance(found, str):
        found = {"url": found}
    if not isinstance(found, dict) or not isinstance(found.get("url"), str):
        raise wrong(found, 'a URL in quotes, or an object with "url"')
    if unknown := found.keys() - _FIELDS:
        raise wrong(min(unknown), f"one of {', '.join(sorted(_FIELDS))}")
    root, key = _split(found["url"], wrong)
    path = found.get("path", key)
    if not isinstance(path, str) or not _safe(path):
        raise wrong(
            path, 'a "path" below the data set: relative, without empty, "." or ".." parts or NUL, '
            f"and no part over {names.NAME_MAX} bytes",
        )  # fmt: skip
    size = found.get("size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63):
        raise wrong(size, '"size" as a number of bytes')
    return _Parsed(root, key, path, size, _version(found, size, wrong))


def _split(url: str, wrong: Callable[[object, str], SettingError]) -> tuple[str, str]:
    scheme, colon, rest = url.partition("://")
    host, _, key = rest.partition("/")
    if not colon or not scheme or not (host or scheme == "file") or not key or key.endswith("/"):
        raise wrong(url, "the URL of an object, such as s3://bucket/key")
    if scheme == "file":
        if host:
            raise wrong(url, "file:///absolute/path")
        return "file:///", key  # the root of all of them
    if "@" in host:
        raise wrong(f"{scheme}://...@{host.rpartition('@')[2]}", "a URL without a user or password")
    if scheme in ("http", "https"):
        if "?" in key or "#" in key:
            raise wrong(url.partition("?")[0], "a URL without query and fragment")
        key = unquote(key, errors="surrogateescape")
    return f"{scheme}://{host}", key


def _safe(path: str) -> bool:
    try:
        parts = names.to_bytes(path).split(b"/")
    except UnicodeEncodeError:
        return False
    return all(
        part not in (b"", b".", b"..") and len(part) <= names.NAME_MAX and b"\0" not in part for part in parts
    )


def _version(
    found: dict[str, Any], size: int | None, wrong: Callable[[object, str], SettingError]
) -> Version:
    given = [name for name in ("version", "etag", "version_id") if name in found]
    if not given:
        return Version()
    value = found[given[0]]
    if len(given) > 1 or not isinstance(value, str) or not value:
        raise wrong(value, 'one of "version", "etag" and "version_id", as text')
    tag = value.startswith(('"', "W/"))
    if given[0] == "etag" or (given[0] == "version" and tag):
        return Version(etag=value if tag else f'"{value}"')
    if size is None:
        raise wrong(value, '"size" beside a version id, for a store is asked only for what is current')
    return Version(version_id=value)


def _first_clash(data: bytes, uri: str) -> None:
    """Raise for the first line whose path is that of an earlier one, or a directory of another's."""
    seen: dict[str, int] = {}
    above: dict[str, int] = {}
    for line, raw in _lines(data):
        path = _parse(raw, uri, line).path
        if path in seen:
            raise SettingError(f"{uri}, line {line}", path, f'another "path": line {seen[path]} has this one')
        seen[path] = line
        for cut in (i for i, c in enumerate(path) if c == "/"):
            above.setdefault(path[:cut], line)
        for file in (path, *(path[:cut] for cut in (i for i, c in enumerate(path) if c == "/"))):
            if file in seen and file in above:
                other = max(seen[file], above[file])
                raise SettingError(
                    f"{uri}, line {other}", file, "a name that is either a file or a directory, not both; "
                    f"line {min(seen[file], above[file])} has it as the other",
                )  # fmt: skip
