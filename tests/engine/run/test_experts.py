"""Experts on CUDA: the kernels in Triton's interpreter against transformers, their tiles, and who is refused."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from engine.run.cuda.experts.layer import PIECE_PAIRS_MIN, experts_refusal
from engine.run.cuda.experts.tiles import FEATURES_MIN, PIECES, STEPS, most_tiles, tiles_of
from engine.run.cuda.products import ROWS_MAX
from engine.run.cuda.weights import fused_refusal
from tests.architectures import build

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize("what", ["experts 0 4", "experts 4 8", "experts 8 12", "forward"])
def test_what_kernels_of_experts_compute_is_what_transformers_computes(what: str) -> None:
    pytest.importorskip("triton")
    name, *arguments = what.split()
    done = subprocess.run(
        [sys.executable, "-m", f"tests.engine.run.interpreted_{name}", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_there_are_tiles_for_every_step_and_for_pieces() -> None:
    assert [tiles.pairs for tiles in STEPS] == sorted(tiles.pairs for tiles in STEPS)
    assert [tiles_of(rows, 8, 128) for rows in (1, 129, 1024, 1025)] == [*STEPS[:3], PIECES]
    assert tiles_of(ROWS_MAX, 2, 8) == STEPS[3], "of few experts each has many rows"
    for tiles in (*STEPS, PIECES):
        for tile, least in ((tiles.gate_up, FEATURES_MIN // 2), (tiles.down, FEATURES_MIN)):
            assert tile.features % least == 0 and tile.warps in (4, 8), "one kind of matrix instruction"
    assert PIECES.down.pairs >= PIECE_PAIRS_MIN, "there is room for the list of tiles"


def test_the_bound_of_tiles_holds_however_rows_are_spread() -> None:
    source = random.Random(1)
    for _ in range(300):
        experts, rows, width = source.randint(1, 20), source.randint(1, 90), source.choice((8, 16, 64))
        top, crowded = source.randint(1, experts), source.random() < 0.3
        chosen = [
            range(top) if crowded else source.sample(range(experts), top) for _ in range(rows)
        ]  # each row goes to different experts
        counts = Counter(expert for row in chosen for expert in row)
        assert sum(-(-count // width) for count in counts.values()) <= most_tiles(rows, top, experts, width)
    assert most_tiles(1, 8, 128, 16) == 8 and most_tiles(64, 8, 128, 16) == 160


@pytest.mark.parametrize(("family", "settings", "refusal"), [
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2}, ""),
    ("mixtral", {}, ""),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "hidden_act": "gelu"}, "activation 'gelu'"),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "model type 'olmoe'"),
])  # fmt: skip
def test_who_is_refused_is_told_why(family: str, settings: dict[str, Any], refusal: str) -> None:
    model = build(family, {**HEADS, **settings, "num_hidden_layers": 2}).to(torch.bfloat16)
    borrowed = BorrowedModel(model, name=family)
    found = fused_refusal(borrowed, replace(examine(borrowed), deferred=False))
    assert (found == "") if refusal == "" else (refusal in found)


def test_experts_that_the_kernels_cannot_compute() -> None:
    assert experts_refusal(128, 8, 2048, 768) == experts_refusal(8, 2, 4096, 14336) == ""
    assert "widths 64 and 36" in experts_refusal(4, 2, 64, 36) and "widths 36 and 64" in experts_refusal(4, 2, 36, 64)
    assert "5 of 4 experts" in experts_refusal(4, 5, 64, 96) and "1024 are the most" in experts_refusal(2048, 2, 64, 96)
