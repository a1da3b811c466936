"""
`Control` over HTTP on a Unix socket; the part of it that a controller may ask over TCP; and the opt-in
metrics port. The door to aiohttp.

One thread with an event loop of its own, started and joined here: the rest of the worker never sees
asyncio. A call is decoded, run in one of a few threads (all of them block), and its result or error
is encoded; `api` is the table of the calls, docs/api.md that table for people. The socket lies in a
directory that only its owner can enter (`registry.make_private`), which is what keeps others out from
the first moment on. Over TCP it is a token (`credentials`), looked at before anything else of a request.

Everything is bounded: connections and their time (`listening`), the size of a request, calls at once.
"""

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from datacache.cluster import api, metrics, registry
from datacache.cluster.api import Call
from datacache.cluster.control import Control
from datacache.cluster.credentials import Tokens, admission
from datacache.cluster.listening import Listener, bound, listen
from datacache.config.settings import ApiSettings
from datacache.errors import ControlError, DatacacheError, SettingError
from datacache.model import MiB
from datacache.reading.job import LoadRequest
from datacache.telemetry import redact

_log = logging.getLogger(__name__)

CALLS = 8
"""Calls that run at once; a verify takes one of them for as long as it lasts."""
CONNECTIONS = 64
"""Connections at once, on the socket and on each port."""
REQUEST = 64 * MiB
"""Bytes of a request on the socket at most: a load of some 500,000 named files."""
REMOTE_REQUEST = 1 * MiB
"""Bytes of a request over TCP at most."""
HEAD = 10.0
"""Seconds in which a connection over TCP has to say what it wants, with its handshake."""
BODY = 10.0
"""Seconds in which the rest of a request over TCP has to come."""
LINGER = 1.0
"""Seconds for which what is still sent is taken, and thrown away, after an answer that did not wait for it:
else the caller would see a broken connection instead of the answer."""
LIFETIME = 60.0
"""Seconds after which a connection over TCP is dropped, whatever it does: a call takes 10 s at most."""
SCRAPE = 30.0
"""Seconds after which a connection to the metrics port is dropped."""


class ControlServer:
    """Offers `control` at `socket_path`; where `remote` says so, a part of it over TCP; and, where `metrics`
    is HOST:PORT, its metrics there."""

    def __init__(
        self, control: Control, socket_path: str, *, metrics: str = "", remote: ApiSettings | None = None
    ) -> None:
        self._control, self._path, self._metrics = control, socket_path, metrics
        self._remote = remote or ApiSettings()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self.metrics_port = 0
        """The port that metrics are served at, once started."""
        self.port = 0
        """The port that a controller is answered at, once started."""

    def __repr__(self) -> str:
        return f"<ControlServer {self._path} {'running' if self._thread else 'stopped'}>"

    def start(self) -> None:
        """Listen. Raises ControlError, or SettingError for what was chosen, when that cannot be."""
        registry.make_private(os.path.dirname(self._path))
        listening: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="control")
        self._thread.start()
        try:
            listening.result()
        except BaseException:
            if listening.exception() is None:  # it listens; it is us who were interrupted
                self.close()
            else:
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
            await self._offer(handlers.control(), [self._socket(closing)], closing)
            if self._remote.listen:
                self.port = await self._offer_remotely(handlers, closing)
            if self._metrics:
                sockets = await _at_port("--metrics", self._metrics)
                await self._offer(handlers.metrics(), sockets, closing, first=HEAD, lifetime=SCRAPE)
                self.metrics_port = sockets[0].getsockname()[1]
            listening.set_result(None)
            await self._end.wait()

    async def _offer(
        self, app: web.Application, sockets: list[socket.socket], closing: contextlib.AsyncExitStack,
        **bounds: Any,
    ) -> None:  # fmt: skip
        # Calls under way are given a moment at close; a client that is gone cancels nothing.
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=2.0,
            lingering_time=LINGER,
            logger=_http,
        )
        await runner.setup()
        assert runner.server is not None
        listener = Listener(sockets, runner.server, most=CONNECTIONS, **bounds)
        closing.push_async_callback(listener.end)
        closing.push_async_callback(runner.cleanup)
        closing.push_async_callback(listener.close)
        listener.start()

    async def _offer_remotely(self, handlers: "_Handlers", closing: contextlib.AsyncExitStack) -> int:
        tokens, certificate = admission(self._remote)
        tls = certificate.context if certificate is not None else None
        sockets = await _at_port("--listen", self._remote.listen)
        await self._offer(handlers.remote(tokens), sockets, closing, first=HEAD, lifetime=LIFETIME, tls=tls)
        return int(sockets[0].getsockname()[1])

    def _socket(self, closing: contextlib.AsyncExitStack) -> socket.socket:
        directory = os.open(os.path.dirname(self._path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)  # its name has our pid and start time: nobody else's
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            closing.callback(listening.close)
            # Through its directory: the address of a Unix socket has room for 107 bytes only.
            through = f"/proc/self/fd/{directory}/{os.path.basename(self._path)}"
            listening.bind(through)
            closing.callback(_unlink, self._path)
            os.chmod(through, 0o600)
            listen(listening)
        except OSError as error:
            raise ControlError(f"cannot listen at {self._path} ({error.strerror})") from error
        finally:
            os.close(directory)
        return listening


async def _at_port(name: str, address: str) -> list[socket.socket]:
    """Sockets that listen at HOST:PORT. Raises SettingError."""
    host, _, port = address.rpartition(":")
    try:
        return await bound(host.strip("[]"), int(port))
    except OSError as error:
        reason = error.strerror or "no such host"
        raise SettingError(name, address, f"an address to listen at ({reason})") from error


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a record of aiohttp's is about us, and not about a caller who is gone or speaks no HTTP: who
    can connect could fill the log with those, and with what it likes to see there."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | ConnectionError)


_http = logging.getLogger(f"{__name__}.http")
_http.addFilter(_is_ours)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Handlers:
    """From requests to calls of `control`, and back."""

    def __init__(self, control: Control, calls: ThreadPoolExecutor) -> None:
        self._control, self._calls = control, calls
        self._acts = _acts(control)

    def control(self) -> web.Application:
        """The application of the socket."""
        return self._application(api.CALLS, _told, most=REQUEST)

    def remote(self, tokens: Tokens | None) -> web.Application:
        """The application of a controller. Who shows no token learns of no route."""

        @web.middleware
        async def admitted(request: web.Request, handler: _Handler) -> web.StreamResponse:
            if tokens is not None and request.path not in _OPEN:
                shown = request.headers.getall("Authorization", [])
                if len(shown) != 1 or not tokens.admit(shown[0]):
                    refused = _failed(ControlError("a token that is accepted here is needed"), 401)
                    refused.headers["WWW-Authenticate"] = "Bearer"
                    refused.force_close()
                    return refused
            answer = await handler(request)
            # One request a connection, so that what holds for the first one holds for all.
            answer.force_close()
            return answer

        remote = [call for call in api.CALLS if call.remote]
        return self._application(remote, admitted, _told, most=REMOTE_REQUEST, within=BODY)

    def metrics(self) -> web.Application:
        """The application of the metrics port."""
        only = [call for call in api.CALLS if call.path in ("/healthz", "/metrics")]
        return self._application(only, most=1024)

    def _application(
        self, calls: Iterable[Call], *around: Any, most: int, within: float | None = None
    ) -> web.Application:
        app = web.Application(client_max_size=most, middlewares=around)
        for call in calls:
            add = app.router.add_get if call.method == "GET" else app.router.add_post
            add(call.path, self._answer(call, most, within))
        return app

    def _answer(self, call: Call, most: int, within: float | None) -> _Handler:
        async def handle(request: web.Request) -> web.Response:
            try:
                reading = call.method == "POST"
                raw = await asyncio.wait_for(request.read(), within) if reading else b""
            except web.HTTPRequestEntityTooLarge:
                return _failed(ControlError(f"a request of more than {most // MiB} MiB; split it"), 413)
            except TimeoutError:
                return _failed(ControlError(f"the request did not come within {within} s"), 408)
            except (ConnectionError, web.RequestPayloadError, HttpProcessingError) as error:
                # Who is gone does not hear it.
                return _failed(SettingError("body", "", f"a whole request ({type(error).__name__})"), 400)
            return await self._acted(call, raw)

        return handle

    async def _acted(self, call: Call, raw: bytes) -> web.Response:
        try:
            act = partial(self._acts[call.path], **call.read(raw))
            result = act() if call.path == "/healthz" else await self._in_thread(act)
        except DatacacheError as error:
            return _failed(error, next((s for kind, s in api.STATUS if isinstance(error, kind)), 500))
        except Exception as error:  # noqa: BLE001  a bug of ours must not look like one of the caller's
            _log.exception("%s %s failed", call.method, call.path)
            return _failed(ControlError(f"internal error: {type(error).__name__}"), 500)
        if isinstance(result, bytes):
            return web.Response(body=result, headers={"Content-Type": metrics.CONTENT_TYPE})
        if call.open:  # a reason not to be asked, or none
            return web.Response(text=f"{result or 'ok'}\n", status=503 if result else 200)
        return web.json_response(result)

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._calls, call)


_OPEN = frozenset(call.path for call in api.CALLS if call.open)


@web.middleware
async def _told(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """What aiohttp refuses is refused like all the rest: as an `Error` of the description."""
    try:
        return await handler(request)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as refused:
        answer = _failed(ControlError(f"{request.method} {request.path}: no such call here"), refused.status)
        if "Allow" in refused.headers:
            answer.headers["Allow"] = refused.headers["Allow"]
        return answer


def _acts(control: Control) -> Mapping[str, Callable[..., Any]]:
    """What is done for each call of the table, by its path."""

    def listed(path: str, after: int = 0, limit: int = 1000) -> Any:
        entries, following = control.list(path, after=after, limit=limit)
        return {"entries": [asdict(entry) for entry in entries], "after": following}

    def evicted(path: str, dry_run: bool = False) -> Any:
        return dict(zip(("files", "bytes"), control.evict(path, dry_run=dry_run), strict=True))

    def load(**request: Any) -> Any:
        lists = {k: tuple(v) for k, v in request.items() if isinstance(v, list)}
        return {"job": control.load(LoadRequest(**{**request, **lists}))}

    def cancel(job: str) -> Any:
        control.load_cancel(job)
        return {}

    return {
        "/healthz": lambda: "",
        "/readyz": lambda: control.ready(),
        "/metrics": lambda: metrics.render(control.status()),
        "/v1/status": lambda: control.status(),
        "/v1/loads": load,
        "/v1/loads/status": lambda job: asdict(control.load_status(job)),
        "/v1/loads/cancel": cancel,
        "/v1/list": listed,
        "/v1/stat": lambda path: asdict(control.stat(path)),
        "/v1/evict": evicted,
        "/v1/pin": lambda path, pinned: {"files": control.pin(path, pinned)},
        "/v1/lease": lambda tier, room, ttl, entries=0: dict(
            zip(("room", "entries"), control.lease(tier, room, entries=entries, ttl=ttl), strict=True)
        ),
        "/v1/verify": lambda: control.verify(),
        "/v1/flush": lambda path, timeout=0.0: control.flush(path, timeout=timeout),
        "/v1/drain": lambda timeout=0.0: control.drain(timeout=timeout),
    }


def _failed(error: DatacacheError, status: int) -> web.Response:
    fields = {k: v for k, v in vars(error).items() if isinstance(v, str | int | float | bool | None)}
    body = {"error": redact(str(error)), "kind": type(error).__name__, "fields": fields}
    return web.json_response(body, status=status)
