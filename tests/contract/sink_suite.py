"""
What every sink must do, whatever it is made of.

Subclass `SinkSuite` and give it a fixture `made`.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random

import pytest

from datacache.errors import SourceError, Stopped, Unsupported, VersionChanged
from datacache.model import ByteRange, ObjectInfo, Version
from datacache.sources.sink import ANYTHING, NOTHING, Expected, Sink, Stored
from datacache.sources.source import Source

PART = 5 * 1024 * 1024
"""Bytes of a part in these tests: the smallest that S3 takes."""


@dataclass
class Bytes:
    """Content in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> memoryview:
        return memoryview(self.data)[offset : offset + length]


@dataclass
class Steering:
    """A put that remembers, counts, and may be stopped after so many bytes."""

    resume: str = ""
    stop_after: int | None = None
    states: list[str] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)

    def stopped(self) -> bool:
        return self.stop_after is not None and sum(self.pieces) >= self.stop_after

    def sent(self, count: int) -> None:
        self.pieces.append(count)

    def remember(self, state: str) -> None:
        self.states.append(state)

    def again(self) -> "Steering":
        """The same put in the next life."""
        return Steering(resume=self.states[-1] if self.states else self.resume)


@dataclass(frozen=True)
class Made:
    """A sink on an empty root, the source with the same root, and how to open the sink once more."""

    sink: Sink
    source: Source
    reopen: Callable[[], Sink]
    unfinished: Callable[[], int]
    """How many puts have left something at the store."""
    odd_keys: bool = True
    metadata: bool = True
    tree: bool = False
    """Objects are files: `a` and `a/b` cannot both be."""


def put(
    made: Made | Sink, key: str, data: bytes, *, expected: Expected = ANYTHING,
    metadata: Mapping[str, str] | None = None, steering: Steering | None = None,
) -> Stored:  # fmt: skip
    sink = made.sink if isinstance(made, Made) else made
    return sink.put(key, Bytes(data), expected=expected, metadata=metadata or {}, put=steering or Steering())


def read(made: Made, key: str) -> bytes:
    info = made.source.stat(key)
    return bytes(made.source.read(info, ByteRange(0, info.size))) if info.size else b""


def large(parts: float, seed: int = 1) -> bytes:
    return Random(seed).randbytes(1024) * int(parts * PART // 1024)


class SinkSuite:
    """The tests. `made` is a fixture of the subclass."""

    def test_what_is_put_is_what_is_read(self, made: Made) -> None:
        """The source has the bytes, and the version that the put told."""
        stored = put(made, "a/b", b"12345")
        assert read(made, "a/b") == b"12345"
        seen = made.source.stat("a/b")
        assert (seen.key, seen.size, seen.version.token) == ("a/b", 5, stored.info.version.token)
        assert stored.info.key == "a/b"
        assert stored.verified in ("digest", "size")

    def test_who_asks_whether_it_can_be_written_leaves_nothing(self, made: Made) -> None:
        """Before there is anything, and as often as one likes; what is there stays."""
        made.sink.check_writable()
        assert not [info for page in made.source.list("", recursive=True) for info in page.objects]
        put(made, "a", b"one")
        made.sink.check_writable()
        assert [i.key for page in made.source.list("", recursive=True) for i in page.objects] == ["a"]
        assert read(made, "a") == b"one"
        assert made.unfinished() == 0

    def test_an_empty_object(self, made: Made) -> None:
        """No bytes are bytes, too."""
        assert put(made, "empty", b"", expected=NOTHING).info.size == 0
        assert made.source.stat("empty").size == 0

    def test_anything_may_be_replaced(self, made: Made) -> None:
        """Without an expectation the last put counts."""
        put(made, "a", b"one")
        put(made, "a", b"three")
        assert read(made, "a") == b"three"

    def test_nothing_must_be_there(self, made: Made) -> None:
        """A create fails where there is an object, and leaves it alone."""
        put(made, "a", b"one", expected=NOTHING)
        with pytest.raises(VersionChanged):
            put(made, "a", b"two", expected=NOTHING)
        assert read(made, "a") == b"one"

    def test_a_version_must_be_there(self, made: Made) -> None:
        """An overwrite is of the version that was seen, by any look at it."""
        first = put(made, "a", b"one").info
        second = put(made, "a", b"second", expected=first.version).info
        with pytest.raises(VersionChanged):
            put(made, "a", b"three", expected=first.version)
        assert read(made, "a") == b"second"
        put(made, "a", b"fourth one", expected=made.source.stat("a").version)
        assert read(made, "a") == b"fourth one"
        made.sink.delete("a", expected=ANYTHING)
        with pytest.raises(VersionChanged):
            put(made, "a", b"x", expected=second.version)
        assert made.sink.find("a") is None

    def test_a_create_that_many_try_succeeds_once(self, made: Made) -> None:
        """Of several creates at once one wins, and its bytes are there."""
        if not made.sink.traits.conditional and not made.tree:
            pytest.skip("this store cannot do that")
        start = threading.Barrier(6)

        def create(number: int) -> bytes | None:
            start.wait(10)
            try:
                put(made, "race", b"%d" % number, expected=NOTHING)
            except VersionChanged:
                return None
            return b"%d" % number

        with ThreadPoolExecutor(6) as pool:
            won = [data for data in pool.map(create, range(6)) if data is not None]
        assert won == [read(made, "race")]

    def test_metadata_comes_back(self, made: Made) -> None:
        """In any characters; names in small letters."""
        if not made.metadata:
            pytest.skip("this store keeps no metadata")
        given = {"Datacache-Id": "journal 7%41", "name": "tägliche Übung ✓ ", "empty-not": "x"}
        expected = {name.lower(): value for name, value in given.items()}
        assert put(made, "a", b"x", metadata=given).metadata == expected
        found = made.sink.find("a")
        assert found is not None
        assert found.metadata == expected
        put(made, "a", b"y")
        found = made.sink.find("a")
        assert found is not None
        assert found.metadata == {}

    def test_metadata_that_no_header_can_have(self, made: Made) -> None:
        """A name with blanks is refused."""
        with pytest.raises(Unsupported):
            put(made, "a", b"x", metadata={"a b": "c"})

    def test_find(self, made: Made) -> None:
        """What is there is found as the source has it; else nothing."""
        assert made.sink.find("a") is None
        assert made.sink.find("a/b") is None
        stored = put(made, "a", b"one")
        found = made.sink.find("a")
        assert found is not None
        assert found.info.version.token == stored.info.version.token == made.source.stat("a").version.token
        assert (found.info.key, found.info.size) == ("a", 3)

    def test_delete_is_idempotent(self, made: Made) -> None:
        """Gone is gone, whatever was expected."""
        info = put(made, "d/a", b"one").info
        made.sink.delete("d/a", expected=info.version)
        made.sink.delete("d/a", expected=info.version)
        made.sink.delete("d/a", expected=ANYTHING)
        made.sink.delete("never/was", expected=ANYTHING)
        assert made.sink.find("d/a") is None

    def test_delete_of_another_version(self, made: Made) -> None:
        """What has changed since is not deleted."""
        old = put(made, "a", b"one").info
        put(made, "a", b"second")
        with pytest.raises(VersionChanged):
            made.sink.delete("a", expected=old.version)
        assert read(made, "a") == b"second"

    def test_a_copy_is_of_an_exact_version(self, made: Made) -> None:
        """The bytes of the origin, with the metadata of the copy; else nothing."""
        if not made.sink.traits.copies:
            info = put(made, "a", b"one").info
            with pytest.raises(Unsupported):
                made.sink.copy(info, "b", expected=ANYTHING, metadata={})
            return
        old = put(made, "from/a", b"one", metadata={"is": "old"}).info
        stored = made.sink.copy(old, "to/b", expected=NOTHING, metadata={"is": "copied"})
        assert read(made, "to/b") == b"one"
        found = made.sink.find("to/b")
        assert found is not None
        assert found.info.version.token == stored.info.version.token
        assert found.metadata == ({"is": "copied"} if made.metadata else {})
        with pytest.raises(VersionChanged):
            made.sink.copy(old, "to/b", expected=NOTHING, metadata={})
        put(made, "from/a", b"second")
        for expected in (ANYTHING, stored.info.version):
            with pytest.raises(VersionChanged):
                made.sink.copy(old, "to/b", expected=expected, metadata={})
        made.sink.delete("from/a", expected=ANYTHING)
        with pytest.raises(VersionChanged):
            made.sink.copy(old, "to/c", expected=ANYTHING, metadata={})
        assert read(made, "to/b") == b"one"
        assert made.sink.find("to/c") is None

    @pytest.mark.parametrize(
        "key", ["a b", "a%20b", "a+b", "ä/ü", "a&b=c", "a#b?c", "'q'\"", "[x]*", "a:b\\c", "~", "𝄞"]
    )
    def test_odd_keys(self, made: Made, key: str) -> None:
        """Names like all others, in every call."""
        stored = put(made, key, b"odd", expected=NOTHING)
        assert read(made, key) == b"odd"
        put(made, key, b"again", expected=stored.info.version)
        found = made.sink.find(key)
        assert found is not None
        if made.sink.traits.copies:
            made.sink.copy(found.info, key + "2", expected=NOTHING, metadata={})
            assert read(made, key + "2") == b"again"
        made.sink.delete(key, expected=found.info.version)
        assert made.sink.find(key) is None

    def test_keys_that_no_file_tree_can_hold(self, made: Made) -> None:
        """They are put as they are; or refused, and never taken for another."""
        for key in ("x//y", "x/../z", "./x"):
            try:
                put(made, key, b"odd")
            except SourceError:
                assert not made.odd_keys
            else:
                assert read(made, key) == b"odd"
        assert made.odd_keys or made.sink.find("z") is None

    def test_a_directory_marker(self, made: Made) -> None:
        """A key that ends in a slash is an empty object of its own."""
        put(made, "dir/", b"", expected=NOTHING)
        with pytest.raises(VersionChanged):
            put(made, "dir/", b"", expected=NOTHING)
        found = made.sink.find("dir/")
        assert found is not None
        assert (found.info.key, found.info.size) == ("dir/", 0)
        put(made, "dir/file", b"x", expected=NOTHING)
        with pytest.raises(Unsupported):
            put(made, "other/", b"bytes")
        made.sink.delete("dir/file", expected=ANYTHING)
        made.sink.delete("dir/", expected=ANYTHING)
        assert made.sink.find("dir/") is None

    @pytest.mark.parametrize("parts", [1, 1 + 1 / 1024, 2, 2.5])
    def test_exact_boundaries_of_parts(self, made: Made, parts: float) -> None:
        """A part more or less: the bytes are the bytes."""
        data = large(parts)
        steering = Steering()
        stored = put(made, "large", data, expected=NOTHING, steering=steering, metadata={"id": "7"})
        assert sum(steering.pieces) == len(data)
        assert read(made, "large") == data
        assert stored.info.version.token == made.source.stat("large").version.token
        found = made.sink.find("large")
        assert found is not None
        assert found.metadata == ({"id": "7"} if made.metadata else {})
        assert made.unfinished() == 0

    def test_a_put_that_is_stopped_shows_nothing(self, made: Made) -> None:
        """Before the first byte, or between parts: the old object stands, and abandoning leaves nothing."""
        put(made, "large", b"old")
        for after in (0, PART):
            steering = Steering(stop_after=after)
            with pytest.raises(Stopped):
                put(made, "large", large(3), steering=steering)
            assert read(made, "large") == b"old"
            for _ in range(2):
                made.sink.abandon("large", steering.again().resume)
            assert made.unfinished() == 0
        made.sink.abandon("large", "")
        made.sink.abandon("large", "what nobody has written")

    def test_a_put_goes_on_after_a_restart(self, made: Made) -> None:
        """By another sink; no part that arrived is sent twice, where the store has parts."""
        data, first = large(3.5), Steering(stop_after=2 * PART)
        with pytest.raises(Stopped):
            put(made, "large", data, expected=NOTHING, steering=first)
        second, again = first.again(), made.reopen()
        try:
            put(again, "large", data, expected=NOTHING, steering=second)
        finally:
            again.close()
        assert read(made, "large") == data
        if made.sink.traits.resumable:
            assert sum(first.pieces) + sum(second.pieces) == len(data)
            assert second.pieces
        assert made.unfinished() == 0

    def test_parts_of_other_bytes_are_not_used(self, made: Made) -> None:
        """Bytes that changed since are sent again."""
        first = Steering(stop_after=2 * PART)
        with pytest.raises(Stopped):
            put(made, "large", large(3, seed=1), steering=first)
        data = large(1, seed=1) + large(2, seed=2)
        put(made, "large", data, steering=first.again())
        assert read(made, "large") == data
        assert made.unfinished() == 0

    def test_a_large_put_keeps_to_what_is_expected(self, made: Made) -> None:
        """... when another object came meanwhile, too."""

        class Meanwhile(Steering):
            def sent(self, count: int) -> None:
                if not self.pieces:
                    put(made, "large", b"somebody else's")
                super().sent(count)

        old = put(made, "large", b"old").info
        for expected in (NOTHING, Version(etag='"0123456789abcdef0123456789abcdef"')):
            with pytest.raises(VersionChanged):
                put(made, "large", large(2), expected=expected)
        steering = Meanwhile()
        with pytest.raises(VersionChanged):
            put(made, "large", large(2), expected=old.version, steering=steering)
        made.sink.abandon("large", steering.again().resume)
        assert read(made, "large") == b"somebody else's"
        assert made.unfinished() == 0

    def test_it_says_which_keys_there_can_be(self, made: Made) -> None:
        """The prefix counts. What cannot be put need not be deleted, and is not found."""
        assert made.sink.accepts("a/b c.ü")
        longest = next(n for n in range(1025, 0, -1) if made.sink.accepts("x" * n))
        assert longest <= 1024
        if not made.tree:  # a directory takes no name of so many bytes
            put(made, "x" * longest, b"data")
            assert read(made, "x" * longest) == b"data"
        for key in ("x" * (longest + 1), "d/"):
            if not made.sink.accepts(key):
                made.sink.delete(key, expected=ANYTHING)
                assert made.sink.find(key) is None

    def test_it_can_be_asked_how_it_is(self, made: Made) -> None:
        """A repr names class and root; the URI is the source's."""
        assert type(made.sink).__name__ in repr(made.sink)
        assert made.sink.uri == made.source.uri
        assert made.sink.traits.largest > PART


def info_of(stored: Stored | None) -> ObjectInfo:
    assert stored is not None
    return stored.info
