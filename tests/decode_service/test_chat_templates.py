"""Chats under the templates of published models, through both services: each prompt is what the template makes of it.

The services have one model, whose tokenizer knows the special tokens of all templates; each test puts one template in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cairn import Result
from tests.decode_service.chat_templates_served import KEPT, likely_words, oracle, services_of_all_templates, under
from tests.decode_service.pair import Pair
from tests.text.chat_templates import SPECIAL, template, tokenizer

NAMES = sorted(SPECIAL)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a town.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder, store = tmp_path_factory.mktemp("templates"), tmp_path_factory.mktemp("store")
    with services_of_all_templates(folder, store) as running:
        yield running


def ask(services: Pair, messages: list[dict[str, Any]], **options: Any) -> Result:
    """An answer of words, so that its text is its tokens, and nothing else, in every tokenizer."""
    likely = likely_words()
    defaults = {"max_tokens": 4, "ignore_eos": True, "keep": True, "logit_bias": likely, "temperature": 1.0, "seed": 3}
    return services.client.chat(messages, **{**defaults, **options}).finish()


def prompt_of(services: Pair, result: Result) -> tuple[int, ...]:
    """The tokens of the prompt that was answered."""
    assert result.kept is not None
    chunks = [services.client.get(each.chunk_id, token_ids=True) for each in result.reuse.segments[:-1]]
    return (*(token for chunk in chunks for token in chunk.token_ids), *result.kept.query_token_ids)


def words(name: str, token_ids: Sequence[int]) -> str:
    """Idefics' template opens an answer with a colon, and writes one with a space behind that."""
    text = template(name).codec.decode(token_ids, keep_special=True)
    return text.replace("Assistant: ", "Assistant:") if name == "idefics3" else text


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_under_a_published_template(services: Pair, name: str) -> None:
    with under(services, name):
        messages = [user("Where is Crystalton?")]
        for turn in range(3):
            result = ask(services, messages)
            assert result.chat is not None
            whole = oracle(name, messages)
            prompt = prompt_of(services, result)
            assert result.usage.prompt_tokens == len(prompt)
            assert words(name, prompt) == words(name, whole)
            if name in KEPT:
                assert (result.chat.turns_kept, result.chat.rendered_again) == (turn, "")
            else:
                assert result.chat.rendered_again.startswith("messages[" if turn else "")
                assert list(prompt) == whole
            messages += [{"role": "assistant", "content": result.text}, user("Why? " * (turn + 1))]


@pytest.mark.parametrize("name", ["glm4moe", "qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_tools_and_their_results(services: Pair, name: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Weather?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Rain.", "tool_call_id": "c1", "name": "weather"},
    ]
    with under(services, name):
        result = ask(services, messages, tools=[WEATHER])
        assert list(prompt_of(services, result)) == oracle(name, messages, tools=[WEATHER])
        types = [segment.type for segment in result.reuse.segments]
        assert types[0] == "system_prompt" and types[-1] == "query"
        assert ("turn" in types) == (name != "qwen3")  # which writes what was called otherwise while it is the last
        again = ask(services, messages, tools=[WEATHER])
        assert all(each.cached_tokens == each.tokens for each in again.reuse.segments[:-1])


def test_an_answer_that_was_thought_about_is_rendered_anew(services: Pair) -> None:
    with under(services, "qwen3"):
        first = ask(services, [user("Where?")])
        assistant = {"role": "assistant", "content": first.text}
        found = ask(services, [user("Where?"), assistant, user("Why?")])
        assert found.chat is not None and found.chat.turns_kept == 0
        assert found.chat.rendered_again == "messages[1]: the template renders it otherwise once more messages follow"


def test_an_answer_that_ended_itself_is_not_ended_twice(services: Pair) -> None:
    end = tokenizer("qwen2_5").convert_tokens_to_ids("<|im_end|>")
    with under(services, "qwen2_5"):
        first = ask(services, [user("Where?")], stop_token_ids=[end], logit_bias={end: 100.0}, min_tokens=1)
        assert first.token_ids[-1] == end and first.finish_reason == "stop"
        messages = [user("Where?"), {"role": "assistant", "content": first.text}, user("Why?")]
        second = ask(services, messages)
        assert second.chat is not None and second.chat.turns_kept == 1
        text = template("qwen2_5").codec.decode(prompt_of(services, second), keep_special=True)
        assert text == template("qwen2_5").codec.decode(oracle("qwen2_5", messages), keep_special=True)


turns = st.lists(st.tuples(st.text(max_size=8), st.sampled_from(["go on", "edit", "shorter", "salt"])), max_size=5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), turns=turns)
def test_random_conversations(services: Pair, name: str, turns: list[tuple[str, str]]) -> None:
    """Whatever is kept, edited or dropped: a prompt reads as the template renders it."""
    with under(services, name):
        messages = [user("Where?")]
        for text, kind in turns:
            result = ask(services, messages, salt="s" if kind == "salt" else "")
            prompt = prompt_of(services, result) if kind != "salt" else None
            whole = oracle(name, messages)
            if prompt is not None:
                assert words(name, prompt) == words(name, whole)
            answer = result.text + ("!" if kind == "edit" else "")
            messages = messages[-1:] if kind == "shorter" else messages
            messages = [*messages, {"role": "assistant", "content": answer}, user(text)]


def test_a_tool_call_stands_as_it_was_generated(services: Pair) -> None:
    parameters = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {**parameters, "additionalProperties": False}}}
    messages: list[dict[str, Any]] = [user("Weather?")]
    first = ask(services, messages, tools=[tool], tool_choice="required", max_tokens=120, ignore_eos=False)
    assert first.finish_reason == "tool_calls" and first.chat is not None
    calls = [{"id": c.id, "function": {"name": c.name, "arguments": json.loads(c.arguments)}} for c in first.tool_calls]
    messages += [{"role": "assistant", "content": None, "tool_calls": calls}]
    messages += [{"role": "tool", "content": "Rain.", "tool_call_id": each["id"]} for each in calls]
    second = ask(services, messages, tools=[tool])
    assert second.chat is not None and (second.chat.turns_kept, second.chat.rendered_again) == (1, "")
    prompt, rendered = prompt_of(services, second), oracle("qwen2_5", messages, tools=[tool])
    assert "".join(words("qwen2_5", prompt).split()) == "".join(words("qwen2_5", rendered).split())
    assert first.kept is not None and second.reuse.segments[-2].chunk_id == first.kept.id
