"""Mask functions of transformers' models: who may attend to whom, by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

# (batch, head, query, key) -> whether that query may attend to that key; over tensors of positions
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def evaluate(mask: MaskFunction, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether ``queries`` may attend to ``keys`` (int64 of any shapes that go together), bool."""
    zero = torch.zeros((), dtype=torch.int64, device=queries.device)
    return torch.as_tensor(mask(zero, zero, queries, keys)).expand((queries + keys).shape).bool()


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """``allowed`` (rows, rows) as a mask that eager attention adds to scores, (1, 1, rows, rows)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


@contextmanager
def masks_of_eager(allowed: Tensor, positions: Tensor, dtype: torch.dtype) -> Iterator[list[MaskFunction]]:
    """While it lasts, eager attention has masks of ``allowed`` (rows, rows), less what the model's own mask functions
    hide of rows that stand at ``positions`` (rows,). Gives the functions that were asked, in order."""
    asked: list[MaskFunction] = []
    kept: dict[int, Tensor] = {}

    def make(*, mask_function: MaskFunction, **arguments: Any) -> Tensor:
        asked.append(mask_function)
        if id(mask_function) not in kept:
            seen = evaluate(mask_function, positions[:, None], positions[None, :])
            kept[id(mask_function)] = additive(allowed & seen, dtype)
        return kept[id(mask_function)]

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = make
    try:
        yield asked
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]
