"""LaunchedStep: a step that may still run on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.plan import CascadePlan
from engine.run.cuda.sampling.slots import PendingDraws
from engine.sampling.params import Choice


class LaunchedStep:
    """A pending step: its tokens are on their way to the host, its logits are overwritten by the next step."""

    def __init__(
        self, plan: CascadePlan, device: torch.device, draws: PendingDraws | None, logits: Callable[[], Tensor]
    ) -> None:
        self.plan = plan
        self._draws = draws
        self._logits = logits
        self._done: Any = None
        if draws is None and device.type == "cuda":  # those that draw have an event of their own
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[Choice]:
        if self._done is not None:
            self._done.synchronize()
        return [] if self._draws is None else self._draws.wait()

    def logits(self) -> Tensor:
        return self._logits()
