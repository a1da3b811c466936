"""Which annotations keep autoscalers from a node: set while a Dataset is dirty there, and never somebody
else's."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.kube import marks
from datacache.kube.marks import MARKS, OURS, change

A, B = "aaaa", "bbbb"
CA, KARPENTER = MARKS


def after(annotations: dict[str, str], changed: dict[str, str | None]) -> dict[str, str]:
    """What the API makes of a merge patch."""
    found = {**annotations, **changed}
    return {key: value for key, value in found.items() if value is not None}


def test_a_node_is_marked_while_it_is_dirty() -> None:
    """One change to mark it, none while it stays dirty, one that takes all away again."""
    plain = {"example.com/x": "1"}
    marked = after(plain, change(plain, A, dirty=True))
    assert marks.is_marked(marked, A) and not marks.is_marked(marked, B)
    assert marked[CA] == marked[KARPENTER] == "true"
    assert change(marked, A, dirty=True) == {}
    assert after(marked, change(marked, A, dirty=False)) == plain
    assert change(plain, A, dirty=False) == {}


def test_two_datasets_on_one_node() -> None:
    """The marks go with the last that is dirty, whichever that is."""
    one = after({}, change({}, A, dirty=True))
    two = after(one, change(one, B, dirty=True))
    left = after(two, change(two, A, dirty=False))
    assert left[CA] == "true" and marks.is_marked(left, B) and not marks.is_marked(left, A)
    assert after(left, change(left, B, dirty=False)) == {}


@pytest.mark.parametrize("theirs", ["true", "false", ""])
def test_a_mark_of_somebody_else_stays(theirs: str) -> None:
    """Neither overwritten while we would mark the node, nor taken away after."""
    before = {CA: theirs}
    marked = after(before, change(before, A, dirty=True))
    assert marked[CA] == theirs and marked[KARPENTER] == "true" and marked[OURS] == KARPENTER
    assert after(marked, change(marked, A, dirty=False)) == before


def test_a_mark_of_ours_that_somebody_changed_is_theirs() -> None:
    """It stays as they left it; and one that they took away comes again while it is dirty."""
    marked = after({}, change({}, A, dirty=True))
    assert after({**marked, CA: "false"}, change({**marked, CA: "false"}, A, dirty=False)) == {CA: "false"}
    del marked[CA]
    assert change(marked, A, dirty=True) == {CA: "true"}


keys = st.sampled_from([*MARKS, OURS, f"datacache.io/dirty-{A}", f"datacache.io/dirty-{B}", "other"])


@given(st.dictionaries(keys, st.sampled_from(["true", "false", CA, KARPENTER, f"{CA},{KARPENTER}", ","])))
def test_whatever_stands_there(before: dict[str, str]) -> None:
    """A second look changes nothing; a dirty node has both marks; what is not ours is not touched."""
    ours = before.get(OURS, "").split(",")
    for dirty in (True, False):
        changed = change(before, A, dirty=dirty)
        found = after(before, changed)
        assert change(found, A, dirty=dirty) == {}
        assert marks.is_marked(found, A) is dirty
        assert not dirty or all(mark in found for mark in MARKS)
        for key, value in before.items():
            if key in MARKS and key not in ours:
                assert found[key] == value
            if key in ("other", f"datacache.io/dirty-{B}"):
                assert found[key] == value


def test_the_page_says_so() -> None:
    """docs/controller.md has both marks, ours, and for how long a worker uploads when it is told to end."""
    page = (Path(__file__).parents[2] / "docs/controller.md").read_text()
    assert all(f"{mark}:" in page for mark in MARKS) and f"`{OURS}`" in page
    spec = Path(__file__).parents[2] / "datacache/kube/manifests.py"
    assert "for 120 s of the 135 that its pod has to end" in " ".join(page.split())
    assert "return 135 if spec.writable" in spec.read_text() and "_grace(spec) - 15" in spec.read_text()
