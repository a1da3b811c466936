"""
How keys of a store are shown as file names. Pure; the table for people is docs/names.md.

A key is cut at "/" into segments, and each segment is one name. A store allows segments that a file
system does not (empty, `.`, `..`, NUL, over 255 bytes) and an object `a` beside a directory `a/`.
Those, and only those, are shown under another name, made with `%` and a word (00, 25, 2E, empty,
file, ~). A `%` of the key itself is left alone unless such a word follows it; then it is written
`%25`. So each `%` with a word is ours, every name can be read back from left to right (`original`)
but for those that had to be cut, and no two segments have the same name. No word begins another one;
that is why the digest of a cut name is marked `%~` and not `%`, where `%25...` could be either.

The index asks for the name of every object that it lists, so what needs no change is told by a few
byte comparisons.
"""

import hashlib
import re

NAME_MAX = 255
"""Bytes of a file name on Linux."""

_DIGEST = 32
"""Hex digits in a name that was cut. 128 bits: two names of one directory must never meet."""
_BESIDE = b"%file"
_EMPTY = b"%empty"
_AMBIGUOUS = re.compile(rb"%(?=00|25|2E|empty|file|~)")
_ESCAPE = re.compile(rb"%(00|25|2E)")
_EXTENSION = re.compile(rb"\.[0-9A-Za-z]{1,15}\Z")
_PLAIN = {b"00": b"\0", b"25": b"%", b"2E": b"."}


def to_bytes(text: str) -> bytes:
    """Key or name as bytes. Raises UnicodeEncodeError on a surrogate that stands for no byte."""
    return text.encode("utf-8", "surrogateescape")


def to_text(raw: bytes) -> str:
    """The inverse of `to_bytes`."""
    return raw.decode("utf-8", "surrogateescape")


def shown(segment: str) -> bytes:
    """The file name of one segment of a key (what stands between two "/")."""
    raw = segment.encode("utf-8", "surrogateescape")
    if 2 < len(raw) <= NAME_MAX and b"%" not in raw and b"\0" not in raw and b"/" not in raw:
        return raw
    return _cut(_escaped(raw), raw, NAME_MAX)


def beside(segment: str) -> bytes:
    """The file name of an object beside a directory of the same segment, which keeps the plain name."""
    raw = to_bytes(segment)
    return _cut(_escaped(raw), raw, NAME_MAX - len(_BESIDE)) + _BESIDE


def original(name: bytes) -> str | None:
    """The segment that is shown as `name`, by itself or beside a directory; None where it was cut."""
    name = name.removesuffix(_BESIDE)
    if b"%~" in name:
        return None
    return "" if name == _EMPTY else to_text(_ESCAPE.sub(lambda m: _PLAIN[m[1]], name))


def directory(key: str) -> str:
    """The key of the directory that `key` is shown in; empty for what lies at the top."""
    above, slash, _ = key.removesuffix("/").rpartition("/")
    return above + slash


def _escaped(raw: bytes) -> bytes:
    if b"/" in raw:
        raise ValueError(f"{raw!r} is more than one segment of a key")
    if raw in (b".", b".."):
        return raw.replace(b".", b"%2E")
    return _AMBIGUOUS.sub(b"%25", raw).replace(b"\0", b"%00") or _EMPTY


def _cut(name: bytes, raw: bytes, room: int) -> bytes:
    """`name` in at most `room` bytes. A prefix and the extension are for people and their programs;
    what makes it one of its kind is the digest of the whole segment."""
    if len(name) <= room:
        return name
    found = _EXTENSION.search(name)
    tail = b"%~" + hashlib.blake2b(raw, digest_size=_DIGEST // 2).hexdigest().encode()
    tail += found[0] if found else b""
    end = room - len(tail)
    while end > room - len(tail) - 3 and name[end] & 0xC0 == 0x80:
        end -= 1  # not in the middle of a character
    return name[:end] + tail
