"""
The CSI driver: data sets as volumes of pods, through the kubelet.

`server` answers gRPC on a Unix socket and hands each call to a servicer (`identity`, `controller`, `node`,
`registration`), which decodes it with `volume`, makes its calls to a `mounter`, and replies. What is mounted
stands in the mount table and, for what that does not say, in one file a volume (`records`): the driver may be
killed and started again at any point.
"""
