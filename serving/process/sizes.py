"""Sizes in bytes as people write them."""

from __future__ import annotations

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ "
_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def nbytes(text: str) -> int:
    """A size in bytes, for example ``10GiB``, ``500MB`` or ``1048576``. Raises ``ValueError``."""
    digits = text.strip().rstrip(_LETTERS)
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write for example 10GiB") from None
    if size < 1:
        raise ValueError(f"{text!r} is less than a byte")
    return size
