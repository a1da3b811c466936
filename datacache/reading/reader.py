"""
The only place where a miss becomes a fetch.

An open object is one version of one object. All who have it open share one `_Object`: the entry of
the cache, and the *flights*, which are spans that are being fetched (or were, and found no room in
any tier). Flights of an object never overlap: whoever needs bytes that are under way joins the
flight, so any number of readers causes one request. A reader that must wait runs the flight in its
own thread, also one that was queued ahead of it; threads of the pool fetch only what nobody waits
for yet. As soon as bytes arrive their readers are served from the buffer; filling the cache comes
after that, and when the cache fails nobody notices.

Locks, hand-offs and invariants, with scenarios: docs/concurrency.md.
What to fetch: `plan`. What to fetch ahead: `prefetch`. How much at once: `budget`.
"""

import copy
import enum
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from datacache.cache.tier import CachedFile, Lent, Tier
from datacache.clock import Clock
from datacache.config.settings import ReadingSettings
from datacache.errors import (
    Archived,
    CacheError,
    DatacacheError,
    TierBroken,
    Unavailable,
    WrongBytes,
)
from datacache.model import Buffer, ByteRange, CacheKey, Entry, Kind, MiB, ObjectInfo
from datacache.reading import plan
from datacache.reading.budget import TRANSIENT, Budget, Grant
from datacache.reading.pool import Pool
from datacache.reading.prefetch import After, Announced, Listing, Window
from datacache.sources.source import Source

logger = logging.getLogger(__name__)

_NOTHING = nullcontext()
_STRETCH = 32 * MiB
"""A longer read is done in stretches of this, so that what it needs beside its result is bounded."""


class Siblings(Protocol):
    """`Index.children`: where the reader looks up what comes next in a directory."""

    def __call__(self, parent: int, *, after: int, limit: int) -> Sequence[Entry]: ...


@dataclass(frozen=True)
class ReaderStats:
    """What readers asked for and where it came from, since start."""

    opens: int
    opens_whole: int
    """Of `opens`: every byte was present in a tier."""
    open_objects: int
    """Versions of objects that are open, or being fetched, now."""
    bytes_served: int
    bytes_from_cache: int
    """Of `bytes_served`: read from a tier, be it filled ahead of the reader."""
    fetches: int
    """Requests to stores that brought bytes."""
    fetch_seconds: float
    """The time that they took, added up."""
    bytes_fetched: int
    bytes_prefetched: int
    """Of `bytes_fetched`: before anybody asked for them."""
    in_flight: int
    """Requests under way now."""
    memory_used: int
    """Bytes of the budget in use now."""
    memory_peak: int
    memory_limit: int
    bytes_uncached: int
    """Of `memory_used`: fetched, and no tier had room for them."""
    errors: Mapping[str, int]
    """Failed fetches and failures of the cache, by class of the error."""


class _State(enum.Enum):
    WAITING = 1  # anyone may take it and run it
    RUNNING = 2  # somebody does
    ARRIVED = 3  # `data` is there; the cache is being filled
    ENDED = 4  # filled, or failed (`error`), or dropped; no longer in `flights` unless `kept`


class _Flight:
    """One span of one object on its way. Guarded by the object's lock."""

    __slots__ = (
        "ahead", "data", "error", "kept", "object", "span", "state", "target", "unkept", "used", "waiters",
    )  # fmt: skip

    def __init__(self, owner: "_Object", span: ByteRange, target: CachedFile, *, ahead: bool) -> None:
        self.object, self.span, self.target, self.ahead = owner, span, target, ahead
        self.state = _State.WAITING
        self.data: memoryview | None = None
        self.error: Exception | None = None
        self.unkept: CacheError | None = None  # why the cache did not take it
        self.waiters = 0  # who needs it; while it is WAITING and has some it is not dropped
        self.kept = False  # ENDED, and held in memory because no tier has room
        self.used = False  # kept, and read to its end

    def __repr__(self) -> str:
        return f"<_Flight {self.object.key.key!r} {self.span} {self.state.name}>"


class _Object:
    """What all who have one version of an object open share."""

    __slots__ = (
        "changed",
        "file",
        "flights",
        "homeless",
        "info",
        "key",
        "lock",
        "opened",
        "opens",
        "refs",
        "source",
    )

    def __init__(self, key: CacheKey, info: ObjectInfo, source: Source) -> None:
        self.key, self.info, self.source = key, info, source
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)  # the state of a flight
        # Guarded by `lock`:
        self.file: CachedFile | None = None  # set once, by the first who holds the object
        self.flights: list[_Flight] = []  # spans never overlap
        self.opens = 0
        self.opened = False  # ever; until then what is fetched ahead of the open is kept for it
        self.homeless = False  # the last fill found no room
        # Guarded by the reader's lock: opens, flights, and calls that use the object. At 0 it ends.
        self.refs = 0

    @property
    def cached(self) -> CachedFile:
        assert self.file is not None, "whoever holds the object has opened it"
        return self.file


class OpenObject:
    """One version of one object, open for reading. Thread-safe."""

    __slots__ = ("_closed", "_file", "_lock", "_object", "_reader", "_size", "_window", "entry")

    def __init__(self, reader: "Reader", held: _Object, entry: Entry, window: Window | None) -> None:
        self.entry = entry
        self._reader, self._object, self._file, self._size = reader, held, held.cached, entry.size
        self._window = window  # None: whole in the cache at open, so there is nothing to fetch ahead
        self._lock = threading.Lock()  # guards _window and _closed
        self._closed = False

    def __repr__(self) -> str:
        return f"<OpenObject {self.entry.key!r}{' closed' if self._closed else ''}>"

    def read(self, offset: int, length: int) -> Buffer:
        """`length` bytes at `offset`; fewer only where the object ends. May block.

        Raises the SourceError that kept the bytes away.
        """
        span = self._clip(offset, length)
        if span.start >= span.stop:
            return b""
        self._look_ahead(span)
        return self._reader._read(self._object, span)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The same if that needs no waiting; None where it does. Raises nothing."""
        span = self._clip(offset, length)
        if span.start >= span.stop:
            return b""
        data = self._file.read_nowait(span)
        if data is not None:
            self._reader._tally.served(span.stop - span.start, cached=True)
        elif (data := self._reader._live(self._object, span)) is None:
            return None  # `read` follows, and counts
        if self._window is not None:
            self._look_ahead(span)
        return data

    def close(self) -> None:
        """Let go. What was fetched ahead, or has no room in a tier, goes with the last open. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._reader._closed_one(self._object)

    def _clip(self, offset: int, length: int) -> ByteRange:
        if offset < 0 or length < 0:
            raise ValueError(f"no such range: {length} bytes at {offset}")
        if self._closed:
            raise ValueError(f"{self.entry.key!r} is closed")
        return ByteRange(offset, min(offset + length, self._size))

    def _look_ahead(self, span: ByteRange) -> None:
        if self._window is None:
            return
        ceiling = self._reader._share() if self._object.homeless else None
        with self._lock:
            ahead = self._window.seen(span.start, span.stop, ceiling=ceiling)
        if ahead is not None:
            self._reader._fetch_ahead(self._object, ahead)


class _Tally:
    """Counters, under one small lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.opens = self.opens_whole = 0
        self.bytes_served = self.bytes_from_cache = 0
        self.fetches = self.bytes_fetched = self.bytes_prefetched = 0
        self.fetch_seconds = 0.0
        self.errors: Counter[str] = Counter()

    def opened(self, *, whole: bool) -> None:
        with self.lock:
            self.opens += 1
            self.opens_whole += whole

    def served(self, count: int, *, cached: bool) -> None:
        with self.lock:
            self.bytes_served += count
            if cached:
                self.bytes_from_cache += count

    def fetched(self, count: int, seconds: float, *, ahead: bool) -> None:
        with self.lock:
            self.fetches += 1
            self.fetch_seconds += seconds
            self.bytes_fetched += count
            if ahead:
                self.bytes_prefetched += count

    def failed(self, error: BaseException) -> None:
        with self.lock:
            self.errors[type(error).__name__] += 1


class Reader:
    """Opens objects through the cache.

    `siblings` is `Index.children`, where listing order is to be detected; without it only an
    announced order is fetched ahead.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        cache: Tier,
        settings: ReadingSettings,
        *,
        clock: Clock,
        siblings: Siblings | None = None,
    ) -> None:
        self._sources, self._cache, self._settings, self._clock = tuple(sources), cache, settings, clock
        self._uris = [source.uri for source in self._sources]
        self._siblings = siblings
        self._limit = plan.request_limit(settings.block_size, most=settings.memory // TRANSIENT)
        self._tally = _Tally()
        self._pool = Pool(settings.concurrency, name="fetch-ahead")
        self._budget = Budget(settings.memory, settings.concurrency, self._reclaim)
        # Guards _objects, _Object.refs, _kept and _closed. Taken inside an object's lock, never around one.
        self._lock = threading.Lock()
        self._objects: dict[CacheKey, _Object] = {}
        self._kept: OrderedDict[_Flight, None] = OrderedDict()  # read ones first, then oldest first
        self._closed = False
        # Guards the machines that follow orders of opens; no other lock is taken inside.
        self._order_lock = threading.Lock()
        ahead = min(settings.readahead, settings.memory // 4)
        self._order_bytes = ahead
        self._listing = Listing(files=settings.order_ahead, bytes=ahead)
        self._announced: Announced | None = None
        self._lookup: Callable[[int], Entry] | None = None
        self._advancing = False

    def __repr__(self) -> str:
        return f"<Reader {len(self._objects)} objects, {self._budget!r}, {self._pool!r}>"

    # What others call.

    def cache_key(self, entry: Entry) -> CacheKey:
        """What the bytes of `entry` are kept under in the cache."""
        return CacheKey(self._uris[entry.mount], entry.key, entry.version.token, entry.size)

    def open(self, entry: Entry) -> OpenObject:
        """Open the version of `entry`. Makes no request."""
        held = self._hold(entry)
        with held.lock:
            held.opens += 1
            held.opened = True
        whole = not held.cached.gaps(ByteRange(0, entry.size))
        window = None
        if not whole:
            block, ceiling = self._settings.block_size, self._settings.readahead
            if ceiling > 0:
                window = Window(entry.size, block=block, limit=self._limit, ceiling=ceiling)
        self._tally.opened(whole=whole)
        self._follow(entry)
        return OpenObject(self, held, entry, window)

    def lend(self, entry: Entry) -> Lent | None:
        """The cached file of `entry`'s version, for the kernel to read by itself; None unless one tier has
        all of it beyond doubt: then `open` it. An open like any other. Makes no request."""
        lent = self._cache.lend(self.cache_key(entry))
        if lent is not None:
            self._tally.opened(whole=True)
            self._follow(entry)
        return lent

    def read_whole(self, entry: Entry) -> Buffer | None:
        """All bytes of `entry`'s version, where one tier has them beyond doubt and nobody has it open: what
        `open`, `read` and `close` would give, for less. None: do that. An open like any other. Makes no
        request."""
        key = self.cache_key(entry)
        if key in self._objects:  # a look needs no lock; either answer is right
            return None
        data = self._cache.read_whole(key)
        if data is not None:
            self._tally.opened(whole=True)
            self._tally.served(entry.size, cached=True)
            self._follow(entry)
        return data

    def announce(self, entries: Iterable[Entry], *, lookup: Callable[[int], Entry] | None = None) -> int:
        """Files will be opened in the order of `entries`: fetch ahead of the opens. Replaces an earlier
        order; returns how many files there are.

        With `lookup` (`Index.entry`) only eight bytes a file are held, however many there are.
        """
        if lookup is None:
            known = {entry.ino: entry for entry in entries}
            entries, lookup = known.values(), known.__getitem__
        inos = (entry.ino for entry in entries)
        announced = Announced(inos, files=self._settings.order_ahead, bytes=self._order_bytes)
        with self._order_lock:
            self._announced, self._lookup = announced, lookup
        self._advance_soon()
        return len(announced)

    def fetch(
        self,
        entry: Entry,
        *,
        tier: Tier | None = None,
        pace: Callable[[int], None] | None = None,
        on_bytes: Callable[[int, bool], None] | None = None,
        waiting: AbstractContextManager[object] = _NOTHING,
    ) -> int:
        """Make `entry` whole in the cache (in `tier`, where given); how many bytes had to be fetched.

        `pace` is called before each request with its length, `on_bytes` after each span that is in the
        cache, with its length and whether this call had it fetched (not somebody else); both may block, and
        what they raise ends this. `waiting` is entered for as long as this thread waits for a store, for
        another tier, or for whoever asks them. Raises SourceError, TierFull, TierBroken.
        """
        if entry.size == 0:
            return 0
        held = self._hold(entry)
        target = held.cached
        try:
            if tier is not None:
                target = tier.open(held.key)
            elif held.cached.evicted:  # who has it open reads on; what is filled there nobody finds later
                target = self._cache.open(held.key)
            return self._make_whole(held, target, pace or _ignore, on_bytes or _ignore_both, waiting)
        finally:
            if target is not held.file:
                target.close()
            self._drop(held)

    def stats(self) -> ReaderStats:
        """How it is now."""
        with self._lock:
            objects, kept = len(self._objects), sum(flight.span.length for flight in self._kept)
        tally = self._tally
        with tally.lock:
            return ReaderStats(
                opens=tally.opens,
                opens_whole=tally.opens_whole,
                open_objects=objects,
                bytes_served=tally.bytes_served,
                bytes_from_cache=tally.bytes_from_cache,
                fetches=tally.fetches,
                fetch_seconds=tally.fetch_seconds,
                bytes_fetched=tally.bytes_fetched,
                bytes_prefetched=tally.bytes_prefetched,
                in_flight=self._budget.running,
                memory_used=self._budget.used,
                memory_peak=self._budget.peak,
                memory_limit=self._settings.memory,
                bytes_uncached=kept,
                errors=dict(tally.errors),
            )

    def close(self) -> None:
        """Stop fetching, join all threads. Reads that wait get Unavailable; open objects are closed by
        those who have them. Idempotent."""
        with self._lock:
            self._closed = True
            objects = list(self._objects.values())
            for held in objects:
                held.refs += 1
        self._budget.close()
        self._pool.close()
        for held in objects:
            self._forget(held)
            self._drop(held)

    # Objects.

    def _hold(self, entry: Entry) -> _Object:
        """The shared state of `entry`'s version; whoever holds it calls `_drop`."""
        key = self.cache_key(entry)
        with self._lock:
            if self._closed:
                raise Unavailable("the reader is closed")
            held = self._objects.get(key)
            if held is None:
                info = ObjectInfo(entry.key, entry.size, entry.version, entry.mtime_ns, entry.archived)
                self._objects[key] = held = _Object(key, info, self._sources[entry.mount])
            held.refs += 1
        if held.file is None:
            try:
                with held.lock:
                    if held.file is None:
                        held.file = self._cache.open(key)
            except BaseException:
                self._drop(held)
                raise
        return held

    def _drop(self, held: _Object, count: int = 1) -> None:
        """Give `count` references back; the last one closes the object."""
        if not count:
            return
        with self._lock:
            held.refs -= count
            if held.refs:
                return
            del self._objects[held.key]
        if held.file is not None:
            held.file.close()

    def _closed_one(self, held: _Object) -> None:
        with held.lock:
            held.opens -= 1
            last = held.opens == 0
        if last:
            self._forget(held)
        self._drop(held)

    def _forget(self, held: _Object) -> None:
        """Drop what is queued for `held` that nobody waits for, and what is kept of it."""
        with held.lock:
            dropped = _discard(held, list(held.flights))
            with self._lock:
                kept = [f for f in held.flights if f.kept and f in self._kept]
                for flight in kept:
                    del self._kept[flight]
            for flight in kept:
                flight.kept = False
                held.flights.remove(flight)
        if kept:
            self._budget.forget(sum(flight.span.length for flight in kept))
        self._drop(held, dropped + len(kept))

    def _share(self) -> int:
        """Memory for the bytes of one object that no tier has room for: a quarter of the budget goes to
        what is being read, a quarter to what comes next, the rest to requests under way."""
        return self._settings.memory // (4 * max(1, len(self._objects)))

    # Reads.

    def _read(self, held: _Object, span: ByteRange) -> Buffer:
        if span.length <= _STRETCH:
            pieces = self._pieces(held, span)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        result = bytearray(span.length)
        at = 0
        for stretch in plan.cut(span, limit=_STRETCH):
            for piece in self._pieces(held, stretch):
                result[at : at + len(piece)] = piece
                at += len(piece)
        return result

    def _pieces(self, held: _Object, span: ByteRange) -> list[Buffer]:
        """Bytes `span`, from the cache where it has them."""
        if held.cached.gaps(span):
            return self._gathered(held, span)
        return self._from_cache(held, span)

    def _from_cache(self, held: _Object, span: ByteRange) -> list[Buffer]:
        """Bytes `span`, which the cache says that it has."""
        try:
            data = held.cached.read(span)
        except CacheError as error:
            self._tally.failed(error)
            logger.debug("%r %s: %s; fetching it", held.key.key, span, error)
            return self._gathered(held, span, trusted=False)
        self._tally.served(span.length, cached=True)
        return [data]

    def _gathered(self, held: _Object, span: ByteRange, *, trusted: bool = True) -> list[Buffer]:
        """Bytes `span`, from flights where the cache has gaps (everywhere, where it is not trusted)."""
        new, needed = self._join(held, span, grain=self._grain(held), trusted=trusted)
        for flight in new[1:]:  # a long read is fetched in parallel; what the pool leaves, we run ourselves
            self._pool.offer(partial(self._run_patiently, flight))
        pieces: list[Buffer] = []
        at = span.start
        try:
            for flight in needed:
                start, stop = flight.span
                if at < start:
                    pieces += self._from_cache(held, ByteRange(at, start))
                    at = start
                data = self._obtain(flight)
                to = min(stop, span.stop)
                pieces.append(_slice(data, at - start, to - start))
                self._tally.served(to - at, cached=False)
                at = to
                if flight.kept and at == stop:
                    self._was_used(flight)
        finally:
            self._leave(held, needed)
        if at < span.stop:
            pieces += self._from_cache(held, ByteRange(at, span.stop))
        return pieces

    def _live(self, held: _Object, span: ByteRange) -> Buffer | None:
        """Bytes `span` out of one flight that has them."""
        if not held.flights:
            return None
        with held.lock:
            for flight in held.flights:
                start, stop = flight.span
                if start <= span.start and span.stop <= stop:
                    break
            else:
                return None
            if flight.data is None:
                return None
            data = _slice(flight.data, span.start - start, span.stop - start)
        self._tally.served(span.length, cached=False)
        if flight.kept and span.stop == stop:
            self._was_used(flight)
        return data

    def _grain(self, held: _Object) -> int:
        share = self._share() if held.homeless else self._settings.memory
        return plan.grain(
            self._settings.fill, block=self._settings.block_size, size=held.key.size, share=share
        )

    # Flights.

    def _join(
        self,
        held: _Object,
        wanted: ByteRange,
        *,
        grain: int,
        target: CachedFile | None = None,
        trusted: bool = True,
        ahead: bool = False,
    ) -> tuple[list[_Flight], list[_Flight]]:
        """Flights for what of `wanted` the cache lacks: those made now, and all that are needed, in order.

        The needed ones are waited for by the caller, who calls `_leave`; where `ahead`, there are none.
        """
        size, file = held.key.size, held.cached
        reach = plan.reach(wanted, grain=grain, size=size)
        with held.lock:
            # Under the lock: a flight leaves `flights` only after its fill, so no byte is in neither place.
            gaps = file.gaps(reach) if trusted else [reach]
            if not gaps:
                return [], []
            flights = held.flights
            free = plan.subtract(gaps, [flight.span for flight in flights]) if flights else gaps
            new = [
                _Flight(held, span, target or file, ahead=ahead)
                for span in plan.requests(wanted, free, grain=grain, size=size, limit=self._limit)
            ]
            flights += new
            with self._lock:
                held.refs += len(new)
            if ahead:
                return new, []
            lacking = plan.subtract([wanted], plan.subtract([wanted], gaps))
            needed = [flight for flight in flights if any(_overlap(flight.span, gap) for gap in lacking)]
            for flight in needed:
                flight.waiters += 1
        needed.sort(key=lambda flight: flight.span)
        return new, needed

    def _leave(self, held: _Object, needed: Iterable[_Flight]) -> None:
        """The caller no longer waits for these; those that nobody has begun and nobody wants are dropped."""
        with held.lock:
            for flight in needed:
                flight.waiters -= 1
            dropped = _discard(held, [flight for flight in needed if not flight.ahead])
        self._drop(held, dropped)

    def _obtain(self, flight: _Flight) -> memoryview:
        """The bytes of a flight that a reader waits for: run by this thread, if by none yet."""
        with flight.object.changed:
            mine = flight.state is _State.WAITING
            if mine:
                flight.state = _State.RUNNING
            while not mine and flight.state is _State.RUNNING:
                flight.object.changed.wait()
        if mine:
            try:
                grant = self._budget.acquire(flight.span.length, urgent=True)
            except BaseException as error:
                self._fail(flight, error)
                raise
            self._run(flight, grant)
        return _landed(flight)

    def _run_patiently(self, flight: _Flight, waiting: AbstractContextManager[object] = _NOTHING) -> None:
        """Run a flight when nobody waits for anything else. Until it begins, any reader may take it over."""
        if flight.state is not _State.WAITING:
            return
        try:
            grant = self._budget.acquire(flight.span.length, urgent=False)
        except Unavailable:
            return  # closing, which drops what waits
        with flight.object.lock:
            mine = flight.state is _State.WAITING
            if mine:
                flight.state = _State.RUNNING
        if mine:
            self._run(flight, grant, waiting)
        else:
            grant.release()

    def _run(self, flight: _Flight, grant: Grant, waiting: AbstractContextManager[object] = _NOTHING) -> None:
        """Make the request of a RUNNING flight, serve who waits, fill the cache. Keeps errors for those
        who wait."""
        held, span = flight.object, flight.span
        try:
            if held.info.archived:
                raise Archived(
                    f"{held.key.key!r} in {held.key.source} lies in an archive class; restore it first"
                )
            begun = self._clock.monotonic()
            with waiting:
                data = memoryview(held.source.read(held.info, span))
            if data.nbytes != span.length:
                raise WrongBytes(f"{held.key.key!r} {span}: the store sent {data.nbytes} bytes")
        except BaseException as error:
            grant.release()
            self._fail(flight, error)
            if not isinstance(error, Exception):
                raise
            return
        grant.arrived(span.length)
        seconds = self._clock.monotonic() - begun
        self._tally.fetched(span.length, seconds, ahead=flight.ahead and not flight.waiters)
        with held.changed:
            flight.data, flight.state = data, _State.ARRIVED
            held.changed.notify_all()
        try:
            flight.target.fill(span.start, data)
        except CacheError as error:
            flight.unkept = error
            self._tally.failed(error)
        except Exception as error:
            flight.unkept = TierBroken(f"{held.key.key!r} {span}: {error!r}")
            self._tally.failed(error)
            logger.exception("filling the cache failed in a way that no tier should")
        finally:
            self._land(flight, grant)

    def _fail(self, flight: _Flight, error: BaseException) -> None:
        held = flight.object
        self._tally.failed(error)
        with held.changed:
            # Others must not be told of an interrupt that was meant for this thread.
            flight.error = error if isinstance(error, Exception) else Unavailable("the fetch was interrupted")
            flight.state = _State.ENDED
            held.flights.remove(flight)
            held.changed.notify_all()
        self._drop(held)

    def _land(self, flight: _Flight, grant: Grant) -> None:
        """A flight's bytes are in the cache, or had no room there: then they are kept for the next read."""
        held = flight.object
        with held.changed:
            if flight.target is held.file:
                held.homeless = flight.unkept is not None
            flight.state = _State.ENDED
            wanted = held.opens > 0 or (flight.ahead and not held.opened)
            flight.kept = flight.unkept is not None and wanted and not self._closed
            if flight.kept:
                with self._lock:
                    self._kept[flight] = None
            else:
                held.flights.remove(flight)
            held.changed.notify_all()
        if flight.kept:
            self._budget.settle()  # someone may wait for just these bytes to be given up
        else:
            grant.release()
            self._drop(held)

    def _was_used(self, flight: _Flight) -> None:
        """A kept flight was read to its end: it goes first."""
        with self._lock:
            if flight not in self._kept:
                return
            flight.used = True
            self._kept.move_to_end(flight, last=False)
        if self._budget.waiting:
            self._budget.settle()

    def _reclaim(self, shortfall: int, force: bool) -> int:
        victims: list[_Flight] = []
        freed = 0
        with self._lock:
            for flight in self._kept:
                if freed >= shortfall or not (force or flight.used):
                    break
                victims.append(flight)
                freed += flight.span.length
            for flight in victims:
                del self._kept[flight]
        for flight in victims:
            with flight.object.lock:
                flight.kept = False
                flight.object.flights.remove(flight)
            self._drop(flight.object)
        return freed

    # Whole objects.

    def _make_whole(
        self,
        held: _Object,
        target: CachedFile,
        pace: Callable[[int], None],
        on_bytes: Callable[[int, bool], None],
        waiting: AbstractContextManager[object],
    ) -> int:
        fetched = 0
        pending: deque[tuple[_Flight, ByteRange, bool]] = deque()
        spans = [
            piece
            for gap in target.gaps(ByteRange(0, held.key.size))
            for piece in plan.cut(gap, limit=self._limit)
        ]

        def finish() -> None:
            nonlocal fetched
            flight, span, ours = pending[0]
            self._run_patiently(flight, waiting)
            _settled(flight, waiting)
            # One that found no room may have ended long ago, and been kept: there may be room now.
            if flight.target is not target or flight.unkept is not None:
                target.fill(flight.span.start, _landed(flight))
            pending.popleft()
            self._leave(held, (flight,))
            count = min(flight.span.stop, span.stop) - max(flight.span.start, span.start)
            fetched += count
            on_bytes(count, ours)

        try:
            for span in spans:
                wanted = [span]
                if target is not held.file:
                    for part in plan.subtract([span], held.cached.gaps(span)):
                        self._copy(held, part, target, waiting)
                    wanted = target.gaps(span)
                for part in wanted:
                    trusted = target is held.file  # what another tier has could not be copied from it
                    new, needed = self._join(held, part, grain=1, target=target, trusted=trusted)
                    pending += [(flight, part, flight in new) for flight in needed]
                    if new:
                        pace(sum(flight.span.length for flight in new))
                    if len(spans) > 1:
                        for flight in new:
                            self._pool.offer(partial(self._run_patiently, flight), later=True)
                # What has ended is counted at once: while `pace` holds us up, someone looks at the figures.
                while pending and (
                    len(pending) >= self._settings.concurrency or pending[0][0].state is _State.ENDED
                ):
                    finish()
            while pending:
                finish()
        finally:
            self._leave(held, [flight for flight, *_ in pending])
        return fetched

    def _copy(
        self, held: _Object, span: ByteRange, target: CachedFile, waiting: AbstractContextManager[object]
    ) -> None:
        """From one tier to another; what turns out to be damaged is left as a gap, to be fetched."""
        for piece in plan.cut(span, limit=self._settings.block_size):
            try:
                with waiting:
                    data = held.cached.read(piece)
            except CacheError as error:
                self._tally.failed(error)
                continue
            target.fill(piece.start, data)

    # Ahead of readers.

    def _fetch_ahead(self, held: _Object, span: ByteRange) -> None:
        """Queue what is missing of `span`; never blocks."""
        new, _ = self._join(held, span, grain=self._grain(held), ahead=True)
        refused = [flight for flight in new if not self._pool.offer(partial(self._run_patiently, flight))]
        if refused:
            with held.lock:
                dropped = _discard(held, refused)
            self._drop(held, dropped)

    def _fetch_file_ahead(self, entry: Entry, length: int) -> None:
        if entry.kind is not Kind.FILE or entry.archived or length <= 0:
            return
        if self._cache.present(self.cache_key(entry)) >= entry.size:
            return
        held = self._hold(entry)
        try:
            self._fetch_ahead(held, ByteRange(0, length))
        finally:
            self._drop(held)

    def _follow(self, entry: Entry) -> None:
        """A file was opened: see whether that is part of an order."""
        after = None
        with self._order_lock:
            if self._announced is not None:
                self._announced.opened(entry.ino)
            elif self._siblings is not None:
                after = self._listing.opened(entry.parent, entry.ino)
        if after is not None:
            self._pool.offer(partial(self._advance_listing, after))
        elif self._announced is not None:
            self._advance_soon()

    def _advance_listing(self, after: After) -> None:
        assert self._siblings is not None
        try:
            entries = self._siblings(after.parent, after=after.ino, limit=after.limit)
            for entry in entries:
                with self._order_lock:
                    size = entry.size if entry.kind is Kind.FILE else 0
                    length = self._listing.take(after.parent, entry.ino, size)
                if length is None:
                    return
                self._fetch_file_ahead(entry, length)
        except DatacacheError as error:
            self._tally.failed(error)
            logger.debug("fetching ahead in listing order: %s", error)

    def _advance_soon(self) -> None:
        with self._order_lock:
            if self._advancing or self._announced is None or not self._announced.low:
                return
            self._advancing = True
        if not self._pool.offer(self._advance_announced):
            with self._order_lock:
                self._advancing = False

    def _advance_announced(self) -> None:
        while True:
            with self._order_lock:
                announced, lookup = self._announced, self._lookup
                ino = announced.next() if announced is not None else None
                if announced is None or lookup is None or ino is None:
                    self._advancing = False
                    return
            entry = None
            try:
                entry = lookup(ino)
            except DatacacheError as error:
                logger.debug("fetching ahead in announced order: %s", error)
            with self._order_lock:
                length = announced.take(ino, entry.size if entry is not None else 0)
            if entry is not None:
                try:
                    self._fetch_file_ahead(entry, length)
                except DatacacheError as error:
                    self._tally.failed(error)


def _discard(held: _Object, flights: Iterable[_Flight]) -> int:
    """Drop those of `flights` that nobody has begun and nobody waits for; how many. Needs the object's
    lock; the caller drops as many references."""
    gone = [f for f in flights if f.state is _State.WAITING and not f.waiters]
    for flight in gone:
        flight.state = _State.ENDED
        held.flights.remove(flight)
    return len(gone)


def _landed(flight: _Flight) -> memoryview:
    """The bytes of a flight that has ARRIVED or ENDED. Raises what it failed with: a copy, since others
    raise it too and a traceback has one owner."""
    if flight.error is not None:
        raise copy.copy(flight.error) from flight.error
    assert flight.data is not None, "a flight ends with data or an error while somebody waits for it"
    return flight.data


def _slice(data: memoryview, start: int, stop: int) -> Buffer:
    """A part is copied, so that a reader who holds on to 128 KiB does not hold megabytes that the budget
    no longer counts (15 us, where a request took milliseconds)."""
    return data if stop - start == data.nbytes else bytes(data[start:stop])


def _settled(flight: _Flight, waiting: AbstractContextManager[object]) -> None:
    """Wait until a flight is through with the cache, too. Raises what it failed with."""
    ended = flight.state is _State.ENDED  # a look needs no lock: it stays so
    with _NOTHING if ended else waiting, flight.object.changed:
        if flight.state is _State.WAITING:
            raise Unavailable("the reader is closing")
        while flight.state is not _State.ENDED:
            flight.object.changed.wait()
    _landed(flight)


def _overlap(a: ByteRange, b: ByteRange) -> bool:
    return a.start < b.stop and b.start < a.stop


def _ignore(_: int) -> None:
    """Nobody wants to know."""


def _ignore_both(_: int, __: bool) -> None:
    """Nobody wants to know."""
