"""Norms of modelling code: which form each has, and our kernels' values in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from engine.model.borrowed import BorrowedModel
from engine.run.cuda.norms import NormForm, form_of, norm, norm_modules
from engine.run.cuda.replaced import norm_forwards, replaced, widths_of
from tests.architectures import build_named

LLAMA, WIDE, GEMMA, COHERE = NormForm(rounded=True), NormForm(), NormForm(plus=1.0), NormForm(centred=True)


def test_our_kernels_give_what_torch_gives() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.run.interpreted_borrowed"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen3-ratio2", LLAMA), ("gemma2-softcap", GEMMA), ("gemma3-two-ropes", GEMMA), ("olmo2", WIDE),
        ("gpt-oss-sinks", WIDE), ("cohere2-some-nope", COHERE), ("granite", LLAMA), ("deepseek-v3-mla", LLAMA),
    ],
)  # fmt: skip
def test_the_form_of_each_familys_norms(name: str, form: NormForm) -> None:
    torch.manual_seed(3)
    modules = list(norm_modules(build_named(name)))
    assert modules
    for module in modules:
        width = int(dict(module.named_parameters())["weight"].shape[-1])
        copy = type(module)(width)
        copy.weight = nn.Parameter(torch.randn(width).bfloat16())
        assert form_of(copy, width, torch.device("cpu"), torch.bfloat16) == form


def test_what_is_no_norm_of_a_known_form_stays() -> None:
    class OddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight

    model = nn.ModuleList([OddNorm(), nn.LayerNorm(8)])
    odd = model[0]
    assert list(norm_modules(model)) == [odd], "torch's own norms are one block a row"
    assert norm_forwards({odd: 8}, torch.device("cpu"), torch.float32) == {}


def test_norms_are_replaced_while_a_forward_runs_and_give_the_models_logits() -> None:
    module = build_named("gemma3-two-ropes")
    borrowed = BorrowedModel(module, name="gemma3")
    ids, every = torch.arange(3, 12), torch.arange(9)
    with widths_of(list(norm_modules(module))) as widths:
        expected = borrowed.forward(ids, every, lambda layer, q, k, v, scores: v.repeat_interleave(2, 1), every)
    forwards = norm_forwards(widths, torch.device("cpu"), torch.float32)
    assert set(forwards) == set(norm_modules(module)), "those of heads too"
    called: list[int] = []

    def counted(x: Tensor, forward: object) -> Tensor:
        called.append(1)
        return forward(x)  # type: ignore[operator]

    watched = {each: lambda x, f=forward: counted(x, f) for each, forward in forwards.items()}
    with replaced(watched):
        found = borrowed.forward(ids, every, lambda layer, q, k, v, scores: v.repeat_interleave(2, 1), every)
    assert len(called) == len(forwards)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not any("forward" in vars(each) for each in module.modules()), "and the module is as it came"


def test_rows_are_normed_over_their_last_dimension_however_they_lie() -> None:
    x = torch.randn(1, 3, 4, 8).transpose(1, 2)
    whole = norm(x, torch.ones(8), 1e-6, LLAMA)
    assert whole.shape == x.shape
    torch.testing.assert_close(whole.pow(2).mean(-1), torch.ones(1, 4, 3), atol=1e-4, rtol=1e-4)
