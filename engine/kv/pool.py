"""The KV pool: one K and one V tensor a layer, cut into pages (``pages.py`` says who owns which).

The pool does not know what the bytes mean, which chunk has them, or who may be evicted.
"""

from __future__ import annotations

import torch

from chunk_store.layout import KVLayout
from engine.kv.pages import PageRun, PageTable

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PagedKVPool(PageTable):
    """KV memory of one device, and who owns which page.

    ``keys[layer]`` is ``(slots, kv_heads, k_dim)``, ``values[layer]`` is ``(slots, kv_heads, v_dim)``, both of
    the layout's dtype; slot ``s`` lies in page ``s // page_size``. ``pages`` and ``chunk_pages`` count pages.
    """

    def __init__(
        self, layout: KVLayout, *, pages: int, chunk_pages: int, page_size: int = 16, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(pages=pages, chunk_pages=chunk_pages, page_size=page_size)
        self.layout = layout
        self.device = torch.device(device)
        slots = (pages + 1) * page_size
        dtype = TORCH_DTYPES[layout.dtype]
        self.keys = [torch.zeros(slots, la.kv_heads, la.k_dim, dtype=dtype, device=device) for la in layout.layers]
        self.values = [torch.zeros(slots, la.kv_heads, la.v_dim, dtype=dtype, device=device) for la in layout.layers]

    @property
    def scratch_page(self) -> int:
        """The page that belongs to nobody; rows that pad a batch write there."""
        return self.pages

    def move_run(self, run: PageRun, first: int) -> PageRun:
        """Moves a run with its bytes."""
        moved = super().move_run(run, first)
        size, source, target = run.pages * self.page_size, run.first * self.page_size, first * self.page_size
        for tensor in (*self.keys, *self.values):
            tensor[target : target + size] = tensor[source : source + size].clone()
        return moved

    def run_planes(self, run: PageRun, tokens: int) -> list[torch.Tensor]:
        """Views of a run's first ``tokens`` tokens in entry order (K0, V0, K1, V1, ...), contiguous each."""
        start = run.first * self.page_size
        planes: list[torch.Tensor] = []
        for key, value in zip(self.keys, self.values, strict=True):
            planes += [key[start : start + tokens], value[start : start + tokens]]
        return planes
