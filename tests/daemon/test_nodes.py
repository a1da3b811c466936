"""Nodes, against a model of what a kernel remembers, and the few promises one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from datacache.model import Entry, Kind, Version
from fuse.nodes import LATER, Nodes, Stale


def entry(ino: int, version: int, kind: Kind = Kind.FILE) -> Entry:
    """Version `version` of path `ino`. Equal, never the same object: versions are compared by value."""
    etag = f'"{version}"' if kind is Kind.FILE else ""
    return Entry(ino, 1, b"name", kind, version, version, 0, "key", Version(etag=etag))


def test_the_first_version_of_a_path_has_the_paths_number() -> None:
    """What `ls -i` shows for a path is the index's number, as long as nothing changes."""
    nodes = Nodes()
    assert [nodes.remember(entry(7, 1)) for _ in range(3)] == [7, 7, 7]
    assert nodes.stats().known == 1


def test_another_version_is_another_node_from_the_range_of_later_ones() -> None:
    """A new version never shares a node with one that the kernel remembers, in either direction."""
    nodes = Nodes()
    first, second = nodes.remember(entry(7, 1)), nodes.remember(entry(7, 2))
    assert (first, second) == (7, LATER)
    assert nodes.path(second) == 7
    assert nodes.remember(entry(7, 1)) == first, "the old bytes came back: so does their node"
    assert nodes.remember(entry(7, 2)) == second
    nodes.check(second, entry(7, 2))
    with pytest.raises(Stale):
        nodes.check(first, entry(7, 2))


def test_a_later_number_is_never_used_twice() -> None:
    """A number that was forgotten is not given to another version: the kernel may hold pages under it."""
    nodes = Nodes()
    nodes.remember(entry(7, 1))
    seen = set()
    for version in range(2, 20):
        node = nodes.remember(entry(7, version))
        assert node not in seen
        seen.add(node)
        nodes.forget([(node, 1)])


def test_a_path_has_its_own_number_again_once_all_versions_are_forgotten() -> None:
    """Nothing is kept of a path that the kernel has let go of."""
    nodes = Nodes()
    first, second = nodes.remember(entry(7, 1)), nodes.remember(entry(7, 2))
    nodes.forget([(first, 1), (second, 1)])
    assert nodes.stats() == Nodes().stats()
    assert nodes.remember(entry(7, 3)) == 7
    with pytest.raises(Stale):
        nodes.path(second)


def test_a_file_that_becomes_a_directory_is_another_node() -> None:
    """A node never changes its type: the kernel would call it broken (EIO)."""
    nodes = Nodes()
    assert nodes.remember(entry(7, 1, Kind.FILE)) != nodes.remember(entry(7, 1, Kind.DIRECTORY))


def test_an_open_node_keeps_its_entry_until_the_last_close() -> None:
    """While anybody has it open, a node can be described, whatever the index has learned since."""
    nodes = Nodes()
    node = nodes.remember(entry(7, 1))
    nodes.open(node, entry(7, 1))
    nodes.open(node, entry(7, 1))
    nodes.close(node)
    assert nodes.opened(node) == entry(7, 1)
    nodes.close(node)
    assert nodes.opened(node) is None
    assert nodes.stats().open == 0


def test_a_node_that_was_never_told_of_is_taken_for_its_path() -> None:
    """The root, and nodes that a kernel remembers from before a restart, answer for the current version."""
    nodes = Nodes()
    assert nodes.path(1) == 1
    nodes.check(7, entry(7, 3))


class NodesAgainstAKernel(RuleBasedStateMachine):
    """Random looks and forgets, against what a kernel would remember."""

    told = Bundle("told")

    def __init__(self) -> None:
        super().__init__()
        self.nodes = Nodes()
        self.names: dict[int, tuple[int, int]] = {}  # node → (path, version), while it is remembered
        self.counts: dict[int, int] = {}
        self.later: set[int] = set()

    @rule(target=told, ino=st.integers(2, 4), version=st.integers(1, 4))
    def remember(self, ino: int, version: int) -> int:
        """A node that is remembered names one version, and a version that is remembered has one node."""
        node = self.nodes.remember(entry(ino, version))
        assert self.names.setdefault(node, (ino, version)) == (ino, version)
        assert self.nodes.path(node) == ino
        if node != ino:
            assert node >= LATER
            assert node not in self.later or node in self.counts, "a forgotten number was used again"
            self.later.add(node)
        self.counts[node] = self.counts.get(node, 0) + 1
        return node

    @rule(target=told, node=consumes(told), batch=st.booleans())
    def forget(self, node: int, batch: bool) -> object:
        """FORGET of one look, or of all that are left."""
        if node not in self.counts:
            return multiple()
        count = self.counts[node] if batch else 1
        self.nodes.forget([(node, count)])
        self.counts[node] -= count
        if not self.counts[node]:
            del self.counts[node], self.names[node]
            return multiple()
        return node

    @invariant()
    def what_is_remembered_is_what_the_kernel_remembers(self) -> None:
        """No node is lost early, none is kept for ever, and each answers for its own version only."""
        stats = self.nodes.stats()
        assert stats.known == len(self.counts)
        assert stats.later == sum(node >= LATER for node in self.counts)
        for node, (ino, version) in self.names.items():
            self.nodes.check(node, entry(ino, version))
            with pytest.raises(Stale):
                self.nodes.check(node, entry(ino, version + 1))


NodesAgainstAKernel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestNodesAgainstAKernel = NodesAgainstAKernel.TestCase
