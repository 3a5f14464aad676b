"""The scheduler on a fake runner: no model, no service, no tensors, no time."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_service.api.answers import answers_to
from decode_service.scheduling.line import STEPS_A_PIECE
from serving.tenancy.places import PlacesFull
from serving.tenancy.quotas import Quotas
from tests.decode_service.scheduling.scheduled import EOS, PIECE, Scheduled, request


def test_it_imports_no_tensors_and_no_rpcs() -> None:
    heavy = ["torch", "transformers", "grpc", "prometheus_client"]
    script = f"import sys, decode_service.scheduling.scheduler; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_plan_is_frozen() -> None:
    on = Scheduled()
    on.submit(request("a"))
    plan = on.plan()
    with pytest.raises(FrozenInstanceError):
        plan.rows = ()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.rows[0].count = 2  # type: ignore[misc]


def test_first_come_first_served() -> None:
    on = Scheduled(batch_max=2)
    sequences = [request(f"{n}", max_tokens=1) for n in range(6)]
    on.submit(*sequences)
    on.finish()
    assert [rows.sequence for rows in on.ran if rows.last_of_prompt] == sequences
    admitted = [sequence.clock.admitted for sequence in sequences]
    assert admitted == sorted(admitted)
    on.check_idle()


def test_the_times_are_those_of_the_events() -> None:
    on = Scheduled()
    one = request("one", [("doc", 4)], max_tokens=2)
    on.submit(one)
    on.plan()
    on.load(on.loads[0])
    on.finish()
    clock = one.clock
    assert 0 < clock.submitted < clock.admitted < clock.filled < clock.first_token < clock.finished
    assert clock.measured_ns == {"lookup": 1, "prefill": 2, "load": 3}


def test_pieces_of_several_requests_share_one_budget_of_rows() -> None:
    on = Scheduled()
    on.submit(request("a", tail=6), request("b", tail=6), request("c", tail=6))
    assert [(rows.sequence.request_id, rows.count) for rows in on.step().alone] == [("a", 6), ("b", 6)]
    on.finish()


def test_decode_steps_come_between_pieces() -> None:
    on = Scheduled(tail_pages=64)
    on.submit(request("short", max_tokens=40))
    on.step()
    on.submit(request("long", tail=5 * PIECE))
    kinds = ""
    while "long" not in [rows.sequence.request_id for rows in on.ran if rows.last_of_prompt]:
        kinds += "p" if on.step().alone else "d"
    gaps = kinds.strip("d").split("p")[1:-1]
    assert gaps == ["d" * STEPS_A_PIECE] * 4
    on.finish()


def test_a_last_token_that_is_on_its_way_asks_for_no_row() -> None:
    on = Scheduled()
    one, two = request("one", max_tokens=2), request("two", max_tokens=3)
    on.submit(one, two)
    on.step()
    first = on.plan()
    on.scheduler.ran(first.rows)  # launched, its tokens not there yet
    second = on.plan()
    assert [rows.sequence for rows in first.packed] == [one, two]
    assert [rows.sequence for rows in second.packed] == [two]
    assert not one.done
    on.run(on.plan())
    for rows in (*first.rows, *second.rows):
        on.scheduler.token(rows.sequence, on.events[one][0].choices[0], 99)  # type: ignore[union-attr]
    assert one.done and two.done
    on.check_idle()


def test_a_tenant_with_many_chunks_to_compute_does_not_hold_up_another() -> None:
    on = Scheduled(chunk_pages=400, batch_max=8)
    many = [request(f"m{n}", [(f"m{n}", 2 * PIECE)], tail=0, tenant="many") for n in range(6)]
    on.submit(*many)
    on.plan()
    few = request("few", [("f", 2 * PIECE)], tail=0, tenant="few")
    on.submit(few)
    on.plan()
    while on.loads:
        on.load(on.loads[0], ["claim"])
    while not few.done:
        on.step()
    assert sum(sequence.done for sequence in many) <= 2
    on.finish()
    on.check_idle()


def test_chunks_are_computed_however_many_prompts_come() -> None:
    on = Scheduled(tail_pages=200, batch_max=4)
    cold = request("cold", [("doc", 3 * PIECE)], tail=0)
    on.submit(cold)
    on.plan()
    on.load(on.loads[0], ["claim"])
    for n in range(40):
        on.submit(request(f"{n}", tail=PIECE, max_tokens=1), request(f"{n}b", tail=PIECE, max_tokens=1))
        on.step()
        if cold.done:
            break
    assert cold.done
    on.finish()


HOWS = st.sampled_from([False, True, "claim"])
CHUNKS = [("a", 3), ("b", 8), ("c", 20), ("d", 40), ("e", 8), ("f", 16)]


class Histories(RuleBasedStateMachine):
    """Requests come, load, run, fail and are aborted in any order, in a pool that holds about half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.on = self.made()

    def made(self) -> Scheduled:
        return Scheduled(
            chunk_pages=14, tail_pages=20, batch_max=3, aside_pages=12, quotas=Quotas(running=4, waiting=40)
        )

    @rule(
        chunks=st.lists(st.sampled_from(CHUNKS), max_size=3),
        tail=st.sampled_from([1, 5, 40]),
        max_tokens=st.integers(1, 20),
        tenant=st.sampled_from(["x", "y", "z"]),
        bypass=st.sampled_from([False, False, False, True]),
        exact=st.booleans(),
        answers=st.sampled_from([1, 1, 3]),
        priority=st.sampled_from([0, 0, 3, 9]),
    )
    def submit(self, chunks: list[tuple[str, int]], tail: int, max_tokens: int, tenant: str, **how: Any) -> None:
        self._submit(chunks, tail, max_tokens=max_tokens, tenant=tenant, **how)

    @rule(
        chunks=st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=3),
        tenant=st.sampled_from(["x", "y", "z"]),
        exact=st.booleans(),
    )
    def submit_for_chunks(self, chunks: list[tuple[str, int]], tenant: str, exact: bool) -> None:
        self._submit(chunks, 0, tenant=tenant, exact=exact)

    def _submit(
        self, chunks: list[tuple[str, int]], tail: int, *, bypass: bool = False, answers: int = 1, **options: Any
    ) -> None:
        one = request(f"{len(self.on.sequences)}", chunks, tail=tail, bypass=bypass, **options)
        if self.on.scheduler._admission._pages(one.composition.chunks, bypass=bypass) <= 14:
            for each in answers_to(one, answers, lambda events, answer: None):
                with suppress(PlacesFull):  # the tenant has as many as it may
                    self.on.submit(each)

    @rule(token=st.sampled_from([7, 7, 7, EOS]))
    def step(self, token: int) -> None:
        self.on.step(token)

    @rule()
    def plan_that_breaks(self) -> None:
        """Whatever was planned raises: its requests fail."""
        plan = self.on.plan()
        for rows in plan.rows:
            self.on.fail(rows.sequence)

    @precondition(lambda self: self.on.loads)
    @rule(data=st.data(), left=st.lists(HOWS, min_size=3, max_size=3))
    def load(self, data: st.DataObject, left: list[bool | str]) -> None:
        self.on.load(data.draw(st.sampled_from(self.on.loads)), left)

    @precondition(lambda self: any(self.on.awaited(fill) for fill in self.on.loads))
    @rule(data=st.data(), how=HOWS)
    def chunk_comes(self, data: st.DataObject, how: bool | str) -> None:
        fill = data.draw(st.sampled_from([fill for fill in self.on.loads if self.on.awaited(fill)]))
        self.on.came(fill, data.draw(st.sampled_from(self.on.awaited(fill))), how)

    @precondition(lambda self: self.on.loads)
    @rule(data=st.data())
    def load_fails(self, data: st.DataObject) -> None:
        self.on.load_failed(data.draw(st.sampled_from(self.on.loads)))

    @precondition(lambda self: self.on.loads)
    @rule(data=st.data())
    def load_asks(self, data: st.DataObject) -> None:
        self.on.ask(data.draw(st.sampled_from(self.on.loads)))

    @precondition(lambda self: self.on.scheduler.everyone)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.on.abort(data.draw(st.sampled_from(self.on.scheduler.everyone)))

    @invariant()
    def adds_up(self) -> None:
        self.on.check()

    def teardown(self) -> None:
        """Nobody is ever stuck: once loads end well, all requests end and all pages come back."""
        self.on.finish()
        self.on.check_idle()


Histories.TestCase.settings = settings(
    max_examples=500,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestHistories = Histories.TestCase
