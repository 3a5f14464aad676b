"""Capacity arithmetic: bytes a token, entries that fit, the network a time to first token needs. Numbers only.

    bytes a token      = sum over layers of kv_heads * (k_dim + v_dim) * bytes an element
    bytes of an entry  = tokens * bytes a token + header (4096 and up)
    bytes of a store   = documents * contexts a document * bytes of an entry
    network for a TTFT = tokens loaded * bytes a token / seconds allowed for loading
    worth loading      when the network is faster than bytes a token * prefill tokens a second

This module knows no model and no store; the geometry of a model comes as a ``KVLayout``.
"""

from __future__ import annotations

from dataclasses import dataclass

from chunk_store.format.header import ALIGN_NBYTES, BLOCK_NBYTES, block_count
from chunk_store.layout import KVLayout

HEADER_FIXED_NBYTES = 400  # names, lengths and prefix of a header; tokens, context and checksums come on top


@dataclass(frozen=True)
class Workload:
    """What is to be stored and served.

    ``contexts`` is under how many contexts each document is computed: 1 for INDEPENDENT and ANCHORED; in EXACT the
    number of different chunk sequences that come before it. ``requests_per_s`` read ``tokens_loaded`` stored tokens
    each, of which the share ``resident`` is already in the decode service's memory.
    """

    documents: int
    tokens_per_document: int
    contexts: float = 1.0
    tokens_loaded: int = 0
    requests_per_s: float = 1.0
    resident: float = 0.0
    load_s_max: float = 0.1
    prefill_tokens_per_s: float = 0.0  # 0: unknown

    def __post_init__(self) -> None:
        for name in ("documents", "tokens_per_document", "contexts", "load_s_max"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("tokens_loaded", "requests_per_s", "prefill_tokens_per_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        if not 0 <= self.resident <= 1:
            raise ValueError(f"resident: {self.resident} is not in 0..1")


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, rates in bytes a second.

    ``first_token_rate`` is what one request needs to load in ``load_s_max``; ``sustained_rate`` what all requests
    together move. ``break_even_rate`` is the network below which prefill is faster than loading, None if unknown.
    """

    token_nbytes: int
    entry_nbytes: int
    store_nbytes: int
    first_token_rate: float
    sustained_rate: float
    break_even_rate: float | None

    @property
    def network_rate(self) -> float:
        """The network to buy: what one request needs and what all need together, whichever is more."""
        return max(self.first_token_rate, self.sustained_rate)


def token_nbytes(layout: KVLayout) -> int:
    """Bytes of KV for one token."""
    return layout.nbytes(1)


def entry_nbytes(layout: KVLayout, tokens: int) -> int:
    """Bytes that one entry takes in a store, header included, for a context of a few chunks."""
    checksums = 8 * block_count(layout.plane_nbytes(tokens), BLOCK_NBYTES)
    header = HEADER_FIXED_NBYTES + len(layout.canonical()) + 4 * tokens + checksums
    return -(-header // ALIGN_NBYTES) * ALIGN_NBYTES + layout.nbytes(tokens)


def plan(layout: KVLayout, workload: Workload) -> Plan:
    """What ``workload`` needs of a store and of the network to it."""
    token = token_nbytes(layout)
    entry = entry_nbytes(layout, workload.tokens_per_document)
    moved = workload.tokens_loaded * (1 - workload.resident) * token
    known = workload.prefill_tokens_per_s > 0
    return Plan(
        token_nbytes=token,
        entry_nbytes=entry,
        store_nbytes=round(workload.documents * workload.contexts * entry),
        first_token_rate=workload.tokens_loaded * token / workload.load_s_max,
        sustained_rate=moved * workload.requests_per_s,
        break_even_rate=token * workload.prefill_tokens_per_s if known else None,
    )


def entries_that_fit(layout: KVLayout, tokens: int, capacity_nbytes: int) -> int:
    """How many entries of ``tokens`` tokens a store of ``capacity_nbytes`` holds."""
    return capacity_nbytes // entry_nbytes(layout, tokens)


def load_s(layout: KVLayout, tokens: int, bytes_per_s: float) -> float:
    """Seconds to load ``tokens`` tokens at ``bytes_per_s``. Raises ``ValueError`` for a rate that is not positive."""
    if bytes_per_s <= 0:
        raise ValueError(f"bytes_per_s: {bytes_per_s} is not positive")
    return tokens * token_nbytes(layout) / bytes_per_s
