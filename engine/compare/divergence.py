"""Where two ways of answering one request part: differences of K, V and hidden states by layer and token.

A difference is the largest of a token's elements, in units of that token's own root mean square (of the second trace,
at least a tenth of the layer's median, so that a token whose values are almost zero does not fill the picture).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compare.trace import Trace

KINDS = ("K", "V", "hidden")  # in the order in which a layer makes them
# Of the same computation in another order of sums, by the dtype of KV.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}
SMALLEST_SCALE = 0.1


@dataclass(frozen=True)
class Place:
    """One layer's K, V or hidden state of one token."""

    kind: str
    layer: int
    token: int
    difference: float


@dataclass(frozen=True)
class Divergence:
    """``differences[kind]`` is (layers, tokens) fp32: NaN where one side has nothing, inf where one is not finite.

    ``logits`` is the largest difference of the last token's logits in standard deviations, ``likeliest`` the token
    that each side would choose next.
    """

    differences: dict[str, Tensor]
    logits: float
    likeliest: tuple[int, int]

    def first(self, tolerance: float) -> Place | None:
        """The first place beyond ``tolerance``: lowest layer, in it K, V, then hidden, of these the first token."""
        layers = len(self.differences["K"])
        for layer in range(layers):
            for kind in KINDS:
                beyond = (self.differences[kind][layer] > tolerance).nonzero()
                if len(beyond):
                    token = int(beyond[0])
                    return Place(kind, layer, token, float(self.differences[kind][layer, token]))
        return None

    def largest(self, kind: str, layer: int, tokens: slice = slice(None)) -> Place | None:
        """The largest difference of a layer among ``tokens``; None if nothing there can be compared."""
        row = self.differences[kind][layer, tokens]
        if bool(row.isnan().all()):
            return None
        place = int(torch.where(row.isnan(), -1.0, row).argmax())
        return Place(kind, layer, (tokens.start or 0) + place, float(row[place]))

    def beyond(self, tolerance: float) -> int:
        """How many places are beyond ``tolerance``."""
        return sum(int((grid > tolerance).sum()) for grid in self.differences.values())


def compare(a: Trace, b: Trace) -> Divergence:
    """The differences of two traces of one composition. Raises ``ValueError`` if their shapes differ."""
    both = a.seen & b.seen
    sides = {"K": (a.keys, b.keys), "V": (a.values, b.values), "hidden": (a.hidden, b.hidden)}
    everywhere = torch.ones_like(both[0])
    nothing = torch.full(both.shape, float("nan"))
    differences = {
        kind: torch.stack(
            [
                _difference(x, y, both[layer] if kind == "hidden" else everywhere, f"{kind} of layer {layer}")
                for layer, (x, y) in enumerate(zip(*pair, strict=True))
            ]
        )
        if all(pair)
        else nothing
        for kind, pair in sides.items()
    }
    spread = b.logits.std().clamp_min(1e-30)
    logits = float(torch.nan_to_num((a.logits - b.logits).abs() / spread, nan=float("inf")).max())
    return Divergence(differences, logits, (int(a.logits.argmax()), int(b.logits.argmax())))


def _difference(x: Tensor, y: Tensor, seen: Tensor, name: str) -> Tensor:
    """Of each token's elements: x and y (tokens, ...), result (tokens,)."""
    if not bool(seen.any()):
        return torch.full((len(seen),), float("nan"))
    if x.shape != y.shape:
        raise ValueError(f"{name}: {tuple(x.shape)} on one side, {tuple(y.shape)} on the other")
    x, y = x.flatten(1), y.flatten(1)
    own = y.square().mean(dim=1).sqrt()
    scale = torch.maximum(own, SMALLEST_SCALE * own[seen].median()).clamp_min(1e-30)
    found = torch.nan_to_num((x - y).abs().amax(dim=1) / scale, nan=float("inf"))
    return torch.where(seen, found, torch.nan)
