"""
More processes that answer: one interpreter answers a bounded number of requests a second.

An *answerer* reads requests from the same descriptor as the daemon that owns the data set, and answers
what it can from what is there and does not change: names of a pinned index, bytes of whole cached files.
Everything else it hands to the owner, request and all, on a socket; the owner writes the answer. So
nothing is decided in two places. Only for mounts whose handles mean nothing (`--io pagecache`) of
snapshots.

The owner starts them and replaces those that die, having the kernel send again what they had read: a
request that two processes answer is answered once, the kernel refuses the second. They end with the
owner: their socket says so.
"""

import contextlib
import logging
import mmap
import os
import select
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from datacache.cache.disk import Handle
from datacache.cache.onlooker import Onlooker
from datacache.clock import SystemClock
from datacache.config.settings import Settings
from datacache.errors import NotFound
from datacache.index.opening import open_index
from datacache.model import Buffer, CacheKey, Entry
from datacache.worker import opened_sources
from fuse import protocol
from fuse.broker import Handover
from fuse.connection import REQUEST
from fuse.filesystem import FileSystem
from fuse.session import KINDS, Session

log = logging.getLogger(__name__)


class _Elsewhere(NotFound):
    """It is not here in a form that may be read: the owner knows."""


class _Whole:
    """A whole cached file, open."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def read(self, offset: int, length: int) -> Buffer:
        return os.pread(self._handle.fd, length, offset)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return self.read(offset, length)

    def close(self) -> None:
        """The descriptor goes with the last who refers to it."""


class _Copies:
    """What `filesystem.Opener` asks, from tiers that another process owns."""

    def __init__(self, tiers: list[Onlooker], uris: list[str]) -> None:
        self._tiers, self._uris = tiers, uris

    def open(self, entry: Entry) -> _Whole:
        key = self.cache_key(entry)
        for tier in self._tiers:
            if (handle := tier.open(key)) is not None:
                return _Whole(handle)
        raise _Elsewhere(f"{key.key!r} is not whole in the cache")

    def lend(self, entry: Entry) -> None:
        return None

    def read_whole(self, entry: Entry) -> None:
        return None  # `open` is cheap here

    def fetch(self, entry: Entry) -> int:
        raise _Elsewhere("an answerer fetches nothing")

    def cache_key(self, entry: Entry) -> CacheKey:
        return CacheKey(self._uris[entry.mount], entry.key, entry.version.token, entry.size)


def answer(settings: Settings, handed: Handover, owner: socket.socket, counts: int) -> None:
    """Be an answerer until the owner ends. `counts`: a file of `KINDS` numbers, where requests are
    counted."""
    with contextlib.ExitStack() as built:
        built.enter_context(owner)
        table = built.enter_context(mmap.mmap(counts, KINDS * 8))
        numbers = built.enter_context(memoryview(table).cast("Q"))
        dataset, sources, manifest = built.enter_context(opened_sources(settings, clock=SystemClock()))
        index = open_index(
            dataset, sources, settings.index, state=settings.state, clock=SystemClock(), manifest=manifest,
            cache_entries=settings.mount.metadata_entries, resumed=True,
        )  # fmt: skip
        built.callback(index.close)
        tiers = [Onlooker(tier.path) for tier in settings.cache.tiers]
        for tier in tiers:
            built.callback(tier.close)
        files = FileSystem(index, _Copies(tiers, [source.uri for source in sources]), settings.mount)
        built.callback(files.close)
        session = Session(
            files, handed.descriptor, handed.agreement, max_threads=settings.mount.max_threads,
            max_idle_threads=settings.mount.max_idle_threads, elsewhere=owner.send, counts=numbers,
        )  # fmt: skip
        session.start()
        owner.recv(1)  # nothing is ever said: it ends
        session.end()


# ---- the owner's side ----------------------------------------------------------------------------


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    ours: socket.socket
    table: mmap.mmap
    ended: int = field(default=-1)


class Answerers:
    """The answerers beside an owner: started, counted, replaced."""

    def __init__(self, count: int, settings: str, handed: Handover, session: Session) -> None:
        """`settings` as `dump_settings` writes them."""
        self._settings, self._handed, self._session = settings, handed, session
        self._lock = threading.Lock()  # guards _children and _past
        self._past: Counter[int] = Counter()  # what those that are gone have answered
        self._stop, self._stopping = os.pipe()
        self._children = [self._start() for _ in range(count)]
        self._watcher = threading.Thread(target=self._watch, name="answerers")
        self._watcher.start()

    def __repr__(self) -> str:
        return f"<Answerers {[child.process.pid for child in self._children]}>"

    def pids(self) -> list[int]:
        """The processes that there are now."""
        with self._lock:
            return [child.process.pid for child in self._children]

    def requests(self) -> dict[str, int]:
        """Requests that they have taken, by kind; those handed to the owner are among them."""
        with self._lock:
            counts = self._past.copy()
            for child in self._children:
                counts.update(_counted(child))
        return {protocol.opcode_name(code).lower(): count for code, count in counts.items() if count}

    def close(self) -> None:
        """End them."""
        os.write(self._stopping, b"x")
        self._watcher.join()
        for child in self._children:
            # As long as our thread waits for it, a socket that is only closed is open for the other side.
            with contextlib.suppress(OSError):
                child.ours.shutdown(socket.SHUT_RDWR)
            child.ours.close()
        for child in self._children:
            try:
                child.process.wait(5)
            except subprocess.TimeoutExpired:
                log.warning("answering process %d did not end, and was killed", child.process.pid)
                child.process.kill()
                child.process.wait()
            self._drop(child)
        os.close(self._stop)
        os.close(self._stopping)

    def _start(self) -> _Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * REQUEST)
        counts = os.memfd_create("datacache-counts")
        try:
            os.truncate(counts, KINDS * 8)
            table = mmap.mmap(counts, KINDS * 8)
            process = subprocess.Popen(
                [
                    sys.executable, "-P", "-m", "fuse", "--handover", self._handed.dump(),
                    "--answer-fd", str(theirs.fileno()), "--counts-fd", str(counts),
                ],
                stdin=subprocess.PIPE, pass_fds=(theirs.fileno(), counts, self._handed.descriptor), cwd="/",
            )  # fmt: skip
        finally:
            theirs.close()
            os.close(counts)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(self._settings.encode())
        child = _Child(process, ours, table, os.pidfd_open(process.pid))
        # The thread ends when the answerer does, or when `close` closes the socket.
        threading.Thread(target=self._serve, args=(ours,), name="answerer", daemon=True).start()
        return child

    def _serve(self, ours: socket.socket) -> None:
        """Answer what an answerer could not."""
        buffer = bytearray(REQUEST)
        with contextlib.suppress(OSError):
            while length := ours.recv_into(buffer):
                self._session.answer(memoryview(buffer)[:length])

    def _watch(self) -> None:
        while True:
            with self._lock:
                ends = {child.ended: child for child in self._children}
            waiting = select.poll()  # descriptors beyond 1,023 are none to select(2)
            for end in (self._stop, *ends):
                waiting.register(end, select.POLLIN)
            ready = [end for end, _ in waiting.poll()]
            if self._stop in ready:
                return
            for end in ready:
                self._replace(ends[end])

    def _replace(self, child: _Child) -> None:
        code = child.process.wait()
        log.warning("answering process %d ended (%d); starting another", child.process.pid, code)
        new = self._start()
        with self._lock:
            self._past.update(_counted(child))
            self._children[self._children.index(child)] = new
        child.ours.close()
        self._drop(child)
        self._session.resend()

    def _drop(self, child: _Child) -> None:
        os.close(child.ended)
        child.table.close()


def _counted(child: _Child) -> dict[int, int]:
    with memoryview(child.table) as raw, raw.cast("Q") as numbers:
        return {code: count for code, count in enumerate(numbers) if count}


def processors() -> int:
    """How many processors this process may use: by its control group's cpu.max, else by its affinity. Never
    by shares, which say nothing of how many there are."""
    known = len(os.sched_getaffinity(0))
    for quota in _quotas():
        known = min(known, max(1, round(quota)))
    return known


def _quotas() -> Iterator[float]:
    """Processors that each control group above us allows, where one says so."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/cgroup", encoding="ascii") as file:
            group = next(line.rstrip("\n").split("::", 1)[1] for line in file if line.startswith("0::"))
        while True:
            limit = f"/sys/fs/cgroup{group}/cpu.max"
            with contextlib.suppress(OSError), open(limit, encoding="ascii") as file:
                most, period = file.read().split()
                if most != "max":
                    yield int(most) / int(period)
            if group in ("", "/"):
                return
            group = os.path.dirname(group)
