"""Attention alone on one GPU: our cascade kernels, FlashInfer's composition and the floor, side by side.

    python -m bench.attention_gpu [--cases 1,2] [--flashinfer] [--json out.json]

One layer of the Qwen3-8B shape (32 query heads, 8 KV heads, head_dim 128, bf16), merge included, each figure from
a replayed CUDA graph of several layers with memory of their own, so that no layer finds its keys in the L2 cache.
The floor is the fewest bytes that must move, at the copy bandwidth measured on the card.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.attention_reference import reference
from chunk_store.layout import KVLayout, LayerLayout
from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.rotary import Rotation
from engine.plan import CascadePlan, StepSequence, behind_each_other, plan_levels, plan_step
from engine.run.cuda.cascade.launch import CascadeWork
from engine.run.cuda.cascade.records import Limits
from engine.run.cuda.cascade.tuning import AttentionShape, RotationTable, Tuning

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 2
LAYERS = 4
LIMITS = Limits(rows=256, pairs=2048, items=8192, pages=16384, partials=8192)


@dataclass(frozen=True)
class Case:
    """``rows`` decode rows; ``levels`` of (rows that share a chunk, tokens of a chunk); ``own`` tail tokens."""

    rows: int
    levels: tuple[tuple[int, int], ...]
    own: int

    @property
    def tokens(self) -> int:
        """KV tokens read, each once."""
        return sum(self.rows // group * tokens for group, tokens in self.levels) + self.rows * self.own

    @property
    def name(self) -> str:
        shared = " ".join(f"({group}, {tokens})" for group, tokens in self.levels)
        return f"{self.rows}: {shared} (1, {self.own})"


CASES = {
    1: Case(64, ((64, 32768),), 256),
    2: Case(64, ((64, 2048), (8, 8192)), 512),
    3: Case(256, ((256, 1024), (16, 4096)), 256),
    4: Case(32, ((32, 131072),), 512),
}


@dataclass(frozen=True)
class Layers:
    """Random keys and values of several layers, (slots, KV_HEADS, HEAD_DIM) bf16, and queries."""

    keys: list[Tensor]
    values: list[Tensor]
    q: Tensor


def plan_of(case: Case, *, seed: int = 0, moved: bool = True) -> tuple[CascadePlan, int]:
    """The plan of a case and the slots it needs. ``moved``: every second row has its last chunk further on."""
    slot = 0
    chunks: list[list[tuple[int, int, int]]] = [[] for _ in range(case.rows)]
    for level, (group, tokens) in enumerate(case.levels):
        for first in range(0, case.rows, group):
            for row in range(first, first + group):
                offset = 160 if moved and level and row % 2 else 0
                chunks[row].append((slot, tokens, offset))
            slot += -(-tokens // PAGE_SIZE) * PAGE_SIZE
    pages_each = -(-case.own // PAGE_SIZE)
    pages = list(range(slot // PAGE_SIZE, slot // PAGE_SIZE + pages_each * case.rows))
    random.Random(seed).shuffle(pages)
    sequences = []
    for row, own_chunks in enumerate(chunks):
        own_pages = tuple(pages[row * pages_each : (row + 1) * pages_each])
        position = sum(tokens for _, tokens, _ in own_chunks) + 160 + case.own - 1
        sequences.append(StepSequence(behind_each_other(own_chunks), own_pages, case.own - 1, 1, position))
    levels = plan_levels(sequences, max_cascade_levels=len(case.levels) + 1)
    return plan_step(sequences, levels, page_size=PAGE_SIZE), slot + pages_each * case.rows * PAGE_SIZE


def layers_of(case: Case, slots: int, *, layers: int = LAYERS) -> Layers:
    torch.manual_seed(0)

    def pool() -> Tensor:
        return torch.randn(slots, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    q = torch.randn(case.rows, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return Layers([pool() for _ in range(layers)], [pool() for _ in range(layers)], q)


def rotation_table(positions: int = 140_000) -> RotationTable:
    frequencies = 1e6 ** (-torch.arange(0, HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))
    return RotationTable.of(Rotation(frequencies, False, 0), positions, "cuda")


def replayed_ms(run: Callable[[int], None], layers: int, *, replays: int = 15) -> tuple[float, float]:
    """Median and spread (of the middle half) in ms of ``run(layer)``, over replays of a graph of all layers."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for layer in range(layers):
            run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            run(layer)
    times = []
    for _ in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / layers)
    kept = sorted(times[3:])
    middle = kept[len(kept) // 4 : -(len(kept) // 4) or None]
    return statistics.median(kept), middle[-1] - middle[0]


def ours(
    case: Case, plan: CascadePlan, layers: Layers, table: RotationTable | None, tuning: Tuning
) -> Callable[[int], None]:
    """A function of a layer that launches our kernels; its output is ``out_of(run)``."""
    shape = AttentionShape(HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, PAGE_SIZE)
    work = CascadeWork(shape, "cuda", LIMITS, tuning)
    work.update(plan)
    torch.cuda.synchronize()
    out = torch.full_like(layers.q, float("nan"))

    def run(layer: int) -> None:
        work.launch(layers.keys[layer], layers.values[layer], layers.q, out, scaling=HEAD_DIM**-0.5, rotation=table)

    run.out = out  # type: ignore[attr-defined]
    run.work = work  # type: ignore[attr-defined]
    return run


def copy_bandwidth() -> float:
    """Bytes a second of a kernel that reads and writes 4 GB each, both counted."""
    a = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    b = torch.empty_like(a)

    def run(_: int) -> None:
        torch.neg(a, out=b)  # a kernel; a captured copy would run on the copy engine, which is slower

    ms, _ = replayed_ms(run, 1)
    return 2 * a.nbytes / ms * 1e3


def flashinfer_run(case: Case, plan: CascadePlan, layers: Layers) -> Callable[[int], None]:
    """A function of a layer that runs FlashInfer's composition, the queries of pairs gathered but not turned."""
    from engine.run.cuda.flashinfer.attention import FlashInferAttention

    layout = KVLayout("bfloat16", (LayerLayout(KV_HEADS, HEAD_DIM, HEAD_DIM),) * len(layers.keys))
    pool = PagedKVPool(layout, pages=1, chunk_pages=1, page_size=PAGE_SIZE, device="cuda")
    pool.keys, pool.values = layers.keys, layers.values
    attention = FlashInferAttention(pool, [None] * len(layers.keys))
    seen, calls = attention.planned(attention.prepare(plan), 0, layers.q, Scores(HEAD_DIM**-0.5))
    queries = attention.queries(seen, 0, layers.q)
    out = torch.full_like(layers.q, float("nan"))

    def run(layer: int) -> None:
        attention.run(seen, calls, layer, queries, out)

    run.out = out  # type: ignore[attr-defined]
    return run


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())


def measure(case: Case, *, bandwidth: float, flashinfer: bool) -> dict[str, float | str]:
    """Figures of one case in ms, and the relative errors against fp32 attention."""
    plan, slots = plan_of(case)
    layers = layers_of(case, slots)
    table = rotation_table()
    run = ours(case, plan, layers, table, Tuning())
    ms, spread = replayed_ms(run, LAYERS)
    expected = reference(plan, layers.keys[-1], layers.values[-1], layers.q, table, HEAD_DIM**-0.5, PAGE_SIZE)
    row: dict[str, float | str] = {
        "case": case.name,
        "floor_ms": case.tokens * TOKEN_BYTES / bandwidth * 1e3,
        "ours_ms": ms,
        "ours_spread_ms": spread,
        "ours_error": relative_error(run.out, expected),  # type: ignore[attr-defined]
    }
    if flashinfer:
        still, _ = plan_of(case, moved=False)
        run = flashinfer_run(case, still, layers)
        row["flashinfer_ms"], row["flashinfer_spread_ms"] = replayed_ms(run, LAYERS)
        expected = reference(still, layers.keys[-1], layers.values[-1], layers.q, None, HEAD_DIM**-0.5, PAGE_SIZE)
        row["flashinfer_error"] = relative_error(run.out, expected)  # type: ignore[attr-defined]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="1,2,3,4", help="which of the four cases, by number")
    parser.add_argument("--flashinfer", action="store_true", help="measure FlashInfer's composition too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, device copy {bandwidth / 1e12:.2f} TB/s; ms a layer, merge included")
    rows = []
    for number in options.cases.split(","):
        row = measure(CASES[int(number)], bandwidth=bandwidth, flashinfer=options.flashinfer)
        rows.append(row)
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else v for k, v in row.items()), flush=True)
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
