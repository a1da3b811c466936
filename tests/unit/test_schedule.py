"""What may be sent when: tables for the rules, and the plan held against one look at everything."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.model import ObjectInfo, Version
from datacache.writing.journal import Op, OpKind
from datacache.writing.schedule import Plan, needed, runnable


def put(seq: int, key: str, *, ino: int = 0, barrier: bool = False, origin: str = "", due: bool = True) -> Op:
    info = ObjectInfo(origin, 1, Version("e")) if origin else None
    return Op(
        seq, f"id{seq}.0", OpKind.PUT, ino or seq, 0, key, barrier, landing=0 if origin else seq, origin=info,
        since=1.0 if due else 0.0,
    )  # fmt: skip


def delete(seq: int, key: str, *, ino: int = 0, barrier: bool = False) -> Op:
    return Op(seq, f"id{seq}.0", OpKind.DELETE, ino, 0, key, barrier, since=1.0)


TABLE = {
    "files go side by side": ([put(1, "a"), put(2, "b")], (), [1, 2]),
    "what is under way is not begun again": ([put(1, "a"), put(2, "b")], (1,), [2]),
    "one key after the other": ([put(1, "a"), delete(2, "a"), put(3, "a")], (), [1]),
    "... also while the first is under way": ([put(1, "a"), delete(2, "a")], (1,), []),
    "an origin is a key": ([put(1, "a"), put(2, "b", origin="a")], (), [1]),
    "what is read is not replaced before": ([put(1, "b", origin="a"), put(2, "a")], (), [1]),
    "a barrier waits for all": ([put(1, "a"), put(2, "b", barrier=True), put(3, "c")], (), [1, 3]),
    "... and nobody for it": ([put(1, "a", barrier=True), put(2, "b")], (), [1, 2]),
    "... but the next": ([put(1, "a", barrier=True), put(2, "b", barrier=True)], (), [1]),
    "what is not closed is not due": ([put(1, "a", due=False)], (), []),
    "... and no barrier waits for it": ([put(1, "a", due=False), put(2, "b", barrier=True)], (), [2]),
    "... but its key does": ([put(1, "a", due=False), delete(2, "a")], (), []),
    "an old name goes when the new one is there": (
        [put(1, "new", ino=7, origin="old", barrier=True), delete(2, "old", ino=7)], (), [1],
    ),
    "... wherever that stands": ([delete(1, "old", ino=7), put(2, "new", ino=7)], (), [2]),
    "... closed or not": ([delete(1, "old", ino=7), put(2, "new", ino=7, due=False)], (), []),
    "... and no barrier waits for the old one": (
        [delete(1, "old", ino=7), put(2, "x", barrier=True), put(3, "new", ino=7)], (), [2, 3],
    ),
    "... least of all that of the new one": (
        [delete(1, "old", ino=7), put(2, "new", ino=7, origin="old", barrier=True)], (), [2],
    ),
    "what is put under the name that goes is put after": (
        [delete(1, "a", ino=7), put(2, "a", ino=7)], (), [1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_rules(name: str) -> None:
    ops, running, expected = TABLE[name]
    assert [op.seq for op in runnable(ops, running)] == expected, name


def test_what_is_parked_waits_and_no_barrier_for_it() -> None:
    ops = [put(1, "a"), put(2, "b", barrier=True), delete(3, "a")]
    assert [op.seq for op in runnable(ops, (), parked={1})] == [2]


def test_in_the_order_of_closes_puts_go_one_by_one() -> None:
    ops = [put(1, "a"), put(2, "b"), delete(3, "c")]
    assert [op.seq for op in runnable(ops, (), closes=True)] == [1, 3]


def test_what_has_to_be_done_before_others() -> None:
    ops = [
        put(1, "a"), put(2, "b"), put(3, "c", barrier=True), put(4, "d"), put(5, "e", origin="d"),
        delete(6, "f", ino=9), put(7, "g", ino=9), put(8, "h"),
    ]  # fmt: skip
    assert needed(ops, {2}) == {2}
    assert needed(ops, {3}) == {1, 2, 3}, "a barrier"
    assert needed(ops, {5}) == {4, 5}, "a key"
    assert needed(ops, {6}) == {6, 7}, "the new name"
    assert needed(ops, {2}, closes=True) == {1, 2}


KEYS = st.sampled_from("abcd")
INOS = st.integers(0, 3)


@st.composite
def operations(draw: st.DrawFn, seq: int) -> Op:
    kind = draw(st.sampled_from(OpKind))
    origin = ObjectInfo(draw(KEYS), 1, Version("e")) if kind is OpKind.PUT and draw(st.booleans()) else None
    return Op(
        seq, f"id{draw(st.integers(0, 3))}", kind, draw(INOS), draw(st.integers(0, 1)), draw(KEYS),
        draw(st.sampled_from([False, False, True])), origin=origin,
        since=draw(st.sampled_from([1.0, 1.0, 0.0])),
    )  # fmt: skip


@given(st.data(), st.booleans())
def test_the_plan_says_what_one_look_at_everything_does(data: st.DataObject, closes: bool) -> None:
    """... and whatever becomes free is among its news."""
    plan = Plan(closes=closes)
    ops: dict[int, Op] = {}
    parked: set[int] = set()
    known: set[int] = set()
    seq = 0
    for _ in range(data.draw(st.integers(1, 25))):
        step = data.draw(st.sampled_from(["add", "add", "add", "edit", "remove", "remove", "park"]))
        if step == "add" or not ops:
            seq += 1
            ops[seq] = data.draw(operations(seq))
            plan.put(ops[seq])
        elif step == "edit":
            changed = data.draw(st.sampled_from(sorted(ops)))
            ops[changed] = data.draw(operations(changed))
            plan.put(ops[changed])
        elif step == "remove":
            gone = data.draw(st.sampled_from(sorted(ops)))
            assert plan.remove(gone) == ops.pop(gone)
            parked.discard(gone)
            known.discard(gone)
        else:
            parked = set(data.draw(st.lists(st.sampled_from(sorted(ops)), max_size=2)))
        plan.park(parked)
        free = {op.seq for op in runnable(list(ops.values()), (), parked=parked, closes=closes)}
        assert {one for one in ops if plan.may(one)} == free
        known = (known | set(plan.news())) & ops.keys()
        assert free <= known, "nobody was told of it"


@given(st.data())
def test_all_gets_done_and_each_key_in_order(data: st.DataObject) -> None:
    """With what a rename leaves behind after the new name, as the overlay has it."""
    ops: list[Op] = []
    for ino in range(1, data.draw(st.integers(1, 8)) + 1):
        name = data.draw(KEYS)
        if data.draw(st.booleans()):
            ops.append(put(len(ops) + 1, f"{name}{ino}", ino=ino, origin=f"old{ino}", barrier=True))
            ops.append(delete(len(ops) + 1, f"old{ino}", ino=ino))
        else:
            ops.append(put(len(ops) + 1, name, ino=ino))
            if data.draw(st.booleans()):
                ops.append(delete(len(ops) + 1, name))
    left, done = list(ops), []
    while left:
        ready = runnable(left, ())
        assert ready, f"nothing may go any more: {left}"
        chosen = data.draw(st.sampled_from(ready))
        done.append(chosen)
        left.remove(chosen)
    for key in {op.key for op in ops}:
        seqs = [op.seq for op in done if op.key == key]
        assert seqs == sorted(seqs)


@pytest.mark.parametrize("kind", ["files", "renames", "one key"])
def test_a_decision_does_not_take_longer_because_much_waits(kind: str) -> None:
    count = 100_000
    plan = Plan()
    for seq in range(1, count + 1):
        if kind == "files":
            plan.put(put(seq, f"f{seq}"))
        elif kind == "renames":
            ino = (seq + 1) // 2
            half = put(seq, f"n{ino}", ino=ino, origin=f"o{ino}", barrier=True)
            plan.put(half if seq % 2 else delete(seq, f"o{ino}", ino=ino))
        else:
            plan.put(put(seq, "k"))
    list(plan.news())
    began, slowest = time.process_time(), 0.0
    for seq in range(1, 1001):
        before = time.process_time()
        assert plan.may(seq)
        plan.remove(seq)
        assert plan.may(seq + 1)
        assert len(list(plan.news())) < 20
        slowest = max(slowest, time.process_time() - before)
    assert (time.process_time() - began) / 1000 < 0.002, "on average"
    assert slowest < 0.1
