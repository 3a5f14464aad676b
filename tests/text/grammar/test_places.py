"""What cannot be compiled is told by its place in what was sent."""

from __future__ import annotations

import pytest

from tests.text.grammar.answers import refusal
from text.grammar.forms import Form


@pytest.mark.parametrize(
    ("form", "source", "complaint"),
    [
        ("regex", "ab(c", "character 3: unclosed group"),
        ("regex", "a$b", "cannot be compiled: "),
        ("regex", "(?=a)b", "character 1: look-around"),
        ("lark", 'begin: "a"', "no start rule"),
        ("lark", "start: a", 'line 1, column 8: unknown name: "a"'),
        ("lark", 'start: b\nb: "x" /[/', "line 2, column 4: unclosed character class"),
        ("json_schema", '{"type": "object", "required": ["a"], "additionalProperties": false}', "at the root: "),
        ("json_schema", '{"type": "array", "items": {"type": "null", "enum": [1]}, "minItems": 1}', "at /items: "),
        ("json_schema", '{"items": {"$ref": "#/$defs/b"}, "$defs": {"b": {"pattern": "["}}}', "at /$defs/b: unclosed"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_by_place(form: Form, source: str, complaint: str) -> None:
    assert complaint in refusal(form, source)
