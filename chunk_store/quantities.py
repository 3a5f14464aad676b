"""Sizes, rates and durations as people write and read them."""

from __future__ import annotations

import re

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*(?:([kmgt]i?)?(bit|b))?(/s|ps)?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9.eE+-]+?)\s*(ms|s|m|min|h|d)?")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_nbytes(text: str) -> int:
    """A size in bytes, for example ``10GiB``, ``500MB`` or ``1048576``. Raises ``ValueError``."""
    found = _AMOUNT.fullmatch(text.strip())
    size = 0.0 if found is None or found[4] or (found[3] or "").lower() == "bit" else _nbytes(found)
    if not 1 <= size < float("inf"):
        raise ValueError(f"{text!r} is not a size; write for example 10GiB")
    return int(size)


def parse_rate(text: str) -> float:
    """Bytes a second, of ``25Gbit/s``, ``3GB/s`` or ``800MiB``. Raises ``ValueError``."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[3] in (None, "b") or not 0 < _nbytes(found) < float("inf"):  # "b" may mean either
        raise ValueError(f"{text!r} is not a bandwidth; write for example 25Gbit/s or 3GB/s")
    return _nbytes(found)


def parse_seconds(text: str) -> float:
    """A duration, in seconds or with a unit: ``90``, ``500ms``, ``15m``, ``2h``, ``7d``. Raises ``ValueError``."""
    match = _DURATION.fullmatch(text.strip())
    try:
        seconds = float(match[1]) * _UNIT_S[match[2] or "s"] if match else float("nan")
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        shown = repr(text if len(text) <= 80 else f"{text[:77]}...")
        raise ValueError(
            f"must be a positive number of seconds or a duration such as 500ms, 15m, 2h or 7d, not {shown}"
        )
    return seconds


def human_bytes(count: float) -> str:
    """A size in binary units, such as ``1.5 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """How long something took, such as ``3.2 ms``, ``1.5 s`` or ``2 min 5 s``."""
    if seconds < 0.99995:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 59.95 else human_age(seconds)


def human_age(seconds: float) -> str:
    """A span in whole seconds and at most two units, such as ``5 s``, ``2 min 5 s``, ``3 h 20 min`` or ``5 d``."""
    whole = max(0, round(seconds))
    for size, unit, part, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit} {rest} {below}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def _nbytes(amount: re.Match[str]) -> float:
    number, prefix, unit = (part or "" for part in amount.groups()[:3])
    base = 1024 if prefix.lower().endswith("i") else 1000
    power = " kmgt".index((prefix or " ")[0].lower())
    return float(number) * float(base**power) / (8 if unit.lower() == "bit" else 1)
