"""Segments as asked for become a composition: text, ids, names; the store away; every refusal with its segment."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chunk_store.errors import StoreUnavailable
from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity, chunk_id, chunk_key
from chunk_store.open import open_store
from chunk_store.record import ChunkRecord
from chunk_store.tenant import SHARED_SALT, SHARED_TENANT, Tenant, tenant_of
from decode_service.prompt.composition import Composition
from decode_service.prompt.resolver import Resolver, SegmentRequest
from engine.reuse import ReuseMode, key_composition
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


def read_by(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], set[str]]]:
    """Of every look into the store: what was asked for, and what was known."""
    asked: list[tuple[set[str], set[str]]] = []
    get_records = desk.store.get_records

    def noted(names: Sequence[ChunkId], tenants: Any, known: Any) -> Any:
        asked.append((set(names), set(known)))
        return get_records(names, tenants, known=known)

    monkeypatch.setattr(desk.store, "get_records", noted)
    return asked


def test_content_is_read_once_and_looked_for_every_time(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = desk.put(record(5, 6))
    asked = read_by(desk, monkeypatch)
    made = [desk.resolve(named(name), ids(9)).chunks[0] for _ in range(3)]
    assert asked == [({name}, set()), ({name}, {name}), ({name}, {name})]
    assert len({chunk.key for chunk in made}) == 1 and {chunk.token_ids for chunk in made} == {(5, 6)}


@pytest.mark.parametrize("what", ["deleted", "expired"])
def test_a_chunk_whose_content_is_remembered_is_unknown_when_it_is_gone(desk: Desk, what: str) -> None:
    (name,) = desk.put(record(5, 6))
    for _ in range(2):
        desk.resolve(named(name), ids(9))
    if what == "deleted":
        desk.store.delete_chunks([ChunkId(name)], [MINE])
    else:
        desk.put(record(5, 6, expires_at=time.time() - 1.0))
    for _ in range(2):
        with pytest.raises(NotFound, match=r"^segments\[0\]\.chunk_id: no chunk"):
            desk.resolve(named(name), ids(9))
    desk.put(record(5, 6, name="again"))
    assert desk.resolve(named(name), ids(9)).segments[0].name == "again"


def test_what_one_tenant_used_is_neither_known_nor_faster_for_another(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time must not tell either: what was read and worked out for one tenant is read and worked out anew."""
    (name, everybodys) = desk.put(record(5, 6), record(7, 8, tenant=SHARED_TENANT))
    asked, made = read_by(desk, monkeypatch), list[str]()

    def noted(*given: Any) -> Any:
        made.append(given[3])
        return chunk_key(*given)

    monkeypatch.setattr("decode_service.prompt.composition.chunk_key", noted)
    for _ in range(2):
        desk.resolve(named(name), ids(9))
    with pytest.raises(NotFound):
        desk.resolve(named(name), ids(9), salt="yours")
    assert asked[-1] == ({name}, set())
    desk.put(record(5, 6, tenant=tenant_of("yours")))
    desk.resolve(named(name), ids(9), salt="yours")
    assert asked[-1] == ({name}, set()) and made == ["mine", "yours"]
    for salt in ("mine", "yours"):
        desk.resolve(named(everybodys), ids(9), salt=salt)
    assert asked[-1] == ({everybodys}, {everybodys}) and made == ["mine", "yours", SHARED_SALT]


@pytest.mark.parametrize("mode", list(ReuseMode))
def test_remembered_keys_are_those_that_are_made_anew(desk: Desk, mode: ReuseMode) -> None:
    """Random compositions of few chunks, some of them shared, by two tenants: every key as without a memory."""
    draw = random.Random(mode.value)
    contents = [(1,), (2, 3), (1, 2, 3), (4,)]
    desk.put(*(record(*tokens, tenant=tenant_of(salt)) for tokens in contents for salt in ("mine", "yours")))
    desk.put(*(record(*tokens, tenant=SHARED_TENANT) for tokens in ((5,), (6, 7))))
    contents += [(5,), (6, 7)]
    for _ in range(60):
        picked, salt = draw.choices(contents, k=draw.randint(0, 5)), draw.choice(("mine", "yours"))
        ways = [named(record(*tokens).chunk_id) if draw.random() < 0.5 else ids(*tokens) for tokens in picked]
        found = desk.resolve(*ways, ids(9), mode=mode, salt=salt).chunks
        shared = [tokens in ((5,), (6, 7)) for tokens in picked]
        expected = key_composition(desk.served.identity, picked, mode, salt, shared)
        assert [chunk.key for chunk in found] == [each.key for each in expected]


def test_a_token_that_the_model_lacks_is_found_every_time(desk: Desk) -> None:
    (name,) = desk.put(record(5, 384))
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="token id 384"):
            desk.resolve(named(name), ids(9))
