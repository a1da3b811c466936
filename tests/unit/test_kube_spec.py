"""What a Dataset object may say, and the sentence for what it may not."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.config.schemes import SCHEMES
from datacache.config.settings import Consistency, UploadMode
from datacache.errors import SettingError
from datacache.kube.fields import Field, parse_quantity
from datacache.kube.release import Release
from datacache.kube.spec import DatasetSpec, read_dataset
from datacache.model import GiB, Medium, MiB, TiB
from datacache.sources.opening import check_mount

RELEASE = Release(namespace="datacache", image="local.test/datacache:1", audiences=("sts.amazonaws.com",))
UID = "0b6e4c1a-3a57-4b8f-9f53-111111111111"
METADATA = {"name": "imagenet", "namespace": "team-a", "uid": UID,
            "generation": 3}  # fmt: skip


def secret(name: str, key: str = "k", of: str = "s3") -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": of, "key": key}}}


KEYS = [secret("aws_access_key_id", "id"), secret("aws_secret_access_key", "secret")]
S3 = {"mountPoint": "s3://imagenet/train", "name": "train", "encryptOptions": KEYS,
      "options": {"endpoint": "http://minio:9000", "region": "us-east-1"}}  # fmt: skip

# DESIGN.md's example, as far as it is built.
FULL: dict[str, Any] = {
    "mounts": [S3],
    "accessModes": ["ReadWriteMany"],
    "consistency": {"mode": "revalidate", "ttl": "30s"},
    "tieredstore": {"levels": [
        {"mediumtype": "SSD", "path": "/mnt/nvme/datacache", "quota": "1Ti"},
        {"mediumtype": "MEM", "path": "/dev/shm/datacache", "quota": "40Gi", "high": "0.95", "low": "0.7"},
    ]},
    "shared": {"engine": "none"},
    "placement": "replicate",
    "write": {"landing": "SSD", "acceptNodeLoss": True,
              "upload": {"mode": "async", "delay": "5s", "concurrency": 4, "bandwidth": "100M"}},
    "nodeAffinity": {"required": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["a100"]}]}]}},
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "owner": {"uid": 1000, "gid": 1000, "fileMode": "0640"},
    "worker": {"resources": {"requests": {"cpu": "500m"}, "limits": {"memory": "42Gi"}},
               "priorityClassName": "low", "tolerations": [{"operator": "Exists"}],
               "podMetadata": {"labels": {"team": "a"}, "annotations": {"example.com/owner": "a b"}}},
}  # fmt: skip


def dataset(spec: Any, **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "datacache.io/v1alpha1", "kind": "Dataset", "metadata": METADATA | metadata,
            "spec": spec}  # fmt: skip


def read(spec: Any, **metadata: Any) -> DatasetSpec:
    return read_dataset(dataset(spec, **metadata), RELEASE)


def over(spec: dict[str, Any]) -> dict[str, Any]:
    return {"mounts": [S3]} | spec


def mount(**changes: Any) -> dict[str, Any]:
    return {"mounts": [{key: value for key, value in (S3 | changes).items() if value is not None}]}


def level(**changes: Any) -> dict[str, Any]:
    one = {"mediumtype": "SSD", "quota": "1Gi"} | changes
    return {"mounts": [S3], "tieredstore": {"levels": [{k: v for k, v in one.items() if v is not None}]}}


def test_all_of_it_is_read() -> None:
    spec = read(FULL)
    assert (spec.namespace, spec.name, spec.uid, spec.generation) == (
        "team-a",
        "imagenet",
        METADATA["uid"],
        3,
    )
    assert spec.writable and spec.access_modes == ("ReadWriteMany",)
    (one,) = spec.mounts
    assert (one.point.uri, one.point.path) == ("s3://imagenet/train", "/train")
    assert one.point.options == {"endpoint": "http://minio:9000", "region": "us-east-1"}
    assert [(f.option, f.secret, f.key) for f in one.files] == [
        ("aws_access_key_id", "s3", "id"), ("aws_secret_access_key", "s3", "secret"),
    ]  # fmt: skip
    assert spec.secrets == {"s3": {"id", "secret"}}
    assert [(t.medium, t.path, t.quota, t.high, t.low) for t in spec.cache.tiers] == [
        (Medium.MEM, "/dev/shm/datacache", 40 * GiB, 0.95, 0.7),
        (Medium.SSD, "/mnt/nvme/datacache", TiB, 0.95, 0.85),
    ], "fastest first, whatever the order of the levels"
    assert spec.memory == 40 * GiB
    assert (spec.index.consistency, spec.index.ttl) == (Consistency.REVALIDATE, 30.0)
    assert (spec.upload.mode, spec.upload.delay, spec.upload.concurrency, spec.upload.bandwidth) == (
        UploadMode.ASYNC, 5.0, 4, 100_000_000,
    )  # fmt: skip
    assert (spec.mount.uid, spec.mount.gid, spec.mount.file_mode, spec.mount.dir_mode) == (
        1000, 1000, 0o640, 0o755,
    )  # fmt: skip
    assert spec.worker.labels == {"team": "a"} and spec.worker.annotations == {"example.com/owner": "a b"}
    assert spec.worker.limits == {"memory": "42Gi"} and spec.worker.priority_class == "low"
    assert len(spec.worker.tolerations) == 2
    assert spec.node_selector == {"pool": "gpu"}
    assert spec.node_affinity == FULL["nodeAffinity"]["required"]


def test_the_least_that_can_be_said() -> None:
    spec = read({"mounts": [{"mountPoint": "s3://public/data", "options": {"anonymous": "true"}}]})
    assert spec.access_modes == ("ReadOnlyMany",) and not spec.writable and not spec.writing.enabled
    assert spec.mounts[0].point.path == "/"
    assert [(t.medium, t.path, t.quota) for t in spec.cache.tiers] == [
        (Medium.SSD, RELEASE.disk_dir, RELEASE.tier_quota)
    ]
    assert (spec.mount.file_mode, spec.mount.dir_mode) == (0o444, 0o555)
    assert spec.memory == 0 and spec.node_selector == {} and spec.node_affinity is None


def test_a_writable_data_set_waits_for_the_bucket_unless_told_that_nodes_may_be_lost() -> None:
    assert read({"mounts": [S3], "accessModes": ["ReadWriteMany"]}).upload.mode is UploadMode.SYNC


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("aws_access_key_id", "aws_access_key_id"),
        ("access-key", "aws_access_key_id"),
        ("fs.s3.accessKeyId", "aws_access_key_id"),  # as Fluid's users write it
        ("aws.accessKeyId", "aws_access_key_id"),
    ],
)
def test_keys_are_called_what_fluid_users_call_them(name: str, file: str) -> None:
    spec = read(mount(encryptOptions=[secret(name), secret("secret-key")]))
    assert [f.option for f in spec.mounts[0].files] == [file, "aws_secret_access_key"]


def test_a_key_without_a_name_is_the_one_that_is_called_like_the_option() -> None:
    bare = {"name": "aws_access_key_id", "valueFrom": {"secretKeyRef": {"name": "s3"}}}
    spec = read(mount(encryptOptions=[bare, KEYS[1]]))
    assert spec.mounts[0].files[0].key == "aws_access_key_id"


def test_files_of_a_mount_lie_where_they_did_when_other_mounts_come() -> None:
    other = S3 | {"name": "val", "mountPoint": "s3://imagenet/val"}
    alone, second = read({"mounts": [S3]}), read({"mounts": [other, S3]})
    assert alone.mounts[0].slug == second.mounts[1].slug != second.mounts[0].slug


PVC: dict[str, Any] = {"mountPoint": "pvc://nas/raw"}
MANIFEST: dict[str, Any] = {"configMapKeyRef": {"name": "lists", "key": "epoch.jsonl"}}
ROLE: dict[str, Any] = {
    "mountPoint": "s3://bucket", "options": {"role_arn": "arn:aws:iam::123456789012:role/reader"},
}  # fmt: skip
OSS_ROLE = {"mountPoint": "oss://bucket", "encryptOptions": KEYS,
            "options": {"role_arn": "arn:aws:iam::1:role/x"}}  # fmt: skip


def test_a_claim_is_a_mount() -> None:
    spec = read({"mounts": [PVC]})
    (one,) = spec.mounts
    assert (one.claim, one.point.uri, one.point.path) == ("nas", "pvc://nas/raw", "/")
    assert (one.point.options, one.files, one.field) == ({}, (), "spec.mounts[0]")
    whole = read({"mounts": [{"mountPoint": "pvc://nas/", "name": "all"}]}).mounts[0]
    assert (whole.claim, whole.point.uri, whole.point.path) == ("nas", "pvc://nas", "/all")


def test_a_list_is_a_dataset() -> None:
    spec = read({"manifest": MANIFEST | {"options": {"region": "eu-west-1"}, "encryptOptions": KEYS}})
    assert spec.mounts == () and spec.manifest is not None
    assert (spec.manifest.config_map, spec.manifest.key) == ("lists", "epoch.jsonl")
    assert spec.secrets == {"s3": {"id", "secret"}}, "its keys are copied as those of a mount"
    assert spec.stores[0].point.options == {"region": "eu-west-1"}
    spec = read({"manifest": {"uri": "S3://bucket/lists/a.jsonl", "encryptOptions": KEYS}})
    assert spec.manifest is not None
    assert spec.manifest.store.point.uri == "s3://bucket/lists/a.jsonl" and not spec.manifest.config_map


def test_a_bucket_is_opened_by_the_identity_of_an_account() -> None:
    own = ROLE | {"options": ROLE["options"] | {"sts_endpoint": "https://sts.example"}}
    spec = read({"mounts": [own], "serviceAccountName": "reader"})
    assert (spec.account, spec.audiences) == ("reader", ["sts.amazonaws.com"])
    assert spec.mounts[0].point.options == own["options"], "the audience is nothing of the source"


def test_an_identity_is_refused_where_the_operator_has_turned_it_off() -> None:
    with pytest.raises(SettingError, match=r"the operator has web identity turned off \(the chart's webId"):
        read_dataset(
            dataset({"mounts": [ROLE], "serviceAccountName": "reader"}), replace(RELEASE, audiences=())
        )


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {},
        "spec.mounts: '' will not do; expected at least one mount, such as {mountPoint: s3://bucket/prefix}",
    ),
    ({"mounts": {}}, "spec.mounts: 'an object' will not do; expected a list"),
    ({"mount": [S3]}, "spec: 'mount' will not do; expected a field that there is (mounts, "),
    (
        {"mounts": [PVC], "accessModes": ["ReadWriteMany"]},
        "mounts[0].mountPoint: 'pvc://nas/raw' will not do; expected a bucket, with ReadWriteMany: claims",
    ),
    ({"mounts": [PVC | {"mountPoint": "pvc://Nas"}]}, "expected pvc://NAME/path, with the name of a Persist"),
    ({"mounts": [PVC | {"mountPoint": "pvc:///x"}]}, "expected "),
    ({"mounts": [PVC | {"mountPoint": "pvc://nas/a/../../b"}]}, "expected a path in the claim without empty"),
    ({"mounts": [PVC | {"mountPoint": "pvc://nas//b"}]}, "expected a path in the claim without empty steps"),
    (
        {"mounts": [PVC | {"encryptOptions": KEYS}]},
        "encryptOptions: 'a list' will not do; expected none: a cl",
    ),
    (
        {"mounts": [PVC | {"options": {"inside": "/"}}]},
        "options: 'an object' will not do; expected none: a cl",
    ),
    (
        {"manifest": MANIFEST, "accessModes": ["ReadWriteMany"]},
        "spec.manifest: 'an object' will not do; expected none, with ReadWriteMany: what is a list cannot be",
    ),
    (
        {"mounts": [S3], "manifest": MANIFEST},
        "spec.manifest: 'an object' will not do; expected either mounts or",
    ),
    ({"manifest": {}}, "spec.manifest: 'an object' will not do; expected either configMapKeyRef or uri"),
    (
        {"manifest": MANIFEST | {"uri": "s3://bucket/a"}},
        "expected either configMapKeyRef or uri: where the list is",
    ),
    (
        {"manifest": {"configMapKeyRef": {"name": "lists"}}},
        "configMapKeyRef.key: '' will not do; expected a ke",
    ),
    (
        {"manifest": {"uri": "s3://bucket"}},
        "spec.manifest.uri: 's3://bucket' will not do; expected the URI of",
    ),
    (
        {"manifest": {"uri": "s3://bucket/dir/"}},
        "expected the URI of an object, such as s3://bucket/list.jsonl",
    ),
    (
        {"manifest": {"uri": "pvc://nas/list"}},
        "expected the URI of an object, such as s3://bucket/list.jsonl",
    ),
    ({"manifest": {"uri": "file:///etc/shadow"}}, "directories of a node are not for users to read"),
    (
        {"manifest": {"uri": "s3://bucket/list"}},
        "spec.manifest.encryptOptions: '' will not do; expected aws_",
    ),
    (
        {"manifest": MANIFEST | {"options": {"nonsense": "x"}}},
        "expected no such option: there are endpoint, region",
    ),
    ({"manifest": MANIFEST | {"options": {"credentials": "/x"}}}, "expected it in encryptOptions"),
    (
        {"manifest": MANIFEST | {"encryptOptions": KEYS[:1]}},
        "expected both aws_access_key_id and aws_secret_access",
    ),
    (
        {"mounts": [ROLE | {"options": {"role_arn": "reader"}}]},
        "a role such as arn:aws:iam::123456789012:role",
    ),
    (
        {"mounts": [ROLE | {"encryptOptions": KEYS}], "serviceAccountName": "reader"},
        "encryptOptions: 'a list' will not do; expected none, or options without role_arn",
    ),
    (
        {"mounts": [ROLE | {"options": ROLE["options"] | {"anonymous": "true"}}]},
        "expected either anonymous or role_arn in it, not both",
    ),
    (
        {"mounts": [ROLE]},
        "spec.mounts[0].options[role_arn]: 'arn:aws:iam::123456789012:role/reader' will not do",
    ),
    (mount(options={"audience": "sts"}), "options[audience]: 'sts' will not do; expected role_arn beside it"),
    (
        mount(options={"sts_endpoint": "https://sts"}),
        "options[sts_endpoint]: 'https://sts' will not do; expect",
    ),
    (mount(options={"web_identity": "/etc/shadow"}), "expected role_arn, and whose identity it is as serv"),
    ({"mounts": [OSS_ROLE]}, "no such option: oss:// has"),
    (mount(mountPoint="file:///etc"), "directories of a node are not for users to read"),
    (mount(mountPoint="local:///mnt"), "directories of a node are not for users to read"),
    (mount(mountPoint="simplecache::file:///etc"), "expected one of s3://"),
    (mount(mountPoint="hdfs://namenode/x"), "expected one of s3://, oss://, gs://, az://, http://, https://"),
    (mount(mountPoint="dataset://a/b"), "sharing a Dataset with another namespace is not built yet"),
    (
        mount(mountPoint="s3://id:hunter2@bucket/x"),
        "spec.mounts[0].mountPoint: '***' will not do; expected a URI without user",
    ),
    (mount(mountPoint="s3://b"), "a bucket name of 3 to 255"),
    (mount(mountPoint="s3://bucket?x=1"), "without a query"),
    (mount(options={"endpoint": "minio:9000"}), "spec.mounts[0].options[endpoint]: 'minio:9000' will not do"),
    (mount(options={"endpoint_url": "http://m"}), "no such option: s3:// has endpoint, region, style"),
    (
        mount(options={"secret_access_key": "hunter2"}),
        "spec.mounts[0].options[secret_access_key]: '***' will not "
        "do; expected it in encryptOptions, as a key of a Secret",
    ),
    (
        mount(options={"credentials": "/etc/shadow"}),
        "options[credentials]: '***' will not do; expected it in encr",
    ),
    (mount(options={"profile": "admin"}), "no profiles in a worker"),
    (mount(options={"region": 7}), "expected the name of a region"),
    (
        mount(options={"anonymous": "perhaps"}),
        "options[anonymous]: 'perhaps' will not do; expected true or false",
    ),
    (mount(options={"anonymous": "true"}), "encryptOptions: 'a list' will not do; expected none, or options"),
    (
        mount(encryptOptions=None),
        "encryptOptions: '' will not do; expected aws_access_key_id and aws_secret_access"
        '_key from a Secret, or `anonymous: "true"`',
    ),
    (mount(encryptOptions=KEYS[:1]), "expected both aws_access_key_id and aws_secret_access_key"),
    (
        mount(encryptOptions=[*KEYS, secret("access-key")]),
        "encryptOptions[2].name: 'access-key' will not do; exp",
    ),
    (mount(encryptOptions=[*KEYS, secret("endpoint")]), "expected it in options: it is no secret"),
    (mount(encryptOptions=[*KEYS, secret("credentials")]), "either credentials or the single keys"),
    (
        mount(encryptOptions=[{"name": "access-key", "value": "hunter2"}]),
        "expected a field that there is (name, v",
    ),
    (
        mount(encryptOptions=[secret("access-key", of="../x")]),
        "secretKeyRef.name: '../x' will not do; expected the",
    ),
    (
        mount(encryptOptions=[secret("access-key", key="a/b")]),
        "secretKeyRef.key: 'a/b' will not do; expected a key",
    ),
    (mount(path="/a/../b"), "spec.mounts[0].path: '/a/../b' will not do; expected a path without .."),
    (mount(name="a/b"), "spec.mounts[0].name: 'a/b' will not do"),
    (
        {"mounts": [S3, S3]},
        "spec.mounts[1].name: 'train' will not do; expected a path neither in nor above that",
    ),
    ({"mounts": [S3, S3 | {"name": None}]}, "a name (or a path) for each mount"),
    (
        {"mounts": [{"mountPoint": "oss://bucket", "encryptOptions": KEYS}]},
        "options.endpoint: '' will not do; expe",
    ),
    (
        {"mounts": [{"mountPoint": "az://container", "options": {"account": "me"}}]},
        "keys of Azure is not built yet",
    ),
    ({"mounts": [{"mountPoint": "https://user@host/x"}]}, "mountPoint: '***' will not do"),
    (
        {"mounts": [{"mountPoint": "https://host/x"}], "accessModes": ["ReadWriteMany"]},
        "web servers take no files",
    ),
    (
        over({"accessModes": ["ReadWriteOnce"]}),
        "accessModes[0]: 'ReadWriteOnce' will not do; expected ReadOnlyMany or ReadWriteMany",
    ),
    (over({"accessModes": ["ReadWriteMany"], "consistency": {"mode": "immutable"}}), "what is immutable "),
    (over({"consistency": {"ttl": "soon"}}), "spec.consistency.ttl: 'soon' will not do; expected a durat"),
    (over({"shared": {"engine": "peers"}}), "spec.shared.engine: 'peers' will not do; expected none: shar"),
    (over({"placement": "shard"}), "spec.placement: 'shard' will not do; expected replicate: sharding is"),
    (
        over({"serviceAccountName": "me"}),
        "spec.serviceAccountName: 'me' will not do; expected none, or the option role_arn at a mount of s3://",
    ),
    (
        {"mounts": [ROLE], "serviceAccountName": "Me"},
        "expected the name of a ServiceAccount of its namespace",
    ),
    (
        {
            "mounts": [ROLE | {"options": ROLE["options"] | {"audience": "https://kubernetes.default.svc"}}],
            "serviceAccountName": "me",
        },
        "spec.mounts[0].options[audience]: 'https://kubernetes.default.svc' will not do; expected "
        "sts.amazonaws.com (the chart's webIdentity.audiences)",
    ),
    (over({"write": {}}), "spec.write: 'an object' will not do; expected none, or accessModes: [ReadWri"),
    (
        over({"accessModes": ["ReadWriteMany"], "write": {"upload": {"mode": "async"}}}),
        "spec.write.upload.mode: 'async' will not do; expected sync, or write.acceptNodeLoss: true",
    ),
    (over({"accessModes": ["ReadWriteMany"], "write": {"landing": "CEPH"}}), "landing in Ceph is not bu"),
    (level(mediumtype="CEPH"), "tiers in a Ceph pool is not built yet"),
    (level(mediumtype="HDD"), "levels[0].mediumtype: 'HDD' will not do; expected MEM or SSD or CEPH"),
    (level(quota=None), "levels[0].quota: '' will not do; expected the most that the copies may take"),
    (level(quota="lots"), "levels[0].quota: 'lots' will not do; expected a quantity such as 40Gi"),
    (level(quota="1.5"), "levels[0].quota: '1.5' will not do; expected a size"),
    (
        level(path="/etc"),
        "levels[0].path: '/etc' will not do; expected a path below /var/cache/datacache, /dev/shm",
    ),
    (level(path="/mnt/../etc"), "expected one absolute path, without .."),
    (level(path="/mnt/a,/mnt/b"), "expected one absolute path"),  # Fluid's list of paths
    (level(high="0.5", low="0.9"), "levels[0].low: '0.9' will not do; expected less than high, 0.5"),
    (level(quotaList="1Gi,2Gi"), "levels[0]: 'quotaList' will not do; expected a field that there is"),
    (over({"tieredstore": {"levels": [{"mediumtype": "SSD", "quota": "1Gi"}] * 2}}), "of another level"),
    (over({"owner": {"uid": -1}}), "spec.owner.uid: -1 will not do; expected a whole number, 0 to "),
    (over({"owner": {"fileMode": "rw"}}), "spec.owner.fileMode: 'rw' will not do; expected permission"),
    (over({"worker": {"priorityClassName": "system-node-critical"}}), "workers give way to training"),
    (over({"worker": {"resources": {"limits": {"memory": "100Mi"}}}}), "expected at least 512Mi"),
    (over({"worker": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}}), "workers need nothing else"),
    (over({"worker": {"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}}}), "at most its li"),
    (over({"worker": {"podMetadata": {"annotations": {"sidecar.istio.io/inject": "true"}}}}), "your own"),
    (over({"worker": {"podMetadata": {"labels": {"datacache.io/dataset": "x"}}}}), "a key of your own"),
    (over({"worker": {"podMetadata": {"labels": {"a b": "x"}}}}), "a label whose key is like"),
    (over({"tolerations": [{"operator": "Equal"}]}), "expected Exists, without a key"),
    (over({"nodeSelector": {"pool": True}}), "spec.nodeSelector[pool]: True will not do; expected the va"),
    (over({"nodeAffinity": {"preferred": []}}), "'preferred' will not do; expected a field that there is"),
    (
        over(
            {
                "nodeAffinity": {
                    "required": {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "In"}]}]
                    }
                }
            }
        ),
        "expected at least one value, with In",
    ),
]


@pytest.mark.parametrize(("spec", "said"), REFUSED)
def test_what_cannot_be_is_refused_with_the_path_of_the_field(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as refused:
        read(spec)
    assert said in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_name_that_is_no_label_is_refused() -> None:
    with pytest.raises(SettingError, match=r"metadata.name: .* expected a name of at most 63 characters"):
        read(FULL, name="x" * 64)


def test_nothing_of_the_object_is_changed() -> None:
    obj = dataset(copy.deepcopy(FULL))
    read_dataset(obj, RELEASE)
    assert obj == dataset(FULL)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("20M", 20_000_000), ("20Mi", 20 * MiB), ("1.5Gi", 1536 * MiB), ("2e3", 2000), ("1k", 1000),
     ("500m", 0.5), ("1E", 10**18), ("1Ei", 2**60)],
)  # fmt: skip
def test_quantities_are_those_of_kubernetes(text: str, number: float) -> None:
    assert parse_quantity(text) == number


@pytest.mark.parametrize("text", ["", "1KiB", "1 Gi", "-1", "Gi", "1K", "0x1", "1e", "٣"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match=r"^"):
        parse_quantity(text)


# ---- whatever the API may hand out ---------------------------------------------------------------

_WORDS = st.sampled_from(
    ["s3://bucket/x", "oss://bucket", "az://box", "https://host/x", "https://[", "/mnt/x", "/", "1Gi", "true",
     "..", "aws_access_key_id", "ReadWriteMany", "MEM", "CEPH", "peers", "async", "0.5", "1e99", "\x00",
     "\n", "a" * 5000]
)  # fmt: skip
_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats(allow_nan=True) | _WORDS
    | st.text(max_size=8)
)  # fmt: skip
_ANY = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | _WORDS, inner, max_size=3)
    ),
    max_leaves=6,
)


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in _places(part, (*at, key)))]


def _put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    changed = copy.copy(value)
    changed[place[0]] = _put(value[place[0]], place[1:], new)
    return changed


@given(data=st.data())
def test_whatever_stands_in_a_field_it_is_taken_or_refused_in_one_line(data: st.DataObject) -> None:
    obj = dataset(FULL)
    for _ in range(data.draw(st.integers(1, 3))):
        obj = _put(obj, data.draw(st.sampled_from(_places(obj)[1:])), data.draw(_ANY))
    try:
        spec = read_dataset(obj, RELEASE)
    except SettingError as refused:
        assert "\n" not in str(refused) and len(str(refused)) < 1500
        assert refused.name and refused.expected
    else:
        assert isinstance(spec, DatasetSpec)


_OPTION = st.dictionaries(
    st.sampled_from(["endpoint", "region", "style", "anonymous", "requester-pays", "account"]),
    st.sampled_from(
        ["http://minio:9000", "https://oss-cn-hangzhou.aliyuncs.com", "http://h:99999", "http://[::1]:1", "h",
         "//h", "http://h/me", "path", "cname", "virtual", "true", "false", "ON", "eu-west-1", "7", " x ", "http://a@h"]
    )
    | st.text(max_size=6),
)  # fmt: skip


@given(
    uri=st.sampled_from(["s3://", "oss://", "gs://", "az://", "http://", "https://", "S3://"])
    .flatmap(lambda scheme: st.text("abc.-/%?#@:[]1 _", max_size=14).map(scheme.__add__)),
    options=_OPTION, keys=st.sampled_from([[], KEYS, [secret("credentials")]]),
)  # fmt: skip
def test_a_mount_that_is_taken_is_one_that_a_worker_can_open(uri: str, options: Any, keys: Any) -> None:
    try:
        spec = read({"mounts": [{"mountPoint": uri, "options": options, "encryptOptions": keys}]})
    except SettingError:
        return
    check_mount(spec.mounts[0].point, {})


def test_every_option_of_a_scheme_can_be_given_or_is_refused_by_name() -> None:
    """A new option of a source is no surprise here."""
    for scheme, known in SCHEMES.items():
        if scheme == "file":
            continue
        for name in known.options:
            with pytest.raises(SettingError) as refused:
                read({"mounts": [{"mountPoint": f"{scheme}://bucket", "options": {name: ""}}]})
            assert "no such option" not in str(refused.value)


def test_a_field_knows_its_path() -> None:
    assert Field("spec", {"a": [{"b": 1}]})["a"].items()[0]["b"].path == "spec.a[0].b"
