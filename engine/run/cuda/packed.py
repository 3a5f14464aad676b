"""What packed steps need of a model's forward: fused layers of ours, or the model's own code on tensors that stay.

A forward works on rows that lie where they always lie, and launches the same kernels whenever it has as many rows, so
that it can be captured. Attention is the caller's: it is called once a layer, as ``AttentionCall`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.plan import Window
from engine.run.cuda.cascade.tuning import RotationTable

# layer, queries (rows, heads, dim; rows strided), the same turned to their positions, out (rows, heads, dim)
Attend = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class AttentionCall:
    """How a layer attends: ``rotation`` turns its queries, which come ``turned`` to their positions or raw."""

    scores: Scores
    rotation: RotationTable | None
    turned: bool

    @property
    def options(self) -> dict[str, Any]:
        """As ``LayerWorks.launch`` takes them."""
        more = {"softcap": self.scores.softcap, "sinks": self.scores.sinks}
        asked = {name: value for name, value in more.items() if value is not None}
        return {"scaling": self.scores.scaling, "rotation": self.rotation, "turned": self.turned, **asked}


class RowInputs(Protocol):
    """Inputs of up to so many rows, int32 each, and whatever else a forward keeps for them.

    ``sources`` are token ids, or ~slot of the token last drawn there.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def sources(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def slots(self) -> Tensor: ...

    def first(self, rows: int) -> Self:
        """Views of the first ``rows`` rows."""
        ...


class RowOutputs(Protocol):
    """Of which ``rows`` (draws,) of a step logits (draws, vocabulary) are wanted, and where they go."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def rows(self) -> Tensor: ...

    @property
    def logits(self) -> Tensor: ...

    def first(self, draws: int) -> Self:
        """Views of the first ``draws``."""
        ...


InputsT = TypeVar("InputsT", bound=RowInputs)
OutputsT = TypeVar("OutputsT", bound=RowOutputs)


class Forward(Protocol[InputsT, OutputsT]):
    """Forwards of one model over one pool.

    ``name`` enters the model identity. ``piece_refusal`` is why library attention cannot compute long pieces, "" if it
    can. ``watch`` is called with what a layer hands on; not in a graph.
    """

    name: str
    watch: Callable[[int, Tensor], None] | None

    @property
    def pool(self) -> PagedKVPool: ...

    @property
    def heads(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def windows(self) -> Sequence[Window | None]:
        """Of each layer."""
        ...

    @property
    def piece_refusal(self) -> str: ...

    def call(self, layer: int) -> AttentionCall: ...

    def inputs(self, rows: int) -> InputsT:
        """Made for up to ``rows`` rows."""
        ...

    def outputs(self, rows: Tensor) -> OutputsT:
        """Made for as many rows as the index ``rows`` (draws,) int32 has."""
        ...

    def layers(self, b: InputsT, last: Tensor, attend: Attend, *, turn: bool, drawn: Iterable[OutputsT]) -> None:
        """All layers over the rows of ``b``, as many as its sources; K and V go to the slots.

        ``last`` (slots,) int32 holds the tokens that negative sources name. ``attend`` is called with turned queries if
        ``turn``. The logits of each of ``drawn`` are written, one behind the other; without any none are computed.
        """
        ...


@dataclass(frozen=True)
class PlainInputs:
    """``RowInputs`` with nothing beside them."""

    sources: Tensor
    positions: Tensor
    slots: Tensor

    @classmethod
    def of(cls, rows: int, device: torch.device) -> PlainInputs:
        return cls(*torch.zeros(3, rows, dtype=torch.int32, device=device))

    def first(self, rows: int) -> PlainInputs:
        return PlainInputs(self.sources[:rows], self.positions[:rows], self.slots[:rows])


@dataclass(frozen=True)
class PlainOutputs:
    """``RowOutputs`` with nothing beside them."""

    rows: Tensor
    logits: Tensor = field(repr=False)

    def first(self, draws: int) -> PlainOutputs:
        return PlainOutputs(self.rows[:draws], self.logits[:draws])
