"""Steps of models' own code in graphs, beside fused ones: ``python -m bench.captured_gpu [qwen3] [phi3] [gemma2]``.

A step of 1, 16 and 64 sequences with 1024 own tokens each, milliseconds of wall time; what the checks at start find and
how long they take; a chunk of 4096 tokens in packed steps. qwen3 is the reference shape, and runs both ways.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.gpu_model import PAGE_SIZE, SHAPE, Engine
from bench.gpu_workloads import Tree, decode_ms
from chunk_store.key import ModelIdentity
from engine.check.borrowed_rows import check_rows_of
from engine.check.rows import check_rows
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from engine.run.cuda.borrowed import BorrowedForward, CapturedModel
from engine.run.cuda.forward import FusedForward
from engine.run.cuda.packed import Forward
from engine.run.cuda.products import use_stable_products
from engine.run.cuda.runner import PackedRunner
from engine.run.cuda.trial import capture_failure
from engine.run.cuda.weights import fused_refusal, merge_weights
from engine.run.pieces import prefill_chunk

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": SHAPE,
    "phi3": {**SHAPE, "vocab_size": 32064, "sliding_window": None, "pad_token_id": 0},
    # As Gemma2-9B, without soft caps of scores; its windows hide nothing in contexts as long as theirs.
    "gemma2": {
        "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000, "attn_logit_softcapping": None,
    },
}  # fmt: skip
BATCHES = (1, 16, 64)
OWN, STEPS = 1024, 40


def timed(what: str, run: Callable[[], Any]) -> Any:
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    print(f"  {what}: {time.perf_counter() - began:.2f} s", flush=True)
    return result


def make(kind: str) -> BorrowedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPES[kind])
    with torch.device("cuda"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return BorrowedModel(module, name=kind)


def measure(name: str, engine: Engine, forward: Forward[Any, Any]) -> None:
    runner = PackedRunner(forward, slots=max(BATCHES), rows_max=1024, row_buckets=(1, 16, 64, 256, 1024))
    timed(f"{name}: compiling and capturing", runner.prepare)
    engine = replace(engine, runner=runner)
    times = [decode_ms(engine, Tree(rows, (), OWN), steps=STEPS) for rows in BATCHES]
    mixed, _ = decode_ms(engine, Tree(64, (), OWN), steps=STEPS, prompts=[192])
    place = engine.pool.allocate_run(4096)
    assert place is not None
    chunks = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        prefill_chunk(runner, [5] * 4096, (), place)
        torch.cuda.synchronize()
        chunks.append(time.perf_counter() - began)
    engine.pool.release_run(place)
    steps = ", ".join(
        f"{rows}: {wall:.2f} (host {host:.2f})" for rows, (wall, host) in zip(BATCHES, times, strict=True)
    )
    print(f"{name}: step of {steps}; 64 + 192 rows {mixed:.2f}; 4096 tokens {min(chunks) * 1e3:.0f} ms", flush=True)
    del runner, engine
    gc.collect()


def run(kind: str) -> None:
    print(kind, flush=True)
    borrowed = timed("model", lambda: make(kind))
    findings = examine(borrowed)
    pages = (64 * (OWN + STEPS + 64) + 8192) // PAGE_SIZE
    pool = PagedKVPool(findings.layout, pages=pages, chunk_pages=512, page_size=PAGE_SIZE, device="cuda")
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_()
    engine: Any = Engine(borrowed, findings, pool, None, ModelIdentity("bench"), {}, None)  # type: ignore[arg-type]
    positions = 8192
    if not fused_refusal(borrowed, findings):
        weights = merge_weights(borrowed, findings)
        bits = timed("check of rows, fused", lambda: check_rows(weights))
        measure("fused", engine, FusedForward(replace(weights, ways=bits.ways), pool, positions=positions))
    model = timed("looking at modules", lambda: CapturedModel.of(borrowed, findings))
    kinds = sorted({f"{type(module).__name__}" for module in model.forwards})
    print(f"  replaced: {len(model.forwards)} modules, {kinds}", flush=True)
    print(f"  trial: {timed('trial', lambda: capture_failure(borrowed, findings)) or 'captured'}", flush=True)
    found, row_bits = timed("check of rows, captured", lambda: check_rows_of(model))
    print(f"  equal {row_bits.equal}: {row_bits.reason}", flush=True)
    measure("captured", engine, BorrowedForward(found, pool, positions=positions))
    as_it_comes = replace(found, forwards={})
    measure("captured, nothing replaced", engine, BorrowedForward(as_it_comes, pool, positions=positions))


def main(kinds: list[str]) -> None:
    use_stable_products()
    for kind in kinds or list(SHAPES):
        try:
            with torch.inference_mode():
                run(kind)
        except Exception as error:
            print(f"{kind}: FAILED {type(error).__name__}: {str(error)[:600]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
