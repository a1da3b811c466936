"""The packages, and who else may be installed under their names."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["datacache", "fuse", "csi"])
def test_our_top_level_names_are_ours_alone(name: str) -> None:
    """fusepy installs `fuse`, PyPI has another `datacache`; pip lets them overwrite ours in silence."""
    assert set(importlib.metadata.packages_distributions()[name]) == {"dataset-cache"}


def test_every_make_target_of_the_readme_exists() -> None:
    """A command in the README is one that works."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_every_page_that_a_page_links_to_exists() -> None:
    """No link of the docs leads nowhere."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_ci_runs_the_readmes_tests() -> None:
    """CI runs what the README tells people to run, nothing less."""
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_the_three_packages_are_listed() -> None:
    """Only our three packages are built into the distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["datacache*", "fuse*", "csi*"]
