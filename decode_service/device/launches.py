"""What is launched on the device, and the tokens that are read of it.

Where the device runs by itself, step n + 1 is begun before the tokens of step n are read, whoever joins or leaves and
however tokens are drawn; elsewhere a step is read at once.

    host     begin 1 | begin 2, read 1, deliver 1 | begin 3, read 2, deliver 2 | ...
    device   ....... step 1 ............ step 2 ............ step 3

A sequence that ends with token n (a stop token, an abort) is in step n + 1 already: what that step gives it is dropped.
Its pages and its slot may have a new owner by then; the owner's writes come later on the same stream.

A step of answers that follow a grammar begins its forward alike; it draws once the step before it was read and masks
say which tokens may come (``masks.py``), which takes less than the forward.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial

from decode_service.device.begun import Begun, begin, sequences_of
from decode_service.device.masks import Masks, StepMasks
from decode_service.metrics import DecodeMetrics
from decode_service.scheduling import request_log
from decode_service.scheduling.answer_end import grammar_failed
from decode_service.scheduling.scheduler import Scheduler
from decode_service.scheduling.sequence import Sequence
from decode_service.scheduling.step_plan import Rows
from decode_service.scheduling.tails import TailMove
from engine.kv.resident import ResidentChunks
from engine.kv.tails_aside import TailsAside
from engine.run.protocol import Runner
from engine.sampling.params import Choice
from engine.sight import Sight
from serving.errors import InternalFault
from serving.trace.request_id import NO_REQUEST, bearing

log = logging.getLogger(__name__)


class Launches:
    """Runs rows of a plan and tells the scheduler what came of them. It belongs to the device thread.

    An unexpected error of a launch ends the requests involved, not the service. ``deliver`` is called behind each step
    that was read.
    """

    def __init__(
        self,
        runner: Runner,
        residents: ResidentChunks,
        aside: TailsAside,
        scheduler: Scheduler,
        metrics: DecodeMetrics,
        sight: Sight,
        deliver: Callable[[], None],
    ) -> None:
        self._runner = runner
        self._residents = residents
        self._aside = aside
        self._scheduler = scheduler
        self._metrics = metrics
        self._sight = sight
        self._deliver = deliver
        self._in_flight: deque[Begun] = deque()
        self._unread_max = 1 if runner.runs_ahead else 0
        self._masks = Masks(runner)

    @property
    def unread(self) -> int:
        """Steps that were begun and not read."""
        return len(self._in_flight)

    def stop(self) -> None:
        """Nothing is launched any more."""
        self._masks.stop()

    def move(self, move: TailMove) -> None:
        """Behind all that was launched, before anything is launched for whoever has the pages now."""
        way = partial(self._aside.bring_back, move.run, move.pages)
        if not move.back:
            way = partial(self._aside.put, move.pages, move.run)
        self._guarded(way, [move.sequence])

    def open(self, sequence: Sequence) -> None:
        """A request has a slot, in which its tokens are drawn."""
        self._guarded(partial(self._runner.open, sequence.slot, sequence.sampling_now), [sequence])

    def run(self, planned: Items[Rows]) -> None:
        """Begins a step, then reads what was begun before it."""
        rows = [each for each in planned if not each.sequence.done]  # a piece before this one may have failed
        if rows:
            self._guarded(partial(self._begin, rows), sequences_of(rows))
        self._read(unread_max=self._unread_max)

    def read_all(self) -> None:
        """There is nothing to begin: reads all that was begun."""
        self._read(unread_max=0)

    def _guarded(self, step: Callable[[], None], involved: Items[Sequence]) -> None:
        try:
            step()
        except Exception as error:  # anything a forward can raise: out of memory, a kernel's failure
            with bearing(involved[0].request_id if len(involved) == 1 else NO_REQUEST):
                log.exception("a step failed; %d requests end with it", len(involved))
            fault = InternalFault(f"a forward failed ({type(error).__name__})", remedy="see the log")
            for sequence in involved:
                self._scheduler.fail(sequence, fault, time.monotonic_ns())

    def _begin(self, rows: Items[Rows]) -> None:
        told = [sequence for each in rows for sequence in each.masked]
        if not self._runner.runs_ahead:  # all that was drawn is read
            self._jump(rows)
        masks = self._masks.of(told) if told else None
        begun = begin(self._runner, rows, self._residents, self._sight)
        self._in_flight.append(begun)
        self._scheduler.ran(rows, begun.step.plan)
        if masks is not None:
            self._tell(begun, masks)

    def _tell(self, begun: Begun, masks: StepMasks) -> None:
        """Lets a step draw whose forward runs: which tokens may come follows from the step before it."""
        self._read(unread_max=1, deliver=False)
        self._jump(begun.rows)
        try:
            for sequence, error in masks.fill():
                self._scheduler.fail(sequence, grammar_failed(error), time.monotonic_ns())
            begun.step.draw(masks.bits)
        except BaseException:
            self._in_flight.remove(begun)  # there will be nothing to read
            raise

    def _jump(self, rows: Items[Rows]) -> None:
        """Tokens that are forced are known, and have rows: their answers have them."""
        for each in rows:
            for token_id in each.forced:
                if not each.sequence.done:
                    self._scheduler.token(each.sequence, Choice(token_id, None), time.monotonic_ns())
                    self._metrics.forced()

    def _read(self, *, unread_max: int, deliver: bool = True) -> None:
        """Takes the tokens of all steps but the last ``unread_max``, and hands them out unless that can wait."""
        while len(self._in_flight) > unread_max:
            begun = self._in_flight.popleft()
            self._guarded(partial(self._take, begun), begun.sequences)
            if deliver:
                self._deliver()

    def _take(self, begun: Begun) -> None:
        """One token for everybody who decodes in a step, or whose prompt ended there."""
        tokens = begun.wait()
        begun.note_scores()
        if begun.decodes:
            decoding = [rows.sequence for rows, choice in tokens if rows.decodes and choice.token_id >= 0]
            self._metrics.stepped(begun.step.plan.seen_through(self._sight.widest), begun.tokens_flat, decoding)
        for rows, choice in tokens:
            self._token(rows, choice)

    def _token(self, rows: Rows, choice: Choice) -> None:
        sequence = rows.sequence
        if choice.token_id < 0:
            with bearing(sequence.request_id):
                log.error("the model gave NaN, or -inf for every token")
            fault = InternalFault("a forward failed (ArithmeticError)", remedy="see the log")
            self._scheduler.fail(sequence, fault, time.monotonic_ns())
            return
        self._scheduler.token(sequence, choice, time.monotonic_ns())
        if rows.last_of_prompt:
            self._metrics.prefilled(sequence)
            request_log.first_token(sequence)
