"""What runs forwards: a step goes in, a pending step comes out.

Caching is memoising one fixed computation, so what runs is fixed too: a chunk or a prompt's tail is one sequence's
pieces, never packed with another request's; a decode step is one row a sequence, padded to a bucket. A runner does not
know requests, keys or stores. One thread begins steps; other threads may fill pages that no step reads or writes.
``choice`` makes the runner that fits a model; ``pieces`` cuts chunks and tails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from engine.attention import Attention
from engine.kv.pool import PagedKVPool
from engine.plan import CascadePlan, StepSequence

LayerWatch = Callable[[int, Tensor], None]  # layer, what it hands on (rows, width)


class PendingStep(Protocol):
    """A step that may still run on the device."""

    @property
    def plan(self) -> CascadePlan:
        """What the step reads and where its rows stand, without padding."""
        ...

    def wait(self) -> list[int]:
        """The token of largest logit of every decoded row, or of a piece's last row."""
        ...

    def logits(self) -> Tensor:
        """Logits (rows, vocabulary) fp32 on the device, of the same rows; the caller's to keep.

        To be asked for before the runner's next step. ``RuntimeError`` if they are gone, or never were wanted.
        """
        ...


class Runner(Protocol):
    """Forwards over one pool.

    ``piece_tokens`` is the most tokens of a piece. ``runs_ahead``: steps go on while the host does something else, so
    that waiting for one after the next has begun costs nothing; otherwise a step is over when it has begun.
    """

    @property
    def pool(self) -> PagedKVPool: ...

    @property
    def piece_tokens(self) -> int: ...

    @property
    def runs_ahead(self) -> bool: ...

    def prepare(self) -> None:
        """Makes ready what the first forwards would otherwise wait for."""
        ...

    def prefill(self, token_ids: Sequence[int], sequence: StepSequence, *, logits: bool = True) -> PendingStep:
        """Begins a piece: ``sequence.rows`` tokens of one sequence. Without ``logits`` its keys and values are all.

        Raises ``ValueError`` for another number of tokens, or more than ``piece_tokens``.
        """
        ...

    def decode(self, sources: Sequence[int], sequences: Sequence[StepSequence]) -> PendingStep:
        """Begins a step of one row for each sequence.

        ``sources[i]`` is a token id, or ``~row`` for the token that ``wait`` gives for that row of the step before
        this one, a decode step too, whether it was waited for or not. Raises ``ValueError`` for other sources, and
        for more sequences than the largest bucket.
        """
        ...


class AttentionWatch(Protocol):
    """Sees every attention call of a runner."""

    def around(self, attention: Attention[Any]) -> Attention[Any]:
        """What a runner with a backend calls in its place."""
        ...

    def after(self, plan: CascadePlan, layer: int, q: Tensor, out: Tensor, scaling: float) -> None:
        """Called by a runner without a backend: ``q`` before rotation and ``out`` (rows, heads, dim)."""
        ...


class WatchableRunner(Runner, Protocol):
    """A runner that checks look into."""

    def watch_attention(self, watch: AttentionWatch) -> None:
        """Has ``watch`` see all attention from now on. Raises ``ValueError`` if steps are captured."""
        ...

    def watching_layers(self, watch: LayerWatch) -> AbstractContextManager[None]:
        """``watch`` is called with what each layer hands on within the block, as far as layers are seen."""
        ...


@dataclass(frozen=True)
class LogitsStep:
    """A pending step whose logits (rows, vocabulary) fp32 are in memory of its own."""

    plan: CascadePlan
    own_logits: Tensor | None

    def wait(self) -> list[int]:
        ids: list[int] = self.logits().argmax(dim=-1).tolist()
        return ids

    def logits(self) -> Tensor:
        if self.own_logits is None:
            raise RuntimeError("logits: the piece was begun without them")
        return self.own_logits
