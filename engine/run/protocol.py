"""What runs forwards: a step goes in, a pending step comes out.

Caching is memoising one fixed computation, so a row's bits must not depend on what else runs. Where they follow from
the row alone, whatever it is packed with (``Runner.alone`` is False), rows of many requests share a step: those that
decode, slices of prompts, slices of chunks. Elsewhere a chunk or a prompt's tail is computed in pieces of its own, cut
at multiples of ``piece_tokens``, and a step of rows that decode is one row a sequence.

A runner does not know requests, keys or stores. It keeps sampling state by slot: ``open`` says how a sequence's tokens
are drawn, and the token that was last drawn in a slot can be a row's input before the host has read it. One thread
begins steps; other threads may fill pages that no step reads or writes. ``choice`` makes the runner that fits a model;
``pieces`` cuts chunks and tails; ``room`` says what a packed step can take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from engine.attention import Attention, Scores
from engine.kv.pool import PagedKVPool
from engine.plan import CascadePlan, StepSequence
from engine.run.room import StepRoom
from engine.sampling.params import Choice, Draw, SamplingRequest, Scored
from engine.sampling.scoring import PendingScores
from engine.sampling.shaping import Bits

LayerWatch = Callable[[int, Tensor], None]  # layer, what it hands on (rows, width)


@dataclass(frozen=True)
class StepRows:
    """One sequence's rows of a step.

    ``sources``, one for each row, are a token id, or ``~slot`` for the token that was last drawn in that slot.
    ``draw``: the token behind the last row; None where keys and values are all that is wanted. ``also``: tokens that
    are drawn from the same row in other slots, the first ones of other answers. ``alone``: a piece of its own forward
    (see ``Runner.alone``). ``scored``: given tokens whose log-probabilities are wanted; in a packed step their rows and
    its draws are at most as many as there are slots.
    """

    sequence: StepSequence
    sources: Sequence[int]
    draw: Draw | None = None
    alone: bool = False
    also: tuple[Draw, ...] = ()
    scored: Scored | None = None

    @property
    def draws(self) -> tuple[Draw, ...]:
        """All that is drawn from the last row."""
        return () if self.draw is None else (self.draw, *self.also)


class PendingStep(Protocol):
    """A step that may still run on the device."""

    @property
    def plan(self) -> CascadePlan:
        """What the step reads and where its rows stand, in the order of the batch, without padding."""
        ...

    def wait(self) -> list[Choice]:
        """Waits until the step is over: the token of each of its draws, in order.

        A ``token_id`` of -1 says that the model gave no number to choose by; what a later row takes from that slot is
        some token of the vocabulary.
        """
        ...

    def draw(self, bitmasks: Bits) -> None:
        """Draws the tokens of a step that waits for it, because some of its draws are of masked slots.

        ``bitmasks`` are those that ``Runner.bitmasks`` gave, filled: a row for each of these draws, in order. To be
        called once, before the runner's next step and before ``wait``; other steps have drawn when they began.
        """
        ...

    def logits(self) -> Tensor:
        """Logits (draws, vocabulary) fp32 on the device, as the model gave them; the caller's to keep.

        To be asked for before the runner's next step, ``RuntimeError`` if they are gone.
        """
        ...

    def scores(self) -> list[Choice]:
        """Waits as ``wait``: what was wanted of tokens that are ``scored``, in the order of the batch."""
        ...


class Runner(Protocol):
    """Forwards over one pool.

    ``piece_tokens`` is the most rows of a piece that runs alone. ``runs_ahead``: steps go on while the host does
    something else, so that waiting for one after the next has begun costs nothing; otherwise a step is over when it
    has begun. Sampling ``slots`` are 0 .. ``slots`` - 1.
    """

    @property
    def pool(self) -> PagedKVPool: ...

    @property
    def piece_tokens(self) -> int: ...

    @property
    def runs_ahead(self) -> bool: ...

    @property
    def slots(self) -> int: ...

    def prepare(self) -> None:
        """Makes ready what the first forwards would otherwise wait for."""
        ...

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        """Whether a chunk, or a prompt's tail, of so many tokens in all is computed in pieces of its own.

        They are cut at multiples of ``piece_tokens`` from its start; otherwise its rows go into any step, cut anywhere.
        """
        ...

    def room(self, *, decoding: bool) -> StepRoom:
        """What the next packed step can take; ``decoding``: somebody waits for a token meanwhile."""
        ...

    def open(self, slot: int, request: SamplingRequest) -> None:
        """How the tokens of a slot are drawn from now on, before its first draw; replaces what was there."""
        ...

    def bitmasks(self, count: int) -> Bits:
        """Room for what ``count`` masked draws of the next step are told: (count, ceil(vocabulary / 32)) int32.

        Which tokens may come, the lowest bit first; undefined at first. May be filled while the step runs.
        """
        ...

    def begin(self, batch: Sequence[StepRows]) -> PendingStep:
        """Begins a step: either one ``StepRows`` that is alone, or any number that are not, within a room.

        If a draw is of a slot that was opened as masked, the forward alone is begun: see ``PendingStep.draw``.
        Raises ``ValueError`` for anything else, such as another number of sources than rows.
        """
        ...


class AttentionWatch(Protocol):
    """Sees every attention call of a runner."""

    def around(self, attention: Attention[Any]) -> Attention[Any]:
        """What a runner with a backend calls in its place."""
        ...

    def after(self, plan: CascadePlan, layer: int, q: Tensor, out: Tensor, scores: Scores, turned: bool) -> None:
        """Called by a runner without a backend: ``q`` and ``out`` (rows, heads, dim).

        ``turned``: queries stand at their positions; otherwise they are as before rotation.
        """
        ...


class WatchableRunner(Runner, Protocol):
    """A runner that checks look into."""

    def watch_attention(self, watch: AttentionWatch) -> None:
        """Has ``watch`` see all attention from now on. Raises ``ValueError`` if steps are captured."""
        ...

    def watching_layers(self, watch: LayerWatch) -> AbstractContextManager[None]:
        """``watch`` is called with what each layer hands on within the block, as far as layers are seen."""
        ...


@dataclass
class DrawnStep:
    """A step that is over: its logits (draws, vocabulary) fp32 are in memory of its own.

    ``make``: draws its tokens by what masked draws are told, while they are not drawn.
    """

    plan: CascadePlan
    own_logits: Tensor
    choices: Sequence[Choice] = ()
    make: Callable[[Bits], Sequence[Choice]] | None = None
    scored: Sequence[PendingScores] = ()

    def draw(self, bitmasks: Bits) -> None:
        if self.make is None:
            raise RuntimeError("draw: the step has drawn when it began")
        self.choices, self.make = self.make(bitmasks), None

    def wait(self) -> list[Choice]:
        if self.make is not None:
            raise RuntimeError("wait: the step was not told which tokens may come")
        return list(self.choices)

    def logits(self) -> Tensor:
        return self.own_logits

    def scores(self) -> list[Choice]:
        return [choice for each in self.scored for choice in each.wait()]
