"""Partial attention in torch: softmax over some of a row's keys, with what merging needs.

A partial result is ``(out, lse)``: the softmax-weighted values over the keys seen, and the natural logarithm
of the sum of the exponentials. ``merge`` combines partial results over disjoint keys (FlashDecoding's
identity; see also Milakov and Gimelshein, arXiv:1805.02867).

Shapes: q ``(batch, heads, rows, k_dim)``, k ``(batch, heads, keys, k_dim)``, v ``(batch, heads, keys, v_dim)``,
strided views allowed; out ``(batch, heads, rows, v_dim)`` in q's dtype, lse ``(batch, heads, rows)`` fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCORES_MAX = 1 << 27  # half a GB in fp32

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every row over all keys given, or over keys 0..row if ``causal``.

    ``mask`` is added to the scores; broadcastable to (batch, heads, rows, keys), in q's dtype.
    """
    if by_products(q, v.shape[-1], softcap):
        return _by_matmul(q, k, v, scaling, softcap, causal, mask)
    width = v.shape[-1]
    if width < k.shape[-1]:
        v = torch.nn.functional.pad(v, (0, k.shape[-1] - width))
    out, lse = _flash_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scaling)
    return out[..., :width], lse


def by_products(q: Tensor, v_dim: int, softcap: float | None) -> bool:
    """Whether attention is computed by products over all keys of a batch: a row's bits then depend on the batch."""
    return softcap is not None or q.device.type != "cpu" or q.dtype == torch.float16 or v_dim > q.shape[-1]


def _by_matmul(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In fp32, as many rows at once as have ``SCORES_MAX`` scores: the last piece of a long chunk has tens of GB."""
    k, v = k.float().transpose(-1, -2), v.float()
    rows, most = q.shape[-2], max(1, SCORES_MAX // max(1, q.shape[0] * q.shape[1] * k.shape[-1]))
    outs, lses = [], []
    for first in range(0, rows, most):
        scores = torch.matmul(q[..., first : first + most, :].float(), k) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + first)
            scores = scores.masked_fill(future, float("-inf"))
        if mask is not None:
            scores = scores + (mask if mask.shape[-2] == 1 else mask[..., first : first + most, :]).float()
        lse = torch.logsumexp(scores, dim=-1)
        outs.append(torch.matmul(torch.exp(scores - lse[..., None]), v).to(q.dtype))
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, -2), torch.cat(lses, -1))


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None) -> Tensor:
    """Merges partial results one after another, in the order given, in fp32; returns (..., heads, v_dim).

    ``outs[i]`` is (..., heads, v_dim), ``lses[i]`` is (..., heads). The first of every row must be finite; an
    lse of -inf in a later one leaves the row's bits as they are. ``sinks`` (heads,) joins every softmax.
    """
    out, total = outs[0].float(), lses[0]
    last = len(outs) - 1
    for index in range(1, len(outs)):
        out = torch.lerp(out, outs[index].float(), _share(lses[index], total)[..., None])
        if index < last or sinks is not None:
            total = add_lse(total, lses[index])
    return out if sinks is None else out * _share(total, sinks)[..., None]


def merge_pair(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results as one, in fp32; both finite."""
    merged = torch.lerp(out.float(), other.float(), _share(other_lse, lse)[..., None])
    return merged, add_lse(lse, other_lse)


def _share(lse: Tensor, other: Tensor) -> Tensor:
    """exp(lse) / (exp(lse) + exp(other)); written with exp alone, whose bits do not depend on a row's place."""
    return torch.reciprocal(torch.exp(other - lse) + 1.0)


def add_lse(lse: Tensor, other: Tensor) -> Tensor:
    """log(exp(lse) + exp(other)), without overflow; ``lse`` is finite."""
    return torch.maximum(lse, other) + torch.log(torch.exp(-(lse - other).abs()) + 1.0)
