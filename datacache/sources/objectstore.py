"""
The door to obstore: the bytes of every object store.

`get` is the one way in which bytes are read. It asks once, holds what the store says of its answer
(range, size, entity tag) against what was asked *before* it takes the body, and returns the body
without a copy. `ObjectStoreSource` is a source made of an obstore store alone (Google, Azure);
`ObjectStoreSink` writes to those;
`datacache.sources.s3` reads through `get` and lists by botocore; `datacache.sources.website` reads
through it too.

obstore releases the GIL while it waits and while it copies. It is not fork-safe: whoever forks does
so before the first request. Its blocking calls cannot be interrupted, so a store that trickles would
hold up whoever closes for as long as --timeout: each source has `Calls`, which awaits obstore's other
calls in a thread of its own, and gives them up when it is closed. Small objects are read by blocking calls
all the same, part by part, so that a close waits for a stalled one for as long as --stall-timeout.
"""

import asyncio
import re
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from datacache.config.settings import SourceSettings
from datacache.errors import (
    NotFound,
    SourceError,
    Stopped,
    Unavailable,
    Unsupported,
    VersionChanged,
    WrongBytes,
)
from datacache.model import ByteRange, MiB, ObjectInfo, TiB, Version
from datacache.sources.answers import failure
from datacache.sources.keyfile import Keys
from datacache.sources.listing import entity_tag
from datacache.sources.sink import (
    ANYTHING,
    NOTHING,
    SIZE,
    Content,
    Expected,
    Put,
    SinkTraits,
    Stored,
    as_headers,
    check_content,
    fits,
    from_headers,
    require,
)  # fmt: skip
from datacache.sources.source import Page, Traits

Store = S3Store | GCSStore | AzureStore | HTTPStore
T = TypeVar("T")

SMALL = 1 << 20
"""Bytes up to which a read is a blocking call: an awaited one costs 0.4 ms of CPU more, a quarter of all that
a cold file of 100 KiB costs, and nothing that can be measured where megabytes come."""

CONNECTIONS = 64
"""Idle connections that are kept: the reader's default concurrency is 32."""

# obstore throws the answer's parts away and keeps them as text, then a dump of its own structures.
_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})[^:]*: ?(.*)", re.DOTALL)
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9_.]{1,80})\s*</Code>")
_MESSAGE = re.compile(r"<Message>(.*?)</Message>", re.DOTALL)
_HOST = re.compile(r"Error performing [A-Z]+ (https?://[^/?]+)")  # not its query: Azure's holds secrets
_KIND = re.compile(r"\bkind: ([A-Z][A-Za-z]+)")
_WRONG = re.compile(r"Received non-partial response|Requested \d+\.\.\d+, got|Wanted range starting at")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_BY_TYPE: Mapping[str, int] = {
    "FileNotFoundError": 404,
    "PermissionDeniedError": 403,
    "UnauthenticatedError": 401,
    "PreconditionError": 412,
    "NotModifiedError": 412,
    "NotSupportedError": 501,
}


def can_name(key: str) -> bool:
    """Whether obstore asks for exactly `key`. It refuses empty and dotted segments and control
    characters, and silently drops a slash at either end."""
    if not key or _CONTROL.search(key) or (not key.isprintable() and _has_surrogate(key)):
        return False
    return not any(part in ("", ".", "..") for part in key.split("/"))


def _has_surrogate(key: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in key)


def translate(error: Exception, thing: str) -> SourceError:
    """The error of ours that an error of obstore's is. `thing` is the URI that was asked for."""
    text, _, dump = str(error).partition("\n\nDebug source:")
    if match := _STATUS.search(text):
        body = match[2]
        code, message = _CODE.search(body), _MESSAGE.search(body)
        return failure(
            thing, status=int(match[1]), code=code[1] if code else "",
            message=message[1] if message else "" if code else body[:200],
        )  # fmt: skip
    if "without LOCATION" in text:  # how AWS answers for a bucket of another region
        return failure(thing, status=301, code="PermanentRedirect")
    if status := _BY_TYPE.get(type(error).__name__):
        return failure(thing, status=status)
    if _WRONG.search(text):
        return WrongBytes(
            f"{thing}: the store answered with another range than was asked for ({text.strip()})"
        )
    if isinstance(error, (ValueError, UnicodeEncodeError)):
        return Unsupported(f"{thing} has a name that this client cannot ask for")
    # What remains never became an answer: connect, time-out, reset, a body that broke off.
    kind = _KIND.search(dump)
    detail = {
        "Timeout": "no byte came in time",
        "Connect": "no connection",
        "Interrupted": "the answer broke off",
    }
    said = detail.get(kind[1], kind[1]) if kind else ""
    host = _HOST.search(text)
    where = f" from {host[1]}" if host else ""
    return Unavailable(f"{thing} cannot be had right now{where} ({said or _last(text)})")


def _last(text: str) -> str:
    return text.strip().rpartition(": ")[2][:200] or "no answer"


def _asking(act: Callable[[], Any], thing: str) -> Any:
    """The result of `act`, or the error of ours that it means."""
    try:
        return act()
    except (BaseError, OSError, ValueError) as error:
        raise translate(error, thing) from error


class Calls:
    """Calls of obstore under way, which `close` gives up: an event loop in a thread that the first starts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Calls {'closed' if self._closed else 'open' if self._thread else 'idle'}>"

    def result(self, ask: Callable[[], Coroutine[Any, Any, T]], thing: str) -> T:
        """What `ask` comes to. Raises what it does, and Unavailable after `close`."""
        with self._lock:
            if self._closed:
                raise Unavailable(f"{thing} is not asked for: its source is closed")
            future = asyncio.run_coroutine_threadsafe(ask(), self._running())
        try:
            return future.result()
        except CancelledError:
            raise Unavailable(f"{thing} was given up: its source is closed") from None
        except BaseException:
            future.cancel()  # an interrupt of the caller's; no-op where it is the call's own end
            raise

    def check(self, thing: str) -> None:
        """Raise Unavailable after `close`."""
        if self._closed:
            raise Unavailable(f"{thing} was given up: its source is closed")

    def close(self) -> None:
        """Give up what is under way; nothing is asked any more. Idempotent."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            assert self._loop is not None and self._end is not None
            self._loop.call_soon_threadsafe(self._end.set)
            thread.join()

    def _running(self) -> asyncio.AbstractEventLoop:
        """The loop; under the lock."""
        if self._thread is None:
            begun: Future[None] = Future()
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._serve(begun)), name="store-calls", daemon=True
            )
            self._thread.start()
            begun.result()
        assert self._loop is not None
        return self._loop

    async def _serve(self, begun: "Future[None]") -> None:
        """Until `close`; whatever is under way then is cancelled with this."""
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        begun.set_result(None)
        await self._end.wait()


def get(calls: Calls, store: Store, key: str, info: ObjectInfo, span: ByteRange, *, thing: str) -> memoryview:
    """Bytes `span` of exactly `info`'s version of `key`: one GET request, no copy.

    Raises VersionChanged, WrongBytes, ... before the body is fetched where the answer's head tells.
    """
    whole = span.start == 0 and span.stop == info.size
    options: Any = {}
    if not whole:  # a whole object needs no Range, so servers without ranges can serve it
        options["range"] = (span.start, span.stop)
    if info.version.condition:
        options["if_match"] = info.version.condition
    if info.version.version_id:
        options["version"] = info.version.version_id

    def check(result: Any) -> None:
        meta = result.meta
        check_answer(
            info, span, got=ByteRange(*result.range), size=meta["size"],
            etag=entity_tag(meta.get("e_tag")), version_id=meta.get("version") or "", thing=thing,
        )  # fmt: skip

    async def awaited() -> Any:
        result = await obstore.get_async(store, key, options=options)
        check(result)
        return await result.bytes_async()

    def waited_for() -> Any:
        calls.check(thing)
        result = obstore.get(store, key, options=options)
        check(result)
        parts = []
        for part in result.stream(min_chunk_size=1):
            calls.check(thing)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    small = span.length <= SMALL
    data = memoryview(_asking(waited_for if small else lambda: calls.result(awaited, thing), thing))
    if data.nbytes != span.length:
        raise WrongBytes(f"{thing}: {span.length} bytes were asked for, {data.nbytes} came")
    return data


def check_answer(
    info: ObjectInfo, span: ByteRange, *, got: ByteRange, size: int, etag: str, version_id: str, thing: str
) -> None:
    """Hold what a store says of its answer against what was asked."""
    wanted = info.version
    # A weak tag says that nothing but the bytes may differ; the mark itself comes and goes.
    if etag and wanted.etag and etag.removeprefix("W/") != wanted.etag.removeprefix("W/"):
        raise VersionChanged(f"{thing} no longer has the version {wanted.etag}; it is {etag} now")
    if wanted.version_id and version_id and version_id != wanted.version_id:
        raise WrongBytes(f"{thing}: version {wanted.version_id} was asked for, {version_id} came")
    if size != info.size:
        if wanted.etag and etag:
            raise WrongBytes(f"{thing}: version {wanted.etag} has {info.size} bytes, the answer is of {size}")
        raise VersionChanged(f"{thing} had {info.size} bytes and has {size} now")
    # Where there is both, the tag is enough: the same tag is the same bytes, whatever id they have.
    if (wanted.condition and not etag) or (wanted.version_id and not wanted.condition and not version_id):
        raise WrongBytes(f"{thing}: the answer does not say which version it is of")
    if got != span:
        raise WrongBytes(f"{thing}: bytes {span} were asked for, {got} came")


def _client_options(settings: SourceSettings, *, url: str, ca_bundle: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "allow_http": not url.startswith("https:"),
        "connect_timeout": timedelta(seconds=settings.connect_timeout),
        "read_timeout": timedelta(seconds=settings.stall_timeout),
        "timeout": timedelta(seconds=settings.timeout),
        "pool_max_idle_per_host": str(CONNECTIONS),
    }
    if ca_bundle:
        with open(ca_bundle, "rb") as file:
            options["root_certificate"] = file.read()
    return options


# Retries are `datacache.sources.steady`'s: two layers of them would multiply.
_ONCE: Any = {"max_retries": 0}


def s3_store(
    name: str, *, endpoint: str, region: str, style: str, keys: Keys | None, requester_pays: bool,
    ca_bundle: str, settings: SourceSettings,
) -> S3Store:  # fmt: skip
    """A client of one bucket; `endpoint` is the store's. No `keys`: requests are not signed."""
    if style == "virtual":  # obstore wants the bucket in the endpoint then
        scheme, _, host = endpoint.partition("://")
        endpoint = f"{scheme}://{name}.{host}"
    config: Any = {
        # All that has a variable is set: obstore would look into os.environ for the rest.
        "endpoint": endpoint,
        "region": region,
        "virtual_hosted_style_request": style != "path",
        "request_payer": requester_pays,
        "skip_signature": keys is None,
    }
    return S3Store(
        name, config=config, retry_config=_ONCE, credential_provider=_fixed(keys) if keys else None,
        client_options=_client_options(settings, url=endpoint, ca_bundle=ca_bundle),  # type: ignore[arg-type]
    )  # fmt: skip


def _fixed(keys: Keys) -> Any:
    """A provider of these keys for ever: whoever has new keys makes a new store. (Keys set in the
    configuration instead would be joined by the AWS_SESSION_TOKEN of this process.)"""
    return lambda: {
        "access_key_id": keys.access_key, "secret_access_key": keys.secret_key,
        "token": keys.token or None, "expires_at": None,
    }  # fmt: skip


def gcs_store(name: str, *, config: Mapping[str, Any], ca_bundle: str, settings: SourceSettings) -> GCSStore:
    """A client of one Google bucket."""
    options = _client_options(settings, url=config.get("base_url", "https:"), ca_bundle=ca_bundle)
    return GCSStore(name, config=dict(config), retry_config=_ONCE, client_options=options)  # type: ignore[arg-type]


def azure_store(
    name: str, *, config: Mapping[str, Any], ca_bundle: str, settings: SourceSettings
) -> AzureStore:
    """A client of one Azure container."""
    options = _client_options(settings, url=config.get("endpoint", "https:"), ca_bundle=ca_bundle)
    return AzureStore(name, config=dict(config), retry_config=_ONCE, client_options=options)  # type: ignore[arg-type]


def http_store(url: str, *, ca_bundle: str, settings: SourceSettings) -> HTTPStore:
    """A client of a web server, for paths below `url`."""
    options = _client_options(settings, url=url, ca_bundle=ca_bundle)
    return HTTPStore(url, retry_config=_ONCE, client_options=options)  # type: ignore[arg-type]


def head(calls: Calls, store: Store, key: str, *, thing: str) -> ObjectInfo:
    """Size and version of one object, under its whole key."""

    async def ask() -> Any:
        return await obstore.head_async(store, key)

    return _info(_asking(lambda: calls.result(ask, thing), thing))


def _info(meta: Mapping[str, Any], *, skip: int = 0) -> ObjectInfo:
    modified: datetime | None = meta.get("last_modified")
    stamp = round(modified.timestamp() * 1000) * 1_000_000 if modified else 0
    etag = entity_tag(meta.get("e_tag"))
    version = Version(etag) if etag else Version(stamp=f"{meta['size']}-{stamp}")
    return ObjectInfo(meta["path"][skip:], meta["size"], version, stamp)


def _pages(
    calls: Calls, store: Store, under: str, *, thing: str
) -> Iterator[tuple[list[Mapping[str, Any]], list[str]]]:
    """A recursive listing, page by page: objects, and never a prefix."""
    stream = obstore.list(store, under, chunk_size=1000)

    async def following() -> Any:
        return await anext(stream, None)

    while chunk := _asking(lambda: calls.result(following, thing), thing):
        yield chunk, []


WHOLE = 64 * MiB
"""Bytes up to which an object is put in one conditional request, from memory."""
_PIECE = 8 * MiB
_HEADERS = frozenset(
    {"content-disposition", "content-encoding", "content-language", "content-type", "cache-control"}
)


def patient(settings: SourceSettings) -> SourceSettings:
    """How a store is talked to that is written to: nobody waits for that, and a body may be large."""
    return replace(
        settings, timeout=max(600.0, settings.timeout), stall_timeout=max(60.0, settings.stall_timeout)
    )


class ObjectStoreSink:
    """A bucket of Google's or Azure's, written to by obstore.

    Up to WHOLE bytes in one request with a condition of the store's own; more in parts, without
    one: the store is asked before. Nothing is resumed. Keys that obstore cannot carry, directory markers
    among them, are Unsupported, and so are copies: theirs keep the origin's metadata.
    """

    def __init__(self, store: Store, *, uri: str, prefix: str) -> None:
        self._store, self._uri, self._prefix = store, uri, prefix

    def __repr__(self) -> str:
        return f"<ObjectStoreSink {self._uri}>"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def traits(self) -> SinkTraits:
        return SinkTraits(conditional=True, copies=False, resumable=False, largest=TiB)

    def accepts(self, key: str) -> bool:
        return can_name(self._prefix + key) and fits(self._prefix + key)

    def check_writable(self) -> None:
        # Of what is not there, on condition that it has a version that nothing has.
        whole = f"{self._prefix}.datacache-condition-{uuid.uuid4().hex}"
        try:
            self._send(whole, b"", self._uri, mode={"e_tag": '"0"', "version": "1"}, use_multipart=False)
        except VersionChanged:
            return
        with suppress(NotFound):  # an emulator that passes over conditions
            _asking(lambda: obstore.delete(self._store, whole), self._uri)

    def put(
        self, key: str, content: Content, *, expected: Expected, metadata: Mapping[str, str], put: Put
    ) -> Stored:
        whole, thing = self._whole(key), self._thing(key)
        check_content(key, content, self.traits.largest, thing)
        headers = as_headers(metadata)
        mode: Any = "overwrite"
        if expected is NOTHING:
            mode = "create"
        elif expected is not ANYTHING:
            seen = self._look(key)
            require(self._info(key, seen) if seen else None, expected, thing)
            assert seen is not None
            # Google knows versions by number, Azure by tag; the number is not in ours.
            mode = {name: seen[name] for name in ("e_tag", "version") if seen.get(name)}

        def pieces() -> Iterator[bytes]:
            for start in range(0, content.size, _PIECE):
                length = min(_PIECE, content.size - start)
                if put.stopped():
                    raise Stopped(f"a put of {thing} was given up after {start} bytes")
                put.sent(length)
                yield bytes(content.read(start, length))

        if content.size <= WHOLE:
            data = b"".join(pieces())
            if put.stopped():
                raise Stopped(f"a put of {thing} was given up before it was sent")
            self._send(whole, data, thing, attributes=headers, mode=mode, use_multipart=False)
        else:
            if expected is NOTHING:
                require(self._found(key), expected, thing)
            stopped: list[Stopped] = []

            def watched() -> Iterator[bytes]:
                try:
                    yield from pieces()
                except Stopped as error:
                    stopped.append(error)
                    raise

            try:
                self._send(
                    whole, watched(), thing, attributes=headers, use_multipart=True, chunk_size=_PIECE,
                    max_concurrency=4,
                )  # fmt: skip
            except SourceError:
                if stopped:
                    raise stopped[0] from None
                raise
        found = self._found(key)
        if found is None or found.size != content.size:
            raise WrongBytes(
                f"{thing} is not what was put: {found.size if found else 'nothing'} stands there"
            )
        return Stored(found, from_headers(headers), SIZE)

    def copy(
        self, origin: ObjectInfo, key: str, *, expected: Expected, metadata: Mapping[str, str]
    ) -> Stored:
        raise Unsupported(f"{self._uri}: the store copies no objects for us")

    def delete(self, key: str, *, expected: Expected) -> None:
        if expected is NOTHING:
            raise ValueError("a delete that expects nothing")
        if not self.accepts(key):
            return  # so it is not there
        found = self._found(key)
        if found is None:
            return
        require(found, expected, self._thing(key))
        with suppress(NotFound):
            _asking(lambda: obstore.delete(self._store, self._whole(key)), self._thing(key))

    def find(self, key: str) -> Stored | None:
        if not can_name(self._prefix + key):
            return None
        options: Any = {"head": True}
        try:
            answer = _asking(
                lambda: obstore.get(self._store, self._prefix + key, options=options), self._thing(key)
            )
        except NotFound:
            return None
        metadata = {name: value for name, value in answer.attributes.items() if name.lower() not in _HEADERS}
        return Stored(self._info(key, answer.meta), from_headers(metadata), SIZE)

    def abandon(self, key: str, resume: str) -> None:
        """Nothing is left: what is given up is aborted at once."""

    def close(self) -> None:
        """Connections go with the store."""

    def _send(self, whole: str, body: Any, thing: str, **more: Any) -> None:
        try:
            _asking(lambda: obstore.put(self._store, whole, body, **more), thing)
        except SourceError as error:
            if type(error.__cause__).__name__ in ("AlreadyExistsError", "PreconditionError"):
                raise VersionChanged(f"{thing} is not what was expected there") from error
            raise

    def _look(self, key: str) -> Mapping[str, Any] | None:
        try:
            meta: Mapping[str, Any] = _asking(
                lambda: obstore.head(self._store, self._whole(key)), self._thing(key)
            )
        except NotFound:
            return None
        return meta

    def _found(self, key: str) -> ObjectInfo | None:
        seen = self._look(key)
        return self._info(key, seen) if seen else None

    def _info(self, key: str, meta: Mapping[str, Any]) -> ObjectInfo:
        return _info(meta)._replace(key=key)

    def _whole(self, key: str) -> str:
        if not can_name(self._prefix + key):
            raise Unsupported(f"{self._thing(key)} has a name that this client cannot ask for")
        return self._prefix + key

    def _thing(self, key: str) -> str:
        return f"{self._uri.partition('?')[0].rstrip('/')}/{key}"


class ObjectStoreSource:
    """A bucket of Google's or Azure's: listed, statted and read by obstore.

    Their listings come through object_store's paths. A key that those cannot carry (`a//b`, `..`)
    makes its listing Unsupported; a directory marker `dir/` comes as an empty object `dir` and is
    dropped where `dir/` has other objects.
    """

    def __init__(self, store: Store, *, uri: str, prefix: str, md5_etag: bool = False) -> None:
        self._store, self._uri, self._prefix = store, uri, prefix
        self._traits = Traits(conditional=True, md5_etag=md5_etag)
        self._calls = Calls()

    def __repr__(self) -> str:
        return f"<ObjectStoreSource {self._uri}>"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def traits(self) -> Traits:
        return self._traits

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        if versions:
            raise Unsupported(f"{self._uri}: versions are not listed at this store")
        under = self._prefix + prefix
        if recursive:
            pages = _pages(self._calls, self._store, under, thing=self._uri)
        else:

            async def ask() -> Any:
                return await obstore.list_with_delimiter_async(self._store, under)

            answer = _asking(lambda: self._calls.result(ask, self._uri), self._uri)
            names = [name + "/" for name in answer["common_prefixes"]]
            pages = iter([(answer["objects"], names)])
        held: ObjectInfo | None = None  # an empty object that may turn out to be a directory's marker
        for objects, names in pages:
            folded = {name[len(self._prefix) :] for name in names}
            kept: list[ObjectInfo] = []
            for meta in objects:
                info = _info(meta, skip=len(self._prefix))
                if held is not None and not info.key.startswith(held.key + "/"):
                    kept.append(held)
                held = None
                if info.size == 0 and info.key + "/" not in folded:
                    held = info
                elif info.size:
                    kept.append(info)
            yield Page(kept, sorted(folded))
        if held is not None:
            yield Page([held], [])

    def stat(self, key: str) -> ObjectInfo:
        self._check(key)
        found = head(self._calls, self._store, self._prefix + key, thing=self._thing(key))
        return found._replace(key=key)

    def read(self, info: ObjectInfo, span: ByteRange) -> memoryview:
        self._check(info.key)
        return get(self._calls, self._store, self._prefix + info.key, info, span, thing=self._thing(info.key))

    def close(self) -> None:
        """Give up what is under way. Connections go with the store."""
        self._calls.close()

    def _thing(self, key: str) -> str:
        return f"{self._uri.partition('?')[0].rstrip('/')}/{key}"

    def _check(self, key: str) -> None:
        if not can_name(self._prefix + key):
            raise Unsupported(f"{self._thing(key)} has a name that this client cannot ask for")
