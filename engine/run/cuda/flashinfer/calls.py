"""FlashInfer's wrappers: planned once a step for all layers of a kind, run once a layer.

    head widths FlashInfer reads from pages (64, 128, 256)   paged: keys and values where they lie in the pool
    other widths up to 256, and K and V that differ          ragged: copied together, padded with zeros

Kernels are compiled when a width, dtype or soft cap is first met, which takes a minute or more and wants nvcc, unless
the package flashinfer-jit-cache brings them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.attention import Scores
from engine.run.cuda.flashinfer.lists import CallLists

PAGED_WIDTHS = (64, 128, 256)
RAGGED_PAIRS = ((192, 128),)  # widths of K and of V that FlashInfer has kernels for beside equal ones
WORKSPACE_LEAST = 128 << 20
TILE_ROWS = 128  # of the largest tile of its kernels, and programs of a processor
PROGRAMS_PER_SM = 2


@dataclass(frozen=True)
class Kind:
    """What kernels are compiled and a call is planned for. Widths of a head are the model's."""

    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    scaling: float
    softcap: float | None

    @classmethod
    def of(cls, q: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Kind:
        """Of queries (rows, heads, k_dim) over planes (slots, kv_heads, dim) of the pool."""
        widths = (keys.shape[-1], values.shape[-1])
        return cls(q.shape[1], keys.shape[1], *widths, keys.dtype, scores.scaling, scores.softcap)

    @property
    def paged(self) -> bool:
        return self.k_dim == self.v_dim and self.k_dim in PAGED_WIDTHS

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of K and V in the kernels."""
        return kernel_widths(self.k_dim, self.v_dim)


def kernel_widths(k_dim: int, v_dim: int) -> tuple[int, int]:
    """The least widths of K and V that there are kernels for. Raises ``ValueError`` if there are none."""
    fits = [(n, n) for n in PAGED_WIDTHS] + list(RAGGED_PAIRS)
    wide = [pair for pair in fits if k_dim <= pair[0] and v_dim <= pair[1]]
    if not wide:
        raise ValueError(f"head widths {k_dim} and {v_dim}: FlashInfer has kernels up to {max(PAGED_WIDTHS)}")
    return min(wide, key=sum)


class Workspace:
    """Memory that all calls share for what lies between two launches of one of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bytes: Tensor | None = None

    def of(self, kind: Kind) -> Tensor:
        """Enough for the split keys of any step; the same memory for ever, or new, larger memory."""
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count if self._on_cuda else 1
        programs = PROGRAMS_PER_SM * processors // kind.kv_heads + 1
        nbytes = programs * kind.heads * TILE_ROWS * (kind.widths[1] + 1) * 4 + (1 << 20)
        if self._bytes is None or self._bytes.numel() < nbytes:
            self._bytes = torch.zeros(max(nbytes, WORKSPACE_LEAST), dtype=torch.uint8, device=self.device)
        return self._bytes

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"


class Call:
    """One launch a layer over the requests it was last planned for.

    Its plan lies in memory of its own until the last layer has run: planned again, it waits until the copy of the plan
    before has left the host's memory.
    """

    def __init__(self, library: Any, kind: Kind, workspace: Workspace, *, causal: bool) -> None:
        self.kind = kind
        self._causal = causal
        self._device = workspace.device
        names = ("BatchPrefillWithRaggedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper")
        self._wrapper: Any = getattr(library, names[kind.paged])(workspace.of(kind), "NHD", backend="fa2")
        self._slots: Tensor | None = None
        self._unit = 1
        on_cuda = self._device.type == "cuda"
        self._sent = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def plan(self, lists: CallLists, unit: int) -> None:
        kind = self.kind
        if self._sent is not None:
            self._sent.synchronize()
        pages = torch.from_numpy(lists.pages).to(self._device)
        row_starts, page_starts = torch.from_numpy(lists.row_starts), torch.from_numpy(lists.page_starts)
        widths = dict(zip(("head_dim_qk", "head_dim_vo"), kind.widths, strict=True))
        options = {
            "causal": self._causal,
            "sm_scale": kind.scaling,
            "logits_soft_cap": kind.softcap,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.dtype,
            "max_token_per_sequence": lists.rows_max,
        }
        if kind.paged:
            last = torch.from_numpy(lists.last_page_tokens)
            self._wrapper.plan(
                row_starts, page_starts, pages, last, kind.heads, kind.kv_heads, page_size=unit, **widths, **options
            )
        else:
            if unit != 1:
                raise ValueError(f"unit: {unit}; keys that are copied together are named by slot")
            self._slots = pages
            self._wrapper.plan(row_starts, page_starts, kind.heads, kind.kv_heads, **widths, **options)
        self._unit = unit
        if self._sent is not None:
            self._sent.record()

    def run(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor) -> None:
        """``q`` (query rows, heads, k_dim) of the planned requests; ``out`` (query rows, heads, widths[1])."""
        if self.kind.paged:
            cache = tuple(plane.view(-1, self._unit, *plane.shape[1:]) for plane in (keys, values))
            self._wrapper.run(q, cache, out=out, lse=lse, return_lse=True)
            return
        assert self._slots is not None
        k_width, v_width = self.kind.widths
        gathered = (plane.index_select(0, self._slots) for plane in (keys, values))
        q, k, v = (_widened(x, n) for x, n in zip((q, *gathered), (k_width, k_width, v_width), strict=True))
        self._wrapper.run(q, k, v, out=out, lse=lse, return_lse=True)


def _widened(x: Tensor, width: int) -> Tensor:
    """(.., dim) with zeros behind, up to ``width``."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))
