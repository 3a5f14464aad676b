"""The text of an answer as it streams: tokens in, text out, and stop strings that are never shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from text.codec import TextStream


class Token(Protocol):
    """A token of an answer, with whatever else its maker keeps of it."""

    @property
    def token_id(self) -> int: ...


TokenT = TypeVar("TokenT", bound=Token)


@dataclass(frozen=True)
class TextDelta(Generic[TokenT]):
    """New text and the tokens that were taken. ``stopped``: a stop string was found; nothing comes after."""

    text: str
    choices: tuple[TokenT, ...]
    stopped: bool


class AnswerText:
    """Turns tokens into text, holding back what may be the beginning of a stop string."""

    def __init__(self, stream: TextStream, stop: Sequence[str], min_tokens: int = 0) -> None:
        """Stop strings that are complete before ``min_tokens`` tokens are text like any other."""
        self._stream = stream
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._held = ""
        self.tokens = 0

    def push(self, choices: Sequence[TokenT]) -> TextDelta[TokenT]:
        """Takes tokens up to the one that completes a stop string."""
        text = ""
        for count, choice in enumerate(choices, start=1):
            self.tokens += 1
            self._held += self._stream.push(choice.token_id)
            if self.tokens < self._min_tokens:
                text, self._held = text + self._held, ""
                continue
            found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
            if found:
                text += self._held[: min(found)]
                self._held = ""
                return TextDelta(text, tuple(choices[:count]), stopped=True)
            keep = self._could_be_stop()
            text += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        return TextDelta(text, tuple(choices), stopped=False)

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        text, self._held = self._held + self._stream.flush(), ""
        return text

    def _could_be_stop(self) -> int:
        """Characters at the end of the held text that begin a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
