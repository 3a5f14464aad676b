"""The one place that chooses what runs a model, by looking at its device and at what was found out about it.

device   model                                         runner         attention
cpu      any                                           EagerRunner    TorchAttention
cuda     plain decoder (``fused_refusal``)             PackedRunner   its own kernels
cuda     others with plain heads (``cascade_refusal``) EagerRunner    CudaAttention
cuda     the rest                                      EagerRunner    TorchAttention
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from engine.attention import Attention
from engine.device import current
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import Findings
from engine.run.cuda.attention import CudaAttention, cascade_refusal
from engine.run.cuda.cascade.attention import AttentionUnavailable
from engine.run.cuda.forward import FusedForward
from engine.run.cuda.runner import SLOTS, PackedRunner
from engine.run.cuda.sampling.waited import WaitedSlots
from engine.run.cuda.weights import FusedWeights, fused_refusal, merge_weights
from engine.run.eager.attention import TorchAttention
from engine.run.eager.runner import EagerRunner
from engine.run.planning import DECODE_BUCKETS
from engine.run.protocol import WatchableRunner

CUDA_PAGE_SIZES = (16, 32, 64)  # a page is one copy of the bulk copy engine, a block of 64 tokens whole pages


def choose_weights(borrowed: BorrowedModel, findings: Findings) -> FusedWeights | None:
    """The model's weights merged in place, if ``PackedRunner`` is what runs it; else None and nothing is changed.

    Raises ``AttentionUnavailable`` on CUDA without Triton.
    """
    if borrowed.device.type != "cuda":
        return None
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise AttentionUnavailable("device cuda needs Triton: pip install 'cairn[gpu]'") from error
    return None if fused_refusal(borrowed, findings) else merge_weights(borrowed, findings)


def numerics_name(borrowed: BorrowedModel, findings: Findings, weights: FusedWeights | None) -> str:
    """What computes, for the model identity: another way of computing rounds otherwise."""
    if not _cascades(borrowed, findings):
        return TorchAttention.name
    return CudaAttention.name if weights is None else f"{FusedForward.name} {CudaAttention.name}"


def make_runner(
    pool: PagedKVPool,
    borrowed: BorrowedModel,
    findings: Findings,
    weights: FusedWeights | None,
    *,
    slots: int = SLOTS,
    decode_buckets: Sequence[int] = DECODE_BUCKETS,
    row_multiple: int = 4,
    **options: Any,
) -> WatchableRunner:
    """The runner of a model over ``pool``; ``weights`` are what ``choose_weights`` gave.

    A ``PackedRunner`` takes ``slots``, an ``EagerRunner`` ``decode_buckets``, the largest of which is the number of its
    slots, and ``row_multiple``; ``options`` are for either. Raises ``ValueError`` for pages that CUDA cannot read.
    """
    with current(pool.device):
        if weights is None:
            attention = make_attention(pool, borrowed, findings)
            if pool.device.type == "cuda":
                options["make_slots"] = partial(WaitedSlots, device=pool.device)
            return EagerRunner(
                borrowed, pool, attention, decode_buckets=decode_buckets, row_multiple=row_multiple, **options
            )
        _check_pages(pool)
        positions = findings.context_length_max
        return PackedRunner(FusedForward(weights, pool, positions=positions), slots=slots, **options)


def make_attention(pool: PagedKVPool, borrowed: BorrowedModel, findings: Findings) -> Attention[Any]:
    """The attention backend of an ``EagerRunner``. Raises ``ValueError`` for pages it cannot read."""
    if not _cascades(borrowed, findings):
        return TorchAttention(pool, findings.rotations, deferred=findings.deferred)
    _check_pages(pool)
    return CudaAttention(pool, findings.rotations, heads=_heads(borrowed), positions=findings.context_length_max)


def _cascades(borrowed: BorrowedModel, findings: Findings) -> bool:
    return borrowed.device.type == "cuda" and not cascade_refusal(findings, _heads(borrowed))


def _heads(borrowed: BorrowedModel) -> int:
    return int(borrowed.config.get_text_config().num_attention_heads)


def _check_pages(pool: PagedKVPool) -> None:
    if pool.page_size not in CUDA_PAGE_SIZES:
        raise ValueError(f"page-size: {pool.page_size} is none of {CUDA_PAGE_SIZES}, which CUDA needs")
