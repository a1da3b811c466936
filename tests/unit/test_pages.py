"""What README and docs tell people to type is what the commands take."""

import re
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from csi.__main__ import parser as driver_parser
from datacache.cache.catalogue import Catalogue
from datacache.cli import fstab
from datacache.cli.main import COMMANDS, command_parser
from datacache.clock import VirtualClock
from datacache.config.settings import IndexSettings
from datacache.index.manifest import read_manifest
from datacache.index.opening import open_index
from datacache.model import Dataset, MountPoint, Version
from datacache.sources.memory import MemorySource

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"--one-file-system", "--device", "--cap-add", "--unix-socket", "--server-side", "--set"}
"""Flags on our pages that are other programs'."""


def code(page: Path) -> Iterator[str]:
    """The pieces of a page that are code: lines of blocks, and what stands in backticks."""
    text = page.read_text()
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    yield from re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words after `datacache` wherever one of its commands stands with its arguments."""
    for piece in code(page):
        if " fuse.datacache " in piece:  # a line of fstab, see below
            continue
        for part in re.split(r"[|;]| && ", piece.partition("     #")[0]):
            words = part.split("datacache ", 1)
            if len(words) == 2 and re.fullmatch(r"(\S*/|ExecSt\w+=\S*/)?", words[0].strip()):
                yield shlex.split(words[1], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_parse(page: Path) -> None:
    """Each `datacache ...` of a page is a command with flags that it has."""
    for name, *words in command_lines(page):
        if name in ("COMMAND", "--help"):
            continue
        assert name in COMMANDS, f"{page.name}: datacache {name}"
        if words and not words[-1].startswith(("[", "--help")):
            command_parser(name).parse_args(words)


def test_there_are_commands_on_the_pages() -> None:
    """The test above looks at something."""
    found = [line for page in PAGES for line in command_lines(page)]
    assert len(found) > 40
    assert {line[0] for line in found} >= {
        "mount",
        "umount",
        "load",
        "status",
        "snapshot",
        "doctor",
        "verify",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_of_the_pages_exist(page: Path) -> None:
    """A flag that a page names is one of some command."""
    parsers = [*map(command_parser, COMMANDS), driver_parser()]
    known = {option for one in parsers for action in one._actions for option in action.option_strings}
    named = {flag for piece in code(page) for flag in re.findall(r"(?:^|\s)(--[a-z][a-z-]*)", piece)}
    assert named <= known | OTHERS


def test_the_pages_lines_of_fstab_are_mounts() -> None:
    """The lines for /etc/fstab in docs/cli.md become command lines that `mount` takes."""
    lines = re.findall(
        r"^(\S+)\s+(/mnt\S+)\s+fuse\.datacache\s+(\S+)\s+0 0$", (ROOT / "docs/cli.md").read_text(), re.M
    )
    assert len(lines) == 2
    for what, where, options in lines:
        words = fstab.translate([what, where, "-o", options])
        command_parser("mount").parse_args(words[1:] if words[0] == "mount" else words)


def test_the_tables_of_the_page_are_those_on_disk(tmp_path: Path) -> None:
    """docs/on-disk-format.md has the tables and columns of both databases."""
    text = " ".join((ROOT / "docs/on-disk-format.md").read_text().split())
    index, cache = text.split("## Cache")
    Catalogue(str(tmp_path / "catalogue.db"), boot="here").close()
    source = MemorySource(objects={"a": b"1"})
    dataset = Dataset("x", (MountPoint("memory://test"),))
    open_index(dataset, [source], IndexSettings(), state=str(tmp_path), clock=VirtualClock()).close()
    for path, page in ((tmp_path / "index.db", index), (tmp_path / "catalogue.db", cache)):
        for table, columns in tables(path).items():
            assert f"`{table}({', '.join(columns)})`" in page, f"{path.name}: {table}({', '.join(columns)})"


def tables(path: Path) -> dict[str, list[str]]:
    with closing(sqlite3.connect(path)) as database:
        found = database.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
        names = [name for (name,) in found]
        return {name: [row[1] for row in database.execute(f"PRAGMA table_info({name})")] for name in names}


def test_the_manifest_of_the_page_is_one() -> None:
    """Each line of the example in docs/sources.md is what the table below it says."""
    (example,) = re.findall(
        r"^```json\n(.*?)^```", (ROOT / "docs/sources.md").read_text(), re.MULTILINE | re.DOTALL
    )
    plain, tagged, sized = read_manifest(example.encode(), uri="file:///x.jsonl").items
    assert (plain.path, plain.size, plain.version) == ("train/0001.jpg", None, Version())
    assert (tagged.path, tagged.size, tagged.version.etag) == ("train/2.jpg", 48211, '"9b2cf535f27731c9"')
    assert (sized.path, sized.size) == ("val/0003.jpg", 51200)
