"""A step that is over draws when it is told what may come, once; others have drawn."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from engine.run.protocol import DrawnStep
from engine.sampling.params import Choice

PLAN = cast(Any, None)


def test_a_step_that_is_told_nothing_has_drawn() -> None:
    step = DrawnStep(PLAN, torch.zeros(1, 4), [Choice(3, None)])
    assert step.wait() == [Choice(3, None)]
    with pytest.raises(RuntimeError, match="has drawn when it began"):
        step.draw(np.zeros((1, 1), np.int32))


def test_a_masked_step_draws_once_it_is_told() -> None:
    step = DrawnStep(PLAN, torch.zeros(1, 4), make=lambda bits: [Choice(int(bits[0, 0]), None)])
    with pytest.raises(RuntimeError, match="was not told which tokens may come"):
        step.wait()
    step.draw(np.array([[2]], np.int32))
    assert step.wait() == [Choice(2, None)]
    with pytest.raises(RuntimeError, match="has drawn"):
        step.draw(np.array([[1]], np.int32))
