"""Rounds: who asks is served by work that begins afterwards, together with all others who have asked."""

import threading

import pytest

from datacache.writing.rounds import Rounds


class Work:
    """Work that is under way until it is let end, and counted."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.count = 0
        self.failure: OSError | None = None

    def __call__(self) -> None:
        self.begun.release()
        assert self.go.acquire(timeout=30)
        self.count += 1
        if self.failure is not None:
            raise self.failure


class Asker(threading.Thread):
    """Somebody who asks, and what it came to."""

    def __init__(self, rounds: Rounds) -> None:
        super().__init__(name="asker")
        self.rounds = rounds
        self.heard: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.rounds.do()
        except OSError as error:
            self.heard = error


def wait_for(rounds: Rounds, count: int) -> None:
    """Until so many wait for a round that others have begun."""
    while len(rounds._changed._waiters) < count:  # type: ignore[attr-defined]
        threading.Event().wait(0.001)


def test_all_who_ask_while_a_round_is_under_way_share_the_next_one() -> None:
    work = Work()
    rounds = Rounds(work)
    first = Asker(rounds)
    assert work.begun.acquire(timeout=30)  # what is asked from now on it may have missed
    others = [Asker(rounds) for _ in range(5)]
    wait_for(rounds, 5)
    work.go.release()
    first.join()
    assert work.begun.acquire(timeout=30)
    assert work.count == 1
    work.go.release()
    for other in others:
        other.join()
    assert work.count == 2


def test_all_who_wait_hear_of_a_failure_and_the_next_round_is_a_new_one() -> None:
    work = Work()
    rounds = Rounds(work)
    first = Asker(rounds)
    assert work.begun.acquire(timeout=30)
    others = [Asker(rounds) for _ in range(3)]
    wait_for(rounds, 3)
    work.go.release()
    first.join()
    assert work.begun.acquire(timeout=30)
    work.failure = OSError("the disk")
    work.go.release()
    for other in others:
        other.join()
    assert first.heard is None
    assert [other.heard for other in others] == [work.failure] * 3
    work.failure = None
    work.go.release()
    rounds.do()
    assert work.count == 3


def test_who_asks_alone_does_it_without_another_thread() -> None:
    threads: list[threading.Thread] = []
    rounds = Rounds(lambda: threads.append(threading.current_thread()))
    rounds.do()
    rounds.do()
    assert threads == [threading.current_thread()] * 2


def test_a_failure_of_one_that_asked_alone_is_its_own() -> None:
    def fail() -> None:
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        Rounds(fail).do()
