"""Tells text, reasoning and tool calls apart in answers of one of the known forms."""

from __future__ import annotations

import re
from collections.abc import Collection

from text.chat.parsing.forms import Form
from text.chat.parsing.scan import Reading
from text.chat.parsing.walk import Walk
from text.chat.parsing.xml_calls import Schemas


class Words:
    """Tags that are words, to be found in text that is still coming."""

    def __init__(self, words: Collection[str]) -> None:
        ordered = sorted(words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) if ordered else "(?!)")
        initials = "".join(sorted({re.escape(word[0]) for word in words}))
        self._initials = re.compile(f"[{initials}]" if words else "(?!)")
        self._begun = frozenset(word[:length] for word in words for length in range(1, len(word)))
        self._longest = max(map(len, words), default=1) - 1

    def find(self, text: str, start: int, ended: bool) -> tuple[re.Match[str] | None, int]:
        found = self._pattern.search(text, start)
        if found is not None:
            return found, found.start()
        for begin in range(max(start, len(text) - self._longest), len(text)):
            if text[begin:] in self._begun:
                return None, begin
        return None, len(text)

    def none_begins(self, text: str) -> bool:
        return self._initials.search(text) is None


class FormParser(Walk["re.Match[str]"]):
    """Parses an answer of ``form``. A ``ReplyParser``.

    ``schemas`` are those of the tools that may be called, None if none may: calls are text then. ``reasoning_end``:
    the prompt has begun reasoning, which ends with this.
    """

    def __init__(self, form: Form, schemas: Schemas | None, reasoning_end: str = "") -> None:
        self._schemas = schemas or {}
        self._openers = form.openers if schemas is not None else {}
        self._first = form.first if schemas is not None else None
        self._reasoning = form.reasoning
        self._reasoning_end = reasoning_end
        self._tags = Words((*self._openers, *self._reasoning, *(form.layout if schemas is not None else ())))
        super().__init__(form.make_id)

    def _answer(self) -> Reading[None]:
        if self._reasoning_end:
            yield from self._reason(Words((self._reasoning_end,)))
        begins = True  # nothing has come but reasoning
        while True:
            if begins and self._first is not None:
                yield from self._call(self._first(self._scan, self._calls, self._schemas))
            found = yield from self._up_to(self._tags)
            if found is None:
                return
            tag = found.group()
            begins = begins and tag in self._reasoning
            if tag in self._reasoning:
                yield from self._reason(Words((self._reasoning[tag],)))
            elif tag in self._openers:
                yield from self._call(self._openers[tag](self._scan, self._calls, self._schemas))
            else:
                yield from self._layout()
