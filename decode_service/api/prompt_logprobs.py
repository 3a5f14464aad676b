"""Log-probabilities of a prompt in a request's messages: how many there may be, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable

from decode_service.scheduling.sequence import Sequence
from engine.sampling.params import TOP_LOGPROBS_MAX
from protos import decode_pb2
from serving.errors import InvalidRequest

PROMPT_LOGPROBS_MAX = 1 << 17  # of a request, the likeliest counted: below 4 MB in its last message


def check_prompt_logprobs(sampling: decode_pb2.SamplingParams, prompt_tokens: int) -> None:
    """Raises ``InvalidRequest`` for more than a reply should hold."""
    if not sampling.HasField("prompt_logprobs"):
        return
    top, each = sampling.prompt_logprobs, 1 + sampling.prompt_logprobs
    if top > TOP_LOGPROBS_MAX:
        raise InvalidRequest(f"{top} must be in 0..{TOP_LOGPROBS_MAX}", field="sampling.prompt_logprobs")
    if prompt_tokens * each > PROMPT_LOGPROBS_MAX:
        raise InvalidRequest(
            f"{top} with each of {prompt_tokens} tokens are more than a reply holds ({PROMPT_LOGPROBS_MAX} with those "
            "of the tokens themselves)",
            field="sampling.prompt_logprobs",
            remedy=f"ask for fewer, or of at most {PROMPT_LOGPROBS_MAX // each} tokens",
        )


def note_prompt_logprobs(complete: decode_pb2.Complete, sequence: Sequence, spell: Callable[[int], bytes]) -> None:
    """Of each token of the prompt; nothing if they were not asked for, or the prompt was not computed to its end."""
    found = None if sequence.scores is None else sequence.scores.all()
    if found is None:
        return
    tokens = set[int]()
    for token, choice in found:
        tokens.add(token)
        if choice is None:
            complete.prompt_logprobs.add(token_id=token)
            continue
        told = complete.prompt_logprobs.add(token_id=token, logprob=choice.logprob)
        if choice.top:
            told.top.token_ids.extend([likely for likely, _ in choice.top])
            told.top.logprobs.extend([value for _, value in choice.top])
            tokens.update(told.top.token_ids)
    complete.token_bytes.update({token: spell(token) for token in tokens})
