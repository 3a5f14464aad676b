"""What is launched and read, on a fake runner: in which order, and who fails of what."""

from __future__ import annotations

import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from decode_service.device.launches import Launches
from decode_service.metrics import DecodeMetrics
from decode_service.scheduling.scheduler import Scheduler
from decode_service.scheduling.sequence import Deliveries, Failed, Finished, FinishReason, Sequence, State, hand_out
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.kv.tails_aside import TailsAside
from engine.sampling.params import Choice
from engine.sight import EVERYTHING
from serving.errors import InternalFault
from serving.tenancy.places import TenantPlaces
from serving.tenancy.quotas import TenantQuotas
from tests.decode_service.device.running import running
from tests.decode_service.scheduling.scheduled import request
from tests.fakes import LAYOUT, FakeRunner


class Launching:
    """Launches of what a scheduler plans, without a thread. ``delivered``: tokens of all, at each delivery."""

    def __init__(self, *, runs_ahead: bool) -> None:
        pool = PagedKVPool(LAYOUT, pages=32, chunk_pages=16, page_size=4)
        self.runner = FakeRunner(pool, piece_tokens=8, runs_ahead=runs_ahead)
        runner: Any = self.runner
        residents = ResidentChunks(pool)
        self.places = TenantPlaces(9, TenantQuotas())
        self.scheduler = Scheduler(residents, self.places, runner, eos_token_ids=frozenset({50}), batch_max=4)
        metrics = DecodeMetrics(CollectorRegistry(), model_name="tiny", token_nbytes=1)
        self.launches = Launches(
            *(runner, residents, TailsAside(pool, 0), self.scheduler, metrics, EVERYTHING), self._deliver
        )
        self.sequences: list[Sequence] = []
        self.delivered: list[int] = []

    def submit(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.places.take(sequence.tenant)
            self.scheduler.submit(sequence, time.monotonic_ns())
            self.sequences.append(sequence)

    def step(self, *ended: Sequence) -> None:
        """Launches what is planned; who has ``ended`` does so before it is launched."""
        plan = self.scheduler.plan(time.monotonic_ns())
        for sequence in plan.opened:
            self.launches.open(sequence)
        for sequence in ended:
            self.scheduler.finish(sequence, FinishReason.ABORT, time.monotonic_ns())
        if plan.rows:
            self.launches.run(plan.packed or plan.alone[:1])
        else:
            self.launches.read_all()

    def _deliver(self) -> None:
        self.delivered.append(sum(len(sequence.generated) for sequence in self.sequences))


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_step_is_read_at_once_or_behind_the_next_ones_beginning(runs_ahead: bool) -> None:
    on = Launching(runs_ahead=runs_ahead)
    on.submit(request("one", max_tokens=3))
    seen = []
    for _ in range(4):
        on.step()
        seen.append((on.launches.unread, len(on.delivered), len(on.sequences[0].generated)))
    assert seen[:3] == ([(1, 0, 0), (1, 1, 1), (1, 2, 2)] if runs_ahead else [(0, n, n) for n in (1, 2, 3)])
    assert seen[3] == (0, 3, 3) and on.sequences[0].done, "where there is nothing to begin all is read"
    assert on.delivered == [1, 2, 3], "each step's tokens behind its own reading"


def test_a_token_that_is_none_fails_its_request_and_nobody_else() -> None:
    on = Launching(runs_ahead=True)
    broken, other = request("broken", max_tokens=12), request("other", max_tokens=12)
    on.submit(broken, other)
    begin: Any = on.runner.begin

    def nan(batch: Any) -> Any:
        step = begin(batch)
        step.choices = [Choice(-1, None) if n == 0 and len(batch) == 2 else c for n, c in enumerate(step.choices)]
        return step

    runner: Any = on.runner
    runner.begin = nan
    for _ in range(40):
        on.step()
    events = [event for sequence, event in on.scheduler.take_events() if sequence is broken]
    assert isinstance(events[-1], Failed) and "ArithmeticError" in str(events[-1].error)
    assert other.done and len(other.generated) == 12


def test_rows_of_who_has_ended_are_not_begun() -> None:
    on = Launching(runs_ahead=False)
    one = request("one")
    on.submit(one)
    on.step(one)
    assert not on.runner.batches and one.state is State.ENDED and not on.launches.unread


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_first_token_waits_for_no_piece_but_the_one_that_was_begun(runs_ahead: bool) -> None:
    with running(runs_ahead=runs_ahead, start=False) as it:
        delivered: list[str] = []

        def deliver(deliveries: Deliveries) -> None:
            delivered.extend(sequence.request_id for sequence in deliveries)
            hand_out(deliveries)

        for name in "abcd":
            it.submit(name, tail=2, max_tokens=1)
        told: list[int] = []
        it.runner.before = lambda: told.append(len(delivered))
        it.worker.start(deliver)
        for name in "abcd":
            it.answer(name)
        assert delivered == list("abcd") and told == ([0, 0, 1, 2] if runs_ahead else [0, 1, 2, 3])


def test_a_forward_that_fails_ends_those_in_it_and_nobody_else() -> None:
    with running(start=False) as it:
        it.submit("broken", tail=3)
        it.submit("other", tail=3, max_tokens=2)
        fails = iter([True])

        def before() -> None:
            if next(fails, False):
                raise RuntimeError("out of memory")

        it.runner.before = before
        it.worker.start()
        tokens, end = it.answer("broken")
        assert not tokens and isinstance(end, Failed) and isinstance(end.error, InternalFault)
        assert it.answer("other") == ([7, 8], Finished(FinishReason.LENGTH))
