"""OpenAI's HTTP API as its own client uses it, against real services with the shipped model."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from cairn import Client
from tests.gateway.conftest import ROOT, Served

SYSTEM = {"role": "system", "content": "Answer in one full sentence."}
QUESTION = {"role": "user", "content": "Who governs Wendolin?"}
DOCUMENT = {"text": (ROOT / "examples" / "documents" / "chronicle.txt").read_text(), "role": "document"}
ANSWER = "Wendolin is ruled by Doctor Lisk."


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return served.client()


def test_a_chat_completion(client: Any) -> None:
    extra = {"cairn": {"documents": [DOCUMENT]}}
    for cached in (0, 100):
        done = client.chat.completions.create(
            model="fable", messages=[SYSTEM, QUESTION], temperature=0, max_tokens=40, extra_body=extra
        )
        assert done.choices[0].message.content == ANSWER
        assert done.choices[0].finish_reason == "stop"
        usage = done.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.prompt_tokens_details.cached_tokens >= cached
    assert [segment["source"] for segment in done.cairn["reuse"]["segments"]] == ["device", "device", "computed"]


def test_a_conversation_goes_on_from_the_kept_turn(client: Any) -> None:
    said = [SYSTEM, QUESTION]
    first = client.chat.completions.create(model="fable", messages=said, temperature=0, max_tokens=40)
    assert first.cairn["kept"]["registered"] and first.cairn["chat"]["turns_kept"] == 0
    said += [first.choices[0].message.model_dump(), {"role": "user", "content": "And where does she live?"}]
    again = client.chat.completions.create(model="fable", messages=said, temperature=0, max_tokens=40)
    assert again.cairn["chat"]["turns_kept"] == 1
    assert again.usage.prompt_tokens_details.cached_tokens > 20


def test_registered_chunks_stand_in_messages_and_as_documents(served: Served, client: Any) -> None:
    with Client(served.prefill, served.decode, token="stone") as tenant:
        rendered = tenant.prefill(DOCUMENT["text"], role="document", name="chronicle")
        words = tenant.prefill("Who governs", name="asking")
    for documents in ([{"id": rendered.id}], [{"name": "chronicle"}]):
        done = client.chat.completions.create(
            model="fable",
            messages=[
                SYSTEM,
                {
                    "role": "user",
                    "content": [{"type": "cairn_chunk", "id": words.id}, {"type": "text", "text": " Wendolin?"}],
                },
            ],
            temperature=0,
            extra_body={"cairn": {"documents": documents}},
        )
        assert done.choices[0].message.content == ANSWER
        assert rendered.id in [segment["chunk_id"] for segment in done.cairn["reuse"]["segments"]]
    with pytest.raises(openai.NotFoundError):
        served.client("slate").chat.completions.create(
            model="fable", messages=[QUESTION], extra_body={"cairn": {"documents": [{"name": "chronicle"}]}}
        )


def test_a_chat_completion_streams(client: Any) -> None:
    stream = client.chat.completions.create(
        model="fable",
        messages=[SYSTEM, QUESTION],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"cairn": {"documents": [DOCUMENT]}},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len(chunks) > 5
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 5
    assert chunks[-1].cairn["reuse"]["segments"]


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["fable"]
    assert client.models.retrieve("fable").id == "fable"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize(
    ("name", "value"),
    [("unheard_of", 1), ("temperature", 101), ("top_p", "high"), ("functions", [{}]), ("store", True), ("n", 0)],
)
def test_what_is_not_served_is_refused_by_its_name(client: Any, name: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fable", messages=[QUESTION], extra_body={name: value})
    assert refused.value.param == name and name in refused.value.message


def test_whose_token_is_not_known_is_turned_away(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        served.client("pebble").models.list()
    assert refused.value.code == "invalid_api_key"


def test_answers_and_log_probabilities(client: Any) -> None:
    asked = {"model": "fable", "messages": [SYSTEM, QUESTION], "max_tokens": 8, "temperature": 4, "seed": 5, "n": 3}
    done = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in done.choices}) > 1
    for choice in done.choices:
        said = choice.logprobs.content
        spelt = b"".join(bytes(each.bytes) for each in said if not each.token.startswith("<"))
        assert spelt.decode(errors="replace") == choice.message.content != ""
        assert all(len(each.top_logprobs) == 2 and each.logprob <= each.top_logprobs[0].logprob <= 0 for each in said)
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    finished = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            finished += [choice.index] if choice.finish_reason else []
    assert list(streamed.values()) == [choice.message.content for choice in done.choices]
    assert finished == [0, 1, 2]


def test_completions(client: Any) -> None:
    done = client.completions.create(
        model="fable", prompt="<|user|>Who governs Wendolin?<end><|assistant|>", temperature=0
    )
    assert done.choices[0].text.startswith("Wendolin is ruled by") and done.usage.completion_tokens <= 16
    several = client.completions.create(
        model="fable", prompt=["Wendolin is", [5, 6, 7]], temperature=0, max_tokens=3, logprobs=2, n=2
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    told = several.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 3
    assert "".join(told.tokens) == several.choices[0].text and told.text_offset[1] == len(told.tokens[0])
    assert len(several.cairn["prompts"]) == 2
    echoed = client.completions.create(model="fable", prompt="Wendolin is", temperature=0, max_tokens=3, echo=True)
    assert echoed.choices[0].text == "Wendolin is" + several.choices[0].text
    chunks = list(
        client.completions.create(
            **{"model": "fable", "prompt": ["Wendolin is", "Who"], "temperature": 0, "max_tokens": 3, "echo": True},
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = ["".join(each.text for c in chunks for each in c.choices if each.index == index) for index in range(2)]
    assert texts[0] == echoed.choices[0].text and texts[1].startswith("Who")
    assert chunks[-1].usage.completion_tokens == 6 and len(chunks[-1].cairn["prompts"]) == 2


def test_chunks_over_http(served: Served, client: Any) -> None:
    path = "/cairn/chunks"
    words = f"By HTTP: {DOCUMENT['text']}"
    made = client.post(path, body={"text": words, "role": "document", "name": "by http"}, cast_to=object)
    assert made["tokens"] > 100 and made["outcome"] == "computed" and made["name"] == "by http"
    behind = client.post(
        path, body={"text": "And more.", "tags": ["t"], "context": [made["id"]], "ttl_s": 60}, cast_to=object
    )
    listed = client.get(f"{path}?name=by http", cast_to=object)
    assert [each["id"] for each in listed["data"]] == [made["id"]] and not listed["has_more"]
    first = client.get(f"{path}?limit=1", cast_to=object)
    assert first["has_more"]
    second = client.get(f"{path}?limit=1&after={first['next']}", cast_to=object)
    assert first["data"][0]["id"] != second["data"][0]["id"]
    assert client.put(f"{path}/{made['id']}/pin", cast_to=object)["pinned"]
    assert not client.delete(f"{path}/{made['id']}/pin", cast_to=object)["pinned"]
    whole = client.get(f"{path}/{made['id']}?text=true", cast_to=object)
    assert words in whole["text"] and "token_ids" not in whole
    other = served.client("slate")
    assert other.get(path, cast_to=object)["data"] == []
    with pytest.raises(openai.NotFoundError):
        other.get(f"{path}/{made['id']}", cast_to=object)
    assert client.delete(f"{path}/{behind['id']}", cast_to=object)["deleted"]
    for body, param in (({}, "text"), ({"text": "a", "kind": 1}, "kind"), ({"text": "a", "shared": True}, None)):
        with pytest.raises(openai.APIStatusError) as refused:
            client.post(path, body=body, cast_to=object)
        assert refused.value.status_code in (400, 403) and refused.value.param in (param, "shared")


def test_structured_output(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    asked = {"model": "fable", "messages": [QUESTION], "max_tokens": 200, "seed": 3}
    wanted = {"type": "json_schema", "json_schema": {"name": "town", "schema": schema, "strict": True}}
    for format in (wanted, {"type": "json_object"}):
        done = client.chat.completions.create(**asked, response_format=format)
        assert done.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(done.choices[0].message.content), schema if format is wanted else {})
    done = client.chat.completions.create(**asked, extra_body={"cairn": {"grammar": {"regex": "[ab]{3}-[0-9]+x"}}})
    assert re.fullmatch("[ab]{3}-[0-9]+x", done.choices[0].message.content)
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, response_format=wrong)
    assert "grammar" in refused.value.message or "schema" in refused.value.message


def test_metrics_of_all_tenants_are_for_admins_and_no_token_is_logged(served: Served, client: Any) -> None:
    url = served.url.removesuffix("/v1")
    statuses = {}
    for token in ("stone", "operator", "pebble"):
        headers = {"authorization": f"Bearer {token}"}
        statuses[token] = httpx.get(f"{url}/metrics", headers=headers, timeout=60).status_code
    assert statuses == {"stone": 403, "operator": 200, "pebble": 401}
    assert httpx.get(f"{url}/metrics", timeout=60).status_code == 401
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    said = served.log.read_text()
    assert "POST /v1/chat/completions 200" in said
    assert not any(secret in said for secret in ("stone", "slate", "operator", "pebble", "Wendolin"))


def test_responses(client: Any) -> None:
    asked: Any = {"model": "fable", "instructions": SYSTEM["content"], "temperature": 0, "max_output_tokens": 40}
    asked["extra_body"] = {"cairn": {"documents": [DOCUMENT]}}
    done = client.responses.create(input=QUESTION["content"], include=["message.output_text.logprobs"], **asked)
    assert done.output_text == ANSWER and done.status == "completed" and done.usage.output_tokens > 5
    assert done.output[0].content[0].logprobs[0].bytes
    again = client.responses.create(input=[QUESTION], **asked)
    assert again.usage.input_tokens_details.cached_tokens > 100
    with client.responses.stream(input=QUESTION["content"], **asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == ANSWER == stream.get_final_response().output_text
    cut = client.responses.create(input="Who?", **{**asked, "max_output_tokens": 1})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    wanted = {"type": "json_schema", "name": "x", "schema": {"enum": [{"a": 1}, {"a": 2}]}}
    made = client.responses.create(input="Who?", **{**asked, "max_output_tokens": 300}, text={"format": wanted})
    assert "a" in json.loads(made.output_text)


def test_prompts_are_scored_and_requests_have_priorities(client: Any) -> None:
    asked: Any = {"model": "fable", "prompt": "Wendolin is ruled by", "temperature": 0, "max_tokens": 2}
    plain = client.completions.create(**asked)
    scored = client.completions.create(**asked, echo=True, logprobs=2).choices[0]
    told = scored.logprobs
    assert scored.text == "Wendolin is ruled by" + plain.choices[0].text == "".join(told.tokens)
    assert told.token_logprobs[0] is None and all(value <= 0 for value in told.token_logprobs[1:])
    assert told.text_offset[0] == 0 and len(told.tokens) == plain.usage.prompt_tokens + 2
    alone = client.completions.create(**{**asked, "max_tokens": 0}, echo=True, logprobs=0).choices[0]
    assert alone.text == asked["prompt"] and alone.logprobs.token_logprobs == told.token_logprobs[:-2]
    ids = client.completions.create(**{**asked, "prompt": [5, 6, 7]}, echo=True)
    assert len(ids.choices[0].text) > len(client.completions.create(**{**asked, "prompt": [5, 6, 7]}).choices[0].text)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**asked, echo=True, logprobs=2, stream=True)
    extension = {"cairn": {"priority": 9, "start_within_s": 60, "prompt_logprobs": 1}}
    chat = client.chat.completions.create(model="fable", messages=[QUESTION], max_tokens=4, extra_body=extension)
    assert len(chat.cairn["prompt_logprobs"]) == chat.usage.prompt_tokens and chat.cairn["preemptions"] == 0
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="fable", messages=[QUESTION], extra_body={"cairn": {"priority": 10}})
    assert refused.value.param == "cairn.priority"
