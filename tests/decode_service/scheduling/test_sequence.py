"""A request inside the worker: its slots, its places in the pool, and how full the pool is."""

from __future__ import annotations

from decode_service.scheduling.sequence import Occupancy
from engine.kv.pages import PageRun
from engine.kv.resident import ResidentChunk
from tests.decode_service.scheduling.scheduled import request


def test_the_tail_needs_a_slot_for_all_but_the_last_token() -> None:
    sequence = request("a", tail=3, max_tokens=4)
    assert sequence.tail_tokens_max == 6
    sequence.tail_tokens = 3
    assert sequence.drawn == 1
    sequence.tail_tokens = 6
    assert sequence.drawn == 4


def test_places_are_built_anew_only_after_runs_have_moved() -> None:
    sequence = request("a", [("x", 4), ("y", 6)])
    for chunk, first in zip(sequence.composition.chunks, (2, 5), strict=True):
        chunk.resident = ResidentChunk(chunk.key, len(chunk.token_ids), PageRun(first, 2))
    places = sequence.placed(4, moves=1)
    assert [(place.first_slot, place.tokens) for place in places] == [(8, 4), (20, 6)]
    sequence.composition.chunks[0].held.run = PageRun(0, 2)
    assert sequence.placed(4, moves=1) is places
    assert [place.first_slot for place in sequence.placed(4, moves=2)] == [0, 20]
    sequence.composition.chunks[1].visible = 0
    assert len(sequence.placed(4, moves=3)) == 1, "what is not read has no place"


def test_usage_is_the_share_of_pages_that_are_not_free() -> None:
    assert Occupancy(0, 0, 0, {"free": 6, "chunk": 1, "tail": 1}).usage == 0.25
