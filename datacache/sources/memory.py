"""
A source in memory: the public fake, and the one that the contract suite measures others by. `MemorySink`
writes to it.

Listings come in pages, in the order of the keys' bytes, as S3 has them; versions are strong entity
tags (the MD5, in quotes), unless `conditional=False` makes it a store that knows only sizes and
times. Requests are counted. `hold` stops reads at the door, so that a test decides what is in
flight while something else happens.
"""

import hashlib
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from datacache.errors import Archived, NotFound, Stopped, Unsupported, VersionChanged
from datacache.model import Buffer, ByteRange, GiB, MiB, ObjectInfo, Version
from datacache.sources.sink import (
    ANYTHING,
    DIGEST,
    KEY_MAX,
    SIZE,
    Content,
    Expected,
    Put,
    SinkTraits,
    Stored,
    as_headers,
    check_content,
    from_headers,
    require,
)
from datacache.sources.source import Page, Traits

_SECOND = 1_000_000_000
_BIRTH = 1_700_000_000 * _SECOND  # the first object's time; each put is a second later, so that stamps differ


@dataclass(frozen=True)
class _Stored:
    info: ObjectInfo
    data: bytes
    version_id: str
    metadata: Mapping[str, str] = field(default_factory=dict)


class Held:
    """Reads that wait at the door of a `MemorySource`; made by `MemorySource.hold`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting = 0
        self._open = False

    def __repr__(self) -> str:
        return f"<Held {self._waiting} reads{' (open)' if self._open else ''}>"

    def wait_for(self, count: int, timeout: float = 10.0) -> bool:
        """Wait until `count` reads are at the door; whether they came within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting >= count, timeout)

    def release(self) -> None:
        """Let them all in, and those who come later."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def pass_through(self) -> None:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open)
            self._waiting -= 1


class MemorySource:
    """Objects in a dict.

    `requests` counts calls by kind ("list" per page, "stat", "read"); `reads` is what was read, in
    order. `on_read`, where set, is called at the start of each read with the key and the span; what
    it raises, the read raises.
    """

    def __init__(
        self,
        uri: str = "memory://test",
        objects: Mapping[str, bytes] | None = None,
        *,
        conditional: bool = True,
        versioned: bool = False,
        page_size: int = 1000,
    ) -> None:
        self._uri = uri
        self._traits = Traits(conditional=conditional, versioned=versioned, md5_etag=conditional)
        self._page_size = page_size
        # Guards everything below. Held for moments only, never while a read is held at the door.
        self._lock = threading.Lock()
        self._objects: dict[bytes, _Stored] = {}
        self._old: dict[tuple[bytes, str], _Stored] = {}
        self._sorted: list[bytes] | None = None
        self._puts = 0
        self._door: Held | None = None
        self.requests: Counter[str] = Counter()
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.reads: list[tuple[str, ByteRange]] = []
        self.on_read: Callable[[str, ByteRange], None] | None = None
        for key, data in (objects or {}).items():
            self.put(key, data)

    def __repr__(self) -> str:
        return f"<MemorySource {self._uri} {len(self._objects)} objects>"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def traits(self) -> Traits:
        return self._traits

    def put(
        self,
        key: str,
        data: bytes,
        *,
        archived: bool = False,
        expected: Expected = ANYTHING,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectInfo:
        """Store `data` under `key`: a new version, unless the bytes are those that were there."""
        with self._lock:
            require(self._current(key), expected, f"{self._uri}/{key}")
            self._puts += 1
            mtime = _BIRTH + self._puts * _SECOND
            # A stamp always tells versions apart here; an entity tag is the same for the same bytes.
            etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
            version = (
                Version(etag=etag) if self._traits.conditional else Version(stamp=f"{len(data)}-{mtime}")
            )
            info = ObjectInfo(key, len(data), version, mtime, archived)
            raw = _raw(key)
            if raw not in self._objects:
                self._sorted = None
            self._objects[raw] = stored = _Stored(info, bytes(data), f"v{self._puts}", dict(metadata or {}))
            if self._traits.versioned:
                self._old[raw, stored.version_id] = stored
            return info

    def delete(self, key: str) -> None:
        """Remove the object; in a versioned source its old versions stay readable by their id."""
        with self._lock:
            del self._objects[_raw(key)]
            self._sorted = None

    def _current(self, key: str) -> ObjectInfo | None:
        stored = self._objects.get(_raw(key))
        return stored.info if stored else None

    def _count(self, kind: str) -> None:
        with self._lock:
            self.requests[kind] += 1

    def _begin(self, key: str) -> str:
        """A new upload, whose parts lie in `uploads`."""
        with self._lock:
            self.requests["create"] += 1
            upload = f"{key}#{self.requests['create']}"
            self.uploads[upload] = {}
            return upload

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """Reads that begin inside this block wait until `release`, or until it is left."""
        held = Held()
        with self._lock:
            self._door = held
        try:
            yield held
        finally:
            with self._lock:
                self._door = None
            held.release()

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        if versions and not self._traits.versioned:
            raise Unsupported(f"{self._uri} keeps no old versions, so objects have no version ids")
        at, start = _raw(prefix), _raw(prefix)
        while True:
            page, after = self._page(start, at, recursive=recursive, versions=versions)
            if not page.objects and not page.prefixes:
                return
            yield page
            if after is None:
                return
            at = after

    def _page(
        self, prefix: bytes, at: bytes, *, recursive: bool, versions: bool
    ) -> tuple[Page, bytes | None]:
        """The page of what begins with `prefix` and is not before `at`; and where the next begins."""
        page = Page([], [])
        with self._lock:
            self.requests["list"] += 1
            if self._sorted is None:
                self._sorted = sorted(self._objects)
            keys = self._sorted
            i = bisect_left(keys, at)
            while i < len(keys) and keys[i].startswith(prefix):
                if len(page.objects) + len(page.prefixes) >= self._page_size:
                    return page, keys[i]
                cut = -1 if recursive else keys[i].find(b"/", len(prefix))
                if cut < 0:
                    page.objects.append(self._info(keys[i], versions=versions))
                    i += 1
                else:
                    page.prefixes.append(_text(keys[i][: cut + 1]))
                    i = bisect_left(keys, keys[i][:cut] + b"0", i)  # "0" follows "/"
        return page, None

    def _info(self, raw: bytes, *, versions: bool) -> ObjectInfo:
        stored = self._objects[raw]
        if not versions:
            return stored.info
        return stored.info._replace(version=stored.info.version._replace(version_id=stored.version_id))

    def stat(self, key: str) -> ObjectInfo:
        with self._lock:
            self.requests["stat"] += 1
            stored = self._objects.get(_raw(key))
        if stored is None:
            raise NotFound(f"{self._uri} has no object {key!r}")
        return stored.info

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        with self._lock:
            self.requests["read"] += 1
            self.reads.append((info.key, span))
            door, on_read = self._door, self.on_read
        if door is not None:
            door.pass_through()
        if on_read is not None:
            on_read(info.key, span)
        with self._lock:
            stored = self._wanted(info)
        if stored.info.archived:
            raise Archived(f"{info.key!r} in {self._uri} lies in an archive class; restore it first")
        return memoryview(stored.data)[span.start : span.stop]

    def _wanted(self, info: ObjectInfo) -> _Stored:
        raw, version = _raw(info.key), info.version
        if version.version_id and self._traits.versioned:
            stored = self._old.get((raw, version.version_id))
            if stored is None:
                raise NotFound(f"{self._uri} has no version {version.version_id} of {info.key!r}")
            return stored
        stored = self._objects.get(raw)
        if stored is None:
            raise NotFound(f"{self._uri} has no object {info.key!r}")
        if self._traits.conditional and version.condition not in ("", stored.info.version.etag):
            raise VersionChanged(
                f"{info.key!r} in {self._uri} is {stored.info.version.etag} now, not {version.etag}"
            )
        return stored

    def close(self) -> None:
        """Nothing to let go of."""


class MemorySink:
    """Puts into `source`. Objects of more than `part_size` bytes go in parts, which stay in `uploads` until
    they are completed or abandoned: the sink of another life, on the same source, goes on with them.

    `source.requests` counts "put", "create", "part", "complete", "copy", "delete", "find", "abandon".
    """

    def __init__(self, source: MemorySource, *, part_size: int = 16 * MiB) -> None:
        self._source, self._part_size = source, part_size

    def __repr__(self) -> str:
        return f"<MemorySink {self.uri}>"

    @property
    def uri(self) -> str:
        return self._source.uri

    @property
    def traits(self) -> SinkTraits:
        return SinkTraits(conditional=True, copies=True, resumable=True, largest=4 * GiB)

    def accepts(self, key: str) -> bool:
        return len(key.encode("utf-8", "surrogateescape")) <= KEY_MAX

    def check_writable(self) -> None:
        """It always can be."""

    def put(
        self, key: str, content: Content, *, expected: Expected, metadata: Mapping[str, str], put: Put
    ) -> Stored:
        check_content(key, content, self.traits.largest, f"{self.uri}/{key}")
        metadata = from_headers(as_headers(metadata))
        upload = ""
        if content.size <= self._part_size:
            data = self._piece(content, 0, content.size, put)
            self._source._count("put")
        else:
            with self._source._lock:  # what cannot end well need not begin
                require(self._source._current(key), expected, f"{self.uri}/{key}")
            upload, data = self._in_parts(key, content, put)
        info = self._source.put(key, data, expected=expected, metadata=metadata)
        self._source.uploads.pop(upload, None)
        return Stored(info, metadata, DIGEST)

    def _in_parts(self, key: str, content: Content, put: Put) -> tuple[str, bytes]:
        upload = put.resume
        if upload not in self._source.uploads:
            upload = self._source._begin(key)
            put.remember(upload)
        parts = self._source.uploads[upload]
        for start in range(0, content.size, self._part_size):
            stop = min(start + self._part_size, content.size)
            if parts.get(start) != bytes(content.read(start, stop - start)):
                data = self._piece(content, start, stop, put)
                self._source._count("part")
                parts[start] = data
        self._source._count("complete")
        return upload, b"".join(data for _, data in sorted(parts.items()))

    def _piece(self, content: Content, start: int, stop: int, put: Put) -> bytes:
        if put.stopped():
            raise Stopped(f"a put into {self.uri} was given up after {start} bytes")
        put.sent(stop - start)
        return bytes(content.read(start, stop - start))

    def copy(
        self, origin: ObjectInfo, key: str, *, expected: Expected, metadata: Mapping[str, str]
    ) -> Stored:
        self._source._count("copy")
        with self._source._lock:
            require(self._source._current(origin.key), origin.version, f"{self.uri}/{origin.key}")
            data = self._source._objects[_raw(origin.key)].data
        metadata = from_headers(as_headers(metadata))
        return Stored(self._source.put(key, data, expected=expected, metadata=metadata), metadata, DIGEST)

    def delete(self, key: str, *, expected: Expected) -> None:
        self._source._count("delete")
        with self._source._lock:
            if (found := self._source._current(key)) is not None:
                require(found, expected, f"{self.uri}/{key}")
                del self._source._objects[_raw(key)]
                self._source._sorted = None

    def find(self, key: str) -> Stored | None:
        self._source._count("find")
        with self._source._lock:
            stored = self._source._objects.get(_raw(key))
        return Stored(stored.info, stored.metadata, SIZE) if stored else None

    def abandon(self, key: str, resume: str) -> None:
        self._source._count("abandon")
        self._source.uploads.pop(resume, None)

    def close(self) -> None:
        """Nothing to let go of."""


def _raw(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
