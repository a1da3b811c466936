"""What every index must do, whatever it is made of. Run by test_index.py on each implementation."""

import threading
from collections.abc import Callable

import pytest

from datacache.errors import NoSuchPath, NotADirectory
from datacache.index.index import ROOT, Index
from datacache.model import Kind
from datacache.sources.memory import MemorySource

Opener = Callable[..., Index]
"""Opens an index of the sources it is given, mounted at the paths it is given (`paths`, default "/")."""

OBJECTS = {
    "top.txt": b"0123456789",
    "train/a.jpg": b"a",
    "train/b.jpg": b"bb",
    "train/deep/er/c.jpg": b"ccc",
    "val/d.jpg": b"dddd",
}


def paths(index: Index, top: str = "/") -> list[str]:
    return sorted(path for path, _ in index.walk(top))


class IndexSuite:
    """Subclasses offer the fixture `opener`."""

    def test_walk_finds_every_object_with_its_key_size_and_version(self, opener: Opener) -> None:
        """What the store holds is what the index shows, each under its path, and nothing else."""
        source = MemorySource(objects=OBJECTS)
        index = opener([source])
        found = dict(index.walk())
        assert sorted(found) == sorted("/" + key for key in OBJECTS)
        for path, entry in found.items():
            info = source.stat(entry.key)
            assert "/" + entry.key == path
            assert (entry.size, entry.version, entry.mtime_ns) == (info.size, info.version, info.mtime_ns)
            assert (entry.kind, entry.mount, entry.archived) == (Kind.FILE, 0, False)

    def test_walk_of_a_part(self, opener: Opener) -> None:
        """A walk begins where it is told to: a directory, or one file."""
        index = opener([MemorySource(objects=OBJECTS)])
        assert paths(index, "/train") == ["/train/a.jpg", "/train/b.jpg", "/train/deep/er/c.jpg"]
        assert paths(index, "train/deep/") == ["/train/deep/er/c.jpg"]
        assert paths(index, "/top.txt") == ["/top.txt"]

    def test_an_edition_stays_while_nothing_changes(self, opener: Opener) -> None:
        """Whatever is looked up; and whoever lists a directory knows it."""
        index = opener([MemorySource(objects=OBJECTS)])
        train = index.resolve("/train").ino
        index.children(train)
        edition = index.edition(train)
        assert edition is not None
        dict(index.walk())
        index.resolve("/train/deep/er/c.jpg")
        assert index.edition(train) == edition

    def test_resolve_and_path_are_inverse(self, opener: Opener) -> None:
        """`path` of what `resolve` found is the path that was resolved; the root is 1 and its own parent."""
        index = opener([MemorySource(objects=OBJECTS)])
        for path in ("/", "/train", "/train/deep/er", "/train/deep/er/c.jpg"):
            assert index.path(index.resolve(path).ino) == path
        root = index.entry(ROOT)
        assert (root.ino, root.parent, root.kind, root.key) == (1, 1, Kind.DIRECTORY, "")
        assert index.resolve("/train/deep").key == "train/deep/"
        assert index.resolve("./train//deep").ino == index.resolve("/train/deep").ino

    @pytest.mark.parametrize(
        "path", ["/nothing", "/train/nothing", "/nothing/x", "/../top.txt", "/train/\ud800"]
    )
    def test_a_path_that_is_not_there(self, opener: Opener, path: str) -> None:
        """What does not exist is NoSuchPath; `..` leads nowhere."""
        with pytest.raises(NoSuchPath):
            opener([MemorySource(objects=OBJECTS)]).resolve(path)

    def test_a_file_is_not_a_directory(self, opener: Opener) -> None:
        """A lookup or a listing in a file is NotADirectory."""
        index = opener([MemorySource(objects=OBJECTS)])
        file = index.resolve("/top.txt")
        with pytest.raises(NotADirectory):
            index.resolve("/top.txt/x")
        with pytest.raises(NotADirectory):
            index.lookup_nowait(file.ino, b"x")
        with pytest.raises(NotADirectory):
            index.children(file.ino)

    def test_nowait_knows_what_lookup_found(self, opener: Opener) -> None:
        """Once a directory is known, its names and the names that it lacks are answered at once."""
        index = opener([MemorySource(objects=OBJECTS)])
        train = index.resolve("/train")
        entry = index.lookup(train.ino, b"a.jpg")
        assert index.lookup_nowait(train.ino, b"a.jpg") == entry
        assert index.lookup_nowait(train.ino, b"b.jpg") == index.lookup(train.ino, b"b.jpg")
        for _ in range(2):
            with pytest.raises(NoSuchPath, match=r"/train/c\.jpg"):
                index.lookup_nowait(train.ino, b"c.jpg")

    def test_entry_and_current_agree_with_lookup(self, opener: Opener) -> None:
        """One path is one entry, however it is asked for; an unknown inode is NoSuchPath."""
        index = opener([MemorySource(objects=OBJECTS)])
        for path in ("/train", "/train/a.jpg", "/top.txt"):
            entry = index.resolve(path)
            assert index.entry(entry.ino) == entry == index.current(entry.ino)
            assert index.lookup(entry.parent, entry.name) == entry
        with pytest.raises(NoSuchPath):
            index.entry(4711)
        with pytest.raises(NoSuchPath):
            index.current(4711)

    def test_a_version_is_named_by_inode_and_generation(self, opener: Opener) -> None:
        """What never changed is generation 0, everywhere; another generation is NoSuchPath."""
        index = opener([MemorySource(objects=OBJECTS)])
        for path in ("/", "/train", "/train/a.jpg"):
            entry = index.resolve(path)
            assert entry.generation == 0
            assert index.entry(entry.ino, 0) == entry
            with pytest.raises(NoSuchPath, match="version 1"):
                index.entry(entry.ino, 1)
        assert {e.generation for e in index.children(ROOT)} == {0}
        with pytest.raises(NoSuchPath):
            index.entry(4711, 0)

    def test_children_come_in_pages_by_inode(self, opener: Opener) -> None:
        """A directory is read in pages of any size, each entry once; the offset is the last inode seen."""
        keys = [f"d/{i:04d}" for i in range(257)] + ["d/sub/x"]
        index = opener([MemorySource(objects=dict.fromkeys(keys, b"x"), page_size=100)])
        d = index.resolve("/d").ino
        whole = index.children(d, limit=1000)
        assert sorted(e.name for e in whole) == sorted([b"%04d" % i for i in range(257)] + [b"sub"])
        assert [e.ino for e in whole] == sorted({e.ino for e in whole})
        pages, after = [], 0
        while some := index.children(d, after=after, limit=10):
            pages += some
            after = some[-1].ino
        assert pages == whole
        assert index.children(d, after=whole[-1].ino) == []

    def test_stats_count_what_was_indexed(self, opener: Opener) -> None:
        """Files, bytes and directories are those that a walk has seen."""
        index = opener([MemorySource(objects=OBJECTS)])
        list(index.walk())
        stats = index.stats()
        assert (stats.files, stats.bytes, stats.directories) == (5, 20, 5)
        assert stats.stale == 0

    def test_many_mounts_are_one_namespace(self, opener: Opener) -> None:
        """Each store appears at its path, under directories that exist for its sake."""
        a, b = MemorySource("memory://a", {"x": b"1"}), MemorySource("memory://b", {"y": b"22", "z/y": b"3"})
        index = opener([a, b], paths=["/train", "/more/val"])
        assert paths(index) == ["/more/val/y", "/more/val/z/y", "/train/x"]
        assert [index.resolve(p).mount for p in ("/", "/more", "/more/val", "/train")] == [-1, -1, 1, 0]
        assert (index.resolve("/more/val/z/y").mount, index.resolve("/more/val/z/y").key) == (1, "z/y")
        assert [e.name for e in index.children(ROOT)] == [b"train", b"more"]
        assert index.fresh_for(ROOT) == float("inf")
        with pytest.raises(NoSuchPath):
            index.resolve("/more/train")

    def test_an_empty_store_is_an_empty_directory(self, opener: Opener) -> None:
        """Nothing in the bucket: the mount point is there, and empty."""
        index = opener([MemorySource()])
        assert index.children(ROOT) == []
        assert list(index.walk()) == []

    def test_odd_keys_are_all_shown_and_nothing_escapes(self, opener: Opener) -> None:
        """Nothing escapes the mount: every odd key is one file, under a name that a file system takes, that
        leads back to its key."""
        odd = {
            "a", "a.b", "a/b", "a/c/d", "x//y", "//", "../z", "./q", "..", ".", "n\0m", "b\udcff", "p%file",
            "m" * 300 + ".jpg", "m" * 300 + ".jpg/inside", "full/", "e\u0301", "\xe9", "e/%empty", "e//",
        }  # fmt: skip
        source = MemorySource(objects=dict.fromkeys(odd, b"x"))
        source.put("empty/", b"")
        index = opener([source])
        found = list(index.walk())
        assert {entry.key for _, entry in found} == odd
        assert len({path for path, _ in found}) == len(odd)
        for path, entry in found:
            parts = path.split("/")[1:]
            assert not {"", ".", ".."} & set(parts)
            assert all(len(part.encode("utf-8", "surrogateescape")) <= 255 for part in parts)
            assert index.resolve(path) == entry
        assert index.resolve("/a").kind is Kind.DIRECTORY
        assert index.resolve("/a%file").key == "a"
        assert index.children(index.resolve("/empty").ino) == []

    def test_threads_see_the_same(self, opener: Opener) -> None:
        """Eight threads that look everything up at once get what one alone gets."""
        index = opener([MemorySource(objects={f"d{i % 7}/{i}": b"x" * i for i in range(200)})])
        wrong: list[object] = []

        def look() -> None:
            try:
                for i in range(200):
                    entry = index.resolve(f"/d{i % 7}/{i}")
                    if entry.size != i or index.path(entry.ino) != f"/d{i % 7}/{i}":
                        wrong.append(entry)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
