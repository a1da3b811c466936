"""The packages, and who else may be installed under their names."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def locked(name: str) -> list[Requirement]:
    """What a lock file of the image pins."""
    text = (ROOT / f"requirements/{name}.lock").read_text()
    return [Requirement(line.rstrip(" \\")) for line in text.splitlines() if line[:1].isalnum()]


@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_the_image_has_what_the_project_asks_for(version: str) -> None:
    """Each dependency is pinned, to a version that will do; so is what builds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["kubernetes"]
    for texts, name in ((wanted, "run"), (project["build-system"]["requires"], "build")):
        environment = {
            "python_version": version, "python_full_version": f"{version}.0", "sys_platform": "linux",
            "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }  # fmt: skip
        pinned = {
            canonicalize_name(each.name): next(iter(each.specifier)).version
            for each in locked(name)
            if each.marker is None or each.marker.evaluate(environment)
        }
        for text in texts:
            asked = Requirement(text)
            found = pinned[canonicalize_name(asked.name)]
            assert asked.specifier.contains(found, prereleases=True), f"{text}, and the image has {found}"


def test_the_image_is_made_of_files_that_are_there() -> None:
    """What the Dockerfile copies, .dockerignore lets in."""
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for words in re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        copied |= set(words.split()[:-1])
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)
