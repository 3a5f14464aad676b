"""What the runner protocol promises, of both runners: the eager one here, the fused one on a device."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.plan import PlacedChunk, StepSequence
from engine.run.cuda.runner import FusedRunner
from engine.run.eager.runner import EagerRunner
from engine.run.pieces import prefill_chunk, prefill_chunk_piece, prefill_piece, prefill_tail
from engine.run.protocol import PendingStep, WatchableRunner
from engine.served import look_into
from tests.architectures import ARCHITECTURES, build

ROWS, TAIL = 3, 5
DOCUMENT = list(range(10, 40))
Make = Callable[[], WatchableRunner]


@pytest.fixture(params=["eager", pytest.param("fused", marks=pytest.mark.gpu)], scope="module")
def make(request: pytest.FixtureRequest) -> Make:
    """Makes runners over pools of their own; two runners have the same model."""
    kind, settings = ARCHITECTURES["qwen3-ratio2"]
    model = build(kind, settings)
    if request.param == "fused":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        model = copy.deepcopy(model).to("cuda", torch.bfloat16)
    served = look_into(BorrowedModel(model, name=kind), piece_tokens=8)

    def made() -> WatchableRunner:
        pool = PagedKVPool(served.layout, pages=40, chunk_pages=20, page_size=16, device=served.borrowed.device)
        return served.make_runner(pool, decode_buckets=(4, 8))

    assert isinstance(made(), {"eager": EagerRunner, "fused": FusedRunner}[request.param])
    return made


class Batch:
    """``ROWS`` sequences behind one document, their tails prefilled with other tokens each."""

    def __init__(self, runner: WatchableRunner) -> None:
        self.runner = runner
        pool = runner.pool
        run = pool.allocate_run(len(DOCUMENT))
        assert run is not None
        prefill_chunk(runner, DOCUMENT, (), run)
        self.chunks = (PlacedChunk(run.first * pool.page_size, len(DOCUMENT), 0),)
        self.tails = [tuple(pool.allocate_pages(2) or ()) for _ in range(ROWS)]
        self.first = []
        for row, pages in enumerate(self.tails):
            query = [row + 1] * TAIL
            logits = prefill_tail(runner, query, self.chunks, pages, start=len(DOCUMENT))
            self.first.append(int(logits.argmax()))

    def step(self, sources: list[int], at: int, rows: int = ROWS) -> PendingStep:
        """Decode step ``at`` of the first ``rows`` sequences."""
        held = TAIL + at
        sequences = [StepSequence(self.chunks, pages, held, 1, len(DOCUMENT) + held) for pages in self.tails[:rows]]
        return self.runner.decode(sources, sequences)


def test_a_step_waits_for_the_argmax_of_its_logits(make: Make) -> None:
    batch = Batch(make())
    step = batch.step(batch.first, 0)
    logits = step.logits()
    assert logits.shape == (ROWS, 211) and logits.dtype == torch.float32
    assert step.wait() == logits.argmax(dim=-1).tolist() == step.wait()
    assert len(step.plan.slots) == ROWS, "the plan is told without padding"


def test_naming_rows_of_the_step_before_is_waiting_for_it(make: Make) -> None:
    batch = Batch(make())
    waited, tokens = [], batch.first
    for at in range(5):
        tokens = batch.step(tokens, at).wait()
        waited.append(tokens)
    ahead, steps = Batch(make()), []
    steps.append(ahead.step(ahead.first, 0))
    named = []
    for at in range(1, 5):
        steps.append(ahead.step([~row for row in range(ROWS)], at))
        named.append(steps.pop(0).wait())
    assert [*named, steps[0].wait()] == waited


def test_rows_can_change_their_places_and_come_beside_tokens(make: Make) -> None:
    def sequences(batch: Batch) -> list[StepSequence]:
        at = TAIL + 1
        tails = (batch.tails[2], batch.tails[0])
        return [StepSequence(batch.chunks, pages, at, 1, len(DOCUMENT) + at) for pages in tails]

    batch, other = Batch(make()), Batch(make())
    told = batch.step(batch.first, 0).wait()
    expected = batch.runner.decode([told[2], told[0]], sequences(batch)).wait()
    other.step(other.first, 0)
    assert other.runner.decode([~2, told[0]], sequences(other)).wait() == expected


def test_logits_taken_before_the_next_step_are_the_callers_to_keep(make: Make) -> None:
    batch = Batch(make())
    kept = batch.step(batch.first, 0).logits()
    before = kept.clone()
    batch.step([~row for row in range(ROWS)], 1).wait()
    assert torch.equal(kept, before)


def test_sources_that_no_step_gave_are_refused(make: Make) -> None:
    batch = Batch(make())
    with pytest.raises(ValueError, match="row 0 of a step of 0 rows"):
        batch.step([~0] * ROWS, 0)
    batch.step(batch.first[:2], 0, rows=2)
    with pytest.raises(ValueError, match="row 2 of a step of 2 rows"):
        batch.step([~0, ~1, ~2], 1)
    prefill_piece(batch.runner, [1, 2], 0, (), batch.tails[0], start=0)
    with pytest.raises(ValueError, match="row 1 of a step of 0 rows"):
        batch.step([~0, ~1], 1, rows=2)


def test_steps_of_another_shape_are_refused(make: Make) -> None:
    runner = make()
    one = StepSequence((), (20,), 0, 1, 0)
    for sources, sequences in (([1, 2], [one]), ([1], [StepSequence((), (20,), 0, 2, 0)])):
        with pytest.raises(ValueError, match="one token and one row"):
            runner.decode(sources, sequences)
    with pytest.raises(ValueError, match="more than the largest bucket, 8"):
        runner.decode([1] * 9, [one] * 9)
    for tokens, rows in ((1, 2), (9, 9), (0, 0)):
        with pytest.raises(ValueError, match="1 to 8"):
            runner.prefill([1] * tokens, StepSequence((), (20,), 0, rows, 0))


def test_a_piece_gives_the_logits_of_its_last_row_or_none(make: Make) -> None:
    runner = make()
    run = runner.pool.allocate_run(6)
    assert run is not None
    silent = prefill_chunk_piece(runner, [1, 2, 3, 4, 5, 6], 0, (), run)
    for ask in (silent.logits, silent.wait):
        with pytest.raises(RuntimeError, match="begun without them"):
            ask()
    kept = [plane.clone() for plane in runner.pool.run_planes(run, 6)]
    told = runner.prefill([1, 2, 3, 4, 5, 6], StepSequence((), (run.first,), 0, 6, 0))
    assert told.logits().shape == (1, 211)
    assert told.wait() == told.logits().argmax(dim=-1).tolist()
    assert all(torch.equal(a, b) for a, b in zip(kept, runner.pool.run_planes(run, 6), strict=True))


def test_pieces_are_the_same_whoever_cuts_them(make: Make) -> None:
    runner = make()
    tokens, pages = list(range(20)), runner.pool.allocate_pages(2) or []
    whole = prefill_tail(runner, tokens, (), pages, start=0)
    for first in (0, 8, 16):
        piece = prefill_piece(runner, tokens, first, (), pages, start=0)
    assert torch.equal(piece.logits()[0], whole)
    with pytest.raises(ValueError, match="at least one token"):
        prefill_tail(runner, [], (), pages, start=0)


def test_context_that_was_moved_computes_no_chunk(make: Make) -> None:
    runner = make()
    run = runner.pool.allocate_run(4)
    assert run is not None
    with pytest.raises(ValueError, match="computed places"):
        prefill_chunk(runner, [1, 2], [PlacedChunk(64, 2, 3)], run)


def test_every_layer_is_seen_while_it_is_watched(make: Make) -> None:
    runner, seen = make(), set[int]()
    if isinstance(runner, FusedRunner):
        pytest.skip("captured steps call nothing; tests/gpu/test_divergence.py watches those that are not")
    with runner.watching_layers(lambda layer, hidden: seen.add(layer)):
        prefill_tail(runner, [1, 2, 3], (), runner.pool.allocate_pages(1) or [], start=0)
    assert seen == {0, 1, 2}
    seen.clear()
    prefill_tail(runner, [1, 2, 3], (), runner.pool.allocate_pages(1) or [], start=0)
    assert not seen
