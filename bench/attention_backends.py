"""``python -m bench.attention_backends``: the shape of Qwen3-8B over each attention backend, on one GPU.

Decode steps, ms: captured steps over our kernels as they run on compute capability 9 and over the portable tiles that
other devices run, and the model's own code over FlashInfer and over our kernels, not captured. 32k tokens cold, ms: a
chunk's pieces by torch's library attention and by FlashInfer's fa3. Needs FlashInfer for what is its own
(``python -m bench.flashinfer_build 128 fa3``).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from bench.gpu import ALONE, SHARED, TREE
from bench.gpu_model import Engine, make_engine
from bench.gpu_workloads import cold_ms, decode_ms
from engine.run.choice import make_runner
from engine.run.cuda.cascade.tuning import PORTABLE
from engine.run.cuda.flashinfer.prefill import FlashInferBlock
from engine.run.cuda.runner import PackedRunner

COLD_TOKENS = 32768
STEPS = 24


def runners(made: Engine) -> dict[str, Callable[[], Any]]:
    """By name, what makes a runner over the same weights and pool."""
    eager = partial(make_runner, made.pool, made.borrowed, made.findings, None, piece_tokens=8192)
    return {
        "captured, compute capability 9": lambda: made.runner,
        "captured, portable tiles": lambda: PackedRunner(made.runner.forward, tuning=PORTABLE),
        "not captured, FlashInfer": partial(eager, attention="flashinfer"),
        "not captured, our kernels": partial(eager, attention="cascade"),
    }


def decode(made: Engine) -> None:
    print(f"{'decode, ms':34}  64: 32k shared   64: tree   1: 32k", flush=True)
    for name, make in runners(made).items():
        try:
            other = replace(made, runner=make())
            cells = [decode_ms(other, tree, steps=STEPS)[0] for tree in (SHARED, TREE, ALONE)]
            print(f"{name:34}", *(f"{ms:12.2f}" for ms in cells), flush=True)
        except Exception:
            traceback.print_exc()


def cold(made: Engine) -> None:
    ways = {"torch": None, "fa3": FlashInferBlock(made.pool.device)}
    for name in ("torch", "fa3", "torch", "fa3"):
        other = replace(made, runner=PackedRunner(made.runner.forward, block=ways[name]))
        print(f"{COLD_TOKENS} cold + 64, {name}: {cold_ms(other, COLD_TOKENS):.1f} ms", flush=True)


def main() -> None:
    made = make_engine(pool_tokens=200_000)
    print("start-up, s:", made.seconds, flush=True)
    for part in (cold, decode):
        try:
            part(made)
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main()
