"""A decode step that outgrows its lists makes larger ones, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from engine.plan import PlacedChunk, StepSequence
from engine.run.cuda.runner import FusedRunner
from engine.run.cuda.steps import StepLimits
from engine.run.pieces import GREEDY
from engine.run.protocol import PendingStep, StepRows
from engine.sampling.params import Draw
from tests.engine.composer import Composer, Request
from tests.gpu.engine_models import served, tokens

pytestmark = pytest.mark.gpu


def requests() -> list[Request]:
    return [
        ([tokens(seed, 60 + seed) for seed in range(row, row + 5)], tokens(99, 5), "independent") for row in range(8)
    ]


def test_outgrown_lists_are_replaced_and_the_bits_stay() -> None:
    model = served("qwen3-ratio4-128")
    usual = Composer(model, pages=1024, decode_buckets=(8,))
    small = Composer(model, pages=1024, decode_buckets=(8,), limits=StepLimits(rows=8, pairs=16, partials=16))
    assert isinstance(small.runner, FusedRunner)
    pieces = small.runner._pieces
    expected = usual.generate(requests(), 5)
    got = small.generate(requests(), 5)
    for (ids, logits), (small_ids, small_logits) in zip(expected, got, strict=True):
        assert ids == small_ids
        # Their queries were prefilled another way (the lists of pieces do not grow), so only decode's way is compared.
        torch.testing.assert_close(logits, small_logits, atol=0.25, rtol=0.05)
    assert small.runner.steps.limits.partials > 16
    assert small.runner._pieces is pieces


def test_tokens_in_flight_survive_a_growth() -> None:
    model = served("qwen3-ratio4-128")
    composer = Composer(model, pages=1024, decode_buckets=(8,), limits=StepLimits(rows=8, pairs=16, partials=16))
    runner = composer.runner
    assert isinstance(runner, FusedRunner)
    chunks = [tokens(seed, 40) for seed in range(30)]
    _, placed = composer.hold(chunks, "independent")
    pages = tuple(composer.pool.allocate_pages(2) or ())
    runner.open(0, GREEDY)

    def step(placed: tuple[PlacedChunk, ...], at: int, position: int, source: int) -> PendingStep:
        draw = Draw(0, at, position + 1)
        return runner.begin([StepRows(StepSequence(placed, pages, at, 1, position), [source], draw)])

    first = step((), 0, 0, 7)
    second = step(placed, 1, 1201, ~0)
    token = first.wait()[0].token_id
    named = second.wait()[0].token_id
    third = step(placed, 1, 1201, token)
    assert runner.steps.limits.partials > 16
    assert third.wait()[0].token_id == named
