"""Whatever a model writes and however it comes in pieces: the same comes out, and every character is accounted for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS

from tests.text.chat.parsing.reading import TOOLS, read
from text.chat.parsing import forms
from text.chat.parsing.form_parser import FormParser
from text.chat.parsing.forms import Form
from text.chat.parsing.parts import ReplyParser
from text.chat.parsing.template_parser import TemplateParser, load_template
from text.chat.parsing.xml_calls import schemas_of

SCHEMAS = schemas_of(TOOLS)
FORMS = [each for each in vars(forms).values() if isinstance(each, Form)]
TEMPLATES = {types[0]: load_template(template) for types, template in _RESPONSE_TEMPLATE_FALLBACKS.items()}
PIECES = [
    *('{"name": ', '"get_weather"', '"time"', ', "arguments": ', ', "parameters": ', '{"city": "Paris"}', "{}", "}"),
    *("[", "]", ", ", "; ", '"', "\\", "\n", " ", "a", "é🍵", "null", "-1.5e3", '{"a": [1, {"b": ', "<", "</"),
    *("}}", "functions."),
    *("get_weather", "time", "(city='Paris')", "()", "<function=", "<parameter=", ">", "</parameter>", "</function>"),
    *("```json", "```", "[ARGS]", "[CALL_ID]", ":0", "{'a': 1}", '<|"|>', "{city:", "<|im_end|>", "call:"),
]  # fmt: skip
TAGS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<|tool_call>call:time", "<tool_call|>", "<|channel>thought\n"),
]
PARSERS: dict[str, tuple[Callable[[], ReplyParser], list[str]]] = {
    **{form.name: (partial(FormParser, form, SCHEMAS), list(form.tags)) for form in FORMS},
    **{name: (partial(TemplateParser, template, SCHEMAS), TAGS) for name, template in TEMPLATES.items()},
}


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_however_an_answer_is_cut_the_same_comes_out_and_nothing_is_lost(name: str, data: Any) -> None:
    make, tags = PARSERS[name]
    words = st.sampled_from(tags) | st.sampled_from(PIECES) | st.text(max_size=3)
    text = "".join(data.draw(st.lists(words, max_size=14)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    whole = read(make(), [text])  # which sees that the parts are the text, in order
    assert read(make(), [text[a:b] for a, b in itertools.pairwise(cuts)]) == whole
    assert read(make(), list(text)) == whole
    assert whole.whole <= len(whole.calls)
    for _, arguments in whole.calls[: whole.whole] if whole.whole == len(whole.calls) else ():
        assert isinstance(json.loads(arguments), dict)


VALUES = st.none() | st.integers() | st.text(max_size=4) | st.lists(st.booleans())


@settings(max_examples=100, deadline=None)
@given(
    reasoning=st.none() | st.text("ab <\n", max_size=8),
    parts=st.lists(
        st.text("xy <}\n", max_size=8)
        | st.dictionaries(
            st.text(max_size=4), st.none() | st.integers() | st.text(max_size=4) | st.lists(st.booleans())
        ),
        max_size=5,
    ),
    indent=st.sampled_from([None, 1]),
    length=st.integers(1, 9),
)
def test_what_comes_out_written_again_is_the_answer(
    reasoning: str | None, parts: list[Any], indent: int | None, length: int
) -> None:
    """But for the white space next to tags."""

    def written(thought: str | None, said: list[Any]) -> str:
        text = "" if thought is None else f"<think>{thought}</think>"
        for each in said:
            call = f'<tool_call>{{"name": "time", "arguments": {each}}}</tool_call>'
            text += call if each.startswith("{") else each
        return text

    given = [each if isinstance(each, str) else json.dumps(each, indent=indent) for each in parts]
    text = written(reasoning, given)
    parser = FormParser(forms.HERMES, SCHEMAS)
    out = [part for at in range(0, len(text), length) for part in parser.push(text[at : at + length])] + parser.flush()
    said: list[Any] = []
    for part in out:
        if part.call is not None and part.call.id:
            said.append(part.call.arguments)
        elif part.call is not None:
            said[-1] += part.call.arguments
        elif part.text:
            said.append(part.text)
    thought = "".join(part.reasoning for part in out)
    again = written(None if reasoning is None else thought, said)
    assert "".join(again.split()) == "".join(text.split())
    assert not parser.broken and parser.calls == sum(not isinstance(each, str) for each in parts)


@pytest.mark.parametrize("name", PARSERS)
def test_text_without_tags_comes_as_it_is(name: str) -> None:
    parser = PARSERS[name][0]()
    assert [part.text for piece in ("It", " is", " 5", " o'clock.") for part in parser.push(piece)] == [
        *("It", " is", " 5", " o'clock.")
    ]
    assert parser.flush() == []
