"""Launching ahead changes nothing: the pipelined worker gives the stepwise worker's answers, whatever ends when."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from decode_service.decoding import LaunchingRunner
from engine.kv.pool import PagedKVPool
from engine.plan import CascadePlan, StepSequence
from engine.run.eager.runner import ModelRunner
from engine.served import ServedModel
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair

DOCUMENT = tokens(1, 40)


class Late:
    """Tokens that are there already, and only told when asked for."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    def wait(self) -> list[int]:
        return self._token_ids


class LaunchingModelRunner(ModelRunner):
    """The CPU's runner with ``launch``: a row may name the token that the last step sampled, as on a device."""

    launches = 0
    _sampled: list[int] = []  # noqa: RUF012  # replaced, never changed

    def launch(self, sources: Sequence[int], sequences: Sequence[StepSequence]) -> tuple[Late, CascadePlan]:
        self.launches += 1
        ids = [source if source >= 0 else self._sampled[~source] for source in sources]
        logits, plan = self.decode(ids, sequences)
        self._sampled = logits.argmax(dim=-1).tolist()
        return Late(self._sampled), plan

    def prefill_piece(self, *args: Any, **options: Any) -> Any:
        self._sampled = [-1] * 64  # as on a device, where a prefill's own argmax overwrites what was sampled
        return super().prefill_piece(*args, **options)


@dataclasses.dataclass(frozen=True)
class LaunchingModel(ServedModel):
    def make_runner(self, pool: PagedKVPool, **options: Any) -> ModelRunner:
        plain = super().make_runner(pool, **options)
        return LaunchingModelRunner(self.borrowed, pool, plain.attention, piece_tokens=self.piece_tokens, **options)


@pytest.fixture
def pipelined(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    decode = loaded(folder, "decode")
    fields = {field.name: getattr(decode.served, field.name) for field in dataclasses.fields(ServedModel)}
    launching = dataclasses.replace(decode, served=LaunchingModel(**fields))
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
            options |= {"temperature": 0.8, "seed": index}
        made.append(([DOCUMENT, tokens(50 + index, 1 + index % 9)], options))
    return made


def test_answers_are_those_of_waiting_for_every_step(pipelined: Pair, stepwise: Pair) -> None:
    assert isinstance(pipelined.decode.worker.runner, LaunchingRunner)
    assert not isinstance(stepwise.decode.worker.runner, LaunchingRunner)
    expected = [stepwise.generate(parts, **options) for parts, options in requests()]
    alone = [pipelined.generate(parts, **options) for parts, options in requests()]
    together = pipelined.together_each(requests())
    for want, one, many in zip(expected, alone, together, strict=True):
        assert one.token_ids == many.token_ids == want.token_ids
        assert one.finish_reason == many.finish_reason == want.finish_reason
    assert pipelined.decode.worker.runner.launches > 20
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
