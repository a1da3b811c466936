"""
From a URI and its options to a source: the only place that knows all schemes.

`check_mount` says early, without network, what is wrong with a mount point; `open_source` makes the
source, with every answer checked and every request tried again as far as that makes sense; `open_sink`
makes what writes to the same place, without either: the uploader tries again. Each
scheme is a row of `SCHEMES`: its options, how its URI is taken apart, and who serves it. What is
not in the table is tried with fsspec.

The client of a scheme is imported when a URI of it is opened: all of them take 0.2 s to import, and
readers wait while a daemon is replaced.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from datacache.clock import Clock
from datacache.config.keys import REGION
from datacache.config.settings import SourceSettings
from datacache.errors import SettingError
from datacache.model import MountPoint
from datacache.sources.checked import CheckedSource
from datacache.sources.local import LocalSink, LocalSource
from datacache.sources.sink import Sink
from datacache.sources.source import Source
from datacache.sources.steady import SteadySource

if TYPE_CHECKING:
    from datacache.sources.aws import Bucket

Environment = Mapping[str, str]
Maker = Callable[[SourceSettings, Clock], Source]


class Makers(NamedTuple):
    """What makes the source of a mount point, and its sink."""

    source: Maker
    sink: Callable[[SourceSettings, Clock], Sink]


_ENDPOINT = "URL of the store, such as http://minio:9000"
_ANONYMOUS = "true: requests are not signed (public buckets)"
_KEYS = "file or directory that holds the keys, such as a mounted Secret"
_TRUST = "file of certificates (PEM) to trust"


@dataclass(frozen=True)
class Scheme:
    """What can be said of the mount points of one scheme."""

    what: str
    """What it is, for help texts; with an example."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Names and meanings."""


SCHEMES: Mapping[str, Scheme] = {
    "s3": Scheme(
        "S3, and every store that speaks it: s3://bucket/prefix",
        {
            "endpoint": _ENDPOINT,
            "region": "region of the bucket",
            "style": "path, virtual, or cname (the endpoint's host is the bucket)",
            "anonymous": _ANONYMOUS,
            "profile": "profile of the shared AWS configuration; of `credentials`, the section",
            "credentials": _KEYS,
            "ca_bundle": _TRUST,
            "requester_pays": "true: accept the costs of requests to a bucket that asks for it",
        },
    ),
    "oss": Scheme(
        "Alibaba Cloud OSS: oss://bucket/prefix",
        {
            "endpoint": "URL of the region's endpoint, such as https://oss-cn-hangzhou.aliyuncs.com",
            "region": "region of the bucket, such as cn-hangzhou; taken from the endpoint otherwise",
            "style": "virtual, cname (the endpoint's host is the bucket), or path (no OSS does that)",
            "anonymous": _ANONYMOUS,
            "credentials": _KEYS,
            "ca_bundle": _TRUST,
            "client": "s3 (OSS's S3-compatible endpoint) or ossfs (the fsspec implementation)",
        },
    ),
    "gs": Scheme(
        "Google Cloud Storage: gs://bucket/prefix",
        {
            "endpoint": _ENDPOINT,
            "anonymous": _ANONYMOUS,
            "credentials": "file of a service account or of application default credentials (JSON)",
            "ca_bundle": _TRUST,
        },
    ),
    "az": Scheme(
        "Azure Blob Storage: az://container/prefix",
        {
            "account": "name of the storage account",
            "endpoint": "URL of the account's blob service",
            "anonymous": _ANONYMOUS,
            "ca_bundle": _TRUST,
        },
    ),
    "http": Scheme("a directory of a web server: http://host/path", {"ca_bundle": _TRUST}),
    "https": Scheme("a directory of a web server: https://host/path", {"ca_bundle": _TRUST}),
    "file": Scheme("a directory of this machine: file:///path"),
}

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]$")
_HOST = re.compile(r"^[A-Za-z0-9._-]+$|^[0-9A-Fa-f:.]+$")
_IPV4 = re.compile(r"^\d+\.\d+\.\d+\.\d+$")
_OSS_HOST = re.compile(r"^(?:s3\.)?(oss-([a-z0-9-]+?)(?:-internal)?\.aliyuncs\.com)$")
_SECRET = re.compile(r"secret|password|passwd|token|access_?key|account_?key|sas_?key|^key$", re.IGNORECASE)
_NO_SECRETS = ("", "anon", "browser", "cache", "cloud", "google_default", "true", "false")
_BOOLEANS = {"true": True, "yes": True, "1": True, "on": True,
             "false": False, "no": False, "0": False, "off": False}  # fmt: skip


def open_source(
    mount: MountPoint, *, settings: SourceSettings, environment: Environment, clock: Clock
) -> Source:
    """The source of `mount`, checked and steady. Raises SettingError; asks nobody yet."""
    raw = open_raw(mount, settings=settings, environment=environment, clock=clock)
    return SteadySource(CheckedSource(raw), settings, clock)


def open_raw(
    mount: MountPoint, *, settings: SourceSettings, environment: Environment, clock: Clock
) -> Source:
    """The source of `mount` as it is: one request a call, believed as it comes."""
    return _plan(mount, environment).source(settings, clock)


def open_sink(point: MountPoint, settings: SourceSettings, *, environment: Environment, clock: Clock) -> Sink:
    """Where the objects of `point` are put: one request a call. Raises SettingError, also for what can only
    be read; asks nobody yet."""
    return _plan(point, environment).sink(settings, clock)


def check_mount(mount: MountPoint, environment: Environment) -> None:
    """Raise SettingError for what is wrong with `mount`, as far as can be told without network."""
    _plan(mount, environment)


def _plan(mount: MountPoint, environment: Environment) -> Makers:
    """What will make the source; everything that can be wrong has been looked at."""
    scheme = _scheme(mount.uri)
    known = SCHEMES.get(scheme)
    if known is None:
        _check_no_secrets(mount.options)
        return _fsspec(mount.uri, mount.options)
    _check_names(mount.options, known)
    given = _Options(mount.options)
    if scheme in ("s3", "oss", "gs", "az"):
        name, prefix = _bucket_of(mount.uri, scheme)
        return {"s3": _s3, "oss": _oss, "gs": _gs, "az": _az}[scheme](name, prefix, given, environment)
    if scheme == "file":
        return _file(mount.uri)
    return _web(mount.uri, given)


def _scheme(uri: str) -> str:
    match = _SCHEME.match(uri)
    if match is None:
        schemes = ", ".join(f"{name}://" for name in SCHEMES)
        raise SettingError("URI", _shown(uri), f"a URI such as s3://bucket/prefix ({schemes}, or fsspec's)")
    return match[1].lower()


def _shown(uri: str) -> str:
    """`uri` without what may be a secret: user, password and query."""
    return re.sub(r"//[^/@]*@", "//***@", uri.partition("?")[0])


def _check_names(options: Mapping[str, str], scheme: Scheme) -> None:
    names = ", ".join(scheme.options) or "none"
    for name, value in options.items():
        if name in scheme.options:
            continue
        if _SECRET.search(name):
            raise SettingError(
                f"option {name}", "***", "secrets in the environment or in a file (option credentials)"
            )
        raise SettingError(f"option {name}", value, f"one of this scheme's options: {names}")


def _check_no_secrets(options: Mapping[str, str]) -> None:
    """Options show in arguments and in the status. What fsspec knows by names of our secrets may also be
    a word (`token=anon`) or a file that holds the secret."""
    for name, value in options.items():
        if _SECRET.search(name) and value not in _NO_SECRETS and not os.path.isfile(value):
            raise SettingError(
                f"option {name}",
                "***",
                f"secrets in fsspec's own configuration, such as the variable FSSPEC_<SCHEME>_{name.upper()}",
            )


class _Options:
    """Options of a mount point, each read as what it must be."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._options = options

    def text(self, name: str) -> str:
        value = self._options.get(name, "")
        if name in self._options and not value.strip():
            raise SettingError(f"option {name}", value, "a value")
        return value.strip()

    def flag(self, name: str) -> bool:
        value = self._options.get(name, "false")
        if value.lower() not in _BOOLEANS:
            raise SettingError(f"option {name}", value, "true or false")
        return _BOOLEANS[value.lower()]

    def one_of(self, name: str, *choices: str) -> str:
        value = self._options.get(name, "")
        if value and value not in choices:
            raise SettingError(f"option {name}", value, " or ".join(choices))
        return value

    def file(self, name: str, *, or_directory: bool = False) -> str:
        path = os.path.expanduser(self.text(name))
        if path:
            _check_file(f"option {name}", path, or_directory=or_directory)
        return path


def _check_file(name: str, path: str, *, or_directory: bool = False) -> None:
    if not (os.path.isfile(path) or (or_directory and os.path.isdir(path))) or not os.access(path, os.R_OK):
        what = "file or directory" if or_directory else "file"
        raise SettingError(name, path, f"a {what} that exists and can be read")


def _bucket_of(uri: str, scheme: str) -> tuple[str, str]:
    """Bucket and prefix, which is empty or ends in "/". What follows the bucket is taken as it
    stands: it is a key, not a URL's path, so `%41` is three characters."""
    rest = uri[len(scheme) + 3 :]
    name, _, path = rest.partition("/")
    if "@" in name or ":" in name:
        raise SettingError("URI", _shown(uri), f"{scheme}://bucket/prefix; credentials are not part of a URI")
    for mark, what in (("?", "query"), ("#", "fragment")):
        if mark in rest:
            raise SettingError("URI", _shown(uri), f"{scheme}://bucket/prefix without a {what}; use options")
    if not name:
        raise SettingError("URI", uri, f"{scheme}://bucket/prefix, with a bucket")
    if not _BUCKET.match(name) or ".." in name or _IPV4.match(name):
        raise SettingError(
            "URI", uri, "a bucket name of 3 to 255 letters, digits, dots, hyphens and underscores"
        )
    return name, path if path.endswith("/") or not path else path + "/"


def _endpoint(name: str, url: str) -> str:
    """`url` in the one form in which it is part of identities."""
    expected = "a URL such as https://store.example:9000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SettingError(name, _shown(url), expected) from error
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not _HOST.match(host):
        raise SettingError(name, _shown(url), expected)
    if "@" in parts.netloc:
        raise SettingError(name, _shown(url), f"{expected}; credentials are not part of a URL")
    if parts.query or parts.fragment or parts.path.rstrip("/"):
        raise SettingError(name, _shown(url), f"{expected}, without path and query")
    host = f"[{host}]" if ":" in host else host
    default = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, default) else "")


def _s3(name: str, prefix: str, given: _Options, environment: Environment) -> Makers:
    from datacache.sources.aws import Bucket, find_bucket

    asked = Bucket(
        scheme="s3", name=name, prefix=prefix,
        endpoint=_endpoint("option endpoint", given.text("endpoint")) if given.text("endpoint") else "",
        region=given.text("region"), style=given.one_of("style", "path", "virtual", "cname"),
        anonymous=given.flag("anonymous"), requester_pays=given.flag("requester_pays"),
        ca_bundle=given.file("ca_bundle"), profile=given.text("profile"),
        keyfile=given.file("credentials", or_directory=True), environment=environment,
    )  # fmt: skip
    variable = "AWS_ENDPOINT_URL_S3" if environment.get("AWS_ENDPOINT_URL_S3") else "AWS_ENDPOINT_URL"
    return _s3_maker(find_bucket(asked), variable)


def _s3_maker(bucket: "Bucket", variable: str) -> Makers:
    from datacache.sources.s3 import S3Source

    if bucket.endpoint:
        bucket = replace(bucket, endpoint=_endpoint(variable, bucket.endpoint))
    if bucket.region:
        try:
            REGION.read(bucket.region)
        except (
            ValueError
        ) as error:  # of an option, a variable or a profile: botocore would say it of each read
            raise SettingError("region", bucket.region, REGION.expected) from error
    if bucket.ca_bundle:
        _check_file("AWS_CA_BUNDLE", bucket.ca_bundle)
    if bucket.style == "cname" and not bucket.endpoint:
        raise SettingError("option style", "cname", "an option endpoint with it: the URL that is the bucket")

    def sink(settings: SourceSettings, clock: Clock) -> Sink:
        from datacache.sources.s3upload import S3Sink

        return S3Sink(bucket, settings=settings, clock=clock)

    return Makers(lambda settings, clock: S3Source(bucket, settings=settings, clock=clock), sink)


def _oss(name: str, prefix: str, given: _Options, environment: Environment) -> Makers:
    from datacache.sources.aws import Bucket

    endpoint = given.text("endpoint") or environment.get("OSS_ENDPOINT", "")
    if not endpoint:
        raise SettingError(
            "option endpoint", "", "the endpoint of the bucket's region (or the variable OSS_ENDPOINT), "
            "such as https://oss-cn-hangzhou.aliyuncs.com",
        )  # fmt: skip
    if "://" not in endpoint:
        endpoint = "https://" + endpoint
    variable = "option endpoint" if given.text("endpoint") else "OSS_ENDPOINT"
    endpoint = _endpoint(variable, endpoint)
    if given.one_of("client", "s3", "ossfs") == "ossfs":
        return _ossfs(f"oss://{name}/{prefix}", endpoint, given, environment)
    parts = urlsplit(endpoint)
    region = given.text("region") or environment.get("OSS_REGION", "")
    if match := _OSS_HOST.match(parts.hostname or ""):
        # Only the hosts that begin with s3. speak S3 in all regions.
        endpoint = urlunsplit(
            parts._replace(netloc=parts.netloc.replace(parts.hostname or "", "s3." + match[1]))
        )
        region = region or match[2]
    return _s3_maker(
        Bucket(
            scheme="oss", name=name, prefix=prefix, endpoint=endpoint,
            region=region.removeprefix("oss-") or "us-east-1",
            style=given.one_of("style", "path", "virtual", "cname") or "virtual",
            anonymous=given.flag("anonymous"), ca_bundle=given.file("ca_bundle"),
            keyfile=given.file("credentials", or_directory=True),
            environment=_as_aws(environment),
        ),
        variable,
    )  # fmt: skip


def _as_aws(environment: Environment) -> dict[str, str]:
    """OSS's variables under the names that botocore looks for, and nothing of AWS's own: keys of
    one cloud are not shown to another."""
    names = {
        "AWS_ACCESS_KEY_ID": ("OSS_ACCESS_KEY_ID",),
        "AWS_SECRET_ACCESS_KEY": ("OSS_ACCESS_KEY_SECRET", "OSS_SECRET_ACCESS_KEY"),
        "AWS_SESSION_TOKEN": ("OSS_SESSION_TOKEN", "OSS_SECURITY_TOKEN"),
    }
    found = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
             "AWS_CONFIG_FILE": os.devnull}  # fmt: skip
    for name, theirs in names.items():
        value = next((environment[n] for n in theirs if environment.get(n)), None)
        if value:
            found[name] = value
    return found


def _ossfs(uri: str, endpoint: str, given: _Options, environment: Environment) -> Makers:
    options = {"endpoint": endpoint}
    if not given.flag("anonymous"):
        keys = _as_aws(environment)
        names = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY", "token": "AWS_SESSION_TOKEN"}
        options |= {name: keys[variable] for name, variable in names.items() if variable in keys}
    return _fsspec(uri.rstrip("/"), options)


def _gs(name: str, prefix: str, given: _Options, environment: Environment) -> Makers:
    config: dict[str, object] = {"skip_signature": given.flag("anonymous")}
    uri = f"gs://{name}/{prefix}".removesuffix("/")
    if url := given.text("endpoint"):
        config["base_url"] = _endpoint("option endpoint", url)
        uri += f"?endpoint={config['base_url']}"
    credentials = given.file("credentials")
    if not credentials and (credentials := environment.get("GOOGLE_APPLICATION_CREDENTIALS", "")):
        _check_file("GOOGLE_APPLICATION_CREDENTIALS", credentials)
    if credentials and not given.flag("anonymous"):
        config["application_credentials"] = credentials
    ca_bundle = given.file("ca_bundle")

    def make(settings: SourceSettings, clock: Clock) -> Source:
        from datacache.sources import objectstore

        store = objectstore.gcs_store(name, config=config, ca_bundle=ca_bundle, settings=settings)
        # Google's tags are MD5s too, but for composed and customer-encrypted objects.
        return objectstore.ObjectStoreSource(store, uri=uri, prefix=prefix, md5_etag=True)

    def sink(settings: SourceSettings, clock: Clock) -> Sink:
        from datacache.sources import objectstore

        patient = objectstore.patient(settings)
        store = objectstore.gcs_store(name, config=config, ca_bundle=ca_bundle, settings=patient)
        return objectstore.ObjectStoreSink(store, uri=uri, prefix=prefix)

    return Makers(make, sink)


# The variables of Azure's that obstore knows, by its name of each.
_AZURE = {
    "account_key": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_KEY"),
    "sas_key": ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"),
    "client_id": ("AZURE_CLIENT_ID", "AZURE_STORAGE_CLIENT_ID"),
    "client_secret": ("AZURE_CLIENT_SECRET", "AZURE_STORAGE_CLIENT_SECRET"),
    "tenant_id": ("AZURE_TENANT_ID", "AZURE_STORAGE_TENANT_ID"),
    "authority_host": ("AZURE_AUTHORITY_HOST", "AZURE_STORAGE_AUTHORITY_HOST"),
    "federated_token_file": ("AZURE_FEDERATED_TOKEN_FILE",),
    "msi_endpoint": ("AZURE_MSI_ENDPOINT", "AZURE_IDENTITY_ENDPOINT"),
}


def _az(name: str, prefix: str, given: _Options, environment: Environment) -> Makers:
    account = given.text("account") or _first(
        environment, "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"
    )
    if not account:
        raise SettingError("option account", "", "the storage account (or AZURE_STORAGE_ACCOUNT_NAME)")
    config: dict[str, object] = {"account_name": account, "skip_signature": given.flag("anonymous")}
    if not given.flag("anonymous"):
        found = {key: _first(environment, *variables) for key, variables in _AZURE.items()}
        config |= {key: value for key, value in found.items() if value}
    uri = f"az://{name}/{prefix}".removesuffix("/") + f"?account={account}"
    if url := given.text("endpoint"):
        # The emulator's has the account as its path.
        host, _, path = url.removesuffix("/").partition("://")[2].partition("/")
        endpoint = _endpoint("option endpoint", f"{urlsplit(url).scheme}://{host}")
        config["endpoint"] = f"{endpoint}/{path}" if path else endpoint
        uri += f"&endpoint={config['endpoint']}"
    ca_bundle = given.file("ca_bundle")

    def make(settings: SourceSettings, clock: Clock) -> Source:
        from datacache.sources import objectstore

        store = objectstore.azure_store(name, config=config, ca_bundle=ca_bundle, settings=settings)
        return objectstore.ObjectStoreSource(store, uri=uri, prefix=prefix)

    def sink(settings: SourceSettings, clock: Clock) -> Sink:
        from datacache.sources import objectstore

        patient = objectstore.patient(settings)
        store = objectstore.azure_store(name, config=config, ca_bundle=ca_bundle, settings=patient)
        return objectstore.ObjectStoreSink(store, uri=uri, prefix=prefix)

    return Makers(make, sink)


def _first(environment: Environment, *names: str) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


def _file(uri: str) -> Makers:
    path = uri[len("file://") :]
    if not path.startswith("/"):
        raise SettingError("URI", uri, "file:///absolute/path")
    return Makers(lambda settings, clock: LocalSource(path), lambda settings, clock: LocalSink(path))


def _web(uri: str, given: _Options) -> Makers:
    from datacache.sources.website import WebSource

    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise SettingError("URI", _shown(uri), "a URL such as https://host/path") from error
    if not parts.hostname:
        raise SettingError("URI", _shown(uri), "a URL such as https://host/path")
    if "@" in parts.netloc:
        raise SettingError("URI", _shown(uri), "https://host/path; credentials are not part of a URI")
    if parts.query or parts.fragment:
        raise SettingError("URI", _shown(uri), "a directory: no query, no fragment")
    root = _endpoint("URI", f"{parts.scheme}://{parts.netloc}") + parts.path.rstrip("/") + "/"
    ca_bundle = given.file("ca_bundle")
    return Makers(
        lambda settings, clock: WebSource(root, ca_bundle=ca_bundle, settings=settings),
        _read_only(uri, "web servers take no files"),
    )


def _read_only(uri: str, why: str) -> Callable[[SourceSettings, Clock], Sink]:
    def refuse(settings: SourceSettings, clock: Clock) -> Sink:
        expected = f"a bucket or a directory, with --rw: this can only be read ({why})"
        raise SettingError("URI", _shown(uri), expected)

    return refuse


def _fsspec(uri: str, options: Mapping[str, str]) -> Makers:
    from datacache.sources.filesystem import FsspecSource, check_scheme

    check_scheme(uri)
    return Makers(
        lambda settings, clock: FsspecSource(uri, settings=settings, options=options),
        _read_only(uri, "nothing is written through fsspec"),
    )
