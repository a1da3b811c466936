"""
A directory as a source: file://.

Regular files are objects. Nothing leads out of the directory: each step of a key is opened from the
one before, without following symbolic links, and links, devices, sockets and pipes are neither
listed nor opened. Where one of our own mounts lies below, it is passed over: a daemon that waits for
its own mount would wait for itself.

A version is a file's size, time of modification and inode. It is taken from the opened descriptor
before and after each read, so that a read is of one version even without help of `checked`; a file
rewritten in place to the same size within the clock's tick (4 ms before Linux 6.13) is not noticed.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from itertools import islice

from datacache.errors import (
    Denied,
    NotFound,
    SourceError,
    Unavailable,
    Unsupported,
    VersionChanged,
    WrongBytes,
)
from datacache.model import Buffer, ByteRange, ObjectInfo, Version
from datacache.sources.source import Page, Traits

Names = list[bytes]
_PAGE = 1000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Not blocking: should a pipe take the place of a file between two looks, opening it must not hang.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG}


class LocalSource:
    """The files below `root`."""

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(os.fsencode(root))
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
                elif entry.is_file(follow_symlinks=False):
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
        at = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for step in steps:
                below = os.open(step, _DIRECTORY, dir_fd=at)
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind: type[SourceError] = Unavailable
            if error.errno in _MISSING:
                kind = NotFound
            elif isinstance(error, PermissionError):
                kind = Denied
            raise kind(f"{self._uri}: {what!r}: {error.strerror or error}") from error


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
