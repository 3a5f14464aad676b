"""Long pieces with FlashInfer's fa3 kernels: each block of keys that lie in one run of slots is one ragged call.

A chunk's piece sees its own earlier tokens and itself in one causal call, where library attention takes two and folds
them. Kernels are of compute capability 9.0 and for heads of 128.
"""

from __future__ import annotations

import importlib.metadata
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.run.cuda.flashinfer.attention import PACKAGE, flashinfer_library
from engine.run.cuda.prefill_attention import Partial

HEAD_DIM = 128
SHAPES_KEPT = 16  # plans of blocks, by shape; a chunk of many pieces has as many
WORKSPACE_NBYTES = 16 << 20
LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class _Shape:
    rows: int
    tokens: int
    heads: int
    kv_heads: int
    dtype: torch.dtype
    scaling: float
    causal: bool


class FlashInferBlock:
    """A ``prefill_attention.Block`` over FlashInfer. A block's bits follow from its shape and values alone."""

    appends = True

    def __init__(self, device: torch.device, *, library: Any = None) -> None:
        self._library = flashinfer_library() if library is None else library
        self._device = device
        self._workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device=device)
        self._planned: OrderedDict[_Shape, Any] = OrderedDict()

    @staticmethod
    def full_name() -> str:
        """The name in the model identity."""
        return f"fa3 {importlib.metadata.version(PACKAGE)}"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool, into: Tensor | None = None
    ) -> Partial:
        shape = _Shape(len(q), len(k), q.shape[1], k.shape[1], q.dtype, scaling, causal)
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if into is None else into
        _, lse = self._plan(shape).run(q, k, v, out=out, return_lse=True)
        return out, (lse.t() * LN_2).contiguous()

    def _plan(self, shape: _Shape) -> Any:
        """The wrapper that is planned for a shape; planning again costs the host a tenth of a millisecond and more."""
        found = self._planned.get(shape)
        if found is None:
            if len(self._planned) >= SHAPES_KEPT:
                torch.cuda.synchronize(self._device)  # its memory may still be read
                self._planned.popitem(last=False)
            found = self._library.BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD", backend="fa3")
            starts = (torch.tensor([0, count], dtype=torch.int32) for count in (shape.rows, shape.tokens))
            widths = {"head_dim_qk": HEAD_DIM, "head_dim_vo": HEAD_DIM}
            found.plan(
                *starts, shape.heads, shape.kv_heads, causal=shape.causal, sm_scale=shape.scaling,
                q_data_type=shape.dtype, kv_data_type=shape.dtype, **widths,
            )  # fmt: skip
            self._planned[shape] = found
        self._planned.move_to_end(shape)
        return found
