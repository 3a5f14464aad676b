"""Drawing a step's tokens from its logits on the device: captured once for each number of rows and kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.run.cuda.captured import GraphMaker
from engine.run.cuda.sampling.launch import Kind
from engine.run.cuda.sampling.slots import DeviceSlots, PendingDraws
from engine.sampling.params import Draw

# What is captured ahead. Every kind has one of these that does its work, and a row that asks for less gets the same.
USUAL = tuple(
    Kind(shaped=shaped, sampled=sampled, top_k=top_k, top_p=top_p, reports=reports)
    for shaped, sampled, top_k, top_p in (
        (False, False, False, False),
        (False, True, False, False),
        (False, True, False, True),
        (False, True, True, True),
        (True, True, True, True),
    )
    for reports in (False, True)
)


class Drawing:
    """Draws by the state of ``slots`` from the first rows of ``logits``; without ``graphs`` nothing is captured."""

    def __init__(self, slots: DeviceSlots, logits: Tensor, graphs: GraphMaker | None) -> None:
        self._slots = slots
        self._logits = logits
        self._graphs = graphs
        self._captured: dict[tuple[int, Kind], torch.cuda.CUDAGraph] = {}
        self._kind = Kind()  # of the draws that are staged
        self._rows = 0

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._captured)

    def first_launches(self) -> list[Callable[[], None]]:
        """What compiles every usual kind, in any order."""
        self._slots.stage((), 1)
        logits = self._logits[:1]
        return [partial(self._slots.launch, logits, kind) for kind in reversed(USUAL)]

    def prepare(self, rows: int) -> None:
        """Captures drawing from ``rows`` rows."""
        for kind in USUAL:
            if self._graphs is not None and (rows, kind) not in self._captured:
                self._capture(rows, kind)

    def stage(self, draws: Sequence[Draw], rows: int) -> None:
        """What is drawn next, from ``rows`` rows. Raises ``ValueError`` for a slot that was not opened."""
        kind = self._slots.stage(draws, rows)
        if self._graphs is not None and (rows, kind) not in self._captured:
            able = [found for size, found in self._captured if size == rows and found | kind == found]
            if able:
                kind = min(able, key=_work)
            else:
                self._capture(rows, kind)
                self._slots.stage(draws, rows)
        self._kind, self._rows = kind, rows

    def launch(self, draws: int) -> PendingDraws:
        """Draws what is staged; the tokens of the first ``draws`` rows are on their way."""
        if self._graphs is None:
            self._slots.launch(self._logits[: self._rows], self._kind)
        else:
            self._captured[self._rows, self._kind].replay()
        return self._slots.pending(draws)

    def _capture(self, rows: int, kind: Kind) -> None:
        """With draws in the scratch slot."""
        assert self._graphs is not None
        self._slots.stage((), rows)
        logits = self._logits[:rows]
        self._captured[rows, kind] = self._graphs.capture(lambda: self._slots.launch(logits, kind))


def _work(kind: Kind) -> int:
    return kind.shaped + kind.sampled + kind.top_k + kind.top_p + kind.reports
