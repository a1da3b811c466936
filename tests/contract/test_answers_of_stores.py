"""What a store may answer to a read, a stat and a listing, and what becomes of it: by both clients."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from datacache.clock import SystemClock, VirtualClock
from datacache.config.settings import SourceSettings
from datacache.errors import (
    Archived,
    CredentialsExpired,
    Denied,
    NotFound,
    SourceError,
    Unavailable,
    Unsupported,
    VersionChanged,
    WrongBytes,
)
from datacache.model import ByteRange, MountPoint, ObjectInfo, Version
from datacache.sources.aws import Bucket, Credentials, S3Client
from datacache.sources.checked import CheckedSource
from datacache.sources.objectstore import can_name, s3_store
from datacache.sources.opening import open_raw
from datacache.sources.source import Source
from tests.support.stub import Answer, Request, StubServer, always, in_turn, self_signed

TAG, DATE = '"tag"', "Thu, 01 Jan 2026 00:00:00 GMT"
HEAD = {"ETag": TAG, "Last-Modified": DATE}
BODY = b"0123456789"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "S", "AWS_EC2_METADATA_DISABLED": "true",
               "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}  # fmt: skip
PLAIN, ODD = "key", "odd//"  # obstore asks for the first, botocore for the second


def info(key: str, *, size: int = 10, version: Version | None = None) -> ObjectInfo:
    return ObjectInfo(key, size, version or Version(TAG))


@contextmanager
def s3(script: Callable[[Request], Answer], **options: str) -> Iterator[tuple[Source, StubServer]]:
    """A source of s3://bucket at a server that answers by `script`."""
    settings = SourceSettings(timeout=5, stall_timeout=0.3, connect_timeout=2)
    with StubServer(script) as server:
        mount = MountPoint("s3://bucket", options={"endpoint": server.url, **options})
        source = open_raw(mount, settings=settings, environment=ENVIRONMENT, clock=SystemClock())
        with closing(source):
            yield source, server


def error(status: int, code: str, message: str = "as it is") -> Answer:
    body = f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(status, body.encode(), {"Content-Type": "application/xml", "Retry-After": "3"})


@pytest.mark.parametrize("key", [PLAIN, ODD])
@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (error(404, "NoSuchKey"), NotFound, "s3://bucket/"),
        (error(404, "NoSuchBucket"), NotFound, "check the bucket's name"),
        (error(403, "AccessDenied"), Denied, "AccessDenied as it is"),
        (error(401, "Unauthorized"), Denied, "refused to these credentials"),
        (error(403, "RequestTimeTooSkewed"), Denied, "the clock of this machine"),
        (error(400, "ExpiredToken"), CredentialsExpired, "expired"),
        (error(403, "InvalidObjectState"), Archived, "restore it"),
        (error(412, "PreconditionFailed"), VersionChanged, "no longer has the version"),
        (error(404, "NoSuchVersion"), VersionChanged, "no longer has the version"),
        (error(416, "InvalidRange"), WrongBytes, "range"),
        (error(503, "SlowDown"), Unavailable, "503 SlowDown"),
        (error(500, "InternalError"), Unavailable, "500"),
        (error(429, "TooManyRequests"), Unavailable, "429"),
        (error(501, "NotImplemented"), Unsupported, "501"),
        (error(400, "InvalidRequest"), SourceError, "400 InvalidRequest"),
        (Answer(502, b"<html>bad gateway</html>"), Unavailable, "502"),
        (Answer(403, b""), Denied, "403"),
    ],
)
def test_a_refused_read_is_one_of_our_errors(
    key: str, answer: Answer, kind: type[SourceError], said: str
) -> None:
    """Both clients make the same of the same refusal, and the sentence says what it was."""
    with s3(always(answer)) as (source, _), pytest.raises(kind, match=said) as caught:
        source.read(info(key), ByteRange(2, 5))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def part(start: int, stop: int, size: int = 10, *, tag: str = TAG, length: int | None = None) -> Answer:
    head = {**HEAD, "ETag": tag, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return Answer(206, (BODY * 2)[start:stop], head, length)


@pytest.mark.parametrize("key", [PLAIN, ODD])
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (part(3, 6), WrongBytes),
        (part(2, 4), WrongBytes),
        (part(2, 6), WrongBytes),
        (Answer(200, BODY, HEAD), WrongBytes),
        (part(2, 5, tag='"other"'), VersionChanged),
        (part(2, 5, size=20), WrongBytes),
        (part(2, 5, size=20, tag=""), VersionChanged),
        (part(2, 5, tag=""), WrongBytes),
        (part(2, 5, length=5), SourceError),
    ],
)
def test_another_answer_than_was_asked_for_is_an_error(
    key: str, answer: Answer, kind: type[SourceError]
) -> None:
    """Another range, version or size, half a body, no word on the version: never data."""
    with s3(always(answer)) as (source, _), pytest.raises(kind):
        source.read(info(key), ByteRange(2, 5))


@pytest.mark.parametrize("key", [PLAIN, ODD])
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(200, BODY[:9], HEAD), WrongBytes),
        (Answer(200, BODY + b"x", HEAD), WrongBytes),
        (Answer(200, BODY[:4], HEAD, 10), Unavailable),
        (Answer(200, BODY, {**HEAD, "ETag": '"other"'}), VersionChanged),
        (Answer(200, BODY, {**HEAD, "x-amz-version-id": "v2"}), WrongBytes),
    ],
)
def test_a_whole_object_is_held_against_what_was_asked_too(
    key: str, answer: Answer, kind: type[SourceError]
) -> None:
    """A whole object is asked for without a range; its size, tag and version id must be right."""
    with s3(always(answer)) as (source, server):
        with pytest.raises(kind):
            source.read(info(key, version=Version(TAG, "v1")), ByteRange(0, 10))
        assert "range" not in server.requests[0].headers


@pytest.mark.parametrize("key", [PLAIN, ODD])
def test_one_read_is_one_conditional_request(key: str) -> None:
    """Whole or in part: one GET with the tag as condition, no HEAD; a weak tag is not sent."""
    with s3(
        in_turn(Answer(200, BODY, HEAD), part(2, 5), Answer(200, BODY, {**HEAD, "ETag": "W/" + TAG}))
    ) as (
        source,
        server,
    ):
        assert bytes(source.read(info(key), ByteRange(0, 10))) == BODY
        assert bytes(source.read(info(key), ByteRange(2, 5))) == BODY[2:5]
        weak = info(key, version=Version("W/" + TAG))
        assert bytes(source.read(weak, ByteRange(0, 10))) == BODY
        assert [request.method for request in server.requests] == ["GET"] * 3
        sent = [(r.headers.get("range"), r.headers.get("if-match")) for r in server.requests]
        assert sent == [(None, TAG), ("bytes=2-4", TAG), (None, None)]


@pytest.mark.parametrize("key", [PLAIN, ODD])
def test_a_version_id_is_asked_for(key: str) -> None:
    """The id of a version goes with the request."""
    with s3(always(Answer(200, BODY, {**HEAD, "x-amz-version-id": "v1"}))) as (source, server):
        source.read(info(key, version=Version(TAG, "v1")), ByteRange(0, 10))
        assert server.requests[0].path.endswith("?versionId=v1")


@pytest.mark.parametrize("key", [PLAIN, ODD])
@pytest.mark.parametrize("version_id", ["", "v2"])
def test_an_answer_to_a_version_id_says_which_version_it_is(key: str, version_id: str) -> None:
    """A manifest may know nothing but the id. A store that ignores it would answer with what is current."""
    headers = HEAD | ({"x-amz-version-id": version_id} if version_id else {})
    with s3(always(Answer(200, BODY, headers))) as (source, _), pytest.raises(WrongBytes):
        source.read(info(key, version=Version(version_id="v1")), ByteRange(0, 10))


@pytest.mark.parametrize("key", [PLAIN, ODD])
@pytest.mark.parametrize("answer", [Answer(200, b"", HEAD, 10, hang=True)])
def test_a_stalled_answer_is_given_up(key: str, answer: Answer) -> None:
    """A body that does not come is given up after stall_timeout, to be asked for again."""
    with s3(always(answer)) as (source, _), pytest.raises(Unavailable):
        source.read(info(key), ByteRange(0, 10))


@pytest.mark.parametrize("key", [PLAIN, ODD])
def test_expired_credentials_are_renewed_and_the_read_goes_on(key: str, tmp_path: Path) -> None:
    """Expired credentials are renewed, not reported as denied: the store says that the token has run out,
    new keys are fetched and the read is tried once more."""
    keys = tmp_path / "keys"

    def rotate(name: str) -> None:
        keys.write_text(
            f"[default]\naws_access_key_id={name}\naws_secret_access_key=S\naws_session_token=T{name}\n"
        )

    def script(request: Request) -> Answer:
        if request.headers.get("x-amz-security-token") == "Tnew":
            return Answer(200, BODY, HEAD)
        rotate("new")
        return error(400, "ExpiredToken")

    rotate("old")
    with s3(script, credentials=str(keys)) as (source, server):
        assert bytes(source.read(info(key), ByteRange(0, 10))) == BODY
        assert len(server.requests) == 2
        assert "Credential=new/" in server.requests[1].headers["authorization"]
        assert bytes(source.read(info(key), ByteRange(0, 10))) == BODY
        assert len(server.requests) == 3


def test_a_stat_renews_expired_credentials_too(tmp_path: Path) -> None:
    """HEAD has no body to name the trouble in: a bare 400 is taken for an expired token, once."""
    keys = tmp_path / "keys"
    keys.write_text("[default]\naccess_key=old\nsecret_key=S\n")

    def script(request: Request) -> Answer:
        if "Credential=new/" in request.headers["authorization"]:
            return Answer(200, BODY, HEAD)
        keys.write_text("[default]\naccess_key=new\nsecret_key=S\n")
        return Answer(400)

    with s3(script, credentials=str(keys)) as (source, server):
        assert source.stat(PLAIN).size == 10
        # Between the two, botocore asks whether the bucket has moved to another region.
        assert server.asked("HEAD").count("/bucket/key") == 2
    with s3(always(Answer(400))) as (source, server):
        with pytest.raises(CredentialsExpired, match="most likely"):
            source.stat(PLAIN)
        with pytest.raises(NotFound, match="1024 bytes"):
            source.stat("x" * 1025)
        assert server.asked("HEAD").count("/bucket/key") == 2


@pytest.mark.parametrize("key", [PLAIN, ODD])
def test_an_object_without_an_entity_tag_is_read_and_seen_to_change(key: str) -> None:
    """versitygw has none for what was put into its directory: a listing and a HEAD agree on size and time."""
    listed = (
        f"<ListBucketResult><Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.500Z</LastModified>"
        "<ETag></ETag><Size>10</Size></Contents></ListBucketResult>"
    )
    date = DATE

    def script(request: Request) -> Answer:
        if "list-type" in request.path:
            return Answer(200, listed.encode())
        return Answer(200, BODY, {"Last-Modified": date})

    with s3(script) as (source, _):
        checked = CheckedSource(source)
        ((found,),) = (page.objects for page in checked.list("", recursive=True))
        assert bytes(checked.read(found, ByteRange(0, 10))) == BODY
        date = "Thu, 01 Jan 2026 00:00:01 GMT"
        with pytest.raises(VersionChanged):
            checked.read(found, ByteRange(0, 10))


def test_credentials_that_stay_expired_are_an_error() -> None:
    """One renewal, one more try, then the reader is told."""
    with s3(always(error(400, "ExpiredToken"))) as (source, server):
        with pytest.raises(CredentialsExpired):
            source.read(info(PLAIN), ByteRange(0, 10))
        assert len(server.requests) == 2


def test_keys_that_are_refused_and_did_not_change_are_not_tried_again() -> None:
    """The same keys would be refused again."""
    with s3(always(error(403, "InvalidAccessKeyId"))) as (source, server):
        with pytest.raises(Denied):
            source.read(info(PLAIN), ByteRange(0, 10))
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error(404, "NoSuchBucket"), NotFound),
        (error(403, "AccessDenied"), Denied),
        (error(503, "SlowDown"), Unavailable),
        (error(200, "InternalError"), Unavailable),
        (Answer(200, b"<html/>"), WrongBytes),
        (Answer(200, b"<ListBucketResult><Cont", {}, 100), Unavailable),
    ],
)
def test_a_listing_that_fails_is_an_error(answer: Answer, kind: type[SourceError]) -> None:
    """Refused, broken off, no listing at all: never an empty one. One request, the store's wish to
    wait is kept."""
    with s3(always(answer)) as (source, server):
        with pytest.raises(kind) as caught:
            list(source.list("", recursive=True))
        assert len(server.requests) == 1
        if answer.status == 503:
            assert isinstance(caught.value, Unavailable)
            assert caught.value.retry_after == 3


def listing(*keys: str, token: str = "") -> Answer:
    more = (
        f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
        if token
        else ""
    )
    objects = "".join(f"<Contents><Key>{k}</Key><Size>1</Size><ETag>t</ETag></Contents>" for k in keys)
    return Answer(200, f"<ListBucketResult>{objects}{more}</ListBucketResult>".encode())


def test_pages_are_asked_for_as_they_are_needed() -> None:
    """One request a page, each with the token of the one before."""
    with s3(in_turn(listing("a", "b", token="x+/="), listing("c"))) as (source, server):
        pages = source.list("", recursive=False)
        assert [o.key for o in next(pages).objects] == ["a", "b"]
        assert len(server.requests) == 1
        assert [[o.key for o in page.objects] for page in pages] == [["c"]]
        assert "continuation-token=x%2B%2F%3D" in server.requests[1].path
        assert "delimiter=%2F" in server.requests[1].path


def test_a_listing_that_turns_in_a_circle_is_an_error() -> None:
    """A store that gives the same token for ever does not hold us for ever."""
    with (
        s3(always(listing("a", token="x"))) as (source, _),
        pytest.raises(WrongBytes, match="again and again"),
    ):
        list(source.list("", recursive=True))


def test_a_bucket_that_may_not_be_asked_for_versions_has_none() -> None:
    """s3:GetBucketVersioning is often not granted: read by tag then. Trouble is not an answer."""
    with s3(always(error(403, "AccessDenied"))) as (source, server):
        assert not source.traits.versioned
        assert not source.traits.versioned
        assert len(server.requests) == 1
        with pytest.raises(Unsupported):
            next(source.list("", recursive=True, versions=True))
    with s3(always(error(503, "SlowDown"))) as (source, _), pytest.raises(Unavailable):
        assert source.traits.versioned


def test_a_stat_without_a_size_is_an_error() -> None:
    """HEAD has no body: its headers must say it."""
    with s3(always(Answer(200, b"", {**HEAD, "Content-Length": "7", "x-amz-storage-class": "GLACIER"}))) as (
        source,
        _,
    ):
        assert source.stat("a") == ObjectInfo("a", 7, Version(TAG), 1767225600000000000, True)
    restored = {
        **HEAD,
        "x-amz-storage-class": "GLACIER",
        "x-amz-restore": 'ongoing-request="false", expiry-date="x"',
    }
    with s3(always(Answer(200, b"", restored))) as (source, _):
        assert not source.stat("a").archived


def test_a_bucket_that_is_a_host() -> None:
    """style=cname: the bucket is in neither path nor host, of both clients' requests."""
    with s3(in_turn(Answer(200, BODY, HEAD), listing("a")), style="cname") as (source, server):
        assert bytes(source.read(info("a b"), ByteRange(0, 10))) == BODY
        list(source.list("", recursive=True))
        assert server.requests[0].path == "/a%20b"
        assert server.requests[1].path.startswith("/?list-type=2")
        assert all(r.headers["host"] == server.url.removeprefix("http://") for r in server.requests)


def test_a_bucket_in_the_hosts_name() -> None:
    """style=virtual: obstore is given the endpoint of the bucket, not of the store."""
    store = s3_store(
        "bucket",
        endpoint="https://s3.example:9000",
        region="r",
        style="virtual",
        keys=None,
        requester_pays=False,
        ca_bundle="",
        settings=SourceSettings(),
    )
    assert store.config["endpoint"] == "https://bucket.s3.example:9000"
    assert store.config["virtual_hosted_style_request"]


def test_who_pays_is_said() -> None:
    """requester_pays goes with every request for objects, listings too."""
    answers = in_turn(*[Answer(200, BODY, HEAD)] * 3, listing("a"))
    with s3(answers, requester_pays="true") as (source, server):
        for key in (PLAIN, ODD):
            source.read(info(key), ByteRange(0, 10))
        source.stat(PLAIN)
        list(source.list("", recursive=True))
        assert [r.headers.get("x-amz-request-payer") for r in server.requests] == ["requester"] * 4


@pytest.mark.parametrize("key", [PLAIN, ODD])
def test_a_private_authority_is_trusted_when_it_is_named(key: str, tmp_path: Path) -> None:
    """ca_bundle and AWS_CA_BUNDLE reach both clients; without them, the store is not believed."""
    tls, trust = self_signed(tmp_path)
    settings = SourceSettings(timeout=5, stall_timeout=2)
    with StubServer(always(Answer(200, BODY, HEAD)), tls=tls) as server:
        for options, variables, trusted in (
            ({"ca_bundle": trust}, {}, True),
            ({}, {"AWS_CA_BUNDLE": trust}, True),
            ({}, {}, False),
        ):
            mount = MountPoint("s3://bucket", options={"endpoint": server.url, **options})
            environment = ENVIRONMENT | variables
            source = open_raw(mount, settings=settings, environment=environment, clock=SystemClock())
            with closing(source):
                if trusted:
                    assert bytes(source.read(info(key), ByteRange(0, 10))) == BODY
                else:
                    with pytest.raises(Unavailable):
                        source.read(info(key), ByteRange(0, 10))


@pytest.mark.parametrize("status", [200, 301, 403])
def test_the_region_is_what_the_bucket_says(status: int, clock: VirtualClock) -> None:
    """AWS names a bucket's region in whatever it answers; no region at all is the error it came with."""
    named = always(Answer(status, b"", {"x-amz-bucket-region": "eu-west-3"}))
    for script, said in ((named, "eu-west-3"), (always(error(404, "")), None)):
        with StubServer(script) as server:
            bucket = Bucket("s3", "bucket", endpoint=server.url, environment=ENVIRONMENT)
            client = S3Client(bucket, Credentials(bucket, clock=clock), SourceSettings())
            if said:
                assert client._ask_region() == said
            else:
                with pytest.raises(NotFound):
                    client._ask_region()
            client.close()
            assert {request.method for request in server.requests} == {"HEAD"}


def test_what_obstore_can_name() -> None:
    """Only keys that obstore asks for as they are go through it."""
    assert all(map(can_name, ["a", "a/b", "a b", "ä", "...", ".a", "a..b", "a\\b", "%2e", "😀"]))
    assert not any(map(can_name, ["", "/a", "a/", "a//b", ".", "a/..", "./a", "a\0", "a\x7f", "\udcff"]))


@contextmanager
def azure(script: Callable[[Request], Answer]) -> Iterator[tuple[Source, StubServer]]:
    """A source of az://box/root at a server that answers by `script`."""
    with StubServer(script) as server:
        mount = MountPoint("az://box/root", options={"endpoint": f"{server.url}/me", "account": "me"})
        environment = {"AZURE_STORAGE_ACCOUNT_KEY": "aHVzaA=="}
        settings = SourceSettings(timeout=5, stall_timeout=2)
        with closing(
            open_raw(mount, settings=settings, environment=environment, clock=SystemClock())
        ) as source:
            yield source, server


def test_azure_tags_are_the_same_in_listing_and_answer() -> None:
    """Azure lists entity tags without quotes and sends them with: a listed object can be read."""
    blob = (
        "<Blob><Name>root/a</Name><Properties><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified>"
        "<Etag>0x8D</Etag><Content-Length>10</Content-Length><Content-Type>x</Content-Type></Properties></Blob>"
    )
    page = f"<EnumerationResults><Blobs>{blob}</Blobs><NextMarker/></EnumerationResults>"

    def script(request: Request) -> Answer:
        return (
            Answer(200, page.encode())
            if "comp=list" in request.path
            else Answer(200, BODY, {**HEAD, "ETag": '"0x8D"'})
        )

    with azure(script) as (source, server):
        ((found,),) = (p.objects for p in source.list("", recursive=True))
        assert found == ObjectInfo("a", 10, Version('"0x8D"'), 1767225600000000000)
        assert bytes(source.read(found, ByteRange(0, 10))) == BODY
        assert server.requests[1].headers["if-match"] == '"0x8D"'
        assert server.requests[1].headers["authorization"].startswith("SharedKey me:")
        assert source.stat("a") == found


def test_what_google_and_azure_cannot_do_is_said() -> None:
    """Versions are not listed there, and keys that object_store cannot carry are not asked for."""
    with azure(always(Answer(404))) as (source, server):
        with pytest.raises(Unsupported):
            next(source.list("", recursive=True, versions=True))
        for act in (lambda: source.stat("a//b"), lambda: source.read(info("a/"), ByteRange(0, 10))):
            with pytest.raises(Unsupported, match="has a name"):
                act()
        assert not server.requests
        with pytest.raises(NotFound):
            source.stat("a")
