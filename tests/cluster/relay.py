"""
What kube-proxy would do: connections to one address of this machine are handed on to another.

Pods reach the API server by the address of its Service, and stores by that of the node.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator

_CHUNK = 1 << 16


@contextlib.contextmanager
def relay(listen: tuple[str, int], to: tuple[str, int]) -> Iterator[None]:
    """Hand on what comes to `listen` for as long as the context lasts."""
    with contextlib.ExitStack() as held:
        server = held.enter_context(socket.create_server(listen, backlog=128))
        connections = _Connections(to)
        held.callback(connections.end)
        thread = threading.Thread(target=connections.accept, args=(server,))
        thread.start()
        held.callback(thread.join)
        held.callback(server.shutdown, socket.SHUT_RDWR)
        yield


class _Connections:
    """State, guarded by the lock: the `_open` sockets, and the `_threads` that each serve one direction."""

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()

    def accept(self, server: socket.socket) -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._to, timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            pair = _Pair(near, far)
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(source, sink, pair))
                with self._lock:
                    self._open |= {near, far}
                    self._threads.add(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, pair: "_Pair") -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        with self._lock:
            self._threads.discard(threading.current_thread())
            if pair.ended():
                self._open -= {pair.near, pair.far}

    def end(self) -> None:
        with self._lock:
            sockets, threads = set(self._open), set(self._threads)
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


class _Pair:
    """Two connections that end when both directions have."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self._left = 2

    def ended(self) -> bool:
        """Of one direction more; whether it was the last, and both are closed. One caller at a time."""
        self._left -= 1
        if self._left:
            return False
        self.near.close()
        self.far.close()
        return True
