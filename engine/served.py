"""A model ready to be served: loaded, examined, named and checked against its own eager attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from chunk_store.key import ModelIdentity
from chunk_store.layout import KVLayout
from engine.check.forwards import PIECE_TOKENS, RunnerFactory
from engine.check.start import ModeCheck, check_modes, check_structure
from engine.device import current
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.identity import model_identity, numerics, weights_digest
from engine.model.limits import ContextLimit
from engine.model.probe import Findings, examine
from engine.reuse import ReuseMode
from engine.run.choice import choose_weights, make_runner, numerics_name
from engine.run.cuda.steps import StepLimits
from engine.run.cuda.weights import FusedWeights
from engine.run.protocol import WatchableRunner


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
    weights: FusedWeights | None = None  # merged, where ``run.choice`` found that the model can have them
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

    def make_runner(self, pool: PagedKVPool, **options: Any) -> WatchableRunner:
        """A runner over ``pool`` with this model's piece size; ``options`` as in ``run.choice.make_runner``."""
        return make_runner(pool, self.borrowed, self.findings, self.weights, piece_tokens=self.piece_tokens, **options)


def serve(borrowed: BorrowedModel, *, piece_tokens: int = 512) -> ServedModel:
    """Examines, names and checks a model; on CUDA its weights are merged where its family allows.

    Raises ``ModelRefused`` with the reason if it cannot be exact, ``AttentionUnavailable`` on CUDA without Triton.
    """
    with current(borrowed.device):
        return _serve(borrowed, piece_tokens)


def check_runners(borrowed: BorrowedModel, findings: Findings) -> tuple[FusedWeights | None, RunnerFactory]:
    """The merged weights, if the model has some, and small runners of the kind that will serve it, to check with."""
    weights = choose_weights(borrowed, findings)
    small: dict[str, Any] = {}
    if weights is not None:
        # Pieces of the check are longer than 8 rows and shorter, so both ways of computing them are checked.
        small = {"limits": StepLimits(rows=8, pairs=256, partials=512), "decode_buckets": (4,), "graphs": False}
    return weights, lambda pool: make_runner(pool, borrowed, findings, weights, piece_tokens=PIECE_TOKENS, **small)


def _serve(borrowed: BorrowedModel, piece_tokens: int) -> ServedModel:
    found = examine(borrowed)
    layers = borrowed.decoder_layers()
    structure = check_structure(borrowed, found)
    findings = structure.findings
    weights, make_small = check_runners(borrowed, findings)
    checks = check_modes(borrowed, structure, make_small, layers)
    if borrowed.device.type == "cuda":
        torch.cuda.empty_cache()  # the pool is sized by what is free
    refusals = {mode: check.refusal for mode, check in checks.items()}
    identity = _identity(borrowed, findings, weights, piece_tokens)
    return ServedModel(borrowed, findings, identity, refusals, piece_tokens, weights, checks)


def look_into(borrowed: BorrowedModel, *, piece_tokens: int = 512) -> ServedModel:
    """A model as ``serve`` names it, not checked: to see where one that is refused goes wrong, never to serve it.

    Raises as ``serve`` if its attention cannot be replaced at all.
    """
    findings = examine(borrowed)
    weights = choose_weights(borrowed, findings)
    return ServedModel(
        borrowed, findings, _identity(borrowed, findings, weights, piece_tokens), {}, piece_tokens, weights
    )


def _identity(
    borrowed: BorrowedModel, findings: Findings, weights: FusedWeights | None, piece_tokens: int
) -> ModelIdentity:
    text = numerics(borrowed.device, numerics_name(borrowed, findings, weights), piece_tokens)
    return model_identity(weights_digest(borrowed.module), borrowed.config, findings.layout, text)
