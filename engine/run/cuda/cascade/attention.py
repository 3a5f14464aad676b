"""CascadeAttention: the engine's attention protocol over the cascade kernels (CUDA, Triton).

Models borrowed from transformers hand over queries that are already turned to their position; those of chunks
that stand elsewhere than they were computed are turned back by the offset, inside the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention import Scores
from engine.kv.pool import TORCH_DTYPES, PagedKVPool
from engine.model.rotary import Rotation
from engine.plan import CascadePlan
from engine.run.cuda.cascade.launch import CascadeWork
from engine.run.cuda.cascade.tuning import AttentionShape, RotationTable, Tuning
from engine.run.cuda.cascade.work import Limits


class AttentionUnavailable(RuntimeError):
    """A backend misses a library, a device or a form of attention; the message names it."""


@dataclass(frozen=True)
class CascadeStep:
    """A prepared step: where its new tokens go, (rows,) int64, and whether some pair is turned back."""

    slots: Tensor
    offsets: bool


class CascadeAttention:
    """Attention over ``pool``; ``rotations[layer]`` tells how that layer turns, None that it does not.

    One step is prepared at a time: ``prepare`` replaces the lists that ``attend`` reads. ``positions`` is the
    largest offset + 1 that a chunk can have. All layers have the same heads. Raises ``AttentionUnavailable``
    without Triton, and for layers that differ or whose K and V differ in width.
    """

    name = "cascade-1"

    def __init__(
        self,
        pool: PagedKVPool,
        rotations: Sequence[Rotation | None],
        *,
        heads: int,
        positions: int = 131072,
        limits: Limits | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise AttentionUnavailable("the cascade kernels need Triton: pip install 'cairn[gpu]'") from error
        layers = set(pool.layout.layers)
        if len(layers) != 1 or any(layer.k_dim != layer.v_dim for layer in layers):
            raise AttentionUnavailable(f"the cascade kernels take equal layers with k_dim = v_dim, not {layers}")
        (layer,) = layers
        dtype = TORCH_DTYPES[pool.layout.dtype]
        shape = AttentionShape(heads, layer.kv_heads, layer.k_dim, dtype, pool.page_size)
        self.pool = pool
        self.work = CascadeWork(shape, pool.device, limits, tuning)
        distinct = {id(rotation): rotation for rotation in rotations if rotation is not None}
        tables = {key: RotationTable.of(rotation, positions, pool.device) for key, rotation in distinct.items()}
        self._tables = [None if rotation is None else tables[id(rotation)] for rotation in rotations]

    def prepare(self, plan: CascadePlan, *, row_multiple: int = 1) -> CascadeStep:
        """Lists of a plan. ``row_multiple`` is not needed: tiles are padded inside the kernel."""
        self.work.update(plan)
        slots = torch.tensor(plan.slots).to(self.pool.device, non_blocking=True)
        return CascadeStep(slots, any(any(read.offsets) for read in plan.reads))

    def attend(self, step: CascadeStep, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        if scores.sinks is not None or scores.softcap is not None:
            raise AttentionUnavailable("the cascade kernels know neither attention sinks nor soft caps")
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys.index_copy_(0, step.slots, k)
        values.index_copy_(0, step.slots, v)
        q = q.contiguous()
        out = torch.empty_like(q)
        table = self._tables[layer] if step.offsets else None
        self.work.launch(keys, values, q, out, scaling=scores.scaling, rotation=table, turned=True)
        return out
