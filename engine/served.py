"""A model ready to be served: loaded, examined, named and checked against its own eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from chunk_store.key import ModelIdentity
from chunk_store.layout import KVLayout
from engine.check.borrowed_rows import check_rows_of
from engine.check.company import rows_stand_alone
from engine.check.forwards import PIECE_TOKENS, RunnerFactory
from engine.check.rows import RowBits, check_rows
from engine.check.start import ModeCheck, check_modes, check_structure
from engine.device import current
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.identity import model_identity, numerics, weights_digest
from engine.model.limits import ContextLimit
from engine.model.probe import Findings, examine
from engine.reuse import ReuseMode
from engine.run.backends import AUTO, Decision
from engine.run.choice import Weights, choose_weights, decide_and_try, make_runner, numerics_name
from engine.run.cuda.borrowed import CapturedModel
from engine.run.cuda.products import settings, use_stable_products
from engine.run.cuda.steps import StepLimits
from engine.run.protocol import WatchableRunner
from engine.sight import Sight

CHECK_LONG_CHUNK = 16  # of the runner to check with; the check's chunks have up to 18 tokens


@dataclass(frozen=True)
class ServedModel:
    """A borrowed model with everything that was found out about it.

    ``checks[mode]`` is what the start check measured; ``refusals[mode]`` is "" for a mode that holds, otherwise
    why it is not offered. ``row_bits`` is what was found out about the products of the merged weights, None where
    there are none: then nothing is promised about steps of different numbers of rows. ``rows_stand_alone``: in steps of
    one number of rows a row's bits do not depend on the others. ``decision`` is what runs it.
    """

    borrowed: BorrowedModel
    findings: Findings
    identity: ModelIdentity
    refusals: dict[ReuseMode, str]
    piece_tokens: int
    decision: Decision
    weights: Weights | None = (
        None  # merged, or the model's own code to be captured, where ``run.choice`` found that the model can have them
    )
    checks: dict[ReuseMode, ModeCheck] = field(default_factory=dict)
    row_bits: RowBits | None = None
    rows_stand_alone: bool = True

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
    def sight(self) -> Sight:
        """What rows can see, in whichever layer."""
        return Sight.of(self.findings.windows)

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
        if self.row_bits is not None and not self.row_bits.equal:
            options.setdefault("row_buckets", self.row_bits.buckets)
            if isinstance(self.weights, CapturedModel):
                options.setdefault("together", False)
        options |= {
            "piece_tokens": self.piece_tokens,
            "attention": self.decision.attention,
            "pieces": self.decision.pieces,
        }
        return make_runner(pool, self.borrowed, self.findings, self.weights, **options)


def serve(borrowed: BorrowedModel, *, piece_tokens: int = 512, attention: str = AUTO) -> ServedModel:
    """Examines, names and checks a model; on CUDA its weights are merged where its family allows.

    ``attention`` is one of ``engine.run.backends.ATTENTIONS``. Raises ``ModelRefused`` with the reason if the model
    cannot be exact, ``AttentionRefused`` for a backend that cannot serve it, and on CUDA without Triton.
    """
    with current(borrowed.device):
        return _serve(borrowed, piece_tokens, attention)


def check_runners(
    borrowed: BorrowedModel, findings: Findings, weights: Weights | None, decision: Decision
) -> RunnerFactory:
    """Small runners of the kind that will serve the model, to check with."""
    small: dict[str, Any] = chosen(decision)
    if weights is not None:
        # One of the check's chunks is long enough for pieces of its own, so both ways of computing them are checked.
        limits = StepLimits(pairs=256, partials=512)
        small |= {"slots": 2, "rows_max": 8, "long_chunk": CHECK_LONG_CHUNK, "limits": limits, "graphs": False}
    return lambda pool: make_runner(pool, borrowed, findings, weights, piece_tokens=PIECE_TOKENS, **small)


def chosen(decision: Decision) -> dict[str, str]:
    """The options of a runner that are decided, not given."""
    return {"attention": decision.attention, "pieces": decision.pieces}


def _serve(borrowed: BorrowedModel, piece_tokens: int, attention: str) -> ServedModel:
    use_stable_products_on(borrowed.device)
    with _refusing(borrowed):
        found = examine(borrowed)
        layers = borrowed.decoder_layers()
        structure = check_structure(borrowed, found)
    findings = structure.findings
    decision = decide_and_try(borrowed, findings, attention)
    weights, row_bits = checked_weights(borrowed, findings, decision)
    checks = check_modes(borrowed, structure, check_runners(borrowed, findings, weights, decision), layers)
    if borrowed.device.type == "cuda":
        torch.cuda.empty_cache()  # the pool is sized by what is free
    refusals = {mode: check.refusal for mode, check in checks.items()}
    identity = _identity(borrowed, findings, decision, row_bits, piece_tokens)
    apart = row_bits is not None or rows_stand_alone(borrowed, findings, layers)
    return ServedModel(borrowed, findings, identity, refusals, piece_tokens, decision, weights, checks, row_bits, apart)


@contextmanager
def _refusing(borrowed: BorrowedModel) -> Iterator[None]:
    """What modelling code raises in forwards as ours are, for example that it needs a cache, refuses the model."""
    try:
        yield
    except (ModelRefused, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelRefused(
            f"model {borrowed.name} cannot be served: its forward fails on packed rows without a cache "
            f"({type(error).__name__}: {error})"
        ) from error


def look_into(borrowed: BorrowedModel, *, piece_tokens: int = 512, attention: str = AUTO) -> ServedModel:
    """A model as ``serve`` names it, not checked: to see where one that is refused goes wrong, never to serve it.

    Raises as ``serve`` if its attention cannot be replaced at all.
    """
    use_stable_products_on(borrowed.device)
    findings = examine(borrowed)
    decision = decide_and_try(borrowed, findings, attention)
    weights, row_bits = checked_weights(borrowed, findings, decision)
    identity = _identity(borrowed, findings, decision, row_bits, piece_tokens)
    return ServedModel(borrowed, findings, identity, {}, piece_tokens, decision, weights, row_bits=row_bits)


def checked_weights(
    borrowed: BorrowedModel, findings: Findings, decision: Decision
) -> tuple[Weights | None, RowBits | None]:
    """What packed steps run, if the model has them, to be multiplied as the check of rows found."""
    weights = choose_weights(borrowed, findings, decision)
    if weights is None:
        return None, None
    if isinstance(weights, CapturedModel):
        return check_rows_of(weights)
    row_bits = check_rows(weights)
    return replace(weights, ways=row_bits.ways), row_bits


def use_stable_products_on(device: torch.device) -> None:
    """Before anything is computed there. Who starts a process does it earlier, and says what an operator set."""
    if device.type == "cuda":
        use_stable_products()


def _identity(
    borrowed: BorrowedModel,
    findings: Findings,
    decision: Decision,
    row_bits: RowBits | None,
    piece_tokens: int,
) -> ModelIdentity:
    computed = [numerics_name(decision)]
    if borrowed.device.type == "cuda":
        computed.append(settings())
    if row_bits is not None:
        computed.append(row_bits.numerics)
    text = numerics(borrowed.device, " ".join(computed), piece_tokens)
    return model_identity(weights_digest(borrowed.module), borrowed.config, findings.layout, text)
