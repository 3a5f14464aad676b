"""KV between a pool's pages and the byte buffers that stores read and write.

A chunk's *planes* are views of its pages, one K and one V a layer, in layout order. On the CPU the buffers are the
planes themselves. On another device bytes pass through host memory, and reach the pages when the block ends. Whether
the bytes are right is the store's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.device import current
from engine.kv.pages import PageRun
from engine.kv.pool import PagedKVPool


def outgoing(pool: PagedKVPool, run: PageRun, tokens: int) -> list[memoryview]:
    """The KV of a run as bytes, plane by plane. On the CPU a view: it changes when the pages do."""
    planes = pool.run_planes(run, tokens)
    if pool.device.type == "cpu":
        return as_bytes(planes)
    with current(pool.device):
        staged = _staging(planes)
        copy_planes(staged, planes)
        torch.cuda.current_stream().synchronize()
    return as_bytes(staged)


@contextmanager
def incoming(pool: PagedKVPool, run: PageRun, tokens: int) -> Iterator[list[memoryview]]:
    """Buffers to fill with a run's KV, plane by plane; in the pages for certain after the block."""
    planes = pool.run_planes(run, tokens)
    if pool.device.type == "cpu":
        yield as_bytes(planes)
        return
    with current(pool.device):
        staged = _staging(planes)
    yield as_bytes(staged)
    with current(pool.device):
        copy_planes(planes, staged)
        torch.cuda.current_stream().synchronize()


def as_bytes(planes: Sequence[Tensor]) -> list[memoryview]:
    """The planes' own memory as bytes; they are contiguous and on the CPU."""
    return [plane.reshape(-1).view(torch.uint8).numpy().data.cast("B") for plane in planes]


def copy_planes(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Begins to copy, on the current stream where one side is pinned and the other on a device."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def _staging(planes: Sequence[Tensor]) -> list[Tensor]:
    """Pinned memory of the planes' shapes: the bus takes it at full speed, and torch keeps it for the next chunk."""
    return [torch.empty(plane.shape, dtype=plane.dtype, pin_memory=True) for plane in planes]
