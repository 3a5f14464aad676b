"""OpenAI's HTTP API as its own client uses it, against real services with the shipped model."""

from __future__ import annotations

from typing import Any

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
