"""fsspec as a source: bounded in time, exact in length, its errors made ours."""

import asyncio
import threading
import zipfile
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from hashlib import md5
from pathlib import Path
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from datacache.clock import VirtualClock
from datacache.config.settings import SourceSettings
from datacache.errors import (
    Archived,
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
from datacache.model import ByteRange, ObjectInfo, Version
from datacache.sources.checked import CheckedSource
from datacache.sources.filesystem import FsspecSource, Stalled, _Calls, _nanoseconds, check_scheme, translate
from datacache.sources.steady import SteadySource
from tests.conftest import AnnouncedLogs
from tests.support.faulty_s3 import Elsewhere, Flip, NotPartial, Shorten, Status
from tests.support.oss_stub import OssStub

QUICK = SourceSettings(timeout=0.15, stall_timeout=0.05, connect_timeout=0.05)
BODY = bytes(range(256)) * 40


class Files(AbstractFileSystem):
    """A file system of one directory `root`, told what to say."""

    protocol = "files"
    cachable = False

    def __init__(self, *facts: dict[str, Any], body: bytes = BODY) -> None:
        super().__init__()
        self.facts, self.body = list(facts), body

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        return self.facts

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return next(facts for facts in self.facts if facts["name"] == path) | {"size": len(self.body)}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return self.body[start:end]


def of(files: AbstractFileSystem, settings: SourceSettings = QUICK) -> FsspecSource:
    return FsspecSource("files://root", settings=settings, filesystem=files)


@pytest.fixture
def oss() -> Iterator[OssStub]:
    with OssStub({"o": BODY}) as server:
        yield server


def ossfs(server: OssStub) -> FsspecSource:
    options = {"endpoint": server.endpoint, "key": "k", "secret": "s"}
    return FsspecSource("oss://bucket", settings=SourceSettings(), options=options)


@pytest.mark.parametrize("name", ["OSSFileSystem", "AioOSSFileSystem"])
def test_ossfs_itself_gives_a_byte_too_many(oss: OssStub, name: str) -> None:
    """ "Tested with ossfs's off-by-one range end": plain ossfs is found out, and its bytes are not data."""
    plain = getattr(pytest.importorskip("ossfs"), name)(
        endpoint=oss.endpoint, key="k", secret="s", skip_instance_cache=True
    )
    with closing(FsspecSource("oss://bucket", settings=SourceSettings(), filesystem=plain)) as source:
        info = ObjectInfo("o", len(BODY), Version())
        with pytest.raises(WrongBytes, match="gave 11 bytes of 'o' when asked for the 10 bytes 5-15"):
            source.read(info, ByteRange(5, 15))
    if hasattr(plain, "close_session"):
        asyncio.run_coroutine_threadsafe(plain._session.close(), plain.loop).result(5)


def test_our_ossfs_gives_what_was_asked_for(oss: OssStub) -> None:
    """The range, the condition and the tag are OSS's own: one exact request for each read."""
    with closing(ossfs(oss)) as source:
        info = source.stat("o")
        for span in (
            ByteRange(0, 10),
            ByteRange(5, 15),
            ByteRange(0, len(BODY)),
            ByteRange(len(BODY) - 1, len(BODY)),
        ):
            assert source.read(info, span) == BODY[span.start : span.stop]
    asked = [request.headers for request in oss.requests if request.kind == "get"]
    assert [headers["range"] for headers in asked][:2] == ["bytes=0-9", "bytes=5-14"]
    assert {headers["if-match"] for headers in asked} == {info.version.etag}
    assert {headers["x-oss-range-behavior"] for headers in asked} == {"standard"}


@pytest.mark.parametrize("fault", [Shorten(), Elsewhere(), Elsewhere(-3), NotPartial()])
def test_another_range_than_asked_for_is_an_error(oss: OssStub, fault: Any) -> None:
    """What OSS says of the range it sends is compared with the one that was asked for."""
    with closing(ossfs(oss)) as source:
        info = source.stat("o")
        oss.add("get", fault)
        with pytest.raises(WrongBytes):
            source.read(info, ByteRange(5, 15))
        assert source.read(info, ByteRange(5, 15)) == BODY[5:15]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Status(403, "AccessDenied"), Denied),
        (Status(403, "SecurityTokenExpired"), CredentialsExpired),
        (Status(403, "InvalidObjectState"), Archived),
        (Status(404, "NoSuchKey"), NotFound),
        (Status(412, "PreconditionFailed"), VersionChanged),
        (Status(416, "InvalidRange"), WrongBytes),
        (Status(429, "Throttling"), Unavailable),
        (Status(500, "InternalError"), Unavailable),
        (Status(503, "SlowDown", "7"), Unavailable),
    ],
)
def test_what_oss_says_is_understood(oss: OssStub, fault: Status, error: type[SourceError]) -> None:
    """OSS's refusals become our errors, with the wait it asks for."""
    with closing(ossfs(oss)) as source:
        info = source.stat("o")
        oss.add("get", fault)
        with pytest.raises(error, match="oss://bucket") as caught:
            source.read(info, ByteRange(5, 15))
        assert type(caught.value) is error
        if fault.retry_after:
            assert isinstance(caught.value, Unavailable) and caught.value.retry_after == 7


def test_a_damaged_whole_object_of_oss_is_fetched_again(oss: OssStub, logs: AnnouncedLogs) -> None:
    """OSS's entity tags are MD5s, in capitals; ossfs itself compares nothing."""
    logs.expect("was damaged")
    oss.put("o", BODY, etag=f'"{md5(BODY, usedforsecurity=False).hexdigest().upper()}"')
    with closing(CheckedSource(ossfs(oss))) as source:
        info = source.stat("o")
        oss.add("get", Flip())
        assert source.read(info, ByteRange(0, len(BODY))) == BODY
        assert oss.count("get") == 2


def test_archived_objects_of_oss_are_known_by_the_listing(oss: OssStub) -> None:
    """The storage class says what cannot be read at once."""
    oss.put("cold", b"x", storage_class="ColdArchive", headers={"x-oss-storage-class": "ColdArchive"})
    with closing(ossfs(oss)) as source:
        (page,) = source.list("", recursive=True)
        assert {o.key: o.archived for o in page.objects} == {"cold": True, "o": False}
        assert source.stat("cold").archived


class Stuck(MemoryFileSystem):
    """A file system whose reads hang until the test ends them."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self.release.wait(30)
        return b"late"


def test_a_read_that_hangs_is_given_up(clock: VirtualClock) -> None:
    """ "Stalled requests are abandoned and retried"; the thread that hangs is counted, then forgotten."""
    files = Stuck()
    with closing(FsspecSource("memory://x", settings=QUICK, filesystem=files)) as source:
        info = ObjectInfo("k", 4, Version())
        with pytest.raises(Unavailable, match=r"no answer in 0\.1 s"):
            source.read(info, ByteRange(0, 4))
        assert "1 stuck" in repr(source)
        files.release.set()
        assert source.read(info, ByteRange(0, 4)) == b"late"
        steady = SteadySource(source, QUICK, clock)
        assert steady.read(info, ByteRange(0, 4)) == b"late"


def test_when_all_calls_hang_callers_are_told_at_once() -> None:
    """The number of threads is bounded: when all hang nobody waits for one, and when one ends it is used."""
    calls, release = _Calls(2), threading.Event()
    for _ in range(2):
        with pytest.raises(Stalled, match="no answer"):
            calls.run(lambda: release.wait(30), 0.02)
    with pytest.raises(Stalled, match="2 calls hang"):
        calls.run(lambda: True, 3600)
    release.set()
    with calls._changed:
        assert calls._changed.wait_for(lambda: not calls._running, 10)
    assert calls.run(lambda: 5, 10) == 5
    assert repr(calls) == "<0 calls, 0 stuck>"


def test_a_caller_waits_for_room() -> None:
    """When all threads are busy and not stuck, the next caller waits for one, for as long as it may."""
    calls, release, begun = _Calls(1), threading.Event(), threading.Event()

    def busy() -> str:
        begun.set()
        release.wait(30)
        return "done"

    answers: list[str] = []
    first = threading.Thread(target=lambda: answers.append(calls.run(busy, 30)))
    first.start()
    assert begun.wait(10)
    with pytest.raises(Stalled):
        calls.run(lambda: True, 0.02)
    release.set()
    first.join()
    assert answers == ["done"]
    calls.close()
    with pytest.raises(Stalled, match="closed"):
        calls.run(lambda: True, 1)


class Slow(AsyncFileSystem):
    """An asynchronous file system that never answers."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = threading.Event()

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError


def test_an_asynchronous_call_that_hangs_is_cancelled() -> None:
    """Where it can be, a call is ended instead of left behind."""
    files = Slow()
    source = FsspecSource("slow://x", settings=QUICK, filesystem=files)
    with pytest.raises(Unavailable, match="no answer"):
        source.stat("k")
    assert files.cancelled.wait(10)


class Oss2Error(Exception):
    """Shaped as oss2's errors are."""

    def __init__(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__("details")
        self.status, self.code, self.headers = status, code, headers or {}


class BotoError(Exception):
    """Shaped as botocore's ClientError is."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__("details")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class GcsError(Exception):
    """Shaped as gcsfs's HttpError is."""

    def __init__(self, code: int) -> None:
        super().__init__("details")
        self.code = code


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("x"), NotFound),
        (FileNotFoundError(2, "x"), NotFound),
        (NotADirectoryError(20, "x"), NotFound),
        (IsADirectoryError(21, "x"), NotFound),
        (OSError(36, "File name too long"), NotFound),
        (PermissionError("no"), Denied),
        (PermissionError("The provided token has expired."), CredentialsExpired),
        (OSError(5, "EIO"), Unavailable),
        (TimeoutError(), Unavailable),
        (ConnectionResetError(104, "reset"), Unavailable),
        (EOFError(), Unavailable),
        (ValueError("what"), Unsupported),
        (NotImplementedError("no"), Unsupported),
        (type("ClientPayloadError", (Exception,), {"__module__": "aiohttp"})("x"), Unavailable),
        (caused(OSError(5, "x"), Oss2Error(412, "PreconditionFailed")), VersionChanged),
        (caused(OSError(5, "x"), Oss2Error(-2, "")), Unavailable),
        (caused(PermissionError("x"), BotoError(400, "ExpiredToken")), CredentialsExpired),
        (caused(OSError(5, "x"), BotoError(403, "InvalidObjectState")), Archived),
        (GcsError(404), NotFound),
        (GcsError(503), Unavailable),
        (Oss2Error(429, "", {"Retry-After": "3"}), Unavailable),
    ],
)
def test_errors_of_file_systems_become_ours(error: Exception, kind: type[SourceError]) -> None:
    """One table for what fsspec's file systems raise, whatever library is below."""
    ours = translate(error, "x://thing")
    assert type(ours) is kind
    assert str(ours).startswith("x://thing")
    if isinstance(error, Oss2Error):
        assert isinstance(ours, Unavailable) and ours.retry_after == 3


def test_errors_hold_no_secrets() -> None:
    """What libraries put into their messages is redacted before it becomes ours."""
    assert "hush" not in str(translate(OSError("GET https://x/?X-Amz-Signature=hush failed"), "x://thing"))


@pytest.mark.parametrize(
    ("facts", "version"),
    [
        ({"ETag": '"abc"', "LastModified": 5}, Version(etag='"abc"')),
        ({"etag": 'W/"abc"'}, Version(etag='W/"abc"')),
        ({"e_tag": "abc"}, Version(etag="abc")),
        ({"generation": 12, "updated": "2024-01-01T00:00:00Z"}, Version(stamp="7-12")),
        ({"mtime": 5.25}, Version(stamp="7-5250000000")),
        ({"md5": "ff", "mtime": 5}, Version(stamp="7-ff")),
        ({}, Version(stamp="7-0")),
    ],
)
def test_a_version_is_made_of_what_is_told(facts: dict[str, Any], version: Version) -> None:
    """A tag as it is, else a mark that names the content, else the time; in listing and stat alike."""
    files = Files({"name": "root/f", "type": "file", "size": 7} | facts, body=b"1234567")
    with closing(of(files)) as source:
        ((listed,),) = (page.objects for page in source.list("", recursive=True))
        assert listed.version == source.stat("f").version == version


@pytest.mark.parametrize(
    ("moment", "nanoseconds"),
    [
        (datetime(2024, 1, 1), 1704067200_000000000),
        (datetime(2024, 1, 1, tzinfo=UTC), 1704067200_000000000),
        (datetime(2024, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), 1704067200_000000000),
        ("2024-01-01T00:00:00.5+00:00", 1704067200_500000000),
        ("Mon, 01 Jan 2024 00:00:00 GMT", 1704067200_000000000),
        (1704067200, 1704067200_000000000),
        (1704067200.123456, 1704067200_123456000),
        ("yesterday", 0),
        (None, 0),
        (b"?", 0),
    ],
)
def test_times_come_in_many_shapes(moment: object, nanoseconds: int) -> None:
    """Whatever a file system calls a time is nanoseconds; what cannot be read is none."""
    assert _nanoseconds(moment) == nanoseconds


def test_listings_are_taken_with_care() -> None:
    """What is not below the root, not a file, or the directory itself is not listed as an object."""
    files = Files(
        {"name": "/root/b", "type": "file", "size": 1},
        {"name": "root/a", "type": "file", "size": None},
        {"name": "root/d", "type": "directory", "size": 0},
        {"name": "root", "type": "directory", "size": 0},
        {"name": "rootless/x", "type": "file", "size": 1},
        {"name": "root/pipe", "type": "other", "size": 0},
    )
    files.facts.append({"name": "root/a", "type": "file"})
    with closing(of(files)) as source:
        (page,) = source.list("", recursive=False)
        assert [(o.key, o.size) for o in page.objects] == [("a", len(BODY)), ("b", 1)]
        assert page.prefixes == ["d/"]


class Sizeless(Files):
    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": None}


def test_a_store_that_tells_no_sizes_is_not_supported() -> None:
    """Without its size an object cannot be a file."""
    with closing(of(Sizeless())) as source, pytest.raises(Unsupported, match="does not tell the size of 'x'"):
        source.stat("x")


@pytest.mark.parametrize("key", ["../x", "a/../../x", "./x", "a/.", ""])
def test_directions_are_not_handed_on(key: str) -> None:
    """fsspec is not asked for what it might take for a direction."""
    with closing(of(Files())) as source:
        with pytest.raises(NotFound, match="cannot have an object"):
            source.stat(key)
        assert list(source.list(key + "/", recursive=True)) == []


class Textual(Files):
    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> Any:
        return "12345"


def test_a_file_system_that_answers_text_is_wrong() -> None:
    """Bytes are bytes."""
    with closing(of(Textual())) as source, pytest.raises(WrongBytes):
        source.read(ObjectInfo("x", 5, Version()), ByteRange(0, 5))


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("nosuch://x", {}),
        ("github://x", {"nonsense": "1"}),
        ("memory://x", {"skip_instance_cache": "1"}),
        ("dir://x", {}),
    ],
)
def test_what_fsspec_does_not_understand_is_a_wrong_setting(uri: str, options: dict[str, Any]) -> None:
    """A scheme without a file system and options that it refuses are the user's to change."""
    with pytest.raises(SettingError, match="URI: "):
        FsspecSource(uri, settings=QUICK, options=options)


def test_a_chain_has_its_root_in_the_first_link(tmp_path: Path) -> None:
    """An archive is a file system to fsspec, wherever it lies."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/d/a", "zipped")
        archive.writestr("b", "not below the root")
    uri = f"zip://in::file://{tmp_path}/x.zip"
    with closing(CheckedSource(FsspecSource(uri, settings=SourceSettings()))) as source:
        ((found,),) = (page.objects for page in source.list("", recursive=True))
        assert (found.key, found.size) == ("d/a", 6)
        assert source.read(found, ByteRange(1, 4)) == b"ipp"


def test_a_scheme_is_known_before_anything_starts() -> None:
    """`check_scheme` says what is not there, or not installed."""
    check_scheme("memory://x")
    with pytest.raises(SettingError, match=r"nosuch:// is not"):
        check_scheme("nosuch://x")
    with pytest.raises(SettingError, match="whose package is installed"):
        check_scheme("dropbox://x")  # fsspec knows it; its package is none of ours


def test_a_constructor_that_cannot_connect_is_a_store_that_is_away() -> None:
    """fsspec's FTP connects when it is made: no internal error, and no setting that is wrong."""
    with pytest.raises(Unavailable, match=r"ftp://127.0.0.1:1/x cannot be had right now"):
        FsspecSource("ftp://127.0.0.1:1/x", settings=QUICK)


def test_options_in_words() -> None:
    """true and false are no text, and listings are not kept by fsspec."""
    source = FsspecSource("local:///tmp", settings=QUICK, options={"auto_mkdir": "false"})
    assert source._fs.auto_mkdir is False
    assert source._fs.dircache.use_listings_cache is False


def test_a_uri_holds_no_password() -> None:
    """The identity of a source is no place for secrets."""
    source = FsspecSource("memory://user:hush@host/x", settings=QUICK)
    assert source.uri == "memory://user@host/x"
    assert "hush" not in repr(source)


def test_checked_sees_a_change_through_fsspec() -> None:
    """A source without conditions is statted around each read."""
    files = MemoryFileSystem()
    files.pipe_file("/checked/o", b"one")
    with closing(FsspecSource("memory://checked", settings=SourceSettings())) as raw:
        source = CheckedSource(raw)
        info = source.stat("o")
        assert bytes(source.read(info, ByteRange(0, 3))) == b"one"
        files.pipe_file("/checked/o", b"two")
        with pytest.raises(VersionChanged):
            source.read(info, ByteRange(0, 3))
    files.rm("/checked", recursive=True)
