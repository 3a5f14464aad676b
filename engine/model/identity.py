"""The identity of a model: everything that KV bytes depend on, digested.

Two processes with equal model identities compute the same KV bytes for the same tokens and context. Worker
names, addresses, paths, pool sizes and batch sizes never enter.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from chunk_store.key import ModelIdentity, digest
from chunk_store.layout import KVLayout
from engine.model.processor import read_processor

NUMERICS_VERSION = "cairn-numerics-2"  # raise it when a change of ours alters KV bytes

# Fields of a configuration that say where it came from, not what is computed.
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation")


# A device copies to pinned memory tens of GB a second, to other memory one or two.
STAGED_BYTES = 32 << 20
DIGEST_THREADS = 8


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer by name, dtype, shape and bytes; as they are in memory."""
    state = sorted(module.state_dict().items())
    with ThreadPoolExecutor(max_workers=DIGEST_THREADS) as pool:
        digests = pool.map(_tensor_digest, (tensor for _, tensor in state))
    fields = [f"{name}:{value}".encode() for (name, _), value in zip(state, digests, strict=True)]
    return digest("cairn.weights.v1", fields)


def _tensor_digest(tensor: Tensor) -> str:
    described = hashlib.sha256(f"{tensor.dtype}:{tuple(tensor.shape)}:".encode())
    for part in _host_bytes(tensor.detach()):
        described.update(part.numpy().data)
    return described.hexdigest()


def _host_bytes(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in order, uint8; each part is overwritten by the next."""
    if not tensor.is_cuda or not tensor.is_contiguous():
        yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        return
    flat = tensor.reshape(-1).view(torch.uint8)
    yield from staged_parts(flat, _staging(min(len(flat), STAGED_BYTES)))


def staged_parts(flat: Tensor, staging: Tensor) -> Iterator[Tensor]:
    """``flat`` (nbytes,) in order through ``staging``, both uint8; each part is overwritten by the next."""
    for first in range(0, len(flat), max(1, len(staging))):
        part = flat[first : first + len(staging)]
        staged = staging[: len(part)]
        staged.copy_(part)  # waits
        yield staged


def _staging(nbytes: int) -> Tensor:
    """Pinned, unless the system lets nobody have that."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(nbytes, dtype=torch.uint8)


def config_digest(config: Any) -> str:
    """Digest of a model configuration without the fields that name its origin."""
    fields = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    return digest("cairn.config.v1", [json.dumps(fields, sort_keys=True, default=str).encode()])


def numerics(device: torch.device, attention: str, piece_tokens: int) -> str:
    """What software and hardware round: library versions, device, attention backend, shape of the forwards."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        # With more threads a matrix product of a few rows is cut elsewhere, which changes its last bits; with other
        # instructions (AVX-512 or AMX for bf16) it is summed in another order.
        features = ",".join(read_processor().features)
        capability = f"{torch.backends.cpu.get_cpu_capability()} {features}"
        hardware = f"{platform.machine()}-{capability} threads {torch.get_num_threads()}"
    versions = f"torch {torch.__version__} transformers {transformers.__version__}"
    return f"{NUMERICS_VERSION} {versions} {hardware} {attention} piece {piece_tokens}"


def model_identity(weights: str, config: Any, layout: KVLayout, numerics_text: str) -> ModelIdentity:
    """The identity that every key of this model's KV is made under."""
    fields = (weights, config_digest(config), layout.canonical(), numerics_text)
    return ModelIdentity(digest("cairn.model.v1", [field.encode() for field in fields]))
