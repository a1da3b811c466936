"""
A directory of a web server: http:// and https://.

Files are read through obstore with one GET each; the entity tag of the answer proves which version
came, so a server that ignores If-Match is as good as one that honours it. The web has no listing:
what a server shows of a directory is a page of links (nginx's autoindex, Apache's, Python's), so
links to direct children are its entries and each file is asked for its size with a HEAD. That is
for directories of thousands; for more, or where there is no such page, a manifest says what exists.
"""

import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from http.client import HTTPException
from itertools import islice
from urllib.parse import quote, unquote, urljoin, urlsplit

from datacache.config.settings import SourceSettings
from datacache.errors import NotFound, Unavailable, Unsupported
from datacache.model import Buffer, ByteRange, ObjectInfo
from datacache.sources import objectstore
from datacache.sources.answers import failure, parse_retry_after
from datacache.sources.source import Page, Traits

_LARGEST_PAGE = 64 * 1024 * 1024  # links to 500,000 files; a page is held whole
_DEEPEST = 32  # a server that shows a directory in itself would be walked for ever
_AT_ONCE = 16  # HEAD requests under way for one listing
_BATCH = 256
Entries = tuple[list[str], list[str]]


class _Links(HTMLParser):
    """Collects what the links of a page refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if tag == "a" and name == "href" and value:
                self.found[value] = None


def children(page: str, url: str) -> tuple[list[str], list[str]]:
    """Names of files and of directories (with "/") that `page`, at `url`, links to: those directly
    below it, and nothing that leads elsewhere."""
    links = _Links()
    links.feed(page)
    base = urlsplit(url)
    files: set[str] = set()
    directories: set[str] = set()
    for link in links.found:
        try:
            target = urlsplit(urljoin(url, link))
        except ValueError:
            continue
        if (target.scheme, target.netloc, target.query) != (base.scheme, base.netloc, ""):
            continue
        if not target.path.startswith(base.path):
            continue
        raw = target.path[len(base.path) :]
        name = unquote(raw.removesuffix("/"), errors="surrogateescape")
        if "/" in raw.removesuffix("/") or not objectstore.can_name(name) or "/" in name:
            continue
        (directories if raw.endswith("/") else files).add(name)
    return sorted(files), sorted(name + "/" for name in directories)


class WebSource:
    """The files below `root`, a URL that ends in "/"."""

    def __init__(self, root: str, *, ca_bundle: str = "", settings: SourceSettings) -> None:
        self._root, self._settings = root, settings
        parts = urlsplit(root)
        self._prefix = unquote(parts.path.lstrip("/"))
        self._store = objectstore.http_store(
            f"{parts.scheme}://{parts.netloc}", ca_bundle=ca_bundle, settings=settings
        )
        self._calls = objectstore.Calls()
        self._trust = ssl.create_default_context(cafile=ca_bundle or None)
        self._lock = threading.Lock()  # guards the birth of the pool
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<WebSource {self._root}>"

    @property
    def uri(self) -> str:
        return self._root.removesuffix("/")

    @property
    def traits(self) -> Traits:
        return Traits(conditional=True)  # `objectstore.get` holds the answer's tag against it

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        if versions:
            raise Unsupported(f"{self.uri}: a web server lists no versions")
        waiting = [prefix]
        while waiting:
            directory = waiting.pop()
            if directory.count("/") > _DEEPEST:
                raise Unsupported(
                    f"{self.uri} shows directories more than {_DEEPEST} deep: list it in a manifest"
                )
            files, directories = self._entries(directory)
            below = [directory + name for name in directories]
            keys = iter([directory + name for name in files])
            shown = [] if recursive else below
            while batch := [*islice(keys, _BATCH)]:
                yield Page([info for info in self._heads().map(self._stat_listed, batch) if info], shown)
                shown = []
            if shown:
                yield Page([], shown)
            if recursive:
                waiting += reversed(below)

    def stat(self, key: str) -> ObjectInfo:
        found = objectstore.head(self._calls, self._store, self._name(key), thing=self._thing(key))
        return found._replace(key=key)

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        return objectstore.get(
            self._calls, self._store, self._name(info.key), info, span, thing=self._thing(info.key)
        )

    def close(self) -> None:
        self._closed = True
        self._calls.close()
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)

    def _heads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="datacache-web")
            return self._pool

    def _stat_listed(self, key: str) -> ObjectInfo | None:
        try:
            return self.stat(key)
        except NotFound:
            return None  # a link to nothing

    def _entries(self, directory: str) -> Entries:
        url = self._root + quote(directory, safe="/~", errors="surrogateescape")
        try:
            page = self._page(url)
        except NotFound:
            if directory:
                return [], []
            raise
        return children(page, url)

    def _page(self, url: str) -> str:
        request = urllib.request.Request(url, headers={"Accept": "text/html"})  # noqa: S310 - checked in opening
        deadline = time.monotonic() + self._settings.timeout
        try:
            with urllib.request.urlopen(  # noqa: S310
                request, timeout=self._settings.stall_timeout, context=self._trust
            ) as answer:
                kind = answer.headers.get_content_type()
                body = bytearray()
                # As it comes, for the time-out is one between two bytes: a trickle would never end.
                while len(body) <= _LARGEST_PAGE and (part := answer.read1(_LARGEST_PAGE + 1 - len(body))):
                    body += part
                    if self._closed or time.monotonic() > deadline:
                        raise TimeoutError("the page took too long")
                missing = 0 if len(body) > _LARGEST_PAGE else answer.length or 0
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (403, 405):
                    raise self._no_listing(url, f"{error.code} {error.reason}") from error
                after = parse_retry_after(error.headers.get("Retry-After"))
                raise failure(url, status=error.code, message=str(error.reason), retry_after=after) from error
        except (OSError, ValueError, HTTPException) as error:
            raise Unavailable(f"{url} cannot be had right now ({error})") from error
        if missing:  # read1(n) does not say so itself
            raise Unavailable(f"{url} broke off {missing} bytes before its end")
        if kind != "text/html" or len(body) > _LARGEST_PAGE:
            raise self._no_listing(url, f"{kind}, {len(body)} bytes")
        return str(body.decode("utf-8", "surrogateescape"))

    def _no_listing(self, url: str, why: str) -> Unsupported:
        return Unsupported(
            f"{url} cannot be listed: the server shows no page of links there ({why}); "
            "name the objects in a manifest and mount that"
        )

    def _thing(self, key: str) -> str:
        return self._root + key

    def _name(self, key: str) -> str:
        name = self._prefix + key
        if not objectstore.can_name(name):
            raise Unsupported(f"{self._thing(key)} has a name that this client cannot ask for")
        return name
