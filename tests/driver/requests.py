"""Requests as the kubelet sends them."""

from collections.abc import Mapping
from pathlib import Path

from csi.v1 import csi_pb2 as v1

MODE = v1.VolumeCapability.AccessMode
URI = {"uri": "s3://bucket/train"}
VOLUME = "pv-train"


def capability(mode: "MODE.Mode" = MODE.MULTI_NODE_MULTI_WRITER, *flags: str) -> v1.VolumeCapability:
    """How a pod wants its volume."""
    return v1.VolumeCapability(
        mount=v1.VolumeCapability.MountVolume(mount_flags=flags), access_mode=MODE(mode=mode)
    )


class Kubelet:
    """The kubelet's directory, and what it asks for one volume."""

    def __init__(self, root: Path, volume: str = VOLUME) -> None:
        self.root, self.volume = root, volume
        self.staging = root / "plugins" / volume / "globalmount"

    def make(self) -> "Kubelet":
        """Make the directories that are there before a driver is asked."""
        (self.root / "plugins_registry").mkdir(parents=True, exist_ok=True)
        self.staging.mkdir(parents=True, exist_ok=True)
        return self

    def target(self, pod: str) -> Path:
        where = self.root / "pods" / pod / "volumes" / "kubernetes.io~csi" / self.volume
        where.mkdir(parents=True, exist_ok=True)
        return where / "mount"

    def stage(
        self, context: Mapping[str, str] = URI, *, mode: "MODE.Mode" = MODE.MULTI_NODE_MULTI_WRITER,
        flags: tuple[str, ...] = (), secrets: Mapping[str, str] | None = None,
    ) -> v1.NodeStageVolumeRequest:  # fmt: skip
        return v1.NodeStageVolumeRequest(
            volume_id=self.volume, staging_target_path=str(self.staging), volume_context=context,
            volume_capability=capability(mode, *flags), secrets=secrets or {},
        )  # fmt: skip

    def unstage(self) -> v1.NodeUnstageVolumeRequest:
        return v1.NodeUnstageVolumeRequest(volume_id=self.volume, staging_target_path=str(self.staging))

    def publish(
        self, pod: str, *, mode: "MODE.Mode" = MODE.MULTI_NODE_MULTI_WRITER, flags: tuple[str, ...] = (),
        readonly: bool = False, context: Mapping[str, str] = URI,
    ) -> v1.NodePublishVolumeRequest:  # fmt: skip
        return v1.NodePublishVolumeRequest(
            volume_id=self.volume, staging_target_path=str(self.staging), target_path=str(self.target(pod)),
            volume_capability=capability(mode, *flags), readonly=readonly, volume_context=context,
        )  # fmt: skip

    def unpublish(self, pod: str) -> v1.NodeUnpublishVolumeRequest:
        return v1.NodeUnpublishVolumeRequest(volume_id=self.volume, target_path=str(self.target(pod)))

    def stats(self, path: Path) -> v1.NodeGetVolumeStatsRequest:
        return v1.NodeGetVolumeStatsRequest(volume_id=self.volume, volume_path=str(path))
