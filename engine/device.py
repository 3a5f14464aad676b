"""Making a card the current one: kernels are launched on the current card, not on that of their arguments.

Which card is current is a matter of each thread. Whatever launches device work makes its card current while it does,
so it may be called from any thread, on a machine with any number of cards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class _HasPool(Protocol):
    @property
    def pool(self) -> Any: ...


OwnerT = TypeVar("OwnerT", bound=_HasPool)


def current(device: torch.device | str) -> AbstractContextManager[Any]:
    """``device`` is the current card within the block; nothing for the CPU."""
    wanted = torch.device(device)
    return torch.cuda.device(wanted) if wanted.type == "cuda" else nullcontext()


def on_pools_device(method: Callable[Concatenate[OwnerT, P], R]) -> Callable[Concatenate[OwnerT, P], R]:
    """A method whose object has a ``pool``, with the pool's card current while it runs."""

    def run(self: OwnerT, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with current(self.pool.device):
            return method(self, *args, **kwargs)

    functools.update_wrapper(run, method)
    return run
