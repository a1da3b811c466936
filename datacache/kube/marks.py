"""
Which annotations keep autoscalers from a node that holds what is not in its bucket yet. Pure.

What was written to a node's disk and not uploaded is lost with it. Autoscalers ask nobody's worker (one of a
DaemonSet never keeps them from a node), but they leave nodes alone that are annotated for it. Several
Datasets may be dirty on one node, each with an annotation of its own; the marks that others know go with the
last of them. One that somebody else has set, or changed, is not ours: it is neither changed nor taken away.
"""

from collections.abc import Mapping

from datacache.kube.release import GROUP

MARKS = ("cluster-autoscaler.kubernetes.io/scale-down-disabled", "karpenter.sh/do-not-disrupt")
"""What the two autoscalers that are widely used look for, each with the value `true`."""
OURS = f"{GROUP}/keeps-node"
"""Which of `MARKS` are ours, divided by commas."""
_DIRTY = f"{GROUP}/dirty-"
"""... followed by the uid of a Dataset that is dirty there."""


def is_marked(annotations: Mapping[str, str], uid: str) -> bool:
    """Whether a node is marked for the Dataset."""
    return _DIRTY + uid in annotations


def change(annotations: Mapping[str, str], uid: str, *, dirty: bool) -> dict[str, str | None]:
    """What to change of a node's annotations (None: to take away), now that the Dataset is `dirty` there, or
    no longer."""
    mine = _DIRTY + uid
    ours = [mark for mark in annotations.get(OURS, "").split(",") if mark in MARKS]
    found: dict[str, str | None] = {}
    if dirty:
        if mine not in annotations:
            found[mine] = "true"
        for mark in MARKS:
            if mark not in annotations:
                found[mark] = "true"
                ours = sorted({*ours, mark})
        if ours and annotations.get(OURS) != ",".join(ours):
            found[OURS] = ",".join(ours)
        return found
    if mine in annotations:
        found[mine] = None
    others = any(key.startswith(_DIRTY) and key != mine for key in annotations)
    if OURS in annotations and not others:
        found |= {mark: None for mark in ours if annotations.get(mark) == "true"}
        found[OURS] = None
    return found
