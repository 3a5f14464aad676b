"""Rotary position embedding as the model applies it, found by watching the model, and its inverse.

A chunk computed at positions ``j`` and placed ``offset`` further on needs no other keys: RoPE is a rotation, so
``<R(P) q, R(offset + j) k> = <R(P - offset) q, R(j) k>`` (RoFormer, arXiv:2104.09864, section 3.2.2). Here
the query is turned back by its offset, per chunk, in fp32 with a table built in fp64. Where that would round a
query twice (any dtype but float32), the model's own rotation is taken out (``BorrowedModel.defers_rotation``) and
queries and keys are turned here, once.

Models differ in which dimensions turn (partial rotary), how pairs are laid out (halves or neighbours), and
which layers turn at all. Instead of reading configurations, ``fit_rotation`` compares what the model made of
one token at position 0 and at position p, and finds the form that explains it, or says that none does.
Factors that a model folds into cos and sin (YaRN's attention factor) are in both and cancel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotation:
    """How one layer turns queries and keys. ``inv_freq`` is ``(pairs,)`` fp64, in radians a position."""

    inv_freq: Tensor
    interleaved: bool  # pairs are (2i, 2i+1) instead of (i, i + pairs)
    first_dim: int  # the turned dimensions are first_dim .. first_dim + 2 * pairs - 1
    scale: float = 1.0  # what the model multiplies the turned dimensions by (YaRN's attention factor)

    def table(self, offsets: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """cos and sin of ``offset * inv_freq``: fp32 ``(rows, 1, pairs)``, computed in fp64."""
        angles = offsets.to("cpu", torch.float64)[:, None, None] * self.inv_freq
        return angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)

    def whole_table(self, angles: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The table of a rotation done here instead of in the model: with the model's scale in it."""
        cos, sin = self.table(angles, device)
        return cos * self.scale, sin * self.scale

    def turn_back(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` (rows, heads, dim) turned by minus the table's angles, in fp32, returned in ``x``'s dtype."""
        pairs = self.inv_freq.shape[0]
        end = self.first_dim + 2 * pairs
        turned = x[..., self.first_dim : end].float()
        out = torch.empty_like(turned)
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out[..., 0::2], out[..., 1::2] = a * cos + b * sin, b * cos - a * sin
        else:
            a, b = turned[..., :pairs], turned[..., pairs:]
            out[..., :pairs], out[..., pairs:] = a * cos + b * sin, b * cos - a * sin
        if 2 * pairs == x.shape[-1]:
            return out.to(x.dtype)
        return torch.cat((x[..., : self.first_dim], out.to(x.dtype), x[..., end:]), dim=-1)


class RotationUnknown(ValueError):
    """No rotation of a known form explains what the layer does with positions."""


@dataclass(frozen=True)
class FrequencyTable:
    """An inverse-frequency buffer of a model, fp64 ``(pairs,)``, and the factor that goes with it."""

    inv_freq: Tensor
    scale: float


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that make cos and sin: those with inverse frequencies of their own."""
    return [m for m in model.modules() if any("inv_freq" in name for name, _ in m.named_buffers(recurse=False))]


def frequency_tables(model: nn.Module) -> list[FrequencyTable]:
    """Every distinct inverse-frequency buffer of the model."""
    tables: list[FrequencyTable] = []
    for module in rotary_modules(model):
        for name, buffer in module.named_buffers(recurse=False):
            if "inv_freq" not in name or buffer.dim() != 1:
                continue
            scale = float(getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0))
            table = FrequencyTable(buffer.detach().to("cpu", torch.float64), scale)
            if not any(table.scale == t.scale and torch.equal(table.inv_freq, t.inv_freq) for t in tables):
                tables.append(table)
    return tables


def fit_rotation(
    at_zero: Tensor, at_positions: Sequence[tuple[int, Tensor]], tables: Sequence[FrequencyTable], *, tolerance: float
) -> Rotation | None:
    """The rotation that turns ``at_zero`` (heads, dim) into each ``(position, (heads, dim))``.

    None means that the layer does not turn at all. ``tolerance`` is relative to the largest element.
    Raises ``RotationUnknown`` if no candidate explains every position.
    """
    scale = float(at_zero.abs().max()) + 1e-30
    if all(float((x - at_zero).abs().max()) <= tolerance * scale for _, x in at_positions):
        return None
    dim = at_zero.shape[-1]
    for table in tables:
        width = 2 * table.inv_freq.shape[0]
        if width > dim:
            continue
        forms = itertools.product(sorted({0, dim - width}), (False, True), (1.0, -1.0))
        for first_dim, interleaved, sign in forms:  # some turn the other way round
            rotation = Rotation(sign * table.inv_freq, interleaved, first_dim, table.scale)
            if _explains(rotation, at_zero, at_positions, tolerance * scale):
                return rotation
    raise RotationUnknown("its queries and keys at two positions are not rotations of each other by a known table")


def _explains(
    rotation: Rotation, at_zero: Tensor, at_positions: Sequence[tuple[int, Tensor]], tolerance: float
) -> bool:
    for position, x in at_positions:
        cos, sin = rotation.table(torch.tensor([-position]))
        turned = rotation.turn_back(at_zero.float()[None], cos, sin)[0]
        if float((turned - x.float()).abs().max()) > tolerance:
            return False
    return True
