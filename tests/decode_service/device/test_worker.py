"""The device thread on a fake runner that counts on from the last token: no model, no service."""

from __future__ import annotations

import pytest

from decode_service.prompt.request_chunk import ChunkOutcome
from decode_service.scheduling.sequence import Deliveries, Failed, Finished, FinishReason, hand_out
from engine.kv.source import KVSource
from serving.errors import InternalFault, Overloaded, Unavailable
from tests.decode_service.device.running import DEADLINE_S, running


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_answers_of_several_requests_and_where_their_kv_came_from(runs_ahead: bool) -> None:
    with running(runs_ahead=runs_ahead, start=False) as it:
        one = it.submit("one", chunks=[("doc", 8)], max_tokens=6)
        two = it.submit("two", chunks=[("doc", 8)], max_tokens=3)
        it.worker.start()
        assert it.answer("one") == ([7, 8, 9, 10, 11, 12], Finished(FinishReason.LENGTH))
        assert it.answer("two") == ([7, 8, 9], Finished(FinishReason.LENGTH))
        assert [s.composition.chunks[0].outcome for s in (one, two)] == [
            *(ChunkOutcome(KVSource.STORE), ChunkOutcome(KVSource.DEVICE))
        ]
    assert it.worker.occupancy().pages["tail"] == 0


def test_a_long_prompt_and_a_chunk_of_its_own_come_in_pieces() -> None:
    with running() as it:
        it.submit("one", chunks=[("doc", 20)], tail=19, max_tokens=1, bypass=True)
        assert it.answer("one")[0] == [7]
        assert [len(ids) for ids, _ in it.runner.computed] == [8, 8, 4, 8, 8, 3]
        assert not len(it.residents)


def test_an_abort_ends_a_request_and_gives_its_pages_back() -> None:
    with running() as it:
        sequence = it.submit("one", max_tokens=40)
        it.events["one"].get(timeout=DEADLINE_S)
        it.worker.end("one", FinishReason.ABORT, sequence.owner)
        assert it.answer("one")[1] in (Finished(FinishReason.ABORT), Finished(FinishReason.LENGTH))


def test_a_fault_of_the_device_thread_is_told_to_all_and_takes_nobody_in() -> None:
    failed: list[bool] = []
    with running(start=False, on_failure=lambda: failed.append(True)) as it:
        it.submit("one")

        def fault() -> None:
            raise MemoryError

        it.worker.call(fault)
        it.worker.start()
        end = it.answer("one")[1]
        assert isinstance(end, Failed) and isinstance(end.error, InternalFault) and "MemoryError" in str(end.error)
        it.worker._thread.join(DEADLINE_S)
        assert failed == [True]
        with pytest.raises(Unavailable, match="restart"):
            it.submit("late")


def test_the_line_is_bounded_and_says_when_to_come_again() -> None:
    with running(start=False, waiting_max=2) as it:
        it.submit("one")
        it.submit("two")
        with pytest.raises(Overloaded) as caught:
            it.submit("three")
        assert caught.value.retry_after_s
        assert it.worker.occupancy().waiting == 2
        it.worker.start()
        assert it.answer("two")[1] == Finished(FinishReason.LENGTH)


def test_a_step_is_handed_over_once_for_all_its_requests() -> None:
    """Each hand-over to another thread lets go of the interpreter, so there is one a step and not one a request."""
    steps: list[Deliveries] = []

    def deliver(events: Deliveries) -> None:
        steps.append(events)
        hand_out(events)

    with running(start=False) as it:
        names = ["one", "two", "three"]
        for name in names:
            it.submit(name, max_tokens=5)
        it.worker.start(deliver)
        assert [it.answer(name)[1] for name in names] == [Finished(FinishReason.LENGTH)] * 3
    assert any(len(step) == 3 for step in steps)
    assert len(steps) < 3 * 5, "less than one for each token"
