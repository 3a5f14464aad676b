"""Events in, replies out: every token once and in order, what stops an answer, and how it ends."""

from __future__ import annotations

import itertools
import random

import pytest

from decode_service.api.replies import Replies, delta
from decode_service.scheduling.sequence import Event, Failed, Finished, FinishReason, Tokens
from engine.sampling.params import Choice
from protos import decode_pb2
from serving.errors import InternalFault
from tests.fakes import codec
from text.answer import AnswerText


class Said:
    """Replies of one answer, and what the worker was told."""

    def __init__(self, *stop: str) -> None:
        self.stopped = 0
        self.replies = Replies(AnswerText(codec().stream(), stop), stop=self._stop, complete=_complete)

    def _stop(self) -> None:
        self.stopped += 1

    def tell(self, *batches: list[Event]) -> tuple[list[decode_pb2.Delta], decode_pb2.Complete | None]:
        replies = [reply for batch in batches for reply in self.replies.of(batch)]
        deltas = [reply.delta for reply in replies if reply.WhichOneof("event") == "delta"]
        ends = [reply.complete for reply in replies if reply.WhichOneof("event") == "complete"]
        assert len(deltas) + len(ends) == len(replies) and replies[-len(ends) :] if ends else not self.replies.over
        return deltas, ends[0] if ends else None


def _complete(reason: FinishReason, tokens: int) -> decode_pb2.Complete:
    return decode_pb2.Complete(
        finish_reason=reason.value, usage=decode_pb2.Usage(completion_tokens=tokens), model_name="tiny"
    )


def events_of(text: str) -> list[Event]:
    return [Tokens((Choice(token, None),)) for token in codec().encode(text)]


def test_whatever_comes_together_every_token_comes_once_in_order_and_the_text_is_whole() -> None:
    text, draw = "a heap of €, 茶 and stones 🍵 that marks a place", random.Random(3)
    events = [*events_of(text), Finished(FinishReason.LENGTH)]
    for _ in range(30):
        cuts = sorted({0, len(events), *draw.sample(range(1, len(events)), draw.randint(0, 12))})
        said = Said()
        deltas, end = said.tell(*(events[a:b] for a, b in itertools.pairwise(cuts)))
        assert [token for delta in deltas for token in delta.token_ids] == list(codec().encode(text))
        assert "".join(delta.text for delta in deltas) == text and said.replies.over and end is not None
        assert (end.finish_reason, end.usage.completion_tokens) == ("length", len(events) - 1)


@pytest.mark.parametrize("together", [False, True])
def test_a_stop_is_told_once_and_nothing_behind_it_is_shown(together: bool) -> None:
    events = [*events_of("one </s> two three"), Finished(FinishReason.LENGTH)]
    said = Said("</s>")
    deltas, end = said.tell(events) if together else said.tell(*([event] for event in events))
    assert "".join(delta.text for delta in deltas) == "one " and said.stopped == 1
    shown = [token for delta in deltas for token in delta.token_ids]
    assert shown == list(codec().encode("one </s>")) and end is not None
    assert (end.finish_reason, end.usage.completion_tokens) == ("stop", len(shown))


def test_what_came_before_a_failure_is_shown_before_it() -> None:
    said = Said()
    (delta,) = (reply.delta for reply in said.replies.of([*events_of("one"), Failed(InternalFault("lost"))]))
    assert delta.text == "one" and said.replies.over and str(said.replies.error) == "lost"


def test_log_probabilities_of_tokens_that_come_together() -> None:
    top = ((5, -0.5), (7, -1.5))
    (reply,) = Said().replies.of([Tokens((Choice(5, -0.5, top),)), Tokens((Choice(7, -1.5, top[::-1]),))])
    assert list(reply.delta.token_ids) == [5, 7] and list(reply.delta.logprobs) == [-0.5, -1.5]
    assert [list(each.token_ids) for each in reply.delta.top_logprobs] == [[5, 7], [7, 5]]


def test_with_log_probabilities_every_token_comes_with_its_bytes() -> None:
    plain = delta("a", [Choice(1, None)], spell=lambda token: bytes([token])).delta
    assert not plain.token_bytes
    choice = Choice(1, -0.5, ((1, -0.5), (2, -1.0)))
    told = delta("a", [choice], spell=lambda token: bytes([token])).delta
    assert dict(told.token_bytes) == {1: b"\x01", 2: b"\x02"}
