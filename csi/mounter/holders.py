"""
The node plugin's hold on the mounts of Datasets' volumes: `fuse.holding.NodeSide`, for all Datasets of a
node.

One thread does it all: it listens on a socket in the runtime directory of each Dataset that has a volume
here, hears the workers, answers EIO for those that do not come, and sees when a mount is gone. Others have it
do things, and wait.

Nothing of it is on disk: who is killed gets the mounts from the workers again.
"""

import contextlib
import logging
import os
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from datacache.errors import MountError
from datacache.kube.release import VOLUME_SOCKET
from fuse import connection, handing
from fuse.connection import Refusal
from fuse.handing import Held, Message, Misspoken
from fuse.holding import Act, Do, NodeSide, Peer, Say

log = logging.getLogger(__name__)

_QUEUE = 4
"""Connections of one Dataset at most. Those but the first wait for its end: one worker ends, another
begins."""
_HELLO = 5.0
"""Seconds within which who has connected has to say something."""
_ANSWER = 5.0
"""Seconds for a worker to say what it owes."""
_CALL = 10.0
"""Seconds for the thread to do what it is asked: it waits for nobody."""


_Readable = int | socket.socket | select.epoll


@dataclass(eq=False)
class _Desk:
    """What there is of one Dataset."""

    uid: str
    side: NodeSide
    listener: socket.socket
    peers: deque[socket.socket] = field(default_factory=deque)
    """Connections, the oldest first: only it is listened to."""
    hello_by: float = float("inf")
    descriptor: int = -1
    refusal: Refusal | None = None
    gone: select.epoll | None = None
    """Shows that the mount is gone, while nobody reads it."""
    owing: Callable[[str], None] | None = None
    """Who waits for what the worker owes."""


class Holders:
    """See the module. `directory` has the runtime directories of Datasets, by their uids; `patience`: seconds
    without a worker after which EIO is answered. `is_mount` tells whether a descriptor that came is one."""

    def __init__(
        self, directory: str, *, patience: float, is_mount: Callable[[int], bool] = handing.is_mount
    ) -> None:
        self._directory, self._patience, self._is_mount = directory, patience, is_mount
        # The thread's own.
        self._desks: dict[str, _Desk] = {}
        self._events = selectors.DefaultSelector()
        self._ends = False
        # What others have it do, and what they see: under the condition.
        self._asked: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._seen: dict[str, _Seen] = {}
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="holders", daemon=True)

    def __repr__(self) -> str:
        return f"<Holders {sorted(self._seen)}>"

    def __enter__(self) -> "Holders":
        self._events.register(self._wake, selectors.EVENT_READ, self._on_wake)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Let go of all: the workers go on, and what no worker has ends."""

        def end() -> None:
            for uid in list(self._desks):
                self._close(uid)
            self._ends = True

        self._ask(end)
        self._thread.join()
        self._events.close()
        os.close(self._wake)
        os.close(self._woken)

    # ---- what others call ----------------------------------------------------------------------------

    def listen(self, uid: str) -> None:
        """Let workers of the Dataset come. Idempotent. Raises MountError."""
        self._call(lambda: self._open(uid))

    def hold(self, uid: str, held: Held, descriptor: int) -> None:
        """Have a mount of the Dataset served, which is new: it is ours from now on, whatever comes. Raises
        MountError where there is one already."""

        def take() -> None:
            try:
                desk = self._open(uid)
                if desk.side.held is not None:
                    raise MountError(f"there is a mount of Dataset {uid} already")
            except BaseException:
                os.close(descriptor)
                raise
            desk.descriptor = descriptor
            self._do(desk, desk.side.mounted(held, time.monotonic()))

        self._call(take)

    def holds(self, uid: str) -> bool:
        """Whether we have a mount of the Dataset."""
        with self._changed:
            return self._look(uid).held

    def serves(self, uid: str, *, within: float) -> bool:
        """Wait until a worker serves the mount; False where none does within so many seconds. Raises
        MountError where the one that is there cannot."""
        with self._changed:
            self._changed.wait_for(lambda: self._look(uid).serves or self._look(uid).trouble, within)
            seen = self._look(uid)
        if seen.trouble and not seen.serves:
            raise MountError(seen.trouble)
        return seen.serves

    def connected(self, uid: str) -> bool:
        """Whether a worker of the Dataset is there, be it able to serve or not."""
        with self._changed:
            return self._look(uid).connected

    def owed(self, uid: str) -> str:
        """What the worker says that the bucket does not have yet, as words; empty: nothing, or there is none
        who could say it."""
        answer: list[str] = []
        said = threading.Event()

        def ask() -> None:
            desk = self._desks.get(uid)
            if desk is None or desk.side.peer is Peer.NONE:
                said.set()
                return

            def heard(owed: str) -> None:
                answer.append(owed)
                said.set()

            desk.owing = heard
            self._say(desk, Message("owing"))

        self._call(ask)
        said.wait(_ANSWER)
        return answer[0] if answer else ""

    def forget(self, uid: str) -> None:
        """Let go of the mount, which is gone, and let no worker come any more. Idempotent."""
        self._call(lambda: self._close(uid))

    def linger(self, seconds: float) -> bool:
        """Wait until a worker has each mount; whether that is so within so many seconds."""

        def alone() -> bool:
            return any(seen.held and not seen.serves for seen in self._seen.values())

        with self._changed:
            return self._changed.wait_for(lambda: not alone(), seconds)

    # ---- the thread ----------------------------------------------------------------------------------

    def _ask(self, what: Callable[[], None]) -> None:
        self._asked.append(what)
        with contextlib.suppress(BlockingIOError):
            os.write(self._woken, b"x")

    def _call(self, what: Callable[[], object]) -> None:
        """Have the thread do it; raises what that raises."""
        done = threading.Event()
        raised: list[BaseException] = []

        def act() -> None:
            try:
                what()
            except BaseException as error:  # noqa: BLE001  it is raised where it was asked for
                raised.append(error)
            self._show()
            done.set()

        self._ask(act)
        if not done.wait(_CALL):
            raise MountError("the node plugin's hold on mounts does not answer")
        if raised:
            raise raised[0]

    def _run(self) -> None:
        while not self._ends:
            for key, _ in self._events.select(self._due()):
                now = self._events.get_map().get(key.fd)
                if now is not None and now.data is key.data:  # what came before may have ended it
                    key.data()
            self._on_time()
            self._show()

    def _due(self) -> float | None:
        due = min((min(desk.side.due, desk.hello_by) for desk in self._desks.values()), default=float("inf"))
        return None if due == float("inf") else max(0.0, due - time.monotonic())

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        while self._asked:
            self._asked.popleft()()

    def _on_time(self) -> None:
        now = time.monotonic()
        for desk in list(self._desks.values()):
            if now >= desk.hello_by:
                log.warning("who connected for Dataset %s says nothing", desk.uid)
                self._lost(desk)
            self._do(desk, desk.side.tick(now))

    def _show(self) -> None:
        """Let others see how it is."""
        seen = {uid: _Seen.of(desk.side) for uid, desk in self._desks.items()}
        with self._changed:
            if seen != self._seen:
                self._seen = seen
                self._changed.notify_all()

    def _look(self, uid: str) -> "_Seen":
        return self._seen.get(uid) or _Seen()

    def _open(self, uid: str) -> _Desk:
        desk = self._desks.get(uid)
        if desk is None:
            place = os.path.join(self._directory, uid)
            try:
                os.makedirs(self._directory, exist_ok=True)
                os.makedirs(place, mode=0o700, exist_ok=True)
                os.chmod(place, 0o700)
            except OSError as error:
                raise MountError(f"{place} cannot be made ({error.strerror})") from error
            listener = handing.listen(os.path.join(place, VOLUME_SOCKET))
            desk = self._desks[uid] = _Desk(uid, NodeSide(patience=self._patience), listener)
            self._hear(desk, listener, self._on_connect)
        return desk

    def _close(self, uid: str) -> None:
        desk = self._desks.pop(uid, None)
        if desk is None:
            return
        self._do(desk, desk.side.gone())
        self._events.unregister(desk.listener)
        desk.listener.close()
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._directory, uid, VOLUME_SOCKET))
        while desk.peers:
            self._lost(desk, last=True)

    def _hear(self, desk: _Desk, what: _Readable, then: Callable[[_Desk], None]) -> None:
        """Call `then` whenever something can be read. What it raises is the end of that connection, and of
        nothing else."""

        def act() -> None:
            try:
                then(desk)
            except Exception:
                log.exception("Dataset %s", desk.uid)
                self._lost(desk)

        self._events.register(what, selectors.EVENT_READ, act)

    # ---- connections ---------------------------------------------------------------------------------

    def _on_connect(self, desk: _Desk) -> None:
        try:
            peer, _ = desk.listener.accept()
        except OSError:
            return
        peer.setblocking(False)
        if not handing.is_ours(peer) or len(desk.peers) >= _QUEUE:
            peer.close()
            return
        desk.peers.append(peer)
        if len(desk.peers) == 1:
            self._listen_to(desk)

    def _listen_to(self, desk: _Desk) -> None:
        """The oldest connection is the one that counts."""
        desk.hello_by = time.monotonic() + _HELLO
        self._hear(desk, desk.peers[0], self._on_message)

    def _on_message(self, desk: _Desk) -> None:
        try:
            heard = handing.receive(desk.peers[0])
            if heard is None:
                raise ConnectionResetError
        except BlockingIOError:
            return
        except OSError:
            self._lost(desk)
            return
        except Misspoken as error:
            log.error("the worker of Dataset %s: %s", desk.uid, error)
            self._lost(desk)
            return
        desk.hello_by = float("inf")
        message, descriptor = heard
        if descriptor >= 0 and not self._is_mount(descriptor):
            os.close(descriptor)
            log.error("the worker of Dataset %s gives what is no mount", desk.uid)
            self._lost(desk)
            return
        if descriptor >= 0 and desk.descriptor < 0 and _is_gone(descriptor):
            # It has not noticed yet. To have nothing is what it will say next.
            os.close(descriptor)
            self._lost(desk)
            return
        if message.say == "owes":
            if desk.owing is not None:
                desk.owing(message.owed)
                desk.owing = None
            return
        before = desk.side.peer
        actions = desk.side.heard(message, time.monotonic())
        if Act.ADOPT in actions:
            desk.descriptor = descriptor
        elif descriptor >= 0:
            os.close(descriptor)
        self._do(desk, actions)
        if desk.side.peer is not before:
            log.info("Dataset %s: %s", desk.uid, desk.side.peer.value)
        if desk.side.trouble and message.say == "unable":
            log.error("the worker of Dataset %s cannot serve its volume: %s", desk.uid, desk.side.trouble)

    def _lost(self, desk: _Desk, *, last: bool = False) -> None:
        """The connection that counts has ended."""
        if not desk.peers:
            return
        peer = desk.peers.popleft()
        with contextlib.suppress(KeyError):
            self._events.unregister(peer)
        peer.close()
        desk.hello_by = float("inf")
        if desk.owing is not None:
            desk.owing("")
            desk.owing = None
        if desk.side.held is not None and desk.side.peer in (Peer.BEGINS, Peer.SERVES):
            log.warning("the worker of Dataset %s has ended; its volume waits for the next one", desk.uid)
        self._do(desk, desk.side.lost(time.monotonic()))
        if desk.peers and not last:
            self._listen_to(desk)

    def _say(self, desk: _Desk, message: Message, descriptor: int | None = None) -> None:
        try:
            handing.send(desk.peers[0], message, descriptor)
        except (OSError, IndexError):
            self._lost(desk)

    # ---- mounts --------------------------------------------------------------------------------------

    def _do(self, desk: _Desk, actions: list[Do]) -> None:
        for action in actions:
            if isinstance(action, Say):
                self._say(desk, action.message, desk.descriptor if action.with_mount else None)
            elif action is Act.HANG_UP:
                log.error("the worker of Dataset %s says what it cannot", desk.uid)
                self._lost(desk)
            elif action is Act.RESEND:
                with contextlib.suppress(OSError):
                    connection.resend(desk.descriptor)
            elif action is Act.REFUSE:
                self._refuse(desk)
            elif action is Act.CEASE:
                self._cease(desk)
            elif action is Act.DROP:
                self._watch(desk, False)
                os.close(desk.descriptor)
                desk.descriptor = -1
        read = desk.side.refusing or desk.side.peer in (Peer.BEGINS, Peer.SERVES)
        self._watch(desk, desk.descriptor >= 0 and not read)

    def _watch(self, desk: _Desk, wanted: bool) -> None:
        """See when the mount is gone. Not while it is read: each request would wake us up, and who reads it
        is told."""
        if wanted and desk.gone is None:
            desk.gone = select.epoll()
            desk.gone.register(desk.descriptor, 0)
            self._hear(desk, desk.gone, self._on_gone)
        elif not wanted and desk.gone is not None:
            self._events.unregister(desk.gone)
            desk.gone.close()
            desk.gone = None

    def _on_gone(self, desk: _Desk) -> None:
        log.info("the volume of Dataset %s is not mounted any more", desk.uid)
        self._do(desk, desk.side.gone())

    def _refuse(self, desk: _Desk) -> None:
        assert desk.side.held is not None
        log.error(
            "no worker of Dataset %s has served its volume for %.0f s: what is asked of it is answered EIO "
            "until one does", desk.uid, self._patience,
        )  # fmt: skip
        desk.refusal = Refusal(desk.descriptor, desk.side.held.agreement)
        desk.refusal.begin()
        self._hear(desk, desk.descriptor, self._on_request)

    def _on_request(self, desk: _Desk) -> None:
        if desk.refusal is not None and not desk.refusal.answer():
            self._on_gone(desk)

    def _cease(self, desk: _Desk) -> None:
        if desk.refusal is not None:
            self._events.unregister(desk.descriptor)
            desk.refusal.end()
            desk.refusal = None


@dataclass(frozen=True)
class _Seen:
    """What others see of a Dataset."""

    held: bool = False
    connected: bool = False
    serves: bool = False
    trouble: str = ""

    @staticmethod
    def of(side: NodeSide) -> "_Seen":
        held = side.held is not None
        return _Seen(held, side.peer is not Peer.NONE, held and side.peer is Peer.SERVES, side.trouble)


def _is_gone(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))
