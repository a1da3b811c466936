"""
A data set that is a list: JSON lines of object URLs, turned into a pinned catalogue.

`index.lines` says what a line may be. Every URL's bucket or host is one mount point; the paths are those of
the lines, so two of them may lie in one directory.

An object whose size or version the manifest does not say is asked for once, when the catalogue is
made; the catalogue is kept under the digest of the manifest, so that the next start asks nothing.
`read_manifest` has every line held against the rules, and `Manifest.items` reads them again one by one:
a list of millions is never in memory as objects.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from datacache.errors import NotFound, SettingError
from datacache.index import database as db
from datacache.index import layout
from datacache.index.building import Builder, new_catalogue
from datacache.index.database import Database
from datacache.index.lines import check_lines, lines, parsed
from datacache.model import Dataset, MountPoint, ObjectInfo, Version
from datacache.sources.source import Source

_AT_ONCE = 32
"""Objects asked for at once: enough to hide 30 ms of latency behind 1,000 answers a second."""


class Item(NamedTuple):
    """One line of a manifest."""

    line: int
    mount: int
    key: str
    path: str
    """Relative to the root of the data set."""
    size: int | None
    version: Version


@dataclass(frozen=True)
class Manifest:
    """A manifest that keeps the rules."""

    uri: str
    digest: str
    """Of the file's bytes: another list is another catalogue."""
    mounts: tuple[MountPoint, ...]
    """One for each bucket or host, in order of appearance."""
    data: bytes

    def __repr__(self) -> str:
        return f"<Manifest {self.uri} {len(self.data)} bytes, {len(self.mounts)} mounts>"

    @property
    def items(self) -> Iterator[Item]:
        """The lines, read anew."""
        numbers = {mount.uri: number for number, mount in enumerate(self.mounts)}
        for line, raw in lines(self.data):
            found = parsed(raw, self.uri, line)
            yield Item(line, numbers[found.root], found.key, found.path, found.size, found.version)

    def build(
        self, builder: Builder, sources: Sequence[Source], *, progress: Callable[[int], None] | None = None
    ) -> None:
        """Put every object into a catalogue, asking the stores for what the lines do not say."""
        waiting: deque[tuple[Item, Future[ObjectInfo] | None]] = deque()

        def add(item: Item, future: "Future[ObjectInfo] | None") -> None:
            builder.add(item.path, item.mount, self._info(item, future))
            if progress is not None and builder.files % 1000 == 0:
                progress(builder.files)

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="manifest") as pool:
            try:
                for item in self.items:
                    known = item.size is not None and item.version != Version()
                    future = None if known else pool.submit(sources[item.mount].stat, item.key)
                    waiting.append((item, future))
                    if len(waiting) > 2 * _AT_ONCE:
                        add(*waiting.popleft())
                while waiting:
                    add(*waiting.popleft())
                if progress is not None:
                    progress(builder.files)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _info(self, item: Item, future: "Future[ObjectInfo] | None") -> ObjectInfo:
        if future is None:
            return ObjectInfo(item.key, item.size or 0, item.version)
        where = f"{self.uri}, line {item.line}"
        try:
            found = future.result()
        except NotFound as error:
            raise NotFound(f"{where}: {error}") from error
        if item.size not in (None, found.size):
            raise SettingError(where, item.size, f"the size of the object, which has {found.size} bytes")
        if item.version.etag not in ("", found.version.etag):
            raise SettingError(
                where,
                item.version.etag,
                f"the object's entity tag, which is {found.version.etag or 'none'} now",
            )
        return found


def read_manifest(data: bytes, *, uri: str) -> Manifest:
    """Check a manifest. Raises SettingError with the number of the line and what would be right."""
    roots = check_lines(data, uri=uri)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return Manifest(uri, digest, tuple(map(MountPoint, roots)), data)


def open_manifest(dataset: Dataset, manifest: Manifest, sources: Sequence[Source], *, state: str) -> Database:
    """The catalogue of a manifest, made where there is none of these very bytes yet."""
    directory = os.path.join(state, "manifests")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    made_for = layout.made_for(dataset, sources)
    digest = hashlib.blake2b(made_for.encode() + manifest.digest.encode(), digest_size=16).hexdigest()
    path = os.path.join(directory, digest + ".db")
    with db.locked(os.path.join(directory, ".lock"), wait=True):
        if not db.fits(path, made_for):
            with new_catalogue(path, layout.skeleton(dataset)) as builder:
                manifest.build(builder, sources)
                builder.finish({"made_for": made_for})
        for name in os.listdir(directory):  # of lists that are no more; who has one open keeps it
            if name not in (".lock", digest + ".db"):
                os.unlink(os.path.join(directory, name))
        return db.open_pinned(path, made_for=made_for, name=manifest.uri)
