"""What the runner protocol promises, of both runners: the eager one here, the fused one on a device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.plan import PlacedChunk, StepSequence
from engine.run.cuda.runner import PackedRunner
from engine.run.eager.runner import EagerRunner
from engine.run.pieces import GREEDY, chunk_rows, cuts, prefill_chunk, prefill_tail, tail_rows
from engine.run.protocol import PendingStep, StepRows, WatchableRunner
from engine.sampling.params import Draw, SamplingParams, SamplingRequest, Scored
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

    assert isinstance(made(), {"eager": EagerRunner, "fused": PackedRunner}[request.param])
    return made


class Batch:
    """``ROWS`` sequences behind one document, their tails prefilled with other tokens each."""

    def __init__(self, runner: WatchableRunner) -> None:
        self.runner = runner
        pool = runner.pool
        run = pool.allocate_run(len(DOCUMENT))
        assert run is not None
        prefill_chunk(runner, DOCUMENT, (), run)
        self.chunks = (PlacedChunk(run.first * pool.page_size, len(DOCUMENT), 0, 0),)
        self.tails = [tuple(pool.allocate_pages(2) or ()) for _ in range(ROWS)]
        self.first = []
        for row, pages in enumerate(self.tails):
            query = [row + 1] * TAIL
            logits = prefill_tail(runner, query, self.chunks, pages, start=len(DOCUMENT), slot=row)
            self.first.append(int(logits.argmax()))

    def rows(self, row: int, source: int, at: int) -> StepRows:
        """The row of sequence ``row`` in decode step ``at``."""
        held = TAIL + at
        sequence = StepSequence(self.chunks, self.tails[row], held, 1, len(DOCUMENT) + held)
        return StepRows(sequence, [source], Draw(row, at + 1, len(DOCUMENT) + held + 1))

    def step(self, sources: list[int], at: int) -> PendingStep:
        """Decode step ``at`` of the first sequences."""
        return self.runner.begin([self.rows(row, source, at) for row, source in enumerate(sources)])


def ids(step: PendingStep) -> list[int]:
    return [choice.token_id for choice in step.wait()]


def test_a_step_draws_the_argmax_of_its_logits(make: Make) -> None:
    batch = Batch(make())
    step = batch.step(batch.first, 0)
    logits = step.logits()
    assert logits.shape == (ROWS, 211) and logits.dtype == torch.float32
    assert ids(step) == logits.argmax(dim=-1).tolist() == ids(step)
    assert len(step.plan.slots) == ROWS, "the plan is told without padding"


def test_naming_slots_is_waiting_for_what_was_drawn_in_them(make: Make) -> None:
    batch = Batch(make())
    waited, tokens = [], batch.first
    for at in range(5):
        tokens = ids(batch.step(tokens, at))
        waited.append(tokens)
    ahead = Batch(make())
    pending, named = ahead.step([~row for row in range(ROWS)], 0), []
    for at in range(1, 5):
        following = ahead.step([~row for row in range(ROWS)], at)
        named.append(ids(pending))
        pending = following
    assert [*named, ids(pending)] == waited


def test_rows_can_change_their_places_come_beside_tokens_and_miss_a_step(make: Make) -> None:
    batch, other = Batch(make()), Batch(make())
    told = ids(batch.step(batch.first, 0))
    expected = [ids(batch.runner.begin([batch.rows(2, told[2], 1), batch.rows(0, told[0], 1)]))]
    expected.append(ids(batch.runner.begin([batch.rows(1, told[1], 1)])))
    other.step([~row for row in range(ROWS)], 0)
    steps = [other.runner.begin([other.rows(2, ~2, 1), other.rows(0, told[0], 1)])]
    steps.append(other.runner.begin([other.rows(1, ~1, 1)]))
    assert [ids(step) for step in steps] == expected


def test_a_slot_that_is_opened_anew_forgets_who_had_it(make: Make) -> None:
    batch, drawn = Batch(make()), []
    for params in (SamplingParams(temperature=1.0, seed=3), SamplingParams(), SamplingParams(temperature=1.0, seed=3)):
        batch.runner.open(0, SamplingRequest(params, (), frozenset()))
        drawn.append([ids(batch.step([source], 0))[0] for source in (batch.first[0], batch.first[1])])
    assert drawn[0] == drawn[2]


def test_a_step_without_draws_has_no_tokens(make: Make) -> None:
    batch = Batch(make())
    silent = replace(batch.rows(1, batch.first[1], 0), draw=None)
    step = batch.runner.begin([batch.rows(0, batch.first[0], 0), silent, batch.rows(2, batch.first[2], 0)])
    other = Batch(make())
    both = other.step(other.first, 0)
    assert ids(step) == [ids(both)[0], ids(both)[2]]
    assert torch.equal(step.logits(), both.logits()[[0, 2]])


def test_a_row_draws_in_several_slots_and_each_goes_on_as_if_it_had_the_row_alone(make: Make) -> None:
    """More draws than rows: a prompt of one token that several answers follow."""
    batch, requests = Batch(make()), [SamplingParams(temperature=1.5, seed=seed) for seed in range(6)]
    position, singly = len(DOCUMENT) + TAIL + 1, []
    for params in requests:
        batch.runner.open(0, SamplingRequest(params, (), frozenset()))
        singly += ids(batch.runner.begin([replace(batch.rows(0, batch.first[0], 0), draw=Draw(0, 0, position))]))
    for slot, params in enumerate(requests):
        batch.runner.open(slot, SamplingRequest(params, (), frozenset()))
    first, *others = (Draw(slot, 0, position) for slot in range(6))
    row = replace(
        batch.rows(0, batch.first[0], 0), draw=first, also=tuple(others), alone=batch.runner.alone(1, chunk=False)
    )
    step = batch.runner.begin([row])
    assert step.logits().shape == (6, 211) and len(set(singly)) > 1
    assert ids(step) == singly
    if not row.alone:  # and beside others that draw
        batch.runner.open(6, SamplingRequest(SamplingParams(), (), frozenset()))
        beside = replace(batch.rows(1, batch.first[1], 0), draw=Draw(6, 1, position))
        assert ids(batch.runner.begin([beside, row]))[1:] == singly


def test_tokens_are_scored_behind_the_rows_that_are_asked(make: Make) -> None:
    """A prompt's piece, or slice: what each row says of the next token, and of two; its KV and draw are as without."""
    runner = make()
    run = runner.pool.allocate_run(6)
    assert run is not None
    tokens = [1, 2, 3, 4, 5, 6]
    cut = next(cuts(runner, (), 6, chunk=False))
    pages = tuple(range(run.first, run.first + run.pages))
    plain = tail_rows(tokens, cut, (), pages, start=0, draw=Draw(3, 0, 6))
    runner.open(3, GREEDY)
    expected = ids(runner.begin([plain]))
    kept = [plane.clone() for plane in runner.pool.run_planes(run, 6)]
    each = []
    for row in range(6):  # the logits of each row, as those of a prompt's last
        step = runner.begin(
            [tail_rows(tokens[: row + 1], replace(cut, rows=row + 1), (), pages, start=0, draw=plain.draw)]
        )
        each.append(step.logits()[0].log_softmax(-1))
    wanted = ((0, 2), (1, 3), (1, 9), (2, 4), (4, 6), (5, 7))
    scored = replace(plain, scored=Scored(wanted, top=2))
    step = runner.begin([scored])
    scores, runner_is_fused = step.scores(), isinstance(runner, PackedRunner)
    assert ids(step) == expected and [score.token_id for score in scores] == [token for _, token in wanted]
    for (row, token), score in zip(wanted, scores, strict=True):
        assert score.logprob == pytest.approx(float(each[row][token]), abs=1e-4)
        assert [value for _, value in score.top] == pytest.approx(each[row].topk(2).values.tolist(), abs=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(kept, runner.pool.run_planes(run, 6), strict=True))
    if runner_is_fused:  # beside rows that decode, and without a draw of its own
        batch = Batch(runner)
        told = ids(runner.begin([batch.rows(0, batch.first[0], 0)]))
        beside = runner.begin([batch.rows(0, batch.first[0], 0), replace(scored, draw=None)])
        assert ids(beside) == told and beside.scores() == scores
        assert runner.begin([replace(scored, draw=None)]).scores() == scores


def test_many_rows_are_scored_some_at_a_time(make: Make) -> None:
    """More rows than are looked at once; only pieces that run alone have them."""
    runner = make()
    assert isinstance(runner, EagerRunner | PackedRunner)
    tokens = [(7 * at) % 200 for at in range(150)]
    wide = runner.piece_tokens
    runner.piece_tokens = 150
    try:
        if isinstance(runner, PackedRunner):
            pytest.skip("chunks of this length go into packed steps; see tests/gpu/test_scored.py")
        run = runner.pool.allocate_run(150)
        assert run is not None
        rows = chunk_rows(tokens, next(cuts(runner, (), 150, chunk=True)), (), run)
        scored = Scored(tuple((row, tokens[row + 1]) for row in range(149)))
        scores = runner.begin([replace(rows, scored=scored)]).scores()
    finally:
        runner.piece_tokens = wide
    assert isinstance(runner, EagerRunner)
    logits = runner.borrowed.eager_forward(torch.tensor(tokens)).log_softmax(-1)
    assert [score.logprob for score in scores] == pytest.approx(logits[range(149), tokens[1:]].tolist(), abs=1e-4)


def test_logits_taken_before_the_next_step_are_the_callers_to_keep(make: Make) -> None:
    batch = Batch(make())
    kept = batch.step(batch.first, 0).logits()
    before = kept.clone()
    batch.step([~row for row in range(ROWS)], 1).wait()
    assert torch.equal(kept, before)


def test_steps_of_another_shape_are_refused(make: Make) -> None:
    runner = make()
    with pytest.raises(ValueError, match="needs rows"):
        runner.begin([])
    one = StepSequence((), (20,), 0, 1, 0)
    with pytest.raises(ValueError, match="2 sources for 1 rows"):
        runner.begin([StepRows(one, [1, 2])])
    with pytest.raises(ValueError, match="runs alone"):
        runner.begin([StepRows(one, [1], alone=True), StepRows(one, [1])])
    with pytest.raises(ValueError, match="a piece of 9 rows, 8 are the most"):
        runner.begin([StepRows(StepSequence((), (20,), 0, 9, 0), [1] * 9, alone=True)])


def test_a_piece_gives_the_token_of_its_last_row_or_none(make: Make) -> None:
    runner = make()
    run = runner.pool.allocate_run(6)
    assert run is not None
    tokens = [1, 2, 3, 4, 5, 6]
    cut = next(cuts(runner, (), 6, chunk=True))
    silent = runner.begin([chunk_rows(tokens, cut, (), run)])
    assert silent.wait() == []
    kept = [plane.clone() for plane in runner.pool.run_planes(run, 6)]
    runner.open(3, GREEDY)
    told = runner.begin([replace(chunk_rows(tokens, cut, (), run), draw=Draw(3, 0, 6))])
    assert told.logits().shape == (1, 211)
    assert ids(told) == told.logits().argmax(dim=-1).tolist()
    assert all(torch.equal(a, b) for a, b in zip(kept, runner.pool.run_planes(run, 6), strict=True))


def test_context_that_was_moved_computes_no_chunk(make: Make) -> None:
    runner = make()
    run = runner.pool.allocate_run(4)
    assert run is not None
    with pytest.raises(ValueError, match="computed places"):
        prefill_chunk(runner, [1, 2], [PlacedChunk(64, 2, 3, 3)], run)


def test_every_layer_is_seen_while_it_is_watched(make: Make) -> None:
    runner, seen = make(), set[int]()
    if isinstance(runner, PackedRunner):
        pytest.skip("captured steps call nothing; tests/gpu/test_divergence.py watches those that are not")
    with runner.watching_layers(lambda layer, hidden: seen.add(layer)):
        prefill_tail(runner, [1, 2, 3], (), runner.pool.allocate_pages(1) or [], start=0)
    assert seen == {0, 1, 2}
    seen.clear()
    prefill_tail(runner, [1, 2, 3], (), runner.pool.allocate_pages(1) or [], start=0)
    assert not seen
