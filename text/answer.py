"""The text of an answer as it streams: tokens in, text out, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from text.stream import TextStream


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

    def __init__(
        self, stream: TextStream, stop: Sequence[str], min_tokens: int = 0, *, include_stop: bool = False
    ) -> None:
        """Stop strings that begin before the token number ``min_tokens`` are text like any other.

        The one that ends the answer is not shown, or with ``include_stop`` is the end of what is shown.
        """
        self._stream = stream
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._held = ""
        self.tokens = 0

    def push(self, choices: Sequence[TokenT]) -> TextDelta[TokenT]:
        """Takes tokens up to the one that completes a stop string."""
        if not self._stop:
            self.tokens += len(choices)
            push = self._stream.push
            return TextDelta("".join([push(choice.token_id) for choice in choices]), tuple(choices), stopped=False)
        text = ""
        for count, choice in enumerate(choices, start=1):
            self.tokens += 1
            self._held += self._stream.push(choice.token_id)
            shown, stopped = self._take(keep=True)
            text += shown
            if stopped:
                return TextDelta(text, tuple(choices[:count]), stopped=True)
        return TextDelta(text, tuple(choices), stopped=False)

    def flush(self) -> tuple[str, bool]:
        """What was held back, once no more tokens come, and whether its end completed a stop string."""
        self._held += self._stream.flush()
        return self._take(keep=False)

    def _take(self, *, keep: bool) -> tuple[str, bool]:
        """The held text that may be shown, and whether a stop string ends it: of several the one complete first."""
        shown, stopped, held = self._held, False, ""
        if self.tokens >= self._min_tokens:
            found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
            if found:
                end, at = min(found)
                shown, stopped = self._held[: end if self._include_stop else at], True
            elif keep:
                split = len(self._held) - self._could_be_stop()
                shown, held = self._held[:split], self._held[split:]
        self._held = held
        return shown, stopped

    def _could_be_stop(self) -> int:
        """Characters at the end of the held text that begin a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
