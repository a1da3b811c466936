"""How values are written for people: columns, times, shares, and names that cannot harm a terminal."""

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

NEVER = "-"


def columns(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """`rows` (a heading first) as lines of aligned columns; columns numbered in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    to_right = set(right)
    return [
        "  ".join(
            cell.rjust(width) if i in to_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def printable(name: str) -> str:
    """`name` with control characters escaped: a key of a bucket may hold what moves the cursor."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in name)


def share(part: float, whole: float) -> str:
    """ "40 %"; rounded down, so that 100 % means all of it."""
    return f"{int(100 * part / whole)} %" if whole else NEVER


def count(number: int, one: str, many: str = "") -> str:
    """ "1 file", "2 files"; `many` where it is not `one` with an "s"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def when(mtime_ns: int) -> str:
    """Local time of a file, as `ls --full-time` without the fractions."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(mtime_ns / 1e9)) if mtime_ns else NEVER


def span(seconds: float) -> str:
    """ "1h02m", "3m20s", "12s"."""
    if seconds == float("inf"):
        return "?"
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{secs:02}s" if minutes else f"{secs}s"


def as_json(value: Any) -> str:
    """One line of JSON that is valid UTF-8 whatever the names in it are.

    A byte that is no UTF-8 is written as the escape \\udcXX, which `json.loads` gives back as it was.
    """
    return json.dumps(value, default=str)
