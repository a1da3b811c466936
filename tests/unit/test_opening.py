"""From a URI and its options to a source."""

import contextlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from datacache.clock import VirtualClock
from datacache.config.keys import applicable
from datacache.config.schemes import SCHEMES
from datacache.config.settings import SourceSettings
from datacache.errors import SettingError, SourceError
from datacache.model import ByteRange, MountPoint, ObjectInfo, Version
from datacache.sources.checked import CheckedSource
from datacache.sources.local import LocalSource
from datacache.sources.opening import check_mount, open_raw, open_sink, open_source
from datacache.sources.source import Source
from datacache.sources.steady import SteadySource
from tests.support.stub import Answer, Request, StubServer, always
from tests.unit.test_credentials import identity

NOTHING = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}


def opened(uri: str, environment: dict[str, str] | None = None, **options: str) -> Source:
    mount = MountPoint(uri, options=options)
    return open_raw(
        mount, settings=SourceSettings(), environment=NOTHING | (environment or {}), clock=VirtualClock()
    )


def uri_of(uri: str, environment: dict[str, str] | None = None, **options: str) -> str:
    source = opened(uri, environment, **options)
    source.close()
    return source.uri


def refused(uri: str, environment: dict[str, str] | None = None, **options: str) -> SettingError:
    with pytest.raises(SettingError) as caught:
        check_mount(MountPoint(uri, options=options), NOTHING | (environment or {}))
    return caught.value


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("bucket/prefix", "a URI such as s3://"),
        ("", "a URI such as s3://"),
        ("s3:/bucket", "a URI such as s3://"),
        ("s3://", "with a bucket"),
        ("s3:///prefix", "with a bucket"),
        ("s3://ab", "a bucket name of 3"),
        ("s3://-bucket", "a bucket name of 3"),
        ("s3://buc..ket", "a bucket name of 3"),
        ("s3://buck et/x", "a bucket name of 3"),
        ("s3://127.0.0.1/x", "a bucket name of 3"),
        ("s3://user@bucket/x", "credentials are not part of a URI"),
        ("s3://bucket:80/x", "credentials are not part of a URI"),
        ("s3://bucket/x?versionId=1", "without a query"),
        ("s3://bucket/x#y", "without a fragment"),
        ("oss://bucket/x", "such as https://oss-cn-hangzhou.aliyuncs.com"),
        ("az://container/x", "the storage account"),
        ("gs://", "with a bucket"),
        ("http://", "https://host/path"),
        ("http://u:p@host/x", "credentials are not part of a URI"),
        ("http://host/x?y", "no query"),
        ("http://host:port/x", "a URL such as"),
        ("http://[host/x", "a URL such as"),
        ("file://relative/path", "file:///absolute/path"),
        ("gopher://x/y", "a scheme that is known here"),
        ("dropbox://x/y", "whose package is installed"),
    ],
)
def test_a_wrong_uri_is_refused_with_what_would_be_right(uri: str, expected: str) -> None:
    """Each mistake in a URI has its sentence, before anything is started."""
    error = refused(uri)
    assert expected in str(error)


@pytest.mark.parametrize(
    ("uri", "options", "named", "expected"),
    [
        ("s3://bucket", {"color": "red"}, "option color", "endpoint, region, style"),
        ("file:///tmp", {"region": "x"}, "option region", "inside"),
        ("s3://bucket", {"anonymous": "maybe"}, "option anonymous", "true or false"),
        ("s3://bucket", {"style": "dns"}, "option style", "path or virtual or cname"),
        ("s3://bucket", {"style": "cname"}, "option style", "an option endpoint"),
        ("s3://bucket", {"region": " "}, "option region", "a value"),
        ("s3://bucket", {"endpoint": "minio:9000"}, "option endpoint", "a URL such as"),
        ("s3://bucket", {"endpoint": "ftp://minio"}, "option endpoint", "a URL such as"),
        ("s3://bucket", {"endpoint": "http://minio:http"}, "option endpoint", "a URL such as"),
        ("s3://bucket", {"endpoint": "http://minio/path"}, "option endpoint", "without path"),
        ("s3://bucket", {"credentials": "/no/such/file"}, "option credentials", "file or directory"),
        ("s3://bucket", {"ca_bundle": "/no/such/file"}, "option ca_bundle", "a file that exists"),
        ("s3://bucket", {"profile": "nobody"}, "profile", "a profile of the shared AWS configuration"),
        ("oss://bucket", {"endpoint": "oss-x.aliyuncs.com", "client": "x"}, "option client", "s3 or ossfs"),
        ("gs://bucket", {"credentials": "/no/such/file"}, "option credentials", "a file that exists"),
        ("az://bucket", {"account": "a", "endpoint": "blob"}, "option endpoint", "a URL such as"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_by_name(
    uri: str, options: dict[str, str], named: str, expected: str
) -> None:
    """The error names the option, its value and what it may be."""
    error = refused(uri, **options)
    assert error.name == named
    assert expected in str(error)


def test_wrong_variables_are_refused_by_name(tmp_path: Path) -> None:
    """What the environment says is checked like an option."""
    assert refused("s3://bucket", {"AWS_CA_BUNDLE": "/no/such"}).name == "AWS_CA_BUNDLE"
    assert refused("s3://bucket", {"AWS_PROFILE": "nobody"}).value == "nobody"
    assert refused("s3://bucket", {"AWS_ENDPOINT_URL": "minio"}).name == "AWS_ENDPOINT_URL"
    assert refused("s3://bucket", {"AWS_ENDPOINT_URL_S3": "minio"}).name == "AWS_ENDPOINT_URL_S3"
    assert refused("s3://bucket", {"AWS_REGION": "eu west"}).name == "region"
    assert refused("oss://bucket", {"OSS_ENDPOINT": "https://a b"}).name == "OSS_ENDPOINT"
    assert (
        refused("gs://bucket", {"GOOGLE_APPLICATION_CREDENTIALS": "/no"}).name
        == "GOOGLE_APPLICATION_CREDENTIALS"
    )
    (tmp_path / "config").write_text("not an [ini")
    assert "AWS configuration" in str(refused("s3://bucket", {"AWS_CONFIG_FILE": str(tmp_path / "config")}))


@pytest.mark.parametrize(
    "name", ["aws_secret_access_key", "secret", "aws_access_key_id", "token", "password", "key"]
)
def test_secrets_are_no_options(name: str) -> None:
    """A secret given as an option is refused without being shown."""
    error = refused("s3://bucket", **{name: "hush"})
    assert "hush" not in str(error)
    assert "environment or in a file" in str(error)


def test_secrets_are_no_options_of_fsspec_either(tmp_path: Path) -> None:
    """They would show in the status; a word or the name of a file is no secret."""
    error = refused("memory://x", password="hush")
    assert "hush" not in str(error)
    assert "FSSPEC_<SCHEME>_PASSWORD" in str(error)
    (tmp_path / "token").touch()
    for token in ("anon", str(tmp_path / "token")):
        check_mount(MountPoint("memory://x", options={"token": token}), {})


def test_a_secret_in_a_uri_is_not_shown() -> None:
    """What stands before an @ or after a ? may be a secret."""
    for uri in ("s3://AKIA:hush@bucket/x", "http://u:hush@h/x", "s3://bucket/x?sig=hush", "AKIA:hush"):
        if "://" in uri:
            assert "hush" not in str(refused(uri))
    assert "hush" not in str(refused("s3://bucket", endpoint="http://u:hush@minio"))


def test_the_uri_of_a_source_is_canonical() -> None:
    """The same objects have the same identity however they were written; other stores have another."""
    minio = {"endpoint": "http://MinIO:9000/"}
    assert uri_of("s3://bucket") == uri_of("s3://bucket/") == "s3://bucket"
    assert uri_of("s3://bucket/a/b/") == uri_of("S3://bucket/a/b") == "s3://bucket/a/b"
    assert uri_of("s3://bucket/a//") == "s3://bucket/a/"
    assert uri_of("s3://bucket/x", **minio) == "s3://bucket/x?endpoint=http://minio:9000"
    assert uri_of("s3://bucket/x", endpoint="https://store:443") == "s3://bucket/x?endpoint=https://store"
    assert uri_of("gs://bucket/x") == "gs://bucket/x"
    assert uri_of("gs://bucket/x", **minio) == "gs://bucket/x?endpoint=http://minio:9000"
    assert uri_of("az://box/x", account="me") == "az://box/x?account=me"
    assert uri_of("http://Host:80/a/") == "http://host/a"


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({"AWS_ENDPOINT_URL": "http://one:1"}, "http://one:1"),
        ({"AWS_ENDPOINT_URL": "http://one:1", "AWS_ENDPOINT_URL_S3": "http://two:2/"}, "http://two:2"),
        ({"AWS_ENDPOINT_URL": "http://one:1", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, ""),
        ({"AWS_PROFILE": "lab"}, "http://lab:3"),
        ({"AWS_PROFILE": "rack"}, "http://rack:4"),
    ],
)
def test_the_endpoint_comes_from_where_aws_tools_look(
    tmp_path: Path, environment: dict[str, str], endpoint: str
) -> None:
    """Variable of the service, variable of all, profile's service, profile: as the AWS command line."""
    config = tmp_path / "config"
    config.write_text(
        "[profile lab]\nendpoint_url = http://lab:3\n"
        "[profile rack]\nservices = mine\n[services mine]\ns3 =\n  endpoint_url = http://rack:4\n"
    )
    environment = environment | {"AWS_CONFIG_FILE": str(config)}
    assert uri_of("s3://bucket", environment) == "s3://bucket" + (f"?endpoint={endpoint}" if endpoint else "")
    assert uri_of("s3://bucket", environment, endpoint="http://own:5") == "s3://bucket?endpoint=http://own:5"


def bucket_of(uri: str, environment: dict[str, str] | None = None, **options: str) -> Any:
    source = opened(uri, environment, **options)
    source.close()
    return source._bucket  # type: ignore[attr-defined]


def test_region_style_and_trust_come_from_options_variables_and_profile(tmp_path: Path) -> None:
    """An option wins over a variable, a variable over the profile."""
    config, trust = tmp_path / "config", tmp_path / "ca.pem"
    trust.write_text("")
    config.write_text(f"[default]\nregion = r3\nca_bundle = {trust}\ns3 =\n  addressing_style = virtual\n")
    profile = {"AWS_CONFIG_FILE": str(config), "AWS_ENDPOINT_URL": "http://minio"}
    found = bucket_of("s3://bucket", profile)
    assert (found.region, found.style, found.ca_bundle) == ("r3", "virtual", str(trust))
    assert bucket_of("s3://bucket", profile | {"AWS_DEFAULT_REGION": "r2"}).region == "r2"
    assert bucket_of("s3://bucket", profile | {"AWS_DEFAULT_REGION": "r2", "AWS_REGION": "r1"}).region == "r1"
    found = bucket_of("s3://bucket", profile | {"AWS_REGION": "r1"}, region="r0", style="path")
    assert (found.region, found.style) == ("r0", "path")


def test_the_style_fits_the_store() -> None:
    """AWS wants the bucket in the host's name, where the name allows it; other stores may not know it."""
    assert bucket_of("s3://bucket").style == "virtual"
    assert bucket_of("s3://my.bucket").style == "path"
    assert bucket_of("s3://bucket", endpoint="http://minio").style == "path"


def test_oss_is_reached_by_its_s3_endpoint() -> None:
    """Endpoint and region follow from OSS's own names; its keys are its own, AWS's are not shown to it."""
    variables = {"OSS_ENDPOINT": "oss-cn-hangzhou-internal.aliyuncs.com", "OSS_ACCESS_KEY_ID": "A",
                 "OSS_ACCESS_KEY_SECRET": "S", "AWS_ACCESS_KEY_ID": "B", "AWS_PROFILE": "lab"}  # fmt: skip
    found = bucket_of("oss://bucket/x", variables)
    assert found.endpoint == "https://s3.oss-cn-hangzhou-internal.aliyuncs.com"
    assert (found.region, found.style) == ("cn-hangzhou", "virtual")
    assert found.environment["AWS_ACCESS_KEY_ID"] == "A"
    assert "AWS_PROFILE" not in found.environment
    assert found.uri == "oss://bucket/x?endpoint=https://s3.oss-cn-hangzhou-internal.aliyuncs.com"
    own = bucket_of("oss://bucket", endpoint="https://data.example", style="cname", region="oss-cn-beijing")
    assert (own.endpoint, own.region, own.style) == ("https://data.example", "cn-beijing", "cname")


def test_oss_can_go_through_ossfs() -> None:
    """client=ossfs selects the fsspec implementation, with OSS's keys."""
    source = opened(
        "oss://bucket/x", {"OSS_ACCESS_KEY_ID": "A", "OSS_ACCESS_KEY_SECRET": "S"},
        endpoint="https://oss-cn-hangzhou.aliyuncs.com", client="ossfs",
    )  # fmt: skip
    assert type(source).__name__ == "FsspecSource"
    source.close()


def test_azure_takes_its_keys_from_its_variables() -> None:
    """Account and key come from the variables that Azure's tools read."""
    variables = {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_ACCOUNT_KEY": "aHVzaA=="}
    source = opened("az://box/x", variables, endpoint="http://azurite:10000/me")
    assert source.uri == "az://box/x?account=me&endpoint=http://azurite:10000/me"
    assert "aHVzaA" not in repr(source)


def test_what_is_opened_is_checked_and_steady(tmp_path: Path) -> None:
    """Nobody gets a source that believes what it is told or gives up at the first failure."""
    settings, clock = SourceSettings(), VirtualClock()
    mount = MountPoint(f"file://{tmp_path}")
    source = open_source(mount, settings=settings, environment=NOTHING, clock=clock)
    assert isinstance(source, SteadySource)
    assert isinstance(source._inner, CheckedSource)
    source.close()
    raw = open_raw(mount, settings=settings, environment=NOTHING, clock=clock)
    assert isinstance(raw, LocalSource)
    raw.close()


def test_the_process_environment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two data sets in one process may have different environments: only the mapping counts."""
    for name, value in {"AWS_ENDPOINT_URL": "http://x", "AWS_REGION": "x", "AWS_DEFAULT_REGION": "x",
                        "AWS_PROFILE": "x", "AWS_CA_BUNDLE": "/x", "OSS_ENDPOINT": "x"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    found = bucket_of("s3://bucket")
    assert (found.endpoint, found.region, found.ca_bundle) == ("", "", "")
    assert refused("oss://bucket").name == "option endpoint"


def test_every_option_is_documented() -> None:
    """docs/sources.md has each scheme and each of its options."""
    page = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()
    for scheme, meaning in SCHEMES.items():
        assert f"{scheme}://" in page
        assert all(f"`{option}`" in page for option in meaning.options)


ROLE = "arn:aws:iam::123456789012:role/reader"


def test_a_directory_inside_another_is_read_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    whole = str(tmp_path)
    assert uri_of(f"file://{whole}/a", inside=whole) == f"file://{whole}/a"
    assert uri_of(f"file://{whole}", inside=f"{whole}/") == f"file://{whole}"
    linked = opened(f"file://{whole}/link", inside=whole)
    with pytest.raises(SourceError):
        list(linked.list("", recursive=True))
    with pytest.raises(SettingError, match="this can only be read"):
        open_sink(
            MountPoint(f"file://{whole}/a", options={"inside": whole}), SourceSettings(), environment={},
            clock=VirtualClock(),
        )  # fmt: skip
    for inside, uri in ((f"{whole}/a", f"file://{whole}"), ("/claim", "file:///claims/x"),
                        ("/claim", "file:///claim/a/../../etc")):  # fmt: skip
        assert "a directory above" in str(refused(uri, inside=inside))


def test_a_web_identity_of_options_is_the_only_one(tmp_path: Path) -> None:
    """Neither keys nor another role of the environment are shown to that bucket."""
    (token := tmp_path / "token").write_text("of the options")
    asked = []

    def sts(request: Request) -> Answer:
        asked.append(parse_qs(request.body.decode()))
        return identity(1, lifetime=3600)

    with StubServer(sts) as service, StubServer(always(Answer(200, b"data", {"ETag": '"tag"'}))) as store:
        source = opened(
            "s3://bucket", {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "s",
                            "AWS_SESSION_TOKEN": "t", "AWS_REGION": "us-east-1",
                            "AWS_ROLE_ARN": "arn:aws:iam::1:role/other"},
            endpoint=store.url, role_arn=ROLE, web_identity=str(token), sts_endpoint=service.url,
        )  # fmt: skip
        with contextlib.closing(source):
            info = ObjectInfo("key", 4, Version('"tag"'))
            assert bytes(source.read(info, ByteRange(0, 4))) == b"data"
        assert "Credential=A1/" in store.requests[-1].headers["authorization"]
    assert [(form["RoleArn"], form["WebIdentityToken"]) for form in asked] == [([ROLE], ["of the options"])]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"role_arn": ROLE},
            "option web_identity: '' will not do; expected role_arn and web_identity, both or",
        ),
        (
            {"web_identity": "/etc/passwd"},
            "option role_arn: '' will not do; expected role_arn and web_identity",
        ),
        ({"role_arn": ROLE, "web_identity": "/nowhere"}, "option web_identity: '/nowhere' will not do"),
        (
            {"role_arn": ROLE, "web_identity": "/etc/passwd", "anonymous": "true"},
            "expected none, with role_arn",
        ),
        (
            {"role_arn": ROLE, "web_identity": "/etc/passwd", "sts_endpoint": "sts"},
            "option sts_endpoint: 'sts'",
        ),
    ],
)
def test_half_a_web_identity_is_refused(options: dict[str, str], said: str) -> None:
    assert said in str(refused("s3://bucket", **options))


@pytest.mark.parametrize(
    ("uri", "has"),
    [
        ("s3://b", {"credentials", "endpoint", "requester_pays", "nonsense"}),
        ("gs://b", {"credentials", "endpoint", "nonsense"}),
        ("https://h/x", {"nonsense"}),
        ("file:///x", {"nonsense"}),
        ("hf://x", {"credentials", "requester_pays", "nonsense"}),
    ],
)
def test_options_for_many_are_for_those_that_have_them(uri: str, has: set[str]) -> None:
    """What no scheme has stays, so that it is refused by name."""
    options = dict.fromkeys(("credentials", "endpoint", "requester_pays", "nonsense"), "x")
    assert set(applicable(uri, options)) == has
