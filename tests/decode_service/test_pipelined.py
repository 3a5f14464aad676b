"""Launching ahead changes nothing: the pipelined worker gives the stepwise worker's answers, whatever ends when."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.kv.pool import PagedKVPool
from engine.run.eager.runner import EagerRunner
from engine.run.protocol import StepRows
from engine.sampling.params import Choice
from engine.served import ServedModel
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair

DOCUMENT = tokens(1, 40)


class AheadModel(ServedModel):
    """Its steps are read when the next one has begun, as on a device; until then their tokens are only named."""

    def make_runner(self, pool: PagedKVPool, **options: Any) -> Any:
        made = super().make_runner(pool, **options)
        assert not made.runs_ahead and isinstance(made, EagerRunner)
        runner: Any = made
        runner.runs_ahead = True
        runner.unread = runner.unread_max = 0
        begin = runner.begin

        def counted(batch: Sequence[StepRows]) -> Any:
            step = begin(batch)
            runner.unread += 1
            runner.unread_max = max(runner.unread, runner.unread_max)

            def wait() -> list[Choice]:
                runner.unread -= 1
                return cast(list[Choice], step.wait())

            return SimpleNamespace(plan=step.plan, wait=wait)

        runner.begin = counted
        return runner


@pytest.fixture
def pipelined(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    decode = loaded(folder, "decode")
    fields = {field.name: getattr(decode.served, field.name) for field in dataclasses.fields(ServedModel)}
    launching = dataclasses.replace(decode, served=AheadModel(**fields))
    with pair(loaded(folder, "prefill"), launching, tmp_path / "pipelined") as services:
        yield services


@pytest.fixture
def stepwise(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "stepwise") as services:
        yield services


def requests() -> list[tuple[list[Any], dict[str, Any]]]:
    """Lengths 1 to 20, some that stop at a token, some sampled, so that batches change at every step."""
    made: list[tuple[list[Any], dict[str, Any]]] = []
    for index in range(24):
        options: dict[str, Any] = {"max_tokens": 1 + index % 20}
        if index % 5 == 0:
            options |= {"stop_token_ids": list(range(0, 211, 3))}
        if index % 7 == 0:
            options |= {"temperature": 0.8, "seed": index, "logprobs": True}
        if index % 11 == 0:
            options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
        made.append(([DOCUMENT, tokens(50 + index, 1 + index % 9)], options))
    return made


def test_answers_are_those_of_waiting_for_every_step(pipelined: Pair, stepwise: Pair) -> None:
    assert pipelined.decode.worker.runner.runs_ahead
    assert not stepwise.decode.worker.runner.runs_ahead
    expected = [stepwise.generate(parts, **options) for parts, options in requests()]
    alone = [pipelined.generate(parts, **options) for parts, options in requests()]
    together = pipelined.together_each(requests())
    for want, one, many in zip(expected, alone, together, strict=True):
        assert one.token_ids == many.token_ids == want.token_ids
        assert one.finish_reason == many.finish_reason == want.finish_reason
    assert cast(Any, pipelined.decode.worker.runner).unread_max == 2
    pipelined.check_idle()
    tokens_made = sum(len(result.token_ids) for result in (*alone, *together))
    assert pipelined.metric("cairn_generation_tokens_total") == tokens_made


def test_an_abandoned_stream_in_flight_gives_its_pages_back(pipelined: Pair) -> None:
    for index in range(6):
        stream = pipelined.client.generate([DOCUMENT, tokens(index, 4)], max_tokens=200, ignore_eos=True)
        next(iter(stream))
        stream.close()
    assert len(pipelined.generate([DOCUMENT, tokens(9, 4)], max_tokens=5).token_ids) == 5
    pipelined.check_idle()


def test_a_request_that_joins_does_not_disturb_what_is_in_flight(pipelined: Pair, stepwise: Pair) -> None:
    expected = stepwise.generate([DOCUMENT, tokens(70, 5)], 150)
    stream = pipelined.client.generate([DOCUMENT, tokens(70, 5)], max_tokens=150, ignore_eos=True)
    deltas = iter(stream)
    next(deltas)
    for index in range(10):
        pipelined.generate([DOCUMENT, tokens(80 + index, 3)], 2)
    ids = [token for delta in deltas for token in delta.token_ids]
    assert stream.result.token_ids == expected.token_ids
    assert len(ids) < 150
