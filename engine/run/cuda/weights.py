"""The weights of a plain decoder, merged for few and wide matrix products.

    q_proj | k_proj | v_proj  ->  one (q + k + v, hidden)        gate_proj | up_proj  ->  one (2 * mlp, hidden)

Those of experts lie together as transformers keeps them, and are used in place. The module's own parameters become
views of the merged storage, so nothing is kept twice and the module still works (its eager attention is what the
self-check compares with). ``fused_refusal`` is the explicit list of what a model must be; anything else runs through
transformers' modelling code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.borrowed import BorrowedModel
from engine.model.probe import Findings
from engine.model.quantized import is_opaque, is_plain
from engine.model.rotary import Rotation
from engine.plan import Window
from engine.run.cuda.experts.layer import Experts, experts_refusal
from engine.run.cuda.products import AS_THEY_COME, Ways

FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "qwen3_moe", "mixtral")
ROUNDED_SHARES = ("qwen3_moe",)  # families that round what an expert's result is multiplied with to their own dtype
HEAD_MULTIPLE = 16  # rows
HEAD_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Mlp:
    """``gate_up`` (2 * width, hidden), the gate first; ``down`` (hidden, width)."""

    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer; matrices (out, in) as transformers keeps them. ``q_norm``/``k_norm`` (head_dim,) or None."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    post_norm: Tensor
    mlp: Mlp | Experts


@dataclass(frozen=True)
class FusedWeights:
    """A whole model. ``eps`` is that of every RMSNorm, ``rotation`` that of every layer, as are ``ways``; ``windows``
    are by layer, None that it sees everything."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    rotation: Rotation
    windows: tuple[Window | None, ...]
    ways: Ways = AS_THEY_COME  # in which each product is computed
    head_padding: int = 0  # last rows of the head that are no token's

    @property
    def hidden(self) -> int:
        return self.embedding.shape[1]

    @property
    def mlp(self) -> int:
        """The width of layers without experts; 0 if there are none."""
        return max((layer.mlp.down.shape[1] for layer in self.layers if isinstance(layer.mlp, Mlp)), default=0)

    @property
    def experts(self) -> Experts | None:
        """Of the first layer that has some; other layers have experts of the same widths, or none."""
        return next((layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts)), None)

    @property
    def vocabulary(self) -> int:
        return self.head.shape[0] - self.head_padding


def fused_refusal(borrowed: BorrowedModel, findings: Findings) -> str:
    """Why the model cannot take the fused path; "" if it can."""
    config = borrowed.config
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r} is none of {FAMILIES}"
    if findings.layout.dtype not in ("bfloat16", "float16"):
        return f"dtype {findings.layout.dtype}"
    if findings.rotation_refusal:
        return findings.rotation_refusal
    layers = set(findings.layout.layers)
    rotations = {id(rotation): rotation for rotation in findings.rotations}
    if len(layers) != 1 or len(rotations) != 1:
        return "layers that differ"
    (layer,), (rotation,) = layers, rotations.values()
    if layer.k_dim != layer.v_dim or layer.k_dim not in HEAD_DIMS:
        return f"head widths {layer.k_dim} and {layer.v_dim}; equal ones of {HEAD_DIMS} are needed"
    if rotation is None or rotation.interleaved or 2 * rotation.inv_freq.shape[0] != layer.k_dim:
        return "a rotation of other than the two halves of a whole head"
    if getattr(config, "hidden_act", "") != "silu":
        return f"activation {getattr(config, 'hidden_act', None)!r}"
    inner: Any = borrowed.module.model
    # Quantised ones that were not unpacked, or that round what they are given.
    if not all(is_plain(part) for part in inner.modules() if isinstance(part, nn.Linear) or is_opaque(part)):
        return "linear layers that do more than multiply"
    if float(getattr(inner.rotary_emb, "attention_scaling", 1.0)) != 1.0:
        return "rotary tables with a scaling factor"
    biased = [*(layer.self_attn.o_proj for layer in inner.layers), borrowed.module.lm_head]
    biased += [layer.mlp.down_proj for layer in inner.layers if not hasattr(layer.mlp, "experts")]
    if any(getattr(linear, "bias", None) is not None for linear in biased):
        return "biases outside of q, k and v"
    return next((why for layer in inner.layers if (why := _experts_refusal(layer.mlp))), "")


def _experts_refusal(mlp: Any) -> str:
    """Why the experts of a layer, if it has some, cannot be computed; "" if they can."""
    experts = getattr(mlp, "experts", None)
    if experts is None:
        return ""
    gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    for stacked in (gate_up, down):
        if not isinstance(stacked, Tensor) or stacked.dim() != 3 or not stacked.is_contiguous():
            return "experts that are not stacked in one tensor"
    assert gate_up is not None and down is not None
    if gate_up.dtype != mlp.gate.weight.dtype or gate_up.shape[1] != 2 * down.shape[2]:
        return "experts of another form than gate, up and down"
    return experts_refusal(gate_up.shape[0], int(mlp.gate.top_k), gate_up.shape[2], down.shape[2])


@torch.no_grad()
def merge_weights(borrowed: BorrowedModel, findings: Findings) -> FusedWeights:
    """Merges the weights in place and returns them. Raises ``ValueError`` if ``fused_refusal`` says why not."""
    refusal = fused_refusal(borrowed, findings)
    if refusal:
        raise ValueError(f"model {borrowed.name} cannot take the fused path: {refusal}")
    module: Any = borrowed.module
    layer, rotation = findings.layout.layers[0], findings.rotations[0]
    assert rotation is not None
    rounded = borrowed.config.model_type in ROUNDED_SHARES
    layers = tuple(_layer(inner, rounded) for inner in module.model.layers)
    head = _padded(module.lm_head.weight.detach())
    return FusedWeights(
        embedding=module.model.embed_tokens.weight.detach(),
        layers=layers,
        final_norm=module.model.norm.weight.detach(),
        head=head,
        head_padding=head.shape[0] - module.lm_head.weight.shape[0],
        eps=float(module.model.norm.variance_epsilon),
        heads=layers[0].o.shape[1] // layer.k_dim,
        kv_heads=layer.kv_heads,
        head_dim=layer.k_dim,
        scaling=float(getattr(module.model.layers[0].self_attn, "scaling", layer.k_dim**-0.5)),
        rotation=rotation,
        windows=findings.windows,
    )


def _layer(layer: Any, rounded: bool) -> LayerWeights:
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=merged([linear.weight for linear in projections]),
        qkv_bias=None if projections[0].bias is None else merged([linear.bias for linear in projections]),
        q_norm=None if q_norm is None else q_norm.weight.detach(),
        k_norm=None if k_norm is None else k_norm.weight.detach(),
        o=attention.o_proj.weight.detach(),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        mlp=_experts(layer.mlp, rounded) if hasattr(layer.mlp, "experts") else _mlp(layer.mlp),
    )


def _mlp(mlp: Any) -> Mlp:
    return Mlp(merged([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight.detach())


def _experts(mlp: Any, rounded: bool) -> Experts:
    return Experts(
        router=mlp.gate.weight.detach(),
        gate_up=mlp.experts.gate_up_proj.detach(),
        down=mlp.experts.down_proj.detach(),
        top=int(mlp.gate.top_k),
        normed=bool(getattr(mlp.gate, "norm_topk_prob", True)),  # Mixtral has no choice
        rounded=rounded,
    )


def _padded(matrix: Tensor) -> Tensor:
    """The matrix with rows of zeros up to a multiple of ``HEAD_MULTIPLE``; itself if it has so many.

    With rows of logits at odd addresses the library takes kernels that sum otherwise for other numbers of rows.
    """
    missing = -matrix.shape[0] % HEAD_MULTIPLE
    return nn.functional.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def merged(parameters: list[nn.Parameter]) -> Tensor:
    """The parameters one below the other in one storage, of which they are views afterwards.

    Parameters that already lie so are left as they are, so that merging twice changes nothing.
    """
    first = parameters[0].data
    rows = [parameter.shape[0] for parameter in parameters]
    total = (sum(rows), *first.shape[1:])
    expected = first.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != expected or not _same_storage(parameter, first):
            break
        expected += parameter.data.nbytes
    else:
        return first.as_strided(total, first.stride(), first.storage_offset())
    merged = torch.cat([parameter.data for parameter in parameters])
    at = 0
    for parameter, count in zip(parameters, rows, strict=True):
        parameter.data = merged[at : at + count]
        at += count
    return merged


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
