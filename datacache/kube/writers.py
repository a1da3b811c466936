"""
Whether a pod can write to a Dataset that it mounts, as far as the pod itself tells. Pure.

The kernel holds users to the owner and the modes that the Dataset gives all of its files, and nothing is
changed at mount: a bucket has no owners, and a walk over it would take hours. So who may not write hears
"Permission denied" from his program; a sentence on the pod says what would be right. What the pod does not
say (the user of an image) is not guessed.
"""

from collections.abc import Mapping
from typing import Any

from datacache.config.settings import MountSettings

Object = Mapping[str, Any]

_OVERRIDE = ("DAC_OVERRIDE", "CAP_DAC_OVERRIDE", "ALL")


def cannot_write(pod: Object, *, claim: str, dataset: str, owner: MountSettings) -> str:
    """Why no process of a container of `pod` can write to the claim, which it mounts to be written; empty
    where one can, or nobody knows."""
    spec = pod.get("spec") or {}
    if spec.get("hostUsers") is False:
        return ""  # its numbers are others on the node
    volumes = {
        each["name"]
        for each in spec.get("volumes") or ()
        if (each.get("persistentVolumeClaim") or {}).get("claimName") == claim
        and not each["persistentVolumeClaim"].get("readOnly")
    }
    for container in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ())):
        mounts = container.get("volumeMounts") or ()
        if any(each["name"] in volumes and not each.get("readOnly") for each in mounts):
            found = _whether(spec.get("securityContext") or {}, container, dataset, owner)
            if found:
                return found
    return ""


def _whether(pod: Object, container: Object, dataset: str, owner: MountSettings) -> str:
    own = container.get("securityContext") or {}
    uid = own.get("runAsUser", pod.get("runAsUser"))
    group = own.get("runAsGroup", pod.get("runAsGroup"))
    if uid is None or _overrides(uid, own):
        return ""
    groups = {*(pod.get("supplementalGroups") or ()), pod.get("fsGroup"), group} - {None}
    bits = _bits(uid, groups, owner)
    if bits is None:
        # Its first group may be that of the image's user.
        if group is None and _writes(owner.file_mode >> 3, owner.dir_mode >> 3):
            return ""
        bits = 0
    if _writes(owner.file_mode >> bits, owner.dir_mode >> bits):
        return ""
    who = f"user {uid}" + (f" (groups {', '.join(map(str, sorted(groups)))})" if groups else "")
    belongs = f"belong to user {owner.uid or 0} and group {owner.gid or 0}"
    modes = f"with modes {owner.file_mode:04o} and {owner.dir_mode:04o}"
    advice = f"the Dataset needs spec.owner: {{uid: {uid}}}, or the pod runAsUser: {owner.uid or 0}"
    if not _writes(owner.file_mode >> 6, owner.dir_mode >> 6):
        advice = "the Dataset needs other modes in spec.owner"
    return (
        f"container {container.get('name')} runs as {who} and cannot write to Dataset {dataset}: its files "
        f"{belongs}, {modes}; {advice}"
    )


def _bits(uid: int, groups: set[Any], owner: MountSettings) -> int | None:
    """By how much modes are to be shifted for who this is; None for others."""
    if uid == (owner.uid or 0):
        return 6
    return 3 if (owner.gid or 0) in groups else None


def _writes(file_mode: int, dir_mode: int) -> bool:
    """A file can be written, or made: the last three bits of each are of who asks."""
    return bool(file_mode & 0o2) or dir_mode & 0o3 == 0o3


def _overrides(uid: int, own: Object) -> bool:
    """Whether the kernel asks it for no permission: root is let in everywhere, unless that was taken away."""
    capabilities = own.get("capabilities") or {}
    dropped, added = capabilities.get("drop") or (), capabilities.get("add") or ()
    taken = any(each in _OVERRIDE for each in dropped) and not any(each in _OVERRIDE for each in added)
    return bool(uid == 0 and (own.get("privileged") or not taken))
