"""Plain HTTP requests to a worker, as any program would make them: over its socket, TCP, or TLS."""

import http.client
import json
import os
import socket
import ssl
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    kind: str
    """Its content type, without parameters."""
    body: bytes
    headers: http.client.HTTPMessage


class Asker:
    """One connection a request, to the socket or (HOST, PORT) at `address`."""

    def __init__(
        self, address: str | tuple[str, int], *, token: str = "", tls: ssl.SSLContext | None = None
    ) -> None:
        self.address, self.token, self._tls = address, token, tls

    def __call__(
        self, method: str, path: str, body: Any = None, *, headers: tuple[tuple[str, bytes], ...] = ()
    ) -> Answer:
        """The answer. `body` is sent as JSON, or as the bytes that it is."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("localhost")
        connection.sock = self.connected()
        try:
            connection.putrequest(method, path)
            if self.token:
                connection.putheader("Authorization", f"Bearer {self.token}")
            for name, value in headers:
                connection.putheader(name, value)
            if raw is not None:
                connection.putheader("Content-Length", str(len(raw)))
            connection.endheaders()
            try:
                if raw is not None:
                    connection.send(raw)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has answered already, and would not read it
            response = connection.getresponse()
            kind = response.headers.get_content_type()
            return Answer(response.status, kind, response.read(), response.headers)
        finally:
            connection.close()

    def connected(self) -> socket.socket:
        """A connection on which nothing was sent yet."""
        if isinstance(self.address, str):
            # Through its directory: the address of a Unix socket has room for 107 bytes only.
            directory = os.open(os.path.dirname(self.address), os.O_PATH | os.O_DIRECTORY)
            made = socket.socket(socket.AF_UNIX)
            try:
                made.settimeout(30)
                made.connect(f"/proc/self/fd/{directory}/{os.path.basename(self.address)}")
            except BaseException:
                made.close()
                raise
            finally:
                os.close(directory)
            return made
        made = socket.create_connection(self.address, 30)
        return self._tls.wrap_socket(made, server_hostname=self.address[0]) if self._tls else made
