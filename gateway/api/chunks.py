"""``/v1/cairn/chunks``: chunks registered, listed, pinned and forgotten over HTTP."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.responses import JSONResponse, Response

from cairn import ChunkRef, StoredChunk, Tokens
from cairn.client.calls import ListOptions, PrefillOptions
from cairn.client.chunks import CHUNK_TYPES, LIST_ORDERS
from cairn.client.prompt import REUSE_MODES
from cairn.client.requests import Segment
from gateway.api.asked import Asked
from gateway.api.fields import Fields
from gateway.errors import invalid
from gateway.streams import unless_gone

PAGE_DEFAULT, PAGE_MAX = 100, 1000
TTL_S_MAX = 1e9


async def register(asked: Asked) -> Response:
    """Registers text, token ids or a known chunk, and computes its KV behind its context."""
    fields = await asked.fields()
    content, options = _content(fields), _options(fields)
    fields.end()
    options["request_id"] = asked.new_id()
    work = asked.client.prefill(content, **options)
    return JSONResponse({"object": "cairn.chunk", **asdict(await unless_gone(asked.request.receive, work))})


def _content(fields: Fields) -> Segment:
    ways = [name for name in ("text", "token_ids", "id") if fields.has(name)]
    if len(ways) != 1:
        raise invalid("text", "give one of text, token_ids and id")
    if ways == ["text"]:
        return fields.string("text") or ""
    return ChunkRef(fields.required("id")) if ways == ["id"] else Tokens(fields.integers("token_ids") or [])


def _options(fields: Fields) -> PrefillOptions:
    return {
        "type": fields.string("type", CHUNK_TYPES) or "",
        "context": fields.strings("context") or (),
        "reuse": fields.string("reuse", REUSE_MODES) or "exact",
        "name": fields.string("name") or "",
        "tags": fields.strings("tags") or (),
        "ttl_s": fields.number("ttl_s", 0, TTL_S_MAX),
        "pin": bool(fields.boolean("pin")),
        "role": fields.string("role") or "",
        "salt": fields.string("salt") or "",
        "shared": bool(fields.boolean("shared")),
        "durable": bool(fields.boolean("durable")),
    }


async def listing(asked: Asked) -> Response:
    """A page of the caller's chunks; ``next`` is the ``after`` of the following one."""
    query = asked.query()
    options: ListOptions = {
        "type": query.string("type", CHUNK_TYPES) or "",
        "tag": query.string("tag") or "",
        "name": query.string("name") or "",
        "order": query.string("order", LIST_ORDERS) or "created",
        "page_size": _limit(query.string("limit")),
    }
    after = query.string("after") or ""
    query.end()
    found, following = await asked.client.chunks_page(after, **options)
    data = [_stored(chunk) for chunk in found]
    return JSONResponse({"object": "list", "data": data, "has_more": bool(following), "next": following or None})


async def retrieve(asked: Asked) -> Response:
    """One chunk, with its text or its token ids if the query says so."""
    query = asked.query()
    text, token_ids = _wanted(query, "text"), _wanted(query, "token_ids")
    query.end()
    chunk = await asked.client.get(asked.path("chunk"), text=text, token_ids=token_ids)
    more = {"text": chunk.text} if text else {}
    return JSONResponse({**_stored(chunk), **more, **({"token_ids": chunk.token_ids} if token_ids else {})})


async def delete(asked: Asked) -> Response:
    """Forgets a chunk and its KV."""
    chunk_id = asked.path("chunk")
    freed = await asked.client.delete(chunk_id)
    return JSONResponse({"id": chunk_id, "object": "cairn.chunk.deleted", "deleted": True, **asdict(freed)})


async def pin(asked: Asked) -> Response:
    """Keeps a chunk from being evicted."""
    return JSONResponse(_stored(await asked.client.pin(asked.path("chunk"))))


async def unpin(asked: Asked) -> Response:
    """Lets a pinned chunk be evicted again."""
    return JSONResponse(_stored(await asked.client.unpin(asked.path("chunk"))))


def _limit(words: str | None) -> int:
    if words is None:
        return PAGE_DEFAULT
    if not (words.isascii() and words.isdecimal() and 1 <= int(words[:9]) <= PAGE_MAX):
        raise invalid("limit", f"must be in 1..{PAGE_MAX}")
    return int(words)


def _wanted(query: Fields, name: str) -> bool:
    return query.string(name, ("true", "false")) == "true"


def _stored(chunk: StoredChunk) -> dict[str, Any]:
    told = asdict(chunk)
    del told["text"], told["token_ids"]
    return {"object": "cairn.chunk", **told}
