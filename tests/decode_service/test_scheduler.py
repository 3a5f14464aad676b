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
from decode_service.line import PASSES_MAX, STEPS_A_PIECE
from decode_service.sequence import AllReady, ChunkReady, Failed, FinishReason, Sequence, State
from engine.kv.source import KVSource
from serving.errors import Unavailable
from serving.tenancy.places import PlacesFull
from serving.tenancy.quotas import Quotas
from tests.decode_service.scheduled import EOS, PAGE, PIECE, Scheduled, request

STATES = ["waiting", "loading", "prefilling", "decoding"]


def resident(on: Scheduled, name: str, tokens: int) -> None:
    """Puts a chunk into the pool."""
    chunk = on.residents.reserve(request("r", [(name, tokens)]).composition.chunks[0].key, tokens)
    chunk.ready = True
    on.residents.release(chunk)


def bring(on: Scheduled, state: str) -> Sequence:
    """A request that has come as far as ``state``, with a chunk that another request joins."""
    one = request("one", [("doc", 8), ("here", 4)], tail=3 * PIECE, max_tokens=9)
    resident(on, "here", 4)
    on.submit(one)
    if state == "waiting":
        return one
    on.plan()
    if state != "loading":
        on.load(on.loads[0])
        on.step()
    while state == "decoding" and one.state is not State.DECODING:
        on.step()
    return one


def test_it_imports_no_tensors_and_no_rpcs() -> None:
    heavy = ["torch", "transformers", "grpc", "prometheus_client"]
    script = f"import sys, decode_service.scheduler; assert not set({heavy}) & set(sys.modules)"
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


def test_who_does_not_fit_is_passed_so_often_and_no_more() -> None:
    on = Scheduled(tail_pages=10)
    holder = request("holder", max_tokens=15, tail=PAGE)
    large = request("large", max_tokens=1, tail=8 * PAGE)
    small = [request(f"{n}", max_tokens=1) for n in range(PASSES_MAX + 3)]
    on.submit(holder, large, *small)
    while not large.clock.admitted:
        on.step()
        on.check()
    assert large.passed == PASSES_MAX and holder.done
    on.finish()
    before = [sequence.clock.admitted < large.clock.admitted for sequence in small]
    assert before == [True] * PASSES_MAX + [False] * 3, "those behind the bound waited for it"
    on.check_idle()


def test_all_pages_or_none() -> None:
    on = Scheduled(chunk_pages=6)
    resident(on, "old", 8)
    first = request("first", [("a", 12)])
    both = request("both", [("b", 8), ("c", 8)])
    on.submit(first, both)
    plan = on.plan()
    assert [fill.sequence for fill in plan.admitted] == [first] and on.states() == "lw"
    assert not both.tail_pages and all(chunk.resident is None for chunk in both.composition.chunks)
    on.check()
    on.finish()
    on.check_idle()


def test_a_request_as_large_as_the_pool_gets_in_whatever_lies_there_unheld() -> None:
    on = Scheduled(chunk_pages=14)
    resident(on, "old", 3)
    on.submit(request("one", [("a", 40), ("b", 16)]))
    assert len(on.plan().admitted) == 1, "its second chunk has no run of pages before the old one goes"
    on.finish()


def test_what_is_evicted_stands_in_the_plan() -> None:
    on = Scheduled(chunk_pages=4)
    resident(on, "old", 8)
    resident(on, "new", 8)
    on.submit(request("one", [("a", 8)]))
    assert on.plan().evicted == ("old",)
    on.finish()


def test_tenants_take_turns_and_may_run_no_more_than_their_quota() -> None:
    on = Scheduled(batch_max=8, quotas=Quotas(running=2, waiting=9))
    many = [request(f"m{n}", tenant="many") for n in range(5)]
    few = [request(f"f{n}", tenant="few") for n in range(2)]
    on.submit(*many, *few)
    admitted = [fill.sequence.request_id for fill in on.plan().admitted]
    assert admitted == ["m0", "f0", "m1", "f1"]
    on.finish()
    on.check_idle()


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


@pytest.mark.parametrize("min_tokens", [0, 3])
def test_a_stop_token_ends_an_answer_that_is_long_enough(min_tokens: int) -> None:
    on = Scheduled()
    one = request("one", max_tokens=6)
    one.params.__dict__["min_tokens"] = min_tokens
    on.submit(one)
    for _ in range(9):
        on.step(EOS)
    assert on.reason(one) is FinishReason.STOP and len(one.generated) == max(1, min_tokens)
    on.check_idle()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["abort", "fail"])
def test_ended_in_every_state(state: str, how: str) -> None:
    """Its pages come back, at the latest with its load; who joined its chunk is served; it is told once."""
    on = Scheduled()
    one = bring(on, state)
    joined = request("joined", [("doc", 8)])
    on.submit(joined)
    on.plan()
    assert one.state == state or state == "waiting"
    (on.abort if how == "abort" else on.fail)(one)
    on.check()
    assert one.state is State.ENDED and on.reason(one) is (FinishReason.ABORT if how == "abort" else None)
    (on.abort if how == "abort" else on.fail)(one)  # harmless a second time
    on.finish()
    assert on.reason(joined) is FinishReason.LENGTH
    on.check_idle()


def test_a_load_that_nobody_wants_is_abandoned_and_not_while_somebody_joins() -> None:
    on = Scheduled()
    one, joined = request("one", [("doc", 8)]), request("joined", [("doc", 8)])
    on.submit(one, joined)
    on.plan()
    (fill,) = on.loads
    on.abort(one)
    assert not fill.abandoned
    on.abort(joined)
    on.plan()
    assert fill.abandoned
    on.load_failed(fill)
    on.check_idle()


def test_a_failed_load_ends_its_request_and_the_others_try_for_themselves() -> None:
    on = Scheduled()
    one, joined = request("one", [("doc", 8)]), request("joined", [("doc", 8), ("own", 4)])
    on.submit(one, joined)
    on.plan()
    assert len(on.loads) == 2 and on.states() == "ll"
    on.load_failed(on.loads[0])
    on.listen()
    assert isinstance(on.events[one][-1], Failed) and on.states() == "ew"
    on.check()
    on.plan()
    assert len(on.loads) == 2, "its first load goes on; the second brings what is missing"
    on.finish()
    assert on.reason(joined) is FinishReason.LENGTH
    on.check_idle()


def test_who_is_put_off_stands_where_it_stood_and_holds_nothing() -> None:
    on = Scheduled(batch_max=1)
    cold = [request(f"{n}", [(f"doc{n}", 4)]) for n in range(2)]
    on.submit(cold[0])
    on.plan()
    assert on.ask(on.loads[0])
    on.submit(cold[1], request("later"))
    on.plan()
    assert not on.ask(on.loads[1])
    assert cold[1].state is State.WAITING and cold[1].cold and not cold[1].tail_pages
    on.check()
    on.step()
    assert on.states() == "lwd", "what is warm passes it, with the only place to decode"
    assert next(iter(on.scheduler.everyone)) is cold[1]
    on.finish()
    assert [on.reason(sequence) for sequence in on.sequences] == [FinishReason.LENGTH] * 3
    on.check_idle()


def test_whose_kv_is_there_waits_for_a_place_to_decode_and_keeps_it_from_those_behind() -> None:
    on = Scheduled(batch_max=2)
    on.submit(*(request(f"{n}", [(f"doc{n}", 4)], max_tokens=9) for n in range(2)))
    on.plan()
    on.submit(request("warm", max_tokens=2), request("too", max_tokens=2))
    on.step()
    assert on.states() == "lldd", "who waits for KV takes no place to decode"
    for fill in list(on.loads):
        on.load(fill)
    on.submit(request("late"))
    on.plan()
    assert on.states() == "llddw"
    on.finish()
    assert on.sequences[0].clock.filled <= on.sequences[1].clock.filled < on.sequences[4].clock.admitted
    on.check_idle()


def test_what_cannot_be_stored_is_computed_here_for_all_who_wait() -> None:
    on = Scheduled()
    one, joined = request("one", [("doc", 20), ("b", 4)]), request("joined", [("doc", 20)])
    on.submit(one, joined)
    on.plan()
    on.load(on.loads[0], [True, False])
    plan = on.step()
    assert [(rows.chunk is not None, rows.first, rows.count) for rows in plan.alone] == [(True, 0, PIECE)]
    assert on.states() == "ll", "who waits for KV takes no place to decode, wherever it is computed"
    on.finish()
    assert [c.outcome.source for s in (one, joined) for c in s.composition.chunks] == [
        *(KVSource.COMPUTED, KVSource.STORE, KVSource.DEVICE)
    ]
    on.check_idle()


def test_a_chunk_that_stands_twice_and_cannot_be_stored_is_computed_once() -> None:
    on = Scheduled()
    one = request("one", [("doc", 8), ("doc", 8)])
    on.submit(one)
    on.plan()
    on.load(on.loads[0], [True])
    on.finish()
    assert [chunk.cached_tokens for chunk in one.composition.chunks] == [0, 8]
    on.check_idle()


def ready(on: Scheduled, sequence: Sequence) -> list[int]:
    """The chunks that a request for chunks was told of."""
    on.listen()
    return [event.chunk.index for event in on.events.get(sequence, []) if isinstance(event, ChunkReady)]


def test_a_request_for_chunks_ends_when_they_are_there_and_takes_no_place_to_decode() -> None:
    on = Scheduled(batch_max=1)
    on.submit(request("decoding", max_tokens=60))
    on.step()
    one = request("one", [("doc", 20), ("b", 4)], tail=0, exact=True)
    on.submit(one)
    on.step()
    assert on.states() == "dl" and on.scheduler.running == 1
    (fill,) = on.loads
    on.came(fill, one.composition.chunks[0], "claim")
    while not ready(on, one):
        assert on.step().rows
        on.check()
    assert ready(on, one) == [0] and on.claims[0].became == "published", "the first can be read before the second is"
    on.load(fill, ["claim"])
    on.step()
    on.step()
    while not one.done:
        on.step()
    assert on.events[one][-1] == AllReady() and [claim.became for claim in on.claims] == ["published"] * 2
    assert on.states() == "de"
    warm = request("warm", [("doc", 20), ("b", 4)], tail=0, exact=True)
    on.submit(warm)
    assert not on.plan().loads and warm.done and ready(on, warm) == [0, 1]
    on.finish()
    on.check_idle()


def test_a_request_for_chunks_and_one_for_an_answer_share_what_either_computes() -> None:
    on = Scheduled()
    chunks, answer = request("chunks", [("doc", 20)], tail=0), request("answer", [("doc", 20), ("b", 8)])
    on.submit(chunks, answer)
    on.plan()
    on.load(on.loads[0], ["claim"])
    on.finish()
    on.submit(request("again", [("b", 8), ("doc", 20)], tail=0))
    assert not on.plan().loads
    assert sum(rows.count for rows in on.ran if rows.chunk is not None) == 20
    assert on.reason(answer) is FinishReason.LENGTH and chunks.done
    on.check_idle()


@pytest.mark.parametrize("how", ["abort", "fail", "abandon"])
@pytest.mark.parametrize("begun", [False, True])
def test_what_was_claimed_is_dropped_with_its_request(how: str, begun: bool) -> None:
    on = Scheduled()
    one = request("one", [("doc", 20), ("b", 30)], tail=0)
    on.submit(one)
    on.plan()
    fill = on.loads[0]
    on.came(fill, one.composition.chunks[1], "claim")
    if begun:
        on.step()
    if how == "abandon":
        on.scheduler.abandon(Unavailable("shutting down"), 1000)
        assert on.claims[0].became == "dropped"
        return
    (on.abort if how == "abort" else on.fail)(one)
    on.check()
    assert on.claims[0].became == "dropped" and on.residents.held == 2, "the load still writes"
    on.load(fill, ["claim"])
    assert on.claims[1].became == "dropped", "nobody computes what is claimed too late"
    on.check_idle()


def test_chunks_are_computed_while_the_rest_is_on_its_way_each_once_its_context_is_there() -> None:
    on = Scheduled()
    one = request("one", [("a", 4), ("b", 4), ("c", 4)], exact=True)
    on.submit(one)
    on.plan()
    (fill,) = on.loads
    a, b, c = one.composition.chunks
    on.came(fill, b, "claim")
    on.came(fill, c, "claim")
    assert not on.step().rows and not on.scheduler.busy, "the first chunk is still being read"
    on.came(fill, a)
    assert on.scheduler.busy and [rows.chunk for rows in on.plan().alone] == [b, c]
    on.finish()
    on.check_idle()


def test_tenants_that_ask_for_chunks_take_turns_with_those_that_ask_for_answers() -> None:
    on = Scheduled(batch_max=2, chunk_pages=48, quotas=Quotas(running=1, waiting=9))
    many = [request(f"m{n}", [(f"m{n}", 20)], tail=0, tenant="many") for n in range(4)]
    on.submit(*many, request("f0", [("f0", 4)], tenant="few"), request("f1", [("f1", 4)], tenant="few"))
    assert [fill.sequence.request_id for fill in on.plan().admitted] == ["m0", "f0"], "two may read"
    assert on.ask(on.loads[0])
    on.load(on.loads[1])
    on.load(on.loads[0], ["claim"])
    assert [fill.sequence.request_id for fill in on.plan().admitted] == ["m1", "m2"], "running=1 is for answers"
    on.finish()
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


@pytest.mark.parametrize("begun", [False, True])
def test_who_waits_for_a_chunk_that_is_computed_here_tries_for_itself_when_its_owner_goes(begun: bool) -> None:
    on = Scheduled()
    one, joined = request("one", [("doc", 20)]), request("joined", [("doc", 20)])
    on.submit(one, joined)
    on.plan()
    on.load(on.loads[0], [True])
    if begun:
        on.step()
    on.abort(one)
    assert joined.state is State.WAITING
    on.check()
    on.finish()
    assert on.reason(joined) is FinishReason.LENGTH
    on.check_idle()


def test_what_bypasses_the_caches_leaves_nothing_behind() -> None:
    on = Scheduled()
    resident(on, "doc", 8)
    one = request("one", [("doc", 8), ("doc", 8)], bypass=True)
    on.submit(one)
    assert not on.plan().loads
    on.finish()
    assert list(on.residents._chunks) == ["doc"] and {c.cached_tokens for c in one.composition.chunks} == {0}
    assert sum(rows.count for rows in on.ran if rows.chunk is not None) == 16
    on.check_idle()


def test_a_state_follows_only_where_it_may() -> None:
    on = Scheduled()
    one = request("one")
    on.submit(one)
    with pytest.raises(RuntimeError, match="waiting cannot become decoding"):
        on.scheduler._enter(one, State.DECODING)


def test_everybody_is_told_when_it_ends() -> None:
    on = Scheduled(batch_max=1)
    sequences = [request(f"{n}", [("doc", 8)] if n == 1 else ()) for n in range(3)]
    on.submit(*sequences)
    on.step()
    on.scheduler.abandon(Unavailable("shutting down"), 1000)
    on.listen()
    assert all(isinstance(on.events[sequence][-1], Failed) for sequence in sequences)
    assert on.states() == "eee" and all(fill.abandoned for fill in on.loads)


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
