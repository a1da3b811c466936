"""Settings from flags, environment and file: what is right becomes settings, what is wrong one line."""

import enum
import json
import math
import os
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.config.keys import KEYS, SCHEMES_OF, spell_duration, spell_size
from datacache.config.parsing import (
    cache_directory,
    dump_settings,
    load_settings,
    read_settings,
    runtime_directory,
    state_directory,
)
from datacache.config.schemes import SCHEMES
from datacache.config.settings import Consistency, Fill, Placement, Policy, Settings, TierSettings
from datacache.errors import SettingError
from datacache.model import GiB, KiB, Medium, MiB, TiB, parse_duration, parse_size

HOME = {"HOME": "/home/me", "XDG_STATE_HOME": "/st", "XDG_CACHE_HOME": "/ca", "XDG_RUNTIME_DIR": "/ru"}


def read(
    flags: Mapping[str, Any] = types.MappingProxyType({}),
    *,
    file: str | None = None,
    env: Mapping[str, str] = types.MappingProxyType({}),
) -> Settings:
    """Settings of `flags` and a bucket, unless they name what to show themselves."""
    shown = {"uri", "mounts", "manifest"} & set(flags)
    whole = dict(flags) if shown or file or "DATACACHE_URI" in env else {"uri": "s3://b/p", **flags}
    return read_settings(whole, config_file=file, environment={**HOME, **env})


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "datacache.yaml"
    path.write_text(text)
    return str(path)


def test_a_uri_alone_is_enough() -> None:
    """`mount URI DIR` alone has good defaults: a cache, a state directory and a name of its own."""
    settings = read({"uri": ["s3://Bucket/Train/"], "directory": "/mnt/x"})
    assert settings.dataset.mounts[0].uri == "s3://Bucket/Train/"
    assert settings.dataset.name.startswith("bucket-train-")
    assert settings.mount.directory == "/mnt/x"
    assert settings.state == f"/st/datacache/{settings.dataset.name}"
    assert settings.runtime == "/ru/datacache"
    (tier,) = settings.cache.tiers
    assert tier == TierSettings(Medium.SSD, f"/ca/datacache/{settings.dataset.name}", 0)


GOOD: list[tuple[dict[str, Any], str, Any]] = [
    ({"ttl": "5m"}, "index.ttl", 300.0),
    ({"ttl": "inf"}, "index.ttl", math.inf),
    ({"ttl": 0}, "index.ttl", 0.0),
    ({"block-size": "64KiB"}, "reading.block_size", 64 * KiB),
    ({"block_size": "64MiB", "memory": "1GiB"}, "reading.block_size", 64 * MiB),
    ({"fill": "range"}, "reading.fill", Fill.RANGE),
    ({"policy": "lru"}, "cache.policy", Policy.LRU),
    ({"placement": "sink"}, "cache.placement", Placement.SINK),
    ({"strict": True}, "index.strict", True),
    ({"strict": "false"}, "index.strict", False),
    ({"file-mode": "640"}, "mount.file_mode", 0o640),
    ({"file-mode": "0o640"}, "mount.file_mode", 0o640),
    ({"dir-mode": "0755"}, "mount.dir_mode", 0o755),
    ({"uid": "root", "gid": "root"}, "mount.uid", 0),
    ({"gid": "1000"}, "mount.gid", 1000),
    ({"metrics": "[::1]:9300"}, "metrics", "[::1]:9300"),
    ({"priority": "-5"}, "cache.priority", -5),
    ({"reserve": ".25"}, "cache.reserve", 0.25),
    ({"log-file": "/var/log//x.log"}, "log_file", "/var/log/x.log"),
    ({"max-tasks": "4"}, "mount.min_tasks", 4),  # a default gives way, what was asked for does not
    ({"snapshot": "v1"}, "index.consistency", Consistency.IMMUTABLE),
    ({"name": "imagenet"}, "dataset.name", "imagenet"),
    ({"state": "/s"}, "state", "/s"),
]


@pytest.mark.parametrize(("flags", "field", "value"), GOOD)
def test_values_are_read(flags: dict[str, Any], field: str, value: Any) -> None:
    """What a user writes becomes the typed field that it names."""
    found: Any = read(flags)
    for step in field.split("."):
        found = getattr(found, step)
    assert found == value
    assert type(found) is type(value)


SIZES = "expected a size, 1 to 1024TiB"
TIER = (
    "expected MEDIUM:/PATH=SIZE[,high=FRACTION][,low=FRACTION], such as mem:/dev/shm/x=4GiB or "
    "ssd:/var/cache/x=200GiB; without =SIZE at most half of the free space"
)
A_URI = "expected a URI such as s3://bucket/prefix, oss://bucket, https://host/data or file:///data"
NO_SECRET = (
    "expected no secret here: secrets come from the environment (AWS_SECRET_ACCESS_KEY, ...), from "
    "a profile (--profile) or from a credentials file"
)
DURATION = "such as 500ms, 60s, 5m"

WRONG: list[tuple[dict[str, Any], str]] = [
    # durations
    ({"ttl": "soon"}, f"--ttl: 'soon' will not do; expected a duration, 0s to inf, {DURATION}"),
    ({"ttl": "-1s"}, f"--ttl: '-1s' will not do; expected a duration, 0s to inf, {DURATION}"),
    ({"ttl": ""}, f"--ttl: '' will not do; expected a duration, 0s to inf, {DURATION}"),
    ({"ttl": "nan"}, f"--ttl: 'nan' will not do; expected a duration, 0s to inf, {DURATION}"),
    ({"timeout": "0s"}, f"--timeout: '0s' will not do; expected a duration, 100ms to 3600s, {DURATION}"),
    ({"timeout": "inf"}, f"--timeout: 'inf' will not do; expected a duration, 100ms to 3600s, {DURATION}"),
    ({"expire": "0"}, f"--expire: '0' will not do; expected a duration, 1s to inf, {DURATION}"),
    ({"backoff": "10s"}, "--backoff: '10s' will not do; expected --backoff of at most backoff-max"),
    ({"backoff-max": "1ms"}, "--backoff-max: '1ms' will not do; expected backoff of at most --backoff-max"),
    # sizes
    ({"block-size": "3MiB"},
     "--block-size: '3MiB' will not do; expected a size that is a power of two, 64KiB to 64MiB"),
    ({"block-size": "32KiB"},
     "--block-size: '32KiB' will not do; expected a size that is a power of two, 64KiB to 64MiB"),
    ({"block-size": "128MiB"},
     "--block-size: '128MiB' will not do; expected a size that is a power of two, 64KiB to 64MiB"),
    ({"memory": "lots"}, "--memory: 'lots' will not do; expected a size, 1MiB to 1TiB"),
    ({"memory": "9" * 5000}, f"--memory: '{'9' * 200}' will not do; expected a size, 1MiB to 1TiB"),
    ({"memory": "9" * 400 + ".5"}, f"--memory: '{'9' * 200}' will not do; expected a size, 1MiB to 1TiB"),
    ({"memory": "4MiB"}, "--memory: '4MiB' will not do; expected --memory of at least two blocks, 8MiB"),
    ({"block-size": "64MiB", "memory": "64MiB"},
     "--memory: '64MiB' will not do; expected --memory of at least two blocks, 128MiB"),
    ({"readahead": "-1"}, "--readahead: '-1' will not do; expected a size, 0 to 16GiB"),
    # numbers
    ({"concurrency": "0"}, "--concurrency: '0' will not do; expected a whole number, 1 to 1024"),
    ({"concurrency": "1025"}, "--concurrency: '1025' will not do; expected a whole number, 1 to 1024"),
    ({"concurrency": "many"}, "--concurrency: 'many' will not do; expected a whole number, 1 to 1024"),
    ({"concurrency": "1e3"}, "--concurrency: '1e3' will not do; expected a whole number, 1 to 1024"),
    ({"concurrency": "٣"}, "--concurrency: '٣' will not do; expected a whole number, 1 to 1024"),
    ({"min-tasks": "65"}, "--min-tasks: 65 will not do; expected at most max-tasks, 64"),
    ({"min-tasks": "9", "max-tasks": "8"}, "--min-tasks: 9 will not do; expected at most --max-tasks, 8"),
    ({"reserve": "1"}, "--reserve: '1' will not do; expected a fraction, 0 to 0.9"),
    ({"reserve": "10%"}, "--reserve: '10%' will not do; expected a fraction, 0 to 0.9"),
    # choices and switches
    ({"policy": "fifo"}, "--policy: 'fifo' will not do; expected keep or lru"),
    ({"placement": "up"}, "--placement: 'up' will not do; expected spill or sink"),
    ({"fill": "BLOCK"}, "--fill: 'BLOCK' will not do; expected block or range"),
    ({"consistency": "strong"}, "--consistency: 'strong' will not do; expected revalidate or immutable"),
    ({"consistency": "revalidate", "snapshot": "v1"},
     "--consistency: 'revalidate' will not do; expected immutable, with --snapshot"),
    ({"strict": "yes"}, "--strict: 'yes' will not do; expected true or false"),
    ({"driver": "fast"}, "--driver: 'fast' will not do; expected auto, native or pyfuse3"),
    ({"io": "direct"}, "--io: 'direct' will not do; expected auto, passthrough, pagecache or served"),
    ({"max-idle-threads": "65"}, "--max-idle-threads: 65 will not do; expected at most max-threads, 64"),
    ({"log-level": "loud"}, "--log-level: 'loud' will not do; expected debug, info, warning or error"),
    ({"log-format": "xml"}, "--log-format: 'xml' will not do; expected text or json"),
    # the mount
    ({"file-mode": "888"},
     "--file-mode: '888' will not do; expected permission bits in octal, such as 0444"),
    ({"file-mode": "4755"},
     "--file-mode: '4755' will not do; expected permission bits in octal, such as 0444"),
    ({"dir-mode": "u+x"},
     "--dir-mode: 'u+x' will not do; expected permission bits in octal, such as 0444"),
    ({"uid": "nobody-of-that-name"},
     "--uid: 'nobody-of-that-name' will not do; expected a user, by number or name"),
    ({"uid": "4294967295"}, "--uid: '4294967295' will not do; expected a user, by number or name"),
    ({"gid": "-1"}, "--gid: '-1' will not do; expected a group, by number or name"),
    ({"directory": "mnt/x"}, "DIR: 'mnt/x' will not do; expected an absolute path"),
    ({"metrics": "9300"}, "--metrics: '9300' will not do; expected HOST:PORT, such as 127.0.0.1:9300"),
    ({"metrics": ":9300"}, "--metrics: ':9300' will not do; expected HOST:PORT, such as 127.0.0.1:9300"),
    ({"metrics": "h:0"}, "--metrics: 'h:0' will not do; expected HOST:PORT, such as 127.0.0.1:9300"),
    ({"metrics": "h:65536"}, "--metrics: 'h:65536' will not do; expected HOST:PORT, such as 127.0.0.1:9300"),
    # tiers
    ({"cache": "4GiB"}, f"--cache: '4GiB' will not do; {TIER}"),
    ({"cache": "ram:/x=4GiB"}, "--cache: medium: 'ram' will not do; expected mem or ssd"),
    ({"cache": "mem:x=4GiB"}, "--cache: path: 'x' will not do; expected an absolute path"),
    ({"cache": "ssd:/=4GiB"}, "--cache: path: '/' will not do; expected a directory of its own"),
    ({"cache": "ssd:/x=0"}, f"--cache: size: '0' will not do; {SIZES}"),
    ({"cache": "ssd:/x="}, f"--cache: size: '' will not do; {SIZES}"),
    ({"cache": "ssd:/x=-4GiB"}, f"--cache: size: '-4GiB' will not do; {SIZES}"),
    ({"cache": "ssd:/x=4GiB,high=1.5"}, "--cache: high: '1.5' will not do; expected a fraction, 0.01 to 1"),
    ({"cache": "ssd:/x=4GiB,low=0"}, "--cache: low: '0' will not do; expected a fraction, 0.01 to 1"),
    ({"cache": "ssd:/x=4GiB,high=0.5,low=0.5"},
     "--cache: low: '0.5' will not do; expected less than high, 0.5"),
    ({"cache": "ssd:/x=4GiB,low=0.99"}, "--cache: low: '0.99' will not do; expected less than high, 0.95"),
    ({"cache": "ssd:/x=4GiB,hgh=0.9"},
     "--cache: 'hgh' will not do; expected medium, path, quota, high, low or mounted"),
    ({"cache": "ssd:/x=4GiB,low=0.1,low=0.2"},
     "--cache: 'ssd:/x=4GiB,low=0.1,low=0.2' will not do; expected low once"),
    ({"cache": ["mem:/x=1GiB", "ssd:/x=2GiB"]},
     "--cache: '/x' will not do; expected a path neither in nor above /x"),
    ({"cache": ["mem:/x=1GiB", "ssd:/x/y=2GiB"]},
     "--cache: '/x/y' will not do; expected a path neither in nor above /x"),
    ({"cache": ["mem:/x/y=1GiB", "ssd:/x/=2GiB"]},
     "--cache: '/x' will not do; expected a path neither in nor above /x/y"),
    # the data set
    ({"uri": []}, "URI: '' will not do; expected what to show, such as s3://bucket/prefix"),
    ({"uri": "bucket/prefix"}, f"URI: 'bucket/prefix' will not do; {A_URI}"),
    ({"uri": "/data"}, f"URI: '/data' will not do; {A_URI}"),
    ({"uri": "s3://"}, f"URI: 's3://' will not do; {A_URI}"),
    ({"uri": "s3:///prefix"}, f"URI: 's3:///prefix' will not do; {A_URI}"),
    ({"uri": "s3://b/\nx"}, f"URI: 's3://b/\\nx' will not do; {A_URI}"),
    ({"uri": "https://me:hunter2@host/x"},
     "URI: 'https://***@host/x' will not do; expected a URI without user, password or signature in it"),
    ({"uri": "https://host/x?X-Amz-Signature=abc"},
     "URI: 'https://host/x?X-Amz-Signature=***' will not do; "
     "expected a URI without user, password or signature in it"),
    ({"uri": ["s3://a/x", "s3://b/y"]},
     "URI: 's3://a/x' will not do; expected URI=/PATH for each of them when there are several"),
    ({"uri": ["s3://a=/x", "s3://b=/x"]}, "URI: '/x' will not do; expected a path neither in nor above /x"),
    ({"uri": ["s3://a=/x", "s3://b=/x/y"]},
     "URI: '/x/y' will not do; expected a path neither in nor above /x"),
    ({"uri": "s3://a=/x/../y"}, "URI: '/x/../y' will not do; expected a path without .."),
    ({"manifest": "list.jsonl"}, f"--manifest: 'list.jsonl' will not do; {A_URI}"),
    ({"manifest": "s3://b/l.jsonl", "uri": "s3://b/p"},
     "--manifest: 's3://b/l.jsonl' will not do; expected either a manifest or URIs, not both"),
    ({"name": "../x"},
     "--name: '../x' will not do; expected letters, digits, dots, dashes and underscores, up to 100, "
     "the first a letter or digit"),
    ({"endpoint": "localhost:9000"},
     "--endpoint: 'localhost:9000' will not do; expected the URL of a store, such as http://127.0.0.1:9000"),
    ({"endpoint": "http://me:hunter2@h:1"},
     "--endpoint: 'http://***@h:1' will not do; expected a URI without user, password or signature in it"),
    ({"region": ""}, "--region: '' will not do; expected the name of a region, such as eu-west-1"),
    ({"region": "eu west"},
     "--region: 'eu west' will not do; expected the name of a region, such as eu-west-1"),
    ({"option": "region"},
     "--option: 'region' will not do; expected KEY=VALUE, an option of the source (docs/sources.md)"),
    ({"option": ["region=a", "region=b"]}, "--option: 'region' will not do; expected each option once"),
    ({"option": "=x"}, "--option: '' will not do; expected the name of an option (docs/sources.md)"),
    ({"option": "secret_access_key=hunter2"}, f"--option: 'secret_access_key' will not do; {NO_SECRET}"),
    ({"option": "aws-session-token=hunter2"}, f"--option: 'aws-session-token' will not do; {NO_SECRET}"),
    ({"option": "account_key=hunter2"}, f"--option: 'account_key' will not do; {NO_SECRET}"),
    # flags that there are not
    ({"tll": "5m"}, "--tll: '5m' will not do; expected a setting that there is; did you mean --ttl?"),
    ({"frobnicate": "5m"},
     "--frobnicate: '5m' will not do; expected a setting that there is (docs/configuration.md)"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "line"), WRONG, ids=[str(flags)[:60] for flags, _ in WRONG])
def test_what_is_wrong_is_one_line(flags: dict[str, Any], line: str) -> None:
    """Every wrong flag gets one line with its name, the value and what would be right."""
    with pytest.raises(SettingError) as caught:
        read(flags)
    assert str(caught.value) == line
    assert "\n" not in line
    assert "hunter2" not in line


WRONG_VARIABLES = [
    ({"DATACACHE_TTL": "soon"},
     f"DATACACHE_TTL: 'soon' will not do; expected a duration, 0s to inf, {DURATION}"),
    ({"DATACACHE_STRICT": "1"}, "DATACACHE_STRICT: '1' will not do; expected true or false"),
    ({"DATACACHE_CACHE": "mem:/a=1GiB; ram:/b=1GiB"},
     "DATACACHE_CACHE: medium: 'ram' will not do; expected mem or ssd"),
    ({"DATACACHE_BLOKC_SIZE": "1MiB"},
     "environment: 'DATACACHE_BLOKC_SIZE' will not do; "
     "expected a setting that there is; did you mean DATACACHE_BLOCK_SIZE?"),
    ({"DATACACHE_RUNTIME": "run"}, "DATACACHE_RUNTIME: 'run' will not do; expected an absolute path"),
    ({"DATACACHE_CONFIG": "/nowhere/x.yaml"},
     "DATACACHE_CONFIG: '/nowhere/x.yaml' will not do; "
     "expected a file that can be read (No such file or directory)"),
]  # fmt: skip


@pytest.mark.parametrize(("env", "line"), WRONG_VARIABLES)
def test_a_wrong_variable_is_one_line(env: dict[str, str], line: str) -> None:
    """Every wrong variable gets one line that names the variable."""
    with pytest.raises(SettingError) as caught:
        read(env=env)
    assert str(caught.value) == line


def test_variables_that_are_not_ours_are_left_alone() -> None:
    """What Kubernetes injects for a service called datacache, and others' variables, mean nothing."""
    env = {
        "DATACACHE_SERVICE_HOST": "10.0.0.1", "DATACACHE_PORT": "tcp://10.0.0.1:80",
        "DATACACHE_METRICS_SERVICE_PORT": "80", "DATACACHE_METRICS_PORT_80_TCP_ADDR": "10.0.0.1",
        "DATACACHE_TOOLS": "/opt",
    }  # fmt: skip
    assert read(env=env) == read()


WRONG_FILES = [
    ("ttl: soon\n", f"ttl in FILE: 'soon' will not do; expected a duration, 0s to inf, {DURATION}"),
    ("strict: yes\n", "strict in FILE: 'yes' will not do; expected true or false"),
    ("ttl: [1s, 2s]\n",
     f"ttl in FILE: ['1s', '2s'] will not do; expected one value: a duration, 0s to inf, {DURATION}"),
    ("consistancy: immutable\n",
     "FILE: 'consistancy' will not do; expected a setting that there is; did you mean consistency?"),
    ("block_size: 1MiB\n",
     "FILE: 'block_size' will not do; expected a setting that there is; did you mean block-size?"),
    ("runtime: /run/x\n",
     "FILE: 'runtime' will not do; expected a setting that there is (docs/configuration.md)"),
    ("secret-access-key: hunter2\n", f"FILE: 'secret-access-key' will not do; {NO_SECRET}"),
    ("option: {password: hunter2}\n", f"option in FILE: 'password' will not do; {NO_SECRET}"),
    ("option: {region: {a: b}}\n",
     "option in FILE: region: {'a': 'b'} will not do; expected one value: a text"),
    ("ttl: 1s\nttl: 2s\n",
     "--config: 'FILE' will not do; expected valid YAML (line 2: the key ttl stands twice)"),
    ("? [a]\n: b\n", "--config: 'FILE' will not do; expected valid YAML (line 1: a key is not a text)"),
    ("ttl: 'x\n",
     "--config: 'FILE' will not do; expected valid YAML (line 2: found unexpected end of stream)"),
    ("- ttl\n", "--config: 'FILE' will not do; expected a mapping of keys to values, such as `ttl: 60s`"),
    ("ttl: 1s\n...\nttl: 2s\n...\n---\nx: 1\n",
     "--config: 'FILE' will not do; expected valid YAML (line 3: expected '<document start>', but found "
     "'<block mapping start>')"),
    ("a: \x07\n", "--config: 'FILE' will not do; expected valid YAML, in UTF-8"),
    ("[" * 5000, "--config: 'FILE' will not do; expected valid YAML, in UTF-8"),
    ("#" * (1 << 20) + "\n", "--config: 'FILE' will not do; expected a datacache.yaml of at most 1MiB"),
    ("mounts: [s3://b]\nuri: s3://b\n",
     "mounts in FILE: '' will not do; expected either it or uri in FILE, not both"),
    ("mounts:\n- path: /x\n", "mounts in FILE: '' will not do; expected a uri in each of them"),
    ("mounts:\n- uri: s3://b\n  pth: /x\n",
     "mounts in FILE: 'pth' will not do; expected uri, path or options"),
    ("mounts:\n- uri: s3://b\n  token: hunter2\n", f"mounts in FILE: 'token' will not do; {NO_SECRET}"),
    ("mounts:\n- uri: s3://b\n  path: x\n", "mounts in FILE: 'x' will not do; expected an absolute path"),
    ("mounts:\n- uri: s3://b\n  options: {secret: hunter2}\n",
     f"options of mounts in FILE: 'secret' will not do; {NO_SECRET}"),
    ("mounts: []\n", "URI: '' will not do; expected what to show, such as s3://bucket/prefix"),
    ("", "URI: '' will not do; expected what to show, such as s3://bucket/prefix"),
    ("uri: s3://b\ncache:\n- {medium: ssd}\n",
     "cache in FILE: {'medium': 'ssd'} will not do; expected a path in each of them"),
    ("uri: s3://b\ncache:\n- {medium: ssd, path: /x, size: 1GiB}\n",
     "cache in FILE: 'size' will not do; expected medium, path, quota, high, low or mounted"),
    ("uri: s3://b\ncache:\n- {medium: ssd, path: /x, quota: [1]}\n",
     f"cache in FILE: size: ['1'] will not do; expected one value: {SIZES.removeprefix('expected ')}"),
    ("uri: s3://b\ncache:\n- [ssd]\n", f"cache in FILE: ['ssd'] will not do; {TIER}"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), WRONG_FILES, ids=[text[:40] for text, _ in WRONG_FILES])
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    """Every wrong key or value of a datacache.yaml gets one line that names it and the file."""
    path = written(tmp_path, text)
    with pytest.raises(SettingError) as caught:
        read(file=path)
    assert str(caught.value) == line.replace("FILE", path)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are refused in one line."""
    path = tmp_path / "x.yaml"
    path.write_bytes(b"ttl: \xff\xfe\n")
    with pytest.raises(SettingError, match="valid YAML, in UTF-8"):
        read(file=str(path))


def test_precedence(tmp_path: Path) -> None:
    """A flag wins over a variable, a variable over the file, the file over the default."""
    path = written(tmp_path, "uri: s3://file\nttl: 1s\nmemory: 1GiB\nconcurrency: 3\n")
    env = {"DATACACHE_CONFIG": path, "DATACACHE_TTL": "2s", "DATACACHE_MEMORY": "2GiB"}
    settings = read({"ttl": "3s"}, file=path, env=env)
    assert settings == read_settings({"ttl": "3s"}, config_file=None, environment={**HOME, **env})
    assert (settings.index.ttl, settings.reading.memory, settings.reading.concurrency) == (3.0, 2 * GiB, 3)
    assert settings.reading.readahead == 64 * MiB
    assert settings.dataset.mounts[0].uri == "s3://file"
    other = read({"uri": "s3://flag"}, file=path)
    assert [mount.uri for mount in other.dataset.mounts] == ["s3://flag"]


def test_a_file_carries_the_names_of_the_flags(tmp_path: Path) -> None:
    """A datacache.yaml says all that flags can, and mounts and tiers as mappings too."""
    path = written(
        tmp_path,
        """
        name: both
        mounts:
        - uri: s3://a/x
          path: /train
          options: {endpoint: "http://minio:9000", requester-pays: true}
        - oss://b/y=/val
        cache:
        - {medium: mem, path: /dev/shm/x, quota: 4GiB, high: 0.9}
        - ssd:/var/cache/x=200GiB,low=0.5
        file-mode: 0440     # octal, as in a shell; YAML 1.1 would make 288 of it
        strict: true
        option: {region: eu-west-1}
        """,
    )
    settings = read(file=path)
    train, val = settings.dataset.mounts
    assert (train.path, val.path) == ("/train", "/val")
    assert train.options == {"endpoint": "http://minio:9000", "requester_pays": "true", "region": "eu-west-1"}
    assert val.options == {"region": "eu-west-1"}
    assert settings.cache.tiers == (
        TierSettings(Medium.MEM, "/dev/shm/x", 4 * GiB, 0.9, 0.85),
        TierSettings(Medium.SSD, "/var/cache/x", 200 * GiB, 0.95, 0.5),
    )
    assert (settings.mount.file_mode, settings.index.strict) == (0o440, True)


TIERS = [
    ("mem:/dev/shm/x=4GiB", TierSettings(Medium.MEM, "/dev/shm/x", 4 * GiB)),
    ("ssd:/a=b,c=d=4GiB", TierSettings(Medium.SSD, "/a=b,c=d", 4 * GiB)),
    ("ssd:/a,high=x=4GiB,high=0.9,low=0.8", TierSettings(Medium.SSD, "/a,high=x", 4 * GiB, 0.9, 0.8)),
    ("ssd:/a//b/=1TiB", TierSettings(Medium.SSD, "/a/b", TiB)),
    ("ssd:/a=1TiB,high=0.5", TierSettings(Medium.SSD, "/a", TiB, 0.5, 0.45)),
    ("ssd:/a", TierSettings(Medium.SSD, "/a", 0)),
    ("ssd:/a:b=4GiB", TierSettings(Medium.SSD, "/a:b", 4 * GiB)),
]


@pytest.mark.parametrize(("text", "tier"), TIERS)
def test_tiers(text: str, tier: TierSettings) -> None:
    """A tier's size and watermarks come last, so its path may hold "=" and ","."""
    assert read({"cache": [text]}).cache.tiers == (tier,)


def test_tiers_that_are_the_same_through_a_link(tmp_path: Path) -> None:
    """Two tiers in one directory are refused, however it is spelled."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(SettingError, match="neither in nor above"):
        read({"cache": [f"ssd:{tmp_path}/real=1GiB", f"ssd:{tmp_path}/link/x=1GiB"]})


MOUNTS = [
    (["s3://a/x=/train", "oss://b/y=/val"], [("s3://a/x", "/train"), ("oss://b/y", "/val")]),
    (["s3://a/date=2024/"], [("s3://a/date=2024/", "/")]),
    (["s3://a/date=/x=/y"], [("s3://a/date=/x", "/y")]),
    (["file:///data=/"], [("file:///data", "/")]),
    (["s3://a=/train//deep/"], [("s3://a", "/train/deep")]),
    (["simplecache::s3://a/x"], [("simplecache::s3://a/x", "/")]),
    ("https://host/data/?list=1", [("https://host/data/?list=1", "/")]),
]


@pytest.mark.parametrize(("uris", "expected"), MOUNTS)
def test_mounts(uris: list[str], expected: list[tuple[str, str]]) -> None:
    """URI=/PATH says where a store appears; the last "=/" counts."""
    mounts = read({"mounts": uris}).dataset.mounts
    assert [(mount.uri, mount.path) for mount in mounts] == expected


def test_flags_of_the_store() -> None:
    """The flags of the store become options of the mount points that know them."""
    flags = {
        "endpoint": "http://h:1", "region": "eu", "profile": "me", "anonymous": True, "path-style": False,
        "option": ["requester-pays=true"],
    }  # fmt: skip
    (alone,) = read(flags).dataset.mounts
    assert alone.options == {
        "endpoint": "http://h:1", "region": "eu", "profile": "me", "anonymous": "true", "style": "virtual",
        "requester_pays": "true",
    }  # fmt: skip
    s3, site = read({"uri": ["s3://a=/a", "https://h/x=/b"], **flags}).dataset.mounts
    assert s3.options == alone.options
    assert site.options == {}
    (other,) = [each for each in read({"uri": ["s3://a=/a", "https://h/x=/b"], "option": ["nonsense=1"]})
                .dataset.mounts if each.path == "/b"]  # fmt: skip
    assert other.options == {"nonsense": "1"}, "what nobody knows is refused, not dropped"
    (misplaced,) = read({"uri": "file:///x", "endpoint": "http://h:1"}).dataset.mounts
    assert misplaced.options == {"endpoint": "http://h:1"}, "alone it is refused by the source, not dropped"
    assert read({"path-style": True}).dataset.mounts[0].options == {"style": "path"}


def test_options_follow_precedence(tmp_path: Path) -> None:
    """A mount point's own option wins over the file's for all; variables and flags win over both."""
    path = written(
        tmp_path,
        "endpoint: http://all:1\nmounts:\n- {uri: s3://a, path: /a, options: {endpoint: 'http://own:1'}}\n"
        "- {uri: s3://b, path: /b}\n",
    )
    own, other = read(file=path).dataset.mounts
    assert (own.options["endpoint"], other.options["endpoint"]) == ("http://own:1", "http://all:1")
    by_variable = read(file=path, env={"DATACACHE_ENDPOINT": "http://won:1"})
    by_flag = read({"endpoint": "http://won:1"}, file=path)
    for mounts in (by_variable.dataset.mounts, by_flag.dataset.mounts):
        assert {mount.options["endpoint"] for mount in mounts} == {"http://won:1"}


def test_the_options_with_flags_are_those_of_the_sources() -> None:
    """Whom a flag of the store means something to is what the sources say."""
    for option, schemes in SCHEMES_OF.items():
        assert set(schemes) == {scheme for scheme, known in SCHEMES.items() if option in known.options}


def test_a_manifest_is_a_data_set() -> None:
    """A manifest stands for its mount points: where it lies is kept, and options for all of them."""
    dataset = read({"manifest": "file:///lists/train.jsonl", "endpoint": "http://h:1"}).dataset
    assert dataset.manifest == "file:///lists/train.jsonl"
    assert dataset.mounts[0].uri == "file:///lists"
    assert dataset.mounts[0].options == {}
    assert dataset.options == {"endpoint": "http://h:1"}
    assert dataset.name.startswith("lists-train-jsonl-")


def test_names_are_stable_and_tell_data_sets_apart() -> None:
    """A derived name is the same in every process, and another one for other data."""
    name = read({"uri": "s3://bucket/train"}).dataset.name
    assert name == "bucket-train-525f2656", "state lies under it: it must never change"
    assert read({"uri": "s3://bucket/train/"}).dataset.name == name
    others = [
        read({"uri": "s3://bucket/train", "endpoint": "http://h:1"}),
        read({"uri": "s3://bucket/train"}, env={"AWS_ENDPOINT_URL": "http://h:1"}),
        read({"uri": "s3://bucket/train=/x"}),
        read({"uri": "s3://bucket/train2"}),
        read({"uri": "gs://bucket/train"}),
        read({"manifest": "s3://bucket/train"}),
    ]
    names = {name, *(settings.dataset.name for settings in others)}
    assert len(names) == len(others), "the endpoint of a flag and that of the environment are one store"
    assert read({"uri": "file:///"}).dataset.name.startswith("dataset-")


def test_the_environment_of_sources() -> None:
    """Sources are handed the variables that are theirs, and no others."""
    kept = {"AWS_SECRET_ACCESS_KEY": "s", "OSS_ENDPOINT": "o", "GOOGLE_APPLICATION_CREDENTIALS": "g",
            "AZURE_CLIENT_ID": "a", "HTTPS_PROXY": "p", "no_proxy": "n", "SSL_CERT_FILE": "c"}  # fmt: skip
    dropped = {"LD_PRELOAD": "x", "DATACACHE_TTL": "1s", "EDITOR": "vi", "MY_AWS_KEY": "k"}
    assert read(env=kept | dropped).environment == kept | {"HOME": "/home/me"}


def test_directories_of_a_user_and_of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """State, cache and runtime lie where the system says; root's daemons outlive root's logins."""
    where = (state_directory, cache_directory, runtime_directory)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    root = ["/var/lib/datacache", "/var/cache/datacache", "/run/datacache"]
    assert [find({}) for find in where] == root
    assert [find({"XDG_RUNTIME_DIR": "/run/user/0"}) for find in where] == root
    assert [find(HOME) for find in where] == ["/st/datacache", "/ca/datacache", "/ru/datacache"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    mine = ["/home/me/.local/state/datacache", "/home/me/.cache/datacache", "/tmp/datacache-1000"]
    assert [find({"HOME": "/home/me", "XDG_CACHE_HOME": "relative"}) for find in where] == mine
    assert runtime_directory({"XDG_RUNTIME_DIR": "/run/user/1000"}) == "/run/user/1000/datacache"
    assert runtime_directory({"DATACACHE_RUNTIME": "/r//x"}) == "/r/x"
    with pytest.raises(SettingError, match=r"HOME: '' will not do; .* or XDG_STATE_HOME"):
        state_directory({})


# ---- to the daemon and back


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type that fields of the settings have."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in fields(kind)})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    if get_origin(kind) is tuple:
        return st.lists(values_of(get_args(kind)[0]), max_size=2).map(tuple)
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of(*(values_of(part) for part in get_args(kind)))
    if get_origin(kind) is Mapping:
        return st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
    plain = {
        int: st.integers(), float: st.floats(allow_nan=False), bool: st.booleans(), type(None): st.none(),
        str: st.text(st.characters(exclude_categories=()), max_size=3),  # lone surrogates: bytes of paths
    }  # fmt: skip
    return plain[kind]


@given(values_of(Settings))
def test_settings_survive_the_pipe(settings: Settings) -> None:
    """Whatever settings there are, the daemon has exactly these."""
    assert load_settings(dump_settings(settings)) == settings


def test_parsed_settings_survive_the_pipe() -> None:
    """Infinity, None, modes and nested tiers come back with their types."""
    settings = read({"ttl": "inf", "cache": ["mem:/x=1GiB", "ssd:/y"], "uid": "0"})
    loaded = load_settings(dump_settings(settings))
    assert loaded == settings
    assert isinstance(loaded.cache.tiers[0].medium, Medium)
    assert isinstance(loaded.dataset.mounts, tuple)
    assert loaded.index.ttl == math.inf
    assert loaded.mount.gid is None


# ---- the table


def settings_fields() -> set[str]:
    """All fields of the settings, as `section.field`."""
    hints, found = get_type_hints(Settings), set()
    for field in fields(Settings):
        kind = hints[field.name]
        nested = is_dataclass(kind) and field.name != "dataset"
        found |= {f"{field.name}.{part.name}" for part in fields(kind)} if nested else {field.name}
    return found


def test_every_setting_can_be_set() -> None:
    """Each field of the settings has a key, but for what is no choice."""
    no_choice = {"environment", "runtime"}
    keys = {key.field for key in KEYS.values()} - {"options"}
    assert keys == settings_fields() - no_choice


@given(st.integers(0, 2**60))
def test_spelled_sizes_are_read_back(count: int) -> None:
    """The text of a size is the size."""
    assert parse_size(spell_size(count), name="") == count


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.25, 1.0, 2.5, 60.0, 86400.0, math.inf])
def test_spelled_durations_are_read_back(seconds: float) -> None:
    """The text of a duration is the duration."""
    assert parse_duration(spell_duration(seconds), name="") == seconds


def test_settings_of_a_newer_release() -> None:
    """A broker looks at those that it knows; a daemon takes none that it does not."""
    settings = read({"ttl": "inf"})
    tree = json.loads(dump_settings(settings))
    tree["brand_new"] = tree["mount"]["brand_new"] = 5
    assert load_settings(json.dumps(tree), newer=True) == settings
    with pytest.raises(KeyError):
        load_settings(json.dumps(tree))
