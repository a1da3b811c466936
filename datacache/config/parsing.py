"""
Settings from flags, the environment and a datacache.yaml. The door to yaml.

`keys.KEYS` is the table of what may be set: `--ttl` as a flag is `DATACACHE_TTL` and `ttl:` in the
file. What is given is collected from the three places, a flag winning over a variable and that over
the file, always with its name as the user wrote it; only then it is read, so whatever is wrong is one
line that the user recognises. Nothing is looked at but the file: no path is made, no store is asked.

Everything arrives as text, in YAML too (`0444` is a mode and no number, `on` is no boolean). Secrets
are refused here, wherever they are given: they come from the environment, profiles and credential
files, which the sources read. `dump_settings` and `load_settings` carry settings to the daemon. What
they write holds the environment, secrets included: it is for a pipe, never for a file or a log.
"""

import enum
import hashlib
import ipaddress
import json
import os
import re
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from datacache.config.keys import (
    BOOLEAN,
    KEYS,
    MEDIUM,
    NAME,
    OPTION,
    PATH,
    PREFIX,
    QUOTA,
    TEXT,
    TIER,
    URI,
    WATERMARK,
    Kind,
    applicable,
    is_credential,
    spell_size,
)
from datacache.config.settings import (
    IO,
    ApiSettings,
    CacheSettings,
    Consistency,
    IndexSettings,
    MountSettings,
    ReadingSettings,
    Settings,
    SourceSettings,
    TierSettings,
    UploadSettings,
    WritingSettings,
)
from datacache.errors import SettingError
from datacache.model import Dataset, Medium, MiB, MountPoint
from datacache.telemetry import redact

MAX_FILE = 1 * MiB
"""Bytes of a datacache.yaml that are read; more is not one."""
MAX_TEXT = 4096
"""Characters of one value: the longest path there is."""

_BY_VARIABLE = {key.variable: key for key in KEYS.values()}
_VARIABLES = [variable.removeprefix(PREFIX) for variable in _BY_VARIABLE]
_OUTSIDE = {f"{PREFIX}CONFIG", f"{PREFIX}RUNTIME"}
"""Variables that are no keys: they say where to look for settings and for running mounts."""

# A Kubernetes service called datacache* puts these into the environment of every pod beside it.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT(_\d+_(TCP|UDP|SCTP).*)?$")

_ON_THE_WAY = re.compile(
    r"(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy|HOME|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE"
)


# ---- reading -------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """A value as text, list or mapping, and its name as the user wrote it."""

    name: str
    value: Any


_WRITES = ("writing.", "upload.")
"""Sections of settings that say how it is written."""


def read_settings(
    flags: Mapping[str, Any], *, config_file: str | None, environment: Mapping[str, str]
) -> Settings:
    """The settings that `flags`, the environment and the file make, in this order of precedence.

    `flags` has the flags that were given, as they were typed, by name (`block_size` or `block-size`).
    Raises SettingError.
    """
    layers = [
        _from_file(config_file, "--config")
        if config_file
        else _from_file(environment.get(f"{PREFIX}CONFIG", ""), f"{PREFIX}CONFIG"),
        _from_environment(environment),
        _from_flags(flags),
    ]
    given: dict[str, _Given] = {}
    for layer in layers:
        if "mounts" in layer and "uri" in layer:
            raise SettingError(layer["mounts"].name, "", f"either it or {layer['uri'].name}, not both")
        if "mounts" in layer or "uri" in layer or "manifest" in layer:  # one data set replaces the other
            for key in ("mounts", "uri", "manifest"):
                given.pop(key, None)
        given |= layer

    values: dict[str, dict[str, Any]] = {"": {}}
    for name, (written, value) in given.items():
        section, _, field = KEYS[name].field.rpartition(".")
        if KEYS[name].field not in ("dataset", "options", "cache.tiers"):
            values.setdefault(section, {})[field] = read_one(KEYS[name].kind, written, value)
    tiers = _tiers(given["cache"]) if "cache" in given else ()
    _check_together(values, given)

    dataset = _dataset(layers, given, environment)
    if not tiers:
        tiers = (TierSettings(Medium.SSD, os.path.join(cache_directory(environment), dataset.name), 0),)
    state = values[""].pop("state", os.path.join(state_directory(environment), dataset.name))
    return Settings(
        dataset=dataset,
        state=state,
        runtime=runtime_directory(environment),
        sources=SourceSettings(**values.get("sources", {})),
        cache=CacheSettings(tiers=tiers, **values.get("cache", {})),
        reading=ReadingSettings(**values.get("reading", {})),
        index=IndexSettings(**values.get("index", {})),
        mount=MountSettings(**values.get("mount", {})),
        writing=WritingSettings(**values.get("writing", {})),
        upload=UploadSettings(**values.get("upload", {})),
        api=ApiSettings(**values.get("api", {})),
        environment={k: v for k, v in environment.items() if is_credential(k) or _ON_THE_WAY.fullmatch(k)},
        **values[""],
    )


def _from_flags(flags: Mapping[str, Any]) -> dict[str, _Given]:
    found = {}
    for flag, value in flags.items():
        name = flag.replace("_", "-")
        written = {"uri": "URI", "mounts": "URI", "directory": "DIR"}.get(name, f"--{name}")
        if name not in KEYS:
            raise SettingError(written, value, _nearest(name, KEYS, "--"))
        found[name] = _Given(written, value)
    return found


def _from_environment(environment: Mapping[str, str]) -> dict[str, _Given]:
    found = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable in _OUTSIDE or _SERVICE_LINK.search(variable):
            continue
        if key := _BY_VARIABLE.get(variable):
            texts = [part.strip() for part in value.split(";") if part.strip()] if key.many else value
            found[key.name] = _Given(variable, texts)
        elif near := get_close_matches(variable.removeprefix(PREFIX), _VARIABLES, n=1, cutoff=0.8):
            # Only what looks like a slip: others may have variables of that beginning too.
            raise SettingError(
                "environment", variable, f"a setting that there is; did you mean {PREFIX}{near[0]}?"
            )
    return found


def _tree(raw: bytes, asked: str, path: str) -> Any:
    """What the YAML `raw` says: all scalars are texts, tags mean nothing, a key stands once."""
    # Here, since a daemon that follows another has no file to read, and is waited for.
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a key is not a text", key.start_mark)
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value} stands twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(raw, Loader)  # noqa: S506  a BaseLoader: it makes texts, lists and mappings
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}: {error.problem})" if mark else ""
        raise SettingError(asked, path, f"valid YAML{where}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingError(asked, path, "valid YAML, in UTF-8") from error


def _from_file(path: str, asked: str) -> dict[str, _Given]:
    """What the file at `path` gives; `asked` is what named it."""
    if not path:
        return {}
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE + 1)
    except OSError as error:
        raise SettingError(asked, path, f"a file that can be read ({error.strerror})") from error
    if len(raw) > MAX_FILE:
        raise SettingError(asked, path, f"a datacache.yaml of at most {spell_size(MAX_FILE)}")
    tree = _tree(raw, asked, path)
    if tree in (None, ""):
        return {}
    if not isinstance(tree, dict):
        raise SettingError(asked, path, "a mapping of keys to values, such as `ttl: 60s`")
    for name in tree:
        if name not in KEYS:
            _refuse_secret(name, path)
            raise SettingError(path, name, _nearest(name, KEYS))
    return {name: _Given(f"{name} in {path}", value) for name, value in tree.items()}


def _nearest(name: str, known: Iterable[str], mark: str = "") -> str:
    near = get_close_matches(name, known, n=1)
    if near:
        return f"a setting that there is; did you mean {mark}{near[0]}?"
    return "a setting that there is (docs/configuration.md)"


def read_one(kind: Kind, name: str, value: object) -> Any:
    """The value of what was given as `name`. Raises SettingError."""
    if isinstance(value, bool):
        value = str(value).lower()
    if not isinstance(value, str | int | float):
        raise SettingError(name, value, f"one value: {kind.expected}")
    text = str(value)
    try:
        if len(text) > MAX_TEXT:
            raise ValueError(f"{len(text)} characters")
        return kind.read(text.strip())
    except (ValueError, KeyError, OverflowError, SettingError) as error:
        raise SettingError(name, redact(text[:200]), kind.expected) from error


def _list(given: _Given) -> list[Any]:
    return list(given.value) if isinstance(given.value, list | tuple) else [given.value]


# ---- secrets -------------------------------------------------------------------------------------

_SECRET = re.compile(
    r"secret|passw|token|signature|private|api_?key|account_?key|access_?key|sas$|^sas|connection_?string",
    re.IGNORECASE,
)


def _refuse_secret(key: str, name: str) -> None:
    if _SECRET.search(key.replace("-", "_")):
        raise SettingError(
            name, key, "no secret here: secrets come from the environment (AWS_SECRET_ACCESS_KEY, ...), from "
            "a profile (--profile) or from a credentials file",
        )  # fmt: skip


def _clean_uri(name: str, value: object) -> str:
    uri: str = read_one(URI, name, value)
    if redact(uri) != uri or re.match(r"[^/]+://[^/]*@", uri):
        hidden = re.sub(r"//[^/]*@", "//***@", redact(uri))
        raise SettingError(name, hidden, "a URI without user, password or signature in it")
    return uri


# ---- the data set --------------------------------------------------------------------------------


def _dataset(
    layers: list[dict[str, _Given]], given: Mapping[str, _Given], environment: Mapping[str, str]
) -> Dataset:
    file, *above = [_options(layer) for layer in layers]
    own: list[tuple[_Given, str, str | None, dict[str, str]]] = []
    manifest = ""
    if "manifest" in given:
        asked = given["manifest"]
        if "uri" in given or "mounts" in given:
            raise SettingError(asked.name, asked.value, "either a manifest or URIs, not both")
        manifest = _clean_uri(*asked)
        # Where the manifest lies is the one mount point until it has been read and says its own.
        own = [(asked, manifest.rpartition("/")[0], "/", {})]
    else:
        source = given.get("mounts") or given.get("uri")
        if source is None or not _list(source):
            raise SettingError("URI", "", "what to show, such as s3://bucket/prefix")
        own = [(_Given(source.name, item), *_mount(source.name, item)) for item in _list(source)]
    if len(own) > 1 and (bare := next((g for g, _, path, _ in own if path is None), None)):
        raise SettingError(bare.name, bare.value, "URI=/PATH for each of them when there are several")
    mounts, everywhere = [], file
    for layer in above:
        everywhere = everywhere | layer
    alone = len(own) == 1 and not manifest  # then what does not suit it is a mistake, and is said
    for _, uri, path, options in own:
        merged = file | options
        for layer in above:
            merged |= layer
        mounts.append(MountPoint(uri, path or "/", merged if alone else options | applicable(uri, merged)))
    _check_paths(mounts, [g for g, *_ in own])
    name = read_one(NAME, *given["name"]) if "name" in given else _derived_name(mounts, manifest, environment)
    return Dataset(name, tuple(mounts), manifest, everywhere if manifest else {})


def _options(layer: Mapping[str, _Given]) -> dict[str, str]:
    """The options of sources that `layer` gives for all mounts."""
    found: dict[str, str] = {}
    if "option" in layer:
        name, value = layer["option"]
        found |= _pairs(name, value)
    for key in ("endpoint", "region", "profile", "anonymous", "path-style"):
        if key not in layer:
            continue
        value = read_one(KEYS[key].kind, *layer[key])
        if key == "endpoint":
            value = _clean_uri(*layer[key])
        if key == "path-style":
            found["style"] = "path" if value else "virtual"
        else:
            found[key] = KEYS[key].kind.show(value)
    return found


def _pairs(name: str, value: Any) -> dict[str, str]:
    """Options from `["k=v", ...]` or from a mapping."""
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        pairs = []
        for item in _list(_Given(name, value)):
            key, equals, text = item.partition("=") if isinstance(item, str) else ("", "", "")
            if not equals:
                raise SettingError(name, item, OPTION.expected)
            pairs.append((key, text))
    found = {}
    for key, text in pairs:
        _refuse_secret(key, name)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,63}", key, re.ASCII):
            raise SettingError(name, key, "the name of an option (docs/sources.md)")
        field = key.replace("-", "_")
        if field in found:
            raise SettingError(name, key, "each option once")
        found[field] = read_one(TEXT, f"{name}: {key}", text)
    return found


def _mount(name: str, item: Any) -> tuple[str, str | None, dict[str, str]]:
    """URI, path and options of one mount point."""
    if isinstance(item, dict):
        for key in item:
            _refuse_secret(key, name)
            if key not in ("uri", "path", "options"):
                raise SettingError(name, key, "uri, path or options")
        if "uri" not in item:
            raise SettingError(name, "", "a uri in each of them")
        path = item.get("path")
        options = _pairs(f"options of {name}", item.get("options") or {})
        return _clean_uri(name, item["uri"]), None if path is None else _shown_at(name, path), options
    if isinstance(item, str) and (match := re.fullmatch(r"(.*[^:/])=(/.*)", item, re.DOTALL)):
        # The last "=/" counts: keys may have some of their own (date=2024/...), and paths may not.
        return _clean_uri(name, match[1]), _shown_at(name, match[2]), {}
    return _clean_uri(name, item), None, {}


def _shown_at(name: str, path: Any) -> str:
    found: str = read_one(PATH, name, path)
    if ".." in str(path).split("/"):
        raise SettingError(name, path, "a path without ..")
    return found


def _check_paths(mounts: list[MountPoint], given: list[_Given]) -> None:
    for i, mount in enumerate(mounts):
        for other in mounts[:i]:
            if _within(mount.path, other.path) or _within(other.path, mount.path):
                raise SettingError(given[i].name, mount.path, f"a path neither in nor above {other.path}")


def _within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _derived_name(mounts: list[MountPoint], manifest: str, environment: Mapping[str, str]) -> str:
    """A name that people can read and that is always the same for the same data: state lies under it."""
    aws = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    identity = [
        (m.uri.rstrip("/"), m.path, m.options.get("endpoint") or (aws if m.uri.startswith("s3:") else ""))
        for m in mounts
    ]
    digest = hashlib.sha256(json.dumps([identity, manifest]).encode()).hexdigest()[:8]
    readable = (manifest or mounts[0].uri).rpartition("://")[2].lower()
    slug = re.sub(r"[^a-z0-9]+", "-", readable).strip("-")[:40].strip("-")
    return f"{slug}-{digest}" if slug else f"dataset-{digest}"


# ---- the tiers -----------------------------------------------------------------------------------

# The size is last, so a path may hold "=" and ",": the shortest path with which the rest makes sense
# is the right one.
_TIER_TEXT = re.compile(r"([^:]*):(.*?)(?:=([^=,/]*)((?:,[a-z]+=[0-9.]*)*))?", re.DOTALL)


def _tiers(given: _Given) -> tuple[TierSettings, ...]:
    found = tuple(_tier(given.name, item) for item in _list(given))
    for i, tier in enumerate(found):
        for other in found[:i]:
            here, there = os.path.realpath(tier.path), os.path.realpath(other.path)
            if _within(here, there) or _within(there, here):
                raise SettingError(given.name, tier.path, f"a path neither in nor above {other.path}")
    return found


def _tier(name: str, item: Any) -> TierSettings:
    if isinstance(item, dict):
        parts = dict(item)
    else:
        match = _TIER_TEXT.fullmatch(item) if isinstance(item, str) else None
        if match is None:
            raise SettingError(name, item, TIER.expected)
        parts = {"medium": match[1], "path": match[2]}
        if match[3] is not None:
            parts["quota"] = match[3]
        for option in (match[4] or "").split(",")[1:]:
            key, _, value = option.partition("=")
            if key in parts:
                raise SettingError(name, item, f"{key} once")
            parts[key] = value
    for key in parts:
        if key not in ("medium", "path", "quota", "high", "low", "mounted"):
            raise SettingError(name, key, "medium, path, quota, high, low or mounted")
    for key in ("medium", "path"):
        if key not in parts:
            raise SettingError(name, item, f"a {key} in each of them")
    path = read_one(PATH, f"{name}: path", parts["path"])
    if path == "/":
        raise SettingError(f"{name}: path", path, "a directory of its own")
    tier = TierSettings(
        medium=read_one(MEDIUM, f"{name}: medium", parts["medium"]),
        path=path,
        quota=read_one(QUOTA, f"{name}: size", parts["quota"]) if "quota" in parts else 0,
        **{
            mark: read_one(WATERMARK, f"{name}: {mark}", parts[mark])
            for mark in ("high", "low")
            if mark in parts
        },
        mounted=read_one(BOOLEAN, f"{name}: mounted", parts["mounted"]) if "mounted" in parts else False,
    )
    if tier.mounted and (tier.medium is not Medium.MEM or not tier.quota or os.path.dirname(path) == "/"):
        expected = "false, or a mem tier with a quota, in a directory on which a tmpfs is mounted"
        raise SettingError(f"{name}: mounted", "true", expected)
    if "high" in parts and "low" not in parts and tier.low >= tier.high:
        tier = replace(tier, low=round(tier.high * 0.9, 9))
    if not tier.low < tier.high:
        raise SettingError(f"{name}: low", f"{tier.low:g}", f"less than high, {tier.high:g}")
    return tier


def _check_together(values: dict[str, dict[str, Any]], given: Mapping[str, _Given]) -> None:
    """What must fit to each other."""

    def written(key: str) -> str:
        return given[key].name if key in given else key

    def value(section: type, prefix: str, field: str) -> Any:
        chosen = values.get(prefix, {})
        return chosen[field] if field in chosen else section.__dataclass_fields__[field].default  # type: ignore[attr-defined]

    most, least = value(MountSettings, "mount", "max_tasks"), value(MountSettings, "mount", "min_tasks")
    if least > most:
        if "min-tasks" in given:
            raise SettingError(written("min-tasks"), least, f"at most {written('max-tasks')}, {most}")
        values["mount"]["min_tasks"] = most
    most, idle = (value(MountSettings, "mount", f) for f in ("max_threads", "max_idle_threads"))
    if idle > most:
        if "max-idle-threads" in given:
            raise SettingError(written("max-idle-threads"), idle, f"at most {written('max-threads')}, {most}")
        values.setdefault("mount", {})["max_idle_threads"] = most
    memory, block = (value(ReadingSettings, "reading", f) for f in ("memory", "block_size"))
    if memory < 2 * block:
        name = "memory" if "memory" in given else "block-size"
        enough = f"{written('memory')} of at least two blocks, {spell_size(2 * block)}"
        raise SettingError(written(name), given[name].value, enough)
    first, longest = (value(SourceSettings, "sources", f) for f in ("backoff", "backoff_max"))
    if first > longest:
        name = "backoff" if "backoff" in given else "backoff-max"
        raise SettingError(
            written(name), given[name].value, f"{written('backoff')} of at most {written('backoff-max')}"
        )
    _check_api(values.get("api", {}), given)
    _check_landing(values.setdefault("writing", {}), given)
    if values.get("writing", {}).get("enabled"):
        _check_writable(values, given)
    else:
        for key, one in given.items():
            # A variable may be there for all mounts of a machine.
            if key != "rw" and KEYS[key].field.startswith(_WRITES) and not one.name.startswith(PREFIX):
                raise SettingError(one.name, one.value, "--rw with it: nothing is written without")
    if "snapshot" in given:
        index = values["index"]
        if index.get("consistency", Consistency.IMMUTABLE) is not Consistency.IMMUTABLE:
            raise SettingError(
                written("consistency"), str(index["consistency"]), f"immutable, with {written('snapshot')}"
            )
        index["consistency"] = Consistency.IMMUTABLE


def _check_api(api: Mapping[str, str], given: Mapping[str, _Given]) -> None:
    """Nobody is let in without a token but from this machine; and nothing is given that does nothing."""
    if "listen" in api and "token_file" not in api and not _is_loopback(api["listen"].rpartition(":")[0]):
        expected = "an address of loopback, such as 127.0.0.1:9301, or --token-file beside it"
        raise SettingError(given["listen"].name, api["listen"], expected)
    for key, beside in (
        ("token-file", "listen"), ("tls-cert", "listen"), ("tls-cert", "tls-key"), ("tls-key", "tls-cert"),
    ):  # fmt: skip
        if key in given and beside not in given:
            raise SettingError(given[key].name, given[key].value, f"--{beside} beside it")


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower() == "localhost"


def _check_landing(writing: dict[str, Any], given: Mapping[str, _Given]) -> None:
    """The watermarks of the landing zone: low, high, full. Those that nobody gave follow the others."""
    plain = WritingSettings()
    full = 1 - writing.get("reserve", plain.reserve)
    high = writing.get("high", min(plain.high, round(full - 0.03, 9)))
    low = writing.get("low", min(plain.low, round(high - 0.02, 9)))
    if high > full:
        name = "landing-high" if "landing-high" in given else "landing-reserve"
        raise SettingError(
            given[name].name, given[name].value, f"a high watermark of at most what is not reserved, {full:g}"
        )
    if not 0 <= low < high:
        name = "landing-low" if "landing-low" in given else "landing-high"
        name = name if name in given else "landing-reserve"
        raise SettingError(
            given[name].name, given[name].value, f"a low watermark below the high one, {high:g}"
        )
    if (high, low) != (plain.high, plain.low):
        writing.update(high=high, low=low)


def _check_writable(values: dict[str, dict[str, Any]], given: Mapping[str, _Given]) -> None:
    """What cannot be with `rw`; and modes with which somebody can write."""
    rw, mount = given["rw"].name, values.setdefault("mount", {})
    for key in ("snapshot", "manifest"):
        if key in given:
            raise SettingError(
                given[key].name, given[key].value, f"none, with {rw}: what is pinned cannot be written"
            )
    if values.get("index", {}).get("consistency") is Consistency.IMMUTABLE:
        expected = f"revalidate, with {rw}: what is immutable cannot be written"
        raise SettingError(given["consistency"].name, "immutable", expected)
    if mount.get("io") is IO.PAGECACHE:
        expected = f"auto, passthrough or served, with {rw}: the kernel would not ask before it opens a file"
        raise SettingError(given["io"].name, "pagecache", expected)
    if mount.get("processes", 1) != 1:
        raise SettingError(given["processes"].name, mount["processes"], f"1, with {rw}")
    mount.setdefault("file_mode", 0o644)
    mount.setdefault("dir_mode", 0o755)


# ---- where things lie ----------------------------------------------------------------------------


def runtime_directory(environment: Mapping[str, str]) -> str:
    """Where running workers register, for every command of one user. Raises SettingError.

    A variable and not a key: a command that looks for a mount has not read its datacache.yaml.
    """
    if chosen := environment.get(f"{PREFIX}RUNTIME"):
        return str(read_one(PATH, f"{PREFIX}RUNTIME", chosen))
    session = _xdg("XDG_RUNTIME_DIR", environment)
    if os.geteuid() == 0 and (not session or _within(session, "/run/user")):
        # root's login session has one that ends with it, and its daemons do not.
        return "/run/datacache"
    return os.path.join(session, "datacache") if session else f"/tmp/datacache-{os.geteuid()}"  # noqa: S108  registry checks the owner


def state_directory(environment: Mapping[str, str]) -> str:
    """Under which data sets keep their index, snapshots and log."""
    return _under("XDG_STATE_HOME", environment, root="/var/lib/datacache", home=".local/state")


def cache_directory(environment: Mapping[str, str]) -> str:
    """Under which data sets without --cache keep their copies."""
    return _under("XDG_CACHE_HOME", environment, root="/var/cache/datacache", home=".cache")


def _under(variable: str, environment: Mapping[str, str], *, root: str, home: str) -> str:
    if chosen := _xdg(variable, environment):
        return os.path.join(chosen, "datacache")
    if os.geteuid() == 0:
        return root
    where = environment.get("HOME", "")
    if not where.startswith("/"):
        raise SettingError("HOME", where, f"an absolute path, or {variable} to be set")
    return os.path.join(where, home, "datacache")


def _xdg(variable: str, environment: Mapping[str, str]) -> str:
    """The base directory that `variable` names. Relative ones are to be ignored, says its standard."""
    value = environment.get(variable, "")
    return os.path.normpath(value) if value.startswith("/") else ""


# ---- to the daemon and back ----------------------------------------------------------------------


def dump_settings(settings: Settings) -> str:
    """`settings` as JSON. Holds secrets (`environment`): for a pipe only."""
    return json.dumps(_plain(settings))


def load_settings(text: str, *, newer: bool = False) -> Settings:
    """The settings that `dump_settings` wrote; equal to what it was given. `newer`: of a release that may
    have more of them than this one knows, which are left out."""
    loaded: Settings = _built(Settings, json.loads(text), newer=newer)
    return loaded


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _built(kind: Any, value: Any, *, newer: bool) -> Any:
    """`value` as the type `kind` of a field of the settings."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        parts = {
            name: _built(hints[name], part, newer=newer)
            for name, part in value.items() if name in hints or not newer
        }  # fmt: skip
        return kind(**parts)  # type: ignore[operator]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    if get_origin(kind) is tuple:
        return tuple(_built(get_args(kind)[0], item, newer=newer) for item in value)
    if get_origin(kind) in (Union, types.UnionType) and value is not None:
        kind = next(part for part in get_args(kind) if part is not type(None))
        return _built(kind, value, newer=newer)
    return float(value) if kind is float else value
