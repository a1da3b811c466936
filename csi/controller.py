"""
The controller service: volumes of a StorageClass.

Such a volume shows what the parameters of its class name. Nothing is made for it and nothing is kept of it:
the data lie in the bucket, before and after, and what a node has to know travels in the volume's attributes.
So every call gives the same answer however often, and wherever, it is made. A bucket has no size, so a
volume says none.
"""

from collections.abc import Mapping

from csi import volume
from csi.v1 import csi_pb2 as v1
from datacache.errors import SettingError


class Controller:
    """`environment`: of this process, as far as defaults of settings depend on it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def create_volume(self, request: v1.CreateVolumeRequest, *, within: float) -> v1.CreateVolumeResponse:
        name = volume.required(request.name, "name")
        _check(list(request.volume_capabilities))
        if request.HasField("volume_content_source"):
            raise SettingError("dataSource", "", "none: a volume shows its bucket, nothing is copied")
        made = volume.created(name)
        attributes = volume.attributes(request.parameters)
        volume.settings(made, attributes, read_only=False, environment=self._environment)
        return v1.CreateVolumeResponse(volume=v1.Volume(volume_id=made, volume_context=attributes))

    def delete_volume(self, request: v1.DeleteVolumeRequest, *, within: float) -> v1.DeleteVolumeResponse:
        """Nothing to do: what is in the bucket is nobody's to delete here."""
        volume.identity(request.volume_id)
        return v1.DeleteVolumeResponse()

    def validate_volume_capabilities(
        self, request: v1.ValidateVolumeCapabilitiesRequest, *, within: float
    ) -> v1.ValidateVolumeCapabilitiesResponse:
        volume_id = volume.identity(request.volume_id)
        if not request.volume_capabilities:
            raise SettingError("volume_capabilities", "", "at least one")
        volume.check_exists(volume_id, request.volume_context)
        try:
            _check(list(request.volume_capabilities))
        except SettingError as error:
            return v1.ValidateVolumeCapabilitiesResponse(message=str(error))
        confirmed = v1.ValidateVolumeCapabilitiesResponse.Confirmed(
            volume_context=request.volume_context, volume_capabilities=request.volume_capabilities,
            parameters=request.parameters,
        )  # fmt: skip
        return v1.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)

    def controller_get_capabilities(
        self, request: v1.ControllerGetCapabilitiesRequest, *, within: float
    ) -> v1.ControllerGetCapabilitiesResponse:
        kind = v1.ControllerServiceCapability.RPC.CREATE_DELETE_VOLUME
        rpc = v1.ControllerServiceCapability.RPC(type=kind)
        return v1.ControllerGetCapabilitiesResponse(capabilities=[v1.ControllerServiceCapability(rpc=rpc)])


def _check(capabilities: list[v1.VolumeCapability]) -> None:
    if not capabilities:
        raise SettingError("volume_capabilities", "", "at least one")
    for capability in capabilities:
        volume.check_capability(capability)
