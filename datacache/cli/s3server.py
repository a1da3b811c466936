"""
A real S3 server on loopback for the demo and the tests: versitygw where it is found, moto elsewhere.

versitygw keeps objects as plain files of a directory and checks signatures; moto is pure Python, slow,
and checks none, but can be installed anywhere.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import unquote

from datacache.errors import DatacacheError

ENDING = (signal.SIGINT, signal.SIGTERM)
"""Signals by which people and service managers end a command."""


@dataclass(frozen=True)
class S3Server:
    """A running server and what a client needs to talk to it."""

    kind: str
    """`versitygw` or `moto`."""
    endpoint: str
    environment: Mapping[str, str]
    """Credentials and region, as the AWS variables."""
    asked: Callable[[], Counter[str]]
    """How often each "/bucket/key" was asked for so far (GET or HEAD), by the server's own log."""


def find_versitygw() -> str | None:
    """The versitygw binary: of `make s3-server` ($DATACACHE_TOOLS), of PATH, or of `go install`."""
    places = [os.environ.get("DATACACHE_TOOLS", ""), str(Path.home() / "go/bin")]
    found = [f"{place}/versitygw" for place in places if place and os.access(f"{place}/versitygw", os.X_OK)]
    return found[0] if found else shutil.which("versitygw")


@contextlib.contextmanager
def versitygw(binary: str, *, versioning: bool = False) -> Iterator[S3Server]:
    """versitygw on a free loopback port, over a temporary directory, until the block is left."""
    access, secret = secrets.token_hex(10), secrets.token_hex(20)
    with tempfile.TemporaryDirectory(prefix="datacache-s3-") as root:
        objects, versions, log = Path(root, "objects"), Path(root, "versions"), Path(root, "log")
        objects.mkdir()
        versions.mkdir()
        port = _free_port()
        command = [
            binary,
            "--quiet",
            "--keep-alive",
            "--access-log",
            str(log),
            "--port",
            f"127.0.0.1:{port}",
            "posix",
        ]
        command += ["--versioning-dir", str(versions)] if versioning else []
        process = None
        try:
            with uninterrupted():
                process = subprocess.Popen(
                    [*command, str(objects)],
                    env={"PATH": os.defpath, "ROOT_ACCESS_KEY": access, "ROOT_SECRET_KEY": secret},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C is for us: readers would wait for a store that died
                )
            _wait_listening(port, process)
            yield S3Server(
                kind="versitygw",
                endpoint=f"http://127.0.0.1:{port}",
                environment=_variables(access, secret),
                asked=lambda: _read_log(log),
            )
        finally:
            if process is not None:
                end(process, patience=10)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that end us come when the block is left: nobody would know of a process that is being made.

    They are caught, not blocked: a child would inherit that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, remember) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def end(process: "subprocess.Popen[Any]", *, patience: float) -> None:
    """Let `process` end by itself, or else kill it after `patience` seconds."""
    process.terminate()
    try:
        process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def moto() -> Iterator[S3Server]:
    """moto's server in this process, until the block is left."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise DatacacheError(
            "no S3 server for the demo: neither versitygw nor moto is here; "
            "`make s3-server` builds the one, `pip install 'dataset-cache[demo]'` brings the other"
        ) from error
    counter = _RequestCounter()
    logging.getLogger("werkzeug").addHandler(counter)
    logging.getLogger("werkzeug").setLevel(logging.INFO)
    logging.getLogger("werkzeug").propagate = False
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(
            kind="moto",
            endpoint=f"http://{host}:{port}",
            environment=_variables("moto-access-key", "moto-secret-key"),
            asked=lambda: Counter(counter.asked),
        )
    finally:
        server.stop()
        logging.getLogger("werkzeug").removeHandler(counter)


class _RequestCounter(logging.Handler):
    """Counts what moto's HTTP server logs: '... "GET /bucket/key HTTP/1.1" 206 -'."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage().split('"')[1:2]
        match words[0].split() if words else []:
            case ["GET" | "HEAD", path, *_]:
                self.asked[unquote(path.split("?")[0])] += 1


def _read_log(log: Path) -> Counter[str]:
    """'... s3_GetObject key /bucket/key 206 ...' of versitygw's access log, counted by path."""
    asked: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        for operation in (" s3_GetObject ", " s3_HeadObject "):
            if operation in line:
                asked[unquote(line.split(operation)[1].split(" ")[1].split("?")[0])] += 1
    return asked


def _variables(access: str, secret: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_listening(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise DatacacheError(f"versitygw did not start (exit status {process.poll()})")
