"""An answer read in pieces, and what must hold of every answer however it is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from text.chat.parsing.parts import Part, ReplyParser

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "hourly": {"type": "boolean"}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, TIME]


@dataclass(frozen=True)
class Read:
    """What an application sees of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    whole: int = 0
    broken: bool = False


def pieces(text: str, length: int) -> list[str]:
    return [text[at : at + length] for at in range(0, len(text), length)]


def read(parser: ReplyParser, given: Iterable[str]) -> Read:
    """What comes out; nothing may be missing of what went in."""
    given = list(given)
    parts = [part for piece in given for part in parser.push(piece)] + parser.flush()
    assert "".join(part.raw for part in parts) == "".join(given), "characters are missing, or are there twice"
    for part in parts:
        said = [bool(part.text), bool(part.reasoning), part.call is not None]
        assert sum(said) <= 1
        if part.text or part.reasoning:
            assert part.text + part.reasoning == part.raw, "words were changed"
    return Read(
        "".join(part.text for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(_calls(parts)),
        parser.calls,
        parser.broken,
    )


def read_however_cut(make: Callable[[], ReplyParser], text: str) -> Read:
    """What comes out, the same a character at a time, in small pieces and at once."""
    found = {read(make(), pieces(text, length)) for length in (1, 2, 3, 5, 7, 11, max(1, len(text)))}
    assert len(found) == 1, found
    return found.pop()


def _calls(parts: Iterable[Part]) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    ids: set[str] = set()
    for part in parts:
        if part.call is None:
            continue
        if part.call.index == len(calls):
            assert part.call.id and part.call.id not in ids and part.call.name
            ids.add(part.call.id)
            calls.append((part.call.name, ""))
        else:
            assert part.call.index == len(calls) - 1 and not part.call.id and not part.call.name
        calls[-1] = (calls[-1][0], calls[-1][1] + part.call.arguments)
    return calls
