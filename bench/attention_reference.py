"""Attention of a plan in fp32 torch, one read at a time: what the kernels are compared with. Slow and plain."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.plan import CascadePlan
from engine.run.cuda.cascade.tuning import RotationTable


def turned(q: Tensor, angles: Tensor, table: RotationTable) -> Tensor:
    """q (pairs, heads, dim) raw, turned to ``angles`` (pairs,) in fp32, rounded once to q's dtype as a model does."""
    half = table.cos.shape[1]
    c, s = table.cos[angles][:, None], table.sin[angles][:, None]
    a, b, rest = q[..., :half].float(), q[..., half : 2 * half].float(), q[..., 2 * half :].float()
    return torch.cat((a * c - b * s, b * c + a * s, rest), -1).to(q.dtype).float()


def reference(
    plan: CascadePlan,
    keys: Tensor,
    values: Tensor,
    q: Tensor,
    table: RotationTable | None,
    scaling: float,
    page_size: int,
) -> Tensor:
    """(rows, heads, dim) fp32 attention of raw ``q`` over the plan; ``keys``, ``values`` (slots, kv_heads, dim)."""
    device = q.device
    positions = torch.tensor(plan.positions, device=device)
    rows, heads, _ = q.shape
    top = torch.full((rows, heads), float("-inf"), device=device)
    total = torch.zeros(rows, heads, device=device)
    out = torch.zeros(rows, heads, values.shape[-1], device=device)
    for read in plan.reads:
        slots = torch.arange(read.first_slot, read.first_slot + read.tokens, device=device)
        for part in sorted(set(read.places)):
            mine = [i for i, p in enumerate(read.places) if p == part]
            index = torch.tensor([read.rows[i] for i in mine], device=device)
            offsets = torch.tensor([read.offsets[i] for i in mine], device=device)
            seen = torch.full((len(mine),), read.tokens, device=device)
            _fold(q, index, positions[index] - offsets, slots, seen, keys, values, table, scaling, top, total, out)
    for tail in plan.tails:
        tokens = tail.tokens_before + tail.rows
        at = torch.arange(tokens, device=device)
        slots = torch.tensor(tail.pages, device=device)[at // page_size] * page_size + at % page_size
        index = torch.arange(tail.first_row, tail.first_row + tail.rows, device=device)
        seen = torch.arange(tail.tokens_before + 1, tokens + 1, device=device)
        _fold(q, index, positions[index], slots, seen, keys, values, table, scaling, top, total, out)
    return out / total[..., None]


def _fold(
    q: Tensor, rows: Tensor, angles: Tensor, slots: Tensor, seen: Tensor, keys: Tensor, values: Tensor,
    table: RotationTable | None, scaling: float, top: Tensor, total: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Adds the rows' attention over ``slots`` (the first ``seen`` of them) to the running maximum, sum and output."""
    x = q[rows].float() if table is None else turned(q[rows], angles, table)
    ratio = x.shape[1] // keys.shape[1]
    for begin in range(0, len(slots), 4096):
        part = slots[begin : begin + 4096]
        k = keys[part].float().repeat_interleave(ratio, 1)
        v = values[part].float().repeat_interleave(ratio, 1)
        scores = torch.einsum("rhd,nhd->rhn", x, k) * scaling
        at = begin + torch.arange(len(part), device=q.device)
        scores = scores.masked_fill((at[None, :] >= seen[:, None])[:, None], float("-inf"))
        new_top = torch.maximum(top[rows], scores.amax(-1))
        keep, p = torch.exp(top[rows] - new_top), torch.exp(scores - new_top[..., None])
        total[rows] = total[rows] * keep + p.sum(-1)
        out[rows] = out[rows] * keep[..., None] + torch.einsum("rhn,nhd->rhd", p, v)
        top[rows] = new_top
