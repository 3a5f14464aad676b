"""Packed steps: rows of any requests in one forward over the cascade kernels, captured once and replayed.

    host     plan n+1 | lists, sources -> pinned -> copies | replay n+1            wait for tokens n | ...
    device            step n ........ draws n | tokens n -> pinned | step n+1 ...

A step has the rows of the next bucket; those that are nobody's work on the scratch page. Behind the last layer's
attention only the rows that draw go on, gathered into as many as there are slots. Drawn tokens stay on the device,
where the next step's sources name the slot. The host waits for nothing but the tokens of a step that it wants to read.
All launches go to the stream that is current. There is a graph for each number of rows and set of the attention
kernel's tile classes, with draws and without; greedy steps that decode are one graph with their drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.attention import Scores
from engine.plan import CascadePlan
from engine.run.cuda.captured import GraphMaker
from engine.run.cuda.cascade.records import Limits, SplitRule, WorkTooLarge
from engine.run.cuda.cascade.tuning import Tuning
from engine.run.cuda.cascade.works import LayerWorks
from engine.run.cuda.drawing import Drawing
from engine.run.cuda.inputs import Ints, LineShape
from engine.run.cuda.launched import LaunchedStep
from engine.run.cuda.packed import Forward, RowInputs, RowOutputs
from engine.run.cuda.sampling.launch import Kind
from engine.run.cuda.sampling.slots import DeviceSlots, PendingDraws
from engine.run.cuda.usual import prefilling_plans, scratch_plan, with_reads
from engine.run.planning import padded_to
from engine.sampling.params import Draw, Scored
from engine.sampling.scoring import PendingScores, begin_scoring
from engine.sampling.shaping import Bits

# plan, layer, queries (rows, heads, dim), attention (rows, heads, dim), scores, whether queries are turned already
CallWatch = Callable[[CascadePlan, int, Tensor, Tensor, Scores, bool], None]
Classes = tuple[int, ...]
SILENT_ROWS = 128  # from here on a step that draws nothing is worth a graph that ends without a head


@dataclass(frozen=True)
class StepLimits:
    """``partials`` that the attention lists of a step begin with, and ``pairs`` of (chunk, row); see ``Limits``."""

    pairs: int
    partials: int

    @classmethod
    def of_rows(cls, rows: int) -> StepLimits:
        """For steps of so many rows, each of which reads a dozen chunks, or some long ones."""
        return cls(pairs=max(8192, 16 * rows), partials=max(12288, 24 * rows))

    def twice(self) -> StepLimits:
        return StepLimits(2 * self.pairs, 2 * self.partials)


class Steps:
    """Forwards by number of rows: ``buckets``, ascending. A step draws in each of the slots at most."""

    def __init__(
        self,
        forward: Forward[Any, Any],
        sampling: DeviceSlots,
        *,
        buckets: tuple[int, ...],
        draws: int,
        limits: StepLimits | None = None,
        tuning: Tuning | None = None,
        graphs: bool = True,
    ) -> None:
        self.forward = forward
        self.buckets, self.rows = buckets, buckets[-1]
        self.limits = limits or StepLimits.of_rows(self.rows)
        self._tuning = tuning
        self._sampling = sampling
        device = forward.pool.device
        self._shape = LineShape(self.rows, draws, sampling.scratch)
        self._line = self._shape.idle()
        self._inputs: RowInputs = forward.inputs(self.rows)
        self._drawn: RowOutputs = forward.outputs(torch.zeros(draws, dtype=torch.int32, device=device))
        self._work = self._make_work()
        self._graphs = GraphMaker(device) if graphs else None
        self._drawing = Drawing(sampling, self._drawn.logits, self._graphs, partial(self._idle, 1))
        self._captured: dict[tuple[int, int, Classes], torch.cuda.CUDAGraph] = {}
        self._greedy: dict[tuple[int, int, Classes], torch.cuda.CUDAGraph] = {}  # steps together with their drawing
        self._plan: CascadePlan | None = None  # of the step that is launched, for ``watch``
        self.watch: CallWatch | None = None  # of a check; steps are not captured then
        self.launched = 0  # steps so far

    @property
    def splits(self) -> SplitRule:
        """Where chunks and tails are split, each into partial results of its own."""
        return self._work.tuning.splits

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return len(self._captured) + len(self._greedy) + len(self._drawing)

    def launch(
        self,
        plan: CascadePlan,
        sources: Sequence[int],
        drawn: Sequence[int],
        draws: Sequence[Draw],
        scored: Sequence[tuple[int, Scored]] = (),
    ) -> LaunchedStep:
        """Launches a step of ``len(sources)`` rows, of which rows ``drawn`` draw as ``draws`` say, in order.

        Where one of them is of a masked slot, the step waits for ``LaunchedStep.draw`` with drawing. ``scored``: rows
        that begin at one of the step each. They go where rows could draw and none does, so that the step is one that is
        captured anyway.

        Raises ``ValueError`` before anything is launched for more rows than a step has, or slots nobody opened.
        """
        padded = padded_to(
            plan, self.buckets, self.forward.pool, rows_min=len(drawn) + sum(len(each.rows) for _, each in scored)
        )
        rows = len(padded.slots)
        count = self._draws_of(rows) if draws or scored else 0
        wanted = [*drawn, *(first + row for first, each in scored for row in each.rows)]
        kind = self._write(padded, sources, wanted, draws)
        classes = self._updated(padded, self._line)
        if self._graphs is not None and not (kind == Kind() and (rows, count, classes) in self._greedy):
            before = self.graphs
            if draws:
                kind = self._drawing.captured(kind, count)
            count, classes = self._captured_step(rows, count, classes)
            if self.graphs != before:  # which left its own lists and inputs
                self._work.update(padded, self._line)
        self._plan = padded
        self.launched += 1
        device, logits = self.forward.pool.device, self._logits_of(len(draws))
        if kind == Kind() and (rows, count, classes) in self._greedy:
            self._greedy[rows, count, classes].replay()
            pending = self._sampling.pending(len(draws)) if draws else None
            scores = self._scores([each for _, each in scored], len(draws))
            return LaunchedStep(plan, device, pending, logits, scores=scores)
        if self._graphs is not None:
            self._captured[rows, count, classes].replay()
        else:
            self._forward(rows, count, classes)
        made = partial(LaunchedStep, plan, device, scores=self._scores([each for _, each in scored], len(draws)))
        if not draws:
            return made(None, logits)
        then = partial(self._draw, kind, count, len(draws))
        masked = [draw.slot for draw in draws if self._sampling.masked(draw.slot)]
        if masked:
            return made(None, logits, held=partial(self._draw_masked, masked, then))
        return made(then(), logits)

    def _draw(self, kind: Kind, count: int, draws: int) -> PendingDraws:
        """Draws from the first ``count`` rows of the last step, of which the first ``draws`` are somebody's."""
        if self._graphs is not None:
            self._drawing.replay(kind, count)
        else:
            self._sampling.launch(self._drawn.logits[:count], kind)
        return self._sampling.pending(draws)

    def _draw_masked(self, masked: Sequence[int], draw: Callable[[], PendingDraws], bitmasks: Bits) -> PendingDraws:
        self._sampling.allow(masked, bitmasks)
        return draw()

    def first_launches(self) -> list[Callable[[], None]]:
        """What compiles the kernels of all steps, in any order: attention, a step, drawing."""
        classes = self._idle(1)
        each = [partial(self._attend_first, number) for number in self._work.every_class]
        return [*each, partial(self._forward, 1, 1, classes), *self._drawing.first_launches()]

    def prepare(self) -> None:
        """Captures every bucket, for the tile classes and the kinds of drawing that serving meets."""
        if self._graphs is None:
            return
        for rows in self.buckets:
            draws = self._draws_of(rows)
            decoding, prefilling = self._usual_classes(rows)
            usual = [(draws, classes) for classes in prefilling]
            if rows >= SILENT_ROWS:
                usual += [(0, classes) for classes in prefilling]
            if draws == rows:  # more rows than there are slots are not all of sequences that decode
                usual += [(draws, classes) for classes in decoding]
                for classes in decoding:
                    self._capture_greedy(rows, draws, classes)
            for count, classes in usual:
                if (rows, count, classes) not in self._captured:
                    self._capture(rows, count, classes)
            self._drawing.prepare(draws)

    # -- inside -------------------------------------------------------------------------------------
    def _attend_first(self, number: int) -> None:
        """Attention of one class over whatever lists there are."""
        pool, layer = self.forward.pool, self._work.layer_of(number)
        keys, values = pool.keys[layer], pool.values[layer]
        q, out = (
            torch.zeros(1, self.forward.heads, x.shape[2], dtype=x.dtype, device=x.device) for x in (keys, values)
        )
        self._work.launch(layer, q, out, **self.forward.call(layer).options, classes=(number,))

    def _draws_of(self, rows: int) -> int:
        """Behind how many rows a step of ``rows`` rows can draw."""
        return min(rows, self._drawn.rows.shape[0])

    def _write(self, plan: CascadePlan, sources: Sequence[int], drawn: Sequence[int], draws: Sequence[Draw]) -> Kind:
        """The line of a step; what its draws ask for together."""
        rows, real = len(plan.slots), len(sources)
        staged, rows_drawn, ids, positions, slots = self._shape.parts(self._line)
        kind = self._sampling.write(draws, staged)
        staged[len(draws) :] = (self._shape.scratch, 0, 0)
        rows_drawn[: len(drawn)], rows_drawn[len(drawn) :] = drawn, 0
        ids[:real], ids[real:rows] = sources, 0
        positions[:rows], slots[:rows] = plan.positions, plan.slots
        return kind

    def _idle(self, rows: int) -> Classes:
        """Brings a step to the device that is nobody's; its tile classes."""
        plan, line = self._scratch_plan(rows), self._shape.idle()
        self._shape.parts(line)[4][:] = self.forward.pool.scratch_page * self.forward.pool.page_size
        return self._updated(plan, line)

    def _updated(self, plan: CascadePlan, line: Ints | None = None) -> Classes:
        """Brings the plan's lists and the line to the device, larger lists if these do not hold it; tile classes."""
        while True:
            try:
                return self._work.update(plan, line)
            except WorkTooLarge:
                self._grow()

    def _grow(self) -> None:
        """Lists of twice the size; graphs are captured anew as they come. Drawn tokens stay where they are."""
        if self._graphs is not None:
            torch.cuda.synchronize(self.forward.pool.device)
        self.limits = self.limits.twice()
        self._captured.clear()
        self._greedy.clear()
        self._drawing.forget()
        if self._graphs is not None:
            self._graphs.forget()
        self._work = self._make_work()

    def _make_work(self) -> LayerWorks:
        forward, pool, size = self.forward, self.forward.pool, self.limits
        # A tail's pages are its own, so all tails together have no more than the pool; padding has one page a row.
        limits = Limits(
            rows=self.rows, pairs=size.pairs, items=max(8192, size.partials), pages=pool.pages + self.rows,
            partials=size.partials, line=self._shape.ints,
        )  # fmt: skip
        work = LayerWorks(pool, forward.windows, heads=forward.heads, limits=limits, tuning=self._tuning)
        draws, drawn, sources, positions, slots = self._shape.parts(work.line)
        self._sampling.draws_in(draws)
        self._drawn = replace(self._drawn, rows=drawn)
        self._inputs = replace(self._inputs, sources=sources, positions=positions, slots=slots)
        return work

    def _captured_step(self, rows: int, count: int, classes: Classes) -> tuple[int, Classes]:
        """Draws and classes of the captured step that does a step's work, with the least besides.

        A class without items costs a launch, rows that nobody wants the logits of cost the head.
        """
        if (rows, count, classes) not in self._captured:
            able = [
                (n, found)
                for size, n, found in self._captured
                if size == rows and n in (count, self._draws_of(rows)) and set(classes) <= set(found)
            ]
            if able:
                return min(able, key=lambda kept: (kept[0], len(kept[1])))
            self._capture(rows, count, classes)
        return count, classes

    def _usual_classes(self, rows: int) -> tuple[set[Classes], set[Classes]]:
        """The sets of tile classes of steps that decode, and of those with several rows of a sequence."""
        pool = self.forward.pool

        def classes(plan: CascadePlan) -> set[Classes]:
            return {self._updated(member) for member in with_reads(plan, pool.scratch_page * pool.page_size)}

        plans = prefilling_plans(rows, pool.scratch_page, pool.page_size)
        found = {kind for plan in plans for kind in classes(plan)}
        # Beside a sequence's several rows there are nearly always some that make a class of their own.
        prefilling = {kind for kind in found if not any(set(kind) < set(other) for other in found)}
        return classes(self._scratch_plan(rows)), prefilling

    def _scratch_plan(self, rows: int) -> CascadePlan:
        return scratch_plan(rows, self.forward.pool.scratch_page, self.forward.pool.page_size)

    def _forward(self, rows: int, count: int, classes: Classes) -> None:
        forward, work = self.forward, self._work

        def attend(layer: int, q: Tensor, turned: Tensor, out: Tensor) -> None:
            call = forward.call(layer)
            work.launch(layer, q, out, **call.options, classes=classes)
            if self.watch is not None and self._plan is not None:
                self.watch(self._plan, layer, q, out, call.scores, call.turned)

        drawn = [self._drawn.first(count)] if count else []
        forward.layers(self._inputs.first(rows), self._sampling.last, attend, turn=False, drawn=drawn)

    def _capture(self, rows: int, count: int, classes: Classes) -> None:
        """On the scratch page."""
        assert self._graphs is not None
        self._idle(rows)
        self._captured[rows, count, classes] = self._graphs.capture(lambda: self._forward(rows, count, classes))

    def _capture_greedy(self, rows: int, count: int, classes: Classes) -> None:
        assert self._graphs is not None
        self._idle(rows)

        def launch() -> None:
            self._forward(rows, count, classes)
            self._sampling.launch(self._drawn.logits[:count], Kind())

        self._greedy[rows, count, classes] = self._graphs.capture(launch)

    def _scores(self, scored: Sequence[Scored], at: int) -> list[PendingScores]:
        """Of rows whose logits stand behind the first ``at``, before the next step overwrites them."""
        scores = []
        for each in scored:
            ((rows, wanted),) = each.blocks(len(self._drawn.rows))
            scores.append(begin_scoring(self._drawn.logits[at : at + len(rows)], wanted, each.top))
            at += len(rows)
        return scores

    def _logits_of(self, draws: int) -> Callable[[], Tensor]:
        number = self.launched

        def logits() -> Tensor:
            if self.launched != number:
                raise RuntimeError("logits: a later step has overwritten them")
            return self._drawn.logits[:draws].to(torch.float32, copy=True)

        return logits
