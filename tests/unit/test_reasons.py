"""Why things are not in the bucket yet: each reason once."""

import pytest

from datacache.writing.reasons import Reason, grouped

AWAY = "s3://b/p?endpoint=http://127.0.0.1:9: s3://b/p cannot be had right now (refused)"


@pytest.mark.parametrize(
    ("found", "known", "lines"),
    [
        ([], [], []),
        ([Reason("put", "a", "under way")], [], ["upload of 'a': under way"]),
        (
            [Reason("put", key, f"s3://b/p/{key} is forbidden") for key in ("a", "d/e", "f")],
            [],
            ["3 uploads, of 'a' first: s3://b/p is forbidden"],
        ),
        (
            [Reason("put", "a", "'a': somebody else has changed the object")],
            [],
            ["upload of 'a': somebody else has changed the object"],
        ),
        (
            [Reason("put", "a", "x"), Reason("delete", "b", "x"), Reason("copy", "c", "x")]
            + [Reason("copy", "d", "x"), Reason("put", "e", "y")],
            [],
            ["upload of 'a': x", "delete of 'b': x", "2 copies, of 'c' first: x", "upload of 'e': y"],
        ),
        (
            [Reason("put", "a", "s3://b/p/a cannot be had right now (refused)")]
            + [Reason("put", "b", "s3://b/p cannot be had right now (refused)")]
            + [Reason("put", "c", "open for writing, or mapped")],
            [AWAY],
            ["upload of 'c': open for writing, or mapped"],
        ),
    ],
)
def test_each_reason_is_said_once(found: list[Reason], known: list[str], lines: list[str]) -> None:
    assert grouped(found, known=known) == lines
