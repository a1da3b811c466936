"""
The control API as a table: `CALLS`, with the arguments and the answer of each.

`server` routes by it and holds requests to it; docs/api.md and docs/openapi.json are this table for
people and for programs (tests hold all of them together). `python -m datacache.cluster.api` prints
the description, which is OpenAPI 3.1. What may be asked over TCP, by a controller, is what has
`remote`; the Unix socket has all of it.
"""

import json
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from datacache.cluster.control import CachedPath
from datacache.errors import (
    CacheError,
    ControlError,
    DatacacheError,
    Denied,
    Locked,
    NamespaceError,
    NotFound,
    SettingError,
    SourceError,
    TierFull,
)
from datacache.model import TiB
from datacache.reading.job import LoadRequest, LoadStatus

WAIT = 10.0
"""Seconds that one `flush` or `drain` waits at most: who wants to wait longer asks again."""
PAGE = 10_000
"""Entries of one `list` at most."""
LEASE = 3600.0
"""Seconds for which a lease is given at most: who gives them renews them, or is gone."""

STATUS: tuple[tuple[type[DatacacheError], int], ...] = (
    (SettingError, 400),
    (NamespaceError, 404),
    (NotFound, 404),
    (Denied, 403),
    (Locked, 409),
    (TierFull, 507),
    (CacheError, 500),
    (SourceError, 502),
    (ControlError, 409),
)
"""The HTTP status of each error; the first that fits. 500 for what is not there."""

Schema = dict[str, Any]


class Argument(NamedTuple):
    """A member of the JSON object in a request's body."""

    kind: type
    needed: bool = False
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Call:
    """One route."""

    method: str
    path: str
    about: str
    answer: Schema | str
    """The schema of what is answered with 200; a text: its content type."""
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    remote: bool = False
    """Whether it is offered over TCP."""
    open: bool = False
    """Whether nobody needs a token for it."""
    unready: bool = False
    """Whether it answers 503, with a reason as text, when the worker is not ready."""

    def read(self, raw: bytes) -> dict[str, Any]:
        """The arguments in a request's body. Raises SettingError."""
        try:
            body = json.loads(raw or b"{}")
        except (ValueError, RecursionError) as error:
            raise SettingError("body", "", f"JSON ({error})") from error
        if not isinstance(body, dict):
            raise SettingError("body", type(body).__name__, "a JSON object")
        for name, value in body.items():
            if name not in self.arguments:
                raise SettingError("body", name, f"one of {', '.join(self.arguments) or 'no arguments'}")
            _check(name, value, self.arguments[name])
        for name, argument in self.arguments.items():
            if argument.needed and name not in body:
                raise SettingError(name, "", "a value")
        return {name: value for name, value in body.items() if value is not None}


def _check(name: str, value: object, argument: Argument) -> None:
    if value is None and not argument.needed:
        return
    # A whole number is a number, in JSON; and true is none.
    if argument.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not argument.kind:
        raise SettingError(name, value, f"a value of type {argument.kind.__name__}")
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise SettingError(name, "", "a list of texts")
    least, most = argument.least, argument.most
    if (
        isinstance(value, int | float)
        and least is not None
        and most is not None
        and not least <= value <= most
    ):
        raise SettingError(name, value, f"{least:g} to {most:g}")


# ---- schemas -------------------------------------------------------------------------------------

_PLAIN: Mapping[type, str] = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object",
}  # fmt: skip


def _schema(kind: Any) -> Schema:
    """The JSON that a value of a dataclass, or of a type of its fields, becomes."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return _object(**{one.name: _schema(hints[one.name]) for one in fields(kind)})
    if get_origin(kind) in (Union, types.UnionType):
        return {"anyOf": [_schema(part) for part in get_args(kind)]}
    if kind is type(None):
        return {"type": "null"}
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        if rest == [...]:
            return {"type": "array", "items": _schema(item)}
        return {"type": "array", "items": _schema(item), "minItems": len(rest) + 1, "maxItems": len(rest) + 1}
    if get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(kind)[1])}
    return {"type": _PLAIN[kind]}


def _object(**properties: Schema) -> Schema:
    """An object with these members at least: `v1` only grows."""
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT, _NUMBER, _YES = _schema(str), _schema(int), _schema(bool)
_ANY = {"type": "object"}
_TEXTS = {"type": "array", "items": _TEXT}
_COUNTS = {"type": "object", "additionalProperties": _NUMBER}

_STATUS_ANSWER = {
    **_object(
        dataset=_TEXT, mount=_TEXT, pid=_NUMBER, broker=_NUMBER, version=_TEXT, started=_schema(float),
        uptime=_schema(float), rss_bytes=_NUMBER, draining=_YES, consistency=_TEXT, snapshot=_TEXT,
        state=_TEXT, settings=_schema(dict[str, str]), manifest=_TEXT,
        mounts={"type": "array", "items": _object(uri=_TEXT, path=_TEXT, options=_ANY)},
        index=_object(files=_NUMBER, bytes=_NUMBER, directories=_NUMBER, stale=_NUMBER, listings=_NUMBER),
        tiers={
            "type": "array",
            "items": _object(
                name=_TEXT, quota=_NUMBER, used=_NUMBER, entries=_NUMBER,
                state={"enum": ["ok", "full", "broken"]}, reason=_TEXT, evicted=_NUMBER, damaged=_NUMBER,
                pinned=_NUMBER, lease=_schema(int | None), lease_entries=_schema(int | None),
            ),
        },
        reads=_ANY,
        sources={"type": "array", "items": _object(uri=_TEXT)},
        loads={"type": "array", "items": _object(id=_TEXT, state=_TEXT)},
    ),
    "description": "All that `datacache status --json` prints; docs/operations.md has the keys.",
}  # fmt: skip
_PATH = {"path": Argument(str, needed=True)}
_JOB = {"job": Argument(str, needed=True)}
_TIMEOUT = {"timeout": Argument(float, least=0, most=WAIT)}
_LEFT = {"pending": _NUMBER, "open": _NUMBER, "bytes": _NUMBER, "errors": _TEXTS, "stuck": _YES}

# Their types are those of the fields; `files` is the one that may be None.
_LOAD = {"files": Argument(list), "globs": Argument(list)} | {
    name: Argument(type(value)) for name, value in vars(LoadRequest()).items() if isinstance(value, str | int)
}

CALLS: tuple[Call, ...] = (
    Call("GET", "/healthz", "Whether somebody answers. It asks nothing of the worker.", "text/plain",
         remote=True, open=True),
    Call("GET", "/readyz", "Whether the worker can be asked: 503 while it drains or ends.", "text/plain",
         remote=True, open=True, unready=True),
    Call("GET", "/metrics", "The figures of the status, for Prometheus.", "text/plain", remote=True),
    Call("GET", "/v1/status", "How everything is.", _STATUS_ANSWER, remote=True),
    Call("POST", "/v1/loads", "Start a load job.", _object(job=_TEXT), _LOAD, remote=True),
    Call("POST", "/v1/loads/status", "How a load job is doing.", _schema(LoadStatus), _JOB, remote=True),
    Call("POST", "/v1/loads/cancel", "Have a load job stop; what it has fetched stays.", _object(), _JOB,
         remote=True),
    Call("POST", "/v1/list", "The entries of a directory, and what is cached of them.",
         _object(entries={"type": "array", "items": _schema(CachedPath)}, after=_NUMBER),
         {**_PATH, "after": Argument(int), "limit": Argument(int, least=1, most=PAGE)}),
    Call("POST", "/v1/stat", "One path, and what is cached of it.", _schema(CachedPath), _PATH),
    Call("POST", "/v1/evict", "Drop the copies of all files below a path.",
         _object(files=_NUMBER, bytes=_NUMBER), {**_PATH, "dry_run": Argument(bool)}),
    Call("POST", "/v1/pin", "Keep the copies of all files below a path from eviction, or no longer.",
         _object(files=_NUMBER), {**_PATH, "pinned": Argument(bool, needed=True)}),
    Call("POST", "/v1/lease", "Let a tier take less than its quota, for a while.",
         _object(room=_NUMBER, entries=_NUMBER),
         {"tier": Argument(str, needed=True), "room": Argument(int, needed=True, least=0, most=1024 * TiB),
          "entries": Argument(int, least=0, most=1 << 40),
          "ttl": Argument(float, needed=True, least=0, most=LEASE)}),
    Call("POST", "/v1/verify", "Hold every block of the cache against its checksum.", _COUNTS),
    Call("POST", "/v1/flush", "Wait until what was closed below a path is in the bucket.",
         _object(clean=_YES, **_LEFT), {**_PATH, **_TIMEOUT}),
    Call("POST", "/v1/drain", "Begin nothing any more, and wait until nothing is under way.",
         _object(drained=_YES, loads=_NUMBER, **_LEFT), _TIMEOUT, remote=True),
)  # fmt: skip

ERROR = {
    **_object(error=_TEXT, kind=_TEXT, fields=_ANY),
    "description": "One line for people, the class of the error, and what that class has.",
}


# ---- the description -----------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """`CALLS` as OpenAPI 3.1."""
    paths: dict[str, Any] = {}
    for call in CALLS:
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(call)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "datacache worker",
            "version": "1",
            "summary": "What other processes may ask of a worker of one data set.",
            "description": "Offered on a Unix socket (all of it) and over TCP (what has `x-remote`). "
            "docs/api.md is this for people.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://localhost", "description": "the Unix socket, or --listen HOST:PORT"}],
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A line of --token-file; over TCP, where there is one.",
                }
            },
        },
    }


def statuses(call: Call) -> list[int]:
    """The HTTP statuses, other than 200, with which `call` answers an error."""
    if call.path == "/healthz":
        return []
    found = {status for _, status in STATUS} | {500}
    if call.method == "POST":
        found |= {413, 408} if call.remote else {413}
    return sorted(found if call.open or not call.remote else found | {401})


def _operation(call: Call) -> Schema:
    content = (
        {call.answer: {"schema": _TEXT}}
        if isinstance(call.answer, str)
        else {"application/json": {"schema": call.answer}}
    )
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers: Schema = {"200": {"description": "It is done.", "content": content}}
    if call.unready:
        answers["503"] = {"description": "Not ready; why.", "content": {"text/plain": {"schema": _TEXT}}}
    for status in statuses(call):
        answers[str(status)] = {"description": _meaning(status), "content": error}
    operation: Schema = {
        "operationId": f"{call.method.lower()}{call.path.replace('/v1', '').replace('/', '-')}",
        "summary": call.about,
        "x-remote": call.remote,
        "security": [] if call.open else [{"token": []}, {}] if call.remote else [{}],
        "responses": answers,
    }
    if call.method == "POST":
        needed = [name for name, argument in call.arguments.items() if argument.needed]
        schema = {
            "type": "object",
            "properties": {name: _argument(argument) for name, argument in call.arguments.items()},
            "required": needed,
            "additionalProperties": False,
        }
        body = {"required": bool(needed), "content": {"application/json": {"schema": schema}}}
        operation["requestBody"] = body
    return operation


def _argument(argument: Argument) -> Schema:
    kind: Any = _PLAIN[argument.kind]
    schema: Schema = {"type": kind if argument.needed else [kind, "null"]}
    if argument.kind is list:
        schema["items"] = _TEXT
    if argument.least is not None:
        schema |= {"minimum": argument.least, "maximum": argument.most}
    return schema


def _meaning(status: int) -> str:
    kinds = [kind.__name__ for kind, other in STATUS if other == status]
    more = {
        401: "no token that is accepted",
        408: "the request did not come in time",
        413: "the request is too large",
        500: "a fault of ours; the worker's log has more",
    }
    return ", ".join([*kinds, *([more[status]] if status in more else [])])


def text() -> str:
    """What stands in docs/openapi.json."""
    return json.dumps(describe(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
