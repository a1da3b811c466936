"""Nodes: what a number says, and the kernel's rules of open modes, against a model of that kernel."""

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from datacache.index.database import INO_BITS
from datacache.model import Entry, Kind, Version
from fuse import nodes
from fuse.nodes import GENERATION_BITS, LIFE_BITS, TURN_BITS, Backing, Name, Nodes, Stale

A, B = (1, 10), (1, 11)


def entry(ino: int, generation: int, kind: Kind = Kind.FILE) -> Entry:
    """A version of path `ino`."""
    version = Version(etag=f'"{generation}"' if kind is Kind.FILE else "")
    return Entry(ino, 1, b"name", kind, generation, 0, 0, "key", version, generation=generation)


@given(
    st.integers(1, 2**INO_BITS - 1),
    st.integers(0, 2**GENERATION_BITS - 1),
    st.integers(0, 2**LIFE_BITS - 1),
    st.integers(0, 2**TURN_BITS - 1),
)
def test_a_number_says_what_it_was_made_of(ino: int, generation: int, life: int, turn: int) -> None:
    """... and fits FUSE's 64 bits; without life and turn, where it is st_ino too, a signed integer, as which
    some programs read that."""
    name = Name(ino, generation, life, turn)
    assert nodes.read(name.number) == name
    assert nodes.path(name.number) == ino
    assert 0 < name.number < 2**64
    assert name._replace(life=0, turn=0).number < 2**63


def test_the_first_version_of_a_path_has_the_paths_number() -> None:
    """The root is node 1, as FUSE wants it; and nothing is longer than it need be."""
    assert Nodes().node(entry(7, 0)) == 7
    assert Nodes(life=3).node(entry(7, 0)) == 7, "served mounts: pages outlive the daemon"
    assert Nodes(life=3, passthrough=True).node(entry(1, 0, Kind.DIRECTORY)) == 1


def test_another_version_is_another_node() -> None:
    """A new version never shares a node with one that the kernel remembers."""
    known = Nodes()
    old, new = known.node(entry(7, 0)), known.node(entry(7, 1))
    assert old != new
    known.check(new, entry(7, 1))
    with pytest.raises(Stale):
        known.check(old, entry(7, 1))


def test_a_version_that_is_written_has_one_node() -> None:
    """Whatever turn its lookups were told of before, and however it is open: never refused for its mode."""
    known, written = Nodes(passthrough=True), entry(7, 1)
    old = known.node(entry(7, 0))
    with pytest.raises(Stale):
        known.check(old, written)
    node = known.node(written, sole=True)
    assert nodes.read(node).turn == 0
    with pytest.raises(Stale):
        known.check(old, written, sole=True)
    known.check(node, written, sole=True)
    assert known.node(written, sole=True) == node
    assert known.open(node, written, sole=True) is None
    assert known.open(node, written, A, sole=True) is None, "it stays served"
    known.close(node)
    known.close(node)
    assert known.open(node, written, A, sole=True) == A
    assert known.open(node, written, sole=True) == A
    later = Nodes(life=1, passthrough=True)
    with pytest.raises(Stale):
        later.open(node, written, A, sole=True)
    assert later.node(written, sole=True) != node


@given(st.integers(0, 10**9), st.integers(0, 2**GENERATION_BITS - 1))
def test_the_generation_is_told_from_its_last_bits(newest: int, behind: int) -> None:
    """Of a path whose newest is known, the number names one of the last 4,096."""
    generation = newest - behind
    if generation >= 0:
        name = nodes.read(Nodes().node(entry(7, generation)))
        assert name.generation_near(newest) == generation


def test_an_open_node_keeps_its_entry_until_the_last_close() -> None:
    """While anybody has it open, a node can be described, whatever the index has learned since."""
    known = Nodes()
    node = known.node(entry(7, 1))
    known.open(node, entry(7, 1))
    known.open(node, entry(7, 1))
    known.close(node)
    assert known.opened(node) == entry(7, 1)
    known.close(node)
    assert known.opened(node) is None
    assert known.stats().open == 0


def test_little_is_kept_of_what_is_closed() -> None:
    """A million files that were open in two ways cost next to nothing afterwards."""
    known = Nodes(passthrough=True)
    for ino in range(2, 2 * nodes.REMEMBERED):
        served = known.node(entry(ino, 0))
        assert known.open(served, entry(ino, 0)) is None
        with pytest.raises(Stale):
            known.open(served, entry(ino, 0), A)
        passed = known.node(entry(ino, 0))
        assert passed != served
        assert known.open(passed, entry(ino, 0), A) == A
        known.close(served)
        assert known.node(entry(ino, 0)) == passed
        known.close(passed)
    assert not known._open
    assert len(known._told) == nodes.REMEMBERED
    assert known.node(entry(2, 0)) == 2


def test_a_node_that_is_passed_through_is_opened_on_the_same_by_all() -> None:
    """Also when its cached file was evicted since, and when there is another one."""
    known = Nodes(passthrough=True)
    node = known.node(entry(7, 0))
    for backing in (A, None, B):
        assert known.open(node, entry(7, 0), backing) == A
    for _ in range(3):
        known.close(node)
    assert known.open(node, entry(7, 0), B) == B


def test_a_node_of_an_earlier_daemon_is_never_opened() -> None:
    """How that one left it open cannot be known; a lookup gives the same version another node."""
    before, after = Nodes(passthrough=True), Nodes(passthrough=True, life=1)
    old = before.node(entry(7, 0))
    with pytest.raises(Stale):
        after.open(old, entry(7, 0))
    new = after.node(entry(7, 0))
    assert new != old
    after.open(new, entry(7, 0), A)
    after.close(new)


@dataclass
class KernelNode:
    """What the kernel holds of a node that is open: fuse_inode.iocachectr and its backing file."""

    cached: int = 0
    passed: list[Backing] = field(default_factory=list)

    def open(self, backing: Backing | None) -> int:
        """Open it; the errno that the opener would see (fs/fuse/iomode.c)."""
        if backing is None:
            if self.passed:
                return errno.EIO
            self.cached += 1
        else:
            if self.cached:
                return errno.EIO
            if self.passed and self.passed[0] != backing:
                return errno.EBUSY
            self.passed.append(backing)
        return 0

    def close(self, backing: Backing | None) -> None:
        if backing is None:
            self.cached -= 1
        else:
            self.passed.remove(backing)


@dataclass
class Opening:
    """An open(2) that is under way."""

    ino: int
    node: int | None
    """None: to be looked up."""
    asked: tuple[Entry, Backing | None] | None = None
    """What the daemon has found: the current version, and whether it is whole."""
    refused: bool = False


@dataclass
class Handle:
    life: int
    node: int
    backing: Backing | None


class NodesAgainstTheKernel(RuleBasedStateMachine):
    """Any order of opens, closes, fills, evictions, renewals and deaths of the daemon, and what one open(2)
    consists of in any order with that of others."""

    def __init__(self) -> None:
        super().__init__()
        self.life = 0
        self.nodes = Nodes(passthrough=True)
        self.kernel: dict[int, KernelNode] = {}
        self.named: dict[int, tuple[int, int]] = {}  # node → path and generation, for ever
        self.generation = dict.fromkeys((2, 3), 0)
        self.backing: dict[int, Backing | None] = dict.fromkeys((2, 3))
        self.files = 100
        self.dentry: dict[int, int] = {}  # what the kernel believes a path to be
        self.openings: list[Opening] = []
        self.handles: list[Handle] = []

    def lookup(self, ino: int) -> int:
        """A LOOKUP: a node that is told of names one version of one path, for ever."""
        node = self.nodes.node(entry(ino, self.generation[ino]))
        assert self.named.setdefault(node, (ino, self.generation[ino])) == (ino, self.generation[ino])
        self.dentry[ino] = node
        return node

    @rule(ino=st.sampled_from((2, 3)), believes=st.booleans())
    def begin(self, ino: int, believes: bool) -> None:
        """open(2) of a name that the kernel believes in, or looks up."""
        self.openings.append(Opening(ino, self.dentry.get(ino) if believes else None))

    @precondition(lambda self: self.openings)
    @rule(which=st.integers(0, 20), steps=st.integers(1, 5))
    def go_on(self, which: int, steps: int) -> None:
        """LOOKUP; OPEN, for which the daemon finds out, and then decides; after ESTALE once more."""
        opening = self.openings[which % len(self.openings)]
        for _ in range(steps):
            if opening.node is None:
                opening.node = self.lookup(opening.ino)
            elif opening.asked is None:
                opening.asked = entry(opening.ino, self.generation[opening.ino]), self.backing[opening.ino]
            else:
                self.decide(opening, opening.node, *opening.asked)
                return

    def decide(self, opening: Opening, node: int, current: Entry, backing: Backing | None) -> None:
        opening.asked = None
        try:
            self.nodes.check(node, current)
            bound = self.nodes.open(node, current, backing)
        except Stale:
            assert not opening.refused, "the second ESTALE is what a program would see"
            opening.refused, opening.node = True, None
        else:
            assert self.kernel.setdefault(node, KernelNode()).open(bound) == 0
            self.handles.append(Handle(self.life, node, bound))
            self.openings.remove(opening)

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, 20))
    def close(self, which: int) -> None:
        """The kernel lets go first, and then sends RELEASE; to a daemon that may not know the handle."""
        handle = self.handles.pop(which % len(self.handles))
        self.kernel[handle.node].close(handle.backing)
        if handle.life == self.life:
            self.nodes.close(handle.node)

    @rule(ino=st.sampled_from((2, 3)))
    def fill(self, ino: int) -> None:
        """The file becomes whole; or it is evicted, fetched again, moved: always another cached file."""
        self.files += 1
        self.backing[ino] = (1, self.files)

    @rule(ino=st.sampled_from((2, 3)))
    def evict(self, ino: int) -> None:
        """Nothing is left that could be passed through."""
        self.backing[ino] = None

    def none_is_refused(self) -> bool:
        """Whoever meets two renewals or deaths within one open(2) sees ESTALE."""
        return not any(opening.refused for opening in self.openings)

    @precondition(none_is_refused)
    @rule(ino=st.sampled_from((2, 3)))
    def renew(self, ino: int) -> None:
        """The bucket has another version, which is not cached."""
        self.generation[ino] += 1
        self.backing[ino] = None

    @precondition(none_is_refused)
    @rule()
    def die(self) -> None:
        """kill -9: the next daemon knows nothing of what is open, and is sent what was unanswered."""
        for opening in self.openings:
            opening.asked = None
        self.life += 1
        self.nodes = Nodes(passthrough=True, life=self.life)

    @invariant()
    def no_more_is_remembered_than_is_open(self) -> None:
        """All that is open is described, in this life; and nothing else."""
        assert self.nodes.stats().open == len(
            {handle.node for handle in self.handles if handle.life == self.life}
        )


NodesAgainstTheKernel.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestNodesAgainstTheKernel = NodesAgainstTheKernel.TestCase
