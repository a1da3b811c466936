"""
Fields of an object, as its user wrote them: each knows its path, so that a refusal names it.

Pure. Whatever the API may hand out can be read: what is of another type than it should be is a SettingError
with the path of the field, what stands there, and what would be right. What may be a secret is not quoted.
"""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

from datacache.config.keys import Kind
from datacache.errors import SettingError
from datacache.telemetry import redact

MAX_TEXT = 4096
"""Characters of one value: the longest path there is."""

_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(m|k|[MGTPE]|[KMGTPE]i|[eE][0-9]{1,2})?", re.ASCII)
_UNITS = {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(1000)}
_UNITS |= {name: Decimal(1000) ** (i + 2) for i, name in enumerate("MGTPE")}
_UNITS |= {f"{name}i": Decimal(1024) ** (i + 1) for i, name in enumerate("KMGTPE")}


def parse_quantity(text: str) -> Decimal:
    """The number that a Kubernetes quantity stands for: "500m", "20M" (decimal), "40Gi" (binary), "1e3".

    Not as `model.parse_size`, to which M is a mebibyte. Raises ValueError.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(text)
    unit = match[2] or ""
    return Decimal(match[1]) * (_UNITS[unit] if unit in _UNITS else Decimal(10) ** int(unit[1:]))


class Field:
    """What stands at `path` of an object. A field that is not there, or null, is not `given`."""

    __slots__ = ("path", "value")

    def __init__(self, path: str, value: Any) -> None:
        self.path, self.value = path, value

    def __repr__(self) -> str:
        return f"<Field {self.path}>"

    @property
    def given(self) -> bool:
        return self.value is not None

    def refuse(self, expected: str, *, hide: bool = False) -> SettingError:
        """The error to raise. `hide`: what stands there may be a secret."""
        return SettingError(self.path, "***" if hide else _shown(self.value), expected)

    # Parts

    def __getitem__(self, key: str) -> "Field":
        return Field(f"{self.path}.{key}" if self.path else key, self._mapping().get(key))

    def only(self, *known: str) -> "Field":
        """Itself, when it has no other members than `known`."""
        for key in self._mapping():
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise SettingError(
                    self.path, str(key)[:200], f"a field that there is ({', '.join(known)}){hint}"
                )
        return self

    def items(self) -> list["Field"]:
        """The items of a list; none when it is not given."""
        if self.value is None:
            return []
        if not isinstance(self.value, list | tuple):
            raise self.refuse("a list")
        return [Field(f"{self.path}[{i}]", item) for i, item in enumerate(self.value)]

    def members(self) -> dict[str, "Field"]:
        """The members of a mapping; none when it is not given."""
        return {
            key: Field(f"{self.path}[{key[:100] if key.isprintable() else ascii(key[:100])}]", value)
            for key, value in self._mapping().items()
        }

    def _mapping(self) -> Mapping[str, Any]:
        if self.value is None:
            return {}
        if not isinstance(self.value, Mapping) or not all(isinstance(key, str) for key in self.value):
            raise self.refuse("an object with fields")
        return self.value

    # Values

    def text(self, expected: str = "a text") -> str:
        if not isinstance(self.value, str) or not self.value or len(self.value) > MAX_TEXT:
            raise self.refuse(expected)
        return self.value

    def matching(self, pattern: str, expected: str) -> str:
        """A text all of which `pattern` fits."""
        text = self.text(expected)
        if not re.fullmatch(pattern, text, re.ASCII):
            raise self.refuse(expected)
        return text

    def read(self, kind: Kind) -> Any:
        """The value that `kind` reads, as for a flag."""
        if isinstance(self.value, bool) or not isinstance(self.value, str | int | float):
            raise self.refuse(kind.expected)
        try:
            if len(str(self.value)) > MAX_TEXT:
                raise ValueError
            return kind.read(str(self.value))
        except (ValueError, KeyError, OverflowError, SettingError) as error:
            raise self.refuse(kind.expected) from error

    def flag(self, *, default: bool) -> bool:
        if self.value is None:
            return default
        if not isinstance(self.value, bool):
            raise self.refuse("true or false")
        return self.value

    def whole(self, low: int, high: int) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not low <= self.value <= high:
            raise self.refuse(f"a whole number, {low} to {high}")
        return self.value

    def one_of(self, known: Iterable[str], *, default: str | None = None) -> str:
        names = list(known)
        if self.value is None and default is not None:
            return default
        if self.value not in names:
            raise self.refuse(" or ".join(names))
        return str(self.value)

    def quantity(self) -> Decimal:
        """The number of a quantity, which the API hands out as text or as a number."""
        try:
            if isinstance(self.value, bool) or not isinstance(self.value, str | int):
                raise ValueError
            return parse_quantity(str(self.value))
        except ValueError as error:
            raise self.refuse("a quantity such as 40Gi, 20M or 500m") from error

    def size(self, low: int, high: int) -> int:
        """Bytes of a quantity."""
        number = self.quantity()
        if number != int(number) or not low <= number <= high:
            raise self.refuse(f"a size such as 40Gi or 1Ti, at most {high >> 40}Ti")
        return int(number)


def _shown(value: Any) -> object:
    if isinstance(value, str):
        return redact(value[:200])
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, int) and abs(value) >= 2**64:  # no number of the API; its digits may be many
        return "a very large number"
    return "" if value is None else value
