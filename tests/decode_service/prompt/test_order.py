"""Which chunks change places, and what decides: their use, coarsely, then their ids."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from chunk_store.errors import StoreUnavailable
from chunk_store.key import ChunkId, ChunkType
from chunk_store.open import open_store
from chunk_store.tenant import SHARED_TENANT, tenant_of
from decode_service.prompt.composition import Composition
from decode_service.prompt.order import ChunkOrder, canonical_order, use_level
from decode_service.prompt.request_chunk import Segment
from decode_service.prompt.resolver import Resolver, SegmentRequest
from engine.reuse import ReuseMode
from serving.errors import InvalidRequest
from tests.decode_service.prompt.test_resolver import MINE, ids, named, record, text
from tests.fakes import FakeServed, codec

TYPES = {
    "t": ChunkType.TURN,
    "s": ChunkType.SYSTEM_PROMPT,
    "c": ChunkType.CONTEXT,
    "d": ChunkType.CODE,
    "q": ChunkType.QUERY,
}


def ordered(names: str, uses: Mapping[str, int] = MappingProxyType({}), held: str = "") -> str:
    """``names``: each a type's letter and an id's, the query last; ids of ``held`` have a role."""
    words = names.split()
    segments = [Segment(ChunkId(word[1:]), TYPES[word[0]], (1,)) for word in words]
    roles = [word[1:] in held.split() for word in words]

    def uses_of(asked: Sequence[ChunkId]) -> list[int]:
        return [uses.get(name, 0) for name in asked]

    return " ".join(words[index] for index in canonical_order(segments, roles, uses_of))


@pytest.mark.parametrize(
    ("given", "canonical", "uses"),
    [
        ("cb ca cc q", "ca cb cc q", {}),
        ("cb ca cc q", "cc cb ca q", {"c": 9, "b": 3}),
        ("cb ca cc q", "cb cc ca q", {"c": 108, "b": 128, "a": 107}),  # 108 and 128 are of one level
        ("cb ca cc q", "cc ca cb q", {"c": 129, "b": 0, "a": 1}),
        ("sz sy cb ca q", "sy sz ca cb q", {}),
        ("cb da ca db dz q", "cb da ca db dz q", {}),  # never across a type
        ("cc cb da ca q", "cb cc da ca q", {"a": 99}),
        ("cb ca cb q", "ca cb cb q", {}),  # the same one twice
        ("qb qa cb q", "qb qa cb q", {}),
        ("cd cc tb ta cb ca q", "cd cc tb ta ca cb q", {"c": 9}),  # what a kept turn was answered behind stays
        ("cb ca ca0", "ca cb ca0", {"a0": 99}),  # the query stays, whatever its type
        ("q", "q", {}),
    ],
)
def test_neighbours_of_one_type_are_sorted(given: str, canonical: str, uses: dict[str, int]) -> None:
    assert ordered(given, uses) == canonical
    assert ordered(canonical, uses) == canonical


def test_what_has_a_role_stays_and_nothing_passes_it() -> None:
    assert ordered("cd cc cz cb ca q", held="z") == "cc cd cz ca cb q"
    assert ordered("cb ca q", held="a b") == "cb ca q"


def test_every_order_of_the_same_chunks_becomes_one() -> None:
    uses = {name: random.Random(1).randrange(50) for name in "abcde"}
    found = {
        ordered(" ".join([*(f"c{name}" for name in given), "q"]), uses) for given in itertools.permutations("abcde")
    }
    assert len(found) == 1


def test_levels_rise_slowly() -> None:
    levels = [use_level(uses) for uses in range(10_000)]
    assert levels == sorted(levels) and levels[0] < levels[1] < levels[2]
    assert len(set(levels)) < 55, "so often a chunk changes its level in all"
    assert use_level(1025) == use_level(1200)


class Desk:
    """Two replicas over one store."""

    def __init__(self, root: Path) -> None:
        served: Any = FakeServed()
        self.url = f"file://{root}"
        self.replicas = [Resolver(served, codec(), open_store(self.url)) for _ in range(2)]
        self.store = self.replicas[0].store

    def resolve(self, *segments: SegmentRequest, replica: int = 0, salt: str = "mine") -> Composition:
        return self.replicas[replica].resolve(segments, ReuseMode.EXACT, salt, ChunkOrder.CANONICAL)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def contents(composition: Composition) -> list[int]:
    return [segment.token_ids[0] for segment in composition.segments]


def test_named_and_inline_chunks_stand_as_everybody_used_them(desk: Desk) -> None:
    """In every replica, and after a restart; each chunk knows where it was given."""
    put = [record(*(number,) * 3) for number in (11, 12, 13, 14)]
    desk.store.put_records(put)
    a, b, c, d = (each.chunk_id for each in put)
    for _ in range(3):
        desk.replicas[0].note_use(desk.replicas[0].resolve([named(c), ids(9)], ReuseMode.EXACT, "mine"))
    desk.replicas[0].note_use(desk.resolve(ids(14, 14, 14), ids(9)))
    by_id = sorted([(a, 11), (b, 12)])
    expected = [13, 14, *(number for _, number in by_id), 9]
    desk.store.sweep()
    reopened = Resolver(desk.replicas[0].served, codec(), open_store(desk.url))
    for resolver in (*desk.replicas, reopened):
        for given in itertools.permutations([named(a), ids(12, 12, 12), named(c), named(d)]):
            composition = resolver.resolve([*given, ids(9)], ReuseMode.EXACT, "mine", ChunkOrder.CANONICAL)
            assert contents(composition) == expected
            for chunk in composition.chunks:
                assert given[chunk.given_index] in (named(chunk.segment.chunk_id), ids(*chunk.token_ids))
            assert composition.reordered == ([chunk.given_index for chunk in composition.chunks] != [0, 1, 2, 3])


def test_the_keys_are_those_of_the_chunks_given_in_that_order(desk: Desk) -> None:
    put = [record(number, number) for number in (21, 22, 23)]
    desk.store.put_records(put)
    sorted_ids = sorted(each.chunk_id for each in put)
    canonical = desk.resolve(*(named(name) for name in reversed(sorted_ids)), ids(9))
    given = desk.replicas[0].resolve([*(named(name) for name in sorted_ids), ids(9)], ReuseMode.EXACT, "mine")
    assert [chunk.key for chunk in canonical.chunks] == [chunk.key for chunk in given.chunks]
    assert canonical.token_ids() == given.token_ids() and canonical.reordered and not given.reordered


def test_what_other_tenants_use_says_nothing(desk: Desk) -> None:
    """Also where they use what is shared."""
    shared = [record(number, number, tenant=SHARED_TENANT) for number in (31, 32)]
    desk.store.put_records(shared)
    first, second = sorted(each.chunk_id for each in shared)
    before = [chunk.segment.chunk_id for chunk in desk.resolve(named(second), named(first), ids(9)).chunks]
    for _ in range(20):
        desk.replicas[0].note_use(desk.resolve(named(second), ids(9), salt="theirs"))
    assert before == [first, second]
    assert [chunk.segment.chunk_id for chunk in desk.resolve(named(second), named(first), ids(9)).chunks] == before
    theirs = desk.resolve(named(first), named(second), ids(9), salt="theirs")
    assert [chunk.segment.chunk_id for chunk in theirs.chunks] == [second, first]
    assert desk.store.uses([second], tenant_of("theirs")) == [20] and desk.store.uses([second], MINE) == [0]


def test_a_turn_of_a_chat_stays(desk: Desk) -> None:
    composition = desk.resolve(text("b"), text("a"), text("hello", "user"), text("d"), text("c"), ids(9))
    assert [chunk.given_index for chunk in composition.chunks][2] == 2
    assert {chunk.given_index for chunk in composition.chunks[:2]} == {0, 1}


def test_errors_name_the_segment_as_it_was_given(desk: Desk) -> None:
    for position in range(3):
        segments = [ids(51), ids(52), ids(53)]
        segments[position] = ids(999)
        with pytest.raises(InvalidRequest, match=rf"^segments\[{position}\]"):
            desk.resolve(*segments, ids(9))


def test_without_the_store_the_order_is_by_id(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    put = [record(number, number) for number in (61, 62)]
    desk.store.put_records(put)
    first, second = sorted(each.chunk_id for each in put)
    desk.replicas[0].note_use(desk.resolve(named(second), ids(9)))

    def raises(*_: object, **__: object) -> None:
        raise StoreUnavailable("gone")

    assert [c.segment.chunk_id for c in desk.resolve(named(first), named(second), ids(9)).chunks] == [second, first]
    monkeypatch.setattr(desk.store, "get_records", raises)
    monkeypatch.setattr(desk.store, "uses", raises)
    assert [c.segment.chunk_id for c in desk.resolve(named(second), named(first), ids(9)).chunks] == [first, second]
