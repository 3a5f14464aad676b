"""What leaks between tokens, or hangs on a token's number in a forward, is found in models that do so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.isolation import MOVED_MAX, cap_by_rows, check_isolation, moved_limit
from engine.model.limits import ContextLimit
from engine.model.probe import examine
from tests.architectures import ARCHITECTURES, build

LIMIT = ContextLimit(200, 200)


def borrowed_with(change: Callable[[Tensor], Tensor] | None = None) -> BorrowedModel:
    """A small model whose second layer hands on what ``change`` makes of its hidden states (1, rows, width)."""
    model = build(*ARCHITECTURES["qwen3-ratio2"])
    if change is not None:

        def hook(module: Any, arguments: Any, out: Any) -> Any:
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        model.model.layers[1].register_forward_hook(hook)
    return BorrowedModel(model, name="m")


def test_a_right_model_passes() -> None:
    borrowed = borrowed_with()
    check_isolation(borrowed, 200, most=MOVED_MAX)
    assert cap_by_rows(borrowed, LIMIT, 64) == LIMIT
    assert moved_limit(borrowed, LIMIT, examine(borrowed).rotations) == LIMIT


@pytest.mark.parametrize("limit", [200, 4])
def test_a_layer_that_looks_at_its_neighbour_is_refused(limit: int) -> None:
    with pytest.raises(ModelRefused, match="outside of attention"):
        check_isolation(borrowed_with(lambda x: x + 0.01 * x.roll(1, dims=1)), limit, most=MOVED_MAX)


def test_a_layer_that_gives_no_number_is_refused() -> None:
    with pytest.raises(ModelRefused, match="outside of attention"):
        check_isolation(borrowed_with(lambda x: x * float("nan")), 200, most=MOVED_MAX)


def test_what_hangs_on_the_number_in_the_forward_caps_the_context() -> None:
    def scaled(x: Tensor) -> Tensor:
        late = (torch.arange(x.shape[1]) >= 37).to(x.dtype)[None, :, None]
        return x * (1 + 0.5 * late * torch.linspace(-1, 1, x.shape[2]))

    limit = cap_by_rows(borrowed_with(scaled), LIMIT, 64)
    assert limit.tokens == 37 and "token 37 on" in limit.because
    assert cap_by_rows(borrowed_with(scaled), LIMIT, 30) == LIMIT, "so many rows were looked at"


def test_moved_chunks_end_where_rotation_explains_no_more() -> None:
    borrowed = borrowed_with()
    rotations = examine(borrowed).rotations
    real = borrowed.forward

    def forward(ids: Tensor, positions: Tensor, attend: Any, rows: Tensor) -> Tensor:
        def scaled(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Any) -> Tensor:
            return attend(layer, q * (1 + 0.2 * (positions >= 77).to(q.dtype))[:, None, None], k, v, scores)

        return real(ids, positions, scaled, rows)

    with mock.patch.object(borrowed, "forward", forward):
        limit = moved_limit(borrowed, LIMIT, rotations)
    assert limit.tokens == 77 and "from position 77 on queries are scaled" in limit.because
