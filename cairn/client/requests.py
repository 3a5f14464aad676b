"""A caller's arguments as protobuf requests. Refuses here what no service could accept; touches no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, Unpack

from cairn.client.chunks import CHUNK_TYPES, LIST_ORDERS, ChunkRef
from cairn.client.errors import invalid
from cairn.client.prompt import CACHE_USES, CHUNK_ORDERS, GRAMMAR_FORMS, REUSE_MODES, Grammar, Text, Tokens
from cairn.client.sampling import SamplingOptions, sampling_params
from cairn.client.token_ids import token_ids
from protos import chunks_pb2, decode_pb2, prefill_pb2

Segment: TypeAlias = ChunkRef | Text | Tokens | str | Sequence[int]
ChunkName: TypeAlias = ChunkRef | str

PRIORITY_MAX = 9


def prefill_request(
    content: Segment,
    *,
    type: str = "",
    context: Sequence[ChunkName] = (),
    reuse: str = "exact",
    name: str = "",
    tags: Sequence[str] = (),
    ttl_s: float | None = None,
    pin: bool = False,
    role: str = "",
    salt: str = "",
    request_id: str = "",
    shared: bool = False,
    durable: bool = False,
) -> prefill_pb2.PrefillChunkRequest:
    """A ``PrefillChunkRequest``. Raises ``InvalidRequest``."""
    if isinstance(context, str | ChunkRef):
        raise invalid("context", "give a list of chunks")
    if isinstance(tags, str):
        raise invalid("tags", "give a list of strings")
    if ttl_s is not None and not ttl_s > 0:
        raise invalid("ttl_s", f"must be positive or None, not {ttl_s}")
    fields = _content(content, "content")
    own_type, own_role = fields.pop("type", ""), fields.pop("role", "")
    if (role or own_role) and "text" not in fields:
        raise invalid("role", "only text is rendered with a role")
    return prefill_pb2.PrefillChunkRequest(
        **fields,
        type=_chunk_type(type or own_type),
        context_chunk_ids=[chunk_id_of(chunk, f"context[{index}]") for index, chunk in enumerate(context)],
        reuse_mode=_reuse_mode(reuse),
        name=name,
        tags=tags,
        ttl_s=ttl_s or 0.0,
        pin=pin,
        role=role or own_role,
        salt=salt,
        request_id=request_id,
        shared=shared,
        durable=durable,
    )


def generate_request(
    segments: Sequence[Segment] | decode_pb2.Chat,
    *,
    reuse: str = "exact",
    cache: str = "shared",
    order: str = "given",
    salt: str = "",
    request_id: str | None = None,
    keep: bool = False,
    grammar: Grammar | None = None,
    priority: int = 0,
    start_within_s: float | None = None,
    **sampling: Unpack[SamplingOptions],
) -> decode_pb2.GenerateRequest:
    """A ``GenerateRequest`` of segments or a chat; None: the service decides. Raises ``InvalidRequest``."""
    chat, parts = (segments, ()) if isinstance(segments, decode_pb2.Chat) else (None, segments)
    _check_prompt(segments, cache, order)
    return decode_pb2.GenerateRequest(
        request_id=request_id or "",
        segments=[_segment(each, f"segments[{index}]") for index, each in enumerate(parts)],
        chat=chat,
        sampling=sampling_params(**sampling),
        reuse_mode=_reuse_mode(reuse),
        salt=salt,
        cache_use=decode_pb2.CacheUse.Value(f"CACHE_USE_{cache.upper()}"),
        order=decode_pb2.ChunkOrder.Value(f"CHUNK_ORDER_{order.upper()}"),
        keep=keep,
        grammar=None if grammar is None else _grammar(grammar),
        **_turn(priority, start_within_s),
    )


def _turn(priority: int, start_within_s: float | None) -> dict[str, Any]:
    """When a request wants its turn."""
    if not isinstance(priority, int) or not 0 <= priority <= PRIORITY_MAX:
        raise invalid("priority", f"must be in 0..{PRIORITY_MAX}, not {priority!r}")
    if start_within_s is not None and not 0 < start_within_s < float("inf"):
        raise invalid("start_within_s", f"must be positive or None, not {start_within_s!r}")
    return {"priority": priority, "start_within_s": start_within_s or 0.0}


def _check_prompt(segments: Sequence[Segment] | decode_pb2.Chat, cache: str, order: str) -> None:
    if isinstance(segments, str | ChunkRef | Text | Tokens):
        raise invalid("segments", "give a list: the chunks in order, the query last")
    if not isinstance(segments, decode_pb2.Chat) and not segments:
        raise invalid("segments", "is empty: the query, at least, is needed")
    if cache not in CACHE_USES:
        raise invalid("cache", f"must be one of {', '.join(CACHE_USES)}, not {cache!r}")
    if order not in CHUNK_ORDERS:
        raise invalid("order", f"must be one of {', '.join(CHUNK_ORDERS)}, not {order!r}")


def list_request(
    *, type: str = "", tag: str = "", name: str = "", order: str = "created", page_size: int = 100, page_token: str = ""
) -> prefill_pb2.ListChunksRequest:
    """A ``ListChunksRequest``. Raises ``InvalidRequest``."""
    if order not in LIST_ORDERS:
        raise invalid("order", f"must be one of {', '.join(LIST_ORDERS)}, not {order!r}")
    if not 1 <= page_size <= 1000:
        raise invalid("page_size", f"must be in 1..1000, not {page_size}")
    return prefill_pb2.ListChunksRequest(
        type=_chunk_type(type),
        tag=tag,
        name=name,
        page_size=page_size,
        page_token=page_token,
        order=prefill_pb2.ListChunksRequest.Order.Value(f"ORDER_{order.upper()}"),
    )


def chunk_id_of(chunk: ChunkName, field: str = "chunk") -> str:
    """The id of a chunk or an id itself. Raises ``InvalidRequest`` for anything else, and for an empty id."""
    chunk_id = chunk.id if isinstance(chunk, ChunkRef) else chunk
    if not isinstance(chunk_id, str) or not chunk_id:
        raise invalid(field, f"must be a chunk or its id, not {chunk_id!r}")
    return chunk_id


def _content(segment: Segment, field: str) -> dict[str, Any]:
    """The protobuf fields that give a segment's content, its type and its role."""
    if isinstance(segment, ChunkRef):
        return {"chunk_id": chunk_id_of(segment, field)}
    if isinstance(segment, str):
        return {"text": segment}
    if isinstance(segment, Text):
        return {"text": segment.text, "type": segment.type, "role": segment.role}
    tokens = segment if isinstance(segment, Tokens) else Tokens(segment)
    if not hasattr(tokens.ids, "__iter__") or isinstance(tokens.ids, str | bytes):
        raise invalid(field, f"must be a chunk, a text or token ids, not {tokens.ids!r}")
    return {"token_ids": chunks_pb2.TokenIds(ids=token_ids(tokens.ids, field)), "type": tokens.type}


def _segment(segment: Segment, field: str) -> decode_pb2.Segment:
    fields = _content(segment, field)
    return decode_pb2.Segment(**{**fields, "type": _chunk_type(fields.get("type", ""))})


def _grammar(grammar: Grammar) -> decode_pb2.Grammar:
    if not isinstance(grammar, Grammar) or grammar.form not in GRAMMAR_FORMS:
        raise invalid("grammar", f"must be Grammar.json_schema(...) or another of its forms, not {grammar!r}"[:200])
    if grammar.form == "json_object":
        return decode_pb2.Grammar(json_object=True)
    if not isinstance(grammar.source, str):
        raise invalid("grammar", f"its source must be text, not {type(grammar.source).__name__}")
    made = decode_pb2.Grammar()
    setattr(made, grammar.form, grammar.source)
    return made


def _chunk_type(type: str) -> chunks_pb2.ChunkType.ValueType:
    if type and type not in CHUNK_TYPES:
        raise invalid("type", f"must be one of {', '.join(CHUNK_TYPES)}, not {type!r}")
    return chunks_pb2.ChunkType.Value(f"CHUNK_TYPE_{(type or 'unspecified').upper()}")


def _reuse_mode(reuse: str) -> chunks_pb2.ReuseMode.ValueType:
    if reuse not in REUSE_MODES:
        raise invalid("reuse", f"must be one of {', '.join(REUSE_MODES)}, not {reuse!r}")
    return chunks_pb2.ReuseMode.Value(f"REUSE_MODE_{reuse.upper()}")
