"""The loop of decode steps on a scripted runner: at once, or one step ahead where nothing but the argmax is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decode_service.decoding import Decoding, takes_argmax
from decode_service.sequence import Sequence, State
from decode_service.step_plan import Rows
from engine.sampling.params import Choice
from tests.decode_service.scheduled import request

PLAN = object()


class Runner:
    """Step ``n`` gives row ``r`` the token ``10 * n + r``."""

    def __init__(self, runs_ahead: bool) -> None:
        self.runs_ahead = runs_ahead
        self.sources: list[list[int]] = []
        self.waited: list[int] = []

    def decode(self, sources: list[int], sequences: list[Any]) -> Any:
        assert len(sources) == len(sequences)
        self.sources.append(list(sources))
        number, rows = len(self.sources), len(sources)

        def wait() -> list[int]:
            self.waited.append(number)
            return [10 * number + row for row in range(rows)]

        return SimpleNamespace(plan=PLAN, wait=wait, logits=lambda: torch.full((rows, 4), float(number)))


class Sampler:
    def accept(self, token_id: int) -> Choice:
        return Choice(token_id, None)

    def choose(self, logits: torch.Tensor) -> Choice:
        return Choice(int(logits[0]), -0.5)


class Loop:
    def __init__(self, runs_ahead: bool) -> None:
        self.runner: Any = Runner(runs_ahead)
        self.stepped: list[int] = []
        self.begun: list[Any] = []
        residents: Any = SimpleNamespace(pool=SimpleNamespace(page_size=4), moves=0)
        metrics: Any = SimpleNamespace(stepped=lambda plan, sequences: self.stepped.append(len(sequences)))
        runner: Any = self.runner
        self.decoding = Decoding(runner, residents, metrics, self.begun.append)

    def step(self, *sequences: Sequence) -> list[tuple[str, int]]:
        rows = [Rows(sequence, sequence.tail_tokens, 1) for sequence in sequences]
        return self.taken(self.decoding.step(rows))

    def taken(self, tokens: Any) -> list[tuple[str, int]]:
        for token in tokens:
            token.sequence.generated.append(token.choose().token_id)
        return [(token.sequence.request_id, token.sequence.generated[-1]) for token in tokens]


def sequence(name: str, **params: Any) -> Sequence:
    made = request(name, max_tokens=100)
    made.sampler = Sampler()  # type: ignore[assignment]
    made.params = type(made.params)(max_tokens=100, **params)
    made.generated.append(5)
    return made


def test_a_runner_that_does_not_run_ahead_gives_each_steps_tokens_at_once() -> None:
    loop, a, b = Loop(runs_ahead=False), sequence("a"), sequence("b")
    assert loop.step(a, b) == [("a", 10), ("b", 11)] and loop.step(b) == [("b", 20)]
    assert loop.runner.sources == [[5, 5], [11]] and loop.stepped == [2, 1] and len(loop.begun) == 2


def test_one_step_ahead_takes_its_input_from_the_step_before() -> None:
    loop, a, b = Loop(runs_ahead=True), sequence("a"), sequence("b")
    assert loop.step(a) == [] and loop.runner.waited == []
    assert loop.step(b, a) == [("a", 10)]
    assert loop.runner.sources == [[5], [5, ~0]], "row 0 of the step before, by its place"
    assert loop.step(a) == [("b", 20), ("a", 21)] and loop.runner.sources[-1] == [~1]
    assert loop.taken(loop.decoding.drain()) == [("a", 30)] and loop.decoding.drain() == []


def test_who_ended_meanwhile_gets_no_token() -> None:
    loop, a, b = Loop(runs_ahead=True), sequence("a"), sequence("b")
    loop.step(a, b)
    a.state = State.ENDED
    assert loop.step(b) == [("b", 11)] and loop.stepped == [1]


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"logprobs": True}])
def test_what_is_drawn_ends_running_ahead(params: dict[str, Any]) -> None:
    loop, greedy, drawn = Loop(runs_ahead=True), sequence("g"), sequence("d", **params)
    assert takes_argmax(greedy) and not takes_argmax(drawn)
    loop.step(greedy)
    assert loop.step(greedy, drawn) == [("g", 10)], "first what is in flight"
    assert len(loop.runner.sources) == 1
    assert loop.step(greedy, drawn) == [("g", 20), ("d", 2)], "a token of the argmax beside one of the logits"
    assert loop.runner.sources[-1] == [10, 5]


def test_no_rows_end_what_is_in_flight() -> None:
    loop, a = Loop(runs_ahead=True), sequence("a")
    loop.step(a)
    assert loop.step() == [("a", 10)] and loop.step() == [] and len(loop.runner.sources) == 1
