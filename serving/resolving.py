"""What both services check of what a request names: chunks by id, token ids, the reuse mode.

Every function raises a ``RequestError`` that names ``field``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunk_store.key import TokenizerIdentity
from chunk_store.record import ChunkRecord
from engine.reuse import ReuseMode
from serving.errors import InvalidRequest, NotFound, RequestError, Unsupported

if TYPE_CHECKING:  # whoever checks plain values loads no model
    from engine.served import ServedModel


def unknown_chunk(field: str, name: str) -> RequestError:
    """For a chunk that was never registered, was deleted, or has expired."""
    remedy = "register it with PrefillChunk or send its content"
    return NotFound(f"no chunk {name!r} here (or it has expired)", field=field, remedy=remedy)


def readable(record: ChunkRecord | None, name: str, field: str, tokenizer: TokenizerIdentity) -> ChunkRecord:
    """The record that was found under ``name``. Raises ``NotFound``, or ``Unsupported`` as below."""
    if record is None:
        raise unknown_chunk(field, name)
    check_tokenizer(record, field, tokenizer)
    return record


def check_tokenizer(record: ChunkRecord, field: str, tokenizer: TokenizerIdentity) -> None:
    """Raises ``Unsupported`` for a chunk whose token ids another tokenizer made."""
    if record.tokenizer != tokenizer:
        raise Unsupported(
            f"chunk {record.chunk_id} was registered under tokenizer {record.tokenizer[:16]}, this service has "
            f"{tokenizer[:16]}",
            field=field,
            remedy="register its content here",
        )


def check_vocabulary(largest: int, field: str, vocabulary: int) -> None:
    """Raises ``InvalidRequest`` if the largest of some token ids is one that the model does not have."""
    if largest >= vocabulary:
        raise InvalidRequest(f"token id {largest} is not in the model's vocabulary, 0..{vocabulary - 1}", field=field)


def check_mode(served: ServedModel, mode: ReuseMode) -> None:
    """Raises ``Unsupported`` for a reuse mode that the model fails."""
    if refusal := served.refusals[mode]:
        problem = f"{mode.value} is not offered for model {served.borrowed.name}: {refusal}"
        raise Unsupported(problem, field="reuse_mode", remedy="use exact")
