"""A node's CacheNode: what stands in it, and when it is worth a write; a fake API that counts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi import cachenode
from csi.accountant import Holding
from csi.cachenode import AT_MOST, Held, is_worth_it, status
from csi.housekeeping import Housekeeping
from csi.residents import Register, Roots
from csi.tmpfs import FakeMemory
from datacache.clock import VirtualClock
from datacache.errors import ClusterError
from datacache.kube.release import Name
from datacache.model import GiB, MiB

NODE = {"metadata": {"name": "n1", "uid": "node-uid"}}


def holding(uid: str, cached: int, dirty: int = 0, total: int = 0) -> Holding:
    return Holding(uid, "team", f"d{uid}", cached, dirty, total, alive=True)


def test_what_stands_in_it() -> None:
    """Each Dataset's bytes, of them those that are not in the bucket, and what part of it that is."""
    held = Held("u9", "team", "gone", "x" * 300)
    found = status([holding("u2", GiB, dirty=5, total=4 * GiB), holding("u1", MiB, -1)], [held], now="T")
    assert found == {
        "observedAt": "T",
        "count": 2,
        "datasets": [
            {"uid": "u1", "namespace": "team", "name": "du1", "cached": MiB, "dirty": 0},
            {"uid": "u2", "namespace": "team", "name": "du2", "cached": GiB, "dirty": 5,
             "cachedPercentage": 25},
        ],
        "held": [{"uid": "u9", "namespace": "team", "name": "gone", "reason": "x" * 256}],
        "shown": {"cached": "1.0 GiB"},
    }  # fmt: skip


def test_of_too_many_those_that_hold_most() -> None:
    """The object has room for so many."""
    found = status([holding(f"u{i:03}", i) for i in range(300)], [], now="T")
    assert len(found["datasets"]) == cachenode.MOST and found["count"] == 300
    assert min(each["cached"] for each in found["datasets"]) == 44


@pytest.mark.parametrize(
    ("before", "after", "worth"),
    [
        ([], [], False),
        ([], [("a", 0, 0)], True),
        ([("a", 0, 0)], [], True),
        ([("a", 100, 0)], [("b", 100, 0)], True),
        ([("a", 1000, 0)], [("a", 1049, 0)], False),
        ([("a", 1000, 0)], [("a", 1050, 0)], True),
        ([("a", 1000, 0)], [("a", 950, 0)], True),
        ([("a", 1000, 0)], [("a", 951, 0)], False),
        ([("a", 0, 0)], [("a", 1, 0)], True),
        ([("a", 1, 0)], [("a", 0, 0)], True),
        ([("a", 1000, 0)], [("a", 1000, 1)], True),
        ([("a", 1000, 1000)], [("a", 1000, 1001)], False),
    ],
)
def test_when_it_is_worth_a_write(before: list[Any], after: list[Any], worth: bool) -> None:
    """A Dataset that came or went, or an amount that changed by a twentieth."""
    old = status([holding(*each) for each in before], [], now="yesterday")
    assert is_worth_it(old, status([holding(*each) for each in after], [], now="now")) is worth


def test_one_that_is_held_is_worth_a_write() -> None:
    """Somebody should look at it."""
    held = Held("u9", "team", "gone", "why")
    assert is_worth_it(status([], [], now=""), status([], [held], now=""))
    assert not is_worth_it(status([], [held], now=""), status([], [held], now="later"))


holdings_ = st.lists(
    st.builds(holding, st.sampled_from("abcd"), st.integers(0, 10**6), st.integers(-1, 10**6), st.just(100)),
    unique_by=lambda each: each.uid,
)


@given(holdings_)
def test_the_same_is_never_worth_a_write(found: list[Holding]) -> None:
    """Whatever it is."""
    assert not is_worth_it(status(found, [], now="a"), status(found, [], now="b"))


class FakeApi:
    """Objects by name; `writes` are those that were asked for. It fails while `away`."""

    def __init__(self) -> None:
        self.objects: dict[Name, dict[str, Any]] = {Name("v1", "Node", "", "n1"): NODE}
        self.writes: list[tuple[str, Mapping[str, Any]]] = []
        self.gone: dict[str, bool] = {}
        self.asked: list[str] = []
        self.away = False

    def get(self, name: Name) -> dict[str, Any] | None:
        self._check()
        return self.objects.get(name)

    def apply(self, obj: Mapping[str, Any], *, part: str = "") -> dict[str, Any]:
        self._check()
        name = Name(obj["apiVersion"], obj["kind"], "", obj["metadata"]["name"])
        if part and name not in self.objects:
            raise ClusterError("not found", status=404, about=name.name)
        self.writes.append((part, obj))
        new = self.objects.setdefault(name, {"metadata": {}})
        new |= {key: value for key, value in obj.items() if key != "metadata"}
        return new

    def is_gone(self, name: Name, uid: str) -> bool:
        self._check()
        self.asked.append(uid)
        return self.gone[uid]

    def _check(self) -> None:
        if self.away:
            raise ClusterError("the API does not answer")


class Accounts:
    def __init__(self) -> None:
        self.found: list[Holding] | None = None

    def holdings(self) -> list[Holding] | None:
        return self.found


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def accounts() -> Accounts:
    return Accounts()


@pytest.fixture
def keeping(api: FakeApi, accounts: Accounts, clock: VirtualClock, tmp_path: Path) -> Housekeeping:
    return Housekeeping(api, "n1", Register(Roots(str(tmp_path))), accounts, FakeMemory(), clock=clock)


def test_it_is_written_when_something_changes(
    keeping: Housekeeping, api: FakeApi, accounts: Accounts, clock: VirtualClock
) -> None:
    """Once made, with its Node as its owner; from then on its status alone, at most every 30 s, and nothing
    while nothing changes."""
    keeping.tell()
    assert api.writes == [], "nothing is known yet"
    accounts.found = [holding("a", 1000)]
    keeping.tell()
    (made, written) = api.writes
    assert made[1]["metadata"] == {
        "name": "n1",
        "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "node-uid"}],
    }
    assert written[0] == "status" and written[1]["status"]["datasets"][0]["cached"] == 1000
    accounts.found = [holding("a", 2000)]
    clock.advance(AT_MOST - 1)
    keeping.tell()
    assert len(api.writes) == 2
    clock.advance(1)
    keeping.tell()
    assert len(api.writes) == 3
    for _ in range(100):
        clock.advance(60)
        keeping.tell()
    assert len(api.writes) == 3


def test_a_plugin_that_begins_anew_writes_nothing_that_stands_there(
    keeping: Housekeeping, api: FakeApi, accounts: Accounts, clock: VirtualClock, tmp_path: Path
) -> None:
    """It reads first."""
    accounts.found = [holding("a", 1000)]
    keeping.tell()
    other = Housekeeping(api, "n1", Register(Roots(str(tmp_path))), accounts, FakeMemory(), clock=clock)
    other.tell()
    assert len(api.writes) == 2


def test_a_node_that_holds_nothing_writes_nothing(
    keeping: Housekeeping, api: FakeApi, accounts: Accounts
) -> None:
    """Most nodes of most clusters."""
    accounts.found = []
    keeping.tell()
    assert api.writes == []


def test_an_api_that_is_away(
    keeping: Housekeeping, api: FakeApi, accounts: Accounts, clock: VirtualClock
) -> None:
    """What could not be written is written later; an object that somebody deleted is made again."""
    accounts.found = [holding("a", 1000)]
    api.away = True
    with pytest.raises(ClusterError):
        keeping.tell()
    api.away = False
    keeping.tell()
    assert len(api.writes) == 2
    del api.objects[Name(cachenode.OURS, "CacheNode", "", "n1")]
    accounts.found = [holding("a", 3000)]
    clock.advance(AT_MOST)
    with pytest.raises(ClusterError):
        keeping.tell()
    clock.advance(AT_MOST)
    keeping.tell()
    assert [part for part, _ in api.writes[2:]] == ["", "status"]
    api.objects.pop(Name("v1", "Node", "", "n1"))
    accounts.found = []
    clock.advance(AT_MOST)
    with pytest.raises(ClusterError, match="no Node n1"):
        keeping.tell()
