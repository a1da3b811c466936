"""A directory as a source: nothing leads out of it, nothing in it hangs, versions are of files."""

import contextlib
import inspect
import os
import socket
import sys
from pathlib import Path

import pytest

from datacache.errors import NotFound, SourceError, Unavailable, VersionChanged
from datacache.model import ByteRange
from datacache.sources.local import LocalSource, own_mounts


def listed(source: LocalSource, prefix: str = "", *, recursive: bool = True) -> list[str]:
    pages = list(source.list(prefix, recursive=recursive))
    return [o.key for page in pages for o in page.objects] + [p for page in pages for p in page.prefixes]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A symbolic link is neither listed nor read, wherever it points, as a step or as the last name."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory in (root / "in", outside):
        directory.mkdir(parents=True)
        (directory / "file").write_text("data")
    (root / "up").symlink_to(outside)
    (root / "near").symlink_to("in")
    (root / "in" / "link").symlink_to(outside / "file")
    (root / "in" / "twin").symlink_to("file")
    source = LocalSource(str(root))
    assert listed(source) == ["in/file"]
    assert listed(source, recursive=False) == ["in/"]
    assert listed(source, "up/") == []
    info = source.stat("in/file")
    for key in ("up/file", "near/file", "in/link", "in/twin", "../outside/file"):
        with pytest.raises(NotFound):
            source.stat(key)
        with pytest.raises(NotFound):
            source.read(info._replace(key=key), ByteRange(0, 1))


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    """Where the directory itself lies is the user's choice."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("data")
    (tmp_path / "link").symlink_to("real")
    assert listed(LocalSource(str(tmp_path / "link"))) == ["file"]


def test_what_lies_below_a_directory_is_reached_over_no_link(tmp_path: Path) -> None:
    """Who may write to a claim may put links there; where they lead is not for him to read."""
    top, outside = tmp_path / "claim", tmp_path / "outside"
    for directory in (top / "a" / "b", outside / "b"):
        directory.mkdir(parents=True)
        (directory / "file").write_text("data")
    (top / "up").symlink_to(outside)
    (top / "a" / "last").symlink_to(outside / "b")
    source = LocalSource(str(top), "a/b")
    assert listed(source) == ["file"] and source.uri == f"file://{top}/a/b"
    assert bytes(source.read(source.stat("file"), ByteRange(0, 4))) == b"data"
    for below in ("up/b", "a/last"):
        source = LocalSource(str(top), below)
        with pytest.raises(SourceError):
            listed(source)
        with pytest.raises(SourceError):
            source.stat("file")
    assert listed(LocalSource(str(top))) == ["a/b/file"]


def test_what_is_no_file_is_not_there(tmp_path: Path) -> None:
    """Pipes and sockets are not listed, and asking for one does not hang."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    here = Path.cwd()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        os.chdir(tmp_path)  # the path of a socket may be 107 bytes long
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    source = LocalSource(str(tmp_path))
    assert listed(source, recursive=False) == ["file", "empty/"]
    assert listed(source) == ["file"]
    info = source.stat("file")
    for key in ("pipe", "socket", "empty"):
        with pytest.raises(NotFound):
            source.read(info._replace(key=key), ByteRange(0, 1))


def test_a_file_that_is_rewritten_is_another_version(tmp_path: Path) -> None:
    """A file that is replaced, rewritten in place or cut is refused to who asks for the old one."""
    path = tmp_path / "file"
    source = LocalSource(str(tmp_path))

    def replaced() -> None:
        (tmp_path / "new").write_bytes(b"B" * 10)
        os.utime(tmp_path / "new", ns=(5, 5))
        os.replace(tmp_path / "new", path)

    def rewritten() -> None:
        path.write_bytes(b"B" * 10)
        os.utime(path, ns=(6, 6))

    for change in (replaced, rewritten, lambda: os.truncate(path, 9)):
        path.write_bytes(b"A" * 10)
        os.utime(path, ns=(5, 5))
        old = source.stat("file")
        change()
        with pytest.raises(VersionChanged, match="not stamp:10-5-"):
            source.read(old, ByteRange(0, 10))


def test_a_missing_root_says_so(tmp_path: Path) -> None:
    """A directory that does not exist, or is a file, is not an empty one."""
    (tmp_path / "file").write_text("x")
    for name in ("nothing", "file"):
        source = LocalSource(str(tmp_path / name))
        with pytest.raises(NotFound, match="the directory itself"):
            listed(source)
        with pytest.raises(NotFound):
            source.stat("x")


def test_a_directory_that_goes_away_is_empty(tmp_path: Path) -> None:
    """What is removed under a listing is left out of it; the rest is listed."""
    for name in ("a/1", "b/2", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    source = LocalSource(str(tmp_path))
    entries = source._walk(b"", frozenset(), recursive=True)
    first = next(entries)
    (tmp_path / "b" / "2").unlink()
    (tmp_path / "b").rmdir()
    assert [getattr(item, "key", item) for item in (first, *entries)] == ["a/1", "c"]


def test_a_tree_deeper_than_the_stack(tmp_path: Path) -> None:
    """Directories may lie deeper in each other than Python functions may."""
    (tmp_path / "/".join("d" * 200)).mkdir(parents=True)
    (tmp_path / "/".join("d" * 200) / "f").write_text("x")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        keys = listed(LocalSource(str(tmp_path)))
    finally:
        sys.setrecursionlimit(limit)
    assert keys == ["d/" * 200 + "f"]


def test_trouble_of_the_disk_may_pass(tmp_path: Path) -> None:
    """Errors that are neither "not there" nor "not allowed" are tried again by `steady`."""
    source = LocalSource(str(tmp_path))
    for number, kind in ((5, Unavailable), (116, Unavailable), (13, SourceError), (40, NotFound)):
        with pytest.raises(kind, match="'what'"), source._errors("what"):
            raise OSError(number, os.strerror(number))


def test_our_own_mounts_are_not_entered(tmp_path: Path) -> None:
    """A data set mounted below its own source is passed over, without a look into it."""
    for name in ("data/x", "mnt one/y", "other/z"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    place = str(tmp_path).encode()
    table = tmp_path / "mountinfo"
    table.write_bytes(
        b"22 1 0:5 / " + place + b"/mnt\\040one rw shared:1 - fuse.datacache s3://b/ rw\n"
        b"23 1 0:6 / " + place + b"/other rw - ext4 fuse.datacache-not rw\n"
        b"24 1 0:7 / /elsewhere rw - fuse.datacache s3://b rw\n"
    )
    assert own_mounts(place, str(table)) == {place + b"/mnt one"}
    assert own_mounts(place, str(tmp_path / "nothing")) == frozenset()
    source = LocalSource(str(tmp_path))
    avoid = own_mounts(place, str(table))
    found = [getattr(item, "key", item) for item in source._walk(b"", avoid, recursive=True)]
    assert found == ["data/x", "mountinfo", "other/z"]
