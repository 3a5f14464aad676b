"""Attention of a long piece of one sequence: chunk by chunk with the library's fused kernels, merged in fp32.

    rows of the piece  x  chunk 0 | chunk 1 | ... | its own earlier tokens      every row sees every key
    rows of the piece  x  the piece itself                                     causal

Library attention knows no windows, soft caps and sinks (``piece_refusal``).
Keys are views of the pool where slots are neighbours (chunks always; tails that are chunks being computed).
Results are folded in the order tail, chunk 0, chunk 1, ...; which kernel computes a block depends on the block's
shape alone. cuDNN plans every shape anew, so it takes blocks of whole 1024s only, and flash attention the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from chunk_store.layout import LayerLayout
from engine.attention import Scores
from engine.plan import CascadePlan, ChunkRead, Window
from engine.run.eager.step import LongTail, prepare_long_tail

CUDNN_MULTIPLE = 1024  # rows and keys of a block that cuDNN takes are multiples of this
CUDNN_WIDTH_MAX = 128  # of a head
WIDTH_MAX = 256  # of a head that flash attention takes

Partial = tuple[Tensor, Tensor]  # out (rows, heads, dim) contiguous, natural-log lse (heads, rows) fp32
Queries = Callable[[int], Tensor]  # offset -> the queries (rows, heads, dim) of a chunk that stands so much further on


@dataclass(frozen=True)
class PieceStep:
    """The reads of a plan of one sequence in the order of its composition, and its tail."""

    reads: tuple[ChunkRead, ...]
    tail: LongTail

    @property
    def rows(self) -> int:
        return self.tail.rows


def piece_refusal(layer: LayerLayout, windows: Iterable[Window | None], scores: Iterable[Scores]) -> str:
    """Why library attention cannot compute pieces of a model with such layers; "" if it can."""
    wanted = tuple(scores)
    if any(window is not None for window in windows):
        return "sliding windows"
    if any(each.softcap is not None for each in wanted):
        return "soft caps"
    if any(each.sinks is not None for each in wanted):
        return "attention sinks"
    widest = max(layer.k_dim, layer.v_dim)
    return "" if widest <= WIDTH_MAX and widest % 8 == 0 else f"heads of {widest}"


def prepare_piece(plan: CascadePlan, page_size: int, device: torch.device) -> PieceStep:
    """Raises ``ValueError`` for a plan of several sequences."""
    if len(plan.tails) != 1:
        raise ValueError(f"a piece is one sequence's rows; the plan has {len(plan.tails)} sequences")
    reads = sorted(plan.reads, key=lambda read: read.places[0])
    return PieceStep(tuple(reads), prepare_long_tail(plan.tails[0], page_size, device))


class Block(Protocol):
    """Attention of one block of keys.

    ``appends``: a causal block may have more keys than rows, of which it sees all before its own. ``into``: where the
    result may be written, and need not.
    """

    @property
    def appends(self) -> bool: ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool, into: Tensor | None = None
    ) -> Partial: ...


def attend_piece(
    step: PieceStep,
    queries: Queries,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    into: Tensor | None = None,
    by: Block | None = None,
) -> Tensor:
    """Attention of the piece's rows, (rows, heads, v_dim) contiguous in q's dtype; in ``into`` if given.

    ``keys`` and ``values`` (slots, kv_heads, k_dim or v_dim) hold the piece's own tokens already. ``queries(0)`` are
    turned to their positions.
    """
    tail, q = step.tail, queries(0)
    if tail.slots is None:
        own = slice(tail.first_slot, tail.first_slot + tail.tokens_before + tail.rows)
        k, v = keys[own], values[own]
    else:
        k, v = keys[tail.slots], values[tail.slots]
    take: Block = LIBRARY if by is None else by
    before = 0 if take.appends else tail.tokens_before
    alone = None if before or step.reads else into
    blocks: list[Callable[[], Partial]] = [lambda: take(q, k[before:], v[before:], scaling, causal=True, into=alone)]
    if before:
        blocks.append(lambda: take(q, k[:before], v[:before], scaling, causal=False))
    for read in step.reads:
        blocks.append(lambda read=read: _chunk(take, read, queries, keys, values, scaling))  # type: ignore[misc]
    out, lse = blocks[0]()
    for index in range(1, len(blocks)):
        other, other_lse = blocks[index]()
        if index < len(blocks) - 1:
            target = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        else:
            target = torch.empty(out.shape, dtype=q.dtype, device=q.device) if into is None else into
        out, lse = fold_into(out, lse, other, other_lse, target)
    return out if into is None or out is into else into.copy_(out)


def _chunk(take: Block, read: ChunkRead, queries: Queries, keys: Tensor, values: Tensor, scaling: float) -> Partial:
    own = slice(read.first_slot, read.first_slot + read.tokens)
    return take(queries(read.offsets[0]), keys[own], values[own], scaling, causal=False)


def takes_cudnn(rows: int, tokens: int, width: int = CUDNN_WIDTH_MAX) -> bool:
    """Whether a block of that shape, over heads of ``width``, is cuDNN's."""
    return rows % CUDNN_MULTIPLE == 0 and tokens % CUDNN_MULTIPLE == 0 and width <= CUDNN_WIDTH_MAX


def block(q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool) -> Partial:
    """Attention of q (rows, heads, k_dim) over k, v (tokens, kv_heads, k_dim or v_dim).

    ``causal`` only where rows = tokens. Where widths differ, the narrower ones are filled up with zeros.
    """
    v_dim, widest = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    if takes_cudnn(q.shape[0], k.shape[0], widest):
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(q4, k4, v4, None, True, 0.0, causal, scale=scaling)
    else:
        result = torch.ops.aten._scaled_dot_product_flash_attention(q4, k4, v4, 0.0, causal, scale=scaling)
    out, lse = result[0], result[1]
    return out[0, ..., :v_dim].transpose(0, 1).contiguous(), lse.reshape(q.shape[1], q.shape[0])


class LibraryBlock:
    """torch's: cuDNN where it takes the shape, else flash attention."""

    appends = False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool, into: Tensor | None = None
    ) -> Partial:
        return block(q, k, v, scaling, causal=causal)


LIBRARY = LibraryBlock()


def fold_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, merged: Tensor) -> Partial:
    """The two partial results as one, whose output is ``merged``."""
    from engine.run.cuda import kernels

    rows, heads, dim = out.shape
    group = group_of(heads)
    merged_lse = torch.empty_like(lse)
    kernels.fold[(rows, heads // group)](
        out, lse, other.contiguous(), other_lse, merged, merged_lse, rows, HEADS=heads, D=dim,
        BLOCK=1 << (dim - 1).bit_length(), GROUP=group,
        **launch_options(out.device),
    )  # fmt: skip
    return merged, merged_lse


def group_of(*counts: int, most: int = 8) -> int:
    """The largest power of two, at most ``most``, that divides every count: heads that one program takes."""
    group = most
    while any(count % group for count in counts):
        group //= 2
    return group


def launch_options(device: torch.device) -> dict[str, bool]:
    """Programmatic dependent launch where the device has it, compute capability 9 on."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"OVERLAP": True, "launch_pdl": True} if capable else {"OVERLAP": False}
