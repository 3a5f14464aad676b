"""What of a request decides where it goes. No network."""

from __future__ import annotations

from typing import Any

import pytest

from cairn.client.affinity import KEYS_MAX, Affinity, Seen, affinity_of
from cairn.client.chunks import ChunkRef
from cairn.client.prompt import Text
from cairn.client.requests import generate_request
from protos import decode_pb2

pytestmark = pytest.mark.unit


def segments(*parts: Any, **options: Any) -> Affinity:
    return affinity_of(generate_request(list(parts), **options), Seen({"big": 3000, "small": 10}))


def test_the_most_expensive_chunk_comes_first() -> None:
    big, small, query = ChunkRef("big"), ChunkRef("small"), "a question"
    independent = segments(small, big, query, reuse="independent")
    assert independent.keys[0] == segments(big, query, reuse="independent").keys[0]
    assert segments(small, "w" * 40_000, query, reuse="independent").keys[0] not in independent.keys
    assert segments([1] * 50, [2] * 60, query).keys[1] == segments([1] * 50, query).keys[0]


def test_in_exact_mode_a_chunk_is_known_under_what_stands_before_it() -> None:
    big, small = ChunkRef("big"), ChunkRef("small")
    assert segments(big, small, "q").keys[0] == segments(big, "q").keys[0]
    assert segments(small, big, "q").keys[0] != segments(big, "q").keys[0]
    canonical = [segments(*order, "q", order="canonical").keys[0] for order in ((small, big), (big, small))]
    assert canonical[0] == canonical[1]


def test_the_query_decides_nothing_nor_does_what_is_not_cached() -> None:
    assert segments("q").keys == ()
    assert segments("d" * 400, "q").keys == segments("d" * 400, "r").keys != ()
    assert segments("d" * 400, "q", cache="bypass") == Affinity()


def test_tenants_share_nothing() -> None:
    request = generate_request(["d" * 400, "q"])
    assert affinity_of(request, Seen({}), "one").keys != affinity_of(request, Seen({}), "other").keys


def chat(*messages: tuple[str, str], tools: tuple[str, ...] = ()) -> Affinity:
    said = [
        decode_pb2.ChatMessage(role=role, content=[decode_pb2.ContentPart(text=text)] if text else [])
        for role, text in messages
    ]
    return affinity_of(decode_pb2.GenerateRequest(chat=decode_pb2.Chat(messages=said, tools=tools)), Seen({}))


SYSTEM = ("system", "You are terse. " * 50)


def test_chats_with_the_same_beginning_share_a_key_and_each_has_one_of_its_own() -> None:
    one, other = chat(SYSTEM, ("user", "Who?")), chat(SYSTEM, ("user", "When?"))
    assert one.keys[0] == other.keys[0] and one.keys[-1] != other.keys[-1]
    assert chat(SYSTEM, ("user", "Who?"), tools=('{"name": "t"}',)).keys[0] != one.keys[0]


def test_a_longer_conversation_is_known_by_the_shorter_one() -> None:
    first = chat(SYSTEM, ("user", "Who?"))
    second = chat(SYSTEM, ("user", "Who?"), ("assistant", "Tarn."), ("user", "When? " * 900))
    assert first.here[0] in second.turns and second.here[0] not in second.turns
    assert first.keys == second.keys
    assert first.here[0] not in chat(SYSTEM, ("user", "Whom?"), ("assistant", "Tarn."), ("user", "x")).turns


def test_of_chunks_that_cost_the_same_the_least_used_one_decides() -> None:
    parts = [[n] * 20 for n in range(4)]
    request = generate_request([*parts, "q"], reuse="independent")
    plain = affinity_of(request, Seen({}))
    for part in plain.parts:
        seen = Seen({}, {each: 3 * (each != part) for each in plain.parts}.__getitem__)
        alone = affinity_of(generate_request([parts[plain.parts.index(part)], "q"], reuse="independent"), seen)
        assert affinity_of(request, seen).keys[0] == alone.keys[0]


def test_what_the_service_sorts_is_keyed_in_about_its_order() -> None:
    """The most used first, within neighbours of one type; the system prompt stays in front."""
    system, parts = Text("s" * 400, type="system_prompt"), [[n] * 100 for n in range(4)]
    plain = affinity_of(generate_request([system, *parts, "q"], order="canonical"), Seen({}))
    often = plain.parts[3]
    seen = Seen({}, lambda key: 5 if key == often else 0)
    sorted_keys = affinity_of(generate_request([system, *parts, "q"], order="canonical"), seen).keys
    used = next(n for n in range(4) if often in affinity_of(generate_request([system, parts[n], "q"]), Seen({})).parts)
    given = affinity_of(generate_request([system, parts[used], "q"]), Seen({}))
    assert sorted_keys[0] == given.keys[0]


def test_a_prompt_of_very_many_chunks_has_few_keys() -> None:
    assert len(segments(*([n] for n in range(500)), "q").keys) == KEYS_MAX


def test_a_chunk_that_was_sent_in_full_has_the_same_key_by_its_id() -> None:
    document = Text("d" * 400, type="rag_result")
    sent = affinity_of(generate_request([document, "q"]), Seen({}))
    [(place, digest)] = sent.inline
    assert place == 0
    named = generate_request([ChunkRef("id"), "q"])
    assert affinity_of(named, Seen({}, sent={"id": digest})).keys == sent.keys
    assert affinity_of(named, Seen({})).keys != sent.keys and affinity_of(named, Seen({})).inline == ()
