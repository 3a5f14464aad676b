"""Small tensors on their way to the device and back, through pinned memory that is allocated once.

Calls of torch that copy or wait let other threads have the interpreter, and then wait for it to come back. So a step
has few of them: its integers are one line, copied at once together with its attention lists.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IN_FLIGHT = 4  # steps whose integers may still be on their way
LINE_MULTIPLE = 16  # ints

Ints = npt.NDArray[np.int32]


class Pinned:
    """A tensor in pinned memory, or in plain memory where there is no card, and its values as an array."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, *, on_cuda: bool) -> None:
        self.tensor = torch.zeros(tuple(shape), dtype=dtype, pin_memory=on_cuda)
        self.values: npt.NDArray[Any] = self.tensor.numpy()
        self.times = 0  # that it was taken
        self._done = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def begun(self) -> None:
        """A copy to or from it was begun on the current stream."""
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        """Until that copy is done."""
        if self._done is not None and not self._done.query():  # type: ignore[no-untyped-call]
            self._done.synchronize()


class PinnedRing:
    """``depth`` tensors in turn. The host waits only for a copy that was begun ``depth`` turns ago."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, depth: int) -> None:
        self._ring = deque(Pinned(shape, dtype, on_cuda=device.type == "cuda") for _ in range(depth))

    def take(self) -> Pinned:
        pinned = self._ring[0]
        self._ring.rotate(-1)
        pinned.wait()
        pinned.times += 1
        return pinned


class InputRing:
    """Lines of int32 for ``target`` (lines, length) on the device. All calls are of one thread and stream."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._ring = PinnedRing(target.shape, target.dtype, target.device, depth=IN_FLIGHT)

    def send(self, *lines: Sequence[int]) -> None:
        """Begins to copy the beginning of each line; what is behind it is undefined."""
        pinned = self._ring.take()
        for line, values in zip(pinned.values, lines, strict=True):
            line[: len(values)] = values
        self._target.copy_(pinned.tensor, non_blocking=True)
        pinned.begun()


@dataclass(frozen=True)
class LineShape:
    """How the integers of a step of up to ``rows`` rows lie behind one another.

        draws (draws, 3: slot, index, position) | rows that draw (draws) | sources | positions | slots (rows each)

    ``scratch`` is the sampling slot of a draw that is nobody's.
    """

    rows: int
    draws: int
    scratch: int

    @property
    def ints(self) -> int:
        return -(-(4 * self.draws + 3 * self.rows) // LINE_MULTIPLE) * LINE_MULTIPLE

    def parts(self, line: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Views of the parts of ``line``, an array or a tensor."""
        draws, at = self.draws, 4 * self.draws
        rows = (line[at + i * self.rows : at + (i + 1) * self.rows] for i in range(3))
        return line[: 3 * draws].reshape(draws, 3), line[3 * draws : at], *rows

    def idle(self) -> Ints:
        """A line that draws in the scratch slot, and whose rows are zeros."""
        line = np.zeros(self.ints, np.int32)
        self.parts(line)[0][:] = (self.scratch, 0, 0)
        return line
