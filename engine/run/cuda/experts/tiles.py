"""By which tiles the products of experts are computed, by the number of rows: measured on an H200 (bench.moe_tiles)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.run.cuda.products import ROWS_MAX

FEATURES_MIN = 64  # rows of a matrix instruction


@dataclass(frozen=True)
class Tile:
    """``features`` x ``pairs``, ``depth`` along K at a time; loads are ``stages`` ahead.

    A tile of ``gate_up`` has as many features of each of the two: with half of ``FEATURES_MIN`` both are one of the
    instruction's. Fewer, or other than 4 or 8 warps, would be another kind of instruction.
    """

    features: int
    pairs: int
    depth: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of both products for steps with up to ``pairs`` pairs an expert in the mean."""

    pairs: float
    gate_up: Tile
    down: Tile


STEPS = (
    Tiles(8, Tile(32, 16, 128, 4, 4), Tile(64, 16, 64, 4, 4)),
    Tiles(20, Tile(64, 32, 64, 4, 4), Tile(64, 32, 64, 4, 4)),
    Tiles(80, Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 8)),
    Tiles(math.inf, Tile(128, 128, 64, 4, 8), Tile(128, 128, 64, 3, 8)),
)
PIECES = Tiles(math.inf, Tile(128, 128, 64, 4, 8), Tile(256, 128, 64, 4, 8))


def tiles_of(rows: int, top: int, experts: int) -> Tiles:
    """Those of a step, or of a long piece, of so many rows."""
    if rows > ROWS_MAX:
        return PIECES
    return next(tiles for tiles in STEPS if rows * top <= tiles.pairs * experts)


def most_tiles(rows: int, top: int, experts: int, pairs: int) -> int:
    """More tiles of so many pairs than ``rows`` rows never need, however they are spread over the experts."""
    total = rows * top
    return min(total, total // pairs + min(total, experts))
