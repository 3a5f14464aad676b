"""What a conversation sends, and what becomes of its turns; no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cairn import ChunkRef, InvalidRequest, Kept, Result, ReuseReport, SegmentReport, Text, Timings, Tokens, Usage
from cairn.client.conversation import BaseConversation


class Sent:
    """Requests as they were sent; ``answer`` gives one its result."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], list[Any], dict[str, Any]]] = []
        self._finished: list[Callable[[Result], None]] = []

    def __call__(
        self, segments: Sequence[Any], whole: Sequence[Any], finished: Callable[[Result], None], options: Any
    ) -> int:
        self.calls.append((list(segments), list(whole), dict(options)))
        self._finished.append(finished)
        return len(self.calls)

    def answer(self, call: int = -1, *, kept: bool = True, registered: bool = True, order: Sequence[int] = ()) -> None:
        segments, _, _ = self.calls[call]
        stood = [
            SegmentReport(f"id{at}", "", "context", 1, 1, "device", 0, 0, "exact_context", "", given_index=at)
            for at in order or range(len(segments))
        ]
        turn = Kept(f"turn{len(self.calls)}", registered, "resident", "", (1, 2))
        self._finished[call](
            Result(
                request_id="",
                text="so",
                token_ids=(3, len(self.calls)),
                logprobs=(),
                finish_reason="stop",
                usage=Usage(0, 0, 0, 0),
                reuse=ReuseReport("exact", "exact_context", tuple(stood)),
                timings=Timings(),
                seed=0,
                model_name="",
                kept=turn if kept else None,
            )
        )


def talk(sent: Sent, documents: Sequence[Any] = ("d",), **options: Any) -> BaseConversation[int]:
    return BaseConversation[int](sent, "s", documents, {"max_tokens": 5}, **options)


OPENING = [Text("s", "system_prompt", "system"), Text("d", "context", "")]


def test_the_first_request_brings_all_and_the_next_names_it() -> None:
    sent = Sent()
    it = talk(sent)
    assert it.stream("one?", seed=3) == 1
    asked = Text("one?", "query", "user")
    assert sent.calls[0] == ([*OPENING, asked], [*OPENING, asked], {"max_tokens": 5, "seed": 3, "keep": True})
    assert not it.turns
    sent.answer()
    assert [(turn.id, turn.question, turn.answer, turn.token_ids) for turn in it.turns] == [
        ("turn1", "one?", "so", (1, 2, 3, 1))
    ]
    it.stream("two?")
    names, whole, options = sent.calls[1]
    assert names == [ChunkRef("id0"), ChunkRef("id1"), ChunkRef("turn1"), Text("two?", "query", "user")]
    assert whole == [*OPENING, Tokens((1, 2, 3, 1), "turn"), Text("two?", "query", "user")]
    assert options == {"max_tokens": 5, "keep": True, "order": "given"}


def test_what_is_not_registered_is_sent_whole() -> None:
    sent = Sent()
    it = talk(sent)
    it.stream("one?")
    sent.answer(registered=False)
    it.stream("two?")
    assert sent.calls[1][0] == sent.calls[1][1] and isinstance(sent.calls[1][0][2], Tokens)
    sent.answer()
    it.stream("three?")
    assert [type(segment) for segment in sent.calls[2][0]] == [Text, Text, Tokens, Tokens, Text]
    it.branch(0).stream("four?")
    assert [type(segment) for segment in sent.calls[3][0]] == [ChunkRef, ChunkRef, Text]


def test_documents_stay_in_the_order_in_which_they_stood_first() -> None:
    sent = Sent()
    it = talk(sent, ["a", "b"])
    it.stream("one?", order="canonical")
    sent.answer(order=(0, 2, 1))
    it.stream("two?", order="canonical")
    names, whole, options = sent.calls[1]
    assert names[:3] == [ChunkRef("id0"), ChunkRef("id2"), ChunkRef("id1")]
    assert [segment.text for segment in whole[:3]] == ["s", "b", "a"] and options["order"] == "given"


def test_an_answer_of_nothing_is_no_turn() -> None:
    sent = Sent()
    it = talk(sent)
    it.stream("one?")
    sent.answer(kept=False)
    assert not it.turns and it.messages == [{"role": "system", "content": "s"}]


def test_another_answer_takes_the_place_of_the_first_once_it_is_there() -> None:
    sent = Sent()
    it = talk(sent, role="", system_role="", document_role="document")
    for question in ("one?", Tokens([7, 8])):
        it.stream(question)
        sent.answer()
    assert sent.calls[0][0] == [Text("s", "system_prompt"), Text("d", "context", "document"), Text("one?", "query")]
    other = it.branch()
    it.stream_retry(seed=1)
    assert sent.calls[2][0][-1] == Tokens([7, 8]) and len(it.turns) == 2 and it.turns[1].id == "turn2"
    sent.answer()
    assert [turn.id for turn in it.turns] == ["turn1", "turn3"] and it.turns[1].question == ""
    it.stream_edit(-2, "else?")
    sent.answer()
    assert [turn.question for turn in it.turns] == ["else?"]
    assert [turn.id for turn in other.turns] == ["turn1", "turn2"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: BaseConversation[int](Sent(), "s", "document", {}),
        lambda: BaseConversation[int](Sent(), "s", (), {"reuse": "independent"}),
        lambda: BaseConversation[int](Sent(), "s", (), {"cache": "bypass"}),
        lambda: talk(Sent()).stream_retry(),
        lambda: talk(Sent()).stream_edit(0, "x"),
        lambda: talk(Sent()).branch(1),
    ],
)
def test_what_makes_no_sense_is_refused_before_it_is_sent(make: Callable[[], Any]) -> None:
    with pytest.raises(InvalidRequest):
        make()
