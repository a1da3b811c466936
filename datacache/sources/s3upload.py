"""
Buckets of S3 and of what speaks it, written to.

Up to `SINGLE` bytes an object is one request. More goes in parts, several at once, which outlive this
process: what is remembered of an upload is its id and the size of its parts, and when it goes on, a part
counts as sent only if the store lists it with the MD5 of our bytes (or with the tag that it gave for them,
where its tags are no MD5: those are remembered). No part is then sent twice.

Every body carries its MD5, so that the store refuses damaged bytes; what the store answers is held against
it once more, since some stores pass over the header. Where a tag is not the MD5, the store encrypts with
keys of its own (then only the size is compared) or makes tags in its own way (then a small object is
read back, once).

Conditions. Single puts carry If-Match or If-None-Match. Some stores pass over those, so the bucket is asked
once, by a put that must fail: of a key that is not there, on condition that it has a version
that nothing has. A store that stores it (it is removed again) is asked with HEAD before each put, with a
window between the two. Completions, copies and deletes are always preceded by a HEAD, and carry the condition
too: versitygw passes over it in copies, and more stores in completions. OSS is not sent any.
"""

import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import blake2b, md5
from typing import Any, NamedTuple, TypeVar

from datacache.clock import Clock
from datacache.config.settings import SourceSettings
from datacache.errors import (
    NotFound,
    SourceError,
    Stopped,
    Unsupported,
    VersionChanged,
    WrongBytes,
)
from datacache.model import Buffer, ByteRange, GiB, MiB, ObjectInfo, TiB, Version
from datacache.sources.aws import Answer, Bucket, Credentials, S3Client
from datacache.sources.listing import version_of
from datacache.sources.sink import (
    ANYTHING,
    DIGEST,
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
)

_log = logging.getLogger(__name__)
T = TypeVar("T")

PART = 16 * MiB
MOST_PARTS = 10_000
LARGEST = 5 * TiB
LARGEST_COPY = 5 * GiB
"""Bytes that one copy request copies at most."""
PARTS_AT_ONCE = 4
STALL = 60.0
"""Seconds without a byte after which a request is given up. Stores answer a completion or a copy when it is
done, and nobody waits for an upload as for a read."""
_NEVER = '"00000000000000000000000000000000"'
_PROBE = ".datacache-condition-"
"""What the names begin with that the bucket is asked about."""


def plan(size: int, part: int = PART) -> list[ByteRange]:
    """The parts of `size` bytes: of `part` bytes, or as much more as keeps them to MOST_PARTS."""
    if size > part * MOST_PARTS:
        part = -(-size // MOST_PARTS)
        part = -(-part // MiB) * MiB
    return [ByteRange(at, min(at + part, size)) for at in range(0, size, part)]


def composite(digests: list[bytes]) -> str:
    """The entity tag that S3 gives to what was put in parts with these MD5s."""
    return f'"{md5(b"".join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"'


class _State(NamedTuple):
    """What is remembered of an upload."""

    upload: str
    part: int
    mark: str
    """Of what it is an upload: another object, or other metadata, needs another upload."""
    tags: dict[str, list[str]]
    """Entity tag and MD5 by part number, of those parts whose tag is not their MD5."""

    def text(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def of(cls, text: str) -> "_State | None":
        with suppress(ValueError, TypeError, KeyError):
            fields = json.loads(text)
            return cls(
                str(fields["upload"]), int(fields["part"]), str(fields["mark"]),
                {str(number): [str(tag), str(digest)] for number, (tag, digest) in fields["tags"].items()},
            )  # fmt: skip
        return None


class S3Sink:
    """One bucket and prefix. `bucket` is what `aws.find_bucket` made of it."""

    def __init__(
        self,
        bucket: Bucket,
        *,
        settings: SourceSettings,
        clock: Clock,
        part: int = PART,
        parts_at_once: int = PARTS_AT_ONCE,
    ) -> None:
        self._bucket = bucket
        self._credentials = Credentials(bucket, clock=clock)
        patient = replace(
            settings, stall_timeout=max(STALL, settings.stall_timeout), timeout=max(STALL, settings.timeout)
        )
        self._client = S3Client(bucket, self._credentials, patient)
        self._part, self._parts_at_once = part, parts_at_once
        self._lock = threading.Lock()  # held while the bucket is asked about conditions
        self._conditional: bool | None = False if bucket.scheme == "oss" else None

    def __repr__(self) -> str:
        return f"<S3Sink {self.uri} {self._credentials!r}>"

    @property
    def uri(self) -> str:
        return self._bucket.uri

    @property
    def traits(self) -> SinkTraits:
        return SinkTraits(conditional=self._asked(), copies=True, resumable=True, largest=LARGEST)

    def accepts(self, key: str) -> bool:
        return fits(self._whole(key))

    def check_writable(self) -> None:
        with self._lock:
            if self._conditional is not False:
                self._conditional = self._signed(self._ask)
                return
        key = self._whole(f"{_PROBE}{uuid.uuid4().hex}")  # an upload that nobody sees is begun, and ended

        def begin_and_abort() -> None:
            self._client.abort(key, self._client.begin(key))

        with _unnamed(key.removeprefix(self._bucket.prefix)):
            self._signed(begin_and_abort)

    def put(
        self, key: str, content: Content, *, expected: Expected, metadata: Mapping[str, str], put: Put
    ) -> Stored:
        check_content(key, content, LARGEST, self._thing(key))
        headers = as_headers(metadata)
        if content.size <= self._part:
            return self._single(key, content, expected, headers, put)
        return self._in_parts(key, content, expected, headers, put)

    def copy(
        self, origin: ObjectInfo, key: str, *, expected: Expected, metadata: Mapping[str, str]
    ) -> Stored:
        headers = as_headers(metadata)
        try:
            seen = self._signed(lambda: self._client.look(self._whole(origin.key)))
        except NotFound as error:
            raise VersionChanged(f"{error}, so it cannot be copied") from error
        require(seen.info, origin.version._replace(version_id=""), self._thing(origin.key))
        self._look(key, expected)
        whole, size = self._whole(key), seen.info.size
        source = self._client.origin_of(self._whole(origin.key), origin.version)
        condition = self._condition(expected)
        more: dict[str, Any] = {**seen.headers, "Metadata": headers}

        def piecewise() -> Answer:
            upload = self._client.begin(whole, **more)
            try:
                tags = {
                    number: self._client.part_of(whole, upload, number, source, span)
                    for number, span in enumerate(plan(size, LARGEST_COPY // 10), 1)
                }
                return self._client.complete(whole, upload, tags, condition=condition)
            except SourceError:
                with suppress(SourceError):
                    self._client.abort(whole, upload)
                raise

        try:
            if size > LARGEST_COPY:
                answer = self._signed(piecewise)
            else:
                answer = self._signed(lambda: self._client.copied(whole, source, condition=condition, **more))
        except NotFound as error:
            if "NoSuchKey" in str(error):
                raise VersionChanged(f"{error}; what was to be copied has gone") from error
            raise
        proven = _is_md5(answer.etag) and answer.etag.lower() == origin.version.etag.lower()
        return self._stored(key, answer, size, headers, proven=proven)

    def delete(self, key: str, *, expected: Expected) -> None:
        if expected is NOTHING:
            raise ValueError("a delete that expects nothing")
        condition: Mapping[str, str] = {}
        if expected is not ANYTHING:
            found = self.find(key)
            if found is None:
                return
            require(found.info, expected, self._thing(key))
            condition = self._condition(expected)
        with suppress(NotFound):
            self._signed(lambda: self._client.remove(self._whole(key), condition=condition))

    def find(self, key: str) -> Stored | None:
        try:
            seen = self._signed(lambda: self._client.look(self._whole(key)))
        except NotFound:
            return None
        return Stored(seen.info._replace(key=key), from_headers(seen.metadata), SIZE)

    def abandon(self, key: str, resume: str) -> None:
        if (state := _State.of(resume)) is not None:
            with suppress(NotFound):
                self._signed(lambda: self._client.abort(self._whole(key), state.upload))

    def close(self) -> None:
        self._client.close()

    # ---- one request --------------------------------------------------------------------------

    def _single(
        self, key: str, content: Content, expected: Expected, headers: Mapping[str, str], put: Put
    ) -> Stored:
        if not self._condition(expected):
            self._look(key, expected)
        data = self._take(content, ByteRange(0, content.size), put)
        digest = md5(data, usedforsecurity=False)
        condition = self._condition(expected)
        answer = self._signed(
            lambda: self._client.store(
                self._whole(key), data, md5=digest.digest(), condition=condition, Metadata=headers
            )
        )
        proven = _tag(answer) == digest.hexdigest()
        if not proven and _is_md5(answer.etag) and not answer.opaque:
            self._read_back(key, answer, data)
            proven = True
        return self._stored(key, answer, content.size, headers, proven=proven)

    def _read_back(self, key: str, answer: Answer, sent: Buffer) -> None:
        """Look at the bytes, whose tag is not their MD5. Should they be others, they are removed."""
        found = self._signed(
            lambda: self._client.get(self._whole(key), None, condition=answer.etag, version_id="")
        )
        if found.data == sent:
            return
        with suppress(SourceError):
            self._signed(lambda: self._client.remove(self._whole(key), condition={"IfMatch": answer.etag}))
        raise WrongBytes(f"{self._thing(key)}: the store has stored other bytes than were sent")

    def _take(self, content: Content, span: ByteRange, put: Put) -> Buffer:
        if put.stopped():
            raise Stopped(f"a put into {self.uri} was given up before its bytes {span}")
        put.sent(span.length)
        data = content.read(span.start, span.length)
        if len(data) != span.length:
            raise WrongBytes(f"{span.length} bytes {span} were to be sent, of which there are {len(data)}")
        return data

    # ---- in parts -----------------------------------------------------------------------------

    def _in_parts(
        self, key: str, content: Content, expected: Expected, headers: Mapping[str, str], put: Put
    ) -> Stored:
        whole = self._whole(key)
        state, sent = self._resumed(key, content, headers, put)
        if state is None or not sent:
            # What cannot end well need not begin; and an upload that has gone may have been completed.
            found = self.find(key) if expected is not ANYTHING or put.resume else None
            if (
                put.resume
                and found is not None
                and self._is_this(found, content, headers, _State.of(put.resume))
            ):
                return found._replace(verified=DIGEST)
            require(found and found.info, expected, self._thing(key))
        if state is None:
            upload = self._signed(lambda: self._client.begin(whole, Metadata=headers))
            part = plan(content.size, self._part)[0].length
            state = _State(upload, part, _mark(key, content.size, headers), {})
            put.remember(state.text())
        spans = dict(enumerate(plan(content.size, state.part), 1))
        tags, digests = self._send(whole, content, spans, state, sent, put)
        self._look(key, expected)
        answer = self._signed(
            lambda: self._client.complete(whole, state.upload, tags, condition=self._condition(expected))
        )
        proven = answer.etag.lower() == composite([digests[number] for number in spans])
        return self._stored(key, answer, content.size, headers, proven=proven)

    def _resumed(
        self, key: str, content: Content, headers: Mapping[str, str], put: Put
    ) -> tuple[_State | None, dict[int, tuple[str, int]]]:
        """The upload that goes on, and its parts at the store; None: there is none."""
        state = _State.of(put.resume)
        if state is None:
            return None, {}
        if state.mark != _mark(key, content.size, headers):
            self.abandon(key, put.resume)
            return None, {}
        with suppress(NotFound):
            return state, self._signed(lambda: self._client.parts(self._whole(key), state.upload))
        return None, {}

    def _is_this(
        self, found: Stored, content: Content, headers: Mapping[str, str], state: _State | None
    ) -> bool:
        """Whether what was found is what an upload that has gone would have made: its answer was lost."""
        if state is None or found.info.size != content.size or found.metadata != from_headers(headers):
            return False
        spans = plan(content.size, state.part)
        digests = (content.read(span.start, span.length) for span in spans)
        tag = composite([md5(data, usedforsecurity=False).digest() for data in digests])
        return found.info.version.etag.lower() == tag

    def _send(
        self, whole: str, content: Content, spans: Mapping[int, ByteRange], state: _State,
        sent: Mapping[int, tuple[str, int]], put: Put,
    ) -> tuple[dict[int, str], dict[int, bytes]]:  # fmt: skip
        """Send what the store has not; entity tag and MD5 of all parts."""
        tags: dict[int, str] = {}
        digests: dict[int, bytes] = {}
        under_way: dict[Future[str], int] = {}

        def settle(done: set[Future[str]]) -> None:
            for future in done:
                number = under_way.pop(future)
                tags[number] = future.result()
                if tags[number].strip('"').lower() != digests[number].hex():
                    state.tags[str(number)] = [tags[number], digests[number].hex()]
                    put.remember(state.text())

        with ThreadPoolExecutor(self._parts_at_once, thread_name_prefix="datacache-part") as pool:
            try:
                for number, span in spans.items():
                    if len(under_way) == self._parts_at_once:
                        settle(wait(under_way, return_when=FIRST_COMPLETED).done)
                    if number in sent:
                        data = content.read(span.start, span.length)
                        digests[number] = md5(data, usedforsecurity=False).digest()
                        if tag := _trusted(sent[number], span.length, digests[number], state, number):
                            tags[number] = tag
                            continue
                    data = self._take(content, span, put)
                    digests[number] = md5(data, usedforsecurity=False).digest()
                    under_way[
                        pool.submit(self._send_part, whole, state.upload, number, data, digests[number])
                    ] = number
                    del data
                while under_way:
                    settle(wait(under_way, return_when=FIRST_COMPLETED).done)
            finally:
                for future in under_way:
                    future.cancel()
        return tags, digests

    def _send_part(self, whole: str, upload: str, number: int, data: Buffer, digest: bytes) -> str:
        answer = self._signed(lambda: self._client.part(whole, upload, number, data, md5=digest))
        if _is_md5(answer.etag) and not answer.opaque and _tag(answer) != digest.hex():
            raise WrongBytes(f"part {number} of {whole!r} in {self.uri} arrived with the MD5 {answer.etag}")
        return answer.etag

    # ---- conditions ---------------------------------------------------------------------------

    def _condition(self, expected: Expected) -> Mapping[str, str]:
        if expected is ANYTHING or not self._asked():
            return {}
        if isinstance(expected, Version):
            return {"IfMatch": expected.condition} if expected.condition else {}
        return {"IfNoneMatch": "*"}

    def _look(self, key: str, expected: Expected) -> None:
        if expected is not ANYTHING:
            found = self.find(key)
            require(found and found.info, expected, self._thing(key))

    def _asked(self) -> bool:
        """Whether the store keeps to conditions."""
        with self._lock:
            if self._conditional is None:
                self._conditional = self._signed(self._ask)
            return self._conditional

    def _ask(self) -> bool:
        name = f"{_PROBE}{uuid.uuid4().hex}"
        key = self._bucket.prefix + name
        nothing = md5(b"", usedforsecurity=False).digest()
        try:
            with _unnamed(name):
                self._client.store(key, b"", md5=nothing, condition={"IfMatch": _NEVER})
        except VersionChanged:
            return True
        except Unsupported as error:
            _log.info("%s knows no conditional puts: %s", self.uri, error)
            return False
        self._client.remove(key, condition={})
        _log.info("%s passes over the conditions of puts; it is asked before each", self.uri)
        return False

    # ---- answers ------------------------------------------------------------------------------

    def _stored(
        self, key: str, answer: Answer, size: int, headers: Mapping[str, str], *, proven: bool
    ) -> Stored:
        version = version_of(answer.etag, "", size=size, mtime_ns=answer.mtime_ns)
        info = ObjectInfo(key, size, version, answer.mtime_ns)
        if not proven:
            found = self.find(key)
            if found is None or found.info.version.etag != answer.etag:
                raise VersionChanged(
                    f"{self._thing(key)} was replaced by somebody else while it was compared"
                )
            if found.info.size != size:
                raise WrongBytes(
                    f"{self._thing(key)}: {size} bytes were sent, the store has {found.info.size}"
                )
            info = found.info
        return Stored(info, from_headers(headers), DIGEST if proven else SIZE)

    def _whole(self, key: str) -> str:
        return self._bucket.prefix + key

    def _thing(self, key: str) -> str:
        return f"{self._bucket.scheme}://{self._bucket.name}/{self._whole(key)}"

    def _signed(self, act: Callable[[], T]) -> T:
        return self._credentials.signed(act)


@contextmanager
def _unnamed(name: str) -> Iterator[None]:
    """Errors say nothing of a name of ours that nobody has heard of."""
    try:
        yield
    except SourceError as error:
        error.args = (str(error).replace(name, ""), *error.args[1:])
        raise


def _tag(answer: Answer) -> str:
    return answer.etag.strip('"').lower()


def _is_md5(etag: str) -> bool:
    tag = etag.strip('"')
    return len(tag) == 32 and all(c in "0123456789abcdefABCDEF" for c in tag)


def _trusted(sent: tuple[str, int], size: int, digest: bytes, state: _State, number: int) -> str:
    """The entity tag of a part that need not be sent again; empty where it must."""
    tag, length = sent
    known = tag.strip('"').lower() == digest.hex() or state.tags.get(str(number)) == [tag, digest.hex()]
    return tag if known and length == size else ""


def _mark(key: str, size: int, headers: Mapping[str, str]) -> str:
    text = json.dumps([key, size, sorted(headers.items())])
    return blake2b(text.encode(), digest_size=12).hexdigest()
