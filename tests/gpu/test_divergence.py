"""The divergence view on the card: right answers within the tolerance, a wrong element found, hidden states seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine.compare.divergence import TOLERANCE, compare
from engine.compare.trace import STORED, trace_eager, trace_engine
from engine.reuse import ReuseMode
from tests.gpu.engine_models import GEOMETRIES, served, tokens

pytestmark = pytest.mark.gpu
CHUNKS = [tuple(tokens(seed, count)) for seed, count in ((1, 5), (2, 70), (3, 1), (4, 16))]
QUERY = tuple(tokens(5, 30))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_our_engine_beside_eager_attention(name: str) -> None:
    for mode in ReuseMode:
        a, b = (way(served(name), CHUNKS, QUERY, mode) for way in (trace_engine, trace_eager))
        found = compare(a, b)
        print(name, mode, {kind: f"{float(grid.nan_to_num(0).max()):.3f}" for kind, grid in found.differences.items()})
        assert found.first(TOLERANCE["bfloat16"]) is None
        assert bool(a.seen[:-1].all()), "of every layer but the last"


def test_a_wrong_element_of_stored_kv() -> None:
    model, taken = served("qwen3-ratio4-128"), []

    def note(key: Any, token_ids: Sequence[int], pool: Any, run: Any) -> str:
        taken.append((key, pool, run, len(token_ids)))
        return "not there"

    fresh = trace_engine(model, CHUNKS, QUERY, ReuseMode.ANCHORED, load=note)
    held = {key: [part.clone() for part in pool.run_planes(run, count)] for key, pool, run, count in taken}

    def load(key: Any, token_ids: Sequence[int], pool: Any, run: Any) -> str:
        for part, source in zip(pool.run_planes(run, len(token_ids)), held[key], strict=True):
            part.copy_(source)
        return ""

    same = trace_engine(model, CHUNKS, QUERY, ReuseMode.ANCHORED, load=load)
    assert same.sources == [STORED] * 4 and compare(same, fresh).first(0.0) is None, "the same bits"
    list(held.values())[1][3][40, 1, 7] += 1.0  # V of layer 1
    place = compare(trace_engine(model, CHUNKS, QUERY, ReuseMode.ANCHORED, load=load), fresh).first(0.0)
    assert place is not None and (place.kind, place.layer, place.token) == ("V", 1, 5 + 40)
