"""Products in single precision within models of half precision: which are ours, and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.run.cuda import single
from engine.run.cuda.single import COLUMNS_MAX, StableSingles, taken


class OnDevice:
    """What ``taken`` looks at of a tensor on a device."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        self.dtype, self.shape, self.ndim = dtype, shape, len(shape)

    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@pytest.mark.parametrize(
    ("rows", "weight", "ours"),
    [
        (OnDevice(torch.float32, 5, 8), OnDevice(torch.float32, 64, 8), True),
        (OnDevice(torch.float32, 5, 8), OnDevice(torch.float32, COLUMNS_MAX + 1, 8), False),
        (OnDevice(torch.bfloat16, 5, 8), OnDevice(torch.bfloat16, 64, 8), False),
        (OnDevice(torch.float32, 0, 8), OnDevice(torch.float32, 64, 8), False),
        (OnDevice(torch.float32, 5, 8), OnDevice(torch.float32, 8), False),
        (torch.zeros(5, 8), torch.zeros(64, 8), False),
    ],
)
def test_what_is_ours(rows: Any, weight: Any, ours: bool) -> None:
    assert taken(rows, weight) is ours


def test_within_it_what_is_taken_is_multiplied_by_ours_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiplied(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.full((*input.shape[:-1], len(weight)), 7.0)

    monkeypatch.setattr(single, "taken", lambda input, weight, bias=None: input.dtype == torch.float32)
    monkeypatch.setattr(single, "multiplied", multiplied)
    wide, half = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)
    with StableSingles():
        assert bool((F.linear(wide, wide) == 7).all()) and bool((F.linear(wide, weight=wide, bias=None) == 7).all())
        assert bool((torch.nn.Linear(3, 4)(wide) == 7).all())
        assert bool((F.linear(half, half) == 3).all()) and bool((wide @ wide.T == 3).all())
    assert bool((F.linear(wide, wide) == 3).all())
