"""Whether a model's own code can be captured: tried on a few rows, before anything is served."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import Findings
from engine.run.cuda.borrowed import BorrowedForward, CapturedModel
from engine.run.cuda.captured import GraphMaker

TRIED_ROWS = (8, 128)  # what a library launches may follow from how many there are
PAGE_SIZE = 16


@torch.inference_mode()
def capture_failure(borrowed: BorrowedModel, findings: Findings) -> str:
    """Why a graph cannot hold the model's forward; "" if it can, and gives the bits of the forward itself."""
    device, pages = borrowed.device, max(TRIED_ROWS) // PAGE_SIZE
    pool = PagedKVPool(findings.layout, pages=pages, chunk_pages=1, page_size=PAGE_SIZE, device=device)
    try:
        forward = BorrowedForward(CapturedModel.of(borrowed, findings), pool, positions=1)
        for rows in TRIED_ROWS:
            failure = _failure(forward, GraphMaker(device), rows)
            if failure:
                return failure
    except Exception as error:  # whatever modelling code, a library or the driver makes of it
        return f"capturing fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}"
    return ""


def _failure(forward: BorrowedForward, graphs: GraphMaker, rows: int) -> str:
    device = forward.pool.device
    inputs = forward.inputs(rows)
    outputs = forward.outputs(torch.arange(rows, dtype=torch.int32, device=device))
    last = torch.zeros(1, dtype=torch.int32, device=device)
    inputs.slots.copy_(torch.arange(rows, device=device))

    def fill(step: int) -> None:
        inputs.sources.copy_((torch.arange(rows, device=device) * step) % min(forward.vocabulary, 1000))
        inputs.positions.copy_(torch.arange(rows, device=device) % min(step, forward.model.findings.context_length_max))

    def attend(layer: int, q: Tensor, turned: Tensor, out: Tensor) -> None:
        out.copy_(own_mean(q, out.shape[2]))

    def run() -> None:
        forward.layers(inputs, last, attend, turn=False, drawn=[outputs])

    fill(2)
    run()
    torch.cuda.synchronize(device)
    try:
        with _refusing_to_wait():
            run()
    except RuntimeError as error:
        return f"the model's code waits for the device ({str(error).splitlines()[0]})"
    graph = graphs.capture(run)
    fill(3)
    graph.replay()
    found = outputs.logits.clone()
    run()
    if not torch.equal(found, outputs.logits):
        return f"captured, a forward of {rows} rows gives other bits"
    return ""


def own_mean(q: Tensor, width: int) -> Tensor:
    """Something of the queries (rows, heads, dim) in place of attention: (rows, heads, width)."""
    return q.mean(dim=2, keepdim=True).expand(-1, -1, width)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """What waits for the device raises: a capture that fails leaves more behind."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not everything is detected
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
