"""Integers on their way to the device: written into pinned memory, copied without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

IN_FLIGHT = 4  # steps whose integers may still be on their way


class InputRing:
    """Lines of int32 for ``target`` (lines, length) on the device, through a ring of pinned copies of it.

    The host waits only for a copy that was begun ``IN_FLIGHT`` steps ago. All calls are of one thread and stream.
    """

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._ring = deque(_Pinned(target) for _ in range(IN_FLIGHT))

    def send(self, *lines: Sequence[int]) -> None:
        """Begins to copy the beginning of each line; what is behind it is undefined."""
        pinned = self._ring[0]
        self._ring.rotate(-1)
        pinned.free()
        for line, values in zip(pinned.ints, lines, strict=True):
            line[: len(values)] = values
        pinned.copy_to(self._target)


class _Pinned:
    """One copy of the integers; pinned where there is a card to copy to."""

    def __init__(self, target: Tensor) -> None:
        on_cuda = target.device.type == "cuda"
        self._tensor = torch.zeros(target.shape, dtype=target.dtype, pin_memory=on_cuda)
        self.ints = self._tensor.numpy()
        self._sent = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def free(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()

    def copy_to(self, target: Tensor) -> None:
        target.copy_(self._tensor, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
