"""Packed steps as the host sees them: what is captured, which graph a step replays, what it brings to the device."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from engine.plan import PlacedChunk, StepSequence
from engine.run.cuda import runner as runner_module
from engine.run.cuda import steps as steps_module
from engine.run.cuda.buckets import buckets_up_to, draw_rows
from engine.run.cuda.captured import compile_kernels
from engine.run.cuda.cascade.tuning import Tuning
from engine.run.cuda.forward import DrawnRows, FusedForward
from engine.run.cuda.inputs import LineShape, PinnedRing
from engine.run.cuda.runner import PackedRunner
from engine.run.cuda.sampling.slots import UNREAD
from engine.run.cuda.steps import StepLimits
from engine.run.cuda.weights import FusedWeights, merge_weights
from engine.run.pieces import GREEDY
from engine.run.protocol import StepRows
from engine.sampling.params import Draw, SamplingParams, SamplingRequest, Scored
from tests.architectures import build

POSITIONS = 100_000


class Graph:
    def __init__(self, replayed: list[Graph]) -> None:
        self._replayed = replayed

    def replay(self) -> None:
        self._replayed.append(self)


class Graphs:
    """Captures nothing, and notes what is replayed."""

    def __init__(self) -> None:
        self.replayed: list[Graph] = []

    def __call__(self, device: torch.device) -> Graphs:
        return self

    def forget(self) -> None:
        """There is no memory."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        return Graph(self.replayed)


@pytest.fixture(scope="module")
def weights() -> FusedWeights:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 1}
    borrowed = BorrowedModel(build("qwen3", shape).to(torch.bfloat16), name="tiny")
    return merge_weights(borrowed, examine(borrowed))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made = Graphs()
    monkeypatch.setattr(steps_module, "GraphMaker", made)
    monkeypatch.setattr(runner_module, "compile_kernels", lambda device, launches: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    return made


def runner_of(weights: FusedWeights, **options: Any) -> PackedRunner:
    layer = LayerLayout(weights.kv_heads, weights.head_dim, weights.head_dim)
    pool = PagedKVPool(KVLayout("bfloat16", (layer,)), pages=5000, chunk_pages=2000, page_size=16)
    return PackedRunner(FusedForward(weights, pool, positions=POSITIONS), tuning=Tuning(), **options)


def rows_of(
    runner: PackedRunner, at: int, count: int, *, chunks: tuple[PlacedChunk, ...] = (), before: int = 0, slot: int = -1
) -> StepRows:
    """Rows of a sequence whose pages are the ``at``-th 60; they draw in ``slot`` unless it is -1."""
    pages = tuple(range(2000 + 60 * at, 2060 + 60 * at))
    start = sum(chunk.tokens for chunk in chunks) + before
    draw = Draw(slot, before, start + count) if slot >= 0 else None
    return StepRows(StepSequence(chunks, pages, before, count, start), [7] * count, draw)


KINDS = (
    SamplingParams(),
    SamplingParams(logprobs=True, top_logprobs=3),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=0.8, top_k=5),
    SamplingParams(presence_penalty=0.3),
)


@pytest.mark.parametrize("options", [{"slots": 16, "rows_max": 128}, {"slots": 1, "rows_max": 256}])
def test_once_prepared_no_traffic_captures_anything(
    weights: FusedWeights, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    runner, rng = runner_of(weights, **options), random.Random(3)
    monkeypatch.setattr(runner._pieces, "prepare", lambda: None)
    runner.prepare()
    captured = runner.steps.graphs
    chunks = [PlacedChunk(16 * first, tokens, 0, 0) for first, tokens in ((0, 100), (10, 3000), (300, 20_000))]
    for _ in range(150):
        room, batch = runner.room(decoding=True), []
        drawing = rng.randint(0, runner.slots)
        for slot in range(drawing):
            runner.open(slot, SamplingRequest(rng.choice(KINDS)))
            context = tuple(rng.sample(chunks, rng.randint(0, 3)))
            room.grant([chunk.tokens for chunk in context], 900)
            batch.append(rows_of(runner, slot, 1, chunks=context, before=rng.randint(0, 900), slot=slot))
        for at in range(16, 16 + rng.randint(0 if batch else 1, 4)):
            context = tuple(rng.sample(chunks, rng.randint(0, 3)))
            count = room.take([chunk.tokens for chunk in context], 0, rng.choice((1, 2, 40, 200)))
            batch += [rows_of(runner, at, count, chunks=context)] if count else []
        runner.begin(batch)
    assert runner.steps.graphs == captured
    assert runner.steps.limits == StepLimits.of_rows(runner.steps.rows), "and slices make no lists grow"


def test_a_greedy_step_that_decodes_is_one_graph(weights: FusedWeights, graphs: Graphs) -> None:
    runner = runner_of(weights, slots=8, rows_max=32)
    runner.steps.prepare()
    for slot, params in enumerate((SamplingParams(), SamplingParams(), SamplingParams(temperature=1.0))):
        runner.open(slot, SamplingRequest(params))

    def replayed(*batch: StepRows) -> int:
        graphs.replayed.clear()
        runner.begin(batch)
        return len(graphs.replayed)

    assert replayed(rows_of(runner, 0, 1, slot=0), rows_of(runner, 1, 1, slot=1)) == 1
    assert replayed(rows_of(runner, 0, 1, slot=0), rows_of(runner, 2, 1, slot=2)) == 2
    assert replayed(rows_of(runner, 0, 1, slot=0), rows_of(runner, 1, 20)) == 2
    assert replayed(rows_of(runner, 1, 20)) == 1


def test_what_a_step_brings_to_the_device(weights: FusedWeights, graphs: Graphs) -> None:
    runner = runner_of(weights, slots=4, rows_max=16)
    for slot in range(4):
        runner.open(slot, GREEDY)
    chunk = PlacedChunk(32, 50, 0, 0)
    batch = [
        rows_of(runner, 0, 3, chunks=(chunk,), before=20),
        StepRows(rows_of(runner, 1, 1, before=40).sequence, (~2,), Draw(2, 5, 41)),
        rows_of(runner, 2, 2, slot=1),
    ]
    step = runner.begin(batch)
    steps = runner.steps
    draws, drawn, sources, positions, slots = (part.tolist() for part in steps._shape.parts(steps._work.line))
    assert draws[:2] == [[2, 5, 41], [1, 0, 2]] and all(draw == [4, 0, 0] for draw in draws[2:])
    assert drawn[:2] == [3, 5]
    assert sources[:8] == [7, 7, 7, ~2, 7, 7, 0, 0]
    assert positions[:8] == [70, 71, 72, 40, 0, 1, 0, 0]
    page = (2000 + 1) * 16 + 4
    assert slots[:3] == [page, page + 1, page + 2]
    assert slots[6:8] == [runner.pool.scratch_page * 16] * 2
    assert len(step.plan.slots) == 6, "the plan is told without padding"


def test_rows_that_are_scored_go_where_nobody_draws(weights: FusedWeights, graphs: Graphs) -> None:
    """They are looked at before the next step, and need no graph of their own; several draws of one row are apart."""
    runner = runner_of(weights, slots=8, rows_max=16)
    runner.steps.prepare()
    captured, vocabulary = runner.steps.graphs, weights.vocabulary
    for slot in range(8):
        runner.open(slot, GREEDY)
    rows = torch.arange(8).to(torch.bfloat16)
    runner.steps._drawn.logits.copy_(torch.zeros(8, vocabulary))
    runner.steps._drawn.logits[:, 5] = rows  # by which the rows can be told apart
    first, second = Scored(((0, 5), (2, 5), (2, 6)), top=1), Scored(((1, 5),))
    batch = [
        rows_of(runner, 0, 1, before=9, slot=3),
        replace(rows_of(runner, 1, 3), scored=first),
        replace(rows_of(runner, 2, 2, slot=1), also=(Draw(2, 0, 2),), scored=second),
    ]
    step = runner.begin(batch)
    draws, drawn, *_ = (part.tolist() for part in runner.steps._shape.parts(runner.steps._work.line))
    assert draws[:4] == [[3, 9, 10], [1, 0, 2], [2, 0, 2], [8, 0, 0]] and drawn[:6] == [0, 5, 5, 1, 3, 5]
    runner.steps._drawn.logits.zero_()  # the next step
    expected = []
    for row, token in ((3, 5), (4, 5), (4, 6), (5, 5)):
        logits = torch.zeros(vocabulary)
        logits[5] = row
        expected.append(float(logits.log_softmax(-1)[token]))
    assert [score.logprob for score in step.scores()] == pytest.approx(expected, abs=1e-5)
    assert [score.top and score.top[0][0] for score in step.scores()] == [5, 5, 5, ()]
    runner.begin([replace(rows_of(runner, 1, 3), scored=first)])  # nobody draws
    assert runner.steps.graphs == captured
    with pytest.raises(ValueError, match="9 rows to draw from or to score, there are 8 slots"):
        runner.begin([replace(rows_of(runner, 1, 9), scored=Scored(tuple((row, 5) for row in range(9))))])


def test_more_draws_than_rows_have_a_step_that_holds_them(weights: FusedWeights, graphs: Graphs) -> None:
    runner = runner_of(weights, slots=8, rows_max=16)
    for slot in range(8):
        runner.open(slot, GREEDY)
    runner.begin([replace(rows_of(runner, 0, 1, slot=0), also=tuple(Draw(slot, 0, 1) for slot in range(1, 8)))])
    draws, drawn, *_ = (part.tolist() for part in runner.steps._shape.parts(runner.steps._work.line))
    assert [slot for slot, _, _ in draws] == list(range(8)) and drawn == [0] * 8


def test_lists_that_a_step_outgrows_are_made_larger(weights: FusedWeights, graphs: Graphs) -> None:
    small = StepLimits(pairs=40, partials=40)
    runner = runner_of(weights, slots=16, rows_max=16, limits=small)
    room = runner.room(decoding=False)
    chunks = tuple(PlacedChunk(16 * i, 16, 0, 16 * i) for i in range(9))
    assert room.take([16] * 9, 0, 16) == 2, "10 partial results a row of 40, less one for each row of padding"
    runner.begin([rows_of(runner, slot, 1, chunks=chunks) for slot in range(16)])
    assert runner.steps.limits == StepLimits(pairs=160, partials=160)
    assert runner.room(decoding=False).take([16] * 9, 0, 16) == 14


def test_what_no_step_can_be_is_refused_before_anything_is_launched(weights: FusedWeights, graphs: Graphs) -> None:
    runner = runner_of(weights, slots=2, rows_max=8)
    runner.open(0, GREEDY)
    one = rows_of(runner, 0, 1)
    with pytest.raises(ValueError, match="slot: 2 is none of"):
        runner.open(2, GREEDY)
    with pytest.raises(ValueError, match="slot: 2 is none"):
        runner.begin([StepRows(one.sequence, (~2,))])
    with pytest.raises(ValueError, match="slot: 5 is none"):
        runner.begin([StepRows(one.sequence, (1,), Draw(5, 0, 1))])
    with pytest.raises(ValueError, match="slot: 1 was not opened"):
        runner.begin([rows_of(runner, 0, 1, slot=1)])
    with pytest.raises(ValueError, match="3 rows to draw from or to score, there are 2 slots"):
        runner.begin([rows_of(runner, at, 1, slot=0) for at in range(3)])
    with pytest.raises(ValueError, match="9 rows, a step has 8 at most"):
        runner.begin([rows_of(runner, 0, 9)])
    with pytest.raises(ValueError, match="nothing is drawn"):
        runner.begin([StepRows(one.sequence, (1,), Draw(0, 0, 1), alone=True)])
    with pytest.raises(ValueError, match="computed places"):
        moved = rows_of(runner, 0, 1, chunks=(PlacedChunk(0, 16, 3, 3),))
        runner.begin([StepRows(moved.sequence, (1,), alone=True)])
    with pytest.raises(ValueError, match="slots: 2000 are more than the 1024 rows"):
        runner_of(weights, slots=2000)
    assert not graphs.replayed and runner.steps.launched == 0


def test_which_way_a_chunk_takes_follows_from_its_length(weights: FusedWeights, graphs: Graphs) -> None:
    runner = runner_of(weights, rows_max=8, slots=1)
    assert [runner.alone(tokens, chunk=True) for tokens in (1, 4096, 4097)] == [False, False, True]
    assert not runner.alone(1 << 20, chunk=False)


def test_a_step_is_read_before_many_later_ones_are_begun(weights: FusedWeights, graphs: Graphs) -> None:
    runner = runner_of(weights, rows_max=8, slots=1)
    runner.open(0, GREEDY)
    first, *_, last = [runner.begin([rows_of(runner, 0, 1, slot=0)]) for _ in range(UNREAD + 1)]
    assert last.wait() == last.wait()
    with pytest.raises(RuntimeError, match="later steps"):
        first.wait()
    with pytest.raises(RuntimeError, match="overwritten"):
        first.logits()
    assert last.logits().shape == (1, weights.vocabulary)


def test_a_head_of_an_odd_number_of_tokens_is_padded_and_nobody_sees_it(weights: FusedWeights) -> None:
    assert (weights.vocabulary, *weights.head.shape) == (211, 224, 64)
    assert not weights.head[211:].any() and weights.head[:211].any()
    drawn = DrawnRows.of(weights, torch.zeros(4, dtype=torch.int32)).first(2)
    assert drawn.logits.shape == (2, 211) and drawn.scores.shape == (2, 224)
    drawn.scores[:] = torch.arange(224)
    assert drawn.logits[1].tolist() == list(range(211))


def test_kernels_are_compiled_one_after_the_other_in_the_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    done: list[threading.Thread] = []
    compile_kernels(torch.device("cpu"), [lambda: done.append(threading.current_thread())] * 3)
    assert done == [threading.current_thread()] * 3, "launchers loaded by two threads at once get mixed up"


def test_rows_and_draws_of_steps() -> None:
    sizes = (1, 8, 16, 32, 64)
    assert buckets_up_to(32, sizes) == (1, 8, 16, 32)
    assert buckets_up_to(33, reversed_of(sizes)) == sizes
    assert buckets_up_to(99, sizes) == sizes
    assert buckets_up_to(2, (16, 32)) == (16,)
    assert [draw_rows(sizes, slots) for slots in (1, 2, 64)] == [1, 8, 64]


def reversed_of(sizes: Sequence[int]) -> Sequence[int]:
    return tuple(reversed(sizes))


def test_parts_of_a_line_and_pinned_memory_in_turn() -> None:
    shape = LineShape(8, 4, 9)
    assert shape.ints % 16 == 0
    parts = shape.parts(torch.arange(shape.ints))
    assert [tuple(part.shape) for part in parts] == [(4, 3), (4,), (8,), (8,), (8,)]
    assert torch.cat([part.reshape(-1) for part in parts]).tolist() == list(range(40))
    assert shape.parts(shape.idle())[0].tolist() == [[9, 0, 0]] * 4
    ring = PinnedRing((2,), torch.int32, torch.device("cpu"), depth=2)
    first, second, again = ring.take(), ring.take(), ring.take()
    assert first is again and first is not second and first.times == 2
