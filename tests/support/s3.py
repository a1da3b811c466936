"""
S3 servers for tests: moto, which is always there, and versitygw, where its binary is.

moto knows all of the semantics (versions, archive classes, odd keys) and is slow; versitygw is a
real server, checks signatures, and keeps objects as files. Both listen on loopback, on a port that
the system chose.
"""

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

ACCESS_KEY, SECRET_KEY = "TESTACCESSKEY", "test-secret-key-0123456789"


@dataclass(frozen=True)
class S3Server:
    """A running server. `environment` is what a source needs to reach it."""

    endpoint: str
    environment: Mapping[str, str] = field(
        default_factory=lambda: {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
    )

    @cached_property
    def client(self) -> Any:
        """A botocore client of the server, for what a test prepares."""
        session = botocore.session.Session()
        return session.create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def make_bucket(self, name: str, *, versioned: bool = False) -> str:
        """Make the bucket `name` and return its URI."""
        self.client.create_bucket(Bucket=name)
        if versioned:
            self.client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return f"s3://{name}"

    def put(self, bucket: str, key: str, data: bytes, **more: Any) -> str:
        """Put an object and return its entity tag."""
        return str(self.client.put_object(Bucket=bucket, Key=key, Body=data, **more)["ETag"])

    def put_fast(self, bucket: str, key: str, data: bytes) -> None:
        """Put an object. Overridden where there is a way that is faster than asking the server."""
        self.put(bucket, key, data)

    def delete(self, bucket: str, key: str) -> None:
        """Delete an object."""
        self.client.delete_object(Bucket=bucket, Key=key)


class MotoServer(S3Server):
    """moto: its state is in this process, too."""

    def put_fast(self, bucket: str, key: str, data: bytes) -> None:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, key, data)


@contextlib.contextmanager
def moto_server() -> Iterator[S3Server]:
    """moto in this process, without any bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        running = MotoServer(f"http://{host}:{port}")
        reset_moto(running)
        yield running
        running.client.close()
    finally:
        server.stop()


def reset_moto(server: S3Server) -> None:
    """Forget all buckets. moto's state belongs to the process and outlives the server."""
    host, port = server.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as link:
        link.sendall(b"POST /moto-api/reset HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        while link.recv(4096):
            pass


def find_tool(name: str) -> str | None:
    """The program `name`: on PATH, in $DATACACHE_TOOLS, in the repository's .tools, or Go's."""
    repository = Path(__file__).parents[2]
    places = [
        os.environ.get("DATACACHE_TOOLS", ""),
        repository / ".tools" / "bin",
        Path.home() / "go" / "bin",
    ]
    found = shutil.which(name)
    for place in filter(None, map(str, places)):
        found = found or shutil.which(name, path=place)
    return found


@contextlib.contextmanager
def versitygw_server(directory: Path, *, port: int = 0) -> Iterator[S3Server]:
    """versitygw on `directory`, as a process of its own; on a port that is free, or on `port`. `find_tool`
    says whether it can be had."""
    program = find_tool("versitygw")
    assert program is not None, "versitygw is not installed"
    directory.mkdir(exist_ok=True)
    port = port or _free_port()
    process = subprocess.Popen(
        [program, "--port", f"127.0.0.1:{port}", "--quiet", "--keep-alive", "posix", str(directory)],
        env={**os.environ, "ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _await_port(port, process)
        running = S3Server(f"http://127.0.0.1:{port}")
        yield running
        running.client.close()
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(port: int, process: subprocess.Popen[bytes], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.02)  # another process gives no event to wait for
