"""Every promise of the semantics page has a test that quotes it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def plain(text: str) -> str:
    """Words only, so that line breaks and markup make no difference."""
    return " ".join(re.sub(r"[`*▸|]", " ", text).split()).lower()


def promises() -> list[str]:
    """The sentences after a ▸, and the table rows that have one."""
    page = (ROOT / "docs/semantics.md").read_text()
    found = re.findall(r"▸\s*(.+?)(?:\.\s|\.$|\s\|)", page, re.DOTALL | re.MULTILINE)
    return [plain(sentence) for sentence in found if "is quoted above the test" not in plain(sentence)]


def quotes() -> str:
    """All docstrings of all tests."""
    texts = []
    for path in (ROOT / "tests").rglob("test_*.py"):
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
