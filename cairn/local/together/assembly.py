"""Both services over one copy of the model: the decode service's worker computes for both, one publisher writes out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cairn.local.together.shared_pool import SharedPool
from decode_service import assembly as decode_parts
from decode_service.api.service import DecodeService
from decode_service.assembly import PoolSize
from decode_service.kv_source.claims import ChunkClaims
from decode_service.options import DecodeOptions
from decode_service.turns import claim_with
from prefill_service import assembly as prefill_parts
from prefill_service.api.service import PrefillService
from prefill_service.options import PrefillOptions
from serving.errors import Unavailable
from serving.process.loading import POOL_NBYTES_DEFAULT, Loaded, pool_pages

CONTEXTS_TO_COMPUTE = 2  # of the model's full length, that chunks have room for beside those of answers
POOL_SHARE = 0.75  # of the device memory that is free once the model is loaded


def build(
    prefill: PrefillOptions, decode: DecodeOptions, loaded: Loaded, on_failure: Callable[[], None] = lambda: None
) -> tuple[DecodeService, PrefillService]:
    """The services over one loaded model, in the order in which they start; they stop in the other.

    ``on_failure`` is called when the device thread ends because of a fault. Raises ``StoreUnavailable``, ``OSError`` or
    ``ValueError``.
    """
    served = loaded.served
    first = prefill_parts.prepare(prefill, loaded)
    parts = decode_parts.prepare(decode, loaded, pool_size(prefill, decode, loaded))

    def post(call: Callable[[], None]) -> None:
        try:
            answers.worker.call(call)
        except Unavailable as error:
            raise RuntimeError("the device thread has ended") from error

    publisher = first.publisher(parts.residents, post)
    claims = ChunkClaims(
        parts.store, publisher, served.identity, served.layout, lambda tenant: first.quotas.of(tenant).limits
    )
    # Elsewhere kept turns are computed anew, as requests for chunks, and claimed like any.
    claim_turn = None if parts.runner.alone(1, chunk=True) else claim_with(claims)
    answers = decode_parts.assemble(parts, claims, on_failure=on_failure, close=claims.stop, claim_turn=claim_turn)
    computer = SharedPool(served, answers.worker, first.store, claims, drain_s=prefill.drain_s)
    chunks = prefill_parts.assemble(first, computer, parts.residents.pool, None, pages=False)
    return answers, chunks


def pool_size(prefill: PrefillOptions, decode: DecodeOptions, loaded: Loaded) -> PoolSize:
    """The one pool: as large as what both were told together, or what there is memory for.

    Chunks have their share of the decode service's pages and all of the prefill service's.
    """
    layout, context = loaded.served.layout, loaded.served.context_length_max
    to_compute = -(-CONTEXTS_TO_COMPUTE * context // decode.page_size)
    tokens = (decode.batch_max + CONTEXTS_TO_COMPUTE) * context
    pages = decode.kv_pages or pool_pages(layout, decode.page_size, tokens, pool_nbytes(decode.device))
    chunk_pages = min(to_compute, pages // 4)
    if prefill.kv_pages is not None:
        pages, chunk_pages = pages + prefill.kv_pages, prefill.kv_pages
    chunk_pages += round((pages - chunk_pages) * decode.chunk_page_ratio)
    return PoolSize(pages, min(pages - 1, max(1, chunk_pages)))


def pool_nbytes(device: str) -> int:
    """Bytes of a pool whose size nobody gave, where one process has the device."""
    if torch.device(device).type != "cuda":
        return 2 * POOL_NBYTES_DEFAULT
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * POOL_SHARE)
