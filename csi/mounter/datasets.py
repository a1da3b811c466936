"""
Mounts of Datasets' volumes on a node: mounted by us, served by the Dataset's worker, held by both.

The mount is made, and agreed on with the kernel, before there is a worker: it is handed to the one that is
there, or comes. A mount is *dead* when both of its holders have ended: whoever uses it is told ENOTCONN, and
nothing can bring it back; it is taken off when no pod uses it any more.
"""

import errno
import logging
import os
import secrets
import time

from csi.mounter.holders import Holders
from datacache.config.settings import MountSettings
from datacache.errors import MountError, TookTooLong
from fuse import connection, mountpoint
from fuse.handing import Held

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that one call waits for a worker at most: the kubelet comes again, and a pod that is deleted
meanwhile waits for the call."""
_TAKING_DOWN = 2.0
"""Seconds of a call that are kept for taking down what it has begun."""

_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)


class LinuxDatasetMounter:
    """Implements `mounter.DatasetMounter` in the mount name space of this process."""

    def __init__(self, holders: Holders) -> None:
        self._holders = holders

    def __repr__(self) -> str:
        return f"<LinuxDatasetMounter {self._holders!r}>"

    def expect(self, uid: str) -> None:
        self._holders.listen(uid)

    def show(self, uid: str, directory: str, *, name: str, writable: bool, used: bool, within: float) -> None:
        deadline = time.monotonic() + max(0.0, min(PATIENCE, within - _TAKING_DOWN))
        self._holders.listen(uid)
        if mountpoint.is_mounted(directory) is not None and self._is_dead(uid, directory):
            if used:
                raise MountError(self.trouble(uid, directory))
            self.take_off(uid, directory)
        ours = mountpoint.is_mounted(directory) is None
        try:
            if ours:
                self._mount(uid, directory, name=name, writable=writable)
            self._wait(uid, directory, name=name, deadline=deadline)
        except BaseException:
            if ours:
                self.take_off(uid, directory)
            raise

    def _mount(self, uid: str, directory: str, *, name: str, writable: bool) -> None:
        if not mountpoint.is_native("auto"):
            raise MountError("volumes of Datasets need Linux 6.9 or newer on their node")
        if why := mountpoint.obstacle():
            raise MountError(why)
        descriptor = mountpoint.mount(directory, source=name, allow_other=True, writable=writable)
        try:
            agreement = connection.greet(descriptor, stateless=False, passthrough=True, writable=writable)
            mountpoint.set_read_ahead(directory, MountSettings.read_ahead)  # answering INIT has reset it
        except BaseException:
            os.close(descriptor)
            raise
        self._holders.hold(uid, Held(secrets.token_hex(8), agreement), descriptor)

    def _wait(self, uid: str, directory: str, *, name: str, deadline: float) -> None:
        """Until it is served."""
        begun = time.monotonic()
        if self._holders.serves(uid, within=max(0.0, deadline - begun)):
            return
        waited = f"after {time.monotonic() - begun:.0f} s; the kubelet tries again"
        if self._holders.connected(uid):
            raise TookTooLong(f"the worker of Dataset {name} on this node does not serve its volume {waited}")
        raise TookTooLong(
            f"no worker of Dataset {name} has come to this node {waited}, and events of the pod say why "
            "it does not"
        )

    def _is_dead(self, uid: str, directory: str) -> bool:
        return not self._holders.holds(uid) and mountpoint.statvfs(directory) in _DEAD

    def owed(self, uid: str) -> str:
        return self._holders.owed(uid)

    def take_off(self, uid: str, directory: str) -> None:
        if mountpoint.is_mounted(directory) is not None:
            try:
                mountpoint.unmount(directory, force=True)
            except MountError as busy:
                # It is aborted all the same. Who has something of it open there is no pod.
                log.warning("%s", busy)
                mountpoint.unmount(directory, lazy=True)
        self._holders.forget(uid)

    def trouble(self, uid: str, directory: str) -> str:
        if self._is_dead(uid, directory):
            return (
                "the node plugin and the worker of this volume have ended at the same time, and its mount "
                "with them: delete the pods of this node that use it, and it is mounted anew"
            )
        if not self._holders.connected(uid):
            return "no worker of the Dataset is on this node just now, so the volume does not answer"
        return "the worker of the Dataset does not answer"
