"""The values that all layers speak."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datacache.errors import SettingError
from datacache.model import ByteRange, CacheKey, Coverage, Version, format_size, parse_duration, parse_size

spans = st.builds(lambda a, n: ByteRange(a, a + n), st.integers(0, 60), st.integers(0, 30))


@example([(True, ByteRange(0, 2)), (False, ByteRange(1, 1))], ByteRange(0, 0))  # found, and rare
@given(st.lists(st.tuples(st.booleans(), spans), max_size=30), spans)
def test_coverage_is_a_set_of_bytes(steps: list[tuple[bool, ByteRange]], probe: ByteRange) -> None:
    """Coverage behaves as the plain set of the byte numbers that were added and not removed."""
    coverage, model = Coverage(), set[int]()
    for adding, span in steps:
        (coverage.add if adding else coverage.remove)(span)
        model = model | set(range(*span)) if adding else model - set(range(*span))
    ranges = coverage.ranges()
    assert {b for r in ranges for b in range(*r)} == model
    assert all(a.stop < b.start for a, b in itertools.pairwise(ranges)), "sorted and apart"
    assert coverage.length == len(model)
    assert coverage.covers(probe) == (set(range(*probe)) <= model)
    gaps = coverage.gaps(probe)
    assert [b for g in gaps for b in range(*g)] == sorted(set(range(*probe)) - model)
    assert all(g.length > 0 for g in gaps)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("4GiB", 4 << 30), ("1.5K", 1536), ("2KB", 2000), ("1 Ti", 1 << 40), ("0", 0)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    """Sizes carry binary or decimal units."""
    assert parse_size(text, name="--quota") == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 XB", "4GiBs", "1e9", "٤GiB", "0x10"])
def test_a_wrong_size_names_the_setting_and_the_value(text: str) -> None:
    """A wrong size is one line with the name, the value and what would be right."""
    with pytest.raises(SettingError) as caught:
        parse_size(text, name="--quota")
    assert "--quota" in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "4GiB" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("60s", 60), ("250ms", 0.25), ("2.5", 2.5), ("1d", 86400), ("inf", float("inf"))]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    """Durations carry a unit, seconds without one."""
    assert parse_duration(text, name="--ttl") == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 week", "nan"])
def test_a_wrong_duration_is_refused(text: str) -> None:
    """A wrong duration is refused by name."""
    with pytest.raises(SettingError, match="--ttl"):
        parse_duration(text, name="--ttl")


def test_sizes_are_shown() -> None:
    """Sizes are shown with one decimal and a binary unit."""
    assert [format_size(n) for n in (0, 1023, 1024, 4 << 30, 1 << 60)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "4.0 GiB",
        "1024.0 PiB",
    ]


def test_a_weak_tag_is_never_a_condition() -> None:
    """Weak entity tags are part of the key and are never sent in If-Match."""
    assert Version(etag='W/"a"').condition == ""
    assert Version(etag='"a"').condition == '"a"'
    assert Version(etag='W/"a"').token != Version(etag='"a"').token


def test_the_version_token_prefers_the_tag() -> None:
    """The same bytes, listed with and without their version id, are the same cache entry."""
    assert Version('"a"', "v1").token == Version('"a"').token
    assert Version("", "v1").token == "id:v1"
    assert Version(stamp="3-7").token == "stamp:3-7"


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=4), min_size=6, max_size=6))
def test_different_keys_have_different_digests(parts: list[str]) -> None:
    """No two keys spell the same, wherever the boundary between their parts lies."""
    a, b = CacheKey(parts[0], parts[1], parts[2], 1), CacheKey(parts[3], parts[4], parts[5], 1)
    assert (a.digest == b.digest) == (a == b)
