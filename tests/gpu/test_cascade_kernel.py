"""The cascade kernels against float64 attention, and their bits: alone, among others, in a replayed graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chunk_store.layout import KVLayout, LayerLayout
from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.rotary import Rotation
from engine.plan import CascadePlan, StepSequence
from engine.run.cuda.cascade.launch import CascadeWork
from engine.run.cuda.cascade.tuning import PORTABLE, AttentionShape, RotationTable, Tuning
from engine.run.cuda.cascade.work import Limits
from tests.gpu.cascade_cases import PAGE, Sequences, attention_of, frequencies, random_sequences, turned

pytestmark = pytest.mark.gpu

LIMITS = Limits(rows=256, pairs=2048, items=8192, pages=8192, partials=8192)
TOLERANCE = 4e-3  # relative, of bf16 outputs; rounding q, p and the output once each makes 2.2e-3 to 2.7e-3


class Setting:
    """A pool of NaN but for the slots in use, raw queries, and launches over them."""

    def __init__(
        self, sequences: Sequences, *, ratio: int, dim: int, kv_heads: int = 2, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        torch.manual_seed(0)
        used = torch.tensor(sequences.used_slots(), device="cuda")
        shape = (sequences.slots, kv_heads, dim)
        self.keys, self.values = (torch.full(shape, float("nan"), dtype=dtype, device="cuda") for _ in range(2))
        for pool in (self.keys, self.values):
            pool[used] = torch.randn(len(used), kv_heads, dim, device="cuda").to(dtype)
        self.shape = AttentionShape(kv_heads * ratio, kv_heads, dim, dtype, PAGE)
        self.table = RotationTable.of(Rotation(frequencies(dim), False, 0), 16384, "cuda")
        self.sequences = sequences
        rows = sum(s.rows for s in sequences.sequences)
        self.q = torch.randn(rows, self.shape.heads, dim, device="cuda").to(dtype)
        self.scaling = dim**-0.5

    def work(self, tuning: Tuning | None = None) -> CascadeWork:
        work = CascadeWork(self.shape, "cuda", LIMITS, tuning)
        work.partial_out.fill_(float("nan"))
        work.partial_lse.fill_(float("nan"))
        return work

    def attend(self, work: CascadeWork, plan: CascadePlan, q: Tensor, *, turn: str = "raw") -> Tensor:
        work.update(plan)
        out = torch.full_like(q, float("nan"))
        table = None if turn == "none" else self.table
        work.launch(self.keys, self.values, q, out, scaling=self.scaling, rotation=table, turned=turn == "back")
        return out

    def expected(self, plan: CascadePlan, q: Tensor, *, turn: bool = True) -> Tensor:
        return attention_of(plan, self.keys, self.values, q, turn=turn, scaling=self.scaling)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


TUNINGS = {"stream": Tuning(), "narrow": Tuning(wide_share=2), "wide": Tuning(wide_share=-1), "portable": PORTABLE}


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize(("ratio", "dim"), [(1, 128), (4, 128), (7, 64), (8, 128), (4, 64), (7, 128)])
def test_random_plans_agree_with_float64(ratio: int, dim: int, tuning: str) -> None:
    for seed, count, rows in ((ratio, 40, (1,)), (dim, 7, (1, 3, 64))):
        setting = Setting(random_sequences(seed, count, rows=rows), ratio=ratio, dim=dim)
        plan = setting.sequences.plan()
        work = setting.work(TUNINGS[tuning])
        for turn in ("raw", "none"):
            out = setting.attend(work, plan, setting.q, turn=turn)
            assert relative_error(out, setting.expected(plan, setting.q, turn=turn == "raw")) < TOLERANCE


def test_queries_that_already_stand_are_turned_back() -> None:
    setting = Setting(random_sequences(3, 24), ratio=4, dim=128)
    plan = setting.sequences.plan()
    standing = turned(setting.q, torch.tensor(plan.positions, device="cuda"), 128).to(setting.q.dtype)
    for tuning in TUNINGS.values():
        out = setting.attend(setting.work(tuning), plan, standing, turn="back")
        assert relative_error(out, setting.expected(plan, setting.q)) < 2 * TOLERANCE  # q is rounded twice


def test_half_precision() -> None:
    setting = Setting(random_sequences(4, 24), ratio=4, dim=64, dtype=torch.float16)
    plan = setting.sequences.plan()
    for tuning in TUNINGS.values():
        out = setting.attend(setting.work(tuning), plan, setting.q)
        assert relative_error(out, setting.expected(plan, setting.q)) < TOLERANCE / 4


@pytest.mark.parametrize("dim", [64, 128])
def test_a_row_has_the_same_bits_alone_and_among_63_others(dim: int) -> None:
    setting = Setting(random_sequences(5, 64), ratio=4, dim=dim)
    work = setting.work()
    among = setting.attend(work, setting.sequences.plan(), setting.q)
    for row in (0, 1, 17, 40, 63):
        alone = setting.attend(work, setting.sequences.plan(row), setting.q[row : row + 1])
        assert torch.equal(alone[0], among[row]), row


def test_narrow_and_wide_tiles_give_the_same_bits() -> None:
    setting = Setting(random_sequences(6, 64), ratio=8, dim=128)
    plan = setting.sequences.plan()
    narrow, wide = (setting.attend(setting.work(TUNINGS[n]), plan, setting.q) for n in ("narrow", "wide"))
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize(("tuning", "ratio", "dim"), [("stream", 4, 128), ("wide", 7, 64), ("portable", 4, 128)])
def test_a_row_of_a_long_tail_has_the_bits_of_a_tail_with_one_new_row(tuning: str, ratio: int, dim: int) -> None:
    shared = random_sequences(9, 3, chunk_tokens=(100, 1000, 2500))
    first_page = shared.slots // PAGE
    long = []
    for index, (before, rows) in enumerate(((0, 70), (1000, 90), (2030, 60))):
        pages = tuple(range(first_page, first_page + -(-(before + rows) // PAGE)))[:: -1 if index == 2 else 1]
        first_page += len(pages)
        chunks = shared.sequences[index].chunks
        long.append(StepSequence(chunks, pages, before, rows, sum(c.tokens for c in chunks) + 480 + before))
    setting = Setting(Sequences(tuple(long), first_page * PAGE), ratio=ratio, dim=dim)
    work = setting.work(TUNINGS[tuning])
    plan = setting.sequences.plan()
    together = setting.attend(work, plan, setting.q)
    assert relative_error(together, setting.expected(plan, setting.q)) < TOLERANCE
    at = 0
    for sequence in long:
        for own in {0, 1, 15, 16, 24, sequence.rows - 1}:
            one = replace(sequence, tail_tokens=sequence.tail_tokens + own, rows=1, position=sequence.position + own)
            alone = setting.attend(
                work, Sequences((one,), setting.sequences.slots).plan(), setting.q[at + own : at + own + 1]
            )
            assert torch.equal(alone[0], together[at + own]), (sequence.tail_tokens, own)
        cut = sequence.rows // 3  # the same rows as two slices
        halves = (
            replace(sequence, rows=cut),
            replace(
                sequence,
                tail_tokens=sequence.tail_tokens + cut,
                rows=sequence.rows - cut,
                position=sequence.position + cut,
            ),
        )
        for half, first in zip(halves, (at, at + cut), strict=True):
            out = setting.attend(
                work, Sequences((half,), setting.sequences.slots).plan(), setting.q[first : first + half.rows]
            )
            assert torch.equal(out, together[first : first + half.rows])
        at += sequence.rows


def test_replayed_graph_follows_the_lists() -> None:
    setting = Setting(random_sequences(7, 16), ratio=4, dim=128)
    sequences = setting.sequences
    work, q = setting.work(TUNINGS["narrow"]), setting.q
    setting.attend(work, sequences.plan(), q)
    out = torch.full_like(q, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.launch(setting.keys, setting.values, q, out, scaling=setting.scaling, rotation=setting.table)
    shorter = tuple(replace(s, tail_tokens=s.tail_tokens // 2, position=s.position + 1) for s in sequences.sequences)
    for plan in (Sequences(shorter, sequences.slots).plan(), sequences.plan()):
        expected = setting.attend(setting.work(TUNINGS["narrow"]), plan, q)
        for _ in range(3):
            work.update(plan)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected)


def test_the_protocol_stores_new_tokens_and_attends() -> None:
    from engine.run.cuda.cascade.attention import CascadeAttention

    sequences = random_sequences(8, 12, rows=(1, 5))
    setting = Setting(sequences, ratio=4, dim=128)
    plan = sequences.plan()
    layout = KVLayout("bfloat16", (LayerLayout(2, 128, 128),))
    pages = sequences.slots // PAGE
    pool = PagedKVPool(layout, pages=pages, chunk_pages=pages, page_size=PAGE, device="cuda")
    slots = torch.tensor(plan.slots, device="cuda")
    k, v = setting.keys[slots], setting.values[slots]
    pool.keys[0][: sequences.slots], pool.values[0][: sequences.slots] = setting.keys, setting.values
    pool.keys[0][slots], pool.values[0][slots] = float("nan"), float("nan")
    rotation = Rotation(frequencies(128), False, 0)
    attention = CascadeAttention(pool, [rotation], heads=8, positions=16384, limits=LIMITS)
    standing = turned(setting.q, torch.tensor(plan.positions, device="cuda"), 128).to(setting.q.dtype)
    out = attention.attend(attention.prepare(plan), 0, standing, k, v, Scores(scaling=setting.scaling))
    assert relative_error(out, setting.expected(plan, setting.q)) < 2 * TOLERANCE
