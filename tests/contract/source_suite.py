"""
What every source must do, whatever it is made of.

Subclass `SourceSuite` and give it a fixture `made`. That the fakes pass it, too, is what makes them
trustworthy.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import pytest

from datacache.errors import NotFound, SourceError, Unsupported, VersionChanged
from datacache.model import ByteRange, ObjectInfo
from datacache.sources.source import Page, Source

BODY = bytes(Random(3).randbytes(100_000))


@dataclass(frozen=True)
class Made:
    """An empty source, and how to change what is in its store."""

    source: Source
    put: Callable[[str, bytes], object]
    delete: Callable[[str], object]
    odd_keys: bool = True
    """Keys may be what no file tree can hold: `a` beside `a/b`, a marker `a/`, `a//b`."""
    byte_keys: bool = True
    """Keys may be bytes that are not UTF-8."""
    refuses: bool = True
    """A read of a version that has gone is refused. (Raw sources without conditions need `checked`.)"""


def pages(made: Made, prefix: str = "", *, recursive: bool = True) -> list[Page]:
    return list(made.source.list(prefix, recursive=recursive))


def keys(made: Made, prefix: str = "", *, recursive: bool = True) -> list[str]:
    return [o.key for page in pages(made, prefix, recursive=recursive) for o in page.objects]


def prefixes(made: Made, prefix: str = "") -> list[str]:
    return [name for page in pages(made, prefix, recursive=False) for name in page.prefixes]


def read(made: Made, info: ObjectInfo, start: int, stop: int) -> bytes:
    return bytes(made.source.read(info, ByteRange(start, stop)))


class SourceSuite:
    """The tests. `made` is a fixture of the subclass."""

    def test_an_empty_source_lists_nothing(self, made: Made) -> None:
        """A root without objects is an empty listing, not an error."""
        assert keys(made) == []
        assert keys(made, recursive=False) == prefixes(made) == []

    def test_objects_are_listed_in_the_order_of_their_bytes(self, made: Made) -> None:
        """A recursive listing has every object once, ordered by the bytes of its key."""
        names = ["a-b", "a/b", "a/c/d", "a0", "b", "z/ü", "z/\uff5e", "z/𝄞", "Z"]
        for name in names:
            made.put(name, name.encode())
        assert keys(made) == sorted(names, key=str.encode)

    def test_a_listing_knows_sizes_versions_and_times(self, made: Made) -> None:
        """What is listed of an object is what stat says of it."""
        made.put("some/object", b"12345")
        made.put("empty", b"")
        for info in [o for page in pages(made) for o in page.objects]:
            again = made.source.stat(info.key)
            assert (again.size, again.version.token) == (info.size, info.version.token)
            assert info.size == {"some/object": 5, "empty": 0}[info.key]
            assert info.mtime_ns > 1_000_000_000 * 1_000_000_000
            assert not info.archived

    def test_a_listing_that_is_not_recursive_folds(self, made: Made) -> None:
        """Keys with a further slash are shown as one prefix each."""
        for name in ["a/1", "a/2/3", "a/2/4", "b/5", "c", "a.txt"]:
            made.put(name, b"x")
        assert keys(made, recursive=False) == ["a.txt", "c"]
        assert prefixes(made) == ["a/", "b/"]
        assert keys(made, "a/", recursive=False) == ["a/1"]
        assert prefixes(made, "a/") == ["a/2/"]
        assert keys(made, "a/") == ["a/1", "a/2/3", "a/2/4"]

    def test_a_prefix_without_objects_is_empty(self, made: Made) -> None:
        """Listing what is not there is no error, and a name is not a prefix of its neighbours."""
        made.put("data1/x", b"x")
        made.put("file", b"x")
        for prefix in ("data/", "none/at/all/", "file/"):
            assert keys(made, prefix) == keys(made, prefix, recursive=False) == prefixes(made, prefix) == []

    def test_more_objects_than_a_page(self, made: Made) -> None:
        """A listing of several pages has nothing twice and nothing left out."""
        names = [f"many/{i:04d}" for i in range(1203)]
        for name in names:
            made.put(name, b"")
        assert len(pages(made, "many/")) > 1
        assert keys(made, "many/") == keys(made, "many/", recursive=False) == names

    def test_keys_with_odd_characters(self, made: Made) -> None:
        """Blanks, percent signs, quotes, controls of shells and URLs: names like all others."""
        names = [
            "a b",
            "a%20b",
            "a+b",
            "a&b=c",
            "a#b?c",
            "ä",
            "a\u0308",
            "'q'\"q\"",
            "[x]*",
            "~",
            "a\\b",
            "a:b",
        ]
        for name in names:
            made.put(name, name.encode())
        assert keys(made) == sorted(names, key=str.encode)
        for name in names:
            assert read(made, made.source.stat(name), 0, len(name.encode())) == name.encode()

    def test_keys_that_no_file_tree_can_hold(self, made: Made) -> None:
        """A file beside a directory of its name, empty steps, markers: all are listed and read."""
        if not made.odd_keys:
            pytest.skip("this store holds a tree of files")
        names = ["a", "a/", "a//b", "a/b", "c//", "c//d"]
        for name in names:
            made.put(name, name.encode())
        assert keys(made) == sorted(names)
        assert keys(made, recursive=False) == ["a"]
        assert prefixes(made) == ["a/", "c/"]
        assert keys(made, "a/", recursive=False) == ["a/", "a/b"]
        assert prefixes(made, "a/") == ["a//"]
        assert keys(made, "c//", recursive=False) == ["c//", "c//d"]
        for name in names:
            assert read(made, made.source.stat(name), 0, len(name)) == name.encode()

    def test_keys_that_are_not_utf8(self, made: Made) -> None:
        """Bytes that are not UTF-8 travel as surrogate escapes."""
        if not made.byte_keys:
            pytest.skip("this store knows only UTF-8")
        name = b"caf\xe9/\xff\xfe".decode("utf-8", "surrogateescape")
        made.put(name, b"bytes")
        assert keys(made) == [name]
        assert read(made, made.source.stat(name), 1, 4) == b"yte"

    def test_stat_of_what_is_not_there(self, made: Made) -> None:
        """A missing object is NotFound, and so is what is only a directory."""
        made.put("dir/file", b"x")
        for missing in ("nothing", "dir", "dir/other", "dir/file/below"):
            with pytest.raises(NotFound):
                made.source.stat(missing)

    @pytest.mark.parametrize("missing", [".", "..", "../x", "a/../../x", "/x", "a/./b", "\0", "x" * 3000])
    def test_names_that_lead_elsewhere(self, made: Made, missing: str) -> None:
        """A key is a name and never a direction: what no object has is not found."""
        made.put("a/b", b"x")
        with pytest.raises(SourceError):
            made.source.stat(missing)

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, 1), (0, 100_000), (99_999, 100_000), (1, 99_999), (4096, 8192), (65_535, 65_537)],
    )
    def test_a_read_is_exactly_what_was_asked_for(self, made: Made, start: int, stop: int) -> None:
        """The bytes of the range, not one more or less."""
        made.put("object", BODY)
        assert read(made, made.source.stat("object"), start, stop) == BODY[start:stop]

    def test_a_read_by_what_the_listing_said(self, made: Made) -> None:
        """An object can be read by the listing alone, without a stat."""
        made.put("d/object", BODY)
        (info,) = (o for page in pages(made) for o in page.objects)
        assert read(made, info, 10, 20) == BODY[10:20]

    def test_a_read_can_be_kept(self, made: Made) -> None:
        """What was read does not change when the object does."""
        made.put("object", b"before")
        data = made.source.read(made.source.stat("object"), ByteRange(0, 6))
        made.put("object", b"after!")
        assert bytes(data) == b"before"

    def test_another_version_is_never_given_for_the_one_asked_for(self, made: Made) -> None:
        """New bytes are a new version, also of the same length, and a read of the old one is refused."""
        made.put("object", b"one")
        old = made.source.stat("object")
        made.put("object", b"two")
        new = made.source.stat("object")
        assert new.version.token != old.version.token
        assert read(made, new, 0, 3) == b"two"
        if made.refuses:
            with pytest.raises(VersionChanged):
                read(made, old, 0, 3)

    def test_a_read_of_a_deleted_object(self, made: Made) -> None:
        """An object that has gone is NotFound, in a read too."""
        made.put("object", b"one")
        old = made.source.stat("object")
        made.delete("object")
        with pytest.raises(NotFound):
            read(made, old, 0, 3)
        assert keys(made) == []

    def test_version_ids_only_where_there_are_any(self, made: Made) -> None:
        """Version ids are listed by sources that have them, which read their version for good."""
        made.put("object", b"one")
        if not made.source.traits.versioned:
            with pytest.raises(Unsupported):
                list(made.source.list("", recursive=True, versions=True))
            return
        ((old,),) = (page.objects for page in made.source.list("", recursive=True, versions=True))
        assert old.version.version_id
        made.put("object", b"two")
        assert read(made, old, 0, 3) == b"one"

    def test_many_threads(self, made: Made) -> None:
        """A source may be used from many threads at once."""
        bodies = {f"t/{i}": Random(i).randbytes(5000) for i in range(8)}
        for name, body in bodies.items():
            made.put(name, body)
        start = threading.Barrier(8)

        def work(name: str) -> None:
            random = Random(name)
            start.wait(10)
            info = made.source.stat(name)
            for _ in range(10):
                at = random.randrange(4999)
                stop = random.randrange(at + 1, 5000)
                assert read(made, info, at, stop) == bodies[name][at:stop]
            assert name in keys(made, "t/")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, bodies))

    def test_it_can_be_asked_how_it_is(self, made: Made) -> None:
        """A source's repr names its class and root; its URI is the same each time."""
        assert type(made.source).__name__ in repr(made.source)
        assert made.source.uri in repr(made.source)
        assert made.source.uri == made.source.uri
