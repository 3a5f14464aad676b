"""Attention over a cascade plan: one protocol, one implementation a device.

An implementation knows how its layers turn and their windows (``Findings``), is prepared once a step (index tensors,
rotation tables) and called once a layer. It writes the step's new K and V into the pool, then attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from engine.plan import CascadePlan

StepT = TypeVar("StepT")


@dataclass(frozen=True)
class Scores:
    """How one attention call turns dot products into weights.

    ``scaling`` multiplies the dot products; ``softcap`` c replaces a score s by ``c * tanh(s / c)``;
    ``sinks`` (heads,) fp32 are scores of a key without value that joins every row's softmax.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


class Attention(Protocol[StepT]):
    """``prepare`` a step, then ``attend`` once a layer in the model's order."""

    @property
    def name(self) -> str:
        """Enters the model identity: another backend sums in another order."""
        ...

    def prepare(self, plan: CascadePlan, *, row_multiple: int = 1) -> StepT:
        """Index tensors of a plan. Reads are padded to a multiple of ``row_multiple`` rows."""
        ...

    def attend(self, step: StepT, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """Stores k, v (rows, kv_heads, dim) of the new tokens and returns (rows, heads, v_dim) in q's dtype.

        ``q`` (rows, heads, k_dim) and ``k`` are rotated to the rows' positions already, unless the model's rotation is
        deferred: then both come as they are before rotation, and the backend turns them.
        """
        ...
