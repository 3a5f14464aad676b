"""Token counts as OpenAI has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cairn import Result


def usage(results: Sequence[Result]) -> dict[str, Any]:
    """Of one or several answers together."""
    prompt = sum(result.usage.prompt_tokens for result in results)
    completion = sum(result.usage.completion_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(result.usage.cached_tokens for result in results)},
    }
