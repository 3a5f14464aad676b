"""The torch backend under windows: every row against attention over just the keys it sees; what is read; bits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from chunk_store.layout import KVLayout, LayerLayout
from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.plan import CascadePlan, StepSequence, Window, behind_each_other, plan_levels, plan_step
from engine.run.eager.attention import TorchAttention
from engine.run.eager.step import alignment

PAGE, HEADS, KV_HEADS, DIM = 8, 4, 2, 16
CHUNKS = ((0, 40), (48, 7), (64, 200), (264, 1), (272, 33))  # first slot, tokens
PAGES = 200
WINDOWS = [None, Window(1), Window(20), Window(150), Window(64, chunked=True), Window(1, chunked=True)]


def pool(layers: int, dtype: str = "float32") -> PagedKVPool:
    made = PagedKVPool(
        KVLayout(dtype, (LayerLayout(KV_HEADS, DIM, DIM),) * layers), pages=PAGES, chunk_pages=40, page_size=PAGE
    )
    generator = torch.Generator().manual_seed(0)
    for planes in (*made.keys, *made.values):
        planes.copy_(torch.randn(planes.shape, generator=generator))
    return made


def sequences(seed: int, *, rows: Sequence[int] = (1,), count: int = 6) -> list[StepSequence]:
    rng = random.Random(seed)
    free = list(range(40, PAGES))
    rng.shuffle(free)
    made = []
    for _ in range(count):
        chunks = behind_each_other((*rng.choice(CHUNKS), 0) for _ in range(rng.randint(0, 4)))
        new = rng.choice(rows)
        before = rng.randint(0, 180)
        pages = tuple(free.pop() for _ in range(-(-(before + new) // PAGE)))
        made.append(StepSequence(chunks, pages, before, new, sum(c.tokens for c in chunks) + before))
    return made


def plan_of(steps: Sequence[StepSequence]) -> CascadePlan:
    return plan_step(steps, plan_levels(steps, max_cascade_levels=8), page_size=PAGE)


def drawn(rows: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, HEADS, DIM), (rows, KV_HEADS, DIM), (rows, KV_HEADS, DIM))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def by_hand(
    keys: Tensor, values: Tensor, steps: Sequence[StepSequence], q: Tensor, window: Any, scores: Scores
) -> Tensor:
    """Each row over the slots that it sees, in float64."""
    outs, row = [], 0
    for step in steps:
        for index in range(step.rows):
            at = step.position + index
            first = 0 if window is None else window.first(at)
            slots = [c.first_slot + i for c in step.chunks for i in range(c.tokens) if c.start + i >= first]
            start = step.position - step.tail_tokens
            own = range(max(first - start, 0), step.tail_tokens + index + 1)
            slots += [step.tail_pages[i // PAGE] * PAGE + i % PAGE for i in own]
            k, v = (x[slots].double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
            dots = torch.einsum("hd,nhd->hn", q[row].double(), k) * scores.scaling
            if scores.softcap is not None:
                dots = scores.softcap * torch.tanh(dots / scores.softcap)
            if scores.sinks is not None:
                dots = torch.cat((dots, scores.sinks.double()[:, None]), dim=1)
            weights = dots.softmax(-1)[:, : len(slots)]
            outs.append(torch.einsum("hn,nhd->hd", weights, v))
            row += 1
    return torch.stack(outs).float()


SCORES = {
    "plain": Scores(0.25),
    "soft cap": Scores(0.25, softcap=2.0),
    "sinks": Scores(0.25, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])),
    "both": Scores(0.25, softcap=2.0, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])),
}


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("rows", [(1,), (1, 2, 5), (1, 90)], ids=str)
def test_every_row_attends_to_what_it_sees(scores: str, rows: tuple[int, ...]) -> None:
    steps = sequences(len(scores) + sum(rows), rows=rows, count=5)
    plan = plan_of(steps)
    q, k, v = drawn(len(plan.slots))
    kv = pool(len(WINDOWS))
    attention = TorchAttention(kv, [None] * len(WINDOWS), WINDOWS)
    step = attention.prepare(plan, row_multiple=4)
    for layer, window in enumerate(WINDOWS):
        out = attention.attend(step, layer, q, k, v, SCORES[scores])
        expected = by_hand(kv.keys[layer], kv.values[layer], steps, q, window, SCORES[scores])
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scores", ["plain", "both"])
@pytest.mark.parametrize("seed", range(2))
def test_a_rows_bits_do_not_follow_from_who_else_is_in_the_step(seed: int, scores: str, dtype: str) -> None:
    """Rows that decode, alone among padding rows and with five others; four rows at least, as runners have them."""
    steps = sequences(seed)
    kv = pool(len(WINDOWS), dtype)
    scratch = kv.scratch_page
    attention = TorchAttention(kv, [None] * len(WINDOWS), WINDOWS)
    whole = plan_of(steps).padded(8, scratch, PAGE)
    q, k, v = (x.to(kv.keys[0].dtype) for x in drawn(8))
    prepared = attention.prepare(whole, row_multiple=4)
    together = [attention.attend(prepared, i, q, k, v, SCORES[scores]) for i in range(len(WINDOWS))]
    for row, step in enumerate(steps):
        plan = plan_of([step]).padded(4, scratch, PAGE)
        own_q, own_k, own_v = (torch.cat((x[row : row + 1], x[6:8], x[7:8])) for x in (q, k, v))
        prepared = attention.prepare(plan, row_multiple=4)
        for layer in range(len(WINDOWS)):
            alone = attention.attend(prepared, layer, own_q, own_k, own_v, SCORES[scores])
            assert torch.equal(alone[0], together[layer][row]), (layer, row)


def test_layers_without_a_window_at_work_have_the_bits_of_plain_layers() -> None:
    steps = sequences(1, rows=(1, 3))
    plan, kv = plan_of(steps), pool(2)
    q, k, v = drawn(len(plan.slots))
    attention = TorchAttention(kv, [None] * 2, [None, Window(10_000)])
    kv.keys[1].copy_(kv.keys[0])
    kv.values[1].copy_(kv.values[0])
    step = attention.prepare(plan)
    plain, wide = (attention.attend(step, layer, q, k, v, Scores(0.25)) for layer in range(2))
    assert torch.equal(plain, wide)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_piece_far_into_a_prompt_reads_a_window_and_itself(chunked: bool) -> None:
    """512 rows behind 100,000 tokens, of which 60,000 are a chunk and 40,000 the tail, at a window of 4096."""
    before, rows, window = 40_000, 512, Window(4096, chunked)
    pages = tuple(range(10_000, 10_000 + -(-(before + rows) // 16)))
    step = StepSequence(behind_each_other([(0, 60_000, 0)]), pages, before, rows, 60_000 + before)
    plan = plan_step([step], plan_levels([step], max_cascade_levels=1), page_size=16).seen_through(window)
    assert not plan.reads and plan.tokens_read <= 4096 + rows
    small = PagedKVPool(KVLayout("float32", (LayerLayout(1, 8, 8),)), pages=8, chunk_pages=4, page_size=16)
    seen = TorchAttention(small, [None], [window]).prepare(plan).through[window]
    (tail,) = seen.long_tails
    assert tail.tokens_before + tail.rows <= 4096 + rows + alignment(window)
    later = StepSequence(behind_each_other([(0, 60_000, 0)]), pages, 100, rows, 60_100)
    plan = plan_step([later], plan_levels([later], max_cascade_levels=1), page_size=16)
    reads = TorchAttention(small, [None], [window]).prepare(plan).through[window].reads
    assert reads and all(read.tokens <= 4096 + alignment(window) for read in reads)
    assert len(reads) <= 2


def test_pages_of_a_tail_that_nobody_sees_may_be_anybodys() -> None:
    """Given back where every layer has a window: the scratch page stands in their places, and what is there is read for
    nothing."""
    windows = [Window(20), Window(32, chunked=True)]
    kv = pool(len(windows))
    chunks = behind_each_other([(0, 40, 0), (48, 7, 0)])
    pages = tuple(range(50, 75))
    attention = TorchAttention(kv, [None] * 2, windows)
    for before, rows in ((160, 1), (160, 30)):
        q, k, v = drawn(rows)
        whole = StepSequence(chunks, pages, before, rows, 47 + before)
        gone = min(window.first(47 + before) - 47 for window in windows) // PAGE
        cut = StepSequence((), (kv.scratch_page,) * gone + pages[gone:], before, rows, 47 + before)
        for layer in range(len(windows)):
            outs = [
                attention.attend(attention.prepare(plan_of([each])), layer, q, k, v, Scores(0.25))
                for each in (whole, cut)
            ]
            assert gone >= 10 and torch.equal(*outs)
