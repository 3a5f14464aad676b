"""``python -m bench.flashinfer_prefill``: attention of long pieces by FlashInfer's fa3 and by torch's kernels.

8192 rows (32 query heads over 8 KV heads of 128, bf16) over 0 to 24k earlier tokens of their own chunk, and over as
many in a chunk before it, in ms and TFLOP/s. Needs FlashInfer, whose kernels are compiled when first used
(``python -m bench.flashinfer_build fa3``). Through the engine: ``bench.attention_backends``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from engine.plan import CascadePlan, PlacedChunk, StepSequence, plan_levels, plan_step
from engine.run.cuda.flashinfer.prefill import FlashInferBlock
from engine.run.cuda.prefill_attention import LIBRARY, Block, attend_piece, prepare_piece

ROWS, HEADS, KV_HEADS, DIM, PAGE = 8192, 32, 8, 128, 16
COLD_TOKENS = 32768


def piece(rows: int, before: int, *, apart: bool) -> CascadePlan:
    """``rows`` behind ``before`` tokens, of the same chunk or, ``apart``, of one before it."""
    at = before // PAGE
    pages = tuple(range(at if apart else 0, at + -(-rows // PAGE)))
    chunks = (PlacedChunk(0, before, 0, 0),) if apart and before else ()
    sequence = StepSequence(chunks, pages, 0 if apart else before, rows, before)
    return plan_step([sequence], plan_levels([sequence], max_cascade_levels=1), page_size=PAGE)


def timed_ms(run: Callable[[], Tensor], repeats: int = 7) -> float:
    """The median of single runs, each between two events."""
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def attention() -> None:
    q = torch.randn(ROWS, HEADS, DIM, device="cuda").bfloat16()
    keys, values = (torch.randn(COLD_TOKENS, KV_HEADS, DIM, device="cuda").bfloat16() for _ in range(2))
    ways: dict[str, Block] = {"torch": LIBRARY, "fa3": FlashInferBlock(keys.device)}
    print("rows  context            torch ms  TFLOP/s    fa3 ms  TFLOP/s   relative difference")
    for rows, before, apart in [(ROWS, n, apart) for n in (0, 8192, 16384, 24576) for apart in (False, True)] + [
        (5000, 9000, False), (5000, 9000, True), (4104, 0, False),
    ]:  # fmt: skip
        step = prepare_piece(piece(rows, before, apart=apart), PAGE, keys.device)
        out = torch.empty(rows, HEADS, DIM, device="cuda", dtype=q.dtype)

        def run(by: Block, step: object = step, out: Tensor = out, rows: int = rows) -> Tensor:
            return attend_piece(step, lambda _: q[:rows], keys, values, DIM**-0.5, out, by)  # type: ignore[arg-type]

        flops = 4.0 * HEADS * DIM * rows * (before + (rows + 1) / 2)
        cells, outs = [], []
        for by in ways.values():
            ms = timed_ms(lambda by=by: run(by))  # type: ignore[misc]
            cells.append(f"{ms:9.3f} {flops / ms / 1e9:8.0f}")
            outs.append(run(by).float().clone())
        apart_by = float((outs[0] - outs[1]).norm() / outs[0].norm())
        print(
            f"{rows:5} {before:6} {'apart' if apart else 'own  '}     {'  '.join(cells)}   {apart_by:.1e}", flush=True
        )


def main() -> None:
    with torch.inference_mode():
        attention()


if __name__ == "__main__":
    main()
