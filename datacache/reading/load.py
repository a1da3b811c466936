"""
Load jobs: bring objects into the cache before they are read.

A job is one thread that lists what is selected and a few that make it whole. The lister runs ahead,
so that a progress bar knows the total early; what it is ahead by is held as a number a file, not as
an entry. What is present is skipped, so the cache itself is the state that a job resumes from:
running it again is resuming it. What fails is written down, one line each, and the rest goes on.

An outage of the store is waited for: whoever is told that the breaker is open tries again when the next
probe is due, for up to `outage_timeout` in all. But what has never answered is no outage: then a listing
fails at once, since a wrong endpoint looks the same.
"""

import itertools
import logging
import re
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol, TypeVar

from datacache.cache.tier import Tier
from datacache.clock import Clock, Pace
from datacache.config.settings import ReadingSettings
from datacache.errors import (
    BreakerOpen,
    ControlError,
    DatacacheError,
    NoSuchPath,
    NotADirectory,
    SettingError,
    SourceError,
    TierBroken,
    TierFull,
    Unavailable,
    VersionChanged,
)
from datacache.index import names, walking
from datacache.index.index import Index
from datacache.model import Entry, Kind, format_size
from datacache.reading.job import LoadRequest, LoadStatus
from datacache.reading.plan import SMALL
from datacache.reading.reader import Reader

logger = logging.getLogger(__name__)
T = TypeVar("T")

REMEMBERED = 100
"""Jobs that ended and can still be asked about."""

RUNNING = 16
"""Jobs at once; each has threads of its own."""

FAILURES = 1000
"""Failures of a job that are kept with their reasons; the rest are only counted."""

CONCURRENCY = 256
"""Objects of one job under way at most, whatever was asked for: each is a thread."""

AT_WORK = 3
"""Small files of one job of which the threads do not wait for a store: with fewer, another is begun. Only one
thread of Python runs at once, so where a store answers faster than we can follow, more of them hand that turn
to and fro (all 16 took 40 % more of the processor for a file). More than one, for a tier may wait as well."""

_NEAR = 1024
"""Files at the head of the line that are held as entries: listed just before they are fetched."""

_FAR = 2_000_000
"""Files that the lister may be ahead by, at 36 bytes each."""

_DIRECTORIES = 10_000
"""Directories whose numbers are held while a list of files is looked up; some 150 bytes each."""

_PROBED = 1.0
"""Seconds between two looks at whether the store answers again, while another request is the probe."""


class Tiers(Tier, Protocol):
    """A cache whose tiers can be told apart (`cache.tiered`)."""

    def tier(self, name: str) -> Tier:
        """The leaf tier of this name or medium. Raises SettingError."""


class _Cancelled(Exception):
    """Someone asked the job to stop."""


class Loads:
    """All load jobs of a worker, those that ended included (the last 100)."""

    def __init__(
        self, index: Index, reader: Reader, cache: Tiers, settings: ReadingSettings, *, clock: Clock
    ) -> None:
        self._index, self._reader, self._cache = index, reader, cache
        self._settings, self._clock = settings, clock
        self._lock = threading.Lock()  # guards all below
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._numbers = itertools.count(1)
        self._closed = False

    def __repr__(self) -> str:
        return f"<Loads {len(self._jobs)} jobs>"

    def start(self, request: LoadRequest) -> str:
        """Start a job; its id. Raises SettingError when it can be seen at once that it cannot be done."""
        if request.concurrency < 0:
            raise SettingError(
                "--concurrency", request.concurrency, "a number of objects, or 0 for the default"
            )
        if request.outage_timeout < 0:
            raise SettingError("--outage-timeout", request.outage_timeout, "seconds, or 0 for not at all")
        if request.bandwidth < 0:
            raise SettingError("--bandwidth", request.bandwidth, "bytes per second, or 0 for no limit")
        matcher(request.globs)
        tier = self._cache.tier(request.tier) if request.tier else None
        with self._lock:
            if self._closed:
                raise ControlError("the worker drains, or ends: it starts no load")
            if sum(not job.ended.is_set() for job in self._jobs.values()) >= RUNNING:
                raise ControlError(f"{RUNNING} load jobs are running; wait for one, or cancel it")
            id = f"load-{next(self._numbers)}"
            job = _Job(id, request, self._index, self._reader, tier or self._cache, tier, self._clock)
            self._jobs[id] = job
            ended = [old for old, other in self._jobs.items() if other.ended.is_set()]
            for old in ended[: max(0, len(self._jobs) - REMEMBERED)]:
                del self._jobs[old]
            job.start(min(CONCURRENCY, request.concurrency or self._settings.concurrency))
        return id

    def status(self, id: str) -> LoadStatus:
        """How the job is doing. Raises ControlError when no job has this id."""
        return self._job(id).status()

    def cancel(self, id: str) -> None:
        """Ask the job to stop; requests under way are waited for, nothing is taken back."""
        self._job(id).cancel()

    def wait(self, id: str, timeout: float | None = None) -> LoadStatus:
        """How the job is doing once it has ended, or after `timeout` seconds."""
        job = self._job(id)
        if timeout is None:
            job.ended.wait()
        else:
            self._clock.wait(job.ended, timeout)
        return job.status()

    def stop(self) -> None:
        """Cancel all jobs, and start none any more; `close` waits for their threads. Idempotent."""
        with self._lock:
            self._closed = True
            jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()

    def running(self, *, until: float) -> int:
        """How many jobs run, once none does or it is `until`."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            self._clock.wait(job.ended, max(0.0, until - self._clock.monotonic()))
        return sum(not job.ended.is_set() for job in jobs)

    def close(self) -> None:
        """Cancel all jobs and wait for their threads. Idempotent."""
        self.stop()
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.join()

    def _job(self, id: str) -> "_Job":
        with self._lock:
            job = self._jobs.get(id)
        if job is None:
            raise ControlError(f"no load job {id!r}; the last {REMEMBERED} are remembered")
        return job


class _Job:
    """One load. Its lister and its workers end with it."""

    def __init__(
        self,
        id: str,
        request: LoadRequest,
        index: Index,
        reader: Reader,
        store: Tier,
        tier: Tier | None,
        clock: Clock,
    ) -> None:
        self._id, self._request, self._index, self._reader = id, request, index, reader
        self._store, self._tier, self._clock = store, tier, clock
        self._begun = clock.monotonic()
        self._pace = Pace(request.bandwidth, clock) if request.bandwidth else None
        self._stop = threading.Event()
        self.ended = threading.Event()
        self._threads: list[threading.Thread] = []
        # Guarded by one lock: the line of files to do, and the figures of `status`. `_changed` says that the
        # line has, and `_turn` that one more small file may be begun.
        lock = threading.RLock()
        self._changed, self._turn = threading.Condition(lock), threading.Condition(lock)
        self._line: deque[Entry | int] = deque()
        self._at_work = 0  # threads with a small file that do not wait for a store
        self._waiting = _Waiting(self._leave_work, self._back_to_work)
        self._working = 0
        self._listed = False
        self._state = "running"
        self._seconds = 0.0
        self._files = self._bytes = 0
        self._files_done = self._bytes_done = self._files_skipped = 0
        self._bytes_fetched = self._files_failed = self._verified_bad = 0
        self._failures: list[tuple[str, str]] = []
        self._was_full = False
        self._done = array("q")  # the numbers of `files_done`: eight bytes a file
        self._confirmed = False
        self._away_since: float | None = None  # when the store was first found not to answer
        self._away = ""  # what it failed with
        self._known = False  # something has been listed
        tiers = store.stats()
        self._evicted = sum(each.evicted for each in tiers)
        self._room = sum(each.quota for each in tiers)

    def __repr__(self) -> str:
        return f"<_Job {self._id} {self._state}, {self._files_done} of {self._files} files>"

    def start(self, workers: int) -> None:
        self._working = 1 if self._request.order else workers + 1
        targets = [self._announce] if self._request.order else [self._list] + [self._work] * workers
        self._threads = [
            threading.Thread(target=self._run, args=(target,), name=f"{self._id}-{number}")
            for number, target in enumerate(targets)
        ]
        for thread in self._threads:
            thread.start()

    def cancel(self) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
            self._turn.notify_all()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def status(self) -> LoadStatus:
        with self._changed:
            running = self._state == "running"
            return LoadStatus(
                id=self._id,
                state=self._state,
                files=self._files,
                bytes=self._bytes,
                listed=self._listed,
                files_done=self._files_done,
                bytes_done=self._bytes_done,
                files_skipped=self._files_skipped,
                bytes_fetched=self._bytes_fetched,
                failures=tuple(self._failures),
                files_failed=self._files_failed,
                seconds=self._clock.monotonic() - self._begun if running else self._seconds,
                verified_bad=self._verified_bad,
                waiting=self._away if running else "",
            )

    # Threads.

    def _run(self, target: Callable[[], None]) -> None:
        """One thread. The last one out ends the job."""
        self._guarded(target)
        with self._changed:
            self._working -= 1
            if self._working:
                return
            self._line.clear()
        self._guarded(self._confirm)
        with self._changed:
            complete = (
                self._confirmed and self._listed and self._files_done + self._files_failed >= self._files
            )
            failed = self._files_failed > 0
            self._state = ("failed" if failed else "done") if complete else "cancelled"
            self._seconds = self._clock.monotonic() - self._begun
        self.ended.set()

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except _Cancelled:
            pass
        except Exception as error:
            logger.exception("%s: a thread failed in a way that nobody foresaw", self._id)
            self._fail("", error)
            self.cancel()

    def _confirm(self) -> None:
        """A tier that evicts makes room for the last files with the first ones: to say that all of them
        are cached would be a lie. Looked at only where something was evicted since the job began."""
        if self._request.order or self._evictions() == self._evicted:
            self._confirmed = True
            return
        for ino in self._done:
            self._check()
            try:
                entry = self._index.entry(ino)
            except DatacacheError:
                continue  # it is gone since; it was cached
            missing = entry.size - self._store.present(self._reader.cache_key(entry)) if entry.size else 0
            if missing > 0:
                with self._changed:
                    self._files_done -= 1
                    self._bytes_done -= missing
                self._fail(self._name(entry), TierFull("evicted again: the tiers have no room for all of it"))
        self._confirmed = True

    def _evictions(self) -> int:
        return sum(tier.evicted for tier in self._store.stats())

    def _list(self) -> None:
        try:
            for entry in self._selected():
                with self._changed:
                    self._files += 1
                    self._bytes += entry.size
                    self._changed.wait_for(lambda: len(self._line) < _FAR or self._stop.is_set())
                    # Beyond the head of the line only the number is held; the index knows the rest.
                    self._line.append(entry if len(self._line) < _NEAR else entry.ino)
                    self._changed.notify()
                    if self._at_work < AT_WORK:
                        self._turn.notify()
                self._check()
        except DatacacheError as error:
            self._fail(self._request.path, error, listed=True)
        finally:
            with self._changed:
                self._listed = not self._stop.is_set()
                self._changed.notify_all()
                self._turn.notify_all()

    def _work(self) -> None:
        at_work = False  # as far as this thread is counted in `_at_work`
        while True:
            with self._changed:
                self._at_work -= at_work
                item = self._next()
                if item is None:
                    return
            at_work = True
            try:
                entry = item if isinstance(item, Entry) else self._index.entry(item)
            except DatacacheError as error:
                self._fail(f"(number {item})", error)
                continue
            waiting: AbstractContextManager[object] = self._waiting
            if entry.size > SMALL:
                self._leave_work()
                at_work, waiting = False, nullcontext()
            try:
                self._patiently(lambda entry=entry, waiting=waiting: self._load_current(entry, waiting))  # type: ignore[misc]
            except DatacacheError as error:
                self._check()  # a reader that is closing fails what is under way: that is a cancel
                if isinstance(error, TierFull | TierBroken) and entry.size <= self._room:
                    self._was_full = True
                self._fail(self._name(entry), error)

    def _next(self) -> Entry | int | None:
        """What is at the head of the line, when it is its turn; None where nothing comes any more. Under
        `_changed`."""
        while not self._stop.is_set():
            if not self._line:
                if self._listed:
                    return None
                self._changed.wait()
            elif self._at_work >= AT_WORK:
                self._turn.wait()
            else:
                self._at_work += 1
                item = self._line.popleft()
                if len(self._line) == _FAR - 1:
                    self._changed.notify_all()  # the lister waits for room
                if self._listed and not self._line:
                    self._turn.notify_all()  # nothing comes any more
                return item
        raise _Cancelled

    def _leave_work(self) -> None:
        """This thread waits for others, or has a large file: another may begin a small one."""
        with self._changed:
            self._at_work -= 1
            if self._at_work < AT_WORK:
                self._turn.notify()

    def _back_to_work(self) -> None:
        with self._changed:
            self._at_work += 1

    def _announce(self) -> None:
        def entries() -> Iterator[Entry]:
            for entry in self._selected():
                self._check()
                with self._changed:
                    self._files += 1
                    self._bytes += entry.size
                    self._files_done += 1
                yield entry

        try:
            self._reader.announce(entries(), lookup=self._index.entry)
        except DatacacheError as error:
            self._fail(self._request.path, error, listed=True)
        with self._changed:
            self._listed = True

    # One file.

    def _load_current(self, entry: Entry, waiting: AbstractContextManager[object]) -> None:
        """Load `entry`, or what the bucket has in its place by now: a long job outlives its listing."""
        try:
            self._load(entry, waiting)
        except VersionChanged:
            now = self._index.current(entry.ino)
            if now.version == entry.version:
                raise  # a snapshot, or not known yet
            with self._changed:
                self._bytes += now.size - entry.size
            self._load(now, waiting)

    def _load(self, entry: Entry, waiting: AbstractContextManager[object]) -> None:
        key = self._reader.cache_key(entry)
        bad = 0
        if self._request.verify and entry.size:
            with waiting:
                bad = self._store.recheck(key)
        before = self._store.present(key) if entry.size else 0
        fetched = counted = 0

        def count(length: int, ours: bool) -> None:
            nonlocal counted
            counted += length
            self._count(length, fetched=length if ours else 0)

        if before < entry.size:
            if entry.size > self._room:
                # On its way it would have all others evicted.
                room = f"the cache may hold {format_size(self._room)}"
                raise TierFull(f"{room}, and this file alone has {format_size(entry.size)}")
            if self._was_full:
                self._refuse_without_room()
            try:
                fetched = self._reader.fetch(
                    entry, tier=self._tier, pace=self._before, on_bytes=count, waiting=waiting
                )
            except (VersionChanged, Unavailable):
                with self._changed:
                    self._bytes_done -= counted  # of a version that nobody will ask for, or counted anew
                raise
        with self._changed:
            self._files_done += 1
            self._done.append(entry.ino)
            self._files_skipped += before >= entry.size
            self._bytes_done += entry.size - fetched
            self._verified_bad += bad

    def _before(self, length: int) -> None:
        self._check()
        if self._pace is not None and not self._pace.take(length, self._stop):
            raise _Cancelled

    def _count(self, length: int, *, fetched: int) -> None:
        with self._changed:
            self._bytes_fetched += fetched
            self._bytes_done += length
            self._away_since, self._away = None, ""

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Cancelled

    # Outages.

    def _patiently(self, act: Callable[[], T]) -> T:
        """What `act` comes to, once the store answers. Raises what it fails with otherwise, BreakerOpen when
        the outage lasts too long."""
        again = waited = False
        while True:
            try:
                result = act()
            except BreakerOpen as error:
                self._await_store(error)
                again, waited = False, True
            except Unavailable:
                self._check()
                # Whoever used up the bound opened the breaker, and is told so only when it asks again. If it
                # is not open, the store is there, and does not give this one.
                if again:
                    raise
                again = True
            except SourceError:
                self._store_answers()
                raise
            else:
                if waited:
                    self._store_answers()
                return result

    def _await_store(self, error: BreakerOpen) -> None:
        """Wait until it is time to ask again. Raises `error` when that has been tried for long enough."""
        self._check()
        with self._changed:
            now = self._clock.monotonic()
            if self._away_since is None:
                self._away_since = now
            left = self._away_since + self._request.outage_timeout - now
            self._away = " ".join(str(error).split()) if left > 0 else ""
        if left <= 0:
            raise error
        if self._clock.wait(self._stop, min(left, max(error.retry_after or 0.0, _PROBED))):
            raise _Cancelled

    def _store_answers(self) -> None:
        with self._changed:
            self._away_since, self._away = None, ""

    def _named(self, act: Callable[[], T]) -> T:
        """What the index says: patiently, once it has said anything."""
        result = self._patiently(act) if self._known else act()
        self._known = True
        return result

    def _refuse_without_room(self) -> None:
        """Once a tier was full: ask before fetching what may have no room either. A million requests for
        nothing are not a load."""
        tiers = self._store.stats()
        if any(tier.state == "ok" for tier in tiers):
            self._was_full = False
            return
        raise TierFull("no tier has room: " + "; ".join(f"{tier.name}: {tier.reason}" for tier in tiers))

    def _fail(self, path: str, error: Exception, *, listed: bool = False) -> None:
        """`listed`: the failure is of a file that was not counted yet, or of the listing itself."""
        reason = " ".join(str(error).split()) or type(error).__name__
        with self._changed:
            self._files_failed += 1
            self._files += listed
            if len(self._failures) < FAILURES:
                self._failures.append((path, reason))

    def _name(self, entry: Entry) -> str:
        try:
            return self._index.path(entry.ino)
        except DatacacheError:
            return entry.key

    # Which files.

    def _selected(self) -> Iterator[Entry]:
        request = self._request
        if request.files is not None:
            directories: dict[str, int] = {}
            for path in request.files:
                try:
                    entry = self._named(lambda path=path: self._resolved(path, directories))  # type: ignore[misc]
                    if entry.kind is not Kind.FILE:
                        raise NoSuchPath(f"{path} is a directory; only files can be named one by one")
                except DatacacheError as error:
                    self._check()
                    self._fail(path, error, listed=True)
                    continue
                yield entry
            return
        wanted = matcher(request.globs)
        base = request.path.strip("/")
        cut = len(base) + 1 if base else 0
        for path, entry in walking.walk(_Patient(self._index, self._named), request.path):
            relative = path.lstrip("/")[cut:]
            if wanted(relative or entry.name.decode("utf-8", "surrogateescape")):
                yield entry
            else:
                self._check()

    def _resolved(self, path: str, directories: dict[str, int]) -> Entry:
        """The entry of `path`, by the number that its directory had for another file: one look into the
        index where there would be one for each name of the path."""
        directory, _, name = path.rpartition("/")
        known = directories.get(directory)
        if known is not None and name not in ("", ".", ".."):
            with suppress(NoSuchPath, NotADirectory, UnicodeEncodeError):
                return self._index.lookup(known, names.to_bytes(name))
        entry = self._index.resolve(path)
        if name not in ("", ".", ".."):
            if len(directories) >= _DIRECTORIES:
                directories.clear()
            directories[directory] = entry.parent
        return entry


class _Waiting:
    """Entered by a thread of a job for as long as it waits for others."""

    def __init__(self, leave: Callable[[], None], back: Callable[[], None]) -> None:
        self._leave, self._back = leave, back

    def __enter__(self) -> None:
        self._leave()

    def __exit__(self, *_: object) -> None:
        self._back()


class _Asker(Protocol):
    def __call__(self, act: Callable[[], T]) -> T: ...


class _Patient:
    """An index that is asked through `ask`."""

    def __init__(self, index: Index, ask: _Asker) -> None:
        self._index, self._ask = index, ask

    def entry(self, ino: int) -> Entry:
        return self._index.entry(ino)  # asks no store

    def lookup(self, parent: int, name: bytes) -> Entry:
        return self._ask(lambda: self._index.lookup(parent, name))

    def children(self, parent: int, *, after: int = 0, limit: int = 1000) -> Sequence[Entry]:
        return self._ask(lambda: self._index.children(parent, after=after, limit=limit))


def matcher(globs: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path, relative, matches one of `globs`; all do where there are none.

    `*` and `?` stay within one name, `**` crosses "/", `[...]` is a class as in the shell. Raises
    SettingError for what is no pattern.
    """
    if not globs:
        return lambda path: True
    patterns = []
    for glob in globs:
        try:
            patterns.append(re.compile(_translate(glob.lstrip("/")), re.DOTALL))
        except re.error as error:
            raise SettingError("--path", glob, f"a shell pattern ({error})") from error
    return lambda path: any(pattern.fullmatch(path) for pattern in patterns)


def _translate(glob: str) -> str:
    regex, at = "", 0
    while at < len(glob):
        if glob.startswith("**/", at) and (at == 0 or glob[at - 1] == "/"):
            regex, at = regex + "(?:.*/)?", at + 3
        elif glob.startswith("**", at):
            regex, at = regex + ".*", at + 2
        elif glob[at] == "*":
            regex, at = regex + "[^/]*", at + 1
        elif glob[at] == "?":
            regex, at = regex + "[^/]", at + 1
        elif glob[at] == "[" and (end := glob.find("]", at + 2)) > 0:
            inside, at = glob[at + 1 : end], end + 1
            negated = inside[0] in "!^"
            inside = re.sub(r"([^\w-])", r"\\\1", inside[negated:]).replace("--", "\\-\\-")
            regex += f"[^/{inside}]" if negated else f"[{inside}]"
        else:
            regex, at = regex + re.escape(glob[at]), at + 1
    return regex
