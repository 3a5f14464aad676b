"""The KV pool: one K and one V tensor a layer, cut into pages (``pages.py`` says who owns which).

The pool does not know what the bytes mean, which chunk has them, or who may be evicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from chunk_store.layout import KVLayout
from engine.kv.pages import PageRun, PageTable
from engine.kv.shared_memory import SharedMemory, places_of

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PagedKVPool(PageTable):
    """KV memory of one device, and who owns which page.

    ``keys[layer]`` is ``(slots, kv_heads, k_dim)``, ``values[layer]`` is ``(slots, kv_heads, v_dim)``, both of
    the layout's dtype; slot ``s`` lies in page ``s // page_size``. ``pages`` and ``chunk_pages`` count pages.
    ``shared`` is the memory of one whose pages other processes may read: a memory file on the CPU; on a card, whose
    memory can be exported as it is, and elsewhere None.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        pages: int,
        chunk_pages: int,
        page_size: int = 16,
        device: str | torch.device = "cpu",
        share: bool = False,
    ) -> None:
        """Raises ``OSError`` where memory that is to be shared cannot be had."""
        super().__init__(pages=pages, chunk_pages=chunk_pages, page_size=page_size)
        self.layout = layout
        self.device = torch.device(device)
        self.slots = (pages + 1) * page_size
        share_file = share and self.device.type == "cpu"
        self.shared = SharedMemory(places_of(layout.plane_nbytes(self.slots))) if share_file else None
        planes = self._planes()
        self.keys, self.values = planes[::2], planes[1::2]

    def _planes(self) -> list[Tensor]:
        """The memory of all slots in entry order, zeros."""
        dtype = TORCH_DTYPES[self.layout.dtype]
        heads = [(la.kv_heads, dim) for la in self.layout.layers for dim in (la.k_dim, la.v_dim)]
        if self.shared is None:
            return [torch.zeros(self.slots, *shape, dtype=dtype, device=self.device) for shape in heads]
        return [self.shared.tensor(index, (self.slots, *shape), dtype) for index, shape in enumerate(heads)]

    @cached_property
    def _regions(self) -> list[tuple[Tensor, Tensor]]:
        """Of each plane the pages of chunks and those of tails: views (pages, page_size, heads, dim), made once.

        A host that makes them anew for every tail spends more time on that than on the copies.
        """
        planes = [plane.view(-1, self.page_size, *plane.shape[1:]) for plane in self.planes]
        return [(plane[: self.chunk_pages], plane[self.chunk_pages : self.pages]) for plane in planes]

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """The memory of all slots: keys of every layer, then values."""
        return (*self.keys, *self.values)

    def move_run(self, run: PageRun, first: int) -> PageRun:
        """Moves a run with its bytes."""
        moved = super().move_run(run, first)
        size, source, target = run.pages * self.page_size, run.first * self.page_size, first * self.page_size
        for tensor in self.planes:
            tensor[target : target + size] = tensor[source : source + size].clone()
        return moved

    def copy_tail(self, pages: Sequence[int], run: PageRun, tokens: int) -> None:
        """Copies the first ``tokens`` tokens of a tail into a run, on the device, behind all that was launched.

            tail pages   7 [0 .. 15]   3 [16 .. 31]   9 [32 .. 40]         pages (7, 3, 9), 41 tokens
                              |             |              |
            run          f [0 .. 15] f+1 [16 .. 31] f+2 [32 .. 40]         whole pages: one gather a plane

        The host waits for nothing. Raises ``ValueError`` if there are fewer pages than that, or the run is too short.
        """
        count = self.pages_for(tokens)
        if count > min(len(pages), run.pages):
            raise ValueError(f"pages: {len(pages)} and a run of {run.pages} pages do not both hold {tokens} tokens")
        index = self._tail_index(pages[:count])
        for chunks, tails in self._regions:
            torch.index_select(tails, 0, index, out=chunks.narrow(0, run.first, count))

    def share_tail(self, pages: Sequence[int], others: Sequence[Sequence[int]], tokens: int) -> None:
        """Copies the first ``tokens`` tokens of a tail into each of ``others``, behind all that was launched.

        The host waits for nothing. Raises ``ValueError`` if one of them has fewer pages than that.
        """
        count = self.pages_for(tokens)
        if count > min(len(pages), *map(len, others)):
            raise ValueError(
                f"pages: {len(pages)} and {[len(each) for each in others]} do not all hold {tokens} tokens"
            )
        cpu = self.device.type == "cpu"
        lines = [list(pages[:count]) * len(others), [page for each in others for page in each[:count]]]
        index = torch.tensor(lines, pin_memory=not cpu) - self.chunk_pages
        source, target = index.to(self.device, non_blocking=True)
        for _, tails in self._regions:
            tails.index_copy_(0, target, tails.index_select(0, source))

    def gather_tail(self, pages: Sequence[int]) -> Iterator[Tensor]:
        """Copies of tail pages, a plane of ``planes`` after the other: (pages, page_size, heads, dim) on the device.

        Behind all that was launched; the host waits for nothing.
        """
        index = self._tail_index(pages)
        for _, tails in self._regions:
            yield tails.index_select(0, index)

    def scatter_tail(self, pages: Sequence[int], planes: Iterable[Tensor]) -> None:
        """Writes tail pages, a plane of ``planes`` after the other; on a card from pinned memory, without waiting."""
        index = self._tail_index(pages)
        for (_, tails), plane in zip(self._regions, planes, strict=True):
            content = plane.view(len(pages), *tails.shape[1:]).to(self.device, non_blocking=True)
            tails.index_copy_(0, index, content)

    def _tail_index(self, pages: Sequence[int]) -> Tensor:
        """Tail pages by their places in the region of tails, on the device."""
        cpu = self.device.type == "cpu"
        index = torch.tensor([page - self.chunk_pages for page in pages], pin_memory=not cpu)
        return index.to(self.device, non_blocking=True)

    def run_planes(self, run: PageRun, tokens: int) -> list[Tensor]:
        """Views of a run's first ``tokens`` tokens in entry order (K0, V0, K1, V1, ...), contiguous each."""
        start = run.first * self.page_size
        planes: list[Tensor] = []
        for key, value in zip(self.keys, self.values, strict=True):
            planes += [key[start : start + tokens], value[start : start + tokens]]
        return planes
