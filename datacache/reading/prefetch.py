"""
What to fetch before it is asked for.

Pure state machines, told what readers do, that say what to fetch next; `reader` fetches it when
nobody waits for anything else. `Window` runs ahead of one sequential reader of one object, `Listing`
ahead of a reader who opens a directory's files in listing order, `Announced` ahead of one who said
in which order files will be opened. None is thread-safe: the owner locks.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from datacache.model import ByteRange, MiB

SLACK = 2 * MiB
"""How far from where it was expected a read may begin and still be part of the same run. The kernel
reads ahead of a sequential reader in windows (1 MiB with our default) cut into requests that are
answered by any thread in any order, two windows at a time."""


class Window:
    """Readahead of one open object.

    A run is a series of reads that begin near where the furthest one ended. From its second read on,
    and while the reads cover at least half of what they span (strides do not), the window runs ahead
    of it: one block at first, doubled each time that it moves, up to `ceiling`.
    """

    __slots__ = (
        "_block",
        "_ceiling",
        "_edge",
        "_high",
        "_limit",
        "_read",
        "_reads",
        "_size",
        "_start",
        "_width",
    )

    def __init__(self, size: int, *, block: int, limit: int, ceiling: int) -> None:
        self._size, self._block, self._limit, self._ceiling = size, block, limit, ceiling
        self._start = 0  # where the run began
        self._high = 0  # the end of its furthest read
        self._read = 0  # bytes read in it
        self._reads = 0
        self._edge = 0  # up to here it was fetched ahead
        self._width = min(block, ceiling)

    def __repr__(self) -> str:
        return f"<Window {self._start}-{self._high}, ahead to {self._edge}, width {self._width}>"

    def seen(self, start: int, stop: int, *, ceiling: int | None = None) -> ByteRange | None:
        """Bytes `start` to `stop` were asked for; what to fetch ahead now, if anything.

        `ceiling` is a lower one than at birth, while memory is short.
        """
        high = self._high
        if not high - SLACK <= start <= high + SLACK:
            self._start, self._high, self._read, self._reads = start, stop, stop - start, 1
            self._edge, self._width = stop, min(self._block, self._ceiling)
            return None
        self._reads += 1
        self._read += stop - start
        if stop <= high:
            return None  # a late one of the same run, or a reader who goes backwards
        self._high = high = stop
        if self._edge >= self._size or self._reads < 2 or 2 * self._read < high - self._start:
            return None
        width = self._width if ceiling is None else min(self._width, ceiling)
        edge = max(self._edge, high)
        if edge - high > width - min(self._limit, width // 2):
            return None
        target = high + width
        target = min(self._size, target + -target % self._block)
        if target <= edge:
            return None
        self._edge = target
        self._width = min(2 * self._width, self._ceiling)
        return ByteRange(edge, target)


class _Ahead:
    """Files that were fetched ahead of a reader and not opened yet, by their place in the order."""

    __slots__ = ("_bytes", "_files", "_left")

    def __init__(self) -> None:
        self._files: deque[tuple[int, int]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._files)

    @property
    def bytes(self) -> int:
        return self._bytes

    def took(self, place: int, size: int) -> None:
        self._files.append((place, size))
        self._bytes += size

    def passed(self, place: int) -> None:
        """The reader is at `place`: what lies before it is no longer ahead."""
        while self._files and self._files[0][0] <= place:
            self._bytes -= self._files.popleft()[1]

    def clear(self) -> None:
        self._files.clear()
        self._bytes = 0


class After(NamedTuple):
    """Fetch ahead the first `limit` files of directory `parent` whose `ino` is above `ino`."""

    parent: int
    ino: int
    limit: int


_NEAR = 8
"""How far two opens in listing order may lie apart: several readers share a listing, and names between
may be directories. In a shuffled directory of 1,000 files a run of three is then one in 15,000."""

_STREAK = 3
"""Opens in order after which an order is believed."""

_DIRECTORIES = 256
"""Directories whose opens are followed at once."""


@dataclass(slots=True)
class _Run:
    high: int = 0
    streak: int = 0
    edge: int = 0
    ahead: _Ahead = field(default_factory=_Ahead)


class Listing:
    """Ahead of readers who open files in listing order, directory by directory.

    `files` and `bytes` bound what is fetched ahead in one directory.
    """

    def __init__(self, *, files: int, bytes: int) -> None:
        self._files, self._bytes = files, bytes
        self._runs: OrderedDict[int, _Run] = OrderedDict()

    def opened(self, parent: int, ino: int) -> After | None:
        """The file `ino` of directory `parent` was opened; what to look up and fetch ahead now."""
        run = self._runs.get(parent)
        if run is None:
            self._runs[parent] = run = _Run()
            if len(self._runs) > _DIRECTORIES:
                self._runs.popitem(last=False)
        else:
            self._runs.move_to_end(parent)
        step = ino - run.high
        if -_NEAR <= step <= 0:
            return None  # another reader of the same run, or the same file again
        if not 0 < step <= _NEAR:
            run.streak, run.edge = 0, 0
            run.ahead.clear()
        run.high = ino
        run.streak += 1
        run.ahead.passed(ino)
        if run.streak < _STREAK:
            return None
        depth = min(self._files, 2 << min(run.streak - _STREAK, 16))
        room = depth - len(run.ahead)
        # By halves: one look into the index for many opens.
        if room < max(1, depth // 2) or run.ahead.bytes > self._bytes // 2:
            return None
        return After(parent, max(run.edge, run.high), room)

    def take(self, parent: int, ino: int, size: int) -> int | None:
        """`ino`, of `size` bytes (0 for a directory), comes next: how many bytes of it to fetch ahead.
        None: enough is ahead."""
        run = self._runs.get(parent)
        if run is None:
            return None
        length = min(size, self._bytes - run.ahead.bytes)
        if length <= 0 < size:
            return None
        if ino <= max(run.edge, run.high):
            return 0  # the reader got there first
        run.edge = ino
        run.ahead.took(ino, length)
        return length


class Announced:
    """Ahead of a reader who said in which order the files `inos` will be opened.

    Holds eight bytes a file. `files` and `bytes` bound what is fetched ahead.
    """

    def __init__(self, inos: Iterable[int], *, files: int, bytes: int) -> None:
        self._inos = array("q", inos)
        self._files, self._bytes = files, bytes
        self._at = -1  # the place of the furthest open
        self._edge = 0  # the place of the next file to fetch ahead
        self._strays = 0
        self._ahead = _Ahead()

    def __len__(self) -> int:
        return len(self._inos)

    def opened(self, ino: int) -> None:
        """The file `ino` was opened."""
        near = max(0, self._at - self._files)
        place = self._find(ino, near, self._at + 2 * self._files + 1)
        if place is None:
            # Not where the reader should be: a stray, or a reader who is elsewhere (a second epoch, a
            # restart). The whole order is searched only after the 1st, 2nd, 4th, 8th... stray.
            self._strays += 1
            if self._strays & (self._strays - 1):
                return
            place = self._find(ino, 0, len(self._inos))
            if place is None:
                return
            self._at, self._edge = place, place + 1
            self._ahead.clear()
        self._strays = 0
        self._at = max(self._at, place)
        self._edge = max(self._edge, self._at + 1)
        self._ahead.passed(self._at)

    @property
    def low(self) -> bool:
        """Whether so little is ahead that a look into the index pays: by halves, one for many opens."""
        return (
            self._edge < len(self._inos)
            and len(self._ahead) <= self._files // 2
            and self._ahead.bytes <= self._bytes // 2
        )

    def next(self) -> int | None:
        """The `ino` of the next file to fetch ahead; None while enough is ahead."""
        if (
            self._edge >= len(self._inos)
            or len(self._ahead) >= self._files
            or self._ahead.bytes >= self._bytes
        ):
            return None
        return self._inos[self._edge]

    def take(self, ino: int, size: int) -> int:
        """The file that `next` named has `size` bytes (0: it is gone): how many to fetch ahead."""
        if self._edge >= len(self._inos) or self._inos[self._edge] != ino:
            return 0  # the reader jumped meanwhile
        length = min(size, max(0, self._bytes - self._ahead.bytes))
        self._ahead.took(self._edge, length)
        self._edge += 1
        return length

    def _find(self, ino: int, start: int, stop: int) -> int | None:
        try:
            return self._inos.index(ino, start, min(stop, len(self._inos)))
        except ValueError:
            return None
