"""
The live index and snapshots against a dict, under random changes of the bucket, time, faults and restarts.

The oracle keeps what every key was and when. Four things must hold at any moment: an answer was true
at most TTL ago; right after the TTL a walk shows exactly the bucket; a path has one inode for ever,
which no other path ever has; and inode and generation name one version for ever, which is told for as long
as a mount that saw it goes on.
"""

import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from datacache.clock import VirtualClock
from datacache.config.settings import IndexSettings
from datacache.errors import NoSuchPath, NotADirectory, Unavailable
from datacache.index import live
from datacache.index.index import Index
from datacache.index.opening import open_index
from datacache.index.snapshot import create_snapshot, diff_snapshots
from datacache.model import Dataset, Entry, Kind, MountPoint
from datacache.sources.faulty import Fail, FaultySource
from datacache.sources.memory import MemorySource
from tests.unit.test_names import paths as shown_paths

TTL = 10.0
DATASET = Dataset("model", (MountPoint("memory://test", "/mnt"),))

# Few keys, so that they meet: objects beside directories, markers, and a directory large enough to be asked.
KEYS = st.sampled_from(
    [
        "a",
        "a.b",
        "a/b",
        "a/b/c",
        "a/c",
        "d/",
        "d/x",
        "d//x",
        "d//",
        "../e",
        "%file",
        "a%file",
        "f\udcff",
        "n\0",
    ]
    + [f"many/{i}" for i in range(8)]
)


class IndexMachine(RuleBasedStateMachine):
    """See the top of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.state = tempfile.mkdtemp(prefix="datacache-model-")
        self.clock = VirtualClock()
        self.bucket = MemorySource(page_size=3)
        self.source = FaultySource(self.bucket)
        self.contents: dict[str, bytes] = {}
        # By path: what it was from which time on; size and token, or None while it was not there.
        self.history: dict[str, list[tuple[float, tuple[int, str] | None]]] = {}
        self.inos: dict[int, tuple[str, Kind]] = {}
        self.by_path: dict[tuple[str, Kind], int] = {}
        # By inode and generation: which version that is, and which ones a kernel may still ask for.
        self.versions: dict[tuple[int, int], tuple[int, str]] = {}
        self.askable: set[tuple[int, int]] = set()
        self.newest: dict[int, int] = {}
        self.snapshots: list[dict[str, tuple[int, str]]] = []
        self.index = self.open()

    def open(self, snapshot: str = "", *, resumed: bool = False) -> Index:
        options = IndexSettings(ttl=TTL, snapshot=snapshot)
        return open_index(
            DATASET, [self.source], options, state=self.state, clock=self.clock, cache_entries=5,
            resumed=resumed,
        )  # fmt: skip

    def truth(self) -> dict[str, tuple[int, str]]:
        """Every path that should be shown now, with its size and version."""
        shown = shown_paths(set(self.contents))
        found = {}
        for key, data in self.contents.items():
            if data or not key.endswith("/"):
                found["/mnt/" + shown[key]] = (len(data), self.bucket.stat(key).version.token)
        return found

    def record(self) -> None:
        now, truth = self.clock.monotonic(), self.truth()
        for path in self.history.keys() | truth.keys():
            self.history.setdefault(path, [(float("-inf"), None)]).append((now, truth.get(path)))

    def lately(self, path: str) -> list[tuple[int, str] | None]:
        """What `path` was at any time in the last TTL."""
        steps = self.history.get(path, [(float("-inf"), None)])
        since = self.clock.monotonic() - TTL
        ends = [at for at, _ in steps[1:]] + [float("inf")]
        return [what for (_, what), end in zip(steps, ends, strict=True) if end >= since]

    def meet(self, path: str, entry: Entry) -> None:
        ino, kind = entry.ino, entry.kind
        assert self.inos.setdefault(ino, (path, kind)) == (path, kind), "an inode names two paths"
        assert self.by_path.setdefault((path, kind), ino) == ino, "a path changed its inode"
        known, version = (ino, entry.generation), (entry.size, entry.version.token)
        assert self.versions.setdefault(known, version) == version, "a generation is two versions"
        newest = self.newest.get(ino, 0)
        assert entry.generation >= newest, "a generation came back"
        if entry.generation > newest and (ino, newest) in self.versions and entry.generation == newest + 1:
            assert self.versions[ino, newest] != version, "one version after the other is two generations"
        self.newest[ino] = entry.generation
        self.askable.add(known)

    @rule(key=KEYS, data=st.binary(max_size=2))
    def put(self, key: str, data: bytes) -> None:
        self.bucket.put(key, data)
        self.contents[key] = data
        self.record()

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.contents)))
        self.bucket.delete(key)
        del self.contents[key]
        self.record()

    @rule(seconds=st.sampled_from([0.5, 3.0, TTL - 0.5, TTL, 10 * TTL]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(key=KEYS)
    def look_up(self, key: str) -> None:
        path = "/mnt/" + shown_paths({key})[key]
        self.look(path)
        self.look(path + "%file")

    def look(self, path: str) -> None:
        try:
            entry = self.index.resolve(path)
        except (NoSuchPath, NotADirectory):
            # Each directory above may be as old as the TTL on its own: then the path was missing or hidden.
            assert None in self.lately(path) or self.hidden_lately(path), path
            return
        self.meet(path, entry)
        assert self.index.path(entry.ino) == path
        if entry.kind is Kind.FILE:
            assert (entry.size, entry.version.token) in self.lately(path), path
            current = self.index.current(entry.ino)
            assert (current.size, current.version.token) in self.lately(path), path
            self.meet(path, current)

    def hidden_lately(self, path: str) -> bool:
        """Whether a directory above `path` was not there in the last TTL."""
        parts = path.split("/")
        since = self.clock.monotonic() - TTL
        for i in range(3, len(parts)):
            above = "/".join(parts[:i]) + "/"
            below = [steps for at, steps in self.history.items() if at.startswith(above)]
            moments = {since} | {at for steps in below for at, _ in steps if at >= since}
            for moment in moments:
                if not any(
                    [w for at, w in steps if at <= moment][-1:] not in ([], [None]) for steps in below
                ):
                    return True
        return False

    @rule()
    def walk_after_the_ttl(self) -> None:
        self.clock.advance(TTL)
        found = {}
        for path, entry in self.index.walk():
            self.meet(path, entry)
            found[path] = (entry.size, entry.version.token)
        assert found == self.truth()
        stats = self.index.stats()
        assert (stats.files, stats.bytes) == (len(found), sum(size for size, _ in found.values()))

    @rule(pages=st.integers(0, 2))
    def store_away(self, pages: int) -> None:
        """A failing store changes no answer: what is known is served as stale, the rest is an error."""
        self.source.add("list", Fail(Unavailable("away"), pages=pages))
        known = dict(self.history)
        try:
            for path, entry in self.index.walk():
                self.meet(path, entry)
                assert any(what == (entry.size, entry.version.token) for _, what in known[path])
        except Unavailable:
            pass
        while True:  # use up the fault, if the walk asked for nothing
            try:
                self.clock.advance(TTL)
                list(self.index.walk())
                break
            except Unavailable:
                continue

    @rule(resumed=st.booleans())
    def restart(self, resumed: bool) -> None:
        self.index.close()
        self.reopen(resumed)

    def reopen(self, resumed: bool) -> None:
        self.index = self.open(resumed=resumed)
        if not resumed:
            self.askable.clear()

    @rule(resumed=st.booleans())
    def killed(self, resumed: bool) -> None:
        """The next process finds the database as the last one left it, log and all."""
        shutil.copytree(self.state, self.state + ".copy")
        self.index.close()
        shutil.rmtree(self.state)
        shutil.move(self.state + ".copy", self.state)
        self.reopen(resumed)

    @precondition(lambda self: len(self.snapshots) < 4)
    @rule()
    def snapshot(self) -> None:
        name = str(len(self.snapshots))
        try:
            info = create_snapshot(DATASET, [self.source], state=self.state, name=name, clock=self.clock)
        except Unavailable:
            return
        self.snapshots.append(self.truth())
        assert (info.files, info.bytes) == (len(self.truth()), sum(size for size, _ in self.truth().values()))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def compare_snapshots(self, data: st.DataObject) -> None:
        numbers = st.integers(0, len(self.snapshots) - 1)
        a, b = data.draw(numbers), data.draw(numbers)
        pinned = self.open(str(a))
        assert {p: (e.size, e.version.token) for p, e in pinned.walk()} == self.snapshots[a]
        pinned.close()
        old, new = self.snapshots[a], self.snapshots[b]
        expected = {("added", p) for p in new.keys() - old.keys()}
        expected |= {("removed", p) for p in old.keys() - new.keys()}
        expected |= {("changed", p) for p in old.keys() & new.keys() if old[p] != new[p]}
        found = [(c.kind, c.path) for c in diff_snapshots(self.state, str(a), str(b))]
        assert sorted(found) == sorted(expected)

    @invariant()
    def inodes_are_honest(self) -> None:
        for ino, (path, kind) in list(self.inos.items())[:3]:
            try:
                entry = self.index.entry(ino)
            except NoSuchPath:
                continue
            assert (self.index.path(ino), entry.kind) == (path, kind)

    @rule()
    def ask_for_versions(self) -> None:
        """What was shown is told by its numbers, however much has happened since; forgotten, or right."""
        for (ino, generation), version in self.versions.items():
            try:
                entry = self.index.entry(ino, generation)
            except NoSuchPath:
                assert (ino, generation) not in self.askable, "a version that may be open was forgotten"
                continue
            assert (entry.ino, entry.generation) == (ino, generation)
            assert (entry.size, entry.version.token, entry.kind) == (*version, self.inos[ino][1])

    def teardown(self) -> None:
        self.index.close()
        shutil.rmtree(self.state)


def _run(monkeypatch: pytest.MonkeyPatch, examples: int, steps: int) -> None:
    monkeypatch.setattr(live, "LISTING_PAGE", 3)  # so that `many/` is a large directory
    case = IndexMachine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()


def test_index_against_a_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to bucket, store, clock and process, the index tells what was true lately."""
    _run(monkeypatch, 40, 30)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_index_against_a_dict_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, for as long as patience lasts."""
    _run(monkeypatch, 1000, 60)
