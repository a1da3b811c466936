"""
Paths, on top of what every index offers: climbing up, stepping down, walking all of it.

Written against three questions of the `Index` protocol, so that live and pinned indexes walk alike.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from datacache.errors import NoSuchPath
from datacache.index import names
from datacache.index.index import ROOT
from datacache.model import Entry, Kind

_PAGE = 1000


class Steps(Protocol):
    """What of an index is asked on the way."""

    def entry(self, ino: int) -> Entry: ...
    def lookup(self, parent: int, name: bytes) -> Entry: ...
    def children(self, parent: int, *, after: int = 0, limit: int = 1000) -> Sequence[Entry]: ...


def resolve(index: Steps, path: str) -> Entry:
    """The entry of `path`, from the root down."""
    entry = index.entry(ROOT)
    for segment in path.split("/"):
        if segment in ("", "."):
            continue
        if segment == "..":
            raise NoSuchPath(f"{path}: a path of a data set has no '..'")
        try:
            name = names.to_bytes(segment)
        except UnicodeEncodeError:
            raise NoSuchPath(f"no such path: {path!r}") from None
        entry = index.lookup(entry.ino, name)
    return entry


def path_of(index: Steps, ino: int) -> str:
    """The path that `ino` names."""
    parts = []
    while ino != ROOT:
        entry = index.entry(ino)
        parts.append(names.to_text(entry.name))
        ino = entry.parent
    return "/" + "/".join(reversed(parts))


def walk(index: Steps, path: str) -> Iterator[tuple[str, Entry]]:
    """All files at or below `path`. Holds one page of each directory on the way down."""
    top = resolve(index, path)
    here = path_of(index, top.ino)
    if top.kind is not Kind.DIRECTORY:
        yield here, top
        return
    descent = [(here.rstrip("/") + "/", _all_children(index, top.ino))]
    while descent:
        prefix, entries = descent[-1]
        for entry in entries:
            at = prefix + names.to_text(entry.name)
            if entry.kind is not Kind.DIRECTORY:
                yield at, entry
            else:
                descent.append((at + "/", _all_children(index, entry.ino)))
                break
        else:
            descent.pop()


def _all_children(index: Steps, parent: int) -> Iterator[Entry]:
    after = 0
    while some := index.children(parent, after=after, limit=_PAGE):
        yield from some
        if len(some) < _PAGE:
            return
        after = some[-1].ino
