"""At start: is what we compute what the model's own eager attention computes, in every mode?

structure   in float32, on a few layers with redrawn weights: the code, whatever the weights. Right models differ by
            1e-5 of the logits' deviation, a token that is hidden or a rotation off by one by thousands of times that.
rounding    in the served dtype, on the whole model: R = rms(ours - eager) / rms(eager - eager in float32). Ours may
            round otherwise than eager does, but not more: two roundings of one size give R = 1 to 1.4.
kernels     on CUDA, each layer's attention against attention in float32 on the same queries, keys and values.

A mode that fails is refused for the model, with the reason; a model for which EXACT fails is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf

import torch
from torch import Tensor, nn

from chunk_store.layout import KVLayout
from engine.check.forwards import (
    CHECK_TOKENS,
    CHUNK_TOKENS,
    CHUNK_TOKENS_FEW,
    PIECE_TOKENS,
    Prompts,
    RunnerFactory,
    check_prompts,
    eager_logits,
    our_logits,
    plain_logits,
    window_prompts,
)
from engine.check.kernels import KernelWatch
from engine.check.precision import first_layers, layers_of_every_kind, redrawn, upcast
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.isolation import MOVED_MAX, MOVED_MAX_DEEP, cap_by_rows, check_isolation, moved_limit
from engine.model.probe import CONTEXT_LEAST, Findings
from engine.model.windows import cap_by_blocks
from engine.reuse import ReuseMode
from engine.run.eager.attention import TorchAttention
from engine.run.eager.runner import EagerRunner

STRUCTURE_MAX = 1e-3  # standard deviations of the logits
ROUNDING_MAX = 2.5  # times the rounding of the model's own eager attention
KERNEL_MAX = 2.5  # times the rounding of the torch backend in the served dtype, on the same queries, keys and values
# Where routers choose experts, a choice that hangs on a rounding can put a whole prompt off; a fault is in every one.
PROMPT_SEEDS = (20, 21, 22)
ROUNDING_NOTE = "rounding to the served dtype changes in those"
# Beyond, models turn keys by angles whose rounding in float32 a chunk that is moved so far shows.
MOVED_TOKENS_CHECKED = 10_000
ROWS_LOOKED_AT = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class ModeCheck:
    """What was measured for a mode; None for what was not. ``refusal`` is "" if it holds."""

    structure: float | None = None
    rounding: float | None = None
    kernels: float | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Structure:
    """What the check in float32 found: limits that only show there, and the error of each mode that was run."""

    findings: Findings
    errors: dict[ReuseMode, float] = field(default_factory=dict)


def modes_to_check(findings: Findings) -> list[ReuseMode]:
    """EXACT, and the modes that move chunks where a model's chunks can be moved."""
    return [mode for mode in ReuseMode if mode is ReuseMode.EXACT or not findings.rotation_refusal]


@torch.inference_mode()
def check_structure(borrowed: BorrowedModel, findings: Findings) -> Structure:
    """Looks for what a KV store cannot hold, for limits, and at every mode. Raises ``ModelRefused``."""
    with _rotating(borrowed), _few_layers(borrowed, findings) as layers, redrawn(borrowed):
        check_isolation(borrowed, findings.limit.tokens, most=MOVED_MAX)
        rows = ROWS_LOOKED_AT[borrowed.device.type]
        findings = _with_limits(borrowed, findings, cap_rows=rows)
        prompts = check_prompts(_vocabulary(borrowed), findings.moved_limit.tokens)
        modes = modes_to_check(findings)
        rotations, windows = findings.rotations[:layers], findings.windows[:layers]

        def make_runner(pool: PagedKVPool) -> EagerRunner:
            return EagerRunner(borrowed, pool, TorchAttention(pool, rotations, windows), piece_tokens=PIECE_TOKENS)

        layout = KVLayout("float32", findings.layout.layers[:layers])
        eager = eager_logits(borrowed, modes, prompts, findings.limit.tokens)
        apart = deviation(plain_logits(borrowed, prompts), eager[0])
        if not apart <= STRUCTURE_MAX:
            raise ModelRefused(
                f"model {borrowed.name} cannot be served exactly: by itself it attends otherwise than to all earlier "
                f"tokens (its logits differ by {apart:.2g} standard deviations from those under a causal mask)"
            )
        errors = {
            mode: deviation(our_logits(layout, borrowed.device, make_runner, mode, prompts), theirs)
            for mode, theirs in zip(modes, eager, strict=True)
        }
        for mode, some in _at_windows(borrowed, findings):
            (theirs,) = eager_logits(borrowed, [mode], some, findings.limit.tokens)
            apart = deviation(our_logits(layout, borrowed.device, make_runner, mode, some), theirs)
            errors[mode] = apart if apart != apart else max(errors[mode], apart)  # NaN stays
    return Structure(findings, errors)


def _at_windows(borrowed: BorrowedModel, findings: Findings) -> Iterator[tuple[ReuseMode, Prompts]]:
    """Modes and what to check of them besides: prompts that reach the borders of windows, and for EXACT, where chunks
    may only move in short contexts, those that are as long as others'."""
    vocabulary, moved = _vocabulary(borrowed), findings.moved_limit.tokens
    if moved < min(CHECK_TOKENS, findings.limit.tokens):
        yield ReuseMode.EXACT, check_prompts(vocabulary, findings.limit.tokens)
    for mode in modes_to_check(findings):
        exact = mode is ReuseMode.EXACT
        limit = findings.limit.tokens if exact else min(moved, MOVED_TOKENS_CHECKED)
        for prompt in window_prompts(vocabulary, limit, findings.windows):
            yield mode, (prompt,)


def _with_limits(borrowed: BorrowedModel, findings: Findings, *, cap_rows: int) -> Findings:
    limit = cap_by_rows(borrowed, findings.limit, cap_rows)
    if findings.rotation_refusal:
        return replace(findings, limit=limit, moved_limit=limit)
    moved = cap_by_blocks(moved_limit(borrowed, limit, findings.rotations), findings.windows)
    if moved.tokens < CONTEXT_LEAST:  # a rotation that held to the served dtype's precision only
        return replace(findings, limit=limit, moved_limit=limit, rotation_refusal=moved.because)
    return replace(findings, limit=limit, moved_limit=moved)


@contextmanager
def _few_layers(borrowed: BorrowedModel, findings: Findings) -> Iterator[int]:
    """The model cut to layers of every kind; how many they are. One whose layers are in no list stays whole."""
    layers = borrowed.decoder_layers()
    if layers is None:
        yield len(findings.layout.layers)
        return
    rotations = [id(rotation) for rotation in findings.rotations]
    kinds = zip(findings.layout.layers, rotations, findings.windows, strict=True)
    count = layers_of_every_kind(layers, list(kinds))
    with first_layers(layers, count):
        yield count


@contextmanager
def _rotating(borrowed: BorrowedModel) -> Iterator[None]:
    """The model with its own rotation, also where it is taken out to serve."""
    deferred, borrowed.defers_rotation = borrowed.defers_rotation, False
    try:
        yield
    finally:
        borrowed.defers_rotation = deferred


@torch.inference_mode()
def check_modes(
    borrowed: BorrowedModel, structure: Structure, make_runner: RunnerFactory, layers: nn.ModuleList | None
) -> dict[ReuseMode, ModeCheck]:
    """What was measured for each mode, and whether it holds. Raises ``ModelRefused`` if EXACT does not."""
    findings, measured = structure.findings, measure(borrowed, structure, make_runner, layers)
    checks: dict[ReuseMode, ModeCheck] = {}
    for mode in ReuseMode:
        if mode not in measured:
            refusal = f"chunks of this model cannot be moved: {findings.rotation_refusal}"
            checks[mode] = ModeCheck(refusal=refusal)
        else:
            checks[mode] = replace(measured[mode], refusal=_refusal(measured[mode]))
    if checks[ReuseMode.EXACT].refusal:
        raise ModelRefused(f"model {borrowed.name} cannot be served exactly: {checks[ReuseMode.EXACT].refusal}")
    return checks


def measure(
    borrowed: BorrowedModel, structure: Structure, make_runner: RunnerFactory, layers: nn.ModuleList | None
) -> dict[ReuseMode, ModeCheck]:
    """What a check of each mode that the model's chunks allow gives. Raises ``ModelRefused``."""
    findings = structure.findings
    measured = {mode: ModeCheck(structure=error) for mode, error in structure.errors.items()}
    if findings.layout.dtype == "float32":  # what computes is what the structure was checked of
        check_isolation(borrowed, findings.limit.tokens, most=MOVED_MAX_DEEP)
        return measured
    return _measure_rounding(borrowed, findings, make_runner, layers, measured)


def _measure_rounding(
    borrowed: BorrowedModel,
    findings: Findings,
    make_runner: RunnerFactory,
    layers: nn.ModuleList | None,
    measured: dict[ReuseMode, ModeCheck],
) -> dict[ReuseMode, ModeCheck]:
    """R and the kernels' distance of each mode; a mode that fails is tried on other tokens before it is refused."""
    with upcast(borrowed, layers):
        check_isolation(borrowed, findings.limit.tokens, most=MOVED_MAX_DEEP)
    result = dict(measured)
    few = CHUNK_TOKENS_FEW if borrowed.device.type == "cpu" else CHUNK_TOKENS
    for seed in PROMPT_SEEDS:
        modes = [mode for mode, check in result.items() if check.rounding is None or _refusal(check)]
        if not modes:
            break
        prompts = check_prompts(_vocabulary(borrowed), findings.moved_limit.tokens, few, seed=seed)
        found = _rounding(borrowed, findings, make_runner, layers, modes, prompts)
        if borrowed.device.type == "cuda" and ReuseMode.EXACT in modes:  # elsewhere the structure's code computes it
            for prompt in window_prompts(_vocabulary(borrowed), findings.limit.tokens, findings.windows, seed=seed):
                more = _rounding(borrowed, findings, make_runner, layers, [ReuseMode.EXACT], (prompt,))
                found[ReuseMode.EXACT] = _worse(found[ReuseMode.EXACT], more[ReuseMode.EXACT])
        result |= {m: replace(measured[m], rounding=c.rounding, kernels=c.kernels) for m, c in found.items()}
    return result


def _rounding(
    borrowed: BorrowedModel,
    findings: Findings,
    make_runner: RunnerFactory,
    layers: nn.ModuleList | None,
    modes: Sequence[ReuseMode],
    prompts: Prompts,
) -> dict[ReuseMode, ModeCheck]:
    """R and the kernels' distance on some prompts."""
    eager = eager_logits(borrowed, modes, prompts, findings.limit.tokens)
    with upcast(borrowed, layers):
        exact = eager_logits(borrowed, modes, prompts, findings.limit.tokens)
    found: dict[ReuseMode, ModeCheck] = {}
    for mode, theirs, without in zip(modes, eager, exact, strict=True):
        watch = KernelWatch(findings)
        watched = watch.over(make_runner) if borrowed.device.type == "cuda" else make_runner
        ours = our_logits(findings.layout, borrowed.device, watched, mode, prompts)
        found[mode] = ModeCheck(rounding=rounding_ratio(ours, theirs, without), kernels=watch.worst)
    return found


def _worse(one: ModeCheck, other: ModeCheck) -> ModeCheck:
    """The one of two checks that does not hold, or the larger figures of both."""
    if _refusal(one) or _refusal(other):
        return one if _refusal(one) else other
    kernels = [check.kernels for check in (one, other) if check.kernels is not None]
    roundings = [check.rounding for check in (one, other) if check.rounding is not None]
    return replace(one, rounding=max(roundings, default=None), kernels=max(kernels, default=None))


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of logits (rows, vocabulary), in standard deviations of theirs over the vocabulary."""
    return float((ours - theirs).abs().max() / theirs.std(dim=-1).mean())


def rounding_ratio(ours: Tensor, eager: Tensor, exact: Tensor) -> float:
    """R: how far ours is from eager attention in the same dtype, in units of how far that is from float32.

    Both are rms over the vocabulary, and of the rows (rows, vocabulary) the middle one: where a router's choice hangs
    on a rounding, a row is ten times as far off as the others, in ours no more often than in eager attention.
    """
    apart, rounding = (_middle_row(x - eager) for x in (ours, exact))
    if rounding == 0.0:
        return 0.0 if apart == 0.0 else inf
    return apart / rounding


def _middle_row(difference: Tensor) -> float:
    rows = difference.pow(2).mean(dim=-1).sqrt().sort().values
    return float(rows[len(rows) // 2])


def _refusal(check: ModeCheck) -> str:
    """Why a mode does not hold; "" if it does. NaN does not."""
    if check.structure is not None and not check.structure <= STRUCTURE_MAX:
        return f"in float32 its logits differ from eager attention's by {check.structure:.2g} standard deviations"
    if check.kernels is not None and not check.kernels <= KERNEL_MAX:
        return f"a layer's attention is {check.kernels:.2g} times as far from float32 as rounding alone puts it"
    if check.rounding is not None and not check.rounding <= ROUNDING_MAX:
        return f"its logits differ from eager attention's by {check.rounding:.2g} times what {ROUNDING_NOTE}"
    return ""


def _vocabulary(borrowed: BorrowedModel) -> int:
    return int(borrowed.config.get_text_config().vocab_size)
