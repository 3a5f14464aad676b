"""What else was tried: split lengths of the cascade and piece lengths of prefill, on the same weights and pool.

    python -m bench.gpu_variants
"""

from __future__ import annotations

import traceback
from dataclasses import replace

import torch

from bench.gpu import ALONE, SHARED, TREE
from bench.gpu_model import Engine, make_engine
from bench.gpu_workloads import cold_ms, decode_ms, warm_ms
from engine.attention.cascade_launch import Tuning
from engine.cuda.products import Products, RowTuning
from engine.cuda.runner import FusedRunner


SHAPES = ((8, 4, 1024, 4), (8, 8, 512, 4), (4, 2, 1024, 4), (4, 4, 1024, 2), (16, 8, 512, 8), (2, 2, 1024, 2))


def variant(engine: Engine, *, tuning: Tuning | None = None, piece_tokens: int = 8192) -> Engine:
    """The same model and pool under another runner."""
    old = engine.runner
    runner = FusedRunner(
        engine.borrowed, old.weights, engine.pool, old.attention, positions=engine.findings.context_length_max,
        piece_tokens=piece_tokens, tuning=tuning,
    )  # fmt: skip
    return replace(engine, runner=runner)


def splits(engine: Engine) -> None:
    rule = Tuning().splits
    for name, changed in (
        ("as is", rule),
        ("2048 from 2049", replace(rule, chunk=((0, 1024), (2049, 2048)))),
        ("4096 from 16384, no 8192", replace(rule, chunk=((0, 1024), (2049, 2048), (16384, 4096)))),
    ):
        try:
            changed_engine = variant(engine, tuning=replace(Tuning(), splits=changed))
            figures = [decode_ms(changed_engine, tree)[0] for tree in (SHARED, TREE, ALONE)]
            figures += [warm_ms(changed_engine, [32768], moved=False), warm_ms(changed_engine, [4096] * 8, moved=True)]
            print(f"splits {name:24}", *(f"{ms:8.2f}" for ms in figures), flush=True)
        except Exception:
            traceback.print_exc()


def pieces(engine: Engine) -> None:
    for piece_tokens in (4096, 8192, 16384, 32768):
        try:
            ms = cold_ms(variant(engine, piece_tokens=piece_tokens), 32768)
            print(f"piece {piece_tokens}: {ms:.1f} ms", flush=True)
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()


def single_rows(engine: Engine) -> None:
    """Batch 1: cuBLAS, and the single-row kernels in several shapes."""
    options = engine.runner.forward.overlap
    shapes = [RowTuning(outs, gate, block, warps) for outs, gate, block, warps in SHAPES]
    for tuning in (None, *shapes):
        changed = variant(engine)
        changed.runner.forward.products = CuBlas(options) if tuning is None else Products(options, tuning)
        try:
            print(f"batch 1, {tuning}: {decode_ms(changed, ALONE)[0]:.2f} ms", flush=True)
        except Exception:
            traceback.print_exc()


class CuBlas(Products):
    """Never the single-row kernels."""

    def _block(self, x: torch.Tensor, width: int) -> int:
        return 0


if __name__ == "__main__":
    made = make_engine(pool_tokens=262_144)
    print("start-up, s:", made.seconds)
    single_rows(made)
    splits(made)
    pieces(made)
