"""Replies whose text is told apart: every token once, calls and reasoning in their fields, and how an answer ends."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from decode_service.api.replies import Replies
from decode_service.scheduling.sequence import Event, Finished, FinishReason
from protos import decode_pb2
from tests.decode_service.api.test_replies import _complete, events_of
from tests.fakes import codec
from tests.text.chat.parsing.reading import TOOLS
from text.answer import AnswerText

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris 🍵"}}\n</tool_call>'
ANSWER = f"<think>Hm, 茶.</think>\nI look. {CALL}\n{CALL}"


@dataclass(frozen=True)
class Told:
    text: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    tokens: tuple[int, ...]
    reason: str
    broken: bool


def told(batches: list[list[Event]], *stop: str) -> Told:
    parser = codec().answers.parser(TOOLS)
    replies = Replies(AnswerText(codec().stream(), stop), parser=parser, stop=lambda: None, complete=_complete, index=1)
    said = [reply for batch in batches for reply in replies.of(batch)]
    deltas = [reply.delta for reply in said[:-1]]
    assert all(delta.index == 1 for delta in deltas) and replies.over
    calls: dict[int, decode_pb2.ToolCallDelta] = {}
    for delta in deltas:
        for new in delta.tool_calls:
            call = calls.setdefault(new.index, decode_pb2.ToolCallDelta(id=new.id, name=new.name))
            assert new.id in ("", call.id) and new.name in ("", call.name)
            call.arguments += new.arguments
    assert len({call.id for call in calls.values()}) == len(calls)
    end = said[-1].complete
    return Told(
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        tuple((call.name, call.arguments) for call in calls.values()),
        tuple(token for delta in deltas for token in delta.token_ids),
        end.finish_reason,
        end.chat.tool_calls_broken,
    )


def test_whatever_comes_together_the_same_is_told_and_every_token_comes_once() -> None:
    events, draw = [*events_of(ANSWER), Finished(FinishReason.STOP)], random.Random(5)
    call = ("get_weather", '{"city": "Paris 🍵"}')
    meant = Told("I look.", "Hm, 茶.", (call, call), tuple(codec().encode(ANSWER)), "tool_calls", broken=False)
    for _ in range(20):
        cuts = sorted({0, len(events), *draw.sample(range(1, len(events)), draw.randint(0, 12))})
        assert told([events[a:b] for a, b in itertools.pairwise(cuts)]) == meant


@pytest.mark.parametrize("at", range(0, len(ANSWER), 7))
def test_an_answer_cut_off_keeps_what_came_of_it(at: int) -> None:
    events = [*events_of(ANSWER[:at]), Finished(FinishReason.LENGTH)]
    found = told([[event] for event in events])
    assert found.reason == "length" and found.tokens == tuple(codec().encode(ANSWER[:at]))
    for name, arguments in found.calls:
        assert name == "get_weather" and '{"city": "Paris 🍵"}'.startswith(arguments)


def test_an_answer_without_a_whole_call_has_stopped() -> None:
    broken = "I look. <tool_call> no"
    assert told([[*events_of(broken), Finished(FinishReason.STOP)]]) == Told(
        broken, "", (), tuple(codec().encode(broken)), "stop", broken=True
    )
    begun = CALL[:60]
    found = told([[*events_of(begun), Finished(FinishReason.STOP)]])
    assert found.reason == "stop" and found.broken and found.calls == (("get_weather", begun[begun.index('{"city') :]),)


def test_a_stop_string_ends_an_answer_in_a_call_and_what_was_held_back_comes() -> None:
    found = told([[event] for event in [*events_of(ANSWER), Finished(FinishReason.STOP)]], "</tool_call>")
    assert found.calls == (("get_weather", '{"city": "Paris 🍵"}'),) and found.reason == "tool_calls"
    held = told([[event] for event in [*events_of("a <tool_c b"), Finished(FinishReason.STOP)]], " b")
    assert (held.text, held.reason) == ("a <tool_c", "stop")
