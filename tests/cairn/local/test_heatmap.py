"""Columns of a picture: neighbours share one, which shows the largest of them."""

from __future__ import annotations

import torch

from cairn.local.heatmap import FLOOR, _shown

NAN, INF = float("nan"), float("inf")


def test_neighbours_share_a_column_that_shows_the_largest() -> None:
    grid = torch.tensor([[1.0, 5.0, 2.0, 3.0, 4.0], [0.0, 0.0, NAN, NAN, 7.0]])
    shown = _shown(grid, 2)
    assert shown.shape == (2, 3)
    assert shown[0].tolist() == [5.0, 3.0, 4.0]
    assert shown[1, 0].item() == torch.tensor(FLOOR).item() and shown[1, 1].isnan() and shown[1, 2] == 7.0


def test_what_is_infinite_is_a_large_number_and_nothing_is_nothing() -> None:
    shown = _shown(torch.tensor([[INF, NAN]]), 1)
    assert shown[0, 0] == 1e6 and shown[0, 1].isnan()
    assert _shown(torch.ones(3, 4), 1).tolist() == torch.ones(3, 4).tolist()
