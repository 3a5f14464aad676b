"""Norms of a model's own code, computed a row as it would be alone.

torch's reductions choose their order by how many rows there are, and take eight kernels for what is one. A norm module
is replaced only by the form that was seen to give its own values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.run.cuda.prefill_attention import launch_options

EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
TRIED_ROWS = 96
APART_MAX = 0.01  # of the results; another order of summing changes fewer, another form of rounding more
ULPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-19}
NEAR_ZERO = 1e-6  # of the largest: what is left where a mean is taken off
ELEMENTS = 1024  # of a program that takes several rows


@dataclass(frozen=True)
class NormForm:
    """``centred``: the mean is taken off first. ``rounded``: to the dtype before the weight, which is ``plus`` more."""

    centred: bool = False
    rounded: bool = False
    plus: float = 0.0


# As Llama has it; as Olmo2 and GptOss; as Gemma; as Cohere.
FORMS = (NormForm(rounded=True), NormForm(), NormForm(plus=1.0), NormForm(centred=True))


def norm(x: Tensor, weight: Tensor | None, eps: float, form: NormForm) -> Tensor:
    """``x`` (..., width) normed over its last dimension; ``weight`` (width,), or (rows that come in turn, width)."""
    return _launched(x, weight, eps, form) if x.is_cuda else computed(x, weight, eps, form)


def computed(x: Tensor, weight: Tensor | None, eps: float, form: NormForm) -> Tensor:
    """The same in torch."""
    wide = x.float()
    if form.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form.rounded:
        wide = wide.to(x.dtype).float()
    return (wide if weight is None else wide * (form.plus + weight.float())).to(x.dtype)


def _launched(x: Tensor, weight: Tensor | None, eps: float, form: NormForm) -> Tensor:
    from engine.run.cuda import borrowed_kernels

    width = x.shape[-1]
    single = x.dim() == 4 and x.shape[0] == 1  # (1, rows, heads, width): parts of wider rows, often
    if x.stride(-1) != 1 or not (single or x.shape[:-2].numel() == 1):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = out.numel() // width
    by_row, by_inner, inner = (x.stride(1), x.stride(2), x.shape[2]) if single else (width, 0, 1)
    if x.dim() > 1 and x.shape[:-2].numel() == 1:
        by_row, by_inner, inner = x.stride(-2), 0, 1
    block = 1 << (width - 1).bit_length()
    rows = max(1, ELEMENTS // block)
    borrowed_kernels.norm[(-(-count // rows),)](
        x, by_row, by_inner, inner, x if weight is None else weight, out, count, eps,
        WEIGHTS=1 if weight is None else weight.numel() // width, CENTRED=form.centred, ROUNDED=form.rounded,
        PLUS=form.plus, WEIGHED=weight is not None, WIDTH=width, BLOCK=block, ROWS=rows,
        num_warps=8 if width >= 2048 else 4, **launch_options(x.device),
    )  # fmt: skip
    return out


def norm_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of modelling code that may be a norm with a weight or none; torch's own are one block a row already."""
    for module in model.modules():
        named = "Norm" in type(module).__name__ and not isinstance(
            module, nn.LayerNorm | nn.modules.batchnorm._NormBase
        )
        if named and not any(module.children()) and set(dict(module.named_parameters())) <= {"weight"}:
            yield module


@torch.inference_mode()
def form_of(module: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> NormForm | None:
    """The form that gives the module's values on random rows of every scale; None if none does."""
    eps, weight = eps_of(module), weight_of(module)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(width)
    lines = 1 if weight is None else weight.numel() // width
    shape = (1, TRIED_ROWS, width) if lines == 1 else (1, TRIED_ROWS, lines, width)
    scale = torch.logspace(-3, 2, TRIED_ROWS).view(1, TRIED_ROWS, *(1,) * (len(shape) - 2))
    x = (scale * (0.3 + torch.randn(shape, generator=generator))).to(device, dtype)
    try:
        own = module(x)
    except Exception:  # whatever else takes more than rows
        return None
    if not isinstance(own, Tensor) or own.shape != x.shape or own.dtype != dtype:
        return None
    found = next((form for form in FORMS if _agrees(computed(x, weight, eps, form), own)), None)
    return found if found is None or _agrees(norm(x, weight, eps, found), own) else None


def _agrees(ours: Tensor, own: Tensor) -> bool:
    apart = (ours.float() - own.float()).abs()
    within = apart <= 2 * ULPS[own.dtype] * own.float().abs() + NEAR_ZERO * own.float().abs().max()
    return bool(within.all()) and float((apart > 0).float().mean()) <= (
        1.0 if own.dtype == torch.float32 else APART_MAX
    )


def eps_of(module: nn.Module) -> float | None:
    """What keeps a norm from dividing by zero, by whatever name."""
    found = [getattr(module, name) for name in EPS_NAMES if isinstance(getattr(module, name, None), float)]
    return found[0] if found else None


def weight_of(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight.detach() if isinstance(weight, Tensor) else None
