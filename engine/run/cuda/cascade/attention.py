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
from engine.kv.pool import PagedKVPool
from engine.model.rotary import Rotation
from engine.plan import CascadePlan, Window
from engine.run.cuda.cascade.records import Limits
from engine.run.cuda.cascade.tuning import RotationTable, Tuning
from engine.run.cuda.cascade.works import LayerWorks


class AttentionUnavailable(RuntimeError):
    """A backend misses a library, a device or a form of attention; the message names it."""


@dataclass(frozen=True)
class CascadeStep:
    """A prepared step: where its new tokens go, (rows,) int64, and whether some pair is turned back."""

    slots: Tensor
    offsets: bool


class CascadeAttention:
    """Attention over ``pool``; ``rotations[layer]`` tells how that layer turns, None that it does not, and
    ``windows[layer]`` what it lets rows see.

    One step is prepared at a time: ``prepare`` replaces the lists that ``attend`` reads. ``positions`` is the
    largest offset + 1 that a chunk can have. All layers have the same heads. Raises ``AttentionUnavailable``
    without Triton, and for layers that differ.
    """

    name = "cascade-2"

    def __init__(
        self,
        pool: PagedKVPool,
        rotations: Sequence[Rotation | None],
        *,
        heads: int,
        windows: Sequence[Window | None] | None = None,
        positions: int = 131072,
        limits: Limits | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise AttentionUnavailable("the cascade kernels need Triton: pip install 'cairn[gpu]'") from error
        self.pool = pool
        try:
            own = windows or [None] * len(pool.layout.layers)
            self.works = LayerWorks(pool, own, heads=heads, limits=limits, tuning=tuning)
        except ValueError as error:
            raise AttentionUnavailable(f"the cascade kernels: {error}") from error
        distinct = {id(rotation): rotation for rotation in rotations if rotation is not None}
        tables = {key: RotationTable.of(rotation, positions, pool.device) for key, rotation in distinct.items()}
        self._tables = [None if rotation is None else tables[id(rotation)] for rotation in rotations]

    def prepare(self, plan: CascadePlan, *, row_multiple: int = 1) -> CascadeStep:
        """Lists of a plan. ``row_multiple`` is not needed: tiles are padded inside the kernel."""
        self.works.update(plan)
        slots = torch.tensor(plan.slots).to(self.pool.device, non_blocking=True)
        return CascadeStep(slots, any(any(read.offsets) for read in plan.reads))

    def attend(self, step: CascadeStep, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys.index_copy_(0, step.slots, k)
        values.index_copy_(0, step.slots, v)
        q = q.contiguous()
        out = q.new_empty(*q.shape[:2], values.shape[-1])
        table = self._tables[layer] if step.offsets else None
        self.works.launch(
            layer, q, out, scaling=scores.scaling, rotation=table, turned=True,
            softcap=scores.softcap, sinks=scores.sinks,
        )  # fmt: skip
        return out
