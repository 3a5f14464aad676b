"""The cascade kernels' forms of attention on a card: windows, soft caps, sinks, widths, rotations, and their bits."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.plan import StepSequence, Window, behind_each_other, plan_levels, plan_step
from engine.run.cuda.cascade.tuning import PORTABLE, Tuning, tuning_for
from tests.gpu.cascade_cases import PAGE, Form, Sequences, Setting, random_sequences, relative_error

TOLERANCE = 4e-3

RAW = ("mistral", "cohere2", "deepseek")  # tried with queries that are not turned yet, too
# As models have them: width, heads, window, what else.
FORMS = {
    "gptoss": Form(ratio=8, k_dim=64, v_dim=64, window=Window(128), sinks=True),
    "oss_full": Form(ratio=8, k_dim=64, v_dim=64, sinks=True),
    "gemma2": Form(ratio=2, k_dim=256, v_dim=256, window=Window(1000), softcap=50.0),
    "gemma3": Form(ratio=2, k_dim=256, v_dim=256, window=Window(512)),
    "gemma_full": Form(ratio=2, k_dim=256, v_dim=256),
    "mistral": Form(window=Window(4096)),
    "llama4": Form(ratio=5, window=Window(2048, chunked=True), interleaved=True),
    "cohere2": Form(ratio=4, window=Window(700), interleaved=True),
    "phi3": Form(ratio=1, k_dim=96, v_dim=96, kv_heads=3, window=Window(2047)),
    "phi2": Form(ratio=1, k_dim=80, v_dim=80, pairs=16),
    "deepseek": Form(ratio=1, k_dim=192, v_dim=128, kv_heads=4, first_dim=128),
    "odd72": Form(ratio=8, k_dim=72, v_dim=72, kv_heads=1, window=Window(33)),
    "odd112": Form(ratio=3, k_dim=112, v_dim=112, softcap=5.0),
    "latent": Form(ratio=16, k_dim=576, v_dim=512, kv_heads=1, first_dim=512),
}


def tuning_of(form: Form, kind: str) -> Tuning:
    portable = tuning_for(form.shape, hopper=False)
    if kind == "portable":
        return portable
    own = tuning_for(form.shape, hopper=True)
    return own if own == portable else replace(own, wide_share={"narrow": 2.0, "wide": -1.0}[kind])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["narrow", "wide", "portable"])
@pytest.mark.parametrize("name", FORMS)
def test_forms_agree_with_float64(name: str, kind: str) -> None:
    form = FORMS[name]
    for seed, count, rows in ((1, 24, (1,)), (2, 6, (1, 3, 70))):
        setting = Setting(random_sequences(seed, count, rows=rows), form)
        plan = setting.sequences.plan()
        work = setting.work(tuning_of(form, kind))
        expected = setting.expected(plan, setting.q)
        error = relative_error(setting.attend(work, plan, setting.standing(plan), turn="back"), expected)
        assert error < 2 * TOLERANCE, (seed, error)  # q is rounded twice
        if name in RAW:
            assert relative_error(setting.attend(work, plan, setting.q), expected) < TOLERANCE, seed


def long_tails() -> Sequences:
    """Sequences with several new rows, over chunks of which windows cut a part, some of their pages in disorder."""
    chunks = behind_each_other(((16, 2500, 0), (2600 // 16 * 16, 100, 40), (2800, 1000, 480)))
    page, sequences = 4000 // PAGE, []
    for index, (before, rows, own) in enumerate(((0, 70, 3), (1000, 90, 3), (2030, 60, 1), (5000, 100, 0))):
        pages = tuple(range(page, page + -(-(before + rows) // PAGE)))[:: -1 if index == 2 else 1]
        page += len(pages)
        start = sum(chunk.tokens for chunk in chunks[:own])
        sequences.append(StepSequence(chunks[:own], pages, before, rows, start + before))
    return Sequences(tuple(sequences), page * PAGE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["narrow", "wide", "portable"])
@pytest.mark.parametrize("name", ["gptoss", "gemma2", "mistral", "llama4", "phi3", "odd72", "deepseek"])
def test_a_row_has_the_same_bits_alone_in_a_crowd_and_cut_anywhere(name: str, kind: str) -> None:
    form, sequences = FORMS[name], long_tails()
    setting = Setting(sequences, form)
    work, plan = setting.work(tuning_of(form, kind)), sequences.plan()
    if form.window is not None:
        setting.forget(unseen(sequences, form.window))
    q = setting.standing(plan)
    together = setting.attend(work, plan, q, turn="back")
    assert relative_error(together, setting.expected(plan, setting.q)) < 2 * TOLERANCE
    at = 0
    for sequence in sequences.sequences:
        cut = sequence.rows // 3
        slices = [(own, 1) for own in (0, 1, 15, 16, 24, sequence.rows - 1)]
        for own, rows in [*slices, (0, cut), (cut, sequence.rows - cut)]:
            one = replace(sequence, tail_tokens=sequence.tail_tokens + own, rows=rows, position=sequence.position + own)
            own_plan = Sequences((one,), sequences.slots).plan()
            alone = setting.attend(work, own_plan, q[at + own :][:rows], turn="back")
            assert torch.equal(alone, together[at + own :][:rows]), (sequence.tail_tokens, own, rows)
        at += sequence.rows


def unseen(sequences: Sequences, window: Window) -> list[int]:
    """Slots of whole pages of tails that no row sees."""
    slots = []
    for sequence in sequences.sequences:
        gone = max(0, window.first(sequence.position) - (sequence.position - sequence.tail_tokens)) // PAGE
        slots += [page * PAGE + at for page in sequence.tail_pages[:gone] for at in range(PAGE)]
    return slots


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gptoss", "gemma2", "phi3", "cohere2"])
def test_decoding_rows_have_the_same_bits_among_63_others(name: str) -> None:
    setting = Setting(random_sequences(5, 64), FORMS[name])
    q = setting.standing(setting.sequences.plan())
    for kind in ("narrow", "wide", "portable"):
        work = setting.work(tuning_of(setting.form, kind))
        among = setting.attend(work, setting.sequences.plan(), q, turn="back")
        for row in (0, 1, 17, 40, 63):
            alone = setting.attend(work, setting.sequences.plan(row), q[row : row + 1], turn="back")
            assert torch.equal(alone[0], among[row]), (kind, row)


@pytest.mark.gpu
def test_a_window_costs_what_it_lets_rows_see() -> None:
    """16 rows behind 32k own tokens each: with a window of 4096 at most a quarter of the time, the merge included."""
    took = {window: own_tails_ms(16, 32768, window) for window in (None, Window(4096), Window(4096, chunked=True))}
    print(took)
    assert took[Window(4096)] < took[None] / 4


def own_tails_ms(rows: int, tokens: int, window: Window | None) -> float:
    pages = -(-tokens // PAGE)
    sequences = tuple(
        StepSequence((), tuple(range(row * pages, (row + 1) * pages)), tokens - 1, 1, tokens - 1) for row in range(rows)
    )
    form = Form(ratio=4, kv_heads=8, window=window)
    setting = Setting(Sequences(sequences, rows * pages * PAGE), form, fill=False)
    work = setting.work()
    plan = plan_step(sequences, plan_levels(sequences, max_cascade_levels=3), page_size=PAGE)
    out = setting.attend(work, plan, setting.q, turn="none")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        setting.launch(work, setting.q, out, turn="none")
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def test_the_portable_kernel_interpreted() -> None:
    """Forms and bits without a card."""
    pytest.importorskip("triton")
    subprocess.run(
        [sys.executable, "-m", "tests.gpu.interpreted_cascade", "0", "7"],
        check=True, timeout=1200, cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip


def test_portable_tiles_of_a_shape_have_one_height() -> None:
    """A row's weights are added up by warps that stand as the height says: of two heights a row would have two bits."""
    for form in FORMS.values():
        tuning = tuning_for(form.shape, False)
        assert tuning.narrow == tuning.wide and len(tuning.classes) == 1


def test_portable_tiles_fit_the_memory_of_smaller_devices() -> None:
    for form in FORMS.values():
        for shared_bytes in (99 * 1024, 163 * 1024, 227 * 1024):
            k_block, v_block = form.shape.blocks
            for tile in tuning_for(form.shape, False, shared_bytes).classes:
                blocks = tile.rows * k_block + tile.stages * tile.tokens * (k_block + v_block)
                assert tile.stages == 1 or 2 * blocks <= shared_bytes
    assert replace(tuning_for(FORMS["mistral"].shape, False), splits=PORTABLE.splits) == PORTABLE
