"""Whether a row's bits change with the tokens of the other rows of a forward, at one number of rows.

In mixtures of experts they can: an expert's product has as many rows as chose it, and with few rows a library may sum
otherwise than with many. What pads steps to one number of rows does not help there. On the CPU that is so in float32,
where one to three rows take other kernels.

So can attention that is computed by products over all keys of a batch (soft caps on the CPU): how long these are
follows from whose tails are read together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.attention import Scores
from engine.attention.partial import by_products
from engine.check.precision import first_layers, layers_of_every_kind
from engine.model.borrowed import BorrowedModel
from engine.model.probe import Findings

ROWS = 32
KEPT = 12  # the first rows have the same tokens in every company
COMPANIES = 4


@torch.inference_mode()
def rows_stand_alone(borrowed: BorrowedModel, findings: Findings, layers: nn.ModuleList | None) -> bool:
    """Whether the first rows of a forward have the same bits in every company; each token attends to itself alone.

    On the first of ``layers`` that have every kind, with the model's own weights in its own dtype; on all of them if it
    is None. Experts in float32 on the CPU are not looked at: who chooses which is chance. Not equal where attention on
    the CPU is computed by products.
    """
    if findings.layout.dtype == "float32" and borrowed.device.type == "cpu" and has_experts(borrowed.module):
        return False
    if layers is None:
        return _equal(borrowed)
    count = layers_of_every_kind(layers, list(findings.layout.layers))
    with first_layers(layers, count):
        return _equal(borrowed)


def has_experts(module: nn.Module) -> bool:
    """Whether rows are computed by experts that they choose, as far as names of transformers' modules say."""
    return any(
        "Experts" in type(part).__name__ or "experts" in name.split(".") for name, part in module.named_modules()
    )


def _equal(borrowed: BorrowedModel) -> bool:
    vocabulary = int(borrowed.config.get_text_config().vocab_size)
    draw = torch.Generator().manual_seed(31)
    ids = torch.randint(0, vocabulary, (ROWS,), generator=draw)
    first: list[Tensor] = []
    for company in range(COMPANIES):
        others = torch.randint(0, vocabulary, (ROWS - KEPT,), generator=draw)
        if company == 0:
            others = ids[:1].expand(ROWS - KEPT)  # all choose the same experts: the rest has few rows
        seen = _rows(borrowed, torch.cat([ids[:KEPT], others]))
        if seen is None:
            return False
        first = first or seen
        if not all(map(torch.equal, first, seen)):
            return False
    return True


def _rows(borrowed: BorrowedModel, ids: Tensor) -> list[Tensor] | None:
    """Logits, queries and keys of the kept rows; None where attention is computed by products on the CPU."""
    seen: list[Tensor] = []
    products = False

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        nonlocal products
        products = products or (q.device.type == "cpu" and by_products(q, v.shape[-1], scores.softcap))
        seen.extend((q[:KEPT].clone(), k[:KEPT].clone()))
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    rows = torch.arange(len(ids), device=borrowed.device)
    logits = borrowed.forward(ids.to(borrowed.device), torch.zeros_like(rows), attend, rows)
    return None if products else [logits[:KEPT], *seen]
