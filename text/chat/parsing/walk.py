"""The walk over an answer that all parsers have: text and reasoning up to a tag, calls behind one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from text.chat.parsing.calls import Calls, call_id
from text.chat.parsing.parts import Part
from text.chat.parsing.scan import SPACE, Broken, Reading, Scan

SPACE_MAX = 256  # characters next to a tag that are left out; looking for it again and again has to end


class Found(Protocol):
    """A tag in the text: a match of ``re`` or ``regex``."""

    def start(self) -> int: ...
    def end(self) -> int: ...


FoundT = TypeVar("FoundT", bound=Found)
TagT = TypeVar("TagT", bound=Found, covariant=True)


class Tags(Protocol[TagT]):
    """What is looked for."""

    def find(self, text: str, start: int, ended: bool) -> tuple[TagT | None, int]:
        """The first tag from ``start`` on that more text cannot change, and up to where there is none for sure."""
        ...

    def none_begins(self, text: str) -> bool:
        """Whether no tag begins in ``text``, whatever follows; False if that takes a closer look."""
        ...


class Walk(ABC, Generic[FoundT]):
    """A ``ReplyParser``; ``_answer`` is the way it goes."""

    def __init__(self, make_id: Callable[[], str] = call_id) -> None:
        self.broken = False
        self._scan = Scan()
        self._calls = Calls(self._scan, make_id)
        self._idle: Tags[FoundT] | None = None  # what is looked for, while nothing is held back
        self._reasons = False
        self._reading = self._answer()

    @abstractmethod
    def _answer(self) -> Reading[None]:
        """Reads the whole answer."""

    @property
    def calls(self) -> int:
        return self._calls.whole

    def push(self, text: str) -> list[Part]:
        if text and self._idle is not None and text[-1] not in SPACE and self._idle.none_begins(text):
            return [Part(text, "", text) if self._reasons else Part(text, text)]  # of nearly every token
        if text:
            self._scan.add(text)
            next(self._reading, None)
        return self._scan.take_parts()

    def flush(self) -> list[Part]:
        self._scan.ended = True
        next(self._reading, None)
        return self._scan.take_parts()

    def _up_to(self, tags: Tags[FoundT], *, reasoning: bool = False) -> Reading[FoundT | None]:
        """Puts out text or reasoning up to a tag and reads that, with the white space before it; None at the end."""
        scan = self._scan
        while True:
            scan.available()
            found, settled = tags.find(scan.text, scan.at, scan.ended)
            settled = len(scan.text) if found is None and scan.ended else self._before_space(settled)
            words = scan.text[scan.start : settled]
            end = found.end() - settled if found is not None else 0
            scan.at = settled
            scan.put(reasoning=words) if reasoning else scan.put(text=words)
            if found is not None:
                scan.at += end
                return found
            if scan.ended:
                return None
            self._idle, self._reasons = (tags if settled == len(scan.text) else None), reasoning
            yield
            self._idle = None

    def _before_space(self, settled: int) -> int:
        """Where the white space begins that a tag at ``settled`` takes with it, or may: there is a bound to it."""
        text, first = self._scan.text, settled
        while first < len(text) and text[first] in SPACE:  # some tags begin with it
            first += 1
        least = max(self._scan.start, first - SPACE_MAX)
        while settled > least and text[settled - 1] in SPACE:
            settled -= 1
        return max(settled, least)

    def _layout(self) -> Reading[None]:
        """Puts out a tag that was read, and the white space behind it, as nothing."""
        yield from self._scan.space()
        self._scan.put()

    def _reason(self, end: Tags[FoundT]) -> Reading[None]:
        """Reads reasoning, behind what begins it, and what ends it."""
        yield from self._layout()
        if (yield from self._up_to(end, reasoning=True)) is not None:
            yield from self._layout()

    def _call(self, reading: Reading[None]) -> Reading[None]:
        """A call, or several. What belongs to none is looked through again, behind what it began with."""
        scan = self._scan
        start, begun, put = scan.start, scan.at, scan.puts
        try:
            yield from reading
            yield from self._layout()
        except Broken:
            still = scan.puts == put
            self.broken = self.broken or begun > start or not still
            scan.at = begun if still else scan.start
            scan.put_as_text()
