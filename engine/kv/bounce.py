"""Pinned memory in pieces that bytes pass through on their way to a device: a few, taken again and again.

    store --read + verify--> piece --copied--> pages          meanwhile other threads fill other pieces

Few are best: what is read, checked and copied from one then stays in the processor's caches.
"""

from __future__ import annotations

from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from engine.device import current

WAIT_S = 60.0  # for a piece: each is being read into, or copied


class BouncePiece:
    """``memory``: bytes, pinned for a GPU; ``view``: the same."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.view: memoryview = memory.numpy().data.cast("B")


class Bounce:
    """``pieces`` pieces of ``piece_nbytes`` for copies to ``device``. Thread-safe; each thread takes one at a time."""

    def __init__(self, device: torch.device | str, *, pieces: int, piece_nbytes: int) -> None:
        self.piece_nbytes = piece_nbytes
        self._device = torch.device(device)
        self._free: list[BouncePiece] = []  # the one given back last is taken first: it may be in a cache still
        self._count: SimpleQueue[None] = SimpleQueue()  # an element for each of them: C alone, and it waits
        memory = self._allocate(pieces * piece_nbytes)
        for at in range(pieces):
            self.give_back(BouncePiece(memory[at * piece_nbytes :][:piece_nbytes]))

    def take(self, nbytes: int) -> BouncePiece:
        """A piece of at least ``nbytes``: one of ours, or memory of its own if ours are smaller.

        Raises ``TimeoutError`` where nobody gives one back.
        """
        if nbytes > self.piece_nbytes:
            return BouncePiece(self._allocate(nbytes))
        try:
            self._count.get(timeout=WAIT_S)
        except Empty:
            raise TimeoutError(f"no memory to read into was given back for {WAIT_S:g} s") from None
        return self._free.pop()

    def give_back(self, piece: BouncePiece) -> None:
        """Nobody reads or writes it any more."""
        if piece.memory.nbytes == self.piece_nbytes:
            self._free.append(piece)
            self._count.put(None)

    def _allocate(self, nbytes: int) -> Tensor:
        with current(self._device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda" and nbytes > 0)
