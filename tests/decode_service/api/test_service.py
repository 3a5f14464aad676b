"""The handlers of the decode service over a scripted worker: text, stops, aborts, whose request, what is given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from decode_service.scheduling.sequence import Failed, FinishReason
from protos import decode_pb2
from serving.errors import DeadlineExceeded, InternalFault, InvalidRequest, Overloaded
from tests.decode_service.api.desk import Call, Desk, request, running, says


def test_a_failure_is_raised_as_it_is(desk: Desk) -> None:
    async def body() -> None:
        desk.worker.script = lambda sequence: sequence.deliver([Failed(InternalFault("lost"))])
        with pytest.raises(InternalFault, match="lost"):
            await desk.answer(request())

    desk.run(body)


@pytest.mark.parametrize("where", ["place", "segments", "size"])
def test_a_refusal_keeps_no_place(desk: Desk, where: str) -> None:
    async def body() -> None:
        asked = request()
        if where == "place":
            desk.worker.refuses = Overloaded("full", retry_after_s=1.0)
        elif where == "size":
            desk.worker.too_large = Overloaded("larger than the pool")
        else:
            asked = request("")
        with pytest.raises(Overloaded if where != "segments" else InvalidRequest):
            await desk.answer(asked)
        assert desk.worker.places_taken == 0 and not desk.worker.sequences

    desk.run(body)


def test_an_answer_has_an_end(desk: Desk) -> None:
    async def body() -> None:
        with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 s"):
            await desk.answer(request(request_id="r"))
        assert desk.worker.ended == [("r", FinishReason.ABORT, "")]

    desk.run(body, timeout_s=0.05)


def test_the_callers_deadline_is_the_sequences(desk: Desk) -> None:
    async def body() -> None:
        desk.worker.script = says("a")
        await desk.answer(request(), Call(left_s=5.0))
        await desk.answer(request(), Call(left_s=500.0))
        near, far = (sequence.deadline for sequence in desk.worker.sequences)
        assert 20.0 < far - near <= 25.5

    desk.run(body)


def test_a_caller_that_goes_away_gives_everything_back(desk: Desk) -> None:
    async def body() -> None:
        task = await running(desk, "r")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert desk.worker.ended == [("r", FinishReason.ABORT, "")]

    desk.run(body)


def test_an_abort_before_the_worker_has_it_is_not_lost(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        resolve, entered, go_on = desk.service.composer.sequences, asyncio.Event(), asyncio.Event()

        async def slow(*args: Any) -> Any:
            entered.set()
            await go_on.wait()
            return await resolve(*args)

        monkeypatch.setattr(desk.service.composer, "sequences", slow)
        task = asyncio.create_task(desk.answer(request(request_id="r")))
        await asyncio.wait_for(entered.wait(), 20)
        assert (await desk.service.Abort(decode_pb2.AbortRequest(request_id="r"), Call())).found
        go_on.set()
        assert (await task)[1].finish_reason == "abort"

    desk.run(body)
