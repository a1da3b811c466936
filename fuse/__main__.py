"""
`python -m fuse`: what is behind a mount. Started by `datacache mount`, not by people.

It reads its settings as JSON from standard input (so no argument holds a secret) and writes exactly
one line to the descriptor that it was given: `{"ok": true, "pid": P}` once the mount answers and can be
found in the registry, or `{"error": "...", "exit": 1|2}` when it cannot be. Then it serves until somebody
unmounts it or it is told to end.

With the portable driver this one process mounts and serves. With the native driver it is the broker,
which mounts and starts this program again, with `--handover`, as the daemon that serves; and again
when that one has died. With `--fd` the broker keeps a connection that somebody else opened and mounted, as
a CSI driver does: it then neither mounts nor unmounts.

Everything that is built is on one stack: whatever happens, and wherever, it is taken down in reverse
order, and nothing stays mounted, locked or registered. Only after a SIGKILL something does: a stale
mount and a registration, which the next `datacache mount` or `umount` clears away.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from datacache.cluster import registry
from datacache.config.parsing import dump_settings, load_settings
from datacache.config.settings import IO, Settings
from datacache.errors import DatacacheError, MountError, NoSuchSnapshot, SettingError
from datacache.model import Medium, MiB
from datacache.telemetry import set_up_logging
from fuse import broker, mountpoint
from fuse.broker import Handover

if TYPE_CHECKING:
    from datacache.cluster.registry import Registration
    from datacache.worker import Worker
    from fuse.filesystem import Backings, FileSystem

log = logging.getLogger("fuse")

SMALL = 1 * MiB
"""Bytes of a file, on average, up to which `--io auto` takes the page cache for a snapshot: below, opens and
closes cost more than reads."""

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Stopped(BaseException):
    """A signal came before the mount was there to be served, or while it is taken down."""


class _Answer:
    """The one line that whoever started us waits for."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def mounted(self, **more: object) -> None:
        self._write({"ok": True, "pid": os.getpid(), **more})

    def failed(self, error: str, code: int) -> int:
        """Say why there is no mount; the exit code."""
        log.error("%s", error)
        self._write({"error": error, "exit": code})
        return code

    def _write(self, answer: dict[str, object]) -> None:
        if self._descriptor < 0:
            return  # said already: a mount that fails later only logs
        # Who started us may have given up waiting; that is theirs to act on.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._descriptor, json.dumps(answer).encode() + b"\n")
        os.close(self._descriptor)
        self._descriptor = -1


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuse", description=__doc__)
    parser.add_argument("--ready-fd", type=int, default=-1, help="where the one line goes")
    parser.add_argument("--answer-fd", type=int, default=-1, help="answer beside the owner at this socket")
    parser.add_argument("--counts-fd", type=int, default=-1, help="where an answerer counts")
    parser.add_argument("--fd", type=int, help="serve this connection, which somebody else opened and mounts")
    parser.add_argument("--handover", type=Handover.load, help="serve the mount that a broker hands over")
    args = parser.parse_args(arguments)
    if args.ready_fd < 0 and args.answer_fd < 0:
        parser.error("one of --ready-fd and --answer-fd is needed")
    answer = _Answer(args.ready_fd)
    try:
        with _signals():
            settings = load_settings(_all_of(sys.stdin.fileno()))
            set_up_logging(level=settings.log_level, style=settings.log_format, file=settings.log_file)
            if args.answer_fd >= 0:
                answer_beside(settings, args.handover, args.answer_fd, args.counts_fd)
            elif args.handover is not None:
                serve_handed_over(settings, args.handover, serving=answer.mounted)
            elif mountpoint.is_native(settings.mount.driver):
                keep_served(settings, mounted=answer.mounted, inherited=args.fd)
            elif args.fd is not None:
                raise SettingError("driver", settings.mount.driver, "native, for a descriptor")
            else:
                serve_portably(settings, mounted=answer.mounted)
    except _Stopped as stopped:
        return answer.failed(f"ended by {stopped} before it was mounted", 1)
    except DatacacheError as error:
        return answer.failed(str(error), 2 if isinstance(error, SettingError) else 1)
    except Exception as error:
        log.exception("the daemon failed")
        return answer.failed(f"internal error, see the log: {type(error).__name__}: {error}", 1)
    return 0


# ---- which driver, which way ---------------------------------------------------------------------


def chosen_io(settings: Settings) -> IO:
    """What `--io auto` means for a data set. Raises NoSuchSnapshot."""
    in_memory = any(tier.medium is Medium.MEM for tier in settings.cache.tiers)
    if settings.mount.io is IO.PAGECACHE and in_memory:
        log.warning("--io pagecache over a mem: tier: what is read stands in memory twice")
    if settings.mount.io is not IO.AUTO:
        return settings.mount.io
    if not settings.index.snapshot or in_memory:
        return IO.PASSTHROUGH
    from datacache.index.snapshot import list_snapshots

    for known in list_snapshots(settings.state):
        if known.name == settings.index.snapshot:
            fits = known.bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
            small = known.bytes <= known.files * SMALL
            return IO.PAGECACHE if small and fits else IO.PASSTHROUGH
    raise NoSuchSnapshot(f"there is no snapshot {settings.index.snapshot!r} of {settings.dataset.name}")


# ---- the native driver ---------------------------------------------------------------------------


def keep_served(settings: Settings, *, mounted: Callable[[], None], inherited: int | None = None) -> None:
    """Be the broker of a mount, until it is gone; of the connection `inherited`, where there is one."""
    io, dataset = chosen_io(settings), settings.dataset
    broker.check_processes(settings, stateless=io is IO.PAGECACHE)
    control = registry.socket_path(
        settings.runtime, dataset=dataset.name, mount=settings.mount.directory, pid=os.getpid()
    )
    registry.make_private(settings.runtime)
    broker.serve(
        settings,
        source=dataset.manifest or dataset.mounts[0].uri,
        stateless=io is IO.PAGECACHE,
        passthrough=io is IO.PASSTHROUGH,
        control=control,
        mounted=mounted,
        inherited=inherited,
    )


def serve_handed_over(settings: Settings, handed: Handover, *, serving: Callable[..., None]) -> None:
    """Be a daemon of a mount that a broker keeps, until the mount is gone or it is told to end."""
    from fuse.answerer import Answerers, processors
    from fuse.connection import Backings, Device
    from fuse.serving import close_old_backings, session_of

    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as knob:
        knob.write(handed.oom_score_adj)
    agreement, device = handed.agreement, Device(handed.descriptor)
    backings = Backings(device) if agreement.passthrough else None
    with (
        _built(settings, backings=backings, handed=handed) as (worker, files, offer),
        contextlib.ExitStack() as beside,
    ):
        session = session_of(files, handed.descriptor, agreement, settings)
        worker.on_replaced(session.superseded)
        requests = session.requests
        if handed.life and agreement.passthrough:
            close_old_backings(device)
        orphaned = threading.Event()
        shown = mountpoint.is_mounted(settings.mount.directory)

        def end(number: int, frame: FrameType | None) -> None:
            # A broker would unmount before it tells us.
            if orphaned.is_set() and shown is not None:
                mountpoint.take_off(shown.directory, shown.device)
            session.end()

        for number in _ENDING:
            signal.signal(number, end)
        session.start(resend=handed.life > 0)
        count = settings.mount.processes or processors()
        if count > 1:
            answerers = Answerers(count - 1, dump_settings(worker.settings), handed, session)
            beside.callback(answerers.close)
            worker.attach("answerers", lambda: {"pids": answerers.pids()})

            def requests() -> dict[str, int]:
                return dict(Counter(session.requests()) + Counter(answerers.requests()))

        worker.attach("mount_requests", requests)
        offer()  # after the requests that wait: it imports much
        registration = worker.registration()
        registry.register(settings.runtime, registration)
        _outlive(handed.broker, settings.runtime, registration, orphaned)
        serving(index=worker.index.identity)
        log.info("%s is served at %s", settings.dataset.name, settings.mount.directory)
        session.wait()
        _deaf()
        if session.ending and backings is not None:
            backings.leave()
        if session.ending and not orphaned.is_set():
            files.leave()
        if orphaned.is_set() or not session.ending:
            registry.clear(worker.socket)
            log.info("%s: unmounted", settings.mount.directory)


def answer_beside(settings: Settings, handed: Handover, owner: int, counts: int) -> None:
    """Be a process that answers beside the one that owns the data set, until that one ends."""
    from fuse.answerer import answer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the broker's; our end is the owner's
    answer(settings, handed, socket.socket(fileno=owner), counts)


def _outlive(pid: int, runtime: str, registration: "Registration", orphaned: threading.Event) -> None:
    """When the broker is killed, the mount goes on, and is known by this process."""
    try:
        broker_ends = os.pidfd_open(pid)
    except ProcessLookupError:
        broker_ends = -1

    def wait() -> None:
        if broker_ends >= 0:
            select.select([broker_ends], [], [])
            os.close(broker_ends)
        log.error("the broker is gone: the mount ends with this process")
        orphaned.set()
        registry.register(runtime, replace(registration, pid=os.getpid()))

    threading.Thread(target=wait, name="broker-watch", daemon=True).start()


def serve_portably(settings: Settings, *, mounted: Callable[[], None]) -> None:
    """Mount by pyfuse3, call `mounted` when it answers, serve until the mount is gone, take all down."""
    if settings.mount.processes != 1:
        raise SettingError("processes", settings.mount.processes, "1, with the pyfuse3 driver")
    from fuse.pyfuse import Mount

    directory = settings.mount.directory
    mountpoint.clean_stale(directory)
    mountpoint.check_target(directory, mountpoint.places(settings))
    with _built(settings) as (worker, files, offer), contextlib.ExitStack() as built:
        offer()
        registration = worker.registration()
        driver = built.enter_context(Mount(files, settings.mount, source=registration.uris[0]))
        shown = mountpoint.is_mounted(directory)
        if shown is None:
            raise MountError(f"{directory}: mounted, and gone again before it was served")
        take_off = functools.partial(mountpoint.take_off, directory, shown.device)
        built.callback(take_off)
        worker.attach("mount_requests", driver.requests)

        def started() -> None:
            # After INIT: answering it resets the read-ahead.
            mountpoint.set_read_ahead(directory, settings.mount.read_ahead)
            registry.register(settings.runtime, registration)
            built.callback(registry.unregister, settings.runtime, registration)
            mounted()
            log.info("%s is mounted at %s", registration.dataset, directory)

        driver.serve(started=started, detach=take_off)
        _deaf()
        log.info("%s: unmounted", directory)


# ---- in common -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _built(
    settings: Settings, *, backings: "Backings | None" = None, handed: Handover | None = None
) -> "Iterator[tuple[Worker, FileSystem, Callable[[], None]]]":
    """A worker, the file system on top of it, and what lets the worker answer on its control socket."""
    from datacache.worker import Worker
    from fuse import serving

    life = handed.life if handed is not None else 0
    kernel_writes = (
        handed is not None and backings is not None and serving.kernel_writes(settings, handed.descriptor)
    )
    with contextlib.ExitStack() as built:
        worker = built.enter_context(
            Worker(
                settings, mount=settings.mount.directory, pid=handed.broker if handed is not None else None,
                resumed=life > 0, index=handed.index if handed is not None else "",
                passthrough=kernel_writes,
            )
        )  # fmt: skip
        offered = built.enter_context(contextlib.ExitStack())
        built.callback(worker.close)  # before the control server's, which waits for calls under way
        files = serving.file_system(worker, backings=backings, life=life, kernel_writes=kernel_writes)
        built.callback(files.close)
        worker.attach("mount_files", files.stats)

        def offer() -> None:
            from datacache.cluster.server import ControlServer

            control = ControlServer(worker, worker.socket, metrics=settings.metrics, remote=settings.api)
            offered.callback(control.close)
            control.start()

        yield worker, files, offer


def _all_of(descriptor: int) -> str:
    """Everything that comes from a pipe. A signal that arrives between two reads ends this, too: a plain
    read would wait on, with the handler due only after it."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    before = signal.set_wakeup_fd(woken)
    text = bytearray()
    try:
        while True:
            select.select([descriptor, wake], [], [])
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                return text.decode()
            text += piece
    finally:
        signal.set_wakeup_fd(before)
        os.close(wake)
        os.close(woken)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """A signal that ends us raises in this block, so that what is built is taken down."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        _deaf()
        raise _Stopped(signal.Signals(number).name)

    for number in _ENDING:
        signal.signal(number, stop)
    try:
        yield
    finally:
        _deaf()


def _deaf() -> None:
    """Let no signal but SIGKILL disturb the taking down, which is bounded."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
