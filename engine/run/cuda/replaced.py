"""What of a model's own code is replaced in captured forwards: norms, frequencies that are looked up anew, products.

Only while such a forward runs: outside of it the module is the model as it came.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.borrowed import BorrowedModel
from engine.model.rotary import rotary_modules
from engine.run.cuda.joined import Forwards, Joined, gated_forwards, joined, joined_forwards, moving, plain_linear
from engine.run.cuda.norms import eps_of, form_of, norm, weight_of
from engine.run.cuda.products import Way, product
from engine.run.cuda.weights import HEAD_MULTIPLE

CHANGING = ("dynamic", "longrope")  # rope types that look at positions on the host to choose their frequencies


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """The modules with other forwards."""
    kept: dict[nn.Module, Any] = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in kept.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def widths_of(modules: list[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """How wide what each module is given is, of those that run meanwhile."""
    found: dict[nn.Module, int] = {}

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            found[module] = arguments[0].shape[-1]

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def norm_forwards(widths: Mapping[nn.Module, int], device: torch.device, dtype: torch.dtype) -> Forwards:
    """Norms by ``norm``, where one of its forms gives the module's values."""
    found: Forwards = {}
    for module, width in widths.items():
        form, eps = form_of(module, width, device, dtype), eps_of(module)
        if form is not None and eps is not None:
            found[module] = partial(norm, weight=weight_of(module), eps=eps, form=form)
    return found


@torch.inference_mode()
def rotary_forwards(borrowed: BorrowedModel, positions_max: int) -> Forwards:
    """Rotary modules of changing frequencies without the choice, which is one up to the context's end.

    Left out where the frequencies as they are do not give what the module gives.
    """
    found: Forwards = {}
    for module in rotary_modules(borrowed.module):
        kinds = getattr(module, "rope_type", "")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        inner = inspect.unwrap(type(module).forward)
        if not any(changing in str(kind) for kind in kinds for changing in CHANGING) or inner is type(module).forward:
            continue
        plain = partial(inner, module)
        positions = torch.tensor([[0, 1, positions_max // 2, positions_max - 1]], device=borrowed.device)
        x = torch.zeros(1, 1, 1, dtype=next(borrowed.module.parameters()).dtype, device=borrowed.device)
        try:
            same = _same(module(x, positions), plain(x, positions))
        except Exception:  # whatever else is told which kind of layer it is for
            same = False
        if same:
            found[module] = plain
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(torch.equal, a, b))
    return torch.equal(a, b)


def linears(borrowed: BorrowedModel, without: Container[nn.Module] = ()) -> dict[str, list[nn.Linear]]:
    """Linear modules by what they are called in every layer, "o_proj" for example, in the order of the model.

    Those ``without`` are left out.
    """
    found: dict[str, list[nn.Linear]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in borrowed.module.named_modules():
        if isinstance(module, nn.Linear) and plain_linear(module) and module not in without:
            place = ".".join(part for part in name.split(".")[-2:] if not part.isdigit())
            shape = (module.out_features, module.in_features)
            if shapes.setdefault(place, shape) != shape:  # dense layers among layers of experts, for example
                place = f"{place} {shape[0]}x{shape[1]}"
            found.setdefault(place, []).append(module)
    return found


def products(borrowed: BorrowedModel) -> dict[str, list[nn.Linear | Joined]]:
    """All products by name, in the order of the model: those that are joined, and the other linear modules."""
    found: dict[str, list[nn.Linear | Joined]] = {}
    members: set[nn.Module] = set()
    for one in joined(borrowed.module):
        found.setdefault(one.name, []).append(one)
        members.update(one.members)
    for name, modules in linears(borrowed, members).items():
        found[name] = [*modules]
    return found


def product_forwards(borrowed: BorrowedModel, ways: Mapping[str, Way]) -> Forwards:
    """Products in their ``ways``, by name: joined ones and what is gated between, and those of other linear modules."""
    together = list(joined(borrowed.module))
    single = linears(borrowed, {member for one in together for member in one.members})
    names: dict[nn.Module, str] = {module: name for name, modules in single.items() for module in modules}
    return {
        **joined_forwards(together, ways),
        **gated_forwards(together, ways, names),
        **linear_forwards(single, ways),
    }


@torch.inference_mode()
def linear_forwards(modules: Mapping[str, list[nn.Linear]], ways: Mapping[str, Way]) -> Forwards:
    """Products in their ``ways``, by name; those that are computed as they come and end at whole lines are left."""
    found: Forwards = {}
    for name, members in modules.items():
        for module in members:
            way, missing = ways.get(name, Way()), -module.out_features % HEAD_MULTIPLE
            if missing:
                _lengthen(module, missing)
            if missing or way != Way():
                weight, bias = whole_of(module)
                found[module] = partial(_multiply, weight=weight, bias=bias, width=module.out_features, way=way)
    return found


def whole_of(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of a module with the rows of zeros behind it that ``linear_forwards`` gave it."""
    rows = module.out_features + -module.out_features % HEAD_MULTIPLE
    weight = module.weight.detach()
    with moving(module.weight):
        whole = weight if rows == len(weight) else weight.as_strided((rows, weight.shape[1]), weight.stride())
    bias = None if module.bias is None else nn.functional.pad(module.bias.detach(), (0, rows - len(module.bias)))
    return whole, bias


def _lengthen(module: nn.Linear, missing: int) -> None:
    """Has the module's weight, and whoever is tied to it, lie in memory that goes on with so many rows of zeros."""
    weight, room = module.weight, (module.out_features + missing) * module.in_features
    if weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset() < room:
        with moving(weight):
            weight.data = nn.functional.pad(weight.data, (0, 0, 0, missing))[: module.out_features]


def _multiply(x: Tensor, *, weight: Tensor, bias: Tensor | None, width: int, way: Way) -> Tensor:
    """``nn.Linear.forward`` by ``product``: x (..., in) -> (..., width)."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        product(flat, weight, out, bias=bias, way=way)
    return out[:, :width].contiguous().view(*x.shape[:-1], width)
