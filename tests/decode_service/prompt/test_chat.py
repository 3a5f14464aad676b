"""Chats against a store: chunks by name, refusals by message, and what is remembered of an answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chunk_store.errors import StoreUnavailable
from chunk_store.key import ChunkType, chunk_id
from chunk_store.open import open_store
from chunk_store.record import ChunkRecord
from chunk_store.store import ChunkStore
from chunk_store.tenant import SHARED_TENANT, Tenant, tenant_of
from decode_service.prompt.chat import ChatComposer
from decode_service.prompt.chat_prompt import ChatRequest, Said
from decode_service.prompt.resolver import Resolver
from engine.reuse import ReuseMode
from serving.errors import InvalidRequest, NotFound
from tests.fakes import FakeServed
from tests.text.chat.test_template import said
from tests.text.chat_templates import template
from text.chat.message import ChunkPart, Message

MINE, YOURS = tenant_of("mine"), tenant_of("yours")
CODEC = template("qwen2_5").codec


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    made = open_store(f"file://{tmp_path}")
    yield made
    made.close()


def put(store: ChunkStore, name: str, *tokens: int, tenant: Tenant = MINE) -> str:
    made = chunk_id(CODEC.identity, ChunkType.CONTEXT, tokens)
    store.put_records([ChunkRecord(made, CODEC.identity, ChunkType.CONTEXT, tokens, name=name, tenant=tenant)])
    return made


def named(name: str) -> ChatRequest:
    return ChatRequest((Message("user", (ChunkPart("", name), "?")),))


def test_a_name_is_the_tenants_own_chunk_or_a_shared_one(store: ChunkStore) -> None:
    composer = ChatComposer(CODEC, store)

    def found(name: str, salt: str = "mine") -> str:
        return next(each.chunk_id for each in composer.segments(named(name), salt, 1 << 20)[0] if each.chunk_id)

    own, shared, yours = put(store, "a", 1), put(store, "b", 2, tenant=SHARED_TENANT), put(store, "c", 3, tenant=YOURS)
    put(store, "a", 4, tenant=SHARED_TENANT)
    put(store, "a", 5, tenant=YOURS)
    assert (found("a"), found("b"), found("c", "yours")) == (own, shared, yours)
    for unknown in ("c", "none"):  # another tenant's is as good as none
        with pytest.raises(NotFound) as refused:
            found(unknown)
        assert str(refused.value).replace(f"'{unknown}'", "'X'") == (
            "chat.messages[0].content[0].chunk_name: no chunk is named 'X' here; register it first"
        )
    put(store, "a", 6)
    with pytest.raises(InvalidRequest, match=r"content\[0\]\.chunk_name: several chunks are named 'a'"):
        found("a")


def test_a_refusal_names_the_message(store: ChunkStore) -> None:
    with pytest.raises(InvalidRequest, match=r"^chat\.messages\[1\]: the chat template refuses it: Conversation roles"):
        ChatComposer(template("gemma").codec, store).segments(ChatRequest(tuple(said("a") * 2)), "", 1 << 20)
    with pytest.raises(InvalidRequest, match=r"^chat\.messages\[0\].*more than 100 characters"):
        ChatComposer(CODEC, store).segments(ChatRequest(tuple(said("a" * 200))), "", 100)


def test_what_is_answered_is_remembered_for_its_tenant(store: ChunkStore) -> None:
    composer, served = ChatComposer(CODEC, store), FakeServed(vocabulary=1 << 20)
    resolver = Resolver(served, CODEC, store)  # type: ignore[arg-type]
    chat = ChatRequest((Message("system", ("s",)), Message("user", ("a", ChunkPart(put(store, "doc", 7, 8)), "b"))))
    segments, prompt = composer.segments(chat, "mine", 1 << 20)
    composition = replace(resolver.resolve(segments, ReuseMode.EXACT, "mine"), chat=prompt)
    answer = CODEC.encode("So.<|im_end|>")
    composer.answered(composition, Said("So."), ())
    composer.answered(replace(composition, chat=None), Said("So."), answer)
    then = replace(chat, messages=(*chat.messages, *said("x", "So.", "c")[1:]))
    assert composer.segments(then, "mine", 1 << 20)[1].turns_kept == 0
    composer.answered(composition, Said("So."), answer)
    again, kept = composer.segments(then, "mine", 1 << 20)
    assert (kept.turns_kept, kept.pieces, kept.kept_segments) == (1, 1, len(segments))
    assert [each.chunk_id for each in again] == [each.chunk_id for each in segments[:-1]] + [None, None]
    assert again[-2].token_ids == (*(segments[-1].token_ids or ()), *answer) and again[-2].type is ChunkType.TURN
    assert composer.segments(replace(then, tools=({"name": "f"},)), "mine", 1 << 20)[1].turns_kept == 0
    with pytest.raises(NotFound):  # another tenant has neither the chunk nor the turn
        resolver.resolve(composer.segments(then, "yours", 1 << 20)[0], ReuseMode.EXACT, "yours")
    assert composer.segments(then, "yours", 1 << 20)[1].turns_kept == 0


def test_names_need_a_store(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(store, "list_records", away)
    with pytest.raises(StoreUnavailable):
        ChatComposer(CODEC, store).segments(named("a"), "", 1 << 20)
    assert ChatComposer(CODEC, store).segments(ChatRequest(tuple(said("a"))), "", 1 << 20)[0]
