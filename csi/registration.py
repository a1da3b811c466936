"""
How the kubelet finds us: a second socket, in a directory that it watches.

It asks there who we are and where our calls are answered, and says what became of it. So no registrar runs
beside us.
"""

import logging

from csi.v1 import registration_pb2 as v1
from datacache.kube.release import DRIVER

log = logging.getLogger(__name__)

_VERSIONS = ("1.0.0",)
"""Of CSI: what the kubelet takes for `csi.v1`."""


class Registration:
    """`endpoint`: the path of the socket that answers the calls of CSI."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def get_info(self, request: v1.InfoRequest, *, within: float) -> v1.PluginInfo:
        return v1.PluginInfo(
            type="CSIPlugin", name=DRIVER, endpoint=self._endpoint, supported_versions=_VERSIONS
        )

    def notify_registration_status(
        self, request: v1.RegistrationStatus, *, within: float
    ) -> v1.RegistrationStatusResponse:
        if request.plugin_registered:
            log.info("the kubelet has registered us")
        else:
            log.error("the kubelet has not registered us: %s", request.error)
        return v1.RegistrationStatusResponse()
