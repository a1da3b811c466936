"""
A load job, followed until it ends: a live bar on a terminal, a line every few seconds elsewhere.

`rate` and `left` are pure. Bytes that were there before the job began are no work of the job, so
rate and ETA count fetched bytes only.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from datacache.cli.tables import count, span
from datacache.clock import Clock, SystemClock
from datacache.model import format_size
from datacache.reading.job import LoadStatus

if TYPE_CHECKING:
    from datacache.cluster.control import Control

LOOK = 0.25
"""Seconds between two looks at a job: a bar that moves; a look costs the worker microseconds."""
LINE = 5.0
"""Seconds between two lines where there is no terminal: a log that can be read later."""
SAME = 60.0
"""... that say the same."""
FIRST = 2.0
"""... and until the first of them: whoever waits longer wants to know for what."""


def rate(status: LoadStatus) -> float:
    """Bytes fetched per second."""
    return status.bytes_fetched / status.seconds if status.seconds else 0.0


def left(status: LoadStatus) -> float:
    """Seconds until the job is done at the rate so far; inf while nobody knows."""
    speed = rate(status)
    todo = status.bytes - status.bytes_done
    if not status.listed or (todo > 0 and not speed):
        return float("inf")
    return max(0, todo) / speed if speed else 0.0


def line(status: LoadStatus) -> str:
    """ "120 of 400 files, 1.2 GiB of 4.0 GiB, 230.0 MiB/s, 12s left"."""
    more = "" if status.listed else "+"
    files = count(status.files, "file") if status.listed else f"{status.files}+ files"
    parts = [
        f"{status.files_done} of {files}",
        f"{format_size(status.bytes_done)} of {format_size(status.bytes)}{more}",
        f"{format_size(rate(status))}/s",
    ]
    if status.waiting:
        parts.append("waiting for the store")
    elif status.state == "running":
        parts.append(f"{span(left(status))} left")
    if status.files_failed:
        parts.append(f"{status.files_failed} failed")
    return ", ".join(parts)


def follow(
    control: "Control", job: str, *, out: TextIO = sys.stderr, quiet: bool = False,
    patience: float = float("inf"), clock: Clock | None = None,
) -> LoadStatus:  # fmt: skip
    """Show how `job` is doing on `out` until it ends, or for `patience` seconds; how it is then."""
    clock = clock or SystemClock()
    never = threading.Event()
    give_up = clock.monotonic() + patience
    show = _silence if quiet else _bar if out.isatty() else _lines
    with show(out, clock) as update:
        while True:
            status = control.load_status(job)
            update(status)
            if status.state != "running" or clock.monotonic() >= give_up:
                return status
            clock.wait(never, LOOK)


@contextmanager
def told(
    *, out: TextIO | None = None, quiet: bool = False, clock: Clock | None = None
) -> Iterator[Callable[[str], None]]:
    """What shows how something goes, in one line: live on a terminal, every few seconds elsewhere. `out` is
    standard error where it is not given."""
    out = out or sys.stderr
    clock, live = clock or SystemClock(), not quiet and out.isatty()
    due = clock.monotonic() + FIRST
    last, again = "", 0.0

    def update(text: str) -> None:
        nonlocal due, last, again
        now = clock.monotonic()
        if live:
            print(f"\r\x1b[K{text}", end="", file=out, flush=True)
        elif not quiet and now >= due and (text != last or now >= again):
            due, last, again = now + LINE, text, now + SAME
            print(text, file=out, flush=True)

    try:
        yield update
    finally:
        if live:
            print("\r\x1b[K", end="", file=out, flush=True)


Update = Callable[[LoadStatus], None]


@contextmanager
def _silence(out: TextIO, clock: Clock) -> Iterator[Update]:
    yield lambda status: None


@contextmanager
def _lines(out: TextIO, clock: Clock) -> Iterator[Update]:
    last = clock.monotonic()

    def update(status: LoadStatus) -> None:
        nonlocal last
        if status.state == "running" and clock.monotonic() - last >= LINE:
            last = clock.monotonic()
            reason = f" ({status.waiting})" if status.waiting else ""
            print(line(status) + reason, file=out, flush=True)

    yield update


@contextmanager
def _bar(out: TextIO, clock: Clock) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.description}", markup=False),
        console=Console(file=out),
        transient=True,
        auto_refresh=False,  # no thread of its own: we look often enough
    ) as bar:
        task = bar.add_task("listing")

        def update(status: LoadStatus) -> None:
            # An empty selection and files of no bytes must still fill the bar: each file counts a little.
            total = status.bytes + status.files
            bar.update(
                task,
                completed=status.bytes_done + status.files_done,
                total=total or None if status.listed or total else None,
                description=line(status),
            )
            bar.refresh()

        yield update
