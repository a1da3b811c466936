"""
Whether the stores of a data set let us write to them: asked while its mount comes up, so that it costs
nothing, and before anything is written, so that nobody finds out hours later that none of it gets there.

A store that says no is a reason not to mount. One that says nothing is not: what is written is safe in the
landing zone, and goes when the store is back.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from datacache.clock import SystemClock
from datacache.errors import DatacacheError, Denied, MountError
from datacache.telemetry import redact

if TYPE_CHECKING:
    from datacache.config.settings import Settings
    from datacache.sources.sink import Sink

_LET_GO = 1.0
"""Seconds in which a request ends whose connection was cut."""

ADVICE = "credentials that may put and delete objects, or mount without --rw"


def sinks_of(settings: "Settings", *, patience: float) -> list["Sink"]:
    """A sink for each mount point of what can be written to; nobody is asked yet. Raises SettingError."""
    if not settings.writing.enabled:
        return []
    from datacache.sources.opening import open_sink

    hasty = replace(settings.sources, timeout=min(settings.sources.timeout, patience))
    clock = SystemClock()
    return [
        open_sink(point, hasty, environment=settings.environment, clock=clock)
        for point in settings.dataset.mounts
    ]


class Permission:
    """Asks each of `sinks`, which are closed at the end, in a thread of its own while the block goes on."""

    def __init__(self, sinks: Sequence["Sink"], *, patience: float) -> None:
        """`patience`: seconds that the stores are given, from the beginning of the block."""
        self._sinks, self._patience, self._until = sinks, patience, 0.0
        # By sink, set by its thread before it ends; the threads are joined, or the entry is not there.
        self._refusals: dict[int, DatacacheError | None] = {}
        self._threads = [
            threading.Thread(target=self._ask, args=(number,), name=f"may-write-{number}", daemon=True)
            for number in range(len(sinks))
        ]

    def __repr__(self) -> str:
        return f"<Permission of {len(self._sinks)} stores, {len(self._refusals)} have answered>"

    def __enter__(self) -> "Permission":
        self._until = time.monotonic() + self._patience
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for sink in self._sinks:
            sink.close()  # who waits for an answer waits no more
        for thread in self._threads:
            thread.join(_LET_GO)

    def check(self) -> list[str]:
        """What is to be said of stores that have not answered. Raises MountError where one says no."""
        for thread in self._threads:
            thread.join(max(0.0, self._until - time.monotonic()))
        doubts = []
        for number, sink in enumerate(self._sinks):
            if number in self._refusals:
                refusal = self._refusals[number]
                if refusal is None:
                    continue
                if isinstance(refusal, Denied):
                    raise MountError(
                        f"nothing can be written to {sink.uri} ({refusal}): {ADVICE}"
                    ) from refusal
                why = redact(str(refusal))
            else:
                why = f"nothing within {self._patience:.0f} s"
            doubts.append(
                f"whether {sink.uri} can be written to is not known ({why}); `datacache doctor --rw` tells"
            )
        return doubts

    def _ask(self, number: int) -> None:
        refusal: DatacacheError | None = None
        try:
            self._sinks[number].check_writable()
        except DatacacheError as error:
            refusal = error
        self._refusals[number] = refusal
