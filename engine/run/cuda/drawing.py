"""Drawing a step's tokens from its logits on the device: captured once for each number of rows and kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.run.cuda.captured import GraphMaker
from engine.run.cuda.sampling.launch import Kind
from engine.run.cuda.sampling.slots import DeviceSlots

# What is captured ahead. Every kind has one of these that does its work, and a row that asks for less gets the same.
USUAL = tuple(
    Kind(shaped=shaped, sampled=sampled, top_k=top_k, top_p=top_p, reports=reports)
    for shaped, sampled, top_k, top_p in (
        (False, False, False, False),
        (False, True, False, False),
        (False, True, False, True),
        (False, True, True, True),
        (True, False, False, False),
        (True, True, False, True),
        (True, True, True, True),
    )
    for reports in (False, True)
)


class Drawing:
    """Draws by the state of ``slots`` from the first rows of ``logits``; without ``graphs`` nothing is captured.

    What is drawn is the caller's to bring to the device; ``idle`` brings draws in the scratch slot.
    """

    def __init__(
        self, slots: DeviceSlots, logits: Tensor, graphs: GraphMaker | None, idle: Callable[[], object]
    ) -> None:
        self._slots = slots
        self._logits = logits
        self._graphs = graphs
        self._idle = idle
        self._captured: dict[tuple[int, Kind], torch.cuda.CUDAGraph] = {}

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._captured)

    def first_launches(self) -> list[Callable[[], None]]:
        """What compiles every usual kind, in any order, while draws are idle."""
        logits = self._logits[:1]
        return [partial(self._slots.launch, logits, kind) for kind in reversed(USUAL)]

    def prepare(self, rows: int) -> None:
        """Captures drawing from ``rows`` rows."""
        for kind in USUAL:
            if (rows, kind) not in self._captured:
                self._capture(rows, kind)

    def captured(self, kind: Kind, rows: int) -> Kind:
        """A kind that is captured for ``rows`` rows and does the work of ``kind``; captures it if there is none."""
        if self._graphs is None or (rows, kind) in self._captured:
            return kind
        able = [found for size, found in self._captured if size == rows and found | kind == found]
        if not able:
            self._capture(rows, kind)
        return min(able, key=_work, default=kind)

    def replay(self, kind: Kind, rows: int) -> None:
        """Draws from ``rows`` rows as was captured."""
        self._captured[rows, kind].replay()

    def forget(self) -> None:
        """What was captured reads draws from where they are no more."""
        self._captured.clear()

    def _capture(self, rows: int, kind: Kind) -> None:
        assert self._graphs is not None
        self._idle()
        logits = self._logits[:rows]
        self._captured[rows, kind] = self._graphs.capture(lambda: self._slots.launch(logits, kind))


def _work(kind: Kind) -> int:
    return kind.shaped + kind.sampled + kind.top_k + kind.top_p + kind.reports
