"""Where a decode step's time goes: each matrix product by batch size, what stands between them, long attention.

python -m bench.gpu_parts
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from bench.gpu_model import SHAPE
from engine.run.cuda.prefill_attention import block

HIDDEN, MLP, HEADS, KV_HEADS, DIM = 4096, 12288, 32, 8, 128
PRODUCTS = {
    "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * DIM),
    "o": (HEADS * DIM, HIDDEN),
    "gate_up": (HIDDEN, 2 * MLP),
    "down": (MLP, HIDDEN),
    "head": (HIDDEN, int(SHAPE["vocab_size"])),
}
COPIES_NBYTES = 400_000_000  # enough copies of a weight that none is found in the L2 cache


def replayed_us(run: Callable[[int], None], count: int) -> float:
    """Median microseconds of ``run(i)`` for i in 0..count-1, from replays of one graph of all."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            run(index)
    times = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times[2:])


def products() -> None:
    for name, (width, out_width) in PRODUCTS.items():
        nbytes = width * out_width * 2
        copies = max(2, COPIES_NBYTES // nbytes)
        weights = [torch.randn(out_width, width, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        line = f"{name:8} {nbytes / 1e6:6.0f} MB, floor {nbytes / 4.28e6:6.1f} us:"
        for rows in (1, 4, 8, 16, 32, 64, 128, 256):
            x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(rows, out_width, device="cuda", dtype=torch.bfloat16)

            def run(i: int, x: torch.Tensor = x, out: torch.Tensor = out, w: list[torch.Tensor] = weights) -> None:
                torch.mm(x, w[i].t(), out=out)

            line += f"  {rows}: {replayed_us(run, copies):6.1f}"
        print(line, flush=True)


def long_attention() -> None:
    for rows, tokens, causal in ((8192, 8192, True), (8192, 8192, False), (8192, 24576, False), (4096, 4096, True)):
        for name, less in (("cudnn", 0), ("flash", 8)):  # blocks of whole 1024s are cudnn's
            us = attention_us(rows - less, tokens - less, causal)
            rate = 4 * rows * tokens * HEADS * DIM / (2 if causal else 1) / us / 1e6
            what = f"attention {rows} x {tokens} causal={causal} {name}"
            print(f"{what}: {us / 1e3:.2f} ms {rate:.0f} TFLOP/s", flush=True)


def attention_us(rows: int, tokens: int, causal: bool) -> float:
    q = torch.randn(rows, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(tokens, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return replayed_us(lambda _: block(q, k, v, DIM**-0.5, causal=causal) and None, 4)


if __name__ == "__main__":
    products()
    long_attention()
