"""Drawing on the device for a runner that waits for each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.device import current
from engine.run.cuda.sampling.slots import DeviceSlots
from engine.sampling.params import Choice, Draw, SamplingRequest
from engine.sampling.shaping import Bits


class WaitedSlots:
    """What ``HostSlots`` is, for logits that are on a card: they stay there, and only tokens come back."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._device = device
        self._last: list[int | None] = [None] * slots
        with current(device):
            self._slots = DeviceSlots(vocabulary, slots=slots, rows=slots, device=device)

    def open(self, slot: int, request: SamplingRequest) -> None:
        """Puts a request into a slot, whatever was there."""
        self._last[slot] = request.generated[-1] if request.generated else -1
        with current(self._device), torch.inference_mode():
            self._slots.open(slot, request)

    def last(self, slot: int) -> int:
        """The token that was last drawn in a slot, -1 if there was none. Raises ``ValueError`` if nobody opened it."""
        last = self._last[slot]
        if last is None:
            raise ValueError(f"slot: {slot} was not opened")
        return last

    def bitmasks(self, count: int) -> Bits:
        """See ``HostSlots``."""
        return self._slots.bitmasks(count)

    def masked(self, slot: int) -> bool:
        """See ``HostSlots``."""
        return self._slots.masked(slot)

    def allow(self, slots: Sequence[int], bitmasks: Bits) -> None:
        """See ``HostSlots``."""
        with current(self._device), torch.inference_mode():
            self._slots.allow(slots, bitmasks)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[Choice]:
        """A token for each row of ``logits`` (rows, vocabulary) on the device; waits for them."""
        with current(self._device), torch.inference_mode():
            self._slots.launch(logits.contiguous(), self._slots.stage(draws, len(draws)))
            choices = self._slots.pending(len(draws)).wait()
        for draw, choice in zip(draws, choices, strict=True):
            self._last[draw.slot] = choice.token_id
        return choices
