"""
What tests of reading need: entries of a source's objects, and an index that is a list of paths.
"""

import threading
from collections.abc import Callable, Iterator, Mapping

from datacache.errors import NoSuchPath
from datacache.index.index import ROOT, IndexStats
from datacache.model import Entry, Kind, ObjectInfo, Version
from datacache.sources.source import Source


def entry_of(info: ObjectInfo, *, ino: int = 2, parent: int = 1, mount: int = 0) -> Entry:
    """The entry of an object, as an index would have it."""
    name = info.key.rpartition("/")[2].encode("utf-8", "surrogateescape")
    return Entry(
        ino, parent, name, Kind.FILE, info.size, info.mtime_ns, mount, info.key, info.version, info.archived
    )


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Let other threads run until `condition` holds; fails when it does not in `seconds`."""
    pause = threading.Event()
    for _ in range(int(seconds * 2000)):
        if condition():
            return
        pause.wait(0.0005)
    raise AssertionError("it never came to that")


class ListedIndex:
    """All objects of a source under their keys; directories are the parts before "/"."""

    def __init__(self, source: Source) -> None:
        self._paths: dict[str, Entry] = {}
        self._inos: dict[int, str] = {}
        self._add("", Entry(1, 1, b"", Kind.DIRECTORY, 0, 0, 0, "", Version()))
        for page in source.list("", recursive=True):
            for info in page.objects:
                parent = self._directory(info.key.rpartition("/")[0])
                self._add(info.key, entry_of(info, ino=len(self._inos) + 1, parent=parent))
        self.before_entry: Callable[[int], None] = lambda ino: None

    def _add(self, path: str, entry: Entry) -> None:
        self._paths[path] = entry
        self._inos[entry.ino] = path

    def _directory(self, path: str) -> int:
        if path not in self._paths:
            above, _, name = path.rpartition("/")
            parent, ino = self._directory(above), len(self._inos) + 1
            self._add(path, Entry(ino, parent, name.encode(), Kind.DIRECTORY, 0, 0, 0, "", Version()))
        return self._paths[path].ino

    @property
    def files(self) -> Mapping[str, Entry]:
        return {path: entry for path, entry in self._paths.items() if entry.kind is Kind.FILE}

    def resolve(self, path: str) -> Entry:
        try:
            return self._paths[path.strip("/")]
        except KeyError:
            raise NoSuchPath(f"no such path: {path}") from None

    def lookup(self, parent: int, name: bytes) -> Entry:
        return self.resolve(f"{self._inos[parent]}/{name.decode()}")

    def lookup_nowait(self, parent: int, name: bytes) -> Entry | None:
        return self.lookup(parent, name)

    def entry(self, ino: int, generation: int | None = None) -> Entry:
        if ino != ROOT:
            self.before_entry(ino)
        if generation:
            raise NoSuchPath(f"no such version: {generation} of number {ino}")
        try:
            return self._paths[self._inos[ino]]
        except KeyError:
            raise NoSuchPath(f"no such path: number {ino}") from None

    def current(self, ino: int) -> Entry:
        return self.entry(ino)

    def children(self, parent: int, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        found = [e for e in self._paths.values() if e.parent == parent and e.ino > max(after, 1)]
        return sorted(found, key=lambda entry: entry.ino)[:limit]

    def walk(self, path: str = "/") -> Iterator[tuple[str, Entry]]:
        base = path.strip("/")
        self.resolve(base)
        for name, entry in self.files.items():
            if not base or name == base or name.startswith(base + "/"):
                yield "/" + name, entry

    def put(self, info: ObjectInfo) -> None:
        """The object has another version now."""
        known = self._paths[info.key]
        self._paths[info.key] = entry_of(info, ino=known.ino, parent=known.parent)

    def forget(self, path: str) -> None:
        """The path is gone."""
        del self._inos[self._paths.pop(path).ino]

    def path(self, ino: int) -> str:
        return "/" + self._inos[ino]

    def fresh_for(self, parent: int) -> float:
        return float("inf")

    def edition(self, parent: int) -> int | None:
        return 0

    def outdated(self, entry: Entry) -> bool:
        return False

    @property
    def pinned(self) -> bool:
        return True

    def stats(self) -> IndexStats:
        return IndexStats(len(self.files), sum(e.size for e in self.files.values()), 1)

    def close(self) -> None:
        """Nothing to let go of."""
