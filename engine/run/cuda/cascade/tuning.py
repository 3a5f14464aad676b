"""How the cascade kernels run: tile classes, and what they are made for.

A step's items are of tile classes; ``Tuning`` says which there are, ``AttentionShape`` and ``RotationTable`` what of a
model the kernels are compiled for and read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.rotary import Rotation
from engine.run.cuda.cascade.work import SplitRule, Tiles

CHUNKS, ROW_TAILS, LONG_TAILS = "chunks", "row tails", "long tails"  # long: with several new rows


@dataclass(frozen=True)
class TileClass:
    """Items of up to ``rows`` packed rows of what it ``takes``, ``tokens`` KV tokens a step.

    ``programs_per_sm`` programs run on a processor, with ``stages`` steps in flight. ``stream``: the Gluon kernel
    (64 or 128 rows; ``warps`` is its own affair), which takes long tails if ``causal``. ``split_loop``: whole blocks
    take a loop without masks; ``tensor``: that loop reads through tensor descriptors.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    programs_per_sm: int
    takes: tuple[str, ...] = (CHUNKS, ROW_TAILS, LONG_TAILS)
    stream: bool = False
    causal: bool = False
    split_loop: bool = True
    tensor: bool = False


DEFAULT_SPLITS = SplitRule()
LONG_TAIL_CLASS = TileClass(64, 64, 4, 3, 2, (LONG_TAILS,), stream=True, causal=True)


@dataclass(frozen=True)
class Tuning:
    """How the kernels run. Bits depend on it; one process uses one.

    A step runs either ``narrow`` or ``wide`` classes: wide if at least ``wide_share`` of the tokens it reads are in
    chunks that more packed rows read than a narrow tile has. A row's bits are the same in either if their stream
    classes step alike. ``overlap``: programmatic dependent launch. ``backwards``: half of the programs of a stream
    launch take their items from the last to the first.
    """

    narrow: tuple[TileClass, ...] = (LONG_TAIL_CLASS, TileClass(64, 64, 4, 3, 2, (CHUNKS, ROW_TAILS), stream=True))
    wide: tuple[TileClass, ...] = (LONG_TAIL_CLASS, TileClass(128, 64, 4, 4, 1, (CHUNKS, ROW_TAILS), stream=True))
    wide_share: float = 0.75
    splits: SplitRule = DEFAULT_SPLITS
    partial_dtype: torch.dtype = torch.float32
    overlap: bool = True
    backwards: bool = True
    merge_parts: int = 8
    merge_warps: int = 1

    @property
    def classes(self) -> tuple[TileClass, ...]:
        """All classes; an index into it is what the lists know a class by."""
        return tuple(dict.fromkeys(self.narrow + self.wide))

    def tiles(self, members: tuple[TileClass, ...], what: str) -> Tiles:
        """(rows, class index) of the members that take ``what``, ascending."""
        return tuple(sorted((tile.rows, self.classes.index(tile)) for tile in members if what in tile.takes))


_PORTABLE_CLASSES = (TileClass(16, 64, 4, 3, 4, split_loop=False), TileClass(64, 64, 4, 3, 2))
# For devices without the bulk copy engine, and for Triton's interpreter. Both step alike along a row's tokens.
PORTABLE = Tuning(narrow=_PORTABLE_CLASSES, wide=_PORTABLE_CLASSES, overlap=False)


@dataclass(frozen=True)
class AttentionShape:
    """Heads and widths of one layer; ``heads`` is a multiple of ``kv_heads``, ``dtype`` of q, K, V and out."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int = 16

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: {self.heads} is not a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim not in (16, 32, 64, 128, 256):
            raise ValueError(f"head_dim: {self.head_dim} is not a power of two in 16..256")
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: {self.dtype} is neither bfloat16 nor float16")

    @property
    def ratio(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class RotationTable:
    """cos and sin of ``position * frequency``, fp32 (positions, pairs); pairs are (i, i + pairs) from dimension 0."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, rotation: Rotation, positions: int, device: torch.device | str) -> RotationTable:
        """The table for positions 0 .. positions - 1, computed in fp64. Raises ``ValueError`` for other pairings."""
        if rotation.interleaved or rotation.first_dim != 0:
            raise ValueError("rotation: the cascade kernel turns halves from dimension 0 on, nothing else")
        cos, sin = rotation.table(torch.arange(positions), device)
        return cls(cos[:, 0].contiguous(), sin[:, 0].contiguous())
