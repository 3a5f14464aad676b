"""Tools, reasoning and structured output over HTTP, of a model that writes what it is told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.decode_service.models import loaded
from tests.decode_service.pair import pair
from tests.gateway.running import gateway
from tests.planted import planted_model_dir
from tests.text.chat.parsing.reading import TOOLS

SCRIPTS = {
    "two": [
        *("<think>", "Hm,", " well.", "</think>", "\n\nI ", "look.\n"),
        *("<tool_call>", '\n{"name": "get_', 'weather", "argu', 'ments": {"ci', 'ty": "Paris"}', "}\n", "</tool_call>"),
        *('\n<tool_call>{"name": "time", ', '"arguments": {}', "}</tool_call>"),
    ],
    "broken": ["Look: ", "<tool_call>{", '"name": ', "nobody", "}</tool_call> so ", "<tool_", "c"],
}
USER = {"role": "user", "content": "What weather?"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    special = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    folder = planted_model_dir(tmp_path_factory.mktemp("planted") / "model", SCRIPTS, special=special)
    with (
        pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path_factory.mktemp("tools")) as services,
        gateway(services.prefill_address, services.decode_address) as running,
    ):
        yield running.client()
        services.check_idle()


def ask(client: Any, script: str, messages: list[Any], **options: Any) -> Any:
    extra = {"chat_template_kwargs": {"script": script}}
    asked = {"model": client.models.list().data[0].id, "max_tokens": 60, "temperature": 0, "tools": TOOLS, **options}
    return client.chat.completions.create(messages=messages, extra_body=extra, **asked)


def test_calls_and_reasoning_come_apart_and_go_back(client: Any) -> None:
    done = ask(client, "two", [USER])
    message = done.choices[0].message
    assert (message.reasoning_content, message.content, done.choices[0].finish_reason) == (
        "Hm, well.",
        "I look.",
        "tool_calls",
    )
    called = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
    assert called == [("get_weather", {"city": "Paris"}), ("time", {})]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in message.tool_calls]
    again = ask(client, "broken", [USER, message.model_dump(), *results])
    assert again.choices[0].message.content == "".join(SCRIPTS["broken"]) and again.choices[0].finish_reason == "stop"
    assert again.cairn["chat"]["tool_calls_broken"] and not done.cairn["chat"]["tool_calls_broken"]


def test_calls_stream(client: Any) -> None:
    calls: dict[int, dict[str, str]] = {}
    text = reasoning = ""
    finished = []
    for chunk in ask(client, "two", [USER], stream=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            finished += [choice.finish_reason] if choice.finish_reason else []
            for more in choice.delta.tool_calls or []:
                call = calls.setdefault(more.index, {"id": more.id, "name": more.function.name, "arguments": ""})
                call["arguments"] += more.function.arguments or ""
    assert (reasoning, text, finished) == ("Hm, well.", "I look.", ["tool_calls"])
    assert [(call["name"], json.loads(call["arguments"])) for call in calls.values()] == [
        ("get_weather", {"city": "Paris"}),
        ("time", {}),
    ]
    assert all(call["id"] for call in calls.values())


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "x", "strict": True}}]}, "tools[0].function.strict"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ],
)
def test_what_could_not_be_kept_to_is_refused(client: Any, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "two", [USER], **options)
    assert refused.value.param == param


DEFINED: list[Any] = TOOLS
FLAT = [{"type": "function", **each["function"]} for each in DEFINED]


def respond(client: Any, script: str, items: Any, **options: Any) -> Any:
    extra = {"cairn": {"template_arguments": {"script": script}}}
    asked = {
        "model": client.models.list().data[0].id,
        "max_output_tokens": 60,
        "temperature": 0,
        "tools": FLAT,
        **options,
    }
    return client.responses.create(input=items, extra_body=extra, **{**asked, **options})


def test_responses_with_reasoning_and_calls(client: Any) -> None:
    done = respond(client, "two", [USER])
    assert [item.type for item in done.output] == ["reasoning", "message", "function_call", "function_call"]
    assert done.output_text == "I look." and done.status == "completed"
    assert [json.loads(item.arguments) for item in done.output[2:]] == [{"city": "Paris"}, {}]
    results = [{"type": "function_call_output", "call_id": item.call_id, "output": "fine"} for item in done.output[2:]]
    again = respond(client, "two", [USER, *(item.model_dump() for item in done.output), *results])
    assert again.output_text == "I look." and again.cairn["chat"]["turns_kept"] == 1


def test_responses_stream(client: Any) -> None:
    events = list(respond(client, "two", "What weather?", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type, events[-1].type] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert text == "I look." == events[-1].response.output_text and arguments == '{"city": "Paris"}{}'
    added = [event.item.type for event in events if event.type == "response.output_item.added"]
    done = [event.item.type for event in events if event.type == "response.output_item.done"]
    assert added == done == [item.type for item in events[-1].response.output]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ],
)
def test_what_responses_cannot_do_is_refused(client: Any, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, "two", **{"items": options.pop("input", "x"), **options})
    assert refused.value.param == param
