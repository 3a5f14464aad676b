"""Which place of a grammar is wrong, and why: what llguidance says, in terms of what was sent."""

from __future__ import annotations

import re
from typing import Any

from text import json_schema
from text.errors import TextRefused

_PLACE = re.compile(r"^at (\d+)\((\d+)\): (.*)$", re.DOTALL)
_DRAWING = "\n   1 |"


def _place_in_schema(source: str, said: str, failing: Any) -> TextRefused:
    pointer, problem = json_schema.place_of_failure(json_schema.parse(source or "{}"), said, failing)
    return TextRefused(f"at {pointer or 'the root'}: {_problem_of_regex(problem) or problem or said}")


def _place_in_regex(source: str, said: str, failing: Any) -> TextRefused:
    """What the parser of regular expressions draws: the expression, an arrow below, the problem."""
    lines = said.splitlines()
    arrow = next((line for line in lines if line.strip() and not line.strip("^ ")), "")
    problem = _problem_of_regex(said)
    if arrow and problem and "\n" not in source:
        return TextRefused(f"character {arrow.index('^') - 3}: {problem}")
    found = _PLACE.match(said)
    return TextRefused(f"cannot be compiled: {problem or (found[3].split(_DRAWING)[0] if found else said)}")


def _place_in_lark(source: str, said: str, failing: Any) -> TextRefused:
    found = _PLACE.match(said)
    if found is None:
        return TextRefused(said)
    problem = _problem_of_regex(found[3]) or re.split(r"\n +\d+ \|", found[3])[0]
    return TextRefused(f"line {found[1]}, column {found[2]}: {problem}")


def _problem_of_regex(said: str) -> str:
    """Of the drawing that the parser of regular expressions makes, the words."""
    return next((line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")), "")


PLACES = {
    "json_schema": _place_in_schema,
    "json_object": _place_in_schema,
    "regex": _place_in_regex,
    "lark": _place_in_lark,
}
