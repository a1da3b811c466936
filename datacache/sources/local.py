"""
A directory as a source: file://.

Regular files are objects. Nothing leads out of the directory: each step of a key is opened from the
one before, without following symbolic links, and links, devices, sockets and pipes are neither
listed nor opened. Where one of our own mounts lies below, it is passed over: a daemon that waits for
its own mount would wait for itself.

A version is a file's size, time of modification and inode. It is taken from the opened descriptor
before and after each read, so that a read is of one version even without help of `checked`; a file
rewritten in place to the same size within the clock's tick (4 ms before Linux 6.13) is not noticed.

The directory itself may be reached over symbolic links; not so with `below`, where somebody else decides what
lies above it.

`LocalSink` puts files: written beside their place under another name, synced, then linked (where nothing may
be there) or renamed, and the directory synced. A create is exact; between the look at the version that is to
be replaced and the rename there is a window for other processes. Metadata are extended attributes
`user.datacache.NAME`, and are lost where the file system has none.
"""

import contextlib
import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from datacache.errors import (
    Denied,
    NotFound,
    SourceError,
    Stopped,
    Unavailable,
    Unsupported,
    VersionChanged,
    WrongBytes,
)
from datacache.model import Buffer, ByteRange, MiB, ObjectInfo, TiB, Version
from datacache.sources.sink import (
    KEY_MAX,
    NOTHING,
    SIZE,
    Content,
    Expected,
    Put,
    SinkTraits,
    Stored,
    as_headers,
    check_content,
    from_headers,
    require,
)  # fmt: skip
from datacache.sources.source import Page, Traits

Names = list[bytes]
_PAGE = 1000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Not blocking: should a pipe take the place of a file between two looks, opening it must not hang.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG}


_PIECE = 4 * MiB
_ATTRIBUTE = "user.datacache."
_UNFINISHED = b".datacache-put-"
"""How the names of files begin that are being put; listings pass over them."""


class LocalSource:
    """The files below `root`; of its directory `below`, to which no symbolic link leads."""

    def __init__(self, root: str, below: str = "") -> None:
        self._top = os.path.abspath(os.fsencode(root))
        self._below = [step for step in os.fsencode(below).split(b"/") if step]
        self._root = os.path.join(self._top, *self._below)
        self._uri = "file://" + _text(self._root)

    def __repr__(self) -> str:
        return f"<LocalSource {self._uri}>"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def traits(self) -> Traits:
        return Traits(conditional=True)

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        if versions:
            raise Unsupported(f"{self._uri} is a directory, and files have no version ids")
        with self._errors("the directory itself"), self._directory([]):
            pass  # it is there
        if prefix and _steps(prefix[:-1]) is None:
            return
        found = self._walk(_raw(prefix), own_mounts(self._root), recursive=recursive)
        while batch := list(islice(found, _PAGE)):
            objects = [item for item in batch if isinstance(item, ObjectInfo)]
            yield Page(objects, [item for item in batch if isinstance(item, str)])

    def _walk(self, prefix: bytes, avoid: frozenset[bytes], *, recursive: bool) -> Iterator[ObjectInfo | str]:
        """Files and (not recursive) directories, in the order of keys. Holds no directory open meanwhile."""
        ahead = [self._entries(prefix, avoid)]
        while ahead:
            item = next(ahead[-1], None)
            if item is None:
                ahead.pop()
            elif recursive and isinstance(item, str):
                ahead.append(self._entries(_raw(item), avoid))
            else:
                yield item

    def _entries(self, prefix: bytes, avoid: frozenset[bytes]) -> Iterator[ObjectInfo | str]:
        steps = prefix.split(b"/")[:-1]
        try:
            with self._errors(_text(prefix)), self._directory(steps) as directory:
                names = self._names(directory, prefix, avoid)
        except NotFound:
            return
        # A directory may have a million names: what is known of them beyond the name is known of a
        # page's worth at a time.
        for at in range(0, len(names), _PAGE):
            some = names[at : at + _PAGE]
            try:
                with self._errors(_text(prefix)), self._directory(steps) as directory:
                    items = [_entry(directory, prefix, name) for name in some]
            except NotFound:
                return
            yield from (item for item in items if item is not None)

    def _names(self, directory: int, prefix: bytes, avoid: frozenset[bytes]) -> Names:
        """Files, and directories with a slash behind them: the order of these names is that of keys."""
        names = []
        with os.scandir(directory) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    if os.path.join(self._root, prefix, name) not in avoid:
                        names.append(name + b"/")
                elif entry.is_file(follow_symlinks=False) and not name.startswith(_UNFINISHED):
                    names.append(name)
        return sorted(names)

    def stat(self, key: str) -> ObjectInfo:
        with self._errors(key), self._directory((steps := self._steps(key))[:-1]) as directory:
            return _info(key, os.stat(steps[-1], dir_fd=directory, follow_symlinks=False))

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        with self._errors(info.key), self._directory((steps := self._steps(info.key))[:-1]) as directory:
            # Looked at before it is opened: opening a device may do things.
            _info(info.key, os.stat(steps[-1], dir_fd=directory, follow_symlinks=False))
            file = os.open(steps[-1], _FILE, dir_fd=directory)
            try:
                _must_be(info, file)
                data = _read_all(file, span)
                _must_be(info, file)
            finally:
                os.close(file)
        if len(data) != span.length:
            raise WrongBytes(
                f"{self._uri} gave {len(data)} of the {span.length} bytes {span} of {info.key!r}"
            )
        return data

    def close(self) -> None:
        """Nothing to let go of."""

    def _steps(self, key: str) -> Names:
        steps = _steps(key)
        if steps is None:
            raise NotFound(f"{self._uri} has no file {key!r}")
        return steps

    @contextlib.contextmanager
    def _directory(self, steps: Names) -> Iterator[int]:
        """The directory that `steps` lead to, open. A link on the way is an error; the root may be one."""
        at = os.open(self._top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for step in (*self._below, *steps):
                below = os.open(step, _DIRECTORY, dir_fd=at)
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        with _errors(self._uri, what):
            yield


class LocalSink:
    """Files below `root`, put there. The root is made with the first of them."""

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(os.fsencode(root))
        self._uri = "file://" + _text(self._root)
        self._lock = threading.Lock()  # from the look at what is there to what takes its place

    def __repr__(self) -> str:
        return f"<LocalSink {self._uri}>"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def traits(self) -> SinkTraits:
        return SinkTraits(conditional=False, copies=True, resumable=False, largest=8 * TiB)

    def accepts(self, key: str) -> bool:
        return len(_raw(key)) <= KEY_MAX

    def check_writable(self) -> None:
        there = self._root
        while not os.path.lexists(there):  # it would be made
            there = os.path.dirname(there)
        if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
            raise Denied(f"{self._uri}: {_text(there)} cannot be written to")

    def put(
        self, key: str, content: Content, *, expected: Expected, metadata: Mapping[str, str], put: Put
    ) -> Stored:
        check_content(key, content, self.traits.largest, self._thing(key))
        if put.resume:
            self.abandon(key, put.resume)
        if key.endswith("/"):
            return self._make_directory(key, expected, metadata)

        def write(file: int) -> None:
            for start in range(0, content.size, _PIECE):
                length = min(_PIECE, content.size - start)
                if put.stopped():
                    raise Stopped(f"a put of {self._thing(key)} was given up after {start} bytes")
                put.sent(length)
                _write_all(file, content.read(start, length))

        return self._place(key, write, content.size, expected, metadata, put.remember)

    def copy(
        self, origin: ObjectInfo, key: str, *, expected: Expected, metadata: Mapping[str, str]
    ) -> Stored:
        def write(file: int) -> None:
            with self._parent(origin.key) as (directory, name):
                source = os.open(name, _FILE, dir_fd=directory)
            try:
                _must_be(origin, source)
                left = origin.size
                while left and (count := os.copy_file_range(source, file, min(left, 1 << 30))):
                    left -= count
                _must_be(origin, source)
            finally:
                os.close(source)

        try:
            with self._errors(origin.key), self._parent(origin.key) as (directory, name):
                found = _info(origin.key, os.stat(name, dir_fd=directory, follow_symlinks=False))
        except NotFound as error:
            raise VersionChanged(f"{error}, so it cannot be copied") from error
        require(found, origin.version, self._thing(origin.key))
        return self._place(key, write, origin.size, expected, metadata, None)

    def delete(self, key: str, *, expected: Expected) -> None:
        if expected is NOTHING:
            raise ValueError("a delete that expects nothing")
        with self._lock:
            found = self.find(key)
            if found is None:
                return
            require(found.info, expected, self._thing(key))
            with self._errors(key), self._parent(key) as (directory, name):
                if not key.endswith("/"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=directory)
                else:
                    try:
                        os.rmdir(name, dir_fd=directory)
                    except OSError as error:
                        # Markers may be deleted while the directory has objects; here it stays for them.
                        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                            raise
                os.fsync(directory)

    def find(self, key: str) -> Stored | None:
        try:
            with self._errors(key), self._parent(key) as (directory, name):
                kind = _DIRECTORY if key.endswith("/") else _FILE
                file = os.open(name, kind, dir_fd=directory)
                try:
                    return Stored(_place_info(key, os.fstat(file)), _attributes(file), SIZE)
                finally:
                    os.close(file)
        except NotFound:
            return None

    def abandon(self, key: str, resume: str) -> None:
        name = _raw(resume)
        if not name.startswith(_UNFINISHED) or b"/" in name:
            return
        with contextlib.suppress(NotFound), self._errors(key), self._parent(key) as (directory, _):
            os.unlink(name, dir_fd=directory)

    def close(self) -> None:
        """Nothing to let go of."""

    def _place(
        self, key: str, write: Callable[[int], None], size: int, expected: Expected,
        metadata: Mapping[str, str], remember: Callable[[str], None] | None,
    ) -> Stored:  # fmt: skip
        """A file that `write` fills, put in its place."""
        attributes = as_headers(metadata)
        with self._errors(key), self._parent(key, make=True) as (directory, name):
            unfinished = _UNFINISHED + os.urandom(8).hex().encode()
            if remember is not None:
                remember(_text(unfinished))
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(unfinished, flags, 0o666, dir_fd=directory)
            try:
                write(file)
                if (length := os.fstat(file).st_size) != size:
                    raise WrongBytes(f"{self._thing(key)}: {length} of {size} bytes were written")
                _set_attributes(file, attributes)
                os.fsync(file)
                with self._lock:
                    if isinstance(expected, Version):
                        found = self.find(key)
                        require(found and found.info, expected, self._thing(key))
                    if expected is NOTHING:
                        try:
                            os.link(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
                        except FileExistsError as error:
                            raise VersionChanged(f"{self._thing(key)} exists, though it must not") from error
                    else:
                        os.rename(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
                    info = _info(key, os.fstat(file))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(unfinished, dir_fd=directory)
                os.close(file)
            os.fsync(directory)
        return Stored(info, from_headers(attributes), SIZE)

    def _make_directory(self, key: str, expected: Expected, metadata: Mapping[str, str]) -> Stored:
        attributes = as_headers(metadata)
        with self._lock, self._errors(key), self._parent(key, make=True) as (directory, name):
            if isinstance(expected, Version):
                found = self.find(key)
                require(found and found.info, expected, self._thing(key))
            try:
                os.mkdir(name, dir_fd=directory)
            except FileExistsError as error:
                if expected is NOTHING:
                    raise VersionChanged(f"{self._thing(key)} exists, though it must not") from error
            file = os.open(name, _DIRECTORY, dir_fd=directory)
            try:
                _set_attributes(file, attributes)
                os.fsync(file)
                os.fsync(directory)
                return Stored(_place_info(key, os.fstat(file)), from_headers(attributes), SIZE)
            finally:
                os.close(file)

    @contextlib.contextmanager
    def _parent(self, key: str, *, make: bool = False) -> Iterator[tuple[int, bytes]]:
        """The directory that has `key`, open, and the name there."""
        steps = _steps(key.removesuffix("/"))
        if steps is None or steps[-1].startswith(_UNFINISHED):
            kind = Unsupported if make else NotFound
            raise kind(f"{self._uri} can have no file {key!r}")
        if make:
            os.makedirs(self._root, exist_ok=True)
        at = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for step in steps[:-1]:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(step, dir_fd=at)
                        os.fsync(at)
                below = os.open(step, _DIRECTORY, dir_fd=at)
                os.close(at)
                at = below
            yield at, steps[-1]
        finally:
            os.close(at)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        with _errors(self._uri, what):
            yield

    def _thing(self, key: str) -> str:
        return f"{self._uri}/{key}"


@contextlib.contextmanager
def _errors(uri: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind: type[SourceError] = Unavailable
        if error.errno in _MISSING:
            kind = NotFound
        elif isinstance(error, PermissionError):
            kind = Denied
        elif error.errno in (errno.EXDEV, errno.EOPNOTSUPP, errno.EROFS):
            kind = Unsupported
        raise kind(f"{uri}: {what!r}: {error.strerror or error}") from error


def _write_all(file: int, data: Buffer) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _place_info(key: str, found: os.stat_result) -> ObjectInfo:
    """What is known of a file, or of a directory: that changes with what is in it, and yet is the same."""
    if not key.endswith("/"):
        return _info(key, found)
    return ObjectInfo(key, 0, Version(stamp=f"directory-{found.st_ino}"), found.st_mtime_ns)


def _set_attributes(file: int, attributes: Mapping[str, str]) -> None:
    for name, value in attributes.items():
        try:
            os.setxattr(file, _ATTRIBUTE + name, value.encode())
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise


def _attributes(file: int) -> dict[str, str]:
    try:
        names = [name for name in os.listxattr(file) if name.startswith(_ATTRIBUTE)]
        return from_headers({n.removeprefix(_ATTRIBUTE): os.getxattr(file, n).decode() for n in names})
    except OSError:  # the file system has none
        return {}


def _steps(key: str) -> Names | None:
    """The names that lead to a key; None where no file can have it."""
    steps = _raw(key).split(b"/")
    return None if any(step in (b"", b".", b"..") or b"\0" in step for step in steps) else steps


def _entry(directory: int, prefix: bytes, name: bytes) -> ObjectInfo | str | None:
    """What a listing shows of `name`; None when it has gone since, or is something else now."""
    if name.endswith(b"/"):
        return _text(prefix + name)
    try:
        return _info(_text(prefix + name), os.stat(name, dir_fd=directory, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file")
    stamp = f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"
    return ObjectInfo(key, found.st_size, Version(stamp=stamp), found.st_mtime_ns)


def _must_be(info: ObjectInfo, file: int) -> None:
    found = _info(info.key, os.fstat(file))
    if found.version != info.version:
        raise VersionChanged(f"{info.key!r} is {found.version.token} now, not {info.version.token}")


def _read_all(file: int, span: ByteRange) -> bytes:
    parts, at = [], span.start  # one read ends at 2 GiB, or where a file ends that shrinks
    while at < span.stop and (part := os.pread(file, span.stop - at, at)):
        parts.append(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


_OCTAL = re.compile(rb"\\([0-7]{3})")


def own_mounts(root: bytes, table: str = "/proc/self/mountinfo") -> frozenset[bytes]:
    """Directories below `root` where a data set is mounted, without touching any of them."""
    try:
        with open(table, "rb") as lines:
            rows = [line.split(b" ") for line in lines]
    except OSError:  # not Linux, or no /proc
        return frozenset()
    places = (
        _OCTAL.sub(lambda m: bytes([int(m[1], 8)]), row[4])
        for row in rows
        if b"fuse.datacache" in row[row.index(b"-") + 1 :]
    )
    return frozenset(place for place in places if place.startswith(root.rstrip(b"/") + b"/"))


def _raw(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
