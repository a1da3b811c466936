"""Over TCP anybody may come: who is let in, what is told to others, and what each can take up."""

import errno
import json
import logging
import os
import re
import select
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from datacache.cluster import api, listening, server
from datacache.cluster.client import ControlClient, RemoteClient
from datacache.cluster.credentials import Certificate, Tokens
from datacache.cluster.server import ControlServer
from datacache.config.settings import ApiSettings
from datacache.errors import ControlError, SettingError
from datacache.reading.job import LoadRequest
from datacache.worker import Worker
from tests.conftest import AnnouncedLogs
from tests.contract.test_control import TOKEN, certificates, fill, settings_of, token_file
from tests.support.asking import Asker
from tests.support.reading import until

OTHER = "f" * 64
"""Another token."""
REMOTE = [(call.method, call.path) for call in api.CALLS if call.remote and not call.open]
OURS = [(call.method, call.path) for call in api.CALLS if not call.remote]
SOON = 0.2
"""Seconds of a deadline that is to pass in a test."""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    fill(tmp_path / "bucket")
    with Worker(settings_of(tmp_path)) as worker:
        yield worker


@pytest.fixture
def port(worker: Worker, tmp_path: Path) -> Iterator[int]:
    """Of a server that wants a token."""
    with ControlServer(
        worker, worker.socket, remote=ApiSettings("127.0.0.1:0", token_file(tmp_path))
    ) as serving:
        yield serving.port


def hung_up(connection: socket.socket) -> bool:
    """Whether the server ends the connection, once all that it says was read."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


# ---- who is let in -------------------------------------------------------------------------------

NO_TOKENS = [
    b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"Basic " + TOKEN.encode(), TOKEN.encode(),
    b"Bearer " + TOKEN.encode() + b"0", b"Bearer " + TOKEN.encode()[:-1], b"Bearer " + OTHER.encode(),
    b"Bearer \xff\xfe\xc3\x28" + TOKEN.encode()[4:], "Bearer é".encode(), b"Bearer " + b"x" * 5000,
    b"Bearer " + TOKEN.encode() + b", Bearer " + TOKEN.encode(), b"Bearer " + TOKEN.upper().encode(),
]  # fmt: skip


@pytest.mark.parametrize("shown", [None, *NO_TOKENS], ids=lambda shown: repr(shown)[:30])
def test_who_shows_no_token_learns_nothing(shown: bytes | None, port: int) -> None:
    """Calls that are there, that are not, and that only the socket has: all the same 401, in JSON."""
    ask = Asker(("127.0.0.1", port))
    headers = () if shown is None else (("Authorization", shown),)
    said = set()
    for method, path in [*REMOTE, *OURS, ("GET", "/"), ("GET", "/v2"), ("DELETE", "/v1/status")]:
        answer = ask(method, path, {} if method == "POST" else None, headers=headers)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), path
        said.add(answer.body)
    assert said == {
        b'{"error": "a token that is accepted here is needed", "kind": "ControlError", "fields": {}}'
    }
    for path in ("/healthz", "/readyz"):
        assert ask("GET", path, headers=headers).body == b"ok\n"


def test_the_token_lets_in(port: int) -> None:
    """The scheme is spelled in any case. Two of them are none: who would say which one counts?"""
    ask = Asker(("127.0.0.1", port))
    for scheme in (b"Bearer ", b"bearer ", b"BEARER  "):
        shown = ("Authorization", scheme + TOKEN.encode())
        assert ask("GET", "/v1/status", headers=(shown,)).status == 200
    assert ask("GET", "/v1/status", headers=(shown, shown)).status in (400, 401)


def test_what_only_the_socket_has_is_not_there(port: int, worker: Worker) -> None:
    """Eviction, pins, names: 404 with the token, and nothing has happened."""
    ask = Asker(("127.0.0.1", port), token=TOKEN)
    worker.loads.wait(worker.load(LoadRequest()), 30)
    for method, path in OURS:
        answer = ask(method, path, {"path": "/", "pinned": True})
        assert (answer.status, json.loads(answer.body)["kind"]) == (404, "ControlError"), path
    assert worker.stat("/a.bin").cached
    wrong = ask("GET", "/v1/loads")
    assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")


def test_loopback_needs_no_token(worker: Worker) -> None:
    """Without a token file, which only loopback can be without, whoever connects may ask."""
    with ControlServer(worker, worker.socket, remote=ApiSettings("127.0.0.1:0")) as serving:
        client = RemoteClient(f"http://127.0.0.1:{serving.port}/")
        assert client.status()["dataset"] == worker.settings.dataset.name
        refused = RemoteClient(f"http://127.0.0.1:{serving.port}", token="any")
        assert refused.ready() == ""


def test_what_a_client_says_of_a_worker_that_refuses(port: int) -> None:
    """One line, and never the token."""
    client = RemoteClient(f"http://127.0.0.1:{port}", token=OTHER)
    with pytest.raises(ControlError, match="a token that is accepted here is needed") as caught:
        client.status()
    assert OTHER not in repr(client) + str(caught.value)
    gone = RemoteClient(f"https://127.0.0.1:{port}", token=OTHER, timeout=5)
    with pytest.raises(ControlError, match=r"the worker at https://127\.0\.0\.1:\d+ does not answer"):
        gone.status()
    for url in ("127.0.0.1:80", "http://127.0.0.1", "ftp://a:1", "http://a:1/x", "http://a:b"):
        with pytest.raises(SettingError, match="HOST:PORT"):
            RemoteClient(url)
    with pytest.raises(SettingError, match="certificates in PEM"):
        RemoteClient("https://a:1", ca="/nowhere.crt")


# ---- secrets -------------------------------------------------------------------------------------


def test_the_token_is_in_nothing_that_we_say(
    port: int, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in the status, the metrics, an error, a log at its most talkative."""
    caplog.set_level(logging.DEBUG)
    ask = Asker(("127.0.0.1", port), token=TOKEN)
    said = b"".join(ask("GET", path).body for path in ("/v1/status", "/metrics", "/v1/nothing"))
    said += ask("POST", "/v1/loads/status", {"job": "x"}).body + ask("POST", "/v1/loads", b"{").body
    assert TOKEN.encode() not in said
    assert TOKEN not in caplog.text + repr(worker) + json.dumps(ControlClient(worker.socket).status())


BAD_FILES = {
    "short": (b"x" * 31, 0o600, "32 to 1024 printable"),
    "long": (b"x" * 1025, 0o600, "32 to 1024 printable"),
    "with a space": (b"x" * 20 + b" " + b"y" * 20, 0o600, "printable ASCII characters without spaces"),
    "no text": (b"\xc3\xa9" * 20, 0o600, "printable ASCII"),
    "empty": (b"\n \n", 0o600, "1 to 8 tokens"),
    "many": (b"\n".join([b"x" * 32] * 9), 0o600, "1 to 8 tokens"),
    "endless": (b"x" * 100_000, 0o600, "at most"),
    "readable": (TOKEN.encode(), 0o644, "mode is 0644; 0600 or 0640 will do"),
    "writable": (TOKEN.encode(), 0o602, "others cannot use"),
}


@pytest.mark.parametrize("which", BAD_FILES)
def test_a_token_file_that_will_not_do(which: str, worker: Worker, tmp_path: Path) -> None:
    """One line that names the file and not what is in it; nothing listens, nothing is left."""
    content, mode, expected = BAD_FILES[which]
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    serving = ControlServer(worker, worker.socket, remote=ApiSettings("127.0.0.1:0", str(path)))
    with pytest.raises(SettingError, match=re.escape(expected)) as caught:
        serving.start()
    assert caught.value.value == str(path)
    assert content[:10].decode("latin-1").strip("\n ") == "" or content[:10] not in str(caught.value).encode()
    assert not os.path.exists(worker.socket)
    serving.close()


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, os.mkfifo], ids=["none", "dir", "pipe"])
def test_a_token_file_that_is_none(make: object, tmp_path: Path) -> None:
    """Missing, a directory, a pipe that nobody writes to: refused, and not waited for."""
    path = tmp_path / "token"
    make(path)  # type: ignore[operator]
    with pytest.raises(SettingError, match="--token-file"):
        Tokens(str(path))


def test_several_tokens_for_a_rotation(tmp_path: Path) -> None:
    """Each line is accepted; what stands around it is not part of it."""
    tokens = Tokens(token_file(tmp_path, TOKEN + "\r", "", f"  {OTHER}"))
    assert tokens.admit(f"Bearer {TOKEN}")
    assert tokens.admit(f"Bearer {OTHER}")
    assert not tokens.admit(f"Bearer {TOKEN}\n{OTHER}")
    assert TOKEN not in repr(tokens)


def test_a_token_file_is_read_again(port: int, tmp_path: Path, logs: AnnouncedLogs) -> None:
    """Renamed into place, as the kubelet does: the next request is held to it. Gone, spoiled, or opened to
    all: nobody is let in, it is said once, and when it is right again so are they."""

    def status(token: str) -> int:
        return Asker(("127.0.0.1", port), token=token)("GET", "/v1/status").status

    file = tmp_path / "token"
    assert (status(TOKEN), status(OTHER)) == (200, 401)
    new = tmp_path / "new"
    new.write_text(OTHER)
    new.chmod(0o600)
    new.replace(file)
    assert (status(TOKEN), status(OTHER)) == (401, 200)
    logs.expect("nobody is let in")
    for spoil in (file.unlink, lambda: file.write_text("short"), lambda: file.chmod(0o644)):
        spoil()
        said = len(logs.seen)
        assert (status(TOKEN), status(OTHER), status("short")) == (401, 401, 401)
        assert len(logs.seen) == said + 1
        token_file(tmp_path, OTHER)
        assert status(OTHER) == 200
    assert not [message for message in logs.messages() if OTHER in message or "short'" in message]


# ---- TLS -----------------------------------------------------------------------------------------


def subject(port: int, authority: str, name: str) -> str:
    """The name in the certificate that a client without SNI is shown."""
    context = ssl.create_default_context(cafile=authority)
    context.check_hostname = False
    with socket.create_connection(("127.0.0.1", port), 30) as plain, context.wrap_socket(plain) as shown:
        found = shown.getpeercert()
        assert found is not None
        return str(dict(found["subjectAltName"])["DNS"])  # type: ignore[arg-type]


def test_a_certificate_is_read_again(worker: Worker, tmp_path: Path, logs: AnnouncedLogs) -> None:
    """The next connection is shown the new one. One whose key is another's, or is gone, changes nothing but
    the log; a client that wants another name, or knows no such authority, sends no token."""
    authority = certificates(tmp_path, "one.example")
    chosen = ApiSettings(
        "127.0.0.1:0", token_file(tmp_path), str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")
    )
    with ControlServer(worker, worker.socket, remote=chosen) as serving:
        assert subject(serving.port, authority, "one") == "one.example"
        authority = certificates(tmp_path, "two.example")
        assert subject(serving.port, authority, "two") == "two.example"
        logs.expect("the certificate before stays in use")
        (tmp_path / "tls.key").rename(tmp_path / "away")
        assert subject(serving.port, authority, "two") == "two.example"
        (tmp_path / "other").mkdir()
        certificates(tmp_path / "other", "three.example")
        (tmp_path / "other/tls.key").rename(tmp_path / "tls.key")
        assert subject(serving.port, authority, "two") == "two.example"
        assert len(logs.seen) == 2
        url = f"https://127.0.0.1:{serving.port}"
        for wrong in ({"ca": authority}, {"server_name": "two.example"}):
            with pytest.raises(ControlError, match="its certificate is not accepted"):
                RemoteClient(url, token=TOKEN, **wrong).status()
        assert RemoteClient(url, token=TOKEN, ca=authority, server_name="two.example").status()
        plain = RemoteClient(f"http://127.0.0.1:{serving.port}", token=TOKEN)
        with pytest.raises(ControlError, match="does not answer"):
            plain.status()
        assert RemoteClient(url, token=TOKEN, ca=authority, server_name="two.example").ready() == ""


def test_certificates_that_will_not_do(tmp_path: Path) -> None:
    """One line that says which file and why; a key that is asked for at a terminal is one of them."""
    certificates(tmp_path, "x.example")
    certificate, key = str(tmp_path / "tls.crt"), tmp_path / "tls.key"
    with pytest.raises(SettingError, match="a certificate in PEM"):
        Certificate(str(key), str(key))
    with pytest.raises(SettingError, match="No such file"):
        Certificate("/nowhere.crt", str(key))
    from cryptography.hazmat.primitives import serialization

    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"x"),
        )
    )
    with pytest.raises(SettingError, match="a certificate in PEM"):
        Certificate(certificate, str(key))
    key.chmod(0o644)
    with pytest.raises(SettingError, match="--tls-key"):
        Certificate(certificate, str(key))


def test_an_address_that_is_taken(worker: Worker) -> None:
    """It is said in one line, and what was begun is taken back."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        serving = ControlServer(worker, worker.socket, remote=ApiSettings(address))
        with pytest.raises(SettingError, match=r"--listen: .*in use"):
            serving.start()
    assert not os.path.exists(worker.socket)
    with pytest.raises(SettingError, match=r"--listen: .*an address to listen at"):
        ControlServer(worker, worker.socket, remote=ApiSettings("no.such.host.invalid:1")).start()


# ---- what each can take up -----------------------------------------------------------------------

GARBAGE = {
    "noise": b"\x00\xff\x13\x37" * 100 + b"\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "a line without an end": b"GET /" + b"x" * 100_000,
    "a header without an end": b"GET /v1/status HTTP/1.1\r\nX: " + b"x" * 100_000,
    "many headers": b"GET /v1/status HTTP/1.1\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
    "two lengths": b"POST /v1/loads HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "a length and chunks": b"POST /v1/loads HTTP/1.1\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a length that is none": b"POST /v1/loads HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "an old version": b"GET /healthz HTTP/0.9\r\n\r\n",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_what_is_no_request_ends(what: str, port: int, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused or hung up on, never let in, and the next one is answered. The log has nothing of it."""
    ask = Asker(("127.0.0.1", port))
    caplog.set_level(logging.INFO)
    with ask.connected() as connection:
        said = b""
        try:
            connection.sendall(GARBAGE[what])
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                said += piece
        except (ConnectionError, BrokenPipeError):
            pass
        assert b" 200 " not in said.partition(b"\r\n")[0] or what == "an old version"
    assert ask("GET", "/healthz").status == 200
    assert not caplog.records


def test_a_body_that_breaks_off(port: int, worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    """Chunks that are none are refused; of who is gone in the middle of its body nothing is said."""
    head = (
        b"POST /v1/loads HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        b"Authorization: Bearer " + TOKEN.encode() + b"\r\n\r\n"
    )
    with Asker(("127.0.0.1", port)).connected() as connection:
        connection.sendall(head + b"zz\r\n")
        assert connection.recv(12).endswith(b" 400")
    with Asker(("127.0.0.1", port)).connected() as connection:
        connection.sendall(head + b"5\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # hang up at once
    assert Asker(("127.0.0.1", port))("GET", "/readyz").status == 200
    assert worker.status()["loads"] == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"G",
        b"GET /v1/status HTTP/1.1\r\nHost: x\r\n",
        b"POST /v1/loads HTTP/1.1\r\nContent-Length: 9\r\n",
    ],
    ids=["nothing", "a byte", "half a head", "half a head of a post"],
)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_who_does_not_say_what_it_wants(
    said: bytes, tls: bool, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection without a whole head is ended in time; over TLS one without a handshake, too."""
    monkeypatch.setattr(server, "HEAD", SOON)
    certificates(tmp_path, "x.example")
    files = (str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")) if tls else ()
    chosen = ApiSettings("127.0.0.1:0", token_file(tmp_path), *files)
    with ControlServer(worker, worker.socket, remote=chosen) as serving:
        connection = Asker(("127.0.0.1", serving.port)).connected()
        with connection:
            connection.sendall(said)
            assert hung_up(connection)


def test_a_head_that_drips(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then buys no time."""
    monkeypatch.setattr(server, "HEAD", SOON)
    with ControlServer(
        worker, worker.socket, remote=ApiSettings("127.0.0.1:0", token_file(tmp_path))
    ) as serving:
        connection = Asker(("127.0.0.1", serving.port)).connected()
        with connection, pytest.raises(ConnectionError):
            connection.sendall(b"GET /v1/status HTTP/1.1\r\n")
            while not select.select([connection], [], [], SOON / 10)[0]:
                connection.sendall(b"X: y\r\n")
            assert connection.recv(1) == b""
            raise ConnectionResetError


def test_a_body_that_does_not_come(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is let in is told that it took too long; of who is not the body is not waited for at all."""
    monkeypatch.setattr(server, "BODY", SOON)
    with ControlServer(
        worker, worker.socket, remote=ApiSettings("127.0.0.1:0", token_file(tmp_path))
    ) as serving:
        for token, status in ((TOKEN, b"408"), (OTHER, b"401")):
            with Asker(("127.0.0.1", serving.port)).connected() as connection:
                connection.sendall(
                    b"POST /v1/loads HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
                    b"Authorization: Bearer " + token.encode() + b'\r\n\r\n{"path"'
                )
                assert connection.recv(12) == b"HTTP/1.1 " + status
                assert hung_up(connection)


def test_a_connection_has_a_lifetime(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks, and then reads nothing or goes on sending, is dropped all the same."""
    monkeypatch.setattr(server, "LIFETIME", SOON)
    with (
        ControlServer(
            worker, worker.socket, remote=ApiSettings("127.0.0.1:0", token_file(tmp_path))
        ) as serving,
        Asker(("127.0.0.1", serving.port)).connected() as connection,
    ):
        connection.sendall(
            b"POST /v1/loads HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Authorization: Bearer " + TOKEN.encode() + b"\r\n\r\n"
        )
        assert hung_up(connection)


def test_one_request_a_connection(port: int) -> None:
    """What holds for the first request of a connection cannot be got round by a second."""
    with Asker(("127.0.0.1", port)).connected() as connection:
        connection.sendall(
            b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        said = b""
        while piece := connection.recv(65536):
            said += piece
    assert said.count(b"HTTP/1.1 200") == 1
    assert b"Connection: close" in said


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_thousand_connections(tls: bool, worker: Worker, tmp_path: Path) -> None:
    """As many as there is room for are kept, the others are hung up on; when they are gone, the next one is
    answered, and the socket of the worker's user was answered all the time."""
    certificates(tmp_path, "x.example")
    files = (str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")) if tls else ()
    chosen = ApiSettings("127.0.0.1:0", token_file(tmp_path), *files)
    with ControlServer(worker, worker.socket, remote=chosen) as serving, ExitStack() as opened:
        address = ("127.0.0.1", serving.port)
        waiting = select.poll()
        sockets = {}
        for _ in range(1000):
            connection = opened.enter_context(Asker(address).connected())
            sockets[connection.fileno()] = connection
            waiting.register(connection, select.POLLIN)
        until(lambda: len(waiting.poll(0)) >= 1000 - server.CONNECTIONS)
        ended = waiting.poll(0)
        assert len(ended) == 1000 - server.CONNECTIONS
        assert all(hung_up(sockets[descriptor]) for descriptor, _ in ended)
        assert ControlClient(worker.socket).ready() == ""
        opened.close()
        context = ssl._create_unverified_context() if tls else None
        until(lambda: answered(Asker(address, tls=context)))


def answered(ask: Asker) -> bool:
    """Whether somebody who comes now is answered: not while there is no room."""
    try:
        return ask("GET", "/healthz").status == 200
    except (ConnectionError, ssl.SSLError):
        return False


def test_a_server_ends_whoever_is_connected(worker: Worker, tmp_path: Path) -> None:
    """Idle connections, half heads and handshakes under way hold up no close, and leave nothing."""
    certificates(tmp_path, "x.example")
    chosen = ApiSettings(
        "127.0.0.1:0", token_file(tmp_path), str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")
    )
    context = ssl._create_unverified_context()
    with ExitStack() as opened:
        with ControlServer(worker, worker.socket, remote=chosen) as serving:
            address = ("127.0.0.1", serving.port)
            handshakes = [opened.enter_context(Asker(address).connected()) for _ in range(5)]
            idle = [opened.enter_context(Asker(address, tls=context).connected()) for _ in range(5)]
            ours = [opened.enter_context(Asker(worker.socket).connected()) for _ in range(5)]
            for connection in (*idle, *ours):
                connection.sendall(b"GET /healthz HTTP/1.1\r\n")
            until(lambda: ControlClient(worker.socket).ready() == "")
        assert all(hung_up(connection) for connection in (*handshakes, *idle, *ours))


def test_nothing_can_be_accepted_for_a_while(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, logs: AnnouncedLogs
) -> None:
    """A process without descriptors says so and goes on later: it neither spins nor falls silent for good."""
    tries: list[int] = []

    class Tired(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            tries.append(1)
            if len(tries) == 1:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    async def tired(host: str, port: int) -> list[socket.socket]:
        made = Tired(socket.AF_INET, socket.SOCK_STREAM)
        made.bind((host, port))
        listening.listen(made)
        return [made]

    logs.expect("no connection can be accepted (Too many open files)")
    monkeypatch.setattr(server, "bound", tired)
    monkeypatch.setattr(listening, "_PAUSE", SOON)
    with ControlServer(worker, worker.socket, remote=ApiSettings("127.0.0.1:0")) as serving:
        assert Asker(("127.0.0.1", serving.port))("GET", "/healthz").status == 200
    assert len(tries) == 2
    assert len(logs.seen) == 1
