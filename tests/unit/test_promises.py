"""Every promise of the semantics page has a test that quotes it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def plain(text: str) -> str:
    """Words only, so that line breaks and markup make no difference."""
    return " ".join(re.sub(r"[`*▸|:]", " ", text).split()).lower()


def promises() -> list[str]:
    """The sentences after a ▸; of a row of a table that has one, what happened, and the errno or whatever
    becomes of it."""
    page = (ROOT / "docs/semantics.md").read_text()
    rows = re.findall(r"^\| ▸ (.+? \| (?:E[A-Z]+\b|.+(?= \|$)))", page, re.MULTILINE)
    sentences = re.findall(r"^[^|\n]*?▸ (.+?)\.$", page, re.MULTILINE)
    assert len(rows) + len(sentences) == page.count("▸") - 1, "a ▸ that is neither a sentence nor a row"
    return [plain(promise) for promise in rows + sentences]


def quotes() -> str:
    """All docstrings of all tests, those of contract suites too."""
    texts = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                texts.append(plain(ast.get_docstring(node) or ""))
    return "\n".join(texts)


def test_every_promise_is_quoted_by_a_test() -> None:
    """A sentence marked ▸ in docs/semantics.md stands in the docstring of the test that proves it."""
    quoted = quotes()
    missing = [sentence for sentence in promises() if sentence not in quoted]
    assert len(promises()) > 20
    assert not missing, "no test quotes:\n  " + "\n  ".join(missing)


def test_the_tests_that_pages_name_exist() -> None:
    """A page that says which test plays a scenario (docs/concurrency.md) names one that there is."""
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for page in (ROOT / "docs").rglob("*.md"):
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in sources, f"{page.name} names {name}"
