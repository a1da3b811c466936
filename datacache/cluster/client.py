"""
A worker on the other side of its socket: `Control` as HTTP over a Unix socket or, in part, over TCP.

One short connection a call, so that nothing is to be closed and a client may be used from any
thread. What the worker raised is raised here again, as the same class. docs/api.md has the calls.
"""

import http.client
import json
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from datacache import errors
from datacache.cluster import registry
from datacache.cluster.control import CachedPath
from datacache.errors import ControlError, DatacacheError, SettingError
from datacache.model import MiB
from datacache.reading.job import LoadRequest, LoadStatus

TIMEOUT = 120.0
"""Seconds without a byte after which a call is given up. A listing at a store that is away takes its
30 s; this is well above."""
_ANSWER = 256 * MiB
"""Bytes of an answer that are read. A page of 10,000 entries of the longest names has half of them."""


class _Client:
    """Implements `control.RemoteControl` by asking a worker; who it is and how it is reached is the
    business of the classes below."""

    def _who(self) -> str:
        """The worker, for a message."""
        raise NotImplementedError

    def _connection(self) -> http.client.HTTPConnection:
        """A connection to it, which is not opened yet."""
        raise NotImplementedError

    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json"}

    def ready(self) -> str:
        status, raw = self._ask("GET", "/readyz")
        return "" if status == 200 else raw.decode("utf-8", "replace").strip()

    def status(self) -> dict[str, Any]:
        return dict(self._call("GET", "/v1/status"))

    def load(self, request: LoadRequest) -> str:
        return str(self._call("POST", "/v1/loads", asdict(request))["job"])

    def load_status(self, job: str) -> LoadStatus:
        return _load_status(self._call("POST", "/v1/loads/status", {"job": job}))

    def load_cancel(self, job: str) -> None:
        self._call("POST", "/v1/loads/cancel", {"job": job})

    def drain(self, *, timeout: float) -> dict[str, Any]:
        return dict(self._call("POST", "/v1/drain", {"timeout": float(timeout)}))

    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, patient: bool = False
    ) -> Any:
        status, raw = self._ask(method, path, body, patient=patient)
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise ControlError(f"{self._who()} does not answer as one (status {status})") from error
        if status != 200:
            raise _raised(answer)
        return answer

    def _why(self, error: Exception) -> str:
        """Why there was no answer."""
        return _reason(error)

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, patient: bool = False
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        connection = self._connection()
        text = None if body is None else json.dumps(body)
        try:
            connection.connect()
            if patient:
                connection.sock.settimeout(None)
            connection.request(method, path, text, self._headers())
            response = connection.getresponse()
            raw = response.read(_ANSWER + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ControlError(f"{self._who()} does not answer ({self._why(error)})") from error
        finally:
            connection.close()
        if len(raw) > _ANSWER:
            raise ControlError(f"{self._who()} answers more than {_ANSWER // MiB} MiB")
        return response.status, raw


class ControlClient(_Client):
    """Implements `control.Control` by asking the worker that listens at `socket_path`."""

    def __init__(self, socket_path: str, *, timeout: float = TIMEOUT) -> None:
        self._path, self._timeout = socket_path, timeout

    def __repr__(self) -> str:
        return f"<ControlClient {self._path}>"

    def _connection(self) -> http.client.HTTPConnection:
        return _UnixConnection(self._path, timeout=self._timeout)

    def _who(self) -> str:
        known = registry.at_socket(self._path)
        if known is None:
            return f"the worker at {self._path}"
        what = f"the mount at {known.mount}" if known.mount else f"the worker of {known.dataset}"
        return f"{what} (pid {known.pid})"

    def _why(self, error: Exception) -> str:
        gone = isinstance(error, FileNotFoundError | ConnectionRefusedError)
        if gone and os.path.exists(registry.broker_socket(self._path)):
            return (
                "its daemon has ended, and the next one begins: ask again; where none does any more, its log "
                "says why, and `datacache upgrade` begins one"
            )
        return super()._why(error)

    def list(self, path: str, *, after: int = 0, limit: int = 1000) -> tuple[list[CachedPath], int]:
        page = self._call("POST", "/v1/list", {"path": path, "after": after, "limit": limit})
        return [CachedPath(**item) for item in page["entries"]], int(page["after"])

    def stat(self, path: str) -> CachedPath:
        return CachedPath(**self._call("POST", "/v1/stat", {"path": path}))

    def evict(self, path: str, *, dry_run: bool = False) -> tuple[int, int]:
        done = self._call("POST", "/v1/evict", {"path": path, "dry_run": dry_run})
        return int(done["files"]), int(done["bytes"])

    def pin(self, path: str, pinned: bool) -> int:
        return int(self._call("POST", "/v1/pin", {"path": path, "pinned": pinned})["files"])

    def flush(self, path: str, *, timeout: float) -> dict[str, Any]:
        return dict(self._call("POST", "/v1/flush", {"path": path, "timeout": float(timeout)}))

    def lease(self, tier: str, room: int, *, entries: int = 0, ttl: float) -> tuple[int, int]:
        asked = {"tier": tier, "room": room, "entries": entries, "ttl": float(ttl)}
        done = self._call("POST", "/v1/lease", asked)
        return int(done["room"]), int(done["entries"])

    def verify(self) -> dict[str, int]:
        # It reads the whole cache: as long as the worker lives it is waited for.
        return dict(self._call("POST", "/v1/verify", {}, patient=True))


class RemoteClient(_Client):
    """Implements `control.RemoteControl` by asking the worker at `url`, http(s)://HOST:PORT.

    `ca` is a file of the certificates that sign the worker's, or `authorities` they themselves in PEM (both
    empty: the system's), `server_name` what is to stand in that (empty: HOST), for a worker that is asked by
    its address. Raises SettingError.
    """

    def __init__(
        self, url: str, *, token: str = "", ca: str = "", authorities: str = "", server_name: str = "",
        timeout: float = TIMEOUT,
    ) -> None:  # fmt: skip
        scheme, _, address = url.rstrip("/").partition("://")
        host, _, port = address.rpartition(":")
        if scheme not in ("http", "https") or not host or not port.isdecimal() or "/" in address:
            raise SettingError("url", url, "http://HOST:PORT or https://HOST:PORT")
        self._url, self._token, self._timeout = url, token, timeout
        self._host, self._port = host.strip("[]"), int(port)
        self._name = server_name or self._host
        self._tls: ssl.SSLContext | None = None
        if scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca or None, cadata=authorities or None)
            except (OSError, ValueError) as error:
                raise SettingError("ca", ca, f"a file of certificates in PEM ({_reason(error)})") from error

    def __repr__(self) -> str:
        return f"<RemoteClient {self._url}>"

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        return _TlsConnection(self._host, self._port, self._tls, self._name, timeout=self._timeout)

    def _who(self) -> str:
        return f"the worker at {self._url}"

    def _headers(self) -> dict[str, str]:
        shown = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return super()._headers() | shown


class _TlsConnection(http.client.HTTPConnection):
    def __init__(self, host: str, port: int, context: ssl.SSLContext, name: str, *, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._context, self._name = context, name

    def connect(self) -> None:
        super().connect()
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self._name)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, *, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        # Through its directory: the address of a Unix socket has room for 107 bytes only.
        directory = os.open(os.path.dirname(self._path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(self._path)}")
        finally:
            os.close(directory)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return "it has ended"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _load_status(answer: Mapping[str, Any]) -> LoadStatus:
    failures = tuple((path, reason) for path, reason in answer["failures"])
    return LoadStatus(**{**answer, "failures": failures})


def _raised(answer: Any) -> DatacacheError:
    """The error that the worker raised."""
    if not isinstance(answer, dict):
        answer = {"error": "an answer that is none"}
    kind = getattr(errors, str(answer.get("kind")), ControlError)
    if not (isinstance(kind, type) and issubclass(kind, DatacacheError)):
        kind = ControlError
    error: DatacacheError = kind.__new__(kind)
    # Not by its constructor: the message is made already, and the fields are what they were there.
    error.args = (str(answer.get("error")),)
    vars(error).update(answer.get("fields", {}))
    return error
