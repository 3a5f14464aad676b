"""A running generation over scripted calls: deltas, the result, what is tried again, and who cancels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from grpc import StatusCode

from cairn.client.errors import ServerError, Unavailable
from cairn.client.generation import AsyncGeneration, Generation
from cairn.client.replicas import Route
from cairn.client.transport import END, Attempts, Peer
from protos import decode_pb2
from tests.cairn.client.test_transport import Failed

PEER = Peer("decode", "here:1", request_id="r")


def delta(text: str) -> Any:
    return decode_pb2.GenerateResponse(delta=decode_pb2.Delta(text=text))


COMPLETE = decode_pb2.GenerateResponse(complete=decode_pb2.Complete(finish_reason="stop"))


def of_answer(index: int, text: str = "") -> Any:
    """A delta of an answer, or its end."""
    if text:
        return decode_pb2.GenerateResponse(delta=decode_pb2.Delta(text=text, index=index))
    return decode_pb2.GenerateResponse(complete=decode_pb2.Complete(finish_reason="stop", index=index))


class Call:
    """A call whose events are given; an exception among them is raised."""

    def __init__(self, *events: Any) -> None:
        self.events = list(events)
        self.cancelled = 0

    def __next__(self) -> Any:
        if not self.events:
            raise StopIteration
        event = self.events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    async def read(self) -> Any:
        try:
            return next(self)
        except StopIteration:
            return END

    def cancel(self) -> None:
        self.cancelled += 1


def starts(*calls: Call) -> tuple[Callable[[float], Call], list[float]]:
    left, asked = list(calls), []

    def start(remaining_s: float) -> Call:
        asked.append(remaining_s)
        return left.pop(0)

    return start, asked


def generation(*calls: Call, timeout_s: float = 60.0) -> Generation:
    return Generation(starts(*calls)[0], Route.alone(PEER), Attempts(timeout_s, retry=True))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cairn.client.transport.FIRST_DELAY_S", 0.001)


def test_deltas_come_and_then_there_is_a_result() -> None:
    call = Call(delta("a"), delta("b"), COMPLETE)
    stream = generation(call)
    assert next(stream).text == "a"
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = stream.result
    assert [each.text for each in stream] == ["b"]
    assert (stream.result.text, stream.result.finish_reason) == ("ab", "stop")
    stream.close()
    assert call.cancelled == 0, "it is over: there is nothing to cancel"


def test_answers_are_put_together_by_their_numbers() -> None:
    told: list[str] = []
    events = (of_answer(1, "b"), of_answer(0, "a"), of_answer(1, "d"), of_answer(1), of_answer(0, "c"), of_answer(0))
    start, _ = starts(Call(*events))
    stream = Generation(
        start,
        Route.alone(PEER),
        Attempts(60.0, retry=True),
        answers=2,
        finished=lambda result: told.append(result.text),
    )
    assert [(next(stream).index, next(stream).text) for _ in range(2)] == [(1, "a"), (1, "c")]
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = stream.results
    assert stream.finish().text == "ac" and told == ["ac"]
    assert [(result.index, result.text) for result in stream.results] == [(0, "ac"), (1, "bd")]


def test_a_stream_that_ends_without_an_answers_end_fails() -> None:
    start, _ = starts(Call(of_answer(0, "a"), of_answer(0)))
    with pytest.raises(ServerError, match="before its final message"):
        Generation(start, Route.alone(PEER), Attempts(60.0, retry=True), answers=2).finish()


def test_a_call_that_fails_before_its_first_event_is_made_again() -> None:
    assert generation(Call(Failed(StatusCode.UNAVAILABLE)), Call(delta("a"), COMPLETE)).finish().text == "a"


def test_once_text_has_come_nothing_is_tried_again() -> None:
    stream = generation(Call(delta("a"), Failed(StatusCode.UNAVAILABLE)), Call(delta("again"), COMPLETE))
    assert next(stream).text == "a"
    with pytest.raises(Unavailable) as caught:
        next(stream)
    assert caught.value.request_id == "r"
    assert list(stream) == [], "it is over"


def test_a_stream_without_its_final_message_is_an_error() -> None:
    with pytest.raises(ServerError, match="ended before its final message"):
        generation(Call(delta("a"))).finish()


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_leaving_it_cancels_the_call(how: str) -> None:
    call = Call(delta("a"), delta("b"), COMPLETE)
    stream: Generation | None = generation(call)
    assert stream is not None
    if how == "close":
        stream.close()
        stream.close()
        assert list(stream) == []
    elif how == "with":
        with stream:
            next(stream)
    stream = None
    assert call.cancelled == 1


def test_the_deadline_is_one_for_all_attempts() -> None:
    start, asked = starts(Call(Failed(StatusCode.UNAVAILABLE)), Call(COMPLETE))
    Generation(start, Route.alone(PEER), Attempts(60.0, retry=True)).finish()
    assert len(asked) == 2 and asked[1] < asked[0] <= 60.0


def test_in_an_event_loop_too() -> None:
    async def main() -> None:
        def made(*calls: Call) -> AsyncGeneration:
            return AsyncGeneration(starts(*calls)[0], Route.alone(PEER), Attempts(60.0, retry=True))

        retried = made(Call(Failed(StatusCode.UNAVAILABLE)), Call(delta("a"), delta("b"), COMPLETE))
        assert [each.text async for each in retried] == ["a", "b"] and retried.result.text == "ab"
        with pytest.raises(ServerError):
            await made(Call(delta("a"))).finish()
        with pytest.raises(Unavailable):
            await made(Call(delta("a"), Failed(StatusCode.UNAVAILABLE)), Call(COMPLETE)).finish()
        left = Call(delta("a"), delta("b"), COMPLETE)
        async with made(left) as stream:
            await anext(stream)
        assert left.cancelled == 1
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_cancelling_the_task_that_reads_cancels_the_call() -> None:
    class Silent(Call):
        async def read(self) -> Any:
            await asyncio.sleep(60)

    async def main() -> None:
        call = Silent()
        stream = AsyncGeneration(lambda _: call, Route.alone(PEER), Attempts(60.0, retry=True))
        task = asyncio.create_task(stream.finish())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.cancelled == 1

    asyncio.run(asyncio.wait_for(main(), 30))
