"""Tool calls and reasoning through both services, of a model that writes them: streamed, exact, and nothing lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

import cairn
from cairn import Delta, Grammar, Result
from tests.decode_service.models import loaded
from tests.decode_service.pair import Pair, pair
from tests.planted import planted_model_dir
from tests.text.chat.parsing.reading import TOOLS

SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
SCRIPTS = {
    "two": [
        *("<think>", "Hm,", " well.", "</think>", "\n\nI ", "look.\n"),
        *("<tool_call>", '\n{"name": "get_', 'weather", "argu', 'ments": {"ci'),
        *('ty": "Paris', ' 🍵"}', "}\n", "</tool_call>"),
        *('\n<tool_call>{"name": "time", ', '"arguments": {}', "}</tool_call>"),
    ],
    "thinking": ["I was ", "asked.</th", "ink>\n", "Yes."],
    "broken": ["Look: ", "<tool_call>{", '"name": ', "nobody", "}</tool_call> so ", "<tool_", "c"],
    "half": ['<tool_call>{"name": "time", "arg', 'uments": {"zone": ', '"UTC, '],
    "plain": ["No ", "tools ", "here."],
}  # fmt: skip
FORCED = {
    "one": [
        *("<think>", "Let ", "me.", "</think>", "\n\n", "<tool_call>", '\n{"name": "get_weather", '),
        *('"arguments": {"city"', ': "Paris 🍵"', "}}\n", "</tool_call>", "Bye."),
    ],
}
PARIS = ("get_weather", '{"city": "Paris 🍵"}')
USER = {"role": "user", "content": "What weather?"}


def serving(scripts: dict[str, list[str]], place: Path) -> AbstractContextManager[Pair]:
    folder = planted_model_dir(place / "model", scripts, special=SPECIAL)
    return pair(loaded(folder, "prefill"), loaded(folder, "decode"), place / "store")


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with serving(SCRIPTS, tmp_path_factory.mktemp("tools")) as running:
        yield running
        running.check_idle()


@pytest.fixture(scope="module")
def forced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Of a model whose calls go on as no grammar of calls would."""
    with serving(FORCED, tmp_path_factory.mktemp("forced")) as running:
        yield running
        running.check_idle()


def chat(services: Pair, script: str, messages: list[Any] | None = None, **options: Any) -> tuple[list[Delta], Result]:
    arguments = {"script": script, **options.pop("arguments", {})}
    given = {"max_tokens": 40, "tools": TOOLS, **options}
    stream = services.client.chat(messages or [USER], template_arguments=arguments, **given)
    return list(stream), stream.result


def called(result: Result) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in result.tool_calls]


def test_reasoning_and_calls_come_apart_as_they_are_written(services: Pair) -> None:
    deltas, result = chat(services, "two", logprobs=True)
    assert (result.reasoning, result.text) == ("Hm, well.", "I look.")
    assert called(result) == [PARIS, ("time", "{}")] and result.finish_reason == "tool_calls"
    assert len({call.id for call in result.tool_calls}) == 2
    assert result.chat is not None and not result.chat.tool_calls_broken
    tokenizer = services.decode.resolver.codec
    assert tokenizer.decode(result.token_ids[:-1], keep_special=True) == "".join(SCRIPTS["two"])
    assert len(result.logprobs) == len(result.token_ids) == result.usage.completion_tokens
    pieces = [call.arguments for delta in deltas for call in delta.tool_calls if call.index == 0]
    # As '{"ci', 'ty": "Paris', ' 🍵"}'; tokens that wait for the client together come together.
    assert "".join(pieces) == PARIS[1] and set(accumulate(map(len, pieces))) <= {0, 4, 15, 19}


def test_unparsed_the_same_answer_is_text(services: Pair) -> None:
    parsed = chat(services, "two")[1]
    _, plain = chat(services, "two", parse=False)
    assert [plain.text] == ["".join(piece for piece in SCRIPTS["two"] if piece not in SPECIAL)]
    assert plain.token_ids == parsed.token_ids and not plain.tool_calls and plain.finish_reason == "stop"


def test_reasoning_that_the_template_has_begun(services: Pair) -> None:
    _, result = chat(services, "thinking", arguments={"think": True})
    assert (result.reasoning, result.text, result.finish_reason) == ("I was asked.", "Yes.", "stop")
    _, other = chat(services, "thinking")
    assert (other.reasoning, other.text) == ("", "I was asked.</think>\nYes.")


def test_an_answer_that_goes_on_from_reasoning(services: Pair) -> None:
    begun = {"role": "assistant", "content": "<think>Now <script thinking>"}
    _, result = chat(services, "thinking", [USER, begun], continue_last_message=True)
    assert (result.reasoning, result.text) == ("I was asked.", "Yes.")


def test_what_is_no_call_is_text(services: Pair) -> None:
    _, result = chat(services, "broken")
    assert result.text == "".join(SCRIPTS["broken"]) and result.finish_reason == "stop"
    assert result.chat is not None and result.chat.tool_calls_broken and not result.tool_calls


@pytest.mark.parametrize("at", range(1, len(SCRIPTS["two"])))
def test_an_answer_cut_off_by_its_length_keeps_what_came(services: Pair, at: int) -> None:
    _, result = chat(services, "two", max_tokens=at)
    assert result.finish_reason == "length" and len(result.token_ids) == at
    for (name, arguments), call in zip([PARIS, ("time", "{}")], called(result), strict=False):
        assert call[0] == name and arguments.startswith(call[1])
    written = "".join(SCRIPTS["two"][:at])
    if len(result.tool_calls) < written.count('"arguments": {'):
        assert '"arguments": {' in result.text


def test_a_call_that_its_answer_does_not_end(services: Pair) -> None:
    _, result = chat(services, "half")
    assert called(result) == [("time", '{"zone": "UTC, ')] and result.text == ""
    assert result.finish_reason == "stop" and result.chat is not None and result.chat.tool_calls_broken


def test_no_tool_is_offered_if_none_may_be_called(services: Pair) -> None:
    with_tools, without = chat(services, "broken")[1], chat(services, "broken", tools=())[1]
    _, none = chat(services, "broken", tool_choice="none")
    assert none.usage.prompt_tokens == without.usage.prompt_tokens < with_tools.usage.prompt_tokens
    _, calls = chat(services, "two", tool_choice="none")
    assert not calls.tool_calls and '"arguments": {}' in calls.text and calls.reasoning == "Hm, well."


def test_stop_strings_end_answers_in_calls(services: Pair) -> None:
    _, result = chat(services, "two", stop=["</tool_call>"])
    assert called(result) == [PARIS] and result.finish_reason == "tool_calls"
    _, early = chat(services, "two", stop=["Paris"])
    assert called(early) == [("get_weather", '{"city": "')] and early.finish_reason == "stop"


def test_several_answers_have_calls_of_their_own(services: Pair) -> None:
    stream = services.client.chat([USER], tools=TOOLS, template_arguments={"script": "two"}, max_tokens=40, n=2)
    stream.finish()
    assert [called(result) for result in stream.results] == [[PARIS, ("time", "{}")]] * 2
    assert len({call.id for result in stream.results for call in result.tool_calls}) == 4


def test_a_kept_answer_with_calls_goes_on_as_it_was_generated(services: Pair) -> None:
    _, first = chat(services, "two", keep=True)
    answer = {
        "role": "assistant",
        "content": first.text,
        "reasoning_content": first.reasoning,
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in first.tool_calls
        ],
    }
    told = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Rain."}
    _, second = chat(services, "two", [USER, answer, told])
    assert second.chat is not None and (second.chat.turns_kept, second.chat.rendered_again) == (1, "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tool_choice": "wizardry"}, "chat.tool_choice: no tool is named 'wizardry'"),
        ({"tool_choice": "required", "tools": ()}, "chat.tool_choice: 'required' needs tools"),
        (
            {"tool_choice": "required", "grammar": Grammar.regex("a")},
            "grammar: chat.tool_choice 'required' says already",
        ),
        (
            {"tool_choice": "required", "tools": [TOOLS[0], {"name": "f", "parameters": {"not": {}}}]},
            r"chat.tools\[1\].function.parameters: at /not",
        ),
        ({"tool_choice": "a b", "tools": [{"name": "a b"}]}, r"chat.tools\[0\].function.name"),
    ],
)
def test_choices_that_no_answer_could_follow_are_refused(services: Pair, options: dict[str, Any], says: str) -> None:
    with pytest.raises(cairn.InvalidRequest, match=says):
        chat(services, "plain", **options)


TOWN = {"type": "object", "properties": {"town": {"enum": ["Tarn", "Crystalton"]}}, "required": ["town"]}
CLOSED: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "look", "parameters": {**TOWN, "additionalProperties": False}}},
    {"type": "function", "function": {"name": "time", "parameters": {"additionalProperties": False}}},
]
THOUGHT = {"thought": True}
CALLED: dict[str, list[Any]] = {"look": [{"town": "Tarn"}, {"town": "Crystalton"}], "time": [{}]}


@pytest.mark.parametrize(
    ("options", "names", "most"),
    [
        ({"tool_choice": "required"}, {"look", "time"}, 1),
        ({"tool_choice": "required", "parallel_tool_calls": True}, {"look", "time"}, 16),
        ({"tool_choice": "look"}, {"look"}, 1),
        ({"tool_choice": "time", "parallel_tool_calls": True}, {"time"}, 1),
    ],
)
def test_answers_that_must_call_tools(forced: Pair, options: dict[str, Any], names: set[str], most: int) -> None:
    """Whatever the model would say: drawn evenly, with what it would think left out by the template."""
    found = []
    for seed in range(4):
        _, result = chat(
            forced,
            "",
            tools=CLOSED,
            temperature=100.0,
            seed=seed,
            max_tokens=600,
            arguments=THOUGHT,
            **options,
        )
        assert result.finish_reason == "tool_calls" and (result.text, result.reasoning) == ("", "")
        assert result.chat is not None and not result.chat.tool_calls_broken
        assert 1 <= len(result.tool_calls) <= most
        for name, arguments in called(result):
            assert json.loads(arguments) in CALLED[name]
            found.append(name)
    assert set(found) <= names
    assert most == 1 or (set(found) == names and len(found) > 4)


def test_a_model_that_would_call_is_not_changed_by_having_to(forced: Pair) -> None:
    """It may think before; its words behind are not what a call is."""
    _, result = chat(forced, "one", tool_choice="required")
    assert (result.reasoning, called(result)) == ("Let me.", [PARIS]) and result.finish_reason == "tool_calls"


def test_unparsed_the_calls_that_must_come_are_text(forced: Pair) -> None:
    _, result = chat(forced, "one", tool_choice="get_weather", parse=False, keep_special_tokens=True)
    assert '"arguments": {"city": "Paris 🍵"}}' in result.text and not result.tool_calls


@pytest.mark.parametrize("at", [2, 9, 15])
def test_calls_that_must_come_are_cut_off_as_others_are(forced: Pair, at: int) -> None:
    _, result = chat(forced, "", tools=CLOSED, tool_choice="look", max_tokens=at, arguments=THOUGHT)
    assert result.finish_reason == "length" and len(result.token_ids) == at
    assert result.text or result.tool_calls
