"""Directories of Datasets that are no more: when they go, in which order, and what keeps them."""

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from csi import sweeping
from csi.accountant import Holding
from csi.housekeeping import LOOK, Housekeeping
from csi.residents import Register, Resident, Roots
from csi.sweeping import APART, Verdict, sweep
from csi.tmpfs import FakeMemory, LinuxMemory
from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.cache.owner import take_lock
from datacache.clock import VirtualClock
from datacache.cluster import premises
from datacache.cluster.premises import Place, Premises
from datacache.errors import ClusterError, MountError
from datacache.model import GiB, MiB
from datacache.writing.journal import Journal
from datacache.writing.landing import FILES, MANAGED, Landing
from datacache.writing.opening import what_is_owed
from tests.conftest import AnnouncedLogs
from tests.contract.tier_suite import key, put
from tests.unit.test_cachenode import Accounts, FakeApi

UID = "0b9f4a4e-7c1e-4d39-9a55-0a2f4b1c9d10"
NEIGHBOUR = "0b9f4a4e-7c1e-4d39-9a55-0a2f4b1c9d11"


@pytest.mark.parametrize(
    ("heard", "final"),
    [
        ([(0, True), (APART, True)], True),
        ([(0, True), (APART - 1, True)], False),
        ([(0, True)], False),
        ([(0, True), (10, False), (APART, True)], False),
        ([(0, True), (10, False), (20, True), (20 + APART, True)], True),
        ([(0, None), (APART, True)], False),
        ([(0, True), (10, None), (APART, True)], True),
        ([(0, True), (APART, None)], False),
        ([(0, True), (APART, False)], False),
    ],
)
def test_when_a_dataset_is_gone(heard: list[tuple[float, bool | None]], final: bool) -> None:
    """When it was said twice, some time apart, and nothing else in between; no answer says nothing."""
    verdict = Verdict()
    assert [verdict.hear(gone, at) for at, gone in heard][-1] is final


def leave(tmp_path: Path, uid: str = UID, *, mem: bool = False) -> Resident:
    """A Dataset that has lived here: a tier on a disk with copies in it, a landing zone beside it, state and
    sockets, and perhaps a tier in memory."""
    ssd, mem_home = tmp_path / "ssd" / uid, tmp_path / "mem" / uid
    places = [Place("ssd:x", "ssd", f"{ssd}/cache", GiB)]
    if mem:
        places.append(Place("mem:x", "mem", f"{mem_home}/cache", MiB, True))
    said = Premises("team/imagenet", tuple(places), landing=f"{ssd}/landing")
    (tmp_path / "state" / uid / "index").mkdir(parents=True)
    (tmp_path / "state" / uid / "index" / "x.db").write_text("x")
    (tmp_path / "state" / uid / premises.NAME).write_text(json.dumps(asdict(said)))
    (tmp_path / "run" / uid).mkdir(parents=True)
    (tmp_path / "run" / uid / "1-2-00000000.sock").write_text("")
    tier = DirectoryTier(
        f"{ssd}/cache", Rules("ssd:x", GiB, MiB, reserve=0, dataset="d"), owner=Owner(1, "", ""),
        clock=VirtualClock(), keeper=False,
    )  # fmt: skip
    put(tier, key("a", MiB))
    tier.close()
    landing = Landing(f"{ssd}/landing", Owner(1, "", ""))
    Journal(landing.journal).close()
    landing.close()
    return resident(tmp_path, uid)


def resident(tmp_path: Path, uid: str = UID) -> Resident:
    return {each.uid: each for each in register(tmp_path).residents()}[uid]


def register(tmp_path: Path) -> Register:
    roots = Roots(
        str(tmp_path / "state"), str(tmp_path / "run"), (str(tmp_path / "ssd"), str(tmp_path / "mem"))
    )
    return Register(roots)


def left(tmp_path: Path, uid: str = UID) -> list[str]:
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob(uid))


def test_all_of_it_goes_and_nothing_else(tmp_path: Path) -> None:
    """Tiers, landing zone, state, sockets; not what is beside them, and not what a link leads to."""
    gone = leave(tmp_path)
    leave(tmp_path, NEIGHBOUR)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (tmp_path / "ssd" / UID / "cache" / "link").symlink_to(precious)
    (tmp_path / "state" / UID / "link").symlink_to(precious)
    assert sweep(gone, FakeMemory()) == ""
    assert left(tmp_path) == []
    assert (precious / "file").exists()
    assert left(tmp_path, NEIGHBOUR) == [f"{where}/{NEIGHBOUR}" for where in ("run", "ssd", "state")]
    assert sweep(gone, FakeMemory()) == "", "nothing is left to be removed, which is no error"


@pytest.mark.parametrize("at", range(9))
def test_a_kill_at_any_removal_is_gone_on_from(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note that says whose they are goes last: until then the rest is found again."""
    gone = leave(tmp_path)
    remove, count = sweeping._remove, [0]

    class Killed(BaseException):
        pass

    def removed(path: str) -> None:
        if count[0] == at:
            raise Killed
        count[0] += 1
        remove(path)

    monkeypatch.setattr(sweeping, "_remove", removed)
    try:
        sweep(gone, FakeMemory())
    except Killed:
        assert (tmp_path / "state" / UID / premises.NAME).exists()
    monkeypatch.setattr(sweeping, "_remove", remove)
    for each in register(tmp_path).residents():
        assert sweep(each, FakeMemory()) == ""
    assert left(tmp_path) == []


def file_lands(tmp_path: Path) -> None:
    (tmp_path / "ssd" / UID / "landing" / MANAGED / FILES / "7").write_bytes(b"a checkpoint")


def journal_says(statement: str) -> Callable[[Path], None]:
    def change(tmp_path: Path) -> None:
        path = tmp_path / "ssd" / UID / "landing" / MANAGED / "journal.db"
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(statement)

    return change


def journal_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "ssd" / UID / "landing" / MANAGED / "journal.db").write_bytes(b"x" * 5000)


def files_are_missing(tmp_path: Path) -> None:
    (tmp_path / "ssd" / UID / "landing" / MANAGED / FILES).rmdir()


NODE = (
    "INSERT INTO nodes (parent, name, kind, mount, key, generation, landing, xattrs, writers, orphan, synced)"
)
OWED = {
    "file": file_lands,
    "operation": journal_says(
        "INSERT INTO ops (id, kind, ino, mount, key, barrier, expected, landing, since, resume)"
        " VALUES ('x.0', 2, 0, 0, 'k', 0, '', 0, 1.0, '')"
    ),
    "node": journal_says(f"{NODE} VALUES (1, 'n', 2, 0, 'k', 0, 0, '', 1, 0, 0)"),
    "damaged": journal_is_damaged,
    "missing": files_are_missing,
}


@pytest.mark.parametrize("what", OWED)
def test_a_landing_zone_that_owes_something_is_never_removed(what: str, tmp_path: Path) -> None:
    """A file, an operation, a file of which only the journal knows, a journal that cannot be read: nothing of
    the Dataset goes then, and it is said what to do."""
    gone = leave(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    OWED[what](tmp_path)
    why = sweep(gone, FakeMemory())
    assert f"ssd/{UID}/landing holds" in why and "datacache recover" in why
    assert set(before) - {tmp_path / "ssd" / UID / "landing" / MANAGED / FILES} <= set(tmp_path.rglob("*"))


def test_directories_alone_owe_nothing(tmp_path: Path) -> None:
    """A directory without an object is here only; there is nothing of it for a bucket."""
    leave(tmp_path)
    journal_says(f"{NODE} VALUES (1, 'n', 1, 0, 'k', 0, 0, '', 0, 0, 0)")(tmp_path)
    assert what_is_owed(str(tmp_path / "ssd" / UID / "landing")) == ""
    assert what_is_owed(str(tmp_path / "nowhere")) == ""


@pytest.mark.parametrize("where", ["cache/datacache-cache", f"landing/{MANAGED}"])
def test_what_somebody_owns_stays(where: str, tmp_path: Path) -> None:
    """A worker that is on its way, or that nobody can ask."""
    gone = leave(tmp_path)
    at = os.open(tmp_path / "ssd" / UID / where, os.O_RDONLY)
    lock = take_lock("x", at, Owner(77, "", ""))
    os.close(at)
    assert "is in use" in sweep(gone, FakeMemory())
    assert (tmp_path / "ssd" / UID / "cache").exists()
    lock.close()
    assert sweep(gone, FakeMemory()) == ""


def test_what_is_mounted_stays(tmp_path: Path, logs: AnnouncedLogs) -> None:
    """Anything mounted in it that is not its own tmpfs."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a tmpfs")
    gone, memory = leave(tmp_path), LinuxMemory()
    for where in (f"state/{UID}/index", f"ssd/{UID}/cache"):
        memory.mount(str(tmp_path / where), MiB)
        assert f"something is mounted on {tmp_path}/{where}" in sweep(gone, memory)
        assert (tmp_path / "state" / UID / premises.NAME).exists()
        memory.unmount(str(tmp_path / where))
    assert sweep(gone, memory) == "" and left(tmp_path) == []


def test_its_own_tmpfs_is_taken_off(tmp_path: Path) -> None:
    """A real one; while somebody has a file in it open it stays, with all the rest."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a tmpfs")
    memory, home = LinuxMemory(), tmp_path / "mem" / UID
    memory.mount(str(home), MiB)
    gone = leave(tmp_path, mem=True)
    tier = DirectoryTier(
        f"{home}/cache", Rules("mem:x", MiB, MiB, reserve=0), owner=Owner(1, "", ""), clock=VirtualClock(),
        keeper=False,
    )  # fmt: skip
    tier.close()
    with open(home / "file", "w"), pytest.raises(MountError, match="busy"):
        sweep(gone, memory)
    assert len(left(tmp_path)) == 4
    assert sweep(gone, memory) == ""
    assert left(tmp_path) == [] and memory.size(str(home)) is None


# ---- when it is asked ----------------------------------------------------------------------------


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def keeping(api: FakeApi, clock: VirtualClock, tmp_path: Path) -> Housekeeping:
    accounts = Accounts()
    accounts.found = []
    return Housekeeping(api, "n1", register(tmp_path), accounts, FakeMemory(), clock=clock)


def living(keeping: Housekeeping, *, alive: bool) -> None:
    keeping._accounts.found = [Holding(UID, "team", "imagenet", 0, 0, 0, alive)]  # type: ignore[attr-defined]


def test_a_dataset_that_is_gone_is_swept(
    keeping: Housekeeping, api: FakeApi, clock: VirtualClock, tmp_path: Path
) -> None:
    """While its worker lives nobody asks; when that has ended twice, and then its directories go."""
    leave(tmp_path)
    api.gone[UID] = True
    living(keeping, alive=True)
    for _ in range(100):
        keeping.sweep()
        clock.advance(60)
    assert api.asked == []
    living(keeping, alive=False)
    keeping.sweep()
    assert api.asked == [UID] and left(tmp_path)
    clock.advance(APART - 1)
    keeping.sweep()
    assert api.asked == [UID]
    clock.advance(1)
    keeping.sweep()
    assert api.asked == [UID, UID] and left(tmp_path) == []


def test_a_dataset_that_is_there_is_asked_after_now_and_then(
    keeping: Housekeeping, api: FakeApi, clock: VirtualClock, tmp_path: Path
) -> None:
    """Its copies stay; and an idle node does not ask all the time."""
    leave(tmp_path)
    api.gone[UID] = False
    living(keeping, alive=False)
    for _ in range(int(10 * LOOK / 5)):
        keeping.sweep()
        clock.advance(5)
    assert len(api.asked) == 10 and left(tmp_path)


def test_no_answer_is_no_answer(
    keeping: Housekeeping, api: FakeApi, clock: VirtualClock, tmp_path: Path
) -> None:
    """An API that is away, or denies us, removes nothing, however long."""
    leave(tmp_path)
    living(keeping, alive=False)
    api.away = True
    for _ in range(100):
        clock.advance(LOOK)
        with pytest.raises(ClusterError):
            keeping.sweep()
    assert left(tmp_path)
    api.away, api.gone[UID] = False, False
    clock.advance(LOOK)
    keeping.sweep()
    assert left(tmp_path)


def test_what_has_to_stay_is_said(
    keeping: Housekeeping, api: FakeApi, clock: VirtualClock, tmp_path: Path, logs: AnnouncedLogs
) -> None:
    """In the log, once, and in the CacheNode; and it goes when nothing is owed any more."""
    logs.expect("is no more, and its directories stay")
    leave(tmp_path)
    file_lands(tmp_path)
    api.gone[UID] = True
    living(keeping, alive=False)
    for _ in range(10):
        keeping.sweep()
        clock.advance(LOOK)
    keeping.tell()
    ((_, _), (_, written)) = api.writes
    (held,) = written["status"]["held"]
    assert (held["uid"], held["name"]) == (UID, "imagenet") and "1 files" in held["reason"]
    (tmp_path / "ssd" / UID / "landing" / MANAGED / FILES / "7").unlink()
    keeping.sweep()
    assert left(tmp_path) == []
    assert len(logs.messages()) == 1


def test_a_worker_that_comes_back_ends_the_suspicion(
    keeping: Housekeeping, api: FakeApi, clock: VirtualClock, tmp_path: Path
) -> None:
    """Of a Dataset of the same uid: an API that was set back in time, say."""
    leave(tmp_path)
    api.gone[UID] = True
    living(keeping, alive=False)
    keeping.sweep()
    living(keeping, alive=True)
    clock.advance(APART)
    keeping.sweep()
    living(keeping, alive=False)
    keeping.sweep()
    assert left(tmp_path) and len(api.asked) == 2
