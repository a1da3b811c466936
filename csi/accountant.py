"""
The accountant of a node: what each Dataset here has and does, how much it may have, and its tmpfs.

Every second it looks for tiers that wait for a tmpfs (`tmpfs`); every ten it asks all workers how they are,
divides the disks anew (`accounting`) and tells them their leases, which hold for some rounds: a worker
without an accountant goes by its quota again, and a new accountant begins with what workers say. Copies of a
Dataset that has no worker are made fewer here (`idle`).

Workers are found by the sockets in their runtime directories, which outlive them: one that nobody listens at
means nothing. All are asked at once, and none is waited for beyond `PATIENCE`: one that hangs keeps what it
had, in the sums, and is asked again when it has answered.
"""

import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from csi import idle, tmpfs
from csi.accounting import IDLE, Claim, Disk, Lease, divide
from csi.residents import MOST, Register, Resident
from csi.tmpfs import Act, Memory
from datacache.clock import Clock
from datacache.cluster import premises
from datacache.cluster.client import ControlClient
from datacache.cluster.premises import Place
from datacache.errors import ControlError, DatacacheError, MountError

log = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two rounds."""
TTL = 120.0
"""Seconds for which a lease holds: a restart of the plugin, and some rounds in which a worker is slow."""
PATIENCE = 5.0
"""Seconds that workers may take to answer, all of them together."""
TEND = 1.0
"""Seconds between two looks for tiers that need a tmpfs."""
FORGOTTEN = 600.0
"""Seconds without a worker after which its tmpfs goes."""
STARTING = 60.0
"""Seconds for which a worker that has begun may not listen yet: nobody looks into its directories meanwhile,
which would be taken when it comes for them."""
_SOCKET = re.compile(r"[0-9]+-[0-9]*-[0-9a-f]{8}\.sock", re.ASCII)
"""What `cluster.registry` names the socket of a worker; others may lie beside it."""


class Worker(Protocol):
    """The part of a worker's API that is used here. Each raises DatacacheError."""

    def status(self) -> Mapping[str, Any]:
        """How it is."""

    def lease(self, tier: str, room: int, *, entries: int = 0, ttl: float) -> tuple[int, int]:
        """Let a tier have that much."""


@dataclass(frozen=True)
class Tier:
    """What a tier has."""

    name: str
    used: int
    entries: int
    pinned: int = 0
    full: bool = False


@dataclass(frozen=True)
class Heard:
    """What a worker says of itself, as far as it matters here."""

    tiers: tuple[Tier, ...]
    opens: int
    busy: bool
    """Whether a load job runs, or a file is open."""
    dirty: int
    """Bytes that are not in the bucket; -1: none, but something else is owed."""
    total: int
    """Bytes of the objects that it knows."""


def read_heard(said: Mapping[str, Any]) -> Heard:
    """What matters of a `status`. Raises ControlError when it is none."""
    try:
        writing = said.get("writing") or {}
        owed = int(writing.get("dirty_files", 0)) + int(writing.get("dirty_due", 0))
        owed += int(writing.get("dirty_unnoted", 0))
        dirty = max(0, int(writing.get("dirty_bytes", 0)))
        return Heard(
            tiers=tuple(
                Tier(
                    str(each["name"]), max(0, int(each["used"])), max(0, int(each["entries"])),
                    max(0, int(each.get("pinned", 0))), each["state"] == "full",
                )
                for each in said["tiers"]
            ),
            opens=int(said["reads"]["opens"]),
            busy=bool(said["reads"]["open_objects"])
            or any(job["state"] == "running" for job in said["loads"]),
            dirty=dirty or (-1 if owed else 0),
            total=max(0, int(said["index"]["bytes"])),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ControlError(f"that is no status of a worker ({error!r})") from error


@dataclass(frozen=True)
class Holding:
    """What this node holds of one Dataset: for its CacheNode."""

    uid: str
    namespace: str
    name: str
    cached: int
    dirty: int
    """As `Heard.dirty`."""
    total: int
    alive: bool
    """Whether somebody needs it here: a worker that answered of late, or a volume that is mounted."""


@dataclass
class _Account:
    """What is known of one Dataset."""

    tiers: dict[str, Tier] = field(default_factory=dict)
    opens: int = -1
    used_at: float = 0.0
    """By the clock: when it was in use last, as far as is known."""
    heard_at: float = float("-inf")
    dirty: int = 0
    total: int = 0
    asleep: bool = False
    """Nobody answered, and what lies there was looked at since."""


Asked = tuple[str, Heard]
"""The socket at which a worker answered, and what it said."""


class Accountant:
    """Acts until it is told to stop. `staged`: whether a volume of a Dataset (uid) is mounted here; `disk`:
    which disk a directory lies on, and how full it is; `connect` makes a worker of its socket.

    State: `_accounts` and `_leases` belong to the thread of `run`; `_holdings`, guarded by the lock, is for
    others. `_asked` are questions that were not answered in time: who hangs is asked one thing at a time.
    """

    def __init__(
        self, register: Register, memory: Memory, *, clock: Clock, staged: Callable[[str], bool],
        disk: Callable[[str], tuple[int, Disk] | None] | None = None,
        connect: Callable[[str], Worker] | None = None,
    ) -> None:  # fmt: skip
        self._register, self._memory, self._clock, self._staged = register, memory, clock, staged
        self._disk, self._connect = disk or disk_of, connect or _connect
        self._accounts: dict[str, _Account] = {}
        self._leases: dict[tuple[str, str], Lease] = {}
        self._asked: dict[str, Future[Any]] = {}
        self._sockets: dict[str, str] = {}
        self._told: dict[str, str] = {}
        self._lock = threading.Lock()
        self._holdings: tuple[Holding, ...] | None = None

    def __repr__(self) -> str:
        return f"<Accountant {len(self._accounts)} Datasets>"

    def run(self, stop: threading.Event) -> None:
        """Act until `stop` is set."""
        with ThreadPoolExecutor(MOST, "ask") as pool:
            due = self._clock.monotonic()
            while not stop.is_set():
                try:
                    residents = self._register.residents()
                    self.tend(residents)
                    if self._clock.monotonic() >= due:
                        due = self._clock.monotonic() + EVERY
                        self.round(residents, pool)
                except Exception:
                    log.exception("a round of the node's accounts failed; the next one comes all the same")
                self._clock.wait(stop, TEND)

    def holdings(self) -> tuple[Holding, ...] | None:
        """What this node holds, as of the last round; None: there was none yet."""
        with self._lock:
            return self._holdings

    # ---- disks ------------------------------------------------------------------------------------

    def round(self, residents: Sequence[Resident], pool: ThreadPoolExecutor) -> None:
        """Ask, divide, tell."""
        heard = self._ask(residents, pool)
        for resident in residents:
            self._note(resident, heard.get(resident.uid))
        known = {resident.uid for resident in residents}
        self._accounts = {uid: each for uid, each in self._accounts.items() if uid in known}
        disks, claims = self._claims(residents)
        self._leases = divide(disks, claims, self._leases)
        self._tell(residents, heard, pool)
        found = tuple(self._holding(resident) for resident in residents)
        with self._lock:
            self._holdings = found

    def _ask(self, residents: Sequence[Resident], pool: ThreadPoolExecutor) -> dict[str, Heard]:
        """What workers say, of those that answer in time."""
        answers = self._together({r.uid: partial(self._status, r) for r in residents}, pool)
        for uid, (socket, _) in answers.items():
            self._sockets[uid] = socket
        return {uid: heard for uid, (_, heard) in answers.items()}

    def _status(self, resident: Resident) -> Asked:
        failed: DatacacheError | None = None
        for socket in sockets(resident.run):
            try:
                return socket, read_heard(self._connect(socket).status())
            except DatacacheError as error:
                failed = error
        raise failed or ControlError(f"there is no socket in {resident.run}")

    def _together(
        self, questions: Mapping[str, Callable[[], Any]], pool: ThreadPoolExecutor
    ) -> dict[str, Any]:
        """The answers, by uid, of those that come within `PATIENCE`."""
        for uid in [uid for uid, asked in self._asked.items() if asked.done()]:
            del self._asked[uid]
        fresh = {uid: pool.submit(ask) for uid, ask in questions.items() if uid not in self._asked}
        _, late = wait(fresh.values(), PATIENCE)
        found = {}
        for uid, asked in fresh.items():
            if asked in late:
                self._asked[uid] = asked
                self._say(uid, f"Dataset {uid}: its worker has not answered for {PATIENCE:.0f} s")
                continue
            error = asked.exception()
            if error is None:
                found[uid] = asked.result()
                self._told.pop(uid, None)
            elif isinstance(error, DatacacheError):
                log.debug("Dataset %s: %s", uid, error)
            else:
                log.error("Dataset %s: %r", uid, error)
        return found

    def _note(self, resident: Resident, heard: Heard | None) -> None:
        now = self._clock.monotonic()
        account = self._accounts.get(resident.uid)
        if account is None:
            # Nobody knows when it was used: it is not the first to give way because we have just begun.
            account = self._accounts[resident.uid] = _Account(used_at=now)
        if heard is not None:
            if heard.busy or heard.opens != account.opens:
                account.used_at = now
            account.tiers = {tier.name: tier for tier in heard.tiers}
            account.opens, account.dirty, account.total = heard.opens, heard.dirty, heard.total
            account.heard_at, account.asleep = now, False
        elif not account.asleep and resident.uid not in self._asked:
            self._look_in(resident, account)
        # Under zero-request epochs a worker hears of nothing: a volume that is mounted is in use.
        if self._staged(resident.uid):
            account.used_at = now

    def _look_in(self, resident: Resident, account: _Account) -> None:
        """Nobody is there to ask."""
        if self._begun(resident, STARTING):
            return
        account.asleep = True
        for place in resident.places:
            found = None if self._lost(place) else idle.kept(place, clock=self._clock)
            if found is not None:
                account.tiers[place.name] = Tier(place.name, found.used, found.entries, found.pinned)
            elif self._lost(place):
                account.tiers.pop(place.name, None)
            else:
                account.asleep = False  # somebody has it: a worker that does not listen yet

    def _lost(self, place: Place) -> bool:
        """Whether it lies on a tmpfs that is not there."""
        return place.mounted and self._memory.size(os.path.dirname(place.path)) is None

    def _claims(self, residents: Sequence[Resident]) -> tuple[dict[int, Disk], list[Claim]]:
        now = self._clock.monotonic()
        disks: dict[int, Disk] = {}
        claims = []
        for resident in residents:
            account = self._accounts[resident.uid]
            for place in resident.places:
                # One that has a tmpfs of its own shares it with nobody.
                there = None if place.mounted else self._disk(os.path.dirname(place.path))
                tier = account.tiers.get(place.name)
                if there is None or tier is None:
                    continue
                disks[there[0]] = there[1]
                claims.append(
                    Claim(
                        resident.uid, place.name, there[0], place.quota, tier.used, tier.entries, tier.pinned,
                        tier.full, resident.priority, now - account.used_at,
                    )
                )  # fmt: skip
        return disks, claims

    def _tell(
        self, residents: Sequence[Resident], heard: Mapping[str, Heard], pool: ThreadPoolExecutor
    ) -> None:
        self._together(
            {r.uid: partial(self._lend, r) for r in residents if r.uid in heard}, pool
        )  # fmt: skip
        end = self._clock.monotonic() + PATIENCE
        for resident in residents:
            account = self._accounts[resident.uid]
            for place in resident.places if account.asleep else ():
                lease, tier = self._leases.get((resident.uid, place.name)), account.tiers.get(place.name)
                if lease is None or tier is None or tier.used <= lease.room:
                    continue
                if self._clock.monotonic() < end:
                    self._shrink(resident, place, lease.room, account)

    def _lend(self, resident: Resident) -> None:
        worker = self._connect(self._sockets[resident.uid])
        for place in resident.places:
            lease = self._leases.get((resident.uid, place.name))
            if lease is not None:
                worker.lease(place.name, lease.room, entries=lease.entries, ttl=TTL)

    def _shrink(self, resident: Resident, place: Place, room: int, account: _Account) -> None:
        before = account.tiers[place.name].used
        if self._begun(resident, STARTING):
            return
        left = idle.shrink(place, room, clock=self._clock)
        if left is None:
            account.asleep = False
            return
        account.tiers[place.name] = Tier(place.name, left.used, left.entries, left.pinned)
        if left.used < before:
            log.info("Dataset %s/%s has no worker here: %d bytes of its copies in %s gave way",
                     *resident.key, before - left.used, place.path)  # fmt: skip

    def _holding(self, resident: Resident) -> Holding:
        account = self._accounts[resident.uid]
        return Holding(
            resident.uid, *resident.key, cached=sum(tier.used for tier in account.tiers.values()),
            dirty=account.dirty, total=account.total,
            alive=not account.asleep or self._staged(resident.uid),
        )  # fmt: skip

    # ---- memory -----------------------------------------------------------------------------------

    def tend(self, residents: Sequence[Resident]) -> None:
        """Mount what tiers wait for, and take off what nobody has needed for long."""
        for resident in residents:
            for place in resident.places:
                if place.mounted:
                    self._tend(resident, place)

    def _tend(self, resident: Resident, place: Place) -> None:
        home = os.path.dirname(place.path)
        try:
            what = tmpfs.act(self._memory.size(home), place.quota, needed=self._needed(resident))
            if what is Act.MOUNT:
                self._memory.mount(home, place.quota)
            elif what is Act.RESIZE:
                self._memory.resize(home, place.quota)
            elif what is Act.UNMOUNT:
                self._memory.unmount(home)
            if what is not Act.NOTHING:
                log.info("Dataset %s/%s: tmpfs on %s: %s", *resident.key, home, what.value)
            self._told.pop(home, None)
        except MountError as error:
            self._say(home, f"Dataset {resident.key.namespace}/{resident.key.name}: {error}")

    def _needed(self, resident: Resident) -> bool:
        """Whether a worker is there, was of late, or has begun of late."""
        account = self._accounts.get(resident.uid)
        if account is None:
            return True  # it was not asked yet
        recent = self._clock.monotonic() - account.heard_at < FORGOTTEN
        return recent or self._begun(resident, FORGOTTEN) or not account.asleep or self._staged(resident.uid)

    def _begun(self, resident: Resident, seconds: float) -> bool:
        """Whether a worker has begun in the last so many seconds: it says so before it opens anything."""
        try:
            since = os.stat(os.path.join(resident.state, premises.NAME)).st_mtime
        except OSError:
            return False
        return 0 <= self._clock.wall() - since < seconds

    def _say(self, what: str, text: str) -> None:
        """Once, until it is well again."""
        if self._told.get(what) != text:
            self._told[what] = text
            log.warning("%s", text)


def sockets(run: str) -> list[str]:
    """Of workers, in their runtime directory, the newest first. Most of those that there are may be of dead
    ones."""
    found = []
    try:
        with os.scandir(run) as there:
            for entry in there:
                if _SOCKET.fullmatch(entry.name):
                    seen = entry.stat(follow_symlinks=False)
                    found += [(seen.st_mtime, entry.path)] if stat.S_ISSOCK(seen.st_mode) else []
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True)[:16]]


def disk_of(directory: str) -> tuple[int, Disk] | None:
    """The disk that a directory lies on: its number, and how full it is."""
    try:
        number, found = os.stat(directory).st_dev, os.statvfs(directory)
    except OSError:
        return None
    unit = found.f_frsize
    return number, Disk(found.f_blocks * unit, found.f_bavail * unit, found.f_files, found.f_favail)


def _connect(socket: str) -> Worker:
    return ControlClient(socket, timeout=PATIENCE)


__all__ = ["EVERY", "FORGOTTEN", "IDLE", "PATIENCE", "TTL", "Accountant", "Heard", "Holding", "read_heard"]
