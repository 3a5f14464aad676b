"""Which calls of packed steps the start check compares; what faults it finds is seen in ``bench.start_check``."""

from __future__ import annotations

import pytest

from engine.check.kernels import LAYERS_APART, LAYERS_FEW, looked_at


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
