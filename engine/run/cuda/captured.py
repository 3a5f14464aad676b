"""Compiling kernels, and capturing launches in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def compile_kernels(device: torch.device, launches: Sequence[Callable[[], None]]) -> None:
    """Runs what launches kernels for the first time, and waits for all. What they write is lost.

    One after the other: Triton 3.6 loads the launcher of every kernel as a module of the same name, and where two
    threads do so at once a kernel can get the launcher of another one (seen: "function takes exactly 33 arguments (30
    given)", at a start in seven).
    """
    for launch in launches:
        launch()
    torch.cuda.synchronize(device)


class GraphMaker:
    """Makes graphs for one card. They share the memory of what they need in between: one runs after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = None
        # The stream that torch captures on unless told otherwise is of the card that captured first in this process.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """None of the graphs is kept, so their memory is gone too."""
        self._memory = None

    def capture(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what ``launch`` launches, after it has run once, which compiles what is missing.

        Waits for the device. Loads of other threads go on meanwhile.
        """
        launch()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Without torch.cuda.graph, which collects garbage and empties the allocator's cache for every graph.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        self._memory = graph.pool()
        return graph
