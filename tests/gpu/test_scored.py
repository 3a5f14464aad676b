"""Rows of prompts that are scored, in packed steps and in long chunks' pieces: as eager attention says."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from engine.model.borrowed import BorrowedModel
from engine.run.cuda.runner import PackedRunner
from engine.run.pieces import chunk_rows, cuts
from engine.run.protocol import StepRows
from engine.run.room import StepRoom
from engine.sampling.params import Choice, Scored
from engine.served import look_into
from tests.engine.composer import Composer
from tests.gpu.engine_models import served, tokens, twins

pytestmark = pytest.mark.gpu

NAME = "qwen3-ratio4-128"
LENGTH = 700


def scored(rows: StepRows, first: int, prompt: list[int], top: int) -> StepRows:
    pairs = tuple((row, prompt[first + row + 1]) for row in range(len(rows.sources)) if first + row + 1 < len(prompt))
    return replace(rows, scored=Scored(pairs, top))


def check(found: list[Choice], prompt: list[int], top: int) -> None:
    """bf16 against the fp32 twin: within what bf16 rounds."""
    oracle = BorrowedModel(copy.deepcopy(twins(NAME)[0]), name="oracle")
    expected = oracle.eager_forward(torch.tensor(prompt)).log_softmax(-1)
    assert [choice.token_id for choice in found] == prompt[1:]
    for row, choice in enumerate(found):
        assert choice.logprob == pytest.approx(float(expected[row, choice.token_id]), abs=0.1)
        assert len(choice.top) == top
        for token, value in choice.top:
            assert value == pytest.approx(float(expected[row, token]), abs=0.1)


@pytest.mark.parametrize("long_chunk", [4096, 64])
def test_a_chunks_rows(long_chunk: int) -> None:
    """Packed, as many rows as there are slots in a step; and alone, by library attention, all rows at once."""
    model = served(NAME, piece_tokens=256)
    composer = Composer(model, pages=512)
    runner = composer.runner
    assert isinstance(runner, PackedRunner)
    runner._long_chunk = long_chunk
    prompt, found = tokens(3, LENGTH), list[Choice]()
    run = runner.pool.allocate_run(LENGTH)
    assert run is not None
    first = 0
    launched = []
    for cut in cuts(runner, (), LENGTH, chunk=True):
        for at in range(cut.first, cut.first + cut.rows, cut.rows if cut.alone else runner.slots):
            count = min(cut.first + cut.rows - at, cut.rows if cut.alone else runner.slots)
            rows = chunk_rows(prompt, replace(cut, first=at, rows=count), (), run)
            launched.append(runner.begin([scored(rows, at, prompt, 3)]))  # several in flight: none is read yet
            first += count
    assert first == LENGTH
    for step in launched:
        found += step.scores()
    check(found, prompt, 3)


def test_more_rows_than_slots_are_refused() -> None:
    composer = Composer(
        look_into(BorrowedModel(copy.deepcopy(twins(NAME)[1]).to("cuda"), name=NAME), piece_tokens=256), pages=64
    )
    runner = composer.runner
    prompt = tokens(4, 100)
    run = runner.pool.allocate_run(100)
    assert run is not None and isinstance(runner.room(decoding=False), StepRoom)
    rows = chunk_rows(prompt, next(cuts(runner, (), 100, chunk=True)), (), run)
    with pytest.raises(ValueError, match="rows to draw from or to score"):
        runner.begin([scored(rows, 0, prompt, 0)])
