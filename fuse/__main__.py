"""
`python -m fuse`: the daemon behind a mount. Started by `datacache mount`, not by people.

It reads its settings as JSON from standard input (so no argument holds a secret), builds the worker,
mounts, and writes exactly one line to the descriptor that it was given: `{"ok": true, "pid": P}` once
the mount answers and can be found in the registry, or `{"error": "...", "exit": 1|2}` when it cannot
be. Then it serves until somebody unmounts it or it is told to end.

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
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from datacache.cluster import registry
from datacache.cluster.server import ControlServer
from datacache.config.parsing import load_settings
from datacache.config.settings import Settings
from datacache.errors import DatacacheError, MountError, SettingError
from datacache.telemetry import set_up_logging
from datacache.worker import Worker
from fuse import mountpoint
from fuse.filesystem import FileSystem
from fuse.pyfuse import Mount

log = logging.getLogger("fuse")

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Stopped(BaseException):
    """A signal came before the mount was there to be served, or while it is taken down."""


class _Answer:
    """The one line that whoever started us waits for."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def mounted(self) -> None:
        self._write({"ok": True, "pid": os.getpid()})

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
    parser.add_argument("--ready-fd", type=int, required=True, help="where the one line goes")
    answer = _Answer(parser.parse_args(arguments).ready_fd)
    try:
        with _signals():
            settings = load_settings(sys.stdin.read())
            set_up_logging(level=settings.log_level, style=settings.log_format, file=settings.log_file)
            serve(settings, mounted=answer.mounted)
    except _Stopped as stopped:
        return answer.failed(f"ended by {stopped} before it was mounted", 1)
    except DatacacheError as error:
        return answer.failed(str(error), 2 if isinstance(error, SettingError) else 1)
    except Exception as error:
        log.exception("the daemon failed")
        return answer.failed(f"internal error, see the log: {type(error).__name__}: {error}", 1)
    return 0


def serve(settings: Settings, *, mounted: Callable[[], None]) -> None:
    """Mount, call `mounted` when it answers, serve until the mount is gone, take everything down."""
    directory = settings.mount.directory
    mountpoint.clean_stale(directory)
    mountpoint.check_target(directory, [settings.state, *(tier.path for tier in settings.cache.tiers)])
    with contextlib.ExitStack() as built:
        worker = built.enter_context(Worker(settings, mount=directory))
        control = ControlServer(worker, worker.socket, metrics=settings.metrics)
        built.callback(control.close)
        built.callback(worker.close)  # before the control server's, which waits for calls under way
        files = FileSystem(
            worker.index,
            worker.reader,
            settings.mount,
            tiers={tier.name: worker.cache.tier(tier.name) for tier in worker.cache.stats()},
        )
        built.callback(files.close)
        registration = worker.registration()
        driver = built.enter_context(Mount(files, settings.mount, source=registration.uris[0]))
        shown = mountpoint.is_mounted(directory)
        if shown is None:
            raise MountError(f"{directory}: mounted, and gone again before it was served")
        take_off = functools.partial(_take_off, directory, shown.device)
        built.callback(take_off)
        worker.attach("mount_requests", driver.requests)
        worker.attach("mount_files", files.stats)
        control.start()

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


def _take_off(directory: str, device: str) -> None:
    """Unmount `directory` if it is still ours that is mounted there: it may be somebody's successor."""
    mount = mountpoint.is_mounted(directory)
    if mount is None or mount.device != device:
        return
    try:
        mountpoint.unmount(directory, lazy=True)
    except MountError as error:
        log.error("%s; it will be stale", error)


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
