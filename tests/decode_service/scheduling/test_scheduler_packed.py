"""The scheduler where rows of all requests share steps: nobody who decodes is left out, prompts go on in order."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from decode_service.scheduling.line import STEPS_A_PIECE
from decode_service.scheduling.sequence import FinishReason, State
from serving.tenancy.quotas import Quotas
from tests.decode_service.scheduling.scheduled import EOS, PIECE, Forwards, request
from tests.decode_service.scheduling.scheduled_ahead import Ahead
from tests.decode_service.scheduling.test_scheduler import Histories


def packed(*, rows: int = 16, long: int = 1 << 30, **options: int) -> Ahead:
    return Ahead(forwards=Forwards(packs=True, rows=rows, long=long), **options)


def test_a_prompt_is_sliced_beside_those_who_decode() -> None:
    on = packed(rows=8, tail_pages=64)
    short, long = request("short", max_tokens=30), request("long", tail=20, max_tokens=3)
    on.submit(short)
    on.step()
    on.submit(long)
    steps = [on.step() for _ in range(4)]
    assert [[(rows.sequence.request_id, rows.count) for rows in plan.packed] for plan in steps] == [
        *([("short", 1), ("long", 7)], [("short", 1), ("long", 7)], [("short", 1), ("long", 6)]),
        [("short", 1), ("long", 1)],
    ]
    assert len(long.generated) == 1, "its second row was planned before its first token was read"
    on.finish()
    on.check_idle()


def test_slices_of_several_prompts_share_a_step_first_come_first_served() -> None:
    on = packed(rows=10)
    on.submit(request("a", tail=6), request("b", tail=9), request("c", tail=2))
    assert [(rows.sequence.request_id, rows.count) for rows in on.step().packed] == [("a", 6), ("b", 4)]
    assert [(rows.sequence.request_id, rows.count) for rows in on.step().packed] == [("a", 1), ("b", 5), ("c", 2)]
    on.finish()


def test_what_stands_behind_a_chunk_that_is_computed_here_comes_a_step_later() -> None:
    on = packed()
    one, joined = request("one", [("doc", 5)], tail=3), request("joined", [("doc", 5)], tail=2)
    on.submit(one, joined)
    on.plan()
    on.load(on.loads[0], [True])
    first, second = on.step(), on.step()
    assert [(rows.sequence.request_id, rows.count, rows.chunk is not None) for rows in first.packed] == [
        ("one", 5, True)
    ]
    assert [(rows.sequence.request_id, rows.count) for rows in second.packed] == [("one", 3), ("joined", 2)]
    on.finish()
    on.check_idle()


def test_a_chunk_that_runs_alone_comes_between_steps_of_the_others() -> None:
    on = packed(long=20, chunk_pages=40, tail_pages=64)
    decoding = request("decoding", max_tokens=30)
    on.submit(decoding)
    on.step()
    long = request("long", [("doc", 3 * PIECE)], bypass=True)
    on.submit(long, request("late", tail=9, max_tokens=2))
    kinds = ""
    while not long.generated:
        plan = on.step()
        kinds += "p" if plan.alone else "s"
        assert plan.alone or decoding in [rows.sequence for rows in plan.packed if rows.decodes]
    assert [len(gap) for gap in kinds.strip("s").split("p")[1:-1]] == [STEPS_A_PIECE] * 2
    assert on.sequences[2].done, "a short prompt does not wait for a long chunk before it"
    on.finish()
    on.check_idle()


def test_steps_are_planned_ahead_until_no_token_is_left_to_draw() -> None:
    on = packed()
    one = request("one", max_tokens=3)
    on.submit(one)
    plans = [on.plan()]
    on.scheduler.ran(plans[0].rows)
    for _ in range(3):
        plans.append(on.plan())
        on.scheduler.ran(plans[-1].rows)
    assert [len(plan.rows) for plan in plans] == [1, 1, 1, 0] and one.state is State.PREFILLING
    on.in_flight = [plan.packed for plan in plans if plan.rows]
    on.finish()
    assert on.reason(one) is FinishReason.LENGTH and len(one.generated) == 3
    on.check_idle()


def test_who_ends_with_a_token_has_one_row_too_many_and_its_slot_goes_to_the_next() -> None:
    on = packed(batch_max=1)
    one, two = request("one", max_tokens=9), request("two", max_tokens=2)
    on.submit(one, two)
    on.step(EOS)
    on.step(EOS)
    assert one.done and len(one.generated) == 1 and len(on.ran) == 2
    plan = on.step()
    assert plan.opened == (two,) and two.slot == one.slot
    on.finish()
    assert two.generated == [7, 7]
    on.check_idle()


@pytest.mark.parametrize("rows", [4, 5])
def test_prompts_go_on_beside_a_full_batch(rows: int) -> None:
    on = packed(rows=rows, batch_max=4, tail_pages=200)
    for name in "abc":
        on.submit(request(name, max_tokens=100))
        on.step()
    on.submit(request("long", tail=30))
    for _ in range(40):
        on.step()
    assert on.sequences[3].generated
    on.finish()
    on.check_idle()


class PackedHistories(Histories):
    """The same histories where steps are packed and read one step later; chunks of more than 30 tokens run alone."""

    def made(self) -> Ahead:
        quotas = Quotas(running=4, waiting=40)
        forwards = Forwards(packs=True, rows=7, long=30)
        return Ahead(chunk_pages=14, tail_pages=20, batch_max=3, aside_pages=12, quotas=quotas, forwards=forwards)


class AheadHistories(Histories):
    """The same histories where all prefill runs alone, read one step later."""

    def made(self) -> Ahead:
        quotas = Quotas(running=4, waiting=40)
        return Ahead(chunk_pages=14, tail_pages=20, batch_max=3, aside_pages=12, quotas=quotas, forwards=Forwards())


SETTINGS = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestPackedHistories = PackedHistories.TestCase
TestPackedHistories.settings = SETTINGS
TestAheadHistories = AheadHistories.TestCase
TestAheadHistories.settings = SETTINGS
