"""One forward of a plain decoder over rows of a step: matrix products by cuBLAS, everything between them fused.

The rows' inputs and all intermediate results lie in buffers allocated once, so a forward can be captured. Attention
is the caller's: it is called once a layer with raw queries, and turned ones where it asked for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kv.pool import PagedKVPool
from engine.run.cuda.cascade.launch import RotationTable
from engine.run.cuda.prefill_attention import group_of, launch_options
from engine.run.cuda.products import product
from engine.run.cuda.weights import FusedWeights, LayerWeights

GATE_BLOCK = 1024

# layer, raw queries (rows, heads, dim; rows strided), turned queries (rows, heads, dim), out (rows, heads, dim)
Attend = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Buffers:
    """Inputs and intermediate results of up to ``rows`` rows. ``sources`` are token ids, or ~row of ``sampled``."""

    sources: Tensor  # int32 (rows,), as positions and slots
    positions: Tensor
    slots: Tensor
    residual: Tensor  # (rows, hidden), as normed and delta
    normed: Tensor
    delta: Tensor
    qkv: Tensor  # (rows, (heads + 2 kv_heads) * dim)
    turned: Tensor  # (rows, heads * dim), as attended
    attended: Tensor
    gate_up: Tensor  # (rows, 2 * mlp)
    gated: Tensor  # (rows, mlp)

    @classmethod
    def of(cls, weights: FusedWeights, rows: int) -> Buffers:
        def make(width: int) -> Tensor:
            return torch.zeros(rows, width, dtype=weights.embedding.dtype, device=weights.embedding.device)

        ints = torch.zeros(3, rows, dtype=torch.int32, device=weights.embedding.device)
        heads, kv = weights.heads * weights.head_dim, weights.kv_heads * weights.head_dim
        hidden, mlp = weights.hidden, weights.mlp
        return cls(
            ints[0], ints[1], ints[2], make(hidden), make(hidden), make(hidden), make(heads + 2 * kv), make(heads),
            make(heads), make(2 * mlp), make(mlp),
        )  # fmt: skip

    def first(self, rows: int) -> Buffers:
        """Views of the first ``rows`` rows."""
        return Buffers(*(getattr(self, name)[:rows] for name in self.__dataclass_fields__))


class FusedForward:
    """Forwards of one model over one pool. ``positions`` is the largest position + 1."""

    def __init__(self, weights: FusedWeights, pool: PagedKVPool, *, positions: int) -> None:
        self.weights = weights
        self.pool = pool
        self.table = RotationTable.of(weights.rotation, positions, pool.device)
        self.group = group_of(weights.heads, weights.kv_heads)
        self.overlap = launch_options(pool.device)
        self.watch: Callable[[int, Tensor], None] | None = None  # called with what each layer hands on; not in a graph

    def layers(
        self, b: Buffers, sampled: Tensor, attend: Attend, *, turn: bool, last_row_only: bool, logits: Tensor | None
    ) -> None:
        """All layers over the rows of ``b``; K and V go to the slots.

        ``logits`` (rows, vocabulary), of one row with ``last_row_only``, is written; with None the last layer ends
        when its keys and values are stored.
        """
        from engine.run.cuda import kernels

        w, rows = self.weights, b.sources.shape[0]
        block = _power_of_two(w.hidden)
        kernels.embed[(rows,)](
            b.sources, sampled, w.embedding, b.residual, WIDTH=w.hidden, BLOCK=block, num_warps=4, **self.overlap
        )
        last = len(w.layers) - 1
        q, turned, out = (
            b.qkv.view(rows, -1, w.head_dim)[:, : w.heads],
            b.turned.view(rows, w.heads, w.head_dim),
            b.attended.view(rows, w.heads, w.head_dim),
        )
        for index, layer in enumerate(w.layers):
            self._project(b, layer, index, turn=turn)
            if index == last and logits is None:
                return
            attend(index, q, turned, out)
            if index == last and last_row_only:
                b = _last_row(b)
            self._rest(b, layer)
            if self.watch is not None:
                self.watch(index, b.residual + b.delta)
        assert logits is not None
        self.norm(b, w.final_norm, add=True)
        product(b.normed, w.head, logits, way=w.ways.head)

    def _project(self, b: Buffers, layer: LayerWeights, index: int, *, turn: bool) -> None:
        """Norm, q k v of the new tokens, K and V into the pool."""
        from engine.run.cuda import kernels

        w, rows = self.weights, b.sources.shape[0]
        self.norm(b, layer.input_norm, add=index > 0)
        product(b.normed, layer.qkv, b.qkv, bias=layer.qkv_bias, way=w.ways.qkv)
        normed = layer.q_norm is not None
        kernels.heads[(rows, (w.heads + 2 * w.kv_heads) // self.group)](
            b.qkv, layer.q_norm if normed else layer.input_norm, layer.k_norm if normed else layer.input_norm,
            self.table.cos, self.table.sin, b.positions, b.slots, self.pool.keys[index], self.pool.values[index],
            b.turned, w.eps,
            NORM=normed, TURN=turn, HEADS=w.heads, KV_HEADS=w.kv_heads, D=w.head_dim, GROUP=self.group, num_warps=4,
            **self.overlap,
        )  # fmt: skip

    def _rest(self, b: Buffers, layer: LayerWeights) -> None:
        """Output projection and MLP; the MLP's result stays in ``delta`` for the next norm to add."""
        from engine.run.cuda import kernels

        ways = self.weights.ways
        product(b.attended, layer.o, b.delta, way=ways.o)
        self.norm(b, layer.post_norm, add=True)
        product(b.normed, layer.gate_up, b.gate_up, way=ways.gate_up)
        mlp = self.weights.mlp
        grid = (b.residual.shape[0], -(-mlp // GATE_BLOCK))
        kernels.gate[grid](b.gate_up, b.gated, WIDTH=mlp, BLOCK=GATE_BLOCK, num_warps=4, **self.overlap)
        product(b.gated, layer.down, b.delta, way=ways.down)

    def norm(self, b: Buffers, weight: Tensor, *, add: bool) -> None:
        from engine.run.cuda import kernels

        width = self.weights.hidden
        kernels.add_norm[(b.residual.shape[0],)](
            b.residual, b.delta, weight, b.normed, self.weights.eps,
            ADD=add, WIDTH=width, BLOCK=_power_of_two(width), num_warps=8 if width >= 2048 else 4,
            **self.overlap,
        )  # fmt: skip

    def turn_queries(self, q: Tensor, positions: Tensor, offset: int) -> Tensor:
        """Raw queries (rows, heads, dim; rows strided) turned to position - offset."""
        from engine.run.cuda import kernels

        w = self.weights
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        kernels.turn[(q.shape[0], w.heads // self.group)](
            q, q.stride(0), self.table.cos, self.table.sin, positions, offset, out,
            HEADS=w.heads, D=w.head_dim, GROUP=self.group, num_warps=4,
            **self.overlap,
        )  # fmt: skip
        return out


def _last_row(b: Buffers) -> Buffers:
    return Buffers(*(getattr(b, name)[-1:] for name in b.__dataclass_fields__))


def _power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()
