"""What no row to come sees, of models whose layers have windows of several kinds."""

from __future__ import annotations

import random

from engine.plan import Window
from engine.sight import EVERYTHING, Sight


def test_where_one_layer_sees_everything_everything_is_seen() -> None:
    for sight in (Sight.of([Window(8), None]), Sight.of([None]), Sight.of([]), EVERYTHING):
        assert not sight.is_limited and sight.first(10**6) == 0


def test_the_first_token_seen_is_that_of_the_layer_that_sees_furthest_and_only_moves_on() -> None:
    rng = random.Random(5)
    for _ in range(50):
        layers = [Window(rng.randint(1, 40), chunked=rng.random() < 0.4) for _ in range(rng.randint(1, 4))]
        sight = Sight.of([*layers, *layers])
        assert sight.is_limited and set(sight.windows) == set(layers) and len(sight.windows) == len(set(layers))
        before = 0
        for position in range(200):
            first = sight.first(position)
            assert first == min(layer.first(position) for layer in layers)
            assert before <= first <= position and position - first < sight.tokens
            before = first
