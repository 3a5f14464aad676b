"""The sandbox of chat templates: what it offers, and what ends in it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from jinja2.exceptions import SecurityError

from text.chat.sandbox import Sandbox, TooMuch


def render(source: str, *, seconds: float = 5.0, characters_max: int = 1 << 20, **variables: Any) -> str:
    return Sandbox(source).render(variables, characters_max=characters_max, seconds=seconds)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for a in [1, 2, 3] %}{% if a == 2 %}{% break %}{% endif %}{{ a }}{% endfor %}", "1"),
        ("{% set n = namespace(a=1) %}{% for b in [2] %}{% set n.a = b %}{% endfor %}{{ n.a }}", "2"),
        ("{{ dict(a=1)['a'] }}{{ strftime_now('%%') }}", "1%"),
        ("{% generation %}{% set a = 1 %}x{% endgeneration %}{{ a is defined }}", "xFalse"),
        ("{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ '%5d' % 7 }}", "ababab1024    7"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    ],
)
def test_what_templates_are_written_against(source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 99999999 }}",
        "{{ 99999999 * 'x' }}",
        "{{ [1] * 99999999 }}",
        "{{ 99 ** 99999999 }}",
        "{{ '%99999999d' % 1 }}",
        "{{ '%*d' % (99999999, 1) }}",
        "{% for a in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}",
    ],
)
def test_what_would_be_too_large_is_refused_before_it_is_made(source: str) -> None:
    with pytest.raises(TooMuch):
        render(source)


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(TooMuch, match="too long"):
        render("{% for a in range(9999) %}{% for b in range(9999) %}{{ a.b }}{% endfor %}{% endfor %}", seconds=0.1)
    with pytest.raises(RecursionError):
        render("{% macro m(a) %}{{ m(a) }}{% endmacro %}{{ m(1) }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__init__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__globals__ }}",
    ],
)
def test_nothing_leads_out_of_it_or_changes_what_it_was_given(source: str) -> None:
    given: list[int] = []
    with contextlib.suppress(SecurityError):
        assert render(source, messages=given) == ""
    assert given == []
