"""
`Control` over HTTP on a Unix socket, and the opt-in metrics port. The door to aiohttp.

One thread with an event loop of its own, started and joined here: the rest of the worker never sees
asyncio. A call is decoded, run in one of a few threads (all of them block), and its result or error
is encoded; what the calls are stands in docs/api.md. The socket lies in a directory that only its
owner can enter (`registry.make_private`), which is what keeps others out from the first moment on.

Everything is bounded: connections, the size of a request, calls at once. The metrics port answers
GET of two pages and nothing else, and drops every connection after a while.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from aiohttp import web

from datacache.cluster import metrics, registry
from datacache.cluster.control import Control
from datacache.errors import (
    CacheError,
    ControlError,
    DatacacheError,
    Denied,
    Locked,
    NamespaceError,
    NotFound,
    SettingError,
    SourceError,
    TierFull,
)
from datacache.model import MiB
from datacache.reading.job import LoadRequest
from datacache.telemetry import redact

_log = logging.getLogger(__name__)

CALLS = 8
"""Calls that run at once; a verify takes one of them for as long as it lasts."""
FLUSH = 10.0
"""Seconds that one flush waits at most: who wants to wait longer asks again."""
CONNECTIONS = 64
"""Connections at once, on the socket and on the port each."""
REQUEST = 64 * MiB
"""Bytes of a request at most: a load of some 500,000 named files."""
SCRAPE = 30.0
"""Seconds after which a connection to the metrics port is dropped, whatever it does."""

STATUS: tuple[tuple[type[DatacacheError], int], ...] = (
    (SettingError, 400),
    (NamespaceError, 404),
    (NotFound, 404),
    (Denied, 403),
    (Locked, 409),
    (TierFull, 507),
    (CacheError, 500),
    (SourceError, 502),
    (ControlError, 409),
)
"""The HTTP status of each error; the first that fits. 500 for what is not there."""


class ControlServer:
    """Offers `control` at `socket_path` and, where `metrics` is HOST:PORT, its metrics there."""

    def __init__(self, control: Control, socket_path: str, *, metrics: str = "") -> None:
        self._control, self._path, self._metrics = control, socket_path, metrics
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self.metrics_port = 0
        """The port that metrics are served at, once started."""

    def __repr__(self) -> str:
        return f"<ControlServer {self._path} {'running' if self._thread else 'stopped'}>"

    def start(self) -> None:
        """Listen. Raises ControlError, or SettingError for the metrics port, when that cannot be."""
        registry.make_private(os.path.dirname(self._path))
        listening: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="control")
        self._thread.start()
        try:
            listening.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise

    def close(self) -> None:
        """Stop listening, let the calls under way end, join the thread. Idempotent."""
        if self._thread is None:
            return
        assert self._loop is not None and self._end is not None
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._thread = None

    def __enter__(self) -> "ControlServer":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, listening: "Future[None]") -> None:
        try:
            asyncio.run(self._serve(listening))
        except BaseException as error:  # noqa: BLE001  it belongs to whoever started us
            if listening.done():
                _log.exception("the control server failed; this mount cannot be asked any more")
            else:
                listening.set_exception(error)

    async def _serve(self, listening: "Future[None]") -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with contextlib.AsyncExitStack() as closing:
            calls = ThreadPoolExecutor(CALLS, thread_name_prefix="control-call")
            closing.callback(calls.shutdown, cancel_futures=True)
            handlers = _Handlers(self._control, calls)
            await self._listen_on_socket(await self._runner(handlers.control(), closing), closing)
            if self._metrics:
                await self._listen_on_port(await self._runner(handlers.metrics(), closing), closing)
            listening.set_result(None)
            await self._end.wait()

    async def _runner(self, app: web.Application, closing: contextlib.AsyncExitStack) -> web.AppRunner:
        # Calls under way are given a moment at close; a client that is gone cancels nothing.
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=2.0)
        await runner.setup()
        closing.push_async_callback(runner.cleanup)
        return runner

    async def _listen_on_socket(self, runner: web.AppRunner, closing: contextlib.AsyncExitStack) -> None:
        assert self._loop is not None
        directory = os.open(os.path.dirname(self._path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)  # its name has our pid and start time: nobody else's
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # Through its directory: the address of a Unix socket has room for 107 bytes only.
            through = f"/proc/self/fd/{directory}/{os.path.basename(self._path)}"
            listener.bind(through)
            closing.callback(_unlink, self._path)
            os.chmod(through, 0o600)
        except OSError as error:
            raise ControlError(f"cannot listen at {self._path} ({error.strerror})") from error
        finally:
            os.close(directory)
        server = await self._loop.create_unix_server(_bounded(runner), sock=listener)
        closing.callback(server.close)

    async def _listen_on_port(self, runner: web.AppRunner, closing: contextlib.AsyncExitStack) -> None:
        assert self._loop is not None
        host, _, port = self._metrics.rpartition(":")
        try:
            server = await self._loop.create_server(
                _bounded(runner, lifetime=SCRAPE), host.strip("[]"), int(port), backlog=CONNECTIONS
            )
        except OSError as error:
            reason = error.strerror or "no such host"
            raise SettingError("--metrics", self._metrics, f"an address to listen at ({reason})") from error
        closing.callback(server.close)
        self.metrics_port = server.sockets[0].getsockname()[1]


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


class _Refusal(asyncio.Protocol):
    """Hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


def _bounded(runner: web.AppRunner, *, lifetime: float = 0.0) -> Callable[[], asyncio.BaseProtocol]:
    """aiohttp's protocol for each connection, as long as there are not too many."""
    server = runner.server
    assert server is not None

    def protocol() -> asyncio.BaseProtocol:
        if len(server.connections) >= CONNECTIONS:
            return _Refusal()
        handler = server()
        if lifetime:
            asyncio.get_running_loop().call_later(lifetime, handler.force_close)
        return handler

    return protocol


class _Handlers:
    """From requests to calls of `control`, and back."""

    def __init__(self, control: Control, calls: ThreadPoolExecutor) -> None:
        self._control, self._calls = control, calls

    def control(self) -> web.Application:
        """The application of the socket."""
        app = web.Application(client_max_size=REQUEST)
        app.router.add_get("/healthz", self._healthy)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/v1/status", self._answer(_Call(self._control.status, {})))
        for path, call in self._posts().items():
            app.router.add_post(f"/v1/{path}", self._answer(call))
        return app

    def metrics(self) -> web.Application:
        """The application of the metrics port."""
        app = web.Application(client_max_size=1024)
        app.router.add_get("/healthz", self._healthy)
        app.router.add_get("/metrics", self._scrape)
        return app

    def _posts(self) -> Mapping[str, "_Call"]:
        control = self._control

        def listed(path: str, after: int = 0, limit: int = 1000) -> Any:
            if not 1 <= limit <= 10_000:
                raise SettingError("limit", limit, "1 to 10000")
            entries, following = control.list(path, after=after, limit=limit)
            return {"entries": [asdict(entry) for entry in entries], "after": following}

        def evicted(path: str, dry_run: bool = False) -> Any:
            return dict(zip(("files", "bytes"), control.evict(path, dry_run=dry_run), strict=True))

        def flushed(path: str, timeout: float = 0.0) -> Any:
            if not 0 <= timeout <= FLUSH:
                raise SettingError("timeout", timeout, f"0 to {FLUSH:g} seconds; ask again")
            return control.flush(path, timeout=timeout)

        def load(**request: Any) -> Any:
            lists = {k: tuple(v) for k, v in request.items() if isinstance(v, list)}
            return {"job": control.load(LoadRequest(**{**request, **lists}))}

        path, job = {"path": str}, {"job": str}
        return {
            "loads": _Call(load, {}, {"files": list, "globs": list, **_types(LoadRequest())}),
            "loads/status": _Call(lambda job: asdict(control.load_status(job)), job),
            "loads/cancel": _Call(lambda job: control.load_cancel(job) or {}, job),  # type: ignore[func-returns-value]
            "list": _Call(listed, path, {"after": int, "limit": int}),
            "stat": _Call(lambda path: asdict(control.stat(path)), path),
            "evict": _Call(evicted, path, {"dry_run": bool}),
            "pin": _Call(lambda path, pinned: {"files": control.pin(path, pinned)}, {**path, "pinned": bool}),
            "verify": _Call(lambda: control.verify(), {}),
            "flush": _Call(flushed, path, {"timeout": float}),
        }

    def _answer(self, call: "_Call") -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            try:
                arguments = call.arguments(await request.read())
                result = await self._in_thread(partial(call.act, **arguments))
            except web.HTTPRequestEntityTooLarge:
                return _failed(ControlError(f"a request of more than {REQUEST // MiB} MiB; split it"), 413)
            except DatacacheError as error:
                return _failed(error, next((s for kind, s in STATUS if isinstance(error, kind)), 500))
            except Exception as error:  # noqa: BLE001  a bug of ours must not look like one of the caller's
                _log.exception("%s %s failed", request.method, request.path)
                return _failed(ControlError(f"internal error: {type(error).__name__}"), 500)
            return web.json_response(result)

        return handle

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._calls, call)

    async def _scrape(self, request: web.Request) -> web.Response:
        page = await self._in_thread(lambda: metrics.render(self._control.status()))
        return web.Response(body=page, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _healthy(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")


def _failed(error: DatacacheError, status: int) -> web.Response:
    fields = {k: v for k, v in vars(error).items() if isinstance(v, str | int | float | bool | None)}
    body = {"error": redact(str(error)), "kind": type(error).__name__, "fields": fields}
    return web.json_response(body, status=status)


@dataclass(frozen=True)
class _Call:
    """What is done for a request, and the arguments that it takes in the request's body."""

    act: Callable[..., Any]
    needed: Mapping[str, type]
    optional: Mapping[str, type] = field(default_factory=dict)

    def arguments(self, raw: bytes) -> dict[str, Any]:
        """The arguments in a request's body. Raises SettingError."""
        try:
            body = json.loads(raw or b"{}")
        except (ValueError, RecursionError) as error:
            raise SettingError("body", "", f"JSON ({error})") from error
        if not isinstance(body, dict):
            raise SettingError("body", type(body).__name__, "a JSON object")
        types = {**self.needed, **self.optional}
        for name, value in body.items():
            if name not in types:
                raise SettingError("body", name, f"one of {', '.join(types) or 'no arguments'}")
            if type(value) is not types[name] and not (value is None and name in self.optional):
                raise SettingError(name, value, f"a value of type {types[name].__name__}")
            if isinstance(value, list) and not all(isinstance(item, str) for item in value):
                raise SettingError(name, "", "a list of texts")
        for name in self.needed:
            if name not in body:
                raise SettingError(name, "", "a value")
        return {name: value for name, value in body.items() if value is not None}


def _types(defaults: LoadRequest) -> dict[str, type]:
    """The types of a load request's plain fields."""
    return {name: type(value) for name, value in vars(defaults).items() if isinstance(value, str | int)}
