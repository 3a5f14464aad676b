"""How long a context may be, and why not longer: the configuration's limit, frequencies that change.

A cap is said aloud wherever a user can meet it: when a service starts, in ``GetLoads``, in the error for a request
that is too long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

TABLES_THAT_CHANGE = {  # rope type -> what happens beyond the length it was made for
    "dynamic": "dynamic NTK scaling turns every key anew with the length of the prompt",
    "longrope": "longrope takes other frequencies for every key of a longer prompt",
}
LENGTH_NAMES = (
    *("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len"),
    "max_target_positions",
)
UNNAMED_LENGTH = 2**20


@dataclass(frozen=True)
class ContextLimit:
    """Most tokens of a context, of those that the configuration ``declared``; ``because`` is "" if they are equal."""

    tokens: int
    declared: int
    because: str = ""

    def __str__(self) -> str:
        if not self.because:
            return f"{self.tokens} tokens"
        return f"{self.tokens} of {self.declared} tokens, because {self.because}"

    def capped(self, tokens: int, because: str) -> ContextLimit:
        """This limit, or ``tokens`` if that is less."""
        return ContextLimit(tokens, self.declared, because) if tokens < self.tokens else self


def declared_limit(text_config: Any) -> ContextLimit:
    """What the configuration names, capped where it says that a longer context is computed in another way."""
    declared = _declared_length(text_config)
    limit = ContextLimit(declared, declared)
    for kind, length in _changing_ropes(text_config, limit.declared):
        limit = limit.capped(length, f"beyond {length} tokens {TABLES_THAT_CHANGE[kind]}")
    return limit


def spread(last: int, near: Iterable[int] = ()) -> list[int]:
    """Positions up to ``last``: 0, the powers of two, what is ``near``, the neighbours of these, and the last."""
    marks = [*(1 << bit for bit in range(max(last, 1).bit_length())), *near]
    return sorted({0, last, *(p for mark in marks for p in (mark - 1, mark, mark + 1) if 0 <= p <= last)})


def _declared_length(text_config: Any) -> int:
    """The longest context the configuration names, in tokens."""
    for name in LENGTH_NAMES:
        length = getattr(text_config, name, None)
        if length:
            return int(length)
    return UNNAMED_LENGTH


def rope_settings(text_config: Any) -> list[dict[str, Any]]:
    """Rope settings of the configuration; one for each kind of layer where they differ."""
    settings = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


def _changing_ropes(text_config: Any, declared: int) -> Iterator[tuple[str, int]]:
    """The rope types whose table changes with length, and the length up to which it does not."""
    for settings in rope_settings(text_config):
        kind = settings.get("rope_type", settings.get("type", "default"))
        kind = next((name for name in TABLES_THAT_CHANGE if name in str(kind)), "")
        if kind:
            original = settings.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", None
            )
            yield kind, min(int(original or declared), declared)
