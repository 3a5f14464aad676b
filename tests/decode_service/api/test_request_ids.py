"""Ids of requests that run: once at a time, by owner, and aborted wherever they are."""

from __future__ import annotations

import asyncio

import pytest

from chunk_store.tenant import Tenant
from decode_service.api.request_ids import RequestIds
from protos import decode_pb2
from serving.errors import Conflict, InvalidRequest
from serving.trace.request_id import bearing
from tests.decode_service.api.desk import TOKENS, Call, Desk, request, running, says


def test_an_id_runs_once_at_a_time(desk: Desk) -> None:
    async def body() -> None:
        first = await running(desk, "r")
        with pytest.raises(Conflict, match="'r' is running"):
            await desk.answer(request(request_id="r"))
        assert (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call())).found
        _, complete, _ = await first
        assert complete.finish_reason == "abort" and complete.usage == decode_pb2.Usage()
        assert not (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call())).found
        desk.worker.script = says("again")
        assert (await desk.answer(request(request_id="r")))[0] == "again"

    desk.run(body)


def test_one_tenants_ids_say_nothing_of_anothers(desk: Desk) -> None:
    async def body() -> None:
        anns, bobs = await running(desk, "r", Call("ann")), await running(desk, "r", Call("bob"))
        assert not (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call("boss"))).found
        assert (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call("bob"))).found
        owners = {owner for _, _, owner in desk.worker.ended}
        assert len(owners) == 1 and "" not in owners
        for task in (anns, bobs):
            task.cancel()
        await asyncio.gather(anns, bobs, return_exceptions=True)
        assert {s.salt for s in desk.worker.sequences} == {"salt-a", "salt-b"}

    desk.run(body, tokens=TOKENS)


ANN, BOB = Tenant("ann"), Tenant("bob")


def test_who_names_no_id_has_the_calls_own_or_another_while_that_runs() -> None:
    ids = RequestIds()
    with bearing("of-the-call"):
        assert ids.claim("", ANN) == "of-the-call"
        again = ids.claim("", ANN)
        assert again != "of-the-call" and len(ids) == 2
        with pytest.raises(Conflict, match="'of-the-call' is running"):
            ids.claim("of-the-call", ANN)
        assert ids.claim("of-the-call", BOB) == "of-the-call"
    with pytest.raises(InvalidRequest, match="request_id"):
        ids.claim("x" * 10_000, ANN)


def test_what_is_aborted_is_so_until_it_is_over() -> None:
    ids = RequestIds()
    ids.claim("r", ANN)
    assert not ids.abort("r", BOB) and not ids.is_aborted("r", ANN)
    assert ids.abort("r", ANN) and ids.is_aborted("r", ANN) and not ids.is_aborted("r", BOB)
    ids.release("r", ANN)
    assert not ids.is_aborted("r", ANN) and not ids.abort("r", ANN) and not len(ids)
    ids.claim("r", ANN)
    assert not ids.is_aborted("r", ANN), "the next one of that name is another one"
