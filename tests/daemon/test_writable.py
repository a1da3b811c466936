"""The file system of a writable data set without a kernel: called as a driver would, over a real overlay,
index and landing zone, and a bucket in memory."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from datacache.cache.memory import MemoryTier
from datacache.config.settings import Durability, MountSettings, ReadingSettings
from datacache.errors import (
    LandingBroken,
    LandingFull,
    NoSuchPath,
    NotEmpty,
    NotHere,
    OtherStore,
    PathExists,
)
from datacache.index.index import ROOT
from datacache.reading.reader import Reader
from datacache.writing.awaited import PATIENCE
from datacache.writing.closing import SOON
from datacache.writing.landing import Room
from fuse import nodes
from fuse.connection import Backings
from fuse.filesystem import Attributes, Opened, Refused
from fuse.nodes import Stale
from fuse.writable import WritableFileSystem, _said
from tests.conftest import AnnouncedLogs
from tests.support.overlays import Mounted, Place

OLD = b"what the bucket has"
RW, RO, WO = os.O_RDWR, os.O_RDONLY, os.O_WRONLY


@dataclass
class Registrar:
    """Numbers for backing files, and how each was open when it was registered."""

    modes: dict[int, int] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)

    def open(self, descriptor: int) -> int:
        number = len(self.modes) + 1
        self.modes[number] = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        self.known.add(number)
        return number

    def close(self, number: int) -> None:
        self.known.remove(number)


@dataclass
class Life:
    """One daemon's life with a mount."""

    files: WritableFileSystem
    mounted: Mounted
    registrar: Registrar
    closing: list[Callable[[], None]]

    def close(self) -> None:
        for close in self.closing:
            close()
        self.closing.clear()

    def node(self, path: str) -> int:
        node = ROOT
        for name in path.split("/"):
            node = self.files.lookup(node, name.encode()).node
        return node

    def attributes(self, path: str) -> Attributes:
        return self.files.getattr(self.node(path))

    def make(self, name: str, data: bytes = b"", mode: int = 0o644) -> tuple[int, Opened]:
        """A new file, open for writing; its node, too."""
        found, opened = self.files.create(ROOT, name.encode(), RW | os.O_CREAT, mode, 1, 2)
        if data:
            assert self.files.write(opened.handle, 0, data, node=found.node) == len(data)
        return found.node, opened

    def open(self, path: str, flags: int = RW) -> tuple[int, Opened]:
        """Open as the kernel does: once more, when it is told ESTALE."""
        node = self.node(path)
        try:
            return node, self.files.open(node, flags)
        except Stale:
            again = self.node(path)
            assert again != node
            return again, self.files.open(again, flags)

    def write(self, path: str, data: bytes) -> None:
        node, opened = self.open(path, WO | os.O_TRUNC)
        self.files.write(opened.handle, 0, data, node=node)
        self.files.release(opened.handle)

    def content(self, path: str) -> bytes:
        node, opened = self.open(path, RO)
        data = bytes(self.files.read(opened.handle, 0, 1 << 20, node))
        self.files.release(opened.handle)
        return data

    def names(self, node: int = ROOT) -> list[str]:
        handle, found, offset = self.files.opendir(node), [], 0
        while page := list(self.files.readdir(handle, offset)):
            found += [one.name.decode() for one in page]
            offset = page[-1].offset
        self.files.releasedir(handle)
        return sorted(found)

    @property
    def writers(self) -> dict[int, int]:
        return {node.ino: node.writers for node in self.mounted.journal.nodes() if node.writers}


Maker = Callable[..., Life]


@pytest.fixture
def begin() -> Iterator[Maker]:
    """Begins lives with one mount, each when the one before has ended."""
    place = Place.new()
    place.bucket.put("old", OLD)
    place.bucket.put("d/inner", OLD)
    lives: list[Life] = []

    def begin(
        *, passthrough: bool = False, settings: MountSettings | None = None,
        durability: Durability = Durability.CLOSE,
    ) -> Life:  # fmt: skip
        mounted = Mounted(place, resumed=bool(lives), ttl=60)
        tier = MemoryTier(name="mem:/x")
        reader = Reader([place.bucket], tier, ReadingSettings(), clock=place.clock)
        registrar = Registrar()
        files = WritableFileSystem(
            mounted.overlay, reader, settings or MountSettings(uid=12, gid=34), clock=place.clock,
            tiers={"mem:/x": tier}, backings=Backings(registrar) if passthrough else None, life=len(lives),
            durability=durability,
        )  # fmt: skip
        lives.append(Life(files, mounted, registrar, [files.close, reader.close, mounted.close]))
        return lives[-1]

    yield begin
    for life in lives:
        life.close()
    place.remove()


@pytest.fixture(params=[False, True], ids=["served", "passthrough"])
def it(request: pytest.FixtureRequest, begin: Maker) -> Life:
    return begin(passthrough=request.param)


def refused(call: Callable[..., object], *args: object, **more: object) -> int:
    with pytest.raises(Refused) as caught:
        call(*args, **more)
    return caught.value.errno


# ---- opening -------------------------------------------------------------------------------------


def test_what_is_told_of_a_file_that_was_made_is_believed_until_the_open_is_done(it: Life) -> None:
    """Else the kernel asks a second time before the same open(2) returns. Of one that was there it must."""
    flags = os.O_CREAT | os.O_WRONLY
    found, opened = it.files.create(ROOT, b"new", flags, 0o640, 1, 2)
    assert 0 < found.attr_timeout <= 0.1
    again, other = it.files.create(ROOT, b"new", flags, 0o640, 1, 2)
    assert again.attr_timeout == 0.0
    assert it.files.lookup(ROOT, b"new").attr_timeout == 0.0
    it.files.release(opened.handle)
    it.files.release(other.handle)


def test_a_new_file_is_written_and_read(it: Life) -> None:
    """Its size and time are as they are now, and are not to be believed for any time."""
    node, opened = it.make("new", b"first ", mode=0o640)
    assert opened.flush
    for i in range(3):
        it.files.write(opened.handle, 6 + 5 * i, b"more ", node=node)
        found = it.files.getattr(node)
        assert (found.size, found.attr_timeout) == (11 + 5 * i, 0.0)
        assert it.content("new").endswith(b"more ")
    assert stat.S_IMODE(found.mode) == 0o640
    assert (found.uid, found.gid) == (1, 2)
    assert it.writers == {nodes.path(node): 1}
    it.files.release(opened.handle)
    assert not it.writers
    assert it.content("new") == b"first more more more "


def test_a_clean_file_that_is_opened_for_writing_is_another_node(it: Life) -> None:
    """Once ESTALE, then it is open; who reads it goes on reading what was opened."""
    before = it.node("old")
    reader = it.files.open(before, RO)
    assert bytes(it.files.read(reader.handle, 0, 4, before)) == OLD[:4]
    with pytest.raises(Stale):
        it.files.open(before, RW)
    after = it.node("old")
    assert after != before
    assert nodes.path(after) == nodes.path(before)
    opened = it.files.open(after, RW)
    it.files.write(opened.handle, 0, b"WHAT", node=after)
    assert it.content("old") == b"WHAT" + OLD[4:]
    assert bytes(it.files.read(reader.handle, 0, 100, before)) == OLD
    assert it.files.getattr(before).size == len(OLD)
    it.files.release(reader.handle)
    it.files.release(opened.handle)


def test_whoever_writes_a_file_has_the_same_node(it: Life) -> None:
    """Two that were refused on the old one are told of one new one: pages and locks are a node's."""
    before = it.node("old")
    for _ in range(2):
        with pytest.raises(Stale):
            it.files.open(before, RW)
    after = it.node("old")
    first, second, third = (it.files.open(after, flags) for flags in (RW, WO | os.O_APPEND, RO))
    assert it.node("old") == after
    assert first.backing == second.backing == third.backing
    for opened in (first, second, third):
        it.files.release(opened.handle)


@pytest.mark.parametrize("flags", [RW, WO | os.O_APPEND, RO | os.O_TRUNC])
def test_who_was_refused_once_is_not_refused_again(it: Life, flags: int) -> None:
    """Of a second ESTALE in a row its caller would hear. Another writes the file meanwhile, and it would be
    uploaded; but that waits for who is to come, and who comes is counted once."""
    with pytest.raises(Stale):
        it.files.open(it.node("old"), flags, who=7)
    node, other = it.open("old", WO)
    it.files.write(other.handle, 0, b"WHAT", node=node)
    it.files.release(other.handle)
    it.mounted.pay()
    assert it.mounted.overlay.landed(nodes.path(node)), "nobody has come for it yet"
    opened = it.files.open(it.node("old"), flags, who=7)
    it.files.release(opened.handle)
    assert not it.writers
    it.mounted.drain()
    assert not it.mounted.overlay.landed(nodes.path(node))
    assert it.content("old") == (b"" if flags & os.O_TRUNC else b"WHAT" + OLD[4:])


def test_who_truncates_is_refused_once_only(it: Life) -> None:
    """The same of truncate(2)."""
    with pytest.raises(Stale):
        it.files.setattr(it.node("old"), size=3, who=7)
    it.write("old", b"another")
    it.mounted.pay()
    assert it.files.setattr(it.node("old"), size=3, who=7).size == 3
    assert not it.writers
    it.mounted.drain()
    assert it.content("old") == b"ano"


def test_a_newer_version_is_landed_at_once(it: Life) -> None:
    """Who wants to write to a version that somebody else has replaced in the bucket is refused for that, and
    for being a writer, in one."""
    before = it.node("old")
    it.mounted.place.bucket.put("old", b"theirs")
    it.mounted.place.clock.advance(61)
    with pytest.raises(Stale):
        it.files.open(before, RW)
    opened = it.files.open(it.node("old"), RW)
    assert it.content("old") == b"theirs"
    it.files.release(opened.handle)


@pytest.mark.parametrize("flags", [RO, RW, WO | os.O_TRUNC])
def test_what_another_file_has_taken_the_place_of_is_looked_up_again(it: Life, flags: int) -> None:
    """Who opens a name in the moment in which another file is renamed to it finds that one: never ENOENT."""
    before = it.node("old")
    it.make("new", b"new")
    it.files.rename(ROOT, b"new", ROOT, b"old")
    for call in (
        lambda: it.files.open(before, flags),
        lambda: it.files.setattr(before, size=0),
        lambda: it.files.setattr(before, mode=0o600),
        lambda: it.files.setattr(before, mtime_ns=1),
    ):
        assert it.files.failed("open", _raised(call)) == errno.ESTALE
    assert it.content("old") == b"new"


def test_truncation_at_open(it: Life) -> None:
    """Of a clean file no byte is brought; of a landed one none is kept; whatever the mode."""
    it.write("old", b"short")
    assert it.content("old") == b"short"
    node, opened = it.open("old", RO | os.O_TRUNC)
    assert it.attributes("old").size == 0
    assert not opened.flush
    assert refused(it.files.write, opened.handle, 0, b"x", node=node) == errno.EBADF
    it.files.release(opened.handle)


def test_truncation_of_what_nobody_has_open(it: Life) -> None:
    """truncate(2) is told ESTALE, too, and comes again."""
    node = it.node("d/inner")
    with pytest.raises(Stale):
        it.files.setattr(node, size=4)
    node = it.node("d/inner")
    assert it.files.setattr(node, size=4).size == 4
    assert it.content("d/inner") == OLD[:4]
    assert it.files.setattr(node, size=6).size == 6
    assert it.content("d/inner") == OLD[:4] + bytes(2)
    assert not it.writers
    with pytest.raises(Stale):
        it.files.setattr(it.node("old"), size=0)
    it.files.setattr(it.node("old"), size=0)
    assert it.content("old") == b""
    assert it.files.failed("setattr", _raised(it.files.setattr, it.node("d"), size=0)) == errno.EISDIR


def _raised(call: Callable[..., object], *args: object, **more: object) -> Exception:
    with pytest.raises(Exception) as caught:
        call(*args, **more)
    return caught.value


def test_an_open_file_is_truncated_by_its_handle(it: Life) -> None:
    """ftruncate(2), as long as it may write."""
    node, opened = it.make("new", b"123456")
    reader = it.files.open(node, RO)
    assert it.files.setattr(node, handle=opened.handle, size=3).size == 3
    assert refused(it.files.setattr, node, handle=reader.handle, size=1) == errno.EBADF
    for one in (opened, reader):
        it.files.release(one.handle)


def test_creation_of_what_is_there(it: Life) -> None:
    """O_EXCL is refused; else it is opened, a clean file without ESTALE: the answer has the new node."""
    with pytest.raises(PathExists):
        it.files.create(ROOT, b"old", RW | os.O_CREAT | os.O_EXCL, 0o644, 0, 0)
    found, opened = it.files.create(ROOT, b"old", WO | os.O_CREAT | os.O_TRUNC, 0o644, 0, 0)
    assert found.node == it.node("old")
    assert found.size == 0
    it.files.write(opened.handle, 0, b"new", node=found.node)
    it.files.release(opened.handle)
    assert it.content("old") == b"new"
    assert refused(it.files.create, ROOT, b"d", RW | os.O_CREAT, 0o644, 0, 0) == errno.EISDIR
    it.files.symlink(ROOT, b"link", b"old", 0, 0)
    assert refused(it.files.create, ROOT, b"link", RW | os.O_CREAT, 0o644, 0, 0) == errno.ELOOP


def test_what_is_created_to_be_read_is_not_open_for_writing(it: Life) -> None:
    """It is due at once, as what mknod makes."""
    found, opened = it.files.create(ROOT, b"new", RO | os.O_CREAT, 0o644, 0, 0)
    assert not it.writers
    assert not opened.flush
    it.files.release(opened.handle)
    it.files.mknod(ROOT, b"made", stat.S_IFREG | 0o600, 0, 0)
    assert stat.S_IMODE(it.attributes("made").mode) == 0o600
    it.mounted.drain()
    assert it.mounted.in_bucket("new") is not None
    assert it.mounted.in_bucket("made") is not None
    assert refused(it.files.mknod, ROOT, b"pipe", stat.S_IFIFO | 0o600, 0, 0) == errno.EPERM
    assert found.node == it.node("new")


def test_a_directory_is_not_written(it: Life) -> None:
    """EISDIR."""
    assert it.files.failed("open", _raised(it.files.open, it.node("d"), RW)) == errno.EISDIR


# ---- passthrough ---------------------------------------------------------------------------------


def test_a_landing_file_is_registered_for_reading_only(begin: Maker) -> None:
    """Whoever opens it first: what is registered stays open, and an upload waits until nobody can write."""
    it = begin(passthrough=True)
    node, opened = it.make("new", b"data")
    reader = it.files.open(node, RO)
    assert opened.backing == reader.backing != 0
    assert it.registrar.modes == {opened.backing: os.O_RDONLY}
    it.files.release(opened.handle)
    assert it.registrar.known == {opened.backing}
    it.mounted.drain()
    assert not it.mounted.overlay.landed(nodes.path(node)), "a reader has kept it from the bucket"
    it.files.release(reader.handle)
    assert not it.registrar.known


def test_who_opens_an_uploaded_file_joins_those_who_have_it_open(begin: Maker) -> None:
    """The kernel knows one file for each node, though the name of the landing file is gone."""
    it = begin(passthrough=True)
    node, opened = it.make("new", b"data")
    reader = it.files.open(node, RO)
    it.files.release(opened.handle)
    it.mounted.drain()
    assert it.node("new") == node, "the bytes are the same: so is the node"
    assert it.files.open(node, RO).backing == reader.backing
    assert bytes(it.files.read(reader.handle, 0, 10, node)) == b"data"


def test_a_file_that_is_served_stays_so_while_it_is_written(begin: Maker) -> None:
    """Its pages are those of one node."""
    it = begin(passthrough=True)
    it.registrar.open = lambda descriptor: _too_many()  # type: ignore[method-assign]
    node, served = it.make("new", b"data")
    assert (served.backing, served.keep) == (0, False)
    del it.registrar.open
    again = it.files.open(node, RW)
    assert again.backing == 0
    assert not it.registrar.known
    for one in (served, again):
        it.files.release(one.handle)
    passed = it.files.open(it.node("new"), RW)
    assert passed.backing
    it.files.release(passed.handle)


def _too_many() -> int:
    raise OSError(errno.EMFILE, "too many")


# ---- names ---------------------------------------------------------------------------------------


def test_names_come_and_go(it: Life) -> None:
    """mkdir, rename, unlink, rmdir, and what they refuse."""
    made = it.files.mkdir(ROOT, b"dir", 0o750, 5, 6)
    assert stat.S_ISDIR(made.mode)
    assert (stat.S_IMODE(made.mode), made.uid, made.gid) == (0o750, 5, 6)
    it.files.rename(ROOT, b"old", made.node, b"moved")
    assert it.names() == ["d", "dir"]
    assert it.content("dir/moved") == OLD
    failures = [
        (errno.ENOTEMPTY, it.files.rmdir, ROOT, b"dir"),
        (errno.EEXIST, it.files.mkdir, ROOT, b"dir", 0o755, 0, 0),
        (errno.EISDIR, it.files.unlink, ROOT, b"dir"),
        (errno.ENOTDIR, it.files.rmdir, made.node, b"moved"),
        (errno.ENOENT, it.files.unlink, ROOT, b"old"),
        (errno.EEXIST, it.files.rename, made.node, b"moved", ROOT, b"d", 1),
        (errno.EINVAL, it.files.rename, made.node, b"moved", ROOT, b"d", 2),
        (errno.EISDIR, it.files.rename, made.node, b"moved", ROOT, b"d"),
        (errno.ENAMETOOLONG, it.files.mkdir, ROOT, b"x" * 256, 0o755, 0, 0),
    ]
    for number, call, *args in failures:
        assert it.files.failed("x", _raised(call, *args)) == number
    it.files.unlink(made.node, b"moved")
    it.files.rmdir(ROOT, b"dir")
    assert it.names() == ["d"]


def test_an_unlinked_file_that_is_open_has_no_link(it: Life) -> None:
    """It is read, written and measured on; then it is gone, and its name is another's at once."""
    node, opened = it.make("new", b"data")
    it.files.unlink(ROOT, b"new")
    assert it.files.lookup(ROOT, b"new").node == 0
    it.files.write(opened.handle, 4, b" more", node=node)
    found = it.files.getattr(node)
    assert (found.size, found.nlink) == (9, 0)
    assert bytes(it.files.read(opened.handle, 0, 100, node)) == b"data more"
    other, another = it.make("new", b"x")
    assert nodes.path(other) != nodes.path(node)
    assert it.attributes("new").nlink == 1
    it.files.release(opened.handle)
    it.files.release(another.handle)
    assert it.content("new") == b"x"


def test_listings_show_no_names_that_are_gone(it: Life) -> None:
    """A page that was taken before is not served from after a change: the kernel would believe it."""
    for i in range(5):
        it.files.mknod(ROOT, b"%d" % i, stat.S_IFREG, 0, 0)
    handle = it.files.opendir(ROOT)
    first = next(iter(it.files.readdir(handle, 0)))
    assert it.files.readdir_nowait(handle, first.offset) is not None
    it.files.unlink(ROOT, b"3")
    assert it.files.readdir_nowait(handle, first.offset) is None
    assert b"3" not in [one.name for one in it.files.readdir(handle, first.offset)]


def test_listings_show_written_files_as_they_are_now(it: Life) -> None:
    """Not as they were when the page was taken: a size that is too small costs pages that were written."""
    node, opened = it.make("new", b"data")
    handle = it.files.opendir(ROOT)
    list(it.files.readdir(handle, 0))
    it.files.write(opened.handle, 4, b" and more", node=node)
    listed = it.files.readdir_nowait(handle, 1)
    assert listed is not None
    sizes = {one.name: one.attributes for one in listed}
    assert (sizes[b"new"].size, sizes[b"new"].attr_timeout) == (13, 0.0)
    assert sizes[b"new"].node == node
    it.files.release(opened.handle)


def test_links(it: Life) -> None:
    """They say where they lead."""
    found = it.files.symlink(ROOT, b"link", b"d/inner", 1, 2)
    assert stat.S_ISLNK(found.mode)
    assert found.size == 7
    assert it.files.readlink(found.node) == b"d/inner"
    assert refused(it.files.readlink, it.node("old")) == errno.EINVAL


# ---- attributes ----------------------------------------------------------------------------------


def test_attributes_of_clean_and_written_files(it: Life) -> None:
    """chmod, chown, utimes; none of them makes another version."""
    it.make("new")
    for name in ("old", "new", "d"):
        node = it.node(name)
        it.files.setattr(node, mode=0o100600, uid=7)
        found = it.files.setattr(node, gid=8, mtime_ns=5)
        assert it.node(name) == node
        assert (stat.S_IMODE(found.mode), found.uid, found.gid, found.mtime_ns) == (0o600, 7, 8, 5)


def test_whoever_mounts_read_write_can_write(begin: Maker) -> None:
    """Unless modes are chosen."""
    it = begin()
    assert stat.S_IMODE(it.attributes("old").mode) == 0o644
    assert stat.S_IMODE(it.attributes("d").mode) == 0o755
    it.close()
    it = begin(settings=MountSettings(file_mode=0o400, dir_mode=0o500))
    assert stat.S_IMODE(it.attributes("old").mode) == 0o400
    assert stat.S_IMODE(it.attributes("d").mode) == 0o500


def test_suid_and_sgid_are_dropped(it: Life) -> None:
    """By chown; by writes, truncations and opens of those who may not keep them."""
    node, opened = it.make("new", b"data")

    def after(change: Callable[[], object]) -> int:
        it.files.setattr(node, mode=0o6755)
        change()
        return stat.S_IMODE(it.files.getattr(node).mode)

    assert after(lambda: None) == 0o6755
    assert after(lambda: it.files.setattr(node, uid=3)) == 0o755
    assert after(lambda: it.files.setattr(node, size=1, kill=True)) == 0o755
    assert after(lambda: it.files.write(opened.handle, 0, b"x", node=node, kill=True)) == 0o755
    assert after(lambda: it.files.write(opened.handle, 0, b"x", node=node)) == 0o6755
    again: list[Opened] = []
    assert after(lambda: again.append(it.files.open(node, WO | os.O_TRUNC, kill=True))) == 0o755
    it.files.setattr(node, mode=0o2644)  # sgid without execution means something else
    it.files.setattr(node, gid=3)
    assert stat.S_IMODE(it.files.getattr(node).mode) == 0o2644
    for one in (opened, *again):
        it.files.release(one.handle)


def test_a_directory_with_sgid_gives_its_group_on(it: Life) -> None:
    """To files, and to directories with the bit."""
    above = it.files.mkdir(ROOT, b"dir", 0o775, 1, 77)
    it.files.setattr(above.node, mode=0o2775)
    below = it.files.mkdir(above.node, b"below", 0o755, 1, 2)
    assert (below.gid, stat.S_IMODE(below.mode)) == (77, 0o2755)
    found, opened = it.files.create(above.node, b"file", RW, 0o644, 1, 2)
    assert found.gid == 77
    it.files.release(opened.handle)


def test_extended_attributes(begin: Maker) -> None:
    """`user.*` are kept; ours can be read where they are shown; of others there is none."""
    it = begin(settings=MountSettings(xattr=True))
    for name in ("old", "d"):
        node = it.node(name)
        it.files.setxattr(node, b"user.one", b"1", 0)
        assert it.files.getxattr(node, b"user.one") == b"1"
        assert b"user.one" in it.files.listxattr(node)
        assert it.files.failed("x", _raised(it.files.setxattr, node, b"user.one", b"", 1)) == errno.EEXIST
        assert refused(it.files.setxattr, node, b"user.two", b"", 2) == errno.ENODATA
        it.files.removexattr(node, b"user.one")
        assert refused(it.files.getxattr, node, b"user.one") == errno.ENODATA
        assert refused(it.files.removexattr, node, b"user.one") == errno.ENODATA
        assert refused(it.files.setxattr, node, b"security.capability", b"", 0) == errno.EOPNOTSUPP
        many = _raised(it.files.setxattr, node, b"user.many", b"x" * 65_536, 0)
        assert it.files.failed("x", many) == errno.ENOSPC
        assert not it.files.stats()["errors"], "it is no failure of the landing zone"
        assert refused(it.files.getxattr, node, b"security.capability") == errno.ENODATA
        assert refused(it.files.getxattr, node, b"system.posix_acl_access") == errno.EOPNOTSUPP
        assert refused(it.files.setxattr, node, b"user.datacache.uri", b"", 0) == errno.EPERM
    assert it.files.getxattr(it.node("old"), b"user.datacache.uri").endswith(b"/old")
    it.close()
    it = begin()
    assert refused(it.files.getxattr, it.node("old"), b"user.datacache.uri") == errno.ENODATA
    assert it.files.listxattr(it.node("old")) == []


def test_statfs_tells_what_can_be_written(it: Life) -> None:
    """The free space of the landing zone, beside what is there."""
    space, room = it.files.statfs(), it.mounted.overlay.room()
    assert 0 < space.free <= room.total
    assert space.total >= space.free
    assert space.free_files


def test_files_are_allocated(it: Life) -> None:
    """With and without a handle of ours; what the file system refuses is said."""
    node, opened = it.make("new", b"data")
    it.files.allocate(opened.handle, node, 0, 0, 8192)
    assert it.files.getattr(node).size == 8192
    it.files.allocate(77, node, 0, 0, 10_000)
    assert it.files.getattr(node).size == 10_000
    assert refused(it.files.allocate, opened.handle, node, 0, 0, 0) == errno.EINVAL
    it.files.release(opened.handle)


# ---- durability ----------------------------------------------------------------------------------


def test_what_is_flushed(begin: Maker) -> None:
    """A close waits for the disk under `durability: close`; fsync always does."""
    for durability, at_close in ((Durability.CLOSE, True), (Durability.FSYNC, False)):
        it = begin(durability=durability)
        synced: list[int] = []
        it.mounted.overlay.sync = synced.append  # type: ignore[method-assign]
        node, opened = it.make(durability.value)
        it.files.flush(opened.handle, node)
        assert bool(synced) is at_close
        synced.clear()
        it.files.fsync(node)
        assert synced == [nodes.path(node)]
        it.files.fsyncdir()
        it.files.release(opened.handle)
        it.close()


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.ENOSPC, LandingFull, errno.ENOSPC), (errno.EDQUOT, LandingFull, errno.ENOSPC),
        (errno.EFBIG, Refused, errno.EFBIG), (errno.EINVAL, Refused, errno.EINVAL),
        (errno.EIO, LandingBroken, errno.EIO), (errno.EROFS, LandingBroken, errno.EIO),
    ],
)  # fmt: skip
def test_what_a_disk_says(
    number: int, kind: type[Exception], told: int, it: Life, logs: AnnouncedLogs
) -> None:
    """A full disk is ENOSPC, a failing one EIO, and what is wrong with a request is said as it is."""
    logs.expect("write failed: the landing zone")
    said = _said(OSError(number, os.strerror(number)))
    assert isinstance(said, kind)
    assert it.files.failed("write", said) == told


def test_the_reserve_holds_for_whoever_begins_to_write(it: Life) -> None:
    """`--landing-reserve` of its file system is left free. Who is at it goes on; who empties or removes
    a file makes room."""
    node, opened = it.make("new", b"x")
    it.mounted.landing.room = lambda: Room(100, 0, 4)  # type: ignore[method-assign]
    with pytest.raises(LandingFull):
        it.make("more")
    with pytest.raises(LandingFull):
        it.open("new", RW)
    assert it.content("new") == b"x"
    assert it.files.write(opened.handle, 1, b"y", node=node) == 1
    it.files.release(opened.handle)
    it.files.release(it.open("new", RW | os.O_TRUNC)[1].handle)
    it.files.unlink(ROOT, b"new")
    assert it.names() == ["d", "old"]


def test_what_is_refused_has_the_errno_that_programs_know(it: Life) -> None:
    """`mv` copies on EXDEV; nothing of this is logged."""
    for error, number in ((NotHere, errno.EPERM), (OtherStore, errno.EXDEV), (NotEmpty, errno.ENOTEMPTY)):
        assert it.files.failed("x", error("because")) == number


# ---- other lives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("passthrough", [False, True])
def test_handles_of_an_earlier_daemon_work_by_their_node(begin: Maker, passthrough: bool) -> None:
    """READ, WRITE, FLUSH, FSYNC, ftruncate, fallocate; and after RELEASE the file is due."""
    first = begin(passthrough=passthrough)
    node, opened = first.make("new", b"data")
    first.files.leave()
    first.close()
    assert not list(first.mounted.cache.entries())
    it = begin(passthrough=passthrough)
    handle = opened.handle
    assert it.writers == {nodes.path(node): 1}, "it is not closed"
    assert not it.files.knows(handle)
    assert bytes(it.files.read(handle, 0, 10, node)) == b"data"
    assert it.files.write(handle, 4, b" more", node=node) == 5
    assert bytes(it.files.read(handle, 0, 10, node)) == b"data more"
    it.files.flush(handle, node)
    it.files.fsync(node)
    assert it.files.setattr(node, handle=handle, size=6).size == 6
    it.files.allocate(handle, node, 0, 0, 7)
    assert it.files.getattr(node).size == 7
    assert refused(it.files.write, handle, 0, b"x", node=it.node("old")) == errno.EBADF
    assert it.content("new") == b"data m\0"
    reading = it.files.open(it.node("new"), RO)
    if not passthrough:
        assert it.writers == {nodes.path(node): 1}, "writing by the node is not another writer"
    it.files.released(handle, node, WO)
    if not passthrough:
        assert not it.writers, "who only reads does not count"
        it.mounted.drain()
        assert it.mounted.in_bucket("new") is not None
    it.files.release(reading.handle)


def test_a_node_of_an_earlier_daemon_is_not_opened_where_the_kernel_writes(begin: Maker) -> None:
    """How it is open is not known: the name has another node now, once."""
    first = begin(passthrough=True)
    node, _ = first.make("new", b"data")
    first.files.leave()
    first.close()
    it = begin(passthrough=True)
    with pytest.raises(Stale):
        it.files.open(node, RW)
    again, opened = it.open("new", RW)
    assert again != node
    it.files.release(opened.handle)


def test_what_was_done_before_is_no_error(it: Life) -> None:
    """A request that comes again: the daemon that did it died before it answered."""
    it.files.mkdir(ROOT, b"dir", 0o755, 1, 2)
    assert it.files.mkdir(ROOT, b"dir", 0o755, 1, 2, again=True).node == it.node("dir")
    it.files.symlink(ROOT, b"link", b"x", 1, 2)
    assert it.files.symlink(ROOT, b"link", b"x", 1, 2, again=True).node == it.node("link")
    it.files.mknod(ROOT, b"made", stat.S_IFREG, 1, 2)
    assert it.files.mknod(ROOT, b"made", stat.S_IFREG, 1, 2, again=True).node == it.node("made")
    found, opened = it.files.create(ROOT, b"made", RW | os.O_EXCL, 0o644, 1, 2, again=True)
    assert found.node == it.node("made")
    it.files.release(opened.handle)
    it.files.rename(ROOT, b"made", ROOT, b"renamed")
    it.files.rename(ROOT, b"made", ROOT, b"renamed", again=True)
    it.files.unlink(ROOT, b"renamed")
    it.files.unlink(ROOT, b"renamed", again=True)
    it.files.rmdir(ROOT, b"dir")
    it.files.rmdir(ROOT, b"dir", again=True)
    assert it.names() == ["d", "link", "old"]


@pytest.mark.parametrize("uploaded", [True, False])
def test_a_rename_that_was_done_before_is_no_error(begin: Maker, uploaded: bool) -> None:
    """The daemon that did it died before it answered, and the bucket may have it by now. A name that never
    was is one."""
    first = begin()
    first.files.mkdir(ROOT, b"dir", 0o755, 1, 2)
    _, opened = first.make("new", b"data")
    first.files.release(opened.handle)
    first.files.rename(ROOT, b"new", first.node("dir"), b"renamed")
    if uploaded:
        first.mounted.drain()
    first.files.leave()
    first.close()
    it = begin()
    it.files.rename(ROOT, b"new", it.node("dir"), b"renamed", again=True)
    assert it.content("dir/renamed") == b"data"
    with pytest.raises(NoSuchPath):
        it.files.rename(ROOT, b"never", it.node("dir"), b"other", again=True)


@pytest.mark.parametrize("owed", ["a clean file", "a copy"])
def test_a_refused_open_that_would_have_emptied_a_file_leaves_it_as_it_was(it: Life, owed: str) -> None:
    """Its caller was told an error, and nobody comes again: here, and in the bucket."""
    if owed == "a copy":
        it.files.rename(ROOT, b"old", ROOT, b"new")
    name = "new" if owed == "a copy" else "old"
    wanted = it.content(name)
    assert wanted
    with pytest.raises(Stale):
        it.files.open(it.node(name), os.O_WRONLY | os.O_TRUNC)
    it.mounted.place.clock.advance(PATIENCE + 1)
    it.mounted.overlay.awaited.look()
    assert it.content(name) == wanted
    it.mounted.drain()
    assert it.content(name) == wanted
    stored = it.mounted.in_bucket(name)
    assert stored is not None and stored.size == len(wanted)


def test_a_daemon_that_dies_after_such_a_refusal_leaves_it_as_it_was(begin: Maker) -> None:
    """Of a file that is only here, and of one that was landed to be emptied: the next daemon refuses nodes of
    the one before."""
    first = begin(passthrough=True)
    _, opened = first.make("dirty")
    first.files.write(opened.handle, 0, b"the only copy")
    first.files.release(opened.handle)
    wanted = first.content("old")
    with pytest.raises(Stale):
        first.files.open(first.node("old"), os.O_WRONLY | os.O_TRUNC)
    known = {name: first.node(name) for name in ("dirty", "old")}
    first.mounted.overlay.awaited._closed = lambda ino, file: file.close()  # as the kernel does
    first.close()
    it = begin(passthrough=True)
    for node in known.values():
        with pytest.raises(Stale):
            it.files.open(node, os.O_WRONLY | os.O_TRUNC)
    it.mounted.place.clock.advance(PATIENCE + 1)
    it.mounted.overlay.awaited.look()
    it.mounted.drain()
    assert (it.content("dirty"), it.content("old")) == (b"the only copy", wanted)
    assert not it.mounted.settling.ops()


def test_who_comes_again_to_append_finds_the_bytes(it: Life) -> None:
    """A program that is told ESTALE may try in another way."""
    with pytest.raises(Stale):
        it.files.open(it.node("old"), os.O_WRONLY | os.O_TRUNC)
    wanted = OLD + b", and more"
    node, opened = it.open("old", os.O_WRONLY | os.O_APPEND)
    it.files.write(opened.handle, len(OLD), b", and more", node=node)
    it.files.release(opened.handle)
    assert it.content("old") == wanted


def test_an_open_that_is_sent_again_is_counted_once(begin: Maker) -> None:
    """The daemon before counted the writer, and died before it answered: nothing closes that one."""
    first = begin(passthrough=False)
    _, opened = first.make("f")
    first.files.release(opened.handle)
    first.files.open(first.node("f"), os.O_RDWR)
    first.files.leave()
    first.close()
    it = begin(passthrough=False)
    again = it.files.open(it.node("f"), os.O_RDWR, again=True)
    it.files.release(again.handle)
    assert not it.writers
    it.mounted.drain()
    assert it.mounted.in_bucket("f") is not None


def killed(life: Life) -> None:
    """kill -9: what it had open the kernel closes, and nothing is put in order."""
    life.mounted.overlay.awaited._closed = lambda ino, file: file.close()
    life.mounted.overlay.awaited.give_up()
    life.files._left = True
    life.close()


@pytest.mark.parametrize("comes", [True, False])
@pytest.mark.parametrize("dirty", [True, False])
def test_who_was_told_to_come_again_is_not_a_writer_for_the_next_daemon(
    begin: Maker, *, comes: bool, dirty: bool
) -> None:
    """The daemon that refused it was killed. Whether it comes again or was killed, too: when nobody has the
    file open, it is nobody's but the bucket's."""
    first = begin(passthrough=False)
    if dirty:
        before = first.node("old")
        first.write("old", OLD)
    else:
        before = first.node("old")
    with pytest.raises(Stale):
        first.files.open(before, RW, who=7)
    killed(first)
    it = begin(passthrough=False)
    assert not it.writers
    if comes:
        node, opened = it.open("old")
        it.files.write(opened.handle, 0, b"WHAT", node=node)
        it.mounted.pay()
        assert it.mounted.overlay.landed(nodes.path(node)), "it has it open"
        it.files.release(opened.handle)
    it.mounted.drain()
    assert not it.mounted.settling.ops()
    assert not it.mounted.overlay.landed(nodes.path(it.node("old")))
    assert it.content("old") == (b"WHAT" + OLD[4:] if comes else OLD)


def test_who_comes_again_is_a_writer_for_the_next_daemon(begin: Maker) -> None:
    """It has the file open while its daemon is killed: the file is not uploaded before it closes it."""
    first = begin(passthrough=False)
    with pytest.raises(Stale):
        first.files.open(first.node("old"), RW, who=7)
    node = first.node("old")
    opened = first.files.open(node, RW, who=7)
    first.files.write(opened.handle, 0, b"WHAT", node=node)
    killed(first)
    it = begin(passthrough=False)
    assert list(it.writers.values()) == [1]
    it.mounted.pay()
    assert it.mounted.overlay.landed(nodes.path(node))
    it.files.released(opened.handle, node, RW)
    assert not it.writers
    it.mounted.drain()
    assert it.content("old") == b"WHAT" + OLD[4:]
    assert not it.mounted.overlay.landed(nodes.path(it.node("old")))


@pytest.mark.parametrize("flags", [RW, RO, None], ids=["to write", "to read", "mknod"])
@pytest.mark.parametrize("opened", [True, False])
def test_a_file_that_is_made_again_is_counted_once(begin: Maker, flags: int | None, *, opened: bool) -> None:
    """The daemon before made it, and died before it answered, with the file open or not yet."""
    first = begin(passthrough=False)
    entry = first.mounted.overlay.create(ROOT, b"f", mode=0o644, uid=1, gid=2)
    if opened:
        first.mounted.overlay.open(entry.ino, writing=True).close()
    killed(first)
    it = begin(passthrough=False)
    if flags is None:
        it.files.mknod(ROOT, b"f", 0o644, 1, 2, again=True)
    else:
        _, made = it.files.create(ROOT, b"f", flags | os.O_CREAT, 0o644, 1, 2, again=True)
        assert len(it.writers) == (flags != RO)
        it.files.release(made.handle)
    assert not it.writers
    it.mounted.drain()
    assert it.mounted.in_bucket("f") is not None


@pytest.mark.parametrize("uploaded", [False, True])
def test_an_open_that_empties_a_file_and_writes_nothing_leaves_it_empty(it: Life, uploaded: bool) -> None:
    """The second one, after the refusal: it is no change that could be taken back."""
    _, opened = it.open("old", os.O_WRONLY | os.O_TRUNC)
    it.files.release(opened.handle)
    if uploaded:
        it.mounted.drain()
    assert it.content("old") == b""


def test_who_never_comes_back_leaves_nothing_behind(it: Life) -> None:
    """A file that was landed for an open which did not come is clean again after a while."""
    with pytest.raises(Stale):
        it.files.open(it.node("old"), RW)
    ino = nodes.path(it.node("old"))
    assert it.mounted.overlay.landed(ino)
    it.mounted.place.clock.advance(PATIENCE + 1)
    it.mounted.overlay.awaited.look()
    assert not it.mounted.overlay.landed(ino)
    assert not it.mounted.settling.ops()
    assert it.content("old") == OLD


def test_a_flush_waits_for_who_is_just_closing(it: Life) -> None:
    """close(2) returns before the kernel tells of the last one: who asks then for all to be in the bucket
    means that file, too. A duplicate of the descriptor that goes on is not waited for for long."""
    clock, closes = it.mounted.place.clock, it.mounted.overlay.closes

    def waited() -> float:
        before = clock.monotonic()
        closes.wait()
        return clock.monotonic() - before

    node, opened = it.make("new", b"data")
    reader = it.files.open(node, RO)
    assert waited() == 0
    it.files.flush(opened.handle, node)
    assert waited() == SOON, "until it has come, or for as long as that may take"
    assert waited() == 0, "it was a duplicate"
    it.files.flush(opened.handle, node)
    clock.advance(SOON / 4)
    assert waited() == SOON * 3 / 4
    it.files.flush(opened.handle, node)
    it.files.release(opened.handle)
    it.files.flush(reader.handle, node)
    assert waited() == 0, "who only reads is not waited for"
    it.files.release(reader.handle)


def test_what_is_open_is_told(it: Life) -> None:
    """For `status`."""
    _, opened = it.make("new")
    assert it.files.stats()["open_for_writing"] == 1
    assert it.files.writes(opened.handle)
    it.files.release(opened.handle)
    assert it.files.stats()["open_for_writing"] == 0
    assert "WritableFileSystem 0 files open" in repr(it.files)
