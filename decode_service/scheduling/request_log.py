"""One line for each stage that a request reaches in the worker, under the request's id; no text of anybody's."""

from __future__ import annotations

import logging

from decode_service.scheduling.giving_way import GaveWay
from decode_service.scheduling.sequence import Failed, Finished, Sequence
from serving.rpc.errors import status_name
from serving.trace.request_id import bearing

log = logging.getLogger(__name__)


def admitted(sequence: Sequence, wanted: int) -> None:
    """It has its pages; ``wanted`` of its chunks have to be fetched."""
    if log.isEnabledFor(logging.DEBUG):
        with bearing(sequence.request_id):
            waited = _ms(sequence.clock.spent_ns()["queue"])
            log.debug(
                "admitted after %s ms; %d of %d chunks to fetch", waited, wanted, len(sequence.composition.chunks)
            )


def gave_way(sequence: Sequence, why: GaveWay) -> None:
    """It waits again, with what it has generated."""
    with bearing(sequence.request_id):
        kept = "kept in host memory" if sequence.aside is not None else "to be computed again"
        log.info("gave its pages up (%s) after %d tokens, their KV %s", why.value, len(sequence.generated), kept)


def first_token(sequence: Sequence) -> None:
    if log.isEnabledFor(logging.DEBUG):
        with bearing(sequence.request_id):
            log.debug("first token %s ms after its arrival", _ms(sequence.clock.spent_ns()["first_token"]))


def ended(sequence: Sequence, event: Finished | Failed) -> None:
    spent_ns, answered = sequence.clock.spent_ns(), bool(sequence.generated)
    took = _ms(spent_ns["total"])
    with bearing(sequence.request_id):
        if isinstance(event, Failed):
            log.warning("failed with %s after %s ms: %s", status_name(event.error), took, event.error.message)
            return
        cached = sequence.composition.cached_tokens
        log.info(
            "finished (%s) after %s ms, first token after %s ms: %d prompt tokens, %d of them cached, %d generated",
            *(event.reason.value, took, _ms(spent_ns["first_token"]) if answered else "-"),
            *(sequence.composition.prompt_tokens, cached if answered else 0, len(sequence.generated)),
        )


def _ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.1f}"
