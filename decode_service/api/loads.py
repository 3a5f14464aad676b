"""What a decode service tells of how busy it is, and of the model that it serves."""

from __future__ import annotations

from typing import Final

from chunk_store.tenant import Tenant
from decode_service.device.worker import DecodeWorker
from decode_service.prompt.resolver import Resolver
from protos import decode_pb2
from serving.process.same_bits import SameBits
from serving.rpc import wire

# What is told of all tenants together.
OTHERS: Final = (
    *("pages_free", "pages_chunks", "pages_tails", "chunks_resident"),
    *("steps", "step_bytes_read", "step_bytes_flat"),
)


def loads_out(
    worker: DecodeWorker, resolver: Resolver, *, model_name: str, same_bits: SameBits, owner: Tenant | None
) -> decode_pb2.GetLoadsResponse:
    """For who may see what everybody does, or of one ``owner`` alone."""
    occupancy, served, steps = worker.occupancy(), resolver.served, worker.metrics.steps
    reply = decode_pb2.GetLoadsResponse(
        running=occupancy.running,
        waiting=occupancy.waiting,
        waiting_max=worker.waiting_max,
        batch_max=worker.batch_max,
        pages_total=sum(occupancy.pages.values()),
        pages_free=occupancy.pages["free"],
        pages_chunks=occupancy.pages["chunk"],
        pages_tails=occupancy.pages["tail"],
        chunks_resident=occupancy.chunks_resident,
        page_size=worker.residents.pool.page_size,
        model_name=model_name,
        model_identity=served.identity,
        context_length_max=served.context_length_max,
        dtype=served.borrowed.dtype_name,
        dtype_reason=served.borrowed.dtype_reason,
        attention=served.decision.attention,
        attention_reason=served.decision.reason,
        context_length_declared=served.limit().declared,
        context_length_reason=served.limit().because,
        same_bits=same_bits.always,
        same_bits_reason=same_bits.reason,
        tokenizer_identity=resolver.codec.identity,
        steps=steps.steps,
        step_bytes_read=steps.nbytes_read,
        step_bytes_flat=steps.nbytes_flat,
    )
    if owner is not None:
        reply.running, reply.waiting = worker.places.of(owner)
        for others in OTHERS:
            reply.ClearField(others)
    for mode, refusal in served.refusals.items():
        limit = served.limit(mode)
        reply.modes.add(
            mode=wire.reuse_mode_out(mode),
            supported=not refusal,
            reason=refusal or limit.because,
            context_length_max=0 if refusal else limit.tokens,
        )
    return reply
