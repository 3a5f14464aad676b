"""A model ready to be served: loaded, examined, named and checked against its own eager attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from chunk_store.key import ModelIdentity
from chunk_store.layout import KVLayout
from engine.attention import Attention
from engine.check.forwards import PIECE_TOKENS, RunnerFactory
from engine.check.precision import decoder_layers
from engine.check.start import ModeCheck, check_modes, check_structure
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.identity import model_identity, numerics, weights_digest
from engine.model.limits import ContextLimit
from engine.model.probe import Findings, examine
from engine.reuse import ReuseMode
from engine.run.cuda.attention import CudaAttention, cascade_refusal
from engine.run.cuda.cascade.attention import AttentionUnavailable
from engine.run.cuda.runner import FusedRunner
from engine.run.cuda.steps import StepLimits
from engine.run.cuda.weights import FusedWeights, fused_refusal, merge_weights
from engine.run.device import current
from engine.run.eager.attention import TorchAttention
from engine.run.eager.runner import ModelRunner

CUDA_PAGE_SIZES = (16, 32, 64)  # a page is one copy of the bulk copy engine, a block of 64 tokens whole pages


@dataclass(frozen=True)
class ServedModel:
    """A borrowed model with everything that was found out about it.

    ``checks[mode]`` is what the start check measured; ``refusals[mode]`` is "" for a mode that holds, otherwise
    why it is not offered.
    """

    borrowed: BorrowedModel
    findings: Findings
    identity: ModelIdentity
    refusals: dict[ReuseMode, str]
    piece_tokens: int
    fused: FusedWeights | None = None  # on CUDA, for the families that ``fused_refusal`` lets pass
    checks: dict[ReuseMode, ModeCheck] = field(default_factory=dict)

    @property
    def layout(self) -> KVLayout:
        return self.findings.layout

    @property
    def context_length_max(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.findings.context_length_max

    def limit(self, mode: ReuseMode = ReuseMode.EXACT) -> ContextLimit:
        """The longest context in a mode, with the reason if it is less than the model's configuration names."""
        return self.findings.limit if mode is ReuseMode.EXACT else self.findings.moved_limit

    @property
    def vocabulary(self) -> int:
        return int(self.borrowed.config.get_text_config().vocab_size)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer, from the generation configuration, else the model's."""
        generation = getattr(self.borrowed.module, "generation_config", None)
        eos = getattr(generation, "eos_token_id", None)
        if eos is None:
            eos = self.borrowed.config.get_text_config().eos_token_id
        if eos is None:
            return frozenset()
        return frozenset([eos] if isinstance(eos, int) else eos)

    def make_runner(self, pool: PagedKVPool, **options: Any) -> ModelRunner:
        """A runner over ``pool`` with this model's piece size; ``options`` as in ``ModelRunner``."""
        with current(pool.device):
            return _make_runner(
                self.borrowed, self.findings, self.fused, pool, piece_tokens=self.piece_tokens, **options
            )


def _make_runner(
    borrowed: BorrowedModel, findings: Findings, fused: FusedWeights | None, pool: PagedKVPool, **options: Any
) -> ModelRunner:
    attention = make_attention(pool, borrowed, findings)
    if fused is None:
        return ModelRunner(borrowed, pool, attention, **options)
    return FusedRunner(borrowed, fused, pool, attention, positions=findings.context_length_max, **options)


def make_attention(pool: PagedKVPool, borrowed: BorrowedModel, findings: Findings) -> Attention[Any]:
    """The attention backend for the pool's device. Raises ``ValueError`` for pages it cannot read."""
    heads = int(borrowed.config.get_text_config().num_attention_heads)
    if pool.device.type != "cuda" or cascade_refusal(findings, heads):
        return TorchAttention(pool, findings.rotations, deferred=findings.deferred)
    if pool.page_size not in CUDA_PAGE_SIZES:
        raise ValueError(f"page-size: {pool.page_size} is none of {CUDA_PAGE_SIZES}, which CUDA needs")
    return CudaAttention(pool, findings.rotations, heads=heads, positions=findings.context_length_max)


def _numerics_name(borrowed: BorrowedModel, findings: Findings, fused: FusedWeights | None) -> str:
    """What computes, for the model identity: another way of computing rounds otherwise."""
    heads = int(borrowed.config.get_text_config().num_attention_heads)
    if borrowed.device.type != "cuda" or cascade_refusal(findings, heads):
        return TorchAttention.name
    return CudaAttention.name if fused is None else f"{FusedRunner.name} {CudaAttention.name}"


def _check_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise AttentionUnavailable("device cuda needs Triton: pip install 'cairn[gpu]'") from error


def serve(borrowed: BorrowedModel, *, piece_tokens: int = 512) -> ServedModel:
    """Examines, names and checks a model; on CUDA its weights are merged where its family allows.

    Raises ``ModelRefused`` with the reason if it cannot be exact, ``AttentionUnavailable`` on CUDA without Triton.
    """
    with current(borrowed.device):
        return _serve(borrowed, piece_tokens)


def check_runners(borrowed: BorrowedModel, findings: Findings) -> tuple[FusedWeights | None, RunnerFactory]:
    """The merged weights, if the model has some, and small runners of the kind that will serve it, to check with."""
    fused = _merged(borrowed, findings)
    small: dict[str, Any] = {}
    if fused is not None:
        # Pieces of the check are longer than 8 rows and shorter, so both ways of computing them are checked.
        small = {"limits": StepLimits(rows=8, pairs=256, partials=512), "decode_buckets": (4,), "graphs": False}

    def make_runner(pool: PagedKVPool) -> ModelRunner:
        return _make_runner(borrowed, findings, fused, pool, piece_tokens=PIECE_TOKENS, **small)

    return fused, make_runner


def _serve(borrowed: BorrowedModel, piece_tokens: int) -> ServedModel:
    found = examine(borrowed)
    layers = decoder_layers(borrowed)
    structure = check_structure(borrowed, found)
    findings = structure.findings
    fused, make_runner = check_runners(borrowed, findings)
    checks = check_modes(borrowed, structure, make_runner, layers)
    if borrowed.device.type == "cuda":
        torch.cuda.empty_cache()  # the pool is sized by what is free
    refusals = {mode: check.refusal for mode, check in checks.items()}
    identity = _identity(borrowed, findings, fused, piece_tokens)
    return ServedModel(borrowed, findings, identity, refusals, piece_tokens, fused, checks)


def look_into(borrowed: BorrowedModel, *, piece_tokens: int = 512) -> ServedModel:
    """A model as ``serve`` names it, not checked: to see where one that is refused goes wrong, never to serve it.

    Raises as ``serve`` if its attention cannot be replaced at all.
    """
    findings = examine(borrowed)
    fused = _merged(borrowed, findings)
    return ServedModel(borrowed, findings, _identity(borrowed, findings, fused, piece_tokens), {}, piece_tokens, fused)


def _merged(borrowed: BorrowedModel, findings: Findings) -> FusedWeights | None:
    """Merged weights on CUDA, for the families that have them."""
    if borrowed.device.type != "cuda":
        return None
    _check_triton()
    return None if fused_refusal(borrowed, findings) else merge_weights(borrowed, findings)


def _identity(
    borrowed: BorrowedModel, findings: Findings, fused: FusedWeights | None, piece_tokens: int
) -> ModelIdentity:
    text = numerics(borrowed.device, _numerics_name(borrowed, findings, fused), piece_tokens)
    return model_identity(weights_digest(borrowed.module), borrowed.config, findings.layout, text)
