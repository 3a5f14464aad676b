"""The extension of requests, ``"cairn": {...}``: documents, how KV is reused, what is kept; and its part of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cairn import AsyncClient, ChunkRef, Result, Text, Tokens
from cairn.client.calls import GenerateOptions
from cairn.client.requests import Segment
from cairn.client.types import CACHE_USES, CHUNK_ORDERS, CHUNK_TYPES, REUSE_MODES
from gateway.api.fields import Fields
from gateway.errors import HttpError, invalid

DOCUMENTS_MAX = 1024


@dataclass(frozen=True)
class Document:
    """A document before the conversation: a segment, or the name of a chunk."""

    where: str
    segment: Segment | None
    chunk_name: str = ""


@dataclass
class Extension:
    """What ``cairn`` says beside the options of ``generate``."""

    documents: Sequence[Document] = ()
    options: GenerateOptions = field(default_factory=GenerateOptions)


def read_extension(fields: Fields, document_role: str = "") -> Extension:
    """The extension of a request; none is an empty one. Raises ``HttpError``."""
    given = fields.object("cairn") or Fields({}, "cairn")
    options: GenerateOptions = {}
    options["reuse"] = given.string("reuse", REUSE_MODES) or "exact"
    options["cache"] = given.string("cache", CACHE_USES) or "shared"
    options["order"] = given.string("order", CHUNK_ORDERS) or "given"
    options["salt"] = given.string("salt") or ""
    keep = given.boolean("keep")
    if keep is not None:
        options["keep"] = keep
    role = given.string("document_role")
    documents = given.items("documents") or []
    if len(documents) > DOCUMENTS_MAX:
        raise invalid("cairn.documents", f"has more than {DOCUMENTS_MAX}")
    read = [
        _document(each, f"cairn.documents[{index}]", document_role if role is None else role)
        for index, each in enumerate(documents)
    ]
    given.end()
    return Extension(read, options)


def _document(value: Any, where: str, role: str) -> Document:
    if isinstance(value, str):
        return Document(where, Text(value, role=role))
    fields = Fields(value, where)
    ways = [name for name in ("id", "name", "text", "token_ids") if fields.has(name)]
    if len(ways) != 1:
        raise invalid(where, "give one of id, name, text and token_ids")
    segment: Segment | None = None
    name = ""
    if ways == ["id"]:
        segment = ChunkRef(fields.required("id"))
    elif ways == ["name"]:
        name = fields.required("name")
    elif ways == ["text"]:
        own = fields.string("role")
        text = fields.string("text") or ""
        segment = Text(text, fields.string("type", CHUNK_TYPES) or "context", role if own is None else own)
    else:
        segment = Tokens(fields.integers("token_ids") or [], fields.string("type", CHUNK_TYPES) or "context")
    fields.end()
    return Document(where, segment, name)


async def segments_of(documents: Sequence[Document], client: AsyncClient) -> list[Segment]:
    """The documents as segments, names looked up. Raises ``HttpError`` or ``CairnError``."""
    return [each.segment if each.segment is not None else await _named(each, client) for each in documents]


async def _named(document: Document, client: AsyncClient) -> ChunkRef:
    found, _ = await client.chunks_page(name=document.chunk_name, page_size=2)
    if len(found) != 1:
        many = "several chunks have" if found else "no chunk has"
        raise HttpError(404, f"{document.where}: {many} this name", param=document.where, code="not_found")
    return ChunkRef(found[0].id)


def report(result: Result) -> dict[str, Any]:
    """What an answer says under ``cairn``: where KV came from, what was kept, how long each stage took."""
    return {
        "request_id": result.request_id,
        "reuse": asdict(result.reuse),
        "usage": asdict(result.usage),
        "timings": asdict(result.timings),
        "seed": result.seed,
        "kept": None if result.kept is None else asdict(result.kept),
    }
