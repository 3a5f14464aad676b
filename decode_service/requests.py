"""From what a caller asks to a composition: text to tokens, ids to content, every reason to refuse.

Plain values in and out, no protobuf. Runs in a thread of its own: it tokenizes and asks the store.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from grpc import StatusCode

from chunk_store.key import ChunkId, ChunkType, chunk_id
from chunk_store.store import ChunkRecord, ChunkStore, StoreUnavailable
from decode_service.composition import Composition, Part, compose
from engine.reuse import ReuseMode
from engine.served import ServedModel
from engine.tokenizer import TextCodec
from serving.errors import RequestError

RECORD_TOKENS_MAX = 1 << 20  # of records remembered for a time without the store, about 40 MB


@dataclass(frozen=True)
class SegmentRequest:
    """One segment as asked for: exactly one of ``text``, ``token_ids`` and ``chunk_id`` is not None."""

    text: str | None
    token_ids: tuple[int, ...] | None
    chunk_id: str | None
    type: ChunkType
    role: str = ""


class RecordMemory:
    """The records seen last, up to a number of tokens; thread-safe."""

    def __init__(self, tokens_max: int) -> None:
        self._tokens_max = tokens_max
        self._tokens = 0
        self._records: OrderedDict[ChunkId, ChunkRecord] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, name: ChunkId) -> ChunkRecord | None:
        with self._lock:
            return self._records.get(name)

    def remember(self, name: ChunkId, record: ChunkRecord | None) -> None:
        """Keeps a record as the newest; None forgets it, for it is no longer registered."""
        with self._lock:
            known = self._records.pop(name, None)
            self._tokens -= len(known.token_ids) if known else 0
            if record is None or len(record.token_ids) > self._tokens_max:
                return
            self._records[name] = record
            self._tokens += len(record.token_ids)
            while self._tokens > self._tokens_max:
                _, oldest = self._records.popitem(last=False)
                self._tokens -= len(oldest.token_ids)


class Resolver:
    """Makes compositions out of segments, against one model and one store."""

    def __init__(self, served: ServedModel, codec: TextCodec, store: ChunkStore) -> None:
        self.served = served
        self.codec = codec
        self.store = store
        self._records = RecordMemory(RECORD_TOKENS_MAX)

    def resolve(self, segments: Sequence[SegmentRequest], mode: ReuseMode, salt: str) -> Composition:
        """The composition of a request.

        Raises ``RequestError`` naming the segment and the remedy.
        """
        refusal = self.served.refusals[mode]
        if refusal:
            raise RequestError(
                StatusCode.FAILED_PRECONDITION,
                f"reuse_mode: {mode.value} is not offered for model {self.served.borrowed.name}: {refusal}; use exact",
            )
        parts = self._parts(segments)
        try:
            composition = compose(self.served, parts, mode, salt)
        except ValueError as error:
            raise RequestError(StatusCode.INVALID_ARGUMENT, str(error)) from error
        return composition

    def _parts(self, segments: Sequence[SegmentRequest]) -> list[Part]:
        named = [ChunkId(segment.chunk_id) for segment in segments if segment.chunk_id is not None]
        records = self._lookup(named) if named else {}
        last = len(segments) - 1
        return [self._part(index, segment, records, index == last) for index, segment in enumerate(segments)]

    def _lookup(self, named: list[ChunkId]) -> dict[ChunkId, ChunkRecord | None]:
        """Records by id. While the store is away those seen lately serve: content never changes under its id."""
        try:
            records = dict(zip(named, self.store.get_records(named), strict=True))
        except StoreUnavailable:
            remembered = {name: self._records.find(name) for name in named}
            if None in remembered.values():
                raise
            return remembered
        for name, record in records.items():
            self._records.remember(name, record)
        return records

    def _part(
        self, index: int, segment: SegmentRequest, records: dict[ChunkId, ChunkRecord | None], last: bool
    ) -> Part:
        if segment.chunk_id is not None:
            record = self._known(index, records[ChunkId(segment.chunk_id)], segment.chunk_id)
            return Part(record.chunk_id, record.type, record.token_ids, record.name, named_by_id=True)
        token_ids = segment.token_ids or () if segment.text is None else self._encode(index, segment, last)
        name = "" if last else chunk_id(self.codec.identity, segment.type, token_ids)
        return Part(ChunkId(name), segment.type, token_ids)

    def _known(self, index: int, record: ChunkRecord | None, wanted: str) -> ChunkRecord:
        if record is None:
            raise RequestError(
                StatusCode.NOT_FOUND,
                f"segments[{index}].chunk_id: {wanted!r} is not registered (or has expired); register it with "
                "PrefillChunk or send its content",
            )
        if record.tokenizer != self.codec.identity:
            raise RequestError(
                StatusCode.FAILED_PRECONDITION,
                f"segments[{index}].chunk_id: {wanted} was registered with tokenizer {record.tokenizer[:12]}, this "
                f"model's is {self.codec.identity[:12]}; register its text with this model",
            )
        return record

    def _encode(self, index: int, segment: SegmentRequest, last: bool) -> tuple[int, ...]:
        """A query with a role opens the model's answer, as chat templates do."""
        assert segment.text is not None
        try:
            return self.codec.encode(segment.text, role=segment.role, generation_prompt=last and bool(segment.role))
        except ValueError as error:
            raise RequestError(StatusCode.INVALID_ARGUMENT, f"segments[{index}].{error}") from error

    def register(self, composition: Composition) -> None:
        """Registers inline chunks that are new, as content that makes room for other; what is known stays as it is.

        Called when the prefill service is about to be asked for one of them. Raises what stores raise.
        """
        inline = {part.chunk_id: part for part in composition.parts[:-1] if not part.named_by_id}
        known = self._lookup(list(inline)).values() if inline else []
        now = time.time()
        new = [
            ChunkRecord(
                part.chunk_id,
                self.codec.identity,
                part.type,
                part.token_ids,
                created_at=now,
                last_used_at=now,
                transient=True,
            )
            for part, record in zip(inline.values(), known, strict=True)
            if record is None or record.transient
        ]
        if new:
            self.store.put_records(new)
        for record in new:
            self._records.remember(record.chunk_id, record)
