"""What else was tried: splits and partial results of the cascade, loads side by side, piece lengths of prefill.

python -m bench.gpu_variants [--pieces]
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import replace

import torch

from bench.gpu import ALONE, SHARED, TREE
from bench.gpu_model import Engine, make_engine
from bench.gpu_workloads import cold_ms, decode_ms, stored_ms, warm_ms
from engine.run.cuda.cascade.tuning import Tuning
from engine.run.cuda.runner import PackedRunner


def variant(engine: Engine, *, tuning: Tuning | None = None, piece_tokens: int = 8192) -> Engine:
    """The same model and pool under another runner."""
    old = engine.runner
    runner = PackedRunner(old.forward, piece_tokens=piece_tokens, tuning=tuning)
    return replace(engine, runner=runner)


def splits(engine: Engine) -> None:
    rule = Tuning().splits
    finer = replace(rule, chunk=((0, 1024), (2049, 2048)))
    for name, changed in (
        ("as is", Tuning()),
        ("2048 from 2049", replace(Tuning(), splits=finer)),
        ("2048 from 2049, bf16 partials", replace(Tuning(), splits=finer, partial_dtype=torch.bfloat16)),
        ("bf16 partials", replace(Tuning(), partial_dtype=torch.bfloat16)),
    ):
        try:
            other = variant(engine, tuning=changed)
            figures = [decode_ms(other, tree)[0] for tree in (SHARED, TREE, ALONE)]
            figures += [warm_ms(other, [32768], moved=False), warm_ms(other, [4096] * 8, moved=True)]
            print(f"{name:30}", *(f"{ms:8.2f}" for ms in figures), flush=True)
        except Exception:
            traceback.print_exc()


def loaders(engine: Engine) -> None:
    for count in (3, 4, 6):
        print(f"loaders {count}:", stored_ms(engine, [4096] * 8, loaders=count), flush=True)


def pieces(engine: Engine) -> None:
    for piece_tokens in (4096, 8192, 16384, 32768):
        try:
            ms = cold_ms(variant(engine, piece_tokens=piece_tokens), 32768)
            print(f"piece {piece_tokens}: {ms:.1f} ms", flush=True)
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    made = make_engine(pool_tokens=262_144)
    print("start-up, s:", made.seconds)
    splits(made)
    loaders(made)
    if "--pieces" in sys.argv:
        pieces(made)
