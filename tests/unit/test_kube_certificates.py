"""Certificates of workers: who is trusted, until when, and that nobody is a stranger while they change."""

import time
from dataclasses import replace
from typing import Any

import pytest

from datacache.clock import VirtualClock
from datacache.errors import Conflicting
from datacache.kube.authority import BELIEVED, Authorities, read_authority
from datacache.kube.certificates import (
    AUTHORITY,
    CERTIFICATE,
    Authority,
    Pair,
    is_good_authority,
    is_good_pair,
    issue,
    make_authority,
)
from datacache.kube.release import Name, Release

NOW = 1_800_000_000.0
NAMES = ["datacache-1.datacache.svc"]
YEAR, SEASON = AUTHORITY.total_seconds(), CERTIFICATE.total_seconds()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return make_authority(NOW)


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return issue(authority, NAMES, NOW)


def test_an_authority_is_renewed_long_before_its_end(authority: Authority) -> None:
    assert is_good_authority(authority, NOW) and is_good_authority(authority, NOW + YEAR / 2)
    assert not is_good_authority(authority, NOW + YEAR * 0.67)
    assert not is_good_authority(authority, NOW - 86400), "it has not begun"
    assert not is_good_authority(None, NOW)


def test_a_certificate_ends_before_its_authority(authority: Authority) -> None:
    """One that is issued in the last moment before the authority is renewed."""
    assert YEAR * 2 / 3 + SEASON < YEAR


def test_a_certificate_is_renewed_long_before_its_end(authority: Authority, pair: Pair) -> None:
    assert is_good_pair(pair, authority, NAMES, NOW + SEASON / 2)
    assert not is_good_pair(pair, authority, NAMES, NOW + SEASON * 0.67)
    assert not is_good_pair(pair, authority, ["datacache-2.datacache.svc"], NOW)
    assert not is_good_pair(pair, make_authority(NOW), NAMES, NOW), "another signs by now"
    assert not is_good_pair(None, authority, NAMES, NOW)


def test_what_somebody_changed_is_none(authority: Authority, pair: Pair) -> None:
    other = issue(authority, NAMES, NOW)
    for broken in (replace(pair, key=other.key), replace(pair, key="x"), replace(pair, certificate="x")):
        assert not is_good_pair(broken, authority, NAMES, NOW)
    assert not is_good_authority(replace(authority, pair=Pair(authority.pair.certificate, other.key)), NOW)
    assert not is_good_authority(Authority(Pair("", "")), NOW)


def test_who_was_trusted_is_until_his_authority_ends(authority: Authority) -> None:
    later = NOW + YEAR * 0.7
    second = make_authority(later, authority)
    assert second.trusted(later).count("BEGIN CERTIFICATE") == 2
    assert authority.pair.certificate in second.trusted(later)
    assert authority.pair.certificate not in second.trusted(NOW + YEAR + 1)
    third = make_authority(later, Authority(Pair("broken", "broken")))
    assert third.trusted(later).count("BEGIN CERTIFICATE") == 1


def test_no_key_is_shown(authority: Authority, pair: Pair) -> None:
    assert "PRIVATE" not in repr(authority) + repr(pair)


@pytest.mark.parametrize("secret", [None, {}, {"data": {"ca.crt": "eA=="}}])
def test_a_secret_that_holds_no_authority(secret: object) -> None:
    assert read_authority(secret) is None  # type: ignore[arg-type]


def test_now_is_a_time_at_which_it_works() -> None:
    made = make_authority(time.time())
    assert is_good_pair(issue(made, NAMES, time.time()), made, NAMES, time.time())


# ---- where it is kept ----------------------------------------------------------------------------


class OneSecret:
    """An API with one Secret, which notes what is asked of it. `faster` is somebody else's, who comes between
    a look and a write."""

    def __init__(self) -> None:
        self.secret: dict[str, Any] | None = None
        self.asked: list[str] = []
        self.faster: dict[str, Any] | None = None

    def get(self, name: Name) -> dict[str, Any] | None:
        assert name == Name("v1", "Secret", "datacache", "datacache-ca")
        self.asked.append("get")
        found = self.secret
        if self.faster is not None:
            self.secret, self.faster = self.faster, None
        return found

    def create(self, obj: dict[str, Any]) -> None:
        self.asked.append("create")
        if self.secret is not None:
            raise Conflicting("it is there", status=409)
        self.secret = obj | {"metadata": obj["metadata"] | {"resourceVersion": "1"}}

    def merge(self, name: Name, patch: dict[str, Any]) -> None:
        self.asked.append("merge")
        assert self.secret is not None
        if patch["metadata"]["resourceVersion"] != self.secret["metadata"]["resourceVersion"]:
            raise Conflicting("it has changed", status=409)
        self.secret = self.secret | {"data": patch["data"]}


def kept(api: OneSecret, clock: VirtualClock) -> Authorities:
    return Authorities(api, Release(namespace="datacache", image="x"), clock=clock)  # type: ignore[arg-type]


def test_an_authority_is_made_once_and_believed_for_a_minute() -> None:
    api, clock = OneSecret(), VirtualClock(NOW)
    authorities = kept(api, clock)
    assert authorities.trusted() == "" and "create" not in api.asked, "who only asks makes nothing"
    first = authorities.current()
    assert authorities.trusted() == first.pair.certificate and kept(api, clock).current() == first
    asked = len(api.asked)
    clock.advance(BELIEVED - 1)
    assert authorities.current() == first and len(api.asked) == asked
    clock.advance(1)
    assert authorities.current() == first and api.asked[asked:] == ["get"]


def test_a_renewal_keeps_the_one_before_and_is_made_by_who_signs() -> None:
    api, clock = OneSecret(), VirtualClock(NOW)
    authorities = kept(api, clock)
    first = authorities.current()
    clock.advance(YEAR * 0.7)
    assert authorities.trusted() == first.pair.certificate and api.asked.count("merge") == 0
    second = authorities.current()
    assert second.before == first.pair.certificate != second.pair.certificate
    assert kept(api, clock).current() == second
    assert authorities.trusted().count("BEGIN CERTIFICATE") == 2


def test_who_was_faster_is_believed() -> None:
    clock = VirtualClock(NOW)
    other = OneSecret()
    theirs = kept(other, clock).current()
    api = OneSecret()
    authorities = kept(api, clock)
    assert authorities.trusted() == ""
    api.faster = other.secret
    assert authorities.current() == theirs
