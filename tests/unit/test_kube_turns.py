"""Which pod of the driver is exchanged when: each line of the decision, as a table."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.kube.turns import SETTLED, Driver, Seen, Turn, Worker, outdated, settled, turn

LONG = 100.0


def driver(node: str, revision: str = "old", **more: object) -> Driver:
    return replace(Driver(f"csi-{node}", f"uid-{node}", node, revision, LONG), **more)


def worker(node: str, **more: object) -> Worker:
    return replace(Worker(f"worker-{node}", node, LONG), **more)


def seen(*drivers: Driver, workers: tuple[Worker, ...] = (), **more: object) -> Seen:
    return replace(Seen("new", len(drivers), drivers, workers), **more)


def test_one_goes_and_the_next_when_its_follower_is_well() -> None:
    one, other = driver("a"), driver("b")
    assert turn(seen(one, other)).driver == one
    for follower in (
        driver("a", "old", ending=True),
        driver("a", "new", ready_for=-1.0),
        driver("a", "new", ready_for=SETTLED - 1),
    ):
        found = turn(seen(follower, other))
        assert found == Turn(None, "csi-a on node a is not ready yet")
    assert turn(seen(other, wanted=2)) == Turn(None, "1 of 2 nodes have the driver")
    assert turn(seen(driver("a", "new"), other)).driver == other
    assert turn(seen(driver("a", "new"), driver("b", "new"))) == Turn(None, "")


@pytest.mark.parametrize(
    ("of", "why"),
    [
        (worker("a", ready_for=-1.0), "worker worker-a on node a is not ready yet"),
        (worker("a", ready_for=SETTLED - 1), "worker worker-a on node a is not ready yet"),
        (worker("a", ending=True), "worker worker-a on node a is not ready yet"),
        (worker("a", rolling=True), "the workers of worker-a on node a are being exchanged"),
    ],
)
def test_a_driver_stays_while_a_worker_of_its_node_is_not_to_be_counted_on(of: Worker, why: str) -> None:
    """The plugin is rolled by the controller, never together with that node's workers."""
    assert turn(seen(driver("a"), workers=(of,))) == Turn(None, why)
    assert turn(seen(driver("a"), driver("b"), workers=(of,))).driver == driver("b"), "another node's turn"
    assert turn(seen(driver("b"), workers=(of,))).driver == driver("b")


def test_one_that_is_not_ready_holds_nothing_and_goes_first() -> None:
    broken = driver("b", ready_for=-1.0)
    unsteady = (worker("b", ready_for=-1.0),)
    assert turn(seen(driver("a"), broken, workers=unsteady)) == Turn(broken, "it is not ready")


def test_an_upgrade_that_is_no_good_stops_at_the_first_node() -> None:
    assert turn(seen(driver("a", "new", ready_for=-1.0), driver("b"), driver("c"))).driver is None


def test_nodes_that_do_not_answer_hold_up_nobody() -> None:
    gone = driver("a", ready_for=-1.0)
    assert turn(seen(gone, driver("b"), lost=frozenset("a"))).driver == driver("b")
    assert turn(seen(gone, lost=frozenset("a"))) == Turn(None, "")


def test_nobody_goes_while_it_is_not_known_what_is_wanted() -> None:
    assert turn(seen(driver("a"), revision="")) == Turn(None, "")
    assert outdated(seen(driver("a"), revision="")) == ()


def test_a_follower_is_settled_when_it_is_of_now_and_well() -> None:
    assert settled(seen(driver("a", "new")), "a")
    for other in (
        driver("a"), driver("b", "new"), driver("a", "new", ready_for=SETTLED - 1),
        driver("a", "new", ending=True),
    ):  # fmt: skip
        assert not settled(seen(other), "a")


TIMES = st.sampled_from([-1.0, 0.0, SETTLED, LONG])


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["old", "new"]), TIMES, st.booleans()),
             max_size=4, unique_by=lambda each: each[0]),
    st.lists(st.tuples(st.sampled_from("abcd"), TIMES, st.booleans(), st.booleans()), max_size=6),
)  # fmt: skip
def test_two_holders_of_a_mount_are_never_out_at_once(
    drivers: list[tuple[str, str, float, bool]], workers: list[tuple[str, float, bool, bool]]
) -> None:
    """Whatever is seen: a driver that is well goes only from a node whose workers are, and while all other
    drivers are."""
    now = seen(
        *(
            driver(node, revision, ready_for=ready, ending=ending)
            for node, revision, ready, ending in drivers
        ),
        workers=tuple(
            worker(node, ready_for=ready, ending=ending, rolling=rolling)
            for node, ready, ending, rolling in workers
        ),
    )
    chosen = turn(now).driver
    if chosen is None or chosen.ready_for < 0:
        return
    assert chosen.revision == "old" and not chosen.ending
    assert all(each.ready_for >= SETTLED and not each.ending for each in now.drivers)
    assert all(
        each.ready_for >= SETTLED and not each.ending and not each.rolling
        for each in now.workers
        if each.node == chosen.node
    )
