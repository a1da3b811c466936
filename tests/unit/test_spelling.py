"""Settings spelled as their user would: nothing is left out, and what is read of it is the same again."""

from typing import Any

import pytest

from datacache.config.keys import KEYS
from datacache.config.parsing import read_settings
from datacache.config.settings import Settings
from datacache.config.spelling import KEPT, differing, spelled
from datacache.errors import MountError, SettingError
from fuse.broker import _check_upgrade

SECRET = "wJalrXUtnFEMI"
HOME = {"HOME": "/home/me", "AWS_SECRET_ACCESS_KEY": SECRET}

SAMPLES = """
name=mine
endpoint=http://127.0.0.1:9000
region=eu-west-1
profile=training
anonymous=true
path-style=true
option=requester_pays=true
timeout=7s
stall-timeout=500ms
connect-timeout=7s
backoff=50ms
backoff-max=7s
breaker-probe=7s
cache=mem:/dev/shm/x=4GiB,high=0.9; ssd:/var/cache/x
cache=ssd:/x=4GiB,high=0.9,low=0.5
policy=lru
placement=sink
reserve=0.2
expire=60s
priority=-3
block-size=1MiB
fill=range
concurrency=7
readahead=1GiB
memory=100MiB
order-ahead=7
consistency=immutable
ttl=inf
strict=true
snapshot=one
rw=true
landing=/l rw=true
durability=fsync rw=true
conflict=fail rw=true
landing-reserve=0.02 rw=true
landing-high=0.91 rw=true
landing-low=0.5 rw=true
upload-mode=sync rw=true
upload-timeout=7s rw=true
upload-open-after=7s rw=true
upload-order=closes rw=true
upload-delay=7s rw=true
upload-bandwidth=1MiB rw=true
upload-concurrency=7 rw=true
directory=/mnt/other
driver=native
io=served
uid=1234
gid=1234
file-mode=0440
dir-mode=0550
allow-other=true
entry-timeout=7s
attr-timeout=0s
negative-timeout=7s
read-ahead=128KiB
max-threads=77
max-idle-threads=7
processes=0
max-tasks=77
min-tasks=7
metadata-entries=7
xattr=true
state=/st
object=default/images
manifest-schemes=s3,https
metrics=127.0.0.1:9300
listen=127.0.0.1:9301
token-file=/t listen=127.0.0.1:9301
tls-cert=/c listen=127.0.0.1:9301 tls-key=/k
tls-key=/k listen=127.0.0.1:9301 tls-cert=/c
log-level=debug
log-format=json
log-file=/log
manifest=https://host/list.jsonl
uri=s3://other
uri=s3://bucket=/train
"""
"""Of each key a value, as it is spelled; behind it what it needs beside it."""


def read(given: dict[str, Any]) -> Settings:
    flags: dict[str, Any] = {"uri": ["s3://bucket"], "name": "data", "directory": "/mnt/x", **given}
    if "manifest" in given:
        del flags["uri"]
    for name in flags.keys() & {"uri", "cache", "option"}:
        flags[name] = flags[name] if isinstance(flags[name], list) else flags[name].split("; ")
    return read_settings(flags, config_file=None, environment=HOME)


def parsed(sample: str) -> tuple[str, str, dict[str, str], dict[str, str]]:
    """A key, its value, the settings without it, and with it."""
    first, *beside = sample.replace("; ", ";").split()
    key, _, text = first.replace(";", "; ").partition("=")
    common = dict(word.split("=", 1) for word in beside)
    if key in ("tls-cert", "tls-key"):  # neither goes without the other
        common = {"listen": common["listen"], "tls-cert": "/c", "tls-key": "/k"}
        return key, f"{text}2", common, {**common, key: f"{text}2"}
    return key, text, common, {**common, key: text}


@pytest.mark.parametrize("sample", SAMPLES.split("\n")[1:-1])
def test_a_value_is_spelled_as_it_was_given(sample: str) -> None:
    """And what differs in it is said."""
    key, text, without, given = parsed(sample)
    now, then = spelled(read(without)), spelled(read(given))
    assert then[key] == text
    assert differing(now, then)[key] == (now[key], text)
    assert key in differing(then, now)
    assert not differing(then, then)


def test_every_key_is_spelled() -> None:
    """`mounts` is `uri` in a file."""
    sampled = {sample.partition("=")[0] for sample in SAMPLES.split()}
    assert not KEYS.keys() - sampled - {"mounts"}, "a key without a line in SAMPLES"
    assert spelled(read({})).keys() == KEYS.keys() - {"mounts"}


@pytest.mark.parametrize("sample", SAMPLES.split("\n")[1:-1])
def test_what_is_kept_is_what_no_upgrade_changes(sample: str) -> None:
    """The page says it, `mount` says it before anybody tries, and the broker refuses it."""
    _, _, without, given = parsed(sample)
    now, then = read(without), read(given)
    refused = False
    try:
        _check_upgrade(now, then)
    except MountError:
        refused = True
    except SettingError:
        pass  # no mount of its kind could have it
    assert refused == bool(differing(spelled(now), spelled(then)).keys() & KEPT)


def test_the_options_of_several_mount_points() -> None:
    """Once where they are the same, else in the order of the mount points."""
    there = spelled(read({"uri": ["s3://a=/a", "s3://b=/b"], "endpoint": "http://h:1"}))
    assert there["uri"] == "s3://a=/a; s3://b=/b"
    assert there["endpoint"] == "http://h:1"
    mixed = spelled(read({"uri": ["s3://a=/a", "https://h/b=/b"], "endpoint": "http://h:1"}))
    assert mixed["endpoint"] == "http://h:1 | "


def test_no_secret_is_spelled() -> None:
    """They are in the environment, which is nobody's to see."""
    settings = read({})
    assert SECRET in settings.environment.values()
    assert SECRET not in repr(spelled(settings))


def test_what_another_version_does_not_know_is_passed_over() -> None:
    """A mount of an older daemon has none of the newest settings."""
    assert differing({"ttl": "60s"}, {"ttl": "60s", "new": "x"}) == {}
    assert differing({"ttl": "60s", "gone": "x"}, {"ttl": "5s"}) == {"ttl": ("60s", "5s")}
