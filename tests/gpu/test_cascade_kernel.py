"""The cascade kernels against float64 attention, and their bits: alone, among others, in a replayed graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from chunk_store.layout import KVLayout, LayerLayout
from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.plan import StepSequence
from engine.run.cuda.cascade.tuning import PORTABLE, Tuning
from tests.gpu.cascade_cases import LIMITS, PAGE, Form, Sequences, Setting, random_sequences, relative_error

pytestmark = pytest.mark.gpu

TOLERANCE = 4e-3  # relative, of bf16 outputs; rounding q, p and the output once each makes 2.2e-3 to 2.7e-3

TUNINGS = {"stream": Tuning(), "narrow": Tuning(wide_share=2), "wide": Tuning(wide_share=-1), "portable": PORTABLE}


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize(("ratio", "dim"), [(1, 128), (4, 128), (7, 64), (8, 128), (4, 64), (7, 128)])
def test_random_plans_agree_with_float64(ratio: int, dim: int, tuning: str) -> None:
    for seed, count, rows in ((ratio, 40, (1,)), (dim, 7, (1, 3, 64))):
        setting = Setting(random_sequences(seed, count, rows=rows), Form(ratio=ratio, k_dim=dim, v_dim=dim))
        plan = setting.sequences.plan()
        work = setting.work(TUNINGS[tuning])
        for turn in ("raw", "none"):
            out = setting.attend(work, plan, setting.q, turn=turn)
            assert relative_error(out, setting.expected(plan, setting.q, turn=turn == "raw")) < TOLERANCE


def test_queries_that_already_stand_are_turned_back() -> None:
    setting = Setting(random_sequences(3, 24), Form())
    plan = setting.sequences.plan()
    for tuning in TUNINGS.values():
        out = setting.attend(setting.work(tuning), plan, setting.standing(plan), turn="back")
        assert relative_error(out, setting.expected(plan, setting.q)) < 2 * TOLERANCE  # q is rounded twice


def test_half_precision() -> None:
    setting = Setting(random_sequences(4, 24), Form(k_dim=64, v_dim=64, dtype=torch.float16))
    plan = setting.sequences.plan()
    for tuning in TUNINGS.values():
        out = setting.attend(setting.work(tuning), plan, setting.q)
        assert relative_error(out, setting.expected(plan, setting.q)) < TOLERANCE / 4


@pytest.mark.parametrize("dim", [64, 128])
def test_a_row_has_the_same_bits_alone_and_among_63_others(dim: int) -> None:
    setting = Setting(random_sequences(5, 64), Form(k_dim=dim, v_dim=dim))
    work = setting.work()
    among = setting.attend(work, setting.sequences.plan(), setting.q)
    for row in (0, 1, 17, 40, 63):
        alone = setting.attend(work, setting.sequences.plan(row), setting.q[row : row + 1])
        assert torch.equal(alone[0], among[row]), row


def test_narrow_and_wide_tiles_give_the_same_bits() -> None:
    setting = Setting(random_sequences(6, 64), Form(ratio=8))
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
    setting = Setting(Sequences(tuple(long), first_page * PAGE), Form(ratio=ratio, k_dim=dim, v_dim=dim))
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
    setting = Setting(random_sequences(7, 16), Form())
    sequences = setting.sequences
    work, q = setting.work(TUNINGS["narrow"]), setting.q
    setting.attend(work, sequences.plan(), q)
    out = torch.full_like(q, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        setting.launch(work, q, out)
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
    setting = Setting(sequences, Form())
    plan = sequences.plan()
    layout = KVLayout("bfloat16", (LayerLayout(2, 128, 128),))
    pages = sequences.slots // PAGE
    pool = PagedKVPool(layout, pages=pages, chunk_pages=pages, page_size=PAGE, device="cuda")
    slots = torch.tensor(plan.slots, device="cuda")
    k, v = setting.keys[slots], setting.values[slots]
    pool.keys[0][: sequences.slots], pool.values[0][: sequences.slots] = setting.keys, setting.values
    pool.keys[0][slots], pool.values[0][slots] = float("nan"), float("nan")
    attention = CascadeAttention(pool, [setting.form.rotation], heads=8, positions=16384, limits=LIMITS)
    standing = setting.standing(plan)
    out = attention.attend(attention.prepare(plan), 0, standing, k, v, Scores(scaling=setting.scaling))
    assert relative_error(out, setting.expected(plan, setting.q)) < 2 * TOLERANCE
