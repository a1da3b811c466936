"""
A daemon that dies at a named step of the write path, on a bucket of a real S3 server.

What was acknowledged is there, here and in the bucket; what was under way when it died is as it was before,
or as it was to be; nothing is torn; each change has had one effect; and no part of an upload is left over.
"""

import errno
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from datacache.errors import ControlError
from datacache.model import MiB
from fuse import mountpoint
from tests.daemon.mounted.conftest import Daemon, flushed, start_writable, writable
from tests.support.reading import until
from tests.support.s3 import S3Server
from tests.support.stores import Bucket, Tree, difference, tree_of

pytestmark = pytest.mark.server

HOOK = Path(__file__).parents[2] / "support" / "dying"
BIG = random.Random(1).randbytes(40 * MiB)
"""Sent in parts."""
FIRST: dict[str, bytes] = {
    "old": b"old" * 1000, "gone": b"gone", "d/inner": b"inner", "d/other": b"other", "moves": b"moves",
    "read": b"read", "only/one": b"one",
}  # fmt: skip
"""What the bucket has at first."""


def write(path: str, data: bytes, flags: int = os.O_CREAT | os.O_TRUNC) -> Callable[[Path], object]:
    def work(top: Path) -> None:
        fd = os.open(top / path, os.O_WRONLY | flags, 0o644)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)

    return work


def unlink_open(top: Path) -> None:
    with open(top / "temporary", "w+b", buffering=0) as file:
        file.write(b"temporary")
        (top / "temporary").unlink()
        file.write(b"!")


def look_only(top: Path) -> None:
    os.close(os.open(top / "read", os.O_RDWR))


@dataclass(frozen=True)
class Step:
    """One thing that programs do."""

    path: str
    """What may be half done when it fails."""
    work: Callable[[Path], object]


STEPS = (
    Step("new", write("new", b"new" * 100)),
    Step("old", write("old", b" and more", os.O_APPEND)),
    Step("old", write("old", b" and more again", os.O_APPEND)),
    Step("read", look_only),
    Step("made", lambda top: (top / "made").mkdir()),
    Step("made/file", write("made/file", b"in a new directory")),
    Step("link", lambda top: os.symlink("new", top / "link")),
    Step("old", lambda top: (top / "old").chmod(0o600)),
    Step("gone", lambda top: (top / "gone").unlink()),
    Step("moved", lambda top: os.rename(top / "moves", top / "moved")),
    Step("e", lambda top: os.rename(top / "d", top / "e")),
    Step("temporary", unlink_open),
    Step("empty", lambda top: (top / "empty").mkdir()),
    Step("empty", lambda top: (top / "empty").rmdir()),
    Step("only/one", lambda top: (top / "only" / "one").unlink()),
    Step("big", write("big", BIG)),
    Step("tmp", write("tmp", b"put in place")),
    Step("new", lambda top: os.rename(top / "tmp", top / "new")),
)

REACHED = (
    "journal.after.attributes", "journal.after.close", "journal.after.create", "journal.after.deleted",
    "journal.after.keep", "journal.after.land", "journal.after.mkdir", "journal.after.open",
    "journal.after.remember", "journal.after.rename", "journal.after.rmdir", "journal.after.settle",
    "journal.after.symlink", "journal.after.unchanged", "journal.after.unlink", "journal.before.close",
    "journal.before.create", "journal.before.deleted", "journal.before.land", "journal.before.open",
    "journal.before.remember", "journal.before.rename", "journal.before.settle", "journal.before.unlink",
    "journal.within.close", "journal.within.create", "journal.within.rename", "journal.within.settle",
    "landing.after.create", "landing.after.discard", "landing.after.sync", "landing.before.create",
    "landing.before.discard", "landing.before.sync", "overlay.settled", "takeover.after.take",
    "takeover.before.take", "upload.after.copy", "upload.after.delete", "upload.after.put",
    "upload.after.remember", "upload.after.settled", "upload.before.copy", "upload.before.delete",
    "upload.before.put", "upload.before.remember", "upload.before.settled",
)  # fmt: skip
"""Those that STEPS come to. The others need a rival, or a moment that cannot be chosen here: the models of
tests/model die there."""
A_FEW = (
    "journal.after.create", "journal.before.close", "journal.after.rename", "overlay.settled",
    "upload.after.put", "upload.after.remember", "upload.after.delete", "landing.before.discard",
    "takeover.after.take",
)  # fmt: skip


class Case:
    """A mount whose daemon is to die, and a local directory for what should be."""

    def __init__(self, server: S3Server, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self.order = base, base / "die"
        server.make_bucket("dying-" + base.name.replace("_", "-").lower()[-40:])
        self.bucket = Bucket(server, "dying-" + base.name.replace("_", "-").lower()[-40:])
        monkeypatch.setenv("PYTHONPATH", str(HOOK))
        monkeypatch.setenv("DATACACHE_DIE", str(self.order))
        self.local = base / "local"
        for key, data in FIRST.items():
            (self.local / key).parent.mkdir(parents=True, exist_ok=True)
            (self.local / key).write_bytes(data)
            server.put(self.bucket.name, key, data)

    def run(self, step: str, nth: int, how: str) -> None:
        store = self.bucket.mount_point()
        with writable(
            self.base, "passthrough", store, environment=self.bucket.environment, start=False
        ) as one:
            start_writable(one, "passthrough")
            assert not difference(tree_of(self.local), tree_of(one.directory))
            self.order.write_text(f"{step} {nth} {how}")
            self.work(one, step)
            try:
                self.check(one)
            except (OSError, ControlError):  # it died in the background, after all that programs did
                if how == "all":
                    self.remount(one)
                until(lambda: one.status_if_any())
                self.check(one)
            if self.order.exists() and nth > 1:
                pytest.skip(f"{step} is come to less often")
            assert not self.order.exists(), f"{step} is not come to"

    def work(self, one: Daemon, name: str) -> None:
        for step in STEPS:
            if step.path == "big" and "remember" not in name:
                continue  # it takes a second
            before = tree_of(self.local)
            step.work(self.local)
            try:
                step.work(one.directory)
            except OSError as error:
                # ESTALE: told to look again by the daemon that died, and by the next one (docs/limits.md).
                if error.errno != errno.ESTALE:
                    assert error.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV), error
                    self.remount(one)
                self.is_before_or_after(before, tree_of(self.local), tree_of(one.directory), step.path)
                self.redo(step, one)

    def redo(self, step: Step, one: Daemon) -> None:
        """Do again what was refused and is not done, in both places, from where it is."""
        shown = tree_of(one.directory)
        if shown == tree_of(self.local):
            return
        shutil.rmtree(self.local)
        shutil.copytree(one.directory, self.local, symlinks=True)
        for top in (self.local, one.directory):
            step.work(top)

    def is_before_or_after(self, before: Tree, after: Tree, found: Tree, path: str) -> None:
        allowed = [before, after]
        if (new := found.get(path)) is not None:
            # It was created, or cut, and not written to the end.
            wanted = after.get(path) or b"temporary!"
            if wanted.startswith(new):
                allowed += [{**tree, path: new} for tree in (before, after)]
        assert found in allowed, (difference(before, found), difference(after, found))

    def remount(self, one: Daemon) -> None:
        """After all of its processes have died."""
        assert one.process is not None
        one.process.wait(20)
        if mountpoint.is_mounted(str(one.directory)):
            mountpoint.unmount(str(one.directory), lazy=True)
        start_writable(one, "passthrough")

    def check(self, one: Daemon) -> None:
        wanted = tree_of(self.local)
        assert not difference(wanted, tree_of(one.directory))
        flushed(one)
        assert not difference(wanted, tree_of(one.directory))
        assert not difference(wanted, self.bucket.tree())
        assert one.status()["writing"]["dirty_conflicts"] == 0
        assert one.status()["writing"]["dirty_files"] == 0
        assert not self.bucket.unfinished()
        flushed(one)  # what is not needed any more goes with the next sync
        landed = self.base / "landing" / "datacache-landing" / "files"
        if list(landed.iterdir()):  # unlinked while it was open, when the daemon died that would have known
            one.stop()
            start_writable(one, "passthrough")
            assert not list(landed.iterdir())


@pytest.fixture
def case(versitygw: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(versitygw, tmp_path, monkeypatch)


@pytest.mark.parametrize("step", A_FEW)
def test_the_next_daemon_goes_on(case: Case, step: str) -> None:
    """Nobody sees that it died."""
    case.run(step, 1, "alone")


@pytest.mark.parametrize("step", A_FEW[:3])
def test_the_next_mount_goes_on(case: Case, step: str) -> None:
    """All of its processes die: what was acknowledged is there."""
    case.run(step, 1, "all")


@pytest.mark.long
@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("how", ["alone", "all"])
@pytest.mark.parametrize("step", REACHED)
def test_it_goes_on_wherever_it_died(case: Case, step: str, how: str, nth: int) -> None:
    """At every step, more than once."""
    case.run(step, nth, how)
