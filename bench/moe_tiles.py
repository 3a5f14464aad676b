"""Tiles of the experts' products, one by one, on the layers of Qwen3-30B-A3B: python -m bench.moe_tiles

First whether the kernels are right and a pair's bits are the same by every tile, then microseconds a layer by tile and
number of rows. Weights of several layers are read in turn, so that none are found in the L2 cache.
"""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.run.cuda.experts.launch import add_up, down, gate_up, route, run_experts
from engine.run.cuda.experts.layer import ExpertBuffers, Experts
from engine.run.cuda.experts.tiles import Tile, Tiles
from engine.run.cuda.prefill_attention import launch_options

HIDDEN, INNER, EXPERTS, TOP = 2048, 768, 128, 8
LAYERS = 6
FEW = (Tile(64, 16, 128, 3, 4), Tile(64, 16, 128, 4, 4), Tile(64, 16, 64, 4, 4), Tile(64, 16, 64, 6, 4))
SOME = (Tile(64, 32, 128, 3, 4), Tile(64, 32, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(64, 64, 128, 3, 4))
MANY = (
    Tile(64, 128, 64, 3, 4), Tile(128, 128, 64, 3, 8), Tile(128, 128, 64, 4, 8), Tile(128, 64, 64, 4, 4),
    Tile(128, 64, 64, 4, 8),
)  # fmt: skip
MANY_DOWN = (Tile(128, 128, 64, 3, 4), Tile(128, 128, 64, 4, 8), Tile(128, 256, 64, 3, 8), Tile(256, 128, 64, 3, 8))
BY_ROWS: dict[int, tuple[Sequence[Tile], Sequence[Tile]]] = {
    1: (FEW, FEW),
    16: (FEW, FEW),
    64: (FEW + SOME[:2], FEW + SOME[:2]),
    256: (FEW[1:2] + SOME, FEW[1:2] + SOME),
    1024: (SOME[1:] + MANY[:1], SOME[1:] + MANY[:1] + MANY_DOWN[:1]),
    8192: (MANY, MANY[:1] + MANY_DOWN),
}


def layers() -> list[Experts]:
    generator = torch.Generator("cuda").manual_seed(0)

    def matrix(*size: int) -> Tensor:
        made = torch.empty(*size, dtype=torch.bfloat16, device="cuda")
        return made.normal_(0.0, size[-1] ** -0.5, generator=generator)

    return [
        Experts(
            matrix(EXPERTS, HIDDEN), matrix(EXPERTS, 2 * INNER, HIDDEN), matrix(EXPERTS, HIDDEN, INNER), TOP, True, True
        )
        for _ in range(LAYERS)
    ]


def reference(layer: Experts, x: Tensor, b: ExpertBuffers) -> Tensor:
    """In fp32, with the experts and shares that were found."""
    rows = x.shape[0]
    chosen, shares = b.experts.view(rows, -1)[:rows].long(), b.shares.view(rows, -1)
    out = torch.zeros(rows, HIDDEN, device="cuda")
    for expert in chosen.unique().tolist():
        row, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (x[row].float() @ layer.gate_up[expert].float().t()).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        out.index_add_(0, row, (inner @ layer.down[expert].float().t()) * shares[row, slot, None])
    return out


def right(layer: Experts, overlap: dict[str, bool]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for rows in (1, 7, 16, 64, 65, 200, 1024, 4000):
        x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
        b, out = ExpertBuffers.of(layer, rows), torch.empty_like(x)
        run_experts(layer, x, out, b, overlap=overlap)
        want = reference(layer, x, b)
        error = ((out.float() - want).abs().max() / want.std()).item()
        logits = (x.float() @ layer.router.float().t()).bfloat16().float()
        found = logits.gather(1, b.experts.view(rows, TOP).long()).sum()
        best = logits.topk(TOP).values.sum()
        hit = b.experts.unique().numel()
        print(
            f"rows {rows}: error {error:.4f} deviations, scores {(found / best).item():.6f} of the best, {hit} experts",
            flush=True,
        )


def same_bits(layer: Experts, overlap: dict[str, bool]) -> None:
    """Rows of 1024 by every tile, and few of them, against the tiles of few rows."""
    x = torch.randn(1024, HIDDEN, device="cuda").bfloat16()
    b, base = ExpertBuffers.of(layer, 1024), torch.empty_like(x)
    first = Tiles(1, FEW[1], FEW[1])
    run_experts(layer, x, base, b, overlap=overlap, tiles=first)
    for rows in (1, 3, 16, 17, 64, 129, 512):
        out = torch.empty_like(x[:rows])
        picked = torch.randperm(1024, device="cuda")[:rows]
        run_experts(layer, x[picked].contiguous(), out, b, overlap=overlap)
        print(f"bits of {rows} rows are those among 1024:", torch.equal(out, base[picked]), flush=True)
    for side, name in enumerate(("gate_up", "down")):
        for tile in dict.fromkeys(itertools.chain(*(sides[side] for sides in BY_ROWS.values()))):
            try:
                began = time.perf_counter()
                out = torch.empty_like(x)
                tiles = replace(first, gate_up=tile) if name == "gate_up" else replace(first, down=tile)
                run_experts(layer, x, out, b, overlap=overlap, tiles=tiles)
                same = torch.equal(out, base)
                print(f"{name} {tile} bits equal: {same} ({time.perf_counter() - began:.1f} s)", flush=True)
            except Exception as error:  # a tile that does not fit is only said
                print(f"{name} {tile} failed: {str(error)[:200]}", flush=True)


def microseconds(launch: Callable[[int], None], *, repeats: int = 8) -> float:
    """Of one layer, all layers in a graph."""
    stream = torch.cuda.Stream()
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for index in range(LAYERS):
            launch(index)
        graph.capture_end()
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats / LAYERS


def _gate_up(
    every: list[Experts], x: Tensor, b: ExpertBuffers, tile: Tile, overlap: dict[str, bool], index: int
) -> None:
    gate_up(every[index], x, b, tile, overlap=overlap)


def _down(every: list[Experts], rows: int, b: ExpertBuffers, tile: Tile, overlap: dict[str, bool], index: int) -> None:
    down(every[index], rows, b, tile, overlap=overlap)


def measure(all_layers: list[Experts], rows: int, overlap: dict[str, bool]) -> None:
    x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
    first, out = all_layers[0], torch.empty_like(x)
    b = ExpertBuffers.of(first, rows)
    route(first, x, b, overlap=overlap)
    hit, pairs = int(b.experts.unique().numel()), rows * TOP
    parts = {
        "route": microseconds(lambda i: route(all_layers[i], x, b, overlap=overlap)),
        "combine": microseconds(lambda i: add_up(all_layers[i], out, b, overlap=overlap)),
        "whole": microseconds(lambda i: run_experts(all_layers[i], x, out, b, overlap=overlap)),
    }
    print(f"rows {rows}, {hit} experts hit:", {name: round(took, 2) for name, took in parts.items()}, flush=True)
    route(first, x, b, overlap=overlap)
    for name, tiles in zip(("gate_up", "down"), BY_ROWS[rows], strict=True):
        matrices = (2 if name == "gate_up" else 1) * HIDDEN * INNER
        for tile in tiles:
            try:
                if name == "gate_up":
                    us = microseconds(partial(_gate_up, all_layers, x, b, tile, overlap))
                else:
                    us = microseconds(partial(_down, all_layers, rows, b, tile, overlap))
                rates = hit * matrices * 2 / us / 1e6, pairs * matrices * 2 / us / 1e6
                shape = f"{tile.features:4}x{tile.pairs:4}x{tile.depth:4} stages {tile.stages} warps {tile.warps}"
                print(f"  {name:8} {shape}: {us:9.2f} us, {rates[0]:6.2f} TB/s, {rates[1]:7.1f} TFLOP/s", flush=True)
            except Exception as error:
                print(f"  {name} {tile} failed: {str(error)[:120]}", flush=True)


def main() -> None:
    overlap = launch_options(torch.device("cuda"))
    all_layers = layers()
    for step in (lambda: right(all_layers[0], overlap), lambda: same_bits(all_layers[0], overlap)):
        try:
            step()
        except Exception:
            traceback.print_exc()
    for rows in [int(each) for each in sys.argv[1:]] or BY_ROWS:
        try:
            measure(all_layers, rows, overlap)
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main()
