"""``--dtype auto``: which dtype a model is served in, and why.

On a GPU the checkpoint's own. On the CPU a short product decides: torch multiplies bf16 at 10 GFLOP/s where float32
runs at 56 to 85 on a processor with AVX2 alone, and faster than float32 where AVX-512 or AMX has instructions for it.
The dtype is part of the model identity, so two services must decide alike: the processor's features say what to expect,
and a measurement overrules them only by a margin that noise does not reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch

from chunk_store.quantities import human_bytes
from engine.kv.pool import TORCH_DTYPES
from engine.model.processor import Processor, memory_nbytes, read_processor

SMALL_PARAMETERS = 100_000_000  # fewer: the product is not what takes the time, and float32 is exact to compare
OVERRULES = 1.5  # a measured ratio of speeds that what the features say gives way to
MEMORY_SHARE = 0.6  # of all memory, for the weights of two services
ROWS = (32, 128)  # a decode batch, a piece of a prefill
WIDE, DEEP = 2048, 1024
REPEATS = 4

Measure = Callable[[str], tuple[float, ...]]


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype by its short name ("float32", "bfloat16", "float16"), and what decided."""

    dtype: str
    reason: str


@torch.inference_mode()
def product_rates(dtype: str) -> tuple[float, ...]:
    """GFLOP/s of a linear layer on the CPU, one figure for each of ``ROWS``; about 0.1 s.

    Time of this thread, not of the clock: what else runs on the machine counts little.
    """
    weight = torch.ones(WIDE, DEEP, dtype=TORCH_DTYPES[dtype])
    rates = []
    for rows in ROWS:
        x = torch.ones(rows, DEEP, dtype=weight.dtype)
        seconds = []
        for _ in range(REPEATS):
            started = time.thread_time()
            torch.nn.functional.linear(x, weight)
            seconds.append(time.thread_time() - started)
        rates.append(2e-9 * rows * WIDE * DEEP / max(min(seconds), 1e-9))
    return tuple(rates)


def choose_dtype(
    stored: str,
    parameters: int,
    device: str,
    *,
    processor: Processor | None = None,
    memory: int | None = None,
    measure: Measure = product_rates,
) -> DtypeChoice:
    """What "auto" is for a checkpoint of dtype ``stored`` with that many parameters on ``device``.

    ``processor`` and ``memory`` (bytes) are this machine's unless given.
    """
    if torch.device(device).type != "cpu":
        return DtypeChoice(stored, "the checkpoint's own")
    if stored == "float32":
        return DtypeChoice(stored, "the checkpoint's own")
    if parameters < SMALL_PARAMETERS:
        return DtypeChoice("float32", f"the model has {parameters / 1e6:.3g} M parameters, fewer than 100 M")
    available = memory if memory is not None else memory_nbytes()
    if available is not None and 2 * 4 * parameters > MEMORY_SHARE * available:
        needed = f"in float32 the weights take {human_bytes(4 * parameters)} a service"
        return DtypeChoice(stored, f"{needed}, too much for {human_bytes(available)}")
    return _faster(stored, processor or read_processor(), measure)


def _faster(stored: str, processor: Processor, measure: Measure) -> DtypeChoice:
    """The checkpoint's dtype where the processor has instructions for it, unless the product shows otherwise."""
    short, long = measure(stored), measure("float32")
    ratio = sqrt(short[0] / long[0] * short[1] / long[1])
    native = processor.multiplies(stored)
    takes_stored = ratio * OVERRULES > 1 if native else ratio > OVERRULES
    figures = (
        f"products of {ROWS[0]} and {ROWS[1]} rows run at {short[0]:.0f} and {short[1]:.0f} GFLOP/s in {stored}, "
        f"{long[0]:.0f} and {long[1]:.0f} in float32, on {processor}"
    )
    return DtypeChoice(stored if takes_stored else "float32", figures)
