"""What no form can mean is refused before it is compiled, and told by line."""

from __future__ import annotations

import pytest

from tests.text.grammar.answers import refusal
from text.grammar.forms import Form


@pytest.mark.parametrize(
    ("form", "source", "complaint"),
    [
        ("regex", "", "is empty"),
        ("lark", "start: %json", "line 1, the schema behind %json: "),
        ("lark", '\nstart: %json {"properties": {"a": {"not": {}}}}', "line 2, the schema behind %json: at /prop"),
        ("json_schema", "false", "at the root: false allows nothing"),
        ("lark", "start: %json false", "line 1, the schema behind %json: false allows nothing"),
        ("lark", 'start: %json {"maxLength": 1e400}', "line 1, the schema behind %json: is no JSON: the number 1e400"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(form: Form, source: str, complaint: str) -> None:
    assert complaint in refusal(form, source)
