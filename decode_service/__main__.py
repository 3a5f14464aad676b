"""``python -m decode_service``: puts the decode service together and runs it."""

from __future__ import annotations

import sys

from decode_service.options import DecodeOptions, parse
from serving.process.logs import adopt_library_loggers, begin_logging

if __name__ == "__main__":
    given = parse()
    begin_logging("decode", given.log_level, given.log_format)

import os
import signal
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from chunk_store.open import open_store, shown_url
from chunk_store.quantities import human_bytes
from decode_service.api.service import DecodeService
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.kv_source.prefill_client import RemotePrefillClient
from decode_service.metrics import DecodeMetrics
from decode_service.prompt.resolver import Resolver
from decode_service.same_bits import needs_one_size, same_bits
from decode_service.worker import DecodeWorker
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from serving.process.life import Listed, run_main
from serving.process.loading import Loaded, pool_nbytes_default, pool_pages
from serving.rpc.access import Access
from serving.store.gauges import StoreGauges
from serving.store.metered import MeteredStore, StoreMeter
from serving.tenancy.quotas import TenantQuotas

FULL_NAME = "cairn.v1.DecodeService"

# How long a thread keeps the interpreter that another one wants; Python's own 5 ms are a whole step. The device thread
# lets go of it with every call of torch, and an event loop that writes 64 messages a step would keep it each time.
# Steps of 6 ms for 64 streams (bench.stream_cost, bench/LOG.md): the device waits 28 % of the time with 5 ms, 11 % with
# 1 ms, 4 % with this, 2 % with 0.1 ms, which costs a fifth more processor time in changes of threads.
SWITCH_INTERVAL_S = 0.0002


def build(options: DecodeOptions, loaded: Loaded, on_failure: Callable[[], None] = lambda: None) -> DecodeService:
    """The service over a loaded model; ``on_failure`` is called when its device thread ends because of a fault.

    Raises ``StoreUnavailable``, ``OSError`` or ``ValueError``.
    """
    served = loaded.served
    tokens = options.batch_max * served.context_length_max
    pages = options.kv_pages or pool_pages(
        served.layout, options.page_size, tokens, pool_nbytes_default(options.device)
    )
    chunk_pages = min(pages - 1, max(1, round(pages * options.chunk_page_ratio)))
    size = human_bytes(pages * served.layout.nbytes(options.page_size))
    one_size = needs_one_size(options, served.row_bits)
    with loaded.startup.stage("pool", f"preparing the KV pool: {pages} pages, {size}"):
        pool = PagedKVPool(
            served.layout, pages=pages, chunk_pages=chunk_pages, page_size=options.page_size, device=options.device
        )
        runner = served.make_runner(
            pool,
            slots=options.batch_max,
            decode_buckets=options.decode_buckets(one_size=one_size),
            row_multiple=options.row_multiple(one_size=one_size),
            max_cascade_levels=options.cascade_levels_max,
        )
        runner.prepare()
    metrics = DecodeMetrics(CollectorRegistry(), model_name=loaded.model_name, token_nbytes=served.layout.nbytes(1))
    with loaded.startup.stage("store", f"opening the store {shown_url(options.store)}"):
        store = MeteredStore(
            open_store(options.store, password=options.password()),
            StoreMeter(metrics.registry, loaded.model_name),
        )
    metrics.registry.register(StoreGauges(store, loaded.model_name))
    prefill_client = RemotePrefillClient(options.prefill, token=options.token_for_prefill(), ca=options.prefill_ca)
    residents = ResidentChunks(pool)
    access = Access.from_file(options.token_file)
    quotas = TenantQuotas(access.quotas, options.tenant_quota)
    resolver = Resolver(served, loaded.codec, store, quotas)
    worker = DecodeWorker(
        runner,
        residents,
        KVFetcher(store, prefill_client, served.identity, resolver.register),
        metrics,
        eos_token_ids=served.eos_token_ids,
        batch_max=options.batch_max,
        waiting_max=options.waiting_max,
        quotas=quotas,
        host_nbytes=options.host_cache,
        on_failure=on_failure,
    )
    metrics.watch_worker(worker.occupancy)

    def close() -> None:
        prefill_client.close()
        store.close()

    return DecodeService(
        worker,
        resolver,
        access,
        metrics.registry,
        model_name=loaded.model_name,
        same_bits=same_bits(options, served.row_bits),
        request_timeout_s=options.request_timeout_s,
        close=close,
    )


def main(options: DecodeOptions) -> int:
    adopt_library_loggers()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    failed: list[bool] = []

    def on_failure() -> None:
        """A service that can decode no more ends, so that what supervises it starts another one."""
        failed.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    code = run_main([Listed("decode", FULL_NAME, options)], lambda loaded: [build(options, loaded, on_failure)])
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(given))
