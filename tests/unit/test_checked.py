"""Answers held against what was asked: what is wrong is an error, whatever went wrong."""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from datacache.errors import SourceError, Unavailable, VersionChanged, WrongBytes
from datacache.model import ByteRange, ObjectInfo, Version
from datacache.sources.checked import CheckedSource
from datacache.sources.faulty import (
    Before,
    Extend,
    Fail,
    Fault,
    FaultySource,
    Flip,
    Midway,
    Shift,
    Truncate,
)
from datacache.sources.memory import MemorySource
from datacache.sources.source import Page
from tests.conftest import AnnouncedLogs

BODY = Random(5).randbytes(1000)
WHOLE, PART = ByteRange(0, 1000), ByteRange(100, 200)


class Store(MemorySource):
    """A store whose tags may be something else than the MD5 of objects."""

    def __init__(self, tag: Callable[[bytes], str] | None = None) -> None:
        super().__init__()
        self.tag = tag

    def put(self, key: str, data: bytes, *, archived: bool = False) -> ObjectInfo:
        info = super().put(key, data, archived=archived)
        return self._tagged(info, data) if self.tag else info

    def stat(self, key: str) -> ObjectInfo:
        info = super().stat(key)
        return self._tagged(info, bytes(super().read(info, ByteRange(0, info.size)))) if self.tag else info

    def read(self, info: ObjectInfo, span: ByteRange) -> memoryview:
        data = super().read(super().stat(info.key), span)
        assert isinstance(data, memoryview)
        return data

    def _tagged(self, info: ObjectInfo, data: bytes) -> ObjectInfo:
        assert self.tag
        return info._replace(version=Version(etag=self.tag(data)))


def kms(data: bytes) -> str:
    """A tag that looks like an MD5 and is none, as those of KMS-encrypted objects."""
    return f'"{hashlib.md5(b"key" + data, usedforsecurity=False).hexdigest()}"'


def read(source: FaultySource, span: ByteRange, key: str = "o") -> bytes:
    return bytes(CheckedSource(source).read(source.inner.stat(key), span))


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("fault", [Truncate(), Truncate(100), Extend(), Extend(5000)])
def test_a_wrong_length_is_an_error(fault: Fault, conditional: bool) -> None:
    """ "Wrong length, range or version is always an error, never data"; ossfs's off-by-one is `Extend()`."""
    source = FaultySource(MemorySource(objects={"o": BODY}, conditional=conditional), {"read": [fault]})
    with pytest.raises(WrongBytes, match="bytes of 'o' when asked for the 100 bytes 100-200"):
        read(source, PART)


@pytest.mark.parametrize("fault", [Before, Midway])
@pytest.mark.parametrize("size", [1000, 900])
def test_a_changed_object_is_an_error_without_conditions(fault: type[Before | Midway], size: int) -> None:
    """A store without conditions is statted before and after each read."""
    store = MemorySource(objects={"o": BODY}, conditional=False)
    source = FaultySource(store, {"read": [fault(lambda: store.put("o", bytes(size)))]})
    with pytest.raises(VersionChanged, match="not 1000 as stamp:1000-"):
        read(source, PART)
    assert store.requests["stat"] == 1 + 2


def test_a_changed_object_is_not_even_read() -> None:
    """What the first stat shows to have changed is not transferred."""
    store = MemorySource(objects={"o": BODY}, conditional=False)
    old = store.stat("o")
    store.put("o", BODY)
    with pytest.raises(VersionChanged):
        CheckedSource(store).read(old, PART)
    assert store.requests["read"] == 0


def test_a_weak_tag_is_checked_by_stats() -> None:
    """A weak tag cannot be sent as a condition, so the object is statted before and after."""
    store = Store(lambda data: f'W/"{len(data)}-{data[0]}"')
    info = store.put("o", BODY)
    source = CheckedSource(store)
    assert bytes(source.read(info, PART)) == BODY[100:200]
    assert store.requests["stat"] >= 2
    store.put("o", bytes(1000))
    with pytest.raises(VersionChanged):
        source.read(info, PART)


def test_with_a_condition_nothing_more_is_asked() -> None:
    """Where the store checks the version, a read is one request."""
    store = MemorySource(objects={"o": BODY})
    info = store.stat("o")
    assert bytes(CheckedSource(store).read(info, PART)) == BODY[100:200]
    assert store.requests == {"stat": 1, "read": 1}


def test_a_version_id_is_a_condition() -> None:
    """An old version is read by its id although the object has changed."""
    store = MemorySource(objects={"o": BODY}, versioned=True)
    ((old,),) = (page.objects for page in store.list("", recursive=True, versions=True))
    store.put("o", b"new")
    weak = old._replace(version=old.version._replace(etag="W/" + old.version.etag))
    for info in (old, weak):
        assert bytes(CheckedSource(store).read(info, PART)) == BODY[100:200]
    assert store.requests["stat"] == 0


@pytest.mark.parametrize("at", [0, 999])
def test_a_damaged_whole_object_is_fetched_again(at: int, logs: AnnouncedLogs) -> None:
    """Wrong bytes are found out where the tag is the MD5; the second transfer is right, and is taken."""
    logs.expect("was damaged")
    source = FaultySource(MemorySource(objects={"o": BODY}), {"read": [Flip(at)]})
    assert read(source, WHOLE) == BODY
    assert source.calls["read"] == 2


def test_two_transfers_damaged_differently_are_an_error() -> None:
    """Two answers that differ from each other and from the tag are wrong, both."""
    source = FaultySource(MemorySource(objects={"o": BODY}), {"read": [Flip(0), Flip(1)]})
    with pytest.raises(WrongBytes, match="differ, and neither has the MD5"):
        read(source, WHOLE)


def test_tags_that_are_not_md5s_are_learned(caplog: pytest.LogCaptureFixture) -> None:
    """A store whose tags only look like MD5s is found out by one second fetch, and said once."""
    store = Store(kms)
    infos = [store.put(f"o{i}", BODY + bytes([i])) for i in range(3)]
    source = CheckedSource(store)
    store.requests.clear()
    with caplog.at_level(logging.INFO, "datacache"):
        for i, info in enumerate(infos):
            assert bytes(source.read(info, ByteRange(0, 1001))) == BODY + bytes([i])
    assert store.requests["read"] == 1 + len(infos)
    assert [r.getMessage() for r in caplog.records] == [
        "entity tags of memory://test are not the MD5 of objects; they are not compared"
    ]


def test_a_bucket_of_both_kinds_stays_checked(logs: AnnouncedLogs) -> None:
    """One object with a tag that is no MD5 does not end the comparison for all those that have one."""
    logs.expect("was damaged")
    store = Store(lambda data: kms(data) if data[:1] == b"k" else MemorySource().put("x", data).version.etag)
    plain = [store.put(f"p{i}", bytes([i])) for i in range(3)]
    odd = store.put("odd", b"k")
    faulty = FaultySource(store)
    source = CheckedSource(faulty)
    for info in (*plain, odd, odd, odd):
        source.read(info, ByteRange(0, 1))
    faulty.add("read", Flip())
    assert bytes(source.read(plain[1], ByteRange(0, 1))) == b"\1"


@pytest.mark.parametrize("etag", ['"0123-4"', '"xyz"', '"0123456789abcdef0123456789abcdef-2"'])
def test_other_tags_are_not_compared(etag: str) -> None:
    """Tags of multipart uploads and whatever else is not 32 hex digits say nothing of the bytes."""
    store = Store(lambda data: etag)
    info = store.put("o", BODY)
    store.requests.clear()
    CheckedSource(store).read(info, WHOLE)
    assert store.requests["read"] == 1


@pytest.mark.parametrize("span", [(0, 0), (5, 5), (6, 5), (-1, 5), (0, 1001), (1000, 1001)])
def test_spans_outside_the_object_are_programming_errors(span: tuple[int, int]) -> None:
    """Nobody may ask for nothing, or for what the object does not have."""
    store = MemorySource(objects={"o": BODY})
    with pytest.raises(ValueError, match="are not a part of the 1000 bytes"):
        CheckedSource(store).read(store.stat("o"), ByteRange(*span))


class Liar(MemorySource):
    """Answers with another object than was asked for."""

    def stat(self, key: str) -> ObjectInfo:
        return super().stat(key)._replace(key="other")

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        yield Page([], ["elsewhere/"])


def test_answers_about_something_else_are_errors() -> None:
    """A stat of another key and a listing beyond the prefix are wrong."""
    source = CheckedSource(Liar(objects={"o": BODY}))
    with pytest.raises(WrongBytes, match="answered 'other'"):
        source.stat("o")
    with pytest.raises(WrongBytes, match="listed 'elsewhere/' when asked for what is in 'a/'"):
        list(source.list("a/", recursive=False))


def test_versions_are_compared_by_what_both_answers_know() -> None:
    """A listing may know less of a version than a stat does; what they share must be the same."""
    store = MemorySource(objects={"o": BODY}, conditional=False)
    source, info = CheckedSource(store), store.stat("o")
    for version in (Version("tag", "", info.version.stamp), Version("", "id", info.version.stamp)):
        assert bytes(source.read(info._replace(version=version), PART)) == BODY[100:200]
    for version in (Version("tag"), Version("", "id"), Version(), Version("tag", "", "5-5")):
        with pytest.raises(VersionChanged):
            source.read(info._replace(version=version), PART)


FAULTS = st.one_of(
    st.none(),
    st.builds(Truncate, st.integers(1, 2000)),
    st.builds(Extend, st.integers(1, 2000)),
    st.builds(Shift, st.integers(1, 10)),
    st.builds(Flip, st.integers(0, 99)),
    st.just(Fail(Unavailable("no"))),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FAULTS, max_size=8), st.integers(1, 6))
def test_a_damaged_transfer_is_never_data(
    logs: AnnouncedLogs, faults: list[Fault | None], reads: int
) -> None:
    """A whole object with an MD5 comes as it is or not at all, whatever befalls the transfers.

    (But the same damage twice in a row is what a tag that is no MD5 looks like.)
    """
    logs.expect("was damaged")
    assume(all(a != b or a is None for a, b in pairwise(faults)))
    body = BODY[:100]
    faulty = FaultySource(MemorySource(objects={"o": body}), {"read": faults})
    source, info = CheckedSource(faulty), faulty.stat("o")
    for _ in range(reads):
        with contextlib.suppress(SourceError):
            assert bytes(source.read(info, ByteRange(0, 100))) == body


def test_closing_closes_the_source_inside() -> None:
    """A wrapper owns what it wraps."""

    class Closable(MemorySource):
        closed = False

        def close(self) -> None:
            self.closed = True

    inner = Closable()
    source = CheckedSource(inner)
    source.close()
    assert inner.closed
    assert repr(source) == f"<CheckedSource {inner!r}>"
