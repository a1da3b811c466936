"""
`datacache worker`: serve the cache of a data set, without a mount of its own, until it is told to end.

For a pod, or a service: it stays in the foreground and logs to standard error. The process is the worker
itself (`datacache.worker`) with its control API (`cluster.server`) and its place in the registry, as behind
a mount; there is no daemon in between. A signal drains it: it says that it is not ready, ends load jobs,
uploads what is owed, and then takes all down.

With `--volume-socket` it serves the data set's volume on this node, too, whenever the node plugin has one
mounted (`fuse.volume`). It may end at any moment: the node plugin keeps the mount for the next one.
"""

import argparse
import logging
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from datacache.cli import flags
from datacache.errors import ControlError, IndexBroken, SettingError
from datacache.model import parse_duration

if TYPE_CHECKING:
    from datacache.cluster.control import RemoteControl
    from datacache.config.settings import Settings
    from datacache.worker import Worker
    from fuse.volume import Volume

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
    parser.add_argument(
        "--volume-socket", metavar="PATH", default="",
        help="serve the volume that the node plugin of Kubernetes mounts of the data set; it listens there",
    )  # fmt: skip
    flags.add_dataset_flags(parser)
    flags.add_writing_flags(parser)
    flags.add_daemon_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve. 0 when it was told to end, and has."""
    patience = parse_duration(args.drain_timeout, name="--drain-timeout")
    if not 0 <= patience < float("inf"):
        raise SettingError("--drain-timeout", args.drain_timeout, "a duration, such as 20s")
    if args.volume_socket and not os.path.isabs(args.volume_socket):
        raise SettingError("--volume-socket", args.volume_socket, "an absolute path")
    settings = flags.read(args, args.uris)
    _check(settings)

    from datacache.telemetry import set_up_logging

    try:
        set_up_logging(level=settings.log_level, style=settings.log_format, file=settings.log_file)
    except OSError as error:
        expected = f"one that can be made and written ({error.strerror})"
        raise SettingError("--log-file", settings.log_file, expected) from error
    serve(settings, patience=patience, volume_socket=args.volume_socket)
    return 0


def _check(settings: "Settings") -> None:
    """Raise what can be seen to be wrong before anything is opened."""
    from datacache.cluster.credentials import admission
    from datacache.sources.opening import check_mount

    for point in settings.dataset.mounts:
        check_mount(point, settings.environment)
    admission(settings.api)


def serve(settings: "Settings", *, patience: float, volume_socket: str = "") -> None:
    """Serve until a signal comes; then drain for `patience` seconds at most. `volume_socket`: where the node
    plugin listens; empty: there is none. Raises ControlError when another process has to go on."""
    with _volume(settings, volume_socket) as volume:
        while not _serve(settings, volume, patience=patience):
            if volume is not None and volume.left:
                raise ControlError("this worker cannot go on with its mount; the next one does")
            for number in _ENDING:  # they were ignored while all was taken down
                signal.signal(number, signal.SIG_DFL)


def _volume(settings: "Settings", socket: str) -> "AbstractContextManager[Volume | None]":
    if not socket:
        return nullcontext()
    from fuse.volume import Volume

    return Volume(socket, settings)


def _serve(settings: "Settings", volume: "Volume | None", *, patience: float) -> bool:
    """Be a worker until a signal comes, or until `volume` needs another; whether there was a signal."""
    from datacache.cli.mount import tell_systemd
    from datacache.cluster import premises, registry
    from datacache.cluster.server import ControlServer

    premises.write(settings)  # first: a tier may wait for what the node's plugin mounts by it
    with ExitStack() as built:
        worker = built.enter_context(_worker(settings, volume))
        server = ControlServer(worker, worker.socket, metrics=settings.metrics, remote=settings.api)
        built.callback(server.close)
        built.callback(worker.close)  # before the server's, which waits for calls under way
        if volume is not None:
            built.callback(volume.leave)
            volume.serve(worker)  # first, since somebody may wait
        server.start()
        registration = worker.registration()
        registry.register(settings.runtime, registration)
        built.callback(registry.unregister, settings.runtime, registration)
        with _told_to_end() as told:
            remote = f" and {settings.api.listen}" if settings.api.listen else ""
            _log.info("%s is served at %s%s", settings.dataset.name, worker.socket, remote)
            tell_systemd("READY=1")
            if not told(None, volume):
                return False
            tell_systemd("STOPPING=1")
            _drain(worker, patience, told)
    return True


def _worker(settings: "Settings", volume: "Volume | None") -> "Worker":
    """A worker that goes on with the mount that there is."""
    from datacache.worker import Worker

    if volume is None:
        # A mount may go on while its worker is started anew, and have named versions to its kernel.
        return Worker(settings, resumed=True)
    begun = volume.begin()
    try:
        return Worker(settings, resumed=begun.resumed, index=begun.index, passthrough=begun.passthrough)
    except IndexBroken as broken:
        if not begun.index:
            raise
        volume.refuse(broken)  # it is of no use to anybody; the data set may be
        return Worker(settings)


def _drain(worker: "RemoteControl", patience: float, told: "Told") -> None:
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


class Told(Protocol):
    """Waits, for seconds or for ever (None), until a signal has come that ends us, or until something else
    can be read from; whether a signal has."""

    def __call__(self, seconds: float | None, other: "Volume | None" = None) -> bool: ...


@contextmanager
def _told_to_end() -> Iterator[Told]:
    """What waits for a signal that ends us. They only wake it up in this block, so that nothing is torn in
    the middle."""
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)

    def told(seconds: float | None, other: "Volume | None" = None) -> bool:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        if other is not None:
            poll.register(other, select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)
        try:
            return bool(os.read(wake, 64))
        except BlockingIOError:
            return False

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
