"""Entries in memory: bounded, by name and by inode alike."""

from datacache.index.remembered import Known, Remembered
from datacache.model import Entry, Kind, Version


def entry(ino: int, name: bytes, size: int = 0) -> Entry:
    return Entry(ino, 1, name, Kind.FILE, size, 0, 0, name.decode(), Version("e"))


def test_what_was_used_least_recently_goes_by_name_and_by_inode() -> None:
    """Neither way in holds more than the limit; a use by inode counts as a use."""
    held = Remembered(2)
    a, b, c = (Known(1, entry(i, name)) for i, name in ((2, b"a"), (3, b"b"), (4, b"c")))
    held.keep(1, b"a", a)
    held.keep(1, b"b", b)
    assert held.ino(2) is a
    held.keep(1, b"c", c)
    assert (held.name(1, b"a"), held.name(1, b"b"), held.name(1, b"c")) == (a, None, c)
    assert (held.ino(2), held.ino(3), held.ino(4)) == (a, None, c)
    assert "2 of 2" in repr(held)


def test_a_name_that_means_something_else_now() -> None:
    """What a name meant before is not found by its inode any more; names that do not exist are kept too."""
    held = Remembered(10)
    held.keep(1, b"a", Known(1, entry(2, b"a")))
    held.keep(1, b"a", Known(2, entry(3, b"a")))
    assert held.ino(2) is None
    assert held.ino(3) == held.name(1, b"a") == Known(2, entry(3, b"a"))
    held.keep(1, b"a", Known(3, None))
    assert held.ino(3) is None
    assert held.name(1, b"a") == Known(3, None)
    assert held.name(2, b"a") is None


def test_what_was_listed_is_remembered_within_the_limit() -> None:
    """Under both ways in; the end of a listing that is too long stays."""
    held = Remembered(2)
    listed = [entry(ino, b"%d" % ino) for ino in (2, 3, 4)]
    held.keep_listed(7, listed)
    assert held.ino(2) is None and held.name(1, b"2") is None
    assert [held.ino(3), held.name(1, b"4")] == [Known(7, listed[1]), Known(7, listed[2])]
