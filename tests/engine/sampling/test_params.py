"""Sampling parameters: each out of range is named, and which tokens end an answer."""

from __future__ import annotations

from typing import Any

import pytest

from engine.sampling.params import SEED_MAX, SamplingParams

NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "wrong", "right"),
    [
        ("temperature", (-0.1, 100.1, NAN), (0.0, 100.0)),
        ("top_p", (0.0, 1.1, NAN), (1e-6, 1.0)),
        ("top_k", (-1,), (0, 10**6)),
        ("min_p", (-0.1, 1.1, NAN), (0.0, 1.0)),
        ("frequency_penalty", (-2.1, 2.1, NAN), (-2.0, 2.0)),
        ("presence_penalty", (-2.1, 2.1, NAN), (-2.0, 2.0)),
        ("repetition_penalty", (0.0, 101.0, NAN), (0.1, 100.0)),
        ("max_tokens", (0, -1), (1, 10**6)),
        ("min_tokens", (-1, 129), (0, 128)),
        ("seed", (-1, SEED_MAX + 1), (0, SEED_MAX)),
        ("stop", (("",), ("a",) * 17), ((), ("a",) * 16)),
        ("top_logprobs", (-1, 21, 1), (0,)),
        ("logit_bias", (((-1, 1.0),), ((1, NAN),), ((1, 101.0),), ((1, 1.0), (1, 2.0))), ((), ((3, -100.0),))),
    ],
)
def test_a_field_out_of_range_is_named(field: str, wrong: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^sampling\.{field}: .*must be"):
            SamplingParams(**{field: value})
    for value in right:
        assert getattr(SamplingParams(**{field: value}), field) == value


def test_stop_strings_are_not_repeated_in_the_complaint() -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(stop=("secret", ""))
    assert "secret" not in str(caught.value)


def test_what_ends_an_answer() -> None:
    assert SamplingParams(stop_token_ids=frozenset({5})).stops_at(frozenset({1})) == {1, 5}
    assert SamplingParams(stop_token_ids=frozenset({5}), ignore_eos=True).stops_at(frozenset({1})) == {5}


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({}, True),
        ({"top_p": 0.5, "min_tokens": 0}, True),
        ({"temperature": 0.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"repetition_penalty": 1.1}, False),
    ],
)
def test_plain_greedy_is_the_argmax_as_it_is(fields: dict[str, Any], plain: bool) -> None:
    assert SamplingParams(**fields).plain_greedy is plain
