"""The JSON object of a request, taken apart field by field: each is read, refused or known to be harmless.

What is left over at the end is an error, so nothing that a caller asks for is ignored in silence. ``null`` is as good
as leaving a field out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.errors import invalid


class Fields:
    """One object. ``path`` is how errors name it, "" for the request itself."""

    def __init__(self, values: Any, path: str = "") -> None:
        if not isinstance(values, dict):
            raise invalid(path, f"must be an object, not {_kind(values)}")
        self._left = {name: value for name, value in values.items() if value is not None}
        self.path = path

    def name(self, name: str) -> str:
        """A field's name as errors bear it."""
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether a field is there and was not taken yet."""
        return name in self._left

    def peek(self, name: str) -> Any:
        """A field's value, which is left to be taken."""
        return self._left.get(name)

    def take(self, name: str) -> Any:
        """A field's value, whatever it is; None if it is not there."""
        return self._left.pop(name, None)

    def boolean(self, name: str) -> bool | None:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise invalid(self.name(name), f"must be true or false, not {_kind(value)}")
        return value

    def integer(self, name: str, least: int, most: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise invalid(self.name(name), f"must be a whole number, not {_kind(value)}")
        if not least <= value <= most:
            raise invalid(self.name(name), f"must be in {least}..{most}, not {value}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise invalid(self.name(name), f"must be a number, not {_kind(value)}")
        if not least <= value <= most or not math.isfinite(value):
            raise invalid(self.name(name), f"must be in {least:g}..{most:g}, not {value}")
        return float(value)

    def string(self, name: str, choices: Sequence[str] = ()) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise invalid(self.name(name), f"must be a string, not {_kind(value)}")
        if value is not None and choices and value not in choices:
            raise invalid(self.name(name), f"must be one of {', '.join(choices)}")
        return value

    def required(self, name: str) -> str:
        """A string that must be there."""
        value = self.string(name)
        if not value:
            raise invalid(self.name(name), "is required")
        return value

    def items(self, name: str) -> list[Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise invalid(self.name(name), f"must be a list, not {_kind(value)}")
        return value

    def strings(self, name: str, *, or_one: bool = False) -> list[str] | None:
        """A list of strings; with ``or_one`` a string is a list of it."""
        value = self.take(name)
        if or_one and isinstance(value, str):
            return [value]
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise invalid(self.name(name), f"must be {'a string or ' if or_one else ''}a list of strings")
        return value

    def integers(self, name: str) -> list[int] | None:
        value = self.take(name)
        if value is not None and not (isinstance(value, list) and all(type(item) is int for item in value)):
            raise invalid(self.name(name), "must be a list of whole numbers")
        return value

    def object(self, name: str) -> Fields | None:
        value = self.take(name)
        return None if value is None else Fields(value, self.name(name))

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object that is passed on as it is."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise invalid(self.name(name), f"must be an object, not {_kind(value)}")
        return value

    def harmless(self, *names: str) -> None:
        """Fields that mean nothing here and change nothing of an answer."""
        for name in names:
            self.take(name)

    def only(self, name: str, *accepted: Any, why: str) -> None:
        """A field of which no value but ``accepted`` can be served: 400 for any other."""
        value = self.take(name)
        if value is not None and not any(value == fine and type(value) is type(fine) for fine in accepted):
            raise invalid(self.name(name), why, "unsupported_parameter")

    def end(self) -> None:
        """Raises 400 for the first field that nobody took."""
        for name in self._left:
            shown = self.name(name if len(name) <= 64 else f"{name[:64]}...")
            raise invalid(shown, "is not a parameter that is served here", "unknown_parameter")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")
