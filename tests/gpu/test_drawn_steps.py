"""Tokens drawn on the device: ahead or waited for, in any slot, beside anybody, the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from engine.plan import StepSequence
from engine.run.pieces import GREEDY
from engine.run.protocol import PendingStep, StepRows
from engine.sampling.params import Choice, Draw, SamplingParams, SamplingRequest
from tests.engine.composer import Composer
from tests.gpu.engine_models import served
from tests.gpu.packing import Packing, Tail

pytestmark = pytest.mark.gpu

NAME = "qwen3-ratio4-128"
COUNT = 14  # tokens of an answer
KINDS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    SamplingParams(logprobs=True, top_logprobs=5),
    SamplingParams(temperature=1.3, top_k=20, seed=2, logprobs=True),
    SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    SamplingParams(temperature=0.7, min_p=0.1, seed=4, logit_bias=((5, 3.0), (7, -100.0))),
    SamplingParams(temperature=0.8, top_p=0.95, seed=2**62),
    SamplingParams(min_tokens=6, stop_token_ids=frozenset({3, 9})),
)


@dataclass
class Answer:
    """A request whose tail is prefilled, and what was drawn for it."""

    tail: Tail
    query: int  # tokens of the tail that are the query
    params: SamplingParams
    slot: int
    choices: list[Choice] = field(default_factory=list)
    begun: int = 0  # draws

    @property
    def request(self) -> SamplingRequest:
        return SamplingRequest(self.params, self.tail.token_ids[: self.query], self.params.stop_token_ids)

    def rows(self, *, named: bool) -> StepRows:
        """The query, or the row of the token drawn last: named by its slot, or as the token that was read."""
        draw = Draw(self.slot, self.begun, self.tail.start + self.query + self.begun)
        at = 0 if self.begun == 0 else self.query + self.begun - 1
        sources: Sequence[int] = self.tail.token_ids[: self.query]
        if self.begun:
            sources = [~self.slot if named else self.choices[-1].token_id]
        sequence = StepSequence(self.tail.context, self.tail.pages, at, len(sources), self.tail.start + at)
        self.begun += 1
        return StepRows(sequence, sources, draw)


def answers(pack: Packing, kinds: Sequence[SamplingParams] = KINDS) -> list[Answer]:
    contexts = pack.contexts((300, 17))
    made = []
    for index, params in enumerate(kinds):
        tail = pack.tail(contexts[index % len(contexts)], 10 + index + COUNT, 30 + index)
        made.append(Answer(tail, 10 + index, params, index))
    return made


def take(step: PendingStep, members: Sequence[Answer]) -> None:
    for answer, choice in zip(members, step.wait(), strict=True):
        answer.choices.append(choice)


def alone(pack: Packing, answer: Answer) -> list[Choice]:
    """One at a time in slot 0, each token read before the next row is begun."""
    pack.runner.open(0, answer.request)
    single = Answer(answer.tail, answer.query, answer.params, 0)
    while len(single.choices) < COUNT:
        take(pack.runner.begin([single.rows(named=False)]), [single])
    return single.choices


def test_steps_ahead_of_their_tokens_draw_what_waited_ones_do() -> None:
    """Requests join two at a time while the others run; each step is begun before the last one is read."""
    pack = Packing(Composer(served(NAME), pages=1024))
    running = answers(pack)
    expected = [alone(pack, answer) for answer in running]
    for answer in running:
        pack.runner.open(answer.slot, answer.request)
    before: tuple[PendingStep, list[Answer]] | None = None
    step = 0
    while any(len(answer.choices) < COUNT for answer in running):
        members = [answer for answer in running if answer.slot // 2 <= step and answer.begun < COUNT]
        begun = (pack.runner.begin([answer.rows(named=True) for answer in members]), members) if members else None
        if before is not None:
            take(*before)
        before, step = begun, step + 1
    for answer, wanted in zip(running, expected, strict=True):
        assert answer.choices == wanted, answer.params


def test_two_slots_used_again_and_again() -> None:
    """What was drawn in a slot before, and in the other one, changes nothing."""
    pack = Packing(Composer(served(NAME), pages=1024, slots=2))
    requests = answers(pack)
    expected = [alone(pack, answer) for answer in requests]
    for shift in range(3):
        order = requests[shift:] + requests[:shift]
        for pair in zip(order[::2], order[1::2], strict=True):
            members = [Answer(a.tail, a.query, a.params, slot) for slot, a in enumerate(pair)]
            for answer in members:
                pack.runner.open(answer.slot, answer.request)
            for _ in range(COUNT):
                take(pack.runner.begin([answer.rows(named=True) for answer in members]), members)
            for answer in members:
                index = next(i for i, a in enumerate(requests) if a.tail is answer.tail)
                assert answer.choices == expected[index], answer.params


def test_a_row_put_off_a_step_takes_the_token_of_its_slot() -> None:
    """Others draw meanwhile, and a slot's neighbour is opened anew."""
    pack = Packing(Composer(served(NAME), pages=1024))
    first, second = answers(pack, KINDS[:2])
    expected = [alone(pack, answer) for answer in (first, second)]
    for answer in (first, second):
        pack.runner.open(answer.slot, answer.request)
    take(pack.runner.begin([first.rows(named=True), second.rows(named=True)]), [first, second])
    for _ in range(3):
        take(pack.runner.begin([second.rows(named=True)]), [second])
        pack.runner.open(5, GREEDY)
    for _ in range(COUNT - 1):
        take(pack.runner.begin([first.rows(named=True)]), [first])
    assert first.choices == expected[0]
    assert second.choices == expected[1][:4]
