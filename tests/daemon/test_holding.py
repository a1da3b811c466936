"""What the two holders of a mount decide: tables, and a world in which either dies at any moment."""

from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fuse.connection import Agreement
from fuse.handing import Held, Message
from fuse.holding import Act, Do, NodeSide, Peer, Say, Stage, WorkerSide

AGREED = Agreement(minor=40, capabilities=1 << 40, passthrough=True, stateless=False, cached_directories=True)
HELD = Held("one", AGREED)
PATIENCE = 120.0


def said(actions: list[Do]) -> list[str]:
    return [action.message.say if isinstance(action, Say) else action.name for action in actions]


def node(held: Held | None = None, *says: Message) -> NodeSide:
    """A node plugin with a mount, which has heard this."""
    side = NodeSide(patience=PATIENCE)
    if held is not None:
        side.mounted(held, 0.0)
    for message in says:
        side.heard(message, 0.0)
    return side


HELLO = Message("hello")
READY = Message("ready", "one", index="i")
SERVING = Message("serving", "one")


def test_a_mount_is_given_to_the_worker_that_is_there_or_comes() -> None:
    """... and is served when it says so; nobody has read of it before."""
    early = node(None, HELLO)
    assert said(early.mounted(HELD, 0.0)) == ["take"]
    late = node(HELD)
    assert said(late.heard(HELLO, 0.0)) == ["take"]
    for side in (early, late):
        assert said(side.heard(READY, 0.0)) == ["go"]
        assert side.held == replace(HELD, life=1, index="i")
        side.heard(SERVING, 0.0)
        assert side.peer is Peer.SERVES


def test_nobody_waits_for_ever() -> None:
    """EIO after the patience, counted from the end of the worker that served last: one that comes and does
    not serve, and its end, put nothing off. It ends before the next worker reads."""
    side = node(HELD, HELLO, READY, SERVING)
    assert side.due == float("inf")
    assert said(side.lost(1000.0)) == ["RESEND"]
    side.heard(HELLO, 1050.0)
    side.lost(1060.0)
    side.heard(HELLO, 1070.0)
    assert side.due == 1000.0 + PATIENCE
    assert said(side.tick(side.due - 1)) == []
    assert said(side.tick(side.due)) == ["REFUSE"]
    assert said(side.tick(1999.0)) == []
    assert said(side.heard(READY, 2000.0)) == ["CEASE", "go"]
    assert not side.refusing


def test_a_node_plugin_gets_the_mount_from_the_worker() -> None:
    """... as it is by now, and goes on as if it had had it all the time."""
    side = node(None)
    worker = replace(HELD, life=3, index="i")
    assert said(side.heard(Message("hello", held=worker, serving=True), 5.0)) == ["ADOPT", "keep"]
    assert (side.held, side.peer) == (worker, Peer.SERVES)
    assert said(side.lost(6.0)) == ["RESEND"]
    assert side.due == 6.0 + PATIENCE


def test_what_the_other_side_knows_is_newer() -> None:
    """Each life has numbers of its own: the higher count holds."""
    side = node(replace(HELD, life=2, index="i"))
    side.heard(Message("hello", held=replace(HELD, life=5, index="i"), serving=True), 0.0)
    assert side.held is not None
    assert side.held.life == 5


def test_a_worker_that_cannot_is_not_asked_again() -> None:
    """It says why; the next one, or another mount, is another matter."""
    side = node(HELD, HELLO)
    side.heard(Message("unable", "one", why="the index is gone"), 0.0)
    assert side.trouble == "the index is gone"
    assert said(side.gone()) == ["DROP"]
    assert said(side.mounted(replace(HELD, connection="two"), 0.0)) == ["take"]
    assert side.trouble == ""
    worker = WorkerSide()
    worker.connects()
    take = Message("take", "one", held=HELD)
    worker.heard(take)
    assert said(worker.unable("no")) == ["unable", "DROP"]
    assert said(worker.heard(take)) == ["unable"]
    assert said(worker.heard(Message("take", "two", held=replace(HELD, connection="two")))) == [
        "ADOPT",
        "PREPARE",
    ]


@pytest.mark.parametrize(
    "message",
    [SERVING, READY, Message("hello"), Message("go"), Message("take", held=HELD), Message("unable", "one")],
)
def test_what_cannot_be_said_ends_the_connection(message: Message) -> None:
    """And changes nothing else."""
    side = node(HELD, HELLO, READY)
    side.heard(SERVING, 0.0)
    before = (side.held, side.refusing)
    if message.say != "serving":
        assert said(side.heard(message, 0.0)) == ["HANG_UP"]
    assert (side.held, side.refusing) == before
    worker = WorkerSide()
    worker.connects()
    assert said(worker.heard(Message("hello"))) == ["HANG_UP"]


# ---- a world ---------------------------------------------------------------------------------------


@dataclass
class Link:
    """A connection: what is on its way, with or without the mount's descriptor; and who has ended."""

    to_node: deque[tuple[Message, bool]] = field(default_factory=deque)
    to_worker: deque[tuple[Message, bool]] = field(default_factory=deque)
    node_ended: bool = False
    worker_ended: bool = False


class World(RuleBasedStateMachine):
    """A kernel with at most one mount, a node plugin and a worker, as processes that die."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.made = 0
        self.mounted = ""  # the mount that there is
        self.node: NodeSide | None = None
        self.worker: WorkerSide | None = None
        self.links: list[Link] = []  # as the node plugin has accepted them, the oldest first
        self.ours: Link | None = None  # the worker's
        self.preparing = False
        self.lives: dict[str, list[int]] = {}

    # The kernel

    def holders(self) -> bool:
        """Whether a process has the descriptor, or it is on its way to one."""
        node = (
            self.node is not None and self.node.held is not None and self.node.held.connection == self.mounted
        )
        worker = self.worker is not None and self.worker.held is not None
        worker = worker and self.worker.held.connection == self.mounted  # type: ignore[union-attr]
        on_its_way = any(
            with_mount and message.held is not None and message.held.connection == self.mounted
            for link in self.links
            for messages, ended in ((link.to_node, link.node_ended), (link.to_worker, link.worker_ended))
            for message, with_mount in messages
            if not ended
        )
        return node or worker or on_its_way

    # Deaths and births

    @initialize(rounds=st.integers(0, 4))
    def begin(self, rounds: int) -> None:
        """Somewhere on the way to a mount that is served: most of what can go wrong begins there."""
        self.node = NodeSide(patience=PATIENCE)
        self.mount()
        self.worker_starts()
        self.nobody_dies_for_a_while(4 - rounds)

    @precondition(lambda self: self.node is None)
    @rule()
    def node_starts(self) -> None:
        self.node = NodeSide(patience=PATIENCE)

    @precondition(lambda self: self.node is not None)
    @rule()
    def node_dies(self) -> None:
        self.node = None
        for link in self.links:
            link.node_ended = True
            link.to_node.clear()
        self.links.clear()
        self.settle_mount()

    @precondition(lambda self: self.worker is None)
    @rule()
    def worker_starts(self) -> None:
        self.worker = WorkerSide()

    @precondition(lambda self: self.worker is not None)
    @rule()
    def worker_dies(self) -> None:
        self.worker, self.preparing = None, False
        if self.ours is not None:
            self.ours.worker_ended = True
            self.ours.to_worker.clear()
            self.ours = None
        self.settle_mount()

    def settle_mount(self) -> None:
        """The kernel ends a mount whose last descriptor is closed."""
        if self.mounted and not self.holders():
            self.mounted = ""

    # Mounts

    @precondition(lambda self: self.node is not None and not self.mounted and self.node.held is None)
    @rule()
    def mount(self) -> None:
        self.made += 1
        self.mounted = f"m{self.made}"
        assert self.node is not None
        self.node_does(self.node.mounted(Held(self.mounted, AGREED), self.now), -1)

    @precondition(lambda self: self.mounted)
    @rule(and_again=st.booleans())
    def unmount(self, and_again: bool) -> None:
        self.mounted = ""
        self.see_that_it_is_gone()
        if and_again and self.node is not None and self.node.held is None:
            self.mount()

    def see_that_it_is_gone(self) -> None:
        if self.node is not None and self.node.held is not None and self.node.held.connection != self.mounted:
            self.node_does(self.node.gone(), 0)

    @precondition(lambda self: self.worker is not None and self.worker.held is not None)
    @rule()
    def worker_sees(self) -> None:
        assert self.worker is not None
        assert self.worker.held is not None
        if self.worker.held.connection != self.mounted:
            self.preparing = False
            self.worker_does(self.worker.gone())

    # Time

    @precondition(lambda self: self.node is not None)
    @rule()
    def time_passes(self) -> None:
        assert self.node is not None
        self.now += PATIENCE / 2
        self.node_does(self.node.tick(self.now), 0)

    @precondition(lambda self: self.preparing)
    @rule()
    def prepared(self) -> None:
        assert self.worker is not None
        self.preparing = False
        self.worker_does(self.worker.prepared("i"))

    # What is said

    @precondition(lambda self: self.worker is not None and self.ours is None)
    @rule()
    def connect(self) -> None:
        assert self.worker is not None
        if self.node is None:
            self.worker_does(self.worker.nobody())
            return
        self.ours = Link()
        self.links.append(self.ours)
        self.worker_does(self.worker.connects())

    @precondition(lambda self: self.node is not None and self.links)
    @rule()
    def node_hears(self) -> None:
        assert self.node is not None
        link = self.links[0]
        if link.to_node:
            message, with_mount = link.to_node.popleft()
            if with_mount and self.node.held is None and message.held.connection != self.mounted:  # type: ignore[union-attr]
                self.hang_up(link)
                return
            self.node_does(self.node.heard(message, self.now), 0)
        elif link.worker_ended:
            self.links.remove(link)
            self.node_does(self.node.lost(self.now), 0)

    @precondition(lambda self: self.ours is not None)
    @rule()
    def worker_hears(self) -> None:
        assert self.ours is not None
        assert self.worker is not None
        if self.ours.to_worker:
            message, _ = self.ours.to_worker.popleft()
            self.worker_does(self.worker.heard(message))
        elif self.ours.node_ended:
            self.ours = None
            self.worker_does(self.worker.lost())

    def hang_up(self, link: Link) -> None:
        assert self.node is not None
        link.node_ended = True
        link.to_node.clear()
        if link in self.links:
            self.links.remove(link)
        self.node_does(self.node.lost(self.now), 0)

    def node_does(self, actions: list[Do], _: int) -> None:
        for action in actions:
            if isinstance(action, Say):
                if self.links:
                    self.links[0].to_worker.append((action.message, action.with_mount))
            elif action is Act.HANG_UP:
                self.hang_up(self.links[0])
            elif action is Act.DROP:
                assert self.node is not None
                assert self.node.held is None

    def worker_does(self, actions: list[Do]) -> None:
        for action in actions:
            assert self.worker is not None
            if isinstance(action, Say):
                if self.ours is not None and not self.ours.node_ended:
                    self.ours.to_node.append((action.message, action.with_mount))
            elif action is Act.PREPARE:
                self.preparing = True
            elif action is Act.START:
                held = self.worker.held
                assert held is not None
                self.lives.setdefault(held.connection, []).append(held.life)
            elif action is Act.ANEW:
                self.worker_dies()
                return
            elif action is Act.HANG_UP and self.ours is not None:
                self.ours.worker_ended = True
                self.ours = None
                self.worker_does(self.worker.lost())

    # What holds

    @invariant()
    def one_reads(self) -> None:
        """The kernel's mount, of those who are alive."""
        reading = 0
        if self.node is not None and self.node.refusing and self.node.held is not None:
            reading += self.node.held.connection == self.mounted
        if self.worker is not None and self.worker.stage is Stage.SERVES and self.worker.held is not None:
            reading += self.worker.held.connection == self.mounted
        assert reading <= 1

    @invariant()
    def it_is_not_lost(self) -> None:
        """A mount ends by being unmounted, or with the last process that has it: nobody forgets it."""
        assert not self.mounted or self.holders()

    @invariant()
    def lives_are_of_one_each(self) -> None:
        for lives in self.lives.values():
            assert len(set(lives)) == len(lives)
            assert sorted(lives) == lives

    @rule(rounds=st.integers(0, 6))
    def nothing_special(self, rounds: int) -> None:
        self.nobody_dies_for_a_while(rounds)

    def nobody_dies_for_a_while(self, rounds: int) -> None:
        for _ in range(rounds):
            self.all_that_can_happen()

    @precondition(lambda self: self.worker is not None)
    @rule(rounds=st.integers(0, 6))
    def the_worker_is_exchanged(self, rounds: int) -> None:
        self.worker_dies()
        self.worker_starts()
        self.nobody_dies_for_a_while(rounds)

    @precondition(lambda self: self.node is not None)
    @rule(rounds=st.integers(0, 6))
    def the_node_plugin_is_exchanged(self, rounds: int) -> None:
        self.node_dies()
        self.node_starts()
        self.nobody_dies_for_a_while(rounds)

    def all_that_can_happen(self) -> None:
        """Whatever is on its way arrives, but no time passes."""
        self.see_that_it_is_gone()
        if self.worker is not None and self.worker.held is not None:
            self.worker_sees()
        if self.preparing:
            self.prepared()
        if self.worker is not None and self.ours is None:
            self.connect()
        if self.node is not None and self.links:
            self.node_hears()
        if self.ours is not None:
            self.worker_hears()
        self.one_reads()
        self.it_is_not_lost()

    def teardown(self) -> None:
        """When nobody dies any more, the mount comes to be served."""
        if self.node is None:
            self.node_starts()
        for _ in range(100):
            if self.worker is None:
                self.worker_starts()
            self.all_that_can_happen()
        if self.mounted:
            assert self.worker is not None
            assert self.node is not None
            assert self.worker.stage is Stage.SERVES, (self.worker, self.node)
            assert self.node.peer is Peer.SERVES, (self.worker, self.node)
            assert not self.node.refusing


World.TestCase.settings = settings(max_examples=400, stateful_step_count=30, deadline=None)
TestWorld = World.TestCase
