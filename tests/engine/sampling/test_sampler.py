"""Sampling: ties, seeds, truncation and penalties, against distributions computed by hand."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from engine.sampling.params import SamplingParams
from engine.sampling.sampler import Sampler


def sampler(prompt: tuple[int, ...] = (), **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), prompt, frozenset([0]))


def draws(count: int, logits: torch.Tensor, **params: Any) -> list[int]:
    chooser = sampler(temperature=params.pop("temperature", 1.0), **params)
    return [chooser.choose(logits).token_id for _ in range(count)]


def test_greedy_takes_the_lowest_index_among_equals() -> None:
    assert sampler().choose(torch.tensor([1.0, 3.0, 3.0, 2.0])).token_id == 1


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert draws(50, logits, seed=5) == draws(50, logits, seed=5)
    assert draws(50, logits, seed=5) != draws(50, logits, seed=6)


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    counts = torch.bincount(torch.tensor(draws(4000, logits, seed=1)), minlength=4) / 4000
    torch.testing.assert_close(counts, torch.softmax(logits, 0), atol=0.03, rtol=0)


def test_truncation_leaves_out_what_it_says() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert set(draws(300, logits, top_k=2)) == {0, 1}
    assert set(draws(300, logits, top_p=0.65)) == {0, 1}
    assert set(draws(300, logits, min_p=0.45)) == {0, 1, 2}
    assert set(draws(300, logits, top_k=1, temperature=5.0)) == {0}


def test_penalties_and_min_tokens() -> None:
    logits = torch.tensor([5.0, 4.9, 1.0])
    assert sampler(min_tokens=1).choose(logits).token_id == 1  # 0 would stop
    repeated = sampler(frequency_penalty=1.0, max_tokens=4)
    assert [repeated.choose(logits).token_id for _ in range(3)] == [0, 1, 0]
    assert sampler(prompt=(0,), repetition_penalty=2.0).choose(logits).token_id == 1


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.tensor([0.0, 2.0])
    choice = sampler(logprobs=True, temperature=3.0, top_k=1).choose(logits)
    assert choice.logprob == pytest.approx(float(torch.log_softmax(logits, 0)[1]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("max_tokens", 0), ("min_p", 2), ("seed", -1)],
)
def test_a_field_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"sampling\.{field}"):
        SamplingParams(**cast(Any, {field: value}))
