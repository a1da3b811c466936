"""docs/api.md says what the control API is: its routes, arguments, answers, errors and bounds."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest

from datacache.cluster import api, credentials, server
from datacache.cluster.server import ControlServer
from datacache.model import MiB
from datacache.reading import load
from datacache.worker import Worker
from tests.contract.control_suite import FILES
from tests.contract.test_control import fill, settings_of
from tests.support.asking import Asker

DOCS = Path(__file__).parents[2] / "docs"
PAGE, OPERATIONS = (DOCS / "api.md").read_text(), (DOCS / "operations.md").read_text()
ROUTES = re.findall(r"^\| `(GET|POST) (/\S+)` \| (.*?) \| (.*?) \| ?(yes|) \|$", PAGE, re.MULTILINE)
"""Method, path, arguments, answer of each row, and whether it is there over TCP."""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    fill(tmp_path / "bucket")
    with Worker(settings_of(tmp_path)) as worker, ControlServer(worker, worker.socket):
        yield worker


def ask(worker: Worker, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and answer of one request, as any HTTP client would make it."""
    answer = Asker(worker.socket)(method, path, body)
    text = answer.body.decode()
    return answer.status, json.loads(text) if answer.kind == "application/json" else text


def test_the_page_has_each_route() -> None:
    """Routes of the page are those of the table, with their arguments, and where they are answered."""
    assert [row[:2] for row in ROUTES] == [(call.method, call.path) for call in api.CALLS]
    for (_, path, arguments, _, remote), call in zip(ROUTES, api.CALLS, strict=True):
        each = [(f"`{name}` {one.kind.__name__}", one.needed) for name, one in call.arguments.items()]
        assert arguments == ", ".join(text if needed else f"[{text}]" for text, needed in each), path
        assert remote == ("yes" if call.remote else ""), path


def test_the_server_has_each_route(worker: Worker) -> None:
    """What each application answers are the calls of the table that belong there, and no others."""
    with ThreadPoolExecutor(1) as calls:
        handlers = server._Handlers(worker, calls)

        def routes(app: Any) -> list[tuple[str, str]]:
            found = [(route.method, route.resource.canonical) for route in app.router.routes()]
            return [route for route in found if route[0] != "HEAD"]

        assert routes(handlers.control()) == [(call.method, call.path) for call in api.CALLS]
        remote = [(call.method, call.path) for call in api.CALLS if call.remote]
        assert routes(handlers.remote(None)) == remote
        assert routes(handlers.metrics()) == [("GET", "/healthz"), ("GET", "/metrics")]
    assert {path for _, path in remote} == {
        "/healthz", "/readyz", "/metrics", "/v1/status", "/v1/loads", "/v1/loads/status", "/v1/loads/cancel",
        "/v1/drain",
    }  # fmt: skip
    assert {call.path for call in api.CALLS if call.open} == {"/healthz", "/readyz"}


def test_answers_have_the_keys_of_the_page(worker: Worker) -> None:
    """Each call is made once, and answers what the page says; what else it says is refused is refused."""
    status, started = ask(worker, "POST", "/v1/loads", {"path": "/sub", "files": None})
    assert (status, set(started)) == (200, {"job"})
    worker.loads.wait(started["job"], 30)
    bodies: dict[str, Any] = {
        "/v1/loads/status": started,
        "/v1/loads/cancel": started,
        "/v1/list": {"path": "/"},
        "/v1/stat": {"path": "/sub/b.bin"},
        "/v1/evict": {"path": "/", "dry_run": True},
        "/v1/pin": {"path": "/sub", "pinned": True},
        "/v1/lease": {"tier": "ssd", "room": 1 << 20, "ttl": 5},
        "/v1/verify": {},
        "/v1/drain": {"timeout": 5},
    }
    answers = {path: answer for _, path, _, answer, _ in ROUTES}
    for path, body in bodies.items():
        status, answer = ask(worker, "POST", path, body)
        assert status == 200, answer
        told = re.sub(r"as of .*|for `timeout`", "", answers[path])
        assert list(answer) == re.findall(r"`(\w+)`", told), path
    assert ask(worker, "GET", "/healthz") == (200, "ok\n")
    assert ask(worker, "GET", "/v1/status")[1]["dataset"] == worker.settings.dataset.name
    assert "datacache_info" in ask(worker, "GET", "/metrics")[1]
    assert ask(worker, "GET", "/readyz") == (503, "the worker drains\n")
    for method, path, refusal in (("POST", "/v1/status", 405), ("GET", "/v1/nothing", 404)):
        status, answer = ask(worker, method, path)
        assert (status, answer["kind"]) == (refusal, "ControlError")
        assert answer["error"] == f"{method} {path}: no such call here"
    page = ask(worker, "POST", "/v1/list", {"path": "/", "limit": 1})[1]
    assert len(page["entries"]) == 1
    assert page["after"] > 0
    alone = ask(worker, "POST", "/v1/list", {"path": "/a.bin"})[1]
    assert [entry["size"] for entry in alone["entries"]] == [len(FILES["a.bin"])]


def test_the_page_of_operations_has_each_figure_of_the_status(worker: Worker) -> None:
    """docs/operations.md names every key that `datacache status --json` prints of a worker, and no other."""
    (table,) = re.findall(r"--json` says\n.*?\n\|---\|---\|\n(.*?)\n\n", OPERATIONS, re.DOTALL)
    rows = [
        re.findall(r"`([a-z_]+)(?:\[\])?`", cell)
        for line in table.splitlines()
        for cell in line.split("|")[1:2]
    ]
    nested = {line.split("`")[1].strip("[]"): line.split("|")[2] for line in table.splitlines()}
    status = ask(worker, "GET", "/v1/status")[1]
    assert {key for row in rows for key in row} - {"mount_requests", "mount_files", "writing"} == set(status)
    for key in ("index", "tiers", "reads", "sources", "mounts"):
        part = status[key][0] if isinstance(status[key], list) else status[key]
        assert set(part) <= set(re.findall(r"`(\w+)`", nested[key])), key


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/list", {"path": "/nothing"}, 404, "NoSuchPath"),
        ("/v1/list", {"path": "/", "limit": 0}, 400, "SettingError"),
        ("/v1/list", {"path": "/", "limit": 10_001}, 400, "SettingError"),
        ("/v1/list", {"path": "/", "depth": 1}, 400, "SettingError"),
        ("/v1/list", {"path": 1}, 400, "SettingError"),
        ("/v1/stat", {}, 400, "SettingError"),
        ("/v1/lease", {"tier": "ssd", "room": 1}, 400, "SettingError"),
        ("/v1/lease", {"tier": "ssd", "room": -1, "ttl": 5}, 400, "SettingError"),
        ("/v1/lease", {"tier": "ssd", "room": 1, "ttl": 3601}, 400, "SettingError"),
        ("/v1/drain", {"timeout": 11}, 400, "SettingError"),
        ("/v1/drain", {"timeout": -0.1}, 400, "SettingError"),
        ("/v1/drain", {"timeout": True}, 400, "SettingError"),
        ("/v1/flush", {"path": "/"}, 409, "ControlError"),
        ("/v1/stat", [], 400, "SettingError"),
        ("/v1/loads/status", {"job": "none"}, 409, "ControlError"),
    ],
)
def test_refusals_are_as_the_page_says(worker: Worker, path: str, body: Any, status: int, kind: str) -> None:
    """A status, and one line with its kind and fields."""
    found, answer = ask(worker, "POST", path, body)
    assert (found, answer["kind"], set(answer)) == (status, kind, {"error", "kind", "fields"})
    if kind == "SettingError":
        assert {"name", "value", "expected"} >= set(answer["fields"]) >= {"name", "expected"}


def test_statuses_and_bounds_are_those_of_the_page() -> None:
    """The table of errors is the server's, in its order; so are the figures."""
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \|$", PAGE, re.MULTILINE)
    assert rows == [(kind.__name__, str(status)) for kind, status in api.STATUS]
    bound = r"^\| ([^|`]+?|`limit` of a list) \| (\d+ (?:MiB|to \d+)|\d+)"
    bounds = dict(re.findall(bound, PAGE, re.MULTILINE))
    assert bounds == {
        "connections at once": str(server.CONNECTIONS),
        "calls at once": str(server.CALLS),
        "a request's body": f"{server.REQUEST // MiB} MiB",
        "`limit` of a list": f"1 to {api.PAGE}",
        "load jobs at once": str(load.RUNNING),
        "load jobs remembered": str(load.REMEMBERED),
    }
    text = " ".join(PAGE.split())
    assert f"Over TCP {server.REMOTE_REQUEST // MiB} MiB" in text
    assert f"dropped after {server.SCRAPE:g} s, or when it has not said within {server.HEAD:g} s" in text
    assert f"has {server.HEAD:g} s to say what it wants" in text
    assert f"{server.BODY:g} s more for the body, and is dropped after {server.LIFETIME:g} s" in text
    assert f"It waits for `timeout` seconds, {api.WAIT:g} at most" in text
    assert f"0 to {api.LEASE:g}, unless it is renewed" in text
    assert f"{credentials.SHORTEST} to {credentials.LONGEST} printable ASCII" in text
    assert f"up to {credentials.MOST}, one a line" in text


def test_the_description_is_made_from_the_table() -> None:
    """docs/openapi.json is what `python -m datacache.cluster.api` prints, and valid OpenAPI 3.1."""
    assert (DOCS / "openapi.json").read_text() == api.text()
    openapi_spec_validator.validate(api.describe())
