"""How busy decode services are, and what their model is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModeSupport:
    """Whether the decode service's model allows a reuse mode, up to which context, and if not, why."""

    mode: str
    supported: bool
    reason: str
    context_length_max: int = 0


@dataclass(frozen=True)
class Loads:
    """How busy the decode service is now, and what its model is.

    Of several services that a client is given, numbers are the sums of all that answer, contexts those that all of them
    take, and ``replicas`` has each of them.
    """

    running: int
    waiting: int
    waiting_max: int
    batch_max: int
    pages_total: int
    pages_free: int
    pages_chunks: int
    pages_tails: int
    chunks_resident: int
    page_size: int
    model_name: str
    model_identity: str
    context_length_max: int
    context_length_declared: int
    context_length_reason: str
    modes: tuple[ModeSupport, ...] = field(default=())
    dtype: str = ""
    dtype_reason: str = ""
    attention: str = ""
    attention_reason: str = ""
    same_bits: bool = False
    same_bits_reason: str = ""
    tokenizer_identity: str = ""
    steps: int = 0
    step_bytes_read: int = 0
    step_bytes_flat: int = 0
    replicas: tuple[Replica, ...] = field(default=())


@dataclass(frozen=True)
class Replica:
    """One of several decode services. ``state``: ``"up"``, ``"away"`` (takes no requests: starts, shuts down, cannot be
    reached), ``"hangs"``, ``"differs"`` (another model: it is given nothing), ``"unknown"``; and ``why``. ``loads`` is
    what it said of itself, None if it did not."""

    address: str
    state: str
    why: str
    loads: Loads | None
