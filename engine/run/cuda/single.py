"""Products in single precision within models of half precision: routers of experts, for the most part.

A library chooses how it adds them up by the number of rows; ours adds every row alike. They are told by what they
multiply, since modelling code makes them of a parameter and not of a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from engine.run.cuda.prefill_attention import launch_options

COLUMNS_MAX = 1024  # experts; what is wider is worth a library's tiles
BLOCKS = {"BLOCK_R": 4, "BLOCK_C": 8, "BLOCK_K": 256}


class StableSingles(TorchFunctionMode):
    """In which ``F.linear`` of fp32 rows on a device is ours, so that a row has the same bits among any others."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and taken(*args, **(kwargs or {})):
            return multiplied(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def taken(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``F.linear`` of these is ours."""
    return bool(
        input.is_cuda
        and input.dtype == weight.dtype == torch.float32
        and weight.ndim == 2
        and weight.shape[0] <= COLUMNS_MAX
        and input.numel()
    )


def multiplied(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of fp32 tensors: input (..., width), weight (columns, width) -> (..., columns)."""
    from engine.run.cuda import borrowed_kernels

    columns, width = weight.shape
    flat = input.reshape(-1, width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows = flat.shape[0]
    out = torch.empty(rows, columns, dtype=torch.float32, device=input.device)
    grid = (-(-rows // BLOCKS["BLOCK_R"]), -(-columns // BLOCKS["BLOCK_C"]))
    borrowed_kernels.multiply[grid](
        flat, flat.stride(0), weight, weight.stride(0), weight.stride(1), out, rows,
        WIDTH=width, COLUMNS=columns, **BLOCKS, num_warps=4, **launch_options(input.device),
    )  # fmt: skip
    out = out if bias is None else out + bias
    return out.view(*input.shape[:-1], columns)
