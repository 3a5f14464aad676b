"""Long pieces with FlashInfer's fa3 kernels: each block of keys that lie in one run of slots is one ragged call.

A chunk's piece sees its own earlier tokens and itself in one causal call, where library attention takes two and folds
them. Kernels are of compute capability 9.0 and for heads of 128.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunk_store.layout import KVLayout
from engine.kv.pool import TORCH_DTYPES
from engine.model.probe import Findings
from engine.run.cuda.flashinfer.attention import PACKAGE, flashinfer_library
from engine.run.cuda.prefill_attention import Partial

HEAD_DIM = 128  # wider and narrower heads were not measured
SHAPES_KEPT = 64  # planned shapes of blocks: a piece over many chunks has as many in every layer
WORKSPACE_NBYTES = 16 << 20
TILE_ROWS_LEAST, LIST_NBYTES = 64, 64  # of a tile of the kernels, and of what a plan says of one, with room to spare
LN_2 = 0.6931471805599453

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Shape:
    rows: int
    tokens: int
    heads: int
    kv_heads: int
    dtype: torch.dtype
    scaling: float
    causal: bool


@dataclass(frozen=True)
class _Planned:
    wrapper: Any
    used: torch.cuda.Event | None  # by the last launch


class FlashInferBlock:
    """A ``prefill_attention.Block`` over FlashInfer. A block's bits follow from its shape and values alone."""

    appends = True

    def __init__(self, device: torch.device, *, library: Any = None) -> None:
        self._library = flashinfer_library() if library is None else library
        self._device = device
        self._workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device=device)
        self._shapes: OrderedDict[_Shape, _Planned] = OrderedDict()

    @staticmethod
    def full_name() -> str:
        """The name in the model identity."""
        return f"fa3 {importlib.metadata.version(PACKAGE)}"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool, into: Tensor | None = None
    ) -> Partial:
        shape = _Shape(len(q), len(k), q.shape[1], k.shape[1], q.dtype, scaling, causal)
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if into is None else into
        planned = self._plan(shape)
        _, lse = planned.wrapper.run(q, k, v, out=out, return_lse=True)
        if planned.used is not None:
            planned.used.record()
        return out, (lse.t() * LN_2).contiguous()

    def _plan(self, shape: _Shape) -> _Planned:
        """The wrapper that is planned for a shape; planning again would cost a tenth of a millisecond a layer."""
        found = self._shapes.get(shape)
        if found is None:
            if len(self._shapes) >= SHAPES_KEPT:
                _, oldest = self._shapes.popitem(last=False)
                if oldest.used is not None:
                    oldest.used.synchronize()  # its memory may still be read
            found = self._shapes[shape] = _Planned(self._made(shape), self._event())
        self._shapes.move_to_end(shape)
        return found

    def _made(self, shape: _Shape) -> Any:
        wrapper = self._library.BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD", backend="fa3")
        tiles = (shape.rows // TILE_ROWS_LEAST + 2) * shape.heads
        lists = torch.empty(tiles * LIST_NBYTES + (1 << 16), dtype=torch.uint8, device=self._device)
        wrapper.reset_workspace_buffer(self._workspace, lists)  # its own are 8 MB, of host memory too
        starts = (torch.tensor([0, count], dtype=torch.int32) for count in (shape.rows, shape.tokens))
        widths = {"head_dim_qk": HEAD_DIM, "head_dim_vo": HEAD_DIM}
        wrapper.plan(
            *starts, shape.heads, shape.kv_heads, causal=shape.causal, sm_scale=shape.scaling,
            q_data_type=shape.dtype, kv_data_type=shape.dtype, **widths,
        )  # fmt: skip
        return wrapper

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event() if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]


def block_refusal(findings: Findings) -> str:
    """Why fa3 does not compute a model's long pieces; "" if it can."""
    layout = findings.layout
    if layout.dtype not in ("bfloat16", "float16"):
        return f"dtype {layout.dtype}"
    if any((layer.k_dim, layer.v_dim) != (HEAD_DIM, HEAD_DIM) for layer in layout.layers):
        return "heads that are not 128 wide"
    return "windows" if any(findings.windows) else ""


def block_failure(heads: int, layout: KVLayout, device: torch.device) -> str:
    """What goes wrong with fa3 on the device, by trying; "" if nothing. Takes a minute where it was never built."""
    kv_heads = {layer.kv_heads for layer in layout.layers}
    dtype = TORCH_DTYPES[layout.dtype]
    log.info("FlashInfer's fa3 kernels are looked for; the first time they are built: a minute")
    try:
        block = FlashInferBlock(device)
        for count in kv_heads:
            q, k, v = (torch.zeros(64, n, HEAD_DIM, dtype=dtype, device=device) for n in (heads, count, count))
            block(q, k, v, HEAD_DIM**-0.5, causal=True)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever a compiler, a loader or a driver says
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ""
