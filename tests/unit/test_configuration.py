"""docs/configuration.md is `config.keys` for people, and its example is a file that works."""

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from datacache.config.keys import KEYS, Key
from datacache.config.parsing import read_settings
from datacache.config.settings import Consistency, Fill, Policy, Settings, TierSettings
from datacache.model import GiB, Medium, TiB

PAGE = Path(__file__).parents[2] / "docs/configuration.md"
HOME = {"HOME": "/home/me"}
WORDS = {"uri": "URI...", "mounts": "URI=/PATH...", "directory": "DIR"}
"""What stands on the command line for the keys that have no flag."""


def default_of(key: Key) -> Any:
    """The default of the key's field; None where it is no single value."""
    section, _, name = key.field.rpartition(".")
    kind = get_type_hints(Settings)[section] if section else Settings
    if not is_dataclass(kind):
        return None
    found = {field.name: field.default for field in fields(kind)}.get(name, MISSING)
    return None if found in (MISSING, "", ()) else found


def expected_rows() -> list[tuple[str, str, str, str, str]]:
    """Key, flag, variable, values and default of each key, as the page has them."""
    rows = []
    for key in KEYS.values():
        default = default_of(key)
        values = f"{key.kind.expected}; a list" if key.many else key.kind.expected
        shown = "" if default is None else f"`{key.kind.show(default)}`"
        rows.append((key.name, WORDS.get(key.name, f"--{key.name}"), key.variable, values, shown))
    return rows


def page_rows() -> list[tuple[str, ...]]:
    """The rows of six cells whose second is a flag or a word beside the flags."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    return [tuple(cell.strip("`") for cell in row[:3]) + row[3:] for row in cells if len(row) == 6]


def test_the_page_has_a_row_for_each_key() -> None:
    """docs/configuration.md has each key once, with its flag, variable, values and default, and no other."""
    found = {row[0]: row[:5] for row in page_rows()}
    assert len(page_rows()) == len(found), "a key stands twice"
    assert found == {row[0]: row for row in expected_rows()}
    assert all(row[5].endswith((".", ").")) for row in page_rows()), "what a key means is a sentence"


def test_the_example_is_a_file_that_works(tmp_path: Path) -> None:
    """The datacache.yaml of the page says what the page says that it says."""
    (example,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "datacache.yaml"
    path.write_text(example)
    settings = read_settings({}, config_file=str(path), environment=HOME)
    train, val = settings.dataset.mounts
    assert (settings.dataset.name, train.path, val.path) == ("imagenet", "/train", "/val")
    assert train.options == {"endpoint": "http://minio:9000", "style": "path", "profile": "training"}
    assert val.options["endpoint"] == "https://oss-cn-hangzhou.aliyuncs.com"
    assert settings.cache.tiers == (
        TierSettings(Medium.MEM, "/dev/shm/imagenet", 4 * GiB),
        TierSettings(Medium.SSD, "/mnt/nvme/imagenet", 1 * TiB, 0.9, 0.7),
    )
    assert (settings.cache.policy, settings.reading.fill) == (Policy.LRU, Fill.BLOCK)
    assert (settings.index.consistency, settings.index.ttl) == (Consistency.REVALIDATE, 300.0)
    assert (settings.mount.directory, settings.mount.file_mode) == ("/mnt/imagenet", 0o440)
    assert settings.mount.allow_other
    assert settings.metrics == "127.0.0.1:9300"
    used = set(re.findall(r"^([a-z-]+):", example, re.MULTILINE))
    assert used <= set(KEYS)
    assert len(used) > 10


def test_the_order_of_the_sources(tmp_path: Path) -> None:
    """The page's example of precedence: flag, variable, file, default."""
    path = tmp_path / "datacache.yaml"
    path.write_text("uri: s3://bucket/train\nttl: 1m\nfill: range\nconcurrency: 4\n")
    environment = {**HOME, "DATACACHE_CONFIG": str(path), "DATACACHE_TTL": "2m", "DATACACHE_FILL": "block"}
    settings = read_settings({"ttl": "3m"}, config_file=None, environment=environment)
    assert settings.index.ttl == 180.0, "the flag"
    assert settings.reading.fill is Fill.BLOCK, "the variable"
    assert settings.reading.concurrency == 4, "the file"
    assert settings.reading.order_ahead == 64, "the default"


def test_variables_of_lists_are_divided_by_semicolons() -> None:
    """DATACACHE_CACHE of the page is two tiers."""
    (value,) = re.findall(r"DATACACHE_CACHE='([^']+)'", PAGE.read_text())
    environment = {**HOME, "DATACACHE_URI": "s3://b", "DATACACHE_CACHE": value}
    settings = read_settings({}, config_file=None, environment=environment)
    assert [tier.medium for tier in settings.cache.tiers] == [Medium.MEM, Medium.SSD]
