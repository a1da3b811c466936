"""
Buckets of S3 and of what speaks it (MinIO, Ceph, OSS, ...).

Bytes come through obstore, listings through botocore, and both sign with the same `Credentials`.
An obstore client is made for one set of keys; when those change (rotated, renewed) the next read
makes another client, and the reads under way end on the old one. Keys that obstore cannot name are
read through botocore: slower, but they are rare.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from datacache.clock import Clock
from datacache.config.settings import SourceSettings
from datacache.errors import SourceError, Unavailable, Unsupported, WrongBytes
from datacache.model import Buffer, ByteRange, ObjectInfo
from datacache.sources import objectstore
from datacache.sources.aws import Bucket, Credentials, S3Client
from datacache.sources.keyfile import Keys
from datacache.sources.source import Page, Traits

T = TypeVar("T")


class _S3Traits(Traits):
    """`versioned` costs a request, so the bucket is asked when somebody wants to know."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        for name, value in (("conditional", True), ("md5_etag", True), ("_ask", ask)):
            object.__setattr__(self, name, value)

    @property
    def versioned(self) -> bool:
        asked: bool = self._ask()  # type: ignore[attr-defined]
        return asked


class S3Source:
    """One bucket and prefix. `bucket` is what `aws.find_bucket` made of it."""

    def __init__(self, bucket: Bucket, *, settings: SourceSettings, clock: Clock) -> None:
        self._bucket, self._settings = bucket, settings
        self._credentials = Credentials(bucket, clock=clock)
        self._client = S3Client(bucket, self._credentials, settings)
        self._calls = objectstore.Calls()
        self._lock = threading.Lock()  # guards the two below, and the birth of a store
        self._store: tuple[Keys | None, objectstore.Store] | None = None
        self._versioned: bool | None = None
        self._traits = _S3Traits(self._ask_versioned)

    def __repr__(self) -> str:
        return f"<S3Source {self.uri} {self._credentials!r}>"

    @property
    def uri(self) -> str:
        return self._bucket.uri

    @property
    def traits(self) -> Traits:
        return self._traits

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        if versions and not self.traits.versioned:
            raise Unsupported(f"{self.uri} keeps no versions: the bucket's versioning was never turned on")
        ask = self._client.versions if versions else self._client.objects
        under = self._bucket.prefix + prefix
        after: Mapping[str, str] = {}
        while True:
            page = self._signed(lambda after=after: ask(under, recursive=recursive, after=after))  # type: ignore[misc]
            yield Page(page.objects, page.prefixes)
            if not page.next:
                return
            if page.next == after:
                raise WrongBytes(
                    f"{self.uri} cannot be listed: the store gives the same page again and again"
                )
            after = page.next

    def stat(self, key: str) -> ObjectInfo:
        whole = self._bucket.prefix + key
        return self._signed(lambda: self._client.head(whole))._replace(key=key)

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        return self._signed(lambda: self._read(info, span))

    def close(self) -> None:
        self._calls.close()
        self._client.close()
        with self._lock:
            self._store = None

    def _read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        key = self._bucket.prefix + info.key
        thing = f"{self._bucket.scheme}://{self._bucket.name}/{key}"
        if objectstore.can_name(key):
            return objectstore.get(self._calls, self._store_of_today(), key, info, span, thing=thing)
        whole = span.start == 0 and span.stop == info.size
        answer = self._client.get(
            key, None if whole else span,
            condition=info.version.condition, version_id=info.version.version_id,
        )  # fmt: skip
        objectstore.check_answer(
            info, span, got=answer.span, size=answer.size, etag=answer.etag,
            version_id=answer.version_id, thing=thing,
        )  # fmt: skip
        if len(answer.data) != span.length:
            raise WrongBytes(f"{thing}: {span.length} bytes were asked for, {len(answer.data)} came")
        return answer.data

    def _store_of_today(self) -> objectstore.Store:
        """A client that signs with the keys that are good now."""
        keys = None if self._bucket.anonymous else self._credentials.get()
        store = self._store
        if store is not None and store[0] == keys:
            return store[1]
        endpoint, region = self._client.endpoint, self._client.region  # may ask: not under the lock
        with self._lock:
            if self._store is None or self._store[0] != keys:
                self._store = keys, objectstore.s3_store(
                    self._bucket.name, endpoint=endpoint, region=region, style=self._bucket.style, keys=keys,
                    requester_pays=self._bucket.requester_pays, ca_bundle=self._bucket.ca_bundle,
                    settings=self._settings,
                )  # fmt: skip
            return self._store[1]

    def _signed(self, act: Callable[[], T]) -> T:
        return self._credentials.signed(act)

    def _ask_versioned(self) -> bool:
        if self._versioned is None:
            try:
                self._versioned = self._signed(self._client.versioned)
            except Unavailable:
                raise
            except SourceError:
                # Not allowed to ask, or a store that knows no versions: read by entity tag alone.
                self._versioned = False
        return self._versioned
