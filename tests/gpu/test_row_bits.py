"""Products on the card: rows have the same bits at any number of rows, and what happens where they have not."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_service.options import DecodeOptions
from decode_service.same_bits import same_bits
from engine.check.rows import BLOCK, LAST_BLOCK, RowBits, check_rows
from engine.model.borrowed import BorrowedModel
from engine.run.backends import CASCADE
from engine.run.cuda import products
from engine.run.cuda.products import AS_THEY_COME, BUCKETS, ENVIRONMENT, PLAIN, Way
from engine.run.cuda.weights import FusedWeights, LayerWeights, Mlp
from engine.served import ServedModel, serve
from tests.engine.composer import Composer, Request
from tests.gpu.engine_models import FUSED, served, tokens, twins

pytestmark = pytest.mark.gpu

# hidden, heads, kv heads, width of a head, MLP, vocabulary, bias of q, k and v
SHAPES = {
    "qwen3-8b": (4096, 32, 8, 128, 12288, 151936, False),
    "qwen3-0.6b": (1024, 16, 8, 128, 3072, 151936, False),
    "qwen3-32b": (5120, 64, 8, 128, 25600, 151936, False),
    "qwen2.5-7b": (3584, 28, 4, 128, 18944, 152064, True),
    "llama-3.2-1b": (2048, 32, 8, 64, 8192, 128256, False),
    "mistral-7b": (4096, 32, 8, 128, 14336, 32768, False),
}
Library = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


def weights_of(shape: str, dtype: torch.dtype) -> FusedWeights:
    """Random weights of two layers, the matrices of deviation 0.02."""
    hidden, heads, kv_heads, dim, mlp, vocabulary, biased = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(1)

    def matrix(*size: int) -> Tensor:
        return (0.02 * torch.randn(*size, generator=generator, device="cuda")).to(dtype)

    def layer() -> LayerWeights:
        qkv = (heads + 2 * kv_heads) * dim
        return LayerWeights(
            input_norm=1 + matrix(hidden), qkv=matrix(qkv, hidden), qkv_bias=matrix(qkv) if biased else None,
            q_norm=None, k_norm=None, o=matrix(hidden, heads * dim), post_norm=1 + matrix(hidden),
            mlp=Mlp(matrix(2 * mlp, hidden), matrix(hidden, mlp)),
        )  # fmt: skip

    unused: Any = None
    return FusedWeights(
        embedding=matrix(1, hidden), layers=(layer(), layer()), final_norm=1 + matrix(hidden),
        head=matrix(vocabulary, hidden), eps=1e-6, heads=heads, kv_heads=kv_heads, head_dim=dim, scaling=dim**-0.5,
        rotation=unused, windows=(None, None),
    )  # fmt: skip


def test_the_settings_are_those_of_services() -> None:
    matmul = torch.backends.cuda.matmul
    assert torch.backends.cuda.preferred_blas_library() == torch._C._BlasBackend.Cublaslt
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        assert (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) == (False, False)
    assert {name: os.environ.get(name) for name in ENVIRONMENT} == ENVIRONMENT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_real_shapes(shape: str, dtype: torch.dtype) -> None:
    weights = weights_of(shape, dtype)
    check_rows(weights)  # the library's first look at a shape
    torch.cuda.synchronize()
    began = time.perf_counter()
    bits = check_rows(weights)
    seconds = round(time.perf_counter() - began, 3)
    print(json.dumps({"shape": shape, "dtype": str(dtype), "seconds": seconds, "found": bits.reason}))
    assert bits.equal and bits.buckets == BUCKETS
    if shape == "qwen3-8b" and dtype is torch.bfloat16 and "H200" in torch.cuda.get_device_name():
        assert bits.ways == AS_THEY_COME, "what was measured on that card, bench/LOG.md"


@pytest.mark.parametrize("name", FUSED)
def test_rows_of_served_models(name: str) -> None:
    model = served(name)
    assert model.row_bits is not None and model.row_bits.equal, model.row_bits
    assert isinstance(model.weights, FusedWeights) and model.weights.ways == model.row_bits.ways
    print(json.dumps({"model": name, "found": model.row_bits.reason}))


def test_a_model_in_float16_is_served_too() -> None:
    """Where split-K is not allowed, torch takes no other library than cuBLASLt: it must have every product."""
    model = serve(BorrowedModel(copy.deepcopy(twins(FUSED[1])[1]).to(torch.float16).to("cuda"), name="fp16"))
    assert model.row_bits is not None and model.row_bits.equal
    alone, among = answers(model, 20)
    assert torch.equal(alone, among)


# -- planted products ---------------------------------------------------------------------------------
def split(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
    """The product in two halves along K, each rounded."""
    half = x.shape[1] // 2
    torch.mm(x[:, :half], weight[:, :half].t(), out=out)
    out.add_(x[:, half:] @ weight[:, half:].t())
    if bias is not None:
        out.add_(bias)


def by_number(width: int, most: int, library: Library) -> Library:
    """Of up to ``most`` rows the product of that width is split."""
    return lambda x, *rest: (split if x.shape[1] == width and x.shape[0] <= most else library)(x, *rest)


def by_place(width: int, library: Library) -> Library:
    """Its first row is split."""

    def multiply(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
        library(x, weight, out, bias)
        if x.shape[1] == width:
            split(x[:1], weight, out[:1], bias)

    return multiply


def planted(monkeypatch: pytest.MonkeyPatch, plant: Callable[[int, Library], Library]) -> ServedModel:
    """A model whose ``down`` has such a fault; its MLP is as wide as nothing else of it."""
    model = copy.deepcopy(twins("qwen3-ratio4-128")[1]).to("cuda")
    config: Any = model.config
    width = config.intermediate_size
    assert width not in (config.hidden_size, config.num_attention_heads * config.head_dim)
    monkeypatch.setattr(products, "multiply", plant(width, products.multiply))
    return serve(BorrowedModel(model, name="planted"), piece_tokens=24)


def answers(model: ServedModel, others: int) -> tuple[Tensor, Tensor]:
    """Logits (6, vocabulary) of a request alone, and among others that come before it in the batch."""
    request: Request = ([tokens(1, 70), tokens(2, 33)], tokens(3, 20), "exact")
    crowd: list[Request] = [([tokens(1, 70)], tokens(100 + i, 1 + i), "exact") for i in range(others)]
    composer = Composer(model, pages=2048)
    return composer.generate([request], 6)[0][1], composer.generate([*crowd, request], 6)[-1][1]


@pytest.mark.parametrize(("most", "way"), [(1, Way(least=8)), (48, Way(least=64)), (300, Way(BLOCK, BLOCK))])
def test_a_product_that_differs_among_few_rows_is_pinned(monkeypatch: pytest.MonkeyPatch, most: int, way: Way) -> None:
    model = planted(monkeypatch, lambda width, library: by_number(width, most, library))
    assert model.row_bits is not None and isinstance(model.weights, FusedWeights)
    assert model.row_bits.equal and model.weights.ways.down == way and model.weights.ways.o == PLAIN
    alone, among = answers(model, 55)
    assert torch.equal(alone, among)
    assert f"; down would differ at {'1' if most == 1 else 'up to'}" in model.row_bits.reason
    if most == 48:
        as_it_comes = replace(model, weights=replace(model.weights, ways=AS_THEY_COME))
        assert not torch.equal(*answers(as_it_comes, 55)), "the plant shows where nothing is done about it"


def test_a_product_whose_rows_depend_on_their_place_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted(monkeypatch, by_place)
    bits = model.row_bits
    assert isinstance(bits, RowBits) and not bits.equal
    assert bits.buckets == tuple(size for size in BUCKETS if size >= LAST_BLOCK), "one way for every usual step"
    said = same_bits(
        DecodeOptions(model="m", store="file:///s", prefill="127.0.0.1:1", device="cuda"), bits, CASCADE, True
    )
    assert not said.always and said.reason.startswith("a row of down depends on its place")
    alone, among = answers(model, 5)
    assert alone.shape == among.shape and bool(alone.isfinite().all()), "it serves all the same"
    sound = serve(BorrowedModel(copy.deepcopy(twins("qwen3-ratio4-128")[1]).to("cuda"), name="planted"))
    assert sound.identity != model.identity
