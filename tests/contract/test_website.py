"""A web server's directory as a source, against the standard library's server and a stub."""

import functools
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from datacache.clock import SystemClock
from datacache.config.settings import SourceSettings
from datacache.errors import NotFound, SourceError, Unavailable, Unsupported, VersionChanged, WrongBytes
from datacache.model import ByteRange, MountPoint, ObjectInfo, Version
from datacache.sources.opening import open_raw
from datacache.sources.source import Source
from datacache.sources.website import WebSource, children
from tests.support.faulty_s3 import FaultyS3, Trickle
from tests.support.stub import Answer, Request, StubServer, always

SETTINGS = SourceSettings(timeout=5, stall_timeout=2)


def opened(uri: str) -> Source:
    return open_raw(MountPoint(uri), settings=SETTINGS, environment={}, clock=SystemClock())


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    """More than are asked at once: a connection beyond the queue would wait for TCP's second try."""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory, and the URL under which the standard library's server shows it."""
    (tmp_path / "data").mkdir()
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield tmp_path / "data", f"http://127.0.0.1:{server.server_port}/data"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_directory_of_the_standard_server_is_a_source(site: tuple[Path, str]) -> None:
    """Files of all names and depths are listed with size and time, statted and read."""
    directory, url = site
    files = ["a b", "a%41", "ä", "d/e f/#x?y", "d/g", "z&<>"]
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name * 3)
    (directory / "gone").symlink_to("nowhere")
    with closing(opened(url)) as source:
        assert source.uri == url
        found = {info.key: info for page in source.list("", recursive=True) for info in page.objects}
        assert sorted(found) == sorted(files)
        for name, info in found.items():
            assert bytes(source.read(info, ByteRange(0, info.size))).decode() == name * 3
            assert info.version.stamp.startswith(f"{info.size}-")
            assert info.mtime_ns > 0
            assert source.stat(name) == info
        (page,) = source.list("", recursive=False)
        assert (sorted(o.key for o in page.objects), page.prefixes) == (["a b", "a%41", "z&<>", "ä"], ["d/"])
        (page,) = source.list("d/", recursive=False)
        assert ([o.key for o in page.objects], page.prefixes) == (["d/g"], ["d/e f/"])
        assert list(source.list("none/", recursive=True)) == []
        with pytest.raises(NotFound):
            source.stat("none")
        with pytest.raises(Unsupported):
            next(source.list("", recursive=True, versions=True))


def test_a_site_that_is_not_there_is_not_found(site: tuple[Path, str]) -> None:
    """The root itself must exist."""
    directory, url = site
    os.rmdir(directory)
    with closing(opened(url)) as source, pytest.raises(NotFound):
        list(source.list("", recursive=True))


def test_a_server_without_ranges_says_so(site: tuple[Path, str]) -> None:
    """The standard library's server knows no ranges: whole files can be read, parts cannot."""
    directory, url = site
    (directory / "file").write_text("0123456789")
    with closing(opened(url)) as source:
        info = source.stat("file")
        assert bytes(source.read(info, ByteRange(0, 10))) == b"0123456789"
        with pytest.raises((Unsupported, WrongBytes)):
            source.read(info, ByteRange(2, 5))


def test_many_files_come_in_pages(site: tuple[Path, str]) -> None:
    """More files than are asked for at once; a directory without any."""
    directory, url = site
    for i in range(300):
        (directory / f"{i:03d}").touch()
    with closing(opened(url)) as source:
        pages = list(source.list("", recursive=False))
        assert [len(page.objects) for page in pages] == [256, 44]
        assert [o.key for page in pages for o in page.objects] == [f"{i:03d}" for i in range(300)]
        shutil.rmtree(directory)
        directory.mkdir()
        assert [page for page in source.list("", recursive=True) if page.objects or page.prefixes] == []


def test_links_that_lead_elsewhere_are_no_children() -> None:
    """Only links to what lies directly below the page count, however they are written."""
    page = """<a href="../">up</a> <a href="/d/abs">1</a> <a href='rel%20x'>2</a> <A HREF="sub/">3</A>
      <a href="http://h/d/full">4</a> <a href="http://other/d/x">no</a> <a href="?C=N">sort</a>
      <a href="deep/er">no</a> <a href="http://h:bad">no</a> <a href="mailto:x@y">no</a> <a href="/dx">no</a>
      <a href="rel%20x">again</a> <a>none</a> <img src="img"> <a href="a%2Fb">no</a> <a href="./">self</a>
      <a href="b&amp;c">5</a> <a href="//sub2/">no</a> <a href="frag#part">6</a> <a href="http://[">no</a>"""
    assert children(page, "http://h/d/") == (["abs", "b&c", "frag", "full", "rel x"], ["sub/"])


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (Answer(403, b"Forbidden"), Unsupported, "manifest"),
        (Answer(405), Unsupported, "manifest"),
        (Answer(200, b"{}", {"Content-Type": "application/json"}), Unsupported, "manifest"),
        (Answer(404), NotFound, "does not exist"),
        (Answer(503, b"", {"Retry-After": "4"}), Unavailable, "503"),
        (Answer(200, b"<a", {"Content-Type": "text/html"}, 100), SourceError, "http://127"),
    ],
)
def test_a_directory_that_cannot_be_listed(answer: Answer, kind: type[SourceError], said: str) -> None:
    """No listing is an error that shows the way out, never an empty directory."""
    with StubServer(always(answer)) as server, closing(opened(server.url)) as source:
        with pytest.raises(kind, match=said) as caught:
            list(source.list("", recursive=True))
        if isinstance(caught.value, Unavailable) and answer.status == 503:
            assert caught.value.retry_after == 4
    with closing(opened("http://127.0.0.1:9/x")) as source, pytest.raises(Unavailable):
        list(source.list("", recursive=True))


def test_a_page_that_trickles_ends_at_the_bound() -> None:
    """The time-out of its client is one between two bytes."""
    settings = SourceSettings(timeout=0.3, stall_timeout=1.0)
    with FaultyS3(bucket="") as server:
        server.add("list", Trickle(every=0.05))
        with closing(WebSource(server.endpoint + "/", settings=settings)) as source:
            began = time.monotonic()
            with pytest.raises(Unavailable, match="too long"):
                list(source.list("", recursive=False))
            assert time.monotonic() - began < 5


def test_a_directory_in_itself_ends() -> None:
    """A server that shows a directory below itself is not walked for ever."""
    loop = Answer(200, b'<a href="again/">again</a>', {"Content-Type": "text/html"})
    with (
        StubServer(always(loop)) as server,
        closing(opened(server.url)) as source,
        pytest.raises(Unsupported, match="manifest"),
    ):
        list(source.list("", recursive=True))


def test_the_answers_tag_proves_the_version() -> None:
    """One GET a read: a server that ignores If-Match is found out by the tag of its answer."""
    tags = iter(['"one"', '"two"', ""])

    def script(request: Request) -> Answer:
        return Answer(200, b"12345", {"ETag": next(tags), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"})

    info = ObjectInfo("file", 5, Version('"one"'))
    with StubServer(script) as server, closing(opened(server.url)) as source:
        assert bytes(source.read(info, ByteRange(0, 5))) == b"12345"
        with pytest.raises(VersionChanged):
            source.read(info, ByteRange(0, 5))
        with pytest.raises(WrongBytes, match="which version"):
            source.read(info, ByteRange(0, 5))
        assert [request.method for request in server.requests] == ["GET"] * 3
        assert source.traits.conditional


def test_names_that_cannot_be_asked_for() -> None:
    """What obstore would change on the way is refused."""
    with closing(opened("http://127.0.0.1:9/x")) as source, pytest.raises(Unsupported):
        source.stat("a//b")
