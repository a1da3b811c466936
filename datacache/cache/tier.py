"""
The seam between the reader and every place of copies.

A tier holds cache entries: at most one per `CacheKey`, filled piece by piece. Whoever reads opens
the entry, asks what is missing (`gaps`), fills it, reads it. An entry that nothing was ever filled
into leaves no trace. Nothing here ever makes a read fail for good: every error of a tier is a
`CacheError`, on which the reader goes to the store.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from datacache.model import Buffer, ByteRange, CacheKey


@dataclass(frozen=True)
class TierStats:
    """What a tier looks like now. `datacache status` and the metrics print this same value."""

    name: str
    """`mem:/dev/shm/x`."""
    quota: int
    used: int
    """Bytes of the copies, entries unlinked while open included."""
    entries: int
    state: str
    """`ok`, `full` or `broken`."""
    reason: str = ""
    """Why it is full or broken, for people."""
    evicted: int = 0
    """Entries evicted since start."""
    damaged: int = 0
    """Blocks that did not match their checksum since start."""
    pinned: int = 0
    """Of `used`: bytes of pinned entries, as of some seconds ago."""
    lease: int | None = None
    """Bytes that it may take now, at most `quota`: what the node's plugin lends it; None: nobody does."""
    lease_entries: int | None = None
    """Entries that it may have by that; 0: as many as there is room for."""


@dataclass(frozen=True)
class EntryStats:
    """One cache entry, for `ls`, `stat` and `evict`."""

    key: CacheKey
    tier: str
    present: int
    """Bytes present."""
    pinned: bool
    last_open: float
    """Wall time of the last open."""

    @property
    def whole(self) -> bool:
        return self.present >= self.key.size


@dataclass(frozen=True)
class Standing:
    """What decides when an entry goes. It goes with the entry from tier to tier."""

    last_open: float
    """Wall time."""
    pinned: bool
    superseded: bool


class Block(NamedTuple):
    """A filled and checksummed piece."""

    start: int
    stop: int
    checksum: int
    """As `catalogue.checksum` makes it."""
    epoch: int = 0
    """See `catalogue`."""

    @property
    def span(self) -> ByteRange:
        return ByteRange(self.start, self.stop)


class CachedFile(Protocol):
    """One open cache entry. Thread-safe; while it is open its bytes stay readable, evicted or not."""

    @property
    def evicted(self) -> bool:
        """Whether the entry was dropped since it was opened: it takes nothing more, and another open
        does not find it."""

    def gaps(self, span: ByteRange) -> list[ByteRange]:
        """The parts of `span` that are not present, in order. Empty: `read` will do."""

    def read(self, span: ByteRange) -> Buffer:
        """Bytes `span`, which must be present.

        Blocks that are in doubt (see docs/on-disk-format.md) are held against their checksum
        first. Raises Damaged when one does not match (it is a gap from then on) and TierBroken.
        """

    def read_nowait(self, span: ByteRange) -> Buffer | None:
        """Bytes `span` if they are present, beyond doubt and in memory; None where that would block
        or is not so. Never raises."""

    def fill(self, start: int, data: Buffer) -> None:
        """Keep `data` at offset `start`. What of it is present already stays as it is.

        When this returns the bytes are readable and survive the death of the process. Raises
        TierFull (nothing was kept, or only a part at the front) and TierBroken.
        """

    def close(self) -> None:
        """Let go. Idempotent."""


class Lent(Protocol):
    """A whole cached file, lent to the kernel, which reads it by itself from then on. Thread-safe.

    Its bytes never change, whatever becomes of the entry. Until `close` the entry is in use. After it
    the entry may still be: what the kernel was given (a passthrough open, a mapping) outlives both
    the descriptor and this process, so a tier asks the kernel who reads a file before it counts its
    space as free.
    """

    @property
    def descriptor(self) -> int:
        """The cached file, open for reading only; valid until `close`."""

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode number of the cached file: equal in all that were lent of the same file."""

    def close(self) -> None:
        """Let go. Idempotent; never raises."""


class Taking(Protocol):
    """Room in a tier for a whole file that lies on its file system already, and need not be copied."""

    def take(self, descriptor: int, blocks: Sequence[Block]) -> bool:
        """Give the file that `descriptor` has open a name in the tier: from now on it is the cached file of
        its key, and nobody may write to it, by whatever name. False, where that cannot be. Never raises."""

    def withdraw(self) -> None:
        """Take the name, and all that the tier says of it, away again, durably: the file may be written. For
        what `take` has just taken. Raises TierBroken: that could not be made certain."""

    def close(self) -> None:
        """Give the room back where it was not taken. Idempotent."""


class Tier(Protocol):
    """A place of copies. Thread-safe."""

    def open(self, key: CacheKey) -> CachedFile:
        """Open the entry of `key`, which need not exist yet. Counts as its last open. Never raises:
        a broken tier opens entries with nothing in them."""

    def lend(self, key: CacheKey) -> Lent | None:
        """The cached file of `key`, if every byte of it is present in one tier and none is in doubt; else
        None, also for an empty object, of which there is no file. Counts as a last open where it is
        lent. Verifies nothing; never raises."""

    def read_whole(self, key: CacheKey) -> Buffer | None:
        """All bytes of `key`, if they are present in one tier and beyond doubt, as `open`, `read` and `close`
        would give them, at a third of the price: for small files that are read in one go. None: open it,
        whatever the reason. Never raises."""

    def admit(self, key: CacheKey, descriptor: int) -> Taking | None:
        """Make room for the file that `descriptor` has open, which has all bytes of `key`; `close` what is
        returned. None: it lies elsewhere, there is no room, or `key` is open here. Never raises."""

    def surrender(self, key: CacheKey, at: int, name: str) -> Sequence[Block] | None:
        """Give the cached file of `key` away: it is called `name` in the directory `at` then, nobody has it
        open, and whoever has that name may write to it. What was in it is returned. None, and nothing has
        happened, where there is no whole file beyond doubt, somebody has it open, it is pinned, or it lies on
        another file system. Never raises; where that is what it cannot do, the copy may be lost."""

    def disown(self, files: Collection[tuple[int, int]]) -> None:
        """Files, by device and inode number, that have another name elsewhere may be written to: drop the
        entries whose cached files they are, durably. Looks at all that there is (a million files: some
        seconds). Raises TierBroken."""

    def present(self, key: CacheKey) -> int:
        """Bytes present of `key`, without opening it."""

    def evict(self, key: CacheKey) -> int:
        """Drop the entry; the bytes that it held. Open files of it stay readable. Pinned or not."""

    def pin(self, key: CacheKey, pinned: bool) -> None:
        """Keep the entry from eviction by policy, or no longer."""

    def recheck(self, key: CacheKey) -> int:
        """Hold what is present of the entry against its checksums now, whatever was proven before; how
        many pieces were bad and are dropped. Raises TierBroken. What `load --verify` does."""

    def supersede(self, key: CacheKey) -> None:
        """The store has another version now: this entry may go before all others."""

    def entries(self) -> Iterator[EntryStats]:
        """All entries, of all data sets, in no order."""

    def stats(self) -> tuple[TierStats, ...]:
        """How it is now: one value a leaf tier, fastest first."""

    def close(self) -> None:
        """Let go of the directory. No open file is read afterwards."""
