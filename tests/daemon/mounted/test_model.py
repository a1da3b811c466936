"""
A mount against a local directory, under random operations of two processes, uploads, deaths and remounts.

Everything is done in both places and has to come to the same: what is returned, or which error; and after
each step names, bytes, modes, links and extended attributes are the same. When all is uploaded, the bucket
has the names and bytes, too. One difference is meant: who has a file open for reading may go on seeing what
it was at any moment since then.
"""

import errno
import mmap
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from datacache.model import MountPoint
from fuse import mountpoint
from tests.daemon.mounted.conftest import (
    WAYS,
    Daemon,
    check_way,
    flushed,
    kill_daemon,
    start_writable,
    writable,
)
from tests.model.test_writing_model import PATHS
from tests.support.stores import Tree, difference, tree_of

ALIKE = ({errno.EISDIR, errno.EPERM}, {errno.ENOTEMPTY, errno.EEXIST})
"""Errors that file systems choose between."""
OPENS = (
    os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_TRUNC,
    os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_RDWR | os.O_CREAT | os.O_EXCL, os.O_RDONLY | os.O_CREAT,
    os.O_WRONLY | os.O_CREAT | os.O_APPEND, os.O_RDONLY | os.O_TRUNC,
)  # fmt: skip
DATA = st.sampled_from([b"", b"x", b"some bytes", b"0123456789" * 500, b"y" * 9000])
OFFSETS = st.sampled_from([0, 1, 5, 4096, 5000, 20_000])
SELDOM = st.integers(0, 3).map(lambda number: not number)
"""What takes a second."""
TARGETS = st.sampled_from(["a", "b", "../a", "a/b", "nowhere"])


# What is done in either place, perhaps by the other process. `top` comes first.


def open_file(top: str, path: str, flags: int) -> int:
    return os.open(top + path, flags, 0o640)


def write_file(top: str, path: str, data: bytes, flags: int) -> int:
    fd = os.open(top + path, flags, 0o640)
    try:
        return os.write(fd, data)
    finally:
        os.close(fd)


def rename(top: str, path: str, new: str) -> None:
    os.rename(top + path, top + new)


def symlink(top: str, path: str, to: str) -> None:
    os.symlink(to, top + path)


def utime(top: str, path: str) -> int:
    os.utime(top + path, ns=(5, 1_234_567_890_123_456_789))
    found = os.stat(top + path)
    return found.st_mtime_ns if stat.S_ISREG(found.st_mode) else 0


def names_of(top: str) -> dict[str, Any]:
    """All that can be seen, but for times."""
    found: dict[str, Any] = {}
    for path, content in tree_of(Path(top)).items():
        where = f"{top}/{path}"
        st = os.lstat(where)
        link = stat.S_ISLNK(st.st_mode)
        kept = {} if link else {name: os.getxattr(where, name) for name in os.listxattr(where)}
        found[path] = (content, stat.S_IFMT(st.st_mode) | (0 if link else stat.S_IMODE(st.st_mode)), kept)
    return found


def size_of(fd: int) -> tuple[int, bool]:
    """Bytes, and whether it has a name."""
    found = os.fstat(fd)
    return found.st_size, found.st_nlink > 0


def as_stored(top: Path) -> Tree:
    """What a directory holds as a store: empty directories are there as such."""
    return tree_of(top) if top.exists() else {}


@dataclass
class Open:
    """A file that is open in both places."""

    local: int
    mounted: int
    flags: int
    there: bool
    """The other process has it open."""
    seen: list[bytes] = field(default_factory=list)
    """What it was since it was opened."""

    @property
    def writes(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def reads(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY


@dataclass
class Bench:
    """What outlives an example: the mount, and the other process."""

    one: Daemon
    way: str
    local: Path
    other: Executor
    examples: int = 0
    kills: int = 0
    """Of this mount's daemons: after a few in a row its broker gives up."""
    steps: list[str] = field(default_factory=list)
    """What the example that is under way has done."""
    wrong: str = ""
    """The first that was not as it should be, and what had been done before."""


def machine_of(bench: Bench) -> type[RuleBasedStateMachine]:
    """The machine for one mount."""

    class MountedMachine(RuleBasedStateMachine):
        """See the module."""

        def __init__(self) -> None:
            super().__init__()
            bench.examples += 1
            bench.steps.clear()
            self.name = f"example{bench.examples}"
            self.local, self.mounted = str(bench.local / self.name), str(bench.one.directory / self.name)
            for top in (self.local, self.mounted):
                os.mkdir(top)
            self.open: list[Open] = []
            self.maps: list[tuple[mmap.mmap, mmap.mmap, int]] = []
            self.times: dict[int, tuple[int, int]] = {}

        def teardown(self) -> None:
            self.close_all()

        def close_all(self) -> None:
            for mapped in self.maps:
                mapped[0].close()
                mapped[1].close()
                os.close(mapped[2])
            self.maps.clear()
            while self.open:
                self.shut(self.open.pop())

        def shut(self, one: Open) -> None:
            for fd in (one.local, one.mounted):
                self.call(os.close, fd, there=one.there)

        # Doing it twice

        def call(self, work: Callable[..., Any], *args: Any, there: bool = False) -> Any:
            return bench.other.submit(work, *args).result() if there else work(*args)

        def outcome(self, work: Callable[..., Any], *args: Any, there: bool = False) -> tuple[Any, int]:
            try:
                return self.call(work, *args, there=there), 0
            except OSError as error:
                assert error.errno, error
                return None, error.errno

        def both(self, work: Callable[..., Any], *args: Any, there: bool = False) -> tuple[Any, Any]:
            """`work(top, *args)` in both places."""
            self.doing(f"{work.__name__}{args}{' there' if there else ''}")
            wanted, refused = self.outcome(work, self.local, *args, there=there)
            found, error = self.outcome(work, self.mounted, *args, there=there)
            self.same_error(error, refused)
            return wanted, found

        def by_path(self, work: Callable[..., Any], path: str, *args: Any) -> None:
            self.doing(f"{work.__name__}({path}, {args})")
            refused = self.outcome(work, self.local + path, *args)[1]
            self.same_error(self.outcome(work, self.mounted + path, *args)[1], refused)

        def same_error(self, error: int, refused: int) -> None:
            self.doing(f"  {errno.errorcode.get(refused, 'done')}")
            self.check(
                error == refused or {error, refused} in ALIKE,
                f"{errno.errorcode.get(error, 'done')} instead of {errno.errorcode.get(refused, 'done')}",
            )

        @contextmanager
        def told(self, what: str) -> Iterator[None]:
            self.doing(what)
            try:
                yield
            except Exception as error:
                if not bench.wrong:
                    bench.wrong = "\n".join([*bench.steps, repr(error)])
                raise

        def doing(self, what: str) -> None:
            bench.steps.append(what if len(what) < 300 else what[:300] + "...")

        def check(self, right: object, what: str) -> None:
            # Told by ourselves: the example is had again on a mount that has changed meanwhile.
            if not right and not bench.wrong:
                bench.wrong = "\n".join([*bench.steps, what])
            assert right, what

        # Files by name

        @rule(path=PATHS, data=DATA, there=st.booleans())
        def write(self, path: str, data: bytes, there: bool) -> None:
            self.both(write_file, path, data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, there=there)

        @rule(path=PATHS, data=DATA, there=st.booleans())
        def append(self, path: str, data: bytes, there: bool) -> None:
            self.both(write_file, path, data, os.O_WRONLY | os.O_CREAT | os.O_APPEND, there=there)

        @rule(path=PATHS, size=OFFSETS)
        def truncate(self, path: str, size: int) -> None:
            self.by_path(os.truncate, path, size)

        @rule(path=PATHS)
        def unlink(self, path: str) -> None:
            self.by_path(os.unlink, path)

        @rule(path=PATHS)
        def mkdir(self, path: str) -> None:
            self.by_path(os.mkdir, path)

        @rule(path=PATHS)
        def rmdir(self, path: str) -> None:
            self.by_path(os.rmdir, path)

        @rule(path=PATHS, new=PATHS)
        def rename(self, path: str, new: str) -> None:
            self.both(rename, path, new)

        @rule(path=PATHS, to=TARGETS)
        def symlink(self, path: str, to: str) -> None:
            self.both(symlink, path, to)

        @rule(path=PATHS, mode=st.sampled_from([0o600, 0o755, 0o444]))
        def chmod(self, path: str, mode: int) -> None:
            self.by_path(os.chmod, path, mode)

        @rule(path=PATHS, name=st.sampled_from(["user.one", "user.two"]), value=DATA)
        def setxattr(self, path: str, name: str, value: bytes) -> None:
            self.by_path(os.setxattr, path, name, value[:100])

        @rule(path=PATHS, name=st.sampled_from(["user.one", "user.two"]))
        def removexattr(self, path: str, name: str) -> None:
            self.by_path(os.removexattr, path, name)

        @rule(path=PATHS)
        def utimes(self, path: str) -> None:
            wanted, found = self.both(utime, path)
            self.check(found == wanted, f"{found} instead of {wanted}")

        # Open files

        @precondition(lambda self: len(self.open) < 4)
        @rule(path=PATHS, flags=st.sampled_from(OPENS), there=st.booleans())
        def open_one(self, path: str, flags: int, there: bool) -> None:
            local, mounted = self.both(open_file, path, flags, there=there)
            if local is not None:
                mode = os.stat(self.local + path).st_mode
                if stat.S_ISREG(mode):
                    self.open.append(Open(local, mounted, flags, there))
                else:
                    for fd in (local, mounted):
                        self.call(os.close, fd, there=there)

        @precondition(lambda self: bool(self.open))
        @rule(which=st.integers(0, 3))
        def close_one(self, which: int) -> None:
            self.shut(self.open.pop(which % len(self.open)))

        def some(self, which: int) -> Open:
            return self.open[which % len(self.open)]

        def by_fd(self, one: Open, work: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
            place = " there" if one.there else ""
            self.doing(f"{work.__name__}{args} of {one.mounted} {oct(one.flags)}{place}")
            wanted, refused = self.outcome(work, one.local, *args, there=one.there)
            found, error = self.outcome(work, one.mounted, *args, there=one.there)
            self.same_error(error, refused)
            return wanted, found

        @precondition(lambda self: bool(self.open))
        @rule(which=st.integers(0, 3), data=DATA, offset=OFFSETS)
        def pwrite(self, which: int, data: bytes, offset: int) -> None:
            wanted, found = self.by_fd(self.some(which), os.pwrite, data, offset)
            self.check(found == wanted, f"{found} instead of {wanted}")

        @precondition(lambda self: bool(self.open))
        @rule(which=st.integers(0, 3), size=OFFSETS)
        def ftruncate(self, which: int, size: int) -> None:
            self.by_fd(self.some(which), os.ftruncate, size)

        @precondition(lambda self: bool(self.open))
        @rule(which=st.integers(0, 3))
        def fsync(self, which: int) -> None:
            self.by_fd(self.some(which), os.fsync)

        @precondition(lambda self: bool(self.open))
        @rule(which=st.integers(0, 3))
        def read_one(self, which: int) -> None:
            one = self.some(which)
            wanted, found = self.by_fd(one, os.pread, 100_000, 0)
            if wanted is not None:
                allowed = [wanted] if one.writes else [wanted, *one.seen]
                self.check(found in allowed, f"{found[:100]!r} of {len(found)} instead of {wanted[:100]!r}")

        @precondition(lambda self: any(one.writes and one.reads and not one.there for one in self.open))
        @precondition(lambda self: len(self.maps) < 2)
        @rule()
        def map_one(self) -> None:
            """The mapping outlives the descriptor."""
            one = next(one for one in self.open if one.writes and one.reads and not one.there)
            size = os.fstat(one.local).st_size
            self.doing(f"map {size} of {one.mounted}")
            if size:
                mapped = mmap.mmap(one.local, size), mmap.mmap(one.mounted, size)
                self.maps.append((*mapped, os.dup(one.local)))

        @precondition(lambda self: bool(self.maps))
        @rule(data=DATA, offset=OFFSETS, flush=st.booleans())
        def write_mapped(self, data: bytes, offset: int, flush: bool) -> None:
            local, mounted, fd = self.maps[0]
            room = min(len(local), os.fstat(fd).st_size)
            data = data[: max(0, room - offset)]
            self.doing(f"write {len(data)} at {offset} to a mapping{', and flush' if flush else ''}")
            if data:
                local[offset : offset + len(data)] = mounted[offset : offset + len(data)] = data
                self.check(mounted[:room] == local[:room], "the mapping differs")
                if flush:
                    mounted.flush()

        @precondition(lambda self: bool(self.maps))
        @rule()
        def unmap(self) -> None:
            self.doing("unmap")
            local, mounted, fd = self.maps.pop(0)
            local.close()
            mounted.close()
            os.close(fd)

        # The mount

        @rule()
        def upload(self) -> None:
            """All that can be is uploaded, and in the bucket."""
            with self.told("upload"):
                self.upload_all()

        def upload_all(self) -> None:
            if any(one.writes for one in self.open) or self.maps:
                bench.one.control().flush("/", timeout=5)
                return
            flushed(bench.one)
            here, uploaded = tree_of(Path(self.local)), as_stored(bench.one.bucket / self.name)
            self.check(here == uploaded, f"in the bucket: {difference(here, uploaded)}")

        @rule(seldom=SELDOM)
        def kill(self, seldom: bool) -> None:
            """The broker starts another."""
            if not seldom or bench.way == "pyfuse3" or bench.kills == 2:
                return
            with self.told("kill"):
                bench.kills += 1
                kill_daemon(bench.one)

        @rule(seldom=SELDOM, killed=st.booleans(), forget=st.booleans())
        def remount(self, seldom: bool, killed: bool, forget: bool) -> None:
            if not seldom:
                return
            self.close_all()
            with self.told(f"remount{', killed' if killed else ''}"):
                if killed:
                    bench.one.kill()
                bench.one.stop()
                if mountpoint.is_mounted(str(bench.one.directory)):
                    mountpoint.unmount(str(bench.one.directory), lazy=True)
                if forget:
                    shutil.rmtree(bench.one.bucket.parent / "cache", ignore_errors=True)
                start_writable(bench.one, bench.way)
                bench.kills = 0

        @invariant()
        def is_the_same(self) -> None:
            with self.told("look"):
                self.look()

        def look(self) -> None:
            wanted, found = names_of(self.local), names_of(self.mounted)
            self.check(found.keys() == wanted.keys(), f"{sorted(found)} instead of {sorted(wanted)}")
            for path, one in wanted.items():
                self.check(found[path] == one, f"{path} is {found[path]!r} instead of {one!r}")
            self.look_at_times(wanted)
            for file in self.open:
                if file.writes:
                    here, there = (
                        self.call(size_of, fd, there=file.there) for fd in (file.local, file.mounted)
                    )
                    self.check(here == there, f"{file} has size, links of {there} instead of {here}")
                else:
                    now = self.call(os.pread, file.local, 100_000, 0, there=file.there)
                    if not file.seen or file.seen[-1] != now:
                        file.seen.append(now)

        def look_at_times(self, paths: Iterable[str]) -> None:
            """A time of a file changes only when it does locally."""
            before, self.times = self.times, {}
            for path in paths:
                local, mounted = os.lstat(f"{self.local}/{path}"), os.lstat(f"{self.mounted}/{path}")
                if stat.S_ISREG(local.st_mode) and not self.maps:
                    was = before.get(local.st_ino)
                    self.times[local.st_ino] = (local.st_mtime_ns, mounted.st_mtime_ns)
                    if was is not None and was[0] == local.st_mtime_ns:
                        self.check(was[1] == mounted.st_mtime_ns, f"the time of {path} has changed")

    return MountedMachine


@pytest.fixture(params=WAYS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """A mount for all examples of one way."""
    check_way(request.param)
    bucket, local = tmp_path / "bucket", tmp_path / "local"
    bucket.mkdir()
    local.mkdir()
    store = MountPoint(bucket.as_uri())
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as other,
        writable(tmp_path, request.param, store, bucket=bucket) as one,
    ):
        yield Bench(one, request.param, local, other)


def run(bench: Bench, examples: int, steps: int) -> None:
    chosen = settings(
        derandomize="EXAMPLES" not in os.environ, max_examples=int(os.environ.get("EXAMPLES", examples)),
        stateful_step_count=steps, deadline=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    try:
        run_state_machine_as_test(machine_of(bench), settings=chosen)
    finally:
        assert not bench.wrong, bench.wrong


def test_a_mount_is_as_a_local_directory(bench: Bench) -> None:
    """A few examples of each way."""
    run(bench, examples=8, steps=40)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_mount_is_as_a_local_directory_for_long(bench: Bench) -> None:
    """Many."""
    run(bench, examples=200, steps=60)
