"""
What a manifest says, line by line. Pure: whoever has the bytes can hold them against the rules.

Each line is a URL in quotes, or an object with `url` and, optionally, `path` (where the object appears),
`size`, and its version as `etag`, as `version_id`, or as `version` (an entity tag if it looks like one).
Blank lines and lines that begin with `#` are skipped. `index.manifest` makes a catalogue of them.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from datacache.errors import SettingError
from datacache.index import names
from datacache.model import Version

_FIELDS = {"url", "path", "size", "version", "etag", "version_id"}


def check_lines(data: bytes, *, uri: str) -> tuple[str, ...]:
    """The buckets and hosts (scheme://name) of a manifest, in order of appearance. `uri` is what it is called
    in a message. Raises SettingError with the number of the line and what would be right."""
    roots: dict[str, None] = {}
    # Hashes, not paths: 64 bytes an item. Where two meet, `_first_clash` looks whether it was chance.
    files: set[int] = set()
    directories: set[int] = set()
    for line, raw in lines(data):
        root, _, path, _, _ = parsed(raw, uri, line)
        roots[root] = None
        if hash(path) in files:
            _first_clash(data, uri)
        files.add(hash(path))
        cut = path.rfind("/")
        while cut > 0 and hash(path[:cut]) not in directories:
            directories.add(hash(path[:cut]))
            cut = path.rfind("/", 0, cut)
    if not files.isdisjoint(directories):
        _first_clash(data, uri)
    if not roots:
        raise SettingError("manifest", uri, "at least one line with the URL of an object")
    return tuple(roots)


def lines(data: bytes) -> Iterator[tuple[int, bytes]]:
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


class Line(NamedTuple):
    """What one line says."""

    root: str
    """scheme://bucket"""
    key: str
    path: str
    size: int | None
    version: Version


def parsed(raw: bytes, uri: str, line: int) -> Line:
    """What `raw` says. Raises SettingError."""

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
    return Line(root, key, path, size, _version(found, size, wrong))


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
    for line, raw in lines(data):
        path = parsed(raw, uri, line).path
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
