"""Launches a layer of experts over rows: scores, selection, both grouped products, and the sum of each row's results.

Nothing is read back, so it may be captured: numbers of tiles are bounds, and the kernels end early behind the last.
"""

from __future__ import annotations

from torch import Tensor

from engine.run.cuda.experts.layer import BLOCKS, SPAN, ExpertBuffers, Experts
from engine.run.cuda.experts.multiply import down, gate_up, multiply_long
from engine.run.cuda.experts.tiles import PIECES, Tiles, tiles_of
from engine.run.cuda.products import ROWS_MAX

SCORES_DEPTH = 128
SUM_BLOCK = 1024
STEP_BLOCKS = ROWS_MAX // BLOCKS[-1]
SUMS = 16  # experts of a program that counts rows


def run_experts(
    layer: Experts,
    x: Tensor,
    out: Tensor,
    buffers: ExpertBuffers,
    *,
    overlap: dict[str, bool],
    tiles: Tiles | None = None,
) -> None:
    """out (rows, hidden) = what the experts of each row of x (rows, hidden) make of it; ``tiles``: other than usual."""
    route(layer, x, buffers, overlap=overlap)
    multiply(layer, x, buffers, tiles or tiles_of(x.shape[0], layer.top, layer.count), overlap=overlap)
    add_up(layer, out, buffers, overlap=overlap)


def route(layer: Experts, x: Tensor, b: ExpertBuffers, *, overlap: dict[str, bool]) -> None:
    """The experts and shares of each row, and its pairs sorted by expert."""
    from engine.run.cuda.experts import routing

    rows, count, block = x.shape[0], layer.count, layer.block
    # A piece of its own has bits of its own: there the width is not cut, which would only cost memory.
    parts, span = (layer.parts, SPAN) if rows <= ROWS_MAX else (1, layer.parts * SPAN)
    columns = 16 if rows <= 128 else 64
    routing.scores[(-(-rows // columns), parts)](
        x, layer.router, b.parts, rows,
        WIDTH=layer.hidden, SPAN=span, EXPERTS=count, BLOCK_E=block, BLOCK_R=columns, BLOCK_K=SCORES_DEPTH,
        num_warps=4, num_stages=3, **overlap,
    )  # fmt: skip
    size = next((size for size in BLOCKS if rows <= size), BLOCKS[-1])
    blocks, warps = -(-rows // size), min(8, size)
    routing.select[(blocks,)](
        b.parts, layer.router, b.shares, b.experts, b.starts, b.order, b.marks, b.counts, rows,
        PARTS=parts, EXPERTS=count, BLOCK_E=block, BLOCK_R=size, TOP=layer.top, NORMED=layer.normed,
        ROUNDED=layer.rounded, ALONE=blocks == 1, num_warps=warps, **overlap,
    )  # fmt: skip
    sizes = {"EXPERTS": count, "BLOCK_E": block, "BLOCK_R": size, "TOP": layer.top}
    if blocks > STEP_BLOCKS:
        routing.sum_up[(block // SUMS,)](
            b.counts, b.totals, blocks, BLOCK_E=block, EXPERTS_AT_ONCE=SUMS, AT_ONCE=64, num_warps=4, **overlap
        )
        routing.place_summed[(blocks,)](
            b.marks, b.counts, b.totals, b.starts, b.order, rows, num_warps=4, **sizes, **overlap
        )
    elif blocks > 1:
        routing.place[(blocks,)](
            b.marks, b.counts, b.starts, b.order, rows, BLOCKS=STEP_BLOCKS, num_warps=8, **sizes, **overlap
        )


def multiply(layer: Experts, x: Tensor, b: ExpertBuffers, tiles: Tiles, *, overlap: dict[str, bool]) -> None:
    """Both products of every pair, into ``b.results``."""
    if tiles is PIECES:
        multiply_long(layer, x, b, tiles, overlap=overlap)
    else:
        gate_up(layer, x, b, tiles.gate_up, overlap=overlap)
        down(layer, x.shape[0], b, tiles.down, overlap=overlap)


def add_up(layer: Experts, out: Tensor, b: ExpertBuffers, *, overlap: dict[str, bool]) -> None:
    """out (rows, hidden) = each row's results times their shares, added."""
    from engine.run.cuda.experts import products

    products.combine[(out.shape[0], -(-layer.hidden // SUM_BLOCK))](
        b.results, b.shares, out,
        WIDTH=layer.hidden, BLOCK=SUM_BLOCK, TOP=layer.top, ROUNDED=layer.rounded, num_warps=4, **overlap,
    )  # fmt: skip


def arrive(
    layer: Experts,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    b: ExpertBuffers,
    eps: float,
    *,
    overlap: dict[str, bool],
) -> None:
    """``add_up``, added to the residual stream, of which out (rows, hidden) is the RMSNorm with ``weight``."""
    from engine.run.cuda.experts import products

    products.arrive[(out.shape[0],)](
        b.results, b.shares, residual, weight, out, eps,
        WIDTH=layer.hidden, BLOCK=1 << (layer.hidden - 1).bit_length(), TOP=layer.top, ROUNDED=layer.rounded,
        num_warps=8 if layer.hidden >= 2048 else 4, **overlap,
    )  # fmt: skip
