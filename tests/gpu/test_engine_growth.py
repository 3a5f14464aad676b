"""A step that outgrows its lists makes larger ones, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from engine.plan import PlacedChunk, StepSequence
from engine.run.cuda.runner import PackedRunner
from engine.run.cuda.steps import StepLimits
from engine.run.pieces import GREEDY
from engine.run.protocol import PendingStep, StepRows
from engine.sampling.params import Draw
from tests.engine.composer import Composer, Request
from tests.gpu.engine_models import served, tokens

pytestmark = pytest.mark.gpu
SMALL = StepLimits(pairs=24, partials=24)


def requests() -> list[Request]:
    return [
        ([tokens(seed, 60 + seed) for seed in range(row, row + 5)], tokens(99, 5), "independent") for row in range(8)
    ]


def test_outgrown_lists_are_replaced_and_the_bits_stay() -> None:
    model = served("qwen3-ratio4-128")
    usual = Composer(model, pages=1024)
    small = Composer(model, pages=1024, slots=8, rows_max=8, limits=SMALL)
    runner = small.runner
    assert isinstance(runner, PackedRunner)
    for (ids, logits), (small_ids, small_logits) in zip(
        usual.generate(requests(), 5), small.generate(requests(), 5), strict=True
    ):
        assert ids == small_ids
        assert torch.equal(logits, small_logits)
    assert runner.steps.limits.partials > SMALL.partials


def test_slices_stay_within_the_lists() -> None:
    """What decode rows leave is for slices, of which nothing grows."""
    composer = Composer(served("qwen3-ratio4-128"), pages=1024, slots=8, rows_max=8, limits=SMALL)
    runner = composer.runner
    assert isinstance(runner, PackedRunner)
    composer.hold([tokens(seed, 100) for seed in range(4)], "exact")
    assert runner.steps.limits == SMALL


def test_tokens_in_flight_survive_a_growth() -> None:
    composer = Composer(served("qwen3-ratio4-128"), pages=1024, slots=8, rows_max=8, limits=SMALL)
    runner = composer.runner
    assert isinstance(runner, PackedRunner)
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
    assert runner.steps.limits.partials > SMALL.partials
    assert third.wait()[0].token_id == named
