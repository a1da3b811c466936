"""
What the node's plugin tells the API, and asks it: its CacheNode, and whether Datasets are still there.

A thread of its own, as the API may be slow or away, and disks are shared meanwhile (`accountant`). It may get
no answer at any time, and then does nothing: figures grow old, and directories stay.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from csi import cachenode
from csi.accountant import Holding
from csi.cachenode import AT_MOST, OURS, Held
from csi.residents import Register, Resident
from csi.sweeping import APART, Verdict, sweep
from csi.tmpfs import Memory
from datacache.clock import Clock
from datacache.errors import ClusterError, MountError
from datacache.kube.release import Name

log = logging.getLogger(__name__)

EVERY = 5.0
"""Seconds between two rounds."""
LOOK = 600.0
"""Seconds after which it is asked again whether a Dataset without a worker here is still there."""

Object = dict[str, Any]


class Api(Protocol):
    """The part of `kube.api.Api` that is used. Each raises ClusterError."""

    def get(self, name: Name) -> Object | None:
        """The object, or None where there is none."""

    def apply(self, obj: Object, *, part: str = "") -> Object:
        """Have the fields of `obj` be as they are in it; `part`: a subresource."""

    def is_gone(self, name: Name, uid: str) -> bool:
        """Whether that very object is no more."""


class Holdings(Protocol):
    """Who knows what this node holds."""

    def holdings(self) -> Sequence[Holding] | None:
        """What it is; None: not known yet."""


@dataclass
class _Look:
    """What was heard of one Dataset."""

    due: float
    verdict: Verdict = field(default_factory=Verdict)
    alive: bool = True


class Housekeeping:
    """Acts for the node called `node` until it is told to stop. One thread."""

    def __init__(
        self, api: Api, node: str, register: Register, accounts: Holdings, memory: Memory, *, clock: Clock
    ) -> None:  # fmt: skip
        self._api, self._node, self._register, self._accounts = api, node, register, accounts
        self._memory, self._clock = memory, clock
        self._written: Mapping[str, Any] | None = None
        """The status that stands there; None: it was not read yet."""
        self._may_write = float("-inf")
        self._looks: dict[str, _Look] = {}
        self._held: dict[str, Held] = {}
        self._told: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Housekeeping of {self._node}>"

    def run(self, stop: threading.Event) -> None:
        """Act until `stop` is set."""
        while not self._clock.wait(stop, EVERY):
            for step in (self.sweep, self.tell):
                try:
                    step()
                    self._told.pop(step.__name__, None)
                except ClusterError as error:
                    self._say(step.__name__, str(error))
                except Exception:
                    log.exception("the node's housekeeping failed; it goes on")

    # ---- the CacheNode ----------------------------------------------------------------------------

    def tell(self) -> None:
        """Write this node's CacheNode, if that is worth it. Raises ClusterError."""
        holdings = self._accounts.holdings()
        if holdings is None:
            return
        name = Name(OURS, "CacheNode", "", self._node)
        if self._written is None:
            self._written = (self._api.get(name) or {}).get("status") or {}
        now = self._clock.monotonic()
        if now < self._may_write:
            return
        at = datetime.fromtimestamp(self._clock.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        after = cachenode.status(holdings, list(self._held.values()), now=at)
        if not cachenode.is_worth_it(self._written, after):
            return
        node = self._api.get(Name("v1", "Node", "", self._node))
        if node is None:
            raise ClusterError(f"there is no Node {self._node}: its CacheNode is not written", status=404)
        self._may_write = now + AT_MOST
        before, self._written = self._written, None  # what stands there is not known until it is done
        obj = cachenode.cache_node(self._node, node["metadata"]["uid"])
        if not before:
            self._api.apply(obj)
        self._api.apply(
            {"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": {"name": self._node},
             "status": after}, part="status",
        )  # fmt: skip
        self._written = after

    # ---- what is gone -----------------------------------------------------------------------------

    def sweep(self) -> None:
        """Ask after Datasets that have no worker here, and remove what is left of those that are no more.
        Raises ClusterError."""
        holdings = self._accounts.holdings()
        if holdings is None:
            return
        alive = {each.uid for each in holdings if each.alive}
        residents = {resident.uid: resident for resident in self._register.residents()}
        self._looks = {uid: look for uid, look in self._looks.items() if uid in residents}
        self._held = {uid: held for uid, held in self._held.items() if uid in residents}
        now = self._clock.monotonic()
        for uid, resident in residents.items():
            look = self._looks.setdefault(uid, _Look(due=now))
            if look.alive != (uid in alive):
                look.alive, look.due = uid in alive, now  # its worker has just come, or ended
            if look.alive:
                look.verdict.hear(False, now)
            elif now >= look.due:
                look.due = now + LOOK
                self._look(resident, look, now)

    def _look(self, resident: Resident, look: _Look, now: float) -> None:
        look.due = now + APART  # should the API not answer
        gone = self._api.is_gone(Name(OURS, "Dataset", *resident.key), resident.uid)
        final = look.verdict.hear(gone, now)
        look.due = now + (APART if gone and not final else LOOK)
        if not gone:
            self._held.pop(resident.uid, None)
        if not final:
            return
        try:
            why = sweep(resident, self._memory)
        except (OSError, MountError) as error:
            why = str(error)
        if why:
            self._held[resident.uid] = Held(resident.uid, *resident.key, why)
            self._say(
                resident.uid,
                "Dataset {}/{} is no more, and its directories stay: {}".format(*resident.key, why),
            )

    def _say(self, what: str, text: str) -> None:
        """Once, until it is well again."""
        if self._told.get(what) != text:
            self._told[what] = text
            log.warning("%s", text)
