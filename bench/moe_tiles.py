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

from engine.run.cuda.experts.launch import add_up, arrive, route, run_experts
from engine.run.cuda.experts.layer import ExpertBuffers, Experts
from engine.run.cuda.experts.multiply import down, down_long, gate_up, list_tiles, multiply_long
from engine.run.cuda.experts.tiles import PIECES, Tile, Tiles
from engine.run.cuda.prefill_attention import launch_options
from engine.run.cuda.products import ROWS_MAX

HIDDEN, INNER, EXPERTS, TOP = 2048, 768, 128, 8
LAYERS = 6
Launch = tuple[str, Callable[..., None]]
ALONE = (
    Tile(64, 16, 128, 4, 4), Tile(32, 16, 128, 4, 4), Tile(32, 16, 128, 6, 4), Tile(32, 16, 256, 3, 4),
)  # fmt: skip
FEW = (Tile(64, 16, 128, 4, 4), Tile(64, 16, 64, 4, 4))
SOME = (Tile(64, 32, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 32, 64, 4, 4), Tile(128, 64, 64, 4, 8))
MANY = (*SOME[1:], Tile(128, 128, 64, 3, 8))
PIECES_UP = (Tile(128, 128, 64, 4, 8), Tile(128, 128, 64, 3, 8), Tile(64, 128, 64, 3, 4))
PIECES_DOWN = (Tile(128, 128, 64, 3, 4), Tile(256, 128, 64, 4, 8), Tile(128, 128, 64, 4, 8), Tile(64, 128, 64, 3, 4))
BY_ROWS: dict[int, tuple[Sequence[Tile], Sequence[Tile]]] = {
    1: (ALONE, FEW),
    4: (ALONE, FEW),
    16: (ALONE[:2], FEW),
    64: (ALONE[:2], FEW),
    256: (SOME, SOME),
    512: (SOME, SOME),
    1024: (MANY, (*MANY, Tile(128, 128, 64, 3, 4))),
    8192: (PIECES_UP, PIECES_DOWN[:1]),
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
    b, base = ExpertBuffers.of(layer, 1025), torch.empty_like(x)
    first = Tiles(1, FEW[0], FEW[0])
    run_experts(layer, x, base, b, overlap=overlap, tiles=first)
    for rows in (1, 3, 16, 17, 64, 129, 512):
        out = torch.empty_like(x[:rows])
        picked = torch.randperm(1024, device="cuda")[:rows]
        run_experts(layer, x[picked].contiguous(), out, b, overlap=overlap)
        print(f"bits of {rows} rows are those among 1024:", torch.equal(out, base[picked]), flush=True)
    route(layer, x, b, overlap=overlap)
    multiply_long(layer, x, b, PIECES, overlap=overlap)
    out = torch.empty_like(x)
    add_up(layer, out, b, overlap=overlap)
    print("a long piece has the bits of a step:", torch.equal(out, base), flush=True)
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


def measure(all_layers: list[Experts], rows: int, overlap: dict[str, bool]) -> None:
    x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
    first, out, norm = all_layers[0], torch.empty_like(x), torch.ones(HIDDEN, device="cuda").bfloat16()
    b, spare = ExpertBuffers.of(first, rows), torch.zeros_like(x)
    route(first, x, b, overlap=overlap)
    hit, pairs = int(b.experts.unique().numel()), rows * TOP
    parts = {
        "route": microseconds(lambda i: route(all_layers[i], x, b, overlap=overlap)),
        "arrive": microseconds(lambda i: arrive(all_layers[i], spare, norm, out, b, 1e-6, overlap=overlap)),
        "whole": microseconds(lambda i: run_experts(all_layers[i], x, out, b, overlap=overlap)),
    }
    print(f"rows {rows}, {hit} experts hit:", {name: round(took, 2) for name, took in parts.items()}, flush=True)
    route(first, x, b, overlap=overlap)
    ups: list[Launch] = [(f"gate_up {tile}", partial(gate_up, x=x, b=b, tile=tile)) for tile in BY_ROWS[rows][0]]
    downs: list[Launch] = [(f"down {tile}", partial(down, rows=rows, b=b, tile=tile)) for tile in BY_ROWS[rows][1]]
    if rows > ROWS_MAX:
        list_tiles(first, b, 128, overlap=overlap)
        downs += [(f"down_long {tile}", partial(down_long, b=b, tile=tile)) for tile in PIECES_DOWN]
    for matrices, launches in ((2 * HIDDEN * INNER, ups), (HIDDEN * INNER, downs)):
        for name, launch in launches:
            try:
                us = microseconds(partial(_on_layer, launch, all_layers, overlap))
                rates = hit * matrices * 2 / us / 1e6, pairs * matrices * 2 / us / 1e6
                print(f"  {us:9.2f} us, {rates[0]:6.2f} TB/s, {rates[1]:7.1f} TFLOP/s: {name}", flush=True)
            except Exception as error:
                print(f"  {name} failed: {str(error)[:120]}", flush=True)


def _on_layer(launch: Callable[..., None], every: list[Experts], overlap: dict[str, bool], index: int) -> None:
    launch(every[index], overlap=overlap)


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
