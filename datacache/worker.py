"""
The composition root: a data set's sources, index, cache, reader and load jobs, made from settings.

`Worker` builds them bottom up, closes them top down (what was built is closed too when a later step
fails), and implements `cluster.control.Control` over them. It asks no store before somebody needs
it, but for the manifest of a data set that has one. The mount, or the command line, uses the parts
by themselves: `.index` for names, `.reader` for bytes.
"""

import builtins
import ctypes
import json
import logging
import os
import resource
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from datacache.cache.directory import Owner
from datacache.cache.tiered import TieredCache, open_cache
from datacache.clock import Clock, SystemClock
from datacache.cluster import registry
from datacache.cluster.control import CachedPath
from datacache.cluster.registry import Registration
from datacache.config.keys import applicable
from datacache.config.settings import Settings, TierSettings
from datacache.config.spelling import spelled
from datacache.errors import ControlError, SettingError
from datacache.index.index import ROOT, Index
from datacache.index.live import LiveIndex
from datacache.index.manifest import Manifest, read_manifest
from datacache.index.opening import open_index
from datacache.model import ByteRange, CacheKey, Dataset, Entry, GiB, Kind, MiB, MountPoint, format_size
from datacache.reading.job import LoadRequest, LoadStatus
from datacache.reading.load import Loads
from datacache.reading.reader import Reader
from datacache.sources.opening import open_source
from datacache.sources.source import Source
from datacache.sources.steady import SteadySource

if TYPE_CHECKING:
    from datacache.writing.opening import Writing

_log = logging.getLogger(__name__)

MAX_MANIFEST = 1 * GiB
"""Bytes of a manifest, which is held in memory while it is read: some 8 million lines."""
_PIECE = 8 * MiB
"""Bytes of one read of it, so that each has the whole of --timeout."""
_JOBS_SHOWN = 10
"""Load jobs that `status` shows; `load_status` knows more."""
_SMALLEST = 64 * MiB
"""Half of the free space below which a cache is not worth having, and somebody should say so."""


def _keep_freed_memory() -> None:
    """Have glibc keep what fetches free for the next ones, instead of giving it back to the kernel.

    Every fetch takes megabytes and frees them a moment later. Given back, each page is faulted in and
    zeroed again: of a prewarm of 1 GiB, 140,000 faults and a third of its system time (55,000 with this).
    What is kept is bounded by what was in use at once, which the budget of --memory bounds.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC:
            mallopt(option, value)


def _take_descriptors() -> None:
    """Open as many files as the hard limit allows: the soft one is 1,024 by custom, for programs that use
    select(2), and a file that the kernel reads itself takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# M_ARENA_MAX: what one thread frees another can use. M_TRIM_THRESHOLD, and M_MMAP_THRESHOLD at its most.
_MALLOC = ((-8, 2), (-1, 512 * MiB), (-3, 32 * MiB))


class Worker:
    """A data set at work. `mount` is where it is, or will be, mounted; empty for none.

    `pid` is the process that others know it by, where that is not this one; `resumed` says that the mount
    was served by another before, so that names which the kernel was told then mean something: by the index
    whose identity is `index`, and no other. `passthrough`: writers are the kernel's own, so that the kernel
    can be asked for them.
    """

    def __init__(
        self, settings: Settings, *, clock: Clock | None = None, mount: str = "", pid: int | None = None,
        resumed: bool = False, index: str = "", passthrough: bool = False,
    ) -> None:  # fmt: skip
        _keep_freed_memory()
        _take_descriptors()
        self.clock = clock or SystemClock()
        self.mount = mount
        self._pid = pid or os.getpid()
        self._replaced: list[Callable[[Sequence[Entry]], None]] = []
        self._started = self.clock.wall()
        self._since = self.clock.monotonic()
        self._spelled = spelled(settings)
        self._attached: dict[str, Callable[[], dict[str, Any]]] = {}
        self._jobs: deque[str] = deque(maxlen=_JOBS_SHOWN)
        self._pins_lock = threading.Lock()
        self._known_pins: set[CacheKey] | None = None  # guarded by the lock
        self._closing, self._draining = threading.Event(), threading.Event()
        self.socket = registry.socket_path(
            settings.runtime, dataset=settings.dataset.name, mount=mount, pid=self._pid
        )
        """Where `cluster.server` is to listen for this worker."""
        with ExitStack() as building:
            opened = building.enter_context(opened_sources(settings, clock=self.clock))
            dataset, self.sources, manifest = opened
            tiers = _with_quotas(settings.cache.tiers, settings.state)
            self.settings = replace(settings, dataset=dataset, cache=replace(settings.cache, tiers=tiers))
            self.cache: TieredCache = open_cache(
                self.settings.cache, dataset=dataset.name, block_size=settings.reading.block_size,
                owner=Owner(os.getpid(), mount, self.socket), clock=self.clock,
            )  # fmt: skip
            building.callback(self.cache.close)
            if settings.writing.enabled:
                from datacache.writing.opening import landing_directory, make_way

                make_way(landing_directory(settings))
            bucket = open_index(
                dataset, self.sources, settings.index, state=settings.state, clock=self.clock,
                manifest=manifest, cache_entries=settings.mount.metadata_entries,
                on_replaced=self._superseded, resumed=resumed, identity=index,
            )  # fmt: skip
            building.callback(bucket.close)
            self.index: Index = bucket
            """The names of the data set, those that were written included."""
            self.reader = Reader(
                self.sources, self.cache, settings.reading, clock=self.clock, siblings=bucket.children
            )
            building.callback(self.reader.close)
            self.writing: Writing | None = None
            if settings.writing.enabled:
                self.writing = building.enter_context(
                    self._opened_writing(bucket, resumed=resumed, leases_tell=passthrough)
                )
                self.index = self.writing.overlay
            self.loads = Loads(bucket, self.reader, self.cache, settings.reading, clock=self.clock)
            building.callback(self.loads.close)
            building.callback(self._give_up)
            self._stack = building.pop_all()

    def __repr__(self) -> str:
        where = f" at {self.mount}" if self.mount else ""
        return f"<Worker {self.settings.dataset.name}{where}{' closed' if self._closing.is_set() else ''}>"

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop: jobs, reader, index, cache, in this order. What waits for a store is given up first, so no
        store that does not answer holds this up. Idempotent."""
        self._stack.close()

    def _give_up(self) -> None:
        self._closing.set()
        self.loads.stop()  # first, so that what the sources give up is no failure of theirs
        for source in self.sources:
            source.close()

    @contextmanager
    def _opened_writing(self, bucket: Index, *, resumed: bool, leases_tell: bool) -> "Iterator[Writing]":
        # Here, as it imports much, and most data sets are only read.
        from datacache.sources.opening import open_sink
        from datacache.writing.opening import open_writing

        if not isinstance(bucket, LiveIndex):
            raise SettingError("rw", "true", "a live bucket: what is pinned cannot be written")
        settings = self.settings
        with ExitStack() as building:
            sinks = []
            for point in settings.dataset.mounts:
                sink = open_sink(
                    point, settings=settings.sources, environment=settings.environment, clock=self.clock
                )
                building.callback(sink.close)
                sinks.append(sink)
            yield building.enter_context(
                open_writing(
                    settings, index=bucket, reader=self.reader, cache=self.cache, sinks=sinks,
                    owner=Owner(os.getpid(), self.mount, self.socket), clock=self.clock, resumed=resumed,
                    leases_tell=leases_tell,
                )
            )  # fmt: skip

    def registration(self) -> Registration:
        """What other processes find it by (`cluster.registry`)."""
        return Registration(
            pid=self._pid,
            mount=self.mount,
            dataset=self.settings.dataset.name,
            socket=self.socket,
            caches=[tier.path for tier in self.settings.cache.tiers],
            started=self._started,
            uris=[self.settings.dataset.manifest] if self.settings.dataset.manifest
            else [point.uri for point in self.settings.dataset.mounts],
        )  # fmt: skip

    def attach(self, name: str, stats: Callable[[], dict[str, Any]]) -> Callable[[], object]:
        """Let `status` show what `stats` returns as `name` (the mount's figures), until what is returned is
        called."""
        self._attached[name] = stats
        return lambda: self._attached.pop(name, None)

    def on_replaced(self, tell: Callable[[Sequence[Entry]], None]) -> Callable[[], object]:
        """Have `tell` called with entries whose paths have other versions now, until what is returned is."""
        self._replaced.append(tell)
        return lambda: self._replaced.remove(tell)

    # Control

    def ready(self) -> str:
        if self._closing.is_set():
            return "the worker ends"
        return "the worker drains" if self._draining.is_set() else ""

    def drain(self, *, timeout: float) -> dict[str, Any]:
        deadline = self.clock.monotonic() + timeout
        if not self._draining.is_set():
            _log.info("%s: draining", self.settings.dataset.name)
        self._draining.set()
        self.loads.stop()
        loads = self.loads.running(until=deadline)
        left: dict[str, Any] = {
            "clean": True,
            "pending": 0,
            "open": 0,
            "bytes": 0,
            "errors": [],
            "stuck": False,
        }
        if self.writing is not None:
            left = self.writing.flush(None, timeout=max(0.0, deadline - self.clock.monotonic()))
        clean = left.pop("clean")
        return {"drained": clean and not loads and not left["open"], "loads": loads, **left}

    def status(self) -> dict[str, Any]:
        """How everything is; docs/operations.md describes the keys."""
        reads = asdict(self.reader.stats())
        index = self.settings.index
        return {
            "dataset": self.settings.dataset.name,
            "mount": self.mount,
            "pid": os.getpid(),
            "broker": self._pid if self._pid != os.getpid() else 0,
            "version": _version(),
            "started": self._started,
            "uptime": self.clock.monotonic() - self._since,
            "rss_bytes": _resident(),
            "draining": self._draining.is_set(),
            "consistency": "immutable" if self.settings.dataset.manifest else str(index.consistency),
            "snapshot": index.snapshot,
            "state": self.settings.state,
            "settings": self._spelled,
            "manifest": self.settings.dataset.manifest,
            "mounts": [
                {"uri": point.uri, "path": point.path, "options": dict(point.options)}
                for point in self.settings.dataset.mounts
            ],
            "index": asdict(self.index.stats()),
            "tiers": [asdict(tier) for tier in self.cache.stats()],
            "reads": reads
            | {
                "hit_ratio_opens": _ratio(reads["opens_whole"], reads["opens"]),
                "hit_ratio_bytes": _ratio(reads["bytes_from_cache"], reads["bytes_served"]),
            },
            "sources": [_source_status(source) for source in self.sources],
            "loads": self._load_states(),
            **({"writing": self.writing.status()} if self.writing is not None else {}),
            **{name: stats() for name, stats in dict(self._attached).items()},
        }

    def load(self, request: LoadRequest) -> str:
        job = self.loads.start(request)
        self._jobs.append(job)
        return job

    def load_status(self, job: str) -> LoadStatus:
        return self.loads.status(job)

    def load_cancel(self, job: str) -> None:
        self.loads.cancel(job)

    def list(self, path: str, *, after: int = 0, limit: int = 1000) -> tuple[builtins.list[CachedPath], int]:
        top = self.index.resolve(path)
        if top.kind is Kind.FILE:
            return [self._cached_path(path, top)], 0
        entries = self.index.children(top.ino, after=after, limit=limit)
        below = path.strip("/")
        found = [self._cached_path(f"{below}/{_text(entry.name)}", entry) for entry in entries]
        return found, entries[-1].ino if len(entries) == limit else 0

    def stat(self, path: str) -> CachedPath:
        return self._cached_path(path, self.index.resolve(path))

    def evict(self, path: str, *, dry_run: bool = False) -> tuple[int, int]:
        copies = self._copies(path)
        if dry_run:
            return len(copies), sum(self.cache.present(key) for key in copies)
        count = sum(self.cache.evict(key) for key in copies)
        self._pins().difference_update(copies)
        return len(copies), count

    def pin(self, path: str, pinned: bool) -> int:
        copies, pins = self._copies(path), self._pins()
        for key in copies:
            self.cache.pin(key, pinned)
        if pinned:
            pins.update(copies)
        else:
            pins.difference_update(copies)
        return len(copies)

    def lease(self, tier: str, room: int, *, entries: int = 0, ttl: float) -> tuple[int, int]:
        limit = self.cache.tier(tier).lease(room, entries, ttl)
        return limit.bytes, limit.entries

    def flush(self, path: str, *, timeout: float) -> dict[str, Any]:
        if self.writing is None:
            raise ControlError(
                f"{path}: mounted read-only, so there is nothing to flush; --rw lets it be written"
            )
        top = self.index.resolve(path)
        where = None if top.ino == ROOT else self.index.path(top.ino)
        return self.writing.flush(top if where is not None else None, timeout=timeout)

    def verify(self) -> dict[str, int]:
        def go_on(*_: object) -> None:
            if self._closing.is_set():
                raise ControlError("the worker ends; verify was not finished")

        report = asdict(self.cache.verify(progress=go_on))
        for problem in report["problems"]:
            _log.warning("verify: %s", problem)
        return report | {"problems": len(report["problems"])}

    # The rest

    def _superseded(self, entries: Sequence[Entry]) -> None:
        """The bucket has other versions of these now: their copies go first when room is needed."""
        for entry in entries:
            self.cache.supersede(self.reader.cache_key(entry))
        for tell in list(self._replaced):
            tell(entries)

    def _load_states(self) -> builtins.list[dict[str, Any]]:
        found = []
        for job in list(self._jobs):
            with suppress(ControlError):  # forgotten by now
                status = asdict(self.loads.status(job))
                del status["failures"]  # up to a thousand; `load_status` has them
                found.append(status)
        return found

    def _cached_path(self, path: str, entry: Entry) -> CachedPath:
        path = "/" + path.strip("/")
        if entry.kind is Kind.DIRECTORY:
            return CachedPath(path, "directory", 0, entry.mtime_ns)
        key = self.reader.cache_key(entry)
        root = self.sources[entry.mount].uri.partition("?")[0].rstrip("/")
        present = {tier.name: tier.present(key) for tier in self.cache.tiers}
        return CachedPath(
            path, "file", entry.size, entry.mtime_ns, version=entry.version.token, uri=f"{root}/{entry.key}",
            cached={name: count for name, count in present.items() if count},
            pinned=any(present.values()) and key in self._pins(),
            dirty=self.writing is not None and self.writing.overlay.dirty(entry.ino),
        )  # fmt: skip

    def _pins(self) -> set[CacheKey]:
        """The keys of pinned copies. Looked up once: whoever owns a cache is the only one who pins there,
        and to walk a million copies for every page of `ls` would take seconds each."""
        with self._pins_lock:
            if self._known_pins is None:
                self._known_pins = {copy.key for copy in self.cache.entries() if copy.pinned}
            return self._known_pins

    def _copies(self, path: str) -> set[CacheKey]:
        """All that is cached below `path`, superseded versions included.

        By walking what is cached, not what there is: nothing needs to be listed for it, and what the
        bucket no longer has is found too.
        """
        is_below = self._below(path)
        return {copy.key for copy in self.cache.entries() if is_below(copy.key)}

    def _below(self, path: str) -> Callable[[CacheKey], bool]:
        """Whether a copy is one of `path`, or of a file below it."""
        top = self.index.resolve(path)
        path = self.index.path(top.ino)
        uris = [source.uri for source in self.sources]
        if self.settings.dataset.manifest and path != "/":
            # Its paths say nothing about keys; but it is all on this disk.
            known = {(uris[entry.mount], entry.key) for _, entry in self.index.walk(path)}
            return lambda key: (key.source, key.key) in known
        if top.kind is Kind.FILE:
            return lambda key: key.source == uris[top.mount] and key.key == top.key
        if top.mount >= 0:
            return lambda key: key.source == uris[top.mount] and key.key.startswith(top.key)
        under = path.rstrip("/") + "/"
        points = zip(self.settings.dataset.mounts, uris, strict=True)
        sources = {uri for point, uri in points if f"{point.path}/".startswith(under)}
        return lambda key: key.source in sources


@contextmanager
def opened_sources(
    settings: Settings, *, clock: Clock
) -> Iterator[tuple[Dataset, builtins.list[Source], Manifest | None]]:
    """The data set of `settings` with all its mount points, and a source for each: all that it takes to
    make a snapshot, which needs neither cache nor index."""
    with ExitStack() as building:
        dataset, manifest = _described(settings, clock=clock)
        yield dataset, [_opened(building, point, settings, clock) for point in dataset.mounts], manifest


def _opened(building: ExitStack, point: MountPoint, settings: Settings, clock: Clock) -> Source:
    source = open_source(point, settings=settings.sources, environment=settings.environment, clock=clock)
    building.callback(source.close)
    return source


def _described(settings: Settings, *, clock: Clock) -> tuple[Dataset, Manifest | None]:
    """The data set with all its mount points; those of a manifest are in the manifest."""
    dataset = settings.dataset
    if not dataset.manifest:
        return dataset, None
    with ExitStack() as reading:
        source = _opened(reading, dataset.mounts[0], settings, clock)
        info = source.stat(dataset.manifest.rpartition("/")[2])
        if info.size > MAX_MANIFEST:
            raise SettingError(
                "manifest",
                dataset.manifest,
                f"at most {format_size(MAX_MANIFEST)}; it has {format_size(info.size)}",
            )
        spans = [ByteRange(at, min(at + _PIECE, info.size)) for at in range(0, info.size, _PIECE)]
        manifest = read_manifest(b"".join(source.read(info, span) for span in spans), uri=dataset.manifest)
    for point in manifest.mounts:
        schemes = settings.index.manifest_schemes
        if schemes and point.uri.partition("://")[0].lower() not in schemes:
            raise SettingError(dataset.manifest, point.uri, f"URLs of {', '.join(schemes)} only")
    mounts = tuple(
        replace(point, options=applicable(point.uri, dataset.options)) for point in manifest.mounts
    )
    return replace(dataset, mounts=mounts), manifest


def _with_quotas(tiers: Sequence[TierSettings], state: str) -> tuple[TierSettings, ...]:
    """`tiers`, each with a quota: where none was given, half of what was free when it was first used.

    That figure is kept in the state directory. Measured anew, it would shrink with every start by
    what the cache itself has taken, and a cache that is over its quota must throw away.
    """
    open_ended = [tier for tier in tiers if not tier.quota]
    if not open_ended:
        return tuple(tiers)
    memory = os.path.join(state, "quotas.json")
    known: dict[str, int] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError), open(memory, encoding="utf-8") as file:
        known = {name: count for name, count in json.load(file).items() if count > 0}
    fresh = {
        tier.path: _half_of_free(tier.path, len(open_ended)) for tier in open_ended if tier.path not in known
    }
    if fresh:
        try:
            os.makedirs(state, mode=0o700, exist_ok=True)
            with open(f"{memory}.new", "w", encoding="utf-8") as file:
                json.dump(known | fresh, file)
            os.replace(f"{memory}.new", memory)
        except OSError as error:
            raise SettingError(
                "state", state, f"a directory that can be written ({error.strerror})"
            ) from error
    quotas = known | fresh
    return tuple(tier if tier.quota else replace(tier, quota=quotas[tier.path]) for tier in tiers)


def _half_of_free(path: str, shares: int) -> int:
    existing = path
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    found = os.statvfs(existing)
    half = found.f_bavail * found.f_frsize // (2 * shares)
    if half < _SMALLEST:
        raise SettingError(
            "--cache",
            path,
            f"a directory with more than {format_size(2 * shares * _SMALLEST)} free, or a size for it",
        )
    return half


def _source_status(source: Source) -> dict[str, Any]:
    stats = asdict(source.stats()) if isinstance(source, SteadySource) else {}
    return {"uri": source.uri, **stats}  # no traits: S3 has to be asked for them, and may be away


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _resident() -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _version() -> str:
    # Here, as it takes 30 ms to import: a mount that changes its daemon is waited for.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dataset-cache")
    except PackageNotFoundError:
        return "unknown"
