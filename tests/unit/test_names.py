"""How keys are shown: the table of docs/names.md, and that no two keys meet."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.index.names import NAME_MAX, beside, original, shown, to_bytes, to_text

DOCS = Path(__file__).parents[2] / "docs" / "names.md"

# Each row of the table: what it says of the store, what it says is shown, and keys with their paths.
TABLE = [
    ("`a/b.jpg`", "`a/b.jpg`", {"a/b.jpg": "a/b.jpg"}),
    ("`a` beside `a/b`", "`a%file` beside `a/b`", {"a": "a%file", "a/b": "a/b"}),
    ("`a//b`", "`a/%empty/b`", {"a//b": "a/%empty/b"}),
    ("`/a`", "`%empty/a`", {"/a": "%empty/a"}),
    ("`./a`", "`%2E/a`", {"./a": "%2E/a"}),
    ("`../a`", "`%2E%2E/a`", {"../a": "%2E%2E/a"}),
    (r"`a\x00b`", "`a%00b`", {"a\x00b": "a%00b"}),
    ("`50%25.txt`", "`50%2525.txt`", {"50%25.txt": "50%2525.txt"}),
    ("`a%20b`", "`a%20b`", {"a%20b": "a%20b"}),
    ("`a%file`", "`a%25file`", {"a%file": "a%25file"}),
    ("`d/`, of no bytes", "the directory `d`", {}),  # quoted by the contract suite: it takes an index
    ("`d/`, with content", "`d/%empty`", {"d/": "d/%empty"}),
    (
        "a part of over 255 bytes",
        "its beginning, `%~`, 32 hex digits and its extension",
        {"x" * 300 + ".tar": "x" * 217 + "%~d1a922c2671f320b552f263f9c4af923.tar"},
    ),
    ("bytes that are not UTF-8", "the same bytes", {"caf\udce9.txt": "caf\udce9.txt"}),
    (
        "`é` as one character, and as `e` with an accent",
        "two names",
        {"\xe9": "\xe9", "e\u0301": "e\u0301"},
    ),
    ("`A` and `a`", "two names", {"A": "A", "a": "a"}),
]


def paths(keys: set[str]) -> dict[str, str]:
    """Where each key of a store is shown: the rule of the documentation, written once more."""
    directories = {key[:i] for key in keys for i, c in enumerate(key) if c == "/"}
    found = {}
    for key in keys:
        *above, last = key.split("/")
        name = beside(last) if key in directories else shown(last)
        found[key] = "/".join([*(to_text(shown(part)) for part in above), to_text(name)])
    return found


@pytest.mark.parametrize(("store", "name", "keys"), TABLE, ids=[row[0] for row in TABLE])
def test_table(store: str, name: str, keys: dict[str, str]) -> None:
    """Each row of the documented table is there, and is what happens."""
    assert f"| {store} | {name} |" in DOCS.read_text()
    assert paths(set(keys)) == keys


def test_the_table_has_no_row_that_is_not_tested() -> None:
    """A row that is added to the documentation is added here."""
    rows = re.findall(r"^\| (?!in the store)(.+?) \| .+? \| .+ \|$", DOCS.read_text(), re.M)
    assert rows == [row[0] for row in TABLE]


# What collisions would be made of: our own words, whole and in pieces, and what they are for.
PIECES = st.sampled_from(
    ["%", "00", "25", "2E", "empty", "file", "~", "%00", "%25", "%2E", "%empty", "%file", "%~", "\0", ".",
     "..", "a", "b" * 200, "b" * 245, "c" * 60, "é", "e\u0301", "\udce9", "\udcff", "€" * 85,
     "0123456789abcdef" * 2, ".jpg", ".j%g"]
)  # fmt: skip
SEGMENTS = st.lists(PIECES, max_size=5).map("".join) | st.text(max_size=4).filter(
    lambda s: "/" not in s and not any("\ud800" <= c <= "\udfff" for c in s)
)
KEYS = st.lists(SEGMENTS, min_size=1, max_size=4).map("/".join)


@given(st.sets(KEYS, max_size=30))
def test_no_two_keys_have_one_path_and_none_escapes(keys: set[str]) -> None:
    """Whatever the keys are, each has a path of its own of names that Linux takes; no file is a directory."""
    found = paths(keys)
    assert len(set(found.values())) == len(keys)
    directories = {path[:i] for path in found.values() for i, c in enumerate(path) if c == "/"}
    assert not directories & set(found.values())
    for path in found.values():
        for name in to_bytes(path).split(b"/"):
            assert 0 < len(name) <= NAME_MAX
            assert name not in (b".", b"..")
            assert b"\0" not in name


@given(SEGMENTS, SEGMENTS)
def test_no_two_segments_have_one_name(a: str, b: str) -> None:
    """By itself or beside a directory, a name stands for one segment in one role."""
    names = [shown(a), beside(a), shown(b), beside(b)]
    assert len(set(names)) == (2 if a == b else 4)


@given(SEGMENTS)
def test_names_can_be_read_back(segment: str) -> None:
    """`original` is the inverse, but for names that had to be cut."""
    for name in (shown(segment), beside(segment)):
        back = original(name)
        assert back == segment or (back is None and len(name) > 200)


@pytest.mark.parametrize("length", range(251, 263))
def test_a_cut_name_ends_between_characters(length: int) -> None:
    """The beginning of a long name is whole characters, and the extension is kept."""
    for character in ("a", "é", "€", "😀"):
        segment = character * length + ".JPEG"
        for name in (shown(segment), beside(segment)):
            name.decode()
            assert len(name) <= NAME_MAX
            assert re.search(rb"%~[0-9a-f]{32}\.JPEG(%file)?\Z", name)
            assert len(name) > NAME_MAX - 4
            assert original(name) is None


def test_a_long_tail_is_no_extension() -> None:
    """What follows the last dot is kept only where it looks like an extension."""
    for tail in (".", ".with space", "." + "x" * 16, ".%25"):
        assert re.search(rb"%~[0-9a-f]{32}\Z", shown("y" * 300 + tail))


def test_a_segment_has_no_slash() -> None:
    """Whoever asks for the name of two segments has cut the key wrongly."""
    for make in (shown, beside):
        with pytest.raises(ValueError, match="more than one segment"):
            make("some/thing")
