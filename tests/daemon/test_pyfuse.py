"""The driver without a kernel: handlers called as pyfuse3 calls them, over a file system that fails."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyfuse3
import pytest
import trio

from datacache.config.settings import MountSettings
from datacache.errors import MountError, Unavailable
from fuse import mountpoint
from fuse.filesystem import Attributes, FileSystem, Listed, Opened
from fuse.pyfuse import Mount, _fsname, _Operations


class Script:
    """A file system that answers what it was told to, and keeps what it was asked."""

    uid, gid = 1, 2

    def __init__(self, **answers: object) -> None:
        self.answers = answers
        self.asked: list[tuple[object, ...]] = []
        self.failures: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def answer(*args: object) -> object:
            self.asked.append((name, *args))
            found = self.answers.get(name)
            if isinstance(found, Exception):
                raise found
            return found

        return answer

    def failed(self, operation: str, error: Exception) -> int:
        self.failures.append(f"{operation}: {error!r}")
        return errno.EIO


def run(script: Script, handler: str, *args: object) -> tuple[Any, dict[str, int]]:
    """What a handler returns (an errno where it is an error), and the requests counted."""

    async def call() -> tuple[Any, dict[str, int]]:
        operations = _Operations(cast(FileSystem, script), threads=2)
        try:
            found = await getattr(operations, handler)(*args)
        except pyfuse3.FUSEError as error:
            found = error.errno
        return found, dict(operations.requests)

    return trio.run(call)


HANDLERS: dict[str, tuple[object, ...]] = {
    "lookup": (1, b"x", None),
    "getattr": (1, None),
    "opendir": (1, None),
    "readdir": (1, 0, None),
    "releasedir": (1,),
    "open": (1, os.O_RDONLY, None),
    "read": (1, 0, 10),
    "release": (1,),
    "statfs": (None,),
    "getxattr": (1, b"user.x", None),
    "listxattr": (1, None),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("error", [KeyError("a bug"), Unavailable("no store"), MemoryError()])
def test_every_exception_of_every_handler_becomes_an_errno(handler: str, error: Exception) -> None:
    """Nothing else may leave a handler: it would end the event loop, and the mount."""
    nowait = f"{handler}_nowait"
    for script in (Script(**{handler: error}), Script(**{handler: error, nowait: error})):
        found, requests = run(script, handler, *HANDLERS[handler])
        assert found == errno.EIO
        assert script.failures == [f"{handler}: {error!r}"]
        assert requests == {handler: 1}


def test_what_is_in_memory_is_answered_without_a_thread() -> None:
    """The call that may wait is made only where the other has no answer."""
    known = Attributes(
        5, mode=0o100444, size=9, entry_timeout=3, attr_timeout=4, mtime_ns=7_000_000_008, uid=1, gid=2
    )
    script = Script(lookup_nowait=known)
    found, _ = run(script, "lookup", 1, b"x", None)
    assert script.asked == [("lookup_nowait", 1, b"x")]
    shown = (found.st_ino, found.st_mode, found.st_size, found.st_blocks, found.st_uid, found.st_gid)
    assert shown == (5, 0o100444, 9, 1, 1, 2)
    assert (found.entry_timeout, found.attr_timeout, found.st_mtime_ns) == (3, 4, 7_000_000_008)
    script = Script(read_nowait=b"", read=b"never")
    assert run(script, "read", 1, 0, 10)[0] == b"", "the end of a file is an answer, too"
    script = Script(read_nowait=None, read=b"bytes")
    assert run(script, "read", 1, 0, 10)[0] == b"bytes"
    assert [name for name, *_ in script.asked] == ["read_nowait", "read"]
    script = Script(open_nowait=None, open=Opened(7))
    opened = run(script, "open", 1, os.O_RDONLY, None)[0]
    assert (opened.fh, opened.keep_cache, opened.direct_io) == (7, True, False)
    script = Script(release_nowait=True)
    run(script, "release", 7)
    assert script.asked == [("release_nowait", 7)]


def test_an_entry_that_does_not_fit_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """readdir counts what it takes; what the kernel has no room for, it is not told of."""
    taken: list[bytes] = []

    def reply(token: object, name: bytes, attributes: object, offset: int) -> bool:
        if len(taken) == 2:
            return False
        taken.append(name)
        return True

    def listed() -> Iterator[Listed]:
        for i in range(1, 9):
            yield Listed(b"%d" % i, Attributes(i), i)

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    script = Script(readdir_nowait=listed())
    run(script, "readdir", 1, 0, None)
    assert taken == [b"1", b"2"]
    assert script.asked == [("readdir_nowait", 1, 0)]


def test_forget_needs_nothing() -> None:
    """A node is arithmetic: it has no answer, and there is nothing to be forgotten."""
    script = Script()
    assert run(script, "forget", [(5, 2)])[1] == {"forget": 1}
    assert not script.asked


@pytest.mark.parametrize("handler", ["mkdir", "unlink", "rename", "setattr", "create", "write", "setxattr"])
def test_whatever_writes_is_refused(handler: str) -> None:
    """EROFS, without asking the file system."""
    script = Script()
    assert run(script, handler, 1, 2, 3)[0] == errno.EROFS
    assert not script.asked


def test_what_libfuse_says_is_the_error(tmp_path: Path) -> None:
    """It prints its reason on standard error and returns nothing: the one line of `mount` says it."""
    if problem := mountpoint.obstacle():
        pytest.skip(problem)
    settings = MountSettings(directory=str(tmp_path / "nothing"))

    async def mount() -> None:
        with Mount(cast(FileSystem, Script()), settings, source="x"):
            raise AssertionError("mounted on nothing")

    with pytest.raises(MountError, match="No such file or directory"):
        trio.run(mount)


def test_what_the_mount_table_shows_has_nothing_that_divides_it() -> None:
    """Blanks, commas and what is not ASCII would be options or fields of their own."""
    assert _fsname("s3://bucket/prefix") == "s3://bucket/prefix"
    shown = _fsname("file:///with blank,comma\\back/grün")
    assert shown.isascii()
    assert not set(shown) & set(" ,\\")
