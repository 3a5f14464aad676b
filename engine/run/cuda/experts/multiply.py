"""Launches the two products of experts: tile by tile, the second of long pieces by programs that stay."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from engine.run.cuda.experts.layer import ExpertBuffers, Experts
from engine.run.cuda.experts.tiles import FEATURES_MIN, Tile, Tiles, most_tiles


def gate_up(layer: Experts, x: Tensor, b: ExpertBuffers, tile: Tile, *, overlap: dict[str, bool]) -> None:
    """silu(gate) * up of every pair, into ``b.inner``."""
    from engine.run.cuda.experts import products

    weights: Any = layer.gate_up.view(-1, layer.hidden)
    kernel = products.narrow
    if tile.features >= FEATURES_MIN:
        kernel, weights = products.gate_up, _blocks(weights, tile.features, tile.depth)
    kernel[(-(-layer.inner // tile.features), most_tiles(x.shape[0], layer.top, layer.count, tile.pairs))](
        x, weights, b.order, b.starts, b.inner,
        TOP=layer.top, EXPERTS=layer.count, BLOCK_E=layer.block, **_constants(layer, tile), **overlap,
    )  # fmt: skip


def down(layer: Experts, rows: int, b: ExpertBuffers, tile: Tile, *, overlap: dict[str, bool]) -> None:
    """The second product of every pair of ``rows`` rows, into ``b.results``."""
    from engine.run.cuda.experts import products

    products.down[(-(-layer.hidden // tile.features), most_tiles(rows, layer.top, layer.count, tile.pairs))](
        _blocks(b.inner, tile.pairs, tile.depth),
        _blocks(layer.down.view(-1, layer.inner), tile.features, tile.depth),
        b.order, b.starts, b.results,
        EXPERTS=layer.count, BLOCK_E=layer.block, **_constants(layer, tile), **overlap,
    )  # fmt: skip


def multiply_long(layer: Experts, x: Tensor, b: ExpertBuffers, tiles: Tiles, *, overlap: dict[str, bool]) -> None:
    """Both products of a long piece."""
    list_tiles(layer, b, tiles.down.pairs, overlap=overlap)
    gate_up(layer, x, b, tiles.gate_up, overlap=overlap)
    down_long(layer, b, tiles.down, overlap=overlap)


def list_tiles(layer: Experts, b: ExpertBuffers, pairs: int, *, overlap: dict[str, bool]) -> None:
    """Lists the tiles of so many pairs, into ``b.tiles``."""
    from engine.run.cuda.experts import pieces

    pieces.list_tiles[(layer.count,)](
        b.starts, b.tiles, EXPERTS=layer.count, BLOCK_E=layer.block, BLOCK_N=pairs, num_warps=4, **overlap
    )


def down_long(layer: Experts, b: ExpertBuffers, tile: Tile, *, overlap: dict[str, bool]) -> None:
    """``down`` of the tiles that are listed."""
    from engine.run.cuda.experts import pieces

    programs = _programs(b.inner.device, tile)
    pieces.down_long[(programs,)](
        _blocks(b.inner, tile.pairs, tile.depth),
        _blocks(layer.down.view(-1, layer.inner), tile.features, tile.depth),
        b.order, b.tiles, b.results, PROGRAMS=programs, **_constants(layer, tile), **overlap,
    )  # fmt: skip


def _constants(layer: Experts, tile: Tile) -> dict[str, Any]:
    return {
        "WIDTH": layer.hidden, "INNER": layer.inner, "BLOCK_M": tile.features, "BLOCK_N": tile.pairs,
        "BLOCK_K": tile.depth, "STAGES": tile.stages, "num_warps": tile.warps,
    }  # fmt: skip


def _programs(device: torch.device, tile: Tile) -> int:
    """As many as run at once: one on each multiprocessor, two of small tiles."""
    return _multiprocessors(device) * (2 if tile.warps == 4 else 1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _blocks(matrix: Tensor, rows: int, columns: int) -> Any:
    """The matrix for the copy engine, block by block; what a block has beyond its ends reads as zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])
