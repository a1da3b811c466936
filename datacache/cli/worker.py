"""
`datacache worker`: serve the cache of a data set, without a mount of its own, until it is told to end.

For a pod, or a service: it stays in the foreground and logs to standard error. The process is the worker
itself (`datacache.worker`) with its control API (`cluster.server`) and its place in the registry, as behind
a mount; there is no daemon in between. A signal drains it: it says that it is not ready, ends load jobs,
uploads what is owed, and then takes all down.
"""

import argparse
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from datacache.cli import flags
from datacache.errors import SettingError
from datacache.model import parse_duration

if TYPE_CHECKING:
    from datacache.cluster.control import RemoteControl
    from datacache.config.settings import Settings

_log = logging.getLogger(__name__)

DRAIN = "20s"
"""How long a signal's drain may take: below the 30 s after which Kubernetes kills, with room for the rest."""
_LOOK = 0.5
"""Seconds of one drain, between two looks for another signal."""
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

EXAMPLES = """\
examples:
  datacache worker s3://bucket/train --cache ssd:/var/cache/x=200GiB
  datacache worker --config /etc/datacache/imagenet.yaml --listen 0.0.0.0:9301 --token-file /run/secrets/token

SIGTERM and Ctrl-C drain it: load jobs end, what was written is uploaded (--drain-timeout); what is not stays
in the landing zone for the next worker. A second one ends the drain. Exit code 0 when it was told to end.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "datacache worker URI [URI=PATH ...] [FLAGS]"
    parser.description = (
        "Serve the cache of a data set, without a mount: load jobs, what is cached where, eviction, status. "
        "`datacache load`, `status`, `ls` and the others find it by the data set's name."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "uris", nargs="*", metavar="URI",
        help="what to serve (s3, gs, az, oss, http, https, file, ...); with =PATH: where in the data set",
    )  # fmt: skip
    parser.add_argument(
        "--drain-timeout", metavar="DURATION", default=DRAIN,
        help=f"how long to wait for what is under way when it is told to end; default {DRAIN}",
    )  # fmt: skip
    flags.add_dataset_flags(parser)
    flags.add_writing_flags(parser)
    flags.add_daemon_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve. 0 when it was told to end, and has."""
    patience = parse_duration(args.drain_timeout, name="--drain-timeout")
    if not 0 <= patience < float("inf"):
        raise SettingError("--drain-timeout", args.drain_timeout, "a duration, such as 20s")
    settings = flags.read(args, args.uris)
    _check(settings)

    from datacache.telemetry import set_up_logging

    try:
        set_up_logging(level=settings.log_level, style=settings.log_format, file=settings.log_file)
    except OSError as error:
        expected = f"one that can be made and written ({error.strerror})"
        raise SettingError("--log-file", settings.log_file, expected) from error
    serve(settings, patience=patience)
    return 0


def _check(settings: "Settings") -> None:
    """Raise what can be seen to be wrong before anything is opened."""
    from datacache.cluster.credentials import admission
    from datacache.sources.opening import check_mount

    for point in settings.dataset.mounts:
        check_mount(point, settings.environment)
    admission(settings.api)


def serve(settings: "Settings", *, patience: float) -> None:
    """Serve until a signal comes; then drain for `patience` seconds at most."""
    from datacache.cli.mount import tell_systemd
    from datacache.cluster import premises, registry
    from datacache.cluster.server import ControlServer
    from datacache.worker import Worker

    premises.write(settings)  # first: a tier may wait for what the node's plugin mounts by it
    with ExitStack() as built:
        # A mount may go on while its worker is started anew, and have named versions to its kernel.
        worker = built.enter_context(Worker(settings, resumed=True))
        server = ControlServer(worker, worker.socket, metrics=settings.metrics, remote=settings.api)
        built.callback(server.close)
        built.callback(worker.close)  # before the server's, which waits for calls under way
        server.start()
        registration = worker.registration()
        registry.register(settings.runtime, registration)
        built.callback(registry.unregister, settings.runtime, registration)
        with _told_to_end() as told:
            remote = f" and {settings.api.listen}" if settings.api.listen else ""
            _log.info("%s is served at %s%s", settings.dataset.name, worker.socket, remote)
            tell_systemd("READY=1")
            told(None)
            tell_systemd("STOPPING=1")
            _drain(worker, patience, told)


def _drain(worker: "RemoteControl", patience: float, told: Callable[[float], bool]) -> None:
    deadline = time.monotonic() + patience
    while True:
        left = max(0.0, deadline - time.monotonic())
        done = worker.drain(timeout=min(_LOOK, left))
        if done["drained"]:
            _log.info("drained")
            return
        if left <= 0 or (done["stuck"] and not done["loads"]) or told(0):
            break
    _log.warning(
        "not drained: %d load jobs run, %d operations (%d bytes) wait for the next worker",
        done["loads"], done["pending"], done["bytes"],
    )  # fmt: skip


@contextmanager
def _told_to_end() -> Iterator[Callable[[float | None], bool]]:
    """What waits, for seconds or for ever, until a signal comes that ends us; whether one came.

    They only wake it up in this block, so that nothing is torn in the middle.
    """
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)

    def told(seconds: float | None) -> bool:
        if not select.select([wake], [], [], seconds)[0]:
            return False
        with suppress(BlockingIOError):
            os.read(wake, 64)
        return True

    before = {number: signal.signal(number, _noted) for number in _ENDING}
    waker = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    try:
        yield told
    finally:
        signal.set_wakeup_fd(waker)
        # What is taken down now is taken down whole: it is bounded.
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        os.close(wake)
        os.close(woken)


def _noted(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor has the rest."""
