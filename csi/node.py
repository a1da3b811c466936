"""
The node service: a data set is mounted once on a node (stage), and bound to each pod that uses it (publish).

Every call does what is missing and no more, so it may be made again after anything: after an answer that was
lost, and after a kill of this process between any two steps. What is there is read from the mount table each
time. Two calls for one volume at once would get into each other's way: the second is told to come again.

The volume of a Dataset is served by the Dataset's worker, another is mounted by itself; what is mounted once
is bound to pods in the same way.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from csi import volume
from csi.mounter import DatasetMounter, Mounted, Mounter
from csi.records import Record, Records, digest
from csi.v1 import csi_pb2 as v1
from datacache.errors import (
    MountError,
    NoSuchVolume,
    NotStaged,
    SettingError,
    TookTooLong,
    VolumeBusy,
    VolumeDiffers,
    VolumeInUse,
)
from datacache.kube.release import DRIVER

log = logging.getLogger(__name__)

HOSTNAME = f"{DRIVER}/hostname"
"""The label that the kubelet gives its node from what we say: which one it is."""
MAX_VOLUMES = 64
"""Data sets on a node at most (docs/limits.md)."""
_NAMED = 3


class Node:
    """`kubelet`: the kubelet's directory; `environment`: of this process, for defaults of settings."""

    def __init__(
        self, mounter: Mounter, datasets: DatasetMounter, records: Records, *, node_id: str, kubelet: str,
        environment: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._mounter, self._datasets, self._records = mounter, datasets, records
        self._node_id, self._kubelet, self._environment = node_id, kubelet, environment
        self._lock = threading.Lock()
        self._busy: set[str] = set()

    def __repr__(self) -> str:
        return f"<Node {self._node_id}>"

    def go_on(self) -> None:
        """Take up what a process before us has staged. What cannot be holds up nothing else: each call for
        that volume says why."""
        for record in self._records.all():
            if record.dataset:
                try:
                    self._datasets.expect(record.dataset)
                except MountError as error:
                    log.error("%s: %s", record.volume, error)

    # ---- once a node -----------------------------------------------------------------------------

    def node_stage_volume(
        self, request: v1.NodeStageVolumeRequest, *, within: float
    ) -> v1.NodeStageVolumeResponse:
        volume_id = volume.identity(request.volume_id)
        staging = self._place(request.staging_target_path, "staging_target_path")
        volume.check_capability(request.volume_capability)
        read_only = volume.is_read_only(request.volume_capability)
        dataset = volume.dataset(volume_id, request.volume_context)
        tree: dict[str, str | list[str]] = {}
        if dataset is None:
            tree = volume.settings(
                volume_id, request.volume_context, read_only=read_only, environment=self._environment
            )
        attributes = tree if dataset is None else {"dataset": str(dataset), "rw": not read_only}
        secrets = volume.check_secrets(request.secrets)
        record = Record(volume_id, staging, digest(attributes), dataset.uid if dataset is not None else "")
        with self._alone(volume_id):
            shown = self._ours(staging)
            known = self._records.get(volume_id)
            if known is not None and known.staging != staging and self._ours(known.staging) is not None:
                raise VolumeDiffers(f"{volume_id} is staged at {known.staging}, not at {staging}")
            if shown is not None and known is not None and known.attributes != record.attributes:
                raise VolumeDiffers(
                    f"{volume_id} is staged with other attributes, which stay until no pod uses it"
                )
            self._records.put(record)
            try:
                if dataset is None:
                    self._mounter.show(staging, tree, secrets, within=within)
                else:
                    self._datasets.show(
                        dataset.uid, staging, name=str(dataset), writable=not read_only,
                        used=bool(self._published(staging)), within=within,
                    )  # fmt: skip
            except (SettingError, MountError, TookTooLong):
                if self._mounter.at(staging) is None:
                    self._records.drop(volume_id)
                raise
        return v1.NodeStageVolumeResponse()

    def node_unstage_volume(
        self, request: v1.NodeUnstageVolumeRequest, *, within: float
    ) -> v1.NodeUnstageVolumeResponse:
        volume_id = volume.identity(request.volume_id)
        staging = self._place(request.staging_target_path, "staging_target_path")
        with self._alone(volume_id):
            known = self._records.get(volume_id)
            dataset = known.dataset if known is not None else ""
            if self._ours(staging) is not None:
                if binds := self._published(staging):
                    places = ", ".join(sorted(binds)[:_NAMED])
                    raise VolumeInUse(f"{volume_id} is still published ({len(binds)}: {places})")
                if owed := self._datasets.owed(dataset) if dataset else self._mounter.owed(staging):
                    raise VolumeInUse(
                        f"{volume_id}: {owed} not in the bucket yet; the mount stays until they are"
                    )
                if not dataset:
                    self._mounter.take_off(staging, within=within)
            if dataset:
                self._datasets.take_off(dataset, staging)
            self._records.drop(volume_id)
        return v1.NodeUnstageVolumeResponse()

    # ---- for each pod ----------------------------------------------------------------------------

    def node_publish_volume(
        self, request: v1.NodePublishVolumeRequest, *, within: float
    ) -> v1.NodePublishVolumeResponse:
        volume_id = volume.identity(request.volume_id)
        target = self._place(request.target_path, "target_path")
        volume.check_capability(request.volume_capability)
        volume.check_persistent(volume_id, request.volume_context)
        if not request.staging_target_path:
            raise NotStaged(f"{volume_id}: there is no staging_target_path")
        staging = self._place(request.staging_target_path, "staging_target_path")
        read_only = volume.is_read_only(request.volume_capability, asked=request.readonly)
        with self._alone(volume_id):
            staged = self._ours(staging)
            known = self._records.get(volume_id)
            if staged is None or (known is not None and known.staging != staging):
                raise NotStaged(f"{volume_id} is not staged at {staging}")
            self._check_answers(staging, known)  # else a pod would start on a mount that is dead
            there = self._ours(target)
            if there is not None and there.device != staged.device:
                log.warning("%s shows a mount that is gone; it is taken off", target)
                self._mounter.unbind(target)
                there = None
            if there is None:
                self._mounter.bind(staging, target, read_only=read_only)
            elif there.read_only != (staged.read_only or read_only):
                how = "read-only" if there.read_only else "writable"
                raise VolumeDiffers(f"{volume_id} is published {how} at {target}")
        return v1.NodePublishVolumeResponse()

    def node_unpublish_volume(
        self, request: v1.NodeUnpublishVolumeRequest, *, within: float
    ) -> v1.NodeUnpublishVolumeResponse:
        volume_id = volume.identity(request.volume_id)
        target = self._place(request.target_path, "target_path")
        with self._alone(volume_id):
            self._ours(target)
            self._mounter.unbind(target)
        return v1.NodeUnpublishVolumeResponse()

    # ---- questions -------------------------------------------------------------------------------

    def node_get_volume_stats(
        self, request: v1.NodeGetVolumeStatsRequest, *, within: float
    ) -> v1.NodeGetVolumeStatsResponse:
        volume_id = volume.identity(request.volume_id)
        path = volume.required(request.volume_path, "volume_path")
        shown = self._mounter.at(path) if os.path.isabs(path) else None
        if shown is None or not shown.ours:
            raise NoSuchVolume(f"{volume_id} is not at {path}")
        usage = self._mounter.usage(path)
        return v1.NodeGetVolumeStatsResponse(
            usage=[
                v1.VolumeUsage(
                    unit=v1.VolumeUsage.BYTES, total=usage.total, available=usage.available,
                    used=usage.total - usage.free,
                ),
                v1.VolumeUsage(
                    unit=v1.VolumeUsage.INODES, total=usage.files, available=usage.files_free,
                    used=usage.files - usage.files_free,
                ),
            ]
        )  # fmt: skip

    def node_get_capabilities(
        self, request: v1.NodeGetCapabilitiesRequest, *, within: float
    ) -> v1.NodeGetCapabilitiesResponse:
        rpc = v1.NodeServiceCapability.RPC
        return v1.NodeGetCapabilitiesResponse(
            capabilities=[
                v1.NodeServiceCapability(rpc=rpc(type=kind))
                for kind in (rpc.STAGE_UNSTAGE_VOLUME, rpc.GET_VOLUME_STATS)
            ]
        )

    def node_get_info(self, request: v1.NodeGetInfoRequest, *, within: float) -> v1.NodeGetInfoResponse:
        return v1.NodeGetInfoResponse(
            node_id=self._node_id, max_volumes_per_node=MAX_VOLUMES,
            accessible_topology=v1.Topology(segments={HOSTNAME: self._node_id}),
        )  # fmt: skip

    # ---- in common -------------------------------------------------------------------------------

    def _place(self, text: str, name: str) -> str:
        return volume.place(text, name, below=self._kubelet)

    def _published(self, staging: str) -> list[str]:
        """Where pods see what is mounted on `staging`. What the kernel shows elsewhere, because the kubelet's
        directory is there, too, goes with the mount itself."""
        return [bind for bind in self._mounter.binds(staging) if volume.is_below(bind, self._kubelet)]

    def _check_answers(self, staging: str, known: Record | None) -> None:
        """Raise MountError unless what is mounted on `staging` answers."""
        try:
            self._mounter.usage(staging)
        except MountError as error:
            if known is None or not known.dataset:
                raise
            raise MountError(self._datasets.trouble(known.dataset, staging)) from error

    def _ours(self, directory: str) -> Mounted | None:
        """What of ours is mounted on `directory`. Raises VolumeDiffers where somebody else's mount is."""
        there = self._mounter.at(directory)
        if there is not None and not there.ours:
            raise VolumeDiffers(f"something else is mounted on {directory}")
        return there

    @contextmanager
    def _alone(self, volume_id: str) -> Iterator[None]:
        with self._lock:
            if volume_id in self._busy:
                raise VolumeBusy(f"another call for {volume_id} is under way")
            self._busy.add(volume_id)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(volume_id)
