"""From an answer's events to the replies that its caller reads: deltas as tokens come, then the completion."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from decode_service.scheduling.sequence import Event, Failed, Finished, FinishReason, Tokens
from engine.sampling.params import Choice
from protos import decode_pb2
from serving.errors import RequestError
from text.answer import AnswerText
from text.chat.parsing.parts import Part, ReplyParser

TOOL_CALLS = "tool_calls"  # why an answer ended, in OpenAI's word


def _unspelt(token_id: int) -> bytes:
    return b""


class Replies:
    """The replies of one answer to a request, the ``index``-th; what came in together goes out together.

    ``over``: its last event has come, and ``error`` is what it failed with. ``stop`` is called when a stop string has
    come: what comes after it is not shown. ``parser`` tells reasoning and tool calls from text. ``complete`` makes the
    completion, of how it ended and its number of tokens; ``spell`` gives the bytes of a token.
    """

    def __init__(
        self,
        answer: AnswerText,
        *,
        parser: ReplyParser | None = None,
        stop: Callable[[], None],
        complete: Callable[[FinishReason, int], decode_pb2.Complete],
        index: int = 0,
        spell: Callable[[int], bytes] = _unspelt,
    ) -> None:
        self._answer = answer
        self._spell = spell
        self._index = index
        self._parser = parser
        self._stop = stop
        self._complete = complete
        self._reason: FinishReason | None = None
        self.over = False
        self.error: RequestError | None = None

    def of(self, events: Items[Event]) -> list[decode_pb2.GenerateResponse]:
        """The replies to the next events, in order."""
        replies: list[decode_pb2.GenerateResponse] = []
        end = events[-1]
        if self._reason is None:
            choices = [choice for event in events if isinstance(event, Tokens) for choice in event.choices]
            if choices:
                new = self._answer.push(choices)
                if self._parser is None:
                    replies.append(delta(new.text, new.choices, self._index, self._spell))
                else:
                    told = delta("", new.choices, self._index, self._spell)
                    replies.append(with_parts(told, self._parser.push(new.text)))
                if new.stopped:
                    self._reason = FinishReason.STOP
                    self._stop()
        if not isinstance(end, Tokens):
            self.over = True
            if isinstance(end, Failed):
                self.error = end.error
            elif isinstance(end, Finished):
                replies += self._end(end)
        return replies

    def _end(self, end: Finished) -> list[decode_pb2.GenerateResponse]:
        reason, rest = self._reason, ""
        if reason is None:
            rest, stopped = self._answer.flush()
            reason = FinishReason.STOP if stopped and end.reason is FinishReason.LENGTH else end.reason
        last = delta(rest if self._parser is None else "", (), self._index)
        complete = self._complete(reason, self._answer.tokens)
        if self._parser is not None:
            last = with_parts(last, (*self._parser.push(rest), *self._parser.flush()))
            complete.chat.tool_calls_broken = self._parser.broken
            if reason is FinishReason.STOP and self._parser.calls:
                complete.finish_reason = TOOL_CALLS
        says_something = last.delta.text or last.delta.reasoning or last.delta.tool_calls
        return [*([last] if says_something else []), decode_pb2.GenerateResponse(complete=complete)]


def with_parts(reply: decode_pb2.GenerateResponse, parts: Items[Part]) -> decode_pb2.GenerateResponse:
    """``reply``, with what a parser made of its text: what goes on in one go is one."""
    new = reply.delta
    for part in parts:
        new.text += part.text
        new.reasoning += part.reasoning
        call = part.call
        if call is None:
            continue
        if not new.tool_calls or new.tool_calls[-1].index != call.index:
            new.tool_calls.add(index=call.index)
        last = new.tool_calls[-1]
        last.id, last.name = last.id or call.id, last.name or call.name
        last.arguments += call.arguments
    return reply


def delta(
    text: str, choices: Items[Choice], index: int = 0, spell: Callable[[int], bytes] = _unspelt
) -> decode_pb2.GenerateResponse:
    """A delta event of an answer; log-probabilities where they were asked for."""
    reply = decode_pb2.GenerateResponse()
    new = reply.delta  # filled in place: half the time of three constructors, and there is one for every token
    new.text = text
    if index:
        new.index = index
    new.token_ids.extend([choice.token_id for choice in choices])
    if choices and choices[0].logprob is not None:
        new.logprobs.extend([choice.logprob for choice in choices if choice.logprob is not None])
        for choice in choices:
            for token in (choice.token_id, *(token for token, _ in choice.top)):
                new.token_bytes[token] = spell(token)
        if choices[0].top:
            for choice in choices:
                new.top_logprobs.add(
                    token_ids=[token for token, _ in choice.top], logprobs=[value for _, value in choice.top]
                )
    return reply
