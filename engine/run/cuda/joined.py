"""Products of a model's own code that have one input, computed as one; and the gated activation between them.

    q_proj, k_proj, v_proj                  one product, of which the second and third module give their part
    down_proj(act(gate_proj) * up_proj)     two products and a kernel between them

The modules' parameters become views of the joined storage, as for fused layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.run.cuda.prefill_attention import launch_options
from engine.run.cuda.products import PLAIN, Way, product
from engine.run.cuda.weights import HEAD_MULTIPLE, merged

ROWS_TRIED = 32
APART_MAX = 2.0**-7  # rms of the difference from the module's own results, by their rms
GATE_BLOCK = 1024
QKV, PAIR = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
Forwards = dict[nn.Module, Callable[..., Any]]


@contextmanager
def moving(parameter: Tensor) -> Iterator[None]:
    """In which a module's parameters are given other memory: as they were made, outside of inference mode or in it."""
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        yield


@dataclass(frozen=True)
class Joined:
    """Linear modules of one input; ``owner`` is the module they belong to, an MLP where there are two."""

    name: str
    owner: nn.Module
    members: tuple[nn.Linear, ...]

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias of all members, whose own become views of them."""
        with moving(self.members[0].weight):
            weight = merged([cast(nn.Parameter, member.weight) for member in self.members])
            biases = [member.bias for member in self.members if member.bias is not None]
            return weight, merged(biases) if biases else None


def plain_linear(module: object) -> bool:
    """Whether it multiplies as torch has it: one that a quantiser made does so in its own way."""
    return type(module) is nn.Linear and "forward" not in vars(module) and module.weight.is_floating_point()


def joined(model: nn.Module) -> Iterator[Joined]:
    """What can be one product, in the order of the model; those of one name have one shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for owner in model.modules():
        for names in (QKV, PAIR):
            members = [getattr(owner, name, None) for name in names]
            if not all(map(plain_linear, members)):
                continue
            same = {(member.in_features, member.bias is None, member.weight.dtype) for member in members}  # type: ignore[union-attr]
            whole = all(member.out_features % HEAD_MULTIPLE == 0 for member in members)  # type: ignore[union-attr]
            if len(same) == 1 and whole:
                shape = (members[0].in_features, *(member.out_features for member in members))  # type: ignore[union-attr]
                name = "+".join(names)
                if shapes.setdefault(name, shape) != shape:
                    name += " of " + "x".join(map(str, shape))
                yield Joined(name, owner, tuple(members))  # type: ignore[arg-type]


def joined_forwards(found: list[Joined], ways: Mapping[str, Way]) -> Forwards:
    """Forwards of the members of each: the first multiplies for all, whoever is asked next with the same input takes
    its part; one with another input multiplies for itself."""
    forwards: Forwards = {}
    for one in found:
        weight, bias = one.whole()
        kept: list[tuple[Tensor, Tensor]] = []  # the input and what came of it
        at = 0
        for index, member in enumerate(one.members):
            part = slice(at, at + member.out_features)
            first = partial(_all, weight, bias, ways.get(one.name, PLAIN), kept, part)
            last = index == len(one.members) - 1
            forwards[member] = first if index == 0 else partial(_part, member, kept, part, last)
            at += member.out_features
    return forwards


def _all(
    weight: Tensor, bias: Tensor | None, way: Way, kept: list[tuple[Tensor, Tensor]], part: slice, x: Tensor
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    product(flat, weight, out, bias=bias, way=way)
    out = out.view(*x.shape[:-1], -1)
    kept[:] = [(x, out)]
    return out[..., part]


def _part(member: nn.Linear, kept: list[tuple[Tensor, Tensor]], part: slice, last: bool, x: Tensor) -> Tensor:
    if not kept or kept[0][0] is not x:
        return F.linear(x, member.weight, member.bias)
    out = kept[0][1][..., part]
    if last:
        kept.clear()
    return out


@torch.inference_mode()
def gated_forwards(found: list[Joined], ways: Mapping[str, Way], names: Mapping[nn.Module, str]) -> Forwards:
    """Forwards of the MLPs that the pairs belong to, where they are down(act(gate) * up) with an activation of ours.

    ``names`` are those by which ``ways`` know the other products.
    """
    forwards: Forwards = {}
    for one in found:
        down, act = getattr(one.owner, "down_proj", None), getattr(one.owner, "act_fn", None)
        children = {name for name, _ in one.owner.named_children()}
        if len(one.members) != len(PAIR) or not plain_linear(down) or children - {*PAIR, "down_proj", "act_fn"}:
            continue
        tanh = _is_tanh(act, down.weight.device)  # type: ignore[union-attr]
        if tanh is None or one.members[0].out_features != one.members[1].out_features:
            continue
        weight, bias = one.whole()
        forward = partial(
            _mlp, weight=weight, bias=bias, way=ways.get(one.name, PLAIN), tanh=tanh, down=cast(nn.Linear, down),
            down_way=ways.get(names[down], PLAIN),  # type: ignore[index]
        )  # fmt: skip
        if _same(forward, one.owner, one.members[0]):
            forwards[one.owner] = forward
    return forwards


def _mlp(
    x: Tensor, *, weight: Tensor, bias: Tensor | None, way: Way, tanh: bool, down: nn.Linear, down_way: Way
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    both = torch.empty(flat.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    product(flat, weight, both, bias=bias, way=way)
    middle = gated(both, tanh=tanh)
    out = torch.empty(flat.shape[0], down.out_features, dtype=x.dtype, device=x.device)
    product(middle, down.weight, out, bias=down.bias, way=down_way)
    return out.view(*x.shape[:-1], -1)


def gated(both: Tensor, *, tanh: bool) -> Tensor:
    """activation(gate) * up of ``both`` (rows, gate | up)."""
    width = both.shape[1] // 2
    if not both.is_cuda:
        gate, up = both[:, :width], both[:, width:]
        return (F.gelu(gate, approximate="tanh") if tanh else F.silu(gate)) * up
    return launched(both, width, tanh)


def launched(both: Tensor, width: int, tanh: bool) -> Tensor:
    from engine.run.cuda import borrowed_kernels

    out = torch.empty(both.shape[0], width, dtype=both.dtype, device=both.device)
    borrowed_kernels.gated[(both.shape[0], -(-width // GATE_BLOCK))](
        both, both.stride(0), both[:, width:], both.stride(0), out, TANH=tanh, WIDTH=width, BLOCK=GATE_BLOCK,
        num_warps=4, **launch_options(both.device),
    )  # fmt: skip
    return out


def _is_tanh(act: Any, device: torch.device) -> bool | None:
    """Whether an activation is GELU by tanh (True) or SiLU (False); None if neither."""
    x = torch.linspace(-6, 6, 97, device=device)
    try:
        found = act(x)
    except Exception:  # whatever else takes more than numbers
        return None
    forms = ((False, F.silu(x)), (True, F.gelu(x, approximate="tanh")))
    return next((tanh for tanh, own in forms if torch.allclose(found, own, atol=1e-5, rtol=0)), None)


def _same(forward: Callable[[Tensor], Tensor], module: nn.Module, like: nn.Linear) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, ROWS_TRIED, like.in_features, generator=generator).to(like.weight.device, like.weight.dtype)
    try:
        own = module(x)
    except Exception:  # whatever else takes more than rows
        return False
    if not isinstance(own, Tensor):
        return False
    ours = forward(x).float()
    return float((ours - own.float()).norm()) <= APART_MAX * float(own.float().norm()) + 1e-30
