"""Requests that end, or are sent back, give back all that they hold; who waited for them goes on. On a fake runner."""

from __future__ import annotations

import pytest

from decode_service.scheduling.sequence import Failed, FinishReason, Sequence, State
from serving.errors import Unavailable
from tests.decode_service.scheduling.scheduled import PIECE, Scheduled, request

STATES = ["waiting", "loading", "prefilling", "decoding"]


def bring(on: Scheduled, state: str) -> Sequence:
    """A request that has come as far as ``state``, with a chunk that another request joins."""
    one = request("one", [("doc", 8), ("here", 4)], tail=3 * PIECE, max_tokens=9)
    on.resident("here", 4)
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


def test_everybody_is_told_when_it_ends() -> None:
    on = Scheduled(batch_max=1)
    sequences = [request(f"{n}", [("doc", 8)] if n == 1 else ()) for n in range(3)]
    on.submit(*sequences)
    on.step()
    on.scheduler.abandon(Unavailable("shutting down"), 1000)
    on.listen()
    assert all(isinstance(on.events[sequence][-1], Failed) for sequence in sequences)
    assert on.states() == "eee" and all(fill.abandoned for fill in on.loads)
