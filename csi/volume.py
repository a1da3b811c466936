"""
What a request says of a volume: attributes, secrets, mode, places. Pure but for the links above a path.

The attributes of a volume are settings (docs/configuration.md) under their names in datacache.yaml; a list is
separated by `;`. They come from whoever may make a PersistentVolume or a StorageClass, which are
administrators, so they may name paths of the node. A pod's inline volume comes from anybody, and is refused.
Whatever will not do raises SettingError under the name that the user wrote.

The volume of a Dataset has other attributes: which Dataset it is. The controller makes it; all else is the
business of the Dataset's worker.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from csi.v1 import csi_pb2 as v1
from datacache.config.keys import KEYS, NAME, is_credential
from datacache.config.parsing import read_settings
from datacache.errors import NoSuchVolume, SettingError
from datacache.kube.release import volume_name

MAX_TEXT = 128
"""Bytes of a volume's id at most, as CSI has it."""

_INLINE = "csi.storage.k8s.io/ephemeral"
_NOTES = ("csi.storage.k8s.io/", "storage.kubernetes.io/")
"""What the kubelet and the provisioner add to a volume's attributes begins with one of these."""
_DATASET = "dataset"
"""The attribute that makes a volume that of a Dataset."""
_WRITES = ("writing.", "upload.")
"""Sections of settings that mean nothing without the write path."""
_OURS = frozenset(("directory", "allow-other"))
"""Settings that follow from what a volume is."""

_READERS = frozenset((
    v1.VolumeCapability.AccessMode.SINGLE_NODE_READER_ONLY,
    v1.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY,
))  # fmt: skip

_CREATED = re.compile(r"created-[0-9a-f]{32}")


def required(text: str, name: str) -> str:
    """`text`, which has to be there."""
    if not text:
        raise SettingError(name, text, "one that is not empty")
    return text


def identity(text: str) -> str:
    """The id of a volume."""
    if not text or len(text.encode()) > MAX_TEXT or not text.isprintable():
        raise SettingError("volume_id", text[:MAX_TEXT], f"1 to {MAX_TEXT} printable characters")
    return text


def place(text: str, name: str, *, below: str) -> str:
    """The path `text` as the kernel's mount table has it. What is mounted there is not touched.

    It has to lie below the kubelet's directory: nobody else's mounts are our business.
    """
    required(text, name)
    if not text.startswith("/") or "\0" in text or ".." in text.split("/"):
        raise SettingError(name, text, "an absolute path without `..`")
    text = os.path.normpath(text)
    found = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
    if not is_below(found, below):
        raise SettingError(name, text, f"a path below {below}")
    return found


def is_below(path: str, directory: str) -> bool:
    """Whether `path`, as the mount table has it, lies below `directory`."""
    return path.startswith(os.path.realpath(directory).rstrip("/") + "/")


# ---- the mode ------------------------------------------------------------------------------------


def check_capability(capability: v1.VolumeCapability) -> None:
    """Raise unless a volume of ours can be used like that."""
    if capability.HasField("block"):
        raise SettingError("volumeMode", "Block", "Filesystem: a data set is a directory")
    if not capability.HasField("mount") or not capability.access_mode.mode:
        raise SettingError("volume_capability", "", "an access mode, and a volume that is mounted")
    for flag in capability.mount.mount_flags:
        if flag not in ("ro", "rw"):
            expected = "ro or rw: settings go into the attributes of the volume"
            raise SettingError("mountOptions", flag, expected)


def is_read_only(capability: v1.VolumeCapability, *, asked: bool = False) -> bool:
    """Whether nothing may be written: the access mode, the request's flag or the mount flag `ro` says so."""
    return asked or capability.access_mode.mode in _READERS or "ro" in capability.mount.mount_flags


# ---- volumes of Datasets ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Which Dataset a volume is of."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def dataset(volume_id: str, context: Mapping[str, str]) -> Dataset | None:
    """The Dataset of a volume; None for one that says itself what it shows."""
    check_persistent(volume_id, context)
    given = attributes(context)
    if _DATASET not in given:
        return None
    for name, text in given.items():
        if name not in _OF_DATASET:
            expected = "none: the volume of a Dataset has what the Dataset says"
            raise SettingError(_named(name), text, expected)
    namespace, name, uid = (given.get(key, "") for key in _OF_DATASET)
    # It becomes that of a directory.
    if not re.fullmatch(r"[0-9a-zA-Z][0-9a-zA-Z-]{0,63}", uid, re.ASCII):
        raise SettingError(_named("uid"), uid, "the uid of a Dataset")
    for key, text in (("namespace", namespace), ("dataset", name)):
        if not re.fullmatch(r"[0-9a-z]([0-9a-z.-]{0,251}[0-9a-z])?", text, re.ASCII):
            raise SettingError(_named(key), text, "the name of an object in Kubernetes")
    if volume_id != volume_name(uid):
        raise SettingError(
            "volumeHandle", volume_id, f"{volume_name(uid)}: the controller makes these volumes"
        )
    return Dataset(namespace, name, uid)


_OF_DATASET = ("namespace", _DATASET, "uid")


# ---- attributes ----------------------------------------------------------------------------------


def settings(
    volume_id: str, context: Mapping[str, str], *, read_only: bool, environment: Mapping[str, str]
) -> dict[str, str | list[str]]:
    """The attributes of a volume as the keys of a datacache.yaml, in which nothing is missing or wrong.

    Without a name the data set has that of the volume, so that two volumes of one bucket have each a cache
    of their own. It can be written to if `rw` says so and the volume is not `read_only`.
    """
    given: dict[str, str | list[str]] = {}
    check_persistent(volume_id, context)
    if _DATASET in context:
        expected = "a uri: the controller makes the volume of a Dataset, and its claim"
        raise SettingError(_named(_DATASET), context[_DATASET], expected)
    for name, text in attributes(context).items():
        key = name.replace("_", "-")
        if key in _OURS:
            raise SettingError(_named(name), text, "none: it follows from what a volume is")
        if key in given:
            raise SettingError(_named(name), text, "each attribute once")
        given[key] = _parts(text) if key in KEYS and KEYS[key].many else text
    if not {"uri", "mounts", "manifest"} & set(given):
        raise SettingError("volumeAttributes.uri", "", "what to show, such as s3://bucket/prefix")
    given.setdefault("name", _data_set(volume_id))
    given["allow-other"] = "true"
    _check(given, environment)
    if read_only:
        given = {key: value for key, value in given.items() if not KEYS[key].field.startswith(_WRITES)}
        _check(given, environment)
    return given


def attributes(context: Mapping[str, str]) -> dict[str, str]:
    """Of `context` what a user wrote."""
    return {name: text for name, text in context.items() if not name.startswith(_NOTES)}


def check_persistent(volume_id: str, context: Mapping[str, str]) -> None:
    """Raise for an inline volume, whose attributes are those of whoever may start a pod."""
    if context.get(_INLINE, "false") == "true":
        expected = "a PersistentVolumeClaim: inline volumes name a Dataset, and those are not there yet"
        raise SettingError("volumes.csi", volume_id, expected)


def _check(given: Mapping[str, str | list[str]], environment: Mapping[str, str]) -> None:
    try:
        read_settings(given, config_file=None, environment=environment)
    except SettingError as error:
        # There they are flags, and here they are not.
        name = _named("uri" if error.name == "URI" else error.name.removeprefix("--"))
        raise SettingError(name, error.value, error.expected.replace("--", "")) from error


def _named(name: str) -> str:
    return f"volumeAttributes.{name}"


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _data_set(volume_id: str) -> str:
    """The name of the data set of a volume that says none: it becomes that of directories."""
    try:
        return str(NAME.read(volume_id))
    except ValueError:
        return f"volume-{hashlib.blake2b(volume_id.encode(), digest_size=16).hexdigest()}"


def check_secrets(secrets: Mapping[str, str]) -> dict[str, str]:
    """`secrets`, each a variable that says to a store who we are. Values are never shown."""
    for name, value in secrets.items():
        if not is_credential(name):
            expected = "keys that are variables of a store's client, such as AWS_SECRET_ACCESS_KEY"
            raise SettingError("nodeStageSecretRef", name, expected)
        if "\0" in value:
            raise SettingError("nodeStageSecretRef", name, "a value without NUL bytes")
    return dict(secrets)


# ---- volumes that the controller service makes ---------------------------------------------------


def created(name: str) -> str:
    """The id of the volume that is asked for under `name`: the same for the same name."""
    return f"created-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


def check_exists(volume_id: str, context: Iterable[str]) -> None:
    """Raise NoSuchVolume unless it is one of ours: we made its id, or it says what it shows."""
    if not _CREATED.fullmatch(volume_id) and not {"uri", "mounts", "manifest", _DATASET} & set(context):
        raise NoSuchVolume(f"there is no volume {volume_id!r}")
