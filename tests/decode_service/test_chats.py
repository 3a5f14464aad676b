"""Chats through both services: rendered whole by the template, cut into chunks, kept turns as they were generated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cairn
from cairn import Client, Result
from tests.decode_service.models import loaded
from tests.decode_service.pair import Pair, pair

SYSTEM = {"role": "system", "content": "Answer in one sentence."}


@pytest.fixture(scope="module")
def services(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path_factory.mktemp("chats")) as running:
        yield running
        running.check_idle()


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def ask(client: Client, messages: list[Any], **options: Any) -> Result:
    return client.chat(messages, **{"max_tokens": 6, "ignore_eos": True, **options}).finish()


def test_a_chat_is_cut_into_chunks_of_their_types(services: Pair) -> None:
    found = ask(services.client, [SYSTEM, user("Where?"), assistant("There."), user("Why?")])
    assert [segment.type for segment in found.reuse.segments] == ["system_prompt", "turn", "query"]
    assert found.chat is not None and found.chat.pieces == 3 and found.chat.turns_kept == 0
    assert found.chat.rendered_again == "messages[2]: not known here as an answer that was kept"
    codec = services.decode.resolver.codec
    asked = "<|system|>Answer in one sentence.<end><|user|>Where?<end><|assistant|>There.<end><|user|>Why?<end>"
    plain = services.client.generate(
        [cairn.Tokens(codec.encode(asked + "<|assistant|>"))], max_tokens=6, ignore_eos=True
    ).finish()
    assert plain.token_ids == found.token_ids and plain.usage.prompt_tokens == found.usage.prompt_tokens


def test_a_kept_answer_stands_as_it_was_generated(services: Pair) -> None:
    first = ask(services.client, [SYSTEM, user("One?")], keep=True, temperature=3.0, seed=5)
    assert first.kept is not None
    messages = [SYSTEM, user("One?"), assistant(first.text), user("Two?")]
    second = ask(services.client, messages, keep=True)
    assert second.chat == cairn.ChatReport(pieces=1, turns_kept=1, rendered_again="")
    assert second.reuse.segments[1].chunk_id == first.kept.id
    assert second.usage.cached_tokens == first.usage.prompt_tokens + 6
    third = ask(services.client, [*messages, assistant(second.text), user("Three?")])
    assert third.chat is not None and third.chat.turns_kept == 2
    # Ended as the template does: an answer that was cut off lacks the word that ends it.
    codec = services.decode.resolver.codec
    assert second.kept is not None
    assert second.kept.query_token_ids == codec.encode("<end><|user|>Two?<end><|assistant|>")


def test_an_answer_to_a_chat_ends_where_there_is_no_more_room_unless_it_is_told(services: Pair) -> None:
    found = services.client.chat([user("Long?")], ignore_eos=True).finish()
    most = min(services.decode.resolver.served.context_length_max, services.decode.worker.tail_tokens_max)
    assert found.usage.completion_tokens == most - found.usage.prompt_tokens > 128  # all of it is a query
    assert services.client.generate(["Long?"], ignore_eos=True).finish().usage.completion_tokens == 128


def test_an_edited_answer_is_rendered(services: Pair) -> None:
    first = ask(services.client, [user("Three?")], keep=True)
    found = ask(services.client, [user("Three?"), assistant(first.text + "."), user("Four?")])
    assert found.chat is not None and found.chat.turns_kept == 0 and "messages[1]" in found.chat.rendered_again


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "wizard", "content": "x"}], r"chat.messages\[0\].*unknown role"),
        ([user("x"), {"role": "wizard", "content": "x"}], r"chat.messages\[1\].*unknown role"),
        ([user([{"type": "chunk", "id": "f" * 64}, "?"])], r"chat.messages\[0\].content\[0\].chunk_id: no chunk"),
        ([user([{"type": "chunk", "name": "none"}, "?"])], r"chat.messages\[0\].content\[0\].chunk_name: no chunk"),
    ],
)
def test_what_is_wrong_is_named(services: Pair, messages: list[Any], says: str) -> None:
    with pytest.raises(cairn.CairnError, match=says):
        ask(services.client, messages)


def test_a_chunk_stands_in_a_message(services: Pair) -> None:
    chunk = services.client.prefill("Crystalton lies in Nebulonia.", name="crystalton")
    by_id = ask(services.client, [user([{"type": "chunk", "id": chunk.id}, "Where?"])])
    by_name = ask(services.client, [user([{"type": "chunk", "name": "crystalton"}, "Where?"])])
    assert by_id.token_ids == by_name.token_ids
    assert by_id.reuse.segments[1].chunk_id == chunk.id
    apart = ask(services.client, [{"role": "", "content": [{"type": "chunk", "id": chunk.id}]}, user("Where?")])
    assert apart.reuse.segments[0].chunk_id == chunk.id


def test_a_turn_that_was_dropped_is_computed_anew_of_its_tokens(services: Pair) -> None:
    first = ask(services.client, [user("Seven?")], keep=True)
    assert first.kept is not None
    messages = [user("Seven?"), assistant(first.text), user("Eight?")]
    wanted = ask(services.client, messages)
    services.forget()
    services.client.delete(first.kept.id)
    found = ask(services.client, messages)
    assert found.chat is not None and found.chat.turns_kept == 1 and found.token_ids == wanted.token_ids
    assert found.reuse.segments[0].chunk_id == first.kept.id and found.reuse.segments[0].cached_tokens == 0


def test_the_answer_is_the_same_without_caches_and_in_any_mode(services: Pair) -> None:
    first = ask(services.client, [SYSTEM, user("Nine?")], keep=True)
    messages = [SYSTEM, user("Nine?"), assistant(first.text), user("Ten?")]
    shared, bypassed = (ask(services.client, messages, cache=cache) for cache in ("shared", "bypass"))
    assert shared.chat == bypassed.chat and shared.token_ids == bypassed.token_ids
    apart = ask(services.client, messages, reuse="independent")
    assert apart.chat == shared.chat and apart.reuse.reuse_mode == "independent"
    ordered = ask(services.client, messages, order="canonical")
    assert not ordered.reuse.reordered and ordered.token_ids == shared.token_ids


def test_what_a_chat_would_reuse(services: Pair) -> None:
    messages = [SYSTEM, user("Eleven?")]
    assert services.client.explain_chat(messages).chat == cairn.ChatReport(2, 0, "")
    ask(services.client, messages)
    plan = services.client.explain_chat(messages)
    assert plan.cached_tokens and plan.reuse.segments[0].type == "system_prompt"


def test_several_answers_are_remembered_each(services: Pair) -> None:
    asked = [user("Twelve?")]
    talk = services.client.chat(asked, n=3, temperature=2.0, seed=1, max_tokens=6, ignore_eos=True, keep=True)
    talk.finish()
    for result in talk.results:
        then = ask(services.client, [*asked, assistant(result.text), user("And?")])
        assert then.chat is not None
        assert then.chat.turns_kept == 1 or "otherwise than it was generated" in then.chat.rendered_again


def test_an_answer_goes_on(services: Pair) -> None:
    found = ask(services.client, [user("Where?"), assistant("In Nebul")], continue_last_message=True)
    codec = services.decode.resolver.codec
    plain = services.generate([cairn.Tokens(codec.encode("<|user|>Where?<end><|assistant|>In Nebul"))])
    assert found.token_ids == plain.token_ids


def test_a_chat_that_is_too_long_names_its_messages(services: Pair) -> None:
    with pytest.raises(cairn.InvalidRequest, match=r"chat\.messages: .* leave no room .*oldest messages"):
        ask(services.client, [user("word " * 700)])


def test_other_tenants_turns_are_unknown(services: Pair) -> None:
    first = ask(services.client, [user("Five?")], keep=True, salt="a")
    messages = [user("Five?"), assistant(first.text), user("Six?")]
    reports = {salt: ask(services.client, messages, salt=salt).chat for salt in ("a", "b", "")}
    assert [reports[salt].turns_kept for salt in ("a", "b", "")] == [1, 0, 0]
