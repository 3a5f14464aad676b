"""Quantised checkpoints: which are served as transformers runs them, and what of them is a plain linear layer.

    weights alone              unpacked once at load, from then on linear layers like any (compressed-tensors; also
                               fp8 and mxfp4 where the device has no kernels for them)
    weights and activations    each linear layer also rounds what it is given, token by token
    kernels of a library       the layer keeps its packed weights; it is opaque to us, but for what it computes

What a token is must not follow from the other tokens of a forward: a scale taken of a whole forward's activations does,
and is refused. A library that is missing is named.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

# What each method's loader imports, as (module, package of pip).
LIBRARIES: dict[str, tuple[tuple[str, str], ...]] = {
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "fp8": (("accelerate", "accelerate"),),
    "mxfp4": (("accelerate", "accelerate"),),
    "awq": (("gptqmodel", "gptqmodel"), ("accelerate", "accelerate")),
    "gptq": (("gptqmodel", "gptqmodel"), ("optimum", "optimum"), ("accelerate", "accelerate")),
}
# Ways of dividing activations among scales that are taken at run time, in which each token has its own.
TOKEN_BY_TOKEN = ("token", "group", "tensor_group")
# Last parts of the names of tensors that only a quantised checkpoint has.
PACKED_NAMES = ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "qzeros", "scales", "weight_zero_point")
ROWS = 16  # tokens of the forward at load
_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantised. ``activations``: how what linear layers are given is rounded, "" if it is not.

    ``own_dtype``: its loader gives the checkpoint's dtype, whichever is asked for. ``loading``: options of the loader.
    """

    method: str
    weights: str
    activations: str = ""
    own_dtype: bool = False
    loading: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method}, {self.weights}" + (f", activations {self.activations}" if self.activations else "")


def quantization_of(config: Any) -> Quantization | None:
    """How the model of a configuration is quantised; None if it is not.

    Raises ``ValueError`` with the reason for what cannot be loaded or served.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    if not found:
        return None
    fields: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    if method not in LIBRARIES:
        known = ", ".join(LIBRARIES)
        raise ValueError(f"quantization_config: quant_method {method!r} is not served; those that are: {known}")
    missing = [package for module, package in LIBRARIES[method] if find_spec(module) is None]
    if missing:
        raise ValueError(f"it is quantised ({method}), and its loader is missing: pip install {' '.join(missing)}")
    if method == "compressed-tensors":
        return _compressed(fields)
    if method in ("awq", "gptq"):
        return Quantization(method, f"{fields.get('bits', fields.get('w_bit', 4))}-bit weights")
    return Quantization(method, "4-bit weights" if method == "mxfp4" else "8-bit weights", own_dtype=True)


def _compressed(fields: dict[str, Any]) -> Quantization:
    """What compressed-tensors' groups say. Raises ``ValueError`` for what a KV store cannot hold."""
    if fields.get("kv_cache_scheme"):
        raise ValueError("quantization_config: kv_cache_scheme asks for quantised KV; stored KV has the model's dtype")
    weights, activations = [], []
    groups = dict(fields.get("config_groups") or {})
    for name, group in groups.items():
        if isinstance(group, list):
            raise ValueError(f"quantization_config: config_groups.{name} names a preset; write the scheme out")
        for end in ("input_activations", "output_activations"):
            if group.get(end):
                activations.append(_rounded(f"config_groups.{name}.{end}", group[end]))
        if group.get("weights"):
            weights.append(f"{group['weights'].get('num_bits')}-bit {group['weights'].get('type', 'int')} weights")
    described = " and ".join(dict.fromkeys(weights)) or "no weights"
    # Packed zero points are loaded by the loader that unpacks at once, and by no other; it knows one scheme.
    shifted = [group for group in groups.values() if (group.get("weights") or {}).get("symmetric") is False]
    loading = {"dequantize": True} if shifted and len(groups) == 1 and not activations else {}
    rounded = " and ".join(dict.fromkeys(activations))
    return Quantization("compressed-tensors", described, rounded, loading=loading)


def _rounded(place: str, args: dict[str, Any]) -> str:
    """How one scheme rounds activations. Raises ``ValueError`` where a token's rounding follows from other tokens."""
    strategy, bits = str(getattr(args.get("strategy"), "value", args.get("strategy"))), args.get("num_bits")
    if not args.get("dynamic"):
        return f"{bits}-bit with fixed scales"
    if strategy not in TOKEN_BY_TOKEN:
        raise ValueError(
            f"quantization_config: {place} takes one scale of all tokens of a forward (dynamic, {strategy}), so that "
            f"a token's KV would follow from its company; quantise with one of {', '.join(TOKEN_BY_TOKEN)}"
        )
    return f"{bits}-bit by {strategy}"


@contextmanager
def quietly() -> Iterator[None]:
    """Loaders that write to stderr by themselves say nothing: a service's lines there are its log."""
    if find_spec("loguru") is not None:
        from loguru import logger

        logger.disable("compressed_tensors")
    with redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        yield


@torch.no_grad()
def unpack(module: Any) -> None:
    """Has the loader's library unpack what it unpacks; linear layers whose activations stay as they are become plain.

    Libraries do it in a module's first forward. Raises ``ValueError`` for packed tensors in other than linear layers.
    """
    device = next(module.parameters()).device
    ids = torch.arange(ROWS, device=device) % module.config.get_text_config().vocab_size
    with _seeing_tokens(module):
        module(input_ids=ids[None], use_cache=False)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            scheme = getattr(child, "quantization_scheme", None)
            if scheme is None:
                continue
            if not isinstance(child, nn.Linear | nn.Embedding):
                raise ValueError(f"quantization_config: {type(child).__name__} is quantised; only linear layers may be")
            if type(child) is nn.Linear and not scheme.input_activations and not scheme.output_activations:
                setattr(parent, name, _plain(child))
    held = sorted({type(part).__name__ for part in module.modules() if _packed(part) and not is_opaque(part)})
    if held:
        raise ValueError(f"{' and '.join(held)} keeps packed weights, which the start check could compare with nothing")


@contextmanager
def _seeing_tokens(module: nn.Module) -> Iterator[None]:
    """Raises ``ValueError`` where a layer that rounds token by token is given rows without a batch around them.

    compressed-tensors takes a scale for each index of the first two dimensions of (batch, tokens, width), but one of
    all of (tokens, width), which is what experts that every token has are given.
    """

    def look(linear: Any, given: tuple[Tensor, ...]) -> None:
        rounded = linear.quantization_scheme.input_activations
        if rounded and rounded.dynamic and rounded.strategy == "token" and given[0].dim() < 3:
            raise ValueError(
                f"{names[linear]} is given tokens without a batch, of which compressed-tensors takes one scale, so "
                "that a token's KV would follow from its company; leave such layers unquantised"
            )

    names = {part: name for name, part in module.named_modules() if hasattr(part, "quantization_scheme")}
    hooks = [part.register_forward_pre_hook(look) for part in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _plain(linear: nn.Linear) -> nn.Linear:
    """A linear layer of the same weight and bias, and nothing else."""
    made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made.eval()


def _packed(module: nn.Module) -> bool:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.dtype in _PACKED and tensor.dim() > 1 for tensor in tensors)


def is_opaque(module: nn.Module) -> bool:
    """Whether a module is a linear layer of a library's own, over packed weights."""
    return type(module) is not nn.Linear and hasattr(module, "in_features") and _packed(module)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer that does nothing but multiply by its weight and add its bias."""
    return type(module) is nn.Linear and "forward" not in vars(module)


@contextmanager
def activations_as_they_are(module: nn.Module) -> Iterator[None]:
    """Linear layers that round what they are given do not, for a while."""
    rounding: list[Any] = [part for part in module.modules() if getattr(part, "quantization_scheme", None) is not None]
    before = [getattr(part, "quantization_enabled", True) for part in rounding]
    try:
        for part in rounding:
            part.quantization_enabled = False
        yield
    finally:
        for part, enabled in zip(rounding, before, strict=True):
            part.quantization_enabled = enabled


@contextmanager
def opaque_in_float32(module: nn.Module, dtype: torch.dtype, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Opaque linear layers multiply in float32 by what ``make`` gives for their weight (out, in), for a while.

    ``dtype`` is what they are given otherwise. A weight is there while its product is computed, and at no other time.
    """
    with ExitStack() as ends:
        for part in [part for part in module.modules() if is_opaque(part)]:
            _stand_in(part, dtype, make, ends)
        yield


def _stand_in(linear: Any, dtype: torch.dtype, make: Callable[[Tensor], Tensor], ends: ExitStack) -> None:
    own, patched = linear.forward, "forward" in vars(linear)

    def forward(x: Tensor) -> Tensor:
        weight, bias = _dense(own, linear.in_features, dtype, x.device)
        return nn.functional.linear(x.float(), make(weight), bias)

    def restore() -> None:
        if patched:
            linear.forward = own
        else:
            del linear.forward

    linear.forward = forward
    ends.callback(restore)


@torch.no_grad()
def _dense(
    product: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) fp32 of a linear layer: what it makes of each unit vector, and of none.

    A row with a single one in it is exact whatever its scale, so a product with it is a column of the weight as the
    layer has it, to the precision of ``dtype``.
    """
    bias = product(torch.zeros(1, width, dtype=dtype, device=device)).float()[0]
    columns = product(torch.eye(width, dtype=dtype, device=device)).float()
    return (columns - bias).T.contiguous(), bias
