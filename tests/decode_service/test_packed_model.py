"""A real model whose rows share steps, through both services: the answers of pieces alone, in every reuse mode.

No runner of the CPU packs rows; the one here is the eager runner with what its attention can do anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.kv.pool import PagedKVPool
from engine.run.choice import make_attention
from engine.run.eager.runner import EagerRunner
from engine.run.protocol import DrawnStep, StepRows
from engine.run.room import StepRoom
from engine.served import ServedModel
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair

STEP_ROWS = 40
DOCUMENTS = [tokens(1, 40), tokens(2, 90), tokens(3, 17)]


class PackingRunner(EagerRunner):
    """Rows of any requests in steps of ``STEP_ROWS``, read when the next one has begun."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.runs_ahead = True
        self.mixed = 0  # steps of rows that decode beside several of one prompt

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return False

    def room(self, *, decoding: bool) -> StepRoom:
        return StepRoom(STEP_ROWS)

    def begin(self, batch: Sequence[StepRows]) -> DrawnStep:
        plan = self._planner.plan(batch, piece_tokens=0)
        counts = [len(rows.sources) for rows in batch]
        assert sum(counts) <= STEP_ROWS
        self.mixed += batch[0].sources[0] < 0 and max(counts) > 1
        ids = [self._sampling.last(~source) if source < 0 else source for rows in batch for source in rows.sources]
        last = [sum(counts[: row + 1]) - 1 for row, rows in enumerate(batch) if rows.draw is not None]
        logits = self._forward(ids, plan, last or [0], row_multiple=1)[: len(last)]
        draws = [rows.draw for rows in batch if rows.draw is not None]
        return DrawnStep(plan, self._sampling.draw(logits, draws) if draws else [], logits)


class PackingModel(ServedModel):
    def make_runner(self, pool: PagedKVPool, **options: Any) -> Any:
        attention = make_attention(pool, self.borrowed, self.findings)
        slots = {name: options[name] for name in ("decode_buckets", "max_cascade_levels")}
        return PackingRunner(self.borrowed, pool, attention, piece_tokens=self.piece_tokens, **slots)


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    decode = loaded(folder, "decode")
    fields = {field.name: getattr(decode.served, field.name) for field in dataclasses.fields(ServedModel)}
    packing = dataclasses.replace(decode, served=PackingModel(**fields))
    with pair(loaded(folder, "prefill"), packing, tmp_path / "packed") as services:
        yield services


@pytest.fixture
def stepwise(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "stepwise") as services:
        yield services


def requests(reuse: str) -> list[tuple[list[Any], dict[str, Any]]]:
    """Over some of the documents in any order: greedy and sampled, penalised, computed here, long and short."""
    made: list[tuple[list[Any], dict[str, Any]]] = []
    for index in range(16):
        options: dict[str, Any] = {"max_tokens": 1 + 5 * index % 17, "reuse": reuse, "logprobs": True}
        if index % 3 == 0:
            options |= {"temperature": 0.9, "top_p": 0.9, "seed": index}
        if index % 4 == 0:
            options |= {"repetition_penalty": 1.2}
        if index % 5 == 0:
            options |= {"cache": "bypass"}
        order = [DOCUMENTS[place] for place in ((0, 1), (1, 0, 2), (2,), (0, 2, 1))[index % 4]]
        made.append(([*order, tokens(50 + index, (3, 70, 9)[index % 3])], options))
    return made


@pytest.mark.parametrize("reuse", ["exact", "anchored", "independent"])
def test_answers_are_those_of_pieces_alone(packed: Pair, stepwise: Pair, reuse: str) -> None:
    expected = [stepwise.generate(parts, **options) for parts, options in requests(reuse)]
    together = packed.together_each(requests(reuse))
    for want, got in zip(expected, together, strict=True):
        assert got.token_ids == want.token_ids
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
        assert got.usage.cached_tokens + got.usage.computed_tokens == want.usage.prompt_tokens
    runner = packed.decode.worker.runner
    assert isinstance(runner, PackingRunner) and runner.mixed > 3
    packed.check_idle()
