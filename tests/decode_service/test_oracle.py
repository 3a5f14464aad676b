"""Greedy answers through both services equal transformers' own under the mode's mask and positions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import oracle
from tests.decode_service.models import loaded, model_dir, oracle_model, tokens
from tests.decode_service.pair import Pair, pair

PAGE = 16
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 37)
MODES = ("exact", "anchored", "independent")
OTHERS = ("llama-ratio8", "qwen2-ratio7", "gemma", "phi3")
COUNT = 5


def compositions(seed: int, count: int) -> list[tuple[list[list[int]], list[int]]]:
    """Random chunks and a query each; every second one repeats a chunk, every third one is another one reordered."""
    draw = random.Random(seed)
    made: list[tuple[list[list[int]], list[int]]] = []
    for index in range(count):
        chunks = [tokens(draw.randrange(1000), draw.choice(LENGTHS)) for _ in range(draw.randint(1, 6))]
        if index % 2:
            chunks[-1] = chunks[0]
        if index % 3 == 2:
            chunks = draw.sample(made[-1][0], len(made[-1][0]))
        made.append((chunks, tokens(5000 + index, draw.choice(LENGTHS))))
    return made


def check(services: Pair, folder: Path, mode: str, seed: int, count: int) -> None:
    cases = compositions(seed, count)
    model = oracle_model(folder)
    results = services.together([[*chunks, query] for chunks, query in cases], COUNT, reuse=mode, logprobs=True)
    for (chunks, query), result in zip(cases, results, strict=True):
        expected, logits = oracle.greedy(model, chunks, query, mode, COUNT)
        assert list(result.token_ids) == expected, (mode, [len(c) for c in chunks], len(query))
        logprobs = logits.log_softmax(-1).gather(1, logits.argmax(-1, keepdim=True))[:, 0].tolist()
        assert result.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_random_compositions(services: Pair, folder: Path, mode: str) -> None:
    check(services, folder, mode, seed=MODES.index(mode), count=9)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tmp_path: Path, name: str) -> None:
    folder = model_dir(tmp_path / name, name)
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store") as services:
        for mode in MODES:
            check(services, folder, mode, seed=10 + MODES.index(mode), count=4)
        services.check_idle()
