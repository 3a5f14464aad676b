"""The engine on one GPU against what others reach: python -m bench.gpu [--json FILE]

Qwen3-8B shape, random weights, bf16. Engine only: what a step has but RPCs. The floor is the fewest bytes (or, for a
cold prompt, the arithmetic) at the rates measured on an H200; the figures of others are vLLM's on the same card and
shapes.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from bench.gpu_model import Engine, make_engine
from bench.gpu_workloads import (
    Result,
    Tree,
    cold_ms,
    copy_bandwidth,
    decode_floor_ms,
    decode_kernels,
    decode_ms,
    stored_ms,
    warm_ms,
)

POOL_TOKENS = 262_144
COLD_FLOOR_MS = 1080.0  # arithmetic of 32k tokens at the measured matrix rate
SHARED = Tree(64, ((64, 32768),), 256)
TREE = Tree(64, ((64, 2048), (8, 8192)), 512)
ALONE = Tree(1, ((1, 32768 - 256),), 256)


def decode(engine: Engine, name: str, tree: Tree, bandwidth: float, figures: tuple[float, float, float]) -> Result:
    ms, host = decode_ms(engine, tree)
    note = f"{tree.rows / ms * 1e3:.0f} tok/s, host {host:.2f} ms"
    return Result(name, ms, decode_floor_ms(tree, bandwidth), *figures, note)


def workloads(engine: Engine, bandwidth: float) -> list[tuple[str, Callable[[], Result]]]:
    eight = [4096] * 8

    def stored() -> Result:
        ms = stored_ms(engine, eight)
        note = f"load {ms.load_from_store:.0f}; from the host tier {ms.host:.0f}, of which load {ms.load_from_host:.0f}"
        return Result("TTFT 8 x 4k reordered, tmpfs store", ms.store, 88.0, 1263, 300, 130, note)

    return [
        ("a", lambda: decode(engine, "decode 64: 32k shared + 256 own", SHARED, bandwidth, (49.5, 12, 8))),
        ("b", lambda: decode(engine, "decode 64: tree 2k, 8 x 8k, 512 own", TREE, bandwidth, (20.6, 12, 9.5))),
        ("c", lambda: decode(engine, "decode 1: 32k", ALONE, bandwidth, (6.34, 6.5, 5.6))),
        ("d", lambda: Result("TTFT 32k resident + 64", warm_ms(engine, [32768], moved=False), 5.0, 22.7, 15, 8)),
        ("e", lambda: Result("TTFT 32k cold + 64", cold_ms(engine, 32768), COLD_FLOOR_MS, 1250, 1500, 1200)),
        ("f", lambda: Result("TTFT 8 x 4k reordered, resident", warm_ms(engine, eight, moved=True), 5.0, 1263, 30, 10)),
        ("g", stored),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--kernels", action="store_true", help="also list the kernels of the decode steps")
    options = parser.parse_args()
    started = time.perf_counter()
    engine = make_engine(pool_tokens=POOL_TOKENS)
    print("start-up, s:", engine.seconds, "sum", round(sum(engine.seconds.values()), 1), flush=True)
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    results: list[Result] = []
    for _, run in workloads(engine, bandwidth):
        try:
            results.append(run())
        except Exception:
            traceback.print_exc()
            continue
        r = results[-1]
        print(f"{r.name:38} {r.ours:9.2f} ms  floor {r.floor:7.1f}  others {r.others:7.1f}  target {r.target:6.1f}"
              f"  goal {r.goal:6.1f}  {r.note}", flush=True)  # fmt: skip
    if options.kernels:
        for tree in (SHARED, TREE, ALONE):
            print(tree, decode_kernels(engine, tree), sep="\n", flush=True)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"peak device memory {peak:.1f} GiB, whole run {time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"seconds": engine.seconds, "peak_gib": peak, "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
