"""``python -m bench.cpu``: decode rate and time to first token on the CPU, ours beside transformers' generate.

Every figure depends on the processor: its name and features come first, and how fast it multiplies in each dtype.

Prints what it measured, whatever that is. Rates are tokens a second of process time (the machine may be
shared); ours and theirs alternate, and the ratio is the median of the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.decode_rate import DecodeRate
from bench.first_token import measure
from bench.models import BenchModel, fable, qwen3_shape
from engine.model.borrowed import BorrowedModel
from engine.model.dtype import ROWS, product_rates
from engine.model.processor import read_processor
from engine.served import serve

GOALS = {(8, 2048): 3.0, (32, 2048): 5.0, (1, 256): 0.9, (1, 2048): 0.9}
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
SAMPLED_GOAL = 0.9  # of greedy
TTFT_TOKENS = 2048
COLD_GOAL = 1.05  # time to first token through both services, of plain generate's


def decode_rows(model: BenchModel, rate: DecodeRate, pairs: int, steps: int) -> list[dict[str, Any]]:
    """One row for each shared length and batch."""
    rows = []
    for shared in (256, 2048):
        for batch in (1, 8, 32):
            measured = [(rate.ours(shared, batch, steps), rate.theirs(shared, batch, steps)) for _ in range(pairs)]
            ours, theirs_ = (statistics.median(column) for column in zip(*measured, strict=True))
            ratio = statistics.median(a / b for a, b in measured)
            rows.append(
                {"model": model.name, "shared": shared, "batch": batch, "ours": ours, "theirs": theirs_, "ratio": ratio}
            )
            goal = GOALS.get((batch, shared))
            mark = "" if goal is None else f"   goal {goal:g}x {'reached' if ratio >= goal else 'NOT reached'}"
            print(
                f"  shared {shared:5d}  batch {batch:2d}   {ours:9.1f} {theirs_:9.1f}  {ratio:6.2f}x{mark}", flush=True
            )
    return rows


def first_token_row(model: BenchModel, module: Any, documents: int, threads: int) -> dict[str, Any]:
    """Time to first token over one document of ``TTFT_TOKENS`` tokens."""
    times = measure(model, module, TTFT_TOKENS, documents, threads)
    share = times.resident_ms / times.cold_ms
    print(f"  TTFT over {TTFT_TOKENS} tokens, ms: cold {times.cold_ms:.1f}  resident {times.resident_ms:.1f}", end="")
    print(f"  from the store {times.store_ms:.1f}  | transformers, every time {times.plain_ms:.1f}")
    fastest = times.fastest_cold_ms / times.fastest_plain_ms
    print(f"  cold, by stage, ms: {times.stages_ms}")
    print(f"  cold / plain = {times.cold_of_plain:.2f}, of the fastest {fastest:.2f}   goal {COLD_GOAL}", end="")
    print(f" {'reached' if times.cold_of_plain <= COLD_GOAL else 'NOT reached'}")
    print(
        f"  resident / cold = 1/{1 / share:.1f}   goal 1/20 {'reached' if share <= 0.05 else 'NOT reached'}", flush=True
    )
    return {"model": model.name, "tokens": TTFT_TOKENS, **vars(times)}


def sampled_rows(model: BenchModel, rate: DecodeRate, pairs: int, steps: int) -> list[dict[str, Any]]:
    """What sampling takes: ours with a temperature, ours greedy, their ratio."""
    rows = []
    for batch in (1, 32):
        for sampling in ({"temperature": 0.8}, SAMPLED):
            measured = [(rate.ours(256, batch, steps, **sampling), rate.ours(256, batch, steps)) for _ in range(pairs)]
            sampled, greedy = (statistics.median(column) for column in zip(*measured, strict=True))
            ratio = statistics.median(a / b for a, b in measured)
            rows.append({"model": model.name, "batch": batch, **sampling, "greedy": greedy, "sampled": sampled})
            mark = f"goal {SAMPLED_GOAL:g}x {'reached' if ratio >= SAMPLED_GOAL else 'NOT reached'}"
            print(f"  {sampling}  batch {batch:2d}   {sampled:9.1f} {greedy:9.1f}  {ratio:6.2f}x   {mark}", flush=True)
    return rows


def run(model: BenchModel, *, pairs: int, steps: int, documents: int, threads: int) -> dict[str, Any]:
    print(f"\n{model.name}, {threads} thread(s): decode tokens/s   ours    theirs   ratio", flush=True)
    served = serve(BorrowedModel.load(str(model.path), dtype=model.dtype))
    rate = DecodeRate(model, served)
    decode = decode_rows(model, rate, pairs, steps)
    print("  decode tokens/s   sampled    greedy   ratio", flush=True)
    sampled = sampled_rows(model, rate, pairs, steps)
    return {
        "decode": decode,
        "sampled": sampled,
        "first_token": first_token_row(model, served.borrowed.module, documents, threads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the shipped model only")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processor = read_processor()
    print(f"{processor}; products of {ROWS} rows, GFLOP/s: {_product_words()}", flush=True)
    results = [run(fable(), pairs=5, steps=40, documents=8, threads=args.threads)]
    if not args.quick:
        with tempfile.TemporaryDirectory(prefix="cairn-bench-") as folder:
            results.append(run(qwen3_shape(Path(folder)), pairs=2, steps=6, documents=3, threads=args.threads))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"processor": vars(processor), "results": results}, indent=2) + "\n")


def _product_words() -> str:
    rates = {dtype: product_rates(dtype) for dtype in ("float32", "bfloat16")}
    return ", ".join(f"{dtype} {' and '.join(f'{rate:.0f}' for rate in pair)}" for dtype, pair in rates.items())


if __name__ == "__main__":
    main()
