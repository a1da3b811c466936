"""
The server is held to docs/openapi.json: every route, argument, answer and error that it describes.

The description is read from the file, as a program would; requests go over the Unix socket and over TCP.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from datacache import errors
from datacache.cluster import api
from datacache.cluster.server import REMOTE_REQUEST, ControlServer
from datacache.config.settings import ApiSettings
from datacache.errors import DatacacheError, SettingError
from datacache.worker import Worker
from tests.contract.test_control import TOKEN, fill, settings_of, token_file
from tests.support.asking import Answer, Asker

DESCRIPTION = json.loads((Path(__file__).parents[2] / "docs/openapi.json").read_text())
ROUTES = [(method.upper(), path) for path, item in DESCRIPTION["paths"].items() for method in item]
"""Method and path of each operation."""


def operation(method: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = DESCRIPTION["paths"][path][method.lower()]
    return found


def arguments(path: str) -> dict[str, Any]:
    """The schemas of the arguments of a call."""
    found: dict[str, Any] = body_of(path)["properties"]
    return found


def body_of(path: str) -> dict[str, Any]:
    found: dict[str, Any] = operation("POST", path)["requestBody"]["content"]["application/json"]["schema"]
    return found


def described(method: str, path: str, answer: Answer) -> Any:
    """The answer's body, after it was held to its description."""
    responses = operation(method, path)["responses"]
    assert str(answer.status) in responses, f"{method} {path} answers {answer.status}, which is not described"
    content = responses[str(answer.status)]["content"]
    assert set(content) == {answer.kind}, f"{method} {path}: {answer.status} as {answer.kind}"
    body = json.loads(answer.body) if answer.kind == "application/json" else answer.body.decode()
    schema = {**content[answer.kind]["schema"], "components": DESCRIPTION["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)
    return body


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    fill(tmp_path / "bucket")
    with Worker(settings_of(tmp_path)) as worker:
        yield worker


@pytest.fixture(params=["socket", "port"])
def ask(worker: Worker, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Asker]:
    """One who may ask: over the socket, or over TCP with a token."""
    chosen = ApiSettings("127.0.0.1:0", token_file(tmp_path))
    with ControlServer(worker, worker.socket, remote=chosen) as server:
        if request.param == "socket":
            yield Asker(worker.socket)
        else:
            yield Asker(("127.0.0.1", server.port), token=TOKEN)


def there(ask: Asker) -> list[tuple[str, str]]:
    """What is answered to `ask`."""
    return [route for route in ROUTES if not ask.token or operation(*route)["x-remote"]]


def test_each_call_answers_as_described(worker: Worker, ask: Asker) -> None:
    """Every route, with arguments that will do: 200, and an answer of its schema, with no key beyond it."""
    started = json.loads(ask("POST", "/v1/loads", {"path": "/sub", "files": None, "bandwidth": 0}).body)
    worker.loads.wait(started["job"], 30)
    failing = json.loads(ask("POST", "/v1/loads", {"files": ["/a.bin", "/nowhere"]}).body)
    worker.loads.wait(failing["job"], 30)
    bodies: dict[str, Any] = {
        "/v1/loads": {"files": ["/a.bin"], "order": False, "tier": "ssd", "outage_timeout": 5},
        "/v1/loads/status": failing, "/v1/loads/cancel": started, "/v1/list": {"path": "/", "limit": 2},
        "/v1/stat": {"path": "/sub/b.bin"}, "/v1/evict": {"path": "/other", "dry_run": True},
        "/v1/pin": {"path": "/sub", "pinned": True}, "/v1/drain": {"timeout": 10},
        "/v1/lease": {"tier": "ssd", "room": 1 << 20, "ttl": 5},
    }  # fmt: skip
    asked = 0
    for method, path in there(ask):
        if path == "/v1/flush":  # of a worker that can be written to: below
            continue
        answer = ask(method, path, bodies.get(path, {} if method == "POST" else None))
        assert answer.status == 200, answer
        found = described(method, path, answer)
        schema = operation(method, path)["responses"]["200"]["content"][answer.kind]["schema"]
        if "properties" in schema:
            assert set(found) == set(schema["properties"]), path
        asked += 1
    assert asked == len(there(ask)) - (0 if ask.token else 1)
    ready = ask("GET", "/readyz")
    assert (ready.status, described("GET", "/readyz", ready)) == (503, "the worker drains\n")


def test_the_answers_of_a_worker_that_can_be_written_to(tmp_path: Path) -> None:
    """`flush`, `drain` and `status` of one with a landing zone."""
    fill(tmp_path / "bucket")
    with Worker(settings_of(tmp_path, rw=True)) as worker, ControlServer(worker, worker.socket):
        ask = Asker(worker.socket)
        for path, body in (("/v1/flush", {"path": "/", "timeout": 1}), ("/v1/drain", {"timeout": 1.5})):
            schema = operation("POST", path)["responses"]["200"]["content"]["application/json"]["schema"]
            assert set(described("POST", path, ask("POST", path, body))) == set(schema["properties"])
        described("GET", "/v1/status", ask("GET", "/v1/status"))


OF_TYPE = {
    "string": "x", "integer": 1, "number": 0.5, "boolean": True, "array": ["x"], "object": {"x": 1},
}  # fmt: skip


def test_arguments_are_those_of_the_description(ask: Asker) -> None:
    """Of every argument: another type is refused, and what is below or above its bounds; null is as nothing,
    unless it is needed; and an argument that is not described is refused."""
    tried = 0
    for method, path in there(ask):
        if method != "POST":
            continue
        needed = {name: OF_TYPE[arguments(path)[name]["type"]] for name in body_of(path)["required"]}
        wrong: list[dict[str, Any]] = [{**needed, "beyond": 1}, *({} for _ in needed)]
        for name, schema in arguments(path).items():
            kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            # 1 is a number, too.
            others = [
                v for k, v in OF_TYPE.items() if k not in kinds and (k, kinds[0]) != ("integer", "number")
            ]
            wrong += [{**needed, name: value} for value in others]
            if "null" not in kinds:
                wrong.append({**needed, name: None})
            if "items" in schema:
                wrong.append({**needed, name: [1]})
            if "minimum" in schema:
                wrong += [{**needed, name: schema["minimum"] - 1}, {**needed, name: schema["maximum"] + 1}]
        for body in wrong:
            answer = ask(method, path, body)
            assert answer.status == 400, (path, body, answer)
            assert described(method, path, answer)["kind"] == "SettingError"
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.Draft202012Validator(body_of(path)).validate(body)
        for raw in (b"{", b"[]", b"\xff", b"[" * 100_000):
            assert described(method, path, ask(method, path, raw))["kind"] == "SettingError"
        tried += len(wrong)
    assert tried > (60 if ask.token else 120)


def test_null_is_as_nothing(worker: Worker, ask: Asker) -> None:
    """An optional argument may be null."""
    every = {name: None for name, schema in arguments("/v1/loads").items() if "null" in schema["type"]}
    assert set(every) == set(arguments("/v1/loads"))
    answer = ask("POST", "/v1/loads", every)
    assert answer.status == 200
    worker.loads.wait(json.loads(answer.body)["job"], 30)


class Failing:
    """A control that fails at whatever it is asked."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object, **__: object) -> None:
            raise self._error

        return fail


def error_of(kind: type[DatacacheError]) -> DatacacheError:
    error = kind.__new__(kind)
    error.args = (f"a {kind.__name__} of token=abcdefgh",)
    return error


KINDS = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DatacacheError)),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_error_has_the_status_of_the_table(kind: type[DatacacheError], tmp_path: Path) -> None:
    """Whatever the worker raises becomes a described answer, of the first row that fits, without secrets."""
    expected = next((status for row, status in api.STATUS if issubclass(kind, row)), 500)
    with failing(error_of(kind), tmp_path) as asked:
        for answer, method, path in asked:
            body = described(method, path, answer)
            assert (answer.status, body["kind"]) == (expected, kind.__name__), path
            assert body["error"] == f"a {kind.__name__} of token=***"


def test_a_fault_of_ours_is_one(tmp_path: Path, logs: Any) -> None:
    """What nobody raised on purpose is 500, and is logged; the caller learns its class."""
    logs.expect("failed")
    with failing(ValueError("inside"), tmp_path) as asked:
        for answer, method, path in asked:
            body = described(method, path, answer)
            assert (answer.status, body["kind"]) == (500, "ControlError")
            assert body["error"] == "internal error: ValueError"
    assert len(logs.seen) == len([route for route in ROUTES if route[1] != "/healthz"])


class failing:  # noqa: N801  a context manager
    """The answers of a worker that fails with `error`, one of each JSON call over the socket."""

    def __init__(self, error: Exception, tmp_path: Path) -> None:
        self._control, self._socket = Failing(error), str(tmp_path / "run" / "x.sock")
        self._stack = ExitStack()

    def __enter__(self) -> Iterator[tuple[Answer, str, str]]:
        self._stack.enter_context(ControlServer(self._control, self._socket))  # type: ignore[arg-type]
        return self._asked()

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def _asked(self) -> Iterator[tuple[Answer, str, str]]:
        ask = Asker(self._socket)
        for method, path in ROUTES:
            if path == "/healthz":
                continue
            needed = body_of(path)["required"] if method == "POST" else []
            body = {name: OF_TYPE[arguments(path)[name]["type"]] for name in needed}
            yield ask(method, path, body if method == "POST" else None), method, path


def test_what_is_too_large_and_who_shows_no_token(worker: Worker, tmp_path: Path) -> None:
    """413 and 401 are answered as described."""
    chosen = ApiSettings("127.0.0.1:0", token_file(tmp_path))
    with ControlServer(worker, worker.socket, remote=chosen) as server:
        address = ("127.0.0.1", server.port)
        huge = Asker(address, token=TOKEN)("POST", "/v1/loads", b" " * (REMOTE_REQUEST + 1))
        assert huge.status == 413
        assert "1 MiB" in described("POST", "/v1/loads", huge)["error"]
        for method, path in ROUTES:
            answer = Asker(address)(method, path, {} if method == "POST" else None)
            if operation(method, path)["security"] == []:
                assert answer.status == 200
            else:
                assert answer.status == 401
                if operation(method, path)["x-remote"]:
                    described(method, path, answer)


def test_there_is_no_error_that_is_not_reached() -> None:
    """Each status that is described is one that the tests above have seen: none is described for show."""
    seen = {200, 400, 401, 408, 413, 500, 503} | {status for _, status in api.STATUS}
    named = {int(s) for m, p in ROUTES for s in operation(m, p)["responses"]}
    assert named == seen
    assert SettingError in dict(api.STATUS)
