"""What a worker says of itself, as the figures that a status is made of. Pure."""

from collections.abc import Mapping
from typing import Any

from datacache.errors import ControlError
from datacache.kube.phase import Figures

MAX_TROUBLES = 5
"""Lines that one worker may add to the status."""


def read_figures(node: str, said: Mapping[str, Any]) -> Figures:
    """The figures in the `status` of the worker on `node`. Raises ControlError when it is none."""
    try:
        tiers, index, reads = said["tiers"], said["index"], said["reads"]
        writing = said.get("writing") or {}
        troubles = [
            f"tier {tier['name']} is broken: {tier['reason']}" for tier in tiers if tier["state"] == "broken"
        ]
        troubles += [f"waits for a person: {line}" for line in writing.get("parked", ())]
        return Figures(
            node=node,
            cached=sum(int(tier["used"]) for tier in tiers),
            files=int(index["files"]),
            bytes=int(index["bytes"]),
            opens=int(reads["opens"]),
            opens_whole=int(reads["opens_whole"]),
            dirty=int(writing.get("dirty_bytes", 0)),
            dirty_files=int(writing.get("dirty_files", 0)) + int(writing.get("dirty_unnoted", 0)),
            owed=int(writing.get("dirty_due", 0)),
            troubles=tuple(str(line)[:200] for line in troubles[:MAX_TROUBLES]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ControlError(f"the worker on node {node} does not answer as one ({error!r})") from error
