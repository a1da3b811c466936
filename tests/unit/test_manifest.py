"""Manifests: what a line may be, what is said of one that may not, and the catalogue that is made."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from datacache.clock import VirtualClock
from datacache.config.parsing import dump_settings, load_settings, read_settings
from datacache.config.settings import IndexSettings, SourceSettings
from datacache.errors import NotFound, SettingError, Unavailable
from datacache.index.index import Index
from datacache.index.manifest import Item, Manifest, read_manifest
from datacache.index.opening import open_index
from datacache.index.snapshot import SnapshotIndex, create_snapshot
from datacache.model import Dataset, MountPoint, Version
from datacache.sources.faulty import Fail, FaultySource
from datacache.sources.memory import MemorySource
from datacache.sources.opening import open_source
from datacache.sources.source import Source
from datacache.worker import opened_sources

URI = "s3://lists/train.jsonl"


def manifest(*lines: object) -> Manifest:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return read_manifest("\n".join(text).encode("utf-8", "surrogatepass"), uri=URI)


def test_lines_become_items() -> None:
    """URLs in quotes, objects, comments and blank lines, in the order of the file."""
    found = manifest(
        "# the training set",
        '"s3://b/x/y.jpg"',
        "",
        {"url": "gs://c/z%20 ?#z", "path": "v/z", "size": 12, "version": '"abc"'},
        {"url": "https://host:8080/a%20b/c", "size": 0, "etag": "0123"},
        {"url": "s3://b/k", "size": 5, "version": "v1.2"},
        {"url": "s3://b/l", "size": 5, "version_id": '"odd"'},
        {"url": "s3://b/m", "version": 'W/"weak"'},
        "   ",
        {"url": "file:///data/f"},
    )
    assert found.mounts == tuple(
        MountPoint(uri) for uri in ("s3://b", "gs://c", "https://host:8080", "file:///")
    )
    expected = [
        Item(2, 0, "x/y.jpg", "x/y.jpg", None, Version()),
        Item(4, 1, "z%20 ?#z", "v/z", 12, Version('"abc"')),
        Item(5, 2, "a b/c", "a b/c", 0, Version('"0123"')),
        Item(6, 0, "k", "k", 5, Version(version_id="v1.2")),
        Item(7, 0, "l", "l", 5, Version(version_id='"odd"')),
        Item(8, 0, "m", "m", None, Version('W/"weak"')),
        Item(10, 3, "data/f", "data/f", None, Version()),
    ]
    assert list(found.items) == expected == list(found.items)


def test_line_ends_and_byte_order_do_not_matter() -> None:
    """Windows line ends and a last line without one are fine."""
    found = read_manifest(b'"s3://b/x"\r\n"s3://b/y"', uri=URI)
    assert [item.key for item in found.items] == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("s3://b/x", "JSON"),
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ([], "a URL in quotes"),
        (7, "a URL in quotes"),
        ({}, '"url"'),
        ({"url": 7}, '"url"'),
        ({"url": "s3://b/x", "szie": 7}, "'szie' will not do; expected one of etag, path, size"),
        ('"b/x"', "URL of an object"),
        ('"s3://b"', "URL of an object"),
        ('"s3://b/"', "URL of an object"),
        ('"s3:///x"', "URL of an object"),
        ('"s3://b/x/"', "URL of an object"),
        ('"://b/x"', "URL of an object"),
        ('"file://host/x"', "file:///absolute/path"),
        ('"https://h/x?sig=1"', "without query"),
        ('"https://h/x#y"', "without query"),
        ('"s3://b/a//b"', "below the data set"),
        ('"s3://b/../b"', "below the data set"),
        ({"url": "s3://b/x", "path": "/etc/passwd"}, "below the data set"),
        ({"url": "s3://b/x", "path": "a/../../b"}, "below the data set"),
        ({"url": "s3://b/x", "path": "."}, "below the data set"),
        ({"url": "s3://b/x", "path": ""}, "below the data set"),
        ({"url": "s3://b/x", "path": "a/"}, "below the data set"),
        ({"url": "s3://b/x", "path": "a\0b"}, "below the data set"),
        ({"url": "s3://b/x", "path": "y" * 256}, "below the data set"),
        ({"url": "s3://b/x", "path": "\ud800"}, "below the data set"),
        ({"url": "s3://b/x", "path": 7}, "below the data set"),
        ({"url": "s3://b/x", "size": -1}, "number of bytes"),
        ({"url": "s3://b/x", "size": "7"}, "number of bytes"),
        ({"url": "s3://b/x", "size": True}, "number of bytes"),
        ({"url": "s3://b/x", "size": 2**63}, "number of bytes"),
        ({"url": "s3://b/x", "version": 7}, "as text"),
        ({"url": "s3://b/x", "version": ""}, "as text"),
        ({"url": "s3://b/x", "etag": '"a"', "version_id": "b", "size": 1}, "one of"),
        ({"url": "s3://b/x", "version_id": "b"}, '"size" beside a version id'),
    ],
)
def test_a_line_that_will_not_do(line: object, said: str) -> None:
    """The error names the manifest, the line, what was given and what would be right."""
    with pytest.raises(SettingError) as caught:
        manifest("# comment", '"s3://b/fine"', line)
    assert str(caught.value).startswith(f"{URI}, line 3: ")
    assert said in str(caught.value)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    """Secrets do not belong into a manifest, nor into an error."""
    with pytest.raises(SettingError, match="without a user or password") as caught:
        manifest('"https://me:hunter2@host/x"')
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SettingError) as caught:
        manifest('"https://host/x?X-Amz-Signature=hunter2"')
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['"s3://a/x"', '"s3://b/x"'], "line 2: 'x' will not do; expected another \"path\": line 1"),
        (['"s3://a/x"', {"url": "s3://a/y", "path": "x"}], "line 2: 'x'"),
        (['"s3://a/x"', '"s3://a/x/y"'], "line 2: 'x' will not do; expected a name that is either a file"),
        (['"s3://a/x/y/z"', '"s3://a/k"', '"s3://a/x/y"'], "line 3: 'x/y' will not do"),
    ],
)
def test_two_lines_that_cannot_both_be(lines: list[object], said: str) -> None:
    """One path is one object, and a file or a directory."""
    with pytest.raises(SettingError) as caught:
        manifest(*lines)
    assert said in str(caught.value)


def test_files_of_this_machine_can_be_listed(tmp_path: Path) -> None:
    """What a line names can be opened: the root of file:// URLs is a source as any other."""
    (tmp_path / "x").write_bytes(b"12345")
    found = manifest({"url": (tmp_path / "x").as_uri(), "path": "here"})
    (mount,), (item,) = found.mounts, found.items
    source = open_source(mount, settings=SourceSettings(), environment={}, clock=VirtualClock())
    assert source.stat(item.key).size == 5


def test_an_empty_manifest() -> None:
    """A list of nothing is an error, not an empty mount."""
    with pytest.raises(SettingError, match="at least one line"):
        manifest("# nothing", "")


# As an index


@pytest.fixture
def stores() -> tuple[FaultySource, MemorySource]:
    a = MemorySource("s3://a", {f"{i}.jpg": b"x" * i for i in range(200)})
    return FaultySource(a), MemorySource("s3://b", {"deep/er": b"22", "odd//": b"3"})


class Opened:
    def __init__(self, state: str) -> None:
        self.state = state
        self.indexes: list[Index] = []

    def __call__(self, found: Manifest, sources: tuple[Source, ...], snapshot: str = "") -> Index:
        dataset = Dataset("test", found.mounts, manifest=URI)
        settings = IndexSettings(snapshot=snapshot)
        index = open_index(dataset, sources, settings, state=self.state, clock=VirtualClock(), manifest=found)
        self.indexes.append(index)
        return index


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    opened = Opened(str(tmp_path))
    yield opened
    for index in opened.indexes:
        index.close()


LINES = (
    '"s3://a/7.jpg"',
    {"url": "s3://b/deep/er", "path": "seven/b"},
    {"url": "s3://a/8.jpg", "path": "seven/%file", "size": 8},
    {"url": "s3://b/odd//x", "path": "pinned", "size": 99, "version_id": "v7"},
    {"url": "s3://a/9.jpg", "path": "tagged", "size": 9, "version": '"0123"'},
)


def test_a_manifest_is_a_namespace(opened: Opened, stores: tuple[FaultySource, MemorySource]) -> None:
    """Objects of several stores share directories; paths are taken as they stand; sizes and versions that
    the lines do not say are asked for, once, and what they say is not."""
    a, b = stores
    index = opened(manifest(*LINES), stores)
    assert isinstance(index, SnapshotIndex)
    found = {path: (e.mount, e.key, e.size, e.version) for path, e in index.walk()}
    assert found == {
        "/7.jpg": (0, "7.jpg", 7, a.stat("7.jpg").version),
        "/seven/b": (1, "deep/er", 2, b.stat("deep/er").version),
        "/seven/%file": (0, "8.jpg", 8, a.stat("8.jpg").version),
        "/pinned": (1, "odd//x", 99, Version(version_id="v7")),
        "/tagged": (0, "9.jpg", 9, Version('"0123"')),
    }
    assert (a.calls["stat"], b.requests["stat"]) == (4, 2)  # two and one of them by this test
    assert (index.stats().files, index.stats().bytes) == (5, 125)
    assert index.resolve("/seven").mount == -1


def test_the_catalogue_of_a_manifest_is_kept(
    opened: Opened, stores: tuple[FaultySource, MemorySource]
) -> None:
    """The next start asks nothing; another list is another catalogue, and the old one goes."""
    first = opened(manifest(*LINES), stores)
    before = dict(first.walk())
    asked = stores[0].calls["stat"]
    assert dict(opened(manifest(*LINES), stores).walk()) == before
    assert stores[0].calls["stat"] == asked
    assert list(opened(manifest('"s3://a/1.jpg"', '"s3://b/deep/er"'), stores).walk()) != before
    assert stores[0].calls["stat"] == asked + 1
    assert len(os.listdir(os.path.join(opened.state, "manifests"))) == 2  # with the lock file
    assert dict(first.walk()) == before  # whoever has it open keeps it


def test_many_objects_are_asked_for(opened: Opened, stores: tuple[FaultySource, MemorySource]) -> None:
    """More objects than are asked for at once all get their own size."""
    index = opened(manifest(*(f'"s3://a/{i}.jpg"' for i in range(200))), stores[:1])
    assert {p: e.size for p, e in index.walk()} == {f"/{i}.jpg": i for i in range(200)}


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ('"s3://a/none"', NotFound, "line 1: "),
        ({"url": "s3://a/7.jpg", "size": 8}, SettingError, "has 7 bytes"),
        ({"url": "s3://a/7.jpg", "etag": '"other"'}, SettingError, "entity tag"),
    ],
)
def test_a_line_that_the_store_contradicts(
    opened: Opened,
    stores: tuple[FaultySource, MemorySource],
    line: object,
    error: type[Exception],
    said: str,
) -> None:
    """What is not there, or is not what the line says, is an error with the line's number."""
    with pytest.raises(error, match=said):
        opened(manifest(line), stores[:1])
    assert os.listdir(os.path.join(opened.state, "manifests")) == [".lock"]


def test_a_store_that_is_away_leaves_nothing(
    opened: Opened, stores: tuple[FaultySource, MemorySource]
) -> None:
    """A catalogue that could not be completed is not there; the next start makes it."""
    stores[0].add("stat", None, Fail(Unavailable("down")))
    lines = [f'"s3://a/{i}.jpg"' for i in range(100)]
    with pytest.raises(Unavailable):
        opened(manifest(*lines), stores[:1])
    assert os.listdir(os.path.join(opened.state, "manifests")) == [".lock"]
    assert len(list(opened(manifest(*lines), stores[:1]).walk())) == 100


def test_a_snapshot_of_a_manifest(opened: Opened, stores: tuple[FaultySource, MemorySource]) -> None:
    """A snapshot pins the list as it is now, under a name; the list may change afterwards."""
    found = manifest(*LINES)
    told: list[int] = []
    info = create_snapshot(
        Dataset("test", found.mounts, manifest=URI), stores, state=opened.state, name="s",
        clock=VirtualClock(), manifest=found, progress=told.append,
    )  # fmt: skip
    assert (info.files, told) == (5, [5])
    pinned = opened(manifest('"s3://a/1.jpg"', '"s3://b/deep/er"'), stores, snapshot="s")
    assert sorted(p for p, _ in pinned.walk()) == ["/7.jpg", "/pinned", "/seven/%file", "/seven/b", "/tagged"]


def test_a_manifest_that_was_not_read(tmp_path: Path) -> None:
    """To open a manifest's data set without the manifest is a mistake of the program."""
    dataset = Dataset("test", (MountPoint("s3://a"),), manifest=URI)
    with pytest.raises(ValueError, match="was not read"):
        open_index(
            dataset, [MemorySource("s3://a")], IndexSettings(), state=str(tmp_path), clock=VirtualClock()
        )


@pytest.mark.parametrize("url", ["file:///etc/hostname", "memory://a/b"])
def test_urls_that_the_manifest_may_not_have_are_refused(url: str, tmp_path: Path) -> None:
    """Who writes a manifest may not read the files of the machine on which it is read, where it says so."""
    (listed := tmp_path / "list").write_text(f'"https://host/a"\n"{url}"\n')
    flags = {"manifest": f"file://{listed}", "manifest_schemes": "s3,https"}
    settings = read_settings(flags, config_file=None, environment={"HOME": str(tmp_path)})
    assert load_settings(dump_settings(settings)).index.manifest_schemes == ("s3", "https")
    with (
        pytest.raises(SettingError, match="expected URLs of s3, https only"),
        opened_sources(settings, clock=VirtualClock()),
    ):
        pass
