"""Keys that are good now: found, looked up again, renewed."""

import json
import os
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from datacache.clock import VirtualClock
from datacache.config.settings import SourceSettings
from datacache.errors import Denied, Unavailable
from datacache.model import ByteRange, MountPoint, ObjectInfo, Version
from datacache.sources.aws import PATIENCE, RECHECK, RECHECK_FILE, Bucket, Credentials
from datacache.sources.keyfile import Keys
from datacache.sources.opening import open_raw
from tests.conftest import AnnouncedLogs
from tests.support.stub import Answer, Request, StubServer, always

NOTHING = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
           "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip


def credentials(
    environment: dict[str, str], clock: VirtualClock, *, profile: str = "", keyfile: str = ""
) -> Credentials:
    bucket = Bucket(
        scheme="s3", name="b", environment=NOTHING | environment, profile=profile, keyfile=keyfile
    )
    return Credentials(bucket, clock=clock)


def test_the_environment_holds_keys(clock: VirtualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three variables of the mapping are the keys; those of the process are not."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "process")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "process")
    found = credentials(
        {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "S", "AWS_SESSION_TOKEN": "T"}, clock
    )
    assert found.get() == Keys("A", "S", "T")
    assert "keys of A" in repr(found)
    with pytest.raises(Denied, match="no credentials were found"):
        credentials({}, clock).get()


def test_no_credentials_are_looked_for_again_after_a_while(clock: VirtualClock, tmp_path: Path) -> None:
    """A failure is remembered for seconds, not for ever; while it is, nobody looks."""
    file = tmp_path / "credentials"
    found = credentials({"AWS_SHARED_CREDENTIALS_FILE": str(file)}, clock)
    with pytest.raises(Denied):
        found.get()
    file.write_text("[default]\naws_access_key_id=A\naws_secret_access_key=S\n")
    with pytest.raises(Denied):
        found.get()
    clock.advance(PATIENCE)
    assert found.get() == Keys("A", "S")


def test_the_shared_files_are_looked_up_again(clock: VirtualClock, tmp_path: Path) -> None:
    """A rotated profile is noticed within five minutes."""
    file = tmp_path / "credentials"

    def write(name: str) -> None:
        file.write_text(f"[lab]\naws_access_key_id={name}\naws_secret_access_key=S\n")

    write("A")
    for found in (
        credentials({"AWS_SHARED_CREDENTIALS_FILE": str(file)}, clock, profile="lab"),
        credentials({"AWS_SHARED_CREDENTIALS_FILE": str(file), "AWS_PROFILE": "lab"}, clock),
    ):
        write("A")
        assert found.get().access_key == "A"
        write("B")
        assert found.get().access_key == "A"
        clock.advance(RECHECK)
        assert found.get().access_key == "B"


def test_a_mounted_file_is_looked_at_every_few_seconds(clock: VirtualClock, tmp_path: Path) -> None:
    """A mounted Secret's rotation is noticed in seconds; nothing else is asked."""
    file = tmp_path / "keys"
    file.write_text("[default]\naccess_key=A\nsecret_key=S\n")
    found = credentials({"AWS_ACCESS_KEY_ID": "E", "AWS_SECRET_ACCESS_KEY": "E"}, clock, keyfile=str(file))
    assert found.get() == Keys("A", "S")
    file.write_text("[default]\naccess_key=B\nsecret_key=T\n")
    clock.advance(RECHECK_FILE)
    assert found.get() == Keys("B", "T")


def test_what_cannot_be_renewed_is_used_on(clock: VirtualClock, tmp_path: Path, logs: AnnouncedLogs) -> None:
    """A file that vanishes for a moment costs no read: the keys we have may be good for long."""
    logs.expect("could not be renewed")
    file = tmp_path / "keys"
    file.write_text("[default]\naccess_key=A\nsecret_key=S\n")
    found = credentials({}, clock, keyfile=str(file))
    assert found.get() == Keys("A", "S")
    file.unlink()
    clock.advance(RECHECK_FILE)
    assert found.get() == Keys("A", "S")
    assert len(logs.messages()) == 1
    file.write_text("[default]\naccess_key=B\nsecret_key=S\n")
    clock.advance(PATIENCE)
    assert found.get() == Keys("B", "S")


def identity(number: int, *, lifetime: float) -> Answer:
    """STS's answer to AssumeRoleWithWebIdentity."""
    until = (datetime.now(UTC) + timedelta(seconds=lifetime)).strftime("%Y-%m-%dT%H:%M:%SZ")
    body = (
        '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
        "<AssumeRoleWithWebIdentityResult><Credentials>"
        f"<AccessKeyId>A{number}</AccessKeyId><SecretAccessKey>S{number}</SecretAccessKey>"
        f"<SessionToken>T{number}</SessionToken><Expiration>{until}</Expiration>"
        "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
    )
    return Answer(200, body.encode(), {"Content-Type": "text/xml"})


class Sts:
    """A token service: the n-th call gives the n-th keys. `lifetime` is that of each."""

    def __init__(self) -> None:
        self.lifetime = 3600.0
        self.tokens: list[str] = []
        self.refusal: Answer | None = None

    def __call__(self, request: Request) -> Answer:
        if self.refusal is not None:
            return self.refusal
        form = parse_qs(request.body.decode())
        assert form["Action"] == ["AssumeRoleWithWebIdentity"]
        assert form["RoleArn"] == ["arn:aws:iam::1:role/reader"]
        self.tokens += form["WebIdentityToken"]
        return identity(len(self.tokens), lifetime=self.lifetime)


def web_identity(url: str, token: Path) -> dict[str, str]:
    return {"AWS_WEB_IDENTITY_TOKEN_FILE": str(token), "AWS_ROLE_ARN": "arn:aws:iam::1:role/reader",
            "AWS_ENDPOINT_URL_STS": url, "AWS_REGION": "us-east-1"}  # fmt: skip


def test_a_web_identity_becomes_keys_that_are_renewed(clock: VirtualClock, tmp_path: Path) -> None:
    """The token file of a pod is exchanged for keys; before they run out, its present content is
    exchanged again."""
    token, sts = tmp_path / "token", Sts()
    token.write_text("token one")
    with StubServer(sts) as server:
        found = credentials(web_identity(server.url, token), clock)
        assert found.get() == Keys("A1", "S1", "T1")
        clock.advance(RECHECK)  # they are good for an hour: nobody asks
        assert found.get() == Keys("A1", "S1", "T1")
        assert sts.tokens == ["token one"]
        sts.lifetime = 60.0  # within botocore's window of renewal from the start
        token.write_text("token two")
        assert found.renew(Keys("A1", "S1", "T1")) == Keys("A2", "S2", "T2")
        clock.advance(RECHECK_FILE)
        token.write_text("token three")
        assert found.get() == Keys("A3", "S3", "T3")
        assert sts.tokens == ["token one", "token two", "token three"]


@pytest.mark.parametrize("key", ["key", "odd//key"])
def test_reads_are_signed_with_renewed_keys_before_the_old_ones_expire(
    clock: VirtualClock, tmp_path: Path, key: str
) -> None:
    """ "Renewed before they expire, on reads too": the store never has to refuse one, whichever client
    reads."""
    token, sts = tmp_path / "token", Sts()
    token.write_text("token")
    sts.lifetime = 60.0
    info = ObjectInfo(key, 4, Version('"tag"'))
    with StubServer(sts) as service, StubServer(always(Answer(200, b"data", {"ETag": '"tag"'}))) as store:
        mount = MountPoint("s3://bucket", options={"endpoint": store.url})
        environment = NOTHING | web_identity(service.url, token)
        with closing(
            open_raw(mount, settings=SourceSettings(), environment=environment, clock=clock)
        ) as source:
            for number in (1, 2):
                assert bytes(source.read(info, ByteRange(0, 4))) == b"data"
                assert f"Credential=A{number}/" in store.requests[-1].headers["authorization"]
                assert store.requests[-1].headers["x-amz-security-token"] == f"T{number}"
                clock.advance(RECHECK_FILE)
        assert len(store.requests) == 2


def test_many_refusals_are_one_renewal(clock: VirtualClock, tmp_path: Path) -> None:
    """64 readers that are told that their token has run out ask for one new one."""
    token, sts = tmp_path / "token", Sts()
    token.write_text("token one")
    with StubServer(sts) as server:
        found = credentials(web_identity(server.url, token), clock)
        old = found.get()
        new = {found.renew(old) for _ in range(64)}
        assert new == {Keys("A2", "S2", "T2")}
        assert found.renew(Keys("A2", "S2", "T2")) == Keys("A2", "S2", "T2")  # just renewed: not again
        clock.advance(PATIENCE)
        assert found.renew(Keys("A2", "S2", "T2")) == Keys("A3", "S3", "T3")


def test_a_token_service_that_fails_is_unavailable_or_a_denial(clock: VirtualClock, tmp_path: Path) -> None:
    """Trouble may pass and is tried again by `steady`; a refusal is not."""
    token, sts = tmp_path / "token", Sts()
    token.write_text("token one")
    with StubServer(sts) as server:
        found = credentials(web_identity(server.url, token), clock)
        sts.refusal = Answer(503, b"<ErrorResponse/>")
        with pytest.raises(Unavailable, match="service that issues credentials failed"):
            found.get()
        sts.refusal = Answer(403, b"<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>")
        clock.advance(PATIENCE)
        with pytest.raises(Denied, match="AccessDenied"):
            found.get()
        sts.refusal = None
        clock.advance(PATIENCE)
        assert found.get() == Keys("A1", "S1", "T1")
    gone = credentials(web_identity("http://127.0.0.1:9", token), clock)
    with pytest.raises(Unavailable, match="cannot be reached"):
        gone.get()
    with pytest.raises(Unavailable, match="cannot be reached"):
        gone.renew(Keys("A1", "S1", "T1"))


def test_a_pod_identity_agent_gives_keys(clock: VirtualClock, tmp_path: Path) -> None:
    """AWS_CONTAINER_CREDENTIALS_FULL_URI, with its token in a file, is asked."""
    (tmp_path / "token").write_text("ticket")
    until = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    body = json.dumps({"AccessKeyId": "A", "SecretAccessKey": "S", "Token": "T", "Expiration": until})
    with StubServer(always(Answer(200, body.encode(), {"Content-Type": "application/json"}))) as server:
        found = credentials(
            {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{server.url}/v1/credentials",
             "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(tmp_path / "token")}, clock,
        )  # fmt: skip
        assert found.get() == Keys("A", "S", "T")
        assert server.requests[0].headers["authorization"] == "ticket"


def test_half_of_the_keys_are_a_denial(clock: VirtualClock) -> None:
    """An access key without its secret is a mistake that is named."""
    with pytest.raises(Denied, match="AWS_SECRET_ACCESS_KEY"):
        credentials({"AWS_ACCESS_KEY_ID": "A"}, clock).get()
