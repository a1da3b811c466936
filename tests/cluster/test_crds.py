"""
What the API server itself takes and refuses of our objects, and how they look to who types kubectl.

`charts/datacache/files/crds` has the definitions. A refusal is a sentence here, and never quotes a secret.
What the API refuses the controller would have refused, too: `datacache.kube.spec` is asked the same.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datacache.errors import SettingError
from datacache.kube.phase import Figures, Observed, Workers, status
from datacache.kube.release import GROUP, VERSION
from datacache.kube.spec import read_dataset
from tests.cluster.plane import ControlPlane, wait_until
from tests.unit.test_kube_spec import (
    FULL,
    MANIFEST,
    PVC,
    REFUSED,
    RELEASE,
    ROLE,
    S3,
    dataset,
    level,
    mount,
    over,
    secret,
)

ROOT = Path(__file__).parents[2]
CRDS = ROOT / "charts/datacache/files/crds"
API = f"/apis/{GROUP}/{VERSION}"
SPACE = "crds"
RWX = {"accessModes": ["ReadWriteMany"]}


class Api:
    """Objects of ours in one namespace, with the answers of the API as they are."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane

    def create(
        self, kind: str, spec: Any, *, name: str = "x", keep: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """As `kubectl create` does. Only a dry run, unless `keep`."""
        obj = {"apiVersion": f"{GROUP}/{VERSION}", "kind": kind, "spec": spec,
               "metadata": {"name": name, "namespace": SPACE}}  # fmt: skip
        dry = "" if keep else "&dryRun=All"
        return self._ask("POST", f"{self.of(kind)}?fieldValidation=Strict{dry}", obj)

    def change(self, kind: str, name: str, patch: Any, *, of: str = "") -> tuple[int, dict[str, Any]]:
        """Merge `patch` into an object, or into its subresource `of`."""
        return self._ask("PATCH", f"{self.of(kind)}/{name}{of}?fieldValidation=Strict", patch)

    def delete(self, kind: str, name: str) -> None:
        assert self._ask("DELETE", f"{self.of(kind)}/{name}", {})[0] == 200

    def refusal(self, kind: str, spec: Any) -> str:
        """The sentence of a refusal; empty when it is taken."""
        code, answer = self.create(kind, spec)
        assert code in (201, 400, 422), answer
        return "" if code == 201 else answer["message"]

    @staticmethod
    def of(kind: str) -> str:
        space = "" if kind == "CacheNode" else f"/namespaces/{SPACE}"
        return f"{API}{space}/{kind.lower()}s"

    def _ask(self, method: str, path: str, given: Any) -> tuple[int, dict[str, Any]]:
        code, answer = self.plane.ask(path, given, method=method)
        return code, json.loads(answer)


@pytest.fixture(scope="module")
def api(plane: ControlPlane) -> Iterator[Api]:
    plane.kubectl("apply", "--server-side", "-f", str(CRDS))
    for kind in ("datasets", "dataloads", "cachenodes"):
        plane.kubectl("wait", "--for=condition=Established", f"crd/{kind}.{GROUP}", "--timeout=60s")
    plane.kubectl("create", "namespace", SPACE)
    found = Api(plane)
    wait_until(
        lambda: found.create("DataLoad", {"dataset": {"name": "x"}})[0] == 201, "the API to serve our kinds"
    )
    yield found
    plane.kubectl("delete", "namespace", SPACE, "--wait=false")


# ---- Dataset: what is refused, and what is taken instead -----------------------------------------

OSS = {"mountPoint": "oss://bucket", "encryptOptions": S3["encryptOptions"]}
HTTP = {"mountPoint": "https://host/x"}
CA = [secret("ca_bundle")]

# What is refused, the field and the sentence of the refusal, and the same that is taken.
RULES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("mounts", {}, "spec: Invalid value: a Dataset is either mounts or a manifest: give one", over({})),
    (
        "both",
        over({"manifest": MANIFEST}),
        "a Dataset is either mounts or a manifest: give",
        {"manifest": MANIFEST},
    ),
    (
        "list",
        {"manifest": MANIFEST} | RWX,
        "spec.manifest: Invalid value: what is a list cannot be written: accessModes: [ReadOnlyMany], or mo",
        {"manifest": MANIFEST},
    ),
    (
        "place",
        {"manifest": MANIFEST | {"uri": "https://host/list"}},
        "spec.manifest: Invalid value: the list lies in one place: configMapKeyRef or uri",
        {"manifest": {"uri": "https://host/list"}},
    ),
    (
        "object",
        {"manifest": {"uri": "https://host/"}},
        'spec.manifest.uri: Invalid value: "https://host/": this is the URI of an object: s3://',
        {"manifest": {"uri": "https://host/x"}},
    ),
    (
        "signature",
        {"manifest": {"uri": "https://host/list?X-Amz-Signature=hunter2"}},
        "spec.manifest: Invalid value: uri has a user, a password or a query in it",
        {"manifest": {"uri": "https://host/list"}},
    ),
    (
        "lists",
        {"manifest": {"uri": "s3://bucket/list"}},
        "spec.manifest: Invalid value: the bucket needs keys: name a Secret in encryptOptions",
        {"manifest": {"uri": "s3://bucket/list", "encryptOptions": S3["encryptOptions"]}},
    ),
    (
        "epoch",
        {"manifest": {"configMapKeyRef": {"name": "lists", "key": "a/b"}}},
        'configMapKeyRef.key: Invalid value: "a/b": a key of a ConfigMap has letters, digits',
        {"manifest": MANIFEST},
    ),
    (
        "some",
        {"mounts": []},
        "spec.mounts: Invalid value: 0: spec.mounts in body should have at least 1 items",
        over({}),
    ),
    ("unknown", {"mount": [S3]}, 'unknown field "spec.mount"', over({})),
    (
        "write",
        over({"write": {}}),
        "spec.write: Invalid value: it says how to write, and accessModes does not let anybody: leave "
        "write out, or set "
        "accessModes: [ReadWriteMany]",
        over(RWX | {"write": {}}),
    ),
    (
        "immutable",
        over(RWX | {"consistency": {"mode": "immutable"}}),
        "spec.consistency.mode: Invalid value: what is immutable cannot be written: mode revalidate, or "
        "accessModes: "
        "[ReadOnlyMany]",
        over({"consistency": {"mode": "immutable"}}),
    ),
    (
        "readonly",
        over(RWX | mount(readOnly=True)),
        "spec.mounts: Invalid value: a readOnly mount in a Dataset that is written is not built yet",
        mount(readOnly=True),
    ),
    (
        "web",
        {"mounts": [HTTP]} | RWX,
        "spec.mounts: Invalid value: web servers take no files: accessModes: [ReadOnlyMany], or mounts of "
        "buckets only",
        {"mounts": [HTTP]},
    ),
    (
        "shared",
        over({"shared": {"engine": "peers"}}),
        "spec.shared.engine: Invalid value: sharing a cache between nodes is not built yet, so engine can "
        "only be none",
        over({"shared": {"engine": "none"}}),
    ),
    (
        "account",
        over({"serviceAccountName": "me"}),
        "spec: Invalid value: a web identity is an account and a role: serviceAccountName, and the option",
        {"mounts": [ROLE], "serviceAccountName": "me"},
    ),
    (
        "role",
        {"mounts": [ROLE]},
        "spec: Invalid value: a web identity is an account and a role: serviceAccountName, and the option",
        {"mounts": [ROLE], "serviceAccountName": "me"},
    ),
    (
        "whose",
        {"mounts": [ROLE], "serviceAccountName": "Me"},
        'spec.serviceAccountName: Invalid value: "Me": this is the name of a ServiceAccount of the Dataset',
        {"mounts": [ROLE], "serviceAccountName": "me"},
    ),
    (
        "names",
        {"mounts": [S3, S3 | {"name": None}]},
        "spec.mounts: Invalid value: with several mounts each needs a name (or a path) to appear under",
        {"mounts": [S3, S3 | {"name": None, "path": "/val"}]},
    ),
    (
        "twice",
        {"mounts": [S3, HTTP | {"path": "/train"}]},
        "spec.mounts: Invalid value: two mounts would appear at the same path, so give them other names or "
        "paths",
        {"mounts": [S3, HTTP | {"path": "/val"}]},
    ),
    (
        "keys",
        mount(encryptOptions=None),
        "spec.mounts[0]: Invalid value: the bucket needs keys: name a Secret in encryptOptions, or say "
        "`anonymous: "
        '"true"` in options for a public bucket',
        mount(encryptOptions=None, options={"anonymous": "true"}),
    ),
    (
        "anonymous",
        mount(options={"anonymous": "true"}),
        "spec.mounts[0]: Invalid value: anonymous requests are not signed: no keys in encryptOptions, or "
        "no anonymous in",
        mount(options={"anonymous": "true"}, encryptOptions=CA),
    ),
    (
        "oss",
        {"mounts": [OSS]},
        "spec.mounts[0]: Invalid value: oss:// needs the endpoint of the bucket's region",
        {"mounts": [OSS | {"options": {"endpoint": "https://oss-cn-hangzhou.aliyuncs.com"}}]},
    ),
    (
        "azure",
        {"mounts": [{"mountPoint": "az://container", "options": {"anonymous": "true"}}]},
        "spec.mounts[0]: Invalid value: az:// needs the name of the storage account in options, as account",
        {"mounts": [{"mountPoint": "az://container", "options": {"anonymous": "true", "account": "me"}}]},
    ),
    (
        "user",
        mount(mountPoint="s3://id:hunter2@bucket/x"),
        "spec.mounts[0]: Invalid value: mountPoint has a user, a password or a query in it: name the keys "
        "of a Secret",
        mount(mountPoint="s3://bucket/x"),
    ),
    (
        "query",
        mount(mountPoint="s3://bucket/x?X-Amz-Signature=hunter2"),
        "spec.mounts[0]: Invalid value: mountPoint has a user, a password or a query in it",
        mount(mountPoint="s3://bucket"),
    ),
    (
        "claim",
        {"mounts": [PVC]} | RWX,
        "spec.mounts: Invalid value: claims are read here, and not written: accessModes: [ReadOnlyMany]",
        {"mounts": [PVC]},
    ),
    (
        "pvc",
        {"mounts": [PVC | {"encryptOptions": S3["encryptOptions"]}]},
        "spec.mounts[0]: Invalid value: a claim has neither options nor keys: what is needed to mount it",
        {"mounts": [PVC | {"mountPoint": "pvc://my.nas/a/..b/c"}]},
    ),
    (
        "up",
        {"mounts": [PVC | {"mountPoint": "pvc://nas/a/../../etc"}]},
        'mountPoint: Invalid value: "pvc://nas/a/../../etc": this is pvc://CLAIM/PATH, with the name of a',
        {"mounts": [PVC | {"mountPoint": "pvc://nas/a/etc/"}]},
    ),
    (
        "steps",
        {"mounts": [PVC | {"mountPoint": "pvc://nas//a"}]},
        'mountPoint: Invalid value: "pvc://nas//a": this is pvc://CLAIM/PATH',
        {"mounts": [PVC | {"mountPoint": "pvc://nas"}]},
    ),
    (
        "end",
        {"mounts": [PVC | {"mountPoint": "pvc://nas/a/.."}]},
        'mountPoint: Invalid value: "pvc://nas/a/..": this is pvc://CLAIM/PATH',
        {"mounts": [PVC | {"mountPoint": "pvc://nas/a/..."}]},
    ),
    (
        "nobody",
        {"mounts": [PVC | {"mountPoint": "pvc://Nas"}]},
        'mountPoint: Invalid value: "pvc://Nas": this is pvc://CLAIM/PATH',
        {"mounts": [PVC]},
    ),
    (
        "dataset",
        mount(mountPoint="dataset://a/b"),
        "dataset:// (the Dataset of another namespace) is not built yet",
        mount(),
    ),
    (
        "node",
        mount(mountPoint="local:///mnt"),
        "directories of a node are not for users to read: an object store",
        mount(),
    ),
    (
        "scheme",
        mount(mountPoint="hdfs://namenode/x"),
        'spec.mounts[0].mountPoint: Invalid value: "hdfs://namenode/x": a mount point is a URI: s3://, '
        "oss://, gs:// or "
        "az://BUCKET/PREFIX, https://HOST/PATH, or pvc://CLAIM/PATH",
        mount(),
    ),
    (
        "name",
        mount(name="a/b"),
        'spec.mounts[0].name: Invalid value: "a/b": a name has letters, digits, dots',
        mount(),
    ),
    (
        "path",
        mount(path="/a/../b"),
        'spec.mounts[0].path: Invalid value: "/a/../b": a path starts with / and has no ..',
        mount(path="/a/..b"),
    ),
    (
        "option",
        mount(options={"region": 7}),
        "spec.mounts[0].options.region in body must be of type string",
        mount(options={"region": "7x"}),
    ),
    (
        "secret",
        mount(options={"secret_access_key": "hunter2"}),
        "spec.mounts[0].options: Invalid value: keys and files do not stand in options, where everybody "
        "can read them; name a "
        "key of a Secret in encryptOptions",
        mount(),
    ),
    (
        "profile",
        mount(options={"profile": "admin"}),
        "spec.mounts[0].options: Invalid value: workers have no profiles",
        mount(),
    ),
    (
        "nested",
        mount(options={"encryptOptions": [secret("access-key")]}),  # as on a page of Fluid's
        'unknown field "spec.mounts[0].options.encryptOptions[0].name"',
        mount(),
    ),
    (
        "of",
        mount(encryptOptions=[secret("access-key", of="../x"), secret("secret-key")]),
        'secretKeyRef.name: Invalid value: "../x": this is the name of a Secret in the namespace of the '
        "Dataset",
        mount(),
    ),
    (
        "key",
        mount(encryptOptions=[secret("access-key", key="a/b"), secret("secret-key")]),
        'secretKeyRef.key: Invalid value: "a/b": a key of a Secret has letters, digits, dots, dashes and '
        "underscores",
        mount(),
    ),
    (
        "value",
        mount(encryptOptions=[{"name": "access-key", "value": "hunter2"}]),
        'unknown field "spec.mounts[0].encryptOptions[0].value"',
        mount(),
    ),
    (
        "again",
        mount(encryptOptions=[secret("access-key"), secret("access-key"), secret("secret-key")]),
        "spec.mounts[0].encryptOptions[1]: Duplicate value",
        mount(),
    ),
    (
        "modes",
        over({"accessModes": ["ReadWriteOnce"]}),
        'spec.accessModes[0]: Unsupported value: "ReadWriteOnce": supported values: "ReadOnlyMany", '
        '"ReadWriteMany"',
        over(RWX),
    ),
    (
        "ttl",
        over({"consistency": {"ttl": "soon"}}),
        'spec.consistency.ttl: Invalid value: "soon": this is a duration, such as 500ms, 60s, 5m, 12h or inf',
        over({"consistency": {"ttl": "5m"}}),
    ),
    (
        "ceph",
        level(mediumtype="CEPH"),
        'spec.tieredstore.levels[0].mediumtype: Invalid value: "CEPH": tiers in a Ceph pool are not built '
        "yet: MEM or SSD",
        level(),
    ),
    (
        "pool",
        level(pool="p"),
        "levels[0].pool: Invalid value: only tiers in a Ceph pool have one, and those are not built",
        level(),
    ),
    (
        "medium",
        level(mediumtype="HDD"),
        'mediumtype: Unsupported value: "HDD": supported values: "MEM", "SSD", "CEPH"',
        level(mediumtype="MEM", quota="1M"),
    ),
    (
        "quota",
        level(quota="lots"),
        'levels[0].quota: Invalid value: "lots": this is a size in whole bytes above 0, such as 40Gi',
        level(quota=4096),
    ),
    (
        "none",
        level(quota="0"),
        'levels[0].quota: Invalid value: "0": this is a size in whole bytes above 0',
        level(quota="1"),
    ),
    ("half", level(quota="1.5"), "this is a size in whole bytes above 0", level(quota="1.5Gi")),
    (
        "dots",
        level(path="/mnt/../etc"),
        "this is one absolute path, without .. and commas",
        level(path="/mnt/nvme"),
    ),
    (
        "paths",
        level(path="/mnt/a,/mnt/b"),
        "this is one absolute path, without .. and commas",
        level(path="/mnt/a"),
    ),
    (
        "mark",
        level(high="much"),
        'levels[0].high: Invalid value: "much": this is a fraction of the quota as a text, such as "0.95"',
        level(high=".9"),
    ),
    ("number", level(low=True), "levels[0].low in body must be of type string", level(low="0.7")),
    (
        "marks",
        level(low="0.97"),
        "levels[0].low: Invalid value: low has to be less than high (0.95 when it is left out)",
        level(high="1", low="0.97"),
    ),
    (
        "shard",
        over({"placement": "shard"}),
        'spec.placement: Invalid value: "shard": sharding a Dataset over nodes is not built yet: replicate',
        over({"placement": "replicate"}),
    ),
    (
        "async",
        over(RWX | {"write": {"upload": {"mode": "async"}}}),
        "spec.write.upload.mode: Invalid value: async loses what was written and not yet uploaded when its "
        "node is lost: mode "
        "sync, or acceptNodeLoss: true if that will do",
        over(RWX | {"write": {"upload": {"mode": "async"}, "acceptNodeLoss": True}}),
    ),
    (
        "landing",
        over(RWX | {"write": {"landing": "CEPH"}}),
        'spec.write.landing: Invalid value: "CEPH": landing in Ceph is not built yet: SSD',
        over(RWX | {"write": {"landing": "SSD"}}),
    ),
    (
        "delay",
        over(RWX | {"write": {"upload": {"delay": "inf"}}}),
        "this is a duration, such as 0s, 5s or 1m",
        over(RWX | {"write": {"upload": {"delay": "1m"}}}),
    ),
    (
        "many",
        over(RWX | {"write": {"upload": {"concurrency": 0}}}),
        "concurrency in body should be greater than or equal to 1",
        over(RWX | {"write": {"upload": {"concurrency": 1}}}),
    ),
    (
        "fast",
        over(RWX | {"write": {"upload": {"bandwidth": "fast"}}}),
        "this is a number of bytes a second, such as 100M, or 0",
        over(RWX | {"write": {"upload": {"bandwidth": 0}}}),
    ),
    (
        "uid",
        over({"owner": {"uid": -1}}),
        "spec.owner.uid in body should be greater than or equal to 0",
        over({"owner": {"uid": 0}}),
    ),
    (
        "bits",
        over({"owner": {"dirMode": "rwx"}}),
        'spec.owner.dirMode: Invalid value: "rwx": these are permission bits in octal, as a text: "0644"',
        over({"owner": {"dirMode": "0755"}}),
    ),
    (
        "priority",
        over({"worker": {"priorityClassName": "system-node-critical"}}),
        "workers give way to training, so their PriorityClass is none of the system's",
        over({"worker": {"priorityClassName": "low"}}),
    ),
    (
        "gpu",
        over({"worker": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}}),
        "worker.resources.limits: Invalid value: workers need nothing but cpu, memory and ephemeral-storage",
        over({"worker": {"resources": {"limits": {"cpu": "2", "memory": "2Gi"}}}}),
    ),
    (
        "amount",
        over({"worker": {"resources": {"requests": {"cpu": "some"}}}}),
        "this is a quantity, such as 500m or 2Gi",
        over({"worker": {"resources": {"requests": {"cpu": 1}}}}),
    ),
    (
        "label",
        over({"nodeSelector": {"gpu": True}}),
        "spec.nodeSelector.gpu in body must be of type string",
        over({"nodeSelector": {"gpu": "true"}}),
    ),
    (
        "terms",
        over({"nodeAffinity": {"required": {"nodeSelectorTerms": []}}}),
        "should have at least 1 items",
        over({"nodeAffinity": FULL["nodeAffinity"]}),
    ),
    (
        "taint",
        over({"tolerations": [{"operator": "Sometimes"}]}),
        'tolerations[0].operator: Unsupported value: "Sometimes": supported values: "Exists", "Equal"',
        over({"tolerations": [{"operator": "Exists"}]}),
    ),
]


@pytest.mark.parametrize(
    ("refused", "said", "taken"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES]
)
def test_what_is_wrong_is_refused_with_a_sentence(api: Api, refused: Any, said: str, taken: Any) -> None:
    sentence = api.refusal("Dataset", _plain(refused))
    assert said in sentence
    assert "hunter2" not in sentence
    assert api.refusal("Dataset", _plain(taken)) == ""


@pytest.mark.parametrize(
    ("refused", "taken"), [(rule[1], rule[3]) for rule in RULES], ids=[rule[0] for rule in RULES]
)
def test_the_controller_says_the_same(refused: Any, taken: Any) -> None:
    """Needs no cluster: neither of the two knows of a rule that the other does not, as far as this goes."""
    with pytest.raises(SettingError):
        read_dataset(dataset(_plain(refused)), RELEASE)
    read_dataset(dataset(_plain(taken)), RELEASE)


def test_what_has_defaults_is_read_as_it_was_meant(api: Api) -> None:
    """What the API fills in changes nothing of what the controller reads."""
    others = {"mounts": [PVC]}, {"manifest": MANIFEST}, {"mounts": [ROLE], "serviceAccountName": "me"}
    for spec in (FULL, *others, over({}), over(RWX), over(RWX | {"write": {"upload": {}}}), level()):
        code, answer = api.create("Dataset", spec)
        assert code == 201, answer
        filled = read_dataset(dataset(answer["spec"]), RELEASE)
        assert filled == read_dataset(dataset(spec), RELEASE)
    assert answer["spec"]["accessModes"] == ["ReadOnlyMany"]
    assert answer["spec"]["consistency"] == {"mode": "revalidate", "ttl": "60s"}


def test_nothing_is_refused_here_that_the_controller_would_do(api: Api) -> None:
    """The other table: of what the controller refuses, much is refused at once."""
    at_once = [spec for spec, _ in REFUSED if api.refusal("Dataset", _plain(spec))]
    assert len(at_once) >= 40
    assert api.refusal("Dataset", FULL) == ""


def test_a_name_that_is_no_label_is_refused(api: Api) -> None:
    code, answer = api.create("Dataset", over({}), name="x" * 64)
    assert code == 422 and "a Dataset's name has at most 63 characters" in answer["message"]
    assert api.create("Dataset", over({}), name="x" * 63)[0] == 201


def test_access_modes_stay(api: Api) -> None:
    assert api.create("Dataset", over({}), name="modes", keep=True)[0] == 201
    code, answer = api.change("Dataset", "modes", {"spec": RWX})
    assert code == 422
    assert (
        "spec.accessModes: Invalid value: accessModes cannot be changed, since volumes cannot: delete the "
        "Dataset" in answer["message"]
    )
    code, answer = api.change("Dataset", "modes", {"spec": {"mounts": [S3, HTTP | {"name": "more"}]}})
    assert code == 200 and answer["metadata"]["generation"] == 2, "mounts may come and go"
    api.delete("Dataset", "modes")


def _plain(spec: Any) -> Any:
    """Without fields that are None: JSON's null would be another thing."""
    if isinstance(spec, dict):
        return {key: _plain(value) for key, value in spec.items() if value is not None}
    return [_plain(item) for item in spec] if isinstance(spec, list) else copy.copy(spec)


# ---- DataLoad ------------------------------------------------------------------------------------

LOAD: dict[str, Any] = {"dataset": {"name": "imagenet"}}
ORDER = {"configMapKeyRef": {"name": "epochs", "key": "1"}}
LOADS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({}, "spec.dataset: Required value", LOAD),
    (
        LOAD | {"target": [{"path": "train"}]},
        'spec.target[0].path: Invalid value: "train": a path starts with / (which is the volume)',
        LOAD | {"target": [{"path": "/train"}]},
    ),
    (
        LOAD | {"target": [{"path": "/", "globs": ["/a"]}]},
        'globs[0]: Invalid value: "/a": a glob is relative to the path of its target',
        LOAD | {"target": [{"path": "/", "globs": ["**/*.jpg"]}]},
    ),
    (
        LOAD | {"nodes": ["a"], "replicas": 2},
        "which nodes load is said in one way: nodes, nodeSelector or replicas",
        LOAD | {"nodes": ["a"]},
    ),
    (
        LOAD | {"nodeSelector": {"gpu": "a"}, "replicas": 2},
        "which nodes load is said in one way",
        LOAD | {"nodeSelector": {"gpu": "a"}},
    ),
    (
        LOAD | {"replicas": 0},
        "spec.replicas in body should be greater than or equal to 1",
        LOAD | {"replicas": 2},
    ),
    (
        LOAD | {"bandwidth": "0"},
        "this is a number of bytes a second above 0, such as 100M",
        LOAD | {"bandwidth": "100M"},
    ),
    (
        LOAD | {"policy": "Cron"},
        "loads that repeat are not built yet: Once (a CronJob can make a DataLoad each time)",
        LOAD | {"policy": "Once"},
    ),
    (
        LOAD | {"ttlSecondsAfterFinished": -1},
        "should be greater than or equal to 0",
        LOAD | {"ttlSecondsAfterFinished": 0},
    ),
    (
        LOAD | {"order": ORDER, "target": [{"path": "/x"}]},
        "spec.order: Invalid value: an order is announced, and nothing is loaded by it: no target, bandwidth",
        LOAD | {"order": ORDER},
    ),
    (LOAD | {"order": ORDER, "bandwidth": "1M"}, "no target, bandwidth or verify", LOAD | {"order": ORDER}),
    (LOAD | {"order": {}}, "spec.order.configMapKeyRef: Required value", LOAD | {"order": ORDER}),
    (LOAD | {"targets": []}, 'unknown field "spec.targets"', LOAD),
]


@pytest.mark.parametrize(("refused", "said", "taken"), LOADS)
def test_a_load_that_is_wrong_is_refused_with_a_sentence(
    api: Api, refused: Any, said: str, taken: Any
) -> None:
    assert said in api.refusal("DataLoad", refused)
    assert api.refusal("DataLoad", taken) == ""


def test_a_load_that_was_asked_for_stays_as_it_is(api: Api) -> None:
    code, answer = api.create("DataLoad", LOAD | {"replicas": 2}, name="fixed", keep=True)
    assert code == 201 and answer["spec"]["target"] == [{"path": "/"}]
    for change in (
        {"dataset": {"name": "other"}}, {"target": [{"path": "/x"}]}, {"replicas": 3}, {"replicas": None},
        {"nodes": ["a"], "replicas": None}, {"nodeSelector": {"a": "b"}, "replicas": None},
        {"bandwidth": "1M"}, {"verify": True}, {"order": ORDER},
    ):  # fmt: skip
        code, answer = api.change("DataLoad", "fixed", {"spec": change})
        assert (
            code == 422 and "a load that was asked for cannot be changed; delete it and" in answer["message"]
        ), change
    assert api.change("DataLoad", "fixed", {"spec": {"ttlSecondsAfterFinished": 60}})[0] == 200
    api.delete("DataLoad", "fixed")


# ---- what kubectl shows --------------------------------------------------------------------------


def _columns(plane: ControlPlane, *what: str) -> list[dict[str, str]]:
    """The rows of `kubectl get`, by column."""
    head, *rows = plane.kubectl("get", *what).out.splitlines()
    starts = [i for i in range(len(head)) if head[i] != " " and (i == 0 or head[i - 3 : i] == "   ")]
    cuts = list(zip(starts, [*starts[1:], None], strict=True))
    return [{head[a:b].strip(): row[a:b].strip() for a, b in cuts} for row in rows]


def test_the_columns_of_a_dataset(api: Api) -> None:
    assert api.create("Dataset", over(RWX), name="shown", keep=True)[0] == 201
    (row,) = _columns(api.plane, "dset", "shown", "-n", SPACE)
    assert row.keys() == {"NAME", "PHASE", "SIZE", "CACHED", "WHOLE", "DIRTY", "AGE"}
    assert (row["NAME"], row["PHASE"], row["SIZE"]) == ("shown", "", ""), "nobody has looked at it yet"
    seen = Observed(
        generation=1, writable=True, claim="Bound",
        workers=Workers(wanted=2, ready=2, updated=2, current=True),
        figures=(Figures("a", cached=3 << 40, files=7, bytes=4 << 40, opens=4, opens_whole=3),
                 Figures("b", cached=1 << 40, files=7, bytes=4 << 40, dirty=5 << 20, dirty_files=1, owed=1)),
    )  # fmt: skip
    said = status(seen, {}, now="2026-11-26T12:00:00Z")
    code, answer = api.change("Dataset", "shown", {"status": said}, of="/status")
    assert code == 200, answer
    assert answer["status"] == said, "all that the controller says has its place in the schema"
    (row,) = _columns(api.plane, "dset", "shown", "-n", SPACE, "-o", "wide")
    shown = ("PHASE", "SIZE", "CACHED", "WHOLE", "DIRTY", "FILES", "HIT RATIO")
    assert {name: row[name] for name in shown} == {
        "PHASE": "Bound", "SIZE": "4.0 TiB", "CACHED": "4.0 TiB", "WHOLE": "75%", "DIRTY": "5.0 MiB",
        "FILES": "7", "HIT RATIO": "0.750",
    }  # fmt: skip
    assert (row["ACCESS"], row["MOUNT"], row["MESSAGE"]) == (
        "ReadWriteMany",
        "s3://imagenet/train",
        "pods can mount it",
    )
    api.delete("Dataset", "shown")


def test_a_status_changes_nothing_of_the_spec_and_the_spec_nothing_of_it(api: Api) -> None:
    assert api.create("Dataset", over({}), name="sub", keep=True)[0] == 201
    both = {"spec": {"placement": "shard"}, "status": {"phase": "Bound"}}
    _, answer = api.change("Dataset", "sub", both, of="/status")
    assert (answer["spec"]["placement"], answer["status"]["phase"]) == ("replicate", "Bound")
    assert answer["metadata"]["generation"] == 1
    _, answer = api.change(
        "Dataset", "sub", {"spec": {"nodeSelector": {"a": "b"}}, "status": {"phase": "Failed"}}
    )
    assert (answer["metadata"]["generation"], answer["status"]["phase"]) == (2, "Bound")
    api.delete("Dataset", "sub")


def test_the_columns_of_a_load(api: Api) -> None:
    assert api.create("DataLoad", LOAD, name="shown", keep=True)[0] == 201
    said = {"phase": "Executing", "progress": {"files": 5, "filesFailed": 1},
            "shown": {"loaded": "1.0 of 4.0 TiB", "throughput": "1.2 GiB/s", "eta": "41m"}}  # fmt: skip
    assert api.change("DataLoad", "shown", {"status": said}, of="/status")[1]["status"] == said
    (row,) = _columns(api.plane, "dload", "shown", "-n", SPACE)
    assert row.pop("AGE")
    assert row == {
        "NAME": "shown", "DATASET": "imagenet", "PHASE": "Executing", "LOADED": "1.0 of 4.0 TiB",
        "FILES": "5", "FAILED": "1", "RATE": "1.2 GiB/s", "ETA": "41m",
    }  # fmt: skip
    api.delete("DataLoad", "shown")


def test_the_columns_of_a_node(api: Api) -> None:
    node = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "CacheNode", "metadata": {"name": "node-a"}}
    assert api.plane.ask(api.of("CacheNode"), node, method="POST")[0] == 201
    said = {"observedAt": "2026-11-26T12:00:00Z", "count": 1, "shown": {"cached": "1.0 GiB"},
            "datasets": [{"uid": "0b6e", "namespace": SPACE, "name": "x", "cached": 1 << 30}]}  # fmt: skip
    assert api.change("CacheNode", "node-a", {"status": said}, of="/status")[1]["status"] == said
    (row,) = _columns(api.plane, "cnode", "node-a")
    assert (row["DATASETS"], row["CACHED"]) == ("1", "1.0 GiB")
    api.delete("CacheNode", "node-a")


def test_all_of_ours_is_listed_by_one_word(api: Api) -> None:
    api.create("Dataset", over({}), name="both", keep=True)
    api.create("DataLoad", LOAD, name="both", keep=True)
    listed = api.plane.kubectl("get", "datacache", "-n", SPACE, "-o", "name").out.split()
    assert listed == [f"dataload.{GROUP}/both", f"dataset.{GROUP}/both"]
    api.delete("Dataset", "both")
    api.delete("DataLoad", "both")


@pytest.mark.parametrize(
    "field",
    [
        "dataset.spec.mounts",
        "dataset.spec.write.upload",
        "dataset.status",
        "dataload.spec",
        "cachenode.status",
    ],
)
def test_explain_says_of_each_field_what_it_is(api: Api, field: str) -> None:
    said = api.plane.kubectl("explain", field).out
    assert "<no description>" not in said.partition("FIELDS:")[2], said


def test_explain_reads_well(api: Api) -> None:
    said = " ".join(api.plane.kubectl("explain", "dataset.spec.accessModes").out.split())
    assert "ReadOnlyMany, or ReadWriteMany for a volume that pods write to. It cannot be changed" in said
    said = " ".join(api.plane.kubectl("explain", "dataset.spec.tieredstore.levels.mediumtype").out.split())
    assert "ENUM: MEM SSD CEPH" in said and "CEPH is not built yet and refused." in said
