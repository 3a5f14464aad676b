"""Models' own code in captured packed steps: the oracle's logits, and bits of a row that follow from it alone."""

from __future__ import annotations

import random

import pytest
import torch

from engine.reuse import ReuseMode
from engine.run.cuda.runner import PackedRunner
from engine.run.protocol import StepRows
from engine.sampling.params import Draw, SamplingParams, SamplingRequest
from engine.served import ServedModel
from tests.engine.composer import Composer, Request
from tests.gpu.engine_models import CAPTURED, served, tokens, twins
from tests.gpu.packing import Packing, Slice
from tests.gpu.test_engine_oracle import expected

pytestmark = pytest.mark.gpu

SHARE_MAX = 1.7  # our rms error of a row's logits over that of bf16 eager attention, of the middle row
SAMPLED = SamplingRequest(SamplingParams(temperature=1.3, top_p=0.95, seed=5))


def model(name: str) -> ServedModel:
    found = served(name)
    print(name, found.decision, found.row_bits and found.row_bits.reason, flush=True)
    return found


@pytest.mark.parametrize("name", CAPTURED)
def test_steps_are_captured_and_as_near_to_fp32_as_eager_attention(name: str) -> None:
    exact, rounded = twins(name)
    found = model(name)
    composer = Composer(found, pages=256)
    assert found.decision.runner == "captured" and isinstance(composer.runner, PackedRunner)
    composer.runner.prepare()
    moved = "independent" if not found.refusals[ReuseMode.INDEPENDENT] else "exact"
    batch: list[Request] = [
        ([tokens(1, 17), tokens(2, 1), tokens(3, 30)], tokens(5, 9), "exact"),
        ([tokens(7, 150), tokens(3, 30)], tokens(6, 40), moved),
        ([tokens(3, 30), tokens(7, 150)], tokens(8, 1), "exact"),
    ]
    captured = composer.runner.steps.graphs
    ours, theirs = [], []
    for request, (ids, logits) in zip(batch, composer.generate(batch, 4), strict=True):
        wanted = expected(exact, request, ids)
        ours.append((logits.cpu() - wanted).square().mean(-1).sqrt())
        theirs.append((expected(rounded, request, ids) - wanted).square().mean(-1).sqrt())
    share = float(torch.cat(ours).median() / torch.cat(theirs).median())
    print(name, "share", share, "graphs", captured, flush=True)
    assert share <= SHARE_MAX and composer.runner.steps.graphs == captured


@pytest.mark.parametrize("name", CAPTURED)
def test_any_packing_gives_what_rows_give_one_at_a_time(name: str) -> None:
    found = model(name)
    assert found.row_bits is not None
    pack = Packing(Composer(found, pages=1024, slots=16, rows_max=256))
    kinds = pack.contexts((90, 17))
    tails = [pack.tail(kinds[i % len(kinds)], length, 100 + i) for i, length in enumerate((1, 17, 65, 130))]
    if not found.row_bits.equal:
        pytest.skip(found.row_bits.reason)
    expected_logits = [pack.by_decoding(tail) for tail in tails]
    kept = [pack.kv(tail) for tail in tails]
    for seed in range(4):
        pack.wipe(tails)
        for (index, end), logits in pack.packed(tails, random.Random(seed)).items():
            assert torch.equal(logits, expected_logits[index][end - 1]), (seed, index, end)
        assert all(torch.equal(pack.kv(tail), before) for tail, before in zip(tails, kept, strict=True)), seed


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_have_the_bits_of_uncaptured_ones_and_draw_the_same(name: str) -> None:
    results = []
    for graphs in (True, False):
        pack = Packing(Composer(model(name), pages=512, slots=8, rows_max=64, graphs=graphs))
        tails = [pack.tail(context, 40, 60 + i) for i, context in enumerate(pack.contexts((50,))[:3])]
        drawn = []
        for slot, tail in enumerate(tails):
            for cut in pack_cuts(pack, tail):
                pack.runner.begin([cut])
            pack.runner.open(slot, SAMPLED)
        for step in range(6):
            rows = []
            for slot, tail in enumerate(tails):
                row = Slice(tail, 39, 1, draws=False).step_rows(slot)
                rows.append(StepRows(row.sequence, row.sources, Draw(slot, step, tail.start + 40)))
            pending = pack.runner.begin(rows)
            drawn.append(([choice.token_id for choice in pending.wait()], pending.logits()))
        results.append(drawn)
    for (tokens_of, logits), (others, other_logits) in zip(*results, strict=True):
        assert tokens_of == others and torch.equal(logits, other_logits)


def pack_cuts(pack: Packing, tail: object) -> list[StepRows]:
    """The rows of a tail but its last, as the runner takes them."""
    alone = pack.runner.alone(40, chunk=False)
    sizes = [(first, min(24, 39 - first)) for first in range(0, 39, 24)]
    made = [Slice(tail, first, rows, draws=False).step_rows(0) for first, rows in sizes]  # type: ignore[arg-type]
    return [StepRows(each.sequence, each.sources, alone=alone) for each in made]
