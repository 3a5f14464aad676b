"""How the cascade kernels run: tile classes, and what they are made for.

A step's items are of tile classes; ``Tuning`` says which there are, ``AttentionShape`` and ``RotationTable`` what of a
model the kernels are compiled for and read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.model.rotary import Rotation
from engine.run.cuda.cascade.records import SplitRule, Tiles

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
# With few KV heads a split is few programs: half as many tokens each. Of 4 heads and 1024 tokens a row a decode step of
# one row takes 3.10 ms instead of 3.27 (Qwen3-30B-A3B's shape, H200), of 64 rows the same; a quarter gains no more.
FEW_KV_HEADS = 4
FEW_HEADS_SPLITS = SplitRule(chunk=((0, 512), (2049, 1024), (16384, 2048), (65536, 4096)), tail=512)
WIDTH_MAX = 1024  # of a head
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

    def check(self, shape: AttentionShape) -> None:
        """Raises ``ValueError`` for pages and splits that the tiles do not step through."""
        splits = [tokens for _, tokens in self.splits.chunk] + [self.splits.tail]
        for tile in self.classes:
            if tile.stream and (shape.page_size % 8 or tile.tokens % shape.page_size):
                raise ValueError(f"page_size: {shape.page_size} is no multiple of 8 that divides {tile.tokens}")
            if any(split % tile.tokens for split in splits):
                raise ValueError(f"splits: {splits} are no multiples of {tile.tokens} tokens")

    def tiles(self, members: tuple[TileClass, ...], what: str) -> Tiles:
        """(rows, class index) of the members that take ``what``, ascending."""
        return tuple(sorted((tile.rows, self.classes.index(tile)) for tile in members if what in tile.takes))


STREAM_WIDTH_MAX = 256  # of a padded head
SHARED_BYTES = 227 * 1024  # that a program can have on compute capability 9


def _portable(*, size: int = 64, stages: int = 3) -> Tuning:
    """One class of the Triton kernel, of ``size`` rows and tokens a step.

    Of tiles of another height its warps stand otherwise, and would add up a row's weights in another order.
    """
    classes = (TileClass(size, size, 4, stages, 2 if size == 64 else 1),)
    return Tuning(narrow=classes, wide=classes, overlap=False)


# For devices without the bulk copy engine, and for Triton's interpreter; of widths up to 128.
PORTABLE = _portable()


def tuning_for(shape: AttentionShape, hopper: bool, shared_bytes: int = SHARED_BYTES) -> Tuning:
    """How a device runs heads of that shape: one with compute capability 9 streams where the widths allow it.

    ``shared_bytes``: the shared memory that a program can have there; it bounds how many blocks are in flight.
    """
    tuning = _classes_for(shape, hopper, shared_bytes)
    return replace(tuning, splits=FEW_HEADS_SPLITS) if shape.kv_heads <= FEW_KV_HEADS else tuning


def _classes_for(shape: AttentionShape, hopper: bool, shared_bytes: int) -> Tuning:
    k_block, v_block = shape.blocks
    widest = max(k_block, v_block)
    if hopper and widest <= STREAM_WIDTH_MAX:
        return Tuning() if widest <= 128 else _wide_stream(k_block, v_block)
    size = 64 if widest <= 128 else 32 if widest <= 256 else 16
    stages = (shared_bytes - 2 * size * k_block) // (2 * size * (k_block + v_block))
    return _portable(size=size, stages=min(3, max(1, stages)))


def _wide_stream(k_block: int, v_block: int) -> Tuning:
    """Of heads whose outputs, or the blocks in flight, leave room for one program on a processor."""

    def stages(rows: int) -> int:
        return min(4, (SHARED_BYTES - 1024 - 2 * rows * k_block) // (2 * 64 * (k_block + v_block)))

    long = TileClass(64, 64, 4, stages(64), 1, (LONG_TAILS,), stream=True, causal=True)
    narrow, wide = (TileClass(rows, 64, 4, stages(rows), 1, (CHUNKS, ROW_TAILS), stream=True) for rows in (64, 128))
    return Tuning(narrow=(long, narrow), wide=(long, wide))


@dataclass(frozen=True)
class AttentionShape:
    """Heads and widths of one layer; ``heads`` is a multiple of ``kv_heads``, ``dtype`` of q, K, V and out.

    ``head_dim`` is the width of queries and keys, ``v_dim`` that of values if it is another.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int = 16
    value_dim: int | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: {self.heads} is not a multiple of kv_heads ({self.kv_heads})")
        for name, width in (("head_dim", self.k_dim), ("value_dim", self.v_dim)):
            if width % 8 or not 8 <= width <= WIDTH_MAX:
                raise ValueError(f"{name}: {width} is not a multiple of 8 in 8..{WIDTH_MAX}")
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: {self.dtype} is neither bfloat16 nor float16")

    @property
    def ratio(self) -> int:
        return self.heads // self.kv_heads

    @property
    def k_dim(self) -> int:
        return self.head_dim

    @property
    def v_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def blocks(self) -> tuple[int, int]:
        """The widths of keys and values padded to powers of two, as the kernels hold them."""
        k_block, v_block = (max(16, 1 << (width - 1).bit_length()) for width in (self.k_dim, self.v_dim))
        return k_block, v_block


@dataclass(frozen=True)
class RotationTable:
    """cos and sin of ``position * frequency``, fp32 (positions, pairs).

    Pairs are (i, i + pairs) from dimension ``first_dim`` on, or neighbours if ``interleaved``.
    """

    cos: Tensor
    sin: Tensor
    first_dim: int = 0
    interleaved: bool = False

    @property
    def pairs(self) -> int:
        return self.cos.shape[1]

    @classmethod
    def of(cls, rotation: Rotation, positions: int, device: torch.device | str) -> RotationTable:
        """The table for positions 0 .. positions - 1, computed in fp64."""
        cos, sin = rotation.table(torch.arange(positions), device)
        return cls(cos[:, 0].contiguous(), sin[:, 0].contiguous(), rotation.first_dim, rotation.interleaved)

    def turned_back(self, q: Tensor, offset: int) -> Tensor:
        """Queries (rows, heads, dim) that stand at their positions, turned back by ``offset``, in fp32."""
        rotation = Rotation(torch.empty(self.pairs), self.interleaved, self.first_dim)
        return rotation.turn_back(q, self.cos[offset], self.sin[offset])
