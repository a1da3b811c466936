"""Which bytes are asked for: properties of the pure planner."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.config.settings import Fill
from datacache.model import ByteRange, Coverage, GiB, KiB, MiB
from datacache.reading import plan

sizes = st.integers(1, 300)
blocks = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def reads(draw: st.DrawFn) -> tuple[int, ByteRange, list[ByteRange]]:
    """An object's size, a read within it, and what of the object is present or under way."""
    size = draw(sizes)
    start = draw(st.integers(0, size - 1))
    stop = draw(st.integers(start + 1, size))
    taken = Coverage()
    for a, n in draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, 40)), max_size=6)):
        taken.add(ByteRange(a, min(size, a + n)))
    return size, ByteRange(start, stop), taken.ranges()


def _set(spans: list[ByteRange]) -> set[int]:
    return {byte for span in spans for byte in range(*span)}


@given(reads(), blocks, st.integers(1, 4))
def test_requests_hold_what_is_missing_and_no_more_than_the_grain_says(
    case: tuple[int, ByteRange, list[ByteRange]], grain: int, per_request: int
) -> None:
    """Requests cover the missing bytes of a read, stay in free bytes, near the read, and small enough."""
    size, wanted, taken = case
    limit = grain * per_request
    reach = plan.reach(wanted, grain=grain, size=size)
    free = plan.subtract([reach], taken)
    made = plan.requests(wanted, free, grain=grain, size=size, limit=limit)
    missing = set(range(*wanted)) - _set(taken)
    asked = _set(made)
    assert missing <= asked, "the read is covered"
    assert not asked & _set(taken), "nothing is fetched twice"
    assert asked <= set(range(size)), "within the object"
    assert all(any(byte // grain == m // grain for m in missing) for byte in asked), "only grains that miss"
    assert sum(span.length for span in made) == len(asked), "requests do not overlap"
    assert all(0 < span.length <= limit for span in made)
    assert made == sorted(made)


@given(reads(), blocks)
def test_an_untouched_object_is_fetched_in_whole_grains(
    case: tuple[int, ByteRange, list[ByteRange]], grain: int
) -> None:
    """Where nothing is present, a read fetches exactly the aligned grains that it touches."""
    size, wanted, _ = case
    reach = plan.reach(wanted, grain=grain, size=size)
    made = plan.requests(wanted, [reach], grain=grain, size=size, limit=4 * grain)
    assert reach.start % grain == 0
    assert reach.stop % grain == 0 or reach.stop == size
    assert reach.start <= wanted.start < reach.start + grain
    assert wanted.stop <= reach.stop < wanted.stop + grain
    assert (made[0].start, made[-1].stop) == reach
    assert all(a.stop == b.start for a, b in itertools.pairwise(made))


@given(reads(), st.integers(1, 50))
def test_pieces_are_cut_where_the_limit_says(
    case: tuple[int, ByteRange, list[ByteRange]], limit: int
) -> None:
    """Pieces make up the span and each lies between two multiples of the limit."""
    _, span, _ = case
    pieces = plan.cut(span, limit=limit)
    assert _set(pieces) == set(range(*span))
    assert all(piece.start // limit == (piece.stop - 1) // limit for piece in pieces)


@given(reads(), reads())
def test_subtracting_is_a_difference_of_sets(
    a: tuple[int, ByteRange, list[ByteRange]], b: tuple[int, ByteRange, list[ByteRange]]
) -> None:
    """What is left is what was there and was not taken, in order."""
    left = plan.subtract(a[2], b[2])
    assert _set(left) == _set(a[2]) - _set(b[2])
    assert left == sorted(left)


def test_random_reads_of_range_fill_read_at_most_a_fifth_too_much() -> None:
    """64 KiB random reads of a 1 GiB object fetch at most 1.2 times what was read, with range fill."""
    order = random.Random(5)
    present, read = Coverage(), Coverage()
    fetched = asked = 0
    grain = plan.grain(Fill.RANGE, block=4 * MiB, size=GiB, share=GiB)
    for _ in range(2000):
        start = order.randrange(GiB - 64 * KiB)
        wanted = ByteRange(start, start + 64 * KiB)
        asked += sum(gap.length for gap in read.gaps(wanted))
        read.add(wanted)
        reach = plan.reach(wanted, grain=grain, size=GiB)
        for span in plan.requests(wanted, present.gaps(reach), grain=grain, size=GiB, limit=8 * MiB):
            fetched += span.length
            present.add(span)
    assert fetched <= 1.2 * asked
    assert fetched >= asked


@pytest.mark.parametrize(
    ("fill", "size", "share", "grain"),
    [
        (Fill.BLOCK, GiB, GiB, 4 * MiB),
        (Fill.BLOCK, GiB, 3 * MiB, 2 * MiB),  # memory for one object is short: smaller blocks
        (Fill.BLOCK, GiB, 1, 128 * KiB),  # ... but never less than what the kernel asks for
        (Fill.RANGE, GiB, GiB, 4 * KiB),
        (Fill.RANGE, 100 * KiB, GiB, 4 * MiB),  # a small object is one request
    ],
)
def test_the_grain_depends_on_fill_and_memory(fill: Fill, size: int, share: int, grain: int) -> None:
    """Blocks where a block has room, pages for range fill, whole small objects."""
    assert plan.grain(fill, block=4 * MiB, size=size, share=share) == grain


@pytest.mark.parametrize(
    ("block", "limit"), [(4 * MiB, 8 * MiB), (3 * MiB, 6 * MiB), (16 * MiB, 16 * MiB), (4096, 8 * MiB)]
)
def test_requests_are_whole_blocks(block: int, limit: int) -> None:
    """The largest request is a number of whole blocks, at least one."""
    assert plan.request_limit(block, most=1 << 40) == limit
    assert plan.request_limit(block, most=3 * block) == min(limit, 3 * block)
    assert plan.request_limit(block, most=block // 2) == block
