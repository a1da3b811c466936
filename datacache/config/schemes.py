"""
What can be said of a mount point by its text alone: schemes, their options, buckets and endpoints. Pure.

`sources.opening` makes sources of what is right here; the controller refuses in words what is wrong, long
before a worker would. Each scheme is a row of `SCHEMES`. Whatever is wrong is a SettingError.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from datacache.errors import SettingError

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
            "role_arn": "role to take on with the web identity",
            "web_identity": "file that holds the token of a web identity, for `role_arn`",
            "sts_endpoint": "URL of the service that gives keys for a web identity, where it is not AWS's",
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
    "file": Scheme(
        "a directory of this machine: file:///path",
        {"inside": "a directory above it that no symbolic link on the way leads out of; read-only then"},
    ),
}

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]$")
_HOST = re.compile(r"^[A-Za-z0-9._-]+$|^[0-9A-Fa-f:.]+$")
_IPV4 = re.compile(r"^\d+\.\d+\.\d+\.\d+$")
SECRET_NAME = re.compile(
    r"secret|password|passwd|token|access_?key|account_?key|sas_?key|^key$", re.IGNORECASE
)
"""Names of options that would hold a secret."""
# How the keys of S3 and OSS are called: the AWS files, their shorter forms, OSS's. Neither case nor "-"
# and "_" count.
_PARTS = {
    "accesskeyid": 0, "accesskey": 0,
    "secretaccesskey": 1, "secretkey": 1, "accesskeysecret": 1,
    "sessiontoken": 2, "securitytoken": 2, "token": 2,
}  # fmt: skip
_VENDORS = ("fs", "aws", "oss", "s3")
_BOOLEANS = {"true": True, "yes": True, "1": True, "on": True,
             "false": False, "no": False, "0": False, "off": False}  # fmt: skip


def scheme_of(uri: str) -> str:
    """The scheme of `uri`, in small letters. Raises SettingError."""
    match = _SCHEME.match(uri)
    if match is None:
        schemes = ", ".join(f"{name}://" for name in SCHEMES)
        raise SettingError("URI", shown(uri), f"a URI such as s3://bucket/prefix ({schemes}, or fsspec's)")
    return match[1].lower()


def shown(uri: str) -> str:
    """`uri` without what may be a secret: user, password and query."""
    return re.sub(r"//[^/@]*@", "//***@", uri.partition("?")[0])


def check_names(options: Mapping[str, str], scheme: Scheme) -> None:
    """Raise SettingError for an option that `scheme` does not have; the value of a secret is not told."""
    names = ", ".join(scheme.options) or "none"
    for name, value in options.items():
        if name in scheme.options:
            continue
        if SECRET_NAME.search(name):
            raise SettingError(
                f"option {name}", "***", "secrets in the environment or in a file (option credentials)"
            )
        raise SettingError(f"option {name}", value, f"one of this scheme's options: {names}")


def key_part(name: str) -> int | None:
    """What a file or option called `name` holds of keys of S3 or OSS: 0 the id, 1 the secret, 2 the token."""
    plain = name.lower().replace("_", "").replace("-", "").replace(".", "")
    for vendor in _VENDORS:
        plain = plain.removeprefix(vendor)
    return _PARTS.get(plain)


class Options:
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


def bucket_of(uri: str, scheme: str) -> tuple[str, str]:
    """Bucket and prefix, which is empty or ends in "/". What follows the bucket is taken as it
    stands: it is a key, not a URL's path, so `%41` is three characters."""
    rest = uri[len(scheme) + 3 :]
    name, _, path = rest.partition("/")
    if "@" in name or ":" in name:
        raise SettingError("URI", shown(uri), f"{scheme}://bucket/prefix; credentials are not part of a URI")
    for mark, what in (("?", "query"), ("#", "fragment")):
        if mark in rest:
            raise SettingError("URI", shown(uri), f"{scheme}://bucket/prefix without a {what}; use options")
    if not name:
        raise SettingError("URI", uri, f"{scheme}://bucket/prefix, with a bucket")
    if not _BUCKET.match(name) or ".." in name or _IPV4.match(name):
        raise SettingError(
            "URI", uri, "a bucket name of 3 to 255 letters, digits, dots, hyphens and underscores"
        )
    return name, path if path.endswith("/") or not path else path + "/"


def endpoint_of(name: str, url: str) -> str:
    """`url` in the one form in which it is part of identities."""
    expected = "a URL such as https://store.example:9000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SettingError(name, shown(url), expected) from error
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not _HOST.match(host):
        raise SettingError(name, shown(url), expected)
    if "@" in parts.netloc:
        raise SettingError(name, shown(url), f"{expected}; credentials are not part of a URL")
    if parts.query or parts.fragment or parts.path.rstrip("/"):
        raise SettingError(name, shown(url), f"{expected}, without path and query")
    host = f"[{host}]" if ":" in host else host
    default = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, default) else "")
