"""Which calls of packed steps the start check compares; what faults it finds is seen in ``bench.start_check``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chunk_store.layout import KVLayout, LayerLayout
from engine.attention import Scores
from engine.check.kernels import LAYERS_APART, LAYERS_FEW, WatchedAttention, looked_at
from engine.kv.pool import PagedKVPool


@pytest.mark.parametrize("layers", [1, LAYERS_FEW, 9, 30, 36, 61, 80])
def test_steps_one_after_the_other_look_at_every_layer(layers: int) -> None:
    seen = [[layer for layer in range(layers) if looked_at(layer, step, layers)] for step in range(40)]
    for first in range(len(seen) - LAYERS_APART + 1):
        assert set().union(*seen[first : first + LAYERS_APART]) == set(range(layers))
    if layers <= LAYERS_FEW:
        assert all(len(each) == layers for each in seen)
    else:
        assert max(map(len, seen)) <= -(-layers // LAYERS_APART)


@pytest.mark.parametrize("turn", [2, 3, 4, 6])
def test_a_step_of_a_deep_model_has_layers_of_every_kind(turn: int) -> None:
    for step in range(LAYERS_APART):
        kinds = {layer % turn for layer in range(LAYERS_APART * turn) if looked_at(layer, step, LAYERS_APART * turn)}
        assert kinds == set(range(turn))


def test_a_watch_goes_on_to_other_layers_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And compares the layer that it was called with."""
    layers, compared = 12, []
    layout = KVLayout("float32", (LayerLayout(1, 2, 2),) * layers)
    pool = PagedKVPool(layout, pages=2, chunk_pages=1, page_size=4)
    findings: Any = SimpleNamespace(rotations=(None,) * layers, windows=(None,) * layers)
    watch = WatchedAttention(pool, findings)

    class Attention:
        def __init__(self) -> None:
            self.pool = pool

        def prepare(self, plan: Any) -> Any:
            return SimpleNamespace(slots=torch.tensor([0]))

        def attend(self, step: Any, layer: int, *_: Any) -> int:
            return layer

    monkeypatch.setattr(watch, "_exact", Attention())
    monkeypatch.setattr(watch, "_rounded", Attention())
    monkeypatch.setattr(watch, "_compare", lambda plan, out, exact, rounded: compared.append((plan, out, exact)))
    for step in range(LAYERS_APART):
        plan: Any = SimpleNamespace(step=step)
        for layer in range(layers):
            watch.after(plan, layer, torch.zeros(1, 1, 2), layer, Scores(1.0), True)  # type: ignore[arg-type]
    assert all(out == exact for _, out, exact in compared)
    assert sorted(out for _, out, _ in compared) == list(range(layers))
    assert len({plan.step for plan, *_ in compared}) == LAYERS_APART
