"""A chunk's planes on a device as somewhere to read to: by way of host memory, each verified piece on its way at once.

Until the whole load is over, pages may hold bytes of a load that fails: nobody reads them before the chunk is ready.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate

import torch
from torch import Tensor

from chunk_store.landing import ranges
from engine.kv.bounce import Bounce


class DeviceLanding:
    """A ``Landing`` (``chunk_store.landing``) in ``planes``, contiguous tensors; copies go onto ``stream``.

    The bytes pass through ``kept`` (bytes, the whole entry), where they stay, or else through pieces of ``bounce``.
    """

    def __init__(
        self, planes: Sequence[Tensor], bounce: Bounce, *, stream: torch.cuda.Stream | None, kept: Tensor | None
    ) -> None:
        self.sizes = tuple(plane.nbytes for plane in planes)
        self.piece_nbytes = bounce.piece_nbytes
        self._starts = list(accumulate(self.sizes, initial=0))
        self._planes = [plane.view(-1).view(torch.uint8) for plane in planes]
        self._bounce = bounce
        self._stream = stream
        self._kept = kept
        self._kept_view = memoryview(b"") if kept is None else kept.numpy().data.cast("B")

    @contextmanager
    def piece(self, start: int, nbytes: int) -> Iterator[Sequence[memoryview]]:
        if self._kept is not None:
            yield [self._kept_view[start : start + nbytes]]
            self.send(self._kept[start : start + nbytes], start)
            return
        with self._bounce.piece(nbytes) as piece:
            yield [piece.view[:nbytes]]
            self.send(piece.memory[:nbytes], start)
            if self._stream is not None:
                piece.copied_on(self._stream)

    def send(self, memory: Tensor, start: int) -> None:
        """Begins to copy ``memory`` (bytes) to where byte ``start`` of the data belongs. In any thread."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for plane, first, last in ranges(self._starts, start, memory.nbytes):
                at = self._starts[plane] + first - start
                self._planes[plane][first:last].copy_(memory[at : at + last - first], non_blocking=True)
