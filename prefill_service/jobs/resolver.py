"""From what a caller asks to what must be made: content, context, keys, and every reason to refuse.

Plain values in and out, no protobuf. All of it runs in a store thread: it tokenizes and asks the registry, and
it does not know what is stored or resident of the KV it names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chunk_store.key import ChunkId, ChunkKey, ChunkType, chunk_id
from chunk_store.record import ChunkRecord
from chunk_store.store import ChunkStore
from chunk_store.tenant import SHARED_TENANT, Tenant, TenantLimits, tenant_of, visible_to
from engine.kv.pool import PagedKVPool
from engine.reuse import KeyedChunk, ReuseMode, key_composition
from engine.served import ServedModel
from engine.sight import Sight
from serving.errors import InvalidRequest, PermissionDenied, RequestError, Unsupported
from serving.resolving import check_mode, check_vocabulary, readable, unknown_chunk
from serving.tenancy.quotas import TenantQuotas
from serving.trace.stages import StageTimer
from text.codec import TextCodec


@dataclass(frozen=True)
class ChunkRequest:
    """What a caller asks: exactly one of ``text``, ``token_ids`` and ``chunk_id`` is not None.

    ``type`` and ``role`` belong to new content; a ``chunk_id`` brings its own type. ``ttl_s`` 0 is none. The salt
    is the caller's and says whose content this is; ``SHARED_SALT`` publishes for everybody. ``durable``: the KV is to
    be stored, not just computed, when the job ends.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chunk_id: str | None = None
    type: ChunkType = ChunkType.CONTEXT
    context: tuple[str, ...] = ()
    mode: ReuseMode = ReuseMode.EXACT
    name: str = ""
    tags: tuple[str, ...] = ()
    ttl_s: float = 0.0
    pin: bool = False
    role: str = ""
    salt: str = ""
    durable: bool = False

    @property
    def tenant(self) -> Tenant:
        return tenant_of(self.salt)

    @property
    def labelled(self) -> bool:
        """Whether it says something about the chunk that is written down."""
        return bool(self.name or self.tags or self.pin or self.ttl_s)


@dataclass(frozen=True)
class CompositionRequest:
    """What a caller asks of a composition of registered chunks: the KV of those at the places ``wanted``, ascending."""

    chunk_ids: tuple[str, ...]
    wanted: tuple[int, ...]
    mode: ReuseMode = ReuseMode.EXACT
    salt: str = ""
    borrower: str = ""
    durable: bool = False

    @property
    def tenant(self) -> Tenant:
        return tenant_of(self.salt)


@dataclass(frozen=True)
class PrefillJob:
    """KV to make: the composition's chunks with their keys; ``wanted`` were asked for, ``needed`` are these and all
    that they attend to. Both ascend. ``borrower``: to whom of this host the wanted ones are lent, if to anybody.
    ``durable``: the job ends when all of it is stored."""

    chunk_ids: tuple[ChunkId, ...]
    chunks: tuple[KeyedChunk, ...]
    wanted: tuple[int, ...]
    needed: tuple[int, ...]
    tenant: Tenant
    limits: TenantLimits
    newly_registered: bool
    borrower: str = ""
    durable: bool = False

    @property
    def chunk_id(self) -> ChunkId:
        return self.chunk_ids[-1]

    @property
    def key(self) -> ChunkKey:
        return self.chunks[-1].key

    def owner(self, index: int) -> Tenant:
        """Whose KV a chunk's is."""
        return SHARED_TENANT if self.chunks[index].shared else self.tenant

    @property
    def tokens(self) -> int:
        """Of the chunk itself."""
        return len(self.chunks[-1].token_ids)


class Resolver:
    """Registers content and says what KV it needs."""

    def __init__(
        self,
        store: ChunkStore,
        served: ServedModel,
        codec: TextCodec,
        pool: PagedKVPool,
        quotas: TenantQuotas | None = None,
    ) -> None:
        self.store = store
        self.quotas = quotas or TenantQuotas()
        self.served = served
        self.codec = codec
        self.pool = pool

    def register(self, request: ChunkRequest, timer: StageTimer) -> PrefillJob:
        """Checks a request against model, registry and pool, registers its content, and names its KV.

        Raises ``RequestError``; nothing is registered then.
        """
        _check_labels(request)
        check_mode(self.served, request.mode)
        with timer.stage("lookup"):
            context = self._resolve_ids(request.context, "context_chunk_ids", request.tenant)
        record, known = self._resolve_content(request, timer)
        chunks = [*(chunk.token_ids for chunk in context), record.token_ids]
        self._check_length([len(token_ids) for token_ids in chunks], request.mode)
        shared = [chunk.tenant == SHARED_TENANT for chunk in (*context, record)]
        keyed = key_composition(self.served.identity, chunks, request.mode, request.salt, shared)
        wanted = len(keyed) - 1
        needed = (*keyed[wanted].context, wanted)
        self._check_pool(keyed, (wanted,), needed)
        limits = self.quotas.of(request.tenant).limits
        with timer.stage("lookup"):
            added = self._put(request, record, known, limits)
        ids = (*(chunk.chunk_id for chunk in context), record.chunk_id)
        return PrefillJob(ids, tuple(keyed), (wanted,), needed, request.tenant, limits, added, durable=request.durable)

    def compose(self, request: CompositionRequest, timer: StageTimer) -> PrefillJob:
        """Checks a composition against model, registry and pool, and names its KV. Raises ``RequestError``."""
        check_mode(self.served, request.mode)
        with timer.stage("lookup"):
            records = self._resolve_ids(request.chunk_ids, "chunk_ids", request.tenant)
        for index, record in enumerate(records):
            check_vocabulary(max(record.token_ids), f"chunk_ids[{index}]", self.served.vocabulary)
        chunks = [record.token_ids for record in records]
        self._check_length([len(token_ids) for token_ids in chunks], request.mode, "chunk_ids")
        shared = [record.tenant == SHARED_TENANT for record in records]
        keyed = key_composition(self.served.identity, chunks, request.mode, request.salt, shared)
        needed = sorted({each for index in request.wanted for each in (*keyed[index].context, index)})
        self._check_pool(keyed, request.wanted, needed)
        limits = self.quotas.of(request.tenant).limits
        ids = tuple(record.chunk_id for record in records)
        return PrefillJob(
            *(ids, tuple(keyed), request.wanted, tuple(needed), request.tenant, limits, False),
            borrower=request.borrower,
            durable=request.durable,
        )

    def resolve_id(self, name: str, tenant: Tenant, field: str = "chunk_id") -> ChunkRecord:
        """A chunk that the tenant may use, of any tokenizer. Raises ``NotFound``."""
        record = self.store.get_records([ChunkId(name)], visible_to(tenant))[0]
        if record is None:
            raise unknown_chunk(field, name)
        return record

    def _resolve_ids(self, names: Sequence[str], field: str, tenant: Tenant) -> list[ChunkRecord]:
        """Chunks that the tenant may use and this model can read."""
        records = self.store.get_records([ChunkId(name) for name in names], visible_to(tenant)) if names else []
        return [readable(record, name, field, self.codec.identity) for name, record in zip(names, records, strict=True)]

    def _resolve_content(self, request: ChunkRequest, timer: StageTimer) -> tuple[ChunkRecord, bool]:
        """The record that the request is about, and whether it stays as it is but for what the request says of it.

        Content that is shared, and of which the request says nothing more, is not registered a second time.
        """
        if request.chunk_id is not None:
            with timer.stage("lookup"):
                record = self._resolve_ids([request.chunk_id], "chunk_id", request.tenant)[0]
            if request.labelled and record.tenant != request.tenant:
                raise not_yours("chunk_id", record.chunk_id)
            check_vocabulary(max(record.token_ids), "chunk_id", self.served.vocabulary)
            return record, True
        token_ids = request.token_ids
        if request.text is not None:
            with timer.stage("tokenize"):
                token_ids = self.codec.encode(request.text, role=request.role)
        field = "token_ids" if request.text is None else "text"
        if not token_ids:
            raise InvalidRequest(
                "no tokens in it", field=field, remedy="a chunk needs at least one (text or token_ids)"
            )
        check_vocabulary(max(token_ids), field, self.served.vocabulary)
        name = chunk_id(self.codec.identity, request.type, token_ids)
        with timer.stage("lookup"):
            there = self.store.get_records([name], visible_to(request.tenant))[0]
        if there is not None and there.tenant != request.tenant and not request.labelled:
            return there, True
        pinned = there is not None and there.tenant == request.tenant and there.pinned
        new = ChunkRecord(name, self.codec.identity, request.type, tuple(token_ids), tenant=request.tenant)
        return replace(new, pinned=pinned), False

    def _check_length(self, lengths: Sequence[int], mode: ReuseMode, field: str = "context_chunk_ids") -> None:
        limit = self.served.limit(mode)
        if sum(lengths) > limit.tokens:
            raise InvalidRequest(
                f"context of {sum(lengths[:-1])} tokens and chunk of {lengths[-1]} are together longer than the "
                f"model's context, limited to {limit}",
                field=field,
                remedy="shorten or leave out a chunk",
            )

    def _check_pool(self, chunks: Sequence[KeyedChunk], wanted: Sequence[int], needed: Sequence[int]) -> None:
        """A chunk and all that its rows see have to be in the pool at once.

        Where they see everything, one that is wanted sees more than any that it attends to.
        """
        sight = self.served.sight
        for index in needed if sight.is_limited else wanted:
            lengths = [len(chunks[i].token_ids) for i in (*seen_context(chunks, index, sight), index)]
            pages = sum(self.pool.pages_for(length) for length in lengths)
            if pages > self.pool.chunk_pages:
                raise Unsupported(
                    f"chunk of {lengths[-1]} tokens with {sum(lengths[:-1])} tokens of context needs {pages} pages of "
                    f"{self.pool.page_size} tokens, the pool has {self.pool.chunk_pages}",
                    remedy="raise --kv-pages",
                )

    def _put(self, request: ChunkRequest, record: ChunkRecord, known: bool, limits: TenantLimits) -> bool:
        """Writes what the request says about the chunk; True if it was new.

        A pin stays until it is taken away; a TTL is replaced by new content without one, not by naming the id.
        """
        if known and not request.labelled:
            return False
        expires_at = time.time() + request.ttl_s if request.ttl_s else (record.expires_at if known else None)
        wanted = replace(
            record,
            name=request.name,
            tags=request.tags,
            pinned=request.pin or record.pinned,
            expires_at=expires_at,
            transient=False,
        )
        return self.store.put_records([wanted], limits=limits)[0]


def seen_context(chunks: Sequence[KeyedChunk], index: int, sight: Sight) -> tuple[int, ...]:
    """The chunks of a chunk's context that its rows can see."""
    context = chunks[index].context
    return context[sight.unseen([len(chunks[each].token_ids) for each in context]) :] if sight.is_limited else context


def not_yours(field: str, name: str) -> RequestError:
    """For a change to a chunk that the caller may use and does not own."""
    return PermissionDenied(f"chunk {name} is shared", field=field, remedy="only a token marked admin may change it")


def _check_labels(request: ChunkRequest) -> None:
    """Values that mean nothing; counts and lengths were checked in the message."""
    if "" in request.tags:
        raise InvalidRequest("an empty tag means nothing", field="tags", remedy="leave it out")
    if not math.isfinite(request.ttl_s) or request.ttl_s < 0:
        raise InvalidRequest(f"{request.ttl_s} is not a number of seconds", field="ttl_s", remedy="0 means no TTL")
    if request.role and request.text is None:
        raise InvalidRequest("belongs to text", field="role", remedy="token_ids and chunk_id are taken as they are")
