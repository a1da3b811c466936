"""
A small S3 server that goes wrong on purpose.

It answers GET, HEAD and ListObjectsV2 of one bucket as S3 does (206, ETag, If-Match, 412, 416, XML), takes
objects, whole and in parts, looks at no signature, and befalls requests with scripted faults, in the order
of `add`. It listens on loopback; nothing outlives `close`: connections are cut and every thread is joined.
"""

import hashlib
import re
import socket
import struct
import threading
from base64 import b64encode
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

_BIRTH = 1_700_000_000


@dataclass(frozen=True)
class Status:
    """Answer with this status, and S3's XML with `code`."""

    status: int
    code: str = ""
    retry_after: str = ""


@dataclass(frozen=True)
class Stall:
    """Send `after` bytes of the body (None: not even headers), then nothing until the server closes."""

    after: int | None = None


@dataclass(frozen=True)
class Trickle:
    """Send the body byte by byte, one every `every` seconds."""

    every: float = 0.02


@dataclass(frozen=True)
class Truncate:
    """Promise the whole body, send `keep` bytes, close."""

    keep: int = 1


@dataclass(frozen=True)
class Shorten:
    """Send a well-formed answer with `by` bytes fewer than asked for, and a range that says so."""

    by: int = 1


@dataclass(frozen=True)
class Reset:
    """Send `after` bytes of the body (None: nothing at all), then reset the connection."""

    after: int | None = None


@dataclass(frozen=True)
class Elsewhere:
    """Send as many bytes from `by` further on. `lying`: with the Content-Range that was asked for."""

    by: int = 1
    lying: bool = False


@dataclass(frozen=True)
class NotPartial:
    """Send the whole object with 200, whatever the range."""


@dataclass(frozen=True)
class IgnoreCondition:
    """Answer as if no If-Match had been sent."""


@dataclass(frozen=True)
class Flip:
    """Send the body with one bit of its first byte inverted; of a put: that is how it arrives."""


@dataclass(frozen=True)
class Lost:
    """Do what was asked for, and reset the connection instead of saying so."""


@dataclass(frozen=True)
class Before:
    """Call `action` first: the object changes between two requests."""

    action: Callable[[], object]


Fault = (
    Status | Stall | Trickle | Truncate | Shorten | Reset | Elsewhere | NotPartial | IgnoreCondition
    | Flip | Before | Lost
)  # fmt: skip


class Request(NamedTuple):
    """What was asked: `kind` is get, head, list, put, delete, or of a multipart upload create, part, parts,
    complete, abort; names of headers are in small letters."""

    kind: str
    key: str
    headers: Mapping[str, str]
    query: Mapping[str, str]


@dataclass
class Stored:
    """An object. `etag` is its MD5 unless said otherwise."""

    data: bytes
    mtime: int = _BIRTH
    etag: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    storage_class: str = "STANDARD"

    def __post_init__(self) -> None:
        self.etag = self.etag or f'"{hashlib.md5(self.data, usedforsecurity=False).hexdigest()}"'


@dataclass
class Upload:
    """A multipart upload that was neither completed nor aborted."""

    key: str
    headers: dict[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


class FaultyS3:
    """The server. A context manager; `endpoint` is its URL."""

    def __init__(
        self, objects: Mapping[str, bytes] | None = None, *, bucket: str = "bucket", digests: bool = True
    ) -> None:
        """`digests`: what arrives is held against its Content-MD5."""
        self.bucket, self.digests = bucket, digests
        self.uploads: dict[str, Upload] = {}
        # Guards all below; handlers run in threads of their own.
        self.lock = threading.Lock()
        self.objects: dict[str, Stored] = {}
        self.requests: list[Request] = []
        self._faults: dict[str, deque[Fault | None]] = defaultdict(deque)
        self._connections: set[socket.socket] = set()
        self.stored = 0  # objects, so far
        self.closing = threading.Event()
        for key, data in (objects or {}).items():
            self.put(key, data)
        self._server = _Server(("127.0.0.1", 0), self.handler())
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="faulty-s3")
        self._thread.start()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """What speaks the protocol; another one for another dialect."""
        return Handler

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.endpoint} {len(self.objects)} objects>"

    def __enter__(self) -> "FaultyS3":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, key: str, data: bytes, **more: Any) -> None:
        """Store an object; `more` goes to `Stored`."""
        with self.lock:
            self.take(key, Stored(data, **more))

    def take(self, key: str, stored: Stored) -> str:
        """Have an object, with the lock held; its entity tag."""
        self.stored += 1
        if stored.mtime == _BIRTH:
            stored.mtime += self.stored
        self.objects[key] = stored
        return stored.etag

    def delete(self, key: str) -> None:
        with self.lock:
            del self.objects[key]

    def add(self, kind: str, *faults: Fault | None) -> None:
        """Let these befall the next requests of `kind` in turn."""
        with self.lock:
            self._faults[kind].extend(faults)

    def count(self, kind: str) -> int:
        with self.lock:
            return sum(request.kind == kind for request in self.requests)

    def begin(self, request: Request) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            faults = self._faults[request.kind]
            return faults.popleft() if faults else None

    def connected(self, connection: socket.socket) -> None:
        with self.lock:
            self._connections.add(connection)

    def disconnected(self, connection: socket.socket) -> None:
        with self.lock:
            self._connections.discard(connection)

    def cut(self) -> None:
        """Cut all connections, as a restart of the store does."""
        with self.lock:
            for connection in self._connections:
                with _quiet():
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self.cut()
        self._server.server_close()
        self._thread.join()


class _quiet:  # noqa: N801  reads as a word
    """What goes wrong with a socket that the other side has left is nobody's business."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, OSError | ValueError)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    owner: FaultyS3

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    """S3's dialect."""

    protocol_version = "HTTP/1.1"
    server: _Server
    namespace = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'

    def setup(self) -> None:
        super().setup()
        self.server.owner.connected(self.connection)

    def finish(self) -> None:
        self.server.owner.disconnected(self.connection)
        with _quiet():
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_PUT(self) -> None:
        self._answer(body=True)

    do_POST = do_DELETE = do_PUT  # noqa: N815

    def _kind(self, key: str, query: Mapping[str, str]) -> str:
        upload = "uploadId" in query
        match self.command:
            case "PUT":
                return "part" if upload else "put"
            case "POST":
                return "complete" if upload else "create"
            case "DELETE":
                return "abort" if upload else "delete"
            case "HEAD":
                return "head"
        return "parts" if upload else "get" if key else "list"

    def _answer(self, *, body: bool) -> None:
        owner = self.server.owner
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(url.path, errors="surrogateescape").lstrip("/").partition("/")
        kind = self._kind(key, query)
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = owner.begin(
            Request(kind, key, {name.lower(): value for name, value in self.headers.items()}, query)
        )
        match fault:
            case Before(action):
                action()
            case Status(status, code, retry_after):
                self._refuse(status, code, {"Retry-After": retry_after} if retry_after else {})
                return
            case Stall(None):
                owner.closing.wait(30)
                self.close_connection = True
                return
            case Reset(None):
                self._reset()
                return
        if bucket != owner.bucket:
            self._refuse(404, "NoSuchBucket")
        elif kind == "list":
            self._send(200, {"Content-Type": "application/xml"}, self.listing(query).encode(), fault)
        elif kind in ("get", "head"):
            self._object(key, fault)
        elif isinstance(fault, Flip) and sent:
            self._change(kind, key, query, bytes([sent[0] ^ 1]) + sent[1:], None)
        else:
            self._change(kind, key, query, sent, fault)

    # Writing

    def _change(
        self, kind: str, key: str, query: Mapping[str, str], sent: bytes, fault: Fault | None
    ) -> None:
        owner, digest = self.server.owner, hashlib.md5(sent, usedforsecurity=False)
        claimed = self.headers.get("Content-MD5", "")
        if owner.digests and claimed and claimed != b64encode(digest.digest()).decode():
            self._refuse(400, "BadDigest")
            return
        with owner.lock:
            status, code, headers, body = self._changed(kind, key, query, sent)
        if isinstance(fault, Lost):
            self._reset()
        elif code:
            self._refuse(status, code)
        else:
            self._send(status, headers, body.encode(), None)

    def _changed(
        self, kind: str, key: str, query: Mapping[str, str], sent: bytes
    ) -> tuple[int, str, dict[str, str], str]:
        """Status, code of a refusal, headers and body, when it was done; with the lock held."""
        owner = self.server.owner
        there = owner.objects.get(key)
        if kind in ("put", "complete", "delete"):
            wanted = self.headers.get("If-Match")
            if wanted and (there is None or there.etag != wanted):
                return 412, "PreconditionFailed", {}, ""
            if self.headers.get("If-None-Match") and there is not None:
                return 412, "PreconditionFailed", {}, ""
        if kind == "delete":
            owner.objects.pop(key, None)
            return 204, "", {}, ""
        kept = {
            name.lower(): value
            for name, value in self.headers.items()
            if name.lower().startswith("x-amz-meta-")
        }
        if kind == "put":
            return 200, "", {"ETag": owner.take(key, Stored(sent, headers=kept))}, ""
        if kind == "create":
            name = f"upload-{len(owner.requests)}"
            owner.uploads[name] = Upload(key, kept)
            return (
                200,
                "",
                {},
                f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>",
            )
        upload = owner.uploads.get(query["uploadId"])
        if upload is None:
            return 404, "NoSuchUpload", {}, ""
        digests = {number: hashlib.md5(part, usedforsecurity=False) for number, part in upload.parts.items()}
        match kind:
            case "part":
                upload.parts[int(query["partNumber"])] = sent
                return 200, "", {"ETag": f'"{hashlib.md5(sent, usedforsecurity=False).hexdigest()}"'}, ""
            case "parts":
                listed = "".join(
                    f'<Part><PartNumber>{number}</PartNumber><ETag>"{digests[number].hexdigest()}"</ETag>'
                    f"<Size>{len(part)}</Size></Part>"
                    for number, part in sorted(upload.parts.items())
                )
                return (
                    200,
                    "",
                    {},
                    f"<ListPartsResult>{listed}<IsTruncated>false</IsTruncated></ListPartsResult>",
                )
            case "abort":
                del owner.uploads[query["uploadId"]]
                return 204, "", {}, ""
        named = re.findall(r"<ETag>(?:&quot;|\")?([0-9a-f]{32})", sent.decode())
        if named != [digests[number].hexdigest() for number in sorted(upload.parts)]:
            return 400, "InvalidPart", {}, ""
        del owner.uploads[query["uploadId"]]
        whole = hashlib.md5(b"".join(bytes.fromhex(one) for one in named), usedforsecurity=False)
        data = b"".join(part for _, part in sorted(upload.parts.items()))
        tag = owner.take(
            key, Stored(data, etag=f'"{whole.hexdigest()}-{len(named)}"', headers=upload.headers)
        )
        return (
            200,
            "",
            {},
            f"<CompleteMultipartUploadResult><ETag>{escape(tag)}</ETag></CompleteMultipartUploadResult>",
        )

    # Reading

    def _object(self, key: str, fault: Fault | None) -> None:
        with self.server.owner.lock:
            stored = self.server.owner.objects.get(key)
        if stored is None:
            self._refuse(404, "NoSuchKey")
            return
        wanted = self.headers.get("If-Match")
        if wanted not in (None, "*", stored.etag) and not isinstance(fault, IgnoreCondition):
            self._refuse(412, "PreconditionFailed")
            return
        size = len(stored.data)
        headers = {
            "ETag": stored.etag,
            "Last-Modified": formatdate(stored.mtime, usegmt=True),
            "Accept-Ranges": "bytes",
            **stored.headers,
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or isinstance(fault, NotPartial):
            self._send(200, headers, stored.data, fault)
            return
        start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if start >= size:
            self._refuse(416, "InvalidRange", {"Content-Range": f"bytes */{size}"})
            return
        said = (start, stop)
        match fault:
            case Shorten(by):
                stop -= by
                said = (start, stop)
            case Elsewhere(by, lying):
                start, stop = start + by, stop + by
                said = said if lying else (start, stop)
        headers["Content-Range"] = f"bytes {said[0]}-{said[1] - 1}/{size}"
        self._send(206, headers, stored.data[start:stop], fault)

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        body = (
            f'<?xml version="1.0"?><Error><Code>{code or status}</Code><Message>as scripted</Message></Error>'
        )
        self._send(status, {"Content-Type": "application/xml", **(headers or {})}, body.encode(), None)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, fault: Fault | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-oss-request-id", "1")
        self.end_headers()
        if self.command == "HEAD":
            return
        match fault:
            case Flip():
                body = bytes([body[0] ^ 1]) + body[1:]
            case Truncate(keep):
                self.wfile.write(body[:keep])
                self.close_connection = True
                return
            case Stall(int() as after):
                self.wfile.write(body[:after])
                self.server.owner.closing.wait(30)
                self.close_connection = True
                return
            case Reset(int() as after):
                self.wfile.write(body[:after])
                self._reset()
                return
            case Trickle(every):
                for i in range(len(body)):
                    self.wfile.write(body[i : i + 1])
                    if self.server.owner.closing.wait(every):
                        break
                return
        self.wfile.write(body)

    def _reset(self) -> None:
        # Closing with a linger time of zero is how TCP says RST.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        self.close_connection = True

    def listing(self, query: Mapping[str, str]) -> str:
        """ListObjectsV2, its names URL-encoded as clients ask for."""
        after = query.get("continuation-token") or query.get("start-after", "")
        names, last, size = self.names(query, after)
        more = f"<NextContinuationToken>{encoded(last)}</NextContinuationToken>" if last else ""
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult{self.namespace}>'
            f"<Name>{self.server.owner.bucket}</Name><Prefix>{encoded(query.get('prefix', ''))}</Prefix>"
            f"<KeyCount>{size}</KeyCount><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(bool(last)).lower()}</IsTruncated>{more}{''.join(names)}</ListBucketResult>"
        )

    def names(self, query: Mapping[str, str], after: str) -> tuple[list[str], str, int]:
        """The elements of one page, the last name on it if there are more pages, and how many they are."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        limit = int(query.get("max-keys", "1000"))
        with self.server.owner.lock:
            objects = dict(self.server.owner.objects)
        found: dict[str, str] = {}
        for key in sorted(objects, key=_raw):
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            name = key if cut < 0 else key[: cut + 1]
            if not key.startswith(prefix) or name in found or _raw(name) <= _raw(after):
                continue
            if len(found) == limit:
                return list(found.values()), list(found)[-1], limit
            if cut < 0:
                found[name] = self._contents(name, objects[key])
            else:
                found[name] = f"<CommonPrefixes><Prefix>{encoded(name)}</Prefix></CommonPrefixes>"
        return list(found.values()), "", len(found)

    def _contents(self, key: str, stored: Stored) -> str:
        when = datetime.fromtimestamp(stored.mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        return (
            f"<Contents><Key>{encoded(key)}</Key><LastModified>{when}</LastModified>"
            f"<ETag>{escape(stored.etag)}</ETag><Type>Normal</Type><Size>{len(stored.data)}</Size>"
            f"<StorageClass>{stored.storage_class}</StorageClass></Contents>"
        )


def encoded(name: str) -> str:
    """`name` as it stands in a listing with encoding-type=url."""
    return quote(name, safe="/", errors="surrogateescape")


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
