"""FlashInferAttention without a card: what it asks FlashInfer for, computed in torch, and the merge, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import Findings
from engine.plan import PlacedChunk, StepSequence, Window, plan_levels, plan_step
from engine.run.cuda.flashinfer import attention as backend
from engine.run.cuda.flashinfer.calls import kernel_widths
from engine.run.cuda.flashinfer.lists import Requests, requests_of
from engine.run.cuda.flashinfer.prefill import FlashInferBlock
from engine.run.cuda.flashinfer.refusal import build_refusal
from engine.run.cuda.prefill_attention import attend_piece, prepare_piece
from engine.served import look_into
from tests import oracle
from tests.architectures import ARCHITECTURES, build
from tests.engine.composer import Composer, Request
from tests.engine.run import flashinfer_stand_in as stand_in

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_steps_agree_with_float64(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any window, width, cap, sinks and number of batches; oracles are made from sequences, not from plans."""
    monkeypatch.setattr(backend, "_merge", stand_in.merge)
    for number in range(first, first + 10):
        stand_in.run(number)


def test_the_merge_kernel_agrees_too() -> None:
    pytest.importorskip("triton")
    words = [sys.executable, "-m", "tests.engine.run.flashinfer_stand_in", "0", "6"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0 and ended.stdout.endswith("agree\n"), ended.stderr


def requests(rows: int, position: int, window: Window | None, *, offset: int = 0) -> Requests:
    """Of one sequence: a chunk of 40 tokens in pages 0 .., and a tail in pages 20 .. of 4 tokens."""
    pages = tuple(range(20, 20 + -(-(rows + position - 40) // 4)))
    sequence = StepSequence((PlacedChunk(0, 40, offset, 0),), pages, position - 40, rows, position)
    plan = plan_step([sequence], plan_levels([sequence], max_cascade_levels=1), page_size=4)
    return requests_of(plan.seen_through(window), 4)


def test_a_piece_over_what_stands_where_it_was_computed_is_one_request() -> None:
    found = requests(7, 45, None)
    assert (len(found.whole), len(found.causal), found.unit) == (0, 1, 1)
    assert found.causal[0].tokens == 52


def test_moved_chunks_and_single_rows_are_requests_of_pages() -> None:
    for found in (requests(7, 45, None, offset=3), requests(1, 45, None)):
        assert (len(found.whole), len(found.causal), found.unit) == (1, 1, 4)


def test_a_window_costs_no_more_than_it_shows() -> None:
    """Keys that requests read, by rows: a band of rows times the window, not the square of the context."""
    for window in (Window(16), Window(16, chunked=True)):
        found = requests(400, 40, window)
        read = sum(len(each.rows) * each.tokens for each in (*found.whole, *found.causal))
        assert read <= 400 * 2 * 16 and len(found.whole) + len(found.causal) <= 2 * 400 // 16 + 2
    before = requests(400, 1000, Window(16))
    assert not before.whole and all(min(each.pages) >= 80 for each in before.causal), "the chunk is out of sight"


@pytest.mark.parametrize(("layer", "widths"), [
    (LayerLayout(2, 64, 64), (64, 64)),
    (LayerLayout(2, 16, 16), (64, 64)),
    (LayerLayout(2, 80, 80), (128, 128)),
    (LayerLayout(2, 192, 128), (192, 128)),
    (LayerLayout(2, 256, 256), (256, 256)),
    (LayerLayout(2, 96, 72), (128, 128)),
])  # fmt: skip
def test_other_widths_are_padded_to_what_there_is(layer: LayerLayout, widths: tuple[int, int]) -> None:
    assert kernel_widths(layer.k_dim, layer.v_dim) == widths


def test_wider_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="head widths 576 and 512: FlashInfer has kernels up to 256"):
        kernel_widths(576, 512)


SMALL: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", SMALL | {"sliding_window": 20}),
    "gemma2": ("gemma2", SMALL | {"sliding_window": 7}),
    "gpt-oss": ("gpt_oss", SMALL | {"sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "deepseek-v3-mla": ARCHITECTURES["deepseek-v3-mla"],
    "cohere-interleaved": ARCHITECTURES["cohere-interleaved"],
}


@pytest.mark.parametrize("name", MODELS)
def test_models_over_it_equal_eager_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, shared and moved chunks and batches of the engine in float32, against transformers."""

    def made(pool: PagedKVPool, _: object, findings: Findings, attention: str) -> Any:
        return backend.FlashInferAttention(pool, findings.rotations, findings.windows, library=stand_in.LIBRARY)

    monkeypatch.setattr(backend, "_merge", stand_in.merge)
    monkeypatch.setattr("engine.run.choice.make_attention", made)
    model = build(*MODELS[name])
    composer = Composer(look_into(BorrowedModel(model, name=name), piece_tokens=24), pages=64)
    chunks = [[5 + (i * 7 + j * 3) % 200 for j in range(n)] for i, n in enumerate((17, 1, 30))]
    for mode in ("exact", "anchored", "independent"):
        asked: list[Request] = [(chunks, [9, 8, 7], mode), ([chunks[2], chunks[0]], list(range(40, 75)), mode)]
        for (given, query, _), (ids, logits) in zip(asked, composer.generate(asked, 3), strict=True):
            wanted = oracle.logits(model, given, query + ids[:-1], mode)[-3:]
            torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=1e-3)


def test_its_kernels_are_tried_on_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_merge", stand_in.merge)
    monkeypatch.setattr(backend, "flashinfer_library", lambda: stand_in.LIBRARY)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    layout = KVLayout("bfloat16", (LayerLayout(2, 64, 64), LayerLayout(2, 24, 16)))
    findings: Any = SimpleNamespace(layout=layout)
    assert build_refusal(findings, 4, torch.device("cpu")) == ""

    def broken() -> Any:
        raise RuntimeError("ninja: error: nvcc was not found\nand more")

    monkeypatch.setattr(backend, "flashinfer_library", broken)
    said = build_refusal(findings, 4, torch.device("cpu"))
    assert said.startswith(
        "its kernels cannot be built or run: ninja: error: nvcc was not found; install flashinfer-jit-"
    )


@pytest.mark.parametrize("before", [0, 40])
def test_a_long_piece_is_one_call_over_its_chunk(before: int) -> None:
    """Its earlier tokens and itself; planned once for every shape."""
    torch.manual_seed(1)
    rows, block = 24, FlashInferBlock(torch.device("cpu"), library=stand_in.LIBRARY)
    q = torch.randn(rows, 4, 128).bfloat16()
    keys, values = (torch.randn(80, 2, 128).bfloat16() for _ in range(2))
    for _ in range(2):
        sequence = StepSequence((), tuple(range(2, 2 + (before + rows) // 8)), before, rows, before)
        plan = plan_step([sequence], plan_levels([sequence], max_cascade_levels=1), page_size=8)
        into = torch.empty_like(q)
        out = attend_piece(prepare_piece(plan, 8, q.device), lambda _: q, keys, values, 0.1, into, block)
        assert out is into and len(block._shapes) == 1
    k, v = (x[16 : 16 + before + rows].repeat_interleave(2, 1).transpose(0, 1).double() for x in (keys, values))
    hidden = torch.ones(rows, before + rows, dtype=torch.bool).triu(before + 1)
    scores = (q.transpose(0, 1).double() @ k.transpose(1, 2) * 0.1).masked_fill(hidden, float("-inf"))
    wanted = (scores.softmax(-1) @ v).transpose(0, 1)
    assert float((out.double() - wanted).norm() / wanted.norm()) < 1e-2
    partial, lse = block(q, keys, values, 0.1, causal=False)
    assert partial.shape == q.shape and lse.shape == (4, rows)
    every = q.transpose(0, 1).double() @ keys.repeat_interleave(2, 1).transpose(0, 1).double().transpose(1, 2) * 0.1
    torch.testing.assert_close(lse.double(), every.logsumexp(-1), atol=1e-4, rtol=1e-4)
