"""
Whatever fsspec can reach, as a source: the only door to fsspec, ossfs included.

fsspec promises little: a listing of one directory comes in one piece, versions are whatever a file
system cares to tell, reads carry no condition. So a source made here is slower and trusted less than
`objectstore`: the length of every answer is compared, and `checked` stats before and after reads.

Calls are bounded in time. A file system that is asynchronous has its call cancelled. One that is
not runs in a thread of ours, which is left behind when the call hangs; there are at most
`THREADS` such threads, and when all hang, callers are told at once.

ossfs takes the end of a range as inclusive where fsspec means exclusive, so that its `cat_file` gives
a byte too many, and more where a cache is built on it. We ask OSS ourselves, through ossfs, with
the condition (If-Match) and the entity tags that ossfs leaves out (`_oss_class`).

Not reachable here: keys with a step `.` or `..`, which a file system may take for a direction; and,
in most file systems, keys with nothing between two slashes.
"""

import asyncio
import errno
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.dircache import DirCache
from fsspec.registry import get_filesystem_class
from fsspec.spec import AbstractFileSystem

from datacache.config.settings import SourceSettings
from datacache.errors import NotFound, SettingError, SourceError, Unavailable, Unsupported, WrongBytes
from datacache.model import Buffer, ByteRange, KiB, ObjectInfo, Version
from datacache.sources.answers import failure, parse_retry_after
from datacache.sources.listing import ARCHIVED, entity_tag
from datacache.sources.source import Page, Traits
from datacache.telemetry import redact

T = TypeVar("T")
Facts = Mapping[str, Any]
"""What fsspec tells of a path: `name`, `type`, `size`, and more that differs between file systems."""

THREADS = 64
"""Calls at once of a file system that is not asynchronous; those that hang are among them."""
SLOWEST = 256 * KiB
"""Bytes a second below which a read counts as stalled. fsspec hands over a read when it is whole, so
a slow one and a dead one look the same. A block of 4 MiB is given up 16 s after `stall_timeout`,
which is within the usual bound of one operation."""
_PAGE = 1000

# What file systems call things. First come, first served.
_ETAGS = ("ETag", "etag", "e_tag")
_MARKS = ("generation", "version", "md5", "md5Hash", "content_md5", "sha", "sha256", "oid", "crc32c", "CRC")
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated", "timeModified", "created")
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
_TRUTH = {"true": True, "false": False}
_PASSWORD = re.compile(r"://([^/@:]*):[^/@]*@")


class FsspecSource:
    """`uri` through fsspec, with `options` for its file system's constructor.

    `filesystem` takes the place of what would be made from the URI. Raises SettingError where the
    URI or an option is not understood or a package is missing. Nothing is asked of the store yet.
    """

    def __init__(
        self,
        uri: str,
        *,
        settings: SourceSettings,
        options: Mapping[str, Any] | None = None,
        filesystem: AbstractFileSystem | None = None,
    ) -> None:
        self._uri = _PASSWORD.sub(r"://\1@", uri if uri.endswith("://") else uri.rstrip("/"))
        self._settings = settings
        # A chained URI (`zip://in::s3://b/x.zip`) has its path in the first link; only `_make` can tell.
        self._fs, path = (filesystem, uri) if filesystem else _make(uri, dict(options or {}))
        self._root = _path(self._fs, path)
        self._conditional: bool = getattr(self._fs, "conditional", False)
        self._md5_etag: bool = getattr(self._fs, "md5_etag", False)
        self._calls = _Calls(THREADS)
        self._closed = False

    def __repr__(self) -> str:
        return f"<FsspecSource {self._uri} by {type(self._fs).__name__}, {self._calls!r}>"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def traits(self) -> Traits:
        return Traits(conditional=self._conditional, md5_etag=self._md5_etag)

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        if versions:
            raise Unsupported(f"{self._uri} is read through fsspec, which knows no version ids")
        page = Page([], [])
        ahead = [self._entries(prefix)]
        while ahead:
            item = next(ahead[-1], None)
            if item is None:
                ahead.pop()
            elif isinstance(item, ObjectInfo):
                page.objects.append(item)
            elif recursive:
                ahead.append(self._entries(item))
            else:
                page.prefixes.append(item)
            if len(page.objects) + len(page.prefixes) == _PAGE:
                yield page
                page = Page([], [])
        if page.objects or page.prefixes:
            yield page

    def _entries(self, prefix: str) -> Iterator[ObjectInfo | str]:
        """Objects and directories (with a slash behind them) in `prefix`, in the order of keys."""
        if prefix and not _nameable(prefix):
            return
        path = f"{self._root}/{prefix[:-1]}" if prefix else self._root
        found: dict[str, Facts] = {}
        try:
            # Nobody sees how far a listing has come, so it has the time of a whole operation.
            listing = self._call("ls", path, detail=True, timeout=self._settings.timeout)
        except NotFound:
            if prefix:
                return
            raise
        for facts in listing:
            key = self._key(facts)
            # A path that is a file is "listed" as itself; some list a directory within itself.
            if key is None or not key.startswith(prefix):
                continue
            if facts.get("type") == "directory":
                found[key.rstrip("/") + "/" if not key.endswith("//") else key] = facts
            elif facts.get("type") == "file":
                found[key] = facts
        for key in sorted(found, key=_raw):
            if found[key].get("type") == "directory":
                if key != prefix:
                    yield key
            elif found[key].get("size") is None:
                yield self.stat(key)
            else:
                yield _object(key, found[key])

    def stat(self, key: str) -> ObjectInfo:
        timeout = self._settings.connect_timeout + self._settings.stall_timeout
        facts = self._call("info", self._full(key), timeout=timeout)
        if facts.get("type") != "file":
            raise NotFound(f"{self._uri} has no object {key!r}, though others below that")
        if facts.get("size") is None:
            raise Unsupported(f"{self._uri}: {type(self._fs).__name__} does not tell the size of {key!r}")
        return _object(key, facts)

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        condition = {"etag": info.version.condition} if self._conditional else {}
        timeout = self._settings.stall_timeout + span.length / SLOWEST
        path = self._full(info.key)
        data = self._call("cat_file", path, start=span.start, end=span.stop, timeout=timeout, **condition)
        if not isinstance(data, bytes | bytearray | memoryview) or len(data) != span.length:
            # Cutting it to size might make wrong bytes of it: nobody knows at which end there is too much.
            raise WrongBytes(
                f"{self._uri}: {type(self._fs).__name__} gave {len(data)} bytes of {info.key!r} "
                f"when asked for the {span.length} bytes {span}"
            )
        return data

    def close(self) -> None:
        """Let go of what can be let go of; calls that hang end with the process."""
        if self._closed:
            return
        self._closed = True
        self._calls.close()
        if hasattr(self._fs, "aclose"):
            asyncio.run_coroutine_threadsafe(self._fs.aclose(), self._fs.loop).result(5)

    def _full(self, key: str) -> str:
        if not _nameable(key):
            raise NotFound(
                f"{self._uri} cannot have an object {key!r}: fsspec might take it for another path"
            )
        return f"{self._root}/{key}"

    def _key(self, facts: Facts) -> str | None:
        """The key that a listed path is; None where it is not below the root."""
        path, root = str(facts["name"]).lstrip("/"), self._root.lstrip("/")
        if root and not path.startswith(root + "/"):
            return None
        return path[len(root) + 1 :] if root else path

    def _call(self, method: str, path: str, *, timeout: float, **options: Any) -> Any:
        """`method` of the file system, bounded, with its errors made ours."""
        thing = f"{self._uri} ({path})"
        try:
            if isinstance(self._fs, AsyncFileSystem):
                coroutine = getattr(self._fs, f"_{method}")(path, **options)
                return _await(coroutine, self._fs.loop, timeout)
            return self._calls.run(lambda: getattr(self._fs, method)(path, **options), timeout)
        except Stalled as error:
            raise Unavailable(f"{thing}: {error}") from None
        except SourceError:
            raise
        except Exception as error:
            raise translate(error, thing) from error


class Stalled(Exception):
    """A call was given up, or could not be begun."""


class _Calls:
    """Blocking calls that can be given up: each has a thread, and the number of threads is bounded.

    A thread costs 60 µs, little beside a request. Threads that hang are left alone: they are
    daemons, and count until they come back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Guards the two sets. A thread is in `_running` from its start to its end, and in `_stuck`
        # from when its caller has left.
        self._changed = threading.Condition()
        self._running: set[threading.Thread] = set()
        self._stuck: set[threading.Thread] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<{len(self._running)} calls, {len(self._stuck)} stuck>"

    def run(self, call: Callable[[], T], timeout: float) -> T:
        """What `call` returns or raises, within `timeout` seconds. Raises Stalled."""
        deadline = time.monotonic() + timeout
        answer: Future[T] = Future()

        def work() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:  # noqa: BLE001  it is raised where it belongs
                answer.set_exception(error)
            finally:
                with self._changed:
                    self._running.discard(thread)
                    self._stuck.discard(thread)
                    self._changed.notify_all()

        thread = threading.Thread(target=work, name="datacache-fsspec", daemon=True)
        with self._changed:
            self._changed.wait_for(self._may_begin, timeout)
            if self._closed or len(self._running) >= self._limit:
                raise Stalled("closed" if self._closed else f"{len(self._stuck)} calls hang")
            self._running.add(thread)
        thread.start()
        wait([answer], max(0.0, deadline - time.monotonic()))
        with self._changed:
            if not answer.done():
                self._stuck.add(thread)
                self._changed.notify_all()
                raise Stalled(f"no answer in {timeout:.1f} s")
        return answer.result()

    def _may_begin(self) -> bool:
        """Whether there is room; or else no hope of it."""
        return self._closed or len(self._running) < self._limit or len(self._stuck) >= self._limit

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            # Those that are not stuck have a caller who gives them up in time.
            self._changed.wait_for(lambda: self._running <= self._stuck, 5.0)


def _await(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, timeout: float) -> T:
    answer = asyncio.run_coroutine_threadsafe(coroutine, loop)
    wait([answer], timeout)
    if not answer.done():
        answer.cancel()
        raise Stalled(f"no answer in {timeout:.1f} s")
    return answer.result()


def translate(error: Exception, thing: str) -> SourceError:
    """The error of ours that an exception from a file system is, going by its causes too."""
    text = redact(str(error))[:300]
    cause: BaseException | None = error
    while cause is not None:
        status, code, headers = _answer(cause)
        if status:
            said = getattr(cause, "message", text)  # oss2 prints the whole answer, and has its words apart
            return failure(
                thing, status=status, code=code, message=redact(str(said)),
                retry_after=parse_retry_after(headers.get("Retry-After")),
            )  # fmt: skip
        cause = cause.__cause__
    match error:
        case OSError(errno=number) if isinstance(error, FileNotFoundError) or number in _MISSING:
            return failure(thing, status=404, message=text)
        case PermissionError():
            # File systems translate what the store said; its words are all that is left of it.
            return failure(
                thing, code="ExpiredToken" if "expired" in text.lower() else "", status=403, message=text
            )
        case OSError() | EOFError():
            return Unavailable(f"{thing} cannot be had right now ({type(error).__name__}: {text})")
    if type(error).__module__ == "builtins":  # TypeError, ValueError and the like: the same next time
        return Unsupported(f"{thing} cannot be asked for in this way ({type(error).__name__}: {text})")
    return Unavailable(f"{thing} cannot be had right now ({type(error).__name__}: {text})")


def _answer(error: BaseException) -> tuple[int, str, Mapping[str, str]]:
    """HTTP status, the store's code, and headers, where an exception of aiohttp, oss2, botocore or
    gcsfs carries them; else zero and nothing."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        meta = response.get("ResponseMetadata", {})
        code = str(response.get("Error", {}).get("Code", ""))
        return int(meta.get("HTTPStatusCode", 0)), code, meta.get("HTTPHeaders", {})
    code = getattr(error, "code", "")
    status = getattr(error, "status", None) or code
    if not isinstance(status, int) or not 300 <= status <= 599:
        return 0, "", {}
    return status, code if isinstance(code, str) else "", getattr(error, "headers", None) or {}


def _nameable(key: str) -> bool:
    return bool(key) and not any(step in (".", "..") for step in key.split("/"))


def _object(key: str, facts: Facts) -> ObjectInfo:
    size = int(facts["size"])
    mtime = _nanoseconds(next((facts[name] for name in _TIMES if facts.get(name)), None))
    etag = next((str(facts[name]) for name in _ETAGS if facts.get(name)), "")
    mark = next((str(facts[name]) for name in _MARKS if facts.get(name)), str(mtime))
    version = Version(etag=etag) if etag else Version(stamp=f"{size}-{mark}")
    return ObjectInfo(key, size, version, mtime, facts.get("StorageClass") in ARCHIVED)


def _nanoseconds(moment: object) -> int:
    """Nanoseconds since the epoch of a datetime, seconds, or a date in words; 0 for anything else."""
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            try:
                moment = parsedate_to_datetime(str(moment))
            except ValueError:
                return 0
    if isinstance(moment, datetime):
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return round(moment * 1_000_000) * 1000 if isinstance(moment, int | float) else 0


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _path(fs: AbstractFileSystem, uri: str) -> str:
    return str(fs._strip_protocol(uri)).rstrip("/")


def check_scheme(uri: str) -> None:
    """Raise SettingError when fsspec does not know the scheme of `uri`, or its package is not there."""
    scheme = uri.partition("://")[0]
    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        raise SettingError("URI", redact(uri), f"a scheme whose package is installed ({error})") from error
    except ValueError as error:
        raise SettingError("URI", redact(uri), f"a scheme that is known here; {scheme}:// is not") from error


def _make(uri: str, options: dict[str, Any]) -> tuple[AbstractFileSystem, str]:
    """The file system of `uri`, and the path in it."""
    # Options of a mount point are text; "false" would count as true.
    options = {name: _TRUTH.get(value, value) for name, value in options.items()}
    try:
        if uri.startswith("oss://"):
            fs, path = _oss_class()(**options, skip_instance_cache=True, use_listings_cache=False), uri
        else:
            fs, path = url_to_fs(uri, **options, skip_instance_cache=True)
    except ImportError as error:
        raise SettingError("URI", redact(uri), f"a scheme whose package is installed ({error})") from error
    except (ValueError, TypeError, AttributeError) as error:  # the last where a URI needs another behind it
        raise SettingError("URI", redact(uri), f"what fsspec understands ({redact(str(error))})") from error
    except OSError as error:  # some constructors connect (ftp)
        raise Unavailable(f"{redact(uri)} cannot be had right now ({redact(str(error))})") from error
    # Not as an option: some constructors hand options they do not know to the network.
    if isinstance(cache := getattr(fs, "dircache", None), DirCache):
        cache.use_listings_cache = False
    return fs, str(path)


def _oss_class() -> type[AbstractFileSystem]:
    """OSS by ossfs, without its faults. Made here because ossfs is an optional package."""
    from ossfs import AioOSSFileSystem

    class Oss(AioOSSFileSystem):  # type: ignore[misc]
        """ossfs with exact ranges, conditional reads and entity tags; pages of 1000 names, not 100."""

        conditional = True
        md5_etag = True

        async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Facts]:
            bucket, key = self.split_path(path)
            prefix = f"{key}/" if key else ""
            entries = self._iterdir(bucket, max_keys=_PAGE, delimiter="/", prefix=prefix)
            return [entry async for entry in entries]

        def _transfer_object_info_to_dict(self, bucket: str, obj: Any) -> Facts:
            facts: dict[str, Any] = super()._transfer_object_info_to_dict(bucket, obj)
            if not obj.is_prefix():
                facts |= {"ETag": entity_tag(obj.etag), "StorageClass": obj.storage_class}
            return facts

        async def _info(self, path: str, **_: Any) -> Facts:
            bucket, key = self.split_path(path)
            head = await self._call_oss("head_object", key, bucket=bucket)
            return {
                "name": path, "type": "file", "size": head.content_length, "LastModified": head.last_modified,
                "ETag": entity_tag(head.etag), "StorageClass": head.headers.get("x-oss-storage-class"),
            }  # fmt: skip

        async def _cat_file(
            self, path: str, start: int | None = None, end: int | None = None, *, etag: str = "", **_: Any
        ) -> bytes:
            bucket, key = self.split_path(path)
            start, last = start or 0, end - 1 if end is not None else None  # OSS means "up to and including"
            # Without the second header OSS answers a range that it does not like with the whole object.
            headers = {"x-oss-range-behavior": "standard"} | ({"If-Match": etag} if etag else {})
            answer = await self._call_oss(
                "get_object", key, bucket=bucket, byte_range=(start, last), headers=headers
            )
            said = str(answer.content_range or "")
            if last is not None and not said.startswith(f"bytes {start}-{last}/"):
                answer.resp.release()
                raise WrongBytes(
                    f"oss://{bucket}/{key}: answered {said!r} when asked for bytes {start}-{last}"
                )
            return bytes(await answer.resp.read())

        async def aclose(self) -> None:
            if self._session is not None and not self._session.closed:
                await self._session.close()

    return Oss
