"""What else was tried: split lengths of the cascade and piece lengths of prefill, on the same weights and pool.

    python -m bench.gpu_variants
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.gpu import ALONE, SHARED, TREE
from bench.gpu_model import Engine, make_engine
from bench.gpu_workloads import cold_ms, decode_ms, warm_ms
from engine.attention.cascade_launch import Tuning
from engine.cuda.runner import FusedRunner


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
        ("long 2048", replace(rule, long=2048)),
        ("long 1024, middle 1024", replace(rule, long=1024, middle=1024)),
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
        guarded(lambda n=piece_tokens: print(f"piece {n}: {cold_ms(variant(engine, piece_tokens=n), 32768):.1f} ms"))  # type: ignore[misc]
        torch.cuda.empty_cache()


def guarded(run: Callable[[], None]) -> None:
    try:
        run()
    except Exception:
        traceback.print_exc()


if __name__ == "__main__":
    made = make_engine(pool_tokens=262_144)
    print("start-up, s:", made.seconds)
    splits(made)
    pieces(made)
