"""What holders of a mount say to each other: as packets, with a descriptor beside them, and what is no such
thing."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.errors import MountError
from fuse import handing
from fuse.connection import Agreement
from fuse.handing import Held, Message, Misspoken

AGREED = Agreement(minor=40, capabilities=1 << 40, passthrough=True, stateless=False, cached_directories=True)
HELD = Held("abc", AGREED, 3, "index")
TAKE = Message("take", "abc", held=HELD)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize(
    "message",
    [
        TAKE, Message("hello"), Message("hello", held=HELD, serving=True),
        Message("ready", "abc", index="i"), Message("unable", "abc", why="é" * 1000),
        Message("owes", owed="3 files"),
    ],
)  # fmt: skip
def test_what_is_said_arrives(message: Message) -> None:
    """In one packet, with room to spare."""
    packet = handing.dump(message)
    assert handing.load(packet) == message
    assert len(packet) < handing.MAX


def test_a_descriptor_arrives_beside_it(ends: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    """As one of the receiver's own, which programs that it starts do not get."""
    ours, theirs = ends
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with path.open("rb") as file:
        handing.send(ours, TAKE, file.fileno())
        handing.send(ours, Message("hello"))
    heard = handing.receive(theirs)
    assert heard is not None
    message, descriptor = heard
    assert message == TAKE
    assert os.pread(descriptor, 100, 0) == b"content"
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    assert handing.receive(theirs) == (Message("hello"), -1)
    with pytest.raises(BlockingIOError):
        handing.receive(theirs)
    ours.close()
    assert handing.receive(theirs) is None


def said(**changes: Any) -> bytes:
    return json.dumps(json.loads(handing.dump(TAKE)) | changes).encode()


def held(**changes: Any) -> dict[str, Any]:
    return asdict(HELD) | changes


def agreed(**changes: Any) -> dict[str, Any]:
    return held(agreement=asdict(AGREED) | changes)


@pytest.mark.parametrize(
    "packet",
    [
        b"x", b"\xff", b"[]", b"{}", b"1", b"[" * 5000, said(version=2), said(version=None),
        said(say="nonsense"),
        said(say=3), said(more=1), said(serving=1), said(why=[]), said(index="i" * 2000), said(held=3),
        said(held={}), said(held=held(life=-1)), said(held=held(life="1")), said(held=held(life=True)),
        said(held=held(life=1 << 64)), said(held=held(connection="")), said(held=held(connection=1)),
        said(held=held(agreement=None)), said(held=agreed(room=1 << 40)), said(held=agreed(passthrough=1)),
        said(held=agreed(minor=1.5)), said(held=agreed(more=1)),
    ],
)  # fmt: skip
def test_what_cannot_be_is_not_believed(packet: bytes) -> None:
    """One error, for whatever it is."""
    with pytest.raises(Misspoken):
        handing.load(packet)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: (
    st.lists(inner) | st.dictionaries(st.sampled_from([*asdict(TAKE), "version", "x"]), inner)
)))  # fmt: skip
def test_nothing_that_is_json_crashes_it(value: Any) -> None:
    """It is a message, or it is refused."""
    with contextlib.suppress(Misspoken):
        handing.load(json.dumps(value).encode())


def test_descriptors_that_do_not_fit_are_closed(ends: tuple[socket.socket, socket.socket]) -> None:
    """Too many, none where one is announced, one that is not."""
    ours, theirs = ends
    before = set(os.listdir("/proc/self/fd"))
    read, write = os.pipe()
    for packet, descriptors in (
        (handing.dump(TAKE), []),
        (handing.dump(TAKE), [read, write]),
        (handing.dump(Message("hello")), [read]),
        (b"x" * (handing.MAX + 1), [read]),
        (b"no JSON", [read]),
    ):
        socket.send_fds(ours, [packet], descriptors)
        with pytest.raises(Misspoken):
            handing.receive(theirs)
    os.close(read)
    os.close(write)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_socket_is_its_owners_and_the_last_listener_has_it(tmp_path: Path) -> None:
    """However long its path is; what a process before has left is no obstacle."""
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    path = str(directory / "volume.sock")
    with pytest.raises(FileNotFoundError):
        handing.connect(path)
    handing.listen(path).close()
    with pytest.raises(ConnectionRefusedError):
        handing.connect(path)
    with handing.listen(path) as listener:
        assert os.stat(path).st_mode & 0o777 == 0o600
        with handing.connect(path) as client:
            peer, _ = listener.accept()
            with peer:
                assert handing.is_ours(peer)
                handing.send(client, Message("hello"))
                assert handing.receive(peer) == (Message("hello"), -1)
    with pytest.raises(MountError, match="cannot be listened on"):
        handing.listen(str(tmp_path / "nowhere" / "volume.sock"))


def test_only_the_device_is_a_mount(tmp_path: Path) -> None:
    """Nobody has us answer for a file."""
    with (tmp_path / "file").open("wb") as file:
        assert not handing.is_mount(file.fileno())
    with open("/dev/null", "rb") as null:
        assert not handing.is_mount(null.fileno())
    if os.path.exists("/dev/fuse") and os.access("/dev/fuse", os.R_OK | os.W_OK):
        with open("/dev/fuse", "r+b", buffering=0) as device:
            assert handing.is_mount(device.fileno())
