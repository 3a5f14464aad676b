"""Segments keyed and placed: what is reused, what is computed, how long the answer may be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_store.tenant import SHARED_TENANT, tenant_of
from decode_service.prompt.composition import answer_tokens, compose
from engine.reuse import Exactness, ReuseMode
from serving.errors import InvalidRequest
from tests.decode_service.prompts import composed, segment
from tests.fakes import FakeServed

SERVED: Any = FakeServed(context_length_max=10)
token_lists = st.lists(st.integers(0, 383), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    chunks=st.lists(token_lists, max_size=4),
    query=token_lists,
    mode=st.sampled_from(ReuseMode),
    by_id=st.booleans(),
)
def test_read_and_computed_tokens_are_the_prompt(
    chunks: list[list[int]], query: list[int], mode: ReuseMode, by_id: bool
) -> None:
    composition = composed(*chunks, query=query, mode=mode, query_by_id=by_id)
    prompt = [token for part in (*chunks, query) for token in part]
    assert composition.token_ids() == prompt and composition.prompt_tokens == len(prompt)
    assert sum(chunk.visible for chunk in composition.chunks) + len(composition.tail) == len(prompt)
    assert prompt[composition.tail_start :] == list(composition.tail) and composition.tail
    full_hit = mode is ReuseMode.EXACT and by_id
    assert (composition.query is None) == full_hit
    assert [s.token_ids for s in composition.context] == [tuple(part) for part in chunks]
    start = 0
    for chunk in composition.chunks:
        behind = sum(len(composition.chunks[index].token_ids) for index in chunk.context)
        assert chunk.offset == start - behind
        start += len(chunk.token_ids)


def test_a_full_hit_computes_the_last_token_alone() -> None:
    composition = composed((1, 2), query=(3, 4, 5), query_by_id=True)
    assert composition.tail == (5,) and [chunk.visible for chunk in composition.chunks] == [2, 2]
    assert composed((1, 2), query=(5,), query_by_id=True).chunks[-1].visible == 0


def test_modes_say_how_exact_a_chunk_is() -> None:
    kinds = {
        mode: [c.exactness(k) for k in c.chunks] for mode in ReuseMode for c in [composed((1,), (2,), (3,), mode=mode)]
    }
    same, masked = Exactness.EXACT_CONTEXT, Exactness.EXACT_BLOCK_MASK
    assert kinds[ReuseMode.EXACT] == [same] * 3
    assert kinds[ReuseMode.ANCHORED] == [same, same, masked]
    assert kinds[ReuseMode.INDEPENDENT] == [same, masked, masked]


def test_kv_is_the_tenants_unless_it_and_its_context_are_shared() -> None:
    segments = [segment(1, shared=True), segment(2), segment(3, shared=True), segment(9, query=True)]
    composition = compose(SERVED, segments, ReuseMode.EXACT, "mine")
    assert [chunk.tenant for chunk in composition.chunks] == [SHARED_TENANT, tenant_of("mine"), tenant_of("mine")]
    other = compose(SERVED, segments, ReuseMode.EXACT, "yours")
    same = [a.key == b.key for a, b in zip(composition.chunks, other.chunks, strict=True)]
    assert same == [True, False, False]


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([], "segments: at least one"),
        ([segment(1), segment(query=True)], r"segments\[1\]: the query is empty"),
        ([segment(), segment(1, query=True)], r"segments\[0\]: it is empty"),
        ([segment(1), segment(384, query=True)], r"segments\[1\]: token id 384 is not in .*0\.\.383"),
    ],
)
def test_segments_that_cannot_be_are_named(segments: list[Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        compose(SERVED, segments, ReuseMode.EXACT, "")


def test_the_answer_has_the_room_that_is_left() -> None:
    composition = composed((1,) * 4, query=(2, 3))
    assert answer_tokens(SERVED, composition, None, 128) == 4 and answer_tokens(SERVED, composition, None, 3) == 3
    assert answer_tokens(SERVED, composition, 4, 128) == 4
    with pytest.raises(InvalidRequest, match=r"sampling\.max_tokens: 5 with 6 prompt tokens .* at most 4"):
        answer_tokens(SERVED, composition, 5, 128)
    assert answer_tokens(SERVED, composed((1,) * 8, query=(2,)), None, 128) == 1
    with pytest.raises(InvalidRequest, match="10 prompt tokens leave no room"):
        answer_tokens(SERVED, composed((1,) * 8, query=(2, 2)), None, 128)
