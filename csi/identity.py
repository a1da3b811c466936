"""The identity service: who we are."""

from google.protobuf.wrappers_pb2 import BoolValue

from csi.v1 import csi_pb2 as v1
from datacache.kube.release import DRIVER


class Identity:
    """What the kubelet, and a provisioner, ask first."""

    def __init__(self, version: str) -> None:
        self._version = version

    def get_plugin_info(self, request: v1.GetPluginInfoRequest, *, within: float) -> v1.GetPluginInfoResponse:
        return v1.GetPluginInfoResponse(name=DRIVER, vendor_version=self._version)

    def get_plugin_capabilities(
        self, request: v1.GetPluginCapabilitiesRequest, *, within: float
    ) -> v1.GetPluginCapabilitiesResponse:
        kinds = (v1.PluginCapability.Service.CONTROLLER_SERVICE,)
        capabilities = [v1.PluginCapability(service=v1.PluginCapability.Service(type=kind)) for kind in kinds]
        return v1.GetPluginCapabilitiesResponse(capabilities=capabilities)

    def probe(self, request: v1.ProbeRequest, *, within: float) -> v1.ProbeResponse:
        return v1.ProbeResponse(ready=BoolValue(value=True))
