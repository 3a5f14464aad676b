"""A mixture of experts on one GPU, Qwen3-30B-A3B's shape with random weights: python -m bench.moe [--json PATH]

Engine only, bf16: decode steps with 1024 own tokens a row, times to first token of 8k, and where their time goes by
kernel. Beside them what vLLM 0.25.1 takes on the same card and shape, and the goal. A floor is the weights that such a
step has to read, experts as they were hit, and the keys and values, at the measured copy rate.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_model import PAGE_SIZE, SHAPE, Engine, make_engine
from bench.gpu_workloads import Tree, cold_ms, copy_bandwidth, decode_ms, median_ms, random_tokens, warm_ms
from engine.kv.pages import PageRun
from engine.plan import StepSequence
from engine.run.cuda.cascade.records import SplitRule
from engine.run.cuda.cascade.tuning import DEFAULT_SPLITS, Tuning
from engine.run.cuda.forward import FusedForward
from engine.run.cuda.runner import PackedRunner
from engine.run.pieces import GREEDY, prefill_chunk
from engine.run.protocol import StepRows
from engine.sampling.params import Draw

MOE_SHAPE: dict[str, Any] = {
    **SHAPE, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip
POOL_TOKENS = 131_072
OWN, LONG_TOKENS = 1024, 8192
# batch -> vLLM, goal; ms
DECODE = {1: (4.12, 3.2), 16: (12.1, 9.0), 64: (32.7, 20.0)}
FIRST = {"cold": (152.0, 140.0), "warm": (24.0, 8.0)}
# beside what 4 KV heads have
SPLITS = {
    "1024": DEFAULT_SPLITS,
    "256": SplitRule(((0, 256), (2049, 512), (16384, 1024), (65536, 2048)), 256),
}
PARTS = {
    "scores": "router", "select": "select", "place": "select", "list_tiles": "select", "gate_up": "gate_up",
    "narrow": "gate_up", "gate_up_long": "gate_up", "down": "down", "down_long": "down", "arrive": "arrive",
    "add_norm": "norms", "heads": "heads", "attend": "attention", "merge": "attention", "stream": "attention",
    "fold": "attention", "embed": "other", "gather": "other", "gate": "gate",
}  # fmt: skip


def part_of(kernel: str) -> str:
    """Which part of a layer a kernel is, by its name."""
    name = kernel.split("(")[0]
    if name in PARTS:
        return PARTS[name]
    if re.search(r"fmha|flash|sdpa|cudnn", kernel, re.IGNORECASE):
        return "attention"
    return "products" if re.search(r"gemm|nvjet|cutlass|gemv|splitK", kernel) else f"other: {name[:60]}"


def parts(launch: Callable[[], object], steps: int) -> dict[str, float]:
    """Device milliseconds a step, by part."""
    from torch.profiler import ProfilerActivity, profile

    launch()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        launch()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in seen.key_averages():
        if event.device_time_total:
            part = part_of(event.key)
            found[part] = found.get(part, 0.0) + event.device_time_total / 1e3 / steps
    return {name: round(ms, 3) for name, ms in sorted(found.items(), key=lambda each: -each[1]) if ms >= 0.01}


def experts_hit(engine: Engine, rows: int) -> list[int]:
    """How many experts rows of different texts go to, in each layer but the last."""
    weights = engine.runner.forward.weights  # type: ignore[attr-defined]
    plain = PackedRunner(
        FusedForward(weights, engine.pool, positions=4096), slots=rows, rows_max=rows, graphs=False, piece_tokens=64
    )
    hits: list[Tensor] = []
    buffers: Any = plain.steps._inputs.experts  # type: ignore[attr-defined]
    pages = [engine.pool.allocate_pages(engine.pool.pages_for(OWN)) for _ in range(rows)]
    batch = []
    for slot, own in enumerate(pages):
        assert own is not None
        plain.open(slot, GREEDY)
        sequence = StepSequence((), tuple(own), OWN - 1, 1, OWN - 1)
        batch.append(StepRows(sequence, [7 + 31 * slot], Draw(slot, 0, OWN)))
    with plain.watching_layers(lambda index, hidden: hits.append(buffers.experts[: rows * 8].clone())):
        plain.begin(batch).wait()
    for own in pages:
        assert own is not None
        engine.pool.release_pages(own)
    return [int(one.unique().numel()) for one in hits]


def floor_ms(engine: Engine, rows: int, hit: float, bandwidth: float) -> float:
    weights = engine.runner.forward.weights  # type: ignore[attr-defined]
    layer, experts = weights.layers[0], weights.experts
    dense = sum(each.nbytes for each in (layer.qkv, layer.o, experts.router))
    one = (experts.gate_up.nbytes + experts.down.nbytes) / experts.count
    kv = rows * OWN * engine.findings.layout.nbytes(1)
    return (len(weights.layers) * (dense + hit * one) + weights.head.nbytes + kv) / bandwidth * 1e3


def decode(engine: Engine, batch: int, bandwidth: float) -> dict[str, Any]:
    tree = Tree(batch, (), OWN)
    ms, host = decode_ms(engine, tree)
    hits = experts_hit(engine, batch)
    mean = sum(hits) / len(hits)
    vllm, goal = DECODE[batch]
    return {
        "ms": round(ms, 3), "host_ms": round(host, 3), "vllm": vllm, "goal": goal, "experts_hit": round(mean, 1),
        "floor": round(floor_ms(engine, batch, mean, bandwidth), 2),
        "parts": parts(lambda: decode_ms(engine, tree, steps=11), 12),
    }  # fmt: skip


def chunk(engine: Engine) -> None:
    run: PageRun | None = engine.pool.allocate_run(LONG_TOKENS)
    assert run is not None
    prefill_chunk(engine.runner, random_tokens(LONG_TOKENS, 1), (), run)
    engine.pool.release_run(run)


def cold(engine: Engine) -> dict[str, Any]:
    ms = cold_ms(engine, LONG_TOKENS)

    def one() -> None:
        chunk(engine)
        torch.cuda.synchronize()

    vllm, goal = FIRST["cold"]
    of_chunk = round(median_ms(one, repeats=3), 1)
    return {
        "ms": round(ms, 2),
        "vllm": vllm,
        "goal": goal,
        "chunk_ms": of_chunk,
        "parts": parts(lambda: chunk(engine), 1),
    }


def warm(engine: Engine) -> dict[str, Any]:
    vllm, goal = FIRST["warm"]
    return {
        "ms": round(warm_ms(engine, [LONG_TOKENS], moved=False), 2), "vllm": vllm, "goal": goal,
        "parts": parts(lambda: warm_ms(engine, [LONG_TOKENS], moved=False), 14),
    }  # fmt: skip


def with_splits(engine: Engine, rule: SplitRule) -> dict[str, Any]:
    """The same steps with other splits of chunks and tails."""
    weights = engine.runner.forward.weights  # type: ignore[attr-defined]
    forward = FusedForward(weights, engine.pool, positions=engine.findings.context_length_max)
    runner = PackedRunner(
        forward, tuning=replace(Tuning(), splits=rule), rows_max=64, row_buckets=tuple(DECODE), piece_tokens=8192
    )
    other = replace(engine, runner=runner)
    found = {f"decode {batch}": round(decode_ms(other, Tree(batch, (), OWN))[0], 3) for batch in DECODE}
    return {**found, "warm": round(warm_ms(other, [LONG_TOKENS], moved=False), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("moe.json"))
    parser.add_argument("--splits", action="store_true", help="also with other splits of attention")
    arguments = parser.parse_args()
    began = time.perf_counter()
    bandwidth = copy_bandwidth()
    engine = make_engine(pool_tokens=POOL_TOKENS, chunk_share=0.4, family="qwen3_moe", shape=MOE_SHAPE)
    print("start-up, s:", engine.seconds, "|", engine.row_bits.reason, "|", engine.row_bits.numerics, flush=True)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, page size {PAGE_SIZE}, graphs {engine.runner.steps.graphs}", flush=True)
    found: dict[str, Any] = {"seconds": engine.seconds, "row_bits": engine.row_bits.reason}
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"decode {batch}": lambda batch=batch: decode(engine, batch, bandwidth) for batch in DECODE},  # type: ignore[misc]
        "first token 8k cold": lambda: cold(engine),
        "first token 8k warm": lambda: warm(engine),
    }
    if arguments.splits:
        cases |= {f"splits {name}": partial(with_splits, engine, rule) for name, rule in SPLITS.items()}
    for name, measure in cases.items():
        try:
            found[name] = measure()
            print(f"{name}: {json.dumps(found[name])}", flush=True)
        except Exception:
            traceback.print_exc()
    arguments.json.write_text(json.dumps(found, indent=1))
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
