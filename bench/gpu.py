"""The engine on one GPU against what others reach, and attention alone: python -m bench.gpu

Qwen3-8B shape, random weights, bf16. Engine only: what a step has but RPCs. The floor is the fewest bytes (or, for a
cold prompt, the arithmetic) at the rates measured on an H200; the figures of others are vLLM's on the same card and
shapes.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from bench.attention_gpu import CASES, measure
from bench.gpu_model import Engine, make_engine
from bench.gpu_sweep import plot, print_table, sweep
from bench.gpu_workloads import (
    Result,
    Tree,
    cold_ms,
    copy_bandwidth,
    decode_floor_ms,
    decode_kernels,
    decode_ms,
    packed_ms,
    stored_ms,
    warm_ms,
)
from engine.run.cuda.runner import LONG

POOL_TOKENS = 262_144
COLD_FLOOR_MS = 1080.0  # arithmetic of 32k tokens at the measured matrix rate
SHARED = Tree(64, ((64, 32768),), 256)
TREE = Tree(64, ((64, 2048), (8, 8192)), 512)
ALONE = Tree(1, ((1, 32768 - 256),), 256)
QUERIES = (64,) * 7  # rows of prompts beside the decode rows of a mixed step
ROWS_A_SECOND = 57_000  # of the shape's products, in forwards of 2048 rows and more
PAIRS_A_SECOND = 790e12 / (4 * 32 * 128 * 36)  # (row, token it sees) in all layers, at the rate of large products
# case of bench.attention_gpu -> FlashInfer at its best, first target, goal; ms
ATTENTION_FIGURES = {
    1: (0.153, 0.136, 0.065),
    2: (0.149, 0.144, 0.115),
    3: (0.219, 0.173, 0.150),
    4: (0.245, 0.238, 0.175),
}


def decode(engine: Engine, name: str, tree: Tree, bandwidth: float, figures: tuple[float, float, float]) -> Result:
    ms, host = decode_ms(engine, tree)
    note = f"{tree.rows / ms * 1e3:.0f} tok/s, host {host:.2f} ms"
    return Result(name, ms, decode_floor_ms(tree, bandwidth), *figures, note)


def arithmetic_ms(rows: int, pairs: int) -> float:
    """The floor of ``rows`` rows that see ``pairs`` tokens in all."""
    return (rows / ROWS_A_SECOND + pairs / PAIRS_A_SECOND) * 1e3


def workloads(engine: Engine, bandwidth: float) -> list[Callable[[], Result]]:
    eight = [4096] * 8

    def stored() -> Result:
        ms = stored_ms(engine, eight)
        note = f"load {ms.load_from_store:.0f}; from the host tier {ms.host:.0f}, of which load {ms.load_from_host:.0f}"
        return Result("TTFT 8 x 4k reordered, tmpfs store", ms.store, 88.0, 1263, 300, 130, note)

    def mixed() -> Result:
        ms, host = decode_ms(engine, SHARED, prompts=QUERIES)
        rows = SHARED.rows + sum(QUERIES)
        name = f"mixed: decode 64 over 32k + {sum(QUERIES)} prompt rows"
        return Result(name, ms, arithmetic_ms(rows, rows * SHARED.levels[0][1]), note=f"host {host:.2f} ms")

    def packed(rows: int) -> Result:
        ms = packed_ms(engine, rows)
        return Result(
            f"chunk of {LONG} in steps of {rows} rows",
            ms,
            arithmetic_ms(LONG, LONG * LONG // 2),
            note=f"{LONG / ms * 1e3:.0f} tok/s",
        )

    return [
        lambda: decode(engine, "decode 64: 32k shared + 256 own", SHARED, bandwidth, (49.5, 12, 8)),
        lambda: decode(engine, "decode 64: tree 2k, 8 x 8k, 512 own", TREE, bandwidth, (20.6, 12, 9.5)),
        lambda: decode(engine, "decode 1: 32k", ALONE, bandwidth, (6.34, 6.5, 5.6)),
        mixed,
        lambda: packed(512),
        lambda: packed(1024),
        lambda: Result("TTFT 32k resident + 64", warm_ms(engine, [32768], moved=False), 5.0, 22.7, 15, 8),
        lambda: Result("TTFT 32k cold + 64", cold_ms(engine, 32768), COLD_FLOOR_MS, 1250, 1500, 1200),
        lambda: Result("TTFT 8 x 4k reordered, resident", warm_ms(engine, eight, moved=True), 5.0, 1263, 30, 10),
        stored,
    ]


def line(r: Result) -> str:
    known = (("others", r.others), ("target", r.target), ("goal", r.goal))
    figures = "".join(f"  {name} {ms:7.1f}" for name, ms in known if ms is not None)
    return f"{r.name:44} {r.ours:9.2f} ms  floor {r.floor:7.1f}{figures}  {r.note}"


def attention(bandwidth: float) -> list[Result]:
    """One layer's attention with merge, the four cases; the reference is FlashInfer at its best."""
    results = []
    for number, (others, target, goal) in ATTENTION_FIGURES.items():
        figures = measure(CASES[number], bandwidth=bandwidth, flashinfer=False)
        ours, floor = float(figures["ours_ms"]), float(figures["floor_ms"])
        results.append(Result(f"attention {CASES[number].name}", ours, floor, others, target, goal))
        print(f"{results[-1].name:44} {ours:.4f} ms  floor {floor:.3f}  others {others}  target {target}  goal {goal}")
        torch.cuda.empty_cache()
    return results


def guarded(run: Callable[[], list[Result]]) -> list[Result]:
    """A failed part is printed and left out; the rest of the report still comes."""
    try:
        return run()
    except Exception:
        traceback.print_exc()
        return []


def report(options: argparse.Namespace) -> dict[str, object]:
    """Runs everything, printing as it goes; returns the figures."""
    engine = make_engine(pool_tokens=POOL_TOKENS)
    print("start-up, s:", engine.seconds, "sum", round(sum(engine.seconds.values()), 1), flush=True)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}", flush=True)
    results: list[Result] = []
    for run in workloads(engine, bandwidth):
        for result in guarded(lambda run=run: [run()]):  # type: ignore[misc]
            results.append(result)
            print(line(result), flush=True)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"peak device memory {peak:.1f} GiB")
    if options.kernels:
        for tree in (SHARED, TREE, ALONE):
            print(tree, decode_kernels(engine, tree), sep="\n", flush=True)
    points = sweep(engine, bandwidth) if options.sweep else []
    if points:
        print_table(points)
        options.out.mkdir(parents=True, exist_ok=True)
        plot(points, options.out / "gpu_sweep.png")
    seconds = engine.seconds
    del engine
    torch.cuda.empty_cache()
    results += guarded(lambda: attention(bandwidth))
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_tb_s": bandwidth / 1e12,
        "start_up_s": seconds, "peak_gib": peak, "results": [asdict(r) for r in results],
        "sweep": [asdict(p) for p in points],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of gpu.json and gpu_sweep.png")
    parser.add_argument("--no-sweep", dest="sweep", action="store_false", help="leave out shared length x batch")
    parser.add_argument("--kernels", action="store_true", help="also list the kernels of the decode steps")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("engine").setLevel(logging.INFO)  # what the start takes
    started = time.perf_counter()
    figures = report(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(figures, indent=1))
    print(f"whole run {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
