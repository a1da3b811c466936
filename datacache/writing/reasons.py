"""Why things are not in the bucket yet, for people: each reason once, with how many it is of. Pure."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_NOUNS: Mapping[str, tuple[str, str]] = {
    "put": ("upload", "uploads"),
    "copy": ("copy", "copies"),
    "delete": ("delete", "deletes"),
}


class Reason(NamedTuple):
    """What keeps one operation."""

    what: str
    """put, copy or delete."""
    key: str
    why: str


def noun(what: str) -> str:
    """What an operation of a kind (put, copy, delete) is called."""
    return _NOUNS.get(what, (what, what))[0]


def grouped(found: Iterable[Reason], *, known: Iterable[str] = ()) -> list[str]:
    """One line for each reason, in the order in which they come first. What a reason is about is named once,
    so the key is left out of it. Reasons that are part of what is `known` already are left out."""
    groups: dict[tuple[str, str], list[str]] = {}
    said = tuple(known)
    for what, key, why in found:
        plain = _without(why, key)
        if not any(why in text or plain in text for text in said):
            groups.setdefault((what, plain), []).append(key)
    return [_line(what, keys, why) for (what, why), keys in groups.items()]


def _without(why: str, key: str) -> str:
    """`why`, where it names the object by its key or as the end of a URL, without that."""
    if not key:
        return why
    named = rf"/{re.escape(key)}(?=$|[\s:,;)])"
    return re.sub(named, "", why.removeprefix(f"{key!r}: ")).replace(repr(key), "it")


def _line(what: str, keys: list[str], why: str) -> str:
    one, many = _NOUNS.get(what, (what, what))
    if len(keys) == 1:
        return f"{one} of {keys[0]!r}: {why}"
    return f"{len(keys)} {many}, of {keys[0]!r} first: {why}"
