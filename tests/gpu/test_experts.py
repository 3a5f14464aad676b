"""Layers of experts on the card: every number of rows, long pieces too, against float32; and the same bits by each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.run.cuda.experts.launch import run_experts
from engine.run.cuda.experts.layer import ExpertBuffers, Experts
from engine.run.cuda.prefill_attention import launch_options

pytestmark = pytest.mark.gpu

# hidden, inner, experts, a row's: Qwen3-30B-A3B, a narrow Mixtral, odd widths
SHAPES = {"qwen3": (2048, 768, 128, 8), "mixtral": (1024, 3584, 8, 2), "odd": (264, 136, 70, 5)}
MOST = 9000


def layer_of(name: str, dtype: torch.dtype) -> Experts:
    hidden, inner, count, top = SHAPES[name]
    generator = torch.Generator("cuda").manual_seed(0)

    def matrix(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, device="cuda") * size[-1] ** -0.5).to(dtype)

    router, gate_up, down = matrix(count, hidden), matrix(count, 2 * inner, hidden), matrix(count, hidden, inner)
    return Experts(router, gate_up, down, top, normed=name != "odd", rounded=name != "mixtral")


def reference(layer: Experts, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    out = torch.zeros(x.shape, device=x.device)
    for expert in chosen.unique().tolist():
        row, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (x[row].float() @ layer.gate_up[expert].float().t()).chunk(2, dim=-1)
        made = (torch.nn.functional.silu(gate) * up) @ layer.down[expert].float().t()
        out.index_add_(0, row, made * shares[row, slot, None])
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", SHAPES)
def test_experts_make_what_they_make_in_float32(name: str, dtype: torch.dtype) -> None:
    layer, overlap = layer_of(name, dtype), launch_options(torch.device("cuda"))
    every = torch.randn(MOST, layer.hidden, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(dtype)
    every[5000:6000] = every[5000]  # rows that all go to the same experts
    for rows in (1, 3, 5, 16, 17, 64, 128, 200, 512, 1024, 1025, 1500, 4097, MOST):
        x, buffers = every[-rows:], ExpertBuffers.of(layer, rows)
        out = torch.empty_like(x)
        run_experts(layer, x, out, buffers, overlap=overlap)
        chosen, shares = buffers.experts.view(rows, -1).long(), buffers.shares.view(rows, -1)
        assert torch.equal(
            buffers.order.sort().values, torch.arange(rows * layer.top, device="cuda", dtype=torch.int32)
        )
        logits = (x.double() @ layer.router.double().t()).float()
        found, best = logits.gather(1, chosen).sum(), logits.topk(layer.top, dim=1).values.sum()
        assert float(found) >= float(best) - 5e-3 * rows, "the best, but for what rounding makes equal"
        probabilities = torch.softmax(logits, dim=1).gather(1, chosen)
        wanted = probabilities / probabilities.sum(dim=1, keepdim=True) if layer.normed else probabilities
        torch.testing.assert_close(shares, wanted, rtol=0.03, atol=1e-3)
        exact = reference(layer, x, chosen, shares)
        assert float((out.float() - exact).abs().max()) <= 0.1 * float(exact.std()), rows
