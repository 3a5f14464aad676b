"""The byte geometry of a KV entry: how many bytes each layer's K and V take, in which order.

    entry = layer 0 K | layer 0 V | layer 1 K | ... | layer L-1 V
    K     = (tokens, kv_heads, k_dim) in C order, V = (tokens, kv_heads, v_dim), elements of ``dtype``

Layers may differ (heads, widths), as some models do. The layout enters the model identity, so two
processes that agree on a key agree on the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LayerLayout:
    """One layer's KV heads and the widths of K and V in elements."""

    kv_heads: int
    k_dim: int
    v_dim: int

    def k_nbytes(self, tokens: int, dtype: str) -> int:
        return tokens * self.kv_heads * self.k_dim * DTYPE_BYTES[dtype]

    def v_nbytes(self, tokens: int, dtype: str) -> int:
        return tokens * self.kv_heads * self.v_dim * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class KVLayout:
    """All layers of one model. ``dtype`` is one of ``DTYPE_BYTES``."""

    dtype: str
    layers: tuple[LayerLayout, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype: {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}")

    def plane_nbytes(self, tokens: int) -> list[int]:
        """Sizes in bytes of an entry's planes in file order: K0, V0, K1, V1, ..."""
        return [tokens * nbytes for nbytes in self._token_nbytes]

    def nbytes(self, tokens: int) -> int:
        """Bytes of one entry's KV data for ``tokens`` tokens."""
        return tokens * sum(self._token_nbytes)

    @cached_property
    def _token_nbytes(self) -> tuple[int, ...]:
        """Bytes of one token in each plane."""
        width = DTYPE_BYTES[self.dtype]
        return tuple(layer.kv_heads * dim * width for layer in self.layers for dim in (layer.k_dim, layer.v_dim))

    def canonical(self) -> str:
        """A text that two equal layouts share; it enters the model identity and the entry header."""
        return self._canonical

    @cached_property
    def _canonical(self) -> str:
        layers = ";".join(f"{la.kv_heads},{la.k_dim},{la.v_dim}" for la in self.layers)
        return f"{self.dtype}:{layers}"

    @classmethod
    def from_canonical(cls, text: str) -> KVLayout:
        """Inverse of ``canonical``. Raises ``ValueError`` for anything else."""
        return _parse(text)


@lru_cache(maxsize=64)  # a store reads the same few layouts again and again
def _parse(text: str) -> KVLayout:
    dtype, _, layers = text.partition(":")
    triples = [tuple(int(n) for n in layer.split(",")) for layer in layers.split(";") if layer]
    return KVLayout(dtype, tuple(LayerLayout(*triple) for triple in triples))
