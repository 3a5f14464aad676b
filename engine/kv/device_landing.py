"""A chunk's planes on a device as somewhere to read to: by way of host memory, each verified piece on its way at once.

Until the whole load is over, pages may hold bytes of a load that fails: nobody reads them before the chunk is ready.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from chunk_store.landing import ranges
from engine.kv.bounce import Bounce, BouncePiece
from engine.kv.copier import Copier, Copy

WAIT_S = 60.0  # for copies that have been handed over


class DeviceLanding:
    """A ``Landing`` (``chunk_store.landing``) in ``planes``, contiguous tensors; copies go onto ``stream``.

    The bytes pass through ``kept`` (bytes, the whole entry), where they stay, or else through pieces of ``bounce``.
    """

    def __init__(
        self,
        planes: Sequence[Tensor],
        bounce: Bounce,
        copier: Copier,
        *,
        stream: torch.cuda.Stream | None,
        kept: Tensor | None,
    ) -> None:
        self.sizes = tuple(plane.nbytes for plane in planes)
        self.piece_nbytes = bounce.piece_nbytes
        self._starts = list(accumulate(self.sizes, initial=0))
        self._planes = list(planes)
        self._bounce = bounce
        self._copier = copier
        self._stream = stream
        self._kept = kept
        self._kept_view = memoryview(b"") if kept is None else kept.numpy().data.cast("B")
        self._failed: BaseException | None = None

    @contextmanager
    def piece(self, start: int, nbytes: int) -> Iterator[Sequence[memoryview]]:
        if self._kept is not None:
            yield [self._kept_view[start : start + nbytes]]
            self.send(self._kept, start, start, nbytes)
            return
        piece = self._bounce.take(nbytes)
        try:
            yield [piece.view[:nbytes]]
        except BaseException:
            self._bounce.give_back(piece)
            raise
        self.send(piece.memory, 0, start, nbytes, piece)

    def send(self, memory: Tensor, at: int, start: int, nbytes: int, piece: BouncePiece | None = None) -> None:
        """Hands over the copy of bytes ``at .. at + nbytes`` of ``memory`` to ``start`` of the data. In any thread.

        ``piece`` is given back when the copy is over.
        """
        launch = partial(self._launch, memory, at, start, nbytes)
        self._copier.submit(Copy(launch, partial(self._ended, piece), self._stream))

    def wait(self) -> None:
        """Returns when all that was handed over is in the planes. Raises what a copy failed with, ``TimeoutError``."""
        over = threading.Event()
        self._copier.submit(Copy(lambda: None, lambda _: over.set(), self._stream))
        if not over.wait(WAIT_S):
            raise TimeoutError(f"copies to the device did not end in {WAIT_S:g} s")
        if self._failed is not None:
            raise self._failed

    def _launch(self, memory: Tensor, at: int, start: int, nbytes: int) -> None:
        for plane, first, last in ranges(self._starts, start, nbytes):
            target = self._planes[plane]
            if target.dtype != torch.uint8 or target.dim() != 1:
                target = self._planes[plane] = target.view(-1).view(torch.uint8)
            from_ = at + self._starts[plane] + first - start
            whole = last - first == target.nbytes
            (target if whole else target[first:last]).copy_(memory[from_ : from_ + last - first], non_blocking=True)

    def _ended(self, piece: BouncePiece | None, error: BaseException | None) -> None:
        if error is not None and self._failed is None:
            self._failed = error
        if piece is not None:
            self._bounce.give_back(piece)
