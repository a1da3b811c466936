"""
A writable data set put together: landing zone, journal, overlay, uploader.
"""

import json
import os
import socket
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

from datacache.cache import limits
from datacache.cache.disk import Disk, Handle
from datacache.cache.owner import Owner
from datacache.cache.tiered import TieredCache
from datacache.clock import Clock, boot_id
from datacache.config.settings import Settings
from datacache.errors import LandingBroken, Locked, SettingError
from datacache.index.live import LiveIndex
from datacache.model import Dataset, Entry, Kind, MountPoint
from datacache.sources.sink import Sink
from datacache.writing.ballast import Ballast
from datacache.writing.copies import Copies, Reader
from datacache.writing.early import Early
from datacache.writing.journal import Journal
from datacache.writing.keeper import Keeper, Watermarks
from datacache.writing.landing import FILES, MANAGED, Landing
from datacache.writing.overlay import Overlay
from datacache.writing.settling import Settling
from datacache.writing.uploader import Uploader


class Writing:
    """The write path of one data set, at work."""

    def __init__(
        self, landing: Landing, journal: Journal, overlay: Overlay, settling: Settling, uploader: Uploader,
        keeper: Keeper, early: Early, *, beside: str,
    ) -> None:  # fmt: skip
        """`beside`: the tier of the cache on the file system of the landing zone (`tier_beside`)."""
        self.landing, self.journal, self.overlay = landing, journal, overlay
        self.settling, self.uploader, self.keeper = settling, uploader, keeper
        self.early, self._beside = early, beside

    def __repr__(self) -> str:
        return f"<Writing {self.landing.directory}>"

    def flush(self, top: Entry | None, *, timeout: float) -> dict[str, Any]:
        """Wait until all that is due below `top` (None: all of it) is in the bucket, for `timeout` seconds at
        most; whether it is, and what is left."""
        self.overlay.closes.wait()
        unnoted = self.overlay.note_closes()
        self.overlay.sync_names()
        prefix = None if top is None else (top.mount, self.overlay.key_of(top))
        flushed = self.uploader.flush(prefix, timeout=timeout)
        dirty = self.settling.dirty()
        return {
            "clean": flushed.complete and not unnoted and not self.overlay.awaited,
            "pending": dirty.due, "open": dirty.open, "bytes": dirty.bytes, "stuck": flushed.stuck,
            "errors": [*self._unnoted(unnoted), *self.uploader.reasons(flushed.left)][:20],
        }  # fmt: skip

    def _unnoted(self, count: int) -> list[str]:
        if not count:
            return []
        closed = "1 file was" if count == 1 else f"{count} files were"
        return [f"{closed} closed, which cannot be noted: the landing zone has no room for its journal"]

    def status(self) -> dict[str, Any]:
        """For `datacache status`; docs/operations.md describes the keys."""
        room = self.landing.room()
        return {
            "landing": self.landing.directory,
            "landing_total_bytes": room.total,
            "landing_free_bytes": room.free,
            **{
                f"dirty_{name}": value
                for name, value in asdict(self.settling.dirty()).items()
                if name != "oldest"
            },
            "dirty_unnoted": len(self.overlay.ledger.unnoted),
            "short_of_room": self.keeper.hurrying,
            "landing_tier": self._beside,
            **asdict(self.overlay.copies.stats()),
            "parked": list(self.settling.parked().values())[:20],
            "uploads": self.uploader.status(),
        }


def landing_directory(settings: Settings) -> str:
    """Where what is written lands."""
    return settings.writing.landing or os.path.join(settings.state, "landing")


def make_way(directory: str) -> None:
    """Where the disk of a landing zone is full, give up what was kept for that: to open it, and the catalogue
    of names that mostly lies beside it, takes space."""
    Ballast(os.path.join(directory, MANAGED)).lighten()


def tier_beside(settings: Settings) -> str:
    """The tier whose files can become landing files without a copy, and the other way round: the first that
    lies, or would be made, on the same file system in the same mount; empty: none does."""
    disk = Disk()
    with suppress(OSError):
        landing = _at(landing_directory(settings))
        for tier in settings.cache.tiers:
            there = _at(tier.path)
            if disk.together(there.fd, at=landing.fd):
                return f"{tier.medium}:{tier.path}"
    return ""


def _at(path: str) -> Handle:
    """The directory `path`, or where it would be made."""
    return Handle(os.open(limits.existing(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


@contextmanager
def open_writing(
    settings: Settings,
    *,
    index: LiveIndex,
    reader: Reader,
    cache: TieredCache,
    sinks: Sequence[Sink],
    owner: Owner,
    clock: Clock,
    resumed: bool,
    leases_tell: bool,
) -> Iterator[Writing]:
    """The write path of `settings`, until the block is left. Raises Locked, LandingError, SettingError."""
    directory = landing_directory(settings)
    _check_place(directory, [sink.uri for sink in sinks])
    with ExitStack() as built:
        try:
            landing = Landing(
                directory, owner, reserve=settings.writing.reserve, block=settings.reading.block_size
            )
        except Locked as taken:
            raise Locked(directory, pid=taken.pid, mount=taken.mount, what="landing zone") from taken
        except LandingBroken as broken:
            raise SettingError(
                "--landing", directory, f"a directory, or one that can be made ({broken})"
            ) from broken
        built.callback(landing.close)
        journal = Journal(landing.journal)
        built.callback(journal.close)
        _check_owed(journal, directory, settings.dataset, [sink.uri for sink in sinks])
        overlay = Overlay(
            index, journal, landing, clock=clock, copies=Copies(reader, cache),
            roots=[index.resolve(point.path).ino for point in settings.dataset.mounts],
            accepts=lambda mount, key: sinks[mount].accepts(key),
            resumed=resumed, leases_tell=leases_tell, boot=boot_id(),
        )  # fmt: skip
        built.callback(overlay.close)
        host = socket.gethostname().partition(".")[0]
        settling = Settling(overlay, conflict=settings.writing.conflict, host=host)
        uploader = Uploader(settling, sinks, settings.upload, clock=clock)
        built.callback(uploader.close)
        overlay.owing.attach(uploader)
        early = Early(
            overlay, uploader.flush, clock, after=settings.upload.open_after, timeout=settings.upload.timeout
        )
        marks = Watermarks(settings.writing.high, settings.writing.low)
        keeper = Keeper(landing, journal, overlay, copies=cache, uploads=uploader, marks=marks)
        built.callback(keeper.close)
        keeper.start()
        beside = tier_beside(settings)
        yield Writing(landing, journal, overlay, settling, uploader, keeper, early, beside=beside)


def _check_place(directory: str, uris: Sequence[str]) -> None:
    """What lands must not lie in what is shown, nor the other way round."""
    own = os.path.realpath(directory)
    for uri in uris:
        if uri.startswith("file://"):
            store = os.path.realpath(uri.removeprefix("file://").partition("?")[0])
            if os.path.commonpath((own, store)) in (own, store):
                raise SettingError("--landing", directory, f"a directory neither in nor above {uri}")


def _check_owed(journal: Journal, directory: str, dataset: Dataset, uris: list[str]) -> None:
    """A landing zone is of one data set as long as it owes its buckets something."""
    known = journal.meta().get("stores")
    if known is not None and json.loads(known) != uris and (journal.ops() or journal.nodes()):
        raise SettingError(
            "--landing",
            directory,
            f"one with nothing for another data set in it; it holds what was written to "
            f"{', '.join(json.loads(known))}: `datacache recover {directory}` uploads that",
        )
    points = [{"uri": one.uri, "path": one.path, "options": dict(one.options)} for one in dataset.mounts]
    with journal.change("mounts") as change:
        change.set_meta("stores", json.dumps(uris))
        change.set_meta("dataset", json.dumps({"name": dataset.name, "mounts": points}))


def owed(directory: str) -> Dataset:
    """The data set that a landing zone belongs to. Raises SettingError where there is none."""
    path = os.path.join(directory, MANAGED, "journal.db")
    if not os.path.exists(path):
        raise SettingError("DIR", directory, f"a landing zone: a directory with {MANAGED}/journal.db in it")
    journal = Journal(path)
    try:
        known = json.loads(journal.meta().get("dataset", "{}"))
    finally:
        journal.close()
    if not known:
        raise SettingError("DIR", directory, "a landing zone that was used by a mount")
    return Dataset(known["name"], tuple(MountPoint(**point) for point in known["mounts"]))


def what_is_owed(directory: str) -> str:
    """What a landing zone that nobody uses holds and its bucket may not have, in words; empty: nothing. What
    cannot be read counts as owed. Changes nothing."""
    managed = os.path.join(directory, MANAGED)
    journal = os.path.join(managed, "journal.db")
    try:
        files = os.listdir(os.path.join(managed, FILES))
        if files:
            return f"{len(files)} files"
        if not os.path.exists(journal):
            return ""
        with closing(sqlite3.connect(f"file:{quote(journal)}?mode=rw", uri=True, timeout=5)) as database:
            (ops,) = database.execute("SELECT count(*) FROM ops").fetchone()
            (nodes,) = database.execute(
                "SELECT count(*) FROM nodes WHERE kind != ? AND NOT orphan", (int(Kind.DIRECTORY),)
            ).fetchone()
    except FileNotFoundError:
        return "" if not os.path.exists(journal) else "a journal without its files"
    except (OSError, sqlite3.Error) as error:
        return f"what cannot be read ({error})"
    return f"{ops} operations and {nodes} files" if ops or nodes else ""
