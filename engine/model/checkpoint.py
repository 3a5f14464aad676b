"""From a directory to a module whose weights are the checkpoint's, all of them, in the dtype that they are served in.

transformers draws what a checkpoint lacks at random and says so in a warning; here it is an error. A quantised
checkpoint is loaded as transformers loads it (``quantized.py``), an adapter is merged (``lora.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from engine.kv.pool import TORCH_DTYPES
from engine.model.dtype import choose_dtype
from engine.model.lora import check_adapter, merge_adapter
from engine.model.quantized import PACKED_NAMES, Quantization, is_opaque, quantization_of, quietly, unpack

NAMED = 4  # tensors that a message names


@dataclass(frozen=True)
class Checkpoint:
    """A module and what was found out while it was loaded; ``notes`` are lines for whoever started it.

    ``adapter`` describes what was merged into its weights, "" if nothing was.
    """

    module: nn.Module
    dtype_reason: str
    quantization: Quantization | None = None
    adapter: str = ""
    notes: tuple[str, ...] = ()


def load_checkpoint(path_or_id: str, *, dtype: str, device: str, lora: Path | None = None) -> Checkpoint:
    """The causal model of a directory or hub id, on ``device``. ``dtype`` and ``lora`` as in ``BorrowedModel.load``.

    Raises ``ValueError``, ``OSError`` or ``KeyError`` if there is none, it is not whole, or it cannot be served.
    """
    if lora is None:
        return _load(path_or_id, dtype, device)
    check_adapter(lora)  # before minutes are spent on weights
    found = _load(path_or_id, dtype, device)
    module, described = merge_adapter(found.module, lora)
    return replace(found, module=module, adapter=described)


def _load(path_or_id: str, dtype: str, device: str) -> Checkpoint:
    quantization = quantization_of(AutoConfig.from_pretrained(path_or_id))
    module, notes = _read(path_or_id, dtype, device, quantization)
    if dtype != "auto":
        return Checkpoint(module.to(device), "asked for", quantization, notes=notes)
    if any(is_opaque(part) for part in module.modules()):
        return Checkpoint(module.to(device), "the checkpoint's own", quantization, notes=notes)
    choice = choose_dtype(dtype_name(module), sum(p.numel() for p in module.parameters()), device)
    if choice.dtype != dtype_name(module):
        if quantization is None:
            module = module.to(TORCH_DTYPES[choice.dtype])
        else:  # its weights are products with scales, which follow from the dtype that they are unpacked in
            del module
            module, notes = _read(path_or_id, choice.dtype, device, quantization)
    return Checkpoint(module.to(device), choice.reason, quantization, notes=notes)


def _read(
    path_or_id: str, dtype: str, device: str, quantization: Quantization | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The module and notes on it; one that is quantised is on its device already, as loaders want it."""
    wanted: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    wanted["dtype"] = TORCH_DTYPES.get(dtype, "auto")
    if quantization is None:
        module, info = AutoModelForCausalLM.from_pretrained(path_or_id, **wanted)
        return module, _whole(module, info)
    if quantization.own_dtype:
        wanted["dtype"] = "auto"
    if torch.device(device).type != "cpu":
        wanted["device_map"] = {"": device}
    if quantization.loading:
        wanted["quantization_config"] = CompressedTensorsConfig(**quantization.loading)
    with quietly():
        try:
            module, info = AutoModelForCausalLM.from_pretrained(path_or_id, **wanted)
            notes = _whole(module, info)
            unpack(module)
        except ValueError:
            raise
        except Exception as error:  # whatever loaders raise for what they lack, or for a device they do not run on
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"it is quantised ({quantization}), and its loader fails: {reason}") from error
    if dtype not in ("auto", dtype_name(module)):
        if any(is_opaque(part) for part in module.modules()):
            raise ValueError(f"dtype: {dtype} was asked for; {quantization.method} weights are served in their own")
        module = module.to(TORCH_DTYPES[dtype])
    return module, notes


def _whole(module: nn.Module, info: Any) -> tuple[str, ...]:
    """A note on what of the checkpoint is not used. Raises ``ValueError`` if the model lacks weights."""
    buffers = dict(module.named_buffers())  # tables that modelling code computes, which older checkpoints do not have
    missing = sorted(name for name in info["missing_keys"] if name not in buffers)
    unexpected = sorted(info["unexpected_keys"])
    if missing:
        raise ValueError(f"the checkpoint lacks {_named(missing)}, which would be random numbers")
    if info["mismatched_keys"]:
        other = sorted(str(each[0] if isinstance(each, tuple) else each) for each in info["mismatched_keys"])
        raise ValueError(f"the checkpoint has {_named(other)} in another shape than its config.json says")
    packed = [name for name in unexpected if name.rpartition(".")[2] in PACKED_NAMES]
    if packed:
        raise ValueError(
            f"the checkpoint is quantised: it has {_named(packed)}, of which its config.json's quantization_config "
            "says nothing"
        )
    computed = sorted(name for name in info["missing_keys"] if name in buffers)
    notes = (("not used of the checkpoint", unexpected), ("computed, since the checkpoint lacks them", computed))
    return tuple(f"{words}: {_named(names)}" for words, names in notes if names)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def dtype_name(module: nn.Module) -> str:
    """The dtype of a module's activations by its short name, for example "bfloat16": its embeddings'.

    Scales of packed weights, norms and routers may have another one.
    """
    served = tuple(TORCH_DTYPES.values())
    get = getattr(module, "get_input_embeddings", None)
    embeddings = [] if get is None else list(get().parameters())
    parameters = [p for p in (*embeddings, *module.parameters()) if p.is_floating_point()]
    return str(next((p.dtype for p in parameters if p.dtype in served), parameters[0].dtype)).removeprefix("torch.")
