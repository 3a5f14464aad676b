"""A real model whose rows share steps, through both services: the answers of pieces alone, in every reuse mode.

No runner of the CPU packs rows; the one here is the eager runner with what its attention can do anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.decode_service.models import loaded, tokens
from tests.decode_service.packing import PackingRunner, packing
from tests.decode_service.pair import Pair, pair

DOCUMENTS = [tokens(1, 40), tokens(2, 90), tokens(3, 17)]


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), packing(loaded(folder, "decode")), tmp_path / "packed") as services:
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
