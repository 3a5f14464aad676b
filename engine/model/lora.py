"""A LoRA adapter of peft, merged into a model's weights at load: what is served has no adapter any more.

The merged weights are what a model's identity is made of, so KV of another adapter, or of none, is never found.
"""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.model.quantized import is_plain

CONFIGURATION = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NAMED = 3  # tensors that a message names
REASON_MAX = 400  # characters of what peft or torch say


def check_adapter(path: Path) -> dict[str, Any]:
    """The configuration of the adapter in a directory. Raises ``ValueError`` for one that cannot be merged."""
    file = path / CONFIGURATION
    if not file.is_file():
        raise ValueError(f"lora: {path} is no directory with an {CONFIGURATION}; name one that peft saved")
    try:
        fields: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"lora: {file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"lora: {file} is no JSON object; name a directory that peft saved")
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"lora: {path} is of type {fields.get('peft_type')}; only LORA is merged")
    for name, why in (
        ("alora_invocation_tokens", "acts from some tokens on"),
        ("layer_replication", "repeats layers"),
        ("arrow_config", "chooses among adapters by token"),
    ):
        if fields.get(name):
            raise ValueError(f"lora: {path} has {name}: an adapter that {why} cannot be merged into the weights")
    if not any((path / name).is_file() for name in WEIGHTS):  # peft would ask a hub for them
        raise ValueError(f"lora: {path} has no {' or '.join(WEIGHTS)}; name a directory that peft saved")
    if find_spec("peft") is None:
        raise ValueError("lora: adapters need peft: pip install 'cairn[lora]'")
    return fields


@torch.no_grad()
def merge_adapter(module: nn.Module, path: Path) -> tuple[nn.Module, str]:
    """The module with the adapter of a directory merged into its weights, and a description for people.

    Raises ``ValueError`` if it is none, or does not fit the module.
    """
    fields = check_adapter(path)
    from peft import PeftConfig, PeftModel

    tied = _untie(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft says of ties, of other base models' names and of lost keys
            config = PeftConfig.from_pretrained(str(path))
            config.inference_mode = True
            adapted: Any = PeftModel(module, config)
            device = next(module.parameters()).device
            loaded = adapted.load_adapter(str(path), "default", torch_device=str(device))
            _fits(loaded, adapted)
            count = sum(hasattr(part, "lora_A") for part in adapted.modules())
            merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of peft, or of whatever reads a file that is cut off
        reason = " ".join(str(error).split())[:REASON_MAX]
        raise ValueError(f"lora: the adapter {path} does not fit the model: {reason}") from error
    if tied:
        _tie(merged)
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged, f"rank {fields.get('r')}, in {count} modules"


def _fits(loaded: Any, adapted: Any) -> None:
    """Raises ``ValueError`` if tensors of the adapter have no place, places no tensor, or a place is no plain layer."""
    strange = sorted(key for key in loaded.unexpected_keys)
    if strange:
        raise ValueError(f"it has {', '.join(strange[:NAMED])}, which the model has no place for")
    lacking = sorted(key for key in loaded.missing_keys)
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking[:NAMED])}, which would be random numbers")
    for name, part in adapted.named_modules():
        base = getattr(part, "base_layer", None)
        if hasattr(part, "lora_A") and isinstance(base, nn.Linear) and not is_plain(base):
            raise ValueError(f"{name} is quantised and stays so; merge the adapter before quantising")


def _ends(module: Any) -> tuple[Any, Any]:
    """Embeddings and head; None where a model has no such thing."""
    return module.get_input_embeddings(), module.get_output_embeddings()


def _untie(module: nn.Module) -> bool:
    """Whether the head is the embeddings; it gets a copy then, so that what is merged into one leaves the other."""
    embeddings, head = _ends(module)
    if head is None or head.weight is not embeddings.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def _tie(module: Any) -> None:
    """A head that is still what the embeddings are is them again; one that is not is said to be its own."""
    embeddings, head = _ends(module)
    same = torch.equal(head.weight, embeddings.weight)
    if same:
        head.weight = embeddings.weight
    module.config.get_text_config().tie_word_embeddings = same
