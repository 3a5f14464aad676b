"""Why FlashInfer cannot serve a model: by what is installed, by the model, and by trying."""

from __future__ import annotations

import importlib.util
import logging

import torch

from chunk_store.layout import KVLayout, LayerLayout
from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.probe import Findings
from engine.plan import CascadePlan, Tail
from engine.run.cuda.flashinfer.attention import REMEDY, FlashInferAttention
from engine.run.cuda.flashinfer.calls import kernel_widths

log = logging.getLogger(__name__)


def device_refusal(device: torch.device) -> str:
    """Why FlashInfer cannot be used on a CUDA device, by what is installed; "" if it can."""
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed (pip install 'cairn[gpu]')"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < 8:
        return f"its kernels want compute capability 8.0, and the device has {capability[0]}.{capability[1]}"
    return ""


def flashinfer_refusal(findings: Findings, heads: int) -> str:
    """Why FlashInfer cannot serve the model's attention, wherever; "" if it can."""
    if findings.layout.dtype not in ("bfloat16", "float16"):
        return f"its kernels take bfloat16 and float16, and the model is served in {findings.layout.dtype}"
    for layer in set(findings.layout.layers):
        if heads % layer.kv_heads:
            return f"{heads} heads are not a multiple of {layer.kv_heads} KV heads"
        try:
            kernel_widths(layer.k_dim, layer.v_dim)
        except ValueError as error:
            return str(error)
    return ""


def build_refusal(findings: Findings, heads: int, device: torch.device) -> str:
    """Why kernels for the model's layers cannot be built and run on the device; "" if they can.

    Takes minutes where the kernels were never built.
    """
    for layer in dict.fromkeys(findings.layout.layers):
        log.info("FlashInfer's kernels of width %d are looked for; the first time they are built: minutes", layer.k_dim)
        try:
            _try(findings.layout.dtype, layer, heads, device)
        except Exception as error:  # whatever a compiler, a loader or a driver says
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return f"its kernels cannot be built or run: {said}; {REMEDY}"
    return ""


def _try(dtype: str, layer: LayerLayout, heads: int, device: torch.device) -> None:
    """Attention of one row over itself."""
    pool = PagedKVPool(KVLayout(dtype, (layer,)), pages=1, chunk_pages=0, page_size=16, device=device)
    shapes = ((heads, layer.k_dim), (layer.kv_heads, layer.k_dim), (layer.kv_heads, layer.v_dim))
    q, k, v = (torch.zeros(1, *shape, dtype=pool.keys[0].dtype, device=device) for shape in shapes)
    attention = FlashInferAttention(pool, [None])
    step = attention.prepare(CascadePlan((), (Tail(0, 1, (0,), 0),), (0,), (0,), 1))
    attention.attend(step, 0, q, k, v, Scores(layer.k_dim**-0.5))
    torch.cuda.synchronize(device)
