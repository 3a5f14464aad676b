"""Packed steps over a model's own code: the oracle's logits, in mixed steps, pieces and steps that decode."""

from __future__ import annotations

import pytest
import torch

from engine.model.borrowed import BorrowedModel
from engine.run.cuda.borrowed import CapturedModel
from engine.served import look_into
from tests import oracle
from tests.architectures import build_named
from tests.engine.composer import Composer
from tests.engine.run.torch_works import packed_runner

# Norms of every form, products with biases and without, experts, two ropes, no rope, tables that would change.
NAMES = (
    "qwen3-ratio2", "gemma2-softcap", "gemma3-two-ropes", "phi3-partial", "olmo2", "granite", "starcoder2",
    "cohere2-some-nope", "gpt-oss-sinks", "deepseek-v3-mla", "mixtral-moe", "llama-dynamic", "gpt-neox",
)  # fmt: skip


def words(seed: int, count: int) -> list[int]:
    return torch.randint(3, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def composer_of(name: str, monkeypatch: pytest.MonkeyPatch, **options: bool | int) -> Composer:
    served = look_into(BorrowedModel(build_named(name), name=name))
    composer = Composer(served, pages=256)
    model = CapturedModel.of(served.borrowed, served.findings)
    composer.runner = packed_runner(monkeypatch, model, composer.pool, slots=4, rows_max=64, **options)
    return composer


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_models_own_code_in_packed_steps_gives_the_oracles_logits(
    name: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    composer = composer_of(name, monkeypatch, together=together, piece_tokens=24)
    limit = composer.served.context_length_max
    sizes = (9, 31, 5) if limit > 100 else (3, 9, 2)
    chunks = [words(i, size) for i, size in enumerate(sizes)]
    moved = "exact" if composer.served.findings.rotation_refusal else "independent"
    requests = [(chunks, words(7, 6), "exact"), (chunks[::-1], words(8, 3), moved), (chunks[:1], words(9, 1), "exact")]
    for (parts, query, mode), (tokens, logits) in zip(requests, composer.generate(requests, 4), strict=True):
        expected, expected_logits = oracle.greedy(build_named(name), parts, query, mode, 4)
        assert tokens == expected
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
