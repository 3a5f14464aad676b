"""One forward of a plain decoder over rows of a step: matrix products by cuBLAS, everything between them fused.

The rows' inputs and all intermediate results lie in buffers allocated once, so a forward can be captured. Attention
is the caller's: it is called once a layer with raw queries, and turned ones where it asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.plan import Window
from engine.run.cuda.cascade.tuning import RotationTable
from engine.run.cuda.experts.launch import add_up, arrive, multiply, route
from engine.run.cuda.experts.layer import ExpertBuffers, Experts
from engine.run.cuda.experts.tiles import tiles_of
from engine.run.cuda.packed import Attend, AttentionCall
from engine.run.cuda.prefill_attention import group_of, launch_options, piece_refusal
from engine.run.cuda.products import ROWS_MAX, product
from engine.run.cuda.weights import FusedWeights, LayerWeights

GATE_BLOCK = 1024


@dataclass(frozen=True)
class Buffers:
    """Inputs and intermediate results of up to ``rows`` rows. ``sources`` are token ids, or ~slot of ``last``."""

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
    experts: ExpertBuffers | None  # where layers have some; whole, whatever rows are looked at

    @classmethod
    def of(cls, weights: FusedWeights, rows: int) -> Buffers:
        def make(width: int) -> Tensor:
            return torch.zeros(rows, width, dtype=weights.embedding.dtype, device=weights.embedding.device)

        ints = torch.zeros(3, rows, dtype=torch.int32, device=weights.embedding.device)
        heads, kv = weights.heads * weights.head_dim, weights.kv_heads * weights.head_dim
        hidden, mlp, experts = weights.hidden, weights.mlp, weights.experts
        return cls(
            ints[0], ints[1], ints[2], make(hidden), make(hidden), make(hidden), make(heads + 2 * kv), make(heads),
            make(heads), make(2 * mlp), make(mlp), None if experts is None else ExpertBuffers.of(experts, rows),
        )  # fmt: skip

    def first(self, rows: int) -> Buffers:
        """Views of the first ``rows`` rows."""
        names = [name for name in self.__dataclass_fields__ if name != "experts"]
        return Buffers(**{name: getattr(self, name)[:rows] for name in names}, experts=self.experts)


@dataclass(frozen=True)
class DrawnRows:
    """The rows that a token is drawn behind. All that follows the last layer's attention is computed of them alone."""

    rows: Tensor  # int32 (draws,): which rows of the step they are
    residual: Tensor  # (draws, hidden)
    attended: Tensor  # (draws, heads * dim)
    scores: Tensor  # (draws, vocabulary and the head's padding), what comes out
    logits: Tensor  # (draws, vocabulary) of it

    @classmethod
    def of(cls, weights: FusedWeights, rows: Tensor) -> DrawnRows:
        def make(width: int) -> Tensor:
            return torch.zeros(len(rows), width, dtype=weights.embedding.dtype, device=rows.device)

        scores = make(weights.head.shape[0])
        heads = weights.heads * weights.head_dim
        return cls(rows, make(weights.hidden), make(heads), scores, scores[:, : weights.vocabulary])

    def first(self, draws: int) -> DrawnRows:
        """Views of the first ``draws``."""
        return DrawnRows(*(getattr(self, name)[:draws] for name in self.__dataclass_fields__))


class FusedForward:
    """Forwards of one model over one pool. ``positions`` is the largest position + 1.

    Every kernel and every product works row by row: what a row gives does not depend on the rows beside it.
    """

    name = "fused-5"

    def __init__(self, weights: FusedWeights, pool: PagedKVPool, *, positions: int) -> None:
        self.weights = weights
        self.pool = pool
        self.table = RotationTable.of(weights.rotation, positions, pool.device)
        self.group = group_of(weights.heads, weights.kv_heads)
        self.overlap = launch_options(pool.device)
        # Called with what each layer but the last hands on; not in a graph.
        self.watch: Callable[[int, Tensor], None] | None = None
        self._call = AttentionCall(Scores(weights.scaling), self.table, turned=False)

    @property
    def heads(self) -> int:
        return self.weights.heads

    @property
    def windows(self) -> tuple[Window | None, ...]:
        return self.weights.windows

    @property
    def piece_refusal(self) -> str:
        return piece_refusal(self.pool.layout.layers[0], self.windows, ())

    @property
    def vocabulary(self) -> int:
        return self.weights.vocabulary

    def call(self, layer: int) -> AttentionCall:
        return self._call

    def inputs(self, rows: int) -> Buffers:
        return Buffers.of(self.weights, rows)

    def outputs(self, rows: Tensor) -> DrawnRows:
        return DrawnRows.of(self.weights, rows)

    def layers(self, b: Buffers, last: Tensor, attend: Attend, *, turn: bool, drawn: Iterable[DrawnRows]) -> None:
        """All layers over the rows of ``b``, as many as its sources; K and V go to the slots.

        ``last`` (slots,) int32 holds the tokens that negative sources name. The logits of each of ``drawn`` are
        written, one behind the other; without any the last layer ends when its keys and values are stored.
        """
        from engine.run.cuda import kernels

        w, rows = self.weights, b.sources.shape[0]
        block = _power_of_two(w.hidden)
        kernels.embed[(rows,)](
            b.sources, last, w.embedding, b.residual, WIDTH=w.hidden, BLOCK=block, num_warps=4, **self.overlap
        )
        q, turned, out = (
            b.qkv.view(rows, -1, w.head_dim)[:, : w.heads],
            b.turned.view(rows, w.heads, w.head_dim),
            b.attended.view(rows, w.heads, w.head_dim),
        )
        for index, layer in enumerate(w.layers):
            self._project(b, layer, index, turn=turn)
            if index == len(w.layers) - 1:
                break
            attend(index, q, turned, out)
            self._rest(b, layer)
            if self.watch is not None:
                self.watch(index, self._handed_on(b, layer))
        for number, each in enumerate(drawn):
            if number == 0:
                attend(index, q, turned, out)
            self._head(b, layer, each)

    def _head(self, b: Buffers, layer: LayerWeights, drawn: DrawnRows) -> None:
        """What follows the last layer's attention; what other rows need of ``b`` stays."""
        w, b = self.weights, self._gathered(b, drawn)
        self._rest(b, layer)
        self._arrive(b, layer, w.final_norm)
        product(b.normed, w.head, drawn.scores, way=w.ways.head)

    def _gathered(self, b: Buffers, drawn: DrawnRows) -> Buffers:
        """The rows that draw, packed: what follows works on them alone."""
        from engine.run.cuda import kernels

        draws, w = drawn.rows.shape[0], self.weights
        heads = w.heads * w.head_dim
        kernels.gather[(draws,)](
            drawn.rows, b.residual, b.attended, drawn.residual, drawn.attended,
            WIDTH=w.hidden, BLOCK=_power_of_two(w.hidden), HEADS_WIDTH=heads, HEADS_BLOCK=_power_of_two(heads),
            num_warps=4, **self.overlap,
        )  # fmt: skip
        return replace(b.first(draws), residual=drawn.residual, attended=drawn.attended)

    def _project(self, b: Buffers, layer: LayerWeights, index: int, *, turn: bool) -> None:
        """Norm, q k v of the new tokens, K and V into the pool."""
        from engine.run.cuda import kernels

        w, rows = self.weights, b.sources.shape[0]
        if index == 0:
            self.norm(b, layer.input_norm, add=False)
        else:
            self._arrive(b, w.layers[index - 1], layer.input_norm)
        product(b.normed, layer.qkv, b.qkv, bias=layer.qkv_bias, way=w.ways.qkv)
        normed = layer.q_norm is not None
        kernels.heads[(rows, (w.heads + 2 * w.kv_heads) // self.group)](
            b.qkv, layer.q_norm if normed else layer.input_norm, layer.k_norm if normed else layer.input_norm,
            self.table.cos, self.table.sin, b.positions, b.slots, self.pool.keys[index], self.pool.values[index],
            b.turned, w.eps,
            NORM=normed, TURN=turn, HEADS=w.heads, KV_HEADS=w.kv_heads, D=w.head_dim, GROUP=self.group,
            num_warps=4 if rows <= ROWS_MAX else 1, **self.overlap,  # of many small programs more run at once
        )  # fmt: skip

    def _rest(self, b: Buffers, layer: LayerWeights) -> None:
        """Output projection, then MLP or experts. What they make is added with the next norm (``_arrive``)."""
        from engine.run.cuda import kernels

        ways, mlp = self.weights.ways, layer.mlp
        product(b.attended, layer.o, b.delta, way=ways.o)
        self.norm(b, layer.post_norm, add=True)
        if isinstance(mlp, Experts):
            assert b.experts is not None
            route(mlp, b.normed, b.experts, overlap=self.overlap)
            multiply(mlp, b.normed, b.experts, tiles_of(b.normed.shape[0], mlp.top, mlp.count), overlap=self.overlap)
            return
        product(b.normed, mlp.gate_up, b.gate_up, way=ways.gate_up)
        width = mlp.down.shape[1]
        grid = (b.residual.shape[0], -(-width // GATE_BLOCK))
        kernels.gate[grid](b.gate_up, b.gated, WIDTH=width, BLOCK=GATE_BLOCK, num_warps=4, **self.overlap)
        product(b.gated, mlp.down, b.delta, way=ways.down)

    def _arrive(self, b: Buffers, layer: LayerWeights, weight: Tensor) -> None:
        """The norm behind ``layer``, whose MLP or experts are added to the residual stream before."""
        if isinstance(layer.mlp, Experts):
            assert b.experts is not None
            arrive(layer.mlp, b.residual, weight, b.normed, b.experts, self.weights.eps, overlap=self.overlap)
        else:
            self.norm(b, weight, add=True)

    def _handed_on(self, b: Buffers, layer: LayerWeights) -> Tensor:
        """The residual stream with what ``_arrive`` is going to add."""
        if isinstance(layer.mlp, Experts):
            assert b.experts is not None
            add_up(layer.mlp, b.delta, b.experts, overlap=self.overlap)
        return b.residual + b.delta

    def norm(self, b: Buffers, weight: Tensor, *, add: bool) -> None:
        from engine.run.cuda import kernels

        width = self.weights.hidden
        kernels.add_norm[(b.residual.shape[0],)](
            b.residual, b.delta, weight, b.normed, self.weights.eps,
            ADD=add, WIDTH=width, BLOCK=_power_of_two(width), num_warps=8 if width >= 2048 else 4,
            **self.overlap,
        )  # fmt: skip


def _power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()
