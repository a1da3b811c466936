"""
gRPC on a Unix socket: the door to grpc.

A servicer is an object with one method for each call that it answers, in snake case, which takes the request
and the seconds that there are, returns the reply, and raises our errors. Here they become status codes, in
one table. Each call ends: with the time that the caller gave, or after LIMIT. Nothing of a request is logged
but the id of its volume, and no value of its secrets comes back in an error.
"""

import contextlib
import logging
import os
import re
import socket
import stat
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from datacache.errors import (
    ControlError,
    DatacacheError,
    Denied,
    MountError,
    NoSuchVolume,
    NotFound,
    NotStaged,
    SettingError,
    SourceError,
    TookTooLong,
    VolumeBusy,
    VolumeDiffers,
    VolumeInUse,
)
from datacache.telemetry import hide, redact

log = logging.getLogger(__name__)

LIMIT = 110.0
"""Seconds that a call may take, whatever the caller gives. `datacache mount` needs up to 105 of a store that
is away; the kubelet waits for 120."""
_WORKERS = 16
"""Calls that are worked on at once."""
_WAITING = 64
"""Calls that are taken at once; more are refused (RESOURCE_EXHAUSTED), and come again."""
_MAX_REQUEST = 1 << 20
_MAX_PATH = 107
"""Bytes of the path of a Unix socket."""

_CODES: tuple[tuple[type[DatacacheError], grpc.StatusCode], ...] = (
    # The first that fits.
    (SettingError, grpc.StatusCode.INVALID_ARGUMENT),
    (NoSuchVolume, grpc.StatusCode.NOT_FOUND),
    (VolumeDiffers, grpc.StatusCode.ALREADY_EXISTS),
    (VolumeBusy, grpc.StatusCode.ABORTED),
    (VolumeInUse, grpc.StatusCode.FAILED_PRECONDITION),
    (NotStaged, grpc.StatusCode.FAILED_PRECONDITION),
    (TookTooLong, grpc.StatusCode.DEADLINE_EXCEEDED),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (Denied, grpc.StatusCode.PERMISSION_DENIED),
    (SourceError, grpc.StatusCode.UNAVAILABLE),
    (ControlError, grpc.StatusCode.UNAVAILABLE),
    (MountError, grpc.StatusCode.INTERNAL),
    (DatacacheError, grpc.StatusCode.INTERNAL),
)

Service = tuple[ServiceDescriptor, object]


class Server:
    """`services` on the socket at `path`. Start it, and stop it once."""

    def __init__(self, path: str, services: Sequence[Service]) -> None:
        self._path = path
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="csi")
        self._server = grpc.server(
            self._workers,
            maximum_concurrent_rpcs=_WAITING,
            options=[("grpc.max_receive_message_length", _MAX_REQUEST)],
        )
        for service, servicer in services:
            self._server.add_generic_rpc_handlers((_handler(service, servicer),))

    def __repr__(self) -> str:
        return f"<Server {self._path}>"

    def start(self) -> None:
        """Listen. The socket is for its owner alone. Raises SettingError where it cannot be made."""
        _make_way(self._path)
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            raise SettingError("socket", self._path, "one that can be listened on") from error
        finally:
            os.umask(mask)
        self._server.start()

    def stop(self, grace: float) -> None:
        """Take no more calls, give those under way `grace` seconds, and return when all is down."""
        self._server.stop(grace).wait()
        self._workers.shutdown()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def probe(path: str, service: ServiceDescriptor, *, within: float) -> None:
    """Ask whoever listens at `path` whether it answers, by the method `Probe` of `service`. Raises
    ControlError when it has not after `within` seconds."""
    method = service.methods_by_name["Probe"]
    with grpc.insecure_channel(f"unix:{path}") as channel:
        ask = channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        try:
            ask(GetMessageClass(method.input_type)(), timeout=within)
        except grpc.RpcError as error:
            raise ControlError(f"no driver answers at {path} ({error.code().name})") from error


def _make_way(path: str) -> None:
    """Remove the socket of a process that is no more. Raises SettingError where one listens, and where it is
    no socket."""
    if len(os.fsencode(path)) > _MAX_PATH:
        raise SettingError("socket", path, f"a path of at most {_MAX_PATH} bytes")
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SettingError("socket", path, "a path at which there is nothing else")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
            to.settimeout(1)
            to.connect(path)
        raise SettingError("socket", path, "one that no other process listens on")
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError as error:
        raise SettingError("socket", path, f"one that can be listened on ({error.strerror})") from error


def _handler(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
    methods = {}
    for method in service.methods:
        answer: Callable[..., Any] = getattr(servicer, _snake(method.name))
        methods[method.name] = grpc.unary_unary_rpc_method_handler(
            _answering(method.name, answer),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _answering(name: str, answer: Callable[..., Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    def answered(request: Any, context: grpc.ServicerContext) -> Any:
        begun = time.monotonic()
        what = f"{name} {shown}" if (shown := _shown(request)) else name
        remaining = context.time_remaining()
        within = LIMIT if remaining is None else min(LIMIT, remaining)
        try:
            if within <= 0:
                raise TookTooLong(f"{name}: the time for it was over before it began")
            reply = answer(request, within=within)
        except Exception as error:  # noqa: BLE001  the border: each becomes a status
            code, text = status(error, dict(getattr(request, "secrets", {})).values())
            log.info("%s: %s, %s", what, code.name, text)
            context.abort(code, text)  # which raises
        log.log(_level(name), "%s: done in %.1f s", what, time.monotonic() - begun)
        return reply

    return answered


def _shown(request: Any) -> str:
    volume = getattr(request, "volume_id", "") or getattr(request, "name", "")
    return repr(volume[:128])[1:-1]


def _level(name: str) -> int:
    """Calls that come every minute are no news."""
    return logging.DEBUG if "Get" in name or name == "Probe" else logging.INFO


def status(error: Exception, secrets: Collection[str]) -> tuple[grpc.StatusCode, str]:
    """The code and the line that the caller is given for `error`."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, hide(redact(" ".join(str(error).split())), secrets)
    text = hide("".join(traceback.format_exception(error)), secrets)
    log.error("internal error: %s", text)
    return grpc.StatusCode.INTERNAL, f"internal error, see the driver's log: {type(error).__name__}"
