"""Until when requests want to be begun: the scheduler's side, without a clock."""

from __future__ import annotations

from decode_service.api.answers import answers_to
from decode_service.scheduling.sequence import Failed, FinishReason
from decode_service.scheduling.starts import Starts
from serving.errors import DeadlineExceeded
from tests.decode_service.scheduling.scheduled import Scheduled, request


def test_who_is_late_is_told_in_the_order_in_which_they_came() -> None:
    starts, there = Starts(), [request(f"{n}", start_by=by) for n, by in enumerate((30, 10, 0, 20))]
    for at, sequence in enumerate(there):
        sequence.clock.submitted = at
        starts.add(sequence)
    assert starts.late(9) == []
    assert starts.late(20) == [there[1], there[3]]
    starts.forget(there[1])
    starts.started(there[3])
    assert starts.late(29) == [] and starts.late(10**9) == [there[0]]


def test_a_request_whose_turn_does_not_come_fails_wherever_it_waits() -> None:
    on = Scheduled(batch_max=1)
    holds = request("holds", max_tokens=60, start_by=3)
    on.submit(holds)
    on.step()
    waits, loads = request("waits", start_by=20), request("loads", [("doc", 8)], start_by=20)
    on.submit(loads)
    on.scheduler.plan(5)
    on.submit(waits)
    on.step()
    while not waits.done:
        on.step()
        on.check()
    told = [on.events[one][-1] for one in (waits, loads)]
    assert all(isinstance(end, Failed) and isinstance(end.error, DeadlineExceeded) for end in told)
    on.finish()
    assert on.reason(holds) is FinishReason.LENGTH, "what was begun goes on"
    on.check_idle()


def test_who_gave_its_pages_up_was_begun() -> None:
    on = Scheduled(tail_pages=6, batch_max=2)
    two = [request(f"{n}", tail=4, max_tokens=16, start_by=8) for n in range(2)]
    on.submit(*two)
    on.finish()
    assert sum(one.preemptions for one in two) > 0
    assert [on.reason(one) for one in two] == [FinishReason.LENGTH] * 2


def test_all_answers_to_a_prompt_begin_with_the_first() -> None:
    on = Scheduled(batch_max=1)
    answers = answers_to(request("one", max_tokens=20, start_by=9), 2, lambda events, index: None)
    on.submit(*answers)
    on.finish()
    assert [on.reason(one) for one in answers] == [FinishReason.LENGTH] * 2
    on.check_idle()
