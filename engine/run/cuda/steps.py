"""Steps of few rows (decode steps, short prefills) over the cascade kernels, captured once and replayed.

    host     plan n+1 | lists, token sources -> pinned -> copies | replay n+1      wait for tokens n | ...
    device            step n ............................ | tokens n -> pinned | step n+1 ...

Sampled token ids stay on the device: the next step's ``sources`` name the row they were sampled in. The host waits
for nothing but the tokens of a step that it wants to read. All launches go to the stream that is current. There is a
graph for each number of rows and set of the attention kernel's tile classes that steps of that size have used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.plan import CascadePlan, ChunkRead, Tail
from engine.run.cuda.cascade.launch import AttentionShape, CascadeWork, Tuning
from engine.run.cuda.cascade.work import Limits
from engine.run.cuda.forward import Buffers, FusedForward

IN_FLIGHT = 4  # steps whose inputs may still be on their way

# plan, layer, queries (rows, heads, dim) before rotation, attention (rows, heads, dim), scaling
CallWatch = Callable[[CascadePlan, int, Tensor, Tensor, float], None]


class LaunchedStep:
    """A pending decode step: its tokens are on their way to the host, its logits are overwritten by the next step."""

    def __init__(self, plan: CascadePlan, steps: Steps, pinned: Tensor, logits: Tensor) -> None:
        self.plan = plan
        self._steps = steps
        self._number = steps.launched
        self._pinned = pinned
        self._logits = logits
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def wait(self) -> list[int]:
        self._done.synchronize()
        ids: list[int] = self._pinned[: len(self._logits)].tolist()
        return ids

    def logits(self) -> Tensor:
        if self._steps.launched != self._number:
            raise RuntimeError("logits: a later step has overwritten them")
        return self._logits.float()


@dataclass(frozen=True)
class StepLimits:
    """``rows`` of the largest step, ``partials`` and ``pairs`` of the attention lists (see ``Limits``)."""

    rows: int = 256
    pairs: int = 8192
    partials: int = 12288


class Steps:
    """Captured forwards by number of rows."""

    def __init__(
        self,
        forward: FusedForward,
        *,
        limits: StepLimits | None = None,
        tuning: Tuning | None = None,
        graphs: bool = True,
    ) -> None:
        self.forward = forward
        self.limits = limits or StepLimits()
        self._graphs = graphs
        w, pool, rows = forward.weights, forward.pool, self.limits.rows
        shape = AttentionShape(w.heads, w.kv_heads, w.head_dim, w.embedding.dtype, pool.page_size)
        sizes = Limits(rows=rows, pairs=self.limits.pairs, partials=self.limits.partials)
        self._work = CascadeWork(shape, pool.device, sizes, tuning)
        self._buffers = Buffers.of(w, rows)
        self._logits = torch.zeros(rows, w.vocabulary, dtype=w.head.dtype, device=pool.device)
        self._sampled = torch.zeros(rows, dtype=torch.int64, device=pool.device)
        self._inputs = torch.zeros(3 * rows, dtype=torch.int32, device=pool.device)
        self._staged = deque(
            (torch.zeros(3 * rows, dtype=torch.int32, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
            for _ in range(IN_FLIGHT)
        )
        self._read_back = deque(torch.zeros(rows, dtype=torch.int64, pin_memory=True) for _ in range(IN_FLIGHT))
        self._captured: dict[tuple[int, tuple[int, ...]], torch.cuda.CUDAGraph] = {}
        self._memory: Any = None
        # The stream that torch captures on unless told otherwise is of the card that captured first in this process.
        self._capture_stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._plan: CascadePlan | None = None  # of the step that is launched, for ``watch``
        self.watch: CallWatch | None = None  # of a check; steps are not captured then
        self.launched = 0  # steps so far

    @torch.inference_mode()
    def run(self, plan: CascadePlan, sources: Sequence[int]) -> Tensor:
        """Launches a step of ``len(sources)`` rows, as many as the plan has; its logits (rows, vocabulary).

        The logits are a view that the next step overwrites. Raises ``WorkTooLarge`` before anything is launched.
        """
        rows = len(sources)
        classes = self._work.update(plan)
        if self._graphs and (rows, classes) not in self._captured:
            self._capture(rows, classes)
            self._work.update(plan)
        self._stage(sources, plan)
        self._plan = plan
        self.launched += 1
        if self._graphs:
            self._captured[rows, classes].replay()
        else:
            self._launch(rows, classes)
        return self._logits[:rows]

    def pending(self, plan: CascadePlan) -> LaunchedStep:
        """The last step, of which ``plan`` is the part without padding. At most ``IN_FLIGHT`` may be unread."""
        rows, pinned = len(plan.slots), self._read_back[0]
        self._read_back.rotate(-1)
        pinned[:rows].copy_(self._sampled[:rows], non_blocking=True)
        return LaunchedStep(plan, self, pinned, self._logits[:rows])

    def adopt(self, other: Steps) -> None:
        """Takes over what ``other`` sampled last, so that the next step may name its rows."""
        self._sampled.copy_(other._sampled)

    @torch.inference_mode()
    def prepare(self, rows: int, *, piece: bool = False) -> None:
        """Compiles and captures the usual steps of ``rows`` rows: decode steps, or one sequence's if ``piece``."""
        pool = self.forward.pool
        read = ChunkRead(pool.scratch_page * pool.page_size, 1, tuple(range(rows)), (0,) * rows, (0,) * rows)
        alone = ChunkRead(read.first_slot, 1, (0,), (0,), (0,))
        for levels in ((), ((read,),), ((alone,),)):
            classes = self._work.update(self._scratch_plan(rows, levels, piece))
            if self._graphs and (rows, classes) not in self._captured:
                self._capture(rows, classes)

    # -- inside -------------------------------------------------------------------------------------
    def _scratch_plan(self, rows: int, levels: tuple[tuple[ChunkRead, ...], ...], piece: bool) -> CascadePlan:
        """A plan whose rows read and write the scratch page alone."""
        page, size = self.forward.pool.scratch_page, self.forward.pool.page_size
        if not piece:
            return CascadePlan(levels, (), (), (), 2).padded(rows, page, size)
        tail = Tail(0, rows, (page,) * -(-rows // size), 0)
        return CascadePlan(levels, (tail,), (0,) * rows, (page * size,) * rows, 2)

    def _stage(self, sources: Sequence[int], plan: CascadePlan) -> None:
        """Token sources, positions and slots: one copy to the device."""
        pinned, sent = self._staged[0]
        self._staged.rotate(-1)
        sent.synchronize()
        rows, most = len(sources), self.limits.rows
        ints = pinned.numpy()
        ints[:rows] = sources
        ints[most : most + rows] = plan.positions
        ints[2 * most : 2 * most + rows] = plan.slots
        self._inputs.copy_(pinned, non_blocking=True)
        sent.record()

    def _launch(self, rows: int, classes: tuple[int, ...]) -> None:
        forward, work = self.forward, self._work
        most, pool = self.limits.rows, forward.pool
        sources, positions, slots = (self._inputs[i * most : i * most + rows] for i in range(3))
        buffers = replace(self._buffers.first(rows), sources=sources, positions=positions, slots=slots)

        def attend(layer: int, q: Tensor, turned: Tensor, out: Tensor) -> None:
            keys, values, scaling = pool.keys[layer], pool.values[layer], forward.weights.scaling
            work.launch(keys, values, q, out, scaling=scaling, rotation=forward.table, classes=classes)
            if self.watch is not None and self._plan is not None:
                self.watch(self._plan, layer, q, out, scaling)

        logits = self._logits[:rows]
        forward.layers(buffers, self._sampled, attend, turn=False, last_row_only=False, logits=logits)
        torch.argmax(logits, dim=-1, out=self._sampled[:rows])

    def _capture(self, rows: int, classes: tuple[int, ...]) -> None:
        """Runs a step on the scratch page, which compiles what is missing, and captures another one."""
        plan = self._scratch_plan(rows, (), False)
        kept = self._sampled.clone()
        self._work.update(plan)
        self._stage([0] * rows, plan)
        self._launch(rows, classes)
        torch.cuda.synchronize(self.forward.pool.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._memory,
            stream=self._capture_stream,
            capture_error_mode="thread_local",  # loads go on meanwhile
        ):
            self._launch(rows, classes)
        self._memory = graph.pool()
        self._captured[rows, classes] = graph
        self._sampled.copy_(kept)
