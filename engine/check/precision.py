"""The same module in float32, for a while: what a start check compares the served dtype and the code itself with.

``redrawn``   few layers, every matrix of a healthy scale: what a model's code does shows, whatever its weights are
``upcast``    its own weights; a layer's are in float32 while it runs, so a large model needs room for one layer more

The module's parameters and buffers are exchanged in place and put back, so patched modules, tied weights and
weights that are views of each other stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.kv.pool import TORCH_DTYPES
from engine.model.borrowed import BorrowedModel
from engine.model.quantized import activations_as_they_are, is_opaque, opaque_in_float32

GAIN = 1.2  # rms of a redrawn matrix's product with a vector of rms 1: scores then differ by about 1.4
DRAWN = 1_048_573  # normal numbers, repeated; a prime, so that no two rows of a matrix are equal


def layers_of_every_kind(layers: nn.ModuleList, also: list[Any], *, least: int = 3) -> int:
    """How many first layers hold one of every kind; ``also[i]`` is what else tells layer i from others."""
    first: dict[Any, int] = {}
    for index, (layer, more) in enumerate(zip(layers, also, strict=True)):
        first.setdefault((_kind(layer), more), index)
    return min(len(layers), max(least, 1 + max(first.values())))


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Classes, shapes and switches of a layer; not its index and not its numbers."""
    parts = []
    for name, module in layer.named_modules():
        shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False))
        switches = tuple(
            (n, value) for n, value in sorted(vars(module).items()) if isinstance(value, bool | str | None.__class__)
        )
        parts.append((name, type(module).__name__, shapes, switches))
    return tuple(parts)


@contextmanager
def first_layers(layers: nn.ModuleList, count: int) -> Iterator[None]:
    """The model that ``layers`` belongs to with the first ``count`` of them alone."""
    kept = dict(layers._modules)
    try:
        for name in list(kept)[count:]:
            del layers._modules[name]
        yield
    finally:
        layers._modules.clear()
        layers._modules.update(kept)


@contextmanager
def redrawn(borrowed: BorrowedModel) -> Iterator[None]:
    """The module in float32 with seeded matrices in place of its own, and its vectors made no larger than rms 1."""
    source = torch.randn(DRAWN, generator=torch.Generator().manual_seed(7)).to(borrowed.device)
    vocabulary = borrowed.config.get_text_config().vocab_size

    def draw(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2:  # norms, biases, sinks: as they are, but not so large that they drown the rest
            own = tensor.float()
            return own / max(1.0, float(own.pow(2).mean().sqrt()))
        scale = GAIN / math.sqrt(max(tensor.shape[-2:]) if tensor.shape[0] != vocabulary else tensor.shape[-1])
        return _filled(source, tensor.shape).mul_(scale)

    module, dtype = borrowed.module, TORCH_DTYPES[borrowed.dtype_name]
    # Rounded activations jump where a last bit does, which would hide what is looked for.
    with activations_as_they_are(module), opaque_in_float32(module, dtype, draw), _exchanged([module], draw):
        yield


def _filled(source: Tensor, shape: torch.Size) -> Tensor:
    count = shape.numel()
    return source.repeat(-(-count // source.numel()))[:count].view(shape).clone()


@contextmanager
def upcast(borrowed: BorrowedModel, layers: nn.ModuleList | None) -> Iterator[None]:
    """The module in float32 with its own weights; those of ``layers`` are exchanged one layer at a time."""
    with ExitStack() as ends:
        inner = [] if layers is None else list(layers)
        held = {id(part) for layer in inner for part in layer.modules()}
        outside = [module for module in borrowed.module.modules() if id(module) not in held]
        dtype = TORCH_DTYPES[borrowed.dtype_name]
        ends.enter_context(opaque_in_float32(borrowed.module, dtype, lambda weight: weight))
        ends.enter_context(_exchanged(outside, Tensor.float, recurse=False))
        running: list[ExitStack] = []

        def enter(layer: nn.Module, arguments: Any) -> None:
            stack = ExitStack()
            stack.enter_context(_exchanged([layer], Tensor.float))
            running.append(stack)

        def leave(layer: nn.Module, arguments: Any, output: Any) -> None:
            running.pop().close()

        for layer in inner:
            ends.callback(layer.register_forward_pre_hook(enter).remove)
            ends.callback(layer.register_forward_hook(leave, always_call=True).remove)
        try:
            yield
        finally:
            while running:
                running.pop().close()


@contextmanager
def _exchanged(modules: list[nn.Module], make: Callable[[Tensor], Tensor], *, recurse: bool = True) -> Iterator[None]:
    """Floating parameters are replaced by what ``make`` gives for them, buffers by themselves in float32.

    Those of opaque linear layers stay what they are.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    seen: set[int] = set()
    parts = [part for module in modules for part in (module.modules() if recurse else [module])]
    try:
        for part in parts:
            if is_opaque(part):
                continue
            tensors: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []
            tensors += ((parameter, make) for parameter in part.parameters(recurse=False))
            tensors += ((buffer, Tensor.float) for buffer in part.buffers(recurse=False))
            for tensor, function in tensors:
                if tensor.is_floating_point() and id(tensor) not in seen:
                    seen.add(id(tensor))
                    kept.append((tensor, tensor.data))
                    tensor.data = function(tensor.data)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
