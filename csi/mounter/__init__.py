"""Who mounts: the interface, `linux` which does it, and `fake` for tests."""

from csi.mounter.mounter import Mounted, Mounter, Usage

__all__ = ["Mounted", "Mounter", "Usage"]
