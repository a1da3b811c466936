"""What is fetched ahead: the state machines, as tables and properties."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.model import ByteRange, GiB, KiB, MiB
from datacache.reading.prefetch import After, Announced, Listing, Window

BLOCK, LIMIT, CEILING = 4 * MiB, 8 * MiB, 64 * MiB


def window(size: int = GiB) -> Window:
    return Window(size, block=BLOCK, limit=LIMIT, ceiling=CEILING)


def run(machine: Window, reads: list[tuple[int, int]]) -> list[ByteRange]:
    found = [machine.seen(start, start + length) for start, length in reads]
    return [span for span in found if span is not None]


def sequential(size: int, step: int, start: int = 0) -> list[tuple[int, int]]:
    return [(at, min(step, size - at)) for at in range(start, size, step)]


def test_nothing_is_fetched_ahead_of_a_first_read() -> None:
    """Who reads a header and goes away costs one block."""
    assert run(window(), [(0, 128 * KiB)]) == []


def test_a_sequential_reader_is_kept_ahead_of_with_growing_steps() -> None:
    """From the second read on the window runs ahead, one block at first, up to the ceiling."""
    machine = window()
    spans = []
    ahead = []
    for start, length in sequential(512 * MiB, MiB):
        span = machine.seen(start, start + length)
        if span is not None:
            spans.append(span)
        if spans:
            ahead.append(spans[-1].stop - (start + length))
    assert spans[0].length <= 2 * BLOCK
    assert all(a.stop == b.start for a, b in itertools.pairwise(spans)), "no hole, nothing twice"
    assert max(ahead) <= CEILING + BLOCK
    assert min(ahead[100:]) >= CEILING - LIMIT - MiB, "once grown it stays ahead"
    assert all(span.stop % BLOCK == 0 for span in spans)


def test_it_ends_where_the_object_ends() -> None:
    """The last span ends at the end of the object, and then there is nothing more."""
    size = 21 * MiB + 17
    spans = run(window(size), sequential(size, 128 * KiB))
    assert spans[-1].stop == size
    assert sum(span.length for span in spans) <= size


@pytest.mark.parametrize("length", [4 * KiB, 64 * KiB, 128 * KiB])
def test_a_random_reader_is_left_alone(length: int) -> None:
    """Random reads of a large object cause next to no readahead: two lie side by side now and then."""
    order = random.Random(7)
    reads = [(order.randrange(GiB - length), length) for _ in range(4000)]
    assert len(run(window(), reads)) <= 8


def test_strides_are_left_alone() -> None:
    """Reads that skip more than they read are not sequential."""
    assert run(window(), [(at, 64 * KiB) for at in range(0, 64 * MiB, MiB)]) == []


@given(st.integers(0, 2**32))
def test_requests_of_the_kernel_may_come_in_any_order(seed: int) -> None:
    """Reads of two readahead windows of 1 MiB, shuffled, are still one sequential run."""
    order = random.Random(seed)
    reads = sequential(64 * MiB, 128 * KiB)
    shuffled: list[tuple[int, int]] = []
    for i in range(0, len(reads), 16):
        part = reads[i : i + 16]
        order.shuffle(part)
        shuffled += part
    spans = run(window(), shuffled)
    assert spans, "it is seen to be sequential"
    assert all(a.stop <= b.start for a, b in itertools.pairwise(spans)), "nothing twice"
    assert spans[-1].stop >= 64 * MiB


def test_a_seek_starts_anew() -> None:
    """After a seek the window is small again, and fetches from where the reader is now."""
    machine = window()
    run(machine, sequential(128 * MiB, MiB))
    assert machine.seen(700 * MiB, 701 * MiB) is None, "the first read somewhere else is no run"
    span = machine.seen(701 * MiB, 702 * MiB)
    assert span is not None
    assert span.start >= 702 * MiB
    assert span.length <= 2 * BLOCK


def test_reading_backwards_fetches_nothing_ahead() -> None:
    """A reader who goes backwards is not run ahead of, in the wrong direction."""
    reads = [(at, 128 * KiB) for at in range(512 * MiB, 400 * MiB, -128 * KiB)]
    assert run(window(), reads) == []


def test_a_lower_ceiling_holds_at_once() -> None:
    """While memory is short the window stays under the ceiling that it is told."""
    machine = window()
    for start, length in sequential(256 * MiB, MiB):
        span = machine.seen(start, start + length, ceiling=6 * MiB)
        assert span is None or span.stop <= start + length + 6 * MiB + BLOCK


# Listing order.


def follow(machine: Listing, opens: list[int], directory: range, size: int = 100 * KiB) -> list[int]:
    """What is fetched ahead of `opens` in a directory that holds the files `directory`."""
    fetched = []
    for ino in opens:
        after = machine.opened(7, ino)
        if after is None:
            continue
        assert after.parent == 7
        for next_ino in [n for n in directory if n > after.ino][: after.limit]:
            length = machine.take(7, next_ino, size)
            if length is None:
                break
            if length:
                fetched.append(next_ino)
    return fetched


def listing(files: int = 64, bytes: int = 48 * MiB) -> Listing:
    return Listing(files=files, bytes=bytes)


def test_listing_order_is_detected_and_run_ahead_of() -> None:
    """From the third file in order on, each later file is fetched ahead once, none too far ahead."""
    directory = range(100, 600)
    fetched = follow(listing(), list(directory), directory)
    assert fetched == list(range(fetched[0], 600)), "each once, in order"
    assert fetched[0] == 103


def test_no_more_than_asked_for_is_ahead() -> None:
    """At most `files` files are ahead of the reader."""
    machine, directory = listing(files=8), range(100, 600)
    for ino in directory:
        fetched = follow(machine, [ino], directory)
        assert all(n <= ino + 8 for n in fetched)


def test_bytes_bound_it_too() -> None:
    """Of large files only the head of the next is fetched ahead."""
    machine = listing(bytes=10 * MiB)
    for ino in (100, 101):
        assert machine.opened(7, ino) is None
    after = machine.opened(7, 102)
    assert after == After(7, 102, 2)
    assert machine.take(7, 103, 256 * MiB) == 10 * MiB
    assert machine.take(7, 104, 256 * MiB) is None


@given(st.integers(0, 2**32))
def test_a_shuffled_epoch_is_left_alone(seed: int) -> None:
    """A shuffled order of 1,000 files causes next to nothing to be fetched ahead."""
    directory = range(100, 1100)
    opens = list(directory)
    random.Random(seed).shuffle(opens)
    assert len(follow(listing(), opens, directory)) <= 30


def test_several_readers_of_one_listing_are_one_run() -> None:
    """Opens that are swapped with their neighbours are still in listing order."""
    directory = range(100, 400)
    opens = [n ^ 1 for n in directory]
    fetched = follow(listing(), opens, directory)
    assert len(fetched) > 250
    assert len(set(fetched)) == len(fetched)


def test_directories_among_the_files_are_stepped_over() -> None:
    """What has no bytes takes no place among the bytes ahead, and does not stop the run."""
    machine = listing()
    for ino in (100, 101, 102):
        machine.opened(7, ino)
    assert machine.take(7, 103, 0) == 0
    assert machine.take(7, 104, 5) == 5


def test_a_directory_that_was_forgotten_is_not_fetched_from() -> None:
    """Only the directories opened last are followed; others start anew."""
    machine = listing()
    for ino in (100, 101, 102):
        machine.opened(7, ino)
    for parent in range(1000, 1300):
        machine.opened(parent, 5)
    assert machine.take(7, 103, 5) is None
    assert machine.opened(7, 103) is None


def test_no_files_ahead_means_none() -> None:
    """`order_ahead` of 0 turns it off."""
    assert follow(listing(files=0), list(range(100, 200)), range(100, 200)) == []


# Announced order.


def drain(machine: Announced, size: int = 100 * KiB) -> list[int]:
    taken = []
    while (ino := machine.next()) is not None:
        taken.append(ino)
        machine.take(ino, size)
    return taken


def announced(order: list[int], files: int = 8, bytes: int = 48 * MiB) -> Announced:
    return Announced(order, files=files, bytes=bytes)


@given(st.permutations(list(range(100, 160))))
def test_an_announced_order_is_fetched_ahead_in_that_order(order: list[int]) -> None:
    """Each file is fetched once, in the order that was announced, never more than `files` ahead."""
    machine = announced(order)
    fetched = drain(machine)
    assert fetched == order[:8], "the first files before anything is opened"
    for place, ino in enumerate(order):
        machine.opened(ino)
        fetched += drain(machine)
        assert fetched == order[: place + 9]


def test_looking_ahead_is_done_by_halves() -> None:
    """It says so when half of what may be ahead is used up."""
    machine = announced(list(range(100, 200)))
    drain(machine)
    assert not machine.low
    for ino in range(100, 104):
        machine.opened(ino)
    assert machine.low


def test_workers_may_open_out_of_step() -> None:
    """Several readers of one order who overtake each other are still followed."""
    order = list(range(1000, 2000))
    machine = announced(order)
    fetched = drain(machine)
    for a, b, c, d in zip(*[iter(order)] * 4, strict=True):
        for ino in (c, a, d, b):
            machine.opened(ino)
            fetched += drain(machine)
    assert len(set(fetched)) == len(fetched)
    assert len(fetched) > 900


def test_a_stray_open_changes_nothing() -> None:
    """A file that is not in the order is ignored."""
    machine = announced(list(range(100, 200)))
    drain(machine)
    machine.opened(7)
    machine.opened(8)
    assert machine.next() is None


def test_a_reader_who_starts_elsewhere_is_found() -> None:
    """An epoch that begins again, or in the middle, is fetched ahead of from there."""
    machine = announced(list(range(100, 200)))
    drain(machine)
    machine.opened(160)
    assert drain(machine) == list(range(161, 169))
    machine.opened(100)
    assert drain(machine) == list(range(101, 109))


def test_strays_cost_ever_less() -> None:
    """The whole order is searched for the 1st, 2nd, 4th stray in a row, not for each."""
    machine = announced(list(range(100, 200)))
    for _ in range(3):
        machine.opened(7)
    machine.opened(7)
    machine.opened(150)  # the 5th in a row: not searched for
    assert machine.next() == 100
    for _ in range(2):
        machine.opened(7)
    machine.opened(150)  # the 8th
    assert machine.next() == 151


def test_large_files_ahead_are_bounded_by_bytes() -> None:
    """Of large files only as much as `bytes` is ahead, the head of the last one."""
    machine = announced(list(range(100, 200)), bytes=10 * MiB)
    assert machine.next() == 100
    assert machine.take(100, 7 * MiB) == 7 * MiB
    assert machine.next() == 101
    assert machine.take(101, 7 * MiB) == 3 * MiB
    assert machine.next() is None
    machine.opened(100)
    assert machine.next() == 102


def test_what_is_taken_must_be_what_was_named() -> None:
    """Between naming a file and taking it the reader may have jumped: then nothing is taken."""
    machine = announced(list(range(100, 200)))
    ino = machine.next()
    assert ino == 100
    machine.opened(150)
    assert machine.take(ino, 5) == 0
    assert machine.next() == 151


@pytest.mark.parametrize("machine", [window(), announced([1])])
def test_machines_can_be_asked_how_they_are(machine: object) -> None:
    """The machines of a stuck reader can be looked at."""
    assert repr(machine).startswith("<")
