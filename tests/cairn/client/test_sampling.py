"""Options of sampling as a request carries them: what is left out is left to the service."""

from __future__ import annotations

from typing import Any

import pytest

from cairn.client.errors import InvalidRequest
from cairn.client.sampling import SamplingOptions, sampling_params
from protos import decode_pb2

EACH: dict[str, Any] = {
    "max_tokens": 7,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.25,
    "frequency_penalty": -0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.5,
    "min_tokens": 2,
    "stop": [".", "!"],
    "stop_token_ids": [4, 5],
    "include_stop": True,
    "ignore_eos": True,
    "seed": 9,
    "n": 3,
    "logprobs": True,
    "top_logprobs": 20,
    "prompt_logprobs": 0,
    "logit_bias": {5: -1.5},
    "keep_special_tokens": True,
}


def test_every_option_arrives() -> None:
    assert EACH.keys() == SamplingOptions.__annotations__.keys()
    made = sampling_params(**EACH)
    for name, value in EACH.items():
        found = getattr(made, name)
        assert (dict(found) if name == "logit_bias" else list(found) if isinstance(value, list) else found) == value
    assert made.HasField("prompt_logprobs")


def test_what_is_left_out_is_not_sent() -> None:
    assert sampling_params() == decode_pb2.SamplingParams()
    assert sampling_params(temperature=None, n=1, prompt_logprobs=None) == sampling_params()
    assert list(sampling_params(stop="end").stop) == ["end"]


@pytest.mark.parametrize("given", [{"seed": -1}, {"n": -1}, {"temperature": "hot"}, {"logit_bias": [1]}, {"stop": [1]}])
def test_what_no_service_could_take_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        sampling_params(**given)


def test_another_name_is_an_error() -> None:
    with pytest.raises(TypeError, match="tempratur"):
        sampling_params(tempratur=1.0)
