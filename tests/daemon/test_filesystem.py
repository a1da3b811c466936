"""The file system without a kernel: its functions called as a driver would, over a real index and
reader on a store and a cache in memory."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from datacache.cache.memory import MemoryTier
from datacache.clock import VirtualClock
from datacache.config.settings import Consistency, IndexSettings, MountSettings, ReadingSettings
from datacache.errors import (
    Archived,
    CredentialsExpired,
    DatacacheError,
    Denied,
    IsADirectory,
    NoSuchPath,
    NotADirectory,
    NotFound,
    TierBroken,
    Unavailable,
    VersionChanged,
    WrongBytes,
)
from datacache.index.index import ROOT, Index
from datacache.index.opening import open_index
from datacache.model import ByteRange, CacheKey, Dataset, Entry, MountPoint
from datacache.reading.reader import Reader
from datacache.sources.faulty import Fail, FaultySource
from datacache.sources.memory import MemorySource
from fuse import nodes
from fuse.filesystem import FOREVER, LOG_EVERY, PAGE, Attributes, FileSystem, Listed, OpenFile, Refused
from fuse.nodes import Stale
from tests.conftest import AnnouncedLogs

TTL = 60.0
OBJECTS = {"a.txt": b"first", "dir/b.bin": bytes(range(256)) * 512, "dir/c": b"", "z.txt": b"last"}


@dataclass
class Mounted:
    """A file system and all that it stands on."""

    files: FileSystem
    source: MemorySource
    door: FaultySource
    """What index and reader ask; it passes everything on to `source` but for scripted faults."""
    reader: Reader
    index: Index
    clock: VirtualClock

    def node(self, path: str) -> int:
        """Look `path` up, name by name."""
        node = ROOT
        for name in path.split("/"):
            node = self.files.lookup(node, name.encode()).node
        return node

    def names(self, node: int = ROOT) -> list[Listed]:
        """All of a directory, as a kernel reads it."""
        handle = self.files.opendir(node)
        found: list[Listed] = []
        while page := list(self.files.readdir(handle, found[-1].offset if found else 0)):
            found += page
        self.files.releasedir(handle)
        return found

    def content(self, node: int) -> bytes:
        handle = self.files.open(node, os.O_RDONLY).handle
        data = bytes(self.files.read(handle, 0, 1 << 20))
        self.files.release(handle)
        return data


Maker = Callable[..., Mounted]


@pytest.fixture
def make(tmp_path: Path, clock: VirtualClock) -> Iterator[Maker]:
    """Makes file systems over `OBJECTS` and closes them."""
    made: list[Callable[[], None]] = []

    def make(
        *,
        mount: MountSettings | None = None,
        index: IndexSettings | None = None,
        objects: dict[str, bytes] = OBJECTS,
        uri: str = "memory://bucket",
    ) -> Mounted:
        source = MemorySource(uri, objects)
        door = FaultySource(source)
        catalogue = open_index(
            Dataset("test", (MountPoint("memory://bucket"),)),
            [door],
            index or IndexSettings(ttl=TTL),
            state=str(tmp_path / f"state-{len(made)}"),
            clock=clock,
        )
        tier = MemoryTier(name="mem:/x")
        reader = Reader([door], tier, ReadingSettings(), clock=clock)
        settings = mount or MountSettings(uid=12, gid=34)
        files = FileSystem(catalogue, reader, settings, tiers={"mem:/x": tier}, clock=clock)
        made.extend([catalogue.close, reader.close, files.close])
        return Mounted(files, source, door, reader, catalogue, clock)

    yield make
    for close in reversed(made):
        close()


# ---- names and attributes ------------------------------------------------------------------------


def test_lookup_shows_an_object_as_a_read_only_file(make: Maker) -> None:
    """Size and time are the object's, owner and mode the mount's, and no holes are shown."""
    it = make(mount=MountSettings(uid=12, gid=34, file_mode=0o440, dir_mode=0o550))
    found = it.files.lookup(ROOT, b"a.txt")
    assert stat.S_ISREG(found.mode)
    assert stat.S_IMODE(found.mode) == 0o440
    assert (found.size, found.blocks, found.nlink) == (5, 1, 1)
    assert found.mtime_ns == it.source.stat("a.txt").mtime_ns
    directory = it.files.lookup(ROOT, b"dir")
    assert stat.S_ISDIR(directory.mode)
    assert stat.S_IMODE(directory.mode) == 0o550
    assert (it.files.uid, it.files.gid) == (12, 34)
    big = it.files.lookup(directory.node, b"b.bin")
    assert big.blocks == big.size // 512


def test_the_owner_is_who_mounts_where_none_is_chosen(make: Maker) -> None:
    """Without --uid and --gid files belong to whoever runs the daemon."""
    files = make(mount=MountSettings()).files
    assert (files.uid, files.gid) == (os.getuid(), os.getgid())


def test_lookup_nowait_answers_from_what_is_known_and_never_asks_the_store(make: Maker) -> None:
    """The event loop may call it: unknown and past its TTL is None, known and fresh an answer."""
    it = make()
    assert it.files.lookup_nowait(ROOT, b"a.txt") is None
    assert not it.source.requests
    assert it.files.lookup(ROOT, b"a.txt") == it.files.lookup_nowait(ROOT, b"a.txt")
    missing = it.files.lookup_nowait(ROOT, b"nothing")
    assert missing is not None
    assert missing.node == 0
    it.clock.advance(TTL + 1)
    assert it.files.lookup_nowait(ROOT, b"a.txt") is None


def test_the_kernel_believes_names_for_what_is_left_of_the_ttl(make: Maker) -> None:
    """The kernel is given what is left of the TTL, so that two caches do not double it; also of names that
    do not exist."""
    it = make()
    assert it.files.lookup(ROOT, b"a.txt").entry_timeout == TTL
    it.clock.advance(45)
    found = it.files.lookup(ROOT, b"a.txt")
    assert found.entry_timeout == found.attr_timeout == TTL - 45
    missing = it.files.lookup(ROOT, b"nothing")
    assert missing == Attributes(0, entry_timeout=TTL - 45)
    assert [listed.attributes.entry_timeout for listed in it.names()] == [TTL - 45] * 3
    assert it.files.getattr(it.node("a.txt")).attr_timeout == TTL - 45


def test_timeouts_are_for_ever_where_nothing_changes(make: Maker) -> None:
    """`immutable` data sets, and the root of any: no request is ever repeated for them."""
    it = make(index=IndexSettings(consistency=Consistency.IMMUTABLE))
    assert it.files.lookup(ROOT, b"a.txt").entry_timeout == FOREVER
    assert it.files.lookup(ROOT, b"nothing").entry_timeout == FOREVER
    assert make().files.getattr(ROOT).attr_timeout == FOREVER


def test_chosen_timeouts_win(make: Maker) -> None:
    """The flags are obeyed; `negative` and `attr` follow `entry` unless they are given too."""
    it = make(mount=MountSettings(entry_timeout=5))
    found = it.files.lookup(ROOT, b"a.txt")
    assert (found.entry_timeout, found.attr_timeout) == (5, 5)
    assert it.files.lookup(ROOT, b"nothing").entry_timeout == 5
    it = make(mount=MountSettings(entry_timeout=5, attr_timeout=float("inf"), negative_timeout=0))
    found = it.files.lookup(ROOT, b"a.txt")
    assert (found.entry_timeout, found.attr_timeout) == (5, FOREVER)
    assert it.files.lookup(ROOT, b"nothing").entry_timeout == 0


def test_statfs_counts_what_is_indexed_and_nothing_is_free(make: Maker) -> None:
    """`df` shows the data set as full."""
    it = make()
    it.names()
    it.names(it.node("dir"))
    space = it.files.statfs()
    assert space.total == sum(map(len, OBJECTS.values()))
    assert space.files >= len(OBJECTS)


# ---- directories ---------------------------------------------------------------------------------


def test_readdir_gives_every_name_once_with_its_attributes(make: Maker) -> None:
    """What readdir says of a name is what lookup says of it."""
    it = make()
    for listed in it.names():
        assert listed.attributes == it.files.lookup(ROOT, listed.name)
    assert {listed.name for listed in it.names()} == {b"a.txt", b"dir", b"z.txt"}


def test_a_large_directory_costs_one_query_a_page(make: Maker) -> None:
    """The kernel's small requests are served from a page in memory; each name comes exactly once."""
    it = make(objects={f"{i:05}": b"" for i in range(2 * PAGE + 7)})
    handle = it.files.opendir(ROOT)
    names: list[bytes] = []
    offset = queries = 0
    while True:
        page = it.files.readdir_nowait(handle, offset)
        if page is None:
            queries += 1
            page = it.files.readdir(handle, offset)
        taken = [listed for _, listed in zip(range(50), page, strict=False)]
        if not taken:
            break
        names += [listed.name for listed in taken]
        offset = taken[-1].offset
    assert sorted(names) == [b"%05d" % i for i in range(2 * PAGE + 7)]
    assert queries == 3


def test_a_directory_can_be_read_from_any_offset_that_was_seen(make: Maker) -> None:
    """seekdir: what lies before the page in memory is asked for again."""
    it = make(objects={f"{i:05}": b"" for i in range(PAGE + 10)})
    handle = it.files.opendir(ROOT)
    first = list(it.files.readdir(handle, 0))
    rest = list(it.files.readdir(handle, first[-1].offset))
    assert len(rest) == 10
    assert it.files.readdir_nowait(handle, first[4].offset) is None
    assert next(it.files.readdir(handle, first[4].offset)).name == first[5].name


def test_a_rewound_directory_is_read_anew(make: Maker) -> None:
    """Offset 0 sees what is there now, not what the handle remembers."""
    it = make()
    handle = it.files.opendir(ROOT)
    assert len(list(it.files.readdir(handle, 0))) == 3
    it.source.put("new", b"x")
    it.clock.advance(TTL + 1)
    assert it.files.readdir_nowait(handle, 0) is None
    assert len(list(it.files.readdir(handle, 0))) == 4


def test_what_the_kernel_has_listed_holds_within_the_ttl_and_until_something_changes(make: Maker) -> None:
    """Past the TTL it is listed again; and what is the same then holds again."""
    it = make()
    assert not it.files.holds(ROOT), "nothing is known yet"
    it.names()
    assert it.files.holds(ROOT)
    it.clock.advance(TTL + 1)
    assert not it.files.holds(ROOT)
    it.names()
    assert it.files.holds(ROOT)
    it.source.put("new", b"x")
    assert it.files.holds(ROOT), "within the TTL, as names are believed"
    it.clock.advance(TTL + 1)
    assert it.node("new"), "a lookup lists the directory"
    assert not it.files.holds(ROOT), "what the kernel has lacks a name"
    assert {listed.name for listed in it.names()} == {b"a.txt", b"dir", b"new", b"z.txt"}
    assert it.files.holds(ROOT)


def test_a_listing_that_changes_while_it_is_read_is_not_kept(make: Maker) -> None:
    """The kernel has some of the old one then, and some of the new."""
    it = make(objects={f"{i:05}": b"" for i in range(PAGE + 10)})
    handle = it.files.opendir(ROOT)
    first = list(it.files.readdir(handle, 0))
    it.source.put("new", b"x")
    it.clock.advance(TTL + 1)
    assert it.node("new")
    assert list(it.files.readdir(handle, first[-1].offset))
    assert not it.files.holds(ROOT)


def test_a_page_that_was_held_for_long_is_not_called_fresh(make: Maker) -> None:
    """Names handed out late are believed for what is left since they were fetched."""
    it = make(objects={f"{i:05}": b"" for i in range(10)})
    handle = it.files.opendir(ROOT)
    first = next(it.files.readdir(handle, 0))
    it.clock.advance(50)
    late = it.files.readdir_nowait(handle, first.offset)
    assert late is not None
    assert next(late).attributes.entry_timeout == TTL - 50
    it.clock.advance(50)
    later = it.files.readdir_nowait(handle, first.offset)
    assert later is not None
    assert next(later).attributes.entry_timeout == 0


# ---- bytes ---------------------------------------------------------------------------------------


def test_reads_are_the_objects_bytes(make: Maker) -> None:
    """Any range, shortened only by the end of the file; the second time without the store."""
    it = make()
    data = OBJECTS["dir/b.bin"]
    handle = it.files.open(it.node("dir/b.bin"), os.O_RDONLY).handle
    assert bytes(it.files.read(handle, 100, 1000)) == data[100:1100]
    assert bytes(it.files.read(handle, len(data) - 5, 4096)) == data[-5:]
    assert bytes(it.files.read(handle, len(data), 4096)) == b""
    reads = it.source.requests["read"]
    warm = it.files.read_nowait(handle, 0, len(data))
    assert warm is not None
    assert bytes(warm) == data
    assert it.source.requests["read"] == reads
    it.files.release(handle)
    assert it.content(it.node("dir/c")) == b""


def test_read_nowait_is_none_where_the_store_would_have_to_be_asked(make: Maker) -> None:
    """The event loop may call it."""
    it = make()
    handle = it.files.open(it.node("a.txt"), os.O_RDONLY).handle
    assert it.files.read_nowait(handle, 0, 5) is None
    assert not it.source.requests["read"]
    it.files.release(handle)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_APPEND])
def test_an_open_for_writing_is_refused(make: Maker, flags: int) -> None:
    """EROFS, whatever the kernel lets through."""
    it = make()
    node = it.node("a.txt")
    with pytest.raises(Refused) as refused:
        it.files.open(node, flags)
    assert it.files.failed("open", refused.value) == errno.EROFS


def test_a_directory_is_not_opened_as_a_file(make: Maker) -> None:
    """EISDIR."""
    it = make()
    with pytest.raises(IsADirectory):
        it.files.open(it.node("dir"), os.O_RDONLY)


def test_an_open_that_is_not_read_looks_into_no_tier_until_it_ends(make: Maker) -> None:
    """The kernel has the pages of an earlier open: nothing to do, but that it counts as an open."""
    it = make()
    it.content(it.node("a.txt"))
    handle = it.files.open(it.node("a.txt"), os.O_RDONLY).handle
    assert it.reader.stats().opens == 1
    assert not it.files.release_nowait(handle)
    it.files.release(handle)
    assert it.reader.stats().opens == 2
    assert it.reader.stats().open_objects == 0


def test_a_file_that_was_read_is_released_without_waiting(make: Maker) -> None:
    """... and its object let go."""
    it = make()
    handle = it.files.open(it.node("a.txt"), os.O_RDONLY).handle
    it.files.read(handle, 0, 5)
    assert it.files.release_nowait(handle)
    assert it.reader.stats().open_objects == 0
    assert it.files.stats()["open_files"] == 0


def test_open_nowait_never_asks_the_store(make: Maker) -> None:
    """Within the TTL it answers from the index; past it, somebody has to ask."""
    it = make()
    node = it.node("a.txt")
    asked = it.source.requests.total()
    opened = it.files.open_nowait(node, os.O_RDONLY)
    assert opened is not None
    it.files.release(opened.handle)
    it.clock.advance(TTL + 1)
    assert it.files.open_nowait(node, os.O_RDONLY) is None
    assert it.source.requests.total() == asked
    with pytest.raises(Refused):
        it.files.open_nowait(node, os.O_RDWR)


def test_close_lets_go_of_what_the_kernel_left_open(make: Maker) -> None:
    """After an unmount by force nobody sends RELEASE."""
    it = make()
    it.files.read(it.files.open(it.node("a.txt"), os.O_RDONLY).handle, 0, 5)
    it.files.open(it.node("z.txt"), os.O_RDONLY)
    it.files.opendir(ROOT)
    it.files.close()
    stats = it.files.stats()
    assert (stats["open_files"], stats["open_directories"]) == (0, 0)
    assert it.reader.stats().open_objects == 0


# ---- versions ------------------------------------------------------------------------------------


def test_an_open_file_keeps_its_version(make: Maker) -> None:
    """An open file keeps its version, whatever happens in the bucket."""
    it = make()
    old = it.node("a.txt")
    before = it.files.open(old, os.O_RDONLY).handle
    assert bytes(it.files.read(before, 0, 10)) == b"first"
    it.source.put("a.txt", b"second version")
    it.clock.advance(TTL + 1)
    new = it.node("a.txt")
    assert new != old
    assert nodes.path(new) == nodes.path(old), "two versions of one path"
    after = it.files.open(new, os.O_RDONLY).handle
    assert bytes(it.files.read(after, 0, 100)) == b"second version"
    assert bytes(it.files.read(before, 0, 100)) == b"first"
    assert it.files.getattr(old).size == 5, "fstat of the open file tells of the version that it has open"
    assert it.files.getattr(new).size == 14
    it.source.delete("a.txt")
    it.clock.advance(TTL + 1)
    assert it.files.lookup(ROOT, b"a.txt").node == 0
    assert bytes(it.files.read(before, 0, 100)) == b"first"
    assert bytes(it.files.read(after, 0, 100)) == b"second version"
    it.files.release(before)
    it.files.release(after)


def test_an_open_sees_a_version_that_was_current_at_most_ttl_ago(make: Maker) -> None:
    """While the store answers, an open sees a version that was current at most TTL ago: a node that the
    kernel still believes in is held against the store when its TTL has passed."""
    it = make(mount=MountSettings(entry_timeout=1e6))
    node = it.node("a.txt")
    assert it.content(node) == b"first"
    it.source.put("a.txt", b"second")
    assert it.content(node) == b"first", "within the TTL the old version may be seen"
    it.clock.advance(TTL + 1)
    with pytest.raises(Stale) as stale:
        it.files.open(node, os.O_RDONLY)
    assert it.files.failed("open", stale.value) == errno.ESTALE, "on which the kernel looks it up again"
    assert it.content(it.node("a.txt")) == b"second"


def test_an_open_of_a_node_that_the_index_knows_to_be_old_is_stale(make: Maker) -> None:
    """Not even within the TTL does an open go back behind what was seen."""
    it = make()
    node = it.node("a.txt")
    it.source.put("a.txt", b"second")
    it.clock.advance(TTL + 1)
    it.names()
    with pytest.raises(Stale):
        it.files.open(node, os.O_RDONLY)
    assert it.files.getattr(node).size == 5, "whoever still has it open is told of what that is"


def test_an_object_that_is_gone_is_not_opened(make: Maker) -> None:
    """No such object: ENOENT. An open of its node is told ESTALE, on which its name is looked up again."""
    it = make()
    node = it.node("a.txt")
    it.source.delete("a.txt")
    it.clock.advance(TTL + 1)
    with pytest.raises(Stale):
        it.files.open(node, os.O_RDONLY)
    assert it.files.lookup(ROOT, b"a.txt").node == 0


@pytest.mark.parametrize("deleted", [True, False])
def test_a_version_that_is_neither_cached_nor_in_the_bucket_is_estale(
    make: Maker, logs: AnnouncedLogs, deleted: bool
) -> None:
    """The bucket no longer has the version, and it is not cached: ESTALE, counted."""
    logs.expect("read failed")
    it = make()
    handle = it.files.open(it.node("a.txt"), os.O_RDONLY).handle
    if deleted:
        it.source.delete("a.txt")
    else:
        it.source.put("a.txt", b"second")
    with pytest.raises(VersionChanged) as gone:
        it.files.read(handle, 0, 5)
    assert it.files.failed("read", gone.value) == errno.ESTALE
    assert it.files.stats()["errors"] == {"VersionChanged": 1}
    it.files.release(handle)
    now = it.files.lookup(ROOT, b"a.txt").node
    assert not now if deleted else it.content(now) == b"second", "who looks next need not wait for the TTL"


def test_an_archived_object_fails_with_a_sentence_that_says_so(make: Maker, logs: AnnouncedLogs) -> None:
    """The object lies in an archive class (Glacier): EIO for the program, the reason in the log."""
    logs.expect("lies in an archive class; restore it first")
    it = make()
    it.source.put("cold", b"ice", archived=True)
    it.clock.advance(TTL + 1)
    handle = it.files.open(it.node("cold"), os.O_RDONLY).handle
    with pytest.raises(Archived) as archived:
        it.files.read(handle, 0, 3)
    assert it.files.failed("read", archived.value) == errno.EIO
    it.files.release(handle)


# ---- extended attributes -------------------------------------------------------------------------


def test_extended_attributes_tell_where_bytes_come_from_and_lie(make: Maker) -> None:
    """user.datacache.{uri,version,tier,cached}, of files."""
    it = make(mount=MountSettings(xattr=True))
    node = it.node("a.txt")

    def shown() -> dict[str, bytes]:
        return {name.decode(): it.files.getxattr(node, name) for name in it.files.listxattr(node)}

    token = it.index.resolve("/a.txt").version.token.encode()
    expected = {
        "user.datacache.uri": b"memory://bucket/a.txt",
        "user.datacache.version": token,
        "user.datacache.tier": b"",
        "user.datacache.cached": b"0",
    }
    assert shown() == expected
    it.content(node)
    assert shown() == expected | {"user.datacache.tier": b"mem:/x", "user.datacache.cached": b"5"}
    assert it.files.listxattr(it.node("dir")) == []
    with pytest.raises(Refused) as missing:
        it.files.getxattr(node, b"security.capability")
    assert missing.value.errno == errno.ENODATA


def test_extended_attributes_of_a_file_that_two_tiers_share(make: Maker) -> None:
    """What spills over is counted with the rest; the address has no options of ours in it."""
    it = make(uri="memory://bucket?endpoint=http://minio:9000")
    node = it.node("dir/b.bin")
    key = it.reader.cache_key(it.index.resolve("/dir/b.bin"))
    upper, lower = MemoryTier(name="mem:/x"), MemoryTier(name="ssd:/y")
    size = len(OBJECTS["dir/b.bin"])
    for tier, span in ((upper, ByteRange(0, 100_000)), (lower, ByteRange(90_000, size))):
        copy = tier.open(key)
        copy.fill(span.start, OBJECTS["dir/b.bin"][span.start : span.stop])
        copy.close()
    tiers = {"mem:/x": upper, "ssd:/y": lower}
    files = FileSystem(it.index, it.reader, MountSettings(xattr=True), tiers=tiers)
    assert files.getxattr(node, b"user.datacache.uri") == b"memory://bucket/dir/b.bin"
    assert files.getxattr(node, b"user.datacache.tier") == b"mem:/x,ssd:/y"
    assert files.getxattr(node, b"user.datacache.cached") == str(size).encode()


def test_without_the_setting_extended_attributes_do_not_exist(make: Maker) -> None:
    """ENOSYS once, and the kernel does not ask again: `ls -l` would ask for each file."""
    it = make()
    node = it.node("a.txt")
    for refused in (lambda: it.files.getxattr(node, b"user.datacache.uri"), lambda: it.files.listxattr(node)):
        with pytest.raises(Refused) as error:
            refused()
        assert error.value.errno == errno.ENOSYS


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (NoSuchPath("x"), errno.ENOENT),
        (NotFound("x"), errno.ENOENT),
        (NotADirectory("x"), errno.ENOTDIR),
        (IsADirectory("x"), errno.EISDIR),
        (Stale("x"), errno.ESTALE),
        (Refused(errno.ENODATA), errno.ENODATA),
    ],
)
def test_answers_are_neither_logged_nor_counted(make: Maker, error: Exception, number: int) -> None:
    """A name that does not exist is no failure of ours."""
    files = make().files
    assert files.failed("lookup", error) == number
    assert files.stats()["errors"] == {}


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (Denied("x"), errno.EACCES),
        (CredentialsExpired("x"), errno.EIO),
        (Archived("x"), errno.EIO),
        (VersionChanged("x"), errno.ESTALE),
        (Unavailable("x"), errno.EIO),
        (WrongBytes("x"), errno.EIO),
        (TierBroken("x"), errno.EIO),
        (DatacacheError("x"), errno.EIO),
        (PermissionError("x"), errno.EIO),
        (KeyError("x"), errno.EIO),
    ],
)
def test_every_failure_has_an_errno_and_is_counted(
    make: Maker, logs: AnnouncedLogs, error: Exception, number: int
) -> None:
    """One table; what is not in it is EIO, also when it looks like an errno of its own."""
    logs.expect("read failed")
    files = make().files
    assert files.failed("read", error) == number
    assert files.stats()["errors"] == {type(error).__name__: 1}


def test_an_outage_is_logged_now_and_then_and_counted_always(make: Maker, logs: AnnouncedLogs) -> None:
    """One line a kind in LOG_EVERY seconds, which tells how many were left out; bugs with their traceback."""
    logs.expect("failed")
    it = make()
    for _ in range(10):
        it.files.failed("read", Unavailable("the store is away"))
    it.files.failed("lookup", KeyError("a bug"))
    assert logs.messages() == ["read failed: the store is away", "lookup failed unexpectedly"]
    assert logs.seen[1].exc_info
    it.clock.advance(LOG_EVERY)
    it.files.failed("read", Unavailable("still away"))
    assert logs.messages()[2] == "read failed: still away (and 9 more Unavailable before)"
    assert it.files.stats()["errors"] == {"Unavailable": 11, "KeyError": 1}


def test_credentials_that_the_store_refuses_are_eacces(make: Maker, logs: AnnouncedLogs) -> None:
    """The store refuses the credentials: EACCES, of a read, a listing, and an open past the TTL."""
    logs.expect("failed")
    it = make()
    node = it.node("a.txt")
    handle = it.files.open(node, os.O_RDONLY).handle
    directory = it.files.opendir(it.node("dir"))
    it.clock.advance(TTL + 1)
    refused = Fail(Denied("AccessDenied"))
    attempts: list[tuple[str, Callable[[], object]]] = [
        ("read", lambda: it.files.read(handle, 0, 5)),
        ("list", lambda: it.files.readdir(directory, 0)),
        ("list", lambda: it.files.open(node, os.O_RDONLY)),
    ]
    for operation, attempt in attempts:
        it.door.add(operation, refused)
        with pytest.raises(Denied) as denied:
            attempt()
        assert it.files.failed(operation, denied.value) == errno.EACCES
    it.files.release(handle)
    it.files.releasedir(directory)


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_known_is_served_while_the_store_is_away(
    make: Maker, logs: AnnouncedLogs, strict: bool
) -> None:
    """When the store is away, the last known version is served and counted as `stale`.
    With `--strict` a listing past its TTL is an error (EIO) while the store is away."""
    it = make(index=IndexSettings(ttl=TTL, strict=strict))
    node = it.node("a.txt")
    assert it.content(node) == b"first"
    it.clock.advance(TTL + 1)
    it.door.add("list", *[Fail(Unavailable("down"))] * 2)
    it.door.add("stat", *[Fail(Unavailable("down"))] * 2)
    it.door.add("read", Fail(Unavailable("down")))
    if strict:
        logs.expect("open failed: down")
        with pytest.raises(Unavailable) as away:
            it.files.open(node, os.O_RDONLY)
        assert it.files.failed("open", away.value) == errno.EIO
        assert it.index.stats().stale == 0
    else:
        assert it.content(node) == b"first"
        assert it.index.stats().stale >= 1


def test_the_store_away_is_an_error_and_then_works_again(make: Maker, logs: AnnouncedLogs) -> None:
    """The store cannot be reached and the bytes are cached nowhere: EIO; nothing of it stays."""
    logs.expect("no route to host")
    it = make()
    handle = it.files.open(it.node("a.txt"), os.O_RDONLY).handle

    def away(key: str, span: ByteRange) -> None:
        raise Unavailable("no route to host")

    it.source.on_read = away
    with pytest.raises(Unavailable) as unreachable:
        it.files.read(handle, 0, 5)
    assert it.files.failed("read", unreachable.value) == errno.EIO
    it.source.on_read = None
    assert bytes(it.files.read(handle, 0, 5)) == b"first"
    it.files.release(handle)


def test_what_cannot_be_opened_fails_the_read_and_leaves_nothing_open(make: Maker) -> None:
    """When the reader refuses, whoever reads is told; closing gives everything back all the same."""

    class Refusing:
        def open(self, entry: Entry) -> OpenFile:
            raise Unavailable("closing")

        def cache_key(self, entry: Entry) -> CacheKey:
            raise AssertionError("not asked for")

    it = make()
    files = FileSystem(it.index, Refusing(), MountSettings(), clock=it.clock)
    handle = files.open(files.lookup(ROOT, b"a.txt").node, os.O_RDONLY).handle
    assert "1 files open" in repr(files)
    with pytest.raises(Unavailable):
        files.read(handle, 0, 5)
    assert not files.release_nowait(handle)
    with pytest.raises(Unavailable):
        files.release(handle)
    assert files.stats()["open_files"] == 0
