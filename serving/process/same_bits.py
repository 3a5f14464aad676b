"""What a service says about the bits of its answers: whether they depend on what else is computed in a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SameBits:
    """``always``: KV and logits have the same bits alone and among any others. ``reason``: why, or why not."""

    always: bool
    reason: str


UNSAID = SameBits(False, "")
