"""``python -m tests.engine.run.interpreted_experts FIRST LAST``, with TRITON_INTERPRET=1: cases of ``CASES``.

Layers of experts by our kernels against transformers' own modules. A process of its own, since what Triton's kernels
become is settled when Triton is imported.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from transformers import PreTrainedModel
from triton.runtime import interpreter

from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from engine.run.cuda import kernels
from engine.run.cuda.experts.launch import arrive, route, run_experts
from engine.run.cuda.experts.layer import ExpertBuffers, Experts
from engine.run.cuda.experts.tiles import PIECES, STEPS, Tiles
from engine.run.cuda.products import ROWS_MAX
from engine.run.cuda.weights import Mlp, merge_weights
from tests.architectures import build

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
QWEN = {**HEADS, "moe_intermediate_size": 40, "num_experts": 12, "num_experts_per_tok": 3, "norm_topk_prob": True}
TIES, CROWD = "ties", "crowd"  # rows whose scores are often equal; rows that all go to one expert


@dataclass(frozen=True)
class Case:
    family: str
    settings: dict[str, Any]
    rows: int
    dtype: torch.dtype = torch.bfloat16
    tiles: Tiles | None = None
    scores: str = ""


CASES = (
    Case("qwen3_moe", QWEN, 1),
    Case("qwen3_moe", {**QWEN, "hidden_size": 72, "norm_topk_prob": False}, 37, torch.float16),
    Case("mixtral", {**HEADS, "intermediate_size": 104}, 20),
    Case("qwen3_moe", {**QWEN, "num_experts": 70, "num_experts_per_tok": 8, "hidden_size": 264}, 5),
    Case("mixtral", {**HEADS, "intermediate_size": 48, "num_local_experts": 5}, 70, torch.float16, STEPS[1]),
    Case("qwen3_moe", QWEN, 130, scores=CROWD),
    Case("qwen3_moe", {**QWEN, "mlp_only_layers": [0], "num_experts_per_tok": 1}, 3),
    Case("qwen3_moe", {**QWEN, "decoder_sparse_step": 2}, 64, scores=TIES),
    Case("mixtral", {**HEADS, "intermediate_size": 64}, 150, torch.float16, PIECES, CROWD),
    Case("qwen3_moe", {**QWEN, "hidden_size": 136}, 30, tiles=STEPS[0]),
)


def exact_bfloat16() -> None:
    """The interpreter multiplies bfloat16 as if it were integers, and cuts it off instead of rounding."""
    builder: Any = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = (self.create_fp_ext(each, tl.float32) for each in (a, b))
        return dot(self, a, b, *rest)

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return self.cast_impl(source, target)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(np.uint16).reshape(source.data.shape), tl.bfloat16)

    builder.create_dot, builder.create_fp_trunc = wide_dot, rounded


def any_range() -> None:
    """The interpreter makes a bound of a loop a number in a way that numpy does not have any more."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def rows_of(case: Case, router: Tensor) -> Tensor:
    """Rows (rows, hidden), small whole numbers; the router's weights are replaced by such too: scores are exact."""
    generator = torch.Generator().manual_seed(case.rows)
    most = 2 if case.scores == TIES else 4

    def whole(*size: int) -> Tensor:
        return torch.randint(-most, most + 1, size, generator=generator).to(router.dtype)

    weight = whole(*router.shape)
    weight[:, 0] = 0
    x = whole(case.rows, router.shape[1])
    if case.scores == CROWD:
        x[:, 0], weight[2, 0] = 8.0, 64.0
    router.copy_(weight * 2.0**-7)
    return x * 0.5


def check_routes(layer: Experts, x: Tensor, experts: Tensor, shares: Tensor) -> None:
    logits = (x.double() @ layer.router.double().T).to(x.dtype)
    chosen, every = logits.gather(1, experts.long()), torch.arange(layer.count)
    assert (experts.diff(dim=1) > 0).all(), "in ascending order, each once"
    best = torch.stack([row[torch.argsort(-row, stable=True)][: layer.top] for row in logits.float()])
    assert torch.equal(chosen.float().sort(dim=1, descending=True).values, best)
    for row, own in zip(logits.float(), experts, strict=True):  # of equal scores the first
        left = every[~torch.isin(every, own)]
        assert all(not (row[left[left < one]] == row[one]).any() for one in own.long())
    wanted = torch.softmax(logits.float(), dim=1).gather(1, experts.long())
    if layer.normed:
        wanted = wanted / wanted.sum(dim=1, keepdim=True)
    if layer.rounded:
        wanted = wanted.to(x.dtype).float()
    allowed = 2.0**-7 if layer.rounded else 1e-5
    assert torch.allclose(shares, wanted, rtol=allowed, atol=1e-6), (shares - wanted).abs().max()


@torch.no_grad()
def check_layer(case: Case, module: Any, layer: Experts) -> None:
    x = rows_of(case, layer.router)
    room = ROWS_MAX + 1 if case.tiles is PIECES else case.rows  # so that there is room for a list of tiles
    buffers, out = ExpertBuffers.of(layer, room), torch.empty_like(x)
    for inside in (buffers.inner, buffers.results):
        inside.fill_(float("nan"))  # what no pair wrote does not reach a row
    run_experts(layer, x, out, buffers, overlap={"OVERLAP": False}, tiles=case.tiles)
    check_arrival(layer, out, buffers)
    experts, shares = (each.view(room, -1)[: case.rows] for each in (buffers.experts, buffers.shares))
    check_routes(layer, x, experts, shares)
    given = shares.to(x.dtype) if layer.rounded else shares
    own = module.experts(x, experts.long(), given).float()
    wide = module.experts.float()(x.float(), experts.long(), shares)
    error, rounding = ((each - wide).abs().max().item() for each in (out.float(), own))
    assert error <= 1.5 * rounding + 2.0**-9 * wide.abs().max().item(), (error, rounding)


def check_arrival(layer: Experts, added: Tensor, buffers: ExpertBuffers) -> None:
    """What is added with the norm behind it is what is added alone, and normed as layers without experts are."""
    residual, weight = torch.randn(added.shape).to(added.dtype), torch.randn(layer.hidden).to(added.dtype)
    twin, out, wanted = residual.clone(), torch.empty_like(added), torch.empty_like(added)
    arrive(layer, residual, weight, out, buffers, 1e-6, overlap={"OVERLAP": False})
    block = 1 << (layer.hidden - 1).bit_length()
    kernels.add_norm[(len(added),)](
        twin, added, weight, wanted, 1e-6, ADD=True, WIDTH=layer.hidden, BLOCK=block, OVERLAP=False
    )
    assert torch.equal(residual, twin) and torch.equal(out, wanted)


def check(case: Case) -> None:
    model: PreTrainedModel = build(case.family, {**case.settings, "num_hidden_layers": 2}).to(case.dtype)
    borrowed = BorrowedModel(model, name=case.family)
    weights = merge_weights(borrowed, replace(examine(borrowed), deferred=False))
    config: Any = model.config
    inner: Any = model.model
    for index, (layer, theirs) in enumerate(zip(weights.layers, inner.layers, strict=True)):
        dense = index in getattr(config, "mlp_only_layers", [])
        dense |= (index + 1) % getattr(config, "decoder_sparse_step", 1) != 0
        assert isinstance(layer.mlp, Mlp if dense else Experts)
        assert isinstance(layer.mlp, Mlp) or layer.mlp.down.data_ptr() == theirs.mlp.experts.down_proj.data_ptr()
    last = weights.layers[-1].mlp
    assert isinstance(last, Experts) and last == replace(last, top=config.num_experts_per_tok)
    assert (last.normed, last.rounded) == (getattr(config, "norm_topk_prob", True), case.family == "qwen3_moe")
    check_layer(case, inner.layers[-1].mlp, last)


def check_order(rows: int) -> None:
    """Of more rows than a step has: every pair once, by expert, then by row."""
    router = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).half()
    layer = Experts(router, torch.empty(6, 16, 16).half(), torch.empty(6, 16, 8).half(), 2, normed=True, rounded=True)
    x, buffers = torch.randn(rows, 16, generator=torch.Generator().manual_seed(2)).half(), ExpertBuffers.of(layer, rows)
    route(layer, x, buffers, overlap={"OVERLAP": False})
    check_routes(layer, x, buffers.experts.view(rows, -1), buffers.shares.view(rows, -1))
    by_expert = sorted(range(rows * 2), key=lambda pair: (int(buffers.experts[pair]), pair))
    assert buffers.order.tolist() == by_expert
    counts = torch.bincount(buffers.experts, minlength=6)
    assert buffers.starts.tolist() == [0, *counts.cumsum(0).tolist()]


def main(first: int, last: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    exact_bfloat16()
    any_range()
    for case in CASES[first:last]:
        try:
            check(case)
        except Exception as error:
            raise AssertionError(case) from error
    if last > len(CASES):
        for rows in (40, ROWS_MAX + 17):
            check_order(rows)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
