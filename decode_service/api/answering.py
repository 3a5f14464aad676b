"""From an answer's tokens to what its caller is sent, and what is kept of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from decode_service.api import messages
from decode_service.api.chat_in import chat_out
from decode_service.api.given import Given
from decode_service.api.prompt_logprobs import note_prompt_logprobs
from decode_service.api.replies import Replies
from decode_service.api.tool_choice import reply_parser
from decode_service.device.worker import DecodeWorker
from decode_service.prompt.chat import ChatComposer
from decode_service.scheduling.kept import Kept
from decode_service.scheduling.sequence import FinishReason, Sequence
from decode_service.turns import TurnKeeper
from protos import decode_pb2
from serving.rpc import wire
from text.answer import AnswerText
from text.codec import TextCodec


@dataclass(frozen=True)
class Answer:
    """One answer on its way to the caller. ``given``: what the caller has of it, for a turn that is kept."""

    sequence: Sequence
    replies: Replies
    given: Given = field(default_factory=Given)


class Answering:
    """Answers of one worker's requests, in the words of a model."""

    def __init__(
        self, worker: DecodeWorker, codec: TextCodec, chats: ChatComposer, turns: TurnKeeper, *, model_name: str
    ) -> None:
        self.chats = chats
        self._worker = worker
        self._codec = codec
        self._turns = turns
        self._model_name = model_name

    def answer(self, request: decode_pb2.GenerateRequest, sequence: Sequence) -> Answer:
        """One of a request's answers, from its tokens to what the caller is sent."""
        sampling = request.sampling
        parser = reply_parser(request.chat, sequence.composition.chat, self._codec.answers)
        stream = self._codec.stream(sampling.keep_special_tokens, keep_tags=parser is not None)
        text = AnswerText(stream, sampling.stop, sampling.min_tokens, include_stop=sampling.include_stop)
        replies = Replies(
            text,
            parser=parser,
            stop=lambda: self._worker.finish(sequence, FinishReason.STOP),
            complete=lambda reason, tokens: self._complete(sequence, reason, tokens),
            index=sequence.answer,
            spell=self._codec.token_bytes,
        )
        return Answer(sequence, replies)

    async def note_kept(self, answer: Answer, reply: decode_pb2.GenerateResponse) -> None:
        """Gathers what the caller is given of the answer; keeps the turn before its last message goes out."""
        if reply.WhichOneof("event") == "delta":
            answer.given.add(reply.delta)
            return
        kept = await asyncio.to_thread(self._keep, answer)
        if kept is not None:
            reply.complete.kept.CopyFrom(messages.kept_out(kept))

    async def note_scores(self, answer: Answer, reply: decode_pb2.GenerateResponse) -> None:
        """Tells the log-probabilities of the prompt in the last message, in a thread: they can be many."""
        if reply.HasField("complete"):
            await asyncio.to_thread(note_prompt_logprobs, reply.complete, answer.sequence, self._codec.token_bytes)

    def _keep(self, answer: Answer) -> Kept | None:
        kept = self._turns.keep(answer.sequence, answer.given.token_ids)
        if kept is not None:
            self.chats.answered(answer.sequence.composition, answer.given.said(), answer.given.token_ids)
        return kept

    def _complete(self, sequence: Sequence, reason: FinishReason, tokens: int) -> decode_pb2.Complete:
        chat = sequence.composition.chat
        return decode_pb2.Complete(
            chat=None if chat is None else chat_out(chat),
            request_id=sequence.request_id,
            finish_reason=reason.value,
            usage=messages.usage_out(sequence, tokens),
            reuse=messages.sequence_reuse_out(sequence),
            timings=wire.timings_out(sequence.clock.spent_ns()),
            seed=sequence.params.seed,
            model_name=self._model_name,
            index=sequence.answer,
            preemptions=sequence.preemptions,
        )
