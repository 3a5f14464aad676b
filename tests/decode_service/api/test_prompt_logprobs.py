"""How many log-probabilities of a prompt there may be, and how they are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from decode_service.api.prompt_logprobs import PROMPT_LOGPROBS_MAX, check_prompt_logprobs, note_prompt_logprobs
from engine.sampling.params import Choice
from protos import decode_pb2
from serving.errors import InvalidRequest

CLIENT_NBYTES_MAX = 4 * 2**20  # what gRPC takes of a message where nobody says more


def wanted(top: int) -> decode_pb2.SamplingParams:
    return decode_pb2.SamplingParams(prompt_logprobs=top)


@pytest.mark.parametrize("top", [0, 1, 20])
def test_there_are_at_most_so_many_with_the_likeliest(top: int) -> None:
    most = PROMPT_LOGPROBS_MAX // (1 + top)
    check_prompt_logprobs(wanted(top), most)
    with pytest.raises(InvalidRequest, match=rf"sampling\.prompt_logprobs: .* at most {most} tokens"):
        check_prompt_logprobs(wanted(top), most + 1)
    check_prompt_logprobs(decode_pb2.SamplingParams(), 1 << 30)
    with pytest.raises(InvalidRequest, match=r"sampling\.prompt_logprobs: 21 must be in 0\.\.20"):
        check_prompt_logprobs(wanted(21), 1)


@pytest.mark.parametrize("top", [0, 20])
def test_as_many_as_there_may_be_fit_into_a_message(top: int) -> None:
    """Of large token ids, all of them different, spelt with as many bytes as long words have."""
    count = PROMPT_LOGPROBS_MAX // (1 + top)
    likely = [tuple((200_000 + row * top + each, -1.5) for each in range(top)) for row in range(count)]
    found: list[Any] = [(100_000 + row, Choice(100_000 + row, -0.25, likely[row])) for row in range(count)]
    complete, sequence = decode_pb2.Complete(), SimpleNamespace(scores=SimpleNamespace(all=lambda: found))
    note_prompt_logprobs(complete, sequence, lambda token: b" stones")  # type: ignore[arg-type]
    assert len(complete.prompt_logprobs) == count and len(complete.token_bytes) == count * (1 + top)
    assert complete.ByteSize() < CLIENT_NBYTES_MAX


def test_nothing_is_told_of_a_prompt_that_was_not_computed() -> None:
    for scores in (None, SimpleNamespace(all=lambda: None)):
        complete = decode_pb2.Complete()
        sequence: Any = SimpleNamespace(scores=scores)
        note_prompt_logprobs(complete, sequence, lambda token: b"")
        assert complete == decode_pb2.Complete()
