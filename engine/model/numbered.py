"""Modelling code that computes with a row's number in the forward where it means its position is told the position.

Llama 4 scales queries of layers without rotation by ``arange(rows)`` plus the tokens that a cache says came before. In
a forward of ours a row's number is not its position, so these modules are handed something in a cache's place that
says, for each row, how far its position is from its number. Whether that gives what the model gives is looked at
when a model is examined (``isolation.cap_by_numbers``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SWITCH, SCALE = "attn_temperature_tuning", "floor_scale"
EARLY = 2.0  # tokens after which scaling begins, where it is looked at


class TokensBefore:
    """What stands in a cache's place: ``before`` (rows,) tokens came before each row, and keys and values go to
    ``cache``, or are those of the forward itself."""

    def __init__(self, before: Tensor, cache: Any) -> None:
        self._before = before
        self._cache = cache

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        return self._before

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if self._cache is None:
            return keys, values
        kept: tuple[Tensor, Tensor] = self._cache.update(keys, values, *arguments, **options)
        return kept


def counting_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that scale by a row's number."""
    return [module for module in model.modules() if getattr(module, SWITCH, False) and getattr(module, SCALE, None)]


def first_scaled(modules: Sequence[nn.Module]) -> int | None:
    """The first position whose queries one of the modules scales; None without any."""
    return min((int(getattr(module, SCALE)) - 1 for module in modules), default=None)


@contextmanager
def told_positions(modules: Sequence[nn.Module], positions: Tensor) -> Iterator[None]:
    """While it lasts, rows of forwards through ``modules`` are counted as if they stood at ``positions`` (rows,)."""
    before = positions - torch.arange(len(positions), device=positions.device) if modules else positions

    def hand_over(module: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, options | {"past_key_values": TokensBefore(before, options.get("past_key_values"))}

    with ExitStack() as ends:
        for module in modules:
            ends.callback(module.register_forward_pre_hook(hand_over, with_kwargs=True).remove)
        yield


@contextmanager
def scaled_early(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, the modules scale from a few tokens on."""
    kept = [getattr(module, SCALE) for module in modules]
    try:
        for module in modules:
            setattr(module, SCALE, EARLY)
        yield
    finally:
        for module, scale in zip(modules, kept, strict=True):
            setattr(module, SCALE, scale)
