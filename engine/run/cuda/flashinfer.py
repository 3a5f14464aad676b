"""FlashInferAttention: the same plans over FlashInfer's fa2 kernels; what our kernels are compared with.

    pairs    (chunk, row) pairs, chunk by chunk, in one call without causality; the query gathered and turned
    tails    one causal call over the tails' pages
    merge    each row's results in the order of its composition, in fp32, by our merge kernel

Three launches whatever the number of levels. FlashInfer's own cascade wrapper picks kernels that do not split a
long shared chunk, and takes one query for all levels. Results of the two calls are rounded to bf16 before they are
merged. FlashInfer is an optional dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import Scores
from engine.kv.pool import TORCH_DTYPES, PagedKVPool
from engine.model.rotary import Rotation
from engine.plan import CascadePlan
from engine.run.cuda.cascade.attention import AttentionUnavailable
from engine.run.cuda.cascade.work import HEADER, ROW

WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True)
class FlashInferStep:
    """A prepared step. ``pair_rows`` (pairs,); ``order`` and ``rows`` are what the merge reads, on the device."""

    slots: Tensor
    pair_rows: Tensor
    offsets: Tensor | None  # (pairs,) on the CPU; None: nothing is turned
    order: Tensor
    rows: Tensor
    partial_out: Tensor  # (pairs + rows, heads, dim)
    partial_lse: Tensor  # (pairs + rows, heads) fp32, base 2


class FlashInferAttention:
    """Attention over ``pool`` with ``heads`` query heads; chunks begin at pages, as the pool's runs do.

    ``scaling`` is fixed when a step is planned; None is head_dim ** -0.5. Raises ``AttentionUnavailable`` without
    FlashInfer or Triton, and for layers that differ.
    """

    name = "flashinfer-1"

    def __init__(
        self, pool: PagedKVPool, rotations: Sequence[Rotation | None], *, heads: int, scaling: float | None = None
    ) -> None:
        try:
            import flashinfer
            import triton  # noqa: F401
        except ImportError as error:
            raise AttentionUnavailable("this backend needs FlashInfer and Triton: pip install 'cairn[gpu]'") from error
        layers = set(pool.layout.layers)
        if len(layers) != 1 or any(layer.k_dim != layer.v_dim for layer in layers):
            raise AttentionUnavailable(f"FlashInfer takes equal layers with k_dim = v_dim here, not {layers}")
        (self._layer,) = layers
        self.pool, self.rotations, self.heads = pool, rotations, heads
        self.scaling = self._layer.k_dim**-0.5 if scaling is None else scaling
        wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        spaces = [torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device) for _ in range(2)]
        self._pairs, self._tails = (wrapper(space, "NHD", backend="fa2") for space in spaces)

    def prepare(self, plan: CascadePlan, *, row_multiple: int = 1) -> FlashInferStep:
        """Plans both calls. ``row_multiple`` is not needed: FlashInfer pads tiles itself."""
        reads, rows, device = plan.reads, len(plan.slots), self.pool.device
        page = self.pool.page_size
        if reads:
            pages = [range(r.first_slot // page, -(-(r.first_slot + r.tokens) // page)) for r in reads]
            self._plan(self._pairs, [len(r.rows) for r in reads], pages, [r.tokens for r in reads], causal=False)
        tokens = [tail.tokens_before + tail.rows for tail in plan.tails]
        used = [tail.pages[: -(-n // page)] for tail, n in zip(plan.tails, tokens, strict=True)]
        self._plan(self._tails, [tail.rows for tail in plan.tails], used, tokens, causal=True)
        pair_rows = np.fromiter(chain.from_iterable(read.rows for read in reads), np.int64)
        offsets = np.fromiter(chain.from_iterable(read.offsets for read in reads), np.int64)
        order, records = _merge_lists(plan, pair_rows)
        results, dtype = len(pair_rows) + rows, TORCH_DTYPES[self.pool.layout.dtype]
        return FlashInferStep(
            slots=torch.tensor(plan.slots, device=device),
            pair_rows=torch.from_numpy(pair_rows).to(device),
            offsets=torch.from_numpy(offsets) if offsets.any() else None,
            order=torch.from_numpy(order).to(device),
            rows=torch.from_numpy(records).to(device),
            partial_out=torch.empty(results, self.heads, self._layer.v_dim, dtype=dtype, device=device),
            partial_lse=torch.empty(results, self.heads, dtype=torch.float32, device=device),
        )

    def attend(self, step: FlashInferStep, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        if scores.sinks is not None or scores.softcap is not None or scores.scaling != self.scaling:
            raise AttentionUnavailable("this backend knows no attention sinks, no soft caps, and one scaling")
        self.pool.keys[layer].index_copy_(0, step.slots, k)
        self.pool.values[layer].index_copy_(0, step.slots, v)
        q = q.contiguous()
        q_pairs = q.index_select(0, step.pair_rows)
        rotation = self.rotations[layer]
        if step.offsets is not None and rotation is not None:
            q_pairs = rotation.turn_back(q_pairs, *rotation.table(step.offsets, q.device))
        out = torch.empty_like(q)
        self.run(step, layer, q, q_pairs, out)
        return out

    def run(self, step: FlashInferStep, layer: int, q: Tensor, q_pairs: Tensor, out: Tensor) -> None:
        """The two calls and the merge, into ``out``; nothing is allocated, so that it can be captured."""
        from engine.run.cuda.cascade import kernel

        page, pairs = self.pool.page_size, len(step.pair_rows)
        cache = tuple(
            x.view(-1, page, self._layer.kv_heads, self._layer.k_dim)
            for x in (self.pool.keys[layer], self.pool.values[layer])
        )
        outs, lses = step.partial_out, step.partial_lse
        if pairs:
            self._pairs.run(q_pairs, cache, out=outs[:pairs], lse=lses[:pairs], return_lse=True)
        self._tails.run(q, cache, out=outs[pairs:], lse=lses[pairs:], return_lse=True)
        kernel.merge[(len(q), self.heads)](
            outs, lses, step.rows, 0, step.order, out, out.stride(0),
            HEADS=self.heads, D=self._layer.v_dim, PARTS=8, ORDERED=True, OVERLAP=False, num_warps=1,
        )  # fmt: skip

    def _plan(
        self, wrapper: Any, rows: list[int], pages: Sequence[Sequence[int]], tokens: list[int], *, causal: bool
    ) -> None:
        page = self.pool.page_size
        wrapper.plan(
            torch.tensor(np.cumsum([0, *rows]), dtype=torch.int32),
            torch.tensor(np.cumsum([0, *map(len, pages)]), dtype=torch.int32),
            torch.tensor(list(chain.from_iterable(pages)), dtype=torch.int32, device=self.pool.device),
            torch.tensor([(n - 1) % page + 1 for n in tokens], dtype=torch.int32),
            self.heads, self._layer.kv_heads, self._layer.k_dim, page, causal=causal, sm_scale=self.scaling,
            q_data_type=TORCH_DTYPES[self.pool.layout.dtype], kv_data_type=TORCH_DTYPES[self.pool.layout.dtype],
        )  # fmt: skip


def _merge_lists(plan: CascadePlan, pair_rows: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Any, Any]:
    """``order``: of each row, where its pairs' results and its tail's lie; and a header with the row records."""
    rows = len(plan.slots)
    place = np.fromiter(chain.from_iterable(read.places for read in plan.reads), np.int64)
    owner = np.concatenate((pair_rows, np.arange(rows)))
    order_in_row = np.concatenate((place, np.full(rows, plan.partials)))
    order = np.lexsort((order_in_row, owner)).astype(np.int32)
    counts = np.bincount(owner, minlength=rows)
    records = np.zeros((rows, ROW), np.int32)
    records[:, 1] = counts
    records[1:, 0] = np.cumsum(counts)[:-1]
    header = np.zeros(HEADER, np.int32)
    header[0] = rows
    return order, np.concatenate((header, records.reshape(-1)))
