"""Segments as asked for become a composition: text, ids, names; the store away; every refusal with its segment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chunk_store.errors import StoreUnavailable
from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity, chunk_id
from chunk_store.open import open_store
from chunk_store.record import ChunkRecord
from chunk_store.tenant import SHARED_TENANT, Tenant, tenant_of
from decode_service.prompt.composition import Composition
from decode_service.prompt.resolver import RecordMemory, Resolver, SegmentRequest
from engine.reuse import ReuseMode
from serving.errors import InvalidRequest, NotFound, RequestError, Unsupported
from tests.fakes import FakeServed, codec

MINE = tenant_of("mine")


def text(words: str, role: str = "") -> SegmentRequest:
    return SegmentRequest(words, None, None, ChunkType.CONTEXT, role)


def ids(*tokens: int) -> SegmentRequest:
    return SegmentRequest(None, tokens, None, ChunkType.CONTEXT)


def named(name: str) -> SegmentRequest:
    return SegmentRequest(None, None, name, ChunkType.CONTEXT)


def record(
    *tokens: int, tenant: Tenant = MINE, tokenizer: TokenizerIdentity | None = None, **fields: Any
) -> ChunkRecord:
    identity = tokenizer or codec().identity
    name = chunk_id(identity, ChunkType.CONTEXT, tokens)
    return ChunkRecord(name, identity, ChunkType.CONTEXT, tokens, tenant=tenant, **fields)


class Desk:
    def __init__(self, root: Path) -> None:
        served: Any = FakeServed()
        self.served = served
        self.store = open_store(f"file://{root}")
        self.resolver = Resolver(served, codec(), self.store)

    def resolve(self, *segments: SegmentRequest, mode: ReuseMode = ReuseMode.EXACT, salt: str = "mine") -> Composition:
        return self.resolver.resolve(segments, mode, salt)

    def put(self, *records: ChunkRecord) -> list[str]:
        self.store.put_records(list(records))
        return [each.chunk_id for each in records]

    def away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def raises(*_: object, **__: object) -> None:
            raise StoreUnavailable("gone")

        monkeypatch.setattr(self.store, "get_records", raises)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


def test_text_ids_and_names_of_the_same_content_are_one_key(desk: Desk) -> None:
    tokens = codec().encode("a heap of stones")
    (name,) = desk.put(record(*tokens, name="heap"))
    ways = [desk.resolve(way, ids(9)) for way in (text("a heap of stones"), ids(*tokens), named(name))]
    assert len({way.chunks[0].key for way in ways}) == 1
    segments = [way.segments[0] for way in ways]
    assert [s.named_by_id for s in segments] == [False, False, True]
    assert [s.name for s in segments] == ["", "", "heap"] and {s.chunk_id for s in segments} == {name}
    assert ways[0].segments[-1].chunk_id == "", "an inline query has no name"


def test_a_role_is_a_turn_and_a_querys_role_opens_the_answer(desk: Desk) -> None:
    composition = desk.resolve(text("hello", "user"), text("hello", "user"))
    first, query = (codec().decode(s.token_ids, keep_special=True) for s in composition.segments)
    assert first == "<|user|>hello<end>" and query == first + "<|assistant|>"


def test_a_named_query_is_a_full_hit(desk: Desk) -> None:
    (name,) = desk.put(record(5, 6, 7))
    assert desk.resolve(ids(1), named(name)).query is None
    assert desk.resolve(ids(1), named(name), mode=ReuseMode.INDEPENDENT).query is not None


def test_shared_content_is_everybodys_also_when_it_is_sent_inline(desk: Desk) -> None:
    desk.put(record(5, 6, tenant=SHARED_TENANT))
    keys = {desk.resolve(ids(5, 6), ids(9), salt=salt).chunks[0].key for salt in ("mine", "yours")}
    assert len(keys) == 1
    assert len({desk.resolve(ids(5, 7), ids(9), salt=salt).chunks[0].key for salt in ("mine", "yours")}) == 2


def test_another_tenants_chunk_is_unknown(desk: Desk) -> None:
    (name,) = desk.put(record(5, 6))
    assert desk.resolve(named(name), ids(9)).chunks
    with pytest.raises(NotFound):
        desk.resolve(named(name), ids(9), salt="yours")


REFUSED: dict[str, tuple[Sequence[SegmentRequest], type[RequestError], str]] = {
    "unknown": ((ids(1), named("feed"), ids(9)), NotFound, r"^segments\[1\]\.chunk_id: no chunk 'feed' here"),
    "role": ((text("a", "wizard"), ids(9)), InvalidRequest, r"^segments\[0\]\.role: .*wizard"),
    "empty text": ((text(""), ids(9)), InvalidRequest, r"^segments\[0\]: it is empty"),
    "no query": ((ids(1), ids()), InvalidRequest, r"^segments\[1\]: the query is empty"),
    "nothing": ((), InvalidRequest, "^segments: at least one"),
    "vocabulary": ((ids(384), ids(9)), InvalidRequest, r"^segments\[0\]: token id 384"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_segment(desk: Desk, name: str) -> None:
    segments, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        desk.resolve(*segments)


def test_a_mode_and_a_tokenizer_that_do_not_fit_are_refused(desk: Desk) -> None:
    desk.served.refusals[ReuseMode.ANCHORED] = "positions are learned"
    with pytest.raises(Unsupported, match=r"reuse_mode: anchored .*model tiny: positions are learned; use exact"):
        desk.resolve(ids(1), ids(9), mode=ReuseMode.ANCHORED)
    (name,) = desk.put(record(5, tokenizer=TokenizerIdentity("f" * 64)))
    with pytest.raises(Unsupported, match=r"segments\[0\]\.chunk_id: .* tokenizer ffffffffffffffff, this service has"):
        desk.resolve(named(name), ids(9))


def test_while_the_store_is_away_what_was_seen_serves(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, unseen = desk.put(record(5, 6), record(7, 8))
    key = desk.resolve(named(seen), ids(9)).chunks[0].key
    desk.away(monkeypatch)
    assert desk.resolve(named(seen), ids(9)).chunks[0].key == key
    assert desk.resolve(ids(1, 2), ids(9)).chunks, "inline content needs no store"
    for name, salt in ((unseen, "mine"), (seen, "yours")):
        with pytest.raises(StoreUnavailable):
            desk.resolve(named(name), ids(9), salt=salt)


def test_what_is_no_longer_registered_is_forgotten(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = desk.put(record(5, 6))
    desk.resolve(named(name), ids(9))
    desk.store.delete_chunks([ChunkId(name)], [MINE])
    with pytest.raises(NotFound):
        desk.resolve(named(name), ids(9))
    desk.away(monkeypatch)
    with pytest.raises(StoreUnavailable):
        desk.resolve(named(name), ids(9))


def test_inline_chunks_are_registered_as_content_that_makes_room(desk: Desk) -> None:
    (kept, everybodys) = desk.put(record(5, 6, name="kept"), record(7, tenant=SHARED_TENANT))
    composition = desk.resolve(ids(5, 6), ids(7), ids(8, 8), ids(9))
    desk.resolver.register(composition)
    names = [ChunkId(s.chunk_id) for s in composition.context]
    found = desk.store.get_records(names, [MINE])
    assert [f.name if f else None for f in found] == ["kept", None, ""] and names[:2] == [kept, everybodys]
    assert found[0] is not None and not found[0].transient
    assert found[2] is not None and found[2].transient and found[2].token_ids == (8, 8)
    assert desk.store.stats().records == 3, "the query is not registered, nor is what is shared"


def test_memory_holds_the_newest_up_to_its_tokens() -> None:
    memory = RecordMemory(5)
    old, new, large = record(1, 1), record(2, 2, 2), record(*[3] * 6)
    for each in (old, new, large):
        memory.remember(MINE, each.chunk_id, each)
    assert memory.find(MINE, old.chunk_id) == old and memory.find(MINE, large.chunk_id) is None
    assert memory.find(Tenant("other"), old.chunk_id) is None
    memory.remember(MINE, old.chunk_id, old)
    memory.remember(MINE, ChunkId("one more"), record(4))
    assert memory.find(MINE, new.chunk_id) is None and memory.find(MINE, old.chunk_id) == old
    memory.remember(MINE, old.chunk_id, None)
    assert memory.find(MINE, old.chunk_id) is None
    memory.remember(MINE, new.chunk_id, new)
    assert memory.find(MINE, ChunkId("one more")) is not None, "what was forgotten takes no room"
