"""Log-probabilities as OpenAI has them: tokens by their words and bytes, which the services send with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cairn.client.answers import PromptLogprob, TopLogprobs

LOGPROB_MIN = -9999.0  # JSON has no infinities: what OpenAI says of a token that cannot come


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs], spelt: Mapping[int, bytes]
) -> dict[str, Any]:
    """``logprobs`` of a choice of a chat: of each token its own, and of the likeliest in its place."""
    content = []
    for at, (token, value) in enumerate(zip(token_ids, logprobs, strict=True)):
        top = [_entry(other, chance, spelt) for other, chance in (tops[at] if tops else ())]
        content.append({**_entry(token, value, spelt), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[TopLogprobs],
    spelt: Mapping[int, bytes],
    offset: int,
) -> dict[str, Any]:
    """``logprobs`` of a choice of a completion, whose first token stands ``offset`` characters behind its beginning."""
    tokens = [words(token, spelt) for token in token_ids]
    offsets = []
    for each in tokens:
        offsets.append(offset)
        offset += len(each)
    likeliest: list[dict[str, float] | None] | None = None
    if tops:
        likeliest = [{words(token, spelt): _finite(value) for token, value in top} or None for top in tops]
    values = [None if value is None else _finite(value) for value in logprobs]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": likeliest, "text_offset": offsets}


def prompt_logprobs(scored: Sequence[PromptLogprob], spelt: Mapping[int, bytes]) -> list[dict[str, Any]]:
    """Each token of a prompt with its log-probability, None for one that nothing stands before, and the likeliest."""
    told: list[dict[str, Any]] = []
    for each in scored:
        own = _entry(each.token_id, 0.0 if each.logprob is None else each.logprob, spelt)
        top = [_entry(token, value, spelt) for token, value in each.top]
        told.append({**own, "logprob": None if each.logprob is None else own["logprob"], "top_logprobs": top})
    return told


def words(token: int, spelt: Mapping[int, bytes]) -> str:
    """A token as text, with replacement characters for half a character."""
    return spelt.get(token, b"").decode(errors="replace")


def _entry(token: int, value: float, spelt: Mapping[int, bytes]) -> dict[str, Any]:
    return {"token": words(token, spelt), "logprob": _finite(value), "bytes": list(spelt.get(token, b""))}


def _finite(value: float) -> float:
    return max(value, LOGPROB_MIN)
