"""Partial attention and its merge: whatever the keys are cut into, the sum is one softmax over all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.partial import add_lse, merge, merge_pair, partial_attention

HEADS, DIM = 2, 8


def drawn(seed: int, rows: int, keys: int, v_dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, DIM), (keys, DIM), (keys, v_dim)
    q, k, v = (torch.randn(1, HEADS, *shape, generator=generator) for shape in shapes)
    return q, k, v


def expected(q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None, causal: bool = False) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v.double()).float()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("v_dim", [3, DIM, 12])
@pytest.mark.parametrize("causal", [False, True])
def test_one_softmax(softcap: float | None, v_dim: int, causal: bool) -> None:
    q, k, v = drawn(1, 5, 5, v_dim)
    out, lse = partial_attention(q, k, v, scaling=0.3, softcap=softcap, causal=causal)
    torch.testing.assert_close(out, expected(q, k, v, softcap, causal), atol=1e-5, rtol=1e-5)
    assert out.shape == (1, HEADS, 5, v_dim) and lse.shape == (1, HEADS, 5) and lse.dtype == torch.float32


def test_a_mask_is_added_to_the_scores() -> None:
    q, k, v = drawn(2, 1, 6)
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, float("-inf"), float("-inf")])[None, None, None]
    out, lse = partial_attention(q, k, v, scaling=0.3, mask=mask)
    short, short_lse = partial_attention(q, k[:, :, :4], v[:, :, :4], scaling=0.3)
    torch.testing.assert_close(out, short, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, short_lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_rows", [0, 1, 23])
def test_many_rows_are_computed_some_at_a_time(causal: bool, mask_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(5, 23, 23)
    mask = torch.randn(1, 1, mask_rows, 23) if mask_rows else None
    asked: Any = {"scaling": 0.3, "softcap": 5.0, "causal": causal, "mask": mask}
    whole = partial_attention(q, k, v, **asked)
    sizes: list[int] = []
    matmul = torch.matmul

    def counted(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(a.shape[-2])
        return matmul(a, b)

    monkeypatch.setattr(torch, "matmul", counted)
    monkeypatch.setattr("engine.attention.partial.SCORES_MAX", 7 * HEADS * 23)
    for result, wanted in zip(partial_attention(q, k, v, **asked), whole, strict=True):
        torch.testing.assert_close(result, wanted, atol=1e-6, rtol=1e-6)
    assert sizes == [7, 7, 7, 7, 7, 7, 2, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000))
def test_cut_anywhere_the_merge_is_the_whole(sizes: list[int], seed: int) -> None:
    q, k, v = drawn(seed, 3, sum(sizes))
    ends = torch.tensor(sizes).cumsum(0).tolist()
    partials = [
        partial_attention(q, k[:, :, end - size : end], v[:, :, end - size : end], scaling=0.3)
        for size, end in zip(sizes, ends, strict=True)
    ]
    outs, lses = [out.transpose(1, 2) for out, _ in partials], [lse.transpose(1, 2) for _, lse in partials]
    whole = expected(q, k, v).transpose(1, 2)
    torch.testing.assert_close(merge(outs, lses), whole, atol=1e-5, rtol=1e-5)
    if len(outs) > 1:
        pair, lse = merge_pair(outs[0], lses[0], outs[1], lses[1])
        torch.testing.assert_close(merge([pair, *outs[2:]], [lse, *lses[2:]]), whole, atol=1e-5, rtol=1e-5)


def test_a_partial_without_keys_leaves_the_bits_and_a_sink_takes_its_share() -> None:
    q, k, v = drawn(3, 2, 4)
    out, lse = (x.transpose(1, 2) for x in partial_attention(q, k, v, scaling=0.3))
    nothing = torch.full_like(lse, float("-inf"))
    assert torch.equal(merge([out, torch.zeros_like(out)], [lse, nothing]), out)
    sinks = torch.tensor([0.5, -2.0])
    share = torch.exp(lse) / (torch.exp(lse) + torch.exp(sinks))
    torch.testing.assert_close(merge([out], [lse], sinks), out * share[..., None], atol=1e-6, rtol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    big = torch.tensor([1e4, -1e4, 80.0])
    torch.testing.assert_close(add_lse(big, torch.tensor([1e4, 1e4, -80.0])), torch.tensor([1e4 + 0.6931, 1e4, 80.0]))
