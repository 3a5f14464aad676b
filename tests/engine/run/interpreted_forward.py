"""``python -m tests.engine.run.interpreted_forward``, with TRITON_INTERPRET=1: whole forwards of models with experts.

Dense layers and such with experts, the rows that draw apart from the others, against transformers in bfloat16 and in
float32. Attention is torch's own, over the keys and values that the forward wrote.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from engine.run.cuda.forward import FusedForward
from engine.run.cuda.weights import merge_weights
from tests.architectures import build
from tests.engine.run.interpreted_experts import HEADS, QWEN, any_range, exact_bfloat16

ROWS, DRAWN = 14, (13, 2, 7)
MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen3_moe", {**QWEN, "mlp_only_layers": [1], "num_hidden_layers": 4}),
    ("mixtral", {**HEADS, "num_hidden_layers": 2}),
)
SHARE_MAX = 1.5


def forward(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of the rows ``DRAWN``, and what each layer but the last hands on, of all rows."""
    borrowed = BorrowedModel(model, name="whole")
    findings = replace(examine(borrowed), deferred=False)
    weights = merge_weights(borrowed, findings)
    pool = PagedKVPool(findings.layout, pages=4, chunk_pages=2, page_size=16, device="cpu")
    ours = FusedForward(weights, pool, positions=64)
    inputs, hidden = ours.inputs(ROWS), []
    inputs.sources.copy_(ids)
    for each in (inputs.positions, inputs.slots):
        each.copy_(torch.arange(ROWS))

    def attend(layer: int, q: Tensor, turned: Tensor, out: Tensor) -> None:
        keys, values = (
            pages[layer].view(-1, weights.kv_heads, weights.head_dim)[:ROWS].transpose(0, 1)[None]
            for pages in (pool.keys, pool.values)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(
            turned.transpose(0, 1)[None], keys, values, is_causal=True, scale=weights.scaling, enable_gqa=True
        )
        out.copy_(attended[0].transpose(0, 1))

    drawn = ours.outputs(torch.tensor(DRAWN, dtype=torch.int32))
    last = torch.zeros(1, dtype=torch.int32)
    ours.layers(inputs, last, attend, turn=True, drawn=[drawn])
    unwatched = drawn.logits.clone()
    ours.watch = lambda index, states: hidden.append(states.clone())
    ours.layers(inputs, last, attend, turn=True, drawn=[drawn])
    assert torch.equal(drawn.logits, unwatched), "who watches changes nothing"
    return drawn.logits.float(), hidden


@torch.no_grad()
def check(family: str, settings: dict[str, Any], seed: int) -> None:
    model = build(family, settings, seed=seed).bfloat16()
    wide = copy.deepcopy(model).float()
    ids = torch.randint(0, 211, (ROWS,), generator=torch.Generator().manual_seed(seed))
    wanted, theirs = (each(ids[None], output_hidden_states=True) for each in (wide, model))
    logits, hidden = forward(model, ids)
    assert len(hidden) == settings["num_hidden_layers"] - 1
    states = [(logits, *(each.logits[0, list(DRAWN)].float() for each in (theirs, wanted)))]
    for index, ours in enumerate(hidden, 1):
        states.append((ours.float(), *(each.hidden_states[index][0].float() for each in (theirs, wanted))))
    for ours, own, exact in states:
        # The row in the middle: rounding may send one to another expert, in our forward or in theirs.
        error, rounding = ((each - exact).square().mean(dim=1).sqrt().median() for each in (ours, own))
        assert error <= SHARE_MAX * rounding, (family, float(error), float(rounding))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    exact_bfloat16()
    any_range()
    for family, settings in MODELS:
        check(family, settings, 3)


if __name__ == "__main__":
    main()
