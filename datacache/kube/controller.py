"""
The controller's process: a Lease, kopf's watches, and threads that look at Datasets. The door to kopf.

kopf runs the watches (with their restarts and resource versions) and nothing else: its handlers get raw
events, so that it stores nothing on objects, and only say which Dataset somebody should look at. Threads do
the looking (`reconciling`), each with calls that block. Only the holder of the Lease runs any of this; one
that loses it, or cannot tell, ends, and its pod is started again.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict
from typing import Any

import kopf
from kubernetes import client

from datacache.clock import Clock, SystemClock
from datacache.cluster.client import RemoteClient
from datacache.errors import ClusterError, Conflicting
from datacache.kube.api import Api
from datacache.kube.asking import Asking, Connect, Trust
from datacache.kube.authority import Authorities
from datacache.kube.due import Due
from datacache.kube.exchanging import Exchanger
from datacache.kube.lease import DEADLINE, EVERY, Lease
from datacache.kube.loading import Loader
from datacache.kube.manifests import DATASET_ANNOTATION, UID_LABEL
from datacache.kube.reconciling import Reconciler, claims_of
from datacache.kube.release import GROUP, VERSION, Key, Name, Release
from datacache.reading.job import LoadRequest

_log = logging.getLogger(__name__)

LOOKERS = 4
"""Datasets that are looked at at once: the calls of one wait for the API most of the time."""
ASKERS = 16
"""Workers that are asked at once."""
SLOWEST = 60.0
"""Seconds between two tries of what fails, at most; the first comes after one."""
LEASE_TIMEOUT = (2.0, 3.0)
"""Seconds to connect, and for the answer, of calls about the Lease: two of them fit before `DEADLINE`."""
DATASET, LOAD, PLUGIN = "Dataset", "DataLoad", "DaemonSet"
PATIENCE = 5.0
"""Seconds that a worker may take to say how it is."""


class Uses:
    """On which nodes pods use which claims. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_pod: dict[
            str, tuple[str, set[Key]]
        ] = {}  # guarded by the lock: node and claims by pod's uid

    def note(self, pod: Mapping[str, Any], *, gone: bool) -> set[Key]:
        """What has changed for which claims, with this event."""
        uid, node = pod["metadata"]["uid"], (pod.get("spec") or {}).get("nodeName") or ""
        claims = set() if gone or not node else {Key(pod["metadata"]["namespace"], c) for c in claims_of(pod)}
        with self._lock:
            before = self._by_pod.pop(uid, ("", set()))[1]
            if claims:
                self._by_pod[uid] = (node, claims)
        return before ^ claims

    def pods_of(self, key: Key) -> set[str]:
        """The uids of those on nodes."""
        with self._lock:
            return {uid for uid, (_, claims) in self._by_pod.items() if key in claims}

    def nodes_of(self, key: Key) -> set[str]:
        with self._lock:
            return {node for node, claims in self._by_pod.values() if key in claims}


class Controller:
    """One candidate. `me` names it in the Lease."""

    def __init__(
        self, configured: client.Configuration, release: Release, *, me: str, clock: Clock | None = None,
        connect: Connect | None = None,
    ) -> None:  # fmt: skip
        """`connect` makes workers that can be asked; over their API unless told otherwise."""
        self._configured, self._release, self._me = configured, release, me
        self._connect = connect or RemoteWorker
        self._clock = clock or SystemClock()
        self._due: Due[tuple[str, Key]] = Due(self._clock)
        self._failures: dict[tuple[str, Key], int] = {}  # in a row; of each by the thread that looks at it
        self._uses = Uses()
        self._lost = False
        self._renewed = float("-inf")

    def __repr__(self) -> str:
        return f"<Controller {self._me}: {self._due!r}>"

    def run(self, stop: threading.Event) -> None:
        """Act until `stop` is set, once the Lease is ours. Raises ClusterError when it is lost."""
        name = Name("coordination.k8s.io/v1", "Lease", self._release.namespace, "datacache-controller")
        with (
            closing(Api(self._configured)) as api,
            closing(Api(self._configured, timeout=LEASE_TIMEOUT)) as punctual,
            ThreadPoolExecutor(ASKERS, "ask") as pool,
        ):
            lease = Lease(punctual, name, self._me, clock=self._clock)
            if not self._acquire(lease, stop):
                return
            _log.info("%s acts", self._me)
            authorities = Authorities(api, self._release, clock=self._clock)
            asking = Asking(api, self._release, connect=self._connect, pool=pool, authorities=authorities)
            exchanger = Exchanger(api, self._release, clock=self._clock)
            look = {
                PLUGIN: exchanger.look,
                DATASET: Reconciler(
                    api,
                    self._release,
                    asking,
                    clock=self._clock,
                    nodes_of=self._uses.nodes_of,
                    pods_of=self._uses.pods_of,
                    authorities=authorities,
                    workers=exchanger.workers,
                ).look,
                LOAD: Loader(
                    api, self._release, asking, clock=self._clock, dataset_changed=self._dataset_changed
                ).look,
            }  # fmt: skip
            if self._release.plugin:
                self._due.add((PLUGIN, Key(self._release.namespace, self._release.plugin)))
            threads = [threading.Thread(target=self._renew, args=(lease, stop), name="lease")]
            threads += [
                threading.Thread(target=self._look, args=(look,), name=f"look-{i}") for i in range(LOOKERS)
            ]
            for thread in threads:
                thread.start()
            try:
                asyncio.run(self._watch(stop))
            finally:
                stop.set()
                self._due.close()
                for thread in threads:
                    thread.join()
                if not self._lost:
                    with suppress(ClusterError):
                        lease.release()
        if self._lost:
            raise ClusterError(f"the Lease {name.namespace}/{name.name} was lost: another acts now")

    # ---- the Lease --------------------------------------------------------------------------------

    def _acquire(self, lease: Lease, stop: threading.Event) -> bool:
        while not stop.is_set():
            asked = self._clock.monotonic()
            try:
                if lease.hold():
                    self._renewed = asked
                    return True
            except ClusterError as error:
                _log.warning("the Lease cannot be asked for: %s", error)
            self._clock.wait(stop, EVERY)
        return False

    def _renew(self, lease: Lease, stop: threading.Event) -> None:
        while not self._clock.wait(stop, EVERY):
            asked = self._clock.monotonic()
            try:
                if lease.hold():
                    self._renewed = asked
                else:
                    self._lost = True
            except ClusterError as error:
                _log.warning("the Lease cannot be renewed: %s", error)
            if self._lost or not self._holds():
                self._lost = True
                self._due.close()
                stop.set()

    def _holds(self) -> bool:
        """Whether nobody else can act yet, as far as can be told without asking."""
        return self._clock.monotonic() - self._renewed < DEADLINE

    # ---- looking ----------------------------------------------------------------------------------

    def _look(self, look: Mapping[str, Callable[[Key], float | None]]) -> None:
        while (work := self._due.take()) is not None:
            kind, key = work
            if not self._holds():
                return  # the renewal hangs; it will say that the Lease is lost
            try:
                again = look[kind](key)
                self._failures.pop(work, None)
            except Conflicting:
                again = 0.5  # somebody was faster: look again
            except Exception as error:  # noqa: BLE001  one object's trouble, a bug of ours too, is its own
                count = self._failures[work] = self._failures.get(work, 0) + 1
                again = min(SLOWEST, 2.0 ** min(count - 1, 10))
                expected = isinstance(error, ClusterError)
                said = error if expected else repr(error)
                _log.warning("%s %s/%s: %s; again in %.0f s", kind, *key, said, again, exc_info=not expected)
            finally:
                self._due.done(work)
            if again is not None:
                self._due.add(work, after=again)

    # ---- watching ---------------------------------------------------------------------------------

    async def _watch(self, stop: threading.Event) -> None:
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.scanning.disabled = True  # the kinds are known; nothing is to be watched for new ones
        settings.watching.server_timeout = 300
        try:
            await kopf.operator(
                registry=self._registry(),
                settings=settings,
                standalone=True,
                clusterwide=True,
                stop_flag=stop,
            )
        finally:
            # A signal ends kopf without it; and a thread of the loop waits for it, for whom the loop waits.
            stop.set()

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        marked = {UID_LABEL: kopf.PRESENT}

        @kopf.on.login(registry=registry)
        def login(**_: Any) -> kopf.ConnectionInfo:
            return _connection(self._configured)

        @kopf.on.event(GROUP, VERSION, "datasets", registry=registry)
        async def dataset(namespace: str | None, name: str | None, **_: Any) -> None:
            self._dataset_changed(Key(namespace or "", name or ""))

        @kopf.on.event(GROUP, VERSION, "dataloads", registry=registry)
        async def load(namespace: str | None, name: str | None, **_: Any) -> None:
            self._due.add((LOAD, Key(namespace or "", name or "")))

        @kopf.on.event("v1", "persistentvolumeclaims", registry=registry, labels=marked)
        @kopf.on.event("apps", "v1", "daemonsets", registry=registry, labels=marked)
        async def made(annotations: Mapping[str, str], **_: Any) -> None:
            self._look_at_owner(annotations)

        @kopf.on.event("apps", "v1", "daemonsets", registry=registry)
        async def plugin(namespace: str | None, name: str | None, **_: Any) -> None:
            if (namespace, name) == (self._release.namespace, self._release.plugin):
                self._due.add((PLUGIN, Key(namespace or "", name or "")))

        @kopf.on.event("v1", "pods", registry=registry)
        async def pod(event: Mapping[str, Any], annotations: Mapping[str, str], **_: Any) -> None:
            self._look_at_owner(annotations)
            for key in self._uses.note(event["object"], gone=event["type"] == "DELETED"):
                self._dataset_changed(key)

        return registry

    def _dataset_changed(self, key: Key) -> None:
        self._due.add((DATASET, key))

    def _look_at_owner(self, annotations: Mapping[str, str]) -> None:
        namespace, slash, name = annotations.get(DATASET_ANNOTATION, "").partition("/")
        if slash:
            self._dataset_changed(Key(namespace, name))


class RemoteWorker:
    """A worker over its API."""

    def __init__(self, url: str, token: str, trust: Trust | None = None) -> None:
        authorities, name = trust or ("", "")
        self._client = RemoteClient(
            url, token=token, authorities=authorities, server_name=name, timeout=PATIENCE
        )

    def status(self) -> Mapping[str, Any]:
        return self._client.status()

    def load(self, path: str, *, globs: tuple[str, ...], bandwidth: int, verify: bool) -> str:
        return self._client.load(LoadRequest(path, globs=globs, bandwidth=bandwidth, verify=verify))

    def announce(self, files: tuple[str, ...]) -> str:
        return self._client.load(LoadRequest(files=files, order=True))

    def load_status(self, job: str) -> Mapping[str, Any]:
        return asdict(self._client.load_status(job))

    def load_cancel(self, job: str) -> None:
        self._client.load_cancel(job)


def _connection(configured: client.Configuration) -> kopf.ConnectionInfo:
    """How kopf reaches the API: as the client does. Asked again when a token is refused."""
    header = configured.get_api_key_with_prefix("BearerToken", "authorization") or ""
    scheme, _, token = header.rpartition(" ")
    return kopf.ConnectionInfo(
        server=configured.host,
        ca_path=configured.ssl_ca_cert,
        insecure=not configured.verify_ssl,
        scheme=scheme or ("Bearer" if token else None),
        token=token or None,
        certificate_path=configured.cert_file,
        private_key_path=configured.key_file,
    )
