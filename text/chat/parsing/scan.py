"""Reading text that is still coming, and putting out parts of it such that every character is in one.

Whoever reads is a generator that yields when it needs more text. What was read and not put out is pending: it becomes
part of what is put out next, or text, if it turns out to be nothing else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeAlias, TypeVar

from text.chat.parsing.parts import CallPart, Part

T = TypeVar("T")
Reading: TypeAlias = Generator[None, None, T]

FORGET_AT = 4096  # characters that are out and still kept
SPACE = frozenset(" \t\r\n")


class Broken(Exception):
    """What stands here is not what was begun."""


class Scan:
    """The text of one answer between what was put out and what has not come yet."""

    def __init__(self) -> None:
        self.text = ""
        self.start = 0  # where in it what is pending begins; places in it stay what they are until something is put out
        self.at = 0  # up to where it was read
        self.ended = False
        self.puts = 0
        self.foreign = 0  # characters to come out first that are of the prompt
        self._parts: list[Part] = []
        self._arrived: list[str] = []  # behind ``text``
        self._absent: set[str] = set()  # what does not come any more

    # -- what comes in ------------------------------------------------------------------------------
    def add(self, text: str) -> None:
        self._arrived.append(text)

    def take_parts(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def available(self) -> bool:
        """Whether there is text to read now."""
        if self._arrived:
            self.text = "".join((self.text, *self._arrived))
            self._arrived.clear()
        return self.at < len(self.text)

    # -- reading ------------------------------------------------------------------------------------
    def peek(self) -> Reading[str]:
        """The next character, which is not read by this; "" at the end."""
        while not self.available():
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def space(self) -> Reading[None]:
        """Reads white space."""
        while (character := (yield from self.peek())) and character in SPACE:
            self.at += 1

    def literal(self, expected: str) -> Reading[None]:
        """Reads exactly this. Raises ``Broken`` where something else stands."""
        for character in expected:
            if (yield from self.peek()) != character:
                raise Broken
            self.at += 1

    def one_of(self, choices: Iterable[str]) -> Reading[str]:
        """Reads the one of ``choices`` that stands here, the longest of several. Raises ``Broken`` if none does."""
        left, found, read = list(choices), "", ""
        begun = self.at
        while left and (character := (yield from self.peek())):
            left = [choice for choice in left if choice.startswith(read + character)]
            if not left:
                break
            read, self.at = read + character, self.at + 1
            found = read if read in left else found
            left = [choice for choice in left if choice != read]
        if not found:
            raise Broken
        self.at = begun + len(found)
        return found

    def until(self, end: str, longest: int = 0) -> Reading[str]:
        """Reads up to ``end`` and over it; returns what stands before.

        Raises ``Broken`` if it does not come, or not within ``longest`` characters, where there is such a limit.
        """
        if end in self._absent:
            raise Broken
        self.available()
        found, seen = self.text.find(end, self.at), 0  # pieces of what arrived since
        tail = self.text[max(self.at, len(self.text) - len(end) + 1) :]
        length = len(self.text) - self.at
        while found < 0:
            if seen == len(self._arrived) and self.ended:
                self._absent.add(end)
                raise Broken
            if longest and length > longest + len(end):
                raise Broken
            if seen == len(self._arrived):
                yield
                continue
            tail, seen, length = tail + self._arrived[seen], seen + 1, length + len(self._arrived[seen])
            if end in tail:
                self.available()
                found = self.text.index(end, self.at)
            tail = tail[max(0, len(tail) - len(end) + 1) :]
        if longest and found - self.at > longest:
            raise Broken
        before = self.text[self.at : found]
        self.at = found + len(end)
        return before

    # -- what goes out ------------------------------------------------------------------------------
    def put(self, *, text: str = "", reasoning: str = "", call: CallPart | None = None) -> None:
        """Puts out all that was read, as this."""
        if self.at > self.start or call is not None:
            self.puts += 1
            own = min(self.foreign, self.at - self.start)
            self._parts.append(Part(self.text[self.start + own : self.at], text[own:], reasoning[own:], call))
            self.start, self.foreign = self.at, self.foreign - own
            if self.start > FORGET_AT:
                self.text, self.at, self.start = self.text[self.start :], 0, 0

    def put_as_text(self) -> None:
        """Puts out what was read, as text."""
        self.put(text=self.text[self.start : self.at])
