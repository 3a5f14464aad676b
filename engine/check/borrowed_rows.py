"""Whether a row of a model's own code has the same bits in every step: its products one by one, then all of it.

The whole is computed with few and many rows of which each sees itself alone: attention of ours works row by row. A few
layers are enough, one of every kind: a row that is once others stays others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import Scores
from engine.check.precision import first_layers, layers_of_every_kind
from engine.check.rows import ROWS_CHECKED, Product, RowBits, pinned
from engine.run.cuda.borrowed import CapturedModel, own_values
from engine.run.cuda.joined import Joined
from engine.run.cuda.products import BUCKETS, PLAIN, ROWS_MAX
from engine.run.cuda.replaced import products, whole_of

FORWARDS = 8  # of so many rows each, at most


@dataclass(frozen=True)
class WholeRowBits(RowBits):
    """What was found of a model's own code. ``apart``: with how many rows some row of the whole has other bits.

    Where there are any, chunks and prompts are pieces of their own, and steps of rows that decode as they come.
    """

    apart: tuple[int, ...] = ()

    @property
    def equal(self) -> bool:
        return super().equal and not self.apart

    @property
    def buckets(self) -> tuple[int, ...]:
        return BUCKETS

    @property
    def reason(self) -> str:
        done = [str(one) for one in self.products if one.way != PLAIN]
        if self.equal:
            return "; ".join([f"rows of the model's own code have the same bits at 1 to {ROWS_MAX} rows", *done])
        failed = [f"the product {one.name}" for one in self.products if one.still]
        rows = ", ".join(map(str, self.apart))
        whole = [f"the model's own code differs at {rows} rows"] if self.apart else []
        return "; ".join([*failed, *whole, "chunks and prompts are computed alone, decoded rows in any company", *done])

    @property
    def numerics(self) -> str:
        return super().numerics if self.equal else " ".join(["rows apart", *super().numerics.split()[2:]])


@torch.inference_mode()
def check_rows_of(model: CapturedModel) -> tuple[CapturedModel, WholeRowBits]:
    """The model with its products computed as was found, and what was found."""
    order = torch.randperm(ROWS_MAX, generator=torch.Generator().manual_seed(0)).to(model.borrowed.device)
    products = tuple(pinned(one, order) for one in _products(model))
    ways = {one.name: one.way for one in products if one.way != PLAIN}
    model = model.multiplied(ways) if ways else model
    return model, WholeRowBits(products, _apart(model, order))


def _products(model: CapturedModel) -> Iterator[Product]:
    """Of every product the first and the last."""
    for name, members in products(model.borrowed).items():
        ends = [members[0], members[-1]] if len(members) > 1 else members
        matrices = [end.whole() if isinstance(end, Joined) else whole_of(end) for end in ends]
        weight = matrices[0][0]
        generator = torch.Generator(weight.device).manual_seed(0)
        rows = torch.randn(ROWS_MAX, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
        yield Product(name, tuple(matrices), rows)


def _apart(model: CapturedModel, order: Tensor) -> tuple[int, ...]:
    """With how many rows some row of a forward has other keys, values or logits than among the most."""
    device, vocabulary = model.borrowed.device, model.vocabulary
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (ROWS_MAX,), generator=generator).to(device)
    longest = model.findings.context_length_max
    positions = torch.randint(0, min(longest, 4096), (ROWS_MAX,), generator=generator).to(device)
    found = []
    with _few_layers(model):
        whole = _results(model, tokens, positions)
        for rows in ROWS_CHECKED:
            apart = []
            for picked in _picked(order, rows):
                alone = _results(model, tokens[picked], positions[picked])
                apart += [(_bits(a) != _bits(b[picked])).any() for a, b in zip(alone, whole, strict=True)]
            found.append(torch.stack(apart).any())
    return tuple(rows for rows, apart in zip(ROWS_CHECKED, torch.stack(found).tolist(), strict=True) if apart)


def _picked(order: Tensor, rows: int) -> Iterator[Tensor]:
    count = torch.arange(ROWS_MAX, device=order.device)
    yield count[:rows]
    yield count[-rows:]
    yield from (order[at : at + rows] for at in range(0, ROWS_MAX - rows + 1, rows)[:FORWARDS])


def _results(model: CapturedModel, tokens: Tensor, positions: Tensor) -> list[Tensor]:
    """Keys and values of every layer, and logits, (rows, ...) each."""
    found: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        found.extend((q, k, v))
        return own_values(q, v)

    logits, _ = model.run(tokens, positions, attend, torch.arange(len(tokens), device=tokens.device))
    return [*found, logits]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@contextmanager
def _few_layers(model: CapturedModel) -> Iterator[None]:
    """The model cut to layers of every kind; one whose layers are in no list stays whole."""
    layers: nn.ModuleList | None = model.borrowed.decoder_layers()
    if layers is None:
        yield
        return
    also: list[Any] = list(zip(model.findings.layout.layers, map(id, model.findings.rotations), strict=True))
    with first_layers(layers, layers_of_every_kind(layers, also)):
        yield
