"""Events between the device thread and the streams: one wake-up a step, nothing lost, nothing out of order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from decode_service.api.mailbox import EVENTS_AT_ONCE, Mailbox, deliver_in
from decode_service.scheduling.sequence import Deliveries, Event, Failed, Finished, FinishReason, Tokens
from engine.sampling.params import Choice
from serving.errors import DeadlineExceeded
from tests.decode_service.scheduling.scheduled import request

END = Finished(FinishReason.LENGTH)


def token(number: int) -> Tokens:
    return Tokens((Choice(number, None),))


def ids(events: list[Any]) -> list[int]:
    return [choice.token_id for event in events if isinstance(event, Tokens) for choice in event.choices]


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))


def test_who_waits_gets_what_comes_at_once_and_who_writes_gets_the_rest_together() -> None:
    async def body() -> None:
        mailbox, taken = Mailbox(), asyncio.Event()
        got: list[list[int]] = []

        async def read() -> None:
            while True:
                [(_, events)] = await mailbox.take()
                got.append(ids(events))
                taken.set()
                if events[-1] is END:
                    return
                await asyncio.sleep(0)  # a message is written

        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        mailbox.put([token(1)])
        await taken.wait()
        for number in (2, 3, 4):  # while the message with 1 is written
            mailbox.put([token(number)])
        mailbox.put([END])
        await reader
        assert got == [[1], [2, 3, 4]]

    run(body)


def test_a_slow_readers_messages_have_a_bound() -> None:
    async def body() -> None:
        mailbox, count = Mailbox(), 2 * EVENTS_AT_ONCE + 5
        for number in range(count):
            mailbox.put([token(number)])
        mailbox.put([END])
        batches = [events for _ in range(3) for _, events in await mailbox.take()]
        assert [len(batch) for batch in batches] == [EVENTS_AT_ONCE, EVENTS_AT_ONCE, 6]
        assert [number for batch in batches for number in ids(batch)] == list(range(count)) and batches[-1][-1] is END

    run(body)


def test_nothing_comes_after_the_end() -> None:
    async def body() -> None:
        for first in (END, Failed(DeadlineExceeded("late"))):
            mailbox = Mailbox()
            mailbox.put([token(1), first])
            mailbox.put([Failed(DeadlineExceeded("later"))])
            assert await mailbox.take() == [(0, [token(1), first])]
            waiting = asyncio.create_task(mailbox.take())
            await asyncio.sleep(0)
            assert not waiting.done()
            waiting.cancel()

    run(body)


def test_the_answers_of_a_request_come_with_their_numbers_and_end_one_by_one() -> None:
    async def body() -> None:
        mailbox = Mailbox(3)
        mailbox.put([token(1)], 2)
        mailbox.put([token(2)], 0)
        mailbox.put([END], 2)
        assert await mailbox.take() == [(0, [token(2)]), (2, [token(1), END])]
        mailbox.put([token(3)], 2)
        waiting = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        late = Failed(DeadlineExceeded("late"))
        mailbox.end(late)
        assert await waiting == [(0, [late]), (1, [late])]

    run(body)


def test_a_step_wakes_the_event_loop_once_and_tells_everybody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        loop, threads, wakes = asyncio.get_running_loop(), set[str](), list[Any]()
        wake = loop.call_soon_threadsafe

        def counted(*given: Any) -> Any:
            wakes.append(given)
            return wake(*given)

        def noting(put: Callable[[list[Event]], None]) -> Callable[[list[Event]], None]:
            def noted(events: list[Event]) -> None:
                threads.add(threading.current_thread().name)
                put(events)

            return noted

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        mailboxes, sequences = [Mailbox() for _ in range(5)], [request(f"r{n}") for n in range(5)]
        for mailbox, sequence in zip(mailboxes, sequences, strict=True):
            sequence.deliver = noting(mailbox.put)
        step: Deliveries = {sequence: [token(n), END] for n, sequence in enumerate(sequences)}
        device = threading.Thread(target=deliver_in(loop), args=(step,))
        device.start()
        taken = await asyncio.gather(*(mailbox.take() for mailbox in mailboxes))
        device.join()
        assert taken == [[(0, [token(n), END])] for n in range(5)]
        assert len(wakes) == 1 and threads == {threading.main_thread().name}

    run(body)


def test_nobody_listens_when_the_loop_is_closed() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    deliver_in(loop)({request("r"): [END]})
