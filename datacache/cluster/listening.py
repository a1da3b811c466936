"""
Connections that whoever may reach us opens: as many as we want, and as long as we want.

A `Listener` accepts on a socket or a port and hands each connection to a protocol of aiohttp's. What it
adds are bounds. A connection counts from the moment it is accepted, a TLS handshake included; one more
than `most` is hung up on. Its first request must have come, up to the empty line after its headers,
within `first` seconds, and it ends after `lifetime` seconds, whatever it does. So who connects and says
nothing, or a byte a second, holds a place for `first` seconds and no memory worth speaking of.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

_log = logging.getLogger(__name__)

_BACKLOG = 128
"""Connections that the kernel holds for us until they are accepted."""
_PAUSE = 1.0
"""Seconds before the next try when nothing can be accepted: no descriptors are left, most likely."""


class Listener:
    """Accepts connections on `sockets`, which it closes, while it runs."""

    def __init__(
        self, sockets: list[socket.socket], serve: Callable[[], asyncio.Protocol], *, most: int,
        first: float = 0.0, lifetime: float = 0.0, tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:  # fmt: skip
        """`serve` makes the protocol of a connection, `tls` the context; `first` and `lifetime` are seconds,
        0: no limit."""
        self._sockets, self._serve, self._tls = sockets, serve, tls
        self._most, self._first, self._lifetime = most, first, lifetime
        self._open: set[_Bounded] = set()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Listener {len(self._open)} of {self._most} connections>"

    def start(self) -> None:
        """Begin to accept, in the running loop."""
        self._pause = None
        for listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    async def close(self) -> None:
        """Accept no more, and give up handshakes. What is served goes on: its server ends it, then `end`."""
        self._stop()
        if self._pause is not None:
            self._pause.cancel()
        for listening in self._sockets:
            listening.close()
        await asyncio.sleep(0)  # a task that never ran would not close what it was given
        handshakes = list(self._handshakes)
        for task in handshakes:
            task.cancel()
        await asyncio.gather(*handshakes, return_exceptions=True)

    async def end(self) -> None:
        """Hang up on who is still there, once its server has ended it: a TLS connection would wait for the
        other side to say goodbye."""
        for bounded in list(self._open):
            bounded.end()
        while self._open:
            await asyncio.sleep(0)

    def _stop(self) -> None:
        for listening in self._sockets:
            asyncio.get_running_loop().remove_reader(listening)

    def _accept(self, listening: socket.socket) -> None:
        try:
            accepted, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return  # it was gone again before we took it
        except OSError as error:
            _log.warning("no connection can be accepted (%s)", error.strerror)
            self._stop()
            self._pause = asyncio.get_running_loop().call_later(_PAUSE, self.start)
            return
        if len(self._open) >= self._most:
            accepted.close()
            return
        bounded = _Bounded(self._serve, self._open.discard)
        self._open.add(bounded)
        task = asyncio.ensure_future(self._establish(accepted, bounded))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _establish(self, accepted: socket.socket, bounded: "_Bounded") -> None:
        loop = asyncio.get_running_loop()
        timers = []
        if self._first:
            timers.append(loop.call_later(self._first, bounded.late))
        if self._lifetime:
            timers.append(loop.call_later(self._lifetime, bounded.end))
        bounded.timers = timers
        try:
            accepted.setblocking(False)
            if self._tls is None:
                await loop.connect_accepted_socket(lambda: bounded, accepted)
            else:
                await loop.connect_accepted_socket(
                    lambda: bounded, accepted, ssl=self._tls(), ssl_handshake_timeout=self._first or None,
                    ssl_shutdown_timeout=1.0,
                )  # fmt: skip
        except (OSError, asyncio.CancelledError) as error:
            accepted.close()
            bounded.connection_lost(None)
            if isinstance(error, asyncio.CancelledError):
                raise


class _Bounded(asyncio.Protocol):
    """A connection: the protocol that serves it, made when it is established, and what it is held to."""

    def __init__(self, serve: Callable[[], asyncio.Protocol], gone: Callable[["_Bounded"], None]) -> None:
        self._serve, self._gone = serve, gone
        self._inner: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self._heard = False  # a whole request head
        self._tail = b""
        self.timers: list[asyncio.TimerHandle] = []

    def late(self) -> None:
        """The first request should have come by now."""
        if not self._heard:
            self.end()

    def end(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._inner = self._serve()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        assert self._inner is not None
        if not self._heard:
            seen = self._tail + data
            self._heard, self._tail = b"\r\n\r\n" in seen, seen[-3:]
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        assert self._inner is not None
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        assert self._inner is not None
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        assert self._inner is not None
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self.timers:
            timer.cancel()
        self._gone(self)
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.connection_lost(exc)


async def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at all addresses of `host`. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listening = socket.socket(family, kind, protocol)
            sockets.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(address)
            listen(listening)
    except OSError:
        for opened in sockets:
            opened.close()
        raise
    return sockets


def listen(bound: socket.socket) -> None:
    """Have the kernel take connections at a bound socket."""
    bound.listen(_BACKLOG)
    bound.setblocking(False)
