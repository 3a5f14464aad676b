"""What rows of a model can see at all, in whichever layer: what lies before it no row to come needs.

Where every layer has a window, that bounds what a sequence keeps however long it gets. Where one layer sees
everything, everything is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.plan import Window


@dataclass(frozen=True)
class Sight:
    """The windows of a model's layers, each once; none if some layer sees everything."""

    windows: tuple[Window, ...] = ()

    @classmethod
    def of(cls, layers: Iterable[Window | None]) -> Sight:
        """Of each layer's window."""
        found = dict.fromkeys(layers)
        return cls(tuple(window for window in found if window is not None)) if None not in found else cls()

    @property
    def is_limited(self) -> bool:
        return bool(self.windows)

    @property
    def tokens(self) -> int:
        """The most tokens that a row sees, its own among them. Only where ``is_limited``."""
        return max(window.tokens for window in self.windows)

    def first(self, position: int) -> int:
        """The first position that a row at ``position``, or one behind it, sees in some layer."""
        return min((window.first(position) for window in self.windows), default=0)


EVERYTHING = Sight()
