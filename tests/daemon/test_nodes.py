"""Nodes: what a number says, and the kernel's rules of open modes, against a model of that kernel."""

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

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


def test_nothing_is_kept_of_what_is_closed() -> None:
    """A million files that were open in two ways cost nothing afterwards."""
    known = Nodes(passthrough=True)
    served = known.node(entry(7, 0))
    known.open(served, entry(7, 0))
    with pytest.raises(Stale):
        known.open(served, entry(7, 0), A)
    passed = known.node(entry(7, 0))
    assert passed != served
    known.open(passed, entry(7, 0), A)
    known.close(served)
    assert known.node(entry(7, 0)) == passed, "as long as it is open, it is what is told"
    known.close(passed)
    assert not known._open
    assert not known._turns
    assert known.node(entry(7, 0)) == served


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


class NodesAgainstTheKernel(RuleBasedStateMachine):
    """Any order of opens, closes, fills, evictions, renewals and deaths of the daemon."""

    handles = Bundle("handles")

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

    def lookup(self, ino: int) -> int:
        """A LOOKUP: a node that is told of names one version of one path, for ever."""
        node = self.nodes.node(entry(ino, self.generation[ino]))
        assert self.named.setdefault(node, (ino, self.generation[ino])) == (ino, self.generation[ino])
        self.dentry[ino] = node
        return node

    @rule(target=handles, ino=st.sampled_from((2, 3)), believes=st.booleans())
    def open(self, ino: int, believes: bool) -> tuple[int, int, int, Backing | None]:
        """open(2): OPEN of the node that the kernel believes in, and after ESTALE once more."""
        node = self.dentry[ino] if believes and ino in self.dentry else self.lookup(ino)
        current, backing = entry(ino, self.generation[ino]), self.backing[ino]
        for attempt in range(2):
            try:
                self.nodes.check(node, current)
                self.nodes.open(node, current, backing)
                break
            except Stale:
                assert attempt == 0, "the second ESTALE is what a program would see"
                node = self.lookup(ino)
        assert self.kernel.setdefault(node, KernelNode()).open(backing) == 0
        return self.life, ino, node, backing

    @rule(handle=consumes(handles))
    def close(self, handle: tuple[int, int, int, Backing | None]) -> None:
        """The kernel lets go first, and then sends RELEASE; to a daemon that may not know the handle."""
        life, _, node, backing = handle
        self.kernel[node].close(backing)
        if life == self.life:
            self.nodes.close(node)

    @rule(ino=st.sampled_from((2, 3)))
    def fill(self, ino: int) -> None:
        """The file becomes whole; or it is evicted, fetched again, moved: always another cached file."""
        self.files += 1
        self.backing[ino] = (1, self.files)

    @rule(ino=st.sampled_from((2, 3)))
    def evict(self, ino: int) -> None:
        """Nothing is left that could be passed through."""
        self.backing[ino] = None

    @rule(ino=st.sampled_from((2, 3)))
    def renew(self, ino: int) -> None:
        """The bucket has another version, which is not cached."""
        self.generation[ino] += 1
        self.backing[ino] = None

    @rule()
    def die(self) -> None:
        """kill -9: the next daemon knows nothing of what is open."""
        self.life += 1
        self.nodes = Nodes(passthrough=True, life=self.life)

    @invariant()
    def no_more_is_remembered_than_is_open(self) -> None:
        """Memory is bounded by what is open, and all of it is described."""
        opened = sum(bool(node.cached or node.passed) for node in self.kernel.values())
        assert self.nodes.stats().open <= opened
        assert len(self.nodes._turns) <= self.nodes.stats().open


NodesAgainstTheKernel.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestNodesAgainstTheKernel = NodesAgainstTheKernel.TestCase
