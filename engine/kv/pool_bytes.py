"""KV between a pool's pages and the byte buffers that stores read and write.

On the CPU the buffers are the pages themselves. On another device bytes pass through host memory, and reach the
pages when the block ends. Whether the bytes are right is the store's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.device import current
from engine.kv.pages import PageRun
from engine.kv.pool import PagedKVPool


def outgoing(pool: PagedKVPool, run: PageRun, tokens: int) -> list[memoryview]:
    """The KV of a run as bytes, parts in layout order. On the CPU a view: it changes when the pages do."""
    parts = pool.run_parts(run, tokens)
    if pool.device.type == "cpu":
        return [_bytes_of(part) for part in parts]
    with current(pool.device):
        staged = _staging(parts)
        for part, target in zip(parts, staged, strict=True):
            target.copy_(part, non_blocking=True)
        torch.cuda.current_stream().synchronize()
    return [_bytes_of(part) for part in staged]


@contextmanager
def incoming(pool: PagedKVPool, run: PageRun, tokens: int) -> Iterator[list[memoryview]]:
    """Buffers to fill with a run's KV, parts in layout order; in the pages for certain after the block."""
    parts = pool.run_parts(run, tokens)
    if pool.device.type == "cpu":
        yield [_bytes_of(part) for part in parts]
        return
    with current(pool.device):
        staged = _staging(parts)
    yield [_bytes_of(part) for part in staged]
    with current(pool.device):
        for part, source in zip(parts, staged, strict=True):
            part.copy_(source, non_blocking=True)
        torch.cuda.current_stream().synchronize()


def _staging(parts: list[Tensor]) -> list[Tensor]:
    """Pinned memory of the parts' shapes: the bus takes it at full speed, and torch keeps it for the next chunk."""
    return [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in parts]


def _bytes_of(part: Tensor) -> memoryview:
    flat: memoryview = part.reshape(-1).view(torch.uint8).numpy().data
    return flat.cast("B")
