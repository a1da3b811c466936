"""The memory budget: admission, order, priorities, what is given up, and closing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from datacache.errors import Unavailable
from datacache.reading.budget import Budget, Grant


class Kept:
    """What may be given up: lengths, the read ones first."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.unread: list[int] = []

    def reclaim(self, shortfall: int, force: bool) -> int:
        freed = 0
        for store in (self.read, self.unread) if force else (self.read,):
            while store and freed < shortfall:
                freed += store.pop(0)
        return freed


@contextmanager
def asking(budget: Budget, *lengths: int, urgent: bool = True) -> Iterator[list[Grant | str]]:
    """Threads that ask for `lengths`, begun one after the other; what they got, in order."""
    got: list[Grant | str] = []
    threads = []
    for length in lengths:

        def ask(length: int = length) -> None:
            try:
                got.append(budget.acquire(length, urgent=urgent))
            except Unavailable as error:
                got.append(str(error))

        before = len(budget._urgent) + len(budget._patient) + len(got)
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        until(lambda before=before: len(budget._urgent) + len(budget._patient) + len(got) > before)
    yield got
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def until(condition: "object") -> None:
    """Let other threads run until `condition` holds."""
    pause = threading.Event()
    for _ in range(10_000):
        if condition():  # type: ignore[operator]
            return
        pause.wait(0.001)
    raise AssertionError("it never came to that")


@pytest.fixture
def kept() -> Kept:
    return Kept()


def test_a_request_is_accounted_twice_while_it_runs(kept: Kept) -> None:
    """A running request holds its answer in chunks and joined: two times its length."""
    budget = Budget(100, 4, kept.reclaim)
    grant = budget.acquire(20, urgent=True)
    assert (budget.used, budget.running) == (40, 1)
    grant.arrived(20)
    assert (budget.used, budget.running) == (20, 0)
    grant.release()
    assert (budget.used, budget.running, budget.peak) == (0, 0, 40)


def test_readers_are_admitted_in_the_order_in_which_they_came(kept: Kept) -> None:
    """First come, first served: a small request does not overtake a large one."""
    budget = Budget(100, 4, kept.reclaim)
    first = budget.acquire(40, urgent=True)
    with asking(budget, 30, 5) as got:
        assert got == [], "5 would have room, and waits behind 30"
        first.release()
        until(lambda: len(got) == 2)
    assert sorted(grant.amount for grant in got if isinstance(grant, Grant)) == [10, 60]


def test_a_request_larger_than_all_is_admitted_alone(kept: Kept) -> None:
    """What exceeds the budget runs when nothing else does."""
    budget = Budget(100, 4, kept.reclaim)
    small = budget.acquire(1, urgent=True)
    with asking(budget, 500) as got:
        assert got == []
        small.release()
    assert budget.used == 1000
    with asking(budget, 1) as late:
        assert late == []
        assert isinstance(got[0], Grant)
        got[0].release()


def test_a_full_set_of_requests_makes_others_wait(kept: Kept) -> None:
    """No more than the given number of requests runs, however small they are."""
    budget = Budget(10_000, 2, kept.reclaim)
    grants = [budget.acquire(1, urgent=True) for _ in range(2)]
    with asking(budget, 1) as got:
        assert got == []
        grants[0].arrived(1)
        until(lambda: got != [])
    assert budget.running == 2


def test_patient_requests_leave_room_for_readers(kept: Kept) -> None:
    """What is fetched ahead leaves one request and an eighth of the memory free."""
    budget = Budget(800, 3, kept.reclaim)
    grants = [budget.acquire(1, urgent=False) for _ in range(2)]
    with asking(budget, 1, urgent=False) as got:
        assert got == []
        budget.acquire(1, urgent=True).release()
        grants.pop().release()
    grants[0].release()
    for grant in got:
        assert isinstance(grant, Grant)
        grant.release()
    large = budget.acquire(345, urgent=False)
    with asking(budget, 10, urgent=False) as got:
        assert got == []
        reader = budget.acquire(10, urgent=True)
        large.release()
        reader.release()


def test_readers_go_before_those_who_came_earlier_but_are_patient(kept: Kept) -> None:
    """A waiting reader is admitted before any fetch ahead, whoever came first."""
    budget = Budget(100, 4, kept.reclaim)
    first = budget.acquire(50, urgent=True)
    with asking(budget, 40, urgent=False) as patient, asking(budget, 50) as urgent:
        first.release()
        until(lambda: urgent != [])
        assert patient == []
        assert isinstance(urgent[0], Grant)
        urgent[0].release()


def test_kept_bytes_give_way_to_readers(kept: Kept) -> None:
    """Bytes without a tier are given up for a reader, those that were read first."""
    budget = Budget(100, 4, kept.reclaim)
    for length in (30, 30):
        budget.acquire(length, urgent=True).arrived(length)
    kept.read, kept.unread = [30], [30]
    budget.acquire(30, urgent=True).release()
    assert (kept.read, kept.unread, budget.used) == ([], [30], 30)
    budget.acquire(45, urgent=True).release()
    assert (kept.unread, budget.used) == ([], 0)


def test_unread_bytes_do_not_give_way_to_patient_requests_while_others_run(kept: Kept) -> None:
    """What was fetched ahead is not thrown away to fetch further ahead ... unless nothing else moves."""
    budget = Budget(160, 4, kept.reclaim)
    running = budget.acquire(10, urgent=True)
    budget.acquire(50, urgent=True).arrived(50)
    kept.unread = [50]
    with asking(budget, 60, urgent=False) as got:
        assert got == []
        assert kept.unread == [50]
        running.release()
    assert kept.unread == []
    assert isinstance(got[0], Grant)


def test_bytes_that_become_reclaimable_later_are_reclaimed_for_who_waits(kept: Kept) -> None:
    """A reader who waits gets bytes that are kept only after it began to wait."""
    budget = Budget(100, 4, kept.reclaim)
    budget.acquire(50, urgent=True).arrived(50)
    with asking(budget, 30) as got:
        assert got == []
        kept.read = [50]
        budget.settle()
    assert isinstance(got[0], Grant)
    budget.forget(0)


def test_closing_refuses_all_who_wait(kept: Kept) -> None:
    """Who waits, and who comes later, is told that it is closing; nobody hangs."""
    budget = Budget(100, 4, kept.reclaim)
    held = budget.acquire(50, urgent=True)
    with asking(budget, 10) as urgent, asking(budget, 10, urgent=False) as patient:
        budget.close()
    assert urgent == patient == ["the reader is closing"]
    with pytest.raises(Unavailable):
        budget.acquire(1, urgent=True)
    held.release()
    assert budget.used == 0
    assert not budget.waiting
    assert "0 waiting" in repr(budget)


def test_nothing_is_lost_among_many_threads(kept: Kept) -> None:
    """Under contention the limits hold, everybody is served, and all is given back."""
    budget = Budget(1000, 5, kept.reclaim)
    worst = [0, 0]
    lock = threading.Lock()

    def work(number: int) -> None:
        for round_ in range(40):
            grant = budget.acquire(10 + (number * 7 + round_) % 90, urgent=number % 3 > 0)
            with lock:
                worst[0] = max(worst[0], budget.used)
                worst[1] = max(worst[1], budget.running)
            grant.arrived(grant.amount // 2)
            grant.release()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "nobody waits for ever"
    assert worst[0] <= 1000
    assert worst[1] <= 5
    assert (budget.used, budget.running) == (0, 0)
    assert budget.peak <= 1000
