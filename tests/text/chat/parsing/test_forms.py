"""Answers as published models write them, and the same broken off and broken: nothing is lost, nothing comes twice."""

from __future__ import annotations

import json

import pytest

from tests.text.chat.parsing.reading import TOOLS, Read, read, read_however_cut
from text.chat.parsing import forms
from text.chat.parsing.form_parser import FormParser
from text.chat.parsing.forms import Form, form_of
from text.chat.parsing.parts import ReplyParser
from text.chat.parsing.walk import SPACE_MAX
from text.chat.parsing.xml_calls import schemas_of

SCHEMAS = schemas_of(TOOLS)
PARIS = ("get_weather", '{"city": "Paris"}')
TIME = ("time", "{}")

HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
HERMES_TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
QWEN_CODER = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "<parameter=hourly>\nTrue\n</parameter>\n</function>\n</tool_call>"
)
GLM = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>"
)
THREE_DAYS = ("get_weather", '{"city": "Paris", "days": 3}')
HOURLY = ("get_weather", '{"city": "Paris", "days": 3, "hourly": true}')
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_31 = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.time:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|><|tool_calls_section_end|>"
)
LLAMA = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
MISTRAL = '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}'

WRITTEN: list[tuple[Form, str, Read]] = [
    (forms.HERMES, "Just words.", Read("Just words.")),
    (forms.HERMES, HERMES, Read(calls=(PARIS,), whole=1)),
    (forms.HERMES, f"I will look.\n{HERMES}\n{HERMES_TIME}", Read("I will look.", "", (PARIS, TIME), 2)),
    (forms.HERMES, f"<think>\nHm.\n</think>\n\n{HERMES}", Read("", "Hm.", (PARIS,), 1)),
    (forms.HERMES, "<think>\n\n</think>\n\nYes.", Read("Yes.")),
    (forms.HERMES, "<think>a < b, [TOOL_CALLS], </thin", Read("", "a < b, [TOOL_CALLS], </thin")),
    (forms.HERMES, HERMES.replace("{\n", "{").replace("\n", ""), Read(calls=(PARIS,), whole=1)),
    (forms.HERMES, HERMES.removesuffix("\n</tool_call>"), Read(calls=(PARIS,), whole=1)),
    (
        forms.HERMES,
        '<tool_call>{"arguments": {"a": [1]}, "name": "f"}</tool_call>',
        Read("", "", (("f", '{"a": [1]}'),), 1),
    ),
    (forms.HERMES, '<tool_call>{"name": "time"}</tool_call> Done.', Read("Done.", "", (TIME,), 1)),
    (forms.HERMES, '<tool_call>{"name": "time", "arguments": null}</tool_call>', Read(calls=(TIME,), whole=1)),
    (
        forms.HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}</tool_call>',
        Read(calls=(("f", '{"a": "é"}'),), whole=1),
    ),
    (forms.QWEN_CODER, QWEN_CODER, Read(calls=(HOURLY,), whole=1)),
    (forms.QWEN_CODER, QWEN_CODER[12:-12], Read(calls=(HOURLY,), whole=1)),
    (forms.QWEN_CODER, HERMES, Read(calls=(PARIS,), whole=1)),
    (forms.GLM, f"{GLM}\n<tool_call>time\n</tool_call>", Read(calls=(THREE_DAYS, TIME), whole=2)),
    (forms.MISTRAL, f'{MISTRAL}, {{"name": "time", "arguments": {{}}}}]', Read(calls=(PARIS, TIME), whole=2)),
    (
        forms.MISTRAL,
        '[THINK]Hm.[/THINK]So:[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]time[CALL_ID]a1b2c3d4e[ARGS]{}',
        Read("So:", "Hm.", (PARIS, TIME), 2),
    ),
    (
        forms.BAR_LIST,
        f"<|tool_call|>{MISTRAL.removeprefix('[TOOL_CALLS] ')}]<|/tool_call|>",
        Read(calls=(PARIS,), whole=1),
    ),
    (forms.DEEPSEEK, f"<think>Hm.</think>Wait.{DEEPSEEK}", Read("Wait.", "Hm.", (PARIS, TIME), 2)),
    (forms.DEEPSEEK, DEEPSEEK_31, Read(calls=(PARIS, TIME), whole=2)),
    (forms.KIMI, KIMI, Read(calls=(PARIS, TIME), whole=2)),
    (forms.LLAMA_JSON, LLAMA, Read(calls=(PARIS,), whole=1)),
    (
        forms.LLAMA_JSON,
        f'<|python_tag|>{LLAMA}; {{"name": "time", "parameters": {{}}}}',
        Read(calls=(PARIS, TIME), whole=2),
    ),
    (forms.LLAMA_JSON, f"<think>Hm.</think>\n{LLAMA}", Read("", "Hm.", (PARIS,), 1)),
    (forms.LLAMA_JSON, '{"name": "Bob", "parameters": {}}', Read('{"name": "Bob", "parameters": {}}')),
    (forms.LLAMA_JSON, '{"answer": 42}', Read('{"answer": 42}')),
    (forms.LLAMA_JSON, f"It is {LLAMA}", Read(f"It is {LLAMA}")),
    (
        forms.LLAMA_PYTHON,
        """[get_weather(city='Pa"ri)s', days=-3, hourly=true), time()]""",
        Read(calls=(("get_weather", '{"city": "Pa\\"ri)s", "days": -3, "hourly": true}'), TIME), whole=2),
    ),
    (forms.LLAMA_PYTHON, "[1, 2, 3]", Read("[1, 2, 3]")),
    (
        forms.LFM,
        "I look.<|tool_call_start|>[get_weather(city='Paris'), time()]<|tool_call_end|>",
        Read("I look.", "", (PARIS, TIME), 2),
    ),
    (
        forms.COHERE,
        '<|START_THINKING|>Hm.<|END_THINKING|><|START_ACTION|>[\n {"tool_call_id": "0", "tool_name": "get_weather", '
        '"parameters": {"city": "Paris"}}\n]<|END_ACTION|>',
        Read("", "Hm.", (PARIS,), 1),
    ),
    (forms.LLAMA_PYTHON, "[get_weather('Paris')]", Read("[get_weather('Paris')]")),
]


def parser(form: Form, **more: str) -> ReplyParser:
    return FormParser(form, SCHEMAS, **more)


@pytest.mark.parametrize("form, text, meant", WRITTEN, ids=lambda value: getattr(value, "name", None))
def test_what_models_write(form: Form, text: str, meant: Read) -> None:
    assert read_however_cut(lambda: parser(form), text) == meant


BROKEN: list[tuple[Form, str, str, tuple[tuple[str, str], ...], int]] = [
    (forms.HERMES, "a <tool_call> b", "a <tool_call> b", (), 0),
    (forms.HERMES, "a <tool_c", "a <tool_c", (), 0),
    (forms.HERMES, "</think> and </tool_call>", "</think> and </tool_call>", (), 0),
    (forms.HERMES, "<tool_call>\n{'name': 'f'}\n</tool_call>", "<tool_call>\n{'name': 'f'}\n</tool_call>", (), 0),
    (forms.HERMES, '<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', (), 0),
    (
        forms.HERMES,
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        (),
        0,
    ),
    (forms.HERMES, '<tool_call>{"name": "f", "arguments": [1]}', '<tool_call>{"name": "f", "arguments": [1]}', (), 0),
    (forms.HERMES, f"<tool_call>no{HERMES}", "<tool_call>no", (PARIS,), 1),
    (forms.HERMES, f"<tool_call>{HERMES}", "<tool_call>", (PARIS,), 1),
    (forms.HERMES, '<tool_call>{"name": "f", "arguments": {"a": }} x', "}} x", (("f", '{"a": '),), 0),
    (forms.HERMES, HERMES.replace("}}", "}}}"), "}\n</tool_call>", (PARIS,), 1),
    (forms.HERMES, HERMES[:-4], "\n</tool_c", (PARIS,), 1),
    (forms.QWEN_CODER, QWEN_CODER[:90], "\n<parameter=days>\n3\n", (("get_weather", '{"city": "Paris"'),), 0),
    (forms.GLM, "<tool_call>get_weather</tool_cal", "<tool_call>get_weather</tool_cal", (), 0),
    (forms.MISTRAL, "[TOOL_CALLS] hello, there", "[TOOL_CALLS] hello, there", (), 0),
    (forms.MISTRAL, f"{MISTRAL}, no]", ", no]", (PARIS,), 1),
    (forms.DEEPSEEK, DEEPSEEK[:44], "<｜tool▁call▁begin｜>funct", (), 0),
    (forms.LLAMA_JSON, f"{LLAMA} {{no", " {no", (PARIS,), 1),
    (forms.LLAMA_PYTHON, "[time(), x", ", x", (TIME,), 1),
    (forms.LLAMA_PYTHON, f"[time(a={'[' * 99}", f"[time(a={'[' * 99}", (), 0),
]


@pytest.mark.parametrize("form, text, left, calls, whole", BROKEN)
def test_what_is_no_call_is_text(
    form: Form, text: str, left: str, calls: tuple[tuple[str, str], ...], whole: int
) -> None:
    found = read_however_cut(lambda: parser(form), text)
    assert (found.text, found.calls, found.whole) == (left, calls, whole)
    begins_like_one = "<tool_call>" in text or "CALLS" in text or bool(calls) or "▁call▁" in text
    assert found.broken == begins_like_one


@pytest.mark.parametrize("at", range(len(HERMES) + 1))
def test_cut_off_anywhere(at: int) -> None:
    """What came of the arguments is a beginning of them; as long as nothing of a call has come, it is text."""
    found = read_however_cut(lambda: parser(forms.HERMES), HERMES[:at])
    begun = HERMES.index('{"city"')
    if at <= begun:
        assert found == Read(HERMES[:at], broken=at >= len("<tool_call>"))
        return
    assert found.calls[0] == ("get_weather", PARIS[1][: at - begun])
    assert found.whole == (at - begun >= len(PARIS[1]))


def test_arguments_come_as_they_are_written() -> None:
    one = parser(forms.HERMES)
    assert [part.says_something for part in one.push('<tool_call>{"name": "get_weather", "arguments": ')] == []
    first = one.push('{"ci')
    assert [part.call.arguments for part in first if part.call] == ["", '{"ci'] and first[0].call.name == "get_weather"
    assert [part.call.arguments for part in one.push('ty": "Par') if part.call] == ['ty": "Par']


def test_text_waits_only_where_a_tag_may_have_begun() -> None:
    one = parser(forms.HERMES)
    assert [part.text for part in one.push("Hello")] == ["Hello"]
    assert [part.text for part in one.push(", a < b")] == [", a < b"]
    assert one.push(" <tool") == [] and [part.text for part in one.push("s")] == [" <tools"]


def test_without_tools_calls_are_text_and_reasoning_is_reasoning() -> None:
    found = read_however_cut(lambda: FormParser(forms.HERMES, None), f"<think>Hm.</think>{HERMES}")
    assert found == Read(HERMES, "Hm.")


def test_reasoning_that_the_prompt_has_begun() -> None:
    found = read_however_cut(lambda: parser(forms.HERMES, reasoning_end="</think>"), f"Hm.\n</think>\n{HERMES}")
    assert found == Read("", "Hm.", (PARIS,), 1)
    assert read_however_cut(lambda: parser(forms.HERMES, reasoning_end="</think>"), "Hm").reasoning == "Hm"


@pytest.mark.parametrize(
    "value",
    ["1e", "01", "-", "1.", "tru", '"\\x"', '"\n"', "[1,]", '{"a" 1}', "{1: 2}", "[1}", '"\\u12g"', "NaN", "[" * 99],
)
def test_arguments_that_are_no_json_are_not_whole(value: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": {value}, "b": 1}}}}</tool_call>'
    found = read_however_cut(lambda: parser(forms.HERMES), text)
    assert found.whole == 0 and found.broken and text.endswith(found.text)


@pytest.mark.parametrize(
    "value", [0, -1.5e-7, "", 'a"\\\n\té🍵\ud83c', [], {}, [[{"a": [None, True, False]}]], {"": {"x": [1, 2]}}]
)
def test_arguments_that_are_json_are_whole(value: object) -> None:
    for indent in (None, 2):
        arguments = json.dumps({"a": value, "b": [value]}, indent=indent)
        text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
        found = read_however_cut(lambda: parser(forms.HERMES), text)
        assert found == Read(calls=(("f", arguments),), whole=1)


def test_names_that_no_utf8_can_say_are_refused() -> None:
    text = '<tool_call>{"name": "\\ud83c", "arguments": {}}</tool_call>'
    assert read_however_cut(lambda: parser(forms.HERMES), text).text == text


def test_mistral_takes_ids_of_nine_letters() -> None:
    one = parser(forms.MISTRAL)
    ids = [part.call.id for part in one.push(MISTRAL + "]") if part.call and part.call.id]
    assert len(ids) == 1 and len(ids[0]) == 9 and ids[0].isalnum()


@pytest.mark.parametrize(
    "template, vocabulary, form",
    [
        ("", (), forms.HERMES),
        ("... <tool_call></tool_call> ...", (), forms.HERMES),
        ("<tool_call>\n<function=example>", (), forms.QWEN_CODER),
        ("<tool_call>{function-name}\n<arg_key>", (), forms.GLM),
        ("{{ bos }}", ("[TOOL_CALLS]",), forms.MISTRAL),
        ("", ("<｜tool▁call▁begin｜>",), forms.DEEPSEEK),
        ("", ("<|tool_call_begin|>",), forms.KIMI),
        ('{"name": function name, "parameters": ...}', ("<|python_tag|>",), forms.LLAMA_JSON),
        ("[func_name1(params_name1=params_value1)]", ("<|python_tag|>",), forms.LLAMA_PYTHON),
        ("<|tool_call|>", (), forms.BAR_LIST),
        ("<|tool_call_start|>", (), forms.LFM),
        ("", ("<|START_ACTION|>",), forms.COHERE),
    ],
)
def test_the_form_is_the_templates(template: str, vocabulary: tuple[str, ...], form: Form) -> None:
    assert form_of(template, dict.fromkeys(vocabulary, 0)) is form


def test_long_broken_answers_are_not_looked_through_again_and_again() -> None:
    """Answers of which every word begins a call that never ends; it would take minutes."""
    for form, word, count in (
        (forms.HERMES, "<tool_call>", 8000),
        (forms.QWEN_CODER, "<function=f><parameter=a>", 3000),
        (forms.GLM, "<tool_call>f\n<arg_key>a</arg_key><arg_value>", 3000),
        (forms.DEEPSEEK, "<｜tool▁call▁begin｜>", 8000),
        (forms.LLAMA_PYTHON, "[time(a=[", 8000),
        (forms.LFM, "<|tool_call_start|>[time(a='", 400),
        (forms.HERMES, '<tool_call>{"arguments": {"a": ', 8000),
        (forms.HERMES, " ", 20000),
    ):
        found = read(parser(form), [word] * count)
        assert not found.whole and len(found.text) + len(found.reasoning) > 1000


def test_white_space_next_to_a_tag_is_left_out_up_to_a_bound() -> None:
    for count, left in ((SPACE_MAX, 0), (SPACE_MAX + 3, 3)):
        found = read_however_cut(lambda: parser(forms.HERMES), f"a{' ' * count}{HERMES}")
        assert found == Read("a" + " " * left, "", (PARIS,), 1)
