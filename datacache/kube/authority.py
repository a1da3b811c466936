"""
The authority of a release, kept in a Secret of its namespace, and made anew before it ends.

Only the holder of the Lease makes one, so that there is one; who finds that another was faster takes that.
What stands in the Secret is believed for a minute, so that a look costs no call of its own.
"""

import base64
import threading
from typing import Any

from datacache.clock import Clock
from datacache.errors import Conflicting
from datacache.kube.api import Api
from datacache.kube.certificates import Authority, Pair, is_good_authority, make_authority
from datacache.kube.release import Name, Release

BELIEVED = 60.0
"""Seconds for which what stood in the Secret is believed."""

Object = dict[str, Any]


class Authorities:
    """Thread-safe. `_known` and when it was read are guarded by the lock, which is held while it is read, so
    that one thread asks, or makes one, and the others wait for it."""

    def __init__(self, api: Api, release: Release, *, clock: Clock) -> None:
        self._api, self._clock = api, clock
        self._name = Name("v1", "Secret", release.namespace, "datacache-ca")
        self._lock = threading.Lock()
        self._known: Authority | None = None
        self._read = float("-inf")

    def __repr__(self) -> str:
        return f"<Authorities {self._name.namespace}/{self._name.name}>"

    def current(self) -> Authority:
        """The one that signs, made or renewed where that is due. Raises ClusterError."""
        with self._lock:
            found = self._believed()
            if found is None or not is_good_authority(found, self._clock.wall()):
                found = self._known = self._found_or_made()
            return found

    def trusted(self) -> str:
        """Certificates of those that sign, or did, in PEM; empty where there are none. It makes nothing: who
        only asks workers need not be allowed to. Raises ClusterError."""
        with self._lock:
            found = self._believed()
        return found.trusted(self._clock.wall()) if found is not None else ""

    def _believed(self) -> Authority | None:
        """What stands in the Secret, or stood there a moment ago. Under the lock."""
        now = self._clock.monotonic()
        if self._known is None or now - self._read >= BELIEVED:
            self._known, self._read = read_authority(self._api.get(self._name)), now
        return self._known

    def _found_or_made(self) -> Authority:
        for _ in range(3):
            secret = self._api.get(self._name)
            found = read_authority(secret)
            if found is not None and is_good_authority(found, self._clock.wall()):
                return found
            made = make_authority(self._clock.wall(), found)
            try:
                self._keep(made, secret)
            except Conflicting:
                continue
            return made
        raise Conflicting(f"the Secret {self._name.name} changes all the time", status=409)

    def _keep(self, authority: Authority, there: Object | None) -> None:
        data = {name: base64.b64encode(text.encode()).decode() for name, text in _texts(authority).items()}
        if there is not None:
            version = {"resourceVersion": there["metadata"]["resourceVersion"]}
            self._api.merge(self._name, {"metadata": version, "data": data})
            return
        labels = {"app.kubernetes.io/managed-by": "datacache"}
        metadata = {"namespace": self._name.namespace, "name": self._name.name, "labels": labels}
        self._api.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque",
                          "data": data})  # fmt: skip


def _texts(authority: Authority) -> dict[str, str]:
    return {
        "ca.crt": authority.pair.certificate,
        "ca.key": authority.pair.key,
        "before.crt": authority.before,
    }


def read_authority(secret: Object | None) -> Authority | None:
    """The authority in `secret`; None where there is none, or what stands there is none."""
    try:
        data = (secret or {})["data"]
        crt, key, before = (
            base64.b64decode(data[name]).decode("ascii") for name in ("ca.crt", "ca.key", "before.crt")
        )
    except (KeyError, TypeError, ValueError):
        return None
    return Authority(Pair(crt, key), before)
