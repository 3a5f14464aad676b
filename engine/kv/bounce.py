"""Pinned memory in pieces that bytes pass through on their way to a device: a few, taken again and again.

    store --read + verify--> piece --own stream--> pages          meanwhile other threads fill other pieces

A piece is given again when the copy that was begun from it is over. Few and small ones are best: what is read, checked
and copied from one then stays in the processor's caches.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.device import current

WAIT_S = 60.0  # for a piece: every holder is in the middle of reading one


class BouncePiece:
    """``memory`` (bytes, pinned for a GPU) and the copy out of it that was begun last."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.view = memory.numpy().data.cast("B")
        self._copied: torch.cuda.Event | None = None

    def copied_on(self, stream: torch.cuda.Stream) -> None:
        """What ``stream`` has been given until now must be over before anybody fills this piece."""
        if self._copied is None:
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._copied.record(stream)

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()


class Bounce:
    """``pieces`` pieces of ``piece_nbytes`` for copies to ``device``. Thread-safe; each thread takes one at a time."""

    def __init__(self, device: torch.device | str, *, pieces: int, piece_nbytes: int) -> None:
        self.piece_nbytes = piece_nbytes
        self._device = torch.device(device)
        memory = self._allocate(pieces * piece_nbytes)
        self._free = deque(BouncePiece(memory[at * piece_nbytes :][:piece_nbytes]) for at in range(pieces))
        self._given_back = threading.Condition()

    @contextmanager
    def piece(self, nbytes: int) -> Iterator[BouncePiece]:
        """A piece of at least ``nbytes``: the one given back longest ago, or one of its own if none is that large.

        Raises ``TimeoutError`` where nobody gives one back.
        """
        if nbytes > self.piece_nbytes:
            large = BouncePiece(self._allocate(nbytes))
            try:
                yield large
            finally:
                large.wait()
            return
        with self._given_back:
            if not self._given_back.wait_for(lambda: self._free, WAIT_S):
                raise TimeoutError(f"no memory to read into was given back for {WAIT_S:g} s")
            piece = self._free.popleft()
        try:
            piece.wait()
            yield piece
        finally:
            with self._given_back:
                self._free.append(piece)
                self._given_back.notify()

    def _allocate(self, nbytes: int) -> Tensor:
        with current(self._device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda" and nbytes > 0)
