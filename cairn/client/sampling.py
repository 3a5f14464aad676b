"""How an answer is drawn, as a caller gives it and as a request carries it; docs/sampling.md says what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from cairn.client.errors import invalid
from cairn.client.token_ids import token_ids
from protos import decode_pb2


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of ``generate``. What is left out, or None, is left to the service.

    ``n`` answers to one prompt, the i-th as if it were asked for with ``seed`` + i: ``Generation.results``.
    ``include_stop``: the stop string that ends an answer is part of its text. ``prompt_logprobs``: of each token of the
    prompt its log-probability, and so many of the likeliest; the prompt is computed anew for that, whatever is cached.
    """

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    min_tokens: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    seed: int | None
    n: int
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: int | None
    logit_bias: Mapping[int, float]
    keep_special_tokens: bool


def sampling_params(
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    logit_bias: Mapping[int, float] | None = None,
    n: int = 1,
    **plain: Any,
) -> decode_pb2.SamplingParams:
    """``SamplingParams`` of ``SamplingOptions``. Raises ``InvalidRequest``, and ``TypeError`` for another name."""
    unknown = set(plain) - SamplingOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
    values = {
        "max_tokens": max_tokens,
        "stop": [stop] if isinstance(stop, str) else list(stop),
        "stop_token_ids": token_ids(stop_token_ids, "stop_token_ids"),
        "logit_bias": _logit_bias(logit_bias or {}),
        "n": n if n != 1 else None,
        **plain,
    }
    try:
        return decode_pb2.SamplingParams(**{name: value for name, value in values.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise invalid("sampling", str(error)) from error


def _logit_bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise invalid("logit_bias", f"must map token ids to numbers, not {bias!r}")
    return dict(zip(token_ids(list(bias), "logit_bias"), bias.values(), strict=True))
