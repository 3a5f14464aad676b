"""Compiling kernels side by side, and capturing launches in CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from engine.device import current

log = logging.getLogger(__name__)
COMPILERS = 8  # threads; most of a compilation runs without the interpreter


def compile_together(device: torch.device, launches: Sequence[Callable[[], None]]) -> None:
    """Runs what launches kernels for the first time, each in some thread, and waits for all. What they write is lost.

    What fails in a thread is run again in the caller's, and raises there if it was not the thread's fault.
    """

    def run(launch: Callable[[], None]) -> None:
        with current(device), torch.inference_mode():
            torch.zeros(1, device=device)  # binds the card's context to the thread, which Triton does not
            launch()

    with ThreadPoolExecutor(COMPILERS, thread_name_prefix="compile") as threads:
        begun = [(launch, threads.submit(run, launch)) for launch in launches]
    for launch, done in begun:
        failure = done.exception()
        if failure is not None:
            log.warning("a kernel was not compiled beside the others: %s", failure)
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
