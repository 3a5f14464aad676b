"""Conversations through both services: every answer is that of the same composition, computed anew."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cairn
from cairn import AsyncClient, Client, Conversation, Result, Tokens
from tests.cairn.local.together.one_process import together
from tests.decode_service.models import loaded, tokens
from tests.decode_service.packing import packing
from tests.decode_service.pair import Pair, pair, wait_until

SYSTEM, DOCUMENTS = "Answer in one sentence.", ["Crystalton is located in Nebulonia.", "A cairn is a heap of stones."]


@pytest.fixture(scope="module", params=["packed", "stepwise", "packed in one process", "stepwise in one process"])
def services(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model, store = loaded(folder, "decode"), tmp_path_factory.mktemp("talks")
    decode = packing(model) if request.param.startswith("packed") else model
    alone = "one process" in request.param
    with together(decode, store) if alone else pair(loaded(folder, "prefill"), decode, store) as running:
        yield running
        running.check_idle()


def whole(talk: Conversation, before: int, query: Tokens) -> list[Any]:
    """What an answer follows, with no name in it."""
    opening = [cairn.Text(SYSTEM, type="system_prompt", role="system"), *DOCUMENTS]
    return [*opening, *(Tokens(turn.token_ids, type="turn") for turn in talk.turns[:before]), query]


def check(services: Pair, talk: Conversation, turn: int) -> None:
    """The answer is that of the same tokens without caches, and nothing but its query was computed for it."""
    found = talk.turns[turn]
    anew = services.client.generate(
        whole(talk, turn, Tokens(found.kept.query_token_ids)), cache="bypass", max_tokens=6, ignore_eos=True
    ).finish()
    assert anew.token_ids == found.result.token_ids and anew.text == found.answer
    if turn:
        assert found.result.usage.computed_tokens == len(found.kept.query_token_ids)
        reuse = found.result.reuse.segments
        assert [segment.chunk_id for segment in reuse[3:-1]] == [each.id for each in talk.turns[:turn]]
        assert all(segment.cached_tokens == segment.tokens for segment in reuse[:-1])


def talk_with(client: Client, **options: Any) -> Conversation:
    given: Any = {"max_tokens": 6, "ignore_eos": True, **options}
    return client.conversation(SYSTEM, DOCUMENTS, **given)


def test_a_conversation_computes_what_is_new(services: Pair) -> None:
    talk = talk_with(services.client)
    said = [talk.ask("Where is Crystalton?").text, talk.ask("What is it?").text]
    said.append("".join(delta.text for delta in talk.stream("Why?")))
    assert [turn.answer for turn in talk.turns] == said
    assert talk.messages == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Where is Crystalton?"},
        {"role": "assistant", "content": said[0]},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": said[1]},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": said[2]},
    ]
    for turn in range(3):
        check(services, talk, turn)


def test_a_question_behind_an_answer_that_was_cut_off_ends_it_as_the_template_does(services: Pair) -> None:
    codec = services.decode.resolver.codec
    talk = talk_with(services.client)
    talk.ask("Where?")
    talk.ask("Who?")
    asked = codec.encode("Who?", role="user", generation_prompt=True)
    assert talk.turns[1].kept.query_token_ids == (*codec.encode("<end>"), *asked)
    assert codec.decode(talk.turns[0].token_ids, keep_special=True).startswith("<|user|>Where?<end><|assistant|>")


def test_branches_go_their_own_way(services: Pair) -> None:
    talk = talk_with(services.client)
    for question in ("One?", "Two?", "Three?"):
        talk.ask(question)
    other = talk.branch(2)
    other.ask("Four?")
    again = talk.branch()
    again.retry(temperature=5.0, seed=3)
    edited = talk.branch()
    edited.edit(1, "Five?")
    assert [turn.question for turn in talk.turns] == ["One?", "Two?", "Three?"]
    assert [turn.question for turn in other.turns] == ["One?", "Two?", "Four?"]
    assert [turn.question for turn in edited.turns] == ["One?", "Five?"]
    assert [turn.question for turn in again.turns] == [turn.question for turn in talk.turns]
    assert again.turns[2].result.token_ids != talk.turns[2].result.token_ids
    for each, last in ((talk, 2), (other, 2), (edited, 1)):
        check(services, each, last)
    assert again.turns[2].result.usage.computed_tokens == len(again.turns[2].kept.query_token_ids)
    for turns in (4, -4):
        with pytest.raises(cairn.InvalidRequest):
            talk.branch(turns)
        with pytest.raises(cairn.InvalidRequest):
            talk.edit(turns, "Six?")
    with pytest.raises(cairn.InvalidRequest):
        talk_with(services.client).retry()


def test_what_the_services_have_forgotten_is_sent_again(services: Pair) -> None:
    talk = talk_with(services.client)
    talk.ask("Seven?")
    talk.ask("Eight?")
    before = talk.branch()
    before.ask("Nine?")
    services.client.delete(talk.turns[0].id)
    wait_until(lambda: services.in_device_thread(lambda: services.decode.worker.residents.held) == 0)
    services.forget()
    talk.ask("Nine?")
    assert talk.turns[2].result.token_ids == before.turns[2].result.token_ids
    talk.ask("Ten?")
    check(services, talk, 3)


@pytest.mark.parametrize("stop", [["e"], ["a", "s"]])
def test_a_stop_string_ends_the_turn_where_the_model_was(services: Pair, stop: list[str]) -> None:
    talk = talk_with(services.client, stop=stop, max_tokens=24)
    first = talk.ask("Where is it?")
    codec = services.decode.resolver.codec
    text = codec.decode(first.token_ids)
    assert first.finish_reason == "length" or (text.startswith(first.text) and any(end in text for end in stop))
    assert not any(end in first.text for end in stop)
    got = talk.ask("And now?", stop=[], max_tokens=6)
    check(services, talk, 1)
    assert got.usage.cached_tokens >= len(talk.turns[0].token_ids)


def test_the_token_that_ends_an_answer_is_part_of_it(services: Pair) -> None:
    talk = talk_with(services.client)
    ended = talk.ask("Where?", logit_bias={1: 100.0}, ignore_eos=False)
    assert ended.token_ids[-1] == 1 and ended.finish_reason == "stop" and talk.turns[0].token_ids[-1] == 1
    talk.ask("Who?")
    assert talk.turns[1].kept.query_token_ids[0] != 1, "the answer has ended itself"
    check(services, talk, 1)


def test_an_answer_that_is_left_or_aborted(services: Pair) -> None:
    talk = talk_with(services.client, max_tokens=1000)
    with talk.stream("Long?") as stream:
        next(stream)
    assert not talk.turns
    stream = talk.stream("Long?", request_id="long")
    next(stream)
    assert services.client.abort("long")
    result = stream.finish()
    assert result.finish_reason == "abort" and talk.turns[0].token_ids[-len(result.token_ids) :] == result.token_ids
    talk.ask("Short?", max_tokens=6)
    check(services, talk, 1)


def test_a_query_that_is_a_chunk_is_kept_too(services: Pair) -> None:
    document = services.client.prefill(tokens(4, 20))
    query = services.client.prefill(tokens(5, 9), context=[document])
    first = services.generate([document, query], 7, keep=True)
    assert first.usage.computed_tokens == 1 and first.kept is not None
    assert list(first.kept.query_token_ids) == tokens(5, 9)
    second = [document, cairn.ChunkRef(first.kept.id), tokens(6, 4)]
    got = services.generate(second)
    assert got.usage.computed_tokens == 4
    assert got.token_ids == services.generate(second, cache="bypass").token_ids


def test_an_event_loop_has_conversations_too(services: Pair) -> None:
    async def talk_of() -> tuple[list[Result], list[str]]:
        async with AsyncClient(services.prefill_address, services.decode_address) as client:
            talk = client.conversation(SYSTEM, DOCUMENTS, max_tokens=6, ignore_eos=True)
            results = [await talk.ask("Where is Crystalton?"), await talk.ask("What is it?")]
            results.append(await talk.stream("Why?").finish())
            await client.delete(talk.turns[1].id)
            results += [await talk.ask("Who?"), await talk.retry(), await talk.edit(-1, "Who?")]
            return results, [turn.answer for turn in talk.turns]

    results, answers = asyncio.run(talk_of())
    talk = talk_with(services.client)
    expected = [talk.ask(question).text for question in ("Where is Crystalton?", "What is it?", "Why?", "Who?")]
    assert answers == expected
    assert [result.text for result in results] == [*expected, expected[3], expected[3]]
