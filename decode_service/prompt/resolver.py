"""From what a caller asks to a composition: text to tokens, ids to content, every reason to refuse.

Plain values in and out, no protobuf. Runs in a thread of its own: it tokenizes and asks the store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chunk_store.errors import StoreUnavailable
from chunk_store.key import ChunkId, ChunkType, chunk_id
from chunk_store.record import ChunkRecord
from chunk_store.store import ChunkStore
from chunk_store.tenant import SHARED_TENANT, Tenant, tenant_of, visible_to
from decode_service.prompt.composition import Composition, compose, compose_turn
from decode_service.prompt.memory import KeyMemory, RecordMemory
from decode_service.prompt.order import ChunkOrder, canonical_order
from decode_service.prompt.request_chunk import Segment
from engine.reuse import ReuseMode
from engine.served import ServedModel
from serving.errors import InvalidRequest
from serving.resolving import check_mode, readable
from serving.tenancy.quotas import TenantQuotas
from text.codec import TextCodec

RECORD_TOKENS_MAX = 1 << 20  # of records remembered for a time without the store, about 40 MB


@dataclass(frozen=True)
class SegmentRequest:
    """One segment as asked for: exactly one of ``text``, ``token_ids`` and ``chunk_id`` is not None.

    ``field``: its name in errors, if it is not one of the request's segments. ``fixed``: it changes places with none.
    """

    text: str | None
    token_ids: tuple[int, ...] | None
    chunk_id: str | None
    type: ChunkType
    role: str = ""
    field: str = ""
    fixed: bool = False


class Resolver:
    """Makes compositions out of segments, against one model and one store."""

    def __init__(
        self, served: ServedModel, codec: TextCodec, store: ChunkStore, quotas: TenantQuotas | None = None
    ) -> None:
        self.quotas = quotas or TenantQuotas()
        self.served = served
        self.codec = codec
        self.store = store
        self._records = RecordMemory(RECORD_TOKENS_MAX)
        self._keys = KeyMemory()

    def resolve(
        self,
        segments: Sequence[SegmentRequest],
        mode: ReuseMode,
        salt: str,
        order: ChunkOrder = ChunkOrder.GIVEN,
    ) -> Composition:
        """The composition of a request, under the caller's salt.

        Raises ``RequestError`` naming the segment and the remedy.
        """
        check_mode(self.served, mode)
        tenant = tenant_of(salt)
        resolved = self._resolve_all(segments, tenant)
        indices = None
        if order is ChunkOrder.CANONICAL:
            held = [bool(segment.role) or segment.fixed for segment in segments]
            indices = canonical_order(resolved, held, lambda names: self._uses(names, tenant))
        return compose(self.served, resolved, mode, salt, self._keys, indices)

    def note_use(self, composition: Composition) -> None:
        """Counts that a request uses its chunks; what that is good for is a later request's order."""
        self.store.note_uses([chunk.segment.chunk_id for chunk in composition.chunks], composition.tenant)

    def _uses(self, names: Sequence[ChunkId], tenant: Tenant) -> Sequence[int]:
        """While the store is away nothing counts as used, and all of one type is ordered by id."""
        try:
            return self.store.uses(names, tenant)
        except StoreUnavailable:
            return [0 for _ in names]

    def _resolve_all(self, segments: Sequence[SegmentRequest], tenant: Tenant) -> list[Segment]:
        last = len(segments) - 1
        inline = {
            index: self._inline(index, segment, index == last)
            for index, segment in enumerate(segments)
            if segment.chunk_id is None
        }
        named = [ChunkId(segment.chunk_id) for segment in segments if segment.chunk_id is not None]
        records = self._lookup(named, [known.chunk_id for known in inline.values() if known.chunk_id], tenant)

        def resolved(index: int, segment: SegmentRequest) -> Segment:
            if segment.chunk_id is None:
                record = records.get(inline[index].chunk_id)
                return replace(inline[index], shared=record is not None and record.tenant == SHARED_TENANT)
            found, field = records[ChunkId(segment.chunk_id)], segment.field or f"segments[{index}].chunk_id"
            record = readable(found, segment.chunk_id, field, self.codec.identity)
            shared = record.tenant == SHARED_TENANT
            return Segment(record.chunk_id, record.type, record.token_ids, record.name, named_by_id=True, shared=shared)

        found = [resolved(index, segment) for index, segment in enumerate(segments)]
        if len(found) > 1 and segments[-1].role and found[-2].type is ChunkType.TURN:
            # A turn ends as its answer was generated: what the template puts behind an answer is left to what follows.
            found[-1] = replace(found[-1], token_ids=self.codec.closing(found[-2].token_ids) + found[-1].token_ids)
        return found

    def _lookup(self, named: list[ChunkId], inline: list[ChunkId], tenant: Tenant) -> dict[ChunkId, ChunkRecord | None]:
        """What the tenant may use, by id: its own, else what is shared.

        The store says who has what, each time; content that was seen lately is not read again, for it never changes
        under its id. While the store is away what was seen lately serves; an ``inline`` one does without, and is not
        looked up again while it is known to be the tenant's own.
        """
        seen = {name: self._records.find(tenant, name) for name in inline}
        remembered = {name: self._records.find(tenant, name) for name in named}
        names = [*named, *(name for name, record in seen.items() if record is None or record.tenant != tenant)]
        known = {name: record.token_ids for name, record in (seen | remembered).items() if record is not None}
        try:
            found = self.store.get_records(names, visible_to(tenant), known=known) if names else []
        except StoreUnavailable:
            if None in remembered.values():
                raise
            return seen | remembered
        records = dict(zip(names, found, strict=True))
        for name, record in records.items():
            self._records.remember(tenant, name, record)
        return seen | records

    def _inline(self, index: int, segment: SegmentRequest, last: bool) -> Segment:
        token_ids = segment.token_ids or () if segment.text is None else self._encode(index, segment, last)
        name = "" if last else chunk_id(self.codec.identity, segment.type, token_ids)
        return Segment(ChunkId(name), segment.type, token_ids)

    def _encode(self, index: int, segment: SegmentRequest, last: bool) -> tuple[int, ...]:
        """A query with a role opens the model's answer, as chat templates do."""
        assert segment.text is not None
        try:
            return self.codec.encode(segment.text, role=segment.role, generation_prompt=last and bool(segment.role))
        except ValueError as error:
            raise InvalidRequest(f"{segment.field or f'segments[{index}]'}.{error}") from error

    def register(self, composition: Composition) -> None:
        """Registers inline chunks that are new, as content that makes room for other; what is known stays as it is.

        Called when the prefill service is about to be asked for one of them. Raises what stores raise.
        """
        self._register(composition.context, composition.tenant)

    def turn(self, before: Composition, answer: Sequence[int], salt: str) -> Composition:
        """The query of ``before`` and the answer to it as a chunk, the last one, under the chunks before the query."""
        token_ids = (*before.segments[-1].token_ids, *answer)
        name = chunk_id(self.codec.identity, ChunkType.TURN, token_ids)
        turn = Segment(name, ChunkType.TURN, token_ids, named_by_id=True)
        return compose_turn(self.served, before, turn, salt, self._keys)

    def register_turn(self, turn: Composition) -> None:
        """Registers a turn, and what is new of the chunks before it, as content that makes room for other.

        Raises what stores raise.
        """
        segments = [*turn.context, replace(turn.segments[-1], named_by_id=False)]
        self._register(segments, turn.tenant)

    def _register(self, segments: Sequence[Segment], tenant: Tenant) -> None:
        inline = {s.chunk_id: s for s in segments if not (s.named_by_id or s.shared)}
        names = list(inline)
        known = dict(zip(names, self.store.get_records(names, [tenant]), strict=True)) if names else {}
        now = time.time()
        new = [
            ChunkRecord(
                *(segment.chunk_id, self.codec.identity, segment.type, segment.token_ids),
                created_at=now,
                last_used_at=now,
                tenant=tenant,
                transient=True,
            )
            for segment, record in ((segment, known[name]) for name, segment in inline.items())
            if record is None or record.transient
        ]
        if new:
            self.store.put_records(new, limits=self.quotas.of(tenant).limits)
        for record in new:
            self._records.remember(tenant, record.chunk_id, record)
