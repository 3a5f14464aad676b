"""Rotary embedding as modelling code applies it, queries and keys in one kernel instead of ten.

Attention modules call ``apply_rotary_pos_emb`` of their file. In captured forwards they run the same code with another
function of that name, where one form was seen to give its values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from engine.run.cuda.norms import APART_MAX, ULPS
from engine.run.cuda.prefill_attention import launch_options

NAMES = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
Apply = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TurnForm:
    """``pairs`` of dimensions turn: (i, i + pairs), or (2 i, 2 i + 1) if ``interleaved``; what is behind them stays.

    The angle of pair i stands at ``step`` * i. ``wide``: in fp32, else products are rounded before they are added.
    """

    pairs: int
    interleaved: bool = False
    step: int = 1
    wide: bool = False


def computed(x: Tensor, cos: Tensor, sin: Tensor, form: TurnForm) -> Tensor:
    """``x`` (1, heads, rows, dim) turned, in torch; cos and sin (1, rows, ...)."""
    n = form.pairs
    c, s = (table[:, None, :, : n * form.step : form.step] for table in (cos, sin))
    parts = (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]) if form.interleaved else (x[..., :n], x[..., n : 2 * n])
    a, b = (part.float() for part in parts) if form.wide else parts
    turned = ((a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype))
    both = torch.stack(turned, dim=-1).flatten(-2) if form.interleaved else torch.cat(turned, dim=-1)
    return torch.cat((both, x[..., 2 * n :]), dim=-1)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: TurnForm) -> tuple[Tensor, Tensor]:
    """q and k (1, heads, rows, dim) turned on the device; what comes out lies row by row."""
    from engine.run.cuda import borrowed_kernels

    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    _, heads, rows, dim = q.shape
    outs = [torch.empty(1, rows, x.shape[1], dim, dtype=x.dtype, device=x.device) for x in (q, k)]
    rest = max(1, dim - 2 * form.pairs)
    borrowed_kernels.turn[(rows, 2)](
        q, q.stride(2), q.stride(1), k, k.stride(2), k.stride(1), cos, sin, cos.stride(1), cos.stride(2), *outs,
        Q_HEADS=heads, K_HEADS=k.shape[1], D=dim, PAIRS=form.pairs, INTERLEAVED=form.interleaved, STEP=form.step,
        WIDE=form.wide, Q_BLOCK=_power_of_two(heads), K_BLOCK=_power_of_two(k.shape[1]),
        PAIRS_BLOCK=_power_of_two(form.pairs), REST_BLOCK=_power_of_two(rest), num_warps=4, **launch_options(q.device),
    )  # fmt: skip
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)


def with_function(module: nn.Module, name: str, function: Any) -> Callable[..., Any]:
    """The module's forward, bound, with ``function`` as what its file calls ``name``."""
    own: Any = inspect.unwrap(type(module).forward)
    copy = FunctionType(
        own.__code__, {**own.__globals__, name: function}, own.__name__, own.__defaults__, own.__closure__
    )
    copy.__kwdefaults__ = own.__kwdefaults__
    bound: Callable[..., Any] = copy.__get__(module, type(module))
    return bound


def applied_by(module: nn.Module) -> str:
    """What an attention module's forward calls to turn queries and keys; "" if nothing of a known name."""
    own: Any = inspect.unwrap(type(module).forward)
    if not inspect.isfunction(own) or "forward" in vars(module):
        return ""
    return next((name for name in NAMES if name in own.__code__.co_names and name in own.__globals__), "")


@dataclass
class SeenTurns:
    """What attention modules gave to the function that turns, by module: the last call's arguments."""

    forwards: dict[nn.Module, Callable[..., Any]]
    calls: dict[nn.Module, tuple[Any, ...]]


def watched_turns(modules: list[nn.Module]) -> SeenTurns:
    """Forwards of the modules that note what they turn."""
    seen = SeenTurns({}, {})

    def noting(module: nn.Module, original: Apply) -> Apply:
        def apply(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            if not named and len(arguments) == 4:
                seen.calls[module] = arguments
            return original(*arguments, **named)

        return apply

    for module in modules:
        name = applied_by(module)
        if name:
            original = inspect.unwrap(type(module).forward).__globals__[name]
            seen.forwards[module] = with_function(module, name, noting(module, original))
    return seen


@torch.inference_mode()
def turn_forwards(seen: SeenTurns, *, launched: bool = True) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of the modules that turn by our kernel, where a form gives what their own function gives.

    ``launched``: and the kernel does, too.
    """
    found: dict[nn.Module, Callable[..., Any]] = {}
    known: dict[Any, TurnForm | None] = {}
    for module, (q, k, cos, sin) in seen.calls.items():
        name = applied_by(module)
        own: Apply = inspect.unwrap(type(module).forward).__globals__[name]
        key = (own, q.shape, k.shape, cos.shape)
        if key not in known:
            known[key] = form_of(own, q, k, cos, sin)
        form = known[key]
        if form is None or (launched and not _agree(turn(q, k, cos, sin, form), own(q, k, cos, sin))):
            continue
        found[module] = with_function(module, name, _turning(form))
    return found


def _turning(form: TurnForm) -> Apply:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return turn(q, k, cos, sin, form)

    return apply


def form_of(own: Apply, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> TurnForm | None:
    """The form that gives what the function gives for random queries and keys of these shapes; None if none does."""
    if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and q.shape[0] == cos.shape[0] == 1):
        return None
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in (q, k))
    theirs = own(q, k, cos, sin)
    for wide, interleaved, pairs, step in product(
        (False, True), (False, True), (cos.shape[2] // 2, cos.shape[2]), (1, 2)
    ):
        if not pairs or 2 * pairs > q.shape[3] or (pairs - 1) * step >= cos.shape[2] or q.shape[3] != k.shape[3]:
            continue
        form = TurnForm(pairs, interleaved, step, wide)
        if _agree((computed(q, cos, sin, form), computed(k, cos, sin, form)), theirs):
            return form
    return None


def _agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        apart = (a.float() - b.float()).abs()
        most = 1.0 if a.dtype == torch.float32 else APART_MAX
        if (
            not bool((apart <= 2 * ULPS[a.dtype] * b.float().abs() + 1e-6).all())
            or float((apart > 0).float().mean()) > most
        ):
            return False
    return True


def _power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()
