"""LaunchedStep: a step that may still run on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.device import current
from engine.plan import CascadePlan
from engine.run.cuda.sampling.slots import PendingDraws
from engine.sampling.params import Choice
from engine.sampling.scoring import PendingScores
from engine.sampling.shaping import Bits


class LaunchedStep:
    """A pending step: its tokens are on their way to the host, its logits are overwritten by the next step.

    ``held`` draws its tokens, once it is told which may come.
    """

    def __init__(
        self,
        plan: CascadePlan,
        device: torch.device,
        draws: PendingDraws | None,
        logits: Callable[[], Tensor],
        *,
        scores: Sequence[PendingScores] = (),
        held: Callable[[Bits], PendingDraws] | None = None,
    ) -> None:
        self.plan = plan
        self._device = device
        self._draws = draws
        self._held = held
        self._logits = logits
        self.pending_scores = scores
        self._done: Any = None
        if draws is None and held is None and device.type == "cuda":  # those that draw have an event of their own
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def told(self, plan: CascadePlan, scores: Sequence[PendingScores]) -> LaunchedStep:
        """This step as the end of a piece of its own, which has that plan and those scores."""
        self.plan, self.pending_scores = plan, scores
        return self

    def draw(self, bitmasks: Bits) -> None:
        if self._held is None:
            raise RuntimeError("draw: the step has drawn when it began")
        with current(self._device), torch.inference_mode():
            self._draws, self._held = self._held(bitmasks), None

    def wait(self) -> list[Choice]:
        if self._held is not None:
            raise RuntimeError("wait: the step was not told which tokens may come")
        if self._done is not None:
            self._done.synchronize()
        return [] if self._draws is None else self._draws.wait()

    def scores(self) -> list[Choice]:
        return [choice for each in self.pending_scores for choice in each.wait()]

    def logits(self) -> Tensor:
        return self._logits()
