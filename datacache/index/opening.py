"""
From a data set and its sources to an index: live, a snapshot, or the catalogue of a manifest.
"""

import os
from collections.abc import Callable, Sequence

from datacache.clock import Clock
from datacache.config.settings import IndexSettings
from datacache.errors import IndexBroken, SettingError
from datacache.index import layout
from datacache.index.database import open_live
from datacache.index.index import Index
from datacache.index.live import LiveIndex
from datacache.index.manifest import Manifest, open_manifest
from datacache.index.snapshot import SnapshotIndex, open_snapshot
from datacache.model import Dataset, Entry
from datacache.sources.source import Source


def open_index(
    dataset: Dataset,
    sources: Sequence[Source],
    settings: IndexSettings,
    *,
    state: str,
    clock: Clock,
    manifest: Manifest | None = None,
    cache_entries: int = 100_000,
    on_replaced: Callable[[Sequence[Entry]], None] | None = None,
    resumed: bool = False,
    identity: str = "",
) -> Index:
    """The index of `dataset`, whose mount points are read through `sources`, kept in directory `state`.

    A data set of a manifest needs it, as read by `read_manifest`; it is pinned, for a list does not
    change. `on_replaced` is `LiveIndex`'s. `resumed`: for a mount that goes on, whose kernel may name
    former versions; a live index forgets them otherwise. `identity`: what the index must be, since its
    numbers are in use; none is made anew then. Raises SettingError, NoSuchSnapshot, IndexBroken, and for
    a new manifest SourceError.
    """
    index = _opened(
        dataset, sources, settings, state=state, clock=clock, manifest=manifest,
        cache_entries=cache_entries, on_replaced=on_replaced, resumed=resumed, anew=not identity,
    )  # fmt: skip
    if identity and index.identity != identity:
        index.close()
        raise IndexBroken(f"the index in {state} is another one than this mount was made with")
    return index


def _opened(
    dataset: Dataset, sources: Sequence[Source], settings: IndexSettings, *, state: str, clock: Clock,
    manifest: Manifest | None, cache_entries: int,
    on_replaced: Callable[[Sequence[Entry]], None] | None, resumed: bool, anew: bool,
) -> Index:  # fmt: skip
    layout.check_mounts(dataset)
    try:
        os.makedirs(state, mode=0o700, exist_ok=True)
    except OSError as error:
        raise SettingError(
            "state", state, f"a directory that can be made and written ({error.strerror})"
        ) from error
    if settings.snapshot:
        found = open_snapshot(dataset, sources, state=state, name=settings.snapshot)
        return SnapshotIndex(found, cache_entries=cache_entries)
    if dataset.manifest:
        if manifest is None:
            raise ValueError(f"the manifest {dataset.manifest} of {dataset.name} was not read")
        return SnapshotIndex(
            open_manifest(dataset, manifest, sources, state=state), cache_entries=cache_entries
        )
    database = open_live(
        os.path.join(state, "index.db"),
        made_for=layout.made_for(dataset, sources),
        skeleton=layout.skeleton(dataset),
        resumed=resumed,
        anew=anew,
    )
    return LiveIndex(
        database, sources, settings, clock=clock, cache_entries=cache_entries, on_replaced=on_replaced
    )
