"""
Who reads a mount when: what its two holders decide. Pure.

`NodeSide` is the node plugin, `WorkerSide` the worker of one Dataset. Each takes what happens to it, and
returns what is to be done. Two things hold whatever dies, and whenever:

- the mount is not lost as long as one of the two lives, and neither of them forgets it while it is mounted;
- one process reads it at a time: the worker, or the node plugin, which answers EIO where no worker has served
  for a while.

A worker that has got a mount asks (`ready`) before it begins to read, and the node plugin, which stops first,
says `go`. Where nobody listens any more, the node plugin is dead, and reads nothing. While a worker serves,
the node plugin may come and go: the worker tells the next one what it holds. What ends a worker's connection
is its own end; what it had read and not answered is sent again at once, so that whoever waits for it can be
killed.

A *life* begins when a worker begins to read: each has its own node and handle numbers (`nodes`).
"""

from dataclasses import dataclass, replace
from enum import Enum

from fuse.handing import Held, Message

# ---- what is to be done ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Say:
    """Send this to the other side; `with_mount`: with our descriptor beside it."""

    message: Message
    with_mount: bool = False


class Act(Enum):
    """The rest."""

    ADOPT = "the descriptor that came is ours from now on"
    DROP = "close our descriptor: the mount is gone, or was never ours to serve"
    RESEND = "have the kernel send again what was read and not answered"
    REFUSE = "read the mount, and answer EIO"
    CEASE = "do not read it any more"
    HANG_UP = "end the connection"
    # Of a worker:
    PREPARE = "make what is needed to serve the mount; `prepared` or `unable` follows"
    START = "read the mount, and answer"
    LEARN = "it is known now whether there is a mount"
    ANEW = "end, and begin anew: this cannot be gone on with"


Do = Say | Act


def _say(say: str, **more: object) -> Say:
    return Say(Message(say, **more))  # type: ignore[arg-type]


# ---- the node plugin -------------------------------------------------------------------------------


class Peer(Enum):
    """How far the worker that is connected is."""

    NONE = "no worker is connected"
    IDLE = "it has no mount"
    HAS = "it has the mount, and does not read it"
    BEGINS = "it may read it"
    SERVES = "it reads it"


class NodeSide:
    """One Dataset's mount, as the node plugin has it. Times are monotonic seconds."""

    def __init__(self, *, patience: float) -> None:
        """`patience`: seconds without a worker that serves, after which EIO is answered."""
        self._patience = patience
        self.held: Held | None = None
        self.peer = Peer.NONE
        self.refusing = False
        self.trouble = ""
        """Why the worker that is there cannot serve the mount."""
        self._alone: float | None = None  # since when nobody serves the mount; None: somebody does

    def __repr__(self) -> str:
        return f"<NodeSide {self.held and self.held.connection} {self.peer.name}, refusing {self.refusing}>"

    @property
    def due(self) -> float:
        """When `tick` has something to do."""
        if self.held is None or self._alone is None or self.refusing:
            return float("inf")
        return self._alone + self._patience

    def mounted(self, held: Held, now: float) -> list[Do]:
        """There is a new mount; nobody has read of it yet."""
        assert self.held is None, "one mount a Dataset"
        self.held, self._alone = held, now
        return self._give() if self.peer is Peer.IDLE else []

    def heard(self, message: Message, now: float) -> list[Do]:
        """The worker that is connected says this. Whatever it cannot say now ends the connection."""
        if message.say == "hello" and self.peer is Peer.NONE:
            return self._hello(message, now)
        if message.say == "gone" and self.peer in (Peer.HAS, Peer.BEGINS, Peer.SERVES):
            self.peer, self.trouble = Peer.IDLE, ""
            if self.held is None:
                return []
            if self.held.connection != message.connection:
                return self._give()  # one that came meanwhile
            if self._alone is None:
                self._alone = now  # the kernel is about to say so to us, too
            return []
        if message.say not in ("ready", "serving", "unable") or self.peer is Peer.NONE:
            return [Act.HANG_UP]
        if self.held is None or message.connection != self.held.connection:
            return []  # of a mount that was taken off in this moment
        if message.say == "ready" and self.peer is Peer.HAS:
            before: list[Do] = [Act.CEASE] if self.refusing else []
            self.held = replace(self.held, life=self.held.life + 1, index=message.index)
            self.peer, self.refusing, self._alone, self.trouble = Peer.BEGINS, False, None, ""
            return [*before, _say("go", connection=self.held.connection)]
        if message.say == "serving" and self.peer in (Peer.BEGINS, Peer.SERVES):
            self.peer = Peer.SERVES
            return []
        if message.say == "unable" and self.peer is Peer.HAS:
            self.peer, self.trouble = Peer.IDLE, message.why or "it does not say why"
            return []
        return [Act.HANG_UP]

    def _hello(self, message: Message, now: float) -> list[Do]:
        if message.held is None:
            self.peer = Peer.IDLE
            return self._give() if self.held is not None else [_say("nothing")]
        theirs, before = message.held, list[Do]()
        if self.held is None:
            before = [Act.ADOPT]
            self.held, self._alone = theirs, now
        elif self.held.connection != theirs.connection:
            # One that was taken off, and shows that it is; else a process goes that cannot be gone on with.
            return [_say("other", connection=theirs.connection), Act.HANG_UP]
        else:
            newest = max(self.held, theirs, key=lambda held: held.life)
            self.held = replace(newest, agreement=self.held.agreement)
        self.peer = Peer.HAS
        if message.serving:
            before += [Act.CEASE] if self.refusing else []
            self.peer, self.refusing, self._alone, self.trouble = Peer.SERVES, False, None, ""
        return [*before, _say("keep", connection=theirs.connection)]

    def _give(self) -> list[Do]:
        assert self.held is not None
        self.peer = Peer.HAS
        return [Say(Message("take", connection=self.held.connection, held=self.held), with_mount=True)]

    def lost(self, now: float) -> list[Do]:
        """The connection has ended, with the worker."""
        served = self.peer in (Peer.BEGINS, Peer.SERVES)
        self.peer, self.trouble = Peer.NONE, ""
        if self.held is None or not served:
            return []
        self._alone = now
        return [Act.RESEND]

    def tick(self, now: float) -> list[Do]:
        """Time has passed."""
        if now < self.due:
            return []
        self.refusing = True
        return [Act.REFUSE]

    def gone(self) -> list[Do]:
        """The mount is: the kernel says so, or it was taken off."""
        if self.held is None:
            return []
        before: list[Do] = [Act.CEASE] if self.refusing else []
        self.held, self.refusing, self._alone, self.trouble = None, False, None, ""
        return [*before, Act.DROP]


# ---- the worker ------------------------------------------------------------------------------------


class Stage(Enum):
    """What a worker does with a mount."""

    NONE = "there is none"
    TAKEN = "it makes what it needs"
    READY = "it could serve"
    SERVES = "it serves"


class WorkerSide:
    """One Dataset's mount, as its worker has it."""

    def __init__(self) -> None:
        self.held: Held | None = None
        self.stage = Stage.NONE
        self.connected = False
        self.known = False
        """Whether it is known if there is a mount."""
        self._unable: dict[str, str] = {}  # mounts that cannot be served here, and why

    def __repr__(self) -> str:
        return f"<WorkerSide {self.held and self.held.connection} {self.stage.name}>"

    def connects(self) -> list[Do]:
        """We have a connection to the node plugin."""
        self.connected = True
        hello = Message("hello", held=self.held, serving=self.stage is Stage.SERVES)
        return [Say(hello, with_mount=self.held is not None)]

    def lost(self) -> list[Do]:
        """The connection has ended. Whether the node plugin has, too, is not known."""
        self.connected = False
        return []

    def nobody(self) -> list[Do]:
        """Nobody listens: the node plugin is dead, and holds nothing."""
        if self.stage is Stage.READY:
            return self._begin()
        return self._learn()

    def heard(self, message: Message) -> list[Do]:
        """The node plugin says this. Whatever it cannot say now ends the connection."""
        ours = self.held is not None and message.connection == self.held.connection
        if message.say == "nothing" and self.held is None:
            return self._learn()
        if message.say == "keep" and ours:
            return self._ask() if self.stage is Stage.READY else self._learn()
        if message.say == "take" and message.held is not None:
            return self._take(message.held)
        if message.say == "go":
            # Of another: one that has gone in this moment.
            return self._begin() if ours and self.stage is Stage.READY else []
        if message.say == "other":
            return [Act.ANEW] if ours else []
        return [] if message.say == "owing" else [Act.HANG_UP]

    def _take(self, held: Held) -> list[Do]:
        if self.held is not None:
            return [Act.ANEW]
        if held.connection in self._unable:
            return [_say("unable", connection=held.connection, why=self._unable[held.connection])]
        self.held, self.stage = held, Stage.TAKEN
        return [Act.ADOPT, *self._learn(), Act.PREPARE]

    def _learn(self) -> list[Do]:
        known, self.known = self.known, True
        return [] if known else [Act.LEARN]

    def prepared(self, index: str) -> list[Do]:
        """All is there to serve the mount, over the index of this identity."""
        assert self.held is not None
        assert not self.held.index or self.held.index == index, "its node numbers mean nothing here"
        self.held, self.stage = replace(self.held, index=index), Stage.READY
        return self._ask() if self.connected else []

    def _ask(self) -> list[Do]:
        assert self.held is not None
        return [_say("ready", connection=self.held.connection, index=self.held.index)]

    def unable(self, why: str) -> list[Do]:
        """The mount cannot be served here."""
        assert self.held is not None
        connection = self.held.connection
        self._unable[connection] = why
        self.held, self.stage = None, Stage.NONE
        told = [_say("unable", connection=connection, why=why)] if self.connected else []
        return [*told, Act.DROP]

    def _begin(self) -> list[Do]:
        assert self.held is not None
        self.held, self.stage = replace(self.held, life=self.held.life + 1), Stage.SERVES
        told = [_say("serving", connection=self.held.connection)] if self.connected else []
        return [Act.START, *told]

    def gone(self) -> list[Do]:
        """The mount is: the kernel says so."""
        if self.held is None:
            return []
        connection = self.held.connection
        self.held, self.stage = None, Stage.NONE
        told = [_say("gone", connection=connection)] if self.connected else []
        return [Act.DROP, *told]
