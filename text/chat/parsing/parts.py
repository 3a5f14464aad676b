"""What comes out of an answer: text, reasoning and tool calls, in pieces and in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class CallPart:
    """More of one tool call. ``id`` and ``name`` come with its first part, alone or not; ``arguments`` are appended."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Part:
    """One of ``text``, ``reasoning`` and ``call``, or none of them.

    ``raw``: the characters of the answer that it stands for, with the tags around them. All ``raw`` in a row are the
    answer. What ``raw`` has more than the rest are tags of calls and reasoning, the white space next to them, and how
    a call was spelt.
    """

    raw: str
    text: str = ""
    reasoning: str = ""
    call: CallPart | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.text or self.reasoning or self.call)


class ReplyParser(Protocol):
    """Of one answer. Nothing is ever lost: what is no call after all comes out as text, each character once."""

    @property
    def calls(self) -> int:
        """How many calls have come in full: their arguments are a whole JSON object."""
        ...

    @property
    def broken(self) -> bool:
        """Whether something began like a tool call and was none, or went on otherwise: that is in the text."""
        ...

    def push(self, text: str) -> list[Part]:
        """What ``text`` settles; the rest waits for more."""
        ...

    def flush(self) -> list[Part]:
        """The rest, once no more comes."""
        ...
