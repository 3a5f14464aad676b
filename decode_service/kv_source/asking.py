"""What is wanted of a KV source, and on what terms; what a prefill service answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from chunk_store.entry import MissReason
from chunk_store.key import ChunkKey
from chunk_store.landing import Landing
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import ChunkOutcome, Claim, RequestChunk, Unpublished
from engine.kv.host_tier import ChunkMemory
from serving.handover.lent import Lent


class NoRoomToAsk(Exception):
    """KV has to be computed, and enough requests wait for that already."""


@dataclass(eq=False)
class Wanted:
    """A chunk to fill, the memory for it, why it was missing if it was, and how it came in the end.

    ``made`` is what a prefill service said of it. The memory of one whose outcome is ``unpublished`` is not filled: it
    is to be computed there.
    """

    chunk: RequestChunk
    memory: ChunkMemory
    missed: MissReason | None = None
    made: ComputedChunk | None = None
    outcome: ChunkOutcome | None = None


@dataclass(frozen=True)
class FetchTerms:
    """On what terms KV is fetched for a request. ``deadline``: by the monotonic clock, in seconds.

    ``abandoned``: whether nobody wants the KV any more. ``may_ask``: whether KV may be asked for that is computed
    elsewhere; once it may, it may for the rest of the fetch. ``came`` is told, in any thread, of each chunk that
    has its outcome, while others are still to come. ``insist``: the store is tried though it was full a moment ago.
    ``borrower``: to whom of this host what is computed may be lent; ``durable``: it is of use only when the store has
    it.
    """

    salt: str
    deadline: float = math.inf
    abandoned: Callable[[], bool] = lambda: False
    may_ask: Callable[[], bool] = lambda: True
    came: Callable[[Wanted], None] = lambda _: None
    insist: bool = False
    borrower: str = ""
    durable: bool = True


@dataclass(frozen=True)
class ComputedChunk:
    """What is said of chunk ``index`` of a composition: its KV can be used, or why it is not stored.

    With a ``claim`` it is whoever asked that computes it, and publishes it. ``durable``: the store has it now;
    ``lent``: where it is until then, and if the store does not take it; ``read`` copies it from this process's own
    memory, where it waits to be written, and says whether it is there still.
    """

    index: int
    key: ChunkKey
    durable: bool = True
    unpublished: Unpublished | None = None
    claim: Claim | None = None
    lent: Lent | None = None
    read: Callable[[Landing], bool] | None = None


class PrefillClient(Protocol):
    """Asks a prefill service for KV."""

    def compute_all(
        self, composition: Composition, indices: Sequence[int], terms: FetchTerms
    ) -> Iterator[ComputedChunk]:
        """Has the KV of some chunks made, and of what they attend to; yields each as soon as it can be used.

        Raises ``RequestError``, soon once the caller has ``abandoned`` it, and not after its deadline. What was yielded
        before stays true.
        """
