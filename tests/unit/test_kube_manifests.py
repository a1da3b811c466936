"""Which objects exist for a Dataset: what they promise, not what they look like."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datacache.cli import flags
from datacache.cli.main import command_parser
from datacache.config.parsing import read_settings
from datacache.config.settings import Settings
from datacache.errors import SettingError
from datacache.kube.beside import Beside, Token, Twin, copied_keys
from datacache.kube.certificates import Pair
from datacache.kube.manifests import (
    CONFIG_ANNOTATION,
    TLS_ANNOTATION,
    UID_LABEL,
    is_placed_otherwise,
    known_pair,
    known_tokens,
    name_of,
    names,
    node_label,
    objects,
    rare_parts,
    settings_text,
    worker_name,
)
from datacache.kube.release import Name, Release
from datacache.kube.spec import DatasetSpec, read_dataset
from datacache.model import GiB, MiB, parse_duration
from datacache.sources.opening import check_mount

RELEASE = Release(namespace="datacache", image="local.test/datacache:1", priority_class="datacache-worker",
                  pull_secrets=("registry",))  # fmt: skip
UID = "0b6e4c1a-3a57-4b8f-9f53-111111111111"
SECRETS = {
    "s3": {"id": base64.b64encode(b"AKIA").decode(), "secret": base64.b64encode(b"hunter2").decode(),
           "unrelated": "eA=="},
    "tls": {"ca.crt": "Y2E="},
}  # fmt: skip


TOKEN = Token("sts.amazonaws.com", "a.b.c", renew="2026-11-26T21:48:00Z", of="reader")


def keys(*names_and_keys: tuple[str, str, str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": of, "key": key}}}
        for name, of, key in names_and_keys
    ]


S3 = {"mountPoint": "s3://imagenet/train", "name": "train", "options": {"endpoint": "http://minio:9000"},
      "encryptOptions": keys(("access-key", "s3", "id"), ("secret-key", "s3", "secret"),
                             ("ca_bundle", "tls", "ca.crt"))}  # fmt: skip
WEB = {"mountPoint": "https://host/val", "name": "val"}
TIERS = {"levels": [{"mediumtype": "MEM", "path": "/dev/shm/datacache", "quota": "4Gi", "high": "0.9"},
                    {"mediumtype": "SSD", "path": "/mnt/nvme", "quota": "100Gi"}]}  # fmt: skip


def spec(**fields: Any) -> DatasetSpec:
    metadata = {"name": "imagenet", "namespace": "team-a", "uid": UID, "generation": 1}
    return read_dataset(
        {"metadata": metadata, "spec": {"mounts": [S3], "tieredstore": TIERS} | fields}, RELEASE
    )


def made(of: DatasetSpec | None = None, release: Release = RELEASE) -> dict[str, Any]:
    of = of or spec()
    found = objects(of, release, beside=Beside(copied_keys(of, SECRETS)), token="dG9rZW4=")
    return {f"{obj['kind']} {obj['metadata']['name']}": obj for obj in found}


def only(found: dict[str, Any], kind: str) -> Any:
    (one,) = [obj for obj in found.values() if obj["kind"] == kind]
    return one


def worker(found: dict[str, Any]) -> Any:
    return only(found, "DaemonSet")["spec"]["template"]["spec"]


def read_as_a_worker_does(of: DatasetSpec, tmp_path: Path) -> Settings:
    (file := tmp_path / "datacache.yaml").write_text(settings_text(of, RELEASE))
    return read_settings({}, config_file=str(file), environment={"HOME": "/tmp"})


def test_what_exists_is_all_that_is_taken_away() -> None:
    beside = Beside(copied_keys(spec(), SECRETS), manifest=b'"s3://b/k"', tokens=(TOKEN,))
    found = objects(spec(), RELEASE, beside=beside, token="dG9rZW4=", tls=Pair("crt", "key"))
    gone = names(uid=UID, namespace="team-a", name="imagenet", release=RELEASE)
    assert {name_of(obj) for obj in found} == set(gone)
    assert gone[0].kind == "PersistentVolumeClaim", "no new pod may begin to use what goes"


def test_the_same_dataset_is_the_same_bytes() -> None:
    shuffled = {
        key: {"s3": dict(reversed(SECRETS["s3"].items())), "tls": SECRETS["tls"]}[key]
        for key in ("tls", "s3")
    }
    again = objects(spec(), RELEASE, beside=Beside(copied_keys(spec(), shuffled)), token="dG9rZW4=")
    assert json.dumps(list(made().values())) == json.dumps(again)


def test_only_the_claim_is_in_the_users_namespace() -> None:
    where = {obj["kind"]: obj["metadata"].get("namespace") for obj in made().values()}
    assert where.pop("PersistentVolumeClaim") == "team-a"
    assert where.pop("PersistentVolume") is None
    assert set(where.values()) == {"datacache"}
    assert not any("ownerReferences" in obj["metadata"] for obj in made().values())


def test_no_name_depends_on_the_users_names() -> None:
    """Fluid's defect 7: namespace `a-b` with `c`, and `a` with `b-c`, share a volume there."""
    assert {key for key in made() if UID not in key} == {"PersistentVolumeClaim imagenet"}


def test_everything_says_whose_it_is() -> None:
    for obj in made().values():
        assert obj["metadata"]["labels"][UID_LABEL] == UID
        assert obj["metadata"]["annotations"]["datacache.io/dataset"] == "team-a/imagenet"


# ---- the worker's settings -----------------------------------------------------------------------


def test_a_worker_reads_in_its_file_what_the_dataset_says(tmp_path: Path) -> None:
    of = spec(mounts=[S3, WEB], consistency={"mode": "immutable"}, owner={"uid": 1000, "fileMode": "0440"})
    settings = read_as_a_worker_does(of, tmp_path)
    assert settings.dataset.name == "imagenet"
    at = f"/etc/datacache/keys/{of.mounts[0].slug}"
    assert [(m.uri, m.path, dict(m.options)) for m in settings.dataset.mounts] == [
        ("s3://imagenet/train", "/train",
         {"endpoint": "http://minio:9000", "credentials": at, "ca_bundle": f"{at}/ca_bundle"}),
        ("https://host/val", "/val", {}),
    ]  # fmt: skip
    assert settings.index == of.index
    assert settings.mount.uid == 1000 and settings.mount.gid == 0
    assert settings.mount.file_mode == 0o440 and settings.mount.allow_other
    assert not settings.writing.enabled
    assert [(t.medium, t.quota, t.high, t.low) for t in settings.cache.tiers] == [
        ("mem", 4 * GiB, 0.9, 0.85), ("ssd", 100 * GiB, 0.95, 0.85),
    ]  # fmt: skip


def test_a_writable_worker_reads_how_to_write(tmp_path: Path) -> None:
    of = spec(
        accessModes=["ReadWriteMany"],
        write={"acceptNodeLoss": True, "conflict": "fail",
               "upload": {"mode": "async", "delay": "2s", "concurrency": 3, "bandwidth": "1M"}},
    )  # fmt: skip
    settings = read_as_a_worker_does(of, tmp_path)
    assert settings.upload == of.upload
    assert settings.writing.enabled and settings.writing.conflict == "fail"
    assert settings.writing.landing == f"/mnt/nvme/{UID}/landing", (
        "beside the SSD tier: no copy on its way there"
    )
    assert (settings.mount.file_mode, settings.mount.dir_mode) == (0o644, 0o755)


def test_what_is_written_never_lies_in_memory(tmp_path: Path) -> None:
    of = spec(accessModes=["ReadWriteMany"], tieredstore={"levels": TIERS["levels"][:1]})
    assert read_as_a_worker_does(of, tmp_path).writing.landing == f"/var/lib/datacache/{UID}/landing"


@pytest.mark.parametrize("modes", [["ReadOnlyMany"], ["ReadWriteMany"]])
def test_the_command_of_the_pod_is_one_that_a_worker_takes(modes: list[str], tmp_path: Path) -> None:
    """It gets as far as the files that only a pod has."""
    of = spec(accessModes=modes)
    (container,) = worker(made(of))["containers"]
    (config := tmp_path / "datacache.yaml").write_text(settings_text(of, RELEASE))
    program, command, *words = container["command"]
    assert (program, command) == ("datacache", "worker")
    words = [str(config) if word == "/etc/datacache/config/datacache.yaml" else word for word in words]
    args = command_parser("worker").parse(words)
    settings = flags.read(args, args.uris)
    assert settings.api.listen == "0.0.0.0:7400"
    assert settings.api.token_file == "/etc/datacache/token/token"
    assert settings.log_format == "json"
    patience = parse_duration(args.drain_timeout, name="")
    grace = worker(made(of))["terminationGracePeriodSeconds"]
    assert 0 < patience <= grace - 15, "it ends by itself before it is killed"


def test_datasets_that_share_a_tier_share_no_directory(tmp_path: Path) -> None:
    """One worker owns a cache directory: a second on the same path would be refused."""
    settings = read_as_a_worker_does(spec(), tmp_path)
    assert [t.path for t in settings.cache.tiers] == [
        f"/dev/shm/datacache/{UID}/cache",
        f"/mnt/nvme/{UID}/cache",
    ]
    assert settings.state == f"/var/lib/datacache/{UID}"


def test_all_that_a_worker_keeps_lies_on_the_node() -> None:
    """Whatever happens to the pod, cache, index and what is not uploaded are there for the next one."""
    of = spec(accessModes=["ReadWriteMany"])
    pod, text = worker(made(of)), json.loads(settings_text(of, RELEASE))
    on_node = {v["name"]: v["hostPath"]["path"] for v in pod["volumes"] if "hostPath" in v}
    mounted = {
        m["mountPath"]: on_node[m["name"]]
        for m in pod["containers"][0]["volumeMounts"]
        if m["name"] in on_node
    }
    assert all(inside == outside for inside, outside in mounted.items()), "one path, inside and out"
    for path in (text["state"], text["landing"], *(tier["path"] for tier in text["cache"])):
        assert any(path == top or path.startswith(f"{top}/") for top in mounted), path
    assert all(UID in path for path in on_node.values()), "nothing of another Dataset"


def test_other_settings_roll_the_workers_and_other_keys_do_not() -> None:
    def template(found: dict[str, Any]) -> Any:
        return only(found, "DaemonSet")["spec"]["template"]

    before, after = template(made()), template(made(spec(consistency={"ttl": "5s"})))
    assert (
        before["metadata"]["annotations"][CONFIG_ANNOTATION]
        != after["metadata"]["annotations"][CONFIG_ANNOTATION]
    )
    rotated = {"s3": SECRETS["s3"] | {"secret": "b3RoZXI="}, "tls": SECRETS["tls"]}
    found = objects(spec(), RELEASE, beside=Beside(copied_keys(spec(), rotated)), token="b3RoZXI=")
    assert template({obj["kind"]: obj for obj in found if obj["kind"] == "DaemonSet"}) == before


# ---- keys ----------------------------------------------------------------------------------------


def test_only_the_named_keys_are_copied() -> None:
    of, found = spec(), made()
    data = found[f"Secret datacache-{UID}-keys"]["data"]
    slug = of.mounts[0].slug
    assert data == {
        f"{slug}.aws_access_key_id": SECRETS["s3"]["id"],
        f"{slug}.aws_secret_access_key": SECRETS["s3"]["secret"],
        f"{slug}.ca_bundle": "Y2E=",
    }


def test_the_files_of_the_keys_are_where_the_settings_say() -> None:
    of = spec()
    (volume,) = [v for v in worker(made(of))["volumes"] if v["name"] == "keys"]
    assert {item["key"]: item["path"] for item in volume["secret"]["items"]} == {
        key: key.replace(".", "/") for key in copied_keys(of, SECRETS)
    }
    assert volume["secret"]["defaultMode"] == 0o400


def test_no_secret_is_anywhere_but_in_a_secret() -> None:
    others = [obj for obj in made().values() if obj["kind"] != "Secret"]
    for secret in (SECRETS["s3"]["secret"], "hunter2", "dG9rZW4="):
        assert secret not in json.dumps(others)


def test_a_dataset_without_keys_has_no_secret_of_keys() -> None:
    found = made(spec(mounts=[WEB]))
    assert f"Secret datacache-{UID}-keys" not in found
    assert "keys" not in {v["name"] for v in worker(found)["volumes"]}


@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        ({}, "name: 's3' will not do; expected a Secret that there is in namespace team-a"),
        ({"s3": {}}, "key: 'id' will not do; expected a key of Secret s3"),
    ],
)  # fmt: skip
def test_a_key_that_is_missing_is_named(secrets: Any, said: str) -> None:
    with pytest.raises(SettingError) as refused:
        copied_keys(spec(), secrets)
    assert str(refused.value) == f"spec.mounts[0].encryptOptions[0].valueFrom.secretKeyRef.{said}"


# ---- pods ----------------------------------------------------------------------------------------


def test_workers_come_to_labelled_nodes_only_whatever_their_taints() -> None:
    pod = worker(made(spec(nodeSelector={"pool": "gpu"})))
    assert pod["nodeSelector"] == {node_label(UID): "true"}, "a nodeSelector of the spec labels nodes"
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert len(node_label(UID).partition("/")[2]) <= 63


def test_tolerations_that_are_given_are_the_ones() -> None:
    given = [{"key": "gpu", "operator": "Exists"}]
    assert worker(made(spec(worker={"tolerations": given})))["tolerations"] == given


def test_a_worker_may_do_nothing_that_it_need_not() -> None:
    pod = worker(made())
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "privileged": False, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]},
    }  # fmt: skip
    assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {"name": "AWS_EC2_METADATA_DISABLED", "value": "true"} in container["env"], (
        "no identity of the node's"
    )


def test_the_pages_of_a_memory_tier_are_charged_to_the_worker() -> None:
    (container,) = worker(made())["containers"]
    assert container["resources"]["requests"]["memory"] == str(4 * GiB + 512 * MiB)
    assert container["resources"]["limits"]["memory"] == str(4 * GiB + 512 * MiB)


def test_resources_that_are_given_count() -> None:
    given = {"requests": {"cpu": "2", "memory": "6Gi"}}
    (container,) = worker(made(spec(worker={"resources": given})))["containers"]
    assert container["resources"] == {"requests": {"cpu": "2", "memory": "6Gi"}, "limits": {"memory": "6Gi"}}


def test_a_priority_class_is_the_datasets_or_the_releases() -> None:
    assert worker(made())["priorityClassName"] == "datacache-worker"
    assert worker(made(spec(worker={"priorityClassName": "low"})))["priorityClassName"] == "low"
    bare = Release(namespace="datacache", image="x")
    assert "priorityClassName" not in worker(made(release=bare))


def test_metadata_of_pods_is_added_and_takes_nothing() -> None:
    found = made(
        spec(worker={"podMetadata": {"labels": {"team": "a"}, "annotations": {"example.com/a": "b"}}})
    )
    daemon_set = only(found, "DaemonSet")["spec"]
    metadata = daemon_set["template"]["metadata"]
    assert metadata["labels"]["team"] == "a" and metadata["annotations"]["example.com/a"] == "b"
    assert daemon_set["selector"]["matchLabels"].items() <= metadata["labels"].items()
    assert only(found, "Service")["spec"]["selector"].items() <= metadata["labels"].items()


# ---- the volume ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("modes", "read_only"), [(["ReadOnlyMany"], True), (["ReadWriteMany"], False)])
def test_the_volume_is_the_claims_and_no_others(modes: list[str], read_only: bool) -> None:
    found = made(spec(accessModes=modes))
    volume, claim = only(found, "PersistentVolume"), only(found, "PersistentVolumeClaim")
    reference = volume["spec"]["claimRef"]
    assert (reference["namespace"], reference["name"]) == ("team-a", "imagenet")
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"] == f"datacache-{UID}"
    assert claim["spec"]["storageClassName"] == volume["spec"]["storageClassName"] == "", (
        "nobody provisions it"
    )
    assert claim["spec"]["accessModes"] == volume["spec"]["accessModes"] == modes
    assert claim["spec"]["resources"]["requests"]["storage"] == "1Mi"
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    assert volume["spec"]["csi"] == {
        "driver": "csi.datacache.io", "volumeHandle": f"datacache-{UID}", "readOnly": read_only,
        "volumeAttributes": {"namespace": "team-a", "dataset": "imagenet", "uid": UID},
    }  # fmt: skip


def test_pods_are_placed_where_a_worker_may_be_and_that_is_chosen_once() -> None:
    terms = [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
    of = spec(nodeAffinity={"required": {"nodeSelectorTerms": terms}})
    volume = only(made(of), "PersistentVolume")
    assert volume["spec"]["nodeAffinity"] == {"required": {"nodeSelectorTerms": terms}}
    assert "nodeAffinity" not in only(made(), "PersistentVolume")["spec"]
    placed = volume["spec"]["nodeAffinity"]
    assert not is_placed_otherwise(of, placed) and not is_placed_otherwise(of, None)
    assert is_placed_otherwise(spec(), placed), "it was taken out of the spec"
    kept = objects(spec(), RELEASE, token="x", placed=placed)
    (volume,) = [each for each in kept if each["kind"] == "PersistentVolume"]
    assert volume["spec"]["nodeAffinity"] == placed, "the API would refuse another"


def test_a_change_of_node_affinity_takes_no_worker_away() -> None:
    """The DaemonSet controller ends pods that affinity does not let stay, whoever reads through them."""
    terms = [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
    assert "affinity" not in worker(made(spec(nodeAffinity={"required": {"nodeSelectorTerms": terms}})))


# ---- what lies beside ----------------------------------------------------------------------------

NAS = {"mountPoint": "pvc://nas/raw/2024", "name": "nas"}
NFS = {"server": "10.0.0.1", "path": "/export", "readOnly": False}
TWIN = Twin(
    "nas", f"datacache-{UID}-0a1b2c3d", {"nfs": NFS}, ("ReadWriteMany",), mount_options=("nfsvers=4.1",),
    node_affinity={"required": {"nodeSelectorTerms": []}},
)  # fmt: skip


def beside(of: DatasetSpec, of_it: Beside) -> dict[Name, Any]:
    return {name_of(obj): obj for obj in objects(of, RELEASE, beside=of_it, token="dG9rZW4=")}


def test_a_claim_is_mounted_by_its_twin_and_read_only(tmp_path: Path) -> None:
    of, with_twin = spec(mounts=[NAS]), Beside(twins=(TWIN,))
    found = beside(of, with_twin)
    volume = found[Name("v1", "PersistentVolume", "", TWIN.name)]["spec"]
    assert volume["nfs"] == NFS and volume["mountOptions"] == ["nfsvers=4.1"]
    assert volume["nodeAffinity"] == TWIN.node_affinity
    assert volume["persistentVolumeReclaimPolicy"] == "Retain", "what lies there is the user's"
    assert volume["claimRef"]["name"] == TWIN.name and volume["claimRef"]["namespace"] == "datacache"
    claim = found[Name("v1", "PersistentVolumeClaim", "datacache", TWIN.name)]["spec"]
    assert claim["volumeName"] == TWIN.name and claim["accessModes"] == volume["accessModes"]
    daemon_set = found[Name("apps/v1", "DaemonSet", "datacache", f"datacache-{UID}")]
    pod = daemon_set["spec"]["template"]["spec"]
    (mounted,) = [each for each in pod["volumes"] if "persistentVolumeClaim" in each]
    assert mounted["persistentVolumeClaim"] == {"claimName": TWIN.name, "readOnly": True}
    (at,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == mounted["name"]]
    assert at["readOnly"] is True
    (tmp_path / "datacache.yaml").write_text(settings_text(of, RELEASE, with_twin))
    settings = read_settings({}, config_file=str(tmp_path / "datacache.yaml"), environment={"HOME": "/tmp"})
    (point,) = settings.dataset.mounts
    assert (point.uri, point.path) == (f"file://{at['mountPath']}/raw/2024", "/nas")
    assert point.options == {"inside": at["mountPath"]}, "no link on the way leads out of the claim"
    check_mount(point, {})


def test_another_volume_behind_a_claim_rolls_the_workers() -> None:
    def annotation(twin: Twin) -> str:
        found = beside(spec(mounts=[NAS]), Beside(twins=(twin,)))
        daemon_set = found[Name("apps/v1", "DaemonSet", "datacache", f"datacache-{UID}")]
        return str(daemon_set["spec"]["template"]["metadata"]["annotations"][CONFIG_ANNOTATION])

    assert annotation(TWIN) != annotation(replace(TWIN, name=f"datacache-{UID}-99999999"))


MANIFEST = {"configMapKeyRef": {"name": "lists", "key": "epoch"}, "options": {"endpoint": "http://minio:9000"},
            "encryptOptions": S3["encryptOptions"]}  # fmt: skip


@pytest.mark.parametrize("data", [b'"s3://bucket/a"\n', b'{"url": "s3://bucket/\xff"}'])
def test_a_list_is_a_file_of_the_worker(data: bytes, tmp_path: Path) -> None:
    of = spec(mounts=None, manifest=MANIFEST)
    listed = Beside(copied_keys(of, SECRETS), manifest=data)
    found = beside(of, listed)
    config_map = found[Name("v1", "ConfigMap", "datacache", f"datacache-{UID}-manifest")]
    (name,) = [*config_map.get("data", {}), *config_map.get("binaryData", {})]
    pod = found[Name("apps/v1", "DaemonSet", "datacache", f"datacache-{UID}")]["spec"]["template"]["spec"]
    (at,) = [each for each in pod["containers"][0]["volumeMounts"] if each.get("subPath") == name]
    (tmp_path / "datacache.yaml").write_text(settings_text(of, RELEASE, listed))
    settings = read_settings({}, config_file=str(tmp_path / "datacache.yaml"), environment={"HOME": "/tmp"})
    assert settings.dataset.manifest == f"file://{at['mountPath']}"
    assert settings.index.manifest_schemes == ("s3", "oss", "gs", "az", "http", "https")
    slug = of.stores[0].slug
    assert settings.dataset.options["credentials"] == f"/etc/datacache/keys/{slug}"
    assert not settings.dataset.mounts[0].options, "the file itself is opened without keys"


def test_another_list_rolls_the_workers() -> None:
    def annotation(data: bytes) -> str:
        of = spec(mounts=None, manifest=MANIFEST)
        found = beside(of, Beside(manifest=data))
        daemon_set = found[Name("apps/v1", "DaemonSet", "datacache", f"datacache-{UID}")]
        return str(daemon_set["spec"]["template"]["metadata"]["annotations"][CONFIG_ANNOTATION])

    assert annotation(b'"s3://bucket/a"') != annotation(b'"s3://bucket/b"')


IDENTITY = replace(RELEASE, audiences=("sts.amazonaws.com",))
ROLE = "arn:aws:iam::123456789012:role/reader"


def test_a_web_identity_is_a_file_of_the_worker_and_stands_nowhere_else(tmp_path: Path) -> None:
    mounts = [{"mountPoint": "s3://bucket", "options": {"role_arn": ROLE}}]
    metadata = {"name": "imagenet", "namespace": "team-a", "uid": UID, "generation": 1}
    of = read_dataset(
        {"metadata": metadata, "spec": {"mounts": mounts, "serviceAccountName": "reader"}}, IDENTITY
    )
    assert of.audiences == ["sts.amazonaws.com"]
    found = beside(of, Beside(tokens=(TOKEN,)))
    secret = found[Name("v1", "Secret", "datacache", f"datacache-{UID}-identity")]
    assert known_tokens(secret) == (TOKEN,), "who goes on after a restart knows when to renew it"
    others = [obj for obj in found.values() if obj["kind"] != "Secret"]
    assert "a.b.c" not in json.dumps(others) and "a.b.c" not in repr(TOKEN)
    pod = found[Name("apps/v1", "DaemonSet", "datacache", f"datacache-{UID}")]["spec"]["template"]["spec"]
    (at,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "identity"]
    (tmp_path / "datacache.yaml").write_text(settings_text(of, IDENTITY, Beside(tokens=(TOKEN,))))
    settings = read_settings({}, config_file=str(tmp_path / "datacache.yaml"), environment={"HOME": "/tmp"})
    (file,) = secret["data"]
    assert settings.dataset.mounts[0].options == {
        "role_arn": ROLE, "web_identity": f"{at['mountPath']}/{file}",
    }  # fmt: skip


def test_another_token_rolls_no_worker() -> None:
    def template(token: Token) -> Any:
        found = beside(spec(), Beside(tokens=(token,)))
        return found[Name("apps/v1", "DaemonSet", "datacache", f"datacache-{UID}")]["spec"]["template"]

    assert template(TOKEN) == template(replace(TOKEN, value="d.e.f", renew="2026-11-26T22:36:00Z"))


@pytest.mark.parametrize("change", [{"metadata": {}}, {"data": {}}, {"data": {"x": "?"}}])
def test_a_secret_of_tokens_that_somebody_changed_holds_none(change: Any) -> None:
    found = beside(spec(), Beside(tokens=(TOKEN,)))
    secret = found[Name("v1", "Secret", "datacache", f"datacache-{UID}-identity")]
    assert known_tokens(secret | change) == () and known_tokens(None) == ()


# ---- certificates --------------------------------------------------------------------------------


def test_a_worker_with_a_certificate_is_asked_over_tls_and_says_so(tmp_path: Path) -> None:
    found = {name_of(obj): obj for obj in objects(spec(), RELEASE, token="x", tls=Pair("crt", "key"))}
    assert known_pair(found[Name("v1", "Secret", "datacache", f"datacache-{UID}-tls")]) == Pair("crt", "key")
    template = found[Name("apps/v1", "DaemonSet", "datacache", f"datacache-{UID}")]["spec"]["template"]
    assert template["metadata"]["annotations"][TLS_ANNOTATION] == "true"
    (container,) = template["spec"]["containers"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    (config := tmp_path / "datacache.yaml").write_text(settings_text(spec(), RELEASE))
    words = [str(config) if word.endswith("datacache.yaml") else word for word in container["command"][2:]]
    args = command_parser("worker").parse(words)
    settings = flags.read(args, args.uris)
    (at,) = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == "tls"]
    assert (settings.api.tls_cert, settings.api.tls_key) == (f"{at}/tls.crt", f"{at}/tls.key")
    assert worker_name(UID, RELEASE) == f"datacache-{UID}.datacache.svc", "as the Service is called"


def test_another_certificate_rolls_no_worker_and_the_first_one_does() -> None:
    """Before it they are asked without, and say so: each is asked in its own way while they are exchanged."""

    def template(tls: Pair | None) -> Any:
        found = {name_of(obj): obj for obj in objects(spec(), RELEASE, token="x", tls=tls)}
        return found[Name("apps/v1", "DaemonSet", "datacache", f"datacache-{UID}")]["spec"]["template"]

    assert template(Pair("a", "b")) == template(Pair("c", "d")) != template(None)
    assert TLS_ANNOTATION not in template(None)["metadata"]["annotations"]


def test_what_few_datasets_have_is_looked_for_where_it_may_be() -> None:
    """Where the spec asks for it, and where workers have it of before."""
    plain = only(made(), "DaemonSet")
    assert rare_parts(spec(), None) == rare_parts(spec(), plain) == rare_parts(None, None) == set()
    assert rare_parts(spec(mounts=[NAS]), plain) == {"claim"}
    assert rare_parts(spec(mounts=None, manifest=MANIFEST), plain) == {"manifest"}
    assert rare_parts(spec(mounts=None, manifest={"uri": "https://host/list"}), plain) == set()
    full = Beside(twins=(TWIN,), manifest=b"x", tokens=(TOKEN,))
    before = beside(spec(), full)[Name("apps/v1", "DaemonSet", "datacache", f"datacache-{UID}")]
    assert rare_parts(None, before) == {"claim", "manifest", "identity"}
