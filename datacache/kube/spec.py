"""
What a Dataset object says, as our own values; and a sentence for what cannot be.

`read_dataset` takes the object as the API gives it. What it returns can be done: a worker that is configured
like that starts. What the schema of the CRD cannot see is refused here, with a SettingError that names the
field; so is what is not built yet, rather than to be passed over. Pure: no Secret is read, no store is asked.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from datacache.config.keys import AUDIENCE, KEYS, NAME, PATH, QUOTA, REGION, TEXT, URI, WATERMARK
from datacache.config.schemes import SCHEMES, SECRET_NAME, Options, bucket_of, endpoint_of, key_part
from datacache.config.settings import (
    CacheSettings,
    Conflict,
    Consistency,
    Durability,
    IndexSettings,
    MountSettings,
    TierSettings,
    UploadMode,
    UploadSettings,
    WritingSettings,
)
from datacache.errors import SettingError
from datacache.kube.fields import Field
from datacache.kube.release import Release
from datacache.model import Dataset, Medium, MountPoint, TiB
from datacache.telemetry import redact

READ, WRITE = MANY = "ReadOnlyMany", "ReadWriteMany"
NOT_YET = "is not built yet"
"""What the refusal of a planned thing says; docs/kubernetes.md lists them."""

_ROOM = 1024 * TiB
DNS = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_LABEL_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL = rf"({DNS}/)?{_LABEL_NAME}"
_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
"""Files of a directory of keys, as `sources.keyfile` reads them; by `key_part`."""
_FILES = ("ca_bundle", "credentials")
"""Options whose value is a file: of a Secret here."""
_NOT_HERE = {"profile": "no profiles in a worker: name the keys in encryptOptions",
             "client": "nothing: the S3 endpoint of OSS is what workers use",
             "web_identity": "role_arn, and whose identity it is as serviceAccountName"}  # fmt: skip
_AUDIENCE = "audience"
"""An option that is ours, and no source's: for whom a web identity is."""
AWS_STS = "sts.amazonaws.com"
"""The audience where no other is given."""
_ROLE = r"arn:[A-Za-z0-9-]{1,32}:iam:[^:\s]{0,64}:[^:\s]{0,64}:role/[^\s]{1,512}"
_SIGNED = ("s3", "oss", "gs")
"""Schemes that need keys, or `anonymous`: a worker has no identity of its own that a user could borrow."""


@dataclass(frozen=True)
class SecretFile:
    """One key of a Secret in the namespace of the Dataset, and the file that a worker needs it as."""

    option: str
    """The file's name: an option of the source, or a part of its keys."""
    secret: str
    key: str
    field: str
    """The path of the field that names it, for messages."""


@dataclass(frozen=True)
class Mount:
    """A mount point, and what it needs from beside the Dataset."""

    point: MountPoint
    """Without the options that are files. `pvc://NAME/path` is for people: a worker has it as a directory."""
    files: tuple[SecretFile, ...] = ()
    claim: str = ""
    """The volume claim that it is; empty for a store."""
    audience: str = ""
    """For whom the web identity is with which the bucket is opened; empty: for nobody."""
    field: str = ""
    """The path of what says so, for messages."""

    @property
    def slug(self) -> str:
        """What its files lie under: the same as long as its path is, whatever other mounts come and go."""
        return hashlib.sha256(self.point.path.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ManifestSpec:
    """A list of objects that is the Dataset, instead of mounts."""

    store: Mount
    """Its object; options and keys are those of all stores that it names. Without a URI for a ConfigMap."""
    field: str
    config_map: str = ""
    key: str = ""


@dataclass(frozen=True)
class WorkerPod:
    """What a Dataset may say of its workers' pods."""

    requests: Mapping[str, str]
    limits: Mapping[str, str]
    priority_class: str
    """Empty: that of the release."""
    tolerations: tuple[Mapping[str, Any], ...]
    """Empty: all taints."""
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class DatasetSpec:
    """A Dataset that can be done."""

    namespace: str
    name: str
    uid: str
    generation: int
    mounts: tuple[Mount, ...]
    access_modes: tuple[str, ...]
    index: IndexSettings
    cache: CacheSettings
    """Its tiers are directories that Datasets share: `manifests` gives each one of its own below."""
    writing: WritingSettings
    upload: UploadSettings
    mount: MountSettings
    """Owner and modes of files."""
    worker: WorkerPod
    node_selector: Mapping[str, str]
    """Which nodes have a worker without being asked; empty: those that mount or load it."""
    node_affinity: Mapping[str, Any] | None
    """`required` of a node affinity, as given: where workers may be."""
    manifest: ManifestSpec | None = None
    """With it there are no mounts."""
    account: str = ""
    """The ServiceAccount of its namespace whose web identity opens buckets; empty: none."""

    @property
    def stores(self) -> tuple[Mount, ...]:
        """What has options and keys of its own."""
        return self.mounts if self.manifest is None else (self.manifest.store,)

    @property
    def audiences(self) -> list[str]:
        """For whom it needs a token of its account."""
        return sorted({mount.audience for mount in self.stores} - {""})

    @property
    def writable(self) -> bool:
        return WRITE in self.access_modes

    @property
    def dataset(self) -> Dataset:
        return Dataset(self.name, tuple(mount.point for mount in self.mounts))

    @property
    def memory(self) -> int:
        """Bytes of its MEM tiers."""
        return sum(tier.quota for tier in self.cache.tiers if tier.medium is Medium.MEM)

    @property
    def secrets(self) -> dict[str, set[str]]:
        """The keys that it names, by Secret."""
        found: dict[str, set[str]] = {}
        for mount in self.stores:
            for file in mount.files:
                found.setdefault(file.secret, set()).add(file.key)
        return found


def read_dataset(obj: Mapping[str, Any], release: Release) -> DatasetSpec:
    """What `obj` says. Raises SettingError for what is wrong or not built yet, and nothing else."""
    whole = Field("", obj)
    name = whole["metadata"]["name"]
    if len(name.text()) > 63:  # it becomes the value of labels
        raise name.refuse("a name of at most 63 characters")
    spec = whole["spec"].only(
        "mounts", "accessModes", "consistency", "tieredstore", "shared", "placement", "write", "nodeAffinity",
        "nodeSelector", "tolerations", "owner", "worker", "serviceAccountName", "manifest",
    )  # fmt: skip
    modes = _access_modes(spec["accessModes"])
    writable = WRITE in modes
    _refuse_what_is_not_built(spec)
    index = _index(spec["consistency"], writable=writable)
    store = spec["tieredstore"].only("levels", "priority")
    tiers = _tiers(store["levels"], release)
    priority = store["priority"].whole(-1000, 1000) if store["priority"].given else 0
    writing, upload = _write(spec["write"], writable=writable)
    worker = spec["worker"].only("resources", "priorityClassName", "tolerations", "podMetadata")
    tolerations = [*spec["tolerations"].items(), *worker["tolerations"].items()]
    listed = spec["manifest"].given
    if listed and spec["mounts"].given:
        raise spec["manifest"].refuse("either mounts or a manifest, not both")
    read = DatasetSpec(
        namespace=whole["metadata"]["namespace"].text(),
        name=name.text(),
        uid=whole["metadata"]["uid"].matching(r"[0-9a-f-]{8,64}", "the uid that the API gave it"),
        generation=whole["metadata"]["generation"].whole(0, 2**63),
        mounts=() if listed else _mounts(spec["mounts"], writable=writable),
        access_modes=modes,
        index=index,
        cache=CacheSettings(tiers=tiers, priority=priority),
        writing=writing,
        upload=upload,
        mount=_owner(spec["owner"], writable=writable),
        worker=_worker(worker, tuple(map(_toleration, tolerations))),
        node_selector=read_labels(spec["nodeSelector"]),
        node_affinity=_node_affinity(spec["nodeAffinity"]),
        manifest=_manifest(spec["manifest"], writable=writable) if listed else None,
        account=_account(spec["serviceAccountName"], release),
    )
    _check_memory(worker["resources"], read, release)
    _check_identity(spec["serviceAccountName"], read, release)
    return read


def _refuse_what_is_not_built(spec: Field) -> None:
    shared = spec["shared"].only("engine")["engine"]
    if shared.one_of(("none", "peers", "alluxio"), default="none") != "none":
        raise shared.refuse(f"none: sharing a cache between nodes {NOT_YET}")
    placement = spec["placement"]
    if placement.one_of(("replicate", "shard"), default="replicate") != "replicate":
        raise placement.refuse(f"replicate: sharding {NOT_YET}")


def _access_modes(given: Field) -> tuple[str, ...]:
    items = given.items()
    if not items:
        return (READ,)
    modes = tuple(item.one_of((READ, WRITE)) for item in items)
    if len(set(modes)) != len(modes):
        raise given.refuse(f"{READ} or {WRITE}, each once")
    return modes


def _index(given: Field, *, writable: bool) -> IndexSettings:
    given.only("mode", "ttl")
    mode = Consistency(given["mode"].one_of(list(Consistency), default=Consistency.REVALIDATE))
    if writable and mode is Consistency.IMMUTABLE:
        raise given["mode"].refuse(f"revalidate, with {WRITE}: what is immutable cannot be written")
    settings = IndexSettings(consistency=mode)
    return replace(settings, ttl=given["ttl"].read(KEYS["ttl"].kind)) if given["ttl"].given else settings


# ---- mounts --------------------------------------------------------------------------------------


def _mounts(given: Field, *, writable: bool) -> tuple[Mount, ...]:
    items = given.items()
    if not items:
        raise given.refuse("at least one mount, such as {mountPoint: s3://bucket/prefix}")
    mounts: list[Mount] = []
    for item in items:
        item.only("mountPoint", "name", "path", "readOnly", "options", "encryptOptions")
        mount = _mount(item, alone=len(items) == 1)
        for other in mounts:
            if _within(mount.point.path, other.point.path) or _within(other.point.path, mount.point.path):
                where = item["path"] if item["path"].given else item["name"]
                raise where.refuse(f"a path neither in nor above that of another mount, {other.point.path}")
        if writable and item["readOnly"].flag(default=False):
            raise item["readOnly"].refuse(f"false, with {WRITE}: a mount that cannot be written {NOT_YET}")
        if writable and mount.point.uri.startswith("http"):
            raise item["mountPoint"].refuse(f"a bucket, with {WRITE}: web servers take no files")
        if writable and mount.claim:
            raise item["mountPoint"].refuse(f"a bucket, with {WRITE}: claims are read here, and not written")
        mounts.append(mount)
    return tuple(mounts)


def _mount(item: Field, *, alone: bool) -> Mount:
    uri, scheme = _uri(item["mountPoint"])
    if item["path"].given:
        path = item["path"].read(PATH)
        if ".." in str(item["path"].value).split("/"):
            raise item["path"].refuse("a path without ..")
    elif item["name"].given:
        path = "/" + item["name"].read(NAME)
    elif alone:
        path = "/"
    else:
        raise item["name"].refuse("a name (or a path) for each mount when there are several")
    if item["name"].given:
        item["name"].read(NAME)
    if scheme == "pvc":
        for beside in ("options", "encryptOptions"):
            if item[beside].value:
                raise item[beside].refuse("none: a claim has neither options nor keys")
        return Mount(
            MountPoint(uri, path, {}), claim=uri.removeprefix("pvc://").partition("/")[0], field=item.path
        )
    return _store(item, uri, scheme, path)


def _store(item: Field, uri: str, scheme: str, path: str) -> Mount:
    options, audience = _options(item["options"], scheme)
    files = _files(item["encryptOptions"], scheme)
    _check_keys(item, scheme, options, files)
    return Mount(MountPoint(uri, path, options), files, audience=audience, field=item.path)


def _uri(given: Field) -> tuple[str, str]:
    text = given.text("a URI such as s3://bucket/prefix")
    if redact(text) != text or re.match(r"[^/]+://[^/]*@", text):
        raise given.refuse("a URI without user, password or signature in it", hide=True)
    uri: str = given.read(URI)
    scheme, _, rest = uri.partition("://")
    scheme = scheme.lower()
    uri = f"{scheme}://{rest}"
    if scheme == "pvc":
        return _claim(given, rest), scheme
    if scheme in ("file", "local"):
        raise given.refuse("an object store: directories of a node are not for users to read")
    if scheme == "dataset":
        raise given.refuse(f"an object store: sharing a Dataset with another namespace {NOT_YET}")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES if name != "file")
        raise given.refuse(f"one of {known}")
    try:
        if scheme in ("http", "https"):
            if "?" in rest or "#" in rest:
                raise given.refuse("a directory of a web server, without query and fragment")
            host, slash, path = rest.partition("/")
            uri = endpoint_of(given.path, f"{scheme}://{host}") + slash + path
        else:
            bucket_of(uri, scheme)
    except SettingError as error:
        raise given.refuse(error.expected) from error
    return uri, scheme


def _claim(given: Field, text: str) -> str:
    name, _, path = text.partition("/")
    steps = path.rstrip("/").split("/") if path.rstrip("/") else []
    if not re.fullmatch(DNS, name, re.ASCII) or len(name) > 253 or "?" in path:
        raise given.refuse("pvc://NAME/path, with the name of a PersistentVolumeClaim of its namespace")
    if any(step in ("", ".", "..") for step in steps):
        raise given.refuse("a path in the claim without empty steps, . and ..")
    return "/".join(["pvc:/", name, *steps])


def _manifest(given: Field, *, writable: bool) -> ManifestSpec:
    given.only("configMapKeyRef", "uri", "options", "encryptOptions")
    if writable:
        raise given.refuse(f"none, with {WRITE}: what is a list cannot be written")
    reference, uri = given["configMapKeyRef"], given["uri"]
    if reference.given == uri.given:
        raise given.refuse("either configMapKeyRef or uri: where the list is")
    if reference.given:
        config_map, key = read_reference(reference)
        options, audience = _options(given["options"], "")
        files = _files(given["encryptOptions"], "s3")
        _check_whole(given, options, files)
        store = Mount(MountPoint("", "/", options), files, audience=audience, field=given.path)
        return ManifestSpec(store, given.path, config_map, key)
    where, scheme = _uri(uri)
    if scheme == "pvc" or where.endswith("/") or not where.partition("://")[2].partition("/")[2]:
        raise uri.refuse("the URI of an object, such as s3://bucket/list.jsonl")
    return ManifestSpec(_store(given, where, scheme, "/"), given.path)


def read_reference(given: Field) -> tuple[str, str]:
    """Name and key of a `configMapKeyRef`. Raises SettingError."""
    given.only("name", "key")
    return (
        given["name"].matching(DNS, "the name of a ConfigMap of the same namespace"),
        given["key"].matching(
            r"[-._a-zA-Z0-9]{1,253}", "a key of the ConfigMap: letters, digits, dots, dashes, underscores"
        ),
    )


def _options(given: Field, scheme: str) -> tuple[dict[str, str], str]:
    """Options of the source, and the audience, which is ours. Without a scheme: of whatever a list names."""
    schemes = [scheme] if scheme else [name for name in SCHEMES if name != "file"]
    known = {name: None for each in schemes for name in SCHEMES[each].options}
    known = {name: None for name in known if name not in (*_FILES, *_NOT_HERE)}
    if "s3" in schemes:
        known[_AUDIENCE] = None
    found: dict[str, str] = {}
    for written, item in given.members().items():
        name = written.replace("-", "_")
        if name in _FILES or SECRET_NAME.search(name):
            raise item.refuse("it in encryptOptions, as a key of a Secret", hide=True)
        if name in _NOT_HERE:
            raise item.refuse(_NOT_HERE[name])
        if name not in known:
            names = ", ".join(known) or "none"
            whose = f"{scheme}:// has" if scheme else "there are"
            raise item.refuse(f"no such option: {whose} {names} (docs/sources.md)")
        if name in found:
            raise item.refuse(f"{name} once")
        found[name] = item.read(TEXT).strip()
    read = Options(found)
    for name in found:
        try:
            _check_option(read, scheme, name)
        except SettingError as error:
            raise given.members()[_written(given, name)].refuse(error.expected) from error
    if scheme == "oss" and "endpoint" not in found:
        example = "https://oss-cn-hangzhou.aliyuncs.com"
        raise given["endpoint"].refuse(f"the endpoint of the bucket's region, such as {example}")
    if scheme == "az" and "account" not in found:
        raise given["account"].refuse("the name of the storage account")
    if found.get("style") == "cname" and "endpoint" not in found:
        raise given["style"].refuse("path or virtual, or an endpoint with it: the URL that is the bucket")
    audience = found.pop(_AUDIENCE, "")
    if "role_arn" in found:
        return found, audience or AWS_STS
    for name, value in ((_AUDIENCE, audience), ("sts_endpoint", found.get("sts_endpoint"))):
        if value:
            raise given.members()[_written(given, name)].refuse("role_arn beside it: which role is taken on")
    return found, ""


def _written(given: Field, name: str) -> str:
    return next(key for key in given.members() if key.replace("-", "_") == name)


def _check_option(read: Options, scheme: str, name: str) -> None:
    if name == "endpoint":
        url = read.text(name)
        if scheme == "oss" and "://" not in url:
            url = "https://" + url
        if scheme == "az":  # the emulator's has the account as its path
            kind, _, rest = url.partition("://")
            url = f"{kind}://{rest.partition('/')[0]}"
        endpoint_of(name, url)
    elif name == "sts_endpoint":
        endpoint_of(name, read.text(name))
    elif name == "role_arn":
        if not re.fullmatch(_ROLE, read.text(name), re.ASCII):
            raise SettingError(name, read.text(name), "a role such as arn:aws:iam::123456789012:role/reader")
    elif name == _AUDIENCE:
        try:
            AUDIENCE.read(read.text(name))
        except ValueError as error:
            raise SettingError(name, read.text(name), AUDIENCE.expected) from error
    elif name in ("anonymous", "requester_pays"):
        read.flag(name)
    elif name == "style":
        read.one_of(name, "path", "virtual", "cname")
    elif name == "region":
        try:
            REGION.read(read.text(name))
        except ValueError as error:
            raise SettingError(name, read.text(name), REGION.expected) from error
    else:
        read.text(name)


def _files(given: Field, scheme: str) -> tuple[SecretFile, ...]:
    found: list[SecretFile] = []
    for item in given.items():
        item.only("name", "valueFrom")
        name = item["name"].text("the name of an option")
        plain, part = name.replace("-", "_"), key_part(name)
        if scheme in ("s3", "oss") and part is not None:
            plain = _KEYS[part]
        elif plain not in _FILES or plain not in SCHEMES[scheme].options:
            raise item["name"].refuse(_no_such_file(scheme, plain))
        if any(other.option == plain for other in found):
            raise item["name"].refuse(f"{plain} once")
        reference = item["valueFrom"].only("secretKeyRef")["secretKeyRef"].only("name", "key")
        secret = reference["name"].matching(DNS, "the name of a Secret in the namespace of the Dataset")
        key = reference["key"]
        # Fluid has the key optional, and means the name.
        chosen = (key if key.given else Field(key.path, name)).matching(
            r"[-._a-zA-Z0-9]{1,253}", "a key of the Secret: letters, digits, dots, dashes, underscores"
        )
        found.append(SecretFile(plain, secret, chosen, reference.path))
    return tuple(found)


def _no_such_file(scheme: str, name: str) -> str:
    if scheme == "az" and SECRET_NAME.search(name):
        return f"ca_bundle: keys of Azure {NOT_YET}"
    if name in SCHEMES[scheme].options:
        return "it in options: it is no secret"
    files = [file for file in _FILES if file in SCHEMES[scheme].options]
    names = [*(_KEYS if scheme in ("s3", "oss") else ()), *files]
    return f"what {scheme}:// takes from a Secret: {', '.join(names)}"


def _check_keys(item: Field, scheme: str, options: Mapping[str, str], files: tuple[SecretFile, ...]) -> None:
    """Keys are whole, and there are some unless none are needed."""
    keys, given = _check_whole(item, options, files), item["encryptOptions"]
    if Options(options).flag("anonymous"):
        return
    if scheme in _SIGNED and not keys and "role_arn" not in options:
        what = f"{_KEYS[0]} and {_KEYS[1]}" if scheme != "gs" else "credentials"
        raise given.refuse(f'{what} from a Secret, or `anonymous: "true"` in options for a public bucket')
    if scheme == "az":
        raise item["options"].refuse(
            f'`anonymous: "true"` in it, for a public container: keys of Azure {NOT_YET}'
        )


def _check_whole(item: Field, options: Mapping[str, str], files: tuple[SecretFile, ...]) -> set[str]:
    """The keys among `files`, which are of one kind, and whole."""
    given = item["encryptOptions"]
    keys = {file.option for file in files} & {"credentials", *_KEYS}
    if Options(options).flag("anonymous"):
        if keys:
            raise given.refuse("none, or options without anonymous")
        if "role_arn" in options:
            raise item["options"].refuse("either anonymous or role_arn in it, not both")
    if keys and "role_arn" in options:
        raise given.refuse("none, or options without role_arn")
    if "credentials" in keys and len(keys) > 1:
        raise given.refuse("either credentials or the single keys, not both")
    if keys and "credentials" not in keys and not {*_KEYS[:2]} <= keys:
        raise given.refuse(f"both {_KEYS[0]} and {_KEYS[1]}")
    return keys


def _account(given: Field, release: Release) -> str:
    if not given.given:
        return ""
    if not release.audiences:
        raise given.refuse(
            "none, but keys of a Secret in encryptOptions: the operator has web identity turned off (the "
            "chart's webIdentity.enabled)"
        )
    return given.matching(DNS, "the name of a ServiceAccount of its namespace")


def _check_identity(given: Field, spec: DatasetSpec, release: Release) -> None:
    """An account, and who takes its identity: both, or neither. And only for whom the operator allows: a
    token opens what its audience lets it, and goes wherever an option says."""
    wanting = [store for store in spec.stores if store.audience]
    if spec.account and not wanting:
        raise given.refuse("none, or the option role_arn at a mount of s3://, which would use it")
    for store in wanting:
        options = f"{store.field}.options"
        if not spec.account:
            expected = "serviceAccountName with it: whose identity it is"
            raise SettingError(f"{options}[role_arn]", store.point.options["role_arn"], expected)
        if store.audience not in release.audiences:
            allowed = " or ".join(release.audiences)
            expected = f"{allowed} (the chart's webIdentity.audiences)"
            raise SettingError(f"{options}[{_AUDIENCE}]", store.audience, expected)


# ---- tiers ---------------------------------------------------------------------------------------


def _tiers(given: Field, release: Release) -> tuple[TierSettings, ...]:
    tiers: list[TierSettings] = []
    for item in given.items():
        item.only("mediumtype", "path", "quota", "high", "low", "pool")
        tier = _tier(item, release)
        for other in tiers:
            if _within(tier.path, other.path) or _within(other.path, tier.path):
                raise item["path"].refuse(f"a path neither in nor above that of another level, {other.path}")
        tiers.append(tier)
    if not tiers:
        return (TierSettings(Medium.SSD, release.disk_dir, release.tier_quota),)
    return tuple(sorted(tiers, key=lambda tier: list(Medium).index(tier.medium)))  # fastest first


def _tier(item: Field, release: Release) -> TierSettings:
    given = item["mediumtype"]
    if given.one_of(("MEM", "SSD", "CEPH")) == "CEPH":
        raise given.refuse(f"MEM or SSD: tiers in a Ceph pool {NOT_YET}")
    if item["pool"].given:
        raise item["pool"].refuse("none: only CEPH has one")
    medium = Medium(given.text().lower())
    path = release.memory_dir if medium is Medium.MEM else release.disk_dir
    if item["path"].given:
        path = item["path"].read(PATH)
        roots = ", ".join(release.tier_roots)
        if ".." in str(item["path"].value).split("/") or "," in path:
            raise item["path"].refuse("one absolute path, without .. and commas")
        if not any(_within(path, os.path.normpath(root)) for root in release.tier_roots):
            raise item["path"].refuse(f"a path below {roots} (the chart's tiers.roots)")
    if not item["quota"].given:
        raise item["quota"].refuse("the most that the copies may take, such as 100Gi")
    quota = item["quota"].size(1, _ROOM)
    marks = {mark: item[mark].read(WATERMARK) for mark in ("high", "low") if item[mark].given}
    tier = TierSettings(medium, path, QUOTA.read(str(quota)), **marks)
    if "low" not in marks and tier.low >= tier.high:
        tier = replace(tier, low=round(tier.high * 0.9, 9))
    if not tier.low < tier.high:
        raise item["low"].refuse(f"less than high, {tier.high:g}")
    return tier


def _within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


# ---- writing -------------------------------------------------------------------------------------


def _write(given: Field, *, writable: bool) -> tuple[WritingSettings, UploadSettings]:
    if given.given and not writable:
        raise given.refuse(f"none, or accessModes: [{WRITE}]")
    if not writable:
        return WritingSettings(), UploadSettings()
    given.only("landing", "upload", "durability", "conflict", "acceptNodeLoss")
    landing = given["landing"]
    if landing.one_of(("SSD", "CEPH"), default="SSD") == "CEPH":
        raise landing.refuse(f"SSD: landing in Ceph {NOT_YET}")
    upload = given["upload"].only("mode", "delay", "concurrency", "bandwidth")
    # What lies on one node's disk only is lost with it: close(2) waits for the bucket unless told otherwise.
    mode = UploadMode(upload["mode"].one_of(list(UploadMode), default=UploadMode.SYNC))
    if mode is UploadMode.ASYNC and not given["acceptNodeLoss"].flag(default=False):
        raise upload["mode"].refuse(
            "sync, or write.acceptNodeLoss: true: what was written and not uploaded is lost with its node"
        )
    settings = UploadSettings(mode=mode)
    if upload["delay"].given:
        settings = replace(settings, delay=upload["delay"].read(KEYS["upload-delay"].kind))
    if upload["concurrency"].given:
        settings = replace(settings, concurrency=upload["concurrency"].whole(1, 256))
    if upload["bandwidth"].given:
        settings = replace(settings, bandwidth=upload["bandwidth"].size(0, TiB))
    durability = given["durability"].one_of(list(Durability), default=Durability.CLOSE)
    conflict = given["conflict"].one_of(list(Conflict), default=Conflict.KEEP_BOTH)
    return WritingSettings(
        enabled=True, durability=Durability(durability), conflict=Conflict(conflict)
    ), settings


def _owner(given: Field, *, writable: bool) -> MountSettings:
    given.only("uid", "gid", "fileMode", "dirMode")
    plain = MountSettings(file_mode=0o644, dir_mode=0o755) if writable else MountSettings()
    modes = {
        setting: given[field].read(KEYS[key].kind)
        for setting, field, key in (
            ("file_mode", "fileMode", "file-mode"),
            ("dir_mode", "dirMode", "dir-mode"),
        )
        if given[field].given
    }
    return replace(
        plain,
        uid=given["uid"].whole(0, 2**32 - 2) if given["uid"].given else 0,
        gid=given["gid"].whole(0, 2**32 - 2) if given["gid"].given else 0,
        **modes,
    )


# ---- pods ----------------------------------------------------------------------------------------


def _worker(given: Field, tolerations: tuple[Mapping[str, Any], ...]) -> WorkerPod:
    resources = given["resources"].only("requests", "limits")
    priority = given["priorityClassName"]
    if priority.given and priority.matching(DNS, "the name of a PriorityClass").startswith("system-"):
        raise priority.refuse("a PriorityClass that is not the system's: workers give way to training")
    metadata = given["podMetadata"].only("labels", "annotations")
    return WorkerPod(
        requests=_resources(resources["requests"]),
        limits=_resources(resources["limits"]),
        priority_class=priority.text() if priority.given else "",
        tolerations=tolerations,
        labels=read_labels(metadata["labels"], ours=False),
        annotations=_annotations(metadata["annotations"]),
    )


def _resources(given: Field) -> dict[str, str]:
    found = {}
    for name, item in given.members().items():
        if name not in ("cpu", "memory", "ephemeral-storage"):
            raise item.refuse("cpu, memory or ephemeral-storage: workers need nothing else")
        item.quantity()
        found[name] = str(item.value)
    return found


def _check_memory(given: Field, spec: DatasetSpec, release: Release) -> None:
    """The pages of a MEM tier are charged to the worker: with less it would be killed as the tier fills."""
    least = spec.memory + release.budget
    for kind in ("requests", "limits"):
        memory = given[kind]["memory"]
        if memory.given and memory.quantity() < least:
            raise memory.refuse(f"at least {-(-least >> 20)}Mi: the quota of MEM, and what a worker needs")
    for name in ("cpu", "memory", "ephemeral-storage"):
        asked, most = given["requests"][name], given["limits"][name]
        if asked.given and most.given and asked.quantity() > most.quantity():
            raise asked.refuse(f"at most its limit, {most.value}")


def read_labels(given: Field, *, ours: bool = True) -> dict[str, str]:
    """Labels, by key. Not `ours`: those that others go by are refused."""
    found = {}
    for key, item in given.members().items():
        if not re.fullmatch(_LABEL, key, re.ASCII) or len(key) > 253:
            raise item.refuse("a label whose key is like example.com/name")
        if not ours:
            _refuse_reserved(key, item)
        if item.value != "":
            item.matching(_LABEL_NAME, "the value of a label: up to 63 letters, digits, dashes, dots")
        found[key] = str(item.value)
    return found


_OTHERS = ("kubernetes.io", "k8s.io", "datacache.io", "istio.io", "linkerd.io")


def _refuse_reserved(key: str, item: Field) -> None:
    """Keys by which others find pods, or change them: not for users to say in the release's namespace."""
    domain = key.partition("/")[0] if "/" in key else ""
    if any(domain == other or domain.endswith("." + other) for other in _OTHERS):
        raise item.refuse("a key of your own: those of Kubernetes, meshes and datacache are not for users")


def _annotations(given: Field) -> dict[str, str]:
    found = {}
    for key, item in given.members().items():
        if not re.fullmatch(_LABEL, key, re.ASCII) or len(key) > 253:
            raise item.refuse("an annotation whose key is like example.com/name")
        _refuse_reserved(key, item)
        found[key] = item.text() if item.value != "" else ""
    return found


def _toleration(given: Field) -> dict[str, Any]:
    given.only("key", "operator", "value", "effect", "tolerationSeconds")
    operator = given["operator"].one_of(("Exists", "Equal"), default="Equal")
    if given["key"].given and given["key"].value != "":
        given["key"].matching(_LABEL, "the key of a taint")
    elif operator != "Exists":
        raise given["operator"].refuse("Exists, without a key")
    if operator == "Exists" and given["value"].value:
        raise given["value"].refuse("none, with operator Exists")
    if given["value"].value:
        given["value"].matching(_LABEL_NAME, "the value of a taint")
    if given["effect"].value != "":
        given["effect"].one_of(("NoSchedule", "PreferNoSchedule", "NoExecute"), default="NoExecute")
    if given["tolerationSeconds"].given:
        given["tolerationSeconds"].whole(-(2**63), 2**63 - 1)
        if given["effect"].value != "NoExecute":
            raise given["tolerationSeconds"].refuse("none, or effect NoExecute")
    return {key: field.value for key, field in _given(given)}


def _given(given: Field) -> list[tuple[str, Field]]:
    return [(key, given[key]) for key in given.members() if given[key].given]


def _node_affinity(given: Field) -> Mapping[str, Any] | None:
    given.only("required")
    required = given["required"].only("nodeSelectorTerms")
    if not required.given:
        return None
    terms = required["nodeSelectorTerms"].items()
    if not terms:
        raise required["nodeSelectorTerms"].refuse("at least one term")
    return {"nodeSelectorTerms": [_term(term) for term in terms]}


def _term(term: Field) -> dict[str, Any]:
    term.only("matchExpressions", "matchFields")
    found: dict[str, Any] = {}
    for kind in ("matchExpressions", "matchFields"):
        expressions = term[kind].items()
        if expressions:
            found[kind] = [_expression(item, fields=kind == "matchFields") for item in expressions]
    return found


def _expression(item: Field, *, fields: bool) -> dict[str, Any]:
    item.only("key", "operator", "values")
    if fields:
        item["key"].one_of(("metadata.name",))
        operator = item["operator"].one_of(("In", "NotIn"))
    else:
        item["key"].matching(_LABEL, "the key of a label")
        operator = item["operator"].one_of(("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"))
    values = item["values"].items()
    for value in values:
        if value.value != "":
            value.matching(DNS if fields else _LABEL_NAME, "the value of a label")
    if operator in ("In", "NotIn") and (not values or (fields and len(values) != 1)):
        raise item["values"].refuse("one value" if fields else f"at least one value, with {operator}")
    if operator in ("Exists", "DoesNotExist") and values:
        raise item["values"].refuse(f"none, with {operator}")
    if operator in ("Gt", "Lt") and (
        len(values) != 1 or not re.fullmatch(r"-?[0-9]{1,18}", str(values[0].value), re.ASCII)
    ):
        raise item["values"].refuse(f"one whole number, with {operator}")
    found = {"key": item["key"].value, "operator": operator}
    return found | ({"values": [str(value.value) for value in values]} if values else {})
