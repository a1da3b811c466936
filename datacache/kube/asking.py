"""
Which workers of a Dataset there are, and what they answer: those that can be reached, all at once.

A worker is asked at its pod's address, with the Dataset's token; over TLS, where its pod says so, and it is
known by a certificate of its Dataset then. Who does not answer, in the time that the connection gives it, is
left out: what that means is for the caller to say.
"""

import base64
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

from datacache.errors import DatacacheError
from datacache.kube.api import Api
from datacache.kube.authority import Authorities
from datacache.kube.manifests import TLS_ANNOTATION, UID_LABEL, worker_name
from datacache.kube.release import API_PORT, Name, Release, volume_name

_log = logging.getLogger(__name__)

_LONGEST = 4096
"""Characters of a token that are read: it is a header of each request."""

Object = dict[str, Any]
Answer = TypeVar("Answer")


class Worker(Protocol):
    """The part of a worker's API that a controller uses; docs/api.md. Each raises DatacacheError."""

    def status(self) -> Mapping[str, Any]:
        """How it is."""

    def load(self, path: str, *, globs: tuple[str, ...], bandwidth: int, verify: bool) -> str:
        """Start a load job; its id."""

    def announce(self, files: tuple[str, ...]) -> str:
        """Say in which order these will be read; the id of the job that does."""

    def load_status(self, job: str) -> Mapping[str, Any]:
        """How the job is doing."""

    def load_cancel(self, job: str) -> None:
        """Have it stop."""


class Trust(NamedTuple):
    """By what a worker is known that is asked over TLS."""

    authorities: str
    """In PEM: who signs its certificate."""
    name: str
    """What it is called there."""


Connect = Callable[[str, str, Trust | None], Worker]
"""Makes a Worker of URL, token, and what a URL of https is trusted by."""


class Asking:
    """Finds workers and asks them. Threads may share it."""

    def __init__(
        self, api: Api, release: Release, *, connect: Connect, pool: ThreadPoolExecutor,
        authorities: Authorities,
    ) -> None:  # fmt: skip
        self._api, self._release, self._connect, self._pool = api, release, connect, pool
        self._authorities = authorities

    def pods(self, uid: str) -> list[Object]:
        """The pods of the Dataset's workers, those that end among them."""
        labels = f"{UID_LABEL}={uid}"
        return self._api.list("v1", "Pod", namespace=self._release.namespace, labels=labels)

    def reach(self, uid: str, pods: list[Object] | None = None) -> dict[str, Worker]:
        """The workers that have an address, by node. Nobody has been asked yet."""
        secret = self._api.get(Name("v1", "Secret", self._release.namespace, f"{volume_name(uid)}-token"))
        text = str(((secret or {}).get("data") or {}).get("token", ""))[:_LONGEST]
        token = base64.b64decode(text).decode("ascii", "replace")
        found = {}
        for pod in self.pods(uid) if pods is None else pods:
            node, address = pod["spec"].get("nodeName"), (pod.get("status") or {}).get("podIP")
            if node and address and token and not pod["metadata"].get("deletionTimestamp"):
                host = f"[{address}]" if ":" in address else address
                annotations = pod["metadata"].get("annotations") or {}
                secure = annotations.get(TLS_ANNOTATION) == "true"
                trust = self._trust(uid) if secure else None
                url = f"{'https' if secure else 'http'}://{host}:{API_PORT}"
                found[node] = self._connect(url, token, trust)
        return found

    def _trust(self, uid: str) -> Trust:
        return Trust(self._authorities.trusted(), worker_name(uid, self._release))

    def ask(
        self, workers: Mapping[str, Worker], question: Callable[[str, Worker], Answer]
    ) -> dict[str, Answer]:
        """The answers of those that answer, by node."""
        asked = {node: self._pool.submit(question, node, worker) for node, worker in workers.items()}
        found = {}
        for node, answer in asked.items():
            try:
                found[node] = answer.result()
            except DatacacheError as error:
                _log.info("node %s: %s", node, error)
        return found
