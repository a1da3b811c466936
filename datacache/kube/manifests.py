"""
Which objects should exist for a Dataset: a worker on each node that is labelled for it, and a volume.

Pure and deterministic: the same Dataset is the same objects, byte for byte, so that applying them again
changes nothing. `objects` are what `controller` applies, in that order; `names` is all that may ever have
been applied, to take away. They are named after the Dataset's uid: two Datasets never meet, not even one that
was deleted and one made anew with its name.

All of it lies in the release's namespace but the claim, which is in the user's. A worker reads its settings
from a datacache.yaml in a ConfigMap. What the Dataset names beside itself (`beside`) it sees as files: keys
and tokens, which it reads again when they change; a manifest, which is read when it starts; claims, by their
twins.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from datacache.config.keys import spell_duration
from datacache.config.settings import TierSettings
from datacache.kube.beside import NOTHING, SCHEMES_OF_MANIFESTS, Beside, Token, Twin, copied
from datacache.kube.certificates import Pair
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

TLS_ANNOTATION = f"{GROUP}/tls"
"""On worker pods: `true` for those that are asked over TLS."""
RENEW_ANNOTATION = f"{GROUP}/renew"
"""On the Secret of web identities: for each token when it is renewed, and whose it is."""
WORKER_LABELS = {"app.kubernetes.io/name": "datacache-worker"}
"""On the pods of all workers, whatever their Dataset."""

ETC = "/etc/datacache"
_CONFIG, _TOKEN, _KEYS, _MANIFEST = f"{ETC}/config", f"{ETC}/token", f"{ETC}/keys", f"{ETC}/manifest"
_TLS, _CRT, _KEY = f"{ETC}/tls", "tls.crt", "tls.key"
_IDENTITY, _CLAIMS = f"{ETC}/identity", f"{ETC}/claims"
_MANIFEST_FILE = "manifest.jsonl"
CLAIM_SIZE = "1Mi"
"""What a claim requests: a storage quota counts it, and a bucket has no size."""
_KEY_FILES = 0o400
_SCRATCH = 64 * MiB
"""Bytes of the worker's /tmp: it writes nothing large there."""


def node_label(uid: str) -> str:
    """The label by which a node gets a worker of the Dataset: `true` where it does."""
    return f"{GROUP}/dataset-{uid}"


def worker_name(uid: str, release: Release) -> str:
    """What a worker of the Dataset is called in its certificate: as its Service is."""
    return f"{volume_name(uid)}.{release.namespace}.svc"


def name_of(obj: Mapping[str, Any]) -> Name:
    metadata = obj["metadata"]
    return Name(obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"])


def names(*, uid: str, namespace: str, name: str, release: Release) -> tuple[Name, ...]:
    """All that `objects` may have made for the Dataset, in the order in which it goes, users first; but the
    twins of claims, which are found by their label."""
    ours, at = volume_name(uid), release.namespace
    return (
        Name("v1", "PersistentVolumeClaim", namespace, name),
        Name("v1", "PersistentVolume", "", ours),
        Name("apps/v1", "DaemonSet", at, ours),
        Name("v1", "Service", at, ours),
        Name("v1", "Secret", at, f"{ours}-keys"),
        Name("v1", "Secret", at, f"{ours}-token"),
        Name("v1", "Secret", at, f"{ours}-identity"),
        Name("v1", "Secret", at, f"{ours}-tls"),
        Name("v1", "ConfigMap", at, ours),
        Name("v1", "ConfigMap", at, f"{ours}-manifest"),
    )


def objects(
    spec: DatasetSpec, release: Release, *, beside: Beside = NOTHING, token: str,
    placed: Mapping[str, Any] | None = None, tls: Pair | None = None,
) -> list[Object]:  # fmt: skip
    """What should exist, in the order in which it is to be applied. `token` is what workers are asked with
    (base64), `placed` the nodeAffinity that the volume has already: the API lets nobody change that. `tls` is
    the workers' certificate; None: they are asked without."""
    made = [_config_map(spec, release, beside), _secret(spec, release, "token", {"token": token})]
    if tls is not None:
        made.append(_secret(spec, release, "tls", told_pair(tls)["data"]))
    if beside.manifest:
        made.append(_manifest(spec, release, beside.manifest))
    if beside.keys:
        made.append(_secret(spec, release, "keys", dict(sorted(beside.keys.items()))))
    if beside.tokens:
        made.append(_identity(spec, release, beside.tokens))
    for twin in beside.twins:
        made += [_twin_volume(spec, release, twin), _twin_claim(spec, release, twin)]
    made += [
        _service(spec, release),
        _daemon_set(spec, release, beside, tls=tls is not None),
        _volume(spec, placed),
        _claim(spec),
    ]
    for obj in made:
        digest = hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()
        obj["metadata"]["annotations"][APPLIED_ANNOTATION] = digest
    return made


IDENTITY, MANIFEST, CLAIM = "identity", "manifest", "claim"


def rare_parts(spec: DatasetSpec | None, daemon_set: Mapping[str, Any] | None) -> set[str]:
    """What there may be beyond what every Dataset has: what it asks for, and what its workers have of before.
    What somebody was about to take away when he was killed is not among it."""
    template = (((daemon_set or {}).get("spec") or {}).get("template") or {}).get("spec") or {}
    volumes = [str(each["name"]).partition("-")[0] for each in template.get("volumes") or ()]
    found = {part for part in (IDENTITY, MANIFEST, CLAIM) if part in volumes}
    if spec is not None:
        found |= {IDENTITY} if spec.account else set()
        found |= {MANIFEST} if spec.manifest is not None and spec.manifest.config_map else set()
        found |= {CLAIM} if any(mount.claim for mount in spec.mounts) else set()
    return found


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


def settings_text(spec: DatasetSpec, release: Release, beside: Beside = NOTHING) -> str:
    """The worker's datacache.yaml. As JSON, which YAML contains: written in one way only."""
    found: Object = {
        "name": spec.name,
        "object": f"{spec.namespace}/{spec.name}",
        **_data_set(spec, beside),
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
    if release.metrics_port:
        found["metrics"] = f"0.0.0.0:{release.metrics_port}"
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


def _data_set(spec: DatasetSpec, beside: Beside) -> Object:
    """What is shown."""
    if spec.manifest is None:
        return {
            "mounts": [
                {"uri": _uri(mount, beside), "path": mount.point.path, "options": _options(mount, beside)}
                for mount in spec.mounts
            ],
            "consistency": str(spec.index.consistency),
            "ttl": spell_duration(spec.index.ttl),
        }
    return {
        "manifest": spec.manifest.store.point.uri or f"file://{_MANIFEST}/{_MANIFEST_FILE}",
        "manifest-schemes": ",".join(SCHEMES_OF_MANIFESTS),
        "option": _options(spec.manifest.store, beside),
    }


def _uri(mount: Mount, beside: Beside) -> str:
    if not mount.claim:
        return mount.point.uri
    path = mount.point.uri.removeprefix(f"pvc://{mount.claim}")
    return f"file://{_CLAIMS}/{beside.twin(mount.claim).name}{path}"


def landing_path(spec: DatasetSpec, release: Release) -> str:
    """Where what is written lies: on the disk of the first SSD tier, so that what was uploaded becomes the
    cached file without a copy; else with the state. Never in memory."""
    disks = [tier for tier in spec.cache.tiers if tier.medium is Medium.SSD]
    below = tier_path(disks[0], spec.uid) if disks else f"{release.state_dir}/{spec.uid}"
    return f"{below}/landing"


def _options(mount: Mount, beside: Beside) -> dict[str, str]:
    """The options of the source, those that are files of what lies beside the Dataset among them."""
    found, at = dict(mount.point.options), f"{_KEYS}/{mount.slug}"
    if mount.claim:
        # Who writes to the claim decides what its links say.
        found["inside"] = f"{_CLAIMS}/{beside.twin(mount.claim).name}"
    if mount.audience:
        found["web_identity"] = f"{_IDENTITY}/{_token_file(mount.audience)}"
    for file in mount.files:
        if file.option in ("ca_bundle", "credentials"):
            found[file.option] = f"{at}/{file.option}"
        else:
            found["credentials"] = at  # a directory of single keys
    return found


def _token_file(audience: str) -> str:
    return hashlib.sha256(audience.encode()).hexdigest()[:12]


def _config_map(spec: DatasetSpec, release: Release, beside: Beside) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(spec, volume_name(spec.uid), release.namespace),
        "data": {"datacache.yaml": settings_text(spec, release, beside)},
    }


def _manifest(spec: DatasetSpec, release: Release, data: bytes) -> Object:
    try:
        content = {"data": {_MANIFEST_FILE: data.decode()}}
    except UnicodeDecodeError:
        content = {"binaryData": {_MANIFEST_FILE: base64.b64encode(data).decode()}}
    metadata = _metadata(spec, f"{volume_name(spec.uid)}-manifest", release.namespace)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, **content}


def _secret(spec: DatasetSpec, release: Release, what: str, data: dict[str, str]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(spec, f"{volume_name(spec.uid)}-{what}", release.namespace),
        "type": "Opaque",
        "data": data,
    }


def _identity(spec: DatasetSpec, release: Release, tokens: Sequence[Token]) -> Object:
    """The web identities; with what it takes to see whether they will still do, as nothing of a Secret is
    remembered anywhere else."""
    told = told_tokens(tokens)
    found = _secret(spec, release, "identity", told["data"])
    found["metadata"]["annotations"] |= told["metadata"]["annotations"]
    return found


def told_tokens(tokens: Sequence[Token]) -> Object:
    """What of the Secret of web identities is about these."""
    data = {_token_file(each.audience): base64.b64encode(each.value.encode()).decode() for each in tokens}
    renewals = {each.audience: {"at": each.renew, "of": each.of} for each in tokens}
    return {
        "data": data,
        "metadata": {"annotations": {RENEW_ANNOTATION: json.dumps(renewals, sort_keys=True)}},
    }


def known_tokens(secret: Mapping[str, Any] | None) -> tuple[Token, ...]:
    """The tokens that lie in the Secret of web identities; none where somebody else has changed it."""
    if secret is None:
        return ()
    try:
        renewals = json.loads((secret["metadata"].get("annotations") or {})[RENEW_ANNOTATION])
        return tuple(
            Token(
                str(audience), base64.b64decode(secret["data"][_token_file(audience)]).decode("ascii"),
                renew=str(told["at"]), of=str(told["of"]),
            )
            for audience, told in sorted(renewals.items())
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


# ---- certificates --------------------------------------------------------------------------------


def told_pair(pair: Pair) -> Object:
    """What of the Secret of a certificate is about it."""
    texts = {_CRT: pair.certificate, _KEY: pair.key}
    return {"data": {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}}


def known_pair(secret: Mapping[str, Any] | None) -> Pair | None:
    """The certificate in a Secret; None where somebody else has changed it."""
    try:
        data = (secret or {})["data"]
        crt, key = (base64.b64decode(data[name]).decode("ascii") for name in (_CRT, _KEY))
    except (KeyError, TypeError, ValueError):
        return None
    return Pair(crt, key)


# ---- twins of claims -----------------------------------------------------------------------------


def _twin_volume(spec: DatasetSpec, release: Release, twin: Twin) -> Object:
    """A second volume of the same source. It is kept when its claim goes, and so is what lies in it."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": _metadata(spec, twin.name),
        "spec": {
            "capacity": {"storage": CLAIM_SIZE},
            "accessModes": list(twin.access_modes),
            "volumeMode": "Filesystem",
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "claimRef": {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "namespace": release.namespace, "name": twin.name,
            },
            **({"mountOptions": list(twin.mount_options)} if twin.mount_options else {}),
            **({"nodeAffinity": dict(twin.node_affinity)} if twin.node_affinity else {}),
            **twin.source,
        },
    }  # fmt: skip


def _twin_claim(spec: DatasetSpec, release: Release, twin: Twin) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(spec, twin.name, release.namespace),
        "spec": {
            "accessModes": list(twin.access_modes),
            "volumeMode": "Filesystem",
            "storageClassName": "",
            "volumeName": twin.name,
            "resources": {"requests": {"storage": CLAIM_SIZE}},
        },
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


def _daemon_set(spec: DatasetSpec, release: Release, beside: Beside, *, tls: bool) -> Object:
    pod = spec.worker
    # A manifest is read when a worker starts: another one rolls them, too.
    config = hashlib.sha256(settings_text(spec, release, beside).encode() + beside.manifest).hexdigest()
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
                        **WORKER_LABELS,
                        "app.kubernetes.io/managed-by": "datacache",
                        UID_LABEL: spec.uid,
                    },
                    "annotations": {
                        **pod.annotations,
                        DATASET_ANNOTATION: f"{spec.namespace}/{spec.name}",
                        CONFIG_ANNOTATION: config,
                        **({TLS_ANNOTATION: "true"} if tls else {}),
                    },
                },
                "spec": _pod(spec, release, beside, tls=tls),
            },
        },
    }


def _pod(spec: DatasetSpec, release: Release, beside: Beside, *, tls: bool) -> Object:
    pod = spec.worker
    priority = pod.priority_class or release.priority_class
    pull = [{"name": name} for name in release.pull_secrets]
    return {
        "serviceAccountName": release.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # The Dataset's nodeAffinity is kept to where nodes are labelled: here, a change of it would take the
        # worker from nodes on which pods read, and on which lies what is not uploaded.
        "nodeSelector": {node_label(spec.uid): "true"},
        # A pod that reads the volume is on the node already: a worker follows it, whatever the taints.
        "tolerations": [dict(each) for each in pod.tolerations] or [{"operator": "Exists"}],
        **({"priorityClassName": priority} if priority else {}),
        **({"imagePullSecrets": pull} if pull else {}),
        "terminationGracePeriodSeconds": _grace(spec),
        "securityContext": {"runAsUser": 0, "runAsGroup": 0, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(spec, release, beside, tls=tls)],
        "volumes": _volumes(spec, release, beside, tls=tls),
    }  # fmt: skip


def _grace(spec: DatasetSpec) -> int:
    """Seconds that a worker has to end; all but the last 15 to upload what was written, which its node keeps
    if that is too few."""
    return 135 if spec.writable else 30


def _container(spec: DatasetSpec, release: Release, beside: Beside, *, tls: bool) -> Object:
    asked = spec.worker.requests
    memory = asked.get("memory", str(spec.memory + release.budget))
    probe = {"timeoutSeconds": 5}
    api = {"port": "api", **({"scheme": "HTTPS"} if tls else {})}
    return {
        "name": "worker",
        "image": release.image,
        "imagePullPolicy": release.pull_policy,
        "command": [
            "datacache", "worker", "--config", f"{_CONFIG}/datacache.yaml", "--listen", f"0.0.0.0:{API_PORT}",
            "--token-file", f"{_TOKEN}/token", "--drain-timeout", f"{_grace(spec) - 15}s",
            "--volume-socket", f"{release.run_dir}/{spec.uid}/{VOLUME_SOCKET}",
            *(("--tls-cert", f"{_TLS}/{_CRT}", "--tls-key", f"{_TLS}/{_KEY}") if tls else ()),
        ],
        "env": [
            # A worker has no identity of the node's: what a user did not give keys for cannot be read.
            {"name": "AWS_EC2_METADATA_DISABLED", "value": "true"},
            {"name": "DATACACHE_RUNTIME", "value": f"{release.run_dir}/{spec.uid}"},
            {"name": "HOME", "value": "/tmp"},  # noqa: S108  an emptyDir of its own
        ],
        "ports": [
            {"name": "api", "containerPort": API_PORT, "protocol": "TCP"},
            *(
                [{"name": "metrics", "containerPort": release.metrics_port, "protocol": "TCP"}]
                if release.metrics_port
                else []
            ),
        ],
        "readinessProbe": {**probe, "httpGet": {"path": "/readyz", **api}, "periodSeconds": 5},
        # Why it ended is said on the Dataset, and to pods that wait for it.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        # Restarting it mends little and costs its readers a pause: only when it has long been dumb.
        "livenessProbe": {
            **probe, "httpGet": {"path": "/healthz", **api}, "periodSeconds": 20, "failureThreshold": 6,
        },
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
            *([{"name": "tls", "mountPath": _TLS, "readOnly": True}] if tls else []),
            *([{"name": "keys", "mountPath": _KEYS, "readOnly": True}] if beside.keys else []),
            *([{"name": "identity", "mountPath": _IDENTITY, "readOnly": True}] if beside.tokens else []),
            # A file and no directory: in one of a ConfigMap it would be a link, which a source passes over.
            *([{"name": "manifest", "mountPath": f"{_MANIFEST}/{_MANIFEST_FILE}", "subPath": _MANIFEST_FILE,
                "readOnly": True}] if beside.manifest else []),
            *({"name": f"claim-{i}", "mountPath": f"{_CLAIMS}/{twin.name}", "readOnly": True}
              for i, twin in enumerate(beside.twins)),
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


def _volumes(spec: DatasetSpec, release: Release, beside: Beside, *, tls: bool) -> list[Object]:
    ours = volume_name(spec.uid)
    files = [
        {"key": copied(mount, file.option), "path": f"{mount.slug}/{file.option}"}
        for mount in spec.stores
        for file in mount.files
    ]
    on_node = {"run": f"{release.run_dir}/{spec.uid}", "state": f"{release.state_dir}/{spec.uid}"} | {
        f"tier-{i}": tier_path(tier, spec.uid) for i, tier in enumerate(spec.cache.tiers)
    }
    return [
        {"name": "config", "configMap": {"name": ours}},
        {"name": "token", "secret": {"secretName": f"{ours}-token", "defaultMode": _KEY_FILES}},
        *(
            [{"name": "tls", "secret": {"secretName": f"{ours}-tls", "defaultMode": _KEY_FILES}}]
            if tls else []
        ),
        *(
            [
                {
                    "name": "keys",
                    "secret": {"secretName": f"{ours}-keys", "defaultMode": _KEY_FILES, "items": files},
                }
            ]
            if beside.keys
            else []
        ),
        *(
            [{"name": "identity",
              "secret": {"secretName": f"{ours}-identity", "defaultMode": _KEY_FILES}}]
            if beside.tokens else []
        ),
        *([{"name": "manifest", "configMap": {"name": f"{ours}-manifest"}}] if beside.manifest else []),
        *(
            {"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": twin.name, "readOnly": True}}
            for i, twin in enumerate(beside.twins)
        ),
        {"name": "scratch", "emptyDir": {"sizeLimit": str(_SCRATCH)}},
        *(
            {"name": name, "hostPath": {"path": path, "type": "DirectoryOrCreate"}}
            for name, path in on_node.items()
        ),
    ]  # fmt: skip


# ---- the volume ----------------------------------------------------------------------------------


def affinity_of(volume: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The nodeAffinity of a volume that there is; None where it has none."""
    return (((volume or {}).get("spec")) or {}).get("nodeAffinity") or None


def is_placed_otherwise(spec: DatasetSpec, placed: Mapping[str, Any] | None) -> bool:
    """Whether the volume sends pods by another nodeAffinity than that of the Dataset."""
    return placed is not None and placed.get("required") != spec.node_affinity


def _volume(spec: DatasetSpec, placed: Mapping[str, Any] | None) -> Object:
    """Pods come to nodes on which a worker may be, as the scheduler reads it in the volume."""
    ours = volume_name(spec.uid)
    affinity = placed or ({"required": spec.node_affinity} if spec.node_affinity else None)
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
            **({"nodeAffinity": dict(affinity)} if affinity else {}),
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
