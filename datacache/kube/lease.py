"""
Which controller acts: the one that holds the Lease, and renews it.

By the rules of client-go: a Lease is taken over when it has not changed for its whole duration, by the clock
of who watches it, so that clocks need not agree. Who cannot renew it stops to act well before others begin.
"""

from datetime import UTC, datetime
from typing import Any

from datacache.clock import Clock
from datacache.errors import Conflicting
from datacache.kube.api import Api
from datacache.kube.release import Name

DURATION = 15
"""Seconds after which others take over, when it is not renewed."""
DEADLINE = 10.0
"""Seconds without a renewal after which the holder stops to act; the rest is for requests under way."""
EVERY = 4.0
"""Seconds between two tries, to take or to renew."""


class Lease:
    """The Lease called `name`, for the candidate called `me`. Not thread-safe."""

    def __init__(self, api: Api, name: Name, me: str, *, clock: Clock) -> None:
        self._api, self._name, self._me, self._clock = api, name, me, clock
        self._seen: object = None
        self._since = 0.0

    def __repr__(self) -> str:
        return f"<Lease {self._name.namespace}/{self._name.name} for {self._me}>"

    def hold(self) -> bool:
        """Take or renew it; whether it is ours now. Raises ClusterError."""
        lease = self._api.get(self._name)
        try:
            if lease is None:
                self._api.create(self._written({}, first=True))
                return True
            spec = lease.get("spec") or {}
            holder = spec.get("holderIdentity")
            if holder and holder != self._me and not self._expired(spec):
                return False
            self._api.replace(lease | self._written(lease, first=holder != self._me))
        except Conflicting:
            return False  # somebody else was faster
        return True

    def release(self) -> None:
        """Give it up, so that another need not wait, if it is ours."""
        lease = self._api.get(self._name)
        if lease is not None and (lease.get("spec") or {}).get("holderIdentity") == self._me:
            self._api.replace(lease | {"spec": lease["spec"] | {"holderIdentity": ""}})

    def _expired(self, spec: dict[str, Any]) -> bool:
        state, now = (spec.get("holderIdentity"), spec.get("renewTime")), self._clock.monotonic()
        if state != self._seen:
            self._seen, self._since = state, now
        return now - self._since >= float(spec.get("leaseDurationSeconds") or DURATION)

    def _written(self, lease: dict[str, Any], *, first: bool) -> dict[str, Any]:
        now = datetime.fromtimestamp(self._clock.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = dict(lease.get("spec") or {}) | {
            "holderIdentity": self._me, "leaseDurationSeconds": DURATION, "renewTime": now,
        }  # fmt: skip
        if first:
            spec |= {
                "acquireTime": now,
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + bool(lease),
            }
        metadata = lease.get("metadata") or {"namespace": self._name.namespace, "name": self._name.name}
        return {"apiVersion": self._name.api, "kind": self._name.kind, "metadata": metadata, "spec": spec}
