"""
Which objects should exist for a Dataset: a worker on each node that is labelled for it, and a volume.

Pure and deterministic: the same Dataset is the same objects, byte for byte, so that applying them again
changes nothing. `objects` are what `controller` applies, in that order; `names` is all that may ever have
been applied, to take away. They are named after the Dataset's uid: two Datasets never meet, not even one that
was deleted and one made anew with its name.

All of it lies in the release's namespace but the claim, which is in the user's. A worker reads its settings
from a datacache.yaml in a ConfigMap. The keys of its stores are copied, those that the Dataset names and no
others, into a Secret beside it; it sees them as files, and sees when they change.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from datacache.config.keys import spell_duration
from datacache.config.settings import TierSettings
from datacache.errors import SettingError
from datacache.kube.release import API_PORT, DRIVER, GROUP, VOLUME_SOCKET, Name, Release, volume_name
from datacache.kube.spec import DatasetSpec, Mount
from datacache.model import Medium, MiB

Object = dict[str, Any]

UID_LABEL = f"{GROUP}/dataset-uid"
"""On everything that belongs to a Dataset, its workers' pods among it."""
DATASET_ANNOTATION = f"{GROUP}/dataset"
"""NAMESPACE/NAME of the Dataset, for people: too long for a label."""
APPLIED_ANNOTATION = f"{GROUP}/applied"
"""On everything: the digest of what was applied. What was taken out of an object is found by it: that the
rest stands there would not tell."""
CONFIG_ANNOTATION = f"{GROUP}/config"
"""On worker pods: the digest of their datacache.yaml, so that another one rolls them."""

ETC = "/etc/datacache"
_CONFIG, _TOKEN, _KEYS = f"{ETC}/config", f"{ETC}/token", f"{ETC}/keys"
CLAIM_SIZE = "1Mi"
"""What a claim requests: a storage quota counts it, and a bucket has no size."""
_KEY_FILES = 0o400
_SCRATCH = 64 * MiB
"""Bytes of the worker's /tmp: it writes nothing large there."""


def node_label(uid: str) -> str:
    """The label by which a node gets a worker of the Dataset: `true` where it does."""
    return f"{GROUP}/dataset-{uid}"


def name_of(obj: Mapping[str, Any]) -> Name:
    metadata = obj["metadata"]
    return Name(obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"])


def names(*, uid: str, namespace: str, name: str, release: Release) -> tuple[Name, ...]:
    """All that `objects` may have made for the Dataset, in the order in which it goes: users first."""
    ours, at = volume_name(uid), release.namespace
    return (
        Name("v1", "PersistentVolumeClaim", namespace, name),
        Name("v1", "PersistentVolume", "", ours),
        Name("apps/v1", "DaemonSet", at, ours),
        Name("v1", "Service", at, ours),
        Name("v1", "Secret", at, f"{ours}-keys"),
        Name("v1", "Secret", at, f"{ours}-token"),
        Name("v1", "ConfigMap", at, ours),
    )


def copied_keys(spec: DatasetSpec, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The data of the workers' Secret. `secrets` has the data (base64) of the Secrets that there are
    in the Dataset's namespace. Raises SettingError when a key that the Dataset names is not there."""
    found: dict[str, str] = {}
    for mount in spec.mounts:
        for file in mount.files:
            if file.secret not in secrets:
                expected = f"a Secret that there is in namespace {spec.namespace}"
                raise SettingError(f"{file.field}.name", file.secret, expected)
            data = secrets[file.secret]
            if file.key not in data:
                raise SettingError(f"{file.field}.key", file.key, f"a key of Secret {file.secret}")
            found[_copied(mount, file.option)] = data[file.key]
    return found


def _copied(mount: Mount, option: str) -> str:
    return f"{mount.slug}.{option}"


def objects(spec: DatasetSpec, release: Release, *, keys: Mapping[str, str], token: str) -> list[Object]:
    """What should exist, in the order in which it is to be applied. `keys` is of `copied_keys`, `token` what
    workers are asked with (base64)."""
    made = [_config_map(spec, release), _secret(spec, release, "token", {"token": token})]
    if keys:
        made.append(_secret(spec, release, "keys", dict(sorted(keys.items()))))
    made += [
        _service(spec, release),
        _daemon_set(spec, release, keys=bool(keys)),
        _volume(spec),
        _claim(spec),
    ]
    for obj in made:
        digest = hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()
        obj["metadata"]["annotations"][APPLIED_ANNOTATION] = digest
    return made


def _metadata(spec: DatasetSpec, name: str, namespace: str = "") -> Object:
    return {
        "name": name,
        **({"namespace": namespace} if namespace else {}),
        "labels": {"app.kubernetes.io/managed-by": "datacache", UID_LABEL: spec.uid},
        "annotations": {DATASET_ANNOTATION: f"{spec.namespace}/{spec.name}"},
    }


# ---- settings ------------------------------------------------------------------------------------


def tier_path(tier: TierSettings, uid: str) -> str:
    """The directory, on the node and in the worker, of one Dataset's part of a tier."""
    return f"{tier.path}/{uid}"


def settings_text(spec: DatasetSpec, release: Release) -> str:
    """The worker's datacache.yaml. As JSON, which YAML contains: written in one way only."""
    found: Object = {
        "name": spec.name,
        "object": f"{spec.namespace}/{spec.name}",
        "mounts": [
            {"uri": mount.point.uri, "path": mount.point.path, "options": _options(mount)}
            for mount in spec.mounts
        ],
        "cache": [
            {
                "medium": str(tier.medium),
                "path": f"{tier_path(tier, spec.uid)}/cache",
                "quota": str(tier.quota),
                "high": f"{tier.high:g}",
                "low": f"{tier.low:g}",
                # By the node plugin, and of just that size: what lies beside it is not ours to fill.
                **({"mounted": "true"} if tier.medium is Medium.MEM else {}),
            }
            for tier in spec.cache.tiers
        ],
        "consistency": str(spec.index.consistency),
        "ttl": spell_duration(spec.index.ttl),
        "uid": str(spec.mount.uid),
        "gid": str(spec.mount.gid),
        "file-mode": f"{spec.mount.file_mode:04o}",
        "dir-mode": f"{spec.mount.dir_mode:04o}",
        "allow-other": "true",
        "state": f"{release.state_dir}/{spec.uid}",
        "log-format": "json",
    }  # fmt: skip
    if spec.cache.priority:
        found["priority"] = str(spec.cache.priority)
    if spec.writable:
        found |= {
            "rw": "true",
            "landing": landing_path(spec, release),
            "durability": str(spec.writing.durability),
            "conflict": str(spec.writing.conflict),
            "upload-mode": str(spec.upload.mode),
            "upload-delay": spell_duration(spec.upload.delay),
            "upload-concurrency": str(spec.upload.concurrency),
            "upload-bandwidth": str(spec.upload.bandwidth),
        }
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def landing_path(spec: DatasetSpec, release: Release) -> str:
    """Where what is written lies: on the disk of the first SSD tier, so that what was uploaded becomes the
    cached file without a copy; else with the state. Never in memory."""
    disks = [tier for tier in spec.cache.tiers if tier.medium is Medium.SSD]
    below = tier_path(disks[0], spec.uid) if disks else f"{release.state_dir}/{spec.uid}"
    return f"{below}/landing"


def _options(mount: Mount) -> dict[str, str]:
    """The options of the source, those that are files of the workers' Secret among them."""
    found, at = dict(mount.point.options), f"{_KEYS}/{mount.slug}"
    for file in mount.files:
        if file.option in ("ca_bundle", "credentials"):
            found[file.option] = f"{at}/{file.option}"
        else:
            found["credentials"] = at  # a directory of single keys
    return found


def _config_map(spec: DatasetSpec, release: Release) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(spec, volume_name(spec.uid), release.namespace),
        "data": {"datacache.yaml": settings_text(spec, release)},
    }


def _secret(spec: DatasetSpec, release: Release, what: str, data: dict[str, str]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(spec, f"{volume_name(spec.uid)}-{what}", release.namespace),
        "type": "Opaque",
        "data": data,
    }


# ---- workers -------------------------------------------------------------------------------------


def _service(spec: DatasetSpec, release: Release) -> Object:
    """Without an address of its own: it gives workers names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(spec, volume_name(spec.uid), release.namespace),
        "spec": {
            "clusterIP": "None",
            "selector": {UID_LABEL: spec.uid},
            "ports": [{"name": "api", "port": API_PORT, "protocol": "TCP", "targetPort": "api"}],
        },
    }


def _daemon_set(spec: DatasetSpec, release: Release, *, keys: bool) -> Object:
    pod = spec.worker
    config = hashlib.sha256(settings_text(spec, release).encode()).hexdigest()
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": _metadata(spec, volume_name(spec.uid), release.namespace),
        "spec": {
            "selector": {"matchLabels": {UID_LABEL: spec.uid}},
            "revisionHistoryLimit": 2,
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            "template": {
                "metadata": {
                    "labels": {
                        **pod.labels,
                        "app.kubernetes.io/name": "datacache-worker",
                        "app.kubernetes.io/managed-by": "datacache",
                        UID_LABEL: spec.uid,
                    },
                    "annotations": {
                        **pod.annotations,
                        DATASET_ANNOTATION: f"{spec.namespace}/{spec.name}",
                        CONFIG_ANNOTATION: config,
                    },
                },
                "spec": _pod(spec, release, keys=keys),
            },
        },
    }


def _pod(spec: DatasetSpec, release: Release, *, keys: bool) -> Object:
    pod = spec.worker
    priority = pod.priority_class or release.priority_class
    pull = [{"name": name} for name in release.pull_secrets]
    affinity = spec.node_affinity
    return {
        "serviceAccountName": release.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "nodeSelector": {node_label(spec.uid): "true"},
        **(
            {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": affinity}}}
            if affinity
            else {}
        ),
        # A pod that reads the volume is on the node already: a worker follows it, whatever the taints.
        "tolerations": [dict(each) for each in pod.tolerations] or [{"operator": "Exists"}],
        **({"priorityClassName": priority} if priority else {}),
        **({"imagePullSecrets": pull} if pull else {}),
        "terminationGracePeriodSeconds": _grace(spec),
        "securityContext": {"runAsUser": 0, "runAsGroup": 0, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(spec, release, keys=keys)],
        "volumes": _volumes(spec, release, keys=keys),
    }  # fmt: skip


def _grace(spec: DatasetSpec) -> int:
    """Seconds that a worker has to end; all but the last 15 to upload what was written, which its node keeps
    if that is too few."""
    return 135 if spec.writable else 30


def _container(spec: DatasetSpec, release: Release, *, keys: bool) -> Object:
    asked = spec.worker.requests
    memory = asked.get("memory", str(spec.memory + release.budget))
    probe = {"httpGet": {"path": "/healthz", "port": "api"}, "timeoutSeconds": 5}
    return {
        "name": "worker",
        "image": release.image,
        "imagePullPolicy": release.pull_policy,
        "command": [
            "datacache", "worker", "--config", f"{_CONFIG}/datacache.yaml", "--listen", f"0.0.0.0:{API_PORT}",
            "--token-file", f"{_TOKEN}/token", "--drain-timeout", f"{_grace(spec) - 15}s",
            "--volume-socket", f"{release.run_dir}/{spec.uid}/{VOLUME_SOCKET}",
        ],
        "env": [
            # A worker has no identity of the node's: what a user did not give keys for cannot be read.
            {"name": "AWS_EC2_METADATA_DISABLED", "value": "true"},
            {"name": "DATACACHE_RUNTIME", "value": f"{release.run_dir}/{spec.uid}"},
            {"name": "HOME", "value": "/tmp"},  # noqa: S108  an emptyDir of its own
        ],
        "ports": [{"name": "api", "containerPort": API_PORT, "protocol": "TCP"}],
        "readinessProbe": {**probe, "httpGet": {"path": "/readyz", "port": "api"}, "periodSeconds": 5},
        # Restarting it mends little and costs its readers a pause: only when it has long been dumb.
        "livenessProbe": {**probe, "periodSeconds": 20, "failureThreshold": 6},
        "resources": {
            "requests": {"cpu": "100m", **asked, "memory": memory},
            "limits": {"memory": memory, **spec.worker.limits},
        },
        "securityContext": {
            "privileged": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            # The kernel lets nobody else register the files that it is to read by itself (FUSE passthrough).
            "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": _CONFIG, "readOnly": True},
            {"name": "token", "mountPath": _TOKEN, "readOnly": True},
            *([{"name": "keys", "mountPath": _KEYS, "readOnly": True}] if keys else []),
            {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108
            {"name": "run", "mountPath": f"{release.run_dir}/{spec.uid}"},
            {"name": "state", "mountPath": f"{release.state_dir}/{spec.uid}"},
            *(
                # The node plugin mounts a tmpfs there: a worker that is older than it sees it, too.
                {"name": f"tier-{i}", "mountPath": tier_path(tier, spec.uid),
                 "mountPropagation": "HostToContainer"}
                for i, tier in enumerate(spec.cache.tiers)
            ),
        ],
    }  # fmt: skip


def _volumes(spec: DatasetSpec, release: Release, *, keys: bool) -> list[Object]:
    ours = volume_name(spec.uid)
    files = [
        {"key": _copied(mount, file.option), "path": f"{mount.slug}/{file.option}"}
        for mount in spec.mounts
        for file in mount.files
    ]
    on_node = {"run": f"{release.run_dir}/{spec.uid}", "state": f"{release.state_dir}/{spec.uid}"} | {
        f"tier-{i}": tier_path(tier, spec.uid) for i, tier in enumerate(spec.cache.tiers)
    }
    return [
        {"name": "config", "configMap": {"name": ours}},
        {"name": "token", "secret": {"secretName": f"{ours}-token", "defaultMode": _KEY_FILES}},
        *(
            [
                {
                    "name": "keys",
                    "secret": {"secretName": f"{ours}-keys", "defaultMode": _KEY_FILES, "items": files},
                }
            ]
            if keys
            else []
        ),
        {"name": "scratch", "emptyDir": {"sizeLimit": str(_SCRATCH)}},
        *(
            {"name": name, "hostPath": {"path": path, "type": "DirectoryOrCreate"}}
            for name, path in on_node.items()
        ),
    ]


# ---- the volume ----------------------------------------------------------------------------------


def _volume(spec: DatasetSpec) -> Object:
    ours = volume_name(spec.uid)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": _metadata(spec, ours),
        "spec": {
            "capacity": {"storage": CLAIM_SIZE},
            "accessModes": list(spec.access_modes),
            "volumeMode": "Filesystem",
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            # Bound to this claim before there is one: no other can take it.
            "claimRef": {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "namespace": spec.namespace, "name": spec.name,
            },
            "csi": {
                "driver": DRIVER,
                "volumeHandle": ours,
                "readOnly": not spec.writable,
                "volumeAttributes": {"namespace": spec.namespace, "dataset": spec.name, "uid": spec.uid},
            },
        },
    }  # fmt: skip


def _claim(spec: DatasetSpec) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(spec, spec.name, spec.namespace),
        "spec": {
            "accessModes": list(spec.access_modes),
            "volumeMode": "Filesystem",
            "storageClassName": "",
            "volumeName": volume_name(spec.uid),
            "resources": {"requests": {"storage": CLAIM_SIZE}},
        },
    }
