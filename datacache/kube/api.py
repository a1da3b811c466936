"""
The door to the official Kubernetes client: objects as the API gives them, by kind and name.

Every call is one request, in the calling thread, with a deadline; what fails is a ClusterError. Nothing is
remembered here, and nothing is tried again but what urllib3 does for connections that were closed. The
client's own classes for objects are not used: what we apply are plain values, and must arrive as they are.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import OpenApiException
from urllib3.exceptions import HTTPError

from datacache.errors import ClusterError, Conflicting, SettingError
from datacache.kube.release import GROUP, VERSION, Name

MANAGER = "datacache-controller"
"""The field manager: which fields of an object are ours. The controller's; the node's plugin has another."""
TIMEOUT = (5.0, 30.0)
"""Seconds to connect, and for the answer."""
MAX_EVENT = 1024
"""Characters of an event's message: what the API takes."""
PAGE = 500
"""Objects of one answer of a list."""

Object = dict[str, Any]

OURS = f"{GROUP}/{VERSION}"
_RESOURCES = {
    ("v1", "ConfigMap"): "configmaps",
    ("v1", "Secret"): "secrets",
    ("v1", "Service"): "services",
    ("v1", "PersistentVolume"): "persistentvolumes",
    ("v1", "PersistentVolumeClaim"): "persistentvolumeclaims",
    ("v1", "Pod"): "pods",
    ("v1", "Node"): "nodes",
    ("v1", "Event"): "events",
    ("v1", "Namespace"): "namespaces",
    ("v1", "ServiceAccount"): "serviceaccounts",
    ("apps/v1", "DaemonSet"): "daemonsets",
    ("apps/v1", "ControllerRevision"): "controllerrevisions",
    ("coordination.k8s.io/v1", "Lease"): "leases",
    (OURS, "Dataset"): "datasets",
    (OURS, "DataLoad"): "dataloads",
    (OURS, "CacheNode"): "cachenodes",
}


def configuration(kubeconfig: str = "") -> client.Configuration:
    """Where the API is, and who we are: by the file `kubeconfig`, or as a pod. Raises SettingError."""
    found = client.Configuration()
    try:
        if kubeconfig:
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=kubeconfig, client_configuration=found, persist_config=False
            )
        else:
            config.load_incluster_config(client_configuration=found)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError, ValueError) as error:
        name = "kubeconfig" if kubeconfig else "service account"
        expected = "a kubeconfig that can be read" if kubeconfig else "to run in a pod, or --kubeconfig FILE"
        raise SettingError(name, kubeconfig, f"{expected} ({error})") from error
    return found


class Api:
    """The API of one cluster. Threads may share it."""

    def __init__(
        self, configured: client.Configuration, *, timeout: tuple[float, float] = TIMEOUT,
        manager: str = MANAGER,
    ) -> None:  # fmt: skip
        self._timeout, self._manager = timeout, manager
        self._client = client.ApiClient(configured)
        self._host = configured.host

    def __repr__(self) -> str:
        return f"<Api {self._host}>"

    def close(self) -> None:
        self._client.close()  # type: ignore[no-untyped-call]

    def get(self, name: Name) -> Object | None:
        """The object, or None where there is none."""
        try:
            return self._ask("GET", _path(name))
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    def is_gone(self, name: Name, uid: str) -> bool:
        """Whether the object `name` with this `uid` is no more: there is another of its name, or the API says
        that there is none of just this name. That it knows no such kind, or nothing at all, is a
        ClusterError: an answer that may be a mistake is none."""
        try:
            found = self._ask("GET", _path(name))
        except ClusterError as error:
            if error.status == 404 and error.about == name.name:
                return True
            raise
        return bool(found["metadata"]["uid"] != uid)

    def list(self, api: str, kind: str, *, namespace: str = "", labels: str = "") -> list[Object]:
        """All objects of a kind, in one namespace or (empty) all; of some labels."""
        found: list[Object] = []
        query = {"limit": str(PAGE)} | ({"labelSelector": labels} if labels else {})
        while True:
            page = self._ask("GET", _path(Name(api, kind, namespace, "")), query=query)
            found += page.get("items") or ()
            token = page.get("metadata", {}).get("continue")
            if not token:
                return found
            query["continue"] = token

    def apply(self, obj: Object, *, part: str = "", dry_run: bool = False) -> Object:
        """Have the fields of `obj` be as they are in it (server-side apply); fields of others stay. `part` is
        a subresource, such as status."""
        metadata = obj["metadata"]
        name = Name(obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"])
        query = {"fieldManager": self._manager, "force": "true", "fieldValidation": "Strict"}
        query |= {"dryRun": "All"} if dry_run else {}
        path = _path(name) + (f"/{part}" if part else "")
        return self._ask("PATCH", path, obj, kind="application/apply-patch+yaml", query=query)

    def create(self, obj: Object) -> Object:
        """Make `obj`. Raises Conflicting where there is one."""
        metadata = obj["metadata"]
        where = Name(obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), "")
        return self._ask("POST", _path(where), obj, query={"fieldManager": self._manager})

    def replace(self, obj: Object) -> Object:
        """Have the object be `obj`. Raises Conflicting when its resourceVersion is not that of now."""
        metadata = obj["metadata"]
        name = Name(obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"])
        return self._ask("PUT", _path(name), obj, query={"fieldManager": self._manager})

    def merge(self, name: Name, patch: Mapping[str, Any], *, part: str = "") -> Object:
        """Change what `patch` has (null removes). `part` is a subresource, such as status."""
        path = _path(name) + (f"/{part}" if part else "")
        query = {"fieldManager": self._manager}
        return self._ask("PATCH", path, patch, kind="application/merge-patch+json", query=query)

    def finalizers(self, obj: Object, finalizers: Sequence[str]) -> Object:
        """Have `obj` have these. Raises Conflicting when it has changed: another's is never overwritten."""
        metadata = obj["metadata"]
        name = Name(obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"])
        patch = {"metadata": {"finalizers": [*finalizers], "resourceVersion": metadata["resourceVersion"]}}
        return self.merge(name, patch)

    def token(self, account: Name, audience: str, *, seconds: int) -> tuple[str, str]:
        """A token by which `audience` knows a ServiceAccount, and when it ends (RFC 3339). The API may give
        it another life than `seconds`."""
        asked = {"audiences": [audience], "expirationSeconds": seconds}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": asked}
        said = self._ask("POST", f"{_path(account)}/token", body)["status"]
        return str(said["token"]), str(said["expirationTimestamp"])

    def post(
        self, obj: Object, kind: str, reason: str, message: str, *, now: str, once: bool = False
    ) -> None:
        """Post an event on `obj`, of `kind` Normal or Warning. `once`: raises Conflicting where one of this
        reason was posted like that before, as long as events are kept."""
        metadata = obj["metadata"]
        of = f"{metadata['uid']}/{reason}".encode()
        mark = hashlib.sha256(of).hexdigest()[:16] if once else secrets.token_hex(8)
        self.create({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "namespace": metadata["namespace"], "name": f"{metadata['name']}.{mark}",
            },
            "involvedObject": {
                "apiVersion": obj["apiVersion"], "kind": obj["kind"], "namespace": metadata["namespace"],
                "name": metadata["name"], "uid": metadata["uid"],
            },
            "type": kind, "reason": reason, "message": message[:MAX_EVENT],
            "source": {"component": self._manager}, "firstTimestamp": now, "lastTimestamp": now, "count": 1,
        })  # fmt: skip

    def delete(self, name: Name, *, uid: str, grace: int | None = None) -> None:
        """Delete the object of that `uid`; nothing where it has gone, or is another by now. `grace`: seconds
        that a pod has, when not its own."""
        body: Object = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        body |= {} if grace is None else {"gracePeriodSeconds": grace}
        try:
            self._ask("DELETE", _path(name), body)
        except ClusterError as error:
            if error.status not in (404, 409):
                raise

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        kind: str = "application/json",
        query: Mapping[str, str] | None = None,
    ) -> Object:
        headers = {"Accept": "application/json"} | ({"Content-Type": kind} if body is not None else {})
        # The client writes JSON by itself, and what it takes for something else only when it is a text.
        text = json.dumps(body) if body is not None and kind.endswith("yaml") else body
        try:
            request = self._client.param_serialize(
                method, path, query_params=list((query or {}).items()), header_params=headers, body=text,
                auth_settings=["BearerToken"],
            )  # fmt: skip
            answer = self._client.call_api(*request, _request_timeout=self._timeout)
            raw = answer.read()  # type: ignore[no-untyped-call]
        except (OpenApiException, HTTPError, OSError) as error:
            raise ClusterError(f"the API at {self._host} does not answer ({_reason(error)})") from error
        try:
            said = json.loads(raw)
        except ValueError as error:
            raise ClusterError(f"the API at {self._host} answers no JSON", status=answer.status) from error
        if 200 <= answer.status < 300:
            return dict(said)
        message = str(said.get("message") or answer.status) if isinstance(said, dict) else str(answer.status)
        raised = Conflicting if answer.status == 409 else ClusterError
        details = said.get("details") if isinstance(said, dict) else None
        about = str(details.get("name") or "") if isinstance(details, dict) else ""
        raise raised(" ".join(message.split()), status=answer.status, about=about)


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return " ".join(str(cause).split()) or type(error).__name__


def _path(name: Name) -> str:
    """The path of an object; of all of its kind where it has no name."""
    root = f"/api/{name.api}" if "/" not in name.api else f"/apis/{name.api}"
    where = f"/namespaces/{name.namespace}" if name.namespace else ""
    path = f"{root}{where}/{_RESOURCES[name.api, name.kind]}"
    return f"{path}/{name.name}" if name.name else path
