"""The node plugin's hold on mounts, over real sockets: a worker that says what a test has it say, and a
socket in the place of the kernel."""

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi.mounter.holders import Holders
from datacache.errors import MountError
from datacache.kube.release import VOLUME_SOCKET
from fuse import handing, protocol
from fuse.connection import Agreement
from fuse.handing import Held, Message
from tests.conftest import AnnouncedLogs
from tests.support.reading import until

AGREED = Agreement(minor=40, capabilities=1 << 40, passthrough=True, stateless=False, cached_directories=True)
UID = "0f2a7c1e"
WAIT = 20.0


class Kernel:
    """A mount: the kernel's end, and the descriptor that its holders have."""

    def __init__(self) -> None:
        self.end, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.end.settimeout(WAIT)

    def descriptor(self) -> int:
        return os.dup(self._theirs.fileno())

    def heard(self) -> object:
        """What a holder has written: a notification, or an errno."""
        reply = protocol.decode_reply(self.end.recv(4096))
        return reply.error if reply.unique else protocol.decode_notification(reply)

    def ask(self, unique: int) -> None:
        self.end.send(protocol.encode_request(protocol.Opcode.STATFS, protocol.EmptyIn(), unique=unique))

    def close(self) -> None:
        self.end.close()
        self._theirs.close()

    def is_held(self) -> bool:
        """Whether anybody beside us has the descriptor."""
        self._theirs.close()
        poll = select.poll()
        poll.register(self.end, 0)
        return not poll.poll(100)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


@contextmanager
def holding(tmp_path: Path, *, patience: float = 1000.0) -> Iterator[Holders]:
    with Holders(str(tmp_path / "run"), patience=patience, is_mount=is_socket) as holders:
        holders.listen(UID)
        yield holders


def is_socket(descriptor: int) -> bool:
    return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")


class Peer:
    """A worker, as far as the socket shows it."""

    def __init__(self, tmp_path: Path) -> None:
        self.socket = handing.connect(str(tmp_path / "run" / UID / VOLUME_SOCKET))

    def says(self, message: Message, descriptor: int | None = None) -> None:
        handing.send(self.socket, message, descriptor)

    def hears(self) -> tuple[str, int]:
        """The next message, and its descriptor."""
        assert select.select([self.socket], [], [], WAIT)[0], "it hears nothing"
        heard = handing.receive(self.socket)
        return ("", -1) if heard is None else (heard[0].say, heard[1])

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[[], Peer]]:
    made: list[Peer] = []

    def connect() -> Peer:
        made.append(Peer(tmp_path))
        return made[-1]

    yield connect
    for peer in made:
        peer.close()


Connect = Callable[[], Peer]
HELD = Held("one", AGREED)


def serves(peer: Peer) -> int:
    """Take the mount, and serve it; the descriptor."""
    peer.says(Message("hello"))
    say, descriptor = peer.hears()
    assert say == "take"
    peer.says(Message("ready", "one", index="i"))
    assert peer.hears() == ("go", -1)
    peer.says(Message("serving", "one"))
    return descriptor


def test_a_worker_takes_the_mount_and_serves(tmp_path: Path, kernel: Kernel, worker: Connect) -> None:
    """... whoever is there first; who waits for it hears of it."""
    with holding(tmp_path) as holders:
        assert not holders.serves(UID, within=0)
        holders.hold(UID, HELD, kernel.descriptor())
        assert holders.holds(UID)
        peer = worker()
        waiting = threading.Thread(target=lambda: holders.serves(UID, within=WAIT))
        waiting.start()
        os.close(serves(peer))
        waiting.join(WAIT)
        assert holders.serves(UID, within=0)
        holders.forget(UID)
        assert not holders.holds(UID)
        assert peer.hears() == ("", -1)
        assert not (tmp_path / "run" / UID / VOLUME_SOCKET).exists()
        assert not kernel.is_held()


def test_the_end_of_a_worker_has_all_sent_again_and_then_eio(
    tmp_path: Path, kernel: Kernel, worker: Connect, logs: AnnouncedLogs
) -> None:
    """At once, so that who waits can be killed; EIO after the patience; nothing more when the next one
    reads."""
    logs.expect("has ended; its volume waits")
    logs.expect("answered EIO until one does")
    with holding(tmp_path, patience=1.5) as holders:
        peer = worker()
        peer.says(Message("hello"))
        assert peer.hears() == ("nothing", -1)
        holders.hold(UID, HELD, kernel.descriptor())
        say, descriptor = peer.hears()
        assert say == "take"
        peer.says(Message("ready", "one", index="i"))
        assert peer.hears()[0] == "go"
        peer.says(Message("serving", "one"))
        assert holders.serves(UID, within=WAIT)
        os.close(descriptor)
        peer.close()
        assert kernel.heard() == protocol.Resend()
        assert kernel.heard() == protocol.Resend()  # after the patience, as it begins to refuse
        for unique in (2, 4):
            kernel.ask(unique)
            assert kernel.heard() == 5  # EIO
        descriptor = serves(worker())
        assert holders.serves(UID, within=WAIT)
        assert os.get_blocking(descriptor)
        kernel.ask(6)
        poll = select.poll()
        poll.register(kernel.end, select.POLLIN)
        assert not poll.poll(100), "it is the worker's to answer"
        os.close(descriptor)


def test_a_mount_comes_back_from_the_worker(tmp_path: Path, kernel: Kernel, worker: Connect) -> None:
    """After the end of a driver the next one gets it; the worker goes on meanwhile."""
    with holding(tmp_path) as holders:
        holders.hold(UID, HELD, kernel.descriptor())
        descriptor = serves(worker())
        assert holders.serves(UID, within=WAIT)
    with holding(tmp_path) as holders:
        assert not holders.holds(UID)
        peer = worker()
        peer.says(Message("hello", held=Held("one", AGREED, 1, "i"), serving=True), descriptor)
        os.close(descriptor)
        assert peer.hears() == ("keep", -1)
        assert holders.serves(UID, within=WAIT)
        assert kernel.is_held()


def test_a_mount_that_is_gone_is_let_go(tmp_path: Path, kernel: Kernel, worker: Connect) -> None:
    """The kernel says so, while nobody reads it; else the worker does. Another can be held then."""
    with holding(tmp_path) as holders:
        holders.hold(UID, HELD, kernel.descriptor())
        with pytest.raises(MountError, match="there is a mount of Dataset"):
            holders.hold(UID, HELD, kernel.descriptor())
        kernel.close()
        until(lambda: not holders.holds(UID))
        for name in ("two", "three"):
            another = Kernel()
            holders.hold(UID, Held(name, AGREED), another.descriptor())
            if name == "two":
                peer = worker()
                peer.says(Message("hello"))
            assert peer.hears()[0] == "take"
            another.close()
            until(lambda: not holders.holds(UID))
            peer.says(Message("gone", name))


def test_a_worker_that_cannot_serve_says_why(
    tmp_path: Path, kernel: Kernel, worker: Connect, logs: AnnouncedLogs
) -> None:
    """And whoever waits is told at once."""
    logs.expect("cannot serve its volume: the index is gone")
    with holding(tmp_path) as holders:
        holders.hold(UID, HELD, kernel.descriptor())
        peer = worker()
        peer.says(Message("hello"))
        os.close(peer.hears()[1])
        peer.says(Message("unable", "one", why="the index is gone"))
        with pytest.raises(MountError, match="the index is gone"):
            holders.serves(UID, within=WAIT)


def test_the_next_worker_waits_for_the_end_of_the_one_before(
    tmp_path: Path, kernel: Kernel, worker: Connect, logs: AnnouncedLogs
) -> None:
    """Two are never handed the mount; more than a few are not let in."""
    logs.expect("has ended; its volume waits")
    with holding(tmp_path) as holders:
        holders.hold(UID, HELD, kernel.descriptor())
        first = worker()
        os.close(serves(first))
        second = worker()
        second.says(Message("hello"))
        for _ in range(2):
            worker()
        assert worker().hears() == ("", -1)
        assert not select.select([second.socket], [], [], 0.1)[0]
        first.close()
        say, descriptor = second.hears()
        assert say == "take"
        os.close(descriptor)


def test_who_says_nonsense_is_hung_up_on(
    tmp_path: Path, kernel: Kernel, worker: Connect, logs: AnnouncedLogs
) -> None:
    """Nothing comes of it: the next one is served."""
    for part in ("says what is no JSON", "another version", "what is no mount", "says what it cannot"):
        logs.expect(part)
    with holding(tmp_path) as holders:
        holders.hold(UID, HELD, kernel.descriptor())
        for packet in (b"x", b'{"version": 2, "say": "hello"}', handing.dump(Message("serving", "one"))):
            peer = worker()
            peer.socket.send(packet)
            assert peer.hears() == ("", -1)
        with open("/dev/null", "rb") as null:
            peer = worker()
            peer.says(Message("hello", held=HELD, serving=True), null.fileno())
            assert peer.hears() == ("", -1)
        os.close(serves(worker()))
        assert holders.serves(UID, within=WAIT)


def test_what_is_owed_is_asked(tmp_path: Path, kernel: Kernel, worker: Connect, logs: AnnouncedLogs) -> None:
    """Of the worker that is there; nothing, where there is none, and where it ends without a word."""
    logs.expect("has ended; its volume waits")
    with holding(tmp_path) as holders:
        assert holders.owed(UID) == ""
        assert holders.owed("another") == ""
        holders.hold(UID, HELD, kernel.descriptor())
        peer = worker()
        os.close(serves(peer))
        answers: list[str] = []
        for answer in ("3 files", ""):
            asking = threading.Thread(target=lambda: answers.append(holders.owed(UID)))
            asking.start()
            assert peer.hears() == ("owing", -1)
            if answer:
                peer.says(Message("owes", owed=answer))
            else:
                peer.close()
            asking.join(WAIT)
        assert answers == ["3 files", ""]


def test_at_the_end_it_waits_for_workers_that_are_about_to_come(
    tmp_path: Path, kernel: Kernel, worker: Connect
) -> None:
    """What nobody else has would end with it."""
    with holding(tmp_path) as holders:
        assert holders.linger(0)
        holders.hold(UID, HELD, kernel.descriptor())
        assert not holders.linger(0.1)
        descriptor = serves(worker())
        assert holders.linger(WAIT)
    os.close(descriptor)
