"""A layer of experts: its weights, and what its forwards need besides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.run.cuda.products import ROWS_MAX

NAME = "experts-1"  # of what computes them, for the model identity
BLOCKS = (4, 16)  # rows of a program that selects experts
PIECE_PAIRS_MIN = 64  # of a tile of theirs
TILE_RECORD = 4  # ints of a tile in a list of tiles
SPAN = 256  # of the hidden width, which one program multiplies with the router in a step


@dataclass(frozen=True)
class Experts:
    """The weights of one layer as transformers keeps them, used in place.

    ``router`` (experts, hidden), ``gate_up`` (experts, 2 * inner, hidden) with each expert's gate first, ``down``
    (experts, hidden, inner). A row goes to ``top`` of them; ``normed``: its shares are made to add up to one;
    ``rounded``: they are rounded to the model's dtype.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    top: int
    normed: bool
    rounded: bool

    @property
    def count(self) -> int:
        return self.router.shape[0]

    @property
    def hidden(self) -> int:
        return self.router.shape[1]

    @property
    def inner(self) -> int:
        return self.down.shape[2]

    @property
    def block(self) -> int:
        """Experts as the kernels have them: a power of two, no fewer than a matrix instruction has rows."""
        return max(64, 1 << (self.count - 1).bit_length())

    @property
    def parts(self) -> int:
        """In how many parts of the hidden width a row's scores are computed."""
        return -(-self.hidden // SPAN)


def experts_refusal(experts: int, top: int, hidden: int, inner: int) -> str:
    """Why the kernels cannot take experts of these widths; "" if they can."""
    if hidden % 8 or inner % 8:
        return f"experts of widths {hidden} and {inner}, which are no multiples of 8"
    if not 1 <= top <= experts <= 1024:
        return f"{top} of {experts} experts a row; 1024 are the most"
    return ""


@dataclass(frozen=True)
class ExpertBuffers:
    """What a layer of experts writes in between, for up to ``rows`` rows; its pairs are ``rows * top``."""

    parts: Tensor  # fp32 (parts, rows, block), in one line
    shares: Tensor  # fp32 (pairs,), by pair
    experts: Tensor  # int32 (pairs,), by pair
    starts: Tensor  # int32 (experts + 1,): of each expert's pairs in ``order``
    order: Tensor  # int32 (pairs,): which pair stands where
    marks: Tensor  # int32 (rows, block)
    tiles: Tensor  # int32 (1 + tiles, TILE_RECORD), of long pieces
    counts: Tensor  # int32 (blocks of rows, block)
    totals: Tensor  # int32 (block,)
    inner: Tensor  # (pairs, inner), by place
    results: Tensor  # (pairs, hidden), by pair

    @classmethod
    def of(cls, layer: Experts, rows: int) -> ExpertBuffers:
        pairs, device, dtype = rows * layer.top, layer.router.device, layer.router.dtype

        listed = 1 + pairs // PIECE_PAIRS_MIN + layer.count if rows > ROWS_MAX else 0

        def ints(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.int32, device=device)

        def wide(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.float32, device=device)

        return cls(
            parts=wide(max(layer.parts * min(rows, ROWS_MAX), rows) * layer.block),
            shares=wide(pairs), experts=ints(pairs), starts=ints(layer.count + 1), order=ints(pairs),
            marks=ints(rows, layer.block),
            tiles=ints(listed, TILE_RECORD), counts=ints(-(-rows // BLOCKS[-1]), layer.block), totals=ints(layer.block),
            inner=torch.zeros(pairs, layer.inner, dtype=dtype, device=device),
            results=torch.zeros(pairs, layer.hidden, dtype=dtype, device=device),
        )  # fmt: skip
