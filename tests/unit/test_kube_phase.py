"""What the status of a Dataset says of what was seen."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.kube.phase import (
    SHOWN_NODES,
    Figures,
    News,
    Observed,
    Workers,
    blockers,
    dirty_nodes,
    news,
    status,
)
from datacache.model import GiB, MiB

NOW, LATER = "2026-11-26T21:00:00Z", "2026-11-26T22:00:00Z"
UP = Workers(wanted=2, ready=2, updated=2, current=True)
WELL = Observed(generation=3, claim="Bound", workers=UP,
                figures=(Figures("a", cached=3 * GiB, files=10, bytes=4 * GiB, opens=10, opens_whole=9),
                         Figures("b", cached=1 * GiB, files=4, bytes=2 * GiB)))  # fmt: skip
WRITER = replace(WELL, writable=True)


def dirty(seen: Observed, node: str = "a") -> Observed:
    figures = [replace(f, dirty=GiB, dirty_files=1, owed=1) if f.node == node else f for f in seen.figures]
    return replace(seen, figures=tuple(figures))


def conditions(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {each["type"]: (each["status"], each["reason"]) for each in found["conditions"]}


TABLE: list[tuple[Observed, str, dict[str, tuple[str, str]]]] = [
    (Observed(generation=1), "Pending", {"Ready": ("False", "NoClaim"), "Accepted": ("True", "Accepted")}),
    (replace(WELL, claim="Pending"), "Pending", {"VolumeBound": ("False", "Binding")}),
    (WELL, "Bound", {"Ready": ("True", "Ready"), "WorkersReady": ("True", "AllReady")}),
    # Lazy: no worker is wanted before somebody mounts it, and that is no fault.
    (replace(WELL, workers=Workers(0, 0, 0, True), figures=()), "Bound",
     {"WorkersReady": ("True", "NoneWanted")}),
    # Fluid's defect 6: it stays Bound there with no ready worker.
    (replace(WELL, workers=replace(UP, ready=0)), "Degraded",
     {"WorkersReady": ("False", "Starting"), "Ready": ("False", "Starting")}),
    (replace(WELL, workers=replace(UP, ready=1), ended=("node a: no such bucket",)), "Degraded",
     {"WorkersReady": ("False", "WorkersEnd"), "Ready": ("False", "WorkersEnd")}),
    # Pods go where they went before: it works, and somebody should know.
    (replace(WELL, placed_otherwise=True), "Bound", {"VolumeBound": ("True", "PlacedAsBefore"),
                                                     "Ready": ("True", "Ready")}),
    (Observed(generation=1, missing="no claim", lacks="ClaimUnusable"), "Failed",
     {"Accepted": ("False", "ClaimUnusable")}),
    (replace(WELL, workers=replace(UP, updated=1)), "Updating", {"WorkersReady": ("True", "Rolling")}),
    (replace(WELL, workers=replace(UP, updated=1, ready=1)), "Updating", {"Ready": ("False", "Starting")}),
    (replace(WELL, workers=replace(UP, current=False)), "Updating", {"Ready": ("Unknown", "Rolling")}),
    (replace(WELL, figures=(replace(WELL.figures[0], troubles=("tier ssd is broken: EIO",)),)), "Degraded",
     {"WorkersReady": ("False", "Troubled")}),
    (Observed(generation=1, refused="spec.x: no"), "Failed", {"Accepted": ("False", "Invalid"),
                                                              "Ready": ("False", "Invalid")}),
    (Observed(generation=1, missing="no Secret"), "Failed", {"Ready": ("False", "SecretMissing")}),
    (Observed(generation=1, failed="quota"), "Failed", {"Accepted": ("False", "Refused")}),
    # A change that cannot be done leaves what works at work, and is said.
    (replace(WELL, refused="spec.x: no"), "Degraded", {"Accepted": ("False", "Invalid")}),
    (replace(WELL, claim="Lost"), "Failed", {"VolumeBound": ("False", "Lost")}),
    (WRITER, "Bound", {"Uploaded": ("True", "Clean")}),
    (dirty(WRITER), "Bound", {"Uploaded": ("False", "Uploading"), "Ready": ("True", "Ready")}),
    (replace(WRITER, silent=("c",)), "Bound", {"Uploaded": ("Unknown", "Silent")}),
    (replace(WELL, deleting=True), "Deleting", {"DeletionBlocked": ("False", "Free"),
                                                "Ready": ("False", "Deleting")}),
    (replace(WELL, deleting=True, users=("x/p",)), "Deleting", {"DeletionBlocked": ("True", "InUse")}),
    (replace(dirty(WRITER), deleting=True), "Deleting", {"DeletionBlocked": ("True", "NotUploaded")}),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "phase", "some"), TABLE)
def test_what_is_seen_is_said(seen: Observed, phase: str, some: dict[str, tuple[str, str]]) -> None:
    found = status(seen, {}, now=NOW)
    assert found["phase"] == phase
    assert found["observedGeneration"] == seen.generation
    assert some.items() <= conditions(found).items()
    assert {each["observedGeneration"] for each in found["conditions"]} == {seen.generation}
    assert all(each["message"] for each in found["conditions"])


def test_amounts_are_the_workers_own() -> None:
    found = status(WELL, {}, now=NOW)
    assert (found["ufsTotal"], found["fileNum"], found["cached"]) == (4 * GiB, 10, 4 * GiB)
    assert found["cachedPercentage"] == 75, "of the fullest node: copies on two nodes are not two halves"
    assert found["hitRatio"] == "0.900"
    assert found["nodes"] == [{"name": "a", "cached": 3 * GiB}, {"name": "b", "cached": GiB}]


def test_amounts_are_shown_to_people_in_units() -> None:
    shown = status(WELL, {}, now=NOW)["shown"]
    assert shown == {"ufsTotal": "4.0 GiB", "cached": "4.0 GiB", "cachedPercentage": "75%"}
    written = replace(WELL, writable=True, figures=(Figures("a", 0, 0, 0, dirty=5 * MiB, owed=1),))
    assert status(written, {}, now=NOW)["shown"] == {"ufsTotal": "0 B", "cached": "0 B", "dirty": "5.0 MiB"}


def test_nothing_is_said_of_amounts_that_nobody_knows() -> None:
    assert set(status(replace(WELL, figures=()), {}, now=NOW)) == {
        "phase",
        "observedGeneration",
        "conditions",
    }
    empty = status(replace(WELL, figures=(Figures("a", 0, 0, 0),)), {}, now=NOW)
    assert "cachedPercentage" not in empty and "hitRatio" not in empty


def test_the_nodes_shown_are_those_that_hold_most() -> None:
    figures = tuple(Figures(f"n{i:03}", cached=i, files=0, bytes=0) for i in range(50))
    found = status(replace(WELL, figures=figures), {}, now=NOW)["nodes"]
    assert len(found) == SHOWN_NODES and found[0]["name"] == "n049"


def test_a_condition_keeps_its_time_until_it_changes() -> None:
    first = status(replace(WELL, workers=replace(UP, ready=0)), {}, now=NOW)
    same = status(replace(WELL, workers=replace(UP, ready=1)), first, now=LATER)
    back = status(WELL, same, now=LATER)

    def since(found: dict[str, Any], name: str) -> str:
        return next(each["lastTransitionTime"] for each in found["conditions"] if each["type"] == name)

    assert since(same, "WorkersReady") == NOW, "another message is no transition"
    assert since(back, "WorkersReady") == LATER
    assert since(back, "VolumeBound") == NOW


def test_the_same_observation_is_the_same_status() -> None:
    first = status(dirty(WRITER), {}, now=NOW)
    assert status(replace(dirty(WRITER), figures=dirty(WRITER).figures[::-1]), first, now=LATER) == first


@pytest.mark.parametrize(
    "junk", [{"conditions": None}, {"conditions": ["x"]}, {"dirty": 7}, {"dirty": {"nodes": None}}]
)
def test_a_status_that_somebody_has_spoilt_is_made_right(junk: dict[str, Any]) -> None:
    assert status(WRITER, junk, now=NOW) == status(WRITER, {}, now=NOW)


def test_messages_are_bounded() -> None:
    found = status(replace(WELL, failed="x" * 10_000), {}, now=NOW)
    assert max(len(each["message"]) for each in found["conditions"]) == 1024


# ---- deletion ------------------------------------------------------------------------------------


def test_pods_that_use_it_hold_it() -> None:
    seen = replace(WELL, users=tuple(f"team/p{i}" for i in range(7)))
    assert blockers(seen, {}) == ("used by 7 pods (team/p0, team/p1, team/p2, team/p3, team/p4, ...)",)


def test_dirty_bytes_hold_it() -> None:
    assert blockers(dirty(WRITER), {}) == ("1.0 GiB and 1 operation are not in the bucket yet, on node a",)


def test_a_delete_that_the_bucket_is_owed_holds_it_without_a_byte() -> None:
    seen = replace(WRITER, figures=(Figures("a", 0, 0, 0, owed=2),))
    assert blockers(seen, {}) == ("0 B and 2 operations are not in the bucket yet, on node a",)


def test_a_worker_that_does_not_answer_may_hold_anything() -> None:
    said = "no worker answers on node c, which may hold what is not in the bucket"
    assert blockers(replace(WRITER, silent=("c",)), {}) == (said,)
    assert blockers(replace(WELL, silent=("c",)), {}) == (), "but not of what nobody can write"


def test_a_node_that_was_dirty_stays_so_until_its_worker_says_otherwise() -> None:
    """Its worker may have ended, and its label be gone: what lies on its disk is still owed."""
    first = status(dirty(WRITER), {}, now=NOW)
    alone = replace(WRITER, figures=WRITER.figures[1:])
    assert dirty_nodes(alone, first) == ["a"]
    assert "node a" in blockers(alone, first)[0]
    second = status(alone, first, now=LATER)
    assert second["dirty"]["nodes"] == ["a"] and conditions(second)["Uploaded"] == ("Unknown", "Silent")
    assert blockers(WRITER, second) == () and dirty_nodes(WRITER, second) == []


def test_what_was_written_is_given_up_when_its_owner_says_so_and_pods_still_hold_it() -> None:
    seen = replace(dirty(WRITER), accept_loss=True, silent=("c",))
    assert blockers(seen, {}) == ()
    assert blockers(replace(seen, users=("x/p",)), {}) == ("used by pod x/p",)


# ---- events --------------------------------------------------------------------------------------


def test_that_all_is_well_with_what_is_new_is_no_news() -> None:
    assert news({}, status(WELL, {}, now=NOW)) == []


def test_what_cannot_be_done_is_a_warning_on_the_object() -> None:
    found = news({}, status(Observed(generation=1, refused="spec.x: no"), {}, now=NOW))
    assert News("Warning", "Invalid", "spec.x: no") in found


def test_a_change_is_news_once_and_in_both_directions() -> None:
    well = status(WELL, {}, now=NOW)
    bad = status(replace(WELL, missing="no Secret s3"), well, now=LATER)
    again = status(replace(WELL, missing="no Secret s3"), bad, now=LATER)
    assert ("Warning", "SecretMissing", "no Secret s3") in news(well, bad)
    assert news(bad, again) == []
    assert ("Normal", "Accepted", "the spec can be done") in news(again, status(WELL, again, now=LATER))


def test_what_a_worker_said_when_it_ended_is_said_on_the_dataset() -> None:
    found = status(replace(WELL, workers=replace(UP, ready=0), ended=("node a: x", "node b: x")), {}, now=NOW)
    (ready,) = [each["message"] for each in found["conditions"] if each["type"] == "WorkersReady"]
    assert ready == "0 of 2 workers are ready; node a: x; node b: x"


def test_what_passes_by_itself_is_no_warning() -> None:
    well = status(WRITER, {}, now=NOW)
    assert [each.kind for each in news(well, status(dirty(WRITER), well, now=NOW))] == ["Normal"]


@given(
    figures=st.lists(
        st.builds(Figures, node=st.sampled_from("abc"), cached=st.integers(0, 9), files=st.integers(0, 9),
                  bytes=st.integers(0, 9), dirty=st.integers(0, 1), owed=st.integers(0, 1)),
        unique_by=lambda f: f.node,
    ),
    silent=st.sets(st.sampled_from("abcd")), earlier=st.sets(st.sampled_from("abcd")),
)  # fmt: skip
def test_nothing_that_may_be_dirty_is_let_go(figures: Any, silent: Any, earlier: Any) -> None:
    """May go: only if all that was ever dirty, or is silent, was heard of now, and is clean."""
    seen = Observed(1, writable=True, figures=tuple(figures), silent=tuple(silent), deleting=True)
    heard = {f.node: f.clean for f in figures}
    free = not blockers(seen, {"dirty": {"nodes": sorted(earlier)}})
    assert free == (all(heard.values()) and (silent | earlier) <= set(heard))
