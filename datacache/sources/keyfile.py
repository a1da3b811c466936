"""
Keys that lie in a file, or in a directory with one file for each: a mounted Secret.

They are read whenever they are asked for (50 µs), so a rotation is noticed by itself. The one
danger is to read one half before the rotation and the other after it: a directory is read until
two readings agree.
"""

import configparser
import os
from typing import NamedTuple

from datacache.config.schemes import key_part
from datacache.errors import Denied


class Keys(NamedTuple):
    """What requests are signed with. Its `repr` tells no secret."""

    access_key: str
    secret_key: str
    token: str = ""

    def __repr__(self) -> str:
        return f"<keys of {self.access_key}>"


_LARGEST = 64 * 1024  # no key is longer; a wrong path may well be


def read_keys(path: str, *, section: str = "") -> Keys:
    """The keys in the file or directory `path`; `section` picks one of an INI file. Raises Denied."""
    try:
        if not os.path.isdir(path):
            return _complete(_from_ini(path, section), path)
        first = _from_directory(path)
        for _ in range(5):
            second = _from_directory(path)
            if first == second:
                break
            first = second
        return _complete(first, path)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        # The text of a parser's error quotes the line: a secret. Its type has to do.
        said = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise Denied(f"credentials {path} cannot be read ({said})") from None


def _complete(found: dict[int, str], path: str) -> Keys:
    if not found.get(0) or not found.get(1):
        raise Denied(f"credentials {path} hold no aws_access_key_id and aws_secret_access_key")
    return Keys(found[0], found[1], found.get(2, ""))


def _from_ini(path: str, section: str) -> dict[int, str]:
    parser = configparser.RawConfigParser(default_section="")
    with open(path, encoding="utf-8") as file:
        parser.read_string(file.read(_LARGEST))
    sections = parser.sections()
    wanted = section or ("default" if "default" in sections or not sections else sections[0])
    if wanted not in sections:
        raise Denied(f"credentials {path} have no section [{wanted}]")
    pairs = ((key_part(name), value) for name, value in parser.items(wanted))
    return {place: value.strip() for place, value in pairs if place is not None}


def _from_directory(path: str) -> dict[int, str]:
    found = {}
    for name in sorted(os.listdir(path)):
        place = key_part(name)
        if place is not None:
            with open(os.path.join(path, name), encoding="utf-8") as file:
                found[place] = file.read(_LARGEST).strip()
    return found
