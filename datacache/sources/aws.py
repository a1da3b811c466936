"""
The door to botocore: who we are, where a bucket is, and what obstore cannot ask.

`find_bucket` turns options, environment and profile into a `Bucket` (no network). `Credentials`
always has keys that are good now: it renews what expires, looks again at what may have been
rotated, and starts afresh when the store says that they have run out. `S3Client` lists (object_store
refuses or changes keys such as `a//b`, `..` or `dir/`, so it cannot), stats, and reads the few keys
that obstore cannot name. One request a call, no retries: `datacache.sources.steady` does those.

The environment is a mapping that is handed in. botocore reads `os.environ` by itself in many
places; `_Session` and `_resolver` put the mapping in their stead, except for what belongs to the
process and not to the data set: HOME, the proxies, and AWS_* names of `credential_process` children
and nested profiles. Next: `datacache.sources.s3` puts this and obstore together.
"""

import hmac
import logging
import socket
import threading
import time
import weakref
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from hashlib import sha256
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

import botocore.handlers
import botocore.parsers
import botocore.session
from botocore import UNSIGNED
from botocore.awsrequest import AWSPreparedRequest
from botocore.config import Config
from botocore.configprovider import ConfigChainFactory, ConfiguredEndpointProvider
from botocore.credentials import (
    AssumeRoleWithWebIdentityProvider,
    ContainerProvider,
    CredentialResolver,
    EnvProvider,
    InstanceMetadataFetcher,
    InstanceMetadataProvider,
    ReadOnlyCredentials,
    RefreshableCredentials,
    create_credential_resolver,
)
from botocore.credentials import Credentials as BotocoreCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    InvalidConfigError,
    MetadataRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    TokenRetrievalError,
)
from botocore.loaders import create_loader
from urllib3.exceptions import HTTPError

from datacache.clock import Clock
from datacache.config.settings import SourceSettings
from datacache.errors import (
    CredentialsExpired,
    Denied,
    NotFound,
    SettingError,
    SourceError,
    Unavailable,
    Unsupported,
    VersionChanged,
    WrongBytes,
)
from datacache.model import Buffer, ByteRange, MiB, ObjectInfo, Version
from datacache.sources.answers import KEY_TROUBLE, failure, parse_retry_after
from datacache.sources.keyfile import Keys, read_keys
from datacache.sources.listing import ARCHIVED, Listing, entity_tag, parse_listing, version_of

_log = logging.getLogger(__name__)
T = TypeVar("T")

RECHECK = 300.0
"""Seconds after which keys that never expire are looked up again: a rotated file or profile is then
noticed long before its old keys are withdrawn."""
RECHECK_FILE = 10.0
"""... and keys in a mounted file: looking costs 50 µs."""
PATIENCE = 5.0
"""Seconds before credentials that could not be had, or were just renewed, are asked for again: many
readers at once must not become many requests to STS."""
_LONGEST_KEY = 1024
CONNECTIONS = 64
"""Connections kept to the store: the reader's default concurrency is 16, metadata comes beside it."""


@dataclass(frozen=True)
class Bucket:
    """Where the objects are and how they are asked for. Holds no secret."""

    scheme: str
    """s3 or oss."""
    name: str
    prefix: str = ""
    """What all keys begin with: empty, or ends in "/"."""
    endpoint: str = ""
    """URL of an S3-compatible store; empty: AWS's own, by region."""
    region: str = ""
    """Empty: what the bucket says (AWS), us-east-1 (elsewhere)."""
    style: str = "path"
    """path, virtual (the bucket's name is in the host's) or cname (the host is the bucket)."""
    anonymous: bool = False
    requester_pays: bool = False
    ca_bundle: str = ""
    """File of certificates to trust."""
    profile: str = ""
    keyfile: str = ""
    """File or directory that holds the keys, instead of everything else."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def uri(self) -> str:
        """The identity of the root. The region is no part of it: names are unique without."""
        root = f"{self.scheme}://{self.name}/{self.prefix}".removesuffix("/")
        return f"{root}?endpoint={self.endpoint}" if self.endpoint else root


def find_bucket(bucket: Bucket) -> Bucket:
    """`bucket` with what its options left open filled in from the environment and the profile.

    Reads the shared configuration, asks nobody. Raises SettingError.
    """
    try:
        session = _Session(bucket)
        scoped = session.get_scoped_config()
        endpoint = bucket.endpoint or session.endpoint("s3") or ""
        region = (
            bucket.region
            or bucket.environment.get("AWS_REGION")
            or session.get_config_variable("region")
            or ""
        )
        ca_bundle = bucket.ca_bundle or session.get_config_variable("ca_bundle") or ""
    except ProfileNotFound as error:
        name = error.kwargs.get("profile", bucket.profile)
        raise SettingError("profile", name, "a profile of the shared AWS configuration") from error
    except (ConfigParseError, InvalidConfigError) as error:
        raise SettingError("AWS configuration", str(error), "a file that botocore can read") from error
    style = bucket.style
    if not style:
        section = scoped.get("s3")
        style = str(section.get("addressing_style", "")) if isinstance(section, dict) else ""
        if style not in ("path", "virtual"):
            style = "path" if endpoint or "." in bucket.name else "virtual"
    return Bucket(
        scheme=bucket.scheme, name=bucket.name, prefix=bucket.prefix, endpoint=endpoint.rstrip("/"),
        region=region, style=style, anonymous=bucket.anonymous, requester_pays=bucket.requester_pays,
        ca_bundle=str(ca_bundle), profile=bucket.profile, keyfile=bucket.keyfile,
        environment=bucket.environment,
    )  # fmt: skip


@cache
def _loader() -> Any:
    """botocore's descriptions of services: 100 ms to read, so they are read once."""
    return create_loader()


class _Session(botocore.session.Session):  # type: ignore[misc]
    """A botocore session that takes its variables from the bucket's environment."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(profile=bucket.profile or None)
        self._environment = dict(bucket.environment)
        self.register_component("data_loader", _loader())
        chains = ConfigChainFactory(session=self, environ=self._environment)
        store = self.get_component("config_store")
        for name, (key, variable, default, convert) in self.SESSION_VARIABLES.items():
            chain = chains.create_config_chain(
                instance_name=name, env_var_names=variable, config_property_names=key,
                default=default, conversion_func=convert,
            )  # fmt: skip
            store.set_config_provider(name, chain)
        self._honour_endpoints = not self.get_config_variable("ignore_configured_endpoint_urls")
        # From here on only `endpoint` looks for endpoints; botocore would look into os.environ.
        self.set_config_variable("ignore_configured_endpoint_urls", True)
        # Signing in (STS) must not take longer than a read may wait.
        self.set_default_client_config(
            Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2})
        )

    def endpoint(self, service: str) -> str | None:
        """The endpoint that environment or profile name for `service`."""
        if not self._honour_endpoints:
            return None
        chain = ConfiguredEndpointProvider(
            full_config=self.full_config, scoped_config=self.get_scoped_config(),
            client_name=service, environ=self._environment,
        )  # fmt: skip
        found = chain.provide()
        return str(found) if found else None

    def create_client(self, service_name: str, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("endpoint_url"):
            kwargs["endpoint_url"] = self.endpoint(service_name)
        return super().create_client(service_name, *args, **kwargs)


def _resolver(bucket: Bucket) -> CredentialResolver:
    """botocore's chain of providers, each looking at the bucket's environment."""
    session, environment = _Session(bucket), dict(bucket.environment)
    region = bucket.region or "us-east-1"
    resolver = create_credential_resolver(session, region_name=region)
    profile = session.profile or "default"
    named = {
        "web_identity_token_file": environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"),
        "role_arn": environment.get("AWS_ROLE_ARN"),
        "role_session_name": environment.get("AWS_ROLE_SESSION_NAME"),
    }

    def with_identity() -> dict[str, Any]:
        # The environment's web identity is put where botocore looks for the profile's.
        own = dict(session.full_config.get("profiles", {}).get(profile, {}))
        return {"profiles": {profile: own | {key: value for key, value in named.items() if value}}}

    env = next((p for p in resolver.providers if p.METHOD == EnvProvider.METHOD), None)
    if env is not None:  # not there when a profile was chosen by option
        env.environ = environment
    replaced = {
        AssumeRoleWithWebIdentityProvider.METHOD: AssumeRoleWithWebIdentityProvider(
            load_config=with_identity,
            client_creator=lambda service, **kw: session.create_client(service, region_name=region, **kw),
            profile_name=profile, cache={}, disable_env_vars=True,
        ),
        ContainerProvider.METHOD: ContainerProvider(environ=environment),
        InstanceMetadataProvider.METHOD: InstanceMetadataProvider(
            InstanceMetadataFetcher(
                timeout=session.get_config_variable("metadata_service_timeout"),
                num_attempts=session.get_config_variable("metadata_service_num_attempts"),
                env=environment, user_agent=session.user_agent(),
                config={
                    "ec2_metadata_service_endpoint": session.get_config_variable(
                        "ec2_metadata_service_endpoint"
                    ),
                    "ec2_metadata_v1_disabled": session.get_config_variable("ec2_metadata_v1_disabled"),
                },
            )
        ),
    }  # fmt: skip
    # boto2's files and variables are not looked for: nothing has written them for ten years.
    dropped = ("ec2-credentials-file", "boto-config")
    resolver.providers = [replaced.get(p.METHOD, p) for p in resolver.providers if p.METHOD not in dropped]
    return resolver


class Credentials:
    """Keys that are good now, or a Denied that says what was looked for. Thread-safe.

    `_lock` guards all fields; it is held while credentials are fetched, so that one thread fetches
    and the others wait for it. `get` is called for every read: while nothing is due it takes no lock.
    """

    def __init__(self, bucket: Bucket, *, clock: Clock) -> None:
        self._bucket, self._clock = bucket, clock
        self._lock = threading.Lock()
        self._loaded: BotocoreCredentials | None = None  # of botocore's chain; renews itself if it expires
        self._load_at = float("-inf")  # when the chain is walked again
        self._current: tuple[float, Keys | None, SourceError | None] = (float("-inf"), None, None)
        self._renewed_at = float("-inf")

    def __repr__(self) -> str:
        until, keys, error = self._current
        return f"<Credentials of {self._bucket.uri}: {keys or error}, next look at {until:.0f}>"

    def get(self) -> Keys:
        """The keys to sign with. Raises Denied or Unavailable."""
        until, keys, error = self._current
        if self._clock.monotonic() >= until:
            with self._lock:
                until, keys, error = self._current
                if self._clock.monotonic() >= until:
                    keys, error = self._look()
        if keys is None:
            raise _again(error) from error
        return keys

    def renew(self, used: Keys) -> Keys:
        """Keys after the store refused `used`: other ones where there are other ones by now."""
        with self._lock:
            _, keys, _ = self._current
            now = self._clock.monotonic()
            patient = not self._bucket.keyfile and now - self._renewed_at < PATIENCE
            if keys is not None and (keys != used or patient):
                return keys
            self._renewed_at = now
            self._load_at = float("-inf")
            keys, error = self._look()
        if keys is None:
            raise _again(error) from error
        return keys

    def signed(self, act: Callable[[], T]) -> T:
        """What `act` returns; once more with other keys, where the store did not like the first."""
        if self._bucket.anonymous:
            return act()
        used = self.get()
        try:
            return act()
        except CredentialsExpired:
            self.renew(used)
        except Denied as error:
            # A rotated key looks like this. The same keys would be refused again.
            if not any(code in str(error) for code in KEY_TROUBLE) or self.renew(used) == used:
                raise
        return act()

    def _look(self) -> tuple[Keys | None, SourceError | None]:
        now, (_, known, _) = self._clock.monotonic(), self._current
        error: SourceError | None = None
        keys: Keys | None = None
        try:
            keys = self._fetch(now)
        except (SourceError, SettingError, BotoCoreError, ClientError, OSError, RuntimeError) as cause:
            error = _sign_in_failure(cause, self._bucket.uri)
            if known is not None:
                # Those we have may well be good for minutes; if not, the store will say so.
                _log.warning("credentials of %s could not be renewed: %s", self._bucket.uri, error)
                keys = known
        self._current = (now + (RECHECK_FILE if error is None else PATIENCE), keys, error)
        return keys, error

    def _fetch(self, now: float) -> Keys:
        if self._bucket.keyfile:
            return read_keys(self._bucket.keyfile, section=self._bucket.profile)
        if self._loaded is None or now >= self._load_at:
            self._loaded = _resolver(self._bucket).load_credentials()
            # What expires renews itself; the rest is looked up again.
            renews = isinstance(self._loaded, RefreshableCredentials)
            self._load_at = float("inf") if renews else now + RECHECK
        if self._loaded is None:
            raise NoCredentialsError
        frozen = self._loaded.get_frozen_credentials()
        return Keys(frozen.access_key, frozen.secret_key, frozen.token or "")


def _again(error: SourceError | None) -> SourceError:
    """A fresh copy of `error`: an exception that several threads raise collects all their tracebacks."""
    assert error is not None
    return type(error)(str(error))


def _sign_in_failure(cause: Exception, thing: str) -> SourceError:
    if isinstance(cause, SourceError):
        return cause
    if isinstance(cause, NoCredentialsError):
        return Denied(
            f"{thing}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a "
            "profile, or the option credentials=FILE, or use the option anonymous=true for a public bucket"
        )
    if isinstance(cause, (ConnectionError, HTTPClientError, MetadataRetrievalError)):
        return Unavailable(f"{thing}: the service that issues credentials cannot be reached ({cause})")
    if isinstance(cause, ClientError) and cause.response["ResponseMetadata"].get("HTTPStatusCode", 0) >= 500:
        return Unavailable(f"{thing}: the service that issues credentials failed ({cause})")
    said = " ".join(f"{type(cause).__name__}: {cause}".split())
    return Denied(f"{thing}: credentials cannot be had ({said})")


class _Bridge(BotocoreCredentials):  # type: ignore[misc]
    """`Credentials` as botocore's signers want them."""

    def __init__(self, owner: Credentials) -> None:
        super().__init__("unused", "unused")
        self._owner = owner

    def load_credentials(self) -> "_Bridge":
        return self

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        keys = self._owner.get()
        return ReadOnlyCredentials(keys.access_key, keys.secret_key, keys.token or None)


class Fetched(NamedTuple):
    """The answer to a read."""

    data: bytes
    span: ByteRange
    size: int
    etag: str
    version_id: str


class Looked(NamedTuple):
    """The answer to a HEAD: with the user's metadata, and the headers that belong to the object, by the names
    that a copy takes them by."""

    info: ObjectInfo
    metadata: Mapping[str, str]
    headers: Mapping[str, Any]


class Answer(NamedTuple):
    """The answer to what was written."""

    etag: str
    mtime_ns: int
    """By the store's clock, in whole seconds."""
    opaque: bool
    """The entity tag is of what the store encrypted, and tells nothing of the bytes."""


Condition = Mapping[str, str]
"""IfMatch or IfNoneMatch, or nothing."""
_KEPT = (
    "CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType", "StorageClass",
)  # fmt: skip


def _secret(answer: Mapping[str, Any]) -> bool:
    return str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or bool(
        answer.get("SSECustomerAlgorithm")
    )


def _body(data: Buffer) -> bytes | bytearray:
    return bytes(data) if isinstance(data, memoryview) else data  # botocore takes no other


def _base64(digest: bytes) -> str:
    return b64encode(digest).decode()


class S3Client:
    """What is asked of a bucket through botocore. Keys are whole here: with the bucket's prefix."""

    def __init__(self, bucket: Bucket, credentials: Credentials, settings: SourceSettings) -> None:
        self._bucket, self._credentials, self._settings = bucket, credentials, settings
        self._lock = threading.Lock()  # guards the birth of the client
        self._client: Any = None
        self._connections = _Connections()

    def close(self) -> None:
        """Close the connections, those on which an answer is waited for, too."""
        with self._lock:
            if self._client is not None:
                self._client.close()
        self._connections.cut()

    @property
    def endpoint(self) -> str:
        """URL of the store, without the bucket. May ask AWS for the bucket's region."""
        return self._bucket.endpoint or str(self._ready().meta.endpoint_url)

    @property
    def region(self) -> str:
        """The region that requests are signed for."""
        return self._bucket.region or str(self._ready().meta.region_name)

    def objects(self, prefix: str, *, recursive: bool, after: Mapping[str, str]) -> Listing:
        """One page of ListObjectsV2."""
        return self._list("list_objects_v2", prefix, recursive=recursive, after=after)

    def versions(self, prefix: str, *, recursive: bool, after: Mapping[str, str]) -> Listing:
        """One page of ListObjectVersions."""
        return self._list("list_object_versions", prefix, recursive=recursive, after=after)

    def _list(self, call: str, prefix: str, *, recursive: bool, after: Mapping[str, str]) -> Listing:
        more = dict(after) if recursive else {**after, "Delimiter": "/"}
        answer = self._ask(call, f"{self._bucket.scheme}://{self._bucket.name}", Prefix=prefix, **more)
        body = answer.get("Body of the listing")
        if body is None:
            raise WrongBytes(f"{self._bucket.uri} cannot be listed: the answer has no listing")
        return parse_listing(body, root=self._bucket.prefix, thing=self._bucket.uri)

    def versioned(self) -> bool:
        """Whether the bucket keeps versions, now or once."""
        answer = self._ask("get_bucket_versioning", f"{self._bucket.scheme}://{self._bucket.name}")
        return answer.get("Status") in ("Enabled", "Suspended")

    def head(self, key: str, *, version_id: str = "") -> ObjectInfo:
        """Size, version and class of one object, under its whole key."""
        return self.look(key, version_id=version_id).info

    def look(self, key: str, *, version_id: str = "") -> "Looked":
        """All that a HEAD tells of one object."""
        if len(key.encode("utf-8", "surrogatepass")) > _LONGEST_KEY:
            raise NotFound(
                f"{self._name(key)[:200]}... does not exist: no key is longer than {_LONGEST_KEY} bytes"
            )
        more = {"VersionId": version_id} if version_id else {}
        try:
            answer = self._ask("head_object", self._name(key), Key=key, **more)
        except SourceError as error:
            # An answer to HEAD has no body, and so no code. AWS answers 400 when a token has run out.
            said = error.__cause__
            if isinstance(said, ClientError) and said.response["Error"].get("Code") == "400":
                raise CredentialsExpired(f"{error}; most likely the credentials have expired") from said
            raise
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        if "content-length" not in headers:
            raise WrongBytes(f"{self._name(key)}: the store does not state its size")
        modified = answer.get("LastModified")
        size = int(headers["content-length"])
        mtime_ns = round(modified.timestamp()) * 1_000_000_000 if modified else 0
        info = ObjectInfo(
            key,
            size,
            version_of(entity_tag(answer.get("ETag")), "", size=size, mtime_ns=mtime_ns),
            mtime_ns,
            # An archived object that was restored says so, and can be read.
            answer.get("StorageClass") in ARCHIVED
            and 'ongoing-request="false"' not in answer.get("Restore", ""),
        )
        kept = {name: answer[name] for name in _KEPT if answer.get(name)}
        return Looked(info, answer.get("Metadata") or {}, kept)

    def get(self, key: str, span: ByteRange | None, *, condition: str, version_id: str) -> Fetched:
        """The bytes of one object, or of `span` of it."""
        more: dict[str, str] = {}
        if span is not None:
            more["Range"] = f"bytes={span.start}-{span.stop - 1}"
        if condition:
            more["IfMatch"] = condition
        if version_id:
            more["VersionId"] = version_id

        def take(client: Any, arguments: Mapping[str, Any]) -> Fetched:
            answer = client.get_object(**arguments)
            with closing(answer["Body"]) as body:  # its own `with` would give the raw stream
                data = body.read()
            whole = ByteRange(0, len(data))
            got, size = (
                _content_range(answer.get("ContentRange"), whole) if span is not None else (whole, len(data))
            )
            return Fetched(data, got, size, entity_tag(answer.get("ETag")), answer.get("VersionId") or "")

        return self._attempt(take, self._name(key), {"Key": key, **more})

    def store(self, key: str, body: Buffer, *, md5: bytes, condition: Condition, **more: Any) -> Answer:
        """Write one object in one request, which the store refuses should other bytes arrive."""
        return self._write(
            "put_object", key, {"Body": _body(body), "ContentMD5": _base64(md5)} | more, condition
        )

    def begin(self, key: str, **more: Any) -> str:
        """Begin a multipart upload; its id."""
        return str(self._ask("create_multipart_upload", self._name(key), Key=key, **more)["UploadId"])

    def part(self, key: str, upload: str, number: int, body: Buffer, *, md5: bytes) -> Answer:
        """Send one part."""
        more = {"UploadId": upload, "PartNumber": number, "Body": _body(body), "ContentMD5": _base64(md5)}
        return self._write("upload_part", key, more)

    def part_of(self, key: str, upload: str, number: int, origin: Mapping[str, Any], span: ByteRange) -> str:
        """Let the store copy `span` of another object into a part; its entity tag. `origin` says which, as
        `copied` takes it."""
        more = {
            "UploadId": upload,
            "PartNumber": number,
            "CopySourceRange": f"bytes={span.start}-{span.stop - 1}",
        }
        answer = self._ask("upload_part_copy", self._name(key), Key=key, **more, **origin)
        return entity_tag(answer.get("CopyPartResult", {}).get("ETag"))

    def parts(self, key: str, upload: str) -> dict[int, tuple[str, int]]:
        """Entity tag and size of each part that has been sent, by number. Raises NotFound when there is no
        such upload (any more)."""
        found: dict[int, tuple[str, int]] = {}
        after = 0
        while True:
            answer = self._ask(
                "list_parts", self._name(key), Key=key, UploadId=upload, PartNumberMarker=after
            )
            for part in answer.get("Parts", ()):
                found[int(part["PartNumber"])] = entity_tag(part.get("ETag")), int(part["Size"])
            following = int(answer.get("NextPartNumberMarker") or 0)
            if not answer.get("IsTruncated") or following <= after:
                return found
            after = following

    def complete(self, key: str, upload: str, tags: Mapping[int, str], *, condition: Condition) -> Answer:
        """Make an object of all parts."""
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(tags.items())]
        more = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        return self._write("complete_multipart_upload", key, more, condition)

    def abort(self, key: str, upload: str) -> None:
        """Throw the parts of an upload away. Raises NotFound when there is no such upload."""
        self._ask("abort_multipart_upload", self._name(key), Key=key, UploadId=upload)

    def copied(self, key: str, origin: Mapping[str, Any], *, condition: Condition, **more: Any) -> Answer:
        """Let the store copy an object: `origin` is what `origin_of` makes."""
        return self._write("copy_object", key, {"MetadataDirective": "REPLACE", **origin, **more}, condition)

    def origin_of(self, key: str, version: Version) -> dict[str, Any]:
        """The parameters that mean exactly this object of this bucket, as an origin of copies."""
        source = {"Bucket": self._bucket.name, "Key": key}
        if version.version_id:
            source["VersionId"] = version.version_id
        condition = {"CopySourceIfMatch": version.condition} if version.condition else {}
        return {"CopySource": source, **condition}

    def remove(self, key: str, *, condition: Condition) -> None:
        """Remove one object, if it is the one that is meant."""
        self._ask("delete_object", self._name(key), Key=key, **condition)

    def _write(
        self, call: str, key: str, more: Mapping[str, Any], condition: Condition | None = None
    ) -> Answer:
        try:
            answer = self._ask(call, self._name(key), Key=key, **more, **(condition or {}))
        except NotFound as error:
            # versitygw and AWS answer so when If-Match is to match what is not there.
            if condition and "NoSuchKey" in str(error):
                raise VersionChanged(f"{error}; another version was expected there") from error
            raise
        # What copies wrap their answer in.
        said = answer.get("CopyObjectResult") or answer
        tag = entity_tag(said.get("ETag"))
        if not tag:
            raise Unavailable(f"{self._name(key)}: the store did not say what it has stored")
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        with suppress(TypeError, ValueError):
            moment = said.get("LastModified") or parsedate_to_datetime(headers.get("date"))
            return Answer(tag, round(moment.timestamp()) * 1_000_000_000, _secret(answer))
        return Answer(tag, 0, _secret(answer))

    def create(self) -> None:
        """Make the bucket."""
        self._ask("create_bucket", self._bucket.uri)

    def put(self, key: str, body: bytes) -> None:
        """Write one object, in one request."""
        self._ask("put_object", self._name(key), Key=key, Body=body)

    def delete(self, key: str) -> None:
        """Remove one object."""
        self._ask("delete_object", self._name(key), Key=key)

    def drop(self) -> None:
        """Remove the bucket, which must be empty."""
        self._ask("delete_bucket", self._bucket.uri)

    def _name(self, key: str) -> str:
        return f"{self._bucket.scheme}://{self._bucket.name}/{key}"

    def _ask(self, call: str, thing: str, **arguments: Any) -> dict[str, Any]:
        def ask(client: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = getattr(client, call)(**arguments)
            return answer

        return self._attempt(ask, thing, arguments)

    def _attempt(self, act: Callable[[Any, Mapping[str, Any]], T], thing: str, more: Mapping[str, Any]) -> T:
        arguments = {"Bucket": self._bucket.name, **more}
        if self._bucket.requester_pays and arguments.keys() & {"Key", "Prefix"}:
            arguments["RequestPayer"] = "requester"
        try:
            return act(self._ready(), arguments)
        except (BotoCoreError, ClientError) as error:
            raise self._failure(error, thing) from error

    def _failure(self, error: Exception, thing: str) -> SourceError:
        if isinstance(error, ClientError):
            meta = error.response.get("ResponseMetadata", {})
            said = error.response.get("Error", {})
            status = int(meta.get("HTTPStatusCode", 0))
            code = str(said.get("Code", ""))
            return failure(
                thing, status=status, code="" if code == str(status) else code,
                message=str(said.get("Message", "")),
                retry_after=parse_retry_after(meta.get("HTTPHeaders", {}).get("retry-after")),
            )  # fmt: skip
        if isinstance(error, (ConnectionError, HTTPClientError, ResponseStreamingError)):
            return Unavailable(f"{thing} cannot be had right now ({error})")
        if isinstance(error, ParamValidationError):
            return Unsupported(f"{thing}: botocore refuses the request ({error})")
        if isinstance(error, _SIGN_IN):
            return _sign_in_failure(error, thing)
        return SourceError(f"{thing}: {type(error).__name__}: {error}")

    def _ready(self) -> Any:
        with self._lock:
            if self._client is None:
                region = self._bucket.region or ("us-east-1" if self._bucket.endpoint else self._ask_region())
                self._client = self._make(region)
            return self._client

    def _make(self, region: str) -> Any:
        bucket = self._bucket
        session = _Session(bucket)
        if not bucket.anonymous:
            session.register_component("credential_provider", _Bridge(self._credentials))
        client = session.create_client(
            "s3",
            region_name=region,
            endpoint_url=bucket.endpoint or None,
            verify=bucket.ca_bundle or None,
            config=Config(
                signature_version=UNSIGNED if bucket.anonymous else "s3v4",
                retries={"total_max_attempts": 1, "mode": "standard"},
                connect_timeout=self._settings.connect_timeout,
                read_timeout=self._settings.stall_timeout,
                max_pool_connections=CONNECTIONS,
                s3={"addressing_style": "virtual" if bucket.style == "cname" else bucket.style},
                # Stores that speak S3 know nothing of the checksums that botocore sends since 1.36.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        self._connections.of(client._endpoint.http_session)
        client._endpoint.http_session = _Timely(client._endpoint.http_session, self._settings.timeout)
        # botocore parses each answer once more, only to find errors that were sent with status 200.
        # `parse_listing` finds them. Should a later botocore call its check something else, listings
        # get slower, not wrong.
        if check := getattr(botocore.handlers, "_handle_200_error", None):
            client.meta.events.unregister("before-parse.s3.*", check)
            # These answer at once that they have begun, and by their body how it went.
            for call in ("CompleteMultipartUpload", "CopyObject", "UploadPartCopy"):
                client.meta.events.register(f"before-parse.s3.{call}", check)
        for call in ("ListObjectsV2", "ListObjectVersions"):
            client.meta.events.register(f"before-parse.s3.{call}", _keep_listing)
        if bucket.style == "cname":
            client.meta.events.register("before-sign.s3", self._drop_bucket)
        if not bucket.anonymous:
            client.put_object = _SmallPuts(client, bucket, self._credentials, self._drop_bucket)
        return client

    def _drop_bucket(self, request: Any, **_: Any) -> None:
        parts = urlsplit(request.url)
        if parts.netloc.startswith(f"{self._bucket.name}."):
            parts = parts._replace(netloc=parts.netloc.removeprefix(f"{self._bucket.name}."))
        else:  # botocore puts it into the path where the host is an address
            parts = parts._replace(path=parts.path.removeprefix(f"/{self._bucket.name}") or "/")
        request.url = urlunsplit(parts)

    def _ask_region(self) -> str:
        """The region that AWS gives in its answer for a bucket, also when it denies the rest."""
        client = self._make("us-east-1")
        thing = f"{self._bucket.scheme}://{self._bucket.name}"
        try:
            headers = client.head_bucket(Bucket=self._bucket.name)["ResponseMetadata"]["HTTPHeaders"]
        except ClientError as error:
            headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            if "x-amz-bucket-region" not in headers:
                raise self._failure(error, thing) from error
        except BotoCoreError as error:
            raise self._failure(error, thing) from error
        finally:
            client.close()
        return str(headers.get("x-amz-bucket-region", "us-east-1"))


class _SmallPuts:
    """`put_object` of a client, for small objects by a shorter way: signed here (Signature Version 4), and
    sent on botocore's connections, without the marshalling, validation and events before that, which take
    twice as long as all of it.

    What a request has to look like is read off a URL that botocore makes. Where it would look otherwise
    (another way of signing, a redirect to another region), botocore makes it.
    """

    MOST = 1 * MiB
    """Bytes. Beyond, what is spared does not matter, and what is refused should be before it was sent:
    botocore's requests wait for a 100 (Continue), which it reads one byte at a time."""
    _ELSEWHERE = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
    _HEADERS: Mapping[str, str] = MappingProxyType(
        {"ContentMD5": "Content-MD5", "IfMatch": "If-Match", "IfNoneMatch": "If-None-Match",
         "RequestPayer": "x-amz-request-payer"}
    )  # fmt: skip

    def __init__(
        self, client: Any, bucket: Bucket, credentials: Credentials, drop_bucket: Callable[[Any], None]
    ) -> None:
        self._client, self._long, self._bucket = client, client.put_object, bucket
        self._credentials, self._drop_bucket = credentials, drop_bucket
        self._parser = botocore.parsers.create_parser("rest-xml")
        self._shape = client.meta.service_model.operation_model("PutObject").output_shape
        self._form: _Form | None = None  # found by the first put
        self._passable = True

    def __call__(self, **arguments: Any) -> dict[str, Any]:
        body, key = arguments["Body"], arguments["Key"]
        more = {name: arguments[name] for name in arguments.keys() - {"Bucket", "Key", "Body", "Metadata"}}
        if not self._passable or len(body) > self.MOST or not more.keys() <= self._HEADERS.keys():
            return self._asked(arguments)
        if self._form is None and not self._look():
            self._passable = False
            return self._asked(arguments)
        assert self._form is not None
        url = self._form.url + quote(key, safe="/~")
        headers = {self._HEADERS[name]: value for name, value in more.items()}
        headers |= {f"x-amz-meta-{name}": value for name, value in arguments.get("Metadata", {}).items()}
        # TLS and the MD5 prove the body, as botocore has it; without TLS it is signed, too.
        proof = "UNSIGNED-PAYLOAD" if url.startswith("https:") else sha256(body).hexdigest()
        headers = _signed(url, self._form, headers, proof, self._credentials.get(), time.time())
        headers |= {"Content-Length": str(len(body)), "User-Agent": self._client.meta.config.user_agent}
        answer = self._client._endpoint.http_session.send(
            AWSPreparedRequest("PUT", url, headers, body, False)
        )
        if answer.status_code >= 300:
            said = {"status_code": answer.status_code, "headers": answer.headers, "body": answer.content}
            parsed = self._parser.parse(said, self._shape)
            if answer.status_code < 400 or parsed.get("Error", {}).get("Code") in self._ELSEWHERE:
                self._passable = False  # botocore knows where to go instead
                return self._asked(arguments)
            raise ClientError(parsed, "PutObject")
        told = {name.lower(): value for name, value in answer.headers.items()}
        return {
            "ETag": told.get("etag"),
            "ServerSideEncryption": told.get("x-amz-server-side-encryption", ""),
            "SSECustomerAlgorithm": told.get("x-amz-server-side-encryption-customer-algorithm", ""),
            "ResponseMetadata": {"HTTPStatusCode": answer.status_code, "HTTPHeaders": told},
        }

    def _asked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._long(**arguments)
        return answer

    def _look(self) -> bool:
        """Find out how requests look; whether they look like what is made here."""
        request = SimpleNamespace(
            url=self._client.generate_presigned_url("put_object", {"Bucket": self._bucket.name, "Key": "k"})
        )
        if self._bucket.style == "cname":
            self._drop_bucket(request)
        url, _, query = request.url.partition("?")
        signed = {name.lower(): values[0] for name, values in parse_qs(query).items()}
        scope = signed.get("x-amz-credential", "").split("/")
        if signed.get("x-amz-algorithm") != "AWS4-HMAC-SHA256" or scope[-2:] != ["s3", "aws4_request"]:
            return False
        if not url.endswith("/k"):
            return False
        host = urlsplit(url).netloc.removesuffix(":443" if url.startswith("https:") else ":80")
        self._form = _Form(url.removesuffix("k"), host, scope[-3])
        return True


class _Form(NamedTuple):
    """What the requests of a client have in common."""

    url: str
    """Without the key."""
    host: str
    region: str


def _signed(
    url: str, form: _Form, headers: Mapping[str, str], proof: str, keys: Keys, now: float
) -> dict[str, str]:
    """The headers of a PUT with what signs all of them; `proof` stands for the body."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    scope = f"{moment[:8]}/{form.region}/s3/aws4_request"
    added = {"X-Amz-Date": moment, "X-Amz-Content-SHA256": proof}
    if keys.token:
        added["X-Amz-Security-Token"] = keys.token
    signed = sorted(
        [("host", form.host), *((name.lower(), value) for name, value in (*headers.items(), *added.items()))]
    )
    names = ";".join(name for name, _ in signed)
    listed = "".join(f"{name}:{' '.join(value.split())}\n" for name, value in signed)
    request = f"PUT\n{urlsplit(url).path}\n\n{listed}\n{names}\n{proof}"
    secret = f"AWS4{keys.secret_key}".encode()
    for part in scope.split("/"):
        secret = hmac.digest(secret, part.encode(), "sha256")
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{sha256(request.encode()).hexdigest()}"
    signature = hmac.digest(secret, text.encode(), "sha256").hex()
    added["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return {**headers, **added}


class _Connections:
    """The connections of botocore's HTTP sessions, so that whoever closes need not wait for an answer on one.

    urllib3 forgets a connection while it is in use. Should a later botocore make its connections in
    another way, a close takes as long as a stalled answer, and that is all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two below
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed = False

    def of(self, session: Any) -> None:
        """See to it that connections of `session` are known here."""
        classes = getattr(session, "_pool_classes_by_scheme", {})
        for scheme, pool in list(classes.items()):  # the dictionary that its connection managers have
            known = type(pool.ConnectionCls.__name__, (pool.ConnectionCls,), {"connect": self._connect(pool)})
            classes[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": known})

    def cut(self) -> None:
        """End all of them, now and when they are made."""
        with self._lock:
            self._closed = True
            connections = list(self._open)
        for connection in connections:
            _end(connection)

    def _connect(self, pool: Any) -> Callable[[Any], None]:
        def connect(connection: Any) -> None:
            pool.ConnectionCls.connect(connection)
            with self._lock:
                self._open.add(connection)
                closed = self._closed
            if closed:
                _end(connection)

        return connect


def _end(connection: Any) -> None:
    # Shut down, not closed: whoever reads on it wakes up, and closes it.
    with suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)


class _Timely:
    """botocore's HTTP session, with a bound on the time until an answer's body is whole.

    botocore knows only one between two bytes, so an answer that trickles would be waited for as long
    as it goes on: hours, for a listing of 1000 objects.
    """

    def __init__(self, session: Any, bound: float) -> None:
        self._session, self._bound = session, bound

    def send(self, request: Any) -> Any:
        deadline = time.monotonic() + self._bound
        streamed, request.stream_output = request.stream_output, True  # else the body is read in there
        answer = self._session.send(request)
        if request.body:  # sending it is bounded by its stalls: a slow way up is no fault
            deadline = time.monotonic() + self._bound
        answer.raw = _TimelyBody(answer.raw, deadline, request.url)
        if not streamed:
            answer.content  # noqa: B018  reading it keeps it
        return answer

    def close(self) -> None:
        self._session.close()


class _TimelyBody:
    """A body that is read as it comes, until the deadline."""

    def __init__(self, raw: Any, deadline: float, url: str) -> None:
        self._raw, self._deadline, self._url = raw, deadline, url

    def stream(self) -> Iterator[bytes]:
        try:
            while part := self._raw.read1(64 * 1024):
                yield part
                if time.monotonic() > self._deadline:
                    self._raw.close()  # a connection with half an answer on it is of no use to anybody
                    raise ReadTimeoutError(endpoint_url=self._url)
        except HTTPError as error:
            raise HTTPClientError(error=error) from error
        if missing := self._raw.length_remaining:
            raise HTTPClientError(error=f"the answer broke off {missing} bytes before its end")

    def read(self, amount: int | None = None) -> bytes:
        assert amount is None, "bodies are read whole"
        return b"".join(self.stream())

    def close(self) -> None:
        self._raw.close()


def open_client(name: str, *, endpoint: str, environment: Mapping[str, str], clock: Clock) -> S3Client:
    """A client of one bucket at `endpoint`, with the environment's credentials."""
    bucket = find_bucket(Bucket("s3", name, endpoint=endpoint, style="path", environment=environment))
    return S3Client(bucket, Credentials(bucket, clock=clock), SourceSettings())


_SIGN_IN = (
    NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError,
    MetadataRetrievalError, ProfileNotFound, InvalidConfigError,
)  # fmt: skip


def _keep_listing(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Take the body of a listing away from botocore's parser, which would need 60 µs an object."""
    if response_dict["status_code"] == 200:
        customized_response_dict["Body of the listing"] = response_dict["body"]
        response_dict["body"] = b"<ListBucketResult/>"


def _content_range(header: str | None, whole: ByteRange) -> tuple[ByteRange, int]:
    """What "bytes 0-9/100" says; without one the answer is the whole object."""
    with suppress(AttributeError, ValueError):
        unit, _, rest = str(header).partition(" ")
        span, _, size = rest.partition("/")
        first, _, last = span.partition("-")
        if unit == "bytes":
            return ByteRange(int(first), int(last) + 1), int(size)
    return whole, whole.length
