"""The extension of requests, ``"cairn": {...}``: documents, how KV is reused, what is kept; and its part of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cairn import Result
from cairn.client.calls import ChatOptions, GenerateOptions
from cairn.client.prompt import CACHE_USES, CHUNK_ORDERS, REUSE_MODES
from gateway.api.fields import Fields
from gateway.api.logprobs import prompt_logprobs
from gateway.errors import invalid

DOCUMENTS_MAX = 1024
PRIORITY_MAX = 9
SECONDS_MAX = 1e6
LIKELIEST_MAX = 20


@dataclass
class Extension:
    """What ``cairn`` says: documents as messages that stand before the conversation, and options of ``generate``."""

    documents: Sequence[dict[str, Any]] = ()
    options: GenerateOptions = field(default_factory=GenerateOptions)


def extension_of(fields: Fields) -> Fields:
    """The extension in a request; none is an empty one."""
    return fields.object("cairn") or Fields({}, "cairn")


def read_extension(given: Fields) -> Extension:
    """What every request may say there. Raises ``HttpError``."""
    options: GenerateOptions = {}
    options["reuse"] = given.string("reuse", REUSE_MODES) or "exact"
    options["cache"] = given.string("cache", CACHE_USES) or "shared"
    options["order"] = given.string("order", CHUNK_ORDERS) or "given"
    options["salt"] = given.string("salt") or ""
    options["priority"] = given.integer("priority", 0, PRIORITY_MAX) or 0
    options["start_within_s"] = given.number("start_within_s", 0, SECONDS_MAX)
    options["prompt_logprobs"] = given.integer("prompt_logprobs", 0, LIKELIEST_MAX)
    keep = given.boolean("keep")
    if keep is not None:
        options["keep"] = keep
    documents = given.items("documents") or []
    if len(documents) > DOCUMENTS_MAX:
        raise invalid("cairn.documents", f"has more than {DOCUMENTS_MAX}")
    read = [_document(each, f"cairn.documents[{index}]") for index, each in enumerate(documents)]
    return Extension(read, options)


def can_keep(options: GenerateOptions) -> bool:
    """Whether a turn answered with these options can be kept."""
    return (options["reuse"], options["cache"], options["prompt_logprobs"]) == ("exact", "shared", None)


def read_chat_options(given: Fields) -> ChatOptions:
    """What chats may say there beside it. Raises ``HttpError``."""
    return {
        "template_arguments": given.mapping("template_arguments"),
        "continue_last_message": bool(given.boolean("continue_last_message")),
        "parse": given.boolean("parse") is not False,
    }


def _document(value: Any, where: str) -> dict[str, Any]:
    """A message of the document's own, outside of the template unless it has a role."""
    if isinstance(value, str):
        return {"role": "", "content": value}
    fields = Fields(value, where)
    ways = [name for name in ("id", "name", "text") if fields.has(name)]
    if len(ways) != 1:
        raise invalid(where, "give one of id, name and text")
    (way,) = ways
    words, role = fields.required(way), fields.string("role") or ""
    fields.end()
    return {"role": role, "content": words if way == "text" else [{"type": "chunk", way: words}]}


def report(result: Result) -> dict[str, Any]:
    """What an answer says under ``cairn``: where KV came from, what was kept, how long each stage took."""
    told: dict[str, Any] = {
        "request_id": result.request_id,
        "reuse": asdict(result.reuse),
        "usage": asdict(result.usage),
        "timings": asdict(result.timings),
        "seed": result.seed,
        "kept": None if result.kept is None else asdict(result.kept),
        "chat": None if result.chat is None else asdict(result.chat),
        "preemptions": result.preemptions,
    }
    if result.prompt_logprobs:
        told["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs, result.token_bytes)
    return told
