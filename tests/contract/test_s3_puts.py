"""What S3's sink asks a store for, and what becomes of answers that go wrong: against a scripted server."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials

from datacache.clock import SystemClock, VirtualClock
from datacache.config.settings import SourceSettings, UploadSettings
from datacache.errors import Denied, SourceError, Unavailable, VersionChanged, WrongBytes
from datacache.model import MiB
from datacache.sources import aws
from datacache.sources.aws import Bucket, find_bucket
from datacache.sources.keyfile import Keys
from datacache.sources.memory import MemorySource
from datacache.sources.s3upload import S3Sink
from datacache.sources.sink import ANYTHING, DIGEST, NOTHING
from datacache.writing.uploader import Uploader
from tests.conftest import AnnouncedLogs
from tests.contract.sink_suite import Steering, put
from tests.support.faulty_s3 import Fault, FaultyS3, Flip, Lost, Reset, Status
from tests.support.stub import Answer, Request, StubServer
from tests.support.uploading import FakeWork

KEYS = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "S", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}  # fmt: skip
PART = 64 * 1024
SETTINGS = SourceSettings(timeout=5, stall_timeout=2, connect_timeout=2)


@contextmanager
def sink_at(endpoint: str, *, part: int = PART, **more: object) -> Iterator[S3Sink]:
    environment = KEYS | more.pop("environment", {})  # type: ignore[operator]
    more = {"scheme": "s3", "style": "path", **more}
    bucket = Bucket(name="bucket", endpoint=endpoint, environment=environment, **more)  # type: ignore[arg-type]
    with closing(
        S3Sink(find_bucket(bucket), settings=SETTINGS, clock=SystemClock(), part=part, parts_at_once=2)
    ) as sink:
        yield sink


@pytest.fixture
def s3() -> Iterator[FaultyS3]:
    with FaultyS3() as server:
        yield server


def kinds(server: FaultyS3) -> list[str]:
    return [request.kind for request in server.requests]


# ---- whether it can be written to at all ----------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "oss"])
def test_credentials_that_only_read_are_found_out_by_one_request(scheme: str, s3: FaultyS3) -> None:
    """A put that must fail, or where conditions mean nothing an upload that is never completed: it is refused
    as what is put later would be."""
    s3.add("put", Status(403, "AccessDenied"))
    s3.add("create", Status(403, "AccessDenied"))
    with sink_at(s3.endpoint, prefix="p/", scheme=scheme) as sink, pytest.raises(Denied) as caught:
        sink.check_writable()
    assert "datacache-condition" not in str(caught.value)
    assert kinds(s3) == ["put" if scheme == "s3" else "create"]


@pytest.mark.parametrize(("scheme", "asked"), [("s3", ["put"]), ("oss", ["create", "abort"])])
def test_who_may_write_is_told_so_without_an_object(scheme: str, asked: list[str], s3: FaultyS3) -> None:
    """Nothing is there at any time that a listing would show."""
    with sink_at(s3.endpoint, prefix="p/", scheme=scheme) as sink:
        sink.check_writable()
    assert kinds(s3) == asked
    assert not s3.objects
    assert not s3.uploads


def test_a_store_that_passes_over_conditions_is_left_as_it_was() -> None:
    """What it stores is removed; from then on it is asked with an upload that is never completed."""

    def answer(request: Request) -> Answer:
        if request.method == "POST":
            return Answer(
                200, b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
            )
        return Answer(204 if request.method == "DELETE" else 200, b"", {"ETag": '"tag"'})

    with StubServer(answer) as server, sink_at(server.url) as sink:
        for _ in range(2):
            sink.check_writable()
    asked = [(one.method, one.path.partition("?")[0]) for one in server.requests]
    assert [method for method, _ in asked] == ["PUT", "DELETE", "POST", "DELETE"]
    assert asked[0][1] == asked[1][1]
    assert asked[2][1] == asked[3][1]


# ---- a small object by the shorter way ------------------------------------------------------------


@pytest.mark.parametrize("style", ["path", "cname"])
@pytest.mark.parametrize("token", ["", "a token"])
def test_a_small_object_is_asked_for_as_botocore_does(style: str, token: str) -> None:
    """But for what says that botocore made it."""

    def answer(request: Request) -> Answer:
        tag = "412" if request.headers.get("if-match", "").startswith('"0000') else "200"
        return Answer(int(tag), b"", {"ETag": '"tag"', "Date": "Thu, 01 Jan 2026 00:00:00 GMT"})

    environment = {"AWS_SESSION_TOKEN": token} if token else {}
    with StubServer(answer) as server:
        made = sink_at(
            server.url,
            part=16 * MiB,
            style=style,
            requester_pays=True,
            prefix="p q/",
            environment=environment,
        )
        with made as sink:
            for size in (1000, MiB + 1):
                with pytest.raises(SourceError):  # the store's answers are not about this object
                    put(sink, "tägl/a~b c+", bytes(size), expected=NOTHING, metadata={"Id": "7%", "n": "ü"})
    short, long = (one for one in server.requests if one.method == "PUT" and "condition" not in one.path)
    assert short.path == long.path
    assert short.path.endswith("p%20q/t%C3%A4gl/a~b%20c%2B")
    changing = {"content-length", "content-md5", "x-amz-date", "x-amz-content-sha256", "authorization"}
    botocore_s = {"expect", "amz-sdk-invocation-id", "amz-sdk-request", "user-agent"}
    assert {name: value for name, value in short.headers.items() if name not in changing | botocore_s} == {
        name: value for name, value in long.headers.items() if name not in changing | botocore_s
    }
    assert short.headers["x-amz-request-payer"] == "requester"
    assert short.headers.get("x-amz-security-token", "") == token

    def signed(request: Request) -> list[str]:
        scope = re.search(r"Credential=([^,]+), SignedHeaders=([^,]+)", request.headers["authorization"])
        assert scope is not None
        return [scope[1], *sorted(set(scope[2].split(";")) - botocore_s)]

    assert signed(short) == signed(long)


@pytest.mark.parametrize("token", ["", "a token"])
def test_a_signature_is_botocore_s(token: str) -> None:
    """Of the same request, at the same moment."""
    url, keys = "http://127.0.0.1:7070/bucket/a%20key", Keys("A", "S", token)
    form = aws._Form("http://127.0.0.1:7070/bucket/", "127.0.0.1:7070", "eu-west-3")
    given = {"Content-MD5": "eA==", "x-amz-meta-n": "1  2", "If-None-Match": "*"}
    body = b"abc"
    ours = aws._signed(url, form, given, hashlib.sha256(body).hexdigest(), keys, 1_700_000_000.0)
    request = AWSRequest("PUT", url, data=body, headers=given)
    signer = S3SigV4Auth(ReadOnlyCredentials("A", "S", token or None), "s3", "eu-west-3")
    request.context["timestamp"] = ours["X-Amz-Date"]
    signer._modify_request_before_signing(request)
    text = signer.string_to_sign(request, signer.canonical_request(request))
    signer._inject_signature_to_request(request, signer.signature(text, request))
    assert dict(request.headers.items()) == ours


def test_a_bucket_of_another_region_is_found_as_botocore_finds_it() -> None:
    """A store that answers a small put with a redirect is asked again by botocore, which follows it; and from
    then on it makes all of them."""
    asked = []

    def answer(request: Request) -> Answer:
        if request.method == "PUT" and "condition" not in request.path:
            asked.append("expect" in request.headers)
            if "/us-east-1/" in request.headers["authorization"]:
                said = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>"
                return Answer(400, said, {"x-amz-bucket-region": "eu-west-3"})
        if "condition" in request.path:
            return Answer(412)
        return Answer(200, b"", {"ETag": '"900150983cd24fb0d6963f7d28e17f72"'})

    with StubServer(answer) as server, sink_at(server.url) as sink:
        put(sink, "a", b"abc", expected=NOTHING)
        put(sink, "b", b"abc", expected=NOTHING)
    assert not asked[0]
    assert all(asked[1:])


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Status(503, "SlowDown", retry_after="7"), Unavailable),
        (Status(403, "AccessDenied"), Denied),
        (Status(412, "PreconditionFailed"), VersionChanged),
        (Status(400, "BadDigest"), WrongBytes),
        (Reset(), Unavailable),
        (Lost(), Unavailable),
    ],
    ids=repr,
)
def test_a_small_put_that_is_refused_is_one_of_our_errors(
    s3: FaultyS3, fault: Fault, kind: type[SourceError]
) -> None:
    """And it is asked for once."""
    with sink_at(s3.endpoint) as sink:
        assert sink.traits.conditional
        s3.add("put", fault)
        before = s3.count("put")
        with pytest.raises(kind) as caught:
            put(sink, "a", b"abc", expected=NOTHING)
        assert s3.count("put") == before + 1
        if isinstance(fault, Status) and fault.retry_after:
            assert getattr(caught.value, "retry_after", None) == 7.0


# ---- how often a store is asked -------------------------------------------------------------------


def test_a_small_object_is_one_request(s3: FaultyS3) -> None:
    """New or changed; whether the store keeps to conditions is asked once."""
    with sink_at(s3.endpoint) as sink:
        assert sink.traits.conditional
        assert kinds(s3) == ["put"]
        s3.requests.clear()
        stored = put(sink, "a", bytes(PART), expected=NOTHING)
        put(sink, "a", b"two", expected=stored.info.version)
        put(sink, "a", b"three", expected=ANYTHING)
        # Anything may be there: nothing to hold it to.
        assert kinds(s3) == ["put"] * 3
        assert stored.verified == DIGEST


def test_a_large_object_is_begun_sent_and_completed(s3: FaultyS3) -> None:
    """And looked for before it is begun, and before it is completed."""
    data = os.urandom(3 * PART + 1)
    with sink_at(s3.endpoint) as sink:
        assert sink.traits.conditional
        s3.requests.clear()
        assert put(sink, "a", data, expected=NOTHING).verified == DIGEST
    assert kinds(s3) == ["head", "create", *["part"] * 4, "head", "complete"]
    assert s3.objects["a"].data == data
    assert not s3.uploads


# ---- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("digests", [True, False], ids=["refused", "taken"])
def test_a_damaged_part_is_never_completed(digests: bool) -> None:
    """Whether the store finds out by the digest or we do by its answer: the put fails, and when it is tried
    again, that part, and no other, is sent again."""
    data = os.urandom(3 * PART)
    with FaultyS3(digests=digests) as s3, sink_at(s3.endpoint) as sink:
        s3.add("part", Flip())
        steering = Steering()
        with pytest.raises(WrongBytes):
            put(sink, "a", data, expected=NOTHING, steering=steering)
        assert "a" not in s3.objects
        stored = put(sink, "a", data, expected=NOTHING, steering=steering.again())
        assert (s3.objects["a"].data, stored.verified) == (data, DIGEST)
        assert (s3.count("create"), s3.count("part"), s3.count("complete")) == (1, 4, 1)


def test_a_damaged_small_object_is_removed_where_the_store_took_it() -> None:
    """A store that passes over digests says by its tag what it has: that is not left there."""
    with FaultyS3(digests=False) as s3, sink_at(s3.endpoint) as sink:
        assert sink.traits.conditional
        s3.add("put", Flip())
        with pytest.raises(WrongBytes):
            put(sink, "a", b"abc", expected=NOTHING)
        assert "a" not in s3.objects


@pytest.mark.parametrize("size", [3, 2 * PART + 1], ids=["whole", "in parts"])
def test_an_answer_that_is_lost_is_settled_by_asking(
    s3: FaultyS3, size: int, clock: VirtualClock, logs: AnnouncedLogs
) -> None:
    """The uploader finds its own mark under the key: one effect, no conflict, nothing left over."""
    logs.expect("do not get through")
    work = FakeWork(clock, MemorySource())
    work.write("a", bytes(size))
    with sink_at(s3.endpoint) as sink:
        assert sink.traits.conditional
        s3.add("put" if size < PART else "complete", Lost())
        uploader = Uploader(work, [sink], UploadSettings(concurrency=1), clock, jitter=lambda: 0.5)
        work.uploader = uploader
        assert uploader.flush()
        stats = uploader.stats()
        uploader.close()
    assert (stats.uploads, stats.failures, stats.conflicts) == (1, 1, 0)
    assert s3.objects["a"].data == bytes(size) and s3.stored == 1 and not s3.uploads


def test_a_completion_whose_answer_is_lost_is_found(s3: FaultyS3) -> None:
    """The object is there: when the put goes on, nothing is sent again."""
    data, steering = os.urandom(2 * PART), Steering()
    with sink_at(s3.endpoint) as sink:
        s3.add("complete", Lost())
        with pytest.raises(Unavailable):
            put(sink, "a", data, expected=NOTHING, steering=steering)
        s3.requests.clear()
        assert put(sink, "a", data, expected=NOTHING, steering=steering.again()).verified == DIGEST
        assert "part" not in kinds(s3) and "complete" not in kinds(s3)
    assert s3.objects["a"].data == data


def test_parts_that_nobody_goes_on_with_are_aborted(s3: FaultyS3) -> None:
    """Another object under the key needs another upload; and who gives up says so."""
    with sink_at(s3.endpoint) as sink:
        steering = Steering()
        s3.add("part", None, Status(503, "SlowDown"))
        with pytest.raises(Unavailable):
            put(sink, "a", bytes(3 * PART), expected=NOTHING, steering=steering)
        (first,) = s3.uploads
        s3.add("part", Status(503, "SlowDown"), Status(503, "SlowDown"))
        other = steering.again()
        with pytest.raises(Unavailable):
            put(sink, "a", bytes(4 * PART), expected=NOTHING, steering=other)
        (second,) = s3.uploads
        assert second != first
        sink.abandon("a", other.again().resume)
        assert not s3.uploads
