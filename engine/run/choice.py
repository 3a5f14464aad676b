"""The one place that chooses what runs a model, by looking at its device and at what was found out about it.

device   model                                                     runner        attention
cpu      any                                                       EagerRunner   torch
cuda     plain decoder (``fused_refusal``)                         PackedRunner  cascade: on compute capability 9 the
                                                                                 stream kernel, elsewhere portable tiles
cuda     others whose own code a graph can hold                    PackedRunner  cascade
         (``captured_refusal``, then a trial)
cuda     others, on compute capability 9 (``cascade_refusal``)     EagerRunner   cascade
cuda     others (``flashinfer_refusal``)                           EagerRunner   flashinfer, if it is installed
cuda     others                                                    EagerRunner   cascade if it can, else torch

That is ``auto``; a backend that is asked for is taken or refused. FlashInfer and torch run in the EagerRunner.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from engine.attention import Attention
from engine.device import current
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import Findings
from engine.run.backends import (
    ATTENTIONS,
    AUTO,
    CASCADE,
    CPU,
    FA3,
    FLASHINFER,
    TORCH,
    AttentionRefused,
    Decision,
    DeviceFacts,
)
from engine.run.cuda.attention import CudaAttention, cascade_refusal
from engine.run.cuda.borrowed import BorrowedForward, CapturedModel, captured_refusal
from engine.run.cuda.flashinfer.attention import FlashInferAttention
from engine.run.cuda.flashinfer.prefill import FlashInferBlock, block_failure, block_refusal
from engine.run.cuda.flashinfer.refusal import build_refusal, device_refusal, flashinfer_refusal
from engine.run.cuda.forward import FusedForward
from engine.run.cuda.products import BUCKETS
from engine.run.cuda.runner import SLOTS, PackedRunner
from engine.run.cuda.sampling.waited import WaitedSlots
from engine.run.cuda.trial import capture_failure
from engine.run.cuda.weights import FusedWeights, fused_refusal, merge_weights
from engine.run.eager.attention import TorchAttention
from engine.run.eager.runner import EagerRunner
from engine.run.planning import DECODE_BUCKETS
from engine.run.protocol import WatchableRunner

log = logging.getLogger(__name__)

BY_FA3 = "; long pieces by FlashInfer's fa3"
NOT_CAPTURED = "its steps are not captured: "
CUDA_PAGE_SIZES = (16, 32, 64)  # a page is one copy of the bulk copy engine, a block of 64 tokens whole pages
FUSED, CAPTURED, EAGER = "fused", "captured", "eager"
Weights = FusedWeights | CapturedModel  # what a ``PackedRunner`` runs


def device_facts(device: torch.device) -> DeviceFacts:
    """What decides, of a device that is there. Raises ``AttentionRefused`` on CUDA without Triton."""
    if device.type != "cuda":
        return CPU
    if importlib.util.find_spec("triton") is None:
        raise AttentionRefused("device cuda needs Triton: pip install 'cairn[gpu]'")
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return DeviceFacts(cuda=True, hopper=hopper, flashinfer=device_refusal(device))


def check_device(asked: str, device: torch.device) -> None:
    """Raises ``AttentionRefused`` for a backend that no model can have on the device, before one is loaded."""
    facts = device_facts(device)
    refusal = {FLASHINFER: facts.flashinfer, CASCADE: "" if facts.cuda else "the device is cpu"}.get(asked, "")
    if refusal:
        raise AttentionRefused(f"attention: {asked} cannot be used on {device}: {refusal}; give --attention auto")


def decide(
    borrowed: BorrowedModel,
    findings: Findings,
    asked: str = AUTO,
    device: DeviceFacts | None = None,
    *,
    uncaptured: str = "",
) -> Decision:
    """What runs the model on ``device``, without trying it; None is the device that the model is on.

    ``uncaptured``: why a graph cannot hold the model's own code, where that was tried.
    Raises ``AttentionRefused`` for a backend that is asked for and cannot serve the model there, with the reason.
    """
    if asked not in ATTENTIONS:
        raise AttentionRefused(f"attention: {asked!r} is none of {', '.join(ATTENTIONS)}")
    facts = device_facts(borrowed.device) if device is None else device
    if not facts.cuda:
        if asked in (CASCADE, FLASHINFER):
            raise _refused(asked, borrowed, "its kernels run on a GPU, and the device is cpu", TORCH)
        return Decision(EAGER, TORCH, "the device is cpu")
    heads = heads_of(borrowed)
    own = cascade_refusal(findings, heads)
    theirs = facts.flashinfer or flashinfer_refusal(findings, heads)
    if asked != AUTO:
        refusal = {CASCADE: own, FLASHINFER: theirs}.get(asked, "")
        if refusal:
            raise _refused(asked, borrowed, refusal, *([CASCADE] if asked == FLASHINFER and not own else []), TORCH)
        runner, why = _steps(borrowed, findings, uncaptured) if asked == CASCADE else (EAGER, "")
        found = Decision(runner, asked, f"--attention {asked}{why}")
        return _with_pieces(found, findings, facts)
    steps, why = _steps(borrowed, findings, uncaptured)
    if not own and facts.hopper:
        found = Decision(steps, CASCADE, f"our kernels take the model, and are written for compute capability 9{why}")
        return _with_pieces(found, findings, facts)
    if not own and steps != EAGER:
        return Decision(steps, CASCADE, "our portable kernels run in captured steps, which FlashInfer does not")
    if not theirs:
        return Decision(EAGER, FLASHINFER, f"our kernels do not: {own or 'the device is not of compute capability 9'}")
    if not own:
        return Decision(steps, CASCADE, f"our portable kernels; FlashInfer does not: {theirs}{why}")
    return Decision(EAGER, TORCH, f"our kernels do not: {own}; FlashInfer does not: {theirs}")


def decide_and_try(borrowed: BorrowedModel, findings: Findings, asked: str = AUTO) -> Decision:
    """``decide`` for the device that the model is on, where what is chosen must also be seen to work.

    FlashInfer's kernels must have been built, and a graph must hold the model's own code if its steps are captured.
    """
    facts = device_facts(borrowed.device)
    decision, failure = decide(borrowed, findings, asked, facts), ""
    if decision.runner == CAPTURED:
        failure = capture_failure(borrowed, findings)
        decision = decide(borrowed, findings, asked, facts, uncaptured=failure)
    if decision.pieces and (failed := block_failure(heads_of(borrowed), findings.layout, borrowed.device)):
        log.warning("long pieces are left to torch's library attention: FlashInfer's fa3: %s", failed)
        decision = replace(decision, pieces="", reason=decision.reason.removesuffix(BY_FA3))
    if decision.attention != FLASHINFER:
        return decision
    failed = build_refusal(findings, heads_of(borrowed), borrowed.device)
    without = DeviceFacts(True, facts.hopper, failed)
    return decide(borrowed, findings, asked, without, uncaptured=failure) if failed else decision


def _with_pieces(decision: Decision, findings: Findings, facts: DeviceFacts) -> Decision:
    """The decision, with long pieces by FlashInfer's fa3 where that is faster: on compute capability 9."""
    if decision.runner == EAGER or decision.attention != CASCADE or not facts.hopper or facts.flashinfer:
        return decision
    if block_refusal(findings):
        return decision
    return replace(decision, pieces=FA3, reason=f"{decision.reason}{BY_FA3}")


def _refused(asked: str, borrowed: BorrowedModel, reason: str, *others: str) -> AttentionRefused:
    remedy = " or ".join(f"--attention {each}" for each in (AUTO, *others))
    return AttentionRefused(f"attention: {asked} cannot serve model {borrowed.name}: {reason}; give {remedy}")


def _steps(borrowed: BorrowedModel, findings: Findings, uncaptured: str) -> tuple[str, str]:
    """The runner of a model over the cascade kernels, without trying it; of an eager one also why, in words."""
    if not fused_refusal(borrowed, findings):
        return FUSED, ""
    refusal = uncaptured or captured_refusal(borrowed, findings)
    return (EAGER, f"; {NOT_CAPTURED}{refusal}") if refusal else (CAPTURED, "")


def choose_weights(borrowed: BorrowedModel, findings: Findings, decision: Decision) -> Weights | None:
    """What a ``PackedRunner`` runs, if that is the runner: weights merged in place, or the model's own code."""
    if decision.runner == CAPTURED:
        return CapturedModel.of(borrowed, findings)
    return merge_weights(borrowed, findings) if decision.runner == FUSED else None


def numerics_name(decision: Decision) -> str:
    """What computes, for the model identity: another way of computing rounds otherwise."""
    names = {CASCADE: CudaAttention.name, TORCH: TorchAttention.name}
    name = FlashInferAttention.full_name() if decision.attention == FLASHINFER else names[decision.attention]
    name = f"{name} {FlashInferBlock.full_name()}" if decision.pieces else name
    forwards = {FUSED: FusedForward.name, CAPTURED: BorrowedForward.name}
    return f"{forwards[decision.runner]} {name}" if decision.runner in forwards else name


def make_runner(
    pool: PagedKVPool,
    borrowed: BorrowedModel,
    findings: Findings,
    weights: Weights | None,
    *,
    attention: str = AUTO,
    pieces: str = "",
    slots: int = SLOTS,
    decode_buckets: Sequence[int] = DECODE_BUCKETS,
    row_multiple: int = 4,
    **options: Any,
) -> WatchableRunner:
    """The runner of a model over ``pool``; ``weights`` are what ``choose_weights`` gave.

    ``attention`` and ``pieces`` are what was decided. A ``PackedRunner`` takes ``slots``, an ``EagerRunner``
    ``decode_buckets``, the largest of which is the number of its slots, and ``row_multiple``; ``options`` are for
    either. Raises ``ValueError`` for pages that CUDA cannot read.
    """
    with current(pool.device):
        if weights is None:
            made = make_attention(pool, borrowed, findings, attention)
            if pool.device.type == "cuda":
                options["make_slots"] = partial(WaitedSlots, device=pool.device)
            return EagerRunner(
                borrowed, pool, made, decode_buckets=decode_buckets, row_multiple=row_multiple, **options
            )
        _check_pages(pool)
        positions = findings.context_length_max
        if pieces == FA3:
            options.setdefault("block", FlashInferBlock(pool.device))
        if isinstance(weights, FusedWeights):
            return PackedRunner(FusedForward(weights, pool, positions=positions), slots=slots, **options)
        if not options.get("together", True) and len(decode_buckets) == 1:  # one size for all that decode
            options["row_buckets"] = [rows for rows in BUCKETS if rows >= decode_buckets[0]]
        return PackedRunner(BorrowedForward(weights, pool, positions=positions), slots=slots, **options)


def make_attention(
    pool: PagedKVPool, borrowed: BorrowedModel, findings: Findings, attention: str = AUTO
) -> Attention[Any]:
    """The attention backend of an ``EagerRunner``. Raises ``ValueError`` for pages it cannot read."""
    if attention == AUTO:
        attention = decide(borrowed, findings).attention
    if attention == TORCH:
        return TorchAttention(pool, findings.rotations, findings.windows, deferred=findings.deferred)
    if attention == FLASHINFER:
        return FlashInferAttention(pool, findings.rotations, findings.windows)
    _check_pages(pool)
    heads, positions = heads_of(borrowed), findings.context_length_max
    return CudaAttention(pool, findings.rotations, findings.windows, heads=heads, positions=positions)


def heads_of(borrowed: BorrowedModel) -> int:
    """Query heads of a layer."""
    return int(borrowed.config.get_text_config().num_attention_heads)


def _check_pages(pool: PagedKVPool) -> None:
    if pool.page_size not in CUDA_PAGE_SIZES:
        raise ValueError(f"page-size: {pool.page_size} is none of {CUDA_PAGE_SIZES}, which CUDA needs")
