"""
A store that goes wrong, over HTTP, under the whole stack that `open_source` makes.

Each row is a fault of one request (or of all), and what a reader of the object comes to: the right
bytes, or an error that says what happened. Wrong bytes are never among them.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from random import Random

import pytest

from datacache.clock import SystemClock
from datacache.config.settings import SourceSettings
from datacache.errors import (
    Archived,
    BreakerOpen,
    Denied,
    NotFound,
    SourceError,
    Unavailable,
    VersionChanged,
    WrongBytes,
)
from datacache.model import ByteRange, MiB, MountPoint, ObjectInfo
from datacache.sources.opening import open_source
from datacache.sources.source import Source
from tests.conftest import AnnouncedLogs
from tests.support.faulty_s3 import (
    Before,
    Elsewhere,
    Fault,
    FaultyS3,
    Flip,
    IgnoreCondition,
    NotPartial,
    Reset,
    Shorten,
    Stall,
    Status,
    Trickle,
    Truncate,
)
from tests.support.reading import until

BODY = Random(7).randbytes(50_000)
ODD = "odd//key"  # obstore cannot ask for it, so botocore does
PART, WHOLE = ByteRange(1000, 2000), ByteRange(0, 50_000)
# Real time: a stall is something that a socket sees. Short, and long enough for a loaded machine.
QUICK = SourceSettings(timeout=0.6, stall_timeout=0.15, connect_timeout=1.0, backoff=0.01, backoff_max=0.05)
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "example", "AWS_REGION": "us-east-1"}


@pytest.fixture
def s3() -> Iterator[FaultyS3]:
    with FaultyS3({"o": BODY, ODD: BODY[:1000]}) as server:
        yield server


def opened(server: FaultyS3, settings: SourceSettings = QUICK) -> Source:
    mount = MountPoint("s3://bucket", options={"endpoint": server.endpoint, "style": "path"})
    environment = KEYS | {"AWS_EC2_METADATA_DISABLED": "true"}
    return open_source(mount, settings=settings, environment=environment, clock=SystemClock())


@pytest.mark.parametrize(
    "fault",
    [
        Status(429, "SlowDown"),
        Status(500, "InternalError"),
        Status(502),
        Status(503, "SlowDown"),
        Status(503, "SlowDown", retry_after="0"),
        Stall(),
        Stall(after=0),
        Stall(after=100),
        Truncate(0),
        Truncate(500),
        Shorten(),
        Shorten(999),
        Reset(),
        Reset(after=0),
        Reset(after=500),
        Elsewhere(),
        Elsewhere(-1),
        NotPartial(),
    ],
    ids=repr,
)
def test_one_bad_answer_is_asked_for_again(s3: FaultyS3, fault: Fault) -> None:
    """What goes wrong once is nobody's error: the second answer is right, and is the only one seen."""
    with closing(opened(s3)) as source:
        info = source.stat("o")
        s3.add("get", fault)
        assert bytes(source.read(info, PART)) == BODY[1000:2000]
        assert s3.count("get") == 2


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Status(403, "AccessDenied"), Denied),
        (Status(403, "InvalidObjectState"), Archived),
        (Status(404, "NoSuchKey"), NotFound),
        (Status(404, "NoSuchBucket"), NotFound),
        (Status(412, "PreconditionFailed"), VersionChanged),
        (Status(416, "InvalidRange"), WrongBytes),
        (Status(429, "SlowDown"), Unavailable),
        (Status(503, "SlowDown"), Unavailable),
        (Stall(after=10), Unavailable),
        (Reset(after=10), Unavailable),
        (Truncate(10), Unavailable),
        (Shorten(), WrongBytes),
        (Elsewhere(), WrongBytes),
        (NotPartial(), WrongBytes),
    ],
    ids=repr,
)
def test_what_stays_wrong_is_an_error(
    s3: FaultyS3, fault: Fault, error: type[SourceError], logs: AnnouncedLogs
) -> None:
    """ "Wrong length, range or version is always an error, never data", within the bound of time."""
    logs.expect("does not answer")
    with closing(opened(s3)) as source:
        info = source.stat("o")
        s3.add("get", *[fault] * 500)
        began = time.monotonic()
        with pytest.raises(error) as caught:
            source.read(info, PART)
        assert type(caught.value) is error
        assert time.monotonic() - began < 5
        if error is Unavailable:
            with pytest.raises(BreakerOpen):
                source.stat("o")
        else:
            s3.put("other", b"x")
            assert source.stat("other").size == 1


def test_archived_objects_say_so(s3: FaultyS3) -> None:
    """ "Archived objects (Glacier and the like) fail with a sentence that says so"."""
    s3.add("get", Status(403, "InvalidObjectState"))
    with closing(opened(s3)) as source, pytest.raises(Archived, match="archived and must be restored"):
        source.read(source.stat("o"), PART)


@pytest.mark.parametrize("condition", [None, IgnoreCondition()], ids=["If-Match", "no If-Match"])
@pytest.mark.parametrize("size", [50_000, 40_000])
def test_a_changed_object_is_an_error(s3: FaultyS3, condition: Fault | None, size: int) -> None:
    """New bytes are never given for the old version, by stores that ignore conditions neither."""
    with closing(opened(s3)) as source:
        info = source.stat("o")
        s3.put("o", bytes(size))
        s3.add("get", condition, condition)
        with pytest.raises(VersionChanged):
            source.read(info, PART)


def test_an_object_that_changes_between_two_tries(s3: FaultyS3) -> None:
    """The second try asks for the version of the first."""
    with closing(opened(s3)) as source:
        info = source.stat("o")
        s3.add("get", Reset(after=10), Before(lambda: s3.put("o", bytes(50_000))))
        with pytest.raises(VersionChanged):
            source.read(info, PART)


def test_a_damaged_whole_object_is_fetched_again(s3: FaultyS3, logs: AnnouncedLogs) -> None:
    """ "Wrong bytes too wherever the store gives a digest and the object is fetched whole"."""
    logs.expect("was damaged")
    with closing(opened(s3)) as source:
        info = source.stat("o")
        s3.add("get", Flip())
        assert bytes(source.read(info, WHOLE)) == BODY
        assert s3.count("get") == 2


def test_a_slow_trickle_is_no_stall(s3: FaultyS3) -> None:
    """Bytes that come slowly but steadily are waited for, within the bound of the operation."""
    with closing(opened(s3, replace(QUICK, timeout=5.0))) as source:
        info = source.stat("o")
        s3.add("get", Trickle(every=0.02))
        assert bytes(source.read(info, ByteRange(10, 30))) == BODY[10:30]
        assert s3.count("get") == 1


def test_an_endless_trickle_ends_at_the_bound(s3: FaultyS3, logs: AnnouncedLogs) -> None:
    """A byte now and then does not keep an operation alive for ever."""
    logs.expect("does not answer")
    with closing(opened(s3)) as source:
        info = source.stat("o")
        s3.add("get", *[Trickle(every=0.05)] * 50)
        began = time.monotonic()
        with pytest.raises(Unavailable):
            source.read(info, PART)
        assert time.monotonic() - began < 5


def test_what_botocore_asks_for_ends_at_the_bound_too(s3: FaultyS3, logs: AnnouncedLogs) -> None:
    """Its own time-out is one between two bytes: a listing or a key that trickles would take minutes."""
    logs.expect("does not answer")
    with closing(opened(s3)) as source:
        info = source.stat(ODD)
        s3.add("get", *[Trickle(every=0.05)] * 50)
        s3.add("list", *[Trickle(every=0.05)] * 50)
        page = source.list("", recursive=True)
        for act in (lambda: source.read(info, ByteRange(0, 1000)), lambda: next(page)):
            began = time.monotonic()
            with pytest.raises(Unavailable):
                act()
            assert time.monotonic() - began < 5


def test_a_busy_store_may_be_asked_whether_it_keeps_versions(s3: FaultyS3) -> None:
    """A snapshot begins with this question; one bad answer must not end it."""
    with closing(opened(s3)) as source:
        assert source.traits.conditional and source.traits.md5_etag
        s3.add("list", Status(503, "SlowDown"))
        assert not source.traits.versioned
        assert s3.count("list") == 2


def test_a_damaged_whole_object_of_google_is_fetched_again(s3: FaultyS3, logs: AnnouncedLogs) -> None:
    """Google's entity tags are MD5s, as those of S3 are; its XML is near enough to S3's for one read."""
    logs.expect("was damaged")
    mount = MountPoint("gs://bucket", options={"endpoint": s3.endpoint, "anonymous": "true"})
    with closing(open_source(mount, settings=QUICK, environment={}, clock=SystemClock())) as source:
        info = source.stat("o")
        s3.add("get", Flip())
        assert bytes(source.read(info, WHOLE)) == BODY
        assert s3.count("get") == 2


@pytest.mark.parametrize(
    "fault",
    [Status(503, "SlowDown"), Status(429, "SlowDown"), Reset(), Truncate(40), Stall(after=10)],
    ids=repr,
)
def test_a_listing_survives_a_bad_page(s3: FaultyS3, fault: Fault) -> None:
    """A page that fails is asked for again; the listing has everything once."""
    keys = sorted(["o", ODD, *(f"k{i:04d}" for i in range(2500))])
    for key in keys:
        s3.put(key, BODY if key in ("o", ODD) else b"")
    with closing(opened(s3, replace(QUICK, timeout=5.0))) as source:  # 1000 objects take this server a while
        s3.add("list", None, fault, None, fault)
        listed = [o.key for page in source.list("", recursive=True) for o in page.objects]
    assert listed == keys


def test_a_restart_of_the_store_is_not_noticed(s3: FaultyS3) -> None:
    """Connections that were kept and have been cut are made anew."""
    with closing(opened(s3)) as source:
        info = source.stat("o")
        for _ in range(3):
            assert bytes(source.read(info, PART)) == BODY[1000:2000]
            s3.cut()
        assert source.stat("o") == info


def test_a_store_that_is_not_there(logs: AnnouncedLogs) -> None:
    """A port where nobody listens is Unavailable, then at once."""
    logs.expect("does not answer")
    with FaultyS3() as server:
        pass
    with closing(opened(server, replace(QUICK, timeout=0.1))) as source:
        with pytest.raises(Unavailable, match="given up after"):
            source.stat("o")
        with pytest.raises(BreakerOpen):
            source.stat("o")


@pytest.mark.parametrize(
    ("operation", "act"),
    [
        ("get", lambda source, info: source.read(info["large"], ByteRange(0, 2 * MiB))),
        ("get", lambda source, info: source.read(info[ODD], ByteRange(0, 1000))),
        ("head", lambda source, info: source.stat("o")),
        ("list", lambda source, info: list(source.list("", recursive=True))),
    ],
    ids=["large read by obstore", "read by botocore", "stat", "list"],
)
@pytest.mark.parametrize("fault", [Stall(), Stall(after=10), Trickle(0.01)], ids=repr)
def test_a_close_does_not_wait_for_a_store_that_stalls(
    s3: FaultyS3, operation: str, act: Callable[[Source, dict[str, ObjectInfo]], object], fault: Fault
) -> None:
    """Whatever is under way is given up by `close`, though it could go on for minutes yet."""
    patient = replace(QUICK, timeout=600.0, stall_timeout=300.0)
    s3.put("large", bytes(2 * MiB))
    with closing(opened(s3, patient)) as source, ThreadPoolExecutor(1) as pool:
        info = {key: source.stat(key) for key in ("o", "large", ODD)}
        if operation == "head" and fault != Stall():
            pytest.skip("an answer to HEAD has no body that could be slow")
        before = s3.count(operation)
        s3.add(operation, fault, fault)
        under_way = pool.submit(act, source, info)
        until(lambda: s3.count(operation) > before)
        begun = time.monotonic()
        source.close()
        assert isinstance(under_way.exception(10.0), Unavailable)
        assert time.monotonic() - begun < 5.0
        with pytest.raises(Unavailable):
            source.read(info["o"], PART)


@pytest.mark.parametrize(
    ("fault", "stall_timeout"), [(Trickle(0.01), 300.0), (Stall(), 0.5), (Stall(after=10), 0.5)], ids=repr
)
def test_a_close_waits_for_a_small_object_no_longer_than_a_stall(
    s3: FaultyS3, fault: Fault, stall_timeout: float
) -> None:
    """A small object is read by a call that cannot be given up: between two parts of it, it is."""
    patient = replace(QUICK, timeout=600.0, stall_timeout=stall_timeout)
    with closing(opened(s3, patient)) as source, ThreadPoolExecutor(1) as pool:
        info = source.stat("o")
        s3.add("get", *[fault] * 100)
        under_way = pool.submit(source.read, info, WHOLE)
        until(lambda: s3.count("get"))
        begun = time.monotonic()
        source.close()
        assert isinstance(under_way.exception(10.0), Unavailable)
        assert time.monotonic() - begun < 5.0
