"""A model ready to be served: loaded, examined, named and checked against its own eager attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunk_store.key import ModelIdentity
from chunk_store.layout import KVLayout
from engine.attention import Attention
from engine.attention.torch_attention import TorchAttention
from engine.identity import model_identity, numerics, weights_digest
from engine.model import BorrowedModel
from engine.pool import PagedKVPool
from engine.probe import Findings, examine
from engine.reuse import ReuseMode
from engine.runner import ModelRunner
from engine.selfcheck import check_modes


@dataclass(frozen=True)
class ServedModel:
    """A borrowed model with everything that was found out about it.

    ``refusals[mode]`` is "" for a mode that holds, otherwise why it is not offered.
    """

    borrowed: BorrowedModel
    findings: Findings
    identity: ModelIdentity
    refusals: dict[ReuseMode, str]
    piece_tokens: int

    @property
    def layout(self) -> KVLayout:
        return self.findings.layout

    @property
    def context_length_max(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.findings.context_length_max

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
        attention = make_attention(pool, self.findings)
        return ModelRunner(self.borrowed, pool, attention, piece_tokens=self.piece_tokens, **options)


def make_attention(pool: PagedKVPool, findings: Findings) -> Attention[Any]:
    """The attention backend for the pool's device."""
    return TorchAttention(pool, findings.rotations, deferred=findings.deferred)


def serve(borrowed: BorrowedModel, *, piece_tokens: int = 512) -> ServedModel:
    """Examines, names and checks a model. Raises ``ModelRefused`` with the reason if it cannot be exact."""
    findings = examine(borrowed)
    refusals = check_modes(borrowed, findings, lambda pool: make_attention(pool, findings))
    text = numerics(borrowed.device, TorchAttention.name, piece_tokens)
    identity = model_identity(weights_digest(borrowed.module), borrowed.config, findings.layout, text)
    return ServedModel(borrowed, findings, identity, refusals, piece_tokens)
