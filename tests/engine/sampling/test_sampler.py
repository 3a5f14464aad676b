"""Slots: a draw follows from its row, request, index and position alone; ties, seeds, penalties, reports, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.sampling.params import Choice, Draw, SamplingParams, SamplingRequest
from engine.sampling.sampler import HostSlots

VOCABULARY = 100


def request(prompt: tuple[int, ...] = (), generated: tuple[int, ...] = (), **params: Any) -> SamplingRequest:
    params.setdefault("max_tokens", 1000)
    return SamplingRequest(SamplingParams(**params), prompt, frozenset([0]), generated)


def draws(count: int, row: torch.Tensor, **params: Any) -> list[int]:
    slots = HostSlots(1, len(row))
    slots.open(0, request(**params))
    return [slots.draw(row[None], [Draw(0, index, 50 + index)])[0].token_id for index in range(count)]


def random_rows(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def test_greedy_takes_the_lowest_index_among_equals() -> None:
    assert draws(1, torch.tensor([1.0, 3.0, 3.0, 2.0])) == [1]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    row = random_rows(1)[0]
    assert draws(50, row, seed=5, temperature=1.0) == draws(50, row, seed=5, temperature=1.0)
    assert draws(50, row, seed=5, temperature=1.0) != draws(50, row, seed=6, temperature=1.0)


def test_draws_are_distributed_as_the_softmax() -> None:
    """Chi-squared over 4000 draws at as many positions, below its 99.9th percentile for 19 degrees of freedom."""
    row = random_rows(1, vocabulary=20)[0] / 2
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 20, "min_p": 1e-9, "top_p": 0.999999},
    ]
    for params in kinds:
        counts = np.bincount(draws(4000, row, seed=11, **params), minlength=20)
        expected = torch.softmax(row.double() / params["temperature"], 0).numpy() * 4000
        assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_a_draw_is_the_same_in_any_slot_batch_and_place_and_resumed() -> None:
    params: dict[str, Any] = {
        "temperature": 1.3,
        "top_p": 0.97,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.4,
        "seed": 9,
    }
    alone, rows = HostSlots(1, VOCABULARY), random_rows(12)
    alone.open(0, request((3, 4), **params))
    expected = [alone.draw(row[None], [Draw(0, i, 70 + i)])[0].token_id for i, row in enumerate(rows)]

    crowd = HostSlots(9, VOCABULARY)
    for slot in range(9):
        crowd.open(slot, request(temperature=0.7, seed=slot))
    resumed = request((3, 4), tuple(expected[:5]), **params)
    crowd.open(6, resumed)
    for index in range(5, 12):
        place = index % 4
        batch = random_rows(4, seed=index)
        batch[place] = rows[index]
        slots = [0, 1, 2, 3]
        slots[place] = 6
        choices = crowd.draw(batch, [Draw(slot, index, 70 + index) for slot in slots])
        assert choices[place].token_id == expected[index] == crowd.last(6)


def test_truncation_leaves_out_what_it_says() -> None:
    row = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert set(draws(200, row, temperature=1.0, top_k=2)) == {0, 1}
    assert set(draws(200, row, temperature=1.0, top_p=0.65)) == {0, 1}
    assert set(draws(200, row, temperature=1.0, top_k=2, top_p=0.5)) == {0}, "0.4 of 0.7 is more than half"
    assert set(draws(200, row, temperature=1.0, min_p=0.45)) == {0, 1, 2}
    assert set(draws(200, row, temperature=5.0, top_k=1)) == {0}


def test_penalties_count_what_was_drawn_and_a_slot_opened_anew_starts_anew() -> None:
    row = torch.tensor([5.0, 4.9, 1.0])[None]
    slots = HostSlots(1, 3)
    for _ in range(2):
        slots.open(0, request(frequency_penalty=1.0))
        assert [slots.draw(row, [Draw(0, i, i)])[0].token_id for i in range(3)] == [0, 1, 0]
    slots.open(0, request((0,), repetition_penalty=2.0))
    assert slots.draw(row, [Draw(0, 0, 0)])[0].token_id == 1
    slots.open(0, request((0,), presence_penalty=0.5))
    assert [slots.draw(row, [Draw(0, i, i)])[0].token_id for i in range(2)] == [0, 1], "not those of the prompt"


def test_min_tokens_bias_and_allowed_tokens() -> None:
    row = torch.tensor([5.0, 4.0, 3.0, 2.0])[None]
    slots = HostSlots(1, 4)
    slots.open(0, request(min_tokens=2))
    assert [slots.draw(row, [Draw(0, i, i)])[0].token_id for i in range(3)] == [1, 1, 0]
    slots.open(0, request(logit_bias=((3, 3.5), (0, -100.0))))
    assert slots.draw(row, [Draw(0, 0, 0)])[0].token_id == 3
    slots.open(0, SamplingRequest(SamplingParams(logit_bias=((3, 3.5), (0, -100.0))), masked=True))
    slots.allow([0], np.array([[0b0110]], np.int32))
    assert slots.draw(row, [Draw(0, 1, 1)])[0].token_id == 1
    slots.allow([0], np.array([[0]], np.int32))
    assert slots.draw(row, [Draw(0, 1, 1)])[0] == Choice(-1, None)
    slots.open(0, request())
    assert slots.draw(row, [Draw(0, 0, 0)])[0].token_id == 0, "opened anew"


def test_reports_are_of_the_models_own_distribution() -> None:
    row = random_rows(1)[0]
    row[7] = row[3] = row.max() + 0.5
    slots = HostSlots(1, VOCABULARY)
    slots.open(0, request(temperature=3.0, top_k=5, logprobs=True, top_logprobs=20, logit_bias=((9, 50.0),)))
    choice = slots.draw(row[None], [Draw(0, 0, 4)])[0]
    expected = torch.log_softmax(row.double(), 0)
    assert choice.token_id == 9
    assert choice.logprob == pytest.approx(float(expected[9]), abs=1e-9)
    values, _ = expected.topk(20)
    assert [value for _, value in choice.top] == pytest.approx(values.tolist(), abs=1e-9)
    assert [token for token, _ in choice.top[:2]] == [3, 7], "of equals the lowest id"


def test_several_threads_draw_what_one_does() -> None:
    """At a vocabulary where each row is one thread's."""
    rows, found = random_rows(5, vocabulary=70_000), []
    kept = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            slots = HostSlots(5, 70_000)
        finally:
            torch.set_num_threads(kept)
        for slot in range(5):
            slots.open(slot, request(temperature=1.0, seed=slot, logprobs=slot != 2, top_logprobs=2 * (slot != 2)))
        found.append(slots.draw(rows, [Draw(slot, 0, 9) for slot in range(5)]))
    assert found[0] == found[1] and found[0][2].logprob is None and len(found[0][3].top) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_no_number_to_choose_by_gives_no_token(temperature: float) -> None:
    slots = HostSlots(1, 2)
    slots.open(0, request(temperature=temperature, logprobs=True))
    for row in ([1.0, float("nan")], [float("-inf")] * 2):
        assert slots.draw(torch.tensor([row]), [Draw(0, 0, 0)]) == [Choice(-1, None)]
    assert slots.last(0) == 0, "what the next step reads is a token"
