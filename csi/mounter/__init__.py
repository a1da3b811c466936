"""Who mounts: the interfaces, `linux` and `datasets` which do it, and `fake` for tests."""

from csi.mounter.mounter import DatasetMounter, Mounted, Mounter, Usage

__all__ = ["DatasetMounter", "Mounted", "Mounter", "Usage"]
