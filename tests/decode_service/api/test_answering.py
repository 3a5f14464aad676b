"""What a caller is sent of an answer's tokens: text, stops, log-probabilities, the completion, what was kept."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from decode_service.api.answering import Answering
from decode_service.scheduling.kept import Kept, KeptKV
from decode_service.scheduling.sequence import Finished, FinishReason, Tokens
from engine.sampling.params import Choice
from protos import decode_pb2
from tests.decode_service.api.desk import Desk, choices, request, says
from tests.decode_service.scheduling.scheduled import request as sequence_of
from tests.fakes import codec


def test_tokens_become_text_and_the_completion_is_last(desk: Desk) -> None:
    async def body() -> None:
        desk.worker.script = says("a heap ", "of €")
        text, complete, deltas = await desk.answer(request(request_id="r", sampling={"seed": 7}))
        assert text == "a heap of €" and complete.finish_reason == "length"
        assert (complete.request_id, complete.seed, complete.model_name) == ("r", 7, "tiny")
        counted = sum(len(delta.token_ids) for delta in deltas)
        assert complete.usage.completion_tokens == counted == len(choices("a heap ")) + len(choices("of €"))
        assert len(desk.worker.first_tokens) == 1
        assert desk.worker.ended == [("r", FinishReason.ABORT, "")], "however it ends, its pages come back"

    desk.run(body)


def test_a_stop_string_ends_the_request_and_is_not_shown(desk: Desk) -> None:
    async def body() -> None:
        def script(sequence: Any) -> None:
            sequence.clock.first_token = 1
            for text in ("one <", "/s", "> two", " three"):
                sequence.deliver([Tokens(choices(text))])

        desk.worker.script = script
        text, complete, _ = await desk.answer(request(request_id="r", sampling={"stop": ["</s>"]}))
        assert (text, complete.finish_reason) == ("one ", "stop")
        assert desk.worker.finished == [(desk.worker.sequences[0], FinishReason.STOP)]

    desk.run(body)


def test_text_that_was_held_back_comes_at_the_end(desk: Desk) -> None:
    async def body() -> None:
        desk.worker.script = says("one <", "/")
        text, complete, _ = await desk.answer(request(sampling={"stop": ["</s>"]}))
        assert (text, complete.finish_reason) == ("one </", "length")

    desk.run(body)


def test_log_probabilities_come_where_they_were_asked_for(desk: Desk) -> None:
    async def body() -> None:
        def script(sequence: Any) -> None:
            tops = ((5, -0.5), (9, -2.0)), ((7, -0.25), (6, -1.0))
            tokens = Tokens((Choice(5, -0.5, tops[0]), Choice(6, -1.0, tops[1])))
            sequence.deliver([tokens, Finished(FinishReason.STOP)])

        desk.worker.script = script
        _, complete, (delta,) = await desk.answer(request())
        assert list(delta.logprobs) == [-0.5, -1.0] and list(delta.token_ids) == [5, 6]
        assert [(list(top.token_ids), list(top.logprobs)) for top in delta.top_logprobs] == [
            ([5, 9], [-0.5, -2.0]),
            ([7, 6], [-0.25, -1.0]),
        ]
        desk.worker.script = says("a")
        bare = (await desk.answer(request()))[2][0]
        assert not bare.logprobs and not bare.top_logprobs
        assert complete.finish_reason == "stop"

    desk.run(body)


class Turns:
    """Keeps what it is told to."""

    def __init__(self, kept: Kept | None) -> None:
        self.kept = kept
        self.asked: list[list[int]] = []

    def keep(self, sequence: Any, answer: list[int]) -> Kept | None:
        self.asked.append(list(answer))
        return self.kept


def test_a_turn_is_kept_with_what_its_caller_was_given_before_the_last_message_goes() -> None:
    """And the chat is remembered with it, unless nothing was kept."""
    for kept in (Kept("t" * 64, (6, 6), True, KeptKV.RESIDENT), None):  # type: ignore[arg-type]
        remembered: list[Any] = []
        turns, chats = Turns(kept), SimpleNamespace(answered=lambda *what, to=remembered: to.append(what))
        nobody: Any = None
        answering = Answering(nobody, codec(), chats, turns, model_name="tiny")  # type: ignore[arg-type]
        answer = answering.answer(request(), sequence_of("one"))
        told = choices("a heap")
        replies = [*answer.replies.of([Tokens(told)]), *answer.replies.of([Finished(FinishReason.LENGTH)])]

        async def noted(answering: Answering = answering, answer: Any = answer, replies: Any = replies) -> None:
            for reply in replies:
                await answering.note_kept(answer, reply)

        asyncio.run(noted())
        given = [choice.token_id for choice in told]
        assert turns.asked == [given] and replies[-1].complete.HasField("kept") == (kept is not None)
        assert [what[2] for what in remembered] == ([given] if kept else [])
        assert replies[-1].complete.model_name == "tiny" and replies[-1].complete.finish_reason == "length"


def test_what_a_prompt_scored_stands_in_the_last_message_alone() -> None:
    sequence = sequence_of("one")
    sequence.scores = SimpleNamespace(all=lambda: [(6, None), (6, Choice(6, -0.5))])  # type: ignore[assignment]
    nobody: Any = None
    answering = Answering(nobody, codec(), nobody, nobody, model_name="tiny")
    answer = answering.answer(request(), sequence)
    delta = decode_pb2.GenerateResponse(delta=decode_pb2.Delta())
    complete = decode_pb2.GenerateResponse(complete=decode_pb2.Complete())
    for reply in (delta, complete):
        asyncio.run(answering.note_scores(answer, reply))
    assert not delta.HasField("complete")
    assert [each.logprob for each in complete.complete.prompt_logprobs] == [0.0, -0.5]
