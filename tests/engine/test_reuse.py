"""Reuse modes: what a chunk attends to, its key and place, and what is everybody's."""

from __future__ import annotations

import pytest

from chunk_store.key import ModelIdentity
from engine.reuse import Exactness, KeyedChunk, ReuseMode, context_indices, exactness, key_composition

MODEL = ModelIdentity("m")
CHUNKS = [(1, 2, 3), (4,), (5, 6), (4,)]


def keyed(mode: ReuseMode, chunks: list[tuple[int, ...]] = CHUNKS, **options: object) -> list[KeyedChunk]:
    return key_composition(MODEL, chunks, mode, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "contexts", "offsets"),
    [
        (ReuseMode.EXACT, [(), (0,), (0, 1), (0, 1, 2)], [0, 0, 0, 0]),
        (ReuseMode.ANCHORED, [(), (0,), (0,), (0,)], [0, 0, 1, 3]),
        (ReuseMode.INDEPENDENT, [(), (), (), ()], [0, 3, 4, 6]),
    ],
)
def test_contexts_and_places(mode: ReuseMode, contexts: list[tuple[int, ...]], offsets: list[int]) -> None:
    made = keyed(mode)
    assert [chunk.context for chunk in made] == contexts
    assert [chunk.offset for chunk in made] == offsets
    assert [chunk.start for chunk in made] == [0, 3, 4, 6]
    assert [tuple(context_indices(mode, index)) for index in range(4)] == contexts


def test_equal_content_is_one_key_where_its_context_is_equal() -> None:
    exact, anchored, independent = (keyed(mode) for mode in ReuseMode)
    assert exact[1].key != exact[3].key
    assert anchored[1].key == anchored[3].key and independent[1].key == independent[3].key
    assert exact[0].key == anchored[0].key == independent[0].key, "the first chunk has no context in any mode"
    assert exact[1].key == anchored[1].key != independent[1].key
    assert keyed(ReuseMode.EXACT, [(9, 9), *CHUNKS[1:]])[3].key != exact[3].key


def test_salt_reaches_every_key_but_those_of_shared_content_on_shared_content() -> None:
    shared = [True, True, False, True]
    plain, salted, other = (keyed(ReuseMode.EXACT, salt=salt, shared=shared) for salt in ("", "a", "b"))
    assert [chunk.shared for chunk in salted] == [True, True, False, False]
    same = [a.key == b.key for a, b in zip(salted, other, strict=True)]
    assert same == [True, True, False, False]
    assert plain[0].key == salted[0].key
    assert [c.key for c in keyed(ReuseMode.EXACT, salt="a")] != [c.key for c in keyed(ReuseMode.EXACT, salt="b")]


def test_where_a_mode_has_the_context_of_exact_it_is_as_exact() -> None:
    answers = {mode: [exactness(mode, index) for index in range(3)] for mode in ReuseMode}
    plain, masked = Exactness.EXACT_CONTEXT, Exactness.EXACT_BLOCK_MASK
    assert answers == {
        ReuseMode.EXACT: [plain] * 3,
        ReuseMode.ANCHORED: [plain, plain, masked],
        ReuseMode.INDEPENDENT: [plain, masked, masked],
    }
