"""
Which bytes to ask the store for.

Pure. A read that misses is widened to a grain (a block, or a page where `fill` is `range`), what is
present or under way is taken out, and the rest is cut into requests. `reader` makes the requests.
"""

from collections.abc import Iterable, Sequence

from datacache.config.settings import Fill
from datacache.model import ByteRange, KiB, MiB

PAGE = 4 * KiB
"""The kernel reads pages: finer than this nothing is ever asked for."""

REQUEST = 8 * MiB
"""Bytes of one request at most. Beyond it a store gives no more throughput for the memory that the
answer takes (one stream of S3 makes about 100 MB/s, so 8 MiB pay 80 ms for 10-30 ms of latency)."""

SMALL = 1 * MiB
"""Objects up to this size are always fetched whole: the latency of a second request costs more than
these bytes."""

LEAST = 128 * KiB
"""The finest grain of block fill when memory is short: what one request of the kernel covers."""


def grain(fill: Fill, *, block: int, size: int, share: int) -> int:
    """The alignment of fetches in an object of `size` bytes.

    `share` is the memory that may hold bytes of this object which no tier has room for: a grain
    larger than it would be dropped before it was read, and fetched again for the next read. Where a
    tier has room it is unlimited, and `block` decides.
    """
    if fill is Fill.RANGE and size > SMALL:
        return PAGE
    while block > share and block > LEAST:
        block //= 2
    return max(block, 1)


def request_limit(block: int, *, most: int) -> int:
    """Bytes of one request at most: whole blocks, at least one, and no more than `most` beyond that."""
    return max(1, min(REQUEST, most) // block) * block


def reach(span: ByteRange, *, grain: int, size: int) -> ByteRange:
    """`span` widened to multiples of `grain`, within an object of `size` bytes."""
    start, stop = span
    return ByteRange(start - start % grain, min(size, stop + -stop % grain))


def subtract(spans: Iterable[ByteRange], taken: Iterable[ByteRange]) -> list[ByteRange]:
    """What is left of `spans` without `taken`, in order. `spans` are sorted and apart."""
    left = list(spans)
    for start, stop in taken:
        cut: list[ByteRange] = []
        for span in left:
            if stop <= span.start or start >= span.stop:
                cut.append(span)
                continue
            if span.start < start:
                cut.append(ByteRange(span.start, start))
            if stop < span.stop:
                cut.append(ByteRange(stop, span.stop))
        left = cut
    return left


def cut(span: ByteRange, *, limit: int) -> list[ByteRange]:
    """`span` in pieces of at most `limit` bytes, cut at multiples of `limit`."""
    pieces: list[ByteRange] = []
    at, stop = span
    while at < stop:
        to = min(stop, at - at % limit + limit)
        pieces.append(ByteRange(at, to))
        at = to
    return pieces


def requests(
    wanted: ByteRange, free: Sequence[ByteRange], *, grain: int, size: int, limit: int
) -> list[ByteRange]:
    """The requests to make for a read of `wanted`.

    `free` is what of `reach(wanted)` is neither present nor under way, sorted and apart. The
    requests hold every byte of `wanted` that is in `free`, nothing outside `free`, nothing further
    from such a byte than its grain, and none is larger than `limit`.
    """
    made: list[ByteRange] = []
    for gap in free:
        start, stop = max(gap.start, wanted.start), min(gap.stop, wanted.stop)
        if start >= stop:
            continue
        wide = reach(ByteRange(start, stop), grain=grain, size=size)
        made += cut(ByteRange(max(wide.start, gap.start), min(wide.stop, gap.stop)), limit=limit)
    return made
