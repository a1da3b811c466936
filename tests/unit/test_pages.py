"""What README and docs tell people to type is what the commands take."""

import re
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi.__main__ import parser as driver_parser
from datacache.cache.catalogue import Catalogue
from datacache.cli import fstab
from datacache.cli.main import COMMANDS, command_parser
from datacache.clock import VirtualClock
from datacache.config.settings import IndexSettings
from datacache.index.manifest import read_manifest
from datacache.index.opening import open_index
from datacache.kube.api import OURS
from datacache.kube.release import Release
from datacache.kube.spec import read_dataset
from datacache.model import Dataset, MountPoint, Version
from datacache.sources.memory import MemorySource

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"--one-file-system", "--device", "--cap-add", "--unix-socket", "--server-side", "--set",
          "--no-hooks", "--from-literal"}  # fmt: skip
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


# ---- pages for Kubernetes ------------------------------------------------------------------------


def examples(page: str, kind: str) -> list[dict[str, Any]]:
    """The objects of a kind of ours in the blocks of YAML of a page."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    objects = [each for block in blocks for each in yaml.safe_load_all(block)]
    return [each for each in objects if each["kind"] == kind and each["apiVersion"] == OURS]


def fields(schema: dict[str, Any], above: str = "") -> Iterator[str]:
    """All fields of a schema, as the pages write them."""
    for name, inner in (schema.get("properties") or {}).items():
        yield above + name
        yield from fields(inner, f"{above}{name}.")
        yield from fields(inner.get("items") or {}, f"{above}{name}[].")


@pytest.mark.parametrize("page", ["fluid.md", "kubernetes.md"])
def test_datasets_of_the_pages_can_be_done(page: str) -> None:
    """An example is one that the controller takes."""
    found = examples(page, "Dataset")
    assert found
    for obj in found:
        obj["metadata"] |= {"uid": "0b6e4c1a-3a57-4b8f-9f53-111111111111", "generation": 1}
        obj["metadata"].setdefault("namespace", "team-a")
        assert read_dataset(obj, Release(namespace="datacache", image="x:1")).mounts


def test_our_fields_on_the_page_for_fluids_users_exist() -> None:
    """The second column of its tables has fields of our kinds, or says that there is none."""
    known = {"image"}  # a value of the chart
    for kind in ("datasets", "dataloads"):
        crd = yaml.safe_load((ROOT / f"charts/datacache/files/crds/{kind}.yaml").read_text())
        schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
        for part in ("spec", "status"):
            known |= {*fields(schema[part]), *fields(schema[part], f"{part}.")}
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", (ROOT / "docs/fluid.md").read_text(), re.MULTILINE)
    for theirs, ours in rows:
        if ours in ("none", "ours", "phase") or ours.startswith(("---", "`Pending`")):
            continue
        named = re.findall(r"`([^`{]+)`", theirs if ours == "the same" else ours)
        assert named, f"{theirs}: {ours}"
        for name in named:
            ends = [known_name for known_name in known if known_name.endswith(name)]
            assert ends, f"{theirs}: there is no {name}"
