"""What of that which lies beside a Dataset workers can have, and the sentence for what they cannot."""

import base64
import copy
from typing import Any

import pytest

from datacache.errors import SettingError
from datacache.kube.beside import (
    MAX_KEY,
    Token,
    check_twins,
    is_good,
    read_key,
    read_manifest,
    renewal,
    twin_of,
)
from datacache.kube.phase import rfc3339
from datacache.kube.release import Release
from datacache.kube.spec import DatasetSpec, read_dataset

UID = "0b6e4c1a-3a57-4b8f-9f53-111111111111"
RELEASE = Release(namespace="datacache", image="local.test/datacache:1", audiences=("sts.amazonaws.com",))


def spec(**fields: Any) -> DatasetSpec:
    metadata = {"name": "d", "namespace": "team-a", "uid": UID, "generation": 1}
    return read_dataset({"metadata": metadata, "spec": fields}, RELEASE)


# ---- claims --------------------------------------------------------------------------------------

NAS = spec(mounts=[{"mountPoint": "pvc://nas/raw"}])
CSI = {"driver": "nfs.csi.k8s.io", "volumeHandle": "10.0.0.1#export#", "volumeAttributes": {"share": "/"},
       "nodeStageSecretRef": {"name": "s", "namespace": "storage"},
       "controllerExpandSecretRef": {"name": "e", "namespace": "storage"}}  # fmt: skip
CLAIM = {"metadata": {"name": "nas", "namespace": "team-a", "uid": "c1"}, "spec": {"volumeName": "pv-nas"},
         "status": {"phase": "Bound"}}  # fmt: skip
VOLUME = {
    "metadata": {"name": "pv-nas", "uid": "v1"},
    "spec": {"csi": CSI, "accessModes": ["ReadWriteMany"], "mountOptions": ["hard"],
             "volumeMode": "Filesystem",
             "persistentVolumeReclaimPolicy": "Delete", "claimRef": {"uid": "c1", "name": "nas"},
             "nodeAffinity": {"required": {"nodeSelectorTerms": [{}]}}},
}  # fmt: skip


def changed(obj: Any, path: str, value: Any) -> Any:
    found = at = copy.deepcopy(obj)
    *steps, last = path.split(".")
    for step in steps:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return found


def twin(claim: Any = CLAIM, volume: Any = VOLUME) -> Any:
    return twin_of(NAS.mounts[0], claim, volume, NAS)


def test_a_twin_has_the_source_of_the_volume_and_what_mounts_it_the_same_way() -> None:
    """A node takes two volumes of one handle for one, and stages it in the way of whoever comes first."""
    found = twin()
    assert found.claim == "nas" and found.access_modes == ("ReadWriteMany",)
    assert found.source == {"csi": {key: value for key, value in CSI.items() if "Expand" not in key}}
    assert found.mount_options == ("hard",) and found.node_affinity == VOLUME["spec"]["nodeAffinity"]


def test_a_twin_is_named_after_the_volume_so_that_another_is_another() -> None:
    first, other = twin(), twin(volume=changed(VOLUME, "metadata.uid", "v2"))
    assert first.name != other.name and first.name.startswith(f"datacache-{UID}-")
    assert len(first.name) <= 63


@pytest.mark.parametrize("kind", ["nfs", "hostPath", "local"])
def test_kinds_of_volumes_that_may_have_one(kind: str) -> None:
    volume = changed(changed(VOLUME, "spec.csi", None), f"spec.{kind}", {"path": "/export"})
    assert twin(volume=volume).source == {kind: {"path": "/export"}}


@pytest.mark.parametrize(
    ("claim", "volume", "said"),
    [
        (None, None, "a PersistentVolumeClaim that there is in namespace team-a"),
        (
            changed(CLAIM, "metadata.deletionTimestamp", "now"),
            VOLUME,
            "a PersistentVolumeClaim that there is",
        ),
        (changed(CLAIM, "status.phase", "Pending"), VOLUME, "a claim that is bound"),
        (CLAIM, None, "a claim that is bound"),
        (CLAIM, changed(VOLUME, "spec.claimRef.uid", "of-another"), "a claim that is bound"),
        (CLAIM, changed(VOLUME, "spec.claimRef", None), "a claim that is bound"),
        (
            CLAIM,
            changed(VOLUME, "spec.volumeMode", "Block"),
            "a claim with a file system, not a block device",
        ),
        (CLAIM, changed(VOLUME, "spec.accessModes", ["ReadWriteOnce"]), "a volume that many nodes may mount"),
        (
            CLAIM,
            changed(changed(VOLUME, "spec.csi", None), "spec.iscsi", {}),
            "a volume that may have a twin (csi, nfs, hostPath, local), of which nas's is none",
        ),
        (CLAIM, changed(VOLUME, "spec.csi.driver", "csi.datacache.io"), "a claim that is no Dataset's"),
    ],
)
def test_a_claim_that_cannot_have_one_is_refused_with_a_sentence(claim: Any, volume: Any, said: str) -> None:
    with pytest.raises(SettingError) as refused:
        twin(claim, volume)
    assert str(refused.value).startswith("spec.mounts[0].mountPoint: 'pvc://nas/raw' will not do; expected ")
    assert said in str(refused.value)


def test_one_volume_by_two_names_is_refused() -> None:
    """A pod with both would wait for ever: kubernetes/kubernetes#132921."""
    both = spec(mounts=[{"mountPoint": "pvc://a", "name": "a"}, {"mountPoint": "pvc://b", "name": "b"}])
    claims = [changed(CLAIM, "metadata.uid", each) for each in ("ca", "cb")]
    volumes = [
        changed(changed(VOLUME, "spec.claimRef.uid", f"c{each}"), "metadata.uid", f"v{each}") for each in "ab"
    ]
    twins = [twin_of(*each, both) for each in zip(both.mounts, claims, volumes, strict=True)]
    with pytest.raises(SettingError, match="claim a, which is the same volume by another name"):
        check_twins(both, twins)
    check_twins(both, twins[:1])


# ---- lists ---------------------------------------------------------------------------------------


def listed(**fields: Any) -> DatasetSpec:
    reference = {"configMapKeyRef": {"name": "lists", "key": "epoch"}}
    return spec(manifest=reference | {"options": {"anonymous": "true"}} | fields)


def config_map(text: str) -> dict[str, Any]:
    return {"data": {"epoch": text, "other": "x"}}


def test_a_list_is_the_key_that_was_named() -> None:
    assert read_manifest(listed(), config_map('"s3://bucket/a"')) == b'"s3://bucket/a"'
    binary = {"binaryData": {"epoch": base64.b64encode(b'"s3://bucket/a"').decode()}}
    assert read_manifest(listed(), binary) == b'"s3://bucket/a"'


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            None,
            "spec.manifest.configMapKeyRef.name: 'lists' will not do; expected a ConfigMap that there is in",
        ),
        ({"data": {}}, "spec.manifest.configMapKeyRef.key: 'epoch' will not do; expected a key of ConfigMap"),
        ({"binaryData": {"epoch": "?"}}, "expected one that holds bytes"),
        (config_map("x" * (MAX_KEY + 1)), "expected at most 1048576 bytes"),
        (config_map("s3://bucket/a"), "key epoch of ConfigMap lists, line 1: 's3://bucket/a' will not do"),
        (
            config_map('"s3://b1/a"\n"file:///etc/shadow"'),
            "expected URLs of s3://, oss://, gs://, az://, http",
        ),
        (config_map('"simplecache::file:///etc/shadow"'), "line 1: 'simplecache::file:///etc/shadow'"),
        (config_map('"memory://bucket/a"'), "expected URLs of s3://"),
        (config_map("# nothing"), "expected at least one line"),
        (
            config_map('"oss://bucket/a"'),
            "spec.manifest.options: 'oss://bucket' will not do; expected endpoint",
        ),
        (config_map('"az://box/a"'), "expected account in it, which a URL needs"),
    ],
)
def test_a_list_that_will_not_do_is_refused_before_a_worker_reads_it(found: Any, said: str) -> None:
    with pytest.raises(SettingError) as refused:
        read_manifest(listed(), found)
    assert said in str(refused.value)


def test_urls_that_need_keys_are_refused_without() -> None:
    with pytest.raises(SettingError, match="encryptOptions: 's3://bucket' will not do; expected"):
        read_manifest(listed(options={}), config_map('"s3://bucket/a"'))
    assert read_manifest(listed(options={}), config_map('"https://host/a"'))


def test_a_key_with_any_bytes_is_read() -> None:
    binary = {"binaryData": {"k": base64.b64encode(b"\xff\n").decode()}}
    assert read_key(binary, name="n", key="k", field="f", namespace="x") == b"\xff\n"


# ---- web identities ------------------------------------------------------------------------------


def test_a_token_is_renewed_after_four_fifths_of_its_life() -> None:
    now = 1_800_000_000.0
    assert renewal(rfc3339(now + 3600), now) == rfc3339(now + 2880)
    token = Token("sts", "x", renew=renewal(rfc3339(now + 3600), now), of="me")
    assert is_good(token, account="me", now=now + 2879)
    assert not is_good(token, account="me", now=now + 2880)
    assert not is_good(token, account="other", now=now), "whose it is was changed"
    assert not is_good(None, account="me", now=now)


@pytest.mark.parametrize("expires", ["soon", "2001-01-01T00:00:00Z"])
def test_a_token_whose_end_nobody_knows_or_has_passed_is_renewed_at_once(expires: str) -> None:
    now = 1_800_000_000.0
    assert not is_good(Token("sts", "x", renew=renewal(expires, now), of="me"), account="me", now=now)
