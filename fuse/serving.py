"""
A mount on top of a worker: the file system, the session that answers, and what is asked of the kernel first.

For whoever has a worker and the descriptor of a mount: the daemon behind a broker (`fuse.__main__`), and a
worker that is handed the mount of a volume (`volume`).
"""

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from datacache.config.settings import Settings, UploadMode
from datacache.worker import Worker
from fuse.connection import Agreement, Backings, Device, forget_backings
from fuse.filesystem import FileSystem
from fuse.session import Session, WritableSession

if TYPE_CHECKING:
    from fuse.filesystem import Backings as Registered

log = logging.getLogger(__name__)

WORK_OFF = 45.0
"""Seconds for which requests of a mount that is gone may still be under way: a store that is away is waited
for 30 s."""


def file_system(
    worker: Worker, *, backings: "Registered | None" = None, life: int = 0, kernel_writes: bool = False
) -> FileSystem:
    """The file system of a worker's data set, for one mount. `life` counts those that served the mount
    before; `kernel_writes`: writers are the kernel's own (`kernel_writes` below)."""
    settings = worker.settings
    tiers = {tier.name: worker.cache.tier(tier.name) for tier in worker.cache.stats()}
    if worker.writing is None:
        return FileSystem(
            worker.index, worker.reader, settings.mount, tiers=tiers, backings=backings, life=life
        )
    from fuse.writable import WritableFileSystem  # most data sets are only read

    return WritableFileSystem(
        worker.writing.overlay, worker.reader, settings.mount, tiers=tiers, backings=backings, life=life,
        durability=settings.writing.durability, counted=not kernel_writes,
        early=worker.writing.early, stores=settings.upload.mode is UploadMode.SYNC,
    )  # fmt: skip


def session_of(files: FileSystem, descriptor: int, agreement: Agreement, settings: Settings) -> Session:
    """What answers for `files` on a connection."""
    served_by: type[Session] = WritableSession if files.writable else Session
    return served_by(
        files, descriptor, agreement,
        max_threads=settings.mount.max_threads, max_idle_threads=settings.mount.max_idle_threads,
    )  # fmt: skip


def kernel_writes(settings: Settings, descriptor: int) -> bool:
    """Whether the kernel will write landing files itself, on a connection that has passthrough: we may need a
    privilege for that, and the landing zone another file system. Where it does not, we write, and writers are
    counted."""
    from datacache.writing.opening import landing_directory

    if not settings.writing.enabled:
        return False
    device, directory = Device(descriptor), landing_directory(settings)
    with contextlib.suppress(OSError):
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            device.close(device.open(probe.fileno()))
            return True
    return False


def close_old_backings(device: Device) -> None:
    """Take back what daemons before us had the kernel read: what is open goes on, what is not can be freed.
    In a thread, since there may be many."""
    probe = os.memfd_create("probe")
    try:
        newest = device.open(probe)
        device.close(newest)
    except OSError:
        return  # we have not the privilege that they had: the first file to be passed through says so
    finally:
        os.close(probe)
    threading.Thread(
        target=forget_backings, args=(device, newest), name="forget-backings", daemon=True
    ).start()


class Serving:
    """The mount of a volume, as a worker serves it. Made, started, and then either left to the next worker
    (`leave`) or, when it is gone, done with (`close`)."""

    def __init__(
        self, worker: Worker, descriptor: int, agreement: Agreement, *, life: int, kernel_writes: bool,
        gone: Callable[[], None],
    ) -> None:  # fmt: skip
        """`life` counts the workers that began to serve it before; `kernel_writes` as of `file_system`.
        `gone` is called, from another thread, when the mount is, unless it was left."""
        self._worker, self._descriptor, self._life, self._gone = worker, descriptor, life, gone
        self._backings = Backings(Device(descriptor)) if agreement.passthrough else None
        self._files = file_system(worker, backings=self._backings, life=life, kernel_writes=kernel_writes)
        self._session = session_of(self._files, descriptor, agreement, worker.settings)
        with contextlib.ExitStack() as attached:
            attached.callback(worker.on_replaced(self._session.superseded))
            attached.callback(worker.attach("mount_requests", self._session.requests))
            attached.callback(worker.attach("mount_files", self._files.stats))
            self._attached = attached.pop_all()

    def __repr__(self) -> str:
        return f"<Serving {self._session!r}>"

    def start(self) -> None:
        """Begin to answer, first of all what earlier workers have left unanswered."""
        os.set_blocking(self._descriptor, True)  # whoever refused before may have died of it
        if self._life and self._backings is not None:
            close_old_backings(Device(self._descriptor))
        with contextlib.suppress(OSError):  # it is gone: whoever reads it is told so
            self._session.resend()
        self._session.start()
        threading.Thread(target=self._wait, name="fuse-gone", daemon=True).start()

    def _wait(self) -> None:
        self._session.wait()
        if not self._session.ending:
            self._gone()

    def leave(self) -> None:
        """Answer nothing more: the next worker does, of what is open, too. This process has to end soon: a
        thread of it may yet take a request, which is sent again when it has ended."""
        self._session.end()
        if self._backings is not None:
            self._backings.leave()
        self._files.leave()
        self._attached.close()
        self._files.close()

    def close(self) -> bool:
        """The mount is gone: nobody has anything open any more. False: some of what was asked of it is still
        under way."""
        self._attached.close()
        done = self._session.join(WORK_OFF)
        if not done:
            log.error("requests of a mount that is gone are still under way: %r", self._session)
        self._files.close()
        if self._worker.writing is not None:
            self._worker.writing.overlay.forsaken()
        return done
