"""A worker's volume over a real socket: a node plugin that says what a test has it say, and no kernel."""

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datacache.config.settings import Settings
from datacache.errors import IndexBroken
from datacache.model import Dataset, MountPoint
from fuse import handing
from fuse.connection import Agreement
from fuse.handing import Held, Message
from fuse.volume import Volume
from tests.conftest import AnnouncedLogs
from tests.support.reading import until

AGREED = Agreement(
    minor=40, capabilities=1 << 40, passthrough=False, stateless=False, cached_directories=True
)
HELD = Held("one", AGREED)
LATER = Held("one", AGREED, 2, "i")
WAIT = 20.0


class Index:
    identity = "i"


class Worker:
    """What a volume asks of one."""

    def __init__(self) -> None:
        self.index, self.writing = Index(), None


class Serving:
    """Notes what is done to it."""

    def __init__(self, *_: object, life: int, gone: Callable[[], None], **more: Any) -> None:
        self.life, self.gone = life, gone
        self.did: list[str] = []
        MADE.append(self)

    def start(self) -> None:
        self.did.append("start")

    def leave(self) -> None:
        self.did.append("leave")

    def close(self) -> bool:
        self.did.append("close")
        return True


MADE: list[Serving] = []


class Plugin:
    """Listens, and says what it is told to."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.listener = handing.listen(path)
        self.listener.setblocking(True)
        self.listener.settimeout(WAIT)
        self.peer: socket.socket | None = None
        self.mount, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def accepts(self) -> Message:
        """Let the worker in; its first words."""
        self.peer, _ = self.listener.accept()
        return self.hears()

    def hears(self) -> Message:
        assert self.peer is not None
        assert select.select([self.peer], [], [], WAIT)[0], "it says nothing"
        heard = handing.receive(self.peer)
        assert heard is not None, "it has hung up"
        if heard[1] >= 0:
            os.close(heard[1])
        return heard[0]

    def says(self, say: str, *, held: Held | None = None, connection: str = "one") -> None:
        assert self.peer is not None
        message = Message(say, connection, held=held)
        handing.send(self.peer, message, self.mount.fileno() if held is not None else None)

    def hang_up(self) -> None:
        assert self.peer is not None
        self.peer.close()
        self.peer = None

    def close(self) -> None:
        for one in (self.peer, self.listener, self.mount, self.kernel):
            if one is not None:
                one.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "volume.sock")


@pytest.fixture
def plugin(path: str) -> Iterator[Plugin]:
    plugin = Plugin(path)
    yield plugin
    plugin.close()


def settings_of(tmp_path: Path) -> Settings:
    dataset = Dataset("pets", (MountPoint("file:///data"),))
    return Settings(dataset=dataset, state=str(tmp_path / "state"), runtime=str(tmp_path))


@pytest.fixture
def volume(path: str, tmp_path: Path) -> Iterator[Volume]:
    MADE.clear()
    settings = settings_of(tmp_path)
    with Volume(path, settings, is_mount=lambda descriptor: True, serving=Serving) as volume:  # type: ignore[arg-type]
        yield volume


def test_without_a_node_plugin_there_is_no_mount(volume: Volume, path: str) -> None:
    """It is known at once; a mount that comes later is served by the worker that is there."""
    begun = volume.begin()
    assert (begun.held, begun.resumed, begun.index, begun.passthrough) == (None, False, "", True)
    volume.serve(Worker())  # type: ignore[arg-type]
    plugin = Plugin(path)
    try:
        assert plugin.accepts() == Message("hello")
        plugin.says("nothing")
        plugin.says("take", held=HELD)
        assert plugin.hears() == Message("ready", "one", index="i")
        assert MADE[0].did == []
        plugin.says("go")
        assert plugin.hears() == Message("serving", "one")
        assert (MADE[0].life, MADE[0].did) == (0, ["start"])
        MADE[0].gone()
        assert plugin.hears() == Message("gone", "one")
        assert MADE[0].did == ["start", "close"]
        plugin.says("take", held=replace(HELD, connection="two"), connection="two")
        assert plugin.hears() == Message("ready", "two", index="i")
        plugin.says("owing")
        assert plugin.hears() == Message("owes")
    finally:
        plugin.close()


def test_a_worker_is_built_for_the_mount_that_there_is(plugin: Plugin, volume: Volume) -> None:
    """... which earlier ones have served: it goes on from their index."""
    answer: list[Any] = []
    asking = threading.Thread(target=lambda: answer.append(volume.begin()))
    asking.start()
    plugin.accepts()
    plugin.says("take", held=LATER)
    asking.join(WAIT)
    assert (answer[0].held, answer[0].resumed, answer[0].index) == (LATER, True, "i")
    volume.serve(Worker())  # type: ignore[arg-type]
    plugin.hears()
    plugin.says("go")
    plugin.hears()
    assert MADE[0].life == 2
    # The node plugin ends, and another comes: it is told.
    plugin.hang_up()
    hello = plugin.accepts()
    assert hello == Message("hello", held=replace(LATER, life=3), serving=True)


def test_it_begins_when_the_node_plugin_is_dead(plugin: Plugin, volume: Volume) -> None:
    """Who has said `ready` and hears nothing waits for nobody who is not there."""
    plugin_answers = threading.Thread(target=lambda: (plugin.accepts(), plugin.says("take", held=HELD)))
    plugin_answers.start()
    volume.begin()
    plugin_answers.join(WAIT)
    volume.serve(Worker())  # type: ignore[arg-type]
    assert plugin.hears().say == "ready"
    assert MADE[0].did == []
    plugin.listener.close()
    plugin.hang_up()
    until(lambda: MADE[0].did == ["start"])


def test_a_mount_of_earlier_workers_needs_another_worker(
    volume: Volume, path: str, logs: AnnouncedLogs
) -> None:
    """One that was begun without it does not know its names."""
    logs.expect("this one begins anew for it")
    volume.begin()
    volume.serve(Worker())  # type: ignore[arg-type]
    plugin = Plugin(path)
    try:
        plugin.accepts()
        assert not select.select([volume], [], [], 0)[0]
        plugin.says("take", held=LATER)
        assert select.select([volume], [], [], WAIT)[0]
        assert MADE == []
        volume.leave()
        assert not volume.left
        assert volume.begin().resumed
        assert not select.select([volume], [], [], 0)[0]
        volume.serve(Worker())  # type: ignore[arg-type]
        assert plugin.hears() == Message("ready", "one", index="i")
    finally:
        plugin.close()


def test_a_mount_that_cannot_be_served_is_refused_with_the_reason(
    plugin: Plugin, volume: Volume, logs: AnnouncedLogs
) -> None:
    """Whether no worker can be built for it, or the one that there is has other names."""
    logs.expect("cannot be served: the index is gone")
    logs.expect("another one than this mount was made with")
    plugin_answers = threading.Thread(target=lambda: (plugin.accepts(), plugin.says("take", held=LATER)))
    plugin_answers.start()
    volume.begin()
    plugin_answers.join(WAIT)
    volume.refuse(IndexBroken("the index is gone"))
    assert plugin.hears() == Message("unable", "one", why="the index is gone")
    volume.serve(Worker())  # type: ignore[arg-type]
    plugin.says("take", held=LATER)
    assert plugin.hears().say == "unable"
    plugin.says("take", held=replace(HELD, connection="two", index="another"), connection="two")
    assert plugin.hears().why == "the index is another one than this mount was made with"
    assert MADE == []


def test_a_mount_that_goes_before_it_is_served_is_let_go(plugin: Plugin, volume: Volume) -> None:
    """The kernel says so: the stage was given up."""
    plugin_answers = threading.Thread(target=lambda: (plugin.accepts(), plugin.says("take", held=HELD)))
    plugin_answers.start()
    volume.begin()
    plugin_answers.join(WAIT)
    volume.serve(Worker())  # type: ignore[arg-type]
    assert plugin.hears().say == "ready"
    plugin.kernel.close()
    assert plugin.hears() == Message("gone", "one")
    assert MADE[0].did == ["close"]


@pytest.mark.parametrize("packet", [b"x", b'{"version": 9, "say": "take"}', handing.dump(Message("hello"))])
def test_a_node_plugin_that_makes_no_sense_is_hung_up_on(
    plugin: Plugin, volume: Volume, packet: bytes, logs: AnnouncedLogs
) -> None:
    """And tried again: what is served goes on."""
    logs.expect("the node plugin at")
    plugin_answers = threading.Thread(target=lambda: (plugin.accepts(), plugin.says("nothing")))
    plugin_answers.start()
    volume.begin()
    plugin_answers.join(WAIT)
    volume.serve(Worker())  # type: ignore[arg-type]
    assert plugin.peer is not None
    plugin.peer.send(packet)
    plugin.peer.settimeout(WAIT)
    assert plugin.peer.recv(100) == b""
    plugin.peer.close()
    assert plugin.accepts() == Message("hello")


def test_a_mount_that_is_left_is_not_let_go_before_the_process(
    path: str, tmp_path: Path, plugin: Plugin
) -> None:
    """The node plugin takes the end of the connection for that of all who could read."""
    MADE.clear()
    settings = settings_of(tmp_path)
    with Volume(path, settings, is_mount=lambda descriptor: True, serving=Serving) as volume:  # type: ignore[arg-type]
        plugin_answers = threading.Thread(target=lambda: (plugin.accepts(), plugin.says("take", held=HELD)))
        plugin_answers.start()
        volume.begin()
        plugin_answers.join(WAIT)
        volume.serve(Worker())  # type: ignore[arg-type]
        plugin.hears()
        plugin.says("go")
        plugin.hears()
        volume.leave()
        assert MADE[0].did == ["start", "leave"]
        assert volume.left
        kept = volume._peer
        descriptor = volume._descriptor
        assert kept is not None
        number = kept.fileno()
    assert not select.select([plugin.peer], [], [], 0.1)[0]
    os.close(number)
    os.close(descriptor)
