"""What loads bring and what is computed instead, on a scheduler with a fake runner: once for all who wait."""

from __future__ import annotations

import pytest

from decode_service.scheduling.sequence import FinishReason
from engine.kv.source import KVSource
from serving.errors import Unavailable
from tests.decode_service.scheduling.scheduled import PIECE, Scheduled, request


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


def test_what_bypasses_the_caches_leaves_nothing_behind() -> None:
    on = Scheduled()
    on.resident("doc", 8)
    one = request("one", [("doc", 8), ("doc", 8)], bypass=True)
    on.submit(one)
    assert not on.plan().loads
    on.finish()
    assert list(on.residents._chunks) == ["doc"] and {c.cached_tokens for c in one.composition.chunks} == {0}
    assert sum(rows.count for rows in on.ran if rows.chunk is not None) == 16
    on.check_idle()
