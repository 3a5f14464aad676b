"""What ends an answer: its grammar, a token that stops it, or its length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from decode_service.scheduling.sequence import Failed, Finished, FinishReason
from serving.errors import InvalidRequest
from text.grammar.matcher import GrammarFailed

if TYPE_CHECKING:
    from decode_service.scheduling.sequence import Sequence
    from serving.errors import RequestError


def grammar_failed(error: GrammarFailed) -> RequestError:
    """What the caller is told whose answer cannot go on."""
    return InvalidRequest(f"too complex to go on: {error}", field="grammar", remedy="make it simpler")


def end_behind(sequence: Sequence, token_id: int, eos_token_ids: frozenset[int]) -> Finished | Failed | None:
    """How an answer ends with ``token_id``, the last one generated; None if it goes on. Its grammar takes the token."""
    if sequence.grammar is not None:
        try:
            sequence.grammar.accept(token_id)
        except GrammarFailed as error:
            return Failed(grammar_failed(error))
        if sequence.grammar.is_over:
            return Finished(FinishReason.STOP)
    params = sequence.params
    stops = token_id in params.stop_token_ids
    stops |= not params.ignore_eos and token_id in eos_token_ids
    if stops and len(sequence.generated) >= params.min_tokens:
        return Finished(FinishReason.STOP)
    if len(sequence.generated) >= params.max_tokens:
        return Finished(FinishReason.LENGTH)
    return None
