"""CudaAttention: the engine's attention protocol on CUDA for any borrowed model.

    steps of few rows                    cascade kernels
    long pieces of one sequence          library attention, chunk by chunk, where it knows all that a layer asks for
    the rest                             the torch backend: long pieces with windows that hide, soft caps or sinks

Borrowed models hand over queries that are turned to their position already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.probe import Findings
from engine.model.rotary import Rotation
from engine.plan import CascadePlan, Window
from engine.run.cuda.cascade.attention import CascadeAttention, CascadeStep
from engine.run.cuda.cascade.records import Limits, WorkTooLarge
from engine.run.cuda.cascade.tuning import WIDTH_MAX
from engine.run.cuda.prefill_attention import PieceStep, attend_piece, piece_refusal, prepare_piece
from engine.run.eager.attention import TorchAttention
from engine.run.eager.step import TorchStep

CASCADE_ROWS_MAX = 256


def cascade_refusal(findings: Findings, heads: int) -> str:
    """Why the cascade kernels cannot serve the model's attention; "" if they can."""
    layers = set(findings.layout.layers)
    if findings.layout.dtype not in ("bfloat16", "float16"):
        return f"dtype {findings.layout.dtype}"
    if len(layers) != 1:
        return "layers that differ"
    (layer,) = layers
    widths = (layer.k_dim, layer.v_dim)
    if any(width % 8 or width > WIDTH_MAX for width in widths) or heads % layer.kv_heads:
        return f"{heads} heads of {layer.k_dim} and {layer.v_dim} over {layer.kv_heads} KV heads"
    return ""


@dataclass
class CudaStep:
    """A prepared step; the torch form is made when a layer first needs it."""

    plan: CascadePlan
    row_multiple: int
    slots: Tensor
    cascade: CascadeStep | None
    piece: PieceStep | None
    seen: frozenset[Window | None]  # the windows that hide nothing from its rows
    torch: TorchStep | None = None
    tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # rotation, offset -> cos, sin


class CudaAttention:
    """Attention over ``pool`` for layers that ``cascade_refusal`` does not refuse; one prepared step at a time.

    ``windows[layer]`` is what the layer lets rows see, None that it lets them see everything.
    """

    name = "cuda-3"

    def __init__(
        self,
        pool: PagedKVPool,
        rotations: Sequence[Rotation | None],
        windows: Sequence[Window | None],
        *,
        heads: int,
        positions: int,
    ) -> None:
        self.pool = pool
        self.rotations = rotations
        self._windows = tuple(windows)
        self._heads = heads
        self._positions = positions
        self._cascade: CascadeAttention | None = None
        self._torch = TorchAttention(pool, rotations, windows)

    def _kernels(self) -> CascadeAttention:
        if self._cascade is None:  # its buffers are hundreds of megabytes
            limits = Limits(rows=CASCADE_ROWS_MAX, pairs=8192, partials=12288)
            self._cascade = CascadeAttention(
                self.pool, self.rotations, heads=self._heads, windows=self._windows, positions=self._positions,
                limits=limits,
            )  # fmt: skip
        return self._cascade

    def prepare(self, plan: CascadePlan, *, row_multiple: int = 1) -> CudaStep:
        slots = torch.tensor(plan.slots, device=self.pool.device)
        cascade: CascadeStep | None = None
        piece: PieceStep | None = None
        if len(plan.slots) <= CASCADE_ROWS_MAX:
            try:
                cascade = self._kernels().prepare(plan)
            except WorkTooLarge:
                cascade = None
        if cascade is None and len(plan.tails) == 1:
            piece = prepare_piece(plan, self.pool.page_size, self.pool.device)
        seen = frozenset(window for window in self._windows if plan.seen_through(window) is plan)
        return CudaStep(plan, row_multiple, slots, cascade, piece, seen)

    def attend(self, step: CudaStep, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        if step.cascade is not None:
            return self._kernels().attend(step.cascade, layer, q, k, v, scores)
        hidden = self._windows[layer] if self._windows[layer] not in step.seen else None
        if step.piece is not None and not piece_refusal(self.pool.layout.layers[layer], (hidden,), (scores,)):
            return self._attend_piece(step, step.piece, layer, q, k, v, scores)
        if step.torch is None:
            step.torch = self._torch.prepare(step.plan, row_multiple=step.row_multiple)
        return self._torch.attend(step.torch, layer, q, k, v, scores)

    def _attend_piece(
        self, step: CudaStep, piece: PieceStep, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores
    ) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys.index_copy_(0, step.slots, k)
        values.index_copy_(0, step.slots, v)
        q = q.contiguous()
        rotation = self.rotations[layer]

        def queries(offset: int) -> Tensor:
            if offset == 0 or rotation is None:
                return q
            table = step.tables.get((id(rotation), offset))
            if table is None:
                table = rotation.table(torch.full((q.shape[0],), offset), self.pool.device)
                step.tables[id(rotation), offset] = table
            return rotation.turn_back(q, *table)

        return attend_piece(piece, queries, keys, values, scores.scaling)
