"""
A writable data set against a dict, under random operations, uploads, deaths and restarts.

The oracle is what a local file system would show. At every moment the tree is the oracle's; when all
is paid the bucket is, too. A process that dies in the middle of an operation leaves what was before it
or what comes after it.
"""

import os
import shutil
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

from datacache.errors import DatacacheError
from datacache.model import ByteRange, Kind
from datacache.writing import steps
from tests.support.overlays import Killed, Mounted, Place

NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
Tree = dict[str, bytes | None]


def parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def below(tree: Tree, path: str) -> list[str]:
    return [p for p in tree if p.startswith(path + "/")]


class Refused(Exception):
    """A local file system would refuse this."""


def check_place(tree: Tree, path: str) -> None:
    above = parent_of(path)
    if above and tree.get(above, b"") is not None:
        raise Refused


def written(tree: Tree, path: str, data: bytes, offset: int | None) -> Tree:
    check_place(tree, path)
    if path in tree and tree[path] is None:
        raise Refused
    before = tree.get(path) or b""
    if offset is None:
        after = data
    else:
        padded = before.ljust(offset, b"\0")
        after = padded[:offset] + data + padded[offset + len(data) :] if data else before
    return {**tree, path: after}


def made(tree: Tree, path: str) -> Tree:
    check_place(tree, path)
    if path in tree:
        raise Refused
    return {**tree, path: None}


def removed(tree: Tree, path: str, *, directory: bool) -> Tree:
    if path not in tree or (tree[path] is None) != directory or below(tree, path):
        raise Refused
    return {p: data for p, data in tree.items() if p != path}


def renamed(tree: Tree, path: str, new: str) -> Tree:
    check_place(tree, new)
    if path not in tree or new.startswith(path + "/"):
        raise Refused
    if path == new:
        return tree
    if new in tree and ((tree[path] is None) != (tree[new] is None) or below(tree, new)):
        raise Refused
    moved = {path, *below(tree, path)}
    kept = {p: data for p, data in tree.items() if p not in moved and p != new}
    return {**kept, **{new + p[len(path) :]: tree[p] for p in moved}}


class WritingMachine(RuleBasedStateMachine):
    """See the top of this file."""

    killed = False
    resumes = False
    markers = True

    def __init__(self) -> None:
        super().__init__()
        self.place = Place.new(cached=True)
        for key in ("a/a", "a/b/c", "b"):
            self.place.bucket.put(key, key.encode())
        self.tree: Tree = {"/a": None, "/a/a": b"a/a", "/a/b": None, "/a/b/c": b"a/b/c", "/b": b"b"}
        self.mounted = Mounted(self.place, markers=self.markers)
        self.open: list[tuple[int, Any, str | None]] = []
        self.inos: dict[int, Kind] = {}

    def teardown(self) -> None:
        steps.arm(None)
        for _, file, _ in self.open:
            file.close()
        self.mounted.close()
        self.place.remove()

    def do(self, wanted: Tree | None, work: Any) -> None:
        """Do it as a program would; `wanted` is what a local file system shows then; None: it refuses."""
        try:
            work()
        except DatacacheError:
            assert wanted is None, "a local file system would have done it"
        else:
            assert wanted is not None, "a local file system would have refused it"
            self.tree = wanted

    def expect(self, change: Any, *args: Any, **more: Any) -> Tree | None:
        try:
            result: Tree = change(self.tree, *args, **more)
        except Refused:
            return None
        return result

    @rule(path=PATHS, data=st.binary(max_size=4), offset=st.none() | st.integers(0, 3))
    def write(self, path: str, data: bytes, offset: int | None) -> None:
        wanted = self.expect(written, path, data, offset)
        self.do(wanted, lambda: self.mounted.write(path, data, offset))

    @rule(path=PATHS)
    def mkdir(self, path: str) -> None:
        def work() -> None:
            self.mounted.overlay.mkdir(*self.mounted.at(path), mode=0o755, uid=0, gid=0)

        self.do(self.expect(made, path), work)

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        self.do(
            self.expect(removed, path, directory=False),
            lambda: self.mounted.overlay.unlink(*self.mounted.at(path)),
        )

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        self.do(
            self.expect(removed, path, directory=True),
            lambda: self.mounted.overlay.rmdir(*self.mounted.at(path)),
        )

    @rule(path=PATHS, new=PATHS)
    def rename(self, path: str, new: str) -> None:
        def work() -> None:
            mounted = self.mounted
            mounted.overlay.rename(*mounted.at(path), *mounted.at(new), replace=True)

        self.do(self.expect(renamed, path, new), work)

    @precondition(lambda self: len(self.open) < 3)
    @rule(path=PATHS)
    def open_to_write(self, path: str) -> None:
        if self.tree.get(path) is None:
            return
        ino = self.mounted.overlay.resolve(path).ino
        self.mounted.overlay.land(ino)
        self.open.append((ino, self.mounted.overlay.open(ino, writing=True), path))

    @precondition(lambda self: bool(self.open))
    @rule()
    def close_one(self) -> None:
        ino, file, _ = self.open.pop(0)
        self.mounted.overlay.closed(ino, file)

    @rule(choose=st.integers(0, 5), stop=st.booleans())
    def pay(self, choose: int, stop: bool) -> None:
        self.mounted.pay(choose, stop=stop)

    def a_file(self, choose: int) -> str:
        files = sorted(path for path, data in self.tree.items() if data is not None)
        return files[choose % len(files)] if files else "/new"

    @rule(choose=st.integers(0, 5))
    def read_one(self, choose: int) -> None:
        if self.a_file(choose) in self.tree:
            self.do(self.tree, lambda: self.mounted.put_in_cache(self.a_file(choose)))

    @rule(choose=st.integers(0, 5), data=st.binary(min_size=1, max_size=4), offset=st.none() | st.just(1))
    def write_one(self, choose: int, data: bytes, offset: int | None) -> None:
        path = self.a_file(choose)
        self.do(self.expect(written, path, data, offset), lambda: self.mounted.write(path, data, offset))

    @rule(choose=st.integers(0, 5))
    def open_one_and_write_nothing(self, choose: int) -> None:
        path = self.a_file(choose)
        if path in self.tree:
            self.do(self.tree, lambda: self.mounted.write(path, b"", 0))

    @rule()
    def pay_some(self) -> None:
        self.do(self.tree, lambda: [self.mounted.pay() for _ in range(3)])

    @rule(seconds=st.sampled_from([1.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.place.clock.advance(seconds)

    @rule()
    def drain(self) -> None:
        while self.open:
            self.close_one()
        self.mounted.drain()
        found = {}
        for key in self.keys():
            info = self.place.bucket.stat(key)
            found[key] = self.mounted.place.bucket.read(info, ByteRange(0, info.size)) if info.size else b""
        files = {"/" + key: bytes(data) for key, data in found.items() if not key.endswith("/")}
        assert files == {path: data for path, data in self.tree.items() if data is not None}
        shown = {"/" + key.rstrip("/") for key in found if key.endswith("/")}
        for path in [*files, *shown]:
            while path := parent_of(path):
                shown.add(path)
        directories = {path for path, data in self.tree.items() if data is None}
        if not self.markers:  # an empty one is here only
            directories = {path for path in directories if any(file.startswith(path + "/") for file in files)}
        assert shown == directories

    def keys(self) -> list[str]:
        return [info.key for page in self.place.bucket.list("", recursive=True) for info in page.objects]

    @rule(resumed=st.booleans())
    def die(self, resumed: bool) -> None:
        for _, file, _ in self.open:
            file.close()
        self.open.clear()
        self.mounted.close()
        if not resumed and self.place.clock.wall() % 2:
            shutil.rmtree(self.place.root / "state")  # the catalogue is lost, too
        self.mounted = Mounted(self.place, resumed=resumed, markers=self.markers)
        if resumed:  # a writer that died with us is told by the kernel's RELEASE
            for node in list(self.mounted.overlay.ledger.nodes.values()):
                for _ in range(node.writers):
                    self.mounted.overlay.released(node.ino)

    @invariant()
    def is_as_it_should_be(self) -> None:
        assert self.mounted.tree() == self.tree
        assert self.mounted.wrong_in_cache() == []


class DyingMachine(WritingMachine):
    """The same, and processes die at any step of an operation."""

    def do(self, wanted: Tree | None, work: Any) -> None:
        self.killed = False
        before = self.tree
        try:
            super().do(wanted, work)
        except Killed:
            steps.arm(None)
            self.die(self.resumes)
            now = self.mounted.tree()
            allowed = [before] if wanted is None else [before, wanted]
            if wanted is not None:  # a file that was just created, or emptied, and not written yet
                for path, data in wanted.items():
                    if data is not None and before.get(path, b"\1") != data:
                        allowed.append({**before, path: b""})
                        allowed.append({**wanted, path: b""})
            assert now in allowed
            self.tree = now

    @rule(count=st.integers(1, 12), resumed=st.booleans())
    def die_soon(self, count: int, resumed: bool) -> None:
        self.resumes = resumed
        left = count

        def at(name: str) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Killed(name)

        steps.arm(at)

    @rule(choose=st.integers(0, 5), stop=st.booleans())
    def pay(self, choose: int, stop: bool) -> None:
        self.do(self.tree, lambda: self.mounted.pay(choose, stop=stop))

    @precondition(lambda self: bool(self.open))
    @rule()
    def close_one(self) -> None:
        steps.arm(None)
        super().close_one()

    @precondition(lambda self: len(self.open) < 3)
    @rule(path=PATHS)
    def open_to_write(self, path: str) -> None:
        steps.arm(None)
        super().open_to_write(path)

    @rule()
    def drain(self) -> None:
        steps.arm(None)
        super().drain()

    @rule(resumed=st.booleans())
    def die(self, resumed: bool) -> None:
        steps.arm(None)
        super().die(resumed)


SETTINGS = settings(
    derandomize="EXAMPLES" not in os.environ,  # the same in each CI; EXAMPLES=1000 looks further
    max_examples=int(os.environ.get("EXAMPLES", "25")), stateful_step_count=30, deadline=None,
    phases=(Phase.generate,),  # a counterexample takes minutes to shrink, and seconds to understand
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
FURTHER = settings(SETTINGS, derandomize=False, max_examples=500)


def test_deaths_leave_before_or_after() -> None:
    """A process that dies in the middle of an operation leaves what was before it, or what comes after it."""
    run_state_machine_as_test(DyingMachine, settings=SETTINGS)


class UnmarkedMachine(DyingMachine):
    """The same, and the store has no objects that stand for directories (Google, Azure)."""

    markers = False


def test_directories_are_kept_where_the_store_has_none() -> None:
    """They are here, empty or not, and in the bucket with what is in them."""
    run_state_machine_as_test(UnmarkedMachine, settings=SETTINGS)


TestWriting = WritingMachine.TestCase
TestWriting.settings = SETTINGS


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", [WritingMachine, DyingMachine, UnmarkedMachine])
def test_the_same_further(machine: type[WritingMachine]) -> None:
    """Others each time, and as many as it takes to have been everywhere."""
    run_state_machine_as_test(machine, settings=FURTHER)
