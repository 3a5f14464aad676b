"""The models of the GPU benchmarks, with random weights, built on the device: the Qwen3-8B shape, or another."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chunk_store.key import ModelIdentity
from engine.check.rows import RowBits, check_rows
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import Findings, examine
from engine.run.cuda.forward import FusedForward
from engine.run.cuda.products import use_stable_products
from engine.run.cuda.runner import PackedRunner
from engine.run.cuda.weights import merge_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
WEIGHT_NBYTES_READ = 15_140_000_000  # of a decode step: everything but the input embedding, bf16
KV_TOKEN_NBYTES = 147_456
PAGE_SIZE = 16


@dataclass(frozen=True)
class Engine:
    """A runner over a pool filled with random keys and values, and how long each stage took to make, in seconds."""

    borrowed: BorrowedModel
    findings: Findings
    pool: PagedKVPool
    runner: PackedRunner
    identity: ModelIdentity
    seconds: dict[str, float]
    row_bits: RowBits


def random_model(family: str = "qwen3", shape: dict[str, Any] = SHAPE) -> BorrowedModel:
    """Norms of about one, matrices of deviation 0.02; seeded."""
    use_stable_products()
    config = AutoConfig.for_model(family, **shape)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    module.to_empty(device="cuda")
    for buffer in module.buffers():
        buffer.zero_()  # biases of routers, for example
    module.model.rotary_emb = type(module.model.rotary_emb)(config).to("cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.normal_(1.0, 0.02)
    return BorrowedModel(module, name=f"{family}-shape")


def make_engine(
    *,
    pool_tokens: int,
    chunk_share: float = 0.8,
    piece_tokens: int = 8192,
    family: str = "qwen3",
    shape: dict[str, Any] = SHAPE,
) -> Engine:
    """The model, a pool of ``pool_tokens`` and a prepared runner."""
    seconds: dict[str, float] = {}

    def timed(stage: str, started: float) -> float:
        torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[stage] = round(now - started, 2)
        return now

    use_stable_products()
    at = time.perf_counter()
    torch.zeros(1, device="cuda")
    at = timed("context", at)
    borrowed = random_model(family, shape)
    at = timed("weights", at)
    findings = examine(borrowed)
    at = timed("examine", at)
    weights = merge_weights(borrowed, findings)
    at = timed("merge", at)
    row_bits = check_rows(weights)
    weights = replace(weights, ways=row_bits.ways)
    at = timed("check of rows", at)
    pages = pool_tokens // PAGE_SIZE
    pool = PagedKVPool(
        findings.layout, pages=pages, chunk_pages=int(pages * chunk_share), page_size=PAGE_SIZE, device="cuda"
    )
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_()
    at = timed("pool", at)
    runner = PackedRunner(FusedForward(weights, pool, positions=findings.context_length_max), piece_tokens=piece_tokens)
    runner.prepare()
    timed("compile and capture", at)
    return Engine(borrowed, findings, pool, runner, ModelIdentity("bench"), seconds, row_bits)
