"""
From a URI and its options to a source: the only place that knows who serves a scheme.

`check_mount` says early, without network, what is wrong with a mount point; `open_source` makes the
source, with every answer checked and every request tried again as far as that makes sense; `open_sink`
makes what writes to the same place, without either: the uploader tries again. What the text of a
mount point may be stands in `config.schemes`; here is who serves it. What is not in that table is
tried with fsspec.

The client of a scheme is imported when a URI of it is opened: all of them take 0.2 s to import, and
readers wait while a daemon is replaced.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from datacache.clock import Clock
from datacache.config.keys import REGION
from datacache.config.schemes import (
    SCHEMES,
    SECRET_NAME,
    Options,
    bucket_of,
    check_names,
    endpoint_of,
    scheme_of,
    shown,
)
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


_OSS_HOST = re.compile(r"^(?:s3\.)?(oss-([a-z0-9-]+?)(?:-internal)?\.aliyuncs\.com)$")
_NO_SECRETS = ("", "anon", "browser", "cache", "cloud", "google_default", "true", "false")


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
    scheme = scheme_of(mount.uri)
    known = SCHEMES.get(scheme)
    if known is None:
        _check_no_secrets(mount.options)
        return _fsspec(mount.uri, mount.options)
    check_names(mount.options, known)
    given = _Options(mount.options)
    if scheme in ("s3", "oss", "gs", "az"):
        name, prefix = bucket_of(mount.uri, scheme)
        return {"s3": _s3, "oss": _oss, "gs": _gs, "az": _az}[scheme](name, prefix, given, environment)
    if scheme == "file":
        return _file(mount.uri, given)
    return _web(mount.uri, given)


def _check_no_secrets(options: Mapping[str, str]) -> None:
    """Options show in arguments and in the status. What fsspec knows by names of our secrets may also be
    a word (`token=anon`) or a file that holds the secret."""
    for name, value in options.items():
        if SECRET_NAME.search(name) and value not in _NO_SECRETS and not os.path.isfile(value):
            raise SettingError(
                f"option {name}",
                "***",
                f"secrets in fsspec's own configuration, such as the variable FSSPEC_<SCHEME>_{name.upper()}",
            )


class _Options(Options):
    """Options of a mount point on this machine, where they may name files."""

    def file(self, name: str, *, or_directory: bool = False) -> str:
        path = os.path.expanduser(self.text(name))
        if path:
            _check_file(f"option {name}", path, or_directory=or_directory)
        return path


def _check_file(name: str, path: str, *, or_directory: bool = False) -> None:
    if not (os.path.isfile(path) or (or_directory and os.path.isdir(path))) or not os.access(path, os.R_OK):
        what = "file or directory" if or_directory else "file"
        raise SettingError(name, path, f"a {what} that exists and can be read")


def _s3(name: str, prefix: str, given: _Options, environment: Environment) -> Makers:
    from datacache.sources.aws import Bucket, find_bucket

    environment = _with_identity(given, environment)
    asked = Bucket(
        scheme="s3", name=name, prefix=prefix,
        endpoint=endpoint_of("option endpoint", given.text("endpoint")) if given.text("endpoint") else "",
        region=given.text("region"), style=given.one_of("style", "path", "virtual", "cname"),
        anonymous=given.flag("anonymous"), requester_pays=given.flag("requester_pays"),
        ca_bundle=given.file("ca_bundle"), profile=given.text("profile"),
        keyfile=given.file("credentials", or_directory=True), environment=environment,
    )  # fmt: skip
    variable = "AWS_ENDPOINT_URL_S3" if environment.get("AWS_ENDPOINT_URL_S3") else "AWS_ENDPOINT_URL"
    return _s3_maker(find_bucket(asked), variable)


_STATIC = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def _with_identity(given: _Options, environment: Environment) -> Environment:
    """The environment in which the web identity of the options is the one that there is."""
    role, token = given.text("role_arn"), given.file("web_identity")
    sts = given.text("sts_endpoint")
    if bool(role) != bool(token):
        missing = "role_arn" if token else "web_identity"
        raise SettingError(f"option {missing}", "", "role_arn and web_identity, both or neither")
    if role and (given.text("credentials") or given.flag("anonymous")):
        other = "credentials" if given.text("credentials") else "anonymous"
        raise SettingError(f"option {other}", given.text(other), "none, with role_arn")
    named = {
        "AWS_ROLE_ARN": role,
        "AWS_WEB_IDENTITY_TOKEN_FILE": token,
        "AWS_ENDPOINT_URL_STS": endpoint_of("option sts_endpoint", sts) if sts else "",
    }
    found = {name: value for name, value in environment.items() if not (role and name in _STATIC)}
    return found | {name: value for name, value in named.items() if value}


def _s3_maker(bucket: "Bucket", variable: str) -> Makers:
    from datacache.sources.s3 import S3Source

    if bucket.endpoint:
        bucket = replace(bucket, endpoint=endpoint_of(variable, bucket.endpoint))
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
    endpoint = endpoint_of(variable, endpoint)
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
        config["base_url"] = endpoint_of("option endpoint", url)
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
        endpoint = endpoint_of("option endpoint", f"{urlsplit(url).scheme}://{host}")
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


def _file(uri: str, given: _Options) -> Makers:
    path = uri[len("file://") :]
    if not path.startswith("/"):
        raise SettingError("URI", uri, "file:///absolute/path")
    if inside := given.text("inside").rstrip("/"):
        below = path[len(inside) + 1 :]
        if f"{path}/"[: len(inside) + 1] != f"{inside}/" or not {".", ".."}.isdisjoint(below.split("/")):
            raise SettingError("option inside", inside, f"a directory above {path}")
        return Makers(
            lambda settings, clock: LocalSource(inside, below),
            _read_only(uri, "option inside"),
        )
    return Makers(lambda settings, clock: LocalSource(path), lambda settings, clock: LocalSink(path))


def _web(uri: str, given: _Options) -> Makers:
    from datacache.sources.website import WebSource

    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise SettingError("URI", shown(uri), "a URL such as https://host/path") from error
    if not parts.hostname:
        raise SettingError("URI", shown(uri), "a URL such as https://host/path")
    if "@" in parts.netloc:
        raise SettingError("URI", shown(uri), "https://host/path; credentials are not part of a URI")
    if parts.query or parts.fragment:
        raise SettingError("URI", shown(uri), "a directory: no query, no fragment")
    root = endpoint_of("URI", f"{parts.scheme}://{parts.netloc}") + parts.path.rstrip("/") + "/"
    ca_bundle = given.file("ca_bundle")
    return Makers(
        lambda settings, clock: WebSource(root, ca_bundle=ca_bundle, settings=settings),
        _read_only(uri, "web servers take no files"),
    )


def _read_only(uri: str, why: str) -> Callable[[SourceSettings, Clock], Sink]:
    def refuse(settings: SourceSettings, clock: Clock) -> Sink:
        expected = f"a bucket or a directory, with --rw: this can only be read ({why})"
        raise SettingError("URI", shown(uri), expected)

    return refuse


def _fsspec(uri: str, options: Mapping[str, str]) -> Makers:
    from datacache.sources.filesystem import FsspecSource, check_scheme

    check_scheme(uri)
    return Makers(
        lambda settings, clock: FsspecSource(uri, settings=settings, options=options),
        _read_only(uri, "nothing is written through fsspec"),
    )
