"""
What a Dataset names beside itself in its namespace, and what of it workers in another namespace can have.

Pure: who asks the API hands in what it found. The keys that the Dataset names, and no others, are copied out
of Secrets; a manifest out of a ConfigMap. A volume claim cannot be mounted from another namespace, so
it gets a twin in the release's: a claim with a volume of its own that has the same source, made only of what
may be mounted on many nodes. The twin is named after the volume that it is a twin of: another volume behind
the same claim is another twin, since what a volume is made of cannot be changed. What will not do is a
SettingError that names the field.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datacache.config.schemes import SCHEMES
from datacache.errors import SettingError
from datacache.index.lines import check_lines
from datacache.kube.phase import rfc3339, seconds_since
from datacache.kube.release import DRIVER
from datacache.kube.spec import MANY, DatasetSpec, Mount
from datacache.model import MiB

MAX_KEY = 1 * MiB
"""Bytes of a key of a ConfigMap: what the API lets all of one have."""
RENEW = 0.8
"""Of a token's life, after which it is renewed: the kubelet takes a minute or two to bring it to a worker."""
TOKEN_LIFE = 3600
"""Seconds for which a token is asked. The API may give it another life."""

SHARED = ("csi", "nfs", "hostPath", "local")
"""Kinds of volumes of which a second one can have the same source. `hostPath` and `local` are for nodes that
have a file system of many nodes mounted there."""
_NO_STAGING = ("controllerExpandSecretRef", "nodeExpandSecretRef")
"""Of a CSI source: what only who resizes it needs."""

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Twin:
    """A claim of the Dataset's namespace as workers have it."""

    claim: str
    name: str
    """Of the twin, both claim and volume."""
    source: Object
    """Of the volume: one member, such as `nfs`, as in the volume that it is a twin of."""
    access_modes: tuple[str, ...]
    """As they are there: a node mounts both as one, in the way of whichever comes first."""
    mount_options: tuple[str, ...] = ()
    node_affinity: Object | None = None


@dataclass(frozen=True)
class Token:
    """Who workers are to a store, as the API says it."""

    audience: str
    value: str = field(repr=False)
    renew: str
    """RFC 3339: when there should be another."""
    of: str
    """Whose it is and for whom: another account, or audience, is another token."""


@dataclass(frozen=True)
class Beside:
    """All that workers have of what lies beside the Dataset."""

    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The data of the Secret of keys."""
    twins: tuple[Twin, ...] = ()
    manifest: bytes = b""
    """The manifest, where it comes from a ConfigMap."""
    tokens: tuple[Token, ...] = ()

    def twin(self, claim: str) -> Twin:
        return next(each for each in self.twins if each.claim == claim)


NOTHING = Beside()
"""For a Dataset that names nothing beside itself."""


# ---- keys ----------------------------------------------------------------------------------------


def copied_keys(spec: DatasetSpec, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The data of the workers' Secret. `secrets` has the data (base64) of the Secrets that there are
    in the Dataset's namespace. Raises SettingError when a key that the Dataset names is not there."""
    found: dict[str, str] = {}
    for mount in spec.stores:
        for file in mount.files:
            if file.secret not in secrets:
                expected = f"a Secret that there is in namespace {spec.namespace}"
                raise SettingError(f"{file.field}.name", file.secret, expected)
            data = secrets[file.secret]
            if file.key not in data:
                raise SettingError(f"{file.field}.key", file.key, f"a key of Secret {file.secret}")
            found[copied(mount, file.option)] = data[file.key]
    return found


def copied(mount: Mount, option: str) -> str:
    """What a copied key is called in the workers' Secret."""
    return f"{mount.slug}.{option}"


# ---- keys of ConfigMaps --------------------------------------------------------------------------


def read_key(config_map: Object | None, *, name: str, key: str, field: str, namespace: str) -> bytes:
    """One key of a ConfigMap. `field` is the path of what names it. Raises SettingError."""
    if config_map is None:
        raise SettingError(f"{field}.name", name, f"a ConfigMap that there is in namespace {namespace}")
    text, binary = config_map.get("data") or {}, config_map.get("binaryData") or {}
    if key in text:
        found = str(text[key]).encode("utf-8", "surrogatepass")
    elif key in binary:
        try:
            found = base64.b64decode(str(binary[key]), validate=True)
        except (ValueError, binascii.Error) as error:
            raise SettingError(f"{field}.key", key, "one that holds bytes") from error
    else:
        raise SettingError(f"{field}.key", key, f"a key of ConfigMap {name}")
    if len(found) > MAX_KEY:
        raise SettingError(f"{field}.key", key, f"at most {MAX_KEY} bytes, of which it has {len(found)}")
    return found


def read_manifest(spec: DatasetSpec, config_map: Object | None) -> bytes:
    """The manifest that lies in `config_map`, held against all rules that can be seen from here: no worker
    ends over it. Raises SettingError."""
    manifest = spec.manifest
    assert manifest is not None and manifest.config_map
    found = read_key(
        config_map, name=manifest.config_map, key=manifest.key, field=f"{manifest.field}.configMapKeyRef",
        namespace=spec.namespace,
    )  # fmt: skip
    what = f"key {manifest.key} of ConfigMap {manifest.config_map}"
    options, files = manifest.store.point.options, {file.option for file in manifest.store.files}
    for root in check_lines(found, uri=what):
        scheme = root.partition("://")[0].lower()
        if scheme not in SCHEMES_OF_MANIFESTS:
            names = ", ".join(f"{name}://" for name in SCHEMES_OF_MANIFESTS)
            raise SettingError(what, root, f"URLs of {names} only")
        signed = scheme in ("s3", "oss", "gs") and not options.get("anonymous")
        if signed and not files - {"ca_bundle"} and not (scheme == "s3" and "role_arn" in options):
            expected = 'keys from a Secret, or `anonymous: "true"` in options, since a URL needs them'
            raise SettingError(f"{manifest.field}.encryptOptions", root, expected)
        for needed in {"oss": ("endpoint",), "az": ("account",)}.get(scheme, ()):
            if needed not in options:
                raise SettingError(f"{manifest.field}.options", root, f"{needed} in it, which a URL needs")
    return found


SCHEMES_OF_MANIFESTS = tuple(scheme for scheme in SCHEMES if scheme != "file")
"""Of the URLs of a manifest: what a worker has on its machine is not for users to read."""


# ---- web identities ------------------------------------------------------------------------------


def renewal(expires: str, now: float) -> str:
    """When a token that was given `now` (seconds since the epoch) and ends at `expires` is to be renewed."""
    life = max(0.0, -seconds_since(expires, now))
    return rfc3339(now + life * RENEW) if life < float("inf") else rfc3339(now)


def is_good(token: Token | None, *, account: str, now: float) -> bool:
    """Whether it is a token of `account` that need not be renewed yet."""
    return token is not None and token.of == account and seconds_since(token.renew, now) < 0


# ---- claims --------------------------------------------------------------------------------------


def twin_of(mount: Mount, claim: Object | None, volume: Object | None, spec: DatasetSpec) -> Twin:
    """The twin of the claim that `mount` names. `claim` and `volume` are what the API has of that name, and
    of the claim's volume. Raises SettingError when it cannot have one."""
    name, where = mount.claim, f"{mount.field}.mountPoint"

    def refused(expected: str) -> SettingError:
        return SettingError(where, mount.point.uri, expected)

    if claim is None or claim["metadata"].get("deletionTimestamp"):
        raise refused(f"a PersistentVolumeClaim that there is in namespace {spec.namespace}")
    if (claim.get("status") or {}).get("phase") != "Bound" or volume is None:
        raise refused("a claim that is bound")
    # Who wrote the claim chose the name in it; that the volume is the claim's, the volume has to say.
    if ((volume["spec"].get("claimRef")) or {}).get("uid") != claim["metadata"]["uid"]:
        raise refused("a claim that is bound")
    of: Mapping[str, Any] = volume["spec"]
    if of.get("volumeMode", "Filesystem") != "Filesystem":
        raise refused("a claim with a file system, not a block device")
    kind = next((each for each in SHARED if each in of), "")
    if not kind:
        raise refused(f"a volume that may have a twin ({', '.join(SHARED)}), of which {name}'s is none")
    if kind == "csi" and of["csi"].get("driver") == DRIVER:
        raise refused("a claim that is no Dataset's: mount what that Dataset mounts")
    modes = tuple(of.get("accessModes") or ())
    if not set(MANY) & set(modes):
        raise refused(f"a volume that many nodes may mount ({' or '.join(MANY)}), and {name}'s is not")
    source = {key: value for key, value in of[kind].items() if kind != "csi" or key not in _NO_STAGING}
    uid = str(volume["metadata"]["uid"])
    return Twin(
        claim=name,
        name=f"datacache-{spec.uid}-{hashlib.sha256(uid.encode()).hexdigest()[:8]}",
        source={kind: source},
        access_modes=modes,
        mount_options=tuple(of.get("mountOptions") or ()),
        node_affinity=of.get("nodeAffinity"),
    )


def check_twins(spec: DatasetSpec, twins: Sequence[Twin]) -> None:
    """Raise SettingError for two claims that are one volume to a node: a pod with both never starts."""
    seen: dict[tuple[str, str], str] = {}
    for twin in twins:
        csi = twin.source.get("csi")
        handle = (str(csi.get("driver")), str(csi.get("volumeHandle"))) if csi else ("", twin.name)
        other = seen.setdefault(handle, twin.claim)
        if other != twin.claim:
            mount = next(each for each in spec.mounts if each.claim == twin.claim)
            expected = f"claim {other}, which is the same volume by another name"
            raise SettingError(f"{mount.field}.mountPoint", mount.point.uri, expected)
